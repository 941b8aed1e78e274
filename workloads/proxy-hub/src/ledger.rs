//! The durable record of what was moved: by account and hour, and by peer and day.
//!
//! The ledger keeps, beside the windows, how far each account's counter has been folded in. Both change in one
//! transaction, so a fold that is repeated, or cut off anywhere by a crash, neither loses nor doubles a byte.

use crate::tally::{Tally, Totals};
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use serde::Serialize;
use sqlx::Row;
use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

const FOLDED: TableDefinition<&str, (u64, u64, u64)> = TableDefinition::new("folded");
const USAGE: TableDefinition<(&str, i64), (u64, u64, u64)> = TableDefinition::new("usage");
const PEERS: TableDefinition<(&str, i64), u64> = TableDefinition::new("peer_usage");
const CUSTOMERS: TableDefinition<&str, &str> = TableDefinition::new("customers");

const HOUR: i64 = 3600;
const DAY: i64 = 86_400;

#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    #[error("ledger: {0}")]
    Embedded(String),
    #[error("ledger in PostgreSQL: {0}")]
    Postgres(#[from] sqlx::Error),
}

macro_rules! embedded {
    ($($kind:ty),*) => { $(impl From<$kind> for LedgerError { fn from(e: $kind) -> Self { Self::Embedded(e.to_string()) } })* };
}
embedded!(
    redb::Error,
    redb::DatabaseError,
    redb::TransactionError,
    redb::TableError,
    redb::StorageError,
    redb::CommitError
);

/// What one account moved within one hour.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, utoipa::ToSchema)]
pub struct Window {
    pub account: String,
    /// Start of the hour, seconds since 1970.
    pub hour: i64,
    #[serde(flatten)]
    pub totals: Totals,
}

/// Where the ledger is kept.
pub enum Ledger {
    Embedded(Database),
    /// `hub` tells this hub's counters from other hubs' in the same database.
    Postgres {
        pool: sqlx::PgPool,
        hub: String,
    },
}

impl Ledger {
    pub fn embedded(path: &Path) -> Result<Self, LedgerError> {
        // The default cache of redb is a gigabyte; a ledger reads the same few pages.
        let db = Database::builder().set_cache_size(4 << 20).create(path)?;
        let tx = db.begin_write()?;
        tx.open_table(FOLDED)?;
        tx.open_table(USAGE)?;
        tx.open_table(PEERS)?;
        tx.open_table(CUSTOMERS)?;
        tx.commit()?;
        Ok(Self::Embedded(db))
    }

    pub async fn postgres(url: &str, hub: &str) -> Result<Self, LedgerError> {
        let pool = sqlx::postgres::PgPoolOptions::new()
            .max_connections(4)
            .acquire_timeout(std::time::Duration::from_secs(5))
            .connect(url)
            .await?;
        // Hubs start together: only one may make the tables.
        let mut tx = pool.begin().await?;
        sqlx::query("SELECT pg_advisory_xact_lock(7270194001)").execute(&mut *tx).await?;
        for statement in [
            "CREATE TABLE IF NOT EXISTS hub_folded (hub text, account text, up bigint NOT NULL, down bigint NOT NULL, requests bigint NOT NULL, PRIMARY KEY (hub, account))",
            "CREATE TABLE IF NOT EXISTS hub_usage (account text, hour bigint, hub text, up bigint NOT NULL, down bigint NOT NULL, requests bigint NOT NULL, PRIMARY KEY (account, hour, hub))",
            "CREATE TABLE IF NOT EXISTS hub_peer_usage (device text, day bigint, bytes bigint NOT NULL, PRIMARY KEY (device, day))",
            "CREATE TABLE IF NOT EXISTS hub_customers (name text PRIMARY KEY, body text NOT NULL)",
        ] {
            sqlx::query(statement).execute(&mut *tx).await?;
        }
        tx.commit().await?;
        Ok(Self::Postgres { pool, hub: hub.to_owned() })
    }

