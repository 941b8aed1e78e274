//! A thread for each connection, up to a limit, and an end that lets answers under way finish.

use std::collections::HashMap;
use std::io::{self, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use nix::sys::signal::{SigSet, Signal};
use tungstenite::handshake::derive_accept_key;
use tungstenite::protocol::{Role, WebSocketConfig};
use tungstenite::{Message, WebSocket};

use crate::http::{Answer, Refusal, Request, Wire};
use crate::page;

/// Each is a thread, and a sandbox bounds those.
const MAX_CONNECTIONS: usize = 48;
const STACK: usize = 128 << 10;
const IDLE: Duration = Duration::from_secs(20);
const WEBSOCKET_IDLE: Duration = Duration::from_secs(300);
const MAX_SLOW_MS: u64 = 60_000;
const MAX_MESSAGE: usize = 1 << 20;
/// What is still under way then is cut off.
const DRAIN: Duration = Duration::from_secs(5);

pub struct Server {
    pub name: String,
    pub start: Instant,
    pub requests: AtomicU64,
    stopping: AtomicBool,
    open: Mutex<HashMap<u64, TcpStream>>,
    closed: Condvar,
}

/// Ends the process as a crash does.
pub fn abort_after(ms: u64) {
    thread::spawn(move || {
        thread::sleep(Duration::from_millis(ms));
        eprintln!("hello: crashing after {ms} ms, as asked");
        std::process::abort();
    });
}

pub fn serve(start: Instant) -> ExitCode {
    // Before any thread: all inherit the mask, so the signals wait for the `wait` below.
    let mut stop = SigSet::empty();
    stop.add(Signal::SIGTERM);
    stop.add(Signal::SIGINT);
    if let Err(error) = stop.thread_block() {
        eprintln!("hello: cannot block signals: {error}");
        return ExitCode::FAILURE;
    }
    let port = std::env::var("PORT").unwrap_or_else(|_| "8080".into());
    let listener = port
        .parse::<u16>()
        .map_err(|_| io::Error::other("PORT is not a port"))
        .and_then(|port| TcpListener::bind(("0.0.0.0", port)));
    let (listener, address) = match listener.and_then(|l| l.local_addr().map(|address| (l, address))) {
        Ok(bound) => bound,
        Err(error) => {
            eprintln!("hello: cannot listen on port {port}: {error}");
            return ExitCode::FAILURE;
        }
    };
    let server = Arc::new(Server {
        name: std::env::var("CLAWHQ_WORKLOAD").unwrap_or_else(|_| "hello".into()),
        start,
        requests: AtomicU64::new(0),
        stopping: AtomicBool::new(false),
        open: Mutex::default(),
        closed: Condvar::new(),
    });
    log(format_args!("{} is listening on {address}, {:.2} ms after its start", server.name, ms_since(start)));
    let acceptor = Arc::clone(&server);
    thread::spawn(move || acceptor.accept(&listener));

    let signal = stop.wait();
    server.stopping.store(true, Ordering::SeqCst);
    let cut = server.drain();
    let name = signal.map_or("a signal", Signal::as_str);
    log(format_args!(
        "stopped by {name}: {} requests answered, {cut} connections cut off",
        server.requests.load(Ordering::Relaxed)
    ));
    ExitCode::SUCCESS
}

impl Server {
    fn open(&self) -> MutexGuard<'_, HashMap<u64, TcpStream>> {
        self.open.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn accept(self: Arc<Self>, listener: &TcpListener) {
        let mut next = 0;
        loop {
            let stream = match listener.accept() {
                Ok((stream, _)) => stream,
                Err(_) => {
                    // Out of descriptors, or a client that left: the next try must not spin.
                    thread::sleep(Duration::from_millis(5));
                    continue;
                }
            };
            if self.stopping.load(Ordering::SeqCst) {
                return;
            }
            next += 1;
            let id = next;
            let Ok(own) = stream.try_clone() else { continue };
            let full = {
                let mut open = self.open();
                let full = open.len() >= MAX_CONNECTIONS;
                if !full {
                    open.insert(id, own);
                }
                full
            };
            let _ = stream.set_nodelay(true);
            let _ = stream.set_read_timeout(Some(IDLE));
            let _ = stream.set_write_timeout(Some(IDLE));
            let mut wire = Wire { stream, ahead: Vec::new() };
            if full {
                let busy = Answer::text(503, "All connections are in use.").with("retry-after", "1");
                let _ = wire.answer(&busy, false, false);
                continue;
            }
            let server = Arc::clone(&self);
            let spawned = thread::Builder::new().stack_size(STACK).spawn(move || {
                server.converse(wire);
                server.forget(id);
            });
            if spawned.is_err() {
                self.forget(id);
            }
        }
    }

    fn forget(&self, id: u64) {
        self.open().remove(&id);
        self.closed.notify_all();
    }

    /// No connection may begin another request; how many had to be cut off.
    fn drain(&self) -> usize {
        let end = Instant::now() + DRAIN;
        let mut open = self.open();
        for stream in open.values() {
            let _ = stream.shutdown(Shutdown::Read);
        }
        while !open.is_empty() {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            open = match self.closed.wait_timeout(open, left) {
                Ok((open, _)) => open,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
        open.len()
    }

    fn converse(&self, mut wire: Wire) {
        loop {
            let request = match wire.read_request() {
                Ok(request) => request,
                Err(Refusal::End) => return,
                Err(Refusal::Status(status, text)) => {
                    log(format_args!("- - {status}"));
                    let _ = wire.answer(&Answer::text(status, text), false, false);
                    // Reading what is left, shortly: a reset would take the answer away from the client.
                    let _ = wire.stream.shutdown(Shutdown::Write);
                    let _ = wire.stream.set_read_timeout(Some(Duration::from_millis(200)));
                    let _ = io::copy(&mut io::Read::take(&mut wire.stream, 4 << 20), &mut io::sink());
                    return;
                }
            };
            let begun = Instant::now();
            self.requests.fetch_add(1, Ordering::Relaxed);
            if let (true, Some(key)) = (request.path == "/ws", &request.websocket_key) {
                log(format_args!("GET /ws 101"));
                let messages = self.websocket(wire, key);
                log(format_args!("WS /ws closed, {messages} messages, {:.1} ms", ms_since(begun)));
                return;
            }
            let answer = self.answer(&request);
            let keep_alive = request.keep_alive && !self.stopping.load(Ordering::SeqCst);
            let sent = wire.answer(&answer, request.method == "HEAD", keep_alive);
            log(format_args!(
                "{} {} {} {} B {:.1} ms",
                plain(&request.method),
                plain(&request.path),
                answer.status,
                answer.body.len(),
                ms_since(begun)
            ));
            if sent.is_err() || !keep_alive {
                return;
            }
        }
    }

    fn answer(&self, request: &Request) -> Answer {
        let reads = matches!(request.method.as_str(), "GET" | "HEAD");
        match request.path.as_str() {
            "/" if reads => Answer::new(200, "text/html; charset=utf-8", page::render(self)).with(
                "content-security-policy",
                "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self' ws: wss:; \
                 base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
            ),
            "/healthz" if reads => Answer::json("{\"ok\":true}"),
            "/env" if reads => {
                let mut names: Vec<String> =
                    std::env::vars_os().map(|(name, _)| page::json_string(&name.to_string_lossy())).collect();
                names.sort();
                Answer::json(format!("[{}]", names.join(",")))
            }
            "/slow" if reads => {
                let ms = request.query.split('&').find_map(|pair| pair.strip_prefix("ms="));
                match ms.map_or(Ok(1000), str::parse::<u64>) {
                    Ok(ms) if ms <= MAX_SLOW_MS => {
                        thread::sleep(Duration::from_millis(ms));
                        Answer::text(200, format_args!("slept {ms} ms"))
                    }
                    _ => Answer::text(400, "ms is a number up to 60000."),
                }
            }
            "/echo" if request.method == "POST" => Answer::new(200, "application/octet-stream", request.body.clone()),
            "/ws" if reads && request.bad_upgrade => Answer::text(400, "This is not a WebSocket upgrade of version 13."),
            "/ws" if reads => Answer::text(426, "Speak WebSocket here.").with("upgrade", "websocket"),
            "/" | "/healthz" | "/env" | "/slow" | "/ws" => Answer::text(405, "Only GET.").with("allow", "GET, HEAD"),
            "/echo" => Answer::text(405, "Only POST.").with("allow", "POST"),
            _ => Answer::text(404, "There is /, /healthz, /env, /slow?ms=, POST /echo, and the WebSocket /ws."),
        }
    }

    /// Greets, then sends everything back; returns how many messages came.
    fn websocket(&self, wire: Wire, key: &str) -> u64 {
        let Wire { mut stream, ahead } = wire;
        let accept = derive_accept_key(key.as_bytes());
        let upgraded = write!(
            stream,
            "HTTP/1.1 101 Switching Protocols\r\nconnection: Upgrade\r\nupgrade: websocket\r\nsec-websocket-accept: {accept}\r\n\r\n"
        );
        let _ = stream.set_read_timeout(Some(WEBSOCKET_IDLE));
        if upgraded.is_err() {
            return 0;
        }
        let config = WebSocketConfig::default()
            .max_message_size(Some(MAX_MESSAGE))
            .max_frame_size(Some(MAX_MESSAGE))
            .max_write_buffer_size(4 * MAX_MESSAGE);
        let mut socket = WebSocket::from_partially_read(stream, ahead, Role::Server, Some(config));
        let mut messages = 0;
        let mut reply = Some(Message::text(format!("Hello from {}. Whatever you send comes back.", self.name)));
        loop {
            if let Some(message) = reply.take()
                && socket.send(message).is_err()
            {
                return messages;
            }
            match socket.read() {
                Ok(message @ (Message::Text(_) | Message::Binary(_))) => {
                    messages += 1;
                    reply = Some(message);
                }
                Ok(_) => {}
                // Closed by the other side, with the answer given already.
                Err(tungstenite::Error::ConnectionClosed) => return messages,
                Err(_) => {
                    // The reading side was shut by `drain`, or was idle for too long: 1001, going away. By hand,
                    // for the library writes nothing after an end that came without a close.
                    let _ = socket.get_mut().write_all(&[0x88, 2, 0x03, 0xe9]);
                    return messages;
                }
            }
        }
    }
}

fn ms_since(start: Instant) -> f64 {
    start.elapsed().as_secs_f64() * 1e3
}

/// What a client chose, fit for a line of the log.
fn plain(text: &str) -> String {
    text.chars().take(200).map(|c| if c.is_control() { '?' } else { c }).collect()
}

/// A reader that went away must not end the server.
fn log(line: std::fmt::Arguments<'_>) {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let _ = writeln!(io::stdout().lock(), "{} {line}", timestamp(now));
}

/// RFC 3339 with milliseconds.
fn timestamp(since_epoch: Duration) -> String {
    let seconds = since_epoch.as_secs();
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    // Civil date from days, counted in years that begin in March (Hinnant).
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}.{:03}Z",
        second / 3_600,
        second / 60 % 60,
        second % 60,
        since_epoch.subsec_millis()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timestamps_are_civil() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00.007Z"),
            (951_782_399, "2000-02-28T23:59:59.007Z"),
            (951_782_400, "2000-02-29T00:00:00.007Z"),
            (1_795_253_025, "2026-11-21T09:23:45.007Z"),
            (4_107_542_400, "2100-03-01T00:00:00.007Z"),
        ] {
            assert_eq!(timestamp(Duration::from_millis(seconds * 1000 + 7)), text);
        }
    }
}
