//! A worker: one process, one shard, its share of every listener.

use crate::board::{B, Board, L, W, latency_bucket};
use crate::config::{Protocol, ProxyIn, ProxyOut};
use crate::geo::Countries;
use crate::maglev::{Maglev, hash};
use crate::proxy::{self, Parsed};
use crate::table::{Entry, FromWorker, Table, Target, Targets, ToWorker};
use clawhq_wire::admission::{Client, Clients};
use clawhq_wire::shared::{bump, drop_by};
use clawhq_wire::{Closed, Conn, Io, Limits, Service, Token, Written, budget, socket, spawn};
use std::collections::HashMap;
use std::io::{self, BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::os::fd::RawFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

/// Backends tried for one client before it is turned away.
const TRIES: u8 = 3;
/// How long a proxy in front may take to send its header.
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);
const BEAT: Duration = Duration::from_secs(1);

/// Tags: a listener's is its place with this bit; a flow's sockets have `flow << 1 | side`.
const LISTENER: u64 = 1 << 63;
const CLIENT: usize = 0;
const BACKEND: usize = 1;
/// Timer payload of the worker's own beat; others are `flow << 32 | generation`.
const BEAT_TIMER: u64 = u64::MAX;
const NO_SLOT: u16 = u16::MAX;

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Free,
    Header,
    Connecting,
    Established,
    Udp,
}

struct Flow {
    state: State,
    tries: u8,
    listener: u8,
    /// Its client is counted by country.
    known: bool,
    generation: u32,
    slot: u16,
    country: u16,
    /// Bytes moved by copying, by side: past the threshold the side is spliced.
    moved: [u32; 2],
    /// Client and backend.
    ends: [Token; 2],
    client: Option<Client>,
    /// When the connect started, in microseconds of the worker's clock.
    started: u64,
    /// Who connected to us.
    peer: SocketAddr,
    extra: Option<Box<Extra>>,
}

/// What only flows behind or before a PROXY header carry.
struct Extra {
    /// Header bytes so far, or payload that came with the header.
    pending: Vec<u8>,
    /// Client and destination as the proxy in front told.
    told: Option<(SocketAddr, SocketAddr)>,
}

struct Live {
    entry: Entry,
    token: Token,
    udp: HashMap<SocketAddr, u32>,
}

#[derive(Default)]
struct Pool {
    name: String,
    targets: Vec<Target>,
    source: Option<std::net::IpAddr>,
    maglev: Maglev,
    /// Epoch of the board that the Maglev table was built for.
    built: Option<u64>,
    turn: usize,
}

struct Balancer {
    board: Board,
    worker: usize,
    clients: Clients,
    listeners: Vec<Option<Live>>,
    pools: Vec<Pool>,
    flows: Vec<Flow>,
    free: Vec<u32>,
    connections: u64,
    splice_after: u32,
    countries: Option<(PathBuf, Countries)>,
    control: UnixStream,
    clock: Instant,
    scratch: Vec<u8>,
}

impl Balancer {
    fn side(tag: u64) -> (usize, usize) {
        ((tag >> 1) as usize, (tag & 1) as usize)
    }

    fn count(&self, listener: usize, what: L, by: u64) {
        bump(self.board.listener(self.worker, listener, what), by);
    }

    fn micros(&self) -> u64 {
        self.clock.elapsed().as_micros() as u64
    }

