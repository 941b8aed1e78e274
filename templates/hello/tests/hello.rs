//! The real binary over real sockets.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::process::{Child, ChildStdout, Command, Output, Stdio};
use std::time::Duration;

use tungstenite::protocol::Role;
use tungstenite::{Message, WebSocket};

const HELLO: &str = env!("CARGO_BIN_EXE_hello");

struct Hello {
    child: Child,
    out: BufReader<ChildStdout>,
    port: u16,
}

impl Hello {
    fn new() -> Self {
        Self::with(&[])
    }

    fn with(args: &[&str]) -> Self {
        let mut child = Command::new(HELLO)
            .args(args)
            .env("PORT", "0")
            .env("CLAWHQ_WORKLOAD", "<b>my agent</b>")
            .env("SECRET_NAME", "secret value")
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut out = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        out.read_line(&mut line).unwrap();
        let port = line.split("0.0.0.0:").nth(1).and_then(|rest| rest.split(',').next()).unwrap().parse().unwrap();
        Hello { child, out, port }
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(("127.0.0.1", self.port)).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream
    }

    /// What comes back for these bytes, to the end of the connection.
    fn raw(&self, request: &[u8]) -> String {
        let mut stream = self.connect();
        stream.write_all(request).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        String::from_utf8_lossy(&answer).into_owned()
    }

