//! Between what `app` speaks and what the API says. What comes in is parsed here, each field with its place.

use clawhq_api_types as api;
use clawhq_api_types::problem::ProblemCode;
use clawhq_api_types::time;
use clawhq_app::model;
use clawhq_app::workloads::{ConfigInput, CreateWorkload, SecretInput, Source, UpdateWorkload};
use clawhq_domain::Millis;
use clawhq_domain::access::Role;
use clawhq_domain::lifecycle::Shown;
use clawhq_domain::names::{EnvName, ImageRef, InvalidName, SecretName, TemplateName, WorkloadName};
use clawhq_domain::release::{Change, Config, FileSpec, SecretTarget};
use clawhq_domain::slot::{Exit, Failure, Step};
use clawhq_domain::template::{Port, Protocol, StateVolume, Template, WarmMode};
use clawhq_domain::tier::Tier;
use clawhq_domain::workload::{ClaimPolicy, Desired, PlacementKind};

use crate::problem::{Fail, Result};

// ---------------------------------------------------------------------------------------------------- outwards

pub fn role(role: Role) -> api::org::Role {
    match role {
        Role::Owner => api::org::Role::Owner,
        Role::Member => api::org::Role::Member,
    }
}

pub fn role_in(role: api::org::Role) -> Role {
    match role {
        api::org::Role::Owner => Role::Owner,
        api::org::Role::Member => Role::Member,
    }
}

pub fn user(user: model::User) -> api::account::User {
    api::account::User { id: user.id.to_string(), email: user.email }
}

pub fn membership(one: model::Membership) -> api::org::OrgMembership {
    api::org::OrgMembership {
        id: one.org.to_string(),
        slug: one.slug,
        name: one.name,
        role: role(one.role),
        tier: one.tier,
    }
}

pub fn me((person, orgs): (model::User, Vec<model::Membership>)) -> api::account::Me {
    api::account::Me { user: user(person), orgs: orgs.into_iter().map(membership).collect() }
}

pub fn session(one: model::SessionInfo) -> api::account::Session {
    api::account::Session {
        id: one.id.to_string(),
        created_at: time(one.created_at),
        last_seen_at: time(one.last_seen_at),
        expires_at: time(one.expires_at),
        user_agent: one.user_agent,
        ip: one.ip,
        current: one.current,
    }
}

pub fn org(org: model::Org, of_caller: Role) -> api::org::Org {
    api::org::Org {
        id: org.id.to_string(),
        slug: org.slug,
        name: org.name,
        role: role(of_caller),
        tier: org.tier,
        created_at: time(org.created_at),
    }
}

pub fn member(one: model::Member) -> api::org::Member {
    api::org::Member {
        user_id: one.user.to_string(),
        email: one.email,
        role: role(one.role),
        created_at: time(one.joined_at),
    }
}

pub fn api_key(key: model::ApiKey) -> api::org::ApiKey {
    api::org::ApiKey {
        id: key.id.to_string(),
        name: key.name,
        prefix: key.prefix,
        created_at: time(key.created_at),
        expires_at: key.expires_at.map(time),
        last_used_at: key.last_used_at.map(time),
    }
}

pub fn created_api_key(key: model::ApiKey, secret: String) -> api::org::CreatedApiKey {
    let api::org::ApiKey { id, name, prefix, created_at, expires_at, last_used_at } = api_key(key);
    api::org::CreatedApiKey { id, name, prefix, created_at, expires_at, last_used_at, key: secret }
}

pub fn secret(secret: model::Secret) -> api::secret::Secret {
    api::secret::Secret {
        name: secret.name,
        version: secret.latest_version,
        created_at: time(secret.created_at),
        updated_at: time(secret.updated_at),
    }
}

pub fn secret_version(one: model::SecretVersion) -> api::secret::SecretVersion {
    api::secret::SecretVersion {
        version: one.version,
        created_at: time(one.created_at),
        created_by: one.created_by.map(|id| id.to_string()),
    }
}

pub fn event(event: model::Event) -> api::event::Event {
    api::event::Event {
        id: event.id.to_string(),
        seq: event.seq,
        kind: event.kind,
        message: event.message,
        at: time(event.at),
        workload_id: event.workload.map(|id| id.to_string()),
        instance_id: event.instance.map(|id| id.to_string()),
        data: event.data,
    }
}

fn port(port: &Port) -> api::workload::Port {
    api::workload::Port {
        name: port.name.clone(),
        port: port.port,
        protocol: match port.protocol {
            Protocol::Http => api::workload::Protocol::Http,
            Protocol::Tcp => api::workload::Protocol::Tcp,
            Protocol::Udp => api::workload::Protocol::Udp,
        },
    }
}

