//! One shard of the hub: its peers' and customers' connections, and the tunnels between them.
//!
//! A tunnel lives wholly on the shard of its peer: a customer that arrives elsewhere is moved there, socket and all,
//! once the peer is chosen. So no byte of a tunnel crosses a thread, and nothing on its path is locked.

use crate::account::{Account, Admitted, Denial};
use crate::dest::{Dest, Host, unmapped};
use crate::front;
use crate::http;
use crate::link::{self, Carries, Opened, kind};
use crate::metrics::Outcome;
use crate::registry::{Choice, Home, Needs, NewPeer, PeerId, Sticky};
use crate::relay;
use crate::shared::{Command, Lookup, Shared};
use crate::socks::{self, Reply};
use crate::target::{Country, DEFAULT_LIFETIME, Failover, Target};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use clawhq_wire::timer::Timer;
use clawhq_wire::ws::{self, Event, Kind, Opcode, Parser, Role, handshake};
use clawhq_wire::{Closed, Conn, Io, Service, Token, Written};
use rand::RngExt as _;
use rand::SeedableRng as _;
use rand::rngs::SmallRng;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

/// Tags of sockets and payloads of timers: what, and which entry of its table.
const PEER_LISTENER: u64 = 1;
const CUSTOMER_LISTENER: u64 = 2;
const RELAY_LISTENER: u64 = 3;
const PEER: u64 = 4;
const CUSTOMER: u64 = 5;
const UDP: u64 = 6;
const RELAY: u64 = 7;
const SWEEP: u64 = 8;
const PEER_HELLO: u64 = 9;

fn tag(what: u64, slot: u32) -> u64 {
    what << 56 | u64::from(slot)
}

fn timed(what: u64, slot: u32, serial: u32) -> u64 {
    what << 56 | u64::from(serial & 0xff_ffff) << 32 | u64::from(slot)
}

/// No entry.
const NOBODY: u32 = u32::MAX;
/// Bytes of a peer that cannot be parsed yet: JSON of the legacy form holds 32 KiB in base64.
const MESSAGE_MOST: usize = 128 * 1024;
/// Bytes a customer may send ahead of its tunnel.
const EARLY_MOST: usize = 64 * 1024;
/// With this much waiting for one legacy customer its peer is not read: legacy has no credit.
const LEGACY_BACKLOG: usize = 256 * 1024;
/// A legacy tunnel whose customer has ended its direction is given up after this without a byte.
const LEGACY_HALF_CLOSED: Duration = Duration::from_secs(5);
/// A datagram is dropped when its peer has this much waiting.
const DATAGRAM_BACKLOG: usize = 256 * 1024;
/// How long an ended customer may take to read what is left for it.
const LINGER: Duration = Duration::from_secs(15);
/// Time a peer has to introduce itself.
const PEER_HANDSHAKE: Duration = Duration::from_secs(20);
const FRAME_LIMITS: ws::Limits = ws::Limits { frame: MESSAGE_MOST as u64, message: MESSAGE_MOST as u64 };

/// A table whose entries are named by place and serial number.
struct Table<T> {
    entries: Vec<Option<T>>,
    free: Vec<u32>,
    serial: u32,
}

impl<T> Table<T> {
    fn new() -> Self {
        Self { entries: Vec::new(), free: Vec::new(), serial: 0 }
    }

    fn insert(&mut self, make: impl FnOnce(u32) -> T) -> u32 {
        self.serial = self.serial.wrapping_add(1);
        let value = make(self.serial);
        match self.free.pop() {
            Some(slot) => {
                self.entries[slot as usize] = Some(value);
                slot
            }
            None => {
                self.entries.push(Some(value));
                (self.entries.len() - 1) as u32
            }
        }
    }

    fn get(&self, slot: u32) -> Option<&T> {
        self.entries.get(slot as usize)?.as_ref()
    }

    fn get_mut(&mut self, slot: u32) -> Option<&mut T> {
        self.entries.get_mut(slot as usize)?.as_mut()
    }

