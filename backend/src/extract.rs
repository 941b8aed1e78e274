//! Reading requests. What cannot be read is a problem with its place, never text of a framework.

use std::time::Duration;

use axum::RequestPartsExt as _;
use axum::extract::{FromRequest, FromRequestParts, MatchedPath, Request};
use clawhq_api_types::problem::ProblemCode;
use clawhq_app::IdempotencyKey;
use http::HeaderMap;
use http::header::CONTENT_TYPE;
use http::request::Parts;
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use serde::de::DeserializeOwned;
use sha2::{Digest, Sha256};

use crate::envelope::RequestInfo;
use crate::problem::{Fail, Result};
use crate::state::Backend;

/// A JSON body.
pub struct Body<T> {
    pub value: T,
    /// SHA-256 of the bytes as they came.
    pub hash: [u8; 32],
}

fn is_json(headers: &HeaderMap) -> bool {
    let Some(kind) = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()) else { return false };
    let kind = kind.split(';').next().unwrap_or("").trim();
    kind.eq_ignore_ascii_case("application/json")
        || (kind.len() > 17 && kind[..12].eq_ignore_ascii_case("application/") && kind.ends_with("+json"))
}

impl<T: DeserializeOwned> FromRequest<Backend> for Body<T> {
    type Rejection = Fail;

    async fn from_request(request: Request, backend: &Backend) -> Result<Self> {
        if !is_json(request.headers()) {
            return Err(Fail::new(ProblemCode::UnsupportedMediaType, "The body must be declared as application/json.")
                .hint("Send Content-Type: application/json."));
        }
        let limits = &backend.config().limits;
        let body = Limited::new(request.into_body(), limits.body_bytes);
        let bytes = tokio::time::timeout(Duration::from_secs(limits.body_seconds), body.collect())
            .await
            .map_err(|_| Fail::new(ProblemCode::RequestTimeout, "The body did not arrive in time."))?
            .map_err(|error| {
                if error.downcast_ref::<LengthLimitError>().is_some() {
                    Fail::new(ProblemCode::BodyTooLarge, format!("A body has at most {} bytes.", limits.body_bytes))
                } else {
                    Fail::new(ProblemCode::MalformedRequest, "The body ended early.")
                }
            })?
            .to_bytes();
        let value = parse(&bytes)?;
        Ok(Self { value, hash: Sha256::digest(&bytes).into() })
    }
}

/// Reads one JSON document; a failure points at the field.
pub fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T> {
    let mut reader = serde_json::Deserializer::from_slice(bytes);
    let mut track = serde_path_to_error::Track::new();
    let value = match T::deserialize(serde_path_to_error::Deserializer::new(&mut reader, &mut track)) {
        Ok(value) => value,
        Err(error) => return Err(refusal(&track.path(), &error)),
    };
    reader
        .end()
        .map_err(|error| Fail::new(ProblemCode::MalformedJson, format!("Something follows the document: {error}.")))?;
    Ok(value)
}

fn refusal(path: &serde_path_to_error::Path, error: &serde_json::Error) -> Fail {
    use serde_json::error::Category;
    let text = error.to_string();
    // serde_json appends the place in the text; the pointer says it better.
    let what = text.rsplit_once(" at line ").map_or(text.as_str(), |(what, _)| what);
    match error.classify() {
        Category::Data => {
            let mut pointer = pointer(path);
            // An unknown or missing field is named by the text alone: its path is the object's.
            for start in ["unknown field `", "missing field `", "duplicate field `"] {
                if let Some(name) = what.strip_prefix(start).and_then(|rest| rest.split('`').next()) {
                    let escaped = escape(name);
                    if !pointer.ends_with(&format!("/{escaped}")) {
                        pointer = format!("{pointer}/{escaped}");
                    }
                }
            }
            Fail::new(ProblemCode::InvalidBody, format!("The body does not fit: {what}.")).at(pointer, what)
        }
        Category::Syntax | Category::Eof | Category::Io => {
            Fail::new(ProblemCode::MalformedJson, format!("The body is not JSON: {text}."))
        }
    }
}

fn escape(segment: &str) -> String {
    segment.replace('~', "~0").replace('/', "~1")
}

fn pointer(path: &serde_path_to_error::Path) -> String {
    use serde_path_to_error::Segment;
    let mut pointer = String::new();
    for segment in path {
        pointer.push('/');
        match segment {
            Segment::Seq { index } => pointer.push_str(&index.to_string()),
            Segment::Map { key } => pointer.push_str(&escape(key)),
            Segment::Enum { variant } => pointer.push_str(&escape(variant)),
            Segment::Unknown => pointer.push('?'),
        }
    }
    pointer
}

/// A query string; a parameter the operation does not know is refused.
pub struct Query<T>(pub T);

