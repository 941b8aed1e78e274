//! What a node agent does next: a pure function of what its host should have and what it has. Its times are of a clock
//! that never goes back.
//!
//! The life of a slot's container, seen from the host:
//!
//! ```text
//!  Absent ──Make──▶ Up, init Silent ──▶ Waiting ──Deliver──▶ Running ──Freeze──▶ frozen ──Assign──▶ Running
//!                                          ▲                    │ ended                              (claimed)
//!                                          │                    ▼
//!                                          └─(init restarted)  Ended ──Run, after a back-off──▶ Running
//!  any ──Terminate, Kill──▶ ended ──Remove──▶ Absent ──Forget──▶ (no record)
//! ```
//!
//! Of each pool of frozen apps the one that is next in line is awake. What an app has to catch up with after a long time in
//! the freezer (OpenClaw's timers: 200 to 350 ms of a core) it does then, and not while somebody waits.
//!
//! Rules that hold whatever the input, and are tested as such:
//! - nothing without a desired slot is touched before the control plane has been heard since the agent started;
//! - what is [`Container::Unknown`] is left alone: unknown is not absent;
//! - a volume is used by one container at a time, an ended one included, until that one is removed;
//! - an init that has served somebody is never given to somebody else;
//! - a slot with an operation under way gets no second one; removals come before additions; both are bounded.

use std::collections::{BTreeMap, BTreeSet};

use crate::ids::{InstanceId, SlotId, VolumeId};
use crate::slot::{Exit, FailureKind, SlotState, SlotTarget};
use crate::template::WarmMode;
use crate::{Millis, backoff};

// ------------------------------------------------------------------------------------------------ view

/// What the control plane wants of one slot, as far as a decision needs it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Want {
    pub slot: SlotId,
    pub target: SlotTarget,
    pub warm: WarmMode,
    /// Whose it is one of, while it waits: claims take the oldest of a pool first.
    pub pool: String,
    /// Whose it is; none: it waits.
    pub claim: Option<WantClaim>,
    pub volume: Option<VolumeId>,
    /// What is needed to start a process from nothing is in memory. After a restart of the agent it is not, until
    /// the control plane has sent it again: secrets are not kept on disk.
    pub complete: bool,
    /// From the start of the process to its first answer.
    pub start_deadline_ms: Millis,
    /// From SIGTERM to SIGKILL.
    pub stop_deadline_ms: Millis,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WantClaim {
    pub instance: InstanceId,
    /// Grows when a person asks for a restart.
    pub restart: u32,
    /// Stops when the lease is lost.
    pub single_writer: bool,
}

/// What Docker said about a slot's container.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Container {
    /// Docker does not answer, or has not been asked yet.
    Unknown,
    /// Docker was asked and has none.
    Absent,
    /// Made and never started.
    Made,
    Up,
    /// It ran and does not run now.
    Ended,
}

/// What the container's PID 1 said on its connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Init {
    /// Not connected.
    Silent {
        since: Millis,
    },
    /// Serves nobody yet.
    Waiting,
    Running,
    /// The last run is over.
    Ended {
        at: Millis,
        how: Ended,
    },
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ended {
    Exited(Exit),
    /// The program does not exist or may not be executed: trying again cannot help.
    NoCommand,
    /// A file could not be written.
    NoFile,
    /// It could not be started for want of something that may come back (processes, memory).
    NoRoom,
    /// It was killed because it did not answer within its deadline.
    NotReady,
}

/// Whom the init serves; it serves the first one for ever.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Owner {
    /// The slot itself: an app that was started at pool time.
    Slot,
    Instance(InstanceId),
    /// A claim we do not know.
    Stranger,
}

/// An operation under way that takes longer than a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Op {
    Make,
    /// A [`Op::Make`] that was told to end.
    Unmake,
    Freeze,
    Assign,
    Remove,
    /// A [`Op::Remove`] that was refused several times. It goes on, and takes no other's turn.
    Stuck,
}

