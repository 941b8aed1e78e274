//! Wake-ups that survive: the outbox that a change commits, and the queue of leased, fenced jobs it is relayed to.
//!
//! A job may run twice (its worker lost the lease), never finish twice: finishing, failing and renewing are conditional
//! on the lease's token. What a job is about is read again by its handler.

use clawhq_domain::Millis;
use clawhq_domain::ids::JobId;
use sea_orm::{ConnectionTrait, Value};
use sha2::Digest as _;
use uuid::Uuid;

use crate::change::Wakeup;
use crate::error::{OrStore, Result};
use crate::events::cut;
use crate::row::{Id, Row, json};
use crate::tx::{in_transaction, sql};
use crate::{Store, idempotency};

/// Attempts of a relayed wake-up before it is dead. A sweep wakes up what matters again.
const ATTEMPTS: i32 = 12;

pub struct NewJob {
    pub id: JobId,
    pub queue: String,
    /// Waiting jobs of one queue and key are one job.
    pub key: String,
    pub payload: serde_json::Value,
    /// From now.
    pub delay_ms: Millis,
    pub max_attempts: u32,
}

/// A job that this worker may run until the lease ends.
#[derive(Clone, Debug)]
pub struct LeasedJob {
    pub id: JobId,
    pub queue: String,
    pub key: String,
    pub payload: serde_json::Value,
    /// From 1.
    pub attempt: u32,
    pub max_attempts: u32,
    token: Uuid,
}

/// What became of a job that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failed {
    /// It runs again after the delay.
    Again,
    /// That was its last attempt.
    Dead,
    /// The lease was lost before: somebody else has it.
    Lost,
}

/// What a sweep did, in rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Swept {
    /// Leases that ran out with attempts left: pending again.
    pub returned: u64,
    /// Leases that ran out on the last attempt.
    pub died: u64,
    /// Old rows of finished jobs, relayed wake-ups and idempotency keys, deleted.
    pub deleted: u64,
}

/// One queue's numbers, for metrics.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobStats {
    pub queue: String,
    pub pending: u64,
    pub running: u64,
    pub dead: u64,
    /// How long the oldest due job has waited.
    pub oldest_due_ms: Millis,
}

#[derive(Clone, Copy)]
pub struct Jobs<'s> {
    pub(crate) store: &'s Store,
}

