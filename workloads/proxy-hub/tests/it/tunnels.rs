//! Tunnels through a whole hub: bytes, ends, bills.

use crate::common::{TestHub, fill, hex, http_origin, left_out, nightly, source_origin, until};
use proxy_hub::load::echo;
use sha2::{Digest, Sha256};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_customers_with_many_tunnels_get_their_own_bytes_and_their_own_bill() {
    let (customers, tunnels) = if nightly("customers and tunnels") { (200, 50) } else { (40, 10) };
    let specs: String = (0..customers)
        .map(|i| format!("[[customer]]\nname = \"c{i}\"\nkey_sha256 = [\"{}\"]\n", hex(&format!("key{i}"))))
        .collect();
    let hub = Arc::new(TestHub::with("", &specs).await);
    hub.peers(30).await;
    let origin = echo().await.expect("origin");
    // A tunnel holds four descriptors of this process.
    let room = Arc::new(tokio::sync::Semaphore::new(3000));
    let tasks: Vec<_> = (0..customers)
        .flat_map(|c| (0..tunnels).map(move |t| (c, t)))
        .map(|(c, t)| {
            let (hub, room) = (hub.clone(), room.clone());
            tokio::spawn(async move {
                let _permit = room.acquire().await.expect("open");
                let size = 1000 + (c * 7919 + t * 104_729) % 60_000;
                // Thirty peers of 32 tunnels may all be busy for a moment.
                let mut stream = loop {
                    match hub.socks(&format!("c{c}"), &format!("key{c}"), origin).await {
                        Ok(stream) => break stream,
                        Err(3 | 1) => tokio::time::sleep(Duration::from_millis(20)).await,
                        Err(code) => panic!("reply {code}"),
                    }
                };
                let mut sent = vec![0; size];
                fill(&mut sent, (c * 1000 + t) as u64 * 1_000_003);
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
                if back != sent {
                    let m = &hub.server.shared.metrics;
                    panic!(
                        "customer {c}, tunnel {t}: {} of {size} bytes came back; {} peers lost, {} protocol errors, {} descriptors",
                        back.len(),
                        hub.fleet.counts.lost.load(Relaxed),
                        m.protocol_errors.load(Relaxed),
                        std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count)
                    );
                }
                (c, size as u64)
            })
        })
        .collect();
    let mut want = vec![0u64; customers];
    for task in tasks {
        let (c, size) = task.await.expect("tunnel");
        want[c] += size;
    }
    hub.quiet().await;
    for (c, want) in want.iter().enumerate() {
        until(&format!("customer {c} billed"), || hub.billed(&format!("c{c}")) == (*want, *want)).await;
    }
    let metrics = &hub.server.shared.metrics;
    let all: u64 = want.iter().sum();
    until("all counted", || (metrics.bytes_up.load(Relaxed), metrics.bytes_down.load(Relaxed)) == (all, all)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bulk_transfer_to_slow_readers_arrives_whole() {
    let total: u64 = if nightly("bulk transfer") { 1 << 30 } else { 48 << 20 };
    let readers = 4;
    let hub = Arc::new(TestHub::start().await);
    hub.peers(2).await;
    let each = total / readers;
    let origin = source_origin(each).await;
    let mut want = Sha256::new();
    let mut chunk = vec![0; 1 << 20];
    for at in (0..each).step_by(1 << 20) {
        let n = (each - at).min(1 << 20) as usize;
        fill(&mut chunk[..n], at);
        want.update(&chunk[..n]);
    }
    let want = want.finalize();
    let tasks: Vec<_> = (0..readers)
        .map(|_| {
            let hub = hub.clone();
            tokio::spawn(async move {
                let mut stream = hub.socks("alice", "key", origin).await.expect("open");
                let mut got = Sha256::new();
                let mut buf = vec![0; 32 * 1024];
                let mut count = 0u64;
                loop {
                    let n = stream.read(&mut buf).await.expect("read");
                    if n == 0 {
                        break (got.finalize(), count);
                    }
                    got.update(&buf[..n]);
                    count += n as u64;
                    // Slower than the source: everything on the way fills up and has to wait.
                    if count / (4 << 20) != (count - n as u64) / (4 << 20) {
                        tokio::time::sleep(Duration::from_millis(30)).await;
                    }
                }
            })
        })
        .collect();
    for task in tasks {
        let (got, count) = task.await.expect("reader");
        assert_eq!(count, each);
        assert_eq!(got, want);
    }
    hub.quiet().await;
    until("billed", || hub.billed("alice") == (0, total)).await;
}

#[tokio::test]
async fn a_slow_reader_does_not_stop_its_neighbours_on_the_same_peer() {
    let hub = TestHub::start().await;
    hub.peers(1).await;
    let origin = source_origin(8 << 20).await;
    let stuck = hub.socks("alice", "key", origin).await.expect("open");
    // It reads nothing at all; the other one gets everything.
    let mut other = hub.socks("alice", "key", origin).await.expect("open");
    let mut all = Vec::new();
    tokio::time::timeout(Duration::from_secs(20), other.read_to_end(&mut all)).await.expect("in time").expect("read");
    assert_eq!(all.len(), 8 << 20);
    drop(stuck);
}

#[tokio::test]
async fn half_close_reaches_the_origin_and_the_answer_comes_back() {
    let hub = TestHub::start().await;
    hub.peers(1).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let origin = listener.local_addr().expect("addr");
    let server = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.expect("accept");
        let mut all = Vec::new();
        stream.read_to_end(&mut all).await.expect("until the end");
        stream.write_all(format!("got {}", all.len()).as_bytes()).await.expect("answer");
    });
    let mut stream = hub.socks("alice", "key", origin).await.expect("open");
    stream.write_all(&[1; 100_000]).await.expect("write");
    stream.shutdown().await.expect("half-close");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.expect("answer");
    assert_eq!(answer, "got 100000");
    server.await.expect("server");
    hub.quiet().await;
    until("billed", || hub.billed("alice") == (100_000, 10)).await;
}

