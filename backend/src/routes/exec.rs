//! Running one command inside a workload.

use std::time::{Duration, Instant};

use axum::Json;
use axum::extract::State;
use bytes::Bytes;
use clawhq_api_types::problem::ProblemCode;
use clawhq_api_types::workload::{Exec, ExecResult};
use clawhq_domain::release::limits;
use clawhq_proto::v1;
use serde_json::json;

use super::{WorkloadPath, logs};
use crate::auth::Org;
use crate::extract::{Body, Nothing, Params, Query};
use crate::node::channels::Next;
use crate::problem::{Fail, Result};
use crate::state::Backend;

const TIMEOUT_MS: u32 = 30_000;
const TIMEOUT_MS_MAX: u32 = 300_000;
const STDIN_MAX: usize = 256 * 1024;
/// The node ends the command at its deadline; this much later it is not waited for any more.
const GRACE: Duration = Duration::from_secs(10);

fn check(ask: &Exec) -> Result<()> {
    let bytes: usize = ask.argv.iter().map(|word| word.len() + 1).sum();
    let zero = ask.argv.iter().any(|word| word.contains('\0'));
    if ask.argv.is_empty()
        || ask.argv.len() > limits::ARGV
        || bytes > limits::ARGV_BYTES
        || zero
        || ask.argv[0].is_empty()
    {
        return Err(Fail::new(ProblemCode::InvalidBody, "argv is not usable.")
            .at("/argv", "must be 1 to 100 words, 32 KiB in all, without zero bytes"));
    }
    if ask.stdin.as_ref().is_some_and(|stdin| stdin.len() > STDIN_MAX) {
        return Err(
            Fail::new(ProblemCode::InvalidBody, "stdin is too long.").at("/stdin", "must be at most 262144 bytes")
        );
    }
    if ask.timeout_ms.is_some_and(|ms| ms == 0 || ms > TIMEOUT_MS_MAX) {
        return Err(Fail::new(ProblemCode::InvalidBody, "timeout_ms is out of bounds.")
            .at("/timeout_ms", "must be from 1 to 300000"));
    }
    Ok(())
}

/// Run a command in a workload
///
/// As the workload's user, without a shell. The answer comes when it ends, with its exit code; at its deadline it is killed
/// and the answer is 504. Noted in the audit log.
#[utoipa::path(post, path = "/orgs/{org}/workloads/{workload}/exec", operation_id = "execInWorkload", tag = "Inside", params(WorkloadPath), request_body = Exec,
    responses((status = OK, description = "It ended", body = ExecResult)))]
pub async fn exec(
    State(backend): State<Backend>,
    org: Org,
    Params(path): Params<WorkloadPath>,
    Query(Nothing {}): Query<Nothing>,
    body: Body<Exec>,
) -> Result<Json<ExecResult>> {
    let ask = body.value;
    check(&ask)?;
    let _open = backend.streams().open(org.org, &backend.metrics().streams, "exec")?;
    let reach = backend.app().reach(&org, &path.workload).await?;
    // The program's name alone: arguments may hold what nobody else should read.
    let detail = json!({ "program": ask.argv[0], "instance": reach.instance.to_string() });
    backend.app().audit_entry(&org, "workload.exec", reach.workload.id.to_string(), detail).await?;
    let began = Instant::now();
    let timeout_ms = ask.timeout_ms.unwrap_or(TIMEOUT_MS);
    let kind = v1::channel_open::Kind::Exec(v1::Exec { argv: ask.argv, timeout_ms });
    let (mut stdout, mut stderr, mut truncated) = (Vec::new(), Vec::new(), false);
    let most = backend.config().limits.exec_bytes;
    let mut channel = logs::open(&backend, &reach, kind).await?;
    let input = channel.input();
    let feed = async move {
        if let Some(stdin) = ask.stdin {
            input.send(Bytes::from(stdin)).await;
        }
        input.end_input().await;
    };
    let read = async {
        loop {
            match channel.next().await {
                Next::Frame(frame) => {
                    let room = most.saturating_sub(stdout.len() + stderr.len());
                    let into = if frame.stderr { &mut stderr } else { &mut stdout };
                    truncated |= frame.bytes.len() > room;
                    into.extend_from_slice(&frame.bytes[..frame.bytes.len().min(room)]);
                }
                Next::Closed(closed) => return closed,
            }
        }
    };
    // Input beside output: a command that answers as it reads would stop otherwise.
    let run = async { futures::future::join(feed, read).await.1 };
    let deadline = Duration::from_millis(u64::from(timeout_ms)) + GRACE;
    let late = || Fail::new(ProblemCode::Timeout, "The command did not end in time and was killed.");
    let closed = tokio::time::timeout(deadline, run).await.map_err(|_| late())?;
    match (closed.exit_code, closed.reason.as_str()) {
        (_, "timeout") => Err(late()),
        (Some(exit_code), _) => Ok(Json(ExecResult {
            exit_code,
            stdout: String::from_utf8_lossy(&stdout).into_owned(),
            stderr: String::from_utf8_lossy(&stderr).into_owned(),
            truncated,
            duration_ms: began.elapsed().as_secs_f64() * 1000.0,
        })),
        (None, "not_running" | "not_found") => {
            Err(Fail::new(ProblemCode::NotRunning, "The container does not run (any more)."))
        }
        (None, "node_unreachable") => Err(Fail::new(ProblemCode::NodeUnreachable, closed.message).retry_after(2_000)),
        (None, _) => {
            Err(Fail::new(ProblemCode::Unavailable, format!("The command could not be run: {}", closed.message))
                .retry_after(2_000))
        }
    }
}
