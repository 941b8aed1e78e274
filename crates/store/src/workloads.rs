//! Workloads, their releases, and the deploy.

use std::collections::BTreeMap;

use clawhq_domain::Millis;
use clawhq_domain::ids::{InstanceId, NodeId, OrgId, ReleaseId, SlotId, UserId, VolumeId, WorkloadId};
use clawhq_domain::names::{ImageRef, TemplateName, WorkloadName};
use clawhq_domain::release::{self, Release};
use clawhq_domain::slot::Failure;
use clawhq_domain::workload::{ClaimPolicy, Desired, WorkloadView};
use sea_orm::{ConnectionTrait, QueryResult, Value};
use uuid::Uuid;

use crate::change::Change;
use crate::error::{Limit, OrStore, Result, StoreError};
use crate::events::{audit_json, events_json, record, wakeups_json};
use crate::instances::{Instance, QueuePlace, instance_sql};
use crate::place::{self, NewInstance, Placed, VolumeUse, claim_sql};
use crate::row::{Id, Row, id_list, json, optional};
use crate::slots::{Claim, Recipe, SlotDesired, SlotSpec};
use crate::tx::{Tx, in_transaction, reading, sql};
use crate::{Store, Tenant, TenantScope, codec, idempotency};

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Workload {
    pub id: WorkloadId,
    pub name: WorkloadName,
    pub template: Option<TemplateName>,
    pub image: ImageRef,
    pub tier: String,
    pub desired: Desired,
    /// Moves with every change to what should run.
    pub generation: i64,
    /// Moves with every change of anything shown, reports included: the ETag.
    pub version: i64,
    pub release: ReleaseId,
    pub claim: ClaimPolicy,
    pub created_by: Option<UserId>,
    pub created_at: Millis,
    pub updated_at: Millis,
    pub deleted_at: Option<Millis>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReleaseRow {
    pub id: ReleaseId,
    pub number: u32,
    pub release: Release,
    /// Against the one before it.
    pub diff: Vec<release::Change>,
    pub created_by: Option<UserId>,
    pub created_at: Millis,
}

/// How many of a workload's newest instances are looked at, beside all that have not ended.
const RECENT: i64 = 12;

/// A workload with what is needed to say how it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkloadDetail {
    pub workload: Workload,
    /// The current one.
    pub release: ReleaseRow,
    /// Newest first: all that have not ended, and the most recent ones.
    pub instances: Vec<Instance>,
    /// Set while the newest instance is queued.
    pub queue: Option<QueuePlace>,
    /// Its state volume, if it has one by now.
    pub volume: Option<(VolumeId, NodeId)>,
}

impl WorkloadDetail {
    /// As `domain::lifecycle` sees it: instances that have not ended, and of the ended ones those that failed since
    /// anything last ran.
    pub fn view(&self) -> WorkloadView {
        let mut failures_in_a_row = 0;
        let mut last_failure_at = None;
        for instance in self.instances.iter().filter(|instance| instance.release == self.workload.release) {
            if instance.failure.is_some() {
                failures_in_a_row += 1;
                last_failure_at = last_failure_at.or(Some(instance.since));
            } else if instance.ended_at.is_some() || instance.ready_at.is_some() {
                break;
            }
        }
        let mut settled = false;
        let mut instances: Vec<_> = Vec::new();
        for instance in &self.instances {
            if instance.ended_at.is_none() || (instance.failure.is_some() && !settled) {
                instances.push(instance.view());
            } else {
                settled = true;
            }
        }
        instances.reverse();
        WorkloadView {
            desired: self.workload.desired,
            release: self.workload.release,
            single_writer: self.release.release.state.is_some(),
            failures_in_a_row,
            last_failure_at,
            instances,
        }
    }
}

#[derive(Clone, Debug)]
pub enum WorkloadRef {
    Id(WorkloadId),
    /// Only of one that is not deleted.
    Name(WorkloadName),
}

/// Which workloads a list shows. Deleted ones never.
#[derive(Clone, Debug, Default)]
pub struct WorkloadFilter {
    pub template: Option<TemplateName>,
    pub desired: Option<Desired>,
    /// Only those older than this one: the last of the page before.
    pub before: Option<WorkloadId>,
    /// 1 to 200.
    pub limit: u32,
}

pub struct NewRelease {
    pub id: ReleaseId,
    pub release: Release,
}

pub struct NewWorkload {
    pub id: WorkloadId,
    pub name: WorkloadName,
    pub release: NewRelease,
    pub instance: NewInstance,
    pub created_by: Option<UserId>,
    /// What the org's tier allows; checked again inside, where it holds against everybody else.
    pub max_workloads: u32,
}

/// What a deploy made.
#[derive(Clone, Debug)]
pub struct Deployed {
    pub workload: WorkloadId,
    pub instance: InstanceId,
    pub placed: Placed,
    pub created_at: Millis,
}

/// A workload that a loop should look at, with its scope.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unsettled {
    pub scope: TenantScope,
    pub workload: WorkloadId,
}

macro_rules! workload_sql {
    () => {
        "w.id, w.name, w.template, w.image, w.tier, w.desired, w.generation, w.version, w.release_id, w.claim_policy,
            w.created_by, w.created_at, w.updated_at, w.deleted_at"
    };
}

