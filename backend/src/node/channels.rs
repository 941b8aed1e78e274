//! Logs, exec and terminals: byte channels to a container, many through one node's stream.
//!
//! Both directions are paced by credit, so a slow reader stops its own producer and nobody else's. The registry holds the
//! nodes whose streams end in this process; a request that lands in another process finds none and says so.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use clawhq_domain::ids::{InstanceId, NodeId, SlotId};
use clawhq_proto::{CHANNEL_CREDIT, v1};
use parking_lot::Mutex;
use prometheus_client::metrics::gauge::Gauge;
use tokio::sync::{Notify, mpsc};

use crate::metrics::InUse;

/// What goes down a node's stream.
pub(super) type DownSender = mpsc::Sender<Result<v1::Down, tonic::Status>>;

/// Frames kept for a reader beside its credit: empty ones cost no credit and must not be free.
const FRAMES_MAX: usize = 16 * 1024;
/// An empty line is not free.
fn cost(bytes: usize) -> usize {
    bytes.max(1)
}

/// Channels of one node at once.
const CHANNELS_MAX: usize = 1024;
/// Largest frame sent down.
const CHUNK: usize = 32 * 1024;
/// Input frames on their way; a node keeps at least 256.
const INPUT_FRAMES: usize = 128;

#[derive(Clone)]
pub struct NodeChannels {
    nodes: Arc<Mutex<HashMap<NodeId, Arc<Carrier>>>>,
    gauge: Gauge,
}

/// One node's stream, as the channels see it.
pub struct Carrier {
    epoch: i64,
    down: DownSender,
    open: Mutex<HashMap<u64, Arc<State>>>,
    next: AtomicU64,
}

/// One end of one channel.
struct State {
    inbox: Mutex<Inbox>,
    arrived: Notify,
    /// Bytes that may still be sent down.
    credit: tokio::sync::Semaphore,
    /// Frames that may still be sent down: the node keeps that many for a program that does not read, and grants credit once
    /// for each.
    frames: tokio::sync::Semaphore,
}

struct Inbox {
    frames: VecDeque<Frame>,
    /// Bytes the node may still send.
    credit: usize,
    closed: Option<Closed>,
}

/// A piece of output.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    pub stderr: bool,
    pub bytes: Bytes,
    /// Log lines: when the line was written, in milliseconds since the epoch.
    pub at_ms: i64,
}

/// How a channel ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Closed {
    /// `ended`, `exited`, `not_running`, `not_found`, `timeout`, `runtime_failed`, `cancelled`, `overflow` or
    /// `node_unreachable`.
    pub reason: String,
    pub message: String,
    pub exit_code: Option<i32>,
}

impl Closed {
    fn by_us(reason: &str, message: &str) -> Self {
        Self { reason: reason.to_owned(), message: message.to_owned(), exit_code: None }
    }
}

/// Why no channel could be opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// The node's stream does not end in this process, or not now.
    NotConnected,
    /// The node has as many channels as it may.
    Full,
}

/// What comes next on a channel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    Frame(Frame),
    Closed(Closed),
}

/// An open channel; dropping it closes it.
pub struct Channel {
    id: u64,
    carrier: Arc<Carrier>,
    state: Arc<State>,
    consumed: u32,
    _measured: InUse,
}

/// The way into a channel; it stays closed once the channel is.
#[derive(Clone)]
pub struct Input {
    id: u64,
    carrier: Arc<Carrier>,
    state: Arc<State>,
}

impl NodeChannels {
    pub fn new(gauge: Gauge) -> Self {
        Self { nodes: Arc::default(), gauge }
    }

    /// A node's stream begins; channels of an older one end.
    pub(super) fn attach(&self, node: NodeId, epoch: i64, down: DownSender) -> Arc<Carrier> {
        let carrier = Arc::new(Carrier { epoch, down, open: Mutex::default(), next: AtomicU64::new(1) });
        let mut nodes = self.nodes.lock();
        // Two dials at once may arrive here in either order; the newer stays.
        if nodes.get(&node).is_none_or(|known| known.epoch < epoch)
            && let Some(older) = nodes.insert(node, carrier.clone())
        {
            older.end();
        }
        carrier
    }

