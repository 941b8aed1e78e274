//! What every request gets: an id, a deadline, headers, a log line, a measurement, and a problem document when it fails.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::extract::{MatchedPath, Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use clawhq_api_types::problem::ProblemCode;
use clawhq_domain::ids::RequestId;
use http::header::{CACHE_CONTROL, CONTENT_TYPE};
use http::{HeaderMap, HeaderName, HeaderValue};
use parking_lot::Mutex;
use tracing::Instrument as _;

use crate::limits::Left;
use crate::metrics::{InUse, Route};
use crate::problem::{self, Fail};
use crate::state::Backend;

/// Facts of a request that its handlers and limits use.
#[derive(Clone)]
pub struct RequestInfo {
    pub id: RequestId,
    /// The client's address, as far as our own proxies vouch for it.
    pub ip: Option<IpAddr>,
    notes: Arc<Mutex<Notes>>,
}

/// What handlers leave for the envelope.
#[derive(Default)]
struct Notes {
    limit: Option<Left>,
}

impl RequestInfo {
    pub fn note_limit(&self, left: Left) {
        self.notes.lock().limit = Some(left);
    }
}

/// The client: what the Nth proxy from the right saw when there are N proxies of ours, else the peer.
fn client(headers: &HeaderMap, peer: Option<&SocketAddr>, proxies: usize) -> Option<IpAddr> {
    let peer = peer.map(|peer| peer.ip().to_canonical());
    if proxies == 0 {
        return peer;
    }
    let entries: Vec<&str> = headers
        .get_all("x-forwarded-for")
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(str::trim)
        .collect();
    let index = entries.len().checked_sub(proxies);
    index.and_then(|index| entries[index].parse().ok()).or(peer)
}

/// How long an operation may take; those that wait for something by design have their own bounds inside.
fn deadline(route: &str, usual: Duration) -> Duration {
    let waits = ["/exec", "/wait", "/start", "/stop", "/restart", "/workloads", "/workloads/{workload}", "/logs"];
    if waits.iter().any(|end| route.ends_with(end)) { usual + Duration::from_secs(300) } else { usual }
}

pub async fn envelope(State(backend): State<Backend>, mut request: Request, next: Next) -> Response {
    let began = Instant::now();
    let id: RequestId = clawhq_runtime::ids::mint();
    let peer = request.extensions().get::<SocketAddr>();
    let ip = client(request.headers(), peer, backend.config().proxies);
    let info = RequestInfo { id, ip, notes: Arc::default() };
    request.extensions_mut().insert(info.clone());
    let route = request.extensions().get::<MatchedPath>().map_or("", MatchedPath::as_str).to_owned();
    let method = request.method().clone();
    let is_api = request.uri().path().starts_with("/v1/");
    let span = tracing::info_span!(
        "request",
        request.id = %id,
        http.method = %method,
        http.route = route,
        trace.parent = request.headers().get("traceparent").and_then(|value| value.to_str().ok()),
    );
    let deadline = deadline(&route, Duration::from_secs(backend.config().limits.request_seconds));
    let _in_flight = InUse::new(&backend.metrics().in_flight);
    let answer = tokio::time::timeout(deadline, next.run(request).instrument(span.clone())).await;
    let response = answer.unwrap_or_else(|_| {
        Fail::new(ProblemCode::Timeout, "The deadline passed.")
            .hint("Look, or repeat it with the same key.")
            .into_response()
    });
    let id = id.to_string();
    let mut response = problem::finish(response, &id);
    let status = response.status().as_u16();
    decorate(&mut response, &id, &info, is_api);
    let took = began.elapsed();
    backend
        .metrics()
        .requests
        .get_or_create(&Route { method: method.to_string(), route, status })
        .observe(took.as_secs_f64());
    let ms = took.as_secs_f64() * 1000.0;
    span.in_scope(|| {
        if status >= 500 {
            tracing::warn!(status, ms, "answered");
        } else {
            tracing::debug!(status, ms, "answered");
        }
    });
    response
}

fn decorate(response: &mut Response, id: &str, info: &RequestInfo, is_api: bool) {
    let headers = response.headers_mut();
    if let Ok(id) = HeaderValue::from_str(id) {
        headers.insert("x-request-id", id);
    }
    headers.insert("x-content-type-options", HeaderValue::from_static("nosniff"));
    headers.insert("referrer-policy", HeaderValue::from_static("same-origin"));
    if is_api && !headers.contains_key(CACHE_CONTROL) {
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    }
    if let Some(left) = info.notes.lock().limit.take() {
        let mut put = |name: &'static str, value: String| {
            if let Ok(value) = HeaderValue::try_from(value) {
                headers.insert(HeaderName::from_static(name), value);
            }
        };
        let Left { policy, per_minute, remaining, reset_seconds } = left;
        put("ratelimit-policy", format!("\"{policy}\";q={per_minute};w=60"));
        put("ratelimit", format!("\"{policy}\";r={remaining};t={reset_seconds}"));
    }
}

/// What may be compressed: text of some size, never a stream of events.
#[derive(Clone, Copy)]
pub struct Compressible;

impl tower_http::compression::Predicate for Compressible {
    fn should_compress<B: http_body::Body>(&self, response: &http::Response<B>) -> bool {
        let kind = response.headers().get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or("");
        let text = kind.starts_with("application/json") || kind.starts_with("application/problem+json");
        let small = http_body::Body::size_hint(response.body()).upper().is_some_and(|bytes| bytes < 1024);
        text && !small
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_cannot_choose_its_address() {
        let mut headers = HeaderMap::new();
        headers.append("x-forwarded-for", HeaderValue::from_static("1.1.1.1, 2.2.2.2"));
        headers.append("x-forwarded-for", HeaderValue::from_static("3.3.3.3"));
        let peer: SocketAddr = "192.0.2.9:1".parse().unwrap();
        let seen = |proxies| client(&headers, Some(&peer), proxies).unwrap().to_string();
        assert_eq!(seen(0), "192.0.2.9");
        assert_eq!(seen(1), "3.3.3.3");
        assert_eq!(seen(2), "2.2.2.2");
        assert_eq!(seen(9), "192.0.2.9");
    }
}
