//! UDP through the real binary.

mod support;

use std::collections::{HashMap, HashSet};
use std::net::{SocketAddr, UdpSocket};
use std::time::Duration;
use support::*;

/// Answers each datagram with three: its name, the datagram, and where it came from.
struct Server {
    addr: SocketAddr,
    stop: std::sync::Arc<std::sync::atomic::AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Server {
    fn start(name: String) -> Server {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
        let addr = socket.local_addr().unwrap();
        let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            let mut bytes = [0; 2048];
            while !stopped.load(std::sync::atomic::Ordering::Relaxed) {
                if let Ok((count, from)) = socket.recv_from(&mut bytes) {
                    for answer in [name.as_bytes(), &bytes[..count], from.to_string().as_bytes()] {
                        socket.send_to(answer, from).unwrap();
                    }
                }
            }
        });
        Server { addr, stop, thread: Some(thread) }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, std::sync::atomic::Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap();
    }
}

fn config(extra: &str, servers: &[Server]) -> String {
    let mut text = format!(
        "[service]\nconnections = 2000\nworkers = 2\ndrain = '1s'\n[[listener]]\nname = 'in'\nprotocol = 'udp'\nlisten = '127.0.0.1:0'\npool = 'p'\n{extra}\n[[pool]]\nname = 'p'\n"
    );
    for (n, server) in servers.iter().enumerate() {
        text += &format!("[[pool.backend]]\nname = 'u{n}'\naddr = '{}'\n", server.addr);
    }
    text
}

fn client(balancer: &Balancer) -> UdpSocket {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.connect(balancer.addr("in")).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

/// The three answers to one datagram.
fn ask(socket: &UdpSocket, what: &[u8]) -> [Vec<u8>; 3] {
    socket.send(what).unwrap();
    [(); 3].map(|()| {
        let mut bytes = [0; 2048];
        let count = socket.recv(&mut bytes).unwrap();
        bytes[..count].to_vec()
    })
}

#[test]
fn flows_are_spread_pinned_and_moved_only_when_they_must_be() {
    let mut servers: Vec<Server> = (0..8).map(|n| Server::start(format!("u{n}"))).collect();
    let balancer = Balancer::start(&config("", &servers));
    let clients: Vec<UdpSocket> = (0..120).map(|_| client(&balancer)).collect();
    let mut home: HashMap<usize, Vec<u8>> = HashMap::new();
    for (n, socket) in clients.iter().enumerate() {
        let [name, echo, _] = ask(socket, format!("datagram {n}").as_bytes());
        assert_eq!(echo, format!("datagram {n}").as_bytes(), "all three answers arrive, and are this client's");
        home.insert(n, name);
    }
    assert_eq!(home.values().collect::<HashSet<_>>().len(), 8, "clients of one address use every backend");

    // Draining: flows stay where they are, new ones go elsewhere.
    assert_eq!(balancer.ask("PATCH", "/api/pools/p/backends/u3", "{\"drain\":true}").0, 204);
    for (n, socket) in clients.iter().enumerate() {
        assert_eq!(ask(socket, b"again")[0], home[&n]);
    }
    let late: Vec<UdpSocket> = (0..60).map(|_| client(&balancer)).collect();
    assert!(late.iter().all(|socket| ask(socket, b"late")[0] != b"u3"));

    // Removed by its name while it dies: its flows move, and nobody else's.
    drop(servers.remove(3));
    assert_eq!(balancer.ask("POST", "/api/pools/p/backends/u3/evict", "").0, 204);
    for (n, socket) in clients.iter().enumerate() {
        let name = &ask(socket, b"and again")[0];
        if home[&n] == b"u3" {
            assert_ne!(name, b"u3");
        } else {
            assert_eq!(*name, home[&n]);
        }
    }
    assert_eq!(balancer.stats()["connections"]["now"], 180);
}

#[test]
fn a_backend_down_by_its_check_hands_its_flows_over() {
    let servers: Vec<Server> = (0..2).map(|n| Server::start(format!("u{n}"))).collect();
    let text = config("", &servers).replace(
        "name = 'p'\n[[pool.backend]]",
        "name = 'p'\n[pool.check]\nkind = 'udp'\nsend = 'ping'\nexpect = 'u'\ninterval = '50ms'\ntimeout = '200ms'\n[[pool.backend]]",
    );
    let balancer = Balancer::start(&text);
    let sockets: Vec<UdpSocket> = (0..30).map(|_| client(&balancer)).collect();
    sockets.iter().for_each(|socket| drop(ask(socket, b"x")));
    let mut servers = servers;
    drop(servers.remove(0));
    balancer.wait_backend("p", "u0", "down", |backend| backend["state"] == "down");
    for socket in &sockets {
        assert_eq!(ask(socket, b"y")[0], b"u1");
    }
}

#[test]
fn idle_flows_end_and_their_places_are_free_again() {
    let servers = [Server::start("u0".into())];
    let balancer = Balancer::start(&config("idle_timeout = '300ms'\nper_client = 3", &servers));
    let sockets: Vec<UdpSocket> = (0..3).map(|_| client(&balancer)).collect();
    sockets.iter().for_each(|socket| drop(ask(socket, b"x")));
    let fourth = client(&balancer);
    fourth.send(b"x").unwrap();
    until("the fourth to be refused", || (balancer.listener("in")["rejected_client"].as_u64() > Some(0)).then_some(()));
    until("the flows to end", || (balancer.listener("in")["now"] == 0).then_some(()));
    assert_eq!(balancer.listener("in")["ended_idle"], 3);
    assert_eq!(ask(&fourth, b"now")[1], b"now");
    assert_eq!(ask(&sockets[0], b"back")[1], b"back");
}

#[test]
fn every_datagram_tells_the_client_by_proxy_v2() {
    let servers = [Server::start("u0".into())];
    let balancer = Balancer::start(&config("proxy_out = 'v2'", &servers));
    let socket = client(&balancer);
    for payload in [&b"first"[..], b"second"] {
        let [_, seen, _] = ask(&socket, payload);
        assert_eq!(&seen[..14], b"\r\n\r\n\0\r\nQUIT\n\x21\x12");
        let port = socket.local_addr().unwrap().port();
        assert_eq!(&seen[16..20], &[127, 0, 0, 1]);
        assert_eq!(&seen[24..26], &port.to_be_bytes());
        assert_eq!(&seen[26..28], &balancer.addr("in").port().to_be_bytes());
        assert_eq!(&seen[28..], payload);
    }
}

#[test]
fn a_header_from_a_proxy_in_front_is_taken_off() {
    let servers = [Server::start("u0".into())];
    let balancer = Balancer::start(&config("proxy_in = 'required'\ntrusted = ['127.0.0.1']", &servers));
    let socket = client(&balancer);
    let header = conduit_balancer::proxy::v2("192.0.2.1:5".parse().unwrap(), "192.0.2.2:6".parse().unwrap(), true);
    assert_eq!(ask(&socket, &[&header[..], b"payload"].concat())[1], b"payload");
    assert_eq!(ask(&socket, b"later")[1], b"later");
    let bare = client(&balancer);
    bare.send(b"no header").unwrap();
    until("it to be refused", || (balancer.listener("in")["rejected_proxy"] == 1).then_some(()));
}

#[test]
fn no_backend_is_counted_and_nothing_breaks() {
    let balancer = Balancer::start(&config("", &[]));
    let socket = client(&balancer);
    socket.send(b"x").unwrap();
    until("it to be counted", || (balancer.listener("in")["no_backend"].as_u64() > Some(0)).then_some(()));
    assert_eq!(balancer.listener("in")["now"], 0);
}
