//! Docker, through bollard. The sandbox profile every container gets is here, in [`body`].

use std::collections::{BTreeSet, HashMap};
use std::sync::OnceLock;
use std::time::Duration;

use async_trait::async_trait;
use bollard::container::LogOutput;
use bollard::errors::Error;
use bollard::exec::{ResizeExecOptions, StartExecOptions, StartExecResults};
use bollard::models::{
    ContainerCreateBody, ContainerStateStatusEnum, ContainerSummaryStateEnum, ExecConfig, HealthConfig, HostConfig,
    HostConfigLogConfig, ImageInspect, Mount, MountBindOptions, MountBindOptionsPropagationEnum, MountTmpfsOptions,
    MountType, ResourcesUlimits, RestartPolicy, RestartPolicyNameEnum,
};
use bollard::query_parameters::{
    CreateContainerOptionsBuilder, CreateImageOptionsBuilder, EventsOptionsBuilder, InspectContainerOptions,
    KillContainerOptionsBuilder, ListContainersOptionsBuilder, LogsOptionsBuilder, RemoveContainerOptionsBuilder,
    StartContainerOptions,
};
use bollard::{API_DEFAULT_VERSION, Docker};
use bytes::Bytes;
use futures::stream::{self, BoxStream};
use futures::{StreamExt, TryStreamExt};

use crate::runtime::{
    ContainerRuntime, ContainerSpec, ExecIo, INIT_MOUNT, Image, Inspected, LABEL_DATA, LABEL_NODE, LABEL_SLOT,
    LABEL_VOLUME, Listed, LogLine, LogQuery, Output, Phase, Result, RuntimeError, RuntimeEvent,
};

/// Every call that is not a stream.
const CALL_DEADLINE: Duration = Duration::from_secs(60);
const CALL_DEADLINE_S: u64 = CALL_DEADLINE.as_secs();

pub struct DockerRuntime {
    path: String,
    client: OnceLock<Docker>,
    /// Our data directory's fingerprint.
    data: String,
}

impl DockerRuntime {
    /// `host` is `unix:///path`. Nothing is connected yet.
    pub fn new(host: &str, data: String) -> anyhow::Result<Self> {
        let path = host
            .strip_prefix("unix://")
            .ok_or_else(|| anyhow::anyhow!("docker_host must be unix:///path/docker.sock, not {host}"))?;
        Ok(Self { path: path.to_owned(), client: OnceLock::new(), data })
    }

    /// bollard wants the socket to be there when its client is made; a daemon that is not up yet is merely away.
    fn docker(&self) -> Result<&Docker> {
        if let Some(client) = self.client.get() {
            return Ok(client);
        }
        let client = Docker::connect_with_unix(&self.path, CALL_DEADLINE_S, API_DEFAULT_VERSION)
            .map_err(|error| RuntimeError::Away(error.to_string()))?;
        Ok(self.client.get_or_init(|| client))
    }

    async fn call<T>(&self, what: &str, call: impl Future<Output = std::result::Result<T, Error>>) -> Result<T> {
        match tokio::time::timeout(CALL_DEADLINE, call).await {
            Ok(result) => result.map_err(refusal),
            Err(_) => Err(RuntimeError::Late(format!("{what} took more than {CALL_DEADLINE_S} s"))),
        }
    }

    async fn local(&self, reference: &str) -> Result<Option<ImageInspect>> {
        match self.call("inspecting the image", self.docker()?.inspect_image(reference)).await {
            Ok(image) => Ok(Some(image)),
            Err(RuntimeError::Gone) => Ok(None),
            Err(error) => Err(error),
        }
    }

    async fn pull(&self, reference: &str, deadline: Duration) -> Result<()> {
        let options = CreateImageOptionsBuilder::default().from_image(reference).build();
        let pull = self.docker()?.create_image(Some(options), None, None).try_for_each(|progress| async move {
            match progress.error_detail.and_then(|detail| detail.message) {
                Some(message) => Err(Error::DockerStreamError { error: message }),
                None => Ok(()),
            }
        });
        match tokio::time::timeout(deadline, pull).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(match refusal(error) {
                away @ (RuntimeError::Away(_) | RuntimeError::DiskFull(_)) => away,
                RuntimeError::Gone => RuntimeError::NoImage(format!("{reference} does not exist")),
                other => RuntimeError::NoImage(format!("{reference}: {other}")),
            }),
            Err(_) => {
                Err(RuntimeError::NoImage(format!("{reference} was not fetched within {} s", deadline.as_secs())))
            }
        }
    }
}

