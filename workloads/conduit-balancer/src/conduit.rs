//! Figures of conduit instances, from their Prometheus text, their older stats file, or their log; and what they add up to.

use crate::config::{Capacity, Conduit, ConduitSource};
use crate::fetch;
use serde::Serialize;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

/// Most bytes of a source that are read.
const MOST: usize = 1 << 20;
const TIMEOUT: Duration = Duration::from_secs(5);

#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Region {
    pub connecting: u64,
    pub connected: u64,
    pub bytes_up: u64,
    pub bytes_down: u64,
}

/// What one instance says of itself; what its source does not say is `None` or empty.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Figures {
    pub announcing: Option<u64>,
    pub connecting: u64,
    pub connected: u64,
    pub bytes_up: u64,
    pub bytes_down: u64,
    pub uptime_seconds: Option<u64>,
    pub idle_seconds: Option<u64>,
    /// Whether the broker knows it.
    pub live: Option<bool>,
    pub max_clients: Option<u64>,
    pub regions: BTreeMap<String, Region>,
}

/// Reads one source.
pub async fn read(source: &ConduitSource) -> Result<Figures, String> {
    let read = async {
        match source {
            ConduitSource::Metrics(url) => {
                let (addr, host, path) = split_url(url)?;
                let (status, body) =
                    fetch::get(addr, None, host, path, MOST).await.map_err(|error| error.to_string())?;
                if status != 200 {
                    return Err(format!("status {status}"));
                }
                from_metrics(&String::from_utf8_lossy(&body))
            }
            ConduitSource::StatsFile(file) => from_stats(&tail(file).await?),
            ConduitSource::LogFile(file) => from_log(&tail(file).await?),
        }
    };
    tokio::time::timeout(TIMEOUT, read).await.unwrap_or_else(|_| Err("no answer within 5 s".into()))
}

/// `http://ADDRESS:PORT/path` in its parts. Names are not looked up: a static binary has no resolver of the system's.
pub fn split_url(url: &str) -> Result<(SocketAddr, &str, &str), String> {
    let wrong = || format!("`{url}` is not of the form http://ADDRESS:PORT/metrics with an IP address");
    let rest = url.strip_prefix("http://").ok_or_else(wrong)?;
    let (host, path) = rest.find('/').map_or((rest, "/metrics"), |at| rest.split_at(at));
    if path.bytes().any(|byte| byte <= b' ' || byte >= 0x7f) {
        return Err(wrong());
    }
    let addr = host.parse().or_else(|_| host.parse().map(|ip| SocketAddr::new(ip, 80))).map_err(|_| wrong())?;
    Ok((addr, host, path))
}

