//! Passwords: argon2id, a few at a time, and never faster for an unknown user than for a known one.

use argon2::password_hash::phc::PasswordHash;
use argon2::password_hash::{PasswordHasher, PasswordVerifier};
use argon2::{Algorithm, Argon2, Params, Version};
use clawhq_domain::Reason;
use std::sync::{Arc, OnceLock};
use tokio::sync::Semaphore;
use zeroize::Zeroizing;

use crate::{Error, Result};

/// Shortest and longest password, in characters. Length is what NIST SP 800-63B-4 asks for; no composition rules.
pub const LENGTH_MIN: usize = 10;
pub const LENGTH_MAX: usize = 128;

/// Memory in KiB, passes and lanes: OWASP's first recommendation for argon2id.
const MEMORY_KIB: u32 = 19 * 1024;
const PASSES: u32 = 2;
const LANES: u32 = 1;

/// Waiting for a turn longer than the queue allows is refused: hashing is the cheapest way to starve an API.
const QUEUE_PER_TURN: usize = 16;

/// What many try first, longer than the least length. Refused by name.
const COMMON: [&str; 16] = [
    "1234567890",
    "0123456789",
    "password123",
    "password1234",
    "qwertyuiop",
    "1q2w3e4r5t",
    "iloveyou123",
    "letmein123",
    "administrator",
    "welcome123",
    "changeme123",
    "passw0rd123",
    "abcdefghij",
    "1111111111",
    "qwerty12345",
    "adminadmin",
];

#[derive(Clone)]
pub struct Passwords {
    turns: Arc<Semaphore>,
    queue: Arc<Semaphore>,
}

impl Passwords {
    /// `at_once` hashes run side by side; each takes 19 MiB and some tens of milliseconds of a core.
    pub fn new(at_once: usize) -> Self {
        let at_once = at_once.max(1);
        Self { turns: Arc::new(Semaphore::new(at_once)), queue: Arc::new(Semaphore::new(at_once * QUEUE_PER_TURN)) }
    }

    /// Whether a new password can be used.
    pub fn check(password: &str) -> Result<()> {
        let length = password.chars().count();
        let why = if length < LENGTH_MIN {
            format!("The password has {length} characters; at least {LENGTH_MIN} are needed.")
        } else if length > LENGTH_MAX {
            format!("The password has {length} characters; at most {LENGTH_MAX} are allowed.")
        } else if COMMON.contains(&password.to_lowercase().as_str()) {
            "This password is among the first that are guessed.".to_owned()
        } else {
            return Ok(());
        };
        Err(Error::invalid(
            "/password",
            Reason::new("password_weak", why).with_hint("A few unrelated words are both strong and easy to keep."),
        ))
    }

    /// The PHC string to store.
    pub async fn hash(&self, password: Zeroizing<String>) -> Result<String> {
        self.in_turn(move || {
            hasher()
                .hash_password(password.as_bytes())
                .map(|hash| hash.to_string())
                .map_err(|error| Error::internal("password hash", error))
        })
        .await?
    }

    /// Whether it is the password of `hash`; with no hash (no such user) it takes as long and is not.
    pub async fn verify(&self, password: Zeroizing<String>, hash: Option<String>) -> Result<bool> {
        self.in_turn(move || {
            let known = hash.is_some();
            let text = hash.as_deref().unwrap_or_else(|| nobody());
            let parsed = PasswordHash::new(text).map_err(|error| Error::internal("stored password hash", error))?;
            Ok(hasher().verify_password(password.as_bytes(), &parsed).is_ok() && known)
        })
        .await?
    }

    async fn in_turn<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
        let busy = Error::Busy { retry_after_ms: 1_000 };
        let _place = self.queue.clone().try_acquire_owned().map_err(|_| busy)?;
        let _turn = self.turns.clone().acquire_owned().await.map_err(|_| Error::Unavailable("sign-in"))?;
        tokio::task::spawn_blocking(work).await.map_err(|error| Error::internal("password task", error))
    }
}

fn hasher() -> Argon2<'static> {
    let params = Params::new(MEMORY_KIB, PASSES, LANES, None).expect("the parameters are within argon2's bounds");
    Argon2::new(Algorithm::Argon2id, Version::V0x13, params)
}

/// A hash that no password is meant for.
fn nobody() -> &'static str {
    static HASH: OnceLock<String> = OnceLock::new();
    HASH.get_or_init(|| hasher().hash_password(b"nobody").map(|hash| hash.to_string()).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_the_password_of_a_known_user_passes() {
        let passwords = Passwords::new(2);
        let secret = || Zeroizing::new("correct horse".to_owned());
        let hash = passwords.hash(secret()).await.unwrap();
        assert!(hash.starts_with("$argon2id$v=19$m=19456,t=2,p=1$"));
        assert!(passwords.verify(secret(), Some(hash.clone())).await.unwrap());
        assert!(!passwords.verify(Zeroizing::new("wrong horse".to_owned()), Some(hash)).await.unwrap());
        assert!(!passwords.verify(Zeroizing::new("nobody".to_owned()), None).await.unwrap());
    }

    #[test]
    fn weak_passwords_are_refused_with_their_reason() {
        for weak in ["short", "Password123", &"x".repeat(129)] {
            assert!(matches!(Passwords::check(weak), Err(Error::Invalid { .. })), "{weak}");
        }
        assert!(Passwords::check("correct horse").is_ok());
        assert!(Passwords::check("ééééééééééé").is_ok());
    }
}
