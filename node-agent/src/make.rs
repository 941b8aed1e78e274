//! Making and unmaking a container with all that belongs to it. Every part is idempotent: a second try goes on where the
//! first one stopped, whichever process made it.

use std::time::{Duration, Instant};

use clawhq_domain::host::Container;
use clawhq_domain::ids::{NodeId, SlotId, VolumeId};
use clawhq_domain::slot::{FailureKind, Step};
use clawhq_proto::v1;
use tokio_util::sync::CancellationToken;

use crate::agent::{Event, Tools};
use crate::cgroup::Cgroup;
use crate::netns::Netns;
use crate::network::Piece;
use crate::runtime::{ContainerSpec, Image, Phase, RuntimeError};
use crate::volumes::VolumeError;

const AWAY_WAIT: Duration = Duration::from_millis(250);
/// It is loaded before all else; then it is only ever away for as long as a reload takes.
const FIREWALL_PATIENCE: Duration = Duration::from_secs(20);
const AWAY_WAIT_MAX: Duration = Duration::from_secs(5);
/// Of one removal, before it is let be and the next one has its turn.
const REFUSALS_MOST: u32 = 5;

pub struct MakeJob {
    pub slot: SlotId,
    pub op: u64,
    pub node: Option<NodeId>,
    pub spec: v1::SlotSpec,
    pub volume: Option<VolumeId>,
    pub container: Option<String>,
    pub phase: Container,
    pub piece: Option<Piece>,
    pub knows_image: bool,
}

pub struct Made {
    pub pid: u32,
    pub netns: Netns,
    pub cgroup: Cgroup,
    pub piece: Piece,
    pub image: Option<Image>,
    pub frozen: bool,
    /// It was not just found again.
    pub created: bool,
    pub steps: Vec<Step>,
    pub took: Duration,
}

pub enum MakeError {
    /// Nobody wants it any more.
    Cancelled,
    Failed {
        kind: FailureKind,
        message: String,
        /// What is known of the container now, if anything.
        container: Option<Container>,
    },
}

struct Making<'a> {
    tools: &'a Tools,
    job: MakeJob,
    image: Option<Image>,
    /// The volume that it has mounted, or tried to.
    mounted: Option<VolumeId>,
    steps: Vec<Step>,
    lap: Instant,
}

/// While Docker is away it waits, for minutes if need be: that is no fault of the container's.
pub async fn make(tools: &Tools, job: MakeJob, cancel: CancellationToken) -> Result<Made, MakeError> {
    let began = Instant::now();
    let mut making = Making { tools, job, image: None, mounted: None, steps: Vec::new(), lap: began };
    let created = making.job.phase == Container::Absent;
    let mut wait = AWAY_WAIT;
    let error = loop {
        match making.attempt(&cancel).await {
            Ok(mut made) => {
                made.created = created;
                made.took = began.elapsed();
                return Ok(made);
            }
            Err(Trouble::Runtime(RuntimeError::Away(why))) => {
                tracing::debug!(slot = %making.job.slot, why, "waiting for Docker");
                tokio::select! {
                    () = tokio::time::sleep(wait) => {}
                    () = cancel.cancelled() => break MakeError::Cancelled,
                }
                wait = (wait * 2).min(AWAY_WAIT_MAX);
            }
            Err(Trouble::NoFirewall) if began.elapsed() < FIREWALL_PATIENCE => {
                tokio::select! {
                    () = tokio::time::sleep(AWAY_WAIT) => {}
                    () = cancel.cancelled() => break MakeError::Cancelled,
                }
            }
            Err(trouble) => break trouble.into_error(&making.job),
        }
    };
    // A mount without a container is nobody's to take away later.
    let gone = matches!(error, MakeError::Failed { container: Some(Container::Absent), .. });
    if (gone || making.job.container.is_none())
        && let Some(volume) = making.mounted
        && let Err(error) = tools.volumes.release(volume).await
    {
        tracing::warn!(%volume, %error, "a volume stays mounted until the next sweep");
    }
    Err(error)
}

