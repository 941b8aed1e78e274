//! What is on the machine and what the tables say is there: the two must agree once things are quiet.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use clawhq_domain::ids::{SlotId, VolumeId};
use sqlx::Row as _;

use crate::{Platform, eventually};

/// Everything that a platform holds.
#[derive(Clone, Debug, Default)]
pub struct Census {
    /// Slot to container, of every container whatever its state.
    pub containers: BTreeMap<String, String>,
    /// Containers of that daemon which are nobody's, or twice one slot's.
    pub strays: Vec<String>,
    /// Container to its first process, pid and name, as the kernel tells; Docker may not know of one.
    pub inits: Vec<(String, String)>,
    pub interfaces: BTreeSet<String>,
    pub mounts: BTreeSet<String>,
    pub volume_files: BTreeSet<String>,
    /// Slot to its state, of every row that is not removed.
    pub slots: BTreeMap<String, String>,
    /// Rows that are not removed.
    pub volumes: BTreeSet<String>,
}

impl Census {
    /// Looks everywhere.
    ///
    /// # Errors
    /// When Docker or PostgreSQL does not answer.
    pub async fn take(platform: &Platform) -> Result<Self> {
        let mut census = Self::default();
        let format = "{{.ID}} {{.Label \"clawhq.slot\"}}";
        for line in platform.docker(&["ps", "-a", "--no-trunc", "--format", format])?.lines() {
            let (id, slot) = line.split_once(' ').unwrap_or((line, ""));
            if slot.is_empty() || census.containers.insert(slot.to_owned(), id.to_owned()).is_some() {
                census.strays.push(line.to_owned());
            }
        }
        census.inits = inits(&platform.data.join("node/init"))?;
        let prefix = platform.interface_prefix();
        for entry in fs::read_dir("/sys/class/net")?.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.starts_with(&prefix) {
                census.interfaces.insert(name);
            }
        }
        let volumes = platform.data.join("volumes");
        let below = format!("{}/", volumes.display());
        for mount in fs::read_to_string("/proc/mounts")?.lines().filter_map(|line| line.split(' ').nth(1)) {
            if let Some(name) = mount.strip_prefix(&below) {
                census.mounts.insert(name.to_owned());
            }
        }
        for entry in fs::read_dir(&volumes).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            census.volume_files.insert(name.trim_end_matches(".img").to_owned());
        }
        let mut connection = platform.sql().await?;
        let rows = sqlx::query("select id, desired || ' ' || observed from slots where removed_at is null");
        for row in rows.fetch_all(&mut connection).await? {
            let id: uuid::Uuid = row.try_get(0).context("slot id")?;
            census.slots.insert(SlotId::from(id.as_u128()).to_string(), row.try_get(1)?);
        }
        for row in sqlx::query("select id from volumes where removed_at is null").fetch_all(&mut connection).await? {
            let id: uuid::Uuid = row.try_get(0).context("volume id")?;
            census.volumes.insert(VolumeId::from(id.as_u128()).to_string());
        }
        Ok(census)
    }

    /// Where the machine and the tables disagree, or something is still on its way.
    pub fn faults(&self) -> Vec<String> {
        let mut faults: Vec<String> = self.strays.iter().map(|stray| format!("stray container {stray}")).collect();
        for slot in self.containers.keys().filter(|slot| !self.slots.contains_key(*slot)) {
            faults.push(format!("container of {slot}, which has no row"));
        }
        for (slot, state) in &self.slots {
            if !["present waiting", "present frozen", "present running"].contains(&state.as_str()) {
                faults.push(format!("{slot} is {state}"));
            } else if !self.containers.contains_key(slot) {
                faults.push(format!("{slot} is {state} and has no container"));
            }
        }
        for (index, (container, pid)) in self.inits.iter().enumerate() {
            if !self.containers.values().any(|known| known == container) {
                faults.push(format!("process {pid} of container {container}, which Docker does not know"));
            } else if self.inits[..index].iter().any(|(other, _)| other == container) {
                faults.push(format!("process {pid} is a second init of container {container}"));
            }
        }
        if self.interfaces.len() != self.containers.len() {
            faults.push(format!("{} interfaces for {} containers", self.interfaces.len(), self.containers.len()));
        }
        for (what, found) in [("file", &self.volume_files), ("mount", &self.mounts)] {
            faults
                .extend(found.difference(&self.volumes).map(|volume| format!("{what} of {volume}, which has no row")));
        }
        faults
    }

    /// Waits until the machine and the tables agree; panics with the disagreement.
    pub async fn settled(platform: &Platform, within: Duration) -> Self {
        let (begun, mut said) = (Instant::now(), String::new());
        eventually("machine and tables agree", within, async || {
            let census = Self::take(platform).await.map_err(|error| format!("{error:#}"))?;
            let faults = census.faults();
            if faults.is_empty() {
                return Ok(census);
            }
            let faults = faults.join("; ");
            // Such a one was left to a sweep, where an event should have done.
            if begun.elapsed() > Duration::from_secs(5) && faults != said {
                println!("after {:?}: {faults}", begun.elapsed());
                said.clone_from(&faults);
            }
            Err(faults)
        })
        .await
    }
}

/// The first processes of all containers that the folder of inits is mounted into.
fn inits(folder: &Path) -> Result<Vec<(String, String)>> {
    // Where that lies in its file system is not known; the names of the two folders above are random or ours.
    let folder = folder.display().to_string();
    let below = folder.splitn(3, '/').nth(2).map(|rest| format!("/{rest} ")).unwrap_or_default();
    let mut inits = Vec::new();
    for process in fs::read_dir("/proc")?.flatten() {
        let Some(pid) = process.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        // One that ends meanwhile is not there.
        let read = |name: &str| fs::read_to_string(process.path().join(name)).unwrap_or_default();
        let status = read("status");
        let is_first =
            status.lines().any(|line| line.starts_with("NSpid:") && line.split_whitespace().skip(2).eq(["1"]));
        if !is_first || !read("mountinfo").contains(&below) {
            continue;
        }
        let groups = read("cgroup");
        let container = groups.split(['/', '\n', '.', '-']).find(|part| part.len() == 64).unwrap_or_default();
        inits.push((container.to_owned(), format!("{pid} {}", read("comm").trim())));
    }
    Ok(inits)
}
