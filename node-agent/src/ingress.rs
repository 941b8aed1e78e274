//! The way in: the edge connects to a unix socket, names a slot and a port, and is joined to 127.0.0.1:port inside.
//!
//! `CLAWHQ/1 <slot> <port>\n` is answered `OK\n`, or `ERR <code> <message>\n` and the end; then raw bytes both ways.

use std::collections::HashMap;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clawhq_domain::ids::SlotId;
use parking_lot::RwLock;
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional_with_sizes};
use tokio::net::{TcpStream, UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;

use crate::metrics::Counters;
use crate::netns::{Netns, Workers};

const REQUEST_DEADLINE: Duration = Duration::from_secs(5);
const LINGER: Duration = Duration::from_millis(500);
const REQUEST_MAX: usize = 128;
const BUFFER: usize = 16 << 10;

/// A slot that may be reached: it is claimed and its process runs.
#[derive(Clone)]
pub struct Route {
    pub netns: Netns,
    pub ports: Vec<u16>,
    /// Connections that it may have open beside those it has.
    pub seats: Arc<Semaphore>,
    /// Cancelled when the slot may not be reached any more: open connections end.
    pub gone: CancellationToken,
}

pub type Routes = Arc<RwLock<HashMap<SlotId, Route>>>;

/// A refusal, as the edge reads it.
#[derive(Debug, PartialEq, Eq)]
struct Refusal(&'static str, String);

#[derive(Clone)]
struct Server {
    routes: Routes,
    workers: Workers,
    counters: Counters,
    seats: Arc<Semaphore>,
    stop: CancellationToken,
}

/// Binds the socket (readable by its owner only) and serves it until `stop`.
pub fn serve(
    path: PathBuf,
    routes: Routes,
    workers: Workers,
    counters: Counters,
    connections_max: usize,
    stop: CancellationToken,
) -> io::Result<()> {
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(&path)?;
    std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o660))?;
    let server = Server { routes, workers, counters, seats: Arc::new(Semaphore::new(connections_max)), stop };
    tokio::spawn(async move {
        loop {
            let accepted = tokio::select! {
                () = server.stop.cancelled() => return,
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok((stream, _)) => {
                    let server = server.clone();
                    tokio::spawn(async move { server.connection(stream).await });
                }
                Err(error) => {
                    tracing::warn!(%error, "an ingress connection could not be accepted");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            }
        }
    });
    Ok(())
}

impl Server {
    async fn connection(&self, mut stream: UnixStream) {
        let Ok(_seat) = self.seats.clone().try_acquire_owned() else {
            self.counters.ingress_refused.inc();
            return refuse(stream, "ERR node_busy too many connections on this node\n").await;
        };
        match tokio::time::timeout(REQUEST_DEADLINE, self.open(&mut stream)).await {
            Ok(Ok((mut inner, route, _seat))) => {
                self.counters.ingress_connections.inc();
                let carried = tokio::select! {
                    () = self.stop.cancelled() => None,
                    () = route.gone.cancelled() => None,
                    result = copy_bidirectional_with_sizes(&mut stream, &mut inner, BUFFER, BUFFER) => result.ok(),
                };
                self.counters.ingress_connections.dec();
                if let Some((up, down)) = carried {
                    self.counters.ingress_bytes.inc_by(up + down);
                }
            }
            Ok(Err(Refusal(code, message))) => {
                self.counters.ingress_refused.inc();
                refuse(stream, &format!("ERR {code} {message}\n")).await;
            }
            Err(_) => {
                self.counters.ingress_refused.inc();
            }
        }
    }

    async fn open(&self, stream: &mut UnixStream) -> Result<(TcpStream, Route, OwnedSemaphorePermit), Refusal> {
        let request = read_line(stream).await.map_err(|error| Refusal("bad_request", error.to_string()))?;
        let (slot, port) = parse(&request)?;
        let route = self
            .routes
            .read()
            .get(&slot)
            .cloned()
            .ok_or_else(|| Refusal("not_running", format!("{slot} does not run here")))?;
        if !route.ports.contains(&port) {
            return Err(Refusal("port_not_allowed", format!("port {port} is not one of its ports")));
        }
        let seat = route.seats.clone().try_acquire_owned();
        let seat = seat.map_err(|_| Refusal("busy", format!("{slot} has too many connections")))?;
        let inner = self
            .workers
            .connect(&route.netns, port)
            .await
            .map_err(|error| Refusal("refused", format!("port {port} does not answer: {error}")))?;
        stream.write_all(b"OK\n").await.map_err(|error| Refusal("gone", error.to_string()))?;
        Ok((inner, route, seat))
    }
}

/// Closing with something unread would take the answer back from whoever sent on without waiting for it.
async fn refuse(mut stream: UnixStream, answer: &str) {
    let linger = async {
        stream.write_all(answer.as_bytes()).await?;
        stream.shutdown().await?;
        tokio::io::copy(&mut (&mut stream).take(64 << 10), &mut tokio::io::sink()).await
    };
    let _ = tokio::time::timeout(LINGER, linger).await;
}

/// Byte by byte: what follows the line is the tenant's.
async fn read_line(stream: &mut UnixStream) -> io::Result<String> {
    let mut line = Vec::with_capacity(64);
    loop {
        let byte = stream.read_u8().await?;
        if byte == b'\n' {
            return String::from_utf8(line).map_err(|_| io::Error::other("the request is not text"));
        }
        if line.len() == REQUEST_MAX {
            return Err(io::Error::other("the request is too long"));
        }
        line.push(byte);
    }
}

fn parse(request: &str) -> Result<(SlotId, u16), Refusal> {
    let refused = || Refusal("bad_request", "expected: CLAWHQ/1 <slot> <port>".to_owned());
    let mut words = request.trim_end_matches('\r').split(' ');
    match (words.next(), words.next(), words.next(), words.next()) {
        (Some("CLAWHQ/1"), Some(slot), Some(port), None) => {
            let port = port.parse().ok().filter(|port| *port != 0).ok_or_else(refused)?;
            Ok((slot.parse().map_err(|_| refused())?, port))
        }
        _ => Err(refused()),
    }
}

#[cfg(test)]
mod tests {
    use clawhq_runtime::metrics::Metrics;

    use super::*;

    #[test]
    fn requests_are_strict() {
        let slot = SlotId::from_u128(3);
        assert_eq!(parse(&format!("CLAWHQ/1 {slot} 80")), Ok((slot, 80)));
        for bad in ["", "CLAWHQ/1", "CLAWHQ/2 x 80", &format!("CLAWHQ/1 {slot} 0"), &format!("CLAWHQ/1 {slot} 80 x")] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    async fn ask(path: &std::path::Path, line: &str) -> (String, UnixStream) {
        let mut stream = UnixStream::connect(path).await.unwrap();
        stream.write_all(line.as_bytes()).await.unwrap();
        let answer = read_line(&mut stream).await.unwrap();
        (answer, stream)
    }

    #[tokio::test]
    async fn only_routes_and_their_ports_are_joined() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ingress.sock");
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (slot, routes) = (SlotId::from_u128(3), Routes::default());
        let counters = Counters::register(&Metrics::new());
        let stop = CancellationToken::new();
        // More than are made here: a refused one keeps its place for a moment.
        serve(path.clone(), routes.clone(), Workers::start().unwrap(), counters, 8, stop.clone()).unwrap();

        assert!(ask(&path, &format!("CLAWHQ/1 {slot} {port}\n")).await.0.starts_with("ERR not_running"));
        let gone = CancellationToken::new();
        let netns = Netns::of_pid(std::process::id()).unwrap();
        let seats = Arc::new(Semaphore::new(1));
        routes.write().insert(slot, Route { netns, ports: vec![port], seats, gone: gone.clone() });
        assert!(ask(&path, &format!("CLAWHQ/1 {slot} 1\n")).await.0.starts_with("ERR port_not_allowed"));

        let (answer, mut stream) = ask(&path, &format!("CLAWHQ/1 {slot} {port}\nping")).await;
        assert_eq!(answer, "OK");
        let (mut inner, _) = listener.accept().await.unwrap();
        let mut four = [0; 4];
        inner.read_exact(&mut four).await.unwrap();
        assert_eq!(&four, b"ping");
        inner.write_all(b"pong").await.unwrap();
        stream.read_exact(&mut four).await.unwrap();
        assert_eq!(&four, b"pong");
        let second = ask(&path, &format!("CLAWHQ/1 {slot} {port}\n")).await.0;
        assert!(second.starts_with(&format!("ERR busy {slot} ")), "{second}");
        gone.cancel();
        assert_eq!(stream.read(&mut four).await.unwrap(), 0, "a slot that leaves takes its connections with it");
        stop.cancel();
    }

    #[tokio::test]
    async fn a_full_node_says_that_it_is_the_node() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ingress.sock");
        let counters = Counters::register(&Metrics::new());
        let stop = CancellationToken::new();
        serve(path.clone(), Routes::default(), Workers::start().unwrap(), counters, 0, stop.clone()).unwrap();
        let answer = ask(&path, &format!("CLAWHQ/1 {} 80\n", SlotId::from_u128(3))).await.0;
        assert!(answer.starts_with("ERR node_busy "), "{answer}");
        stop.cancel();
    }
}
