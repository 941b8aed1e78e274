//! The one owner of everything this node knows. Events come in through one door; after each, `host::plan` says what to
//! do, the steps are taken or started, and what has changed is written down and reported.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use clawhq_domain::Millis;
use clawhq_domain::host::{
    self, Act, Burst, Container, Ended, Fault, Have, Init, Op, Owner, Policy, Step as Order, View, kind_of,
};
use clawhq_domain::ids::{InstanceId, NodeId, SlotId, VolumeId};
use clawhq_domain::slot::{Exit, Failure, FailureKind, LOG_TAIL_LINES, SlotReport, SlotState, SlotTarget, Step};
use clawhq_domain::template::{Probe, WarmMode};
use clawhq_init as protocol;
use clawhq_init::{State, ToAgent, ToInit};
use clawhq_proto::{slot_digest, v1};
use futures::StreamExt;
use prost::Message;
use tokio::sync::{Notify, Semaphore, mpsc};
use tokio::task::AbortHandle;
use tokio_util::sync::CancellationToken;

use crate::cgroup::{Cgroup, Hierarchies};
use crate::channels::{Accepted, Channels, Target};
use crate::config::Config;
use crate::ingress::{Route, Routes};
use crate::inits::{Connection, InitEvent, Tickets, Unborn};
use crate::ledger::{LeaseRecord, Ledger, SlotRecord, Spool, redacted};
use crate::link::wall_ms;
use crate::make::{self, Made, MakeError, MakeJob};
use crate::metrics::Counters;
use crate::netns::{Netns, Workers};
use crate::network::{Network, Piece};
use crate::probe;
use crate::runtime::{ContainerRuntime, LABEL_SLOT, LABEL_VOLUME, Listed, LogQuery, Phase, RuntimeEvent};
use crate::volumes::Volumes;
use crate::want::Wanted;

pub const HEARTBEAT: Duration = Duration::from_secs(5);
const FIREWALL_CHECK: Duration = Duration::from_secs(10);
const FIREWALL_PAUSE: Duration = Duration::from_millis(100);
const SWEEP_EVERY: Duration = Duration::from_secs(300);
const RELIST: Duration = Duration::from_secs(60);
const RELIST_SOON: Duration = Duration::from_secs(1);
/// A run that answered and lasted this long is stable: what failed before is forgotten.
const STABLE_MS: Millis = 60_000;
/// Docker tells of a kill for memory apart from the end that it causes.
const MEMORY_NEWS_MS: Millis = 10_000;
const ASK_FULL_EVERY: Duration = Duration::from_secs(5);
/// Without any word about the lease, as when the ledger is lost.
const LEASE_GRACE_MS: i64 = 60_000;
/// While the firewall is not loaded, what waits for it looks again this often.
const FIREWALL_LOOK_MS: Millis = 250;
const TAIL_DEADLINE: Duration = Duration::from_secs(2);
/// Hellos of containers that Docker has not told us about yet.
const STRANGERS_MAX: usize = 256;

pub enum Event {
    Link(LinkEvent),
    Runtime(RuntimeEvent),
    /// Docker's events ended: nothing is known until the next list.
    RuntimeAway(String),
    Listed {
        asked: Instant,
        containers: Vec<Listed>,
    },
    /// The container has an id; its init may dial at any moment.
    Created {
        slot: SlotId,
        op: u64,
        container: String,
    },
    Made {
        slot: SlotId,
        op: u64,
        result: Result<Box<Made>, MakeError>,
    },
    Froze {
        slot: SlotId,
        op: u64,
        result: Result<(), String>,
    },
    Removed {
        slot: SlotId,
        op: u64,
    },
    /// Docker refused to remove it several times, and is asked on.
    Stuck {
        slot: SlotId,
        op: u64,
    },
    Ready {
        slot: SlotId,
        run: u32,
    },
    Tail {
        slot: SlotId,
        run: u32,
        lines: Vec<String>,
    },
    VolumeRemoved(VolumeId),
    RuntimeVersion(String),
    Enrolled(NodeId),
}

pub enum LinkEvent {
    Up {
        session: u64,
        frames: mpsc::UnboundedSender<v1::up::Frame>,
    },
    Down {
        session: u64,
    },
    /// Slots of a whole set that is closed by its `Full`.
    Part(v1::DesiredPart, Instant),
    Full(v1::DesiredSet, Instant),
    TellAll,
    Upsert(Box<v1::SlotDesired>, Instant),
    Ack(u64),
    HeartbeatAck(v1::HeartbeatAck),
    Open(Box<Accepted>),
}

/// What every task of a slot works with.
pub struct Tools {
    pub config: Config,
    pub runtime: Arc<dyn ContainerRuntime>,
    pub network: Network,
    pub volumes: Volumes,
    pub workers: Workers,
    pub hierarchies: Hierarchies,
    pub events: mpsc::Sender<Event>,
    pub counters: Counters,
    /// Asks for a list of containers before it is time for one.
    pub relist: Notify,
    pub data: String,
}

#[derive(Default)]
struct Timing {
    /// When the claim (or the order of a cold slot) arrived.
    began: Option<Instant>,
    /// The end of the last step before the claim is given on.
    lap: Option<Instant>,
    sent: Option<Instant>,
    started: Option<Instant>,
    steps: Vec<Step>,
}

struct Slot {
    want: Option<Wanted>,
    have: Have,
    /// Full sets in a row that did not mention it.
    missed: u8,
    container: Option<String>,
    op: u64,
    /// No list that was asked for before this may say what the container is; none: every list may.
    changed: Option<Instant>,
    cancel: CancellationToken,
    connection: Option<Connection>,
    boot: [u8; 16],
    pid: Option<u32>,
    netns: Option<Netns>,
    cgroup: Cgroup,
    piece: Option<Piece>,
    image_digest: String,
    image_argv: Vec<String>,
    /// The generation of the claim the init holds; ours, and grows with each one sent.
    delivered: u64,
    probe: Option<AbortHandle>,
    route: Option<CancellationToken>,
    failure: Option<Failure>,
    /// The last words of a run are being fetched: the report waits for them.
    tail_of: Option<u32>,
    /// The last run whose end was counted. An init tells of it again whenever it dials.
    ended: u32,
    ended_at: Option<Millis>,
    memory_kills: Option<u64>,
    /// It was killed because it did not answer.
    unready: bool,
    /// When Docker told of a process that was killed for memory, the container's own or a child.
    out_of_memory: Option<Millis>,
    timing: Timing,
    reported: Option<Reported>,
    /// Since when there is something to report that has not been said yet.
    unsaid_since: Option<Millis>,
    saved: Vec<u8>,
    dirty: bool,
}

#[derive(Clone, PartialEq)]
struct Reported {
    generation: i64,
    instance: Option<InstanceId>,
    state: SlotState,
    run: u32,
    failure: Option<FailureKind>,
}

impl Slot {
    fn new(id: SlotId, now: Millis) -> Self {
        Self {
            want: None,
            have: Have::nothing(id, Container::Unknown, now),
            missed: 0,
            container: None,
            op: 0,
            changed: None,
            cancel: CancellationToken::new(),
            connection: None,
            boot: [0; 16],
            pid: None,
            netns: None,
            cgroup: Cgroup::default(),
            piece: None,
            image_digest: String::new(),
            image_argv: Vec::new(),
            delivered: 0,
            probe: None,
            route: None,
            failure: None,
            tail_of: None,
            ended: 0,
            ended_at: None,
            memory_kills: None,
            unready: false,
            out_of_memory: None,
            timing: Timing::default(),
            reported: None,
            unsaid_since: None,
            saved: Vec::new(),
            dirty: true,
        }
    }

    fn record(&self) -> SlotRecord {
        SlotRecord {
            desired: self.want.as_ref().map(|want| redacted(&want.desired)),
            container_id: self.container.clone().unwrap_or_default(),
            piece: self.piece.map(|piece| piece.0),
            run: self.have.run,
            restarted: self.have.restarted,
            assigned: self.have.assigned.map(|id| id.to_string()).unwrap_or_default(),
            ready: self.have.ready,
            failures: self.have.failures,
            gave_up: self.have.gave_up,
            started_at: self.have.started_at,
            image_digest: self.image_digest.clone(),
            image_argv: self.image_argv.clone(),
            volume: self.have.volume.map(|id| id.to_string()).unwrap_or_default(),
            delivered: self.delivered,
            ended: self.ended,
            ready_at: self.have.ready_at,
        }
    }

    fn restore(id: SlotId, record: SlotRecord, now: Millis) -> Self {
        let mut slot = Self::new(id, now);
        slot.saved = record.encode_to_vec();
        slot.want = record.desired.and_then(|desired| Wanted::new(desired, false).ok());
        slot.container = (!record.container_id.is_empty()).then_some(record.container_id);
        slot.piece = record.piece.map(Piece);
        slot.image_digest = record.image_digest;
        slot.image_argv = record.image_argv;
        slot.delivered = record.delivered;
        slot.ended = record.ended;
        slot.have = Have {
            run: record.run,
            restarted: record.restarted,
            assigned: record.assigned.parse().ok(),
            ready: record.ready,
            failures: record.failures,
            gave_up: record.gave_up,
            // Of another boot, or of an agent that wrote the time of day.
            started_at: record.started_at.min(now),
            ready_at: if record.ready_at == 0 { record.started_at } else { record.ready_at }.min(now),
            volume: record.volume.parse().ok(),
            ..slot.have
        };
        slot
    }

