//! The program's settings: defaults, then `clawhq.toml`, then the environment. An unknown key is an error.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clawhq_app::AppConfig;
use clawhq_runtime::config::Secret;
use clawhq_runtime::telemetry::TelemetryConfig;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// Variables with our prefix that are not settings of the file: `CLAWHQ_DATA` and `CLAWHQ_CONFIG` choose it, the others are
/// `dev`'s own.
const NOT_SETTINGS: &[&str] =
    &["DATA", "CONFIG", "SKIP_OPENCLAW", "BIN", "TEST_DOCKER", "TEST_DOCKER_HOST", "TEST_PG", "TEST_KEEP", "TEST_SEED"];

/// Everything that can be configured, a section a role.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// The data directory. Set by `--data` or `CLAWHQ_DATA`.
    #[serde(skip)]
    pub data: PathBuf,
    /// Logging.
    pub telemetry: TelemetryConfig,
    /// PostgreSQL.
    pub database: Database,
    /// Docker.
    pub docker: Docker,
    /// The public API with the console and its documentation, and the node stream.
    pub api: clawhq_backend::Config,
    /// What workloads are reached through.
    pub edge: clawhq_edge::Config,
    /// Jobs.
    pub workers: clawhq_workers::Config,
    /// The loops that keep the pool full.
    pub pool_manager: clawhq_pool_manager::Config,
    /// The host's daemon.
    pub node_agent: clawhq_node_agent::Config,
    /// Policy of the control plane.
    pub app: AppConfig,
}

/// PostgreSQL.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Database {
    /// `postgres://…`; empty: the private server of the data directory. `DATABASE_URL` wins.
    pub url: Secret,
    /// Connections of one process at most; 0: four a processor, eight at least. More only wait for each other.
    pub connections: u32,
}

/// Docker.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Docker {
    /// `unix://…`; empty: `DOCKER_HOST`, else the private daemon of the data directory, else the system's socket.
    pub host: String,
}

impl Settings {
    /// Reads the file (if given, or `<data>/clawhq.toml` when there is one) and the environment, then fills in what follows
    /// from other settings and was not said: addresses from ports, paths from the data directory.
    ///
    /// # Errors
    /// On an unknown key, a wrong type or a missing file, with its name.
    pub fn load(data: &Path, file: Option<&Path>, env: Vec<(String, String)>) -> Result<Self> {
        let beside = data.join("clawhq.toml");
        let file = file.map(Path::to_owned).or_else(|| beside.is_file().then_some(beside));
        let mut settings: Settings =
            clawhq_runtime::config::load(file.as_deref(), "CLAWHQ", env.iter().cloned(), NOT_SETTINGS)?;
        settings.data = std::path::absolute(data).context("the data directory")?;
        let variable =
            |name: &str| env.iter().find(|(key, value)| key == name && !value.is_empty()).map(|(_, v)| v.clone());
        if let Some(url) = variable("DATABASE_URL") {
            settings.database.url = Secret::new(url);
        }
        if settings.docker.host.is_empty() {
            settings.docker.host = variable("DOCKER_HOST").unwrap_or_else(|| settings.default_docker());
        }
        settings.derive();
        Ok(settings)
    }

    fn default_docker(&self) -> String {
        // A data directory that has a daemon of its own keeps its containers there.
        let private = self.data.join("docker/docker.sock");
        if private.exists() {
            format!("unix://{}", private.display())
        } else {
            "unix:///var/run/docker.sock".to_owned()
        }
    }

    /// What was left at its default and follows from something else.
    fn derive(&mut self) {
        let standard = Settings::default();
        let unsaid = |value: &mut String, default: &str, derived: String| {
            if value == default {
                *value = derived;
            }
        };
        unsaid(
            &mut self.api.public_url,
            &standard.api.public_url,
            format!("http://localhost:{}", self.api.listen.port()),
        );
        unsaid(
            &mut self.app.edge_domain,
            &standard.app.edge_domain,
            format!("{}:{}", self.edge.domain, self.edge.listen.port()),
        );
        let ca_file = self.ca_dir().join("ca.pem");
        let agent = &mut self.node_agent;
        unsaid(
            &mut agent.control_plane,
            &standard.node_agent.control_plane,
            format!("https://127.0.0.1:{}", self.api.node_listen.port()),
        );
        unsaid(&mut agent.docker_host, &standard.node_agent.docker_host, self.docker.host.clone());
        // Several data directories may be used on one machine, and their node agents share its kernel.
        unsaid(&mut agent.network.key, "", network_key(&self.data));
        let path = |value: &mut PathBuf, default: &Path, derived: PathBuf| {
            if value == default {
                *value = derived;
            }
        };
        path(&mut agent.data_dir, &standard.node_agent.data_dir, self.data.clone());
        path(&mut agent.ca_file, &standard.node_agent.ca_file, ca_file);
        path(&mut agent.init_binary, &standard.node_agent.init_binary, beside_this_program("clawhq-init"));
    }

