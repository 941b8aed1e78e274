//! HTTP/1.1 as far as this server speaks it: bounded requests with a length or chunks, keep-alive, HEAD.

use std::io::{self, Read, Write};
use std::net::TcpStream;

pub const MAX_HEAD: usize = 16 << 10;
pub const MAX_BODY: usize = 1 << 20;
const MAX_HEADERS: usize = 64;

#[derive(Debug)]
pub struct Request {
    pub method: String,
    pub path: String,
    pub query: String,
    pub keep_alive: bool,
    /// The value of `Sec-WebSocket-Key` of a well-formed upgrade.
    pub websocket_key: Option<String>,
    /// An upgrade that was asked for in a wrong way.
    pub bad_upgrade: bool,
    pub body: Vec<u8>,
}

/// Why there is no request: nothing (more) came, or what to answer before the connection ends.
pub enum Refusal {
    End,
    Status(u16, &'static str),
}

impl From<io::Error> for Refusal {
    fn from(_: io::Error) -> Self {
        Refusal::End
    }
}

/// A connection and what was read beyond the last request.
pub struct Wire {
    pub stream: TcpStream,
    pub ahead: Vec<u8>,
}

enum Length {
    Known(usize),
    Chunked,
}

impl Wire {
    pub fn read_request(&mut self) -> Result<Request, Refusal> {
        let (mut request, length, expects_continue) = loop {
            if let Some(parsed) = self.parse_head()? {
                break parsed;
            }
            if self.ahead.len() >= MAX_HEAD {
                return Err(Refusal::Status(431, "The request's head is longer than 16 KiB."));
            }
            let quiet = self.ahead.is_empty();
            match self.fill() {
                Ok(()) => {}
                Err(_) if quiet => return Err(Refusal::End),
                Err(error) if is_timeout(&error) => return Err(Refusal::Status(408, "The request took too long.")),
                Err(_) => return Err(Refusal::End),
            }
        };
        if expects_continue && self.ahead.is_empty() {
            self.stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n")?;
        }
        request.body = match length {
            Length::Known(len) => self.read_exactly(len)?,
            Length::Chunked => self.read_chunks()?,
        };
        Ok(request)
    }

