//! Customers and their sub-users: who may come in, and how much of what.

use crate::dest::Net;
use crate::tally::{Counter, Tally, Way};
use crate::target::{self, Target, TargetError};
use parking_lot::{Mutex, RwLock};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};
use subtle::ConstantTimeEq as _;

/// Limits of an account. Absent: not limited.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Bytes, both ways together, in a period.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub quota_bytes: Option<u64>,
    /// The period starts anew with each month (UTC). Otherwise the quota is for good.
    pub quota_monthly: bool,
    /// Bytes a second, both ways together.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes_per_second: Option<u64>,
    /// Tunnels at a time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tunnels: Option<u32>,
    /// New tunnels a second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub requests_per_second: Option<u32>,
}

/// A customer or sub-user as configured.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct AccountSpec {
    /// Letters, digits, `_` and `-`.
    pub name: String,
    /// SHA-256 of each key that opens the account, in hex.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub key_sha256: Vec<String>,
    /// Addresses that need no key (`allow_ips`), or blocks such as 192.0.2.0/24.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub allow_ips: Vec<String>,
    /// With this, a key counts only from `allow_ips`.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub only_from_allowed: bool,
    /// No new tunnels.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub suspended: bool,
    #[serde(default)]
    pub limits: Limits,
    /// Sub-users, who log in as `customer.user`. What they move counts for both.
    #[serde(default, rename = "user", skip_serializing_if = "Vec::is_empty")]
    #[schema(no_recursion)]
    pub users: Vec<AccountSpec>,
}

impl AccountSpec {
    /// What is wrong with it, if anything.
    pub fn check(&self, sub: bool) -> Result<(), String> {
        let name_ok = |b: u8| b.is_ascii_alphanumeric() || b == b'_' || b == b'-';
        if self.name.is_empty() || self.name.len() > 40 || !self.name.bytes().all(name_ok) {
            return Err(format!("customer name '{}' must be 1 to 40 letters, digits, '-' or '_'", self.name));
        }
        for key in &self.key_sha256 {
            if parse_hash(key).is_none() {
                return Err(format!(
                    "customer '{}': key_sha256 must be 64 hex digits; make one with `printf %s KEY | sha256sum`",
                    self.name
                ));
            }
        }
        for net in &self.allow_ips {
            net.parse::<Net>().map_err(|e| format!("customer '{}': allow_ips: {e}", self.name))?;
        }
        if self.key_sha256.is_empty() && self.allow_ips.is_empty() && self.users.is_empty() {
            return Err(format!("customer '{}' has neither key_sha256 nor allow_ips: nobody could log in", self.name));
        }
        if sub && !self.users.is_empty() {
            return Err(format!("sub-user '{}' cannot have sub-users", self.name));
        }
        let mut seen = std::collections::HashSet::new();
        for user in &self.users {
            user.check(true)?;
            if !seen.insert(&user.name) {
                return Err(format!("customer '{}' has two sub-users named '{}'", self.name, user.name));
            }
        }
        Ok(())
    }
}

/// The hash a key is kept as. Keys are long random strings, so a slow hash would only slow the log-in.
pub fn hash_key(key: &str) -> [u8; 32] {
    Sha256::digest(key.as_bytes()).into()
}

fn parse_hash(hex: &str) -> Option<[u8; 32]> {
    if hex.len() != 64 || !hex.is_ascii() {
        return None;
    }
    let mut out = [0; 32];
    for (i, byte) in out.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&hex[2 * i..2 * i + 2], 16).ok()?;
    }
    Some(out)
}

/// Why a customer is not served. The text goes to the customer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Denial {
    #[error("user name and key are needed")]
    NoCredentials,
    #[error("unknown user or wrong key")]
    Credentials,
    #[error("{0}")]
    Target(#[from] TargetError),
    #[error("address not in the account's allow list")]
    Address,
    #[error("account is suspended")]
    Suspended,
    #[error("quota used up")]
    Quota,
    #[error("too many tunnels at a time")]
    Concurrency,
    #[error("too many requests")]
    Rate,
}

