//! What the tests drive a node agent with: a real Docker, and a control plane that speaks the real protocol.

#![allow(dead_code)]

pub mod docker;
pub mod plane;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clawhq_domain::ids::{InstanceId, OrgId, SlotId, WorkloadId};
use clawhq_node_agent::{Config, Network};
use clawhq_proto::v1;
use tokio_util::sync::CancellationToken;

pub use docker::Docker;
pub use plane::Plane;

/// Nothing here takes longer on a machine that works.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Asks until it is so.
pub async fn until<T>(what: &str, mut look: impl AsyncFnMut() -> Option<T>) -> T {
    let begin = Instant::now();
    loop {
        if let Some(found) = look().await {
            return found;
        }
        assert!(begin.elapsed() < PATIENCE, "{what} does not happen");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// One test's Docker, control plane and data directory.
pub struct World {
    pub docker: Docker,
    pub plane: Plane,
    pub config: Config,
    /// Removed last.
    pub dir: tempfile::TempDir,
}

/// A node agent in this process.
pub struct Agent {
    stop: CancellationToken,
    task: tokio::task::JoinHandle<anyhow::Result<()>>,
}

impl Agent {
    pub async fn stop(self) {
        self.stop.cancel();
        tokio::time::timeout(PATIENCE, self.task).await.expect("it stops").unwrap().unwrap();
    }
}

impl World {
    pub async fn new() -> Self {
        Self::with(Docker::shared_or_own().await, Duration::from_secs(3600)).await
    }

    pub async fn with(docker: Docker, certificate_life: Duration) -> Self {
        let _ = tracing_subscriber::fmt()
            .with_env_filter(std::env::var("RUST_LOG").unwrap_or_else(|_| "warn".into()))
            .with_test_writer()
            .try_init();
        clawhq_runtime::crypto::install();
        let dir = tempfile::Builder::new().prefix("clawhq-node-").tempdir().unwrap();
        let plane = Plane::start(dir.path(), certificate_life).await;
        let config = Config {
            data_dir: dir.path().join("data"),
            docker_host: docker.host.clone(),
            control_plane: plane.address.clone(),
            ca_file: plane.ca_file.clone(),
            join_token: Some(clawhq_runtime::config::Secret::new("join-once".to_owned())),
            init_binary: docker.init.clone(),
            memory_mib: 4096,
            network: Network { key: hex::encode(rand::random::<[u8; 2]>()), ..Network::default() },
            ..Config::default()
        };
        Self { docker, plane, config, dir }
    }

    /// A node agent that is linked and ready.
    pub async fn agent(&self) -> Agent {
        let before = self.plane.openings().len();
        let stop = CancellationToken::new();
        let task = tokio::spawn(clawhq_node_agent::run(self.config.clone(), stop.clone()));
        let agent = Agent { stop, task };
        self.plane.linked(before).await;
        agent
    }

    /// Everything this node has leaves, and nothing may be left of it.
    pub async fn clean_up(self, agent: Agent) {
        for slot in self.plane.slots() {
            self.plane.desire(v1::SlotDesired { present: false, claim: None, ..slot });
        }
        until("the slots leave", async || self.plane.slots().is_empty().then_some(())).await;
        self.assert_nothing_left().await;
        agent.stop().await;
        let tables = run("nft", &["delete", "table", "inet", &format!("clawhq_{}", self.config.network.key)]);
        assert!(tables.is_ok(), "{tables:?}");
    }

    pub async fn assert_nothing_left(&self) {
        let containers = self.docker.ours(&self.data_label()).await;
        assert!(containers.is_empty(), "containers are left: {containers:?}");
        assert_eq!(self.interfaces(), Vec::<String>::new(), "interfaces are left");
        let ledger = self.config.data_dir.join("node/ledger/slots");
        assert_eq!(std::fs::read_dir(ledger).unwrap().count(), 0, "ledger entries are left");
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
        let volumes = self.config.data_dir.join("volumes");
        assert!(!mounts.contains(volumes.to_str().unwrap()), "mounts are left");
    }

    pub fn interfaces(&self) -> Vec<String> {
        let prefix = format!("cq{}", self.config.network.key);
        std::fs::read_dir("/sys/class/net")
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| name.starts_with(&prefix))
            .collect()
    }

    pub fn data_label(&self) -> String {
        std::fs::read_to_string(self.config.data_dir.join("node/ledger/installation")).unwrap()
    }

    pub fn ingress(&self) -> PathBuf {
        self.config.data_dir.join("node/ingress.sock")
    }
}

impl Drop for World {
    fn drop(&mut self) {
        // After a failed test: what it made must not disturb the next run.
        if std::thread::panicking() {
            if let Ok(label) = std::fs::read_to_string(self.config.data_dir.join("node/ledger/installation")) {
                self.docker.remove_all(&label);
            }
            for interface in self.interfaces() {
                let _ = run("ip", &["link", "delete", &interface]);
            }
            let _ = run("nft", &["delete", "table", "inet", &format!("clawhq_{}", self.config.network.key)]);
            let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
            let volumes = self.config.data_dir.join("volumes");
            for path in mounts.lines().filter_map(|line| line.split(' ').nth(1)) {
                if Path::new(path).starts_with(&volumes) {
                    let _ = run("umount", &["-l", path]);
                }
            }
        }
    }
}

pub fn run(program: &str, arguments: &[&str]) -> Result<String, String> {
    let output = std::process::Command::new(program).args(arguments).output().map_err(|error| error.to_string())?;
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    } else {
        Err(format!("{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr)))
    }
}

pub fn id<T: From<u128>>() -> T {
    T::from(rand::random::<u128>())
}

/// An unclaimed slot of the hello image.
pub fn slot() -> v1::SlotDesired {
    v1::SlotDesired {
        slot_id: id::<SlotId>().to_string(),
        generation: 1,
        present: true,
        spec: Some(v1::SlotSpec {
            image: "clawhq/hello:dev".into(),
            memory_mib: 32,
            memory_burst_mib: 48,
            cpu_shares: 256,
            pids: 64,
            uid: 10_001,
            gid: 10_001,
            hostname: "test".into(),
            warm_mode: "exec".into(),
            tier: "free".into(),
            ..v1::SlotSpec::default()
        }),
        claim: None,
    }
}

pub fn http_probe() -> v1::Probe {
    let http = v1::probe::HttpProbe { port: 8080, path: "/healthz".into(), expect: "\"ok\":true".into() };
    v1::Probe { kind: Some(v1::probe::Kind::Http(http)) }
}

pub fn process(argv: &[&str]) -> v1::Process {
    v1::Process {
        argv: argv.iter().map(|arg| (*arg).to_owned()).collect(),
        probe: Some(http_probe()),
        start_deadline_ms: 5_000,
        stop_deadline_ms: 3_000,
        ..v1::Process::default()
    }
}

pub fn claim(process: Option<v1::Process>) -> v1::Claim {
    v1::Claim {
        instance_id: id::<InstanceId>().to_string(),
        org_id: id::<OrgId>().to_string(),
        workload_id: id::<WorkloadId>().to_string(),
        workload_name: "test".into(),
        process,
        ports: vec![8080],
        ..v1::Claim::default()
    }
}

/// The slot, with its next generation, claimed.
pub fn claimed(slot: &v1::SlotDesired, process: Option<v1::Process>) -> v1::SlotDesired {
    v1::SlotDesired { generation: slot.generation + 1, claim: Some(claim(process)), ..slot.clone() }
}
