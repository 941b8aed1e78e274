//! Which peers are there, and which one serves a request.
//!
//! A peer that may be chosen stands in eight dense lists (all, country, country+state, country+city, city, ASN,
//! country+ASN, city+ASN); one that may not (full, draining, without consent) stands in none. So a choice is one
//! look-up, two random picks and a comparison, whatever the number of peers, and allocates nothing.

use crate::places::{self, Place, Places};
use crate::target::{Country, Target};
use clawhq_wire::intern::{Interner, Symbol};
use parking_lot::{Mutex, RwLock};
use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::net::IpAddr;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};

/// Names one registration. A peer that registers anew gets another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PeerId {
    index: u32,
    generation: u32,
}

impl PeerId {
    pub fn index(self) -> usize {
        self.index as usize
    }
}

/// Where a peer's connection lives: the shard, and its place and count in that shard's table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Home {
    pub shard: u16,
    pub slot: u32,
    pub serial: u32,
}

/// What is known of a peer when it registers.
#[derive(Debug, Clone)]
pub struct NewPeer<'a> {
    pub device: &'a str,
    pub version: &'a str,
    pub addr: IpAddr,
    pub country: Country,
    pub state: &'a str,
    pub city: &'a str,
    pub asn: u32,
    pub home: Home,
    /// Most tunnels at a time.
    pub cap: u16,
    pub compact: bool,
    pub udp: bool,
    /// The device's owner agreed to carry others' traffic.
    pub consent: bool,
    /// Seconds on the hub's clock.
    pub now: u32,
}

/// A chosen peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Choice {
    pub peer: PeerId,
    pub home: Home,
    pub country: Country,
    /// A sticky session held this peer already.
    pub kept: bool,
}

/// What is asked of a choice beside the target.
#[derive(Debug, Clone, Copy, Default)]
pub struct Needs<'a> {
    pub udp: bool,
    /// Peers that failed this request already.
    pub exclude: &'a [PeerId],
}

/// A sticky session.
#[derive(Debug, Clone, Copy)]
pub struct Sticky<'a> {
    /// The account whose session it is.
    pub owner: &'a str,
    pub session: &'a str,
    /// Whether another peer may take the place of one that is gone.
    pub replace: bool,
    /// Seconds on the hub's clock.
    pub now: u32,
    /// Seconds that a new session lives.
    pub life: u32,
}

const KEYS: usize = 8;
const NOWHERE: u32 = u32::MAX;
const SESSIONS_MOST: usize = 1 << 18;
/// A fresh peer starts in the middle of the scale.
const FRESH_SCORE: u8 = 192;
/// Most peers looked at when neither random pick fits.
const SCAN_MOST: usize = 4096;

struct Record {
    generation: u32,
    live: bool,
    listed: bool,
    consent: bool,
    compact: bool,
    udp: bool,
    draining: bool,
    /// Its device has carried its share of the day.
    spent: bool,
    cap: u16,
    active: AtomicU16,
    /// Share of opens that worked, 0 to 255, moving average.
    score: AtomicU8,
    country: Country,
    state: Symbol,
    city: Symbol,
    version: Symbol,
    asn: u32,
    since: u32,
    home: Home,
    /// Bytes through this peer, both ways, in this registration.
    bytes: AtomicU64,
    device: Box<str>,
    addr: IpAddr,
    /// For each key: the list and the place in it.
    places: [(u32, u32); KEYS],
}

#[derive(Default)]
struct Lists {
    by_key: HashMap<u64, u32>,
    lists: Vec<Vec<u32>>,
}

struct Inner {
    records: Vec<Record>,
    free: Vec<u32>,
    live: usize,
    /// By keyed hash of the device's name; the record holds the name to compare.
    by_device: HashMap<u64, u32>,
    lists: Lists,
    texts: Interner,
    by_country: HashMap<Country, u32>,
}

#[derive(Clone, Copy)]
struct Session {
    peer: PeerId,
    /// The registration's device, found again after the peer reconnects.
    device: u64,
    /// Seconds on the hub's clock.
    until: u32,
}

/// The table of peers, shared by all shards.
pub struct Registry {
    inner: RwLock<Inner>,
    sessions: Mutex<HashMap<(u64, u64), Session>>,
    /// Bytes a device may carry in a day, 0 for any, and what each has carried today.
    day_most: u64,
    carried: Mutex<HashMap<u64, u64>>,
    keyed: [RandomState; 2],
}

