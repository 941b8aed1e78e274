//! Giving an instance its container: a warm slot claimed, a cold one reserved and ordered, or a place in the queue.

use clawhq_domain::ids::{InstanceId, NodeId, OrgId, ReleaseId, SlotId, VolumeId, WorkloadId};
use clawhq_domain::placement::{self, NoPlace, Request};
use clawhq_domain::slot::SlotState;
use clawhq_domain::workload::{ClaimPolicy, PlacementKind};
use sea_orm::{ConnectionTrait, QueryResult, Value};

use crate::error::{Limit, OrStore, Result, StoreError};
use crate::row::{Id, Row, json, optional};
use crate::slots::{Recipe, SlotDesired, SlotSpec};
use crate::tx::{Tx, sql};
use crate::{codec, nodes};

/// What an instance does about state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VolumeUse {
    /// The release has no state volume.
    None,
    /// The workload has none yet. A claimed slot brings its own; a cold one gets this, of the size that the release
    /// says.
    New(VolumeId),
    /// The workload's own: the instance goes to its node and nowhere else, and never into a warm slot.
    Existing(VolumeId, NodeId),
}

/// An instance to be placed.
pub struct NewInstance {
    pub id: InstanceId,
    pub claim: ClaimPolicy,
    /// Warm slots of this recipe can serve it; `None`: none can.
    pub pool: Option<SlotSpec>,
    /// The slot to be ordered if it is placed cold.
    pub slot: SlotId,
    /// Its release, template and tier.
    pub spec: SlotSpec,
    /// Credentials minted for the cold slot, sealed; a warm one has its own.
    pub minted: Option<Vec<u8>>,
    pub volume: VolumeUse,
}

/// Where it went.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Placement {
    /// `was` is `Waiting` or `Frozen`.
    Warm {
        was: SlotState,
    },
    Cold,
    /// No node has room; it is placed as soon as one has. `position` counts from 1, over all orgs.
    Queued {
        why: NoPlace,
        position: u32,
    },
}

impl Placement {
    pub fn kind(&self) -> PlacementKind {
        match self {
            Self::Warm { .. } => PlacementKind::Warm,
            Self::Cold => PlacementKind::Cold,
            Self::Queued { .. } => PlacementKind::Queued,
        }
    }
}

/// The outcome of placing an instance: whom to tell and what the slot brought along.
#[derive(Clone)]
pub struct Placed {
    pub placement: Placement,
    /// `None` while it is queued.
    pub slot: Option<(SlotId, NodeId)>,
    /// Credentials minted for the slot it got, sealed.
    pub minted: Option<Vec<u8>>,
    /// What its node must be told, where the claim itself knows it all; else it is to be read.
    pub told: Option<Box<SlotDesired>>,
}

/// The claim, shared by the statements that make one. Parameters: `$1` org, `$2` instance, `$3` recipe or null, `$4`
/// tier. Reads a CTE `go` that has a row when the claim is to be made, and gives `pick` and `claim`.
///
/// A slot's lock that another holds is skipped, never waited for; a slot that was claimed since the snapshot fails the
/// recheck and is skipped as well.
macro_rules! claim_sql {
    () => {
        "pick as materialized (
            select s.id from slots s join nodes n on n.id = s.node_id
            where s.recipe = $3 and s.tier = $4 and s.org_id is null and s.desired = 'present'
                and s.observed in ('waiting', 'frozen') and s.removed_at is null
                and n.state = 'active' and n.lease_until > now() and exists (select from go)
            order by s.ready_at, s.id limit 1 for update of s skip locked),
        claim as (
            update slots set org_id = $1, instance_id = $2, generation = generation + 1, claimed_at = now()
            from pick where slots.id = pick.id
            returning slots.id, slots.node_id, slots.minted, slots.observed, slots.generation, slots.image_digest,
                slots.restart)"
    };
}
pub(crate) use claim_sql;

/// Without what is sealed and what is told: both are for nobody's log.
impl std::fmt::Debug for Placed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut debug = f.debug_struct("Placed");
        debug.field("placement", &self.placement).field("slot", &self.slot).finish_non_exhaustive()
    }
}