fn refusal(error: Error) -> RuntimeError {
    match error {
        Error::DockerResponseServerError { status_code, message } => match status_code {
            404 => RuntimeError::Gone,
            _ if message.contains("no space left on device") => RuntimeError::DiskFull(message),
            _ if message.contains("OCI runtime create failed") && message.contains("executable file not found") => {
                RuntimeError::NoCommand(message)
            }
            _ => RuntimeError::Refused(message),
        },
        Error::RequestTimeoutError => RuntimeError::Late("the call".to_owned()),
        Error::DockerStreamError { error } if error.contains("no space left on device") => {
            RuntimeError::DiskFull(error)
        }
        Error::DockerStreamError { error } => RuntimeError::Refused(error),
        Error::JsonDataError { message, .. } => RuntimeError::Refused(message),
        // What is left are the transport's: no connection, or one that broke.
        other => RuntimeError::Away(other.to_string()),
    }
}

/// The sandbox profile. Whatever an image says, a container has: no capability, no new privileges, Docker's seccomp
/// filter, a read-only root, sized tmpfs, no network but the one we attach, bounded processes, memory, files and log.
fn body(spec: &ContainerSpec) -> ContainerCreateBody {
    const MIB: i64 = 1 << 20;
    let bind = |source: &std::path::Path, target: &str, read_only: bool| Mount {
        typ: Some(MountType::BIND),
        source: Some(source.display().to_string()),
        target: Some(target.to_owned()),
        read_only: Some(read_only),
        bind_options: Some(MountBindOptions {
            propagation: Some(MountBindOptionsPropagationEnum::RPRIVATE),
            ..MountBindOptions::default()
        }),
        ..Mount::default()
    };
    let mut mounts = vec![bind(&spec.init_dir, INIT_MOUNT, true), bind(&spec.resolv_conf, "/etc/resolv.conf", true)];
    let mut labels = HashMap::from([
        (LABEL_SLOT.to_owned(), spec.slot.to_string()),
        (LABEL_DATA.to_owned(), spec.data.clone()),
        // Always set, so that an image's own labels cannot stand in for ours.
        (LABEL_NODE.to_owned(), spec.node.map(|node| node.to_string()).unwrap_or_default()),
        (LABEL_VOLUME.to_owned(), String::new()),
    ]);
    if let Some((volume, source, target)) = &spec.volume {
        mounts.push(bind(source, target, false));
        labels.insert(LABEL_VOLUME.to_owned(), volume.to_string());
    }
    let owner = format!("uid={},gid={}", spec.uid, spec.gid);
    let mut tmpfs = HashMap::from([
        ("/tmp".to_owned(), "rw,nosuid,nodev,noexec,size=64m,nr_inodes=16k,mode=1777".to_owned()),
        ("/run".to_owned(), format!("rw,nosuid,nodev,noexec,size=8m,nr_inodes=4k,mode=0700,{owner}")),
    ]);
    for (path, size_mib, exec) in &spec.tmpfs {
        let exec = if *exec { "exec" } else { "noexec" };
        let mode = if path == "/tmp" { "mode=1777".to_owned() } else { format!("mode=0700,{owner}") };
        tmpfs.insert(path.clone(), format!("rw,nosuid,nodev,{exec},size={size_mib}m,nr_inodes=64k,{mode}"));
    }
    // Docker would make an unbounded anonymous volume of each path the image declares, unless a mount is there.
    let taken = |path: &str| {
        tmpfs.keys().any(|one| one.trim_end_matches('/') == path)
            || spec.volume.as_ref().is_some_and(|(_, _, target)| target.trim_end_matches('/') == path)
    };
    let declared: BTreeSet<&str> = spec.image.volumes.iter().map(|path| path.trim_end_matches('/')).collect();
    for path in declared.into_iter().filter(|path| !path.is_empty() && !taken(path)) {
        mounts.push(Mount {
            typ: Some(MountType::TMPFS),
            target: Some(path.to_owned()),
            tmpfs_options: Some(MountTmpfsOptions {
                size_bytes: Some(64 * MIB),
                mode: Some(0o1777),
                ..MountTmpfsOptions::default()
            }),
            ..Mount::default()
        });
    }
    let ulimit =
        |name: &str, value: i64| ResourcesUlimits { name: Some(name.to_owned()), soft: Some(value), hard: Some(value) };
    ContainerCreateBody {
        image: Some(spec.image.id.clone()),
        hostname: (!spec.hostname.is_empty()).then(|| spec.hostname.clone()),
        user: Some(format!("{}:{}", spec.uid, spec.gid)),
        entrypoint: Some(vec![clawhq_init::INIT_PATH.to_owned()]),
        cmd: Some(Vec::new()),
        // An image's health check would be one more exec every few seconds.
        healthcheck: Some(HealthConfig { test: Some(vec!["NONE".to_owned()]), ..HealthConfig::default() }),
        labels: Some(labels),
        network_disabled: Some(false),
        host_config: Some(HostConfig {
            network_mode: Some("none".to_owned()),
            cap_drop: Some(vec!["ALL".to_owned()]),
            security_opt: Some(vec!["no-new-privileges:true".to_owned()]),
            privileged: Some(false),
            readonly_rootfs: Some(true),
            tmpfs: Some(tmpfs),
            mounts: Some(mounts),
            ipc_mode: Some("private".to_owned()),
            shm_size: Some(16 * MIB),
            pids_limit: Some(i64::from(spec.pids)),
            memory: Some(i64::from(spec.memory_mib) * MIB),
            memory_swap: Some(i64::from(spec.memory_mib) * MIB),
            memory_reservation: Some(i64::from(spec.memory_reserved_mib.min(spec.memory_mib)) * MIB),
            cpu_shares: Some(i64::from(spec.cpu_shares)),
            // Docker refuses a ceiling above the cores there are; on a smaller host the host is the ceiling.
            nano_cpus: (spec.cpu_millis > 0).then(|| i64::from(spec.cpu_millis.min(host_millis())) * 1_000_000),
            ulimits: Some(vec![ulimit("nofile", i64::try_from(spec.nofile).unwrap_or(i64::MAX)), ulimit("core", 0)]),
            log_config: Some(HostConfigLogConfig {
                typ: Some("local".to_owned()),
                config: Some(HashMap::from([
                    ("max-size".to_owned(), format!("{}m", spec.log_mib)),
                    ("max-file".to_owned(), "2".to_owned()),
                    ("compress".to_owned(), "false".to_owned()),
                ])),
            }),
            restart_policy: Some(RestartPolicy { name: Some(RestartPolicyNameEnum::NO), ..RestartPolicy::default() }),
            runtime: spec.runtime.clone(),
            ..HostConfig::default()
        }),
        ..ContainerCreateBody::default()
    }
}

