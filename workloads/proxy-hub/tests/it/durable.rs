//! What survives: the hub killed and restarted, several hubs, databases.

use crate::common::{self, Kill, Postgres, Redis, config, free_port, hex, nightly, source_origin, until, up};
use proxy_hub::load;
use proxy_hub::peer::{self, Fleet, Options};
use proxy_hub::server::Server;
use proxy_hub::target::Target;
use serde_json::Value;
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::watch;

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
        // A reset may take what lay in the kernel's buffers from the client: it was sent, and is billed, as is what was on
        // its way there when the hub was killed.
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

/// Whether a hub knows another that has peers for the target.
fn knows(server: &Server, target: &str) -> bool {
    let mut wanted = Target::default();
    proxy_hub::target::parse_params(target, &mut wanted).expect("valid");
    server.shared.others.read().iter().any(|hub| hub.places.serve(&wanted))
}

/// A hub that shares a directory with others.
async fn sharing(name: &str, dir: &Path, redis: &Redis, more: &str) -> Server {
    let home = dir.join(name);
    std::fs::create_dir_all(&home).expect("dir");
    let extra = format!(
        "[hub]\nname = \"{name}\"\ndata = {:?}\nshards = 2\n[directory]\nredis = {:?}\nrelay_listen = \"127.0.0.1:0\"\nsecret = \"a secret of both hubs\"\n{more}",
        home.join("data"),
        redis.url()
    );
    let text = config(&home, &extra, "");
    Server::start(proxy_hub::config::Config::parse(&text, "test").expect("valid")).await.expect("starts")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_hubs_share_their_peers_and_their_sessions() {
    let Some(redis) = Redis::start().await else { return };
    let dir = tempfile::tempdir().expect("dir");
    let mut servers =
        vec![sharing("east", dir.path(), &redis, "").await, sharing("west", dir.path(), &redis, "").await];
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
    until("the hubs know each other", || knows(&servers[0], "country-de") && knows(&servers[1], "country-us")).await;

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
        udp: false,
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
    until("west is forgotten", || !knows(&servers[0], "country-de")).await;
    exchange(servers[0].customers, "alice-country-us").await;
}

/// Three hubs, each with other cities of the same country: a customer finds its city from any of them, by TCP and UDP, and
/// a directory that is lost and comes back empty is filled again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_city_is_found_on_whichever_hub_has_it() {
    let Some(mut redis) = Redis::start().await else { return };
    let dir = tempfile::tempdir().expect("dir");
    let mut servers = Vec::new();
    for name in ["a", "b", "c"] {
        servers.push(sharing(name, dir.path(), &redis, "").await);
    }
    // New York, Miami and Los Angeles: the loopback blocks 127.1, 127.2 and 127.3.
    let fleet = Fleet::default();
    let (_stop, stopped) = watch::channel(false);
    for (i, hub) in servers.iter().enumerate() {
        for n in 1..4 {
            let source = std::net::IpAddr::from([127, 1 + i as u8, 0, n]);
            let options = Options {
                policy: Arc::new(common::lab()),
                source: Some(source),
                ..Options::new(hub.peers, format!("{i}-{n}"))
            };
            tokio::spawn(peer::run(options, fleet.clone(), stopped.clone()));
        }
    }
    let cities = ["new_york", "miami", "los_angeles"];
    let all_known = |servers: &[Server]| {
        servers.iter().enumerate().all(|(i, hub)| {
            cities.iter().enumerate().all(|(j, city)| i == j || knows(hub, &format!("country-us-city-{city}")))
        })
    };
    until("all know all", || all_known(&servers)).await;
    let origin = load::echo().await.expect("origin");
    let udp = udp_echo().await;
    for (i, hub) in servers.iter().enumerate() {
        for (j, city) in cities.iter().enumerate() {
            let user = format!("alice-country-us-city-{city}");
            for _ in 0..3 {
                let tunnel = load::socks(hub.customers, &user, "key", origin).await.expect("answer");
                let mut tunnel = tunnel.unwrap_or_else(|code| panic!("{city} from hub {i}: reply {code}"));
                tunnel.write_all(b"through").await.expect("write");
                let mut back = [0; 7];
                tunnel.read_exact(&mut back).await.expect("read");
                assert_eq!(&back, b"through");
                // It is carried where the city is.
                assert!(servers[j].shared.metrics.tunnels.load(Relaxed) > 0);
            }
            let (answer, _control) = udp_exchange(hub.customers, &user, udp, b"a datagram").await;
            assert_eq!(answer, b"a datagram", "{city} from hub {i}");
        }
    }
    let billed: u64 =
        servers.iter().filter_map(|s| s.shared.accounts.get("alice")).map(|a| a.counter.totals().up).sum();
    assert_eq!(billed, 9 * (3 * 7 + 10), "each byte once, where its customer came in");

    // Nobody has it: refused after no more than one try.
    let nobody =
        load::socks(servers[0].customers, "alice-country-us-city-boston", "key", origin).await.expect("answer");
    assert_eq!(nobody.err(), Some(3));
    redis.kill();
    until("each serves its own", || servers.iter().all(|s| s.shared.others.read().is_empty())).await;
    load::socks(servers[0].customers, "alice-city-new_york", "key", origin).await.expect("answer").expect("its own");
    redis.resume().await;
    until("all know all again", || all_known(&servers)).await;
}

