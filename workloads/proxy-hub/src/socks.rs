//! SOCKS5 (RFC 1928, RFC 1929) without I/O: functions over the bytes received so far.

use crate::dest::{Dest, Host};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

pub const VERSION: u8 = 5;
pub const METHOD_NONE: u8 = 0;
pub const METHOD_PASSWORD: u8 = 2;
pub const METHOD_REFUSED: u8 = 0xff;

/// What a parser makes of the bytes so far.
#[derive(Debug, PartialEq, Eq)]
pub enum Parsed<T> {
    /// Not enough bytes yet.
    More,
    /// A whole message, and the bytes it took.
    Done(T, usize),
    /// Never going to be valid.
    Bad(&'static str),
}

/// Reply codes of RFC 1928, section 6.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Reply {
    Succeeded = 0,
    GeneralFailure = 1,
    NotAllowed = 2,
    NetworkUnreachable = 3,
    HostUnreachable = 4,
    ConnectionRefused = 5,
    TtlExpired = 6,
    CommandNotSupported = 7,
    AddressNotSupported = 8,
}

/// The methods a client offers.
#[derive(Debug, PartialEq, Eq)]
pub struct Greeting {
    pub none: bool,
    pub password: bool,
}

pub fn greeting(buf: &[u8]) -> Parsed<Greeting> {
    match buf {
        [] | [VERSION] => Parsed::More,
        [VERSION, count, rest @ ..] => {
            let count = *count as usize;
            match rest.get(..count) {
                None => Parsed::More,
                Some(methods) => Parsed::Done(
                    Greeting { none: methods.contains(&METHOD_NONE), password: methods.contains(&METHOD_PASSWORD) },
                    2 + count,
                ),
            }
        }
        _ => Parsed::Bad("not SOCKS version 5"),
    }
}

/// User name and password (RFC 1929).
#[derive(Debug, PartialEq, Eq)]
pub struct Login {
    pub user: String,
    pub password: String,
}

