//! The configuration file: TOML, read whole, checked whole, refused whole.
//!
//! Every problem names its line and says what to write instead; all problems of a file are reported at once.

use serde::{Deserialize, Deserializer, Serialize};
use std::collections::{HashMap, HashSet};
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;
use toml::Spanned;

/// Most listeners, and most backends over all pools: the sizes of the shared tables.
pub const MOST_LISTENERS: usize = 64;
pub const MOST_BACKENDS: usize = 1024;
pub const MOST_WORKERS: usize = 16;

/// What is wrong with a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// 1-based; 0 when the problem is the file as such.
    pub line: usize,
    pub message: String,
    pub remedy: String,
}

/// All problems of one file.
#[derive(Debug)]
pub struct Invalid {
    pub file: PathBuf,
    pub problems: Vec<Problem>,
}

impl fmt::Display for Invalid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, problem) in self.problems.iter().enumerate() {
            if number > 0 {
                writeln!(f)?;
            }
            write!(f, "{}", self.file.display())?;
            if problem.line > 0 {
                write!(f, ":{}", problem.line)?;
            }
            write!(f, ": {}", problem.message)?;
            if !problem.remedy.is_empty() {
                write!(f, "; {}", problem.remedy)?;
            }
        }
        Ok(())
    }
}

impl std::error::Error for Invalid {}

/// A time as people write it: `250ms`, `5s`, `10m`, `2h`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Span(pub Duration);

impl FromStr for Span {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        let unit = match &text[digits..] {
            "ms" => 1,
            "s" => 1000,
            "m" => 60_000,
            "h" => 3_600_000,
            _ => {
                return Err(format!(
                    "`{text}` is not a time; write a whole number and a unit, as in \"250ms\", \"5s\", \"10m\" or \"2h\""
                ));
            }
        };
        let number: u64 = text[..digits]
            .parse()
            .map_err(|_| format!("`{text}` is not a time; write a whole number before the unit"))?;
        match number.checked_mul(unit) {
            Some(ms) if ms <= 24 * 3_600_000 => Ok(Span(Duration::from_millis(ms))),
            _ => Err(format!("`{text}` is longer than a day; write at most \"24h\"")),
        }
    }
}

impl<'de> Deserialize<'de> for Span {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

impl Serialize for Span {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{}ms", self.0.as_millis()))
    }
}

/// An address range: `10.0.0.0/8`, or one address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range4or6 {
    base: IpAddr,
    bits: u8,
}

impl Range4or6 {
    pub fn contains(&self, addr: IpAddr) -> bool {
        match (self.base, addr.to_canonical()) {
            (IpAddr::V4(base), IpAddr::V4(addr)) => {
                let mask = u32::MAX.checked_shl(32 - u32::from(self.bits)).unwrap_or(0);
                (u32::from(base) ^ u32::from(addr)) & mask == 0
            }
            (IpAddr::V6(base), IpAddr::V6(addr)) => {
                let mask = u128::MAX.checked_shl(128 - u32::from(self.bits)).unwrap_or(0);
                (u128::from(base) ^ u128::from(addr)) & mask == 0
            }
            _ => false,
        }
    }
}

impl FromStr for Range4or6 {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("`{text}` is not an address range; write one as in \"10.0.0.0/8\" or \"192.0.2.7\"");
        let (base, bits) = text.split_once('/').map_or((text, None), |(base, bits)| (base, Some(bits)));
        let base: IpAddr = base.parse().map_err(|_| wrong())?;
        let most = if base.is_ipv4() { 32 } else { 128 };
        let bits = bits.map_or(Ok(most), |bits| bits.parse().map_err(|_| wrong()))?;
        if bits > most { Err(wrong()) } else { Ok(Range4or6 { base, bits }) }
    }
}

