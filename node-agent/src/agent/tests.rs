//! What the agent makes of what the control plane says, with a Docker that never answers and without a network.

use std::sync::Arc;

use async_trait::async_trait;
use clawhq_runtime::metrics::Metrics;
use futures::stream::{self, BoxStream};

use super::*;
use crate::runtime::{ContainerSpec, ExecIo, Image, Inspected, LogLine, Result as RuntimeResult, RuntimeError};

struct Away;

fn away<T>() -> RuntimeResult<T> {
    Err(RuntimeError::Away("it is not there".to_owned()))
}

#[async_trait]
impl ContainerRuntime for Away {
    async fn version(&self) -> RuntimeResult<String> {
        away()
    }

    async fn list(&self) -> RuntimeResult<Vec<Listed>> {
        away()
    }

    fn events(&self) -> BoxStream<'static, RuntimeResult<RuntimeEvent>> {
        stream::once(async { away() }).boxed()
    }

    async fn image(&self, _: &str, _: &str, _: Duration) -> RuntimeResult<Image> {
        away()
    }

    async fn create(&self, _: &ContainerSpec) -> RuntimeResult<String> {
        away()
    }

    async fn start(&self, _: &str) -> RuntimeResult<()> {
        away()
    }

    async fn inspect(&self, _: &str) -> RuntimeResult<Inspected> {
        away()
    }

    async fn kill(&self, _: &str, _: &str) -> RuntimeResult<()> {
        away()
    }

    async fn remove(&self, _: &str) -> RuntimeResult<()> {
        away()
    }

    fn logs(&self, _: &str, _: LogQuery) -> BoxStream<'static, RuntimeResult<LogLine>> {
        stream::once(async { away() }).boxed()
    }

    async fn exec(&self, _: &str, _: Vec<String>, _: bool) -> RuntimeResult<ExecIo> {
        away()
    }

    async fn exec_state(&self, _: &str) -> RuntimeResult<(Option<i32>, Option<u32>)> {
        away()
    }

    async fn resize(&self, _: &str, _: u16, _: u16) -> RuntimeResult<()> {
        away()
    }
}

struct Rig {
    agent: Agent,
    frames: mpsc::UnboundedReceiver<v1::up::Frame>,
    _events: mpsc::Receiver<Event>,
    _folder: tempfile::TempDir,
}

impl Rig {
    /// Linked, with a Docker that had nothing when it last answered.
    fn new() -> Self {
        Self::with_egress(false)
    }

    /// With a way out there must be a firewall, and nobody has loaded it.
    fn with_egress(egress: bool) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(folder.path()).unwrap();
        let spool = Spool::open(folder.path().join("reports")).unwrap();
        let workers = Workers::start().unwrap();
        let config = Config {
            data_dir: folder.path().to_owned(),
            network: crate::config::Network { egress, ..crate::config::Network::default() },
            ..Config::default()
        };
        let counters = Counters::register(&Metrics::new());
        let (events, received) = mpsc::channel(64);
        let network = Network::new(config.network.clone(), workers.clone(), BTreeSet::new(), BTreeSet::new());
        let tools = Arc::new(Tools {
            runtime: Arc::new(Away),
            network: network.unwrap(),
            volumes: Volumes::new(folder.path().join("volumes")).unwrap(),
            workers,
            hierarchies: Hierarchies::of_host().unwrap(),
            events,
            counters: counters.clone(),
            relist: Notify::new(),
            data: ledger.installation.clone(),
            config,
        });
        let channels = Channels::new(4, counters);
        let facts = v1::NodeFacts::default();
        let agent =
            Agent::new(tools, Tickets::default(), channels, Routes::default(), ledger, spool, Vec::new(), facts, None);
        let (_, frames) = mpsc::unbounded_channel();
        let mut rig = Self { agent, frames, _events: received, _folder: folder };
        rig.agent.on_event(Event::Listed { asked: Instant::now(), containers: Vec::new() });
        rig.dial();
        rig
    }

    fn dial(&mut self) {
        let (frames, received) = mpsc::unbounded_channel();
        self.frames = received;
        self.says(LinkEvent::Up { session: 1, frames });
    }

    fn says(&mut self, event: LinkEvent) {
        self.agent.on_event(Event::Link(event));
        self.agent.turn();
    }

    fn full(&mut self, slots: &[u128]) {
        let slots = slots.iter().copied().map(slot).collect();
        self.says(LinkEvent::Full(v1::DesiredSet { slots, ..v1::DesiredSet::default() }, Instant::now()));
    }

    fn part(&mut self, slots: &[u128]) {
        let slots = slots.iter().copied().map(slot).collect();
        self.says(LinkEvent::Part(v1::DesiredPart { slots }, Instant::now()));
    }

    fn wanted(&self) -> Vec<u128> {
        let wanted = self.agent.slots.iter().filter(|(_, slot)| slot.want.is_some());
        wanted.map(|(id, _)| id.as_u128()).collect()
    }

    /// What was reported since the last look, by slot and state.
    fn reports(&mut self) -> Vec<(String, String)> {
        let mut reports = Vec::new();
        while let Ok(frame) = self.frames.try_recv() {
            if let v1::up::Frame::Report(v1::Report { slot: Some(slot), .. }) = frame {
                reports.push((slot.slot_id, slot.state));
            }
        }
        reports
    }
}

