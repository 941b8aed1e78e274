//! ClawHQ's one binary: every role is a subcommand.

mod admin;
mod catalogue;
mod config;
mod roles;
mod up;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use clawhq_runtime::telemetry;

use crate::config::Settings;
use crate::roles::Role;

/// Hosting for AI-agent containers.
#[derive(Parser)]
#[command(version, about, arg_required_else_help = true, disable_help_subcommand = true)]
struct Cli {
    /// The data directory.
    #[arg(long, global = true, env = "CLAWHQ_DATA", default_value = "data")]
    data: PathBuf,
    /// The configuration file [default: <data>/clawhq.toml when it exists].
    #[arg(long, global = true, env = "CLAWHQ_CONFIG")]
    config: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Start everything on this machine, with a first org, person and workload.
    Up {
        /// Milliseconds spent before this program, for the closing line.
        #[arg(long, hide = true, default_value_t = 0)]
        started_ms: u64,
        #[command(flatten)]
        images: catalogue::Images,
    },
    /// Every role in this process, until a signal; what `up` leaves running.
    #[command(hide = true)]
    ServeAll {
        /// In a session of its own, so that the terminal it came from may close.
        #[arg(long)]
        daemon: bool,
    },
    /// The public API, the console and the node stream.
    Api,
    /// Jobs and the outbox relay.
    Worker,
    /// The loops that keep the pool full and watch nodes.
    PoolManager,
    /// This host's daemon.
    NodeAgent,
    /// HTTP and WebSocket to workloads by host name.
    Edge,
    /// Bring the schema and the shipped templates up to date.
    Migrate,
    /// Make the catalogue what this build ships.
    Templates {
        #[command(flatten)]
        images: catalogue::Images,
    },
    /// For operators.
    #[command(subcommand)]
    Admin(admin::Admin),
    /// Write the OpenAPI document and the problem codes.
    Openapi {
        /// The directory they go to.
        #[arg(long, default_value = "openapi")]
        out: PathBuf,
    },
    /// Print the settings in force, secrets masked.
    Config,
    /// Print addresses and credentials of what `up` set up.
    Summary,
    /// Remove every container of this data directory, and the firewall's table. The roles must not run.
    #[command(hide = true)]
    Purge,
}

fn main() -> ExitCode {
    if let Err(error) = no_core_files() {
        eprintln!("  ! a crash may leave a core file with secrets in it: {error}");
    }
    clawhq_runtime::crypto::install();
    let cli = Cli::parse();
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("  ✗ {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Secrets pass through the memory of most roles, and a core file is a file. Children inherit it.
fn no_core_files() -> nix::Result<()> {
    nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_CORE, 0, 0)
}

fn run(cli: Cli) -> Result<()> {
    // The one place that reads the process's environment.
    let env: Vec<(String, String)> = std::env::vars().collect();
    let no_colour = env.iter().any(|(name, value)| name == "NO_COLOR" && !value.is_empty());
    let settings = Settings::load(&cli.data, cli.config.as_deref(), env)?;
    let serve = |settings: Settings, role: Role| {
        telemetry::init(&settings.telemetry)?;
        runtime()?.block_on(roles::run(settings, role))
    };
    match cli.command {
        Command::Up { started_ms, images } => {
            let options = up::Options { spent_ms: started_ms, no_colour, config_file: cli.config, images };
            runtime()?.block_on(up::up(settings, options))
        }
        Command::ServeAll { daemon } => {
            if daemon {
                nix::unistd::setsid().context("leaving the terminal")?;
            }
            let mut settings = settings;
            up::with_database(&mut settings)?;
            serve(settings, Role::All)
        }
        Command::Api => serve(settings, Role::Api),
        Command::Worker => serve(settings, Role::Worker),
        Command::PoolManager => serve(settings, Role::PoolManager),
        Command::NodeAgent => serve(settings, Role::NodeAgent),
        Command::Edge => serve(settings, Role::Edge),
        Command::Migrate => {
            let settings = with_database(settings)?;
            runtime()?.block_on(roles::migrate(&settings, &catalogue::Images::default()))
        }
        Command::Templates { images } => {
            let settings = with_database(settings)?;
            runtime()?.block_on(roles::publish(&settings, &images))
        }
        Command::Admin(command) => {
            let settings = with_database(settings)?;
            runtime()?.block_on(async { admin::run(&roles::open(&settings).await?, command).await })
        }
        Command::Openapi { out } => openapi(&out),
        Command::Config => {
            print!("{}", toml::to_string(&settings)?);
            Ok(())
        }
        Command::Summary => up::summary(&settings, no_colour),
        Command::Purge => up::purge(&settings),
    }
}

fn with_database(mut settings: Settings) -> Result<Settings> {
    up::with_database(&mut settings)?;
    Ok(settings)
}

fn openapi(out: &Path) -> Result<()> {
    std::fs::create_dir_all(out).with_context(|| format!("creating {}", out.display()))?;
    let write = |name: &str, text: &str| {
        let path = out.join(name);
        std::fs::write(&path, text).with_context(|| format!("writing {}", path.display()))
    };
    write("openapi.json", clawhq_backend::document())?;
    write("problems.json", &clawhq_backend::problems())
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .thread_name("clawhq")
        .build()
        .context("starting the runtime")
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_crash_leaves_no_core_file() {
        super::no_core_files().unwrap();
        let limits = std::fs::read_to_string("/proc/self/limits").unwrap();
        let core = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
        assert_eq!(core.split_whitespace().rev().take(3).collect::<Vec<_>>(), ["bytes", "0", "0"], "{core}");
    }
}