    fn stop_probe(&mut self) {
        if let Some(probe) = self.probe.take() {
            probe.abort();
        }
    }

    fn close_route(&mut self) {
        if let Some(gone) = self.route.take() {
            gone.cancel();
        }
    }

    /// The container's process tree is gone, and with it all that hung on it.
    fn went_down(&mut self, now: Millis) {
        self.stop_probe();
        self.close_route();
        (self.connection, self.pid, self.netns) = (None, None, None);
        self.cgroup = Cgroup::default();
        self.have.init = Init::Silent { since: now };
        (self.have.owner, self.have.assigned, self.have.ordered_at) = (None, None, None);
        (self.have.wired, self.have.ready, self.have.frozen, self.have.stale) = (false, false, false, false);
        (self.have.term_at, self.have.kill_at) = (None, None);
    }

    /// Its container ended while an operation went on, when what Docker tells is not listened to.
    fn ended_meanwhile(&mut self, now: Millis) {
        self.went_down(now);
        self.have.container = Container::Ended;
        self.faulted(FailureKind::Runtime, now, "Its container ended at once.".to_owned());
    }

    /// One more fault in a row.
    fn faulted(&mut self, kind: FailureKind, now: Millis, message: String) {
        let count = self.have.fault.map_or(0, |fault| fault.count) + 1;
        self.have.fault = Some(Fault { kind, at: now, count });
        self.failure = Some(failure(kind, message));
    }

    /// Whether it was just told to have run out of memory: a child that did so long ago is not why it ends now.
    fn took_memory(&mut self) -> bool {
        self.out_of_memory.take().is_some_and(|at| boot_ms().saturating_sub(at) < MEMORY_NEWS_MS)
    }

    /// Whether its first process runs: the pid may be somebody else's by now.
    fn lives(&self) -> bool {
        let (Some(pid), Some(container)) = (self.pid, &self.container) else { return false };
        std::fs::read_to_string(format!("/proc/{pid}/cgroup"))
            .is_ok_and(|text| crate::cgroup::container_id(&text) == Some(container.as_str()))
    }

    fn send(&self, frame: &ToInit) -> Result<bool, protocol::ProtocolError> {
        self.connection.as_ref().map_or(Ok(false), |connection| connection.send(frame))
    }
}

/// The hello of an init.
struct Greeting {
    at: Instant,
    container: String,
    pid: u32,
    connection: Connection,
    hello: protocol::Hello,
    /// It was said already that Docker does not know it.
    said: bool,
}

pub struct Agent {
    tools: Arc<Tools>,
    tickets: Tickets,
    channels: Channels,
    routes: Routes,
    ledger: Ledger,
    spool: Spool,
    node: Option<NodeId>,
    slots: BTreeMap<SlotId, Slot>,
    by_container: HashMap<String, SlotId>,
    strangers: VecDeque<Greeting>,
    policy: Policy,
    contacted: bool,
    /// By the parts of a whole set that is still coming.
    mentioned: BTreeSet<SlotId>,
    /// On the boot clock; none: it does not end.
    lease_until: Option<i64>,
    heartbeats: VecDeque<(i64, i64)>,
    link: Option<(u64, mpsc::UnboundedSender<v1::up::Frame>)>,
    facts: v1::NodeFacts,
    runtime_ready: bool,
    next_op: u64,
    asked_full: Option<Instant>,
    wake_at: Option<Millis>,
    /// Claims that come in now.
    burst: Option<Burst>,
    removing_volumes: BTreeSet<VolumeId>,
}

/// Milliseconds since the boot, suspends included: what every decision here is made by.
fn boot_ms() -> Millis {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    now.tv_sec * 1_000 + now.tv_nsec / 1_000_000
}

fn boot_id() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

fn micros(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX)
}

impl Agent {
    #[allow(clippy::too_many_arguments)]
    pub fn new(
        tools: Arc<Tools>,
        tickets: Tickets,
        channels: Channels,
        routes: Routes,
        ledger: Ledger,
        spool: Spool,
        records: Vec<(SlotId, SlotRecord)>,
        facts: v1::NodeFacts,
        node: Option<NodeId>,
    ) -> Self {
        let now = boot_ms();
        let lease_until = match ledger.lease() {
            Some(lease) if lease.until_boot_ms == 0 => None,
            Some(lease) if lease.boot == boot_id() => Some(lease.until_boot_ms),
            // Of another boot: whatever ran then does not run now.
            _ => Some(boot_ms() + LEASE_GRACE_MS),
        };
        let slots: BTreeMap<_, _> =
            records.into_iter().map(|(id, record)| (id, Slot::restore(id, record, now))).collect();
        let by_container = slots.iter().filter_map(|(id, slot)| Some((slot.container.clone()?, *id))).collect();
        let policy = Policy {
            makes_max: tools.config.limits.creates.max(1),
            removes_max: tools.config.limits.removes.max(1),
            ..Policy::default()
        };
        Self {
            tools,
            tickets,
            channels,
            routes,
            ledger,
            spool,
            node,
            slots,
            by_container,
            strangers: VecDeque::new(),
            policy,
            contacted: false,
            mentioned: BTreeSet::new(),
            lease_until,
            heartbeats: VecDeque::new(),
            link: None,
            facts,
            runtime_ready: false,
            next_op: 0,
            asked_full: None,
            wake_at: None,
            burst: None,
            removing_volumes: BTreeSet::new(),
        }
    }

    pub async fn run(
        mut self,
        mut events: mpsc::Receiver<Event>,
        mut inits: mpsc::Receiver<InitEvent>,
        stop: CancellationToken,
    ) {
        let mut heartbeat = tokio::time::interval(HEARTBEAT);
        heartbeat.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        self.turn();
        loop {
            let wake = self.wake_at.map(|at| Duration::from_millis(u64::try_from(at - boot_ms()).unwrap_or(0) + 1));
            tokio::select! {
                biased;
                () = stop.cancelled() => break,
                Some(event) = events.recv() => self.on_event(event),
                Some(event) = inits.recv() => self.on_init(event),
                _ = heartbeat.tick() => self.heartbeat(),
                () = tokio::time::sleep(wake.unwrap_or(Duration::MAX)), if wake.is_some() => {}
            }
            self.turn();
        }
        for slot in self.slots.values_mut() {
            slot.stop_probe();
            slot.close_route();
        }
    }

    // ------------------------------------------------------------------------------------------ events

    fn on_event(&mut self, event: Event) {
        match event {
            Event::Link(event) => self.on_link(event),
            Event::Runtime(event) => self.on_runtime(event),
            Event::RuntimeAway(why) => self.on_away(&why),
            Event::Listed { asked, containers } => self.on_listed(asked, containers),
            Event::Created { slot, op, container } => {
                if let Some(one) = self.current(slot, op) {
                    one.container = Some(container.clone());
                    one.have.container = Container::Made;
                    one.dirty = true;
                    self.by_container.insert(container, slot);
                    // It must be known whose it is before it can say hello.
                    self.write_down(slot);
                }
            }
            Event::Made { slot, op, result } => self.on_made(slot, op, result),
            Event::Froze { slot, op, result } => {
                if let Some(one) = self.current(slot, op) {
                    one.have.op = None;
                    match result {
                        Ok(()) if !one.lives() => one.ended_meanwhile(boot_ms()),
                        Ok(()) => one.have.frozen = true,
                        Err(why) => {
                            tracing::warn!(%slot, why, "a slot could not be frozen");
                            one.failure = Some(failure(FailureKind::Runtime, format!("It could not be frozen: {why}")));
                            one.have.gave_up = Some(u32::MAX);
                        }
                    }
                }
            }
            Event::Removed { slot, op } => self.on_removed(slot, op),
            Event::Stuck { slot, op } => {
                if let Some(one) = self.current(slot, op) {
                    one.have.op = Some(Op::Stuck);
                }
            }
            Event::Ready { slot, run } => self.on_ready(slot, run),
            Event::Tail { slot, run, lines } => {
                if let Some(one) = self.slots.get_mut(&slot)
                    && one.tail_of == Some(run)
                {
                    one.tail_of = None;
                    one.dirty = true;
                    if let Some(failure) = &mut one.failure {
                        failure.log_tail = lines;
                    }
                }
            }
            Event::VolumeRemoved(volume) => {
                self.removing_volumes.remove(&volume);
                self.say(v1::up::Frame::VolumeRemoved(v1::VolumeRemoved { volume_id: volume.to_string() }));
            }
            Event::RuntimeVersion(version) => self.facts.runtime_version = version,
            Event::Enrolled(node) => self.node = Some(node),
        }
    }

    /// The slot, if the operation is its latest.
    fn current(&mut self, slot: SlotId, op: u64) -> Option<&mut Slot> {
        let one = self.slots.get_mut(&slot).filter(|one| one.op == op)?;
        one.dirty = true;
        one.changed = Some(Instant::now());
        Some(one)
    }

