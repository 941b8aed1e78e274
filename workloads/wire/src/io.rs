//! A shard: one thread, one epoll instance, all its connections in one table.

use crate::socket;
use crate::timer::{Timer, Wheel};
use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::io::Errno;
use rustix::net::{self, RecvFlags, SendFlags, Shutdown, SocketFlags, sockopt};
use rustix::pipe::{PipeFlags, SpliceFlags};
use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

/// Length of a tick: the resolution of every deadline.
pub const TICK: Duration = Duration::from_millis(10);

/// Names a socket of one shard. A token outlives its socket harmlessly: calls with a stale one do nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Token {
    index: u32,
    generation: u32,
}

impl Token {
    /// The token of no socket.
    pub const NONE: Token = Token { index: u32::MAX, generation: 0 };

    /// Small number unique among the live sockets of the shard: fit to index a table kept beside this one.
    pub fn index(self) -> usize {
        self.index as usize
    }
}

/// A socket as callbacks see it: its name, and the tag its service gave it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Conn {
    pub token: Token,
    pub tag: u64,
}

/// Why a connection ended. Connections that the service itself closed are not reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Closed {
    /// Both directions ended in order.
    Finished,
    /// The peer reset the connection, or it failed in the network.
    Reset,
    /// Nothing moved for the idle time.
    Idle,
    /// The outgoing connect failed.
    ConnectFailed(io::ErrorKind),
    /// The outgoing connect missed its deadline.
    ConnectTimeout,
    /// The shard was stopped.
    Stopped,
}

/// What `Io::write` did with the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Written {
    /// The kernel took them all.
    Sent,
    /// Taken; this many bytes wait for the peer now. Pause the source until `drained`.
    Queued(usize),
    /// Not taken: the queue is at its limit. Nothing of this write was sent.
    Full,
    /// Not taken: the connection is gone or its write side was shut.
    Gone,
}

/// What a service does with its sockets. All calls of one shard come from its one thread.
///
/// Bytes passed in are borrowed from the shard's scratch buffer: what must be kept has to be copied, and an idle
/// connection therefore owns no buffer.
#[allow(unused_variables)]
pub trait Service: Sized {
    /// What other threads may send to this shard.
    type Command: Send + 'static;

    /// Called once on the shard's thread before anything else.
    fn start(&mut self, io: &mut Io) {}

    /// A client arrived. Its tag, or `None` to refuse it (it is reset at once).
    fn admit(&mut self, io: &mut Io, listener: Conn, peer: SocketAddr) -> Option<u64>;

    /// An admitted connection is registered.
    fn accepted(&mut self, io: &mut Io, conn: Conn, peer: SocketAddr) {}

    /// An outgoing connection is up.
    fn connected(&mut self, io: &mut Io, conn: Conn) {}

    /// Bytes arrived.
    fn data(&mut self, io: &mut Io, conn: Conn, bytes: &mut [u8]);

    /// The peer will send no more; it may still read. Answer with `Io::shutdown_write` (possibly later) or `Io::close`.
    fn eof(&mut self, io: &mut Io, conn: Conn) {
        io.close(conn.token);
    }

    /// Everything queued on this connection was sent.
    fn drained(&mut self, io: &mut Io, conn: Conn) {}

    /// `count` bytes of `conn` were moved to its splice target without passing through `data`.
    fn spliced(&mut self, io: &mut Io, conn: Conn, count: usize) {}

    /// A timer armed with `Io::arm` fell due.
    fn timer(&mut self, io: &mut Io, payload: u64) {}

    /// The connection is gone; its token is stale already.
    fn closed(&mut self, io: &mut Io, conn: Conn, why: Closed);

    /// A datagram arrived on a UDP socket.
    fn datagram(&mut self, io: &mut Io, socket: Conn, from: SocketAddr, bytes: &mut [u8]) {}

    /// A connected UDP socket reported an error (ICMP unreachable, most often). The socket stays open.
    fn datagram_error(&mut self, io: &mut Io, socket: Conn, error: io::ErrorKind) {}

    /// Another thread sent a command.
    fn command(&mut self, io: &mut Io, command: Self::Command);

    /// The shard is draining: listeners are closed, the shard stops when the last connection ends or at the deadline.
    fn draining(&mut self, io: &mut Io) {}
}

/// Limits of one shard.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Most sockets of any kind; accepts beyond it are reset.
    pub sockets: usize,
    /// Most bytes queued for one slow reader before `write` says `Full`.
    pub queue: usize,
    /// Bytes of the shard's read buffer: the most that one `data` call carries.
    pub scratch: usize,
    /// Most pipes kept for splicing, busy and pooled together (two descriptors each).
    pub pipes: usize,
    /// How long a closed connection may take to read what was queued for it.
    pub linger: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Limits { sockets: 9_000, queue: 1 << 20, scratch: 64 << 10, pipes: 256, linger: Duration::from_secs(10) }
    }
}

/// Counters of one shard since its start.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counters {
    pub accepted: u64,
    /// Refused by `Service::admit` or by the socket limit.
    pub refused: u64,
    /// Datagrams that the kernel would not take.
    pub datagrams_dropped: u64,
    pub timers: u64,
    pub turns: u64,
}

mod flag {
    pub const TCP: u32 = 1 << 0;
    pub const LISTENER: u32 = 1 << 1;
    pub const UDP: u32 = 1 << 2;
    pub const READABLE: u32 = 1 << 3;
    pub const WRITABLE: u32 = 1 << 4;
    pub const PEER_DONE: u32 = 1 << 5;
    pub const PAUSED: u32 = 1 << 6;
    pub const EOF: u32 = 1 << 7;
    pub const WRITE_SHUT: u32 = 1 << 8;
    pub const SHUT_WHEN_SENT: u32 = 1 << 9;
    pub const CONNECTING: u32 = 1 << 10;
    pub const CLOSING: u32 = 1 << 11;
    pub const LISTED: u32 = 1 << 12;
    pub const FAILED: u32 = 1 << 13;
    pub const SPLICE: u32 = 1 << 14;
    /// Registered for writability as well.
    pub const OUT: u32 = 1 << 15;
    /// Has TCP_NODELAY set.
    pub const NODELAY: u32 = 1 << 16;
    /// Has been written to.
    pub const WROTE: u32 = 1 << 17;
    /// A listener that waits for descriptors to come free.
    pub const HELD_OFF: u32 = 1 << 18;
}

