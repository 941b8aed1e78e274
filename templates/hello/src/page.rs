//! The page at `/`: says what this is, and shows that it lives.

use std::sync::atomic::Ordering;

use crate::server::Server;

const PAGE: &str = include_str!("page.html");

pub fn render(server: &Server) -> String {
    let uptime = server.start.elapsed().as_millis().to_string();
    let requests = server.requests.load(Ordering::Relaxed).to_string();
    PAGE.replace("{{uptime_ms}}", &uptime).replace("{{requests}}", &requests).replace("{{name}}", &html(&server.name))
}

fn html(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c => out.push(c),
        }
    }
    out
}

pub fn json_string(text: &str) -> String {
    let mut out = String::from('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            c if c < ' ' => out.push_str(&format!("\\u{:04x}", c as u32)),
            c => out.push(c),
        }
    }
    out.push('"');
    out
}
