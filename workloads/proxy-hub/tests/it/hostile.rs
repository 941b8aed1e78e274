//! Hostile bytes on every port, from numbered seeds: nothing panics, nothing is kept, honest customers are served on.
//!
//! `HOSTILE_SEED=n` runs one seed again; `NIGHTLY=1` runs many more than the default.

use crate::common::{self, TestHub, nightly, until};
use clawhq_wire::ws::{self, Opcode, handshake};
use proxy_hub::link::{self, Opened, kind};
use proxy_hub::load::{self, echo};
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

fn seeds(what: &str, short: u64, long: u64) -> std::ops::Range<u64> {
    if let Some(seed) = std::env::var("HOSTILE_SEED").ok().and_then(|s| s.parse().ok()) {
        return seed..seed + 1;
    }
    0..if nightly(what) { long } else { short }
}

fn noise(rng: &mut SmallRng, most: usize) -> Vec<u8> {
    let n = rng.random_range(0..=most);
    (0..n).map(|_| rng.random()).collect()
}

/// Changes a valid text a little, or a lot.
fn mutate(rng: &mut SmallRng, mut bytes: Vec<u8>) -> Vec<u8> {
    for _ in 0..rng.random_range(0..4) {
        let at = rng.random_range(0..=bytes.len());
        match rng.random_range(0..6) {
            0 if at < bytes.len() => bytes[at] = rng.random(),
            1 if at < bytes.len() => bytes[at] ^= 1 << rng.random_range(0..8),
            2 => bytes.truncate(at),
            3 => {
                let more = noise(rng, 40);
                bytes.splice(at..at, more);
            }
            4 => {
                let copy = bytes[at..].to_vec();
                bytes.extend(copy);
            }
            _ if at < bytes.len() => drop(bytes.remove(at)),
            _ => {}
        }
    }
    bytes
}

