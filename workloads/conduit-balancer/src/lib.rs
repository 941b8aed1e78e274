//! Layer-4 load balancer for TCP and UDP.

pub mod board;
pub mod config;
pub mod maglev;
pub mod proxy;
