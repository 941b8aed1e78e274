//! A client of the public API, the way a program uses it.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use futures::{SinkExt as _, StreamExt as _};
use reqwest::header::HeaderMap;
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;

use crate::eventually;

/// An org's API key and where to use it. Cheap to clone.
#[derive(Clone)]
pub struct Api {
    pub http: reqwest::Client,
    pub base: String,
    pub api: SocketAddr,
    pub edge: SocketAddr,
    pub org: String,
    pub org_id: String,
    pub key: String,
}

/// What came back.
#[derive(Clone, Debug)]
pub struct Answer {
    pub what: String,
    pub status: u16,
    pub headers: HeaderMap,
    pub body: Value,
}

impl Answer {
    /// The body of a success.
    #[track_caller]
    pub fn ok(self) -> Value {
        assert!((200..300).contains(&self.status), "{} answered {}: {}", self.what, self.status, self.body);
        self.body
    }

    /// The code of a problem with this status.
    #[track_caller]
    pub fn problem(&self, status: u16) -> &str {
        assert_eq!(self.status, status, "{} answered {}", self.what, self.body);
        assert_eq!(self.header("content-type"), "application/problem+json", "{}", self.what);
        self.body["code"].as_str().unwrap_or_default()
    }

    /// The pointers of a problem.
    pub fn pointers(&self) -> Vec<&str> {
        self.body["errors"].as_array().into_iter().flatten().filter_map(|error| error["pointer"].as_str()).collect()
    }

    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
    }
}

/// A request without a body answers at once and one with `Prefer: wait` within that; this is beyond all of them.
const TIMEOUT: Duration = Duration::from_secs(150);

impl Api {
    /// A new person with an org and an API key of it.
    ///
    /// # Errors
    /// When the API refuses or does not answer.
    pub async fn sign_up(api: SocketAddr, edge: SocketAddr, name: &str) -> Result<Self> {
        let origin = format!("http://{api}");
        let browser = reqwest::Client::builder().no_proxy().cookie_store(true).timeout(TIMEOUT).build()?;
        let post = async |path: &str, body: Value| -> Result<Value> {
            let url = format!("{origin}/v1{path}");
            let request =
                browser.post(url).header("origin", &origin).header("sec-fetch-site", "same-origin").json(&body);
            let response = request.send().await?;
            let status = response.status();
            let body: Value = response.json().await?;
            anyhow::ensure!(status.is_success(), "{path} answered {status}: {body}");
            Ok(body)
        };
        let person = json!({"email": format!("{name}@example.org"), "password": "correct horse battery staple", "org_name": name});
        post("/auth/sign-up", person).await?;
        let me: Value = browser.get(format!("{origin}/v1/me")).send().await?.json().await?;
        let text = |field: &str| me["orgs"][0][field].as_str().map(str::to_owned);
        let org = text("slug").with_context(|| format!("no org: {me}"))?;
        let key = post(&format!("/orgs/{org}/api-keys"), json!({"name": "tests"})).await?;
        let key = key["key"].as_str().context("no key")?.to_owned();
        let org_id = text("id").context("no org id")?;
        Ok(Self { http: client()?, base: format!("{origin}/v1/orgs/{org}"), api, edge, org, org_id, key })
    }

    /// One request; `path` below the org, or from the root when it begins with `//`.
    ///
    /// # Errors
    /// When there is no answer at all.
    pub async fn try_call(
        &self,
        method: Method,
        path: &str,
        body: Option<Value>,
        headers: &[(&str, &str)],
    ) -> Result<Answer> {
        let url = match path.strip_prefix('/').filter(|path| path.starts_with('/')) {
            Some(path) => format!("http://{}{path}", self.api),
            None => format!("{}{path}", self.base),
        };
        let what = format!("{method} {url}");
        let mut request = self.http.request(method, url).bearer_auth(&self.key);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        if let Some(body) = body {
            request = request.json(&body);
        }
        let response = request.send().await.with_context(|| what.clone())?;
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        let bytes = response.bytes().await.with_context(|| what.clone())?;
        let body = serde_json::from_slice(&bytes)
            .unwrap_or_else(|_| Value::String(String::from_utf8_lossy(&bytes).chars().take(2000).collect()));
        Ok(Answer { what, status, headers, body })
    }

