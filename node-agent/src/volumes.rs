//! State volumes: a sparse ext4 image each, mounted on the host while a container uses it. Its size is a hard limit.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use clawhq_domain::ids::VolumeId;
use tokio::process::Command;

const DEADLINE: Duration = Duration::from_secs(60);
/// Kept free on the host's disk, MiB: images are sparse, so they could be promised more than there is.
const RESERVE_MIB: u64 = 512;

#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    #[error("the node's disk has only {0} MiB left")]
    DiskFull(u64),
    #[error("{0}")]
    Failed(String),
    #[error(transparent)]
    Io(#[from] io::Error),
}

#[derive(Clone, Debug)]
pub struct Volumes {
    dir: PathBuf,
}

impl Volumes {
    pub fn new(dir: PathBuf) -> io::Result<Self> {
        std::fs::create_dir_all(&dir)?;
        // Mounts are listed by their real path.
        Ok(Self { dir: dir.canonicalize()? })
    }

    fn image(&self, volume: VolumeId) -> PathBuf {
        self.dir.join(format!("{volume}.img"))
    }

    pub fn mount_point(&self, volume: VolumeId) -> PathBuf {
        self.dir.join(volume.to_string())
    }

    /// Makes it if it is not there, mounts it if it is not mounted; its root belongs to `uid`:`gid`. Returns the mount.
    pub async fn ensure(&self, volume: VolumeId, size_mib: u32, uid: u32, gid: u32) -> Result<PathBuf, VolumeError> {
        let (image, mount) = (self.image(volume), self.mount_point(volume));
        if self.mounted()?.contains(&mount) {
            return Ok(mount);
        }
        if !image.exists() {
            let free = free_mib(&self.dir)?;
            if free < RESERVE_MIB {
                return Err(VolumeError::DiskFull(free));
            }
            // Under another name until it is whole: a kill in between must not leave half a file system.
            let draft = self.dir.join(format!("{volume}.new"));
            std::fs::File::create(&draft)?.set_len(u64::from(size_mib.max(4)) << 20)?;
            let options = format!("lazy_itable_init=1,lazy_journal_init=1,root_owner={uid}:{gid}");
            command("mkfs.ext4", &["-q", "-F", "-m", "0", "-E", &options, &path(&draft)?]).await?;
            std::fs::rename(&draft, &image)?;
        }
        std::fs::create_dir_all(&mount)?;
        command("mount", &["-t", "ext4", "-o", "loop,nosuid,nodev,noatime", &path(&image)?, &path(&mount)?]).await?;
        // What e2fsck would put there can be made then; tenants' programs trip over a directory they may not read.
        let _ = std::fs::remove_dir(mount.join("lost+found"));
        Ok(mount)
    }

    /// Unmounts it; its data stays.
    pub async fn release(&self, volume: VolumeId) -> Result<(), VolumeError> {
        let mount = self.mount_point(volume);
        if self.mounted()?.contains(&mount) {
            command("umount", &[&path(&mount)?]).await?;
        }
        match std::fs::remove_dir(&mount) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error.into()),
            _ => Ok(()),
        }
    }

    /// Destroys it and its data. One that is not there is a success.
    pub async fn destroy(&self, volume: VolumeId) -> Result<(), VolumeError> {
        self.release(volume).await?;
        match std::fs::remove_file(self.image(volume)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error.into()),
            _ => Ok(()),
        }
    }

    /// Unmounts what none of `used` is, and removes drafts; returns how many.
    pub async fn sweep(&self, used: &BTreeSet<VolumeId>) -> Result<usize, VolumeError> {
        let mut swept = 0;
        for mount in self.mounted()? {
            let name = mount.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            if let Ok(volume) = name.parse::<VolumeId>()
                && !used.contains(&volume)
            {
                self.release(volume).await?;
                swept += 1;
            }
        }
        for entry in std::fs::read_dir(&self.dir)? {
            let path = entry?.path();
            let draft = path.extension().is_some_and(|extension| extension == "new");
            let owner = path.file_stem().and_then(|stem| stem.to_str()?.parse::<VolumeId>().ok());
            if draft && owner.is_none_or(|volume| !used.contains(&volume)) {
                std::fs::remove_file(path)?;
                swept += 1;
            }
        }
        Ok(swept)
    }

    fn mounted(&self) -> io::Result<BTreeSet<PathBuf>> {
        let text = std::fs::read_to_string("/proc/self/mounts")?;
        Ok(text
            .lines()
            .filter_map(|line| line.split(' ').nth(1))
            .map(|path| PathBuf::from(path.replace("\\040", " ")))
            .filter(|path| path.parent() == Some(&self.dir))
            .collect())
    }

    pub fn free_mib(&self) -> u64 {
        free_mib(&self.dir).unwrap_or(0)
    }
}

fn path(path: &Path) -> Result<String, VolumeError> {
    path.to_str().map(str::to_owned).ok_or_else(|| VolumeError::Failed("the data directory's path is not UTF-8".into()))
}

pub fn free_mib(path: &Path) -> io::Result<u64> {
    let stat = nix::sys::statvfs::statvfs(path)?;
    Ok((stat.blocks_available() as u64 * stat.fragment_size() as u64) >> 20)
}

async fn command(program: &str, arguments: &[&str]) -> Result<(), VolumeError> {
    let run = Command::new(program).args(arguments).stdin(Stdio::null()).kill_on_drop(true).output();
    let output = tokio::time::timeout(DEADLINE, run)
        .await
        .map_err(|_| VolumeError::Failed(format!("{program} took more than {} s", DEADLINE.as_secs())))?
        .map_err(|error| VolumeError::Failed(format!("{program} cannot be started: {error}")))?;
    if output.status.success() {
        return Ok(());
    }
    Err(VolumeError::Failed(format!("{program}: {}", String::from_utf8_lossy(&output.stderr).trim())))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[tokio::test]
    async fn a_volume_is_bounded_owned_and_survives_its_mount() {
        let dir = tempfile::tempdir().unwrap();
        let volumes = Volumes::new(dir.path().join("volumes")).unwrap();
        let volume = VolumeId::from_u128(7);
        let mount = volumes.ensure(volume, 8, 1234, 1235).await.unwrap();
        let meta = std::fs::metadata(&mount).unwrap();
        assert_eq!((meta.uid(), meta.gid()), (1234, 1235));
        assert_eq!(std::fs::read_dir(&mount).unwrap().count(), 0);
        std::fs::write(mount.join("kept"), "x").unwrap();
        let error = std::fs::write(mount.join("big"), vec![1; 9 << 20]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        std::fs::remove_file(mount.join("big")).unwrap();

        volumes.release(volume).await.unwrap();
        assert!(!mount.exists());
        assert_eq!(volumes.ensure(volume, 8, 1234, 1235).await.unwrap(), mount);
        assert_eq!(volumes.ensure(volume, 8, 1234, 1235).await.unwrap(), mount, "twice is once");
        assert_eq!(std::fs::read_to_string(mount.join("kept")).unwrap(), "x");

        std::fs::write(volumes.dir.join(format!("{}.new", VolumeId::from_u128(8))), "half").unwrap();
        assert_eq!(volumes.sweep(&BTreeSet::from([volume])).await.unwrap(), 1);
        assert!(mount.join("kept").exists());
        assert_eq!(volumes.sweep(&BTreeSet::new()).await.unwrap(), 1);
        volumes.destroy(volume).await.unwrap();
        volumes.destroy(volume).await.unwrap();
        assert_eq!(std::fs::read_dir(&volumes.dir).unwrap().count(), 0);
    }
}
