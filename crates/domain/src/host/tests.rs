use proptest::prelude::*;

use super::*;

use std::collections::BTreeMap;

/// A host that can be changed, as the steps would change it.
#[derive(Clone, Debug)]
struct View {
    wants: Vec<Want>,
    haves: Vec<Have>,
    contacted: bool,
    lease_held: bool,
}

fn plan(view: &View, now: Millis, policy: &Policy) -> HostPlan {
    plan_in(view, None, now, policy)
}

fn plan_in(view: &View, burst: Option<Burst>, now: Millis, policy: &Policy) -> HostPlan {
    let mut slots: BTreeMap<SlotId, (Option<&Want>, Option<&Have>)> = BTreeMap::new();
    view.wants.iter().for_each(|want| slots.entry(want.slot).or_default().0 = Some(want));
    view.haves.iter().for_each(|have| slots.entry(have.slot).or_default().1 = Some(have));
    let slots = slots.into_values().collect();
    let view = super::View { slots, contacted: view.contacted, lease_held: view.lease_held, burst };
    super::plan(&view, now, policy)
}

const NOW: Millis = 1_000_000;
const ME: InstanceId = InstanceId::from_u128(7);
const OTHER: InstanceId = InstanceId::from_u128(8);

fn slot(n: u128) -> SlotId {
    SlotId::from_u128(n)
}

fn want(n: u128, warm: WarmMode, claim: Option<InstanceId>) -> Want {
    Want {
        slot: slot(n),
        target: SlotTarget::Present,
        warm,
        pool: "agent/free".to_owned(),
        claim: claim.map(|instance| WantClaim { instance, restart: 0, single_writer: false }),
        volume: None,
        complete: true,
        start_deadline_ms: 10_000,
        stop_deadline_ms: 5_000,
    }
}

fn up(n: u128, init: Init) -> Have {
    let busy = matches!(init, Init::Running | Init::Ended { .. });
    Have {
        wired: true,
        owner: busy.then_some(Owner::Instance(ME)),
        assigned: busy.then_some(ME),
        run: u32::from(busy),
        init,
        ..Have::nothing(slot(n), Container::Up, NOW)
    }
}

fn acts(wants: Vec<Want>, haves: Vec<Have>) -> Vec<Act> {
    acts_at(NOW, wants, haves).0
}

fn acts_at(now: Millis, wants: Vec<Want>, haves: Vec<Have>) -> (Vec<Act>, Option<Millis>) {
    let view = View { wants, haves, contacted: true, lease_held: true };
    let plan = plan(&view, now, &Policy::default());
    (plan.steps.into_iter().map(|step| step.act).collect(), plan.wake_at)
}

fn ended(how: Ended) -> Init {
    Init::Ended { at: NOW, how }
}

