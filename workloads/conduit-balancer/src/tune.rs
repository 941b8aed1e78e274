//! Kernel settings for very many connections: applied from a file of their own, read back, and undone exactly.
//!
//! Values that only have to be large are never lowered. The port range is widened without taking ports that services
//! listen on: those are reserved. Nothing is appended to anyone else's file.

use crate::config::Config;
use anyhow::{Context, bail};
use clap::Subcommand;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
    /// Ports of this configuration's listeners and backends are kept out of the port range
    #[arg(long, global = true)]
    config: Option<PathBuf>,
    /// Another root directory, for images and tests
    #[arg(long, global = true, default_value = "/")]
    root: PathBuf,
}

#[derive(Subcommand, Clone, Copy, PartialEq, Eq)]
enum Command {
    /// Set what is missing, remember what was, and write the file
    Apply,
    /// Say what is set and what is not; fails if anything is missing
    Verify,
    /// Put everything back as it was before the first apply
    Undo,
}

/// How a setting's present value is judged.
enum Want {
    /// This value or a larger one.
    AtLeast(u64),
    /// This value or a smaller one.
    AtMost(u64),
    Exactly(&'static str),
    /// Ports from the first or lower to the second or higher.
    Ports(u16, u16),
    /// All of these ports among the reserved ones.
    Reserved(Vec<u16>),
    /// This congestion control, if the kernel has it.
    Congestion(&'static str),
}

struct Setting {
    name: &'static str,
    want: Want,
    why: &'static str,
}

/// What the machine says of one setting.
#[derive(Debug, PartialEq, Eq)]
enum Found {
    Fine(String),
    /// Present value, and the one to write.
    Change(String, String),
    /// The kernel has no such setting, or lacks what it needs.
    Lacking(String),
}

fn settings(ports: Vec<u16>) -> Vec<Setting> {
    let setting = |name, want, why| Setting { name, want, why };
    vec![
        setting(
            "net.core.somaxconn",
            Want::AtLeast(65_535),
            "a burst past the accept queue costs each client a second",
        ),
        setting("net.ipv4.tcp_max_syn_backlog", Want::AtLeast(8192), "handshakes that may be under way"),
        setting("net.core.netdev_max_backlog", Want::AtLeast(5000), "packets waiting for a core"),
        setting(
            "net.ipv4.ip_local_reserved_ports",
            Want::Reserved(ports),
            "ports of services must not be lent to outgoing connections",
        ),
        // From 10240, not 1024: below it live services that nobody listed.
        setting("net.ipv4.ip_local_port_range", Want::Ports(10_240, 65_535), "outgoing connections to one backend"),
        // Before the congestion control, which paces by it.
        setting("net.core.default_qdisc", Want::Exactly("fq"), "bbr paces by it"),
        setting("net.ipv4.tcp_congestion_control", Want::Congestion("bbr"), "lossy and long paths"),
        // file-max is per machine; many kernels start above this value, and it must not be lowered.
        setting("fs.file-max", Want::AtLeast(2_097_152), "descriptors of the machine"),
        setting("net.ipv4.tcp_fin_timeout", Want::AtMost(30), "orphaned connections end sooner"),
        setting("net.ipv4.tcp_keepalive_time", Want::AtMost(300), "dead clients are found sooner"),
        setting("net.ipv4.tcp_tw_reuse", Want::Exactly("1"), "outgoing ports are reused after a second"),
    ]
}

impl Setting {
    fn path(&self, root: &Path) -> PathBuf {
        root.join("proc/sys").join(self.name.replace('.', "/"))
    }

    fn look(&self, root: &Path) -> Found {
        let now = match fs::read_to_string(self.path(root)) {
            Ok(text) => text.split_whitespace().collect::<Vec<_>>().join(" "),
            Err(error) => return Found::Lacking(format!("this kernel or namespace does not have it ({error})")),
        };
        let number = now.parse::<u64>();
        match &self.want {
            Want::AtLeast(least) => match number {
                Ok(value) if value >= *least => Found::Fine(now),
                _ => Found::Change(now, least.to_string()),
            },
            Want::AtMost(most) => match number {
                Ok(value) if value <= *most => Found::Fine(now),
                _ => Found::Change(now, most.to_string()),
            },
            Want::Exactly(value) if now == *value => Found::Fine(now),
            Want::Exactly(value) => Found::Change(now, (*value).to_owned()),
            Want::Ports(low, high) => {
                let ends: Vec<u16> = now.split(' ').filter_map(|end| end.parse().ok()).collect();
                match *ends.as_slice() {
                    [from, to] if from <= *low && to >= *high => Found::Fine(now),
                    [from, to] => Found::Change(now, format!("{} {}", from.min(*low), to.max(*high))),
                    _ => Found::Change(now, format!("{low} {high}")),
                }
            }
            Want::Reserved(ports) => {
                let mut all = parse_ports(&now);
                let before = all.len();
                all.extend(ports);
                all.sort_unstable();
                all.dedup();
                if all.len() == before { Found::Fine(now) } else { Found::Change(now, format_ports(&all)) }
            }
            Want::Congestion(name) => {
                let available = fs::read_to_string(root.join("proc/sys/net/ipv4/tcp_available_congestion_control"))
                    .unwrap_or_default();
                if now == *name {
                    Found::Fine(now)
                } else if available.split_whitespace().any(|have| have == *name) {
                    Found::Change(now, (*name).to_owned())
                } else {
                    Found::Lacking(format!(
                        "the kernel does not offer {name} (it has: {}); `modprobe tcp_{name}`, or a kernel built with it, then apply again",
                        available.trim()
                    ))
                }
            }
        }
    }
}

/// `80,443,8000-8010` as single ports.
fn parse_ports(text: &str) -> Vec<u16> {
    text.split(',')
        .filter_map(|part| {
            let (from, to) = part.trim().split_once('-').unwrap_or((part.trim(), part.trim()));
            Some(from.parse::<u16>().ok()?..=to.parse::<u16>().ok()?)
        })
        .flatten()
        .collect()
}

/// Sorted ports with ranges, as the kernel prints them.
fn format_ports(ports: &[u16]) -> String {
    let mut parts: Vec<(u16, u16)> = Vec::new();
    for port in ports {
        match parts.last_mut() {
            Some((_, to)) if to.checked_add(1) == Some(*port) => *to = *port,
            _ => parts.push((*port, *port)),
        }
    }
    let part = |(from, to): (u16, u16)| if from == to { from.to_string() } else { format!("{from}-{to}") };
    parts.into_iter().map(part).collect::<Vec<_>>().join(",")
}

/// What was there before the first apply.
#[derive(Serialize, Deserialize, Default)]
struct Before {
    values: BTreeMap<String, String>,
}

fn file(root: &Path) -> PathBuf {
    root.join("etc/sysctl.d/60-conduit-balancer.conf")
}

fn journal(root: &Path) -> PathBuf {
    root.join("var/lib/conduit-balancer/tune.json")
}

fn ports(config: Option<&Path>) -> anyhow::Result<Vec<u16>> {
    let Some(config) = config else { return Ok(Vec::new()) };
    let config = Config::load(config)?;
    let listeners = config.listeners.iter().map(|listener| listener.listen.port());
    let local = |ip: std::net::IpAddr| ip.is_loopback();
    let backends = config.pools.iter().flat_map(|pool| &pool.backends).filter(|backend| local(backend.addr.ip()));
    let mut ports: Vec<u16> =
        listeners.chain(backends.map(|backend| backend.addr.port())).filter(|port| *port > 0).collect();
    ports.extend(config.admin.map(|admin| admin.listen.port()));
    Ok(ports)
}

/// Runs the subcommand and reports on standard output.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let mut report = String::new();
    let outcome = act(args.command, &args.root, ports(args.config.as_deref())?, &mut report);
    print!("{report}");
    outcome
}

fn act(command: Command, root: &Path, ports: Vec<u16>, report: &mut String) -> anyhow::Result<()> {
    use std::fmt::Write;
    let settings = settings(ports);
    match command {
        Command::Apply => {
            let mut before = read_journal(root)?;
            let mut kept = String::from(
                "# Written by `conduit-balancer tune apply`; taken back by `conduit-balancer tune undo`.\n",
            );
            let mut failed = 0;
            for setting in &settings {
                match setting.look(root) {
                    Found::Fine(value) => {
                        // Ours from an earlier run stays in the file.
                        if before.values.contains_key(setting.name) {
                            let _ = writeln!(kept, "# {}\n{} = {value}", setting.why, setting.name);
                        }
                        let _ = writeln!(report, "fine     {} = {value}", setting.name);
                    }
                    Found::Lacking(why) => {
                        let _ = writeln!(report, "lacking  {}: {why}", setting.name);
                    }
                    Found::Change(now, new) => {
                        // Remembered on disk before it is changed: an interrupted run can still be undone.
                        before.values.entry(setting.name.to_owned()).or_insert_with(|| now.clone());
                        write_journal(root, &before)?;
                        let written = fs::write(setting.path(root), &new);
                        match (written, setting.look(root)) {
                            (Ok(()), Found::Fine(value)) => {
                                let _ = writeln!(kept, "# {}\n{} = {value}", setting.why, setting.name);
                                let _ = writeln!(report, "set      {} = {value} (was {})", setting.name, shown(&now));
                            }
                            (written, _) => {
                                failed += 1;
                                before.values.remove(setting.name);
                                write_journal(root, &before)?;
                                let why = written
                                    .err()
                                    .map_or("the kernel did not take the value".into(), |error| error.to_string());
                                let _ = writeln!(report, "failed   {} = {new}: {why}", setting.name);
                            }
                        }
                    }
                }
            }
            if !before.values.is_empty() {
                replace(&file(root), &kept)?;
                let _ = writeln!(report, "written  {}", file(root).display());
            }
            if failed > 0 {
                bail!("{failed} settings could not be changed; run as root of the machine, outside containers");
            }
            Ok(())
        }
        Command::Verify => {
            let mut missing = 0;
            for setting in &settings {
                match setting.look(root) {
                    Found::Fine(value) => {
                        let _ = writeln!(report, "fine     {} = {value}", setting.name);
                    }
                    Found::Lacking(why) => {
                        let _ = writeln!(report, "lacking  {}: {why}", setting.name);
                    }
                    Found::Change(now, new) => {
                        missing += 1;
                        let _ = writeln!(
                            report,
                            "missing  {} is {}, wanted {new} ({})",
                            setting.name,
                            shown(&now),
                            setting.why
                        );
                    }
                }
            }
            if missing > 0 {
                bail!("{missing} settings are missing; `conduit-balancer tune apply` sets them");
            }
            Ok(())
        }
        Command::Undo => {
            let mut before = read_journal(root)?;
            if before.values.is_empty() && !file(root).exists() {
                let _ = writeln!(report, "nothing was applied");
                return Ok(());
            }
            let mut failed = 0;
            // The reverse order: the congestion control before the queue it needs.
            for setting in settings.iter().rev() {
                let Some(value) = before.values.get(setting.name).cloned() else { continue };
                let path = setting.path(root);
                // An empty list of ports is written as an empty line.
                let restored = fs::write(&path, format!("{value}\n")).and_then(|()| fs::read_to_string(&path));
                let same = restored.as_ref().is_ok_and(|text| text.split_whitespace().eq(value.split_whitespace()));
                if same {
                    before.values.remove(setting.name);
                    let _ = writeln!(report, "restored {} = {}", setting.name, shown(&value));
                } else {
                    failed += 1;
                    let why =
                        restored.err().map_or("the kernel did not take the value".into(), |error| error.to_string());
                    let _ = writeln!(report, "failed   {} = {}: {why}", setting.name, shown(&value));
                }
            }
            if failed > 0 {
                write_journal(root, &before)?;
                bail!("{failed} settings could not be restored and are still remembered");
            }
            for gone in [file(root), journal(root)] {
                match fs::remove_file(&gone) {
                    Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                        return Err(error).with_context(|| gone.display().to_string());
                    }
                    _ => {}
                }
            }
            let _ = writeln!(report, "removed  {}", file(root).display());
            Ok(())
        }
    }
}

