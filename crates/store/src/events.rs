//! The activity feed and the audit log, and how a change writes both.

use clawhq_domain::Millis;
use clawhq_domain::ids::{ApiKeyId, EventId, InstanceId, OrgId, RequestId, UserId, WorkloadId};
use sea_orm::{ColumnTrait, ConnectionTrait, EntityTrait, QueryFilter, QueryOrder, QuerySelect, Value};
use serde_json::json;

use crate::Tenant;
use crate::change::{Actor, Change, NewAudit, NewEvent, Wakeup};
use crate::entity::{audit, event};
use crate::error::{OrStore, Result, StoreError};
use crate::row::{Id, millis};
use crate::tx::sql;

#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    pub id: EventId,
    /// Grows within the org in the order of commits: whoever read up to `n` and asks for "after n" misses nothing.
    pub seq: i64,
    pub workload: Option<WorkloadId>,
    pub instance: Option<InstanceId>,
    pub kind: String,
    pub message: String,
    pub data: serde_json::Value,
    pub at: Millis,
}

impl From<event::Model> for Event {
    fn from(model: event::Model) -> Self {
        Self {
            id: EventId::from_uuid(model.id),
            seq: model.seq,
            workload: model.workload_id.map(WorkloadId::from_uuid),
            instance: model.instance_id.map(InstanceId::from_uuid),
            kind: model.kind,
            message: model.message,
            data: model.data,
            at: millis(model.at),
        }
    }
}

#[derive(Clone, Debug, PartialEq)]
pub struct AuditEntry {
    pub id: i64,
    pub at: Millis,
    /// `Actor::System` with a part that is not known any more is shown as `system`.
    pub actor: Actor,
    pub action: String,
    pub object: String,
    pub ip: Option<String>,
    pub request: Option<RequestId>,
    pub detail: serde_json::Value,
}

/// Cuts at a character's boundary, for columns with a bound that words of others fill.
pub(crate) fn cut(text: &str, most: usize) -> &str {
    match text.char_indices().nth(most) {
        Some((end, _)) => &text[..end],
        None => text,
    }
}

pub(crate) fn events_json(events: &[NewEvent]) -> serde_json::Value {
    let event = |event: &NewEvent| {
        json!({
            "id": event.id.uuid(),
            "workload": event.workload.map(Id::uuid),
            "instance": event.instance.map(Id::uuid),
            "kind": event.kind,
            "message": cut(&event.message, 1000),
            "data": event.data,
        })
    };
    events.iter().map(event).collect()
}

pub(crate) fn audit_json(audit: Option<&NewAudit>) -> serde_json::Value {
    let Some(audit) = audit else { return json!([]) };
    let (kind, id, part) = match audit.actor {
        Actor::User(user) => ("user", Some(user.uuid()), None),
        Actor::ApiKey(key) => ("api_key", Some(key.uuid()), None),
        Actor::System(part) => ("system", None, Some(part)),
    };
    json!([{
        "kind": kind,
        "actor": id,
        "part": part,
        "action": audit.action,
        "object": cut(&audit.object, 200),
        "ip": audit.ip.map(|ip| ip.to_string()),
        "request": audit.request.map(Id::uuid),
        "detail": audit.detail,
    }])
}

pub(crate) fn wakeups_json(wakeups: &[Wakeup]) -> serde_json::Value {
    wakeups
        .iter()
        .map(|wakeup| json!({ "topic": wakeup.topic, "key": wakeup.key, "payload": wakeup.payload }))
        .collect()
}

/// Writes a change's events, audit entry and wake-ups; to be called last, for it locks the org's counters.
pub(crate) async fn record(db: &impl ConnectionTrait, org: OrgId, change: &Change) -> Result<()> {
    if change.events.is_empty() && change.audit.is_none() && change.wakeups.is_empty() {
        return Ok(());
    }
    let insert = "with
        counter as (
            update org_counters set event_seq = event_seq + $2 where org_id = $1 and $2 > 0
            returning event_seq - $2 as base),
        e as (
            insert into events (org_id, seq, id, workload_id, instance_id, kind, message, data)
            select $1, counter.base + e.position, (e.v->>'id')::uuid, (e.v->>'workload')::uuid, (e.v->>'instance')::uuid,
                e.v->>'kind', e.v->>'message', e.v->'data'
            from counter, jsonb_array_elements($3) with ordinality e(v, position)),
        a as (
            insert into audit (org_id, actor_kind, actor_id, actor_part, action, object, ip, request_id, detail)
            select $1, a.v->>'kind', (a.v->>'actor')::uuid, a.v->>'part', a.v->>'action', a.v->>'object', a.v->>'ip',
                (a.v->>'request')::uuid, a.v->'detail'
            from jsonb_array_elements($4) a(v)),
        o as (
            insert into outbox (topic, key, payload)
            select o.v->>'topic', o.v->>'key', o.v->'payload' from jsonb_array_elements($5) o(v))
        select 1";
    let values = [
        org.value(),
        Value::from(change.events.len() as i64),
        crate::row::json(events_json(&change.events)),
        crate::row::json(audit_json(change.audit.as_ref())),
        crate::row::json(wakeups_json(&change.wakeups)),
    ];
    db.execute_raw(sql(insert, values)).await.or_store().map(drop)
}

