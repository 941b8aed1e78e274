//! What happened.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// An entry of the activity feed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Event {
    #[schema(example = "evt_01k2m3n4p5q6r7s8t9v0w1x2y3")]
    pub id: String,
    /// Grows within an org; the resume point of the event stream.
    #[schema(example = 41)]
    pub seq: i64,
    #[schema(example = "workload.running")]
    pub kind: String,
    #[schema(example = "hello answers.")]
    pub message: String,
    pub at: DateTime<Utc>,
    pub workload_id: Option<String>,
    pub instance_id: Option<String>,
    /// Facts of this kind of event.
    #[schema(value_type = Object)]
    pub data: serde_json::Value,
}

/// Why a stream ended; the data of its final `end` event.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct StreamEnd {
    /// `ended`, `not_running`, `node_unreachable`, `overflow`, `shutdown`, `signed_out`, …
    #[schema(example = "ended")]
    pub reason: String,
    pub message: Option<String>,
}

/// The resume point is older than what is kept; the data of a `gap` event.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct StreamGap {
    /// What follows begins after this one.
    pub after: i64,
}

/// One line of a workload's output.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct LogLine {
    pub ts: DateTime<Utc>,
    pub stream: LogStream,
    #[schema(example = "listening on :8080")]
    pub line: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum LogStream {
    Stdout,
    Stderr,
}

/// The lines asked for, oldest first.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Logs {
    pub items: Vec<LogLine>,
    /// There were more lines than an answer may hold; the oldest of them are left out.
    pub truncated: bool,
    /// Why there is no more.
    pub end: StreamEnd,
}