impl Default for Registry {
    fn default() -> Self {
        Self::new()
    }
}

fn key(kind: u64, high: u64, low: u32) -> u64 {
    kind << 60 | high << 32 | u64::from(low)
}

fn country_bits(country: Country) -> u64 {
    let pair = country.as_str().as_bytes();
    u64::from(pair[0]) << 8 | u64::from(pair[1])
}

/// City and ASN together exceed a key's bits: the pair is folded; a candidate is compared in full anyway.
fn mix(a: u32, b: u32) -> u32 {
    a.wrapping_mul(0x9e37_79b1).rotate_left(15) ^ b.wrapping_mul(0x85eb_ca77)
}

fn keys_of(country: Country, state: Symbol, city: Symbol, asn: u32) -> [u64; KEYS] {
    let c = country_bits(country);
    [
        key(0, 0, 0),
        key(1, c, 0),
        key(2, c, state.0),
        key(3, c, city.0),
        key(4, 0, city.0),
        key(5, 0, asn),
        key(6, c, asn),
        key(7, 0, mix(city.0, asn)),
    ]
}

/// A target with its names looked up: what the lists are asked with.
#[derive(Clone, Copy)]
struct Wanted {
    country: Option<Country>,
    state: Option<Symbol>,
    city: Option<Symbol>,
    asn: Option<u32>,
}

impl Wanted {
    fn list_key(&self) -> u64 {
        let c = self.country.map(country_bits);
        match (self.city, self.asn, self.state, c) {
            (Some(city), Some(asn), ..) => key(7, 0, mix(city.0, asn)),
            (Some(city), None, _, Some(c)) => key(3, c, city.0),
            (Some(city), None, _, None) => key(4, 0, city.0),
            (None, Some(asn), _, Some(c)) => key(6, c, asn),
            (None, Some(asn), _, None) => key(5, 0, asn),
            (None, None, Some(state), Some(c)) => key(2, c, state.0),
            (None, None, _, Some(c)) => key(1, c, 0),
            (None, None, _, None) => key(0, 0, 0),
        }
    }

    /// The list alone does not settle it.
    fn fits(&self, record: &Record) -> bool {
        self.country.is_none_or(|c| c == record.country)
            && self.state.is_none_or(|s| s == record.state)
            && self.city.is_none_or(|c| c == record.city)
            && self.asn.is_none_or(|a| a == record.asn)
    }
}

impl Inner {
    fn get(&self, id: PeerId) -> Option<&Record> {
        self.records.get(id.index()).filter(|r| r.live && r.generation == id.generation)
    }

    fn list(&mut self, index: u32) {
        let record = &self.records[index as usize];
        let may = record.live
            && record.consent
            && !record.draining
            && !record.spent
            && record.active.load(Ordering::Relaxed) < record.cap
            && !record.listed;
        if !may {
            return;
        }
        let keys = keys_of(record.country, record.state, record.city, record.asn);
        let mut places = [(NOWHERE, 0); KEYS];
        for (place, key) in places.iter_mut().zip(keys) {
            let list = *self.lists.by_key.entry(key).or_insert_with(|| {
                self.lists.lists.push(Vec::new());
                (self.lists.lists.len() - 1) as u32
            });
            let members = &mut self.lists.lists[list as usize];
            *place = (list, members.len() as u32);
            members.push(index);
        }
        let record = &mut self.records[index as usize];
        record.places = places;
        record.listed = true;
    }

    fn unlist(&mut self, index: u32) {
        if !std::mem::replace(&mut self.records[index as usize].listed, false) {
            return;
        }
        for which in 0..KEYS {
            let (list, at) = self.records[index as usize].places[which];
            let members = &mut self.lists.lists[list as usize];
            members.swap_remove(at as usize);
            if let Some(&moved) = members.get(at as usize) {
                self.records[moved as usize].places[which].1 = at;
            }
        }
    }

    fn wanted(&self, target: &Target) -> Option<Wanted> {
        // A name that no peer ever had is known to have none.
        let find = |name: &Option<String>| match name {
            None => Some(None),
            Some(name) => self.texts.find(name).map(Some),
        };
        Some(Wanted {
            country: target.country,
            state: find(&target.state)?,
            city: find(&target.city)?,
            asn: target.asn,
        })
    }