/// One socket. Sixty-odd bytes, whatever it is doing; a queue or a held pipe hangs off `extra` only while it exists.
struct Slot {
    fd: Option<OwnedFd>,
    generation: u32,
    flags: u32,
    /// Idle limit in ticks, 0 for none.
    idle: u32,
    tag: u64,
    /// Low bits of the tick at which bytes last moved.
    active: u32,
    /// Next free slot while unused.
    next_free: u32,
    timer: Timer,
    pair: Token,
    extra: Option<Box<Extra>>,
}

#[derive(Default)]
struct Extra {
    queue: Vec<u8>,
    /// Bytes of `queue` that are sent.
    sent: usize,
    /// A pipe with bytes on their way to the splice target.
    pipe: Option<Pipe>,
    piped: usize,
}

struct Pipe {
    read: OwnedFd,
    write: OwnedFd,
    size: usize,
}

#[derive(Clone, Copy)]
enum Due {
    User(u64),
    Conn(Token),
}

const NIL: u32 = u32::MAX;
const WAKER: u64 = u64::MAX;
/// Reads (or splices) of one connection before the others get their turn.
const READS_PER_TURN: usize = 8;
const ACCEPTS_PER_TURN: usize = 256;
const EVENTS: usize = 1024;
const PIPE_BYTES: usize = 1 << 20;
const QUEUES_POOLED: usize = 64;
const OUT_OF_DESCRIPTORS: Duration = Duration::from_millis(50);

/// The sockets and timers of a shard: what a service acts on.
pub struct Io {
    epoll: OwnedFd,
    slots: Vec<Slot>,
    free: u32,
    live: usize,
    connections: usize,
    limits: Limits,
    wheel: Wheel<Due>,
    start: Instant,
    tick: u64,
    /// Sockets that may have more to do without a new event.
    listed: Vec<Token>,
    /// Accepts of one turn, doubled while each turn finds more, and the last turn that accepted.
    batch: usize,
    batch_turn: u64,
    pipes: Vec<Pipe>,
    pipes_made: usize,
    queues: Vec<Vec<u8>>,
    counters: Counters,
    draining: Option<u64>,
    stopped: bool,
}

impl Io {
    fn new(limits: Limits) -> io::Result<Io> {
        Ok(Io {
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?,
            slots: Vec::new(),
            free: NIL,
            live: 0,
            connections: 0,
            limits,
            wheel: Wheel::new(),
            start: Instant::now(),
            tick: 0,
            listed: Vec::new(),
            batch: 1,
            batch_turn: 0,
            pipes: Vec::new(),
            pipes_made: 0,
            queues: Vec::new(),
            counters: Counters::default(),
            draining: None,
            stopped: false,
        })
    }

    /// Ticks since the shard started.
    pub fn now(&self) -> u64 {
        self.tick
    }

    /// Sockets of any kind now open in the shard.
    pub fn sockets(&self) -> usize {
        self.live
    }

    /// TCP connections now open in the shard, incoming and outgoing.
    pub fn connections(&self) -> usize {
        self.connections
    }

    pub fn counters(&self) -> Counters {
        self.counters
    }

    pub fn limits(&self) -> Limits {
        self.limits
    }

    pub fn is_draining(&self) -> bool {
        self.draining.is_some()
    }

    /// Whether the token names an open socket.
    pub fn is_open(&self, token: Token) -> bool {
        self.slot(token).is_some()
    }

    fn slot(&self, token: Token) -> Option<&Slot> {
        self.slots.get(token.index as usize).filter(|slot| slot.generation == token.generation && slot.fd.is_some())
    }

    fn slot_mut(&mut self, token: Token) -> Option<&mut Slot> {
        self.slots.get_mut(token.index as usize).filter(|slot| slot.generation == token.generation && slot.fd.is_some())
    }

    fn conn(&self, token: Token) -> Conn {
        Conn { token, tag: self.slots[token.index as usize].tag }
    }

    fn register(&mut self, fd: OwnedFd, tag: u64, flags: u32) -> io::Result<Token> {
        if self.live >= self.limits.sockets {
            return Err(io::Error::other("the shard holds its limit of sockets"));
        }
        let index = if self.free != NIL { self.free } else { self.slots.len() as u32 };
        let generation = self.slots.get(index as usize).map_or(0, |slot| slot.generation);
        let token = Token { index, generation };
        epoll::add(&self.epoll, &fd, EventData::new_u64(pack(token)), events(flags))?;
        let slot = Slot {
            fd: Some(fd),
            generation,
            flags,
            idle: 0,
            tag,
            active: self.tick as u32,
            next_free: NIL,
            timer: Timer::NONE,
            pair: Token::NONE,
            extra: None,
        };
        if self.free != NIL {
            self.free = std::mem::replace(&mut self.slots[index as usize], slot).next_free;
        } else {
            self.slots.push(slot);
        }
        self.live += 1;
        self.connections += usize::from(flags & flag::TCP != 0);
        Ok(token)
    }

    /// Closes the descriptor and frees the slot. Closing takes it out of epoll as well: no descriptor is ever duplicated.
    fn remove(&mut self, token: Token) -> Option<Conn> {
        let slot = self.slot_mut(token)?;
        slot.fd = None;
        Some(self.free_slot(token))
    }

    /// Frees a slot whose descriptor is gone.
    fn free_slot(&mut self, token: Token) -> Conn {
        let free = self.free;
        let slot = &mut self.slots[token.index as usize];
        let tag = slot.tag;
        let flags = slot.flags;
        slot.generation = slot.generation.wrapping_add(1);
        slot.flags = 0;
        let extra = slot.extra.take();
        let timer = std::mem::replace(&mut slot.timer, Timer::NONE);
        slot.next_free = free;
        self.free = token.index;
        self.live -= 1;
        self.connections -= usize::from(flags & flag::TCP != 0);
        if timer != Timer::NONE {
            self.wheel.cancel(timer);
        }
        if let Some(extra) = extra {
            self.recycle(*extra);
        }
        Conn { token, tag }
    }

    fn recycle(&mut self, mut extra: Extra) {
        if let Some(pipe) = extra.pipe.take() {
            self.return_pipe(pipe, extra.piped == 0);
        }
        self.return_queue(extra.queue);
    }

    fn return_queue(&mut self, mut queue: Vec<u8>) {
        if queue.capacity() > 0 && queue.capacity() <= 4 * self.limits.scratch && self.queues.len() < QUEUES_POOLED {
            queue.clear();
            self.queues.push(queue);
        }
    }

