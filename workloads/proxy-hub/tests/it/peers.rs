//! Peers: joining, being sent away, dying, and the protocol of those that exist already.

use crate::common::{self, TestHub, hex, source_origin, until};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use clawhq_wire::ws::{self, Event, Opcode, Parser, Role, handshake};
use proxy_hub::load::echo;
use proxy_hub::peer::Options;
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// A WebSocket client that knows nothing of the hub.
struct Socket {
    stream: TcpStream,
    parser: Parser,
    pending: Vec<u8>,
    /// Answer pings.
    pongs: bool,
}

#[derive(Debug, PartialEq)]
enum Message {
    Text(String),
    Binary(Vec<u8>),
    Close(Option<u16>, String),
    Gone,
}

impl Socket {
    async fn connect(hub: SocketAddr, extra: &str) -> Socket {
        let mut stream = TcpStream::connect(hub).await.expect("connect");
        let request = handshake::request("hub", "/ws", [9; 16], &[], extra);
        stream.write_all(request.as_bytes()).await.expect("write");
        let mut head = Vec::new();
        loop {
            let n = stream.read_buf(&mut head).await.expect("read");
            assert!(n > 0, "closed in the handshake");
            if let Some((at, protocol)) = handshake::check_response(&head, [9; 16]).expect("accepted") {
                assert_eq!(protocol, None);
                return Socket { stream, parser: Parser::new(Role::Client), pending: head.split_off(at), pongs: true };
            }
        }
    }

    async fn frame(&mut self, opcode: Opcode, payload: &[u8]) {
        let mut out = Vec::new();
        ws::encode_frame(&mut out, opcode, payload, Some([1, 2, 3, 4]));
        self.stream.write_all(&out).await.expect("write");
    }

    async fn say(&mut self, value: Value) {
        self.frame(Opcode::Text, value.to_string().as_bytes()).await;
    }

    async fn hear(&mut self) -> Message {
        let mut whole = Vec::new();
        loop {
            let mut at = 0;
            let mut bytes = std::mem::take(&mut self.pending);
            let total = bytes.len();
            while at < total {
                let (used, event) =
                    self.parser.advance(&mut bytes[at..], &ws::Limits::default()).expect("valid frames");
                at += used;
                let message = match event {
                    Some(Event::Data { kind, chunk, last, .. }) => {
                        whole.extend_from_slice(chunk);
                        last.then(|| match kind {
                            ws::Kind::Text => {
                                Message::Text(String::from_utf8(std::mem::take(&mut whole)).expect("text"))
                            }
                            ws::Kind::Binary => Message::Binary(std::mem::take(&mut whole)),
                        })
                    }
                    Some(Event::Ping(p)) => {
                        let p = p.to_vec();
                        if self.pongs {
                            self.frame(Opcode::Pong, &p).await;
                        }
                        None
                    }
                    Some(Event::Close { code, reason }) => Some(Message::Close(code, reason.to_owned())),
                    _ => None,
                };
                if let Some(message) = message {
                    self.pending = bytes.split_off(at);
                    return message;
                }
            }
            let mut buf = vec![0; 64 * 1024];
            match tokio::time::timeout(Duration::from_secs(10), self.stream.read(&mut buf)).await.expect("in time") {
                Ok(n) if n > 0 => self.pending = buf[..n].to_vec(),
                _ => return Message::Gone,
            }
        }
    }

    async fn hear_json(&mut self) -> Value {
        match self.hear().await {
            Message::Text(text) => serde_json::from_str(&text).expect("JSON"),
            other => panic!("{other:?}"),
        }
    }