    fn choice(&self, index: u32, kept: bool) -> Choice {
        let record = &self.records[index as usize];
        Choice {
            peer: PeerId { index, generation: record.generation },
            home: record.home,
            country: record.country,
            kept,
        }
    }

    fn pick(&self, wanted: &Wanted, needs: &Needs<'_>, random: u64) -> Option<u32> {
        let members = &self.lists.lists[*self.lists.by_key.get(&wanted.list_key())? as usize];
        let count = members.len() as u64;
        if count == 0 {
            return None;
        }
        let usable = |index: u32| {
            let record = &self.records[index as usize];
            let id = PeerId { index, generation: record.generation };
            (wanted.fits(record) && (!needs.udp || record.udp) && !needs.exclude.contains(&id)).then_some(record)
        };
        // Bits of one random number for both picks, scaled instead of divided.
        let a = members[(((random & 0xffff_ffff) * count) >> 32) as usize];
        let b = members[(((random >> 32) * count) >> 32) as usize];
        match (usable(a), usable(b)) {
            (Some(x), Some(y)) => Some(if cost(x) <= cost(y) { a } else { b }),
            (Some(_), None) => Some(a),
            (None, Some(_)) => Some(b),
            (None, None) => {
                let start = (((random & 0xffff_ffff) * count) >> 32) as usize;
                let (before, after) = members.split_at(start);
                after.iter().chain(before).take(SCAN_MOST).copied().find(|&index| usable(index).is_some())
            }
        }
    }
}

/// Less is better: tunnels now, weighed by how often opens fail.
fn cost(record: &Record) -> u32 {
    let load = u32::from(record.active.load(Ordering::Relaxed)) + 1;
    let failing = 256 - u32::from(record.score.load(Ordering::Relaxed));
    load * failing
}

/// What the API shows of a peer.
#[derive(Debug, Clone, serde::Serialize, utoipa::ToSchema)]
pub struct PeerView {
    pub device: String,
    pub country: String,
    pub state: String,
    pub city: String,
    pub asn: u32,
    pub version: String,
    /// `compact` or `legacy`.
    pub protocol: &'static str,
    pub tunnels: u16,
    pub cap: u16,
    /// 0 to 1: share of tunnel opens that worked, moving average.
    pub score: f32,
    pub draining: bool,
    /// Its device has carried its share of the day and gets no new tunnels until the next (UTC).
    pub spent: bool,
    pub consent: bool,
    /// Bytes both ways since this registration.
    pub bytes: u64,
    /// Seconds since this registration.
    pub age_seconds: u32,
}

impl Registry {
    pub fn new() -> Self {
        Self::limited(0)
    }

    /// With a limit of bytes that a device may carry in a day (0: none). One that has reached it gets no new tunnels until
    /// [`Registry::new_day`].
    pub fn limited(day_most: u64) -> Self {
        let inner = Inner {
            records: Vec::new(),
            free: Vec::new(),
            live: 0,
            by_device: HashMap::new(),
            lists: Lists::default(),
            texts: Interner::new(1 << 20),
            by_country: HashMap::new(),
        };
        Self {
            inner: RwLock::new(inner),
            // Reserved whole: pages never touched cost nothing, and a choice never has to grow the table.
            sessions: Mutex::new(HashMap::with_capacity(SESSIONS_MOST)),
            day_most,
            carried: Mutex::default(),
            keyed: [RandomState::new(), RandomState::new()],
        }
    }

    fn is_spent(&self, device: u64) -> bool {
        self.day_most > 0 && self.carried.lock().get(&device).is_some_and(|n| *n >= self.day_most)
    }

    /// Adds to what a device has carried today. `true` if it reaches its limit by this.
    fn carry(&self, device: u64, bytes: u64) -> bool {
        if self.day_most == 0 || bytes == 0 {
            return false;
        }
        let mut carried = self.carried.lock();
        let sum = carried.entry(device).or_default();
        let before = std::mem::replace(sum, sum.saturating_add(bytes));
        before < self.day_most && *sum >= self.day_most
    }

    /// What a device carried today before this hub started. Call before peers register.
    pub fn carried_before(&self, device: &str, bytes: u64) {
        self.carry(self.keyed[0].hash_one(device), bytes);
    }

    /// All devices start anew.
    pub fn new_day(&self) {
        let mut inner = self.inner.write();
        self.carried.lock().clear();
        for index in 0..inner.records.len() {
            if std::mem::replace(&mut inner.records[index].spent, false) {
                inner.list(index as u32);
            }
        }
    }

