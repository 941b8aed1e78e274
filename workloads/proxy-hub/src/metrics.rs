//! Counters of the service, and their Prometheus text.

use std::fmt::Write as _;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// Upper bounds of the latency buckets, in milliseconds.
const BOUNDS: [u64; 13] = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000];

#[derive(Default)]
pub struct Histogram {
    buckets: [AtomicU64; BOUNDS.len() + 1],
    sum_us: AtomicU64,
}

impl Histogram {
    pub fn observe(&self, took: Duration) {
        let at = BOUNDS.iter().position(|b| took <= Duration::from_millis(*b)).unwrap_or(BOUNDS.len());
        self.buckets[at].fetch_add(1, Relaxed);
        self.sum_us.fetch_add(took.as_micros() as u64, Relaxed);
    }

    fn write(&self, out: &mut String, name: &str, help: &str) {
        let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} histogram");
        let mut total = 0;
        for (bucket, bound) in self.buckets.iter().zip(BOUNDS) {
            total += bucket.load(Relaxed);
            let _ = writeln!(out, "{name}_bucket{{le=\"{bound}\"}} {total}");
        }
        total += self.buckets[BOUNDS.len()].load(Relaxed);
        let _ = writeln!(out, "{name}_bucket{{le=\"+Inf\"}} {total}");
        let _ = writeln!(out, "{name}_sum {}", self.sum_us.load(Relaxed) as f64 / 1000.0);
        let _ = writeln!(out, "{name}_count {total}");
    }
}

/// How a request ended up, as a label.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    Ok,
    Auth,
    Denied,
    Limited,
    NoPeer,
    Failed,
    Malformed,
}

const OUTCOMES: [&str; 7] = ["ok", "auth", "denied", "limited", "no_peer", "failed", "malformed"];
const PROTOCOLS: [&str; 3] = ["socks5", "http", "udp"];

/// Everything counted. Gauges are set by whoever knows.
#[derive(Default)]
pub struct Metrics {
    requests: [[AtomicU64; OUTCOMES.len()]; PROTOCOLS.len()],
    pub bytes_up: AtomicU64,
    pub bytes_down: AtomicU64,
    pub peers_connected: AtomicI64,
    pub customers_connected: AtomicI64,
    pub tunnels: AtomicI64,
    pub registrations: AtomicU64,
    pub cooldowns: AtomicU64,
    pub peers_dead: AtomicU64,
    pub peers_refused: AtomicU64,
    pub protocol_errors: AtomicU64,
    pub handoffs: AtomicU64,
    pub failovers: AtomicU64,
    pub relayed: AtomicU64,
    pub registration: Histogram,
    pub request: Histogram,
}

impl Metrics {
    /// `protocol`: 0 SOCKS5, 1 HTTP, 2 UDP.
    pub fn count(&self, protocol: usize, outcome: Outcome) {
        self.requests[protocol.min(2)][outcome as usize].fetch_add(1, Relaxed);
    }

    pub fn requests(&self, outcome: Outcome) -> u64 {
        self.requests.iter().map(|p| p[outcome as usize].load(Relaxed)).sum()
    }

    /// Prometheus text. `extra` are gauges computed now: name, help, value.
    pub fn prometheus(&self, extra: &[(&str, &str, f64)], by_country: &[(String, u32)]) -> String {
        let mut out = String::with_capacity(8192);
        let gauge = |out: &mut String, name: &str, help: &str, value: i64| {
            let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} gauge\n{name} {value}");
        };
        let counter = |out: &mut String, name: &str, help: &str, value: u64| {
            let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} counter\n{name} {value}");
        };
        gauge(&mut out, "ws_connections_active", "Peers connected by WebSocket.", self.peers_connected.load(Relaxed));
        let _ = writeln!(
            out,
            "# HELP proxy_requests_total Requests by protocol and outcome.\n# TYPE proxy_requests_total counter"
        );
        for (protocol, row) in PROTOCOLS.iter().zip(&self.requests) {
            for (status, n) in OUTCOMES.iter().zip(row) {
                let _ = writeln!(
                    out,
                    "proxy_requests_total{{protocol=\"{protocol}\",status=\"{status}\"}} {}",
                    n.load(Relaxed)
                );
            }
        }
        let _ = writeln!(
            out,
            "# HELP proxy_bytes_transferred Bytes of customers moved.\n# TYPE proxy_bytes_transferred counter"
        );
        for (direction, n) in [("up", &self.bytes_up), ("down", &self.bytes_down)] {
            let _ = writeln!(out, "proxy_bytes_transferred{{direction=\"{direction}\"}} {}", n.load(Relaxed));
        }
        self.registration.write(
            &mut out,
            "node_registration_latency_ms",
            "From a peer's connect to its registration, milliseconds.",
        );
        self.request.write(&mut out, "proxy_request_latency_ms", "From a request to its open tunnel, milliseconds.");
        gauge(&mut out, "hub_customers_active", "Customer connections.", self.customers_connected.load(Relaxed));
        gauge(&mut out, "hub_tunnels_active", "Tunnels through peers.", self.tunnels.load(Relaxed));
        for (name, help, n) in [
            ("hub_registrations_total", "Peers registered.", &self.registrations),
            ("hub_cooldowns_total", "Peers told to come back later.", &self.cooldowns),
            ("hub_peers_dead_total", "Peers given up for silence.", &self.peers_dead),
            ("hub_peers_refused_total", "Peers refused for token or version.", &self.peers_refused),
            ("hub_protocol_errors_total", "Connections of peers failed for what they sent.", &self.protocol_errors),
            ("hub_handoffs_total", "Customers moved to the shard of their peer.", &self.handoffs),
            ("hub_failovers_total", "Requests tried again through another peer.", &self.failovers),
            ("hub_relayed_total", "Requests passed to another hub.", &self.relayed),
        ] {
            counter(&mut out, name, help, n.load(Relaxed));
        }
        let _ = writeln!(out, "# HELP hub_peers_by_country Registered peers.\n# TYPE hub_peers_by_country gauge");
        for (country, n) in by_country {
            let _ = writeln!(out, "hub_peers_by_country{{country=\"{country}\"}} {n}");
        }
        for (name, help, value) in extra {
            let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} gauge\n{name} {value}");
        }
        out
    }
}
