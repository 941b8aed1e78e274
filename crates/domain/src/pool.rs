//! How many warm slots to order and which to retire.
//!
//! A pool controller that recomputes "want less have" from a lagging view orders many times too much; here ordered
//! slots are rows, counted from the moment they are ordered, and given up only at a deadline.
//!
//! Pools take turns: the emptiest by the share of its target has the next slot. Where there is no room for its turn, slots
//! of later turns make way for it, if one node has enough of them. So each change puts earlier turns in the place of later
//! ones, and it ends.

use std::collections::BTreeMap;

use crate::Millis;
use crate::ids::{NodeId, SlotId};
use crate::placement::{self, NodeView, Request};
use crate::slot::SlotState;

/// The nodes as the placement of each tier sees them.
pub type NodesByTier = BTreeMap<String, Vec<NodeView>>;

/// An unclaimed slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WarmSlot {
    pub id: SlotId,
    pub node: NodeId,
    pub memory_mib: u32,
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
    /// What one more must have.
    pub request: Request,
    pub slots: Vec<WarmSlot>,
    /// Slots that failed in a row since the last one that became ready.
    pub failures_in_a_row: u32,
    pub last_failure_at: Option<Millis>,
    /// One more was refused: what is found out by trying. Others may fit where these do not.
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
    /// It makes way for a pool that is emptier than its own.
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
/// A pool that failed this often in a row tries again only where there is room: nothing makes way for it, or it would be
/// made and given up at each try.
const FAILURES_MOST: u32 = 3;

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

/// Whether less than its target will stay.
pub fn lacks(pool: &PoolView, policy: &Policy, now: Millis) -> bool {
    let stays = |slot: &&WarmSlot| !slot.leaving && retirement(slot, policy, now).is_none();
    pool.slots.iter().filter(stays).count() < pool.target as usize
}

/// When the `nth` slot of the pool at this place has its turn; ties by the order given.
fn turn(pools: &[PoolView], at: usize, nth: u32) -> (u64, usize) {
    (u64::from(nth) * 1000 / u64::from(pools[at].target), at)
}

/// Of the pools that have less than their most, the one whose turn is next.
fn emptiest(pools: &[PoolView], have: &[u32], most: &[u32]) -> Option<usize> {
    (0..pools.len()).filter(|at| have[*at] < most[*at]).min_by_key(|at| turn(pools, *at, have[*at]))
}

/// What is free on nodes and of the pool's memory.
#[derive(Clone)]
struct Room {
    nodes: NodesByTier,
    budget_mib: u32,
}

impl Room {
    /// The node that one more of this pool goes to.
    fn place(&self, pool: &PoolView) -> Option<NodeId> {
        let nodes = self.nodes.get(&pool.tier).filter(|_| pool.request.memory_mib <= self.budget_mib)?;
        placement::choose(&pool.request, nodes).ok()
    }

    /// Whether one more of this pool may go to this node.
    fn fits(&self, pool: &PoolView, node: NodeId) -> bool {
        let mut nodes = self.nodes.get(&pool.tier).into_iter().flatten().filter(|seen| seen.id == node);
        pool.request.memory_mib <= self.budget_mib && nodes.any(|seen| placement::fits(&pool.request, seen))
    }

    fn take(&mut self, pool: &PoolView, node: NodeId) {
        self.budget_mib = self.budget_mib.saturating_sub(pool.request.memory_mib);
        for (tier, nodes) in &mut self.nodes {
            for seen in nodes.iter_mut().filter(|seen| seen.id == node) {
                seen.reserved_mib += pool.request.memory_mib;
                seen.slots += 1;
                seen.of_tier += u32::from(*tier == pool.tier);
            }
        }
    }

    fn give_back(&mut self, slot: &WarmSlot) {
        self.budget_mib = self.budget_mib.saturating_add(slot.memory_mib);
        for seen in self.nodes.values_mut().flatten().filter(|seen| seen.id == slot.node) {
            make_room(seen, slot);
        }
    }
}

/// A slot that goes leaves room, and removes no other obstacle.
fn make_room(node: &mut NodeView, slot: &WarmSlot) {
    node.reserved_mib = node.reserved_mib.saturating_sub(slot.memory_mib);
    node.slots = node.slots.saturating_sub(1);
}