    // --- sockets -----------------------------------------------------------------------------------------------

    /// Accepts from `listener` in this shard. Give every shard its own of a `socket::listen_group`.
    pub fn listen(&mut self, listener: TcpListener, tag: u64) -> io::Result<Token> {
        listener.set_nonblocking(true)?;
        self.register(listener.into(), tag, flag::LISTENER)
    }

    /// Serves a UDP socket in this shard.
    pub fn udp(&mut self, socket: UdpSocket, tag: u64) -> io::Result<Token> {
        socket.set_nonblocking(true)?;
        self.register(socket.into(), tag, flag::UDP)
    }

    /// Starts an outgoing connection: `connected` or `closed` follows within `timeout`, never from inside this call.
    /// What is written meanwhile is queued.
    pub fn connect(
        &mut self,
        to: SocketAddr,
        source: Option<IpAddr>,
        timeout: Duration,
        tag: u64,
    ) -> io::Result<Token> {
        if self.live >= self.limits.sockets {
            return Err(io::Error::other("the shard holds its limit of sockets"));
        }
        let (fd, done) = socket::connect(to, source)?;
        let up = if done { flag::WRITABLE } else { flag::OUT };
        let token = self.register(fd, tag, flag::TCP | flag::CONNECTING | up)?;
        let timer = self.wheel.arm(self.tick + ticks(timeout), Due::Conn(token));
        self.slots[token.index as usize].timer = timer;
        if done {
            self.list(token);
        }
        Ok(token)
    }

    /// Adopts a connected non-blocking stream socket that was made elsewhere.
    pub fn adopt(&mut self, fd: OwnedFd, tag: u64) -> io::Result<Token> {
        self.register(fd, tag, flag::TCP | flag::WRITABLE)
    }

    /// Takes a connection out of the shard, for another to [`adopt`](Io::adopt). `None`, and nothing changes, while bytes
    /// are queued on it or it is ending. What has arrived and was not read stays in the socket.
    pub fn detach(&mut self, token: Token) -> Option<OwnedFd> {
        let ending = flag::CONNECTING | flag::CLOSING | flag::FAILED | flag::EOF | flag::SHUT_WHEN_SENT;
        let slot = self.slot(token)?;
        if slot.flags & flag::TCP == 0 || slot.flags & ending != 0 || slot.extra.is_some() {
            return None;
        }
        // Whoever adopts it does not know what was written here.
        if slot.flags & flag::NODELAY == 0 {
            let _ = sockopt::set_tcp_nodelay(lower(slot), true);
        }
        epoll::delete(&self.epoll, lower(slot)).ok()?;
        let fd = self.slot_mut(token)?.fd.take()?;
        self.free_slot(token);
        Some(fd)
    }

    /// The socket's own address.
    pub fn local_addr(&self, token: Token) -> Option<SocketAddr> {
        let fd = self.slot(token)?.fd.as_ref()?;
        Some(socket::internet(net::getsockname(fd).ok()))
    }

    /// The address of the other end.
    pub fn peer_addr(&self, token: Token) -> Option<SocketAddr> {
        let fd = self.slot(token)?.fd.as_ref()?;
        net::getpeername(fd).ok().flatten().map(|addr| socket::internet(Some(addr)))
    }

    pub fn tag(&self, token: Token) -> Option<u64> {
        self.slot(token).map(|slot| slot.tag)
    }

    pub fn set_tag(&mut self, token: Token, tag: u64) {
        if let Some(slot) = self.slot_mut(token) {
            slot.tag = tag;
        }
    }

    /// Declares two connections the halves of one flow: activity of either keeps both from being idle, and they may be spliced.
    pub fn pair(&mut self, a: Token, b: Token) {
        if self.slot(a).is_some() && self.slot(b).is_some() {
            self.slots[a.index as usize].pair = b;
            self.slots[b.index as usize].pair = a;
        }
    }

    /// The other half of the flow, `Token::NONE` if there is none.
    pub fn paired(&self, token: Token) -> Token {
        self.slot(token).map_or(Token::NONE, |slot| slot.pair)
    }

    // --- writing -----------------------------------------------------------------------------------------------

    /// Sends at once what the kernel takes and queues the rest; all of `bytes` or none is taken.
    pub fn write(&mut self, token: Token, bytes: &[u8]) -> Written {
        self.write_parts(token, bytes, &[])
    }

    /// Like [`write`](Io::write) for a header and the body behind it, in one system call and without joining them first.
    pub fn write_parts(&mut self, token: Token, head: &[u8], body: &[u8]) -> Written {
        let limit = self.limits.queue;
        let tick = self.tick as u32;
        let Some(slot) = self.slot_mut(token) else { return Written::Gone };
        if slot.flags & (flag::WRITE_SHUT | flag::SHUT_WHEN_SENT | flag::CLOSING | flag::FAILED) != 0 {
            return Written::Gone;
        }
        slot.active = tick;
        let waiting = slot.extra.as_ref().map_or(0, |extra| extra.queue.len() - extra.sent);
        let total = head.len() + body.len();
        let (mut head, mut rest) = (head, body);
        let mut full = false;
        if waiting == 0 && slot.flags & flag::CONNECTING == 0 {
            let fd = slot.fd.as_ref().expect("live slot");
            // The first write waits for no acknowledgement anyway; only from the second on does the option matter.
            if slot.flags & (flag::WROTE | flag::NODELAY) == flag::WROTE {
                let _ = sockopt::set_tcp_nodelay(fd, true);
                slot.flags |= flag::NODELAY;
            }
            slot.flags |= flag::WROTE;
            while !head.is_empty() || !rest.is_empty() {
                let sent = match (head, rest) {
                    (one, []) | ([], one) => net::send(fd, one, SendFlags::NOSIGNAL),
                    (head, rest) => {
                        let parts = [io::IoSlice::new(head), io::IoSlice::new(rest)];
                        net::sendmsg(fd, &parts, &mut net::SendAncillaryBuffer::default(), SendFlags::NOSIGNAL)
                    }
                };
                match sent {
                    Ok(count) => {
                        let of_head = count.min(head.len());
                        head = &head[of_head..];
                        rest = &rest[count - of_head..];
                    }
                    Err(Errno::AGAIN) => {
                        full = true;
                        break;
                    }
                    Err(Errno::INTR) => {}
                    Err(_) => {
                        slot.flags |= flag::FAILED;
                        self.list(token);
                        return Written::Gone;
                    }
                }
            }
            if head.is_empty() && rest.is_empty() {
                return Written::Sent;
            }
        } else if waiting + total > limit {
            return Written::Full;
        }
        if full {
            self.blocked(token);
        }
        let slot = &self.slots[token.index as usize];
        if slot.extra.as_ref().is_none_or(|extra| extra.queue.capacity() == 0) {
            let queue = self.queues.pop().unwrap_or_default();
            self.slots[token.index as usize].extra.get_or_insert_default().queue = queue;
        }
        let extra = self.slots[token.index as usize].extra.as_mut().expect("made above");
        if extra.sent > 0 && extra.sent >= extra.queue.len() / 2 {
            extra.queue.drain(..extra.sent);
            extra.sent = 0;
        }
        extra.queue.extend_from_slice(head);
        extra.queue.extend_from_slice(rest);
        Written::Queued(extra.queue.len() - extra.sent)
    }

