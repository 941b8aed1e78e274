//! PROXY protocol, versions 1 and 2: reading what a proxy in front says, telling a backend who the client is.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// First bytes of version 2.
pub const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";
/// Longest version 1 line, by the specification.
const V1_MOST: usize = 107;
/// Longest version 2 header taken: addresses and TLVs beyond it are not a proxy we know.
pub const V2_MOST: usize = 16 + 2048;

/// A header that was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Bytes of the header: payload starts after them.
    pub length: usize,
    /// The client, and the address it connected to; `None` for the proxy's own health check (LOCAL, UNKNOWN).
    pub addrs: Option<(SocketAddr, SocketAddr)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Parsed {
    Done(Header),
    /// A header so far; more bytes are needed.
    More,
    /// Not a header: the connection has to be refused.
    Bad,
}

/// Reads a header at the start of `bytes`.
pub fn parse(bytes: &[u8]) -> Parsed {
    let common = bytes.len().min(SIGNATURE.len());
    if bytes[..common] == SIGNATURE[..common] {
        if bytes.len() < 16 {
            return Parsed::More;
        }
        return parse_v2(bytes);
    }
    let common = bytes.len().min(6);
    if bytes[..common] == b"PROXY "[..common] { parse_v1(bytes) } else { Parsed::Bad }
}

fn parse_v1(bytes: &[u8]) -> Parsed {
    let window = &bytes[..bytes.len().min(V1_MOST)];
    let Some(end) = window.windows(2).position(|pair| pair == b"\r\n") else {
        return if bytes.len() >= V1_MOST { Parsed::Bad } else { Parsed::More };
    };
    let Ok(line) = std::str::from_utf8(&window[..end]) else { return Parsed::Bad };
    let mut words = line.split(' ');
    let (_, family) = (words.next(), words.next());
    let length = end + 2;
    if family == Some("UNKNOWN") {
        return Parsed::Done(Header { length, addrs: None });
    }
    let words: Vec<&str> = words.collect();
    let &[from, to, from_port, to_port] = words.as_slice() else { return Parsed::Bad };
    let port = |text: &str| -> Option<u16> {
        // Plain decimals only: no sign, no leading zero.
        let plain = text.bytes().all(|byte| byte.is_ascii_digit()) && (text == "0" || !text.starts_with('0'));
        if plain { text.parse().ok() } else { None }
    };
    let addr = |text: &str| -> Option<IpAddr> {
        match family {
            Some("TCP4") => text.parse::<Ipv4Addr>().ok().map(IpAddr::V4),
            Some("TCP6") => text.parse::<Ipv6Addr>().ok().map(IpAddr::V6),
            _ => None,
        }
    };
    match (addr(from), addr(to), port(from_port), port(to_port)) {
        (Some(from), Some(to), Some(from_port), Some(to_port)) => Parsed::Done(Header {
            length,
            addrs: Some((SocketAddr::new(from, from_port), SocketAddr::new(to, to_port))),
        }),
        _ => Parsed::Bad,
    }
}

fn parse_v2(bytes: &[u8]) -> Parsed {
    let (version, command, family) = (bytes[12] >> 4, bytes[12] & 15, bytes[13]);
    let body = usize::from(u16::from_be_bytes([bytes[14], bytes[15]]));
    let length = 16 + body;
    if version != 2 || command > 1 || length > V2_MOST {
        return Parsed::Bad;
    }
    if bytes.len() < length {
        return Parsed::More;
    }
    if command == 0 {
        return Parsed::Done(Header { length, addrs: None });
    }
    let port = |at: usize| u16::from_be_bytes([bytes[at], bytes[at + 1]]);
    let addrs = match family {
        0x11 | 0x12 if body >= 12 => {
            let ip = |at: usize| IpAddr::from(<[u8; 4]>::try_from(&bytes[at..at + 4]).expect("four bytes"));
            Some((SocketAddr::new(ip(16), port(24)), SocketAddr::new(ip(20), port(26))))
        }
        0x21 | 0x22 if body >= 36 => {
            let ip = |at: usize| IpAddr::from(<[u8; 16]>::try_from(&bytes[at..at + 16]).expect("sixteen bytes"));
            Some((SocketAddr::new(ip(16), port(48)), SocketAddr::new(ip(32), port(50))))
        }
        // UNSPEC and unix sockets carry nothing for us; anything else is not of this version.
        0x00 | 0x31 | 0x32 => None,
        _ => return Parsed::Bad,
    };
    Parsed::Done(Header { length, addrs })
}

/// Version 1 line for a TCP connection.
pub fn v1(from: SocketAddr, to: SocketAddr) -> Vec<u8> {
    let (from, to) = same_family(from, to);
    let family = if from.is_ipv4() { "TCP4" } else { "TCP6" };
    format!("PROXY {family} {} {} {} {}\r\n", from.ip(), to.ip(), from.port(), to.port()).into_bytes()
}

/// Version 2 header for a TCP connection or, with `datagram`, a UDP flow.
pub fn v2(from: SocketAddr, to: SocketAddr, datagram: bool) -> Vec<u8> {
    let (from, to) = same_family(from, to);
    let mut out = Vec::with_capacity(52);
    out.extend_from_slice(&SIGNATURE);
    out.push(0x21);
    out.push((if from.is_ipv4() { 0x10 } else { 0x20 }) | (if datagram { 2 } else { 1 }));
    out.extend_from_slice(&(if from.is_ipv4() { 12u16 } else { 36 }).to_be_bytes());
    for addr in [from, to] {
        match addr.ip() {
            IpAddr::V4(ip) => out.extend_from_slice(&ip.octets()),
            IpAddr::V6(ip) => out.extend_from_slice(&ip.octets()),
        }
    }
    out.extend_from_slice(&from.port().to_be_bytes());
    out.extend_from_slice(&to.port().to_be_bytes());
    out
}

