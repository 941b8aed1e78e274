//! Hosts: enrolment, streams, heartbeats, and the room on them.

use clawhq_domain::Millis;
use clawhq_domain::ids::NodeId;
use clawhq_domain::placement::NodeView;
use clawhq_domain::workload::NodeHealth;
use sea_orm::{ConnectionTrait, Value};

use crate::Store;
use crate::accounts::TokenHash;
use crate::error::{OrStore, Result, StoreError};
use crate::row::{Id, Row, bytes, json};
use crate::tx::{in_transaction, reading, sql};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NodeState {
    /// Has a join token and no certificate.
    Joining,
    Active,
    /// Takes nothing new; what runs stays.
    Cordoned,
    /// May not speak any more.
    Disabled,
}

impl NodeState {
    pub const ALL: [Self; 4] = [Self::Joining, Self::Active, Self::Cordoned, Self::Disabled];

    pub fn name(self) -> &'static str {
        match self {
            Self::Joining => "joining",
            Self::Active => "active",
            Self::Cordoned => "cordoned",
            Self::Disabled => "disabled",
        }
    }

    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|state| state.name() == text)
    }
}

#[derive(Clone, Debug, PartialEq)]
pub struct Node {
    pub id: NodeId,
    pub name: String,
    pub state: NodeState,
    pub health: NodeHealth,
    pub ready: bool,
    pub capacity_mib: u32,
    pub reserved_mib: u32,
    pub slots_max: u32,
    pub slots_used: u32,
    pub disk_free_mib: u64,
    pub stream_epoch: i64,
    pub last_seen_at: Option<Millis>,
    /// As reported: versions, ingress address and so on.
    pub facts: serde_json::Value,
    pub created_at: Millis,
}

pub struct NewNode {
    pub id: NodeId,
    pub name: String,
    pub join_token: TokenHash,
    pub join_lifetime_ms: Millis,
}

/// What a node says of itself.
#[derive(Clone, Debug, PartialEq)]
pub struct NodeFacts {
    /// What may be reserved on it, in MiB: its memory less what the host needs. Never lowered below what is reserved.
    pub capacity_mib: u32,
    pub slots_max: u32,
    pub disk_free_mib: u64,
    /// Firewall loaded and verified, runtime answers.
    pub ready: bool,
    /// An object, kept as it is.
    pub facts: serde_json::Value,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heartbeat {
    pub disk_free_mib: u64,
    pub ready: bool,
    /// How long from now the node counts as live.
    pub lease_ms: Millis,
}

const SELECT: &str = "select id, name, state, ready, capacity_mib, reserved_mib, slots_max, slots_used, disk_free_mib,
    stream_epoch, last_seen_at, facts, created_at, coalesce(lease_until > now(), false) as live from nodes
    where ($1::uuid is null or id = $1) and ($2::bytea is null or fingerprint = $2 or next_fingerprint = $2) order by id";

fn read(row: &sea_orm::QueryResult) -> Result<Node> {
    let row = Row::new(row, "nodes", "id");
    Ok(Node {
        id: row.id("id")?,
        name: row.get("name")?,
        state: row.parse("state", NodeState::parse)?,
        health: if row.get("live")? { NodeHealth::Live } else { NodeHealth::Silent },
        ready: row.get("ready")?,
        capacity_mib: row.unsigned("capacity_mib")?,
        reserved_mib: row.unsigned("reserved_mib")?,
        slots_max: row.unsigned("slots_max")?,
        slots_used: row.unsigned("slots_used")?,
        disk_free_mib: u64::try_from(row.get::<i64>("disk_free_mib")?).map_err(|_| row.corrupt("disk_free_mib"))?,
        stream_epoch: row.get("stream_epoch")?,
        last_seen_at: row.millis_opt("last_seen_at")?,
        facts: row.get("facts")?,
        created_at: row.millis("created_at")?,
    })
}

/// All nodes that may hold containers, as the placement of a container of `tier` sees them.
pub(crate) async fn views(db: &impl ConnectionTrait, tier: &str) -> Result<Vec<NodeView>> {
    let select =
        "select n.id, n.state, n.ready, n.capacity_mib, n.reserved_mib, n.slots_max, n.slots_used, n.disk_free_mib,
            coalesce(n.lease_until > now(), false) as live, clawhq_slots_of_tier(n.id, $1) as of_tier
        from nodes n where n.state in ('active', 'cordoned') order by n.id";
    let rows = db.query_all_raw(sql(select, [tier.into()])).await.or_store()?;
    rows.iter()
        .map(|row| {
            let row = Row::new(row, "nodes", "id");
            Ok(NodeView {
                id: row.id("id")?,
                health: if row.get("live")? { NodeHealth::Live } else { NodeHealth::Silent },
                cordoned: row.parse("state", NodeState::parse)? != NodeState::Active,
                ready: row.get("ready")?,
                capacity_mib: row.unsigned("capacity_mib")?,
                reserved_mib: row.unsigned("reserved_mib")?,
                slots: row.unsigned("slots_used")?,
                slots_max: row.unsigned("slots_max")?,
                of_tier: row.unsigned("of_tier")?,
                disk_free_mib: u64::try_from(row.get::<i64>("disk_free_mib")?)
                    .map_err(|_| row.corrupt("disk_free_mib"))?,
            })
        })
        .collect()
}

#[derive(Clone, Copy)]
pub struct Nodes<'s> {
    pub(crate) store: &'s Store,
}

