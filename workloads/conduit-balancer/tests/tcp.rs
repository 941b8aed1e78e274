//! TCP through the real binary: what arrives, who gets it, and what survives a change.

mod support;

use rustix::net::sockopt::set_socket_linger;
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;
use support::*;

fn config(extra: &str, pool: &str, backends: &[(&str, SocketAddr)]) -> String {
    let mut text = format!(
        "[service]\nconnections = 2000\nworkers = 2\ndrain = '2s'\n[[listener]]\nname = 'in'\nprotocol = 'tcp'\nlisten = '127.0.0.1:0'\npool = 'p'\n{extra}\n[[pool]]\nname = 'p'\n{pool}\n"
    );
    for (name, addr) in backends {
        text += &format!("[[pool.backend]]\nname = '{name}'\naddr = '{addr}'\n");
    }
    text
}

const CHECK: &str = "[pool.check]\nkind = 'tcp'\ninterval = '50ms'\n";

fn reset(stream: TcpStream) {
    set_socket_linger(&stream, Some(Duration::ZERO)).unwrap();
}

#[test]
fn connections_are_shared_evenly_over_all_workers() {
    let backends: Vec<Echo> = (0..4).map(|n| Echo::start(&format!("b{n}"))).collect();
    let listed: Vec<(String, SocketAddr)> =
        backends.iter().enumerate().map(|(n, echo)| (format!("b{n}"), echo.addr)).collect();
    let listed: Vec<(&str, SocketAddr)> = listed.iter().map(|(name, addr)| (name.as_str(), *addr)).collect();
    let balancer = Balancer::start(&config("", "", &listed));
    let mut seen: HashMap<String, usize> = HashMap::new();
    let mut held = Vec::new();
    for _ in 0..200 {
        let mut stream = balancer.connect("in");
        *seen.entry(line(&mut stream)).or_default() += 1;
        held.push(stream);
    }
    assert_eq!(seen.len(), 4);
    assert!(seen.values().all(|count| (49..=51).contains(count)), "{seen:?}");
    let workers = balancer.stats()["workers"].as_array().unwrap().clone();
    assert!(workers.iter().all(|worker| worker["now"].as_u64() > Some(0)), "both workers serve: {workers:?}");
    held.iter_mut().for_each(carries);
    drop(held);
    until("all counts at zero", || (balancer.stats()["connections"]["now"] == 0).then_some(()));
    assert_eq!(balancer.stats()["connections"]["total"], 200);
    assert!(balancer.end());
}

#[test]
fn half_close_keeps_the_answer_and_bytes_are_counted() {
    let sink = TcpListener::bind("127.0.0.1:0").unwrap();
    let balancer = Balancer::start(&config("", "", &[("s", sink.local_addr().unwrap())]));
    let mut client = balancer.connect("in");
    client.write_all(b"question").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    let (mut server, _) = sink.accept().unwrap();
    let mut question = String::new();
    server.read_to_string(&mut question).unwrap();
    assert_eq!(question, "question");
    server.write_all(b"the answer").unwrap();
    drop(server);
    let mut answer = String::new();
    client.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, "the answer");
    until("the count to fall", || (balancer.listener("in")["now"] == 0).then_some(()));
    let backend = balancer.backend("p", "s");
    assert_eq!((backend["bytes_in"].as_u64(), backend["bytes_out"].as_u64()), (Some(8), Some(10)));
}