fn slot(number: u128) -> v1::SlotDesired {
    v1::SlotDesired {
        slot_id: SlotId::from_u128(number).to_string(),
        generation: 1,
        present: true,
        spec: Some(v1::SlotSpec { warm_mode: "exec".into(), uid: 1, gid: 1, ..v1::SlotSpec::default() }),
        claim: None,
    }
}

#[tokio::test]
async fn a_set_in_parts_is_judged_when_it_is_whole() {
    let mut rig = Rig::new();
    rig.full(&[1, 2, 3]);
    for _ in 0..3 {
        rig.part(&[1]);
        rig.part(&[2]);
        assert_eq!(rig.wanted(), [1, 2, 3]);
        rig.full(&[3]);
        assert_eq!(rig.wanted(), [1, 2, 3], "a slot of an earlier part was taken for gone");
    }
    // A set that broke off with its stream says nothing about the next one.
    rig.part(&[1]);
    rig.dial();
    rig.full(&[2, 3]);
    assert_eq!(rig.wanted(), [1, 2, 3], "destroying asks twice");
    rig.full(&[2, 3]);
    assert_eq!(rig.wanted(), [2, 3]);
}

#[tokio::test]
async fn a_warm_app_of_the_ledger_is_asked_what_the_whole_set_says() {
    let mut rig = Rig::new();
    let probe = v1::Probe { kind: Some(v1::probe::Kind::TcpPort(9)) };
    let pool_process = Some(v1::Process { probe: Some(probe), ..v1::Process::default() });
    let spec = v1::SlotSpec { warm_mode: "frozen".into(), uid: 1, gid: 1, pool_process, ..v1::SlotSpec::default() };
    let (id, app) = (SlotId::from_u128(1), v1::SlotDesired { spec: Some(spec), ..slot(1) });
    let known = rig.agent.slots.entry(id).or_insert_with(|| Slot::new(id, 0));
    known.want = Some(Wanted::new(app.clone(), false).unwrap());
    (known.have.container, known.have.init) = (Container::Up, Init::Running);
    known.netns = Some(crate::netns::Netns::of_pid(std::process::id()).unwrap());
    rig.agent.start_probe(id);
    assert!(rig.agent.slots[&id].probe.is_none(), "it would be frozen without having been asked");
    rig.says(LinkEvent::Full(v1::DesiredSet { slots: vec![app], ..v1::DesiredSet::default() }, Instant::now()));
    assert!(rig.agent.slots[&id].probe.is_some());
}

#[tokio::test]
async fn a_slot_that_is_only_mentioned_stays_as_it_is() {
    let mut rig = Rig::new();
    rig.full(&[1, 2]);
    let bare = || v1::SlotDesired { spec: None, ..slot(1) };
    for _ in 0..3 {
        let slots = vec![bare(), slot(2)];
        rig.says(LinkEvent::Full(v1::DesiredSet { slots, ..v1::DesiredSet::default() }, Instant::now()));
    }
    assert_eq!(rig.wanted(), [1, 2]);
    let gone = v1::SlotDesired { present: false, generation: 2, ..bare() };
    rig.says(LinkEvent::Upsert(Box::new(gone), Instant::now()));
    let target = rig.agent.slots[&SlotId::from_u128(1)].want.as_ref().map(|want| want.view.target);
    assert_eq!(target, Some(SlotTarget::Absent), "and leaves when it is to");
}

#[tokio::test]
async fn what_was_acknowledged_is_told_again_when_asked_for() {
    let mut rig = Rig::new();
    rig.full(&[1, 2]);
    let first = rig.reports();
    assert_eq!(first.len(), 2, "{first:?}");
    let last = rig.agent.spool.last_index();
    rig.says(LinkEvent::Ack(last));
    rig.full(&[1, 2]);
    assert_eq!(rig.reports(), [], "nothing has changed");
    rig.says(LinkEvent::TellAll);
    assert_eq!(rig.reports(), first, "a report that the database lost stays lost");
}