/// A token bucket.
struct Bucket {
    level: f64,
    at: Instant,
}

impl Bucket {
    /// Refills by `rate` a second up to one second's worth.
    fn refill(&mut self, rate: f64, now: Instant) {
        self.level = (self.level + now.duration_since(self.at).as_secs_f64() * rate).min(rate);
        self.at = now;
    }
}

/// An account at work.
pub struct Account {
    /// `alice`, or `alice.bob` for a sub-user.
    pub name: String,
    pub spec: AccountSpec,
    pub parent: Option<Arc<Account>>,
    pub counter: Counter,
    keys: Vec<[u8; 32]>,
    allow: Vec<Net>,
    live: Arc<Live>,
}

/// What must outlive a change of the configuration.
pub struct Live {
    tunnels: AtomicU32,
    /// The counter's bytes at the start of the quota's period.
    period_base: AtomicU64,
    /// Bytes other hubs moved in this period.
    elsewhere: AtomicU64,
    /// Held while a claim under a quota is made or settled.
    quota: Mutex<()>,
    bytes: Mutex<Bucket>,
    requests: Mutex<Bucket>,
}

impl Account {
    /// Tunnels now open.
    pub fn tunnels(&self) -> u32 {
        self.live.tunnels.load(Relaxed)
    }

    /// Bytes of the current period, by all hubs.
    pub fn used(&self) -> u64 {
        let here = self.counter.totals().bytes().saturating_sub(self.live.period_base.load(Relaxed));
        here + self.live.elsewhere.load(Relaxed)
    }

    /// Sets what the period held before: `used` bytes of this hub until now, `elsewhere` of others.
    pub fn set_period(&self, used: u64, elsewhere: u64) {
        self.live.period_base.store(self.counter.totals().bytes().saturating_sub(used), Relaxed);
        self.live.elsewhere.store(elsewhere, Relaxed);
    }

    pub fn over_quota(&self) -> bool {
        self.spec.limits.quota_bytes.is_some_and(|quota| self.used() >= quota)
            || self.parent.as_ref().is_some_and(|p| p.over_quota())
    }

    /// Admits one tunnel, on the account and its parent. The guard gives it back.
    pub fn admit(self: &Arc<Self>) -> Result<Admitted, Denial> {
        if self.spec.suspended || self.parent.as_ref().is_some_and(|p| p.spec.suspended) {
            return Err(Denial::Suspended);
        }
        if self.over_quota() {
            return Err(Denial::Quota);
        }
        let mut admitted = Admitted { account: self.clone(), claimed: [false; 2] };
        for (i, account) in self.chain().enumerate() {
            let most = account.spec.limits.tunnels.unwrap_or(u32::MAX);
            let claimed = account.live.tunnels.fetch_update(Relaxed, Relaxed, |n| (n < most).then_some(n + 1));
            if claimed.is_err() {
                return Err(Denial::Concurrency);
            }
            admitted.claimed[i] = true;
        }
        let now = Instant::now();
        for account in self.chain() {
            if let Some(rate) = account.spec.limits.requests_per_second {
                let mut bucket = account.live.requests.lock();
                bucket.refill(f64::from(rate), now);
                if bucket.level < 1.0 {
                    return Err(Denial::Rate);
                }
                bucket.level -= 1.0;
            }
        }
        for account in self.chain() {
            account.counter.request();
        }
        Ok(admitted)
    }

    fn chain(&self) -> impl Iterator<Item = &Account> {
        std::iter::once(self).chain(self.parent.as_deref())
    }