    /// Whether limits let one more flow of `peer` into the listener; counts it if so.
    fn admit_flow(&mut self, listener: usize, peer: SocketAddr) -> Option<u32> {
        let config = &self.listeners[listener].as_ref()?.entry.listener;
        let all: u64 = (0..self.board.workers()).map(|w| self.board.worker(w, W::Active).load(Relaxed)).sum();
        let full =
            config.connections > 0 && self.board.sum_listener(listener, L::Active) >= u64::from(config.connections);
        if all >= self.connections || full {
            self.count(listener, L::RejectedLimit, 1);
            return None;
        }
        if config.proxy_in == ProxyIn::Required && !config.trusted.iter().any(|range| range.contains(peer.ip())) {
            self.count(listener, L::RejectedProxy, 1);
            return None;
        }
        let mut flow = Flow {
            state: State::Connecting,
            tries: 0,
            listener: listener as u8,
            known: false,
            generation: 0,
            slot: NO_SLOT,
            country: 0,
            moved: [0; 2],
            ends: [Token::NONE; 2],
            client: None,
            started: 0,
            peer,
            extra: None,
        };
        // Behind a proxy the client is known only after its header.
        if config.proxy_in == ProxyIn::Off && !self.know_client(&mut flow, peer) {
            return None;
        }
        self.count(listener, L::Active, 1);
        self.count(listener, L::Total, 1);
        bump(self.board.worker(self.worker, W::Active), 1);
        Some(match self.free.pop() {
            Some(index) => {
                flow.generation = self.flows[index as usize].generation;
                self.flows[index as usize] = flow;
                index
            }
            None => {
                self.flows.push(flow);
                self.flows.len() as u32 - 1
            }
        })
    }

    /// Applies the client's own limit and counts its country.
    fn know_client(&self, flow: &mut Flow, client: SocketAddr) -> bool {
        let listener = usize::from(flow.listener);
        let most = self.listeners[listener].as_ref().map_or(0, |live| live.entry.listener.per_client);
        if most > 0 {
            let who = self.clients.client(client.ip());
            if !self.clients.admit(who, u64::from(most)) {
                self.count(listener, L::RejectedClient, 1);
                return false;
            }
            flow.client = Some(who);
        }
        if let Some((_, countries)) = &self.countries {
            flow.country = countries.place(client.ip()) as u16;
        }
        let words = self.board.country(self.worker, usize::from(flow.country));
        bump(&words[0], 1);
        bump(&words[1], 1);
        flow.known = true;
        true
    }

    /// Frees the flow and every count it holds.
    fn forget(&mut self, index: usize) {
        let flow = &mut self.flows[index];
        if flow.state == State::Free {
            return;
        }
        let known = flow.known;
        flow.state = State::Free;
        flow.generation = flow.generation.wrapping_add(1);
        flow.extra = None;
        let (slot, listener, country, client) =
            (flow.slot, usize::from(flow.listener), usize::from(flow.country), flow.client);
        if slot != NO_SLOT {
            drop_by(&self.board.active(usize::from(slot))[self.worker], 1);
        }
        if let Some(client) = client {
            self.clients.release(client);
        }
        if known {
            drop_by(&self.board.country(self.worker, country)[0], 1);
        }
        drop_by(self.board.listener(self.worker, listener, L::Active), 1);
        drop_by(self.board.worker(self.worker, W::Active), 1);
        self.free.push(index as u32);
    }

    /// Ends a flow at once: both sockets are reset.
    fn kill(&mut self, io: &mut Io, index: usize) {
        for end in self.flows[index].ends {
            io.abort(end);
        }
        self.forget(index);
    }

    /// The backend with the fewest connections for its weight, all workers counted; never `not`, which has just failed.
    fn least(&mut self, pool: usize, not: u16) -> Option<(usize, SocketAddr)> {
        let board = self.board;
        let pool = self.pools.get_mut(pool)?;
        let count = pool.targets.len();
        pool.turn = if pool.turn + 1 >= count { 0 } else { pool.turn + 1 };
        let mut best: Option<(u64, u64, &Target)> = None;
        let (before, after) = pool.targets.split_at(pool.turn.min(count));
        for target in after.iter().chain(before) {
            let weight = board.control(target.slot).weight();
            if weight == 0 || target.slot == usize::from(not) {
                continue;
            }
            let active = board.active_total(target.slot);
            if target.connections > 0 && active >= u64::from(target.connections) {
                continue;
            }
            if best.is_none_or(|(held, other, _)| (active + 1) * other < held * weight) {
                best = Some((active + 1, weight, target));
            }
        }
        best.map(|(_, _, target)| (target.slot, target.addr))
    }

