//! The front of tenants' workloads: HTTP and WebSocket by host name, `<workload>-<org>.<domain>`.
//!
//! A request is routed to the instance that serves its workload, through the ingress of that instance's node agent,
//! which connects inside the container's network namespace: nothing of a container is published. A workload that is
//! starting is waited for; one that cannot answer has a page that says why. TLS ends before this, or is not wanted.

mod ingress;
mod page;
mod proxy;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use clawhq_app::App;
use clawhq_runtime::metrics::Metrics;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use serde::{Deserialize, Serialize};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::proxy::Edge;

#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    pub listen: SocketAddr,
    /// The suffix of host names without a port; what comes before its dot is `<workload>-<org>`.
    pub domain: String,
    /// How long a request waits for a workload that is starting, in milliseconds.
    pub wait_ready_ms: u64,
    /// From accepting a connection to its first request's last header, in milliseconds.
    pub header_ms: u64,
    /// How long a workload may take to its first byte of an answer, in milliseconds.
    pub answer_ms: u64,
    /// Connections from clients at once.
    pub connections_max: usize,
    /// How long open connections may finish at a shutdown, in milliseconds.
    pub drain_ms: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 4181)),
            domain: "localhost".to_owned(),
            wait_ready_ms: 30_000,
            header_ms: 10_000,
            answer_ms: 120_000,
            connections_max: 20_000,
            drain_ms: 5_000,
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the edge cannot listen on {listen}")]
    Listen {
        listen: SocketAddr,
        #[source]
        source: std::io::Error,
    },
}

/// Serves until `shutdown`, then lets open connections finish within the drain time.
pub async fn run(config: Config, app: App, metrics: Metrics, shutdown: CancellationToken) -> Result<(), Error> {
    let listen = config.listen;
    let listener = TcpListener::bind(listen).await.map_err(|source| Error::Listen { listen, source })?;
    serve(listener, config, app, metrics, shutdown).await;
    Ok(())
}

/// The same on a socket that is bound already.
pub async fn serve(listener: TcpListener, config: Config, app: App, metrics: Metrics, shutdown: CancellationToken) {
    app.listen(shutdown.clone());
    let places = Arc::new(Semaphore::new(config.connections_max));
    let connections = TaskTracker::new();
    let drain = Duration::from_millis(config.drain_ms);
    let edge = Arc::new(Edge::new(config, app, &metrics));
    loop {
        // A place first: what we cannot serve waits in the kernel's queue instead of in our memory.
        let Ok(place) = places.clone().acquire_owned().await else { break };
        let (stream, peer) = tokio::select! {
            () = shutdown.cancelled() => break,
            accepted = listener.accept() => match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    // Out of descriptors, mostly: busy looping would not make any free.
                    tracing::warn!("the edge cannot accept: {error}");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
            },
        };
        let (edge, shutdown) = (edge.clone(), shutdown.clone());
        connections.spawn(async move {
            connection(edge, stream, peer, shutdown).await;
            drop(place);
        });
    }
    connections.close();
    if tokio::time::timeout(drain, connections.wait()).await.is_err() {
        tracing::info!(connections = connections.len(), "the edge ends with connections open");
    }
}

async fn connection(edge: Arc<Edge>, stream: TcpStream, peer: SocketAddr, shutdown: CancellationToken) {
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!("no TCP_NODELAY: {error}");
    }
    let header = Duration::from_millis(edge.config.header_ms);
    let mut builder = Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(header).max_buf_size(64 * 1024);
    let service = service_fn(move |request| {
        let edge = edge.clone();
        async move { Ok::<_, std::convert::Infallible>(edge.answer(request, peer).await) }
    });
    let connection = builder.serve_connection_with_upgrades(TokioIo::new(stream), service);
    tokio::pin!(connection);
    let mut told = false;
    loop {
        tokio::select! {
            ended = connection.as_mut() => {
                if let Err(error) = ended {
                    tracing::debug!("a client's connection ended: {error}");
                }
                return;
            }
            () = shutdown.cancelled(), if !told => {
                connection.as_mut().graceful_shutdown();
                told = true;
            }
        }
    }
}