    fn get(&self, path: &str) -> String {
        self.raw(format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").as_bytes())
    }

    fn signal(&self, name: &str) {
        assert!(Command::new("kill").args(["-s", name, &self.child.id().to_string()]).status().unwrap().success());
    }

    fn stop(mut self) -> (Option<i32>, String) {
        self.signal("TERM");
        let code = self.child.wait().unwrap().code();
        let mut log = String::new();
        self.out.read_to_string(&mut log).unwrap();
        (code, log)
    }
}

impl Drop for Hello {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn body(answer: &str) -> &str {
    answer.split_once("\r\n\r\n").unwrap().1
}

fn status(answer: &str) -> &str {
    answer.split(' ').nth(1).unwrap_or_default()
}

#[test]
fn pages_health_and_names() {
    let hello = Hello::new();
    let page = hello.get("/");
    assert!(page.starts_with("HTTP/1.1 200 OK\r\n") && page.contains("content-security-policy: default-src 'none'"));
    assert!(page.contains("<h1>&lt;b&gt;my agent&lt;/b&gt;</h1>") && !page.contains("<b>my agent"));
    assert_eq!(body(&hello.get("/healthz")), "{\"ok\":true}");
    let names = hello.get("/env");
    assert!(body(&names).contains("\"SECRET_NAME\"") && !names.contains("secret value"));
    assert_eq!(body(&hello.get("/slow?ms=1")), "slept 1 ms\n");
    for (path, expected) in
        [("/nothing", "404"), ("/slow?ms=60001", "400"), ("/slow?ms=x", "400"), ("/ws", "426"), ("/echo", "405")]
    {
        assert_eq!(status(&hello.get(path)), expected, "{path}");
    }
    let head = hello.raw(b"HEAD /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    assert!(head.contains("content-length: 11\r\n") && body(&head).is_empty());
    let (code, log) = hello.stop();
    assert_eq!(code, Some(0));
    assert!(log.contains(" GET /healthz 200 11 B ") && log.contains("stopped by SIGTERM"), "{log}");
}

#[test]
fn echo_by_length_and_by_chunks_on_one_connection() {
    let hello = Hello::new();
    let answers = hello.raw(
        b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nfirst\
          POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nsec\r\n3;x=y\r\nond\r\n0\r\nT: v\r\n\r\n\
          GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n",
    );
    let bodies: Vec<&str> = answers.split("HTTP/1.1 200 OK\r\n").skip(1).map(body).collect();
    assert_eq!(bodies, ["first", "second", "{\"ok\":true}"]);
}

#[test]
fn malformed_requests_are_refused_and_harm_nobody() {
    let hello = Hello::new();
    let long = format!("GET / HTTP/1.1\r\nHost: x\r\nA: {}\r\n\r\n", "x".repeat(20_000));
    let many = format!("GET / HTTP/1.1\r\nHost: x\r\n{}\r\n", "A: b\r\n".repeat(100));
    for (request, expected) in [
        (&b"\x16\x03\x01\x02\x00\x01"[..], "400"),
        (b"GET / HTTP/1.1\r\n\r\n", "400"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", "400"),
        (b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n", "400"),
        (b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabc", "400"),
        (b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: +3\r\n\r\nabc", "400"),
        (b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 1048577\r\n\r\n", "413"),
        (b"POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n\r\n", "400"),
        (b"POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "400"),
        (b"POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffff\r\n", "413"),
        (b"GET /ws HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 8\r\n\r\n", "400"),
        (long.as_bytes(), "431"),
        (many.as_bytes(), "431"),
    ] {
        let answer = hello.raw(request);
        assert_eq!(status(&answer), expected, "{}", String::from_utf8_lossy(&request[..request.len().min(90)]));
    }
    assert_eq!(status(&hello.get("/healthz")), "200");
}

fn websocket(hello: &Hello) -> WebSocket<TcpStream> {
    let mut stream = hello.connect();
    stream
        .write_all(
            b"GET /ws HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: keep-alive, Upgrade\r\n\
              Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
        )
        .unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        head.extend(byte);
    }
    let head = String::from_utf8(head).unwrap();
    // The example of RFC 6455, section 1.3.
    assert!(head.starts_with("HTTP/1.1 101 ") && head.contains("s3pPLMBiTxaQ9kYGzzhZRbK+xOo="), "{head}");
    WebSocket::from_raw_socket(stream, Role::Client, None)
}

#[test]
fn websocket_greets_and_echoes() {
    let hello = Hello::new();
    let mut socket = websocket(&hello);
    assert!(socket.read().unwrap().to_text().unwrap().starts_with("Hello from "));
    for message in [Message::text("ü"), Message::binary(vec![0u8; 100_000])] {
        socket.send(message.clone()).unwrap();
        assert_eq!(socket.read().unwrap(), message);
    }
}

#[test]
fn sigterm_lets_answers_finish_and_says_goodbye() {
    let hello = Hello::new();
    let mut socket = websocket(&hello);
    socket.read().unwrap();
    let idle = hello.connect();
    // In one write, so that the server has read the second request when it answers the first.
    let mut slow = hello.connect();
    slow.write_all(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\nGET /slow?ms=300 HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    let mut first = [0; 1];
    slow.read_exact(&mut first).unwrap();
    let (code, log) = hello.stop();
    let mut answers = String::new();
    slow.read_to_string(&mut answers).unwrap();
    assert!(answers.ends_with("slept 300 ms\n"), "{answers}");
    assert!(answers.contains("connection: close\r\n"), "{answers}");
    assert!(matches!(socket.read(), Ok(Message::Close(Some(frame))) if u16::from(frame.code) == 1001));
    drop(idle);
    assert_eq!(code, Some(0));
    assert!(log.contains("0 connections cut off"), "{log}");
}

#[test]
fn more_connections_than_it_serves_are_told_so() {
    let hello = Hello::new();
    let held: Vec<TcpStream> = (0..48).map(|_| hello.connect()).collect();
    // The acceptor takes them in order, so all of those are counted before this one.
    let mut one_more = hello.connect();
    let mut answer = String::new();
    one_more.read_to_string(&mut answer).unwrap();
    assert_eq!(status(&answer), "503", "{answer}");
    drop(held);
}

fn run(args: &[&str]) -> Output {
    Command::new(HELLO).args(args).output().unwrap()
}

#[test]
fn commands() {
    let hello = Hello::new();
    let (url, address) = (format!("http://127.0.0.1:{}", hello.port), format!("127.0.0.1:{}", hello.port));
    let refused = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    for (args, code, out) in [
        (&["exit", "42"][..], 42, ""),
        (&["exit", "300"], 64, ""),
        (&["nonsense"], 64, ""),
        (&["get", &format!("{url}/healthz")], 0, "200\n{\"ok\":true}"),
        (&["get", &format!("{url}/missing")], 1, "404\n"),
        (&["get", &format!("http://{refused}/")], 1, ""),
        (&["connect", &address], 0, "connected\n"),
        (&["connect", &refused, "500"], 1, "refused\n"),
        (&["cat", "/no/such"], 1, ""),
        (&["sleep", "1"], 0, ""),
        (&["env", "NOT_SET_HERE"], 1, ""),
        (&["threads", "3"], 0, "3\n"),
    ] {
        let output = run(args);
        let text = String::from_utf8(output.stdout).unwrap();
        assert_eq!(output.status.code(), Some(code), "{args:?}: {text}");
        assert!(text.starts_with(out), "{args:?}: {text}");
    }
    for bytes in [0, 99, 100, 12_345] {
        assert_eq!(run(&["spam", &bytes.to_string()]).stdout.len(), bytes);
    }
}

#[test]
fn crash_after_serves_and_aborts() {
    use std::os::unix::process::ExitStatusExt;
    let mut hello = Hello::with(&["crash-after", "50"]);
    assert_eq!(hello.child.wait().unwrap().signal(), Some(6));
}

#[test]
fn a_port_in_use_or_malformed_is_said() {
    let taken = TcpListener::bind("0.0.0.0:0").unwrap();
    for (port, text) in [(taken.local_addr().unwrap().port().to_string(), "in use"), ("http".into(), "not a port")] {
        let output = Command::new(HELLO).env("PORT", &port).output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        assert!(String::from_utf8(output.stderr).unwrap().contains(text));
    }
}
