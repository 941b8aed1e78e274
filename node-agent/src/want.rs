//! What the control plane asked for, checked and with its secrets; they are wiped when it is dropped.

use clawhq_domain::Millis;
use clawhq_domain::host::{Want, WantClaim};
use clawhq_domain::ids::{InstanceId, SlotId, VolumeId};
use clawhq_domain::slot::SlotTarget;
use clawhq_domain::template::{Probe, WarmMode};
use clawhq_proto::{Malformed, v1, warm_mode_parse};
use zeroize::Zeroize;

const START_DEADLINE_MS: u32 = 60_000;
const START_DEADLINE_MAX_MS: u32 = 600_000;
const STOP_DEADLINE_MS: u32 = 10_000;
const STOP_DEADLINE_MAX_MS: u32 = 330_000;

/// One desired slot.
pub struct Wanted {
    pub desired: v1::SlotDesired,
    pub view: Want,
    pub probe: Probe,
}

impl Wanted {
    /// `complete`: it came over the wire, with its secrets; else it is the ledger's.
    pub fn new(desired: v1::SlotDesired, complete: bool) -> Result<Self, Malformed> {
        // Owned by a value that wipes it also when it turns out malformed.
        let mut wanted = Self {
            view: Want {
                slot: desired.slot_id.parse::<SlotId>().map_err(|_| Malformed("slot_id"))?,
                target: if desired.present { SlotTarget::Present } else { SlotTarget::Absent },
                warm: WarmMode::None,
                pool: String::new(),
                claim: None,
                volume: None,
                complete,
                start_deadline_ms: Millis::from(START_DEADLINE_MS),
                stop_deadline_ms: Millis::from(STOP_DEADLINE_MS),
            },
            desired,
            probe: Probe::Started,
        };
        // What is to leave leaves, whatever else is said about it.
        let strict = wanted.desired.present;
        if let Some(spec) = &wanted.desired.spec {
            wanted.view.warm = warm_mode_parse(&spec.warm_mode);
            wanted.view.pool = format!("{}/{}", spec.template, spec.tier);
            if let Some(volume) = &spec.volume {
                wanted.view.volume =
                    Some(volume.volume_id.parse::<VolumeId>().map_err(|_| Malformed("volume.volume_id"))?);
                inside(&volume.path).or((!strict).then_some(())).ok_or(Malformed("volume.path"))?;
            }
            for tmpfs in &spec.tmpfs {
                inside(&tmpfs.path).or((!strict).then_some(())).ok_or(Malformed("tmpfs.path"))?;
            }
            if strict && (spec.uid == 0 || spec.gid == 0) {
                return Err(Malformed("uid"));
            }
        } else if wanted.desired.present {
            return Err(Malformed("spec"));
        }
        if let Some(claim) = &wanted.desired.claim {
            wanted.view.claim = Some(WantClaim {
                instance: claim.instance_id.parse::<InstanceId>().map_err(|_| Malformed("claim.instance_id"))?,
                restart: claim.restart,
                single_writer: claim.single_writer,
            });
        }
        if let Some(process) = wanted.process() {
            let within = |asked: u32, otherwise: u32, most: u32| {
                Millis::from(if asked == 0 { otherwise } else { asked.min(most) })
            };
            let start = within(process.start_deadline_ms, START_DEADLINE_MS, START_DEADLINE_MAX_MS);
            let stop = within(process.stop_deadline_ms, STOP_DEADLINE_MS, STOP_DEADLINE_MAX_MS);
            let probe = process.probe.clone().map(Probe::try_from).transpose()?.unwrap_or(Probe::Started);
            (wanted.view.start_deadline_ms, wanted.view.stop_deadline_ms, wanted.probe) = (start, stop, probe);
        }
        Ok(wanted)
    }

    /// What runs, or is to run, in it: the claim's process, or else the pool's.
    pub fn process(&self) -> Option<&v1::Process> {
        let claimed = self.desired.claim.as_ref().and_then(|claim| claim.process.as_ref());
        claimed.or_else(|| self.desired.spec.as_ref()?.pool_process.as_ref())
    }

