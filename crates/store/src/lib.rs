//! PostgreSQL as ClawHQ's one truth: repositories by noun, each call one transaction.
//!
//! - Whose rows: [`Store::tenant`] wants a [`TenantScope`], [`Store::user`] a [`UserScope`], [`Store::system`] a
//!   [`SystemScope`]; the first two only come from a credential's look-up. A tenant's transactions run as the
//!   database role `clawhq_tenant`, so row-level security holds for them whatever a statement forgets.
//! - What a mutation takes along ([`Change`]): idempotency key, events, audit entry, wake-ups; all or nothing.
//! - Time is the database's `now()` everywhere, given back as milliseconds since the epoch; spans are arguments.
//! - Ids are minted by the caller; secrets arrive sealed.
//! - Deadlocks and serialization failures are run again inside; what is left is [`StoreError`], sorted by what to do.

#![forbid(unsafe_code)]

mod accounts;
mod catalogue;
mod change;
mod codec;
mod entity;
mod error;
mod events;
mod idempotency;
mod instances;
mod jobs;
mod listen;
mod nodes;
mod orgs;
mod place;
mod row;
pub mod scope;
mod secrets;
mod slots;
mod tx;
mod volumes;
mod workloads;

use std::str::FromStr as _;
use std::time::Duration;

use sea_orm::{DatabaseConnection, SqlxPostgresConnector};
use sqlx::PgPool;
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};

pub use accounts::{
    Accounts, Authenticated, Credential, Entry, NewAccount, NewSession, OrgRef, Principal, Session, SignedIn,
    TokenHash, User, UserRows,
};
pub use catalogue::{CatalogueEntries, CatalogueEntry, NewCatalogueEntry, template_from_json};
pub use change::{Actor, Change, IdempotencyKey, NewAudit, NewEvent, Wakeup, WorkloadWakeup};
pub use serde_json::Value as Json;

pub use error::{DatabaseError, Earlier, Limit, Result, StoreError, StoredResponse, Taken};
pub use events::{AuditEntry, AuditLog, Event, Events};
pub use idempotency::Idempotency;
pub use instances::{Instance, QueuePlace, SystemInstances};
pub use jobs::{Failed, JobStats, Jobs, LeasedJob, NewJob, Outbox, Swept};
pub use listen::{Notice, channel};
pub use nodes::{Heartbeat, NewNode, Node, NodeFacts, NodeState, Nodes};
pub use orgs::{ApiKey, ApiKeys, Member, Membership, NewApiKey, NewOrg, Org, OrgKey, OrgRows};
pub use place::{NewInstance, Placed, Placement, VolumeUse};
pub use scope::{SystemScope, TenantScope, UserScope};
pub use secrets::{Secret, SecretVersion, Secrets};
pub use slots::{
    Claim, Observed, Recipe, ReportOutcome, SealedSecret, Slot, SlotDesired, SlotEvent, SlotSpec, Slots, SlotsOfNode,
    UnreadableSlot, WarmOrder,
};
pub use volumes::{Volume, Volumes};
pub use workloads::{
    Deployed, NewRelease, NewWorkload, ReleaseRow, StraightRoute, SystemWorkloads, Unsettled, Workload, WorkloadDetail,
    WorkloadFilter, WorkloadRef, Workloads,
};

/// How the store connects.
#[derive(Clone, Debug)]
pub struct StoreOptions {
    /// `postgres://user@host/database`, or `?host=/socket/dir` for a unix socket.
    pub url: String,
    /// Connections at most; a fifth as many again, at least four, are for what need not wait for the disk.
    pub max_connections: u32,
    /// How long a call waits for a connection before it is [`StoreError::Unavailable`].
    pub acquire_timeout: Duration,
    /// No statement runs longer than this.
    pub statement_timeout: Duration,
}

impl StoreOptions {
    pub fn new(url: impl Into<String>) -> Self {
        Self {
            url: url.into(),
            max_connections: 20,
            acquire_timeout: Duration::from_secs(5),
            statement_timeout: Duration::from_secs(30),
        }
    }
}

/// The database. Cheap to clone.
#[derive(Clone)]
pub struct Store {
    pool: PgPool,
    /// Same database, `synchronous_commit` off: for reports that are told again when they are lost.
    relaxed: PgPool,
    /// The pool as sea-orm sees it, for single statements of the system's.
    system: DatabaseConnection,
}

impl Store {
    /// Connects, or says why not. Does not migrate.
    pub async fn connect(options: &StoreOptions) -> Result<Self> {
        let unusable = |error: sqlx::Error| {
            StoreError::Unavailable(DatabaseError(sea_orm::DbErr::Conn(sea_orm::RuntimeErr::SqlxError(error.into()))))
        };
        let connect = PgConnectOptions::from_str(&options.url).map_err(unusable)?;
        let statement_timeout = options.statement_timeout.as_millis().to_string();
        let connect = connect.application_name("clawhq").statement_cache_capacity(256).options([
            ("statement_timeout", statement_timeout.as_str()),
            ("idle_in_transaction_session_timeout", "30000"),
            ("lock_timeout", "10000"),
            // Statements here have constant text and one good plan each; planning a deploy anew costs as much as it.
            ("plan_cache_mode", "force_generic_plan"),
            // Made on tables of any size, empty ones too, such a plan has to be the one for full ones: by index.
            ("enable_seqscan", "off"),
            ("enable_hashjoin", "off"),
            ("enable_mergejoin", "off"),
            // What has no index costs more than the compiler's threshold then.
            ("jit", "off"),
        ]);
        let pool = |most: u32| {
            PgPoolOptions::new()
                .max_connections(most)
                .min_connections(1)
                .acquire_timeout(options.acquire_timeout)
                .idle_timeout(Duration::from_secs(600))
                .max_lifetime(Duration::from_secs(3600))
                // A ping before each use is a round trip; a dead connection is found out and replaced instead.
                .test_before_acquire(false)
        };
        let pool_sync = pool(options.max_connections).connect_with(connect.clone()).await.map_err(unusable)?;
        let relaxed = pool((options.max_connections / 5).max(4))
            .connect_with(connect.options([("synchronous_commit", "off")]))
            .await
            .map_err(unusable)?;
        let system = SqlxPostgresConnector::from_sqlx_postgres_pool(pool_sync.clone());
        Ok(Self { pool: pool_sync, relaxed, system })
    }

