//! The activity feed, as a list and as a stream.

use axum::Json;
use axum::extract::State;
use axum::response::Response;
use clawhq_api_types::Page;
use clawhq_api_types::event::{Event, StreamGap};
use http::HeaderMap;
use serde::Deserialize;
use std::time::Duration;
use utoipa::IntoParams;

use super::{OrgPath, Paging, WorkloadPath};
use crate::auth::Org;
use crate::convert;
use crate::envelope::RequestInfo;
use crate::extract::{Params, Query};
use crate::problem::Result;
use crate::sse::{self, Gone, Writer};
use crate::state::Backend;

/// Events read from the database at once.
const BATCH: u32 = 200;
/// A resume point further back than this is answered by a gap: the list has what was missed.
const REPLAY_MAX: u32 = 2_000;
/// A look for what no wake-up told of.
const LOOK: Duration = Duration::from_secs(5);

/// List an org's events
///
/// What happened, newest first.
#[utoipa::path(get, path = "/orgs/{org}/events", operation_id = "listEvents", tag = "Events", params(OrgPath, Paging),
    responses((status = OK, description = "Events", body = Page<Event>)))]
pub async fn list(State(backend): State<Backend>, org: Org, Query(paging): Query<Paging>) -> Result<Json<Page<Event>>> {
    let found = backend.app().events(&org, None, paging.request()?).await?;
    Ok(Json(convert::page(found, convert::event)))
}

/// List a workload's events
///
/// What happened to it, newest first.
#[utoipa::path(get, path = "/orgs/{org}/workloads/{workload}/events", operation_id = "listWorkloadEvents", tag = "Events", params(WorkloadPath, Paging),
    responses((status = OK, description = "Events", body = Page<Event>)))]
pub async fn of_workload(
    State(backend): State<Backend>,
    org: Org,
    Params(path): Params<WorkloadPath>,
    Query(paging): Query<Paging>,
) -> Result<Json<Page<Event>>> {
    let found = backend.app().events(&org, Some(&path.workload), paging.request()?).await?;
    Ok(Json(convert::page(found, convert::event)))
}

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct After {
    /// Begin after this event's `seq`; the `Last-Event-ID` header of a reconnecting client wins. Without either the stream
    /// begins now.
    #[param(minimum = 0, example = 41)]
    pub after: Option<i64>,
}

/// Follow an org's events
///
/// Server-sent events: `event` with an Event, whose `id` is the resume point; `gap` when the resume point is too far back;
/// `end` with a reason, when the stream is over. A comment comes every 15 s.
#[utoipa::path(get, path = "/orgs/{org}/events/stream", operation_id = "streamEvents", tag = "Events", params(OrgPath, After),
    responses((status = OK, description = "The stream", content_type = "text/event-stream", body = String)))]
pub async fn stream(
    State(backend): State<Backend>,
    org: Org,
    Query(After { after }): Query<After>,
    headers: HeaderMap,
    info: RequestInfo,
) -> Result<Response> {
    let resume = sse::resume_point(&headers, after)?;
    let open = backend.streams().open(org.org, &backend.metrics().streams, "events")?;
    // Before the first read: what comes in between is then seen.
    let newest = backend.app().newest_event(&org).await?;
    Ok(sse::respond(move |writer| async move {
        let _open = open;
        let reason = tokio::select! {
            Err(Gone) = follow(&backend, &org, &writer, resume, newest) => return,
            () = writer.closed() => return,
            reason = sse::expelled(&backend, &org, &info) => reason,
        };
        writer.end(reason, None).await;
    }))
}

async fn follow(backend: &Backend, org: &Org, writer: &Writer, resume: Option<i64>, newest: i64) -> Result<(), Gone> {
    let mut changes = backend.app().event_wait(org);
    let mut after = resume.unwrap_or(newest);
    if after > newest {
        // A number of another life of this database: nothing can follow it.
        writer.send("gap", Some(newest.to_string()), &StreamGap { after: newest }).await?;
        after = newest;
    }
    let mut replayed = 0;
    loop {
        changes.borrow_and_update();
        let found = match backend.app().events_after(org, None, after, BATCH).await {
            Ok(found) => found,
            Err(error) => {
                tracing::warn!(error = crate::problem::chain(&error), "events could not be read");
                tokio::time::sleep(Duration::from_secs(1)).await;
                continue;
            }
        };
        let full = found.len() == BATCH as usize;
        for event in found {
            after = event.seq;
            writer.send("event", Some(after.to_string()), &convert::event(event)).await?;
        }
        if full {
            replayed += BATCH;
            if replayed >= REPLAY_MAX {
                replayed = 0;
                if let Ok(newest) = backend.app().newest_event(org).await
                    && newest > after
                {
                    after = newest;
                    writer.send("gap", Some(newest.to_string()), &StreamGap { after }).await?;
                }
            }
            continue;
        }
        replayed = 0;
        tokio::select! {
            _ = changes.changed() => {}
            () = tokio::time::sleep(LOOK) => {}
        }
    }
}