    fn remove(&mut self, slot: u32) -> Option<T> {
        let value = self.entries.get_mut(slot as usize)?.take()?;
        self.free.push(slot);
        Some(value)
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum PeerStage {
    /// Before the upgrade is through.
    Http,
    /// Upgraded, not introduced.
    Hello,
    /// A legacy peer that was welcomed and has not registered.
    Welcomed,
    Ready,
}

/// A peer's connection. What only a busy one needs hangs off boxes.
struct Peer {
    token: Token,
    serial: u32,
    id: Option<PeerId>,
    parser: Parser,
    /// Tick at which it was last heard.
    heard: u64,
    stage: PeerStage,
    compact: bool,
    /// The message under way: its type, and its stream.
    current: u8,
    stream: u32,
    pinged: bool,
    /// Legacy customers that have too much waiting: the peer is not read while there are any.
    blocked: u32,
    partial: Option<Box<Partial>>,
    tunnels: Vec<u32>,
    /// Customers paused until this connection takes bytes again.
    waiting: Vec<u32>,
    addr: IpAddr,
}

/// What a peer is before it is registered, and any message that has come in part.
#[derive(Default)]
struct Partial {
    bytes: Vec<u8>,
    device: String,
    version: String,
    country: String,
    began: Option<Instant>,
}

/// How a customer came in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Protocol {
    Unknown,
    Socks,
    Http,
    /// Another hub, for a customer of its own.
    Relay,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stage {
    /// Behind a trusted proxy: its header, if any.
    Front,
    Sniff,
    SocksLogin,
    SocksRequest,
    HttpHead,
    RelayHead,
    Resolving,
    Opening,
    Tunnel,
    /// A UDP association: the TCP connection only holds it.
    Udp,
    /// Waiting for another hub's answer.
    RelayOpening,
    RelayTunnel,
    /// Over; the rest is being sent.
    Ending,
}

/// A customer's connection and its tunnel.
pub struct Customer {
    token: Token,
    serial: u32,
    from: IpAddr,
    stage: Stage,
    protocol: Protocol,
    /// What was received and not used: the handshake, then bytes waiting for credit.
    buffer: Vec<u8>,
    account: Option<Arc<Account>>,
    admitted: Option<Admitted>,
    target: Target,
    dest: Option<Dest>,
    addr: Option<IpAddr>,
    udp: bool,
    /// The rewritten head of a plain request, until it is sent.
    head: Vec<u8>,
    body: Option<http::Body>,
    peer: u32,
    peer_id: Option<PeerId>,
    compact: bool,
    salt: u64,
    /// Bytes the peer will take.
    credit: u64,
    /// Bytes the peer may still send.
    window: u64,
    /// Bytes passed on and not granted again.
    owed: u32,
    /// Bytes queued for the customer and not counted yet.
    unsent: usize,
    up: u64,
    down: u64,
    began: Instant,
    tried: Vec<PeerId>,
    /// The handshake's, the opening's or the end's deadline.
    deadline: Timer,
    /// A rate limit holds the tunnel.
    throttled: bool,
    waiting: bool,
    blocks_peer: bool,
    eof: bool,
    eof_sent: bool,
    peer_eof: bool,
    relayed: bool,
    relay: Token,
    association: Option<Box<Association>>,
}

/// The UDP side of an association.
struct Association {
    socket: Token,
    /// Where the customer's datagrams come from, once the first has come.
    client: Option<SocketAddr>,
}

/// Why a request is turned down, in both protocols' terms.
struct Refusal {
    socks: Reply,
    status: u16,
    reason: String,
    outcome: Outcome,
}

impl Refusal {
    fn new(socks: Reply, status: u16, outcome: Outcome, reason: impl Into<String>) -> Self {
        Self { socks, status, reason: reason.into(), outcome }
    }

    fn denial(denial: &Denial) -> Self {
        let (status, outcome) = match denial {
            Denial::NoCredentials | Denial::Credentials | Denial::Target(_) => (407, Outcome::Auth),
            Denial::Address | Denial::Suspended => (403, Outcome::Auth),
            Denial::Quota => (402, Outcome::Limited),
            Denial::Concurrency | Denial::Rate => (429, Outcome::Limited),
        };
        Self::new(Reply::NotAllowed, status, outcome, denial.to_string())
    }

    fn opened(how: Opened) -> Self {
        let (socks, status, reason) = match how {
            Opened::Ok => (Reply::GeneralFailure, 502, "the exit failed"),
            Opened::Refused => (Reply::ConnectionRefused, 502, "the destination refused the connection"),
            Opened::Unreachable => (Reply::HostUnreachable, 502, "the destination cannot be reached"),
            Opened::Timeout => (Reply::TtlExpired, 504, "the destination did not answer in time"),
            Opened::Denied => (Reply::NotAllowed, 403, "the exit does not allow this destination"),
            Opened::Full => (Reply::GeneralFailure, 503, "the exit is full"),
            Opened::NotResolved => (Reply::HostUnreachable, 502, "the destination's name does not resolve"),
            Opened::Failed => (Reply::GeneralFailure, 502, "the exit failed"),
        };
        let outcome = if how == Opened::Denied { Outcome::Denied } else { Outcome::Failed };
        Self::new(socks, status, outcome, reason)
    }
}

/// One shard's service.
pub struct Hub {
    shared: Arc<Shared>,
    shard: u16,
    listeners: Option<Listeners>,
    peers: Table<Peer>,
    customers: Table<Box<Customer>>,
    rng: SmallRng,
    /// One buffer for answers that are made piece by piece.
    out: Vec<u8>,
}

/// The listening sockets of one shard.
pub struct Listeners {
    pub peers: TcpListener,
    pub customers: TcpListener,
    pub relay: Option<TcpListener>,
}

impl Hub {
    pub fn new(shared: Arc<Shared>, shard: usize, listeners: Listeners) -> Self {
        Self {
            shared,
            shard: shard as u16,
            listeners: Some(listeners),
            peers: Table::new(),
            customers: Table::new(),
            rng: SmallRng::from_rng(&mut rand::rng()),
            out: Vec::new(),
        }
    }

    // --- peers -------------------------------------------------------------------------------------------------

    fn peer_data(&mut self, io: &mut Io, slot: u32, bytes: &mut [u8]) {
        let Some(peer) = self.peers.get_mut(slot) else { return };
        peer.heard = io.now();
        peer.pinged = false;
        if peer.stage == PeerStage::Http {
            return self.peer_upgrade(io, slot, bytes);
        }
        self.peer_frames(io, slot, bytes);
    }

    fn peer_upgrade(&mut self, io: &mut Io, slot: u32, bytes: &[u8]) {
        let Some(peer) = self.peers.get_mut(slot) else { return };
        let token = peer.token;
        let partial = peer.partial.get_or_insert_default();
        partial.bytes.extend_from_slice(bytes);
        if front::is_trusted(&self.shared.peer_proxies, peer.addr) {
            match front::proxy_header(&partial.bytes) {
                front::Header::Found(n, ip) => {
                    partial.bytes.drain(..n);
                    peer.addr = ip.unwrap_or(peer.addr);
                }
                front::Header::More => return,
                front::Header::Bad => return self.peer_gone(io, slot, "bad PROXY header"),
                front::Header::None => {}
            }
        }
        let buffer = std::mem::take(&mut partial.bytes);
        let answer = match handshake::Request::parse(&buffer) {
            Ok(None) => {
                partial.bytes = buffer;
                return;
            }
            Err(_) => Err("HTTP/1.1 400 Bad Request\r\nconnection: close\r\ncontent-length: 0\r\n\r\n".to_owned()),
            Ok(Some(request)) => {
                let path = request.path.split('?').next().unwrap_or("");
                match (request.method, path) {
                    ("GET" | "HEAD", "/health") => {
                        Err("HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok".to_owned())
                    }
                    (_, "/ws") => match request.upgrade_key() {
                        Ok(key) => {
                            if front::is_trusted(&self.shared.peer_proxies, peer.addr)
                                && let Some(header) = request.header("x-forwarded-for")
                                && let Some(ip) = front::forwarded_for(header, &self.shared.peer_proxies)
                            {
                                peer.addr = ip;
                            }
                            let compact = request.has_token("sec-websocket-protocol", link::COMPACT);
                            peer.compact = compact;
                            Ok((handshake::response(key, compact.then_some(link::COMPACT)), request.len))
                        }
                        Err(refusal) => Err(refusal.response().to_owned()),
                    },
                    _ => Err("HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\nconnection: close\r\n\r\n".to_owned()),
                }
            }
        };
        match answer {
            Ok((response, len)) => {
                peer.stage = PeerStage::Hello;
                io.write(token, response.as_bytes());
                if buffer.len() > len {
                    let mut rest = buffer[len..].to_vec();
                    self.peer_frames(io, slot, &mut rest);
                }
            }
            Err(response) => {
                io.write(token, response.as_bytes());
                self.peer_gone(io, slot, "no upgrade");
            }
        }
    }

    fn peer_frames(&mut self, io: &mut Io, slot: u32, bytes: &mut [u8]) {
        let Some(peer) = self.peers.get_mut(slot) else { return };
        let (token, serial) = (peer.token, peer.serial);
        // Events borrow the parser; the rest of the shard must stay free to act on them.
        let mut parser = std::mem::replace(&mut peer.parser, Parser::new(Role::Server));
        let mut at = 0;
        let total = bytes.len();
        let verdict = loop {
            let (used, event) = match parser.advance(&mut bytes[at..], &FRAME_LIMITS) {
                Ok(step) => step,
                Err(violation) => break Err((violation.close_code(), violation.to_string())),
            };
            at += used;
            match event {
                Some(Event::Data { kind, chunk, first, last }) => {
                    if let Err(why) = self.peer_message(io, slot, kind, chunk, first, last) {
                        break Err((ws::close::POLICY, why.to_owned()));
                    }
                    if self.peers.get(slot).is_none_or(|p| p.serial != serial) {
                        return;
                    }
                }
                Some(Event::Ping(payload)) => {
                    self.out.clear();
                    ws::encode_frame(&mut self.out, Opcode::Pong, payload, None);
                    if io.write(token, &self.out) == Written::Full {
                        break Err((ws::close::POLICY, "pongs are not read".to_owned()));
                    }
                }
                Some(Event::Pong(_)) => {}
                Some(Event::Close { code, .. }) => {
                    self.out.clear();
                    ws::encode_close(&mut self.out, code, "", None);
                    io.write(token, &self.out);
                    return self.peer_gone(io, slot, "closed by the peer");
                }
                None => {}
            }
            if at >= total {
                break Ok(());
            }
        };
        match verdict {
            Ok(()) => {
                if let Some(peer) = self.peers.get_mut(slot) {
                    peer.parser = parser;
                }
            }
            Err((code, why)) => {
                self.shared.metrics.protocol_errors.fetch_add(1, Relaxed);
                self.close_peer(io, slot, code, &why);
            }
        }
    }

    /// Says goodbye and lets go.
    fn close_peer(&mut self, io: &mut Io, slot: u32, code: u16, why: &str) {
        if let Some(peer) = self.peers.get(slot) {
            self.out.clear();
            ws::encode_close(&mut self.out, Some(code), why, None);
            io.write(peer.token, &self.out);
        }
        self.peer_gone(io, slot, why);
    }

    /// Ends a peer: its tunnels end cleanly for their customers.
    fn peer_gone(&mut self, io: &mut Io, slot: u32, why: &str) {
        let Some(peer) = self.peers.remove(slot) else { return };
        self.shared.metrics.peers_connected.fetch_sub(1, Relaxed);
        io.close(peer.token);
        if let Some(id) = peer.id {
            tracing::debug!(target: "peer", shard = self.shard, peer = ?id, why, "peer gone");
            self.shared.registry.remove(id);
        }
        for customer in peer.tunnels {
            self.tunnel_broke(io, customer);
        }
    }

    /// One piece of a message. An error is the peer's fault and ends it.
    fn peer_message(
        &mut self,
        io: &mut Io,
        slot: u32,
        ws_kind: Kind,
        chunk: &mut [u8],
        first: bool,
        last: bool,
    ) -> Result<(), &'static str> {
        let Some(peer) = self.peers.get_mut(slot) else { return Ok(()) };
        match (peer.compact, ws_kind) {
            (true, Kind::Text) => Err("the compact protocol is binary"),
            (true, Kind::Binary) => self.compact_piece(io, slot, chunk, first, last),
            (false, Kind::Binary) => self.legacy_piece(io, slot, chunk, first, last),
            (false, Kind::Text) => {
                if first && last {
                    return self.legacy_text(io, slot, chunk);
                }
                let partial = peer.partial.get_or_insert_default();
                partial.bytes.extend_from_slice(chunk);
                if !last {
                    return Ok(());
                }
                let text = std::mem::take(&mut partial.bytes);
                self.legacy_text(io, slot, &text)
            }
        }
    }

    fn compact_piece(
        &mut self,
        io: &mut Io,
        slot: u32,
        chunk: &[u8],
        first: bool,
        last: bool,
    ) -> Result<(), &'static str> {
        let Some(peer) = self.peers.get_mut(slot) else { return Ok(()) };
        if first {
            peer.current = 0;
        }
        // The data of a stream is passed on as it comes, never gathered.
        if peer.current == kind::DATA {
            let stream = peer.stream;
            return self.down(io, slot, stream, chunk);
        }
        let gathered = peer.partial.as_ref().is_some_and(|p| !p.bytes.is_empty());
        if !gathered && chunk.len() >= link::HEADER {
            let stream = u32::from_be_bytes([chunk[1], chunk[2], chunk[3], chunk[4]]);
            if chunk[0] == kind::DATA {
                peer.current = kind::DATA;
                peer.stream = stream;
                return self.down(io, slot, stream, &chunk[link::HEADER..]);
            }
            if last {
                return self.compact_frame(io, slot, chunk[0], stream, &chunk[link::HEADER..]);
            }
        }
        let partial = peer.partial.get_or_insert_default();
        partial.bytes.extend_from_slice(chunk);
        let ready = last || (partial.bytes.len() >= link::HEADER && partial.bytes[0] == kind::DATA);
        if !ready {
            return Ok(());
        }
        let bytes = std::mem::take(&mut partial.bytes);
        if peer.stage == PeerStage::Ready {
            peer.partial = None;
        }
        if bytes.len() < link::HEADER {
            return Err("a frame shorter than its header");
        }
        let stream = u32::from_be_bytes([bytes[1], bytes[2], bytes[3], bytes[4]]);
        if bytes[0] == kind::DATA {
            peer.current = kind::DATA;
            peer.stream = stream;
            return self.down(io, slot, stream, &bytes[link::HEADER..]);
        }
        self.compact_frame(io, slot, bytes[0], stream, &bytes[link::HEADER..])
    }

