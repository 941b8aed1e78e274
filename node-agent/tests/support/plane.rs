//! The other end of the stream: enrols, signs, sends desired slots, acknowledges, opens channels, and remembers.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clawhq_domain::ids::NodeId;
use clawhq_domain::slot::{SlotReport, SlotState};
use clawhq_proto::v1::enrolment_server::{Enrolment, EnrolmentServer};
use clawhq_proto::v1::node_link_server::{NodeLink, NodeLinkServer};
use clawhq_proto::v1::{self, down, up};
use futures::stream::BoxStream;
use futures::{Stream, StreamExt};
use parking_lot::Mutex;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair,
};
use tokio::sync::{Notify, mpsc};
use tokio_stream::wrappers::{TcpListenerStream, UnboundedReceiverStream};
use tonic::transport::{Certificate, Identity, Server, ServerTlsConfig};
use tonic::{Request, Response, Status, Streaming};

use super::PATIENCE;

#[derive(Default)]
struct State {
    /// What the node should have, and the volumes it should not.
    desired: BTreeMap<String, v1::SlotDesired>,
    removed_volumes: Vec<String>,
    volumes_gone: Vec<String>,
    down: Option<mpsc::UnboundedSender<Result<v1::Down, Status>>>,
    reports: Vec<(u64, SlotReport)>,
    openings: Vec<v1::Opening>,
    heartbeats: u64,
    last_heartbeat: Option<v1::Heartbeat>,
    need_full: Vec<String>,
    lease_ms: u64,
    silent_acks: bool,
    channels: HashMap<u64, Channel>,
    next_channel: u64,
    certificates: Vec<Vec<u8>>,
    enrolled: u32,
}

#[derive(Clone, Default)]
pub struct Channel {
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    /// Log lines as they came.
    pub lines: Vec<(i64, String)>,
    pub closed: Option<v1::ChannelClosed>,
}

#[derive(Clone)]
pub struct Plane {
    pub address: String,
    pub ca_file: PathBuf,
    pub node: NodeId,
    state: Arc<Mutex<State>>,
    changed: Arc<Notify>,
}

struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
    life: Duration,
}

#[derive(Clone)]
struct Service {
    plane: Plane,
    authority: Arc<Authority>,
}

