//! Who is really there, behind a load balancer: PROXY protocol headers (v1 and v2) and X-Forwarded-For, believed only
//! from addresses that the operator trusts.

use crate::dest::{Net, unmapped};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

const V2: &[u8; 12] = b"\r\n\r\n\0\r\nQUIT\n";
/// The longest v1 line.
const V1_MOST: usize = 107;

/// What the start of a connection holds.
#[derive(Debug, PartialEq, Eq)]
pub enum Header {
    /// Not a PROXY header.
    None,
    More,
    /// The bytes it took, and the client's address (`None`: the proxy speaks for itself).
    Found(usize, Option<IpAddr>),
    Bad,
}

pub fn proxy_header(buf: &[u8]) -> Header {
    let prefix = |full: &[u8]| buf.starts_with(full) || full.starts_with(buf);
    if buf.is_empty() {
        return Header::More;
    }
    if prefix(V2) {
        return v2(buf);
    }
    if !prefix(b"PROXY ") {
        return Header::None;
    }
    let Some(end) = buf.iter().take(V1_MOST).position(|b| *b == b'\n') else {
        return if buf.len() >= V1_MOST { Header::Bad } else { Header::More };
    };
    let Some(line) = buf[..end].strip_suffix(b"\r").and_then(|l| std::str::from_utf8(l).ok()) else {
        return Header::Bad;
    };
    let parts: Vec<&str> = line.split(' ').collect();
    match parts[..] {
        ["PROXY", "UNKNOWN", ..] => Header::Found(end + 1, None),
        ["PROXY", "TCP4" | "TCP6", source, _, port, _] if port.parse::<u16>().is_ok() => match source.parse() {
            Ok(ip) => Header::Found(end + 1, Some(ip)),
            Err(_) => Header::Bad,
        },
        _ => Header::Bad,
    }
}

fn v2(buf: &[u8]) -> Header {
    let Some(fixed) = buf.get(..16) else { return Header::More };
    let len = 16 + usize::from(u16::from_be_bytes([fixed[14], fixed[15]]));
    if fixed[12] >> 4 != 2 || len > 2048 {
        return Header::Bad;
    }
    let Some(body) = buf.get(16..len) else { return Header::More };
    if fixed[12] & 15 == 0 {
        return Header::Found(len, None);
    }
    match (fixed[13] >> 4, body) {
        (1, [a, b, c, d, ..]) if body.len() >= 12 => {
            Header::Found(len, Some(IpAddr::V4(Ipv4Addr::new(*a, *b, *c, *d))))
        }
        (2, _) if body.len() >= 36 => match <[u8; 16]>::try_from(&body[..16]) {
            Ok(ip) => Header::Found(len, Some(IpAddr::V6(Ipv6Addr::from(ip)))),
            Err(_) => Header::Bad,
        },
        (1 | 2, _) => Header::Bad,
        _ => Header::Found(len, None),
    }
}

pub fn is_trusted(nets: &[Net], ip: IpAddr) -> bool {
    let ip = unmapped(ip);
    nets.iter().any(|net| net.contains(ip))
}

/// The client's address behind trusted proxies: from the right, the first that is not one of them.
pub fn forwarded_for(header: &str, trusted: &[Net]) -> Option<IpAddr> {
    header
        .split(',')
        .rev()
        .map(|part| {
            let part = part.trim();
            part.parse::<IpAddr>().ok().or_else(|| part.parse::<SocketAddr>().ok().map(|a| a.ip()))
        })
        .map_while(|ip| ip)
        .find(|ip| !is_trusted(trusted, *ip))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn both_versions_in_any_pieces() {
        let v1 = b"PROXY TCP4 192.0.2.7 198.51.100.1 5000 80\r\nrest";
        let mut v2 = V2.to_vec();
        v2.extend([0x21, 0x11, 0, 12, 192, 0, 2, 7, 198, 51, 100, 1, 0x13, 0x88, 0, 80]);
        v2.extend(b"rest");
        for text in [&v1[..], &v2] {
            let end = text.len() - 4;
            for cut in 0..end {
                assert_eq!(proxy_header(&text[..cut]), Header::More, "{cut}");
            }
            assert_eq!(proxy_header(text), Header::Found(end, Some("192.0.2.7".parse().expect("ip"))));
        }
        assert_eq!(proxy_header(b"PROXY UNKNOWN\r\n"), Header::Found(15, None));
        assert_eq!(proxy_header(b"PROXY TCP4 x y 1 2\r\n"), Header::Bad);
        assert_eq!(proxy_header(b"\x05\x01\x00"), Header::None);
        assert_eq!(proxy_header(b"POST / HTTP/1.1"), Header::None);
    }

    #[test]
    fn forwarded_for_is_read_from_the_right() {
        let trusted = ["10.0.0.0/8".parse().expect("net")];
        let got = |s: &str| forwarded_for(s, &trusted).map(|ip| ip.to_string());
        assert_eq!(
            got("6.6.6.6, 192.0.2.1, 10.0.0.2").as_deref(),
            Some("192.0.2.1"),
            "what a client invents is left of its own"
        );
        assert_eq!(got("192.0.2.1:5000").as_deref(), Some("192.0.2.1"));
        assert_eq!(got("10.0.0.1"), None);
        assert_eq!(got("192.0.2.1, garbage, 10.0.0.2"), None);
    }

    proptest! {
        #[test]
        fn hostile_bytes_never_panic(data in proptest::collection::vec(any::<u8>(), 0..200), v2 in any::<bool>()) {
            let mut bytes = if v2 { V2.to_vec() } else { b"PROXY ".to_vec() };
            bytes.extend(data);
            if let Header::Found(n, _) = proxy_header(&bytes) { prop_assert!(n <= bytes.len()); }
        }
    }
}