    /// Claims as many of `bytes` as the quotas of the account and its customer leave. What is moved is then counted, what
    /// is not is given back with [`Account::unclaim`]: so tunnels on all shards together end at the quota to the byte.
    #[must_use]
    pub fn claim(&self, way: Way, bytes: u64) -> u64 {
        let mut granted = bytes;
        for (depth, account) in self.chain().enumerate() {
            let Some(quota) = account.spec.limits.quota_bytes else {
                account.counter.sets_out(way, granted);
                continue;
            };
            let guard = account.live.quota.lock();
            let less = granted - granted.min(quota.saturating_sub(account.used() + account.counter.pending()));
            granted -= less;
            account.counter.sets_out(way, granted);
            drop(guard);
            self.chain().take(depth).for_each(|below| below.counter.stays(way, less));
        }
        granted
    }

    /// Gives back what was claimed and did not move.
    pub fn unclaim(&self, way: Way, bytes: u64) {
        self.chain().for_each(|a| a.counter.stays(way, bytes));
    }

    /// Counts bytes that were claimed.
    pub fn count(&self, way: Way, bytes: u64) {
        for account in self.chain() {
            // Whoever claims at the same time must not see them twice.
            let _guard = account.spec.limits.quota_bytes.map(|_| account.live.quota.lock());
            account.counter.moved(way, bytes);
        }
    }

    /// Takes `bytes` from the rate limit; how long to wait before the next, if over it.
    pub fn throttle(&self, bytes: u64) -> Option<Duration> {
        self.chain()
            .filter_map(|account| {
                let rate = account.spec.limits.bytes_per_second? as f64;
                let mut bucket = account.live.bytes.lock();
                bucket.refill(rate, Instant::now());
                bucket.level -= bytes as f64;
                (bucket.level < 0.0).then(|| Duration::from_secs_f64((-bucket.level / rate).min(5.0)))
            })
            .max()
    }

    pub fn is_throttled(&self) -> bool {
        self.chain().any(|a| a.spec.limits.bytes_per_second.is_some())
    }

    fn opens(&self, key: &str) -> bool {
        let hash = hash_key(key);
        self.keys.iter().fold(false, |open, k| open | bool::from(k.ct_eq(&hash)))
    }

    fn allows(&self, ip: IpAddr) -> bool {
        let ip = crate::dest::unmapped(ip);
        self.allow.iter().any(|net| net.contains(ip))
    }
}

/// One tunnel's claim on its account.
pub struct Admitted {
    pub account: Arc<Account>,
    claimed: [bool; 2],
}

impl Drop for Admitted {
    fn drop(&mut self) {
        for (account, claimed) in self.account.chain().zip(self.claimed) {
            if claimed {
                account.live.tunnels.fetch_sub(1, Relaxed);
            }
        }
    }
}

/// All accounts.
pub struct Accounts {
    tally: Arc<Tally>,
    by_name: RwLock<HashMap<String, Arc<Account>>>,
    /// Accounts that some address opens without a key.
    any_allowed: RwLock<Vec<Arc<Account>>>,
}

impl Accounts {
    pub fn new(tally: Arc<Tally>) -> Self {
        Self { tally, by_name: RwLock::default(), any_allowed: RwLock::default() }
    }

    /// Adds or replaces a customer and its sub-users; open tunnels go on under what they began with.
    pub fn put(&self, spec: &AccountSpec) -> Result<(), String> {
        spec.check(false)?;
        let mut by_name = self.by_name.write();
        let parent = self.make(&by_name, spec.name.clone(), spec, None)?;
        let mut made = vec![parent.clone()];
        for user in &spec.users {
            made.push(self.make(&by_name, format!("{}.{}", spec.name, user.name), user, Some(parent.clone()))?);
        }
        drop_customer(&mut by_name, &spec.name);
        by_name.extend(made.into_iter().map(|a| (a.name.clone(), a)));
        *self.any_allowed.write() = allowed(&by_name);
        Ok(())
    }

