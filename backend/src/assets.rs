//! The console's files, the API's documentation pages, and what to say to programs that ask for a page.

use axum::extract::{Request, State};
use axum::response::{IntoResponse, Redirect, Response};
use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use http::header::{
    ACCEPT, ACCEPT_ENCODING, CACHE_CONTROL, CONTENT_ENCODING, CONTENT_SECURITY_POLICY, CONTENT_TYPE, COOKIE, ETAG,
    IF_NONE_MATCH, USER_AGENT, VARY,
};
use http::{HeaderMap, HeaderValue, Method, StatusCode};

use crate::auth::cookie_name;
use crate::state::Backend;

const FOREVER: &str = "public, max-age=31536000, immutable";
const SHORTLY: &str = "public, max-age=300";
const NONCE: &str = "__CSP_NONCE__";

/// Whatever no route took: the console's files and screens.
pub async fn fallback(State(backend): State<Backend>, request: Request) -> Response {
    let path = request.uri().path();
    if path.starts_with("/v1/") || path == "/v1" {
        return StatusCode::NOT_FOUND.into_response();
    }
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        return StatusCode::NOT_FOUND.into_response();
    }
    let relative = path.trim_start_matches('/');
    if let Some(kind) = kind(relative).filter(|_| relative != "index.html") {
        // A file that is not there is not there: a screen in its place would be read as a script or a picture.
        return file(relative, kind, request.headers());
    }
    screen(&backend, request.uri(), request.headers())
}

/// What the name's ending says; names without a known ending are screens.
fn kind(path: &str) -> Option<&'static str> {
    let (_, ending) = path.rsplit('/').next()?.rsplit_once('.')?;
    Some(match ending {
        "js" | "mjs" => "text/javascript; charset=utf-8",
        "css" => "text/css; charset=utf-8",
        "html" => "text/html; charset=utf-8",
        "svg" => "image/svg+xml",
        "png" => "image/png",
        "webp" => "image/webp",
        "ico" => "image/x-icon",
        "woff2" => "font/woff2",
        "json" | "map" => "application/json",
        "webmanifest" => "application/manifest+json",
        "txt" => "text/plain; charset=utf-8",
        "wasm" => "application/wasm",
        "xml" => "application/xml",
        _ => return None,
    })
}

fn accepts(headers: &HeaderMap, encoding: &str) -> bool {
    headers
        .get_all(ACCEPT_ENCODING)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .any(|one| {
            let (name, weight) = one.split_once(';').unwrap_or((one, ""));
            let refused = weight.trim().strip_prefix("q=").is_some_and(|q| q.trim().parse::<f32>() == Ok(0.0));
            name.trim().eq_ignore_ascii_case(encoding) && !refused
        })
}

fn file(path: &str, kind: &'static str, headers: &HeaderMap) -> Response {
    if path.ends_with(".br") || path.ends_with(".gz") {
        return StatusCode::NOT_FOUND.into_response();
    }
    let twins = [("br", "br"), ("gzip", "gz")];
    let encoded = twins
        .into_iter()
        .filter(|(encoding, _)| accepts(headers, encoding))
        .find_map(|(encoding, ending)| Some((clawhq_console::file(&format!("{path}.{ending}"))?, encoding)));
    let (found, encoding) = match encoded {
        Some((found, encoding)) => (found, Some(encoding)),
        None => match clawhq_console::file(path) {
            Some(found) => (found, None),
            None => return own(path).unwrap_or_else(|| StatusCode::NOT_FOUND.into_response()),
        },
    };
    let tag = HeaderValue::try_from(format!("\"{}\"", hex::encode(&found.hash[..12])));
    let mut answer = HeaderMap::new();
    answer.insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    let hashed = path.starts_with("assets/");
    answer.insert(CACHE_CONTROL, HeaderValue::from_static(if hashed { FOREVER } else { SHORTLY }));
    answer.insert(VARY, HeaderValue::from_static("accept-encoding"));
    if let Some(encoding) = encoding {
        answer.insert(CONTENT_ENCODING, HeaderValue::from_static(encoding));
    }
    if let Ok(tag) = tag {
        if headers.get(IF_NONE_MATCH).is_some_and(|known| *known == tag) {
            answer.insert(ETAG, tag);
            return (StatusCode::NOT_MODIFIED, answer).into_response();
        }
        answer.insert(ETAG, tag);
    }
    (answer, found.bytes.into_owned()).into_response()
}

