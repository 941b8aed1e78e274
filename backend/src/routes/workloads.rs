//! Workloads: deploying, looking, changing, starting, stopping, deleting, waiting.

use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use clawhq_api_types::Page;
use clawhq_api_types::problem::ProblemCode;
use clawhq_api_types::workload::{
    Access, CreateWorkload, Deployed as DeployedBody, DryRun, Instance, Placement, PlacementKind as PlacementBody,
    Release, State as StateBody, UpdateWorkload, Workload,
};
use clawhq_app::model::{self, Deployed};
use clawhq_app::workloads::WorkloadFilter;
use clawhq_app::{IdempotencyKey, StoredResponse};
use clawhq_domain::lifecycle::Shown;
use clawhq_domain::names::TemplateName;
use http::header::{ETAG, IF_NONE_MATCH, LOCATION};
use http::{HeaderMap, HeaderValue, StatusCode};
use serde::Deserialize;
use utoipa::IntoParams;

use super::orgs::{etag, location};
use super::{IdempotencyHeader, IfMatchHeader, OrgPath, Paging, PreferHeader, WorkloadPath, paging};
use crate::auth::Org;
use crate::convert;
use crate::extract::{Body, Conditions, Idempotency, IfMatch, Nothing, Params, Prefer, Query};
use crate::problem::{Fail, Result};
use crate::state::Backend;

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct Filter {
    /// Only workloads in one of these states, separated by commas.
    #[param(example = "running,failed")]
    pub state: Option<String>,
    /// Only workloads of this template.
    #[param(example = "hello", max_length = 40)]
    pub template: Option<String>,
    /// Items of one page; 50 when absent.
    #[param(minimum = 1, maximum = 200, default = 50)]
    pub limit: Option<u32>,
    /// `next_cursor` of the page before.
    #[param(max_length = 200)]
    pub cursor: Option<String>,
}

fn state_in(text: &str) -> Result<Shown> {
    StateBody::parse(text).map(convert::shown_in).ok_or_else(|| {
        let all = StateBody::ALL.map(StateBody::name).join(", ");
        Fail::new(ProblemCode::InvalidParameter, "There is no such state.")
            .at("?state", format!("must be one of {all}"))
    })
}

/// List workloads
///
/// Newest first. A page filtered by state may hold fewer items than asked for and still have a next one.
#[utoipa::path(get, path = "/orgs/{org}/workloads", operation_id = "listWorkloads", tag = "Workloads", params(OrgPath, Filter),
    responses((status = OK, description = "Workloads", body = Page<Workload>)))]
pub async fn list(
    State(backend): State<Backend>,
    org: Org,
    Query(filter): Query<Filter>,
) -> Result<Json<Page<Workload>>> {
    let states = match &filter.state {
        Some(states) => states.split(',').map(state_in).collect::<Result<_>>()?,
        None => Vec::new(),
    };
    let template = match filter.template.as_deref().map(TemplateName::parse) {
        None => None,
        Some(Ok(name)) => Some(name),
        // No workload is of a template with such a name.
        Some(Err(_)) => return Ok(Json(Page::whole(Vec::new()))),
    };
    let page = paging(filter.limit, filter.cursor)?;
    let found = backend.app().workloads(&org, WorkloadFilter { states, template }, page).await?;
    Ok(Json(convert::page(found, convert::workload)))
}

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct DryRunQuery {
    /// Say what would change, and change nothing.
    pub dry_run: Option<bool>,
}

/// Deploy a workload
///
/// Of a template, or of any OCI image. With `Prefer: wait=30` the answer comes when it runs (201), or when the time is over
/// (202); without, at once (202). `placement` and the `Server-Timing` header say how it was placed and what each step took.
/// A deploy for which there is no room is `queued`, never refused.
#[utoipa::path(post, path = "/orgs/{org}/workloads", operation_id = "createWorkload", tag = "Workloads",
    params(OrgPath, IdempotencyHeader, PreferHeader), request_body = CreateWorkload,
    responses(
        (status = CREATED, description = "It runs", body = DeployedBody, headers(("Location" = String, description = "Its address"), ("ETag" = String, description = "Its version"), ("Server-Timing" = String, description = "The deploy's steps"))),
        (status = ACCEPTED, description = "It is on its way", body = DeployedBody, headers(("Location" = String, description = "Its address"), ("ETag" = String, description = "Its version"), ("Server-Timing" = String, description = "The deploy's steps")))))]
