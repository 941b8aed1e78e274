//! One registry of Prometheus metrics per process, handed to the roles rather than kept in a global.

use std::sync::Arc;

use parking_lot::RwLock;
use prometheus_client::registry::{Metric, Registry};

pub use prometheus_client;

/// The registry behind `/metrics`. Cheap to clone.
#[derive(Clone)]
pub struct Metrics(Arc<RwLock<Registry>>);

/// The content type of [`Metrics::encode`].
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    /// An empty registry; every name in it begins with `clawhq_`.
    pub fn new() -> Self {
        Metrics(Arc::new(RwLock::new(Registry::with_prefix("clawhq"))))
    }

    /// Registers a metric (a clone of the handle the role keeps) under a name without the prefix.
    pub fn register(&self, name: &str, help: &str, metric: impl Metric) {
        self.0.write().register(name, help, metric);
    }

    /// Everything registered, in the OpenMetrics text format.
    pub fn encode(&self) -> String {
        let mut text = String::with_capacity(16 * 1024);
        if let Err(error) = prometheus_client::encoding::text::encode(&mut text, &self.0.read()) {
            tracing::error!(%error, "metrics could not be encoded");
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use prometheus_client::metrics::counter::Counter;

    use super::*;

    #[test]
    fn a_registered_counter_is_encoded() {
        let metrics = Metrics::new();
        let counter: Counter = Counter::default();
        metrics.register("claims", "Slots claimed", counter.clone());
        counter.inc_by(3);
        assert!(metrics.encode().contains("clawhq_claims_total 3\n"), "{}", metrics.encode());
    }
}