    /// Bytes taken by `write` that the kernel has not taken yet.
    pub fn queued(&self, token: Token) -> usize {
        self.slot(token).and_then(|slot| slot.extra.as_ref()).map_or(0, |extra| extra.queue.len() - extra.sent)
    }

    /// Ends our direction once everything queued is sent (FIN). Reading goes on.
    pub fn shutdown_write(&mut self, token: Token) {
        let Some(slot) = self.slot_mut(token) else { return };
        if slot.flags & flag::WRITE_SHUT == 0 {
            slot.flags |= flag::SHUT_WHEN_SENT;
            self.list(token);
        }
    }

    /// Closes when everything queued is sent, within the linger time, discarding what still arrives. No `closed` follows.
    pub fn close(&mut self, token: Token) {
        let deadline = self.tick + ticks(self.limits.linger);
        let Some(slot) = self.slot_mut(token) else { return };
        let idle = slot.extra.as_ref().is_none_or(|extra| extra.queue.len() == extra.sent);
        if slot.flags & flag::TCP == 0
            || slot.flags & flag::FAILED != 0
            || (idle && slot.flags & (flag::EOF | flag::CONNECTING) != 0)
        {
            self.remove(token);
            return;
        }
        slot.flags |= flag::CLOSING | flag::SHUT_WHEN_SENT;
        slot.flags &= !(flag::PAUSED | flag::SPLICE);
        slot.idle = 0;
        let old = std::mem::replace(&mut slot.timer, Timer::NONE);
        self.wheel.cancel(old);
        let timer = self.wheel.arm(deadline, Due::Conn(token));
        self.slots[token.index as usize].timer = timer;
        self.list(token);
    }

    /// Closes at once with a reset; what was queued is lost. No `closed` follows.
    pub fn abort(&mut self, token: Token) {
        if let Some(slot) = self.slot(token) {
            if slot.flags & flag::TCP != 0 {
                let _ = sockopt::set_socket_linger(slot.fd.as_ref().expect("live slot"), Some(Duration::ZERO));
            }
            self.remove(token);
        }
    }

    /// Stops reading from the connection (back-pressure reaches the peer by the TCP window).
    pub fn pause(&mut self, token: Token) {
        if let Some(slot) = self.slot_mut(token) {
            slot.flags |= flag::PAUSED;
        }
    }

    pub fn resume(&mut self, token: Token) {
        let Some(slot) = self.slot_mut(token) else { return };
        if slot.flags & flag::PAUSED != 0 {
            slot.flags &= !flag::PAUSED;
            self.list(token);
        }
    }

    /// Sends a datagram; `to = None` for a connected socket. A datagram that the kernel will not take now is dropped and counted.
    pub fn send(&mut self, socket: Token, to: Option<SocketAddr>, bytes: &[u8]) -> bool {
        let tick = self.tick as u32;
        let Some(slot) = self.slot_mut(socket) else { return false };
        slot.active = tick;
        let fd = slot.fd.as_ref().expect("live slot");
        let mut sent = match to {
            Some(to) => net::sendto(fd, bytes, SendFlags::NOSIGNAL, &to),
            None => net::send(fd, bytes, SendFlags::NOSIGNAL),
        };
        if to.is_none() && sent == Err(Errno::CONNREFUSED) {
            // The error of an earlier datagram, which this call cleared.
            sent = net::send(fd, bytes, SendFlags::NOSIGNAL);
        }
        self.counters.datagrams_dropped += u64::from(sent.is_err());
        sent.is_ok()
    }

    // --- time --------------------------------------------------------------------------------------------------

    /// Calls `Service::timer` with `payload` after `delay`, rounded up to a tick.
    pub fn arm(&mut self, delay: Duration, payload: u64) -> Timer {
        self.wheel.arm(self.tick + ticks(delay), Due::User(payload))
    }

    /// Disarms a timer of `arm`; a stale handle does nothing.
    pub fn cancel(&mut self, timer: Timer) {
        self.wheel.cancel(timer);
    }

    /// Closes the connection with `Closed::Idle` when no byte moved on it (or on its pair) for `limit`. Costs nothing
    /// while bytes move: the deadline is looked at when it falls due and put off by what moved since.
    pub fn set_idle(&mut self, token: Token, limit: Option<Duration>) {
        let tick = self.tick;
        let Some(slot) = self.slot_mut(token) else { return };
        if slot.flags & (flag::CLOSING | flag::CONNECTING) != 0 {
            slot.idle = limit.map_or(0, |limit| ticks(limit) as u32);
            return;
        }
        slot.active = tick as u32;
        slot.idle = limit.map_or(0, |limit| ticks(limit).min(u32::MAX as u64 / 2) as u32);
        let (idle, old) = (slot.idle, std::mem::replace(&mut slot.timer, Timer::NONE));
        self.wheel.cancel(old);
        if idle > 0 {
            let timer = self.wheel.arm(tick + u64::from(idle), Due::Conn(token));
            self.slots[token.index as usize].timer = timer;
        }
    }

    /// Time since bytes last moved on the connection.
    pub fn quiet(&self, token: Token) -> Duration {
        self.slot(token).map_or(Duration::ZERO, |slot| TICK * (self.tick as u32).wrapping_sub(slot.active))
    }

    /// Counts as activity for the idle limit.
    pub fn touch(&mut self, token: Token) {
        let tick = self.tick as u32;
        if let Some(slot) = self.slot_mut(token) {
            slot.active = tick;
        }
    }

