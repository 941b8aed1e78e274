//! The figures: one view of the board and the controller, as JSON and as Prometheus text.

use crate::board::{B, COUNTRIES, L, LATENCY_BOUNDS, W, country_code};
use crate::conduit::Summary;
use crate::control::Controller;
use serde::Serialize;
use std::fmt::Write;
use std::sync::atomic::Ordering::Relaxed;

#[derive(Debug, Serialize)]
pub struct Stats {
    pub uptime_seconds: f64,
    pub connections: Connections,
    pub listeners: Vec<ListenerStats>,
    pub pools: Vec<PoolStats>,
    pub countries: Vec<CountryStats>,
    pub workers: Vec<WorkerStats>,
    pub reloads: u64,
    pub reloads_failed: u64,
    pub conduits: Option<Summary>,
}

#[derive(Debug, Default, Serialize)]
pub struct Connections {
    pub now: u64,
    pub total: u64,
    pub rejected: u64,
    pub bytes_in: u64,
    pub bytes_out: u64,
}

#[derive(Debug, Serialize)]
pub struct ListenerStats {
    pub name: String,
    pub protocol: String,
    pub listen: String,
    pub pool: String,
    pub now: u64,
    pub total: u64,
    pub rejected_client: u64,
    pub rejected_limit: u64,
    pub rejected_proxy: u64,
    pub no_backend: u64,
    pub bytes_in: u64,
    pub bytes_out: u64,
    pub spliced: u64,
    pub datagrams_in: u64,
    pub datagrams_out: u64,
    pub datagrams_dropped: u64,
    pub ended_idle: u64,
    pub ended_reset: u64,
}

#[derive(Debug, Serialize)]
pub struct PoolStats {
    pub name: String,
    pub backends: Vec<BackendStats>,
}

#[derive(Debug, Serialize)]
pub struct BackendStats {
    pub name: String,
    pub addr: String,
    pub state: &'static str,
    pub weight: u32,
    pub now: u64,
    /// Of the pool's connections now, 0 to 1.
    pub share: f64,
    pub total: u64,
    pub bytes_in: u64,
    pub bytes_out: u64,
    pub connect_failed: u64,
    pub connect_timeout: u64,
    pub connect_p50_us: Option<u64>,
    pub connect_p99_us: Option<u64>,
    /// Connects by upper bound in microseconds; the last is for all that took longer.
    pub connect_us: Vec<u64>,
    pub connect_us_sum: u64,
    /// Why the last check failed.
    pub check: Option<String>,
}

#[derive(Debug, Serialize)]
pub struct CountryStats {
    pub code: String,
    pub now: u64,
    pub total: u64,
}

#[derive(Debug, Serialize)]
pub struct WorkerStats {
    pub number: usize,
    pub pid: Option<u32>,
    pub alive: bool,
    pub restarts: u64,
    pub now: u64,
    pub sockets: u64,
    pub pipes: u64,
}

/// The upper bound below which `share` of the connects lie; `None` when there are none.
fn quantile(buckets: &[u64], share: f64) -> Option<u64> {
    let total: u64 = buckets.iter().sum();
    if total == 0 {
        return None;
    }
    let wanted = (total as f64 * share).ceil() as u64;
    let mut seen = 0;
    let place = buckets.iter().position(|count| {
        seen += count;
        seen >= wanted
    })?;
    Some(LATENCY_BOUNDS.get(place).copied().unwrap_or(LATENCY_BOUNDS[LATENCY_BOUNDS.len() - 1] * 2))
}