fn volume(volume: &StateVolume) -> api::workload::Volume {
    api::workload::Volume { path: volume.path.clone(), size_mib: volume.size_mib }
}

pub fn template(template: &Template) -> api::catalogue::Template {
    api::catalogue::Template {
        name: template.name.to_string(),
        title: template.title.clone(),
        description: template.description.clone(),
        icon: template.icon.clone(),
        image: template.image.to_string(),
        warm_mode: match template.warm_mode {
            WarmMode::Exec => api::catalogue::WarmMode::Exec,
            WarmMode::App => api::catalogue::WarmMode::App,
            WarmMode::Frozen => api::catalogue::WarmMode::Frozen,
            WarmMode::None => api::catalogue::WarmMode::None,
        },
        least_memory_mib: template.least_memory_mib,
        ports: template.ports.iter().map(port).collect(),
        env: template.env.iter().map(|(name, value)| (name.to_string(), value.clone())).collect(),
        volume: template.state.as_ref().map(volume),
        config_schema: template.config_schema.as_deref().and_then(|text| serde_json::from_str(text).ok()),
        unavailable: template.unavailable.clone(),
    }
}

pub fn tier(tier: &Tier) -> api::catalogue::Tier {
    api::catalogue::Tier {
        name: tier.name.clone(),
        memory_mib: tier.memory_mib,
        memory_burst_mib: tier.memory_burst_mib,
        cpu_shares: tier.cpu_shares,
        cpu_millis: tier.cpu_millis,
        pids: tier.pids,
        max_workloads: tier.max_workloads,
        volume_mib: tier.volume_mib,
        rate_per_min: tier.rate_per_min,
    }
}

pub fn shown(shown: Shown) -> api::workload::State {
    use api::workload::State;
    match shown {
        Shown::Queued => State::Queued,
        Shown::Starting => State::Starting,
        Shown::Running => State::Running,
        Shown::Updating => State::Updating,
        Shown::Restarting => State::Restarting,
        Shown::Stopping => State::Stopping,
        Shown::Stopped => State::Stopped,
        Shown::Failed => State::Failed,
        Shown::Unreachable => State::Unreachable,
        Shown::Deleting => State::Deleting,
        Shown::Deleted => State::Deleted,
    }
}

pub fn shown_in(state: api::workload::State) -> Shown {
    use api::workload::State;
    match state {
        State::Queued => Shown::Queued,
        State::Starting => Shown::Starting,
        State::Running => Shown::Running,
        State::Updating => Shown::Updating,
        State::Restarting => Shown::Restarting,
        State::Stopping => Shown::Stopping,
        State::Stopped => Shown::Stopped,
        State::Failed => Shown::Failed,
        State::Unreachable => Shown::Unreachable,
        State::Deleting => Shown::Deleting,
        State::Deleted => Shown::Deleted,
    }
}

pub fn placement(kind: PlacementKind) -> api::workload::PlacementKind {
    match kind {
        PlacementKind::Warm => api::workload::PlacementKind::Warm,
        PlacementKind::Cold => api::workload::PlacementKind::Cold,
        PlacementKind::Queued => api::workload::PlacementKind::Queued,
    }
}

pub fn change(change: Change) -> api::workload::Change {
    api::workload::Change { field: change.field, before: change.before, after: change.after }
}

pub fn ms(micros: u64) -> f64 {
    micros as f64 / 1000.0
}

pub fn step(step: &Step) -> api::workload::Step {
    api::workload::Step { name: step.name.clone(), ms: ms(step.micros) }
}

fn config(config: &Config) -> api::workload::Config {
    api::workload::Config {
        env: config.env.iter().map(|(name, value)| (name.to_string(), value.clone())).collect(),
        secrets: config
            .secrets
            .iter()
            .map(|secret| {
                let (env, file) = match &secret.target {
                    SecretTarget::Env(name) => (Some(name.to_string()), None),
                    SecretTarget::File(path) => (None, Some(path.clone())),
                };
                api::workload::SecretRef { name: secret.secret.to_string(), env, file, version: Some(secret.version) }
            })
            .collect(),
        files: config
            .files
            .iter()
            .map(|file| api::workload::FileEntry {
                path: file.path.clone(),
                content: file.content.clone(),
                mode: Some(file.mode),
            })
            .collect(),
        argv: config.argv.clone(),
        ports: config.ports.as_ref().map(|ports| ports.iter().map(port).collect()),
        volume: config.volume.as_ref().map(volume),
        uid: config.uid,
    }
}

