//! What other processes say and are told: commits, as hints for waiters, streams and loops. A lost one costs latency.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use clawhq_store::{Notice, StoreError, channel};
use futures::StreamExt as _;
use tokio_util::sync::CancellationToken;

use crate::App;

/// What is said of the pool when a slot was claimed.
const CLAIMED: &str = "claimed";
/// From a claim to the order of its replacement: claims that come together are through by then, or hold up what is made.
const REFILL_AFTER: Duration = Duration::from_millis(100);

/// First and longest pause before a notice is said again that could not be said.
const SAY_AGAIN: (Duration, Duration) = (Duration::from_millis(10), Duration::from_secs(1));
/// A connection that nothing comes back on must not silence the process.
const SAY_WITHIN: Duration = Duration::from_secs(5);
/// Notices kept while the database is away. What is beyond is found by the sweeps.
const SAYING_MAX: usize = 10_000;

#[derive(Default)]
pub(crate) struct Listening {
    /// This process listens already: the roles share one connection for it.
    begun: AtomicBool,
    /// A look at the pool is on its way.
    refilling: AtomicBool,
}

/// What is to be said. While one statement is on its way, whatever comes up waits for the next: a burst of changes costs a
/// few statements, not one each.
#[derive(Default)]
pub(crate) struct Saying {
    waiting: BTreeSet<(&'static str, String)>,
    under_way: bool,
}

impl App {
    /// Tells every process, this one included, soon.
    pub(crate) fn say(&self, channel: &'static str, payload: String) {
        let mut saying = self.0.saying.lock();
        if saying.waiting.len() < SAYING_MAX {
            saying.waiting.insert((channel, payload));
        }
        if std::mem::replace(&mut saying.under_way, true) {
            return;
        }
        drop(saying);
        let app = self.clone();
        tokio::spawn(async move {
            let mut pause = SAY_AGAIN.0;
            while let Some(said) = app.to_say() {
                let told = tokio::time::timeout(SAY_WITHIN, app.store().notify(&said)).await;
                match told.unwrap_or(Err(StoreError::Retryable)) {
                    Ok(()) => pause = SAY_AGAIN.0,
                    // Said again: who listens may have connected anew, and looked, before what this is about.
                    Err(error) => {
                        tracing::debug!("other processes were not told: {error}");
                        if app.store().is_closed() {
                            return;
                        }
                        app.unsaid(said);
                        tokio::time::sleep(pause).await;
                        pause = (pause * 2).min(SAY_AGAIN.1);
                    }
                }
            }
        });
    }

    fn unsaid(&self, said: Vec<(&'static str, String)>) {
        let mut saying = self.0.saying.lock();
        let room = SAYING_MAX.saturating_sub(saying.waiting.len());
        saying.waiting.extend(said.into_iter().take(room));
    }

    fn to_say(&self) -> Option<Vec<(&'static str, String)>> {
        let mut saying = self.0.saying.lock();
        saying.under_way = !saying.waiting.is_empty();
        saying.under_way.then(|| std::mem::take(&mut saying.waiting).into_iter().collect())
    }

    /// Begins to listen, once in a process; every role that needs hints may call it.
    pub fn listen(&self, shutdown: CancellationToken) {
        if self.0.listening.begun.swap(true, Ordering::AcqRel) {
            return;
        }
        let app = self.clone();
        tokio::spawn(async move {
            tokio::select! {
                () = shutdown.cancelled() => {}
                () = app.hear() => {}
            }
        });
    }

    async fn hear(&self) {
        let channels = [channel::NODE, channel::INSTANCE, channel::JOBS, channel::POOL];
        let notices = loop {
            match self.store().listen(&channels).await {
                Ok(notices) => break notices,
                Err(error) => {
                    tracing::warn!("cannot listen for notices yet: {error}");
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
            }
        };
        let mut notices = std::pin::pin!(notices);
        while let Some(notice) = notices.next().await {
            match notice {
                Notice::Said { channel, payload } => self.heard(&channel, &payload),
                Notice::Missed => {
                    self.waiters().wake_all();
                    self.hub().everything_changed();
                    self.0.hints.jobs.notify_one();
                    self.0.hints.outbox.wake();
                    self.0.hints.pool.wake();
                    self.0.hints.queue.wake();
                }
            }
        }
    }

    fn heard(&self, channel: &str, payload: &str) {
        let mut words = payload.split(' ');
        let mut word = || words.next().unwrap_or_default();
        match channel {
            channel::NODE => {
                if let (Ok(node), Ok(slot)) = (word().parse(), word().parse()) {
                    self.hub().slot_changed(node, slot);
                }
            }
            channel::INSTANCE => {
                if let (Ok(org), Ok(workload)) = (word().parse(), word().parse()) {
                    self.waiters().wake(org, Some(workload));
                }
            }
            channel::JOBS => {
                self.0.hints.outbox.wake();
                self.0.hints.jobs.notify_one();
            }
            channel::POOL if payload == CLAIMED => self.refill_soon(),
            channel::POOL => {
                self.0.hints.pool.wake();
                self.0.hints.queue.wake();
            }
            _ => {}
        }
    }

    /// A warm slot was claimed: it is replaced, but not in the middle of what else is claimed with it.
    pub(crate) fn hint_claimed(&self) {
        self.refill_soon();
        self.say(channel::POOL, CLAIMED.to_owned());
    }

    fn refill_soon(&self) {
        if self.0.listening.refilling.swap(true, Ordering::AcqRel) {
            return;
        }
        let app = self.clone();
        tokio::spawn(async move {
            tokio::time::sleep(REFILL_AFTER).await;
            app.0.listening.refilling.store(false, Ordering::Release);
            app.0.hints.pool.wake();
        });
    }

    /// Something about the pool or the room on nodes has changed: the loops look again, in whichever process they run.
    pub(crate) fn hint_pool(&self) {
        self.0.hints.pool.wake();
        self.0.hints.queue.wake();
        self.say(channel::POOL, String::new());
    }
}