impl<T: DeserializeOwned> FromRequestParts<Backend> for Query<T> {
    type Rejection = Fail;

    async fn from_request_parts(parts: &mut Parts, _: &Backend) -> Result<Self> {
        let text = parts.uri.query().unwrap_or("");
        serde_path_to_error::deserialize(serde_urlencoded::Deserializer::new(form_urlencoded::parse(text.as_bytes())))
            .map(Self)
            .map_err(|error| {
                let path = error.path().to_string();
                let what = error.inner().to_string();
                let named = ["unknown field `", "missing field `", "duplicate field `"]
                    .iter()
                    .find_map(|start| what.strip_prefix(start).and_then(|rest| rest.split('`').next()));
                let name = named.unwrap_or(if path == "." { "" } else { &path });
                let (code, detail) = if what.starts_with("unknown field") {
                    (ProblemCode::UnknownParameter, format!("There is no parameter {name} here."))
                } else {
                    (ProblemCode::InvalidParameter, format!("The parameter {name} is not usable: {what}."))
                };
                Fail::new(code, detail).at(format!("?{name}"), what)
            })
    }
}

/// For operations without parameters.
#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Nothing {}

/// Path parameters. One that cannot be an id of anything is the same as one that is nobody's.
pub struct Params<T>(pub T);

impl<T: DeserializeOwned + Send + 'static> FromRequestParts<Backend> for Params<T> {
    type Rejection = Fail;

    async fn from_request_parts(parts: &mut Parts, _: &Backend) -> Result<Self> {
        parts
            .extract::<axum::extract::Path<T>>()
            .await
            .map(|axum::extract::Path(value)| Self(value))
            .map_err(|_| Fail::new(ProblemCode::MalformedRequest, "The path cannot be read."))
    }
}

/// An id in a path: malformed and missing look the same.
pub fn id<T: std::str::FromStr>(text: &str, what: &str) -> Result<T> {
    text.parse().map_err(|_| Fail::not_found(what))
}

/// `Idempotency-Key`, to be bound to a body.
pub struct Idempotency {
    key: Option<String>,
    route: String,
    path: String,
}

impl FromRequestParts<Backend> for Idempotency {
    type Rejection = Fail;

    async fn from_request_parts(parts: &mut Parts, _: &Backend) -> Result<Self> {
        let mut keys = parts.headers.get_all("idempotency-key").iter();
        let key = match (keys.next(), keys.next()) {
            (None, _) => None,
            (Some(key), None) => {
                let text = key.to_str().ok().map(str::trim).map(|text| text.trim_matches('"'));
                let fits = |text: &&str| (1..=255).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_graphic());
                Some(text.filter(fits).ok_or_else(invalid_key)?.to_owned())
            }
            (Some(_), Some(_)) => return Err(invalid_key()),
        };
        let matched = parts.extensions.get::<MatchedPath>().map_or("", MatchedPath::as_str);
        let target = parts.uri.path_and_query().map_or("", |target| target.as_str());
        Ok(Self { key, route: format!("{} {matched}", parts.method), path: target.to_owned() })
    }
}

fn invalid_key() -> Fail {
    Fail::new(ProblemCode::InvalidHeader, "The Idempotency-Key is not usable.")
        .at("idempotency-key:", "one value of 1 to 255 visible ASCII characters")
}

impl Idempotency {
    /// What makes two requests the same: operation, path, query and body.
    pub fn with(self, body: &[u8; 32]) -> Option<IdempotencyKey> {
        let Self { key, route, path } = self;
        let mut hash = Sha256::new();
        hash.update(path);
        hash.update([0]);
        hash.update(body);
        key.map(|key| IdempotencyKey { route, key, request_hash: hash.finalize().into() })
    }

    /// For operations without a body.
    pub fn alone(self) -> Option<IdempotencyKey> {
        self.with(&[0; 32])
    }
}

/// The version in `If-Match`.
pub struct IfMatch(pub Option<i64>);

impl FromRequestParts<Backend> for IfMatch {
    type Rejection = Fail;

    async fn from_request_parts(parts: &mut Parts, _: &Backend) -> Result<Self> {
        let Some(value) = parts.headers.get(http::header::IF_MATCH) else { return Ok(Self(None)) };
        let text = value.to_str().unwrap_or("").trim();
        if text == "*" {
            return Ok(Self(None));
        }
        let version =
            text.strip_prefix('"').and_then(|rest| rest.strip_suffix('"')).and_then(|inner| inner.parse().ok());
        match version {
            Some(version) => Ok(Self(Some(version))),
            // An ETag that we never gave matches nothing.
            None => Err(Fail::new(ProblemCode::PreconditionFailed, "If-Match is not an ETag of this resource.")
                .at("if-match:", "give back the ETag of the resource unchanged")),
        }
    }
}