/// The last attempt to make (or freeze, or assign) failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    pub kind: FailureKind,
    pub at: Millis,
    /// In a row.
    pub count: u32,
}

/// What the agent knows of one slot's container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Have {
    pub slot: SlotId,
    pub container: Container,
    /// Started, found by its pid, and with its network in place.
    pub wired: bool,
    pub volume: Option<VolumeId>,
    pub op: Option<Op>,
    pub fault: Option<Fault>,
    pub init: Init,
    pub owner: Option<Owner>,
    /// Whose claim was given to it.
    pub assigned: Option<InstanceId>,
    /// The process that runs is not what the claim wants run.
    pub stale: bool,
    /// The highest run ever ordered.
    pub run: u32,
    /// A claim or run was sent and not answered yet.
    pub ordered_at: Option<Millis>,
    pub started_at: Millis,
    /// It has answered its probe in this run.
    pub ready: bool,
    /// Since when it has waited, ready, for a claim.
    pub ready_at: Millis,
    pub frozen: bool,
    /// The restart counter the last run honoured.
    pub restarted: u32,
    /// Runs in a row that ended by themselves before they were stable.
    pub failures: u32,
    /// SIGTERM was sent in this run.
    pub term_at: Option<Millis>,
    /// SIGKILL was.
    pub kill_at: Option<Millis>,
    /// Given up at this restart counter.
    pub gave_up: Option<u32>,
}

impl Have {
    /// A slot of which nothing has been seen.
    pub fn nothing(slot: SlotId, container: Container, now: Millis) -> Self {
        Self {
            slot,
            container,
            wired: false,
            volume: None,
            op: None,
            fault: None,
            init: Init::Silent { since: now },
            owner: None,
            assigned: None,
            stale: false,
            run: 0,
            ordered_at: None,
            started_at: now,
            ready: false,
            ready_at: now,
            frozen: false,
            restarted: 0,
            failures: 0,
            term_at: None,
            kill_at: None,
            gave_up: None,
        }
    }
}

/// Everything a decision is made from. It borrows: a plan is made after every event, over every slot of the host.
#[derive(Clone, Debug, Default)]
pub struct View<'a> {
    /// In the order of ids, each slot once: what is wanted of it, what is there.
    pub slots: Vec<(Option<&'a Want>, Option<&'a Have>)>,
    /// A whole desired set has come since the agent started.
    pub contacted: bool,
    /// Single writers may run.
    pub lease_held: bool,
    /// Claims of warm slots that are coming in now.
    pub burst: Option<Burst>,
}

/// Claims that follow each other closely.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Burst {
    pub first: Millis,
    pub last: Millis,
}

impl Burst {
    /// With a claim that comes now.
    pub fn joined(burst: Option<Self>, now: Millis, policy: &Policy) -> Self {
        match burst {
            Some(burst) if now < burst.last.saturating_add(policy.burst_pause_ms) => Self { last: now, ..burst },
            _ => Self { first: now, last: now },
        }
    }

    /// Until then nothing is made for the pool: a container that is being made takes the processor from those that
    /// somebody waits for.
    fn over_at(self, policy: &Policy) -> Millis {
        let pause = self.last.saturating_add(policy.burst_pause_ms);
        pause.min(self.first.saturating_add(policy.burst_pause_max_ms))
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Containers made at once.
    pub makes_max: usize,
    /// Containers removed at once.
    pub removes_max: usize,
    /// The back-off before the first restart; doubles up to `backoff_max_ms`.
    pub backoff_ms: Millis,
    pub backoff_max_ms: Millis,
    /// So many failures in a row and it is given up.
    pub failures_max: u32,
    /// A container whose init does not dial within this long after its start is made anew.
    pub greet_ms: Millis,
    /// An unanswered claim is sent again.
    pub answer_ms: Millis,
    /// A process that outlives SIGKILL this long goes with its container.
    pub kill_ms: Millis,
    /// For containers that nobody describes any more.
    pub orphan_stop_ms: Millis,
    /// The pool's containers are made once no claim has come for this long,
    pub burst_pause_ms: Millis,
    /// or after this long all the same.
    pub burst_pause_max_ms: Millis,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            makes_max: 2,
            removes_max: 4,
            backoff_ms: 500,
            backoff_max_ms: 30_000,
            failures_max: 5,
            greet_ms: 30_000,
            answer_ms: 5_000,
            kill_ms: 2_000,
            orphan_stop_ms: 10_000,
            burst_pause_ms: 50,
            burst_pause_max_ms: 2_000,
        }
    }
}

