//! RFC 6455 without I/O: the caller owns the socket and the buffer, this module turns bytes into events and back.
//!
//! A [`Parser`] is a few dozen bytes and owns no buffer while the connection is idle. It is fed whatever the
//! last read returned, in place: payload is unmasked where it lies and handed out as slices of the caller's
//! buffer, so a frame is never copied and never waited for. Only a control frame that is split over two reads
//! is kept (at most 125 bytes, on the heap, until it is whole).
//!
//! What is refused, it refuses at the first byte that proves it wrong: reserved bits and opcodes, wrong masking,
//! non-minimal lengths, fragmented or long control frames, continuation without a start, invalid UTF-8 in the
//! middle of a frame, close codes that may not be on the wire, and anything past the limits.

use std::fmt;

/// The longest header a frame can have: 2 bytes, 8 of length, 4 of mask.
pub const MAX_HEADER: usize = 14;
/// The longest payload of a control frame.
pub const MAX_CONTROL: usize = 125;

/// Which end of the connection we are. A server requires masked frames, a client requires unmasked ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    Server,
    Client,
}

/// The kind of a data message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Text,
    Binary,
}

/// Frame opcodes of RFC 6455, section 5.2.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Opcode {
    Continuation = 0,
    Text = 1,
    Binary = 2,
    Close = 8,
    Ping = 9,
    Pong = 10,
}

/// Sizes above which a peer is cut off with close code 1009.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Bytes in one frame's payload.
    pub frame: u64,
    /// Bytes in one message, over all its fragments.
    pub message: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { frame: 1 << 20, message: 1 << 20 }
    }
}

/// Why a connection must be failed (RFC 6455, section 7.1.7).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Violation {
    ReservedBits,
    ReservedOpcode(u8),
    Masking,
    LengthEncoding,
    ControlTooLong,
    ControlFragmented,
    UnexpectedContinuation,
    ExpectedContinuation,
    InvalidUtf8,
    ClosePayload,
    CloseCode(u16),
    FrameTooBig,
    MessageTooBig,
}

impl Violation {
    /// The close code that tells the other end what was wrong.
    pub fn close_code(self) -> u16 {
        match self {
            Violation::InvalidUtf8 => close::INVALID_DATA,
            Violation::FrameTooBig | Violation::MessageTooBig => close::TOO_BIG,
            _ => close::PROTOCOL,
        }
    }
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Violation::ReservedBits => f.write_str("reserved bits set without an extension"),
            Violation::ReservedOpcode(op) => write!(f, "reserved opcode {op}"),
            Violation::Masking => f.write_str("wrong masking for this direction"),
            Violation::LengthEncoding => f.write_str("length not in its shortest form or over 63 bits"),
            Violation::ControlTooLong => f.write_str("control frame over 125 bytes"),
            Violation::ControlFragmented => f.write_str("fragmented control frame"),
            Violation::UnexpectedContinuation => f.write_str("continuation without a message"),
            Violation::ExpectedContinuation => f.write_str("new message inside a fragmented one"),
            Violation::InvalidUtf8 => f.write_str("text is not valid UTF-8"),
            Violation::ClosePayload => f.write_str("close payload of one byte"),
            Violation::CloseCode(code) => write!(f, "close code {code} may not be sent"),
            Violation::FrameTooBig => f.write_str("frame over the limit"),
            Violation::MessageTooBig => f.write_str("message over the limit"),
        }
    }
}

impl std::error::Error for Violation {}

/// Close codes of RFC 6455, section 7.4.1.
pub mod close {
    pub const NORMAL: u16 = 1000;
    pub const GOING_AWAY: u16 = 1001;
    pub const PROTOCOL: u16 = 1002;
    pub const UNSUPPORTED: u16 = 1003;
    pub const INVALID_DATA: u16 = 1007;
    pub const POLICY: u16 = 1008;
    pub const TOO_BIG: u16 = 1009;
    pub const INTERNAL: u16 = 1011;
    pub const TRY_AGAIN: u16 = 1013;

    /// Whether `code` may appear in a close frame on the wire.
    pub fn on_wire(code: u16) -> bool {
        matches!(code, 1000..=1003 | 1007..=1014 | 3000..=4999)
    }
}

