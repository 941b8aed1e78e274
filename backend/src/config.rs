//! What the operator may set.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

/// The HTTP listener, the node stream's listener, and their bounds.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// The public API, the console and the documentation.
    pub listen: SocketAddr,
    /// Where node agents dial in, by mutual TLS.
    pub node_listen: SocketAddr,
    /// Names and addresses in the node stream's certificate, beside the listening address.
    pub node_names: Vec<String>,
    /// How browsers reach the console. `https` makes the session cookie Secure and bound to the host.
    pub public_url: String,
    /// Proxies of ours in front, each adding one entry to X-Forwarded-For; 0: the header is not believed.
    pub proxies: usize,
    pub http: clawhq_listener::Limits,
    pub limits: Limits,
}

/// Bounds on what one client may ask at once. An org's own rate is in the tier table.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Largest request body, in bytes.
    pub body_bytes: usize,
    /// Longest time for a request's body to arrive.
    pub body_seconds: u64,
    /// Longest time for an answer of an operation that waits for nothing.
    pub request_seconds: u64,
    /// Requests a second from one address (IPv6: one /64), and how many may come at once.
    pub address_per_second: u32,
    pub address_burst: u32,
    /// Tries to sign in a minute, for one account from one address.
    pub sign_in_per_minute: u32,
    /// New accounts a minute from one address.
    pub sign_up_per_minute: u32,
    /// Requests a minute of one person's browsers; an org's tier bounds its API keys.
    pub session_per_minute: u32,
    /// Multiplies every org's rate; for load tests.
    pub org_rate_factor: u32,
    /// Open log, event, exec and terminal streams of one org.
    pub streams_per_org: usize,
    /// Log lines of one answer.
    pub log_lines: usize,
    /// Bytes of one exec's output.
    pub exec_bytes: usize,
    /// Connections of nodes at once; those that are not known for a node's yet have a smaller room of their own.
    pub node_connections: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 4180)),
            node_listen: SocketAddr::from(([127, 0, 0, 1], 4182)),
            node_names: vec!["localhost".to_owned()],
            public_url: "http://localhost:4180".to_owned(),
            proxies: 0,
            http: clawhq_listener::Limits::default(),
            limits: Limits::default(),
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            body_bytes: 1024 * 1024,
            body_seconds: 20,
            request_seconds: 30,
            address_per_second: 100,
            address_burst: 400,
            sign_in_per_minute: 10,
            sign_up_per_minute: 20,
            session_per_minute: 1200,
            org_rate_factor: 1,
            streams_per_org: 64,
            log_lines: 10_000,
            exec_bytes: 1024 * 1024,
            node_connections: 1024,
        }
    }
}

impl Config {
    /// Whether browsers speak TLS with us.
    pub fn is_https(&self) -> bool {
        self.public_url.starts_with("https://")
    }
}
