//! The catalogue's entries: what an image needs and how it becomes a tenant's.

use std::collections::BTreeMap;

use crate::names::{EnvName, ImageRef, TemplateName};

/// How a slot of this template becomes the tenant's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum WarmMode {
    /// Our init waits; the claim starts the tenant's process.
    Exec,
    /// The app runs already; the claim brings files and a reload (a signal, or an HTTP path it is told at).
    App,
    /// The app is started, ready and frozen, with credentials minted at pool time; the claim thaws and assigns it.
    Frozen,
    /// Never pooled.
    None,
}

/// What a port speaks, as far as the edge must know.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Protocol {
    Http,
    Tcp,
    Udp,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Port {
    pub name: String,
    pub port: u16,
    pub protocol: Protocol,
}

/// How the node agent knows that the tenant's process answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Probe {
    /// No port: started is ready.
    Started,
    /// A connection is accepted inside the container's network namespace.
    Tcp { port: u16 },
    /// A status below 400 for a GET; `expect` must be part of the body when given.
    Http { port: u16, path: String, expect: Option<String> },
}

/// A request that an app is sent at pool time, once it is ready: what it loads at its first use is then not loaded while a
/// tenant waits. A `POST` of JSON with a body, else a `GET`; what it answers does not matter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WarmUp {
    pub port: u16,
    pub path: String,
    /// The variable whose value is sent as a bearer token.
    pub bearer: Option<EnvName>,
    pub body: Option<String>,
}

/// Where the app keeps what must outlive its container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StateVolume {
    pub path: String,
    pub size_mib: u32,
}

/// A sized tmpfs on the read-only root.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tmpfs {
    pub path: String,
    pub size_mib: u32,
    /// Agents that build and run things need it; off unless asked for.
    pub exec: bool,
}

/// A credential the platform mints for each slot (pool time) or instance (cold) and gives as an environment variable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MintedToken {
    pub env: EnvName,
    /// Random bytes before base64url encoding.
    pub bytes: u8,
}

/// A file the platform writes before the app starts; `{{NAME}}` in the content is replaced by that variable's value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TemplateFile {
    pub path: String,
    pub mode: u32,
    pub content: String,
    /// Keep what is there: the file belongs to the state volume and is only seeded.
    pub only_if_absent: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Template {
    pub name: TemplateName,
    pub title: String,
    pub description: String,
    /// A family of icons and colours the console knows.
    pub icon: String,
    pub image: ImageRef,
    /// `sha256:…`, of the manifest or of the image itself; `None` leaves it to each node what the reference is.
    pub image_digest: Option<String>,
    /// Empty: the image's own entry point and command.
    pub argv: Vec<String>,
    pub env: BTreeMap<EnvName, String>,
    pub working_dir: Option<String>,
    pub uid: u32,
    pub gid: u32,
    pub ports: Vec<Port>,
    pub probe: Probe,
    /// From the start of the process to its first answer; then the instance has failed.
    pub start_deadline_ms: u32,
    /// From SIGTERM to SIGKILL.
    pub stop_deadline_ms: u32,
    /// The least memory it runs in, in MiB.
    pub least_memory_mib: u32,
    pub least_pids: u32,
    pub warm_mode: WarmMode,
    /// Warm slots of this template at most, whatever the tier's target; frozen apps hold real memory.
    pub warm_limit: Option<u32>,
    /// In this order.
    pub warm_up: Vec<WarmUp>,
    pub state: Option<StateVolume>,
    pub tmpfs: Vec<Tmpfs>,
    pub minted: Vec<MintedToken>,
    pub files: Vec<TemplateFile>,
    /// JSON Schema text of what a tenant may configure; shown by the console, checked by the API.
    pub config_schema: Option<String>,
    /// Listed in the catalogue but not yet deployable here (needs port leases, say): the reason.
    pub unavailable: Option<String>,
}

impl Template {
    /// Whether two templates make interchangeable slots.
    pub fn is_pooled(&self) -> bool {
        self.warm_mode != WarmMode::None && self.unavailable.is_none()
    }
}
