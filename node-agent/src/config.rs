//! What the operator may set. Every field has a default that suits `clawhq up` on one machine.

use std::net::IpAddr;
use std::path::PathBuf;

use clawhq_runtime::config::Secret;
use serde::{Deserialize, Serialize};

/// Configuration of one node agent.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// The data directory; ours are `node/` (identity, ledger, sockets) and `volumes/` below it.
    pub data_dir: PathBuf,
    /// `unix:///path/docker.sock`.
    pub docker_host: String,
    /// An OCI runtime registered with that Docker (such as `runsc`); none: Docker's default.
    pub runtime: Option<String>,
    /// The control plane's node stream, `https://host:port`.
    pub control_plane: String,
    /// The name its certificate must carry.
    pub server_name: String,
    /// PEM file of our certificate authority.
    pub ca_file: PathBuf,
    /// One-time token of a first enrolment; ignored once there is a certificate.
    pub join_token: Option<Secret>,
    /// A file that holds it; removed when used.
    pub join_token_file: Option<PathBuf>,
    /// The static `init` that is mounted into every container.
    pub init_binary: PathBuf,
    /// Images fetched at start, so that a first slot need not wait for one.
    pub preload_images: Vec<String>,
    /// Memory this node offers, MiB; 0: the machine's less an eighth.
    pub memory_mib: u64,
    pub network: Network,
    pub limits: Limits,
}

/// The containers' way out.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Network {
    /// Off: containers have loopback alone (and are still reached through it).
    pub egress: bool,
    /// Resolvers the containers are given; also reached when their address is private.
    pub dns: Vec<IpAddr>,
    /// Up to 4 hexadecimal digits that keep several node agents on one machine apart; empty on a host of its own.
    pub key: String,
    /// New connections a second of one container.
    pub new_connections_per_second: u32,
    /// Connections at once of one container.
    pub connections_max: u32,
}

/// Bounds of the work beside the claims, and of what every container gets.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Containers made at once: Docker is bound by the processor, more only stretch each.
    pub creates: usize,
    /// Containers removed at once.
    pub removes: usize,
    pub nofile: u64,
    /// Size of one of the two log files kept of a container.
    pub log_mib: u32,
    /// A fetch of an image may take this long, seconds.
    pub pull_deadline_s: u64,
    /// Channels (logs, exec, terminal) open at once.
    pub channels: usize,
    /// Ingress connections open at once.
    pub ingress_connections: usize,
    /// Of them, those of one slot: a tenant's visitors leave room for the others'.
    pub ingress_connections_per_slot: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            data_dir: PathBuf::from("data"),
            docker_host: "unix:///var/run/docker.sock".to_owned(),
            runtime: None,
            control_plane: "https://127.0.0.1:4182".to_owned(),
            server_name: "control-plane.clawhq.internal".to_owned(),
            ca_file: PathBuf::from("data/ca/ca.pem"),
            join_token: None,
            join_token_file: None,
            init_binary: PathBuf::from("init"),
            preload_images: Vec::new(),
            memory_mib: 0,
            network: Network::default(),
            limits: Limits::default(),
        }
    }
}

impl Default for Network {
    fn default() -> Self {
        Self {
            egress: true,
            dns: vec![IpAddr::from([1, 1, 1, 1]), IpAddr::from([9, 9, 9, 9])],
            key: String::new(),
            new_connections_per_second: 100,
            connections_max: 512,
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            creates: 2,
            removes: 4,
            nofile: 8192,
            log_mib: 5,
            pull_deadline_s: 600,
            channels: 256,
            ingress_connections: 8192,
            ingress_connections_per_slot: 2048,
        }
    }
}

impl Config {
    pub fn node_dir(&self) -> PathBuf {
        self.data_dir.join("node")
    }

    /// Where the edge reaches this node's containers.
    pub fn ingress_socket(&self) -> PathBuf {
        self.node_dir().join("ingress.sock")
    }

    /// Mounted read-only as `/.clawhq` into every container.
    pub fn init_dir(&self) -> PathBuf {
        self.node_dir().join("init")
    }

    pub fn volumes_dir(&self) -> PathBuf {
        self.data_dir.join("volumes")
    }
}
