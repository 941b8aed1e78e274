//! With the programs people put before and behind a balancer: HAProxy, nginx, iperf3, FreeRADIUS, and QUIC by quinn.

mod support;

use quinn::rustls::RootCertStore;
use quinn::rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use support::*;

/// A program of the distribution, or a panic that says how to get it.
fn tool(name: &str, package: &str) -> PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let dirs = std::env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]);
    dirs.map(|dir| dir.join(name)).find(|file| file.is_file()).unwrap_or_else(|| {
        panic!("{name} is not installed: apt-get install {package}, or ./dev test, which installs what tests need")
    })
}

/// A program started for one test; killed at its end.
struct Program(Child);

impl Program {
    fn start(command: &mut Command) -> Program {
        Program(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap())
    }

    fn kill(mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn listens(addr: SocketAddr) {
    until(&format!("{addr} to listen"), || TcpStream::connect(addr).ok());
}

/// A loopback address of this test process alone: a port that is free on it stays so, whatever other tests open.
fn own() -> Ipv4Addr {
    let [_, _, high, low] = std::process::id().to_be_bytes();
    Ipv4Addr::new(127, 64 + high % 64, low, 1)
}

/// A port free for TCP and UDP.
fn free() -> SocketAddr {
    until("a port that is free for both", || {
        let addr = std::net::TcpListener::bind((own(), 0)).ok()?.local_addr().ok()?;
        std::net::UdpSocket::bind(addr).ok().map(|_| addr)
    })
}

/// nginx with `http` as its http block, in the foreground.
fn nginx(dir: &Path, http: &str) -> Program {
    let text = format!(
        "daemon off; pid {0}/nginx.pid; error_log {0}/nginx.log crit; worker_processes 1; events {{}}\nhttp {{ access_log off; \
         client_body_temp_path {0}/a; proxy_temp_path {0}/b; fastcgi_temp_path {0}/c; uwsgi_temp_path {0}/d; scgi_temp_path {0}/e;\n{http}\n}}\n",
        dir.display()
    );
    std::fs::write(dir.join("nginx.conf"), text).unwrap();
    // One process: a master killed would leave its worker.
    let mut command = Command::new(tool("nginx", "nginx"));
    Program::start(command.arg("-p").arg(dir).arg("-c").arg(dir.join("nginx.conf")).args(["-g", "master_process off;"]))
}

/// GET / from `source`: the body.
fn get_from(source: Ipv4Addr, to: SocketAddr) -> String {
    let socket = rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::STREAM, None).unwrap();
    rustix::net::bind(&socket, &SocketAddr::from((source, 0))).unwrap();
    rustix::net::connect(&socket, &to).unwrap();
    let mut stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let me = stream.local_addr().unwrap();
    let body = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("{answer:?}")).1;
    assert_eq!(body, me.to_string(), "the backend sees who connected to HAProxy");
    body.to_owned()
}

#[test]
fn haproxy_in_front_and_nginx_behind_keep_the_clients_address() {
    let dir = tempfile::tempdir().unwrap();
    let (backend, probe) = (free(), free());
    let _nginx = nginx(
        dir.path(),
        &format!(
            "server {{ listen {backend} proxy_protocol; location / {{ return 200 '$proxy_protocol_addr:$proxy_protocol_port'; }} }}\n\
             server {{ listen {probe}; location /up {{ return 204; }} location / {{ return 503; }} }}"
        ),
    );
    listens(probe);
    let listener = |name: &str, out: &str| {
        format!(
            "[[listener]]\nname = '{name}'\nprotocol = 'tcp'\nlisten = '127.0.0.1:0'\npool = '{name}'\nproxy_in = 'required'\ntrusted = ['127.0.0.1']\nproxy_out = '{out}'\n\
             [[pool]]\nname = '{name}'\n[pool.check]\nkind = 'http'\npath = '/up'\nport = {}\ninterval = '50ms'\n[[pool.backend]]\nname = 'nginx'\naddr = '{backend}'\n",
            probe.port()
        )
    };
    let balancer = Balancer::start(&format!(
        "[service]\nconnections = 1000\nworkers = 2\n{}{}",
        listener("one", "v1"),
        listener("two", "v2")
    ));
    let fronts: Vec<(SocketAddr, String)> =
        [("send-proxy", "one"), ("send-proxy", "two"), ("send-proxy-v2", "one"), ("send-proxy-v2", "two")]
            .into_iter()
            .map(|(how, to)| (free(), format!("server s {} {how}", balancer.addr(to))))
            .collect();
    let mut text = "global\n  maxconn 200\ndefaults\n  mode tcp\n  timeout connect 5s\n  timeout client 30s\n  timeout server 30s\n".to_owned();
    for (number, (addr, server)) in fronts.iter().enumerate() {
        text += &format!("listen l{number}\n  bind {addr}\n  {server}\n");
    }
    std::fs::write(dir.path().join("haproxy.cfg"), text).unwrap();
    let mut command = Command::new(tool("haproxy", "haproxy"));
    let _haproxy = Program::start(command.args(["-db", "-q", "-f"]).arg(dir.path().join("haproxy.cfg")));
    for (addr, _) in &fronts {
        // A connect that says nothing more is a client of HAProxy's without bytes; the balancer lets it go.
        listens(*addr);
        for last in 30..36 {
            get_from(Ipv4Addr::new(127, 0, 0, last), *addr);
        }
    }
    for name in ["one", "two"] {
        assert_eq!(balancer.backend(name, "nginx")["state"], "up", "by nginx's own answer to the check");
        assert_eq!(balancer.listener(name)["rejected_proxy"], 0);
    }
}

