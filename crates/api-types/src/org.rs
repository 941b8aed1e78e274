//! Orgs, their members and their API keys.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What a member may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Everything, members and API keys included.
    Owner,
    /// Workloads and secrets.
    Member,
}

/// An org as one of its members sees it in a list.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct OrgMembership {
    #[schema(example = "org_01k2m3n4p5q6r7s8t9v0w1x2y3")]
    pub id: String,
    /// Part of the addresses of its workloads.
    #[schema(example = "ada")]
    pub slug: String,
    #[schema(example = "Ada's agents")]
    pub name: String,
    pub role: Role,
    #[schema(example = "free")]
    pub tier: String,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Org {
    #[schema(example = "org_01k2m3n4p5q6r7s8t9v0w1x2y3")]
    pub id: String,
    #[schema(example = "ada")]
    pub slug: String,
    #[schema(example = "Ada's agents")]
    pub name: String,
    /// The caller's.
    pub role: Role,
    #[schema(example = "free")]
    pub tier: String,
    pub created_at: DateTime<Utc>,
}

#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateOrg {
    #[schema(min_length = 1, max_length = 100, example = "Research")]
    pub name: String,
    /// 1 to 20 characters of a-z and 0-9, starting with a letter; made from the name when absent. It cannot be changed later.
    #[schema(min_length = 1, max_length = 20, pattern = "^[a-z][a-z0-9]{0,19}$", example = "research")]
    pub slug: Option<String>,
}

#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct UpdateOrg {
    #[schema(min_length = 1, max_length = 100, example = "Research")]
    pub name: String,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Member {
    #[schema(example = "usr_01k2m3n4p5q6r7s8t9v0w1x2y3")]
    pub user_id: String,
    #[schema(example = "grace@example.org")]
    pub email: String,
    pub role: Role,
    pub created_at: DateTime<Utc>,
}

/// Somebody who has an account already.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct AddMember {
    #[schema(format = "email", max_length = 254, example = "grace@example.org")]
    pub email: String,
    pub role: Role,
}

/// A program's credential, without the credential.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ApiKey {
    #[schema(example = "key_01k2m3n4p5q6r7s8t9v0w1x2y3")]
    pub id: String,
    #[schema(example = "deploy from CI")]
    pub name: String,
    /// The first characters of the key, to recognise it by.
    #[schema(example = "chq_4f9a2c")]
    pub prefix: String,
    pub created_at: DateTime<Utc>,
    pub expires_at: Option<DateTime<Utc>>,
    pub last_used_at: Option<DateTime<Utc>>,
}

#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateApiKey {
    #[schema(min_length = 1, max_length = 100, example = "deploy from CI")]
    pub name: String,
    /// When it stops working; never, when absent.
    pub expires_at: Option<DateTime<Utc>>,
}

/// The only answer that holds the key itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct CreatedApiKey {
    #[schema(example = "key_01k2m3n4p5q6r7s8t9v0w1x2y3")]
    pub id: String,
    #[schema(example = "deploy from CI")]
    pub name: String,
    #[schema(example = "chq_4f9a2c")]
    pub prefix: String,
    pub created_at: DateTime<Utc>,
    pub expires_at: Option<DateTime<Utc>>,
    pub last_used_at: Option<DateTime<Utc>>,
    /// Send it as `Authorization: Bearer …`. It is not shown again.
    #[schema(example = "chq_4f9a2c…")]
    pub key: String,
}
