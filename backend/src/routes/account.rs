//! Signing up, in and out; who is asking; sessions.

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use clawhq_api_types::Page;
use clawhq_api_types::account::{Me, Session, SignIn, SignUp};
use clawhq_api_types::problem::ProblemCode;
use clawhq_app::accounts;
use clawhq_app::model::SignedIn;
use clawhq_domain::names::Email;
use http::header::{SET_COOKIE, USER_AGENT};
use http::{HeaderMap, StatusCode};
use serde::Deserialize;
use utoipa::IntoParams;
use zeroize::Zeroizing;

use super::Paging;
use crate::auth::{Caller, NotCrossOrigin, clear_cookie, set_cookie};
use crate::convert;
use crate::envelope::RequestInfo;
use crate::extract::{Body, Nothing, Params, Query, id};
use crate::problem::{Fail, Result};
use crate::state::Backend;

/// Longer passwords would only cost hashing time.
const PASSWORD_MAX: usize = 128;

fn user_agent(headers: &HeaderMap) -> Option<String> {
    let text = headers.get(USER_AGENT)?.to_str().ok()?;
    Some(text.chars().filter(|c| !c.is_control()).take(255).collect())
}

fn signed_in(backend: &Backend, status: StatusCode, signed_in: SignedIn) -> Response {
    let now = chrono::Utc::now().timestamp_millis();
    let seconds = (signed_in.expires_at - now).max(0) / 1000;
    let cookie = set_cookie(backend.config().is_https(), &signed_in.token, seconds);
    let me = convert::me((signed_in.user, signed_in.orgs));
    (status, [(SET_COOKIE, cookie)], Json(me)).into_response()
}

fn too_long() -> Fail {
    Fail::new(ProblemCode::InvalidBody, "The password is too long.").at("/password", "must be at most 128 characters")
}

/// Create an account
///
/// Makes a person with an org of their own and signs them in: the answer sets the session cookie.
#[utoipa::path(post, path = "/auth/sign-up", operation_id = "signUp", tag = "Account", security(()), request_body = SignUp,
    responses((status = CREATED, description = "Signed up and signed in", body = Me, headers(("Set-Cookie" = String, description = "The session")))))]
pub async fn sign_up(
    State(backend): State<Backend>,
    _: NotCrossOrigin,
    info: RequestInfo,
    Query(Nothing {}): Query<Nothing>,
    headers: HeaderMap,
    body: Body<SignUp>,
) -> Result<Response> {
    backend.limits().sign_up(info.ip, backend.config().limits.sign_up_per_minute)?;
    let SignUp { email, password, org_name } = body.value;
    let password = Zeroizing::new(password);
    let email = convert::named(Email::parse(email.trim()), ProblemCode::InvalidBody, "/email")?;
    if password.chars().count() > PASSWORD_MAX {
        return Err(too_long());
    }
    let ask = accounts::SignUp { email, password, org_name, user_agent: user_agent(&headers) };
    let made = backend.app().sign_up(ask, info.origin()).await?;
    Ok(signed_in(&backend, StatusCode::CREATED, made))
}

/// Sign in
///
/// The answer sets the session cookie. Programs use an API key instead.
#[utoipa::path(post, path = "/auth/sign-in", operation_id = "signIn", tag = "Account", security(()), request_body = SignIn,
    responses((status = OK, description = "Signed in", body = Me, headers(("Set-Cookie" = String, description = "The session")))))]
pub async fn sign_in(
    State(backend): State<Backend>,
    _: NotCrossOrigin,
    info: RequestInfo,
    Query(Nothing {}): Query<Nothing>,
    headers: HeaderMap,
    body: Body<SignIn>,
) -> Result<Response> {
    let SignIn { email, password } = body.value;
    let password = Zeroizing::new(password);
    if password.chars().count() > PASSWORD_MAX {
        return Err(too_long());
    }
    let email = email.trim();
    if email.len() > 254 {
        return Err(Fail::new(ProblemCode::InvalidCredentials, "E-mail or password is wrong."));
    }
    backend.limits().sign_in(email, info.ip, backend.config().limits.sign_in_per_minute)?;
    let made = backend.app().sign_in(email, password, user_agent(&headers), info.origin()).await?;
    Ok(signed_in(&backend, StatusCode::OK, made))
}

/// Sign out
///
/// Ends this session. Signing out twice is fine.
#[utoipa::path(post, path = "/auth/sign-out", operation_id = "signOut", tag = "Account",
    responses((status = NO_CONTENT, description = "Signed out")))]
pub async fn sign_out(
    State(backend): State<Backend>,
    caller: Caller,
    Query(Nothing {}): Query<Nothing>,
) -> Result<Response> {
    backend.app().sign_out(&caller.credential).await?;
    Ok((StatusCode::NO_CONTENT, [(SET_COOKIE, clear_cookie(backend.config().is_https()))]).into_response())
}

/// Who is asking
///
/// The signed-in person and the orgs they belong to. An API key belongs to an org and not to a person, and is refused.
#[utoipa::path(get, path = "/me", operation_id = "getMe", tag = "Account", security(("session" = [])),
    responses((status = OK, description = "The person", body = Me)))]
pub async fn me(State(backend): State<Backend>, caller: Caller, Query(Nothing {}): Query<Nothing>) -> Result<Json<Me>> {
    Ok(Json(convert::me(backend.app().me(&caller.credential).await?)))
}

/// List sessions
///
/// Where this person is signed in.
#[utoipa::path(get, path = "/me/sessions", operation_id = "listSessions", tag = "Account", security(("session" = [])), params(Paging),
    responses((status = OK, description = "Sessions, newest first", body = Page<Session>)))]
pub async fn sessions(
    State(backend): State<Backend>,
    caller: Caller,
    Query(paging): Query<Paging>,
) -> Result<Json<Page<Session>>> {
    paging.whole()?;
    let sessions = backend.app().sessions(&caller.credential).await?;
    Ok(Json(Page::whole(sessions.into_iter().map(convert::session).collect())))
}

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Path)]
pub struct SessionPath {
    /// The session's id.
    #[param(example = "ses_01k2m3n4p5q6r7s8t9v0w1x2y3")]
    pub session: String,
}

/// Revoke a session
///
/// It stops working at once, everywhere.
#[utoipa::path(delete, path = "/me/sessions/{session}", operation_id = "revokeSession", tag = "Account", security(("session" = [])), params(SessionPath),
    responses((status = NO_CONTENT, description = "Revoked")))]
pub async fn revoke_session(
    State(backend): State<Backend>,
    caller: Caller,
    Params(path): Params<SessionPath>,
    Query(Nothing {}): Query<Nothing>,
) -> Result<StatusCode> {
    backend.app().revoke_session(&caller.credential, id(&path.session, "session")?).await?;
    Ok(StatusCode::NO_CONTENT)
}