fn says_hello(agent: &mut Agent, container: &str, state: State) -> mpsc::Receiver<zeroize::Zeroizing<Vec<u8>>> {
    let (connection, frames) = Connection::loose();
    let hello = protocol::Hello { version: 1, boot: [1; 16], state };
    agent.on_init(InitEvent::Hello { container: container.to_owned(), pid: std::process::id(), connection, hello });
    frames
}

/// A claimed slot, as the ledger of a former agent has it.
fn restored(rig: &mut Rig, record: SlotRecord) -> SlotId {
    let (id, instance) = (SlotId::from_u128(1), InstanceId::from_u128(7));
    let claim = v1::Claim { instance_id: instance.to_string(), ..v1::Claim::default() };
    let record = SlotRecord {
        desired: Some(v1::SlotDesired { claim: Some(claim), ..slot(1) }),
        container_id: "c1".to_owned(),
        assigned: instance.to_string(),
        ..record
    };
    let mut one = Slot::restore(id, record, boot_ms());
    one.have.container = Container::Up;
    rig.agent.by_container.insert("c1".to_owned(), id);
    rig.agent.slots.insert(id, one);
    id
}

fn exited(run: u32) -> State {
    let (claim_id, exit) = (InstanceId::from_u128(7).to_string(), protocol::Exit::Code(1));
    State::Exited { claim_id, run, exit, oom: protocol::Oom::No }
}

#[tokio::test]
async fn what_ran_for_long_is_not_given_up_for_what_was_before() {
    for (lasted, failures) in [(STABLE_MS, 1), (STABLE_MS / 2, 5)] {
        let mut rig = Rig::new();
        let started_at = boot_ms() - lasted;
        let id =
            restored(&mut rig, SlotRecord { ready: true, failures: 4, run: 5, started_at, ..SlotRecord::default() });
        let _frames = says_hello(&mut rig.agent, "c1", exited(5));
        assert_eq!(rig.agent.slots[&id].have.failures, failures);
    }
}

#[tokio::test]
async fn what_an_earlier_agent_started_has_its_time_from_when_it_is_looked_at() {
    let mut rig = Rig::new();
    let started_at = boot_ms() - 3_600_000;
    let id = restored(&mut rig, SlotRecord { run: 1, started_at, ..SlotRecord::default() });
    rig.agent.slots.get_mut(&id).unwrap().have.wired = true;
    let running = State::Running { claim_id: InstanceId::from_u128(7).to_string(), run: 1, pid: 2 };
    let _frames = says_hello(&mut rig.agent, "c1", running);
    let have = &rig.agent.slots[&id].have;
    assert!(have.started_at > boot_ms() - 60_000, "it would be killed unheard");
}

#[tokio::test]
async fn an_end_is_counted_once_however_often_it_is_told() {
    let mut rig = Rig::new();
    let id = restored(&mut rig, SlotRecord { run: 2, failures: 1, ended: 1, ..SlotRecord::default() });
    let _frames = says_hello(&mut rig.agent, "c1", exited(2));
    let have = rig.agent.slots[&id].have.clone();
    assert_eq!(have.failures, 2);
    rig.agent.on_init(InitEvent::Gone { container: "c1".to_owned(), connection: 0 });
    let _frames = says_hello(&mut rig.agent, "c1", exited(2));
    assert_eq!((rig.agent.slots[&id].have.failures, &rig.agent.slots[&id].have.init), (2, &have.init), "nor later");
    // Nor by the next agent.
    let record = rig.agent.slots[&id].record();
    let mut rig = Rig::new();
    let id = restored(&mut rig, record);
    let _frames = says_hello(&mut rig.agent, "c1", exited(2));
    assert_eq!(rig.agent.slots[&id].have.failures, 2);
    assert!(matches!(rig.agent.slots[&id].have.init, Init::Ended { .. }));
}

