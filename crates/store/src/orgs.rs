//! Orgs, members, API keys and the orgs' wrapped data keys.

use clawhq_domain::Millis;
use clawhq_domain::access::Role;
use clawhq_domain::ids::{ApiKeyId, OrgId, UserId};
use clawhq_domain::names::{Email, OrgSlug};
use sea_orm::{ColumnTrait, ConnectionTrait, EntityTrait, QueryFilter, QueryOrder, QuerySelect, Value};

use crate::accounts::TokenHash;
use crate::change::Change;
use crate::entity::{api_key, org};
use crate::error::{OrStore, Result, StoreError, Taken};
use crate::events::record;
use crate::row::{Id, Row, bytes, millis, optional};
use crate::tx::{in_transaction, sql};
use crate::{Tenant, idempotency};

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Org {
    pub id: OrgId,
    pub slug: OrgSlug,
    pub name: String,
    /// By name; see the catalogue.
    pub tier: String,
    pub version: i64,
    pub created_at: Millis,
}

impl Org {
    /// From columns named as in `orgs`.
    pub(crate) fn read(row: &Row<'_>) -> Result<Self> {
        Ok(Self {
            id: row.id("id")?,
            slug: row.parse("slug", |text| OrgSlug::parse(text).ok())?,
            name: row.get("name")?,
            tier: row.get("tier")?,
            version: row.get("version")?,
            created_at: row.millis("created_at")?,
        })
    }
}

impl TryFrom<org::Model> for Org {
    type Error = StoreError;

    fn try_from(model: org::Model) -> Result<Self> {
        let org::Model { id, slug, name, tier, version, created_at } = model;
        Ok(Self {
            id: OrgId::from_uuid(id),
            slug: OrgSlug::parse(&slug).map_err(|_| StoreError::corrupt("orgs", id, "slug"))?,
            name,
            tier,
            version,
            created_at: millis(created_at),
        })
    }
}

/// A data key wrapped by the key ring; the database never sees another form.
#[derive(Clone, PartialEq, Eq)]
pub struct OrgKey {
    pub dek_id: u32,
    pub kek_version: u32,
    pub sealed: Vec<u8>,
}

pub struct NewOrg {
    pub id: OrgId,
    pub slug: OrgSlug,
    pub name: String,
    pub tier: String,
    pub key: OrgKey,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Membership {
    pub org: Org,
    pub role: Role,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    pub user: UserId,
    pub email: Email,
    pub role: Role,
    pub joined_at: Millis,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiKey {
    pub id: ApiKeyId,
    pub name: String,
    pub role: Role,
    pub prefix: String,
    pub created_by: Option<UserId>,
    pub created_at: Millis,
    pub expires_at: Option<Millis>,
    pub last_used_at: Option<Millis>,
}

pub struct NewApiKey {
    pub id: ApiKeyId,
    pub name: String,
    pub role: Role,
    pub hash: TokenHash,
    /// At most 16 bytes, shown for recognition.
    pub prefix: String,
    pub created_by: Option<UserId>,
    pub lifetime_ms: Option<Millis>,
}

pub(crate) async fn insert_org(db: &impl ConnectionTrait, new: &NewOrg, owner: UserId) -> Result<Org> {
    let insert = "with
        o as (insert into orgs (id, slug, name, tier) values ($1, $2, $3, $4)
              returning id, slug, name, tier, version, created_at),
        c as (insert into org_counters (org_id) select id from o),
        k as (insert into org_keys (org_id, dek_id, kek_version, sealed) select id, $5, $6, $7 from o),
        m as (insert into memberships (org_id, user_id, role) select id, $8, 'owner' from o)
        select * from o";
    let values = [
        new.id.value(),
        new.slug.as_str().into(),
        new.name.as_str().into(),
        new.tier.as_str().into(),
        Value::from(new.key.dek_id as i32),
        Value::from(new.key.kek_version as i32),
        bytes(&new.key.sealed),
        owner.value(),
    ];
    let row = db.query_one_raw(sql(insert, values)).await.or_store()?.ok_or(StoreError::NotFound("org"))?;
    Org::read(&Row::new(&row, "orgs", "id"))
}

/// The org itself, its members and its data keys.
#[derive(Clone, Copy)]
pub struct OrgRows<'s> {
    pub(crate) tenant: Tenant<'s>,
}

impl OrgRows<'_> {
    pub async fn get(self) -> Result<Org> {
        let tx = self.tenant.begin().await?;
        let model = org::Entity::find_by_id(self.tenant.org.uuid()).one(&tx).await.or_store()?;
        model.ok_or(StoreError::NotFound("org"))?.try_into()
    }