/// A workload, its current release and its newest instances as one statement: a row an instance, or one row without.
/// `$3` is how many instances that have ended are looked at; `$where` finds the workload by `$1` and `$2`.
macro_rules! detail_sql {
    ($where:literal) => {
        detail_sql!("", $where)
    };
    ($more:literal, $where:literal) => {
        concat!(
            "select w.id as w_id, w.name as w_name, w.template as w_template, w.image as w_image, w.tier as w_tier,
                w.desired as w_desired, w.generation as w_generation, w.version as w_version,
                w.release_id as w_release_id, w.claim_policy as w_claim_policy, w.created_by as w_created_by,
                w.created_at as w_created_at, w.updated_at as w_updated_at, w.deleted_at as w_deleted_at,
                c.id as c_id, c.number as c_number, c.spec as c_spec, c.diff as c_diff, c.created_by as c_created_by,
                c.created_at as c_created_at,
                v.id as volume_id, v.node_id as volume_node,
                case when i.placement = 'queued' and i.ended_at is null
                    then clawhq_queue_position(i.queued_at, i.id) end as position, ",
            instance_sql!(),
            $more,
            " from workloads w
            join releases c on c.org_id = w.org_id and c.id = w.release_id
            -- Found first and once: joined in one go, an unanalysed table has each of the org's instances looked for in it.
            left join lateral (
                (select l.id from instances l
                    where l.org_id = w.org_id and l.workload_id = w.id order by l.id desc limit $3)
                union
                (select l.id from instances l
                    where l.org_id = w.org_id and l.workload_id = w.id and l.ended_at is null)) seen on true
            left join instances i on i.org_id = w.org_id and i.id = seen.id
            left join releases r on r.org_id = w.org_id and r.id = i.release_id
            left join nodes n on n.id = i.node_id
            left join volumes v on v.org_id = w.org_id and v.workload_id = w.id and v.desired = 'present'
            where ",
            $where,
            " order by i.id desc"
        )
    };
}

const GET_BY_ID: &str = detail_sql!("w.org_id = $1 and w.id = $2");
/// The same, another text: a plan is kept for one role, and this one is asked for as the system's.
const OF: &str = detail_sql!("w.org_id = $1 and w.id = $2 /* of */");
const GET_BY_NAME: &str = detail_sql!("w.org_id = $1 and w.name = $2 and w.deleted_at is null");
const BY_HOST: &str = detail_sql!(
    ", n.facts->>'ingress' as ingress",
    "w.org_id = (select o.id from orgs o where o.slug = $1) and w.name = $2 and w.deleted_at is null"
);

const STRAIGHT: &str = "select w.id, i.id as instance_id, i.slot_id, i.node_id, n.facts->>'ingress' as ingress, r.spec
    from orgs o
    join workloads w on w.org_id = o.id and w.name = $2 and w.deleted_at is null and w.desired = 'running'
    join instances i on i.org_id = w.org_id and i.workload_id = w.id and i.ended_at is null
    join releases r on r.org_id = w.org_id and r.id = w.release_id
    join nodes n on n.id = i.node_id and n.lease_until > now() and n.facts->>'ingress' is not null
    where o.slug = $1 and i.release_id = w.release_id and i.observed = 'running' and i.failure is null
        and i.leaving_at is null and i.slot_id is not null
        and not exists (select 1 from instances other where other.org_id = w.org_id and other.workload_id = w.id
            and other.ended_at is null and other.id <> i.id)";

/// Where the bytes of a workload that simply runs go.
pub struct StraightRoute {
    pub workload: WorkloadId,
    pub instance: InstanceId,
    pub slot: SlotId,
    pub node: NodeId,
    pub ingress: String,
    pub release: Release,
}

/// Instances of one workload, newest first, as rows are read.
#[derive(Default)]
struct Found {
    instances: Vec<Instance>,
    queue: Option<QueuePlace>,
    volume: Option<(VolumeId, NodeId)>,
}

impl Found {
    fn add(&mut self, row: &QueryResult) -> Result<()> {
        let instance = crate::instances::read(row)?;
        let row = Row::new(row, "instances", "id");
        if let (Some(position), true) = (row.get::<Option<i32>>("position")?, self.instances.is_empty()) {
            let position = u32::try_from(position).map_err(|_| row.corrupt("queued_at"))?;
            self.queue = Some(QueuePlace { position, since: instance.queued_at.unwrap_or(instance.created_at) });
        }
        self.volume = row.id_opt("volume_id")?.zip(row.id_opt("volume_node")?);
        // A workload with two volumes (never made today) would repeat its instances here.
        if self.instances.last().is_none_or(|last| last.id != instance.id) {
            self.instances.push(instance);
        }
        Ok(())
    }
}

/// The rows of [`detail_sql`].
fn read_detail(rows: &[QueryResult]) -> Result<Option<WorkloadDetail>> {
    let Some(first) = rows.first() else { return Ok(None) };
    let workload = read_workload_as(&Row::prefixed(first, "workloads", "w_"))?;
    let release = read_release_as(&Row::prefixed(first, "releases", "c_"))?;
    let mut found = Found::default();
    for row in rows {
        let there = Row::new(row, "instances", "id").id_opt::<InstanceId>("id")?.is_some();
        if there {
            found.add(row)?;
        }
    }
    let Found { instances, queue, volume } = found;
    Ok(Some(WorkloadDetail { workload, release, instances, queue, volume }))
}

fn read_workload(row: &QueryResult) -> Result<Workload> {
    read_workload_as(&Row::new(row, "workloads", "id"))
}

fn read_workload_as(row: &Row<'_>) -> Result<Workload> {
    Ok(Workload {
        id: row.id("id")?,
        name: row.parse("name", |text| WorkloadName::parse(text).ok())?,
        template: row.parse_opt("template", |text| TemplateName::parse(text).ok())?,
        image: row.parse("image", |text| ImageRef::parse(text).ok())?,
        tier: row.get("tier")?,
        desired: row.parse("desired", Desired::parse)?,
        generation: row.get("generation")?,
        version: row.get("version")?,
        release: row.id("release_id")?,
        claim: row.parse("claim_policy", ClaimPolicy::parse)?,
        created_by: row.id_opt("created_by")?,
        created_at: row.millis("created_at")?,
        updated_at: row.millis("updated_at")?,
        deleted_at: row.millis_opt("deleted_at")?,
    })
}

fn read_release(row: &QueryResult) -> Result<ReleaseRow> {
    read_release_as(&Row::new(row, "releases", "id"))
}

fn read_release_as(row: &Row<'_>) -> Result<ReleaseRow> {
    Ok(ReleaseRow {
        id: row.id("id")?,
        number: row.unsigned("number")?,
        release: row.decode("spec", codec::read_release)?,
        diff: row.decode("diff", codec::read_changes)?,
        created_by: row.id_opt("created_by")?,
        created_at: row.millis("created_at")?,
    })
}