#[test]
fn a_reset_on_either_side_reaches_the_other() {
    let sink = TcpListener::bind("127.0.0.1:0").unwrap();
    let balancer = Balancer::start(&config("", "", &[("s", sink.local_addr().unwrap())]));
    let mut client = balancer.connect("in");
    let (mut server, _) = sink.accept().unwrap();
    server.set_read_timeout(Some(PATIENCE)).unwrap();
    client.write_all(b"x").unwrap();
    server.read_exact(&mut [0]).unwrap();
    reset(client);
    assert_eq!(server.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    drop(server);

    let mut client = balancer.connect("in");
    let (mut server, _) = sink.accept().unwrap();
    client.write_all(b"x").unwrap();
    server.read_exact(&mut [0]).unwrap();
    reset(server);
    assert_eq!(client.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    until("both ends counted and gone", || {
        let listener = balancer.listener("in");
        (listener["ended_reset"] == 2 && listener["now"] == 0).then_some(())
    });
}

/// Many at once, each with its own bytes, read slowly: nothing is lost, nothing crosses.
fn slow_readers(flows: usize, size: usize) {
    let echo = Echo::start("e");
    let balancer = Balancer::start(&config("", "", &[("e", echo.addr)]));
    let threads: Vec<_> = (0..flows)
        .map(|n| {
            let mut stream = balancer.connect("in");
            std::thread::spawn(move || {
                assert_eq!(line(&mut stream), "e");
                let mut bytes = pattern(size);
                bytes[..8].copy_from_slice(&n.to_le_bytes());
                let expected = Sha256::digest(&bytes);
                let mut writer = stream.try_clone().unwrap();
                let sender = std::thread::spawn(move || {
                    writer.write_all(&bytes).unwrap();
                    writer.shutdown(Shutdown::Write).unwrap();
                });
                let mut hash = Sha256::new();
                let mut buffer = vec![0; 1500 + n * 4000];
                loop {
                    match stream.read(&mut buffer).unwrap() {
                        0 => break,
                        count => hash.update(&buffer[..count]),
                    }
                    // Falls behind now and again, so that queues and pipes fill.
                    std::thread::yield_now();
                }
                sender.join().unwrap();
                assert_eq!(hash.finalize(), expected, "flow {n}");
            })
        })
        .collect();
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    let (stats, bytes) = (balancer.listener("in"), flows * size);
    assert_eq!(stats["bytes_in"], bytes);
    assert_eq!(stats["bytes_out"], bytes + 2 * flows);
    assert_eq!(stats["spliced"], 2 * flows, "both directions of every flow are bulk");
    assert_eq!(stats["no_backend"], 0);
}

#[test]
fn slow_readers_get_exactly_their_own_bytes() {
    slow_readers(8, 3 << 20);
}

#[test]
#[ignore = "a minute, and as much memory: run with the nightly profile"]
fn a_gigabyte_through_slow_readers_is_the_same() {
    slow_readers(16, 64 << 20);
}

#[test]
fn a_dead_backend_is_out_within_a_second_and_comes_back() {
    let (a, b) = (Echo::start("a"), Echo::start("b"));
    let balancer = Balancer::start(&config("", CHECK, &[("a", a.addr), ("b", b.addr)]));
    let mut held: Vec<(TcpStream, String)> = (0..20)
        .map(|_| {
            let mut stream = balancer.connect("in");
            let name = line(&mut stream);
            (stream, name)
        })
        .collect();
    let (name, addr) = a.kill();
    let start = std::time::Instant::now();
    // From the first moment nobody is turned away: a refused connect is tried elsewhere.
    for _ in 0..20 {
        assert_eq!(line(&mut balancer.connect("in")), "b");
    }
    balancer.wait_backend("p", "a", "down", |backend| backend["state"] == "down");
    assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
    assert_eq!(balancer.listener("in")["no_backend"], 0);
    held.iter_mut().filter(|(_, name)| name == "b").for_each(|(stream, _)| carries(stream));
    let _a = Echo::on(&name, addr);
    balancer.wait_backend("p", "a", "up", |backend| backend["state"] == "up");
    until("a new connection on a", || (line(&mut balancer.connect("in")) == "a").then_some(()));
}

#[test]
fn with_no_backend_left_clients_are_turned_away_at_once() {
    let balancer = Balancer::start(&config("", "", &[("a", free_addr())]));
    // The reset may come before the connect has returned.
    if let Ok(mut client) = TcpStream::connect(balancer.addr("in")) {
        let _ = client.write_all(b"x");
        assert!(!matches!(client.read(&mut [0]), Ok(1..)));
    }
    until("it to be counted", || (balancer.listener("in")["no_backend"] == 1).then_some(()));
    let backend = balancer.backend("p", "a");
    assert_eq!(backend["connect_failed"], 1);
}

#[test]
fn failed_connects_eject_and_ejection_ends() {
    let (a, b) = (Echo::start("a"), Echo::start("b"));
    let outlier = "[pool.outlier]\nfailures = 3\nejection = '300ms'\nmost_percent = 50\n";
    let balancer = Balancer::start(&config("", outlier, &[("a", a.addr), ("b", b.addr)]));
    let (name, addr) = a.kill();
    until("the ejection", || {
        assert_eq!(line(&mut balancer.connect("in")), "b");
        (balancer.backend("p", "a")["state"] == "ejected").then_some(())
    });
    let _a = Echo::on(&name, addr);
    balancer.wait_backend("p", "a", "readmitted", |backend| backend["state"] == "up");
    until("a new connection on a", || (line(&mut balancer.connect("in")) == "a").then_some(()));
}

/// Its accept queue is full, so that a connect to it is never answered.
#[test]
fn a_backend_that_does_not_answer_costs_its_timeout_and_no_client() {
    let full = rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::STREAM, None).unwrap();
    rustix::net::bind(&full, &SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
    rustix::net::listen(&full, 0).unwrap();
    let full_addr = TcpListener::from(full.try_clone().unwrap()).local_addr().unwrap();
    let _filler = TcpStream::connect(full_addr).unwrap();
    let good = Echo::start("good");
    let balancer =
        Balancer::start(&config("connect_timeout = '200ms'", "", &[("full", full_addr), ("good", good.addr)]));
    for _ in 0..4 {
        assert_eq!(line(&mut balancer.connect("in")), "good");
    }
    assert!(balancer.backend("p", "full")["connect_timeout"].as_u64() >= Some(1));
}

#[test]
fn backends_are_added_weighted_drained_and_removed_without_a_drop() {
    let (a, b) = (Echo::start("a"), Echo::start("b"));
    let balancer = Balancer::start(&config("", "slow_start = '0s'", &[("a", a.addr)]));
    let mut held: Vec<TcpStream> = (0..10).map(|_| balancer.connect("in")).collect();
    held.iter_mut().for_each(|stream| assert_eq!(line(stream), "a"));

    let body = format!("{{\"name\":\"b\",\"addr\":\"{}\"}}", b.addr);
    assert_eq!(balancer.ask("POST", "/api/pools/p/backends", &body).0, 201);
    assert_eq!(balancer.ask("POST", "/api/pools/p/backends", &body).0, 409);
    // The newcomer is the emptier one until both hold ten.
    let mut more: Vec<TcpStream> = (0..10).map(|_| balancer.connect("in")).collect();
    more.iter_mut().for_each(|stream| assert_eq!(line(stream), "b"));

    assert_eq!(balancer.ask("PATCH", "/api/pools/p/backends/b", "{\"weight\":300}").0, 204);
    let mut weighted: Vec<TcpStream> = (0..20).map(|_| balancer.connect("in")).collect();
    let on_b = weighted.iter_mut().map(line).filter(|name| name == "b").count();
    assert_eq!(on_b, 20, "at three times the weight, b takes all until it holds three times as many");

    assert_eq!(balancer.ask("PATCH", "/api/pools/p/backends/a", "{\"drain\":true}").0, 204);
    assert_eq!(balancer.backend("p", "a")["state"], "draining");
    assert_eq!(line(&mut balancer.connect("in")), "b");
    held.iter_mut().for_each(carries);

    assert_eq!(balancer.ask("DELETE", "/api/pools/p/backends/a", "").0, 204);
    assert_eq!(balancer.ask("DELETE", "/api/pools/p/backends/a", "").0, 404);
    held.iter_mut().chain(&mut more).chain(&mut weighted).for_each(carries);

    for (body, word) in [("{\"weight\":0}", "weight"), ("{\"weihgt\":5}", "weihgt")] {
        let (status, answer) = balancer.ask("PATCH", "/api/pools/p/backends/b", body);
        assert!(status == 422 && answer.contains(word), "{status} {answer}");
    }
    assert_eq!(balancer.ask("PATCH", "/api/pools/nowhere/backends/b", "{\"weight\":5}").0, 404);

    assert_eq!(balancer.ask("POST", "/api/pools/p/backends/b/evict", "").0, 204);
    for stream in more.iter_mut().chain(&mut weighted) {
        assert!(!matches!(stream.read(&mut [0]), Ok(1..)));
    }
    held.iter_mut().for_each(carries);
}

#[test]
fn a_reload_drops_nobody_and_a_wrong_file_changes_nothing() {
    let (a, b) = (Echo::start("a"), Echo::start("b"));
    let balancer = Balancer::start(&config("", "", &[("a", a.addr)]));
    let mut held: Vec<TcpStream> = (0..50).map(|_| balancer.connect("in")).collect();
    held.iter_mut().for_each(|stream| assert_eq!(line(stream), "a"));
    let good = std::fs::read_to_string(&balancer.file).unwrap();

    std::fs::write(&balancer.file, good.replace("pool = 'p'", "pool = 'q'")).unwrap();
    let (status, answer) = balancer.ask("POST", "/api/reload", "");
    assert_eq!(status, 422);
    assert!(answer.contains("balancer.toml:11: there is no pool `q`; add a [[pool]]"), "{answer}");
    assert_eq!(line(&mut balancer.connect("in")), "a");

    // A port that another service holds: refused after the file was found valid, and still nothing changed.
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let second = |port: u16| {
        format!(
            "[[listener]]\nname = 'second'\nprotocol = 'tcp'\nlisten = '127.0.0.1:{port}'\npool = 'second'\n[[pool]]\nname = 'second'\n[[pool.backend]]\nname = 'b'\naddr = '{}'\n",
            b.addr
        )
    };
    std::fs::write(&balancer.file, format!("{good}{}", second(taken.local_addr().unwrap().port()))).unwrap();
    let (status, answer) = balancer.ask("POST", "/api/reload", "");
    assert!(status == 422 && answer.contains("cannot listen on"), "{status} {answer}");

    let addr = free_addr();
    std::fs::write(&balancer.file, format!("{good}{}", second(addr.port()))).unwrap();
    balancer.signal(rustix::process::Signal::HUP);
    until("the reload", || (balancer.stats()["reloads"] == 1).then_some(()));
    let mut through_second = TcpStream::connect(addr).unwrap();
    assert_eq!(line(&mut through_second), "b");
    held.iter_mut().for_each(carries);

    // The listener goes away again; its connection does not.
    std::fs::write(&balancer.file, &good).unwrap();
    assert_eq!(balancer.ask("POST", "/api/reload", "").0, 204);
    carries(&mut through_second);
    held.iter_mut().for_each(carries);
    until("the port to be closed", || TcpStream::connect(addr).is_err().then_some(()));
    assert_eq!(balancer.stats()["reloads_failed"], 2);

    // And comes back under the same name.
    std::fs::write(&balancer.file, format!("{good}{}", second(addr.port()))).unwrap();
    assert_eq!(balancer.ask("POST", "/api/reload", "").0, 204);
    assert_eq!(line(&mut TcpStream::connect(addr).unwrap()), "b");
    held.iter_mut().for_each(carries);
}

#[test]
fn limits_hold_over_all_workers_and_room_comes_back() {
    let echo = Echo::start("e");
    let balancer = Balancer::start(&config("per_client = 10\nconnections = 15", "", &[("e", echo.addr)]));
    let from = |ip: [u8; 4]| -> Result<TcpStream, ErrorKind> {
        let socket =
            rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::STREAM, None).unwrap();
        rustix::net::bind(&socket, &SocketAddr::from((ip, 0))).unwrap();
        rustix::net::connect(&socket, &balancer.addr("in")).map_err(|error| std::io::Error::from(error).kind())?;
        let mut stream = TcpStream::from(socket);
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut name = [0; 2];
        match stream.read_exact(&mut name) {
            Ok(()) => Ok(stream),
            Err(error) => Err(error.kind()),
        }
    };
    let mut first: Vec<TcpStream> = (0..10).map(|_| from([127, 0, 0, 2]).unwrap()).collect();
    assert_eq!(from([127, 0, 0, 2]).unwrap_err(), ErrorKind::ConnectionReset);
    let second: Vec<TcpStream> = (0..5).map(|_| from([127, 0, 0, 3]).unwrap()).collect();
    assert_eq!(from([127, 0, 0, 3]).unwrap_err(), ErrorKind::ConnectionReset, "the listener is full");
    let stats = balancer.listener("in");
    assert_eq!((stats["rejected_client"].as_u64(), stats["rejected_limit"].as_u64()), (Some(1), Some(1)));
    drop(second);
    first.truncate(9);
    until("room for the first client", || from([127, 0, 0, 2]).ok());
}

#[test]
fn idle_connections_end_and_busy_ones_do_not() {
    let echo = Echo::start("e");
    let balancer = Balancer::start(&config("idle_timeout = '400ms'", "", &[("e", echo.addr)]));
    let (mut idle, mut busy) = (balancer.connect("in"), balancer.connect("in"));
    assert_eq!((line(&mut idle), line(&mut busy)), ("e".into(), "e".into()));
    let start = std::time::Instant::now();
    until("the idle one to end", || {
        carries(&mut busy);
        (balancer.listener("in")["ended_idle"] == 1).then_some(())
    });
    assert!(start.elapsed() >= Duration::from_millis(300));
    assert_eq!(idle.read(&mut [0]).unwrap(), 0);
    carries(&mut busy);
}

#[test]
fn proxy_headers_are_read_and_written() {
    for (out, expected) in [
        ("v1", b"PROXY TCP4 192.0.2.1 192.0.2.2 1111 2222\r\nhello".to_vec()),
        (
            "v2",
            [
                &b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c"[..],
                &[192, 0, 2, 1, 192, 0, 2, 2, 0x04, 0x57, 0x08, 0xae],
                b"hello",
            ]
            .concat(),
        ),
    ] {
        let sink = TcpListener::bind("127.0.0.1:0").unwrap();
        let extra = format!("proxy_in = 'required'\ntrusted = ['127.0.0.1']\nproxy_out = '{out}'\n");
        let balancer = Balancer::start(&config(&extra, "", &[("s", sink.local_addr().unwrap())]));
        let mut client = balancer.connect("in");
        // In two pieces, the second with payload behind it.
        client.write_all(b"PROXY TCP4 192.0.2.1 192.").unwrap();
        client.write_all(b"0.2.2 1111 2222\r\nhello").unwrap();
        let (mut server, _) = sink.accept().unwrap();
        let mut got = vec![0; expected.len()];
        server.read_exact(&mut got).unwrap();
        assert_eq!(got, expected);
        server.write_all(b"back").unwrap();
        let mut back = [0; 4];
        client.read_exact(&mut back).unwrap();
        assert_eq!(&back, b"back");

        let mut liar = balancer.connect("in");
        liar.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
        assert!(!matches!(liar.read(&mut [0]), Ok(1..)));
        let stranger =
            rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::STREAM, None).unwrap();
        rustix::net::bind(&stranger, &SocketAddr::from(([127, 0, 0, 77], 0))).unwrap();
        if rustix::net::connect(&stranger, &balancer.addr("in")).is_ok() {
            assert!(!matches!(TcpStream::from(stranger).read(&mut [0]), Ok(1..)));
        }
        until("both refusals", || (balancer.listener("in")["rejected_proxy"] == 2).then_some(()));
        assert_eq!(balancer.listener("in")["now"], 1);
    }
}

