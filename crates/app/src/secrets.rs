//! Secrets: written, listed by name and version, deleted; never read back.

use clawhq_domain::Reason;
use clawhq_domain::access::{Action, Noun};
use clawhq_domain::names::SecretName;
use clawhq_domain::quota::Ask;
use clawhq_domain::release::limits::SECRET_BYTES;
use clawhq_runtime::ids::mint;
use clawhq_sealing::Plaintext;
use clawhq_store::{Change, IdempotencyKey};
use serde_json::json;

use crate::caller::OrgContext;
use crate::model::{Secret, SecretVersion};
use crate::orgs::org_event;
use crate::{App, Error, Result};

/// What a sealed secret is bound to beside its id and version.
pub(crate) const SECRET_PURPOSE: &str = "secret";

fn secret(secret: clawhq_store::Secret) -> Secret {
    Secret {
        name: secret.name.to_string(),
        latest_version: secret.latest_version,
        created_at: secret.created_at,
        updated_at: secret.updated_at,
    }
}

impl App {
    /// All of them, by name: a quota keeps the list short.
    pub async fn secrets(&self, context: &OrgContext) -> Result<Vec<Secret>> {
        context.may(Action::Read, Noun::Secret)?;
        Ok(self.store().tenant(&context.scope).secrets().list().await?.into_iter().map(secret).collect())
    }

    /// A new version. Workloads read it from their next release on.
    pub async fn put_secret(
        &self,
        context: &OrgContext,
        name: &SecretName,
        value: Plaintext,
        idempotency: Option<IdempotencyKey>,
    ) -> Result<Secret> {
        context.may(Action::Create, Noun::Secret)?;
        let bytes = value.expose().len();
        if bytes == 0 || bytes > SECRET_BYTES || value.expose().contains(&0) {
            let why = format!("A secret has 1 to {SECRET_BYTES} bytes without zero bytes; this one has {bytes}.");
            return Err(Error::invalid("/value", Reason::new("secret_invalid", why)));
        }
        let rows = self.store().tenant(&context.scope).secrets();
        if !rows.list().await?.iter().any(|known| known.name == *name) {
            self.admit(context, Ask::Secret).await?;
        }
        let dek = self.dek(&context.scope).await?;
        let change = Change {
            idempotency,
            audit: Some(context.audit("secret.put", name.to_string(), json!({ "bytes": bytes }))),
            events: vec![org_event(
                "secret.set",
                format!("The secret {name} has a new version."),
                json!({ "secret": name.as_str() }),
            )],
            ..Change::default()
        };
        let seal = |id: clawhq_domain::ids::SecretId, version| dek.seal(id.as_u128(), version, SECRET_PURPOSE, &value);
        Ok(secret(rows.put(name, mint(), context.user(), seal, &change).await?))
    }

    /// Newest first.
    pub async fn secret_versions(&self, context: &OrgContext, name: &SecretName) -> Result<Vec<SecretVersion>> {
        context.may(Action::Read, Noun::Secret)?;
        let versions = self.store().tenant(&context.scope).secrets().versions(name).await?;
        Ok(versions
            .into_iter()
            .map(|one| SecretVersion { version: one.version, created_at: one.created_at, created_by: one.created_by })
            .collect())
    }

    pub async fn delete_secret(&self, context: &OrgContext, name: &SecretName) -> Result<()> {
        context.may(Action::Delete, Noun::Secret)?;
        let data = json!({ "secret": name.as_str() });
        let change = Change {
            audit: Some(context.audit("secret.delete", name.to_string(), json!({}))),
            events: vec![org_event("secret.deleted", format!("The secret {name} was deleted."), data)],
            ..Change::default()
        };
        Ok(self.store().tenant(&context.scope).secrets().delete(name, &change).await?)
    }
}
