//! The public API's request and response shapes, and its problem codes.
//!
//! What comes in refuses unknown fields; what goes out may grow. Ids are prefixed strings (`wl_…`), times are RFC 3339 in
//! UTC, sizes are MiB, spans are milliseconds. Enums are open: a client must accept values it does not know.

pub mod account;
pub mod catalogue;
pub mod event;
pub mod org;
pub mod problem;
pub mod secret;
pub mod workload;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// One page of a list.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Page<T> {
    pub items: Vec<T>,
    /// Give it back as `cursor` to read on; null at the end.
    pub next_cursor: Option<String>,
}

impl<T> Page<T> {
    /// A list that has no further page.
    pub fn whole(items: Vec<T>) -> Self {
        Self { items, next_cursor: None }
    }
}

/// Milliseconds since the epoch as a moment; what no calendar holds becomes the epoch.
pub fn time(millis: i64) -> chrono::DateTime<chrono::Utc> {
    chrono::DateTime::from_timestamp_millis(millis).unwrap_or_default()
}
