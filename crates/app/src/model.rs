//! What people and programs are told, before it becomes JSON.

use clawhq_domain::Millis;
use clawhq_domain::Reason;
use clawhq_domain::access::Role;
use clawhq_domain::ids::*;
use clawhq_domain::lifecycle::{Phase, Shown};
use clawhq_domain::release::{Change, Release};
use clawhq_domain::slot::{Failure, Step};
use clawhq_domain::workload::{ClaimPolicy, Desired, PlacementKind};

#[derive(Clone, Debug)]
pub struct User {
    pub id: UserId,
    pub email: String,
    pub created_at: Millis,
}

#[derive(Clone, Debug)]
pub struct Membership {
    pub org: OrgId,
    pub slug: String,
    pub name: String,
    pub tier: String,
    pub role: Role,
}

/// A new session; `token` is the cookie's value, known only now.
pub struct SignedIn {
    pub token: String,
    pub session: SessionId,
    pub expires_at: Millis,
    pub user: User,
    pub orgs: Vec<Membership>,
}

#[derive(Clone, Debug)]
pub struct SessionInfo {
    pub id: SessionId,
    pub created_at: Millis,
    pub last_seen_at: Millis,
    pub expires_at: Millis,
    pub user_agent: Option<String>,
    pub ip: Option<String>,
    /// The one that asks.
    pub current: bool,
}

#[derive(Clone, Debug)]
pub struct Org {
    pub id: OrgId,
    pub slug: String,
    pub name: String,
    pub tier: String,
    pub created_at: Millis,
    pub version: i64,
}

#[derive(Clone, Debug)]
pub struct Member {
    pub user: UserId,
    pub email: String,
    pub role: Role,
    pub joined_at: Millis,
}

#[derive(Clone, Debug)]
pub struct ApiKey {
    pub id: ApiKeyId,
    pub name: String,
    /// The first characters, for recognition.
    pub prefix: String,
    pub created_at: Millis,
    pub expires_at: Option<Millis>,
    pub last_used_at: Option<Millis>,
}

#[derive(Clone, Debug)]
pub struct Secret {
    pub name: String,
    pub latest_version: u32,
    pub created_at: Millis,
    pub updated_at: Millis,
}

#[derive(Clone, Debug)]
pub struct SecretVersion {
    pub version: u32,
    pub created_at: Millis,
    pub created_by: Option<UserId>,
}

#[derive(Clone, Debug)]
pub struct Event {
    pub id: EventId,
    /// Grows within an org; the resume point of a stream.
    pub seq: i64,
    pub at: Millis,
    pub kind: String,
    pub message: String,
    pub workload: Option<WorkloadId>,
    pub instance: Option<InstanceId>,
    pub data: serde_json::Value,
}

#[derive(Clone, Debug)]
pub struct ReleaseInfo {
    pub id: ReleaseId,
    pub number: u32,
    pub created_at: Millis,
    pub created_by: Option<UserId>,
    pub release: Release,
    /// Against the release before it; empty for the first.
    pub changes: Vec<Change>,
}

#[derive(Clone, Debug)]
pub struct Instance {
    pub id: InstanceId,
    pub workload: WorkloadId,
    pub release: ReleaseId,
    pub release_number: u32,
    pub placement: PlacementKind,
    pub phase: Phase,
    pub node: Option<NodeId>,
    pub slot: Option<SlotId>,
    pub created_at: Millis,
    pub started_at: Option<Millis>,
    pub ready_at: Option<Millis>,
    pub ended_at: Option<Millis>,
    /// Starts of the process beyond the first.
    pub restarts: u32,
    pub steps: Vec<Step>,
    pub failure: Option<Failure>,
}

/// Its place in the queue, counted from 1, and a guess at the wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Queue {
    pub position: u32,
    pub estimate_ms: Option<Millis>,
    pub since: Millis,
}

#[derive(Clone, Debug)]
pub struct Workload {
    pub id: WorkloadId,
    pub org: OrgId,
    pub name: String,
    pub template: Option<String>,
    pub image: String,
    pub image_digest: Option<String>,
    pub tier: String,
    pub desired: Desired,
    pub shown: Shown,
    pub reason: Option<Reason>,
    /// Last output lines of a failed start.
    pub log_tail: Vec<String>,
    pub claim: ClaimPolicy,
    pub release: ReleaseInfo,
    /// The one that serves, or else the newest.
    pub instance: Option<Instance>,
    pub queue: Option<Queue>,
    /// Where the edge serves it; `None` without an HTTP port.
    pub url: Option<String>,
    /// Changes with everything that is shown; the resource's ETag.
    pub version: i64,
    pub created_at: Millis,
    pub updated_at: Millis,
}

/// A page of a list and where the next begins.
#[derive(Clone, Debug)]
pub struct Page<T> {
    pub items: Vec<T>,
    /// Opaque; `None` at the end.
    pub next_cursor: Option<String>,
}

/// Where a page begins and how long it may be.
#[derive(Clone, Debug)]
pub struct PageRequest {
    /// 1 to 200.
    pub limit: u32,
    pub cursor: Option<String>,
}

/// What a create, update or start led to, for the answer and its `Server-Timing`.
#[derive(Clone, Debug)]
pub struct Deployed {
    pub workload: Workload,
    /// `None` for a dry run.
    pub placement: Option<PlacementKind>,
    /// The control plane's own steps, then the node's.
    pub steps: Vec<Step>,
    pub total_micros: u64,
    /// A credential the platform minted: told once, here.
    pub access_token: Option<String>,
    /// It was made by an earlier request with the same key.
    pub replayed: bool,
}
