//! Orgs, their members and their programs' keys.

use clawhq_domain::access::{Action, Noun, Role};
use clawhq_domain::ids::{ApiKeyId, UserId};
use clawhq_domain::names::Email;
use clawhq_domain::quota::{self, Ask};
use clawhq_domain::{Millis, Reason};
use clawhq_runtime::ids::mint;
use clawhq_store::StoreError;
use clawhq_store::Taken;
use clawhq_store::TokenHash;
use clawhq_store::{self as store, NewApiKey};
use clawhq_store::{Change, NewEvent};
use serde_json::json;

use crate::accounts::{API_KEY_PREFIX, fresh_token, org_name};
use crate::caller::{Credential, OrgContext};
use crate::model::{ApiKey, Member, Org};
use crate::{App, Error, Result};

fn org(org: store::Org) -> Org {
    Org {
        id: org.id,
        slug: org.slug.to_string(),
        name: org.name,
        tier: org.tier,
        created_at: org.created_at,
        version: org.version,
    }
}

fn member(member: store::Member) -> Member {
    Member { user: member.user, email: member.email.to_string(), role: member.role, joined_at: member.joined_at }
}

fn api_key(key: store::ApiKey) -> ApiKey {
    ApiKey {
        id: key.id,
        name: key.name,
        prefix: key.prefix,
        created_at: key.created_at,
        expires_at: key.expires_at,
        last_used_at: key.last_used_at,
    }
}

/// An entry of the feed that is about the org itself.
pub(crate) fn org_event(kind: &str, message: String, data: serde_json::Value) -> NewEvent {
    NewEvent { id: mint(), workload: None, instance: None, kind: kind.to_owned(), message, data }
}

/// Each org costs rows for ever and has limits of its own: nobody multiplies theirs without end.
pub const ORGS_OWNED_MAX: u32 = 20;

impl App {
    /// Another org of the same person, who owns it.
    pub async fn create_org(&self, credential: &Credential, name: &str, slug: Option<&str>) -> Result<Org> {
        let signed_in = self.session_of(credential).await?;
        let name = org_name(name)?;
        let rows = self.store().user(&signed_in.scope);
        let base: String = slug.map_or_else(
            || name.to_lowercase().chars().filter(char::is_ascii_lowercase).take(14).collect(),
            str::to_owned,
        );
        let base = if base.is_empty() { "org".to_owned() } else { base };
        for attempt in 0..8 {
            let taken_before = attempt > 0;
            let tried =
                if taken_before { format!("{base}{:05}", rand::random::<u32>() % 100_000) } else { base.clone() };
            match rows.create_org(&self.new_org(name.clone(), &tried)?, ORGS_OWNED_MAX).await {
                Err(StoreError::AlreadyExists(Taken::OrgSlug)) if slug.is_none() => {}
                other => return Ok(org(other?)),
            }
        }
        Err(Error::Taken("org name"))
    }

    pub async fn org(&self, context: &OrgContext) -> Result<Org> {
        context.may(Action::Read, Noun::Org)?;
        Ok(org(self.store().tenant(&context.scope).org().get().await?))
    }

    pub async fn rename_org(&self, context: &OrgContext, name: &str, if_version: Option<i64>) -> Result<Org> {
        context.may(Action::Update, Noun::Org)?;
        let name = org_name(name)?;
        let change = Change {
            audit: Some(context.audit("org.rename", context.org.to_string(), json!({ "name": name }))),
            events: vec![org_event("org.renamed", format!("The org is now called {name}."), json!({ "name": name }))],
            ..Change::default()
        };
        Ok(org(self.store().tenant(&context.scope).org().rename(&name, if_version, &change).await?))
    }

    pub async fn members(&self, context: &OrgContext) -> Result<Vec<Member>> {
        context.may(Action::Read, Noun::Member)?;
        let members = self.store().tenant(&context.scope).org().members().await?;
        Ok(members.into_iter().map(member).collect())
    }