/// One line a situation: what is wanted, what is there, what follows.
#[test]
fn the_table_of_one_slot() {
    use WarmMode::{App, Exec, Frozen};
    let frozen_pool =
        |ready, frozen| Have { owner: Some(Owner::Slot), assigned: None, ready, frozen, ..up(1, Init::Running) };
    let deliver = |run| vec![Act::Deliver { run, restart: 0 }];
    let table: Vec<(&str, Want, Have, Vec<Act>)> = vec![
        ("missing", want(1, Exec, None), Have::nothing(slot(1), Container::Absent, NOW), vec![Act::Make]),
        ("unknown is not absent", want(1, Exec, None), Have::nothing(slot(1), Container::Unknown, NOW), vec![]),
        ("made, not started", want(1, Exec, None), Have::nothing(slot(1), Container::Made, NOW), vec![Act::Make]),
        ("host restarted", want(1, Exec, Some(ME)), Have::nothing(slot(1), Container::Ended, NOW), vec![Act::Make]),
        ("warm", want(1, Exec, None), up(1, Init::Waiting), vec![]),
        ("claimed", want(1, Exec, Some(ME)), up(1, Init::Waiting), deliver(1)),
        ("its own claim again", want(1, Exec, Some(ME)), Have { run: 4, ..up(1, Init::Waiting) }, deliver(5)),
        (
            "sent and unanswered",
            want(1, Exec, Some(ME)),
            Have { ordered_at: Some(NOW), run: 1, ..up(1, Init::Waiting) },
            vec![],
        ),
        (
            "sent and lost: the same run again",
            want(1, Exec, Some(ME)),
            Have { ordered_at: Some(NOW - 5_000), run: 1, ..up(1, Init::Waiting) },
            deliver(1),
        ),
        (
            "secrets are not here",
            Want { complete: false, ..want(1, Exec, Some(ME)) },
            up(1, Init::Waiting),
            vec![Act::AskFull],
        ),
        ("runs", want(1, Exec, Some(ME)), Have { ready: true, ..up(1, Init::Running) }, vec![]),
        ("served another", want(1, Exec, Some(OTHER)), Have { ready: true, ..up(1, Init::Running) }, vec![Act::Remove]),
        ("served, now unclaimed", want(1, Exec, None), up(1, Init::Running), vec![Act::Remove]),
        (
            "stranger's claim",
            want(1, Exec, Some(ME)),
            Have { owner: Some(Owner::Stranger), ..up(1, Init::Running) },
            vec![Act::Remove],
        ),
        ("pool app starts", want(1, Frozen, None), up(1, Init::Waiting), deliver(1)),
        ("pool app not ready", want(1, Frozen, None), frozen_pool(false, false), vec![]),
        (
            "pool app late",
            want(1, Frozen, None),
            Have { started_at: NOW - 600_000, ..frozen_pool(false, false) },
            vec![Act::KillUnready],
        ),
        (
            "pool app that cannot be asked yet",
            Want { complete: false, ..want(1, Frozen, None) },
            Have { started_at: NOW - 600_000, ..frozen_pool(false, false) },
            vec![],
        ),
        ("pool app ready, and the first", want(1, Frozen, None), frozen_pool(true, false), vec![]),
        ("pool app frozen, and the first now", want(1, Frozen, None), frozen_pool(true, true), vec![Act::Thaw]),
        ("an app is not frozen", want(1, App, None), frozen_pool(true, false), vec![]),
        ("frozen and claimed", want(1, Frozen, Some(ME)), frozen_pool(true, true), vec![Act::Assign { instance: ME }]),
        (
            "pool app ended",
            want(1, Frozen, None),
            Have { assigned: None, owner: Some(Owner::Slot), ..up(1, ended(Ended::Exited(Exit::Code(1)))) },
            vec![Act::GiveUp(FailureKind::CrashLoop)],
        ),
        (
            "did not answer",
            want(1, Exec, Some(ME)),
            Have { started_at: NOW - 10_000, ..up(1, Init::Running) },
            vec![Act::KillUnready],
        ),
        (
            "no such command",
            want(1, Exec, Some(ME)),
            Have { failures: 1, ..up(1, ended(Ended::NoCommand)) },
            vec![Act::GiveUp(FailureKind::Command)],
        ),
        (
            "out of memory for the fifth time",
            want(1, Exec, Some(ME)),
            Have { failures: 5, ..up(1, ended(Ended::Exited(Exit::OutOfMemory))) },
            vec![Act::GiveUp(FailureKind::OutOfMemory)],
        ),
        (
            "ended after we asked it to",
            want(1, Exec, Some(ME)),
            Have { term_at: Some(NOW), ..up(1, ended(Ended::Exited(Exit::Code(0)))) },
            vec![Act::Run { run: 2, restart: 0 }],
        ),
        (
            "no image",
            want(1, Exec, None),
            Have {
                fault: Some(Fault { kind: FailureKind::ImageMissing, at: NOW, count: 1 }),
                ..Have::nothing(slot(1), Container::Absent, NOW)
            },
            vec![Act::GiveUp(FailureKind::ImageMissing)],
        ),
        (
            "Docker refused just now",
            want(1, Exec, None),
            Have {
                fault: Some(Fault { kind: FailureKind::Runtime, at: NOW, count: 1 }),
                ..Have::nothing(slot(1), Container::Absent, NOW)
            },
            vec![],
        ),
        (
            "being made",
            want(1, Exec, None),
            Have { op: Some(Op::Make), ..Have::nothing(slot(1), Container::Absent, NOW) },
            vec![],
        ),
        (
            "mute init",
            want(1, Exec, None),
            Have { init: Init::Silent { since: NOW - 30_000 }, ..up(1, Init::Waiting) },
            vec![Act::Remove],
        ),
    ];
    for (name, want, have, expected) in table {
        assert_eq!(acts(vec![want], vec![have]), expected, "{name}");
    }
}

