//! The least HTTP client that checks and figures need: one GET, HTTP/1.0, bounded.

use std::io;
use std::net::{IpAddr, SocketAddr};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

/// Connects, from `source` if given.
pub async fn connect(to: SocketAddr, source: Option<IpAddr>) -> io::Result<TcpStream> {
    let socket = if to.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    if let Some(source) = source {
        socket.bind(SocketAddr::new(source, 0))?;
    }
    socket.connect(to).await
}

/// GETs `path`; the status and at most `most` bytes of the body. The caller sets the deadline.
pub async fn get(
    to: SocketAddr,
    source: Option<IpAddr>,
    host: &str,
    path: &str,
    most: usize,
) -> io::Result<(u16, Vec<u8>)> {
    let mut stream = connect(to, source).await?;
    // 1.0, so that the body is neither chunked nor followed by another response.
    let request =
        format!("GET {path} HTTP/1.0\r\nHost: {host}\r\nUser-Agent: conduit-balancer\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = Vec::new();
    let limit = most + (16 << 10);
    let mut head = None;
    loop {
        let mut chunk = [0; 8192];
        let count = stream.read(&mut chunk).await?;
        answer.extend_from_slice(&chunk[..count]);
        if head.is_none() {
            head = answer.windows(4).position(|window| window == b"\r\n\r\n");
        }
        if count == 0 || answer.len() >= limit || (most == 0 && head.is_some()) {
            break;
        }
    }
    let malformed = || io::Error::new(io::ErrorKind::InvalidData, "not an HTTP response");
    let head = head.ok_or_else(malformed)?;
    let line = answer[..head].split(|byte| *byte == b'\r').next().unwrap_or_default();
    let line = std::str::from_utf8(line).map_err(|_| malformed())?;
    let status = line
        .strip_prefix("HTTP/1.")
        .and_then(|rest| rest.get(2..5))
        .and_then(|code| code.parse().ok())
        .ok_or_else(malformed)?;
    if answer.len() - head - 4 > most && most > 0 {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("the body has more than {most} bytes")));
    }
    Ok((status, answer.split_off((head + 4).min(answer.len()))))
}
