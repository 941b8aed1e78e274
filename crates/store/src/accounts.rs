//! People, their sessions, and the look-ups that turn a credential into a scope.

use std::net::IpAddr;

use clawhq_domain::Millis;
use clawhq_domain::access::Role;
use clawhq_domain::ids::{ApiKeyId, OrgId, SessionId, UserId};
use clawhq_domain::names::{Email, OrgSlug};
use sea_orm::{ColumnTrait, ConnectionTrait, EntityTrait, QueryFilter, QueryOrder, QueryResult, QuerySelect, Value};
use sha2::Digest as _;

use crate::entity::session;
use crate::error::{Limit, OrStore, Result, StoreError};
use crate::orgs::{Membership, NewOrg, Org, insert_org};
use crate::row::{Id, Row, bytes, millis};
use crate::tx::{in_transaction, reading, sql};
use crate::{Store, TenantScope, UserScope};

/// SHA-256 of a random token: all the database keeps of it. Tokens have 256 random bits, so no salt or stretching.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct TokenHash(pub(crate) [u8; 32]);

impl TokenHash {
    pub fn of(token: &str) -> Self {
        Self(sha2::Sha256::digest(token.as_bytes()).into())
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    pub id: UserId,
    pub email: Email,
    pub created_at: Millis,
}

impl User {
    fn read(row: &Row<'_>) -> Result<Self> {
        Ok(Self {
            id: row.id("user_id")?,
            email: row.parse("email", |text| Email::parse(text).ok())?,
            created_at: row.millis("user_created_at")?,
        })
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Session {
    pub id: SessionId,
    pub created_at: Millis,
    pub last_seen_at: Millis,
    pub expires_at: Millis,
    pub ip: Option<String>,
    pub user_agent: Option<String>,
}

impl From<session::Model> for Session {
    fn from(model: session::Model) -> Self {
        Self {
            id: SessionId::from_uuid(model.id),
            created_at: millis(model.created_at),
            last_seen_at: millis(model.last_seen_at),
            expires_at: millis(model.expires_at),
            ip: model.ip,
            user_agent: model.user_agent,
        }
    }
}

pub struct NewSession {
    pub id: SessionId,
    pub token: TokenHash,
    /// From now.
    pub lifetime_ms: Millis,
    pub ip: Option<IpAddr>,
    /// At most 512 bytes are kept.
    pub user_agent: Option<String>,
}

/// A first org with its owner, and the owner signed in.
pub struct NewAccount {
    pub user: UserId,
    pub email: Email,
    /// A PHC string.
    pub password_hash: String,
    pub org: NewOrg,
    pub session: NewSession,
}

/// A valid session.
#[derive(Clone, Debug)]
pub struct SignedIn {
    pub scope: UserScope,
    pub user: User,
    pub session: Session,
}

/// What came with a request, hashed.
#[derive(Clone, Copy)]
pub enum Credential {
    Session(TokenHash),
    ApiKey(TokenHash),
}

/// `{org}` of a path.
#[derive(Clone, Debug)]
pub enum OrgRef {
    Id(OrgId),
    Slug(OrgSlug),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Principal {
    User { user: UserId, session: SessionId },
    ApiKey { key: ApiKeyId, created_by: Option<UserId> },
}

/// A credential that may act for an org.
#[derive(Clone, Debug)]
pub struct Authenticated {
    pub scope: TenantScope,
    pub principal: Principal,
    pub role: Role,
    pub org: Org,
    /// Of the org's tier.
    pub rate_per_min: u32,
    /// The session was last marked as seen this long ago; 0 for an API key.
    pub seen_ms_ago: Millis,
}

/// The outcome of [`Accounts::enter`].
#[derive(Clone, Debug)]
pub enum Entry {
    /// No such credential, or no longer.
    Unauthenticated,
    /// The credential is valid; the org does not exist or is not theirs: one 404.
    NoSuchOrg,
    Entered(Box<Authenticated>),
}

/// Before anybody is known.
#[derive(Clone, Copy)]
pub struct Accounts<'s> {
    pub(crate) store: &'s Store,
}

const INSERT_SESSION: &str = "insert into sessions (id, user_id, token_hash, ip, user_agent, expires_at)
    values ($1, $2, $3, $4, $5, now() + $6 * interval '1 millisecond')
    returning id, created_at, last_seen_at, expires_at, ip, user_agent";

fn read_session(row: &QueryResult) -> Result<Session> {
    let row = Row::new(row, "sessions", "id");
    Ok(Session {
        id: row.id("id")?,
        created_at: row.millis("created_at")?,
        last_seen_at: row.millis("last_seen_at")?,
        expires_at: row.millis("expires_at")?,
        ip: row.get("ip")?,
        user_agent: row.get("user_agent")?,
    })
}

async fn insert_session(db: &impl ConnectionTrait, user: UserId, new: &NewSession) -> Result<Session> {
    let agent = new.user_agent.as_ref().map(|agent| {
        let mut end = agent.len().min(512);
        while !agent.is_char_boundary(end) {
            end -= 1;
        }
        agent[..end].to_owned()
    });
    let values = [
        new.id.value(),
        user.value(),
        bytes(&new.token.0),
        Value::from(new.ip.map(|ip| ip.to_string())),
        Value::from(agent),
        Value::from(new.lifetime_ms as f64),
    ];
    let row = db.query_one_raw(sql(INSERT_SESSION, values)).await.or_store()?;
    read_session(&row.ok_or(StoreError::NotFound("user"))?)
}

impl Accounts<'_> {
    /// User, org, membership, counters, data key and session in one transaction.
    ///
    /// [`StoreError::AlreadyExists`] with `Email` or `OrgSlug`.
    pub async fn sign_up(self, new: &NewAccount) -> Result<SignedIn> {
        in_transaction!(self.store.begin(), |tx| {
            let insert = "insert into users (id, email, password_hash) values ($1, $2, $3)
                returning id as user_id, email, created_at as user_created_at";
            let values = [new.user.value(), new.email.as_str().into(), new.password_hash.as_str().into()];
            let row = tx.query_one_raw(sql(insert, values)).await.or_store()?;
            let user = User::read(&Row::new(&row.ok_or(StoreError::NotFound("user"))?, "users", "user_id"))?;
            insert_org(&tx, &new.org, new.user).await?;
            let session = insert_session(&tx, new.user, &new.session).await?;
            Ok(SignedIn { scope: UserScope::new(new.user, session.id), user, session })
        })
    }

    /// Who has this address, and the hash their password must match; the caller verifies it.
    pub async fn password(self, email: &Email) -> Result<Option<(User, String)>> {
        let select = "select id as user_id, email, created_at as user_created_at, password_hash
            from users where lower(email) = lower($1)";
        let db = &self.store.system;
        let row = reading!(self.store.pool, db.query_one_raw(sql(select, [email.as_str().into()])))?;
        let Some(row) = row else { return Ok(None) };
        let row = Row::new(&row, "users", "user_id");
        Ok(Some((User::read(&row)?, row.get("password_hash")?)))
    }

    /// Opens a session for a person whose password was verified just now.
    pub async fn sign_in(self, user: &User, new: &NewSession) -> Result<SignedIn> {
        let session = in_transaction!(self.store.begin(), |tx| { insert_session(&tx, user.id, new).await })?;
        Ok(SignedIn { scope: UserScope::new(user.id, session.id), user: user.clone(), session })
    }

    /// A session by its token; `None` when it is unknown or over.
    pub async fn session(self, token: &TokenHash) -> Result<Option<SignedIn>> {
        let select = "select s.id, s.created_at, s.last_seen_at, s.expires_at, s.ip, s.user_agent,
                u.id as user_id, u.email, u.created_at as user_created_at
            from sessions s join users u on u.id = s.user_id
            where s.token_hash = $1 and s.expires_at > now()";
        let db = &self.store.system;
        let row = reading!(self.store.pool, db.query_one_raw(sql(select, [bytes(&token.0)])))?;
        let Some(row) = row else { return Ok(None) };
        let session = read_session(&row)?;
        let user = User::read(&Row::new(&row, "users", "user_id"))?;
        Ok(Some(SignedIn { scope: UserScope::new(user.id, session.id), user, session }))
    }

    /// Marks a session as seen. Call it when `last_seen_at` is older than a minute or so, not with every request.
    pub async fn touch(self, session: SessionId) -> Result<()> {
        let update = "update sessions set last_seen_at = now() where id = $1";
        in_transaction!(crate::tx::Tx::begin(&self.store.relaxed, "BEGIN"), |tx| {
            tx.execute_raw(sql(update, [session.value()])).await.or_store().map(drop)
        })
    }

    /// Marks an API key as used, at most once a minute.
    pub async fn touch_key(self, key: ApiKeyId) -> Result<()> {
        let update = "update api_keys set last_used_at = now()
            where id = $1 and (last_used_at is null or last_used_at < now() - interval '1 minute')";
        in_transaction!(crate::tx::Tx::begin(&self.store.relaxed, "BEGIN"), |tx| {
            tx.execute_raw(sql(update, [key.value()])).await.or_store().map(drop)
        })
    }

    /// One query from a credential and the path's org to everything a request needs to go on.
    pub async fn enter(self, credential: &Credential, org: &OrgRef) -> Result<Entry> {
        // One row when the credential is valid; the org's columns are null when it is not theirs.
        let by_session = "select s.id as session_id, s.user_id, null::uuid as key_id, null::uuid as created_by,
                (extract(epoch from now() - s.last_seen_at) * 1000)::bigint as seen_ms_ago, o.*
            from sessions s
            left join lateral (
                select o.id, o.slug, o.name, o.tier, o.version, o.created_at, m.role, t.rate_per_min
                from orgs o join memberships m on m.org_id = o.id and m.user_id = s.user_id join tiers t on t.name = o.tier
                where o.id = $2 or o.slug = $3
            ) o on true
            where s.token_hash = $1 and s.expires_at > now()";
        let by_key = "select null::uuid as session_id, null::uuid as user_id, k.id as key_id, k.created_by,
                0::bigint as seen_ms_ago, o.*
            from api_keys k
            left join lateral (
                select o.id, o.slug, o.name, o.tier, o.version, o.created_at, k.role, t.rate_per_min
                from orgs o join tiers t on t.name = o.tier
                where o.id = k.org_id and (o.id = $2 or o.slug = $3)
            ) o on true
            where k.hash = $1 and k.revoked_at is null and (k.expires_at is null or k.expires_at > now())";
        let (text, hash) = match credential {
            Credential::Session(hash) => (by_session, hash),
            Credential::ApiKey(hash) => (by_key, hash),
        };
        let (id, slug) = match org {
            OrgRef::Id(id) => (Some(id.uuid()), None),
            OrgRef::Slug(slug) => (None, Some(slug.to_string())),
        };
        let db = &self.store.system;
        let row = reading!(
            self.store.pool,
            db.query_one_raw(sql(text, [bytes(&hash.0), Value::Uuid(id), slug.clone().into()]))
        )?;
        let Some(row) = row else { return Ok(Entry::Unauthenticated) };
        let row = Row::new(&row, "orgs", "id");
        let Some(org) = row.id_opt::<OrgId>("id")? else { return Ok(Entry::NoSuchOrg) };
        let principal = match (row.id_opt("session_id")?, row.id_opt("user_id")?, row.id_opt("key_id")?) {
            (Some(session), Some(user), _) => Principal::User { user, session },
            (_, _, Some(key)) => Principal::ApiKey { key, created_by: row.id_opt("created_by")? },
            _ => return Err(row.corrupt("id")),
        };
        Ok(Entry::Entered(Box::new(Authenticated {
            scope: TenantScope::new(org),
            principal,
            role: row.parse("role", Role::parse)?,
            org: Org::read(&row)?,
            rate_per_min: row.unsigned("rate_per_min")?,
            seen_ms_ago: row.get("seen_ms_ago")?,
        })))
    }

    /// The orgs an API key may act for: one, or none when the key is unknown.
    pub async fn key_org(self, hash: &TokenHash) -> Result<Option<OrgId>> {
        let select = "select org_id from api_keys
            where hash = $1 and revoked_at is null and (expires_at is null or expires_at > now())";
        let db = &self.store.system;
        let row = reading!(self.store.pool, db.query_one_raw(sql(select, [bytes(&hash.0)])))?;
        row.map(|row| Row::new(&row, "api_keys", "org_id").id("org_id")).transpose()
    }

    /// Removes sessions that are over, some thousands in one call; returns how many.
    pub async fn sweep_sessions(self) -> Result<u64> {
        let delete = "delete from sessions where id in (select id from sessions where expires_at < now() limit 5000)";
        let done = self.store.system.execute_raw(sql(delete, [])).await;
        Ok(done.or_store()?.rows_affected())
    }
}

/// A person's own rows.
#[derive(Clone, Copy)]
pub struct UserRows<'s> {
    pub(crate) store: &'s Store,
    pub(crate) scope: UserScope,
}

impl UserRows<'_> {
    /// The orgs they belong to, oldest first; at most 200.
    pub async fn orgs(self) -> Result<Vec<Membership>> {
        let select = "select o.id, o.slug, o.name, o.tier, o.version, o.created_at, m.role
            from memberships m join orgs o on o.id = m.org_id where m.user_id = $1 order by m.created_at, o.id limit 200";
        let db = &self.store.system;
        let rows = reading!(self.store.pool, db.query_all_raw(sql(select, [self.scope.user().value()])))?;
        rows.iter()
            .map(|row| {
                let row = Row::new(row, "orgs", "id");
                Ok(Membership { org: Org::read(&row)?, role: row.parse("role", Role::parse)? })
            })
            .collect()
    }

