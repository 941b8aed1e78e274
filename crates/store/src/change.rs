//! What every mutation takes with it into its transaction: idempotency, events, audit and wake-ups.

use std::net::IpAddr;

use clawhq_domain::ids::{ApiKeyId, EventId, InstanceId, OrgId, RequestId, UserId, WorkloadId};
use serde_json::Value;

use crate::row::Id;

/// An `Idempotency-Key` with what it was sent for. Keys of different orgs or routes never meet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IdempotencyKey {
    /// Method and path template, such as `POST /orgs/{org}/workloads`.
    pub route: String,
    /// As the client sent it; 1 to 255 bytes, checked by the caller.
    pub key: String,
    /// SHA-256 of what makes two requests the same.
    pub request_hash: [u8; 32],
}

/// An entry of the activity feed that members read.
#[derive(Clone, Debug, PartialEq)]
pub struct NewEvent {
    pub id: EventId,
    pub workload: Option<WorkloadId>,
    pub instance: Option<InstanceId>,
    /// Such as `workload.created`.
    pub kind: String,
    /// One sentence for a person.
    pub message: String,
    /// For programs; an object.
    pub data: Value,
}

/// Who did something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Actor {
    User(UserId),
    ApiKey(ApiKeyId),
    /// A part of the platform: `worker`, `pool-manager`, `node`, `operator`.
    System(&'static str),
}

/// An entry of the audit log; append-only.
#[derive(Clone, Debug, PartialEq)]
pub struct NewAudit {
    pub actor: Actor,
    /// Such as `workload.create`.
    pub action: &'static str,
    /// The id of what it was done to, in its text form.
    pub object: String,
    pub ip: Option<IpAddr>,
    pub request: Option<RequestId>,
    /// An object; never a secret's value.
    pub detail: Value,
}

/// A job to be, committed with the change that wants it. It says what to look at, never what is true.
#[derive(Clone, Debug, PartialEq)]
pub struct Wakeup {
    /// The job's queue.
    pub topic: &'static str,
    /// Waiting jobs of one topic and key are one job.
    pub key: String,
    pub payload: Value,
}

impl Wakeup {
    /// The queue whose jobs look at one workload. Payload: [`WorkloadWakeup`].
    pub const WORKLOAD: &'static str = "workload";

    pub fn workload(org: OrgId, workload: WorkloadId) -> Self {
        let (org, workload) = (org.uuid().to_string(), workload.uuid().to_string());
        let payload = serde_json::json!({ "org": org, "workload": workload });
        Self { topic: Self::WORKLOAD, key: workload, payload }
    }
}

/// The payload of a [`Wakeup::WORKLOAD`] job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WorkloadWakeup {
    pub org: OrgId,
    pub workload: WorkloadId,
}

impl WorkloadWakeup {
    /// `None`: not such a payload.
    pub fn parse(payload: &Value) -> Option<Self> {
        let id = |field| uuid::Uuid::parse_str(payload.get(field)?.as_str()?).ok();
        Some(Self { org: Id::from_uuid(id("org")?), workload: Id::from_uuid(id("workload")?) })
    }
}

/// What goes into the transaction beside the mutation itself. With a key that was seen before, the mutation is not
/// made and the call returns [`StoreError::Replay`](crate::StoreError::Replay).
#[derive(Clone, Debug, Default)]
pub struct Change {
    pub idempotency: Option<IdempotencyKey>,
    pub events: Vec<NewEvent>,
    pub audit: Option<NewAudit>,
    pub wakeups: Vec<Wakeup>,
}
