//! Processes by record: a pid alone may have been recycled, a pid with its start time and the boot it belongs to may not.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// `<data>/run/<name>.pid`, holding `pid start-ticks boot-id`. `dev` reads and writes the same form.
pub struct Record {
    path: PathBuf,
}

impl Record {
    /// The record called `name` under the data directory.
    pub fn new(data: &Path, name: &str) -> Self {
        Record { path: data.join("run").join(format!("{name}.pid")) }
    }

    /// Records a running process.
    ///
    /// # Errors
    /// When it is gone already or the file cannot be written.
    pub fn write(&self, pid: u32) -> io::Result<()> {
        let start = start_ticks(pid).ok_or_else(|| io::Error::other(format!("process {pid} ended at once")))?;
        fs::create_dir_all(self.path.parent().unwrap_or(Path::new("/")))?;
        let partial = self.path.with_extension("partial");
        fs::write(&partial, format!("{pid} {start} {}\n", boot_id()))?;
        fs::rename(partial, &self.path)
    }

    /// The pid, when the recorded process is the one that runs under it now.
    pub fn alive(&self) -> Option<u32> {
        let text = fs::read_to_string(&self.path).ok()?;
        let mut words = text.split_whitespace();
        let pid: u32 = words.next()?.parse().ok()?;
        let start: u64 = words.next()?.parse().ok()?;
        let boot = words.next()?;
        (boot == boot_id() && start_ticks(pid) == Some(start)).then_some(pid)
    }

    /// Forgets the process.
    pub fn clear(&self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// When a process started, in clock ticks since boot; `None` when there is none, or only its zombie.
pub fn start_ticks(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command's name is in parentheses and may hold anything: count from behind it.
    let mut fields = stat.rsplit_once(") ")?.1.split(' ');
    if fields.next()? == "Z" {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").map(|id| id.trim().to_owned()).unwrap_or_default()
}

/// Whether the process runs this very build: the file it was started from is still the one at `path`.
pub fn runs_binary(pid: u32, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let running = fs::metadata(format!("/proc/{pid}/exe"));
    let wanted = fs::metadata(path);
    matches!((running, wanted), (Ok(a), Ok(b)) if a.dev() == b.dev() && a.ino() == b.ino())
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn a_record_knows_its_process_and_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let record = Record::new(dir.path(), "x");
        assert_eq!(record.alive(), None);
        record.write(std::process::id()).unwrap();
        assert_eq!(record.alive(), Some(std::process::id()));
        // The same pid with another start time is another process.
        let path = dir.path().join("run/x.pid");
        let text = fs::read_to_string(&path).unwrap();
        let start = start_ticks(std::process::id()).unwrap();
        fs::write(&path, text.replace(&start.to_string(), &(start + 1).to_string())).unwrap();
        assert_eq!(record.alive(), None);
        // And so is the same pid of another boot.
        fs::write(&path, format!("{} {start} another-boot\n", std::process::id())).unwrap();
        assert_eq!(record.alive(), None);
    }

    #[test]
    fn the_dead_are_not_alive() {
        let dir = tempfile::tempdir().unwrap();
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let record = Record::new(dir.path(), "x");
        record.write(child.id()).unwrap();
        assert!(record.alive().is_some());
        assert!(runs_binary(std::process::id(), &std::env::current_exe().unwrap()));
        assert!(!runs_binary(child.id(), &std::env::current_exe().unwrap()));
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(record.alive(), None);
        assert!(record.write(child.id()).is_err());
    }
}