#[tokio::test]
async fn a_container_that_ended_while_it_was_made_is_not_taken_for_up() {
    let mut rig = Rig::new();
    rig.full(&[1]);
    let id = SlotId::from_u128(1);
    let op = rig.agent.slots[&id].op;
    assert_eq!(rig.agent.slots[&id].have.op, Some(Op::Make));
    rig.agent.on_event(Event::Created { slot: id, op, container: "c1".to_owned() });
    let died = RuntimeEvent::Died { id: "c1".to_owned(), exit_code: Some(137) };
    rig.agent.on_event(Event::Runtime(died));
    let made = Made {
        // No process of that container.
        pid: std::process::id(),
        netns: Netns::of_pid(std::process::id()).unwrap(),
        cgroup: Cgroup::default(),
        piece: Piece(1),
        image: None,
        frozen: false,
        created: true,
        steps: Vec::new(),
        took: Duration::ZERO,
    };
    rig.agent.on_event(Event::Made { slot: id, op, result: Ok(Box::new(made)) });
    let have = &rig.agent.slots[&id].have;
    let ended = (Container::Ended, false, Some(1));
    assert_eq!((have.container, have.wired, have.fault.map(|fault| fault.count)), ended);
    // And once, though Docker tells of it afterwards.
    rig.agent.on_event(Event::Runtime(RuntimeEvent::Died { id: "c1".to_owned(), exit_code: Some(137) }));
    assert_eq!(rig.agent.slots[&id].have.fault.map(|fault| fault.count), Some(1));
}

/// What is wanted may arrive while the list is on its way; who waited for the next one waited a minute.
#[tokio::test]
async fn a_list_under_way_tells_of_a_slot_that_is_wanted_meanwhile() {
    let mut rig = Rig::new();
    rig.agent.on_event(Event::RuntimeAway("it is started again".to_owned()));
    let asked = Instant::now();
    rig.full(&[1, 2]);
    assert!(rig.agent.slots.values().all(|slot| slot.have.container == Container::Unknown));
    let id = SlotId::from_u128(1);
    let labels = [(LABEL_SLOT.to_owned(), id.to_string())].into();
    let containers = vec![Listed { id: "c1".to_owned(), phase: Phase::Up, labels }];
    rig.agent.on_event(Event::Listed { asked, containers });
    assert_eq!(rig.agent.slots[&id].have.container, Container::Up, "it is adopted");
    assert_eq!(rig.agent.by_container.get("c1"), Some(&id));
    assert_eq!(rig.agent.slots[&SlotId::from_u128(2)].have.container, Container::Absent, "it can be made");
}

#[tokio::test]
async fn an_init_whose_container_docker_does_not_know_is_ended() {
    let mut rig = Rig::new();
    let lists = |rig: &mut Rig, asked| rig.agent.on_event(Event::Listed { asked, containers: Vec::new() });
    let before = Instant::now();
    let mut waiting = says_hello(&mut rig.agent, "c1", State::Waiting);
    let mut serving = says_hello(&mut rig.agent, "c2", State::Running { claim_id: "x".to_owned(), run: 1, pid: 2 });
    lists(&mut rig, Instant::now());
    assert!(waiting.try_recv().is_err(), "before the control plane is heard nothing is touched");
    rig.full(&[]);
    lists(&mut rig, before);
    assert!(waiting.try_recv().is_err(), "that list may be too old to know it");
    lists(&mut rig, Instant::now());
    let told = waiting.try_recv().unwrap();
    assert!(matches!(ToInit::decode(&told[4..]), Ok(ToInit::Shutdown)), "{told:?}");
    assert!(serving.try_recv().is_err(), "a tenant's process is not ended");
    let left: Vec<_> = rig.agent.strangers.iter().map(|stranger| (&*stranger.container, stranger.said)).collect();
    assert_eq!(left, [("c2", true)]);
}

#[tokio::test]
async fn nobody_is_let_in_before_the_firewall_is_loaded() {
    for egress in [true, false] {
        let mut rig = Rig::with_egress(egress);
        rig.full(&[1]);
        let id = SlotId::from_u128(1);
        let known = rig.agent.slots.get_mut(&id).unwrap();
        (known.have.container, known.have.wired, known.have.op) = (Container::Up, true, None);
        known.have.init = Init::Waiting;
        let instance = InstanceId::from_u128(7);
        let process = v1::Process { argv: vec!["/agent".to_owned()], ..v1::Process::default() };
        let claim = v1::Claim { instance_id: instance.to_string(), process: Some(process), ..v1::Claim::default() };
        let claimed = v1::SlotDesired { generation: 2, claim: Some(claim), ..slot(1) };
        rig.says(LinkEvent::Upsert(Box::new(claimed), Instant::now()));
        let assigned = rig.agent.slots[&id].have.assigned;
        assert_eq!(assigned, (!egress).then_some(instance));
        assert!(!egress || rig.agent.wake_at.is_some_and(|at| at <= boot_ms() + FIREWALL_LOOK_MS), "it looks again");
    }
}
