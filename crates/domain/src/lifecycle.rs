//! The life of a workload: one pure machine for an instance, one plan for a workload, one answer for people.
//!
//! ```text
//!            Placed            Reported
//!  Queued ───────────▶ Placed ─────────▶ Creating ─▶ Starting ─▶ Running ◀──▶ Restarting
//!     │                  │                  │           │           │             │
//!     │ Leave            │ Leave            └───────────┴─── deadline, report ────┴─▶ Failed
//!     ▼                  ▼                                                              │ Leave
//!   Gone ◀──────────── Stopping ◀────────────────────────────────────────────────────── ┘
//! ```
//!
//! Desired is the control plane's and observed the node's; neither is derived from the other. `Unreachable` is a
//! state: the node is silent, so nobody knows. What a person sees is computed by [`shown`]. Leaving always works
//! and is never undone: a report of "running" about an instance that was told to go is history.

use crate::ids::InstanceId;
use crate::slot::{Failure, FailureKind, SlotState};
use crate::workload::{Desired, InstanceView, NodeHealth, WorkloadView};
use crate::{Millis, Reason};

/// A node that has not been heard of for this long is silent: three heartbeats of 5 s.
pub const NODE_SILENT_MS: Millis = 15_000;

/// Where an instance stands, as the control plane knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Phase {
    /// No room yet.
    Queued,
    /// It has a slot on a node; the node has not reported on it.
    Placed,
    Creating,
    Starting,
    Running,
    Restarting,
    /// Its node is silent.
    Unreachable,
    Stopping,
    /// Terminal for the instance, kept as the record of why.
    Failed,
    /// Terminal: its container is certainly gone.
    Gone,
}

impl Phase {
    pub const ALL: [Self; 10] = [
        Self::Queued,
        Self::Placed,
        Self::Creating,
        Self::Starting,
        Self::Running,
        Self::Restarting,
        Self::Unreachable,
        Self::Stopping,
        Self::Failed,
        Self::Gone,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Placed => "placed",
            Self::Creating => "creating",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Restarting => "restarting",
            Self::Unreachable => "unreachable",
            Self::Stopping => "stopping",
            Self::Failed => "failed",
            Self::Gone => "gone",
        }
    }

    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|phase| phase.name() == text)
    }

    pub fn is_terminal(self) -> bool {
        matches!(self, Self::Failed | Self::Gone)
    }

    /// Must change within [`deadline_ms`]; persistent ones may stay for ever.
    pub fn is_transient(self) -> bool {
        deadline_ms(self).is_some()
    }
}

/// What can happen to an instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Event {
    /// A slot was found for it.
    Placed,
    /// The node agent's report about the current generation of its slot.
    Reported(SlotState),
    /// The phase's deadline has passed.
    Overdue,
    /// It was told to go: a stop, a delete, a newer release, a node drained.
    Leave,
    NodeSilent,
}

/// The event cannot happen in this phase; the caller drops it and counts it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Nothing more happens to it.
    Terminal,
    /// Only a queued instance is placed.
    NotQueued,
    /// It has no container that could be reported on.
    NoSlot,
    /// This phase has no deadline.
    NoDeadline,
}

/// How long a phase may last, in milliseconds; `None`: as long as it likes.
///
/// `Starting` is enforced on the node by the template's own deadline; this is the longest a template may ask for,
/// plus the report's way home.
pub fn deadline_ms(phase: Phase) -> Option<Millis> {
    match phase {
        // A node that is live answers at once; three heartbeats allow for a reconnect.
        Phase::Placed => Some(30_000),
        // A pull of some gigabytes at 10 MB/s.
        Phase::Creating => Some(10 * 60_000),
        Phase::Starting => Some(10 * 60_000),
        // The longest back-off is 5 minutes, then it must start.
        Phase::Restarting => Some(7 * 60_000),
        // The longest stop deadline is 330 s, then SIGKILL.
        Phase::Stopping => Some(7 * 60_000),
        // Queued waits for room, however long; Unreachable waits for the node or its operator.
        Phase::Queued | Phase::Unreachable | Phase::Running | Phase::Failed | Phase::Gone => None,
    }
}