impl Jobs<'_> {
    /// `false`: a job with this id exists, or one of this key waits already; it then runs at the earlier of the two times.
    pub async fn enqueue(self, job: &NewJob) -> Result<bool> {
        let insert = "with sooner as (
                update jobs set run_at = now() + $5 * interval '1 millisecond'
                where queue = $2 and key = $3 and state = 'pending' and attempts = 0
                    and run_at > now() + $5 * interval '1 millisecond')
            insert into jobs (id, queue, key, payload, run_at, max_attempts)
            values ($1, $2, $3, $4, now() + $5 * interval '1 millisecond', $6) on conflict do nothing";
        let values = [
            job.id.value(),
            job.queue.as_str().into(),
            job.key.as_str().into(),
            json(job.payload.clone()),
            Value::from(job.delay_ms as f64),
            Value::from(job.max_attempts as i32),
        ];
        let done = self.store.system.execute_raw(sql(insert, values)).await.or_store()?;
        Ok(done.rows_affected() == 1)
    }

    /// Leases up to `limit` due jobs of a queue, the longest due first, each to one worker alone.
    pub async fn claim(self, queue: &str, limit: u32, lease_ms: Millis) -> Result<Vec<LeasedJob>> {
        let update = "with due as materialized (
                select id from jobs where queue = $1 and state = 'pending' and run_at <= now()
                order by run_at, id limit $2 for update skip locked)
            update jobs set state = 'running', attempts = attempts + 1, lease_token = gen_random_uuid(),
                lease_until = now() + $3 * interval '1 millisecond'
            from due where jobs.id = due.id
            returning jobs.id, jobs.queue, jobs.key, jobs.payload, jobs.attempts, jobs.max_attempts, jobs.lease_token,
                jobs.run_at";
        let values = [queue.into(), Value::from(i64::from(limit)), Value::from(lease_ms as f64)];
        in_transaction!(self.store.begin(), |tx| {
            let rows = tx.query_all_raw(sql(update, values.clone())).await.or_store()?;
            let mut jobs = rows
                .iter()
                .map(|row| {
                    let row = Row::new(row, "jobs", "id");
                    let job = LeasedJob {
                        id: row.id("id")?,
                        queue: row.get("queue")?,
                        key: row.get("key")?,
                        payload: row.get("payload")?,
                        attempt: row.unsigned("attempts")?,
                        max_attempts: row.unsigned("max_attempts")?,
                        token: row.get("lease_token")?,
                    };
                    Ok((row.millis("run_at")?, job))
                })
                .collect::<Result<Vec<_>>>()?;
            jobs.sort_by_key(|(due, job)| (*due, job.id));
            Ok(jobs.into_iter().map(|(_, job)| job).collect())
        })
    }

    /// Extends the lease from now; `false` when it was lost: stop working on it.
    pub async fn renew(self, job: &LeasedJob, lease_ms: Millis) -> Result<bool> {
        let update = "update jobs set lease_until = now() + $3 * interval '1 millisecond'
            where id = $1 and state = 'running' and lease_token = $2";
        let values = [job.id.value(), job.token.into(), Value::from(lease_ms as f64)];
        let done = self.store.system.execute_raw(sql(update, values)).await.or_store()?;
        Ok(done.rows_affected() == 1)
    }

    /// `false` when the lease was lost: what was done may be done again by another.
    pub async fn finish(self, job: &LeasedJob) -> Result<bool> {
        let update = "update jobs set state = 'done', finished_at = now(), lease_token = null, lease_until = null
            where id = $1 and state = 'running' and lease_token = $2";
        let done = self.store.system.execute_raw(sql(update, [job.id.value(), job.token.into()])).await.or_store()?;
        Ok(done.rows_affected() == 1)
    }

    /// Runs again after `delay_ms`, or is dead after its last attempt. `permanent`: dead at once.
    pub async fn fail(self, job: &LeasedJob, error: &str, delay_ms: Millis, permanent: bool) -> Result<Failed> {
        let update = "update jobs set last_error = $3, lease_token = null, lease_until = null,
                state = case when $5 or attempts >= max_attempts then 'dead' else 'pending' end,
                finished_at = case when $5 or attempts >= max_attempts then now() end,
                run_at = now() + $4 * interval '1 millisecond'
            where id = $1 and state = 'running' and lease_token = $2 returning id, state";
        let values = [
            job.id.value(),
            job.token.into(),
            cut(error, 2000).into(),
            Value::from(delay_ms as f64),
            Value::from(permanent),
        ];
        in_transaction!(self.store.begin(), |tx| {
            let Some(row) = tx.query_one_raw(sql(update, values.clone())).await.or_store()? else {
                return Ok(Failed::Lost);
            };
            let state: String = Row::new(&row, "jobs", "id").get("state")?;
            Ok(if state == "dead" { Failed::Dead } else { Failed::Again })
        })
    }

    /// Gives back a job that was not begun, such as at a drain: its attempt does not count.
    pub async fn release(self, job: &LeasedJob) -> Result<bool> {
        // Never to zero attempts: a job of the same key may be waiting by now, and only untried ones are unique.
        let update = "update jobs set state = 'pending', lease_token = null, lease_until = null, run_at = now(),
                max_attempts = max_attempts + 1
            where id = $1 and state = 'running' and lease_token = $2";
        let done = self.store.system.execute_raw(sql(update, [job.id.value(), job.token.into()])).await.or_store()?;
        Ok(done.rows_affected() == 1)
    }

    /// Takes back what crashed workers held, and deletes finished rows older than `keep_ms`.
    pub async fn sweep(self, keep_ms: Millis) -> Result<Swept> {
        let db = &self.store.system;
        let keep = || Value::from(keep_ms as f64);
        let expired = "with expired as materialized (
                select id from jobs where state = 'running' and lease_until < now() limit 1000 for update skip locked)
            update jobs set lease_token = null, lease_until = null,
                last_error = coalesce(last_error, 'the worker stopped without a word'),
                state = case when attempts >= max_attempts then 'dead' else 'pending' end,
                finished_at = case when attempts >= max_attempts then now() end,
                run_at = case when attempts >= max_attempts then run_at
                         else now() + least(power(2, attempts), 300) * interval '1 second' end
            from expired where jobs.id = expired.id returning jobs.id, jobs.state";
        let rows = db.query_all_raw(sql(expired, [])).await.or_store()?;
        let mut swept = Swept::default();
        for row in &rows {
            match Row::new(row, "jobs", "id").get::<String>("state")?.as_str() {
                "dead" => swept.died += 1,
                _ => swept.returned += 1,
            }
        }
        let finished = "delete from jobs where id in (select id from jobs
            where state in ('done', 'dead') and finished_at < now() - $1 * interval '1 millisecond' limit 5000)";
        let relayed = "delete from outbox where id in (select id from outbox
            where relayed_at < now() - $1 * interval '1 millisecond' limit 5000)";
        swept.deleted += db.execute_raw(sql(finished, [keep()])).await.or_store()?.rows_affected();
        swept.deleted += db.execute_raw(sql(relayed, [keep()])).await.or_store()?.rows_affected();
        swept.deleted += idempotency::sweep(db, keep_ms.max(24 * 3_600_000)).await?;
        Ok(swept)
    }

    /// When the next pending job of a queue is due, in milliseconds from now (0: one is due); `None`: none waits.
    pub async fn next_due_ms(self, queue: &str) -> Result<Option<Millis>> {
        let select = "select gen_random_uuid() as id,
                (extract(epoch from min(run_at) - now()) * 1000)::bigint as due
            from jobs where queue = $1 and state = 'pending'";
        let row = self.store.system.query_one_raw(sql(select, [queue.into()])).await.or_store()?;
        let Some(row) = row else { return Ok(None) };
        let due: Option<i64> = Row::new(&row, "jobs", "id").get("due")?;
        Ok(due.map(|due| due.max(0)))
    }

    pub async fn stats(self) -> Result<Vec<JobStats>> {
        let select = "select gen_random_uuid() as id, queue, count(*) filter (where state = 'pending') as pending,
                count(*) filter (where state = 'running') as running, count(*) filter (where state = 'dead') as dead,
                coalesce(greatest((extract(epoch from now() - min(run_at) filter (where state = 'pending')) * 1000)::bigint,
                    0), 0) as oldest
            from jobs where state <> 'done' group by queue order by queue";
        let rows = self.store.system.query_all_raw(sql(select, [])).await.or_store()?;
        rows.iter()
            .map(|row| {
                let row = Row::new(row, "jobs", "id");
                Ok(JobStats {
                    queue: row.get("queue")?,
                    pending: row.get::<i64>("pending")?.unsigned_abs(),
                    running: row.get::<i64>("running")?.unsigned_abs(),
                    dead: row.get::<i64>("dead")?.unsigned_abs(),
                    oldest_due_ms: row.get("oldest")?,
                })
            })
            .collect()
    }
}

