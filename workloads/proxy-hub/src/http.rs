//! The HTTP face of the customers' port: CONNECT and absolute-form requests (RFC 9110, RFC 9112).
//!
//! A request in absolute form is sent on in origin form with `Connection: close`, one request to a connection:
//! whatever a customer sends behind its body could be meant for another host, and is never passed on.

use crate::dest::{Dest, Host};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

/// A request head longer than this is refused with 431.
pub const MAX_HEAD: usize = 16 * 1024;
const MAX_HEADERS: usize = 100;

/// What is asked for.
#[derive(Debug, PartialEq, Eq)]
pub enum Ask {
    Connect(Dest),
    /// Send `head` to the destination, then the body.
    Forward {
        dest: Dest,
        head: Vec<u8>,
        body: Body,
    },
}

#[derive(Debug, PartialEq, Eq)]
pub struct Request {
    pub ask: Ask,
    /// User name and password, if sent and well-formed.
    pub login: Option<(String, String)>,
    /// Bytes of the head.
    pub len: usize,
}

/// An error to answer with and close.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Refusal {
    pub status: u16,
    pub reason: &'static str,
}

const fn refuse<T>(status: u16, reason: &'static str) -> Result<T, Refusal> {
    Err(Refusal { status, reason })
}

/// Parses a request head. `Ok(None)`: more bytes are needed.
pub fn request(buf: &[u8]) -> Result<Option<Request>, Refusal> {
    let mut slots = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut head = httparse::Request::new(&mut slots);
    let len = match head.parse(&buf[..buf.len().min(MAX_HEAD)]) {
        Ok(httparse::Status::Complete(len)) => len,
        Ok(httparse::Status::Partial) if buf.len() >= MAX_HEAD => return refuse(431, "request head over 16 KiB"),
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(httparse::Error::TooManyHeaders) => return refuse(431, "more than 100 header lines"),
        Err(_) => return refuse(400, "malformed request"),
    };
    let (method, target) = (head.method.unwrap_or(""), head.path.unwrap_or(""));
    let login =
        head.headers.iter().find(|h| h.name.eq_ignore_ascii_case("proxy-authorization")).and_then(|h| basic(h.value));
    let ask = if method == "CONNECT" {
        match Dest::parse(target) {
            Some(dest) => Ask::Connect(dest),
            None => return refuse(400, "CONNECT needs host:port"),
        }
    } else {
        forward(method, target, head.version.unwrap_or(1), head.headers)?
    };
    Ok(Some(Request { ask, login, len }))
}

