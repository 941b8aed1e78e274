//! Containers: what each should be, as its node must be told, and what the node says of it.

use std::collections::BTreeMap;

use clawhq_domain::Millis;
use clawhq_domain::ids::{EventId, InstanceId, NodeId, OrgId, ReleaseId, SecretId, SlotId, VolumeId, WorkloadId};
use clawhq_domain::names::{SecretName, WorkloadName};
use clawhq_domain::placement::{NoPlace, Request};
use clawhq_domain::release::Release;
use clawhq_domain::slot::{Failure, SlotReport, SlotState};
use clawhq_domain::template::Template;
use clawhq_domain::tier::Tier;
use sea_orm::{ConnectionTrait, QueryResult, SqlxPostgresConnector, Value};
use sha2::Digest as _;
use uuid::Uuid;

use crate::error::{OrStore, Result, StoreError};
use crate::orgs::OrgKey;
use crate::place::{self, Cold};
use crate::row::{Id, Row, id_list, json};
use crate::tx::{in_transaction, reading, sql};
use crate::{Store, codec, orgs};

/// All that is fixed when a container is made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlotSpec {
    /// A pool slot: the template's with nothing of a tenant's in it. A cold one: the instance's.
    pub release: Release,
    /// As it was when the container was ordered: its files and minted credentials. `None` for a bare image.
    pub template: Option<Template>,
    pub tier: Tier,
}

impl SlotSpec {
    /// What a pool slot of a template at a tier is made from. Fails only if the template itself is refused.
    pub fn of_pool(template: &Template, tier: &Tier) -> Result<Self, clawhq_domain::Reason> {
        let release = clawhq_domain::release::from_template(template, clawhq_domain::release::Config::default())
            .map_err(|flaw| flaw.reason)?;
        Ok(Self { release, template: Some(template.clone()), tier: tier.clone() })
    }

    /// What must fit, on whichever node.
    pub fn request(&self) -> Request {
        Request { memory_mib: self.tier.memory_mib, tier_max_per_node: self.tier.max_per_node, pinned: None }
    }
}

/// A digest of a [`SlotSpec`]: slots of one recipe are interchangeable, and an instance may claim what its own
/// template and tier make today.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Recipe(pub(crate) [u8; 32]);

impl Recipe {
    pub fn of(spec: &SlotSpec) -> Self {
        // Maps are ordered and so are structs: equal specs make equal text.
        Self(sha2::Sha256::digest(codec::write_spec(spec).to_string().as_bytes()).into())
    }
}

/// A slot to be added to the pool.
pub struct WarmOrder {
    pub slot: SlotId,
    pub spec: SlotSpec,
    /// Credentials minted for it, sealed.
    pub minted: Option<Vec<u8>>,
    /// Needed when the template has a state volume; it becomes the tenant's with the slot.
    pub volume: Option<VolumeId>,
}

/// A slot as the pool and operators see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slot {
    pub id: SlotId,
    pub node: NodeId,
    pub template: Option<String>,
    pub tier: String,
    pub recipe: Recipe,
    pub memory_mib: u32,
    pub state: SlotState,
    pub leaving: bool,
    pub owner: Option<(OrgId, InstanceId)>,
    pub failure: Option<Failure>,
    pub created_at: Millis,
    pub ready_at: Option<Millis>,
    pub claimed_at: Option<Millis>,
}

/// A sealed secret and what its bytes are bound to.
#[derive(Clone, PartialEq, Eq)]
pub struct SealedSecret {
    pub id: SecretId,
    pub name: SecretName,
    pub version: u32,
    pub sealed: Vec<u8>,
}

/// Whose a slot is and what is to run in it.
#[derive(Clone)]
pub struct Claim {
    pub org: OrgId,
    pub workload: WorkloadId,
    pub workload_name: WorkloadName,
    pub instance: InstanceId,
    pub release_id: ReleaseId,
    pub release: Release,
    /// Grows when a person asks for a restart.
    pub restart: u32,
    /// The versions that the release names.
    pub secrets: Vec<SealedSecret>,
    /// The org's wrapped data keys; empty when nothing of the org's is sealed here.
    pub keys: Vec<OrgKey>,
}