#[tokio::test]
async fn a_peer_that_vanishes_ends_its_customers_cleanly_and_bills_what_arrived() {
    let hub = TestHub::start().await;
    let peer = hub.peer(hub.options(0));
    hub.registered(1).await;
    let origin = source_origin(1 << 30).await;
    let mut stream = hub.socks("alice", "key", origin).await.expect("open");
    let mut buf = vec![0; 64 * 1024];
    let mut count = 0;
    while count < 4 << 20 {
        count += stream.read(&mut buf).await.expect("read");
    }
    peer.abort();
    loop {
        match stream.read(&mut buf).await.expect("an end, not an error") {
            0 => break,
            n => count += n,
        }
    }
    drop(stream);
    hub.quiet().await;
    until("billed", || hub.billed("alice").1 == count as u64).await;
    assert_eq!(hub.server.shared.registry.len(), 0);
}

#[tokio::test]
async fn a_customer_that_vanishes_frees_its_tunnel() {
    let hub = TestHub::start().await;
    hub.peers(1).await;
    let origin = source_origin(1 << 30).await;
    let stream = hub.socks("alice", "key", origin).await.expect("open");
    nix::sys::socket::setsockopt(
        &stream,
        nix::sys::socket::sockopt::Linger,
        &nix::libc::linger { l_onoff: 1, l_linger: 0 },
    )
    .expect("linger");
    drop(stream);
    hub.quiet().await;
    until("the account's tunnel is given back", || {
        hub.server.shared.accounts.get("alice").is_some_and(|a| a.tunnels() == 0)
    })
    .await;
}

#[tokio::test]
async fn reply_codes_tell_what_went_wrong() {
    let hub = TestHub::with("", "").await;
    let dead = {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
        listener.local_addr().expect("addr")
    };
    assert_eq!(hub.socks("alice", "key", dead).await.err(), Some(3), "no peer: network unreachable");
    hub.peers(4).await;
    assert_eq!(hub.socks("alice", "key", dead).await.err(), Some(5), "refused by the destination");
    assert_eq!(hub.socks("alice", "key", "10.0.0.1:80".parse().expect("addr")).await.err(), Some(2), "private");
    assert_eq!(hub.socks("alice", "key", "127.0.0.1:25".parse().expect("addr")).await.err(), Some(2), "mail");
    assert_eq!(hub.socks("alice-country-zz", "key", dead).await.err(), Some(3), "no such country");
    assert_eq!(hub.socks("alice", "wrong", dead).await.err(), Some(0xff), "log-in refused");
}

#[tokio::test]
async fn a_peer_judges_destinations_for_itself() {
    let hub = TestHub::start().await;
    // The hub allows loopback; this peer does not.
    let strict = proxy_hub::peer::Options { policy: Arc::default(), ..hub.options(0) };
    hub.peer(strict);
    hub.registered(1).await;
    let origin = echo().await.expect("origin");
    assert_eq!(hub.socks("alice", "key", origin).await.err(), Some(2));
}