#[test]
fn a_killed_worker_is_replaced_and_the_others_go_on() {
    let echo = Echo::start("e");
    let balancer = Balancer::start(&config("", "", &[("e", echo.addr)]));
    let mut held: Vec<TcpStream> = (0..40).map(|_| balancer.connect("in")).collect();
    held.iter_mut().for_each(|stream| assert_eq!(line(stream), "e"));
    let workers = balancer.stats()["workers"].as_array().unwrap().clone();
    let (pid, lost) = (workers[0]["pid"].as_i64().unwrap(), workers[0]["now"].as_u64().unwrap());
    assert!((1..40).contains(&lost));
    rustix::process::kill_process(rustix::process::Pid::from_raw(pid as i32).unwrap(), rustix::process::Signal::KILL)
        .unwrap();
    until("the counts without the dead", || {
        let stats = balancer.stats();
        let backend = &stats["pools"][0]["backends"][0]["now"];
        (stats["connections"]["now"] == 40 - lost && *backend == 40 - lost).then_some(())
    });
    let mut alive = 0;
    for stream in &mut held {
        if stream.write_all(b"x\n").is_ok() && stream.read(&mut [0; 2]).is_ok_and(|count| count > 0) {
            alive += 1;
        }
    }
    assert_eq!(alive, 40 - lost);
    until("the new worker", || {
        let worker = balancer.stats()["workers"][0].clone();
        (worker["restarts"] == 1 && worker["alive"] == true && worker["pid"] != pid).then_some(())
    });
    for _ in 0..40 {
        let mut stream = until("every connection to be served", || {
            let mut stream = balancer.connect("in");
            let mut name = [0; 2];
            stream.read_exact(&mut name).is_ok().then_some(stream)
        });
        carries(&mut stream);
    }
}

