//! Programs of a test's own: started with a log, ended by pid, and by the kernel when the test dies.

use std::fs::{self, File};
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// A running program; killed when dropped.
pub struct Process {
    pub name: String,
    child: Child,
}

impl Process {
    /// Starts `command`, a program and its arguments, with an environment of its own and its output appended to `log`. Extra
    /// options of `setpriv` (another user, say) come first.
    pub fn start(name: &str, setpriv: &[&str], command: &[&str], env: &[(String, String)], log: &Path) -> Result<Self> {
        let log = File::options().create(true).append(true).open(log)?;
        // setpriv becomes the program. A test that is killed takes it along, for the kernel sends the signal then.
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL"])
            .args(setpriv)
            .args(command)
            .env_clear()
            .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
            .env("HOME", "/root")
            .env("LC_ALL", "C.UTF-8")
            .envs(env.iter().map(|(name, value)| (name.as_str(), value.as_str())))
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("starting {name}"))?;
        Ok(Self { name: name.to_owned(), child })
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// How it ended, if it did.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// `kill -9`, and gone when this returns.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Asks with `signal` and waits.
    ///
    /// # Errors
    /// When it had to be killed after `within`.
    pub fn stop(&mut self, signal: Signal, within: Duration) -> Result<ExitStatus> {
        if let Some(status) = self.ended() {
            return Ok(status);
        }
        kill(Pid::from_raw(i32::try_from(self.pid())?), signal)?;
        let end = Instant::now() + within;
        loop {
            if let Some(status) = self.ended() {
                return Ok(status);
            }
            if Instant::now() > end {
                self.kill();
                bail!("{} had to be killed {within:?} after {signal}", self.name);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Runs a command to its end; its standard output.
///
/// # Errors
/// When it fails, with what it said.
pub fn run(command: &[&str], env: &[(String, String)]) -> Result<String> {
    let output = Command::new(command[0])
        .args(&command[1..])
        .envs(env.iter().map(|(name, value)| (name.as_str(), value.as_str())))
        .stdin(Stdio::null())
        .output()
        .with_context(|| command.join(" "))?;
    if !output.status.success() {
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8_lossy(&said);
        bail!("{}: {}: {}", command.join(" "), output.status, &said[said.len().saturating_sub(2000)..]);
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Ports nobody listens on just now, all different.
///
/// # Errors
/// When the machine has none left.
pub fn free_ports<const N: usize>() -> Result<[u16; N]> {
    let listeners: Vec<TcpListener> = (0..N).map(|_| TcpListener::bind("127.0.0.1:0")).collect::<Result<_, _>>()?;
    let mut ports = [0; N];
    for (port, listener) in ports.iter_mut().zip(&listeners) {
        *port = listener.local_addr()?.port();
    }
    Ok(ports)
}

/// Every process whose command line has `text` in it, this one aside.
pub fn pids_mentioning(text: &str) -> Vec<u32> {
    let own = std::process::id();
    let found = fs::read_dir("/proc").into_iter().flatten().flatten();
    found
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|pid| *pid != own)
        .filter(|pid| {
            fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| String::from_utf8_lossy(&line).contains(text))
        })
        .collect()
}

/// What a process holds and has used.
#[derive(Clone, Copy, Debug)]
pub struct Usage {
    /// Resident memory, KiB.
    pub rss_kib: u64,
    /// Its own share of resident memory, KiB.
    pub pss_kib: u64,
    /// User and system time, seconds.
    pub cpu_s: f64,
}

/// From /proc.
///
/// # Errors
/// When there is no such process.
pub fn usage(pid: u32) -> Result<Usage> {
    let field = |text: &str, name: &str| -> u64 {
        let line = text.lines().find(|line| line.starts_with(name)).unwrap_or_default();
        line.split_whitespace().nth(1).and_then(|value| value.parse().ok()).unwrap_or_default()
    };
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let after_name = stat.rsplit_once(") ").context("stat")?.1;
    let ticks: Vec<f64> = after_name.split(' ').skip(11).take(2).filter_map(|ticks| ticks.parse().ok()).collect();
    let per_second = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK)?.unwrap_or(100) as f64;
    Ok(Usage {
        rss_kib: field(&status, "VmRSS:"),
        pss_kib: field(&rollup, "Pss:"),
        cpu_s: ticks.iter().sum::<f64>() / per_second,
    })
}