impl Stats {
    pub fn collect(controller: &Controller) -> Stats {
        let (board, state) = (&controller.board, controller.lock());
        let listeners: Vec<ListenerStats> = state
            .table
            .entries
            .iter()
            .map(|entry| {
                let sum = |what| board.sum_listener(entry.id, what);
                ListenerStats {
                    name: entry.listener.name.clone(),
                    protocol: format!("{:?}", entry.listener.protocol).to_lowercase(),
                    listen: entry.listener.listen.to_string(),
                    pool: entry.listener.pool.clone(),
                    now: sum(L::Active),
                    total: sum(L::Total),
                    rejected_client: sum(L::RejectedClient),
                    rejected_limit: sum(L::RejectedLimit),
                    rejected_proxy: sum(L::RejectedProxy),
                    no_backend: sum(L::NoBackend),
                    bytes_in: sum(L::BytesIn),
                    bytes_out: sum(L::BytesOut),
                    spliced: sum(L::Spliced),
                    datagrams_in: sum(L::DatagramsIn),
                    datagrams_out: sum(L::DatagramsOut),
                    datagrams_dropped: sum(L::DatagramsDropped),
                    ended_idle: sum(L::EndedIdle),
                    ended_reset: sum(L::EndedReset),
                }
            })
            .collect();
        let pools = state
            .config
            .pools
            .iter()
            .map(|pool| {
                let mut backends: Vec<BackendStats> = pool
                    .backends
                    .iter()
                    .filter_map(|backend| {
                        let member = state.members.get(&(pool.name.clone(), backend.name.clone()))?;
                        let mut connect_us = vec![0; LATENCY_BOUNDS.len() + 1];
                        for worker in 0..board.workers() {
                            for (sum, word) in connect_us.iter_mut().zip(board.latency(worker, member.slot)) {
                                *sum += word.load(Relaxed);
                            }
                        }
                        let sum = |what| board.sum_backend(member.slot, what);
                        Some(BackendStats {
                            name: backend.name.clone(),
                            addr: backend.addr.to_string(),
                            state: member.standing.word(),
                            weight: backend.weight,
                            now: board.active_total(member.slot),
                            share: 0.0,
                            total: sum(B::Total),
                            bytes_in: sum(B::BytesIn),
                            bytes_out: sum(B::BytesOut),
                            connect_failed: sum(B::ConnectFailed),
                            connect_timeout: sum(B::ConnectTimeout),
                            connect_p50_us: quantile(&connect_us, 0.5),
                            connect_p99_us: quantile(&connect_us, 0.99),
                            connect_us_sum: sum(B::LatencySum),
                            connect_us,
                            check: member.health.last.clone().filter(|why| !why.is_empty()),
                        })
                    })
                    .collect();
                let now: u64 = backends.iter().map(|backend| backend.now).sum();
                for backend in &mut backends {
                    backend.share = if now > 0 { backend.now as f64 / now as f64 } else { 0.0 };
                }
                PoolStats { name: pool.name.clone(), backends }
            })
            .collect();
        let mut countries: Vec<CountryStats> = (0..COUNTRIES)
            .map(|place| {
                let sum = |which: usize| {
                    (0..board.workers()).map(|worker| board.country(worker, place)[which].load(Relaxed)).sum()
                };
                CountryStats { code: country_code(place), now: sum(0), total: sum(1) }
            })
            .filter(|country| country.total > 0)
            .collect();
        countries.sort_by_key(|country| std::cmp::Reverse((country.now, country.total)));
        let workers = (0..board.workers())
            .map(|number| WorkerStats {
                number,
                pid: state.pid(number),
                alive: state.is_alive(number),
                restarts: state.workers.get(number).map_or(0, |worker| worker.restarts),
                now: board.worker(number, W::Active).load(Relaxed),
                sockets: board.worker(number, W::Sockets).load(Relaxed),
                pipes: board.worker(number, W::Pipes).load(Relaxed),
            })
            .collect();
        let connections = listeners.iter().fold(Connections::default(), |sum, listener| Connections {
            now: sum.now + listener.now,
            total: sum.total + listener.total,
            rejected: sum.rejected + listener.rejected_client + listener.rejected_limit + listener.rejected_proxy,
            bytes_in: sum.bytes_in + listener.bytes_in,
            bytes_out: sum.bytes_out + listener.bytes_out,
        });
        Stats {
            uptime_seconds: controller.started.elapsed().as_secs_f64(),
            connections,
            listeners,
            pools,
            countries,
            workers,
            reloads: state.reloads.0,
            reloads_failed: state.reloads.1,
            conduits: (!state.config.conduits.is_empty()).then(|| state.conduits.clone()),
        }
    }