    /// How far each account's counter was folded in.
    pub async fn folded(&self) -> Result<HashMap<String, Totals>, LedgerError> {
        match self {
            Self::Embedded(db) => {
                let tx = db.begin_read()?;
                let table = tx.open_table(FOLDED)?;
                let mut out = HashMap::new();
                for row in table.iter()? {
                    let (name, value) = row?;
                    out.insert(name.value().to_owned(), totals(value.value()));
                }
                Ok(out)
            }
            Self::Postgres { pool, hub } => {
                let rows = sqlx::query("SELECT account, up, down, requests FROM hub_folded WHERE hub = $1")
                    .bind(hub)
                    .fetch_all(pool)
                    .await?;
                rows.iter().map(|row| Ok((row.try_get(0)?, row_totals(row, 1)?))).collect()
            }
        }
    }

    /// Folds counters in, as of `now` (seconds since 1970), and adds to peers' days. Only what changed is written.
    pub async fn fold(
        &self,
        counters: &[(String, Totals)],
        peers: &HashMap<String, u64>,
        now: i64,
    ) -> Result<(), LedgerError> {
        let (hour, day) = (now.div_euclid(HOUR) * HOUR, now.div_euclid(DAY) * DAY);
        match self {
            Self::Embedded(db) => {
                let tx = db.begin_write()?;
                {
                    let mut folded = tx.open_table(FOLDED)?;
                    let mut usage = tx.open_table(USAGE)?;
                    for (name, now) in counters {
                        let before = folded.get(name.as_str())?.map(|v| totals(v.value())).unwrap_or_default();
                        let delta = now.minus(before);
                        if delta == Totals::default() {
                            continue;
                        }
                        let window = usage.get((name.as_str(), hour))?.map(|v| totals(v.value())).unwrap_or_default();
                        usage.insert((name.as_str(), hour), triple(window.plus(delta)))?;
                        folded.insert(name.as_str(), triple(before.plus(delta)))?;
                    }
                    let mut table = tx.open_table(PEERS)?;
                    for (device, bytes) in peers {
                        let before = table.get((device.as_str(), day))?.map_or(0, |v| v.value());
                        table.insert((device.as_str(), day), before + bytes)?;
                    }
                }
                tx.commit()?;
            }
            Self::Postgres { pool, hub } => {
                let mut tx = pool.begin().await?;
                for (name, now) in counters {
                    let row = sqlx::query(
                        "SELECT up, down, requests FROM hub_folded WHERE hub = $1 AND account = $2 FOR UPDATE",
                    )
                    .bind(hub)
                    .bind(name)
                    .fetch_optional(&mut *tx)
                    .await?;
                    let before = row.as_ref().map(|row| row_totals(row, 0)).transpose()?.unwrap_or_default();
                    let delta = now.minus(before);
                    if delta == Totals::default() {
                        continue;
                    }
                    let after = before.plus(delta);
                    sqlx::query("INSERT INTO hub_folded VALUES ($1, $2, $3, $4, $5) ON CONFLICT (hub, account) DO UPDATE SET up = $3, down = $4, requests = $5")
                        .bind(hub).bind(name).bind(after.up as i64).bind(after.down as i64).bind(after.requests as i64)
                        .execute(&mut *tx).await?;
                    sqlx::query("INSERT INTO hub_usage VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT (account, hour, hub) DO UPDATE SET up = hub_usage.up + $4, down = hub_usage.down + $5, requests = hub_usage.requests + $6")
                        .bind(name).bind(hour).bind(hub).bind(delta.up as i64).bind(delta.down as i64).bind(delta.requests as i64)
                        .execute(&mut *tx).await?;
                }
                for (device, bytes) in peers {
                    sqlx::query("INSERT INTO hub_peer_usage VALUES ($1, $2, $3) ON CONFLICT (device, day) DO UPDATE SET bytes = hub_peer_usage.bytes + $3")
                        .bind(device).bind(day).bind(*bytes as i64).execute(&mut *tx).await?;
                }
                tx.commit().await?;
            }
        }
        Ok(())
    }