/// The deploy, all but what the whole org shares ([`COUNT`]). Whatever does not get its row leaves its dependants without
/// one, and the caller rolls back by what the answer lacks.
const CREATE: &str = concat!(
    "with
    key as (
        insert into idempotency (org_id, route, key, request_hash, effect)
        select $1, $18, $19, $20, $6 where $19::text is not null on conflict do nothing returning 1),
    fresh as materialized (select 1 where $19::text is null or exists (select from key)),
    -- A look, not yet the count. No slot is claimed for what is not made: the claim would refer to an instance that is not
    -- there.
    go as materialized (select 1 from fresh, org_counters c where c.org_id = $1 and c.workloads < $17),
    ",
    claim_sql!(),
    ",
    workload as (
        insert into workloads (org_id, id, name, template, image, tier, desired, release_id, claim_policy, created_by)
        select $1, $6, $10, $11, $12, $4, 'running', $7, $13, $14 from go),
    release as (
        insert into releases (org_id, id, workload_id, number, spec, diff, created_by)
        select $1, $7, $6, 1, $15, '[]', $14 from go),
    link as (
        insert into release_secrets (org_id, release_id, secret_id, version)
        select distinct $1, $7::uuid, s.id, v.version
        from go, jsonb_to_recordset($16) as wanted(name text, version int)
        join secrets s on s.org_id = $1 and s.name = wanted.name
        join secret_versions v on v.org_id = $1 and v.secret_id = s.id and v.version = wanted.version
        returning 1),
    instance as (
        insert into instances (org_id, id, workload_id, release_id, slot_id, node_id, placement, tier, memory_mib,
            observed, queued_at, placed_at)
        select $1, $2, $6, $7, claim.id, claim.node_id, case when claim.id is null then 'queued' else 'warm' end, $4, $5,
            coalesce(claim.observed, 'absent'), case when claim.id is null then now() end,
            case when claim.id is null then null else now() end
        from go left join claim on true),
    volume as (
        update volumes set org_id = $1, workload_id = $6
        from claim where volumes.slot_id = claim.id and volumes.org_id is null
        returning volumes.id, volumes.size_mib),
    entry as (
        insert into audit (org_id, actor_kind, actor_id, actor_part, action, object, ip, request_id, detail)
        select $1, a.v->>'kind', (a.v->>'actor')::uuid, a.v->>'part', a.v->>'action', a.v->>'object', a.v->>'ip',
            (a.v->>'request')::uuid, a.v->'detail'
        from go, jsonb_array_elements($8) a(v)),
    wake as (
        insert into outbox (topic, key, payload)
        select o.v->>'topic', o.v->>'key', o.v->'payload' from go, jsonb_array_elements($9) o(v))
    select $6::uuid as id, exists (select from fresh) as went, exists (select from go) as may,
        (select count(*) from link) as links, now() as created_at,
        claim.id as slot_id, claim.node_id as slot_node, claim.minted as slot_minted, claim.observed as slot_observed,
        claim.generation as slot_generation, claim.image_digest as slot_digest, claim.restart as slot_restart,
        volume.id as slot_volume, volume.size_mib as slot_volume_mib
    from (select 1) as one left join claim on true left join volume on true"
);

/// What all deploys of an org take turns for: the count of its workloads and the numbers of its events. Last of all but a
/// node's room, and by itself, so that a hundred deploys at once wait for each other as short as can be.
const COUNT: &str = "with
    counter as (
        update org_counters set workloads = workloads + 1, event_seq = event_seq + $2
        where org_id = $1 and workloads < $3 returning org_id, event_seq - $2 as base),
    event as (
        insert into events (org_id, seq, id, workload_id, instance_id, kind, message, data)
        select $1, counter.base + e.position, (e.v->>'id')::uuid, (e.v->>'workload')::uuid, (e.v->>'instance')::uuid,
            e.v->>'kind', e.v->>'message', e.v->'data'
        from counter, jsonb_array_elements($4) with ordinality e(v, position))
    select org_id from counter";

/// Names and versions of the secrets that a release reads, each once.
fn wanted_secrets(release: &Release) -> (serde_json::Value, usize) {
    let wanted: BTreeMap<(&str, u32), ()> =
        release.config.secrets.iter().map(|one| ((one.secret.as_str(), one.version), ())).collect();
    let list = wanted.keys().map(|(name, version)| serde_json::json!({ "name": name, "version": version })).collect();
    (list, wanted.len())
}

#[derive(Clone, Copy)]
pub struct Workloads<'s> {
    pub(crate) tenant: Tenant<'s>,
}