pub fn release(release: model::ReleaseInfo) -> api::workload::Release {
    api::workload::Release {
        id: release.id.to_string(),
        number: i64::from(release.number),
        image: api::workload::Image {
            r#ref: release.release.image.to_string(),
            digest: release.release.image_digest.clone(),
        },
        config: config(&release.release.config),
        created_at: time(release.created_at),
        created_by: release.created_by.map(|id| id.to_string()),
        diff: release.changes.into_iter().map(change).collect(),
    }
}

fn failure(failure: &Failure) -> api::workload::Reason {
    api::workload::Reason {
        code: failure.kind.code().to_owned(),
        message: failure.message.clone(),
        hint: Some(failure.kind.hint().to_owned()),
        log_tail: failure.log_tail.clone(),
    }
}

fn span(from: Millis, to: Option<Millis>) -> Option<f64> {
    to.map(|to| (to - from).max(0) as f64)
}

pub fn instance(one: model::Instance) -> api::workload::Instance {
    let exit = one.failure.as_ref().and_then(|failure| failure.exit.as_ref());
    api::workload::Instance {
        id: one.id.to_string(),
        workload_id: one.workload.to_string(),
        release_id: one.release.to_string(),
        placement: placement(one.placement),
        state: one.phase.name().to_owned(),
        reason: one.failure.as_ref().map(failure),
        queued_at: (one.placement == PlacementKind::Queued).then(|| time(one.created_at)),
        started_at: one.started_at.map(time),
        ready_at: one.ready_at.map(time),
        ended_at: one.ended_at.map(time),
        restarts: one.restarts,
        exit_code: match exit {
            Some(Exit::Code(code)) => Some(*code),
            // As a shell says it.
            Some(Exit::Signal(signal)) => Some(128 + signal),
            Some(Exit::OutOfMemory) => Some(137),
            None => None,
        },
        steps: one.steps.iter().map(step).collect(),
        total_ms: span(one.created_at, one.ready_at),
    }
}

fn queue(queue: model::Queue) -> api::workload::Queue {
    api::workload::Queue { position: queue.position, estimate_ms: queue.estimate_ms }
}

pub fn warm(claim: ClaimPolicy) -> api::workload::Warm {
    match claim {
        ClaimPolicy::Prefer => api::workload::Warm::Prefer,
        ClaimPolicy::Require => api::workload::Warm::Require,
        ClaimPolicy::Never => api::workload::Warm::Never,
    }
}

fn warm_in(warm: api::workload::Warm) -> ClaimPolicy {
    match warm {
        api::workload::Warm::Prefer => ClaimPolicy::Prefer,
        api::workload::Warm::Require => ClaimPolicy::Require,
        api::workload::Warm::Never => ClaimPolicy::Never,
    }
}

