//! Instances as rows, and what loops ask of all orgs' at once.

use clawhq_domain::Millis;
use clawhq_domain::ids::{InstanceId, NodeId, OrgId, ReleaseId, SlotId, WorkloadId};
use clawhq_domain::slot::{Failure, SlotState, Step};
use clawhq_domain::workload::{InstanceView, NodeHealth, PlacementKind};
use sea_orm::{ConnectionTrait, QueryResult, Value};

use crate::error::Result;
use crate::row::{Row, optional};
use crate::tx::{reading, sql};
use crate::{Store, TenantScope, codec};

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Instance {
    pub id: InstanceId,
    pub workload: WorkloadId,
    pub release: ReleaseId,
    pub release_number: u32,
    pub placement: PlacementKind,
    /// `None` while queued. Kept when it has ended.
    pub slot: Option<SlotId>,
    pub node: Option<NodeId>,
    pub node_health: NodeHealth,
    pub observed: SlotState,
    /// When `observed` last changed, or was first known again after its node had been silent.
    pub since: Millis,
    /// How many times its process was started.
    pub run: u32,
    pub failure: Option<Failure>,
    pub steps: Vec<Step>,
    pub created_at: Millis,
    pub queued_at: Option<Millis>,
    pub placed_at: Option<Millis>,
    /// When the process that runs, or ran last, was started.
    pub started_at: Option<Millis>,
    pub ready_at: Option<Millis>,
    pub leaving: bool,
    /// Its container is certainly gone, or it left the queue.
    pub ended_at: Option<Millis>,
}

impl Instance {
    /// As `domain::lifecycle` sees it.
    pub fn view(&self) -> InstanceView {
        let there = self.ended_at.is_none();
        InstanceView {
            id: self.id,
            release: self.release,
            slot: self.slot.filter(|_| there),
            node: self.node.filter(|_| there),
            node_health: if self.node.is_some() { self.node_health } else { NodeHealth::Live },
            observed: self.observed,
            failure: self.failure.clone(),
            since: self.since,
            leaving: self.leaving,
            was_ready: self.ready_at.is_some(),
        }
    }
}

/// The columns that [`read`] wants, from `instances i`, `releases r` and `nodes n`.
macro_rules! instance_sql {
    () => {
        "i.id, i.workload_id, i.release_id, r.number as release_number, i.placement, i.slot_id, i.node_id,
            coalesce(n.lease_until > now(), false) as live, i.observed, i.run, i.failure, i.steps,
            case when i.ended_at is not null or i.failure is not null and i.observed in ('failed', 'exited')
                then i.observed_at else greatest(i.observed_at, n.heard_since) end as observed_at,
            i.created_at, i.queued_at, i.placed_at, i.started_at, i.ready_at, i.leaving_at, i.ended_at"
    };
}
pub(crate) use instance_sql;

pub(crate) fn read(row: &QueryResult) -> Result<Instance> {
    let row = Row::new(row, "instances", "id");
    Ok(Instance {
        id: row.id("id")?,
        workload: row.id("workload_id")?,
        release: row.id("release_id")?,
        release_number: row.unsigned("release_number")?,
        placement: row.parse("placement", PlacementKind::parse)?,
        slot: row.id_opt("slot_id")?,
        node: row.id_opt("node_id")?,
        node_health: if row.get("live")? { NodeHealth::Live } else { NodeHealth::Silent },
        observed: row.parse("observed", SlotState::parse)?,
        since: row.millis("observed_at")?,
        run: row.unsigned("run")?,
        failure: row.decode_opt("failure", codec::read_failure)?,
        steps: row.decode("steps", codec::read_steps)?,
        created_at: row.millis("created_at")?,
        queued_at: row.millis_opt("queued_at")?,
        placed_at: row.millis_opt("placed_at")?,
        started_at: row.millis_opt("started_at")?,
        ready_at: row.millis_opt("ready_at")?,
        leaving: row.millis_opt("leaving_at")?.is_some(),
        ended_at: row.millis_opt("ended_at")?,
    })
}

/// An instance's place in the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueuePlace {
    /// From 1, over all orgs.
    pub position: u32,
    pub since: Millis,
}

#[derive(Clone, Copy)]
pub struct SystemInstances<'s> {
    pub(crate) store: &'s Store,
}

impl SystemInstances<'_> {
    /// Those that wait for room, first come first, with the scope that placing them needs
    /// ([`Workloads::place_queued`](crate::Workloads::place_queued)). `after`: only those behind this one, which may have
    /// left the queue meanwhile.
    pub async fn queued(self, after: Option<(OrgId, InstanceId)>, limit: u32) -> Result<Vec<(TenantScope, Instance)>> {
        let select = concat!(
            "select i.org_id, ",
            instance_sql!(),
            " from instances i
            join releases r on r.org_id = i.org_id and r.id = i.release_id
            left join nodes n on n.id = i.node_id
            where i.placement = 'queued' and i.ended_at is null
                and ($3::uuid is null or (i.queued_at, i.id) > (
                    select l.queued_at, l.id from instances l where l.org_id = $2 and l.id = $3))
            order by i.queued_at, i.id limit $1"
        );
        let db = &self.store.system;
        let (org, instance) = after.unzip();
        let values = || [Value::from(i64::from(limit)), optional(org), optional(instance)];
        let rows = reading!(self.store.pool, db.query_all_raw(sql(select, values())))?;
        rows.iter()
            .map(|row| {
                let org: OrgId = Row::new(row, "instances", "id").id("org_id")?;
                Ok((TenantScope::new(org), read(row)?))
            })
            .collect()
    }

    /// How many instances have not ended, by what was last observed.
    pub async fn counts(self) -> Result<Vec<(SlotState, u64)>> {
        let select = "select gen_random_uuid() as id, observed, count(*) as number from instances
            where ended_at is null group by observed order by observed";
        let db = &self.store.system;
        let rows = reading!(self.store.pool, db.query_all_raw(sql(select, [])))?;
        rows.iter()
            .map(|row| {
                let row = Row::new(row, "instances", "id");
                Ok((row.parse("observed", SlotState::parse)?, row.get::<i64>("number")?.unsigned_abs()))
            })
            .collect()
    }
}
