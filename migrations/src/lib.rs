//! The history of the schema. See `README.md` beside it for the rules of a change.
//!
//! [`up`] may be run by every process at its start: it waits its turn and does nothing when there is nothing to do.

use sea_orm::{ConnectionTrait, DatabaseConnection, DbErr, TransactionTrait};
use sea_orm_migration::prelude::*;

pub struct Migrator;

/// Every step, in order.
const STEPS: [(&str, &str); 7] = [
    ("0001_initial", include_str!("sql/0001_initial.sql")),
    ("0002_tiers", include_str!("sql/0002_tiers.sql")),
    ("0003_minted", include_str!("sql/0003_minted.sql")),
    ("0004_live_instances", include_str!("sql/0004_live_instances.sql")),
    ("0005_heard_since", include_str!("sql/0005_heard_since.sql")),
    ("0006_started_at", include_str!("sql/0006_started_at.sql")),
    ("0007_org_once", include_str!("sql/0007_org_once.sql")),
];

impl MigratorTrait for Migrator {
    fn migrations() -> Vec<Box<dyn MigrationTrait>> {
        STEPS.map(|(name, up)| Box::new(Sql { name, up }) as Box<dyn MigrationTrait>).into()
    }
}

/// A migration written as SQL. There is no way down: a step back is a new step forward.
struct Sql {
    name: &'static str,
    up: &'static str,
}

impl MigrationName for Sql {
    fn name(&self) -> &str {
        self.name
    }
}

#[async_trait::async_trait]
impl MigrationTrait for Sql {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        manager.get_connection().execute_unprepared(self.up).await.map(drop)
    }
}

/// Any number that nobody else in this database uses for an advisory lock.
const LOCK: i64 = 0x636c_6177_6871;

/// Applies what is missing, all of it or nothing. Migrators that race take turns.
///
/// The lock is a transaction's, so it cannot outlive a migrator that dies.
pub async fn up(database: &DatabaseConnection) -> Result<(), DbErr> {
    let transaction = database.begin().await?;
    transaction.execute_unprepared(&format!("select pg_advisory_xact_lock({LOCK})")).await?;
    Migrator::up(&transaction, None).await?;
    transaction.commit().await
}

/// The names of the migrations that a database lacks, oldest first.
pub async fn pending(database: &DatabaseConnection) -> Result<Vec<String>, DbErr> {
    Ok(Migrator::get_pending_migrations(database).await?.iter().map(|migration| migration.name().to_owned()).collect())
}

/// A number that changes with any step: what a database was made from, for caches of migrated databases.
pub fn fingerprint() -> u64 {
    // FNV-1a: stable over builds and machines, unlike the standard library's hasher.
    STEPS
        .iter()
        .flat_map(|(_, sql)| sql.bytes())
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3))
}
