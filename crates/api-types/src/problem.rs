//! RFC 9457 problem documents, and every code one may carry.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What went wrong with one part of the request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FieldProblem {
    /// JSON Pointer into the body; for a query parameter or a header `?name` and `name:`.
    #[schema(example = "/config/ports/0/port")]
    pub pointer: String,
    #[schema(example = "must be from 1 to 65535")]
    pub detail: String,
}

/// Every answer of 400 and above.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Problem {
    /// Relative address of the code's documentation.
    #[schema(format = "uri-reference", example = "/v1/problems/tier_too_small")]
    pub r#type: String,
    #[schema(example = "The tier is too small")]
    pub title: String,
    #[schema(minimum = 400, maximum = 599, example = 422)]
    pub status: u16,
    /// Stable; match on this. See `/v1/problems`.
    #[schema(example = "tier_too_small")]
    pub code: String,
    /// What happened this time, for a person.
    #[schema(example = "This needs 800 MiB of memory; free allows 256 MiB.")]
    pub detail: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(example = "The least tier that fits is business.")]
    pub hint: Option<String>,
    /// The parts of the request that were refused.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub errors: Vec<FieldProblem>,
    /// Give it to support; it is in the `X-Request-Id` header too.
    #[schema(example = "req_01k2m3n4p5q6r7s8t9v0w1x2y3")]
    pub request_id: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub retry_after_ms: Option<u64>,
}

/// A code's documentation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ProblemDoc {
    #[schema(example = "tier_too_small")]
    pub code: String,
    #[schema(example = 422)]
    pub status: u16,
    pub title: String,
    pub docs: String,
    /// The same request can succeed later without anybody changing anything.
    pub retryable: bool,
}

macro_rules! codes {
    ($($(#[$doc:meta])* $name:ident = $code:literal, $status:literal, $title:literal, $docs:literal;)+) => {
        /// Why a request was refused or failed.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum ProblemCode {
            $($(#[$doc])* $name,)+
        }

        impl ProblemCode {
            pub const ALL: &'static [Self] = &[$(Self::$name,)+];

            /// The stable text of it.
            pub const fn code(self) -> &'static str {
                match self { $(Self::$name => $code,)+ }
            }

            pub const fn status(self) -> u16 {
                match self { $(Self::$name => $status,)+ }
            }

            pub const fn title(self) -> &'static str {
                match self { $(Self::$name => $title,)+ }
            }

            /// What it means and what to do, for people.
            pub const fn docs(self) -> &'static str {
                match self { $(Self::$name => $docs,)+ }
            }
        }
    };
}

