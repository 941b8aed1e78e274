//! HTTP: the public API, its documentation, the console's files, and the endpoint that node agents dial.
//!
//! This room reads requests, asks [`clawhq_app`], and says the answer. It decides nothing and keeps no truth: any replica may
//! take any request, save those that go through a node's stream (logs, exec, terminals), which need the replica that holds it.

mod assets;
mod auth;
mod config;
mod convert;
mod envelope;
mod extract;
mod limits;
mod metrics;
mod node;
mod openapi;
mod problem;
mod routes;
mod sse;
mod state;
mod streams;

use std::time::Duration;

use anyhow::Context as _;
use axum::Router;
use axum::middleware;
use axum::response::{IntoResponse as _, Response};
use axum::routing::get;
use clawhq_api_types::problem::ProblemCode;
use clawhq_app::App;
use clawhq_runtime::metrics::Metrics;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt as _;
use tower_governor::{GovernorError, GovernorLayer};
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::compression::CompressionLayer;
use utoipa_swagger_ui::SwaggerUi;

pub use config::{Config, Limits};
pub use openapi::{document, openapi, problems};
pub use state::Backend;

use crate::problem::Fail;

/// Every route with every layer, for a listener or a test.
pub fn router(backend: &Backend) -> Router {
    let (api, _) = openapi::router().split_for_parts();
    let docs: Router<Backend> = Router::from(
        SwaggerUi::new("/docs").config(utoipa_swagger_ui::Config::from("/v1/openapi.json").try_it_out_enabled(true)),
    );
    let limited = GovernorLayer::new(backend.limits().address.clone()).error_handler(too_many);
    Router::new()
        .merge(api)
        .merge(docs.layer(middleware::from_fn(assets::docs_headers)))
        .route("/openapi.json", get(assets::openapi_moved))
        .fallback(assets::fallback)
        .layer(limited)
        // Health and metrics are asked by machines that must not be turned away.
        .route("/metrics", get(routes::system::metrics))
        .layer(CatchPanicLayer::custom(panicked))
        .layer(middleware::from_fn_with_state(backend.clone(), envelope::envelope))
        .layer(CompressionLayer::new().compress_when(envelope::Compressible))
        .with_state(backend.clone())
}

fn too_many(error: GovernorError) -> Response {
    match error {
        GovernorError::TooManyRequests { wait_time, .. } => {
            limits::refusal(Duration::from_secs(wait_time), "Too many requests from this address.".to_owned())
        }
        GovernorError::UnableToExtractKey | GovernorError::Other { .. } => {
            Fail::new(ProblemCode::Internal, "Something broke on our side; it was logged.")
        }
    }
    .into_response()
}

fn panicked(_: Box<dyn std::any::Any + Send>) -> Response {
    // The panic hook has logged it.
    Fail::new(ProblemCode::Internal, "Something broke on our side; it was logged.").into_response()
}

/// Serves the public API and the node stream until `shutdown`; then no stream holds it up for longer than its drain time.
///
/// # Errors
/// When an address cannot be listened on, or the node stream's certificate cannot be made.
pub async fn run(config: Config, app: App, metrics: Metrics, shutdown: CancellationToken) -> anyhow::Result<()> {
    let http = TcpListener::bind(config.listen).await.with_context(|| format!("cannot listen on {}", config.listen))?;
    let nodes = TcpListener::bind(config.node_listen)
        .await
        .with_context(|| format!("cannot listen on {}", config.node_listen))?;
    serve(config, app, metrics, http, nodes, shutdown).await
}

/// [`run`] on listeners that are there already.
///
/// # Errors
/// When the node stream's certificate cannot be made, or its server fails.
pub async fn serve(
    config: Config,
    app: App,
    metrics: Metrics,
    http: TcpListener,
    nodes: TcpListener,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    app.listen(shutdown.clone());
    let limits = config.http.clone();
    let backend = Backend::new(config, app, metrics, shutdown.clone());
    let router = router(&backend);
    let sweep = {
        let (backend, shutdown) = (backend.clone(), shutdown.clone());
        async move {
            loop {
                tokio::select! {
                    () = shutdown.cancelled() => return,
                    () = tokio::time::sleep(Duration::from_secs(10)) => backend.limits().sweep(),
                }
            }
        }
    };
    tokio::spawn(sweep);
    let service = move |request: http::Request<hyper::body::Incoming>| {
        let router = router.clone();
        async move { router.oneshot(request.map(axum::body::Body::new)).await }
    };
    let public = clawhq_listener::serve(http, service, limits, shutdown.clone());
    let streams = node::serve(backend, nodes, shutdown);
    let ((), ended) = tokio::join!(public, streams);
    ended
}