    fn compact_frame(
        &mut self,
        io: &mut Io,
        slot: u32,
        kind: u8,
        stream: u32,
        body: &[u8],
    ) -> Result<(), &'static str> {
        let Some(peer) = self.peers.get(slot) else { return Ok(()) };
        if kind == kind::HELLO {
            if peer.stage != PeerStage::Hello {
                return Err("a second hello");
            }
            let hello: link::Hello = serde_json::from_slice(body).map_err(|_| "malformed hello")?;
            self.compact_hello(io, slot, &hello);
            return Ok(());
        }
        if peer.stage != PeerStage::Ready {
            return Err("not introduced");
        }
        if kind == kind::DRAIN {
            if let Some(id) = peer.id {
                self.shared.registry.drain(id);
            }
            return Ok(());
        }
        // A stream that ended here may still be spoken of: not an error.
        let Some(customer) = self.customer_of(slot, stream) else { return Ok(()) };
        match kind {
            kind::OPENED => {
                let (how, credit) = link::parse_opened(body).ok_or("malformed opened")?;
                self.tunnel_opened(io, customer, how, u64::from(credit));
            }
            kind::EOF => self.peer_eof(io, customer),
            kind::RESET => self.tunnel_broke_by_peer(io, customer),
            kind::CREDIT => {
                let more =
                    body.get(..4).and_then(|b| b.try_into().ok()).map(u32::from_be_bytes).ok_or("malformed credit")?;
                if let Some(c) = self.customers.get_mut(customer) {
                    c.credit = (c.credit + u64::from(more)).min(1 << 32);
                }
                self.push_up(io, customer);
            }
            kind::DATAGRAM => self.datagram_down(io, customer, body),
            _ => return Err("unknown frame type"),
        }
        Ok(())
    }

    fn customer_of(&self, peer: u32, stream: u32) -> Option<u32> {
        let slot = stream & 0xff_ffff;
        let customer = self.customers.get(slot)?;
        (customer.peer == peer && customer.serial & 0xff == stream >> 24).then_some(slot)
    }

    fn stream_of(slot: u32, serial: u32) -> u32 {
        slot & 0xff_ffff | serial << 24
    }

    /// Checks what a peer says of itself; registers it or sends it away.
    fn compact_hello(&mut self, io: &mut Io, slot: u32, hello: &link::Hello) {
        let Some(peer) = self.peers.get(slot) else { return };
        let token = peer.token;
        if hello.device.is_empty() || hello.device.len() > 128 || hello.version.len() > 32 {
            return self.refuse_peer(io, slot, "device must be 1 to 128 bytes, version at most 32");
        }
        if !self.shared.token_opens(&hello.token) {
            return self.refuse_peer(io, slot, "unknown token");
        }
        if crate::config::version(&hello.version).is_none_or(|v| v < self.shared.min_version) {
            return self.refuse_peer(io, slot, "version too old");
        }
        if let Some(wait) = self.must_wait() {
            let cooldown = link::Cooldown { retry_after_ms: wait.as_millis() as u64, reason: "busy".into() };
            self.send_frame(io, token, &link::json(kind::COOLDOWN, &cooldown));
            self.shared.metrics.cooldowns.fetch_add(1, Relaxed);
            return self.close_peer(io, slot, ws::close::TRY_AGAIN, "come back later");
        }
        let cap = hello.max_tunnels.unwrap_or(u16::MAX).clamp(1, self.shared.config.peers.max_tunnels);
        let hint = hello.country.as_deref().unwrap_or("");
        let country = self.register(io, slot, &hello.device, &hello.version, hint, cap, hello.consent, hello.udp);
        let Some(peer) = self.peers.get(slot) else { return };
        let welcome = link::Welcome {
            hub: self.shared.config.hub.name.clone(),
            heartbeat_seconds: self.shared.config.peers.heartbeat_seconds,
            max_tunnels: cap,
            window: link::WINDOW,
            address: peer.addr.to_string(),
            country: country.to_string(),
        };
        self.send_frame(io, token, &link::json(kind::WELCOME, &welcome));
    }

    fn must_wait(&mut self) -> Option<Duration> {
        let random = self.rng.random::<f64>();
        if self.shared.is_draining() {
            return Some(Duration::from_secs_f64(2.0 + 30.0 * random));
        }
        self.shared.admit_registration(random).err()
    }

    #[allow(clippy::too_many_arguments)]
    fn register(
        &mut self,
        io: &mut Io,
        slot: u32,
        device: &str,
        version: &str,
        hint: &str,
        cap: u16,
        consent: bool,
        udp: bool,
    ) -> Country {
        let Some(peer) = self.peers.get_mut(slot) else { return Country::UNKNOWN };
        let began = peer.partial.take().and_then(|p| p.began);
        let mut place = self.shared.geo.read().look_up(peer.addr);
        if place.country == Country::UNKNOWN && self.shared.config.geo.trust_hint {
            place.country = Country::parse(hint).unwrap_or(Country::UNKNOWN);
        }
        let new = NewPeer {
            device,
            version,
            addr: peer.addr,
            country: place.country,
            state: &place.state,
            city: &place.city,
            asn: place.asn,
            home: Home { shard: self.shard, slot, serial: peer.serial },
            cap,
            compact: peer.compact,
            udp: udp && peer.compact,
            consent,
            now: self.shared.now(),
        };
        let (id, replaced) = self.shared.registry.insert(&new);
        peer.id = Some(id);
        peer.stage = PeerStage::Ready;
        // The first heartbeat falls anywhere in the interval, or a storm of registrations would beat together for ever.
        let beat = self.shared.config.heartbeat();
        let first = beat.mul_f64(self.rng.random::<f64>());
        io.arm(first, timed(PEER, slot, peer.serial));
        self.shared.metrics.registrations.fetch_add(1, Relaxed);
        if let Some(began) = began {
            self.shared.metrics.registration.observe(began.elapsed());
        }
        if let Some(old) = replaced {
            let command = Command::ClosePeer { slot: old.slot, serial: old.serial, reason: "registered anew" };
            match self.shared.remotes.get().and_then(|r| r.get(old.shard as usize)) {
                Some(_) if old.shard == self.shard => self.command(io, command),
                Some(remote) => drop(remote.send(command)),
                None => {}
            }
        }
        place.country
    }

    fn refuse_peer(&mut self, io: &mut Io, slot: u32, why: &str) {
        self.shared.metrics.peers_refused.fetch_add(1, Relaxed);
        self.close_peer(io, slot, ws::close::POLICY, why);
    }

    fn send_frame(&mut self, io: &mut Io, token: Token, frame: &[u8]) -> Written {
        let mut header = [0; ws::MAX_HEADER];
        let n = ws::encode_header(&mut header, true, Opcode::Binary, frame.len(), None);
        io.write_parts(token, &header[..n], frame)
    }

    fn send_text(&mut self, io: &mut Io, token: Token, text: &str) -> Written {
        let mut header = [0; ws::MAX_HEADER];
        let n = ws::encode_header(&mut header, true, Opcode::Text, text.len(), None);
        io.write_parts(token, &header[..n], text.as_bytes())
    }

    // --- the legacy protocol -----------------------------------------------------------------------------------

    fn legacy_piece(
        &mut self,
        io: &mut Io,
        slot: u32,
        chunk: &[u8],
        first: bool,
        last: bool,
    ) -> Result<(), &'static str> {
        let Some(peer) = self.peers.get_mut(slot) else { return Ok(()) };
        if peer.stage != PeerStage::Ready {
            return Err("not registered");
        }
        if first {
            peer.current = 0;
        }
        let mut joined = Vec::new();
        let mut chunk = chunk;
        if peer.current != kind::DATA {
            if let Some(partial) = peer.partial.as_mut().filter(|p| !p.bytes.is_empty()) {
                joined = std::mem::take(&mut partial.bytes);
                joined.extend_from_slice(chunk);
                chunk = &joined;
            }
            if chunk.len() < link::LEGACY_HEADER {
                if last {
                    return Err("a frame shorter than its header");
                }
                peer.partial.get_or_insert_default().bytes = chunk.to_vec();
                return Ok(());
            }
            peer.current = kind::DATA;
            peer.stream = link::legacy_stream(chunk).unwrap_or(NOBODY);
            peer.pinged = false;
            let eof = chunk[36] & 1 != 0;
            chunk = &chunk[link::LEGACY_HEADER..];
            if eof {
                let stream = peer.stream;
                if let Some(customer) = self.customer_of(slot, stream) {
                    self.legacy_eof(io, customer);
                }
                return Ok(());
            }
        }
        let stream = peer.stream;
        let _ = &joined;
        self.down(io, slot, stream, chunk)
    }

    fn legacy_text(&mut self, io: &mut Io, slot: u32, text: &[u8]) -> Result<(), &'static str> {
        let message: link::LegacyMessage = serde_json::from_slice(text).map_err(|_| "malformed JSON")?;
        let Some(peer) = self.peers.get_mut(slot) else { return Ok(()) };
        let token = peer.token;
        match (message.kind.as_str(), peer.stage) {
            ("hello", PeerStage::Hello) => {
                if !self.shared.token_opens(&message.token) {
                    self.refuse_peer(io, slot, "unknown token");
                    return Ok(());
                }
                if !message.sdk_version.is_empty()
                    && crate::config::version(&message.sdk_version).is_none_or(|v| v < self.shared.min_version)
                {
                    self.refuse_peer(io, slot, "version too old");
                    return Ok(());
                }
                if let Some(wait) = self.must_wait() {
                    let seconds = wait.as_secs() + 1;
                    self.send_text(io, token, &format!("{{\"type\":\"cooldown\",\"retry_after_sec\":{seconds}}}"));
                    self.shared.metrics.cooldowns.fetch_add(1, Relaxed);
                    self.close_peer(io, slot, ws::close::TRY_AGAIN, "come back later");
                    return Ok(());
                }
                let Some(peer) = self.peers.get_mut(slot) else { return Ok(()) };
                let partial = peer.partial.get_or_insert_default();
                partial.device = clip(&message.node_id, 128);
                partial.version = clip(&message.sdk_version, 32);
                peer.stage = PeerStage::Welcomed;
                self.send_text(io, token, "{\"type\":\"welcome\"}");
            }
            ("ip_info", _) => {
                if let Some(info) = message.ip_info {
                    peer.partial.get_or_insert_default().country = clip(&info.country_code, 2);
                }
                if peer.stage == PeerStage::Ready {
                    peer.partial = None;
                }
            }
            ("register", PeerStage::Hello) if !self.shared.tokens.is_empty() => return Err("hello first"),
            ("register", PeerStage::Hello | PeerStage::Welcomed) => {
                let data = message.data.unwrap_or_default();
                let welcomed = peer.stage == PeerStage::Welcomed;
                let partial = peer.partial.get_or_insert_default();
                let device =
                    if partial.device.is_empty() { clip(&data.device_id, 128) } else { partial.device.clone() };
                let version =
                    if partial.version.is_empty() { clip(&data.sdk_version, 32) } else { partial.version.clone() };
                let country = if partial.country.is_empty() { clip(&data.country, 2) } else { partial.country.clone() };
                if device.is_empty() {
                    self.refuse_peer(io, slot, "no device id");
                    return Ok(());
                }
                if crate::config::version(&version).is_none_or(|v| v < self.shared.min_version) {
                    self.refuse_peer(io, slot, "version too old");
                    return Ok(());
                }
                if !welcomed && let Some(wait) = self.must_wait() {
                    let seconds = wait.as_secs() + 1;
                    self.send_text(io, token, &format!("{{\"type\":\"cooldown\",\"retry_after_sec\":{seconds}}}"));
                    self.shared.metrics.cooldowns.fetch_add(1, Relaxed);
                    self.close_peer(io, slot, ws::close::TRY_AGAIN, "come back later");
                    return Ok(());
                }
                let consent = self.shared.config.peers.legacy_consent;
                let cap = self.shared.config.peers.max_tunnels.min(32);
                self.register(io, slot, &device, &version, &country, cap, consent, false);
                let answer = serde_json::json!({"type": "registration_success", "node_id": device}).to_string();
                self.send_text(io, token, &answer);
            }
            ("keepalive", _) => drop(self.send_text(io, token, "{\"type\":\"keepalive_ack\"}")),
            ("heartbeat", _) => drop(self.send_text(io, token, "{\"type\":\"heartbeat_ack\"}")),
            ("tunnel_response", PeerStage::Ready) => {
                let data = message.data.unwrap_or_default();
                let customer = link::legacy_stream(data.tunnel_id.as_bytes()).and_then(|s| self.customer_of(slot, s));
                if let Some(customer) = customer {
                    let how = if data.success { Opened::Ok } else { link::legacy_failure(&data.error) };
                    self.tunnel_opened(io, customer, how, u64::MAX / 2);
                }
            }
            ("tunnel_data", PeerStage::Ready) => {
                let data = message.data.unwrap_or_default();
                let Some(stream) = link::legacy_stream(data.tunnel_id.as_bytes()) else { return Ok(()) };
                let bytes = STANDARD.decode(&data.data).map_err(|_| "malformed base64")?;
                self.down(io, slot, stream, &bytes)?;
                if data.eof
                    && let Some(customer) = self.customer_of(slot, stream)
                {
                    self.legacy_eof(io, customer);
                }
            }
            ("disconnect", _) => self.peer_gone(io, slot, "said goodbye"),
            // Existing peers send more kinds (credits, proxies of their own); what is not known is not an error.
            _ => {}
        }
        Ok(())
    }

    /// A legacy EOF ends both directions.
    fn legacy_eof(&mut self, io: &mut Io, customer: u32) {
        if let Some(c) = self.customers.get_mut(customer) {
            c.eof_sent = true;
        }
        self.end(io, customer, None);
    }

    // --- customers: coming in ----------------------------------------------------------------------------------

    fn customer_data(&mut self, io: &mut Io, slot: u32, bytes: &[u8]) {
        let Some(c) = self.customers.get_mut(slot) else { return };
        match c.stage {
            Stage::Tunnel => self.up(io, slot, bytes),
            Stage::RelayTunnel => self.relay_up(io, slot, bytes),
            Stage::Udp | Stage::Ending => {}
            Stage::Resolving | Stage::Opening | Stage::RelayOpening => {
                c.buffer.extend_from_slice(bytes);
                if c.buffer.len() >= EARLY_MOST {
                    io.pause(c.token);
                }
            }
            _ => {
                c.buffer.extend_from_slice(bytes);
                self.handshake(io, slot);
            }
        }
    }

    /// Goes as far in the handshake as the bytes allow.
    fn handshake(&mut self, io: &mut Io, slot: u32) {
        loop {
            let Some(c) = self.customers.get_mut(slot) else { return };
            match c.stage {
                Stage::Front => match front::proxy_header(&c.buffer) {
                    front::Header::Found(n, ip) => {
                        c.buffer.drain(..n);
                        c.from = ip.unwrap_or(c.from);
                        c.stage = Stage::Sniff;
                    }
                    front::Header::None => c.stage = Stage::Sniff,
                    front::Header::More => return,
                    front::Header::Bad => return self.drop_customer(io, slot, Outcome::Malformed),
                },
                Stage::Sniff => {
                    let Some(first) = c.buffer.first() else { return };
                    c.began = Instant::now();
                    if *first == socks::VERSION {
                        c.protocol = Protocol::Socks;
                        if !self.socks_greeting(io, slot) {
                            return;
                        }
                    } else if first.is_ascii_uppercase() {
                        c.protocol = Protocol::Http;
                        c.stage = Stage::HttpHead;
                    } else {
                        return self.drop_customer(io, slot, Outcome::Malformed);
                    }
                }
                Stage::SocksLogin => match socks::login(&c.buffer) {
                    socks::Parsed::More => return,
                    socks::Parsed::Bad(_) => return self.drop_customer(io, slot, Outcome::Malformed),
                    socks::Parsed::Done(login, n) => {
                        c.buffer.drain(..n);
                        match self.shared.accounts.login(&login.user, &login.password, c.from) {
                            Ok((account, target)) => {
                                c.account = Some(account);
                                c.target = target;
                                c.stage = Stage::SocksRequest;
                                io.write(c.token, &[1, 0]);
                            }
                            Err(denial) => {
                                tracing::debug!(target: "access", from = %c.from, %denial, "log-in refused");
                                // RFC 1929 has no text; the status tells kinds of failure apart for who looks.
                                io.write(c.token, &[1, 1]);
                                self.shared.metrics.count(0, Outcome::Auth);
                                return self.end(io, slot, None);
                            }
                        }
                    }
                },
                Stage::SocksRequest => match socks::request(&c.buffer) {
                    socks::Parsed::More => return,
                    socks::Parsed::Bad(why) => {
                        return self.refuse(
                            io,
                            slot,
                            Refusal::new(Reply::GeneralFailure, 400, Outcome::Malformed, why),
                        );
                    }
                    socks::Parsed::Done(Err(reply), _) => {
                        return self.refuse(io, slot, Refusal::new(reply, 400, Outcome::Malformed, "unusable address"));
                    }
                    socks::Parsed::Done(Ok(request), n) => {
                        c.buffer.drain(..n);
                        match request.command {
                            socks::Command::Connect => {
                                c.dest = Some(request.dest);
                                return self.request(io, slot);
                            }
                            socks::Command::UdpAssociate => {
                                c.udp = true;
                                return self.request(io, slot);
                            }
                            _ => {
                                let why = "only CONNECT and UDP ASSOCIATE are served";
                                return self.refuse(
                                    io,
                                    slot,
                                    Refusal::new(Reply::CommandNotSupported, 501, Outcome::Malformed, why),
                                );
                            }
                        }
                    }
                },
                Stage::HttpHead => match http::request(&c.buffer) {
                    Ok(None) => return,
                    Err(refusal) => {
                        return self.refuse(
                            io,
                            slot,
                            Refusal::new(Reply::GeneralFailure, refusal.status, Outcome::Malformed, refusal.reason),
                        );
                    }
                    Ok(Some(request)) => {
                        c.buffer.drain(..request.len);
                        let login = match &request.login {
                            Some((user, password)) => self.shared.accounts.login(user, password, c.from),
                            None => match self.shared.accounts.login_by_address(c.from) {
                                Some(account) => Ok((account, Target::default())),
                                None => Err(Denial::NoCredentials),
                            },
                        };
                        match login {
                            Ok((account, target)) => {
                                c.account = Some(account);
                                c.target = target;
                            }
                            Err(denial) => return self.refuse(io, slot, Refusal::denial(&denial)),
                        }
                        match request.ask {
                            http::Ask::Connect(dest) => c.dest = Some(dest),
                            http::Ask::Forward { dest, head, body } => {
                                c.dest = Some(dest);
                                c.head = head;
                                c.body = Some(body);
                            }
                        }
                        return self.request(io, slot);
                    }
                },
                Stage::RelayHead => {
                    let Some(config) = &self.shared.config.directory else {
                        return self.drop_customer(io, slot, Outcome::Malformed);
                    };
                    match relay::parse(&c.buffer, &config.secret, unix_now()) {
                        relay::Parsed::More => return,
                        relay::Parsed::Bad => return self.drop_customer(io, slot, Outcome::Malformed),
                        relay::Parsed::Done(order, n) => {
                            c.buffer.drain(..n);
                            let mut target = Target::default();
                            let dest = Dest::parse(&order.dest);
                            if crate::target::parse_params(&order.target, &mut target).is_err() || dest.is_none() {
                                return self.drop_customer(io, slot, Outcome::Malformed);
                            }
                            c.target = target;
                            c.dest = dest;
                            // Sessions are the customer's, not this hub's: kept under its name.
                            c.head = order.account.into_bytes();
                            return self.request(io, slot);
                        }
                    }
                }
                _ => return,
            }
        }
    }

    /// `false` if there is nothing more to do now.
    fn socks_greeting(&mut self, io: &mut Io, slot: u32) -> bool {
        let Some(c) = self.customers.get_mut(slot) else { return false };
        match socks::greeting(&c.buffer) {
            socks::Parsed::More => false,
            socks::Parsed::Bad(_) => {
                self.drop_customer(io, slot, Outcome::Malformed);
                false
            }
            socks::Parsed::Done(greeting, n) => {
                c.buffer.drain(..n);
                if greeting.password {
                    io.write(c.token, &[socks::VERSION, socks::METHOD_PASSWORD]);
                    c.stage = Stage::SocksLogin;
                    return true;
                }
                match self.shared.accounts.login_by_address(c.from).filter(|_| greeting.none) {
                    Some(account) => {
                        c.account = Some(account);
                        io.write(c.token, &[socks::VERSION, socks::METHOD_NONE]);
                        c.stage = Stage::SocksRequest;
                        true
                    }
                    None => {
                        io.write(c.token, &[socks::VERSION, socks::METHOD_REFUSED]);
                        self.shared.metrics.count(0, Outcome::Auth);
                        self.end(io, slot, None);
                        false
                    }
                }
            }
        }
    }

    /// A whole request is there: admit, check, resolve, choose.
    fn request(&mut self, io: &mut Io, slot: u32) {
        let Some(c) = self.customers.get_mut(slot) else { return };
        io.cancel(c.deadline);
        c.began = Instant::now();
        c.stage = Stage::Resolving;
        if let Some(account) = &c.account {
            match account.admit() {
                Ok(admitted) => c.admitted = Some(admitted),
                Err(denial) => return self.refuse(io, slot, Refusal::denial(&denial)),
            }
        }
        let policy = self.shared.policy.read().clone();
        if let Some(dest) = &c.dest {
            if let Err(denied) = policy.check(dest) {
                return self.refuse(
                    io,
                    slot,
                    Refusal::new(Reply::NotAllowed, 403, Outcome::Denied, denied.to_string()),
                );
            }
            match &dest.host {
                Host::Ip(ip) => c.addr = Some(*ip),
                Host::Name(name) => {
                    let lookup =
                        Lookup { shard: self.shard.into(), slot, serial: c.serial, name: name.clone(), datagram: None };
                    c.deadline = io.arm(
                        Duration::from_secs(self.shared.config.customers.open_seconds),
                        timed(CUSTOMER, slot, c.serial),
                    );
                    if self.shared.lookups.try_send(lookup).is_err() {
                        let why = "too many names are being resolved";
                        return self.refuse(io, slot, Refusal::new(Reply::GeneralFailure, 503, Outcome::Failed, why));
                    }
                    return;
                }
            }
        }
        self.choose(io, slot);
    }

    fn resolved(&mut self, io: &mut Io, slot: u32, addrs: &[IpAddr]) {
        let Some(c) = self.customers.get_mut(slot) else { return };
        if c.stage != Stage::Resolving {
            return;
        }
        io.cancel(c.deadline);
        let policy = self.shared.policy.read().clone();
        // One private address among the answers is enough: a name that points inside at times points inside.
        if let Some(denied) = addrs.iter().find_map(|ip| policy.check_ip(*ip).err()) {
            return self.refuse(io, slot, Refusal::new(Reply::NotAllowed, 403, Outcome::Denied, denied.to_string()));
        }
        match addrs.first() {
            Some(ip) => c.addr = Some(unmapped(*ip)),
            None => return self.refuse(io, slot, Refusal::opened(Opened::NotResolved)),
        }
        self.choose(io, slot);
    }

    /// Chooses a peer and goes to it, on whatever shard or hub it is.
    fn choose(&mut self, io: &mut Io, slot: u32) {
        let random = self.rng.random::<u64>();
        let Some(c) = self.customers.get_mut(slot) else { return };
        let shared = self.shared.clone();
        let owner = match (&c.account, c.protocol) {
            (Some(account), _) => account.name.as_str(),
            (None, _) => std::str::from_utf8(&c.head).unwrap_or(""),
        };
        let needs = Needs { udp: c.udp, exclude: &c.tried };
        let elsewhere = c.protocol != Protocol::Relay && !c.relayed && !c.udp && shared.config.directory.is_some();
        let mut choice = None;
        let mut other = None;
        if let Some(session) = c.target.sticky() {
            let replace = c.target.failover != Failover::None;
            let life = c.target.lifetime.unwrap_or(DEFAULT_LIFETIME).as_secs() as u32;
            if elsewhere {
                other = relay::keeper(&shared, &c.target, owner, session);
            }
            if other.is_none() {
                let sticky = Sticky { owner, session, replace, now: shared.now(), life };
                choice = shared.registry.choose_sticky(&sticky, &c.target, &needs, random);
            }
        } else if c.tried.is_empty() || c.target.failover != Failover::None {
            choice = shared.registry.choose(&c.target, &needs, random);
        }
        if choice.is_none() && other.is_none() && c.target.failover == Failover::Country && c.target.country.is_some() {
            let wider = Target { country: c.target.country, ..Target::default() };
            choice = shared.registry.choose(&wider, &needs, random);
        }
        if choice.is_none() && other.is_none() && elsewhere {
            other = shared.other_hub(c.target.country.as_ref().map(Country::as_str));
        }
        if let Some(hub) = other {
            return self.relay_to(io, slot, &hub);
        }
        let Some(choice) = choice else {
            let tried = !c.tried.is_empty();
            let refusal = match (tried, &c.target.country) {
                (true, _) => {
                    Refusal::new(Reply::GeneralFailure, 502, Outcome::Failed, "no exit could open the connection")
                }
                (_, Some(country)) => {
                    let what = format!("no exit available for {country} with what was asked");
                    Refusal::new(Reply::NetworkUnreachable, 503, Outcome::NoPeer, what)
                }
                (_, None) => Refusal::new(Reply::NetworkUnreachable, 503, Outcome::NoPeer, "no exit available"),
            };
            return self.refuse(io, slot, refusal);
        };
        if choice.home.shard == self.shard {
            return self.open(io, slot, choice);
        }
        let Some(fd) = io.detach(c.token) else {
            // Its client is going, or reads nothing: nobody to serve.
            return self.drop_customer(io, slot, Outcome::Failed);
        };
        if let Some(mut customer) = self.customers.remove(slot) {
            customer.token = Token::NONE;
            self.shared.metrics.handoffs.fetch_add(1, Relaxed);
            let remote = self.shared.remotes.get().and_then(|r| r.get(choice.home.shard as usize));
            if let Some(remote) = remote {
                // A full mailbox drops the command and with it the socket: the client sees a reset.
                if remote.send(Command::Adopt { customer, fd, choice }).is_err() {
                    self.shared.metrics.customers_connected.fetch_sub(1, Relaxed);
                }
            }
        }
    }

    /// Asks the chosen peer to open the tunnel.
    fn open(&mut self, io: &mut Io, slot: u32, choice: Choice) {
        let Some(c) = self.customers.get_mut(slot) else { return };
        c.tried.push(choice.peer);
        let peer = self
            .peers
            .get_mut(choice.home.slot)
            .filter(|p| p.serial == choice.home.serial && p.id == Some(choice.peer));
        let claimed = peer.is_some() && self.shared.registry.tunnel_begins(choice.peer);
        let Some(peer) = peer.filter(|_| claimed) else {
            return self.try_another(io, slot, Opened::Full);
        };
        peer.tunnels.push(slot);
        c.peer = choice.home.slot;
        c.peer_id = Some(choice.peer);
        c.compact = peer.compact;
        c.stage = Stage::Opening;
        c.eof_sent = false;
        c.peer_eof = false;
        c.window = u64::from(link::WINDOW);
        c.owed = 0;
        c.salt = self.rng.random();
        c.deadline =
            io.arm(Duration::from_secs(self.shared.config.customers.open_seconds), timed(CUSTOMER, slot, c.serial));
        self.shared.metrics.tunnels.fetch_add(1, Relaxed);
        let stream = Self::stream_of(slot, c.serial);
        let token = peer.token;
        let sent = if peer.compact {
            let carries = if c.udp { Carries::Udp } else { Carries::Tcp };
            let frame = link::open(stream, carries, link::WINDOW, c.dest.as_ref());
            self.send_frame(io, token, &frame)
        } else {
            let Some(dest) = &c.dest else { return self.try_another(io, slot, Opened::Failed) };
            let host = match c.addr {
                Some(addr) if self.shared.config.peers.legacy_resolved => addr.to_string(),
                _ => dest.host.to_string(),
            };
            let text = link::legacy_open(&link::legacy_id(stream, c.salt), &host, dest.port);
            self.send_text(io, token, &text)
        };
        if matches!(sent, Written::Full | Written::Gone) {
            self.try_another(io, slot, Opened::Full);
        }
    }

    /// The peer could not; perhaps another can.
    fn try_another(&mut self, io: &mut Io, slot: u32, how: Opened) {
        self.leave_peer(slot);
        let attempts = self.shared.config.customers.attempts;
        let Some(c) = self.customers.get_mut(slot) else { return };
        io.cancel(c.deadline);
        if c.target.failover == Failover::None || c.tried.len() >= attempts.into() {
            return self.refuse(io, slot, Refusal::opened(how));
        }
        self.shared.metrics.failovers.fetch_add(1, Relaxed);
        c.stage = Stage::Resolving;
        self.choose(io, slot);
    }

    /// Undoes the tie between a customer and its peer.
    fn leave_peer(&mut self, slot: u32) {
        let Some(c) = self.customers.get_mut(slot) else { return };
        let Some(id) = c.peer_id.take() else { return };
        let peer_slot = std::mem::replace(&mut c.peer, NOBODY);
        let moved = c.up + c.down;
        self.shared.registry.tunnel_ends(id, moved);
        self.shared.metrics.tunnels.fetch_sub(1, Relaxed);
        if moved > 0
            && let Some(device) = self.shared.registry.device(id)
        {
            *self.shared.peer_bytes.lock().entry(device).or_default() += moved;
        }
        if let Some(peer) = self.peers.get_mut(peer_slot) {
            if let Some(at) = peer.tunnels.iter().position(|t| *t == slot) {
                peer.tunnels.swap_remove(at);
            }
            if peer.tunnels.is_empty() {
                peer.tunnels = Vec::new();
            }
        }
    }

    fn tunnel_opened(&mut self, io: &mut Io, slot: u32, how: Opened, credit: u64) {
        let Some(c) = self.customers.get_mut(slot) else { return };
        if c.stage != Stage::Opening {
            return;
        }
        let Some(id) = c.peer_id else { return };
        self.shared.registry.opened(id, how == Opened::Ok || how.is_final());
        if how != Opened::Ok {
            // Nothing was opened, so nothing has to be closed.
            c.eof_sent = true;
            c.peer_eof = true;
            if how.is_final() {
                return self.refuse(io, slot, Refusal::opened(how));
            }
            return self.try_another(io, slot, how);
        }
        io.cancel(c.deadline);
        c.credit = credit;
        self.shared.metrics.request.observe(c.began.elapsed());
        self.shared.metrics.count(protocol_index(c), Outcome::Ok);
        if c.udp {
            return self.associate(io, slot);
        }
        c.stage = Stage::Tunnel;
        io.set_idle(c.token, Some(Duration::from_secs(self.shared.config.customers.idle_seconds)));
        self.greet(io, slot);
        self.push_up(io, slot);
    }

    /// Tells the customer that its tunnel is open.
    fn greet(&mut self, io: &mut Io, slot: u32) {
        let Some(c) = self.customers.get_mut(slot) else { return };
        match c.protocol {
            Protocol::Socks => {
                let reply = socks::reply(Reply::Succeeded, SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)));
                io.write(c.token, &reply);
            }
            Protocol::Http if c.body.is_none() => drop(io.write(c.token, http::ESTABLISHED)),
            Protocol::Http => {
                // The rewritten head goes first, then as much of what came early as is body.
                let early = std::mem::take(&mut c.buffer);
                let body = c.body.as_mut().map_or(Ok(0), |b| b.take(&early));
                c.buffer = std::mem::take(&mut c.head);
                match body {
                    Ok(n) => c.buffer.extend_from_slice(&early[..n]),
                    Err(_) => self.end(io, slot, Some(Outcome::Malformed)),
                }
            }
            Protocol::Relay => {
                c.head = Vec::new();
                io.write(c.token, &[Opened::Ok as u8]);
            }
            Protocol::Unknown => {}
        }
    }

    // --- tunnels -----------------------------------------------------------------------------------------------

    /// Bytes from a customer.
    fn up(&mut self, io: &mut Io, slot: u32, bytes: &[u8]) {
        let Some(c) = self.customers.get_mut(slot) else { return };
        let mut bytes = bytes;
        if let Some(body) = &mut c.body {
            match body.take(bytes) {
                Ok(n) => bytes = &bytes[..n],
                Err(_) => return self.end(io, slot, Some(Outcome::Malformed)),
            }
        }
        if !c.buffer.is_empty() || c.throttled || c.waiting {
            c.buffer.extend_from_slice(bytes);
            return io.pause(c.token);
        }
        let sent = self.send_up(io, slot, bytes);
        if sent < bytes.len()
            && let Some(c) = self.customers.get_mut(slot)
        {
            c.buffer.extend_from_slice(&bytes[sent..]);
            io.pause(c.token);
        }
    }

    /// Sends as much as credit, rate and the peer's connection allow; returns how much.
    fn send_up(&mut self, io: &mut Io, slot: u32, bytes: &[u8]) -> usize {
        let mut at = 0;
        while at < bytes.len() {
            let Some(c) = self.customers.get_mut(slot) else { return bytes.len() };
            if c.throttled || c.waiting {
                break;
            }
            let Some(peer) = self.peers.get_mut(c.peer) else { break };
            let most = if c.compact { link::FRAME_MOST } else { link::LEGACY_FRAME_MOST };
            let n = (bytes.len() - at).min(most).min(usize::try_from(c.credit).unwrap_or(usize::MAX));
            if n == 0 {
                break;
            }
            let part = &bytes[at..at + n];
            let stream = Self::stream_of(slot, c.serial);
            let mut head = [0; ws::MAX_HEADER + link::LEGACY_HEADER];
            let mut frame = [0; ws::MAX_HEADER];
            let inner = if c.compact { link::HEADER } else { link::LEGACY_HEADER };
            let outer = ws::encode_header(&mut frame, true, Opcode::Binary, inner + n, None);
            head[..outer].copy_from_slice(&frame[..outer]);
            if c.compact {
                head[outer..outer + inner].copy_from_slice(&link::header(kind::DATA, stream));
            } else {
                head[outer..outer + 36].copy_from_slice(&link::legacy_id(stream, c.salt));
            }
            match io.write_parts(peer.token, &head[..outer + inner], part) {
                Written::Sent => {}
                Written::Queued(_) => {
                    c.waiting = true;
                    peer.waiting.push(slot);
                }
                Written::Full => {
                    c.waiting = true;
                    peer.waiting.push(slot);
                    break;
                }
                Written::Gone => break,
            }
            at += n;
            c.credit -= n as u64;
            c.up += n as u64;
            self.shared.metrics.bytes_up.fetch_add(n as u64, Relaxed);
            if let Some(account) = &c.account {
                account.count_up(n as u64);
                if let Some(wait) = account.throttle(n as u64) {
                    c.throttled = true;
                    io.arm(wait, timed(CUSTOMER, slot, c.serial));
                }
                if account.over_quota() {
                    self.end(io, slot, Some(Outcome::Limited));
                    return bytes.len();
                }
            }
        }
        at
    }

    /// Goes on with what waits in a customer's buffer, then with reading.
    fn push_up(&mut self, io: &mut Io, slot: u32) {
        let Some(c) = self.customers.get_mut(slot) else { return };
        if c.stage != Stage::Tunnel {
            return;
        }
        if !c.buffer.is_empty() {
            let buffer = std::mem::take(&mut c.buffer);
            let sent = self.send_up(io, slot, &buffer);
            let Some(c) = self.customers.get_mut(slot) else { return };
            if sent < buffer.len() {
                c.buffer = buffer;
                c.buffer.drain(..sent);
                return io.pause(c.token);
            }
        }
        let Some(c) = self.customers.get_mut(slot) else { return };
        if c.throttled || c.waiting {
            return io.pause(c.token);
        }
        if c.eof {
            return self.send_eof(io, slot);
        }
        io.resume(c.token);
    }

    /// Passes a customer's half-close on, once all before it is sent.
    fn send_eof(&mut self, io: &mut Io, slot: u32) {
        let Some(c) = self.customers.get_mut(slot) else { return };
        if c.eof_sent || !c.buffer.is_empty() {
            return;
        }
        if !c.compact {
            // A legacy EOF would end the answer too. Whether the customer has only finished asking, or is gone, shows by
            // whether an answer still moves.
            return io.set_idle(c.token, Some(LEGACY_HALF_CLOSED));
        }
        c.eof_sent = true;
        let frame = link::header(kind::EOF, Self::stream_of(slot, c.serial));
        if let Some(token) = self.peers.get(c.peer).map(|p| p.token) {
            self.send_frame(io, token, &frame);
        }
    }

    /// Bytes from a peer for one of its streams.
    fn down(&mut self, io: &mut Io, peer: u32, stream: u32, bytes: &[u8]) -> Result<(), &'static str> {
        let Some(slot) = self.customer_of(peer, stream) else { return Ok(()) };
        let Some(c) = self.customers.get_mut(slot) else { return Ok(()) };
        if c.stage != Stage::Tunnel || bytes.is_empty() || c.peer_eof {
            return Ok(());
        }
        let n = bytes.len();
        if c.compact {
            let Some(window) = c.window.checked_sub(n as u64) else { return Err("more data than was granted") };
            c.window = window;
        }
        match io.write(c.token, bytes) {
            Written::Sent => {
                self.moved_down(io, slot, n);
                self.grant(io, slot, false);
            }
            Written::Queued(queued) => {
                let moved = c.unsent + n - queued;
                c.unsent = queued;
                if !c.compact && queued > LEGACY_BACKLOG && !c.blocks_peer {
                    c.blocks_peer = true;
                    if let Some(peer) = self.peers.get_mut(peer) {
                        peer.blocked += 1;
                        io.pause(peer.token);
                    }
                }
                self.moved_down(io, slot, moved);
            }
            Written::Full | Written::Gone => self.tunnel_broke(io, slot),
        }
        Ok(())
    }

    /// Counts bytes that the kernel took for the customer.
    fn moved_down(&mut self, io: &mut Io, slot: u32, n: usize) {
        let Some(c) = self.customers.get_mut(slot) else { return };
        if n == 0 {
            return;
        }
        c.down += n as u64;
        c.owed = c.owed.saturating_add(n as u32);
        self.shared.metrics.bytes_down.fetch_add(n as u64, Relaxed);
        if let Some(account) = &c.account {
            account.count_down(n as u64);
            if let Some(wait) = account.throttle(n as u64)
                && !c.throttled
            {
                c.throttled = true;
                io.arm(wait, timed(CUSTOMER, slot, c.serial));
                io.pause(c.relay);
                if !c.compact
                    && !c.blocks_peer
                    && let Some(peer) = self.peers.get_mut(c.peer)
                {
                    c.blocks_peer = true;
                    peer.blocked += 1;
                    io.pause(peer.token);
                }
            }
            if account.over_quota() {
                self.end(io, slot, Some(Outcome::Limited));
            }
        }
    }

    /// Grants the peer what its customer has read, when it is worth a frame.
    fn grant(&mut self, io: &mut Io, slot: u32, all: bool) {
        let Some(c) = self.customers.get_mut(slot) else { return };
        if !c.compact || c.throttled || c.owed == 0 || (!all && c.owed < link::WINDOW / 4) || c.peer_eof {
            return;
        }
        let frame = link::credit(Self::stream_of(slot, c.serial), c.owed);
        c.window += u64::from(c.owed);
        c.owed = 0;
        if let Some(token) = self.peers.get(c.peer).map(|p| p.token) {
            self.send_frame(io, token, &frame);
        }
    }

    fn unblock_peer(&mut self, io: &mut Io, slot: u32) {
        let Some(c) = self.customers.get_mut(slot) else { return };
        if std::mem::take(&mut c.blocks_peer)
            && let Some(peer) = self.peers.get_mut(c.peer)
        {
            peer.blocked -= 1;
            if peer.blocked == 0 {
                io.resume(peer.token);
            }
        }
    }

    /// All that was queued for a customer is sent.
    fn customer_drained(&mut self, io: &mut Io, slot: u32) {
        let Some(c) = self.customers.get_mut(slot) else { return };
        let unsent = std::mem::take(&mut c.unsent);
        if c.stage == Stage::RelayTunnel && !c.throttled {
            io.resume(c.relay);
        }
        self.moved_down(io, slot, unsent);
        let Some(c) = self.customers.get(slot) else { return };
        if !c.throttled {
            self.unblock_peer(io, slot);
        }
        self.grant(io, slot, true);
    }

    fn peer_eof(&mut self, io: &mut Io, slot: u32) {
        let Some(c) = self.customers.get_mut(slot) else { return };
        if c.stage == Stage::Tunnel && !c.peer_eof {
            c.peer_eof = true;
            if c.body.is_some() {
                // One plain request to a connection: with the answer sent it is over.
                return self.end(io, slot, None);
            }
            io.shutdown_write(c.token);
        }
    }

    /// The peer, or this hub's tie to it, is gone: the customer gets what was received and a clean end.
    fn tunnel_broke(&mut self, io: &mut Io, slot: u32) {
        let Some(c) = self.customers.get_mut(slot) else { return };
        match c.stage {
            Stage::Opening => {
                if let Some(id) = c.peer_id {
                    self.shared.registry.opened(id, false);
                }
                self.try_another(io, slot, Opened::Failed);
            }
            Stage::Tunnel | Stage::Udp => self.end(io, slot, Some(Outcome::Failed)),
            _ => {}
        }
    }

    fn tunnel_broke_by_peer(&mut self, io: &mut Io, slot: u32) {
        if let Some(c) = self.customers.get_mut(slot) {
            // It knows: no reset goes back.
            c.eof_sent = true;
            c.peer_eof = true;
        }
        self.tunnel_broke(io, slot);
    }

    /// Answers with an error and closes.
    fn refuse(&mut self, io: &mut Io, slot: u32, refusal: Refusal) {
        let Some(c) = self.customers.get_mut(slot) else { return };
        tracing::debug!(target: "access", from = %c.from, account = c.account.as_ref().map(|a| a.name.as_str()),
            dest = c.dest.as_ref().map(ToString::to_string), reason = refusal.reason, "refused");
        let answer = match c.protocol {
            Protocol::Socks => socks::reply(refusal.socks, SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0))),
            Protocol::Http => {
                let retry = matches!(refusal.status, 429 | 503).then_some(1);
                http::error(refusal.status, &refusal.reason, retry)
            }
            Protocol::Relay => vec![match refusal.socks {
                Reply::ConnectionRefused => Opened::Refused,
                Reply::HostUnreachable => Opened::Unreachable,
                Reply::TtlExpired => Opened::Timeout,
                Reply::NotAllowed => Opened::Denied,
                Reply::NetworkUnreachable => Opened::Full,
                _ => Opened::Failed,
            } as u8],
            Protocol::Unknown => Vec::new(),
        };
        io.write(c.token, &answer);
        self.shared.metrics.count(protocol_index(c), refusal.outcome);
        self.end(io, slot, None);
    }

    /// Ends a customer in order: what is queued is sent, its peer is told, the rest of what it sends is discarded.
    fn end(&mut self, io: &mut Io, slot: u32, failed: Option<Outcome>) {
        let Some(c) = self.customers.get_mut(slot) else { return };
        if c.stage == Stage::Ending {
            return;
        }
        if let Some(outcome) = failed {
            self.shared.metrics.count(protocol_index(c), outcome);
        }
        self.part(io, slot);
        let Some(c) = self.customers.get_mut(slot) else { return };
        c.stage = Stage::Ending;
        c.buffer = Vec::new();
        c.admitted = None;
        io.cancel(c.deadline);
        c.deadline = io.arm(LINGER, timed(CUSTOMER, slot, c.serial));
        io.set_idle(c.token, None);
        io.resume(c.token);
        io.shutdown_write(c.token);
    }

    /// Tells the peer (or the other hub) that the tunnel is over, writes the access log, lets the peer go.
    fn part(&mut self, io: &mut Io, slot: u32) {
        self.unblock_peer(io, slot);
        let Some(c) = self.customers.get_mut(slot) else { return };
        let relay = std::mem::replace(&mut c.relay, Token::NONE);
        io.close(relay);
        if let Some(association) = c.association.take() {
            io.close(association.socket);
        }
        if c.peer_id.is_none() && c.up + c.down == 0 {
            return;
        }
        let Some(c) = self.customers.get(slot) else { return };
        let stream = Self::stream_of(slot, c.serial);
        if let Some(token) = self.peers.get(c.peer).map(|p| p.token) {
            if c.compact && !(c.eof_sent && c.peer_eof) {
                let mut frame = link::header(kind::RESET, stream).to_vec();
                frame.push(0);
                self.send_frame(io, token, &frame);
            } else if !c.compact && !c.eof_sent {
                let mut frame = link::legacy_id(stream, c.salt).to_vec();
                frame.push(1);
                self.send_frame(io, token, &frame);
            }
        }
        let Some(c) = self.customers.get(slot) else { return };
        tracing::info!(
            target: "access",
            account = c.account.as_ref().map(|a| a.name.as_str()),
            from = %c.from,
            protocol = ?c.protocol,
            dest = c.dest.as_ref().map(ToString::to_string),
            peer = c.peer_id.and_then(|id| self.shared.registry.device(id)),
            up = c.up,
            down = c.down,
            ms = c.began.elapsed().as_millis() as u64,
            "tunnel"
        );
        let peer = c.peer;
        self.leave_peer(slot);
        if self.shared.is_draining() && self.peers.get(peer).is_some_and(|p| p.tunnels.is_empty()) {
            self.close_peer(io, peer, ws::close::GOING_AWAY, "hub is draining");
        }
    }

    /// Forgets a customer whose connection is gone.
    fn customer_gone(&mut self, io: &mut Io, slot: u32, finished: bool) {
        let Some(c) = self.customers.get_mut(slot) else { return };
        io.cancel(c.deadline);
        // In an orderly end everything queued was sent; in any other nobody knows how much, and it is not billed.
        let unsent = std::mem::take(&mut c.unsent);
        if finished && unsent > 0 {
            c.down += unsent as u64;
            self.shared.metrics.bytes_down.fetch_add(unsent as u64, Relaxed);
            if let Some(account) = &c.account {
                account.count_down(unsent as u64);
            }
        }
        self.part(io, slot);
        if self.customers.remove(slot).is_some() {
            self.shared.metrics.customers_connected.fetch_sub(1, Relaxed);
        }
    }

    /// Closes a customer that speaks nonsense, or cannot be served at all.
    fn drop_customer(&mut self, io: &mut Io, slot: u32, outcome: Outcome) {
        let Some(c) = self.customers.get(slot) else { return };
        self.shared.metrics.count(protocol_index(c), outcome);
        io.close(c.token);
        self.customer_gone(io, slot, false);
    }

    // --- UDP ---------------------------------------------------------------------------------------------------

    /// Makes the socket of an association and tells the customer where it is.
    fn associate(&mut self, io: &mut Io, slot: u32) {
        let Some(c) = self.customers.get_mut(slot) else { return };
        let local = io.local_addr(c.token).map_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED), |a| unmapped(a.ip()));
        let made = UdpSocket::bind(SocketAddr::new(local, 0))
            .and_then(|socket| Ok((socket.local_addr()?, io.udp(socket, tag(UDP, slot))?)));
        match made {
            Ok((addr, socket)) => {
                c.stage = Stage::Udp;
                io.set_idle(c.token, Some(Duration::from_secs(self.shared.config.customers.idle_seconds)));
                c.association = Some(Box::new(Association { socket, client: None }));
                io.write(c.token, &socks::reply(Reply::Succeeded, addr));
            }
            Err(error) => {
                tracing::warn!(%error, "no socket for a UDP association");
                self.refuse(io, slot, Refusal::new(Reply::GeneralFailure, 503, Outcome::Failed, "no socket"));
            }
        }
    }

    fn datagram_up(&mut self, io: &mut Io, slot: u32, from: SocketAddr, bytes: &[u8]) {
        let policy = self.shared.policy.read().clone();
        let Some(c) = self.customers.get_mut(slot) else { return };
        let socket_from = io.peer_addr(c.token).map(|a| unmapped(a.ip()));
        let Some(association) = &mut c.association else { return };
        // Datagrams of others are not the customer's, whatever is in them.
        if socket_from != Some(unmapped(from.ip())) || association.client.is_some_and(|client| client != from) {
            return;
        }
        association.client = Some(from);
        io.touch(c.token);
        let Some((dest, at)) = socks::udp_header(bytes) else { return };
        if policy.check(&dest).is_err() {
            return;
        }
        match dest.host {
            Host::Ip(ip) => self.send_datagram(io, slot, SocketAddr::new(ip, dest.port), &bytes[at..]),
            Host::Name(name) => {
                let datagram = Some((dest.port, bytes[at..].to_vec()));
                let lookup = Lookup { shard: self.shard.into(), slot, serial: c.serial, name, datagram };
                let _ = self.shared.lookups.try_send(lookup);
            }
        }
    }

    fn send_datagram(&mut self, io: &mut Io, slot: u32, to: SocketAddr, payload: &[u8]) {
        let Some(c) = self.customers.get_mut(slot) else { return };
        let Some(peer) = self.peers.get(c.peer) else { return };
        if c.throttled || io.queued(peer.token) > DATAGRAM_BACKLOG {
            return;
        }
        let mut frame = link::header(kind::DATAGRAM, Self::stream_of(slot, c.serial)).to_vec();
        socks::put_address(&mut frame, to);
        frame.extend_from_slice(payload);
        let n = payload.len() as u64;
        c.up += n;
        self.shared.metrics.bytes_up.fetch_add(n, Relaxed);
        if let Some(account) = &c.account {
            account.count_up(n);
            if let Some(wait) = account.throttle(n) {
                c.throttled = true;
                io.arm(wait, timed(CUSTOMER, slot, c.serial));
            }
        }
        let token = peer.token;
        self.send_frame(io, token, &frame);
        if self.customers.get(slot).and_then(|c| c.account.as_ref()).is_some_and(|a| a.over_quota()) {
            self.end(io, slot, Some(Outcome::Limited));
        }
    }

    /// A datagram from a peer: the address it came from is in front of it, in the form that SOCKS wants.
    fn datagram_down(&mut self, io: &mut Io, slot: u32, body: &[u8]) {
        let Some(c) = self.customers.get_mut(slot) else { return };
        let Some(association) = &c.association else { return };
        let (Some(client), socks::Parsed::Done(Ok(_), at)) = (association.client, socks::address(body)) else { return };
        io.touch(c.token);
        let mut packet = Vec::with_capacity(3 + body.len());
        packet.extend_from_slice(&[0, 0, 0]);
        packet.extend_from_slice(body);
        if io.send(association.socket, Some(client), &packet) {
            self.moved_down(io, slot, body.len() - at);
        }
    }

    // --- other hubs --------------------------------------------------------------------------------------------

    fn relay_to(&mut self, io: &mut Io, slot: u32, hub: &crate::shared::OtherHub) {
        let Some(c) = self.customers.get_mut(slot) else { return };
        c.relayed = true;
        let wait = Duration::from_secs(self.shared.config.customers.open_seconds);
        match io.connect(hub.relay, None, Duration::from_secs(5).min(wait), tag(RELAY, slot)) {
            Ok(token) => {
                c.relay = token;
                c.stage = Stage::RelayOpening;
                // The other hub has its own attempts to make before it answers.
                c.deadline = io.arm(wait * 2, timed(CUSTOMER, slot, c.serial));
                self.shared.metrics.relayed.fetch_add(1, Relaxed);
                let Some(config) = &self.shared.config.directory else { return };
                let order = relay::Order {
                    account: c.account.as_ref().map(|a| a.name.clone()).unwrap_or_default(),
                    dest: c.dest.as_ref().map(ToString::to_string).unwrap_or_default(),
                    target: relay::params(&c.target),
                    time: unix_now(),
                };
                io.write(token, &relay::encode(&order, &config.secret));
            }
            Err(_) => self.choose(io, slot),
        }
    }

    fn relay_data(&mut self, io: &mut Io, slot: u32, bytes: &[u8]) {
        let Some(c) = self.customers.get_mut(slot) else { return };
        let mut bytes = bytes;
        if c.stage == Stage::RelayOpening {
            let [code, rest @ ..] = bytes else { return };
            bytes = rest;
            let how = Opened::parse(*code);
            io.cancel(c.deadline);
            if how != Opened::Ok {
                return self.refuse(io, slot, Refusal::opened(how));
            }
            self.shared.metrics.request.observe(c.began.elapsed());
            self.shared.metrics.count(protocol_index(c), Outcome::Ok);
            c.stage = Stage::RelayTunnel;
            io.pair(c.token, c.relay);
            io.set_idle(c.token, Some(Duration::from_secs(self.shared.config.customers.idle_seconds)));
            self.greet(io, slot);
            let Some(c) = self.customers.get_mut(slot) else { return };
            let early = std::mem::take(&mut c.buffer);
            io.resume(c.token);
            let body = c.body.take();
            self.relay_up(io, slot, &early);
            if let Some(c) = self.customers.get_mut(slot) {
                c.body = body;
                if c.eof {
                    io.shutdown_write(c.relay);
                }
            }
        }
        let Some(c) = self.customers.get_mut(slot) else { return };
        if c.stage != Stage::RelayTunnel || bytes.is_empty() {
            return;
        }
        match io.write(c.token, bytes) {
            Written::Sent => self.moved_down(io, slot, bytes.len()),
            Written::Queued(queued) => {
                let moved = c.unsent + bytes.len() - queued;
                c.unsent = queued;
                io.pause(c.relay);
                self.moved_down(io, slot, moved);
            }
            Written::Full | Written::Gone => self.end(io, slot, Some(Outcome::Failed)),
        }
    }

    fn relay_up(&mut self, io: &mut Io, slot: u32, bytes: &[u8]) {
        let Some(c) = self.customers.get_mut(slot) else { return };
        let mut bytes = bytes;
        if let Some(body) = &mut c.body {
            match body.take(bytes) {
                Ok(n) => bytes = &bytes[..n],
                Err(_) => return self.end(io, slot, Some(Outcome::Malformed)),
            }
        }
        if bytes.is_empty() {
            return;
        }
        match io.write(c.relay, bytes) {
            Written::Sent => {}
            Written::Queued(_) => io.pause(c.token),
            Written::Full | Written::Gone => return self.end(io, slot, Some(Outcome::Failed)),
        }
        let n = bytes.len() as u64;
        c.up += n;
        self.shared.metrics.bytes_up.fetch_add(n, Relaxed);
        if let Some(account) = &c.account {
            account.count_up(n);
            if let Some(wait) = account.throttle(n) {
                c.throttled = true;
                io.pause(c.token);
                io.arm(wait, timed(CUSTOMER, slot, c.serial));
            }
            if account.over_quota() {
                self.end(io, slot, Some(Outcome::Limited));
            }
        }
    }

    // --- time --------------------------------------------------------------------------------------------------

    fn heartbeat(&mut self, io: &mut Io, slot: u32) {
        let Some(peer) = self.peers.get_mut(slot) else { return };
        let beat = self.shared.config.heartbeat();
        let silent = clawhq_wire::TICK * (io.now() - peer.heard) as u32;
        if peer.blocked > 0 {
            // It is we who do not listen.
            peer.heard = io.now();
            io.arm(beat, timed(PEER, slot, peer.serial));
            return;
        }
        if silent >= beat * 2 {
            self.shared.metrics.peers_dead.fetch_add(1, Relaxed);
            let token = peer.token;
            self.peer_gone(io, slot, "silent");
            // There is nobody to send the rest to.
            return io.abort(token);
        }
        let next = if silent >= beat {
            if !std::mem::replace(&mut peer.pinged, true) {
                io.write(peer.token, &[0x80 | Opcode::Ping as u8, 0]);
            }
            beat * 2 - silent
        } else {
            beat - silent
        };
        io.arm(next.max(clawhq_wire::TICK), timed(PEER, slot, peer.serial));
    }

    fn customer_timer(&mut self, io: &mut Io, slot: u32) {
        let Some(c) = self.customers.get_mut(slot) else { return };
        match c.stage {
            Stage::Ending => {
                io.abort(c.token);
                self.customer_gone(io, slot, false);
            }
            Stage::Opening => {
                if let Some(id) = c.peer_id {
                    self.shared.registry.opened(id, false);
                }
                let stream = Self::stream_of(slot, c.serial);
                if c.compact
                    && let Some(token) = self.peers.get(c.peer).map(|p| p.token)
                {
                    let mut frame = link::header(kind::RESET, stream).to_vec();
                    frame.push(0);
                    self.send_frame(io, token, &frame);
                }
                // Late words about this stream must not be taken for the next attempt's.
                self.customers.serial = self.customers.serial.wrapping_add(1);
                let serial = self.customers.serial;
                if let Some(c) = self.customers.get_mut(slot) {
                    c.serial = serial;
                }
                self.try_another(io, slot, Opened::Timeout);
            }
            Stage::Resolving => self.refuse(io, slot, Refusal::opened(Opened::NotResolved)),
            Stage::RelayOpening => self.refuse(io, slot, Refusal::opened(Opened::Timeout)),
            Stage::Tunnel | Stage::Udp | Stage::RelayTunnel => {
                c.throttled = false;
                if c.stage == Stage::RelayTunnel {
                    if c.unsent == 0 {
                        io.resume(c.relay);
                    }
                    if io.queued(c.relay) == 0 {
                        io.resume(c.token);
                    }
                    return;
                }
                if c.unsent == 0 {
                    self.unblock_peer(io, slot);
                }
                self.grant(io, slot, true);
                self.push_up(io, slot);
            }
            // Too slow to say what it wants.
            _ => self.drop_customer(io, slot, Outcome::Malformed),
        }
    }
}

