//! The warm pool: what there is, what `domain::pool` wants of it, and doing that.

use std::collections::{BTreeMap, BTreeSet};

use clawhq_domain::Millis;
use clawhq_domain::ids::{NodeId, SlotId};
use clawhq_domain::placement::Request;
use clawhq_domain::pool::{self, NodesByTier, Policy, PoolView, Step, WarmSlot};
use clawhq_domain::slot::{Failure, FailureKind, SlotState};
use clawhq_domain::template::Template;
use clawhq_domain::tier::Tier;
use clawhq_domain::workload::NodeHealth;
use clawhq_runtime::ids::mint;
use clawhq_store::{NodeState, Recipe, Slot, SlotSpec, WarmOrder};

use crate::nodes::{mint_credentials, write_minted};
use crate::{App, Result};

/// A slot that is not ready this long after it was ordered is given up: an image of some gigabytes at 10 MB/s.
const ORDER_DEADLINE_MS: Millis = 10 * 60 * 1000;
/// Slots retired in one pass: each costs Docker a removal.
const RETIRE_MAX: usize = 8;
/// Rows of slots that are gone are kept this long for a person to look at.
const KEEP_GONE_MS: Millis = 24 * 3600 * 1000;

/// What a pass did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PoolReport {
    pub ordered: usize,
    pub retired: usize,
}

/// One pool as operators see it.
#[derive(Clone, Debug)]
pub struct PoolDepth {
    pub template: String,
    pub tier: String,
    pub target: u32,
    pub ready: u32,
    pub coming: u32,
}

struct Pool<'a> {
    template: &'a Template,
    tier: &'a Tier,
    spec: SlotSpec,
    recipe: Recipe,
}

/// Every template and tier that a pool is kept for.
fn pools<'a>(templates: &'a [Template], tiers: &'a [Tier]) -> Vec<Pool<'a>> {
    let mut pools = Vec::new();
    for template in templates.iter().filter(|template| template.is_pooled()) {
        for tier in tiers.iter().filter(|tier| tier.memory_burst_mib >= template.least_memory_mib) {
            if tier.warm_target == 0 || template.warm_limit == Some(0) {
                continue;
            }
            match SlotSpec::of_pool(template, tier) {
                Ok(spec) => pools.push(Pool { template, tier, recipe: Recipe::of(&spec), spec }),
                Err(reason) => tracing::error!(template.name = %template.name, "no pool for it: {}", reason.message),
            }
        }
    }
    pools
}

impl Pool<'_> {
    fn target(&self) -> u32 {
        self.template.warm_limit.map_or(self.tier.warm_target, |limit| limit.min(self.tier.warm_target))
    }

    fn is(&self, slot: &Slot) -> bool {
        slot.template.as_deref() == Some(self.template.name.as_str()) && slot.tier == self.tier.name
    }
}

fn warm(slot: &Slot, outdated: bool) -> WarmSlot {
    WarmSlot {
        id: slot.id,
        node: slot.node,
        memory_mib: slot.memory_mib,
        state: slot.state,
        leaving: slot.leaving,
        outdated,
        created_at: slot.created_at,
    }
}

impl App {
    /// One turn: look at everything, plan, order and retire.
    pub async fn pool_pass(&self) -> Result<PoolReport> {
        let (templates, tiers) = (self.templates().await?, self.tiers().await?);
        let system = self.store().system(&self.system());
        let (slot_rows, node_rows) = (system.slots(), system.nodes());
        let (mut slots, failures, nodes) = tokio::try_join!(slot_rows.pool(), slot_rows.failures(), node_rows.list())?;
        // A silent node's slots can be given to nobody, and neither is there any room on it.
        let live: BTreeSet<NodeId> =
            nodes.iter().filter(|node| node.health == NodeHealth::Live).map(|node| node.id).collect();
        slots.retain(|slot| live.contains(&slot.node));
        let pools = pools(&templates, &tiers.0);
        let mut views: Vec<PoolView> = pools
            .iter()
            .map(|pool| {
                let failed = failures.get(&(pool.template.name.to_string(), pool.tier.name.clone()));
                PoolView {
                    template: pool.template.name.to_string(),
                    tier: pool.tier.name.clone(),
                    target: pool.target(),
                    request: pool.spec.request(),
                    slots: slots
                        .iter()
                        .filter(|slot| pool.is(slot))
                        .map(|slot| warm(slot, slot.recipe != pool.recipe))
                        .collect(),
                    failures_in_a_row: failed.map_or(0, |(count, _)| *count),
                    last_failure_at: failed.map(|(_, at)| *at),
                    full: false,
                }
            })
            .collect();
        // What no pool is kept for any more goes. What is of a template that a newer release wrote is that one's.
        let unreadable = self.unreadable_templates().await?;
        let stray = |slot: &&Slot| {
            let theirs = slot.template.as_ref().is_some_and(|template| unreadable.contains(template));
            !theirs && !pools.iter().any(|pool| pool.is(slot))
        };
        let strays: Vec<WarmSlot> = slots.iter().filter(stray).map(|slot| warm(slot, true)).collect();
        views.push(PoolView {
            template: String::new(),
            tier: String::new(),
            target: 0,
            request: Request { memory_mib: 0, tier_max_per_node: 0, pinned: None },
            slots: strays,
            failures_in_a_row: 0,
            last_failure_at: None,
            full: true,
        });

        let share = u64::from(self.config().pool_share_percent.min(100));
        let allowed: u64 = nodes
            .iter()
            .filter(|node| node.state == NodeState::Active && node.health == NodeHealth::Live)
            .map(|node| u64::from(node.capacity_mib) * share / 100)
            .sum();
        let held: u64 = slots.iter().map(|slot| u64::from(slot.memory_mib)).sum();
        let mut policy = Policy {
            in_flight_max: self.config().pool_in_flight_max,
            order_deadline_ms: ORDER_DEADLINE_MS,
            max_age_ms: self.config().pool_max_age_ms,
            budget_mib: u32::try_from(allowed.saturating_sub(held)).unwrap_or(u32::MAX),
            retire_max: RETIRE_MAX,
        };
        let now = self.now();
        let mut plan = pool::plan(&views, &self.nodes_by_tier(&views, &policy, now).await?, &policy, now);

        let mut report = PoolReport::default();
        let retire: Vec<_> = plan
            .steps
            .iter()
            .filter_map(|step| match step {
                Step::Retire { slot, .. } => Some(*slot),
                Step::Order { .. } => None,
            })
            .collect();
        if !retire.is_empty() {
            for (slot, node) in system.slots().retire(&retire).await? {
                report.retired += 1;
                self.slot_changed(node, slot);
                let leaves = views.iter_mut().flat_map(|view| &mut view.slots).filter(|seen| seen.id == slot);
                leaves.for_each(|seen| seen.leaving = true);
            }
        }
        // Each round ends with a pool found full, so there are at most as many as pools, and one.
        for _ in 0..=pools.len() {
            let mut found_full = false;
            for step in &plan.steps {
                let Step::Order { template, tier } = step else { continue };
                let wanted = |pool: &Pool<'_>| pool.template.name.as_str() == template && pool.tier.name == *tier;
                let Some(at) = pools.iter().position(wanted) else { continue };
                // The views of the pools come first and in their order.
                let (pool, view) = (&pools[at], &mut views[at]);
                match self.order_warm(pool).await? {
                    Some((id, node)) => {
                        report.ordered += 1;
                        let memory_mib = view.request.memory_mib;
                        policy.budget_mib = policy.budget_mib.saturating_sub(memory_mib);
                        view.slots.push(WarmSlot {
                            id,
                            node,
                            memory_mib,
                            state: SlotState::Creating,
                            leaving: false,
                            outdated: false,
                            created_at: now,
                        });
                    }
                    // No node has room for this one. A smaller tier may fit, and one that is not at its most per node.
                    None => {
                        view.full = true;
                        found_full = true;
                        break;
                    }
                }
            }
            if !found_full {
                break;
            }
            plan = pool::plan(&views, &self.nodes_by_tier(&views, &policy, now).await?, &policy, now);
        }
        Ok(report)
    }

