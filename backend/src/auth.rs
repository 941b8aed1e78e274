//! Who asks: a session cookie or an API key, and the proof that they belong to the org in the path.

use std::ops::Deref;

use axum::extract::{FromRequestParts, RawPathParams};
use clawhq_api_types::problem::ProblemCode;
use clawhq_app::caller::{Credential, OrgContext, Origin, Who};
use http::header::{AUTHORIZATION, COOKIE, HOST, ORIGIN};
use http::request::Parts;
use http::{HeaderMap, HeaderValue, Method};

use crate::envelope::RequestInfo;
use crate::problem::{Fail, Result};
use crate::state::Backend;

const COOKIE_NAME: &str = "clawhq_session";
/// Over TLS: the prefix makes the browser refuse the cookie from any other host or path.
const SECURE_COOKIE_NAME: &str = "__Host-clawhq_session";
/// Longer is no credential of ours.
const CREDENTIAL_MAX: usize = 256;

pub fn cookie_name(https: bool) -> &'static str {
    if https { SECURE_COOKIE_NAME } else { COOKIE_NAME }
}

/// The cookie of a new session.
pub fn set_cookie(https: bool, token: &str, seconds: i64) -> HeaderValue {
    let secure = if https { "; Secure" } else { "" };
    let name = cookie_name(https);
    HeaderValue::try_from(format!("{name}={token}; Path=/; HttpOnly; SameSite=Lax; Max-Age={seconds}{secure}"))
        .unwrap_or_else(|_| HeaderValue::from_static(""))
}

/// Takes the cookie away.
pub fn clear_cookie(https: bool) -> HeaderValue {
    set_cookie(https, "", 0)
}

fn cookie<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers
        .get_all(COOKIE)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(';'))
        .filter_map(|pair| pair.trim().split_once('='))
        .find(|(key, value)| *key == name && !value.is_empty())
        .map(|(_, value)| value)
}

/// Whether a browser sent it from a page of this very host, or `None` when no browser says where it comes from.
pub fn same_origin(headers: &HeaderMap) -> Option<bool> {
    if let Some(site) = headers.get("sec-fetch-site") {
        return Some(site.as_bytes() == b"same-origin");
    }
    let origin = headers.get(ORIGIN)?;
    let origin = origin.to_str().ok().and_then(|origin| origin.split_once("://")).map(|(_, host)| host);
    let host = headers.get(HOST).and_then(|host| host.to_str().ok());
    Some(origin.is_some() && origin == host)
}

fn cross_origin() -> Fail {
    Fail::new(ProblemCode::CrossOrigin, "The request did not come from the console's own page.")
        .hint("Programs authenticate by Authorization: Bearer instead of a cookie.")
}

/// A credential that was sent. Nothing is looked up yet.
pub struct Caller {
    pub credential: Credential,
}

impl Caller {
    fn of(parts: &Parts, https: bool) -> Result<Self> {
        let mut authorizations = parts.headers.get_all(AUTHORIZATION).iter();
        if let Some(value) = authorizations.next() {
            let text = value.to_str().unwrap_or("");
            let (scheme, key) = text.split_once(' ').unwrap_or((text, ""));
            let key = key.trim();
            if authorizations.next().is_some()
                || !scheme.eq_ignore_ascii_case("bearer")
                || key.is_empty()
                || key.len() > CREDENTIAL_MAX
            {
                return Err(Fail::unauthenticated());
            }
            return Ok(Self { credential: Credential::ApiKey(key.to_owned()) });
        }
        let token = cookie(&parts.headers, cookie_name(https)).filter(|token| token.len() <= CREDENTIAL_MAX);
        let token = token.ok_or_else(Fail::unauthenticated)?;
        let reads = matches!(parts.method, Method::GET | Method::HEAD | Method::OPTIONS);
        if !reads && same_origin(&parts.headers) != Some(true) {
            return Err(cross_origin());
        }
        Ok(Self { credential: Credential::Session(token.to_owned()) })
    }
}

impl FromRequestParts<Backend> for Caller {
    type Rejection = Fail;

    async fn from_request_parts(parts: &mut Parts, backend: &Backend) -> Result<Self> {
        Self::of(parts, backend.config().is_https())
    }
}

/// For sign-up and sign-in, which need no credential: a page of another site may not sign its visitor in.
pub struct NotCrossOrigin;

impl FromRequestParts<Backend> for NotCrossOrigin {
    type Rejection = Fail;

    async fn from_request_parts(parts: &mut Parts, _: &Backend) -> Result<Self> {
        if same_origin(&parts.headers) == Some(false) { Err(cross_origin()) } else { Ok(Self) }
    }
}

/// The org of the path, and that the caller belongs to it.
pub struct Org {
    pub context: OrgContext,
    pub credential: Credential,
}

impl Deref for Org {
    type Target = OrgContext;

    fn deref(&self) -> &OrgContext {
        &self.context
    }
}

impl FromRequestParts<Backend> for Org {
    type Rejection = Fail;

    async fn from_request_parts(parts: &mut Parts, backend: &Backend) -> Result<Self> {
        let caller = Caller::from_request_parts(parts, backend).await?;
        let info = RequestInfo::from_request_parts(parts, backend).await?;
        let params = RawPathParams::from_request_parts(parts, backend)
            .await
            .map_err(|_| Fail::new(ProblemCode::MalformedRequest, "The path cannot be read."))?;
        let name = params.iter().find(|(key, _)| *key == "org").map_or("", |(_, value)| value).to_owned();
        let context = backend.app().enter(&caller.credential, &name, info.origin()).await?;
        // By org for its programs, by person for browsers: a console that polls must not use up the org's rate.
        let left = match context.who {
            Who::ApiKey { .. } => backend.limits().org(context.org, context.rate_per_min)?,
            Who::Session { user, .. } => backend.limits().session(user)?,
        };
        info.note_limit(left);
        Ok(Self { context, credential: caller.credential })
    }
}

impl RequestInfo {
    pub fn origin(&self) -> Origin {
        Origin { request: self.id, ip: self.ip }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        pairs.iter().map(|(k, v)| (http::HeaderName::from_static(k), HeaderValue::from_static(v))).collect()
    }

    #[test]
    fn origins_are_compared_whole() {
        for (pairs, expected) in [
            (&[("sec-fetch-site", "same-origin")][..], Some(true)),
            (&[("sec-fetch-site", "same-site"), ("origin", "http://a"), ("host", "a")], Some(false)),
            (&[("sec-fetch-site", "cross-site")], Some(false)),
            (&[("sec-fetch-site", "none")], Some(false)),
            (&[("origin", "http://localhost:4180"), ("host", "localhost:4180")], Some(true)),
            (&[("origin", "http://localhost:4181"), ("host", "localhost:4180")], Some(false)),
            (&[("origin", "http://x.localhost:4180"), ("host", "localhost:4180")], Some(false)),
            (&[("origin", "null"), ("host", "localhost:4180")], Some(false)),
            (&[("host", "localhost:4180")], None),
        ] {
            assert_eq!(same_origin(&headers(pairs)), expected, "{pairs:?}");
        }
    }

    #[test]
    fn a_cookie_is_found_by_its_whole_name() {
        let found =
            cookie(&headers(&[("cookie", "x_clawhq_session=1; clawhq_session=abc; clawhq_session2=3")]), COOKIE_NAME)
                .map(str::to_owned);
        assert_eq!(found.as_deref(), Some("abc"));
        assert!(cookie(&headers(&[("cookie", "clawhq_session=")]), COOKIE_NAME).is_none());
    }
}
