//! How many warm slots to order and which to retire.
//!
//! A pool controller that recomputes "want less have" from a lagging view orders many times too much; here ordered
//! slots are rows, counted from the moment they are ordered, and given up only at a deadline.

use crate::Millis;
use crate::ids::SlotId;
use crate::slot::SlotState;

/// An unclaimed slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WarmSlot {
    pub id: SlotId,
    pub state: SlotState,
    /// Already asked to go.
    pub leaving: bool,
    /// Made from another image, spec or tier size than today's.
    pub outdated: bool,
    pub created_at: Millis,
}

/// One pool: a template at a tier.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolView {
    pub template: String,
    pub tier: String,
    /// What to keep: the tier's target, or the template's own limit where that is lower.
    pub target: u32,
    pub memory_mib: u32,
    pub slots: Vec<WarmSlot>,
    /// Slots that failed in a row since the last one that became ready.
    pub failures_in_a_row: u32,
    pub last_failure_at: Option<Millis>,
    /// No node has room for one more of these: what is found out by trying. Others may fit where these do not.
    pub full: bool,
}

/// Limits on one pass and on the pool as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Slots being made at once, over all pools: two fill fastest on two cores, more only lengthen each.
    pub in_flight_max: u32,
    /// An ordered slot that is not ready by then is given up and replaced.
    pub order_deadline_ms: Millis,
    /// A warm slot older than this is replaced, so that no container stays for ever.
    pub max_age_ms: Millis,
    /// What the pool may still reserve on nodes, in MiB: tenants come first.
    pub budget_mib: u32,
    /// Destructive steps in one pass.
    pub retire_max: usize,
}

/// Why a slot goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Retire {
    Failed,
    Overdue,
    Outdated,
    Aged,
    Surplus,
    /// Other pools have less than their share, and this one more.
    Shared,
}

impl Retire {
    pub fn name(self) -> &'static str {
        match self {
            Self::Failed => "failed",
            Self::Overdue => "overdue",
            Self::Outdated => "outdated",
            Self::Aged => "aged",
            Self::Surplus => "surplus",
            Self::Shared => "shared",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    Order { template: String, tier: String },
    Retire { slot: SlotId, why: Retire },
}

/// The pass's decisions, removals first, and whether there was more to do than one pass may.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PoolPlan {
    pub steps: Vec<Step>,
    pub truncated: bool,
    /// When to look again at the latest, if something waits for a time.
    pub wake_at: Option<Millis>,
}

/// First wait after a pool's slots began to fail, and the longest.
const FAILURE_FIRST_MS: Millis = 1_000;
const FAILURE_MOST_MS: Millis = 60_000;

fn retirement(slot: &WarmSlot, policy: &Policy, now: Millis) -> Option<Retire> {
    match slot.state {
        SlotState::Failed | SlotState::Exited => Some(Retire::Failed),
        SlotState::Waiting | SlotState::Frozen if slot.outdated => Some(Retire::Outdated),
        SlotState::Waiting | SlotState::Frozen if now - slot.created_at > policy.max_age_ms => Some(Retire::Aged),
        SlotState::Waiting | SlotState::Frozen => None,
        _ if slot.outdated => Some(Retire::Outdated),
        _ if now - slot.created_at > policy.order_deadline_ms => Some(Retire::Overdue),
        _ => None,
    }
}

/// How many slots each pool may have of `total_mib`: one by one to the emptiest by the share of its target. One that has no
/// room may keep what it has.
fn shares(pools: &[PoolView], have: &[u32], total_mib: u32) -> Vec<u32> {
    let most = |(pool, have): (&PoolView, &u32)| if pool.full { pool.target.min(*have) } else { pool.target };
    let most: Vec<u32> = pools.iter().zip(have).map(most).collect();
    let (mut shares, mut left) = (vec![0; pools.len()], total_mib);
    while let Some(at) = emptiest(pools, &shares, &most, left) {
        shares[at] += 1;
        left -= pools[at].memory_mib;
    }
    shares
}

/// Of the pools that have less than their most and can have one more, the emptiest by the share of its target; ties by the
/// order given.
fn emptiest(pools: &[PoolView], have: &[u32], most: &[u32], left_mib: u32) -> Option<usize> {
    let wants = |at: &usize| have[*at] < most[*at] && pools[*at].memory_mib <= left_mib;
    (0..pools.len()).filter(wants).min_by_key(|at| (u64::from(have[*at]) * 1000 / u64::from(pools[*at].target), *at))
}

