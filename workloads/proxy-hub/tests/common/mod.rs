//! What the end-to-end tests share: a hub in this process, peers, origins, clients.
#![allow(dead_code)]

use proxy_hub::account::hash_key;
use proxy_hub::config::Config;
use proxy_hub::dest::Policy;
use proxy_hub::load;
use proxy_hub::peer::{self, Fleet, Options};
use proxy_hub::server::Server;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

pub fn hex(key: &str) -> String {
    hash_key(key).iter().map(|b| format!("{b:02x}")).collect()
}

/// Whether the long tests are asked for; says so if not.
pub fn nightly(what: &str) -> bool {
    let on = std::env::var_os("NIGHTLY").is_some_and(|v| v == "1");
    if !on {
        eprintln!("{what}: the short form runs; set NIGHTLY=1 for the whole");
    }
    on
}

/// Whether a program is there; says so if not.
pub fn has(program: &str) -> bool {
    let found = std::env::var_os("PATH").is_some_and(|p| std::env::split_paths(&p).any(|d| d.join(program).is_file()));
    if !found {
        eprintln!("{program} is not installed: its part of the test is left out");
    }
    found
}

/// Waits until `done` is true; fails after 20 s.
pub async fn until(what: &str, mut done: impl FnMut() -> bool) {
    let began = Instant::now();
    while !done() {
        assert!(began.elapsed() < Duration::from_secs(20), "waited in vain: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

pub struct TestHub {
    pub server: Server,
    pub dir: tempfile::TempDir,
    pub fleet: Fleet,
    stop: watch::Sender<bool>,
}

pub fn config(dir: &std::path::Path, extra: &str, customers: &str) -> String {
    let geo = dir.join("geo.mmdb");
    load::geo_database(&geo).expect("geo database");
    let section = |name: &str| extra.contains(&format!("[{name}]"));
    let mut text = String::new();
    if !section("hub") {
        text += &format!("[hub]\ndata = {:?}\nshards = 2\n", dir.join("data"));
    }
    if !section("peers") {
        text += "[peers]\nlisten = \"127.0.0.1:0\"\nmin_version = \"0.1\"\n";
    }
    if !section("customers") {
        text += "[customers]\nlisten = \"127.0.0.1:0\"\n";
    }
    if !section("policy") {
        text += "[policy]\nallow = [\"127.0.0.0/8\"]\n";
    }
    text += &format!("[api]\nlisten = \"127.0.0.1:0\"\n[geo]\ndatabases = [{geo:?}]\n{extra}\n");
    if customers.is_empty() {
        text += &format!("[[customer]]\nname = \"alice\"\nkey_sha256 = [\"{}\"]\n", hex("key"));
    }
    text + customers
}

impl TestHub {
    pub async fn start() -> Self {
        Self::with("", "").await
    }

    pub async fn with(extra: &str, customers: &str) -> Self {
        let dir = tempfile::tempdir().expect("dir");
        let text = config(dir.path(), extra, customers);
        let server = Server::start(Config::parse(&text, "test").expect("valid")).await.expect("starts");
        Self { server, dir, fleet: Fleet::default(), stop: watch::channel(false).0 }
    }

    pub fn options(&self, n: usize) -> Options {
        Options {
            policy: Arc::new(lab()),
            source: Some(load::source(n)),
            backoff_most: Duration::from_millis(500),
            ..Options::new(self.server.peers, format!("sim-{n}"))
        }
    }

    /// Starts peers 0..count and waits until the hub has them.
    pub async fn peers(&self, count: usize) {
        for n in 0..count {
            self.peer(self.options(n));
        }
        self.registered(count).await;
    }

    pub fn peer(&self, options: Options) -> tokio::task::JoinHandle<()> {
        tokio::spawn(peer::run(options, self.fleet.clone(), self.stop.subscribe()))
    }

    pub async fn registered(&self, count: usize) {
        until("peers registered", || self.server.shared.registry.len() == count).await;
    }

    pub async fn socks(&self, user: &str, key: &str, to: SocketAddr) -> Result<TcpStream, u8> {
        load::socks(self.server.customers, user, key, to).await.expect("the hub answers")
    }

    /// Bytes counted for an account: up and down.
    pub fn billed(&self, name: &str) -> (u64, u64) {
        let totals = self.server.shared.accounts.get(name).expect("account").counter.totals();
        (totals.up, totals.down)
    }

    pub async fn quiet(&self) {
        until("tunnels ended", || self.server.shared.metrics.tunnels.load(Relaxed) == 0).await;
    }
}

impl Drop for TestHub {
    fn drop(&mut self) {
        let _ = self.stop.send(true);
    }
}

/// A policy for loopback.
pub fn lab() -> Policy {
    Policy { allow: vec!["127.0.0.0/8".parse().expect("net")], ..Policy::default() }
}

/// An origin that tells the client's address and what it got, for one request a connection.
pub async fn http_origin() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let addr = listener.local_addr().expect("addr");
    tokio::spawn(async move {
        while let Ok((mut stream, from)) = listener.accept().await {
            tokio::spawn(async move {
                let mut head = Vec::new();
                let mut buf = [0; 4096];
                while !head.windows(4).any(|w| w == b"\r\n\r\n") {
                    match stream.read(&mut buf).await {
                        Ok(0) | Err(_) => return,
                        Ok(n) => head.extend_from_slice(&buf[..n]),
                    }
                }
                let text = String::from_utf8_lossy(&head).into_owned();
                let end = text.find("\r\n\r\n").expect("found") + 4;
                let wants: usize = text
                    .lines()
                    .find_map(|l| l.to_ascii_lowercase().strip_prefix("content-length: ").map(str::to_owned))
                    .and_then(|v| v.parse().ok())
                    .unwrap_or(0);
                let mut body = head[end..].to_vec();
                while body.len() < wants {
                    match stream.read(&mut buf).await {
                        Ok(0) | Err(_) => return,
                        Ok(n) => body.extend_from_slice(&buf[..n]),
                    }
                }
                let answer = format!("from {}\n{}body {}\n", from.ip(), &text[..end].replace("\r\n", "\n"), body.len());
                let _ = stream
                    .write_all(
                        format!(
                            "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{answer}",
                            answer.len()
                        )
                        .as_bytes(),
                    )
                    .await;
                let _ = stream.shutdown().await;
            });
        }
    });
    addr
}

/// An origin that sends `bytes` of a known stream to whoever connects, after reading nothing.
pub async fn source_origin(bytes: u64) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let addr = listener.local_addr().expect("addr");
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut at = 0u64;
                let mut chunk = vec![0; 64 * 1024];
                while at < bytes {
                    let n = (chunk.len() as u64).min(bytes - at) as usize;
                    fill(&mut chunk[..n], at);
                    if stream.write_all(&chunk[..n]).await.is_err() {
                        return;
                    }
                    at += n as u64;
                }
                let _ = stream.shutdown().await;
            });
        }
    });
    addr
}