fn clip(text: &str, most: usize) -> String {
    text[..text.floor_char_boundary(most)].to_owned()
}

fn protocol_index(c: &Customer) -> usize {
    match (c.protocol, c.udp) {
        (_, true) => 2,
        (Protocol::Http, _) => 1,
        _ => 0,
    }
}

/// Seconds since 1970.
pub fn unix_now() -> i64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_secs() as i64)
}

impl Service for Hub {
    type Command = Command;

    fn start(&mut self, io: &mut Io) {
        let Some(listeners) = self.listeners.take() else { return };
        let all = [
            (Some(listeners.peers), PEER_LISTENER),
            (Some(listeners.customers), CUSTOMER_LISTENER),
            (listeners.relay, RELAY_LISTENER),
        ];
        for (listener, what) in all {
            if let Some(listener) = listener
                && let Err(error) = io.listen(listener, tag(what, 0))
            {
                tracing::error!(%error, "cannot listen");
                io.stop();
            }
        }
        if self.shard == 0 {
            io.arm(Duration::from_secs(10), timed(SWEEP, 0, 0));
        }
    }

    fn admit(&mut self, _: &mut Io, listener: Conn, peer: SocketAddr) -> Option<u64> {
        let from = unmapped(peer.ip());
        match listener.tag >> 56 {
            PEER_LISTENER => {
                let slot = self.peers.insert(|serial| Peer {
                    token: Token::NONE,
                    serial,
                    id: None,
                    parser: Parser::new(Role::Server),
                    heard: 0,
                    stage: PeerStage::Http,
                    compact: false,
                    current: 0,
                    stream: NOBODY,
                    pinged: false,
                    blocked: 0,
                    partial: Some(Box::new(Partial { began: Some(Instant::now()), ..Partial::default() })),
                    tunnels: Vec::new(),
                    waiting: Vec::new(),
                    addr: from,
                });
                self.shared.metrics.peers_connected.fetch_add(1, Relaxed);
                Some(tag(PEER, slot))
            }
            what => {
                let stage = match what {
                    RELAY_LISTENER => Stage::RelayHead,
                    _ if front::is_trusted(&self.shared.customer_proxies, from) => Stage::Front,
                    _ => Stage::Sniff,
                };
                let slot = self.customers.insert(|serial| Box::new(new_customer(serial, from, stage)));
                self.shared.metrics.customers_connected.fetch_add(1, Relaxed);
                Some(tag(CUSTOMER, slot))
            }
        }
    }