fn same_family(from: SocketAddr, to: SocketAddr) -> (SocketAddr, SocketAddr) {
    let plain = |addr: SocketAddr| SocketAddr::new(addr.ip().to_canonical(), addr.port());
    let wide = |addr: SocketAddr| match addr.ip() {
        IpAddr::V4(ip) => SocketAddr::new(ip.to_ipv6_mapped().into(), addr.port()),
        IpAddr::V6(_) => addr,
    };
    let (from, to) = (plain(from), plain(to));
    if from.is_ipv4() == to.is_ipv4() { (from, to) } else { (wide(from), wide(to)) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn addr() -> impl Strategy<Value = SocketAddr> {
        prop_oneof![
            (any::<[u8; 4]>(), any::<u16>()).prop_map(|(ip, port)| SocketAddr::new(ip.into(), port)),
            (any::<[u8; 16]>(), any::<u16>())
                .prop_map(|(ip, port)| SocketAddr::new(IpAddr::from(ip).to_canonical(), port)),
        ]
    }

    #[test]
    fn lines_of_the_specification() {
        let line = b"PROXY TCP4 192.168.0.1 192.168.0.11 56324 443\r\nGET / HTTP/1.1\r\n";
        let expected = Header {
            length: 47,
            addrs: Some(("192.168.0.1:56324".parse().unwrap(), "192.168.0.11:443".parse().unwrap())),
        };
        assert_eq!(parse(line), Parsed::Done(expected));
        assert_eq!(
            parse(b"PROXY UNKNOWN ffff:f::1 ffff:f::2 65535 65535\r\n"),
            Parsed::Done(Header { length: 47, addrs: None })
        );
        assert_eq!(parse(b"PROXY UNKNOWN\r\n"), Parsed::Done(Header { length: 15, addrs: None }));
        for bad in [
            &b"GET / HTTP/1.1\r\n"[..],
            b"PROXY TCP4 192.168.0.1 192.168.0.11 56324\r\n",
            b"PROXY TCP4 ::1 ::2 1 2\r\n",
            b"PROXY TCP4 1.2.3.4 1.2.3.5 01 2\r\n",
            b"PROXY TCP4 1.2.3.4 1.2.3.5 +1 2\r\n",
            b"PROXY TCP4 1.2.3.4 1.2.3.5 65536 2\r\n",
            b"PROXY TCP4  1.2.3.4 1.2.3.5 1 2\r\n",
            b"PROXY TCP4 1.2.3.4 1.2.3.5 1 2 \r\n",
            &[b'P'; 200],
            &[&b"PROXY "[..], &[b'x'; 200]].concat(),
        ] {
            assert_eq!(parse(bad), Parsed::Bad, "{:?}", String::from_utf8_lossy(bad));
        }
    }

    #[test]
    fn version_2_edges() {
        let mut header = v2("1.2.3.4:5".parse().unwrap(), "6.7.8.9:10".parse().unwrap(), false);
        header[15] += 7;
        header.extend_from_slice(b"\x04\x00\x04abcd");
        let Parsed::Done(read) = parse(&header) else { panic!("TLVs are skipped") };
        assert_eq!(read.length, 35);
        header[12] = 0x20;
        assert_eq!(parse(&header), Parsed::Done(Header { length: 35, addrs: None }));
        header[12] = 0x31;
        assert_eq!(parse(&header), Parsed::Bad);
        header[12] = 0x21;
        header[14] = 0xff;
        assert_eq!(parse(&header), Parsed::Bad, "an oversized header is refused before it arrives");
        let mut short = v2("1.2.3.4:5".parse().unwrap(), "6.7.8.9:10".parse().unwrap(), false);
        short[15] = 4;
        assert_eq!(parse(&short), Parsed::Bad, "a length too short for its family");
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(from in addr(), to in addr(), datagram: bool, tail in prop::collection::vec(any::<u8>(), 0..20)) {
            for header in [v1(from, to), v2(from, to, datagram)] {
                let length = header.len();
                let mut bytes = header;
                bytes.extend_from_slice(&tail);
                let Parsed::Done(read) = parse(&bytes) else { return Err(TestCaseError::fail("not read")) };
                let (said_from, said_to) = read.addrs.unwrap();
                let plain = |addr: SocketAddr| (addr.ip().to_canonical(), addr.port());
                prop_assert_eq!((plain(said_from), plain(said_to), read.length), (plain(from), plain(to), length));
                for cut in 0..length {
                    prop_assert_eq!(parse(&bytes[..cut]), Parsed::More);
                }
            }
        }

        #[test]
        fn any_bytes_are_read_without_panic_and_a_verdict_stands(bytes in prop::collection::vec(any::<u8>(), 0..80), start in 0usize..4) {
            let prefix: &[u8] = match start { 0 => b"", 1 => &SIGNATURE, 2 => b"PROXY ", _ => b"PROXY TCP4 1.2.3.4 " };
            let bytes = [prefix, &bytes].concat();
            let whole = parse(&bytes);
            for cut in 0..bytes.len() {
                match parse(&bytes[..cut]) {
                    Parsed::More => {}
                    verdict => prop_assert_eq!(verdict, whole),
                }
            }
            if let Parsed::Done(header) = whole {
                prop_assert!(header.length <= bytes.len());
            }
        }
    }
}
