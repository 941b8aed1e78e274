//! The store's own shapes of what it keeps as JSON. The domain has no serde, and a row written by an older release must
//! be read by this one: so each document carries a version, unknown fields are refused, and a shape that was released is
//! only ever added to with `#[serde(default)]`, or gets a new version beside it.

use std::collections::BTreeMap;

use clawhq_domain::names::{EnvName, ImageRef, SecretName, TemplateName};
use clawhq_domain::release as domain;
use clawhq_domain::slot as domain_slot;
use clawhq_domain::template as domain_template;
use clawhq_domain::tier::Tier;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::slots::SlotSpec;

const VERSION: u32 = 1;

#[derive(Serialize, Deserialize)]
struct Versioned<T> {
    v: u32,
    #[serde(flatten)]
    body: T,
}

/// Flattening loses `deny_unknown_fields`, so the version is taken out by hand on the way in.
fn read<T: for<'de> Deserialize<'de>>(value: Value) -> Option<T> {
    let Value::Object(mut fields) = value else { return None };
    let version = fields.remove("v")?.as_u64()?;
    (version == u64::from(VERSION)).then(|| serde_json::from_value(Value::Object(fields)).ok()).flatten()
}

fn write<T: Serialize>(body: T) -> Value {
    // Only maps with keys that are not text can fail, and none of the shapes below has any.
    serde_json::to_value(Versioned { v: VERSION, body }).unwrap_or(Value::Null)
}

macro_rules! words {
    ($name:ident for $domain:path { $($word:ident),+ }) => {
        #[derive(Clone, Copy, Serialize, Deserialize)]
        #[serde(rename_all = "snake_case")]
        enum $name { $($word),+ }

        impl From<$domain> for $name {
            fn from(value: $domain) -> Self {
                match value { $(<$domain>::$word => Self::$word),+ }
            }
        }

        impl From<$name> for $domain {
            fn from(value: $name) -> Self {
                match value { $($name::$word => Self::$word),+ }
            }
        }
    };
}
words!(WarmMode for domain_template::WarmMode { Exec, App, Frozen, None });
words!(Protocol for domain_template::Protocol { Http, Tcp, Udp });

pub(crate) fn warm_mode_name(mode: domain_template::WarmMode) -> &'static str {
    match mode {
        domain_template::WarmMode::Exec => "exec",
        domain_template::WarmMode::App => "app",
        domain_template::WarmMode::Frozen => "frozen",
        domain_template::WarmMode::None => "none",
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Port {
    name: String,
    port: u16,
    protocol: Protocol,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields, tag = "kind", rename_all = "snake_case")]
