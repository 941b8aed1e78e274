//! Workloads: what a tenant deploys, its releases and instances, and what can be done inside them.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Whether a deploy may or must use a warm slot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Warm {
    /// A warm slot if there is one, else a cold start.
    #[default]
    Prefer,
    /// A warm slot or nothing: refused with `no_warm_slot` when there is none.
    Require,
    /// Always a cold start.
    Never,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Protocol {
    Http,
    Tcp,
    Udp,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Port {
    #[schema(min_length = 1, max_length = 32, example = "http")]
    pub name: String,
    #[schema(minimum = 1, maximum = 65535, example = 8080)]
    pub port: u16,
    pub protocol: Protocol,
}

/// A directory that outlives the container.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Volume {
    #[schema(max_length = 512, example = "/var/lib/agent")]
    pub path: String,
    #[schema(minimum = 1, example = 512)]
    pub size_mib: u32,
}

/// A secret of the org, by name, and where its value appears: one of `env` and `file`, or else the variable of its name.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SecretRef {
    #[schema(max_length = 128, example = "OPENAI_API_KEY")]
    pub name: String,
    /// An environment variable.
    #[schema(max_length = 128, example = "OPENAI_API_KEY")]
    pub env: Option<String>,
    /// An absolute path; the file is readable by the workload's user alone and never on a disk.
    #[schema(max_length = 512)]
    pub file: Option<String>,
    /// Answers: the version this release was made with. Requests: ignored; a new release takes the newest.
    #[schema(minimum = 1)]
    pub version: Option<u32>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct FileEntry {
    #[schema(max_length = 512, example = "/etc/agent/config.json")]
    pub path: String,
    #[schema(max_length = 262144)]
    pub content: String,
    /// Permission bits as a number (420 is 0644); 420 when absent.
    #[schema(maximum = 511, example = 420)]
    pub mode: Option<u32>,
}

/// What a tenant may say about a workload; all else comes from the template or the image.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Environment variables; at most 200, and 128 KiB in all.
    pub env: BTreeMap<String, String>,
    #[schema(max_items = 100)]
    pub secrets: Vec<SecretRef>,
    #[schema(max_items = 50)]
    pub files: Vec<FileEntry>,
    /// What to run, instead of the template's or the image's own command.
    #[schema(min_items = 1, max_items = 100)]
    pub argv: Option<Vec<String>>,
    /// Instead of the template's. An image is reachable only on ports listed here.
    #[schema(max_items = 16)]
    pub ports: Option<Vec<Port>>,
    /// Instead of the template's.
    pub volume: Option<Volume>,
    /// Images only: the user to run as; 10001 when absent, never 0.
    #[schema(minimum = 1, maximum = 65535)]
    pub uid: Option<u32>,
}

/// Exactly one of `template` and `image` is given.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateWorkload {
    /// 1 to 40 characters of a-z, 0-9 and single hyphens, starting with a letter; unique in the org; invented when absent.
    #[schema(min_length = 1, max_length = 40, pattern = "^[a-z]([a-z0-9]|-[a-z0-9])*$", example = "my-agent")]
    pub name: Option<String>,
    #[schema(max_length = 40, example = "hello")]
    pub template: Option<String>,
    /// An OCI image reference that can be pulled without credentials.
    #[schema(max_length = 255)]
    pub image: Option<String>,
    /// At most the org's own, which it is when absent.
    #[schema(max_length = 32, example = "free")]
    pub tier: Option<String>,
    #[serde(default)]
    pub config: Config,
    #[serde(default)]
    pub warm: Warm,
}

/// A new release; what is absent stays as it is. `config` is replaced as a whole.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct UpdateWorkload {
    pub config: Option<Config>,
    /// Image workloads only.
    #[schema(max_length = 255)]
    pub image: Option<String>,
    #[schema(max_length = 32, example = "pro")]
    pub tier: Option<String>,
}

/// What a person sees of a workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum State {
    Queued,
    Starting,
    Running,
    /// A newer release is on its way while the older one serves.
    Updating,
    Restarting,
    Stopping,
    Stopped,
    Failed,
    Unreachable,
    Deleting,
    Deleted,
}

impl State {
    pub const ALL: [Self; 11] = [
        Self::Queued,
        Self::Starting,
        Self::Running,
        Self::Updating,
        Self::Restarting,
        Self::Stopping,
        Self::Stopped,
        Self::Failed,
        Self::Unreachable,
        Self::Deleting,
        Self::Deleted,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Updating => "updating",
            Self::Restarting => "restarting",
            Self::Stopping => "stopping",
            Self::Stopped => "stopped",
            Self::Failed => "failed",
            Self::Unreachable => "unreachable",
            Self::Deleting => "deleting",
            Self::Deleted => "deleted",
        }
    }

    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|state| state.name() == text)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Desired {
    Running,
    Stopped,
    Deleted,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum PlacementKind {
    Warm,
    Cold,
    Queued,
}

/// Why it is in this state, and what to do about it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Reason {
    #[schema(example = "out_of_memory")]
    pub code: String,
    #[schema(example = "The process used more than 256 MiB and was ended.")]
    pub message: String,
    #[schema(example = "Use less memory or choose a larger tier.")]
    pub hint: Option<String>,
    /// The last lines of output, oldest first.
    pub log_tail: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Image {
    #[schema(example = "clawhq/hello:1")]
    pub r#ref: String,
    /// Null until a node has resolved the reference, and fixed from then on.
    #[schema(example = "sha256:3c5d…")]
    pub digest: Option<String>,
}

/// A named step of a deploy.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Step {
    #[schema(example = "claim")]
    pub name: String,
    #[schema(example = 0.62)]
    pub ms: f64,
}