#[derive(Clone, Copy)]
pub struct Outbox<'s> {
    pub(crate) store: &'s Store,
}

/// The id of the job that an outbox row becomes: the same however often it is relayed.
fn job_id(topic: &str, key: &str, row: i64) -> Uuid {
    let digest = sha2::Sha256::digest(format!("{topic}\0{key}\0{row}").as_bytes());
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&digest[..16]);
    uuid::Builder::from_custom_bytes(bytes).into_uuid()
}

impl Outbox<'_> {
    /// A wake-up of no change's: a timer's or a sweep's.
    pub async fn append(self, wakeups: &[Wakeup]) -> Result<()> {
        let insert = "insert into outbox (topic, key, payload)
            select o.v->>'topic', o.v->>'key', o.v->'payload' from jsonb_array_elements($1) o(v)";
        let values = [json(crate::events::wakeups_json(wakeups))];
        self.store.system.execute_raw(sql(insert, values)).await.or_store().map(drop)
    }

    /// Turns up to `limit` wake-ups into jobs, oldest first; returns how many were taken. Relays may run side by side,
    /// and a relay that dies in between repeats itself without effect: the job's id is made of the row's.
    pub async fn relay(self, limit: u32) -> Result<u32> {
        in_transaction!(self.store.begin(), |tx| {
            let select =
                "select gen_random_uuid() as row_id, id, topic, key, payload from outbox where relayed_at is null
                order by id limit $1 for update skip locked";
            let rows = tx.query_all_raw(sql(select, [Value::from(i64::from(limit))])).await.or_store()?;
            if rows.is_empty() {
                return Ok(0);
            }
            let mut jobs = Vec::with_capacity(rows.len());
            let mut taken = Vec::with_capacity(rows.len());
            for row in &rows {
                let row = Row::new(row, "outbox", "row_id");
                let (id, topic, key): (i64, String, String) = (row.get("id")?, row.get("topic")?, row.get("key")?);
                let job = job_id(&topic, &key, id);
                let payload: serde_json::Value = row.get("payload")?;
                jobs.push(serde_json::json!({ "id": job, "queue": topic, "key": key, "payload": payload }));
                taken.push(id);
            }
            let insert = "with done as (
                    update outbox set relayed_at = now() where id in (select value::bigint from jsonb_array_elements($2)))
                insert into jobs (id, queue, key, payload, max_attempts)
                select (j.v->>'id')::uuid, j.v->>'queue', j.v->>'key', j.v->'payload', $3
                from jsonb_array_elements($1) j(v) on conflict do nothing";
            let values = [json(jobs.into()), json(serde_json::json!(taken)), Value::from(ATTEMPTS)];
            tx.execute_raw(sql(insert, values)).await.or_store()?;
            Ok(taken.len() as u32)
        })
    }

    /// Wake-ups that wait to be relayed.
    pub async fn waiting(self) -> Result<u64> {
        let select = "select gen_random_uuid() as id, count(*) as waiting from outbox where relayed_at is null";
        let row = self.store.system.query_one_raw(sql(select, [])).await.or_store()?;
        match row {
            Some(row) => Ok(Row::new(&row, "outbox", "id").get::<i64>("waiting")?.unsigned_abs()),
            None => Ok(0),
        }
    }
}