    /// Another org with them as its owner.
    /// `most` is how many orgs a person may own.
    pub async fn create_org(self, new: &NewOrg, most: u32) -> Result<Org> {
        in_transaction!(self.store.begin(), |tx| {
            // Their orgs are counted one after the other.
            let person = "select id from users where id = $1 for no key update";
            tx.query_one_raw(sql(person, [self.scope.user().value()])).await.or_store()?;
            let owned = "select count(*) < $2 as may from memberships where user_id = $1 and role = 'owner'";
            let values = [self.scope.user().value(), Value::from(i64::from(most))];
            let row = tx.query_one_raw(sql(owned, values)).await.or_store()?;
            let may = row.map(|row| Row::new(&row, "memberships", "user_id").get("may")).transpose()?;
            if may != Some(true) {
                return Err(StoreError::LimitReached(Limit::OrgsOwned { allowed: most }));
            }
            insert_org(&tx, new, self.scope.user()).await
        })
    }

    /// Their live sessions, newest first; at most 200.
    pub async fn sessions(self) -> Result<Vec<Session>> {
        let find = || {
            session::Entity::find()
                .filter(session::Column::UserId.eq(self.scope.user().uuid()))
                .filter(session::Column::ExpiresAt.gt(chrono::Utc::now()))
                .order_by_desc(session::Column::CreatedAt)
                .limit(200)
        };
        let models = reading!(self.store.pool, find().all(&self.store.system))?;
        Ok(models.into_iter().map(Session::from).collect())
    }

    /// Ends one of their sessions, at once; `NotFound` when it is not theirs.
    pub async fn close_session(self, session: SessionId) -> Result<()> {
        let delete = "delete from sessions where id = $1 and user_id = $2";
        let values = [session.value(), self.scope.user().value()];
        let done = self.store.system.execute_raw(sql(delete, values)).await.or_store()?;
        if done.rows_affected() == 1 { Ok(()) } else { Err(StoreError::NotFound("session")) }
    }

    /// A new password; every other session of theirs ends.
    pub async fn change_password(self, password_hash: &str) -> Result<()> {
        in_transaction!(self.store.begin(), |tx| {
            let update = "update users set password_hash = $2 where id = $1";
            tx.execute_raw(sql(update, [self.scope.user().value(), password_hash.into()])).await.or_store()?;
            let delete = "delete from sessions where user_id = $1 and id <> $2";
            let values = [self.scope.user().value(), self.scope.session().value()];
            tx.execute_raw(sql(delete, values)).await.or_store().map(drop)
        })
    }
}
