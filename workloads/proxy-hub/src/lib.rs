//! A proxy hub: devices ("peers") join it over WebSocket, customers enter by SOCKS5 or HTTP and leave through a peer.

pub mod account;
pub mod api;
pub mod config;
pub mod dest;
pub mod front;
pub mod geo;
pub mod http;
pub mod hub;
pub mod ledger;
pub mod link;
pub mod load;
mod mapped;
pub mod metrics;
pub mod names;
pub mod peer;
pub mod places;
pub mod registry;
pub mod relay;
pub mod server;
pub mod shared;
pub mod socks;
pub mod tally;
pub mod target;
