//! The node's side of the control plane: joining, the stream, what a node should have and what it says it has.

use std::collections::BTreeMap;

use clawhq_domain::ids::{InstanceId, NodeId, OrgId, SlotId, VolumeId, WorkloadId};
use clawhq_domain::names::EnvName;
use clawhq_domain::placement::{self, SLOTS_MAX};
use clawhq_domain::release::{Release, SecretTarget};
use clawhq_domain::slot::{Failure, FailureKind, SlotReport, SlotState};
use clawhq_domain::template::{Probe, Protocol, Template, Tmpfs, WarmMode, WarmUp};
use clawhq_domain::{Millis, Reason};
use clawhq_runtime::ids::mint;
use clawhq_sealing::Plaintext;
use clawhq_store as store;
use clawhq_store::{TokenHash, UnreadableSlot};
use serde_json::json;
use zeroize::Zeroizing;

use crate::accounts::fresh_token;
use crate::ca;
use crate::hub::NodeInbox;
use crate::{App, Error, Result};

/// How long a join token may be used.
pub const JOIN_TOKEN_MS: Millis = 10 * 60 * 1000;
/// Beyond this a node counts as silent; what [`clawhq_domain::lifecycle::NODE_SILENT_MS`] says, granted with each heartbeat.
const HEARD_FOR_MS: Millis = clawhq_domain::lifecycle::NODE_SILENT_MS;

/// What a node says of itself.
#[derive(Clone, Debug)]
pub struct NodeFacts {
    pub hostname: String,
    pub cpu_millis: u32,
    pub memory_mib: u64,
    pub disk_free_mib: u64,
    pub agent_version: String,
    pub runtime_version: String,
    /// Where the edge reaches its ingress: `unix:/path` or `tcp:host:port`.
    pub ingress: String,
    pub firewall_ready: bool,
}

pub struct Enrolled {
    pub node: NodeId,
    pub certificate_pem: String,
    pub ca_pem: String,
    pub not_after: Millis,
}

/// A stream that was opened. Every call about the node carries its epoch; an older one is refused.
pub struct Link {
    pub epoch: i64,
    pub inbox: NodeInbox,
}

#[derive(Clone, Copy, Debug)]
pub struct Heartbeat {
    pub firewall_ready: bool,
    pub runtime_ready: bool,
    pub disk_free_mib: u64,
}

/// One slot as its node should have it, secrets opened. Not printable on purpose.
pub struct SlotDesired {
    pub slot: SlotId,
    pub generation: i64,
    pub present: bool,
    pub image: String,
    pub image_digest: Option<String>,
    pub memory_mib: u32,
    pub memory_burst_mib: u32,
    pub cpu_shares: u32,
    pub cpu_millis: u32,
    pub pids: u32,
    pub uid: u32,
    pub gid: u32,
    pub tmpfs: Vec<Tmpfs>,
    pub volume: Option<VolumeDesired>,
    pub hostname: String,
    pub warm_mode: WarmMode,
    pub template: Option<String>,
    pub tier: String,
    /// What a frozen or app slot starts with at pool time.
    pub pool_process: Option<Process>,
    pub claim: Option<Claim>,
}