impl Workloads<'_> {
    fn org(&self) -> OrgId {
        self.tenant.org
    }

    /// The deploy: idempotency key, quota, workload, first release, instance, slot, events, audit entry and wake-ups in
    /// one transaction of four round trips when a warm slot is ready.
    ///
    /// `AlreadyExists(WorkloadName)`, `LimitReached`, `NotFound("secret")` (a version that does not exist), `Replay`.
    pub async fn create(self, new: &NewWorkload, change: &Change) -> Result<Deployed> {
        let release = &new.release.release;
        let warm = new.instance.claim != ClaimPolicy::Never && !matches!(new.instance.volume, VolumeUse::Existing(..));
        let pool = new.instance.pool.as_ref().filter(|_| warm);
        let (secrets, secrets_count) = wanted_secrets(release);
        let key = change.idempotency.as_ref();
        let tier = &new.instance.spec.tier;
        let values = [
            self.org().value(),
            new.instance.id.value(),
            Value::Bytes(pool.map(|pool| Recipe::of(pool).0.to_vec())),
            tier.name.as_str().into(),
            Value::from(i32::try_from(tier.memory_mib).unwrap_or(i32::MAX)),
            new.id.value(),
            new.release.id.value(),
            json(audit_json(change.audit.as_ref())),
            json(wakeups_json(&change.wakeups)),
            new.name.as_str().into(),
            Value::from(release.template.as_ref().map(ToString::to_string)),
            release.image.as_str().into(),
            new.instance.claim.name().into(),
            optional(new.created_by),
            json(codec::write_release(release)),
            json(secrets),
            Value::from(i32::try_from(new.max_workloads).unwrap_or(i32::MAX)),
            Value::from(key.map(|key| key.route.clone())),
            Value::from(key.map(|key| key.key.clone())),
            Value::Bytes(key.map(|key| key.request_hash.to_vec())),
        ];
        let limit = Value::from(i32::try_from(new.max_workloads).unwrap_or(i32::MAX));
        let events = [Value::from(change.events.len() as i64), limit, json(events_json(&change.events))];
        in_transaction!(self.tenant.begin_placing(), |tx| {
            let row = tx.query_one_raw(sql(CREATE, values.clone())).await.or_store()?;
            let row = row.ok_or(StoreError::Retryable)?;
            let row = Row::new(&row, "workloads", "id");
            if !row.get::<bool>("went")? {
                let earlier = match key {
                    Some(key) => idempotency::earlier(&tx, self.org(), key).await?,
                    None => None,
                };
                return Err(earlier.map_or(StoreError::Retryable, |earlier| StoreError::Replay(Box::new(earlier))));
            }
            let full = StoreError::LimitReached(Limit::Workloads { allowed: new.max_workloads });
            if !row.get::<bool>("may")? {
                return Err(full);
            }
            if row.get::<i64>("links")? != secrets_count as i64 {
                return Err(StoreError::NotFound("secret"));
            }
            let created_at = row.millis("created_at")?;
            let [number, limit, events] = events.clone();
            if tx.query_one_raw(sql(COUNT, [self.org().value(), number, limit, events])).await.or_store()?.is_none() {
                return Err(full);
            }
            let placed = match place::read_claim(&row)? {
                Some(placed) => {
                    let told = self.told(&row, new, pool, &placed)?;
                    Placed { told, ..placed }
                }
                None => place::cold_or_queue(&tx, self.org(), new.id, &new.instance).await?,
            };
            Ok(Deployed { workload: new.id, instance: new.instance.id, placed, created_at })
        })
    }

    /// What the claimed slot's node must be told, as [`Slots::desired`](crate::Slots::desired) would read it; secrets are
    /// not here to be told.
    fn told(
        self,
        row: &Row<'_>,
        new: &NewWorkload,
        pool: Option<&SlotSpec>,
        placed: &Placed,
    ) -> Result<Option<Box<SlotDesired>>> {
        let (Some(spec), Some((slot, node))) = (pool, placed.slot) else { return Ok(None) };
        if !new.release.release.config.secrets.is_empty() {
            return Ok(None);
        }
        let volume = match row.id_opt("slot_volume")? {
            Some(id) => Some((id, row.unsigned("slot_volume_mib")?)),
            None => None,
        };
        let claim = Claim {
            org: self.org(),
            workload: new.id,
            workload_name: new.name.clone(),
            instance: new.instance.id,
            release_id: new.release.id,
            release: new.release.release.clone(),
            restart: row.unsigned("slot_restart")?,
            secrets: Vec::new(),
            keys: Vec::new(),
        };
        Ok(Some(Box::new(SlotDesired {
            slot,
            node,
            generation: row.get("slot_generation")?,
            present: true,
            spec: spec.clone(),
            image_digest: row.get("slot_digest")?,
            minted: placed.minted.clone(),
            volume,
            claim: Some(claim),
        })))
    }

    /// Another instance of the current release, for a workload that is to run: a start, an update, a replacement.
    ///
    /// `Conflict` when the workload is not at `generation` any more, or its release is not `release`, or it is not to
    /// run; `InUse` while a single writer's container (or another instance in the queue) is still there.
    pub async fn launch(
        self,
        workload: WorkloadId,
        generation: i64,
        release: ReleaseId,
        new: &NewInstance,
        change: &Change,
    ) -> Result<Deployed> {
        in_transaction!(self.tenant.begin_placing(), |tx| {
            let found = self.lock(&tx, workload).await?;
            if found.generation != generation || found.release != release || found.desired != Desired::Running {
                return Err(StoreError::Conflict { current: found.generation });
            }
            let tier = &new.spec.tier;
            let insert = "insert into instances (org_id, id, workload_id, release_id, placement, tier, memory_mib,
                    observed, queued_at)
                select $1, $2, $3, $4, 'queued', $5, $6, 'absent', now()
                where not exists (
                    select 1 from instances i where i.org_id = $1 and i.workload_id = $3 and i.ended_at is null
                        and ($7 or (i.release_id = $4 and i.leaving_at is null
                                    and not (i.failure is not null and i.observed in ('failed', 'exited')))))
                returning id, created_at";
            let values = [
                self.org().value(),
                new.id.value(),
                workload.value(),
                release.value(),
                tier.name.as_str().into(),
                Value::from(i32::try_from(tier.memory_mib).unwrap_or(i32::MAX)),
                Value::from(new.spec.release.state.is_some()),
            ];
            let row = tx.query_one_raw(sql(insert, values)).await.or_store()?;
            let row = row.ok_or_else(|| StoreError::InUse("another instance of it".to_owned()))?;
            let created_at = Row::new(&row, "instances", "id").millis("created_at")?;
            self.lock_counters(&tx).await?;
            let placed = place::place(&tx, self.org(), workload, release, new).await?;
            self.touched(&tx, workload).await?;
            record(&tx, self.org(), change).await?;
            Ok(Deployed { workload, instance: new.id, placed, created_at })
        })
    }

    /// Tries again to place an instance that waits in the queue; `Conflict` when it does not wait any more.
    pub async fn place_queued(self, instance: &Instance, new: &NewInstance, change: &Change) -> Result<Placed> {
        in_transaction!(self.tenant.begin_placing(), |tx| {
            let lock =
                "select id, slot_id is null and ended_at is null and leaving_at is null as waiting from instances
                where org_id = $1 and id = $2 for update";
            let row = tx.query_one_raw(sql(lock, [self.org().value(), instance.id.value()])).await.or_store()?;
            let row = row.ok_or(StoreError::NotFound("instance"))?;
            if !Row::new(&row, "instances", "id").get::<bool>("waiting")? {
                return Err(StoreError::Conflict { current: 0 });
            }
            self.lock(&tx, instance.workload).await?;
            self.lock_counters(&tx).await?;
            let placed = place::place(&tx, self.org(), instance.workload, instance.release, new).await?;
            if placed.slot.is_some() {
                self.touched(&tx, instance.workload).await?;
                record(&tx, self.org(), change).await?;
            }
            Ok(placed)
        })
    }

    async fn lock(self, tx: &Tx, workload: WorkloadId) -> Result<Workload> {
        let select = concat!(
            "select ",
            workload_sql!(),
            " from workloads w where w.org_id = $1 and w.id = $2 and w.deleted_at is null for no key update"
        );
        let row = tx.query_one_raw(sql(select, [self.org().value(), workload.value()])).await.or_store()?;
        read_workload(&row.ok_or(StoreError::NotFound("workload"))?)
    }

    /// Before a node's room is reserved: the deploy and the reports take them in this order as well.
    async fn lock_counters(self, tx: &Tx) -> Result<()> {
        let lock = "select org_id from org_counters where org_id = $1 for no key update";
        tx.execute_raw(sql(lock, [self.org().value()])).await.or_store().map(drop)
    }

    async fn touched(self, tx: &Tx, workload: WorkloadId) -> Result<()> {
        let update = "update workloads set version = version + 1, updated_at = now() where org_id = $1 and id = $2";
        tx.execute_raw(sql(update, [self.org().value(), workload.value()])).await.or_store().map(drop)
    }

    /// A new current release. `if_version`: refuse with `Conflict` when the workload is at another one. The diff is
    /// stored with it. What runs changes when the workload is next brought nearer to it; returns the new state.
    pub async fn revise(
        self,
        workload: WorkloadId,
        new: &NewRelease,
        tier: &str,
        if_version: Option<i64>,
        created_by: Option<UserId>,
        change: &Change,
    ) -> Result<(Workload, ReleaseRow)> {
        in_transaction!(self.tenant.begin(), |tx| {
            idempotency::claim(&tx, self.org(), change, Some(workload.uuid())).await?;
            let found = self.lock(&tx, workload).await?;
            if if_version.is_some_and(|version| version != found.version) {
                return Err(StoreError::Conflict { current: found.version });
            }
            if found.desired == Desired::Deleted {
                return Err(StoreError::NotFound("workload"));
            }
            let before = self.read_release(&tx, found.release).await?;
            let diff = release::diff(&before.release, &new.release);
            let (secrets, secrets_count) = wanted_secrets(&new.release);
            let insert = "with
                release as (
                    insert into releases (org_id, id, workload_id, number, spec, diff, created_by)
                    select $1, $2, $3, coalesce(max(number), 0) + 1, $4, $5, $6 from releases
                    where org_id = $1 and workload_id = $3
                    returning id, number, spec, diff, created_by, created_at),
                link as (
                    insert into release_secrets (org_id, release_id, secret_id, version)
                    select distinct $1, $2::uuid, s.id, v.version
                    from jsonb_to_recordset($7) as wanted(name text, version int)
                    join secrets s on s.org_id = $1 and s.name = wanted.name
                    join secret_versions v on v.org_id = $1 and v.secret_id = s.id and v.version = wanted.version
                    returning 1)
                select release.*, (select count(*) from link) as links from release";
            let values = [
                self.org().value(),
                new.id.value(),
                workload.value(),
                json(codec::write_release(&new.release)),
                json(codec::write_changes(&diff)),
                optional(created_by),
                json(secrets),
            ];
            let row = tx.query_one_raw(sql(insert, values)).await.or_store()?.ok_or(StoreError::Retryable)?;
            if Row::new(&row, "releases", "id").get::<i64>("links")? != secrets_count as i64 {
                return Err(StoreError::NotFound("secret"));
            }
            let release = read_release(&row)?;
            let update = concat!(
                "update workloads w set release_id = $3, image = $4, tier = $5, generation = generation + 1,
                    version = version + 1, updated_at = now()
                where w.org_id = $1 and w.id = $2 returning ",
                workload_sql!()
            );
            let values =
                [self.org().value(), workload.value(), new.id.value(), new.release.image.as_str().into(), tier.into()];
            let row = tx.query_one_raw(sql(update, values)).await.or_store()?.ok_or(StoreError::Retryable)?;
            record(&tx, self.org(), change).await?;
            Ok((read_workload(&row)?, release))
        })
    }

    /// What the org wants of it. Wanting what is wanted already changes nothing but is recorded; a deleted one stays
    /// deleted (`NotFound`). Returns the state after.
    pub async fn set_desired(
        self,
        workload: WorkloadId,
        desired: Desired,
        if_version: Option<i64>,
        change: &Change,
    ) -> Result<Workload> {
        in_transaction!(self.tenant.begin(), |tx| {
            idempotency::claim(&tx, self.org(), change, Some(workload.uuid())).await?;
            let found = self.lock(&tx, workload).await?;
            if if_version.is_some_and(|version| version != found.version) {
                return Err(StoreError::Conflict { current: found.version });
            }
            if found.desired == Desired::Deleted && desired != Desired::Deleted {
                return Err(StoreError::NotFound("workload"));
            }
            let update = concat!(
                "update workloads w set desired = $3, version = version + 1, updated_at = now(),
                    generation = generation + case when desired = $3 then 0 else 1 end
                where w.org_id = $1 and w.id = $2 returning ",
                workload_sql!()
            );
            let values = [self.org().value(), workload.value(), desired.name().into()];
            let row = tx.query_one_raw(sql(update, values)).await.or_store()?.ok_or(StoreError::Retryable)?;
            record(&tx, self.org(), change).await?;
            read_workload(&row)
        })
    }

    /// Ends an instance's stay: one in the queue has ended at once, one with a slot when its node says so. Saying it
    /// again changes nothing. Returns the slot to tell its node about.
    pub async fn leave(self, instance: InstanceId, change: &Change) -> Result<Option<(SlotId, NodeId)>> {
        in_transaction!(self.tenant.begin(), |tx| {
            let leave = "with
                slot as (
                    update slots set desired = 'absent', generation = generation + 1, leaving_at = now()
                    where org_id = $1 and instance_id = $2 and desired = 'present' and removed_at is null
                    returning id, node_id),
                gone as (
                    update instances set leaving_at = coalesce(leaving_at, now()),
                        ended_at = case when slot_id is null then coalesce(ended_at, now()) else ended_at end,
                        observed_at = case when leaving_at is null
                            and not (failure is not null and observed in ('failed', 'exited'))
                            then now() else observed_at end
                    where org_id = $1 and id = $2 and (select count(*) from slot) >= 0
                    returning id, workload_id, (leaving_at = now()) as first, slot_id is not null as placed),
                workload as (
                    update workloads w set version = version + 1, updated_at = now() from gone
                    where w.org_id = $1 and w.id = gone.workload_id and gone.first)
                select gone.id, gone.first, gone.placed, slot.id as slot_id, slot.node_id from gone left join slot on true";
            let values = || [self.org().value(), instance.value()];
            let row =
                tx.query_one_raw(sql(leave, values())).await.or_store()?.ok_or(StoreError::NotFound("instance"))?;
            let row = Row::new(&row, "instances", "id");
            let told: Option<(SlotId, NodeId)> = row.id_opt("slot_id")?.zip(row.id_opt("node_id")?);
            // It was placed by a transaction that this one waited for: its slot is newer than the statement's snapshot
            // and was not told. The next round sees it.
            let late = "select id from slots
                where org_id = $1 and instance_id = $2 and desired = 'present' and removed_at is null";
            if told.is_none() && row.get("placed")? && tx.query_one_raw(sql(late, values())).await.or_store()?.is_some()
            {
                return Err(StoreError::Retryable);
            }
            if row.get::<bool>("first")? {
                record(&tx, self.org(), change).await?;
            }
            Ok(told)
        })
    }

    /// Declares an instance failed, as when its deadline has passed. One that failed or ended before stays as it was.
    pub async fn fail(self, instance: InstanceId, failure: &Failure, change: &Change) -> Result<bool> {
        in_transaction!(self.tenant.begin(), |tx| {
            let update = "with failed as (
                    update instances set failure = $3, observed = 'failed', observed_at = now()
                    where org_id = $1 and id = $2 and ended_at is null
                        and not (failure is not null and observed in ('failed', 'exited'))
                    returning id, workload_id)
                update workloads w set version = version + 1, updated_at = now() from failed
                where w.org_id = $1 and w.id = failed.workload_id";
            let values = [self.org().value(), instance.value(), json(codec::write_failure(failure))];
            let failed = tx.execute_raw(sql(update, values)).await.or_store()?.rows_affected() == 1;
            if failed {
                record(&tx, self.org(), change).await?;
            }
            Ok(failed)
        })
    }

    /// A person asks for the process to be started anew in its container. `None`: there is no container to do it in;
    /// launch an instance instead.
    pub async fn restart(self, workload: WorkloadId, change: &Change) -> Result<Option<(SlotId, NodeId)>> {
        in_transaction!(self.tenant.begin(), |tx| {
            idempotency::claim(&tx, self.org(), change, Some(workload.uuid())).await?;
            // The slot before its workload, as everywhere.
            let update = "update slots s set restart = restart + 1, generation = generation + 1
                from instances i
                where i.org_id = $1 and i.workload_id = $2 and i.ended_at is null and i.leaving_at is null
                    and not (i.failure is not null and i.observed in ('failed', 'exited'))
                    and s.org_id = $1 and s.instance_id = i.id and s.desired = 'present' and s.removed_at is null
                returning s.id, s.node_id";
            let row = tx.query_one_raw(sql(update, [self.org().value(), workload.value()])).await.or_store()?;
            self.lock(&tx, workload).await?;
            self.touched(&tx, workload).await?;
            record(&tx, self.org(), change).await?;
            match row {
                Some(row) => {
                    let row = Row::new(&row, "slots", "id");
                    Ok(Some((row.id("id")?, row.id("node_id")?)))
                }
                None => Ok(None),
            }
        })
    }

    /// Keeps credentials that were minted for it, sealed; told once, they stay for every container to come.
    pub async fn keep_minted(self, workload: WorkloadId, sealed: &[u8]) -> Result<()> {
        in_transaction!(self.tenant.begin(), |tx| {
            let update = "update workloads set minted = $3 where org_id = $1 and id = $2 and deleted_at is null";
            let values = [self.org().value(), workload.value(), crate::row::bytes(sealed)];
            let done = tx.execute_raw(sql(update, values)).await.or_store()?;
            if done.rows_affected() == 1 { Ok(()) } else { Err(StoreError::NotFound("workload")) }
        })
    }

    /// What [`Workloads::keep_minted`] kept.
    pub async fn minted(self, workload: WorkloadId) -> Result<Option<Vec<u8>>> {
        let tx = self.tenant.begin().await?;
        let select = "select id, minted from workloads where org_id = $1 and id = $2";
        let row = tx.query_one_raw(sql(select, [self.org().value(), workload.value()])).await.or_store()?;
        Row::new(&row.ok_or(StoreError::NotFound("workload"))?, "workloads", "id").get("minted")
    }

    /// The credentials that the container of a workload came with, sealed for its slot: what is to be kept of them while
    /// [`Workloads::minted`] has nothing yet.
    pub async fn minted_of_slot(self, workload: WorkloadId) -> Result<Option<(SlotId, Vec<u8>)>> {
        let tx = self.tenant.begin().await?;
        let select =
            "select s.id, s.minted from instances i join slots s on s.org_id = i.org_id and s.instance_id = i.id
            where i.org_id = $1 and i.workload_id = $2 and s.minted is not null
            order by i.ended_at is null desc, i.id desc limit 1";
        let row = tx.query_one_raw(sql(select, [self.org().value(), workload.value()])).await.or_store()?;
        let Some(row) = row else { return Ok(None) };
        let row = Row::new(&row, "slots", "id");
        Ok(Some((row.id("id")?, row.get("minted")?)))
    }

    /// Ends a workload that is to be deleted and has nothing left outside: its name is free, its volumes go. `false`:
    /// something is left, or it has ended before.
    pub async fn finish(self, workload: WorkloadId, change: &Change) -> Result<bool> {
        in_transaction!(self.tenant.begin(), |tx| {
            let update = "with
                ended as (
                    update workloads w set deleted_at = now(), version = version + 1, updated_at = now()
                    where w.org_id = $1 and w.id = $2 and w.desired = 'deleted' and w.deleted_at is null
                        and not exists (select 1 from instances i where i.org_id = $1 and i.workload_id = $2
                                        and i.ended_at is null)
                    returning id),
                volume as (
                    update volumes set desired = 'absent' from ended
                    where volumes.org_id = $1 and volumes.workload_id = ended.id),
                counter as (
                    update org_counters set workloads = workloads - 1 from ended where org_id = $1)
                select id from ended";
            let row = tx.query_one_raw(sql(update, [self.org().value(), workload.value()])).await.or_store()?;
            if row.is_none() {
                return Ok(false);
            }
            record(&tx, self.org(), change).await?;
            Ok(true)
        })
    }

    /// One workload with its current release and newest instances. By id, a deleted one is found as well.
    ///
    /// One statement: it is read in every deploy, and its round trips are what a deploy is made of.
    pub async fn get(self, workload: &WorkloadRef) -> Result<WorkloadDetail> {
        let recent = Value::from(RECENT);
        let statement = match workload {
            WorkloadRef::Id(id) => sql(GET_BY_ID, [self.org().value(), id.value(), recent]),
            WorkloadRef::Name(name) => sql(GET_BY_NAME, [self.org().value(), name.as_str().into(), recent]),
        };
        let tx = self.tenant.begin().await?;
        let rows = tx.query_all_raw(statement).await.or_store()?;
        read_detail(&rows)?.ok_or(StoreError::NotFound("workload"))
    }

    /// Newest first.
    pub async fn list(self, filter: &WorkloadFilter) -> Result<Vec<WorkloadDetail>> {
        let select = concat!(
            "select ",
            workload_sql!(),
            " from workloads w
            where w.org_id = $1 and w.deleted_at is null and ($2::uuid is null or w.id < $2)
                and ($3::text is null or w.template = $3) and ($4::text is null or w.desired = $4)
            order by w.id desc limit $5"
        );
        let values = [
            self.org().value(),
            optional(filter.before),
            Value::from(filter.template.as_ref().map(ToString::to_string)),
            Value::from(filter.desired.map(Desired::name)),
            Value::from(i64::from(filter.limit.clamp(1, 200))),
        ];
        let tx = self.tenant.begin().await?;
        let rows = tx.query_all_raw(sql(select, values)).await.or_store()?;
        let workloads = rows.iter().map(read_workload).collect::<Result<Vec<_>>>()?;
        self.details(&tx, workloads).await
    }

    async fn details(self, tx: &Tx, workloads: Vec<Workload>) -> Result<Vec<WorkloadDetail>> {
        if workloads.is_empty() {
            return Ok(Vec::new());
        }
        let ids: Vec<WorkloadId> = workloads.iter().map(|workload| workload.id).collect();
        let current: Vec<ReleaseId> = workloads.iter().map(|workload| workload.release).collect();
        let releases = "select id, number, spec, diff, created_by, created_at from releases
            where org_id = $1 and id = any (array(select value::uuid from jsonb_array_elements_text($2)))";
        let rows = tx.query_all_raw(sql(releases, [self.org().value(), id_list(&current)])).await.or_store()?;
        let mut releases: BTreeMap<ReleaseId, ReleaseRow> = BTreeMap::new();
        for row in &rows {
            let release = read_release(row)?;
            releases.insert(release.id, release);
        }
        let instances = concat!(
            // Found first and once: joined in one go, an unanalysed table has each of the org's instances looked for in it.
            "with seen as materialized (
                select one.id
                from (select value::uuid as id from jsonb_array_elements_text($2)) wanted
                cross join lateral (
                    (select l.id from instances l
                        where l.org_id = $1 and l.workload_id = wanted.id order by l.id desc limit $3)
                    union
                    (select l.id from instances l
                        where l.org_id = $1 and l.workload_id = wanted.id and l.ended_at is null)) one)
            select ",
            instance_sql!(),
            ", case when i.placement = 'queued' and i.ended_at is null
                then clawhq_queue_position(i.queued_at, i.id) end as position, v.id as volume_id, v.node_id as volume_node
            from seen
            join instances i on i.org_id = $1 and i.id = seen.id
            join releases r on r.org_id = $1 and r.id = i.release_id
            left join nodes n on n.id = i.node_id
            left join volumes v on v.org_id = $1 and v.workload_id = i.workload_id and v.desired = 'present'
            order by i.id desc"
        );
        let values = [self.org().value(), id_list(&ids), Value::from(RECENT)];
        let rows = tx.query_all_raw(sql(instances, values)).await.or_store()?;
        let mut by_workload: BTreeMap<WorkloadId, Found> = BTreeMap::new();
        for row in &rows {
            let workload = Row::new(row, "instances", "id").id("workload_id")?;
            by_workload.entry(workload).or_default().add(row)?;
        }
        workloads
            .into_iter()
            .map(|workload| {
                let release = releases
                    .get(&workload.release)
                    .cloned()
                    .ok_or_else(|| StoreError::corrupt("workloads", workload.id.uuid(), "release_id"))?;
                let Found { instances, queue, volume } = by_workload.remove(&workload.id).unwrap_or_default();
                Ok(WorkloadDetail { workload, release, instances, queue, volume })
            })
            .collect()
    }

    async fn read_release(self, tx: &Tx, release: ReleaseId) -> Result<ReleaseRow> {
        let select =
            "select id, number, spec, diff, created_by, created_at from releases where org_id = $1 and id = $2";
        let row = tx.query_one_raw(sql(select, [self.org().value(), release.value()])).await.or_store()?;
        read_release(&row.ok_or(StoreError::NotFound("release"))?)
    }

    /// Newest first. `before`: only those with a lower number. `limit` is at most 200.
    pub async fn releases(self, workload: WorkloadId, before: Option<u32>, limit: u32) -> Result<Vec<ReleaseRow>> {
        let tx = self.tenant.begin().await?;
        let select = "select id, number, spec, diff, created_by, created_at from releases
            where org_id = $1 and workload_id = $2 and ($3::int is null or number < $3) order by number desc limit $4";
        let values = [
            self.org().value(),
            workload.value(),
            Value::from(before.map(|before| i32::try_from(before).unwrap_or(i32::MAX))),
            Value::from(i64::from(limit.min(200))),
        ];
        let rows = tx.query_all_raw(sql(select, values)).await.or_store()?;
        rows.iter().map(read_release).collect()
    }

    /// The org's instances, newest first, of one workload or of all. `before`: only older ones. `limit` is at most 200.
    pub async fn instances(
        self,
        workload: Option<WorkloadId>,
        before: Option<InstanceId>,
        limit: u32,
    ) -> Result<Vec<Instance>> {
        let tx = self.tenant.begin().await?;
        let select = concat!(
            "select ",
            instance_sql!(),
            " from instances i
            join releases r on r.org_id = i.org_id and r.id = i.release_id
            left join nodes n on n.id = i.node_id
            where i.org_id = $1 and ($2::uuid is null or i.workload_id = $2) and ($3::uuid is null or i.id < $3)
            order by i.id desc limit $4"
        );
        let values = [self.org().value(), optional(workload), optional(before), Value::from(i64::from(limit.min(200)))];
        let rows = tx.query_all_raw(sql(select, values)).await.or_store()?;
        rows.iter().map(crate::instances::read).collect()
    }

    pub async fn instance(self, instance: InstanceId) -> Result<Instance> {
        let tx = self.tenant.begin().await?;
        let select = concat!(
            "select ",
            instance_sql!(),
            " from instances i
            join releases r on r.org_id = i.org_id and r.id = i.release_id
            left join nodes n on n.id = i.node_id
            where i.org_id = $1 and i.id = $2"
        );
        let row = tx.query_one_raw(sql(select, [self.org().value(), instance.value()])).await.or_store()?;
        crate::instances::read(&row.ok_or(StoreError::NotFound("instance"))?)
    }
}

