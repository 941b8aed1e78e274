//! Load and peers for `bench/run`.
//!
//! `measure tokio ADDR` and `measure tungstenite ADDR` are the echo servers that `echo` and `ws_echo` are compared with.
//! `measure hold raw|ws ADDR COUNT SOURCE` holds connections that have carried a message there and back.
//! `measure ask raw|ws ADDR CONNECTIONS ROUNDS SIZE` sends a message on each and waits for its echo, so many times.
//! `measure timers COUNT` prints nanoseconds for arming and cancelling, and for one that falls due.

use clawhq_wire::timer::Wheel;
use clawhq_wire::ws::{self, Opcode, handshake};
use clawhq_wire::{Closed, Conn, Io, Limits, Service, budget, spawn};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

type Failure = Box<dyn std::error::Error + Send + Sync>;

struct Client {
    to: SocketAddr,
    source: Option<IpAddr>,
    ws: bool,
    connections: usize,
    rounds: usize,
    size: usize,
    /// Sockets yet to open, a hundred a tick.
    left: usize,
    message: Vec<u8>,
    /// By tag: bytes of this round's answer still to come, `None` before the handshake's answer; and rounds left.
    waiting: Vec<(Option<usize>, usize)>,
    finished: usize,
}

impl Client {
    fn new(ws: bool, to: SocketAddr, source: Option<IpAddr>, connections: usize, rounds: usize, size: usize) -> Self {
        let mut message = vec![b'x'; size];
        if ws {
            let payload = std::mem::take(&mut message);
            ws::encode_frame(&mut message, Opcode::Binary, &payload, Some([1, 2, 3, 4]));
        }
        let waiting = vec![(None, rounds); connections];
        Client { to, source, ws, connections, rounds, size, left: connections, message, waiting, finished: 0 }
    }

    fn answer(&self) -> usize {
        match (self.ws, self.size) {
            (false, size) => size,
            (true, size @ 0..126) => size + 2,
            (true, size) => size + 4,
        }
    }

    fn next(&mut self, io: &mut Io, conn: Conn) {
        let (_, rounds) = self.waiting[conn.tag as usize];
        if rounds == 0 {
            self.finished += 1;
            if self.finished == self.connections {
                println!("done {}", self.connections * self.rounds);
            }
            return;
        }
        self.waiting[conn.tag as usize] = (Some(self.answer()), rounds - 1);
        io.write(conn.token, &self.message);
    }
}

impl Service for Client {
    type Command = ();

    fn start(&mut self, io: &mut Io) {
        io.arm(Duration::from_millis(10), 0);
    }

    fn timer(&mut self, io: &mut Io, _: u64) {
        for _ in 0..self.left.min(100) {
            self.left -= 1;
            io.connect(self.to, self.source, Duration::from_secs(30), self.left as u64).expect("a socket");
        }
        if self.left > 0 {
            io.arm(Duration::from_millis(10), 0);
        }
    }

    fn connected(&mut self, io: &mut Io, conn: Conn) {
        if self.ws {
            io.write(conn.token, handshake::request("localhost", "/", [7; 16], &[], "").as_bytes());
        } else {
            self.next(io, conn);
        }
    }

    fn admit(&mut self, _: &mut Io, _: Conn, _: SocketAddr) -> Option<u64> {
        None
    }

    fn data(&mut self, io: &mut Io, conn: Conn, bytes: &mut [u8]) {
        match &mut self.waiting[conn.tag as usize].0 {
            None => self.next(io, conn),
            Some(left) => {
                *left -= bytes.len();
                if *left == 0 {
                    self.next(io, conn);
                }
            }
        }
    }

    fn closed(&mut self, _: &mut Io, _: Conn, why: Closed) {
        if why != Closed::Stopped {
            eprintln!("a connection ended: {why:?}");
            std::process::exit(1);
        }
    }

    fn command(&mut self, _: &mut Io, (): ()) {}
}

/// Runs the client until the end of input.
fn drive(client: Client) -> Result<(), Failure> {
    let sockets = budget::raise_limit() as usize - 100;
    let mut client = Some(client);
    let handle = spawn(1, Limits { sockets, ..Limits::default() }, |_| client.take().expect("one shard"))?;
    std::io::copy(&mut std::io::stdin(), &mut std::io::sink())?;
    handle.stop();
    Ok(handle.join()?)
}

/// The usual tokio server: a task and a buffer of 4 KiB for each connection.
async fn tokio_echo(addr: SocketAddr) -> Result<(), Failure> {
    let listener = tokio::net::TcpListener::bind(addr).await?;
    println!("ready");
    loop {
        let (mut stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        tokio::spawn(async move {
            let mut buffer = vec![0; 4096];
            while let Ok(count @ 1..) = stream.read(&mut buffer).await {
                if stream.write_all(&buffer[..count]).await.is_err() {
                    return;
                }
            }
        });
    }
}

/// tungstenite with its buffers as small as it lets one make them: by default each connection has 128 KiB.
async fn tungstenite_echo(addr: SocketAddr) -> Result<(), Failure> {
    use futures::{SinkExt, StreamExt};
    use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
    let listener = tokio::net::TcpListener::bind(addr).await?;
    println!("ready");
    loop {
        let (stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        tokio::spawn(async move {
            let config = WebSocketConfig::default().read_buffer_size(512).write_buffer_size(0);
            let Ok(mut socket) = tokio_tungstenite::accept_async_with_config(stream, Some(config)).await else {
                return;
            };
            while let Some(Ok(message)) = socket.next().await {
                if message.is_close() || socket.send(message).await.is_err() {
                    return;
                }
            }
        });
    }
}

/// A million timers armed as connections arm theirs: most are cancelled or put off long before they fall due.
fn timers(count: usize) {
    let mut wheel = Wheel::new();
    let deadline = |n: usize| 100 + (n as u64).wrapping_mul(2_654_435_761) % 30_000;
    let armed: Vec<_> = (0..count).map(|n| wheel.arm(deadline(n), n)).collect();
    let start = Instant::now();
    for (n, timer) in armed.into_iter().enumerate() {
        wheel.cancel(timer);
        wheel.arm(deadline(n + 7), n);
    }
    let renewed = start.elapsed();
    let (mut due, mut fired) = (Vec::new(), 0);
    let start = Instant::now();
    for tick in 0..31_000 {
        wheel.advance(tick, &mut due);
        fired += due.len();
        due.clear();
    }
    assert_eq!(fired, count);
    println!("renew {} fire {}", renewed.as_nanos() as usize / count, start.elapsed().as_nanos() as usize / count);
}

fn main() -> Result<(), Failure> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let runtime = || tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    match args.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["tokio", addr] => runtime()?.block_on(tokio_echo(addr.parse()?)),
        ["tungstenite", addr] => runtime()?.block_on(tungstenite_echo(addr.parse()?)),
        ["hold", how, addr, count, source] => {
            drive(Client::new(*how == "ws", addr.parse()?, Some(source.parse()?), count.parse()?, 1, 16))
        }
        ["ask", how, addr, connections, rounds, size] => {
            drive(Client::new(*how == "ws", addr.parse()?, None, connections.parse()?, rounds.parse()?, size.parse()?))
        }
        ["timers", count] => {
            timers(count.parse()?);
            Ok(())
        }
        _ => Err("see the head of the source for the arguments".into()),
    }
}
