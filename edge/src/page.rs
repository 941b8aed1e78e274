//! What a visitor sees when the workload itself cannot answer: a small page, or a problem document for programs.

use bytes::Bytes;
use clawhq_domain::Reason;
use clawhq_domain::lifecycle::Shown;
use http::{HeaderMap, Response, StatusCode, header};
use http_body_util::Full;

/// Why there is no answer.
pub enum Absent<'a> {
    /// No workload has this name.
    Unknown,
    State {
        name: &'a str,
        state: Shown,
        reason: Option<&'a Reason>,
    },
    /// It runs, but this request got no answer from it.
    Silent {
        name: &'a str,
        what: &'static str,
    },
    /// It runs, but its host has too many connections open, perhaps none of them its own.
    Crowded {
        name: &'a str,
    },
}

struct Words {
    status: StatusCode,
    code: &'static str,
    title: String,
    detail: String,
    hint: Option<String>,
    /// Worth asking again in so many seconds.
    again: Option<u32>,
}

fn words(absent: &Absent<'_>) -> Words {
    let plain = |status, code, title: &str, detail: &str, again| Words {
        status,
        code,
        title: title.to_owned(),
        detail: detail.to_owned(),
        hint: None,
        again,
    };
    match absent {
        Absent::Unknown => plain(
            StatusCode::NOT_FOUND,
            "workload_unknown",
            "Nothing lives here",
            "No workload has this address. Check the spelling; a deleted workload gives its address up.",
            None,
        ),
        Absent::Silent { name, what } => {
            plain(StatusCode::BAD_GATEWAY, "no_answer", &format!("{name} did not answer"), what, None)
        }
        Absent::Crowded { name } => plain(
            StatusCode::SERVICE_UNAVAILABLE,
            "node_busy",
            &format!("{name} cannot be reached"),
            "The host it runs on has too many connections open at the moment. This page asks again by itself.",
            Some(5),
        ),
        Absent::State { name, state, reason } => {
            let unavailable = StatusCode::SERVICE_UNAVAILABLE;
            let mut words = match state {
                Shown::Queued => plain(
                    unavailable,
                    "workload_queued",
                    &format!("{name} is in the queue"),
                    "It starts as soon as there is room. This page asks again by itself.",
                    Some(5),
                ),
                Shown::Starting | Shown::Updating | Shown::Restarting | Shown::Running => plain(
                    unavailable,
                    "workload_starting",
                    &format!("{name} is starting"),
                    "It is not ready to answer yet. This page asks again by itself.",
                    Some(2),
                ),
                Shown::Stopped | Shown::Stopping => plain(
                    unavailable,
                    "workload_stopped",
                    &format!("{name} is stopped"),
                    "Its owner stopped it. It answers again once it is started.",
                    None,
                ),
                Shown::Failed => plain(
                    unavailable,
                    "workload_failed",
                    &format!("{name} has failed"),
                    "It does not run. Its owner sees why in the console.",
                    None,
                ),
                Shown::Unreachable => plain(
                    unavailable,
                    "workload_unreachable",
                    &format!("{name} cannot be reached"),
                    "The host it runs on has not been heard of for a moment. This page asks again by itself.",
                    Some(5),
                ),
                Shown::Deleting | Shown::Deleted => plain(
                    StatusCode::NOT_FOUND,
                    "workload_unknown",
                    "Nothing lives here",
                    "This workload was deleted.",
                    None,
                ),
            };
            // The reason's code is for everybody; its words may quote what the workload printed, which is its owner's.
            words.hint = reason.map(|reason| format!("Reason: {}", reason.code.replace('_', " ")));
            words
        }
    }
}

