//! The only place where a failure meets an HTTP status.

use std::sync::Arc;

use axum::response::{IntoResponse, Response};
use clawhq_api_types::problem::{FieldProblem, Problem, ProblemCode};
use clawhq_app::Error;
use http::header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE, RETRY_AFTER, WWW_AUTHENTICATE};
use http::{HeaderMap, HeaderValue, StatusCode};

pub type Result<T, E = Fail> = std::result::Result<T, E>;

/// A refusal or failure on its way out. The request's id is added by the envelope.
#[derive(Debug)]
pub struct Fail(Box<Inner>);

#[derive(Debug)]
struct Inner {
    code: ProblemCode,
    detail: String,
    hint: Option<String>,
    errors: Vec<FieldProblem>,
    retry_after_ms: Option<u64>,
    /// Not a failure after all: what an earlier request with the same key was answered.
    replay: Option<clawhq_app::StoredResponse>,
}

/// What the envelope finds on a response that is still to be written.
#[derive(Clone)]
pub(crate) struct Pending(Arc<Inner>);

impl Fail {
    pub fn new(code: ProblemCode, detail: impl Into<String>) -> Self {
        Self(Box::new(Inner {
            code,
            detail: detail.into(),
            hint: None,
            errors: Vec::new(),
            retry_after_ms: None,
            replay: None,
        }))
    }

    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.0.hint = Some(hint.into());
        self
    }

    /// `pointer` is a JSON Pointer, `?name` for a query parameter, `name:` for a header.
    #[must_use]
    pub fn at(mut self, pointer: impl Into<String>, detail: impl Into<String>) -> Self {
        self.0.errors.push(FieldProblem { pointer: pointer.into(), detail: detail.into() });
        self
    }

    #[must_use]
    pub fn retry_after(mut self, ms: u64) -> Self {
        self.0.retry_after_ms = Some(ms);
        self
    }

    pub fn code(&self) -> ProblemCode {
        self.0.code
    }

    pub fn detail(&self) -> &str {
        &self.0.detail
    }

    pub fn not_found(what: &str) -> Self {
        Self::new(ProblemCode::NotFound, format!("There is no such {what}."))
    }

    pub fn unauthenticated() -> Self {
        Self::new(ProblemCode::Unauthenticated, "The request carries no valid credential.")
            .hint("Sign in, or send Authorization: Bearer <API key>.")
    }
}

impl From<Error> for Fail {
    fn from(error: Error) -> Self {
        use ProblemCode as Code;
        let reasoned = |code: Code, reason: &clawhq_domain::Reason| {
            let fail = Fail::new(Code::parse(reason.code).unwrap_or(code), reason.message.clone());
            match &reason.hint {
                Some(hint) => fail.hint(hint.clone()),
                None => fail,
            }
        };
        match error {
            Error::Unauthenticated => Self::unauthenticated(),
            Error::WrongCredentials => Self::new(Code::InvalidCredentials, "E-mail or password is wrong."),
            Error::Forbidden => Self::new(Code::Forbidden, "The caller may not do this."),
            Error::NotFound(what) => Self::not_found(what),
            Error::Invalid { pointer, reason } => {
                reasoned(Code::InvalidBody, &reason).at(pointer, reason.message.clone())
            }
            Error::Refused(reason) => {
                let fail = reasoned(Code::Refused, &reason);
                if fail.code().retryable() { fail.retry_after(1_000) } else { fail }
            }
            Error::Taken("e-mail address") => {
                Self::new(Code::EmailTaken, "There is an account with this e-mail address.").hint("Sign in instead.")
            }
            Error::Taken("membership") => Self::new(Code::AlreadyMember, "This person is a member already."),
            Error::Taken(what) => Self::new(Code::NameTaken, format!("The {what} is taken.")),
            Error::Conflict { current } => {
                Self::new(Code::PreconditionFailed, format!("It is at version {current} now."))
                    .hint("Read it again and repeat with its ETag.")
            }
            Error::Replay(stored) => {
                let mut fail = Self::new(Code::Internal, "");
                fail.0.replay = Some(*stored);
                fail
            }
            Error::InProgress { retry_after_ms } => {
                Self::new(Code::IdempotencyInProgress, "The first request with this key is still being worked on.")
                    .retry_after(millis(retry_after_ms))
            }
            // Only operations that can describe what a request made give it back themselves.
            Error::Unanswered { .. } => Self::new(
                Code::IdempotencyInProgress,
                "The first request with this key had its effect; its answer is lost.",
            )
            .hint("Look at the resource instead of repeating the request.")
            .retry_after(1_000),
            Error::KeyReused => Self::new(Code::IdempotencyKeyReused, "This key was sent with another request before.")
                .hint("Use a new key for a new request."),
            Error::NotRunning { state } => Self::new(Code::NotRunning, format!("The workload is {state}."))
                .hint("Start it and wait for state running."),
            Error::Busy { retry_after_ms } => {
                Self::new(Code::Unavailable, "Too many of these at once.").retry_after(millis(retry_after_ms))
            }
            Error::Unavailable(what) => {
                Self::new(Code::Unavailable, format!("The {what} does not answer just now.")).retry_after(1_000)
            }
            Error::Internal { .. } => {
                tracing::error!(error = chain(&error), "a request failed");
                Self::new(Code::Internal, "Something broke on our side; it was logged.")
            }
        }
    }
}

fn millis(ms: i64) -> u64 {
    u64::try_from(ms).unwrap_or(0)
}

/// An error with its causes, for the log alone.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        next = cause.source();
    }
    text
}