fn shown(value: &str) -> &str {
    if value.is_empty() { "(empty)" } else { value }
}

fn read_journal(root: &Path) -> anyhow::Result<Before> {
    match fs::read_to_string(journal(root)) {
        Ok(text) => serde_json::from_str(&text).with_context(|| format!("{} is damaged", journal(root).display())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Before::default()),
        Err(error) => Err(error).with_context(|| journal(root).display().to_string()),
    }
}

fn write_journal(root: &Path, before: &Before) -> anyhow::Result<()> {
    replace(&journal(root), &serde_json::to_string_pretty(before)?)
}

/// Writes a file whole or not at all.
fn replace(path: &Path, text: &str) -> anyhow::Result<()> {
    let said = || path.display().to_string();
    fs::create_dir_all(path.parent().expect("a path below the root")).with_context(said)?;
    let new = path.with_extension("new");
    fs::write(&new, text)
        .and_then(|()| fs::File::open(&new)?.sync_all())
        .and_then(|()| fs::rename(&new, path))
        .with_context(said)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A machine on disk: the settings are plain files, which take whatever is written.
    fn machine(values: &[(&str, &str)], congestion: &str) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (name, value) in values.iter().chain(&[("net.ipv4.tcp_available_congestion_control", congestion)]) {
            let path = root.path().join("proc/sys").join(name.replace('.', "/"));
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, format!("{value}\n")).unwrap();
        }
        root
    }

    const STOCK: [(&str, &str); 11] = [
        ("net.core.somaxconn", "4096"),
        ("net.ipv4.tcp_max_syn_backlog", "16384"),
        ("net.core.netdev_max_backlog", "1000"),
        ("net.ipv4.ip_local_reserved_ports", ""),
        ("net.ipv4.ip_local_port_range", "32768\t60999"),
        ("net.core.default_qdisc", "pfifo_fast"),
        ("net.ipv4.tcp_congestion_control", "cubic"),
        ("fs.file-max", "9223372036854775807"),
        ("net.ipv4.tcp_fin_timeout", "60"),
        ("net.ipv4.tcp_keepalive_time", "7200"),
        ("net.ipv4.tcp_tw_reuse", "2"),
    ];

    fn read(root: &Path, name: &str) -> String {
        fs::read_to_string(root.join("proc/sys").join(name.replace('.', "/")))
            .unwrap()
            .split_whitespace()
            .collect::<Vec<_>>()
            .join(" ")
    }

    fn on(command: Command, root: &Path) -> (anyhow::Result<()>, String) {
        let mut report = String::new();
        let outcome = act(command, root, vec![443, 5566, 9600], &mut report);
        (outcome, report)
    }

    #[test]
    fn applied_twice_verified_and_undone_exactly() {
        let machine = machine(&STOCK, "reno cubic bbr");
        let root = machine.path();
        assert!(on(Command::Verify, root).0.is_err());
        on(Command::Apply, root).0.unwrap();
        let first = fs::read_to_string(file(root)).unwrap();
        assert!(on(Command::Verify, root).0.is_ok());
        on(Command::Apply, root).0.unwrap();
        assert_eq!(fs::read_to_string(file(root)).unwrap(), first, "applying again changes nothing");
        assert_eq!(read(root, "net.core.somaxconn"), "65535");
        assert_eq!(read(root, "net.ipv4.ip_local_port_range"), "10240 65535");
        assert_eq!(read(root, "net.ipv4.ip_local_reserved_ports"), "443,5566,9600");
        assert_eq!(read(root, "fs.file-max"), "9223372036854775807", "never lowered");
        assert_eq!(read(root, "net.ipv4.tcp_max_syn_backlog"), "16384", "never lowered");
        assert!(!first.contains("file-max"), "what was fine is not ours to fix: {first}");
        on(Command::Undo, root).0.unwrap();
        for (name, value) in STOCK {
            assert_eq!(read(root, name), value.split_whitespace().collect::<Vec<_>>().join(" "), "{name}");
        }
        assert!(!file(root).exists() && !journal(root).exists());
        assert!(on(Command::Undo, root).1.contains("nothing was applied"));
    }

    #[test]
    fn a_kernel_without_bbr_is_named() {
        let machine = machine(&STOCK, "reno cubic");
        let (outcome, report) = on(Command::Apply, machine.path());
        outcome.unwrap();
        assert!(report.contains("does not offer bbr (it has: reno cubic)"), "{report}");
        assert_eq!(read(machine.path(), "net.ipv4.tcp_congestion_control"), "cubic");
    }

    #[test]
    fn a_missing_setting_is_reported_and_the_rest_is_set() {
        let machine = machine(&STOCK[1..], "bbr");
        let (outcome, report) = on(Command::Apply, machine.path());
        outcome.unwrap();
        assert!(report.contains("lacking  net.core.somaxconn"), "{report}");
        assert_eq!(read(machine.path(), "net.ipv4.tcp_fin_timeout"), "30");
    }

    #[test]
    fn ports_go_there_and_back() {
        assert_eq!(format_ports(&parse_ports("80, 443,8000-8003")), "80,443,8000-8003");
        assert_eq!(format_ports(&[1, 2, 3, 65_535]), "1-3,65535");
        assert!(parse_ports("").is_empty());
    }
}
