//! What `/metrics` tells of this room.

use clawhq_runtime::metrics::Metrics as Registry;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Route {
    pub method: String,
    /// The path's template, so that there are as many series as operations.
    pub route: String,
    pub status: u16,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Placement {
    pub placement: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Kind {
    pub kind: &'static str,
}

type Histograms<L> = Family<L, Histogram, fn() -> Histogram>;

fn seconds() -> Histogram {
    // 0.5 ms to 65 s.
    Histogram::new(exponential_buckets(0.0005, 2.0, 18))
}

#[derive(Clone)]
pub struct Metrics {
    pub requests: Histograms<Route>,
    pub in_flight: Gauge,
    pub deploys: Histograms<Placement>,
    /// Open log, event, exec and terminal streams.
    pub streams: Family<Kind, Gauge>,
    pub node_streams: Gauge,
    pub node_reports: Counter,
    /// From a hint to the frame that it led to.
    pub node_upsert: Histogram,
    pub channels: Gauge,
}

impl Metrics {
    pub fn register(registry: &Registry) -> Self {
        let metrics = Self {
            requests: Family::new_with_constructor(seconds as fn() -> Histogram),
            in_flight: Gauge::default(),
            deploys: Family::new_with_constructor(seconds as fn() -> Histogram),
            streams: Family::default(),
            node_streams: Gauge::default(),
            node_reports: Counter::default(),
            node_upsert: Histogram::new(exponential_buckets(0.0001, 2.0, 16)),
            channels: Gauge::default(),
        };
        registry.register("http_request_seconds", "Time to a response's head, by operation", metrics.requests.clone());
        registry.register("http_requests_in_flight", "Requests being answered", metrics.in_flight.clone());
        registry.register("deploy_seconds", "Time of a deploy's request, by placement", metrics.deploys.clone());
        registry.register("streams", "Open streams of clients", metrics.streams.clone());
        registry.register("node_streams", "Node agents connected here", metrics.node_streams.clone());
        registry.register("node_reports", "Reports of node agents committed", metrics.node_reports.clone());
        registry.register("node_upsert_seconds", "From a hint to its frame", metrics.node_upsert.clone());
        registry.register("node_channels", "Log, exec and terminal channels to nodes", metrics.channels.clone());
        metrics
    }
}

/// Counts something for as long as it lives.
pub struct InUse(Gauge);

impl InUse {
    pub fn new(gauge: &Gauge) -> Self {
        gauge.inc();
        Self(gauge.clone())
    }
}

impl Drop for InUse {
    fn drop(&mut self) {
        self.0.dec();
    }
}