impl Plane {
    pub async fn start(dir: &Path, life: Duration) -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        let certificate = params.self_signed(&key).unwrap();
        let pem = certificate.pem();
        let issuer = Issuer::from_ca_cert_pem(&pem, key).unwrap();
        let server_key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec!["control-plane.clawhq.internal".to_owned()]).unwrap();
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let server = params.signed_by(&server_key, &issuer).unwrap();
        let ca_file = dir.join("ca.pem");
        std::fs::write(&ca_file, &pem).unwrap();

        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let plane = Self {
            address: format!("https://{}", listener.local_addr().unwrap()),
            ca_file,
            node: super::id(),
            state: Arc::new(Mutex::new(State { lease_ms: 60_000, ..State::default() })),
            changed: Arc::new(Notify::new()),
        };
        let tls = ServerTlsConfig::new()
            .identity(Identity::from_pem(server.pem(), server_key.serialize_pem()))
            .client_ca_root(Certificate::from_pem(&pem))
            .client_auth_optional(true);
        let service = Service { plane: plane.clone(), authority: Arc::new(Authority { issuer, pem, life }) };
        let server = Server::builder()
            .tls_config(tls)
            .unwrap()
            .tcp_nodelay(true)
            .add_service(EnrolmentServer::new(service.clone()))
            .add_service(NodeLinkServer::new(service))
            .serve_with_incoming(TcpListenerStream::new(listener));
        tokio::spawn(server);
        plane
    }

    /// Waits until `look` finds what it looks for in what has come.
    async fn find<T>(&self, what: &str, mut look: impl FnMut(&State) -> Option<T>) -> T {
        let waiting = async {
            loop {
                let changed = self.changed.notified();
                if let Some(found) = look(&self.state.lock()) {
                    return found;
                }
                changed.await;
            }
        };
        match tokio::time::timeout(PATIENCE, waiting).await {
            Ok(found) => found,
            Err(_) => panic!("{what} does not come; reports: {:#?}", self.state.lock().reports),
        }
    }

    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let result = change(&mut self.state.lock());
        self.changed.notify_waiters();
        result
    }

    fn send(&self, frame: down::Frame) {
        if let Some(down) = &self.state.lock().down {
            let _ = down.send(Ok(v1::Down { frame: Some(frame) }));
        }
    }

    /// Waits for a link after the first so many.
    pub async fn linked(&self, before: usize) {
        self.find("a link", |state| state.down.as_ref().filter(|_| state.openings.len() > before).map(drop)).await;
    }

    pub fn slots(&self) -> Vec<v1::SlotDesired> {
        self.state.lock().desired.values().cloned().collect()
    }

    /// Keeps it as wanted and sends it at once.
    pub fn desire(&self, slot: v1::SlotDesired) {
        let slot = v1::SlotDesired { generation: slot.generation.max(1), ..slot };
        let slot = self.change(|state| {
            let generation = state.desired.get(&slot.slot_id).map_or(0, |known| known.generation);
            let slot = v1::SlotDesired { generation: slot.generation.max(generation + 1), ..slot };
            state.desired.insert(slot.slot_id.clone(), slot.clone());
            slot
        });
        self.send(down::Frame::Upsert(slot));
    }

    /// Sends a frame nobody keeps.
    pub fn say(&self, frame: down::Frame) {
        self.send(frame);
    }

    pub fn forget(&self, slot: &str) {
        self.change(|state| state.desired.remove(slot));
    }

    pub fn send_full(&self) {
        let (slots, removed_volumes) = {
            let state = self.state.lock();
            (state.desired.values().cloned().collect(), state.removed_volumes.clone())
        };
        self.send(down::Frame::Full(v1::DesiredSet { slots, removed_volumes }));
    }

    /// Cuts the stream.
    pub fn hang_up(&self) {
        self.change(|state| state.down = None);
    }

    pub fn set_lease(&self, lease_ms: u64, answered: bool) {
        self.change(|state| (state.lease_ms, state.silent_acks) = (lease_ms, !answered));
    }

    pub async fn remove_volume(&self, volume: &str) {
        self.change(|state| state.removed_volumes.push(volume.to_owned()));
        self.send_full();
        self.find("the volume's end", |state| state.volumes_gone.iter().any(|gone| gone == volume).then_some(())).await;
    }

    pub async fn report(&self, what: &str, mut is_it: impl FnMut(&SlotReport) -> bool) -> SlotReport {
        self.find(what, |state| state.reports.iter().map(|(_, report)| report).find(|one| is_it(one)).cloned()).await
    }

    /// The first report of a slot in that state, with that run or a later one.
    pub async fn state(&self, slot: &v1::SlotDesired, state: SlotState, run: u32) -> SlotReport {
        let what = format!("{} {}", slot.slot_id, state.name());
        self.report(&what, |one| one.slot.to_string() == slot.slot_id && one.state == state && one.run >= run).await
    }

    pub fn states(&self, slot: &v1::SlotDesired) -> Vec<SlotState> {
        let state = self.state.lock();
        let reports = state.reports.iter().map(|(_, report)| report);
        reports.filter(|one| one.slot.to_string() == slot.slot_id).map(|one| one.state).collect()
    }

    pub fn indexes(&self) -> Vec<u64> {
        self.state.lock().reports.iter().map(|(index, _)| *index).collect()
    }

    pub fn openings(&self) -> Vec<v1::Opening> {
        self.state.lock().openings.clone()
    }

    pub async fn opening(&self, number: usize) -> v1::Opening {
        self.find("another link", |state| state.openings.get(number).cloned()).await
    }

    pub async fn heartbeat(&self) -> v1::Heartbeat {
        let seen = self.state.lock().heartbeats;
        self.find("a heartbeat", |state| state.last_heartbeat.filter(|_| state.heartbeats > seen)).await
    }

    pub async fn asked_full(&self) -> String {
        self.find("a wish for the whole set", |state| state.need_full.first().cloned()).await
    }

    pub async fn certificate(&self, number: usize) -> Vec<u8> {
        self.find("a certificate", |state| state.certificates.get(number).cloned()).await
    }

    pub fn enrolled(&self) -> u32 {
        self.state.lock().enrolled
    }

    pub fn open(&self, slot: &v1::SlotDesired, kind: v1::channel_open::Kind, credit: u32) -> u64 {
        let id = self.change(|state| {
            state.next_channel += 1;
            let id = state.next_channel;
            state.channels.insert(id, Channel::default());
            id
        });
        let instance_id = slot.claim.as_ref().map(|claim| claim.instance_id.clone()).unwrap_or_default();
        let open = v1::ChannelOpen { id, slot_id: slot.slot_id.clone(), instance_id, kind: Some(kind), credit };
        self.send(down::Frame::ChannelOpen(open));
        id
    }

    pub async fn channel(&self, id: u64, what: &str, mut is_it: impl FnMut(&Channel) -> bool) -> Channel {
        self.find(what, |state| state.channels.get(&id).filter(|one| is_it(one)).cloned()).await
    }

    pub fn seen(&self, id: u64) -> Channel {
        self.state.lock().channels[&id].clone()
    }

    pub async fn closed(&self, id: u64) -> (Channel, v1::ChannelClosed) {
        let channel = self.channel(id, "the channel's end", |one| one.closed.is_some()).await;
        let closed = channel.closed.clone().unwrap();
        (channel, closed)
    }

    /// Runs a command in the slot and returns what it said and its exit code.
    pub async fn exec(&self, slot: &v1::SlotDesired, argv: &[&str]) -> (i32, String) {
        let argv = argv.iter().map(|arg| (*arg).to_owned()).collect();
        let kind = v1::channel_open::Kind::Exec(v1::Exec { argv, timeout_ms: 20_000 });
        let id = self.open(slot, kind, 1 << 20);
        let (channel, closed) = self.closed(id).await;
        let said = [channel.stdout, channel.stderr].concat();
        let said = String::from_utf8_lossy(&said).into_owned();
        assert_eq!(closed.reason, "exited", "{said} {}", closed.message);
        (closed.exit_code.unwrap(), said)
    }

    fn on_up(&self, frame: up::Frame) {
        let mut answer = None;
        self.change(|state| match frame {
            up::Frame::Opening(opening) => state.openings.push(opening),
            up::Frame::Report(report) => {
                let parsed = SlotReport::try_from(report.slot.unwrap()).unwrap();
                if parsed.state == SlotState::Absent
                    && state.desired.get(&parsed.slot.to_string()).is_some_and(|desired| !desired.present)
                {
                    state.desired.remove(&parsed.slot.to_string());
                }
                state.reports.push((report.index, parsed));
                if !state.silent_acks {
                    answer = Some(down::Frame::Ack(v1::Ack { index: report.index }));
                }
            }
            up::Frame::Heartbeat(beat) => {
                state.heartbeats += 1;
                state.last_heartbeat = Some(beat);
                if !state.silent_acks {
                    let ack = v1::HeartbeatAck { at_ms: beat.at_ms, lease_ms: state.lease_ms };
                    answer = Some(down::Frame::HeartbeatAck(ack));
                }
            }
            up::Frame::NeedFull(need) => state.need_full.push(need.why),
            up::Frame::VolumeRemoved(gone) => {
                state.removed_volumes.retain(|volume| *volume != gone.volume_id);
                state.volumes_gone.push(gone.volume_id);
            }
            up::Frame::ChannelData(data) => {
                let channel = state.channels.entry(data.id).or_default();
                if data.at_ms > 0 {
                    channel.lines.push((data.at_ms, String::from_utf8_lossy(&data.bytes).into_owned()));
                }
                match data.stream() {
                    v1::Stream::Stderr => channel.stderr.extend(data.bytes),
                    _ => channel.stdout.extend(data.bytes),
                }
            }
            up::Frame::ChannelClosed(closed) => {
                let channel = state.channels.entry(closed.id).or_default();
                channel.closed = Some(closed);
            }
            up::Frame::ChannelCredit(_) => {}
        });
        if let Some(answer) = answer {
            self.send(answer);
        }
    }
}