fn forward(method: &str, target: &str, version: u8, headers: &[httparse::Header<'_>]) -> Result<Ask, Refusal> {
    let Some(rest) = target.get(..7).filter(|s| s.eq_ignore_ascii_case("http://")).map(|_| &target[7..]) else {
        return match target.contains("://") {
            true => refuse(400, "only http:// is forwarded; use CONNECT for the rest"),
            false => refuse(400, "this is a proxy: send the whole URL, or CONNECT"),
        };
    };
    let path_at = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    let (authority, path) = rest.split_at(path_at);
    // What stands before an @ would be credentials for the origin: clients send those in a header.
    let authority = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
    let has_port = authority.rsplit_once(':').is_some_and(|(host, _)| !host.contains(':') || host.ends_with(']'));
    let dest =
        if has_port { Dest::parse(authority) } else { Host::parse(authority).map(|host| Dest { host, port: 80 }) };
    let Some(dest) = dest else { return refuse(400, "malformed URL") };

    let dropped: Vec<&str> = headers
        .iter()
        .filter(|h| h.name.eq_ignore_ascii_case("connection") || h.name.eq_ignore_ascii_case("proxy-connection"))
        .filter_map(|h| std::str::from_utf8(h.value).ok())
        .flat_map(|v| v.split(','))
        .map(str::trim)
        .collect();
    let hop_by_hop = |name: &str| {
        const HOP: &[&str] = &[
            "connection",
            "proxy-connection",
            "keep-alive",
            "proxy-authorization",
            "proxy-authenticate",
            "te",
            "trailer",
            "upgrade",
            "host",
        ];
        HOP.iter().any(|h| name.eq_ignore_ascii_case(h))
    };

    let mut length = None;
    let mut chunked = false;
    let mut out = Vec::with_capacity(512);
    out.extend_from_slice(method.as_bytes());
    out.push(b' ');
    if !path.starts_with('/') {
        out.push(b'/');
    }
    out.extend_from_slice(path.split('#').next().unwrap_or("").as_bytes());
    out.extend_from_slice(if version == 0 { b" HTTP/1.0\r\n" } else { b" HTTP/1.1\r\n" });
    out.extend_from_slice(b"Host: ");
    out.extend_from_slice(authority.as_bytes());
    out.extend_from_slice(b"\r\n");
    for header in headers {
        let name = header.name;
        if name.eq_ignore_ascii_case("content-length") {
            let value = std::str::from_utf8(header.value).unwrap_or("").trim();
            let parsed = value.bytes().all(|b| b.is_ascii_digit()).then(|| value.parse::<u64>().ok()).flatten();
            let Some(n) = parsed else { return refuse(400, "malformed Content-Length") };
            if length.replace(n).is_some_and(|before| before != n) {
                return refuse(400, "two different Content-Lengths");
            }
        } else if name.eq_ignore_ascii_case("transfer-encoding") {
            if chunked || !header.value.trim_ascii().eq_ignore_ascii_case(b"chunked") {
                return refuse(501, "only the chunked transfer encoding is known");
            }
            chunked = true;
        } else if hop_by_hop(name) || dropped.iter().any(|d| name.eq_ignore_ascii_case(d)) {
            continue;
        }
        out.extend_from_slice(name.as_bytes());
        out.extend_from_slice(b": ");
        out.extend_from_slice(header.value);
        out.extend_from_slice(b"\r\n");
    }
    out.extend_from_slice(b"Connection: close\r\n\r\n");
    // Both together is how requests are smuggled.
    let body = match (chunked, length) {
        (true, Some(_)) => return refuse(400, "both Content-Length and chunked"),
        (true, None) => Body::chunked(),
        (false, n) => Body::Length(n.unwrap_or(0)),
    };
    Ok(Ask::Forward { dest, head: out, body })
}

/// `Basic` credentials.
fn basic(value: &[u8]) -> Option<(String, String)> {
    let text = std::str::from_utf8(value).ok()?.trim();
    let (scheme, coded) = text.split_once(' ')?;
    if !scheme.eq_ignore_ascii_case("basic") {
        return None;
    }
    let plain = String::from_utf8(STANDARD.decode(coded.trim()).ok()?).ok()?;
    let (user, password) = plain.split_once(':')?;
    Some((user.to_owned(), password.to_owned()))
}

/// Finds the end of a request's body, to pass it and nothing behind it.
#[derive(Debug, PartialEq, Eq, Clone)]
pub enum Body {
    /// Bytes still to come.
    Length(u64),
    Chunked {
        state: Chunk,
        left: u64,
    },
    Done,
}

#[derive(Debug, PartialEq, Eq, Clone, Copy)]
pub enum Chunk {
    Size,
    Extension,
    SizeLf,
    Data,
    DataCr,
    DataLf,
    /// At the start of a trailer line.
    Trailer,
    TrailerLine,
    LastLf,
}

impl Body {
    fn chunked() -> Body {
        Body::Chunked { state: Chunk::Size, left: 0 }
    }

    pub fn is_done(&self) -> bool {
        matches!(self, Body::Done | Body::Length(0))
    }

    /// How many bytes of `data` belong to the body.
    pub fn take(&mut self, data: &[u8]) -> Result<usize, Refusal> {
        match self {
            Body::Done => Ok(0),
            Body::Length(left) => {
                let n = usize::try_from(*left).unwrap_or(usize::MAX).min(data.len());
                *left -= n as u64;
                Ok(n)
            }
            Body::Chunked { state, left } => {
                let mut i = 0;
                while i < data.len() {
                    let byte = data[i];
                    if *state == Chunk::Data {
                        let n = usize::try_from(*left).unwrap_or(usize::MAX).min(data.len() - i);
                        *left -= n as u64;
                        i += n;
                        if *left == 0 {
                            *state = Chunk::DataCr;
                        }
                        continue;
                    }
                    i += 1;
                    *state = match (*state, byte) {
                        (Chunk::Size, b'\r') => Chunk::SizeLf,
                        (Chunk::Size, b';' | b' ' | b'\t') => Chunk::Extension,
                        (Chunk::Size, digit) => match (digit as char).to_digit(16) {
                            Some(d) if *left >> 56 == 0 => {
                                *left = *left << 4 | u64::from(d);
                                Chunk::Size
                            }
                            _ => return refuse(400, "malformed chunk size"),
                        },
                        (Chunk::Extension, b'\r') => Chunk::SizeLf,
                        (Chunk::Extension, b'\n') => return refuse(400, "bare line feed in a chunk size"),
                        (Chunk::Extension, _) => Chunk::Extension,
                        (Chunk::SizeLf, b'\n') => {
                            if *left == 0 {
                                Chunk::Trailer
                            } else {
                                Chunk::Data
                            }
                        }
                        (Chunk::DataCr, b'\r') => Chunk::DataLf,
                        (Chunk::DataLf, b'\n') => Chunk::Size,
                        (Chunk::Trailer, b'\r') => Chunk::LastLf,
                        (Chunk::Trailer | Chunk::TrailerLine, b'\n') => Chunk::Trailer,
                        (Chunk::Trailer | Chunk::TrailerLine, _) => Chunk::TrailerLine,
                        (Chunk::LastLf, b'\n') => {
                            *self = Body::Done;
                            return Ok(i);
                        }
                        _ => return refuse(400, "malformed chunk"),
                    };
                }
                Ok(data.len())
            }
        }
    }
}

/// The answer to a CONNECT that worked.
pub const ESTABLISHED: &[u8] = b"HTTP/1.1 200 Connection established\r\n\r\n";

/// An error answer, closed after.
pub fn error(status: u16, reason: &str, retry_after: Option<u64>) -> Vec<u8> {
    let phrase = match status {
        400 => "Bad Request",
        402 => "Payment Required",
        403 => "Forbidden",
        407 => "Proxy Authentication Required",
        408 => "Request Timeout",
        429 => "Too Many Requests",
        431 => "Request Header Fields Too Large",
        501 => "Not Implemented",
        502 => "Bad Gateway",
        503 => "Service Unavailable",
        504 => "Gateway Timeout",
        _ => "Error",
    };
    let reason: String = reason.chars().filter(|c| !c.is_control()).collect();
    let mut out = format!("HTTP/1.1 {status} {phrase}\r\n");
    if status == 407 {
        out.push_str("Proxy-Authenticate: Basic realm=\"proxy\", charset=\"UTF-8\"\r\n");
    }
    if let Some(seconds) = retry_after {
        out.push_str(&format!("Retry-After: {seconds}\r\n"));
    }
    out.push_str(&format!(
        "X-Proxy-Error: {}\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{reason}\n",
        reason.replace(|c: char| !c.is_ascii(), "?"),
        reason.len() + 1
    ));
    out.into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(s: &str) -> Result<Option<Request>, Refusal> {
        request(s.as_bytes())
    }

    #[test]
    fn connect_with_credentials() {
        let text = "CONNECT example.com:443 HTTP/1.1\r\nHost: example.com:443\r\nProxy-Authorization: Basic YWxpY2U6a2V5OjE=\r\n\r\nrest";
        let got = parse(text).expect("valid").expect("whole");
        assert_eq!(got.ask, Ask::Connect(Dest::parse("example.com:443").expect("d")));
        assert_eq!(got.login, Some(("alice".into(), "key:1".into())));
        assert_eq!(got.len, text.len() - 4);
        for cut in 0..got.len {
            assert_eq!(parse(&text[..cut]), Ok(None), "{cut}");
        }
        assert_eq!(parse("CONNECT example.com HTTP/1.1\r\n\r\n").unwrap_err().status, 400);
    }

    #[test]
    fn absolute_form_becomes_origin_form_without_what_is_ours() {
        let text = "POST http://u:p@example.com:8080?a=1#f HTTP/1.1\r\nHost: other\r\nProxy-Authorization: Basic x\r\n\
                    Connection: keep-alive, X-Hop\r\nX-Hop: 1\r\nX-End: 2\r\nContent-Length: 3\r\nProxy-Connection: keep-alive\r\n\r\nabcGET";
        let got = parse(text).expect("valid").expect("whole");
        let Ask::Forward { dest, head, mut body } = got.ask else { panic!() };
        assert_eq!(dest.to_string(), "example.com:8080");
        assert_eq!(
            String::from_utf8(head).expect("text"),
            "POST /?a=1 HTTP/1.1\r\nHost: example.com:8080\r\nX-End: 2\r\nContent-Length: 3\r\nConnection: close\r\n\r\n"
        );
        assert_eq!(body.take(b"abcGET"), Ok(3));
        assert!(body.is_done());
        let v6 = parse("GET http://[2001:db8::1]/ HTTP/1.1\r\n\r\n").expect("valid").expect("whole");
        assert!(matches!(v6.ask, Ask::Forward { dest, .. } if dest.to_string() == "[2001:db8::1]:80"));
    }

    #[test]
    fn what_smuggles_or_makes_no_sense_is_refused() {
        let status = |s: &str| parse(s).unwrap_err().status;
        assert_eq!(status("GET / HTTP/1.1\r\n\r\n"), 400);
        assert_eq!(status("GET https://a.b/ HTTP/1.1\r\n\r\n"), 400);
        assert_eq!(status("POST http://a.b/ HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n"), 400);
        assert_eq!(status("POST http://a.b/ HTTP/1.1\r\nContent-Length: +1\r\n\r\n"), 400);
        assert_eq!(status("POST http://a.b/ HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n"), 400);
        assert_eq!(status("POST http://a.b/ HTTP/1.1\r\nTransfer-Encoding: gzip\r\n\r\n"), 501);
        assert_eq!(status(&format!("GET http://a.b/{} HTTP/1.1", "x".repeat(MAX_HEAD))), 431);
        assert_eq!(status("\x16\x03\x01\x02"), 400);
    }

    #[test]
    fn chunked_bodies_end_where_they_end() {
        let text = b"4;x=y\r\nWiki\r\nA\r\n0123456789\r\n0\r\nTrailer: 1\r\n\r\nGET http://evil/";
        let end = text.len() - b"GET http://evil/".len();
        for step in [1, 2, 3, 7, text.len()] {
            let mut body = Body::chunked();
            let taken: usize = text.chunks(step).map(|piece| body.take(piece).expect("valid")).sum();
            assert_eq!((taken, body.is_done()), (end, true), "in steps of {step}");
        }
        for bad in [&b"x\r\n"[..], b"4\r\nWikixx", b"ffffffffffffffffff\r\n", b"4\nWiki"] {
            assert!(Body::chunked().take(bad).is_err());
        }
    }

    #[test]
    fn errors_cannot_be_split() {
        let text = String::from_utf8(error(407, "unknown parameter 'a\r\nSet-Cookie: x'", None)).expect("text");
        assert!(text.contains("Proxy-Authenticate: Basic"));
        assert!(!text.contains("\nSet-Cookie"));
    }

    proptest! {
        #[test]
        fn hostile_bytes_never_panic(data in proptest::collection::vec(any::<u8>(), 0..400)) {
            if let Ok(Some(r)) = request(&data) { prop_assert!(r.len <= data.len()); }
            if let Ok(n) = Body::chunked().take(&data) { prop_assert!(n <= data.len()); }
        }

        #[test]
        fn requests_with_odd_urls_never_panic(url in "(http://)?[ -~]{0,80}", name in "[A-Za-z-]{1,12}", value in "[ -~]{0,40}") {
            let text = format!("GET {url} HTTP/1.1\r\n{name}: {value}\r\n\r\n");
            if let Ok(Some(Request { ask: Ask::Forward { head, .. }, .. })) = parse(&text) {
                // Whatever came in, what goes out is one request and names no credentials of the proxy.
                let mut slots = [httparse::EMPTY_HEADER; 16];
                let mut out = httparse::Request::new(&mut slots);
                prop_assert_eq!(out.parse(&head), Ok(httparse::Status::Complete(head.len())));
                prop_assert!(out.headers.iter().all(|h| !h.name.eq_ignore_ascii_case("proxy-authorization")));
            }
        }

        #[test]
        fn a_body_of_chunks_is_taken_whole(chunks in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 1..50), 0..5), step in 1usize..20) {
            let mut text = Vec::new();
            for chunk in &chunks {
                text.extend(format!("{:x}\r\n", chunk.len()).bytes());
                text.extend(chunk);
                text.extend(b"\r\n");
            }
            text.extend(b"0\r\n\r\n");
            let end = text.len();
            text.extend(b"more");
            let mut body = Body::chunked();
            let mut taken = 0;
            for piece in text.chunks(step) {
                taken += body.take(piece).expect("valid");
            }
            prop_assert_eq!(taken, end);
        }
    }
}