codes! {
    MalformedRequest = "malformed_request", 400, "The request cannot be read",
        "The HTTP request itself is not well-formed: a header, the path or the encoding.";
    MalformedJson = "malformed_json", 400, "The body is not JSON",
        "The body must be one JSON document in UTF-8. The detail says where reading stopped.";
    UnknownParameter = "unknown_parameter", 400, "Unknown query parameter",
        "The operation does not know this query parameter; a misspelt filter would silently answer too much.";
    InvalidParameter = "invalid_parameter", 400, "A query parameter is not usable",
        "The value of a query parameter does not parse or is out of bounds. errors names it as ?name.";
    InvalidHeader = "invalid_header", 400, "A header is not usable",
        "A request header does not parse. errors names it.";
    InvalidCursor = "invalid_cursor", 400, "The cursor is not usable",
        "Cursors are opaque: give back next_cursor of the same list, unchanged, or leave it out.";
    Unauthenticated = "unauthenticated", 401, "Sign-in needed",
        "Send a session cookie or Authorization: Bearer <API key>. A key may be wrong, revoked or expired.";
    InvalidCredentials = "invalid_credentials", 401, "E-mail or password is wrong",
        "There is no account with this e-mail address and this password.";
    Forbidden = "forbidden", 403, "Not allowed",
        "The caller's role in this org does not allow this. An owner can do it, or can change the role.";
    CrossOrigin = "cross_origin", 403, "Request of another site",
        "A change authenticated by cookie must come from the console's own origin. Programs use an API key instead.";
    SignUpClosed = "sign_up_closed", 403, "Sign-up is closed",
        "New accounts are made by the operator of this installation.";
    NotFound = "not_found", 404, "Not found",
        "There is no such thing, or it belongs to an org the caller is no member of; the two look the same.";
    RouteNotFound = "route_not_found", 404, "No such operation",
        "The path is not part of the API. GET /v1/openapi.json lists what is.";
    MethodNotAllowed = "method_not_allowed", 405, "Method not allowed",
        "The path exists, but not with this method. The Allow header lists the methods it has.";
    RequestTimeout = "request_timeout", 408, "The request came too slowly",
        "The whole request did not arrive in time.";
    NameTaken = "name_taken", 409, "The name is taken",
        "Names are unique: an org's among all orgs, a workload's or key's within its org. Choose another.";
    EmailTaken = "email_taken", 409, "The e-mail address has an account",
        "Sign in instead.";
    AlreadyMember = "already_member", 409, "Already a member",
        "This person is a member of the org.";
    LastOwner = "last_owner", 409, "An org needs an owner",
        "The last owner cannot leave or become a member. Make somebody else an owner first.";
    InUse = "in_use", 409, "It is in use",
        "Something still refers to it. The detail says what; change or delete that first.";
    NotRunning = "not_running", 409, "The workload is not running",
        "This needs a running container. Start the workload and wait for state running.";
    Deleting = "deleting", 409, "The workload is being deleted",
        "A workload that is being deleted cannot change any more.";
    QuotaExceeded = "quota_exceeded", 409, "The tier's limit is reached",
        "The org has as many of these as its tier allows. Delete some, or move to a larger tier.";
    NoWarmSlot = "no_warm_slot", 409, "No warm slot is ready",
        "warm was require and the pool has no slot of this template and tier just now. Try again shortly, or use prefer.";
    IdempotencyInProgress = "idempotency_in_progress", 409, "The first request is still running",
        "A request with this Idempotency-Key is being worked on. Repeat it after Retry-After.";
    PreconditionFailed = "precondition_failed", 412, "It was changed meanwhile",
        "If-Match names another version than the current one. Read it again, and decide anew.";
    BodyTooLarge = "body_too_large", 413, "The body is too large",
        "Bodies are limited to 1 MiB unless the operation says otherwise.";
    UnsupportedMediaType = "unsupported_media_type", 415, "The body is not declared as JSON",
        "Send Content-Type: application/json.";
    InvalidBody = "invalid_body", 422, "The body does not fit",
        "A field is unknown, missing, of the wrong type or out of bounds. errors points at each.";
    ConfigInvalid = "config_invalid", 422, "The config is not usable",
        "A value of the workload's config is out of bounds or contradicts another. detail and hint say which.";
    NameInvalid = "name_invalid", 422, "The name is not usable",
        "A name breaks its rules. errors points at it and says which.";
    PasswordWeak = "password_weak", 422, "The password is too easy to guess",
        "Choose a longer one; any characters are fine.";
    SecretInvalid = "secret_invalid", 422, "The secret's value is not usable",
        "A secret is 1 byte to 64 KiB of text without zero bytes.";
    UserUnknown = "user_unknown", 422, "Nobody has this e-mail address",
        "Members are added by the address they signed up with.";
    TemplateUnknown = "template_unknown", 422, "No such template",
        "GET /v1/templates lists what can be deployed.";
    TemplateUnavailable = "template_unavailable", 422, "The template cannot be deployed here",
        "The template is listed, but this installation lacks something it needs. The detail says what.";
    ImageInvalid = "image_invalid", 422, "The image reference is not usable",
        "Give an OCI reference: [host/]path[:tag][@sha256:digest], at most 255 characters.";
    SecretUnknown = "secret_unknown", 422, "No such secret",
        "The config names a secret the org does not have. Set it first.";
    TierUnknown = "tier_unknown", 422, "No such tier",
        "GET /v1/tiers lists the tiers.";
    TierNotIncluded = "tier_not_included", 422, "The tier is above the org's",
        "A workload's tier is at most its org's. Choose a lower one, or move the org up.";
    TierTooSmall = "tier_too_small", 422, "The tier is too small",
        "The template needs more memory than the tier allows. The hint names the least tier that fits.";
    IdempotencyKeyReused = "idempotency_key_reused", 422, "The Idempotency-Key was used for another request",
        "A key belongs to one request. Use a new one for a new request.";
    Refused = "refused", 422, "Refused",
        "The request is well-formed and cannot be done as it is. The detail says why.";
    RateLimited = "rate_limited", 429, "Too many requests",
        "Wait for Retry-After. The RateLimit header tells how much is left.";
    TooManyStreams = "too_many_streams", 429, "Too many open streams",
        "Each org may hold a limited number of log, event, exec and terminal streams. Close some.";
    Internal = "internal", 500, "Something broke on our side",
        "It was logged with the request's id. What was asked for may or may not have happened: repeat it with the same Idempotency-Key.";
    NodeUnreachable = "node_unreachable", 502, "The node does not answer",
        "The host that runs the workload is not connected just now. The workload itself may be fine.";
    Unavailable = "unavailable", 503, "Not available just now",
        "A part the request needs does not answer. Repeat it, with the same Idempotency-Key, after Retry-After.";
    Timeout = "timeout", 504, "It took too long",
        "The deadline passed. What was asked for may still happen: look, or repeat it with the same Idempotency-Key.";
}

impl ProblemCode {
    /// The code of a text such as a domain reason carries.
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|code| code.code() == text)
    }

    /// Whether the same request can succeed later without anybody changing anything.
    pub const fn retryable(self) -> bool {
        matches!(
            self,
            Self::RequestTimeout
                | Self::NoWarmSlot
                | Self::IdempotencyInProgress
                | Self::RateLimited
                | Self::TooManyStreams
                | Self::Internal
                | Self::NodeUnreachable
                | Self::Unavailable
                | Self::Timeout
        )
    }

    /// Relative address of its documentation.
    pub fn docs_url(self) -> String {
        format!("/v1/problems/{}", self.code())
    }

    pub fn doc(self) -> ProblemDoc {
        ProblemDoc {
            code: self.code().to_owned(),
            status: self.status(),
            title: self.title().to_owned(),
            docs: self.docs().to_owned(),
            retryable: self.retryable(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_distinct_and_read_back() {
        for code in ProblemCode::ALL {
            assert_eq!(ProblemCode::parse(code.code()), Some(*code), "{} is given twice", code.code());
            assert!((400..=599).contains(&code.status()), "{}", code.code());
            assert!(code.docs().ends_with('.'), "{}", code.code());
            assert!(code.code().bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_'), "{}", code.code());
        }
    }
}
