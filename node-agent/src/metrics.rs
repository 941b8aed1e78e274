//! What can be counted about a node agent.

use std::sync::atomic::AtomicU64;

use clawhq_runtime::metrics::Metrics;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};

#[derive(Clone)]
pub struct Counters {
    pub slots: Gauge,
    pub running: Gauge,
    pub linked: Gauge,
    pub runtime_ready: Gauge,
    pub firewall_ready: Gauge,
    pub reports_pending: Gauge,
    pub claims: Counter,
    pub claim_seconds: Histogram,
    pub made: Counter,
    pub make_failures: Counter,
    pub make_seconds: Histogram,
    pub removed: Counter,
    pub exits: Counter,
    pub dials: Counter,
    pub malformed: Counter,
    pub firewall_mended: Counter,
    pub swept: Counter,
    pub orphans: Counter,
    pub channels: Gauge,
    pub ingress_connections: Gauge,
    pub ingress_refused: Counter,
    pub ingress_bytes: Counter<u64, AtomicU64>,
}

impl Counters {
    pub fn register(metrics: &Metrics) -> Self {
        let histogram = || Histogram::new(exponential_buckets(0.0005, 2.0, 16));
        let all = Self {
            slots: Gauge::default(),
            running: Gauge::default(),
            linked: Gauge::default(),
            runtime_ready: Gauge::default(),
            firewall_ready: Gauge::default(),
            reports_pending: Gauge::default(),
            claims: Counter::default(),
            claim_seconds: histogram(),
            made: Counter::default(),
            make_failures: Counter::default(),
            make_seconds: histogram(),
            removed: Counter::default(),
            exits: Counter::default(),
            dials: Counter::default(),
            malformed: Counter::default(),
            firewall_mended: Counter::default(),
            swept: Counter::default(),
            orphans: Counter::default(),
            channels: Gauge::default(),
            ingress_connections: Gauge::default(),
            ingress_refused: Counter::default(),
            ingress_bytes: Counter::default(),
        };
        let name = |name: &str| format!("node_{name}");
        metrics.register(&name("slots"), "Slots this node should have", all.slots.clone());
        metrics.register(&name("running"), "Claimed slots that answer", all.running.clone());
        metrics.register(&name("linked"), "1 while the control plane is connected", all.linked.clone());
        metrics.register(&name("runtime_ready"), "1 while Docker answers", all.runtime_ready.clone());
        metrics.register(&name("firewall_ready"), "1 while the table is as loaded", all.firewall_ready.clone());
        metrics.register(&name("reports_pending"), "Reports not yet acknowledged", all.reports_pending.clone());
        metrics.register(&name("claims"), "Claims delivered", all.claims.clone());
        metrics.register(&name("claim_seconds"), "From the claim to the first answer", all.claim_seconds.clone());
        metrics.register(&name("made"), "Containers made", all.made.clone());
        metrics.register(&name("make_failures"), "Containers that could not be made", all.make_failures.clone());
        metrics.register(&name("make_seconds"), "From the order to a started container", all.make_seconds.clone());
        metrics.register(&name("removed"), "Containers removed", all.removed.clone());
        metrics.register(&name("exits"), "Processes that ended by themselves", all.exits.clone());
        metrics.register(&name("dials"), "Connections opened to the control plane", all.dials.clone());
        metrics.register(&name("malformed"), "Frames of the control plane that were refused", all.malformed.clone());
        metrics.register(&name("firewall_mended"), "Times the table was not as loaded", all.firewall_mended.clone());
        metrics.register(&name("swept"), "Leftovers removed", all.swept.clone());
        metrics.register(&name("orphans"), "Processes ended whose container Docker did not know", all.orphans.clone());
        metrics.register(&name("channels"), "Open log, exec and terminal channels", all.channels.clone());
        metrics.register(&name("ingress_connections"), "Open ingress connections", all.ingress_connections.clone());
        metrics.register(&name("ingress_refused"), "Ingress connections refused", all.ingress_refused.clone());
        metrics.register(&name("ingress_bytes"), "Bytes carried by the ingress", all.ingress_bytes.clone());
        all
    }
}