    /// The backend for a UDP flow by the hash of its 4-tuple.
    fn hashed(&mut self, pool: usize, from: SocketAddr, to: SocketAddr) -> Option<(usize, SocketAddr)> {
        let board = self.board;
        let pool = self.pools.get_mut(pool)?;
        let epoch = board.epoch().load(Relaxed);
        if pool.built != Some(epoch) {
            let weights: Vec<(&str, u64)> =
                pool.targets.iter().map(|target| (target.name.as_str(), board.control(target.slot).weight())).collect();
            pool.maglev = Maglev::build(&weights);
            pool.built = Some(epoch);
        }
        let target = &pool.targets[pool.maglev.choose(tuple_hash(from, to))?];
        let full = target.connections > 0 && board.active_total(target.slot) >= u64::from(target.connections);
        if full {
            return None;
        }
        Some((target.slot, target.addr))
    }

    fn take_slot(&mut self, index: usize, slot: usize) {
        self.leave_slot(index);
        self.flows[index].slot = slot as u16;
        bump(&self.board.active(slot)[self.worker], 1);
    }

    fn leave_slot(&mut self, index: usize) {
        let slot = std::mem::replace(&mut self.flows[index].slot, NO_SLOT);
        if slot != NO_SLOT {
            drop_by(&self.board.active(usize::from(slot))[self.worker], 1);
        }
    }

    /// Starts the connect to the best backend; the flow ends when there is none.
    fn connect(&mut self, io: &mut Io, index: usize) {
        let listener = usize::from(self.flows[index].listener);
        let mut failed = self.flows[index].slot;
        self.leave_slot(index);
        while self.flows[index].tries < TRIES {
            let Some(live) = self.listeners[listener].as_ref() else { break };
            let (pool, timeout) = (live.entry.pool, live.entry.listener.connect_timeout.0);
            let source = self.pools.get(pool).and_then(|pool| pool.source);
            let Some((slot, addr)) = self.least(pool, failed) else { break };
            self.flows[index].tries += 1;
            self.flows[index].started = self.micros();
            match io.connect(addr, source, timeout, (index as u64) << 1 | BACKEND as u64) {
                Ok(token) => {
                    self.take_slot(index, slot);
                    let flow = &mut self.flows[index];
                    flow.state = State::Connecting;
                    flow.ends[BACKEND] = token;
                    // The client's bytes wait in the kernel until a backend is there to take them.
                    io.pause(flow.ends[CLIENT]);
                    io.pair(flow.ends[CLIENT], token);
                    return;
                }
                Err(_) => {
                    self.failed(slot, B::ConnectFailed);
                    failed = slot as u16;
                }
            }
        }
        self.count(listener, L::NoBackend, 1);
        self.kill(io, index);
    }

    fn failed(&self, slot: usize, how: B) {
        bump(self.board.backend(self.worker, slot, how), 1);
        self.board.streak(slot).fetch_add(1, Relaxed);
    }

    /// Counts `count` bytes that came from `side`.
    fn moved(&self, index: usize, side: usize, count: usize) {
        let flow = &self.flows[index];
        let (of_backend, of_listener) =
            if side == CLIENT { (B::BytesIn, L::BytesIn) } else { (B::BytesOut, L::BytesOut) };
        if flow.slot != NO_SLOT {
            bump(self.board.backend(self.worker, usize::from(flow.slot), of_backend), count as u64);
        }
        self.count(usize::from(flow.listener), of_listener, count as u64);
    }

    /// Reads what a proxy in front says, and goes on to a backend when it is all there.
    fn header(&mut self, io: &mut Io, index: usize, bytes: &[u8]) {
        let listener = usize::from(self.flows[index].listener);
        let extra = self.flows[index].extra.get_or_insert_with(|| Box::new(Extra { pending: Vec::new(), told: None }));
        extra.pending.extend_from_slice(bytes);
        match proxy::parse(&extra.pending) {
            Parsed::More => {}
            Parsed::Bad => {
                self.count(listener, L::RejectedProxy, 1);
                self.kill(io, index);
            }
            Parsed::Done(header) => {
                extra.pending.drain(..header.length);
                extra.told = header.addrs;
                let client = header.addrs.map_or(self.flows[index].peer, |(from, _)| from);
                if !self.know(index, client) {
                    return self.kill(io, index);
                }
                self.connect(io, index);
            }
        }
    }

    fn know(&mut self, index: usize, client: SocketAddr) -> bool {
        let empty = Flow::empty(self.flows[index].peer);
        let mut flow = std::mem::replace(&mut self.flows[index], empty);
        let known = self.know_client(&mut flow, client);
        self.flows[index] = flow;
        known
    }