enum Probe {
    Started,
    Tcp { port: u16 },
    Http { port: u16, path: String, expect: Option<String> },
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct WarmUp {
    port: u16,
    path: String,
    bearer: Option<String>,
    body: Option<String>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Volume {
    path: String,
    size_mib: u32,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Tmpfs {
    path: String,
    size_mib: u32,
    exec: bool,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Minted {
    env: String,
    bytes: u8,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct TemplateFile {
    path: String,
    mode: u32,
    content: String,
    only_if_absent: bool,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Template {
    name: String,
    title: String,
    description: String,
    icon: String,
    image: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    image_digest: Option<String>,
    argv: Vec<String>,
    env: BTreeMap<String, String>,
    working_dir: Option<String>,
    uid: u32,
    gid: u32,
    ports: Vec<Port>,
    probe: Probe,
    start_deadline_ms: u32,
    stop_deadline_ms: u32,
    least_memory_mib: u32,
    least_pids: u32,
    warm_mode: WarmMode,
    warm_limit: Option<u32>,
    // Left out where there is none: what was written before it came reads the same.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    warm_up: Vec<WarmUp>,
    state: Option<Volume>,
    tmpfs: Vec<Tmpfs>,
    minted: Vec<Minted>,
    files: Vec<TemplateFile>,
    config_schema: Option<String>,
    unavailable: Option<String>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields, tag = "as", rename_all = "snake_case")]
enum SecretTarget {
    Env { name: String },
    File { path: String },
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SecretRef {
    secret: String,
    version: u32,
    target: SecretTarget,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct FileSpec {
    path: String,
    mode: u32,
    content: String,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Config {
    env: BTreeMap<String, String>,
    secrets: Vec<SecretRef>,
    files: Vec<FileSpec>,
    argv: Option<Vec<String>>,
    ports: Option<Vec<Port>>,
    volume: Option<Volume>,
    uid: Option<u32>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Release {
    template: Option<String>,
    image: String,
    image_digest: Option<String>,
    config: Config,
    argv: Vec<String>,
    env: BTreeMap<String, String>,
    working_dir: Option<String>,
    uid: u32,
    gid: u32,
    ports: Vec<Port>,
    probe: Probe,
    start_deadline_ms: u32,
    stop_deadline_ms: u32,
    state: Option<Volume>,
    tmpfs: Vec<Tmpfs>,
    least_memory_mib: u32,
    least_pids: u32,
    warm_mode: WarmMode,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct TierShape {
    name: String,
    memory_mib: u32,
    memory_burst_mib: u32,
    cpu_shares: u32,
    cpu_millis: u32,
    pids: u32,
    max_per_node: u32,
    warm_target: u32,
    rate_per_min: u32,
    max_workloads: u32,
    volume_mib: u32,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Spec {
    release: Release,
    template: Option<Template>,
    tier: TierShape,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields, tag = "how", rename_all = "snake_case")]
enum Exit {
    Code { code: i32 },
    Signal { signal: i32 },
    OutOfMemory,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Failure {
    kind: String,
    message: String,
    exit: Option<Exit>,
    log_tail: Vec<String>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Step {
    name: String,
    micros: u64,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Change {
    field: String,
    before: Option<String>,
    after: Option<String>,
}

// Outwards: each `let` takes the whole domain value apart, so that a new field breaks the build here.

fn ports_out(ports: &[domain_template::Port]) -> Vec<Port> {
    let one = |domain_template::Port { name, port, protocol }: &domain_template::Port| Port {
        name: name.clone(),
        port: *port,
        protocol: (*protocol).into(),
    };
    ports.iter().map(one).collect()
}

fn ports_in(ports: Vec<Port>) -> Vec<domain_template::Port> {
    let one = |Port { name, port, protocol }| domain_template::Port { name, port, protocol: protocol.into() };
    ports.into_iter().map(one).collect()
}

fn probe_out(probe: &domain_template::Probe) -> Probe {
    match probe {
        domain_template::Probe::Started => Probe::Started,
        domain_template::Probe::Tcp { port } => Probe::Tcp { port: *port },
        domain_template::Probe::Http { port, path, expect } => {
            Probe::Http { port: *port, path: path.clone(), expect: expect.clone() }
        }
    }
}

fn probe_in(probe: Probe) -> domain_template::Probe {
    match probe {
        Probe::Started => domain_template::Probe::Started,
        Probe::Tcp { port } => domain_template::Probe::Tcp { port },
        Probe::Http { port, path, expect } => domain_template::Probe::Http { port, path, expect },
    }
}

fn volume_out(volume: &domain_template::StateVolume) -> Volume {
    let domain_template::StateVolume { path, size_mib } = volume;
    Volume { path: path.clone(), size_mib: *size_mib }
}

fn volume_in(Volume { path, size_mib }: Volume) -> domain_template::StateVolume {
    domain_template::StateVolume { path, size_mib }
}

fn tmpfs_out(tmpfs: &[domain_template::Tmpfs]) -> Vec<Tmpfs> {
    let one = |domain_template::Tmpfs { path, size_mib, exec }: &domain_template::Tmpfs| Tmpfs {
        path: path.clone(),
        size_mib: *size_mib,
        exec: *exec,
    };
    tmpfs.iter().map(one).collect()
}

fn tmpfs_in(tmpfs: Vec<Tmpfs>) -> Vec<domain_template::Tmpfs> {
    tmpfs.into_iter().map(|Tmpfs { path, size_mib, exec }| domain_template::Tmpfs { path, size_mib, exec }).collect()
}

fn env_out(env: &BTreeMap<EnvName, String>) -> BTreeMap<String, String> {
    env.iter().map(|(name, value)| (name.to_string(), value.clone())).collect()
}

fn env_in(env: BTreeMap<String, String>) -> Option<BTreeMap<EnvName, String>> {
    env.into_iter().map(|(name, value)| Some((EnvName::parse(&name).ok()?, value))).collect()
}

fn template_out(template: &domain_template::Template) -> Template {
    let domain_template::Template {
        name,
        title,
        description,
        icon,
        image,
        image_digest,
        argv,
        env,
        working_dir,
        uid,
        gid,
        ports,
        probe,
        start_deadline_ms,
        stop_deadline_ms,
        least_memory_mib,
        least_pids,
        warm_mode,
        warm_limit,
        warm_up,
        state,
        tmpfs,
        minted,
        files,
        config_schema,
        unavailable,
    } = template;
    Template {
        name: name.to_string(),
        title: title.clone(),
        description: description.clone(),
        icon: icon.clone(),
        image: image.to_string(),
        image_digest: image_digest.clone(),
        argv: argv.clone(),
        env: env_out(env),
        working_dir: working_dir.clone(),
        uid: *uid,
        gid: *gid,
        ports: ports_out(ports),
        probe: probe_out(probe),
        start_deadline_ms: *start_deadline_ms,
        stop_deadline_ms: *stop_deadline_ms,
        least_memory_mib: *least_memory_mib,
        least_pids: *least_pids,
        warm_mode: (*warm_mode).into(),
        warm_limit: *warm_limit,
        warm_up: warm_up
            .iter()
            .map(|domain_template::WarmUp { port, path, bearer, body }| WarmUp {
                port: *port,
                path: path.clone(),
                bearer: bearer.as_ref().map(ToString::to_string),
                body: body.clone(),
            })
            .collect(),
        state: state.as_ref().map(volume_out),
        tmpfs: tmpfs_out(tmpfs),
        minted: minted
            .iter()
            .map(|domain_template::MintedToken { env, bytes }| Minted { env: env.to_string(), bytes: *bytes })
            .collect(),
        files: files
            .iter()
            .map(|domain_template::TemplateFile { path, mode, content, only_if_absent }| TemplateFile {
                path: path.clone(),
                mode: *mode,
                content: content.clone(),
                only_if_absent: *only_if_absent,
            })
            .collect(),
        config_schema: config_schema.clone(),
        unavailable: unavailable.clone(),
    }
}

fn template_in(template: Template) -> Option<domain_template::Template> {
    Some(domain_template::Template {
        name: TemplateName::parse(&template.name).ok()?,
        title: template.title,
        description: template.description,
        icon: template.icon,
        image: ImageRef::parse(&template.image).ok()?,
        image_digest: template.image_digest,
        argv: template.argv,
        env: env_in(template.env)?,
        working_dir: template.working_dir,
        uid: template.uid,
        gid: template.gid,
        ports: ports_in(template.ports),
        probe: probe_in(template.probe),
        start_deadline_ms: template.start_deadline_ms,
        stop_deadline_ms: template.stop_deadline_ms,
        least_memory_mib: template.least_memory_mib,
        least_pids: template.least_pids,
        warm_mode: template.warm_mode.into(),
        warm_limit: template.warm_limit,
        warm_up: template
            .warm_up
            .into_iter()
            .map(|WarmUp { port, path, bearer, body }| {
                let bearer = bearer.map(|name| EnvName::parse(&name)).transpose().ok()?;
                Some(domain_template::WarmUp { port, path, bearer, body })
            })
            .collect::<Option<_>>()?,
        state: template.state.map(volume_in),
        tmpfs: tmpfs_in(template.tmpfs),
        minted: template
            .minted
            .into_iter()
            .map(|Minted { env, bytes }| Some(domain_template::MintedToken { env: EnvName::parse(&env).ok()?, bytes }))
            .collect::<Option<_>>()?,
        files: template
            .files
            .into_iter()
            .map(|TemplateFile { path, mode, content, only_if_absent }| domain_template::TemplateFile {
                path,
                mode,
                content,
                only_if_absent,
            })
            .collect(),
        config_schema: template.config_schema,
        unavailable: template.unavailable,
    })
}

fn config_out(config: &domain::Config) -> Config {
    let domain::Config { env, secrets, files, argv, ports, volume, uid } = config;
    Config {
        env: env_out(env),
        secrets: secrets
            .iter()
            .map(|domain::SecretRef { secret, version, target }| SecretRef {
                secret: secret.to_string(),
                version: *version,
                target: match target {
                    domain::SecretTarget::Env(name) => SecretTarget::Env { name: name.to_string() },
                    domain::SecretTarget::File(path) => SecretTarget::File { path: path.clone() },
                },
            })
            .collect(),
        files: files
            .iter()
            .map(|domain::FileSpec { path, mode, content }| FileSpec {
                path: path.clone(),
                mode: *mode,
                content: content.clone(),
            })
            .collect(),
        argv: argv.clone(),
        ports: ports.as_deref().map(ports_out),
        volume: volume.as_ref().map(volume_out),
        uid: *uid,
    }
}

fn config_in(config: Config) -> Option<domain::Config> {
    let secret = |SecretRef { secret, version, target }| {
        Some(domain::SecretRef {
            secret: SecretName::parse(&secret).ok()?,
            version,
            target: match target {
                SecretTarget::Env { name } => domain::SecretTarget::Env(EnvName::parse(&name).ok()?),
                SecretTarget::File { path } => domain::SecretTarget::File(path),
            },
        })
    };
    Some(domain::Config {
        env: env_in(config.env)?,
        secrets: config.secrets.into_iter().map(secret).collect::<Option<_>>()?,
        files: config
            .files
            .into_iter()
            .map(|FileSpec { path, mode, content }| domain::FileSpec { path, mode, content })
            .collect(),
        argv: config.argv,
        ports: config.ports.map(ports_in),
        volume: config.volume.map(volume_in),
        uid: config.uid,
    })
}

fn release_out(release: &domain::Release) -> Release {
    let domain::Release {
        template,
        image,
        image_digest,
        config,
        argv,
        env,
        working_dir,
        uid,
        gid,
        ports,
        probe,
        start_deadline_ms,
        stop_deadline_ms,
        state,
        tmpfs,
        least_memory_mib,
        least_pids,
        warm_mode,
    } = release;
    Release {
        template: template.as_ref().map(ToString::to_string),
        image: image.to_string(),
        image_digest: image_digest.clone(),
        config: config_out(config),
        argv: argv.clone(),
        env: env_out(env),
        working_dir: working_dir.clone(),
        uid: *uid,
        gid: *gid,
        ports: ports_out(ports),
        probe: probe_out(probe),
        start_deadline_ms: *start_deadline_ms,
        stop_deadline_ms: *stop_deadline_ms,
        state: state.as_ref().map(volume_out),
        tmpfs: tmpfs_out(tmpfs),
        least_memory_mib: *least_memory_mib,
        least_pids: *least_pids,
        warm_mode: (*warm_mode).into(),
    }
}

fn release_in(release: Release) -> Option<domain::Release> {
    Some(domain::Release {
        template: match release.template {
            Some(name) => Some(TemplateName::parse(&name).ok()?),
            None => None,
        },
        image: ImageRef::parse(&release.image).ok()?,
        image_digest: release.image_digest,
        config: config_in(release.config)?,
        argv: release.argv,
        env: env_in(release.env)?,
        working_dir: release.working_dir,
        uid: release.uid,
        gid: release.gid,
        ports: ports_in(release.ports),
        probe: probe_in(release.probe),
        start_deadline_ms: release.start_deadline_ms,
        stop_deadline_ms: release.stop_deadline_ms,
        state: release.state.map(volume_in),
        tmpfs: tmpfs_in(release.tmpfs),
        least_memory_mib: release.least_memory_mib,
        least_pids: release.least_pids,
        warm_mode: release.warm_mode.into(),
    })
}

fn tier_out(tier: &Tier) -> TierShape {
    let Tier {
        name,
        memory_mib,
        memory_burst_mib,
        cpu_shares,
        cpu_millis,
        pids,
        max_per_node,
        warm_target,
        rate_per_min,
        max_workloads,
        volume_mib,
    } = tier;
    TierShape {
        name: name.clone(),
        memory_mib: *memory_mib,
        memory_burst_mib: *memory_burst_mib,
        cpu_shares: *cpu_shares,
        cpu_millis: *cpu_millis,
        pids: *pids,
        max_per_node: *max_per_node,
        warm_target: *warm_target,
        rate_per_min: *rate_per_min,
        max_workloads: *max_workloads,
        volume_mib: *volume_mib,
    }
}

fn tier_in(tier: TierShape) -> Tier {
    Tier {
        name: tier.name,
        memory_mib: tier.memory_mib,
        memory_burst_mib: tier.memory_burst_mib,
        cpu_shares: tier.cpu_shares,
        cpu_millis: tier.cpu_millis,
        pids: tier.pids,
        max_per_node: tier.max_per_node,
        warm_target: tier.warm_target,
        rate_per_min: tier.rate_per_min,
        max_workloads: tier.max_workloads,
        volume_mib: tier.volume_mib,
    }
}

pub(crate) fn write_template(template: &domain_template::Template) -> Value {
    write(template_out(template))
}

pub(crate) fn read_template(value: Value) -> Option<domain_template::Template> {
    template_in(read(value)?)
}

pub(crate) fn write_release(release: &domain::Release) -> Value {
    write(release_out(release))
}

pub(crate) fn read_release(value: Value) -> Option<domain::Release> {
    release_in(read(value)?)
}

pub(crate) fn write_spec(spec: &SlotSpec) -> Value {
    let SlotSpec { release, template, tier } = spec;
    write(Spec { release: release_out(release), template: template.as_ref().map(template_out), tier: tier_out(tier) })
}

pub(crate) fn read_spec(value: Value) -> Option<SlotSpec> {
    let Spec { release, template, tier } = read(value)?;
    let template = match template {
        Some(template) => Some(template_in(template)?),
        None => None,
    };
    Some(SlotSpec { release: release_in(release)?, template, tier: tier_in(tier) })
}

pub(crate) fn write_failure(failure: &domain_slot::Failure) -> Value {
    let domain_slot::Failure { kind, message, exit, log_tail } = failure;
    write(Failure {
        kind: kind.code().to_owned(),
        message: message.clone(),
        exit: exit.as_ref().map(|exit| match exit {
            domain_slot::Exit::Code(code) => Exit::Code { code: *code },
            domain_slot::Exit::Signal(signal) => Exit::Signal { signal: *signal },
            domain_slot::Exit::OutOfMemory => Exit::OutOfMemory,
        }),
        log_tail: log_tail.clone(),
    })
}

pub(crate) fn read_failure(value: Value) -> Option<domain_slot::Failure> {
    let Failure { kind, message, exit, log_tail } = read(value)?;
    Some(domain_slot::Failure {
        kind: domain_slot::FailureKind::parse(&kind)?,
        message,
        exit: exit.map(|exit| match exit {
            Exit::Code { code } => domain_slot::Exit::Code(code),
            Exit::Signal { signal } => domain_slot::Exit::Signal(signal),
            Exit::OutOfMemory => domain_slot::Exit::OutOfMemory,
        }),
        log_tail,
    })
}

pub(crate) fn write_steps(steps: &[domain_slot::Step]) -> Value {
    let step = |domain_slot::Step { name, micros }: &domain_slot::Step| Step { name: name.clone(), micros: *micros };
    serde_json::to_value(steps.iter().map(step).collect::<Vec<_>>()).unwrap_or_default()
}

pub(crate) fn read_steps(value: Value) -> Option<Vec<domain_slot::Step>> {
    let steps: Vec<Step> = serde_json::from_value(value).ok()?;
    Some(steps.into_iter().map(|Step { name, micros }| domain_slot::Step { name, micros }).collect())
}

pub(crate) fn write_changes(changes: &[domain::Change]) -> Value {
    let change = |domain::Change { field, before, after }: &domain::Change| Change {
        field: field.clone(),
        before: before.clone(),
        after: after.clone(),
    };
    serde_json::to_value(changes.iter().map(change).collect::<Vec<_>>()).unwrap_or_default()
}

pub(crate) fn read_changes(value: Value) -> Option<Vec<domain::Change>> {
    let changes: Vec<Change> = serde_json::from_value(value).ok()?;
    Some(changes.into_iter().map(|Change { field, before, after }| domain::Change { field, before, after }).collect())
}
