//! The driver of level-triggered loops: a turn at start, then at every hint and at least once an interval.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Wakes a loop. It carries no data: any number of hints before a turn are one turn, and a lost one costs an interval.
#[derive(Clone, Debug, Default)]
pub struct Hint(Arc<Notify>);

impl Hint {
    /// A hint nobody listens to yet; it is kept until the loop comes round.
    pub fn new() -> Self {
        Self::default()
    }

    /// Asks for a turn soon.
    pub fn wake(&self) {
        self.0.notify_one();
    }
}

/// The pace of a loop.
#[derive(Debug, Clone, Copy)]
pub struct Pace {
    /// The longest time between the starts of two turns while all is well.
    pub every: Duration,
    /// The shortest time between two turns, so that a storm of hints is not a busy loop.
    pub at_most_every: Duration,
    /// A turn that takes longer is dropped and counts as failed.
    pub deadline: Duration,
    /// After failures the pause doubles from `at_most_every` up to this.
    pub max_backoff: Duration,
}

impl Pace {
    /// A pace of one turn an `every`, at most 20 a second when hinted, with a 30 s deadline and backoff up to 30 s.
    pub fn every(every: Duration) -> Self {
        Pace {
            every,
            at_most_every: Duration::from_millis(50).min(every),
            deadline: Duration::from_secs(30),
            max_backoff: Duration::from_secs(30).max(every),
        }
    }
}

/// Runs `pass` until `shutdown`. A turn under way when the shutdown comes is finished (within its deadline), not cut.
///
/// An error or a missed deadline is logged and backed off from; the loop itself never ends.
pub async fn drive<F, Fut, E>(name: &'static str, pace: Pace, hint: Hint, shutdown: CancellationToken, mut pass: F)
where
    F: FnMut() -> Fut,
    Fut: Future<Output = Result<(), E>>,
    E: std::fmt::Display,
{
    let mut failures: u32 = 0;
    loop {
        // What was hinted until now is seen by this turn: it must not cause another.
        tokio::select! {
            biased;
            () = hint.0.notified() => {}
            () = std::future::ready(()) => {}
        }
        let started = Instant::now();
        match tokio::time::timeout(pace.deadline, pass()).await {
            Ok(Ok(())) => failures = 0,
            Ok(Err(error)) => {
                failures = failures.saturating_add(1);
                tracing::warn!(driver = name, failures, "turn failed: {error:#}");
            }
            Err(_) => {
                failures = failures.saturating_add(1);
                tracing::warn!(driver = name, failures, deadline = ?pace.deadline, "turn took too long and was dropped");
            }
        }
        // After a failure a hint must not shorten the pause, or an outage is met with a storm.
        let floor = backoff(pace, failures);
        let next = started + if failures == 0 { pace.every } else { floor.max(pace.at_most_every) };
        tokio::select! {
            biased;
            () = shutdown.cancelled() => return,
            () = tokio::time::sleep_until(started + floor) => {}
        }
        tokio::select! {
            biased;
            () = shutdown.cancelled() => return,
            () = hint.0.notified() => {}
            () = tokio::time::sleep_until(next) => {}
        }
    }
}

fn backoff(pace: Pace, failures: u32) -> Duration {
    let doubled = pace.at_most_every.saturating_mul(1 << failures.min(16));
    if failures == 0 { pace.at_most_every } else { doubled.min(pace.max_backoff) }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    fn pace() -> Pace {
        Pace {
            every: Duration::from_secs(60),
            at_most_every: Duration::from_millis(50),
            deadline: Duration::from_secs(5),
            max_backoff: Duration::from_secs(10),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn hints_are_merged_and_a_quiet_loop_still_turns() {
        let (hint, stop, turns) = (Hint::new(), CancellationToken::new(), Arc::new(AtomicU32::new(0)));
        let counter = turns.clone();
        let task = tokio::spawn(drive("t", pace(), hint.clone(), stop.clone(), move || {
            counter.fetch_add(1, Ordering::SeqCst);
            async { Ok::<_, String>(()) }
        }));
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(turns.load(Ordering::SeqCst), 1, "one turn at start");
        for _ in 0..100 {
            hint.wake();
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(turns.load(Ordering::SeqCst), 2, "a hundred hints are one turn");
        tokio::time::sleep(Duration::from_secs(61)).await;
        assert_eq!(turns.load(Ordering::SeqCst), 3, "an interval without a hint is a turn");
        stop.cancel();
        task.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn failures_back_off_and_a_hanging_turn_is_dropped() {
        let (hint, stop, turns) = (Hint::new(), CancellationToken::new(), Arc::new(AtomicU32::new(0)));
        let counter = turns.clone();
        let begin = Instant::now();
        let task = tokio::spawn(drive("t", pace(), hint.clone(), stop.clone(), move || {
            let turn = counter.fetch_add(1, Ordering::SeqCst);
            async move {
                if turn == 0 {
                    std::future::pending::<()>().await;
                }
                Err::<(), _>("down")
            }
        }));
        while turns.load(Ordering::SeqCst) < 2 {
            hint.wake();
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert!(begin.elapsed() >= Duration::from_secs(5), "the first turn ran to its deadline");
        let mark = Instant::now();
        while turns.load(Ordering::SeqCst) < 8 {
            hint.wake();
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        // 200 + 400 + 800 + 1600 + 3200 + 6400 ms, whatever the hints.
        assert!(mark.elapsed() >= Duration::from_millis(12_600), "{:?}", mark.elapsed());
        stop.cancel();
        task.await.unwrap();
    }
}
