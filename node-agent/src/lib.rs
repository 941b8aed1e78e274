//! The host daemon. It dials the control plane, keeps what it was told in a ledger, makes containers be so, and reports
//! what it sees. Every decision is [`clawhq_domain::host::plan`]; everything here observes, executes or carries bytes.
//!
//! ```text
//!   control plane ◀─link─▶ ┌───────┐ ◀─inits─▶ PID 1 of every container      docker, network, volumes, cgroup, netns:
//!   edge ─▶ ingress ─────▶ │ agent │ ─make──▶ create, start, cable, remove    what the host can do
//!   logs, exec ◀ channels  └───────┘ ─ledger▶ slots, reports, lease
//! ```
//!
//! A claim touches neither Docker nor another program: ledger, firewall element, frame, probe.

mod agent;
mod cgroup;
mod channels;
mod config;
mod docker;
mod ingress;
mod inits;
mod ledger;
mod link;
mod make;
mod metrics;
mod netns;
mod network;
mod probe;
mod runtime;
mod volumes;
mod want;

use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;

use anyhow::Context;
use clawhq_proto::v1;
use clawhq_runtime::metrics::Metrics;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

pub use config::{Config, Limits, Network};
pub use runtime::LABEL_DATA;

use crate::agent::{Agent, Event, Tools};
use crate::channels::Channels;
use crate::docker::DockerRuntime;
use crate::inits::Tickets;
use crate::ledger::{Ledger, Spool};
use crate::network::Piece;
use crate::runtime::ContainerRuntime;

/// Runs until `shutdown`. Containers go on running; a later run adopts them.
///
/// Errors: the data directory, the `init` binary or the sockets cannot be set up, or another node agent holds the same
/// data directory. A Docker or control plane that does not answer is no error: it is waited for.
pub async fn run(config: Config, shutdown: CancellationToken) -> anyhow::Result<()> {
    run_with_metrics(config, shutdown, Metrics::new()).await
}

/// [`run`], with its counters registered in `metrics`.
pub async fn run_with_metrics(mut config: Config, shutdown: CancellationToken, metrics: Metrics) -> anyhow::Result<()> {
    // Docker resolves mounts by itself: they must be absolute.
    std::fs::create_dir_all(&config.data_dir).with_context(|| format!("{}", config.data_dir.display()))?;
    config.data_dir = config.data_dir.canonicalize()?;
    let node_dir = config.node_dir();
    prepare(&config)?;
    let ledger = Ledger::open(&ledger_dir(&config))?;
    let spool = Spool::open(ledger_dir(&config).join("reports"))?;
    let records = ledger.load()?;

    let counters = metrics::Counters::register(&metrics);
    let workers = netns::Workers::start()?;
    let taken: BTreeSet<Piece> = records.iter().filter_map(|(_, record)| record.piece.map(Piece)).collect();
    let live = records
        .iter()
        .filter(|(_, record)| !record.assigned.is_empty())
        .filter_map(|(_, record)| record.piece.map(Piece))
        .collect();
    let volumes = volumes::Volumes::new(config.volumes_dir())?;
    let used = records.iter().filter_map(|(_, record)| record.volume.parse().ok()).collect();
    if let Err(error) = volumes.sweep(&used).await {
        tracing::warn!(%error, "left-over mounts could not be swept");
    }

    let (events, event_queue) = mpsc::channel::<Event>(4096);
    let (inits, init_queue) = mpsc::channel(1024);
    let data = ledger.installation.clone();
    let runtime: Arc<dyn ContainerRuntime> = Arc::new(DockerRuntime::new(&config.docker_host, data.clone())?);
    let tools = Arc::new(Tools {
        network: network::Network::new(config.network.clone(), workers.clone(), taken, live)?,
        runtime,
        volumes,
        workers: workers.clone(),
        hierarchies: cgroup::Hierarchies::of_host()?,
        events,
        counters: counters.clone(),
        relist: tokio::sync::Notify::new(),
        data,
        config,
    });
    let config = &tools.config;

    if let Err(error) = tools.network.load().await {
        tracing::error!("the firewall cannot be loaded yet: {error:#}");
    }

    let tickets = Tickets::default();
    let routes = ingress::Routes::default();
    let channels = Channels::new(config.limits.channels, counters.clone());
    // Everything that is started here ends with this, also when the start of a later part fails.
    let stop = shutdown.child_token();
    let _ends = stop.clone().drop_guard();
    inits::serve(config.init_dir().join("agent.sock"), inits, tickets.clone(), stop.clone())?;
    ingress::serve(
        config.ingress_socket(),
        routes.clone(),
        workers,
        counters,
        config.limits.ingress_connections,
        stop.clone(),
    )?;

    let facts = facts(config, &tools);
    let identity_path = node_dir.join("identity.json");
    let node = link::Identity::load(&identity_path).and_then(|identity| identity.node_id());
    let agent =
        Agent::new(tools.clone(), tickets, channels.clone(), routes, ledger, spool, records, facts.clone(), node);
    tokio::spawn(agent::watch_runtime(tools.clone(), stop.clone()));
    tokio::spawn(agent::watch_network(tools.clone(), stop.clone()));
    tokio::spawn(preload(tools.clone(), stop.clone()));
    let link = link::Link { tools, channels, facts, identity_path, stop: stop.clone() };
    tokio::spawn(link.run());
    agent.run(event_queue, init_queue, stop).await;
    Ok(())
}

