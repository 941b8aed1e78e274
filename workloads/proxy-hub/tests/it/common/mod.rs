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

/// Whether the long tests are asked for, by nextest's profile or by `NIGHTLY=1`; says so if not.
pub fn nightly(what: &str) -> bool {
    let on = std::env::var("NIGHTLY").is_ok_and(|v| v == "1")
        || std::env::var("NEXTEST_PROFILE").is_ok_and(|v| v == "nightly");
    if !on {
        eprintln!("{what}: the short form runs; set NIGHTLY=1 for the whole");
    }
    on
}

/// Whether a test may use a program. A missing one fails the test and names the remedy, unless it is listed in
/// `PROXY_HUB_TEST_WITHOUT` (commas between).
pub fn need(program: &str, package: &str) -> bool {
    let dirs = std::env::var_os("PATH").map(|p| std::env::split_paths(&p).collect::<Vec<_>>()).unwrap_or_default();
    let found = dirs.iter().chain(&["/usr/sbin".into()]).any(|d| d.join(program).is_file());
    found || left_out(program, &format!("install the package {package} (./dev test does)"))
}

/// Fails for want of `what`, or says that its test is left out as asked.
pub fn left_out(what: &str, remedy: &str) -> bool {
    let asked = std::env::var("PROXY_HUB_TEST_WITHOUT").is_ok_and(|v| v.split(',').any(|w| w.trim() == what));
    assert!(asked, "{what} is missing: {remedy}, or leave its tests out with PROXY_HUB_TEST_WITHOUT={what}");
    eprintln!("{what} is missing, and its test is left out because PROXY_HUB_TEST_WITHOUT says so");
    false
}

/// A child process that ends with the test.
pub struct Kill(pub std::process::Child);

impl Drop for Kill {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a port").port()
}

/// A Redis of the test's own.
pub struct Redis {
    pub port: u16,
    server: Option<Kill>,
    dir: tempfile::TempDir,
}

impl Redis {
    pub async fn start() -> Option<Self> {
        if !need("redis-server", "redis-server") {
            return None;
        }
        let mut redis = Self { port: free_port(), server: None, dir: tempfile::tempdir().expect("dir") };
        redis.resume().await;
        Some(redis)
    }

    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    /// Kills it: what was in it is lost.
    pub fn kill(&mut self) {
        self.server = None;
    }

    pub async fn resume(&mut self) {
        let child = std::process::Command::new("redis-server")
            .args(["--port", &self.port.to_string(), "--bind", "127.0.0.1", "--save", "", "--dir"])
            .arg(self.dir.path())
            .stdout(std::process::Stdio::null())
            .spawn()
            .expect("starts");
        self.server = Some(Kill(child));
        up(SocketAddr::from(([127, 0, 0, 1], self.port))).await;
    }
}

/// Waits until something listens.
pub async fn up(addr: SocketAddr) {
    until(&format!("{addr} listens"), || std::net::TcpStream::connect(addr).is_ok()).await;
}

/// A PostgreSQL of the test's own, on a Unix socket, ended with the test.
pub struct Postgres {
    server: Option<Kill>,
    bin: std::path::PathBuf,
    user: Option<(u32, u32)>,
    dir: tempfile::TempDir,
}