/// A container that is ordered now, for somebody or for the pool.
pub(crate) struct Cold<'a> {
    pub(crate) slot: SlotId,
    pub(crate) spec: &'a SlotSpec,
    pub(crate) minted: Option<&'a [u8]>,
    /// Whose it is from the start.
    pub(crate) owner: Option<(OrgId, WorkloadId, InstanceId)>,
    /// The volume it uses, and whether that exists already.
    pub(crate) volume: Option<(VolumeId, bool)>,
}

/// Chooses a node, reserves its room by a conditional write and orders the slot there. Losing the room to another
/// transaction is normal and means choosing again.
pub(crate) async fn place_cold(tx: &Tx, request: &Request, cold: &Cold<'_>) -> Result<Result<NodeId, NoPlace>> {
    let mut nodes = nodes::views(tx, &cold.spec.tier.name).await?;
    loop {
        let node = match placement::choose(request, &nodes) {
            Ok(node) => node,
            Err(no_place) => return Ok(Err(no_place)),
        };
        if order(tx, node, cold).await? {
            return Ok(Ok(node));
        }
        // Its room went meanwhile; each round leaves one node out, so the rounds end.
        nodes.retain(|view| view.id != node);
    }
}

async fn order(tx: &Tx, node: NodeId, cold: &Cold<'_>) -> Result<bool> {
    let reserve = "with
        room as (
            update nodes set reserved_mib = reserved_mib + $2, slots_used = slots_used + 1
            where id = $1 and state = 'active' and lease_until > now() and reserved_mib + $2 <= capacity_mib
                and slots_used < slots_max
            returning id),
        slot as (
            insert into slots (id, node_id, template, tier, recipe, image, image_digest, warm_mode, spec, minted,
                memory_mib, org_id, instance_id, claimed_at)
            select $3, room.id, $4, $5, $6, $7, $8, $9, $10, $11, $2, $12, $13,
                case when $12::uuid is null then null else now() end
            from room
            returning id, node_id),
        placed as (
            update instances set slot_id = slot.id, node_id = slot.node_id, placement = 'cold', placed_at = now(),
                observed = 'absent', observed_at = now()
            from slot where instances.org_id = $12 and instances.id = $13)
        select id from slot";
    let release = &cold.spec.release;
    let memory = i32::try_from(cold.spec.tier.memory_mib).unwrap_or(i32::MAX);
    let values = [
        node.value(),
        Value::from(memory),
        cold.slot.value(),
        Value::from(release.template.as_ref().map(ToString::to_string)),
        cold.spec.tier.name.as_str().into(),
        crate::row::bytes(&Recipe::of(cold.spec).0),
        release.image.as_str().into(),
        Value::from(release.image_digest.clone()),
        codec::warm_mode_name(release.warm_mode).into(),
        json(codec::write_spec(cold.spec)),
        Value::Bytes(cold.minted.map(<[u8]>::to_vec)),
        optional(cold.owner.map(|(org, ..)| org)),
        optional(cold.owner.map(|(_, _, instance)| instance)),
    ];
    if tx.query_one_raw(sql(reserve, values)).await.or_store()?.is_none() {
        return Ok(false);
    }
    match (cold.volume, &release.state) {
        (Some((volume, true)), _) => {
            // Only a volume that nobody uses any more: a state volume has one writer at a time.
            let take = "update volumes set slot_id = $2
                where id = $1 and node_id = $3 and desired = 'present' and removed_at is null and org_id = $4
                    and workload_id = $5
                    and (slot_id is null or exists (select 1 from slots where id = volumes.slot_id
                                                    and removed_at is not null))";
            let owner = cold.owner;
            let values = [
                volume.value(),
                cold.slot.value(),
                node.value(),
                optional(owner.map(|(org, ..)| org)),
                optional(owner.map(|(_, workload, _)| workload)),
            ];
            if tx.execute_raw(sql(take, values)).await.or_store()?.rows_affected() != 1 {
                return Err(StoreError::InUse("the container that still uses its volume".to_owned()));
            }
        }
        (Some((volume, false)), Some(state)) => {
            let insert = "insert into volumes (id, node_id, org_id, workload_id, slot_id, size_mib, uid, gid)
                values ($1, $2, $3, $4, $5, $6, $7, $8)";
            let number = |value: u32| Value::from(i32::try_from(value).unwrap_or(i32::MAX));
            let values = [
                volume.value(),
                node.value(),
                optional(cold.owner.map(|(org, ..)| org)),
                optional(cold.owner.map(|(_, workload, _)| workload)),
                cold.slot.value(),
                number(state.size_mib),
                number(release.uid),
                number(release.gid),
            ];
            tx.execute_raw(sql(insert, values)).await.or_store()?;
        }
        (Some((_, false)) | None, _) => {}
    }
    Ok(true)
}

