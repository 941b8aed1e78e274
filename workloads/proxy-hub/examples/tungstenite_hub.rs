//! A hub for comparison, as one writes it on tokio-tungstenite with its buffers tuned down: it welcomes peers and pings
//! them, nothing else.

use futures::{SinkExt, StreamExt};
use std::time::Duration;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::handshake::server::{Request, Response};
use tokio_tungstenite::tungstenite::http::HeaderValue;
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;

#[tokio::main(worker_threads = 2)]
async fn main() -> std::io::Result<()> {
    let addr = std::env::args().nth(1).unwrap_or_else(|| "127.0.0.1:9700".into());
    let _ = clawhq_wire::budget::raise_limit();
    let listener = tokio::net::TcpSocket::new_v4()?;
    listener.set_reuseaddr(true)?;
    listener.bind(addr.parse().map_err(std::io::Error::other)?)?;
    let listener = listener.listen(4096)?;
    loop {
        let (stream, _) = listener.accept().await?;
        tokio::spawn(async move {
            let config = WebSocketConfig::default().read_buffer_size(512).write_buffer_size(0);
            #[allow(clippy::result_large_err)]
            let protocol = |_: &Request, mut response: Response| {
                response.headers_mut().insert("sec-websocket-protocol", HeaderValue::from_static("proxyhub.v3"));
                Ok(response)
            };
            let Ok(mut socket) = tokio_tungstenite::accept_hdr_async_with_config(stream, protocol, Some(config)).await
            else {
                return;
            };
            let mut every = tokio::time::interval(Duration::from_secs(12));
            every.tick().await;
            loop {
                tokio::select! {
                    message = socket.next() => match message {
                        Some(Ok(Message::Binary(frame))) if frame.first() == Some(&1) => {
                            let welcome = b"\x02\0\0\0\0{\"hub\":\"t\",\"heartbeat_seconds\":12,\"max_tunnels\":32,\"window\":262144,\"address\":\"\",\"country\":\"XX\"}";
                            if socket.send(Message::binary(&welcome[..])).await.is_err() { return }
                        }
                        Some(Ok(_)) => {}
                        _ => return,
                    },
                    _ = every.tick() => if socket.send(Message::Ping(Vec::new().into())).await.is_err() { return },
                }
            }
        });
    }
}
