//! Secrets of an org: names, versions, sealed bytes. No plaintext passes through here.

use std::collections::BTreeMap;

use clawhq_domain::Millis;
use clawhq_domain::ids::{SecretId, UserId};
use clawhq_domain::names::SecretName;
use sea_orm::{ColumnTrait, ConnectionTrait, EntityTrait, QueryFilter, QueryOrder, QuerySelect, Value};

use crate::change::Change;
use crate::entity::{secret, secret_version};
use crate::error::{OrStore, Result, StoreError};
use crate::events::record;
use crate::row::{Id, Row, bytes, json, millis, optional};
use crate::tx::{in_transaction, sql};
use crate::{Tenant, idempotency};

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Secret {
    pub id: SecretId,
    pub name: SecretName,
    pub latest_version: u32,
    pub created_at: Millis,
    pub updated_at: Millis,
}

impl TryFrom<secret::Model> for Secret {
    type Error = StoreError;

    fn try_from(model: secret::Model) -> Result<Self> {
        let corrupt = |field| StoreError::corrupt("secrets", model.id, field);
        Ok(Self {
            id: SecretId::from_uuid(model.id),
            name: SecretName::parse(&model.name).map_err(|_| corrupt("name"))?,
            latest_version: u32::try_from(model.latest_version).map_err(|_| corrupt("latest_version"))?,
            created_at: millis(model.created_at),
            updated_at: millis(model.updated_at),
        })
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SecretVersion {
    pub version: u32,
    pub created_by: Option<UserId>,
    pub created_at: Millis,
}

#[derive(Clone, Copy)]
pub struct Secrets<'s> {
    pub(crate) tenant: Tenant<'s>,
}

impl Secrets<'_> {
    /// By name; at most 1000.
    pub async fn list(self) -> Result<Vec<Secret>> {
        let tx = self.tenant.begin().await?;
        let find = secret::Entity::find().filter(secret::Column::OrgId.eq(self.tenant.org.uuid()));
        let models = find.order_by_asc(secret::Column::Name).limit(1000).all(&tx).await.or_store()?;
        models.into_iter().map(Secret::try_from).collect()
    }

    /// Of those names that there are, the newest version and how many bytes it has sealed.
    pub async fn newest(self, names: &[&SecretName]) -> Result<BTreeMap<SecretName, (u32, usize)>> {
        let tx = self.tenant.begin().await?;
        let select = "select s.id, s.name, v.version, octet_length(v.sealed) as bytes from secrets s
            join secret_versions v on v.org_id = s.org_id and v.secret_id = s.id and v.version = s.latest_version
            where s.org_id = $1 and s.name in (select value from jsonb_array_elements_text($2))";
        let names = json(names.iter().map(|name| name.as_str()).collect());
        let rows = tx.query_all_raw(sql(select, [self.tenant.org.value(), names])).await.or_store()?;
        rows.iter()
            .map(|row| {
                let row = Row::new(row, "secrets", "id");
                let name = row.parse("name", |text| SecretName::parse(text).ok())?;
                Ok((name, (row.unsigned("version")?, row.unsigned("bytes")? as usize)))
            })
            .collect()
    }

    /// Newest first; at most 1000.
    pub async fn versions(self, name: &SecretName) -> Result<Vec<SecretVersion>> {
        let tx = self.tenant.begin().await?;
        let secret = self.find(&tx, name).await?;
        let select = "select secret_id, version, created_by, created_at from secret_versions
            where org_id = $1 and secret_id = $2 order by version desc limit 1000";
        let rows = tx.query_all_raw(sql(select, [self.tenant.org.value(), secret.id.value()])).await.or_store()?;
        rows.iter()
            .map(|row| {
                let row = Row::new(row, "secret_versions", "secret_id");
                Ok(SecretVersion {
                    version: row.unsigned("version")?,
                    created_by: row.id_opt("created_by")?,
                    created_at: row.millis("created_at")?,
                })
            })
            .collect()
    }

    async fn find(self, db: &impl ConnectionTrait, name: &SecretName) -> Result<Secret> {
        let find = secret::Entity::find()
            .filter(secret::Column::OrgId.eq(self.tenant.org.uuid()))
            .filter(secret::Column::Name.eq(name.as_str()));
        find.one(db).await.or_store()?.ok_or(StoreError::NotFound("secret"))?.try_into()
    }