/// The columns of a claim in a statement's answer, all null without one.
pub(crate) fn read_claim(row: &Row<'_>) -> Result<Option<Placed>> {
    let Some(slot) = row.id_opt::<SlotId>("slot_id")? else { return Ok(None) };
    Ok(Some(Placed {
        placement: Placement::Warm { was: row.parse("slot_observed", SlotState::parse)? },
        slot: Some((slot, row.id("slot_node")?)),
        minted: row.get("slot_minted")?,
        told: None,
    }))
}

/// Places a queued instance whose row is there: warm, else cold, else it stays in the queue.
pub(crate) async fn place(
    tx: &Tx,
    org: OrgId,
    workload: WorkloadId,
    release: ReleaseId,
    new: &NewInstance,
) -> Result<Placed> {
    let existing = matches!(new.volume, VolumeUse::Existing(..));
    if let (Some(pool), false, false) = (&new.pool, existing, new.claim == ClaimPolicy::Never) {
        let claim = concat!(
            "with go as materialized (
                select id from instances where org_id = $1 and id = $2 and slot_id is null and ended_at is null for update),",
            claim_sql!(),
            ", placed as (
                update instances set slot_id = claim.id, node_id = claim.node_id, placement = 'warm', placed_at = now(),
                    observed = claim.observed, observed_at = now()
                from claim where instances.org_id = $1 and instances.id = $2),
            volume as (
                update volumes set org_id = $1, workload_id = $5 from claim
                where volumes.slot_id = claim.id and volumes.org_id is null)
            select claim.id as slot_id, claim.node_id as slot_node, claim.minted as slot_minted,
                claim.observed as slot_observed
            from claim"
        );
        let values = [
            org.value(),
            new.id.value(),
            crate::row::bytes(&Recipe::of(pool).0),
            new.spec.tier.name.as_str().into(),
            workload.value(),
        ];
        let row: Option<QueryResult> = tx.query_one_raw(sql(claim, values)).await.or_store()?;
        if let Some(row) = row
            && let Some(placed) = read_claim(&Row::new(&row, "slots", "slot_id"))?
        {
            return Ok(placed);
        }
    }
    let _ = release;
    cold_or_queue(tx, org, workload, new).await
}

/// After no warm slot was to be had: cold, or the queue.
pub(crate) async fn cold_or_queue(tx: &Tx, org: OrgId, workload: WorkloadId, new: &NewInstance) -> Result<Placed> {
    if new.claim == ClaimPolicy::Require {
        return Err(StoreError::LimitReached(Limit::NoWarmSlot));
    }
    let pinned = match new.volume {
        VolumeUse::Existing(_, node) => Some(node),
        VolumeUse::None | VolumeUse::New(_) => None,
    };
    let request = Request { pinned, ..new.spec.request() };
    let cold = Cold {
        slot: new.slot,
        spec: &new.spec,
        minted: new.minted.as_deref(),
        owner: Some((org, workload, new.id)),
        volume: match new.volume {
            VolumeUse::None => None,
            VolumeUse::New(volume) => Some((volume, false)),
            VolumeUse::Existing(volume, _) => Some((volume, true)),
        },
    };
    match place_cold(tx, &request, &cold).await? {
        Ok(node) => Ok(Placed {
            placement: Placement::Cold,
            slot: Some((new.slot, node)),
            minted: new.minted.clone(),
            told: None,
        }),
        Err(why) => {
            let select = "select id, clawhq_queue_position(queued_at, id) as position from instances
                where org_id = $1 and id = $2";
            let row = tx.query_one_raw(sql(select, [org.value(), new.id.value()])).await.or_store()?;
            let row = row.ok_or(StoreError::NotFound("instance"))?;
            let position = Row::new(&row, "instances", "id").unsigned("position")?;
            Ok(Placed { placement: Placement::Queued { why, position }, slot: None, minted: None, told: None })
        }
    }
}
