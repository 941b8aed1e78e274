//! Whole-system tests: real control plane, real node agents, real Docker. What they share is here.
//!
//! [`Platform`] is a whole ClawHQ of one test's own: the `clawhq` program, a Docker daemon and a PostgreSQL, in a temporary
//! directory, on free ports. It is driven through the public API by [`Api`], and looked at from below by [`Census`].

#![forbid(unsafe_code)]

mod api;
mod census;
mod platform;
mod process;
mod stats;

pub use api::{Answer, Api, Sse};
pub use census::Census;
pub use platform::{Layout, Options, Platform, Role};
pub use process::{Process, Usage, free_ports, pids_mentioning, run, usage};
pub use stats::{Spread, spread};

use std::time::{Duration, Instant};

/// Looks until `look` finds something; panics with `what` after `within`.
pub async fn eventually<T>(what: &str, within: Duration, mut look: impl AsyncFnMut() -> Result<T, String>) -> T {
    let end = Instant::now() + within;
    let mut pause = Duration::from_millis(5);
    loop {
        match look().await {
            Ok(found) => return found,
            Err(why) if Instant::now() > end => panic!("not within {within:?}: {what}: {why}"),
            Err(_) => tokio::time::sleep(pause).await,
        }
        pause = (pause * 2).min(Duration::from_millis(200));
    }
}
