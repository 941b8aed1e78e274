//! A relay on the core, through real sockets: what goes in comes out, whatever the pace.

use clawhq_wire::{Closed, Conn, Io, Limits, Remote, Service, Token, Written, socket, spawn};
use sha2::{Digest, Sha256};
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc;
use std::time::Duration;

#[derive(Debug, PartialEq, Eq, Clone, Copy)]
enum Seen {
    Accepted,
    Closed(Closed),
}

struct Relay {
    listener: Option<TcpListener>,
    target: SocketAddr,
    splice_after: Option<u64>,
    idle: Option<Duration>,
    seen: mpsc::Sender<Seen>,
    copied: u64,
}

impl Service for Relay {
    type Command = mpsc::Sender<(usize, u64)>;

    fn start(&mut self, io: &mut Io) {
        io.listen(self.listener.take().unwrap(), 0).unwrap();
    }
    fn admit(&mut self, _: &mut Io, _: Conn, _: SocketAddr) -> Option<u64> {
        Some(1)
    }
    fn accepted(&mut self, io: &mut Io, conn: Conn, _: SocketAddr) {
        let _ = self.seen.send(Seen::Accepted);
        let up = io.connect(self.target, Some([127, 0, 0, 9].into()), Duration::from_secs(2), 2).unwrap();
        io.pair(conn.token, up);
        io.set_idle(conn.token, self.idle);
    }
    fn data(&mut self, io: &mut Io, conn: Conn, bytes: &mut [u8]) {
        self.copied += bytes.len() as u64;
        let to = io.paired(conn.token);
        match io.write(to, bytes) {
            Written::Queued(_) => io.pause(conn.token),
            Written::Sent if self.splice_after.is_some_and(|after| self.copied > after) => {
                io.splice(conn.token);
            }
            Written::Sent | Written::Gone => {}
            Written::Full => panic!("a paused source cannot fill the queue"),
        }
    }
    fn drained(&mut self, io: &mut Io, conn: Conn) {
        let from = io.paired(conn.token);
        io.resume(from);
    }
    fn eof(&mut self, io: &mut Io, conn: Conn) {
        let to = io.paired(conn.token);
        io.shutdown_write(to);
    }
    fn closed(&mut self, io: &mut Io, conn: Conn, why: Closed) {
        let _ = self.seen.send(Seen::Closed(why));
        if why != Closed::Finished {
            // The pair was forgotten with the slot, so the other half is found by its own pairing.
            let _ = (io, conn);
        }
    }
    fn command(&mut self, io: &mut Io, reply: Self::Command) {
        let _ = reply.send((io.connections(), self.copied));
    }
}

struct Running {
    addr: SocketAddr,
    remote: Remote<mpsc::Sender<(usize, u64)>>,
    handle: clawhq_wire::Handle<mpsc::Sender<(usize, u64)>>,
    seen: mpsc::Receiver<Seen>,
}

fn relay(target: SocketAddr, splice_after: Option<u64>, idle: Option<Duration>) -> Running {
    let mut listeners = socket::listen_group("127.0.0.1:0".parse().unwrap(), 1).unwrap();
    let addr = listeners[0].local_addr().unwrap();
    let (seen, events) = mpsc::channel();
    let handle = spawn(1, Limits::default(), |_| Relay {
        listener: listeners.pop(),
        target,
        splice_after,
        idle,
        seen: seen.clone(),
        copied: 0,
    })
    .unwrap();
    Running { addr, remote: handle.remotes()[0].clone(), handle, seen: events }
}

impl Running {
    fn state(&self) -> (usize, u64) {
        let (reply, answer) = mpsc::channel();
        self.remote.send(reply).unwrap();
        answer.recv_timeout(Duration::from_secs(5)).unwrap()
    }
    fn stop(self) {
        self.handle.stop();
        self.handle.join().unwrap();
    }
}

fn pattern(len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut out = Vec::with_capacity(len + 8);
    while out.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        out.extend_from_slice(&state.to_le_bytes());
    }
    out.truncate(len);
    out
}

/// 16 MiB to a reader that pauses now and again, and half-close afterwards: the answer comes after our FIN.
fn through(splice_after: Option<u64>) -> u64 {
    let sink = TcpListener::bind("127.0.0.1:0").unwrap();
    let running = relay(sink.local_addr().unwrap(), splice_after, None);
    let sent = pattern(16 << 20);
    let expected = Sha256::digest(&sent);
    let addr = running.addr;
    let client = std::thread::spawn(move || {
        let mut client = TcpStream::connect(addr).unwrap();
        for chunk in sent.chunks(100_001) {
            client.write_all(chunk).unwrap();
        }
        client.shutdown(Shutdown::Write).unwrap();
        let mut answer = Vec::new();
        client.read_to_end(&mut answer).unwrap();
        answer
    });
    let (mut server, _) = sink.accept().unwrap();
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 32 << 10];
    let mut total = 0usize;
    loop {
        let count = server.read(&mut buffer).unwrap();
        if count == 0 {
            break;
        }
        total += count;
        hash.update(&buffer[..count]);
        if total.is_multiple_of(7) {
            std::thread::yield_now();
        }
    }
    assert_eq!(total, 16 << 20);
    let digest = hash.finalize();
    assert_eq!(digest, expected);
    server.write_all(digest.as_slice()).unwrap();
    drop(server);
    assert_eq!(client.join().unwrap(), expected.as_slice());
    let copied = running.state().1;
    running.stop();
    copied
}

