//! Orgs, their members and their API keys.

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use clawhq_api_types::Page;
use clawhq_api_types::org::{
    AddMember, ApiKey, CreateApiKey, CreateOrg, CreatedApiKey, Member, Org as OrgBody, OrgMembership, UpdateOrg,
};
use clawhq_api_types::problem::ProblemCode;
use clawhq_domain::access::Role;
use clawhq_domain::names::Email;
use http::header::{ETAG, LOCATION};
use http::{HeaderValue, StatusCode};
use serde::Deserialize;
use utoipa::IntoParams;

use super::{IfMatchHeader, OrgPath, Paging};
use crate::auth::{Caller, Org};
use crate::convert;
use crate::extract::{Body, IfMatch, Nothing, Params, Query, id};
use crate::problem::{Fail, Result};
use crate::state::Backend;

pub fn etag(version: i64) -> HeaderValue {
    HeaderValue::try_from(format!("\"{version}\"")).unwrap_or_else(|_| HeaderValue::from_static("\"0\""))
}

pub fn location(path: String) -> HeaderValue {
    HeaderValue::try_from(path).unwrap_or_else(|_| HeaderValue::from_static("/v1"))
}

/// List orgs
///
/// The orgs this person belongs to.
#[utoipa::path(get, path = "/orgs", operation_id = "listOrgs", tag = "Orgs", security(("session" = [])), params(Paging),
    responses((status = OK, description = "Orgs", body = Page<OrgMembership>)))]
pub async fn list(
    State(backend): State<Backend>,
    caller: Caller,
    Query(paging): Query<Paging>,
) -> Result<Json<Page<OrgMembership>>> {
    paging.whole()?;
    let (_, orgs) = backend.app().me(&caller.credential).await?;
    Ok(Json(Page::whole(orgs.into_iter().map(convert::membership).collect())))
}

/// Create an org
///
/// Another org of this person, who owns it.
#[utoipa::path(post, path = "/orgs", operation_id = "createOrg", tag = "Orgs", security(("session" = [])), request_body = CreateOrg,
    responses((status = CREATED, description = "Created", body = OrgBody, headers(("Location" = String, description = "Its address"), ("ETag" = String, description = "Its version")))))]
pub async fn create(
    State(backend): State<Backend>,
    caller: Caller,
    Query(Nothing {}): Query<Nothing>,
    body: Body<CreateOrg>,
) -> Result<Response> {
    let org = backend.app().create_org(&caller.credential, &body.value.name, body.value.slug.as_deref()).await?;
    let headers = [(LOCATION, location(format!("/v1/orgs/{}", org.id))), (ETAG, etag(org.version))];
    Ok((StatusCode::CREATED, headers, Json(convert::org(org, Role::Owner))).into_response())
}

/// Get an org
#[utoipa::path(get, path = "/orgs/{org}", operation_id = "getOrg", tag = "Orgs", params(OrgPath),
    responses((status = OK, description = "The org", body = OrgBody, headers(("ETag" = String, description = "Its version")))))]
pub async fn get(State(backend): State<Backend>, org: Org, Query(Nothing {}): Query<Nothing>) -> Result<Response> {
    let found = backend.app().org(&org).await?;
    Ok(([(ETAG, etag(found.version))], Json(convert::org(found, org.role))).into_response())
}

/// Rename an org
///
/// Owners only. The slug stays: it is part of its workloads' addresses.
#[utoipa::path(patch, path = "/orgs/{org}", operation_id = "updateOrg", tag = "Orgs", params(OrgPath, IfMatchHeader), request_body = UpdateOrg,
    responses((status = OK, description = "The org", body = OrgBody, headers(("ETag" = String, description = "Its version")))))]
pub async fn update(
    State(backend): State<Backend>,
    org: Org,
    IfMatch(version): IfMatch,
    Query(Nothing {}): Query<Nothing>,
    body: Body<UpdateOrg>,
) -> Result<Response> {
    let renamed = backend.app().rename_org(&org, &body.value.name, version).await?;
    Ok(([(ETAG, etag(renamed.version))], Json(convert::org(renamed, org.role))).into_response())
}

/// List members
#[utoipa::path(get, path = "/orgs/{org}/members", operation_id = "listMembers", tag = "Orgs", params(OrgPath, Paging),
    responses((status = OK, description = "Members", body = Page<Member>)))]
pub async fn members(
    State(backend): State<Backend>,
    org: Org,
    Query(paging): Query<Paging>,
) -> Result<Json<Page<Member>>> {
    paging.whole()?;
    let members = backend.app().members(&org).await?;
    Ok(Json(Page::whole(members.into_iter().map(convert::member).collect())))
}