    fn on_link(&mut self, event: LinkEvent) {
        match event {
            LinkEvent::Up { session, frames } => {
                self.link = Some((session, frames));
                // The rest of a set that was under way will not come.
                self.mentioned.clear();
                self.tools.counters.linked.set(1);
                let dial = self.ledger.dial().unwrap_or_else(|error| {
                    tracing::warn!(%error, "the number of this dial could not be kept");
                    u64::try_from(wall_ms()).unwrap_or(0)
                });
                self.tools.counters.dials.inc();
                let last_index = self.spool.last_index();
                let facts = v1::NodeFacts { firewall_ready: self.tools.network.is_ready(), ..self.facts.clone() };
                self.say(v1::up::Frame::Opening(v1::Opening { facts: Some(facts), dial, last_index }));
                let pending: Vec<_> = self.spool.pending().cloned().collect();
                pending.into_iter().for_each(|report| self.say(v1::up::Frame::Report(report)));
                self.heartbeat();
            }
            LinkEvent::Down { session } => {
                if self.link.as_ref().is_some_and(|(current, _)| *current == session) {
                    self.link = None;
                    self.tools.counters.linked.set(0);
                }
            }
            LinkEvent::Part(part, at) => self.on_part(part.slots, at),
            LinkEvent::Full(set, at) => self.on_full(set, at),
            LinkEvent::TellAll => {
                for slot in self.slots.values_mut() {
                    slot.reported = None;
                }
            }
            LinkEvent::Upsert(desired, at) => self.on_desired(*desired, at),
            LinkEvent::Ack(index) => self.spool.ack(index),
            LinkEvent::HeartbeatAck(ack) => self.on_lease(&ack),
            LinkEvent::Open(accepted) => self.on_open(*accepted),
        }
    }

    fn on_part(&mut self, slots: Vec<v1::SlotDesired>, at: Instant) {
        for desired in slots {
            if let Ok(slot) = desired.slot_id.parse::<SlotId>() {
                self.mentioned.insert(slot);
            }
            self.on_desired(desired, at);
        }
    }

    fn on_full(&mut self, set: v1::DesiredSet, at: Instant) {
        self.on_part(set.slots, at);
        let mentioned = std::mem::take(&mut self.mentioned);
        let mut vanished = Vec::new();
        for (id, slot) in &mut self.slots {
            if mentioned.contains(id) {
                slot.missed = 0;
            } else if slot.want.is_some() {
                slot.missed += 1;
                vanished.push(*id);
            }
        }
        for slot in vanished {
            let Some(one) = self.slots.get_mut(&slot) else { continue };
            // The set may be a moment older than what came before it: destroying asks twice.
            if one.missed >= 2 {
                tracing::warn!(%slot, "the control plane does not know this slot any more");
                one.want = None;
                one.dirty = true;
            } else {
                self.asked_full = None;
                self.ask_full("a slot is not in the whole set");
            }
        }
        self.contacted = true;
        for volume in set.removed_volumes {
            match volume.parse::<VolumeId>() {
                Ok(volume) => self.remove_volume(volume),
                Err(_) => {
                    self.tools.counters.malformed.inc();
                }
            }
        }
    }

    fn on_desired(&mut self, desired: v1::SlotDesired, at: Instant) {
        let wanted = match Wanted::new(desired, true) {
            Ok(wanted) => wanted,
            Err(malformed) => {
                self.tools.counters.malformed.inc();
                tracing::error!(%malformed, "a desired slot is refused");
                return;
            }
        };
        let id = wanted.view.slot;
        let now = boot_ms();
        let slot = self.slots.entry(id).or_insert_with(|| Slot {
            // Docker has told of every container of ours; until it has, there might be one.
            have: Have::nothing(id, if self.runtime_ready { Container::Absent } else { Container::Unknown }, now),
            ..Slot::new(id, now)
        });
        slot.missed = 0;
        if let Some(known) = &slot.want {
            let newer = wanted.desired.generation > known.desired.generation;
            let same = wanted.desired.generation == known.desired.generation;
            if !newer && (!same || known.view.complete) {
                return;
            }
            if wanted.view.claim.is_some() && known.view.claim.is_none() {
                self.burst = Some(Burst::joined(self.burst, now, &self.policy));
                slot.timing = Timing { began: Some(at), lap: Some(at), ..Timing::default() };
            }
        } else if wanted.view.claim.is_some() {
            slot.timing = Timing { began: Some(at), lap: Some(at), ..Timing::default() };
        }
        let probe =
            wanted.view.complete && slot.want.as_ref().is_some_and(|known| waits_for_warm_up(known, &slot.have));
        slot.want = Some(wanted);
        slot.dirty = true;
        if probe {
            // Its questions are asked from now on.
            slot.have.started_at = now;
            self.start_probe(id);
        }
    }

    fn remove_volume(&mut self, volume: VolumeId) {
        let used = self.slots.values().any(|slot| {
            slot.have.volume == Some(volume) || slot.want.as_ref().is_some_and(|want| want.view.volume == Some(volume))
        });
        if used || !self.removing_volumes.insert(volume) {
            return;
        }
        let tools = self.tools.clone();
        tokio::spawn(async move {
            let mut wait = Duration::from_millis(200);
            while let Err(error) = tools.volumes.destroy(volume).await {
                tracing::warn!(%volume, %error, "a volume could not be removed and is tried again");
                tokio::time::sleep(wait).await;
                wait = (wait * 2).min(Duration::from_secs(60));
            }
            let _ = tools.events.send(Event::VolumeRemoved(volume)).await;
        });
    }

    fn on_lease(&mut self, ack: &v1::HeartbeatAck) {
        // Counted from when the heartbeat was sent: what was on its way cannot be longer than that.
        let Some((_, sent)) = self.heartbeats.iter().find(|(at, _)| *at == ack.at_ms).copied() else { return };
        self.heartbeats.retain(|(at, _)| *at > ack.at_ms);
        let until = match i64::try_from(ack.lease_ms).unwrap_or(i64::MAX) {
            0 => None,
            lease => Some(sent.saturating_add(lease)),
        };
        if until != self.lease_until {
            self.lease_until = until;
            let record = LeaseRecord { boot: boot_id(), until_boot_ms: until.unwrap_or(0) };
            if let Err(error) = self.ledger.save_lease(&record) {
                tracing::warn!(%error, "the lease could not be kept");
            }
        }
    }

    fn lease_held(&self) -> bool {
        self.lease_until.is_none_or(|until| boot_ms() < until)
    }

    fn heartbeat(&mut self) {
        let counters = &self.tools.counters;
        counters.firewall_ready.set(i64::from(self.tools.network.is_ready()));
        counters.runtime_ready.set(i64::from(self.runtime_ready));
        counters.slots.set(self.slots.len() as i64);
        counters.reports_pending.set(self.spool.pending().count() as i64);
        if self.link.is_none() {
            return;
        }
        let wants = || self.slots.values().filter_map(|slot| slot.want.as_ref());
        // Two in one millisecond could not be told apart by their answer.
        let at_ms = self.heartbeats.back().map_or(0, |(at, _)| at + 1).max(wall_ms());
        let beat = v1::Heartbeat {
            at_ms,
            disk_free_mib: self.tools.volumes.free_mib(),
            slots: u32::try_from(wants().count()).unwrap_or(u32::MAX),
            digest: wants().map(|want| slot_digest(want.view.slot, want.desired.generation)).fold(0, u64::wrapping_add),
            firewall_ready: self.tools.network.is_ready(),
            runtime_ready: self.runtime_ready,
        };
        self.heartbeats.push_back((at_ms, boot_ms()));
        if self.heartbeats.len() > 64 {
            self.heartbeats.pop_front();
        }
        self.say(v1::up::Frame::Heartbeat(beat));
    }

    fn say(&mut self, frame: v1::up::Frame) {
        if let Some((_, frames)) = &self.link {
            // A link that has just ended says so itself.
            let _ = frames.send(frame);
        }
    }

    fn ask_full(&mut self, why: &str) {
        if self.link.is_some() && self.asked_full.is_none_or(|at| at.elapsed() >= ASK_FULL_EVERY) {
            self.asked_full = Some(Instant::now());
            self.say(v1::up::Frame::NeedFull(v1::NeedFull { why: why.to_owned() }));
        }
    }

    fn on_open(&mut self, accepted: Accepted) {
        let open = &accepted.open;
        let target = match open.slot_id.parse::<SlotId>().ok().and_then(|id| self.slots.get(&id)) {
            Some(slot)
                if slot.have.assigned.is_some_and(|id| id.to_string() == open.instance_id)
                    || slot.want.as_ref().is_some_and(|want| {
                        want.view.claim.is_some_and(|claim| claim.instance.to_string() == open.instance_id)
                    }) =>
            {
                let process = slot.want.as_ref().and_then(Wanted::process);
                Some(Target {
                    container: slot.container.clone(),
                    runs: slot.have.init == Init::Running && !slot.have.frozen,
                    env: process
                        .map(|process| process.env.iter().map(|(name, value)| (name.clone(), value.clone())).collect())
                        .unwrap_or_default(),
                    cwd: process.map(|process| process.working_dir.clone()).filter(|cwd| !cwd.is_empty()),
                })
            }
            _ => None,
        };
        self.channels.serve(accepted, target, self.tickets.clone(), self.tools.runtime.clone());
    }