#[tokio::test]
async fn limits_of_an_account_hold() {
    let customers = format!(
        "[[customer]]\nname = \"few\"\nkey_sha256 = [\"{k}\"]\nlimits = {{ tunnels = 2 }}\n\
         [[customer]]\nname = \"small\"\nkey_sha256 = [\"{k}\"]\nlimits = {{ quota_bytes = 1000000 }}\n\
         [[customer]]\nname = \"slow\"\nkey_sha256 = [\"{k}\"]\nlimits = {{ bytes_per_second = 1000000 }}\n",
        k = hex("key")
    );
    let hub = TestHub::with("", &customers).await;
    hub.peers(2).await;
    let origin = echo().await.expect("origin");
    let held = [hub.socks("few", "key", origin).await.expect("1"), hub.socks("few", "key", origin).await.expect("2")];
    assert_eq!(hub.socks("few", "key", origin).await.err(), Some(2));
    drop(held);
    until("tunnels given back", || hub.server.shared.accounts.get("few").is_some_and(|a| a.tunnels() == 0)).await;
    drop(hub.socks("few", "key", origin).await.expect("again"));

    let big = source_origin(8 << 20).await;
    let mut stream = hub.socks("small", "key", big).await.expect("open");
    let mut all = Vec::new();
    stream.read_to_end(&mut all).await.expect("cut off in order");
    assert_eq!(all.len(), 1_000_000, "to the byte");
    drop(stream);
    until("billed what arrived", || hub.billed("small").1 == 1_000_000).await;
    assert_eq!(hub.socks("small", "key", origin).await.err(), Some(2), "quota used up");

    let some = source_origin(2_500_000).await;
    let began = std::time::Instant::now();
    let mut stream = hub.socks("slow", "key", some).await.expect("open");
    all.clear();
    stream.read_to_end(&mut all).await.expect("read");
    let took = began.elapsed();
    assert_eq!(all.len(), 2_500_000);
    assert!(took > Duration::from_millis(1000) && took < Duration::from_secs(6), "2.5 MB at 1 MB/s took {took:?}");
}

/// Many tunnels on all shards, both ways at once, by two sub-users: together they move what the quota allows, exactly.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_quota_shared_by_many_tunnels_ends_at_its_last_byte() {
    const QUOTA: u64 = 3_000_001;
    let customers = format!(
        "[[customer]]\nname = \"c\"\nlimits = {{ quota_bytes = {QUOTA} }}\n\
         [[customer.user]]\nname = \"a\"\nkey_sha256 = [\"{k}\"]\n[[customer.user]]\nname = \"b\"\nkey_sha256 = [\"{k}\"]\n",
        k = hex("key")
    );
    let hub = Arc::new(TestHub::with("", &customers).await);
    hub.peers(8).await;
    let (back_and_forth, source) = (echo().await.expect("origin"), source_origin(1 << 20).await);
    let tasks: Vec<_> = (0..16)
        .map(|i| {
            let hub = hub.clone();
            tokio::spawn(async move {
                let user = if i % 2 == 0 { "c.a" } else { "c.b" };
                let origin = if i % 4 < 2 { back_and_forth } else { source };
                let Ok(stream) = hub.socks(user, "key", origin).await else { return 0 };
                let (mut read, mut write) = stream.into_split();
                let writer = tokio::spawn(async move {
                    for _ in 0..64 {
                        if write.write_all(&[7; 16 * 1024]).await.is_err() {
                            return;
                        }
                    }
                });
                let mut got = 0;
                let mut buf = vec![0; 32 * 1024];
                while let Ok(n @ 1..) = read.read(&mut buf).await {
                    got += n as u64;
                }
                writer.abort();
                got
            })
        })
        .collect();
    let mut got = 0;
    for task in tasks {
        got += task.await.expect("tunnel");
    }
    hub.quiet().await;
    until("all is counted", || hub.server.shared.metrics.customers_connected.load(Relaxed) == 0).await;
    let ((up_a, down_a), (up_b, down_b), (up, down)) = (hub.billed("c.a"), hub.billed("c.b"), hub.billed("c"));
    assert_eq!((up_a + up_b, down_a + down_b), (up, down), "the customer pays what its users moved");
    // What was claimed for a customer that left before it was sent is given back, so the last bytes may stay unused; what
    // arrived is billed.
    assert!(up + down <= QUOTA && down == got, "{up} up, {down} down, {got} arrived");
    assert!(up + down > QUOTA - (1 << 16), "{}", up + down);
    let left = QUOTA - up - down;
    if left > 0 {
        let mut stream = hub.socks("c.a", "key", source).await.expect("some is left");
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest).await.expect("read");
        assert_eq!(rest.len() as u64, left);
    }
    assert_eq!(hub.socks("c.b", "key", source).await.err(), Some(2), "used up");
}

