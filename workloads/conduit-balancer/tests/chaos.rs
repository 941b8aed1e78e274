//! Clients and backends that do what they like, while backends come and go: no byte is lost, crossed or invented, and nothing
//! is left behind.

mod support;

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;
use support::*;

/// splitmix64: the same plan for the same seed.
#[derive(Clone)]
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }
}

/// The bytes of one flow: no two flows share a stretch of them.
struct Bytes {
    random: Random,
    word: [u8; 8],
    used: usize,
}

impl Bytes {
    fn new(flow: u64) -> Bytes {
        Bytes { random: Random(flow.wrapping_mul(0x2545_f491_4f6c_dd1d)), word: [0; 8], used: 8 }
    }

    fn fill(&mut self, out: &mut [u8]) {
        for byte in out {
            if self.used == 8 {
                self.word = self.random.next().to_le_bytes();
                self.used = 0;
            }
            *byte = self.word[self.used];
            self.used += 1;
        }
    }
}

/// What the client asks of its backend: kind and a number of bytes.
const ECHO: u8 = b'e';
const RESET_AFTER: u8 = b'r';
const CLOSE_AFTER: u8 = b'c';

fn reset(stream: &TcpStream) {
    rustix::net::sockopt::set_socket_linger(stream, Some(Duration::ZERO)).unwrap();
}

fn serve(mut stream: TcpStream) {
    let mut order = [0; 5];
    if stream.read_exact(&mut order).is_err() {
        return;
    }
    let most = u32::from_le_bytes(order[1..].try_into().unwrap()) as usize;
    let mut left = if order[0] == ECHO { usize::MAX } else { most };
    let mut buffer = vec![0; 1 + most % 50_000];
    while left > 0 {
        let count = match stream.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => count.min(left),
            Err(_) => return,
        };
        left -= count;
        if stream.write_all(&buffer[..count]).is_err() {
            return;
        }
    }
    match order[0] {
        RESET_AFTER => reset(&stream),
        CLOSE_AFTER => {}
        // The client has ended its direction; this ends ours, and the client sees it after all it sent.
        _ => drop(stream.shutdown(Shutdown::Write)),
    }
}

fn backend() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            std::thread::spawn(move || serve(stream));
        }
    });
    addr
}

/// One flow by its plan. Whether it was to come back whole, and did.
fn flow(to: SocketAddr, seed: u64) -> bool {
    let mut plan = Random(seed);
    let kind = [ECHO, ECHO, ECHO, RESET_AFTER, CLOSE_AFTER][plan.below(5)];
    // Most are small; some are spliced.
    let total = match plan.below(10) {
        0 => 0,
        1..=6 => plan.below(4_000),
        7..=8 => plan.below(200_000),
        _ => plan.below(3_000_000),
    };
    let stop_at = (plan.below(6) == 0).then(|| plan.below(total + 1));
    let by_reset = plan.below(2) == 0;
    let chunk = 1 + plan.below(100_000);
    let mut stream = TcpStream::connect(to).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    let mut order = vec![kind];
    order.extend_from_slice(&(plan.below(total + 2) as u32).to_le_bytes());
    let mut reader = stream.try_clone().unwrap();
    let sender = std::thread::spawn(move || {
        let (mut bytes, mut buffer, mut sent) = (Bytes::new(seed), vec![0; chunk], 0);
        if stream.write_all(&order).is_err() {
            return;
        }
        let most = stop_at.unwrap_or(total);
        while sent < most {
            let count = chunk.min(most - sent);
            bytes.fill(&mut buffer[..count]);
            if stream.write_all(&buffer[..count]).is_err() {
                return;
            }
            sent += count;
        }
        if stop_at.is_some() {
            if by_reset {
                reset(&stream);
            }
            // The reader's half of the socket goes at once as well.
            let _ = stream.shutdown(Shutdown::Both);
        } else {
            let _ = stream.shutdown(Shutdown::Write);
        }
    });
    let (mut bytes, mut buffer, mut expected, mut got) =
        (Bytes::new(seed), vec![0; 1 + plan.below(70_000)], Vec::new(), 0);
    let ended = loop {
        match reader.read(&mut buffer) {
            Ok(0) => break true,
            Ok(count) => {
                expected.resize(count, 0);
                bytes.fill(&mut expected);
                assert!(buffer[..count] == expected[..], "flow {seed:#x}: other bytes than its own after {got}");
                got += count;
            }
            Err(error) if [ErrorKind::WouldBlock, ErrorKind::TimedOut].contains(&error.kind()) => {
                panic!("flow {seed:#x} got {got} of {total} bytes and then nothing")
            }
            Err(_) => break false,
        }
    };
    sender.join().unwrap();
    assert!(got <= total, "flow {seed:#x}: more than was sent");
    let whole = kind == ECHO && stop_at.is_none();
    assert!(!whole || (ended && got == total), "flow {seed:#x} got {got} of {total} bytes, in order: {ended}");
    whole
}