    /// Hours of one account (of all hubs) from `from` up to, not including, `to`.
    pub async fn usage(&self, account: &str, from: i64, to: i64) -> Result<Vec<Window>, LedgerError> {
        match self {
            Self::Embedded(db) => {
                let tx = db.begin_read()?;
                let table = tx.open_table(USAGE)?;
                let mut out = Vec::new();
                for row in table.range((account, from)..(account, to.max(from)))? {
                    let (key, value) = row?;
                    out.push(Window {
                        account: account.to_owned(),
                        hour: key.value().1,
                        totals: totals(value.value()),
                    });
                }
                Ok(out)
            }
            Self::Postgres { pool, .. } => {
                let rows = sqlx::query("SELECT hour, SUM(up)::bigint, SUM(down)::bigint, SUM(requests)::bigint FROM hub_usage WHERE account = $1 AND hour >= $2 AND hour < $3 GROUP BY hour ORDER BY hour")
                    .bind(account).bind(from).bind(to).fetch_all(pool).await?;
                rows.iter()
                    .map(|row| {
                        Ok(Window { account: account.to_owned(), hour: row.try_get(0)?, totals: row_totals(row, 1)? })
                    })
                    .collect()
            }
        }
    }

    /// Bytes of one peer by day (start of the day, seconds since 1970).
    pub async fn peer_usage(&self, device: &str) -> Result<Vec<(i64, u64)>, LedgerError> {
        match self {
            Self::Embedded(db) => {
                let tx = db.begin_read()?;
                let table = tx.open_table(PEERS)?;
                let rows = table.range((device, i64::MIN)..=(device, i64::MAX))?;
                rows.map(|row| row.map(|(key, value)| (key.value().1, value.value())).map_err(Into::into)).collect()
            }
            Self::Postgres { pool, .. } => {
                let rows = sqlx::query("SELECT day, bytes FROM hub_peer_usage WHERE device = $1 ORDER BY day")
                    .bind(device)
                    .fetch_all(pool)
                    .await?;
                rows.iter().map(|row| Ok((row.try_get(0)?, row.try_get::<i64, _>(1)? as u64))).collect()
            }
        }
    }

    /// Bytes of all peers on the day of `now`.
    pub async fn peers_of_day(&self, now: i64) -> Result<Vec<(String, u64)>, LedgerError> {
        let day = now.div_euclid(DAY) * DAY;
        match self {
            Self::Embedded(db) => {
                let tx = db.begin_read()?;
                let table = tx.open_table(PEERS)?;
                let mut out = Vec::new();
                for row in table.iter()? {
                    let (key, value) = row?;
                    if key.value().1 == day {
                        out.push((key.value().0.to_owned(), value.value()));
                    }
                }
                Ok(out)
            }
            Self::Postgres { pool, .. } => {
                let rows = sqlx::query("SELECT device, bytes FROM hub_peer_usage WHERE day = $1")
                    .bind(day)
                    .fetch_all(pool)
                    .await?;
                rows.iter().map(|row| Ok((row.try_get(0)?, row.try_get::<i64, _>(1)? as u64))).collect()
            }
        }
    }

    /// Customers made over the API, as JSON by name.
    pub async fn customers(&self) -> Result<Vec<(String, String)>, LedgerError> {
        match self {
            Self::Embedded(db) => {
                let tx = db.begin_read()?;
                let table = tx.open_table(CUSTOMERS)?;
                let rows = table.iter()?;
                rows.map(|row| row.map(|(k, v)| (k.value().to_owned(), v.value().to_owned())).map_err(Into::into))
                    .collect()
            }
            Self::Postgres { pool, .. } => {
                let rows = sqlx::query("SELECT name, body FROM hub_customers").fetch_all(pool).await?;
                rows.iter().map(|row| Ok((row.try_get(0)?, row.try_get(1)?))).collect()
            }
        }
    }

