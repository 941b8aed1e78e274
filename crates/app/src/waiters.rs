//! Requests that wait for something to happen to a workload, woken by whoever commits the change.
//!
//! A wake-up carries no data: the waiter reads the row again. Other replicas wake theirs by NOTIFY.

use std::collections::BTreeMap;
use std::sync::Arc;

use clawhq_domain::ids::{OrgId, WorkloadId};
use parking_lot::Mutex;
use tokio::sync::watch;

#[derive(Default)]
struct Channels {
    workloads: BTreeMap<WorkloadId, watch::Sender<u64>>,
    orgs: BTreeMap<OrgId, watch::Sender<u64>>,
}

/// Level-triggered: a change between the look and the wait is not missed, because the receiver remembers.
#[derive(Clone, Default)]
pub struct Waiters(Arc<Mutex<Channels>>);

impl Waiters {
    /// Take this before reading the row, then read, then wait for `changed()`.
    pub fn workload(&self, id: WorkloadId) -> watch::Receiver<u64> {
        let mut channels = self.0.lock();
        sweep(&mut channels.workloads);
        channels.workloads.entry(id).or_insert_with(|| watch::channel(0).0).subscribe()
    }

    /// The same for an org's event feed.
    pub fn org(&self, id: OrgId) -> watch::Receiver<u64> {
        let mut channels = self.0.lock();
        sweep(&mut channels.orgs);
        channels.orgs.entry(id).or_insert_with(|| watch::channel(0).0).subscribe()
    }

    pub fn wake(&self, org: OrgId, workload: Option<WorkloadId>) {
        let channels = self.0.lock();
        if let Some(sender) = workload.and_then(|id| channels.workloads.get(&id)) {
            sender.send_modify(|count| *count += 1);
        }
        if let Some(sender) = channels.orgs.get(&org) {
            sender.send_modify(|count| *count += 1);
        }
    }

    /// Everybody looks again: notifications may have been missed.
    pub fn wake_all(&self) {
        let channels = self.0.lock();
        channels
            .workloads
            .values()
            .chain(channels.orgs.values())
            .for_each(|sender| sender.send_modify(|count| *count += 1));
    }
}

/// Channels nobody listens to go when the map has doubled, so it stays as large as its use.
fn sweep<K: Ord + Clone>(channels: &mut BTreeMap<K, watch::Sender<u64>>) {
    if channels.len() >= 1024 && channels.len().is_power_of_two() {
        channels.retain(|_, sender| sender.receiver_count() > 0);
    }
}