async fn udp_echo() -> SocketAddr {
    let socket = tokio::net::UdpSocket::bind("127.0.0.1:0").await.expect("bind");
    let addr = socket.local_addr().expect("addr");
    tokio::spawn(async move {
        let mut buf = [0; 2048];
        while let Ok((n, from)) = socket.recv_from(&mut buf).await {
            let _ = socket.send_to(&buf[..n], from).await;
        }
    });
    addr
}

/// One datagram there and back through an association. The connection keeps the association.
async fn udp_exchange(customers: SocketAddr, user: &str, to: SocketAddr, payload: &[u8]) -> (Vec<u8>, TcpStream) {
    let mut control = TcpStream::connect(customers).await.expect("connect");
    let login = [&[5, 1, 2, 1, user.len() as u8], user.as_bytes(), b"\x03key"].concat();
    control.write_all(&login).await.expect("log in");
    control.write_all(&[5, 3, 0, 1, 0, 0, 0, 0, 0, 0]).await.expect("associate");
    let mut answer = [0; 14];
    control.read_exact(&mut answer).await.expect("answer");
    assert_eq!(answer[..8], [5, 2, 1, 0, 5, 0, 0, 1], "{user}");
    let relay = SocketAddr::from((
        [answer[8], answer[9], answer[10], answer[11]],
        u16::from_be_bytes([answer[12], answer[13]]),
    ));
    let socket = tokio::net::UdpSocket::bind("127.0.0.1:0").await.expect("bind");
    let mut packet = vec![0, 0, 0];
    proxy_hub::socks::put_address(&mut packet, to);
    let header = packet.len();
    packet.extend_from_slice(payload);
    socket.send_to(&packet, relay).await.expect("send");
    let mut back = vec![0; 2048];
    let n = tokio::time::timeout(Duration::from_secs(5), socket.recv(&mut back)).await.expect("in time").expect("recv");
    assert_eq!(back[..header], packet[..header]);
    (back[header..n].to_vec(), control)
}

/// The whole hub on PostgreSQL: the database goes away and comes back, the hub is killed, and the ledger is exact.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hub_on_postgresql_outlives_its_database_and_itself() {
    let Some(mut postgres) = Postgres::start().await else { return };
    let dir = tempfile::tempdir().expect("dir");
    let (peers, customers, api) = (free_port(), free_port(), free_port());
    let text = config(
        dir.path(),
        &format!("[peers]\nlisten = \"127.0.0.1:{peers}\"\nmin_version = \"0.1\"\n[customers]\nlisten = \"127.0.0.1:{customers}\"\n[ledger]\npostgres = {:?}\n", postgres.url()),
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
    let options = Options {
        policy: Arc::new(common::lab()),
        source: Some(load::source(0)),
        backoff_most: Duration::from_millis(300),
        ..Options::new(at(peers), "only")
    };
    tokio::spawn(peer::run(options, fleet.clone(), stopped.clone()));
    let origin = load::echo().await.expect("origin");
    let mut moved = 0;
    let mut transfer = async |bytes: u64| {
        until("the peer is there", || fleet.counts.ready.load(Relaxed) == 1).await;
        let mut stream = loop {
            match load::socks(at(customers), "alice", "key", origin).await.expect("answer") {
                Ok(stream) => break stream,
                // The hub has restarted and the peer has not noticed yet.
                Err(3) => tokio::task::yield_now().await,
                Err(code) => panic!("reply {code}"),
            }
        };
        let sent = vec![1; bytes as usize];
        let mut back = vec![0; bytes as usize];
        let (mut read, mut write) = stream.split();
        let (wrote, got) = tokio::join!(write.write_all(&sent), read.read_exact(&mut back));
        wrote.expect("write");
        got.expect("read");
        moved += bytes;
        moved
    };
    let usage = async || {
        let (status, usage) = get(at(api), "/v1/customers/alice/usage").await;
        (status, usage["total"]["up"].as_u64().unwrap_or(0), usage["total"]["down"].as_u64().unwrap_or(0))
    };
    let billed = async |bytes: u64| {
        let began = std::time::Instant::now();
        while usage().await != (200, bytes, bytes) {
            assert!(began.elapsed() < Duration::from_secs(20), "{:?} and not {bytes}", usage().await);
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let sum = transfer(100_000).await;
    billed(sum).await;
    // Without its database the hub serves on, says so, and keeps its counters.
    postgres.kill();
    transfer(77_777).await;
    assert_eq!(usage().await.0, 503);
    postgres.resume().await;
    let sum = transfer(1).await;
    billed(sum).await;
    // Both die at once, with bytes that no transaction has seen.
    transfer(55_555).await;
    postgres.kill();
    let sum = transfer(1234).await;
    drop(hub);
    postgres.resume().await;
    hub = serve(&file);
    up(at(api)).await;
    billed(sum).await;
    let sum = transfer(10).await;
    billed(sum).await;
    drop(hub);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_ledger_in_postgresql_is_as_exact() {
    let Some(postgres) = Postgres::start().await else { return };
    let url = postgres.url();
    use proxy_hub::ledger::Ledger;
    use proxy_hub::tally::{Tally, Totals, Way};
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
            counter.count(Way::Up, i * 10);
            counter.count(Way::Down, 1);
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