/// The slots, with their pools, that must go so that `node` has room for the next of the pool at this place; `None` when
/// those of later turns are not enough.
fn making_way<'a>(
    pools: &[PoolView],
    at: usize,
    have: &[u32],
    kept: &[Vec<&'a WarmSlot>],
    node: &NodeView,
    mut budget_mib: u32,
) -> Option<Vec<(usize, &'a WarmSlot)>> {
    let request = &pools[at].request;
    let (mut node, mut have, mut going) = (node.clone(), have.to_vec(), Vec::new());
    loop {
        let fits = placement::fits(request, &node);
        if fits && request.memory_mib <= budget_mib {
            return Some(going);
        }
        // Once it fits here, only the budget is short, and that comes back from any node.
        let goes = |of: usize, slot: &WarmSlot| (fits || slot.node == node.id) && !going.contains(&(of, slot));
        let later = |of: &usize| have[*of] > 0 && turn(pools, *of, have[*of] - 1) > turn(pools, at, have[at]);
        let (of, slot) = (0..pools.len())
            .filter(later)
            .filter_map(|of| kept[of].iter().find(|slot| goes(of, slot)).map(|slot| (of, *slot)))
            .max_by_key(|(of, _)| turn(pools, *of, have[*of] - 1))?;
        have[of] -= 1;
        budget_mib = budget_mib.saturating_add(slot.memory_mib);
        if slot.node == node.id {
            make_room(&mut node, slot);
        }
        going.push((of, slot));
    }
}