    /// The flow's client and the address it came to, as backends are to be told.
    fn addresses(&self, io: &Io, index: usize) -> (SocketAddr, SocketAddr) {
        let flow = &self.flows[index];
        if let Some(told) = flow.extra.as_ref().and_then(|extra| extra.told) {
            return told;
        }
        let live = self.listeners[usize::from(flow.listener)].as_ref();
        let bound = live.map_or(flow.peer, |live| live.entry.listener.listen);
        (flow.peer, io.local_addr(flow.ends[CLIENT]).unwrap_or(bound))
    }

    // --- UDP ---------------------------------------------------------------------------------------------------

    fn client_sent(&mut self, io: &mut Io, listener: usize, from: SocketAddr, bytes: &[u8]) {
        self.count(listener, L::DatagramsIn, 1);
        let Some(live) = self.listeners[listener].as_ref() else { return };
        let mut payload = bytes;
        let mut told = None;
        if live.entry.listener.proxy_in == ProxyIn::Required
            && let Parsed::Done(header) = proxy::parse(bytes)
        {
            (payload, told) = (&bytes[header.length..], header.addrs);
        }
        let index = match live.udp.get(&from) {
            Some(index) => *index as usize,
            None => {
                if live.entry.listener.proxy_in == ProxyIn::Required && payload.len() == bytes.len() {
                    return self.count(listener, L::RejectedProxy, 1);
                }
                let Some(index) = self.open_udp(io, listener, from, told) else { return };
                index
            }
        };
        let slot = self.flows[index].slot;
        // A flow stays with its backend until that is out of service.
        if (slot == NO_SLOT || self.board.control(usize::from(slot)).is_down()) && !self.pin(io, index) {
            return;
        }
        let Some(live) = self.listeners[listener].as_ref() else { return };
        let sent = if live.entry.listener.proxy_out == ProxyOut::V2 {
            let (client, to) = self.addresses(io, index);
            let mut datagram = std::mem::take(&mut self.scratch);
            datagram.clear();
            datagram.extend_from_slice(&proxy::v2(client, to, true));
            datagram.extend_from_slice(payload);
            let sent = io.send(self.flows[index].ends[BACKEND], None, &datagram);
            self.scratch = datagram;
            sent
        } else {
            io.send(self.flows[index].ends[BACKEND], None, payload)
        };
        if sent {
            self.moved(index, CLIENT, payload.len());
        } else {
            self.count(listener, L::DatagramsDropped, 1);
        }
    }

    fn open_udp(
        &mut self,
        io: &mut Io,
        listener: usize,
        from: SocketAddr,
        told: Option<(SocketAddr, SocketAddr)>,
    ) -> Option<usize> {
        let index = self.admit_flow(listener, from)? as usize;
        self.flows[index].state = State::Udp;
        if let Some((client, _)) = told {
            self.flows[index].extra = Some(Box::new(Extra { pending: Vec::new(), told }));
            if !self.know(index, client) {
                self.forget(index);
                return None;
            }
        }
        if !self.pin(io, index) {
            return None;
        }
        self.listeners[listener].as_mut()?.udp.insert(from, index as u32);
        Some(index)
    }

    /// Gives a UDP flow its backend; the flow ends when there is none.
    fn pin(&mut self, io: &mut Io, index: usize) -> bool {
        let listener = usize::from(self.flows[index].listener);
        let peer = self.flows[index].peer;
        io.abort(std::mem::replace(&mut self.flows[index].ends[BACKEND], Token::NONE));
        self.leave_slot(index);
        let opened = self.listeners[listener]
            .as_ref()
            .map(|live| (live.entry.pool, live.entry.listener.clone()))
            .and_then(|(pool, config)| {
                let (slot, addr) = self.hashed(pool, peer, config.listen)?;
                let source = self.pools[pool].source;
                let socket = socket::udp_connected(addr, source).ok()?;
                let token = io.udp(socket, (index as u64) << 1 | BACKEND as u64).ok()?;
                io.set_idle(token, Some(config.idle_timeout.0));
                Some((slot, token))
            });
        match opened {
            Some((slot, token)) => {
                self.take_slot(index, slot);
                self.flows[index].ends[BACKEND] = token;
                bump(self.board.backend(self.worker, slot, B::Total), 1);
                true
            }
            None => {
                self.count(listener, L::NoBackend, 1);
                self.end_udp(io, index);
                false
            }
        }
    }

