//! Every decision of ClawHQ, and nothing else.
//!
//! The functions here take values and return values: a view of the world, a policy, and `now`. There is no I/O, no
//! clock, no randomness, no serialisation and no logging, so each can be tested as a table and replayed from a
//! saved view. Outputs carry their reasons, which the shells log and the API shows.
//!
//! Times are [`Millis`] since the Unix epoch, given by the caller; ids to be created are given by the caller too.

pub mod access;
pub mod backoff;
pub mod host;
pub mod ids;
pub mod lifecycle;
pub mod names;
pub mod placement;
pub mod pool;
pub mod quota;
pub mod release;
pub mod slot;
pub mod template;
#[cfg(test)]
mod testing;
pub mod tier;
pub mod workload;

/// Milliseconds since the Unix epoch (a time), or a span of them, as the name of the field says.
pub type Millis = i64;

/// A refusal or failure in words a program can match and a person can act on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reason {
    /// Stable, lower_snake_case; listed in `openapi/problems.json` or the docs of states.
    pub code: &'static str,
    /// What happened, one sentence.
    pub message: String,
    /// What to do about it, when there is something to do.
    pub hint: Option<String>,
}

impl Reason {
    pub fn new(code: &'static str, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), hint: None }
    }

    #[must_use]
    pub fn with_hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

/// A refusal of one part of an input.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flaw {
    /// JSON Pointer into the input: `/files/0/path`; empty for the whole of it.
    pub at: String,
    pub reason: Reason,
}