    /// Somebody who has an account already.
    pub async fn add_member(&self, context: &OrgContext, email: &Email, role: Role) -> Result<Member> {
        context.may(Action::Create, Noun::Member)?;
        self.admit(context, Ask::Member).await?;
        let detail = json!({ "email": email.as_str(), "role": role.name() });
        let change = Change {
            audit: Some(context.audit("member.add", context.org.to_string(), detail.clone())),
            events: vec![org_event("member.added", format!("{email} joined as {}.", role.name()), detail)],
            ..Change::default()
        };
        let added = self.store().tenant(&context.scope).org().add_member(email, role, &change).await;
        match added {
            Err(StoreError::NotFound(_)) => Err(Error::invalid(
                "/email",
                Reason::new("user_unknown", format!("Nobody with the address {email} has an account."))
                    .with_hint("Ask them to sign up first."),
            )),
            other => Ok(member(other?)),
        }
    }

    pub async fn remove_member(&self, context: &OrgContext, user: UserId) -> Result<()> {
        // Everybody may leave.
        if context.user() != Some(user) {
            context.may(Action::Delete, Noun::Member)?;
        }
        let detail = json!({ "user": user.to_string() });
        let change = Change {
            audit: Some(context.audit("member.remove", user.to_string(), detail.clone())),
            events: vec![org_event("member.removed", "A member left.".to_owned(), detail)],
            ..Change::default()
        };
        Ok(self.store().tenant(&context.scope).org().remove_member(user, &change).await?)
    }

    pub async fn api_keys(&self, context: &OrgContext) -> Result<Vec<ApiKey>> {
        context.may(Action::Read, Noun::ApiKey)?;
        let keys = self.store().tenant(&context.scope).api_keys().list().await?;
        Ok(keys.into_iter().map(api_key).collect())
    }

    /// The key itself is the second value, told once.
    pub async fn create_api_key(
        &self,
        context: &OrgContext,
        name: &str,
        lifetime_ms: Option<Millis>,
    ) -> Result<(ApiKey, String)> {
        context.may(Action::Create, Noun::ApiKey)?;
        self.admit(context, Ask::ApiKey).await?;
        let name = org_name(name)?;
        if lifetime_ms.is_some_and(|ms| ms <= 0) {
            return Err(Error::invalid("/expires_at", Reason::new("config_invalid", "The expiry is in the past.")));
        }
        let key = format!("{API_KEY_PREFIX}{}", fresh_token());
        let new = NewApiKey {
            id: mint(),
            name: name.clone(),
            role: context.role,
            hash: TokenHash::of(&key),
            prefix: key[..API_KEY_PREFIX.len() + 6].to_owned(),
            created_by: context.user(),
            lifetime_ms,
        };
        let change = Change {
            audit: Some(context.audit("api_key.create", new.id.to_string(), json!({ "name": name }))),
            events: vec![org_event(
                "api_key.created",
                format!("The API key {name} was made."),
                json!({ "name": name }),
            )],
            ..Change::default()
        };
        let made = self.store().tenant(&context.scope).api_keys().create(&new, &change).await?;
        Ok((api_key(made), key))
    }

    pub async fn delete_api_key(&self, context: &OrgContext, key: ApiKeyId) -> Result<()> {
        context.may(Action::Delete, Noun::ApiKey)?;
        let change = Change {
            audit: Some(context.audit("api_key.delete", key.to_string(), json!({}))),
            events: vec![org_event(
                "api_key.deleted",
                "An API key was deleted.".to_owned(),
                json!({ "key": key.to_string() }),
            )],
            ..Change::default()
        };
        Ok(self.store().tenant(&context.scope).api_keys().revoke(key, &change).await?)
    }

    /// Asks the quota. Races can pass it by the number of concurrent requests; workloads, which cost, are counted
    /// again inside their transaction.
    pub(crate) async fn admit(&self, context: &OrgContext, ask: Ask) -> Result<()> {
        let usage = self.store().tenant(&context.scope).org().usage().await?;
        let tiers = self.tiers().await?;
        let tier = tiers.get(&context.tier).ok_or(Error::Unavailable("tier table"))?;
        quota::admit(ask, usage, tier).map_err(Error::Refused)
    }
}