impl Nodes<'_> {
    /// A node that may join once with this token, within its lifetime.
    pub async fn create(self, new: &NewNode) -> Result<()> {
        let insert = "insert into nodes (id, name, join_token_hash, join_expires_at)
            values ($1, $2, $3, now() + $4 * interval '1 millisecond')";
        let values = [
            new.id.value(),
            new.name.as_str().into(),
            bytes(&new.join_token.0),
            Value::from(new.join_lifetime_ms as f64),
        ];
        self.store.system.execute_raw(sql(insert, values)).await.or_store().map(drop)
    }

    /// A fresh join token for a node that exists: after a lost ledger or a missed renewal. Its old certificate stays
    /// valid until it joins with the new one.
    pub async fn renew_join_token(self, node: NodeId, token: &TokenHash, lifetime_ms: Millis) -> Result<()> {
        let update = "update nodes set join_token_hash = $2, join_expires_at = now() + $3 * interval '1 millisecond'
            where id = $1 and state <> 'disabled'";
        let values = [node.value(), bytes(&token.0), Value::from(lifetime_ms as f64)];
        let done = self.store.system.execute_raw(sql(update, values)).await.or_store()?;
        if done.rows_affected() == 1 { Ok(()) } else { Err(StoreError::NotFound("node")) }
    }

    /// Who may join with this token; to be told before a certificate is made for them. Changes nothing.
    pub async fn joining(self, token: &TokenHash) -> Result<Option<NodeId>> {
        let select =
            "select id from nodes where join_token_hash = $1 and join_expires_at > now() and state <> 'disabled'";
        let db = &self.store.system;
        let row = reading!(self.store.pool, db.query_one_raw(sql(select, [bytes(&token.0)])))?;
        row.map(|row| Row::new(&row, "nodes", "id").id("id")).transpose()
    }

    /// Burns the token and makes the node active with this certificate. `None`: the token is unknown, used or over; of
    /// two that use it at once, one gets `None`.
    pub async fn enrol(
        self,
        token: &TokenHash,
        fingerprint: &[u8; 32],
        certificate_lifetime_ms: Millis,
        facts: &NodeFacts,
    ) -> Result<Option<NodeId>> {
        let update = "update nodes set join_token_hash = null, join_expires_at = null, fingerprint = $2,
                next_fingerprint = null, certificate_expires_at = now() + $3 * interval '1 millisecond',
                state = case state when 'joining' then 'active' else state end,
                capacity_mib = greatest($4, reserved_mib), slots_max = greatest($5, slots_used), disk_free_mib = $6,
                ready = $7, facts = $8
            where join_token_hash = $1 and join_expires_at > now() and state <> 'disabled' returning id";
        let values = [
            bytes(&token.0),
            bytes(fingerprint),
            Value::from(certificate_lifetime_ms as f64),
            Value::from(facts.capacity_mib as i32),
            Value::from(facts.slots_max as i32),
            Value::from(facts.disk_free_mib as i64),
            Value::from(facts.ready),
            json(facts.facts.clone()),
        ];
        in_transaction!(self.store.begin(), |tx| {
            let row = tx.query_one_raw(sql(update, values.clone())).await.or_store()?;
            row.map(|row| Row::new(&row, "nodes", "id").id("id")).transpose()
        })
    }

    /// The node whose certificate has this SHA-256; `None` for unknown, disabled and outlived ones. A certificate that
    /// was issued by [`Nodes::renew_certificate`] replaces the one before it when it is first seen here.
    pub async fn by_certificate(self, fingerprint: &[u8; 32]) -> Result<Option<Node>> {
        in_transaction!(self.store.begin(), |tx| {
            let promote = "update nodes set fingerprint = next_fingerprint, next_fingerprint = null
                where next_fingerprint = $1 and state <> 'disabled'";
            let row = tx.query_one_raw(sql(SELECT, [Value::Uuid(None), bytes(fingerprint)])).await.or_store()?;
            let Some(node) = row.as_ref().map(read).transpose()? else { return Ok(None) };
            if node.state == NodeState::Disabled {
                return Ok(None);
            }
            tx.execute_raw(sql(promote, [bytes(fingerprint)])).await.or_store()?;
            Ok(Some(node))
        })
    }

    /// Notes the certificate that a node was given in place of its own; both are valid until the new one is used.
    pub async fn renew_certificate(self, node: NodeId, next: &[u8; 32], lifetime_ms: Millis) -> Result<()> {
        let update = "update nodes set next_fingerprint = $2,
                certificate_expires_at = now() + $3 * interval '1 millisecond'
            where id = $1 and state <> 'disabled'";
        let values = [node.value(), bytes(next), Value::from(lifetime_ms as f64)];
        let done = self.store.system.execute_raw(sql(update, values)).await.or_store()?;
        if done.rows_affected() == 1 { Ok(()) } else { Err(StoreError::NotFound("node")) }
    }

    /// A stream begins: its epoch, higher than any before it. Calls with an older epoch are refused from now on.
    pub async fn open_stream(self, node: NodeId, facts: &NodeFacts, lease_ms: Millis) -> Result<i64> {
        let update = "update nodes set stream_epoch = stream_epoch + 1, capacity_mib = greatest($2, reserved_mib),
                slots_max = greatest($3, slots_used), disk_free_mib = $4, ready = $5, facts = $6, last_seen_at = now(),
                heard_since = case when lease_until > now() then heard_since else now() end,
                lease_until = now() + $7 * interval '1 millisecond'
            where id = $1 and state in ('active', 'cordoned') returning id, stream_epoch";
        let values = [
            node.value(),
            Value::from(facts.capacity_mib as i32),
            Value::from(facts.slots_max as i32),
            Value::from(facts.disk_free_mib as i64),
            Value::from(facts.ready),
            json(facts.facts.clone()),
            Value::from(lease_ms as f64),
        ];
        in_transaction!(self.store.begin(), |tx| {
            let row = tx.query_one_raw(sql(update, values.clone())).await.or_store()?;
            let row = row.ok_or(StoreError::NotFound("node"))?;
            Row::new(&row, "nodes", "id").get("stream_epoch")
        })
    }

    /// `false`: a newer stream of this node exists, or it is disabled; the caller's stream is to end.
    pub async fn heartbeat(self, node: NodeId, epoch: i64, heartbeat: Heartbeat) -> Result<bool> {
        let update = "update nodes set disk_free_mib = $3, ready = $4, last_seen_at = now(),
                heard_since = case when lease_until > now() then heard_since else now() end,
                lease_until = now() + $5 * interval '1 millisecond'
            where id = $1 and stream_epoch = $2 and state in ('active', 'cordoned')";
        let values = [
            node.value(),
            Value::from(epoch),
            Value::from(heartbeat.disk_free_mib as i64),
            Value::from(heartbeat.ready),
            Value::from(heartbeat.lease_ms as f64),
        ];
        // The next one says it again. Not among the reports: those wait for their orgs' locks, a node's life must not.
        let begin = "BEGIN; SET LOCAL synchronous_commit = off";
        in_transaction!(crate::tx::Tx::begin(&self.store.pool, begin), |tx| {
            let done = tx.execute_raw(sql(update, values.clone())).await.or_store()?;
            Ok(done.rows_affected() == 1)
        })
    }

    /// By id; at most all of them, for there are hundreds, not thousands.
    pub async fn list(self) -> Result<Vec<Node>> {
        let db = &self.store.system;
        let all = || sql(SELECT, [Value::Uuid(None), Value::Bytes(None)]);
        let rows = reading!(self.store.pool, db.query_all_raw(all()))?;
        rows.iter().map(read).collect()
    }

    pub async fn get(self, node: NodeId) -> Result<Option<Node>> {
        let db = &self.store.system;
        let one = || sql(SELECT, [node.value(), Value::Bytes(None)]);
        let row = reading!(self.store.pool, db.query_one_raw(one()))?;
        row.as_ref().map(read).transpose()
    }

    /// By the name its creator gave it.
    pub async fn by_name(self, name: &str) -> Result<Option<Node>> {
        Ok(self.list().await?.into_iter().find(|node| node.name == name))
    }

    /// Cordon, uncordon or disable.
    pub async fn set_state(self, node: NodeId, state: NodeState) -> Result<()> {
        let update = "update nodes set state = $2 where id = $1 and state <> 'joining'";
        let done = self.store.system.execute_raw(sql(update, [node.value(), state.name().into()])).await.or_store()?;
        if done.rows_affected() == 1 { Ok(()) } else { Err(StoreError::NotFound("node")) }
    }

    /// As `domain::placement` sees them, for a container of this tier.
    pub async fn views(self, tier: &str) -> Result<Vec<NodeView>> {
        views(&self.store.system, tier).await
    }

    /// Nodes whose counters disagree with their slots: none, ever; a sweep that finds one has found a bug.
    pub async fn reservation_drift(self) -> Result<Vec<NodeId>> {
        let select = "select n.id from nodes n
            left join (select node_id, sum(memory_mib) as memory, count(*) as slots from slots
                       where removed_at is null group by node_id) s on s.node_id = n.id
            where n.reserved_mib <> coalesce(s.memory, 0) or n.slots_used <> coalesce(s.slots, 0) order by n.id";
        let rows = self.store.system.query_all_raw(sql(select, [])).await.or_store()?;
        rows.iter().map(|row| Row::new(row, "nodes", "id").id("id")).collect()
    }
}
