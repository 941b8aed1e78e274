//! What a caller can do about a failure of the store.

use std::fmt;

use clawhq_domain::Millis;

/// Something with a name that only one row may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Taken {
    Email,
    OrgSlug,
    WorkloadName,
    Member,
    ApiKeyName,
    NodeName,
    /// An id that the caller minted: a bug, or a repeat of a request whose answer was lost.
    Id,
}

/// A limit that a transaction would have passed. Nothing was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    /// The org's tier allows no more workloads.
    Workloads { allowed: u32 },
    /// The person owns as many orgs as one may.
    OrgsOwned { allowed: u32 },
    /// `ClaimPolicy::Require` and no warm slot was ready.
    NoWarmSlot,
}

/// The answer that was given to an earlier request with the same `Idempotency-Key`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredResponse {
    pub status: u16,
    /// Names and values, as they were sent.
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

/// What is known of an earlier request with the same `Idempotency-Key`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Earlier {
    /// It was answered: say the same again.
    Response(StoredResponse),
    /// Its effect is committed, its answer was not stored (yet): it is still being waited for, or its process died.
    /// `effect` is the id of what it made; describe that, or answer 409 when it is `None`.
    Unanswered { effect: Option<u128>, since: Millis },
    /// The key was used for another request: 422.
    Mismatch,
}

/// Every failure of the store, sorted by what its caller can do.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Missing, or another org's: the two look the same on purpose.
    #[error("there is no such {0}")]
    NotFound(&'static str),
    #[error("the {0:?} is taken")]
    AlreadyExists(Taken),
    /// The row is at another version than the caller said; `current` is its version now.
    #[error("it was changed meanwhile (now at version {current})")]
    Conflict { current: i64 },
    /// The thing is used by another and cannot go or change: by what.
    #[error("it is in use by {0}")]
    InUse(String),
    #[error("a limit is reached: {0:?}")]
    LimitReached(Limit),
    /// The same `Idempotency-Key` was seen before. Not a failure: replay, describe or refuse, as the value says.
    #[error("the request was seen before")]
    Replay(Box<Earlier>),
    /// Lost against other transactions too often; nothing was changed; the same call may be made again.
    #[error("the database asks to try again")]
    Retryable,
    /// The database did not answer. What was being committed may or may not have been: repeat with the same key.
    #[error("the database is not available")]
    Unavailable(#[source] DatabaseError),
    /// A row that cannot be read: an incident, never a panic.
    #[error("row {id} of {table} has an unreadable {field}")]
    Corrupt { table: &'static str, id: String, field: &'static str },
    /// A statement the database refused for a reason no caller can cause: a bug in the store.
    #[error("the database refused a statement")]
    Bug(#[source] DatabaseError),
}

impl StoreError {
    /// Whether the same call can succeed later without anybody changing anything.
    pub fn retryable(&self) -> bool {
        match self {
            Self::Retryable | Self::Unavailable(_) => true,
            Self::NotFound(_)
            | Self::AlreadyExists(_)
            | Self::Conflict { .. }
            | Self::InUse(_)
            | Self::LimitReached(_)
            | Self::Replay(_)
            | Self::Corrupt { .. }
            | Self::Bug(_) => false,
        }
    }
}

pub type Result<T, E = StoreError> = std::result::Result<T, E>;

/// The database's own words, for logs alone.
#[derive(Debug)]
pub struct DatabaseError(pub(crate) sea_orm::DbErr);

impl fmt::Display for DatabaseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl std::error::Error for DatabaseError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        std::error::Error::source(&self.0)
    }
}

/// How a failed statement is treated inside the store.
pub(crate) enum Fault {
    /// Deadlock or serialization: run the transaction again.
    Again,
    /// The connection broke or could not be had.
    Broken,
    Taken(Taken),
    /// A foreign key held: something is still used, or what is referred to is missing.
    Reference(String),
    Other,
}

pub(crate) fn fault(error: &sea_orm::DbErr) -> Fault {
    use sea_orm::{DbErr, RuntimeErr};
    let inner = match error {
        DbErr::Conn(RuntimeErr::SqlxError(inner))
        | DbErr::Exec(RuntimeErr::SqlxError(inner))
        | DbErr::Query(RuntimeErr::SqlxError(inner)) => inner,
        DbErr::ConnectionAcquire(_) | DbErr::Conn(_) => return Fault::Broken,
        _ => return Fault::Other,
    };
    match &**inner {
        sqlx::Error::Database(database) => {
            let code = database.code().unwrap_or_default().into_owned();
            let constraint = database.constraint().unwrap_or_default().to_owned();
            match code.as_str() {
                // serialization_failure, deadlock_detected
                "40001" | "40P01" => Fault::Again,
                "23505" => Fault::Taken(match constraint.as_str() {
                    "users_email_key" => Taken::Email,
                    "orgs_slug_key" => Taken::OrgSlug,
                    "workloads_name_live" => Taken::WorkloadName,
                    "memberships_pkey" => Taken::Member,
                    "api_keys_name_live" => Taken::ApiKeyName,
                    "nodes_name_key" => Taken::NodeName,
                    _ => Taken::Id,
                }),
                "23503" => Fault::Reference(constraint),
                // admin_shutdown, crash_shutdown, cannot_connect_now, too_many_connections, query_canceled (by the
                // statement's deadline), lock_not_available, and the classes of lost connections and full disks.
                "57P01" | "57P02" | "57P03" | "53300" | "57014" | "55P03" => Fault::Broken,
                code if code.starts_with("08") || code.starts_with("53") || code.starts_with("58") => Fault::Broken,
                _ => Fault::Other,
            }
        }
        sqlx::Error::Io(_)
        | sqlx::Error::Tls(_)
        | sqlx::Error::Protocol(_)
        | sqlx::Error::PoolTimedOut
        | sqlx::Error::PoolClosed
        | sqlx::Error::WorkerCrashed
        | sqlx::Error::BeginFailed => Fault::Broken,
        _ => Fault::Other,
    }
}

impl StoreError {
    pub(crate) fn from_db(error: sea_orm::DbErr) -> Self {
        match fault(&error) {
            Fault::Again => Self::Retryable,
            Fault::Broken => Self::Unavailable(DatabaseError(error)),
            Fault::Taken(taken) => Self::AlreadyExists(taken),
            Fault::Reference(constraint) => match constraint.as_str() {
                // A secret came into use, or went, just now: the next round sees which.
                "release_secrets_version_fkey" => Self::Retryable,
                "memberships_user_id_fkey" => Self::NotFound("user"),
                _ => Self::Bug(DatabaseError(error)),
            },
            Fault::Other => Self::Bug(DatabaseError(error)),
        }
    }

    pub(crate) fn corrupt(table: &'static str, id: impl fmt::Display, field: &'static str) -> Self {
        Self::Corrupt { table, id: id.to_string(), field }
    }
}

/// Only inside the store: `?` on a statement. No caller sees a `DbErr`.
pub(crate) trait OrStore<T> {
    fn or_store(self) -> Result<T>;
}

impl<T> OrStore<T> for std::result::Result<T, sea_orm::DbErr> {
    fn or_store(self) -> Result<T> {
        self.map_err(StoreError::from_db)
    }
}