/// What the parser found.
#[derive(Debug, PartialEq, Eq)]
pub enum Event<'a> {
    /// A piece of a data message, unmasked in place. `first` marks the message's first piece, `last` its last;
    /// a message of one unsplit frame has both. A piece may be empty.
    Data {
        kind: Kind,
        chunk: &'a mut [u8],
        first: bool,
        last: bool,
    },
    /// At most 125 bytes, to be sent back in a pong.
    Ping(&'a [u8]),
    Pong(&'a [u8]),
    /// The other end closes; `None` when it gave no code.
    Close {
        code: Option<u16>,
        reason: &'a str,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Header,
    Data,
    Control,
}

/// Incremental frame parser of one direction of one connection.
pub struct Parser {
    /// Payload bytes of the current frame still to come.
    remaining: u64,
    /// Bytes of the current message so far, counting the whole current frame.
    message: u64,
    /// A control frame that came in pieces: its bytes so far.
    spill: Option<Box<Spill>>,
    mask: [u8; 4],
    /// Where in the mask the next payload byte stands.
    mask_at: u8,
    header: [u8; MAX_HEADER],
    header_len: u8,
    phase: Phase,
    opcode: u8,
    fin: bool,
    role: Role,
    /// The kind of the message under way, if one is.
    open: Option<Kind>,
    /// Nothing of the current message has been handed out.
    first: bool,
    utf8: Utf8,
}

struct Spill {
    len: u8,
    bytes: [u8; MAX_CONTROL],
}

impl Parser {
    pub fn new(role: Role) -> Self {
        Self {
            remaining: 0,
            message: 0,
            spill: None,
            mask: [0; 4],
            mask_at: 0,
            header: [0; MAX_HEADER],
            header_len: 0,
            phase: Phase::Header,
            opcode: 0,
            fin: false,
            role,
            open: None,
            first: true,
            utf8: Utf8::default(),
        }
    }

    /// No byte of an unfinished frame or message is held.
    pub fn is_idle(&self) -> bool {
        self.phase == Phase::Header && self.header_len == 0 && self.open.is_none()
    }

    /// Takes bytes from the front of `buf`; returns how many, and an event if there is one. Call again with the
    /// rest while an event came back or bytes are left; it stops with `(n, None)` when it has seen all of `buf`.
    /// After a violation the connection must be failed: the parser is of no more use.
    pub fn advance<'b>(
        &'b mut self,
        buf: &'b mut [u8],
        limits: &Limits,
    ) -> Result<(usize, Option<Event<'b>>), Violation> {
        let mut used = 0;
        if self.phase == Phase::Header {
            // The last control frame kept here has been handed out by now.
            self.spill = None;
            match self.take_header(buf, limits)? {
                (n, true) => used = n,
                (n, false) => return Ok((n, None)),
            }
        }
        match self.phase {
            Phase::Data => self.take_data(buf, used),
            _ => self.take_control(buf, used),
        }
    }

    /// Gathers a header. `true` once it is whole and checked.
    fn take_header(&mut self, buf: &[u8], limits: &Limits) -> Result<(usize, bool), Violation> {
        let mut used = 0;
        loop {
            let have = self.header_len as usize;
            let need = if have < 2 { 2 } else { header_len(self.header[1]) };
            if have >= 2 && have == need {
                break;
            }
            let take = (need - have).min(buf.len() - used);
            if take == 0 {
                return Ok((used, false));
            }
            self.header[have..have + take].copy_from_slice(&buf[used..used + take]);
            self.header_len += take as u8;
            used += take;
            if have < 2 && self.header_len >= 1 {
                self.check_first(self.header[0])?;
            }
            if have < 2 && self.header_len >= 2 {
                self.check_second(self.header[1])?;
            }
        }
        let header = self.header;
        self.header_len = 0;
        let (len, at) = match header[1] & 0x7f {
            126 => {
                let len = u64::from(u16::from_be_bytes([header[2], header[3]]));
                if len < 126 {
                    return Err(Violation::LengthEncoding);
                }
                (len, 4)
            }
            127 => {
                let mut be = [0; 8];
                be.copy_from_slice(&header[2..10]);
                let len = u64::from_be_bytes(be);
                if len < 65536 || len >> 63 != 0 {
                    return Err(Violation::LengthEncoding);
                }
                (len, 10)
            }
            short => (u64::from(short), 2),
        };
        self.mask = match self.role {
            Role::Server => [header[at], header[at + 1], header[at + 2], header[at + 3]],
            Role::Client => [0; 4],
        };
        self.mask_at = 0;
        self.remaining = len;
        self.fin = header[0] & 0x80 != 0;
        self.opcode = header[0] & 0x0f;
        if self.opcode >= 8 {
            self.phase = Phase::Control;
            return Ok((used, true));
        }
        if len > limits.frame {
            return Err(Violation::FrameTooBig);
        }
        if self.opcode != 0 {
            self.open = Some(if self.opcode == 1 { Kind::Text } else { Kind::Binary });
            self.message = 0;
            self.first = true;
            self.utf8 = Utf8::default();
        }
        self.message = self.message.saturating_add(len);
        if self.message > limits.message {
            return Err(Violation::MessageTooBig);
        }
        self.phase = Phase::Data;
        Ok((used, true))
    }

    fn check_first(&self, byte: u8) -> Result<(), Violation> {
        if byte & 0x70 != 0 {
            return Err(Violation::ReservedBits);
        }
        match byte & 0x0f {
            0 if self.open.is_none() => Err(Violation::UnexpectedContinuation),
            1 | 2 if self.open.is_some() => Err(Violation::ExpectedContinuation),
            0..=2 => Ok(()),
            8..=10 if byte & 0x80 == 0 => Err(Violation::ControlFragmented),
            8..=10 => Ok(()),
            op => Err(Violation::ReservedOpcode(op)),
        }
    }

    fn check_second(&self, byte: u8) -> Result<(), Violation> {
        if (byte & 0x80 != 0) != (self.role == Role::Server) {
            return Err(Violation::Masking);
        }
        if self.header[0] & 0x08 != 0 && byte & 0x7f > 125 {
            return Err(Violation::ControlTooLong);
        }
        Ok(())
    }

    fn take_data<'b>(&mut self, buf: &'b mut [u8], used: usize) -> Result<(usize, Option<Event<'b>>), Violation> {
        let take = usize::try_from(self.remaining).unwrap_or(usize::MAX).min(buf.len() - used);
        if take == 0 && self.remaining > 0 {
            return Ok((used, None));
        }
        let chunk = &mut buf[used..used + take];
        self.unmask(chunk);
        self.remaining -= take as u64;
        let frame_done = self.remaining == 0;
        let last = frame_done && self.fin;
        let kind = self.open.unwrap_or(Kind::Binary);
        if kind == Kind::Text {
            self.utf8.push(chunk)?;
            if last {
                self.utf8.finish()?;
            }
        }
        let first = std::mem::replace(&mut self.first, false);
        if frame_done {
            self.phase = Phase::Header;
        }
        if last {
            self.open = None;
        }
        Ok((used + take, Some(Event::Data { kind, chunk, first, last })))
    }

    fn take_control<'b>(&'b mut self, buf: &'b mut [u8], used: usize) -> Result<(usize, Option<Event<'b>>), Violation> {
        let take = (self.remaining as usize).min(buf.len() - used);
        let chunk = &mut buf[used..used + take];
        self.unmask(chunk);
        self.remaining -= take as u64;
        let whole = self.remaining == 0;
        if whole {
            self.phase = Phase::Header;
        }
        if self.spill.is_none() && whole {
            return Ok((used + take, Some(control(self.opcode, chunk)?)));
        }
        let spill = self.spill.get_or_insert_with(|| Box::new(Spill { len: 0, bytes: [0; MAX_CONTROL] }));
        let at = spill.len as usize;
        spill.bytes[at..at + take].copy_from_slice(chunk);
        spill.len += take as u8;
        let so_far = &spill.bytes[..spill.len as usize];
        if whole {
            return Ok((used + take, Some(control(self.opcode, so_far)?)));
        }
        if self.opcode == Opcode::Close as u8 {
            // A bad code or reason is refused as soon as it shows, not when the frame is whole.
            check_close(so_far, false)?;
        }
        Ok((used + take, None))
    }

    fn unmask(&mut self, chunk: &mut [u8]) {
        if self.role == Role::Server {
            apply_mask(chunk, self.mask, self.mask_at as usize);
            self.mask_at = ((self.mask_at as usize + chunk.len()) & 3) as u8;
        }
    }
}