pub fn login(buf: &[u8]) -> Parsed<Login> {
    match buf.first() {
        None => return Parsed::More,
        Some(1) => {}
        Some(_) => return Parsed::Bad("unknown version of the password negotiation"),
    }
    let Some(&user_len) = buf.get(1) else { return Parsed::More };
    let user_end = 2 + user_len as usize;
    let Some(&password_len) = buf.get(user_end) else { return Parsed::More };
    let end = user_end + 1 + password_len as usize;
    let Some(password) = buf.get(user_end + 1..end) else { return Parsed::More };
    match (std::str::from_utf8(&buf[2..user_end]), std::str::from_utf8(password)) {
        (Ok(user), Ok(password)) => Parsed::Done(Login { user: user.to_owned(), password: password.to_owned() }, end),
        _ => Parsed::Bad("user name or password is not UTF-8"),
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    Connect,
    Bind,
    UdpAssociate,
    Unknown(u8),
}

#[derive(Debug, PartialEq, Eq)]
pub struct Request {
    pub command: Command,
    pub dest: Dest,
}

/// Parses a request. A bad address type is told apart, since it has a reply code of its own.
pub fn request(buf: &[u8]) -> Parsed<Result<Request, Reply>> {
    match buf {
        [VERSION, command, 0, rest @ ..] => match address(rest) {
            Parsed::More => Parsed::More,
            Parsed::Done(Err(reply), n) => Parsed::Done(Err(reply), 3 + n),
            Parsed::Done(Ok(dest), n) => {
                let command = match command {
                    1 => Command::Connect,
                    2 => Command::Bind,
                    3 => Command::UdpAssociate,
                    other => Command::Unknown(*other),
                };
                Parsed::Done(Ok(Request { command, dest }), 3 + n)
            }
            Parsed::Bad(why) => Parsed::Bad(why),
        },
        [] | [VERSION] | [VERSION, _] => Parsed::More,
        [VERSION, _, _, ..] => Parsed::Bad("reserved byte is not zero"),
        _ => Parsed::Bad("not SOCKS version 5"),
    }
}

/// ATYP, address and port.
pub fn address(buf: &[u8]) -> Parsed<Result<Dest, Reply>> {
    let Some(kind) = buf.first() else { return Parsed::More };
    let port_at = |at: usize| buf.get(at..at + 2).map(|p| u16::from_be_bytes([p[0], p[1]]));
    match kind {
        1 => match (buf.get(1..5), port_at(5)) {
            (Some(a), Some(port)) => {
                let ip = Ipv4Addr::new(a[0], a[1], a[2], a[3]);
                Parsed::Done(Ok(Dest { host: Host::Ip(IpAddr::V4(ip)), port }), 7)
            }
            _ => Parsed::More,
        },
        4 => match (buf.get(1..17).and_then(|a| <[u8; 16]>::try_from(a).ok()), port_at(17)) {
            (Some(a), Some(port)) => Parsed::Done(Ok(Dest { host: Host::Ip(IpAddr::V6(Ipv6Addr::from(a))), port }), 19),
            _ => Parsed::More,
        },
        3 => {
            let Some(&len) = buf.get(1) else { return Parsed::More };
            let end = 2 + len as usize;
            match (buf.get(2..end), port_at(end)) {
                (Some(name), Some(port)) => {
                    let dest = std::str::from_utf8(name).ok().and_then(Host::parse).map(|host| Dest { host, port });
                    match dest {
                        Some(dest) => Parsed::Done(Ok(dest), end + 2),
                        None => Parsed::Done(Err(Reply::HostUnreachable), end + 2),
                    }
                }
                _ => Parsed::More,
            }
        }
        // The length of an unknown address is unknown too: nothing after it can be read.
        _ => Parsed::Done(Err(Reply::AddressNotSupported), buf.len()),
    }
}

/// Appends ATYP, address and port.
pub fn put_address(out: &mut Vec<u8>, addr: SocketAddr) {
    match addr.ip() {
        IpAddr::V4(ip) => {
            out.push(1);
            out.extend_from_slice(&ip.octets());
        }
        IpAddr::V6(ip) => {
            out.push(4);
            out.extend_from_slice(&ip.octets());
        }
    }
    out.extend_from_slice(&addr.port().to_be_bytes());
}

/// A reply with its bound address.
pub fn reply(code: Reply, bound: SocketAddr) -> Vec<u8> {
    let mut out = vec![VERSION, code as u8, 0];
    put_address(&mut out, bound);
    out
}

/// The header of a UDP datagram: its destination, and where the payload starts. `None`: drop it (too short, a
/// fragment, an address that is none).
pub fn udp_header(datagram: &[u8]) -> Option<(Dest, usize)> {
    match datagram {
        [0, 0, 0, rest @ ..] => match address(rest) {
            Parsed::Done(Ok(dest), n) => Some((dest, 3 + n)),
            _ => None,
        },
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn greeting_and_login() {
        assert_eq!(greeting(&[5]), Parsed::More);
        assert_eq!(greeting(&[5, 2, 0]), Parsed::More);
        assert_eq!(greeting(&[5, 2, 0, 2, 9]), Parsed::Done(Greeting { none: true, password: true }, 4));
        assert_eq!(greeting(&[5, 0]), Parsed::Done(Greeting { none: false, password: false }, 2));
        assert!(matches!(greeting(&[4, 1]), Parsed::Bad(_)));
        let bytes = b"\x01\x05alice\x03key!";
        assert_eq!(login(bytes), Parsed::Done(Login { user: "alice".into(), password: "key".into() }, 11));
        for cut in 0..11 {
            assert_eq!(login(&bytes[..cut]), Parsed::More, "{cut}");
        }
        assert!(matches!(login(b"\x05"), Parsed::Bad(_)));
        assert!(matches!(login(b"\x01\x01\xff\x01a"), Parsed::Bad(_)));
    }

    #[test]
    fn requests_of_every_address_type() {
        let v4 = [5, 1, 0, 1, 192, 0, 2, 1, 0, 80];
        let Parsed::Done(Ok(got), 10) = request(&v4) else { panic!() };
        assert_eq!((got.command, got.dest.to_string().as_str()), (Command::Connect, "192.0.2.1:80"));
        let name = b"\x05\x03\x00\x03\x0bexample.com\x01\xbb";
        let Parsed::Done(Ok(got), 18) = request(name) else { panic!() };
        assert_eq!((got.command, got.dest.to_string().as_str()), (Command::UdpAssociate, "example.com:443"));
        let mut v6 = vec![5, 2, 0, 4];
        v6.extend(Ipv6Addr::LOCALHOST.octets());
        v6.extend([0, 22]);
        let Parsed::Done(Ok(got), 22) = request(&v6) else { panic!() };
        assert_eq!((got.command, got.dest.to_string().as_str()), (Command::Bind, "[::1]:22"));
        assert_eq!(request(&[5, 1, 0, 9, 1]), Parsed::Done(Err(Reply::AddressNotSupported), 5));
        assert!(matches!(request(&[5, 1, 1, 1]), Parsed::Bad(_)));
        assert!(matches!(request(b"\x05\x01\x00\x03\x03a b\x00\x50"), Parsed::Done(Err(Reply::HostUnreachable), 10)));
        // An address in a domain's clothes is an address: the policy must see it.
        let Parsed::Done(Ok(got), _) = request(b"\x05\x01\x00\x03\x09127.0.0.1\x00\x50") else { panic!() };
        assert_eq!(got.dest.host, Host::Ip(IpAddr::V4(Ipv4Addr::LOCALHOST)));
    }

    #[test]
    fn udp_headers() {
        let mut packet = vec![0, 0, 0];
        put_address(&mut packet, "192.0.2.9:53".parse().expect("address"));
        packet.extend(b"query");
        let (dest, at) = udp_header(&packet).expect("valid");
        assert_eq!((dest.to_string().as_str(), &packet[at..]), ("192.0.2.9:53", &b"query"[..]));
        packet[2] = 1;
        assert!(udp_header(&packet).is_none(), "fragments are dropped");
    }

    proptest! {
        #[test]
        fn hostile_bytes_never_panic_and_never_take_more_than_there_is(data in proptest::collection::vec(any::<u8>(), 0..600)) {
            if let Parsed::Done(_, n) = greeting(&data) { prop_assert!(n <= data.len()); }
            if let Parsed::Done(_, n) = login(&data) { prop_assert!(n <= data.len()); }
            if let Parsed::Done(_, n) = request(&data) { prop_assert!(n <= data.len()); }
            if let Some((_, n)) = udp_header(&data) { prop_assert!(n <= data.len()); }
        }

        #[test]
        fn a_valid_start_is_parsed_the_same_in_pieces(kind in prop_oneof![Just(1u8), Just(3), Just(4), any::<u8>()], tail in proptest::collection::vec(any::<u8>(), 0..300)) {
            let mut data = vec![5, 1, 0, kind];
            data.extend(tail);
            let whole = request(&data);
            for cut in 0..data.len() {
                match request(&data[..cut]) {
                    Parsed::More => {}
                    // The unknown address type takes all there is, so only the verdict is compared.
                    Parsed::Done(got, n) => {
                        if let Parsed::Done(want, m) = &whole {
                            prop_assert_eq!(&got, want);
                            prop_assert!(n == *m || got == Err(Reply::AddressNotSupported));
                        } else {
                            prop_assert!(false, "more bytes undid a verdict");
                        }
                    }
                    Parsed::Bad(_) => prop_assert!(matches!(whole, Parsed::Bad(_))),
                }
            }
        }
    }
}