    fn accepted(&mut self, io: &mut Io, conn: Conn, _: SocketAddr) {
        let slot = conn.tag as u32;
        if conn.tag >> 56 == PEER {
            if let Some(peer) = self.peers.get_mut(slot) {
                peer.token = conn.token;
                peer.heard = io.now();
                io.arm(PEER_HANDSHAKE, timed(PEER_HELLO, slot, peer.serial));
            }
        } else if let Some(c) = self.customers.get_mut(slot) {
            c.token = conn.token;
            let wait = Duration::from_secs(self.shared.config.customers.handshake_seconds);
            c.deadline = io.arm(wait, timed(CUSTOMER, slot, c.serial));
        }
    }

    fn connected(&mut self, _: &mut Io, _: Conn) {}

    fn data(&mut self, io: &mut Io, conn: Conn, bytes: &mut [u8]) {
        let slot = conn.tag as u32;
        match conn.tag >> 56 {
            PEER => self.peer_data(io, slot, bytes),
            RELAY => self.relay_data(io, slot, bytes),
            _ => self.customer_data(io, slot, bytes),
        }
    }

    fn eof(&mut self, io: &mut Io, conn: Conn) {
        let slot = conn.tag as u32;
        match conn.tag >> 56 {
            PEER => self.peer_gone(io, slot, "closed"),
            RELAY => match self.customers.get_mut(slot) {
                Some(c) if c.stage == Stage::RelayTunnel => {
                    c.peer_eof = true;
                    io.shutdown_write(c.token);
                }
                Some(_) => self.refuse(io, slot, Refusal::opened(Opened::Failed)),
                None => {}
            },
            _ => {
                let Some(c) = self.customers.get_mut(slot) else { return };
                c.eof = true;
                match c.stage {
                    // Some clients half-close right behind their request and still want the answer.
                    Stage::Opening | Stage::Resolving | Stage::RelayOpening => {}
                    Stage::Tunnel => self.send_eof(io, slot),
                    Stage::RelayTunnel => io.shutdown_write(c.relay),
                    // The association ends with its TCP connection (RFC 1928, section 7).
                    Stage::Udp => self.end(io, slot, None),
                    Stage::Ending => {}
                    _ => self.drop_customer(io, slot, Outcome::Malformed),
                }
            }
        }
    }