impl Authority {
    fn sign(&self, csr_pem: &str) -> v1::EnrollReply {
        let mut request = CertificateSigningRequestParams::from_pem(csr_pem).unwrap();
        request.params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        let not_after = std::time::SystemTime::now() + self.life;
        let not_after_ms = not_after.duration_since(std::time::UNIX_EPOCH).unwrap().as_millis() as i64;
        v1::EnrollReply {
            node_id: String::new(),
            certificate_pem: request.signed_by(&self.issuer).unwrap().pem(),
            ca_pem: self.pem.clone(),
            not_after_ms,
        }
    }
}

#[tonic::async_trait]
impl Enrolment for Service {
    async fn enroll(&self, request: Request<v1::EnrollRequest>) -> Result<Response<v1::EnrollReply>, Status> {
        let request = request.into_inner();
        if request.join_token != "join-once" || self.plane.enrolled() > 0 {
            return Err(Status::permission_denied("the token is used"));
        }
        self.plane.change(|state| state.enrolled += 1);
        Ok(Response::new(v1::EnrollReply {
            node_id: self.plane.node.to_string(),
            ..self.authority.sign(&request.csr_pem)
        }))
    }
}

#[tonic::async_trait]
impl NodeLink for Service {
    type LinkStream = BoxStream<'static, Result<v1::Down, Status>>;

    async fn link(&self, request: Request<Streaming<v1::Up>>) -> Result<Response<Self::LinkStream>, Status> {
        let certificate = request.peer_certs().and_then(|all| all.first().map(|one| one.to_vec()));
        let Some(certificate) = certificate else { return Err(Status::unauthenticated("no certificate")) };
        let (down, frames) = mpsc::unbounded_channel();
        let plane = self.plane.clone();
        plane.change(|state| {
            state.certificates.push(certificate);
            state.down = Some(down);
        });
        plane.send_full();
        let mut up: Streaming<v1::Up> = request.into_inner();
        tokio::spawn(async move {
            while let Some(Ok(v1::Up { frame: Some(frame) })) = up.next().await {
                plane.on_up(frame);
            }
        });
        let frames: std::pin::Pin<Box<dyn Stream<Item = _> + Send>> = Box::pin(UnboundedReceiverStream::new(frames));
        Ok(Response::new(frames))
    }

    async fn renew(&self, request: Request<v1::RenewRequest>) -> Result<Response<v1::EnrollReply>, Status> {
        if request.peer_certs().is_none() {
            return Err(Status::unauthenticated("no certificate"));
        }
        Ok(Response::new(self.authority.sign(&request.into_inner().csr_pem)))
    }
}