    /// The text exposition format of Prometheus.
    pub fn prometheus(&self) -> String {
        let mut text = Text(String::with_capacity(16 << 10));
        text.family("balancer_uptime_seconds", "gauge", "Seconds since the start");
        text.sample("balancer_uptime_seconds", &[], self.uptime_seconds);
        type ListenerFigure = (&'static str, &'static str, &'static str, fn(&ListenerStats) -> u64);
        let listeners: [ListenerFigure; 11] = [
            ("balancer_connections", "gauge", "Connections and UDP flows now", |l| l.now),
            ("balancer_connections_total", "counter", "Connections and UDP flows admitted", |l| l.total),
            ("balancer_no_backend_total", "counter", "Connections ended because no backend took them", |l| {
                l.no_backend
            }),
            ("balancer_received_bytes_total", "counter", "Bytes from clients", |l| l.bytes_in),
            ("balancer_sent_bytes_total", "counter", "Bytes to clients", |l| l.bytes_out),
            ("balancer_spliced_total", "counter", "Directions handed to the kernel as bulk", |l| l.spliced),
            ("balancer_datagrams_received_total", "counter", "Datagrams from clients", |l| l.datagrams_in),
            ("balancer_datagrams_sent_total", "counter", "Datagrams to clients", |l| l.datagrams_out),
            ("balancer_datagrams_dropped_total", "counter", "Datagrams the kernel did not take", |l| {
                l.datagrams_dropped
            }),
            ("balancer_ended_idle_total", "counter", "Connections ended by their idle limit", |l| l.ended_idle),
            ("balancer_ended_reset_total", "counter", "Connections ended by a reset", |l| l.ended_reset),
        ];
        for (name, kind, help, value) in listeners {
            text.family(name, kind, help);
            for listener in &self.listeners {
                text.sample(
                    name,
                    &[("listener", &listener.name), ("protocol", &listener.protocol)],
                    value(listener) as f64,
                );
            }
        }
        text.family("balancer_rejected_total", "counter", "Clients refused, by reason");
        for listener in &self.listeners {
            for (reason, value) in [
                ("client_limit", listener.rejected_client),
                ("limit", listener.rejected_limit),
                ("proxy_header", listener.rejected_proxy),
            ] {
                text.sample(
                    "balancer_rejected_total",
                    &[("listener", &listener.name), ("reason", reason)],
                    value as f64,
                );
            }
        }
        type BackendFigure = (&'static str, &'static str, &'static str, fn(&BackendStats) -> f64);
        let backends: [BackendFigure; 7] = [
            ("balancer_backend_up", "gauge", "1 while the backend takes new connections", |b| {
                f64::from(u8::from(["up", "starting"].contains(&b.state)))
            }),
            ("balancer_backend_connections", "gauge", "Connections and UDP flows now", |b| b.now as f64),
            ("balancer_backend_connections_total", "counter", "Connections and UDP flows", |b| b.total as f64),
            ("balancer_backend_received_bytes_total", "counter", "Bytes from clients to the backend", |b| {
                b.bytes_in as f64
            }),
            ("balancer_backend_sent_bytes_total", "counter", "Bytes from the backend to clients", |b| {
                b.bytes_out as f64
            }),
            ("balancer_backend_connect_failed_total", "counter", "Connects refused or failed", |b| {
                b.connect_failed as f64
            }),
            ("balancer_backend_connect_timeout_total", "counter", "Connects past their deadline", |b| {
                b.connect_timeout as f64
            }),
        ];
        for (name, kind, help, value) in backends {
            text.family(name, kind, help);
            for (pool, backend) in self.backends() {
                text.sample(name, &[("pool", pool), ("backend", &backend.name)], value(backend));
            }
        }
        let name = "balancer_backend_connect_seconds";
        text.family(name, "histogram", "Time to connect to the backend");
        for (pool, backend) in self.backends() {
            let mut seen = 0;
            for (place, count) in backend.connect_us.iter().enumerate() {
                seen += count;
                let bound =
                    LATENCY_BOUNDS.get(place).map_or("+Inf".to_owned(), |bound| format!("{}", *bound as f64 / 1e6));
                let labels = [("pool", pool), ("backend", backend.name.as_str()), ("le", bound.as_str())];
                text.sample(&format!("{name}_bucket"), &labels, seen as f64);
            }
            let labels = [("pool", pool), ("backend", backend.name.as_str())];
            text.sample(&format!("{name}_sum"), &labels, backend.connect_us_sum as f64 / 1e6);
            text.sample(&format!("{name}_count"), &labels, seen as f64);
        }
        text.family("balancer_clients_by_country", "gauge", "Connections and UDP flows now, by the client's country");
        for country in &self.countries {
            text.sample("balancer_clients_by_country", &[("country", &country.code)], country.now as f64);
        }
        text.family(
            "balancer_clients_by_country_total",
            "counter",
            "Connections and UDP flows, by the client's country",
        );
        for country in &self.countries {
            text.sample("balancer_clients_by_country_total", &[("country", &country.code)], country.total as f64);
        }
        text.family("balancer_worker_restarts_total", "counter", "Worker processes started again after they died");
        for worker in &self.workers {
            text.sample(
                "balancer_worker_restarts_total",
                &[("worker", &worker.number.to_string())],
                worker.restarts as f64,
            );
        }
        text.family("balancer_worker_sockets", "gauge", "Sockets held by a worker");
        for worker in &self.workers {
            text.sample("balancer_worker_sockets", &[("worker", &worker.number.to_string())], worker.sockets as f64);
        }
        text.family("balancer_reloads_total", "counter", "Configuration reloads, by result");
        text.sample("balancer_reloads_total", &[("result", "applied")], self.reloads as f64);
        text.sample("balancer_reloads_total", &[("result", "refused")], self.reloads_failed as f64);
        if let Some(conduits) = &self.conduits {
            text.conduits(conduits);
        }
        text.0
    }

    fn backends(&self) -> impl Iterator<Item = (&str, &BackendStats)> {
        self.pools.iter().flat_map(|pool| pool.backends.iter().map(|backend| (pool.name.as_str(), backend)))
    }
}

struct Text(String);

impl Text {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: f64) {
        self.0.push_str(name);
        for (number, (key, text)) in labels.iter().enumerate() {
            self.0.push(if number == 0 { '{' } else { ',' });
            let text = text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
            let _ = write!(self.0, "{key}=\"{text}\"");
        }
        if !labels.is_empty() {
            self.0.push('}');
        }
        let _ = writeln!(self.0, " {value}");
    }

    fn conduits(&mut self, summary: &Summary) {
        for (name, kind, help, value) in [
            ("balancer_conduits_read", "gauge", "Conduit instances whose figures could be read", summary.read as u64),
            (
                "balancer_conduits_failed",
                "gauge",
                "Conduit instances whose figures could not be read",
                summary.failed as u64,
            ),
            ("balancer_conduits_live", "gauge", "Conduit instances that the broker knows", summary.live as u64),
            ("balancer_conduits_connecting_clients", "gauge", "Clients connecting, all instances", summary.connecting),
            ("balancer_conduits_connected_clients", "gauge", "Clients connected, all instances", summary.connected),
            ("balancer_conduits_uploaded_bytes", "gauge", "Bytes up, all instances", summary.bytes_up),
            ("balancer_conduits_downloaded_bytes", "gauge", "Bytes down, all instances", summary.bytes_down),
        ] {
            self.family(name, kind, help);
            self.sample(name, &[], value as f64);
        }
        self.family("balancer_conduit_connected_clients", "gauge", "Clients connected, by instance");
        for instance in &summary.instances {
            if let Some(figures) = &instance.figures {
                self.sample(
                    "balancer_conduit_connected_clients",
                    &[("conduit", &instance.name)],
                    figures.connected as f64,
                );
            }
        }
        self.family("balancer_conduit_up", "gauge", "1 while the instance's figures can be read");
        for instance in &summary.instances {
            let up = f64::from(u8::from(instance.figures.is_some()));
            self.sample("balancer_conduit_up", &[("conduit", &instance.name)], up);
        }
        self.family("balancer_conduits_region_connected_clients", "gauge", "Clients connected, by region");
        for (code, region) in &summary.regions {
            self.sample("balancer_conduits_region_connected_clients", &[("region", code)], region.connected as f64);
        }
        self.family("balancer_conduits_region_bytes", "gauge", "Bytes up and down, by region");
        for (code, region) in &summary.regions {
            self.sample(
                "balancer_conduits_region_bytes",
                &[("region", code), ("direction", "up")],
                region.bytes_up as f64,
            );
            self.sample(
                "balancer_conduits_region_bytes",
                &[("region", code), ("direction", "down")],
                region.bytes_down as f64,
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_upper_bounds() {
        assert_eq!(quantile(&[0; 16], 0.5), None);
        let mut buckets = [0; 16];
        (buckets[0], buckets[3], buckets[15]) = (98, 1, 1);
        assert_eq!(
            (quantile(&buckets, 0.5), quantile(&buckets, 0.99), quantile(&buckets, 1.0)),
            (Some(50), Some(500), Some(10_000_000))
        );
    }

    #[test]
    fn label_values_are_escaped() {
        let mut text = Text(String::new());
        text.sample("x", &[("a", "q\"\\\n")], 1.5);
        assert_eq!(text.0, "x{a=\"q\\\"\\\\\\n\"} 1.5\n");
    }
}