/// The node where the fewest slots must go for the next of the pool at this place, and those.
fn least_way<'a>(
    pools: &[PoolView],
    at: usize,
    have: &[u32],
    kept: &[Vec<&'a WarmSlot>],
    room: &Room,
) -> Option<(NodeId, Vec<(usize, &'a WarmSlot)>)> {
    let going = |node: &NodeView| Some((node.id, making_way(pools, at, have, kept, node, room.budget_mib)?));
    room.nodes.get(&pools[at].tier)?.iter().filter_map(going).min_by_key(|(_, going)| going.len())
}

/// What one pass of the pool does.
pub fn plan(pools: &[PoolView], nodes: &NodesByTier, policy: &Policy, now: Millis) -> PoolPlan {
    let mut plan = PoolPlan::default();
    let mut retired = Vec::new();
    // What is free now, and what will be when all that leaves is gone and all that waits for room has it.
    let mut free = Room { nodes: nodes.clone(), budget_mib: policy.budget_mib };
    let mut free_then = free.clone();
    // How many stay of each pool, how many of all are still coming, and which stay, what is worth least first.
    let (mut have, mut coming, mut kept_of) = (Vec::new(), 0, Vec::new());
    for pool in pools {
        let mut kept: Vec<&WarmSlot> = Vec::new();
        for slot in &pool.slots {
            let why = retirement(slot, policy, now);
            if why.is_none() && !slot.leaving {
                kept.push(slot);
                continue;
            }
            retired.extend(why.filter(|_| !slot.leaving).map(|why| (why, slot.id)));
            free_then.give_back(slot);
        }
        // What is not ready yet goes before what is; of those, the newest, which others have waited for least.
        kept.sort_by_key(|slot| (slot.state.is_ready(), -slot.created_at, slot.id));
        let surplus = kept.len().saturating_sub(pool.target as usize);
        for slot in kept.drain(..surplus) {
            retired.push((Retire::Surplus, slot.id));
            free_then.give_back(slot);
        }
        coming += kept.iter().filter(|slot| !slot.state.is_ready()).count() as u32;
        have.push(kept.len() as u32);
        kept_of.push(kept);
    }

    let waits = |at: usize| waits_until(&pools[at]).filter(|until| *until > now);
    plan.wake_at = (0..pools.len()).filter(|at| have[*at] < pools[*at].target).filter_map(waits).min();
    let most = |at: usize| if pools[at].full || waits(at).is_some() { 0 } else { pools[at].target };
    let mut most: Vec<u32> = (0..pools.len()).map(most).collect();
    let (mut ordered, mut awaited) = (Vec::new(), false);
    while let Some(at) = emptiest(pools, &have, &most) {
        let pool = &pools[at];
        // What was freed for an earlier turn is not taken by a later one.
        if let Some(node) = free.place(pool).filter(|node| free_then.fits(pool, *node)) {
            if coming >= policy.in_flight_max {
                plan.truncated = true;
                break;
            }
            coming += 1;
            free.take(pool, node);
            free_then.take(pool, node);
            ordered.push(Step::Order { template: pool.template.clone(), tier: pool.tier.clone() });
        } else if let Some(node) = free_then.place(pool) {
            // It has its room when what leaves is gone.
            awaited = true;
            free_then.take(pool, node);
        } else if !awaited
            && pool.failures_in_a_row < FAILURES_MOST
            && let Some((node, going)) = least_way(pools, at, &have, &kept_of, &free_then)
        {
            // Warm slots are of use until the last moment: they make way for one at a time.
            awaited = true;
            for (of, slot) in going {
                retired.push((Retire::Shared, slot.id));
                kept_of[of].retain(|kept| kept.id != slot.id);
                have[of] -= 1;
                coming -= u32::from(!slot.state.is_ready());
                free_then.give_back(slot);
            }
            free_then.take(pool, node);
        } else {
            most[at] = 0;
            continue;
        }
        have[at] += 1;
    }

    retired.sort_by_key(|(why, _)| *why);
    plan.truncated |= retired.len() > policy.retire_max;
    plan.steps.extend(retired.into_iter().take(policy.retire_max).map(|(why, slot)| Step::Retire { slot, why }));
    plan.steps.extend(ordered);
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
    use crate::workload::NodeHealth;
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
            request: Request { memory_mib: 256, tier_max_per_node: 1000, pinned: None },
            slots,
            failures_in_a_row: 0,
            last_failure_at: None,
            full: false,
        }
    }

    fn large(target: u32) -> PoolView {
        let request = Request { memory_mib: 1024, tier_max_per_node: 1000, pinned: None };
        PoolView { tier: "business".to_owned(), request, ..pool(target, vec![]) }
    }

    fn slot(id: u128, state: SlotState) -> WarmSlot {
        WarmSlot {
            id: SlotId::from_u128(id),
            node: NodeId::from_u128(0),
            memory_mib: 256,
            state,
            leaving: false,
            outdated: false,
            created_at: 0,
        }
    }

    fn waiting(ids: std::ops::Range<u128>) -> Vec<WarmSlot> {
        ids.map(|id| slot(id, SlotState::Waiting)).collect()
    }

    fn node(id: u128, free_mib: u32) -> NodeView {
        NodeView {
            id: NodeId::from_u128(id),
            health: NodeHealth::Live,
            cordoned: false,
            ready: true,
            capacity_mib: 100_000,
            reserved_mib: 100_000 - free_mib,
            slots: 100,
            slots_max: 200,
            of_tier: 0,
            disk_free_mib: 50_000,
        }
    }

    /// A plan where nodes have room for everything.
    fn plan(pools: &[PoolView], policy: &Policy, now: Millis) -> PoolPlan {
        let nodes = pools.iter().map(|pool| (pool.tier.clone(), vec![node(0, 100_000)])).collect();
        super::plan(pools, &nodes, policy, now)
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

    /// Pools on nodes, and plans carried out on them.
    #[derive(Debug)]
    struct World {
        pools: Vec<PoolView>,
        /// What they have free and how many of other tenants' they hold, without the warm slots.
        nodes: Vec<NodeView>,
        budget_mib: u32,
        next: u128,
    }

    impl World {
        fn new(pools: Vec<PoolView>, nodes: Vec<NodeView>, budget_mib: u32) -> Self {
            Self { pools, nodes, budget_mib, next: 1000 }
        }

        fn seen(&self, tier: &str) -> Vec<NodeView> {
            let pool = self.pools.iter().filter(|pool| pool.tier == tier);
            let of_tier = |node: &NodeView| {
                pool.clone().flat_map(|pool| &pool.slots).filter(|slot| slot.node == node.id).count() as u32
            };
            self.nodes.iter().map(|node| NodeView { of_tier: of_tier(node), ..node.clone() }).collect()
        }

        /// One pass. What it retires is gone at the end of the next one, what it orders is ready at once.
        fn pass(&mut self) -> PoolPlan {
            let nodes = self.pools.iter().map(|pool| (pool.tier.clone(), self.seen(&pool.tier))).collect();
            let plan = super::plan(&self.pools, &nodes, &Policy { budget_mib: self.budget_mib, ..POLICY }, 10);
            for step in plan.steps.iter().filter(|step| matches!(step, Step::Order { .. })) {
                let Step::Order { tier, .. } = step else { continue };
                let seen = self.seen(tier);
                let pool = self.pools.iter_mut().find(|pool| pool.tier == *tier).unwrap();
                let chosen = placement::choose(&pool.request, &seen).expect("what is ordered has room");
                let memory_mib = pool.request.memory_mib;
                pool.slots.push(WarmSlot { node: chosen, memory_mib, ..slot(self.next, SlotState::Waiting) });
                self.next += 1;
                self.budget_mib = self.budget_mib.checked_sub(memory_mib).expect("what is ordered is in the budget");
                let node = self.nodes.iter_mut().find(|node| node.id == chosen).unwrap();
                (node.reserved_mib, node.slots) = (node.reserved_mib + memory_mib, node.slots + 1);
            }
            let goes = |slot: SlotId| {
                plan.steps.iter().any(|step| matches!(step, Step::Retire { slot: going, .. } if *going == slot))
            };
            for pool in &mut self.pools {
                for gone in pool.slots.extract_if(.., |slot| slot.leaving) {
                    self.budget_mib += gone.memory_mib;
                    let node = self.nodes.iter_mut().find(|node| node.id == gone.node).unwrap();
                    (node.reserved_mib, node.slots) = (node.reserved_mib - gone.memory_mib, node.slots - 1);
                }
                for slot in &mut pool.slots {
                    slot.leaving = goes(slot.id);
                }
            }
            plan
        }

        /// Whether it came to rest.
        fn settles(&mut self) -> bool {
            (0..200).any(|_| {
                let waits = self.pools.iter().flat_map(|pool| &pool.slots).any(|slot| slot.leaving);
                self.pass().steps.is_empty() && !waits
            })
        }

        fn have(&self) -> Vec<usize> {
            self.pools.iter().map(|pool| pool.slots.len()).collect()
        }

        /// A pool that could have one more if, on one node, some slots went of pools that were still fuller without them.
        fn starved(&self) -> Option<String> {
            let full = |pool: &PoolView, without: usize| (pool.slots.len() - without) as f64 / f64::from(pool.target);
            for pool in self.pools.iter().filter(|pool| (pool.slots.len() as u32) < pool.target) {
                if pool.failures_in_a_row > 0 {
                    continue;
                }
                // Of each other pool, how many.
                let spare = |other: &PoolView| {
                    (1..=other.slots.len()).take_while(|k| full(other, *k) > full(pool, 0) + 1e-9).count() as u32
                };
                let budget: u32 = self.pools.iter().map(|other| spare(other) * other.request.memory_mib).sum();
                for node in self.seen(&pool.tier) {
                    let (mut reserved, mut slots) = (node.reserved_mib, node.slots);
                    for other in &self.pools {
                        let here = other.slots.iter().filter(|slot| slot.node == node.id).count() as u32;
                        let going = spare(other).min(here);
                        (reserved, slots) = (reserved - going * other.request.memory_mib, slots - going);
                    }
                    let fits = self.budget_mib + budget >= pool.request.memory_mib
                        && node.capacity_mib - reserved >= pool.request.memory_mib
                        && slots < node.slots_max
                        && node.of_tier < pool.request.tier_max_per_node
                        && !node.cordoned;
                    if fits {
                        return Some(format!("{} on {:?}", pool.tier, node.id));
                    }
                }
            }
            None
        }
    }

    #[test]
    fn a_pool_that_came_late_gets_its_share() {
        let mut world = World::new(vec![pool(20, waiting(0..12)), large(2)], vec![node(0, 90_000)], 200);
        let first = world.pass();
        let shared = |step: &Step| matches!(step, Step::Retire { why: Retire::Shared, .. });
        // 824 MiB are missing to the first large one: four small ones make room for it.
        assert_eq!((first.steps.iter().filter(|step| shared(step)).count(), orders(&first)), (4, 0));
        assert_eq!(world.pass().steps, [], "what leaves is waited for");
        let order = Step::Order { template: "hello".to_owned(), tier: "business".to_owned() };
        assert_eq!(world.pass().steps, [order]);
        assert_eq!(world.pass().steps, []);
        // One that keeps failing takes nothing from the others, now or when it may try again.
        for last_failure_at in [Some(0), Some(-60_000)] {
            let failing = PoolView { failures_in_a_row: 3, last_failure_at, ..large(2) };
            let mut world = World::new(vec![pool(20, waiting(0..16)), failing], vec![node(0, 0)], 0);
            assert_eq!(world.pass().steps, []);
        }
    }

    /// The budget would allow more, but the node's memory is all held, by tenants and by the other pool.
    #[test]
    fn a_pool_that_came_late_to_a_full_node_gets_its_share() {
        let late = || PoolView { tier: "pro".to_owned(), ..pool(10, vec![]) };
        let mut world = World::new(vec![pool(10, waiting(0..10)), late()], vec![node(0, 0)], 5000);
        assert!(world.settles(), "{world:?}");
        assert_eq!(world.have(), [5, 5]);
        // Memory there is enough, but no place for one more container.
        let crowded = NodeView { slots_max: 100, ..node(0, 50_000) };
        let mut world = World::new(vec![pool(10, waiting(0..10)), late()], vec![crowded], 5000);
        assert!(world.settles(), "{world:?}");
        assert_eq!(world.have(), [5, 5]);
    }

    #[test]
    fn nothing_makes_way_for_what_cannot_be_placed() {
        let scattered = |at: u128| WarmSlot { node: NodeId::from_u128(at), ..slot(at, SlotState::Waiting) };
        let nodes: Vec<_> = (0..8).map(|at| node(at, 0)).collect();
        let mut scattered = World::new(vec![pool(8, (0..8).map(scattered).collect()), large(1)], nodes, 0);
        assert_eq!(scattered.pass().steps, [], "no node holds enough of them");
        let mut late = large(4);
        late.request.tier_max_per_node = 0;
        let mut barred = World::new(vec![pool(20, waiting(0..20)), late], vec![node(0, 0)], 0);
        assert_eq!(barred.pass().steps, [], "the node takes none of its tier");
        let cordoned = NodeView { cordoned: true, ..node(0, 0) };
        let mut cordoned = World::new(vec![pool(20, waiting(0..20)), large(4)], vec![cordoned], 0);
        assert_eq!(cordoned.pass().steps, [], "the node takes nothing");
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

        /// Whatever pools hold, nothing is made and given up in turns for ever, and where it ends no pool has less because
        /// fuller ones hold its room.
        #[test]
        fn pools_settle(
            wanted in prop::collection::vec(
                (
                    0u32..8,
                    prop::collection::vec(0usize..4, 0..10),
                    prop::sample::select(vec![64u32, 256, 300, 1024]),
                    prop::sample::select(vec![0u32, 2, 1000, 1000, 1000]),
                    prop::bool::weighted(0.1),
                ),
                1..5,
            ),
            budget_mib in prop_oneof![0u32..3000, Just(20_000)],
            shapes in prop::collection::vec((0u32..2000, prop_oneof![0u32..4, Just(100)], prop::bool::weighted(0.1)), 1..4),
        ) {
            let nodes: Vec<_> = shapes.iter().enumerate().map(|(at, (free, spare, cordoned))| {
                NodeView { slots_max: 100 + spare, cordoned: *cordoned, ..node(at as u128, *free) }
            }).collect();
            let mut next = 0;
            let pools: Vec<_> = wanted.into_iter().enumerate().map(|(at, (target, on, memory_mib, tier_max_per_node, fails))| {
                let slots = on.into_iter().map(|on| {
                    next += 1;
                    WarmSlot { node: nodes[on % nodes.len()].id, memory_mib, ..slot(next, SlotState::Waiting) }
                }).collect();
                PoolView {
                    tier: at.to_string(),
                    request: Request { memory_mib, tier_max_per_node, pinned: None },
                    failures_in_a_row: u32::from(fails),
                    last_failure_at: fails.then_some(10),
                    ..pool(target, slots)
                }
            }).collect();
            let mut world = World::new(pools, nodes, budget_mib);
            prop_assert!(world.settles(), "it does not settle: {world:?}");
            prop_assert_eq!(world.starved(), None, "{:?}", world);
        }
    }
}