fn iperf3(addr: SocketAddr, more: &[&str]) -> serde_json::Value {
    let run = Command::new(tool("iperf3", "iperf3"))
        .args(["--json", "-c", &addr.ip().to_string(), "-p", &addr.port().to_string()])
        .args(more)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let told = String::from_utf8_lossy(&run.stdout);
    assert!(run.status.success(), "iperf3 {more:?}: {told}");
    serde_json::from_str(&told).unwrap()
}

#[test]
fn iperf3_pours_both_ways_and_its_bytes_are_counted() {
    let (server, entry) = (free(), free());
    let mut command = Command::new(tool("iperf3", "iperf3"));
    let _server =
        Program::start(command.args(["-s", "-B", &server.ip().to_string(), "-p", &server.port().to_string()]));
    let entries: String = ["tcp", "udp"]
        .map(|protocol| {
            format!(
                "[[listener]]\nname = '{protocol}'\nprotocol = '{protocol}'\nlisten = '{entry}'\npool = '{protocol}'\n[[pool]]\nname = '{protocol}'\n[[pool.backend]]\nname = 'iperf'\naddr = '{server}'\n"
            )
        })
        .concat();
    let balancer = Balancer::start(&format!("[service]\nconnections = 1000\nworkers = 2\n{entries}"));
    // Not by connecting: iperf3 takes one test at a time, and a connection that says nothing would be one.
    until("iperf3 to listen", || listening(server).then_some(()));

    // iperf3 stops counting when the sender says that it has sent all, so what is under way then is not in its sum.
    let (bytes, received) =
        (256u64 << 20, |run: &serde_json::Value| run["end"]["sum_received"]["bytes"].as_u64().unwrap());
    let up = received(&iperf3(entry, &["-n", "256M", "-P", "4"]));
    let down = received(&iperf3(entry, &["-n", "256M", "-P", "4", "-R"]));
    assert!(up > bytes / 2 && down > bytes / 2, "{up} and {down} of {bytes}");
    until("every connection of theirs to have ended", || (balancer.listener("tcp")["now"] == 0).then_some(()));
    let stats = balancer.listener("tcp");
    assert_eq!(stats["total"], 10, "four streams and one for control, twice");
    assert!(
        stats["bytes_in"].as_u64() >= Some(up) && stats["bytes_out"].as_u64() >= Some(down),
        "{up}, {down}: {stats}"
    );
    assert!(stats["spliced"].as_u64() >= Some(8), "every stream of 64 MiB is moved by the kernel: {stats}");

    let datagrams = iperf3(entry, &["-u", "-b", "20M", "-l", "1200", "-n", "4M", "-P", "2"]);
    let sum = &datagrams["end"]["sum"];
    let sent = sum["packets"].as_u64().unwrap();
    let stats = balancer.listener("udp");
    assert!(
        sent > 3000 && stats["datagrams_in"].as_u64() >= Some(sent - sum["lost_packets"].as_u64().unwrap()),
        "{sum} {stats}"
    );
    assert_eq!(stats["now"], 2, "a flow for each stream");
}