    /// Registers a peer. If its device was registered before, that registration ends and its home is returned.
    pub fn insert(&self, new: &NewPeer<'_>) -> (PeerId, Option<Home>) {
        let device = self.keyed[0].hash_one(new.device);
        let mut inner = self.inner.write();
        let replaced = match inner.by_device.get(&device) {
            Some(&index) => {
                let old = &inner.records[index as usize];
                let (id, home) = (PeerId { index, generation: old.generation }, old.home);
                remove(&mut inner, id, device);
                Some(home)
            }
            None => None,
        };
        let texts = &mut inner.texts;
        let mut text = |s: &str| texts.intern(s).unwrap_or_default();
        let (state, city, version) = (text(new.state), text(new.city), text(new.version));
        let free = inner.free.pop();
        let generation = free.map_or(0, |i| inner.records[i as usize].generation.wrapping_add(1));
        let record = Record {
            generation,
            live: true,
            listed: false,
            consent: new.consent,
            compact: new.compact,
            udp: new.udp,
            draining: false,
            spent: self.is_spent(device),
            cap: new.cap,
            active: AtomicU16::new(0),
            score: AtomicU8::new(FRESH_SCORE),
            country: new.country,
            state,
            city,
            version,
            asn: new.asn,
            since: new.now,
            home: new.home,
            bytes: AtomicU64::new(0),
            device: new.device.into(),
            addr: new.addr,
            places: [(NOWHERE, 0); KEYS],
        };
        let index = match free {
            Some(index) => {
                inner.records[index as usize] = record;
                index
            }
            None => {
                inner.records.push(record);
                (inner.records.len() - 1) as u32
            }
        };
        inner.by_device.insert(device, index);
        inner.live += 1;
        *inner.by_country.entry(new.country).or_default() += 1;
        inner.list(index);
        (PeerId { index, generation }, replaced)
    }

    /// Ends a registration. Harmless if it ended before.
    pub fn remove(&self, id: PeerId) {
        let mut inner = self.inner.write();
        if let Some(record) = inner.get(id) {
            let device = self.keyed[0].hash_one(&*record.device);
            remove(&mut inner, id, device);
        }
    }

    /// No new tunnels for this peer; those it has go on.
    pub fn drain(&self, id: PeerId) {
        let mut inner = self.inner.write();
        if inner.get(id).is_some() {
            inner.records[id.index()].draining = true;
            inner.unlist(id.index);
        }
    }