    // ------------------------------------------------------------------------------------------ Docker

    fn on_away(&mut self, why: &str) {
        if std::mem::take(&mut self.runtime_ready) {
            tracing::warn!(why, "Docker does not answer; containers are left as they are");
        }
        for slot in self.slots.values_mut() {
            // An init that is connected proves its container.
            if slot.connection.is_none() && slot.have.op.is_none() {
                slot.have.container = Container::Unknown;
            }
        }
    }

    fn on_listed(&mut self, asked: Instant, containers: Vec<Listed>) {
        let now = boot_ms();
        if !std::mem::replace(&mut self.runtime_ready, true) {
            tracing::info!(containers = containers.len(), "Docker answers");
        }
        let mut seen = BTreeSet::new();
        let known: BTreeSet<String> = containers.iter().map(|listed| listed.id.clone()).collect();
        for listed in containers {
            let Some(id) = listed.labels.get(LABEL_SLOT).and_then(|text| text.parse::<SlotId>().ok()) else {
                tracing::warn!(container = listed.id, "a container with our label has no slot and is left alone");
                continue;
            };
            seen.insert(id);
            // One that is not in the ledger: all that is known of it is what Docker says now.
            let slot = self.slots.entry(id).or_insert_with(|| Slot::new(id, now));
            if slot.changed > Some(asked) || slot.have.op.is_some() {
                continue;
            }
            let container = match listed.phase {
                Phase::Made => Container::Made,
                Phase::Up => Container::Up,
                Phase::Ended => Container::Ended,
            };
            if slot.have.container != container {
                slot.dirty = true;
                if container == Container::Ended {
                    slot.went_down(now);
                } else if slot.have.container == Container::Unknown && slot.connection.is_none() {
                    // It is given the time to dial from when it could be seen.
                    slot.have.init = Init::Silent { since: now };
                }
                slot.have.container = container;
            }
            slot.have.volume = listed.labels.get(LABEL_VOLUME).and_then(|text| text.parse().ok()).or(slot.have.volume);
            self.by_container.insert(listed.id.clone(), id);
            slot.container = Some(listed.id);
        }
        for (id, slot) in &mut self.slots {
            if seen.contains(id) || slot.changed > Some(asked) || slot.have.op.is_some() {
                continue;
            }
            if slot.have.container != Container::Absent {
                slot.dirty = true;
                slot.went_down(now);
                slot.have.container = Container::Absent;
                slot.have.volume = None;
                if let Some(container) = slot.container.take() {
                    self.by_container.remove(&container);
                }
            }
        }
        for greeting in std::mem::take(&mut self.strangers) {
            let known = known.contains(&greeting.container) || self.by_container.contains_key(&greeting.container);
            if known || !self.contacted || greeting.at > asked {
                self.on_hello(greeting);
            } else {
                self.turn_away(greeting);
            }
        }
    }

    fn on_runtime(&mut self, event: RuntimeEvent) {
        let (RuntimeEvent::Died { ref id, .. }
        | RuntimeEvent::Started { ref id }
        | RuntimeEvent::OutOfMemory { ref id }
        | RuntimeEvent::Removed { ref id }) = event;
        let Some(slot) = self.by_container.get(id).copied() else { return };
        let Some(one) = self.slots.get_mut(&slot) else { return };
        match event {
            // Ours are started by us, and somebody else's start is seen by the init's hello.
            RuntimeEvent::Started { .. } => {}
            RuntimeEvent::OutOfMemory { .. } => one.out_of_memory = Some(boot_ms()),
            RuntimeEvent::Died { exit_code, .. } => {
                // Seen already; or an earlier process's end, told of late.
                if one.have.op.is_some() || one.have.container == Container::Ended || one.lives() {
                    return;
                }
                let now = boot_ms();
                let asked = one.have.term_at.is_some() || one.have.kill_at.is_some();
                let was_claimed = one.have.assigned.is_some();
                one.dirty = true;
                one.changed = Some(Instant::now());
                one.went_down(now);
                one.have.container = Container::Ended;
                if !asked {
                    let memory = one.took_memory();
                    let (kind, message) = if memory {
                        (FailureKind::OutOfMemory, "It ran out of memory.".to_owned())
                    } else {
                        let code = exit_code.unwrap_or(-1);
                        (FailureKind::Runtime, format!("Its container ended with code {code}."))
                    };
                    one.faulted(kind, now, message);
                    if was_claimed {
                        self.tools.counters.exits.inc();
                        self.fetch_tail(slot);
                    }
                }
            }
            RuntimeEvent::Removed { ref id } => {
                if one.have.op.is_some() || one.container.as_ref() != Some(id) {
                    return;
                }
                one.dirty = true;
                one.changed = Some(Instant::now());
                one.went_down(boot_ms());
                one.have.container = Container::Absent;
                one.have.volume = None;
                one.container = None;
                self.by_container.remove(id);
            }
        }
    }

    fn on_made(&mut self, id: SlotId, op: u64, result: Result<Box<Made>, MakeError>) {
        let now = boot_ms();
        let counters = self.tools.counters.clone();
        let Some(slot) = self.current(id, op) else {
            // A newer operation has taken the slot over; it finds what this one left by its label.
            return;
        };
        slot.have.op = None;
        match result {
            Ok(made) => {
                let made = *made;
                slot.have.container = Container::Up;
                slot.have.wired = true;
                slot.have.frozen = made.frozen;
                // Only what has answered is ever frozen.
                slot.have.ready |= made.frozen;
                slot.pid = Some(made.pid);
                slot.netns = Some(made.netns);
                slot.cgroup = made.cgroup;
                slot.piece = Some(made.piece);
                if let Some(image) = made.image {
                    (slot.image_digest, slot.image_argv) = (image.digest, image.argv);
                }
                if !slot.lives() {
                    return slot.ended_meanwhile(now);
                }
                slot.have.fault = None;
                if slot.connection.is_none() {
                    slot.have.init = Init::Silent { since: now };
                }
                if slot.have.assigned.is_some()
                    && let Some(piece) = slot.piece
                    && let Err(error) = self.tools.network.open(piece)
                {
                    tracing::warn!(slot = %id, %error, "a container could not be let out");
                }
                let Some(slot) = self.slots.get_mut(&id) else { return };
                if made.created {
                    counters.made.inc();
                    counters.make_seconds.observe(made.took.as_secs_f64());
                    slot.timing.steps.extend(made.steps);
                    slot.timing.lap = slot.timing.began.map(|_| Instant::now());
                }
                // It has been running since before we did, and had not answered yet.
                if slot.have.init == Init::Running && !slot.have.ready && slot.probe.is_none() {
                    // Whoever started it did not look any more: it has its time from now on.
                    slot.have.started_at = now;
                    self.start_probe(id);
                }
            }
            Err(MakeError::Cancelled) => {}
            Err(MakeError::Failed { kind, message, container }) => {
                tracing::warn!(slot = %id, kind = kind.code(), message, "a container could not be made");
                counters.make_failures.inc();
                slot.faulted(kind, now, message);
                if let Some(container) = container {
                    slot.have.container = container;
                    if container != Container::Up {
                        slot.went_down(now);
                    }
                }
            }
        }
    }

    fn on_removed(&mut self, id: SlotId, op: u64) {
        let now = boot_ms();
        self.tools.counters.removed.inc();
        let Some(slot) = self.current(id, op) else { return };
        slot.went_down(now);
        let have = &slot.have;
        slot.have = Have {
            run: have.run,
            restarted: have.restarted,
            failures: have.failures,
            gave_up: have.gave_up,
            fault: have.fault,
            ..Have::nothing(id, Container::Absent, now)
        };
        let piece = slot.piece.take();
        if let Some(container) = slot.container.take() {
            self.by_container.remove(&container);
        }
        if let Some(piece) = piece {
            self.tools.network.release(piece);
        }
    }

    // ------------------------------------------------------------------------------------------ inits

    fn on_init(&mut self, event: InitEvent) {
        match event {
            InitEvent::Hello { container, pid, connection, hello } => {
                let known = self.by_container.contains_key(&container);
                self.on_hello(Greeting { at: Instant::now(), container, pid, connection, hello, said: false });
                if !known {
                    self.tools.relist.notify_one();
                }
            }
            InitEvent::Gone { container, connection } => {
                self.strangers.retain(|stranger| stranger.connection.id != connection);
                let Some(slot) = self.slot_of(&container, connection) else { return };
                slot.connection = None;
                slot.have.init = Init::Silent { since: boot_ms() };
                slot.have.ordered_at = None;
            }
            InitEvent::Frame { container, connection, frame } => {
                let Some(id) = self.slot_of(&container, connection).map(|slot| slot.have.slot) else { return };
                self.on_frame(id, frame);
            }
        }
    }

    fn slot_of(&mut self, container: &str, connection: u64) -> Option<&mut Slot> {
        let id = self.by_container.get(container)?;
        let slot = self.slots.get_mut(id)?;
        if slot.connection.as_ref()?.id != connection {
            return None;
        }
        slot.dirty = true;
        Some(slot)
    }