impl IntoResponse for Fail {
    fn into_response(self) -> Response {
        if let Some(stored) = self.0.replay {
            return replay(stored);
        }
        let status = StatusCode::from_u16(self.0.code.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut response = status.into_response();
        response.extensions_mut().insert(Pending(Arc::new(*self.0)));
        response
    }
}

fn replay(stored: clawhq_app::StoredResponse) -> Response {
    let mut response = Response::new(stored.body.into());
    *response.status_mut() = StatusCode::from_u16(stored.status).unwrap_or(StatusCode::OK);
    for (name, value) in stored.headers {
        if let (Ok(name), Ok(value)) = (http::HeaderName::try_from(name), HeaderValue::try_from(value)) {
            response.headers_mut().append(name, value);
        }
    }
    response.headers_mut().insert("idempotency-replayed", HeaderValue::from_static("true"));
    response
}

/// Gives every failure its body: ours as they were made, others (a router's 405, a layer's 413) by their status.
pub(crate) fn finish(mut response: Response, request_id: &str) -> Response {
    let status = response.status();
    let pending = response.extensions_mut().remove::<Pending>();
    if pending.is_none() && (!status.is_client_error() && !status.is_server_error() || is_problem(response.headers())) {
        return response;
    }
    let inner = match pending {
        Some(Pending(inner)) => inner,
        None => Arc::new(*by_status(status, response.headers()).0),
    };
    let problem = Problem {
        r#type: inner.code.docs_url(),
        title: inner.code.title().to_owned(),
        status: inner.code.status(),
        code: inner.code.code().to_owned(),
        detail: inner.detail.clone(),
        hint: inner.hint.clone(),
        errors: inner.errors.clone(),
        request_id: request_id.to_owned(),
        retry_after_ms: inner.retry_after_ms,
    };
    let body = serde_json::to_vec(&problem).unwrap_or_default();
    let mut headers = std::mem::take(response.headers_mut());
    headers.remove(http::header::CONTENT_LENGTH);
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    if let Some(ms) = inner.retry_after_ms {
        headers.insert(RETRY_AFTER, HeaderValue::from(ms.div_ceil(1000).max(1)));
    }
    // What is left of the body is not read, so nothing can follow it on this connection: the client is told, not surprised.
    if matches!(inner.code.status(), 408 | 413) {
        headers.insert(http::header::CONNECTION, HeaderValue::from_static("close"));
    }
    if inner.code.status() == 401 {
        headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer realm=\"clawhq\""));
    }
    let mut answer = Response::new(body.into());
    *answer.status_mut() = StatusCode::from_u16(inner.code.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    *answer.headers_mut() = headers;
    answer
}

fn is_problem(headers: &HeaderMap) -> bool {
    headers.get(CONTENT_TYPE).is_some_and(|value| value.as_bytes() == b"application/problem+json")
}

fn by_status(status: StatusCode, headers: &HeaderMap) -> Fail {
    use ProblemCode as Code;
    match status {
        StatusCode::NOT_FOUND => Fail::new(Code::RouteNotFound, "There is nothing at this path.")
            .hint("GET /v1/openapi.json lists the operations."),
        StatusCode::METHOD_NOT_ALLOWED => {
            let allowed = headers.get(ALLOW).and_then(|value| value.to_str().ok()).unwrap_or("other methods");
            Fail::new(Code::MethodNotAllowed, format!("This path allows {allowed}."))
        }
        StatusCode::PAYLOAD_TOO_LARGE => Fail::new(Code::BodyTooLarge, "The body is larger than allowed."),
        StatusCode::UNSUPPORTED_MEDIA_TYPE => Fail::new(Code::UnsupportedMediaType, "Send application/json."),
        StatusCode::REQUEST_TIMEOUT => Fail::new(Code::RequestTimeout, "The request came too slowly."),
        StatusCode::TOO_MANY_REQUESTS => Fail::new(Code::RateLimited, "Too many requests.").retry_after(1_000),
        StatusCode::SERVICE_UNAVAILABLE => Fail::new(Code::Unavailable, "Not available just now.").retry_after(1_000),
        StatusCode::GATEWAY_TIMEOUT => Fail::new(Code::Timeout, "The deadline passed."),
        status if status.is_client_error() => Fail::new(Code::MalformedRequest, "The request cannot be read."),
        _ => Fail::new(Code::Internal, "Something broke on our side; it was logged."),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every code that a decision gives is either a problem's or a state's: none reaches a client as a generic one.
    #[test]
    fn every_reason_has_its_code() {
        const STATES: &[&str] = &["creating", "node_silent", "replacing", "no_room", "enrolment_refused"];
        let crates = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates");
        let mut seen = 0;
        for room in ["domain", "app"] {
            let mut pending = vec![crates.join(room).join("src")];
            while let Some(path) = pending.pop() {
                if path.is_dir() {
                    pending.extend(std::fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()));
                    continue;
                }
                let text = std::fs::read_to_string(&path).unwrap();
                let code = text.split("#[cfg(test)]").next().unwrap();
                for rest in code.split("Reason::new(").skip(1) {
                    let Some(name) = rest.trim_start().strip_prefix('"').and_then(|rest| rest.split('"').next()) else {
                        continue;
                    };
                    seen += 1;
                    let known = ProblemCode::parse(name).is_some() || STATES.contains(&name);
                    assert!(known, "{}: the reason {name} is no problem code", path.display());
                }
            }
        }
        assert!(seen > 10, "the sources are not where this test looks");
    }
}
