//! A workload's config: what a tenant asks for, the immutable release made of it, and the difference of two.

use std::collections::{BTreeMap, BTreeSet};

use crate::names::{EnvName, ImageRef, SecretName, TemplateName};
use crate::template::{Port, Probe, StateVolume, Template, Tmpfs, WarmMode};
use crate::{Flaw, Reason};

/// Bounds on what a tenant may configure, each with its reason.
pub mod limits {
    /// `execve` allows 2 MiB for arguments and environment together; this leaves room for secrets.
    pub const ENV_BYTES: usize = 128 * 1024;
    pub const ENV_ENTRIES: usize = 200;
    pub const SECRETS: usize = 100;
    /// As they are delivered, sealed: with the environment and the arguments below `execve`'s 2 MiB, and with the files
    /// below the claim's frame of 4 MiB.
    pub const SECRETS_BYTES: usize = 1536 * 1024;
    pub const FILES: usize = 50;
    pub const FILE_BYTES: usize = 256 * 1024;
    pub const FILES_BYTES: usize = 1024 * 1024;
    pub const ARGV: usize = 100;
    pub const ARGV_BYTES: usize = 32 * 1024;
    /// A secret's value: what fits an environment variable comfortably (the kernel's limit is 128 KiB).
    pub const SECRET_BYTES: usize = 64 * 1024;
    pub const PORTS: usize = 16;
}

/// Where a secret's value appears in the container.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum SecretTarget {
    Env(EnvName),
    /// An absolute path; the file is 0400, owned by the workload's uid, on tmpfs.
    File(String),
}

/// A reference by name; the version is fixed when the release is made.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct SecretRef {
    pub secret: SecretName,
    pub version: u32,
    pub target: SecretTarget,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileSpec {
    pub path: String,
    pub mode: u32,
    pub content: String,
}

/// What a tenant may say about a workload; everything else comes from the template.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Config {
    pub env: BTreeMap<EnvName, String>,
    pub secrets: Vec<SecretRef>,
    pub files: Vec<FileSpec>,
    /// `None`: the template's, or the image's own.
    pub argv: Option<Vec<String>>,
    /// `None`: the template's. Required to reach an image that has no template.
    pub ports: Option<Vec<Port>>,
    /// `None`: the template's.
    pub volume: Option<StateVolume>,
    /// Image workloads only: the user the image expects; default 10001.
    pub uid: Option<u32>,
}

impl Config {
    /// Nothing personal in it: a slot that runs already can serve it unchanged.
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// One immutable version: all that is needed to make an instance, with secrets as names and versions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Release {
    pub template: Option<TemplateName>,
    pub image: ImageRef,
    /// `sha256:…`; `None` until a node has resolved the reference, and from then on fixed.
    pub image_digest: Option<String>,
    pub config: Config,
    pub argv: Vec<String>,
    pub env: BTreeMap<EnvName, String>,
    pub working_dir: Option<String>,
    pub uid: u32,
    pub gid: u32,
    pub ports: Vec<Port>,
    pub probe: Probe,
    pub start_deadline_ms: u32,
    pub stop_deadline_ms: u32,
    pub state: Option<StateVolume>,
    pub tmpfs: Vec<Tmpfs>,
    pub least_memory_mib: u32,
    pub least_pids: u32,
    pub warm_mode: WarmMode,
}

/// The user image workloads run as unless they say otherwise: not root, not a common host user.
pub const DEFAULT_UID: u32 = 10001;
/// What Docker takes.
pub const UID_MAX: u32 = i32::MAX as u32;
/// What a node takes for the place of a mount.
const VOLUME_PATH_BYTES: usize = 255;

