//! What an operator does and sees: the command line, the live page, reloads, limits of who may come in.

use crate::common::{self, Kill, TestHub, config, free_port, hex, http_origin, need, run, run_within, until, up};
use proxy_hub::load::{self, echo};
use std::net::SocketAddr;
use std::process::{Command, Stdio};
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const HUB: &str = env!("CARGO_BIN_EXE_proxy-hub");

#[tokio::test]
async fn a_wrong_configuration_is_refused_with_file_line_and_remedy() {
    let dir = tempfile::tempdir().expect("dir");
    let file = dir.path().join("hub.toml");
    for (text, line, says) in [
        ("[hub]\nnam = \"x\"\n", 2, "unknown field `nam`"),
        ("[peers]\n\nheartbeat_seconds = 60\n", 3, "must be 1 to 14"),
        ("[api]\nlisten = \"0.0.0.0:8080\"\n", 2, "set token_sha256"),
        ("[policy]\nallow = [\"10.0.0.0/33\"]\n", 2, "allow: "),
        ("[customers]\nlisten = \"1080\"\n", 2, "invalid socket address"),
        ("[[customer]]\nname = \"a\"\nkey_sha256 = [\"secret\"]\n", 2, "sha256sum"),
        ("[[customer]]\nname = \"a\"\n", 2, "neither key_sha256 nor allow_ips"),
        ("[hub\n", 1, ""),
    ] {
        std::fs::write(&file, text).expect("config");
        let path = file.display().to_string();
        for command in ["check", "serve"] {
            let (code, _, err) = run(HUB, &[command, "--config", &path]).await;
            assert_eq!(code, Some(1), "{command} {text}: {err}");
            assert!(err.contains(&format!("{path}:{line}: ")) && err.contains(says), "{text:?} gives {err}");
            assert!(!err.contains("\"secret\""), "a key is shown: {err}");
        }
    }
    let (code, _, err) = run(HUB, &["check", "--config", "/nowhere/hub.toml"]).await;
    assert!(code == Some(1) && err.contains("/nowhere/hub.toml") && err.contains("--config"), "{err}");
    let example = concat!(env!("CARGO_MANIFEST_DIR"), "/proxy-hub.example.toml");
    assert_eq!(run(HUB, &["check", "--config", example]).await.0, Some(0), "the example is valid");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_whole_thing_runs_on_one_machine_in_one_command() {
    let (code, out, err) = run(HUB, &["load", "--peers", "300", "--requests", "300", "--at-once", "20"]).await;
    assert_eq!(code, Some(0), "{err}");
    assert!(out.contains("300 of 300 peers registered"), "{out}");
    assert_eq!(out.matches("300 requests").count(), 3, "{out}");
    assert_eq!(out.matches(" 0 failed").count(), 3, "{out}");
}

/// A hub and a peer as programs of their own: reload without a break, a peer that leaves at once when told.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reload_changes_customers_and_policy_and_breaks_nothing() {
    let dir = tempfile::tempdir().expect("dir");
    let (peers, customers, api) = (free_port(), free_port(), free_port());
    let at = |port: u16| SocketAddr::from(([127, 0, 0, 1], port));
    let write = |customers_text: &str, policy: &str| {
        let text = config(
            dir.path(),
            &format!("[peers]\nlisten = \"127.0.0.1:{peers}\"\nmin_version = \"0.1\"\n[customers]\nlisten = \"127.0.0.1:{customers}\"\n[policy]\n{policy}"),
            customers_text,
        )
        .replace("[api]\nlisten = \"127.0.0.1:0\"", &format!("[api]\nlisten = \"127.0.0.1:{api}\""));
        std::fs::write(dir.path().join("hub.toml"), text).expect("config");
    };
    let customer = |name: &str| format!("[[customer]]\nname = \"{name}\"\nkey_sha256 = [\"{}\"]\n", hex("key"));
    let open = "allow = [\"127.0.0.0/8\"]\n";
    write(&(customer("alice") + &customer("bob")), open);
    let file = dir.path().join("hub.toml").display().to_string();
    let hub = Kill(Command::new(HUB).args(["serve", "--config", &file]).stderr(Stdio::null()).spawn().expect("starts"));
    up(at(api)).await;
    let mut peer = Kill(
        Command::new(HUB)
            .args([
                "peer",
                "--hub",
                &format!("127.0.0.1:{peers}"),
                "--device",
                "d",
                "--consent",
                "--allow",
                "127.0.0.0/8",
            ])
            .stderr(Stdio::null())
            .spawn()
            .expect("starts"),
    );
    let origin = echo().await.expect("origin");
    let socks = async |user: &str| load::socks(at(customers), user, "key", origin).await.expect("answer");
    let became = async |user: &str, want: Option<u8>| {
        let began = Instant::now();
        loop {
            let got = socks(user).await.err();
            if got == want {
                break;
            }
            assert!(began.elapsed() < Duration::from_secs(15), "{user}: {got:?} and not {want:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    became("alice", None).await;
    let mut held = socks("bob").await.expect("open");
    let reload = || {
        let pid = nix::unistd::Pid::from_raw(hub.0.id() as i32);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGHUP).expect("told");
    };
    // A broken file changes nothing.
    std::fs::write(&file, "[hub\n").expect("config");
    reload();
    // bob goes, carol comes, a port is closed.
    write(&(customer("alice") + &customer("carol")), open);
    reload();
    became("carol", None).await;
    became("bob", Some(0xff)).await;
    held.write_all(b"bob's open tunnel goes on").await.expect("write");
    let mut back = [0; 25];
    held.read_exact(&mut back).await.expect("read");
    write(&(customer("alice") + &customer("carol")), &format!("{open}deny_ports = [{}]\n", origin.port()));
    reload();
    became("alice", Some(2)).await;
    // A customer that a later reload takes away again is gone too.
    write(&customer("alice"), open);
    reload();
    became("carol", Some(0xff)).await;
    became("alice", None).await;
    // The peer leaves when told, tunnels or not, and not at some deadline of its own.
    let pid = nix::unistd::Pid::from_raw(peer.0.id() as i32);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).expect("told");
    let began = Instant::now();
    until("the peer has left", || peer.0.try_wait().is_ok_and(|s| s.is_some())).await;
    assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
    became("alice", Some(3)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_live_page_shows_what_happens_in_a_browser() {
    if !need("chromium", "chromium") {
        return;
    }
    let hub = TestHub::start().await;
    hub.peers(10).await;
    let origin = echo().await.expect("origin");
    let mut stream = hub.socks("alice", "key", origin).await.expect("open");
    stream.write_all(&[1; 1500]).await.expect("write");
    let mut back = [0; 1500];
    stream.read_exact(&mut back).await.expect("read");
    let url = format!("http://{}/", hub.server.api);
    let profile = hub.dir.path().join("browser").display().to_string();
    let args = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        // It asks nobody but the hub.
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-extensions",
        "--disable-sync",
        "--no-proxy-server",
        &format!("--user-data-dir={profile}"),
        "--virtual-time-budget=3500",
        "--dump-dom",
        &url,
    ];
    // On a busy machine a browser takes its time to start.
    let (code, out, err) = run_within(Duration::from_secs(120), "chromium", &args).await;
    assert_eq!(code, Some(0), "{err}");
    for shown in [
        "<dt>Peers</dt><dd>10</dd>",
        "<dt>Tunnels</dt><dd>1</dd>",
        "<td>alice</td>",
        "1.5 kB",
        "<td>US</td>",
        "d=\"M0 ",
    ] {
        assert!(out.contains(shown), "{shown} is not on the page: {out}");
    }
    assert!(!out.contains(">The hub does not answer"), "{out}");
}

#[tokio::test]
async fn the_api_wants_its_token() {
    let hub = TestHub::start().await;
    drop(hub);
    let dir = tempfile::tempdir().expect("dir");
    let text = config(dir.path(), "", "").replace(
        "[api]\nlisten = \"127.0.0.1:0\"",
        &format!("[api]\nlisten = \"127.0.0.1:0\"\ntoken_sha256 = \"{}\"", hex("token")),
    );
    let server = proxy_hub::server::Server::start(proxy_hub::config::Config::parse(&text, "test").expect("valid"))
        .await
        .expect("starts");
    let ask = async |path: &str, token: &str| {
        let mut stream = TcpStream::connect(server.api).await.expect("connect");
        let text =
            format!("GET {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {token}\r\nconnection: close\r\n\r\n");
        stream.write_all(text.as_bytes()).await.expect("write");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.expect("read");
        answer.split(' ').nth(1).and_then(|s| s.parse::<u16>().ok()).expect("status")
    };
    for path in ["/v1/stats", "/v1/peers", "/v1/customers", "/v1/customers/alice/usage", "/metrics", "/openapi.json"] {
        assert_eq!((ask(path, "wrong").await, ask(path, "token").await), (401, 200), "{path}");
    }
    assert_eq!((ask("/health", "").await, ask("/", "").await), (200, 200));
    server.drain(Duration::from_secs(1)).await.expect("drained");
}

/// Sub-users, allow lists, suspension, and the address that a trusted balancer vouches for.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_may_come_in() {
    let customers = format!(
        "[[customer]]\nname = \"office\"\nallow_ips = [\"127.77.0.0/16\"]\n\
         [[customer]]\nname = \"fixed\"\nkey_sha256 = [\"{k}\"]\nallow_ips = [\"127.78.0.1\"]\nonly_from_allowed = true\n\
         [[customer]]\nname = \"late\"\nkey_sha256 = [\"{k}\"]\nsuspended = true\n\
         [[customer]]\nname = \"boss\"\nkey_sha256 = [\"{k}\"]\n[[customer.user]]\nname = \"intern\"\nkey_sha256 = [\"{k2}\"]\n",
        k = hex("key"),
        k2 = hex("other")
    );
    let proxies = "[customers]\nlisten = \"127.0.0.1:0\"\ntrusted_proxies = [\"127.0.0.1\"]\n";
    let hub = TestHub::with(proxies, &customers).await;
    hub.peers(3).await;
    let origin = echo().await.expect("origin");
    let ask = async |source: &str, front: &str, login: Option<(&str, &str)>| {
        let socket = tokio::net::TcpSocket::new_v4().expect("socket");
        socket.bind(format!("{source}:0").parse().expect("addr")).expect("bind");
        let mut stream = socket.connect(hub.server.customers).await.expect("connect");
        let mut bytes = front.as_bytes().to_vec();
        match login {
            None => bytes.extend([5, 1, 0]),
            Some((user, key)) => {
                bytes.extend([5, 1, 2, 1, user.len() as u8]);
                bytes.extend(user.bytes());
                bytes.push(key.len() as u8);
                bytes.extend(key.bytes());
            }
        }
        bytes.extend([5, 1, 0]);
        proxy_hub::socks::put_address(&mut bytes, origin);
        bytes.extend(b"hello");
        stream.write_all(&bytes).await.expect("write");
        let mut all = Vec::new();
        let want = if login.is_some() { 4 } else { 2 } + 10 + 5;
        while all.len() < want && stream.read_buf(&mut all).await.is_ok_and(|n| n > 0) {}
        all.ends_with(b"hello")
    };
    let vouched = |ip: &str| format!("PROXY TCP4 {ip} 127.0.0.1 5000 1080\r\n");
    assert!(ask("127.77.3.4", "", None).await, "the office needs no key");
    assert!(!ask("127.79.3.4", "", None).await, "others do");
    assert!(ask("127.0.0.1", &vouched("127.77.0.9"), None).await, "the balancer vouches");
    assert!(!ask("127.79.0.1", &vouched("127.77.0.9"), None).await, "others cannot");
    assert!(ask("127.78.0.1", "", Some(("fixed", "key"))).await);
    assert!(!ask("127.78.0.2", "", Some(("fixed", "key"))).await, "only from its address");
    assert!(!ask("127.79.0.1", "", Some(("late", "key"))).await, "suspended");
    assert!(ask("127.79.0.1", "", Some(("boss", "key"))).await);
    assert!(ask("127.79.0.1", "", Some(("boss.intern-cc-us", "other"))).await);
    assert!(!ask("127.79.0.1", "", Some(("boss.intern", "key"))).await, "a key of its own");
    hub.quiet().await;
    assert_eq!((hub.billed("boss"), hub.billed("boss.intern"), hub.billed("office")), ((10, 10), (5, 5), (10, 10)));
}

/// What happens when the exit of a session goes: another that fits, another of the country, or none.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn failover_does_what_was_asked() {
    let hub = TestHub::start().await;
    // Miami twice and New York once.
    let mut tasks = Vec::new();
    for (name, ip) in [("miami-1", [127, 2, 0, 1]), ("miami-2", [127, 2, 0, 2]), ("york", [127, 1, 0, 1])] {
        let options = proxy_hub::peer::Options { device: name.into(), source: Some(ip.into()), ..hub.options(0) };
        tasks.push((name, hub.peer(options)));
    }
    hub.registered(3).await;
    let origin = http_origin().await;
    let device_of = async |user: &str| {
        let stream = hub.socks(user, "key", origin).await?;
        let busy = hub.server.shared.registry.page(0, 10, None, 0).0.into_iter().find(|v| v.tunnels > 0);
        drop(stream);
        hub.quiet().await;
        Ok::<_, u8>(busy.expect("one is busy").device)
    };
    let users = ["same", "country", "none"].map(|f| format!("alice-country-us-city-miami-session-{f}-failover-{f}"));
    let mut held = Vec::new();
    for user in &users {
        held.push(device_of(user).await.expect("open"));
        assert!(held.last().is_some_and(|d| d.starts_with("miami")));
    }
    let mut end = async |name: &str| {
        let at = tasks.iter().position(|(n, _)| *n == name).expect("there");
        let (_, task) = tasks.remove(at);
        task.abort();
        let left = tasks.len();
        hub.registered(left).await;
    };
    end("miami-1").await;
    for (user, was) in users.iter().zip(&held) {
        let now = device_of(user).await;
        match was.as_str() {
            "miami-1" if user.ends_with("none") => assert_eq!(now, Err(3), "{user}"),
            _ => assert_eq!(now.as_deref(), Ok("miami-2"), "{user}"),
        }
    }
    end("miami-2").await;
    assert_eq!(device_of(&users[0]).await, Err(3), "no other fits");
    assert_eq!(device_of(&users[1]).await.as_deref(), Ok("york"), "another of the country");
    assert_eq!(device_of(&users[2]).await, Err(3), "none is wanted");
    // Counted a moment after the answer.
    let metrics = &hub.server.shared.metrics;
    until("counted", || metrics.requests(proxy_hub::metrics::Outcome::NoPeer) >= 2).await;
}

