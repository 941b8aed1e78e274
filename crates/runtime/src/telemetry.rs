//! Logging: one structured line per event, on standard error, with panics among them.

use std::io::IsTerminal;

use serde::{Deserialize, Serialize};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::FmtSpan;

/// How log lines look.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LogFormat {
    /// Text at a terminal, JSON elsewhere.
    #[default]
    Auto,
    /// One JSON object a line.
    Json,
    /// For people.
    Text,
}

/// Telemetry settings.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TelemetryConfig {
    /// What is logged, in `tracing` filter syntax: `info,clawhq_app=debug`.
    pub log: String,
    /// How lines look.
    pub format: LogFormat,
}

impl Default for TelemetryConfig {
    fn default() -> Self {
        // sqlx logs slow statements at warn; hyper and h2 are of interest to nobody at info.
        TelemetryConfig { log: "info,h2=warn,hyper=warn,sqlx=warn".into(), format: LogFormat::Auto }
    }
}

/// Why telemetry could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The filter does not parse.
    #[error("telemetry.log {filter:?}: {reason}")]
    Filter {
        /// As configured.
        filter: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A subscriber is installed already.
    #[error("telemetry is set up already")]
    Twice,
}

/// Installs the process's subscriber and a panic hook that logs. Called once, by `main`.
///
/// # Errors
/// On a filter that does not parse, and when called twice.
pub fn init(config: &TelemetryConfig) -> Result<(), Error> {
    let filter = EnvFilter::try_new(&config.log)
        .map_err(|error| Error::Filter { filter: config.log.clone(), reason: error.to_string() })?;
    let terminal = std::io::stderr().is_terminal();
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_span_events(FmtSpan::NONE)
        .with_target(true);
    let json = match config.format {
        LogFormat::Json => true,
        LogFormat::Text => false,
        LogFormat::Auto => !terminal,
    };
    let installed = if json {
        builder.json().flatten_event(true).with_current_span(true).with_span_list(false).try_init()
    } else {
        builder.with_ansi(terminal).try_init()
    };
    installed.map_err(|_| Error::Twice)?;
    log_panics();
    Ok(())
}

/// Panics become log lines, with their place and a backtrace when `RUST_BACKTRACE` asks for one. The process lives on: each
/// task's supervisor decides.
fn log_panics() {
    std::panic::set_hook(Box::new(|info| {
        let payload = info.payload();
        let message = payload
            .downcast_ref::<&str>()
            .copied()
            .or_else(|| payload.downcast_ref::<String>().map(String::as_str))
            .unwrap_or("(no message)");
        let place = info.location().map(ToString::to_string).unwrap_or_default();
        let thread = std::thread::current().name().unwrap_or("(unnamed)").to_owned();
        let backtrace = std::backtrace::Backtrace::capture();
        if backtrace.status() == std::backtrace::BacktraceStatus::Captured {
            tracing::error!(place, thread, %backtrace, "panic: {message}");
        } else {
            tracing::error!(place, thread, "panic: {message}");
        }
    }));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bad_filter_is_named() {
        let config = TelemetryConfig { log: "clawhq=loud,,=".into(), ..TelemetryConfig::default() };
        let error = init(&config).unwrap_err().to_string();
        assert!(error.contains("loud"), "{error}");
    }
}