/// Length of a whole header whose second byte is `second`.
fn header_len(second: u8) -> usize {
    let extended = match second & 0x7f {
        126 => 2,
        127 => 8,
        _ => 0,
    };
    2 + extended + if second & 0x80 != 0 { 4 } else { 0 }
}

fn control(opcode: u8, payload: &[u8]) -> Result<Event<'_>, Violation> {
    match opcode {
        9 => Ok(Event::Ping(payload)),
        10 => Ok(Event::Pong(payload)),
        _ => {
            let (code, reason) = check_close(payload, true)?;
            Ok(Event::Close { code, reason })
        }
    }
}

/// Checks a close payload, or (not `whole`) what there is of it.
fn check_close(payload: &[u8], whole: bool) -> Result<(Option<u16>, &str), Violation> {
    let [high, low, reason @ ..] = payload else {
        return if whole && payload.len() == 1 { Err(Violation::ClosePayload) } else { Ok((None, "")) };
    };
    let code = u16::from_be_bytes([*high, *low]);
    if !close::on_wire(code) {
        return Err(Violation::CloseCode(code));
    }
    match std::str::from_utf8(reason) {
        Ok(reason) => Ok((Some(code), reason)),
        Err(e) if !whole && e.error_len().is_none() => Ok((Some(code), "")),
        Err(_) => Err(Violation::InvalidUtf8),
    }
}

/// XORs `buf` with `mask`, whose byte `at & 3` meets the first byte of `buf`. Its own inverse.
pub fn apply_mask(buf: &mut [u8], mask: [u8; 4], at: usize) {
    let turned = [mask[at & 3], mask[(at + 1) & 3], mask[(at + 2) & 3], mask[(at + 3) & 3]];
    if turned == [0; 4] {
        return;
    }
    let word = u32::from_ne_bytes(turned);
    let wide = (u64::from(word) << 32) | u64::from(word);
    // Fixed-size blocks without a branch inside: the compiler makes vector code of it.
    let (blocks, tail) = buf.as_chunks_mut::<8>();
    for block in blocks {
        *block = (u64::from_ne_bytes(*block) ^ wide).to_ne_bytes();
    }
    for (byte, key) in tail.iter_mut().zip(turned.iter().cycle()) {
        *byte ^= key;
    }
}

/// Streaming UTF-8 check: fails at the first byte that no valid text can have there.
#[derive(Default, Clone, Copy)]
struct Utf8 {
    /// The start of a character whose rest has not come yet.
    carry: [u8; 4],
    len: u8,
}