    fn on_hello(&mut self, greeting: Greeting) {
        let Some(id) = self.by_container.get(&greeting.container).copied() else {
            // Docker will tell whose it is, or that it is not ours.
            if self.strangers.len() == STRANGERS_MAX {
                self.strangers.pop_front();
            }
            self.strangers.push_back(greeting);
            return;
        };
        let Greeting { pid, connection, hello, .. } = greeting;
        let tools = self.tools.clone();
        let Some(slot) = self.slots.get_mut(&id) else { return };
        let now = boot_ms();
        slot.dirty = true;
        slot.changed = Some(Instant::now());
        let same_boot = slot.boot == hello.boot || slot.boot == [0; 16];
        if !same_boot {
            // Another init in the same container: it was restarted, and what was known of its process is history.
            slot.stop_probe();
            (slot.have.ready, slot.have.assigned, slot.have.owner) = (false, None, None);
        }
        slot.boot = hello.boot;
        slot.connection = Some(connection);
        slot.have.ordered_at = None;
        slot.have.frozen = false;
        if slot.have.op.is_none() {
            slot.have.container = Container::Up;
        }
        if slot.pid != Some(pid) || slot.netns.is_none() {
            slot.pid = Some(pid);
            slot.netns = Netns::of_pid(pid).ok();
            slot.cgroup = tools.hierarchies.of_pid(pid).unwrap_or_default();
            // Found again after a restart of ours: its cable still lies there.
            slot.have.wired |= slot.netns.is_some() && slot.piece.is_some_and(|piece| tools.network.is_laid(piece));
        }
        match hello.state {
            State::Waiting => {
                (slot.have.owner, slot.have.assigned, slot.have.ready) = (None, None, false);
                slot.have.init = Init::Waiting;
            }
            State::Running { claim_id, run, .. } => {
                self.owned(id, &claim_id, run);
                let Some(slot) = self.slots.get_mut(&id) else { return };
                if !matches!(slot.have.init, Init::Running) {
                    slot.have.init = Init::Running;
                    if slot.have.started_at == 0 {
                        slot.have.started_at = now;
                    }
                }
                if !slot.have.ready && slot.have.wired && slot.probe.is_none() {
                    slot.have.started_at = now;
                    self.start_probe(id);
                }
            }
            State::Exited { claim_id, run, exit, oom } => {
                self.owned(id, &claim_id, run);
                self.on_exit(id, run, exit, oom);
            }
            State::Failed { claim_id, run, errno, step, what } => {
                self.owned(id, &claim_id, run);
                self.on_start_failed(id, run, errno, step, &what);
            }
        }
    }

    /// Docker was asked after it dialled and does not know its container, as when both were killed in the middle of its
    /// start: nobody else would ever end it. One that serves somebody is left to whoever runs this host.
    fn turn_away(&mut self, greeting: Greeting) {
        let Greeting { container, pid, said, .. } = &greeting;
        if matches!(greeting.hello.state, State::Waiting) {
            self.tools.counters.orphans.inc();
            tracing::warn!(container, pid, "an init whose container Docker does not know is ended");
            let _ = greeting.connection.send(&ToInit::Shutdown);
            return;
        }
        if !said {
            tracing::error!(container, pid, "a process runs in a container that Docker does not know");
        }
        // Its connection is kept: hung up on, it would dial again and again.
        self.strangers.push_back(Greeting { said: true, ..greeting });
    }

    /// Whom an init says it serves. It is believed about itself: a wrong answer only costs its own container.
    fn owned(&mut self, id: SlotId, claim_id: &str, run: u32) {
        let Some(slot) = self.slots.get_mut(&id) else { return };
        let owner = if claim_id == id.to_string() {
            Owner::Slot
        } else {
            claim_id.parse().map_or(Owner::Stranger, Owner::Instance)
        };
        slot.have.owner = Some(owner);
        if let Owner::Instance(instance) = owner {
            slot.have.assigned = Some(instance);
        }
        slot.have.run = slot.have.run.max(run);
    }

    fn on_frame(&mut self, id: SlotId, frame: ToAgent) {
        match frame {
            ToAgent::Started(started) => {
                self.owned(id, &started.claim_id, started.run);
                let Some(slot) = self.slots.get_mut(&id) else { return };
                slot.have.ordered_at = None;
                // Said again, as the answer to a claim that only replaced the one it holds.
                if slot.have.init == Init::Running && slot.timing.sent.is_none() {
                    return;
                }
                slot.have.init = Init::Running;
                slot.have.started_at = boot_ms();
                (slot.have.ready, slot.unready) = (false, false);
                (slot.have.term_at, slot.have.kill_at) = (None, None);
                slot.memory_kills = slot.cgroup.memory_kills();
                if let Some(sent) = slot.timing.sent.take() {
                    slot.timing.steps.push(Step { name: "started".to_owned(), micros: micros(sent) });
                }
                slot.timing.started = Some(Instant::now());
                self.start_probe(id);
            }
            ToAgent::Exited { claim_id, run, exit, oom } => {
                self.owned(id, &claim_id, run);
                self.on_exit(id, run, exit, oom);
            }
            ToAgent::StartFailed { claim_id, run, errno, step: protocol::Step::Claim, what } => {
                let Some(slot) = self.slots.get_mut(&id) else { return };
                tracing::warn!(slot = %id, claim_id, run, errno, what, "an init refused a frame");
                slot.have.ordered_at = None;
                match errno {
                    // It serves somebody we did not know of.
                    nix::libc::EBUSY if slot.have.init == Init::Waiting => slot.have.owner = Some(Owner::Stranger),
                    nix::libc::ESTALE => {
                        slot.have.run = slot.have.run.saturating_add(1);
                        slot.delivered = slot.delivered.saturating_add(1);
                    }
                    // Asked again no sooner than an unanswered frame would be.
                    _ => slot.have.ordered_at = Some(boot_ms()),
                }
            }
            ToAgent::StartFailed { claim_id, run, errno, step, what } => {
                self.owned(id, &claim_id, run);
                self.on_start_failed(id, run, errno, step, &what);
            }
            ToAgent::FilesWritten { errno, what, .. } => {
                if errno != 0 {
                    let error = std::io::Error::from_raw_os_error(errno);
                    tracing::warn!(slot = %id, what, %error, "a file could not be given to a running app");
                    if let Some(slot) = self.slots.get_mut(&id) {
                        slot.failure = Some(failure(FailureKind::Volume, format!("{what}: {error}")));
                        slot.have.gave_up = Some(slot.have.restarted);
                    }
                }
            }
            ToAgent::Pong => {}
            ToAgent::Hello(_) | ToAgent::ExecHello { .. } => {
                tracing::warn!(slot = %id, "an init said hello twice on one connection");
            }
        }
    }

    fn on_start_failed(&mut self, id: SlotId, run: u32, errno: i32, step: protocol::Step, what: &str) {
        let error = std::io::Error::from_raw_os_error(errno);
        let (how, message) = match step {
            protocol::Step::Exec => (Ended::NoCommand, format!("{what} cannot be started: {error}.")),
            protocol::Step::Cwd => (Ended::NoCommand, format!("The working directory {what}: {error}.")),
            protocol::Step::File => (Ended::NoFile, format!("The file {what} cannot be written: {error}.")),
            protocol::Step::Claim | protocol::Step::Ids | protocol::Step::Spawn => {
                (Ended::NoRoom, format!("The process cannot be made: {error}."))
            }
        };
        self.ended(id, run, how, message, None);
    }

    fn on_exit(&mut self, id: SlotId, run: u32, exit: protocol::Exit, oom: protocol::Oom) {
        let Some(slot) = self.slots.get_mut(&id) else { return };
        let kills = slot.cgroup.memory_kills();
        let memory = match oom {
            protocol::Oom::Yes => true,
            protocol::Oom::No => false,
            protocol::Oom::Unknown => {
                slot.took_memory() || slot.memory_kills.zip(kills).is_some_and(|(before, after)| after > before)
            }
        };
        let exit = match exit {
            _ if memory => Exit::OutOfMemory,
            protocol::Exit::Code(code) => Exit::Code(i32::from(code)),
            protocol::Exit::Signal(signal) => Exit::Signal(i32::from(signal)),
        };
        let (how, message) = match &exit {
            _ if slot.unready => (Ended::NotReady, "It did not answer within its start deadline.".to_owned()),
            Exit::OutOfMemory => (Ended::Exited(exit.clone()), "It ran out of memory.".to_owned()),
            Exit::Code(code) => (Ended::Exited(exit.clone()), format!("It exited with code {code}.")),
            Exit::Signal(signal) => (Ended::Exited(exit.clone()), format!("It was ended by signal {signal}.")),
        };
        self.ended(id, run, how, message, Some(exit));
    }