#[test]
fn removals_that_docker_refuses_hold_up_no_other() {
    let leaving = |number| Want { target: SlotTarget::Absent, ..want(number, WarmMode::Exec, None) };
    let wants = || (1..=5).map(leaving).collect::<Vec<_>>();
    let haves = |op| {
        let busy = (1..=4).map(|number| Have { op: Some(op), ..up(number, Init::Waiting) });
        busy.chain([up(5, Init::Waiting)]).collect::<Vec<_>>()
    };
    assert_eq!(acts(wants(), haves(Op::Remove)), [], "four at once");
    assert_eq!(acts(wants(), haves(Op::Stuck)), [Act::Remove]);
}

#[test]
fn of_each_pool_of_frozen_apps_the_oldest_is_awake() {
    let app = |number, ready_at, frozen| Have {
        owner: Some(Owner::Slot),
        assigned: None,
        ready: true,
        ready_at,
        frozen,
        ..up(number, Init::Running)
    };
    let of = |pool: &str, number| Want { pool: pool.to_owned(), ..want(number, WarmMode::Frozen, None) };
    let steps = |wants: Vec<Want>, haves: Vec<Have>| {
        let view = View { wants, haves, contacted: true, lease_held: true };
        plan(&view, NOW, &Policy::default()).steps.into_iter().map(|step| (step.slot, step.act)).collect::<Vec<_>>()
    };
    let wants = || vec![of("a", 1), of("a", 2), of("a", 3), of("b", 4)];
    let haves = |first| vec![app(1, 30, false), app(2, 10, first), app(3, 20, true), app(4, 40, false)];
    assert_eq!(steps(wants(), haves(false)), [(slot(1), Act::Freeze)]);
    assert_eq!(steps(wants(), haves(true)), [(slot(1), Act::Freeze), (slot(2), Act::Thaw)]);
    // Once that one is somebody's, the next wakes up.
    let mut wants = wants();
    wants[1].claim = want(2, WarmMode::Frozen, Some(ME)).claim;
    let taken = steps(wants, haves(false));
    assert_eq!(taken, [(slot(2), Act::Assign { instance: ME }), (slot(1), Act::Freeze), (slot(3), Act::Thaw)]);
}

#[test]
fn leaving_asks_waits_kills_and_removes() {
    let gone = Want { target: SlotTarget::Absent, ..want(1, WarmMode::Exec, Some(ME)) };
    let at = |have: Have| acts_at(NOW, vec![gone.clone()], vec![have]);
    let running = || up(1, Init::Running);
    assert_eq!(at(running()).0, [Act::Terminate]);
    assert_eq!(at(Have { term_at: Some(NOW - 4_999), ..running() }), (vec![], Some(NOW + 1)));
    assert_eq!(at(Have { term_at: Some(NOW - 5_000), ..running() }).0, [Act::Kill]);
    let killed = |kill_at| Have { term_at: Some(NOW - 9_000), kill_at: Some(kill_at), ..running() };
    assert_eq!(at(killed(NOW - 1_999)), (vec![], Some(NOW + 1)));
    assert_eq!(at(killed(NOW - 2_000)).0, [Act::Remove]);
    assert_eq!(at(up(1, ended(Ended::Exited(Exit::Code(0))))).0, [Act::Remove]);
    assert_eq!(at(up(1, Init::Waiting)).0, [Act::Remove]);
    assert_eq!(at(Have { op: Some(Op::Remove), ..running() }).0, []);
    assert_eq!(at(Have { op: Some(Op::Make), ..Have::nothing(slot(1), Container::Absent, NOW) }).0, [Act::CancelMake]);
    assert_eq!(at(Have::nothing(slot(1), Container::Absent, NOW)).0, [Act::Forget]);
    assert_eq!(at(Have::nothing(slot(1), Container::Unknown, NOW)).0, []);
    // A silent init may well have a tenant's process under it.
    assert_eq!(at(Have { init: Init::Silent { since: NOW }, ..running() }).0, [Act::Terminate]);
}

