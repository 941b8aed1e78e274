//! Failures by what the asker can do about them. HTTP statuses are `backend`'s business.

use clawhq_domain::{Millis, Reason};
use clawhq_store::StoredResponse;

pub type Result<T, E = Error> = std::result::Result<T, E>;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No credential, or one that is not (any longer) valid.
    #[error("not signed in")]
    Unauthenticated,
    /// Wrong e-mail or password; which of the two is not said.
    #[error("wrong e-mail or password")]
    WrongCredentials,
    /// The role may not do this.
    #[error("the role does not allow this")]
    Forbidden,
    /// Missing or another org's: the same on purpose. The noun, such as `workload`.
    #[error("there is no such {0}")]
    NotFound(&'static str),
    /// The input cannot be used; `pointer` is a JSON Pointer into it.
    #[error("{}", .reason.message)]
    Invalid { pointer: String, reason: Reason },
    /// A decision against it that the asker can act on: quota, tier, warm required, wrong state.
    #[error("{}", .0.message)]
    Refused(Reason),
    /// The name is in use.
    #[error("the {0} is taken")]
    Taken(&'static str),
    /// The caller's version is not the current one.
    #[error("it was changed meanwhile")]
    Conflict { current: i64 },
    /// The same `Idempotency-Key` was answered before: say this again.
    #[error("answered before")]
    Replay(Box<StoredResponse>),
    /// The same `Idempotency-Key` is being worked on.
    #[error("the same request is being worked on")]
    InProgress { retry_after_ms: Millis },
    /// The same `Idempotency-Key` had its effect, but its answer was never stored: describe what it made.
    #[error("done before, and not answered")]
    Unanswered { effect: u128 },
    /// The same `Idempotency-Key` with another body.
    #[error("the key was used for another request")]
    KeyReused,
    /// The workload does not run, so there is nothing to talk to. Holds its state's name.
    #[error("it does not run")]
    NotRunning { state: &'static str },
    /// Too many of something at once; try after this.
    #[error("busy")]
    Busy { retry_after_ms: Millis },
    /// A part did not answer; the same call may succeed later.
    #[error("{0} is not available")]
    Unavailable(&'static str),
    /// A bug or an incident; the chain is logged where it is handled, never shown.
    #[error("internal failure: {what}")]
    Internal {
        what: &'static str,
        #[source]
        source: Option<Box<dyn std::error::Error + Send + Sync>>,
    },
}

impl Error {
    pub fn internal(what: &'static str, source: impl std::error::Error + Send + Sync + 'static) -> Self {
        Self::Internal { what, source: Some(Box::new(source)) }
    }

    pub fn invalid(pointer: impl Into<String>, reason: Reason) -> Self {
        Self::Invalid { pointer: pointer.into(), reason }
    }
}
