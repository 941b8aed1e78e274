//! The endpoint node agents dial: enrolment, the stream of each node, and the channels that run through it.

pub mod channels;
mod link;
mod tls;
mod wire;

use std::net::SocketAddr;

use anyhow::Context as _;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::state::Backend;

/// Serves node agents on `listener` until `shutdown`.
///
/// # Errors
/// When the server's certificate cannot be made.
pub async fn serve(backend: Backend, listener: TcpListener, shutdown: CancellationToken) -> anyhow::Result<()> {
    let address: SocketAddr = listener.local_addr().context("the node stream's address")?;
    let connections = tls::accept(&backend, listener, address, shutdown.clone())?;
    link::serve(backend, connections, shutdown).await
}
