//! What the controller tells workers: which listeners there are, and which backends each may use.

use crate::config::{Listener, Protocol};
use serde::{Deserialize, Serialize};
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

/// A whole routing table; it replaces the one before at once.
#[derive(Debug, Clone, Serialize, Deserialize, Default)]
pub struct Table {
    pub version: u64,
    /// Most connections of all workers together.
    pub connections: u64,
    pub splice_after: u32,
    pub country_database: Option<PathBuf>,
    pub entries: Vec<Entry>,
    pub pools: Vec<Targets>,
}

/// A listener and the pool behind it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// The listener's place in the board, kept for as long as its name exists.
    pub id: usize,
    /// With the port that was really bound.
    pub listener: Listener,
    pub pool: usize,
}

impl Entry {
    /// Whether the same socket serves both.
    pub fn same_socket(&self, other: &Entry) -> bool {
        let key = |entry: &Entry| -> (Protocol, SocketAddr) { (entry.listener.protocol, entry.listener.listen) };
        key(self) == key(other)
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Targets {
    pub name: String,
    pub source: Option<IpAddr>,
    pub targets: Vec<Target>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Target {
    /// The backend's place in the board.
    pub slot: usize,
    pub name: String,
    pub addr: SocketAddr,
    /// Most connections; 0 for no limit.
    pub connections: u32,
}

/// One line of JSON each on the control socket.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ToWorker {
    Table(Table),
    /// End every flow of a backend.
    Evict {
        slot: usize,
    },
    /// Accept no more and end when the last connection does, or after this many milliseconds.
    Drain {
        within_ms: u64,
    },
}

#[derive(Debug, Serialize, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum FromWorker {
    Applied { version: u64 },
    Failed { version: u64, message: String },
}
