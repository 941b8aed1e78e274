//! The reference peer: joins a hub, opens what it is asked to, and refuses what its own policy forbids.
//!
//! It trusts the hub with nothing: a destination is resolved and judged here again, after the hub has judged it.

use crate::dest::{Dest, Host, Policy, unmapped};
use crate::link::{self, Carries, Opened, kind};
use crate::names::Names;
use crate::socks;
use clawhq_wire::ws::{self, Event, Opcode, Parser, Role, handshake};
use std::cell::RefCell;
use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream, UdpSocket};
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::JoinHandle;

/// What a peer says and how it behaves.
#[derive(Clone)]
pub struct Options {
    pub hub: SocketAddr,
    /// The Host header.
    pub host: String,
    pub path: String,
    pub device: String,
    pub version: String,
    pub token: String,
    pub consent: bool,
    pub udp: bool,
    pub max_tunnels: Option<u16>,
    pub country: Option<String>,
    /// Local address to connect from.
    pub source: Option<IpAddr>,
    pub policy: Arc<Policy>,
    /// Longest wait between attempts to connect.
    pub backoff_most: Duration,
}

impl Options {
    pub fn new(hub: SocketAddr, device: impl Into<String>) -> Self {
        Self {
            hub,
            host: hub.to_string(),
            path: "/ws".into(),
            device: device.into(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            token: String::new(),
            consent: true,
            udp: true,
            max_tunnels: None,
            country: None,
            source: None,
            policy: Arc::new(Policy::default()),
            backoff_most: Duration::from_secs(60),
        }
    }
}

/// Shared by all peers of one process.
#[derive(Clone)]
pub struct Fleet {
    pub names: Names,
    pub counts: Arc<Counts>,
}

#[derive(Default)]
pub struct Counts {
    /// Registered now.
    pub ready: AtomicUsize,
    pub registered: AtomicU64,
    pub lost: AtomicU64,
    pub cooldowns: AtomicU64,
    pub tunnels: AtomicU64,
}

impl Default for Fleet {
    fn default() -> Self {
        Self { names: Names::system(), counts: Arc::default() }
    }
}

/// Why a session ended.
enum Ended {
    /// The hub asked to come back after this.
    Later(Duration),
    Lost,
    Stopped,
}

/// Connects and serves until `stop`, coming back with growing, randomised pauses.
pub async fn run(options: Options, fleet: Fleet, mut stop: watch::Receiver<bool>) {
    let mut pause = Duration::from_millis(500);
    while !*stop.borrow() {
        let began = tokio::time::Instant::now();
        let outcome = tokio::select! {
            outcome = session(&options, &fleet) => outcome,
            _ = stop.changed() => Ok(Ended::Stopped),
        };
        let wait = match outcome {
            Ok(Ended::Stopped) => return,
            Ok(Ended::Later(wait)) => {
                fleet.counts.cooldowns.fetch_add(1, Relaxed);
                wait.min(Duration::from_secs(600))
            }
            Ok(Ended::Lost) | Err(_) => {
                if let Err(error) = &outcome {
                    tracing::debug!(device = options.device, %error, "session ended");
                }
                if began.elapsed() > options.backoff_most {
                    pause = Duration::from_millis(500);
                }
                let wait = pause.mul_f64(rand::random::<f64>());
                pause = (pause * 2).min(options.backoff_most);
                wait
            }
        };
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            _ = stop.changed() => return,
        }
    }
}

thread_local! {
    /// Read buffer of all peers on a thread: an idle peer owns none.
    static SCRATCH: RefCell<Vec<u8>> = RefCell::new(vec![0; 64 * 1024]);
}

/// A frame of ours inside a masked binary message.
fn message(kind: u8, stream: u32, body: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(ws::MAX_HEADER + link::HEADER + body.len());
    let mut header = [0; ws::MAX_HEADER];
    let key = rand::random::<[u8; 4]>();
    let n = ws::encode_header(&mut header, true, Opcode::Binary, link::HEADER + body.len(), Some(key));
    out.extend_from_slice(&header[..n]);
    out.extend_from_slice(&link::header(kind, stream));
    out.extend_from_slice(body);
    ws::apply_mask(&mut out[n..], key, 0);
    out
}

/// Credit that a stream's reader waits for.
#[derive(Default)]
struct Credit {
    bytes: AtomicU64,
    more: Notify,
}

impl Credit {
    fn add(&self, n: u64) {
        self.bytes.fetch_add(n, Relaxed);
        self.more.notify_one();
    }

    /// Waits until there is some; returns how much.
    async fn some(&self) -> u64 {
        loop {
            let now = self.bytes.load(Relaxed);
            if now > 0 {
                return now;
            }
            self.more.notified().await;
        }
    }
}

enum ToStream {
    Data(Vec<u8>),
    Eof,
}