    fn end_udp(&mut self, io: &mut Io, index: usize) {
        let (listener, peer) = (usize::from(self.flows[index].listener), self.flows[index].peer);
        if let Some(live) = self.listeners[listener].as_mut()
            && live.udp.get(&peer) == Some(&(index as u32))
        {
            live.udp.remove(&peer);
            if live.udp.is_empty() {
                live.udp.shrink_to_fit();
            }
        }
        io.abort(self.flows[index].ends[BACKEND]);
        self.forget(index);
    }

    // --- table -------------------------------------------------------------------------------------------------

    /// Puts a table in place. What can fail (sockets, the country database) comes first, so a failure changes nothing.
    fn apply(&mut self, io: &mut Io, table: Table) -> Result<(), String> {
        let countries = match &table.country_database {
            Some(file) => {
                Some((file.clone(), Countries::open(file).map_err(|error| format!("{}: {error}", file.display()))?))
            }
            None => None,
        };
        let mut opened: Vec<(usize, Token)> = Vec::new();
        for entry in &table.entries {
            if self
                .listeners
                .get(entry.id)
                .and_then(Option::as_ref)
                .is_some_and(|live| io.is_open(live.token) && live.entry.same_socket(entry))
            {
                continue;
            }
            let tag = LISTENER | entry.id as u64;
            let token = match entry.listener.protocol {
                Protocol::Tcp => {
                    socket::listen(entry.listener.listen, socket::somaxconn()).and_then(|socket| io.listen(socket, tag))
                }
                Protocol::Udp => socket::udp(entry.listener.listen).and_then(|socket| io.udp(socket, tag)),
            };
            match token {
                Ok(token) => opened.push((entry.id, token)),
                Err(error) => {
                    for (_, token) in opened {
                        io.unlisten(token);
                    }
                    return Err(format!("{} {}: {error}", entry.listener.name, entry.listener.listen));
                }
            }
        }
        self.countries = countries;
        self.connections = table.connections;
        self.splice_after = table.splice_after;
        let names: Vec<String> = self.pools.iter().map(|pool| pool.name.clone()).collect();
        self.pools = table.pools.into_iter().map(Pool::from).collect();
        let places = table.entries.iter().map(|entry| entry.id + 1).max().unwrap_or(0).max(self.listeners.len());
        self.listeners.resize_with(places, || None);
        let mut kept = vec![false; places];
        for entry in table.entries {
            let id = entry.id;
            kept[id] = true;
            let token = opened.iter().find(|(place, _)| *place == id).map(|(_, token)| *token);
            match (self.listeners[id].as_mut(), token) {
                (Some(live), None) => live.entry = entry,
                (_, Some(token)) => {
                    // Another socket under the same name: what waits at the old one is served by the new entry.
                    self.close_listener(io, id);
                    self.listeners[id] = Some(Live { entry, token, udp: HashMap::new() });
                }
                (None, None) => unreachable!("a listener is open already or was opened above"),
            }
        }
        for id in (0..places).filter(|id| !kept[*id]) {
            self.close_listener(io, id);
            if let Some(live) = self.listeners[id].as_mut() {
                // Found by name, for its number may belong to another pool now.
                let name = names.get(live.entry.pool);
                live.entry.pool = self.pools.iter().position(|pool| Some(&pool.name) == name).unwrap_or(usize::MAX);
            }
        }
        Ok(())
    }

    /// TCP connections of a closed listener go on; its UDP flows end, for their answers have no socket to leave by.
    fn close_listener(&mut self, io: &mut Io, id: usize) {
        let Some(live) = self.listeners[id].as_mut() else { return };
        let (token, flows) = (live.token, std::mem::take(&mut live.udp));
        for index in flows.into_values() {
            self.end_udp(io, index as usize);
        }
        io.unlisten(token);
        if let Some(live) = self.listeners[id].as_mut() {
            live.token = Token::NONE;
        }
        // The entry stays: clients in the accept queue, and those between two backends, are still served by its pool.
    }