/// The whole of it.
pub struct DesiredSet {
    pub slots: Vec<SlotDesired>,
    /// Said to be there, without what they are: something of them cannot be read or opened.
    pub unreadable: Vec<UnreadableSlot>,
    /// Used by no slot any more: to be destroyed.
    pub removed_volumes: Vec<VolumeId>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeDesired {
    pub volume: VolumeId,
    pub path: String,
    pub size_mib: u32,
}

pub struct Claim {
    pub instance: InstanceId,
    pub org: OrgId,
    pub workload: WorkloadId,
    pub workload_name: String,
    /// `None`: what runs in the slot already is what was asked for.
    pub process: Option<Process>,
    pub restart: u32,
    pub single_writer: bool,
    pub ports: Vec<u16>,
}

pub struct Process {
    pub argv: Vec<String>,
    pub env: BTreeMap<String, Zeroizing<String>>,
    pub working_dir: Option<String>,
    pub files: Vec<ProcessFile>,
    pub probe: Probe,
    /// Sent once it is ready, before it counts as ready; at pool time only.
    pub warm_up: Vec<WarmUp>,
    pub start_deadline_ms: u32,
    pub stop_deadline_ms: u32,
}

pub struct ProcessFile {
    pub path: String,
    pub mode: u32,
    pub content: Zeroizing<Vec<u8>>,
    pub secret: bool,
    pub only_if_absent: bool,
}

/// Credentials minted by the platform, by variable.
pub type Minted = BTreeMap<EnvName, Zeroizing<String>>;

/// Fresh ones for a slot of this template.
pub fn mint_credentials(template: &Template) -> Minted {
    template
        .minted
        .iter()
        .map(|wanted| {
            let bytes: Zeroizing<Vec<u8>> = Zeroizing::new((0..wanted.bytes).map(|_| rand::random::<u8>()).collect());
            (wanted.env.clone(), Zeroizing::new(data_encoding::BASE64URL_NOPAD.encode(&bytes)))
        })
        .collect()
}

/// As they are sealed: `NAME=value` lines; neither part can hold a line's end.
pub(crate) fn write_minted(minted: &Minted) -> Plaintext {
    let mut text = Zeroizing::new(String::new());
    for (name, value) in minted {
        text.push_str(name.as_str());
        text.push('=');
        text.push_str(value);
        text.push('\n');
    }
    Plaintext::new(text.as_bytes())
}

pub(crate) fn read_minted(plain: &Plaintext) -> Result<Minted> {
    let unreadable = || Error::Internal { what: "minted credentials", source: None };
    let text = std::str::from_utf8(plain.expose()).map_err(|_| unreadable())?;
    text.lines()
        .map(|line| {
            let (name, value) = line.split_once('=').ok_or_else(unreadable)?;
            let name = EnvName::parse(name).map_err(|_| unreadable())?;
            Ok((name, Zeroizing::new(value.to_owned())))
        })
        .collect()
}

/// A secret that a release reads, opened.
pub struct OpenSecret {
    pub target: SecretTarget,
    pub value: Plaintext,
}

/// Makes the process of a release: the template's, the tenant's config over it, then what the platform adds.
pub fn process(
    release: &Release,
    template: Option<&Template>,
    workload: Option<&str>,
    minted: &Minted,
    secrets: Vec<OpenSecret>,
) -> Process {
    let mut env: BTreeMap<String, Zeroizing<String>> = BTreeMap::new();
    let mut put = |name: &str, value: &str| {
        env.insert(name.to_owned(), Zeroizing::new(value.to_owned()));
    };
    put("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
    if let Some(port) = release.ports.iter().find(|port| port.protocol == Protocol::Http) {
        put("PORT", &port.port.to_string());
    }
    if let Some(workload) = workload {
        put("CLAWHQ_WORKLOAD", workload);
    }
    minted.iter().for_each(|(name, value)| put(name.as_str(), value));
    release.env.iter().for_each(|(name, value)| put(name.as_str(), value));
    let mut files: Vec<ProcessFile> = Vec::new();
    for secret in secrets {
        match secret.target {
            SecretTarget::Env(name) => {
                let value = String::from_utf8_lossy(secret.value.expose()).into_owned();
                env.insert(name.as_str().to_owned(), Zeroizing::new(value));
            }
            SecretTarget::File(path) => files.push(ProcessFile {
                path,
                mode: 0o400,
                content: Zeroizing::new(secret.value.expose().to_vec()),
                secret: true,
                only_if_absent: false,
            }),
        }
    }
    files.extend(release.config.files.iter().map(|file| ProcessFile {
        path: file.path.clone(),
        mode: file.mode,
        content: Zeroizing::new(file.content.clone().into_bytes()),
        secret: false,
        only_if_absent: false,
    }));
    for file in template.into_iter().flat_map(|template| &template.files) {
        files.push(ProcessFile {
            path: file.path.clone(),
            mode: file.mode,
            content: Zeroizing::new(filled(&file.content, &env).into_bytes()),
            secret: false,
            only_if_absent: file.only_if_absent,
        });
    }
    Process {
        argv: release.argv.clone(),
        env,
        working_dir: release.working_dir.clone(),
        files,
        probe: release.probe.clone(),
        warm_up: Vec::new(),
        start_deadline_ms: release.start_deadline_ms,
        stop_deadline_ms: release.stop_deadline_ms,
    }
}

/// `{{NAME}}` becomes that variable's value, or nothing.
fn filled(content: &str, env: &BTreeMap<String, Zeroizing<String>>) -> String {
    let mut text = String::with_capacity(content.len());
    let mut rest = content;
    while let Some((before, after)) = rest.split_once("{{") {
        text.push_str(before);
        match after.split_once("}}") {
            Some((name, tail)) => {
                text.push_str(env.get(name.trim()).map_or("", |value| value.as_str()));
                rest = tail;
            }
            None => {
                text.push_str("{{");
                rest = after;
            }
        }
    }
    text.push_str(rest);
    text
}

fn facts(facts: &NodeFacts, ready: bool) -> store::NodeFacts {
    store::NodeFacts {
        capacity_mib: placement::capacity_mib(facts.memory_mib),
        slots_max: SLOTS_MAX,
        disk_free_mib: facts.disk_free_mib,
        ready,
        facts: json!({
            "hostname": facts.hostname,
            "cpu_millis": facts.cpu_millis,
            "memory_mib": facts.memory_mib,
            "agent_version": facts.agent_version,
            "runtime_version": facts.runtime_version,
            "ingress": facts.ingress,
        }),
    }
}

/// What a report means to the people of the org; `None`: not worth a line.
fn slot_event(report: &SlotReport) -> Option<store::SlotEvent> {
    let (kind, message) = match report.state {
        SlotState::Running if report.run <= 1 => ("instance.running", "It is running.".to_owned()),
        SlotState::Running => ("instance.running", format!("It is running again (start {}).", report.run)),
        SlotState::Restarting => ("instance.restarting", why(report, "It ended and is started again.")),
        SlotState::Failed | SlotState::Exited => ("instance.failed", why(report, "It failed.")),
        SlotState::Absent => ("instance.gone", "Its container is gone.".to_owned()),
        _ => return None,
    };
    let steps: Vec<_> = report.steps.iter().map(|step| json!({ "name": step.name, "micros": step.micros })).collect();
    let data = json!({
        "state": report.state.name(),
        "run": report.run,
        "steps": steps,
        "code": report.failure.as_ref().map(|failure| failure.kind.code()),
    });
    Some(store::SlotEvent { id: mint(), kind: kind.to_owned(), message, data })
}

fn why(report: &SlotReport, otherwise: &str) -> String {
    report.failure.as_ref().map_or_else(|| otherwise.to_owned(), |failure| failure.message.clone())
}

fn refused(what: &'static str) -> Error {
    Error::Refused(
        Reason::new("enrolment_refused", what).with_hint("Ask for a new join token: clawhq admin join-token."),
    )
}

impl App {
    /// Makes a node's row and the token it joins with, or a new token for a node that lost its certificate.
    pub async fn join_token(&self, name: &str) -> Result<(NodeId, String)> {
        let system = self.store().system(&self.system());
        let token = fresh_token();
        let hash = TokenHash::of(&token);
        if let Some(known) = system.nodes().by_name(name).await? {
            system.nodes().renew_join_token(known.id, &hash, JOIN_TOKEN_MS).await?;
            return Ok((known.id, token));
        }
        let node: NodeId = mint();
        let new = store::NewNode { id: node, name: name.to_owned(), join_token: hash, join_lifetime_ms: JOIN_TOKEN_MS };
        system.nodes().create(&new).await?;
        Ok((node, token))
    }

    /// A join token and a certificate request become a node with a certificate. The token is burnt by it.
    pub async fn enroll(&self, join_token: &str, csr_pem: &str, node_facts: &NodeFacts) -> Result<Enrolled> {
        let system = self.store().system(&self.system());
        let token = TokenHash::of(join_token);
        let unknown = || refused("The join token is unknown, used or too old.");
        let node = system.nodes().joining(&token).await?.ok_or_else(unknown)?;
        let signed = self
            .ca()
            .sign_node(node, csr_pem, self.now())
            .map_err(|_| refused("The certificate request cannot be read."))?;
        let life = signed.not_after - self.now();
        let enrolled = system.nodes().enrol(&token, &signed.fingerprint, life, &facts(node_facts, false)).await?;
        if enrolled != Some(node) {
            return Err(unknown());
        }
        tracing::info!(node.id = %node, node.hostname = %node_facts.hostname, "a node joined");
        Ok(Enrolled {
            node,
            certificate_pem: signed.pem,
            ca_pem: self.ca().pem().to_owned(),
            not_after: signed.not_after,
        })
    }

    /// A new certificate for a node that speaks with its still valid one.
    pub async fn renew_certificate(&self, node: NodeId, csr_pem: &str) -> Result<Enrolled> {
        let signed = self
            .ca()
            .sign_node(node, csr_pem, self.now())
            .map_err(|_| refused("The certificate request cannot be read."))?;
        let life = signed.not_after - self.now();
        self.store().system(&self.system()).nodes().renew_certificate(node, &signed.fingerprint, life).await?;
        Ok(Enrolled {
            node,
            certificate_pem: signed.pem,
            ca_pem: self.ca().pem().to_owned(),
            not_after: signed.not_after,
        })
    }

    /// Who speaks with this certificate. TLS has checked its chain and dates; here it must be the node's current one.
    pub async fn node_of_certificate(&self, der: &[u8]) -> Result<NodeId> {
        let named = ca::node_of(der).map_err(|_| Error::Unauthenticated)?;
        let row = self.store().system(&self.system()).nodes().by_certificate(&ca::fingerprint(der)).await?;
        match row {
            Some(node) if node.id == named => Ok(named),
            _ => Err(Error::Unauthenticated),
        }
    }

    /// A stream begins; an older one of the same node ends.
    pub async fn open_link(&self, node: NodeId, node_facts: &NodeFacts) -> Result<Link> {
        let nodes = self.store().system(&self.system()).nodes();
        let epoch = nodes.open_stream(node, &facts(node_facts, node_facts.firewall_ready), HEARD_FOR_MS).await?;
        let inbox = self.hub().attach(node, epoch);
        // There may be room now.
        self.hint_pool();
        Ok(Link { epoch, inbox })
    }

    pub fn close_link(&self, node: NodeId, epoch: i64) {
        self.hub().detach(node, epoch);
    }

    /// Everything the node should have; volumes to be destroyed come beside it.
    pub async fn desired_set(&self, node: NodeId) -> Result<DesiredSet> {
        let store::SlotsOfNode { slots: rows, mut unreadable, removed_volumes } =
            self.store().system(&self.system()).slots().of_node(node).await?;
        let mut slots = Vec::with_capacity(rows.len());
        for row in rows {
            let bare = UnreadableSlot { slot: row.slot, generation: row.generation, present: row.present };
            match self.open_slot(row) {
                Ok(slot) => slots.push(slot),
                // One tenant's trouble: the node's other containers must hear what is wanted of them all the same.
                Err(error) => {
                    let error: &(dyn std::error::Error + 'static) = &error;
                    tracing::error!(slot.id = %bare.slot, error, "a slot is left as it is: it cannot be opened");
                    unreadable.push(bare);
                }
            }
        }
        Ok(DesiredSet { slots, unreadable, removed_volumes })
    }

    /// What the node should know of these slots now.
    pub async fn desired(&self, node: NodeId, slots: &[SlotId]) -> Result<Vec<SlotDesired>> {
        let slots = self.store().system(&self.system()).slots().desired(slots).await?;
        slots.into_iter().filter(|slot| slot.node == node).map(|slot| self.open_slot(slot)).collect()
    }

    pub(crate) fn open_slot(&self, desired: store::SlotDesired) -> Result<SlotDesired> {
        let store::SlotDesired { slot, node: _, generation, present, spec, image_digest, minted, volume, claim } =
            desired;
        let store::SlotSpec { release, template, tier } = spec;
        let minted = match minted {
            Some(sealed) if present => read_minted(&self.0.keys.open_minted(slot, &sealed)?)?,
            _ => Minted::new(),
        };
        let runs_before_claim = matches!(release.warm_mode, WarmMode::Frozen | WarmMode::App);
        let volume = match (&release.state, volume) {
            (Some(state), Some((volume, size_mib))) => {
                Some(VolumeDesired { volume, path: state.path.clone(), size_mib })
            }
            _ => None,
        };
        // What an app keeps on its volume may name its host: the name lives as long as the volume.
        let name = volume.as_ref().map_or_else(|| slot.to_string(), |volume| volume.volume.to_string());
        let pool_process = (present && runs_before_claim && template.is_some()).then(|| Process {
            warm_up: template.iter().flat_map(|template| template.warm_up.clone()).collect(),
            ..process(&release, template.as_ref(), None, &minted, Vec::new())
        });
        let claim = match claim {
            Some(claim) if present => Some(self.open_claim(claim, template.as_ref(), &minted, runs_before_claim)?),
            _ => None,
        };
        Ok(SlotDesired {
            slot,
            generation,
            present,
            image: release.image.to_string(),
            image_digest: image_digest.or(release.image_digest),
            memory_mib: tier.memory_mib,
            memory_burst_mib: tier.memory_burst_mib,
            cpu_shares: tier.cpu_shares,
            cpu_millis: tier.cpu_millis,
            pids: tier.pids.max(release.least_pids),
            uid: release.uid,
            gid: release.gid,
            tmpfs: release.tmpfs,
            volume,
            hostname: format!("chq-{}", &name[name.len() - 12..]),
            warm_mode: release.warm_mode,
            template: release.template.map(|name| name.to_string()),
            tier: tier.name,
            pool_process,
            claim,
        })
    }

    fn open_claim(
        &self,
        claim: store::Claim,
        template: Option<&Template>,
        minted: &Minted,
        runs_before_claim: bool,
    ) -> Result<Claim> {
        let store::Claim { org, workload, workload_name, instance, release_id: _, release, restart, secrets, keys } =
            claim;
        let deks = keys.iter().map(|key| self.0.keys.unwrap(org, key)).collect::<Result<Vec<_>>>()?;
        let mut opened = Vec::with_capacity(release.config.secrets.len());
        for wanted in &release.config.secrets {
            let sealed = secrets
                .iter()
                .find(|sealed| sealed.name == wanted.secret && sealed.version == wanted.version)
                .ok_or(Error::NotFound("secret version"))?;
            let number =
                clawhq_sealing::key_number(&sealed.sealed).map_err(|error| Error::internal("secret", error))?;
            let dek = deks.iter().find(|dek| dek.id() == number).ok_or(Error::NotFound("data key"))?;
            let value = dek
                .open(sealed.id.as_u128(), sealed.version, crate::secrets::SECRET_PURPOSE, &sealed.sealed)
                .map_err(|error| Error::internal("secret", error))?;
            opened.push(OpenSecret { target: wanted.target.clone(), value });
        }
        let ports = release.ports.iter().filter(|port| port.protocol != Protocol::Udp).map(|port| port.port).collect();
        let as_it_is = runs_before_claim && release.fits_running_slot();
        Ok(Claim {
            instance,
            org,
            workload,
            single_writer: release.state.is_some(),
            process: (!as_it_is).then(|| process(&release, template, Some(workload_name.as_str()), minted, opened)),
            workload_name: workload_name.to_string(),
            restart,
            ports,
        })
    }

    /// Writes what a node reports. When it returns the report may be acknowledged, also when it was stale.
    pub async fn observe(&self, node: NodeId, epoch: i64, mut report: SlotReport) -> Result<()> {
        if matches!(report.state, SlotState::Failed | SlotState::Exited) && report.failure.is_none() {
            // As when the agent was killed between giving up and saying why. Without a reason it would count as no
            // failure, and be replaced again and again without a pause.
            report.failure = Some(Failure {
                kind: FailureKind::Runtime,
                message: "It failed, and its node does not know any more why.".to_owned(),
                exit: None,
                log_tail: Vec::new(),
            });
        }
        let event = report.instance.and_then(|_| slot_event(&report));
        let outcome = self.store().system(&self.system()).slots().observe(node, epoch, &report, event.as_ref()).await?;
        let store::ReportOutcome::Applied(observed) = outcome else {
            tracing::debug!(slot.id = %report.slot, node.id = %node, "a stale report");
            return Ok(());
        };
        if !observed.changed() {
            return Ok(());
        }
        match observed.owner {
            Some((org, workload, _)) => {
                self.changed(org, workload);
                if observed.woke {
                    self.hint_outbox();
                }
            }
            // A pool slot became ready, failed or went: the pool looks again.
            None => self.hint_pool(),
        }
        if observed.removed {
            self.hint_pool();
        }
        Ok(())
    }

    /// The node says that a volume is destroyed.
    pub async fn volume_removed(&self, node: NodeId, volume: VolumeId) -> Result<()> {
        self.store().system(&self.system()).volumes().removed(node, volume).await?;
        Ok(())
    }

    /// Wakes who waits for a workload, here and in other processes.
    pub(crate) fn changed(&self, org: OrgId, workload: WorkloadId) {
        self.waiters().wake(org, Some(workload));
        self.say(store::channel::INSTANCE, format!("{org} {workload}"));
    }

    /// Tells a slot's node that its row has changed, whichever process holds its stream.
    pub(crate) fn slot_changed(&self, node: NodeId, slot: SlotId) {
        self.hub().slot_changed(node, slot);
        if !self.hub().holds(node) {
            self.say(store::channel::NODE, format!("{node} {slot}"));
        }
    }

    /// Count and digest of what the node should have, to compare with its heartbeat.
    pub async fn nodes(&self) -> Result<Vec<store::Node>> {
        Ok(self.store().system(&self.system()).nodes().list().await?)
    }

    /// The lease it grants, in milliseconds; `Unauthenticated` when a newer stream exists or the node was disabled.
    pub async fn heartbeat(&self, node: NodeId, epoch: i64, beat: Heartbeat) -> Result<Millis> {
        let heartbeat = store::Heartbeat {
            disk_free_mib: beat.disk_free_mib,
            ready: beat.firewall_ready && beat.runtime_ready,
            lease_ms: HEARD_FOR_MS,
        };
        if !self.store().system(&self.system()).nodes().heartbeat(node, epoch, heartbeat).await? {
            return Err(Error::Unauthenticated);
        }
        Ok(self.config().lease_ms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn minted_credentials_read_back() {
        let mut minted = Minted::new();
        minted.insert(EnvName::parse("A").unwrap(), Zeroizing::new("x=y".to_owned()));
        minted.insert(EnvName::parse("B").unwrap(), Zeroizing::new("z".to_owned()));
        assert!(read_minted(&write_minted(&minted)).unwrap() == minted);
        assert!(read_minted(&Plaintext::new("no equals sign")).is_err());
    }

    #[test]
    fn files_are_filled_from_the_environment() {
        let mut env = BTreeMap::new();
        env.insert("TOKEN".to_owned(), Zeroizing::new("abc".to_owned()));
        assert_eq!(filled(r#"{"a":"{{TOKEN}}","b":"{{ NONE }}"}"#, &env), r#"{"a":"abc","b":""}"#);
        assert_eq!(filled("a {{ b", &env), "a {{ b");
    }
}