pub async fn create(
    State(backend): State<Backend>,
    org: Org,
    Query(Nothing {}): Query<Nothing>,
    key: Idempotency,
    Prefer(wait): Prefer,
    body: Body<CreateWorkload>,
) -> Result<Response> {
    let idempotency = key.with(&body.hash);
    let ask = convert::create_in(body.value)?;
    let deployed = backend.app().create_workload(&org, ask, idempotency.clone(), wait).await?;
    if let Some(kind) = deployed.placement.filter(|_| !deployed.replayed) {
        let placement = crate::metrics::Placement { placement: kind.name() };
        backend.metrics().deploys.get_or_create(&placement).observe(deployed.total_micros as f64 / 1e6);
    }
    let status = if deployed.workload.shown == Shown::Running { StatusCode::CREATED } else { StatusCode::ACCEPTED };
    let mut response = answer(deployed, status, wait, |body| body)?;
    let at = response.body.workload.id.clone();
    response.headers.insert(LOCATION, location(format!("/v1/orgs/{}/workloads/{at}", org.org)));
    if let Some(key) = idempotency.filter(|_| !response.replayed) {
        // What is kept has no credential in it: a repeat is not the once that it is shown.
        let mut kept = response.body.clone();
        kept.access.token = None;
        remember(&backend, &org, key, status, &response.headers, &kept);
    }
    Ok((status, response.headers, Json(response.body)).into_response())
}

struct Answer<T> {
    headers: HeaderMap,
    body: T,
    replayed: bool,
}

/// Body and headers of a deploy.
fn answer<T>(
    deployed: Deployed,
    _status: StatusCode,
    wait: Option<Duration>,
    body: impl FnOnce(DeployedBody) -> T,
) -> Result<Answer<T>> {
    let Deployed { workload, placement, steps, total_micros, access_token, replayed } = deployed;
    let mut headers = HeaderMap::new();
    headers.insert(ETAG, etag(workload.version));
    let mut timing: Vec<String> =
        steps.iter().map(|step| format!("{};dur={:.3}", token(&step.name), convert::ms(step.micros))).collect();
    timing.push(format!("total;dur={:.3}", convert::ms(total_micros)));
    if let Ok(timing) = HeaderValue::try_from(timing.join(", ")) {
        headers.insert("server-timing", timing);
    }
    if let Some(wait) = wait
        && let Ok(applied) = HeaderValue::try_from(format!("wait={}", wait.as_secs()))
    {
        headers.insert("preference-applied", applied);
    }
    if replayed {
        headers.insert("idempotency-replayed", HeaderValue::from_static("true"));
    }
    let of_instance = workload.instance.as_ref().map(|instance| instance.placement);
    let workload = convert::workload(workload);
    let access = Access { url: workload.url.clone(), token: access_token };
    let placement = Placement {
        kind: placement.or(of_instance).map_or(PlacementBody::Queued, convert::placement),
        steps: steps.iter().map(convert::step).collect(),
        total_ms: convert::ms(total_micros),
        queue: workload.queue.clone(),
    };
    Ok(Answer { headers, body: body(DeployedBody { workload, access, placement }), replayed })
}

/// A step's name as `Server-Timing` can say it.
fn token(name: &str) -> String {
    name.chars().map(|c| if c.is_ascii_alphanumeric() || c == '_' || c == '-' { c } else { '_' }).collect()
}

/// Keeps an answer for repeats of its request, beside the answer itself: until it is kept, a repeat is told what the request
/// made, as that is now.
fn remember(
    backend: &Backend,
    org: &Org,
    key: IdempotencyKey,
    status: StatusCode,
    headers: &HeaderMap,
    body: &impl serde::Serialize,
) {
    let Ok(body) = serde_json::to_vec(body) else { return };
    let kept = ["location", "etag", "server-timing", "preference-applied"];
    let mut headers: Vec<(String, String)> = headers
        .iter()
        .filter(|(name, _)| kept.contains(&name.as_str()))
        .filter_map(|(name, value)| Some((name.to_string(), value.to_str().ok()?.to_owned())))
        .collect();
    headers.push(("content-type".to_owned(), "application/json".to_owned()));
    let response = StoredResponse { status: status.as_u16(), headers, body };
    let (app, context) = (backend.app().clone(), org.context.clone());
    tokio::spawn(async move {
        if let Err(error) = app.store_response(&context, &key, &response).await {
            tracing::warn!(error = crate::problem::chain(&error), "an answer could not be kept for repeats");
        }
    });
}

