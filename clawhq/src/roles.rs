//! Wiring: which roles a command runs, with which settings, and in which order they stop.

use std::fs;
use std::future::Future;
use std::os::unix::fs::DirBuilderExt;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clawhq_app::App;
use clawhq_app::ca::Ca;
use clawhq_runtime::clock::Clock;
use clawhq_runtime::config::Secret;
use clawhq_runtime::metrics::Metrics;
use clawhq_runtime::shutdown::{self, Ended, Stages};
use clawhq_sealing::KeyRing;
use clawhq_store::{Store, StoreOptions};
use tokio_util::sync::CancellationToken;

use crate::catalogue;
use crate::config::Settings;

/// What a process may be asked to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Every role, with the node of this machine.
    All,
    Api,
    Worker,
    PoolManager,
    Edge,
    NodeAgent,
}

/// The name of the node that `up` makes of this machine.
pub const LOCAL_NODE: &str = "local";

/// The use cases over this installation's database, keys and authority.
///
/// # Errors
/// When the database does not answer, or the key ring or authority cannot be read or made.
pub async fn open(settings: &Settings) -> Result<App> {
    let store = connect(settings).await?;
    let ring = settings.key_ring();
    for dir in [ring.parent().unwrap_or(&settings.data), &settings.ca_dir()] {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .with_context(|| format!("creating {}", dir.display()))?;
    }
    let ring = KeyRing::open(&ring).context("the key ring")?;
    let ca = Ca::open(&settings.ca_dir()).context("the certificate authority")?;
    Ok(App::new(settings.app.clone(), store, ring, ca, Clock::system()))
}

async fn connect(settings: &Settings) -> Result<Store> {
    if settings.database.url.is_empty() {
        bail!("no database: set DATABASE_URL, or database.url in clawhq.toml");
    }
    let mut options = StoreOptions::new(settings.database.url.expose());
    options.max_connections = match settings.database.connections {
        0 => 4 * u32::try_from(std::thread::available_parallelism().map_or(2, usize::from)).unwrap_or(2).clamp(2, 16),
        set => set.max(2),
    };
    Store::connect(&options).await.context("the database does not answer")
}

/// Brings the schema and the shipped templates up to date. May be run again at any time.
///
/// # Errors
/// When the database does not answer or a migration fails.
pub async fn migrate(settings: &Settings, images: &catalogue::Images) -> Result<()> {
    let store = connect(settings).await?;
    store.migrate().await.context("migrating the database")?;
    store.close().await;
    publish(settings, images).await
}

/// Makes the catalogue what this build ships. Templates whose image is not there are shown as not deployable yet.
///
/// # Errors
/// When the database does not answer, or `images` names no template.
pub async fn publish(settings: &Settings, images: &catalogue::Images) -> Result<()> {
    let app = open(settings).await?;
    app.publish_templates(catalogue::shipped(images)?).await.context("publishing the templates")
}

/// Runs a role, or all of them, until a signal or until one of them ends by itself, which is an error.
///
/// # Errors
/// When a role cannot start or ends by itself.
pub async fn run(settings: Settings, role: Role) -> Result<()> {
    keep_memory_private();
    let signalled = shutdown::on_signals().context("installing signal handlers")?;
    let metrics = Metrics::new();
    let mut stages = Stages::new();
    let seconds = Duration::from_secs;
    let app = if role == Role::NodeAgent { None } else { Some(open(&settings).await?) };
    let wants = |this: Role| role == Role::All || role == this;

    if let Some(app) = app {
        // The order in which they stop: first what takes work in, last what does it.
        if wants(Role::Edge) {
            let (config, app, metrics) = (settings.edge.clone(), app.clone(), metrics.clone());
            part(&mut stages, "edge", seconds(10), |stop| async move {
                Ok(clawhq_edge::run(config, app, metrics, stop).await?)
            });
        }
        if wants(Role::Api) {
            let (config, app, metrics) = (settings.api.clone(), app.clone(), metrics.clone());
            part(&mut stages, "api", seconds(15), |stop| async move {
                clawhq_backend::run(config, app, metrics, stop).await
            });
        }
        if wants(Role::PoolManager) {
            let (config, app) = (settings.pool_manager.clone(), app.clone());
            part(&mut stages, "pool-manager", seconds(10), |stop| async move {
                clawhq_pool_manager::run(config, app, stop).await;
                Ok(())
            });
        }
        if wants(Role::Worker) {
            let drain = Duration::from_millis(settings.workers.drain_ms) + seconds(5);
            let (config, app) = (settings.workers.clone(), app.clone());
            part(&mut stages, "worker", drain, |stop| async move { Ok(clawhq_workers::run(config, app, stop).await?) });
        }
        if role == Role::All {
            let mut config = settings.node_agent.clone();
            // Ignored by a node agent whose certificate is good; saves one that was off for longer than its certificate lives.
            let (_, token) = app.join_token(LOCAL_NODE).await.context("making this machine's node")?;
            config.join_token = Some(Secret::new(token));
            node_agent(&mut stages, config, &metrics);
        }
    } else {
        node_agent(&mut stages, settings.node_agent.clone(), &metrics);
    }

    let ended = tokio::select! {
        () = signalled.cancelled() => None,
        name = stages.any_ended() => Some(name),
    };
    let report = stages.stop().await;
    if let Some(name) = ended {
        bail!("{name} ended by itself");
    }
    if let Some((name, _)) = report.iter().find(|(_, ended)| *ended == Ended::Cut) {
        bail!("{name} had to be cut off");
    }
    Ok(())
}

fn node_agent(stages: &mut Stages, config: clawhq_node_agent::Config, metrics: &Metrics) {
    let metrics = metrics.clone();
    part(stages, "node-agent", Duration::from_secs(15), |stop| async move {
        clawhq_node_agent::run_with_metrics(config, stop, metrics).await
    });
}

/// Runs one role as a stage; its error is logged here, its ending noticed by [`Stages::any_ended`].
fn part<F, Fut>(stages: &mut Stages, name: &'static str, deadline: Duration, run: F)
where
    F: FnOnce(CancellationToken) -> Fut,
    Fut: Future<Output = Result<()>> + Send + 'static,
{
    stages.spawn(name, deadline, |stop| {
        let future = run(stop);
        async move {
            if let Err(error) = future.await {
                tracing::error!(role = name, "{error:#}");
            }
        }
    });
}

/// Secrets pass through this memory: never into a core file, never to another process of the same user.
fn keep_memory_private() {
    let core = nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_CORE, 0, 0);
    let dump = nix::sys::prctl::set_dumpable(false);
    if core.is_err() || dump.is_err() {
        tracing::warn!("core files of this process could not be switched off");
    }
}