    // --- splice ------------------------------------------------------------------------------------------------

    /// From now on moves the bytes of `from` to its pair inside the kernel. `spliced` reports them in place of `data`;
    /// `eof`, idle limits and back-pressure work as before. A pipe is borrowed from the shard's pool only while bytes are
    /// in flight. Refused (`false`) while `from` has no pair or bytes are queued on the pair.
    pub fn splice(&mut self, from: Token) -> bool {
        let Some(pair) = self.slot(from).map(|slot| slot.pair) else { return false };
        let Some(target) = self.slot(pair) else { return false };
        if target.flags & (flag::WRITE_SHUT | flag::SHUT_WHEN_SENT | flag::CONNECTING) != 0 || self.queued(pair) > 0 {
            return false;
        }
        // What is spliced does not pass through `write`, which would see to it.
        if target.flags & flag::NODELAY == 0 {
            let _ = sockopt::set_tcp_nodelay(lower(target), true);
            self.slots[pair.index as usize].flags |= flag::NODELAY;
        }
        self.slots[from.index as usize].flags |= flag::SPLICE;
        true
    }

    /// Whether the bytes of `from` are moved inside the kernel.
    pub fn is_spliced(&self, from: Token) -> bool {
        self.slot(from).is_some_and(|slot| slot.flags & flag::SPLICE != 0)
    }

    /// Pipes now existing in the shard, pooled and in use.
    pub fn pipes(&self) -> usize {
        self.pipes_made
    }

    fn take_pipe(&mut self) -> Option<Pipe> {
        if let Some(pipe) = self.pipes.pop() {
            return Some(pipe);
        }
        if self.pipes_made >= self.limits.pipes {
            return None;
        }
        let (read, write) = rustix::pipe::pipe_with(PipeFlags::NONBLOCK | PipeFlags::CLOEXEC).ok()?;
        // Unprivileged users have a quota of pipe pages; past it the default size serves.
        let size = rustix::pipe::fcntl_setpipe_size(&write, PIPE_BYTES)
            .or_else(|_| rustix::pipe::fcntl_getpipe_size(&write))
            .unwrap_or(64 << 10);
        self.pipes_made += 1;
        Some(Pipe { read, write, size })
    }

    fn return_pipe(&mut self, pipe: Pipe, empty: bool) {
        if empty {
            self.pipes.push(pipe);
        } else {
            self.pipes_made -= 1;
        }
    }

    // --- life --------------------------------------------------------------------------------------------------

    /// Stops accepting on one listener, once the connections that wait in its queue are accepted. A UDP socket is closed.
    pub fn unlisten(&mut self, listener: Token) {
        let Some(slot) = self.slot_mut(listener) else { return };
        if slot.flags & flag::LISTENER != 0 {
            slot.flags |= flag::CLOSING;
            self.list(listener);
        } else if slot.flags & flag::UDP != 0 {
            self.remove(listener);
        }
    }

    /// Ends the shard after this turn; every connection is reported `Closed::Stopped`.
    pub fn stop(&mut self) {
        self.stopped = true;
    }

    /// The kernel takes no more for now: its next room is an event.
    fn blocked(&mut self, token: Token) {
        let slot = &mut self.slots[token.index as usize];
        slot.flags &= !flag::WRITABLE;
        if slot.flags & flag::OUT == 0 {
            slot.flags |= flag::OUT;
            self.reregister(token);
        }
    }

    /// Tells epoll what the flags ask for now; room or clients that came meanwhile are reported as well. It fails only for
    /// want of kernel memory, and then the idle limit ends the connection.
    fn reregister(&self, token: Token) {
        let slot = &self.slots[token.index as usize];
        let _ = epoll::modify(&self.epoll, lower(slot), EventData::new_u64(pack(token)), events(slot.flags));
    }

    fn list(&mut self, token: Token) {
        let slot = &mut self.slots[token.index as usize];
        if slot.flags & flag::LISTED == 0 {
            slot.flags |= flag::LISTED;
            self.listed.push(token);
        }
    }
}

/// What a socket is registered for. Writability is asked for only once the kernel has refused bytes: every socket is
/// writable at first, and each would wake its shard to say so. Listeners are level-triggered, so that none has to be asked
/// again after its last client just to hear that it was the last.
fn events(flags: u32) -> EventFlags {
    if flags & flag::HELD_OFF != 0 {
        EventFlags::empty()
    } else if flags & flag::LISTENER != 0 {
        EventFlags::IN
    } else if flags & flag::UDP != 0 {
        EventFlags::IN | EventFlags::ET
    } else if flags & flag::OUT != 0 {
        EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET
    } else {
        EventFlags::IN | EventFlags::RDHUP | EventFlags::ET
    }
}

fn pack(token: Token) -> u64 {
    u64::from(token.generation) << 32 | u64::from(token.index)
}

fn unpack(data: u64) -> Token {
    Token { index: data as u32, generation: (data >> 32) as u32 }
}

/// A duration in ticks, rounded up.
fn ticks(duration: Duration) -> u64 {
    duration.as_millis().div_ceil(TICK.as_millis()) as u64
}

fn lower(slot: &Slot) -> BorrowedFd<'_> {
    slot.fd.as_ref().expect("live slot").as_fd()
}

/// What a turn of the loop waits on besides sockets: commands of other threads.
pub(crate) trait Inbox<C> {
    fn wake_fd(&self) -> BorrowedFd<'_>;
    /// Clears the wake-up and takes what was sent.
    fn take(&self, into: &mut Vec<Order<C>>);
}

/// What other threads ask of a shard.
pub(crate) enum Order<C> {
    Command(C),
    /// Stop accepting; stop when idle or after this long.
    Drain(Duration),
    Stop,
}

/// A service and its sockets, run by one thread.
pub(crate) struct Shard<S: Service> {
    io: Io,
    service: S,
    scratch: Vec<u8>,
}

impl<S: Service> Shard<S> {
    pub(crate) fn new(service: S, limits: Limits) -> io::Result<Self> {
        Ok(Shard { io: Io::new(limits)?, service, scratch: vec![0; limits.scratch.max(4096)] })
    }

