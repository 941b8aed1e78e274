//! What the control plane and a node agent say to each other, versioned, with its conversions to `domain`.
//!
//! The messages are in `proto/node.proto`. Kinds travel as the names `domain` gives them, so an older side can show
//! what it does not know instead of guessing.

#[allow(clippy::all, clippy::pedantic)]
pub mod v1 {
    tonic::include_proto!("clawhq.node.v1");
}

mod convert;
mod parts;

pub use convert::{Malformed, warm_mode_name, warm_mode_parse};
pub use parts::whole_set;

/// Largest frame either side accepts, in bytes: a claim's files, environment and secrets with room to spare.
pub const FRAME_BYTES_MAX: usize = 8 * 1024 * 1024;

/// Bytes of `ChannelData` that may be sent on a fresh channel, in either direction, before credit is granted.
pub const CHANNEL_CREDIT: u32 = 256 * 1024;

/// FNV-1a 64 of `<slot_id>:<generation>`; the wrapping sum over all slots is the heartbeat's digest.
pub fn slot_digest(slot: clawhq_domain::ids::SlotId, generation: i64) -> u64 {
    format!("{slot}:{generation}")
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3))
}