/// The next phase of an instance, or why the event means nothing to it.
pub fn step(phase: Phase, event: Event) -> Result<Phase, Refusal> {
    match (phase, event) {
        // A failed instance still has a container to be taken away.
        (Phase::Failed, Event::Leave) => Ok(Phase::Failed),
        (Phase::Failed, Event::Reported(_)) => Ok(Phase::Failed),
        (Phase::Gone | Phase::Failed, _) => Err(Refusal::Terminal),

        (Phase::Queued, Event::Placed) => Ok(Phase::Placed),
        (_, Event::Placed) => Err(Refusal::NotQueued),
        // Nothing exists outside yet.
        (Phase::Queued, Event::Leave) => Ok(Phase::Gone),
        (Phase::Queued, Event::Reported(_) | Event::NodeSilent) => Err(Refusal::NoSlot),

        (Phase::Stopping, Event::Reported(SlotState::Absent)) => Ok(Phase::Gone),
        (Phase::Stopping, Event::Reported(_) | Event::Leave | Event::NodeSilent | Event::Overdue) => {
            Ok(Phase::Stopping)
        }

        (_, Event::Leave) => Ok(Phase::Stopping),
        (_, Event::NodeSilent) => Ok(Phase::Unreachable),
        (_, Event::Reported(state)) => Ok(reported(phase, state)),
        (_, Event::Overdue) if phase.is_transient() => Ok(Phase::Failed),
        (_, Event::Overdue) => Err(Refusal::NoDeadline),
    }
}

fn reported(phase: Phase, state: SlotState) -> Phase {
    match state {
        // Missing although wanted: the node agent makes it again, or says that it cannot.
        SlotState::Absent => Phase::Placed,
        SlotState::Creating => Phase::Creating,
        // Warm and claimed at once: the claim is on its way.
        SlotState::Waiting | SlotState::Frozen => Phase::Starting,
        SlotState::Starting => Phase::Starting,
        SlotState::Running => Phase::Running,
        SlotState::Restarting => Phase::Restarting,
        SlotState::Exited | SlotState::Failed => Phase::Failed,
        // The node stops it for a reason of its own (a lost lease): it is started again when that is over.
        SlotState::Stopping => Phase::Restarting,
        // The node agent could not tell; what was known stands, but an unreachable one is reachable again.
        SlotState::Unknown if phase == Phase::Unreachable => Phase::Placed,
        SlotState::Unknown => phase,
    }
}

/// What went wrong when a phase ran out of time.
pub fn overdue(phase: Phase) -> Failure {
    let (kind, message) = match phase {
        Phase::Creating => (FailureKind::ImageMissing, "The image was not there in time."),
        Phase::Starting => (FailureKind::Probe, "It did not answer in time."),
        Phase::Restarting => (FailureKind::CrashLoop, "It was not started again in time."),
        _ => (FailureKind::Runtime, "The node did not take it up in time."),
    };
    Failure { kind, message: message.to_owned(), exit: None, log_tail: Vec::new() }
}

// ------------------------------------------------------------------------------------------------ plan

/// One thing to do for a workload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Act {
    /// A new instance of the current release: warm, cold or queued, as there is room.
    Create,
    /// Take its container away (or drop it from the queue).
    Leave { instance: InstanceId, why: &'static str },
    /// Its deadline has passed.
    Fail { instance: InstanceId, failure: Failure },
    /// Nothing of it is left outside: end the row and give its volume back.
    Finish,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    pub acts: Vec<Act>,
    /// When to look again if nothing is reported before.
    pub wake_at: Option<Millis>,
}

/// A transient failure is tried again this often in a row before the workload is shown as failed.
pub const REPLACEMENTS_MAX: u32 = 5;

fn phase_of(instance: &InstanceView) -> Phase {
    // Failing is final, also while its container is taken away: the record of why must not turn into "gone".
    if instance.failure.is_some() && matches!(instance.observed, SlotState::Failed | SlotState::Exited) {
        return Phase::Failed;
    }
    // "Absent" is also what a container is before it is made; only a slot that was given back is certainly gone.
    if instance.leaving {
        return if instance.slot.is_none() { Phase::Gone } else { Phase::Stopping };
    }
    if instance.slot.is_none() {
        return Phase::Queued;
    }
    if instance.node_health == NodeHealth::Silent {
        return Phase::Unreachable;
    }
    reported(Phase::Placed, instance.observed)
}

