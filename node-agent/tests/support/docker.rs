//! A Docker daemon: the one the environment gives, or one of the test's own.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use super::{run, until};

pub struct Docker {
    pub host: String,
    /// The static `init`, built once a run.
    pub init: PathBuf,
    own: Option<Own>,
}

struct Own {
    daemon: Child,
    dir: tempfile::TempDir,
}

impl Docker {
    /// `CLAWHQ_TEST_DOCKER` names a daemon that many tests may use at once.
    pub async fn shared_or_own() -> Self {
        match std::env::var("CLAWHQ_TEST_DOCKER") {
            Ok(host) if !host.is_empty() => {
                let init = images(&host).await;
                Self { host, init, own: None }
            }
            _ => Self::own().await,
        }
    }

    /// A daemon that may be killed.
    pub async fn own() -> Self {
        let dir = tempfile::Builder::new().prefix("clawhq-dockerd-").tempdir().unwrap();
        let path = |name: &str| dir.path().join(name).display().to_string();
        let config = serde_json::json!({
            "data-root": path("data"), "exec-root": path("exec"), "pidfile": path("pid"),
            "hosts": [format!("unix://{}", path("docker.sock"))],
            "iptables": false, "ip-masq": false, "bridge": "none", "userland-proxy": false, "live-restore": true,
        });
        std::fs::write(dir.path().join("daemon.json"), config.to_string()).unwrap();
        let host = format!("unix://{}", path("docker.sock"));
        let daemon = start(dir.path());
        let mut docker = Self { host, init: PathBuf::new(), own: Some(Own { daemon, dir }) };
        docker.answers().await;
        docker.init = images(&docker.host).await;
        docker
    }

    async fn answers(&self) {
        until("dockerd answers", async || self.cli(&["version"]).ok()).await;
    }

    pub fn cli(&self, arguments: &[&str]) -> Result<String, String> {
        run("docker", &[&["-H", &self.host], arguments].concat())
    }

    /// Ids of containers with our label.
    pub async fn ours(&self, data: &str) -> Vec<String> {
        let filter = format!("label=clawhq.data={data}");
        let ids = self.cli(&["ps", "-aq", "--no-trunc", "--filter", &filter]).unwrap();
        ids.lines().map(str::to_owned).collect()
    }

    pub fn inspect(&self, container: &str) -> serde_json::Value {
        let text = self.cli(&["inspect", container]).unwrap();
        serde_json::from_str::<serde_json::Value>(&text).unwrap()[0].take()
    }

    pub fn pid(&self, container: &str) -> i64 {
        self.inspect(container)["State"]["Pid"].as_i64().unwrap()
    }

    pub fn remove_all(&self, data: &str) {
        let filter = format!("label=clawhq.data={data}");
        for id in self.cli(&["ps", "-aq", "--filter", &filter]).unwrap_or_default().lines() {
            let _ = self.cli(&["rm", "-f", id]);
        }
    }

    pub fn kill(&mut self) {
        let own = self.own.as_mut().expect("a daemon of our own");
        own.daemon.kill().unwrap();
        own.daemon.wait().unwrap();
    }

    /// The first start after a kill may fail while the old containerd is in the way: tried until it stands.
    pub async fn start_again(&mut self) {
        let host = self.host.clone();
        let own = self.own.as_mut().expect("a daemon of our own");
        let mut last = std::time::Instant::now();
        own.daemon = start(own.dir.path());
        let begin = last;
        while run("docker", &["-H", &host, "version"]).is_err() {
            assert!(begin.elapsed() < Duration::from_secs(60), "dockerd does not come back");
            if last.elapsed() > Duration::from_secs(2) && own.daemon.try_wait().unwrap().is_some() {
                last = std::time::Instant::now();
                own.daemon = start(own.dir.path());
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}

fn start(dir: &Path) -> Child {
    let log = std::fs::File::options().create(true).append(true).open(dir.join("log")).unwrap();
    Command::new("dockerd")
        .arg("--config-file")
        .arg(dir.join("daemon.json"))
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .spawn()
        .expect("dockerd (package docker.io) is installed")
}

impl Drop for Docker {
    fn drop(&mut self) {
        let Some(mut own) = self.own.take() else { return };
        for id in self.cli(&["ps", "-aq"]).unwrap_or_default().lines() {
            let _ = self.cli(&["rm", "-f", id]);
        }
        let _ = run("kill", &[&own.daemon.id().to_string()]);
        let _ = own.daemon.wait();
    }
}

/// Builds the init and the hello image into the daemon, once for all tests of a run.
async fn images(host: &str) -> PathBuf {
    let run_id = std::env::var("NEXTEST_RUN_ID").unwrap_or_else(|_| std::process::id().to_string());
    let dir = std::env::temp_dir().join(format!("clawhq-test-{run_id}"));
    std::fs::create_dir_all(&dir).unwrap();
    let (init, host) = (dir.join("init"), host.to_owned());
    let built = init.clone();
    tokio::task::spawn_blocking(move || {
        let lock = std::fs::File::options().create(true).append(true).open(dir.join("lock")).unwrap();
        let _lock = nix::fcntl::Flock::lock(lock, nix::fcntl::FlockArg::LockExclusive).unwrap();
        let marker = dir.join(host.replace('/', "_"));
        if marker.exists() && built.exists() {
            return;
        }
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../images/build");
        let output = Command::new(script)
            .args(["--init", built.to_str().unwrap(), "hello"])
            .env("DOCKER_HOST", &host)
            .stdin(Stdio::null())
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        std::fs::write(marker, "").unwrap();
    })
    .await
    .unwrap();
    init
}