/// All a node must be told of one slot.
#[derive(Clone)]
pub struct SlotDesired {
    pub slot: SlotId,
    pub node: NodeId,
    pub generation: i64,
    /// `false`: stop it and take it away.
    pub present: bool,
    pub spec: SlotSpec,
    /// What the image's reference was resolved to when this slot was made.
    pub image_digest: Option<String>,
    /// Credentials minted for it, sealed.
    pub minted: Option<Vec<u8>>,
    pub volume: Option<(VolumeId, u32)>,
    pub claim: Option<Claim>,
}

/// A slot whose row says what cannot be read, as after a step back to an older version: it is known to be there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnreadableSlot {
    pub slot: SlotId,
    pub generation: i64,
    pub present: bool,
}

/// Everything a node should have.
#[derive(Clone, Default)]
pub struct SlotsOfNode {
    pub slots: Vec<SlotDesired>,
    /// Never taken for missing: their containers stay as they are, and still leave when they are to.
    pub unreadable: Vec<UnreadableSlot>,
    /// To be destroyed: no slot uses them any more.
    pub removed_volumes: Vec<VolumeId>,
}

/// An event to be written if a report changes what is known of a claimed slot.
#[derive(Clone, Debug, PartialEq)]
pub struct SlotEvent {
    pub id: EventId,
    pub kind: String,
    pub message: String,
    pub data: serde_json::Value,
}

/// What a report changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Observed {
    pub slot: SlotId,
    pub before: SlotState,
    pub after: SlotState,
    /// Whose it is, when it is somebody's.
    pub owner: Option<(OrgId, WorkloadId, InstanceId)>,
    /// Its container is certainly gone and its room is given back.
    pub removed: bool,
    /// Something may be left to do: a wake-up was written.
    pub woke: bool,
}

impl Observed {
    pub fn changed(&self) -> bool {
        self.before != self.after || self.removed
    }
}

/// What became of a report. Each may be acknowledged; none needs to be said again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReportOutcome {
    Applied(Observed),
    /// About an older generation, from an older stream, or of a slot that is gone or another node's.
    Stale,
}

const SLOT: &str =
    "select id, node_id, template, tier, recipe, memory_mib, observed, desired, org_id, instance_id, failure,
    created_at, ready_at, claimed_at from slots
    where removed_at is null and ($1::boolean is null or (org_id is null) = $1) and ($2::uuid is null or node_id = $2)
        and ($3::uuid is null or id = $3)
    order by created_at, id";

fn read_slot(row: &QueryResult) -> Result<Slot> {
    let row = Row::new(row, "slots", "id");
    Ok(Slot {
        id: row.id("id")?,
        node: row.id("node_id")?,
        template: row.get("template")?,
        tier: row.get("tier")?,
        recipe: Recipe(row.get::<Vec<u8>>("recipe")?.try_into().map_err(|_| row.corrupt("recipe"))?),
        memory_mib: row.unsigned("memory_mib")?,
        state: row.parse("observed", SlotState::parse)?,
        leaving: row.get::<String>("desired")? == "absent",
        owner: row.id_opt("org_id")?.zip(row.id_opt("instance_id")?),
        failure: row.decode_opt("failure", codec::read_failure)?,
        created_at: row.millis("created_at")?,
        ready_at: row.millis_opt("ready_at")?,
        claimed_at: row.millis_opt("claimed_at")?,
    })
}

#[derive(Clone, Copy)]
pub struct Slots<'s> {
    pub(crate) store: &'s Store,
}