    /// A tunnel through the peer begins. `false` if it is gone or full.
    pub fn tunnel_begins(&self, id: PeerId) -> bool {
        let full = {
            let inner = self.inner.read();
            let Some(record) = inner.get(id) else { return false };
            let claimed =
                record.active.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| (n < record.cap).then_some(n + 1));
            match claimed {
                Err(_) => return false,
                Ok(before) => before + 1 >= record.cap,
            }
        };
        if full {
            let mut inner = self.inner.write();
            let still = inner.get(id).is_some_and(|r| r.active.load(Ordering::Relaxed) >= r.cap);
            if still {
                inner.unlist(id.index);
            }
        }
        true
    }

    /// A tunnel ended after moving `bytes` both ways.
    pub fn tunnel_ends(&self, id: PeerId, bytes: u64) {
        let (relist, spent) = {
            let inner = self.inner.read();
            let Some(record) = inner.get(id) else { return };
            record.bytes.fetch_add(bytes, Ordering::Relaxed);
            let before = record.active.fetch_sub(1, Ordering::Relaxed);
            let spent = self.day_most > 0 && self.carry(self.keyed[0].hash_one(&*record.device), bytes);
            (before == record.cap, spent)
        };
        if relist || spent {
            let mut inner = self.inner.write();
            if inner.get(id).is_some() {
                if spent {
                    inner.records[id.index()].spent = true;
                    inner.unlist(id.index);
                }
                inner.list(id.index);
            }
        }
    }

    /// How an open through the peer went: moves its score.
    pub fn opened(&self, id: PeerId, worked: bool) {
        let inner = self.inner.read();
        let Some(record) = inner.get(id) else { return };
        let old = i32::from(record.score.load(Ordering::Relaxed));
        let goal = if worked { 255 } else { 0 };
        let step = (goal - old) / 8;
        let new = if step == 0 { goal } else { old + step };
        record.score.store(new as u8, Ordering::Relaxed);
    }

    /// Chooses a peer. `random` is any fresh random number.
    pub fn choose(&self, target: &Target, needs: &Needs<'_>, random: u64) -> Option<Choice> {
        let inner = self.inner.read();
        let wanted = inner.wanted(target)?;
        inner.pick(&wanted, needs, random).map(|index| inner.choice(index, false))
    }

    /// Like [`Registry::choose`] for a sticky session: the same peer for as long as the session lives and the peer is
    /// there. With the peer gone, `None` if another is not wanted.
    pub fn choose_sticky(
        &self,
        sticky: &Sticky<'_>,
        target: &Target,
        needs: &Needs<'_>,
        random: u64,
    ) -> Option<Choice> {
        let Sticky { owner, session, replace, now, life } = *sticky;
        let name = (self.keyed[0].hash_one((owner, session)), self.keyed[1].hash_one((owner, session)));
        let held = self.sessions.lock().get(&name).copied().filter(|s| s.until > now);
        let inner = self.inner.read();
        let wanted = inner.wanted(target)?;
        if let Some(held) = held {
            let there = match inner.get(held.peer) {
                Some(_) => Some(held.peer.index),
                // The registration ended, but the device may have come back under another.
                None => inner.by_device.get(&held.device).copied(),
            };
            if let Some(index) = there {
                let record = &inner.records[index as usize];
                let id = PeerId { index, generation: record.generation };
                let room = record.active.load(Ordering::Relaxed) < record.cap
                    && !record.draining
                    && !record.spent
                    && record.consent;
                if wanted.fits(record) && room && (!needs.udp || record.udp) && !needs.exclude.contains(&id) {
                    if id != held.peer
                        && let Some(session) = self.sessions.lock().get_mut(&name)
                    {
                        session.peer = id;
                    }
                    return Some(inner.choice(index, true));
                }
            }
            if !replace {
                return None;
            }
        }
        let index = inner.pick(&wanted, needs, random)?;
        let choice = inner.choice(index, false);
        let device = self.keyed[0].hash_one(&*inner.records[index as usize].device);
        let mut sessions = self.sessions.lock();
        if sessions.len() < SESSIONS_MOST || sessions.contains_key(&name) {
            // A moved session keeps its end; a new one gets its whole life.
            let until = held.map_or(now.saturating_add(life), |h| h.until);
            sessions.insert(name, Session { peer: choice.peer, device, until });
        }
        Some(choice)
    }

    /// Forgets sessions that ended. Call now and then.
    pub fn sweep_sessions(&self, now: u32) {
        self.sessions.lock().retain(|_, s| s.until > now);
    }

    pub fn sessions(&self) -> usize {
        self.sessions.lock().len()
    }

    /// Registered peers.
    pub fn len(&self) -> usize {
        self.inner.read().live
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Registered peers by country, most first.
    pub fn by_country(&self) -> Vec<(Country, u32)> {
        let mut all: Vec<_> =
            self.inner.read().by_country.iter().filter(|(_, n)| **n > 0).map(|(c, n)| (*c, *n)).collect();
        all.sort_by_key(|(c, n)| (std::cmp::Reverse(*n), *c));
        all
    }

    /// Where the peers are that may be chosen now, for the directory of hubs.
    pub fn places(&self) -> Places {
        // Hashed without the lock: there may be tens of thousands.
        let named: Vec<(u64, Country, String, u32)> = {
            let inner = self.inner.read();
            let members = |list: &u32| inner.lists.lists[*list as usize].first();
            // Pairs of city and network are many, and told by their halves.
            let told = inner.lists.by_key.iter().filter(|(key, _)| *key >> 60 != 7);
            told.filter_map(|(key, list)| Some((key >> 60, *members(list)?)))
                .map(|(kind, index)| {
                    let record = &inner.records[index as usize];
                    let text = match kind {
                        2 => inner.texts.text(record.state).to_owned(),
                        3 | 4 => inner.texts.text(record.city).to_owned(),
                        _ => String::new(),
                    };
                    (kind, record.country, text, record.asn)
                })
                .collect()
        };
        let hashes = named.iter().filter_map(|(kind, country, text, asn)| {
            Some(match kind {
                0 => places::hash(None, Place::Country),
                1 => places::hash(Some(*country), Place::Country),
                2 => places::hash(Some(*country), Place::State(text)),
                3 => places::hash(Some(*country), Place::City(text)),
                4 => places::hash(None, Place::City(text)),
                5 => places::hash(None, Place::Asn(*asn)),
                6 => places::hash(Some(*country), Place::Asn(*asn)),
                _ => return None,
            })
        });
        Places::new(hashes.collect())
    }

    /// Whether there may be a peer for the target, judged as other hubs judge it by [`Registry::places`].
    pub fn serves(&self, target: &Target) -> bool {
        let inner = self.inner.read();
        let c = target.country.map(country_bits);
        let symbol = |name: &str| inner.texts.find(name);
        places::wanted(target).all(|place| {
            let key = match (place, c) {
                (Place::Country, None) => key(0, 0, 0),
                (Place::Country, Some(c)) => key(1, c, 0),
                (Place::State(name), c) => {
                    let Some(symbol) = symbol(name) else { return false };
                    key(2, c.unwrap_or(0), symbol.0)
                }
                (Place::City(name), c) => {
                    let Some(symbol) = symbol(name) else { return false };
                    c.map_or(key(4, 0, symbol.0), |c| key(3, c, symbol.0))
                }
                (Place::Asn(asn), c) => c.map_or(key(5, 0, asn), |c| key(6, c, asn)),
            };
            inner.lists.by_key.get(&key).is_some_and(|l| !inner.lists.lists[*l as usize].is_empty())
        })
    }

    /// Up to `most` peers, from the `from`-th place of the table on; and the place to go on from.
    pub fn page(&self, from: usize, most: usize, country: Option<Country>, now: u32) -> (Vec<PeerView>, Option<usize>) {
        let inner = self.inner.read();
        let mut out = Vec::new();
        for (at, record) in inner.records.iter().enumerate().skip(from) {
            if !record.live || country.is_some_and(|c| c != record.country) {
                continue;
            }
            if out.len() == most {
                return (out, Some(at));
            }
            out.push(view(&inner, record, now));
        }
        (out, None)
    }

    /// One peer by its device's name, with its address.
    pub fn find(&self, device: &str, now: u32) -> Option<(PeerId, Home, IpAddr, PeerView)> {
        let inner = self.inner.read();
        let index = *inner.by_device.get(&self.keyed[0].hash_one(device))?;
        let record = &inner.records[index as usize];
        if &*record.device != device {
            return None;
        }
        let id = PeerId { index, generation: record.generation };
        Some((id, record.home, record.addr, view(&inner, record, now)))
    }

    /// The device behind a registration.
    pub fn device(&self, id: PeerId) -> Option<String> {
        self.inner.read().get(id).map(|r| r.device.to_string())
    }
}

