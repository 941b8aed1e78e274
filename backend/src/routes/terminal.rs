//! A terminal in a workload, over WebSocket: subprotocol `term.v1`.
//!
//! Binary messages are the terminal's bytes in both directions. Text messages are control frames in JSON: `resize` and `ack`
//! from the client, `exit` from here. What the client has not acknowledged is at most [`WINDOW`]: a program that prints
//! faster than a page can draw is slowed down, not the page.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use axum::Json;
use axum::extract::ws::{CloseFrame, Message, WebSocket, WebSocketUpgrade};
use axum::extract::{FromRequestParts as _, State};
use axum::response::Response;
use clawhq_api_types::problem::ProblemCode;
use clawhq_api_types::workload::TerminalTicket;
use clawhq_app::caller::{Credential, Origin};
use clawhq_app::workloads::Reach;
use clawhq_domain::ids::OrgId;
use clawhq_proto::v1;
use http::StatusCode;
use http::header::HeaderMap;
use parking_lot::Mutex;
use serde::Deserialize;
use serde_json::json;
use tokio::sync::mpsc;
use utoipa::IntoParams;

use super::{WorkloadPath, logs};
use crate::auth::{Org, same_origin};
use crate::envelope::RequestInfo;
use crate::extract::{Nothing, Params, Query};
use crate::node::channels::{Channel, Next};
use crate::problem::{Fail, Result};
use crate::sse;
use crate::state::Backend;
use crate::streams::Open;

/// Bytes on their way to a client that has not acknowledged them.
const WINDOW: usize = 1024 * 1024;
const PROTOCOL: &str = "term.v1";
const TICKET_LIFE: Duration = Duration::from_secs(30);
const TICKETS_MAX: usize = 10_000;
/// A page that closed without a word is noticed by its missing pongs.
const PING_EVERY: Duration = Duration::from_secs(20);
/// The best shell the image has.
const SHELL: [&str; 3] = ["/bin/sh", "-c", "if command -v bash >/dev/null 2>&1; then exec bash; fi; exec /bin/sh"];
const MESSAGE_MAX: usize = 256 * 1024;

/// One-time permissions to open a terminal. They live in this process: the WebSocket must come to the replica that gave it.
#[derive(Default)]
pub struct Tickets(Mutex<HashMap<String, Ticket>>);

struct Ticket {
    credential: Credential,
    org: OrgId,
    reach: Reach,
    ends: Instant,
}

impl Tickets {
    fn issue(&self, ticket: Ticket) -> Result<String> {
        let mut tickets = self.0.lock();
        let now = Instant::now();
        tickets.retain(|_, ticket| ticket.ends > now);
        if tickets.len() >= TICKETS_MAX {
            return Err(Fail::new(ProblemCode::Unavailable, "Too many terminals are being opened.").retry_after(5_000));
        }
        let text = hex::encode(rand::random::<[u8; 32]>());
        tickets.insert(text.clone(), ticket);
        Ok(text)
    }

    /// Once, in time, for the same org and workload.
    fn redeem(&self, text: &str, path: &WorkloadPath) -> Option<Ticket> {
        let ticket = self.0.lock().remove(text)?;
        let workload = &ticket.reach.workload;
        let same = path.workload == workload.id.to_string() || path.workload == workload.name;
        (ticket.ends > Instant::now() && same).then_some(ticket)
    }
}

/// Get a ticket for a terminal
///
/// Opens one terminal, once, within 30 seconds. A WebSocket cannot carry an Authorization header; this is what it carries
/// instead. Noted in the audit log.
#[utoipa::path(post, path = "/orgs/{org}/workloads/{workload}/terminal-tickets", operation_id = "createTerminalTicket", tag = "Inside", params(WorkloadPath),
    responses((status = CREATED, description = "The ticket", body = TerminalTicket)))]
