//! What hub and peer say to each other inside WebSocket messages.
//!
//! **Compact** (subprotocol [`COMPACT`]): one binary message a frame, `type u8, stream u32, body`, integers in network
//! order. The hub opens streams and names them; either side may send only as many bytes of a stream as the other has
//! granted, so nothing is ever dropped and one slow reader does not stop the rest. Datagrams stand outside of credit:
//! they may be lost, as UDP may.
//!
//! **Legacy**: JSON text messages, and `36 bytes of tunnel id, 1 flag, payload` in binary. It has no credit and one EOF
//! for both directions; existing peers speak it, and it is kept byte for byte.

use crate::dest::{Dest, Host};
use serde::{Deserialize, Serialize};

/// The WebSocket subprotocol that asks for the compact form.
pub const COMPACT: &str = "proxyhub.v3";
/// Bytes of a stream that may be on the way to the hub or the peer unread.
pub const WINDOW: u32 = 256 * 1024;
/// Most payload of one data frame.
pub const FRAME_MOST: usize = 64 * 1024;
/// Type and stream.
pub const HEADER: usize = 5;
/// Tunnel id and flag of a legacy binary message.
pub const LEGACY_HEADER: usize = 37;
/// Most payload of a legacy data message.
pub const LEGACY_FRAME_MOST: usize = 32 * 1024;

pub mod kind {
    pub const HELLO: u8 = 1;
    pub const WELCOME: u8 = 2;
    pub const COOLDOWN: u8 = 3;
    pub const OPEN: u8 = 4;
    pub const OPENED: u8 = 5;
    pub const DATA: u8 = 6;
    pub const EOF: u8 = 7;
    pub const RESET: u8 = 8;
    pub const CREDIT: u8 = 9;
    pub const DATAGRAM: u8 = 10;
    pub const DRAIN: u8 = 11;
}

/// How opening a stream went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Opened {
    Ok = 0,
    Refused = 1,
    Unreachable = 2,
    Timeout = 3,
    /// The peer's own policy.
    Denied = 4,
    Full = 5,
    NotResolved = 6,
    Failed = 7,
}

impl Opened {
    pub fn parse(byte: u8) -> Opened {
        match byte {
            0 => Opened::Ok,
            1 => Opened::Refused,
            2 => Opened::Unreachable,
            3 => Opened::Timeout,
            4 => Opened::Denied,
            5 => Opened::Full,
            6 => Opened::NotResolved,
            _ => Opened::Failed,
        }
    }

    /// The destination's doing: another peer would fare no better.
    pub fn is_final(self) -> bool {
        matches!(self, Opened::Refused | Opened::Denied | Opened::NotResolved)
    }
}

/// A compact peer introduces itself.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Hello {
    pub device: String,
    pub version: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub token: String,
    /// The device's owner agreed to carry others' traffic.
    #[serde(default)]
    pub consent: bool,
    #[serde(default)]
    pub udp: bool,
    /// Most tunnels the peer wants; the hub may allow fewer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_tunnels: Option<u16>,
    /// A hint, believed only if configured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub country: Option<String>,
}

/// The hub's answer to a [`Hello`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Welcome {
    pub hub: String,
    pub heartbeat_seconds: u32,
    pub max_tunnels: u16,
    pub window: u32,
    /// The address the hub sees.
    pub address: String,
    pub country: String,
}

/// Come back later. The hub has added jitter already.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Cooldown {
    pub retry_after_ms: u64,
    pub reason: String,
}

pub fn header(kind: u8, stream: u32) -> [u8; HEADER] {
    let s = stream.to_be_bytes();
    [kind, s[0], s[1], s[2], s[3]]
}

pub fn json(kind: u8, body: &impl Serialize) -> Vec<u8> {
    let mut out = header(kind, 0).to_vec();
    // Serialising plain structs of strings and numbers cannot fail.
    out.extend(serde_json::to_vec(body).unwrap_or_default());
    out
}

/// What a stream carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Carries {
    Tcp = 1,
    Udp = 2,
}

/// OPEN: kind, credit for the peer, destination. A UDP stream has none.
pub fn open(stream: u32, carries: Carries, credit: u32, dest: Option<&Dest>) -> Vec<u8> {
    let mut out = header(kind::OPEN, stream).to_vec();
    out.push(carries as u8);
    out.extend(credit.to_be_bytes());
    out.extend(dest.map_or(0, |d| d.port).to_be_bytes());
    let host = dest.map(|d| d.host.to_string()).unwrap_or_default();
    out.push(host.len() as u8);
    out.extend(host.bytes());
    out
}

/// The body of an OPEN.
pub fn parse_open(body: &[u8]) -> Option<(Carries, u32, Option<Dest>)> {
    let carries = match body.first()? {
        1 => Carries::Tcp,
        2 => Carries::Udp,
        _ => return None,
    };
    let credit = u32::from_be_bytes(body.get(1..5)?.try_into().ok()?);
    let port = u16::from_be_bytes(body.get(5..7)?.try_into().ok()?);
    let len = usize::from(*body.get(7)?);
    let host = std::str::from_utf8(body.get(8..8 + len)?).ok()?;
    match carries {
        Carries::Udp => Some((carries, credit, None)),
        Carries::Tcp => Some((carries, credit, Some(Dest { host: Host::parse(host)?, port }))),
    }
}

