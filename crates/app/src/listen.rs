//! What other processes say: their commits, as hints for our waiters, streams and loops. A lost one costs latency.

use std::sync::atomic::{AtomicBool, Ordering};

use clawhq_store::{Notice, channel};
use futures::StreamExt as _;
use tokio_util::sync::CancellationToken;

use crate::App;

/// Whether this process listens already: the roles share one connection for it.
#[derive(Default)]
pub(crate) struct Listening(AtomicBool);

impl App {
    /// Begins to listen, once in a process; every role that needs hints may call it.
    pub fn listen(&self, shutdown: CancellationToken) {
        if self.0.listening.0.swap(true, Ordering::AcqRel) {
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
                    tokio::time::sleep(std::time::Duration::from_secs(1)).await;
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
            channel::POOL => {
                self.0.hints.pool.wake();
                self.0.hints.queue.wake();
            }
            _ => {}
        }
    }

    /// Something about the pool or the room on nodes has changed: the loops look again, in whichever process they run.
    pub(crate) fn hint_pool(&self) {
        self.0.hints.pool.wake();
        self.0.hints.queue.wake();
        let app = self.clone();
        tokio::spawn(async move { app.store().notify(channel::POOL, "").await });
    }
}