#[derive(Clone, Copy)]
pub struct Events<'s> {
    pub(crate) tenant: Tenant<'s>,
}

impl Events<'_> {
    /// Newest first. `before`: only those with a lower `seq`. `limit` is at most 500.
    pub async fn list(self, workload: Option<WorkloadId>, before: Option<i64>, limit: u32) -> Result<Vec<Event>> {
        let tx = self.tenant.begin().await?;
        let mut find = event::Entity::find().filter(event::Column::OrgId.eq(self.tenant.org.uuid()));
        if let Some(workload) = workload {
            find = find.filter(event::Column::WorkloadId.eq(workload.uuid()));
        }
        if let Some(before) = before {
            find = find.filter(event::Column::Seq.lt(before));
        }
        let models =
            find.order_by_desc(event::Column::Seq).limit(u64::from(limit.min(500))).all(&tx).await.or_store()?;
        Ok(models.into_iter().map(Event::from).collect())
    }

    /// Oldest first, those with a higher `seq` than `after`. `limit` is at most 500.
    pub async fn after(self, workload: Option<WorkloadId>, after: i64, limit: u32) -> Result<Vec<Event>> {
        let tx = self.tenant.begin().await?;
        let mut find = event::Entity::find()
            .filter(event::Column::OrgId.eq(self.tenant.org.uuid()))
            .filter(event::Column::Seq.gt(after));
        if let Some(workload) = workload {
            find = find.filter(event::Column::WorkloadId.eq(workload.uuid()));
        }
        let models =
            find.order_by_asc(event::Column::Seq).limit(u64::from(limit.min(500))).all(&tx).await.or_store()?;
        Ok(models.into_iter().map(Event::from).collect())
    }

    /// The newest `seq`, 0 when there is none: where a stream without a resume point begins.
    pub async fn newest(self) -> Result<i64> {
        let tx = self.tenant.begin().await?;
        let select = "select org_id, event_seq from org_counters where org_id = $1";
        let row = tx.query_one_raw(sql(select, [self.tenant.org.value()])).await.or_store()?;
        let row = row.ok_or(StoreError::NotFound("org"))?;
        crate::row::Row::new(&row, "org_counters", "org_id").get("event_seq")
    }

    /// Appends events (and whatever else the change carries) by themselves.
    pub async fn append(self, change: &Change) -> Result<()> {
        crate::tx::in_transaction!(self.tenant.begin(), |tx| { record(&tx, self.tenant.org, change).await })
    }
}

#[derive(Clone, Copy)]
pub struct AuditLog<'s> {
    pub(crate) tenant: Tenant<'s>,
}

impl AuditLog<'_> {
    /// Newest first. `before`: only those with a lower id. `limit` is at most 500.
    pub async fn list(self, before: Option<i64>, limit: u32) -> Result<Vec<AuditEntry>> {
        let tx = self.tenant.begin().await?;
        let mut find = audit::Entity::find().filter(audit::Column::OrgId.eq(self.tenant.org.uuid()));
        if let Some(before) = before {
            find = find.filter(audit::Column::Id.lt(before));
        }
        let models =
            find.order_by_desc(audit::Column::Id).limit(u64::from(limit.min(500))).all(&tx).await.or_store()?;
        let entry = |model: audit::Model| {
            let actor = match (model.actor_kind.as_str(), model.actor_id) {
                ("user", Some(id)) => Actor::User(UserId::from_uuid(id)),
                ("api_key", Some(id)) => Actor::ApiKey(ApiKeyId::from_uuid(id)),
                ("system", None) => Actor::System(part(model.actor_part.as_deref())),
                _ => return Err(StoreError::corrupt("audit", model.id, "actor_kind")),
            };
            Ok(AuditEntry {
                id: model.id,
                at: millis(model.at),
                actor,
                action: model.action,
                object: model.object,
                ip: model.ip,
                request: model.request_id.map(RequestId::from_uuid),
                detail: model.detail,
            })
        };
        models.into_iter().map(entry).collect()
    }
}

fn part(name: Option<&str>) -> &'static str {
    const PARTS: [&str; 6] = ["api", "worker", "pool-manager", "node", "operator", "edge"];
    name.and_then(|name| PARTS.into_iter().find(|part| *part == name)).unwrap_or("system")
}