/// Files that must be there whether or not the console is.
fn own(path: &str) -> Option<Response> {
    let text = match path {
        "robots.txt" => "User-agent: *\nDisallow: /v1/\n",
        "llms.txt" => LLMS,
        _ => return None,
    };
    let headers = [(CONTENT_TYPE, "text/plain; charset=utf-8"), (CACHE_CONTROL, SHORTLY)];
    Some((headers, text).into_response())
}

const LLMS: &str = "# ClawHQ\n\n> Hosting for AI agents: isolated containers that are yours within milliseconds.\n\n\
    - [OpenAPI 3.1](/v1/openapi.json): every operation\n- [Documentation](/docs/): the same, to read and try\n\
    - [Problem codes](/v1/problems): every error and what to do\n\n\
    Authenticate with `Authorization: Bearer <API key>`. Repeat a POST safely with the same `Idempotency-Key`.\n";

/// A screen of the console for browsers; a few words in Markdown for programs that are not signed in.
fn screen(backend: &Backend, uri: &http::Uri, headers: &HeaderMap) -> Response {
    if !wants_page(headers) && !signed_in(backend, headers) {
        let text = markdown(&backend.config().public_url, uri.path());
        let headers =
            [(CONTENT_TYPE, "text/markdown; charset=utf-8"), (CACHE_CONTROL, "no-store"), (VARY, "accept, cookie")];
        return (StatusCode::OK, headers, text).into_response();
    }
    let Some(index) = clawhq_console::file("index.html") else {
        let text = "The console is not part of this build. Its source is in web/: npm ci && npm run build. The API is at /docs.\n";
        return (StatusCode::SERVICE_UNAVAILABLE, [(CONTENT_TYPE, "text/plain; charset=utf-8")], text).into_response();
    };
    let nonce = BASE64_URL_SAFE_NO_PAD.encode(rand::random::<[u8; 18]>());
    let page = String::from_utf8_lossy(&index.bytes).replace(NONCE, &nonce);
    let policy = format!(
        "default-src 'self'; script-src 'self'; style-src 'self' 'nonce-{nonce}'; img-src 'self' data:; connect-src 'self'; \
         font-src 'self'; frame-ancestors 'none'; base-uri 'none'; object-src 'none'; form-action 'self'; \
         require-trusted-types-for 'script'"
    );
    let mut response =
        ([(CONTENT_TYPE, "text/html; charset=utf-8"), (CACHE_CONTROL, "no-store")], page).into_response();
    if let Ok(policy) = HeaderValue::try_from(policy) {
        response.headers_mut().insert(CONTENT_SECURITY_POLICY, policy);
    }
    secure(response.headers_mut(), backend.config().is_https());
    response
}

fn secure(headers: &mut HeaderMap, https: bool) {
    headers.insert("cross-origin-opener-policy", HeaderValue::from_static("same-origin"));
    headers.insert("permissions-policy", HeaderValue::from_static("camera=(), geolocation=(), microphone=()"));
    if https {
        headers.insert("strict-transport-security", HeaderValue::from_static("max-age=63072000; includeSubDomains"));
    }
}