impl Slots<'_> {
    /// Orders a warm slot: `domain::placement` chooses the node, its room is reserved and the row written in one
    /// transaction. `Ok(Err(_))`: no node has room, and why.
    pub async fn order(self, order: &WarmOrder) -> Result<Result<NodeId, NoPlace>> {
        let request = order.spec.request();
        in_transaction!(self.store.begin(), |tx| {
            let cold = Cold {
                slot: order.slot,
                spec: &order.spec,
                minted: order.minted.as_deref(),
                owner: None,
                volume: order.volume.map(|volume| (volume, false)),
            };
            place::place_cold(&tx, &request, &cold).await
        })
    }

    /// Every unclaimed slot that is not gone, those that are leaving included.
    pub async fn pool(self) -> Result<Vec<Slot>> {
        self.select(Some(true), None, None).await
    }

    /// Every slot that is not gone, of one node or of all.
    pub async fn list(self, node: Option<NodeId>) -> Result<Vec<Slot>> {
        self.select(None, node, None).await
    }

    /// `None` when it is unknown or gone.
    pub async fn get(self, slot: SlotId) -> Result<Option<Slot>> {
        Ok(self.select(None, None, Some(slot)).await?.into_iter().next())
    }

    async fn select(self, unclaimed: Option<bool>, node: Option<NodeId>, slot: Option<SlotId>) -> Result<Vec<Slot>> {
        let db = &self.store.system;
        let values = || [Value::from(unclaimed), crate::row::optional(node), crate::row::optional(slot)];
        let rows = reading!(self.store.pool, db.query_all_raw(sql(SLOT, values())))?;
        rows.iter().map(read_slot).collect()
    }

    /// For each pool (template, tier) whose newest slots failed: how many in a row since the last that became ready, and
    /// when the last one was ordered.
    pub async fn failures(self) -> Result<BTreeMap<(String, String), (u32, Millis)>> {
        let select = "select f.id, f.template, f.tier, f.failures, f.last_at from (
                select min(s.id::text)::uuid as id, s.template, s.tier, count(*)::int as failures, max(s.observed_at) as last_at
                from slots s
                where s.template is not null and s.failure is not null and s.ready_at is null
                    and s.created_at > now() - interval '1 day'
                    and s.created_at > coalesce((select max(r.created_at) from slots r
                        where r.template = s.template and r.tier = s.tier and r.ready_at is not null), '-infinity')
                group by s.template, s.tier) f";
        let rows = self.store.system.query_all_raw(sql(select, [])).await.or_store()?;
        rows.iter()
            .map(|row| {
                let row = Row::new(row, "slots", "id");
                Ok(((row.get("template")?, row.get("tier")?), (row.unsigned("failures")?, row.millis("last_at")?)))
            })
            .collect()
    }

    /// Tells unclaimed slots to go. One that is claimed at the same moment stays its owner's. Returns those that leave,
    /// with their nodes.
    pub async fn retire(self, slots: &[SlotId]) -> Result<Vec<(SlotId, NodeId)>> {
        // In the order of ids, so that two passes cannot wait for each other in a circle.
        let update = "with mine as materialized (
                select id from slots where id in (select value::uuid from jsonb_array_elements_text($1))
                    and org_id is null and desired = 'present' order by id for update)
            update slots set desired = 'absent', generation = generation + 1, leaving_at = now()
            from mine where slots.id = mine.id returning slots.id, slots.node_id";
        let rows = in_transaction!(self.store.begin(), |tx| {
            tx.query_all_raw(sql(update, [id_list(slots)])).await.or_store()
        })?;
        rows.iter()
            .map(|row| {
                let row = Row::new(row, "slots", "id");
                Ok((row.id("id")?, row.id("node_id")?))
            })
            .collect()
    }

    /// What a node must be told of these slots; unknown ones and those that are gone are left out.
    pub async fn desired(self, slots: &[SlotId]) -> Result<Vec<SlotDesired>> {
        let rows = self.desired_rows(id_list(slots), Value::Uuid(None)).await?;
        let mut slots = rows.iter().map(read_desired_row).collect::<Result<Vec<_>>>()?;
        self.add_secrets(&mut slots).await?;
        Ok(slots)
    }

    /// The whole desired set of a node. One slot that cannot be read does not keep the others from theirs.
    pub async fn of_node(self, node: NodeId) -> Result<SlotsOfNode> {
        let rows = self.desired_rows(Value::Json(None), node.value()).await?;
        let (mut slots, mut unreadable) = (Vec::with_capacity(rows.len()), Vec::new());
        for row in &rows {
            match read_desired_row(row) {
                Ok(slot) => slots.push(slot),
                Err(error) => {
                    let row = Row::new(row, "slots", "id");
                    let slot = row.id("id")?;
                    tracing::error!(slot.id = %slot, "a slot is left as it is: {error}");
                    unreadable.push(UnreadableSlot {
                        slot,
                        generation: row.get("generation")?,
                        present: row.get::<String>("desired")? == "present",
                    });
                }
            }
        }
        self.add_secrets(&mut slots).await?;
        let removed_volumes = crate::Volumes { store: self.store }.removable(node).await?;
        Ok(SlotsOfNode { slots, unreadable, removed_volumes })
    }

    async fn desired_rows(self, ids: Value, node: Value) -> Result<Vec<QueryResult>> {
        let by_id = "select s.id, s.node_id, s.generation, s.desired, s.spec, s.image_digest, s.minted, s.restart,
                s.org_id, s.instance_id, w.id as workload_id, w.name as workload_name, r.id as release_id,
                r.spec as release_spec, v.id as volume_id, v.size_mib
            from slots s
            left join instances i on i.org_id = s.org_id and i.id = s.instance_id
            left join workloads w on w.org_id = i.org_id and w.id = i.workload_id
            left join releases r on r.org_id = i.org_id and r.id = i.release_id
            left join volumes v on v.slot_id = s.id
            where s.removed_at is null and s.id = any (array(select value::uuid from jsonb_array_elements_text($1)))
            order by s.id";
        let by_node = "select s.id, s.node_id, s.generation, s.desired, s.spec, s.image_digest, s.minted, s.restart,
                s.org_id, s.instance_id, w.id as workload_id, w.name as workload_name, r.id as release_id,
                r.spec as release_spec, v.id as volume_id, v.size_mib
            from slots s
            left join instances i on i.org_id = s.org_id and i.id = s.instance_id
            left join workloads w on w.org_id = i.org_id and w.id = i.workload_id
            left join releases r on r.org_id = i.org_id and r.id = i.release_id
            left join volumes v on v.slot_id = s.id
            where s.removed_at is null and s.node_id = $1
            order by s.id";
        let statement = || match &node {
            Value::Uuid(Some(_)) => sql(by_node, [node.clone()]),
            _ => sql(by_id, [ids.clone()]),
        };
        let db = &self.store.system;
        reading!(self.store.pool, db.query_all_raw(statement()))
    }

    /// Sealed secrets and data keys, for the claims that name any.
    async fn add_secrets(self, slots: &mut [SlotDesired]) -> Result<()> {
        let (mut releases, mut orgs) = (Vec::new(), Vec::new());
        for slot in slots.iter() {
            let Some(claim) = &slot.claim else { continue };
            if !claim.release.config.secrets.is_empty() {
                releases.push(claim.release_id);
                orgs.push(claim.org);
            }
        }
        let db = &self.store.system;
        let mut sealed: BTreeMap<Uuid, Vec<SealedSecret>> = BTreeMap::new();
        if !releases.is_empty() {
            let select = "select l.release_id, s.id, s.name, v.version, v.sealed
                from release_secrets l
                join secrets s on s.org_id = l.org_id and s.id = l.secret_id
                join secret_versions v on v.org_id = l.org_id and v.secret_id = l.secret_id and v.version = l.version
                where l.release_id = any (array(select value::uuid from jsonb_array_elements_text($1)))
                order by s.name, v.version";
            let rows = reading!(self.store.pool, db.query_all_raw(sql(select, [id_list(&releases)])))?;
            for row in &rows {
                let row = Row::new(row, "secret_versions", "id");
                let secret = || {
                    Ok(SealedSecret {
                        id: row.id("id")?,
                        name: row.parse("name", |text| SecretName::parse(text).ok())?,
                        version: row.unsigned("version")?,
                        sealed: row.get("sealed")?,
                    })
                };
                match secret() {
                    Ok(secret) => sealed.entry(row.get("release_id")?).or_default().push(secret),
                    // Its own claim will miss it; the others do not need it.
                    Err::<_, StoreError>(error) => tracing::error!("a secret is left out: {error}"),
                }
            }
        }
        let mut keys: BTreeMap<OrgId, Vec<OrgKey>> = BTreeMap::new();
        if !orgs.is_empty() {
            let select = "select org_id, dek_id, kek_version, sealed from org_keys
                where org_id = any (array(select value::uuid from jsonb_array_elements_text($1))) order by dek_id";
            let rows = reading!(self.store.pool, db.query_all_raw(sql(select, [id_list(&orgs)])))?;
            for row in &rows {
                let row = Row::new(row, "org_keys", "org_id");
                match orgs::read_key(&row) {
                    Ok(key) => keys.entry(row.id("org_id")?).or_default().push(key),
                    Err(error) => tracing::error!("a data key is left out: {error}"),
                }
            }
        }
        for claim in slots.iter_mut().filter_map(|slot| slot.claim.as_mut()) {
            claim.secrets = sealed.get(&claim.release_id.uuid()).cloned().unwrap_or_default();
            claim.keys = keys.get(&claim.org).cloned().unwrap_or_default();
        }
        Ok(())
    }

    /// Applies a node's report of one of its slots: slot, instance, workload's version, event, wake-up, and the room and
    /// volume of a slot that is gone, in one statement and one round trip.
    ///
    /// Not waited for until it is on disk: after a crash of the database, which breaks every listener's connection, the
    /// nodes' streams ask for all states anew. Reports from an older stream (`epoch`) or about an older generation change nothing.
    pub async fn observe(
        self,
        node: NodeId,
        epoch: i64,
        report: &SlotReport,
        event: Option<&SlotEvent>,
    ) -> Result<ReportOutcome> {
        let values = [
            report.slot.value(),
            node.value(),
            Value::from(epoch),
            Value::from(report.generation),
            report.state.name().into(),
            Value::from(i32::try_from(report.run).unwrap_or(i32::MAX)),
            Value::from(report.container.clone()),
            Value::from(report.image_digest.clone()),
            Value::Json(report.failure.as_ref().map(|failure| Box::new(codec::write_failure(failure)))),
            json(codec::write_steps(&report.steps)),
            crate::row::optional(event.map(|event| event.id)),
            Value::from(event.map(|event| event.kind.clone())),
            Value::from(event.map(|event| crate::events::cut(&event.message, 1000).to_owned())),
            json(event.map(|event| event.data.clone()).unwrap_or_else(|| serde_json::json!({}))),
            crate::row::optional(report.instance),
        ];
        let relaxed = SqlxPostgresConnector::from_sqlx_postgres_pool(self.store.relaxed.clone());
        let mut round = 0_u32;
        let row = loop {
            match reading!(self.store.relaxed, relaxed.query_one_raw(sql(OBSERVE, values.clone()))) {
                Err(StoreError::Retryable) if round < 5 => {
                    round += 1;
                    tokio::time::sleep(std::time::Duration::from_millis(2 << round)).await;
                }
                outcome => break outcome?,
            }
        };
        let Some(row) = row else { return Ok(ReportOutcome::Stale) };
        let row = Row::new(&row, "slots", "id");
        let owner = match (row.id_opt("org_id")?, row.id_opt("workload_id")?, row.id_opt("instance_id")?) {
            (Some(org), Some(workload), Some(instance)) => Some((org, workload, instance)),
            _ => None,
        };
        Ok(ReportOutcome::Applied(Observed {
            slot: report.slot,
            before: row.parse("before", SlotState::parse)?,
            after: report.state,
            owner,
            removed: row.get("removed")?,
            woke: row.get("woke")?,
        }))
    }

    /// Gives up everything on a disabled node: its slots count as gone and their instances as ended with `failure`.
    /// Only for a node that is certainly dead. Returns the workloads that lost an instance.
    pub async fn abandon(self, node: NodeId, failure: &Failure) -> Result<Vec<(OrgId, WorkloadId)>> {
        let update = "with
            gone as (
                update slots set desired = 'absent', observed = 'absent', observed_at = now(), removed_at = now(),
                    generation = generation + 1
                where node_id = $1 and removed_at is null
                    and exists (select 1 from nodes where id = $1 and state = 'disabled')
                returning id, org_id, instance_id, memory_mib),
            ended as (
                update instances i set observed = 'failed', failure = coalesce(i.failure, $2), observed_at = now(),
                    ended_at = now()
                from gone where i.org_id = gone.org_id and i.id = gone.instance_id and i.ended_at is null
                returning i.org_id, i.workload_id),
            volume as (update volumes set slot_id = null from gone where volumes.slot_id = gone.id),
            room as (
                update nodes set reserved_mib = reserved_mib - (select coalesce(sum(memory_mib), 0) from gone),
                    slots_used = slots_used - (select count(*) from gone)
                where id = $1),
            wake as (
                insert into outbox (topic, key, payload)
                select distinct 'workload', workload_id::text, jsonb_build_object('org', org_id, 'workload', workload_id)
                from ended)
            select distinct workload_id, org_id from ended";
        let values = [node.value(), json(codec::write_failure(failure))];
        let rows = in_transaction!(self.store.begin(), |tx| {
            tx.query_all_raw(sql(update, values.clone())).await.or_store()
        })?;
        rows.iter()
            .map(|row| {
                let row = Row::new(row, "instances", "workload_id");
                Ok((row.id("org_id")?, row.id("workload_id")?))
            })
            .collect()
    }

    /// Deletes rows of slots that have been gone for `keep_ms`; instances keep their names. Returns how many.
    pub async fn sweep(self, keep_ms: Millis) -> Result<u64> {
        let delete = "delete from slots where id in (
            select id from slots where removed_at < now() - $1 * interval '1 millisecond' limit 5000)";
        let done = self.store.system.execute_raw(sql(delete, [Value::from(keep_ms as f64)])).await.or_store()?;
        Ok(done.rows_affected())
    }
}