/// What brings a workload nearer to what is wanted of it. Doing it twice changes nothing.
pub fn converge(view: &WorkloadView, now: Millis) -> Plan {
    let mut plan = Plan::default();
    let mut wake = |at: Millis| plan_wake(&mut plan.wake_at, at);
    let mut acts = Vec::new();
    let phases: Vec<(Phase, &InstanceView)> = view.instances.iter().map(|one| (phase_of(one), one)).collect();

    for (phase, instance) in &phases {
        let Some(limit) = deadline_ms(*phase) else { continue };
        let due = instance.since + limit;
        if *phase == Phase::Stopping || due > now {
            wake(due.max(now + 1_000));
        } else {
            acts.push(Act::Fail { instance: instance.id, failure: overdue(*phase) });
        }
    }
    // A failed instance has said why; its container has nothing more to give.
    acts.extend(
        phases
            .iter()
            .filter(|(phase, one)| *phase == Phase::Failed && one.slot.is_some() && !one.leaving)
            .map(|(_, one)| Act::Leave { instance: one.id, why: "failed" }),
    );
    let alive: Vec<_> = phases.iter().filter(|(phase, _)| !phase.is_terminal()).collect();
    let staying: Vec<_> = alive.iter().filter(|(phase, _)| *phase != Phase::Stopping).collect();

    if view.desired != Desired::Running {
        let why = if view.desired == Desired::Deleted { "deleted" } else { "stopped" };
        acts.extend(staying.iter().map(|(_, one)| Act::Leave { instance: one.id, why }));
        let still_there =
            phases.iter().any(|(phase, one)| *phase != Phase::Gone && one.slot.is_some() || !phase.is_terminal());
        if view.desired == Desired::Deleted && !still_there {
            acts.push(Act::Finish);
        }
        plan.acts = acts;
        return plan;
    }

    let current: Vec<_> = staying.iter().filter(|(_, one)| one.release == view.release).collect();
    let older: Vec<_> = staying.iter().filter(|(_, one)| one.release != view.release).collect();
    let serves = current.iter().any(|(phase, _)| *phase == Phase::Running);
    // Start first, then stop: except that a single writer must be gone before its successor comes.
    if serves || view.single_writer {
        acts.extend(older.iter().map(|(_, one)| Act::Leave { instance: one.id, why: "replaced" }));
    }
    // Two of the current release can only come from a race; the newest stays.
    for (_, one) in current.iter().rev().skip(1) {
        acts.push(Act::Leave { instance: one.id, why: "surplus" });
    }
    if current.is_empty() {
        let newest_failure = phases
            .iter()
            .rev()
            .find(|(phase, one)| *phase == Phase::Failed && one.release == view.release)
            .and_then(|(_, one)| one.failure.as_ref());
        let blocked = view.single_writer
            && phases.iter().any(|(phase, one)| !phase.is_terminal() || *phase == Phase::Failed && one.slot.is_some());
        match newest_failure {
            Some(failure) if !failure.kind.is_transient() || view.failures_in_a_row > REPLACEMENTS_MAX => {}
            _ if blocked => {}
            Some(_) => {
                let at = view.last_failure_at.unwrap_or(now)
                    + crate::backoff::next(view.failures_in_a_row.max(1), 2_000, 120_000, 0);
                if at <= now { acts.push(Act::Create) } else { wake(at) }
            }
            None => acts.push(Act::Create),
        }
    }
    plan.acts = acts;
    plan
}

fn plan_wake(known: &mut Option<Millis>, at: Millis) {
    *known = Some(known.map_or(at, |before| before.min(at)));
}

// ------------------------------------------------------------------------------------------------ shown

/// What a person sees of a workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Shown {
    Queued,
    Starting,
    Running,
    /// A newer release is on its way while the older one serves.
    Updating,
    Restarting,
    Stopping,
    Stopped,
    Failed,
    Unreachable,
    Deleting,
    Deleted,
}