    fn evict(&mut self, io: &mut Io, slot: usize) {
        for index in 0..self.flows.len() {
            if self.flows[index].state != State::Free && usize::from(self.flows[index].slot) == slot {
                if self.flows[index].state == State::Udp {
                    self.end_udp(io, index);
                } else {
                    self.kill(io, index);
                }
            }
        }
    }

    fn say(&mut self, message: &FromWorker) {
        if let Ok(mut line) = serde_json::to_vec(message) {
            line.push(b'\n');
            // The parent gone means that this worker is about to be told to drain.
            let _ = self.control.write_all(&line);
        }
    }
}

impl Flow {
    fn empty(peer: SocketAddr) -> Self {
        Flow {
            state: State::Connecting,
            tries: 0,
            listener: 0,
            known: false,
            generation: 0,
            slot: NO_SLOT,
            country: 0,
            moved: [0; 2],
            ends: [Token::NONE; 2],
            client: None,
            started: 0,
            peer,
            extra: None,
        }
    }
}

impl From<Targets> for Pool {
    fn from(targets: Targets) -> Self {
        Pool { name: targets.name, source: targets.source, targets: targets.targets, ..Pool::default() }
    }
}

fn tuple_hash(from: SocketAddr, to: SocketAddr) -> u64 {
    let mut bytes = [0; 36];
    let wide = |ip: std::net::IpAddr| match ip {
        std::net::IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
        std::net::IpAddr::V6(ip) => ip.octets(),
    };
    bytes[..16].copy_from_slice(&wide(from.ip()));
    bytes[16..18].copy_from_slice(&from.port().to_be_bytes());
    bytes[18..34].copy_from_slice(&wide(to.ip()));
    bytes[34..].copy_from_slice(&to.port().to_be_bytes());
    hash(&bytes, 0)
}

impl Service for Balancer {
    type Command = ToWorker;

    fn start(&mut self, io: &mut Io) {
        io.arm(BEAT, BEAT_TIMER);
    }

    fn admit(&mut self, _: &mut Io, listener: Conn, peer: SocketAddr) -> Option<u64> {
        let index = self.admit_flow((listener.tag & !LISTENER) as usize, peer)?;
        Some(u64::from(index) << 1)
    }

    fn accepted(&mut self, io: &mut Io, conn: Conn, _: SocketAddr) {
        let (index, _) = Self::side(conn.tag);
        self.flows[index].ends[CLIENT] = conn.token;
        let listener = usize::from(self.flows[index].listener);
        if self.listeners[listener].as_ref().is_some_and(|live| live.entry.listener.proxy_in == ProxyIn::Required) {
            self.flows[index].state = State::Header;
            io.arm(HEADER_TIMEOUT, (index as u64) << 32 | u64::from(self.flows[index].generation));
        } else {
            self.connect(io, index);
        }
    }

    fn connected(&mut self, io: &mut Io, conn: Conn) {
        let (index, _) = Self::side(conn.tag);
        let flow = &self.flows[index];
        let (slot, listener) = (usize::from(flow.slot), usize::from(flow.listener));
        let micros = self.micros().saturating_sub(flow.started);
        bump(self.board.backend(self.worker, slot, B::Total), 1);
        bump(self.board.backend(self.worker, slot, B::LatencySum), micros);
        bump(&self.board.latency(self.worker, slot)[latency_bucket(micros)], 1);
        if self.board.streak(slot).load(Relaxed) > 0 {
            self.board.streak(slot).store(0, Relaxed);
        }
        let config = self.listeners[listener].as_ref().map(|live| &live.entry.listener);
        let (idle, proxy_out) =
            config.map_or((None, ProxyOut::Off), |config| (Some(config.idle_timeout.0), config.proxy_out));
        if proxy_out != ProxyOut::Off {
            let (from, to) = self.addresses(io, index);
            let header = if proxy_out == ProxyOut::V1 { proxy::v1(from, to) } else { proxy::v2(from, to, false) };
            io.write(conn.token, &header);
        }
        let flow = &mut self.flows[index];
        flow.state = State::Established;
        let client = flow.ends[CLIENT];
        if let Some(extra) = flow.extra.take()
            && !extra.pending.is_empty()
        {
            let count = extra.pending.len();
            io.write(conn.token, &extra.pending);
            self.moved(index, CLIENT, count);
        }
        io.set_idle(client, idle);
        io.resume(client);
    }

