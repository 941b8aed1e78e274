//! One container on a node: what it should be, and what the node agent last saw.
//!
//! Every container is a slot. It waits warm and unowned, or it is used by one instance, once; it is never recycled.

use crate::Millis;
use crate::ids::{InstanceId, SlotId};

/// What the control plane wants of a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum SlotTarget {
    /// Exists; unclaimed it waits, claimed it runs.
    Present,
    /// Stopped by SIGTERM, then SIGKILL at its deadline, then removed with its network.
    Absent,
}

/// What the node agent sees. `Unknown` is a value: somebody looked and could not tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SlotState {
    /// Certainly nothing there.
    Absent,
    /// The image is being fetched or the container made.
    Creating,
    /// The init waits for a claim, or an app does that is warm and awake.
    Waiting,
    /// The app runs, answered once, and is frozen.
    Frozen,
    /// Claimed; the process starts or does not answer yet.
    Starting,
    /// Claimed and answering.
    Running,
    /// Claimed; the process ended and will be started again at the end of its back-off.
    Restarting,
    /// Claimed; the process ended and stays so.
    Exited,
    /// It could not be made or started; the report says why.
    Failed,
    /// On its way out.
    Stopping,
    /// Docker or the init did not answer.
    Unknown,
}

impl SlotState {
    pub const ALL: [Self; 11] = [
        Self::Absent,
        Self::Creating,
        Self::Waiting,
        Self::Frozen,
        Self::Starting,
        Self::Running,
        Self::Restarting,
        Self::Exited,
        Self::Failed,
        Self::Stopping,
        Self::Unknown,
    ];

    /// Can be claimed at once.
    pub fn is_ready(self) -> bool {
        matches!(self, Self::Waiting | Self::Frozen)
    }

    /// Must change by itself within a deadline ([`crate::lifecycle::deadline_ms`]).
    pub fn is_transient(self) -> bool {
        matches!(self, Self::Creating | Self::Starting | Self::Restarting | Self::Stopping | Self::Unknown)
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Absent => "absent",
            Self::Creating => "creating",
            Self::Waiting => "waiting",
            Self::Frozen => "frozen",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Restarting => "restarting",
            Self::Exited => "exited",
            Self::Failed => "failed",
            Self::Stopping => "stopping",
            Self::Unknown => "unknown",
        }
    }

    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|state| state.name() == text)
    }
}

/// Why a process or container ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Exit {
    Code(i32),
    Signal(i32),
    /// The kernel's memory killer; the exit code is not to be trusted then.
    OutOfMemory,
}

/// Kinds of failure that survive the wire as values, so that callers can tell slow from broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum FailureKind {
    /// The reference does not exist or may not be fetched.
    ImageMissing,
    /// The command does not exist in the image or is not executable.
    Command,
    OutOfMemory,
    /// It ran but did not answer within the template's deadline.
    Probe,
    /// It ended, again and again.
    CrashLoop,
    /// A file or volume could not be provided.
    Volume,
    /// The node's disk is full.
    DiskFull,
    Network,
    /// Docker refused or did not answer in time.
    Runtime,
    Internal,
}

impl FailureKind {
    pub const ALL: [Self; 10] = [
        Self::ImageMissing,
        Self::Command,
        Self::OutOfMemory,
        Self::Probe,
        Self::CrashLoop,
        Self::Volume,
        Self::DiskFull,
        Self::Network,
        Self::Runtime,
        Self::Internal,
    ];

    /// The stable code people and programs see.
    pub fn code(self) -> &'static str {
        match self {
            Self::ImageMissing => "image_missing",
            Self::Command => "command_failed",
            Self::OutOfMemory => "out_of_memory",
            Self::Probe => "probe_timeout",
            Self::CrashLoop => "crash_loop",
            Self::Volume => "volume_failed",
            Self::DiskFull => "node_disk_full",
            Self::Network => "network_failed",
            Self::Runtime => "runtime_failed",
            Self::Internal => "internal",
        }
    }

    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.code() == text)
    }

    /// What a person can do about it.
    pub fn hint(self) -> &'static str {
        match self {
            Self::ImageMissing => "Check the image's name and tag, and that it may be pulled without credentials.",
            Self::Command => {
                "Check argv and that the program exists in the image and is executable by the workload's user."
            }
            Self::OutOfMemory => "Use less memory or choose a larger tier.",
            Self::Probe => "Check that it listens on the configured port, and its log for what it waits for.",
            Self::CrashLoop => "Read the last log lines: the process ends by itself.",
            Self::Volume => "Check the volume's path and size.",
            Self::DiskFull => "Nothing on your side: the host is out of disk and its operator was told.",
            Self::Network | Self::Runtime | Self::Internal => "Nothing on your side: it is tried again, or restart it.",
        }
    }

    /// Whether making another instance of the same release can help without anybody changing anything.
    pub fn is_transient(self) -> bool {
        matches!(self, Self::DiskFull | Self::Network | Self::Runtime | Self::Internal)
    }
}

/// A failure with its last words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    pub kind: FailureKind,
    pub message: String,
    pub exit: Option<Exit>,
    /// Last lines of the process's output, oldest first; at most [`LOG_TAIL_LINES`].
    pub log_tail: Vec<String>,
}

pub const LOG_TAIL_LINES: usize = 20;

/// A named step of a deploy and how long it took, in microseconds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    pub name: String,
    pub micros: u64,
}

/// The node agent's report about one slot. A later report of the same slot has a higher `sequence`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlotReport {
    pub slot: SlotId,
    /// The desired generation this report is about; reports about an older one are history.
    pub generation: i64,
    /// Whose claim it runs, if any.
    pub instance: Option<InstanceId>,
    pub state: SlotState,
    /// How many times the process was started.
    pub run: u32,
    pub container: Option<String>,
    /// `sha256:…` of the image it runs, once known.
    pub image_digest: Option<String>,
    pub failure: Option<Failure>,
    pub steps: Vec<Step>,
    pub at: Millis,
}