/// Whether somebody listens there, by the kernel's own table.
fn listening(addr: SocketAddr) -> bool {
    let IpAddr::V4(ip) = addr.ip() else { unreachable!("own() is of version 4") };
    let entry = format!("{:08X}:{:04X} 00000000:0000 0A", u32::from_ne_bytes(ip.octets()), addr.port());
    std::fs::read_to_string("/proc/net/tcp").unwrap().contains(&entry)
}

const SECRET: &str = "one-we-both-know";

/// A FreeRADIUS that accepts everybody and answers Status-Server.
fn freeradius(dir: &Path, addr: SocketAddr) -> Program {
    let (ip, port) = (addr.ip(), addr.port());
    std::fs::write(
        dir.join("radiusd.conf"),
        format!(
            "prefix = /usr\nlogdir = {dir}\nraddbdir = {dir}\nrun_dir = {dir}\npidfile = {dir}/pid\nlibdir = /usr/lib/freeradius\n\
             security {{\n status_server = yes\n}}\nlog {{\n destination = files\n file = {dir}/log\n}}\n\
             client local {{\n ipaddr = 127.0.0.0/8\n secret = {SECRET}\n}}\nmodules {{\n always reject {{\n  rcode = reject\n }}\n}}\n\
             server default {{\n listen {{\n  type = auth\n  ipaddr = {ip}\n  port = {port}\n }}\n\
             authorize {{\n  update control {{\n   Auth-Type := Accept\n  }}\n }}\n}}\n",
            dir = dir.display()
        ),
    )
    .unwrap();
    let mut command = Command::new(tool("freeradius", "freeradius"));
    Program::start(command.args(["-f", "-D", "/usr/share/freeradius", "-n", "radiusd", "-d"]).arg(dir))
}

fn radclient(to: SocketAddr, secret: &str) -> Output {
    let mut child = Command::new(tool("radclient", "freeradius-utils"))
        .args(["-r", "1", "-t", "5", &to.to_string(), "auth", secret])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child
        .stdin
        .take()
        .unwrap()
        .write_all(b"User-Name = bob\nUser-Password = swordfish\nMessage-Authenticator = 0x00\n")
        .unwrap();
    child.wait_with_output().unwrap()
}

#[test]
fn freeradius_is_asked_for_its_status_and_serves_through_the_balancer() {
    let (dir, addr) = (tempfile::tempdir().unwrap(), free());
    let running = freeradius(dir.path(), addr);
    let pool = |name: &str, secret: &str| {
        format!(
            "[[listener]]\nname = '{name}'\nprotocol = 'udp'\nlisten = '127.0.0.1:0'\npool = '{name}'\n[[pool]]\nname = '{name}'\n\
             [pool.check]\nkind = 'radius-status'\nsecret = '{secret}'\ninterval = '100ms'\ntimeout = '500ms'\n[[pool.backend]]\nname = 'radius'\naddr = '{addr}'\n"
        )
    };
    let balancer = Balancer::start(&format!(
        "[service]\nconnections = 100\nworkers = 2\n{}{}",
        pool("right", SECRET),
        pool("wrong", "another-one")
    ));
    balancer.wait_backend("right", "radius", "up and asked", |backend| backend["state"] == "up");
    balancer.wait_backend("wrong", "radius", "down, for it does not answer strangers", |backend| {
        backend["state"] == "down"
    });
    let answer = until("an answer through the balancer", || {
        let run = radclient(balancer.addr("right"), SECRET);
        run.status.success().then(|| String::from_utf8_lossy(&run.stdout).into_owned())
    });
    assert!(answer.contains("Access-Accept"), "{answer}");

    running.kill();
    balancer.wait_backend("right", "radius", "down without its server", |backend| backend["state"] == "down");
    let _again = freeradius(dir.path(), addr);
    balancer.wait_backend("right", "radius", "up again", |backend| {
        ["up", "starting"].contains(&backend["state"].as_str().unwrap())
    });
    assert!(radclient(balancer.addr("right"), SECRET).status.success());
}

