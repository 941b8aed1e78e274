//! Where a tunnel may go. A peer stands in somebody's home: without this, every customer could reach its router.
//!
//! The rules are asked twice, on the hub and again by the peer, each time of the *resolved* address: a name may
//! point anywhere, and may point elsewhere a second later.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

/// The host part of a destination.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Host {
    Ip(IpAddr),
    /// Lower case, without a trailing dot, at most 253 bytes.
    Name(String),
}

impl Host {
    /// An address (IPv6 with or without brackets) or a host name. `None` for what is neither; that includes
    /// `127.1`, `0x7f000001` and the like, which a resolver further on would take for addresses.
    pub fn parse(s: &str) -> Option<Host> {
        let bare = s.strip_prefix('[').and_then(|s| s.strip_suffix(']'));
        if let Some(v6) = bare {
            return v6.parse::<Ipv6Addr>().ok().map(|ip| Host::Ip(IpAddr::V6(ip)));
        }
        if let Ok(ip) = s.parse::<IpAddr>() {
            return Some(Host::Ip(ip));
        }
        let name = s.strip_suffix('.').unwrap_or(s);
        if name.is_empty() || name.len() > 253 {
            return None;
        }
        let label_ok = |label: &str| {
            !label.is_empty()
                && label.len() <= 63
                && !label.starts_with('-')
                && !label.ends_with('-')
                && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
        };
        if !name.split('.').all(label_ok) {
            return None;
        }
        let last = name.rsplit('.').next().unwrap_or(name);
        let numeric = last.bytes().all(|b| b.is_ascii_digit())
            || (last.len() >= 2
                && last[..2].eq_ignore_ascii_case("0x")
                && last[2..].bytes().all(|b| b.is_ascii_hexdigit()));
        (!numeric).then(|| Host::Name(name.to_ascii_lowercase()))
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Host::Ip(ip) => ip.fmt(f),
            Host::Name(name) => f.write_str(name),
        }
    }
}

/// A destination: host and port.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Dest {
    pub host: Host,
    pub port: u16,
}

impl Dest {
    /// Parses `host:port`, with IPv6 in brackets.
    pub fn parse(s: &str) -> Option<Dest> {
        let (host, port) = s.rsplit_once(':')?;
        if host.contains(':') && !host.starts_with('[') {
            return None;
        }
        if port.is_empty() || !port.bytes().all(|b| b.is_ascii_digit()) {
            return None;
        }
        Some(Dest { host: Host::parse(host)?, port: port.parse().ok()? })
    }
}

impl fmt::Display for Dest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.host {
            Host::Ip(IpAddr::V6(ip)) => write!(f, "[{ip}]:{}", self.port),
            host => write!(f, "{host}:{}", self.port),
        }
    }
}

/// A block of addresses, `192.0.2.0/24`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Net {
    ip: IpAddr,
    bits: u8,
}

impl Net {
    pub fn contains(&self, ip: IpAddr) -> bool {
        match (self.ip, ip) {
            (IpAddr::V4(net), IpAddr::V4(ip)) => {
                let mask = u32::MAX.checked_shl(32 - u32::from(self.bits)).unwrap_or(0);
                net.to_bits() & mask == ip.to_bits() & mask
            }
            (IpAddr::V6(net), IpAddr::V6(ip)) => {
                let mask = u128::MAX.checked_shl(128 - u32::from(self.bits)).unwrap_or(0);
                net.to_bits() & mask == ip.to_bits() & mask
            }
            _ => false,
        }
    }
}

impl FromStr for Net {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let (ip, bits) = match s.split_once('/') {
            Some((ip, bits)) => (ip, Some(bits)),
            None => (s, None),
        };
        let ip: IpAddr =
            ip.trim().parse().map_err(|_| format!("'{s}' is not an address or a block such as 192.0.2.0/24"))?;
        let most = if ip.is_ipv4() { 32 } else { 128 };
        let bits = match bits {
            None => most,
            Some(bits) => bits
                .trim()
                .parse()
                .ok()
                .filter(|b| *b <= most)
                .ok_or_else(|| format!("'{s}': the prefix length must be 0 to {most}"))?,
        };
        Ok(Net { ip, bits })
    }
}

impl fmt::Display for Net {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.ip, self.bits)
    }
}

/// Why a destination is refused. The text goes to the customer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Denied {
    #[error("private, local or reserved address")]
    Address,
    #[error("host name is local")]
    LocalName,
    #[error("domain is not allowed")]
    Domain,
    #[error("port is not allowed")]
    Port,
}