#[test]
fn stopping_waits_for_connections_as_long_as_it_was_told() {
    let echo = Echo::start("e");
    let balancer = Balancer::start(&config("", "", &[("e", echo.addr)]));
    let mut held = balancer.connect("in");
    assert_eq!(line(&mut held), "e");
    let addr = balancer.addr("in");
    balancer.signal(rustix::process::Signal::TERM);
    until("the port to be closed", || TcpStream::connect(addr).is_err().then_some(()));
    carries(&mut held);
    drop(held);
    let mut balancer = balancer;
    assert!(balancer.ended_well());
}

#[test]
fn a_wrong_configuration_is_refused_at_start() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("b.toml");
    std::fs::write(&file, "[service]\nconnections = 'many'\n").unwrap();
    let run = std::process::Command::new(env!("CARGO_BIN_EXE_conduit-balancer"))
        .args(["run", "--config"])
        .arg(&file)
        .output()
        .unwrap();
    assert_eq!(run.status.code(), Some(1));
    let told = String::from_utf8(run.stderr).unwrap();
    assert!(told.contains("b.toml:2: ") && told.contains("invalid type"), "{told}");
    std::fs::write(&file, "[service]\nconnections = 4000000\n[[listener]]\nname='a'\nprotocol='tcp'\nlisten='127.0.0.1:0'\npool='p'\n[[pool]]\nname='p'\n").unwrap();
    let run = std::process::Command::new(env!("CARGO_BIN_EXE_conduit-balancer"))
        .args(["run", "--config"])
        .arg(&file)
        .output()
        .unwrap();
    let told = String::from_utf8(run.stderr).unwrap();
    assert!(run.status.code() == Some(1) && told.contains("descriptor limit"), "{told}");
}