#[test]
fn what_nobody_wants_goes_only_after_first_contact() {
    let haves = vec![up(1, Init::Running), up(2, Init::Waiting), Have::nothing(slot(3), Container::Ended, NOW)];
    let view = View { wants: vec![], haves, contacted: false, lease_held: true };
    assert_eq!(plan(&view, NOW, &Policy::default()), HostPlan::default());
    let view = View { contacted: true, ..view };
    let steps = plan(&view, NOW, &Policy::default()).steps;
    assert_eq!(steps.iter().map(|step| &step.act).collect::<Vec<_>>(), [&Act::Terminate, &Act::Remove, &Act::Remove]);
}

#[test]
fn a_lost_lease_stops_single_writers_and_only_them() {
    let mut single = want(1, WarmMode::Exec, Some(ME));
    single.claim.as_mut().unwrap().single_writer = true;
    let many = want(2, WarmMode::Exec, Some(OTHER));
    let other =
        Have { assigned: Some(OTHER), owner: Some(Owner::Instance(OTHER)), ready: true, ..up(2, Init::Running) };
    let mut view = View {
        wants: vec![single, many],
        haves: vec![Have { ready: true, ..up(1, Init::Running) }, other],
        contacted: true,
        lease_held: false,
    };
    let policy = Policy::default();
    let steps = |view: &View, now| plan(view, now, &policy).steps;
    assert_eq!(steps(&view, NOW), [Step { slot: slot(1), act: Act::Terminate, why: "the lease is lost" }]);
    // Docker away changes nothing.
    view.haves[0].container = Container::Unknown;
    assert_eq!(steps(&view, NOW)[0].act, Act::Terminate);
    view.haves[0].container = Container::Up;
    view.haves[0].term_at = Some(NOW);
    assert_eq!(steps(&view, NOW + 5_000)[0].act, Act::Kill);
    view.haves[0].init = ended(Ended::Exited(Exit::Signal(15)));
    assert_eq!(steps(&view, NOW + 5_000), []);
    view.lease_held = true;
    assert_eq!(steps(&view, NOW + 5_000)[0].act, Act::Run { run: 2, restart: 0 });
}

#[test]
fn a_person_restarts_even_what_was_given_up() {
    let mut wanted = want(1, WarmMode::Exec, Some(ME));
    let given_up = Have { gave_up: Some(0), failures: 5, ..up(1, ended(Ended::Exited(Exit::Code(1)))) };
    assert_eq!(acts(vec![wanted.clone()], vec![given_up.clone()]), []);
    wanted.claim.as_mut().unwrap().restart = 1;
    assert_eq!(acts(vec![wanted.clone()], vec![given_up]), [Act::Run { run: 2, restart: 1 }]);
    let running = Have { ready: true, ..up(1, Init::Running) };
    assert_eq!(acts(vec![wanted.clone()], vec![running.clone()]), [Act::Terminate]);
    assert_eq!(acts(vec![wanted], vec![Have { restarted: 1, ..running }]), []);
}

#[test]
fn crashes_back_off_and_end() {
    let wanted = || vec![want(1, WarmMode::Exec, Some(ME))];
    let mut waits = Vec::new();
    for failures in 1..5 {
        let have = Have { failures, ..up(1, ended(Ended::Exited(Exit::Code(1)))) };
        let (steps, wake) = acts_at(NOW, wanted(), vec![have.clone()]);
        assert_eq!(steps, []);
        let wake = wake.unwrap();
        assert_eq!(acts_at(wake, wanted(), vec![have]).0, [Act::Run { run: 2, restart: 0 }]);
        waits.push(wake - NOW);
    }
    assert!(waits.windows(2).all(|pair| pair[0] < pair[1]), "{waits:?}");
    let have = Have { failures: 5, ..up(1, ended(Ended::Exited(Exit::Code(1)))) };
    assert_eq!(acts(wanted(), vec![have]), [Act::GiveUp(FailureKind::CrashLoop)]);
}

#[test]
fn a_volume_waits_for_its_last_user() {
    let volume = Some(VolumeId::from_u128(9));
    let old = Want { target: SlotTarget::Absent, volume, ..want(1, WarmMode::Exec, Some(ME)) };
    let new = Want { volume, ..want(2, WarmMode::Exec, Some(OTHER)) };
    let stopped = Have { volume, ..up(1, ended(Ended::Exited(Exit::Code(0)))) };
    assert_eq!(acts(vec![old.clone(), new.clone()], vec![stopped.clone()]), [Act::Remove]);
    let unknown = Have { container: Container::Unknown, ..stopped };
    assert_eq!(acts(vec![old.clone(), new.clone()], vec![unknown]), []);
    let gone = Have { volume, ..Have::nothing(slot(1), Container::Absent, NOW) };
    assert_eq!(acts(vec![old, new], vec![gone]), [Act::Forget, Act::Make]);
}

