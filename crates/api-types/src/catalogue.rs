//! What can be deployed, and within which limits.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::workload::{Port, Volume};

/// How a warm slot of a template becomes the tenant's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum WarmMode {
    /// The container waits; the claim starts the process.
    Exec,
    /// The app runs already; the claim brings its files and a reload.
    App,
    /// The app is started, ready and frozen; the claim thaws it.
    Frozen,
    /// Always started from cold.
    None,
}

/// A catalogue entry.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Template {
    #[schema(example = "hello")]
    pub name: String,
    #[schema(example = "Hello")]
    pub title: String,
    pub description: String,
    #[schema(example = "spark")]
    pub icon: String,
    #[schema(example = "clawhq/hello:1")]
    pub image: String,
    pub warm_mode: WarmMode,
    /// The least memory it runs in, in MiB; a tier with less is refused.
    #[schema(example = 32)]
    pub least_memory_mib: u32,
    pub ports: Vec<Port>,
    /// Environment it starts with; a workload's own variables go over these.
    pub env: BTreeMap<String, String>,
    /// Where its state lives, kept over restarts and updates.
    pub volume: Option<Volume>,
    /// JSON Schema of what a tenant may configure, when the template has one.
    #[schema(value_type = Option<Object>)]
    pub config_schema: Option<serde_json::Value>,
    /// Why it cannot be deployed here, when it cannot.
    pub unavailable: Option<String>,
}

/// Limits; the console and `tier_too_small` name them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Tier {
    #[schema(example = "free")]
    pub name: String,
    /// Guaranteed, in MiB.
    #[schema(example = 256)]
    pub memory_mib: u32,
    /// The container's ceiling, in MiB.
    #[schema(example = 256)]
    pub memory_burst_mib: u32,
    /// Relative weight when cores are contended.
    #[schema(example = 256)]
    pub cpu_shares: u32,
    /// The ceiling, in thousandths of a core.
    #[schema(example = 1000)]
    pub cpu_millis: u32,
    #[schema(example = 256)]
    pub pids: u32,
    /// Workloads an org may have, stopped ones included.
    #[schema(example = 3)]
    pub max_workloads: u32,
    /// Largest state volume, in MiB.
    #[schema(example = 1024)]
    pub volume_mib: u32,
    /// Requests a minute an org's API keys may make.
    #[schema(example = 60)]
    pub rate_per_min: u32,
}