/// The rules. Without any configuration the public internet is allowed, save port 25.
#[derive(Debug, Clone)]
pub struct Policy {
    /// Blocks that are allowed although they are not public: for tests and private set-ups.
    pub allow: Vec<Net>,
    /// Public blocks that are not allowed.
    pub deny: Vec<Net>,
    pub deny_ports: Vec<u16>,
    /// If any, only these.
    pub only_ports: Vec<u16>,
    /// `example.com` also stands for every name under it.
    pub deny_domains: Vec<String>,
    /// If any, only these, and no bare addresses.
    pub only_domains: Vec<String>,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            allow: Vec::new(),
            deny: Vec::new(),
            deny_ports: vec![25],
            only_ports: Vec::new(),
            deny_domains: Vec::new(),
            only_domains: Vec::new(),
        }
    }
}

impl Policy {
    /// What can be said before a name is resolved.
    pub fn check(&self, dest: &Dest) -> Result<(), Denied> {
        if dest.port == 0
            || self.deny_ports.contains(&dest.port)
            || (!self.only_ports.is_empty() && !self.only_ports.contains(&dest.port))
        {
            return Err(Denied::Port);
        }
        match &dest.host {
            Host::Ip(_) if !self.only_domains.is_empty() => Err(Denied::Domain),
            Host::Ip(ip) => self.check_ip(*ip),
            Host::Name(name) => {
                let under = |list: &[String]| list.iter().any(|domain| is_under(name, domain));
                if under(&self.deny_domains) || (!self.only_domains.is_empty() && !under(&self.only_domains)) {
                    return Err(Denied::Domain);
                }
                let local =
                    ["localhost", "local", "internal", "home.arpa", "lan"].iter().any(|top| is_under(name, top))
                        || !name.contains('.');
                // With private blocks allowed, names for them are meant to work; their addresses are still checked.
                if local && self.allow.is_empty() { Err(Denied::LocalName) } else { Ok(()) }
            }
        }
    }

    /// The rule for a resolved address.
    pub fn check_ip(&self, ip: IpAddr) -> Result<(), Denied> {
        let ip = unmapped(ip);
        if self.deny.iter().any(|net| net.contains(ip)) {
            return Err(Denied::Address);
        }
        if is_public(ip) || self.allow.iter().any(|net| net.contains(ip)) { Ok(()) } else { Err(Denied::Address) }
    }
}

/// `name` is `domain` or lies under it.
pub fn is_under(name: &str, domain: &str) -> bool {
    let domain = domain.strip_prefix("*.").unwrap_or(domain);
    match name.strip_suffix(domain) {
        Some("") => true,
        Some(rest) => rest.ends_with('.'),
        None => false,
    }
}

/// The IPv4 address inside `::ffff:a.b.c.d`.
pub fn unmapped(ip: IpAddr) -> IpAddr {
    match ip {
        IpAddr::V6(v6) => v6.to_ipv4_mapped().map_or(ip, IpAddr::V4),
        v4 => v4,
    }
}

/// Whether an address is one of the public internet's. Addresses that carry an IPv4 address inside (mapped,
/// NAT64, 6to4) are what they carry.
pub fn is_public(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => is_public_v4(ip),
        IpAddr::V6(ip) => is_public_v6(ip),
    }
}

fn is_public_v4(ip: Ipv4Addr) -> bool {
    let [a, b, c, d] = ip.octets();
    !matches!(
        (a, b, c, d),
        (0 | 10 | 127, ..)
            | (100, 64..=127, ..)
            | (169, 254, ..)
            | (172, 16..=31, ..)
            | (192, 0, 0 | 2, _)
            | (192, 88, 99, _)
            | (192, 168, ..)
            | (198, 18 | 19, ..)
            | (198, 51, 100, _)
            | (203, 0, 113, _)
            | (224.., ..)
            // Azure's host agent answers here from inside every virtual machine.
            | (168, 63, 129, 16)
    )
}