/// Makes the release of a template with a tenant's config over it.
pub fn from_template(template: &Template, config: Config) -> Result<Release, Flaw> {
    check(&config)?;
    if config.uid.is_some() {
        return Err(invalid("/uid", "A template fixes its own user; uid is for images.", "Leave out uid."));
    }
    let mut env = template.env.clone();
    env.extend(config.env.clone());
    Ok(Release {
        template: Some(template.name.clone()),
        image: template.image.clone(),
        image_digest: template.image_digest.clone(),
        argv: config.argv.clone().unwrap_or_else(|| template.argv.clone()),
        env,
        working_dir: template.working_dir.clone(),
        uid: template.uid,
        gid: template.gid,
        ports: config.ports.clone().unwrap_or_else(|| template.ports.clone()),
        probe: template.probe.clone(),
        start_deadline_ms: template.start_deadline_ms,
        stop_deadline_ms: template.stop_deadline_ms,
        state: config.volume.clone().or_else(|| template.state.clone()),
        tmpfs: template.tmpfs.clone(),
        least_memory_mib: template.least_memory_mib,
        least_pids: template.least_pids,
        warm_mode: template.warm_mode,
        config,
    })
}

/// Makes the release of a bare image. It is probed on its first port, or counts as ready once started.
pub fn from_image(image: ImageRef, config: Config) -> Result<Release, Flaw> {
    check(&config)?;
    let ports = config.ports.clone().unwrap_or_default();
    let probe = match ports.iter().find(|port| port.protocol != crate::template::Protocol::Udp) {
        Some(port) => Probe::Tcp { port: port.port },
        None => Probe::Started,
    };
    let uid = config.uid.unwrap_or(DEFAULT_UID);
    Ok(Release {
        template: None,
        image_digest: None,
        argv: config.argv.clone().unwrap_or_default(),
        env: config.env.clone(),
        working_dir: None,
        uid,
        gid: uid,
        ports,
        probe,
        start_deadline_ms: 60_000,
        stop_deadline_ms: 10_000,
        state: config.volume.clone(),
        tmpfs: vec![Tmpfs { path: "/tmp".to_owned(), size_mib: 64, exec: false }],
        least_memory_mib: 16,
        least_pids: 16,
        warm_mode: WarmMode::None,
        image,
        config,
    })
}

impl Release {
    /// Whether a started, frozen slot can serve this release as it is.
    pub fn fits_running_slot(&self) -> bool {
        self.config.is_default()
    }

    /// Whether any slot of the template can serve it: what is fixed when a container is created must be the template's.
    pub fn fits_template_slot(&self) -> bool {
        match self.warm_mode {
            WarmMode::None => false,
            WarmMode::Frozen => self.fits_running_slot(),
            WarmMode::Exec | WarmMode::App => self.config.volume.is_none(),
        }
    }
}

fn invalid(at: impl Into<String>, what: impl Into<String>, hint: impl Into<String>) -> Flaw {
    Flaw { at: at.into(), reason: Reason::new("config_invalid", what).with_hint(hint) }
}

/// Paths the platform owns inside a container.
const RESERVED_PATHS: [&str; 4] = ["/proc", "/sys", "/dev", "/.clawhq"];

fn check_path(at: impl Into<String>, path: &str) -> Result<(), Flaw> {
    let plain = path.starts_with('/')
        && path.len() > 1
        && path.len() <= 512
        && !path.ends_with('/')
        && !path.contains('\0')
        && path.split('/').skip(1).all(|part| !part.is_empty() && part != "." && part != "..");
    let reserved = RESERVED_PATHS.iter().any(|root| path == *root || path.starts_with(&format!("{root}/")));
    if plain && !reserved {
        Ok(())
    } else {
        Err(invalid(
            at,
            format!("{path:?} is not a usable path."),
            "Use an absolute path without . or .. that is not under /proc, /sys, /dev or /.clawhq.",
        ))
    }
}