/// Its place in the queue.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Queue {
    /// 1 is next.
    pub position: u32,
    /// A guess; null when there is nothing to guess from.
    pub estimate_ms: Option<i64>,
}

/// How the deploy came to its container.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Placement {
    pub kind: PlacementKind,
    pub steps: Vec<Step>,
    /// From the request's arrival to the answer, or to the first byte answered by the workload when that was waited for.
    #[schema(example = 7.4)]
    pub total_ms: f64,
    pub queue: Option<Queue>,
}

/// How to reach it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Access {
    #[schema(example = "http://my-agent-ada.localhost:4181")]
    pub url: Option<String>,
    /// A credential minted for this workload. It is shown once, here.
    pub token: Option<String>,
}

/// One immutable version of a workload's config.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Release {
    #[schema(example = "rel_01k2m3n4p5q6r7s8t9v0w1x2y3")]
    pub id: String,
    /// Counts up within the workload.
    #[schema(example = 1)]
    pub number: i64,
    pub image: Image,
    pub config: Config,
    pub created_at: DateTime<Utc>,
    /// The person that made it; null for a program.
    pub created_by: Option<String>,
    /// What changed against the release before; secrets as names and versions only.
    pub diff: Vec<Change>,
}

/// One line of a difference.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Change {
    #[schema(example = "env.LOG_LEVEL")]
    pub field: String,
    #[schema(example = "info")]
    pub before: Option<String>,
    #[schema(example = "debug")]
    pub after: Option<String>,
}

/// One container of a workload.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Instance {
    #[schema(example = "ins_01k2m3n4p5q6r7s8t9v0w1x2y3")]
    pub id: String,
    pub workload_id: String,
    pub release_id: String,
    pub placement: PlacementKind,
    /// As the node last reported it.
    #[schema(example = "running")]
    pub state: String,
    pub reason: Option<Reason>,
    pub queued_at: Option<DateTime<Utc>>,
    /// When the process that runs, or ran last, was started: anew with each restart.
    pub started_at: Option<DateTime<Utc>>,
    pub ready_at: Option<DateTime<Utc>>,
    pub ended_at: Option<DateTime<Utc>>,
    /// How often its process was started again.
    pub restarts: u32,
    pub exit_code: Option<i32>,
    pub steps: Vec<Step>,
    pub total_ms: Option<f64>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Workload {
    #[schema(example = "wl_01k2m3n4p5q6r7s8t9v0w1x2y3")]
    pub id: String,
    #[schema(example = "my-agent")]
    pub name: String,
    #[schema(example = "org_01k2m3n4p5q6r7s8t9v0w1x2y3")]
    pub org_id: String,
    /// Null for a bare image.
    #[schema(example = "hello")]
    pub template: Option<String>,
    pub image: Image,
    #[schema(example = "free")]
    pub tier: String,
    pub state: State,
    /// Why, unless all is well.
    pub reason: Option<Reason>,
    pub desired: Desired,
    /// Null when it has no HTTP port.
    #[schema(example = "http://my-agent-ada.localhost:4181")]
    pub url: Option<String>,
    pub warm: Warm,
    /// What it should run.
    pub release: Release,
    /// What it runs; null when it has no container.
    pub instance: Option<Instance>,
    /// While `state` is `queued`.
    pub queue: Option<Queue>,
    /// Changes with every change of this answer but `queue`; the ETag without its quotes.
    pub resource_version: String,
    pub created_at: DateTime<Utc>,
    pub updated_at: DateTime<Utc>,
}

/// A deploy's answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Deployed {
    pub workload: Workload,
    pub access: Access,
    pub placement: Placement,
}

/// What an update would change.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct DryRun {
    pub diff: Vec<Change>,
}

/// A command to run inside the container, as the workload's user.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Exec {
    /// The program and its arguments; no shell is involved.
    #[schema(min_items = 1, max_items = 100, example = json!(["/bin/hello", "--version"]))]
    pub argv: Vec<String>,
    /// Text for its standard input, which is then closed.
    #[schema(max_length = 262144)]
    pub stdin: Option<String>,
    /// It is killed after this long; 30 000 when absent.
    #[schema(minimum = 1, maximum = 300000, example = 10000)]
    pub timeout_ms: Option<u32>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ExecResult {
    pub exit_code: i32,
    /// Bytes that are not UTF-8 are replaced.
    pub stdout: String,
    pub stderr: String,
    /// The output was longer than 1 MiB and was cut.
    pub truncated: bool,
    pub duration_ms: f64,
}

/// Opens one terminal, once, within its life.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct TerminalTicket {
    pub ticket: String,
    pub expires_at: DateTime<Utc>,
}
