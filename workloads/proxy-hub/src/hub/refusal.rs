//! How a customer is told no.

use crate::account::Denial;
use crate::link::Opened;
use crate::metrics::Outcome;
use crate::socks::Reply;

/// Why a request is turned down, in both protocols' terms.
pub(super) struct Refusal {
    pub(super) socks: Reply,
    pub(super) status: u16,
    pub(super) reason: String,
    pub(super) outcome: Outcome,
}

impl Refusal {
    pub(super) fn new(socks: Reply, status: u16, outcome: Outcome, reason: impl Into<String>) -> Self {
        Self { socks, status, reason: reason.into(), outcome }
    }

    pub(super) fn denial(denial: &Denial) -> Self {
        let (status, outcome) = match denial {
            Denial::NoCredentials | Denial::Credentials | Denial::Target(_) => (407, Outcome::Auth),
            Denial::Address | Denial::Suspended => (403, Outcome::Auth),
            Denial::Quota => (402, Outcome::Limited),
            Denial::Concurrency | Denial::Rate => (429, Outcome::Limited),
        };
        Self::new(Reply::NotAllowed, status, outcome, denial.to_string())
    }

    pub(super) fn opened(how: Opened) -> Self {
        let (socks, status, reason) = match how {
            Opened::Ok => (Reply::GeneralFailure, 502, "the exit failed"),
            Opened::Refused => (Reply::ConnectionRefused, 502, "the destination refused the connection"),
            Opened::Unreachable => (Reply::HostUnreachable, 502, "the destination cannot be reached"),
            Opened::Timeout => (Reply::TtlExpired, 504, "the destination did not answer in time"),
            Opened::Denied => (Reply::NotAllowed, 403, "the exit does not allow this destination"),
            Opened::Full => (Reply::GeneralFailure, 503, "the exit is full"),
            Opened::NotResolved => (Reply::HostUnreachable, 502, "the destination's name does not resolve"),
            Opened::Failed => (Reply::GeneralFailure, 502, "the exit failed"),
        };
        let outcome = if how == Opened::Denied { Outcome::Denied } else { Outcome::Failed };
        Self::new(socks, status, outcome, reason)
    }
}
