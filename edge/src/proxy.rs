//! One request: find its workload, wait for it if it is starting, and carry the bytes both ways.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use clawhq_app::App;
use clawhq_app::routes::{Route, Target};
use clawhq_domain::lifecycle::Shown;
use clawhq_runtime::metrics::Metrics;
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::{Request, Response, StatusCode, Version};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use moka::future::Cache;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;

use crate::Config;
use crate::ingress::{self, Connection, IngressError};
use crate::page::{self, Absent};

type Body = BoxBody<Bytes, hyper::Error>;

/// How long a route is believed without asking again. A stopped workload's container is gone before its route is, and
/// the node agent refuses what it does not have, so an old route costs a second look and never reaches a stranger.
const ROUTE_FRESH: Duration = Duration::from_millis(500);
const ROUTES_MAX: u64 = 50_000;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Outcome {
    outcome: &'static str,
}

pub struct Edge {
    pub config: Config,
    app: App,
    routes: Cache<String, Option<Arc<Route>>>,
    requests: Family<Outcome, Counter>,
}

impl Edge {
    pub fn new(config: Config, app: App, metrics: &Metrics) -> Self {
        let routes = Cache::builder().max_capacity(ROUTES_MAX).time_to_live(ROUTE_FRESH).build();
        let requests = Family::<Outcome, Counter>::default();
        metrics.register("clawhq_edge_requests", "Requests at the edge by what became of them", requests.clone());
        Self { config, app, routes, requests }
    }

    fn count(&self, outcome: &'static str) {
        self.requests.get_or_create(&Outcome { outcome }).inc();
    }

    /// Never fails: what goes wrong has a page.
    pub async fn answer(&self, request: Request<Incoming>, peer: SocketAddr) -> Response<Body> {
        let asked = request.headers().clone();
        match self.forward(request, peer).await {
            Ok(response) => {
                self.count("answered");
                response
            }
            Err(failure) => {
                let absent = match &failure {
                    Failure::Unknown => Absent::Unknown,
                    Failure::State(route) => {
                        Absent::State { name: &route.name, state: route.state, reason: route.reason.as_ref() }
                    }
                    Failure::Silent(route, what) => Absent::Silent { name: &route.name, what },
                    Failure::Crowded(route) => Absent::Crowded { name: &route.name },
                };
                self.count(failure.name());
                page::answer(&absent, &asked).map(|body| body.map_err(|never| match never {}).boxed())
            }
        }
    }

    async fn forward(&self, request: Request<Incoming>, peer: SocketAddr) -> Result<Response<Body>, Failure> {
        let label = self.label(&request).ok_or(Failure::Unknown)?;
        let mut route = self.route(&label).await?;
        if let Some(connection) = self.connect(&route).await? {
            return self.carry(request, connection, &route, peer).await;
        }
        // The route was old, or the workload is on its way: ask the truth, and wait for it.
        self.routes.invalidate(&label).await;
        let wait = Duration::from_millis(self.config.wait_ready_ms);
        route = match self.app.wait_route(&label, wait).await {
            Ok(Some(route)) => Arc::new(route),
            Ok(None) => return Err(Failure::Unknown),
            Err(_) => return Err(Failure::Silent(route, "The platform is busy; try again in a moment.")),
        };
        match self.connect(&route).await? {
            Some(connection) => self.carry(request, connection, &route, peer).await,
            None => Err(Failure::State(route)),
        }
    }

    /// `<workload>-<org>` of the request's host.
    fn label(&self, request: &Request<Incoming>) -> Option<String> {
        let host = match request.headers().get(header::HOST) {
            Some(host) => host.to_str().ok()?,
            None => request.uri().authority()?.as_str(),
        };
        label_of(host, &self.config.domain)
    }

