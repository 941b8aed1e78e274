//! ClawHQ's one binary: every role is a subcommand.

mod config;
mod roles;
mod up;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};

use crate::config::Settings;

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
    },
    /// Print addresses and credentials of what `up` set up.
    Summary,
    /// Print the settings in force, secrets masked.
    Config,
    /// Bring the schema and the shipped templates up to date.
    Migrate,
}

fn main() -> ExitCode {
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

fn run(cli: Cli) -> Result<()> {
    // The one place that reads the process's environment.
    let env: Vec<(String, String)> = std::env::vars().collect();
    let no_colour = env.iter().any(|(name, value)| name == "NO_COLOR" && !value.is_empty());
    let settings = Settings::load(&cli.data, cli.config.as_deref(), env)?;
    match cli.command {
        Command::Up { started_ms } => {
            let options = up::Options { spent_ms: started_ms, no_colour, config_file: cli.config };
            runtime()?.block_on(up::up(settings, options))
        }
        Command::Summary => up::summary(&settings, no_colour),
        Command::Config => {
            print!("{}", toml::to_string(&settings)?);
            Ok(())
        }
        Command::Migrate => runtime()?.block_on(roles::migrate(&settings)),
    }
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .thread_name("clawhq")
        .build()
        .context("starting the runtime")
}