/// Add a member
///
/// Owners only. The person must have an account.
#[utoipa::path(post, path = "/orgs/{org}/members", operation_id = "addMember", tag = "Orgs", params(OrgPath), request_body = AddMember,
    responses((status = CREATED, description = "Added", body = Member)))]
pub async fn add_member(
    State(backend): State<Backend>,
    org: Org,
    Query(Nothing {}): Query<Nothing>,
    body: Body<AddMember>,
) -> Result<(StatusCode, Json<Member>)> {
    let email = convert::named(Email::parse(body.value.email.trim()), ProblemCode::InvalidBody, "/email")?;
    let added = backend.app().add_member(&org, &email, convert::role_in(body.value.role)).await?;
    Ok((StatusCode::CREATED, Json(convert::member(added))))
}

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Path)]
pub struct MemberPath {
    /// The org's id or slug.
    #[param(example = "ada")]
    #[expect(dead_code, reason = "read by the Org extractor")]
    pub org: String,
    /// The person's id.
    #[param(example = "usr_01k2m3n4p5q6r7s8t9v0w1x2y3")]
    pub user: String,
}

/// Remove a member
///
/// Owners remove anybody but the last owner; everybody may leave. API keys that they made stop working.
#[utoipa::path(delete, path = "/orgs/{org}/members/{user}", operation_id = "removeMember", tag = "Orgs", params(MemberPath),
    responses((status = NO_CONTENT, description = "Removed")))]
pub async fn remove_member(
    State(backend): State<Backend>,
    org: Org,
    Params(path): Params<MemberPath>,
    Query(Nothing {}): Query<Nothing>,
) -> Result<StatusCode> {
    backend.app().remove_member(&org, id(&path.user, "member")?).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// List API keys
#[utoipa::path(get, path = "/orgs/{org}/api-keys", operation_id = "listApiKeys", tag = "Orgs", params(OrgPath, Paging),
    responses((status = OK, description = "Keys, without the keys themselves", body = Page<ApiKey>)))]
pub async fn api_keys(
    State(backend): State<Backend>,
    org: Org,
    Query(paging): Query<Paging>,
) -> Result<Json<Page<ApiKey>>> {
    paging.whole()?;
    let keys = backend.app().api_keys(&org).await?;
    Ok(Json(Page::whole(keys.into_iter().map(convert::api_key).collect())))
}

/// Create an API key
///
/// Owners only. The key is in this answer and nowhere else.
#[utoipa::path(post, path = "/orgs/{org}/api-keys", operation_id = "createApiKey", tag = "Orgs", params(OrgPath), request_body = CreateApiKey,
    responses((status = CREATED, description = "Created", body = CreatedApiKey)))]
pub async fn create_api_key(
    State(backend): State<Backend>,
    org: Org,
    Query(Nothing {}): Query<Nothing>,
    body: Body<CreateApiKey>,
) -> Result<(StatusCode, Json<CreatedApiKey>)> {
    let CreateApiKey { name, expires_at } = body.value;
    let lifetime = expires_at.map(|at| at.timestamp_millis() - chrono::Utc::now().timestamp_millis());
    if lifetime.is_some_and(|ms| ms <= 0) {
        return Err(Fail::new(ProblemCode::InvalidBody, "The expiry is in the past.")
            .at("/expires_at", "must be in the future"));
    }
    let (key, secret) = backend.app().create_api_key(&org, &name, lifetime).await?;
    Ok((StatusCode::CREATED, Json(convert::created_api_key(key, secret))))
}

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Path)]
pub struct ApiKeyPath {
    /// The org's id or slug.
    #[param(example = "ada")]
    #[expect(dead_code, reason = "read by the Org extractor")]
    pub org: String,
    /// The key's id.
    #[param(example = "key_01k2m3n4p5q6r7s8t9v0w1x2y3")]
    pub key: String,
}

/// Delete an API key
///
/// Owners only. It stops working at once.
#[utoipa::path(delete, path = "/orgs/{org}/api-keys/{key}", operation_id = "deleteApiKey", tag = "Orgs", params(ApiKeyPath),
    responses((status = NO_CONTENT, description = "Deleted")))]
pub async fn delete_api_key(
    State(backend): State<Backend>,
    org: Org,
    Params(path): Params<ApiKeyPath>,
    Query(Nothing {}): Query<Nothing>,
) -> Result<StatusCode> {
    backend.app().delete_api_key(&org, id(&path.key, "API key")?).await?;
    Ok(StatusCode::NO_CONTENT)
}