pub fn workload(one: model::Workload) -> api::workload::Workload {
    let log_tail = one.log_tail;
    api::workload::Workload {
        id: one.id.to_string(),
        name: one.name,
        org_id: one.org.to_string(),
        template: one.template,
        image: api::workload::Image { r#ref: one.image, digest: one.image_digest },
        tier: one.tier,
        state: shown(one.shown),
        reason: one.reason.map(|reason| api::workload::Reason {
            code: reason.code.to_owned(),
            message: reason.message,
            hint: reason.hint,
            log_tail,
        }),
        desired: match one.desired {
            Desired::Running => api::workload::Desired::Running,
            Desired::Stopped => api::workload::Desired::Stopped,
            Desired::Deleted => api::workload::Desired::Deleted,
        },
        url: one.url,
        warm: warm(one.claim),
        release: release(one.release),
        instance: one.instance.map(instance),
        queue: one.queue.map(queue),
        resource_version: one.version.to_string(),
        created_at: time(one.created_at),
        updated_at: time(one.updated_at),
    }
}

pub fn page<A, B>(page: model::Page<A>, map: impl FnMut(A) -> B) -> api::Page<B> {
    api::Page { items: page.items.into_iter().map(map).collect(), next_cursor: page.next_cursor }
}

// ---------------------------------------------------------------------------------------------------- inwards

/// A name's refusal with its place.
pub fn named<T>(parsed: std::result::Result<T, InvalidName>, code: ProblemCode, pointer: &str) -> Result<T> {
    parsed.map_err(|why| {
        let name = pointer.rsplit('/').next().unwrap_or("value");
        Fail::new(code, format!("The {name} {why}.")).at(pointer, why.0)
    })
}

fn invalid(pointer: impl Into<String>, why: &'static str) -> Fail {
    Fail::new(ProblemCode::ConfigInvalid, format!("The config is not usable: {why}.")).at(pointer, why)
}

fn config_in(config: api::workload::Config) -> Result<ConfigInput> {
    let api::workload::Config { env, secrets, files, argv, ports, volume, uid } = config;
    let escape = |name: &str| name.replace('~', "~0").replace('/', "~1");
    let env = env
        .into_iter()
        .map(|(name, value)| {
            let pointer = format!("/config/env/{}", escape(&name));
            Ok((named(EnvName::parse(&name), ProblemCode::ConfigInvalid, &pointer)?, value))
        })
        .collect::<Result<_>>()?;
    let secrets = secrets
        .into_iter()
        .enumerate()
        .map(|(at, one)| {
            let pointer = format!("/config/secrets/{at}");
            let code = ProblemCode::ConfigInvalid;
            let secret = named(SecretName::parse(&one.name), code, &format!("{pointer}/name"))?;
            let target = match (one.env, one.file) {
                (Some(_), Some(_)) => return Err(invalid(pointer, "env and file exclude each other")),
                (None, Some(file)) => SecretTarget::File(file),
                (env, None) => {
                    let env = env.as_deref().unwrap_or(secret.as_str());
                    SecretTarget::Env(named(EnvName::parse(env), code, &format!("{pointer}/env"))?)
                }
            };
            Ok(SecretInput { secret, target })
        })
        .collect::<Result<_>>()?;
    let ports = ports.map(|ports| {
        ports
            .into_iter()
            .enumerate()
            .map(|(at, one)| {
                let pointer = format!("/config/ports/{at}/name");
                let plain = one.name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
                if one.name.is_empty() || one.name.len() > 32 || !plain {
                    return Err(invalid(pointer, "must be 1 to 32 characters of a-z, 0-9 and hyphens"));
                }
                let protocol = match one.protocol {
                    api::workload::Protocol::Http => Protocol::Http,
                    api::workload::Protocol::Tcp => Protocol::Tcp,
                    api::workload::Protocol::Udp => Protocol::Udp,
                };
                Ok(Port { name: one.name, port: one.port, protocol })
            })
            .collect::<Result<_>>()
    });
    Ok(ConfigInput {
        env,
        secrets,
        files: files
            .into_iter()
            .map(|file| FileSpec { path: file.path, mode: file.mode.unwrap_or(0o644), content: file.content })
            .collect(),
        argv,
        ports: ports.transpose()?,
        volume: volume.map(|volume| StateVolume { path: volume.path, size_mib: volume.size_mib }),
        uid,
    })
}

fn image_in(text: &str) -> Result<ImageRef> {
    named(ImageRef::parse(text), ProblemCode::ImageInvalid, "/image")
}

pub fn create_in(ask: api::workload::CreateWorkload) -> Result<CreateWorkload> {
    let api::workload::CreateWorkload { name, template, image, tier, config, warm } = ask;
    let source = match (template, image) {
        (Some(template), None) => match TemplateName::parse(&template) {
            Ok(template) => Source::Template(template),
            // A name no template can have is one that there is not.
            Err(_) => {
                let detail = format!("There is no template named {}.", template.chars().take(40).collect::<String>());
                return Err(Fail::new(ProblemCode::TemplateUnknown, detail)
                    .hint("GET /v1/templates lists them.")
                    .at("/template", "must be the name of a template"));
            }
        },
        (None, Some(image)) => Source::Image(image_in(&image)?),
        (None, None) => {
            return Err(Fail::new(ProblemCode::InvalidBody, "Neither template nor image is given.")
                .at("/template", "give exactly one of template and image"));
        }
        (Some(_), Some(_)) => {
            return Err(Fail::new(ProblemCode::InvalidBody, "Both template and image are given.")
                .at("/image", "give exactly one of template and image"));
        }
    };
    let name = match name {
        Some(name) => Some(named(WorkloadName::parse(&name), ProblemCode::NameInvalid, "/name")?),
        None => None,
    };
    Ok(CreateWorkload { name, source, tier, config: config_in(config)?, claim: warm_in(warm) })
}

/// `current`: what stays when no config is given.
pub fn update_in(ask: api::workload::UpdateWorkload, current: impl FnOnce() -> ConfigInput) -> Result<UpdateWorkload> {
    let api::workload::UpdateWorkload { config, image, tier } = ask;
    Ok(UpdateWorkload {
        config: match config {
            Some(config) => config_in(config)?,
            None => current(),
        },
        image: image.as_deref().map(image_in).transpose()?,
        tier,
    })
}

/// A release's config as if it were asked for again.
pub fn same_config(config: &Config) -> ConfigInput {
    ConfigInput {
        env: config.env.clone(),
        secrets: config
            .secrets
            .iter()
            .map(|one| SecretInput { secret: one.secret.clone(), target: one.target.clone() })
            .collect(),
        files: config.files.clone(),
        argv: config.argv.clone(),
        ports: config.ports.clone(),
        volume: config.volume.clone(),
        uid: config.uid,
    }
}
