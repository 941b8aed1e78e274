//! A proxy hub: devices ("peers") join it over WebSocket, customers enter by SOCKS5 or HTTP and leave through a peer.

pub mod account;
pub mod dest;
pub mod http;
pub mod ledger;
mod mapped;
pub mod registry;
pub mod socks;
pub mod tally;
pub mod target;
