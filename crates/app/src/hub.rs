//! Live node streams of this process: who to tell that a slot has changed.
//!
//! The stream's task reads the rows again, so a lost hint costs latency and a repeated one costs a query. A claim that
//! was committed in this process brings what its node must be told along; it has a generation, so that one that comes
//! late is old news to the node. Other replicas hear by NOTIFY, whose listener calls [`NodeHub::slot_changed`] as well.

use std::collections::BTreeMap;
use std::sync::Arc;

use clawhq_domain::ids::{NodeId, SlotId};
use parking_lot::Mutex;
use tokio::sync::mpsc;

use crate::nodes::SlotDesired;

/// More unread hints than this and the stream sends the whole set instead.
const HINTS_MAX: usize = 4096;

pub enum NodeHint {
    SlotChanged(SlotId),
    /// The same, with all there is to say.
    Claimed(Box<SlotDesired>),
    /// Too much changed to say what.
    Everything,
}

/// The receiving end, held by the task of one node's stream.
pub struct NodeInbox {
    pub hints: mpsc::Receiver<NodeHint>,
    /// Set when hints were dropped because the inbox was full: send the whole set.
    overflow: Arc<std::sync::atomic::AtomicBool>,
}

impl NodeInbox {
    /// The next hint; `None` when a newer stream of the same node took over.
    pub async fn next(&mut self) -> Option<NodeHint> {
        if self.overflow.swap(false, std::sync::atomic::Ordering::AcqRel) {
            return Some(NodeHint::Everything);
        }
        self.hints.recv().await
    }
}

struct Attached {
    epoch: i64,
    sender: mpsc::Sender<NodeHint>,
    overflow: Arc<std::sync::atomic::AtomicBool>,
}

#[derive(Default)]
pub struct NodeHub {
    nodes: Mutex<BTreeMap<NodeId, Attached>>,
}

impl NodeHub {
    /// Registers a stream; an older one of the same node sees its inbox close, whichever of the two comes first.
    pub fn attach(&self, node: NodeId, epoch: i64) -> NodeInbox {
        let (sender, hints) = mpsc::channel(HINTS_MAX);
        let overflow = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let attached = Attached { epoch, sender, overflow: overflow.clone() };
        let mut nodes = self.nodes.lock();
        if nodes.get(&node).is_none_or(|known| known.epoch < epoch) {
            nodes.insert(node, attached);
        }
        drop(nodes);
        NodeInbox { hints, overflow }
    }

    /// The stream ended; a newer one stays.
    pub fn detach(&self, node: NodeId, epoch: i64) {
        let mut nodes = self.nodes.lock();
        if nodes.get(&node).is_some_and(|attached| attached.epoch == epoch) {
            nodes.remove(&node);
        }
    }

    /// Whether this process holds the node's stream.
    pub fn holds(&self, node: NodeId) -> bool {
        self.nodes.lock().contains_key(&node)
    }

    /// Nodes whose streams end in this process.
    pub fn count(&self) -> usize {
        self.nodes.lock().len()
    }

    /// Notices may have been missed: every stream sends its whole set.
    pub fn everything_changed(&self) {
        for attached in self.nodes.lock().values() {
            attached.overflow.store(true, std::sync::atomic::Ordering::Release);
            // Wakes the stream if it waits; a full inbox is awake anyway.
            let _ = attached.sender.try_send(NodeHint::Everything);
        }
    }

    pub fn slot_changed(&self, node: NodeId, slot: SlotId) {
        self.hint(node, NodeHint::SlotChanged(slot));
    }

    pub fn claimed(&self, node: NodeId, desired: Box<SlotDesired>) {
        self.hint(node, NodeHint::Claimed(desired));
    }

    fn hint(&self, node: NodeId, hint: NodeHint) {
        if let Some(attached) = self.nodes.lock().get(&node)
            && attached.sender.try_send(hint).is_err()
        {
            attached.overflow.store(true, std::sync::atomic::Ordering::Release);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_newest_stream_hears_whatever_the_order_they_come_in() {
        let (hub, node, slot) = (NodeHub::default(), NodeId::from_u128(1), SlotId::from_u128(2));
        let mut newer = hub.attach(node, 2);
        let mut older = hub.attach(node, 1);
        assert!(older.next().await.is_none(), "it is told that it is the older one");
        hub.slot_changed(node, slot);
        assert!(matches!(newer.next().await, Some(NodeHint::SlotChanged(changed)) if changed == slot));
        hub.detach(node, 1);
        assert!(hub.holds(node));
        let _newest = hub.attach(node, 3);
        assert!(newer.next().await.is_none());
    }
}