/// The known stream: every 8-byte word is its own number, scrambled.
pub fn fill(chunk: &mut [u8], at: u64) {
    for (i, byte) in chunk.iter_mut().enumerate() {
        let position = at + i as u64;
        let word = (position / 8).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        *byte = word.to_le_bytes()[(position % 8) as usize];
    }
}

pub async fn run(program: &str, args: &[&str]) -> (Option<i32>, String, String) {
    let out = tokio::time::timeout(
        Duration::from_secs(30),
        tokio::process::Command::new(program)
            .args(args)
            .env_remove("http_proxy")
            .env_remove("no_proxy")
            .env_remove("NO_PROXY")
            .kill_on_drop(true)
            .output(),
    )
    .await
    .expect("ends in time")
    .expect("starts");
    (
        out.status.code(),
        String::from_utf8_lossy(&out.stdout).into_owned(),
        String::from_utf8_lossy(&out.stderr).into_owned(),
    )
}

/// The country that the simulated peer behind an address is in.
pub fn country_of(ip: &str) -> &'static str {
    match ip.parse::<IpAddr>().expect("ip") {
        IpAddr::V4(ip) => match ip.octets()[1] {
            1..=3 => "US",
            4 => "DE",
            5 => "FR",
            6 => "GB",
            7 => "JP",
            _ => "SG",
        },
        IpAddr::V6(_) => "?",
    }
}