/// With 600 descriptors a process holds fewer than 300 connections: enough workers are started, and together they hold them all.
#[test]
fn what_one_process_may_not_hold_several_do() {
    let echo = Echo::start("e");
    let text = config("", "", &[("e", echo.addr)]).replace("connections = 2000\nworkers = 2", "connections = 900");
    let balancer = Balancer::start_within(&text, 600);
    let workers = balancer.stats()["workers"].as_array().unwrap().len();
    assert!(workers >= 4, "{workers} workers cannot hold 900 connections");
    let mut held: Vec<TcpStream> = (0..900).map(|_| balancer.connect("in")).collect();
    held.iter_mut().for_each(|stream| assert_eq!(line(stream), "e"));
    let stats = balancer.stats();
    assert_eq!(stats["connections"]["now"], 900);
    for worker in stats["workers"].as_array().unwrap() {
        assert!(worker["now"].as_u64() > Some(0), "{stats}");
    }
    held.iter_mut().step_by(50).for_each(carries);
    // The next one is over the service's own limit.
    // Its reset may come before the connect has returned.
    if let Ok(mut refused) = TcpStream::connect(balancer.addr("in")) {
        assert!(!matches!(refused.read(&mut [0]), Ok(1..)));
    }
    until("it to be counted", || (balancer.listener("in")["rejected_limit"] == 1).then_some(()));
}

