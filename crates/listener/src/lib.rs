//! An HTTP listener with the limits every public port needs: connections at once, time to send a request's head, idle time,
//! and a shutdown that lets requests in flight finish.

use std::convert::Infallible;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http::{Request, Response};
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use hyper_util::server::graceful::GracefulShutdown;
use serde::{Deserialize, Serialize};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

/// Bounds of one listener.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Connections at once; further ones wait in the kernel's queue.
    pub connections: usize,
    /// Longest time for a request's head to arrive, and for a kept-alive connection to stay idle.
    pub head_seconds: u64,
    /// Longest head, in bytes.
    pub head_bytes: usize,
    /// HTTP/2 requests at once on one connection.
    pub http2_streams: u32,
    /// How long requests in flight have to finish at shutdown.
    pub drain_seconds: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { connections: 4096, head_seconds: 60, head_bytes: 64 * 1024, http2_streams: 256, drain_seconds: 10 }
    }
}

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Serves until `shutdown`, then stops accepting, lets requests finish within `drain_seconds`, and cuts the rest.
/// Each request carries its peer's [`SocketAddr`] as an extension.
pub async fn serve<S, F, B>(listener: TcpListener, service: S, limits: Limits, shutdown: CancellationToken)
where
    S: Fn(Request<Incoming>) -> F + Clone + Send + Sync + 'static,
    F: Future<Output = Result<Response<B>, Infallible>> + Send + 'static,
    B: http_body::Body + Send + 'static,
    B::Data: Send,
    B::Error: Into<BoxError>,
{
    let mut builder = Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(Duration::from_secs(limits.head_seconds))
        .max_buf_size(limits.head_bytes.max(8192));
    builder
        .http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(Duration::from_secs(30))
        .keep_alive_timeout(Duration::from_secs(20))
        .max_concurrent_streams(limits.http2_streams)
        .max_header_list_size(u32::try_from(limits.head_bytes).unwrap_or(u32::MAX));
    let builder = Arc::new(builder);
    let connections = Arc::new(Semaphore::new(limits.connections));
    let graceful = GracefulShutdown::new();
    let cut = CancellationToken::new();
    loop {
        let permit = tokio::select! {
            () = shutdown.cancelled() => break,
            permit = connections.clone().acquire_owned() => permit,
        };
        let Ok(permit) = permit else { break };
        let (stream, peer) = tokio::select! {
            () = shutdown.cancelled() => break,
            accepted = listener.accept() => match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    // Out of file descriptors, most likely: it passes when a connection ends, and must not spin meanwhile.
                    tracing::warn!(%error, "a connection could not be accepted");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
            },
        };
        // Answers are written whole; waiting to fill a packet only adds delay.
        let _ = stream.set_nodelay(true);
        let service = service.clone();
        let watcher = graceful.watcher();
        let (builder, cut) = (builder.clone(), cut.clone());
        tokio::spawn(async move {
            let handle = hyper::service::service_fn(move |mut request: Request<Incoming>| {
                request.extensions_mut().insert::<SocketAddr>(peer);
                service(request)
            });
            let connection = builder.serve_connection_with_upgrades(TokioIo::new(stream), handle);
            let watched = watcher.watch(connection);
            tokio::select! {
                ended = watched => if let Err(error) = ended {
                    tracing::debug!(%peer, error, "connection ended");
                },
                () = cut.cancelled() => {}
            }
            drop(permit);
        });
    }
    drop(listener);
    if tokio::time::timeout(Duration::from_secs(limits.drain_seconds), graceful.shutdown()).await.is_err() {
        tracing::warn!("requests did not finish in time and were cut off");
    }
    cut.cancel();
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use http_body_util::Full;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;

    use super::*;

    async fn start(
        limits: Limits,
    ) -> (SocketAddr, Arc<tokio::sync::Notify>, CancellationToken, tokio::task::JoinHandle<()>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let release = Arc::new(tokio::sync::Notify::new());
        let shutdown = CancellationToken::new();
        let wait = release.clone();
        let service = move |request: Request<Incoming>| {
            let wait = wait.clone();
            async move {
                assert!(request.extensions().get::<SocketAddr>().is_some());
                if request.uri().path() == "/slow" {
                    wait.notified().await;
                }
                Ok(Response::new(Full::new(Bytes::from_static(b"done"))))
            }
        };
        let task = tokio::spawn(serve(listener, service, limits, shutdown.clone()));
        (address, release, shutdown, task)
    }

    async fn ask(address: SocketAddr, path: &str) -> TcpStream {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let head = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        stream.write_all(head.as_bytes()).await.unwrap();
        stream
    }

    async fn read(mut stream: TcpStream) -> String {
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        text
    }

    #[tokio::test]
    async fn a_request_in_flight_finishes_and_a_late_one_is_refused() {
        let (address, release, shutdown, task) = start(Limits::default()).await;
        let slow = ask(address, "/slow").await;
        // A second answer proves that the listener has taken the first in.
        assert!(read(ask(address, "/").await).await.ends_with("done"));
        shutdown.cancel();
        let mut closed = TcpStream::connect(address).await;
        while closed.is_ok() {
            tokio::task::yield_now().await;
            closed = TcpStream::connect(address).await;
        }
        release.notify_one();
        assert!(read(slow).await.ends_with("done"));
        task.await.unwrap();
    }

    #[tokio::test]
    async fn a_head_that_never_ends_is_cut() {
        let (address, _, _, _) = start(Limits { head_seconds: 1, ..Limits::default() }).await;
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(b"GET / HTTP/1.1\r\nhost:").await.unwrap();
        let mut rest = Vec::new();
        tokio::time::timeout(Duration::from_secs(10), stream.read_to_end(&mut rest)).await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn more_connections_than_allowed_wait() {
        let (address, release, _, _) = start(Limits { connections: 1, ..Limits::default() }).await;
        let first = ask(address, "/slow").await;
        let second = ask(address, "/").await;
        let second = tokio::spawn(read(second));
        release.notify_one();
        assert!(read(first).await.ends_with("done"));
        assert!(second.await.unwrap().ends_with("done"));
    }
}
