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
use crate::tally::Way;
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

mod compact;
mod customers;
mod legacy;
mod peers;
mod refusal;
mod relays;
mod table;
mod tunnels;
mod udp;

use refusal::Refusal;
use table::Table;

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
/// Places of customers that rest. A stream is named by its customer's place and eight bits of its serial: a late word
/// about one that ended could reach another's only if the place had 256 tenants meanwhile, so places are used in turn.
const CUSTOMERS_REST: usize = 1024;
/// Bytes of a peer that cannot be parsed yet: JSON of the legacy form holds 32 KiB in base64.
const MESSAGE_MOST: usize = 128 * 1024;
/// Bytes a customer may send ahead of its tunnel.
const EARLY_MOST: usize = 64 * 1024;
/// With this much waiting for one legacy customer its peer is not read: legacy has no credit.
const LEGACY_BACKLOG: usize = 256 * 1024;
/// A legacy tunnel whose customer has ended its direction is given up after this without a byte.
const LEGACY_HALF_CLOSED: Duration = Duration::from_secs(5);
/// No more data is given to a peer that has this much waiting: half of what may be queued is kept for the words about
/// streams, which must not be lost.
const DATA_BACKLOG: usize = 512 * 1024;
/// A datagram is dropped when its peer has this much waiting.
const DATAGRAM_BACKLOG: usize = 256 * 1024;
/// How long an ended customer may take to read what is left for it.
const LINGER: Duration = Duration::from_secs(15);
/// Time a peer has to introduce itself.
const PEER_HANDSHAKE: Duration = Duration::from_secs(20);
const FRAME_LIMITS: ws::Limits = ws::Limits { frame: MESSAGE_MOST as u64, message: MESSAGE_MOST as u64 };

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
    /// Other hubs that were asked.
    hubs: Vec<Arc<str>>,
    relay: Token,
    association: Option<Box<Association>>,
}

/// The UDP side of an association.
struct Association {
    socket: Token,
    /// Where the customer's datagrams come from, once the first has come.
    client: Option<SocketAddr>,
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
            peers: Table::new(0),
            customers: Table::new(CUSTOMERS_REST),
            rng: SmallRng::from_rng(&mut rand::rng()),
            out: Vec::new(),
        }
    }
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
                Some(c) if c.stage == Stage::Udp => self.end(io, slot, None),
                Some(c) if c.stage == Stage::RelayOpening => self.refuse(io, slot, Refusal::opened(Opened::Failed)),
                Some(_) => {}
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
                    Stage::RelayTunnel | Stage::Udp => self.end(io, slot, Some(Outcome::Failed)),
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
                for slot in 0..self.peers.places() {
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
        hubs: Vec::new(),
        relay: Token::NONE,
        association: None,
    }
}