fn is_public_v6(ip: Ipv6Addr) -> bool {
    let s = ip.segments();
    let v4 = |high: u16, low: u16| Ipv4Addr::from_bits(u32::from(high) << 16 | u32::from(low));
    match s {
        [0, 0, 0, 0, 0, 0xffff, high, low] => is_public_v4(v4(high, low)),
        [0x64, 0xff9b, 0, 0, 0, 0, high, low] => is_public_v4(v4(high, low)),
        [0x2002, high, low, ..] => is_public_v4(v4(high, low)),
        // Teredo, ORCHID, benchmarking and documentation lie inside 2000::/3; all else outside it is not public.
        [0x2001, 0, ..] | [0x2001, 0x2, 0, ..] | [0x2001, 0xdb8, ..] => false,
        [0x2001, 0x10..=0x2f, ..] => false,
        [0x3fff, 0..=0x0fff, ..] => false,
        [first, ..] => first & 0xe000 == 0x2000,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ip(s: &str) -> IpAddr {
        s.parse().expect("address")
    }

    #[test]
    fn what_is_not_public_is_refused_in_every_dress() {
        for bad in [
            "0.0.0.0",
            "10.1.2.3",
            "100.64.0.1",
            "100.100.100.200",
            "100.127.255.255",
            "127.0.0.1",
            "169.254.169.254",
            "172.16.0.1",
            "172.31.255.255",
            "192.168.1.1",
            "192.0.0.8",
            "198.18.0.1",
            "224.0.0.1",
            "255.255.255.255",
            "240.0.0.1",
            "168.63.129.16",
            "::",
            "::1",
            "::ffff:10.0.0.1",
            "::ffff:127.0.0.1",
            "::10.0.0.1",
            "64:ff9b::a00:1",
            "64:ff9b::a9fe:a9fe",
            "64:ff9b:1::808:808",
            "2002:a00:1::",
            "2002:7f00:1::1",
            "2001::1",
            "2001:db8::1",
            "fc00::1",
            "fd00:ec2::254",
            "fe80::1",
            "fec0::1",
            "ff02::1",
            "100::1",
            "3fff::1",
        ] {
            assert_eq!(Policy::default().check_ip(ip(bad)), Err(Denied::Address), "{bad}");
        }
        for good in [
            "1.1.1.1",
            "100.63.0.1",
            "100.128.0.1",
            "172.15.0.1",
            "172.32.0.1",
            "192.0.1.1",
            "::ffff:8.8.8.8",
            "64:ff9b::808:808",
            "2002:808:808::1",
            "2606:4700::1111",
            "2a00::1",
        ] {
            assert_eq!(Policy::default().check_ip(ip(good)), Ok(()), "{good}");
        }
    }

    #[test]
    fn ports_domains_and_names() {
        let policy = Policy { deny_domains: vec!["bank.example".into()], ..Policy::default() };
        let check = |s: &str| policy.check(&Dest::parse(s).expect("destination"));
        assert_eq!(check("mail.example.com:25"), Err(Denied::Port));
        assert_eq!(check("example.com:443"), Ok(()));
        assert_eq!(check("www.bank.example:443"), Err(Denied::Domain));
        assert_eq!(check("notbank.example:443"), Ok(()));
        for local in ["localhost:80", "a.localhost:80", "printer.local:80", "metadata.google.internal:80", "router:80"]
        {
            assert_eq!(check(local), Err(Denied::LocalName), "{local}");
        }
        let only = Policy { only_domains: vec!["ok.example".into()], only_ports: vec![443], ..Policy::default() };
        assert_eq!(only.check(&Dest::parse("a.ok.example:443").expect("d")), Ok(()));
        assert_eq!(only.check(&Dest::parse("a.ok.example:80").expect("d")), Err(Denied::Port));
        assert_eq!(only.check(&Dest::parse("8.8.8.8:443").expect("d")), Err(Denied::Domain));
        let lab = Policy { allow: vec!["127.0.0.0/8".parse().expect("block")], ..Policy::default() };
        assert_eq!(lab.check_ip(ip("127.9.9.9")), Ok(()));
        assert_eq!(lab.check_ip(ip("::ffff:127.0.0.1")), Ok(()));
        assert_eq!(lab.check_ip(ip("10.0.0.1")), Err(Denied::Address));
    }

    #[test]
    fn numbers_in_disguise_are_no_names() {
        for bad in
            ["127.1", "2130706433", "0x7f000001", "0177.0.0.1", "1.2.3.0x4", "a b", "", "-a.b", "a..b", "x/y", "u@h"]
        {
            assert_eq!(Host::parse(bad), None, "{bad}");
        }
        assert_eq!(Host::parse("EXAMPLE.com."), Some(Host::Name("example.com".into())));
        assert_eq!(Host::parse("[::1]"), Some(Host::Ip(ip("::1"))));
        assert_eq!(Dest::parse("::1:80"), None);
        assert_eq!(Dest::parse("h:+80"), None);
    }

    proptest! {
        #[test]
        fn a_mapped_address_is_judged_like_its_v4(v4: u32) {
            let v4 = Ipv4Addr::from_bits(v4);
            let policy = Policy::default();
            let plain = policy.check_ip(IpAddr::V4(v4));
            prop_assert_eq!(policy.check_ip(IpAddr::V6(v4.to_ipv6_mapped())), plain);
            let [a, b, c, d] = v4.octets();
            let nat64 = Ipv6Addr::new(0x64, 0xff9b, 0, 0, 0, 0, u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]));
            prop_assert_eq!(policy.check_ip(IpAddr::V6(nat64)), plain);
        }

        #[test]
        fn hosts_parse_or_not_but_never_panic(s in ".{0,300}") {
            if let Some(host) = Host::parse(&s) {
                prop_assert_eq!(Host::parse(&host.to_string()), Some(host));
            }
            let _ = Dest::parse(&s);
        }
    }
}
