//! What every handler shares.

use std::sync::Arc;

use clawhq_app::App;
use clawhq_runtime::metrics::Metrics as Registry;
use tokio_util::sync::CancellationToken;

use crate::config::Config;
use crate::limits::Limits;
use crate::metrics::Metrics;
use crate::node::channels::NodeChannels;
use crate::routes::terminal::Tickets;
use crate::streams::Streams;

/// Cheap to clone.
#[derive(Clone)]
pub struct Backend(Arc<Inner>);

struct Inner {
    app: App,
    config: Config,
    limits: Limits,
    metrics: Metrics,
    registry: Registry,
    channels: NodeChannels,
    tickets: Tickets,
    streams: Streams,
    shutdown: CancellationToken,
}

impl Backend {
    pub fn new(config: Config, app: App, registry: Registry, shutdown: CancellationToken) -> Self {
        let metrics = Metrics::register(&registry);
        Self(Arc::new(Inner {
            limits: Limits::new(&config.limits),
            channels: NodeChannels::new(metrics.channels.clone()),
            tickets: Tickets::default(),
            streams: Streams::new(config.limits.streams_per_org),
            app,
            config,
            metrics,
            registry,
            shutdown,
        }))
    }

    pub fn app(&self) -> &App {
        &self.0.app
    }

    pub fn config(&self) -> &Config {
        &self.0.config
    }

    pub fn limits(&self) -> &Limits {
        &self.0.limits
    }

    pub fn metrics(&self) -> &Metrics {
        &self.0.metrics
    }

    pub fn registry(&self) -> &Registry {
        &self.0.registry
    }

    /// Logs, exec and terminal: the way to the nodes whose streams end in this process.
    pub fn channels(&self) -> &NodeChannels {
        &self.0.channels
    }

    pub fn tickets(&self) -> &Tickets {
        &self.0.tickets
    }

    pub fn streams(&self) -> &Streams {
        &self.0.streams
    }

    /// Ends every stream, so that a shutdown does not wait for clients.
    pub fn shutdown(&self) -> &CancellationToken {
        &self.0.shutdown
    }
}
