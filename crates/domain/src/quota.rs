//! Whether an org may have one more of something.

use crate::Reason;
use crate::tier::Tier;

/// What an org has now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Workloads not deleted, stopped ones included.
    pub workloads: u32,
    pub secrets: u32,
    pub members: u32,
    pub api_keys: u32,
}

/// Bounds that no tier lifts, so that no list grows without end.
pub const SECRETS_MAX: u32 = 500;
pub const MEMBERS_MAX: u32 = 200;
pub const API_KEYS_MAX: u32 = 100;

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ask {
    Workload,
    /// A state volume of this many MiB.
    Volume(u32),
    Secret,
    Member,
    ApiKey,
}

/// `Ok` when one more fits; the refusal names the limit and what has been used.
pub fn admit(ask: Ask, usage: Usage, tier: &Tier) -> Result<(), Reason> {
    let (what, used, most) = match ask {
        Ask::Workload => ("workloads", usage.workloads, tier.max_workloads),
        Ask::Secret => ("secrets", usage.secrets, SECRETS_MAX),
        Ask::Member => ("members", usage.members, MEMBERS_MAX),
        Ask::ApiKey => ("API keys", usage.api_keys, API_KEYS_MAX),
        Ask::Volume(mib) if mib > tier.volume_mib => {
            return Err(Reason::new(
                "quota_exceeded",
                format!("A volume of {mib} MiB is above the {} MiB of tier {}.", tier.volume_mib, tier.name),
            )
            .with_hint("Ask for a smaller volume or choose a larger tier."));
        }
        Ask::Volume(_) => return Ok(()),
    };
    if used < most {
        return Ok(());
    }
    Err(Reason::new("quota_exceeded", format!("{used} of {most} {what} of tier {} are in use.", tier.name))
        .with_hint(format!("Delete some {what} or choose a larger tier.")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tier() -> Tier {
        Tier {
            name: "free".to_owned(),
            memory_mib: 256,
            memory_burst_mib: 256,
            cpu_shares: 256,
            cpu_millis: 500,
            pids: 128,
            max_per_node: 50,
            warm_target: 20,
            rate_per_min: 60,
            max_workloads: 3,
            volume_mib: 1024,
        }
    }

    #[test]
    fn the_last_one_fits_and_the_next_does_not() {
        let at = |workloads| Usage { workloads, ..Usage::default() };
        assert!(admit(Ask::Workload, at(2), &tier()).is_ok());
        let refused = admit(Ask::Workload, at(3), &tier()).unwrap_err();
        assert_eq!(refused.code, "quota_exceeded");
        assert_eq!(refused.message, "3 of 3 workloads of tier free are in use.");
        assert!(admit(Ask::Volume(1024), at(0), &tier()).is_ok());
        assert!(admit(Ask::Volume(1025), at(0), &tier()).is_err());
    }
}