/// Checks every bound on a tenant's config.
pub fn check(config: &Config) -> Result<(), Flaw> {
    let env_bytes: usize = config.env.iter().map(|(name, value)| name.as_str().len() + value.len() + 2).sum();
    if config.env.len() > limits::ENV_ENTRIES || env_bytes > limits::ENV_BYTES {
        return Err(invalid(
            "/env",
            format!("{} environment variables of {env_bytes} bytes are too many.", config.env.len()),
            format!("At most {} variables and {} bytes.", limits::ENV_ENTRIES, limits::ENV_BYTES),
        ));
    }
    if let Some((name, _)) = config.env.iter().find(|(_, value)| value.contains('\0')) {
        return Err(invalid(
            format!("/env/{name}"),
            format!("The value of {name} contains a zero byte."),
            "Remove it.",
        ));
    }
    if config.secrets.len() > limits::SECRETS {
        return Err(invalid("/secrets", "Too many secrets.", format!("At most {}.", limits::SECRETS)));
    }
    let mut targets = BTreeSet::new();
    for (index, secret) in config.secrets.iter().enumerate() {
        let clash = match &secret.target {
            SecretTarget::Env(name) => config.env.contains_key(name),
            SecretTarget::File(path) => {
                check_path(format!("/secrets/{index}/file"), path)?;
                config.files.iter().any(|file| file.path == *path)
            }
        };
        if clash || !targets.insert(&secret.target) {
            return Err(invalid(
                format!("/secrets/{index}"),
                format!("{} is given twice.", secret.secret),
                "Give each variable and file one source.",
            ));
        }
    }
    let file_bytes: usize = config.files.iter().map(|file| file.content.len()).sum();
    let largest = config.files.iter().map(|file| file.content.len()).max().unwrap_or(0);
    if config.files.len() > limits::FILES || largest > limits::FILE_BYTES || file_bytes > limits::FILES_BYTES {
        return Err(invalid(
            "/files",
            "The files are too many or too large.",
            format!("At most {} files of {} bytes, {} in all.", limits::FILES, limits::FILE_BYTES, limits::FILES_BYTES),
        ));
    }
    let mut paths = BTreeSet::new();
    for (index, file) in config.files.iter().enumerate() {
        check_path(format!("/files/{index}/path"), &file.path)?;
        if !paths.insert(&file.path) || file.mode > 0o777 {
            return Err(invalid(
                format!("/files/{index}"),
                format!("{:?} is given twice or has a mode above 777.", file.path),
                "Give each file once.",
            ));
        }
    }
    if let Some(argv) = &config.argv {
        let bytes: usize = argv.iter().map(|word| word.len() + 1).sum();
        let zero = argv.iter().any(|word| word.contains('\0'));
        if argv.is_empty() || argv.len() > limits::ARGV || bytes > limits::ARGV_BYTES || zero || argv[0].is_empty() {
            return Err(invalid(
                "/argv",
                "argv is not usable.",
                format!("Give 1 to {} words, {} bytes in all, without zero bytes.", limits::ARGV, limits::ARGV_BYTES),
            ));
        }
    }
    if let Some(ports) = &config.ports {
        let mut seen = BTreeSet::new();
        let fine = ports.len() <= limits::PORTS
            && ports.iter().all(|port| {
                port.port != 0 && seen.insert((port.port, port.protocol == crate::template::Protocol::Udp))
            });
        if !fine {
            return Err(invalid(
                "/ports",
                "ports are not usable.",
                format!("At most {} different ports from 1 to 65535.", limits::PORTS),
            ));
        }
    }
    if let Some(volume) = &config.volume {
        check_path("/volume/path", &volume.path)?;
        // A mount's description ends at these, and what a node mounts itself is in nobody's volume.
        let taken = ["/tmp", "/run", "/etc/hosts", "/etc/hostname", "/etc/resolv.conf"];
        if volume.path.len() > VOLUME_PATH_BYTES || volume.path.contains([',', ':']) || taken.contains(&&*volume.path) {
            return Err(invalid(
                "/volume/path",
                format!("A volume cannot be at {:?}.", volume.path),
                format!(
                    "Use a path of at most {VOLUME_PATH_BYTES} bytes without comma and colon, other than {}.",
                    taken.join(", ")
                ),
            ));
        }
        if volume.size_mib == 0 {
            return Err(invalid("/volume/size_mib", "The volume has no size.", "Give at least 1 MiB."));
        }
    }
    if config.uid == Some(0) {
        return Err(invalid(
            "/uid",
            "A workload does not run as root.",
            "Choose a uid from 1 up; 10001 is the default.",
        ));
    }
    if config.uid.is_some_and(|uid| uid > UID_MAX) {
        return Err(invalid(
            "/uid",
            "The uid is too large.",
            format!("Choose one from 1 to {UID_MAX}; 10001 is the default."),
        ));
    }
    Ok(())
}

