//! For tests alone: real PostgreSQL, one database for each test, and what most tests begin with.

#![forbid(unsafe_code)]

mod build;
mod server;

pub use build::{Deploy, TestNode, TestOrg, hello, mint};

use anyhow::{Context as _, Result};
use clawhq_store::{Store, StoreOptions, System, SystemScope};
use sqlx::{AssertSqlSafe, Connection as _, PgConnection};

/// The system's rows, for tests.
pub const TEST_SYSTEM: SystemScope = SystemScope::for_part("test");

/// A freshly migrated database of one test's own; dropped with this value.
pub struct TestDb {
    pub store: Store,
    /// As the role that owns the schema, which is no superuser: row-level security holds for it too.
    pub url: String,
    name: String,
}

impl TestDb {
    /// Clones the migrated template; some tens of milliseconds.
    pub async fn new() -> Result<Self> {
        Self::with_connections(10).await
    }

    /// With a larger pool, for tests of many at once.
    pub async fn with_connections(most: u32) -> Result<Self> {
        let server = server::server().await?;
        let name = server.clone_template().await?;
        let url = server.url(&name);
        let mut options = StoreOptions::new(&url);
        options.max_connections = most;
        options.acquire_timeout = std::time::Duration::from_secs(30);
        let store = Store::connect(&options).await.context("connect to the test's database")?;
        Ok(Self { store, url, name })
    }

    /// An empty database, not migrated.
    pub async fn empty() -> Result<Self> {
        let server = server::server().await?;
        let name = server.create_empty().await?;
        let url = server.url(&name);
        let store = Store::connect(&StoreOptions::new(&url)).await.context("connect to the test's database")?;
        Ok(Self { store, url, name })
    }

    pub fn system(&self) -> System<'_> {
        self.store.system(&TEST_SYSTEM)
    }

    /// A connection outside the store, for looking at rows as they are and for breaking them.
    pub async fn raw(&self) -> Result<PgConnection> {
        Ok(PgConnection::connect(&self.url).await?)
    }

    /// Runs statements outside the store.
    pub async fn execute(&self, sql: &str) -> Result<()> {
        let mut connection = self.raw().await?;
        sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut connection).await?;
        Ok(())
    }

    /// One number, asked outside the store.
    pub async fn number(&self, sql: &str) -> Result<i64> {
        let mut connection = self.raw().await?;
        Ok(sqlx::query_scalar(AssertSqlSafe(sql)).fetch_one(&mut connection).await?)
    }
}

impl Drop for TestDb {
    fn drop(&mut self) {
        let name = self.name.clone();
        // A thread of its own, for a runtime cannot be blocked from within. What fails here is swept by a later run.
        let _ = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(async { server::server().await?.drop(&name).await })
        })
        .join();
    }
}
