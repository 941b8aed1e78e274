//! Proofs of whose rows a caller may touch. They cannot be made outside this crate, save one, which a test lists.

use clawhq_domain::ids::{OrgId, SessionId, UserId};

/// One org's rows. Comes from a credential look-up ([`Store::enter`](crate::Store::enter)) or from a system read of
/// the row that the org owns; there is no other way to have one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TenantScope {
    org: OrgId,
}

impl TenantScope {
    pub(crate) fn new(org: OrgId) -> Self {
        Self { org }
    }

    pub fn org(&self) -> OrgId {
        self.org
    }
}

/// One person's own rows: their sessions and memberships. Comes from a session's or a password's look-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct UserScope {
    user: UserId,
    session: SessionId,
}

impl UserScope {
    pub(crate) fn new(user: UserId, session: SessionId) -> Self {
        Self { user, session }
    }

    pub fn user(&self) -> UserId {
        self.user
    }

    pub fn session(&self) -> SessionId {
        self.session
    }
}

/// Every org's rows: for loops, workers and node streams, never for a request of a person.
#[derive(Clone, Copy, Debug)]
pub struct SystemScope {
    part: &'static str,
}

impl SystemScope {
    /// `part` names the role it is for. Its call sites are listed, and a test keeps the
    /// list true: `tests/system_scopes.txt` of this crate.
    pub const fn for_part(part: &'static str) -> Self {
        Self { part }
    }

    pub fn part(&self) -> &'static str {
        self.part
    }
}