/// Floods, resets and half-open connections cost the others nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn floods_and_resets_leave_nothing_behind() {
    let hub = TestHub::with("[customers]\nlisten = \"127.0.0.1:0\"\nhandshake_seconds = 2\n", "").await;
    hub.peers(4).await;
    let metrics = &hub.server.shared.metrics;
    let origin = common::source_origin(1 << 30).await;
    let reset = |stream: &TcpStream| {
        let linger = nix::libc::linger { l_onoff: 1, l_linger: 0 };
        nix::sys::socket::setsockopt(stream, nix::sys::socket::sockopt::Linger, &linger).expect("linger");
    };
    // Half-open: they connect and say nothing, on both ports.
    let mut silent = Vec::new();
    for to in [hub.server.customers, hub.server.peers] {
        for _ in 0..200 {
            silent.push(TcpStream::connect(to).await.expect("connect"));
        }
    }
    // A flood that resets at once, while tunnels run and are reset in the middle.
    let flood = {
        let customers = hub.server.customers;
        tokio::spawn(async move {
            for _ in 0..1500 {
                if let Ok(stream) = TcpStream::connect(customers).await {
                    let linger = nix::libc::linger { l_onoff: 1, l_linger: 0 };
                    let _ = nix::sys::socket::setsockopt(&stream, nix::sys::socket::sockopt::Linger, &linger);
                }
            }
        })
    };
    let mut got = 0u64;
    for _ in 0..20 {
        let mut stream = hub.socks("alice", "key", origin).await.expect("served in the flood");
        let mut buf = vec![0; 100_000];
        stream.read_exact(&mut buf).await.expect("read");
        got += 100_000;
        reset(&stream);
    }
    flood.await.expect("flood");
    // An origin that resets in the middle: its customer sees an end and keeps what came before.
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let rude = listener.local_addr().expect("addr");
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.expect("accept");
        stream.write_all(&[9; 50_000]).await.expect("write");
        let mut go = [0; 1];
        stream.read_exact(&mut go).await.expect("read");
        reset(&stream);
    });
    let mut stream = hub.socks("alice", "key", rude).await.expect("open");
    let mut all = vec![0; 50_000];
    stream.read_exact(&mut all).await.expect("read");
    stream.write_all(b"x").await.expect("write");
    assert_eq!(stream.read(&mut all).await.expect("an end, not an error"), 0);
    drop(stream);
    hub.quiet().await;
    until("the silent are let go", || metrics.customers_connected.load(Relaxed) == 0).await;
    let (up, down) = hub.billed("alice");
    assert_eq!(up, 1);
    // What the kernel took for a customer that reset is billed; it is bounded by the window and the socket's buffers.
    assert!(down >= got + 50_000 && down < got + 50_000 + 20 * (8 << 20), "{down}");
    drop(silent);
}
