//! Who asks, and for which org: values that prove it was looked up.

use std::net::IpAddr;

use clawhq_domain::access::{Action, Noun, Role, allows};
use clawhq_domain::ids::{ApiKeyId, OrgId, RequestId, SessionId, UserId};
use clawhq_store::TenantScope;
use clawhq_store::{Actor, NewAudit};

use crate::{Error, Result};

/// What came with a request. Neither part is ever logged.
#[derive(Clone)]
pub enum Credential {
    /// The session cookie's value.
    Session(String),
    /// After `Bearer `.
    ApiKey(String),
}

/// Facts of the request that go into the audit log.
#[derive(Clone, Debug)]
pub struct Origin {
    pub request: RequestId,
    pub ip: Option<IpAddr>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Who {
    Session {
        user: UserId,
        session: SessionId,
    },
    /// A program; acts for one org alone.
    ApiKey {
        key: ApiKeyId,
    },
}

/// An org that the caller belongs to, with the scope that its rows need.
#[derive(Clone, Debug)]
pub struct OrgContext {
    pub scope: TenantScope,
    pub org: OrgId,
    pub slug: String,
    pub name: String,
    /// The org's tier by name.
    pub tier: String,
    pub role: Role,
    pub who: Who,
    pub origin: Origin,
    /// Requests a minute by the org's tier.
    pub rate_per_min: u32,
}

impl OrgContext {
    pub fn may(&self, action: Action, noun: Noun) -> Result<()> {
        if allows(self.role, action, noun) { Ok(()) } else { Err(Error::Forbidden) }
    }

    pub fn actor(&self) -> Actor {
        match self.who {
            Who::Session { user, .. } => Actor::User(user),
            Who::ApiKey { key } => Actor::ApiKey(key),
        }
    }

    /// The person behind it, where there is one.
    pub fn user(&self) -> Option<UserId> {
        match self.who {
            Who::Session { user, .. } => Some(user),
            Who::ApiKey { .. } => None,
        }
    }

    pub(crate) fn audit(&self, action: &'static str, object: String, detail: serde_json::Value) -> NewAudit {
        NewAudit { actor: self.actor(), action, object, ip: self.origin.ip, request: Some(self.origin.request), detail }
    }
}