    fn drained(&mut self, io: &mut Io, conn: Conn) {
        let slot = conn.tag as u32;
        match conn.tag >> 56 {
            PEER => {
                let Some(peer) = self.peers.get_mut(slot) else { return };
                let waiting = std::mem::take(&mut peer.waiting);
                for customer in waiting {
                    if let Some(c) = self.customers.get_mut(customer)
                        && c.peer == slot
                    {
                        c.waiting = false;
                        self.push_up(io, customer);
                    }
                }
            }
            RELAY => {
                if let Some(c) = self.customers.get(slot)
                    && !c.throttled
                {
                    io.resume(c.token);
                }
            }
            _ => self.customer_drained(io, slot),
        }
    }

    fn timer(&mut self, io: &mut Io, payload: u64) {
        let (slot, serial) = (payload as u32, (payload >> 32) as u32 & 0xff_ffff);
        match payload >> 56 {
            what @ (PEER | PEER_HELLO) => {
                let Some(peer) = self.peers.get(slot).filter(|p| p.serial & 0xff_ffff == serial) else { return };
                match (what, peer.stage) {
                    (PEER, _) => self.heartbeat(io, slot),
                    (_, PeerStage::Ready) => {}
                    _ => self.peer_gone(io, slot, "did not introduce itself"),
                }
            }
            CUSTOMER => {
                if self.customers.get(slot).is_some_and(|c| c.serial & 0xff_ffff == serial) {
                    self.customer_timer(io, slot);
                }
            }
            _ => {
                self.shared.registry.sweep_sessions(self.shared.now());
                io.arm(Duration::from_secs(10), timed(SWEEP, 0, 0));
            }
        }
    }