    /// A new version. `id` is the secret's if the name is new. `seal` gets the id and version that the sealed bytes are
    /// bound to; it runs inside the transaction, may run again, and must not wait for anything.
    pub async fn put(
        self,
        name: &SecretName,
        id: SecretId,
        created_by: Option<UserId>,
        seal: impl Fn(SecretId, u32) -> Vec<u8> + Send + Sync,
        change: &Change,
    ) -> Result<Secret> {
        in_transaction!(self.tenant.begin(), |tx| {
            idempotency::claim(&tx, self.tenant.org, change, Some(id.uuid())).await?;
            let upsert = "insert into secrets as s (org_id, id, name, latest_version) values ($1, $2, $3, 1)
                on conflict (org_id, name) do update set latest_version = s.latest_version + 1, updated_at = now()
                returning org_id, id, name, latest_version, created_at, updated_at";
            let values = [self.tenant.org.value(), id.value(), name.as_str().into()];
            let row = tx.query_one_raw(sql(upsert, values)).await.or_store()?;
            let row = row.ok_or(StoreError::NotFound("org"))?;
            let row = Row::new(&row, "secrets", "id");
            let secret = Secret {
                id: row.id("id")?,
                name: name.clone(),
                latest_version: row.unsigned("latest_version")?,
                created_at: row.millis("created_at")?,
                updated_at: row.millis("updated_at")?,
            };
            let insert = "insert into secret_versions (org_id, secret_id, version, sealed, created_by)
                values ($1, $2, $3, $4, $5)";
            let values = [
                self.tenant.org.value(),
                secret.id.value(),
                Value::from(secret.latest_version as i32),
                bytes(&seal(secret.id, secret.latest_version)),
                optional(created_by),
            ];
            tx.execute_raw(sql(insert, values)).await.or_store()?;
            record(&tx, self.tenant.org, change).await?;
            Ok(secret)
        })
    }

    /// The sealed bytes of one version, with the secret's id that they are bound to.
    pub async fn sealed(self, name: &SecretName, version: u32) -> Result<(SecretId, Vec<u8>)> {
        let tx = self.tenant.begin().await?;
        let secret = self.find(&tx, name).await?;
        let key = (self.tenant.org.uuid(), secret.id.uuid(), version as i32);
        let model = secret_version::Entity::find_by_id(key).one(&tx).await.or_store()?;
        Ok((secret.id, model.ok_or(StoreError::NotFound("secret version"))?.sealed))
    }

    /// Deletes every version. `InUse` while a workload's current release, or an instance that has not ended, reads it;
    /// older releases merely lose it.
    pub async fn delete(self, name: &SecretName, change: &Change) -> Result<()> {
        in_transaction!(self.tenant.begin(), |tx| {
            let secret = self.find(&tx, name).await?;
            idempotency::claim(&tx, self.tenant.org, change, Some(secret.id.uuid())).await?;
            let lock = "select id from secrets where org_id = $1 and id = $2 for update";
            let values = || [self.tenant.org.value(), secret.id.value()];
            tx.execute_raw(sql(lock, values())).await.or_store()?;
            let used = "select w.id, w.name from workloads w
                where w.org_id = $1 and w.deleted_at is null and exists (
                    select 1 from release_secrets r where r.org_id = $1 and r.secret_id = $2 and (
                        r.release_id = w.release_id
                        or r.release_id in (select i.release_id from instances i
                            where i.org_id = $1 and i.workload_id = w.id and i.ended_at is null)))
                limit 1";
            if let Some(row) = tx.query_one_raw(sql(used, values())).await.or_store()? {
                let name: String = Row::new(&row, "workloads", "id").get("name")?;
                return Err(StoreError::InUse(format!("workload {name}")));
            }
            let unlink = "delete from release_secrets where org_id = $1 and secret_id = $2";
            tx.execute_raw(sql(unlink, values())).await.or_store()?;
            tx.execute_raw(sql("delete from secrets where org_id = $1 and id = $2", values())).await.or_store()?;
            record(&tx, self.tenant.org, change).await
        })
    }
}
