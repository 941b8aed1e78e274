//! The hub's own HTTP: REST for operators, metrics, and a small live page. It runs on tokio, apart from the shards.

use crate::account::{AccountSpec, hash_key};
use crate::hub::unix_now;
use crate::ledger::{Ledger, Window};
use crate::metrics::Outcome;
use crate::registry::PeerView;
use crate::shared::{Command, Shared};
use crate::tally::Totals;
use crate::target::Country;
use axum::Json;
use axum::extract::{Path, Query, Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{Html, IntoResponse, Response};
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use subtle::ConstantTimeEq as _;
use tokio::sync::watch;
use utoipa::{IntoParams, OpenApi, ToSchema};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

#[derive(Clone)]
struct App {
    shared: Arc<Shared>,
    ledger: Arc<Ledger>,
    cpu: Arc<parking_lot::Mutex<(u64, u64)>>,
}

/// An error as RFC 9457 has it.
#[derive(Debug, Serialize, ToSchema)]
pub struct Problem {
    status: u16,
    title: &'static str,
    detail: String,
}

fn problem(status: StatusCode, detail: impl Into<String>) -> Response {
    let body =
        Problem { status: status.as_u16(), title: status.canonical_reason().unwrap_or("Error"), detail: detail.into() };
    (status, [(header::CONTENT_TYPE, "application/problem+json")], Json(body)).into_response()
}

#[derive(OpenApi)]
#[openapi(info(title = "Proxy hub", description = "Peers, customers and usage of one hub.", version = "1"))]
struct Doc;

fn router() -> OpenApiRouter<App> {
    OpenApiRouter::with_openapi(Doc::openapi())
        .routes(routes!(health))
        .routes(routes!(stats))
        .routes(routes!(peers))
        .routes(routes!(peer, remove_peer))
        .routes(routes!(drain_peer))
        .routes(routes!(customers))
        .routes(routes!(customer, put_customer, delete_customer))
        .routes(routes!(usage))
        .routes(routes!(metrics))
}

/// The OpenAPI document.
pub fn openapi() -> utoipa::openapi::OpenApi {
    router().split_for_parts().1
}

pub async fn serve(
    listener: tokio::net::TcpListener,
    shared: Arc<Shared>,
    ledger: Arc<Ledger>,
    mut stopped: watch::Receiver<bool>,
) {
    let app = App { shared, ledger, cpu: Arc::default() };
    let (router, document) = router().split_for_parts();
    let document = document.to_json().unwrap_or_default();
    let router = router
        .route("/", axum::routing::get(|| async { Html(include_str!("page.html")) }))
        .route(
            "/openapi.json",
            axum::routing::get(move || async move { ([(header::CONTENT_TYPE, "application/json")], document) }),
        )
        .layer(middleware::from_fn_with_state(app.clone(), authorize))
        .layer(axum::extract::DefaultBodyLimit::max(64 * 1024))
        .with_state(app);
    let stop = async move {
        let _ = stopped.changed().await;
    };
    if let Err(error) = axum::serve(listener, router).with_graceful_shutdown(stop).await {
        tracing::error!(%error, "the API ended");
    }
}

async fn authorize(State(app): State<App>, request: Request, next: Next) -> Response {
    let path = request.uri().path();
    let Some(expected) = &app.shared.config.api.token_sha256 else { return next.run(request).await };
    // The page itself holds no data; its script asks for the token.
    if path == "/health" || path == "/" {
        return next.run(request).await;
    }
    let given = request
        .headers()
        .get(header::AUTHORIZATION)
        .and_then(|v| v.to_str().ok())
        .and_then(|v| v.strip_prefix("Bearer "))
        .unwrap_or("");
    let hash: String = hash_key(given).iter().map(|b| format!("{b:02x}")).collect();
    if bool::from(hash.as_bytes().ct_eq(expected.to_ascii_lowercase().as_bytes())) {
        next.run(request).await
    } else {
        problem(StatusCode::UNAUTHORIZED, "send the API token as `Authorization: Bearer TOKEN`")
    }
}

/// Whether the hub takes connections.
#[utoipa::path(get, path = "/health", responses((status = 200, body = str), (status = 503, body = str)))]
async fn health(State(app): State<App>) -> Response {
    match app.shared.is_draining() {
        false => "ok".into_response(),
        true => (StatusCode::SERVICE_UNAVAILABLE, "draining").into_response(),
    }
}

#[derive(Serialize, ToSchema)]
struct CountryCount {
    country: String,
    peers: u32,
}

#[derive(Serialize, ToSchema)]
struct Stats {
    hub: String,
    uptime_seconds: u32,
    peers_connected: i64,
    peers_registered: usize,
    customers_connected: i64,
    tunnels: i64,
    sessions: usize,
    bytes_up: u64,
    bytes_down: u64,
    requests_ok: u64,
    requests_refused: u64,
    requests_failed: u64,
    registrations: u64,
    peers_dead: u64,
    by_country: Vec<CountryCount>,
    /// Other hubs seen in the directory.
    other_hubs: Vec<String>,
}

/// The hub at a glance.
#[utoipa::path(get, path = "/v1/stats", responses((status = 200, body = Stats)))]
async fn stats(State(app): State<App>) -> Json<Stats> {
    let s = &app.shared;
    let m = &s.metrics;
    let refused =
        [Outcome::Auth, Outcome::Denied, Outcome::Limited, Outcome::Malformed].map(|o| m.requests(o)).iter().sum();
    Json(Stats {
        hub: s.config.hub.name.clone(),
        uptime_seconds: s.now(),
        peers_connected: m.peers_connected.load(Relaxed),
        peers_registered: s.registry.len(),
        customers_connected: m.customers_connected.load(Relaxed),
        tunnels: m.tunnels.load(Relaxed),
        sessions: s.registry.sessions(),
        bytes_up: m.bytes_up.load(Relaxed),
        bytes_down: m.bytes_down.load(Relaxed),
        requests_ok: m.requests(Outcome::Ok),
        requests_refused: refused,
        requests_failed: m.requests(Outcome::Failed) + m.requests(Outcome::NoPeer),
        registrations: m.registrations.load(Relaxed),
        peers_dead: m.peers_dead.load(Relaxed),
        by_country: s
            .registry
            .by_country()
            .into_iter()
            .map(|(c, peers)| CountryCount { country: c.to_string(), peers })
            .collect(),
        other_hubs: s.others.read().iter().map(|h| h.name.to_string()).collect(),
    })
}

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
struct PeersQuery {
    /// Two letters.
    country: Option<String>,
    /// Where the last page said to go on.
    from: Option<usize>,
    /// 1 to 1000.
    limit: Option<usize>,
}

#[derive(Serialize, ToSchema)]
struct PeersPage {
    peers: Vec<PeerView>,
    /// `from` of the next page; absent on the last.
    #[serde(skip_serializing_if = "Option::is_none")]
    next: Option<usize>,
}

/// Registered peers.
#[utoipa::path(get, path = "/v1/peers", params(PeersQuery), responses((status = 200, body = PeersPage), (status = 400, body = Problem)))]
async fn peers(State(app): State<App>, Query(query): Query<PeersQuery>) -> Response {
    let country = match query.country.as_deref().map(Country::parse) {
        None => None,
        Some(Some(country)) => Some(country),
        Some(None) => return problem(StatusCode::BAD_REQUEST, "country must be two letters"),
    };
    let limit = query.limit.unwrap_or(100).clamp(1, 1000);
    let (peers, next) = app.shared.registry.page(query.from.unwrap_or(0), limit, country, app.shared.now());
    Json(PeersPage { peers, next }).into_response()
}

#[derive(Serialize, ToSchema)]
struct DayBytes {
    /// Start of the day, seconds since 1970.
    day: i64,
    bytes: u64,
}

#[derive(Serialize, ToSchema)]
struct PeerDetail {
    #[serde(flatten)]
    peer: PeerView,
    address: String,
    /// Bytes carried by day, for the device's owner.
    days: Vec<DayBytes>,
}

/// One peer by its device.
#[utoipa::path(get, path = "/v1/peers/{device}", params(("device" = String, Path)), responses((status = 200, body = PeerDetail), (status = 404, body = Problem)))]
async fn peer(State(app): State<App>, Path(device): Path<String>) -> Response {
    let Some((_, _, addr, peer)) = app.shared.registry.find(&device, app.shared.now()) else {
        return problem(StatusCode::NOT_FOUND, "no such peer is registered");
    };
    match app.ledger.peer_usage(&device).await {
        Ok(days) => {
            let days = days.into_iter().map(|(day, bytes)| DayBytes { day, bytes }).collect();
            Json(PeerDetail { peer, address: addr.to_string(), days }).into_response()
        }
        Err(error) => problem(StatusCode::SERVICE_UNAVAILABLE, error.to_string()),
    }
}

fn tell_peer(app: &App, device: &str, make: impl FnOnce(u32, u32) -> Command) -> Response {
    let Some((_, home, ..)) = app.shared.registry.find(device, 0) else {
        return problem(StatusCode::NOT_FOUND, "no such peer is registered");
    };
    let sent =
        app.shared.remotes.get().and_then(|r| r.get(home.shard as usize)).map(|r| r.send(make(home.slot, home.serial)));
    match sent {
        Some(Ok(())) => StatusCode::ACCEPTED.into_response(),
        _ => problem(StatusCode::SERVICE_UNAVAILABLE, "the hub is too busy; try again"),
    }
}

/// Closes a peer's connection.
#[utoipa::path(delete, path = "/v1/peers/{device}", params(("device" = String, Path)), responses((status = 202), (status = 404, body = Problem)))]
async fn remove_peer(State(app): State<App>, Path(device): Path<String>) -> Response {
    tell_peer(&app, &device, |slot, serial| Command::ClosePeer { slot, serial, reason: "removed by the operator" })
}

/// Gives a peer no new tunnels.
#[utoipa::path(post, path = "/v1/peers/{device}/drain", params(("device" = String, Path)), responses((status = 202), (status = 404, body = Problem)))]
async fn drain_peer(State(app): State<App>, Path(device): Path<String>) -> Response {
    tell_peer(&app, &device, |slot, serial| Command::DrainPeer { slot, serial })
}

#[derive(Serialize, ToSchema)]
struct CustomerView {
    /// `alice`, or `alice.bob` for a sub-user.
    name: String,
    suspended: bool,
    limits: crate::account::Limits,
    tunnels: u32,
    /// Bytes of the quota's period, all hubs.
    used_bytes: u64,
    /// Since the account exists, this hub.
    totals: Totals,
}

fn view(account: &crate::account::Account) -> CustomerView {
    CustomerView {
        name: account.name.clone(),
        suspended: account.spec.suspended,
        limits: account.spec.limits.clone(),
        tunnels: account.tunnels(),
        used_bytes: account.used(),
        totals: account.counter.totals(),
    }
}

/// All customers and sub-users.
#[utoipa::path(get, path = "/v1/customers", responses((status = 200, body = Vec<CustomerView>)))]
async fn customers(State(app): State<App>) -> Json<Vec<CustomerView>> {
    Json(app.shared.accounts.all().iter().map(|a| view(a)).collect())
}

/// One customer or sub-user.
#[utoipa::path(get, path = "/v1/customers/{name}", params(("name" = String, Path)), responses((status = 200, body = CustomerView), (status = 404, body = Problem)))]
async fn customer(State(app): State<App>, Path(name): Path<String>) -> Response {
    match app.shared.accounts.get(&name) {
        Some(account) => Json(view(&account)).into_response(),
        None => problem(StatusCode::NOT_FOUND, "no such customer"),
    }
}

/// Makes or replaces a customer, with its sub-users. Open tunnels go on.
#[utoipa::path(put, path = "/v1/customers/{name}", params(("name" = String, Path)), request_body = AccountSpec, responses((status = 204), (status = 400, body = Problem), (status = 409, body = Problem)))]
async fn put_customer(State(app): State<App>, Path(name): Path<String>, Json(spec): Json<AccountSpec>) -> Response {
    if spec.name != name {
        return problem(StatusCode::BAD_REQUEST, "the name in the body is not the one in the path");
    }
    if let Err(why) = spec.check(false) {
        return problem(StatusCode::BAD_REQUEST, why);
    }
    if app.shared.listed.read().contains(&name) {
        return problem(StatusCode::CONFLICT, "this customer is in the configuration file; change it there");
    }
    let body = serde_json::to_string(&spec).unwrap_or_default();
    // Durable first: what was acknowledged is there after a restart.
    if let Err(error) = app.ledger.put_customer(&name, Some(&body)).await {
        return problem(StatusCode::SERVICE_UNAVAILABLE, error.to_string());
    }
    if let Err(why) = app.shared.accounts.put(&spec) {
        return problem(StatusCode::BAD_REQUEST, why);
    }
    if let Some(account) = app.shared.accounts.get(&name)
        && let Err(error) = crate::server::load_period(&app.ledger, &account, unix_now()).await
    {
        return problem(StatusCode::SERVICE_UNAVAILABLE, error.to_string());
    }
    StatusCode::NO_CONTENT.into_response()
}

/// Removes a customer. What it has used stays in the ledger.
#[utoipa::path(delete, path = "/v1/customers/{name}", params(("name" = String, Path)), responses((status = 204), (status = 404, body = Problem), (status = 409, body = Problem)))]
async fn delete_customer(State(app): State<App>, Path(name): Path<String>) -> Response {
    if app.shared.listed.read().contains(&name) {
        return problem(StatusCode::CONFLICT, "this customer is in the configuration file; change it there");
    }
    if app.shared.accounts.get(&name).is_none_or(|a| a.parent.is_some()) {
        return problem(StatusCode::NOT_FOUND, "no such customer");
    }
    if let Err(error) = app.ledger.put_customer(&name, None).await {
        return problem(StatusCode::SERVICE_UNAVAILABLE, error.to_string());
    }
    app.shared.accounts.remove(&name);
    StatusCode::NO_CONTENT.into_response()
}

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
struct UsageQuery {
    /// Seconds since 1970, inclusive; 30 days ago if absent.
    from: Option<i64>,
    /// Seconds since 1970, exclusive; now if absent.
    to: Option<i64>,
}

#[derive(Serialize, ToSchema)]
struct Usage {
    account: String,
    total: Totals,
    hours: Vec<Window>,
}

/// What an account moved, by the hour, all hubs; up to the last second.
#[utoipa::path(get, path = "/v1/customers/{name}/usage", params(("name" = String, Path), UsageQuery), responses((status = 200, body = Usage), (status = 404, body = Problem)))]
async fn usage(State(app): State<App>, Path(name): Path<String>, Query(query): Query<UsageQuery>) -> Response {
    let now = unix_now();
    let to = query.to.unwrap_or(now + 1);
    let from = query.from.unwrap_or(now - 30 * 86_400);
    match app.ledger.usage(&name, from, to).await {
        Ok(hours) if hours.is_empty() && app.shared.accounts.get(&name).is_none() => {
            problem(StatusCode::NOT_FOUND, "no such customer")
        }
        Ok(hours) => {
            let total = hours.iter().fold(Totals::default(), |sum, w| sum.plus(w.totals));
            Json(Usage { account: name, total, hours }).into_response()
        }
        Err(error) => problem(StatusCode::SERVICE_UNAVAILABLE, error.to_string()),
    }
}

/// Prometheus text.
#[utoipa::path(get, path = "/metrics", responses((status = 200, body = str)))]
async fn metrics(State(app): State<App>) -> Response {
    let tasks = tokio::runtime::Handle::current().metrics().num_alive_tasks() as f64;
    let extra = [
        ("system_memory_used_percent", "Memory of the machine in use.", memory_percent()),
        ("system_cpu_used_percent", "CPU of the machine in use since the last look.", cpu_percent(&app)),
        (
            "postgres_connections_active",
            "Connections to PostgreSQL in use.",
            f64::from(app.ledger.postgres_connections()),
        ),
        ("runtime_tasks", "Tasks of the runtime beside the shards.", tasks),
        ("hub_peers_registered", "Peers registered.", app.shared.registry.len() as f64),
        ("hub_sessions", "Sticky sessions.", app.shared.registry.sessions() as f64),
    ];
    let by_country: Vec<_> = app.shared.registry.by_country().into_iter().map(|(c, n)| (c.to_string(), n)).collect();
    let text = app.shared.metrics.prometheus(&extra, &by_country);
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response()
}

fn memory_percent() -> f64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let field = |name: &str| -> Option<f64> {
        text.lines().find_map(|l| l.strip_prefix(name))?.split_whitespace().next()?.parse().ok()
    };
    match (field("MemTotal:"), field("MemAvailable:")) {
        (Some(total), Some(free)) if total > 0.0 => 100.0 * (total - free) / total,
        _ => 0.0,
    }
}

fn cpu_percent(app: &App) -> f64 {
    let text = std::fs::read_to_string("/proc/stat").unwrap_or_default();
    let ticks: Vec<u64> =
        text.lines().next().unwrap_or("").split_whitespace().skip(1).take(8).filter_map(|t| t.parse().ok()).collect();
    if ticks.len() < 5 {
        return 0.0;
    }
    let now = (ticks.iter().sum::<u64>(), ticks[3] + ticks[4]);
    let before = std::mem::replace(&mut *app.cpu.lock(), now);
    let (all, idle) = (now.0.saturating_sub(before.0), now.1.saturating_sub(before.1));
    if all == 0 { 0.0 } else { 100.0 * all.saturating_sub(idle) as f64 / all as f64 }
}
