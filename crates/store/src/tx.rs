//! Transactions: how one begins in a single round trip, how it is run again, and how statements are made.

use std::time::Duration;

use sea_orm::{ConnectionTrait, DbBackend, DbErr, ExecResult, QueryResult, RuntimeErr, Statement, Value};
use sea_query_sqlx::SqlxValues;
use sqlx::pool::PoolConnection;
use sqlx::{AssertSqlSafe, Connection as _, PgPool, Postgres};
use tokio::sync::Mutex;

use crate::error::{Fault, Result, StoreError, fault};

/// An open transaction that sea-orm's queries run on. Dropped without [`Tx::commit`], it is rolled back.
///
/// Why not sea-orm's own: that one cannot begin with our statements, and a round trip is what a deploy is made of.
pub(crate) struct Tx {
    inner: Mutex<sqlx::Transaction<'static, Postgres>>,
}

/// How often a transaction that lost against others is run in all.
const ROUNDS: u32 = 6;

impl Tx {
    /// `begin` is the whole of what is sent first: `BEGIN`, perhaps with `SET LOCAL`s behind it.
    pub(crate) async fn begin(pool: &PgPool, begin: &str) -> Result<Self> {
        let mut broken = 0;
        loop {
            match pool.begin_with(AssertSqlSafe(begin.to_owned())).await {
                Ok(inner) => return Ok(Self { inner: Mutex::new(inner) }),
                // After the database was restarted every pooled connection is dead and finds out once. Nothing was
                // sent that could have had an effect, so the next one is tried.
                Err(error @ (sqlx::Error::Io(_) | sqlx::Error::Protocol(_) | sqlx::Error::Database(_)))
                    if broken <= pool.options().get_max_connections() && is_broken(&error) =>
                {
                    broken += 1;
                }
                Err(error) => return Err(StoreError::from_db(query_error(error))),
            }
        }
    }

    pub(crate) async fn commit(self) -> Result<()> {
        self.inner.into_inner().commit().await.map_err(|error| StoreError::from_db(query_error(error)))
    }
}

fn query_error(error: sqlx::Error) -> DbErr {
    DbErr::Query(RuntimeErr::SqlxError(error.into()))
}

fn is_broken(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Database(database) => {
            matches!(database.code().as_deref(), Some("57P01" | "57P02"))
        }
        sqlx::Error::Io(io) => !matches!(
            io.kind(),
            // Nobody listens: trying again at once gains nothing.
            std::io::ErrorKind::ConnectionRefused | std::io::ErrorKind::NotFound
        ),
        _ => true,
    }
}

fn query(statement: &Statement) -> sqlx::query::Query<'_, Postgres, SqlxValues> {
    let values = statement.values.clone().unwrap_or(sea_orm::sea_query::Values(Vec::new()));
    sqlx::query_with(AssertSqlSafe(statement.sql.as_str()), SqlxValues(values))
}

#[async_trait::async_trait]
impl ConnectionTrait for Tx {
    fn get_database_backend(&self) -> DbBackend {
        DbBackend::Postgres
    }

    async fn execute_raw(&self, statement: Statement) -> Result<ExecResult, DbErr> {
        let mut inner = self.inner.lock().await;
        query(&statement).execute(&mut **inner).await.map(Into::into).map_err(query_error)
    }

    async fn execute_unprepared(&self, sql: &str) -> Result<ExecResult, DbErr> {
        let mut inner = self.inner.lock().await;
        sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut **inner).await.map(Into::into).map_err(query_error)
    }

    async fn query_one_raw(&self, statement: Statement) -> Result<Option<QueryResult>, DbErr> {
        let mut inner = self.inner.lock().await;
        let row = query(&statement).fetch_optional(&mut **inner).await.map_err(query_error)?;
        Ok(row.map(Into::into))
    }

    async fn query_all_raw(&self, statement: Statement) -> Result<Vec<QueryResult>, DbErr> {
        let mut inner = self.inner.lock().await;
        let rows = query(&statement).fetch_all(&mut **inner).await.map_err(query_error)?;
        Ok(rows.into_iter().map(Into::into).collect())
    }
}

/// A statement of constant text: values only ever travel as parameters.
pub(crate) fn sql<const N: usize>(text: &'static str, values: [Value; N]) -> Statement {
    Statement::from_sql_and_values(DbBackend::Postgres, text, values)
}

/// After a transaction's body: commit, run again, or give up. `None` means again.
pub(crate) async fn settle<T>(tx: Tx, outcome: Result<T>, round: &mut u32) -> Option<Result<T>> {
    let outcome = match outcome {
        Ok(value) => tx.commit().await.map(|()| value),
        Err(error) => {
            drop(tx);
            Err(error)
        }
    };
    match outcome {
        Err(StoreError::Retryable) if *round + 1 < ROUNDS => {
            *round += 1;
            tracing::debug!(round = *round, "a transaction lost against another and is run again");
            tokio::time::sleep(Duration::from_millis(2 << *round)).await;
            None
        }
        outcome => Some(outcome),
    }
}

/// Runs a block in a transaction, again when it lost against others; the block sees `$tx` and may use `?`.
///
/// A macro because a closure would have to promise futures that borrow from it and are `Send`, which cannot be said yet.
macro_rules! in_transaction {
    ($begin:expr, |$tx:ident| $body:block) => {{
        let mut round = 0;
        loop {
            let $tx = $begin.await?;
            #[allow(clippy::redundant_locals)]
            let outcome: $crate::error::Result<_> = async { $body }.await;
            if let Some(result) = $crate::tx::settle($tx, outcome, &mut round).await {
                break result;
            }
        }
    }};
}
pub(crate) use in_transaction;

/// Runs a read again on a fresh connection when the pooled one turns out to be dead.
macro_rules! reading {
    ($pool:expr, $read:expr) => {{
        let mut left = $pool.options().get_max_connections() + 1;
        loop {
            match $read.await {
                Err(error) if left > 0 && $crate::tx::broke(&error) => left -= 1,
                outcome => break $crate::error::OrStore::or_store(outcome),
            }
        }
    }};
}
pub(crate) use reading;

/// The connection was dead, as opposed to: the database is.
pub(crate) fn broke(error: &DbErr) -> bool {
    match error {
        DbErr::Query(RuntimeErr::SqlxError(inner)) | DbErr::Exec(RuntimeErr::SqlxError(inner)) => {
            matches!(fault(error), Fault::Broken)
                && !matches!(**inner, sqlx::Error::PoolTimedOut | sqlx::Error::PoolClosed)
                && (matches!(**inner, sqlx::Error::Database(_)) || is_broken(inner))
                && !matches!(&**inner, sqlx::Error::Database(database)
                    if !matches!(database.code().as_deref(), Some("57P01" | "57P02")))
        }
        _ => false,
    }
}

/// Whether the database answers.
pub(crate) async fn ping(pool: &PgPool) -> Result<()> {
    let mut connection: PoolConnection<Postgres> =
        pool.acquire().await.map_err(|error| StoreError::from_db(query_error(error)))?;
    connection.ping().await.map_err(|error| StoreError::from_db(query_error(error)))
}
