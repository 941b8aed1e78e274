//! The way to a container: its node agent's ingress, one line of preamble, then raw bytes.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use clawhq_app::routes::Target;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::{TcpStream, UnixStream};

/// The whole way to the container, its node agent included.
const CONNECT: Duration = Duration::from_secs(5);
/// `OK` or `ERR <code> <message>`: a longer line is not the protocol's.
const LINE_MAX: usize = 512;

#[derive(Debug, thiserror::Error)]
pub enum IngressError {
    /// The node agent does not answer at the address it gave.
    #[error("the node's ingress does not answer")]
    Unreachable(#[source] io::Error),
    #[error("the node's ingress took too long")]
    Timeout,
    /// The node agent answered and refused: the slot is not there, not this workload's any more, or nothing listens.
    #[error("{code}: {message}")]
    Refused { code: String, message: String },
    #[error("the node's ingress does not speak the protocol")]
    Protocol,
}

/// A connection to a port inside a container.
pub enum Connection {
    Unix(UnixStream),
    Tcp(TcpStream),
}

/// Connects to the target's port inside its container.
pub async fn connect(target: &Target) -> Result<Connection, IngressError> {
    tokio::time::timeout(CONNECT, open(target)).await.map_err(|_| IngressError::Timeout)?
}

async fn open(target: &Target) -> Result<Connection, IngressError> {
    let mut connection = if let Some(path) = target.ingress.strip_prefix("unix:") {
        Connection::Unix(UnixStream::connect(path).await.map_err(IngressError::Unreachable)?)
    } else if let Some(address) = target.ingress.strip_prefix("tcp:") {
        let stream = TcpStream::connect(address).await.map_err(IngressError::Unreachable)?;
        stream.set_nodelay(true).map_err(IngressError::Unreachable)?;
        Connection::Tcp(stream)
    } else {
        return Err(IngressError::Protocol);
    };
    let preamble = format!("CLAWHQ/1 {} {}\n", target.slot, target.port);
    connection.write_all(preamble.as_bytes()).await.map_err(IngressError::Unreachable)?;
    let line = read_line(&mut connection).await?;
    match line.split_once(' ').map_or((line.as_str(), ""), |(word, rest)| (word, rest)) {
        ("OK", _) => Ok(connection),
        ("ERR", rest) => {
            let (code, message) = rest.split_once(' ').unwrap_or((rest, ""));
            Err(IngressError::Refused { code: code.to_owned(), message: message.to_owned() })
        }
        _ => Err(IngressError::Protocol),
    }
}

/// Byte by byte: what follows the line is the container's and must not be swallowed.
async fn read_line(connection: &mut Connection) -> Result<String, IngressError> {
    let mut line = Vec::with_capacity(64);
    while line.len() < LINE_MAX {
        match connection.read_u8().await.map_err(IngressError::Unreachable)? {
            b'\n' => return String::from_utf8(line).map_err(|_| IngressError::Protocol),
            byte => line.push(byte),
        }
    }
    Err(IngressError::Protocol)
}

impl AsyncRead for Connection {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Unix(stream) => Pin::new(stream).poll_read(cx, buf),
            Self::Tcp(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Unix(stream) => Pin::new(stream).poll_write(cx, bytes),
            Self::Tcp(stream) => Pin::new(stream).poll_write(cx, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Unix(stream) => Pin::new(stream).poll_flush(cx),
            Self::Tcp(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Unix(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Tcp(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clawhq_domain::ids::{InstanceId, NodeId, SlotId};
    use tokio::net::UnixListener;

    async fn against(answer: &'static [u8]) -> Result<Connection, IngressError> {
        let folder = std::env::temp_dir().join(format!("clawhq-ingress-{}-{}", std::process::id(), answer.len()));
        std::fs::create_dir_all(&folder).unwrap();
        let path = folder.join("s");
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(&path).unwrap();
        let target = Target {
            node: NodeId::from_u128(1),
            slot: SlotId::from_u128(2),
            instance: InstanceId::from_u128(3),
            ingress: format!("unix:{}", path.display()),
            port: 8080,
        };
        let server = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut asked = vec![0; format!("CLAWHQ/1 {} 8080\n", SlotId::from_u128(2)).len()];
            stream.read_exact(&mut asked).await.unwrap();
            assert!(asked.ends_with(b" 8080\n"));
            stream.write_all(answer).await.unwrap();
            stream.shutdown().await.unwrap();
        });
        let connected = connect(&target).await;
        server.await.unwrap();
        std::fs::remove_dir_all(folder).unwrap();
        connected
    }

    #[tokio::test]
    async fn what_follows_the_line_is_the_containers() {
        let mut connection = against(b"OK\nhello").await.unwrap();
        let mut rest = String::new();
        connection.read_to_string(&mut rest).await.unwrap();
        assert_eq!(rest, "hello");
    }

    #[tokio::test]
    async fn refusals_and_nonsense_are_told_apart() {
        let refused = against(b"ERR not_found no such slot\n").await;
        assert!(
            matches!(refused, Err(IngressError::Refused { code, message }) if code == "not_found" && message == "no such slot")
        );
        assert!(matches!(against(b"HTTP/1.1 200\n").await, Err(IngressError::Protocol)));
        assert!(matches!(against(b"").await, Err(IngressError::Unreachable(_))));
    }
}