impl Postgres {
    pub async fn start() -> Option<Self> {
        let newest = std::fs::read_dir("/usr/lib/postgresql")
            .into_iter()
            .flatten()
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok())
            .max();
        let Some(version) = newest else {
            left_out("postgresql", "install the package postgresql (./dev test does)");
            return None;
        };
        let bin = std::path::PathBuf::from(format!("/usr/lib/postgresql/{version}/bin"));
        let dir = tempfile::tempdir().expect("dir");
        use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
        std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o711)).expect("permissions");
        // PostgreSQL refuses to run as root: then it runs as the user of its package.
        let root = std::fs::metadata("/proc/self").is_ok_and(|m| m.uid() == 0);
        let user = root.then(|| {
            let users = std::fs::read_to_string("/etc/passwd").expect("users");
            let line = users.lines().find(|l| l.starts_with("postgres:")).expect("a user postgres");
            let mut fields = line.split(':').skip(2).map(|f| f.parse::<u32>().expect("a number"));
            (fields.next().expect("uid"), fields.next().expect("gid"))
        });
        let mut postgres = Self { server: None, bin, user, dir };
        let data = postgres.dir.path().join("data");
        std::fs::create_dir(&data).expect("data");
        if let Some((uid, gid)) = user {
            for path in [data.as_path(), postgres.dir.path()] {
                std::os::unix::fs::chown(path, Some(uid), Some(gid)).expect("owner");
            }
        }
        let made = postgres
            .command("initdb")
            .args(["--auth=trust", "--encoding=UTF8", "--locale=C.UTF-8", "--no-sync", "--username=hub", "-D"])
            .arg(&data)
            .output()
            .expect("starts");
        assert!(made.status.success(), "initdb: {}", String::from_utf8_lossy(&made.stderr));
        postgres.resume().await;
        Some(postgres)
    }

    fn command(&self, program: &str) -> std::process::Command {
        use std::os::unix::process::CommandExt as _;
        let mut command = std::process::Command::new(self.bin.join(program));
        command.current_dir("/").stdin(std::process::Stdio::null()).stdout(std::process::Stdio::null());
        if let Some((uid, gid)) = self.user {
            command.uid(uid).gid(gid);
        }
        command
    }

    pub fn url(&self) -> String {
        let host = self.dir.path().display().to_string().replace('/', "%2F");
        format!("postgres://hub@localhost/postgres?host={host}")
    }

    /// Stops it as a crash would, with its data kept.
    pub fn kill(&mut self) {
        if let Some(server) = self.server.take() {
            let pid = nix::unistd::Pid::from_raw(server.0.id() as i32);
            // Its children end with it only if it is asked; SIGQUIT is the immediate shutdown.
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGQUIT);
            let mut server = server;
            let _ = server.0.wait();
        }
    }

    pub async fn resume(&mut self) {
        let log = std::fs::File::create(self.dir.path().join("log")).expect("log");
        let child = self
            .command("postgres")
            .args(["-c", "listen_addresses=", "-c", "fsync=off", "-c", "shared_buffers=16MB", "-c"])
            .arg(format!("unix_socket_directories={}", self.dir.path().display()))
            .arg("-D")
            .arg(self.dir.path().join("data"))
            .stderr(log)
            .spawn()
            .expect("starts");
        self.server = Some(Kill(child));
        let began = Instant::now();
        while !self.command("pg_isready").arg("-h").arg(self.dir.path()).status().is_ok_and(|s| s.success()) {
            let log = std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default();
            assert!(began.elapsed() < Duration::from_secs(30), "PostgreSQL does not come up: {log}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        self.kill();
    }
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
    text: String,
    pub server: Server,
    pub dir: tempfile::TempDir,
    pub fleet: Fleet,
    stop: Stop,
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
        Self { text, server, dir, fleet: Fleet::default(), stop: Stop(watch::channel(false).0) }
    }

    /// Ends its peers, drains the hub and starts it anew on the same data, at other ports.
    pub async fn restart(self) -> Self {
        let Self { text, server, dir, stop, .. } = self;
        drop(stop);
        server.drain(Duration::from_secs(1)).await.expect("drained");
        let server = Server::start(Config::parse(&text, "test").expect("valid")).await.expect("starts");
        Self { text, server, dir, fleet: Fleet::default(), stop: Stop(watch::channel(false).0) }
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
        tokio::spawn(peer::run(options, self.fleet.clone(), self.stop.0.subscribe()))
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

/// Tells peers to end.
struct Stop(watch::Sender<bool>);

impl Drop for Stop {
    fn drop(&mut self) {
        let _ = self.0.send(true);
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
                // What the client still sends is read: a close on top of it would reset the connection and take the answer
                // along.
                while stream.read(&mut buf).await.is_ok_and(|n| n > 0) {}
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
    run_within(Duration::from_secs(30), program, args).await
}

pub async fn run_within(limit: Duration, program: &str, args: &[&str]) -> (Option<i32>, String, String) {
    let out = tokio::time::timeout(
        limit,
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