pub fn opened(stream: u32, how: Opened, credit: u32) -> Vec<u8> {
    let mut out = header(kind::OPENED, stream).to_vec();
    out.push(how as u8);
    out.extend(credit.to_be_bytes());
    out
}

pub fn parse_opened(body: &[u8]) -> Option<(Opened, u32)> {
    Some((Opened::parse(*body.first()?), u32::from_be_bytes(body.get(1..5)?.try_into().ok()?)))
}

pub fn credit(stream: u32, more: u32) -> [u8; HEADER + 4] {
    let mut out = [0; HEADER + 4];
    out[..HEADER].copy_from_slice(&header(kind::CREDIT, stream));
    out[HEADER..].copy_from_slice(&more.to_be_bytes());
    out
}

/// A legacy peer's JSON, as much of it as the hub wants.
#[derive(Debug, Default, Deserialize)]
pub struct LegacyMessage {
    #[serde(rename = "type", default)]
    pub kind: String,
    #[serde(default)]
    pub node_id: String,
    #[serde(default)]
    pub sdk_version: String,
    #[serde(default)]
    pub token: String,
    #[serde(default)]
    pub ip_info: Option<LegacyIpInfo>,
    #[serde(default)]
    pub data: Option<LegacyData>,
}

#[derive(Debug, Default, Deserialize)]
pub struct LegacyIpInfo {
    #[serde(rename = "countryCode", default)]
    pub country_code: String,
}

#[derive(Debug, Default, Deserialize)]
pub struct LegacyData {
    #[serde(default)]
    pub device_id: String,
    #[serde(default)]
    pub country: String,
    #[serde(default)]
    pub sdk_version: String,
    #[serde(default)]
    pub tunnel_id: String,
    #[serde(default)]
    pub success: bool,
    #[serde(default)]
    pub error: String,
    /// Base64.
    #[serde(default)]
    pub data: String,
    #[serde(default)]
    pub eof: bool,
}

/// A legacy tunnel id that holds the stream's number: a UUID's shape, found again without a table.
pub fn legacy_id(stream: u32, salt: u64) -> [u8; 36] {
    let text = format!(
        "{stream:08x}-{:04x}-4{:03x}-8{:03x}-{:012x}",
        salt >> 48,
        salt >> 36 & 0xfff,
        salt >> 24 & 0xfff,
        salt & 0xffff_ffff_ffff
    );
    let mut out = [b'0'; 36];
    out.copy_from_slice(&text.as_bytes()[..36]);
    out
}

/// The stream's number in a legacy tunnel id.
pub fn legacy_stream(id: &[u8]) -> Option<u32> {
    if id.len() < 36 {
        return None;
    }
    u32::from_str_radix(std::str::from_utf8(&id[..8]).ok()?, 16).ok()
}

pub fn legacy_open(id: &[u8; 36], host: &str, port: u16) -> String {
    // The port is a string: that is what existing peers expect.
    serde_json::json!({"type": "tunnel_open", "data": {
        "tunnel_id": String::from_utf8_lossy(id), "host": host, "port": port.to_string()}})
    .to_string()
}

/// Reads a legacy peer's words for why it could not connect.
pub fn legacy_failure(error: &str) -> Opened {
    let error = error.to_ascii_lowercase();
    let has = |s: &str| error.contains(s);
    if has("refused") {
        Opened::Refused
    } else if has("no such host") || has("resolve") {
        Opened::NotResolved
    } else if has("timeout") || has("timed out") {
        Opened::Timeout
    } else if has("unreachable") || has("no route") {
        Opened::Unreachable
    } else if has("max tunnels") || has("too many") {
        Opened::Full
    } else {
        Opened::Failed
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn frames_round_trip() {
        let dest = Dest::parse("example.com:443").expect("dest");
        let frame = open(7, Carries::Tcp, 1000, Some(&dest));
        assert_eq!(frame[..HEADER], header(kind::OPEN, 7));
        assert_eq!(parse_open(&frame[HEADER..]), Some((Carries::Tcp, 1000, Some(dest))));
        assert_eq!(parse_open(&open(7, Carries::Udp, 5, None)[HEADER..]), Some((Carries::Udp, 5, None)));
        assert_eq!(parse_opened(&opened(7, Opened::Refused, 9)[HEADER..]), Some((Opened::Refused, 9)));
        assert_eq!(&credit(1, 2)[HEADER..], [0, 0, 0, 2]);
    }

    #[test]
    fn legacy_ids_look_like_uuids_and_hold_the_stream() {
        let id = legacy_id(0xdead_beef, u64::MAX);
        assert_eq!(std::str::from_utf8(&id).expect("ascii"), "deadbeef-ffff-4fff-8fff-ffffffffffff");
        assert_eq!(legacy_stream(&id), Some(0xdead_beef));
        assert_eq!(legacy_stream(b"short"), None);
        assert!(legacy_open(&id, "h", 80).contains("\"port\":\"80\""));
    }

    proptest! {
        #[test]
        fn hostile_bodies_never_panic(body in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = parse_open(&body);
            let _ = parse_opened(&body);
            let _ = legacy_stream(&body);
            let _ = serde_json::from_slice::<LegacyMessage>(&body);
        }
    }
}
