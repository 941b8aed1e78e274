//! What a person or a timer may ask of ClawHQ, one function for each. This room owns transactions and the order of
//! effects; it decides nothing (`domain` does) and speaks no protocol (`backend`, `workers`, `pool-manager` do).

pub mod accounts;
pub mod ca;
pub mod caller;
pub mod catalogue;
pub mod error;
pub mod events;
pub mod hub;
pub mod model;
pub mod nodes;
pub mod orgs;
pub mod password;
pub mod pool;
pub mod routes;
pub mod secrets;
pub mod waiters;
pub mod work;
pub mod workloads;

pub use error::{Error, Result};