/// `Prefer: wait=N`: how long to hold the answer until the thing has happened.
pub struct Prefer(pub Option<Duration>);

/// Longest a request is held.
pub const WAIT_SECONDS_MAX: u64 = 120;

impl FromRequestParts<Backend> for Prefer {
    type Rejection = Fail;

    async fn from_request_parts(parts: &mut Parts, _: &Backend) -> Result<Self> {
        let preferences = parts.headers.get_all("prefer").iter().filter_map(|value| value.to_str().ok());
        for preference in preferences.flat_map(|value| value.split([',', ';'])) {
            let Some((name, value)) = preference.split_once('=') else { continue };
            if name.trim().eq_ignore_ascii_case("wait") {
                // RFC 7240: a preference that cannot be honoured is ignored.
                let seconds = value.trim().trim_matches('"').parse::<u64>().unwrap_or(0);
                let wait = Duration::from_secs(seconds.min(WAIT_SECONDS_MAX));
                return Ok(Self((!wait.is_zero()).then_some(wait)));
            }
        }
        Ok(Self(None))
    }
}

/// What a change may be subject to, together.
pub struct Conditions {
    pub version: Option<i64>,
    pub key: Idempotency,
    pub wait: Option<Duration>,
}

impl FromRequestParts<Backend> for Conditions {
    type Rejection = Fail;

    async fn from_request_parts(parts: &mut Parts, backend: &Backend) -> Result<Self> {
        let IfMatch(version) = IfMatch::from_request_parts(parts, backend).await?;
        let key = Idempotency::from_request_parts(parts, backend).await?;
        let Prefer(wait) = Prefer::from_request_parts(parts, backend).await?;
        Ok(Self { version, key, wait })
    }
}

impl FromRequestParts<Backend> for RequestInfo {
    type Rejection = Fail;

    async fn from_request_parts(parts: &mut Parts, _: &Backend) -> Result<Self> {
        parts
            .extensions
            .get::<Self>()
            .cloned()
            .ok_or_else(|| Fail::new(ProblemCode::Internal, "no request information"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clawhq_api_types::problem::Problem;
    use clawhq_api_types::workload::CreateWorkload;

    async fn told(bytes: &[u8]) -> (String, Vec<String>) {
        let fail = parse::<CreateWorkload>(bytes).unwrap_err();
        let response = crate::problem::finish(axum::response::IntoResponse::into_response(fail), "req_1");
        let body = response.into_body().collect().await.unwrap().to_bytes();
        let problem: Problem = serde_json::from_slice(&body).unwrap();
        (problem.code, problem.errors.into_iter().map(|error| error.pointer).collect())
    }

    #[tokio::test]
    async fn a_refusal_points_at_the_field() {
        for (body, code, at) in [
            (r#"{"name": 1}"#, "invalid_body", &["/name"][..]),
            (r#"{"nam": "x"}"#, "invalid_body", &["/nam"]),
            (
                r#"{"config": {"ports": [{"name": "a", "port": 70000, "protocol": "http"}]}}"#,
                "invalid_body",
                &["/config/ports/0/port"],
            ),
            (r#"{"config": {"ports": [{"name": "a", "port": 1}]}}"#, "invalid_body", &["/config/ports/0/protocol"]),
            (r#"{"config": {"env": {"a/b": 1}}}"#, "invalid_body", &["/config/env/a~1b"]),
            (r#"{"warm": "maybe"}"#, "invalid_body", &["/warm"]),
            (r#"[]"#, "invalid_body", &[""]),
            (r#"{"name": "a", "name": "b"}"#, "invalid_body", &["/name"]),
            (r#"{"name""#, "malformed_json", &[]),
            (r#""#, "malformed_json", &[]),
            (r#"{} {}"#, "malformed_json", &[]),
            ("{\"name\": \"\u{1}\"}", "malformed_json", &[]),
        ] {
            let (got, pointers) = told(body.as_bytes()).await;
            assert_eq!(
                (got.as_str(), pointers.as_slice()),
                (code, at.iter().map(|p| (*p).to_owned()).collect::<Vec<_>>().as_slice()),
                "{body}"
            );
        }
        assert_eq!(told(b"{\"name\": \"\xff\"}").await.0, "malformed_json");
    }

    #[test]
    fn only_json_is_json() {
        let with = |text: &'static str| HeaderMap::from_iter([(CONTENT_TYPE, http::HeaderValue::from_static(text))]);
        assert!(is_json(&with("application/json")) && is_json(&with("Application/JSON; charset=utf-8")));
        assert!(is_json(&with("application/merge-patch+json")));
        for other in ["text/plain", "application/jsonp", "application/+json", "multipart/form-data"] {
            assert!(!is_json(&with(other)), "{other}");
        }
        assert!(!is_json(&HeaderMap::new()));
    }
}
