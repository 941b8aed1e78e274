//! What the node agent needs of a container runtime, as a narrow trait, and its errors. `docker` is the only adapter.

use std::collections::HashMap;
use std::path::PathBuf;
use std::pin::Pin;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use clawhq_domain::ids::{NodeId, SlotId, VolumeId};
use clawhq_domain::slot::FailureKind;
use futures::stream::BoxStream;
use tokio::io::AsyncWrite;

/// Where containers see the init.
pub const INIT_MOUNT: &str = "/.clawhq";

/// Labels on every container of ours; what does not carry [`LABEL_DATA`] with our value is not ours and never touched.
pub const LABEL_NODE: &str = "clawhq.node";
pub const LABEL_SLOT: &str = "clawhq.slot";
pub const LABEL_VOLUME: &str = "clawhq.volume";
/// The fingerprint of the data directory whose ledger knows the container.
pub const LABEL_DATA: &str = "clawhq.data";

#[derive(Clone, Debug, thiserror::Error)]
pub enum RuntimeError {
    /// The daemon does not answer: nothing is known.
    #[error("Docker does not answer: {0}")]
    Away(String),
    #[error("there is no such container")]
    Gone,
    #[error("the image is not there: {0}")]
    NoImage(String),
    #[error("{0}")]
    NoCommand(String),
    #[error("the disk is full: {0}")]
    DiskFull(String),
    #[error("Docker refused: {0}")]
    Refused(String),
    #[error("not done in time: {0}")]
    Late(String),
}

impl RuntimeError {
    pub fn kind(&self) -> FailureKind {
        match self {
            Self::NoImage(_) => FailureKind::ImageMissing,
            Self::NoCommand(_) => FailureKind::Command,
            Self::DiskFull(_) => FailureKind::DiskFull,
            Self::Away(_) | Self::Gone | Self::Refused(_) | Self::Late(_) => FailureKind::Runtime,
        }
    }
}

pub type Result<T, E = RuntimeError> = std::result::Result<T, E>;

/// An image as it lies on this host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Image {
    /// `sha256:…` of its config: what a container is made from.
    pub id: String,
    /// The registry's digest if it came from one, else the id: what is reported.
    pub digest: String,
    /// Its own entry point followed by its command.
    pub argv: Vec<String>,
    /// Paths it declares as volumes: they would be unbounded and writable.
    pub volumes: Vec<String>,
}

/// Everything a container is made with; the profile that is the same for all is the adapter's.
#[derive(Clone, Debug)]
pub struct ContainerSpec {
    pub name: String,
    pub slot: SlotId,
    pub node: Option<NodeId>,
    pub data: String,
    pub image: Image,
    pub uid: u32,
    pub gid: u32,
    pub hostname: String,
    /// What it may use at most, MiB, swap included.
    pub memory_mib: u32,
    /// What is kept for it, MiB.
    pub memory_reserved_mib: u32,
    pub cpu_shares: u32,
    /// 0: no ceiling.
    pub cpu_millis: u32,
    pub pids: u32,
    pub nofile: u64,
    pub log_mib: u32,
    /// Path, size in MiB, executable.
    pub tmpfs: Vec<(String, u32, bool)>,
    /// Mounted read-only at [`INIT_MOUNT`].
    pub init_dir: PathBuf,
    pub resolv_conf: PathBuf,
    /// The volume, its mount on the host, its path inside.
    pub volume: Option<(VolumeId, PathBuf, String)>,
    pub runtime: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    Made,
    Up,
    Ended,
}

/// A container of ours.
#[derive(Clone, Debug)]
pub struct Listed {
    pub id: String,
    pub labels: HashMap<String, String>,
    pub phase: Phase,
}

#[derive(Clone, Debug)]
pub struct Inspected {
    pub phase: Phase,
    /// Of its PID 1, on the host.
    pub pid: Option<u32>,
    pub out_of_memory: bool,
}

#[derive(Clone, Debug)]
pub enum RuntimeEvent {
    Started { id: String },
    Died { id: String, exit_code: Option<i64> },
    OutOfMemory { id: String },
    Removed { id: String },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Output {
    Stdout,
    Stderr,
}

#[derive(Clone, Debug)]
pub struct LogLine {
    pub at_ms: i64,
    pub output: Output,
    pub line: Bytes,
}

#[derive(Clone, Copy, Debug)]
pub struct LogQuery {
    pub follow: bool,
    /// Milliseconds since the epoch; 0: from the beginning.
    pub since_ms: i64,
    /// The last so many lines; none: all.
    pub tail: Option<u32>,
    pub stdout: bool,
    pub stderr: bool,
}

pub struct ExecIo {
    pub id: String,
    pub output: BoxStream<'static, Result<(Output, Bytes)>>,
    pub input: Pin<Box<dyn AsyncWrite + Send>>,
}

/// A container runtime. Calls may take as long as the daemon lets them, up to the adapter's deadline, and any may be made
/// twice. Only containers that carry our data label are ever seen or touched.
#[async_trait]
pub trait ContainerRuntime: Send + Sync + 'static {
    /// Its name and version.
    async fn version(&self) -> Result<String>;
    async fn list(&self) -> Result<Vec<Listed>>;
    /// Ends with an error when the daemon goes away.
    fn events(&self) -> BoxStream<'static, Result<RuntimeEvent>>;
    /// Finds the image, fetches it if it is not there. `digest` pins it; empty: whatever the reference is now.
    async fn image(&self, reference: &str, digest: &str, deadline: Duration) -> Result<Image>;
    /// Makes a container and returns its id; one of the same name that is ours already is returned as it is.
    async fn create(&self, spec: &ContainerSpec) -> Result<String>;
    async fn start(&self, id: &str) -> Result<()>;
    async fn inspect(&self, id: &str) -> Result<Inspected>;
    async fn kill(&self, id: &str, signal: &str) -> Result<()>;
    /// By force, with its anonymous volumes. One that is gone already is a success.
    async fn remove(&self, id: &str) -> Result<()>;
    fn logs(&self, id: &str, query: LogQuery) -> BoxStream<'static, Result<LogLine>>;
    /// Starts `argv` inside; with `tty` its output is one stream.
    async fn exec(&self, id: &str, argv: Vec<String>, tty: bool) -> Result<ExecIo>;
    /// The exit code, or `None` while it runs; with its host pid.
    async fn exec_state(&self, exec: &str) -> Result<(Option<i32>, Option<u32>)>;
    async fn resize(&self, exec: &str, cols: u16, rows: u16) -> Result<()>;
}
