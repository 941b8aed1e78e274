//! What every role needs to run, and nothing that decides: telemetry, configuration, shutdown, the clock, id minting and
//! the driver of level-triggered loops.
//!
//! The clock and the random source live here so that `clawhq-domain` can stay pure: shells read the time and mint ids,
//! then hand both to a decision.

pub mod clock;
pub mod config;
pub mod crypto;
pub mod driver;
pub mod ids;
pub mod metrics;
pub mod shutdown;
pub mod telemetry;
