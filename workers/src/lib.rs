//! Job workers: apalis runs them, our leased table feeds them.
//!
//! A job is a wake-up, never a fact: its handler reads the row it names and may run twice. apalis is the framework of
//! workers (layers, concurrency, draining); its own PostgreSQL storage is not used, because it loses, doubles or spins
//! jobs on panics, drains, retries and poison. Here a job is leased with a fencing token, the lease is renewed for as
//! long as the handler lives (also while draining), a failure's back-off is written to its row, and what fails too
//! often is set aside as dead with its last error.

mod backend;

use std::time::Duration;

use apalis::prelude::{Data, Monitor, WorkerBuilder};
use clawhq_app::App;
use clawhq_app::work::LeasedJob;
use clawhq_runtime::driver::{Pace, drive};
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use crate::backend::{Claimed, LeasedJobs};

#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Jobs run side by side in this process.
    pub concurrency: usize,
    /// How long a job stays this process's without a renewal, in milliseconds. A third of it is the renewal's pace.
    pub lease_ms: u64,
    /// How long a shutdown waits for handlers, in milliseconds; their leases are renewed meanwhile.
    pub drain_ms: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self { concurrency: 8, lease_ms: 30_000, drain_ms: 20_000 }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the workers ended")]
    Monitor(#[from] apalis::prelude::MonitorError),
}

/// Runs until `shutdown`, then finishes what it has begun.
pub async fn run(config: Config, app: App, shutdown: CancellationToken) -> Result<(), Error> {
    app.listen(shutdown.clone());
    let relay = tokio::spawn({
        let (app, shutdown) = (app.clone(), shutdown.clone());
        let pace = Pace { at_most_every: Duration::from_millis(5), ..Pace::every(Duration::from_millis(1_000)) };
        async move { drive("outbox relay", pace, app.outbox_hint(), shutdown, || app.relay_outbox()).await }
    });
    let sweep = tokio::spawn({
        let (app, shutdown) = (app.clone(), shutdown.clone());
        let hint = clawhq_runtime::driver::Hint::new();
        async move { drive("sweep", Pace::every(Duration::from_secs(15)), hint, shutdown, || app.sweep()).await }
    });
    let (jobs, feeder) = LeasedJobs::feed(config.clone(), app.clone(), shutdown.clone());
    // The monitor wants a factory for restarts; a worker of ours ends only at shutdown.
    let jobs = std::sync::Mutex::new(Some(jobs));
    let monitor = Monitor::new().shutdown_timeout(Duration::from_millis(config.drain_ms)).register(move |_| {
        let jobs = jobs.lock().ok().and_then(|mut jobs| jobs.take()).unwrap_or_else(LeasedJobs::ended);
        WorkerBuilder::new("clawhq").backend(jobs).data(app.clone()).data(config.clone()).build(handle)
    });
    let signal = shutdown.clone();
    let outcome = monitor
        .run_with_signal(async move {
            signal.cancelled().await;
            Ok(())
        })
        .await;
    for part in [feeder, relay, sweep] {
        if let Err(error) = part.await {
            tracing::error!("a part of the workers ended badly: {error}");
        }
    }
    Ok(outcome?)
}

/// One job: run it in a task of its own (a panic is a failure, not the worker's end), renew its lease, write the end.
async fn handle(claimed: Claimed, app: Data<App>, config: Data<Config>) {
    let Claimed { job, permit } = claimed;
    let app = (*app).clone();
    let mut running = tokio::spawn({
        let (app, job) = (app.clone(), job.clone());
        async move { app.run_job(&job).await }
    });
    let mut renewal = tokio::time::interval(Duration::from_millis((config.lease_ms / 3).max(1)));
    renewal.tick().await;
    let outcome = loop {
        tokio::select! {
            ended = &mut running => break ended,
            _ = renewal.tick() => match app.renew_job(&job, Duration::from_millis(config.lease_ms)).await {
                Ok(true) => {}
                Ok(false) => {
                    // Another worker has it by now; what we would write is refused by the token anyway.
                    running.abort();
                    tracing::warn!(job.id = %job.id, job.queue = %job.queue, "the lease was lost; the run is given up");
                    return;
                }
                Err(error) => tracing::warn!(job.id = %job.id, "the lease could not be renewed: {error}"),
            },
        }
    };
    let failure = match outcome {
        Ok(Ok(())) => None,
        Ok(Err(error)) => Some(chain(&error)),
        Err(error) if error.is_panic() => Some("the handler panicked".to_owned()),
        Err(_) => Some("the handler was cancelled".to_owned()),
    };
    settle(&app, &job, failure).await;
    drop(permit);
}

/// Writes how it ended. If the database is away the lease runs out and the job runs again, which it may.
async fn settle(app: &App, job: &LeasedJob, failure: Option<String>) {
    let written = match &failure {
        None => app.finish_job(job).await,
        Some(error) => {
            tracing::warn!(job.id = %job.id, job.queue = %job.queue, job.attempt = job.attempt, "job failed: {error}");
            app.fail_job(job, error).await
        }
    };
    if let Err(error) = written {
        tracing::warn!(job.id = %job.id, "the job's end could not be written: {error}");
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
