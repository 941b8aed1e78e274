//! Whether the tenant's process answers, asked from inside its network namespace.

use std::time::Duration;

use clawhq_domain::template::Probe;
use clawhq_proto::v1;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::{sleep, timeout};
use zeroize::Zeroize;

use crate::netns::{Netns, Workers};

/// Between the questions after the first, which asks again by itself for some milliseconds.
const FIRST_WAIT: Duration = Duration::from_millis(2);
const LONGEST_WAIT: Duration = Duration::from_millis(50);
const ANSWER_DEADLINE: Duration = Duration::from_secs(5);
/// An app that does not answer them is no worse than one that was not asked.
const WARM_UP_DEADLINE: Duration = Duration::from_secs(10);
/// Of an HTTP answer, to look for what is expected in it.
const BODY_MAX: usize = 64 << 10;

/// Returns when it has answered. Dropping the future ends the questions; the deadline is the caller's.
pub async fn until_ready(workers: &Workers, netns: &Netns, probe: &Probe) {
    let mut wait = FIRST_WAIT;
    let mut first = true;
    while !answers(workers, netns, probe, std::mem::take(&mut first)).await {
        sleep(wait).await;
        wait = (wait * 2).min(LONGEST_WAIT);
    }
}

async fn answers(workers: &Workers, netns: &Netns, probe: &Probe, first: bool) -> bool {
    let connect =
        async |port| if first { workers.connect_soon(netns, port).await } else { workers.connect(netns, port).await };
    let asked = async {
        match probe {
            Probe::Started => Some(()),
            Probe::Tcp { port } => connect(*port).await.ok().map(drop),
            Probe::Http { port, path, expect } => {
                let mut stream = connect(*port).await.ok()?;
                let request = format!("{}\r\n", head("GET", path, *port));
                stream.write_all(request.as_bytes()).await.ok()?;
                let mut answer = Vec::with_capacity(1024);
                let head_only = expect.is_none();
                loop {
                    if answer.len() >= BODY_MAX || stream.read_buf(&mut answer).await.ok()? == 0 {
                        break;
                    }
                    if is_good(&answer, expect.as_deref()) || head_only && answer.len() >= 12 {
                        break;
                    }
                }
                is_good(&answer, expect.as_deref()).then_some(())
            }
        }
    };
    matches!(timeout(ANSWER_DEADLINE, asked).await, Ok(Some(())))
}

/// Of a request, up to where more headers or the empty line follow.
fn head(method: &str, path: &str, port: u16) -> String {
    format!(
        "{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUser-Agent: clawhq-probe\r\nAccept: */*\r\nConnection: close\r\n"
    )
}

/// What an app is asked at pool time, so that what it loads at its first use is loaded then.
pub struct Request {
    pub port: u16,
    /// The whole of it.
    pub bytes: Vec<u8>,
}

impl Request {
    /// `None`: it cannot be sent as it is.
    pub fn warm_up(wanted: &v1::WarmUp, process: &v1::Process) -> Option<Self> {
        let port = u16::try_from(wanted.port).ok()?;
        let token = (!wanted.bearer_env.is_empty()).then(|| process.env.get(&wanted.bearer_env)).flatten();
        let odd = |text: &str| text.contains(|c: char| c.is_ascii_control() || c == ' ');
        if !wanted.path.starts_with('/') || odd(&wanted.path) || token.is_some_and(|token| odd(token)) {
            return None;
        }
        let (method, path, body) = (if wanted.body.is_empty() { "GET" } else { "POST" }, &wanted.path, &wanted.body);
        let mut text = head(method, path, port);
        if let Some(token) = token {
            text.push_str(&format!("Authorization: Bearer {token}\r\n"));
        }
        if !body.is_empty() {
            text.push_str(&format!("Content-Type: application/json\r\nContent-Length: {}\r\n", body.len()));
        }
        text.push_str("\r\n");
        text.push_str(body);
        Some(Self { port, bytes: text.into_bytes() })
    }
}

