//! What can be deployed.

use axum::Json;
use axum::extract::State;
use clawhq_api_types::Page;
use clawhq_api_types::catalogue::{Template, Tier};
use clawhq_domain::names::TemplateName;
use serde::Deserialize;
use utoipa::IntoParams;

use super::Paging;
use crate::convert;
use crate::extract::{Nothing, Params, Query};
use crate::problem::{Fail, Result};
use crate::state::Backend;

/// List templates
///
/// The catalogue. It needs no credential.
#[utoipa::path(get, path = "/templates", operation_id = "listTemplates", tag = "Catalogue", security(()), params(Paging),
    responses((status = OK, description = "Templates, in the catalogue's order", body = Page<Template>)))]
pub async fn templates(State(backend): State<Backend>, Query(paging): Query<Paging>) -> Result<Json<Page<Template>>> {
    paging.whole()?;
    Ok(Json(Page::whole(backend.app().templates().await?.iter().map(convert::template).collect())))
}

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Path)]
pub struct TemplatePath {
    /// The template's name.
    #[param(example = "hello")]
    pub template: String,
}

/// Get a template
#[utoipa::path(get, path = "/templates/{template}", operation_id = "getTemplate", tag = "Catalogue", security(()), params(TemplatePath),
    responses((status = OK, description = "The template", body = Template)))]
pub async fn template(
    State(backend): State<Backend>,
    Params(path): Params<TemplatePath>,
    Query(Nothing {}): Query<Nothing>,
) -> Result<Json<Template>> {
    let name = TemplateName::parse(&path.template).map_err(|_| Fail::not_found("template"))?;
    Ok(Json(convert::template(&backend.app().template(&name).await?)))
}

/// List tiers
///
/// Limits by tier, least first. It needs no credential.
#[utoipa::path(get, path = "/tiers", operation_id = "listTiers", tag = "Catalogue", security(()), params(Paging),
    responses((status = OK, description = "Tiers", body = Page<Tier>)))]
pub async fn tiers(State(backend): State<Backend>, Query(paging): Query<Paging>) -> Result<Json<Page<Tier>>> {
    paging.whole()?;
    Ok(Json(Page::whole(backend.app().tiers().await?.0.iter().map(convert::tier).collect())))
}