impl Shown {
    pub const ALL: [Self; 11] = [
        Self::Queued,
        Self::Starting,
        Self::Running,
        Self::Updating,
        Self::Restarting,
        Self::Stopping,
        Self::Stopped,
        Self::Failed,
        Self::Unreachable,
        Self::Deleting,
        Self::Deleted,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Updating => "updating",
            Self::Restarting => "restarting",
            Self::Stopping => "stopping",
            Self::Stopped => "stopped",
            Self::Failed => "failed",
            Self::Unreachable => "unreachable",
            Self::Deleting => "deleting",
            Self::Deleted => "deleted",
        }
    }

    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|shown| shown.name() == text)
    }
}

/// The state people see, with its reason when there is something to say.
///
/// `deleted` says that the row itself has ended; instances that are gone need not be listed.
pub fn shown(view: &WorkloadView, deleted: bool) -> (Shown, Option<Reason>) {
    if deleted {
        return (Shown::Deleted, None);
    }
    let phases: Vec<(Phase, &InstanceView)> = view.instances.iter().map(|one| (phase_of(one), one)).collect();
    let alive = |(phase, _): &&(Phase, &InstanceView)| !phase.is_terminal();
    match view.desired {
        Desired::Deleted => return (Shown::Deleting, None),
        Desired::Stopped if phases.iter().any(|one| alive(&one)) => return (Shown::Stopping, None),
        Desired::Stopped => return (Shown::Stopped, None),
        Desired::Running => {}
    }
    let serves_older = phases.iter().any(|(phase, one)| *phase == Phase::Running && one.release != view.release);
    let newest = phases
        .iter()
        .rev()
        .find(|(phase, one)| one.release == view.release && *phase != Phase::Gone && *phase != Phase::Stopping);
    let (state, reason) = match newest {
        None if phases.iter().any(|(phase, _)| *phase == Phase::Stopping) => (
            Shown::Starting,
            Some(Reason::new("replacing", "The previous container is stopping; the next one starts after it.")),
        ),
        None => (Shown::Starting, None),
        Some((phase, instance)) => (from_phase(*phase, view), why(*phase, instance)),
    };
    match state {
        Shown::Queued | Shown::Starting if serves_older => (Shown::Updating, reason),
        Shown::Failed if serves_older => (
            Shown::Running,
            reason.map(|reason| Reason {
                message: format!("The newest release failed and the one before it still serves: {}", reason.message),
                ..reason
            }),
        ),
        _ => (state, reason),
    }
}

fn from_phase(phase: Phase, view: &WorkloadView) -> Shown {
    match phase {
        Phase::Queued => Shown::Queued,
        Phase::Placed | Phase::Creating | Phase::Starting => Shown::Starting,
        Phase::Running => Shown::Running,
        Phase::Restarting => Shown::Restarting,
        Phase::Unreachable => Shown::Unreachable,
        Phase::Stopping | Phase::Gone => Shown::Stopping,
        Phase::Failed => {
            let tried_again = view
                .instances
                .last()
                .and_then(|one| one.failure.as_ref())
                .is_some_and(|failure| failure.kind.is_transient() && view.failures_in_a_row <= REPLACEMENTS_MAX);
            if tried_again { Shown::Restarting } else { Shown::Failed }
        }
    }
}

