//! What a person or a timer may ask of ClawHQ, one function for each. This room owns transactions and the order of
//! effects; it decides nothing (`domain` does) and speaks no protocol (`backend`, `workers`, `pool-manager` do).

pub mod accounts;
pub mod ca;
pub mod caller;
pub mod catalogue;
pub mod converge;
pub mod error;
pub mod events;
pub mod hub;
pub mod keys;
mod listen;
pub mod model;
pub mod nodes;
pub mod orgs;
pub mod password;
pub mod pool;
pub mod routes;
pub mod secrets;
pub mod waiters;
pub mod work;
pub mod workloads;

use std::sync::Arc;

use clawhq_domain::Millis;
use clawhq_runtime::clock::Clock;
use clawhq_runtime::driver::Hint;
use clawhq_sealing::KeyRing;
use clawhq_store::Store;
use clawhq_store::SystemScope;
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;

pub use clawhq_sealing::Plaintext;
pub use clawhq_store::{IdempotencyKey, StoredResponse};
pub use error::{Error, Result};

/// Policy of the control plane. Limits that people buy are in the tier table, not here.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct AppConfig {
    /// Where workloads are reached: `<workload>-<org>.` comes before it. A port other than the scheme's own is part of it.
    pub edge_domain: String,
    pub edge_scheme: String,
    /// Strangers may sign up.
    pub sign_up_open: bool,
    /// The tier of a new org.
    pub default_tier: String,
    /// A session ends after this, used or not.
    pub session_ms: Millis,
    /// Password hashes computed side by side.
    pub passwords_at_once: usize,
    /// How long a node may run single writers without hearing from the control plane.
    pub lease_ms: Millis,
    /// Slots being made at once over all pools.
    pub pool_in_flight_max: u32,
    /// What the pool may reserve of each node's memory, in percent: tenants come first.
    pub pool_share_percent: u32,
    /// A warm slot older than this is replaced.
    pub pool_max_age_ms: Millis,
}

impl Default for AppConfig {
    fn default() -> Self {
        Self {
            edge_domain: "localhost:4181".to_owned(),
            edge_scheme: "http".to_owned(),
            sign_up_open: true,
            default_tier: "free".to_owned(),
            session_ms: 30 * 24 * 3600 * 1000,
            passwords_at_once: 2,
            lease_ms: 600_000,
            pool_in_flight_max: 2,
            pool_share_percent: 40,
            pool_max_age_ms: 24 * 3600 * 1000,
        }
    }
}

/// Cheap to clone.
#[derive(Clone)]
pub struct App(Arc<Inner>);

pub(crate) struct Inner {
    pub(crate) store: Store,
    pub(crate) config: AppConfig,
    pub(crate) clock: Clock,
    pub(crate) keys: keys::OrgKeys,
    pub(crate) ca: ca::Ca,
    pub(crate) passwords: password::Passwords,
    pub(crate) hub: hub::NodeHub,
    pub(crate) waiters: waiters::Waiters,
    pub(crate) catalogue: catalogue::Cache,
    pub(crate) hints: Hints,
    pub(crate) listening: listen::Listening,
    pub(crate) saying: parking_lot::Mutex<listen::Saying>,
}

#[derive(Default)]
pub(crate) struct Hints {
    pub(crate) outbox: Hint,
    pub(crate) pool: Hint,
    pub(crate) queue: Hint,
    pub(crate) nodes: Hint,
    pub(crate) jobs: Arc<Notify>,
}

impl App {
    pub fn new(config: AppConfig, store: Store, ring: KeyRing, ca: ca::Ca, clock: Clock) -> Self {
        let passwords = password::Passwords::new(config.passwords_at_once);
        Self(Arc::new(Inner {
            keys: keys::OrgKeys::new(ring),
            ca,
            passwords,
            hub: hub::NodeHub::default(),
            waiters: waiters::Waiters::default(),
            catalogue: catalogue::Cache::default(),
            hints: Hints::default(),
            listening: listen::Listening::default(),
            saying: parking_lot::Mutex::default(),
            store,
            config,
            clock,
        }))
    }

    /// Whether a request could be served now: the database answers.
    pub async fn ready(&self) -> Result<()> {
        Ok(self.store().ping().await?)
    }

    pub fn config(&self) -> &AppConfig {
        &self.0.config
    }

    pub fn ca(&self) -> &ca::Ca {
        &self.0.ca
    }

    pub fn hub(&self) -> &hub::NodeHub {
        &self.0.hub
    }

    pub fn waiters(&self) -> &waiters::Waiters {
        &self.0.waiters
    }

    pub(crate) fn now(&self) -> Millis {
        self.0.clock.unix_millis()
    }

    pub(crate) fn store(&self) -> &Store {
        &self.0.store
    }

    pub(crate) fn system(&self) -> SystemScope {
        SystemScope::for_part("app")
    }

    pub fn outbox_hint(&self) -> Hint {
        self.0.hints.outbox.clone()
    }

    pub fn pool_hint(&self) -> Hint {
        self.0.hints.pool.clone()
    }

    pub fn queue_hint(&self) -> Hint {
        self.0.hints.queue.clone()
    }

    pub fn nodes_hint(&self) -> Hint {
        self.0.hints.nodes.clone()
    }

    pub fn jobs_hint(&self) -> Arc<Notify> {
        self.0.hints.jobs.clone()
    }
}