    /// Joins as existing peers do.
    async fn join(hub: &TestHub, device: &str, version: &str) -> Socket {
        let mut socket = Socket::connect(hub.server.peers, "").await;
        socket
            .say(json!({"type": "hello", "node_id": device, "device_model": "test", "sdk_version": version, "os": "linux", "token": ""}))
            .await;
        assert_eq!(socket.hear_json().await["type"], "welcome");
        socket.say(json!({"type": "ip_info", "ip_info": {"countryCode": "FR", "country": "France", "city": "Paris", "lat": 1.5}})).await;
        socket.say(json!({"type": "register", "data": {"device_id": device, "country": "FR", "sdk_version": version, "latitude": 0.0}})).await;
        let answer = socket.hear_json().await;
        assert_eq!((&answer["type"], &answer["node_id"]), (&json!("registration_success"), &json!(device)));
        socket
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_existing_peer_is_served_in_its_own_protocol() {
    let hub = TestHub::start().await;
    let mut peer = Socket::join(&hub, "old-1", "1.0.70").await;
    peer.say(json!({"type": "heartbeat"})).await;
    assert_eq!(peer.hear_json().await["type"], "heartbeat_ack");
    peer.say(json!({"type": "keepalive"})).await;
    assert_eq!(peer.hear_json().await["type"], "keepalive_ack");

    let origin: SocketAddr = "127.0.0.1:4321".parse().expect("addr");
    for (round, as_json) in [(0u8, false), (1, true)] {
        let customers = hub.server.customers;
        let client = tokio::spawn(async move {
            let mut stream =
                proxy_hub::load::socks(customers, "alice", "key", origin).await.expect("answer").expect("open");
            stream.write_all(&[round; 50_000]).await.expect("write");
            let mut back = Vec::new();
            stream.read_to_end(&mut back).await.expect("read");
            back
        });
        let open = peer.hear_json().await;
        assert_eq!(open["type"], "tunnel_open");
        let data = &open["data"];
        assert_eq!((data["host"].as_str(), data["port"].as_str()), (Some("127.0.0.1"), Some("4321")));
        let id = data["tunnel_id"].as_str().expect("id").to_owned();
        assert_eq!(id.len(), 36);
        peer.say(json!({"type": "tunnel_response", "data": {"tunnel_id": id, "success": true, "error": ""}})).await;
        let mut got = Vec::new();
        while got.len() < 50_000 {
            let Message::Binary(bytes) = peer.hear().await else { panic!() };
            assert_eq!((&bytes[..36], bytes[36]), (id.as_bytes(), 0));
            assert!(bytes.len() <= 37 + 32 * 1024);
            got.extend_from_slice(&bytes[37..]);
        }
        assert_eq!(got, [round; 50_000]);
        if as_json {
            let data = STANDARD.encode(b"answer");
            peer.say(json!({"type": "tunnel_data", "data": {"tunnel_id": id, "data": data, "eof": false}})).await;
            peer.say(json!({"type": "tunnel_data", "data": {"tunnel_id": id, "data": "", "eof": true}})).await;
        } else {
            let mut frame = [id.as_bytes(), &[0], b"answer"].concat();
            peer.frame(Opcode::Binary, &frame).await;
            frame.truncate(37);
            frame[36] = 1;
            peer.frame(Opcode::Binary, &frame).await;
        }
        assert_eq!(client.await.expect("client"), b"answer");
        hub.quiet().await;
    }
    until("billed", || hub.billed("alice") == (100_000, 12)).await;

    // It says it cannot: the customer is told why.
    let customers = hub.server.customers;
    let client =
        tokio::spawn(
            async move { proxy_hub::load::socks(customers, "alice", "key", origin).await.expect("answer").err() },
        );
    let id = peer.hear_json().await["data"]["tunnel_id"].clone();
    peer.say(json!({"type": "tunnel_response", "data": {"tunnel_id": id, "success": false, "error": "dial tcp: connection refused"}})).await;
    assert_eq!(client.await.expect("client"), Some(5));

    // The customer goes first: the peer is told by an EOF.
    let client = tokio::spawn(async move {
        proxy_hub::load::socks(customers, "alice", "key", origin).await.expect("answer").expect("open")
    });
    let id = peer.hear_json().await["data"]["tunnel_id"].clone();
    peer.say(json!({"type": "tunnel_response", "data": {"tunnel_id": id, "success": true}})).await;
    drop(client.await.expect("client"));
    let Message::Binary(bytes) = peer.hear().await else { panic!() };
    assert_eq!((&bytes[..36], &bytes[36..]), (id.as_str().expect("id").as_bytes(), &[1u8][..]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_old_peer_that_floods_a_slow_customer_is_held_back_and_nothing_is_dropped() {
    let hub = TestHub::start().await;
    let mut peer = Socket::join(&hub, "old-1", "1.0.70").await;
    let customers = hub.server.customers;
    let client = tokio::spawn(async move {
        let mut stream = proxy_hub::load::socks(customers, "alice", "key", "127.0.0.1:9".parse().expect("addr"))
            .await
            .expect("answer")
            .expect("open");
        tokio::time::sleep(Duration::from_millis(300)).await;
        let mut all = Vec::new();
        stream.read_to_end(&mut all).await.expect("read");
        all
    });
    let id = peer.hear_json().await["data"]["tunnel_id"].as_str().expect("id").to_owned();
    peer.say(json!({"type": "tunnel_response", "data": {"tunnel_id": id, "success": true}})).await;
    let total = 16 << 20;
    let mut sent = vec![0; total];
    common::fill(&mut sent, 0);
    for part in sent.chunks(30_000) {
        peer.frame(Opcode::Binary, &[id.as_bytes(), &[0], part].concat()).await;
    }
    peer.frame(Opcode::Binary, &[id.as_bytes(), &[1]].concat()).await;
    let got = client.await.expect("client");
    assert!(got == sent, "{} of {total} bytes", got.len());
    until("billed", || hub.billed("alice").1 == total as u64).await;
}

#[tokio::test]
async fn tokens_versions_and_consent_are_gates() {
    let peers = format!(
        "[peers]\nlisten = \"127.0.0.1:0\"\nmin_version = \"1.0.62\"\ntokens_sha256 = [\"{}\"]\n",
        hex("token")
    );
    let hub = TestHub::with(&peers, "").await;
    for (version, token, consent) in [("1.0.9", "token", true), ("2.0", "nope", true), ("2.0", "", true)] {
        hub.peer(Options { version: version.into(), token: token.into(), consent, ..hub.options(1) });
    }
    until("refused", || hub.server.shared.metrics.peers_refused.load(Relaxed) >= 3).await;
    assert_eq!(hub.server.shared.registry.len(), 0);
    let good = Options { version: "1.0.62".into(), token: "token".into(), ..hub.options(2) };
    hub.peer(Options { consent: false, ..good.clone() });
    hub.registered(1).await;
    let origin = echo().await.expect("origin");
    assert_eq!(hub.socks("alice", "key", origin).await.err(), Some(3), "without consent it carries nothing");
    hub.peer(Options { device: "willing".into(), ..good });
    hub.registered(2).await;
    hub.socks("alice", "key", origin).await.expect("open");

    // Existing peers are told as well.
    let mut old = Socket::connect(hub.server.peers, "").await;
    old.say(json!({"type": "hello", "node_id": "x", "sdk_version": "1.0.61", "token": "token"})).await;
    assert_eq!(old.hear().await, Message::Close(Some(1008), "version too old".into()));
}

#[tokio::test]
async fn too_many_at_once_are_sent_away_and_all_come_back() {
    let hub =
        TestHub::with("[peers]\nlisten = \"127.0.0.1:0\"\nmin_version = \"0.1\"\nregistrations_per_second = 40\n", "")
            .await;
    for n in 0..120 {
        hub.peer(hub.options(n));
    }
    hub.registered(120).await;
    let metrics = &hub.server.shared.metrics;
    assert!(metrics.cooldowns.load(Relaxed) > 10, "{}", metrics.cooldowns.load(Relaxed));
    // An existing peer gets its own form of it.
    let mut waits = std::collections::HashSet::new();
    for n in 0..60 {
        let mut old = Socket::connect(hub.server.peers, "").await;
        old.say(json!({"type": "hello", "node_id": format!("o{n}"), "sdk_version": "1.0.62"})).await;
        let answer = old.hear_json().await;
        if answer["type"] == "cooldown" {
            waits.insert(answer["retry_after_sec"].as_u64().expect("seconds"));
        }
    }
    assert!(!waits.is_empty());
}

#[tokio::test]
async fn a_silent_peer_is_found_dead_and_a_quiet_one_is_not() {
    let hub =
        TestHub::with("[peers]\nlisten = \"127.0.0.1:0\"\nmin_version = \"0.1\"\nheartbeat_seconds = 1\n", "").await;
    hub.peer(hub.options(0));
    let mut silent = Socket::join(&hub, "silent", "1.0.70").await;
    silent.pongs = false;
    hub.registered(2).await;
    let began = Instant::now();
    hub.registered(1).await;
    let took = began.elapsed();
    assert!(took > Duration::from_millis(900) && took < Duration::from_millis(3500), "{took:?} for a heartbeat of 1 s");
    assert_eq!(hub.server.shared.metrics.peers_dead.load(Relaxed), 1);
    assert!(hub.server.shared.registry.find("sim-0", 0).is_some(), "the one that answers pings stays");
    assert_eq!(silent.hear().await, Message::Gone);
}

#[tokio::test]
async fn the_same_device_again_replaces_itself() {
    let hub = TestHub::start().await;
    let mut first = Socket::join(&hub, "device", "1.0.70").await;
    let second = Socket::join(&hub, "device", "1.0.70").await;
    assert_eq!(first.hear().await, Message::Close(Some(1000), "registered anew".into()));
    assert_eq!(hub.server.shared.registry.len(), 1);
    drop(second);
    hub.registered(0).await;
}

#[tokio::test]
async fn where_a_peer_is_comes_from_its_address_and_not_from_what_it_says() {
    let peers = "[peers]\nlisten = \"127.0.0.1:0\"\nmin_version = \"0.1\"\ntrusted_proxies = [\"127.0.0.1\"]\n";
    let hub = TestHub::with(peers, "").await;
    let find = |device: &str| hub.server.shared.registry.find(device, 0).map(|(.., view)| view.country);
    // It says France; nobody vouches for its address, which is nowhere.
    let mut a = Socket::connect(hub.server.peers, "").await;
    a.say(json!({"type": "register", "data": {"device_id": "a", "country": "FR", "sdk_version": "1.0.70"}})).await;
    a.hear_json().await;
    assert_eq!(find("a").as_deref(), Some("XX"));
    // A trusted proxy vouches, by header and by PROXY line.
    let mut b = Socket::connect(hub.server.peers, "x-forwarded-for: 127.1.1.1, 127.4.0.9\r\n").await;
    b.say(json!({"type": "register", "data": {"device_id": "b", "sdk_version": "1.0.70"}})).await;
    b.hear_json().await;
    assert_eq!(find("b").as_deref(), Some("DE"));
    // From elsewhere the header is worth nothing.
    let socket = tokio::net::TcpSocket::new_v4().expect("socket");
    socket.bind("127.8.0.1:0".parse().expect("addr")).expect("bind");
    let mut stream = socket.connect(hub.server.peers).await.expect("connect");
    let request = handshake::request("hub", "/ws", [9; 16], &[], "x-forwarded-for: 127.4.0.9\r\n");
    stream.write_all(request.as_bytes()).await.expect("write");
    let mut c = Socket { stream, parser: Parser::new(Role::Client), pending: Vec::new(), pongs: true };
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        assert!(c.stream.read_buf(&mut head).await.expect("read") > 0);
    }
    c.say(json!({"type": "register", "data": {"device_id": "c", "sdk_version": "1.0.70"}})).await;
    c.hear_json().await;
    assert_eq!(find("c").as_deref(), Some("SG"));
}

#[tokio::test]
async fn a_draining_peer_gets_no_more_and_keeps_what_it_has() {
    let hub = TestHub::start().await;
    let mut peer = Socket::join(&hub, "old", "1.0.70").await;
    let customers = hub.server.customers;
    let client = tokio::spawn(async move {
        proxy_hub::load::socks(customers, "alice", "key", "127.0.0.1:9".parse().expect("addr"))
            .await
            .expect("answer")
            .expect("open")
    });
    let id = peer.hear_json().await["data"]["tunnel_id"].as_str().expect("id").to_owned();
    peer.say(json!({"type": "tunnel_response", "data": {"tunnel_id": id, "success": true}})).await;
    let mut stream = client.await.expect("client");
    let (id_, ..) = hub.server.shared.registry.find("old", 0).expect("registered");
    hub.server.shared.registry.drain(id_);
    let origin = echo().await.expect("origin");
    assert_eq!(hub.socks("alice", "key", origin).await.err(), Some(3));
    peer.frame(Opcode::Binary, &[id.as_bytes(), &[0], b"still"].concat()).await;
    let mut buf = [0; 5];
    stream.read_exact(&mut buf).await.expect("the tunnel lives");
    assert_eq!(&buf, b"still");
}

#[tokio::test]
async fn what_breaks_the_protocol_is_closed_with_its_code() {
    let hub = TestHub::start().await;
    for (bytes, code) in [
        (&[0x81, 0x01, b'x'][..], 1002),                           // not masked
        (&[0x83, 0x80, 0, 0, 0, 0], 1002),                         // reserved opcode
        (&[0x81, 0x81, 0, 0, 0, 0, 0xff], 1007),                   // not UTF-8
        (&[0x81, 0xff, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0], 1009), // four gigabytes
        (&[0x81, 0x82, 0, 0, 0, 0, b'{', b'x'], 1008),             // not JSON
    ] {
        let mut socket = Socket::connect(hub.server.peers, "").await;
        socket.stream.write_all(bytes).await.expect("write");
        match socket.hear().await {
            Message::Close(got, _) => assert_eq!(got, Some(code), "{bytes:?}"),
            other => panic!("{bytes:?}: {other:?}"),
        }
    }
    until("all gone", || hub.server.shared.metrics.peers_connected.load(Relaxed) == 0).await;
    // What is not a WebSocket gets an HTTP answer.
    let mut stream = TcpStream::connect(hub.server.peers).await.expect("connect");
    stream.write_all(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n").await.expect("write");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.expect("read");
    assert!(answer.starts_with("HTTP/1.1 200 OK") && answer.ends_with("ok"), "{answer}");
}

#[tokio::test]
async fn a_peer_that_cannot_is_passed_over() {
    let hub = TestHub::start().await;
    // One that never answers an open, one that works: every request is served.
    let mut mute = Socket::join(&hub, "mute", "1.0.70").await;
    hub.peer(hub.options(0));
    hub.registered(2).await;
    let keeper = tokio::spawn(async move {
        loop {
            match mute.hear().await {
                Message::Text(text) if text.contains("tunnel_open") => {
                    let id = serde_json::from_str::<Value>(&text).expect("JSON")["data"]["tunnel_id"].clone();
                    mute.say(json!({"type": "tunnel_response", "data": {"tunnel_id": id, "success": false, "error": "something odd"}})).await;
                }
                Message::Gone => return,
                _ => {}
            }
        }
    });
    let origin = source_origin(10).await;
    for _ in 0..20 {
        let mut stream = hub.socks("alice", "key", origin).await.expect("served by the other");
        let mut all = Vec::new();
        stream.read_to_end(&mut all).await.expect("read");
        assert_eq!(all.len(), 10);
    }
    assert!(hub.server.shared.metrics.failovers.load(Relaxed) > 0);
    keeper.abort();
}

#[tokio::test]
async fn a_device_that_has_carried_its_share_of_the_day_gets_no_more() {
    let peers = "[peers]\nlisten = \"127.0.0.1:0\"\nmin_version = \"0.1\"\nbytes_per_day = 100000\n";
    let hub = TestHub::with(peers, "").await;
    let task = hub.peer(hub.options(0));
    hub.registered(1).await;
    let origin = source_origin(60_000).await;
    let pull = async |hub: &TestHub| {
        let mut stream = hub.socks("alice", "key", origin).await?;
        let mut all = Vec::new();
        stream.read_to_end(&mut all).await.expect("read");
        drop(stream);
        hub.quiet().await;
        Ok::<_, u8>(all.len())
    };
    assert_eq!((pull(&hub).await, pull(&hub).await), (Ok(60_000), Ok(60_000)), "over it by what was under way");
    assert_eq!(pull(&hub).await, Err(3));
    // Coming back does not help, nor does a restart of the hub.
    task.abort();
    hub.registered(0).await;
    hub.peer(hub.options(0));
    hub.registered(1).await;
    assert_eq!(pull(&hub).await, Err(3));
    let hub = hub.restart().await;
    hub.peer(hub.options(0));
    hub.registered(1).await;
    assert_eq!(pull(&hub).await, Err(3));
    assert!(hub.server.shared.registry.find("sim-0", 0).is_some_and(|(.., view)| view.spent));
    // Others carry on, and the next day it does too.
    hub.peer(hub.options(1));
    hub.registered(2).await;
    assert_eq!(pull(&hub).await, Ok(60_000));
    hub.server.shared.registry.new_day();
    assert!(hub.server.shared.registry.find("sim-0", 0).is_some_and(|(.., view)| !view.spent));
}

/// A peer on somebody else's WebSocket, in both protocols.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn peers_on_another_websocket_library_are_served() {
    use futures::{SinkExt as _, StreamExt as _};
    use proxy_hub::link::{self, Opened, kind};
    use tokio_tungstenite::tungstenite::{Message as Frame, client::IntoClientRequest as _};
    let hub = TestHub::start().await;
    let url = format!("ws://{}/ws", hub.server.peers);
    let mut request = url.as_str().into_client_request().expect("url");
    request.headers_mut().insert("sec-websocket-protocol", link::COMPACT.parse().expect("header"));
    let (mut compact, response) = tokio_tungstenite::connect_async(request).await.expect("upgraded");
    assert_eq!(response.headers()["sec-websocket-protocol"], link::COMPACT);
    let hello = link::json(
        kind::HELLO,
        &link::Hello { device: "other".into(), version: "2.0".into(), consent: true, ..Default::default() },
    );
    compact.send(Frame::binary(hello)).await.expect("sent");
    let welcome = compact.next().await.expect("a frame").expect("valid").into_data();
    assert_eq!(welcome[0], kind::WELCOME);
    let customers = hub.server.customers;
    let ask = || {
        tokio::spawn(async move {
            let to = "127.0.0.1:4321".parse().expect("addr");
            let mut stream =
                proxy_hub::load::socks(customers, "alice", "key", to).await.expect("answer").expect("open");
            stream.write_all(b"question").await.expect("write");
            stream.shutdown().await.expect("shut");
            let mut all = String::new();
            stream.read_to_string(&mut all).await.expect("read");
            all
        })
    };
    let client = ask();
    let mut heard = Vec::new();
    while let Some(Ok(frame)) = compact.next().await {
        let Frame::Binary(frame) = frame else { continue };
        let stream = u32::from_be_bytes([frame[1], frame[2], frame[3], frame[4]]);
        match frame[0] {
            kind::OPEN => compact.send(Frame::binary(link::opened(stream, Opened::Ok, 1000))).await.expect("sent"),
            kind::DATA => heard.extend_from_slice(&frame[link::HEADER..]),
            kind::EOF => {
                let answer = [&link::header(kind::DATA, stream)[..], b"answer"].concat();
                compact.send(Frame::binary(answer)).await.expect("sent");
                compact.send(Frame::binary(link::header(kind::EOF, stream).to_vec())).await.expect("sent");
                break;
            }
            _ => {}
        }
    }
    assert_eq!((heard.as_slice(), client.await.expect("client").as_str()), (&b"question"[..], "answer"));
    compact.close(None).await.expect("closed");
    hub.registered(0).await;

    let (mut legacy, _) = tokio_tungstenite::connect_async(&url).await.expect("upgraded");
    let register = json!({"type": "register", "data": {"device_id": "old", "sdk_version": "1.0.62"}}).to_string();
    legacy.send(Frame::text(register)).await.expect("sent");
    let answer = legacy.next().await.expect("a frame").expect("valid").into_text().expect("text");
    assert!(answer.contains("registration_success"), "{answer}");
    let client = ask();
    let open: Value =
        serde_json::from_str(&legacy.next().await.expect("a frame").expect("valid").into_text().expect("text"))
            .expect("JSON");
    let id = open["data"]["tunnel_id"].as_str().expect("id").to_owned();
    let response = json!({"type": "tunnel_response", "data": {"tunnel_id": id, "success": true}}).to_string();
    legacy.send(Frame::text(response)).await.expect("sent");
    let question = legacy.next().await.expect("a frame").expect("valid").into_data();
    assert_eq!(question[37..], *b"question");
    legacy.send(Frame::binary([id.as_bytes(), b"\0old answer"].concat())).await.expect("sent");
    legacy.send(Frame::binary([id.as_bytes(), b"\x01"].concat())).await.expect("sent");
    assert_eq!(client.await.expect("client"), "old answer");
}
