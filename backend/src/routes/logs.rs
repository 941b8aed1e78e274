//! What a workload prints, as a list and as a stream.

use axum::Json;
use axum::extract::State;
use axum::response::Response;
use clawhq_api_types::event::{LogLine, LogStream, Logs, StreamEnd};
use clawhq_api_types::problem::ProblemCode;
use clawhq_api_types::time;
use clawhq_app::workloads::Reach;
use clawhq_proto::v1;
use serde::Deserialize;
use std::collections::VecDeque;
use std::time::Duration;
use utoipa::IntoParams;

use super::WorkloadPath;
use crate::auth::Org;
use crate::envelope::RequestInfo;
use crate::extract::{Params, Query};
use crate::node::channels::{Channel, Frame, Next, Refused};
use crate::problem::{Fail, Result};
use crate::sse;
use crate::state::Backend;

/// Lines when nothing is said.
const TAIL: u32 = 200;
/// Longest wait for a list of lines.
const LIST: Duration = Duration::from_secs(20);

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct LogsQuery {
    /// Only lines after this moment (RFC 3339), or of the last so long (`30s`, `15m`, `2h`).
    #[param(example = "15m")]
    pub since: Option<String>,
    /// Only the last lines; 200 when absent.
    #[param(minimum = 0, maximum = 10_000, default = 200)]
    pub tail: Option<u32>,
    /// Only this stream.
    #[param(example = "stderr")]
    pub stream: Option<String>,
}

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct FollowQuery {
    /// Go on with new lines as they come; true when absent.
    #[param(default = true)]
    pub follow: Option<bool>,
    /// Only lines after this moment (RFC 3339), or of the last so long (`30s`, `15m`, `2h`).
    #[param(example = "15m")]
    pub since: Option<String>,
    /// Begin with the last lines; 200 when absent.
    #[param(minimum = 0, maximum = 10_000, default = 200)]
    pub tail: Option<u32>,
    /// Only this stream.
    #[param(example = "stderr")]
    pub stream: Option<String>,
    /// The id of the last line seen, for a new stream that goes on where another broke off.
    pub after: Option<i64>,
}

fn since(text: Option<&str>) -> Result<i64> {
    let Some(text) = text else { return Ok(0) };
    let wrong = || {
        Fail::new(ProblemCode::InvalidParameter, "The parameter since is no moment and no span.")
            .at("?since", "must be RFC 3339 such as 2026-11-21T10:00:00Z, or a span such as 30s, 15m, 2h")
    };
    if let Ok(at) = chrono::DateTime::parse_from_rfc3339(text) {
        return Ok(at.timestamp_millis().max(0));
    }
    let unit = match text.chars().last() {
        Some('s') => 1_000,
        Some('m') => 60_000,
        Some('h') => 3_600_000,
        Some('d') => 86_400_000,
        _ => return Err(wrong()),
    };
    let count: i64 = text[..text.len() - 1].parse().map_err(|_| wrong())?;
    let span = count.checked_mul(unit).filter(|span| *span >= 0).ok_or_else(wrong)?;
    Ok((chrono::Utc::now().timestamp_millis() - span).max(0))
}

fn wanted(query_since: Option<&str>, tail: Option<u32>, stream: Option<&str>, follow: bool) -> Result<v1::Logs> {
    let tail = tail.unwrap_or(TAIL);
    if tail > 10_000 {
        return Err(
            Fail::new(ProblemCode::InvalidParameter, "tail is too large.").at("?tail", "must be from 0 to 10000")
        );
    }
    let (stdout, stderr) = match stream {
        None => (true, true),
        Some("stdout") => (true, false),
        Some("stderr") => (false, true),
        Some(_) => {
            return Err(Fail::new(ProblemCode::InvalidParameter, "There is no such stream.")
                .at("?stream", "must be stdout or stderr"));
        }
    };
    Ok(v1::Logs { follow, since_ms: since(query_since)?, tail, stdout, stderr })
}

pub(super) fn refused(refused: Refused) -> Fail {
    match refused {
        Refused::NotConnected => {
            Fail::new(ProblemCode::NodeUnreachable, "The node that runs it is not connected just now.")
                .retry_after(2_000)
        }
        Refused::Full => {
            Fail::new(ProblemCode::TooManyStreams, "The node holds as many streams as it may.").retry_after(2_000)
        }
    }
}

pub(super) async fn open(backend: &Backend, reach: &Reach, kind: v1::channel_open::Kind) -> Result<Channel> {
    backend.channels().open(reach.node, reach.slot, reach.instance, kind).await.map_err(refused)
}

