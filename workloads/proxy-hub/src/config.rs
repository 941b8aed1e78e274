//! The configuration file: TOML, checked whole before anything starts. An error names the file, the line and the remedy.

use crate::account::AccountSpec;
use crate::dest::{Net, Policy};
use serde::Deserialize;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    pub hub: HubConfig,
    pub peers: PeersConfig,
    pub customers: CustomersConfig,
    pub api: ApiConfig,
    pub policy: PolicyConfig,
    pub geo: GeoConfig,
    pub ledger: LedgerConfig,
    pub directory: Option<DirectoryConfig>,
    pub customer: Vec<AccountSpec>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct HubConfig {
    /// Tells this hub from others in a shared ledger and directory.
    pub name: String,
    /// Threads that serve connections; 0 for one a core.
    pub shards: usize,
    /// Where the tally and the embedded ledger lie.
    pub data: PathBuf,
}

impl Default for HubConfig {
    fn default() -> Self {
        Self { name: "hub".into(), shards: 0, data: "data".into() }
    }
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PeersConfig {
    pub listen: SocketAddr,
    /// SHA-256 (hex) of the tokens that let a peer in; none lets every peer in.
    pub tokens_sha256: Vec<String>,
    /// Oldest version of a peer that may join.
    pub min_version: String,
    /// A silent peer is pinged after this, and given up after twice this.
    pub heartbeat_seconds: u32,
    /// Most tunnels through one peer.
    pub max_tunnels: u16,
    /// Bytes that a device may carry in a day (UTC), both ways, before it gets no new tunnels; 0 for any.
    pub bytes_per_day: u64,
    /// Registrations a second above which peers are told to come back later.
    pub registrations_per_second: u32,
    /// Whether peers of the older protocol, which cannot say so, count as having their owner's consent.
    pub legacy_consent: bool,
    /// Give peers of the older protocol the address that the hub resolved and checked; `false` sends the name, which
    /// they resolve and do not check.
    pub legacy_resolved: bool,
    /// Load balancers in front: only from them are PROXY headers and X-Forwarded-For believed.
    pub trusted_proxies: Vec<String>,
}

impl Default for PeersConfig {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([0, 0, 0, 0], 9443)),
            tokens_sha256: Vec::new(),
            min_version: "1.0.62".into(),
            heartbeat_seconds: 12,
            max_tunnels: 32,
            bytes_per_day: 0,
            registrations_per_second: 1000,
            legacy_consent: true,
            legacy_resolved: true,
            trusted_proxies: Vec::new(),
        }
    }
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CustomersConfig {
    pub listen: SocketAddr,
    /// A tunnel on which nothing moves is closed after this.
    pub idle_seconds: u64,
    /// Time a customer has to say what it wants.
    pub handshake_seconds: u64,
    /// Time a peer has to open a tunnel.
    pub open_seconds: u64,
    /// Peers tried for one request.
    pub attempts: u8,
    pub trusted_proxies: Vec<String>,
}

impl Default for CustomersConfig {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([0, 0, 0, 0], 1080)),
            idle_seconds: 600,
            handshake_seconds: 10,
            open_seconds: 15,
            attempts: 3,
            trusted_proxies: Vec::new(),
        }
    }
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ApiConfig {
    pub listen: SocketAddr,
    /// SHA-256 (hex) of the token that the API wants. Needed unless the API listens on loopback only.
    pub token_sha256: Option<String>,
}