    pub async fn call(&self, method: Method, path: &str, body: Option<Value>, headers: &[(&str, &str)]) -> Answer {
        self.try_call(method, path, body, headers).await.unwrap_or_else(|error| panic!("{error:#}"))
    }

    pub async fn get(&self, path: &str) -> Answer {
        self.call(Method::GET, path, None, &[]).await
    }

    /// A change that waits up to half a minute for its effect.
    pub async fn post(&self, path: &str, body: Option<Value>) -> Answer {
        self.call(Method::POST, path, body, &[("prefer", "wait=30")]).await
    }

    pub async fn delete(&self, path: &str) -> Answer {
        self.call(Method::DELETE, path, None, &[("prefer", "wait=30")]).await
    }

    /// Deploys, waits, and expects it to run.
    pub async fn deploy(&self, body: Value) -> Value {
        let deployed = self.post("/workloads", Some(body)).await;
        assert_eq!(deployed.status, 201, "{} answered {}", deployed.what, deployed.body);
        deployed.body
    }

    /// Waits for a state through the API's own operation.
    pub async fn wait(&self, workload: &str, state: &str, within: Duration) -> Value {
        let end = Instant::now() + within;
        loop {
            let left = end.saturating_duration_since(Instant::now()).as_millis().clamp(1, 20_000);
            let answer = self.get(&format!("/workloads/{workload}/wait?state={state}&timeout_ms={left}")).await;
            if answer.status == 200 && answer.body["state"] == state {
                return answer.body;
            }
            assert!(
                Instant::now() < end,
                "{workload} is not {state} within {within:?}: {} {}",
                answer.status,
                answer.body
            );
        }
    }

    /// Deletes and waits until nothing of it is left.
    pub async fn delete_workload(&self, id: &str, within: Duration) {
        let answer = self.delete(&format!("/workloads/{id}")).await;
        assert!(
            matches!(answer.status, 200 | 202 | 204 | 404),
            "{} answered {} {}",
            answer.what,
            answer.status,
            answer.body
        );
        eventually(&format!("{id} is deleted"), within, async || {
            let found = self.get(&format!("/workloads/{id}")).await;
            let gone = found.status == 404 || found.body["state"] == "deleted";
            if gone { Ok(()) } else { Err(format!("{} {}", found.status, found.body)) }
        })
        .await;
    }

    pub async fn exec(&self, workload: &str, argv: &[&str]) -> Value {
        self.post(&format!("/workloads/{workload}/exec"), Some(json!({"argv": argv, "timeout_ms": 20_000}))).await.ok()
    }

    /// All workloads of the org.
    pub async fn workloads(&self) -> Vec<Value> {
        let mut all = Vec::new();
        let mut cursor = String::new();
        loop {
            let page = self.get(&format!("/workloads?limit=200{cursor}")).await.ok();
            all.extend(page["items"].as_array().into_iter().flatten().cloned());
            match page["next_cursor"].as_str() {
                Some(next) => cursor = format!("&cursor={next}"),
                None => return all,
            }
        }
    }

    /// Asks the workload itself through the edge: status and body.
    ///
    /// # Errors
    /// When the edge does not answer.
    pub async fn try_edge(&self, url: &str, path: &str) -> Result<(u16, String)> {
        let host = host_of(url)?;
        let response = self.http.get(format!("http://{}{path}", self.edge)).header("host", host).send().await?;
        let status = response.status();
        Ok((status.as_u16(), response.text().await?))
    }

    pub async fn edge(&self, url: &str, path: &str) -> (u16, String) {
        self.try_edge(url, path).await.unwrap_or_else(|error| panic!("{url}{path}: {error:#}"))
    }