#[test]
fn claims_come_first_and_work_is_bounded() {
    let wants: Vec<_> = (1..=40).map(|n| want(n, WarmMode::Exec, (n % 2 == 0).then_some(ME))).collect();
    let mut haves: Vec<_> = (1..=10).map(|n| up(n, Init::Waiting)).collect();
    haves.extend((41..=60).map(|n| up(n, Init::Waiting)));
    let steps = acts(wants, haves);
    let count = |pick: fn(&Act) -> bool| steps.iter().filter(|act| pick(act)).count();
    assert_eq!(count(|act| matches!(act, Act::Deliver { .. })), 5);
    assert_eq!(count(|act| *act == Act::Remove), 4);
    assert_eq!(count(|act| *act == Act::Make), 2);
    assert!(steps[..5].iter().all(|act| matches!(act, Act::Deliver { .. })));
    assert!(steps[9..].iter().all(|act| *act == Act::Make));
}

#[test]
fn the_pool_waits_while_claims_come_but_not_for_ever() {
    let wants = vec![want(1, WarmMode::Exec, None), want(2, WarmMode::Exec, Some(ME))];
    let view = View { wants, haves: vec![], contacted: true, lease_held: true };
    let policy = Policy::default();
    let made = |burst, now| {
        let plan = plan_in(&view, burst, now, &policy);
        (plan.steps.iter().map(|step| step.slot).collect::<Vec<_>>(), plan.wake_at)
    };
    assert_eq!(made(None, NOW), (vec![slot(2), slot(1)], None));
    let mut burst = Burst::joined(None, NOW, &policy);
    // Somebody waits for the claimed one.
    assert_eq!(made(Some(burst), NOW), (vec![slot(2)], Some(NOW + 50)));
    assert_eq!(made(Some(burst), NOW + 50), (vec![slot(2), slot(1)], None));
    for now in (NOW..NOW + 3_000).step_by(49) {
        burst = Burst::joined(Some(burst), now, &policy);
        assert_eq!(made(Some(burst), now).0.contains(&slot(1)), now >= NOW + 2_000, "{}", now - NOW);
    }
    let later = Burst::joined(Some(burst), NOW + 4_000, &policy);
    assert_eq!(later, Burst { first: NOW + 4_000, last: NOW + 4_000 });
}

#[test]
fn the_way_to_running_is_only_said_when_it_lasts() {
    use SlotState::{Frozen, Restarting, Running, Starting, Waiting};
    assert_eq!(worth_saying(Some(Waiting), Starting, NOW, NOW + 99), Err(NOW + 100));
    assert_eq!(worth_saying(Some(Frozen), Starting, NOW, NOW), Err(NOW + 100));
    assert_eq!(worth_saying(Some(Waiting), Starting, NOW, NOW + 100), Ok(()));
    for (said, state) in [(Some(Waiting), Running), (Some(Restarting), Starting), (None, Starting)] {
        assert_eq!(worth_saying(said, state, NOW, NOW), Ok(()));
    }
}

// ------------------------------------------------------------------------------------------------ any input

fn any_init() -> impl Strategy<Value = Init> {
    let at = NOW - 40_000..NOW + 1;
    prop_oneof![
        at.clone().prop_map(|since| Init::Silent { since }),
        Just(Init::Waiting),
        Just(Init::Running),
        (
            at,
            prop_oneof![
                Just(Ended::Exited(Exit::Code(0))),
                Just(Ended::Exited(Exit::OutOfMemory)),
                Just(Ended::NoCommand),
                Just(Ended::NotReady),
            ]
        )
            .prop_map(|(at, how)| Init::Ended { at, how }),
    ]
}

fn any_instance() -> impl Strategy<Value = Option<InstanceId>> {
    prop::option::of((1_u128..4).prop_map(InstanceId::from_u128))
}