    /// Runs until stopped.
    pub(crate) fn run(mut self, inbox: &impl Inbox<S::Command>) -> io::Result<()> {
        epoll::add(&self.io.epoll, inbox.wake_fd(), EventData::new_u64(WAKER), EventFlags::IN)?;
        let mut events = Vec::with_capacity(EVENTS);
        let mut orders = Vec::new();
        let mut due = Vec::new();
        self.service.start(&mut self.io);
        while !self.io.stopped {
            self.wait(&mut events)?;
            self.io.counters.turns += 1;
            self.io.tick = (self.io.start.elapsed().as_millis() / TICK.as_millis()) as u64;
            for event in events.drain(..) {
                let event: epoll::Event = event;
                let (data, flags) = (event.data.u64(), event.flags);
                if data == WAKER {
                    inbox.take(&mut orders);
                } else {
                    self.event(unpack(data), flags);
                }
            }
            for order in orders.drain(..) {
                match order {
                    Order::Command(command) => self.service.command(&mut self.io, command),
                    Order::Drain(within) => self.drain(within),
                    Order::Stop => self.io.stopped = true,
                }
            }
            let listed = std::mem::take(&mut self.io.listed);
            for &token in &listed {
                if let Some(slot) = self.io.slot_mut(token) {
                    slot.flags &= !flag::LISTED;
                    self.work(token);
                }
            }
            if self.io.listed.is_empty() {
                // Keep the allocation: in the steady state the list costs nothing.
                let mut listed = listed;
                listed.clear();
                self.io.listed = listed;
            }
            let tick = self.io.tick;
            self.io.wheel.advance(tick, &mut due);
            for what in due.drain(..) {
                self.io.counters.timers += 1;
                match what {
                    Due::User(payload) => self.service.timer(&mut self.io, payload),
                    Due::Conn(token) => self.deadline(token),
                }
            }
            if let Some(deadline) = self.io.draining {
                self.io.stopped |= self.io.connections == 0 || self.io.tick >= deadline;
            }
        }
        for index in 0..self.io.slots.len() as u32 {
            let token = Token { index, generation: self.io.slots[index as usize].generation };
            if self.io.slot(token).is_some_and(|slot| slot.flags & flag::TCP != 0) {
                self.end(token, Closed::Stopped);
            }
        }
        Ok(())
    }

