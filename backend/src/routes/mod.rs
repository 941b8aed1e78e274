//! One handler for each operation: read, ask `app`, say.

pub mod account;
pub mod catalogue;
pub mod events;
pub mod exec;
pub mod logs;
pub mod orgs;
pub mod secrets;
pub mod system;
pub mod terminal;
pub mod workloads;

use clawhq_api_types::problem::ProblemCode;
use clawhq_app::model::PageRequest;
use serde::Deserialize;
use utoipa::IntoParams;

use crate::problem::{Fail, Result};

/// Where a page begins and how long it is.
#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct Paging {
    /// Items of one page; 50 when absent.
    #[param(minimum = 1, maximum = 200, default = 50)]
    pub limit: Option<u32>,
    /// `next_cursor` of the page before.
    #[param(max_length = 200)]
    pub cursor: Option<String>,
}

pub const LIMIT: u32 = 50;
pub const LIMIT_MAX: u32 = 200;

pub fn paging(limit: Option<u32>, cursor: Option<String>) -> Result<PageRequest> {
    let limit = limit.unwrap_or(LIMIT);
    if !(1..=LIMIT_MAX).contains(&limit) {
        return Err(Fail::new(ProblemCode::InvalidParameter, "The parameter limit is from 1 to 200.")
            .at("?limit", "must be from 1 to 200"));
    }
    Ok(PageRequest { limit, cursor })
}

impl Paging {
    pub fn request(self) -> Result<PageRequest> {
        paging(self.limit, self.cursor)
    }

    /// For lists so short that they are one page: there is no cursor that could come back.
    pub fn whole(self) -> Result<()> {
        let page = self.request()?;
        match page.cursor {
            None => Ok(()),
            Some(_) => Err(Fail::new(ProblemCode::InvalidCursor, "This list gave no such cursor.")
                .at("?cursor", "must be next_cursor of this list")),
        }
    }
}

/// Documentation of `Idempotency-Key`.
#[derive(IntoParams)]
#[into_params(parameter_in = Header)]
#[expect(dead_code, reason = "only described: extract::Idempotency reads it")]
pub struct IdempotencyHeader {
    /// Any unique text. A repeat with the same key and request gets the first answer, with `Idempotency-Replayed: true`; the
    /// same key with another request is refused. Kept for 24 hours.
    #[param(rename = "Idempotency-Key", value_type = String, required = false, min_length = 1, max_length = 255, example = "5d0c7a52-3b0e-4e0a-9b5e-1f6f5a0f3c11")]
    idempotency_key: Option<String>,
}

/// Documentation of `Prefer`.
#[derive(IntoParams)]
#[into_params(parameter_in = Header)]
#[expect(dead_code, reason = "only described: extract::Prefer reads it")]
pub struct PreferHeader {
    /// `wait=N`: hold the answer up to N seconds (at most 120) until it has happened.
    #[param(rename = "Prefer", value_type = String, required = false, example = "wait=30")]
    prefer: Option<String>,
}

/// Documentation of `If-Match`.
#[derive(IntoParams)]
#[into_params(parameter_in = Header)]
#[expect(dead_code, reason = "only described: extract::IfMatch reads it")]
pub struct IfMatchHeader {
    /// The ETag the change is based on; refused with 412 when it was changed meanwhile.
    #[param(rename = "If-Match", value_type = String, required = false, example = "\"42\"")]
    if_match: Option<String>,
}

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Path)]
pub struct OrgPath {
    /// The org's id or slug.
    #[param(example = "ada")]
    #[expect(dead_code, reason = "read by the Org extractor")]
    pub org: String,
}

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Path)]
pub struct WorkloadPath {
    /// The org's id or slug.
    #[param(example = "ada")]
    pub org: String,
    /// The workload's id or name.
    #[param(example = "my-agent")]
    pub workload: String,
}