    fn make(
        &self,
        old: &HashMap<String, Arc<Account>>,
        name: String,
        spec: &AccountSpec,
        parent: Option<Arc<Account>>,
    ) -> Result<Arc<Account>, String> {
        let counter = self.tally.counter(&name).map_err(|e| e.to_string())?;
        let live = old.get(&name).map(|a| a.live.clone()).unwrap_or_else(|| {
            let bucket = || Mutex::new(Bucket { level: f64::MAX, at: Instant::now() });
            Arc::new(Live {
                tunnels: AtomicU32::new(0),
                period_base: AtomicU64::new(0),
                elsewhere: AtomicU64::new(0),
                quota: Mutex::new(()),
                bytes: bucket(),
                requests: bucket(),
            })
        });
        Ok(Arc::new(Account {
            keys: spec.key_sha256.iter().filter_map(|k| parse_hash(k)).collect(),
            allow: spec.allow_ips.iter().filter_map(|n| n.parse().ok()).collect(),
            spec: spec.clone(),
            name,
            parent,
            counter,
            live,
        }))
    }

    /// Removes a customer and its sub-users. `false` if there is none.
    pub fn remove(&self, name: &str) -> bool {
        let mut by_name = self.by_name.write();
        let found = drop_customer(&mut by_name, name);
        *self.any_allowed.write() = allowed(&by_name);
        found
    }

    pub fn get(&self, name: &str) -> Option<Arc<Account>> {
        self.by_name.read().get(name).cloned()
    }

    /// Every account, by name.
    pub fn all(&self) -> Vec<Arc<Account>> {
        let mut all: Vec<_> = self.by_name.read().values().cloned().collect();
        all.sort_by(|a, b| a.name.cmp(&b.name));
        all
    }

    /// Logs in by user name and password, each possibly with parameters behind.
    pub fn login(&self, user: &str, password: &str, from: IpAddr) -> Result<(Arc<Account>, Target), Denial> {
        if user.len() > target::MAX_CREDENTIAL || password.len() > target::MAX_CREDENTIAL {
            return Err(Denial::Credentials);
        }
        let found = {
            let by_name = self.by_name.read();
            let find = |text: &str| {
                target::splits(text).find_map(|(base, rest)| Some((by_name.get(base)?.clone(), rest.len())))
            };
            match find(user) {
                Some(found) => Some((found, user)),
                // The habit of one vendor: `customer-NAME-cc-...`.
                None => user.strip_prefix("customer-").and_then(|bare| Some((find(bare)?, bare))),
            }
        };
        let Some(((account, rest), user)) = found else {
            // As long as for a known user.
            let _ = hash_key(password);
            return Err(Denial::Credentials);
        };
        let user_params = &user[user.len() - rest..];
        let Some(key_rest) = target::splits(password).find(|(key, _)| account.opens(key)).map(|(_, rest)| rest) else {
            return Err(Denial::Credentials);
        };
        if account.spec.only_from_allowed && !account.allows(from) {
            return Err(Denial::Address);
        }
        let mut target = Target::default();
        target::parse_params(user_params, &mut target)?;
        target::parse_params(key_rest, &mut target)?;
        Ok((account, target))
    }

    /// Logs in by address alone.
    pub fn login_by_address(&self, from: IpAddr) -> Option<Arc<Account>> {
        self.any_allowed.read().iter().find(|a| !a.spec.only_from_allowed && a.allows(from)).cloned()
    }

    /// Whether some account could be opened by address alone.
    pub fn any_by_address(&self) -> bool {
        !self.any_allowed.read().is_empty()
    }
}

fn allowed(by_name: &HashMap<String, Arc<Account>>) -> Vec<Arc<Account>> {
    by_name.values().filter(|a| !a.allow.is_empty()).cloned().collect()
}