    fn closed(&mut self, io: &mut Io, conn: Conn, why: Closed) {
        let slot = conn.tag as u32;
        match conn.tag >> 56 {
            PEER => self.peer_gone(io, slot, "connection lost"),
            RELAY => {
                let Some(c) = self.customers.get_mut(slot) else { return };
                if c.relay != conn.token {
                    return;
                }
                c.relay = Token::NONE;
                match c.stage {
                    // The other hub is not there: perhaps a peer of this one will do, or the answer is no.
                    Stage::RelayOpening => {
                        io.cancel(c.deadline);
                        c.stage = Stage::Resolving;
                        self.choose(io, slot);
                    }
                    Stage::RelayTunnel if why == Closed::Finished => {}
                    Stage::RelayTunnel => self.end(io, slot, Some(Outcome::Failed)),
                    _ => {}
                }
            }
            _ => self.customer_gone(io, slot, why == Closed::Finished),
        }
    }

    fn datagram(&mut self, io: &mut Io, socket: Conn, from: SocketAddr, bytes: &mut [u8]) {
        self.datagram_up(io, socket.tag as u32, from, bytes);
    }

    fn command(&mut self, io: &mut Io, command: Command) {
        match command {
            Command::Resolved { slot, serial, addrs, datagram } => {
                if self.customers.get(slot).is_none_or(|c| c.serial != serial) {
                    return;
                }
                match datagram {
                    None => self.resolved(io, slot, &addrs),
                    Some((port, payload)) => {
                        let policy = self.shared.policy.read().clone();
                        if addrs.iter().all(|ip| policy.check_ip(*ip).is_ok())
                            && let Some(ip) = addrs.first()
                        {
                            self.send_datagram(io, slot, SocketAddr::new(unmapped(*ip), port), &payload);
                        }
                    }
                }
            }
            Command::Adopt { mut customer, fd, choice } => {
                let slot = self.customers.insert(|serial| {
                    customer.serial = serial;
                    customer
                });
                match io.adopt(fd, tag(CUSTOMER, slot)) {
                    Ok(token) => {
                        if let Some(c) = self.customers.get_mut(slot) {
                            c.token = token;
                            c.deadline = Timer::NONE;
                        }
                        self.open(io, slot, choice);
                    }
                    Err(_) => self.customer_gone(io, slot, false),
                }
            }
            Command::ClosePeer { slot, serial, reason } => {
                if self.peers.get(slot).is_some_and(|p| p.serial == serial) {
                    self.close_peer(io, slot, ws::close::NORMAL, reason);
                }
            }
            Command::DrainPeer { slot, serial } => {
                if let Some(peer) = self.peers.get(slot).filter(|p| p.serial == serial) {
                    if let Some(id) = peer.id {
                        self.shared.registry.drain(id);
                    }
                    if peer.compact {
                        let token = peer.token;
                        self.send_frame(io, token, &link::header(kind::DRAIN, 0));
                    }
                }
            }
            Command::DrainAll => {
                for slot in 0..self.peers.entries.len() as u32 {
                    let Some(peer) = self.peers.get(slot) else { continue };
                    let (token, compact, ready) = (peer.token, peer.compact, peer.stage == PeerStage::Ready);
                    if !ready {
                        self.peer_gone(io, slot, "draining");
                    } else if compact {
                        // Each is told its own time, so that they do not all knock at the next hub at once.
                        let wait = Duration::from_secs_f64(0.5 + 10.0 * self.rng.random::<f64>());
                        let cooldown =
                            link::Cooldown { retry_after_ms: wait.as_millis() as u64, reason: "draining".into() };
                        self.send_frame(io, token, &link::json(kind::DRAIN, &cooldown));
                    }
                    if let Some(peer) = self.peers.get(slot)
                        && peer.tunnels.is_empty()
                    {
                        self.close_peer(io, slot, ws::close::GOING_AWAY, "hub is draining");
                    }
                }
            }
        }
    }
}

fn new_customer(serial: u32, from: IpAddr, stage: Stage) -> Customer {
    Customer {
        token: Token::NONE,
        serial,
        from,
        stage,
        protocol: if stage == Stage::RelayHead { Protocol::Relay } else { Protocol::Unknown },
        buffer: Vec::new(),
        account: None,
        admitted: None,
        target: Target::default(),
        dest: None,
        addr: None,
        udp: false,
        head: Vec::new(),
        body: None,
        peer: NOBODY,
        peer_id: None,
        compact: false,
        salt: 0,
        credit: 0,
        window: 0,
        owed: 0,
        unsent: 0,
        up: 0,
        down: 0,
        began: Instant::now(),
        tried: Vec::new(),
        deadline: Timer::NONE,
        throttled: false,
        waiting: false,
        blocks_peer: false,
        eof: false,
        eof_sent: false,
        peer_eof: false,
        relayed: false,
        relay: Token::NONE,
        association: None,
    }
}