/// The last `MOST` bytes of a file.
async fn tail(file: &Path) -> Result<String, String> {
    use tokio::io::{AsyncReadExt, AsyncSeekExt};
    let said = |error: std::io::Error| format!("{}: {error}", file.display());
    let mut open = tokio::fs::File::open(file).await.map_err(said)?;
    let size = open.metadata().await.map_err(said)?.len();
    open.seek(std::io::SeekFrom::Start(size.saturating_sub(MOST as u64))).await.map_err(said)?;
    let mut bytes = Vec::new();
    open.take(MOST as u64).read_to_end(&mut bytes).await.map_err(said)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Prometheus text with `conduit_*` metrics.
pub fn from_metrics(text: &str) -> Result<Figures, String> {
    let mut figures = Figures::default();
    let mut any = false;
    for line in text.lines() {
        let line = line.trim();
        let Some(rest) = line.strip_prefix("conduit_") else { continue };
        let (name, labels, value) = match rest.split_once('{') {
            Some((name, rest)) => {
                let Some((labels, value)) = rest.rsplit_once('}') else { continue };
                (name, labels, value)
            }
            None => match rest.split_once(char::is_whitespace) {
                Some((name, value)) => (name, "", value),
                None => continue,
            },
        };
        let Some(value) = value.split_whitespace().next().and_then(|value| value.parse::<f64>().ok()) else { continue };
        if !value.is_finite() || value < 0.0 {
            continue;
        }
        let value = value as u64;
        any = true;
        match name {
            "announcing" => figures.announcing = Some(value),
            "connecting_clients" => figures.connecting = value,
            "connected_clients" => figures.connected = value,
            "bytes_uploaded" => figures.bytes_up = value,
            "bytes_downloaded" => figures.bytes_down = value,
            "uptime_seconds" => figures.uptime_seconds = Some(value),
            "idle_seconds" => figures.idle_seconds = Some(value),
            "is_live" => figures.live = Some(value > 0),
            "max_common_clients" | "max_personal_clients" => {
                figures.max_clients = Some(figures.max_clients.unwrap_or(0).saturating_add(value));
            }
            _ => {
                let Some(what) = name.strip_prefix("region_") else { continue };
                let Some(code) = label(labels, "region").filter(|code| is_region(code)) else { continue };
                let region = figures.regions.entry(code).or_default();
                match what {
                    "bytes_uploaded" => region.bytes_up = region.bytes_up.saturating_add(value),
                    "bytes_downloaded" => region.bytes_down = region.bytes_down.saturating_add(value),
                    "connecting_clients" => region.connecting = region.connecting.saturating_add(value),
                    "connected_clients" => region.connected = region.connected.saturating_add(value),
                    _ => {}
                }
            }
        }
    }
    if any { Ok(figures) } else { Err("no conduit_ metrics in the answer".into()) }
}

fn is_region(code: &str) -> bool {
    (1..=16).contains(&code.len()) && code.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
}

fn label(labels: &str, name: &str) -> Option<String> {
    labels.split(',').find_map(|pair| {
        let (key, value) = pair.split_once('=')?;
        (key.trim() == name).then(|| value.trim().trim_matches('"').to_owned())
    })
}

/// The stats.json of older instances, with the `geo` list that a fork adds.
pub fn from_stats(text: &str) -> Result<Figures, String> {
    let value: serde_json::Value =
        serde_json::from_str(text).map_err(|error| format!("not the stats file: {error}"))?;
    let number = |name: &str| value.get(name).and_then(serde_json::Value::as_u64);
    let connected = number("connectedClients").ok_or("the stats file has no connectedClients")?;
    let mut regions = BTreeMap::new();
    for geo in value.get("geo").and_then(|geo| geo.as_array()).into_iter().flatten().take(1000) {
        let number = |name: &str| geo.get(name).and_then(serde_json::Value::as_u64).unwrap_or(0);
        if let Some(code) = geo.get("code").and_then(|code| code.as_str()).filter(|code| is_region(code)) {
            let region = Region {
                connecting: 0,
                connected: number("count"),
                bytes_up: number("bytes_up"),
                bytes_down: number("bytes_down"),
            };
            regions.insert(code.to_owned(), region);
        }
    }
    Ok(Figures {
        announcing: number("announcing"),
        connecting: number("connectingClients").unwrap_or(0),
        connected,
        bytes_up: number("totalBytesUp").unwrap_or(0),
        bytes_down: number("totalBytesDown").unwrap_or(0),
        uptime_seconds: number("uptimeSeconds"),
        idle_seconds: number("idleSeconds"),
        live: value.get("isLive").and_then(serde_json::Value::as_bool),
        max_clients: None,
        regions,
    })
}

/// The last `[STATS]` line of a log, in the older or the present form.
pub fn from_log(text: &str) -> Result<Figures, String> {
    text.lines().rev().find_map(from_log_line).ok_or_else(|| "no [STATS] line in the log yet".into())
}

fn from_log_line(line: &str) -> Option<Figures> {
    let (_, stats) = line.split_once("[STATS]")?;
    let mut figures = Figures::default();
    let mut seen = false;
    let (fields, regions) = stats.split_once("| Regions:").map_or((stats, ""), |(fields, regions)| (fields, regions));
    for field in fields.split('|') {
        let Some((key, value)) = field.split_once(':') else { continue };
        let value = value.trim();
        match key.trim() {
            "Announcing" => figures.announcing = value.parse().ok(),
            "Connecting" => figures.connecting = value.parse().ok()?,
            "Connected" => {
                figures.connected = value.parse().ok()?;
                seen = true;
            }
            "Up" => figures.bytes_up = size(value)?,
            "Down" => figures.bytes_down = size(value)?,
            "Uptime" => figures.uptime_seconds = go_duration(value),
            _ => {}
        }
    }
    // `common[IR(conn:12|traffic:1.0 GB), RU(conn:3|traffic:5 MB), (+2 more...)]`: shortened, so a sum of it is a lower bound.
    for part in regions.split(['[', ',']) {
        let Some((code, rest)) = part.trim().split_once('(') else { continue };
        let connected = rest.split_once("conn:").and_then(|(_, rest)| {
            let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
            digits.parse::<u64>().ok()
        });
        if let (true, Some(connected)) = (is_region(code), connected) {
            figures.regions.entry(code.to_owned()).or_default().connected += connected;
        }
    }
    seen.then_some(figures)
}

/// `1.2 GB`, `512 B`, `3.4 MiB`: the unit steps by 1024 as the instances count.
fn size(text: &str) -> Option<u64> {
    let at = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let number: f64 = text[..at].parse().ok()?;
    let step = match text[at..].trim().bytes().next().map(|byte| byte.to_ascii_uppercase()) {
        None | Some(b'B') => 0,
        Some(b'K') => 1,
        Some(b'M') => 2,
        Some(b'G') => 3,
        Some(b'T') => 4,
        Some(b'P') => 5,
        _ => return None,
    };
    Some((number * 1024f64.powi(step)) as u64)
}

/// `3h4m5s` in seconds.
fn go_duration(text: &str) -> Option<u64> {
    let (mut total, mut number) = (0u64, String::new());
    for c in text.chars() {
        match c {
            '0'..='9' | '.' => number.push(c),
            'h' | 'm' | 's' => {
                let value: f64 = std::mem::take(&mut number).parse().ok()?;
                total += (value
                    * match c {
                        'h' => 3600.0,
                        'm' => 60.0,
                        _ => 1.0,
                    }) as u64;
            }
            _ => return None,
        }
    }
    number.is_empty().then_some(total)
}

/// One instance among the others.
#[derive(Debug, Clone, Serialize)]
pub struct Instance {
    pub name: String,
    pub figures: Option<Figures>,
    /// Why its figures are missing, or a plain word on why they are zero.
    pub note: Option<String>,
    /// Of all connected clients, 0 to 1.
    pub share: f64,
}

#[derive(Debug, Clone, Default, Serialize)]
pub struct Summary {
    pub read: usize,
    pub failed: usize,
    pub live: usize,
    pub connecting: u64,
    pub connected: u64,
    pub bytes_up: u64,
    pub bytes_down: u64,
    pub regions: BTreeMap<String, Region>,
    pub instances: Vec<Instance>,
    pub advice: Vec<String>,
}

/// Adds up what was read.
pub fn sum(read: Vec<(String, Result<Figures, String>)>, capacity: &Capacity, cpus: usize, memory_gib: u64) -> Summary {
    let mut summary = Summary::default();
    for figures in read.iter().filter_map(|(_, read)| read.as_ref().ok()) {
        summary.read += 1;
        summary.live += usize::from(figures.live == Some(true));
        summary.connecting = summary.connecting.saturating_add(figures.connecting);
        summary.connected = summary.connected.saturating_add(figures.connected);
        summary.bytes_up = summary.bytes_up.saturating_add(figures.bytes_up);
        summary.bytes_down = summary.bytes_down.saturating_add(figures.bytes_down);
        for (code, region) in &figures.regions {
            let sum = summary.regions.entry(code.clone()).or_default();
            sum.connecting = sum.connecting.saturating_add(region.connecting);
            sum.connected = sum.connected.saturating_add(region.connected);
            sum.bytes_up = sum.bytes_up.saturating_add(region.bytes_up);
            sum.bytes_down = sum.bytes_down.saturating_add(region.bytes_down);
        }
    }
    summary.failed = read.len() - summary.read;
    for (name, read) in read {
        let share = match (&read, summary.connected) {
            (Ok(figures), 1..) => figures.connected as f64 / summary.connected as f64,
            _ => 0.0,
        };
        let note = match &read {
            Ok(figures) => zero_note(figures),
            Err(why) => Some(why.clone()),
        };
        summary.instances.push(Instance { name, note, share, figures: read.ok() });
    }
    summary.advice = advice(&summary, capacity, cpus, memory_gib);
    summary
}

fn zero_note(figures: &Figures) -> Option<String> {
    if figures.connected + figures.connecting > 0 {
        return None;
    }
    Some(match (figures.live, figures.idle_seconds) {
        (Some(false), _) => "the broker does not know it yet; no client can be sent here".into(),
        (_, Some(idle)) if idle < 3600 => {
            "no clients now; a new or quiet instance may wait hours for its first, which is normal".into()
        }
        (_, Some(idle)) => {
            format!("no clients for {} h; normal for a new key, but check the address if others are busy", idle / 3600)
        }
        _ => "no clients; a new instance may wait many hours for its first, which is normal".into(),
    })
}

/// What the vendor's figure says about the users there are and the machine there is.
fn advice(summary: &Summary, capacity: &Capacity, cpus: usize, memory_gib: u64) -> Vec<String> {
    let (least, most) = capacity.users_per_cpu;
    let users = summary.connected + summary.connecting;
    let span = |users: u64| (users.div_ceil(u64::from(most)), users.div_ceil(u64::from(least)));
    let (few, many) = span(users);
    let memory = u64::from(capacity.memory_gib);
    let mut lines = vec![format!(
        "{users} users need {few} to {many} CPUs and {} to {} GiB by the vendor's figure of {least} to {most} users for a CPU and {memory} GiB",
        few * memory,
        many * memory
    )];
    let cpus = cpus as u64;
    let units = cpus.min(memory_gib / memory.max(1)).max(1);
    lines.push(format!(
        "this machine ({cpus} CPUs, {memory_gib} GiB) serves {} to {} users by it",
        units * u64::from(least),
        units * u64::from(most)
    ));
    if users > units * u64::from(most) {
        lines.push(format!(
            "that is more than this machine can serve well: spread the instances over {} machines like it",
            users.div_ceil(units * u64::from(most))
        ));
    }
    lines
}

/// Reads all sources at once.
pub async fn read_all(conduits: &[Conduit]) -> Vec<(String, Result<Figures, String>)> {
    let mut tasks = tokio::task::JoinSet::new();
    for (place, conduit) in conduits.iter().cloned().enumerate() {
        tasks.spawn(async move { (place, conduit.name, read(&conduit.source).await) });
    }
    let mut all = tasks.join_all().await;
    all.sort_by_key(|(place, ..)| *place);
    all.into_iter().map(|(_, name, read)| (name, read)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const METRICS: &str = "# HELP conduit_connected_clients x\n# TYPE conduit_connected_clients gauge\nconduit_connected_clients 12\n\
        conduit_connecting_clients 3\nconduit_announcing 1\nconduit_is_live 1\nconduit_bytes_uploaded 1.5e+09\nconduit_bytes_downloaded 2048\n\
        conduit_uptime_seconds 3661.5\nconduit_idle_seconds 0\nconduit_max_common_clients 150\nconduit_max_personal_clients 10\n\
        conduit_region_connected_clients{scope=\"common\",region=\"IR\"} 10\nconduit_region_connected_clients{scope=\"personal\",region=\"IR\"} 2\n\
        conduit_region_bytes_uploaded{scope=\"common\",region=\"IR\"} 700\ngo_goroutines 44\n";

    #[test]
    fn all_formats_are_read() {
        let metrics = from_metrics(METRICS).unwrap();
        assert_eq!(
            (metrics.connected, metrics.connecting, metrics.bytes_up, metrics.live),
            (12, 3, 1_500_000_000, Some(true))
        );
        assert_eq!((metrics.max_clients, metrics.uptime_seconds), (Some(160), Some(3661)));
        assert_eq!(metrics.regions["IR"], Region { connecting: 0, connected: 12, bytes_up: 700, bytes_down: 0 });

        let stats = r#"{"announcing":0,"connectingClients":1,"connectedClients":7,"totalBytesUp":5,"totalBytesDown":6,"uptimeSeconds":9,"idleSeconds":2,
            "isLive":true,"timestamp":"2026-01-24T19:52:51Z","geo":[{"code":"RU","country":"Russia","count":4,"count_total":9,"bytes_up":1,"bytes_down":2}]}"#;
        let stats = from_stats(stats).unwrap();
        assert_eq!((stats.connected, stats.connecting, stats.bytes_down, stats.regions["RU"].connected), (7, 1, 6, 4));

        let old = "2026-01-24 19:52:51 [STATS] Connecting: 2 | Connected: 5 | Up: 1.5 GB | Down: 512 B | Uptime: 3h4m5s\n2026-01-24 19:52:52 other\n";
        let old = from_log(old).unwrap();
        assert_eq!((old.connecting, old.connected, old.bytes_up, old.bytes_down), (2, 5, 1_610_612_736, 512));
        assert_eq!(old.uptime_seconds, Some(11_045));

        let new = "x [STATS] Announcing: 4 | Connecting: 1 | Connected: 15 | Up: 1.2 GB | Down: 3 MB | Uptime: 5s | \
            Regions: common[IR(conn:12|traffic:1.0 GB), RU(conn:3|traffic:5.0 MB), (+2 more...)]";
        let new = from_log(new).unwrap();
        assert_eq!(
            (new.announcing, new.connected, new.regions["IR"].connected, new.regions["RU"].connected),
            (Some(4), 15, 12, 3)
        );

        assert!(from_metrics("<html>").is_err() && from_stats("{}").is_err() && from_log("nothing").is_err());
    }

    #[test]
    fn sums_shares_and_advice() {
        let capacity = Capacity { users_per_cpu: (150, 350), memory_gib: 2 };
        let one = Figures { connected: 30_000, live: Some(true), ..Figures::default() };
        let two = Figures { connected: 10_000, live: Some(true), ..Figures::default() };
        let zero = Figures { live: Some(false), ..Figures::default() };
        let read = vec![
            ("a".into(), Ok(one)),
            ("b".into(), Ok(two)),
            ("c".into(), Ok(zero)),
            ("d".into(), Err("refused".into())),
        ];
        let summary = sum(read, &capacity, 16, 64);
        assert_eq!((summary.connected, summary.read, summary.failed, summary.live), (40_000, 3, 1, 2));
        assert_eq!(summary.instances.iter().map(|instance| instance.share).collect::<Vec<_>>(), [0.75, 0.25, 0.0, 0.0]);
        assert!(summary.advice[0].contains("115 to 267 CPUs and 230 to 534 GiB"), "{:?}", summary.advice);
        assert!(
            summary.advice[1].contains("2400 to 5600 users") && summary.advice[2].contains("8 machines"),
            "{:?}",
            summary.advice
        );
        assert!(summary.instances[2].note.as_ref().unwrap().contains("broker"));
    }

    proptest! {
        #[test]
        fn any_text_is_read_without_panic(text in "\\PC{0,200}", cut in 0usize..600) {
            let _ = (from_metrics(&text), from_stats(&text), from_log(&format!("[STATS] {text}")));
            let cut = (0..=cut.min(METRICS.len())).rev().find(|at| METRICS.is_char_boundary(*at)).unwrap();
            let _ = from_metrics(&format!("{}{text}", &METRICS[..cut]));
        }
    }
}