fn why(phase: Phase, instance: &InstanceView) -> Option<Reason> {
    if let Some(failure) = &instance.failure
        && matches!(phase, Phase::Failed | Phase::Restarting | Phase::Starting)
    {
        return Some(Reason::new(failure.kind.code(), failure.message.clone()).with_hint(failure.kind.hint()));
    }
    match phase {
        Phase::Queued => Some(Reason::new("no_room", "Every node is full; it starts as soon as there is room.")),
        Phase::Unreachable => Some(
            Reason::new("node_silent", "Its node has not been heard of; what runs there goes on running.")
                .with_hint("It shows its state again as soon as the node reports."),
        ),
        Phase::Creating => Some(Reason::new("creating", "The image is fetched and the container made.")),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{NodeId, ReleaseId, SlotId};
    use proptest::prelude::*;

    fn events() -> Vec<Event> {
        let mut events = vec![Event::Placed, Event::Overdue, Event::Leave, Event::NodeSilent];
        events.extend(SlotState::ALL.map(Event::Reported));
        events
    }

    #[test]
    fn the_matrix_is_the_reviewed_one() {
        let mut table = String::from("phase × event → next phase (generated; review like code)\n");
        for phase in Phase::ALL {
            let limit = deadline_ms(phase).map_or("none".to_owned(), |ms| format!("{} s", ms / 1000));
            table.push_str(&format!("\n{} (deadline {limit})\n", phase.name()));
            for event in events() {
                let event_name = match event {
                    Event::Reported(state) => format!("reported {}", state.name()),
                    other => format!("{other:?}").to_lowercase(),
                };
                let next = match step(phase, event) {
                    Ok(next) => next.name().to_owned(),
                    Err(refusal) => format!("– ({refusal:?})"),
                };
                table.push_str(&format!("  {event_name:<20} {next}\n"));
            }
        }
        crate::testing::snapshot("lifecycle-matrix.txt", &table);
    }

    #[test]
    fn every_transient_phase_ends_by_its_deadline() {
        for phase in Phase::ALL.into_iter().filter(|phase| phase.is_transient()) {
            let next = step(phase, Event::Overdue).unwrap();
            assert!(next.is_terminal() || next == Phase::Stopping, "{phase:?}");
        }
    }

    #[test]
    fn leaving_always_works_and_is_never_undone() {
        for phase in Phase::ALL.into_iter().filter(|phase| *phase != Phase::Gone) {
            let left = step(phase, Event::Leave).unwrap();
            for event in events().into_iter().filter(|event| *event != Event::Placed) {
                let next = step(left, event).unwrap_or(left);
                assert!(matches!(next, Phase::Stopping | Phase::Gone | Phase::Failed), "{phase:?} {event:?} {next:?}");
            }
        }
    }

    fn instance(id: u128, release: u128, observed: SlotState) -> InstanceView {
        InstanceView {
            id: InstanceId::from_u128(id),
            release: ReleaseId::from_u128(release),
            slot: Some(SlotId::from_u128(id)),
            node: Some(NodeId::from_u128(1)),
            node_health: NodeHealth::Live,
            observed,
            failure: None,
            since: 0,
            leaving: false,
            was_ready: false,
        }
    }

    fn failed(id: u128, release: u128, kind: FailureKind) -> InstanceView {
        let failure = Failure { kind, message: "it broke".to_owned(), exit: None, log_tail: vec![] };
        InstanceView { failure: Some(failure), ..instance(id, release, SlotState::Failed) }
    }

    fn view(desired: Desired, instances: Vec<InstanceView>) -> WorkloadView {
        WorkloadView {
            desired,
            release: ReleaseId::from_u128(2),
            single_writer: false,
            failures_in_a_row: 0,
            last_failure_at: None,
            instances,
        }
    }

    fn leave(id: u128, why: &'static str) -> Act {
        Act::Leave { instance: InstanceId::from_u128(id), why }
    }

    #[test]
    fn an_update_starts_the_new_one_before_it_stops_the_old() {
        let old = instance(1, 1, SlotState::Running);
        assert_eq!(converge(&view(Desired::Running, vec![old.clone()]), 0).acts, [Act::Create]);
        let starting = vec![old.clone(), instance(2, 2, SlotState::Starting)];
        assert_eq!(converge(&view(Desired::Running, starting.clone()), 0).acts, []);
        assert_eq!(shown(&view(Desired::Running, starting), false).0, Shown::Updating);
        let both = vec![old, instance(2, 2, SlotState::Running)];
        assert_eq!(converge(&view(Desired::Running, both), 0).acts, [leave(1, "replaced")]);
    }

    #[test]
    fn a_single_writer_is_gone_before_its_successor_comes() {
        let mut seen =
            WorkloadView { single_writer: true, ..view(Desired::Running, vec![instance(1, 1, SlotState::Running)]) };
        assert_eq!(converge(&seen, 0).acts, [leave(1, "replaced")]);
        seen.instances[0].leaving = true;
        assert_eq!(converge(&seen, 0).acts, []);
        seen.instances[0].observed = SlotState::Absent;
        assert_eq!(converge(&seen, 0).acts, [], "absent may be not made yet");
        seen.instances[0].slot = None;
        assert_eq!(converge(&seen, 0).acts, [Act::Create]);
    }

    #[test]
    fn a_release_that_fails_leaves_the_one_before_it_serving() {
        let seen = view(Desired::Running, vec![instance(1, 1, SlotState::Running), failed(2, 2, FailureKind::Command)]);
        assert_eq!(converge(&seen, 0).acts, [leave(2, "failed")]);
        let (state, reason) = shown(&seen, false);
        assert_eq!(state, Shown::Running);
        assert!(reason.unwrap().message.starts_with("The newest release failed"));
    }

    #[test]
    fn what_cannot_be_mended_by_trying_again_is_not_tried_again() {
        let leaving =
            view(Desired::Running, vec![InstanceView { leaving: true, ..failed(2, 2, FailureKind::Command) }]);
        assert_eq!(converge(&leaving, 0).acts, []);
        let seen = view(Desired::Running, vec![InstanceView { slot: None, ..failed(2, 2, FailureKind::Command) }]);
        assert_eq!(converge(&seen, 0).acts, []);
        assert_eq!(shown(&seen, false).0, Shown::Failed);
        let transient = view(Desired::Running, vec![InstanceView { slot: None, ..failed(2, 2, FailureKind::Runtime) }]);
        assert_eq!(
            converge(&WorkloadView { failures_in_a_row: 1, last_failure_at: Some(0), ..transient.clone() }, 5_000).acts,
            [Act::Create]
        );
        let waits = converge(&WorkloadView { failures_in_a_row: 1, last_failure_at: Some(0), ..transient }, 1_000);
        assert_eq!((waits.acts, waits.wake_at), (vec![], Some(2_000)));
    }

    #[test]
    fn a_delete_ends_when_nothing_is_left() {
        let mut seen = view(Desired::Deleted, vec![instance(1, 2, SlotState::Running)]);
        assert_eq!(converge(&seen, 0).acts, [leave(1, "deleted")]);
        seen.instances[0].leaving = true;
        assert_eq!(converge(&seen, 0).acts, []);
        seen.instances[0].slot = None;
        assert_eq!(converge(&seen, 0).acts, [Act::Finish]);
        assert_eq!(converge(&view(Desired::Deleted, vec![]), 0).acts, [Act::Finish]);
    }

    fn any_instance() -> impl Strategy<Value = InstanceView> {
        let states = prop::sample::select(SlotState::ALL.to_vec());
        let kinds = prop::sample::select(FailureKind::ALL.to_vec());
        (1u128..5, states, kinds, any::<bool>(), any::<bool>(), any::<bool>(), 0i64..2_000_000).prop_map(
            |(release, observed, kind, leaving, silent, placed, since)| InstanceView {
                release: ReleaseId::from_u128(release),
                failure: matches!(observed, SlotState::Failed | SlotState::Exited)
                    .then(|| overdue(Phase::Placed))
                    .map(|f| Failure { kind, ..f }),
                node_health: if silent { NodeHealth::Silent } else { NodeHealth::Live },
                slot: placed.then(|| SlotId::from_u128(9)),
                leaving,
                since,
                ..instance(1, 1, observed)
            },
        )
    }

    proptest! {
        #[test]
        fn converging_is_safe(
            desired in prop::sample::select(Desired::ALL.to_vec()),
            single_writer: bool,
            failures_in_a_row in 0u32..10,
            mut instances in prop::collection::vec(any_instance(), 0..6),
        ) {
            for (at, one) in instances.iter_mut().enumerate() {
                one.id = InstanceId::from_u128(at as u128 + 1);
            }
            let seen = WorkloadView { single_writer, failures_in_a_row, ..view(desired, instances) };
            let plan = converge(&seen, 1_000_000);
            let creates = plan.acts.iter().filter(|act| **act == Act::Create).count();
            prop_assert!(creates <= 1);
            if desired != Desired::Running {
                prop_assert_eq!(creates, 0);
            }
            if single_writer && creates == 1 {
                // Everything that had a container is certainly gone.
                prop_assert!(seen.instances.iter().all(|one| matches!(phase_of(one), Phase::Gone | Phase::Failed)));
            }
            if plan.acts.contains(&Act::Finish) {
                prop_assert!(desired == Desired::Deleted);
                prop_assert!(seen.instances.iter().all(|one| phase_of(one).is_terminal()));
            }
            // Showing is total.
            let _ = shown(&seen, false);
        }
    }
}
