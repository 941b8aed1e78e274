//! What workers ask: jobs to run, wake-ups to relay, things to sweep.

use std::time::Duration;

use clawhq_domain::backoff;
use clawhq_runtime::ids::mint;
use clawhq_store::{Failed, NewJob, Wakeup, WorkloadWakeup, channel};

pub use clawhq_store::LeasedJob;

use crate::{App, Error, Result};

/// Wake-ups turned into jobs at once.
const RELAY_BATCH: u32 = 200;
/// A failed job's first wait and its longest, in milliseconds.
const RETRY_FIRST_MS: i64 = 1_000;
const RETRY_MOST_MS: i64 = 300_000;
/// Finished jobs and relayed wake-ups are kept this long, for a person to look at.
const KEEP_MS: i64 = 24 * 3600 * 1000;

impl App {
    /// Leases up to `limit` due jobs.
    pub async fn claim_jobs(&self, limit: u32, lease: Duration) -> Result<Vec<LeasedJob>> {
        let jobs = self.store().system(&self.system()).jobs().claim(Wakeup::WORKLOAD, limit, millis(lease)).await?;
        Ok(jobs)
    }

    /// `false`: the lease was lost.
    pub async fn renew_job(&self, job: &LeasedJob, lease: Duration) -> Result<bool> {
        Ok(self.store().system(&self.system()).jobs().renew(job, millis(lease)).await?)
    }

    /// Runs a job: it says what to look at, the rows say what is true.
    pub async fn run_job(&self, job: &LeasedJob) -> Result<()> {
        match job.queue.as_str() {
            Wakeup::WORKLOAD => {
                let wakeup = WorkloadWakeup::parse(&job.payload).ok_or(Error::NotFound("workload in the job"))?;
                if let Some(at) = self.converge(wakeup.org, wakeup.workload).await? {
                    self.look_again(wakeup, at - self.now()).await?;
                }
                Ok(())
            }
            _ => Err(Error::NotFound("handler for the queue")),
        }
    }

    /// A job for later; one that waits already is enough.
    async fn look_again(&self, wakeup: WorkloadWakeup, in_ms: i64) -> Result<()> {
        let told = Wakeup::workload(wakeup.org, wakeup.workload);
        let job = NewJob {
            id: mint(),
            queue: told.topic.to_owned(),
            // Apart from the immediate wake-ups' key: a look in ten minutes must not swallow one that is due now.
            key: format!("{}:later", told.key),
            payload: told.payload,
            delay_ms: in_ms.max(250),
            max_attempts: 20,
        };
        self.store().system(&self.system()).jobs().enqueue(&job).await?;
        Ok(())
    }

    pub async fn finish_job(&self, job: &LeasedJob) -> Result<()> {
        self.store().system(&self.system()).jobs().finish(job).await?;
        Ok(())
    }

    /// Back-off by attempt, written to the row; after the last attempt the job is dead and says why.
    pub async fn fail_job(&self, job: &LeasedJob, error: &str) -> Result<()> {
        let wait = backoff::next(job.attempt, RETRY_FIRST_MS, RETRY_MOST_MS, job.id.as_u128() as u64);
        let failed = self.store().system(&self.system()).jobs().fail(job, error, wait, false).await?;
        if failed == Failed::Dead {
            tracing::error!(job.id = %job.id, job.queue = %job.queue, job.key = %job.key, "a job is dead: {error}");
        }
        Ok(())
    }

    /// Turns committed wake-ups into jobs.
    pub async fn relay_outbox(&self) -> Result<()> {
        let system = self.store().system(&self.system());
        loop {
            let relayed = system.outbox().relay(RELAY_BATCH).await?;
            if relayed > 0 {
                self.0.hints.jobs.notify_waiters();
                self.0.hints.jobs.notify_one();
            }
            if relayed < RELAY_BATCH {
                return Ok(());
            }
        }
    }

    /// Tells this process, and the others beside the request, that an outbox row waits.
    pub(crate) fn hint_outbox(&self) {
        self.0.hints.outbox.wake();
        self.say(channel::JOBS, String::new());
    }

    /// What crashes left, and what is old.
    pub async fn sweep(&self) -> Result<()> {
        let system = self.store().system(&self.system());
        // First: what somebody waits for does not depend on whether old rows can be deleted.
        self.wake_unsettled().await?;
        let swept = system.jobs().sweep(KEEP_MS).await?;
        if swept.returned + swept.died > 0 {
            tracing::warn!(jobs.returned = swept.returned, jobs.died = swept.died, "leases of lost workers ran out");
        }
        self.store().accounts().sweep_sessions().await?;
        for node in system.nodes().reservation_drift().await? {
            tracing::error!(node.id = %node, "the node's reservation disagrees with its slots: a bug");
        }
        Ok(())
    }
}

fn millis(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}