fn found(workload: model::Workload, headers: &HeaderMap) -> Response {
    let tag = etag(workload.version);
    if headers.get(IF_NONE_MATCH).is_some_and(|known| *known == tag) {
        return (StatusCode::NOT_MODIFIED, [(ETAG, tag)]).into_response();
    }
    ([(ETAG, tag)], Json(convert::workload(workload))).into_response()
}

/// Get a workload
///
/// By id or name. A deleted one is still found by its id.
#[utoipa::path(get, path = "/orgs/{org}/workloads/{workload}", operation_id = "getWorkload", tag = "Workloads", params(WorkloadPath),
    responses((status = OK, description = "The workload", body = Workload, headers(("ETag" = String, description = "Its version"))),
              (status = NOT_MODIFIED, description = "If-None-Match has its version")))]
pub async fn get(
    State(backend): State<Backend>,
    org: Org,
    Params(path): Params<WorkloadPath>,
    Query(Nothing {}): Query<Nothing>,
    headers: HeaderMap,
) -> Result<Response> {
    Ok(found(backend.app().workload(&org, &path.workload).await?, &headers))
}

#[derive(serde::Serialize, utoipa::ToSchema)]
#[serde(untagged)]
#[expect(dead_code, reason = "only described")]
enum Updated {
    Workload(Box<Workload>),
    DryRun(DryRun),
}

/// Update a workload
///
/// Makes a new release, and rolls it out when the workload runs. `config` is replaced as a whole. With `dry_run=true` the
/// answer is what would change, with secrets as names and versions.
#[utoipa::path(patch, path = "/orgs/{org}/workloads/{workload}", operation_id = "updateWorkload", tag = "Workloads",
    params(WorkloadPath, DryRunQuery, IfMatchHeader, IdempotencyHeader, PreferHeader), request_body = UpdateWorkload,
    responses((status = OK, description = "The workload with its new release, or what would change", body = Updated, headers(("ETag" = String, description = "Its version")))))]
pub async fn update(
    State(backend): State<Backend>,
    org: Org,
    Params(path): Params<WorkloadPath>,
    Query(query): Query<DryRunQuery>,
    conditions: (IfMatch, Idempotency, Prefer),
    body: Body<UpdateWorkload>,
) -> Result<Response> {
    let (IfMatch(version), key, Prefer(wait)) = conditions;
    let idempotency = key.with(&body.hash);
    let current = match body.value.config {
        Some(_) => None,
        None => Some(backend.app().workload(&org, &path.workload).await?.release.release.config),
    };
    let ask = convert::update_in(body.value, || convert::same_config(&current.unwrap_or_default()))?;
    if query.dry_run == Some(true) {
        let changes = backend.app().diff_workload(&org, &path.workload, ask).await?;
        return Ok(Json(DryRun { diff: changes.into_iter().map(convert::change).collect() }).into_response());
    }
    let updated = backend.app().update_workload(&org, &path.workload, ask, version, idempotency.clone(), wait).await?;
    acted(&backend, &org, updated, StatusCode::OK, idempotency, wait)
}

/// The answer of a change: the workload as it is now.
fn acted(
    backend: &Backend,
    org: &Org,
    deployed: Deployed,
    status: StatusCode,
    idempotency: Option<IdempotencyKey>,
    wait: Option<Duration>,
) -> Result<Response> {
    let Answer { headers, body, replayed } = answer(deployed, status, wait, |body| body.workload)?;
    if let Some(key) = idempotency.filter(|_| !replayed) {
        remember(backend, org, key, status, &headers, &body);
    }
    Ok((status, headers, Json(body)).into_response())
}