prop_compose! {
    fn any_want()(
        n in 0_u128..8, absent in prop::bool::weighted(0.3), warm in 0..4_usize, instance in any_instance(),
        restart in 0..3_u32, single_writer: bool, volume in prop::option::of(0_u128..3), complete: bool, pool in 0..2_u8,
    ) -> Want {
        Want {
            slot: slot(n),
            target: if absent { SlotTarget::Absent } else { SlotTarget::Present },
            warm: [WarmMode::Exec, WarmMode::App, WarmMode::Frozen, WarmMode::None][warm],
            pool: pool.to_string(),
            claim: instance.map(|instance| WantClaim { instance, restart, single_writer }),
            volume: volume.map(VolumeId::from_u128),
            complete,
            start_deadline_ms: 10_000,
            stop_deadline_ms: 5_000,
        }
    }
}

prop_compose! {
    fn any_have()(
        n in 0_u128..8, container in 0..5_usize, wired: bool, op in prop::option::weighted(0.2, 0..4_usize),
        init in any_init(), owner in prop::option::of(0..3_usize), assigned in any_instance(), run in 0..5_u32,
        (ready, frozen, stale) in any::<(bool, bool, bool)>(), restarted in 0..3_u32, failures in 0..7_u32,
        term_at in prop::option::of(NOW - 9_000..NOW), kill_at in prop::option::of(NOW - 4_000..NOW),
        gave_up in prop::option::weighted(0.1, 0..3_u32), ordered_at in prop::option::of(NOW - 9_000..NOW),
        volume in prop::option::of(0_u128..3), ready_at in NOW - 5..NOW,
    ) -> Have {
        Have {
            wired,
            volume: volume.map(VolumeId::from_u128),
            op: op.map(|op| [Op::Make, Op::Freeze, Op::Assign, Op::Remove][op]),
            init,
            owner: owner.map(|owner| [Owner::Slot, Owner::Instance(ME), Owner::Stranger][owner]),
            assigned, stale, run, ordered_at, ready, frozen, restarted, failures, term_at, kill_at, gave_up,
            started_at: NOW - 20_000,
            ready_at,
            ..Have::nothing(
                slot(n),
                [Container::Unknown, Container::Absent, Container::Made, Container::Up, Container::Ended][container],
                NOW,
            )
        }
    }
}

fn any_view() -> impl Strategy<Value = View> {
    let by_slot = |wants: Vec<Want>| wants.into_iter().map(|want| (want.slot, want)).collect::<BTreeMap<_, _>>();
    (prop::collection::vec(any_want(), 0..10), prop::collection::vec(any_have(), 0..10), any::<bool>(), any::<bool>())
        .prop_map(move |(wants, haves, contacted, lease_held)| View {
            wants: by_slot(wants).into_values().collect(),
            haves: haves.into_iter().map(|have| (have.slot, have)).collect::<BTreeMap<_, _>>().into_values().collect(),
            contacted,
            lease_held,
        })
}