    /// Stores a customer, or with `None` removes it.
    pub async fn put_customer(&self, name: &str, body: Option<&str>) -> Result<(), LedgerError> {
        match self {
            Self::Embedded(db) => {
                let tx = db.begin_write()?;
                {
                    let mut table = tx.open_table(CUSTOMERS)?;
                    match body {
                        Some(body) => table.insert(name, body)?,
                        None => table.remove(name)?,
                    };
                }
                tx.commit()?;
            }
            Self::Postgres { pool, .. } => {
                match body {
                    Some(body) => sqlx::query(
                        "INSERT INTO hub_customers VALUES ($1, $2) ON CONFLICT (name) DO UPDATE SET body = $2",
                    )
                    .bind(name)
                    .bind(body),
                    None => sqlx::query("DELETE FROM hub_customers WHERE name = $1").bind(name),
                }
                .execute(pool)
                .await?;
            }
        }
        Ok(())
    }

    /// Connections of the database pool now in use, for the metric of that name.
    pub fn postgres_connections(&self) -> u32 {
        match self {
            Self::Embedded(_) => 0,
            Self::Postgres { pool, .. } => pool.size() - pool.num_idle() as u32,
        }
    }

    /// Brings counters and ledger together after a start: counters that were lost are lifted, and what was counted and
    /// not folded is folded now.
    pub async fn recover(&self, tally: &Arc<Tally>, now: i64) -> Result<(), LedgerError> {
        for (name, totals) in self.folded().await? {
            let counter = tally.counter(&name).map_err(|e| LedgerError::Embedded(e.to_string()))?;
            counter.raise(totals);
        }
        self.fold(&tally.all(), &HashMap::new(), now).await
    }
}

fn totals((up, down, requests): (u64, u64, u64)) -> Totals {
    Totals { up, down, requests }
}

fn triple(t: Totals) -> (u64, u64, u64) {
    (t.up, t.down, t.requests)
}

fn row_totals(row: &sqlx::postgres::PgRow, at: usize) -> Result<Totals, sqlx::Error> {
    let get = |i: usize| row.try_get::<i64, _>(at + i).map(|v| v as u64);
    Ok(Totals { up: get(0)?, down: get(1)?, requests: get(2)? })
}

