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
}

impl Retire {
    pub fn name(self) -> &'static str {
        match self {
            Self::Failed => "failed",
            Self::Overdue => "overdue",
            Self::Outdated => "outdated",
            Self::Aged => "aged",
            Self::Surplus => "surplus",
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

/// What one pass of the pool does.
pub fn plan(pools: &[PoolView], policy: &Policy, now: Millis) -> PoolPlan {
    let mut plan = PoolPlan::default();
    let mut retired = Vec::new();
    let mut standing = Vec::new();
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
        let coming = kept.iter().filter(|slot| !slot.state.is_ready()).count() as u32;
        standing.push((kept.len() as u32, coming));
    }
    retired.sort();
    plan.truncated = retired.len() > policy.retire_max;
    plan.steps.extend(retired.into_iter().take(policy.retire_max).map(|(why, slot)| Step::Retire { slot, why }));

    let mut room = policy.in_flight_max.saturating_sub(standing.iter().map(|(_, coming)| coming).sum());
    let mut budget = policy.budget_mib;
    loop {
        // The emptiest pool first, by the share of its target; ties by the order given.
        let next = pools
            .iter()
            .zip(&standing)
            .enumerate()
            .filter(|(_, (pool, (have, _)))| !pool.full && *have < pool.target && pool.memory_mib <= budget)
            .filter(|(_, (pool, _))| match waits_until(pool) {
                Some(until) if until > now => {
                    plan.wake_at = Some(plan.wake_at.map_or(until, |known| known.min(until)));
                    false
                }
                _ => true,
            })
            .min_by_key(|(at, (pool, (have, _)))| (u64::from(*have) * 1000 / u64::from(pool.target), *at))
            .map(|(at, _)| at);
        let Some(at) = next else { break };
        if room == 0 {
            plan.truncated = true;
            break;
        }
        room -= 1;
        budget -= pools[at].memory_mib;
        standing[at].0 += 1;
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
                        prop_assert_eq!(*why, Retire::Surplus);
                        prop_assert!(pool.slots.len() as u32 > pool.target);
                    }
                }
            }
        }
    }
}
