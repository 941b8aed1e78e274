//! `Idempotency-Key`: the key's row is committed with the effect of the request, the answer is stored after it.
//!
//! Two requests with one key at the same moment: the second waits on the first one's row until its transaction ends,
//! then finds the effect or, if that was rolled back, makes it itself.

use clawhq_domain::Millis;
use clawhq_domain::ids::OrgId;
use sea_orm::{ConnectionTrait, Value};
use uuid::Uuid;

use crate::Tenant;
use crate::change::{Change, IdempotencyKey};
use crate::error::{Earlier, OrStore, Result, StoreError, StoredResponse};
use crate::row::{Id, Row, bytes, json};
use crate::tx::{in_transaction, sql};

/// Takes the key within the transaction of its effect, or says what came of it earlier.
pub(crate) async fn claim(db: &impl ConnectionTrait, org: OrgId, change: &Change, effect: Option<Uuid>) -> Result<()> {
    let Some(key) = &change.idempotency else { return Ok(()) };
    let insert = "insert into idempotency (org_id, route, key, request_hash, effect) values ($1, $2, $3, $4, $5)
        on conflict do nothing";
    let values = [
        org.value(),
        key.route.as_str().into(),
        key.key.as_str().into(),
        bytes(&key.request_hash),
        Value::Uuid(effect),
    ];
    if db.execute_raw(sql(insert, values)).await.or_store()?.rows_affected() == 1 {
        return Ok(());
    }
    match earlier(db, org, key).await? {
        Some(earlier) => Err(StoreError::Replay(Box::new(earlier))),
        // Swept between the two statements: the next round inserts it.
        None => Err(StoreError::Retryable),
    }
}

pub(crate) async fn earlier(db: &impl ConnectionTrait, org: OrgId, key: &IdempotencyKey) -> Result<Option<Earlier>> {
    let select = "select org_id, request_hash, effect, status, headers, body, created_at from idempotency
        where org_id = $1 and route = $2 and key = $3";
    let values = [org.value(), key.route.as_str().into(), key.key.as_str().into()];
    let Some(row) = db.query_one_raw(sql(select, values)).await.or_store()? else { return Ok(None) };
    let row = Row::new(&row, "idempotency", "org_id");
    if row.get::<Vec<u8>>("request_hash")? != key.request_hash {
        return Ok(Some(Earlier::Mismatch));
    }
    let Some(status) = row.get::<Option<i32>>("status")? else {
        let effect = row.get::<Option<Uuid>>("effect")?.map(|effect| effect.as_u128());
        return Ok(Some(Earlier::Unanswered { effect, since: row.millis("created_at")? }));
    };
    Ok(Some(Earlier::Response(StoredResponse {
        status: u16::try_from(status).map_err(|_| row.corrupt("status"))?,
        headers: row.decode("headers", |value| serde_json::from_value(value).ok())?,
        body: row.get("body")?,
    })))
}

#[derive(Clone, Copy)]
pub struct Idempotency<'s> {
    pub(crate) tenant: Tenant<'s>,
}

impl Idempotency<'_> {
    /// What is known of a key, without taking it. Asked first when answering needs work before the transaction.
    pub async fn look_up(self, key: &IdempotencyKey) -> Result<Option<Earlier>> {
        let tx = self.tenant.begin().await?;
        earlier(&tx, self.tenant.org, key).await
    }

    /// Stores the answer to a request whose effect is committed; the first answer stays. A key that was never taken
    /// (the request was refused) gets none.
    pub async fn answer(self, key: &IdempotencyKey, response: &StoredResponse) -> Result<()> {
        in_transaction!(self.tenant.begin(), |tx| {
            let update = "update idempotency set status = $4, headers = $5, body = $6, answered_at = now()
                where org_id = $1 and route = $2 and key = $3 and status is null";
            let values = [
                self.tenant.org.value(),
                key.route.as_str().into(),
                key.key.as_str().into(),
                Value::from(i32::from(response.status)),
                json(serde_json::json!(response.headers)),
                bytes(&response.body),
            ];
            tx.execute_raw(sql(update, values)).await.or_store().map(drop)
        })
    }
}

/// Forgets keys older than `age_ms`, some thousands in one call; returns how many.
pub(crate) async fn sweep(db: &impl ConnectionTrait, age_ms: Millis) -> Result<u64> {
    let delete = "delete from idempotency where (org_id, route, key) in (
        select org_id, route, key from idempotency where created_at < now() - $1 * interval '1 millisecond' limit 5000)";
    Ok(db.execute_raw(sql(delete, [Value::from(age_ms as f64)])).await.or_store()?.rows_affected())
}
