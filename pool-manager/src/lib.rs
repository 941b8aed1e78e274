//! The loops that keep the platform ahead of its users: the warm pool, the queue, node health.
//!
//! Each is observe → plan → execute → report, woken by a hint or a timer; `app` observes and executes, `domain`
//! plans. Any number of replicas may run: the claim of a row, not the loop, makes an effect happen once.

use std::time::Duration;

use clawhq_app::App;
use clawhq_runtime::driver::{Pace, drive};
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// The longest time between two looks at the pool, in milliseconds.
    pub pool_every_ms: u64,
    /// The longest time between two looks at the queue, in milliseconds.
    pub queue_every_ms: u64,
    /// The longest time between two looks at which nodes are silent, in milliseconds.
    pub nodes_every_ms: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self { pool_every_ms: 1_000, queue_every_ms: 1_000, nodes_every_ms: 5_000 }
    }
}

/// Runs until `shutdown`; a turn under way is finished.
pub async fn run(config: Config, app: App, shutdown: CancellationToken) {
    app.listen(shutdown.clone());
    let every = |ms: u64| Pace::every(Duration::from_millis(ms.max(1)));
    // A burst of claims empties the pool faster than one look a second; still, claims come first.
    let pool_pace = Pace { at_most_every: Duration::from_millis(100), ..every(config.pool_every_ms) };
    tokio::join!(
        drive("pool", pool_pace, app.pool_hint(), shutdown.clone(), || async {
            let report = app.pool_pass().await?;
            if report.ordered + report.retired > 0 {
                tracing::debug!(pool.ordered = report.ordered, pool.retired = report.retired, "pool pass");
            }
            Ok::<(), clawhq_app::Error>(())
        }),
        drive("queue", every(config.queue_every_ms), app.queue_hint(), shutdown.clone(), || app.place_queued()),
        drive("nodes", every(config.nodes_every_ms), app.nodes_hint(), shutdown, || app.nodes_pass()),
    );
}