enum Trouble {
    Runtime(RuntimeError),
    Volume(VolumeError),
    Network(anyhow::Error),
    NoFirewall,
    /// Nobody wants it any more, and nothing was asked of Docker yet.
    Cancelled,
    /// It ended as soon as it was started.
    Ended {
        out_of_memory: bool,
    },
}

impl From<RuntimeError> for Trouble {
    fn from(error: RuntimeError) -> Self {
        Self::Runtime(error)
    }
}

impl Trouble {
    fn into_error(self, job: &MakeJob) -> MakeError {
        let known = job.container.as_ref().map(|_| match job.phase {
            Container::Absent => Container::Made,
            phase => phase,
        });
        let (kind, message, container) = match self {
            Self::Cancelled => return MakeError::Cancelled,
            // Removed behind our back: the next try makes a new one.
            Self::Runtime(RuntimeError::Gone) => {
                (FailureKind::Runtime, "Its container vanished.".to_owned(), Some(Container::Absent))
            }
            Self::Runtime(error) => (error.kind(), error.to_string(), known),
            Self::Volume(VolumeError::DiskFull(left)) => {
                (FailureKind::DiskFull, VolumeError::DiskFull(left).to_string(), known)
            }
            Self::Volume(error) => (FailureKind::Volume, error.to_string(), known),
            Self::NoFirewall => (FailureKind::Network, "The node's firewall is not loaded.".to_owned(), known),
            Self::Network(error) => (FailureKind::Network, format!("{error:#}"), known),
            Self::Ended { out_of_memory: true } => {
                (FailureKind::OutOfMemory, "It ran out of memory before it started.".to_owned(), Some(Container::Ended))
            }
            Self::Ended { out_of_memory: false } => {
                (FailureKind::Runtime, "Its container ended at once.".to_owned(), Some(Container::Ended))
            }
        };
        MakeError::Failed { kind, message, container }
    }
}