/// Start of the month that holds `now`, both in seconds since 1970 (UTC).
pub fn month_start(now: i64) -> i64 {
    let days = now.div_euclid(DAY);
    // Days to civil date, counted from 1 March of the year 0 so that leap days come last.
    let z = days + 719_468;
    let era = z.div_euclid(146_097);
    let of_era = z.rem_euclid(146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * of_year + 2) / 153;
    let day_of_month = of_year - (153 * month + 2) / 5;
    let _ = era;
    (days - day_of_month) * DAY
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tally::Way;
    use proptest::prelude::*;

    async fn sum(ledger: &Ledger, account: &str) -> Totals {
        let windows = ledger.usage(account, 0, i64::MAX).await.expect("usage");
        windows.iter().fold(Totals::default(), |sum, w| sum.plus(w.totals))
    }

    #[test]
    fn months_start_on_the_first() {
        for (now, start) in [
            (1_795_219_200, 1_793_491_200), // 2026-11-21 -> 2026-11-01
            (1_709_164_800, 1_706_745_600), // 2024-02-29 -> 2024-02-01
            (1_709_251_200, 1_709_251_200), // 2024-03-01 -> itself
            (1_704_067_199, 1_701_388_800), // last second of 2023 -> 2023-12-01
            (0, 0),
        ] {
            assert_eq!(month_start(now), start, "{now}");
        }
    }

    #[tokio::test]
    async fn a_fold_is_idempotent_and_survives_the_loss_of_the_counters() {
        let dir = tempfile::tempdir().expect("dir");
        let ledger = Ledger::embedded(&dir.path().join("ledger")).expect("open");
        let tally = Tally::open(&dir.path().join("tally")).expect("open");
        let alice = tally.counter("alice").expect("counter");
        alice.count(Way::Up, 100);
        alice.count(Way::Down, 1000);
        for _ in 0..3 {
            ledger.fold(&tally.all(), &HashMap::new(), 7200).await.expect("fold");
        }
        alice.count(Way::Down, 5);
        ledger.fold(&tally.all(), &HashMap::from([("dev".to_owned(), 9)]), 10_900).await.expect("fold");
        let windows = ledger.usage("alice", 0, 100_000).await.expect("usage");
        assert_eq!(
            windows.iter().map(|w| (w.hour, w.totals.up, w.totals.down)).collect::<Vec<_>>(),
            [(7200, 100, 1000), (10_800, 0, 5)]
        );
        assert_eq!(ledger.peer_usage("dev").await.expect("usage"), [(0, 9)]);
        assert_eq!(ledger.peers_of_day(86_399).await.expect("day"), [("dev".to_owned(), 9)]);
        assert_eq!(ledger.peers_of_day(86_400).await.expect("day"), []);
        // A new, empty tally file beside the old ledger.
        let fresh = Tally::open(&dir.path().join("tally2")).expect("open");
        ledger.recover(&fresh, 10_900).await.expect("recover");
        fresh.counter("alice").expect("counter").count(Way::Up, 1);
        ledger.fold(&fresh.all(), &HashMap::new(), 10_900).await.expect("fold");
        assert_eq!(sum(&ledger, "alice").await, Totals { up: 101, down: 1005, requests: 0 });
    }

    #[test]
    fn customers_are_kept() {
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("runtime");
        runtime.block_on(async {
            let dir = tempfile::tempdir().expect("dir");
            let ledger = Ledger::embedded(&dir.path().join("ledger")).expect("open");
            ledger.put_customer("a", Some("{}")).await.expect("put");
            ledger.put_customer("b", Some("{1}")).await.expect("put");
            ledger.put_customer("a", None).await.expect("delete");
            assert_eq!(ledger.customers().await.expect("list"), [("b".to_owned(), "{1}".to_owned())]);
        });
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        /// Whatever is counted between folds, with restarts anywhere, the ledger ends with the sum.
        #[test]
        fn any_history_adds_up(steps in proptest::collection::vec((0usize..3, 0u64..1000, any::<bool>(), any::<bool>()), 1..30)) {
            let runtime = tokio::runtime::Builder::new_current_thread().build().expect("runtime");
            runtime.block_on(async {
                let dir = tempfile::tempdir().expect("dir");
                let ledger = Ledger::embedded(&dir.path().join("ledger")).expect("open");
                let mut tally = Tally::open(&dir.path().join("tally")).expect("open");
                let mut want = [0u64; 3];
                for (i, (who, bytes, fold, restart)) in steps.into_iter().enumerate() {
                    tally.counter(&format!("c{who}")).expect("counter").count(Way::Down, bytes);
                    want[who] += bytes;
                    if fold {
                        ledger.fold(&tally.all(), &HashMap::new(), i as i64 * 1800).await.expect("fold");
                    }
                    if restart {
                        drop(tally);
                        tally = Tally::open(&dir.path().join("tally")).expect("open");
                        ledger.recover(&tally, i as i64 * 1800).await.expect("recover");
                    }
                }
                ledger.fold(&tally.all(), &HashMap::new(), 0).await.expect("fold");
                for (who, bytes) in want.iter().enumerate() {
                    assert_eq!(sum(&ledger, &format!("c{who}")).await.down, *bytes);
                }
            });
        }
    }
}