// ------------------------------------------------------------------------------------------------ plan

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Act {
    /// Nothing of it is left: drop its record, network and mounts, and report it absent.
    Forget,
    /// Remove the container, by force.
    Remove,
    /// End an operation that makes a container nobody wants any more.
    CancelMake,
    /// SIGTERM to the process.
    Terminate,
    /// SIGKILL to all of its processes.
    Kill,
    /// [`Act::Kill`], for it has not answered in time.
    KillUnready,
    /// Stop trying; the slot has failed.
    GiveUp(FailureKind),
    /// Send the claim (or the pool's process) to a waiting init.
    Deliver {
        run: u32,
        restart: u32,
    },
    /// Start what the init holds once more.
    Run {
        run: u32,
        restart: u32,
    },
    /// Thaw a frozen app, or give files to a running one, and make it the instance's.
    Assign {
        instance: InstanceId,
    },
    Freeze,
    /// Let a frozen app run again, for nobody yet.
    Thaw,
    /// Create the container where it is missing, start it, attach its network. Each part that is done already is skipped.
    Make,
    /// The claim's content is missing: ask the control plane for the whole set.
    AskFull,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    pub slot: SlotId,
    pub act: Act,
    /// For the log: why now.
    pub why: &'static str,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostPlan {
    /// In the order to be taken.
    pub steps: Vec<Step>,
    /// When to plan again if nothing is seen before.
    pub wake_at: Option<Millis>,
}

/// The steps that bring `view` nearer to what is wanted. Planned again before their effects are seen, it gives no step
/// that is under way.
pub fn plan(view: &View<'_>, now: Millis, policy: &Policy) -> HostPlan {
    let held = view
        .slots
        .iter()
        .filter_map(|(want, have)| {
            let have = have.filter(|have| have.container != Container::Absent || have.op.is_some())?;
            have.volume.or_else(|| want.as_ref()?.volume)
        })
        .collect();
    let mut turn = Turn {
        now,
        policy,
        lease_held: view.lease_held,
        contacted: view.contacted,
        made_from: view.burst.map_or(now, |burst| burst.over_at(policy)),
        held,
        claimed: BTreeSet::new(),
        next: next_in_line(view),
        plan: HostPlan::default(),
    };
    let missing = Have::nothing(SlotId::from_u128(0), Container::Absent, now);
    for (want, have) in &view.slots {
        match (want, have) {
            (Some(want), have) => {
                let have = have.unwrap_or(&missing);
                match want.target {
                    SlotTarget::Absent => turn.end(want.slot, have, want.stop_deadline_ms, "no longer wanted"),
                    SlotTarget::Present => turn.keep(want, have),
                }
            }
            (None, Some(have)) if view.contacted => {
                turn.end(have.slot, have, policy.orphan_stop_ms, "nobody wants it");
            }
            (None, _) => {}
        }
    }
    turn.bound(view)
}

/// Of each pool of frozen apps the one that a claim takes first: the one that has been ready for longest.
fn next_in_line(view: &View<'_>) -> BTreeSet<SlotId> {
    let mut first = BTreeMap::<&str, (Millis, SlotId)>::new();
    for (want, have) in &view.slots {
        let (Some(want), Some(have)) = (want, have) else { continue };
        let waits = want.target == SlotTarget::Present && want.claim.is_none() && want.warm == WarmMode::Frozen;
        if waits && have.ready && have.container == Container::Up && have.gave_up.is_none() {
            let this = (have.ready_at, want.slot);
            first.entry(&want.pool).and_modify(|known| *known = this.min(*known)).or_insert(this);
        }
    }
    first.into_values().map(|(_, slot)| slot).collect()
}