/// What is seen at once when a step is taken, before its effect.
fn take(view: &mut View, step: &Step) {
    let container = Container::Absent;
    if !view.haves.iter().any(|have| have.slot == step.slot) {
        view.haves.push(Have::nothing(step.slot, container, NOW));
    }
    let volume = view.wants.iter().find(|want| want.slot == step.slot).and_then(|want| want.volume);
    let have = view.haves.iter_mut().find(|have| have.slot == step.slot).unwrap();
    match step.act {
        Act::Forget => {
            view.wants.retain(|want| want.slot != step.slot);
            view.haves.retain(|have| have.slot != step.slot);
        }
        Act::Remove => have.op = Some(Op::Remove),
        Act::CancelMake => have.op = Some(Op::Unmake),
        Act::Terminate => have.term_at = Some(NOW),
        Act::Kill | Act::KillUnready => have.kill_at = Some(NOW),
        Act::GiveUp(_) => have.gave_up = Some(u32::MAX),
        Act::Deliver { run, restart } | Act::Run { run, restart } => {
            (have.run, have.restarted, have.ordered_at) = (run, restart, Some(NOW));
        }
        Act::Assign { .. } => have.op = Some(Op::Assign),
        Act::Freeze => have.op = Some(Op::Freeze),
        Act::Thaw => have.frozen = false,
        Act::Make => (have.op, have.volume) = (Some(Op::Make), volume),
        Act::AskFull => {}
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn any_view_is_met_safely(view in any_view()) {
        let policy = Policy::default();
        let plan = plan(&view, NOW, &policy);
        let want = |slot| view.wants.iter().find(|want| want.slot == slot);
        let have = |slot| view.haves.iter().find(|have| have.slot == slot);
        let mut seen = BTreeSet::new();
        let mut users: BTreeMap<VolumeId, SlotId> = BTreeMap::new();
        for one in &view.haves {
            if one.container != Container::Absent || one.op.is_some() {
                let volume = one.volume.or(want(one.slot).and_then(|want| want.volume));
                if let Some(volume) = volume {
                    users.insert(volume, one.slot);
                }
            }
        }
        for step in &plan.steps {
            prop_assert!(seen.insert(step.slot), "two steps for one slot: {:?}", plan.steps);
            if want(step.slot).is_none() {
                prop_assert!(view.contacted, "touched before contact: {step:?}");
            }
            if let Some(have) = have(step.slot) {
                if have.op.is_some() {
                    prop_assert!(matches!(step.act, Act::CancelMake), "a second operation: {step:?}");
                }
                if have.container == Container::Unknown {
                    prop_assert!(matches!(step.act, Act::Terminate | Act::Kill | Act::CancelMake), "{step:?}");
                }
                if let (Act::Deliver { .. } | Act::Run { .. } | Act::Assign { .. }, Some(served)) =
                    (&step.act, have.assigned)
                {
                    let claim = want(step.slot).and_then(|want| want.claim);
                    prop_assert_eq!(claim.map(|claim| claim.instance), Some(served), "given to another");
                }
            }
            match (&step.act, want(step.slot)) {
                (Act::Make, Some(want)) => {
                    prop_assert_eq!(want.target, SlotTarget::Present);
                    let single = want.claim.is_some_and(|claim| claim.single_writer);
                    prop_assert!(view.lease_held || !single, "made for a single writer without a lease");
                    let fresh = have(step.slot).is_none_or(|have| have.container == Container::Absent);
                    if let (Some(volume), true) = (want.volume, fresh) {
                        prop_assert_eq!(users.insert(volume, want.slot), None, "two users of a volume");
                    }
                }
                (Act::Deliver { .. } | Act::Run { .. } | Act::Assign { .. }, Some(want)) => {
                    let single = want.claim.is_some_and(|claim| claim.single_writer);
                    prop_assert!(view.lease_held || !single, "a single writer without a lease");
                }
                (Act::Deliver { .. } | Act::Run { .. } | Act::Assign { .. } | Act::Make, None) => {
                    prop_assert!(false, "made for nobody: {step:?}");
                }
                _ => {}
            }
        }
        let count = |pick: fn(&Act) -> bool| plan.steps.iter().filter(|step| pick(&step.act)).count();
        prop_assert!(count(|act| *act == Act::Make) <= policy.makes_max);
        prop_assert!(count(|act| *act == Act::Remove) <= policy.removes_max);
        let last_remove = plan.steps.iter().rposition(|step| matches!(step.act, Act::Remove | Act::Forget));
        let first_make = plan.steps.iter().position(|step| step.act == Act::Make);
        prop_assert!(last_remove.zip(first_make).is_none_or(|(remove, make)| remove < make), "made before removed");
        prop_assert!(plan.wake_at.is_none_or(|at| at > NOW), "a wake-up in the past is a busy loop");
    }

    /// Taking the steps until there are none ends, without any effect having been seen.
    #[test]
    fn what_is_under_way_is_not_started_again(view in any_view()) {
        let (mut view, policy) = (view, Policy { makes_max: 99, removes_max: 99, ..Policy::default() });
        for turn in 0.. {
            let steps = plan(&view, NOW, &policy).steps;
            let real: Vec<_> = steps.iter().filter(|step| step.act != Act::AskFull).collect();
            if real.is_empty() {
                break;
            }
            // A given-up slot is put down, a forgotten one may give its volume on; nothing goes round.
            prop_assert!(turn < 20, "it does not end: {real:?}");
            for step in real {
                take(&mut view, step);
            }
        }
    }
}

// ------------------------------------------------------------------------------------------------ a small host

/// Carries steps out at once and faithfully, for the question whether plans lead anywhere.
fn carry_out(view: &mut View, step: &Step, now: Millis) {
    take(view, step);
    let want = view.wants.iter().find(|want| want.slot == step.slot).cloned();
    let Some(have) = view.haves.iter_mut().find(|have| have.slot == step.slot) else { return };
    let end = |have: &mut Have, how| {
        have.init = Init::Ended { at: now, how };
        have.ready = false;
    };
    match step.act {
        Act::Make => {
            have.op = None;
            have.wired = true;
            if have.container != Container::Up {
                (have.container, have.init, have.owner, have.frozen) = (Container::Up, Init::Waiting, None, false);
            }
        }
        Act::Deliver { .. } | Act::Run { .. } => {
            let want = want.unwrap();
            let pooled = matches!(want.warm, WarmMode::App | WarmMode::Frozen);
            have.owner = Some(match want.claim {
                Some(claim) if !pooled => Owner::Instance(claim.instance),
                _ => Owner::Slot,
            });
            have.assigned = want.claim.map(|claim| claim.instance);
            (have.init, have.ready, have.ordered_at, have.stale) = (Init::Running, true, None, false);
            (have.term_at, have.kill_at, have.gave_up, have.started_at) = (None, None, None, now);
        }
        Act::Freeze => (have.op, have.frozen) = (None, true),
        Act::Assign { instance } => {
            (have.op, have.frozen, have.assigned) = (None, false, Some(instance));
        }
        Act::Terminate | Act::Kill => end(have, Ended::Exited(Exit::Signal(15))),
        Act::KillUnready => end(have, Ended::NotReady),
        Act::Remove | Act::CancelMake => {
            let (slot, run) = (have.slot, have.run);
            *have = Have { run, ..Have::nothing(slot, Container::Absent, now) };
        }
        Act::GiveUp(_) | Act::Forget | Act::AskFull | Act::Thaw => {}
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn every_host_reaches_what_is_wanted(view in any_view()) {
        let mut view = View { contacted: true, lease_held: true, ..view };
        // One slot a volume; everything known and Docker there; nothing under way that nobody would ever end.
        let mut volumes = BTreeSet::new();
        for want in &mut view.wants {
            want.complete = true;
            want.volume = want.volume.filter(|volume| volumes.insert(*volume));
        }
        for have in &mut view.haves {
            (have.op, have.ordered_at) = (None, None);
            have.volume = view.wants.iter().find(|want| want.slot == have.slot).and_then(|want| want.volume);
            if have.container == Container::Unknown {
                have.container = Container::Absent;
            }
        }
        let (mut now, policy) = (NOW, Policy::default());
        for turn in 0.. {
            let next = plan(&view, now, &policy);
            if next.steps.is_empty() && next.wake_at.is_none() {
                break;
            }
            prop_assert!(turn < 200, "it does not settle: {next:?} {view:?}");
            for step in &next.steps {
                carry_out(&mut view, step, now);
            }
            if next.steps.is_empty() {
                now = next.wake_at.unwrap();
            }
        }
        for have in &view.haves {
            let want = view.wants.iter().find(|want| want.slot == have.slot);
            prop_assert!(want.is_some_and(|want| want.target == SlotTarget::Present), "left over: {have:?}");
        }
        let mut lines = BTreeMap::<String, Vec<SlotState>>::new();
        for want in &view.wants {
            prop_assert_eq!(want.target, SlotTarget::Present, "not removed");
            let have = view.haves.iter().find(|have| have.slot == want.slot).unwrap();
            let state = observe(want, have, true, now, &policy);
            let expected: &[SlotState] = match (want.claim, want.warm) {
                (Some(_), _) => &[SlotState::Running],
                (None, WarmMode::Frozen) => {
                    lines.entry(want.pool.clone()).or_default().extend(state);
                    &[SlotState::Frozen, SlotState::Waiting]
                }
                (None, _) => &[SlotState::Waiting],
            };
            prop_assert!(
                state.is_some_and(|state| expected.contains(&state) || state == SlotState::Failed),
                "{want:?} {have:?} is {state:?}"
            );
        }
        for line in lines.values_mut() {
            line.retain(|state| *state != SlotState::Failed);
            let awake = line.iter().filter(|state| **state == SlotState::Waiting).count();
            prop_assert_eq!(awake, line.len().min(1), "of a pool one is awake");
        }
    }
}