/// What one pass of the pool does.
pub fn plan(pools: &[PoolView], policy: &Policy, now: Millis) -> PoolPlan {
    let mut plan = PoolPlan::default();
    let mut retired = Vec::new();
    // How many stay of each pool, how many of all are still coming, and which stay, what is worth least first.
    let (mut have, mut coming, mut kept_of) = (Vec::new(), 0, Vec::new());
    // Comes back when what leaves is gone.
    let mut leaving_mib = 0;
    for pool in pools {
        let mut kept: Vec<&WarmSlot> = Vec::new();
        for slot in pool.slots.iter().filter(|slot| !slot.leaving) {
            match retirement(slot, policy, now) {
                Some(why) => retired.push((why, slot.id)),
                None => kept.push(slot),
            }
        }
        // What is not ready yet goes before what is; of those, the newest, which others have waited for least.
        kept.sort_by_key(|slot| (slot.state.is_ready(), -slot.created_at, slot.id));
        let surplus = kept.len().saturating_sub(pool.target as usize);
        retired.extend(kept.drain(..surplus).map(|slot| (Retire::Surplus, slot.id)));
        coming += kept.iter().filter(|slot| !slot.state.is_ready()).count() as u32;
        have.push(kept.len() as u32);
        leaving_mib += pool.memory_mib * (pool.slots.len() - kept.len()) as u32;
        kept_of.push(kept);
    }

    // A pool that came late, or whose slots are large, gets its share of a room that others have filled before it. Nothing
    // is ordered beyond a share, so what is given up here does not come back.
    let held: u32 = pools.iter().zip(&have).map(|(pool, have)| pool.memory_mib * have).sum();
    let shares = shares(pools, &have, policy.budget_mib.saturating_add(leaving_mib).saturating_add(held));
    let waits = |at: usize| waits_until(&pools[at]).filter(|until| *until > now);
    let lacking = |at: &usize| have[*at] < shares[*at];
    plan.wake_at = (0..pools.len()).filter(lacking).filter_map(waits).min();
    let wanted = (0..pools.len()).filter(lacking).filter(|at| waits(*at).is_none());
    let wanted = wanted.map(|at| pools[at].memory_mib).max().unwrap_or(0);
    let mut coming_back = policy.budget_mib.saturating_add(leaving_mib);
    for (at, kept) in kept_of.into_iter().enumerate() {
        for slot in kept.into_iter().take(have[at].saturating_sub(shares[at]) as usize) {
            if coming_back >= wanted {
                break;
            }
            retired.push((Retire::Shared, slot.id));
            have[at] -= 1;
            coming -= u32::from(!slot.state.is_ready());
            coming_back += pools[at].memory_mib;
        }
    }
    retired.sort();
    plan.truncated = retired.len() > policy.retire_max;
    plan.steps.extend(retired.into_iter().take(policy.retire_max).map(|(why, slot)| Step::Retire { slot, why }));

    let most: Vec<u32> = (0..pools.len()).map(|at| if waits(at).is_some() { 0 } else { shares[at] }).collect();
    let mut room = policy.in_flight_max.saturating_sub(coming);
    let mut budget = policy.budget_mib;
    while let Some(at) = emptiest(pools, &have, &most, budget) {
        if room == 0 {
            plan.truncated = true;
            break;
        }
        room -= 1;
        budget -= pools[at].memory_mib;
        have[at] += 1;
        plan.steps.push(Step::Order { template: pools[at].template.clone(), tier: pools[at].tier.clone() });
    }
    plan
}