struct Stream {
    /// Bounded by the credit we granted.
    to: mpsc::UnboundedSender<ToStream>,
    credit: Arc<Credit>,
    /// Bytes the hub may still send.
    window: Arc<AtomicU64>,
    task: JoinHandle<()>,
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.task.abort();
    }
}

struct Session<'a> {
    options: &'a Options,
    fleet: &'a Fleet,
    streams: HashMap<u32, Stream>,
    out: mpsc::Sender<Vec<u8>>,
    /// Answers to what was just read.
    now: Vec<u8>,
    /// A message that has come in part.
    partial: Vec<u8>,
    ready: bool,
    ended: Option<Ended>,
}

impl Drop for Session<'_> {
    fn drop(&mut self) {
        if self.ready {
            self.fleet.counts.ready.fetch_sub(1, Relaxed);
            self.fleet.counts.lost.fetch_add(1, Relaxed);
        }
    }
}

async fn connect(options: &Options) -> io::Result<TcpStream> {
    let socket = if options.hub.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    socket.set_nodelay(true)?;
    if let Some(source) = options.source {
        // The port is left to connect: thousands of peers share an address otherwise limited to 28,000 ports in all.
        nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::IpBindAddressNoPort, &true)?;
        socket.bind(SocketAddr::new(source, 0))?;
    }
    tokio::time::timeout(Duration::from_secs(15), socket.connect(options.hub)).await?
}

async fn session(options: &Options, fleet: &Fleet) -> io::Result<Ended> {
    let mut stream = connect(options).await?;
    let nonce = rand::random::<[u8; 16]>();
    let request = handshake::request(&options.host, &options.path, nonce, &[link::COMPACT], "");
    stream.write_all(request.as_bytes()).await?;
    let mut head = Vec::new();
    let (at, subprotocol) = loop {
        let mut chunk = [0; 1024];
        let n = tokio::time::timeout(Duration::from_secs(20), stream.read(&mut chunk)).await??;
        if n == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        head.extend_from_slice(&chunk[..n]);
        if let Some(done) = handshake::check_response(&head, nonce).map_err(io::Error::other)? {
            break done;
        }
    };
    if subprotocol.as_deref() != Some(link::COMPACT) {
        return Err(io::Error::other("the hub does not speak the compact protocol"));
    }
    let hello = link::Hello {
        device: options.device.clone(),
        version: options.version.clone(),
        token: options.token.clone(),
        consent: options.consent,
        udp: options.udp,
        max_tunnels: options.max_tunnels,
        country: options.country.clone(),
    };
    stream.write_all(&message(kind::HELLO, 0, &serde_json::to_vec(&hello)?)).await?;

    let (out, mut outgoing) = mpsc::channel::<Vec<u8>>(16);
    let mut session = Session {
        options,
        fleet,
        streams: HashMap::new(),
        out,
        now: Vec::new(),
        partial: Vec::new(),
        ready: false,
        ended: None,
    };
    let mut parser = Parser::new(Role::Client);
    let mut early = head.split_off(at);
    session.bytes(&mut parser, &mut early)?;
    drop((head, early));
    loop {
        if !session.now.is_empty() {
            let now = std::mem::take(&mut session.now);
            stream.write_all(&now).await?;
        }
        if let Some(ended) = session.ended.take() {
            return Ok(ended);
        }
        tokio::select! {
            readable = stream.readable() => {
                readable?;
                SCRATCH.with_borrow_mut(|scratch| match stream.try_read(scratch) {
                    Ok(0) => {
                        session.ended = Some(Ended::Lost);
                        Ok(())
                    }
                    Ok(n) => session.bytes(&mut parser, &mut scratch[..n]),
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(()),
                    Err(e) => Err(e),
                })?;
            }
            Some(frame) = outgoing.recv() => stream.write_all(&frame).await?,
            // The hub pings within a quarter of a minute: a minute of silence is a dead hub.
            () = tokio::time::sleep(Duration::from_secs(60)) => return Ok(Ended::Lost),
        }
    }
}

