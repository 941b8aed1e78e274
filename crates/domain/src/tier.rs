//! Limits by tier. The rows live in the database; this is their shape and what is decided from them.

use crate::Reason;

/// What an org of this tier may use, and what the pool keeps for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tier {
    /// `free`, `pro`, `business`, `enterprise`.
    pub name: String,
    /// Guaranteed and packed, in MiB.
    pub memory_mib: u32,
    /// The container's ceiling, in MiB; at least `memory_mib`.
    pub memory_burst_mib: u32,
    /// Relative weight when cores are contended (Docker's scale, 1024 = one share).
    pub cpu_shares: u32,
    /// The ceiling, in thousandths of a core.
    pub cpu_millis: u32,
    pub pids: u32,
    /// Most containers of this tier on one node; 0 means dedicated nodes only.
    pub max_per_node: u32,
    /// Warm slots kept for each pooled template.
    pub warm_target: u32,
    /// Requests a minute an org may make.
    pub rate_per_min: u32,
    /// Workloads an org may have, stopped ones included.
    pub max_workloads: u32,
    /// Largest state volume, in MiB.
    pub volume_mib: u32,
}

/// The tiers of the catalogue, least first. Never empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tiers(pub Vec<Tier>);

impl Tiers {
    pub fn get(&self, name: &str) -> Option<&Tier> {
        self.0.iter().find(|tier| tier.name == name)
    }

    fn rank(&self, name: &str) -> Option<usize> {
        self.0.iter().position(|tier| tier.name == name)
    }

    /// The tier a workload runs in: the one asked for, or the least that fits; never above the org's own.
    ///
    /// `least_memory_mib` is what the template says it needs. The refusal names the tier that fits.
    pub fn admit(&self, org_tier: &str, asked: Option<&str>, least_memory_mib: u32) -> Result<&Tier, Reason> {
        let ceiling = self.rank(org_tier).ok_or_else(|| {
            Reason::new("tier_unknown", format!("The org's tier {org_tier} is not in the catalogue."))
        })?;
        let fits = |tier: &Tier| tier.memory_burst_mib >= least_memory_mib;
        let name = asked.unwrap_or(org_tier);
        let rank = self.rank(name).ok_or_else(|| {
            Reason::new("tier_unknown", format!("There is no tier named {name}."))
                .with_hint("GET /v1/tiers lists them.")
        })?;
        if rank > ceiling {
            return Err(Reason::new("tier_not_included", format!("This org is on {org_tier}; {name} is above it."))
                .with_hint("Choose a tier up to the org's own, or upgrade the org."));
        }
        let tier = &self.0[rank];
        if fits(tier) {
            return Ok(tier);
        }
        let hint = match self.0.iter().find(|tier| fits(tier)) {
            Some(enough) => format!("The least tier that fits is {}.", enough.name),
            None => "No tier is large enough for it.".to_owned(),
        };
        Err(Reason::new(
            "tier_too_small",
            format!("This needs {least_memory_mib} MiB of memory; {name} allows {} MiB.", tier.memory_burst_mib),
        )
        .with_hint(hint))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tiers() -> Tiers {
        let tier = |name: &str, memory_mib| Tier {
            name: name.to_owned(),
            memory_mib,
            memory_burst_mib: memory_mib,
            cpu_shares: memory_mib,
            cpu_millis: 1000,
            pids: 256,
            max_per_node: 50,
            warm_target: 5,
            rate_per_min: 60,
            max_workloads: 3,
            volume_mib: 1024,
        };
        Tiers(vec![tier("free", 256), tier("pro", 512), tier("business", 1024)])
    }

    #[test]
    fn a_small_tier_is_refused_by_naming_the_one_that_fits() {
        let tiers = tiers();
        let refused = tiers.admit("business", Some("pro"), 800).unwrap_err();
        assert_eq!(refused.code, "tier_too_small");
        assert_eq!(refused.hint.unwrap(), "The least tier that fits is business.");
        assert_eq!(tiers.admit("business", None, 800).unwrap().name, "business");
    }

    #[test]
    fn no_org_reaches_above_its_own_tier() {
        let tiers = tiers();
        assert_eq!(tiers.admit("free", Some("business"), 1).unwrap_err().code, "tier_not_included");
        assert_eq!(tiers.admit("free", Some("gold"), 1).unwrap_err().code, "tier_unknown");
        assert_eq!(tiers.admit("pro", Some("free"), 256).unwrap().name, "free");
    }
}