/// A QUIC server that answers each stream with its name and what the stream said.
fn quic_server(name: &'static str) -> (quinn::Endpoint, quinn::rustls::pki_types::CertificateDer<'static>) {
    let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(made.signing_key.serialize_der()));
    let cert = made.cert.der().clone();
    let config = quinn::ServerConfig::with_single_cert(vec![cert.clone()], key).unwrap();
    let endpoint = quinn::Endpoint::server(config, SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
    let accepting = endpoint.clone();
    tokio::spawn(async move {
        while let Some(incoming) = accepting.accept().await {
            tokio::spawn(async move {
                let Ok(connection) = incoming.await else { return };
                while let Ok((mut send, mut receive)) = connection.accept_bi().await {
                    tokio::spawn(async move {
                        let Ok(said) = receive.read_to_end(1 << 22).await else { return };
                        let _ = send.write_all(name.as_bytes()).await;
                        let _ = send.write_all(&said).await;
                        let _ = send.finish();
                    });
                }
            });
        }
    });
    (endpoint, cert)
}

/// What the server of the connection calls itself, after it returned `said` whole.
async fn ask_quic(connection: &quinn::Connection, said: &[u8]) -> String {
    let (mut send, mut receive) = connection.open_bi().await.unwrap();
    send.write_all(said).await.unwrap();
    send.finish().unwrap();
    let answer = receive.read_to_end(1 << 22).await.unwrap();
    assert_eq!(&answer[2..], said);
    String::from_utf8(answer[..2].to_vec()).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn quic_connections_stay_with_their_server_through_a_drain() {
    let names = ["q0", "q1", "q2"];
    let servers = names.map(quic_server);
    let mut config = "[service]\nconnections = 1000\nworkers = 2\n[[listener]]\nname = 'quic'\nprotocol = 'udp'\nlisten = '127.0.0.1:0'\npool = 'p'\n[[pool]]\nname = 'p'\n".to_owned();
    for (name, (endpoint, _)) in names.iter().zip(&servers) {
        config += &format!("[[pool.backend]]\nname = '{name}'\naddr = '{}'\n", endpoint.local_addr().unwrap());
    }
    let balancer = Arc::new(tokio::task::spawn_blocking(move || Balancer::start(&config)).await.unwrap());
    let mut roots = RootCertStore::empty();
    for (_, cert) in &servers {
        roots.add(cert.clone()).unwrap();
    }
    let client_config = quinn::ClientConfig::with_root_certificates(Arc::new(roots)).unwrap();
    let mut clients = Vec::new();
    // Each from a port of its own, as clients behind one address come.
    for _ in 0..24 {
        let mut endpoint = quinn::Endpoint::client(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0)).unwrap();
        endpoint.set_default_client_config(client_config.clone());
        let connection = endpoint.connect(balancer.addr("quic"), "localhost").unwrap().await.unwrap();
        let home = ask_quic(&connection, b"hello").await;
        clients.push((endpoint, connection, home));
    }
    let mut seen: HashMap<&str, usize> = HashMap::new();
    clients.iter().for_each(|(_, _, home)| *seen.entry(home).or_default() += 1);
    assert_eq!(seen.len(), 3, "{seen:?}");

    // Bulk on all of them at once, then the same with a server that takes no new ones.
    let said = pattern(1 << 20);
    for drained in [false, true] {
        if drained {
            let balancer = balancer.clone();
            let ask = move || balancer.ask("PATCH", "/api/pools/p/backends/q1", "{\"drain\":true}").0;
            assert_eq!(tokio::task::spawn_blocking(ask).await.unwrap(), 204);
        }
        let all = clients.iter().map(|(_, connection, home)| {
            let (connection, home, said) = (connection.clone(), home.clone(), said.clone());
            tokio::spawn(async move { assert_eq!(ask_quic(&connection, &said).await, home) })
        });
        for task in all.collect::<Vec<_>>() {
            task.await.unwrap();
        }
    }
    for _ in 0..12 {
        let mut endpoint = quinn::Endpoint::client(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0)).unwrap();
        endpoint.set_default_client_config(client_config.clone());
        let connection = endpoint.connect(balancer.addr("quic"), "localhost").unwrap().await.unwrap();
        assert_ne!(ask_quic(&connection, b"late").await, "q1");
    }
    let balancer = Arc::try_unwrap(balancer).ok().expect("the only one left");
    tokio::task::spawn_blocking(move || drop(balancer)).await.unwrap();
}

