//! The real binary on loopback, and what it takes to talk to it.
#![allow(dead_code)]

use serde_json::Value;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

pub const PATIENCE: Duration = Duration::from_secs(20);

/// Waits until `seen` gives something; panics with `what` when it takes too long.
pub fn until<T>(what: &str, mut seen: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = seen() {
            return found;
        }
        assert!(start.elapsed() < PATIENCE, "gave up waiting: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

pub struct Balancer {
    child: Child,
    pub admin: SocketAddr,
    pub listeners: std::collections::HashMap<String, SocketAddr>,
    pub file: PathBuf,
    pub log: std::sync::Mutex<mpsc::Receiver<String>>,
    _dir: tempfile::TempDir,
}

impl Balancer {
    /// Starts with `config`, whose admin and listen ports may be 0.
    pub fn start(config: &str) -> Balancer {
        Self::spawn(config, &mut Command::new(env!("CARGO_BIN_EXE_conduit-balancer")))
    }

    /// The same with at most `descriptors` for each process.
    pub fn start_within(config: &str, descriptors: u64) -> Balancer {
        let shell = format!("ulimit -n {descriptors} && exec \"$0\" \"$@\"");
        Self::spawn(config, Command::new("sh").args(["-c", &shell, env!("CARGO_BIN_EXE_conduit-balancer")]))
    }

    fn spawn(config: &str, command: &mut Command) -> Balancer {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("balancer.toml");
        let config = if config.contains("[admin]") {
            config.to_owned()
        } else {
            format!("[admin]\nlisten = '127.0.0.1:0'\n{config}")
        };
        std::fs::write(&file, config).unwrap();
        let mut child = command.args(["run", "--config"]).arg(&file).stderr(Stdio::piped()).spawn().unwrap();
        let (lines, log) = mpsc::channel();
        let stderr = child.stderr.take().unwrap();
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                let _ = lines.send(line);
            }
        });
        let mut balancer = Balancer {
            child,
            admin: SocketAddr::from(([0, 0, 0, 0], 0)),
            listeners: Default::default(),
            file,
            log: log.into(),
            _dir: dir,
        };
        loop {
            let line =
                balancer.log.lock().unwrap().recv_timeout(PATIENCE).expect("the balancer ended before it was ready");
            if let Some((_, addr)) = line.split_once("admin on http://") {
                balancer.admin = addr.parse().unwrap();
            } else if let Some((name, rest)) =
                line.strip_prefix("conduit-balancer: ").and_then(|line| line.split_once(" on "))
            {
                balancer.listeners.insert(name.to_owned(), rest.split(' ').next().unwrap().parse().unwrap());
            } else if line.ends_with("ready") {
                return balancer;
            }
        }
    }

    pub fn addr(&self, listener: &str) -> SocketAddr {
        self.listeners[listener]
    }

    pub fn connect(&self, listener: &str) -> TcpStream {
        let stream = TcpStream::connect_timeout(&self.addr(listener), PATIENCE).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    pub fn ask(&self, method: &str, path: &str, body: &str) -> (u16, String) {
        self.ask_with(method, path, body, "")
    }

    pub fn ask_with(&self, method: &str, path: &str, body: &str, headers: &str) -> (u16, String) {
        let mut stream = TcpStream::connect(self.admin).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let length = body.len();
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n{headers}\r\n{body}"
        )
        .unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head[9..12].parse().unwrap(), body.to_owned())
    }

    pub fn stats(&self) -> Value {
        let (status, body) = self.ask("GET", "/stats", "");
        assert_eq!(status, 200);
        serde_json::from_str(&body).unwrap()
    }

    pub fn backend(&self, pool: &str, name: &str) -> Value {
        let stats = self.stats();
        let pool =
            stats["pools"].as_array().unwrap().iter().find(|entry| entry["name"] == pool).expect("the pool").clone();
        pool["backends"].as_array().unwrap().iter().find(|entry| entry["name"] == name).expect("the backend").clone()
    }

    pub fn listener(&self, name: &str) -> Value {
        let stats = self.stats();
        stats["listeners"].as_array().unwrap().iter().find(|entry| entry["name"] == name).expect("the listener").clone()
    }

    pub fn wait_backend(&self, pool: &str, name: &str, what: &str, fits: impl Fn(&Value) -> bool) {
        until(&format!("{pool}/{name}: {what}"), || Some(self.backend(pool, name)).filter(&fits));
    }

    pub fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_raw(self.child.id() as i32).unwrap();
        rustix::process::kill_process(pid, signal).unwrap();
    }

    /// Ends it in order and says whether it ended well.
    pub fn end(mut self) -> bool {
        self.signal(rustix::process::Signal::TERM);
        self.ended_well()
    }

    /// Waits for its end.
    pub fn ended_well(&mut self) -> bool {
        let child = &mut self.child;
        until("the balancer to end", || child.try_wait().unwrap()).success()
    }
}

impl Drop for Balancer {
    fn drop(&mut self) {
        if self.child.try_wait().ok().flatten().is_none() {
            self.signal(rustix::process::Signal::TERM);
            let pid = rustix::process::Pid::from_raw(self.child.id() as i32).unwrap();
            // The second one skips the drain.
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
            let start = Instant::now();
            while self.child.try_wait().ok().flatten().is_none() {
                if start.elapsed() > Duration::from_secs(5) {
                    let _ = self.child.kill();
                    let _ = self.child.wait();
                    return;
                }
                std::thread::sleep(Duration::from_millis(5));
            }
        }
    }
}

