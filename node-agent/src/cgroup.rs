//! A container's control groups, read and written directly: the freezer and the count of memory kills. Versions 1 and 2.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Where the hierarchies are mounted on this host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hierarchies {
    freezer: Option<PathBuf>,
    memory: Option<PathBuf>,
    unified: Option<PathBuf>,
}

impl Hierarchies {
    pub fn of_host() -> io::Result<Self> {
        Ok(Self::parse(&fs::read_to_string("/proc/self/mounts")?))
    }

    fn parse(mounts: &str) -> Self {
        let mut found = Self::default();
        for line in mounts.lines() {
            let mut fields = line.split(' ').skip(1);
            let (Some(path), Some(kind), Some(options)) = (fields.next(), fields.next(), fields.next()) else {
                continue;
            };
            let has = |name: &str| options.split(',').any(|option| option == name);
            match kind {
                "cgroup2" => found.unified = found.unified.or_else(|| Some(path.into())),
                "cgroup" if has("freezer") => found.freezer = found.freezer.or_else(|| Some(path.into())),
                "cgroup" if has("memory") => found.memory = found.memory.or_else(|| Some(path.into())),
                _ => {}
            }
        }
        found
    }

    /// The groups of a process, as the host sees them.
    pub fn of_pid(&self, pid: u32) -> io::Result<Cgroup> {
        Ok(self.of_text(&fs::read_to_string(format!("/proc/{pid}/cgroup"))?))
    }

    fn of_text(&self, text: &str) -> Cgroup {
        let mut group = Cgroup::default();
        let at = |root: &Option<PathBuf>, path: &str| root.as_ref().map(|root| root.join(path.trim_start_matches('/')));
        for line in text.lines() {
            let mut fields = line.splitn(3, ':').skip(1);
            let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else { continue };
            match controllers {
                "" => group.unified = at(&self.unified, path),
                _ if controllers.split(',').any(|name| name == "freezer") => group.freezer = at(&self.freezer, path),
                _ if controllers.split(',').any(|name| name == "memory") => group.memory = at(&self.memory, path),
                _ => {}
            }
        }
        group
    }
}

/// The id of the Docker container a `/proc/PID/cgroup` text belongs to: the last part of a path that is one.
pub fn container_id(text: &str) -> Option<&str> {
    text.lines().filter_map(|line| line.splitn(3, ':').nth(2)).flat_map(|path| path.rsplit('/')).find_map(|part| {
        let part = part.strip_suffix(".scope").map_or(part, |scope| scope.rsplit('-').next().unwrap_or(scope));
        (part.len() == 64 && part.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte)))
            .then_some(part)
    })
}

/// One container's groups.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cgroup {
    freezer: Option<PathBuf>,
    memory: Option<PathBuf>,
    unified: Option<PathBuf>,
}

impl Cgroup {
    fn freezer_file(&self) -> io::Result<(PathBuf, bool)> {
        if let Some(path) = &self.freezer {
            return Ok((path.join("freezer.state"), false));
        }
        let path = self.unified.as_ref().ok_or_else(|| io::Error::other("this host has no freezer"))?;
        Ok((path.join("cgroup.freeze"), true))
    }

    /// Stops every process of the container where it is; returns when they stand still. Blocks up to two seconds.
    pub fn freeze(&self) -> io::Result<()> {
        let (file, unified) = self.freezer_file()?;
        fs::write(&file, if unified { "1" } else { "FROZEN" })?;
        let deadline = Instant::now() + Duration::from_secs(2);
        while !self.is_frozen()? {
            if Instant::now() > deadline {
                self.thaw()?;
                return Err(io::Error::new(io::ErrorKind::TimedOut, "it does not freeze"));
            }
            // Version 1 has to be asked again while processes are on their way into the kernel.
            if !unified {
                fs::write(&file, "FROZEN")?;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    pub fn thaw(&self) -> io::Result<()> {
        let (file, unified) = self.freezer_file()?;
        fs::write(file, if unified { "0" } else { "THAWED" })
    }

    pub fn is_frozen(&self) -> io::Result<bool> {
        let (file, unified) = self.freezer_file()?;
        if unified {
            let events = fs::read_to_string(file.with_file_name("cgroup.events"))?;
            return Ok(field(&events, "frozen") == Some(1));
        }
        Ok(fs::read_to_string(file)?.trim() == "FROZEN")
    }

    /// How often the kernel has killed something in it for want of memory, as far as that can be read.
    pub fn memory_kills(&self) -> Option<u64> {
        let read = |path: &Path| fs::read_to_string(path).ok();
        if let Some(path) = &self.memory {
            return field(&read(&path.join("memory.oom_control"))?, "oom_kill");
        }
        field(&read(&self.unified.as_ref()?.join("memory.events"))?, "oom_kill")
    }
}

fn field(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

    #[test]
    fn containers_are_known_by_their_group_whoever_made_it() {
        for text in [
            format!("4:freezer:/docker/{ID}\n0::/\n"),
            format!("0::/system.slice/docker-{ID}.scope\n"),
            format!("0::/sim-h1/{ID}/inner\n"),
        ] {
            assert_eq!(container_id(&text), Some(ID), "{text}");
        }
        assert_eq!(container_id("0::/user.slice/session-1.scope\n1:cpu:/\n"), None);
        assert_eq!(container_id(&format!("0::/{}\n", ID.to_uppercase())), None);
    }

    #[test]
    fn both_versions_are_found() {
        let hybrid = "cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n\
                      cgroup /sys/fs/cgroup/freezer cgroup rw,nosuid,freezer 0 0\n\
                      cgroup /sys/fs/cgroup/memory cgroup rw,memory 0 0\n";
        let group = Hierarchies::parse(hybrid).of_text("4:freezer:/docker/x\n3:memory:/docker/x\n0::/y\n");
        assert_eq!(group.freezer_file().unwrap().0, Path::new("/sys/fs/cgroup/freezer/docker/x/freezer.state"));
        assert_eq!(group.memory.unwrap(), Path::new("/sys/fs/cgroup/memory/docker/x"));
        let pure = Hierarchies::parse("cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n").of_text("0::/docker/x\n");
        assert_eq!(pure.freezer_file().unwrap(), (PathBuf::from("/sys/fs/cgroup/docker/x/cgroup.freeze"), true));
    }

    #[test]
    fn version_2_files_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let group = Cgroup { unified: Some(dir.path().to_owned()), ..Cgroup::default() };
        fs::write(dir.path().join("cgroup.events"), "populated 1\nfrozen 1\n").unwrap();
        fs::write(dir.path().join("memory.events"), "oom 2\noom_kill 3\noom_group_kill 0\n").unwrap();
        group.freeze().unwrap();
        assert_eq!(fs::read_to_string(dir.path().join("cgroup.freeze")).unwrap(), "1");
        assert_eq!(group.memory_kills(), Some(3));
        group.thaw().unwrap();
        assert_eq!(fs::read_to_string(dir.path().join("cgroup.freeze")).unwrap(), "0");
    }
}
