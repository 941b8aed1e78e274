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
    let dials = |rig: &mut Rig, container: &str, state| {
        let (connection, frames) = Connection::loose();
        let hello = protocol::Hello { version: 1, boot: [1; 16], state };
        rig.agent.on_init(InitEvent::Hello { container: container.to_owned(), pid: 1, connection, hello });
        frames
    };
    let lists = |rig: &mut Rig, asked| rig.agent.on_event(Event::Listed { asked, containers: Vec::new() });
    let before = Instant::now();
    let mut waiting = dials(&mut rig, "c1", State::Waiting);
    let mut serving = dials(&mut rig, "c2", State::Running { claim_id: "x".to_owned(), run: 1, pid: 2 });
    lists(&mut rig, Instant::now());
    assert!(waiting.try_recv().is_err(), "before the control plane is heard nothing is touched");
    rig.full(&[]);
    lists(&mut rig, before);
    assert!(waiting.try_recv().is_err(), "that list may be too old to know it");
    lists(&mut rig, Instant::now());
    let told = waiting.try_recv().unwrap();
    assert!(matches!(ToInit::decode(&told[4..]), Ok(ToInit::Shutdown)), "{told:?}");
    assert!(serving.try_recv().is_err(), "a tenant's process is not ended");
    assert!(rig.agent.strangers.is_empty());
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
        assert!(!egress || rig.agent.wake_at.is_some_and(|at| at <= now_ms() + FIREWALL_LOOK_MS), "it looks again");
    }
}
