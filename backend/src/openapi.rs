//! The API's router and its description, made of the same list, so that neither can have what the other lacks.

use std::sync::OnceLock;

use clawhq_api_types::problem::{Problem, ProblemCode, ProblemDoc};
use utoipa::OpenApi as _;
use utoipa::openapi::path::{HttpMethod, Operation, PathItem};
use utoipa::openapi::security::{ApiKey, ApiKeyValue, Http, HttpAuthScheme, SecurityScheme};
use utoipa::openapi::{ContentBuilder, OpenApi, Ref, RefOr, ResponseBuilder};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::routes::{account, catalogue, events, exec, logs, orgs, secrets, system, terminal, workloads};
use crate::state::Backend;

#[derive(utoipa::OpenApi)]
#[openapi(
    info(
        title = "ClawHQ",
        version = "1",
        description = "Hosting for AI agents: isolated containers that are yours within milliseconds.\n\n\
            Programs send `Authorization: Bearer chq_…` with an API key of an org; browsers send the session cookie, and \
            changes must then come from the console's own origin. Every failure is a problem document (RFC 9457) with a \
            stable `code`; `/v1/problems` lists them. Lists are read page by page with `cursor`. Every answer has \
            `X-Request-Id`. Enums are open: accept values you do not know.",
        license(name = "Proprietary", identifier = "LicenseRef-Proprietary"),
    ),
    servers((url = "/", description = "This installation")),
    tags(
        (name = "Account", description = "Signing up, in and out; sessions."),
        (name = "Orgs", description = "Orgs, members, API keys."),
        (name = "Catalogue", description = "What can be deployed, within which limits."),
        (name = "Workloads", description = "Deploying, looking, changing, starting, stopping, deleting."),
        (name = "Inside", description = "Output, commands and terminals of a workload."),
        (name = "Events", description = "What happened, as a list and as a stream."),
        (name = "Secrets", description = "Set and named, never read back."),
        (name = "System", description = "Health, and the API's own description."),
    ),
    components(schemas(Problem, ProblemDoc)),
    security(("session" = []), ("api_key" = [])),
)]
struct Document;

/// Every operation.
pub(crate) fn router() -> OpenApiRouter<Backend> {
    let v1 = OpenApiRouter::new()
        .routes(routes!(account::sign_up))
        .routes(routes!(account::sign_in))
        .routes(routes!(account::sign_out))
        .routes(routes!(account::me))
        .routes(routes!(account::sessions))
        .routes(routes!(account::revoke_session))
        .routes(routes!(orgs::list, orgs::create))
        .routes(routes!(orgs::get, orgs::update))
        .routes(routes!(orgs::members, orgs::add_member))
        .routes(routes!(orgs::remove_member))
        .routes(routes!(orgs::api_keys, orgs::create_api_key))
        .routes(routes!(orgs::delete_api_key))
        .routes(routes!(catalogue::templates))
        .routes(routes!(catalogue::template))
        .routes(routes!(catalogue::tiers))
        .routes(routes!(workloads::list, workloads::create))
        .routes(routes!(workloads::get, workloads::update, workloads::delete))
        .routes(routes!(workloads::start))
        .routes(routes!(workloads::stop))
        .routes(routes!(workloads::restart))
        .routes(routes!(workloads::wait))
        .routes(routes!(workloads::releases))
        .routes(routes!(workloads::instances))
        .routes(routes!(workloads::access))
        .routes(routes!(workloads::org_instances))
        .routes(routes!(events::of_workload))
        .routes(routes!(logs::list))
        .routes(routes!(logs::stream))
        .routes(routes!(exec::exec))
        .routes(routes!(terminal::ticket))
        .routes(routes!(terminal::open))
        .routes(routes!(events::list))
        .routes(routes!(events::stream))
        .routes(routes!(secrets::list))
        .routes(routes!(secrets::set, secrets::delete))
        .routes(routes!(secrets::versions))
        .routes(routes!(system::problems))
        .routes(routes!(system::problem))
        .routes(routes!(system::openapi));
    OpenApiRouter::with_openapi(Document::openapi())
        .nest("/v1", v1)
        .routes(routes!(system::livez))
        .routes(routes!(system::readyz))
}

/// The public API's description. Needs no configuration, no database, no environment.
pub fn openapi() -> OpenApi {
    let mut document = router().to_openapi();
    let components = document.components.get_or_insert_default();
    let session = ApiKeyValue::with_description(crate::auth::cookie_name(false), "A signed-in browser.");
    components.add_security_scheme("session", SecurityScheme::ApiKey(ApiKey::Cookie(session)));
    let mut bearer = Http::new(HttpAuthScheme::Bearer);
    bearer.description = Some("An API key of an org.".to_owned());
    components.add_security_scheme("api_key", SecurityScheme::Http(bearer));
    for answer in ANSWERS {
        let content = ContentBuilder::new().schema(Some(Ref::from_schema_name("Problem"))).build();
        let response =
            ResponseBuilder::new().description(answer.describe()).content("application/problem+json", content).build();
        components.responses.insert(answer.name.to_owned(), RefOr::T(response));
    }
    for (path, item) in &mut document.paths.paths {
        for (method, operation) in operations(item) {
            declare_failures(path, method, operation);
        }
    }
    document
}