    /// Of the tiers that lack a slot: for others nothing is placed.
    async fn nodes_by_tier(&self, views: &[PoolView], policy: &Policy, now: Millis) -> Result<NodesByTier> {
        let nodes = self.store().system(&self.system()).nodes();
        let lacking = views.iter().filter(|view| pool::lacks(view, policy, now));
        let mut by_tier = NodesByTier::new();
        for tier in lacking.map(|view| &view.tier).collect::<BTreeSet<_>>() {
            by_tier.insert(tier.clone(), nodes.views(tier).await?);
        }
        Ok(by_tier)
    }

    /// `None`: no node has room.
    async fn order_warm(&self, pool: &Pool<'_>) -> Result<Option<(SlotId, NodeId)>> {
        let slot = mint();
        let minted = mint_credentials(pool.template);
        let order = WarmOrder {
            slot,
            spec: pool.spec.clone(),
            minted: (!minted.is_empty()).then(|| self.0.keys.seal_minted(slot, &write_minted(&minted))),
            volume: pool.spec.release.state.is_some().then(mint),
        };
        match self.store().system(&self.system()).slots().order(&order).await? {
            Ok(node) => {
                self.slot_changed(node, slot);
                Ok(Some((slot, node)))
            }
            Err(no_place) => {
                let (template, tier) = (&pool.template.name, &pool.tier.name);
                tracing::debug!(%template, tier, "the pool has no room: {}", no_place.message());
                Ok(None)
            }
        }
    }

    /// How full each pool is.
    pub async fn pool_depths(&self) -> Result<Vec<PoolDepth>> {
        let (templates, tiers) = (self.templates().await?, self.tiers().await?);
        let slots = self.store().system(&self.system()).slots().pool().await?;
        let depth = |pool: &Pool<'_>| {
            let mine = || slots.iter().filter(|slot| pool.is(slot) && !slot.leaving && slot.recipe == pool.recipe);
            PoolDepth {
                template: pool.template.name.to_string(),
                tier: pool.tier.name.clone(),
                target: pool.target(),
                ready: mine().filter(|slot| slot.state.is_ready()).count() as u32,
                coming: mine().filter(|slot| !slot.state.is_ready()).count() as u32,
            }
        };
        Ok(pools(&templates, &tiers.0).iter().map(depth).collect())
    }

    /// What nodes that were given up for dead still had is ended, and what is long gone is forgotten.
    pub async fn nodes_pass(&self) -> Result<()> {
        let system = self.store().system(&self.system());
        let mut lost: BTreeMap<_, ()> = BTreeMap::new();
        for node in system.nodes().list().await?.iter().filter(|node| node.state == NodeState::Disabled) {
            let failure = Failure {
                kind: FailureKind::Runtime,
                message: "Its node was taken out of service.".to_owned(),
                exit: None,
                log_tail: Vec::new(),
            };
            lost.extend(system.slots().abandon(node.id, &failure).await?.into_iter().map(|owner| (owner, ())));
        }
        for (org, workload) in lost.into_keys() {
            self.changed(org, workload);
            self.hint_outbox();
        }
        system.slots().sweep(KEEP_GONE_MS).await?;
        Ok(())
    }

    /// Every slot that is not gone, for operators.
    pub async fn slots(&self) -> Result<Vec<Slot>> {
        Ok(self.store().system(&self.system()).slots().list(None).await?)
    }
}
