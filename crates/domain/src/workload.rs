//! What a tenant deploys, as the decisions see it.

use crate::Millis;
use crate::ids::{InstanceId, NodeId, ReleaseId, SlotId};
use crate::slot::{Failure, SlotState};

/// What the org wants of a workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Desired {
    Running,
    Stopped,
    Deleted,
}

impl Desired {
    pub const ALL: [Self; 3] = [Self::Running, Self::Stopped, Self::Deleted];

    pub fn name(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Stopped => "stopped",
            Self::Deleted => "deleted",
        }
    }

    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|desired| desired.name() == text)
    }
}

/// Whether a deploy may or must use a warm slot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum ClaimPolicy {
    #[default]
    Prefer,
    Require,
    Never,
}

impl ClaimPolicy {
    pub const ALL: [Self; 3] = [Self::Prefer, Self::Require, Self::Never];

    pub fn name(self) -> &'static str {
        match self {
            Self::Prefer => "prefer",
            Self::Require => "require",
            Self::Never => "never",
        }
    }

    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|policy| policy.name() == text)
    }
}

/// How an instance came to its container.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum PlacementKind {
    Warm,
    Cold,
    Queued,
}

impl PlacementKind {
    pub fn name(self) -> &'static str {
        match self {
            Self::Warm => "warm",
            Self::Cold => "cold",
            Self::Queued => "queued",
        }
    }

    pub fn parse(text: &str) -> Option<Self> {
        [Self::Warm, Self::Cold, Self::Queued].into_iter().find(|kind| kind.name() == text)
    }
}

/// Whether the control plane hears from a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum NodeHealth {
    /// A report came within [`crate::lifecycle::NODE_SILENT_MS`].
    Live,
    Silent,
}

/// An instance as the control plane last heard of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InstanceView {
    pub id: InstanceId,
    pub release: ReleaseId,
    /// `None` while it waits in the queue, and again when its slot is certainly gone.
    pub slot: Option<SlotId>,
    pub node: Option<NodeId>,
    pub node_health: NodeHealth,
    pub observed: SlotState,
    pub failure: Option<Failure>,
    /// When `observed` last changed.
    pub since: Millis,
    /// The control plane asked its slot to go.
    pub leaving: bool,
    /// It had answered at least once.
    pub was_ready: bool,
}

/// A workload with its instances, newest last. Instances that are gone are not listed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkloadView {
    pub desired: Desired,
    pub release: ReleaseId,
    /// A state volume makes it a single writer: never two instances at once (promise P7).
    pub single_writer: bool,
    /// Instances of this release that failed for a transient cause in a row.
    pub failures_in_a_row: u32,
    pub last_failure_at: Option<Millis>,
    pub instances: Vec<InstanceView>,
}
