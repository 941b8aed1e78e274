//! Stopping in order: signals become a token, roles stop in stages, and a stage that hangs is cut off at its deadline.

use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// A token that is cancelled by the first SIGTERM, SIGINT or SIGHUP. A second one ends the process at once with status 130.
///
/// # Errors
/// When the signal handlers cannot be installed.
pub fn on_signals() -> std::io::Result<CancellationToken> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut hangup = signal(SignalKind::hangup())?;
    let token = CancellationToken::new();
    let cancel = token.clone();
    tokio::spawn(async move {
        let mut first = true;
        loop {
            let name = tokio::select! {
                _ = terminate.recv() => "SIGTERM",
                _ = interrupt.recv() => "SIGINT",
                _ = hangup.recv() => "SIGHUP",
            };
            if !first {
                tracing::warn!(signal = name, "second signal: leaving at once");
                std::process::exit(130);
            }
            first = false;
            tracing::info!(signal = name, "stopping");
            cancel.cancel();
        }
    });
    Ok(token)
}

/// How a stage ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// By itself, in time.
    Clean,
    /// Its deadline passed and it was aborted, or it panicked.
    Cut,
}

/// Running parts that are stopped one after the other: the first spawned stops first, so what takes work in goes before what
/// does the work.
pub struct Stages {
    stages: Vec<Stage>,
    ended: mpsc::UnboundedSender<&'static str>,
    endings: mpsc::UnboundedReceiver<&'static str>,
}

struct Stage {
    name: &'static str,
    token: CancellationToken,
    deadline: Duration,
    task: JoinHandle<()>,
}

/// Reports an ending also when the part panics or is aborted.
struct OnEnd(&'static str, mpsc::UnboundedSender<&'static str>);

impl Drop for OnEnd {
    fn drop(&mut self) {
        let _ = self.1.send(self.0);
    }
}

impl Default for Stages {
    fn default() -> Self {
        Self::new()
    }
}

impl Stages {
    /// No stages yet.
    pub fn new() -> Self {
        let (ended, endings) = mpsc::unbounded_channel();
        Stages { stages: Vec::new(), ended, endings }
    }

    /// Runs a part. It is asked to stop through the token it is given and aborted when it has not within `deadline`.
    pub fn spawn<F, Fut>(&mut self, name: &'static str, deadline: Duration, part: F)
    where
        F: FnOnce(CancellationToken) -> Fut,
        Fut: Future<Output = ()> + Send + 'static,
    {
        let token = CancellationToken::new();
        let future = part(token.clone());
        let guard = OnEnd(name, self.ended.clone());
        let task = tokio::spawn(async move {
            let _guard = guard;
            future.await;
        });
        self.stages.push(Stage { name, token, deadline, task });
    }

    /// The name of the next part that ends, which before a shutdown means that it failed. Pending while all run.
    pub async fn any_ended(&mut self) -> &'static str {
        match self.endings.recv().await {
            Some(name) => name,
            // Not reached: `self` holds a sender.
            None => std::future::pending().await,
        }
    }

    /// Stops every part in order and says how each ended.
    pub async fn stop(self) -> Vec<(&'static str, Ended)> {
        let mut report = Vec::with_capacity(self.stages.len());
        for Stage { name, token, deadline, mut task } in self.stages {
            token.cancel();
            let ended = match tokio::time::timeout(deadline, &mut task).await {
                Ok(Ok(())) => Ended::Clean,
                Ok(Err(error)) => {
                    tracing::error!(stage = name, %error, "ended by a panic");
                    Ended::Cut
                }
                Err(_) => {
                    tracing::warn!(stage = name, ?deadline, "did not stop in time and was cut off");
                    task.abort();
                    Ended::Cut
                }
            };
            tracing::info!(stage = name, ?ended, "stopped");
            report.push((name, ended));
        }
        report
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use parking_lot::Mutex;

    use super::*;

    #[tokio::test]
    async fn stages_stop_in_order_and_a_hanging_one_is_cut() {
        let order = Arc::new(Mutex::new(Vec::new()));
        let mut stages = Stages::new();
        for name in ["front", "middle", "back"] {
            let order = order.clone();
            stages.spawn(name, Duration::from_millis(50), |stop| async move {
                stop.cancelled().await;
                order.lock().push(name);
                if name == "middle" {
                    std::future::pending::<()>().await;
                }
            });
        }
        let report = stages.stop().await;
        assert_eq!(*order.lock(), ["front", "middle", "back"]);
        assert_eq!(report, [("front", Ended::Clean), ("middle", Ended::Cut), ("back", Ended::Clean)]);
    }

    #[tokio::test]
    async fn a_part_that_dies_is_noticed() {
        let mut stages = Stages::new();
        stages.spawn("lives", Duration::from_secs(1), |stop| async move { stop.cancelled().await });
        stages.spawn("dies", Duration::from_secs(1), |_| async {});
        assert_eq!(stages.any_ended().await, "dies");
        assert_eq!(stages.stop().await.len(), 2);
    }
}