    /// Applies the migrations that are missing. Racing callers take turns.
    pub async fn migrate(&self) -> Result<()> {
        error::OrStore::or_store(clawhq_migrations::up(&self.system).await)
    }

    /// Names of the migrations that are missing, oldest first.
    pub async fn pending_migrations(&self) -> Result<Vec<String>> {
        error::OrStore::or_store(clawhq_migrations::pending(&self.system).await)
    }

    /// Whether the database answers, within the acquire timeout.
    pub async fn ping(&self) -> Result<()> {
        tx::ping(&self.pool).await
    }

    /// Connections open and idle, for metrics.
    pub fn connections(&self) -> (u32, usize) {
        (self.pool.size(), self.pool.num_idle())
    }

    /// One org's rows.
    pub fn tenant<'s>(&'s self, scope: &TenantScope) -> Tenant<'s> {
        Tenant { store: self, org: scope.org() }
    }

    /// One person's own rows.
    pub fn user<'s>(&'s self, scope: &UserScope) -> UserRows<'s> {
        UserRows { store: self, scope: *scope }
    }

    /// Credentials and sign-up: what is asked before anybody is known.
    pub fn accounts(&self) -> Accounts<'_> {
        Accounts { store: self }
    }

    /// Every org's rows.
    pub fn system<'s>(&'s self, scope: &SystemScope) -> System<'s> {
        let _ = scope;
        System { store: self }
    }

    /// Ends all connections; calls after it are [`StoreError::Unavailable`].
    pub async fn close(&self) {
        self.relaxed.close().await;
        self.pool.close().await;
    }

    pub fn is_closed(&self) -> bool {
        self.pool.is_closed()
    }

    pub(crate) async fn begin(&self) -> Result<tx::Tx> {
        tx::Tx::begin(&self.pool, "BEGIN").await
    }
}

/// Repositories of one org's rows.
#[derive(Clone, Copy)]
pub struct Tenant<'s> {
    store: &'s Store,
    org: clawhq_domain::ids::OrgId,
}

impl<'s> Tenant<'s> {
    pub fn org(&self) -> OrgRows<'s> {
        OrgRows { tenant: *self }
    }

    pub fn api_keys(&self) -> ApiKeys<'s> {
        ApiKeys { tenant: *self }
    }

    pub fn workloads(&self) -> Workloads<'s> {
        Workloads { tenant: *self }
    }

    pub fn secrets(&self) -> Secrets<'s> {
        Secrets { tenant: *self }
    }

    pub fn events(&self) -> Events<'s> {
        Events { tenant: *self }
    }

    pub fn audit(&self) -> AuditLog<'s> {
        AuditLog { tenant: *self }
    }

    pub fn idempotency(&self) -> Idempotency<'s> {
        Idempotency { tenant: *self }
    }

    /// Role and org are set in the same round trip as the transaction's begin, and end with it.
    pub(crate) async fn begin(&self) -> Result<tx::Tx> {
        let org = row::Id::uuid(self.org);
        tx::Tx::begin(&self.store.pool, &format!("BEGIN; SET LOCAL ROLE clawhq_tenant; SET LOCAL app.org = '{org}'"))
            .await
    }

    /// The same, and may see the pool's slots to make one the org's own.
    pub(crate) async fn begin_placing(&self) -> Result<tx::Tx> {
        let org = row::Id::uuid(self.org);
        tx::Tx::begin(
            &self.store.pool,
            &format!("BEGIN; SET LOCAL ROLE clawhq_tenant; SET LOCAL app.org = '{org}'; SET LOCAL app.claiming = 'on'"),
        )
        .await
    }
}

/// Repositories of every org's rows and of the platform's own.
#[derive(Clone, Copy)]
pub struct System<'s> {
    store: &'s Store,
}

impl<'s> System<'s> {
    pub fn nodes(&self) -> Nodes<'s> {
        Nodes { store: self.store }
    }

    pub fn slots(&self) -> Slots<'s> {
        Slots { store: self.store }
    }

    pub fn volumes(&self) -> Volumes<'s> {
        Volumes { store: self.store }
    }

    pub fn workloads(&self) -> SystemWorkloads<'s> {
        SystemWorkloads { store: self.store }
    }

    pub fn instances(&self) -> SystemInstances<'s> {
        SystemInstances { store: self.store }
    }

    pub fn jobs(&self) -> Jobs<'s> {
        Jobs { store: self.store }
    }

    pub fn outbox(&self) -> Outbox<'s> {
        Outbox { store: self.store }
    }
}