pub async fn ticket(
    State(backend): State<Backend>,
    org: Org,
    Params(path): Params<WorkloadPath>,
    Query(Nothing {}): Query<Nothing>,
) -> Result<(StatusCode, Json<TerminalTicket>)> {
    let reach = backend.app().reach(&org, &path.workload).await?;
    let detail = json!({ "instance": reach.instance.to_string() });
    backend.app().audit_entry(&org, "workload.terminal", reach.workload.id.to_string(), detail).await?;
    let ends = Instant::now() + TICKET_LIFE;
    let ticket = backend.tickets().issue(Ticket { credential: org.credential.clone(), org: org.org, reach, ends })?;
    Ok((StatusCode::CREATED, Json(TerminalTicket { ticket, expires_at: chrono::Utc::now() + TICKET_LIFE })))
}

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct TerminalQuery {
    /// From `createTerminalTicket`.
    pub ticket: String,
    #[param(minimum = 1, maximum = 1000, default = 80)]
    pub cols: Option<u32>,
    #[param(minimum = 1, maximum = 1000, default = 24)]
    pub rows: Option<u32>,
}

fn size(value: Option<u32>, usual: u32) -> u32 {
    value.unwrap_or(usual).clamp(1, 1000)
}

/// Open a terminal
///
/// A WebSocket with subprotocol `term.v1`. Binary messages are the terminal's bytes. Text messages are JSON:
/// `{"type":"resize","cols":80,"rows":24}` and `{"type":"ack","bytes":131072}` from the client,
/// `{"type":"exit","code":0,"reason":"exited"}` from the server. At most 1 MiB is sent unacknowledged.
#[utoipa::path(get, path = "/orgs/{org}/workloads/{workload}/terminal", operation_id = "openTerminal", tag = "Inside", security(()), params(WorkloadPath, TerminalQuery),
    responses((status = SWITCHING_PROTOCOLS, description = "The terminal is open")))]
pub async fn open(
    State(backend): State<Backend>,
    Params(path): Params<WorkloadPath>,
    Query(query): Query<TerminalQuery>,
    info: RequestInfo,
    headers: HeaderMap,
    request: axum::extract::Request,
) -> Result<Response> {
    // Browsers send Origin with every WebSocket; a page of another site must not ride on a leaked ticket.
    if headers.contains_key(http::header::ORIGIN) && same_origin(&strip_fetch_site(&headers)) != Some(true) {
        return Err(Fail::new(ProblemCode::CrossOrigin, "The WebSocket does not come from the console's own page."));
    }
    let ticket = backend.tickets().redeem(&query.ticket, &path).ok_or_else(|| {
        Fail::new(ProblemCode::Unauthenticated, "The ticket is unknown, used or too old.").hint("Get a new one.")
    })?;
    let origin = Origin { request: info.id, ip: info.ip };
    let context = backend.app().enter(&ticket.credential, &ticket.org.to_string(), origin).await?;
    if path.org != context.slug && path.org != context.org.to_string() {
        return Err(Fail::not_found("org"));
    }
    let held = backend.streams().open(ticket.org, &backend.metrics().streams, "terminal")?;
    let (mut parts, _) = request.into_parts();
    let upgrade = WebSocketUpgrade::from_request_parts(&mut parts, &backend).await.map_err(|rejection| {
        Fail::new(ProblemCode::MalformedRequest, format!("This is no WebSocket handshake: {rejection}."))
    })?;
    let asked = headers.get_all("sec-websocket-protocol").iter().filter_map(|value| value.to_str().ok());
    if !asked.flat_map(|value| value.split(',')).any(|name| name.trim() == PROTOCOL) {
        return Err(Fail::new(ProblemCode::InvalidHeader, "The subprotocol must be term.v1.")
            .at("sec-websocket-protocol:", "must name term.v1"));
    }
    let (cols, rows) = (size(query.cols, 80), size(query.rows, 24));
    let kind = v1::channel_open::Kind::Terminal(v1::Terminal { argv: SHELL.map(str::to_owned).to_vec(), cols, rows });
    let channel = logs::open(&backend, &ticket.reach, kind).await?;
    let org = ticket.org.to_string();
    Ok(upgrade.protocols([PROTOCOL]).max_message_size(MESSAGE_MAX).max_frame_size(MESSAGE_MAX).on_upgrade(
        move |socket| async move {
            let expelled = sse::still_allowed(&backend, &ticket.credential, org, &info);
            carry(socket, channel, held, expelled).await;
        },
    ))
}