    fn wait(&mut self, events: &mut Vec<epoll::Event>) -> io::Result<()> {
        let until = if !self.io.listed.is_empty() {
            Some(Duration::ZERO)
        } else {
            let next = self.io.wheel.next_tick().into_iter().chain(self.io.draining).min();
            next.map(|tick| (TICK * u32::try_from(tick).unwrap_or(u32::MAX)).saturating_sub(self.io.start.elapsed()))
        };
        // Rounded up to a millisecond, so that a deadline is never polled for.
        let timeout = until.map(|until| rustix::event::Timespec {
            tv_sec: until.as_secs().min(3600) as i64,
            tv_nsec: i64::from(until.subsec_nanos().div_ceil(1_000_000).min(999) * 1_000_000),
        });
        match epoll::wait(&self.io.epoll, spare_capacity(events), timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn event(&mut self, token: Token, events: EventFlags) {
        let Some(slot) = self.io.slot_mut(token) else { return };
        if events.intersects(EventFlags::IN | EventFlags::RDHUP | EventFlags::HUP | EventFlags::ERR) {
            slot.flags |= flag::READABLE;
        }
        if events.intersects(EventFlags::RDHUP | EventFlags::HUP) {
            slot.flags |= flag::PEER_DONE;
        }
        if events.contains(EventFlags::OUT) {
            slot.flags |= flag::WRITABLE;
        }
        if events.contains(EventFlags::ERR) && slot.flags & flag::TCP != 0 {
            slot.flags |= flag::FAILED;
        }
        self.work(token);
    }

    /// Does everything the socket's state allows now.
    fn work(&mut self, token: Token) {
        let Some(slot) = self.io.slot_mut(token) else { return };
        if slot.flags & flag::LISTENER != 0 {
            if slot.flags & flag::CLOSING == 0 {
                let turn = self.io.counters.turns;
                let burst = turn - self.io.batch_turn <= 1;
                self.io.batch = if burst { (self.io.batch * 2).min(ACCEPTS_PER_TURN) } else { 1 };
                self.io.batch_turn = turn;
                return self.accept(token, self.io.batch);
            }
            self.accept(token, usize::try_from(socket::somaxconn()).unwrap_or(4096));
            self.io.remove(token);
            return;
        }
        if slot.flags & flag::UDP != 0 {
            return self.receive(token);
        }
        if slot.flags & flag::CONNECTING != 0 && !self.finish_connect(token) {
            return;
        }
        let Some(slot) = self.io.slot_mut(token) else { return };
        if slot.flags & flag::FAILED != 0 {
            return self.end(token, Closed::Reset);
        }
        self.flush(token);
        self.feed(token);
        self.read(token);
        self.settle(token);
    }

    fn accept(&mut self, listener: Token, most: usize) {
        for _ in 0..most {
            let Some(slot) = self.io.slot(listener) else { return };
            let accepted = net::acceptfrom_with(lower(slot), SocketFlags::NONBLOCK | SocketFlags::CLOEXEC);
            let (fd, peer) = match accepted {
                Ok((fd, peer)) => (fd, socket::internet(peer)),
                Err(Errno::AGAIN) => return,
                // No descriptor left: look again in a while, instead of being told of these clients at every turn.
                Err(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM) => {
                    self.io.counters.refused += 1;
                    self.io.slots[listener.index as usize].flags |= flag::HELD_OFF;
                    self.io.reregister(listener);
                    self.io.wheel.arm(self.io.tick + ticks(OUT_OF_DESCRIPTORS), Due::Conn(listener));
                    return;
                }
                // The client is gone already.
                Err(_) => continue,
            };
            let conn = self.io.conn(listener);
            let room = self.io.live < self.io.limits.sockets;
            let admitted = if room { self.service.admit(&mut self.io, conn, peer) } else { None };
            let Some(tag) = admitted else {
                self.io.counters.refused += 1;
                let _ = sockopt::set_socket_linger(&fd, Some(Duration::ZERO));
                continue;
            };
            match self.io.register(fd, tag, flag::TCP | flag::WRITABLE | flag::NODELAY) {
                Ok(token) => {
                    self.io.counters.accepted += 1;
                    self.service.accepted(&mut self.io, Conn { token, tag }, peer);
                }
                // Admitted, so the service has to hear that it is gone.
                Err(_) => self.service.closed(&mut self.io, Conn { token: Token::NONE, tag }, Closed::Reset),
            }
        }
    }

    fn receive(&mut self, token: Token) {
        let tick = self.io.tick as u32;
        for _ in 0..READS_PER_TURN * 8 {
            let Some(slot) = self.io.slot_mut(token) else { return };
            if slot.flags & flag::READABLE == 0 {
                return;
            }
            match net::recvfrom(slot.fd.as_ref().expect("live slot"), self.scratch.as_mut_slice(), RecvFlags::empty()) {
                Ok((count, _, from)) => {
                    slot.active = tick;
                    let conn = self.io.conn(token);
                    self.service.datagram(&mut self.io, conn, socket::internet(from), &mut self.scratch[..count]);
                }
                Err(Errno::AGAIN) => {
                    slot.flags &= !flag::READABLE;
                    return;
                }
                Err(Errno::INTR) => {}
                Err(error) => {
                    let conn = self.io.conn(token);
                    self.service.datagram_error(&mut self.io, conn, io::Error::from(error).kind());
                }
            }
        }
        if self.io.slot(token).is_some() {
            self.io.list(token);
        }
    }

    /// Whether the connection is up now.
    fn finish_connect(&mut self, token: Token) -> bool {
        let Some(slot) = self.io.slot_mut(token) else { return false };
        if slot.flags & (flag::WRITABLE | flag::FAILED | flag::PEER_DONE) == 0 {
            return false;
        }
        if slot.flags & (flag::FAILED | flag::PEER_DONE) != 0 {
            match sockopt::socket_error(slot.fd.as_ref().expect("live slot")) {
                Ok(Ok(())) => {}
                Ok(Err(error)) | Err(error) => {
                    self.end(token, Closed::ConnectFailed(io::Error::from(error).kind()));
                    return false;
                }
            }
        }
        slot.flags &= !(flag::CONNECTING | flag::FAILED);
        let closing = slot.flags & flag::CLOSING != 0;
        let limit = (slot.idle > 0).then(|| TICK * slot.idle);
        if !closing {
            let timer = std::mem::replace(&mut slot.timer, Timer::NONE);
            self.io.wheel.cancel(timer);
            self.io.set_idle(token, limit);
            let conn = self.io.conn(token);
            self.service.connected(&mut self.io, conn);
        }
        self.io.slot(token).is_some()
    }

    /// Sends what is queued.
    fn flush(&mut self, token: Token) {
        let tick = self.io.tick as u32;
        let Some(slot) = self.io.slot_mut(token) else { return };
        if slot.flags & flag::WRITABLE == 0 {
            return;
        }
        if let Some(extra) = slot.extra.as_mut().filter(|extra| !extra.queue.is_empty()) {
            if slot.flags & (flag::WROTE | flag::NODELAY) == flag::WROTE {
                let _ = sockopt::set_tcp_nodelay(slot.fd.as_ref().expect("live slot"), true);
                slot.flags |= flag::NODELAY;
            }
            slot.flags |= flag::WROTE;
            while extra.sent < extra.queue.len() {
                match net::send(slot.fd.as_ref().expect("live slot"), &extra.queue[extra.sent..], SendFlags::NOSIGNAL) {
                    Ok(count) => {
                        extra.sent += count;
                        slot.active = tick;
                    }
                    Err(Errno::AGAIN) => return self.io.blocked(token),
                    Err(Errno::INTR) => {}
                    Err(_) => return self.end(token, Closed::Reset),
                }
            }
            let queue = std::mem::take(&mut extra.queue);
            extra.sent = 0;
            if extra.pipe.is_none() {
                slot.extra = None;
            }
            let shut = slot.flags & (flag::SHUT_WHEN_SENT | flag::CLOSING) != 0;
            self.io.return_queue(queue);
            if !shut {
                let conn = self.io.conn(token);
                self.service.drained(&mut self.io, conn);
            }
        }
        let Some(slot) = self.io.slot_mut(token) else { return };
        if slot.flags & (flag::SHUT_WHEN_SENT | flag::WRITE_SHUT) == flag::SHUT_WHEN_SENT
            && slot.extra.as_ref().is_none_or(|extra| extra.queue.is_empty())
        {
            slot.flags = (slot.flags | flag::WRITE_SHUT) & !flag::SHUT_WHEN_SENT;
            // With the other direction over as well, the close that follows says the same for one call less.
            if slot.flags & flag::EOF == 0 {
                let _ = net::shutdown(slot.fd.as_ref().expect("live slot"), Shutdown::Write);
            }
        }
    }

    /// Lets a splice that waited for this socket to take bytes go on.
    fn feed(&mut self, token: Token) {
        let Some(slot) = self.io.slot(token) else { return };
        let source = slot.pair;
        if slot.flags & flag::WRITABLE != 0 && self.io.slot(source).is_some_and(|slot| slot.flags & flag::SPLICE != 0) {
            self.read(source);
            self.settle(source);
        }
    }

    fn read(&mut self, token: Token) {
        let tick = self.io.tick as u32;
        for _ in 0..READS_PER_TURN {
            let Some(slot) = self.io.slot_mut(token) else { return };
            if slot.flags & flag::SPLICE != 0 {
                match self.splice(token) {
                    Moved::More => continue,
                    Moved::Wait => return,
                    Moved::NoPipe => {}
                }
            }
            let Some(slot) = self.io.slot_mut(token) else { return };
            if slot.flags & (flag::READABLE | flag::PAUSED | flag::EOF) != flag::READABLE {
                return;
            }
            match net::recv(slot.fd.as_ref().expect("live slot"), self.scratch.as_mut_slice(), RecvFlags::empty()) {
                Ok((0, _)) => return self.ended(token),
                Ok((count, _)) => {
                    // A short read has emptied the socket: what comes later brings a new edge. A FIN that has come
                    // already brings none, so then the zero has to be read.
                    if count < self.scratch.len() && slot.flags & flag::PEER_DONE == 0 {
                        slot.flags &= !flag::READABLE;
                    }
                    slot.active = tick;
                    if slot.flags & flag::CLOSING == 0 {
                        let conn = self.io.conn(token);
                        self.service.data(&mut self.io, conn, &mut self.scratch[..count]);
                    }
                }
                Err(Errno::AGAIN) => {
                    slot.flags &= !flag::READABLE;
                    return;
                }
                Err(Errno::INTR) => {}
                Err(_) => return self.end(token, Closed::Reset),
            }
        }
        if self
            .io
            .slot(token)
            .is_some_and(|slot| slot.flags & (flag::READABLE | flag::PAUSED | flag::EOF) == flag::READABLE)
        {
            self.io.list(token);
        }
    }

    fn ended(&mut self, token: Token) {
        let Some(slot) = self.io.slot_mut(token) else { return };
        slot.flags = (slot.flags | flag::EOF) & !flag::READABLE;
        if slot.flags & flag::CLOSING == 0 {
            let conn = self.io.conn(token);
            self.service.eof(&mut self.io, conn);
        }
    }

    /// One round of socket → pipe → socket.
    fn splice(&mut self, token: Token) -> Moved {
        let io = &mut self.io;
        let target = io.slots[token.index as usize].pair;
        // Bytes that were copied go first.
        if io.slot(target).is_none() || io.queued(target) > 0 {
            return Moved::Wait;
        }
        let slot = &mut io.slots[token.index as usize];
        let held = slot.extra.as_mut().and_then(|extra| Some((extra.pipe.take()?, std::mem::take(&mut extra.piped))));
        let may_read = slot.flags & (flag::READABLE | flag::PAUSED | flag::EOF) == flag::READABLE;
        let (pipe, mut piped) = match held {
            Some(held) => held,
            None if !may_read => return Moved::Wait,
            None => match io.take_pipe() {
                Some(pipe) => (pipe, 0),
                None => return Moved::NoPipe,
            },
        };
        let mut end = false;
        let mut failed = false;
        const SPLICE: SpliceFlags = SpliceFlags::MOVE.union(SpliceFlags::NONBLOCK);
        if piped == 0 && may_read {
            let slot = &mut io.slots[token.index as usize];
            match rustix::pipe::splice(lower(slot), None, &pipe.write, None, pipe.size, SPLICE) {
                Ok(0) => end = true,
                Ok(count) => {
                    piped = count;
                    slot.active = io.tick as u32;
                }
                Err(Errno::AGAIN) => slot.flags &= !flag::READABLE,
                Err(Errno::INTR) => {}
                Err(_) => failed = true,
            }
        }
        let mut moved = 0;
        let mut target_failed = false;
        while piped > 0 {
            let sink = &mut io.slots[target.index as usize];
            match rustix::pipe::splice(&pipe.read, None, lower(sink), None, piped, SPLICE) {
                Ok(count) => {
                    piped -= count;
                    moved += count;
                    sink.active = io.tick as u32;
                }
                Err(Errno::AGAIN) => {
                    io.blocked(target);
                    break;
                }
                Err(Errno::INTR) => {}
                Err(_) => {
                    target_failed = true;
                    break;
                }
            }
        }
        if piped == 0 || target_failed {
            io.return_pipe(pipe, piped == 0);
            let slot = &mut io.slots[token.index as usize];
            if slot.extra.as_ref().is_some_and(|extra| extra.queue.is_empty()) {
                slot.extra = None;
            }
        } else {
            let extra = io.slots[token.index as usize].extra.get_or_insert_default();
            extra.pipe = Some(pipe);
            extra.piped = piped;
        }
        if moved > 0 {
            let conn = io.conn(token);
            self.service.spliced(&mut self.io, conn, moved);
        }
        if target_failed {
            self.end(target, Closed::Reset);
            return Moved::Wait;
        }
        if failed {
            self.end(token, Closed::Reset);
            return Moved::Wait;
        }
        if end {
            self.ended(token);
            return Moved::Wait;
        }
        let more = piped == 0 && self.io.slot(token).is_some_and(|slot| slot.flags & flag::READABLE != 0);
        if more { Moved::More } else { Moved::Wait }
    }

    /// Ends a connection of which both directions are over.
    fn settle(&mut self, token: Token) {
        let Some(slot) = self.io.slot(token) else { return };
        if slot.flags & flag::FAILED != 0 {
            return self.end(token, Closed::Reset);
        }
        if slot.flags & (flag::EOF | flag::WRITE_SHUT) == flag::EOF | flag::WRITE_SHUT {
            self.end(token, Closed::Finished);
        }
    }

    fn deadline(&mut self, token: Token) {
        let tick = self.io.tick;
        let Some(slot) = self.io.slot_mut(token) else { return };
        if slot.flags & flag::LISTENER != 0 {
            slot.flags &= !flag::HELD_OFF;
            return self.io.reregister(token);
        }
        slot.timer = Timer::NONE;
        if slot.flags & flag::CLOSING != 0 {
            let _ = sockopt::set_socket_linger(slot.fd.as_ref().expect("live slot"), Some(Duration::ZERO));
            self.io.remove(token);
            return;
        }
        if slot.flags & flag::CONNECTING != 0 {
            return self.end(token, Closed::ConnectTimeout);
        }
        let (idle, pair, own) = (slot.idle, slot.pair, (tick as u32).wrapping_sub(slot.active));
        if idle == 0 {
            return;
        }
        let other = self.io.slot(pair).map_or(u32::MAX, |slot| (tick as u32).wrapping_sub(slot.active));
        let quiet = own.min(other);
        if quiet >= idle {
            self.end(token, Closed::Idle);
        } else {
            let timer = self.io.wheel.arm(tick + u64::from(idle - quiet), Due::Conn(token));
            self.io.slots[token.index as usize].timer = timer;
        }
    }

    fn end(&mut self, token: Token, why: Closed) {
        let silent = self.io.slot(token).is_some_and(|slot| slot.flags & flag::CLOSING != 0);
        if let Some(conn) = self.io.remove(token)
            && !silent
        {
            self.service.closed(&mut self.io, conn, why);
        }
    }

    fn drain(&mut self, within: Duration) {
        if self.io.draining.is_some() {
            return;
        }
        // Clients that wait in the accept queue have a connection by their own lights: take them in first.
        for index in 0..self.io.slots.len() as u32 {
            let token = Token { index, generation: self.io.slots[index as usize].generation };
            if self.io.slot(token).is_some_and(|slot| slot.flags & flag::LISTENER != 0) {
                self.accept(token, usize::try_from(socket::somaxconn()).unwrap_or(4096));
                self.io.remove(token);
            }
        }
        self.io.draining = Some(self.io.tick + ticks(within));
        self.service.draining(&mut self.io);
    }
}

enum Moved {
    More,
    Wait,
    /// Every pipe is held by another flow: this round is copied.
    NoPipe,
}