fn line(frame: &Frame) -> LogLine {
    let text = String::from_utf8_lossy(&frame.bytes);
    LogLine {
        ts: time(frame.at_ms),
        stream: if frame.stderr { LogStream::Stderr } else { LogStream::Stdout },
        line: text.trim_end_matches(['\n', '\r']).to_owned(),
    }
}

/// Read a workload's output
///
/// The last lines of its newest container, oldest first.
#[utoipa::path(get, path = "/orgs/{org}/workloads/{workload}/logs", operation_id = "getLogs", tag = "Inside", params(WorkloadPath, LogsQuery),
    responses((status = OK, description = "The lines", body = Logs)))]
pub async fn list(
    State(backend): State<Backend>,
    org: Org,
    Params(path): Params<WorkloadPath>,
    Query(query): Query<LogsQuery>,
) -> Result<Json<Logs>> {
    let wanted = wanted(query.since.as_deref(), query.tail, query.stream.as_deref(), false)?;
    let _open = backend.streams().open(org.org, &backend.metrics().streams, "logs")?;
    let reach = backend.app().reach(&org, &path.workload).await?;
    let mut channel = open(&backend, &reach, v1::channel_open::Kind::Logs(wanted)).await?;
    let most = backend.config().limits.log_lines;
    let (mut items, mut truncated) = (VecDeque::new(), false);
    let read = async {
        loop {
            match channel.next().await {
                Next::Frame(frame) => {
                    if items.len() == most {
                        items.pop_front();
                        truncated = true;
                    }
                    items.push_back(line(&frame));
                }
                Next::Closed(closed) => return closed,
            }
        }
    };
    let closed = tokio::time::timeout(LIST, read)
        .await
        .map_err(|_| Fail::new(ProblemCode::Timeout, "The node did not send the lines in time."))?;
    if let "node_unreachable" | "runtime_failed" | "overflow" = closed.reason.as_str() {
        return Err(Fail::new(ProblemCode::NodeUnreachable, closed.message).retry_after(2_000));
    }
    let end = StreamEnd { reason: closed.reason, message: (!closed.message.is_empty()).then_some(closed.message) };
    Ok(Json(Logs { items: items.into(), truncated, end }))
}

/// Follow a workload's output
///
/// Server-sent events: `log` with a LogLine, and a final `end` with the reason. The id of a line is its moment in
/// milliseconds: a stream that goes on after it may repeat lines of that very millisecond, and loses none.
#[utoipa::path(get, path = "/orgs/{org}/workloads/{workload}/logs/stream", operation_id = "streamLogs", tag = "Inside", params(WorkloadPath, FollowQuery),
    responses((status = OK, description = "The stream", content_type = "text/event-stream", body = String)))]
pub async fn stream(
    State(backend): State<Backend>,
    org: Org,
    Params(path): Params<WorkloadPath>,
    Query(query): Query<FollowQuery>,
    headers: http::HeaderMap,
    info: RequestInfo,
) -> Result<Response> {
    let follow = query.follow.unwrap_or(true);
    let mut wanted = wanted(query.since.as_deref(), query.tail, query.stream.as_deref(), follow)?;
    if let Some(after) = sse::resume_point(&headers, query.after)? {
        // All since then: what came meanwhile must not be cut by a tail.
        wanted.since_ms = wanted.since_ms.max(after);
        wanted.tail = 10_000;
    }
    let held = backend.streams().open(org.org, &backend.metrics().streams, "logs")?;
    let reach = backend.app().reach(&org, &path.workload).await?;
    let mut channel = open(&backend, &reach, v1::channel_open::Kind::Logs(wanted)).await?;
    Ok(sse::respond(move |writer| async move {
        let _held = held;
        let copy = async {
            loop {
                match channel.next().await {
                    Next::Frame(frame) => {
                        if writer.send("log", Some(frame.at_ms.to_string()), &line(&frame)).await.is_err() {
                            return None;
                        }
                    }
                    Next::Closed(closed) => return Some(closed),
                }
            }
        };
        tokio::select! {
            closed = copy => if let Some(closed) = closed {
                writer.end(&closed.reason, (!closed.message.is_empty()).then_some(closed.message)).await;
            },
            () = writer.closed() => {}
            reason = sse::expelled(&backend, &org, &info) => writer.end(reason, None).await,
        }
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_and_spans_are_read() {
        assert_eq!(since(None).unwrap(), 0);
        assert_eq!(since(Some("1970-01-01T00:00:01Z")).unwrap(), 1000);
        let now = chrono::Utc::now().timestamp_millis();
        assert!((since(Some("2h")).unwrap() - (now - 7_200_000)).abs() < 5_000);
        for wrong in ["", "h", "-1h", "1w", "yesterday", "99999999999999999h", "1é"] {
            assert!(since(Some(wrong)).is_err(), "{wrong}");
        }
    }
}