    /// A node's stream has ended; a newer one stays.
    pub(super) fn detach(&self, node: NodeId, epoch: i64) {
        let mut nodes = self.nodes.lock();
        if nodes.get(&node).is_some_and(|carrier| carrier.epoch == epoch)
            && let Some(carrier) = nodes.remove(&node)
        {
            carrier.end();
        }
    }

    pub async fn open(
        &self,
        node: NodeId,
        slot: SlotId,
        instance: InstanceId,
        kind: v1::channel_open::Kind,
    ) -> Result<Channel, Refused> {
        let carrier = self.nodes.lock().get(&node).cloned().ok_or(Refused::NotConnected)?;
        let state = Arc::new(State {
            inbox: Mutex::new(Inbox { frames: VecDeque::new(), credit: CHANNEL_CREDIT as usize, closed: None }),
            arrived: Notify::new(),
            credit: tokio::sync::Semaphore::new(CHANNEL_CREDIT as usize),
            frames: tokio::sync::Semaphore::new(INPUT_FRAMES),
        });
        let id = carrier.next.fetch_add(1, Ordering::Relaxed);
        {
            let mut open = carrier.open.lock();
            if open.len() >= CHANNELS_MAX {
                return Err(Refused::Full);
            }
            open.insert(id, state.clone());
        }
        // From here on dropping it tidies up.
        let channel = Channel { id, carrier, state, consumed: 0, _measured: InUse::new(&self.gauge) };
        let open = v1::ChannelOpen {
            id,
            slot_id: slot.to_string(),
            instance_id: instance.to_string(),
            kind: Some(kind),
            credit: CHANNEL_CREDIT,
        };
        if channel.carrier.send(v1::down::Frame::ChannelOpen(open)).await {
            Ok(channel)
        } else {
            Err(Refused::NotConnected)
        }
    }
}

impl Carrier {
    async fn send(&self, frame: v1::down::Frame) -> bool {
        self.down.send(Ok(v1::Down { frame: Some(frame) })).await.is_ok()
    }

    fn end(&self) {
        for (_, state) in self.open.lock().drain() {
            state.close(Closed::by_us("node_unreachable", "The node's connection broke off."));
        }
    }

    /// A frame came up the stream. What it names may be gone already: then nobody wants it.
    pub(super) fn data(&self, data: v1::ChannelData) {
        let Some(state) = self.open.lock().get(&data.id).cloned() else { return };
        let stderr = data.stream() == v1::Stream::Stderr;
        let mut inbox = state.inbox.lock();
        if inbox.closed.is_some() {
            return;
        }
        let cost = cost(data.bytes.len());
        let fits = cost <= inbox.credit && inbox.frames.len() < FRAMES_MAX;
        if fits {
            inbox.credit -= cost;
            inbox.frames.push_back(Frame { stderr, bytes: data.bytes.into(), at_ms: data.at_ms });
        } else {
            inbox.closed = Some(Closed::by_us("overflow", "The node sent more than it was allowed to."));
        }
        drop(inbox);
        state.arrived.notify_one();
    }

    pub(super) fn closed(&self, closed: v1::ChannelClosed) {
        if let Some(state) = self.open.lock().remove(&closed.id) {
            let v1::ChannelClosed { id: _, reason, message, exit_code } = closed;
            state.close(Closed { reason, message, exit_code });
        }
    }

    pub(super) fn credit(&self, credit: v1::ChannelCredit) {
        if let Some(state) = self.open.lock().get(&credit.id) {
            // A node that grants without end gains nothing by it.
            let room = (CHANNEL_CREDIT as usize).saturating_sub(state.credit.available_permits());
            state.credit.add_permits(room.min(credit.bytes as usize));
            if state.frames.available_permits() < INPUT_FRAMES {
                state.frames.add_permits(1);
            }
        }
    }
}

impl State {
    fn close(&self, closed: Closed) {
        self.inbox.lock().closed.get_or_insert(closed);
        self.credit.close();
        self.frames.close();
        self.arrived.notify_one();
    }
}