fn known(reference: &str, digest: &str, image: ImageInspect) -> Option<Image> {
    let id = image.id?;
    let digests: Vec<&str> = image
        .repo_digests
        .iter()
        .flatten()
        .filter_map(|full| full.rsplit_once('@').map(|(_, digest)| digest))
        .collect();
    if !digest.is_empty() && digest != id && !digests.contains(&digest) {
        tracing::debug!(reference, digest, "another image of that name lies here");
        return None;
    }
    let config = image.config.unwrap_or_default();
    let mut argv = config.entrypoint.unwrap_or_default();
    argv.extend(config.cmd.unwrap_or_default());
    Some(Image {
        digest: if digest.is_empty() {
            digests.first().map_or_else(|| id.clone(), |one| (*one).to_owned())
        } else {
            digest.to_owned()
        },
        id,
        argv,
        volumes: config.volumes.unwrap_or_default(),
    })
}

#[async_trait]
impl ContainerRuntime for DockerRuntime {
    async fn version(&self) -> Result<String> {
        let version = self.call("asking the version", self.docker()?.version()).await?;
        Ok(format!("docker {}", version.version.unwrap_or_default()))
    }

    async fn list(&self) -> Result<Vec<Listed>> {
        let filters = HashMap::from([("label".to_owned(), vec![format!("{LABEL_DATA}={}", self.data)])]);
        let options = ListContainersOptionsBuilder::default().all(true).filters(&filters).build();
        let list = self.call("listing containers", self.docker()?.list_containers(Some(options))).await?;
        Ok(list
            .into_iter()
            .filter_map(|one| {
                Some(Listed {
                    id: one.id?,
                    labels: one.labels.unwrap_or_default(),
                    phase: match one.state? {
                        ContainerSummaryStateEnum::CREATED => Phase::Made,
                        ContainerSummaryStateEnum::RUNNING
                        | ContainerSummaryStateEnum::PAUSED
                        | ContainerSummaryStateEnum::RESTARTING => Phase::Up,
                        _ => Phase::Ended,
                    },
                })
            })
            .collect())
    }

