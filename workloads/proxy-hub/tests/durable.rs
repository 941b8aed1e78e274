//! What survives: the hub killed and restarted, several hubs, databases.

mod common;

use common::{config, has, hex, nightly, source_origin, until};
use proxy_hub::load;
use proxy_hub::peer::{self, Fleet, Options};
use proxy_hub::server::Server;
use serde_json::Value;
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::watch;

/// A child process that ends with the test.
struct Kill(Child);

impl Drop for Kill {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a port").port()
}

async fn get(api: SocketAddr, path: &str) -> (u16, Value) {
    send(api, "GET", path, "").await
}

async fn send(api: SocketAddr, method: &str, path: &str, body: &str) -> (u16, Value) {
    let mut stream = TcpStream::connect(api).await.expect("connect");
    let text = format!(
        "{method} {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(text.as_bytes()).await.expect("write");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.expect("read");
    let status = answer.split(' ').nth(1).and_then(|s| s.parse().ok()).expect("status");
    let body = answer.split_once("\r\n\r\n").map_or("", |(_, b)| b);
    (status, serde_json::from_str(body).unwrap_or(Value::Null))
}

fn serve(file: &Path) -> Kill {
    let child = Command::new(env!("CARGO_BIN_EXE_proxy-hub"))
        .args(["serve", "--config"])
        .arg(file)
        .env("RUST_LOG", "warn")
        .stdout(Stdio::null())
        .spawn()
        .expect("starts");
    Kill(child)
}

async fn up(addr: SocketAddr) {
    until("the hub is up", || std::net::TcpStream::connect(addr).is_ok()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_hub_comes_back_with_all_peers_and_an_exact_ledger() {
    let (count, rounds) = if nightly("kills") { (200, 10) } else { (40, 2) };
    let dir = tempfile::tempdir().expect("dir");
    let (peers, customers, api) = (free_port(), free_port(), free_port());
    let text = config(
        dir.path(),
        &format!("[peers]\nlisten = \"127.0.0.1:{peers}\"\nmin_version = \"0.1\"\n[customers]\nlisten = \"127.0.0.1:{customers}\"\n"),
        "",
    )
    .replace("[api]\nlisten = \"127.0.0.1:0\"", &format!("[api]\nlisten = \"127.0.0.1:{api}\""));
    let file = dir.path().join("hub.toml");
    std::fs::write(&file, text).expect("config");
    let at = |port: u16| SocketAddr::from(([127, 0, 0, 1], port));
    let mut hub = serve(&file);
    up(at(api)).await;

    let fleet = Fleet::default();
    let (_stop, stopped) = watch::channel(false);
    for n in 0..count {
        let options = Options {
            policy: Arc::new(common::lab()),
            source: Some(load::source(n)),
            backoff_most: Duration::from_millis(300),
            ..Options::new(at(peers), format!("sim-{n}"))
        };
        tokio::spawn(peer::run(options, fleet.clone(), stopped.clone()));
    }
    let origin = load::echo().await.expect("origin");
    let endless = source_origin(1 << 40).await;
    let mut moved = (0u64, 0u64);
    for round in 0..rounds {
        until("all peers are back", || fleet.counts.ready.load(Relaxed) == count).await;
        // Finished transfers: known to the byte on both sides.
        for i in 0..20u64 {
            let size = 10_000 + i * 777 + round;
            let mut stream = load::socks(at(customers), "alice", "key", origin).await.expect("answer").expect("open");
            stream.write_all(&vec![1; size as usize]).await.expect("write");
            let mut back = vec![0; size as usize];
            stream.read_exact(&mut back).await.expect("read");
            moved.0 += size;
            moved.1 += size;
        }
        // One under way: what its client has got by the end must be billed, and nothing beyond the kernel's buffers.
        let mut stream = load::socks(at(customers), "alice", "key", endless).await.expect("answer").expect("open");
        let mut buf = vec![0; 64 * 1024];
        let mut got = 0u64;
        while got < 3 << 20 {
            got += stream.read(&mut buf).await.expect("read") as u64;
        }
        // Killed without warning, at most a moment after the last byte: the ledger has not been folded.
        hub.0.kill().expect("killed");
        hub.0.wait().expect("gone");
        loop {
            match stream.read(&mut buf).await {
                Ok(0) | Err(_) => break,
                Ok(n) => got += n as u64,
            }
        }
        hub = serve(&file);
        up(at(api)).await;
        let (status, usage) = get(at(api), "/v1/customers/alice/usage").await;
        assert_eq!(status, 200);
        let (up, down) = (usage["total"]["up"].as_u64().expect("up"), usage["total"]["down"].as_u64().expect("down"));
        assert_eq!(up, moved.0, "round {round}");
        // A reset may take what lay in the kernel's buffers from the client: it was sent, and is billed.
        let lost =
            down.checked_sub(moved.1 + got).unwrap_or_else(|| panic!("{down} billed, {} arrived", moved.1 + got));
        assert!(lost <= 6 << 20, "{lost} bytes billed that never arrived");
        moved.1 = down;
    }
    until("all peers are back", || fleet.counts.ready.load(Relaxed) == count).await;
    drop(hub);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drained_hub_takes_no_more_and_lets_tunnels_finish() {
    let dir = tempfile::tempdir().expect("dir");
    let text = config(dir.path(), "", "");
    let server = Server::start(proxy_hub::config::Config::parse(&text, "test").expect("valid")).await.expect("starts");
    let fleet = Fleet::default();
    let (_stop, stopped) = watch::channel(false);
    for n in 0..3 {
        let options = Options {
            policy: Arc::new(common::lab()),
            source: Some(load::source(n)),
            ..Options::new(server.peers, format!("sim-{n}"))
        };
        tokio::spawn(peer::run(options, fleet.clone(), stopped.clone()));
    }
    until("registered", || server.shared.registry.len() == 3).await;
    let origin = load::echo().await.expect("origin");
    let (customers, shared) = (server.customers, server.shared.clone());
    let mut stream = load::socks(customers, "alice", "key", origin).await.expect("answer").expect("open");
    let drained = tokio::spawn(server.drain(Duration::from_secs(10)));
    until("it takes no more", || std::net::TcpStream::connect(customers).is_err()).await;
    until("idle peers were sent away", || shared.registry.len() == 1).await;
    stream.write_all(b"still here").await.expect("write");
    let mut back = [0; 10];
    stream.read_exact(&mut back).await.expect("read");
    assert_eq!(&back, b"still here");
    drop(stream);
    until("the tunnel ended", || shared.metrics.tunnels.load(Relaxed) == 0).await;
    tokio::time::timeout(Duration::from_secs(15), drained).await.expect("in time").expect("joined").expect("drained");
    assert_eq!(shared.accounts.get("alice").map(|a| a.counter.totals().bytes()), Some(20));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn customers_made_over_the_api_are_kept_and_usage_is_told() {
    let dir = tempfile::tempdir().expect("dir");
    let text = config(dir.path(), "", "");
    let start = || async {
        Server::start(proxy_hub::config::Config::parse(&text, "test").expect("valid")).await.expect("starts")
    };
    let server = start().await;
    let body = format!("{{\"name\":\"new\",\"key_sha256\":[\"{}\"],\"limits\":{{\"tunnels\":5}}}}", hex("k"));
    assert_eq!(send(server.api, "PUT", "/v1/customers/new", &body).await.0, 204);
    assert_eq!(send(server.api, "PUT", "/v1/customers/other", &body).await.0, 400);
    assert_eq!(send(server.api, "PUT", "/v1/customers/alice", &body.replace("new", "alice")).await.0, 409);
    let (status, problem) = send(server.api, "PUT", "/v1/customers/bad", "{\"name\":\"bad\"}").await;
    assert_eq!((status, problem["detail"].as_str().is_some_and(|d| d.contains("neither key_sha256"))), (400, true));
    server.drain(Duration::from_secs(1)).await.expect("drained");

    let server = start().await;
    let (status, view) = get(server.api, "/v1/customers/new").await;
    assert_eq!((status, view["limits"]["tunnels"].as_u64()), (200, Some(5)));
    assert!(server.shared.accounts.login("new", "k", "127.0.0.1".parse().expect("ip")).is_ok());
    assert_eq!(get(server.api, "/v1/customers/nobody/usage").await.0, 404);
    assert_eq!(send(server.api, "DELETE", "/v1/customers/new", "").await.0, 204);
    assert_eq!(get(server.api, "/v1/customers/new").await.0, 404);
    assert_eq!(get(server.api, "/health").await.0, 200);
    assert_eq!(get(server.api, "/v1/peers?country=xyz").await.0, 400);

    // The metrics have the names that dashboards were made for.
    let mut stream = TcpStream::connect(server.api).await.expect("connect");
    stream.write_all(b"GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await.expect("write");
    let mut metrics = String::new();
    stream.read_to_string(&mut metrics).await.expect("read");
    for name in [
        "ws_connections_active",
        "proxy_requests_total",
        "proxy_bytes_transferred",
        "node_registration_latency_ms",
        "proxy_request_latency_ms",
        "system_memory_used_percent",
        "system_cpu_used_percent",
        "postgres_connections_active",
        "runtime_tasks",
    ] {
        assert!(metrics.lines().any(|l| l.starts_with(name)), "{name} is missing");
    }
    let (status, document) = get(server.api, "/openapi.json").await;
    assert_eq!(status, 200);
    assert!(document["paths"].as_object().is_some_and(|p| p.len() >= 8));
    server.drain(Duration::from_secs(1)).await.expect("drained");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_hubs_share_their_peers_and_their_sessions() {
    if !has("redis-server") {
        return;
    }
    let dir = tempfile::tempdir().expect("dir");
    let redis = free_port();
    let _redis = Kill(
        Command::new("redis-server")
            .args(["--port", &redis.to_string(), "--bind", "127.0.0.1", "--save", "", "--dir"])
            .arg(dir.path())
            .stdout(Stdio::null())
            .spawn()
            .expect("starts"),
    );
    up(SocketAddr::from(([127, 0, 0, 1], redis))).await;
    let mut servers = Vec::new();
    for name in ["east", "west"] {
        let home = dir.path().join(name);
        std::fs::create_dir_all(&home).expect("dir");
        let text = config(
            &home,
            &format!(
                "[hub]\nname = \"{name}\"\ndata = {:?}\nshards = 2\n[directory]\nredis = \"redis://127.0.0.1:{redis}\"\nrelay_listen = \"127.0.0.1:0\"\nsecret = \"a secret of both hubs\"\n",
                home.join("data")
            ),
            "",
        );
        servers.push(
            Server::start(proxy_hub::config::Config::parse(&text, "test").expect("valid")).await.expect("starts"),
        );
    }
    // All of Germany is on the west hub, both have American peers.
    let fleet = Fleet::default();
    let (_stop, stopped) = watch::channel(false);
    for n in 0..60 {
        let source = load::source(n);
        let german = common::country_of(&source.to_string()) == "DE";
        let hub = &servers[if german { 1 } else { n % 2 }];
        let options = Options {
            policy: Arc::new(common::lab()),
            source: Some(source),
            ..Options::new(hub.peers, format!("sim-{n}"))
        };
        tokio::spawn(peer::run(options, fleet.clone(), stopped.clone()));
    }
    until("peers registered", || fleet.counts.ready.load(Relaxed) == 60).await;
    until("the hubs know each other", || {
        servers[0].shared.others.read().contains_key("DE") && servers[1].shared.others.read().contains_key("US")
    })
    .await;

    let origin = load::echo().await.expect("origin");
    let exchange = |customers: SocketAddr, user: &'static str| async move {
        let mut stream = load::socks(customers, user, "key", origin)
            .await
            .expect("answer")
            .unwrap_or_else(|c| panic!("{user}: reply {c}"));
        let sent = vec![3; 200_000];
        let (mut read, mut write) = stream.split();
        let mut back = Vec::new();
        let (wrote, got) = tokio::join!(
            async {
                write.write_all(&sent).await?;
                write.shutdown().await
            },
            read.read_to_end(&mut back)
        );
        wrote.expect("written");
        got.expect("read");
        assert!(back == sent);
    };
    // A German exit for a customer of the east hub: carried by west, billed by east.
    exchange(servers[0].customers, "alice-country-de").await;
    assert_eq!(servers[0].shared.metrics.relayed.load(Relaxed), 1);
    let billed = |s: &Server| s.shared.accounts.get("alice").map(|a| a.counter.totals()).map(|t| (t.up, t.down));
    until("billed by east", || billed(&servers[0]) == Some((200_000, 200_000))).await;
    assert_eq!(billed(&servers[1]), Some((0, 0)));

    // One session through either hub leaves through one and the same peer.
    let busiest = || {
        let mut all = Vec::new();
        for server in &servers {
            all.extend(server.shared.registry.page(0, 100, None, 0).0.into_iter().map(|v| (v.device, v.bytes)));
        }
        all
    };
    let quiet = || servers.iter().all(|s| s.shared.metrics.tunnels.load(Relaxed) == 0);
    until("quiet", quiet).await;
    let mut used = std::collections::HashSet::new();
    for round in 0..6 {
        let before = busiest();
        exchange(servers[round % 2].customers, "alice-country-us-session-shared").await;
        until("quiet", quiet).await;
        for (device, bytes) in busiest() {
            if !before.contains(&(device.clone(), bytes)) {
                used.insert(device);
            }
        }
    }
    assert_eq!(used.len(), 1, "{used:?}");

    // What nobody has is refused, and an unsigned order is not obeyed.
    assert_eq!(
        load::socks(servers[0].customers, "alice-country-br", "key", origin).await.expect("answer").err(),
        Some(3)
    );
    let mut forged = TcpStream::connect(servers[1].relay.expect("relay")).await.expect("connect");
    let order = proxy_hub::relay::Order {
        account: "alice".into(),
        dest: origin.to_string(),
        target: "country-DE".into(),
        time: proxy_hub::hub::unix_now(),
    };
    forged.write_all(&proxy_hub::relay::encode(&order, "not the secret at all")).await.expect("write");
    let mut rest = Vec::new();
    let _ = tokio::time::timeout(Duration::from_secs(5), forged.read_to_end(&mut rest)).await.expect("closed in time");
    assert!(rest.is_empty());

    // The other hub goes: this one says so and serves its own.
    let west = servers.pop().expect("west");
    west.drain(Duration::from_secs(1)).await.expect("drained");
    until("west is forgotten", || !servers[0].shared.others.read().contains_key("DE")).await;
    exchange(servers[0].customers, "alice-country-us").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_ledger_in_postgresql_is_as_exact() {
    let Ok(url) = std::env::var("PROXY_HUB_TEST_POSTGRES") else {
        eprintln!("PROXY_HUB_TEST_POSTGRES is not set (postgres://user@host/an-empty-database): left out");
        return;
    };
    use proxy_hub::ledger::Ledger;
    use proxy_hub::tally::{Tally, Totals};
    use std::collections::HashMap;
    let dir = tempfile::tempdir().expect("dir");
    let name = format!("c{}", std::process::id());
    let (a, b) = (format!("a-{name}"), format!("b-{name}"));
    let mut want = Totals::default();
    for hub in [&a, &b] {
        let ledger = Ledger::postgres(&url, hub).await.expect("open");
        let tally = Tally::open(&dir.path().join(hub)).expect("tally");
        let counter = tally.counter(&name).expect("counter");
        for i in 0..5u64 {
            counter.up(i * 10);
            counter.down(1);
            want = want.plus(Totals { up: i * 10, down: 1, requests: 0 });
            for _ in 0..2 {
                ledger
                    .fold(&tally.all(), &HashMap::from([(format!("d-{name}"), 1)]), 7200 + i as i64)
                    .await
                    .expect("fold");
            }
        }
        // The counters are lost, the ledger is not; nothing is billed twice.
        let fresh = Tally::open(&dir.path().join(format!("{hub}-fresh"))).expect("tally");
        ledger.recover(&fresh, 7300).await.expect("recover");
        ledger.fold(&fresh.all(), &HashMap::new(), 7300).await.expect("fold");
        ledger.put_customer(&name, Some("{}")).await.expect("put");
        assert!(ledger.customers().await.expect("list").iter().any(|(n, _)| *n == name));
        ledger.put_customer(&name, None).await.expect("delete");
    }
    let ledger = Ledger::postgres(&url, &a).await.expect("open");
    let windows = ledger.usage(&name, 0, i64::MAX).await.expect("usage");
    assert_eq!(windows.iter().map(|w| (w.hour, w.totals)).collect::<Vec<_>>(), [(7200, want)]);
    assert_eq!(ledger.peer_usage(&format!("d-{name}")).await.expect("usage"), [(0, 20)]);
}