    fn data(&mut self, io: &mut Io, conn: Conn, bytes: &mut [u8]) {
        let (index, side) = Self::side(conn.tag);
        if self.flows[index].state == State::Header {
            return self.header(io, index, bytes);
        }
        let to = self.flows[index].ends[1 - side];
        match io.write(to, bytes) {
            Written::Sent => {
                let flow = &mut self.flows[index];
                flow.moved[side] = flow.moved[side].saturating_add(bytes.len() as u32);
                if flow.moved[side] >= self.splice_after && io.splice(conn.token) {
                    let listener = usize::from(flow.listener);
                    self.count(listener, L::Spliced, 1);
                }
            }
            Written::Queued(_) => io.pause(conn.token),
            // The other half is gone; `closed` follows and ends the flow.
            Written::Gone => return,
            Written::Full => return self.kill(io, index),
        }
        self.moved(index, side, bytes.len());
    }

    fn spliced(&mut self, _: &mut Io, conn: Conn, count: usize) {
        let (index, side) = Self::side(conn.tag);
        self.moved(index, side, count);
    }

    fn eof(&mut self, io: &mut Io, conn: Conn) {
        let (index, side) = Self::side(conn.tag);
        if self.flows[index].state == State::Established {
            io.shutdown_write(self.flows[index].ends[1 - side]);
        } else {
            self.kill(io, index);
        }
    }

    fn drained(&mut self, io: &mut Io, conn: Conn) {
        let (index, side) = Self::side(conn.tag);
        if self.flows[index].state == State::Established {
            io.resume(self.flows[index].ends[1 - side]);
        }
    }

    fn timer(&mut self, io: &mut Io, payload: u64) {
        if payload == BEAT_TIMER {
            let counters = io.counters();
            for (what, value) in [
                (W::Sockets, io.sockets() as u64),
                (W::Pipes, io.pipes() as u64),
                (W::Turns, counters.turns),
                (W::Beat, self.board.worker(self.worker, W::Beat).load(Relaxed) + 1),
            ] {
                self.board.worker(self.worker, what).store(value, Relaxed);
            }
            io.arm(BEAT, BEAT_TIMER);
            return;
        }
        let index = (payload >> 32) as usize;
        if self.flows[index].state == State::Header && self.flows[index].generation == payload as u32 {
            let listener = usize::from(self.flows[index].listener);
            self.count(listener, L::RejectedProxy, 1);
            self.kill(io, index);
        }
    }

    fn closed(&mut self, io: &mut Io, conn: Conn, why: Closed) {
        let (index, side) = Self::side(conn.tag);
        let flow = &mut self.flows[index];
        match flow.state {
            State::Free => return,
            State::Udp => {
                self.count(usize::from(self.flows[index].listener), L::EndedIdle, 1);
                return self.end_udp(io, index);
            }
            State::Connecting if side == BACKEND => {
                flow.ends[BACKEND] = Token::NONE;
                let slot = usize::from(flow.slot);
                if why != Closed::Stopped {
                    self.failed(slot, if why == Closed::ConnectTimeout { B::ConnectTimeout } else { B::ConnectFailed });
                    self.connect(io, index);
                } else {
                    self.kill(io, index);
                }
                return;
            }
            State::Header | State::Connecting => return self.kill(io, index),
            State::Established => {}
        }
        flow.ends[side] = Token::NONE;
        let (other, listener) = (flow.ends[1 - side], usize::from(flow.listener));
        match why {
            Closed::Finished if io.is_open(other) => {
                // The half that is left still has bytes to deliver; it carries the idle limit on alone.
                let idle = self.listeners[listener].as_ref().map(|live| live.entry.listener.idle_timeout.0);
                io.set_idle(other, idle);
            }
            Closed::Finished => self.forget(index),
            Closed::Idle => {
                self.count(listener, L::EndedIdle, 1);
                io.close(other);
                self.forget(index);
            }
            _ => {
                self.count(listener, L::EndedReset, 1);
                self.kill(io, index);
            }
        }
    }

