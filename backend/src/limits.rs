//! How often a client may ask: by address before anything is looked up, by person or org after.

use std::collections::BTreeMap;
use std::hash::Hash;
use std::net::{IpAddr, Ipv6Addr};
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use clawhq_api_types::problem::ProblemCode;
use clawhq_domain::ids::{OrgId, UserId};
use governor::clock::{Clock as _, DefaultClock};
use governor::middleware::StateInformationMiddleware;
use governor::state::keyed::DefaultKeyedStateStore;
use governor::{Quota, RateLimiter};
use http::Request;
use parking_lot::Mutex;
use sha2::{Digest, Sha256};
use tower_governor::GovernorError;
use tower_governor::governor::{GovernorConfig, GovernorConfigBuilder};
use tower_governor::key_extractor::KeyExtractor;

use crate::config;
use crate::envelope::RequestInfo;
use crate::problem::Fail;

type Keyed<K> = RateLimiter<K, DefaultKeyedStateStore<K>, DefaultClock, StateInformationMiddleware>;

/// A limiter with more keys than this is worth a line in the log: about 10 MB, and somebody has many addresses.
const KEYS_MAX: usize = 200_000;

/// An address as limits see it: an IPv6 customer has a whole /64.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Network(IpAddr);

impl From<IpAddr> for Network {
    fn from(address: IpAddr) -> Self {
        Self(match address.to_canonical() {
            IpAddr::V4(address) => IpAddr::V4(address),
            IpAddr::V6(address) => {
                let [a, b, c, d, ..] = address.segments();
                IpAddr::V6(Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0))
            }
        })
    }
}

/// The key of the limiter in front of everything.
#[derive(Clone, Copy, Debug)]
pub struct ByAddress;

impl KeyExtractor for ByAddress {
    type Key = Network;

    fn extract<T>(&self, request: &Request<T>) -> Result<Network, GovernorError> {
        let info = request.extensions().get::<RequestInfo>().ok_or(GovernorError::UnableToExtractKey)?;
        Ok(info.ip.unwrap_or(IpAddr::V6(Ipv6Addr::UNSPECIFIED)).into())
    }
}

pub type AddressConfig = Arc<GovernorConfig<ByAddress, governor::middleware::NoOpMiddleware>>;

/// What an answer says about its limit.
#[derive(Clone, Copy, Debug)]
pub struct Left {
    pub policy: &'static str,
    pub per_minute: u32,
    pub remaining: u32,
    pub reset_seconds: u64,
}

pub struct Limits {
    pub address: AddressConfig,
    sign_in: Keyed<[u8; 32]>,
    sign_up: Keyed<Network>,
    sessions: Keyed<UserId>,
    session_per_minute: u32,
    /// One limiter for each rate of the tier table.
    orgs: Mutex<BTreeMap<u32, Arc<Keyed<OrgId>>>>,
    org_rate_factor: u32,
    clock: DefaultClock,
}

fn per_minute<K: Hash + Eq + Clone>(rate: u32) -> Keyed<K> {
    let rate = NonZeroU32::new(rate).unwrap_or(NonZeroU32::MIN);
    RateLimiter::keyed(Quota::per_minute(rate)).with_middleware::<StateInformationMiddleware>()
}

impl Limits {
    pub fn new(limits: &config::Limits) -> Self {
        let period = Duration::from_secs(1) / limits.address_per_second.max(1);
        let address = GovernorConfigBuilder::default()
            .key_extractor(ByAddress)
            .period(period.max(Duration::from_nanos(1)))
            .burst_size(limits.address_burst.max(1))
            .finish()
            .expect("neither is zero");
        Self {
            address: Arc::new(address),
            sign_in: per_minute(limits.sign_in_per_minute),
            sign_up: per_minute(limits.sign_up_per_minute),
            sessions: per_minute(limits.session_per_minute),
            session_per_minute: limits.session_per_minute.max(1),
            orgs: Mutex::default(),
            org_rate_factor: limits.org_rate_factor.max(1),
            clock: DefaultClock::default(),
        }
    }

    fn check<K: Hash + Eq + Clone>(
        &self,
        limiter: &Keyed<K>,
        key: &K,
        policy: &'static str,
        per_minute: u32,
    ) -> Result<Left, Fail> {
        match limiter.check_key(key) {
            Ok(state) => {
                let remaining = state.remaining_burst_capacity();
                let used = u64::from(per_minute.saturating_sub(remaining));
                Ok(Left { policy, per_minute, remaining, reset_seconds: used * 60 / u64::from(per_minute.max(1)) })
            }
            Err(until) => {
                let wait = until.wait_time_from(self.clock.now());
                Err(refusal(wait, format!("The limit of {per_minute} requests a minute is reached.")))
            }
        }
    }