    fn ended(&mut self, id: SlotId, run: u32, how: Ended, message: String, exit: Option<Exit>) {
        let Some(slot) = self.slots.get_mut(&id) else { return };
        if run < slot.have.run || matches!(slot.have.init, Init::Ended { .. }) && slot.have.ordered_at.is_none() {
            return;
        }
        slot.stop_probe();
        slot.close_route();
        slot.have.ordered_at = None;
        slot.timing.sent = None;
        let now = boot_ms();
        let known = slot.ended >= run;
        let asked = slot.have.term_at.is_some() || slot.have.kill_at.is_some() && !slot.unready;
        let stable = slot.have.ready && now.saturating_sub(slot.have.started_at) >= STABLE_MS;
        let kind = kind_of(&how);
        let at = slot.ended_at.filter(|_| known).unwrap_or(now);
        slot.have.init = Init::Ended { at, how };
        slot.have.ready = false;
        // So that the plan can tell a run that was ended from one that ended.
        slot.have.term_at = asked.then_some(now);
        slot.have.kill_at = None;
        slot.unready = false;
        (slot.ended, slot.ended_at) = (run.max(slot.ended), Some(at));
        if asked {
            return;
        }
        slot.failure = Some(Failure { kind, message, exit, log_tail: Vec::new() });
        if !known {
            slot.have.failures = if stable { 1 } else { slot.have.failures.saturating_add(1) };
            self.tools.counters.exits.inc();
        }
        self.fetch_tail(id);
    }

    fn fetch_tail(&mut self, id: SlotId) {
        let Some(slot) = self.slots.get_mut(&id) else { return };
        let Some(container) = slot.container.clone() else { return };
        let run = slot.have.run;
        slot.tail_of = Some(run);
        let tools = self.tools.clone();
        tokio::spawn(async move {
            let fetch = async {
                // What was written last may still be in Docker's pipe.
                for pause in [20, 100, 300] {
                    tokio::time::sleep(Duration::from_millis(pause)).await;
                    let query = LogQuery {
                        follow: false,
                        since_ms: 0,
                        tail: Some(LOG_TAIL_LINES as u32),
                        stdout: true,
                        stderr: true,
                    };
                    let lines: Vec<String> = tools
                        .runtime
                        .logs(&container, query)
                        .take(LOG_TAIL_LINES)
                        .filter_map(async |line| {
                            let line = line.ok()?;
                            Some(String::from_utf8_lossy(&line.line[..line.line.len().min(512)]).into_owned())
                        })
                        .collect()
                        .await;
                    if !lines.is_empty() {
                        return lines;
                    }
                }
                Vec::new()
            };
            let lines = tokio::time::timeout(TAIL_DEADLINE, fetch).await.unwrap_or_default();
            let _ = tools.events.send(Event::Tail { slot: id, run, lines }).await;
        });
    }

    fn start_probe(&mut self, id: SlotId) {
        let Some(slot) = self.slots.get_mut(&id) else { return };
        slot.stop_probe();
        let (Some(want), Some(netns)) = (&slot.want, slot.netns.clone()) else { return };
        let (probe, run, tools) = (want.probe.clone(), slot.have.run, self.tools.clone());
        if probe == Probe::Started {
            return self.on_ready(id, run);
        }
        if waits_for_warm_up(want, &slot.have) {
            return;
        }
        // Only before it is somebody's: a claim does not wait for what was to be loaded before it.
        let process = want.process().filter(|_| want.view.claim.is_none());
        let warm_ups: Vec<_> = process
            .into_iter()
            .flat_map(|process| process.warm_up.iter().filter_map(|one| probe::Request::warm_up(one, process)))
            .collect();
        let task = tokio::spawn(async move {
            probe::until_ready(&tools.workers, &netns, &probe).await;
            probe::warm_up(&tools.workers, &netns, &warm_ups).await;
            let _ = tools.events.send(Event::Ready { slot: id, run }).await;
        });
        slot.probe = Some(task.abort_handle());
    }

    fn on_ready(&mut self, id: SlotId, run: u32) {
        let Some(slot) = self.slots.get_mut(&id) else { return };
        if slot.have.run != run || slot.have.init != Init::Running {
            return;
        }
        slot.dirty = true;
        slot.probe = None;
        slot.have.ready = true;
        slot.have.ready_at = boot_ms();
        slot.have.fault = None;
        slot.failure = None;
        if let Some(started) = slot.timing.started.take() {
            slot.timing.steps.push(Step { name: "ready".to_owned(), micros: micros(started) });
        }
        if let Some(began) = slot.timing.began.take() {
            self.tools.counters.claim_seconds.observe(began.elapsed().as_secs_f64());
        }
    }

    // ------------------------------------------------------------------------------------------ turns

    fn turn(&mut self) {
        // Steps change what is known, so that others follow: a handful of rounds, never a loop without end.
        for _ in 0..8 {
            let slots = self.slots.values().map(|slot| (slot.want.as_ref().map(|want| &want.view), Some(&slot.have)));
            let view = View {
                slots: slots.collect(),
                contacted: self.contacted,
                lease_held: self.lease_held(),
                burst: self.burst,
            };
            let plan = host::plan(&view, boot_ms(), &self.policy);
            self.wake_at = plan.wake_at;
            let mut took_any = false;
            for step in plan.steps {
                // A tenant's process does not start before it is walled in. Looked at again soon, for nobody else tells.
                let starts = matches!(step.act, Act::Deliver { .. } | Act::Run { .. } | Act::Assign { .. });
                if starts && !self.tools.network.is_ready() {
                    let soon = boot_ms() + FIREWALL_LOOK_MS;
                    self.wake_at = Some(self.wake_at.map_or(soon, |known| known.min(soon)));
                    continue;
                }
                if step.act == Act::AskFull {
                    self.ask_full(step.why);
                    continue;
                }
                took_any = true;
                tracing::debug!(slot = %step.slot, act = ?step.act, why = step.why, "step");
                self.take(&step);
            }
            if !took_any {
                break;
            }
        }
        // The end of a lease is not a time of the plan's.
        if let Some(until) = self.lease_until.filter(|until| *until > boot_ms()) {
            self.wake_at = Some(self.wake_at.map_or(until, |known| known.min(until)));
        }
        self.publish();
    }

    /// Writes down, routes and reports what has changed.
    fn publish(&mut self) {
        let dirty: Vec<SlotId> =
            self.slots.iter_mut().filter_map(|(id, slot)| std::mem::take(&mut slot.dirty).then_some(*id)).collect();
        for id in dirty {
            self.route(id);
            self.report(id);
            self.write_down(id);
        }
        // States that change with time alone, or with the lease.
        let rest: Vec<SlotId> = self.slots.keys().copied().collect();
        for id in rest {
            self.report(id);
        }
    }

    fn write_down(&mut self, id: SlotId) {
        let Some(slot) = self.slots.get_mut(&id) else { return };
        let record = slot.record().encode_to_vec();
        if record != slot.saved {
            match self.ledger.save(id, &record) {
                Ok(()) => slot.saved = record,
                Err(error) => tracing::error!(slot = %id, %error, "the ledger could not be written"),
            }
        }
    }

    fn route(&mut self, id: SlotId) {
        let Some(slot) = self.slots.get_mut(&id) else { return };
        let claim = slot.want.as_ref().filter(|want| want.view.target == SlotTarget::Present).and_then(|want| {
            let claim = want.view.claim.filter(|claim| slot.have.assigned == Some(claim.instance))?;
            let _ = claim;
            want.desired.claim.as_ref()
        });
        let open = slot.have.init == Init::Running && !slot.have.frozen;
        match (claim, &slot.netns) {
            (Some(claim), Some(netns)) if open => {
                let ports: Vec<u16> = claim.ports.iter().filter_map(|port| u16::try_from(*port).ok()).collect();
                let gone = slot.route.get_or_insert_with(CancellationToken::new).clone();
                let mut routes = self.routes.write();
                let seats = match routes.get(&id) {
                    Some(route) => route.seats.clone(),
                    None => Arc::new(Semaphore::new(self.tools.config.limits.ingress_connections_per_slot)),
                };
                routes.insert(id, Route { netns: netns.clone(), ports, seats, gone });
            }
            _ => {
                self.routes.write().remove(&id);
                slot.close_route();
            }
        }
    }

    fn report(&mut self, id: SlotId) {
        let lease_held = self.lease_held();
        let Some(slot) = self.slots.get_mut(&id) else { return };
        let Some(want) = &slot.want else { return };
        let Some(state) = host::observe(&want.view, &slot.have, lease_held, boot_ms(), &self.policy) else { return };
        if slot.tail_of.is_some() && state != SlotState::Absent {
            return;
        }
        let shows_failure = matches!(state, SlotState::Failed | SlotState::Restarting | SlotState::Creating);
        let failure = slot.failure.clone().filter(|_| shows_failure);
        let now = Reported {
            generation: want.desired.generation,
            instance: want.view.claim.map(|claim| claim.instance),
            state,
            run: slot.have.run,
            failure: failure.as_ref().map(|failure| failure.kind),
        };
        if slot.reported.as_ref() == Some(&now) {
            slot.unsaid_since = None;
            return;
        }
        let since = *slot.unsaid_since.get_or_insert_with(boot_ms);
        if let Err(at) = host::worth_saying(slot.reported.as_ref().map(|said| said.state), state, since, boot_ms()) {
            self.wake_at = Some(self.wake_at.map_or(at, |known| known.min(at)));
            return;
        }
        slot.unsaid_since = None;
        let steps = if state == SlotState::Running { std::mem::take(&mut slot.timing.steps) } else { Vec::new() };
        let report = SlotReport {
            slot: id,
            generation: now.generation,
            instance: now.instance,
            state,
            run: now.run,
            container: slot.container.clone(),
            image_digest: (!slot.image_digest.is_empty()).then(|| slot.image_digest.clone()),
            failure,
            steps,
            at: wall_ms(),
        };
        slot.reported = Some(now);
        let report = self.spool.push(report.into());
        self.say(v1::up::Frame::Report(report));
        let running = self
            .slots
            .values()
            .filter(|slot| slot.reported.as_ref().is_some_and(|reported| reported.state == SlotState::Running));
        self.tools.counters.running.set(running.count() as i64);
    }

