//! Active health checks: one question to one backend.

use crate::config::{Check, CheckKind};
use crate::fetch;
use hmac::{Hmac, KeyInit, Mac};
use md5::{Digest, Md5};
use std::io;
use std::net::{IpAddr, SocketAddr};
use tokio::net::UdpSocket;

/// Asks once; `Err` says what was wrong in a few words. The check's own timeout applies.
pub async fn run(check: &Check, backend: SocketAddr, source: Option<IpAddr>) -> Result<(), String> {
    let to = SocketAddr::new(backend.ip(), check.port.unwrap_or(backend.port()));
    let asked = async {
        match &check.kind {
            CheckKind::Tcp => fetch::connect(to, source).await.map(drop).map_err(|error| error.to_string()),
            CheckKind::Udp { send, expect } => {
                let answer = ask(to, source, send.as_bytes()).await.map_err(|error| error.to_string())?;
                let found = expect.is_empty() || answer.windows(expect.len()).any(|window| window == expect.as_bytes());
                if found { Ok(()) } else { Err("the answer lacks the expected text".into()) }
            }
            CheckKind::Http { path, host } => match fetch::get(to, source, host, path, 0).await {
                Ok((200..=399, _)) => Ok(()),
                Ok((status, _)) => Err(format!("status {status}")),
                Err(error) => Err(error.to_string()),
            },
            CheckKind::RadiusStatus { secret } => {
                let (request, authenticator) = status_server(secret.as_bytes(), rand::random(), rand::random());
                let answer = ask(to, source, &request).await.map_err(|error| error.to_string())?;
                status_answer(&answer, request[1], &authenticator, secret.as_bytes()).map_err(String::from)
            }
        }
    };
    match tokio::time::timeout(check.timeout.0, asked).await {
        Ok(answer) => answer,
        Err(_) => Err(format!("no answer within {} ms", check.timeout.0.as_millis())),
    }
}

async fn ask(to: SocketAddr, source: Option<IpAddr>, bytes: &[u8]) -> io::Result<Vec<u8>> {
    let unspecified: IpAddr = if to.is_ipv4() { [0, 0, 0, 0].into() } else { [0u16; 8].into() };
    let socket = UdpSocket::bind(SocketAddr::new(source.unwrap_or(unspecified), 0)).await?;
    socket.connect(to).await?;
    socket.send(bytes).await?;
    let mut answer = vec![0; 4096];
    let count = socket.recv(&mut answer).await?;
    answer.truncate(count);
    Ok(answer)
}

/// A Status-Server packet (RFC 5997) with its Message-Authenticator, and its request authenticator.
fn status_server(secret: &[u8], id: u8, authenticator: [u8; 16]) -> (Vec<u8>, [u8; 16]) {
    let mut packet = vec![12, id, 0, 38];
    packet.extend_from_slice(&authenticator);
    packet.extend_from_slice(&[80, 18]);
    packet.extend_from_slice(&[0; 16]);
    let mut mac = Hmac::<Md5>::new_from_slice(secret).expect("HMAC takes a key of any length");
    mac.update(&packet);
    let tag = mac.finalize().into_bytes();
    packet[22..].copy_from_slice(&tag);
    (packet, authenticator)
}

/// Checks that the answer is one, to this request, by someone who knows the secret.
fn status_answer(answer: &[u8], id: u8, request: &[u8; 16], secret: &[u8]) -> Result<(), &'static str> {
    if answer.len() < 20 || usize::from(u16::from_be_bytes([answer[2], answer[3]])) > answer.len() {
        return Err("the answer is cut short");
    }
    let length = usize::from(u16::from_be_bytes([answer[2], answer[3]]));
    if length < 20 || answer[1] != id {
        return Err("the answer is to another request");
    }
    // Access-Accept, Accounting-Response.
    if ![2, 5].contains(&answer[0]) {
        return Err("the answer is of an unexpected kind");
    }
    let mut hash = Md5::new();
    hash.update(&answer[..4]);
    hash.update(request);
    hash.update(&answer[20..length]);
    hash.update(secret);
    if hash.finalize().as_slice() == &answer[4..20] { Ok(()) } else { Err("the answer is signed with another secret") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Span;
    use std::time::Duration;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    fn check(kind: CheckKind) -> Check {
        Check {
            kind,
            interval: Span(Duration::from_secs(1)),
            timeout: Span(Duration::from_secs(5)),
            rise: 1,
            fall: 1,
            port: None,
        }
    }

    async fn http(status: &'static str) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = [0; 1024];
            let count = stream.read(&mut request).await.unwrap();
            assert!(request[..count].starts_with(b"GET /up HTTP/1.0\r\nHost: h\r\n"));
            stream.write_all(format!("HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n").as_bytes()).await.unwrap();
        });
        addr
    }

    #[tokio::test]
    async fn http_wants_a_good_status() {
        let kind = CheckKind::Http { path: "/up".into(), host: "h".into() };
        assert_eq!(run(&check(kind.clone()), http("204 No Content").await, None).await, Ok(()));
        assert_eq!(run(&check(kind), http("503 No").await, None).await, Err("status 503".into()));
    }

    #[tokio::test]
    async fn tcp_wants_a_listener() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        assert_eq!(run(&check(CheckKind::Tcp), addr, Some([127, 0, 0, 5].into())).await, Ok(()));
        drop(listener);
        assert!(run(&check(CheckKind::Tcp), addr, None).await.is_err());
    }

    #[tokio::test]
    async fn udp_wants_the_expected_answer() {
        let server = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let addr = server.local_addr().unwrap();
        tokio::spawn(async move {
            let mut bytes = [0; 100];
            loop {
                let (count, from) = server.recv_from(&mut bytes).await.unwrap();
                server.send_to(&[b"re: ", &bytes[..count]].concat(), from).await.unwrap();
            }
        });
        let kind = |expect: &str| CheckKind::Udp { send: "ping".into(), expect: expect.into() };
        assert_eq!(run(&check(kind("ping")), addr, None).await, Ok(()));
        assert!(run(&check(kind("pong")), addr, None).await.is_err());
    }

    /// The example of RFC 5997 section 6: the packet and the answer are given there byte by byte.
    #[test]
    fn radius_as_in_the_rfc() {
        let bytes = |text: &str| -> Vec<u8> {
            text.split_whitespace().map(|byte| u8::from_str_radix(byte, 16).unwrap()).collect()
        };
        let authenticator: [u8; 16] = bytes("8a 54 f4 68 6f b3 94 c5 28 66 e3 02 18 5d 06 23").try_into().unwrap();
        let (packet, _) = status_server(b"xyzzy5461", 0xda, authenticator);
        let expected = bytes(
            "0c da 00 26 8a 54 f4 68 6f b3 94 c5 28 66 e3 02 18 5d 06 23 50 12 5a 66 5e 2e 1e 84 11 f3 e2 43 82 20 97 c8 4f a3",
        );
        assert_eq!(packet, expected);
        let answer = bytes("02 da 00 14 ef 0d 55 2a 4b f2 d6 93 ec 2b 6f e8 b5 41 1d 66");
        assert_eq!(status_answer(&answer, 0xda, &authenticator, b"xyzzy5461"), Ok(()));
        assert!(status_answer(&answer, 0xda, &authenticator, b"other").is_err());
        assert!(status_answer(&answer, 0xdb, &authenticator, b"xyzzy5461").is_err());
        assert!(status_answer(&answer[..19], 0xda, &authenticator, b"xyzzy5461").is_err());
    }
}