/// One line of a difference. Values of secrets never appear: a secret is its name and version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// Such as `env.LOG_LEVEL`, `secrets.OPENAI_API_KEY`, `image`, `argv`.
    pub field: String,
    pub before: Option<String>,
    pub after: Option<String>,
}

/// What differs between two releases, sorted by field.
pub fn diff(before: &Release, after: &Release) -> Vec<Change> {
    let old = flatten(before);
    let new = flatten(after);
    let fields: BTreeSet<&String> = old.keys().chain(new.keys()).collect();
    fields
        .into_iter()
        .filter(|field| old.get(*field) != new.get(*field))
        .map(|field| Change { field: field.clone(), before: old.get(field).cloned(), after: new.get(field).cloned() })
        .collect()
}

fn flatten(release: &Release) -> BTreeMap<String, String> {
    let mut flat = BTreeMap::new();
    flat.insert("image".to_owned(), release.image.to_string());
    if let Some(digest) = &release.image_digest {
        flat.insert("image_digest".to_owned(), digest.clone());
    }
    if !release.argv.is_empty() {
        flat.insert("argv".to_owned(), release.argv.join(" "));
    }
    for (name, value) in &release.env {
        flat.insert(format!("env.{name}"), value.clone());
    }
    for secret in &release.config.secrets {
        let target = match &secret.target {
            SecretTarget::Env(name) => format!("env {name}"),
            SecretTarget::File(path) => format!("file {path}"),
        };
        flat.insert(format!("secrets.{}.{target}", secret.secret), format!("version {}", secret.version));
    }
    for file in &release.config.files {
        flat.insert(
            format!("files.{}", file.path),
            format!("{} bytes, mode {:o}\n{}", file.content.len(), file.mode, file.content),
        );
    }
    for port in &release.ports {
        flat.insert(format!("ports.{}", port.name), format!("{} {:?}", port.port, port.protocol).to_lowercase());
    }
    if let Some(state) = &release.state {
        flat.insert("volume".to_owned(), format!("{} MiB at {}", state.size_mib, state.path));
    }
    flat.insert("uid".to_owned(), release.uid.to_string());
    flat
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(path: &str) -> Config {
        Config { volume: Some(StateVolume { path: path.to_owned(), size_mib: 1 }), ..Config::default() }
    }

    #[test]
    fn a_volume_is_where_a_node_can_mount_it() {
        for path in ["/data", "/home/agent/.state", "/tmp/state", "/var/lib/a-b_c.d"] {
            assert!(check(&at(path)).is_ok(), "{path}");
        }
        let long = format!("/{}", "x".repeat(255));
        for path in ["/a,b", "/a:ro", "/tmp", "/run", "/etc/resolv.conf", "/proc/x", "/", "data", "/a/../b", &long] {
            let refused = check(&at(path)).expect_err(path);
            assert_eq!((refused.at.as_str(), refused.reason.code), ("/volume/path", "config_invalid"));
            assert!(refused.reason.hint.is_some(), "{path}");
        }
    }

    #[test]
    fn a_uid_is_one_that_docker_takes() {
        let uid = |uid| check(&Config { uid: Some(uid), ..Config::default() });
        assert!(uid(1).is_ok() && uid(UID_MAX).is_ok());
        assert!(uid(0).is_err() && uid(UID_MAX + 1).is_err() && uid(u32::MAX).is_err());
    }
}