/// What this agent's containers carry as their [`LABEL_DATA`]; none were made where there is none.
///
/// Errors: the ledger cannot be read.
pub fn installation(config: &Config) -> std::io::Result<Option<String>> {
    ledger::installation(&ledger_dir(config))
}

fn ledger_dir(config: &Config) -> std::path::PathBuf {
    config.node_dir().join("ledger")
}

/// Directories, the `init` the containers mount, and their resolv.conf.
fn prepare(config: &Config) -> anyhow::Result<()> {
    let (node_dir, init_dir) = (config.node_dir(), config.init_dir());
    std::fs::create_dir_all(&init_dir).with_context(|| format!("{}", init_dir.display()))?;
    // Containers run as many users; what is secret lies in files of 0600.
    for dir in [&node_dir, &init_dir] {
        std::fs::set_permissions(dir, PermissionsExt::from_mode(0o755))?;
    }
    let binary = std::fs::read(&config.init_binary)
        .with_context(|| format!("the init binary {}", config.init_binary.display()))?;
    let installed = init_dir.join("init");
    if std::fs::read(&installed).ok().as_ref() != Some(&binary) {
        place(&installed, &binary, 0o755)?;
    }
    let mut resolv = String::new();
    for resolver in &config.network.dns {
        resolv.push_str(&format!("nameserver {resolver}\n"));
    }
    resolv.push_str("options timeout:2 attempts:2\n");
    // In place where it is the same: containers hold the file itself.
    let path = node_dir.join("resolv.conf");
    if std::fs::read_to_string(&path).ok().as_ref() != Some(&resolv) {
        place(&path, resolv.as_bytes(), 0o644)?;
    }
    Ok(())
}

fn place(path: &Path, bytes: &[u8], mode: u32) -> anyhow::Result<()> {
    let draft = path.with_extension("draft");
    std::fs::write(&draft, bytes)?;
    std::fs::set_permissions(&draft, PermissionsExt::from_mode(mode))?;
    std::fs::rename(&draft, path)?;
    Ok(())
}

fn facts(config: &Config, tools: &Tools) -> v1::NodeFacts {
    let memory_mib = match config.memory_mib {
        0 => {
            let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
            let total = text.lines().find_map(|line| line.strip_prefix("MemTotal:"));
            let kib: u64 = total.and_then(|rest| rest.split_whitespace().next()?.parse().ok()).unwrap_or(0);
            kib / 1024 * 7 / 8
        }
        configured => configured,
    };
    let hostname = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default().trim().to_owned();
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    v1::NodeFacts {
        hostname,
        cpu_millis: u32::try_from(processors).unwrap_or(u32::MAX).saturating_mul(1_000),
        memory_mib,
        disk_free_mib: tools.volumes.free_mib(),
        agent_version: env!("CARGO_PKG_VERSION").to_owned(),
        runtime_version: String::new(),
        ingress: format!("unix:{}", config.ingress_socket().display()),
        firewall_ready: false,
    }
}

/// Fetches the configured images, and learns the runtime's version on the way.
async fn preload(tools: Arc<Tools>, stop: CancellationToken) {
    let work = async {
        let mut wait = std::time::Duration::from_millis(200);
        loop {
            match tools.runtime.version().await {
                Ok(version) => {
                    let _ = tools.events.send(Event::RuntimeVersion(version)).await;
                    break;
                }
                Err(error) => tracing::debug!(%error, "the runtime's version is not known yet"),
            }
            tokio::time::sleep(wait).await;
            wait = (wait * 2).min(std::time::Duration::from_secs(10));
        }
        let deadline = std::time::Duration::from_secs(tools.config.limits.pull_deadline_s);
        for image in &tools.config.preload_images {
            match tools.runtime.image(image, "", deadline).await {
                Ok(found) => tracing::info!(image, digest = found.digest, "image is here"),
                Err(error) => tracing::warn!(image, %error, "an image could not be preloaded"),
            }
        }
    };
    tokio::select! {
        () = work => {}
        () = stop.cancelled() => {}
    }
}