#[test]
#[ignore = "starts a browser: run with the nightly profile"]
fn the_page_draws_its_charts_and_tables_in_a_browser() {
    let echo = Echo::start("e");
    let balancer = Balancer::start(&format!(
        "[service]\nconnections = 100\nworkers = 1\n[[listener]]\nname = 'entry'\nprotocol = 'tcp'\nlisten = '127.0.0.1:0'\npool = 'p'\n[[pool]]\nname = 'p'\n[[pool.backend]]\nname = 'behind'\naddr = '{}'\n",
        echo.addr
    ));
    let mut held = balancer.connect("entry");
    assert_eq!(line(&mut held), "e");
    let profile = tempfile::tempdir().unwrap();
    // Long enough for three polls of the page; the clock is the browser's own.
    let run = Command::new(tool("chromium", "chromium"))
        .args(["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=6000", "--dump-dom"])
        .arg(format!("--user-data-dir={}", profile.path().display()))
        .arg(format!("http://{}/", balancer.admin))
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let page = String::from_utf8_lossy(&run.stdout);
    for drawn in
        ["<td>behind</td>", "<td>entry</td>", "<polyline points=\"0.0,", "<b>1 / 1</b><span>backends in service</span>"]
    {
        assert!(page.contains(drawn), "{drawn} is not on the page: {page}");
    }
    assert!(page.contains("<b>1</b><span>connections now</span>"), "{page}");
}

/// On this kernel's own settings, those of a network namespace that is gone afterwards.
#[test]
#[ignore = "makes a network namespace, which needs root: run with the nightly profile"]
fn kernel_settings_are_applied_verified_and_undone_exactly() {
    let root = tempfile::tempdir().unwrap();
    std::fs::create_dir_all(root.path().join("proc/sys")).unwrap();
    std::fs::create_dir_all(root.path().join("etc/sysctl.d")).unwrap();
    // Only what a namespace has for itself.
    std::os::unix::fs::symlink("/proc/sys/net", root.path().join("proc/sys/net")).unwrap();
    let script = r#"
        all() { for name in core/somaxconn ipv4/tcp_max_syn_backlog ipv4/ip_local_port_range ipv4/ip_local_reserved_ports \
            ipv4/tcp_congestion_control ipv4/tcp_fin_timeout ipv4/tcp_keepalive_time ipv4/tcp_tw_reuse; do
            echo "$name $(tr '\t' ' ' </proc/sys/net/$name)"; done; }
        tune() { "$BALANCER" tune "$1" --root "$ROOT"; }
        echo bbr >/proc/sys/net/ipv4/tcp_congestion_control 2>/dev/null; echo reno >/proc/sys/net/ipv4/tcp_congestion_control
        echo 300 >/proc/sys/net/core/somaxconn
        all >"$ROOT/before"; tune verify >/dev/null 2>&1 && exit 3
        tune apply || exit 4
        all >"$ROOT/applied"; cp "$ROOT/etc/sysctl.d/60-conduit-balancer.conf" "$ROOT/first"
        tune verify || exit 5
        tune apply >/dev/null || exit 6
        cmp "$ROOT/first" "$ROOT/etc/sysctl.d/60-conduit-balancer.conf" || exit 7
        tune undo || exit 8
        all >"$ROOT/after"
    "#;
    let run = Command::new("unshare")
        .args(["--net", "sh", "-c", script])
        .env("BALANCER", env!("CARGO_BIN_EXE_conduit-balancer"))
        .env("ROOT", root.path())
        .output()
        .unwrap();
    let told = format!("{}{}", String::from_utf8_lossy(&run.stdout), String::from_utf8_lossy(&run.stderr));
    assert!(run.status.success(), "{:?}: {told}", run.status);
    let read = |name: &str| std::fs::read_to_string(root.path().join(name)).unwrap();
    assert_eq!(read("before"), read("after"), "{told}");
    for value in [
        "core/somaxconn 65535",
        "ipv4/ip_local_port_range 10240 65535",
        "ipv4/tcp_fin_timeout 30",
        "ipv4/tcp_tw_reuse 1",
    ] {
        assert!(read("applied").lines().any(|line| line == value), "{value}: {}", read("applied"));
    }
    assert!(read("first").contains("net.core.somaxconn = 65535"));
    assert!(told.contains("lacking  fs.file-max"), "what is not there is said: {told}");
    assert!(!root.path().join("etc/sysctl.d/60-conduit-balancer.conf").exists());
}