impl Channel {
    /// The next piece of output, and at the end how it ended (again and again). Safe to cancel.
    pub async fn next(&mut self) -> Next {
        loop {
            let taken = {
                let mut inbox = self.state.inbox.lock();
                match inbox.frames.pop_front() {
                    Some(frame) => Some(Ok(frame)),
                    None => inbox.closed.clone().map(Err),
                }
            };
            match taken {
                Some(Ok(frame)) => {
                    self.give_back(cost(frame.bytes.len()));
                    return Next::Frame(frame);
                }
                Some(Err(closed)) => return Next::Closed(closed),
                None => self.state.arrived.notified().await,
            }
        }
    }

    /// Grants what was consumed, in steps of half the window. A full stream is tried again with the next piece.
    fn give_back(&mut self, bytes: usize) {
        self.consumed = self.consumed.saturating_add(u32::try_from(bytes).unwrap_or(u32::MAX));
        if self.consumed < CHANNEL_CREDIT / 2 {
            return;
        }
        let Ok(permit) = self.carrier.down.try_reserve() else {
            let carrier = self.carrier.clone();
            let credit = v1::ChannelCredit { id: self.id, bytes: std::mem::take(&mut self.consumed) };
            self.state.inbox.lock().credit += credit.bytes as usize;
            tokio::spawn(async move { carrier.send(v1::down::Frame::ChannelCredit(credit)).await });
            return;
        };
        let credit = v1::ChannelCredit { id: self.id, bytes: std::mem::take(&mut self.consumed) };
        self.state.inbox.lock().credit += credit.bytes as usize;
        permit.send(Ok(v1::Down { frame: Some(v1::down::Frame::ChannelCredit(credit)) }));
    }

    /// The way in, to be used beside the way out.
    pub fn input(&self) -> Input {
        Input { id: self.id, carrier: self.carrier.clone(), state: self.state.clone() }
    }
}

impl Input {
    /// Sends input, waiting for credit. `false`: the channel is closed.
    pub async fn send(&self, mut input: Bytes) -> bool {
        while !input.is_empty() {
            let chunk = input.split_to(input.len().min(CHUNK));
            let Ok(frame) = self.state.frames.acquire().await else { return false };
            frame.forget();
            let Ok(permit) = self.state.credit.acquire_many(chunk.len() as u32).await else { return false };
            permit.forget();
            if !self.data(v1::ChannelData { bytes: chunk.to_vec(), ..self.blank() }).await {
                return false;
            }
        }
        true
    }

    pub async fn end_input(&self) -> bool {
        self.data(v1::ChannelData { end_of_input: true, ..self.blank() }).await
    }

    pub async fn resize(&self, cols: u32, rows: u32) -> bool {
        self.data(v1::ChannelData { resize: Some(v1::Resize { cols, rows }), ..self.blank() }).await
    }

    fn blank(&self) -> v1::ChannelData {
        v1::ChannelData { id: self.id, stream: v1::Stream::Stdin.into(), ..v1::ChannelData::default() }
    }