/// Browsers ask for HTML when they navigate; programs ask for anything or for something else.
fn wants_page(headers: &HeaderMap) -> bool {
    let accept = headers.get(ACCEPT).and_then(|value| value.to_str().ok()).unwrap_or("");
    let agent = headers.get(USER_AGENT).and_then(|value| value.to_str().ok()).unwrap_or("");
    accept.contains("text/html")
        || headers.contains_key("sec-fetch-dest")
        || accept.is_empty() && agent.starts_with("Mozilla/")
}

fn signed_in(backend: &Backend, headers: &HeaderMap) -> bool {
    let name = cookie_name(backend.config().is_https());
    headers
        .get_all(COOKIE)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .any(|value| value.split(';').any(|pair| pair.trim().split_once('=').is_some_and(|(key, _)| key == name)))
}

fn markdown(url: &str, path: &str) -> String {
    // The path is the visitor's text: only what cannot end the code span is repeated.
    let plain: String = path.chars().filter(|c| c.is_ascii_alphanumeric() || "/-_.".contains(*c)).take(200).collect();
    format!(
        "# ClawHQ\n\n`{plain}` is a screen of the console and needs a signed-in browser. The same facts by the API:\n\n\
         ```sh\ncurl -H 'Authorization: Bearer $CLAWHQ_API_KEY' {url}/v1/orgs/<org>/workloads\n\
         curl -H 'Authorization: Bearer $CLAWHQ_API_KEY' '{url}/v1/orgs/<org>/workloads/<name>/logs?since=30m'\n```\n\n\
         - Every operation: {url}/v1/openapi.json\n- To read: {url}/docs/\n- Problem codes: {url}/v1/problems\n\n\
         An owner makes API keys on the console's \"API keys\" screen.\n"
    )
}

/// The documentation's own pages need inline styles and nothing from elsewhere.
pub async fn docs_headers(request: Request, next: axum::middleware::Next) -> Response {
    let mut response = next.run(request).await;
    response.headers_mut().insert(
        CONTENT_SECURITY_POLICY,
        HeaderValue::from_static(
            "default-src 'self'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; \
             frame-ancestors 'none'; base-uri 'none'; object-src 'none'",
        ),
    );
    response.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static(SHORTLY));
    response
}

/// `/openapi.json` is where many tools look.
pub async fn openapi_moved() -> Redirect {
    Redirect::permanent("/v1/openapi.json")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        pairs.iter().map(|(k, v)| (http::HeaderName::from_static(k), HeaderValue::from_static(v))).collect()
    }

    #[test]
    fn encodings_are_taken_at_their_word() {
        assert!(accepts(&headers(&[("accept-encoding", "gzip, br;q=0.9")]), "br"));
        assert!(!accepts(&headers(&[("accept-encoding", "gzip, br;q=0")]), "br"));
        assert!(!accepts(&headers(&[("accept-encoding", "brotli")]), "br"));
        assert!(!accepts(&headers(&[]), "gzip"));
    }

    #[test]
    fn a_browser_gets_a_page_and_a_program_words() {
        assert!(wants_page(&headers(&[("accept", "text/html,application/xhtml+xml")])));
        assert!(!wants_page(&headers(&[("accept", "*/*"), ("user-agent", "curl/8")])));
        assert!(!wants_page(&headers(&[("user-agent", "python")])));
        assert!(!markdown("http://x", "/`rm -rf`\n# hi").contains("`rm"));
    }

    #[tokio::test]
    async fn a_missing_asset_is_never_a_screen() {
        for path in ["assets/none-123.js", "favicon-none.ico", "none.css", "assets/index.js.br"] {
            let kind = kind(path).unwrap_or("text/plain");
            assert_eq!(file(path, kind, &HeaderMap::new()).status(), StatusCode::NOT_FOUND, "{path}");
        }
        assert_eq!(kind("orgs/ada/workloads/v1.2-agent"), None, "a screen");
        for path in ["robots.txt", "llms.txt"] {
            let response = file(path, "text/plain; charset=utf-8", &HeaderMap::new());
            assert_eq!(response.status(), StatusCode::OK);
        }
    }
}