/// A backend that greets with its name and echoes; it lives on its own address and can be killed and revived.
pub struct Echo {
    pub addr: SocketAddr,
    name: String,
    stop: mpsc::Sender<()>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Echo {
    pub fn start(name: &str) -> Echo {
        Self::on(name, SocketAddr::from(([127, 0, 0, 1], 0)))
    }

    pub fn on(name: &str, addr: SocketAddr) -> Echo {
        let listener = clawhq_wire::socket::listen(addr, 4096).unwrap();
        let addr = listener.local_addr().unwrap();
        listener.set_nonblocking(true).unwrap();
        let (stop, stopped) = mpsc::channel::<()>();
        let greeting = format!("{name}\n");
        let thread = std::thread::spawn(move || {
            let mut open: Vec<TcpStream> = Vec::new();
            while let Err(mpsc::TryRecvError::Empty) = stopped.try_recv() {
                let Ok((stream, _)) = listener.accept() else {
                    std::thread::sleep(Duration::from_millis(1));
                    continue;
                };
                stream.set_nonblocking(false).unwrap();
                open.push(stream.try_clone().unwrap());
                let greeting = greeting.clone();
                std::thread::spawn(move || {
                    let (mut from, mut to) = (stream.try_clone().unwrap(), stream);
                    if to.write_all(greeting.as_bytes()).is_ok() && std::io::copy(&mut from, &mut to).is_ok() {
                        let _ = to.shutdown(std::net::Shutdown::Write);
                    }
                });
            }
            for stream in open {
                let _ = stream.shutdown(std::net::Shutdown::Both);
            }
        });
        Echo { addr, name: name.to_owned(), stop, thread: Some(thread) }
    }

    /// Closes the listener and every connection.
    pub fn kill(mut self) -> (String, SocketAddr) {
        let _ = self.stop.send(());
        self.thread.take().unwrap().join().unwrap();
        (self.name.clone(), self.addr)
    }
}

/// Reads one line, byte by byte so that nothing behind it is taken.
pub fn line(stream: &mut TcpStream) -> String {
    let mut text = Vec::new();
    let mut byte = [0];
    while text.last() != Some(&b'\n') {
        match stream.read(&mut byte) {
            Ok(1) => text.push(byte[0]),
            other => panic!("{other:?} after {:?}", String::from_utf8_lossy(&text)),
        }
    }
    String::from_utf8(text).unwrap().trim_end().to_owned()
}

/// The connection still carries bytes both ways.
pub fn carries(stream: &mut TcpStream) {
    stream.write_all(b"are you there\n").unwrap();
    assert_eq!(line(stream), "are you there");
}

/// An address nobody listens on.
pub fn free_addr() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

pub fn pattern(len: usize) -> Vec<u8> {
    let mut state = 0x2545_f491_4f6c_dd1du64;
    let mut out = Vec::with_capacity(len + 8);
    while out.len() < len {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        out.extend_from_slice(&(state >> 16).to_le_bytes());
    }
    out.truncate(len);
    out
}

/// A country database of IPv4 /8 networks: first octet and code.
pub fn country_database(networks: &[(u8, &str)]) -> Vec<u8> {
    fn text(out: &mut Vec<u8>, text: &str) {
        out.push(0x40 | text.len() as u8);
        out.extend_from_slice(text.as_bytes());
    }
    fn number(out: &mut Vec<u8>, kind: u8, value: u32) {
        let bytes = value.to_be_bytes();
        let skip = bytes.iter().take_while(|byte| **byte == 0).count();
        // Types above 7 take an extended byte.
        if kind > 7 {
            out.extend_from_slice(&[(4 - skip) as u8, kind - 7]);
        } else {
            out.push(kind << 5 | (4 - skip) as u8);
        }
        out.extend_from_slice(&bytes[skip..]);
    }
    let mut data = Vec::new();
    let mut offsets = Vec::new();
    for (_, code) in networks {
        offsets.push(data.len() as u32);
        data.push(0xe1);
        text(&mut data, "country");
        data.push(0xe1);
        text(&mut data, "iso_code");
        text(&mut data, code);
    }
    #[derive(Clone, Copy)]
    enum Record {
        Empty,
        Node(u32),
        Data(u32),
    }
    let mut nodes = vec![[Record::Empty; 2]];
    for ((octet, _), offset) in networks.iter().zip(&offsets) {
        let mut at = 0usize;
        for bit in 0..8 {
            let side = usize::from(octet >> (7 - bit) & 1);
            if bit == 7 {
                nodes[at][side] = Record::Data(*offset);
            } else if let Record::Node(next) = nodes[at][side] {
                at = next as usize;
            } else {
                nodes.push([Record::Empty; 2]);
                nodes[at][side] = Record::Node(nodes.len() as u32 - 1);
                at = nodes.len() - 1;
            }
        }
    }
    let count = nodes.len() as u32;
    let mut out = Vec::new();
    for node in &nodes {
        for record in node {
            let value = match record {
                Record::Empty => count,
                Record::Node(next) => *next,
                Record::Data(offset) => count + 16 + offset,
            };
            out.extend_from_slice(&value.to_be_bytes()[1..]);
        }
    }
    out.extend_from_slice(&[0; 16]);
    out.extend_from_slice(&data);
    out.extend_from_slice(b"\xab\xcd\xefMaxMind.com");
    out.push(0xe9);
    for (name, kind, value) in [
        ("node_count", 6, count),
        ("record_size", 5, 24),
        ("ip_version", 5, 4),
        ("binary_format_major_version", 5, 2),
        ("binary_format_minor_version", 5, 0),
        ("build_epoch", 9, 1_700_000_000),
    ] {
        text(&mut out, name);
        number(&mut out, kind, value);
    }
    text(&mut out, "database_type");
    text(&mut out, "Test-Country");
    text(&mut out, "languages");
    out.extend_from_slice(&[0x00, 0x04]);
    text(&mut out, "description");
    out.push(0xe0);
    out
}