    fn events(&self) -> BoxStream<'static, Result<RuntimeEvent>> {
        let filters = HashMap::from([
            ("label".to_owned(), vec![format!("{LABEL_DATA}={}", self.data)]),
            ("type".to_owned(), vec!["container".to_owned()]),
            ("event".to_owned(), ["start", "die", "oom", "destroy"].map(str::to_owned).to_vec()),
        ]);
        let options = EventsOptionsBuilder::default().filters(&filters).build();
        let docker = match self.docker() {
            Ok(docker) => docker,
            Err(error) => return stream::once(async { Err(error) }).boxed(),
        };
        docker
            .events(Some(options))
            .map_err(refusal)
            .try_filter_map(|event| async move {
                let actor = event.actor.unwrap_or_default();
                let Some(id) = actor.id else { return Ok(None) };
                Ok(match event.action.as_deref() {
                    Some("start") => Some(RuntimeEvent::Started { id }),
                    Some("oom") => Some(RuntimeEvent::OutOfMemory { id }),
                    Some("destroy") => Some(RuntimeEvent::Removed { id }),
                    Some("die") => {
                        let exit_code = actor
                            .attributes
                            .and_then(|attributes| attributes.get("exitCode").and_then(|code| code.parse().ok()));
                        Some(RuntimeEvent::Died { id, exit_code })
                    }
                    _ => None,
                })
            })
            .boxed()
    }

    async fn image(&self, reference: &str, digest: &str, deadline: Duration) -> Result<Image> {
        for candidate in [reference, digest] {
            if !candidate.is_empty()
                && let Some(image) = self.local(candidate).await?
                && let Some(image) = known(reference, digest, image)
            {
                return Ok(image);
            }
        }
        let wanted = match digest {
            "" => reference.to_owned(),
            _ => {
                let bare = reference.split('@').next().unwrap_or(reference);
                // A colon after the last slash begins a tag; one before it a port.
                let tag = bare.rfind(':').filter(|colon| bare.rfind('/').is_none_or(|slash| slash < *colon));
                format!("{}@{digest}", &bare[..tag.unwrap_or(bare.len())])
            }
        };
        self.pull(&wanted, deadline).await?;
        self.local(&wanted)
            .await?
            .and_then(|image| known(&wanted, digest, image))
            .ok_or_else(|| RuntimeError::NoImage(format!("{wanted} was fetched and is not there")))
    }

    async fn create(&self, spec: &ContainerSpec) -> Result<String> {
        let options = CreateContainerOptionsBuilder::default().name(&spec.name).build();
        match self.call("creating", self.docker()?.create_container(Some(options), body(spec))).await {
            Ok(made) => Ok(made.id),
            Err(RuntimeError::Gone) => Err(RuntimeError::NoImage(format!("{} went away", spec.image.id))),
            // Made by an earlier try whose answer was lost; the name holds the slot's id, the label proves it ours.
            Err(RuntimeError::Refused(message)) if message.contains("is already in use") => {
                let found = self
                    .call("inspecting", self.docker()?.inspect_container(&spec.name, None::<InspectContainerOptions>))
                    .await?;
                let ours = found
                    .config
                    .and_then(|config| config.labels)
                    .is_some_and(|labels| labels.get(LABEL_DATA) == Some(&self.data));
                found.id.filter(|_| ours).ok_or(RuntimeError::Refused(message))
            }
            Err(error) => Err(error),
        }
    }

    async fn start(&self, id: &str) -> Result<()> {
        self.call("starting", self.docker()?.start_container(id, None::<StartContainerOptions>)).await
    }

    async fn inspect(&self, id: &str) -> Result<Inspected> {
        let found =
            self.call("inspecting", self.docker()?.inspect_container(id, None::<InspectContainerOptions>)).await?;
        let state = found.state.unwrap_or_default();
        Ok(Inspected {
            phase: match state.status {
                Some(ContainerStateStatusEnum::CREATED) => Phase::Made,
                _ if state.running == Some(true) => Phase::Up,
                _ => Phase::Ended,
            },
            pid: state.pid.and_then(|pid| u32::try_from(pid).ok()).filter(|pid| *pid != 0),
            out_of_memory: state.oom_killed == Some(true),
        })
    }

    async fn kill(&self, id: &str, signal: &str) -> Result<()> {
        let options = KillContainerOptionsBuilder::default().signal(signal).build();
        self.call("signalling", self.docker()?.kill_container(id, Some(options))).await
    }

    async fn remove(&self, id: &str) -> Result<()> {
        let options = RemoveContainerOptionsBuilder::default().force(true).v(true).build();
        match self.call("removing", self.docker()?.remove_container(id, Some(options))).await {
            Ok(()) | Err(RuntimeError::Gone) => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn logs(&self, id: &str, query: LogQuery) -> BoxStream<'static, Result<LogLine>> {
        let tail = query.tail.map_or_else(|| "all".to_owned(), |lines| lines.to_string());
        let options = LogsOptionsBuilder::default()
            .follow(query.follow)
            .stdout(query.stdout)
            .stderr(query.stderr)
            .timestamps(true)
            .tail(&tail)
            // Docker counts in whole seconds here; the rest is cut below.
            .since(i32::try_from(query.since_ms.div_euclid(1000)).unwrap_or(i32::MAX))
            .build();
        let docker = match self.docker() {
            Ok(docker) => docker,
            Err(error) => return stream::once(async { Err(error) }).boxed(),
        };
        docker
            .logs(id, Some(options))
            .map_err(refusal)
            .try_filter_map(move |chunk| async move {
                let (output, message) = match chunk {
                    LogOutput::StdErr { message } => (Output::Stderr, message),
                    LogOutput::StdOut { message } | LogOutput::Console { message } => (Output::Stdout, message),
                    LogOutput::StdIn { .. } => return Ok(None),
                };
                let line = stamped(output, message);
                Ok((line.at_ms >= query.since_ms).then_some(line))
            })
            .boxed()
    }

    async fn exec(&self, id: &str, argv: Vec<String>, tty: bool) -> Result<ExecIo> {
        let config = ExecConfig {
            attach_stdin: Some(true),
            attach_stdout: Some(true),
            attach_stderr: Some(true),
            tty: Some(tty),
            cmd: Some(argv),
            ..ExecConfig::default()
        };
        let exec = self.call("exec", self.docker()?.create_exec(id, config)).await?;
        let options = StartExecOptions { detach: false, tty, output_capacity: None };
        match self.call("exec", self.docker()?.start_exec(&exec.id, Some(options))).await? {
            StartExecResults::Attached { output, input } => Ok(ExecIo {
                id: exec.id,
                output: output
                    .map_err(refusal)
                    .map_ok(|chunk| match chunk {
                        LogOutput::StdErr { message } => (Output::Stderr, message),
                        other => (Output::Stdout, other.into_bytes()),
                    })
                    .boxed(),
                input,
            }),
            StartExecResults::Detached => {
                Ok(ExecIo { id: exec.id, output: stream::empty().boxed(), input: Box::pin(tokio::io::sink()) })
            }
        }
    }

    async fn exec_state(&self, exec: &str) -> Result<(Option<i32>, Option<u32>)> {
        let state = self.call("exec", self.docker()?.inspect_exec(exec)).await?;
        let pid = state.pid.and_then(|pid| u32::try_from(pid).ok()).filter(|pid| *pid != 0);
        let code = state.exit_code.filter(|_| state.running == Some(false));
        Ok((code.and_then(|code| i32::try_from(code).ok()), pid))
    }

    async fn resize(&self, exec: &str, cols: u16, rows: u16) -> Result<()> {
        let options = ResizeExecOptions { height: rows, width: cols };
        self.call("resizing", self.docker()?.resize_exec(exec, options)).await
    }
}

