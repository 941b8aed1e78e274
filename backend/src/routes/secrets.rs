//! Secrets: set, named, deleted.

use axum::Json;
use axum::extract::State;
use clawhq_api_types::Page;
use clawhq_api_types::problem::ProblemCode;
use clawhq_api_types::secret::{Secret, SecretVersion, SetSecret};
use clawhq_app::Plaintext;
use clawhq_domain::names::SecretName;
use http::StatusCode;
use serde::Deserialize;
use utoipa::IntoParams;
use zeroize::Zeroizing;

use super::{OrgPath, Paging};
use crate::auth::Org;
use crate::convert;
use crate::extract::{Body, Nothing, Params, Query};
use crate::problem::{Fail, Result};
use crate::state::Backend;

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Path)]
pub struct SecretPath {
    /// The org's id or slug.
    #[param(example = "ada")]
    #[expect(dead_code, reason = "read by the Org extractor")]
    pub org: String,
    /// 1 to 128 letters, digits and underscores, not starting with a digit.
    #[param(example = "OPENAI_API_KEY")]
    pub name: String,
}

fn known(name: &str) -> Result<SecretName> {
    SecretName::parse(name).map_err(|_| Fail::not_found("secret"))
}

/// List secrets
///
/// Names and versions; values cannot be read.
#[utoipa::path(get, path = "/orgs/{org}/secrets", operation_id = "listSecrets", tag = "Secrets", params(OrgPath, Paging),
    responses((status = OK, description = "Secrets, by name", body = Page<Secret>)))]
pub async fn list(
    State(backend): State<Backend>,
    org: Org,
    Query(paging): Query<Paging>,
) -> Result<Json<Page<Secret>>> {
    paging.whole()?;
    Ok(Json(Page::whole(backend.app().secrets(&org).await?.into_iter().map(convert::secret).collect())))
}

/// Set a secret
///
/// Makes a new version. Workloads use it from their next release on; a running one keeps the version it was given.
#[utoipa::path(put, path = "/orgs/{org}/secrets/{name}", operation_id = "setSecret", tag = "Secrets", params(SecretPath), request_body = SetSecret,
    responses((status = OK, description = "The secret with its new version", body = Secret)))]
pub async fn set(
    State(backend): State<Backend>,
    org: Org,
    Params(path): Params<SecretPath>,
    Query(Nothing {}): Query<Nothing>,
    body: Body<SetSecret>,
) -> Result<Json<Secret>> {
    let name = convert::named(SecretName::parse(&path.name), ProblemCode::NameInvalid, "/name")?;
    let value = Zeroizing::new(body.value.value);
    // No Idempotency-Key here: it would keep a hash of the value. A repeat makes one version more of the same value.
    let set = backend.app().put_secret(&org, &name, Plaintext::new(value.as_bytes()), None).await?;
    Ok(Json(convert::secret(set)))
}

/// List a secret's versions
#[utoipa::path(get, path = "/orgs/{org}/secrets/{name}/versions", operation_id = "listSecretVersions", tag = "Secrets", params(SecretPath, Paging),
    responses((status = OK, description = "Versions, newest first", body = Page<SecretVersion>)))]
pub async fn versions(
    State(backend): State<Backend>,
    org: Org,
    Params(path): Params<SecretPath>,
    Query(paging): Query<Paging>,
) -> Result<Json<Page<SecretVersion>>> {
    paging.whole()?;
    let versions = backend.app().secret_versions(&org, &known(&path.name)?).await?;
    Ok(Json(Page::whole(versions.into_iter().map(convert::secret_version).collect())))
}

/// Delete a secret
///
/// Refused while a release that can still start refers to it.
#[utoipa::path(delete, path = "/orgs/{org}/secrets/{name}", operation_id = "deleteSecret", tag = "Secrets", params(SecretPath),
    responses((status = NO_CONTENT, description = "Deleted")))]
pub async fn delete(
    State(backend): State<Backend>,
    org: Org,
    Params(path): Params<SecretPath>,
    Query(Nothing {}): Query<Nothing>,
) -> Result<StatusCode> {
    backend.app().delete_secret(&org, &known(&path.name)?).await?;
    Ok(StatusCode::NO_CONTENT)
}
