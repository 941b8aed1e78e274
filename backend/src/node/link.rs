//! One task for each node's stream: what the node should have goes down, what it reports comes up.
//!
//! The stream is a cache of the database on its way: hints carry no data, rows are read again for each, the whole set is
//! sent on connecting and every minute. A report is acknowledged once it is committed, and not before.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clawhq_app::Error;
use clawhq_app::hub::{NodeHint, NodeInbox};
use clawhq_app::nodes::{Heartbeat, SlotDesired};
use clawhq_domain::ids::{NodeId, SlotId};
use clawhq_domain::slot::SlotReport;
use clawhq_proto::v1::enrolment_server::{Enrolment, EnrolmentServer};
use clawhq_proto::v1::node_link_server::{NodeLink, NodeLinkServer};
use clawhq_proto::{FRAME_BYTES_MAX, v1};
use tokio::sync::{Notify, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

use super::channels::{Carrier, DownSender};
use super::tls::Connection;
use super::wire;
use crate::metrics::InUse;
use crate::problem::chain;
use crate::state::Backend;

/// The whole set goes down this often, whatever the hints.
const FULL_EVERY: Duration = Duration::from_secs(60);
/// From the dial to the opening frame.
const OPENING: Duration = Duration::from_secs(10);
/// A node that says nothing for this long (it beats every 5 s) is gone.
const SILENCE: Duration = Duration::from_secs(45);
/// Frames on their way down; a node that does not read stops its own task.
const DOWN_FRAMES: usize = 512;
/// Reports committed side by side; reports of one slot stay in order.
const REPORTS_AT_ONCE: usize = 8;
const REPORTS_WAITING: usize = 1024;
/// More changes than this at once and the whole set is sent instead.
const UPSERTS_MAX: usize = 256;

pub async fn serve(
    backend: Backend,
    connections: mpsc::Receiver<std::io::Result<Connection>>,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    let links = Links { backend, shutdown: shutdown.clone() };
    tonic::transport::Server::builder()
        .http2_keepalive_interval(Some(Duration::from_secs(10)))
        .http2_keepalive_timeout(Some(Duration::from_secs(10)))
        .initial_stream_window_size(1024 * 1024)
        .initial_connection_window_size(4 * 1024 * 1024)
        .max_concurrent_streams(16)
        .add_service(EnrolmentServer::new(links.clone()).max_decoding_message_size(256 * 1024))
        .add_service(NodeLinkServer::new(links).max_decoding_message_size(FRAME_BYTES_MAX))
        .serve_with_incoming_shutdown(ReceiverStream::new(connections), shutdown.cancelled_owned())
        .await?;
    Ok(())
}

#[derive(Clone)]
struct Links {
    backend: Backend,
    shutdown: CancellationToken,
}

fn status(error: Error) -> Status {
    match error {
        Error::Unauthenticated | Error::Forbidden => {
            Status::unauthenticated("the certificate is not a node's current one")
        }
        Error::Refused(reason) => Status::permission_denied(reason.message),
        Error::Invalid { reason, .. } => Status::invalid_argument(reason.message),
        Error::Unavailable(what) => Status::unavailable(format!("the {what} does not answer")),
        other => {
            tracing::error!(error = chain(&other), "a node's call failed");
            Status::internal("the control plane failed; it was logged")
        }
    }
}

impl Links {
    /// The node the peer's certificate names; nothing that it says is believed.
    async fn node<T>(&self, request: &Request<T>) -> Result<NodeId, Status> {
        let certificates =
            request.peer_certs().ok_or_else(|| Status::unauthenticated("a client certificate is needed"))?;
        let leaf = certificates.first().ok_or_else(|| Status::unauthenticated("a client certificate is needed"))?;
        self.backend.app().node_of_certificate(leaf).await.map_err(status)
    }
}

fn reply(enrolled: clawhq_app::nodes::Enrolled) -> Response<v1::EnrollReply> {
    Response::new(v1::EnrollReply {
        node_id: enrolled.node.to_string(),
        certificate_pem: enrolled.certificate_pem,
        ca_pem: enrolled.ca_pem,
        not_after_ms: enrolled.not_after,
    })
}

#[tonic::async_trait]
impl Enrolment for Links {
    async fn enroll(&self, request: Request<v1::EnrollRequest>) -> Result<Response<v1::EnrollReply>, Status> {
        let v1::EnrollRequest { join_token, csr_pem, facts } = request.into_inner();
        let facts = wire::facts(facts.unwrap_or_default());
        self.backend.app().enroll(&join_token, &csr_pem, &facts).await.map(reply).map_err(status)
    }
}

#[tonic::async_trait]
impl NodeLink for Links {
    type LinkStream = ReceiverStream<Result<v1::Down, Status>>;

    async fn link(&self, request: Request<Streaming<v1::Up>>) -> Result<Response<Self::LinkStream>, Status> {
        let node = self.node(&request).await?;
        let (down, stream) = mpsc::channel(DOWN_FRAMES);
        let (backend, shutdown) = (self.backend.clone(), self.shutdown.clone());
        tokio::spawn(async move {
            let last = down.clone();
            if let Err(status) = run(backend, node, request.into_inner(), down, shutdown).await {
                tracing::info!(node.id = %node, reason = status.message(), "a node's stream ended");
                // Told if there is room; the end itself says most of it.
                let _ = last.try_send(Err(status));
            }
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn renew(&self, request: Request<v1::RenewRequest>) -> Result<Response<v1::EnrollReply>, Status> {
        let node = self.node(&request).await?;
        let csr = request.into_inner().csr_pem;
        self.backend.app().renew_certificate(node, &csr).await.map(reply).map_err(status)
    }
}

/// One node's stream.
struct Link {
    backend: Backend,
    node: NodeId,
    epoch: i64,
    down: DownSender,
    carrier: Arc<Carrier>,
    /// The node asked for the whole set.
    want_full: Notify,
}

/// Undoes what the opening did, however the stream ends.
struct Attached {
    backend: Backend,
    node: NodeId,
    epoch: i64,
    _measured: InUse,
}

impl Drop for Attached {
    fn drop(&mut self) {
        self.backend.channels().detach(self.node, self.epoch);
        self.backend.app().close_link(self.node, self.epoch);
    }
}

async fn run(
    backend: Backend,
    node: NodeId,
    mut up: Streaming<v1::Up>,
    down: DownSender,
    shutdown: CancellationToken,
) -> Result<(), Status> {
    let first = tokio::time::timeout(OPENING, up.message())
        .await
        .map_err(|_| Status::deadline_exceeded("the opening frame did not come"))??;
    let Some(v1::up::Frame::Opening(opening)) = first.and_then(|frame| frame.frame) else {
        return Err(Status::invalid_argument("the first frame must be the opening"));
    };
    let facts = wire::facts(opening.facts.unwrap_or_default());
    let opened = backend.app().open_link(node, &facts).await.map_err(status)?;
    let epoch = opened.epoch;
    let carrier = backend.channels().attach(node, epoch, down.clone());
    let measured = InUse::new(&backend.metrics().node_streams);
    let _attached = Attached { backend: backend.clone(), node, epoch, _measured: measured };
    tracing::info!(node.id = %node, epoch, node.hostname = facts.hostname, "a node's stream began");
    let link = Link { backend, node, epoch, down, carrier, want_full: Notify::new() };
    let (reports, waiting) = mpsc::channel(REPORTS_WAITING);
    tokio::select! {
        ended = link.write(opened.inbox) => ended,
        ended = link.read(up, reports) => ended,
        ended = link.commit(waiting) => ended,
        () = shutdown.cancelled() => Err(Status::unavailable("the control plane is stopping; dial again")),
    }
}

impl Link {
    async fn send(&self, frame: v1::down::Frame) -> Result<(), Status> {
        let sent = self.down.send(Ok(v1::Down { frame: Some(frame) })).await;
        sent.map_err(|_| Status::cancelled("the node hung up"))
    }

    // ------------------------------------------------------------------------------------------------ downwards

    async fn write(&self, mut inbox: NodeInbox) -> Result<(), Status> {
        let mut full = tokio::time::interval(FULL_EVERY);
        full.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        full.tick().await;
        // What an earlier stream acknowledged may be gone since, as when the database crashed.
        self.send(v1::down::Frame::TellAll(v1::TellAll {})).await?;
        self.full().await?;
        loop {
            tokio::select! {
                hint = inbox.next() => {
                    let hinted = Instant::now();
                    let Some(hint) = hint else { return Err(Status::aborted("a newer stream of this node took over")) };
                    match gather(hint, &mut inbox) {
                        Gathered::Slots { claimed, changed } => {
                            for slot in claimed {
                                self.tell(slot, hinted).await?;
                            }
                            if !changed.is_empty() {
                                self.upsert(&changed, hinted).await?;
                            }
                        }
                        Gathered::TooMany => self.full().await?,
                        Gathered::Everything => {
                            // Notices were missed because the database was away. Reports are acknowledged before they
                            // are on its disk, so the last of them may be lost with a crash.
                            self.send(v1::down::Frame::TellAll(v1::TellAll {})).await?;
                            self.full().await?;
                        }
                    }
                }
                _ = full.tick() => self.full().await?,
                () = self.want_full.notified() => self.full().await?,
            }
        }
    }

    async fn upsert(&self, slots: &[SlotId], hinted: Instant) -> Result<(), Status> {
        match self.backend.app().desired(self.node, slots).await {
            Ok(desired) => {
                for slot in desired {
                    self.tell(slot, hinted).await?;
                }
                Ok(())
            }
            Err(error) => {
                // What was hinted at is in the whole set as well.
                tracing::warn!(node.id = %self.node, error = chain(&error), "slots could not be read");
                self.full().await
            }
        }
    }

    async fn tell(&self, slot: SlotDesired, hinted: Instant) -> Result<(), Status> {
        self.send(v1::down::Frame::Upsert(wire::slot(slot))).await?;
        self.backend.metrics().node_upsert.observe(hinted.elapsed().as_secs_f64());
        Ok(())
    }

    /// Reads and sends everything, trying until the database answers.
    async fn full(&self) -> Result<(), Status> {
        let mut pause = Duration::from_millis(50);
        loop {
            match self.backend.app().desired_set(self.node).await {
                Ok(set) => {
                    for frame in wire::full(set) {
                        self.send(frame).await?;
                    }
                    return Ok(());
                }
                Err(error) => {
                    tracing::warn!(node.id = %self.node, error = chain(&error), "the desired set could not be read")
                }
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_secs(5));
        }
    }

    // ------------------------------------------------------------------------------------------------ upwards

    async fn read(&self, mut up: Streaming<v1::Up>, reports: mpsc::Sender<Reported>) -> Result<(), Status> {
        loop {
            let frame = tokio::time::timeout(SILENCE, up.message())
                .await
                .map_err(|_| Status::deadline_exceeded("the node fell silent"))??
                .ok_or_else(|| Status::cancelled("the node hung up"))?;
            let gone = |_| Status::internal("the stream's committer ended");
            match frame.frame {
                Some(v1::up::Frame::Report(report)) => {
                    let index = report.index;
                    // One that cannot be read would be resent for ever: it is logged and passed over.
                    let what = match report.slot.map(SlotReport::try_from) {
                        Some(Ok(slot)) => What::Slot(Box::new(slot)),
                        Some(Err(malformed)) => {
                            tracing::error!(node.id = %self.node, index, %malformed, "an unreadable report");
                            What::Nothing
                        }
                        None => What::Nothing,
                    };
                    reports.send(Reported { index: Some(index), what }).await.map_err(gone)?;
                }
                Some(v1::up::Frame::VolumeRemoved(removed)) => {
                    if let Ok(volume) = removed.volume_id.parse() {
                        reports.send(Reported { index: None, what: What::Volume(volume) }).await.map_err(gone)?;
                    }
                }
                Some(v1::up::Frame::Heartbeat(beat)) => self.heartbeat(beat).await?,
                Some(v1::up::Frame::NeedFull(need)) => {
                    tracing::info!(node.id = %self.node, why = need.why, "the node wants the whole set");
                    self.want_full.notify_one();
                }
                Some(v1::up::Frame::ChannelData(data)) => self.carrier.data(data),
                Some(v1::up::Frame::ChannelClosed(closed)) => self.carrier.closed(closed),
                Some(v1::up::Frame::ChannelCredit(credit)) => self.carrier.credit(credit),
                Some(v1::up::Frame::Opening(_)) => return Err(Status::invalid_argument("a second opening")),
                // Of a newer agent.
                None => tracing::debug!(node.id = %self.node, "an unknown frame"),
            }
        }
    }

    async fn heartbeat(&self, beat: v1::Heartbeat) -> Result<(), Status> {
        let facts = Heartbeat {
            firewall_ready: beat.firewall_ready,
            runtime_ready: beat.runtime_ready,
            disk_free_mib: beat.disk_free_mib,
        };
        match self.backend.app().heartbeat(self.node, self.epoch, facts).await {
            Ok(lease) => {
                let lease_ms = u64::try_from(lease).unwrap_or(0);
                self.send(v1::down::Frame::HeartbeatAck(v1::HeartbeatAck { at_ms: beat.at_ms, lease_ms })).await
            }
            Err(Error::Unauthenticated) => {
                Err(Status::aborted("a newer stream of this node took over, or it was disabled"))
            }
            Err(error) => {
                // No acknowledgement, no lease: the node counts from its last one.
                tracing::warn!(node.id = %self.node, error = chain(&error), "a heartbeat could not be kept");
                Ok(())
            }
        }
    }

    /// Commits reports, different slots side by side, and acknowledges the highest index below which all are in.
    async fn commit(&self, mut waiting: mpsc::Receiver<Reported>) -> Result<(), Status> {
        let mut batch = Vec::with_capacity(64);
        loop {
            if waiting.recv_many(&mut batch, 64).await == 0 {
                return Err(Status::cancelled("the node hung up"));
            }
            let highest = batch.iter().filter_map(|report| report.index).max();
            let mut slots: BTreeMap<SlotId, Vec<SlotReport>> = BTreeMap::new();
            for report in batch.drain(..) {
                match report.what {
                    What::Slot(slot) => slots.entry(slot.slot).or_default().push(*slot),
                    What::Volume(volume) => self.volume_removed(volume).await,
                    What::Nothing => {}
                }
            }
            futures::StreamExt::for_each_concurrent(
                futures::stream::iter(slots.into_values()),
                REPORTS_AT_ONCE,
                |reports| async move {
                    for report in reports {
                        self.observe(report).await;
                    }
                },
            )
            .await;
            if let Some(index) = highest {
                self.send(v1::down::Frame::Ack(v1::Ack { index })).await?;
            }
        }
    }

    /// Returns once the report is committed: the node keeps it until then.
    async fn observe(&self, report: SlotReport) {
        let mut pause = Duration::from_millis(20);
        loop {
            match self.backend.app().observe(self.node, self.epoch, report.clone()).await {
                Ok(()) => {
                    self.backend.metrics().node_reports.inc();
                    return;
                }
                Err(Error::Unavailable(_)) => {}
                Err(error @ Error::Internal { .. }) => {
                    // A report that no try can commit must not stop all that come after it: the next one of this slot,
                    // or the sweep, says what is true.
                    tracing::error!(node.id = %self.node, slot.id = %report.slot, error = chain(&error), "a report was passed over");
                    return;
                }
                Err(error) => {
                    tracing::warn!(node.id = %self.node, slot.id = %report.slot, error = chain(&error), "a report was refused");
                    return;
                }
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_secs(5));
        }
    }

    async fn volume_removed(&self, volume: clawhq_domain::ids::VolumeId) {
        // Said again with the next whole set when this fails.
        if let Err(error) = self.backend.app().volume_removed(self.node, volume).await {
            tracing::warn!(node.id = %self.node, volume.id = %volume, error = chain(&error), "a volume's removal was not kept");
        }
    }
}

struct Reported {
    index: Option<u64>,
    what: What,
}

enum What {
    Slot(Box<SlotReport>),
    Volume(clawhq_domain::ids::VolumeId),
    Nothing,
}

enum Gathered {
    Slots {
        /// To be said as they are.
        claimed: Vec<SlotDesired>,
        /// To be read.
        changed: Vec<SlotId>,
    },
    /// More than are sent one by one.
    TooMany,
    /// Nobody knows what has changed.
    Everything,
}

/// All hints that wait already.
fn gather(first: NodeHint, inbox: &mut NodeInbox) -> Gathered {
    let (mut claimed, mut changed) = (Vec::new(), Vec::new());
    let mut too_many = false;
    let mut next = Some(first);
    while let Some(hint) = next {
        match hint {
            NodeHint::Everything => return Gathered::Everything,
            NodeHint::Claimed(slot) if claimed.len() < UPSERTS_MAX => claimed.push(*slot),
            NodeHint::SlotChanged(slot) if changed.len() < UPSERTS_MAX => {
                if !changed.contains(&slot) {
                    changed.push(slot);
                }
            }
            NodeHint::Claimed(_) | NodeHint::SlotChanged(_) => too_many = true,
        }
        next = inbox.hints.try_recv().ok();
    }
    if too_many { Gathered::TooMany } else { Gathered::Slots { claimed, changed } }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clawhq_app::hub::NodeHub;

    #[test]
    fn hints_are_gathered_until_they_are_too_many_or_unknown() {
        let (hub, node) = (NodeHub::default(), NodeId::from_u128(1));
        let mut inbox = hub.attach(node, 1);
        let slot = |number: usize| SlotId::from_u128(number as u128);
        hub.slot_changed(node, slot(2));
        hub.slot_changed(node, slot(1));
        hub.slot_changed(node, slot(2));
        let some = gather(NodeHint::SlotChanged(slot(1)), &mut inbox);
        assert!(
            matches!(some, Gathered::Slots { claimed, changed } if claimed.is_empty() && changed == [slot(1), slot(2)])
        );
        (0..=UPSERTS_MAX).for_each(|number| hub.slot_changed(node, slot(number)));
        assert!(matches!(gather(NodeHint::SlotChanged(slot(0)), &mut inbox), Gathered::TooMany));
        hub.slot_changed(node, slot(1));
        hub.everything_changed();
        assert!(matches!(gather(NodeHint::SlotChanged(slot(0)), &mut inbox), Gathered::Everything));
    }
}
