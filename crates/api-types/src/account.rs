//! People: signing up and in, who is asking, and their sessions.

use crate::org::OrgMembership;
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A new person, with an org of their own.
#[derive(Clone, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SignUp {
    #[schema(format = "email", max_length = 254, example = "ada@example.org")]
    pub email: String,
    /// Any characters; long enough not to be guessed.
    #[schema(format = "password", min_length = 8, max_length = 128, example = "correct horse battery staple")]
    pub password: String,
    /// The name of the first org; made from the e-mail address when absent.
    #[schema(max_length = 64, example = "Ada's agents")]
    pub org_name: Option<String>,
}

/// Credentials of a person.
#[derive(Clone, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SignIn {
    #[schema(format = "email", max_length = 254, example = "ada@example.org")]
    pub email: String,
    #[schema(format = "password", max_length = 128, example = "correct horse battery staple")]
    pub password: String,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct User {
    #[schema(example = "usr_01k2m3n4p5q6r7s8t9v0w1x2y3")]
    pub id: String,
    #[schema(example = "ada@example.org")]
    pub email: String,
}

/// Who is asking, and what they may reach.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Me {
    pub user: User,
    pub orgs: Vec<OrgMembership>,
}

/// A browser signed in as this person.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Session {
    #[schema(example = "ses_01k2m3n4p5q6r7s8t9v0w1x2y3")]
    pub id: String,
    pub created_at: DateTime<Utc>,
    pub last_seen_at: DateTime<Utc>,
    pub expires_at: DateTime<Utc>,
    pub user_agent: Option<String>,
    #[schema(example = "203.0.113.7")]
    pub ip: Option<String>,
    /// The one that asks.
    pub current: bool,
}