/// `Sec-Fetch-Site` of a WebSocket is not sent by every browser and says less than Origin.
fn strip_fetch_site(headers: &HeaderMap) -> HeaderMap {
    let mut headers = headers.clone();
    headers.remove("sec-fetch-site");
    headers
}

#[derive(Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Control {
    Resize {
        cols: u32,
        rows: u32,
    },
    Ack {
        bytes: usize,
    },
    /// Of a later version.
    #[serde(other)]
    Other,
}

async fn carry(mut socket: WebSocket, mut channel: Channel, _held: Open, expelled: impl Future<Output = &'static str>) {
    let mut expelled = std::pin::pin!(expelled);
    let mut unacknowledged = 0usize;
    // Input goes its own way: while the program does not read, its output must still be carried.
    let (typed, mut waiting) = mpsc::channel::<Typed>(64);
    let way_in = channel.input();
    let typing = tokio::spawn(async move {
        while let Some(typed) = waiting.recv().await {
            let open = match typed {
                Typed::Bytes(bytes) => way_in.send(bytes).await,
                Typed::Size(cols, rows) => way_in.resize(cols, rows).await,
            };
            if !open {
                return;
            }
        }
    });
    let _typing = AbortOnDrop(typing);
    let mut ping = tokio::time::interval(PING_EVERY);
    ping.tick().await;
    let mut heard = Instant::now();
    let mut room_for_input = true;
    loop {
        tokio::select! {
            next = channel.next(), if unacknowledged < WINDOW => match next {
                Next::Frame(frame) => {
                    unacknowledged += frame.bytes.len();
                    if socket.send(Message::Binary(frame.bytes)).await.is_err() {
                        return;
                    }
                }
                Next::Closed(closed) => {
                    let message = (!closed.message.is_empty()).then_some(closed.message);
                    return exit(socket, &closed.reason, closed.exit_code, message).await;
                }
            },
            // A full queue is not added to: the client waits, as its program does.
            room = typed.reserve(), if !room_for_input => match room {
                Ok(room) => { drop(room); room_for_input = true; }
                // It has ended: the next look at it says how.
                Err(_) => { unacknowledged = 0; room_for_input = true; }
            },
            message = socket.recv(), if room_for_input => {
                heard = Instant::now();
                match message {
                    Some(Ok(Message::Binary(bytes))) => {
                        let _ = typed.try_send(Typed::Bytes(bytes));
                        room_for_input = typed.capacity() > 0;
                    }
                    Some(Ok(Message::Text(text))) => match serde_json::from_str(&text) {
                        Ok(Control::Resize { cols, rows }) => {
                            let _ = typed.try_send(Typed::Size(cols.clamp(1, 1000), rows.clamp(1, 1000)));
                            room_for_input = typed.capacity() > 0;
                        }
                        Ok(Control::Ack { bytes }) => unacknowledged = unacknowledged.saturating_sub(bytes),
                        Ok(Control::Other) | Err(_) => {}
                    },
                    Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
                    Some(Ok(Message::Close(_)) | Err(_)) | None => return,
                }
            },
            reason = &mut expelled => return exit(socket, reason, None, None).await,
            _ = ping.tick() => {
                if room_for_input && heard.elapsed() > PING_EVERY * 3 || socket.send(Message::Ping(bytes::Bytes::new())).await.is_err() {
                    return;
                }
            }
        }
    }
}

/// What a person does at the terminal.
enum Typed {
    Bytes(bytes::Bytes),
    Size(u32, u32),
}

struct AbortOnDrop(tokio::task::JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

async fn exit(mut socket: WebSocket, reason: &str, code: Option<i32>, message: Option<String>) {
    let frame = json!({ "type": "exit", "code": code, "reason": reason, "message": message });
    let _ = socket.send(Message::Text(frame.to_string().into())).await;
    let close = CloseFrame { code: axum::extract::ws::close_code::NORMAL, reason: reason.to_owned().into() };
    let _ = socket.send(Message::Close(Some(close))).await;
}
