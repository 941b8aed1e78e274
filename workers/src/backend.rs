//! The source apalis draws from: jobs already leased to this process, never more than it may run.

use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use apalis_core::backend::finalize::Ephemeral;
use apalis_core::backend::{Backend, BackendConfig};
use apalis_core::task::Task;
use apalis_core::task::task_id::RandomId;
use apalis_core::worker::context::WorkerContext;
use clawhq_app::App;
use clawhq_app::work::LeasedJob;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tower::layer::util::Identity;

use crate::Config;

/// A leased job and its place among those that may run.
pub struct Claimed {
    pub job: LeasedJob,
    pub permit: OwnedSemaphorePermit,
}

pub struct LeasedJobs {
    jobs: mpsc::Receiver<Claimed>,
}

/// Without a hint the table is looked at this often: a lost notification costs this much.
const POLL: Duration = Duration::from_millis(1_000);

impl LeasedJobs {
    /// The source and the task that fills it. A job is leased only when a place to run it is free, so that nothing
    /// waits in memory while its lease runs out.
    pub fn feed(config: Config, app: App, shutdown: CancellationToken) -> (Self, JoinHandle<()>) {
        let places = Arc::new(Semaphore::new(config.concurrency.max(1)));
        let (sender, jobs) = mpsc::channel(config.concurrency.max(1));
        let feeder = tokio::spawn(async move {
            while !shutdown.is_cancelled() {
                let Ok(first) = places.clone().acquire_owned().await else { return };
                let mut permits = vec![first];
                while let Ok(more) = places.clone().try_acquire_owned() {
                    permits.push(more);
                }
                let hinted = app.jobs_hint();
                let claimed = app.claim_jobs(permits.len() as u32, Duration::from_millis(config.lease_ms)).await;
                let wait = match &claimed {
                    Ok(jobs) if jobs.len() == permits.len() => Duration::ZERO,
                    _ => POLL,
                };
                match claimed {
                    Ok(jobs) => {
                        for (job, permit) in jobs.into_iter().zip(permits.drain(..)) {
                            if sender.send(Claimed { job, permit }).await.is_err() {
                                return;
                            }
                        }
                    }
                    Err(error) => tracing::warn!("jobs cannot be claimed: {error}"),
                }
                drop(permits);
                tokio::select! {
                    () = shutdown.cancelled() => return,
                    () = hinted.notified() => {}
                    () = tokio::time::sleep(wait) => {}
                }
            }
        });
        (Self { jobs }, feeder)
    }

    /// A source with nothing in it, for a worker that is asked to restart after its end.
    pub fn ended() -> Self {
        Self { jobs: mpsc::channel(1).1 }
    }
}

/// The source itself cannot fail: its feeder retries.
#[derive(Debug, thiserror::Error)]
pub enum Never {}

impl Backend for LeasedJobs {
    type Task = Task<Claimed>;
    type Error = Never;

    fn poll_ready(&mut self, _: &mut Context<'_>, _: &WorkerContext) -> Poll<Result<(), Never>> {
        Poll::Ready(Ok(()))
    }

    fn poll_next(&mut self, cx: &mut Context<'_>, _: &WorkerContext) -> Poll<Option<Result<Task<Claimed>, Never>>> {
        self.jobs.poll_recv(cx).map(|claimed| claimed.map(|claimed| Ok(Task::new(claimed))))
    }

    fn poll_close(&mut self, _: &mut Context<'_>, _: &WorkerContext) -> Poll<Result<(), Never>> {
        self.jobs.close();
        Poll::Ready(Ok(()))
    }
}

impl BackendConfig for LeasedJobs {
    type Args = Claimed;
    type Id = RandomId;
    type Kind = Ephemeral;
    type Config = ();
    type Layer = Identity;

    fn config(&self) -> &() {
        &()
    }

    fn middleware(&mut self, _: &mut WorkerContext) -> Identity {
        Identity::new()
    }
}
