//! People: signing up, in and out, and their sessions.

use clawhq_domain::Reason;
use clawhq_domain::ids::{OrgId, SessionId};
use clawhq_domain::names::{Email, OrgSlug};
use clawhq_runtime::ids::mint;
use clawhq_store::NewOrg;
use clawhq_store::StoreError;
use clawhq_store::Taken;
use clawhq_store::{self as store, Entry, NewAccount, NewSession, OrgRef, Principal, TokenHash};
use zeroize::Zeroizing;

use crate::caller::{Credential, OrgContext, Origin, Who};
use crate::model::{Membership, SessionInfo, SignedIn, User};
use crate::password::Passwords;
use crate::{App, Error, Result};

/// What an API key begins with, so that secret scanners and people know one when they see it.
pub const API_KEY_PREFIX: &str = "chq_";

pub struct SignUp {
    pub email: Email,
    pub password: Zeroizing<String>,
    /// `None`: made of the address's local part.
    pub org_name: Option<String>,
    pub user_agent: Option<String>,
}

/// 256 random bits as 43 characters.
pub(crate) fn fresh_token() -> String {
    let bytes: Zeroizing<[u8; 32]> = Zeroizing::new(rand::random());
    data_encoding::BASE64URL_NOPAD.encode(bytes.as_slice())
}

impl Credential {
    fn hashed(&self) -> store::Credential {
        match self {
            Self::Session(token) => store::Credential::Session(TokenHash::of(token)),
            Self::ApiKey(key) => store::Credential::ApiKey(TokenHash::of(key)),
        }
    }
}

/// A slug from free text, or `org`.
fn slug_of(name: &str) -> String {
    let plain: String = name.to_lowercase().chars().filter(char::is_ascii_alphanumeric).take(14).collect();
    let plain = plain.trim_start_matches(|c: char| c.is_ascii_digit()).to_owned();
    if plain.is_empty() { "org".to_owned() } else { plain }
}

impl App {
    /// A new person with an org of their own, signed in.
    pub async fn sign_up(&self, ask: SignUp, origin: Origin) -> Result<SignedIn> {
        if !self.config().sign_up_open {
            return Err(Error::Refused(
                Reason::new("sign_up_closed", "New accounts are made by the operator here.")
                    .with_hint("Ask them for one."),
            ));
        }
        Passwords::check(&ask.password)?;
        let name = match &ask.org_name {
            Some(name) => org_name(name)?,
            None => ask.email.as_str().split('@').next().unwrap_or("org").chars().take(100).collect(),
        };
        let password_hash = self.0.passwords.hash(ask.password).await?;
        let token = fresh_token();
        let base = slug_of(&name);
        // Slugs are unique; a taken one gets digits. Random, so that how many there are is nobody's to read.
        for attempt in 0..8 {
            let slug =
                if attempt == 0 { base.clone() } else { format!("{base}{:05}", rand::random::<u32>() % 100_000) };
            let new = NewAccount {
                user: mint(),
                email: ask.email.clone(),
                password_hash: password_hash.clone(),
                org: self.new_org(name.clone(), &slug)?,
                session: self.new_session(&token, &ask.user_agent, &origin),
            };
            match self.store().accounts().sign_up(&new).await {
                Err(StoreError::AlreadyExists(Taken::OrgSlug)) => {}
                other => return self.signed_in(other?, token).await,
            }
        }
        Err(Error::Taken("org name"))
    }

    pub async fn sign_in(
        &self,
        email: &str,
        password: Zeroizing<String>,
        user_agent: Option<String>,
        origin: Origin,
    ) -> Result<SignedIn> {
        let known = match Email::parse(email) {
            Ok(email) => self.store().accounts().password(&email).await?,
            Err(_) => None,
        };
        let hash = known.as_ref().map(|(_, hash)| hash.clone());
        let right = self.0.passwords.verify(password, hash).await?;
        let Some((user, _)) = known.filter(|_| right) else { return Err(Error::WrongCredentials) };
        let token = fresh_token();
        let session = self.new_session(&token, &user_agent, &origin);
        let signed_in = self.store().accounts().sign_in(&user, &session).await?;
        self.signed_in(signed_in, token).await
    }

