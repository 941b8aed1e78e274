//! The program's settings: defaults, then `clawhq.toml`, then the environment. An unknown key is an error.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clawhq_runtime::config::Secret;
use clawhq_runtime::telemetry::TelemetryConfig;
use serde::{Deserialize, Serialize};

/// Variables with our prefix that are not settings of the file: `CLAWHQ_DATA` and `CLAWHQ_CONFIG` choose it, the others are
/// `dev`'s own.
const NOT_SETTINGS: &[&str] = &["DATA", "CONFIG", "SKIP_OPENCLAW"];

/// Everything that can be configured, a section a role.
#[derive(Debug, Clone, Serialize, Deserialize)]
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
    /// The public API, the console and the docs.
    pub api: Listener,
    /// What workloads are reached through.
    pub edge: Listener,
    /// Where node agents dial in, by mutual TLS.
    pub node_stream: Listener,
}

/// PostgreSQL.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Database {
    /// `postgres://…`; empty: the private server of the data directory. `DATABASE_URL` wins.
    pub url: Secret,
}

/// Docker.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Docker {
    /// `unix://…`; empty: `DOCKER_HOST`, else the system's socket, else the private daemon of the data directory.
    pub host: String,
}

/// A listening role.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Listener {
    /// Address and port.
    pub listen: SocketAddr,
}

impl Default for Settings {
    fn default() -> Self {
        let local = |port| Listener { listen: SocketAddr::from(([127, 0, 0, 1], port)) };
        Settings {
            data: PathBuf::from("data"),
            telemetry: TelemetryConfig::default(),
            database: Database::default(),
            docker: Docker::default(),
            api: local(4180),
            edge: local(4181),
            node_stream: local(4182),
        }
    }
}

impl Settings {
    /// Reads the file (if given, or `<data>/clawhq.toml` when there is one) and the environment.
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

    /// Every listener with its key.
    pub fn listeners(&self) -> [(SocketAddr, &'static str); 3] {
        [
            (self.api.listen, "api.listen"),
            (self.edge.listen, "edge.listen"),
            (self.node_stream.listen, "node_stream.listen"),
        ]
    }
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