impl Making<'_> {
    fn step(&mut self, name: &str) {
        let micros = u64::try_from(self.lap.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.steps.push(Step { name: name.to_owned(), micros });
        self.lap = Instant::now();
    }

    /// Ends for `cancel` while it waits for an image, and before it asks Docker for a container. From then on it goes
    /// through: what Docker was asked for comes, whoever has stopped listening.
    async fn attempt(&mut self, cancel: &CancellationToken) -> Result<Made, Trouble> {
        let tools = self.tools;
        if !tools.network.is_ready() {
            return Err(Trouble::NoFirewall);
        }
        if self.image.is_none() && (self.job.container.is_none() || !self.job.knows_image) {
            let deadline = Duration::from_secs(tools.config.limits.pull_deadline_s);
            let image = tokio::select! {
                image = tools.runtime.image(&self.job.spec.image, &self.job.spec.image_digest, deadline) => image?,
                () = cancel.cancelled() => return Err(Trouble::Cancelled),
            };
            self.image = Some(image);
            self.step("image");
        }
        let volume = match (&self.job.spec.volume, self.job.volume) {
            (Some(spec), Some(volume)) if self.job.phase != Container::Up => {
                let (uid, gid) = (self.job.spec.uid, self.job.spec.gid);
                self.mounted = Some(volume);
                let mount = tools.volumes.ensure(volume, spec.size_mib, uid, gid).await.map_err(Trouble::Volume)?;
                let path = spec.path.clone();
                self.step("volume");
                Some((volume, mount, path))
            }
            _ => None,
        };
        let id = match self.job.container.clone() {
            Some(id) => id,
            None if cancel.is_cancelled() => return Err(Trouble::Cancelled),
            None => {
                let spec = self.container_spec(volume);
                let id = tools.runtime.create(&spec).await?;
                let event = Event::Created { slot: self.job.slot, op: self.job.op, container: id.clone() };
                let _ = tools.events.send(event).await;
                self.job.container = Some(id.clone());
                self.step("created");
                id
            }
        };
        if self.job.phase != Container::Up {
            tools.runtime.start(&id).await?;
        }
        let found = tools.runtime.inspect(&id).await?;
        let (Phase::Up, Some(pid)) = (found.phase, found.pid) else {
            return Err(Trouble::Ended { out_of_memory: found.out_of_memory });
        };
        self.job.phase = Container::Up;
        let network = |error: std::io::Error| Trouble::Network(error.into());
        let netns = Netns::of_pid(pid).map_err(network)?;
        let cgroup = tools.hierarchies.of_pid(pid).map_err(network)?;
        let frozen = cgroup.is_frozen().unwrap_or(false);
        self.step("booted");
        let piece = match self.job.piece {
            Some(piece) => piece,
            None => tools.network.reserve(self.job.slot).await.map_err(Trouble::Network)?,
        };
        if let Err(error) = tools.network.attach(piece, &netns).await {
            // One that the slot had before stays its own.
            if self.job.piece.is_none() {
                tools.network.release(piece);
            }
            return Err(Trouble::Network(error));
        }
        self.job.piece = Some(piece);
        self.step("network");
        Ok(Made {
            pid,
            netns,
            cgroup,
            piece,
            image: self.image.clone(),
            frozen,
            created: false,
            steps: std::mem::take(&mut self.steps),
            took: Duration::ZERO,
        })
    }

    fn container_spec(&self, volume: Option<(VolumeId, std::path::PathBuf, String)>) -> ContainerSpec {
        let (tools, spec) = (self.tools, &self.job.spec);
        let limits = &tools.config.limits;
        let node_dir = tools.config.node_dir();
        ContainerSpec {
            name: format!("clawhq-{}-{}", &tools.data[..tools.data.len().min(8)], self.job.slot),
            slot: self.job.slot,
            node: self.job.node,
            data: tools.data.clone(),
            image: self.image.clone().unwrap_or_default(),
            uid: spec.uid,
            gid: spec.gid,
            hostname: spec.hostname.clone(),
            memory_mib: spec.memory_burst_mib.max(spec.memory_mib).max(6),
            memory_reserved_mib: spec.memory_mib,
            cpu_shares: spec.cpu_shares.clamp(2, 262_144),
            cpu_millis: spec.cpu_millis,
            pids: spec.pids.clamp(8, 32_768),
            nofile: limits.nofile,
            log_mib: limits.log_mib.max(1),
            tmpfs: spec.tmpfs.iter().map(|one| (one.path.clone(), one.size_mib.max(1), one.exec)).collect(),
            init_dir: tools.config.init_dir(),
            resolv_conf: node_dir.join("resolv.conf"),
            volume,
            runtime: tools.config.runtime.clone(),
        }
    }
}

/// Takes everything of a container away. It tries for as long as it takes: what is to go goes. After some refusals of a
/// Docker that answers it tells that it is `stuck`, once.
pub async fn unmake(
    tools: &Tools,
    container: Option<String>,
    piece: Option<Piece>,
    volume: Option<VolumeId>,
    stuck: impl AsyncFnOnce(),
) {
    let mut wait = AWAY_WAIT;
    if let Some(container) = container {
        let (mut stuck, mut refusals) = (Some(stuck), 0);
        while let Err(error) = tools.runtime.remove(&container).await {
            tracing::warn!(container, %error, "a container could not be removed and is tried again");
            refusals += u32::from(!matches!(error, RuntimeError::Away(_)));
            if refusals >= REFUSALS_MOST
                && let Some(stuck) = stuck.take()
            {
                stuck().await;
            }
            tokio::time::sleep(wait).await;
            wait = (wait * 2).min(AWAY_WAIT_MAX);
        }
    }
    if let Some(piece) = piece {
        if let Err(error) = tools.network.close(piece) {
            tracing::warn!(%error, "an address could not be closed");
        }
        if let Err(error) = tools.network.detach(piece).await {
            tracing::warn!(%error, "an interface could not be removed");
        }
    }
    if let Some(volume) = volume {
        // The kernel lets go of a mount a moment after the last process.
        for pause in [0, 20, 100, 300, 1_000, 3_000] {
            tokio::time::sleep(Duration::from_millis(pause)).await;
            match tools.volumes.release(volume).await {
                Ok(()) => return,
                Err(error) => tracing::debug!(%volume, %error, "a volume is still in use"),
            }
        }
        tracing::warn!(%volume, "a volume stays mounted until the next sweep");
    }
}