/// The answer in the form the client asked for.
pub fn answer(absent: &Absent<'_>, asked: &HeaderMap) -> Response<Full<Bytes>> {
    let words = words(absent);
    let accepts = asked.get(header::ACCEPT).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let (kind, body) = if accepts.contains("text/html") {
        ("text/html; charset=utf-8", html(&words))
    } else {
        let problem = serde_json::json!({
            "type": format!("https://docs.clawhq.example/problems/{}", words.code),
            "title": words.title,
            "status": words.status.as_u16(),
            "code": words.code,
            "detail": words.detail,
            "hint": words.hint,
        });
        ("application/problem+json", problem.to_string())
    };
    let mut response = Response::builder()
        .status(words.status)
        .header(header::CONTENT_TYPE, kind)
        .header(header::CACHE_CONTROL, "no-store")
        .header("x-content-type-options", "nosniff")
        .header("content-security-policy", "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'")
        .header("x-clawhq-edge", words.code);
    if let Some(seconds) = words.again {
        response = response.header(header::RETRY_AFTER, seconds);
    }
    response.body(Full::new(Bytes::from(body))).unwrap_or_else(|_| Response::new(Full::default()))
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

fn html(words: &Words) -> String {
    let refresh = words.again.map(|seconds| format!("<meta http-equiv=\"refresh\" content=\"{seconds}\">"));
    let pulse = if words.again.is_some() { " live" } else { "" };
    let hint = words.hint.as_deref().map(|hint| format!("<p class=hint>{}</p>", escape(hint)));
    format!(
        "<!doctype html><html lang=en><head><meta charset=utf-8>\
         <meta name=viewport content=\"width=device-width,initial-scale=1\">{refresh}<title>{title}</title><style>\
         :root{{color-scheme:light dark;--bg:#fbfbfa;--fg:#1b1c1e;--mute:#62666d;--line:#e4e4e1;--dot:#c2571a}}\
         @media(prefers-color-scheme:dark){{:root{{--bg:#111214;--fg:#ececee;--mute:#9a9ea6;--line:#26282c;--dot:#f08a4b}}}}\
         *{{box-sizing:border-box}}body{{margin:0;min-height:100vh;display:grid;place-items:center;background:var(--bg);\
         color:var(--fg);font:16px/1.6 ui-sans-serif,system-ui,-apple-system,'Segoe UI',sans-serif;padding:24px}}\
         main{{max-width:30rem;width:100%}}.dot{{width:10px;height:10px;border-radius:50%;background:var(--dot);margin-bottom:20px}}\
         .live{{animation:p 1.6s ease-in-out infinite}}@keyframes p{{50%{{opacity:.25}}}}\
         @media(prefers-reduced-motion:reduce){{.live{{animation:none}}}}\
         h1{{font-size:1.5rem;line-height:1.25;letter-spacing:-.02em;margin:0 0 8px}}p{{margin:0;color:var(--mute)}}\
         .hint{{margin-top:16px;padding-top:16px;border-top:1px solid var(--line);font-size:.875rem}}\
         footer{{margin-top:32px;font-size:.8125rem;color:var(--mute)}}</style></head><body><main>\
         <div class=\"dot{pulse}\"></div><h1>{title}</h1><p>{detail}</p>{hint}<footer>Served by ClawHQ</footer>\
         </main></body></html>",
        refresh = refresh.unwrap_or_default(),
        title = escape(&words.title),
        detail = escape(&words.detail),
        hint = hint.unwrap_or_default(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use http_body_util::BodyExt as _;

    async fn body(response: Response<Full<Bytes>>) -> String {
        String::from_utf8(response.into_body().collect().await.unwrap().to_bytes().to_vec()).unwrap()
    }

    #[tokio::test]
    async fn people_get_a_page_and_programs_a_problem() {
        let reason = Reason::new("out_of_memory", "printed <script> secrets");
        let failed = Absent::State { name: "bot", state: Shown::Failed, reason: Some(&reason) };
        let mut asked = HeaderMap::new();
        let program = answer(&failed, &asked);
        assert_eq!(program.status(), 503);
        assert_eq!(program.headers()["content-type"], "application/problem+json");
        asked.insert(header::ACCEPT, "text/html,*/*".parse().unwrap());
        let person = body(answer(&failed, &asked)).await;
        assert!(person.contains("bot has failed") && person.contains("out of memory"));
        assert!(!person.contains("script"), "what it printed is its owner's");
    }

    #[test]
    fn what_passes_is_asked_for_again() {
        for state in Shown::ALL {
            let absent = Absent::State { name: "bot", state, reason: None };
            let response = answer(&absent, &HeaderMap::new());
            let passes =
                !matches!(state, Shown::Stopped | Shown::Stopping | Shown::Failed | Shown::Deleting | Shown::Deleted);
            assert_eq!(response.headers().contains_key("retry-after"), passes, "{state:?}");
        }
        let crowded = answer(&Absent::Crowded { name: "bot" }, &HeaderMap::new());
        assert_eq!(crowded.status(), 503);
        assert_eq!(crowded.headers()["x-clawhq-edge"], "node_busy");
        assert_eq!(crowded.headers()["retry-after"], "5");
    }
}