struct Turn<'a> {
    now: Millis,
    policy: &'a Policy,
    lease_held: bool,
    contacted: bool,
    /// Before then nothing is made for the pool.
    made_from: Millis,
    /// Volumes in use.
    held: BTreeSet<VolumeId>,
    /// Of the slots to be made, those that somebody waits for.
    claimed: BTreeSet<SlotId>,
    /// Of the frozen apps, those that stay awake.
    next: BTreeSet<SlotId>,
    plan: HostPlan,
}

impl Turn<'_> {
    fn step(&mut self, slot: SlotId, act: Act, why: &'static str) {
        self.plan.steps.push(Step { slot, act, why });
    }

    fn wake(&mut self, at: Millis) {
        self.plan.wake_at = Some(self.plan.wake_at.map_or(at, |known| known.min(at)));
    }

    /// Whether `at` has come; if not, the plan is made again then.
    fn due(&mut self, at: Millis) -> bool {
        if at <= self.now {
            return true;
        }
        self.wake(at);
        false
    }

    fn backoff(&self, slot: SlotId, count: u32) -> Millis {
        // The low bits of an id are random: slots that fail together do not return together.
        backoff::next(count.max(1), self.policy.backoff_ms, self.policy.backoff_max_ms, slot.as_u128() as u64)
    }

    /// SIGTERM, then SIGKILL; true once nothing of it can run any more or it has outlived both.
    fn ended(&mut self, slot: SlotId, have: &Have, deadline_ms: Millis, why: &'static str) -> bool {
        if !matches!(have.init, Init::Running | Init::Silent { .. }) {
            return true;
        }
        match (have.term_at, have.kill_at) {
            (None, None) => self.step(slot, Act::Terminate, why),
            (Some(sent), None) if self.due(sent.saturating_add(deadline_ms)) => {
                self.step(slot, Act::Kill, "it outlived its stop deadline");
            }
            (_, Some(sent)) => return self.due(sent.saturating_add(self.policy.kill_ms)),
            _ => {}
        }
        false
    }

    /// Ends the process and keeps the container; one whose process cannot be ended is replaced.
    fn halt(&mut self, want: &Want, have: &Have, why: &'static str) {
        if self.ended(want.slot, have, want.stop_deadline_ms, why) && have.container == Container::Up {
            self.step(want.slot, Act::Remove, "its process outlives SIGKILL");
        }
    }

    fn end(&mut self, slot: SlotId, have: &Have, stop_deadline_ms: Millis, why: &'static str) {
        match (have.op, have.container) {
            (Some(Op::Make), _) => self.step(slot, Act::CancelMake, why),
            (Some(_), _) | (None, Container::Unknown) => {}
            (None, Container::Absent) => self.step(slot, Act::Forget, "nothing of it is left"),
            (None, Container::Made | Container::Ended) => self.step(slot, Act::Remove, why),
            // Only a tenant's process is asked first; the pool's own has nothing to finish.
            (None, Container::Up) if have.assigned.is_none() => self.step(slot, Act::Remove, why),
            (None, Container::Up) => {
                if self.ended(slot, have, stop_deadline_ms, why) {
                    self.step(slot, Act::Remove, why);
                }
            }
        }
    }

    fn keep(&mut self, want: &Want, have: &Have) {
        let slot = want.slot;
        let restart = want.claim.map_or(0, |claim| claim.restart);
        let fenced = !self.lease_held && want.claim.is_some_and(|claim| claim.single_writer);
        if have.gave_up.is_some_and(|at| at >= restart) {
            return self.put_down(want, have);
        }
        if have.op.is_some() {
            return;
        }
        // Whose it was it stays: a container that served another is destroyed, however it came to that.
        let foreign = match (have.owner, want.claim) {
            (None, _) => false,
            (Some(Owner::Slot), _) => matches!(want.warm, WarmMode::Exec | WarmMode::None),
            (Some(Owner::Instance(served)), claim) => claim.is_none_or(|claim| claim.instance != served),
            (Some(Owner::Stranger), _) => true,
        } || have.assigned.is_some_and(|served| want.claim.is_none_or(|claim| claim.instance != served));
        match have.container {
            Container::Unknown => {
                if fenced && matches!(have.init, Init::Running) {
                    // The init still listens, and so does the kernel: fencing does not wait for Docker.
                    self.halt(want, have, "the lease is lost");
                }
                return;
            }
            Container::Absent | Container::Made | Container::Ended => return self.make(want, have, fenced),
            Container::Up if foreign => {
                return self.step(slot, Act::Remove, "it has served somebody else");
            }
            Container::Up if !have.wired => return self.make(want, have, fenced),
            Container::Up => {}
        }
        match &have.init {
            // It cannot dial while it is frozen, as after a restart of the agent: what was known of it stands.
            Init::Silent { .. } if have.frozen => self.running(want, have, fenced),
            Init::Silent { since } => {
                if fenced {
                    self.halt(want, have, "the lease is lost");
                } else if self.due(since.saturating_add(self.policy.greet_ms)) {
                    self.step(slot, Act::Remove, "its init does not dial");
                }
            }
            Init::Waiting => self.deliver(want, have, fenced),
            Init::Running => self.running(want, have, fenced),
            Init::Ended { at, how } => self.again(want, have, *at, how, fenced),
        }
    }

    /// A slot that failed keeps its container for its log, but nothing runs in it.
    fn put_down(&mut self, want: &Want, have: &Have) {
        if have.op.is_none() && have.container == Container::Up && have.init == Init::Running {
            self.halt(want, have, "it was given up");
        }
    }

    fn make(&mut self, want: &Want, have: &Have, fenced: bool) {
        if let Some(fault) = have.fault {
            if !fault.kind.is_transient() || fault.count >= self.policy.failures_max {
                return self.step(want.slot, Act::GiveUp(fault.kind), "it cannot be made");
            }
            if !self.due(fault.at.saturating_add(self.backoff(want.slot, fault.count))) {
                return;
            }
        }
        if fenced || want.claim.is_none() && !self.due(self.made_from) {
            return;
        }
        if have.container == Container::Absent
            && let Some(volume) = want.volume
            && !self.held.insert(volume)
        {
            return;
        }
        let why = match have.container {
            Container::Absent => "wanted and missing",
            Container::Up => "its network is missing",
            Container::Made => "made and not started",
            Container::Unknown | Container::Ended => "it ended",
        };
        if want.claim.is_some() {
            self.claimed.insert(want.slot);
        }
        self.step(want.slot, Act::Make, why);
    }

    fn deliver(&mut self, want: &Want, have: &Have, fenced: bool) {
        let app = matches!(want.warm, WarmMode::App | WarmMode::Frozen);
        let Some(claim) = want.claim.or(app.then_some(WantClaim {
            instance: InstanceId::from_u128(0),
            restart: 0,
            single_writer: false,
        })) else {
            return;
        };
        if fenced || have.ordered_at.is_some_and(|at| !self.due(at.saturating_add(self.policy.answer_ms))) {
            return;
        }
        if !want.complete {
            // A request before first contact is pointless: the whole set comes with it anyway.
            if self.contacted {
                self.step(want.slot, Act::AskFull, "the claim's content is not here");
            }
            return;
        }
        let run = if have.ordered_at.is_some() { have.run } else { have.run.saturating_add(1) };
        self.step(want.slot, Act::Deliver { run, restart: claim.restart }, "its init waits");
    }

    fn running(&mut self, want: &Want, have: &Have, fenced: bool) {
        let slot = want.slot;
        match want.claim {
            _ if fenced => {
                self.halt(want, have, "the lease is lost");
            }
            // A frozen one that is assigned already was left behind in the middle of it.
            Some(claim) if have.assigned.is_none() || have.frozen => {
                self.step(slot, Act::Assign { instance: claim.instance }, "claimed");
            }
            Some(claim) if have.stale || claim.restart > have.restarted => {
                self.halt(want, have, "a restart was asked for");
            }
            // A stop that was begun for a lost lease or a restart is brought to its end.
            _ if have.term_at.is_some() || have.kill_at.is_some() => {
                self.halt(want, have, "its stop has begun");
            }
            None if matches!(want.warm, WarmMode::Exec | WarmMode::None)
                || have.frozen && want.warm != WarmMode::Frozen =>
            {
                self.step(slot, Act::Remove, "it is in a state that nobody ordered");
            }
            None if have.ready && want.warm == WarmMode::Frozen && have.frozen == self.next.contains(&slot) => {
                if have.frozen {
                    self.step(slot, Act::Thaw, "next in line");
                } else {
                    self.step(slot, Act::Freeze, "ready and unclaimed");
                }
            }
            // What a warm app is to be asked before it is ready is not here: it cannot be late.
            None if !want.complete => {}
            _ if !have.ready
                && have.kill_at.is_none()
                && self.due(have.started_at.saturating_add(want.start_deadline_ms)) =>
            {
                self.step(slot, Act::KillUnready, "it did not answer in time");
            }
            _ => {}
        }
    }

    fn again(&mut self, want: &Want, have: &Have, at: Millis, how: &Ended, fenced: bool) {
        let slot = want.slot;
        let Some(claim) = want.claim else {
            return self.step(slot, Act::GiveUp(kind_of(how)), "its app ended at pool time");
        };
        if fenced || have.ordered_at.is_some_and(|at| !self.due(at.saturating_add(self.policy.answer_ms))) {
            return;
        }
        // We ended it ourselves: no failure, no back-off.
        let asked = have.stale || claim.restart > have.restarted || have.term_at.is_some();
        if !asked {
            if matches!(how, Ended::NoCommand | Ended::NoFile) || have.failures >= self.policy.failures_max {
                return self.step(slot, Act::GiveUp(kind_of(how)), "it ended again and again");
            }
            if !self.due(at.saturating_add(self.backoff(slot, have.failures))) {
                return;
            }
        }
        let run = if have.ordered_at.is_some() { have.run } else { have.run.saturating_add(1) };
        self.step(slot, Act::Run { run, restart: claim.restart }, if asked { "asked for" } else { "it ended" });
    }

    /// Removals first, then what is instant, then additions; each kind within its limit, counting what is under way.
    fn bound(mut self, view: &View<'_>) -> HostPlan {
        if self.plan.steps.is_empty() {
            return self.plan;
        }
        let ops = view.slots.iter().filter_map(|(_, have)| have.as_ref()?.op);
        let under_way = |op: Op| ops.clone().filter(|known| *known == op).count();
        let mut removes = self.policy.removes_max.saturating_sub(under_way(Op::Remove));
        let mut makes = self.policy.makes_max.saturating_sub(under_way(Op::Make) + under_way(Op::Unmake));
        let claimed = self.claimed;
        // A claimed slot before one for the pool: somebody waits for it.
        self.plan.steps.sort_by_key(|step| match step.act {
            Act::Deliver { .. } | Act::Run { .. } | Act::Assign { .. } => 0,
            Act::Terminate | Act::Kill | Act::KillUnready | Act::CancelMake | Act::GiveUp(_) => 1,
            Act::Remove | Act::Forget => 2,
            Act::Freeze | Act::Thaw | Act::AskFull => 3,
            Act::Make if claimed.contains(&step.slot) => 4,
            Act::Make => 5,
        });
        self.plan.steps.retain(|step| {
            let budget = match step.act {
                Act::Remove => &mut removes,
                Act::Make => &mut makes,
                _ => return true,
            };
            let room = *budget > 0;
            *budget = budget.saturating_sub(1);
            room
        });
        self.plan
    }
}

