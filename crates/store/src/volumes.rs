//! State volumes: they live on one node, belong to one workload, and are used by one slot at a time.

use clawhq_domain::ids::{NodeId, OrgId, SlotId, VolumeId, WorkloadId};
use sea_orm::{ConnectionTrait, QueryResult};

use crate::Store;
use crate::error::{OrStore, Result};
use crate::row::{Id, Row};
use crate::tx::{reading, sql};

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Volume {
    pub id: VolumeId,
    pub node: NodeId,
    /// `None`: made with a pool slot that nobody has claimed.
    pub owner: Option<(OrgId, WorkloadId)>,
    pub slot: Option<SlotId>,
    pub size_mib: u32,
    pub uid: u32,
    pub gid: u32,
    /// To be removed from the node as soon as no slot uses it.
    pub leaving: bool,
}

pub(crate) fn read(row: &QueryResult) -> Result<Volume> {
    let row = Row::new(row, "volumes", "id");
    Ok(Volume {
        id: row.id("id")?,
        node: row.id("node_id")?,
        owner: row.id_opt("org_id")?.zip(row.id_opt("workload_id")?),
        slot: row.id_opt("slot_id")?,
        size_mib: row.unsigned("size_mib")?,
        uid: row.unsigned("uid")?,
        gid: row.unsigned("gid")?,
        leaving: row.get::<String>("desired")? == "absent",
    })
}

#[derive(Clone, Copy)]
pub struct Volumes<'s> {
    pub(crate) store: &'s Store,
}

impl Volumes<'_> {
    /// Those a node has or should have.
    pub async fn of_node(self, node: NodeId) -> Result<Vec<Volume>> {
        let select = "select id, node_id, org_id, workload_id, slot_id, size_mib, uid, gid, desired
            from volumes where node_id = $1 and removed_at is null order by id";
        let db = &self.store.system;
        let rows = reading!(self.store.pool, db.query_all_raw(sql(select, [node.value()])))?;
        rows.iter().map(read).collect()
    }

    /// Those a node is to remove now: unwanted, and used by no slot that is still there. At most 1000; the rest follows.
    pub async fn removable(self, node: NodeId) -> Result<Vec<VolumeId>> {
        let select = "select v.id from volumes v
            where v.node_id = $1 and v.removed_at is null and v.desired = 'absent'
                and not exists (select 1 from slots s where s.id = v.slot_id and s.removed_at is null)
            order by v.id limit 1000";
        let db = &self.store.system;
        let rows = reading!(self.store.pool, db.query_all_raw(sql(select, [node.value()])))?;
        rows.iter().map(|row| Row::new(row, "volumes", "id").id("id")).collect()
    }

    /// The node says it is gone. Only what is unwanted can go; `false` when nothing was to be noted.
    pub async fn removed(self, node: NodeId, volume: VolumeId) -> Result<bool> {
        let update = "update volumes set removed_at = now(), slot_id = null
            where id = $1 and node_id = $2 and desired = 'absent' and removed_at is null";
        let done = self.store.system.execute_raw(sql(update, [volume.value(), node.value()])).await.or_store()?;
        Ok(done.rows_affected() == 1)
    }
}