fn operations(item: &mut PathItem) -> impl Iterator<Item = (HttpMethod, &mut Operation)> {
    [
        (HttpMethod::Get, &mut item.get),
        (HttpMethod::Put, &mut item.put),
        (HttpMethod::Post, &mut item.post),
        (HttpMethod::Patch, &mut item.patch),
        (HttpMethod::Delete, &mut item.delete),
    ]
    .into_iter()
    .filter_map(|(method, operation)| Some((method, operation.as_mut()?)))
}

/// A failure that operations of a kind have in common.
struct Answer {
    name: &'static str,
    status: u16,
}

const ANSWERS: &[Answer] = &[
    Answer { name: "BadRequest", status: 400 },
    Answer { name: "Unauthenticated", status: 401 },
    Answer { name: "Forbidden", status: 403 },
    Answer { name: "NotFound", status: 404 },
    Answer { name: "RequestTimeout", status: 408 },
    Answer { name: "Conflict", status: 409 },
    Answer { name: "PreconditionFailed", status: 412 },
    Answer { name: "TooLarge", status: 413 },
    Answer { name: "UnsupportedMediaType", status: 415 },
    Answer { name: "Unprocessable", status: 422 },
    Answer { name: "TooManyRequests", status: 429 },
    Answer { name: "Internal", status: 500 },
    Answer { name: "NodeUnreachable", status: 502 },
    Answer { name: "Unavailable", status: 503 },
    Answer { name: "Timeout", status: 504 },
];

impl Answer {
    fn describe(&self) -> String {
        let codes = ProblemCode::ALL.iter().filter(|code| code.status() == self.status);
        let codes: Vec<String> = codes.map(|code| format!("`{}`", code.code())).collect();
        format!("A problem: {}.", codes.join(", "))
    }
}

fn declare_failures(path: &str, method: HttpMethod, operation: &mut Operation) {
    let mut statuses = vec![400, 429, 500, 503];
    let has = |name: &str| {
        operation
            .parameters
            .as_ref()
            .is_some_and(|all| all.iter().any(|one| matches!(one, RefOr::T(parameter) if parameter.name == name)))
    };
    let public = operation.security.as_ref().is_some_and(|all| all.iter().any(|one| one == &Default::default()));
    let reads = method == HttpMethod::Get;
    let inside =
        ["/exec", "/logs", "/logs/stream", "/terminal", "/terminal-tickets"].iter().any(|end| path.ends_with(end));
    if !public || operation.operation_id.as_deref().is_some_and(|id| id == "signIn" || id == "openTerminal") {
        statuses.extend([401, 403]);
    }
    if operation.operation_id.as_deref() == Some("signUp") {
        statuses.extend([403, 409]);
    }
    if path.contains('{') {
        statuses.push(404);
    }
    if !reads && path.contains("{org}") || inside || operation.operation_id.as_deref() == Some("createOrg") {
        statuses.push(409);
    }
    if has("If-Match") {
        statuses.push(412);
    }
    if operation.request_body.is_some() {
        statuses.extend([408, 413, 415, 422]);
    } else if has("Idempotency-Key") {
        statuses.push(422);
    }
    if inside {
        statuses.extend([502, 504]);
    }
    if has("Prefer") {
        statuses.push(504);
    }
    if matches!(operation.operation_id.as_deref(), Some("livez")) {
        statuses = vec![500];
    }
    statuses.sort_unstable();
    statuses.dedup();
    for status in statuses {
        if let Some(answer) = ANSWERS.iter().find(|answer| answer.status == status) {
            let reference = RefOr::Ref(Ref::from_response_name(answer.name));
            operation.responses.responses.entry(status.to_string()).or_insert(reference);
        }
    }
}

/// The document as it is served and checked in.
pub fn document() -> &'static str {
    static TEXT: OnceLock<String> = OnceLock::new();
    TEXT.get_or_init(|| {
        let mut text = openapi().to_pretty_json().unwrap_or_default();
        text.push('\n');
        text
    })
}

/// Every problem code with its documentation, as it is checked in.
pub fn problems() -> String {
    let all: Vec<ProblemDoc> = ProblemCode::ALL.iter().map(|code| code.doc()).collect();
    let mut text = serde_json::to_string_pretty(&all).unwrap_or_default();
    text.push('\n');
    text
}
