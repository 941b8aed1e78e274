//! Server-sent events: resumable, ended on purpose, never compressed.

use std::convert::Infallible;
use std::time::Duration;

use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use clawhq_api_types::event::StreamEnd;
use clawhq_api_types::problem::ProblemCode;
use clawhq_app::caller::Credential;
use futures::Stream;
use http::header::{CACHE_CONTROL, HeaderMap};
use http::{HeaderName, HeaderValue};
use serde::Serialize;
use tokio::sync::mpsc;

use crate::auth::Org;
use crate::envelope::RequestInfo;
use crate::problem::{Fail, Result};
use crate::state::Backend;

/// What a client waits before it comes back.
const RETRY: Duration = Duration::from_millis(2_000);
const COMMENT_EVERY: Duration = Duration::from_secs(15);
/// A stream outlives the request's look at its credential; it looks again this often.
pub const RECHECK: Duration = Duration::from_secs(30);

/// The writing end of a stream. A client that does not read stops its writer, and is gone when sending fails.
#[derive(Clone)]
pub struct Writer(mpsc::Sender<Event>);

/// The client is gone.
#[derive(Debug)]
pub struct Gone;

impl Writer {
    pub async fn send(&self, name: &str, id: Option<String>, data: &impl Serialize) -> Result<(), Gone> {
        let mut event = Event::default().event(name);
        if let Some(id) = id {
            event = event.id(id);
        }
        let event = event.json_data(data).map_err(|_| Gone)?;
        self.0.send(event).await.map_err(|_| Gone)
    }

    pub async fn end(&self, reason: &str, message: Option<String>) {
        let _ = self.send("end", None, &StreamEnd { reason: reason.to_owned(), message }).await;
    }

    pub async fn closed(&self) {
        self.0.closed().await;
    }
}

/// A response whose events are written by the task that `write` becomes.
pub fn respond<F>(write: impl FnOnce(Writer) -> F) -> Response
where
    F: Future<Output = ()> + Send + 'static,
{
    let (sender, mut receiver) = mpsc::channel::<Event>(64);
    let _ = sender.try_send(Event::default().retry(RETRY).comment("clawhq"));
    tokio::spawn(write(Writer(sender)));
    let stream: std::pin::Pin<Box<dyn Stream<Item = Result<Event, Infallible>> + Send>> =
        Box::pin(futures::stream::poll_fn(move |context| receiver.poll_recv(context).map(|event| event.map(Ok))));
    let mut response = Sse::new(stream).keep_alive(KeepAlive::new().interval(COMMENT_EVERY)).into_response();
    response.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    // A buffering proxy would hold events back.
    response.headers_mut().insert(HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no"));
    response
}

/// The resume point: the header of a reconnecting browser, or the parameter of a new one.
pub fn resume_point(headers: &HeaderMap, after: Option<i64>) -> Result<Option<i64>> {
    let Some(value) = headers.get("last-event-id") else { return Ok(after) };
    let text = value.to_str().unwrap_or("").trim();
    if text.is_empty() {
        return Ok(after);
    }
    text.parse().map(Some).map_err(|_| {
        Fail::new(ProblemCode::InvalidHeader, "Last-Event-ID is not one of this stream's.")
            .at("last-event-id:", "must be the id of an event of this stream")
    })
}

/// Looks again and again whether the credential still opens the org; returns the reason when it does not.
pub async fn expelled(backend: &Backend, org: &Org, info: &RequestInfo) -> &'static str {
    still_allowed(backend, &org.credential, org.org.to_string(), info).await
}

pub async fn still_allowed(
    backend: &Backend,
    credential: &Credential,
    org: String,
    info: &RequestInfo,
) -> &'static str {
    loop {
        tokio::select! {
            () = backend.shutdown().cancelled() => return "shutdown",
            () = tokio::time::sleep(RECHECK) => {}
        }
        match backend.app().enter(credential, &org, info.origin()).await {
            Ok(_) => {}
            Err(clawhq_app::Error::Unauthenticated) => return "signed_out",
            Err(clawhq_app::Error::NotFound(_) | clawhq_app::Error::Forbidden) => return "forbidden",
            // The database may be away for a while; that is no reason to expel anybody.
            Err(error) => {
                tracing::debug!(error = crate::problem::chain(&error), "a stream's credential was not checked")
            }
        }
    }
}