impl<'de> Deserialize<'de> for Range4or6 {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

impl Serialize for Range4or6 {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{}/{}", self.base, self.bits))
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    Tcp,
    Udp,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ProxyIn {
    #[default]
    Off,
    /// Every connection from `trusted` starts with a header, v1 or v2; anyone else is refused.
    Required,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ProxyOut {
    #[default]
    Off,
    V1,
    V2,
}

/// How an idle listener entry maps clients to a pool.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listener {
    pub name: String,
    pub protocol: Protocol,
    pub listen: SocketAddr,
    pub pool: String,
    pub connect_timeout: Span,
    pub idle_timeout: Span,
    pub proxy_in: ProxyIn,
    pub trusted: Vec<Range4or6>,
    pub proxy_out: ProxyOut,
    /// Most connections (or UDP flows) of one client address; 0 for no limit.
    pub per_client: u32,
    /// Most connections (or UDP flows) of the listener; 0 for no limit but the service's.
    pub connections: u32,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Backend {
    pub name: String,
    pub addr: SocketAddr,
    /// Share of new connections relative to the pool's other backends.
    pub weight: u32,
    /// Most connections; 0 for no limit.
    pub connections: u32,
    /// Takes no new connections.
    pub drain: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum CheckKind {
    Tcp,
    /// Sends `send` and wants any answer that contains `expect`.
    Udp {
        send: String,
        expect: String,
    },
    /// GET; a status of 200 to 399 is healthy.
    Http {
        path: String,
        host: String,
    },
    /// Status-Server of RFC 5997.
    RadiusStatus {
        secret: String,
    },
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    pub kind: CheckKind,
    pub interval: Span,
    pub timeout: Span,
    pub rise: u32,
    pub fall: u32,
    /// Checked on this port instead of the backend's own.
    pub port: Option<u16>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outlier {
    /// Failed connects in a row that eject a backend.
    pub failures: u32,
    /// First ejection; each next one in a row lasts that much longer, up to ten times.
    pub ejection: Span,
    /// Most of a pool's backends ejected at once, per cent.
    pub most_percent: u32,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pool {
    pub name: String,
    pub source: Option<IpAddr>,
    pub slow_start: Span,
    pub check: Option<Check>,
    pub outlier: Option<Outlier>,
    pub backends: Vec<Backend>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Admin {
    pub listen: SocketAddr,
    pub token: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ConduitSource {
    /// Prometheus text of an instance.
    Metrics(String),
    /// The older stats.json.
    StatsFile(PathBuf),
    /// A log whose last `[STATS]` line counts.
    LogFile(PathBuf),
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Conduit {
    pub name: String,
    pub source: ConduitSource,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capacity {
    /// Vendor's figure: users that one CPU with `memory_gib` serves, least and most.
    pub users_per_cpu: (u32, u32),
    pub memory_gib: u32,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Config {
    /// Most TCP connections and UDP flows together.
    pub connections: u32,
    /// 0: as many as the descriptor limit and the cores ask for.
    pub workers: usize,
    /// A direction is spliced after this many bytes.
    pub splice_after: u32,
    pub drain: Span,
    pub admin: Option<Admin>,
    pub country_database: Option<PathBuf>,
    pub listeners: Vec<Listener>,
    pub pools: Vec<Pool>,
    pub conduits: Vec<Conduit>,
    pub conduit_interval: Span,
    pub capacity: Capacity,
}

// What the file says, before it is checked ----------------------------------------------------------------------

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Raw {
    #[serde(default)]
    service: RawService,
    admin: Option<RawAdmin>,
    #[serde(default)]
    geo: RawGeo,
    #[serde(default)]
    listener: Vec<Spanned<RawListener>>,
    #[serde(default)]
    pool: Vec<Spanned<RawPool>>,
    #[serde(default)]
    conduit: Vec<Spanned<RawConduit>>,
    #[serde(default)]
    conduits: RawConduits,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
struct RawService {
    connections: Option<Spanned<u32>>,
    workers: Option<Spanned<usize>>,
    splice_after: Option<Spanned<u32>>,
    drain: Option<Span>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawAdmin {
    listen: Spanned<SocketAddr>,
    token: Option<Spanned<String>>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
struct RawGeo {
    database: Option<Spanned<PathBuf>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawListener {
    name: Spanned<String>,
    protocol: Protocol,
    listen: Spanned<SocketAddr>,
    pool: Spanned<String>,
    connect_timeout: Option<Spanned<Span>>,
    idle_timeout: Option<Spanned<Span>>,
    #[serde(default)]
    proxy_in: Option<Spanned<ProxyIn>>,
    #[serde(default)]
    trusted: Vec<Range4or6>,
    proxy_out: Option<Spanned<ProxyOut>>,
    #[serde(default)]
    per_client: u32,
    #[serde(default)]
    connections: u32,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawPool {
    name: Spanned<String>,
    source: Option<IpAddr>,
    slow_start: Option<Span>,
    check: Option<Spanned<RawCheck>>,
    outlier: Option<Spanned<RawOutlier>>,
    #[serde(default)]
    backend: Vec<Spanned<RawBackend>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawCheck {
    kind: Spanned<String>,
    interval: Option<Spanned<Span>>,
    timeout: Option<Spanned<Span>>,
    rise: Option<u32>,
    fall: Option<u32>,
    port: Option<u16>,
    send: Option<String>,
    expect: Option<String>,
    path: Option<String>,
    host: Option<String>,
    secret: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawOutlier {
    failures: Option<u32>,
    ejection: Option<Span>,
    most_percent: Option<u32>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawBackend {
    name: Option<Spanned<String>>,
    addr: Spanned<SocketAddr>,
    weight: Option<Spanned<u32>>,
    #[serde(default)]
    connections: u32,
    #[serde(default)]
    drain: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawConduit {
    name: Spanned<String>,
    metrics: Option<String>,
    stats_file: Option<PathBuf>,
    log_file: Option<PathBuf>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
struct RawConduits {
    interval: Option<Span>,
    users_per_cpu: Option<Spanned<(u32, u32)>>,
    memory_gib: Option<u32>,
}

struct Checker<'a> {
    text: &'a str,
    problems: Vec<Problem>,
}

impl Checker<'_> {
    fn line(&self, span: Range<usize>) -> usize {
        line_of(self.text, span.start)
    }

    fn refuse(&mut self, span: Range<usize>, message: impl Into<String>, remedy: impl Into<String>) {
        let line = self.line(span);
        self.problems.push(Problem { line, message: message.into(), remedy: remedy.into() });
    }

    fn name(&mut self, name: &Spanned<String>, what: &str) {
        let text = name.get_ref();
        let fine =
            (1..=64).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.:[]".contains(&b));
        if !fine {
            self.refuse(
                name.span(),
                format!("`{text}` cannot name a {what}"),
                "use 1 to 64 letters, digits, `-`, `_`, `.`, `:`",
            );
        }
    }

    fn at_least(&mut self, span: &Option<Spanned<Span>>, least: Duration, default: Duration, what: &str) -> Span {
        match span {
            Some(given) if given.get_ref().0 < least => {
                self.refuse(
                    given.span(),
                    format!("{what} is shorter than {} ms", least.as_millis()),
                    "write a longer time",
                );
                Span(default)
            }
            Some(given) => *given.get_ref(),
            None => Span(default),
        }
    }
}

/// What helps against what the TOML reader says.
fn remedy_of(message: &str) -> &'static str {
    if message.contains("socket address") {
        "write an IP address and a port, as in \"0.0.0.0:443\"; names are not looked up"
    } else if message.contains("IP address") {
        "write an IP address, as in \"192.0.2.7\"; names are not looked up"
    } else if message.contains("unknown field") {
        "take it out, or spell it as balancer.example.toml does"
    } else if message.contains("missing field") {
        "add it; balancer.example.toml shows every setting"
    } else {
        "balancer.example.toml shows how every setting is written"
    }
}

fn line_of(text: &str, at: usize) -> usize {
    text.as_bytes()[..at.min(text.len())].iter().filter(|byte| **byte == b'\n').count() + 1
}

/// Names that a new backend may take and the checks it must pass; shared with the admin API.
pub fn check_backend(backend: &Backend) -> Result<(), String> {
    if backend.addr.port() == 0 {
        return Err(format!("{} has no port; give the port the backend listens on", backend.addr));
    }
    if backend.addr.ip().is_unspecified() || backend.addr.ip().is_multicast() {
        return Err(format!("{} cannot be connected to; give the backend's own address", backend.addr));
    }
    if !(1..=1000).contains(&backend.weight) {
        return Err(format!(
            "a weight of {} is outside 1 to 1000; to send no new connections, drain the backend",
            backend.weight
        ));
    }
    if backend.name.is_empty()
        || backend.name.len() > 64
        || !backend.name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.:[]".contains(&b))
    {
        return Err(format!(
            "`{}` cannot name a backend; use 1 to 64 letters, digits, `-`, `_`, `.`, `:`",
            backend.name
        ));
    }
    Ok(())
}

impl Config {
    /// Reads and checks a file.
    pub fn load(file: &Path) -> Result<Config, Invalid> {
        let failed = |message: String, remedy: &str| Invalid {
            file: file.to_owned(),
            problems: vec![Problem { line: 0, message, remedy: remedy.into() }],
        };
        let size = std::fs::metadata(file).map(|meta| meta.len()).unwrap_or(0);
        if size > 4 << 20 {
            return Err(failed(format!("the file has {size} bytes"), "a configuration has at most 4 MiB"));
        }
        let text = std::fs::read_to_string(file).map_err(|error| {
            failed(format!("cannot be read: {error}"), "give the path of a readable file with --config")
        })?;
        Self::parse(&text).map_err(|problems| Invalid { file: file.to_owned(), problems })
    }

    /// Checks a text.
    pub fn parse(text: &str) -> Result<Config, Vec<Problem>> {
        let raw: Raw = toml::from_str(text).map_err(|error| {
            let line = error.span().map_or(0, |span| line_of(text, span.start));
            let message = error.message().trim().replace('\n', " ");
            let remedy = remedy_of(&message).to_owned();
            vec![Problem { line, message, remedy }]
        })?;
        let mut checker = Checker { text, problems: Vec::new() };
        let config = checker.config(raw);
        if checker.problems.is_empty() {
            Ok(config)
        } else {
            checker.problems.sort_by_key(|problem| problem.line);
            Err(checker.problems)
        }
    }

    pub fn pool(&self, name: &str) -> Option<&Pool> {
        self.pools.iter().find(|pool| pool.name == name)
    }
}

impl Checker<'_> {
    fn config(&mut self, raw: Raw) -> Config {
        let connections = match &raw.service.connections {
            Some(given) if !(1..=4_000_000).contains(given.get_ref()) => {
                self.refuse(
                    given.span(),
                    "service.connections is outside 1 to 4000000",
                    "write how many clients are to be held at once",
                );
                1
            }
            given => given.as_ref().map_or(10_000, |given| *given.get_ref()),
        };
        let workers = match &raw.service.workers {
            Some(given) if *given.get_ref() > MOST_WORKERS => {
                self.refuse(
                    given.span(),
                    format!("more than {MOST_WORKERS} workers"),
                    "leave it out to have the number chosen",
                );
                0
            }
            given => given.as_ref().map_or(0, |given| *given.get_ref()),
        };
        let splice_after = match &raw.service.splice_after {
            Some(given) if *given.get_ref() < 4096 => {
                self.refuse(
                    given.span(),
                    "service.splice_after is below 4096 bytes",
                    "small flows lose by splice: 262144 is a good value",
                );
                4096
            }
            given => given.as_ref().map_or(256 << 10, |given| *given.get_ref()),
        };
        let admin = raw.admin.map(|admin| {
            if let Some(token) = &admin.token
                && token.get_ref().len() < 16
            {
                self.refuse(token.span(), "admin.token is shorter than 16 characters", "use a long random text");
            }
            if admin.token.is_none() && !admin.listen.get_ref().ip().is_loopback() {
                self.refuse(
                    admin.listen.span(),
                    format!("the admin API would be open to everyone who reaches {}", admin.listen.get_ref()),
                    "add admin.token, or listen on 127.0.0.1",
                );
            }
            Admin { listen: *admin.listen.get_ref(), token: admin.token.map(Spanned::into_inner) }
        });
        if let Some(database) = &raw.geo.database
            && let Err(error) = std::fs::File::open(database.get_ref())
        {
            self.refuse(
                database.span(),
                format!("geo.database cannot be read: {error}"),
                "give the path of an MMDB file, or leave [geo] out",
            );
        }

        let pools = self.pools(&raw.pool);
        let listeners = self.listeners(&raw.listener, &raw.pool);
        let conduits = self.conduits(&raw.conduit);
        let users_per_cpu = match &raw.conduits.users_per_cpu {
            Some(given) if given.get_ref().0 == 0 || given.get_ref().1 < given.get_ref().0 => {
                self.refuse(
                    given.span(),
                    "conduits.users_per_cpu is not a least and a most",
                    "write it as in [150, 350]",
                );
                (150, 350)
            }
            given => given.as_ref().map_or((150, 350), |given| *given.get_ref()),
        };
        Config {
            connections,
            workers,
            splice_after,
            drain: raw.service.drain.unwrap_or(Span(Duration::from_secs(30))),
            admin,
            country_database: raw.geo.database.map(Spanned::into_inner),
            listeners,
            pools,
            conduits,
            conduit_interval: raw.conduits.interval.unwrap_or(Span(Duration::from_secs(10))),
            capacity: Capacity { users_per_cpu, memory_gib: raw.conduits.memory_gib.unwrap_or(2) },
        }
    }

    fn pools(&mut self, raw: &[Spanned<RawPool>]) -> Vec<Pool> {
        let mut names: HashMap<&str, usize> = HashMap::new();
        let mut total = 0;
        let mut pools = Vec::new();
        for spanned in raw {
            let pool = spanned.get_ref();
            self.name(&pool.name, "pool");
            if let Some(line) = names.insert(pool.name.get_ref(), self.line(pool.name.span())) {
                self.refuse(
                    pool.name.span(),
                    format!("pool `{}` is defined in line {line} already", pool.name.get_ref()),
                    "give each pool its own name",
                );
            }
            let check = pool.check.as_ref().map(|check| self.check(check));
            let outlier = pool.outlier.as_ref().map(|outlier| {
                let given = outlier.get_ref();
                let most_percent = given.most_percent.unwrap_or(50);
                if given.failures == Some(0) || most_percent > 100 {
                    self.refuse(
                        outlier.span(),
                        "pool.outlier has failures = 0 or most_percent above 100",
                        "write failures = 5 and most_percent = 50",
                    );
                }
                Outlier {
                    failures: given.failures.unwrap_or(5),
                    ejection: given.ejection.unwrap_or(Span(Duration::from_secs(10))),
                    most_percent,
                }
            });
            let mut backends = Vec::new();
            let (mut seen, mut addrs) = (HashSet::new(), HashSet::new());
            for spanned in &pool.backend {
                let raw = spanned.get_ref();
                let backend = Backend {
                    name: raw
                        .name
                        .as_ref()
                        .map_or_else(|| raw.addr.get_ref().to_string(), |name| name.get_ref().clone()),
                    addr: *raw.addr.get_ref(),
                    weight: raw.weight.as_ref().map_or(100, |weight| *weight.get_ref()),
                    connections: raw.connections,
                    drain: raw.drain,
                };
                let span = raw.name.as_ref().map_or_else(|| raw.addr.span(), Spanned::span);
                if let Err(problem) = check_backend(&backend) {
                    let (message, remedy) = problem.split_once("; ").unwrap_or((&problem, ""));
                    self.refuse(
                        raw.weight
                            .as_ref()
                            .filter(|_| problem.contains("weight"))
                            .map_or(raw.addr.span(), Spanned::span),
                        message,
                        remedy,
                    );
                }
                if !seen.insert(backend.name.clone()) {
                    self.refuse(
                        span,
                        format!("backend `{}` appears twice in pool `{}`", backend.name, pool.name.get_ref()),
                        "give each backend of a pool its own name",
                    );
                }
                if !addrs.insert(backend.addr) {
                    self.refuse(
                        raw.addr.span(),
                        format!("address {} appears twice in pool `{}`", backend.addr, pool.name.get_ref()),
                        "one port cannot serve two containers: give each its own address or port",
                    );
                }
                if let Some(source) = pool.source
                    && source.is_ipv4() != backend.addr.is_ipv4()
                {
                    self.refuse(
                        raw.addr.span(),
                        format!("{} cannot be reached from source {source}", backend.addr),
                        "use addresses of one family",
                    );
                }
                backends.push(backend);
            }
            total += backends.len();
            if total > MOST_BACKENDS {
                self.refuse(
                    spanned.span(),
                    format!("more than {MOST_BACKENDS} backends in all pools"),
                    "spread them over several balancers",
                );
                break;
            }
            pools.push(Pool {
                name: pool.name.get_ref().clone(),
                source: pool.source,
                slow_start: pool.slow_start.unwrap_or(Span(Duration::ZERO)),
                check,
                outlier,
                backends,
            });
        }
        pools
    }

    fn check(&mut self, spanned: &Spanned<RawCheck>) -> Check {
        let raw = spanned.get_ref();
        let kind = match raw.kind.get_ref().as_str() {
            "tcp" => CheckKind::Tcp,
            "udp" => CheckKind::Udp {
                send: raw.send.clone().unwrap_or_default(),
                expect: raw.expect.clone().unwrap_or_default(),
            },
            "http" => CheckKind::Http {
                path: raw.path.clone().unwrap_or_else(|| "/".into()),
                host: raw.host.clone().unwrap_or_else(|| "health".into()),
            },
            "radius-status" => {
                if raw.secret.as_ref().is_none_or(String::is_empty) {
                    self.refuse(
                        raw.kind.span(),
                        "a radius-status check has no secret",
                        "add secret = \"…\", the shared secret of this client",
                    );
                }
                CheckKind::RadiusStatus { secret: raw.secret.clone().unwrap_or_default() }
            }
            other => {
                self.refuse(
                    raw.kind.span(),
                    format!("there is no check `{other}`"),
                    "use tcp, udp, http or radius-status",
                );
                CheckKind::Tcp
            }
        };
        if let CheckKind::Http { path, host } = &kind
            && (!path.starts_with('/') || path.bytes().chain(host.bytes()).any(|byte| byte <= b' ' || byte >= 0x7f))
        {
            self.refuse(
                spanned.span(),
                "the path or host of the http check is malformed",
                "a path starts with `/`, and neither holds spaces",
            );
        }
        let interval =
            self.at_least(&raw.interval, Duration::from_millis(50), Duration::from_secs(1), "check.interval");
        let timeout = self.at_least(
            &raw.timeout,
            Duration::from_millis(10),
            interval.0.min(Duration::from_secs(5)),
            "check.timeout",
        );
        Check {
            kind,
            interval,
            timeout,
            rise: raw.rise.unwrap_or(2).max(1),
            fall: raw.fall.unwrap_or(2).max(1),
            port: raw.port,
        }
    }

    fn listeners(&mut self, raw: &[Spanned<RawListener>], pools: &[Spanned<RawPool>]) -> Vec<Listener> {
        if raw.is_empty() {
            self.problems.push(Problem {
                line: 0,
                message: "there is no listener".into(),
                remedy: "add a [[listener]] with name, protocol, listen and pool".into(),
            });
        }
        if raw.len() > MOST_LISTENERS {
            self.refuse(
                raw[MOST_LISTENERS].span(),
                format!("more than {MOST_LISTENERS} listeners"),
                "spread them over several balancers",
            );
        }
        let mut names: HashMap<&str, usize> = HashMap::new();
        let mut taken: HashMap<(Protocol, SocketAddr), usize> = HashMap::new();
        let mut used: HashMap<&str, (Protocol, &str)> = HashMap::new();
        let mut listeners = Vec::new();
        for spanned in raw.iter().take(MOST_LISTENERS) {
            let listener = spanned.get_ref();
            self.name(&listener.name, "listener");
            if let Some(line) = names.insert(listener.name.get_ref(), self.line(listener.name.span())) {
                self.refuse(
                    listener.name.span(),
                    format!("listener `{}` is defined in line {line} already", listener.name.get_ref()),
                    "give each listener its own name",
                );
            }
            let addr = *listener.listen.get_ref();
            let key = (listener.protocol, addr);
            if addr.port() != 0
                && let Some(line) = taken.insert(key, self.line(listener.listen.span()))
            {
                self.refuse(
                    listener.listen.span(),
                    format!("{addr} is taken by the listener in line {line}"),
                    "one address and port serve one listener for each protocol",
                );
            }
            let pool = listener.pool.get_ref();
            if !pools.iter().any(|candidate| candidate.get_ref().name.get_ref() == pool) {
                self.refuse(
                    listener.pool.span(),
                    format!("there is no pool `{pool}`"),
                    format!("add a [[pool]] with name = \"{pool}\""),
                );
            }
            if let Some((protocol, other)) = used.insert(pool, (listener.protocol, listener.name.get_ref()))
                && protocol == listener.protocol
            {
                self.refuse(
                    listener.pool.span(),
                    format!(
                        "pool `{pool}` serves listener `{other}` already, so the traffic of two entry ports would mix"
                    ),
                    "give each entry port its own pool",
                );
            }
            if let Some(proxy_in) = &listener.proxy_in
                && *proxy_in.get_ref() == ProxyIn::Required
                && listener.trusted.is_empty()
            {
                self.refuse(
                    proxy_in.span(),
                    "proxy_in = \"required\" trusts nobody",
                    "add trusted = [\"…\"] with the addresses of the proxies in front",
                );
            }
            if let Some(proxy_out) = &listener.proxy_out
                && *proxy_out.get_ref() == ProxyOut::V1
                && listener.protocol == Protocol::Udp
            {
                self.refuse(proxy_out.span(), "PROXY v1 knows no UDP", "write proxy_out = \"v2\"");
            }
            let idle = if listener.protocol == Protocol::Tcp { 300 } else { 60 };
            listeners.push(Listener {
                name: listener.name.get_ref().clone(),
                protocol: listener.protocol,
                listen: addr,
                pool: pool.clone(),
                connect_timeout: self.at_least(
                    &listener.connect_timeout,
                    Duration::from_millis(10),
                    Duration::from_secs(5),
                    "connect_timeout",
                ),
                idle_timeout: self.at_least(
                    &listener.idle_timeout,
                    Duration::from_millis(50),
                    Duration::from_secs(idle),
                    "idle_timeout",
                ),
                proxy_in: listener.proxy_in.as_ref().map_or(ProxyIn::Off, |given| *given.get_ref()),
                trusted: listener.trusted.clone(),
                proxy_out: listener.proxy_out.as_ref().map_or(ProxyOut::Off, |given| *given.get_ref()),
                per_client: listener.per_client,
                connections: listener.connections,
            });
        }
        listeners
    }

    fn conduits(&mut self, raw: &[Spanned<RawConduit>]) -> Vec<Conduit> {
        let mut names = HashSet::new();
        raw.iter()
            .filter_map(|spanned| {
                let conduit = spanned.get_ref();
                self.name(&conduit.name, "conduit");
                if !names.insert(conduit.name.get_ref()) {
                    self.refuse(
                        conduit.name.span(),
                        format!("conduit `{}` appears twice", conduit.name.get_ref()),
                        "give each its own name",
                    );
                }
                if let Some(url) = &conduit.metrics
                    && let Err(problem) = crate::conduit::split_url(url)
                {
                    self.refuse(spanned.span(), problem, "write it as in \"http://127.0.0.1:9090/metrics\"");
                }
                let sources = [
                    conduit.metrics.clone().map(ConduitSource::Metrics),
                    conduit.stats_file.clone().map(ConduitSource::StatsFile),
                    conduit.log_file.clone().map(ConduitSource::LogFile),
                ];
                let mut given = sources.into_iter().flatten();
                match (given.next(), given.next()) {
                    (Some(source), None) => Some(Conduit { name: conduit.name.get_ref().clone(), source }),
                    _ => {
                        self.refuse(
                            spanned.span(),
                            "a conduit has not exactly one source",
                            "give one of metrics, stats_file and log_file",
                        );
                        None
                    }
                }
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GOOD: &str = include_str!("../balancer.example.toml");

    #[test]
    fn the_example_is_valid_and_defaults_are_the_documented_ones() {
        let config = Config::parse(GOOD).unwrap();
        let https = &config.listeners[0];
        assert_eq!((https.connect_timeout.0.as_secs(), https.idle_timeout.0.as_secs()), (5, 300));
        let udp = config.listeners.iter().find(|listener| listener.protocol == Protocol::Udp).unwrap();
        assert_eq!(udp.idle_timeout.0.as_secs(), 60);
        assert_eq!(
            config.listeners.iter().map(|listener| listener.listen.port()).collect::<Vec<_>>(),
            [443, 5566, 5566]
        );
    }

    #[test]
    fn every_problem_names_its_line_and_a_remedy() {
        let text = r#"
[service]
connections = 0
[[listener]]
name = "a"
protocol = "tcp"
listen = "127.0.0.1:4000"
pool = "nowhere"
proxy_in = "required"
[[listener]]
name = "a"
protocol = "tcp"
listen = "127.0.0.1:4000"
pool = "p"
idle_timeout = "1ms"
[[pool]]
name = "p"
[pool.check]
kind = "magic"
[[pool.backend]]
addr = "127.0.0.1:0"
[[pool.backend]]
addr = "127.0.0.1:9"
weight = 0
[[pool.backend]]
addr = "127.0.0.1:9"
name = "x"
"#;
        let problems = Config::parse(text).unwrap_err();
        let lines: Vec<usize> = problems.iter().map(|problem| problem.line).collect();
        assert_eq!(lines, [3, 8, 9, 11, 13, 15, 19, 21, 24, 26], "{problems:#?}");
        assert!(problems.iter().all(|problem| !problem.remedy.is_empty()), "{problems:#?}");
    }

    #[test]
    fn syntax_and_unknown_keys_name_their_line() {
        for (text, line, word) in [
            ("[service]\nconections = 5\n", 2, "conections"),
            ("[service\n", 1, ""),
            ("[service]\ndrain = \"5 years\"\n", 2, "is not a time"),
            ("[[listener]]\nname='a'\nprotocol='sctp'\nlisten='1.2.3.4:5'\npool='p'\n", 3, "sctp"),
            ("[[listener]]\nname='a'\nprotocol='tcp'\nlisten='localhost:5'\npool='p'\n", 4, "socket address"),
        ] {
            let problems = Config::parse(text).unwrap_err();
            assert_eq!(problems[0].line, line, "{text}: {problems:?}");
            assert!(problems[0].message.contains(word), "{problems:?}");
            assert!(!problems[0].remedy.is_empty());
        }
    }

    #[test]
    fn two_entry_ports_cannot_share_a_pool() {
        let text = GOOD.replace("pool = \"tunnel\"", "pool = \"https\"");
        let problems = Config::parse(&text).unwrap_err();
        assert!(problems.iter().any(|problem| problem.message.contains("would mix")), "{problems:?}");
    }

    #[test]
    fn an_open_admin_api_is_refused() {
        let open = "[admin]\nlisten = '0.0.0.0:9600'\n";
        let problems = Config::parse(open).unwrap_err();
        assert!(
            problems.iter().any(|problem| problem.line == 2 && problem.message.contains("open to everyone")),
            "{problems:?}"
        );
    }

    #[test]
    fn ranges_contain_what_they_say() {
        let range: Range4or6 = "10.1.0.0/16".parse().unwrap();
        assert!(range.contains("10.1.255.1".parse().unwrap()) && range.contains("::ffff:10.1.0.1".parse().unwrap()));
        assert!(!range.contains("10.2.0.0".parse().unwrap()) && !range.contains("::1".parse().unwrap()));
        let all: Range4or6 = "::/0".parse().unwrap();
        assert!(all.contains("2001:db8::1".parse().unwrap()));
        assert!("10.0.0.0/33".parse::<Range4or6>().is_err() && "x".parse::<Range4or6>().is_err());
    }

    proptest! {
        /// Any text gives a config or problems, and what a config holds is within its bounds.
        #[test]
        fn no_text_breaks_the_parser(cut in 0usize..GOOD.len(), with in "\\PC{0,12}", len in 0usize..40) {
            let start = (cut..=GOOD.len()).find(|at| GOOD.is_char_boundary(*at)).unwrap();
            let end = ((start + len).min(GOOD.len())..=GOOD.len()).find(|at| GOOD.is_char_boundary(*at)).unwrap();
            let text = format!("{}{with}{}", &GOOD[..start], &GOOD[end..]);
            match Config::parse(&text) {
                Ok(config) => {
                    prop_assert!(config.listeners.iter().all(|listener| config.pool(&listener.pool).is_some()));
                    prop_assert!(config.pools.iter().flat_map(|pool| &pool.backends).all(|backend| check_backend(backend).is_ok()));
                }
                Err(problems) => prop_assert!(!problems.is_empty() && problems.iter().all(|problem| !problem.message.is_empty())),
            }
        }
    }
}