    /// Where the certificate authority lives.
    pub fn ca_dir(&self) -> PathBuf {
        self.data.join("ca")
    }

    /// The root keys that seal secrets.
    pub fn key_ring(&self) -> PathBuf {
        self.data.join("keys/ring")
    }

    /// Every listener with its key.
    pub fn listeners(&self) -> [(SocketAddr, &'static str); 3] {
        [(self.api.listen, "api.listen"), (self.edge.listen, "edge.listen"), (self.api.node_listen, "api.node_listen")]
    }
}

/// Four hexadecimal digits of the data directory's path.
fn network_key(data: &Path) -> String {
    use std::os::unix::ffi::OsStrExt;
    let digest = Sha256::digest(data.as_os_str().as_bytes());
    format!("{:02x}{:02x}", digest[0], digest[1])
}

fn beside_this_program(name: &str) -> PathBuf {
    std::env::current_exe().ok().and_then(|exe| Some(exe.parent()?.join(name))).unwrap_or_else(|| PathBuf::from(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn env(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    }

    #[test]
    fn environment_wins_and_other_variables_are_left_alone() {
        let env = env(&[
            ("CLAWHQ_API__LISTEN", "127.0.0.1:5000"),
            ("CLAWHQ_DATA", "/x"),
            ("DATABASE_URL", "postgres://me:hunter2@db/x"),
            ("PATH", "/bin"),
        ]);
        let settings = Settings::load(Path::new("/x"), None, env).unwrap();
        assert_eq!(settings.api.listen.port(), 5000);
        assert_eq!(settings.edge.listen.port(), 4181);
        assert_eq!(settings.database.url.expose(), "postgres://me:hunter2@db/x");
        assert!(!format!("{settings:?}").contains("hunter2"));
        assert!(!toml::to_string(&settings).unwrap().contains("hunter2"));
    }

    #[test]
    fn what_follows_from_other_settings_follows_them() {
        let ports = env(&[
            ("CLAWHQ_API__LISTEN", "127.0.0.1:5000"),
            ("CLAWHQ_API__NODE_LISTEN", "127.0.0.1:5002"),
            ("CLAWHQ_EDGE__LISTEN", "127.0.0.1:5001"),
        ]);
        let settings = Settings::load(Path::new("/x"), None, ports).unwrap();
        assert_eq!(settings.api.public_url, "http://localhost:5000");
        assert_eq!(settings.app.edge_domain, "localhost:5001");
        assert_eq!(settings.node_agent.control_plane, "https://127.0.0.1:5002");
        assert_eq!(settings.node_agent.data_dir, Path::new("/x"));
        assert_ne!(
            settings.node_agent.network.key,
            Settings::load(Path::new("/y"), None, vec![]).unwrap().node_agent.network.key
        );
        let said = env(&[("CLAWHQ_APP__EDGE_DOMAIN", "apps.example.com"), ("CLAWHQ_EDGE__LISTEN", "0.0.0.0:80")]);
        assert_eq!(Settings::load(Path::new("/x"), None, said).unwrap().app.edge_domain, "apps.example.com");
    }

    #[test]
    fn a_misspelt_key_is_refused_by_name() {
        for name in ["CLAWHQ_API__LISTN", "CLAWHQ_APPI__LISTEN", "CLAWHQ_WHATEVER"] {
            let error = Settings::load(Path::new("/x"), None, env(&[(name, "1")])).unwrap_err().to_string();
            assert!(error.contains(name), "{error}");
        }
    }

    /// Every example that ships is read by the code it documents.
    #[test]
    fn checked_in_examples_are_accepted() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let mut read = 0;
        for dir in ["docs", "infra"] {
            let mut pending = vec![root.join(dir)];
            while let Some(dir) = pending.pop() {
                for entry in std::fs::read_dir(&dir).into_iter().flatten().flatten() {
                    let path = entry.path();
                    if path.is_dir() {
                        pending.push(path);
                    } else if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("clawhq"))
                        && path.extension().is_some_and(|extension| extension == "toml")
                    {
                        Settings::load(Path::new("/x"), Some(&path), vec![])
                            .unwrap_or_else(|error| panic!("{}: {error:#}", path.display()));
                        read += 1;
                    }
                }
            }
        }
        assert!(read >= 1, "the example configuration is gone");
    }
}