#[test]
fn copied_bytes_arrive_whole_and_half_close_is_kept() {
    assert_eq!(through(None), (16 << 20) + 32);
}

#[test]
fn spliced_bytes_arrive_whole_and_half_close_is_kept() {
    let copied = through(Some(256 << 10));
    assert!(copied < 2 << 20, "{copied} bytes were copied though splice was asked for after 256 KiB");
}

#[test]
fn bytes_written_before_the_connect_is_up_are_kept() {
    let sink = TcpListener::bind("127.0.0.1:0").unwrap();
    let running = relay(sink.local_addr().unwrap(), None, None);
    for _ in 0..50 {
        let mut client = TcpStream::connect(running.addr).unwrap();
        client.write_all(b"first").unwrap();
        let (mut server, from) = sink.accept().unwrap();
        assert_eq!(from.ip(), std::net::IpAddr::from([127, 0, 0, 9]));
        let mut bytes = [0; 5];
        server.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"first");
    }
    running.stop();
}

#[test]
fn a_refused_connect_and_an_idle_flow_are_reported() {
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let running = relay(free, None, Some(Duration::from_millis(80)));
    let _client = TcpStream::connect(running.addr).unwrap();
    let mut seen = Vec::new();
    while seen.len() < 3 {
        seen.push(running.seen.recv_timeout(Duration::from_secs(5)).unwrap());
    }
    assert!(seen.contains(&Seen::Closed(Closed::ConnectFailed(std::io::ErrorKind::ConnectionRefused))), "{seen:?}");
    assert!(seen.contains(&Seen::Closed(Closed::Idle)), "{seen:?}");
    assert_eq!(running.state().0, 0);
    running.stop();
}

#[test]
fn a_reset_is_reported_once() {
    let sink = TcpListener::bind("127.0.0.1:0").unwrap();
    let running = relay(sink.local_addr().unwrap(), None, None);
    let client = TcpStream::connect(running.addr).unwrap();
    let (_server, _) = sink.accept().unwrap();
    rustix::net::sockopt::set_socket_linger(&client, Some(Duration::ZERO)).unwrap();
    drop(client);
    assert_eq!(running.seen.recv_timeout(Duration::from_secs(5)), Ok(Seen::Accepted));
    assert_eq!(running.seen.recv_timeout(Duration::from_secs(5)), Ok(Seen::Closed(Closed::Reset)));
    assert_eq!(running.state().0, 1);
    running.stop();
}

#[test]
fn drain_takes_no_more_and_waits_for_those_who_are_there() {
    let sink = TcpListener::bind("127.0.0.1:0").unwrap();
    let running = relay(sink.local_addr().unwrap(), None, None);
    let mut client = TcpStream::connect(running.addr).unwrap();
    let (mut server, _) = sink.accept().unwrap();
    running.handle.drain(Duration::from_secs(30));
    running.state();
    assert!(TcpStream::connect(running.addr).is_err(), "a draining shard still accepts");
    client.write_all(b"still here").unwrap();
    let mut bytes = [0; 10];
    server.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"still here");
    assert!(!running.handle.any_ended());
    drop((client, server));
    running.handle.join().unwrap();
}

#[test]
fn stale_tokens_do_nothing() {
    struct Probe(mpsc::Sender<(bool, Written)>);
    impl Service for Probe {
        type Command = SocketAddr;
        fn admit(&mut self, _: &mut Io, _: Conn, _: SocketAddr) -> Option<u64> {
            None
        }
        fn data(&mut self, _: &mut Io, _: Conn, _: &mut [u8]) {}
        fn closed(&mut self, _: &mut Io, _: Conn, _: Closed) {}
        fn command(&mut self, io: &mut Io, to: SocketAddr) {
            let first = io.connect(to, None, Duration::from_secs(1), 0).unwrap();
            io.abort(first);
            let second = io.connect(to, None, Duration::from_secs(1), 0).unwrap();
            assert_eq!(first.index(), second.index());
            io.close(first);
            io.shutdown_write(first);
            io.set_idle(first, Some(Duration::from_millis(1)));
            io.pair(first, second);
            assert_eq!(io.paired(second), Token::NONE);
            self.0.send((io.is_open(first), io.write(first, b"x"))).unwrap();
        }
    }
    let sink = TcpListener::bind("127.0.0.1:0").unwrap();
    let (seen, events) = mpsc::channel();
    let handle = spawn(1, Limits::default(), |_| Probe(seen.clone())).unwrap();
    handle.remotes()[0].send(sink.local_addr().unwrap()).unwrap();
    assert_eq!(events.recv_timeout(Duration::from_secs(5)), Ok((false, Written::Gone)));
    handle.stop();
    handle.join().unwrap();
}