    /// Opens a WebSocket of a workload through the edge.
    ///
    /// # Errors
    /// When the edge or the workload refuses.
    pub async fn edge_websocket(&self, url: &str, path: &str) -> Result<WebSocketStream<TcpStream>> {
        let stream = TcpStream::connect(self.edge).await?;
        let request = format!("ws://{}{path}", host_of(url)?).into_client_request()?;
        Ok(tokio_tungstenite::client_async(request, stream).await?.0)
    }

    /// Opens a terminal; what it wrote until it ended, and its final message. `keys` are typed at once.
    ///
    /// # Errors
    /// When the ticket or the WebSocket is refused.
    pub async fn terminal(&self, workload: &str, keys: &str) -> Result<(String, Value)> {
        let ticket = self.post(&format!("/workloads/{workload}/terminal-tickets"), None).await.ok();
        let ticket = ticket["ticket"].as_str().context("no ticket")?;
        let url = format!(
            "ws://{}/v1/orgs/{}/workloads/{workload}/terminal?ticket={ticket}&cols=99&rows=33",
            self.api, self.org
        );
        let mut request = url.into_client_request()?;
        request.headers_mut().insert("sec-websocket-protocol", "term.v1".parse()?);
        let (mut socket, _) = tokio_tungstenite::client_async(request, TcpStream::connect(self.api).await?).await?;
        socket.send(Message::binary(keys.as_bytes().to_vec())).await?;
        let (mut output, mut end) = (String::new(), Value::Null);
        let read = async {
            while let Some(message) = socket.next().await {
                match message? {
                    Message::Binary(bytes) => output.push_str(&String::from_utf8_lossy(&bytes)),
                    Message::Text(text) => end = serde_json::from_str(&text)?,
                    Message::Close(_) => break,
                    _ => {}
                }
            }
            anyhow::Ok(())
        };
        tokio::time::timeout(Duration::from_secs(20), read).await.context("the terminal does not end")??;
        Ok((output, end))
    }

    /// Opens a stream of server-sent events.
    ///
    /// # Errors
    /// When it is refused.
    pub async fn stream(&self, path: &str) -> Result<Sse> {
        let request = self.http.get(format!("{}{path}", self.base)).bearer_auth(&self.key);
        let response = request.header("accept", "text/event-stream").send().await?;
        anyhow::ensure!(response.status() == StatusCode::OK, "{path} answered {}", response.status());
        Ok(Sse { response, buffer: String::new() })
    }
}

/// A client that keeps connections.
fn client() -> Result<reqwest::Client> {
    Ok(reqwest::Client::builder().no_proxy().tcp_nodelay(true).pool_max_idle_per_host(256).timeout(TIMEOUT).build()?)
}

fn host_of(url: &str) -> Result<&str> {
    url.strip_prefix("http://")
        .map(|rest| rest.split('/').next().unwrap_or(rest))
        .with_context(|| format!("{url} is no address"))
}

/// A stream of server-sent events.
pub struct Sse {
    response: reqwest::Response,
    buffer: String,
}

impl Sse {
    /// The next event: its kind and its data; none at the end.
    ///
    /// # Errors
    /// When the stream breaks, or nothing comes for half a minute.
    pub async fn next(&mut self) -> Result<Option<(String, Value)>> {
        loop {
            if let Some((event, rest)) = self.buffer.split_once("\n\n") {
                let (event, rest) = (event.to_owned(), rest.to_owned());
                self.buffer = rest;
                let field = |name: &str| {
                    let lines: Vec<&str> =
                        event.lines().filter_map(|line| line.strip_prefix(name)).map(str::trim_start).collect();
                    lines.join("\n")
                };
                let data = field("data:");
                if data.is_empty() {
                    continue;
                }
                return Ok(Some((field("event:"), serde_json::from_str(&data).with_context(|| event.clone())?)));
            }
            match tokio::time::timeout(Duration::from_secs(30), self.response.chunk())
                .await
                .context("a silent stream")??
            {
                Some(chunk) => self.buffer.push_str(&String::from_utf8_lossy(&chunk)),
                None => return Ok(None),
            }
        }
    }
}