impl Session<'_> {
    fn bytes(&mut self, parser: &mut Parser, bytes: &mut [u8]) -> io::Result<()> {
        let limits = ws::Limits::default();
        let (mut at, total) = (0, bytes.len());
        while at < total {
            let (used, event) = parser.advance(&mut bytes[at..], &limits).map_err(io::Error::other)?;
            at += used;
            match event {
                Some(Event::Data { chunk, first, last, .. }) => {
                    if first && last {
                        self.frame(chunk)?;
                    } else {
                        self.partial.extend_from_slice(chunk);
                        if last {
                            let whole = std::mem::take(&mut self.partial);
                            self.frame(&whole)?;
                        }
                    }
                }
                Some(Event::Ping(payload)) => {
                    ws::encode_frame(&mut self.now, Opcode::Pong, payload, Some(rand::random()));
                }
                Some(Event::Pong(_)) | None => {}
                Some(Event::Close { code, reason }) => {
                    tracing::debug!(device = self.options.device, code, reason, "closed by the hub");
                    self.ended.get_or_insert(Ended::Lost);
                    ws::encode_close(&mut self.now, code, "", Some(rand::random()));
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    fn frame(&mut self, frame: &[u8]) -> io::Result<()> {
        let Some((head, body)) = frame.split_at_checked(link::HEADER) else {
            return Err(io::Error::other("a frame shorter than its header"));
        };
        let stream = u32::from_be_bytes([head[1], head[2], head[3], head[4]]);
        match head[0] {
            kind::WELCOME if !self.ready => {
                self.ready = true;
                self.fleet.counts.ready.fetch_add(1, Relaxed);
                self.fleet.counts.registered.fetch_add(1, Relaxed);
            }
            kind::COOLDOWN => {
                let cooldown: link::Cooldown = serde_json::from_slice(body)?;
                self.ended = Some(Ended::Later(Duration::from_millis(cooldown.retry_after_ms)));
            }
            // The hub is leaving, or has enough of us: with no tunnel left we go by ourselves.
            kind::DRAIN => {
                let wait = serde_json::from_slice::<link::Cooldown>(body).map_or(5000, |c| c.retry_after_ms);
                if self.streams.is_empty() {
                    self.ended = Some(Ended::Later(Duration::from_millis(wait)));
                }
            }
            kind::OPEN => self.open(stream, body),
            kind::DATA => {
                let Some(to) = self.streams.get(&stream) else { return Ok(()) };
                let taken = to.window.fetch_update(Relaxed, Relaxed, |w| w.checked_sub(body.len() as u64));
                if taken.is_err() {
                    return Err(io::Error::other("the hub sent more than was granted"));
                }
                let _ = to.to.send(ToStream::Data(body.to_vec()));
            }
            kind::DATAGRAM => {
                if let Some(to) = self.streams.get(&stream) {
                    let _ = to.to.send(ToStream::Data(body.to_vec()));
                }
            }
            kind::EOF => {
                if let Some(to) = self.streams.get(&stream) {
                    let _ = to.to.send(ToStream::Eof);
                }
            }
            kind::RESET => drop(self.streams.remove(&stream)),
            kind::CREDIT => {
                if let (Some(to), Some(more)) = (self.streams.get(&stream), body.get(..4)) {
                    to.credit.add(u64::from(u32::from_be_bytes([more[0], more[1], more[2], more[3]])));
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn open(&mut self, stream: u32, body: &[u8]) {
        let Some((carries, credit, dest)) = link::parse_open(body) else {
            let refused = link::opened(stream, Opened::Failed, 0);
            self.now.extend(message(kind::OPENED, stream, &refused[link::HEADER..]));
            return;
        };
        // Streams whose task is over have nothing left to say.
        self.streams.retain(|_, s| !s.task.is_finished());
        self.fleet.counts.tunnels.fetch_add(1, Relaxed);
        let (to, from) = mpsc::unbounded_channel();
        let shared = Arc::new(Credit::default());
        shared.bytes.store(u64::from(credit), Relaxed);
        let window = Arc::new(AtomicU64::new(u64::from(link::WINDOW)));
        let work = Work {
            stream,
            out: self.out.clone(),
            credit: shared.clone(),
            window: window.clone(),
            names: self.fleet.names.clone(),
            policy: self.options.policy.clone(),
            source: self.options.source,
        };
        let task = match (carries, dest) {
            (Carries::Tcp, Some(dest)) => tokio::spawn(work.tcp(dest, from)),
            _ => tokio::spawn(work.udp(from)),
        };
        self.streams.insert(stream, Stream { to, credit: shared, window, task });
    }
}

/// One stream's side of the peer.
struct Work {
    stream: u32,
    out: mpsc::Sender<Vec<u8>>,
    credit: Arc<Credit>,
    window: Arc<AtomicU64>,
    names: Names,
    policy: Arc<Policy>,
    source: Option<IpAddr>,
}

impl Work {
    async fn send(&self, kind: u8, body: &[u8]) {
        let _ = self.out.send(message(kind, self.stream, body)).await;
    }

    async fn opened(&self, how: Opened) {
        let frame = link::opened(self.stream, how, link::WINDOW);
        self.send(kind::OPENED, &frame[link::HEADER..]).await;
    }

    /// Resolves, judges, connects.
    async fn reach(&self, dest: &Dest) -> Result<TcpStream, Opened> {
        self.policy.check(dest).map_err(|_| Opened::Denied)?;
        let addrs = match &dest.host {
            Host::Ip(ip) => vec![*ip],
            Host::Name(name) => self.names.resolve(name).await,
        };
        if addrs.is_empty() {
            return Err(Opened::NotResolved);
        }
        if addrs.iter().any(|ip| self.policy.check_ip(*ip).is_err()) {
            return Err(Opened::Denied);
        }
        let mut last = Opened::Failed;
        for ip in addrs.into_iter().take(3) {
            let to = SocketAddr::new(unmapped(ip), dest.port);
            match tokio::time::timeout(Duration::from_secs(10), TcpStream::connect(to)).await {
                Ok(Ok(stream)) => {
                    let _ = stream.set_nodelay(true);
                    return Ok(stream);
                }
                Ok(Err(error)) => {
                    last = match error.kind() {
                        io::ErrorKind::ConnectionRefused => Opened::Refused,
                        io::ErrorKind::TimedOut => Opened::Timeout,
                        io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable => Opened::Unreachable,
                        _ => Opened::Failed,
                    };
                }
                Err(_) => last = Opened::Timeout,
            }
        }
        Err(last)
    }

    async fn tcp(self, dest: Dest, mut from: mpsc::UnboundedReceiver<ToStream>) {
        let target = match self.reach(&dest).await {
            Ok(target) => target,
            Err(how) => return self.opened(how).await,
        };
        self.opened(Opened::Ok).await;
        let (read, mut write) = target.into_split();
        let up = async {
            let mut owed = 0u32;
            while let Some(what) = from.recv().await {
                match what {
                    ToStream::Data(bytes) => {
                        write.write_all(&bytes).await?;
                        owed += bytes.len() as u32;
                        if owed >= link::WINDOW / 4 || (owed > 0 && from.is_empty()) {
                            self.window.fetch_add(u64::from(owed), Relaxed);
                            self.send(kind::CREDIT, &owed.to_be_bytes()).await;
                            owed = 0;
                        }
                    }
                    ToStream::Eof => break,
                }
            }
            write.shutdown().await
        };
        let down = async {
            // Header room in front, so that a chunk becomes a message without being copied.
            const ROOM: usize = ws::MAX_HEADER + link::HEADER;
            loop {
                read.readable().await?;
                let most = self.credit.some().await.min(link::FRAME_MOST as u64 - link::HEADER as u64) as usize;
                let mut buffer = vec![0; ROOM + most];
                let n = match read.try_read(&mut buffer[ROOM..]) {
                    Ok(0) => break,
                    Ok(n) => n,
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => continue,
                    Err(e) => return Err(e),
                };
                self.credit.bytes.fetch_sub(n as u64, Relaxed);
                buffer.truncate(ROOM + n);
                let mut header = [0; ws::MAX_HEADER];
                let key = rand::random::<[u8; 4]>();
                let len = ws::encode_header(&mut header, true, Opcode::Binary, link::HEADER + n, Some(key));
                buffer[ws::MAX_HEADER..ROOM].copy_from_slice(&link::header(kind::DATA, self.stream));
                ws::apply_mask(&mut buffer[ws::MAX_HEADER..], key, 0);
                let start = ws::MAX_HEADER - len;
                buffer[start..ws::MAX_HEADER].copy_from_slice(&header[..len]);
                buffer.drain(..start);
                if self.out.send(buffer).await.is_err() {
                    break;
                }
            }
            self.send(kind::EOF, &[]).await;
            io::Result::Ok(())
        };
        if tokio::try_join!(up, down).is_err() {
            self.send(kind::RESET, &[0]).await;
        }
    }

    async fn udp(self, mut from: mpsc::UnboundedReceiver<ToStream>) {
        let bind = SocketAddr::new(self.source.unwrap_or(IpAddr::from([0, 0, 0, 0])), 0);
        let socket = match UdpSocket::bind(bind).await {
            Ok(socket) => socket,
            Err(_) => return self.opened(Opened::Failed).await,
        };
        self.opened(Opened::Ok).await;
        let mut buffer = vec![0; 64 * 1024];
        loop {
            tokio::select! {
                got = socket.recv_from(&mut buffer) => {
                    let Ok((n, sender)) = got else { continue };
                    let mut body = Vec::with_capacity(n + 19);
                    socks::put_address(&mut body, sender);
                    body.extend_from_slice(&buffer[..n]);
                    // A full queue drops the datagram, as UDP does.
                    let _ = self.out.try_send(message(kind::DATAGRAM, self.stream, &body));
                }
                what = from.recv() => {
                    let Some(ToStream::Data(body)) = what else { return };
                    if let socks::Parsed::Done(Ok(dest), at) = socks::address(&body)
                        && let Host::Ip(ip) = dest.host
                        && self.policy.check(&dest).is_ok()
                    {
                        let _ = socket.send_to(&body[at..], SocketAddr::new(unmapped(ip), dest.port)).await;
                    }
                }
            }
        }
    }
}