    fn fill(&mut self) -> io::Result<()> {
        let mut buffer = [0; 8 << 10];
        loop {
            match self.stream.read(&mut buffer) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(got) => {
                    self.ahead.extend_from_slice(&buffer[..got]);
                    return Ok(());
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// The head and how its body is framed, once it is whole.
    fn parse_head(&mut self) -> Result<Option<(Request, Length, bool)>, Refusal> {
        let bad = |what| Refusal::Status(400, what);
        let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
        let mut head = httparse::Request::new(&mut headers);
        let end = match head.parse(&self.ahead[..self.ahead.len().min(MAX_HEAD)]) {
            Ok(httparse::Status::Complete(end)) => end,
            Ok(httparse::Status::Partial) => return Ok(None),
            Err(httparse::Error::TooManyHeaders) => {
                return Err(Refusal::Status(431, "More than 64 header fields."));
            }
            Err(_) => return Err(bad("This is not HTTP/1.1.")),
        };
        let field = |name: &str| {
            let mut found = head.headers.iter().filter(move |field| field.name.eq_ignore_ascii_case(name));
            let first = found.next().and_then(|field| std::str::from_utf8(field.value).ok());
            (first, found.next().is_some())
        };
        let has = |name: &str, word: &str| {
            head.headers
                .iter()
                .filter(|field| field.name.eq_ignore_ascii_case(name))
                .filter_map(|field| std::str::from_utf8(field.value).ok())
                .flat_map(|value| value.split(','))
                .any(|part| part.trim().eq_ignore_ascii_case(word))
        };
        let is_1_1 = head.version == Some(1);
        let (host, two_hosts) = field("host");
        if is_1_1 && (host.is_none() || two_hosts) {
            return Err(bad("HTTP/1.1 wants exactly one Host."));
        }
        // Both framings at once, or two lengths, is how requests are smuggled: no guessing.
        let (length, two_lengths) = field("content-length");
        let length = match field("transfer-encoding") {
            (Some(coding), false) if coding.eq_ignore_ascii_case("chunked") && length.is_none() => Length::Chunked,
            (None, false) if !two_lengths => match length {
                None => Length::Known(0),
                Some(text) if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) => {
                    match text.parse::<usize>() {
                        Ok(len) if len <= MAX_BODY => Length::Known(len),
                        _ => return Err(Refusal::Status(413, "The body is longer than 1 MiB.")),
                    }
                }
                Some(_) => return Err(bad("Content-Length is not a number.")),
            },
            _ => return Err(bad("The body's length is said in two ways, or in one we do not know.")),
        };
        let upgrade = has("upgrade", "websocket") && has("connection", "upgrade");
        let key = field("sec-websocket-key").0.filter(|key| key.len() == 24).map(str::to_owned);
        let well_formed = head.method == Some("GET") && field("sec-websocket-version").0 == Some("13") && key.is_some();
        let target = head.path.unwrap_or("/");
        // A proxy may send the absolute form.
        let target =
            target.strip_prefix("http://").map_or(target, |rest| rest.find('/').map_or("/", |slash| &rest[slash..]));
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        let request = Request {
            method: head.method.unwrap_or("GET").to_owned(),
            path: path.to_owned(),
            query: query.to_owned(),
            keep_alive: if is_1_1 { !has("connection", "close") } else { has("connection", "keep-alive") },
            websocket_key: if upgrade && well_formed { key } else { None },
            bad_upgrade: upgrade && !well_formed,
            body: Vec::new(),
        };
        let expects_continue = is_1_1 && has("expect", "100-continue");
        self.ahead.drain(..end);
        Ok(Some((request, length, expects_continue)))
    }

    fn read_exactly(&mut self, len: usize) -> Result<Vec<u8>, Refusal> {
        while self.ahead.len() < len {
            self.fill()?;
        }
        Ok(self.ahead.drain(..len).collect())
    }

    fn read_chunks(&mut self) -> Result<Vec<u8>, Refusal> {
        let mut body = Vec::new();
        loop {
            let (skip, len) = loop {
                match httparse::parse_chunk_size(&self.ahead) {
                    Ok(httparse::Status::Complete((skip, len))) => break (skip, len as usize),
                    Ok(httparse::Status::Partial) if self.ahead.len() < MAX_HEAD => self.fill()?,
                    _ => return Err(Refusal::Status(400, "The body's chunks are malformed.")),
                }
            };
            self.ahead.drain(..skip);
            if len > MAX_BODY - body.len() {
                return Err(Refusal::Status(413, "The body is longer than 1 MiB."));
            }
            if len == 0 {
                return self.skip_trailers().map(|()| body);
            }
            body.extend(self.read_exactly(len)?);
            if self.read_exactly(2)? != b"\r\n" {
                return Err(Refusal::Status(400, "The body's chunks are malformed."));
            }
        }
    }

    fn skip_trailers(&mut self) -> Result<(), Refusal> {
        let mut seen = 0;
        loop {
            let Some(end) = self.ahead.windows(2).position(|pair| pair == b"\r\n") else {
                if seen + self.ahead.len() > MAX_HEAD {
                    return Err(Refusal::Status(431, "The trailers are longer than 16 KiB."));
                }
                self.fill()?;
                continue;
            };
            self.ahead.drain(..end + 2);
            seen += end + 2;
            if end == 0 {
                return Ok(());
            }
        }
    }

    /// One write: head and body together, so that a small answer is one packet.
    pub fn answer(&mut self, answer: &Answer, head_only: bool, keep_alive: bool) -> io::Result<()> {
        let mut out = Vec::with_capacity(512 + answer.body.len());
        let connection = if keep_alive { "keep-alive" } else { "close" };
        write!(
            out,
            "HTTP/1.1 {} {}\r\ncontent-type: {}\r\ncontent-length: {}\r\nconnection: {connection}\r\n\
             cache-control: no-store\r\nx-content-type-options: nosniff\r\n",
            answer.status,
            reason(answer.status),
            answer.content_type,
            answer.body.len()
        )?;
        for (name, value) in &answer.fields {
            write!(out, "{name}: {value}\r\n")?;
        }
        out.extend_from_slice(b"\r\n");
        if !head_only {
            out.extend_from_slice(&answer.body);
        }
        self.stream.write_all(&out)
    }
}

pub fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}

pub struct Answer {
    pub status: u16,
    pub content_type: &'static str,
    pub fields: Vec<(&'static str, &'static str)>,
    pub body: Vec<u8>,
}

impl Answer {
    pub fn new(status: u16, content_type: &'static str, body: impl Into<Vec<u8>>) -> Self {
        Answer { status, content_type, fields: Vec::new(), body: body.into() }
    }

    pub fn text(status: u16, text: impl std::fmt::Display) -> Self {
        Self::new(status, "text/plain; charset=utf-8", format!("{text}\n"))
    }

    pub fn json(text: impl Into<String>) -> Self {
        Self::new(200, "application/json", text.into())
    }

    pub fn with(mut self, name: &'static str, value: &'static str) -> Self {
        self.fields.push((name, value));
        self
    }
}

fn reason(status: u16) -> &'static str {
    match status {
        200 => "OK",
        400 => "Bad Request",
        404 => "Not Found",
        405 => "Method Not Allowed",
        408 => "Request Timeout",
        413 => "Content Too Large",
        426 => "Upgrade Required",
        431 => "Request Header Fields Too Large",
        503 => "Service Unavailable",
        _ => "Unknown",
    }
}