    /// An account and an address together: neither locks the other out.
    pub fn sign_in(&self, email: &str, ip: Option<IpAddr>, per_minute: u32) -> Result<(), Fail> {
        let mut hash = Sha256::new();
        hash.update(email.to_lowercase());
        hash.update([0]);
        hash.update(format!("{:?}", ip.map(Network::from)));
        self.check(&self.sign_in, &hash.finalize().into(), "sign-in", per_minute).map(drop)
    }

    pub fn sign_up(&self, ip: Option<IpAddr>, per_minute: u32) -> Result<(), Fail> {
        let network = Network::from(ip.unwrap_or(IpAddr::V6(Ipv6Addr::UNSPECIFIED)));
        self.check(&self.sign_up, &network, "sign-up", per_minute).map(drop)
    }

    pub fn session(&self, user: UserId) -> Result<Left, Fail> {
        self.check(&self.sessions, &user, "session", self.session_per_minute)
    }

    /// `rate` is the tier's.
    pub fn org(&self, org: OrgId, rate: u32) -> Result<Left, Fail> {
        let rate = rate.saturating_mul(self.org_rate_factor).max(1);
        let limiter = self.orgs.lock().entry(rate).or_insert_with(|| Arc::new(per_minute(rate))).clone();
        self.check(&limiter, &org, "org", rate)
    }

    /// Forgets who has not asked for a while; called by a timer. Memory stays bounded whatever asks.
    pub fn sweep(&self) {
        fn one<K: Hash + Eq + Clone, M>(limiter: &RateLimiter<K, DefaultKeyedStateStore<K>, DefaultClock, M>)
        where
            M: governor::middleware::RateLimitingMiddleware<governor::clock::QuantaInstant>,
        {
            limiter.retain_recent();
            if limiter.len() > KEYS_MAX {
                tracing::warn!(keys = limiter.len(), "a rate limiter is full of recent keys");
            }
            limiter.shrink_to_fit();
        }
        one(self.address.limiter());
        one(&self.sign_in);
        one(&self.sign_up);
        one(&self.sessions);
        for limiter in self.orgs.lock().values() {
            one(limiter);
        }
    }
}

pub(crate) fn refusal(wait: Duration, detail: String) -> Fail {
    // Spread out, so that clients who were refused together do not return together.
    let jitter = rand::random_range(0..250);
    let ms = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX).saturating_add(jitter).max(1);
    Fail::new(ProblemCode::RateLimited, detail).hint("Wait for Retry-After.").retry_after(ms)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_customer_is_a_network() {
        let at = |text: &str| Network::from(text.parse::<IpAddr>().unwrap());
        assert_eq!(at("2001:db8::1"), at("2001:db8::ffff:2"));
        assert_ne!(at("2001:db8:0:1::1"), at("2001:db8::1"));
        assert_eq!(at("::ffff:192.0.2.1"), at("192.0.2.1"));
        assert_ne!(at("192.0.2.2"), at("192.0.2.1"));
    }

    #[test]
    fn an_org_has_its_tiers_rate_and_its_neighbour_another() {
        let limits = Limits::new(&config::Limits::default());
        let (one, other) = (OrgId::from_u128(1), OrgId::from_u128(2));
        for left in (0..3).rev() {
            assert_eq!(limits.org(one, 3).unwrap().remaining, left);
        }
        let refused = limits.org(one, 3).unwrap_err();
        assert_eq!(refused.code(), ProblemCode::RateLimited);
        assert!(limits.org(other, 3).is_ok());
        limits.sweep();
        assert!(limits.org(one, 3).is_err(), "a sweep forgets nobody who is at the limit");
    }

    #[test]
    fn tries_at_one_account_do_not_lock_out_another() {
        let limits = Limits::new(&config::Limits { sign_in_per_minute: 2, ..config::Limits::default() });
        let ip = Some(IpAddr::from([192, 0, 2, 1]));
        assert!(limits.sign_in("a@b.c", ip, 2).is_ok());
        assert!(limits.sign_in("A@b.c", ip, 2).is_ok());
        assert!(limits.sign_in("a@b.c", ip, 2).is_err());
        assert!(limits.sign_in("other@b.c", ip, 2).is_ok());
        assert!(limits.sign_in("a@b.c", Some(IpAddr::from([192, 0, 2, 2])), 2).is_ok());
    }
}