    /// `if_version`: refuse with `Conflict` when it is at another one.
    pub async fn rename(self, name: &str, if_version: Option<i64>, change: &Change) -> Result<Org> {
        in_transaction!(self.tenant.begin(), |tx| {
            idempotency::claim(&tx, self.tenant.org, change, Some(self.tenant.org.uuid())).await?;
            let update = "update orgs set name = $2, version = version + 1, updated_at = now()
                where id = $1 and ($3::bigint is null or version = $3)
                returning id, slug, name, tier, version, created_at";
            let values = [self.tenant.org.value(), name.into(), Value::from(if_version)];
            let Some(row) = tx.query_one_raw(sql(update, values)).await.or_store()? else {
                let model = org::Entity::find_by_id(self.tenant.org.uuid()).one(&tx).await.or_store()?;
                return Err(model.map_or(StoreError::NotFound("org"), |m| StoreError::Conflict { current: m.version }));
            };
            record(&tx, self.tenant.org, change).await?;
            Org::read(&Row::new(&row, "orgs", "id"))
        })
    }

    /// Everybody in it, oldest membership first; at most 1000.
    pub async fn members(self) -> Result<Vec<Member>> {
        let tx = self.tenant.begin().await?;
        let select =
            "select m.user_id, u.email, m.role, m.created_at from memberships m join users u on u.id = m.user_id
            where m.org_id = $1 order by m.created_at, m.user_id limit 1000";
        let rows = tx.query_all_raw(sql(select, [self.tenant.org.value()])).await.or_store()?;
        rows.iter()
            .map(|row| {
                let row = Row::new(row, "memberships", "user_id");
                Ok(Member {
                    user: row.id("user_id")?,
                    email: row.parse("email", |text| Email::parse(text).ok())?,
                    role: row.parse("role", Role::parse)?,
                    joined_at: row.millis("created_at")?,
                })
            })
            .collect()
    }

    /// Adds a person who has an account; `NotFound("user")` when nobody has the address.
    pub async fn add_member(self, email: &Email, role: Role, change: &Change) -> Result<Member> {
        // Who has an address is not the tenant's to search, so this one look-up is the system's.
        let user = self.tenant.store.accounts().password(email).await?.map(|(user, _)| user);
        let user = user.ok_or(StoreError::NotFound("user"))?;
        in_transaction!(self.tenant.begin(), |tx| {
            idempotency::claim(&tx, self.tenant.org, change, Some(user.id.uuid())).await?;
            let insert =
                "insert into memberships (org_id, user_id, role) values ($1, $2, $3) returning created_at, user_id";
            let values = [self.tenant.org.value(), user.id.value(), role.name().into()];
            let row = tx.query_one_raw(sql(insert, values)).await.or_store()?;
            let row = row.ok_or(StoreError::NotFound("user"))?;
            record(&tx, self.tenant.org, change).await?;
            let joined_at = Row::new(&row, "memberships", "user_id").millis("created_at")?;
            Ok(Member { user: user.id, email: user.email.clone(), role, joined_at })
        })
    }

    /// `InUse` when they are the last owner. API keys that they made are revoked: whoever made one may know it still.
    pub async fn remove_member(self, user: UserId, change: &Change) -> Result<()> {
        in_transaction!(self.tenant.begin(), |tx| {
            idempotency::claim(&tx, self.tenant.org, change, Some(user.uuid())).await?;
            // All owners' rows are locked in one order, so that two owners cannot remove each other at once.
            let owners =
                "select user_id from memberships where org_id = $1 and role = 'owner' order by user_id for update";
            let owners = tx.query_all_raw(sql(owners, [self.tenant.org.value()])).await.or_store()?;
            let owners = owners
                .iter()
                .map(|row| Row::new(row, "memberships", "user_id").id::<UserId>("user_id"))
                .collect::<Result<Vec<_>>>()?;
            if owners == [user] {
                return Err(StoreError::InUse("the org, which needs an owner".to_owned()));
            }
            let delete = "delete from memberships where org_id = $1 and user_id = $2";
            let done = tx.execute_raw(sql(delete, [self.tenant.org.value(), user.value()])).await.or_store()?;
            if done.rows_affected() == 0 {
                return Err(StoreError::NotFound("member"));
            }
            let revoke = "update api_keys set revoked_at = now()
                where org_id = $1 and created_by = $2 and revoked_at is null";
            tx.execute_raw(sql(revoke, [self.tenant.org.value(), user.value()])).await.or_store()?;
            record(&tx, self.tenant.org, change).await
        })
    }

    /// The wrapped data keys, newest last.
    pub async fn keys(self) -> Result<Vec<OrgKey>> {
        let tx = self.tenant.begin().await?;
        let select = "select org_id, dek_id, kek_version, sealed from org_keys where org_id = $1 order by dek_id";
        let rows = tx.query_all_raw(sql(select, [self.tenant.org.value()])).await.or_store()?;
        rows.iter().map(|row| read_key(&Row::new(row, "org_keys", "org_id"))).collect()
    }