/// The kind of failure a run's end is, when it is the last one.
pub fn kind_of(how: &Ended) -> FailureKind {
    match how {
        Ended::Exited(Exit::OutOfMemory) => FailureKind::OutOfMemory,
        Ended::Exited(Exit::Code(_) | Exit::Signal(_)) => FailureKind::CrashLoop,
        Ended::NoCommand => FailureKind::Command,
        Ended::NoFile => FailureKind::Volume,
        Ended::NoRoom => FailureKind::Runtime,
        Ended::NotReady => FailureKind::Probe,
    }
}

// ------------------------------------------------------------------------------------------------ observe

/// The state to report of a slot; `None`: there is nothing new to say yet (the agent or the init is just coming back).
pub fn observe(want: &Want, have: &Have, lease_held: bool, now: Millis, policy: &Policy) -> Option<SlotState> {
    let claim = want.claim;
    if want.target == SlotTarget::Absent {
        return match have.container {
            Container::Absent if have.op.is_none() => Some(SlotState::Absent),
            Container::Unknown => Some(SlotState::Unknown),
            _ => Some(SlotState::Stopping),
        };
    }
    if have.gave_up.is_some_and(|at| at >= claim.map_or(0, |claim| claim.restart)) {
        return Some(SlotState::Failed);
    }
    // One that runs is only looked at again, as after a restart of the agent.
    if have.op == Some(Op::Make) && have.container != Container::Up {
        return Some(SlotState::Creating);
    }
    match (&have.init, have.container) {
        (Init::Silent { since }, Container::Unknown) => {
            (now >= since.saturating_add(policy.greet_ms)).then_some(SlotState::Unknown)
        }
        (Init::Silent { .. }, Container::Up) if have.frozen && claim.is_none() => Some(SlotState::Frozen),
        (Init::Silent { .. }, Container::Up) => None,
        (_, Container::Absent | Container::Made | Container::Ended) => Some(SlotState::Creating),
        (Init::Waiting, _) => Some(match (claim, want.warm) {
            (Some(_), _) => SlotState::Starting,
            (None, WarmMode::App | WarmMode::Frozen) => SlotState::Creating,
            (None, WarmMode::Exec | WarmMode::None) => SlotState::Waiting,
        }),
        // On its way into the freezer; a moment later there is something to say.
        (Init::Running, _) if claim.is_none() && have.ready && have.op == Some(Op::Freeze) => None,
        (Init::Running, _) => Some(match claim {
            None if have.frozen => SlotState::Frozen,
            // Of those that are frozen, the one that is next in line.
            None if have.ready => SlotState::Waiting,
            None => SlotState::Creating,
            Some(claim) if !lease_held && claim.single_writer => SlotState::Stopping,
            Some(claim) if have.stale || claim.restart > have.restarted => SlotState::Restarting,
            Some(_) if have.term_at.is_some() || have.kill_at.is_some() => SlotState::Restarting,
            Some(claim) if have.ready && !have.frozen && have.assigned == Some(claim.instance) => SlotState::Running,
            Some(_) => SlotState::Starting,
        }),
        (Init::Ended { .. }, _) => Some(if claim.is_some() { SlotState::Restarting } else { SlotState::Creating }),
    }
}

/// How long a claimed slot may be on its way from waiting to running before that is worth a report.
pub const STARTING_LASTS_MS: Millis = 100;

/// Whether a state is to be reported that has lasted since `since`, after `said`. A claim takes a warm slot to running in
/// milliseconds: a report of its being on the way would only stand before the one that is waited for.
pub fn worth_saying(said: Option<SlotState>, state: SlotState, since: Millis, now: Millis) -> Result<(), Millis> {
    let warm = said.is_some_and(SlotState::is_ready);
    let at = since.saturating_add(STARTING_LASTS_MS);
    if warm && state == SlotState::Starting && now < at { Err(at) } else { Ok(()) }
}

#[cfg(test)]
mod tests;
