//! Echo server: `cargo run --release -p clawhq-wire --example echo -- 127.0.0.1:7000 2`.

use clawhq_wire::{Closed, Conn, Io, Limits, Service, Written, budget, socket, spawn};
use std::net::{SocketAddr, TcpListener};

struct Echo {
    listener: Option<TcpListener>,
}

impl Service for Echo {
    type Command = ();

    fn start(&mut self, io: &mut Io) {
        let listener = self.listener.take().expect("start is called once");
        io.listen(listener, 0).expect("a bound listener registers");
    }

    fn admit(&mut self, _: &mut Io, _: Conn, _: SocketAddr) -> Option<u64> {
        Some(0)
    }

    fn data(&mut self, io: &mut Io, conn: Conn, bytes: &mut [u8]) {
        if let Written::Queued(_) = io.write(conn.token, bytes) {
            io.pause(conn.token);
        }
    }

    fn drained(&mut self, io: &mut Io, conn: Conn) {
        io.resume(conn.token);
    }

    fn eof(&mut self, io: &mut Io, conn: Conn) {
        io.shutdown_write(conn.token);
    }

    fn closed(&mut self, _: &mut Io, _: Conn, _: Closed) {}

    fn command(&mut self, _: &mut Io, (): ()) {}
}

fn main() -> std::io::Result<()> {
    let mut args = std::env::args().skip(1);
    let addr: SocketAddr = args.next().unwrap_or("127.0.0.1:7000".into()).parse().map_err(std::io::Error::other)?;
    let shards: usize = args.next().map_or(Ok(2), |text| text.parse()).map_err(std::io::Error::other)?;
    let sockets = budget::raise_limit().saturating_sub(100) as usize;
    let mut listeners = socket::listen_group(addr, shards)?;
    println!("echo on {}", listeners[0].local_addr()?);
    let limits = Limits { sockets: sockets / shards, ..Limits::default() };
    spawn(shards, limits, |_| Echo { listener: listeners.pop() })?.join()
}