fn drop_customer(by_name: &mut HashMap<String, Arc<Account>>, name: &str) -> bool {
    let before = by_name.len();
    by_name.retain(|key, account| key != name && account.parent.as_ref().is_none_or(|p| p.name != name));
    by_name.len() != before
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::target::Country;

    fn hex(key: &str) -> String {
        hash_key(key).iter().map(|b| format!("{b:02x}")).collect()
    }

    fn spec(name: &str, key: &str) -> AccountSpec {
        AccountSpec { name: name.into(), key_sha256: vec![hex(key)], ..AccountSpec::default() }
    }

    fn accounts(specs: &[AccountSpec]) -> (tempfile::TempDir, Accounts) {
        let dir = tempfile::tempdir().expect("dir");
        let accounts = Accounts::new(Tally::open(&dir.path().join("tally")).expect("tally"));
        for spec in specs {
            accounts.put(spec).expect("valid");
        }
        (dir, accounts)
    }

    const HERE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 1));

    #[test]
    fn parameters_behind_either_credential_and_dashes_in_both() {
        let (_dir, accounts) = accounts(&[spec("alice", "k-e-y"), spec("alice-b", "2")]);
        let login = |user: &str, password: &str| accounts.login(user, password, HERE).map(|(a, t)| (a.name.clone(), t));
        assert_eq!(login("alice", "k-e-y").expect("plain").0, "alice");
        let (name, t) = login("alice-b-cc-de", "2-session-x").expect("both");
        assert_eq!((name.as_str(), t.country, t.sticky()), ("alice-b", Country::parse("DE"), Some("x")));
        let (_, t) = login("alice-cc-de", "k-e-y-country-us").expect("password is read last");
        assert_eq!(t.country, Country::parse("US"));
        assert_eq!(login("customer-alice-cc-de", "k-e-y").expect("vendor prefix").0, "alice");
        assert_eq!(login("alice", "k-e"), Err(Denial::Credentials));
        assert_eq!(login("bob", "k-e-y"), Err(Denial::Credentials));
        assert_eq!(login("alice-contry-de", "k-e-y"), Err(Denial::Target(TargetError::Unknown("contry".into()))));
        assert_eq!(login("alice-contry-de", "wrong"), Err(Denial::Credentials), "a stranger learns nothing");
    }

    #[test]
    fn sub_users_count_for_both_and_obey_both() {
        let mut alice = spec("alice", "1");
        alice.limits.quota_bytes = Some(100);
        alice.limits.tunnels = Some(2);
        alice.users = vec![spec("bob", "2"), spec("eve", "3")];
        alice.users[0].limits.tunnels = Some(1);
        let (_dir, accounts) = accounts(&[alice]);
        let (bob, _) = accounts.login("alice.bob", "2", HERE).expect("sub-user");
        let (eve, _) = accounts.login("alice.eve", "3", HERE).expect("sub-user");
        let first = bob.admit().expect("one");
        assert_eq!(bob.admit().err(), Some(Denial::Concurrency));
        let second = eve.admit().expect("two of the parent's");
        assert_eq!(eve.admit().err(), Some(Denial::Concurrency), "the parent's limit");
        assert_eq!(accounts.get("alice").expect("parent").tunnels(), 2);
        drop((first, second));
        assert_eq!(accounts.get("alice").expect("parent").tunnels(), 0);
        for (who, way, bytes) in [(&bob, Way::Up, 60), (&eve, Way::Down, 40)] {
            assert_eq!(who.claim(way, bytes), bytes);
            who.count(way, bytes);
        }
        assert_eq!((bob.used(), eve.used(), accounts.get("alice").expect("p").used()), (60, 40, 100));
        assert_eq!(eve.admit().err(), Some(Denial::Quota));
        assert!(accounts.remove("alice") && accounts.get("alice.bob").is_none());
    }

    #[test]
    fn addresses_with_and_instead_of_keys() {
        let mut open = spec("open", "1");
        open.allow_ips = vec!["192.0.2.0/24".into()];
        let mut strict = spec("strict", "2");
        strict.allow_ips = vec!["198.51.100.7".into()];
        strict.only_from_allowed = true;
        let (_dir, accounts) = accounts(&[open, strict]);
        assert_eq!(accounts.login_by_address(HERE).map(|a| a.name.clone()).as_deref(), Some("open"));
        let other: IpAddr = "198.51.100.7".parse().expect("ip");
        assert!(accounts.login_by_address(other).is_none(), "strict wants its key as well");
        assert_eq!(accounts.login("strict", "2", HERE).err(), Some(Denial::Address));
        assert!(accounts.login("strict", "2", other).is_ok());
        assert!(accounts.login_by_address("::ffff:192.0.2.9".parse().expect("ip")).is_some());
    }

    #[test]
    fn rates_hold_and_a_changed_limit_keeps_what_is_open() {
        let mut alice = spec("alice", "1");
        alice.limits.requests_per_second = Some(3);
        alice.limits.bytes_per_second = Some(1000);
        let (_dir, accounts) = accounts(&[alice.clone()]);
        let account = accounts.get("alice").expect("alice");
        let open: Vec<_> = (0..3).map(|_| account.admit().expect("within the rate")).collect();
        assert_eq!(account.admit().err(), Some(Denial::Rate));
        assert_eq!(account.throttle(500), None);
        let wait = account.throttle(2500).expect("over");
        assert!(wait > Duration::from_millis(1500) && wait <= Duration::from_secs(2), "{wait:?}");
        alice.limits = Limits { tunnels: Some(3), ..Limits::default() };
        accounts.put(&alice).expect("valid");
        let account = accounts.get("alice").expect("alice");
        assert_eq!((account.tunnels(), account.admit().err()), (3, Some(Denial::Concurrency)));
        drop(open);
        assert_eq!(account.tunnels(), 0);
        account.counter.count(Way::Up, 40);
        account.set_period(10, 5);
        assert_eq!(account.used(), 15);
    }

    #[test]
    fn claims_on_many_threads_end_at_the_quota_to_the_byte() {
        let mut alice = spec("alice", "1");
        alice.limits.quota_bytes = Some(1_000_003);
        alice.users = vec![spec("a", "2"), spec("b", "3")];
        alice.users[1].limits.quota_bytes = Some(300_001);
        let (_dir, accounts) = accounts(&[alice]);
        let moved = AtomicU64::new(0);
        // First its own quota ends the one user, then the customer's ends both.
        for users in [["alice.b"; 4], ["alice.a", "alice.b", "alice.a", "alice.a"]] {
            std::thread::scope(|scope| {
                for (t, user) in users.into_iter().enumerate() {
                    let account = accounts.get(user).expect("account");
                    let moved = &moved;
                    scope.spawn(move || {
                        for i in 0.. {
                            let way = if i % 3 == 0 { Way::Up } else { Way::Down };
                            let got = account.claim(way, 1 + (i * 37 + t as u64) % 900);
                            // Some of it does not arrive.
                            let lost = if i % 5 == 0 { got / 2 } else { 0 };
                            account.unclaim(way, lost);
                            account.count(way, got - lost);
                            moved.fetch_add(got - lost, Relaxed);
                            if got == 0 && account.over_quota() {
                                break;
                            }
                        }
                    });
                }
            });
        }
        let used = |name: &str| accounts.get(name).expect("account").used();
        assert_eq!((used("alice"), moved.load(Relaxed)), (1_000_003, 1_000_003));
        assert_eq!((used("alice.a"), used("alice.b")), (700_002, 300_001));
        assert!(accounts.all().iter().all(|a| a.counter.pending() == 0));
    }

    #[test]
    fn what_cannot_work_is_refused_with_a_remedy() {
        let bad = |s: AccountSpec| s.check(false).unwrap_err();
        assert!(bad(AccountSpec { name: "a b".into(), ..spec("x", "1") }).contains("letters"));
        assert!(bad(AccountSpec { key_sha256: vec!["plain".into()], ..spec("x", "1") }).contains("sha256sum"));
        assert!(bad(AccountSpec { key_sha256: vec![], ..spec("x", "1") }).contains("neither"));
        assert!(bad(AccountSpec { allow_ips: vec!["1.2.3/8".into()], ..spec("x", "1") }).contains("allow_ips"));
    }
}
