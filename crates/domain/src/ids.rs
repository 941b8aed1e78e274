//! Typed identifiers: UUIDv7 bits shown as a prefix and 26 Crockford base32 characters.
//!
//! Minting needs a clock and randomness, so it lives in `crates/runtime`; here is only shape, text and parsing.

use std::fmt;
use std::str::FromStr;

const ALPHABET: &[u8; 32] = b"0123456789abcdefghjkmnpqrstvwxyz";

/// The text was not an identifier of this kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InvalidId {
    /// What was expected, such as `wl_`.
    pub prefix: &'static str,
}

impl fmt::Display for InvalidId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "not an id of the form {}_ and 26 characters of 0-9, a-z without i, l, o, u", self.prefix)
    }
}

impl std::error::Error for InvalidId {}

fn encode(prefix: &str, bits: u128, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    let mut text = [0u8; 26];
    let mut rest = bits;
    for slot in text.iter_mut().rev() {
        *slot = ALPHABET[(rest & 31) as usize];
        rest >>= 5;
    }
    write!(f, "{prefix}_{}", text.iter().map(|byte| *byte as char).collect::<String>())
}

fn decode(prefix: &'static str, text: &str) -> Result<u128, InvalidId> {
    let refused = InvalidId { prefix };
    let digits = text.strip_prefix(prefix).and_then(|rest| rest.strip_prefix('_')).ok_or(refused.clone())?;
    // 26 digits hold 130 bits: the first may only be 0 to 7, or one id would have several spellings.
    if digits.len() != 26 || digits.as_bytes()[0] > b'7' {
        return Err(refused);
    }
    digits.bytes().try_fold(0u128, |bits, byte| {
        let value = ALPHABET.iter().position(|known| *known == byte).ok_or(refused.clone())?;
        Ok((bits << 5) | value as u128)
    })
}

macro_rules! ids {
    ($($(#[$doc:meta])* $name:ident = $prefix:literal;)+) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(u128);

        impl $name {
            pub const PREFIX: &'static str = $prefix;

            pub const fn from_u128(bits: u128) -> Self {
                Self(bits)
            }

            pub const fn as_u128(self) -> u128 {
                self.0
            }
        }

        impl From<u128> for $name {
            fn from(bits: u128) -> Self {
                Self(bits)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                encode($prefix, self.0, f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                encode($prefix, self.0, f)
            }
        }

        impl FromStr for $name {
            type Err = InvalidId;

            fn from_str(text: &str) -> Result<Self, InvalidId> {
                decode($prefix, text).map(Self)
            }
        }
    )+};
}

ids! {
    /// The tenant.
    OrgId = "org";
    /// A person.
    UserId = "usr";
    /// A sign-in of a person's browser.
    SessionId = "ses";
    /// A program's credential.
    ApiKeyId = "key";
    /// What a tenant deploys.
    WorkloadId = "wl";
    /// One immutable version of a workload's config.
    ReleaseId = "rel";
    /// One running (or once running) copy of a workload.
    InstanceId = "ins";
    /// One container on a node, warm and unowned or used by exactly one instance.
    SlotId = "slot";
    /// A host.
    NodeId = "node";
    /// A state volume.
    VolumeId = "vol";
    /// An entry of the activity feed.
    EventId = "evt";
    /// A named secret of an org.
    SecretId = "sec";
    /// A wake-up in the job table.
    JobId = "job";
    /// One HTTP request.
    RequestId = "req";
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn text_is_prefixed_and_sortable() {
        let early = WorkloadId::from_u128(0x0190_0000_0000_7000_8000_0000_0000_0001);
        let late = WorkloadId::from_u128(0x0190_0000_0001_7000_8000_0000_0000_0000);
        assert_eq!(early.to_string(), "wl_01j0000000e008000000000001");
        assert!(early.to_string() < late.to_string());
    }

    #[test]
    fn foreign_prefixes_and_second_spellings_are_refused() {
        let text = OrgId::from_u128(7).to_string();
        assert!(text.parse::<UserId>().is_err());
        assert!(text.to_uppercase().parse::<OrgId>().is_err());
        assert!("org_80000000000000000000000000".parse::<OrgId>().is_err());
        assert!("org_".parse::<OrgId>().is_err());
        assert!("org_0000000000000000000000000u".parse::<OrgId>().is_err());
    }

    proptest! {
        #[test]
        fn every_id_reads_back(bits: u128) {
            let id = SlotId::from_u128(bits);
            prop_assert_eq!(id.to_string().parse::<SlotId>().unwrap(), id);
        }

        #[test]
        fn no_text_panics(text in ".{0,40}") {
            let _ = text.parse::<SlotId>();
        }
    }
}