/// What a customer, or somebody who poses as one, might send.
fn customer_bytes(rng: &mut SmallRng, origin: SocketAddr) -> Vec<u8> {
    let login = b"\x05\x02\x00\x02\x01\x05alice\x03key".to_vec();
    let mut socks = login.clone();
    socks.extend([5, rng.random_range(0..5), 0]);
    match rng.random_range(0..4) {
        0 => socks.extend([3, 9].into_iter().chain(*b"localhost").chain(origin.port().to_be_bytes())),
        1 => socks.extend([4].into_iter().chain([0; 16]).chain([0, 80])),
        _ => proxy_hub::socks::put_address(&mut socks, origin),
    }
    socks.extend(noise(rng, 300));
    let auth = "Proxy-Authorization: Basic YWxpY2U6a2V5\r\n";
    let base = match rng.random_range(0..9) {
        0 => noise(rng, 600),
        1 | 2 => socks,
        3 => format!("CONNECT {origin} HTTP/1.1\r\n{auth}\r\nhello").into_bytes(),
        4 => format!("POST http://{origin}/x HTTP/1.1\r\n{auth}Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\nGET http://{origin}/ HTTP/1.1\r\n\r\n").into_bytes(),
        5 => format!("PUT http://{origin}/x HTTP/1.0\r\n{auth}Content-Length: {}\r\n\r\nabc", rng.random::<u64>()).into_bytes(),
        6 => {
            let mut text = format!("GET http://{origin}/ HTTP/1.1\r\n{auth}").into_bytes();
            for _ in 0..rng.random_range(0..130) {
                text.extend(b"X: ");
                text.extend(noise(rng, 20));
                text.extend(b"\r\n");
            }
            text.extend(b"\r\n");
            text
        }
        7 => [b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2\r\n", &login[..]].concat(),
        _ => [&b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c"[..], &noise(rng, 30)].concat(),
    };
    mutate(rng, base)
}

/// What a peer might send once it is upgraded: frames that are well-formed or nearly so.
fn peer_bytes(rng: &mut SmallRng, compact: bool, streams: &[u32]) -> Vec<u8> {
    let mut out = Vec::new();
    for _ in 0..rng.random_range(1..8) {
        let stream = match rng.random_range(0..3) {
            0 if !streams.is_empty() => streams[rng.random_range(0..streams.len())],
            1 => rng.random_range(0..4),
            _ => rng.random(),
        };
        let (opcode, payload) = if compact {
            let body = match rng.random_range(0..6) {
                0 => link::opened(stream, Opened::parse(rng.random_range(0..9)), rng.random()).split_off(link::HEADER),
                1 => rng.random::<u32>().to_be_bytes().to_vec(),
                2 => serde_json::json!({"device": "x", "version": "9", "consent": true, "udp": true})
                    .to_string()
                    .into_bytes(),
                _ => noise(rng, 3000),
            };
            let what =
                if rng.random_range(0..10) == 0 { rng.random() } else { rng.random_range(kind::HELLO..=kind::DRAIN) };
            (Opcode::Binary, [&link::header(what, stream)[..], &body].concat())
        } else {
            let id = String::from_utf8(link::legacy_id(stream, rng.random()).to_vec()).expect("text");
            let kinds =
                ["hello", "register", "ip_info", "heartbeat", "tunnel_response", "tunnel_data", "disconnect", "odd"];
            match rng.random_range(0..3) {
                0 => (Opcode::Binary, [id.as_bytes(), &[rng.random_range(0..3)], &noise(rng, 500)].concat()),
                1 => (Opcode::Text, serde_json::json!({
                    "type": kinds[rng.random_range(0..kinds.len())], "node_id": "x", "sdk_version": "9.9",
                    "data": {"tunnel_id": id, "success": rng.random::<bool>(), "data": "aGVsbG8=", "eof": rng.random::<bool>(),
                             "device_id": "x", "sdk_version": "9.9"}}).to_string().into_bytes()),
                _ => (Opcode::Text, noise(rng, 200)),
            }
        };
        let mut frame = Vec::new();
        ws::encode_frame(&mut frame, opcode, &payload, Some(rng.random()));
        out.extend(if rng.random_range(0..8) == 0 { mutate(rng, frame) } else { frame });
    }
    out
}

/// Sends in pieces, then leaves in one of the ways there are. Returns what came back.
async fn deliver(rng: &mut SmallRng, stream: &mut TcpStream, bytes: &[u8]) -> Vec<u8> {
    let mut at = 0;
    while at < bytes.len() {
        let n = rng.random_range(1..=(bytes.len() - at).min(700));
        if stream.write_all(&bytes[at..at + n]).await.is_err() {
            break;
        }
        at += n;
        if rng.random_range(0..3) == 0 {
            tokio::task::yield_now().await;
        }
    }
    let mut back = Vec::new();
    match rng.random_range(0..3) {
        0 => {
            let reset = nix::libc::linger { l_onoff: 1, l_linger: 0 };
            let _ = nix::sys::socket::setsockopt(&*stream, nix::sys::socket::sockopt::Linger, &reset);
        }
        1 => {
            let _ = stream.shutdown().await;
            let _ = tokio::time::timeout(Duration::from_millis(300), stream.read_to_end(&mut back)).await;
        }
        _ => drop(tokio::time::timeout(Duration::from_millis(20), stream.read_buf(&mut back)).await),
    }
    back
}

/// Runs all seeds, some at a time, with each seed's own generator.
async fn each<F, T>(seeds: std::ops::Range<u64>, at_once: usize, work: F)
where
    F: Fn(SmallRng) -> T,
    T: Future<Output = ()> + Send + 'static,
{
    let room = Arc::new(tokio::sync::Semaphore::new(at_once));
    let mut tasks = Vec::new();
    for seed in seeds {
        let permit = room.clone().acquire_owned().await.expect("open");
        let task = work(SmallRng::seed_from_u64(seed));
        tasks.push((
            seed,
            tokio::spawn(async move {
                task.await;
                drop(permit);
            }),
        ));
    }
    for (seed, task) in tasks {
        assert!(task.await.is_ok(), "seed {seed}");
    }
}

async fn still_serves(hub: &TestHub, peers: i64) {
    let metrics = &hub.server.shared.metrics;
    until("customers gone", || metrics.customers_connected.load(Relaxed) == 0).await;
    until("tunnels gone", || metrics.tunnels.load(Relaxed) == 0).await;
    until("peers gone", || metrics.peers_connected.load(Relaxed) == peers).await;
    until("the account's tunnels are given back", || {
        hub.server.shared.accounts.get("alice").is_some_and(|a| a.tunnels() == 0)
    })
    .await;
    assert!(!hub.server.is_broken(), "a shard has ended");
    let origin = echo().await.expect("origin");
    let mut stream = hub.socks("alice", "key", origin).await.expect("others are served");
    stream.write_all(b"honest").await.expect("write");
    let mut back = [0; 6];
    stream.read_exact(&mut back).await.expect("read");
    assert_eq!(&back, b"honest");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hostile_customers() {
    let extra = "[customers]\nlisten = \"127.0.0.1:0\"\nhandshake_seconds = 1\nidle_seconds = 5\n";
    for proxies in ["", "trusted_proxies = [\"127.0.0.1\"]\n"] {
        let hub = TestHub::with(&format!("{extra}{proxies}"), "").await;
        hub.peers(3).await;
        let (origin, customers) = (echo().await.expect("origin"), hub.server.customers);
        each(seeds("hostile customers", 400, 20_000), 60, |mut rng| async move {
            let bytes = customer_bytes(&mut rng, origin);
            let mut stream = TcpStream::connect(customers).await.expect("connect");
            deliver(&mut rng, &mut stream, &bytes).await;
        })
        .await;
        still_serves(&hub, 3).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hostile_peers() {
    let hub = TestHub::start().await;
    hub.peers(2).await;
    let to = hub.server.peers;
    each(seeds("hostile peers", 400, 20_000), 60, |mut rng| async move {
        let mut stream = TcpStream::connect(to).await.expect("connect");
        let compact = rng.random::<bool>();
        let protocols: &[&str] = if compact { &[link::COMPACT] } else { &[] };
        let request = handshake::request("hub", "/ws", [9; 16], protocols, "").into_bytes();
        if rng.random_range(0..4) == 0 {
            let request = mutate(&mut rng, request);
            deliver(&mut rng, &mut stream, &request).await;
            return;
        }
        let mut bytes = request;
        if rng.random::<bool>() {
            // Introduced properly first, so that what follows reaches further in.
            let hello = match compact {
                true => {
                    [&link::header(kind::HELLO, 0)[..], br#"{"device":"evil","version":"9","consent":false}"#].concat()
                }
                false => br#"{"type":"register","data":{"device_id":"evil","sdk_version":"9.9"}}"#.to_vec(),
            };
            let opcode = if compact { Opcode::Binary } else { Opcode::Text };
            ws::encode_frame(&mut bytes, opcode, &hello, Some([1, 2, 3, 4]));
        }
        bytes.extend(peer_bytes(&mut rng, compact, &[]));
        deliver(&mut rng, &mut stream, &bytes).await;
    })
    .await;
    still_serves(&hub, 2).await;
}

/// Peers that carry tunnels and say about them whatever comes to mind.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hostile_peers_with_tunnels() {
    let extra = "[customers]\nlisten = \"127.0.0.1:0\"\nopen_seconds = 1\nidle_seconds = 5\n";
    let hub = TestHub::with(extra, "").await;
    let (peers, customers) = (hub.server.peers, hub.server.customers);
    each(seeds("hostile peers with tunnels", 60, 1_500), 1, |mut rng| async move {
        let mut stream = TcpStream::connect(peers).await.expect("connect");
        let compact = rng.random_range(0..3) > 0;
        let protocols: &[&str] = if compact { &[link::COMPACT] } else { &[] };
        let mut bytes = handshake::request("hub", "/ws", [9; 16], protocols, "").into_bytes();
        let hello = match compact {
            true => {
                [&link::header(kind::HELLO, 0)[..], br#"{"device":"evil","version":"9","consent":true,"udp":true}"#]
                    .concat()
            }
            false => br#"{"type":"register","data":{"device_id":"evil","sdk_version":"9.9"}}"#.to_vec(),
        };
        ws::encode_frame(&mut bytes, if compact { Opcode::Binary } else { Opcode::Text }, &hello, Some([1, 2, 3, 4]));
        stream.write_all(&bytes).await.expect("write");
        // The welcome shows that it is registered.
        let mut heard = Vec::new();
        let welcome: &[u8] = if compact { b"heartbeat_seconds" } else { b"registration_success" };
        while !heard.windows(welcome.len()).any(|w| w == welcome) {
            assert!(stream.read_buf(&mut heard).await.expect("read") > 0, "closed");
        }
        let clients: Vec<_> = (0..3)
            .map(|i| {
                tokio::spawn(async move {
                    let to: SocketAddr = "127.0.0.1:9".parse().expect("addr");
                    if let Ok(Ok(mut tunnel)) = load::socks(customers, "alice", "key", to).await {
                        let _ = tunnel.write_all(&vec![i; 100_000]).await;
                        let mut rest = Vec::new();
                        let _ = tokio::time::timeout(Duration::from_millis(100), tunnel.read_to_end(&mut rest)).await;
                    }
                })
            })
            .collect();
        // The streams that it was asked to open, by whatever of the messages is there yet.
        let mut more = [0; 65536];
        let n = tokio::time::timeout(Duration::from_millis(200), stream.read(&mut more))
            .await
            .map_or(0, |r| r.unwrap_or(0));
        let mut streams: Vec<u32> = more[..n]
            .windows(5)
            .filter(|w| w[0] == kind::OPEN)
            .map(|w| u32::from_be_bytes([w[1], w[2], w[3], w[4]]))
            .collect();
        let text = String::from_utf8_lossy(&more[..n]).into_owned();
        streams.extend(text.split("tunnel_id\":\"").skip(1).filter_map(|t| u32::from_str_radix(t.get(..8)?, 16).ok()));
        for _ in 0..rng.random_range(1..6) {
            let mut bytes = Vec::new();
            if compact && let Some(stream) = streams.first() {
                let opened = link::opened(*stream, Opened::Ok, rng.random());
                ws::encode_frame(&mut bytes, Opcode::Binary, &opened, Some([1, 2, 3, 4]));
            }
            bytes.extend(peer_bytes(&mut rng, compact, &streams));
            if stream.write_all(&bytes).await.is_err() {
                break;
            }
        }
        deliver(&mut rng, &mut stream, &[]).await;
        drop(stream);
        for client in clients {
            client.await.expect("client");
        }
    })
    .await;
    until("the hostile ones are gone", || hub.server.shared.registry.is_empty()).await;
    hub.peers(1).await;
    still_serves(&hub, 1).await;
}

/// The reference peer trusts its hub with nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hostile_hub_does_not_break_a_peer() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let addr = listener.local_addr().expect("addr");
    let fleet = proxy_hub::peer::Fleet::default();
    let (_stop, stopped) = tokio::sync::watch::channel(false);
    let options = proxy_hub::peer::Options {
        backoff_most: Duration::from_millis(1),
        policy: Arc::new(common::lab()),
        ..proxy_hub::peer::Options::new(addr, "victim")
    };
    let peer = tokio::spawn(proxy_hub::peer::run(options, fleet, stopped));
    for seed in seeds("hostile hub", 150, 5_000) {
        let mut rng = SmallRng::seed_from_u64(seed);
        let (mut stream, _) = tokio::time::timeout(Duration::from_secs(20), listener.accept())
            .await
            .unwrap_or_else(|_| panic!("the peer does not come back after seed {}", seed.saturating_sub(1)))
            .expect("accept");
        let mut head = Vec::new();
        while !head.windows(4).any(|w| w == b"\r\n\r\n") {
            assert!(stream.read_buf(&mut head).await.expect("read") > 0);
        }
        let request = handshake::Request::parse(&head).expect("valid").expect("whole");
        let mut bytes = handshake::response(request.upgrade_key().expect("key"), Some(link::COMPACT)).into_bytes();
        if rng.random_range(0..6) == 0 {
            bytes = mutate(&mut rng, bytes);
        }
        for _ in 0..rng.random_range(0..8) {
            let stream_id = rng.random_range(0..3);
            let frame = match rng.random_range(0..5) {
                0 => link::open(
                    stream_id,
                    link::Carries::Tcp,
                    rng.random(),
                    proxy_hub::dest::Dest::parse("127.0.0.1:1").as_ref(),
                ),
                1 => link::open(stream_id, link::Carries::Udp, 0, None),
                2 => link::json(kind::COOLDOWN, &link::Cooldown { retry_after_ms: 1, reason: "go".into() }),
                _ => [&link::header(rng.random_range(0..13), stream_id)[..], &noise(&mut rng, 400)].concat(),
            };
            let start = bytes.len();
            ws::encode_frame(&mut bytes, Opcode::Binary, &frame, None);
            if rng.random_range(0..6) == 0 {
                let tail = mutate(&mut rng, bytes.split_off(start));
                bytes.extend(tail);
            }
        }
        let _ = stream.write_all(&bytes).await;
        deliver(&mut rng, &mut stream, &[]).await;
        assert!(!peer.is_finished(), "seed {seed}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hostile_hubs() {
    let Some(redis) = common::Redis::start().await else { return };
    let extra = format!(
        "[directory]\nredis = {:?}\nrelay_listen = \"127.0.0.1:0\"\nsecret = \"a secret of all hubs\"\n[customers]\nlisten = \"127.0.0.1:0\"\nhandshake_seconds = 1\n",
        redis.url()
    );
    let hub = TestHub::with(&extra, "").await;
    hub.peers(2).await;
    let (relay, origin) = (hub.server.relay.expect("relay"), echo().await.expect("origin"));
    each(seeds("hostile hubs", 200, 10_000), 60, |mut rng| async move {
        let udp = rng.random_range(0..3) == 0;
        let order = proxy_hub::relay::Order {
            account: "alice".into(),
            dest: if udp { String::new() } else { origin.to_string() },
            udp,
            target: ["", "country-us", "session-a-failover-none", "nonsense", "city-%ff"][rng.random_range(0..5)]
                .into(),
            time: proxy_hub::hub::unix_now(),
        };
        let secret = if rng.random_range(0..5) == 0 { "another" } else { "a secret of all hubs" };
        let mut bytes = proxy_hub::relay::encode(&order, secret);
        if rng.random_range(0..3) == 0 {
            bytes = mutate(&mut rng, bytes);
        }
        bytes.extend(noise(&mut rng, 2000));
        let mut stream = TcpStream::connect(relay).await.expect("connect");
        deliver(&mut rng, &mut stream, &bytes).await;
    })
    .await;
    still_serves(&hub, 2).await;
}