    pub fn spec(&self) -> Option<&v1::SlotSpec> {
        self.desired.spec.as_ref()
    }

    /// The app that is warm serves the slot, so its init is claimed by the slot and not by the instance.
    pub fn is_app(&self) -> bool {
        matches!(self.view.warm, WarmMode::App | WarmMode::Frozen)
    }
}

impl Drop for Wanted {
    fn drop(&mut self) {
        let claimed = self.desired.claim.as_mut().and_then(|claim| claim.process.as_mut());
        let pooled = self.desired.spec.as_mut().and_then(|spec| spec.pool_process.as_mut());
        for process in claimed.into_iter().chain(pooled) {
            process.argv.zeroize();
            process.env.values_mut().for_each(Zeroize::zeroize);
            for file in &mut process.files {
                file.content.zeroize();
            }
        }
    }
}

/// An absolute path that stays where it says.
fn inside(path: &str) -> Option<()> {
    let plain = path.starts_with('/')
        && path.len() <= 255
        && path.trim_end_matches('/').len() > 1
        && !path.contains(['\0', ',', ':'])
        && !path.split('/').any(|part| part == ".." || part == ".");
    // What is ours or the kernel's inside a container.
    let reserved = ["/.clawhq", "/proc", "/sys", "/dev"];
    let clash = reserved.iter().any(|root| path == *root || path.starts_with(&format!("{root}/")));
    (plain && !clash).then_some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn desired() -> v1::SlotDesired {
        v1::SlotDesired {
            slot_id: SlotId::from_u128(1).to_string(),
            generation: 1,
            present: true,
            spec: Some(v1::SlotSpec { warm_mode: "exec".into(), uid: 1, gid: 1, ..v1::SlotSpec::default() }),
            claim: None,
        }
    }

    #[test]
    fn what_cannot_be_meant_is_refused() {
        assert!(Wanted::new(desired(), true).is_ok());
        let refused = |change: fn(&mut v1::SlotDesired)| {
            let mut desired = desired();
            change(&mut desired);
            Wanted::new(desired, true).err().map(|malformed| malformed.0)
        };
        assert_eq!(refused(|one| one.slot_id.clear()), Some("slot_id"));
        assert_eq!(refused(|one| one.spec = None), Some("spec"));
        assert_eq!(refused(|one| one.spec.as_mut().unwrap().uid = 0), Some("uid"), "root is never a tenant");
        assert_eq!(refused(|one| one.claim = Some(v1::Claim::default())), Some("claim.instance_id"));
        let volume = |path: &str| {
            let mut desired = desired();
            let volume_id = VolumeId::from_u128(1).to_string();
            desired.spec.as_mut().unwrap().volume = Some(v1::Volume { volume_id, path: path.into(), size_mib: 1 });
            Wanted::new(desired, true).is_ok()
        };
        assert!(volume("/home/agent/.state"));
        for path in ["", "/", "data", "/a/../b", "/proc/x", "/.clawhq", "/a:ro", "/a,b"] {
            assert!(!volume(path), "{path}");
        }
    }

    #[test]
    fn deadlines_are_bounded_and_a_slot_may_leave_without_a_spec() {
        let mut one = desired();
        one.spec.as_mut().unwrap().pool_process =
            Some(v1::Process { stop_deadline_ms: u32::MAX, ..v1::Process::default() });
        let wanted = Wanted::new(one, true).unwrap();
        assert_eq!((wanted.view.start_deadline_ms, wanted.view.stop_deadline_ms), (60_000, 330_000));
        let mut leaving = v1::SlotDesired { present: false, ..desired() };
        leaving.spec.as_mut().unwrap().uid = 0;
        assert!(Wanted::new(leaving.clone(), true).is_ok());
        leaving.spec = None;
        assert_eq!(Wanted::new(leaving, true).unwrap().view.target, SlotTarget::Absent);
    }
}