    // ------------------------------------------------------------------------------------------ steps

    fn take(&mut self, step: &Order) {
        let id = step.slot;
        let now = boot_ms();
        self.next_op += 1;
        let op = self.next_op;
        let slot = self
            .slots
            .entry(id)
            .or_insert_with(|| Slot { have: Have::nothing(id, Container::Absent, now), ..Slot::new(id, now) });
        slot.dirty = true;
        match step.act.clone() {
            Act::Make => self.make(id, op),
            Act::CancelMake => {
                slot.cancel.cancel();
                slot.have.op = Some(Op::Unmake);
            }
            Act::Remove => self.remove(id, op),
            Act::Forget => self.forget(id),
            Act::Terminate => {
                slot.have.term_at = Some(now);
                self.signal(id, false);
            }
            Act::Kill => {
                slot.have.kill_at = Some(now);
                self.signal(id, true);
            }
            Act::KillUnready => {
                slot.have.kill_at = Some(now);
                slot.unready = true;
                self.signal(id, true);
            }
            Act::GiveUp(kind) => {
                slot.have.gave_up =
                    Some(slot.want.as_ref().and_then(|want| want.view.claim).map_or(0, |claim| claim.restart));
                let last = slot.failure.get_or_insert_with(|| failure(kind, step.why.to_owned()));
                last.kind = kind;
                tracing::warn!(slot = %id, kind = kind.code(), message = last.message, "given up");
            }
            Act::Deliver { run, restart } => self.deliver(id, run, restart),
            Act::Run { run, restart } => self.run_again(id, run, restart),
            Act::Assign { instance } => self.assign(id, instance),
            Act::Freeze => {
                slot.op = op;
                slot.have.op = Some(Op::Freeze);
                let (cgroup, events) = (slot.cgroup.clone(), self.tools.events.clone());
                tokio::task::spawn_blocking(move || {
                    let result = cgroup.freeze().map_err(|error| error.to_string());
                    let _ = events.blocking_send(Event::Froze { slot: id, op, result });
                });
            }
            Act::Thaw => {
                match slot.cgroup.thaw() {
                    Ok(()) => slot.have.frozen = false,
                    Err(error) => {
                        tracing::error!(slot = %id, %error, "a slot could not be thawed");
                        slot.failure = Some(failure(FailureKind::Runtime, format!("It could not be thawed: {error}.")));
                        slot.have.gave_up = Some(u32::MAX);
                    }
                }
                // It could not dial while it was frozen.
                if slot.connection.is_none() {
                    slot.have.init = Init::Silent { since: now };
                }
            }
            Act::AskFull => {}
        }
    }

    fn make(&mut self, id: SlotId, op: u64) {
        let Some(slot) = self.slots.get_mut(&id) else { return };
        let Some(want) = &slot.want else { return };
        let Some(spec) = want.spec() else { return };
        slot.op = op;
        slot.changed = Some(Instant::now());
        slot.cancel = CancellationToken::new();
        slot.have.op = Some(Op::Make);
        slot.have.volume = want.view.volume;
        let job = MakeJob {
            slot: id,
            op,
            node: self.node,
            spec: v1::SlotSpec { pool_process: None, ..spec.clone() },
            volume: want.view.volume,
            container: slot.container.clone().filter(|_| slot.have.container != Container::Absent),
            phase: slot.have.container,
            piece: slot.piece,
            knows_image: !slot.image_argv.is_empty() || !slot.image_digest.is_empty(),
        };
        let (tools, cancel) = (self.tools.clone(), slot.cancel.clone());
        tokio::spawn(async move {
            let result = make::make(&tools, job, cancel).await;
            let _ = tools.events.send(Event::Made { slot: id, op, result: result.map(Box::new) }).await;
        });
    }

    fn remove(&mut self, id: SlotId, op: u64) {
        let Some(slot) = self.slots.get_mut(&id) else { return };
        slot.op = op;
        slot.changed = Some(Instant::now());
        slot.have.op = Some(Op::Remove);
        slot.stop_probe();
        slot.close_route();
        self.routes.write().remove(&id);
        // A frozen process cannot even be killed.
        let _ = slot.cgroup.thaw();
        (slot.netns, slot.connection) = (None, None);
        let (container, piece, volume) = (slot.container.clone(), slot.piece, slot.have.volume);
        let tools = self.tools.clone();
        tokio::spawn(async move {
            let stuck = async || drop(tools.events.send(Event::Stuck { slot: id, op }).await);
            make::unmake(&tools, container, piece, volume, stuck).await;
            let _ = tools.events.send(Event::Removed { slot: id, op }).await;
        });
    }

    fn forget(&mut self, id: SlotId) {
        self.report(id);
        let Some(slot) = self.slots.remove(&id) else { return };
        self.routes.write().remove(&id);
        if let Some(container) = &slot.container {
            self.by_container.remove(container);
        }
        if let Some(piece) = slot.piece {
            let tools = self.tools.clone();
            tokio::spawn(async move { make::unmake(&tools, None, Some(piece), None, async || ()).await });
        }
        if let Err(error) = self.ledger.remove(id) {
            tracing::warn!(slot = %id, %error, "a ledger entry could not be removed");
        }
    }