impl Utf8 {
    fn push(&mut self, mut bytes: &[u8]) -> Result<(), Violation> {
        while self.len > 0 {
            let [byte, rest @ ..] = bytes else { return Ok(()) };
            self.carry[self.len as usize] = *byte;
            self.len += 1;
            bytes = rest;
            match std::str::from_utf8(&self.carry[..self.len as usize]) {
                Ok(_) => self.len = 0,
                Err(e) if e.error_len().is_some() => return Err(Violation::InvalidUtf8),
                Err(_) => {}
            }
        }
        if let Err(e) = std::str::from_utf8(bytes) {
            if e.error_len().is_some() {
                return Err(Violation::InvalidUtf8);
            }
            let tail = &bytes[e.valid_up_to()..];
            self.carry[..tail.len()].copy_from_slice(tail);
            self.len = tail.len() as u8;
        }
        Ok(())
    }

    fn finish(&self) -> Result<(), Violation> {
        if self.len == 0 { Ok(()) } else { Err(Violation::InvalidUtf8) }
    }
}

/// Writes a frame header into `out` and returns its length. With `mask` (a client's frame) the payload must be
/// run through [`apply_mask`] with the same key from position 0.
pub fn encode_header(
    out: &mut [u8; MAX_HEADER],
    fin: bool,
    opcode: Opcode,
    len: usize,
    mask: Option<[u8; 4]>,
) -> usize {
    out[0] = opcode as u8 | if fin { 0x80 } else { 0 };
    let mask_bit = if mask.is_some() { 0x80 } else { 0 };
    let mut n = match len {
        0..=125 => {
            out[1] = mask_bit | len as u8;
            2
        }
        126..=0xffff => {
            out[1] = mask_bit | 126;
            out[2..4].copy_from_slice(&(len as u16).to_be_bytes());
            4
        }
        _ => {
            out[1] = mask_bit | 127;
            out[2..10].copy_from_slice(&(len as u64).to_be_bytes());
            10
        }
    };
    if let Some(key) = mask {
        out[n..n + 4].copy_from_slice(&key);
        n += 4;
    }
    n
}

/// Appends a whole frame to `out`.
pub fn encode_frame(out: &mut Vec<u8>, opcode: Opcode, payload: &[u8], mask: Option<[u8; 4]>) {
    let mut header = [0; MAX_HEADER];
    let n = encode_header(&mut header, true, opcode, payload.len(), mask);
    out.extend_from_slice(&header[..n]);
    let at = out.len();
    out.extend_from_slice(payload);
    if let Some(key) = mask {
        apply_mask(&mut out[at..], key, 0);
    }
}

/// Appends a close frame. A reason too long for a control frame is cut at a character's boundary.
pub fn encode_close(out: &mut Vec<u8>, code: Option<u16>, reason: &str, mask: Option<[u8; 4]>) {
    let mut payload = Vec::with_capacity(MAX_CONTROL);
    if let Some(code) = code {
        payload.extend_from_slice(&code.to_be_bytes());
        let cut = reason.floor_char_boundary(MAX_CONTROL - 2);
        payload.extend_from_slice(&reason.as_bytes()[..cut]);
    }
    encode_frame(out, Opcode::Close, &payload, mask);
}

pub mod handshake {
    //! The opening handshake (RFC 6455, section 4). Extensions are never accepted: compression would cost a
    //! window of memory per connection.

    use base64::Engine as _;
    use base64::engine::general_purpose::STANDARD;
    use sha1::{Digest as _, Sha1};

    /// A request head longer than this is refused.
    pub const MAX_HEAD: usize = 8192;
    const MAX_HEADERS: usize = 64;
    const GUID: &[u8] = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11";