#[derive(Clone, Copy)]
pub struct SystemWorkloads<'s> {
    pub(crate) store: &'s Store,
}

impl SystemWorkloads<'_> {
    /// The scope of the org that owns a workload, by a read of the row.
    pub async fn scope(self, workload: WorkloadId) -> Result<Option<TenantScope>> {
        let select = "select id, org_id from workloads where id = $1";
        let db = &self.store.system;
        let row = reading!(self.store.pool, db.query_one_raw(sql(select, [workload.value()])))?;
        row.map(|row| Row::new(&row, "workloads", "id").id::<OrgId>("org_id").map(TenantScope::new)).transpose()
    }

    /// How a workload is, for who waits for it or brings it nearer to what is wanted: [`Workloads::get`] without a
    /// transaction of the tenant's, which is a round trip of each deploy. Its org's alone all the same.
    pub async fn of(self, scope: &TenantScope, workload: WorkloadId) -> Result<WorkloadDetail> {
        let values = || [scope.org().value(), workload.value(), Value::from(RECENT)];
        let db = &self.store.system;
        let rows = reading!(self.store.pool, db.query_all_raw(sql(OF, values())))?;
        read_detail(&rows)?.ok_or(StoreError::NotFound("workload"))
    }

    /// Where a host name leads when nothing about its workload is out of the ordinary: wanted, its one container of the
    /// current release running on a node that is heard. `None`: ask [`SystemWorkloads::by_host`], which knows why.
    pub async fn straight(self, slug: &str, name: &str) -> Result<Option<StraightRoute>> {
        let db = &self.store.system;
        let row = reading!(self.store.pool, db.query_one_raw(sql(STRAIGHT, [slug.into(), name.into()])))?;
        let Some(row) = row else { return Ok(None) };
        let row = Row::new(&row, "workloads", "id");
        Ok(Some(StraightRoute {
            workload: row.id("id")?,
            instance: row.id("instance_id")?,
            slot: row.id("slot_id")?,
            node: row.id("node_id")?,
            ingress: row.get("ingress")?,
            release: row.decode("spec", codec::read_release)?,
        }))
    }

    /// The workload that a host name means, `<name>-<slug>` parsed by the caller, and the ingress of each node that it
    /// has or had an instance on: all that the edge needs, in one statement.
    pub async fn by_host(self, slug: &str, name: &str) -> Result<Option<(WorkloadDetail, BTreeMap<NodeId, String>)>> {
        let values = || [slug.into(), name.into(), Value::from(RECENT)];
        let db = &self.store.system;
        let rows = reading!(self.store.pool, db.query_all_raw(sql(BY_HOST, values())))?;
        let Some(detail) = read_detail(&rows)? else { return Ok(None) };
        let mut ingress = BTreeMap::new();
        for row in &rows {
            let row = Row::new(row, "instances", "id");
            ingress.extend(row.id_opt::<NodeId>("node_id")?.zip(row.get::<Option<String>>("ingress")?));
        }
        Ok(Some((detail, ingress)))
    }

    /// Workloads whose rows say that something is left to do: for the sweep that finds what a lost wake-up missed.
    /// After `after`, in the order of ids, at most `limit`.
    pub async fn unsettled(self, after: Option<WorkloadId>, limit: u32) -> Result<Vec<Unsettled>> {
        let select = "select w.id, w.org_id from workloads w
            where w.deleted_at is null and ($1::uuid is null or w.id > $1) and (
                w.desired = 'deleted'
                or exists (select 1 from instances i where i.org_id = w.org_id and i.workload_id = w.id
                    and i.ended_at is null and (w.desired <> 'running' or i.observed <> 'running'
                        or i.release_id <> w.release_id or i.leaving_at is not null))
                or w.desired = 'running' and not exists (select 1 from instances i where i.org_id = w.org_id
                    and i.workload_id = w.id and i.ended_at is null and i.release_id = w.release_id))
            order by w.id limit $2";
        let values = || [optional(after), Value::from(i64::from(limit))];
        let db = &self.store.system;
        let rows = reading!(self.store.pool, db.query_all_raw(sql(select, values())))?;
        rows.iter().map(read_unsettled).collect()
    }
}

fn read_unsettled(row: &QueryResult) -> Result<Unsettled> {
    let row = Row::new(row, "workloads", "id");
    let org = OrgId::from_uuid(row.get::<Uuid>("org_id")?);
    Ok(Unsettled { scope: TenantScope::new(org), workload: row.id("id")? })
}