    fn signal(&mut self, id: SlotId, kill: bool) {
        let Some(slot) = self.slots.get_mut(&id) else { return };
        if slot.have.frozen {
            let _ = slot.cgroup.thaw();
            slot.have.frozen = false;
        }
        let frame = if kill { ToInit::Kill } else { ToInit::Signal { signo: nix::libc::SIGTERM as u8 } };
        if slot.send(&frame).unwrap_or(false) {
            return;
        }
        // Its init does not listen: it is told by the kernel, and ends with its process.
        let Some(container) = slot.container.clone() else { return };
        let signal = if kill { nix::sys::signal::Signal::SIGKILL } else { nix::sys::signal::Signal::SIGTERM };
        let ours = slot.pid.filter(|_| slot.lives());
        if let Some(pid) = ours.and_then(|pid| i32::try_from(pid).ok()) {
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), signal);
            return;
        }
        let tools = self.tools.clone();
        tokio::spawn(async move {
            if let Err(error) = tools.runtime.kill(&container, signal.as_str()).await {
                tracing::warn!(slot = %id, %error, "a container could not be signalled");
            }
        });
    }

    /// The claim for the init, from what is wanted now.
    fn claim(slot: &mut Slot, run: u32) -> Option<protocol::Claim> {
        let want = slot.want.as_ref()?;
        let (spec, process) = (want.spec()?, want.process()?);
        let claim_id = match want.view.claim {
            Some(claim) if !want.is_app() => claim.instance.to_string(),
            _ => want.view.slot.to_string(),
        };
        slot.delivered += 1;
        let argv = if process.argv.is_empty() { slot.image_argv.clone() } else { process.argv.clone() };
        Some(protocol::Claim {
            claim_id,
            generation: slot.delivered,
            run,
            argv,
            env: process.env.iter().map(|(name, value)| (name.clone(), value.clone())).collect(),
            inherit_env: true,
            cwd: Some(process.working_dir.clone()).filter(|cwd| !cwd.is_empty()),
            uid: spec.uid,
            gid: spec.gid,
            files: files(&process.files),
            stop_signal: 0,
        })
    }

    fn deliver(&mut self, id: SlotId, run: u32, restart: u32) {
        let tools = self.tools.clone();
        let Some(slot) = self.slots.get_mut(&id) else { return };
        let claimed = slot.want.as_ref().and_then(|want| want.view.claim);
        slot.have.run = run;
        slot.have.restarted = restart;
        slot.have.ordered_at = Some(boot_ms());
        slot.have.assigned = claimed.map(|claim| claim.instance);
        slot.have.stale = false;
        slot.have.gave_up = None;
        (slot.have.term_at, slot.have.kill_at) = (None, None);
        let Some(claim) = Self::claim(slot, run) else {
            slot.failure = Some(failure(FailureKind::Internal, "There is no process to start.".to_owned()));
            slot.have.gave_up = Some(restart);
            return;
        };
        if claim.argv.is_empty() {
            slot.failure =
                Some(failure(FailureKind::Command, "The image has no command of its own: give one.".to_owned()));
            slot.have.gave_up = Some(restart);
            return;
        }
        // Whose it is is on the disk before it can be anybody's.
        self.write_down(id);
        let Some(slot) = self.slots.get_mut(&id) else { return };
        if claimed.is_some() {
            tools.counters.claims.inc();
            if let Some(piece) = slot.piece
                && let Err(error) = tools.network.open(piece)
            {
                tracing::warn!(slot = %id, %error, "a container could not be let out");
            }
        }
        if let Some(lap) = slot.timing.lap.take() {
            slot.timing.steps.push(Step { name: "claim".to_owned(), micros: micros(lap) });
        }
        slot.timing.sent = Some(Instant::now());
        Self::order(slot, id, &ToInit::Claim(claim), restart);
    }

    fn run_again(&mut self, id: SlotId, run: u32, restart: u32) {
        let Some(slot) = self.slots.get_mut(&id) else { return };
        let Some(want) = &slot.want else { return };
        let claim_id = match want.view.claim {
            Some(claim) if !want.is_app() => claim.instance.to_string(),
            _ => id.to_string(),
        };
        let complete = want.view.complete;
        slot.have.run = run;
        slot.have.restarted = restart;
        slot.have.ordered_at = Some(boot_ms());
        slot.have.gave_up = None;
        slot.have.stale = false;
        slot.unready = false;
        self.write_down(id);
        let Some(slot) = self.slots.get_mut(&id) else { return };
        slot.timing.sent = Some(Instant::now());
        // What is wanted may have changed since the init was told, and so may which files are there.
        if complete && let Some(claim) = Self::claim(slot, run) {
            Self::order(slot, id, &ToInit::Claim(claim), restart);
        }
        Self::order(slot, id, &ToInit::Run { claim_id, run }, restart);
    }

    fn order(slot: &mut Slot, id: SlotId, frame: &ToInit, restart: u32) {
        match slot.send(frame) {
            Ok(true) => {}
            // Its connection is ending; the next hello starts over.
            Ok(false) => tracing::debug!(slot = %id, "an init does not read"),
            Err(error) => {
                slot.failure = Some(failure(FailureKind::Command, format!("It cannot be started as asked: {error}.")));
                slot.have.gave_up = Some(restart);
            }
        }
    }

    fn assign(&mut self, id: SlotId, instance: InstanceId) {
        let tools = self.tools.clone();
        let Some(slot) = self.slots.get_mut(&id) else { return };
        let Some(want) = &slot.want else { return };
        let (restart, warm) = (want.view.claim.map_or(0, |claim| claim.restart), want.view.warm);
        let own_process = want.desired.claim.as_ref().is_some_and(|claim| claim.process.is_some());
        let reload = want.desired.claim.as_ref().map_or(0, |claim| claim.reload_signal);
        slot.have.assigned = Some(instance);
        slot.have.restarted = restart;
        tools.counters.claims.inc();
        self.write_down(id);
        let Some(slot) = self.slots.get_mut(&id) else { return };
        if let Some(piece) = slot.piece
            && let Err(error) = tools.network.open(piece)
        {
            tracing::warn!(slot = %id, %error, "a container could not be let out");
        }
        if let Some(lap) = slot.timing.lap.take() {
            slot.timing.steps.push(Step { name: "claim".to_owned(), micros: micros(lap) });
        }
        let thaw = Instant::now();
        if let Err(error) = slot.cgroup.thaw() {
            tracing::error!(slot = %id, %error, "a slot could not be thawed");
            slot.failure = Some(failure(FailureKind::Runtime, format!("It could not be thawed: {error}.")));
            slot.have.gave_up = Some(restart);
            return;
        }
        if std::mem::take(&mut slot.have.frozen) {
            slot.timing.steps.push(Step { name: "thawed".to_owned(), micros: micros(thaw) });
        }
        slot.have.started_at = boot_ms();
        slot.have.ready = false;
        slot.timing.started = Some(Instant::now());
        match warm {
            WarmMode::App if own_process => {
                let Some(want) = &slot.want else { return };
                let (uid, gid) = want.spec().map_or((0, 0), |spec| (spec.uid, spec.gid));
                let files = want.process().map(|process| files(&process.files)).unwrap_or_default();
                let give = ToInit::Files { request: 1, claim_id: id.to_string(), uid, gid, files };
                Self::order(slot, id, &give, restart);
                let signo = if (1..=64).contains(&reload) { reload as u8 } else { nix::libc::SIGHUP as u8 };
                Self::order(slot, id, &ToInit::Signal { signo }, restart);
            }
            // It wants something else run: the warm one ends, and the init starts that.
            WarmMode::Frozen if own_process => {
                slot.have.stale = true;
                return;
            }
            _ => {}
        }
        self.start_probe(id);
    }
}

/// A pool's app that runs and has not been ready, known from the ledger alone: that does not say what it is to be asked before
/// it is. The whole set does.
fn waits_for_warm_up(want: &Wanted, have: &Have) -> bool {
    let unclaimed = want.view.claim.is_none() && want.is_app();
    unclaimed && !want.view.complete && have.init == Init::Running && !have.ready
}

fn files(files: &[v1::File]) -> Vec<protocol::File> {
    let one = |file: &v1::File| protocol::File {
        path: file.path.clone(),
        mode: file.mode & 0o7777,
        bytes: file.content.clone(),
        secret: file.secret,
        only_if_absent: file.only_if_absent,
    };
    files.iter().map(one).collect()
}

fn failure(kind: FailureKind, message: String) -> Failure {
    Failure { kind, message, exit: None, log_tail: Vec::new() }
}

/// Watches the runtime: its events while it answers, and lists of its containers: when the events begin anew, a second
/// later, whenever one is asked for, and every minute.
pub async fn watch_runtime(tools: Arc<Tools>, stop: CancellationToken) {
    let mut wait = Duration::from_millis(100);
    loop {
        let mut events = tools.runtime.events();
        let mut list_at = tokio::time::Instant::now();
        // The events are only subscribed to when they are first waited for. What happens between the first list and that
        // is seen by the second one.
        let mut lists = 0_u64;
        let why = loop {
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep_until(list_at) => {
                    let init_dir = tools.config.init_dir();
                    let unborn = tokio::task::spawn_blocking(move || Unborn::all(&init_dir)).await.unwrap_or_default();
                    let asked = Instant::now();
                    match tools.runtime.list().await {
                        Ok(containers) => {
                            end_unborn(&tools, &unborn, &containers);
                            wait = Duration::from_millis(100);
                            lists += 1;
                            list_at = tokio::time::Instant::now() + if lists == 1 { RELIST_SOON } else { RELIST };
                            let _ = tools.events.send(Event::Listed { asked, containers }).await;
                        }
                        Err(error) => break error.to_string(),
                    }
                }
                () = tools.relist.notified() => list_at = list_at.min(tokio::time::Instant::now() + RELIST_SOON),
                event = events.next() => match event {
                    Some(Ok(event)) => {
                        let _ = tools.events.send(Event::Runtime(event)).await;
                    }
                    Some(Err(error)) => break error.to_string(),
                    None => break "its events ended".to_owned(),
                },
            }
        };
        let _ = tools.events.send(Event::RuntimeAway(why)).await;
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(wait) => {}
        }
        wait = (wait * 2).min(Duration::from_secs(5));
    }
}

/// Ends what Docker was killed in the middle of: their containers were not there when it was asked afterwards.
fn end_unborn(tools: &Tools, unborn: &[Unborn], containers: &[Listed]) {
    for one in unborn.iter().filter(|one| containers.iter().all(|listed| listed.id != one.container)) {
        if one.end(&tools.config.init_dir()) {
            tools.counters.orphans.inc();
            tracing::warn!(
                container = one.container,
                pid = one.pid,
                "a half-started container that Docker does not know is ended"
            );
        }
    }
}

/// Loads the firewall, then looks whether it is still what was loaded: at once when somebody changed a table, and every ten
/// seconds. Sweeps leftovers.
pub async fn watch_network(tools: Arc<Tools>, stop: CancellationToken) {
    let mut swept_at = None::<Instant>;
    let mut check = tokio::time::interval(FIREWALL_CHECK);
    let mut loaded = tools.network.is_ready();
    let mut changes = tools.network.changes().unwrap_or_else(|error| {
        tracing::warn!(%error, "the kernel does not tell of changes to its tables: they are looked at every ten seconds alone");
        None
    });
    let mut changed = async || match &mut changes {
        Some(changes) => changes.next().await,
        None => std::future::pending().await,
    };
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = check.tick() => {}
            told = changed() => if let Err(error) = told {
                tracing::warn!(%error, "changes to the kernel's tables could not be read");
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }
        let result = if loaded { tools.network.verify().await } else { tools.network.load().await.map(|()| true) };
        match result {
            Ok(same) => {
                if !same {
                    tools.counters.firewall_mended.inc();
                    tracing::error!("the firewall was not as loaded, and was loaded again");
                }
                loaded = true;
            }
            Err(error) => tracing::error!(%error, "the firewall cannot be loaded: no container gets a network"),
        }
        if swept_at.is_none_or(|at| at.elapsed() >= SWEEP_EVERY) {
            swept_at = Some(Instant::now());
            match tools.network.sweep().await {
                Ok(0) => {}
                Ok(swept) => {
                    tools.counters.swept.inc_by(swept as u64);
                    tracing::info!(swept, "stray interfaces removed");
                }
                Err(error) => tracing::warn!(%error, "stray interfaces could not be looked for"),
            }
        }
        // Whoever changes tables all the time costs us a look now and then, not all of it.
        tokio::time::sleep(FIREWALL_PAUSE).await;
    }
}

#[cfg(test)]
mod tests;
