//! The load mode: a hub, thousands of simulated peers in several countries, an origin and customers, on one machine.

use crate::geo::{Place, build};
use crate::peer::{self, Fleet, Options};
use crate::target::Country;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::watch;

/// Where simulated peers seem to be: a loopback block each, in the shares that a real network has.
const PLACES: [(u8, &str, &str, &str, u32, u32); 8] = [
    (1, "US", "new york", "new york", 7922, 30),
    (2, "US", "florida", "miami", 7018, 15),
    (3, "US", "california", "los angeles", 20001, 18),
    (4, "DE", "berlin", "berlin", 3320, 10),
    (5, "FR", "ile de france", "paris", 3215, 8),
    (6, "GB", "england", "london", 2856, 8),
    (7, "JP", "tokyo", "tokyo", 2516, 6),
    (8, "SG", "singapore", "singapore", 9506, 5),
];

/// Writes a geo database that knows the simulated peers' addresses.
pub fn geo_database(path: &Path) -> std::io::Result<()> {
    let blocks: Vec<_> = PLACES
        .iter()
        .map(|(net, country, state, city, asn, _)| {
            let place = Place {
                country: Country::parse(country).unwrap_or(Country::UNKNOWN),
                state: (*state).to_owned(),
                city: (*city).to_owned(),
                asn: *asn,
            };
            (Ipv4Addr::new(127, *net, 0, 0), 16, place)
        })
        .collect();
    std::fs::write(path, build::database(&blocks, 28))
}

/// The address of the `n`-th simulated peer. A few hundred peers share an address, as behind a carrier's NAT.
pub fn source(n: usize) -> IpAddr {
    let total: u32 = PLACES.iter().map(|p| p.5).sum();
    let mut at = (n as u32 * 37) % total;
    let mut net = PLACES[0].0;
    for place in &PLACES {
        if at < place.5 {
            net = place.0;
            break;
        }
        at -= place.5;
    }
    IpAddr::V4(Ipv4Addr::new(127, net, (n / 200 % 250) as u8, 1 + (n % 200) as u8))
}

/// Starts `count` peers, `pace` a second, numbered from `first`.
pub async fn peers(
    hub: SocketAddr,
    first: usize,
    count: usize,
    pace: f64,
    fleet: &Fleet,
    options: &Options,
    stop: &watch::Receiver<bool>,
) {
    let began = Instant::now();
    for n in first..first + count {
        let own = Options { hub, device: format!("sim-{n}"), source: Some(source(n)), ..options.clone() };
        tokio::spawn(peer::run(own, fleet.clone(), stop.clone()));
        let due = Duration::from_secs_f64((n - first) as f64 / pace);
        if let Some(ahead) = due.checked_sub(began.elapsed()).filter(|d| *d > Duration::from_millis(2)) {
            tokio::time::sleep(ahead).await;
        }
    }
}

/// An origin that sends back what it gets.
pub async fn echo() -> std::io::Result<SocketAddr> {
    let socket = tokio::net::TcpSocket::new_v4()?;
    socket.bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))?;
    // A thousand exits may connect in the same moment; with a short queue the kernel answers by cookies and resets some.
    let listener = socket.listen(4096)?;
    let addr = listener.local_addr()?;
    tokio::spawn(async move {
        loop {
            let Ok((mut stream, _)) = listener.accept().await else {
                // Out of descriptors for a moment: those that wait are served when some are free.
                tokio::time::sleep(Duration::from_millis(10)).await;
                continue;
            };
            tokio::spawn(async move {
                let (mut read, mut write) = stream.split();
                let _ = tokio::io::copy(&mut read, &mut write).await;
                let _ = write.shutdown().await;
            });
        }
    });
    Ok(addr)
}

/// Opens a tunnel by SOCKS5. The error is the reply code.
pub async fn socks(
    customers: SocketAddr,
    user: &str,
    key: &str,
    to: SocketAddr,
) -> std::io::Result<Result<tokio::net::TcpStream, u8>> {
    let mut stream = tokio::net::TcpStream::connect(customers).await?;
    stream.set_nodelay(true)?;
    let mut hello = vec![5, 1, 2, 1, user.len() as u8];
    hello.extend(user.bytes());
    hello.push(key.len() as u8);
    hello.extend(key.bytes());
    stream.write_all(&hello).await?;
    let mut answer = [0; 4];
    stream.read_exact(&mut answer).await?;
    if answer != [5, 2, 1, 0] {
        return Ok(Err(0xff));
    }
    let mut request = vec![5, 1, 0];
    crate::socks::put_address(&mut request, to);
    stream.write_all(&request).await?;
    let mut reply = [0; 10];
    stream.read_exact(&mut reply).await?;
    Ok(if reply[1] == 0 { Ok(stream) } else { Err(reply[1]) })
}

/// Latencies of requests that each open a tunnel, echo `bytes` and close; in order, microseconds.
pub async fn requests(
    customers: SocketAddr,
    user: &str,
    key: &str,
    origin: SocketAddr,
    count: usize,
    at_once: usize,
    bytes: usize,
) -> (Vec<u64>, usize) {
    let next = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let mut tasks = Vec::new();
    for _ in 0..at_once {
        let (next, user, key) = (next.clone(), user.to_owned(), key.to_owned());
        tasks.push(tokio::spawn(async move {
            let mut took = Vec::new();
            let mut failed = 0;
            while next.fetch_add(1, std::sync::atomic::Ordering::Relaxed) < count {
                let began = Instant::now();
                let one = async {
                    let mut stream = socks(customers, &user, &key, origin)
                        .await?
                        .map_err(|c| std::io::Error::other(format!("reply {c}")))?;
                    let sent = vec![7; bytes];
                    stream.write_all(&sent).await?;
                    let mut back = vec![0; bytes];
                    stream.read_exact(&mut back).await?;
                    if back == sent { Ok(()) } else { Err(std::io::Error::other("bytes differ")) }
                };
                match tokio::time::timeout(Duration::from_secs(30), one).await {
                    Ok(Ok(())) => took.push(began.elapsed().as_micros() as u64),
                    _ => failed += 1,
                }
            }
            (took, failed)
        }));
    }
    let (mut all, mut failed) = (Vec::new(), 0);
    for task in tasks {
        if let Ok((took, lost)) = task.await {
            all.extend(took);
            failed += lost;
        }
    }
    all.sort_unstable();
    (all, failed)
}

/// The value at a percentile of a sorted list.
pub fn percentile(sorted: &[u64], p: f64) -> u64 {
    let at = ((sorted.len() as f64 * p / 100.0) as usize).min(sorted.len().saturating_sub(1));
    sorted.get(at).copied().unwrap_or(0)
}