fn view(inner: &Inner, record: &Record, now: u32) -> PeerView {
    PeerView {
        device: record.device.to_string(),
        country: record.country.to_string(),
        state: inner.texts.text(record.state).to_owned(),
        city: inner.texts.text(record.city).to_owned(),
        asn: record.asn,
        version: inner.texts.text(record.version).to_owned(),
        protocol: if record.compact { "compact" } else { "legacy" },
        tunnels: record.active.load(Ordering::Relaxed),
        cap: record.cap,
        score: f32::from(record.score.load(Ordering::Relaxed)) / 255.0,
        draining: record.draining,
        spent: record.spent,
        consent: record.consent,
        bytes: record.bytes.load(Ordering::Relaxed),
        age_seconds: now.saturating_sub(record.since),
    }
}

fn remove(inner: &mut Inner, id: PeerId, device: u64) {
    if inner.get(id).is_none() {
        return;
    }
    inner.unlist(id.index);
    let record = &mut inner.records[id.index()];
    record.live = false;
    let country = record.country;
    record.device = Box::default();
    inner.by_device.remove(&device);
    inner.free.push(id.index);
    inner.live -= 1;
    if let Some(count) = inner.by_country.get_mut(&country) {
        *count -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn peer<'a>(device: &'a str, country: &str, city: &'a str, asn: u32) -> NewPeer<'a> {
        NewPeer {
            device,
            version: "1",
            addr: IpAddr::from([192, 0, 2, 1]),
            country: Country::parse(country).expect("country"),
            state: "s",
            city,
            asn,
            home: Home { shard: 0, slot: 0, serial: 0 },
            cap: 2,
            compact: true,
            udp: true,
            consent: true,
            now: 0,
        }
    }

    fn want(params: &str) -> Target {
        let mut target = Target::default();
        crate::target::parse_params(params, &mut target).expect("valid");
        target
    }

    #[test]
    fn a_target_is_met_exactly_or_not_at_all() {
        let registry = Registry::new();
        for i in 0..300u32 {
            let (country, city) = [("US", "miami"), ("US", "boston"), ("DE", "berlin")][i as usize % 3];
            registry.insert(&peer(&format!("d{i}"), country, city, 100 + i % 5));
        }
        for (params, fits) in [
            ("country-us", Some(("US", None))),
            ("country-us-city-miami", Some(("US", Some("miami")))),
            ("city-berlin-asn-102", Some(("DE", Some("berlin")))),
            ("country-de-city-miami", None),
            ("city-paris", None),
            ("asn-999", None),
            ("country-us-state-x", None),
        ] {
            for random in 0..200u64 {
                let got = registry.choose(&want(params), &Needs::default(), random.wrapping_mul(0x9e37_79b9_7f4a_7c15));
                match fits {
                    None => assert_eq!(got, None, "{params}"),
                    Some((country, city)) => {
                        let device = registry.device(got.expect(params).peer).expect("live");
                        let (.., view) = registry.find(&device, 0).expect("live");
                        assert_eq!(view.country, country);
                        assert!(city.is_none_or(|c| c == view.city));
                    }
                }
            }
        }
    }

    #[test]
    fn full_draining_and_unwilling_peers_are_not_chosen() {
        let registry = Registry::new();
        let (id, _) = registry.insert(&peer("a", "US", "x", 1));
        let any = || registry.choose(&Target::default(), &Needs::default(), 7);
        assert!(registry.tunnel_begins(id) && any().is_some());
        assert!(registry.tunnel_begins(id) && any().is_none());
        assert!(!registry.tunnel_begins(id), "over its cap");
        registry.tunnel_ends(id, 10);
        assert!(any().is_some());
        registry.drain(id);
        assert!(any().is_none());
        registry.tunnel_ends(id, 5);
        assert!(any().is_none(), "the end of a tunnel does not undo a drain");
        assert_eq!(registry.find("a", 0).expect("live").3.bytes, 15);
        registry.insert(&NewPeer { consent: false, ..peer("b", "US", "x", 1) });
        assert!(any().is_none());
        let (c, _) = registry.insert(&NewPeer { udp: false, ..peer("c", "US", "x", 1) });
        assert!(registry.choose(&Target::default(), &Needs { udp: true, exclude: &[] }, 1).is_none());
        assert!(registry.choose(&Target::default(), &Needs { udp: false, exclude: &[c] }, 1).is_none());
        assert_eq!(any().map(|c| c.peer), Some(c));
    }

    #[test]
    fn a_session_stays_until_its_peer_goes_or_its_time_is_up() {
        let registry = Registry::new();
        for i in 0..50 {
            registry.insert(&peer(&format!("d{i}"), "US", "x", 1));
        }
        let us = want("country-us");
        let ask = |owner: &str, now: u32, random: u64, replace: bool| {
            registry.choose_sticky(
                &Sticky { owner, session: "s", replace, now, life: 60 },
                &us,
                &Needs::default(),
                random,
            )
        };
        let first = ask("alice", 0, 1, true).expect("a peer");
        for random in 0..100 {
            assert_eq!(ask("alice", 59, random << 50, true).map(|c| c.peer), Some(first.peer));
        }
        let others: std::collections::HashSet<_> =
            (0..50).map(|r: u64| ask(&format!("bob{r}"), 0, r << 58 | r << 26, true).expect("a peer").peer).collect();
        assert!(others.len() > 5, "other customers' sessions of the same name are others");
        // The device comes back under a new registration: the same session goes on with it.
        let device = registry.device(first.peer).expect("live");
        let (again, replaced) = registry.insert(&peer(&device, "US", "x", 1));
        assert!(replaced.is_some() && again != first.peer);
        let kept = ask("alice", 30, 5, false).expect("kept");
        assert!(kept.kept && kept.peer == again);
        // Gone for good: refused, or moved, as asked.
        registry.remove(again);
        assert_eq!(ask("alice", 31, 5, false), None);
        let moved = ask("alice", 31, 5, true).expect("another");
        assert!(!moved.kept);
        assert_eq!(ask("alice", 40, 9, false).map(|c| c.peer), Some(moved.peer));
        // The moved session ends when the first would have ended.
        registry.sweep_sessions(60);
        assert_eq!(registry.sessions(), 0);
    }

    #[test]
    fn load_spreads_and_failing_peers_are_avoided() {
        let registry = Registry::new();
        let ids: Vec<_> = (0..10)
            .map(|i| registry.insert(&NewPeer { cap: 1000, ..peer(&format!("d{i}"), "US", "x", 1) }).0)
            .collect();
        for _ in 0..40 {
            registry.opened(ids[0], false);
        }
        let mut counts = HashMap::new();
        let mut random = 1u64;
        for _ in 0..2000 {
            random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let choice = registry.choose(&Target::default(), &Needs::default(), random ^ random >> 29).expect("a peer");
            registry.tunnel_begins(choice.peer);
            *counts.entry(choice.peer).or_insert(0) += 1;
        }
        let failing = counts.get(&ids[0]).copied().unwrap_or(0);
        assert!(failing < 100, "the failing peer got {failing} of 2000");
        assert!(ids[1..].iter().all(|id| (150..320).contains(&counts[id])), "{counts:?}");
    }

    #[derive(Debug, Clone)]
    enum Step {
        Insert(u8, u8),
        Remove(u8),
        Begin(u8),
        End(u8),
        Drain(u8),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (any::<u8>(), any::<u8>()).prop_map(|(a, b)| Step::Insert(a % 20, b)),
            any::<u8>().prop_map(|a| Step::Remove(a % 20)),
            any::<u8>().prop_map(|a| Step::Begin(a % 20)),
            any::<u8>().prop_map(|a| Step::End(a % 20)),
            any::<u8>().prop_map(|a| Step::Drain(a % 20)),
        ]
    }

    proptest! {
        /// Against a plain model: after any history, exactly the peers that may be chosen can be.
        #[test]
        fn the_lists_agree_with_a_model(steps in proptest::collection::vec(step(), 1..120)) {
            let registry = Registry::new();
            let mut model: HashMap<u8, (PeerId, u8, u16, bool)> = HashMap::new();
            for step in steps {
                match step {
                    Step::Insert(who, place) => {
                        let cities = ["a", "b", "c"];
                        let city = cities[place as usize % 3];
                        let (id, _) = registry.insert(&peer(&format!("d{who}"), ["US", "DE"][place as usize / 3 % 2], city, u32::from(place / 6 % 3)));
                        model.insert(who, (id, place, 0, false));
                    }
                    Step::Remove(who) => if let Some((id, ..)) = model.remove(&who) { registry.remove(id); },
                    Step::Begin(who) => if let Some((id, _, active, _)) = model.get_mut(&who) {
                        let began = registry.tunnel_begins(*id);
                        prop_assert_eq!(began, *active < 2);
                        *active += u16::from(began);
                    },
                    Step::End(who) => if let Some((id, _, active, _)) = model.get_mut(&who) && *active > 0 {
                        *active -= 1;
                        registry.tunnel_ends(*id, 1);
                    },
                    Step::Drain(who) => if let Some((id, _, _, draining)) = model.get_mut(&who) {
                        *draining = true;
                        registry.drain(*id);
                    },
                }
                prop_assert_eq!(registry.len(), model.len());
                for (params, fits) in [
                    ("", Box::new(|_: u8| true) as Box<dyn Fn(u8) -> bool>),
                    ("country-us-city-a", Box::new(|p| p % 3 == 0 && p / 3 % 2 == 0)),
                    ("city-b-asn-1", Box::new(|p| p % 3 == 1 && p / 6 % 3 == 1)),
                    ("country-de-asn-2", Box::new(|p| p / 3 % 2 == 1 && p / 6 % 3 == 2)),
                ] {
                    let mut expected: Vec<PeerId> = model.values().filter(|(_, p, n, d)| fits(*p) && *n < 2 && !d).map(|v| v.0).collect();
                    let mut got = Vec::new();
                    while let Some(choice) = registry.choose(&want(params), &Needs { udp: false, exclude: &got.clone() }, 12345) {
                        got.push(choice.peer);
                    }
                    got.sort_by_key(|id| id.index);
                    expected.sort_by_key(|id| id.index);
                    prop_assert_eq!(&got, &expected, "{}", params);
                }
            }
        }
    }
}