    async fn data(&self, data: v1::ChannelData) -> bool {
        self.carrier.send(v1::down::Frame::ChannelData(data)).await
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        // The node closed it itself: it knows.
        if self.carrier.open.lock().remove(&self.id).is_none() {
            return;
        }
        let closed =
            v1::ChannelClosed { id: self.id, reason: "cancelled".to_owned(), message: String::new(), exit_code: None };
        let frame = v1::Down { frame: Some(v1::down::Frame::ChannelClosed(closed)) };
        if let Err(mpsc::error::TrySendError::Full(frame)) = self.carrier.down.try_send(Ok(frame)) {
            let down = self.carrier.down.clone();
            tokio::spawn(async move { down.send(frame).await });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Rig {
        channels: NodeChannels,
        carrier: Arc<Carrier>,
        down: mpsc::Receiver<Result<v1::Down, tonic::Status>>,
        node: NodeId,
    }

    fn rig() -> Rig {
        let channels = NodeChannels::new(Gauge::default());
        let (sender, down) = mpsc::channel(64);
        let node = NodeId::from_u128(1);
        let carrier = channels.attach(node, 1, sender);
        Rig { channels, carrier, down, node }
    }

    impl Rig {
        async fn open(&mut self) -> (Channel, u64) {
            let kind = v1::channel_open::Kind::Exec(v1::Exec { argv: vec!["true".to_owned()], timeout_ms: 1 });
            let opened = self.channels.open(self.node, SlotId::from_u128(2), InstanceId::from_u128(3), kind).await;
            let channel = opened.unwrap_or_else(|why| panic!("{why:?}"));
            match self.sent().await {
                v1::down::Frame::ChannelOpen(open) => (channel, open.id),
                other => panic!("{other:?}"),
            }
        }

        async fn sent(&mut self) -> v1::down::Frame {
            self.down.recv().await.unwrap().unwrap().frame.unwrap()
        }
    }

    fn data(id: u64, bytes: usize) -> v1::ChannelData {
        v1::ChannelData { id, bytes: vec![b'x'; bytes], ..v1::ChannelData::default() }
    }

    #[tokio::test]
    async fn a_reader_gives_back_what_it_consumed_and_a_node_that_ignores_it_is_cut() {
        let mut rig = rig();
        let (mut channel, id) = rig.open().await;
        let half = CHANNEL_CREDIT as usize / 2;
        rig.carrier.data(data(id, half));
        rig.carrier.data(data(id, half));
        assert!(matches!(channel.next().await, Next::Frame(frame) if frame.bytes.len() == half));
        assert!(matches!(rig.sent().await, v1::down::Frame::ChannelCredit(credit) if credit.bytes as usize == half));
        rig.carrier.data(data(id, half));
        rig.carrier.data(data(id, 1));
        assert!(matches!(channel.next().await, Next::Frame(_)));
        assert!(matches!(channel.next().await, Next::Frame(_)));
        assert!(matches!(channel.next().await, Next::Closed(closed) if closed.reason == "overflow"));
    }

    #[tokio::test]
    async fn input_waits_for_credit() {
        let mut rig = rig();
        let (channel, id) = rig.open().await;
        let carrier = rig.carrier.clone();
        let all = CHANNEL_CREDIT as usize + 10;
        let sender = tokio::spawn(async move { (channel.input().send(Bytes::from(vec![0; all])).await, channel) });
        let mut got = 0;
        while got < CHANNEL_CREDIT as usize {
            let v1::down::Frame::ChannelData(data) = rig.sent().await else { panic!() };
            got += data.bytes.len();
        }
        assert!(!sender.is_finished());
        carrier.credit(v1::ChannelCredit { id, bytes: 1_000_000 });
        let v1::down::Frame::ChannelData(data) = rig.sent().await else { panic!() };
        assert_eq!(got + data.bytes.len(), all);
        assert!(sender.await.unwrap().0);
    }

    #[tokio::test]
    async fn a_broken_stream_ends_its_channels_and_a_newer_one_stays() {
        let mut rig = rig();
        let (mut channel, _) = rig.open().await;
        let (sender, _down) = mpsc::channel(4);
        rig.channels.attach(rig.node, 2, sender);
        assert!(matches!(channel.next().await, Next::Closed(closed) if closed.reason == "node_unreachable"));
        assert!(!channel.input().send(Bytes::from_static(b"x")).await);
        rig.channels.detach(rig.node, 1);
        assert!(rig.channels.nodes.lock().contains_key(&rig.node));
        rig.channels.detach(rig.node, 2);
        let kind = v1::channel_open::Kind::Logs(v1::Logs::default());
        let refused = rig.channels.open(rig.node, SlotId::from_u128(2), InstanceId::from_u128(3), kind).await;
        assert_eq!(refused.err(), Some(Refused::NotConnected));
    }

    #[tokio::test]
    async fn dropping_tells_the_node_once() {
        let mut rig = rig();
        let (channel, id) = rig.open().await;
        drop(channel);
        assert!(matches!(rig.sent().await, v1::down::Frame::ChannelClosed(closed) if closed.id == id));
        let (channel, id) = rig.open().await;
        rig.carrier.closed(v1::ChannelClosed {
            id,
            reason: "exited".into(),
            message: String::new(),
            exit_code: Some(0),
        });
        drop(channel);
        assert!(rig.down.try_recv().is_err(), "it knows");
    }
}