#[tokio::test]
async fn sessions_stick_and_requests_rotate() {
    let hub = TestHub::start().await;
    hub.peers(40).await;
    let origin = http_origin().await;
    // Peers connect to the origin from their loopback address only if told; the peer is read from the hub's books.
    let device_of = |user: &'static str| {
        let hub = &hub;
        async move {
            let mut stream = hub.socks(user, "key", origin).await.expect("open");
            let (views, _) = hub.server.shared.registry.page(0, 100, None, 0);
            let busy: Vec<_> = views.into_iter().filter(|v| v.tunnels > 0).map(|v| (v.device, v.country)).collect();
            stream.write_all(b"GET / HTTP/1.1\r\n\r\n").await.expect("write");
            let mut all = Vec::new();
            stream.read_to_end(&mut all).await.expect("read");
            drop(stream);
            hub.quiet().await;
            assert_eq!(busy.len(), 1);
            busy.into_iter().next().expect("one")
        }
    };
    let first = device_of("alice-country-us-session-a").await;
    assert_eq!(first.1, "US");
    for _ in 0..10 {
        assert_eq!(device_of("alice-country-us-session-a").await, first);
    }
    let mut seen = std::collections::HashSet::new();
    for _ in 0..15 {
        seen.insert(device_of("alice-country-us-session-a-rotate").await.0);
    }
    assert!(seen.len() > 3, "{seen:?}");
    for _ in 0..5 {
        assert_eq!(device_of("alice-cc-de").await.1, "DE");
    }
}

#[tokio::test]
async fn udp_goes_through_the_peer_and_back() {
    let hub = TestHub::start().await;
    hub.peers(2).await;
    let origin = tokio::net::UdpSocket::bind("127.0.0.1:0").await.expect("bind");
    let to = origin.local_addr().expect("addr");
    tokio::spawn(async move {
        let mut buf = [0; 2048];
        while let Ok((n, from)) = origin.recv_from(&mut buf).await {
            buf[..n].reverse();
            let _ = origin.send_to(&buf[..n], from).await;
        }
    });
    let mut control = tokio::net::TcpStream::connect(hub.server.customers).await.expect("connect");
    control.write_all(b"\x05\x01\x02\x01\x05alice\x03key").await.expect("log in");
    control.write_all(&[5, 3, 0, 1, 0, 0, 0, 0, 0, 0]).await.expect("associate");
    let mut answer = [0; 14];
    control.read_exact(&mut answer).await.expect("answer");
    assert_eq!(answer[..8], [5, 2, 1, 0, 5, 0, 0, 1]);
    let relay = std::net::SocketAddr::from((
        [answer[8], answer[9], answer[10], answer[11]],
        u16::from_be_bytes([answer[12], answer[13]]),
    ));
    let socket = tokio::net::UdpSocket::bind("127.0.0.1:0").await.expect("bind");
    let stranger = tokio::net::UdpSocket::bind("127.0.0.1:0").await.expect("bind");
    for payload in [&b"hello"[..], &[7; 1200]] {
        let mut packet = vec![0, 0, 0];
        proxy_hub::socks::put_address(&mut packet, to);
        let header = packet.clone();
        packet.extend_from_slice(payload);
        socket.send_to(&packet, relay).await.expect("send");
        let mut back = [0; 2048];
        let n =
            tokio::time::timeout(Duration::from_secs(5), socket.recv(&mut back)).await.expect("in time").expect("recv");
        assert_eq!(back[..header.len()], header);
        let mut got = back[header.len()..n].to_vec();
        got.reverse();
        assert_eq!(got, payload);
    }
    // By name: resolved and judged by the hub, answered from the address.
    let mut packet = [&[0, 0, 0, 3, 9][..], b"localhost", &to.port().to_be_bytes(), b"named"].concat();
    socket.send_to(&packet, relay).await.expect("send");
    let mut back = [0; 64];
    let n = tokio::time::timeout(Duration::from_secs(5), socket.recv(&mut back)).await.expect("in time").expect("recv");
    assert_eq!(
        back[..n].split_at(10),
        (&[&[0, 0, 0, 1, 127, 0, 0, 1][..], &to.port().to_be_bytes()].concat()[..], &b"deman"[..])
    );
    // Another socket's datagrams are not the customer's; neither are fragments or private destinations.
    packet = vec![0, 0, 0];
    proxy_hub::socks::put_address(&mut packet, to);
    packet.extend(b"forged");
    stranger.send_to(&packet, relay).await.expect("send");
    packet[2] = 1;
    socket.send_to(&packet, relay).await.expect("send");
    let mut inside = vec![0, 0, 0];
    proxy_hub::socks::put_address(&mut inside, "10.0.0.1:53".parse().expect("addr"));
    socket.send_to(&inside, relay).await.expect("send");
    // A last good one behind them shows that they were seen and dropped.
    packet[2] = 0;
    socket.send_to(&packet, relay).await.expect("send");
    let mut back = [0; 64];
    tokio::time::timeout(Duration::from_secs(5), socket.recv(&mut back)).await.expect("in time").expect("recv");
    // Counted a moment after it is sent.
    until("billed", || hub.billed("alice") == (1205 + 5 + 6, 1205 + 5 + 6)).await;
    drop(control);
    hub.quiet().await;
}