/// 200 when it got there, 202 while it is on its way.
fn reached(deployed: &Deployed, state: Shown) -> StatusCode {
    if deployed.workload.shown == state { StatusCode::OK } else { StatusCode::ACCEPTED }
}

/// Start a workload
///
/// One that runs already stays as it is.
#[utoipa::path(post, path = "/orgs/{org}/workloads/{workload}/start", operation_id = "startWorkload", tag = "Workloads",
    params(WorkloadPath, IfMatchHeader, IdempotencyHeader, PreferHeader),
    responses((status = OK, description = "It runs", body = Workload, headers(("ETag" = String, description = "Its version"))),
              (status = ACCEPTED, description = "It is on its way", body = Workload, headers(("ETag" = String, description = "Its version")))))]
pub async fn start(
    State(backend): State<Backend>,
    org: Org,
    Params(path): Params<WorkloadPath>,
    Query(Nothing {}): Query<Nothing>,
    Conditions { version, key, wait }: Conditions,
) -> Result<Response> {
    let key = key.alone();
    let done = backend.app().start_workload(&org, &path.workload, version, key.clone(), wait).await?;
    let status = reached(&done, Shown::Running);
    acted(&backend, &org, done, status, key, wait)
}

/// Stop a workload
///
/// Its process gets SIGTERM, and SIGKILL at its deadline. The state volume stays.
#[utoipa::path(post, path = "/orgs/{org}/workloads/{workload}/stop", operation_id = "stopWorkload", tag = "Workloads",
    params(WorkloadPath, IfMatchHeader, IdempotencyHeader, PreferHeader),
    responses((status = OK, description = "It is stopped", body = Workload, headers(("ETag" = String, description = "Its version"))),
              (status = ACCEPTED, description = "It is on its way", body = Workload, headers(("ETag" = String, description = "Its version")))))]
pub async fn stop(
    State(backend): State<Backend>,
    org: Org,
    Params(path): Params<WorkloadPath>,
    Query(Nothing {}): Query<Nothing>,
    Conditions { version, key, wait }: Conditions,
) -> Result<Response> {
    let key = key.alone();
    let done = backend.app().stop_workload(&org, &path.workload, version, key.clone(), wait).await?;
    let status = reached(&done, Shown::Stopped);
    acted(&backend, &org, done, status, key, wait)
}

/// Restart a workload
///
/// The process anew in the container it has, with the same config; a new container where there is none.
#[utoipa::path(post, path = "/orgs/{org}/workloads/{workload}/restart", operation_id = "restartWorkload", tag = "Workloads",
    params(WorkloadPath, IdempotencyHeader, PreferHeader),
    responses((status = OK, description = "It runs", body = Workload, headers(("ETag" = String, description = "Its version"))),
              (status = ACCEPTED, description = "It is on its way", body = Workload, headers(("ETag" = String, description = "Its version")))))]
pub async fn restart(
    State(backend): State<Backend>,
    org: Org,
    Params(path): Params<WorkloadPath>,
    Query(Nothing {}): Query<Nothing>,
    key: Idempotency,
    Prefer(wait): Prefer,
) -> Result<Response> {
    let key = key.alone();
    let done = backend.app().restart_workload(&org, &path.workload, key.clone(), wait).await?;
    let status = reached(&done, Shown::Running);
    acted(&backend, &org, done, status, key, wait)
}

/// Delete a workload
///
/// With its containers and its state volume. It always works, whatever state the workload is in.
#[utoipa::path(delete, path = "/orgs/{org}/workloads/{workload}", operation_id = "deleteWorkload", tag = "Workloads",
    params(WorkloadPath, IfMatchHeader, PreferHeader),
    responses((status = OK, description = "It is gone", body = Workload),
              (status = ACCEPTED, description = "It is going", body = Workload)))]
pub async fn delete(
    State(backend): State<Backend>,
    org: Org,
    Params(path): Params<WorkloadPath>,
    Query(Nothing {}): Query<Nothing>,
    IfMatch(version): IfMatch,
    Prefer(wait): Prefer,
) -> Result<Response> {
    let done = backend.app().delete_workload(&org, &path.workload, version, wait).await?;
    let status = reached(&done, Shown::Deleted);
    acted(&backend, &org, done, status, None, wait)
}

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct WaitQuery {
    /// The state to wait for; `running` when absent.
    #[param(example = "running")]
    pub state: Option<String>,
    /// Longest wait; 30 000 when absent.
    #[param(minimum = 0, maximum = 120_000, default = 30_000)]
    pub timeout_ms: Option<u64>,
}

