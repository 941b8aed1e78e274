//! Load for the benchmark: backends that echo or pour, and clients that hold, churn, pour or measure.
//!
//! `load serve ADDR...` · `load hold TO COUNT SOURCE RATE` · `load churn TO COUNT PARALLEL` · `load pour TO BYTES PARALLEL` ·
//! `load measure TO COUNT`

use clawhq_wire::{Closed, Conn, Io, Limits, Service, Written, budget, socket, spawn};
use std::io::{BufRead, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

/// Echoes; a first byte of `p` followed by eight of length asks for that many bytes.
struct Serve {
    listeners: Vec<TcpListener>,
    pouring: std::collections::HashMap<u64, u64>,
    next: u64,
    zeros: Vec<u8>,
}

impl Serve {
    fn pour(&mut self, io: &mut Io, conn: Conn) {
        while let Some(left) = self.pouring.get_mut(&conn.tag) {
            if *left == 0 {
                self.pouring.remove(&conn.tag);
                return io.close(conn.token);
            }
            let count = self.zeros.len().min(*left as usize);
            *left -= count as u64;
            match io.write(conn.token, &self.zeros[..count]) {
                Written::Sent => {}
                Written::Queued(_) => return,
                _ => {
                    self.pouring.remove(&conn.tag);
                }
            }
        }
    }
}

impl Service for Serve {
    type Command = ();

    fn start(&mut self, io: &mut Io) {
        for listener in self.listeners.drain(..) {
            io.listen(listener, 0).expect("listens");
        }
    }

    fn admit(&mut self, _: &mut Io, _: Conn, _: SocketAddr) -> Option<u64> {
        self.next += 1;
        Some(self.next)
    }

    fn data(&mut self, io: &mut Io, conn: Conn, bytes: &mut [u8]) {
        if bytes.len() == 9 && bytes[0] == b'p' {
            self.pouring.insert(conn.tag, u64::from_le_bytes(bytes[1..].try_into().expect("eight bytes")));
            self.pour(io, conn);
        } else {
            io.write(conn.token, bytes);
        }
    }

    fn drained(&mut self, io: &mut Io, conn: Conn) {
        self.pour(io, conn);
    }

    fn closed(&mut self, _: &mut Io, conn: Conn, _: Closed) {
        self.pouring.remove(&conn.tag);
    }

    fn command(&mut self, _: &mut Io, (): ()) {}
}

/// Opens connections at a steady pace and holds them. A connection's tag is 1 once it has carried a byte there and back.
struct Hold {
    to: SocketAddr,
    source: Option<IpAddr>,
    left: usize,
    per_tick: usize,
    lost: usize,
    up: usize,
    failed: usize,
    total: usize,
}

impl Hold {
    fn fail(&mut self) {
        self.failed += 1;
        self.tell();
    }

    fn tell(&self) {
        if self.up + self.failed == self.total {
            println!("held {} failed {}", self.up, self.failed);
        }
    }

    fn gone(&mut self, conn: Conn) {
        if conn.tag == 0 {
            self.fail();
        } else {
            self.lost += 1;
        }
    }
}

impl Service for Hold {
    type Command = ();

    fn start(&mut self, io: &mut Io) {
        io.arm(Duration::from_millis(10), 0);
    }

    fn timer(&mut self, io: &mut Io, _: u64) {
        for _ in 0..self.per_tick.min(self.left) {
            self.left -= 1;
            if io.connect(self.to, self.source, Duration::from_secs(30), 0).is_err() {
                self.fail();
            }
        }
        if self.left > 0 {
            io.arm(Duration::from_millis(10), 0);
        }
    }

    fn connected(&mut self, io: &mut Io, conn: Conn) {
        // Held once it has carried a byte there and back, not when the kernel says so.
        io.write(conn.token, b"h");
    }

    fn admit(&mut self, _: &mut Io, _: Conn, _: SocketAddr) -> Option<u64> {
        None
    }

    fn data(&mut self, io: &mut Io, conn: Conn, _: &mut [u8]) {
        io.set_tag(conn.token, 1);
        self.up += 1;
        self.tell();
    }

    fn eof(&mut self, io: &mut Io, conn: Conn) {
        self.gone(conn);
        io.close(conn.token);
    }

    fn closed(&mut self, _: &mut Io, conn: Conn, why: Closed) {
        if why != Closed::Stopped {
            self.gone(conn);
        }
    }

    fn command(&mut self, _: &mut Io, (): ()) {
        println!("lost {}", self.lost);
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let sockets = budget::raise_limit() as usize - 100;
    let limits = Limits { sockets, ..Limits::default() };
    match args.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["serve", addrs @ ..] => {
            let listeners = addrs
                .iter()
                .map(|addr| Ok(socket::listen(addr.parse()?, 4096)?))
                .collect::<Result<Vec<_>, Box<dyn std::error::Error>>>()?;
            let mut listeners = Some(listeners);
            let handle = spawn(1, limits, |_| Serve {
                listeners: listeners.take().expect("one shard"),
                pouring: Default::default(),
                next: 0,
                zeros: vec![0; 64 << 10],
            })?;
            println!("serving");
            handle.join()?;
        }
        ["hold", to, count, source, rate] => {
            let (to, count): (SocketAddr, usize) = (to.parse()?, count.parse()?);
            let source: Option<IpAddr> = Some(source.parse()?);
            let per_tick = (rate.parse::<usize>()? / 100).max(1);
            let handle = spawn(1, limits, |_| Hold {
                to,
                source,
                left: count,
                per_tick,
                lost: 0,
                up: 0,
                failed: 0,
                total: count,
            })?;
            // One line asks how many were lost; the end of input ends.
            for line in std::io::stdin().lock().lines() {
                line?;
                handle.broadcast(|| ());
            }
            handle.stop();
            handle.join()?;
        }
        ["churn", to, count, parallel] => {
            let (to, count, parallel): (SocketAddr, usize, usize) = (to.parse()?, count.parse()?, parallel.parse()?);
            let start = Instant::now();
            std::thread::scope(|scope| {
                for _ in 0..parallel {
                    scope.spawn(|| {
                        for _ in 0..count / parallel {
                            once(to).expect("connect and echo");
                        }
                    });
                }
            });
            println!("{} in {:.3} s", count / parallel * parallel, start.elapsed().as_secs_f64());
        }
        ["pour", to, bytes, parallel] => {
            let (to, bytes, parallel): (SocketAddr, u64, u64) = (to.parse()?, bytes.parse()?, parallel.parse()?);
            std::thread::scope(|scope| {
                for _ in 0..parallel {
                    scope.spawn(|| {
                        let mut stream = TcpStream::connect(to).expect("connects");
                        let want = bytes / parallel;
                        stream.write_all(&[&b"p"[..], &want.to_le_bytes()].concat()).expect("asks");
                        let mut buffer = vec![0; 256 << 10];
                        let mut got = 0;
                        while got < want {
                            match stream.read(&mut buffer).expect("reads") {
                                0 => panic!("{got} of {want} bytes came"),
                                count => got += count as u64,
                            }
                        }
                    });
                }
            });
            println!("poured");
        }
        ["measure", to, count] => {
            let (to, count): (SocketAddr, usize) = (to.parse()?, count.parse()?);
            let mut took = Vec::new();
            for _ in 0..count {
                let start = Instant::now();
                once(to)?;
                took.push(start.elapsed());
                std::thread::sleep(Duration::from_millis(1));
            }
            took.sort();
            let at = |share: f64| took[((count - 1) as f64 * share) as usize].as_micros();
            println!("p50 {} p99 {}", at(0.5), at(0.99));
        }
        _ => return Err("see the head of the source for the arguments".into()),
    }
    Ok(())
}

/// Connects, sends a byte, gets it back.
fn once(to: SocketAddr) -> std::io::Result<()> {
    let mut stream = TcpStream::connect(to)?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    stream.write_all(b"x")?;
    stream.read_exact(&mut [0])
}