#[test]
fn a_backend_that_comes_and_goes_costs_no_client_anything() {
    let (steady, mut shaky) = (Echo::start("steady"), Echo::start("shaky"));
    let balancer = Balancer::start(&config("", CHECK, &[("steady", steady.addr), ("shaky", shaky.addr)]));
    let mut held: Vec<TcpStream> = Vec::new();
    let mut both = 0;
    for _ in 0..6 {
        let (name, addr) = shaky.kill();
        for _ in 0..10 {
            let mut stream = balancer.connect("in");
            assert_eq!(line(&mut stream), "steady");
            held.push(stream);
        }
        balancer.wait_backend("p", "shaky", "down", |backend| backend["state"] == "down");
        shaky = Echo::on(&name, addr);
        balancer.wait_backend("p", "shaky", "back", |backend| backend["state"] != "down");
        both += usize::from(until("a client of it", || Some(line(&mut balancer.connect("in")))) == "shaky");
    }
    assert!(both > 0, "it is given clients again");
    held.iter_mut().for_each(carries);
    assert_eq!(balancer.listener("in")["no_backend"], 0);
}

/// Far more at once than the accept queue of a slow server would take, without a pause.
#[test]
fn a_flood_of_connects_is_served_whole() {
    let echo = Echo::start("e");
    let balancer = Balancer::start(&config("", "", &[("e", echo.addr)]));
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                let mut all: Vec<TcpStream> = (0..200).map(|_| balancer.connect("in")).collect();
                all.iter_mut().for_each(|stream| assert_eq!(line(stream), "e"));
            });
        }
    });
    let stats = balancer.listener("in");
    assert_eq!((stats["total"].as_u64(), stats["no_backend"].as_u64()), (Some(1600), Some(0)));
    until("all to be gone", || (balancer.listener("in")["now"] == 0).then_some(()));
}
