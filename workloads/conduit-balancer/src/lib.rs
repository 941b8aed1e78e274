//! Layer-4 load balancer for TCP and UDP.
//!
//! One parent process holds the configuration, the health checks and the admin API; as many workers as the descriptor
//! limit asks for move the bytes. They share counters ([`board`]) and nothing else; the parent tells workers what to do
//! by a [`table`].

pub mod admin;
pub mod board;
pub mod check;
pub mod conduit;
pub mod config;
pub mod control;
mod fetch;
pub mod geo;
pub mod health;
pub mod maglev;
pub mod proxy;
pub mod stats;
pub mod table;
pub mod tune;
pub mod worker;