const WAIT_MS_MAX: u64 = 120_000;

/// Wait for a state
///
/// Answers when the workload is in the state, or when the time is over: then with the state it is in.
#[utoipa::path(get, path = "/orgs/{org}/workloads/{workload}/wait", operation_id = "waitForWorkload", tag = "Workloads", params(WorkloadPath, WaitQuery),
    responses((status = OK, description = "The workload; look at its state", body = Workload, headers(("ETag" = String, description = "Its version")))))]
pub async fn wait(
    State(backend): State<Backend>,
    org: Org,
    Params(path): Params<WorkloadPath>,
    Query(query): Query<WaitQuery>,
) -> Result<Response> {
    let state = query.state.as_deref().map_or(Ok(Shown::Running), state_in)?;
    let ms = query.timeout_ms.unwrap_or(30_000);
    if ms > WAIT_MS_MAX {
        return Err(Fail::new(ProblemCode::InvalidParameter, "timeout_ms is too large.")
            .at("?timeout_ms", "must be from 0 to 120000"));
    }
    let _open = backend.streams().open(org.org, &backend.metrics().streams, "wait")?;
    let reached = backend.app().wait_workload(&org, &path.workload, state, Duration::from_millis(ms)).await?;
    Ok(found(reached, &HeaderMap::new()))
}

/// List releases
#[utoipa::path(get, path = "/orgs/{org}/workloads/{workload}/releases", operation_id = "listReleases", tag = "Workloads", params(WorkloadPath, Paging),
    responses((status = OK, description = "Releases, newest first", body = Page<Release>)))]
pub async fn releases(
    State(backend): State<Backend>,
    org: Org,
    Params(path): Params<WorkloadPath>,
    Query(paging): Query<Paging>,
) -> Result<Json<Page<Release>>> {
    let found = backend.app().releases(&org, &path.workload, paging.request()?).await?;
    Ok(Json(convert::page(found, convert::release)))
}

/// List a workload's instances
#[utoipa::path(get, path = "/orgs/{org}/workloads/{workload}/instances", operation_id = "listWorkloadInstances", tag = "Workloads", params(WorkloadPath, Paging),
    responses((status = OK, description = "Instances, newest first", body = Page<Instance>)))]
pub async fn instances(
    State(backend): State<Backend>,
    org: Org,
    Params(path): Params<WorkloadPath>,
    Query(paging): Query<Paging>,
) -> Result<Json<Page<Instance>>> {
    let found = backend.app().instances(&org, Some(&path.workload), paging.request()?).await?;
    Ok(Json(convert::page(found, convert::instance)))
}

/// List an org's instances
#[utoipa::path(get, path = "/orgs/{org}/instances", operation_id = "listInstances", tag = "Workloads", params(OrgPath, Paging),
    responses((status = OK, description = "Instances, newest first", body = Page<Instance>)))]
pub async fn org_instances(
    State(backend): State<Backend>,
    org: Org,
    Query(paging): Query<Paging>,
) -> Result<Json<Page<Instance>>> {
    let found = backend.app().instances(&org, None, paging.request()?).await?;
    Ok(Json(convert::page(found, convert::instance)))
}

/// How to reach a workload
///
/// Its address and the credential that was minted for it. Reading it is noted in the audit log.
#[utoipa::path(get, path = "/orgs/{org}/workloads/{workload}/access", operation_id = "getWorkloadAccess", tag = "Workloads", params(WorkloadPath),
    responses((status = OK, description = "Address and credential", body = Access)))]
pub async fn access(
    State(backend): State<Backend>,
    org: Org,
    Params(path): Params<WorkloadPath>,
    Query(Nothing {}): Query<Nothing>,
) -> Result<Json<Access>> {
    let token = backend.app().access_token(&org, &path.workload).await?;
    let workload = backend.app().workload(&org, &path.workload).await?;
    Ok(Json(Access { url: workload.url, token }))
}
