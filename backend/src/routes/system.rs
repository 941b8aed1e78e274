//! Health, metrics, the API's own description.

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use clawhq_api_types::Page;
use clawhq_api_types::problem::{ProblemCode, ProblemDoc};
use http::header::{CACHE_CONTROL, CONTENT_TYPE};
use serde::{Deserialize, Serialize};
use std::time::Duration;
use utoipa::{IntoParams, ToSchema};

use super::Paging;
use crate::extract::{Nothing, Params, Query};
use crate::problem::{Fail, Result};
use crate::state::Backend;

/// Whether this process serves.
#[derive(Serialize, ToSchema)]
pub struct Health {
    #[schema(example = "ok")]
    pub status: &'static str,
}

/// Is the process alive
///
/// Answers as long as it can answer at all.
#[utoipa::path(get, path = "/livez", operation_id = "livez", tag = "System", security(()),
    responses((status = OK, description = "Alive", body = Health)))]
pub async fn livez() -> Json<Health> {
    Json(Health { status: "ok" })
}

/// Can it serve
///
/// 503 while the database does not answer, or when it is stopping.
#[utoipa::path(get, path = "/readyz", operation_id = "readyz", tag = "System", security(()),
    responses((status = OK, description = "Ready", body = Health)))]
pub async fn readyz(State(backend): State<Backend>) -> Result<Json<Health>> {
    if backend.shutdown().is_cancelled() {
        return Err(Fail::new(ProblemCode::Unavailable, "The process is stopping.").retry_after(1_000));
    }
    tokio::time::timeout(Duration::from_secs(2), backend.app().ready()).await.map_err(|_| {
        Fail::new(ProblemCode::Unavailable, "The database does not answer in time.").retry_after(1_000)
    })??;
    Ok(Json(Health { status: "ok" }))
}

/// Prometheus metrics of this process.
pub async fn metrics(State(backend): State<Backend>) -> Response {
    let kind = clawhq_runtime::metrics::CONTENT_TYPE;
    ([(CONTENT_TYPE, kind), (CACHE_CONTROL, "no-store")], backend.registry().encode()).into_response()
}

/// This document
///
/// OpenAPI 3.1.
#[utoipa::path(get, path = "/openapi.json", operation_id = "getOpenApi", tag = "System", security(()),
    responses((status = OK, description = "The document", body = Object)))]
pub async fn openapi() -> Response {
    ([(CONTENT_TYPE, "application/json"), (CACHE_CONTROL, "public, max-age=60")], crate::openapi::document())
        .into_response()
}

/// List problem codes
///
/// Every `code` an answer of 400 and above may carry.
#[utoipa::path(get, path = "/problems", operation_id = "listProblems", tag = "System", security(()), params(Paging),
    responses((status = OK, description = "Codes, by status", body = Page<ProblemDoc>)))]
pub async fn problems(Query(paging): Query<Paging>) -> Result<Json<Page<ProblemDoc>>> {
    paging.whole()?;
    Ok(Json(Page::whole(ProblemCode::ALL.iter().map(|code| code.doc()).collect())))
}

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Path)]
pub struct ProblemPath {
    /// The code.
    #[param(example = "tier_too_small")]
    pub code: String,
}

/// Get a problem code's documentation
///
/// What the `type` of a problem document points at.
#[utoipa::path(get, path = "/problems/{code}", operation_id = "getProblem", tag = "System", security(()), params(ProblemPath),
    responses((status = OK, description = "The documentation", body = ProblemDoc)))]
pub async fn problem(Params(path): Params<ProblemPath>, Query(Nothing {}): Query<Nothing>) -> Result<Json<ProblemDoc>> {
    let code = ProblemCode::parse(&path.code).ok_or_else(|| Fail::not_found("problem code"))?;
    Ok(Json(code.doc()))
}