#[tokio::test]
async fn ipv6_destinations_are_reached_and_judged() {
    let Ok(listener) = TcpListener::bind("[::1]:0").await else {
        left_out("ipv6", "this machine has no [::1]; give its loopback device that address");
        return;
    };
    let origin = listener.local_addr().expect("addr");
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let _ = stream.write_all(b"six").await;
        }
    });
    let hub = TestHub::with("[policy]\nallow = [\"::1/128\"]\n", "").await;
    let policy = proxy_hub::dest::Policy { allow: vec!["::1/128".parse().expect("net")], ..Default::default() };
    hub.peer(proxy_hub::peer::Options { policy: Arc::new(policy), ..hub.options(0) });
    hub.registered(1).await;
    let mut stream = hub.socks("alice", "key", origin).await.expect("open");
    let mut all = String::new();
    stream.read_to_string(&mut all).await.expect("read");
    assert_eq!(all, "six");
    for inside in ["[fe80::1]:80", "[fd00::1]:80", "[::ffff:127.0.0.1]:80", "[64:ff9b::a00:1]:80"] {
        let reply = hub.socks("alice", "key", inside.parse().expect("addr")).await.err();
        assert_eq!(reply, Some(2), "{inside}");
    }
}

#[tokio::test]
async fn slow_and_hostile_clients_are_let_go() {
    let hub = TestHub::with("[customers]\nlisten = \"127.0.0.1:0\"\nhandshake_seconds = 1\n", "").await;
    hub.peers(1).await;
    let garbage: [&[u8]; 5] =
        [b"\x00\x01\x02", b"\x05\x01\x07", b"\x16\x03\x01\x02\x00\x01", b"GET / HTTP/1.1\r\n\r\n", &[0x05; 700]];
    for bytes in garbage {
        let mut stream = tokio::net::TcpStream::connect(hub.server.customers).await.expect("connect");
        stream.write_all(bytes).await.expect("write");
        let mut rest = Vec::new();
        let end = tokio::time::timeout(Duration::from_secs(5), stream.read_to_end(&mut rest)).await;
        assert!(end.is_ok(), "{bytes:?} was kept");
    }
    // One byte and then silence.
    let mut slow = Vec::new();
    for _ in 0..50 {
        let mut stream = tokio::net::TcpStream::connect(hub.server.customers).await.expect("connect");
        stream.write_all(b"\x05").await.expect("write");
        slow.push(stream);
    }
    for mut stream in slow {
        let mut rest = Vec::new();
        let end = tokio::time::timeout(Duration::from_secs(5), stream.read_to_end(&mut rest)).await;
        assert!(end.is_ok(), "a slow client was kept");
    }
    until("connections gone", || hub.server.shared.metrics.customers_connected.load(Relaxed) == 0).await;
    let origin = echo().await.expect("origin");
    hub.socks("alice", "key", origin).await.expect("others are served");
}