fn read_desired_row(row: &QueryResult) -> Result<SlotDesired> {
    let row = Row::new(row, "slots", "id");
    let claim = match (row.id_opt::<OrgId>("org_id")?, row.id_opt::<InstanceId>("instance_id")?) {
        (Some(org), Some(instance)) => Some(Claim {
            org,
            instance,
            workload: row.id("workload_id")?,
            workload_name: row.parse("workload_name", |text| WorkloadName::parse(text).ok())?,
            release_id: row.id("release_id")?,
            release: row.decode("release_spec", codec::read_release)?,
            restart: row.unsigned("restart")?,
            secrets: Vec::new(),
            keys: Vec::new(),
        }),
        _ => None,
    };
    let volume = match row.id_opt("volume_id")? {
        Some(id) => Some((id, row.unsigned("size_mib")?)),
        None => None,
    };
    Ok(SlotDesired {
        slot: row.id("id")?,
        node: row.id("node_id")?,
        generation: row.get("generation")?,
        present: row.get::<String>("desired")? == "present",
        spec: row.decode("spec", codec::read_spec)?,
        image_digest: row.get("image_digest")?,
        minted: row.get("minted")?,
        volume,
        claim,
    })
}

/// Locks are taken in one order everywhere: slot, instance, workload, the org's counters, node.
///
/// An instance that failed keeps its failure whatever is reported later; one that runs has none.
const OBSERVE: &str = "with
    old as materialized (
        select s.id, s.observed, s.image_digest from slots s join nodes n on n.id = s.node_id and n.stream_epoch = $3
        where s.id = $1 and s.node_id = $2 and s.generation = $4 and s.removed_at is null
            and ($15::uuid is null or s.instance_id = $15)
        for update of s),
    slot as (
        update slots set observed = $5, observed_generation = $4, run = $6,
            observed_at = case when slots.observed = $5 then slots.observed_at else now() end,
            container = coalesce($7, slots.container), image_digest = coalesce(slots.image_digest, $8), failure = $9,
            ready_at = case when $5 in ('waiting', 'frozen') then coalesce(slots.ready_at, now()) else slots.ready_at end,
            removed_at = case when slots.desired = 'absent' and $5 = 'absent' then now() end
        from old where slots.id = old.id
        returning slots.id, slots.node_id, slots.org_id, slots.instance_id, slots.memory_mib, old.observed as before,
            slots.removed_at is not null as removed, old.observed <> $5 or slots.removed_at is not null as changed),
    instance as (
        update instances i set run = $6,
            started_at = case when $6 > i.run then now() else i.started_at end,
            observed = case when i.failure is not null and i.observed in ('failed', 'exited') then i.observed else $5 end,
            observed_at = case when i.observed = $5 or i.failure is not null and i.observed in ('failed', 'exited')
                          then i.observed_at else now() end,
            failure = case when i.failure is not null and i.observed in ('failed', 'exited') then i.failure
                      when $5 = 'running' then null else coalesce($9, i.failure) end,
            steps = case when jsonb_array_length($10) > 0 then $10 else i.steps end,
            ready_at = case when $5 = 'running' then coalesce(i.ready_at, now()) else i.ready_at end,
            ended_at = case when slot.removed then now() end
        from slot where i.org_id = slot.org_id and i.id = slot.instance_id and i.ended_at is null
        returning i.org_id, i.id, i.workload_id, i.release_id, slot.changed),
    -- What a tenant's own reference was resolved to is what every later container of this release is made from.
    pin as (
        update releases r set spec = jsonb_set(r.spec, '{image_digest}', to_jsonb($8::text))
        from old, instance where old.image_digest is null and $8::text is not null
            and r.org_id = instance.org_id and r.id = instance.release_id
            and r.spec->'template' = 'null' and r.spec->'image_digest' = 'null'),
    workload as (
        update workloads w set version = version + 1, updated_at = now()
        from instance where w.org_id = instance.org_id and w.id = instance.workload_id and instance.changed
        returning w.org_id, w.id, w.desired, w.release_id),
    counter as (
        update org_counters c set event_seq = event_seq + 1
        from workload where c.org_id = workload.org_id and $11::uuid is not null
        returning c.org_id, c.event_seq),
    event as (
        insert into events (org_id, seq, id, workload_id, instance_id, kind, message, data)
        select counter.org_id, counter.event_seq, $11, instance.workload_id, instance.id, $12, $13, $14
        from counter, instance),
    -- What runs as it is wanted, alone, leaves nothing to be done: most reports of a deploy are this one.
    wake as (
        insert into outbox (topic, key, payload)
        select 'workload', w.id::text, jsonb_build_object('org', w.org_id, 'workload', w.id)
        from workload w, instance
        where $5 <> 'running' or w.desired <> 'running' or instance.release_id <> w.release_id
            or exists (select 1 from instances other where other.org_id = w.org_id and other.workload_id = w.id
                and other.id <> instance.id and other.ended_at is null)
        returning 1),
    volume as (
        update volumes set slot_id = null, desired = case when volumes.org_id is null then 'absent' else desired end
        from slot where volumes.slot_id = slot.id and slot.removed),
    room as (
        update nodes set reserved_mib = reserved_mib - slot.memory_mib, slots_used = slots_used - 1
        from slot left join counter on true where nodes.id = slot.node_id and slot.removed)
    select slot.id, slot.before, slot.removed, slot.org_id, slot.instance_id, instance.workload_id,
        exists (select from wake) as woke
    from slot left join instance on true";