    async fn signed_in(&self, signed_in: store::SignedIn, token: String) -> Result<SignedIn> {
        let orgs = self.store().user(&signed_in.scope).orgs().await?;
        Ok(SignedIn {
            token,
            session: signed_in.session.id,
            expires_at: signed_in.session.expires_at,
            user: user(signed_in.user),
            orgs: orgs.into_iter().map(membership).collect(),
        })
    }

    fn new_session(&self, token: &str, user_agent: &Option<String>, origin: &Origin) -> NewSession {
        NewSession {
            id: mint(),
            token: TokenHash::of(token),
            lifetime_ms: self.config().session_ms,
            ip: origin.ip,
            user_agent: user_agent.clone(),
        }
    }

    pub(crate) fn new_org(&self, name: String, slug: &str) -> Result<NewOrg> {
        let id: OrgId = mint();
        let slug = OrgSlug::parse(slug).map_err(|why| Error::invalid("/slug", Reason::new("name_invalid", why.0)))?;
        Ok(NewOrg { id, slug, name, tier: self.config().default_tier.clone(), key: self.0.keys.first(id) })
    }

    /// Ends the session; ending one that is over is fine.
    pub async fn sign_out(&self, credential: &Credential) -> Result<()> {
        match self.session_of(credential).await {
            Ok(signed_in) => Ok(self.store().user(&signed_in.scope).close_session(signed_in.session.id).await?),
            Err(Error::Unauthenticated) => Ok(()),
            Err(other) => Err(other),
        }
    }

    pub(crate) async fn session_of(&self, credential: &Credential) -> Result<store::SignedIn> {
        match credential {
            Credential::Session(token) => {
                self.store().accounts().session(&TokenHash::of(token)).await?.ok_or(Error::Unauthenticated)
            }
            Credential::ApiKey(key) => match self.store().accounts().key_org(&TokenHash::of(key)).await? {
                // The key is real, but what is asked for belongs to a person.
                Some(_) => Err(Error::Forbidden),
                None => Err(Error::Unauthenticated),
            },
        }
    }

    pub async fn me(&self, credential: &Credential) -> Result<(User, Vec<Membership>)> {
        let signed_in = self.session_of(credential).await?;
        let orgs = self.store().user(&signed_in.scope).orgs().await?;
        Ok((user(signed_in.user), orgs.into_iter().map(membership).collect()))
    }

    pub async fn sessions(&self, credential: &Credential) -> Result<Vec<SessionInfo>> {
        let signed_in = self.session_of(credential).await?;
        let sessions = self.store().user(&signed_in.scope).sessions().await?;
        let current = signed_in.session.id;
        Ok(sessions
            .into_iter()
            .map(|session| SessionInfo {
                id: session.id,
                created_at: session.created_at,
                last_seen_at: session.last_seen_at,
                expires_at: session.expires_at,
                user_agent: session.user_agent,
                ip: session.ip,
                current: session.id == current,
            })
            .collect())
    }

    pub async fn revoke_session(&self, credential: &Credential, session: SessionId) -> Result<()> {
        let signed_in = self.session_of(credential).await?;
        Ok(self.store().user(&signed_in.scope).close_session(session).await?)
    }

    /// The one look-up at the door of every org route. An org that is missing and one that is somebody else's are the
    /// same `NotFound`.
    pub async fn enter(&self, credential: &Credential, org: &str, origin: Origin) -> Result<OrgContext> {
        let reference = match (org.parse::<OrgId>(), OrgSlug::parse(org)) {
            (Ok(id), _) => Some(OrgRef::Id(id)),
            (_, Ok(slug)) => Some(OrgRef::Slug(slug)),
            _ => None,
        };
        // A name no org can have still costs the look-up: who is not signed in hears 401 first.
        let unlikely = OrgRef::Id(OrgId::from_u128(0));
        let entry =
            self.store().accounts().enter(&credential.hashed(), reference.as_ref().unwrap_or(&unlikely)).await?;
        let entered = match entry {
            Entry::Unauthenticated => return Err(Error::Unauthenticated),
            Entry::NoSuchOrg => return Err(Error::NotFound("org")),
            Entry::Entered(entered) => *entered,
        };
        let who = match entered.principal {
            Principal::User { user, session } => Who::Session { user, session },
            Principal::ApiKey { key, .. } => Who::ApiKey { key },
        };
        self.mark_seen(who, entered.seen_ms_ago);
        Ok(OrgContext {
            scope: entered.scope,
            org: entered.org.id,
            slug: entered.org.slug.to_string(),
            name: entered.org.name,
            tier: entered.org.tier,
            role: entered.role,
            who,
            origin,
            rate_per_min: entered.rate_per_min,
        })
    }