    /// Workloads (not deleted), secrets, members and API keys, for `domain::quota`.
    pub async fn usage(self) -> Result<clawhq_domain::quota::Usage> {
        let tx = self.tenant.begin().await?;
        let select = "select $1::uuid as org_id,
            (select workloads from org_counters where org_id = $1) as workloads,
            (select count(*)::int from secrets where org_id = $1) as secrets,
            (select count(*)::int from memberships where org_id = $1) as members,
            (select count(*)::int from api_keys where org_id = $1 and revoked_at is null) as api_keys";
        let row = tx.query_one_raw(sql(select, [self.tenant.org.value()])).await.or_store()?;
        let row = row.ok_or(StoreError::NotFound("org"))?;
        let row = Row::new(&row, "org_counters", "org_id");
        Ok(clawhq_domain::quota::Usage {
            workloads: row.unsigned("workloads")?,
            secrets: row.unsigned("secrets")?,
            members: row.unsigned("members")?,
            api_keys: row.unsigned("api_keys")?,
        })
    }
}

pub(crate) fn read_key(row: &Row<'_>) -> Result<OrgKey> {
    Ok(OrgKey {
        dek_id: row.unsigned("dek_id")?,
        kek_version: row.unsigned("kek_version")?,
        sealed: row.get("sealed")?,
    })
}

#[derive(Clone, Copy)]
pub struct ApiKeys<'s> {
    pub(crate) tenant: Tenant<'s>,
}

impl TryFrom<api_key::Model> for ApiKey {
    type Error = StoreError;

    fn try_from(model: api_key::Model) -> Result<Self> {
        Ok(Self {
            id: ApiKeyId::from_uuid(model.id),
            role: Role::parse(&model.role).ok_or_else(|| StoreError::corrupt("api_keys", model.id, "role"))?,
            name: model.name,
            prefix: model.prefix,
            created_by: model.created_by.map(UserId::from_uuid),
            created_at: millis(model.created_at),
            expires_at: model.expires_at.map(millis),
            last_used_at: model.last_used_at.map(millis),
        })
    }
}

impl ApiKeys<'_> {
    /// Those not revoked, newest first; at most 1000.
    pub async fn list(self) -> Result<Vec<ApiKey>> {
        let tx = self.tenant.begin().await?;
        let models = api_key::Entity::find()
            .filter(api_key::Column::OrgId.eq(self.tenant.org.uuid()))
            .filter(api_key::Column::RevokedAt.is_null())
            .order_by_desc(api_key::Column::Id)
            .limit(1000)
            .all(&tx)
            .await
            .or_store()?;
        models.into_iter().map(ApiKey::try_from).collect()
    }

    pub async fn create(self, new: &NewApiKey, change: &Change) -> Result<ApiKey> {
        in_transaction!(self.tenant.begin(), |tx| {
            idempotency::claim(&tx, self.tenant.org, change, Some(new.id.uuid())).await?;
            let insert = "insert into api_keys (org_id, id, name, role, hash, prefix, created_by, expires_at)
                values ($1, $2, $3, $4, $5, $6, $7, now() + $8 * interval '1 millisecond')
                returning id, created_at, expires_at";
            let values = [
                self.tenant.org.value(),
                new.id.value(),
                new.name.as_str().into(),
                new.role.name().into(),
                bytes(&new.hash.0),
                new.prefix.as_str().into(),
                optional(new.created_by),
                Value::from(new.lifetime_ms.map(|ms| ms as f64)),
            ];
            let row = tx.query_one_raw(sql(insert, values)).await.or_store()?;
            let row = row.ok_or(StoreError::AlreadyExists(Taken::Id))?;
            record(&tx, self.tenant.org, change).await?;
            let row = Row::new(&row, "api_keys", "id");
            Ok(ApiKey {
                id: new.id,
                name: new.name.clone(),
                role: new.role,
                prefix: new.prefix.clone(),
                created_by: new.created_by,
                created_at: row.millis("created_at")?,
                expires_at: row.millis_opt("expires_at")?,
                last_used_at: None,
            })
        })
    }

    /// From the commit on, no request gets in with it.
    pub async fn revoke(self, key: ApiKeyId, change: &Change) -> Result<()> {
        in_transaction!(self.tenant.begin(), |tx| {
            idempotency::claim(&tx, self.tenant.org, change, Some(key.uuid())).await?;
            let update = "update api_keys set revoked_at = now() where org_id = $1 and id = $2 and revoked_at is null";
            let done = tx.execute_raw(sql(update, [self.tenant.org.value(), key.value()])).await.or_store()?;
            if done.rows_affected() == 0 {
                return Err(StoreError::NotFound("API key"));
            }
            record(&tx, self.tenant.org, change).await
        })
    }
}