/// `2026-11-21T10:00:00.123456789Z text\n`
fn stamped(output: Output, message: Bytes) -> LogLine {
    let end = message.iter().position(|byte| *byte == b' ').unwrap_or(0);
    let at_ms = std::str::from_utf8(&message[..end])
        .ok()
        .and_then(|text| chrono::DateTime::parse_from_rfc3339(text).ok())
        .map(|at| at.timestamp_millis());
    let mut line = if at_ms.is_some() { message.slice((end + 1).min(message.len())..) } else { message };
    while let Some(b'\n' | b'\r') = line.last() {
        line.truncate(line.len() - 1);
    }
    LogLine { at_ms: at_ms.unwrap_or(0), output, line }
}

/// This host's cores, in thousandths.
fn host_millis() -> u32 {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    u32::try_from(cores).unwrap_or(u32::MAX).saturating_mul(1000)
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use clawhq_domain::ids::{SlotId, VolumeId};

    use super::*;

    fn spec() -> ContainerSpec {
        ContainerSpec {
            name: "n".to_owned(),
            slot: SlotId::from_u128(1),
            node: None,
            data: "d".to_owned(),
            image: Image {
                id: "sha256:0".to_owned(),
                volumes: vec!["/data/".to_owned(), "/cache".to_owned()],
                ..Image::default()
            },
            uid: 1000,
            gid: 1001,
            hostname: "h".to_owned(),
            memory_mib: 512,
            memory_reserved_mib: 256,
            cpu_shares: 256,
            cpu_millis: 1500,
            pids: 128,
            nofile: 4096,
            log_mib: 5,
            tmpfs: vec![("/tmp".to_owned(), 32, true)],
            init_dir: PathBuf::from("/d/init"),
            resolv_conf: PathBuf::from("/d/resolv.conf"),
            volume: Some((VolumeId::from_u128(2), PathBuf::from("/d/vol"), "/data".to_owned())),
            runtime: None,
        }
    }

    #[test]
    fn nothing_writable_is_unbounded() {
        let host = body(&spec()).host_config.unwrap();
        assert_eq!(host.readonly_rootfs, Some(true));
        assert!(
            host.binds.is_none() && host.volumes_from.is_none() && host.devices.is_none() && host.cap_add.is_none()
        );
        let writable: Vec<_> = host
            .mounts
            .unwrap()
            .into_iter()
            .filter(|mount| mount.read_only != Some(true))
            .map(|mount| (mount.target.unwrap(), mount.tmpfs_options.and_then(|options| options.size_bytes)))
            .collect();
        // Our own volume, and a sized tmpfs for what else the image declares.
        assert_eq!(writable, [("/data".to_owned(), None), ("/cache".to_owned(), Some(64 << 20))]);
        let tmpfs = host.tmpfs.unwrap();
        let mut paths: Vec<_> = tmpfs.keys().map(String::as_str).collect();
        paths.sort_unstable();
        assert_eq!(paths, ["/run", "/tmp"]);
        assert!(tmpfs.values().all(|options| options.contains("size=") && options.contains("nosuid,nodev")));
        assert!(tmpfs["/tmp"].contains(",exec,size=32m") && tmpfs["/run"].contains(",noexec,"));
        assert_eq!(host.memory, host.memory_swap);
    }

    #[test]
    fn log_lines_lose_their_stamp_and_keep_their_bytes() {
        let line = stamped(Output::Stdout, Bytes::from_static(b"2026-11-21T10:00:00.123456789Z  two spaces \r\n"));
        assert_eq!((line.at_ms, &line.line[..]), (1_795_255_200_123, &b" two spaces "[..]));
        let bare = stamped(Output::Stderr, Bytes::from_static(b"no stamp\n"));
        assert_eq!((bare.at_ms, &bare.line[..]), (0, &b"no stamp"[..]));
    }
}