    /// Beside the request: when it was seen is for people to read, not for the answer to wait for.
    fn mark_seen(&self, who: Who, seen_ms_ago: i64) {
        const MINUTE_MS: i64 = 60_000;
        let app = self.clone();
        match who {
            Who::Session { session, .. } if seen_ms_ago > MINUTE_MS => {
                tokio::spawn(async move { app.store().accounts().touch(session).await });
            }
            Who::ApiKey { key } if self.0.keys.first_use_this_minute(key, self.now()) => {
                tokio::spawn(async move { app.store().accounts().touch_key(key).await });
            }
            _ => {}
        }
    }
}

/// 1 to 100 visible characters.
pub(crate) fn org_name(name: &str) -> Result<String> {
    let name = name.trim();
    let length = name.chars().count();
    if length == 0 || length > 100 || name.chars().any(char::is_control) {
        return Err(Error::invalid(
            "/name",
            Reason::new("name_invalid", "A name has 1 to 100 characters and no control characters."),
        ));
    }
    Ok(name.to_owned())
}

fn user(user: store::User) -> User {
    User { id: user.id, email: user.email.to_string(), created_at: user.created_at }
}

fn membership(membership: clawhq_store::Membership) -> Membership {
    let org = membership.org;
    Membership { org: org.id, slug: org.slug.to_string(), name: org.name, tier: org.tier, role: membership.role }
}

impl From<StoreError> for Error {
    fn from(error: StoreError) -> Self {
        use clawhq_store::{Earlier, Limit};
        match error {
            StoreError::NotFound(what) => Self::NotFound(what),
            StoreError::AlreadyExists(taken) => Self::Taken(match taken {
                Taken::Email => "e-mail address",
                Taken::OrgSlug => "org name",
                Taken::WorkloadName => "workload name",
                Taken::Member => "membership",
                Taken::ApiKeyName => "API key name",
                Taken::NodeName => "node name",
                Taken::Id => "id",
            }),
            StoreError::Conflict { current } => Self::Conflict { current },
            StoreError::InUse(by) => Self::Refused(
                Reason::new("in_use", format!("It is in use by {by}.")).with_hint("Remove that use first."),
            ),
            StoreError::LimitReached(Limit::Workloads { allowed }) => Self::Refused(
                Reason::new("quota_exceeded", format!("The tier allows {allowed} workloads and they are all in use."))
                    .with_hint("Delete a workload or choose a larger tier."),
            ),
            StoreError::LimitReached(Limit::OrgsOwned { allowed }) => Self::Refused(
                Reason::new("quota_exceeded", format!("One person owns {allowed} orgs at most."))
                    .with_hint("Use one that is there, or make somebody else the owner of one."),
            ),
            StoreError::LimitReached(Limit::NoWarmSlot) => Self::Refused(
                Reason::new("no_warm_slot", "No warm slot is ready and the request required one.")
                    .with_hint("Ask for warm: prefer to start cold instead, or try again in a moment."),
            ),
            StoreError::Replay(earlier) => match *earlier {
                Earlier::Response(response) => Self::Replay(Box::new(response)),
                Earlier::Unanswered { effect: Some(effect), .. } => Self::Unanswered { effect },
                Earlier::Unanswered { effect: None, .. } => Self::InProgress { retry_after_ms: 1_000 },
                Earlier::Mismatch => Self::KeyReused,
            },
            StoreError::Retryable | StoreError::Unavailable(_) => Self::Unavailable("database"),
            other @ (StoreError::Corrupt { .. } | StoreError::Bug(_)) => Self::internal("store", other),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slugs_come_of_any_name() {
        for (name, slug) in [("Acme, Inc.", "acmeinc"), ("42 things", "things"), ("日本", "org"), ("", "org")] {
            assert_eq!(slug_of(name), slug);
            assert!(OrgSlug::parse(&format!("{}99999", slug_of(name))).is_ok());
        }
    }

    #[test]
    fn tokens_are_long_and_never_alike() {
        let (one, two) = (fresh_token(), fresh_token());
        assert_eq!(one.len(), 43);
        assert_ne!(one, two);
    }
}