    /// An HTTP request, valid or not as an upgrade.
    #[derive(Debug)]
    pub struct Request<'a> {
        pub method: &'a str,
        pub path: &'a str,
        /// Names as sent; compare without case.
        pub headers: Vec<(&'a str, &'a [u8])>,
        /// Bytes of `buf` that the head took.
        pub len: usize,
    }

    impl<'a> Request<'a> {
        /// Parses a request head. `Ok(None)`: more bytes are needed. `Err`: not HTTP/1.x or over the limits.
        pub fn parse(buf: &'a [u8]) -> Result<Option<Request<'a>>, &'static str> {
            let mut slots = [httparse::EMPTY_HEADER; MAX_HEADERS];
            let mut head = httparse::Request::new(&mut slots);
            match head.parse(&buf[..buf.len().min(MAX_HEAD)]) {
                Ok(httparse::Status::Complete(len)) => Ok(Some(Request {
                    method: head.method.unwrap_or(""),
                    path: head.path.unwrap_or(""),
                    headers: head.headers.iter().map(|h| (h.name, h.value)).collect(),
                    len,
                })),
                Ok(httparse::Status::Partial) if buf.len() >= MAX_HEAD => Err("request head too long"),
                Ok(httparse::Status::Partial) => Ok(None),
                Err(_) => Err("not an HTTP request"),
            }
        }

        /// The first value of a header.
        pub fn header(&self, name: &str) -> Option<&'a str> {
            let found = self.headers.iter().find(|(n, _)| n.eq_ignore_ascii_case(name))?;
            std::str::from_utf8(found.1).ok().map(str::trim)
        }

        /// Whether a comma-separated header holds `token`, without case.
        pub fn has_token(&self, name: &str, token: &str) -> bool {
            self.headers
                .iter()
                .filter(|(n, _)| n.eq_ignore_ascii_case(name))
                .filter_map(|(_, v)| std::str::from_utf8(v).ok())
                .any(|v| v.split(',').any(|t| t.trim().eq_ignore_ascii_case(token)))
        }

        /// Checks that this is a WebSocket upgrade; returns the key to answer with.
        pub fn upgrade_key(&self) -> Result<&'a str, Refusal> {
            if self.method != "GET"
                || !self.has_token("upgrade", "websocket")
                || !self.has_token("connection", "upgrade")
            {
                return Err(Refusal::NotAnUpgrade);
            }
            if self.header("sec-websocket-version") != Some("13") {
                return Err(Refusal::Version);
            }
            match self.header("sec-websocket-key") {
                Some(key) if STANDARD.decode(key).is_ok_and(|raw| raw.len() == 16) => Ok(key),
                _ => Err(Refusal::Key),
            }
        }
    }

    /// Why a request is no upgrade.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub enum Refusal {
        NotAnUpgrade,
        Version,
        Key,
    }

    impl Refusal {
        /// A whole response that says so.
        pub fn response(self) -> &'static str {
            match self {
                Refusal::NotAnUpgrade => {
                    "HTTP/1.1 426 Upgrade Required\r\nupgrade: websocket\r\nconnection: close, upgrade\r\ncontent-length: 0\r\n\r\n"
                }
                Refusal::Version => {
                    "HTTP/1.1 426 Upgrade Required\r\nsec-websocket-version: 13\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
                }
                Refusal::Key => "HTTP/1.1 400 Bad Request\r\nconnection: close\r\ncontent-length: 0\r\n\r\n",
            }
        }
    }

    /// The `Sec-WebSocket-Accept` value for a key.
    pub fn accept(key: &str) -> String {
        STANDARD.encode(Sha1::new().chain_update(key.as_bytes()).chain_update(GUID).finalize())
    }

    /// The server's answer to an upgrade.
    pub fn response(key: &str, subprotocol: Option<&str>) -> String {
        let mut out = format!(
            "HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: upgrade\r\nsec-websocket-accept: {}\r\n",
            accept(key)
        );
        if let Some(name) = subprotocol {
            out.push_str("sec-websocket-protocol: ");
            out.push_str(name);
            out.push_str("\r\n");
        }
        out.push_str("\r\n");
        out
    }

    /// A client's request. `nonce` must be fresh random bytes.
    pub fn request(host: &str, path: &str, nonce: [u8; 16], subprotocols: &[&str], extra: &str) -> String {
        let mut out = format!(
            "GET {path} HTTP/1.1\r\nhost: {host}\r\nupgrade: websocket\r\nconnection: upgrade\r\nsec-websocket-version: 13\r\nsec-websocket-key: {}\r\n",
            STANDARD.encode(nonce)
        );
        if !subprotocols.is_empty() {
            out.push_str("sec-websocket-protocol: ");
            out.push_str(&subprotocols.join(", "));
            out.push_str("\r\n");
        }
        out.push_str(extra);
        out.push_str("\r\n");
        out
    }

    /// Checks the server's answer. `Ok(None)`: more bytes are needed. `Ok(Some((len, subprotocol)))`: open, the
    /// head took `len` bytes.
    pub fn check_response(buf: &[u8], nonce: [u8; 16]) -> Result<Option<(usize, Option<String>)>, String> {
        let mut slots = [httparse::EMPTY_HEADER; MAX_HEADERS];
        let mut head = httparse::Response::new(&mut slots);
        let len = match head.parse(&buf[..buf.len().min(MAX_HEAD)]) {
            Ok(httparse::Status::Complete(len)) => len,
            Ok(httparse::Status::Partial) if buf.len() < MAX_HEAD => return Ok(None),
            _ => return Err("not an HTTP response".to_owned()),
        };
        let value = |name: &str| {
            let found = head.headers.iter().find(|h| h.name.eq_ignore_ascii_case(name))?;
            std::str::from_utf8(found.value).ok().map(|v| v.trim().to_owned())
        };
        match head.code {
            Some(101) => {}
            Some(code) => {
                let after = value("retry-after").map(|s| format!(", retry after {s} s")).unwrap_or_default();
                return Err(format!("refused with status {code}{after}"));
            }
            None => return Err("no status".to_owned()),
        }
        if value("sec-websocket-accept").as_deref() != Some(accept(&STANDARD.encode(nonce)).as_str()) {
            return Err("wrong accept key".to_owned());
        }
        Ok(Some((len, value("sec-websocket-protocol"))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const KEY: [u8; 4] = [0x37, 0xfa, 0x21, 0x3d];

    /// An event without its borrow.
    #[derive(Debug, PartialEq, Clone)]
    enum Seen {
        Text(String),
        Binary(Vec<u8>),
        Ping(Vec<u8>),
        Pong(Vec<u8>),
        Close(Option<u16>, String),
    }

    /// Feeds `bytes` in pieces of `step`; what was seen whole, the violation, and how many bytes it had taken by then.
    fn feed(role: Role, bytes: &[u8], step: usize, limits: &Limits) -> (Vec<Seen>, Option<Violation>, usize) {
        let mut parser = Parser::new(role);
        let mut seen = Vec::new();
        let mut message = Vec::new();
        let mut fed = 0;
        for piece in bytes.chunks(step.max(1)) {
            let mut piece = piece.to_vec();
            let mut at = 0;
            let total = piece.len();
            fed += total;
            loop {
                let (used, event) = match parser.advance(&mut piece[at..], limits) {
                    Ok(x) => x,
                    Err(v) => return (seen, Some(v), fed),
                };
                at += used;
                match event {
                    Some(Event::Data { kind, chunk, first, last }) => {
                        if first {
                            message.clear();
                        }
                        message.extend_from_slice(chunk);
                        if last {
                            seen.push(match kind {
                                Kind::Text => Seen::Text(String::from_utf8(message.clone()).expect("checked")),
                                Kind::Binary => Seen::Binary(message.clone()),
                            });
                        }
                    }
                    Some(Event::Ping(p)) => seen.push(Seen::Ping(p.to_vec())),
                    Some(Event::Pong(p)) => seen.push(Seen::Pong(p.to_vec())),
                    Some(Event::Close { code, reason }) => seen.push(Seen::Close(code, reason.to_owned())),
                    None if at == total => break,
                    None => panic!("stopped at {at} of {total}"),
                }
            }
        }
        (seen, None, fed)
    }

    fn frame(fin: bool, opcode: u8, payload: &[u8]) -> Vec<u8> {
        let mut out = vec![opcode | if fin { 0x80 } else { 0 }];
        match payload.len() {
            n @ 0..=125 => out.push(0x80 | n as u8),
            n @ 126..=0xffff => {
                out.push(0x80 | 126);
                out.extend((n as u16).to_be_bytes());
            }
            n => {
                out.push(0x80 | 127);
                out.extend((n as u64).to_be_bytes());
            }
        }
        out.extend(KEY);
        out.extend(payload.iter().zip(KEY.iter().cycle()).map(|(b, k)| b ^ k));
        out
    }

    /// The same bytes must mean the same whatever the reads' sizes.
    fn expect(bytes: &[u8], want: &[Seen], violation: Option<Violation>) {
        for step in [bytes.len().max(1), 1, 2, 3, 7, 125, 997] {
            let (seen, got, _) = feed(Role::Server, bytes, step, &Limits { frame: 1 << 24, message: 1 << 24 });
            assert_eq!(seen, want, "in steps of {step}");
            assert_eq!(got, violation, "in steps of {step}");
        }
    }

    #[test]
    fn whole_messages_of_every_length_form() {
        // Autobahn 1.1 and 1.2: the edges of the three length forms.
        for len in [0, 1, 125, 126, 127, 128, 65535, 65536, 70000] {
            let text = "*".repeat(len);
            expect(&frame(true, 1, text.as_bytes()), &[Seen::Text(text.clone())], None);
            let bytes = vec![0xfe; len];
            expect(&frame(true, 2, &bytes), &[Seen::Binary(bytes.clone())], None);
        }
    }

    #[test]
    fn pings_of_every_size_and_between_fragments() {
        // Autobahn 2.x and 5.x.
        for len in [0, 1, 100, 125] {
            expect(&frame(true, 9, &vec![0xff; len]), &[Seen::Ping(vec![0xff; len])], None);
        }
        expect(&frame(true, 9, &[0; 126]), &[], Some(Violation::ControlTooLong));
        let mixed = [frame(false, 1, b"frag"), frame(true, 9, b"x"), frame(true, 10, b"y"), frame(true, 0, b"ment")];
        expect(
            &mixed.concat(),
            &[Seen::Ping(b"x".into()), Seen::Pong(b"y".into()), Seen::Text("fragment".into())],
            None,
        );
    }

    #[test]
    fn reserved_bits_and_opcodes_fail_after_what_came_before() {
        // Autobahn 3.x and 4.x.
        let good = frame(true, 1, b"Hello");
        for bits in 1..8u8 {
            let mut bad = frame(true, 1, b"Hello");
            bad[0] |= bits << 4;
            let all = [good.clone(), bad, frame(true, 9, b"")].concat();
            expect(&all, &[Seen::Text("Hello".into())], Some(Violation::ReservedBits));
        }
        for op in [3, 4, 5, 6, 7, 11, 12, 13, 14, 15] {
            let all = [good.clone(), frame(true, op, b"")].concat();
            expect(&all, &[Seen::Text("Hello".into())], Some(Violation::ReservedOpcode(op)));
        }
    }

    #[test]
    fn fragmentation_rules() {
        // Autobahn 5.x.
        expect(&frame(true, 0, b"x"), &[], Some(Violation::UnexpectedContinuation));
        expect(&frame(false, 9, b"x"), &[], Some(Violation::ControlFragmented));
        let twice = [frame(false, 1, b"a"), frame(true, 1, b"b")].concat();
        expect(&twice, &[], Some(Violation::ExpectedContinuation));
        let after = [frame(false, 1, b"a"), frame(true, 0, b"b"), frame(false, 0, b"c")].concat();
        expect(&after, &[Seen::Text("ab".into())], Some(Violation::UnexpectedContinuation));
        let empty = [frame(false, 1, b""), frame(false, 0, b""), frame(true, 0, b"")].concat();
        expect(&empty, &[Seen::Text(String::new())], None);
    }

    #[test]
    fn invalid_utf8_fails_at_the_byte_that_proves_it() {
        // Autobahn 6.x; 6.4.3 and 6.4.4 want the failure before the frame is whole.
        let valid = "\u{3ba}\u{1f79}\u{3c3}\u{3bc}\u{3b5}".as_bytes();
        let bad = [valid, &[0xf4, 0x90, 0x80, 0x80], b"edited"].concat();
        let bytes = frame(true, 1, &bad);
        let (seen, violation, fed) = feed(Role::Server, &bytes, 1, &Limits::default());
        assert_eq!((seen.len(), violation), (0, Some(Violation::InvalidUtf8)));
        assert_eq!(fed, 6 + valid.len() + 2, "f4 is a possible start, 90 after it is not");
        for invalid in [
            &b"\xc0\x80"[..],
            b"\xed\xa0\x80",
            b"\xff",
            b"\xf8\x88\x80\x80\x80",
            b"\xe2\x28\xa1",
            b"\x80",
            b"\xf4\x90\x80\x80",
            b"\xce",
        ] {
            expect(&frame(true, 1, invalid), &[], Some(Violation::InvalidUtf8));
        }
        // A character split over fragments is fine; a message that ends inside one is not.
        let split = [frame(false, 1, b"\xce"), frame(true, 0, b"\xba")].concat();
        expect(&split, &[Seen::Text("\u{3ba}".into())], None);
        // Binary is not looked at.
        expect(&frame(true, 2, b"\xff\xfe"), &[Seen::Binary(vec![0xff, 0xfe])], None);
    }

    #[test]
    fn close_codes_and_reasons() {
        // Autobahn 7.x.
        expect(&frame(true, 8, b""), &[Seen::Close(None, String::new())], None);
        expect(&frame(true, 8, b"\x03"), &[], Some(Violation::ClosePayload));
        for code in [1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 3000, 3999, 4000, 4999u16] {
            let mut payload = code.to_be_bytes().to_vec();
            payload.extend(b"bye");
            expect(&frame(true, 8, &payload), &[Seen::Close(Some(code), "bye".into())], None);
        }
        for code in [0, 999, 1004, 1005, 1006, 1015, 1016, 1100, 2000, 2999, 5000, 65535u16] {
            expect(&frame(true, 8, &code.to_be_bytes()), &[], Some(Violation::CloseCode(code)));
        }
        let longest = [&1000u16.to_be_bytes()[..], &[b'*'; 123]].concat();
        expect(&frame(true, 8, &longest), &[Seen::Close(Some(1000), "*".repeat(123))], None);
        // 7.3.6: a reason one byte too long; 7.5.1: a reason that is not text.
        let too_long = [&1000u16.to_be_bytes()[..], &[b'*'; 124]].concat();
        expect(&frame(true, 8, &too_long), &[], Some(Violation::ControlTooLong));
        let not_text = [&1000u16.to_be_bytes()[..], b"ok\xce\xff"].concat();
        expect(&frame(true, 8, &not_text), &[], Some(Violation::InvalidUtf8));
    }

    #[test]
    fn masking_and_length_forms_are_enforced() {
        let unmasked = [0x81, 0x01, b'x'];
        assert_eq!(feed(Role::Server, &unmasked, 3, &Limits::default()).1, Some(Violation::Masking));
        assert_eq!(feed(Role::Client, &frame(true, 1, b"x"), 9, &Limits::default()).1, Some(Violation::Masking));
        assert_eq!(feed(Role::Client, &unmasked, 1, &Limits::default()).0, [Seen::Text("x".into())]);
        for head in [
            &[0x82, 0xfe, 0, 125, 0, 0, 0, 0][..],
            &[0x82, 0xff, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0, 0, 0, 0],
            &[0x82, 0xff, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        ] {
            expect(head, &[], Some(Violation::LengthEncoding));
        }
    }

    #[test]
    fn limits_hold_before_the_payload_is_there() {
        let limits = Limits { frame: 10, message: 15 };
        let big = frame(true, 2, &[0; 11]);
        assert_eq!(feed(Role::Server, &big[..6], 6, &limits).1, Some(Violation::FrameTooBig));
        let parts = [frame(false, 2, &[0; 10]), frame(true, 0, &[0; 6])].concat();
        assert_eq!(feed(Role::Server, &parts, 100, &limits).1, Some(Violation::MessageTooBig));
    }

    #[test]
    fn the_handshake_of_the_rfc() {
        assert_eq!(handshake::accept("dGhlIHNhbXBsZSBub25jZQ=="), "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
        let raw = handshake::request("h:1", "/ws", [7; 16], &["a", "b"], "");
        let request = handshake::Request::parse(raw.as_bytes()).expect("parses").expect("whole");
        assert_eq!((request.method, request.path, request.len), ("GET", "/ws", raw.len()));
        assert!(request.has_token("Sec-WebSocket-Protocol", "b"));
        let key = request.upgrade_key().expect("an upgrade");
        let answer = handshake::response(key, Some("b"));
        assert_eq!(
            handshake::check_response(answer.as_bytes(), [7; 16]).expect("accepted"),
            Some((answer.len(), Some("b".to_owned())))
        );
        assert!(handshake::check_response(answer.as_bytes(), [8; 16]).is_err());
        assert!(handshake::check_response(&answer.as_bytes()[..20], [7; 16]).expect("partial").is_none());
        let plain = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n";
        let request = handshake::Request::parse(plain).expect("parses").expect("whole");
        assert_eq!(request.upgrade_key(), Err(handshake::Refusal::NotAnUpgrade));
    }

    #[test]
    fn an_idle_parser_is_small() {
        assert!(size_of::<Parser>() <= 72, "{}", size_of::<Parser>());
    }

    proptest! {
        #[test]
        fn mask_is_its_own_inverse_at_any_offset(data in proptest::collection::vec(any::<u8>(), 0..200), key: [u8; 4], at in 0usize..9) {
            let mut masked = data.clone();
            apply_mask(&mut masked, key, at);
            for (i, (m, d)) in masked.iter().zip(&data).enumerate() {
                prop_assert_eq!(*m, d ^ key[(at + i) & 3]);
            }
        }

        #[test]
        fn any_bytes_mean_the_same_in_any_pieces(data in proptest::collection::vec(any::<u8>(), 0..400), step in 1usize..50) {
            let limits = Limits { frame: 300, message: 500 };
            let whole = feed(Role::Client, &data, data.len().max(1), &limits);
            let pieces = feed(Role::Client, &data, step, &limits);
            prop_assert_eq!(whole.0, pieces.0);
            prop_assert_eq!(whole.1, pieces.1);
        }

        /// Almost right is where parsers break: a valid stream with a few bytes changed, cut or doubled.
        #[test]
        fn spoilt_frames_mean_the_same_in_any_pieces(
            messages in proptest::collection::vec((0u8..16, ".{0,200}"), 1..6),
            spoils in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0u8..3), 0..4),
            step in 1usize..60,
        ) {
            let mut bytes = Vec::new();
            for (kind, text) in &messages {
                let length = text.len().min(if *kind & 8 == 0 { 200 } else { 125 });
                bytes.extend_from_slice(&frame(*kind != 3, kind & 11, &text.as_bytes()[..length]));
            }
            for (at, with, how) in spoils {
                let at = at.index(bytes.len());
                match how {
                    0 => bytes[at] ^= with,
                    1 => bytes.insert(at, with),
                    _ => drop(bytes.remove(at)),
                }
                if bytes.is_empty() {
                    bytes.push(with);
                }
            }
            let limits = Limits { frame: 300, message: 500 };
            let whole = feed(Role::Client, &bytes, bytes.len(), &limits);
            let pieces = feed(Role::Client, &bytes, step, &limits);
            prop_assert_eq!(whole.0, pieces.0);
            prop_assert_eq!(whole.1, pieces.1);
        }

        #[test]
        fn spoilt_requests_are_read_without_panic(
            spoils in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0u8..3), 0..5),
            cut in any::<prop::sample::Index>(),
        ) {
            let mut bytes = handshake::request("h.example", "/ws", [7; 16], &["a", "b"], "X-One: 1\r\n").into_bytes();
            for (at, with, how) in spoils {
                let at = at.index(bytes.len());
                match how {
                    0 => bytes[at] = with,
                    1 => bytes.insert(at, with),
                    _ => drop(bytes.remove(at)),
                }
            }
            if let Ok(Some(request)) = handshake::Request::parse(&bytes) {
                prop_assert!(request.len <= bytes.len());
                let _ = request.upgrade_key();
                // A part of it is never more than not yet whole, or wrong already.
                let part = &bytes[..cut.index(request.len)];
                prop_assert!(!matches!(handshake::Request::parse(part), Ok(Some(_))));
            }
            let _ = handshake::check_response(&bytes, [7; 16]);
        }

        #[test]
        fn what_is_encoded_is_parsed(
            messages in proptest::collection::vec((any::<bool>(), ".{0,300}"), 1..6),
            key: [u8; 4],
            step in 1usize..100,
        ) {
            let mut bytes = Vec::new();
            for (ping, text) in &messages {
                match ping {
                    true => encode_frame(&mut bytes, Opcode::Ping, &text.as_bytes()[..text.len().min(125)], Some(key)),
                    false => encode_frame(&mut bytes, Opcode::Text, text.as_bytes(), Some(key)),
                }
            }
            encode_close(&mut bytes, Some(1000), &messages[0].1, Some(key));
            let (seen, violation, _) = feed(Role::Server, &bytes, step, &Limits::default());
            prop_assert_eq!(violation, None);
            prop_assert_eq!(seen.len(), messages.len() + 1);
            for (seen, (ping, text)) in seen.iter().zip(&messages) {
                match ping {
                    true => prop_assert_eq!(seen, &Seen::Ping(text.as_bytes()[..text.len().min(125)].to_vec())),
                    false => prop_assert_eq!(seen, &Seen::Text(text.clone())),
                }
            }
        }
    }
}