    fn datagram(&mut self, io: &mut Io, conn: Conn, from: SocketAddr, bytes: &mut [u8]) {
        if conn.tag & LISTENER != 0 {
            return self.client_sent(io, (conn.tag & !LISTENER) as usize, from, bytes);
        }
        let (index, _) = Self::side(conn.tag);
        let flow = &self.flows[index];
        let (listener, peer, slot) = (usize::from(flow.listener), flow.peer, usize::from(flow.slot));
        let Some(live) = self.listeners[listener].as_ref() else { return };
        if self.board.streak(slot).load(Relaxed) > 0 {
            self.board.streak(slot).store(0, Relaxed);
        }
        if io.send(live.token, Some(peer), bytes) {
            self.count(listener, L::DatagramsOut, 1);
            self.moved(index, BACKEND, bytes.len());
        } else {
            self.count(listener, L::DatagramsDropped, 1);
        }
    }

    fn datagram_error(&mut self, _: &mut Io, conn: Conn, _: io::ErrorKind) {
        if conn.tag & LISTENER == 0 {
            let (index, _) = Self::side(conn.tag);
            let slot = self.flows[index].slot;
            if slot != NO_SLOT {
                self.failed(usize::from(slot), B::ConnectFailed);
            }
        }
    }

    fn command(&mut self, io: &mut Io, command: ToWorker) {
        match command {
            ToWorker::Table(table) => {
                let version = table.version;
                let answer = match self.apply(io, table) {
                    Ok(()) => {
                        self.board.worker(self.worker, W::Table).store(version, Relaxed);
                        FromWorker::Applied { version }
                    }
                    Err(message) => FromWorker::Failed { version, message },
                };
                self.say(&answer);
            }
            ToWorker::Evict { slot } => self.evict(io, slot),
            ToWorker::Drain { .. } => {}
        }
    }
}

/// Runs worker number `worker` of the board behind descriptor `board` until its parent ends it.
pub fn run(worker: usize, board: RawFd) -> io::Result<()> {
    let board = Board::inherit(board)?;
    if worker >= board.workers() {
        return Err(io::Error::other(format!("there is no worker {worker}")));
    }
    let control = clawhq_wire::process::parent()?;
    let limits = limits(budget::raise_limit());
    let mut made = Some(control.try_clone()?);
    let shards = spawn(1, limits, |_| Balancer {
        board,
        worker,
        clients: board.clients(worker),
        listeners: Vec::new(),
        pools: Vec::new(),
        flows: Vec::new(),
        free: Vec::new(),
        connections: 0,
        splice_after: u32::MAX,
        countries: None,
        control: made.take().expect("one shard"),
        clock: Instant::now(),
        scratch: Vec::new(),
    })?;
    let mut within = Duration::from_secs(30);
    for line in BufReader::new(control).lines() {
        // An unreadable order means that parent and worker are not of one version: end as if the parent were gone.
        let Ok(order) = line.and_then(|line| serde_json::from_str(&line).map_err(io::Error::other)) else { break };
        match order {
            ToWorker::Drain { within_ms } => {
                within = Duration::from_millis(within_ms);
                break;
            }
            order => {
                let _ = shards.remotes()[0].send(order);
            }
        }
        if shards.any_ended() {
            break;
        }
    }
    shards.drain(within);
    shards.join()
}

/// Descriptors kept for listeners, the epoll instance, control and log.
const RESERVE: usize = 128 + crate::config::MOST_LISTENERS;

/// A worker's limits within `descriptors`.
pub fn limits(descriptors: u64) -> Limits {
    let room = usize::try_from(descriptors).unwrap_or(usize::MAX).saturating_sub(RESERVE);
    let pipes = (room / 40).clamp(4, 256);
    Limits { sockets: room - 2 * pipes, pipes, ..Limits::default() }
}

/// Descriptors a worker needs beside those of its flows, given how many it may open.
pub fn reserve(descriptors: u64) -> u64 {
    descriptors - limits(descriptors).sockets as u64
}