    async fn route(&self, label: &str) -> Result<Arc<Route>, Failure> {
        if let Some(known) = self.routes.get(label).await {
            return known.ok_or(Failure::Unknown);
        }
        match self.app.route(label).await {
            Ok(found) => {
                let found = found.map(Arc::new);
                // One that leads nowhere yet may lead somewhere at the next moment: whoever started it was told "running".
                if found.as_ref().is_none_or(|route| route.target.is_some()) {
                    self.routes.insert(label.to_owned(), found.clone()).await;
                }
                found.ok_or(Failure::Unknown)
            }
            Err(error) => {
                tracing::warn!("a route cannot be looked up: {error}");
                let unknown = Route::unknown(label);
                Err(Failure::Silent(Arc::new(unknown), "The platform is busy; try again in a moment."))
            }
        }
    }

    /// `None`: there is nothing to connect to now, and asking again may help.
    async fn connect(&self, route: &Arc<Route>) -> Result<Option<(Connection, Target)>, Failure> {
        let Some(target) = &route.target else {
            return match route.state {
                Shown::Starting | Shown::Updating | Shown::Restarting | Shown::Running => Ok(None),
                _ => Err(Failure::State(route.clone())),
            };
        };
        match ingress::connect(target).await {
            Ok(connection) => Ok(Some((connection, target.clone()))),
            Err(IngressError::Refused { code, .. }) if code == "port_not_allowed" => {
                Err(Failure::Silent(route.clone(), "The port its address leads to is not one of its ports."))
            }
            Err(IngressError::Refused { code, .. }) if code == "busy" => {
                Err(Failure::Silent(route.clone(), "It has too many connections open; try again in a moment."))
            }
            Err(IngressError::Refused { code, .. }) if code == "node_busy" => Err(Failure::Crowded(route.clone())),
            Err(error) => {
                tracing::debug!(slot.id = %target.slot, "the ingress refused: {error}");
                Ok(None)
            }
        }
    }

    async fn carry(
        &self,
        mut request: Request<Incoming>,
        (connection, target): (Connection, Target),
        route: &Arc<Route>,
        peer: SocketAddr,
    ) -> Result<Response<Body>, Failure> {
        let silent = |what| Failure::Silent(route.clone(), what);
        let upgrade = upgrade_of(request.headers());
        let client_side = upgrade.is_some().then(|| hyper::upgrade::on(&mut request));
        let (mut sender, driver) = hyper::client::conn::http1::Builder::new()
            .handshake::<_, Incoming>(TokioIo::new(connection))
            .await
            .map_err(|_| silent("Its connection broke."))?;
        tokio::spawn(async move {
            if let Err(error) = driver.with_upgrades().await {
                tracing::debug!(slot.id = %target.slot, "a workload's connection ended: {error}");
            }
        });
        prepare(&mut request, upgrade.as_ref(), peer);
        let deadline = Duration::from_millis(self.config.answer_ms);
        let mut response = tokio::time::timeout(deadline, sender.send_request(request))
            .await
            .map_err(|_| silent("It took too long to begin an answer."))?
            .map_err(|_| silent("It closed the connection without an answer."))?;
        if response.status() == StatusCode::SWITCHING_PROTOCOLS {
            let Some(client_side) = client_side else {
                return Err(silent("It switched protocols without being asked to."));
            };
            let workload_side = hyper::upgrade::on(&mut response);
            tokio::spawn(async move {
                if let (Ok(client), Ok(workload)) = tokio::join!(client_side, workload_side) {
                    let (mut client, mut workload) = (TokioIo::new(client), TokioIo::new(workload));
                    let _ = tokio::io::copy_bidirectional(&mut client, &mut workload).await;
                }
            });
            return Ok(response.map(|_| Full::default().map_err(|never| match never {}).boxed()));
        }
        remove_hop_by_hop(response.headers_mut());
        Ok(response.map(|body| body.boxed()))
    }
}

enum Failure {
    Unknown,
    State(Arc<Route>),
    Silent(Arc<Route>, &'static str),
    /// Its host takes no more connections, whosever they are.
    Crowded(Arc<Route>),
}

impl Failure {
    fn name(&self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::State(_) => "not_running",
            Self::Silent(..) => "no_answer",
            Self::Crowded(_) => "node_busy",
        }
    }
}