fn storm(flows: usize) {
    let seed: u64 = std::env::var("CHAOS_SEED").map_or_else(|_| rand::random(), |seed| seed.parse().unwrap());
    println!("CHAOS_SEED={seed}");
    let backends: Vec<SocketAddr> = (0..4).map(|_| backend()).collect();
    let mut config = "[service]\nconnections = 2000\nworkers = 2\nsplice_after = 65536\n[[listener]]\nname = 'in'\nprotocol = 'tcp'\nlisten = '127.0.0.1:0'\npool = 'p'\n\
                      [[pool]]\nname = 'p'\n[pool.check]\nkind = 'tcp'\ninterval = '100ms'\n"
        .to_owned();
    for (n, addr) in backends.iter().enumerate() {
        config += &format!("[[pool.backend]]\nname = 'b{n}'\naddr = '{addr}'\n");
    }
    let balancer = Balancer::start(&config);
    let (next, whole, over) = (AtomicUsize::new(0), AtomicUsize::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..12)
            .map(|_| {
                scope.spawn(|| {
                    loop {
                        let number = next.fetch_add(1, Ordering::Relaxed);
                        if number >= flows {
                            return;
                        }
                        if flow(balancer.addr("in"), seed.wrapping_add(number as u64 * 7919)) {
                            whole.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                })
            })
            .collect();
        // Meanwhile: drained and back, weighed anew, removed and added, the file read again. b0 always stays.
        let changes = scope.spawn(|| {
            let mut random = Random(seed);
            let mut changes = 0;
            while !over.load(Ordering::Relaxed) {
                let n = 1 + random.below(3);
                let path = format!("/api/pools/p/backends/b{n}");
                let status = match random.below(6) {
                    0 => balancer.ask("PATCH", &path, "{\"drain\":true}").0,
                    1 => balancer.ask("PATCH", &path, "{\"drain\":false}").0,
                    2 => balancer.ask("PATCH", &path, &format!("{{\"weight\":{}}}", 1 + random.below(200))).0,
                    3 => balancer.ask("DELETE", &path, "").0,
                    4 => {
                        let body = format!("{{\"name\":\"b{n}\",\"addr\":\"{}\"}}", backends[n]);
                        balancer.ask("POST", "/api/pools/p/backends", &body).0
                    }
                    _ => balancer.ask("POST", "/api/reload", "").0,
                };
                assert!([201, 204, 404, 409].contains(&status), "{status}");
                changes += 1;
            }
            changes
        });
        for worker in workers {
            if let Err(panic) = worker.join() {
                over.store(true, Ordering::Relaxed);
                std::panic::resume_unwind(panic);
            }
        }
        over.store(true, Ordering::Relaxed);
        println!(
            "{} flows, {} of them whole, {} changes",
            flows,
            whole.load(Ordering::Relaxed),
            changes.join().unwrap()
        );
    });
    assert!(whole.load(Ordering::Relaxed) > flows / 4);
    until("every count to be back at zero", || {
        let stats = balancer.stats();
        let backends = stats["pools"][0]["backends"].as_array().unwrap();
        (stats["connections"]["now"] == 0 && backends.iter().all(|backend| backend["now"] == 0)).then_some(())
    });
    // A listener for each worker is all that is left open.
    until("every socket to be closed", || {
        balancer.stats()["workers"].as_array().unwrap().iter().all(|worker| worker["sockets"] == 1).then_some(())
    });
    let stats = balancer.stats();
    assert!(stats["workers"].as_array().unwrap().iter().all(|worker| worker["restarts"] == 0), "{stats}");
    assert_eq!(balancer.listener("in")["no_backend"], 0);
}

#[test]
fn no_byte_is_lost_whatever_clients_backends_and_operators_do() {
    storm(600);
}

#[test]
#[ignore = "minutes: run with the nightly profile"]
fn no_byte_is_lost_in_twenty_thousand_flows() {
    storm(20_000);
}