impl Drop for Request {
    fn drop(&mut self) {
        self.bytes.zeroize();
    }
}

/// Sends them one after the other and reads what comes, at most for the time an answer may take in all.
pub async fn warm_up(workers: &Workers, netns: &Netns, requests: &[Request]) {
    let all = async {
        for request in requests {
            let Ok(mut stream) = workers.connect(netns, request.port).await else { return };
            if stream.write_all(&request.bytes).await.is_ok() {
                let mut answer = Vec::with_capacity(4096);
                while answer.len() < BODY_MAX && stream.read_buf(&mut answer).await.is_ok_and(|count| count > 0) {}
            }
        }
    };
    let _ = timeout(WARM_UP_DEADLINE, all).await;
}

/// A status below 400, and what is expected in the body.
fn is_good(answer: &[u8], expect: Option<&str>) -> bool {
    let status: Option<u16> = answer
        .strip_prefix(b"HTTP/1.")
        .and_then(|rest| rest.get(2..5))
        .and_then(|digits| std::str::from_utf8(digits).ok()?.parse().ok());
    if !status.is_some_and(|status| (100..400).contains(&status)) {
        return false;
    }
    let Some(expect) = expect else { return true };
    let body = answer.windows(4).position(|four| four == b"\r\n\r\n").map_or(&[][..], |at| &answer[at + 4..]);
    expect.is_empty() || body.windows(expect.len()).any(|part| part == expect.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_judged_by_status_and_body() {
        assert!(is_good(b"HTTP/1.1 200 OK\r\n", None));
        assert!(is_good(b"HTTP/1.0 302 Found\r\n\r\n", None));
        assert!(!is_good(b"HTTP/1.1 503 No\r\n\r\n", None));
        assert!(!is_good(b"HTTP/1.1 20", None));
        assert!(!is_good(b"SSH-2.0-x", None));
        assert!(!is_good(b"HTTP/1.1 200 OK\r\nx: live\r\n\r\n", Some("live")));
        assert!(is_good(b"HTTP/1.1 200 OK\r\n\r\n{\"live\":1}", Some("live")));
    }

    #[test]
    fn a_warm_up_carries_its_token_and_cannot_be_bent() {
        let process = v1::Process { env: [("T".to_owned(), "s3".to_owned())].into(), ..v1::Process::default() };
        let ask = |path: &str, bearer: &str, body: &str| {
            let wanted =
                v1::WarmUp { port: 80, path: path.to_owned(), bearer_env: bearer.to_owned(), body: body.to_owned() };
            Request::warm_up(&wanted, &process).map(|request| String::from_utf8(request.bytes.clone()).unwrap())
        };
        let post = ask("/x", "T", "{}").unwrap();
        assert!(post.starts_with("POST /x HTTP/1.1\r\n") && post.ends_with("Content-Length: 2\r\n\r\n{}"), "{post}");
        assert!(post.contains("Authorization: Bearer s3\r\n"));
        let get = ask("/", "", "").unwrap();
        assert!(get.starts_with("GET / HTTP/1.1\r\n") && !get.contains("Authorization"), "{get}");
        assert!(ask("/a b", "", "").is_none() && ask("/a\r\nx: y", "", "").is_none() && ask("x", "", "").is_none());
    }

    #[tokio::test]
    async fn it_asks_until_it_is_answered() {
        let (workers, own) = (Workers::start().unwrap(), Netns::of_pid(std::process::id()).unwrap());
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let server = tokio::spawn(async move {
            for answer in ["HTTP/1.1 503 No\r\n\r\n", "HTTP/1.1 200 OK\r\n\r\nready"] {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut request = [0; 512];
                assert!(stream.read(&mut request).await.unwrap() > 0);
                stream.write_all(answer.as_bytes()).await.unwrap();
            }
        });
        let probe = Probe::Http { port, path: "/".to_owned(), expect: Some("ready".to_owned()) };
        until_ready(&workers, &own, &probe).await;
        server.await.unwrap();
    }
}
