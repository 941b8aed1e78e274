//! Command line of the balancer.

use anyhow::Context;
use clap::{Parser, Subcommand};
use clawhq_wire::budget::{self, Needs};
use conduit_balancer::config::{Config, MOST_WORKERS};
use conduit_balancer::control::{Controller, log};
use conduit_balancer::{admin, tune, worker};
use std::path::PathBuf;
use std::process::ExitCode;
use tokio::signal::unix::{SignalKind, signal};

#[derive(Parser)]
#[command(name = "conduit-balancer", version, about = "Layer-4 load balancer for TCP and UDP")]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve
    Run {
        #[arg(long, env = "BALANCER_CONFIG", default_value = "/etc/conduit-balancer/balancer.toml")]
        config: PathBuf,
    },
    /// Check a configuration file and say what is wrong with it
    Check {
        #[arg(long, env = "BALANCER_CONFIG", default_value = "/etc/conduit-balancer/balancer.toml")]
        config: PathBuf,
    },
    /// Ask a running service whether it is healthy (for container health checks)
    Health {
        #[arg(long, default_value = "127.0.0.1:9600")]
        admin: std::net::SocketAddr,
    },
    /// Kernel settings for very many connections
    Tune(tune::Args),
    /// A worker process (started by `run`)
    #[command(hide = true)]
    Worker {
        #[arg(long)]
        number: usize,
        #[arg(long)]
        board: i32,
    },
}

fn main() -> ExitCode {
    let outcome = match Args::parse().command {
        Command::Worker { number, board } => worker::run(number, board).context("worker"),
        Command::Tune(args) => tune::run(&args),
        Command::Check { config } => Config::load(&config).map_err(Into::into).map(|checked| {
            println!(
                "{}: {} listeners, {} pools, no problem found",
                config.display(),
                checked.listeners.len(),
                checked.pools.len()
            );
        }),
        Command::Health { admin } => health(admin),
        Command::Run { config } => {
            // One thread: what is heavy runs in the workers.
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.context("runtime").and_then(|runtime| runtime.block_on(run(config)))
        }
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn health(admin: std::net::SocketAddr) -> anyhow::Result<()> {
    use std::io::{Read, Write};
    let limit = std::time::Duration::from_secs(3);
    let mut stream = std::net::TcpStream::connect_timeout(&admin, limit)?;
    stream.set_read_timeout(Some(limit))?;
    stream.write_all(b"GET /healthz HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    stream.take(4096).read_to_string(&mut answer)?;
    anyhow::ensure!(
        answer.starts_with("HTTP/1.0 200"),
        "not healthy: {}",
        answer.lines().next().unwrap_or("no answer")
    );
    Ok(())
}

async fn run(file: PathBuf) -> anyhow::Result<()> {
    let config = Config::load(&file)?;
    let descriptors = budget::raise_limit();
    let workers = workers(&config, descriptors)?;
    let (admin, drain) = (config.admin.clone(), config.drain.0);
    // Asked for before workers start, so that no signal is lost.
    let (mut term, mut int, mut hup) =
        (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?, signal(SignalKind::hangup())?);
    let listener = match &admin {
        Some(admin) => {
            let bound = tokio::net::TcpListener::bind(admin.listen).await;
            Some(bound.with_context(|| format!("{}: admin.listen {} cannot be bound", file.display(), admin.listen))?)
        }
        None => None,
    };
    let controller = Controller::start(config, workers, Some(file)).await?;
    if let (Some(listener), Some(admin)) = (listener, admin) {
        log(&format!("admin on http://{}", listener.local_addr()?));
        let router = admin::router(controller.clone(), admin.token);
        tokio::spawn(async move { axum::serve(listener, router).await });
    }
    for entry in &controller.lock().table.entries {
        log(&format!("{} on {} {:?}", entry.listener.name, entry.listener.listen, entry.listener.protocol));
    }
    log(&format!("{workers} workers, {descriptors} descriptors each: ready"));
    loop {
        tokio::select! {
            _ = term.recv() => break,
            _ = int.recv() => break,
            _ = hup.recv() => match controller.reload().await {
                Ok(()) => log("configuration reloaded"),
                Err(error) => log(&format!("configuration refused, the old one stays:\n{error:#}")),
            },
        }
    }
    log("draining");
    tokio::select! {
        () = controller.stop(drain) => {}
        // Asked twice: now.
        _ = term.recv() => controller.stop(std::time::Duration::ZERO).await,
        _ = int.recv() => controller.stop(std::time::Duration::ZERO).await,
    }
    Ok(())
}

/// As many workers as the descriptor limit asks for, and at least one for each core.
fn workers(config: &Config, descriptors: u64) -> anyhow::Result<usize> {
    let reserve = worker::reserve(descriptors);
    // The kernel's hash does not spread clients evenly: room for a tenth more than the mean.
    let connections = u64::from(config.connections) * 11 / 10;
    let needs = Needs { connections, per_connection: 2, reserve };
    let given = (config.workers > 0).then_some(config.workers as u64);
    let plan = budget::plan(needs, descriptors, given).context("service.connections")?;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let workers = given.unwrap_or(plan.processes.max(cores as u64)) as usize;
    anyhow::ensure!(
        workers <= MOST_WORKERS,
        "service.connections = {} needs {workers} worker processes at {descriptors} descriptors each, more than {MOST_WORKERS}; \
         raise the descriptor limit (LimitNOFILE=, --ulimit nofile) or lower service.connections",
        config.connections
    );
    Ok(workers)
}
