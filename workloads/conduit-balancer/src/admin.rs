//! The admin server: page, figures, and the API that changes backends. Its own thread, away from the bytes.

use crate::config::Backend;
use crate::control::{Controller, Refusal};
use crate::stats::Stats;
use axum::extract::{DefaultBodyLimit, Path, Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::{get, patch, post};
use axum::{Json, Router};
use serde::Deserialize;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use subtle::ConstantTimeEq;

/// Most bytes of a request's body, and longest time for a request.
const MOST_BODY: usize = 64 << 10;
const TIMEOUT: Duration = Duration::from_secs(15);

/// An answer that says what was wrong.
struct Problem(StatusCode, String);

impl From<anyhow::Error> for Problem {
    fn from(error: anyhow::Error) -> Self {
        let status = match error.downcast_ref::<Refusal>() {
            Some(Refusal::Missing(_)) => StatusCode::NOT_FOUND,
            Some(Refusal::Conflict(_)) => StatusCode::CONFLICT,
            None => StatusCode::UNPROCESSABLE_ENTITY,
        };
        Problem(status, format!("{error:#}"))
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        (self.0, Json(serde_json::json!({ "error": self.1 }))).into_response()
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NewBackend {
    name: Option<String>,
    addr: SocketAddr,
    weight: Option<u32>,
    #[serde(default)]
    connections: u32,
    #[serde(default)]
    drain: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Edit {
    weight: Option<u32>,
    connections: Option<u32>,
    drain: Option<bool>,
}

type Shared = State<Arc<Controller>>;

async fn add(
    State(controller): Shared,
    Path(pool): Path<String>,
    Json(new): Json<NewBackend>,
) -> Result<StatusCode, Problem> {
    let backend = Backend {
        name: new.name.unwrap_or_else(|| new.addr.to_string()),
        addr: new.addr,
        weight: new.weight.unwrap_or(100),
        connections: new.connections,
        drain: new.drain,
    };
    controller.add_backend(&pool, backend).await?;
    Ok(StatusCode::CREATED)
}

async fn edit(
    State(controller): Shared,
    Path((pool, name)): Path<(String, String)>,
    Json(edit): Json<Edit>,
) -> Result<StatusCode, Problem> {
    controller
        .edit_backend(&pool, &name, |backend| {
            backend.weight = edit.weight.unwrap_or(backend.weight);
            backend.connections = edit.connections.unwrap_or(backend.connections);
            backend.drain = edit.drain.unwrap_or(backend.drain);
        })
        .await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn remove(State(controller): Shared, Path((pool, name)): Path<(String, String)>) -> Result<StatusCode, Problem> {
    controller.remove_backend(&pool, &name).await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn evict(State(controller): Shared, Path((pool, name)): Path<(String, String)>) -> Result<StatusCode, Problem> {
    if controller.evict(&pool, &name) {
        Ok(StatusCode::NO_CONTENT)
    } else {
        Err(Problem(StatusCode::NOT_FOUND, format!("there is no backend {name} in pool {pool}")))
    }
}

async fn reload(State(controller): Shared) -> Result<StatusCode, Problem> {
    controller.reload().await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn stats(State(controller): Shared) -> Json<Stats> {
    Json(Stats::collect(&controller))
}

async fn metrics(State(controller): Shared) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], Stats::collect(&controller).prometheus())
}

/// Healthy while every worker lives and has its table.
async fn health(State(controller): Shared) -> (StatusCode, &'static str) {
    let living = controller.lock().pids().len();
    if living == controller.board.workers() {
        (StatusCode::OK, "ok\n")
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "a worker is down\n")
    }
}

async fn page() -> impl IntoResponse {
    let policy = "default-src 'self'; style-src 'unsafe-inline'; script-src 'self'; frame-ancestors 'none'";
    ([(header::CONTENT_SECURITY_POLICY, policy), (header::CACHE_CONTROL, "no-cache")], Html(include_str!("page.html")))
}

async fn script() -> impl IntoResponse {
    (
        [(header::CONTENT_TYPE, "text/javascript; charset=utf-8"), (header::CACHE_CONTROL, "no-cache")],
        include_str!("page.js"),
    )
}

/// The page and its script are for everyone who reaches the port; figures and changes need the token, if one is set.
async fn guard(State(token): State<Option<Arc<str>>>, headers: HeaderMap, request: Request, next: Next) -> Response {
    if let Some(token) = token {
        let given = headers
            .get(header::AUTHORIZATION)
            .and_then(|value| value.to_str().ok())
            .and_then(|value| value.strip_prefix("Bearer "));
        if !bool::from(given.unwrap_or_default().as_bytes().ct_eq(token.as_bytes())) {
            let challenge = [(header::WWW_AUTHENTICATE, "Bearer")];
            let problem =
                Problem(StatusCode::UNAUTHORIZED, "the Authorization header does not carry the admin token".into());
            return (challenge, problem).into_response();
        }
    } else if request.method() != axum::http::Method::GET && headers.contains_key(header::ORIGIN) {
        // Without a token nothing but this stands between a web page in the operator's browser and the API.
        return Problem(StatusCode::FORBIDDEN, "changes from web pages need an admin token".into()).into_response();
    }
    match tokio::time::timeout(TIMEOUT, next.run(request)).await {
        Ok(response) => response,
        Err(_) => Problem(StatusCode::GATEWAY_TIMEOUT, "the change took too long".into()).into_response(),
    }
}

/// All routes.
pub fn router(controller: Arc<Controller>, token: Option<String>) -> Router {
    let guarded = Router::new()
        .route("/stats", get(stats))
        .route("/metrics", get(metrics))
        .route("/api/reload", post(reload))
        .route("/api/pools/{pool}/backends", post(add))
        .route("/api/pools/{pool}/backends/{name}", patch(edit).delete(remove))
        .route("/api/pools/{pool}/backends/{name}/evict", post(evict))
        .layer(DefaultBodyLimit::max(MOST_BODY))
        .layer(middleware::from_fn_with_state(token.map(Arc::<str>::from), guard));
    Router::new()
        .route("/", get(page))
        .route("/page.js", get(script))
        .route("/healthz", get(health))
        .merge(guarded)
        .with_state(controller)
}