/// The part of a host before `.<domain>`; the port is not looked at.
fn label_of(host: &str, domain: &str) -> Option<String> {
    let host =
        host.rsplit_once(':').filter(|(_, port)| port.bytes().all(|b| b.is_ascii_digit())).map_or(host, |(h, _)| h);
    let host = host.to_ascii_lowercase();
    let label = host.strip_suffix(domain)?.strip_suffix('.')?;
    (!label.is_empty() && label.len() <= 63 && !label.contains('.')).then(|| label.to_owned())
}

fn upgrade_of(headers: &HeaderMap) -> Option<HeaderValue> {
    let asks = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .any(|token| token.trim().eq_ignore_ascii_case("upgrade"));
    headers.get(header::UPGRADE).filter(|_| asks).cloned()
}

/// Headers that belong to one connection (RFC 9110, 7.6.1), and those that `Connection` names.
fn remove_hop_by_hop(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|token| token.trim().parse().ok())
        .collect();
    for name in named {
        headers.remove(name);
    }
    for name in [
        "connection",
        "keep-alive",
        "proxy-connection",
        "proxy-authenticate",
        "proxy-authorization",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    ] {
        headers.remove(name);
    }
}

/// Makes the client's request one of ours to the workload.
fn prepare(request: &mut Request<Incoming>, upgrade: Option<&HeaderValue>, peer: SocketAddr) {
    let host = request
        .headers()
        .get(header::HOST)
        .cloned()
        .or_else(|| request.uri().authority().and_then(|authority| HeaderValue::from_str(authority.as_str()).ok()));
    let path = request.uri().path_and_query().map_or("/", |path| path.as_str()).to_owned();
    *request.uri_mut() = path.parse().unwrap_or_default();
    *request.version_mut() = Version::HTTP_11;
    let headers = request.headers_mut();
    remove_hop_by_hop(headers);
    if let Some(upgrade) = upgrade {
        headers.insert(header::UPGRADE, upgrade.clone());
        headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    }
    // Nobody before us is trusted to say who the client is.
    for name in ["forwarded", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", "x-real-ip"] {
        headers.remove(name);
    }
    // A client on this very machine is a developer's: apps that guard against spoofed forwarding (OpenClaw answers 403)
    // take a forwarded loopback address for an attack, and without the headers for what it is, a local client.
    if !peer.ip().is_loopback() {
        if let Ok(address) = HeaderValue::from_str(&peer.ip().to_string()) {
            headers.insert("x-forwarded-for", address);
        }
        headers.insert("x-forwarded-proto", HeaderValue::from_static("http"));
        if let Some(host) = &host {
            headers.insert("x-forwarded-host", host.clone());
        }
    }
    if let Some(host) = host {
        headers.insert(header::HOST, host);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_label_is_what_comes_before_the_domain() {
        for (host, label) in [
            ("bot-acme.localhost:4181", Some("bot-acme")),
            ("BOT-acme.LOCALHOST", Some("bot-acme")),
            ("a.bot-acme.localhost", None),
            ("localhost", None),
            (".localhost", None),
            ("bot-acme.example", None),
            ("bot-acmelocalhost", None),
        ] {
            assert_eq!(label_of(host, "localhost").as_deref(), label, "{host}");
        }
    }

    #[test]
    fn connection_headers_end_here() {
        let mut headers = HeaderMap::new();
        headers.insert("connection", "close, x-mine".parse().unwrap());
        headers.insert("x-mine", "1".parse().unwrap());
        headers.insert("transfer-encoding", "chunked".parse().unwrap());
        headers.insert("x-kept", "1".parse().unwrap());
        remove_hop_by_hop(&mut headers);
        assert_eq!(headers.len(), 1);
        assert!(headers.contains_key("x-kept"));
    }

    #[test]
    fn an_upgrade_must_be_asked_for_in_both_headers() {
        let mut headers = HeaderMap::new();
        headers.insert("upgrade", "websocket".parse().unwrap());
        assert!(upgrade_of(&headers).is_none());
        headers.insert("connection", "keep-alive, Upgrade".parse().unwrap());
        assert_eq!(upgrade_of(&headers).unwrap(), "websocket");
    }
}
