//! What all shards and the API share.

use crate::account::Accounts;
use crate::config::Config;
use crate::dest::{Dest, Net, Policy};
use crate::geo::Geo;
use crate::hub::Customer;
use crate::metrics::Metrics;
use crate::places::Places;
use crate::registry::{Choice, Registry};
use crate::target::Target;
use clawhq_wire::Remote;
use parking_lot::{Mutex, RwLock};
use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Instant;

/// A name to resolve for a shard.
pub struct Lookup {
    pub shard: usize,
    pub slot: u32,
    pub serial: u32,
    pub name: String,
    /// For a datagram that waits for its address: destination port and payload.
    pub datagram: Option<(u16, Vec<u8>)>,
}

/// What shards are told from outside.
pub enum Command {
    Resolved {
        slot: u32,
        serial: u32,
        addrs: Vec<IpAddr>,
        datagram: Option<(u16, Vec<u8>)>,
    },
    /// A customer whose peer lives on this shard.
    Adopt {
        customer: Box<Customer>,
        fd: OwnedFd,
        choice: Choice,
    },
    /// Another registration took a peer's place, or an operator wants it gone.
    ClosePeer {
        slot: u32,
        serial: u32,
        reason: &'static str,
    },
    /// Tell one peer to finish and leave.
    DrainPeer {
        slot: u32,
        serial: u32,
    },
    /// Tell all peers to leave; the hub stops soon.
    DrainAll,
}

/// Another hub, as the directory knows it.
#[derive(Debug, Clone)]
pub struct OtherHub {
    pub name: Arc<str>,
    pub relay: SocketAddr,
    pub places: Arc<Places>,
}

/// How many registrations may be let in.
struct Admission {
    /// Now.
    room: f64,
    /// Peers that were sent away and are still to come back, as far as the rate tells.
    away: f64,
    /// When both were computed.
    at: Instant,
}

pub struct Shared {
    pub config: Config,
    pub policy: RwLock<Arc<Policy>>,
    pub registry: Registry,
    pub accounts: Accounts,
    pub geo: RwLock<Arc<Geo>>,
    pub metrics: Metrics,
    pub remotes: OnceLock<Vec<Remote<Command>>>,
    pub lookups: tokio::sync::mpsc::Sender<Lookup>,
    pub started: Instant,
    /// Customers that the configuration file names, as last read.
    pub listed: RwLock<Vec<String>>,
    pub draining: AtomicBool,
    pub peer_proxies: Vec<Net>,
    pub customer_proxies: Vec<Net>,
    /// Bytes by device since the last fold into the ledger.
    pub peer_bytes: Mutex<HashMap<String, u64>>,
    pub min_version: [u32; 3],
    pub tokens: Vec<[u8; 32]>,
    admission: Mutex<Admission>,
    /// Other hubs that have peers, renewed from the directory.
    pub others: RwLock<Vec<OtherHub>>,
    pub relay_counter: AtomicU64,
}

impl Shared {
    pub fn new(config: Config, accounts: Accounts, geo: Geo, lookups: tokio::sync::mpsc::Sender<Lookup>) -> Self {
        let nets = |list: &[String]| list.iter().filter_map(|n| n.parse().ok()).collect();
        let tokens = config.peers.tokens_sha256.iter().filter_map(|h| unhex(h)).collect();
        Self {
            policy: RwLock::new(Arc::new(config.policy())),
            registry: Registry::limited(config.peers.bytes_per_day),
            accounts,
            geo: RwLock::new(Arc::new(geo)),
            metrics: Metrics::default(),
            remotes: OnceLock::new(),
            lookups,
            started: Instant::now(),
            listed: RwLock::new(config.customer.iter().map(|c| c.name.clone()).collect()),
            draining: AtomicBool::new(false),
            peer_proxies: nets(&config.peers.trusted_proxies),
            customer_proxies: nets(&config.customers.trusted_proxies),
            peer_bytes: Mutex::default(),
            min_version: crate::config::version(&config.peers.min_version).unwrap_or_default(),
            tokens,
            admission: Mutex::new(Admission {
                room: f64::from(config.peers.registrations_per_second),
                away: 0.0,
                at: Instant::now(),
            }),
            others: RwLock::default(),
            relay_counter: AtomicU64::new(0),
            config,
        }
    }

    /// Seconds on the hub's clock.
    pub fn now(&self) -> u32 {
        self.started.elapsed().as_secs() as u32
    }

    pub fn is_draining(&self) -> bool {
        self.draining.load(Relaxed)
    }

    /// Lets one registration in, or says after how long to come back: spread so that those sent away together do not
    /// come back together. `random` is 0 to 1.
    pub fn admit_registration(&self, random: f64) -> Result<(), std::time::Duration> {
        let rate = f64::from(self.config.peers.registrations_per_second);
        let mut state = self.admission.lock();
        let now = Instant::now();
        let refill = now.duration_since(state.at).as_secs_f64() * rate;
        state.at = now;
        state.room = (state.room + refill).min(rate);
        state.away = (state.away - refill).max(0.0);
        if state.room >= 1.0 {
            state.room -= 1.0;
            return Ok(());
        }
        // Everybody sent away widens the time over which the rest is spread, so that they come back at the rate that is
        // let in; up to ten minutes.
        state.away = (state.away + 1.0).min(600.0 * rate);
        let spread = 1.0 + state.away / rate;
        Err(std::time::Duration::from_secs_f64(0.25 + spread * random))
    }

    /// Another hub that may have a peer for the target: each in its turn, none of `tried`.
    pub fn other_hub(&self, target: &Target, tried: &[Arc<str>]) -> Option<OtherHub> {
        let others = self.others.read();
        let at = self.relay_counter.fetch_add(1, Relaxed) as usize % others.len().max(1);
        let (before, after) = others.split_at(at);
        after.iter().chain(before).find(|hub| !tried.contains(&hub.name) && hub.places.serve(target)).cloned()
    }

    /// Whether a token opens the hub to a peer.
    pub fn token_opens(&self, token: &str) -> bool {
        use subtle::ConstantTimeEq as _;
        if self.tokens.is_empty() {
            return true;
        }
        let hash = crate::account::hash_key(token);
        self.tokens.iter().fold(false, |open, t| open | bool::from(t.ct_eq(&hash)))
    }
}

fn unhex(hex: &str) -> Option<[u8; 32]> {
    let mut out = [0; 32];
    for (i, byte) in out.iter_mut().enumerate() {
        *byte = u8::from_str_radix(hex.get(2 * i..2 * i + 2)?, 16).ok()?;
    }
    Some(out)
}

/// The destination of a lookup's answer.
pub fn with_port(addr: IpAddr, port: u16) -> Dest {
    Dest { host: crate::dest::Host::Ip(addr), port }
}
