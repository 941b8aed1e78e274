//! Secrets: set and named, never read back.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

#[derive(Clone, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SetSecret {
    /// At most 64 KiB of text without zero bytes. It cannot be read again.
    #[schema(format = "password", max_length = 65536, example = "sk-…")]
    pub value: String,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Secret {
    #[schema(example = "OPENAI_API_KEY")]
    pub name: String,
    /// The newest version; a release keeps the version it was made with.
    #[schema(example = 2)]
    pub version: u32,
    pub created_at: DateTime<Utc>,
    pub updated_at: DateTime<Utc>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct SecretVersion {
    #[schema(example = 2)]
    pub version: u32,
    pub created_at: DateTime<Utc>,
    /// The person that set it.
    pub created_by: Option<String>,
}