fn waits_until(pool: &PoolView) -> Option<Millis> {
    let at = pool.last_failure_at?;
    (pool.failures_in_a_row > 0)
        .then(|| at + crate::backoff::next(pool.failures_in_a_row, FAILURE_FIRST_MS, FAILURE_MOST_MS, 0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const POLICY: Policy = Policy {
        in_flight_max: 2,
        order_deadline_ms: 60_000,
        max_age_ms: 3_600_000,
        budget_mib: 10_000,
        retire_max: 8,
    };

    fn pool(target: u32, slots: Vec<WarmSlot>) -> PoolView {
        PoolView {
            template: "hello".to_owned(),
            tier: "free".to_owned(),
            target,
            memory_mib: 256,
            slots,
            failures_in_a_row: 0,
            last_failure_at: None,
            full: false,
        }
    }

    fn slot(id: u128, state: SlotState) -> WarmSlot {
        WarmSlot { id: SlotId::from_u128(id), state, leaving: false, outdated: false, created_at: 0 }
    }

    fn orders(plan: &PoolPlan) -> usize {
        plan.steps.iter().filter(|step| matches!(step, Step::Order { .. })).count()
    }

    #[test]
    fn what_is_ordered_counts() {
        let coming = vec![slot(1, SlotState::Creating), slot(2, SlotState::Absent)];
        assert_eq!(orders(&plan(&[pool(5, coming)], &POLICY, 10)), 0, "two are in flight already");
        let one = vec![slot(1, SlotState::Creating), slot(2, SlotState::Waiting)];
        assert_eq!(orders(&plan(&[pool(5, one)], &POLICY, 10)), 1);
        let full = vec![slot(1, SlotState::Waiting), slot(2, SlotState::Creating)];
        assert_eq!(plan(&[pool(2, full)], &POLICY, 10).steps, []);
    }

    #[test]
    fn a_failing_pool_waits_longer_each_time() {
        let mut failing = pool(5, vec![]);
        failing.failures_in_a_row = 3;
        failing.last_failure_at = Some(1_000);
        let early = plan(std::slice::from_ref(&failing), &POLICY, 2_000);
        assert_eq!((orders(&early), early.wake_at), (0, Some(5_000)));
        assert_eq!(orders(&plan(&[failing], &POLICY, 5_000)), 2);
    }

    #[test]
    fn overdue_failed_and_surplus_slots_go() {
        let slots = vec![slot(1, SlotState::Failed), slot(2, SlotState::Creating), slot(3, SlotState::Waiting)];
        let steps = plan(&[pool(0, slots)], &POLICY, 70_000).steps;
        let why: Vec<_> = steps
            .iter()
            .map(|step| match step {
                Step::Retire { why, .. } => *why,
                Step::Order { .. } => unreachable!("nothing is wanted"),
            })
            .collect();
        assert_eq!(why, [Retire::Failed, Retire::Overdue, Retire::Surplus]);
    }

    #[test]
    fn a_pool_without_room_leaves_its_turn_to_the_others() {
        let mut full = pool(5, vec![]);
        (full.tier, full.full) = ("business".to_owned(), true);
        let half = pool(2, vec![slot(1, SlotState::Waiting)]);
        let steps = plan(&[full, half], &POLICY, 0).steps;
        assert_eq!(steps, [Step::Order { template: "hello".to_owned(), tier: "free".to_owned() }]);
    }

    #[test]
    fn tenants_come_first() {
        let tight = Policy { budget_mib: 300, ..POLICY };
        assert_eq!(orders(&plan(&[pool(5, vec![])], &tight, 0)), 1);
    }

    /// Carries a plan out at once: what goes is gone, what is ordered is ready.
    fn carried_out(pools: &mut [PoolView], budget: &mut u32, plan: &PoolPlan, next: &mut u128) {
        carried_out_on(&mut [u32::MAX / 2], pools, budget, plan, next);
    }

    /// The same on nodes with so much free memory each. Which pools have no room is seen anew afterwards.
    fn carried_out_on(free: &mut [u32], pools: &mut [PoolView], budget: &mut u32, plan: &PoolPlan, next: &mut u128) {
        for step in &plan.steps {
            match step {
                Step::Retire { slot, .. } => {
                    let pool = pools.iter_mut().find(|pool| pool.slots.iter().any(|known| known.id == *slot)).unwrap();
                    pool.slots.retain(|known| known.id != *slot);
                    *budget += pool.memory_mib;
                    free[slot.as_u128() as usize % free.len()] += pool.memory_mib;
                }
                Step::Order { tier, .. } => {
                    let pool = pools.iter_mut().find(|pool| pool.tier == *tier).unwrap();
                    let Some(node) = free.iter().position(|free| *free >= pool.memory_mib) else { continue };
                    free[node] -= pool.memory_mib;
                    *next += 1;
                    while *next as usize % free.len() != node {
                        *next += 1;
                    }
                    pool.slots.push(slot(*next, SlotState::Waiting));
                    *budget -= pool.memory_mib;
                }
            }
        }
        for pool in pools {
            pool.full = free.iter().all(|free| *free < pool.memory_mib);
        }
    }

    #[test]
    fn a_pool_that_came_late_gets_its_share() {
        let small = pool(20, (0..12).map(|id| slot(id, SlotState::Waiting)).collect());
        let large = PoolView { tier: "business".to_owned(), memory_mib: 1024, ..pool(2, vec![]) };
        let (mut pools, mut budget, mut next) = (vec![small, large], 200, 100);
        let first = plan(&pools, &Policy { budget_mib: budget, ..POLICY }, 10);
        let shared = |step: &Step| matches!(step, Step::Retire { why: Retire::Shared, .. });
        // 824 MiB are missing to the first large one: four small ones make room for it.
        assert_eq!((first.steps.iter().filter(|step| shared(step)).count(), orders(&first)), (4, 0));
        carried_out(&mut pools, &mut budget, &first, &mut next);
        let second = plan(&pools, &Policy { budget_mib: budget, ..POLICY }, 10);
        assert_eq!(second.steps, [Step::Order { template: "hello".to_owned(), tier: "business".to_owned() }]);
        carried_out(&mut pools, &mut budget, &second, &mut next);
        assert_eq!(plan(&pools, &Policy { budget_mib: budget, ..POLICY }, 10).steps, []);
        // One that fails takes nothing from the others.
        let failing = PoolView { failures_in_a_row: 3, last_failure_at: Some(0), slots: vec![], ..pools[1].clone() };
        let pools =
            [PoolView { slots: (0..16).map(|id| slot(id, SlotState::Waiting)).collect(), ..pools[0].clone() }, failing];
        assert_eq!(plan(&pools, &Policy { budget_mib: 0, ..POLICY }, 10).steps, []);
    }

    fn any_state() -> impl Strategy<Value = SlotState> {
        prop::sample::select(SlotState::ALL.to_vec())
    }

    proptest! {
        #[test]
        fn it_never_orders_past_target_flight_or_budget(
            targets in prop::collection::vec((0u32..8, prop::collection::vec((any_state(), any::<bool>(), any::<bool>(), 0i64..200_000), 0..10)), 1..5),
            budget_mib in 0u32..3000,
        ) {
            let mut next = 0;
            let pools: Vec<_> = targets.into_iter().map(|(target, slots)| pool(target, slots.into_iter().map(|(state, leaving, outdated, created_at)| {
                next += 1;
                WarmSlot { leaving, outdated, created_at, ..slot(next, state) }
            }).collect())).collect();
            let policy = Policy { budget_mib, ..POLICY };
            let plan = plan(&pools, &policy, 200_000);
            let ordered = orders(&plan) as u32;
            prop_assert!(ordered * 256 <= budget_mib);
            prop_assert!(ordered <= policy.in_flight_max);
            prop_assert!(plan.steps.len() - ordered as usize <= policy.retire_max);
            // A slot that is ready, current and young is retired only as surplus.
            for step in &plan.steps {
                if let Step::Retire { slot, why } = step {
                    let (pool, seen) = pools.iter().find_map(|pool| pool.slots.iter().find(|known| known.id == *slot).map(|seen| (pool, seen))).unwrap();
                    prop_assert!(!seen.leaving);
                    if seen.state.is_ready() && !seen.outdated {
                        prop_assert!(matches!(why, Retire::Surplus | Retire::Shared));
                        prop_assert!(*why == Retire::Shared || pool.slots.len() as u32 > pool.target);
                    }
                }
            }
        }

        /// Whatever pools hold, they come to shares that are kept; nothing is made and given up in turns.
        #[test]
        fn pools_settle(
            wanted in prop::collection::vec((0u32..8, 0usize..10, prop::sample::select(vec![64u32, 256, 1024])), 1..5),
            spare in 0u32..3000,
            mut free in prop::collection::vec(0u32..2000, 1..4),
        ) {
            let mut next = 0;
            let mut pools: Vec<_> = wanted.into_iter().enumerate().map(|(at, (target, count, memory_mib))| {
                let slots = (0..count).map(|_| { next += 1; slot(next, SlotState::Waiting) }).collect();
                PoolView { tier: at.to_string(), memory_mib, ..pool(target, slots) }
            }).collect();
            let mut budget = spare;
            carried_out_on(&mut free, &mut pools, &mut budget, &PoolPlan::default(), &mut next);
            for pass in 0.. {
                let plan = plan(&pools, &Policy { budget_mib: budget, ..POLICY }, 10);
                if plan.steps.is_empty() {
                    break;
                }
                prop_assert!(pass < 100, "it does not settle: {plan:?}");
                carried_out_on(&mut free, &mut pools, &mut budget, &plan, &mut next);
            }
            let held: u32 = pools.iter().map(|pool| pool.memory_mib * pool.slots.len() as u32).sum();
            let have: Vec<u32> = pools.iter().map(|pool| pool.slots.len() as u32).collect();
            for (pool, share) in pools.iter().zip(shares(&pools, &have, budget + held)) {
                prop_assert!(pool.slots.len() as u32 >= share, "{pools:?} {budget}");
            }
        }
    }
}