impl Default for ApiConfig {
    fn default() -> Self {
        Self { listen: SocketAddr::from(([127, 0, 0, 1], 8080)), token_sha256: None }
    }
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PolicyConfig {
    pub allow: Vec<String>,
    pub deny: Vec<String>,
    pub deny_ports: Vec<u16>,
    pub only_ports: Vec<u16>,
    pub deny_domains: Vec<String>,
    pub only_domains: Vec<String>,
}

impl Default for PolicyConfig {
    fn default() -> Self {
        let rules = Policy::default();
        Self {
            allow: Vec::new(),
            deny: Vec::new(),
            deny_ports: rules.deny_ports,
            only_ports: Vec::new(),
            deny_domains: Vec::new(),
            only_domains: Vec::new(),
        }
    }
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GeoConfig {
    /// MaxMind DB files; what several know, the last one decides.
    pub databases: Vec<PathBuf>,
    /// Without a database (or where it knows nothing) believe the country that a peer names.
    pub trust_hint: bool,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LedgerConfig {
    /// `postgres://user:password@host/database` instead of the embedded file.
    pub postgres: Option<String>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DirectoryConfig {
    /// `redis://[:password@]host:port`.
    pub redis: String,
    /// Where other hubs reach this one.
    pub relay_listen: SocketAddr,
    /// The address that others are told, if it is another.
    pub relay_advertise: Option<SocketAddr>,
    /// Shared by all hubs: at least 16 characters.
    pub secret: String,
}

/// What is wrong with a configuration.
#[derive(Debug, thiserror::Error)]
#[error("{file}:{line}: {what}")]
pub struct ConfigError {
    pub file: String,
    pub line: usize,
    pub what: String,
}

impl Config {
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let file = path.display().to_string();
        let text = std::fs::read_to_string(path).map_err(|e| ConfigError {
            file: file.clone(),
            line: 0,
            what: format!("cannot be read: {e}; give another with --config"),
        })?;
        Self::parse(&text, &file)
    }

    /// The environment variable that gives the API's token in clear, for platforms that mint one.
    pub const API_TOKEN: &str = "PROXY_HUB_API_TOKEN";

    pub fn parse(text: &str, file: &str) -> Result<Self, ConfigError> {
        let error = |line, what| ConfigError { file: file.to_owned(), line, what };
        let mut config: Config = toml::from_str(text).map_err(|e| {
            let line = e.span().map_or(0, |span| 1 + text[..span.start.min(text.len())].matches('\n').count());
            error(line, e.message().to_owned())
        })?;
        if config.api.token_sha256.is_none()
            && let Ok(token) = std::env::var(Self::API_TOKEN)
            && !token.is_empty()
        {
            config.api.token_sha256 =
                Some(crate::account::hash_key(&token).iter().map(|b| format!("{b:02x}")).collect());
        }
        config.check().map_err(|(section, key, what)| error(line_of(text, section, key), what))?;
        Ok(config)
    }

    /// Checks what the types cannot. The error is the section, the key and the sentence.
    fn check(&self) -> Result<(), (&'static str, String, String)> {
        let fail = |section, key: &str, what: String| Err((section, key.to_owned(), what));
        let net_lists = [
            ("peers", "trusted_proxies", &self.peers.trusted_proxies),
            ("customers", "trusted_proxies", &self.customers.trusted_proxies),
            ("policy", "allow", &self.policy.allow),
            ("policy", "deny", &self.policy.deny),
        ];
        for (section, key, list) in net_lists {
            if let Some(why) = list.iter().find_map(|n| n.parse::<Net>().err()) {
                return fail(section, key, format!("{key}: {why}"));
            }
        }
        let hashes = self.peers.tokens_sha256.iter().map(|h| ("peers", "tokens_sha256", h));
        for (section, key, hash) in hashes.chain(self.api.token_sha256.iter().map(|h| ("api", "token_sha256", h))) {
            if hash.len() != 64 || !hash.bytes().all(|b| b.is_ascii_hexdigit()) {
                return fail(
                    section,
                    key,
                    format!("{key} must be 64 hex digits; make one with `printf %s TOKEN | sha256sum`"),
                );
            }
        }
        if version(&self.peers.min_version).is_none() {
            return fail("peers", "min_version", "min_version must look like 1.0.62".into());
        }
        let ranges = [
            ("peers", "heartbeat_seconds", u64::from(self.peers.heartbeat_seconds), 1, 14),
            ("peers", "max_tunnels", u64::from(self.peers.max_tunnels), 1, 10_000),
            ("peers", "registrations_per_second", u64::from(self.peers.registrations_per_second), 1, 1_000_000),
            ("customers", "idle_seconds", self.customers.idle_seconds, 5, 86_400),
            ("customers", "handshake_seconds", self.customers.handshake_seconds, 1, 300),
            ("customers", "open_seconds", self.customers.open_seconds, 1, 300),
            ("customers", "attempts", u64::from(self.customers.attempts), 1, 10),
        ];
        for (section, key, value, least, most) in ranges {
            if value < least || value > most {
                return fail(section, key, format!("{key} = {value}: must be {least} to {most}"));
            }
        }
        if self.hub.shards > 256 {
            return fail("hub", "shards", "shards: at most 256; 0 takes one a core".into());
        }
        let name_ok = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'_' || b == b'.';
        if self.hub.name.is_empty() || self.hub.name.len() > 64 || !self.hub.name.bytes().all(name_ok) {
            return fail("hub", "name", "name must be 1 to 64 letters, digits, '-', '_' or '.'".into());
        }
        if !self.api.listen.ip().is_loopback() && self.api.token_sha256.is_none() {
            return fail(
                "api",
                "listen",
                "the API would be open to the network: set token_sha256 (or PROXY_HUB_API_TOKEN), or listen on 127.0.0.1".into(),
            );
        }
        for path in &self.geo.databases {
            if !path.is_file() {
                return fail(
                    "geo",
                    "databases",
                    format!("{} does not exist; supply an MMDB file or remove it from databases", path.display()),
                );
            }
        }
        if let Some(directory) = &self.directory {
            if directory.secret.len() < 16 {
                return fail(
                    "directory",
                    "secret",
                    "secret must have at least 16 characters, the same on all hubs".into(),
                );
            }
            if !directory.redis.starts_with("redis://") && !directory.redis.starts_with("unix:") {
                return fail("directory", "redis", "redis must be a URL such as redis://127.0.0.1:6379".into());
            }
        }
        let mut names = std::collections::HashSet::new();
        for customer in &self.customer {
            if let Err(what) = customer.check(false) {
                return fail("customer", &customer.name, what);
            }
            if !names.insert(&customer.name) {
                return fail(
                    "customer",
                    &customer.name,
                    format!("two customers are named '{}'; names must differ", customer.name),
                );
            }
        }
        Ok(())
    }

    pub fn policy(&self) -> Policy {
        let nets = |list: &[String]| list.iter().filter_map(|n| n.parse().ok()).collect();
        let lower = |list: &[String]| list.iter().map(|d| d.to_ascii_lowercase()).collect();
        Policy {
            allow: nets(&self.policy.allow),
            deny: nets(&self.policy.deny),
            deny_ports: self.policy.deny_ports.clone(),
            only_ports: self.policy.only_ports.clone(),
            deny_domains: lower(&self.policy.deny_domains),
            only_domains: lower(&self.policy.only_domains),
        }
    }

    pub fn heartbeat(&self) -> Duration {
        Duration::from_secs(u64::from(self.peers.heartbeat_seconds))
    }
}

/// `1.2.3` in a form that compares. Missing parts are 0; anything behind `-` or `+` is left out.
pub fn version(text: &str) -> Option<[u32; 3]> {
    let core = text.trim().trim_start_matches('v').split(['-', '+']).next()?;
    let mut out = [0; 3];
    let mut parts = core.split('.');
    for (i, part) in parts.by_ref().take(3).enumerate() {
        out[i] = part.parse().ok()?;
    }
    parts.next().is_none().then_some(out)
}

/// The line of a key in a section; for a customer, of its name. The section's own line if the key is not written out.
fn line_of(text: &str, section: &str, key: String) -> usize {
    let mut inside = false;
    let mut header = 0;
    for (number, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.starts_with('[') {
            inside = line.trim_matches(['[', ']']).split('.').next() == Some(section);
            if inside && header == 0 {
                header = number + 1;
            }
        } else if inside {
            let Some((name, value)) = line.split_once('=') else { continue };
            let hit = if section == "customer" {
                name.trim() == "name" && value.trim().trim_matches('"') == key
            } else {
                name.trim() == key
            };
            if hit {
                return number + 1;
            }
        }
    }
    header
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(text: &str) -> String {
        Config::parse(text, "hub.toml").expect_err("refused").to_string()
    }

    #[test]
    fn errors_name_the_line_and_the_remedy() {
        assert!(error("[peers]\nlisten = \"nowhere\"\n").starts_with("hub.toml:2: "));
        assert!(error("\n\n[peers]\nlissten = \"x\"\n").starts_with("hub.toml:4: unknown field `lissten`"));
        let text = "[api]\n# open\nlisten = \"0.0.0.0:8080\"\n";
        assert_eq!(
            error(text),
            "hub.toml:3: the API would be open to the network: set token_sha256 (or PROXY_HUB_API_TOKEN), or listen on 127.0.0.1"
        );
        assert!(
            error("[peers]\nheartbeat_seconds = 60\n")
                .starts_with("hub.toml:2: heartbeat_seconds = 60: must be 1 to 14")
        );
        assert!(
            error("[policy]\nallow = [\"10.0.0.0/40\"]\n")
                .contains("hub.toml:2: allow: '10.0.0.0/40': the prefix length")
        );
        let two = "[[customer]]\nname = \"a\"\nallow_ips = [\"1.2.3.4\"]\n[[customer]]\nname = \"b\"\n";
        assert!(error(two).starts_with("hub.toml:5: customer 'b' has neither key_sha256 nor allow_ips"));
        assert!(error("[geo]\ndatabases = [\"/nonexistent.mmdb\"]\n").contains("supply an MMDB file"));
    }

    #[test]
    fn the_example_is_valid_and_nothing_is_needed() {
        Config::parse("", "empty").expect("defaults work");
        let text = include_str!("../proxy-hub.example.toml");
        let config = Config::parse(text, "proxy-hub.example.toml").expect("valid");
        assert_eq!(config.customer.len(), 2);
        assert_eq!(config.customer[0].users.len(), 1);
    }

    #[test]
    fn versions_compare_by_number() {
        assert!(version("1.0.9") < version("1.0.62"));
        assert_eq!(version("v2.1-beta"), Some([2, 1, 0]));
        assert_eq!((version("1.x"), version("1.2.3.4"), version("")), (None, None, None));
    }
}
