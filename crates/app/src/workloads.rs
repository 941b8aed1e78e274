//! Workloads: deploying, changing, starting, stopping, deleting and looking at them.

pub mod cursor;
mod present;

pub(crate) use present::serving;

use std::time::Duration;

use clawhq_domain::access::{Action, Noun};
use clawhq_domain::ids::{InstanceId, NodeId, ReleaseId, SlotId, WorkloadId};
use clawhq_domain::lifecycle::{self, Shown};
use clawhq_domain::names::{EnvName, ImageRef, TemplateName, WorkloadName};
use clawhq_domain::quota::{self, Ask, Usage};
use clawhq_domain::release::{self, Change as Difference, Config, FileSpec, Release, SecretRef, SecretTarget};
use clawhq_domain::slot::Step;
use clawhq_domain::template::{Port, StateVolume, Template, WarmMode};
use clawhq_domain::tier::Tier;
use clawhq_domain::workload::{ClaimPolicy, Desired, PlacementKind};
use clawhq_domain::{Reason, names::SecretName};
use clawhq_runtime::clock::Stopwatch;
use clawhq_runtime::ids::mint;
use clawhq_store::{
    Change, IdempotencyKey, NewEvent, NewInstance, NewRelease, NewWorkload, SlotSpec, StoredResponse, VolumeUse,
    WorkloadDetail, WorkloadFilter as Rows, WorkloadRef,
};
use serde_json::json;
use std::collections::BTreeMap;

use crate::caller::OrgContext;
use crate::model::{Deployed, Instance, Page, PageRequest, ReleaseInfo, Workload};
use crate::nodes::{Minted, mint_credentials, write_minted};
use crate::{App, Error, Result};

/// What a workload is made of.
#[derive(Clone, Debug)]
pub enum Source {
    Template(TemplateName),
    Image(ImageRef),
}

/// A tenant's config before secret versions are fixed: always the newest of each.
#[derive(Clone, Debug, Default)]
pub struct ConfigInput {
    pub env: BTreeMap<EnvName, String>,
    pub secrets: Vec<SecretInput>,
    pub files: Vec<FileSpec>,
    pub argv: Option<Vec<String>>,
    pub ports: Option<Vec<Port>>,
    pub volume: Option<StateVolume>,
    pub uid: Option<u32>,
}

#[derive(Clone, Debug)]
pub struct SecretInput {
    pub secret: SecretName,
    pub target: SecretTarget,
}

#[derive(Clone, Debug)]
pub struct CreateWorkload {
    /// `None`: made of the template's or image's name.
    pub name: Option<WorkloadName>,
    pub source: Source,
    /// `None`: the org's own.
    pub tier: Option<String>,
    pub config: ConfigInput,
    pub claim: ClaimPolicy,
}

/// The whole new config, not a patch of it.
#[derive(Clone, Debug)]
pub struct UpdateWorkload {
    pub config: ConfigInput,
    /// Image workloads only.
    pub image: Option<ImageRef>,
    pub tier: Option<String>,
}

#[derive(Clone, Debug, Default)]
pub struct WorkloadFilter {
    /// Empty: all.
    pub states: Vec<Shown>,
    pub template: Option<TemplateName>,
}

/// A container that can be talked to.
#[derive(Clone, Debug)]
pub struct Reach {
    pub workload: Workload,
    pub instance: InstanceId,
    pub slot: SlotId,
    pub node: NodeId,
}

/// Pages looked through at most when a list is filtered by a state, which is computed and not stored.
const FILTER_PAGES_MAX: usize = 20;
/// While a request waits, a row is looked at this often though nobody said that it has changed.
const LOOK_EVERY: Duration = Duration::from_secs(2);

impl App {
    // ------------------------------------------------------------------------------------------ looking

    pub(crate) async fn find_workload(&self, context: &OrgContext, workload: &str) -> Result<WorkloadDetail> {
        let reference = match (workload.parse::<WorkloadId>(), WorkloadName::parse(workload)) {
            (Ok(id), _) => WorkloadRef::Id(id),
            (_, Ok(name)) => WorkloadRef::Name(name),
            _ => return Err(Error::NotFound("workload")),
        };
        Ok(self.store().tenant(&context.scope).workloads().get(&reference).await?)
    }

    /// By id (a deleted one too) or by name.
    pub async fn workload(&self, context: &OrgContext, workload: &str) -> Result<Workload> {
        context.may(Action::Read, Noun::Workload)?;
        let detail = self.find_workload(context, workload).await?;
        Ok(self.present(context.org, &context.slug, detail))
    }

    /// Newest first.
    pub async fn workloads(
        &self,
        context: &OrgContext,
        filter: WorkloadFilter,
        page: PageRequest,
    ) -> Result<Page<Workload>> {
        context.may(Action::Read, Noun::Workload)?;
        let rows = self.store().tenant(&context.scope).workloads();
        let mut before = page.cursor.as_deref().map(cursor::read_id).transpose()?.map(WorkloadId::from_u128);
        let wanted = page.limit as usize;
        let mut items = Vec::new();
        for _ in 0..FILTER_PAGES_MAX {
            let limit = page.limit + 1;
            let query = Rows { template: filter.template.clone(), desired: None, before, limit };
            let found = rows.list(&query).await?;
            let more = found.len() > wanted;
            for detail in found.into_iter().take(wanted) {
                before = Some(detail.workload.id);
                let shown = self.present(context.org, &context.slug, detail);
                if filter.states.is_empty() || filter.states.contains(&shown.shown) {
                    items.push(shown);
                }
                if items.len() == wanted {
                    let next_cursor = before.map(|id| cursor::write_id(id.as_u128()));
                    return Ok(Page { items, next_cursor });
                }
            }
            if !more {
                return Ok(Page { items, next_cursor: None });
            }
        }
        let next_cursor = before.map(|id| cursor::write_id(id.as_u128()));
        Ok(Page { items, next_cursor })
    }

    pub async fn releases(&self, context: &OrgContext, workload: &str, page: PageRequest) -> Result<Page<ReleaseInfo>> {
        context.may(Action::Read, Noun::Workload)?;
        let found = self.find_workload(context, workload).await?;
        let before = page.cursor.as_deref().map(cursor::read_number).transpose()?;
        let before = before.map(|number| u32::try_from(number).map_err(|_| cursor::invalid())).transpose()?;
        let rows = self.store().tenant(&context.scope).workloads();
        let mut items = rows.releases(found.workload.id, before, page.limit + 1).await?;
        let more = items.len() > page.limit as usize;
        items.truncate(page.limit as usize);
        let next_cursor = items.last().filter(|_| more).map(|last| cursor::write_number(i64::from(last.number)));
        Ok(Page { items: items.into_iter().map(present::release).collect(), next_cursor })
    }

    /// Of one workload or of the whole org.
    pub async fn instances(
        &self,
        context: &OrgContext,
        workload: Option<&str>,
        page: PageRequest,
    ) -> Result<Page<Instance>> {
        context.may(Action::Read, Noun::Workload)?;
        let workload = match workload {
            Some(workload) => Some(self.find_workload(context, workload).await?.workload.id),
            None => None,
        };
        let before = page.cursor.as_deref().map(cursor::read_id).transpose()?.map(InstanceId::from_u128);
        let rows = self.store().tenant(&context.scope).workloads();
        let mut items = rows.instances(workload, before, page.limit + 1).await?;
        let more = items.len() > page.limit as usize;
        items.truncate(page.limit as usize);
        let next_cursor = items.last().filter(|_| more).map(|last| cursor::write_id(last.id.as_u128()));
        Ok(Page { items: items.into_iter().map(present::instance).collect(), next_cursor })
    }

    /// Waits until it shows this state, or the time is over: then its state at that time.
    pub async fn wait_workload(
        &self,
        context: &OrgContext,
        workload: &str,
        state: Shown,
        timeout: Duration,
    ) -> Result<Workload> {
        context.may(Action::Read, Noun::Workload)?;
        let id = self.find_workload(context, workload).await?.workload.id;
        let detail = self
            .wait_until(context, id, timeout, |detail| {
                lifecycle::shown(&detail.view(), detail.workload.deleted_at.is_some()).0 == state
            })
            .await?;
        Ok(self.present(context.org, &context.slug, detail))
    }

    /// The row when `done` says so, or at the deadline.
    async fn wait_until(
        &self,
        context: &OrgContext,
        workload: WorkloadId,
        timeout: Duration,
        done: impl Fn(&WorkloadDetail) -> bool,
    ) -> Result<WorkloadDetail> {
        let deadline = tokio::time::Instant::now() + timeout;
        // Before the first look: a change in between is then a change after it.
        let mut changes = self.waiters().workload(workload);
        let rows = self.store().system(&self.system()).workloads();
        loop {
            changes.borrow_and_update();
            match rows.of(&context.scope, workload).await {
                Ok(detail) if done(&detail) => return Ok(detail),
                Ok(_) => {}
                // What is waited for goes on while the database is away.
                Err(clawhq_store::StoreError::Unavailable(_)) if tokio::time::Instant::now() < deadline => {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
                Err(error) => return Err(error.into()),
            }
            // A silent node and a lost notification are only seen by looking.
            let look = (tokio::time::Instant::now() + LOOK_EVERY).min(deadline);
            tokio::select! {
                _ = changes.changed() => {}
                () = tokio::time::sleep_until(look) => {}
            }
            if tokio::time::Instant::now() >= deadline {
                return Ok(rows.of(&context.scope, workload).await?);
            }
        }
    }

    /// The container to enter or to read from.
    pub async fn reach(&self, context: &OrgContext, workload: &str) -> Result<Reach> {
        context.may(Action::Enter, Noun::Workload)?;
        let detail = self.find_workload(context, workload).await?;
        let serving = present::serving(&detail).filter(|instance| instance.ended_at.is_none());
        let place = serving.and_then(|instance| Some((instance.id, instance.slot?, instance.node?)));
        let workload = self.present(context.org, &context.slug, detail);
        match place {
            Some((instance, slot, node)) => Ok(Reach { workload, instance, slot, node }),
            None => Err(Error::NotRunning { state: workload.shown.name() }),
        }
    }

    // ------------------------------------------------------------------------------------------ making

    /// Secret versions are fixed now: the newest of each name.
    async fn fix_secrets(&self, context: &OrgContext, input: ConfigInput) -> Result<Config> {
        let ConfigInput { env, secrets, files, argv, ports, volume, uid } = input;
        let names: Vec<_> = secrets.iter().map(|wanted| &wanted.secret).collect();
        let known = if names.is_empty() {
            BTreeMap::new()
        } else {
            self.store().tenant(&context.scope).secrets().newest(&names).await?
        };
        let mut bytes = 0;
        let fixed = secrets
            .into_iter()
            .enumerate()
            .map(|(at, wanted)| {
                let (version, size) = *known.get(&wanted.secret).ok_or_else(|| {
                    let why = format!("There is no secret named {}.", wanted.secret);
                    let reason = Reason::new("secret_unknown", why).with_hint("Set it first, then refer to it.");
                    Error::invalid(format!("/config/secrets/{at}/name"), reason)
                })?;
                bytes += size;
                Ok(SecretRef { secret: wanted.secret, version, target: wanted.target })
            })
            .collect::<Result<_>>()?;
        if bytes > release::limits::SECRETS_BYTES {
            let why = format!("The secrets have {bytes} bytes together, more than a process can be given.");
            let hint = format!("{} bytes in all at most; put large data on a volume.", release::limits::SECRETS_BYTES);
            return Err(Error::invalid("/config/secrets", Reason::new("config_invalid", why).with_hint(hint)));
        }
        Ok(Config { env, secrets: fixed, files, argv, ports, volume, uid })
    }

    fn release_of(template: Option<&Template>, image: Option<ImageRef>, config: Config) -> Result<Release> {
        let made = match (template, image) {
            (Some(template), _) => {
                if let Some(why) = &template.unavailable {
                    return Err(Error::Refused(Reason::new("template_unavailable", why.clone())));
                }
                release::from_template(template, config)
            }
            (None, Some(image)) => release::from_image(image, config),
            (None, None) => return Err(Error::NotFound("template")),
        };
        made.map_err(|flaw| Error::invalid(format!("/config{}", flaw.at), flaw.reason))
    }

    /// The tier it runs in, and whether its volume may be that large.
    async fn tier_of(&self, context: &OrgContext, asked: Option<&str>, release: &Release) -> Result<Tier> {
        let tiers = self.tiers().await?;
        let refused = |reason| match asked {
            Some(_) => Error::invalid("/tier", reason),
            None => Error::Refused(reason),
        };
        let tier = tiers.admit(&context.tier, asked, release.least_memory_mib).map_err(refused)?.clone();
        if let Some(state) = &release.state {
            quota::admit(Ask::Volume(state.size_mib), Usage::default(), &tier).map_err(Error::Refused)?;
        }
        Ok(tier)
    }

    /// What it would be, without making it.
    pub async fn plan_workload(&self, context: &OrgContext, ask: CreateWorkload) -> Result<(Release, Tier)> {
        context.may(Action::Create, Noun::Workload)?;
        let config = self.fix_secrets(context, ask.config).await?;
        let (template, image) = self.source(ask.source).await?;
        let release = Self::release_of(template.as_ref(), image, config)?;
        let tier = self.tier_of(context, ask.tier.as_deref(), &release).await?;
        Ok((release, tier))
    }

    async fn source(&self, source: Source) -> Result<(Option<Template>, Option<ImageRef>)> {
        match source {
            Source::Template(name) => match self.template(&name).await {
                Ok(template) => Ok((Some(template), None)),
                Err(Error::NotFound(_)) => {
                    let reason = Reason::new("template_unknown", format!("There is no template named {name}."))
                        .with_hint("GET /v1/templates lists them.");
                    Err(Error::invalid("/template", reason))
                }
                Err(other) => Err(other),
            },
            Source::Image(image) => Ok((None, Some(image))),
        }
    }

    #[allow(clippy::too_many_arguments)]
    /// All that placing an instance of a release needs. `minted`: the workload's credentials, fresh ones if it has none.
    pub(crate) fn new_instance(
        &self,
        id: InstanceId,
        release: &Release,
        template: Option<Template>,
        tier: &Tier,
        claim: ClaimPolicy,
        volume: VolumeUse,
        minted: Option<&Minted>,
    ) -> NewInstance {
        let slot: SlotId = mint();
        // Credentials that people have been told must stay: a warm slot would bring others.
        let keeps = minted.is_some_and(|minted| !minted.is_empty());
        let pool = template
            .as_ref()
            .filter(|_| release.fits_template_slot() && !keeps)
            .and_then(|template| SlotSpec::of_pool(template, tier).ok());
        let fresh = template.as_ref().map(mint_credentials).unwrap_or_default();
        let minted = minted.filter(|minted| !minted.is_empty()).unwrap_or(&fresh);
        // A container made for one instance starts nothing before its claim, whatever the pool's do.
        let cold = Release { warm_mode: WarmMode::None, ..release.clone() };
        NewInstance {
            id,
            claim,
            pool,
            slot,
            spec: SlotSpec { release: cold, template, tier: tier.clone() },
            minted: (!minted.is_empty()).then(|| self.0.keys.seal_minted(slot, &write_minted(minted))),
            volume,
        }
    }

    /// Deploys: one transaction, then word to the node. `wait`: until it runs or has failed, at most this long.
    pub async fn create_workload(
        &self,
        context: &OrgContext,
        ask: CreateWorkload,
        idempotency: Option<IdempotencyKey>,
        wait: Option<Duration>,
    ) -> Result<Deployed> {
        context.may(Action::Create, Noun::Workload)?;
        let mut watch = Stopwatch::start();
        let total = watch;
        let CreateWorkload { name, source, tier, config, claim } = ask;
        let config = self.fix_secrets(context, config).await?;
        let (template, image) = self.source(source).await?;
        let release = Self::release_of(template.as_ref(), image, config)?;
        let tier = self.tier_of(context, tier.as_deref(), &release).await?;
        let org_tier = self.tiers().await?.get(&context.tier).cloned().ok_or(Error::Unavailable("tier table"))?;
        let name = match name {
            Some(name) => name,
            None => default_name(&release)?,
        };
        let volume = if release.state.is_some() { VolumeUse::New(mint()) } else { VolumeUse::None };
        let (id, instance): (WorkloadId, InstanceId) = (mint(), mint());
        let data = json!({ "name": name.as_str(), "tier": tier.name, "image": release.image.as_str() });
        let change = Change {
            idempotency,
            events: vec![event(id, Some(instance), "workload.created", format!("{name} was created."), data.clone())],
            audit: Some(context.audit("workload.create", id.to_string(), data)),
            wakeups: Vec::new(),
        };
        let new = NewWorkload {
            id,
            name,
            instance: self.new_instance(instance, &release, template, &tier, claim, volume, None),
            release: NewRelease { id: mint(), release },
            created_by: context.user(),
            max_workloads: org_tier.max_workloads,
        };
        let admitted = micros(&mut watch);
        // From before it is there: whatever is reported of it is then a change that is seen.
        let changes = self.waiters().workload(id);
        let mut made = match self.store().tenant(&context.scope).workloads().create(&new, &change).await {
            Ok(made) => made,
            Err(error) => return self.replayed(context, error.into(), wait).await,
        };
        let committed = micros(&mut watch);
        let minted = self.after_placing(id, &mut made.placed)?;
        if let Some(minted) = minted.as_ref().filter(|minted| !minted.is_empty()) {
            self.keep_minted(context, id, minted).await?;
        }
        if matches!(made.placed.placement, clawhq_store::Placement::Warm { .. }) {
            self.hint_claimed();
        }
        let steps = vec![
            Step { name: "admit".to_owned(), micros: admitted },
            Step { name: "commit".to_owned(), micros: committed },
        ];
        let placement = made.placed.placement.kind();
        let token = minted.and_then(|minted| minted.into_values().next()).map(|token| token.as_str().to_owned());
        // What was just made neither runs nor has failed: nothing is to be looked at before something is reported.
        let wait = match wait {
            Some(wait) => Some(wait.saturating_sub(changes_within(changes, LOOK_EVERY.min(wait)).await)),
            None => None,
        };
        self.deployed(context, id, wait, settled(None, 0), Some(placement), steps, total, token).await
    }

    /// Tells the node, and opens the credentials that the slot came with.
    pub(crate) fn after_placing(
        &self,
        workload: WorkloadId,
        placed: &mut clawhq_store::Placed,
    ) -> Result<Option<Minted>> {
        let Some((slot, node)) = placed.slot else { return Ok(None) };
        // Where its node's stream ends in this process, it is told right away; another process has to read it.
        let told = placed.told.take().filter(|_| self.hub().holds(node));
        match told.map(|told| self.open_slot(*told)) {
            Some(Ok(desired)) => self.hub().claimed(node, Box::new(desired)),
            Some(Err(_)) | None => self.slot_changed(node, slot),
        }
        tracing::debug!(workload.id = %workload, slot.id = %slot, placement = placed.placement.kind().name(), "placed");
        placed
            .minted
            .as_deref()
            .map(|sealed| crate::nodes::read_minted(&self.0.keys.open_minted(slot, sealed)?))
            .transpose()
    }

    /// Tells the nodes of those that have a container and have not begun: between a claim's commit and its notice a process
    /// can end, a caller hang up or a stream move.
    pub(crate) fn tell_again(&self, detail: &WorkloadDetail) {
        for instance in detail.instances.iter().filter(|instance| instance.ended_at.is_none()) {
            if let (true, Some(slot), Some(node)) = (instance.observed.is_ready(), instance.slot, instance.node) {
                self.slot_changed(node, slot);
            }
        }
    }

    #[allow(clippy::too_many_arguments)]
    async fn deployed(
        &self,
        context: &OrgContext,
        workload: WorkloadId,
        wait: Option<Duration>,
        done: impl Fn(&WorkloadDetail) -> bool,
        placement: Option<PlacementKind>,
        mut steps: Vec<Step>,
        total: Stopwatch,
        access_token: Option<String>,
    ) -> Result<Deployed> {
        let detail = match wait {
            Some(wait) => self.wait_until(context, workload, wait, done).await?,
            None => self.store().tenant(&context.scope).workloads().get(&WorkloadRef::Id(workload)).await?,
        };
        let workload = self.present(context.org, &context.slug, detail);
        if let Some(instance) = &workload.instance {
            steps.extend(instance.steps.iter().cloned());
        }
        let placement = placement.or(workload.instance.as_ref().map(|instance| instance.placement));
        let total_micros = (total.ms() * 1000.0) as u64;
        Ok(Deployed { workload, placement, steps, total_micros, access_token, replayed: false })
    }

    /// A key whose answer was never stored: what it made is described anew. Whoever made it may not have come to tell its
    /// node.
    async fn replayed(&self, context: &OrgContext, error: Error, wait: Option<Duration>) -> Result<Deployed> {
        let Error::Unanswered { effect } = error else { return Err(error) };
        let workload = WorkloadId::from_u128(effect);
        self.tell_again(&self.store().tenant(&context.scope).workloads().get(&WorkloadRef::Id(workload)).await?);
        let made = self
            .deployed(context, workload, wait, settled(None, 0), None, Vec::new(), Stopwatch::start(), None)
            .await?;
        Ok(Deployed { replayed: true, ..made })
    }

    // ------------------------------------------------------------------------------------------ changing

    async fn revised(
        &self,
        context: &OrgContext,
        detail: &WorkloadDetail,
        ask: UpdateWorkload,
    ) -> Result<(Release, Tier)> {
        let config = self.fix_secrets(context, ask.config).await?;
        let (template, image) = match &detail.workload.template {
            Some(_) if ask.image.is_some() => {
                let reason = Reason::new("config_invalid", "A template fixes its image.").with_hint("Leave out image.");
                return Err(Error::invalid("/image", reason));
            }
            Some(name) => (Some(self.template(name).await?), None),
            None => (None, Some(ask.image.unwrap_or_else(|| detail.workload.image.clone()))),
        };
        let mut release = Self::release_of(template.as_ref(), image, config)?;
        let before = &detail.release.release;
        // The same reference means the same image until a person names another.
        if release.image == before.image {
            release.image_digest.clone_from(&before.image_digest);
        }
        match (&before.state, &release.state) {
            (Some(old), Some(new)) if old.size_mib != new.size_mib => {
                let reason = Reason::new("config_invalid", "A volume keeps the size it was made with.")
                    .with_hint("Deploy a new workload to have a larger one.");
                return Err(Error::invalid("/config/volume/size_mib", reason));
            }
            _ => {}
        }
        let asked = ask.tier.as_deref().unwrap_or(&detail.workload.tier);
        let tier = self.tier_of(context, Some(asked), &release).await?;
        Ok((release, tier))
    }

    /// What an update would change; secrets as names and versions.
    pub async fn diff_workload(
        &self,
        context: &OrgContext,
        workload: &str,
        ask: UpdateWorkload,
    ) -> Result<Vec<Difference>> {
        context.may(Action::Update, Noun::Workload)?;
        let detail = self.find_workload(context, workload).await?;
        let (release, tier) = self.revised(context, &detail, ask).await?;
        let mut changes = release::diff(&detail.release.release, &release);
        if tier.name != detail.workload.tier {
            let before = Some(detail.workload.tier.clone());
            changes.push(Difference { field: "tier".to_owned(), before, after: Some(tier.name) });
        }
        Ok(changes)
    }

    /// A new release. What runs is replaced: the new instance first, unless a state volume allows only one.
    pub async fn update_workload(
        &self,
        context: &OrgContext,
        workload: &str,
        ask: UpdateWorkload,
        if_version: Option<i64>,
        idempotency: Option<IdempotencyKey>,
        wait: Option<Duration>,
    ) -> Result<Deployed> {
        context.may(Action::Update, Noun::Workload)?;
        let total = Stopwatch::start();
        let detail = self.find_workload(context, workload).await?;
        let (release, tier) = self.revised(context, &detail, ask).await?;
        let id = detail.workload.id;
        let release_id: ReleaseId = mint();
        let fields: Vec<_> =
            release::diff(&detail.release.release, &release).into_iter().map(|one| one.field).collect();
        let data = json!({ "changed": fields, "tier": tier.name });
        let change = Change {
            idempotency,
            events: vec![event(id, None, "workload.updated", "It has a new release.".to_owned(), data.clone())],
            audit: Some(context.audit("workload.update", id.to_string(), data)),
            wakeups: vec![clawhq_store::Wakeup::workload(context.org, id)],
        };
        let new = NewRelease { id: release_id, release };
        let rows = self.store().tenant(&context.scope).workloads();
        if let Err(error) = rows.revise(id, &new, &tier.name, if_version, context.user(), &change).await {
            return self.replayed(context, error.into(), wait).await;
        }
        self.moved(context, id).await;
        self.deployed(context, id, wait, settled(Some(release_id), 0), None, Vec::new(), total, None).await
    }

    /// After a committed change: act on it now, and let the job that was committed with it find the rest.
    async fn moved(&self, context: &OrgContext, workload: WorkloadId) {
        self.changed(context.org, workload);
        if let Err(error) = self.converge(context.org, workload).await {
            tracing::warn!(workload.id = %workload, "it will be looked at again by its job: {error}");
        }
        self.hint_outbox();
    }

    async fn want(
        &self,
        context: &OrgContext,
        workload: &str,
        desired: Desired,
        if_version: Option<i64>,
        idempotency: Option<IdempotencyKey>,
    ) -> Result<WorkloadId> {
        let id = self.find_workload(context, workload).await?.workload.id;
        let (kind, message, action) = match desired {
            Desired::Running => ("workload.started", "It was asked to start.", "workload.start"),
            Desired::Stopped => ("workload.stopped", "It was asked to stop.", "workload.stop"),
            Desired::Deleted => ("workload.deleting", "It was asked to go.", "workload.delete"),
        };
        let change = Change {
            idempotency,
            events: vec![event(id, None, kind, message.to_owned(), json!({}))],
            audit: Some(context.audit(action, id.to_string(), json!({}))),
            wakeups: vec![clawhq_store::Wakeup::workload(context.org, id)],
        };
        self.store().tenant(&context.scope).workloads().set_desired(id, desired, if_version, &change).await?;
        self.moved(context, id).await;
        Ok(id)
    }

    pub async fn start_workload(
        &self,
        context: &OrgContext,
        workload: &str,
        if_version: Option<i64>,
        idempotency: Option<IdempotencyKey>,
        wait: Option<Duration>,
    ) -> Result<Deployed> {
        context.may(Action::Update, Noun::Workload)?;
        let total = Stopwatch::start();
        match self.want(context, workload, Desired::Running, if_version, idempotency).await {
            Ok(id) => self.deployed(context, id, wait, settled(None, 0), None, Vec::new(), total, None).await,
            Err(error) => self.replayed(context, error, wait).await,
        }
    }

    pub async fn stop_workload(
        &self,
        context: &OrgContext,
        workload: &str,
        if_version: Option<i64>,
        idempotency: Option<IdempotencyKey>,
        wait: Option<Duration>,
    ) -> Result<Deployed> {
        context.may(Action::Update, Noun::Workload)?;
        let total = Stopwatch::start();
        let stopped = |detail: &WorkloadDetail| lifecycle::shown(&detail.view(), false).0 == Shown::Stopped;
        match self.want(context, workload, Desired::Stopped, if_version, idempotency).await {
            Ok(id) => self.deployed(context, id, wait, stopped, None, Vec::new(), total, None).await,
            Err(error) => self.replayed(context, error, wait).await,
        }
    }

    /// Always works: what cannot be taken away now is taken away as soon as its node answers.
    pub async fn delete_workload(
        &self,
        context: &OrgContext,
        workload: &str,
        if_version: Option<i64>,
        wait: Option<Duration>,
    ) -> Result<Deployed> {
        context.may(Action::Delete, Noun::Workload)?;
        let total = Stopwatch::start();
        let id = self.want(context, workload, Desired::Deleted, if_version, None).await?;
        let gone = |detail: &WorkloadDetail| detail.workload.deleted_at.is_some();
        self.deployed(context, id, wait, gone, None, Vec::new(), total, None).await
    }

    /// The process anew, in the container it has; a new container where there is none.
    pub async fn restart_workload(
        &self,
        context: &OrgContext,
        workload: &str,
        idempotency: Option<IdempotencyKey>,
        wait: Option<Duration>,
    ) -> Result<Deployed> {
        context.may(Action::Update, Noun::Workload)?;
        let total = Stopwatch::start();
        let detail = self.find_workload(context, workload).await?;
        if detail.workload.desired != Desired::Running {
            return Err(Error::NotRunning { state: detail.workload.desired.name() });
        }
        let id = detail.workload.id;
        let runs = present::serving(&detail).map_or(0, |instance| instance.run);
        let change = Change {
            idempotency,
            events: vec![event(id, None, "workload.restarted", "It was asked to restart.".to_owned(), json!({}))],
            audit: Some(context.audit("workload.restart", id.to_string(), json!({}))),
            wakeups: vec![clawhq_store::Wakeup::workload(context.org, id)],
        };
        match self.store().tenant(&context.scope).workloads().restart(id, &change).await {
            Ok(Some((slot, node))) => {
                self.slot_changed(node, slot);
                self.changed(context.org, id);
                self.hint_outbox();
                self.deployed(context, id, wait, settled(None, runs + 1), None, Vec::new(), total, None).await
            }
            // It has failed or is between containers: a new instance is what a restart means then.
            Ok(None) => {
                self.launch_anew(context, id).await?;
                self.deployed(context, id, wait, settled(None, 0), None, Vec::new(), total, None).await
            }
            Err(error) => self.replayed(context, error.into(), wait).await,
        }
    }

    /// Credentials that the platform minted for a workload, for those who may enter it. Each reading is audited.
    pub async fn access_token(&self, context: &OrgContext, workload: &str) -> Result<Option<String>> {
        context.may(Action::Enter, Noun::Workload)?;
        let detail = self.find_workload(context, workload).await?;
        let id = detail.workload.id;
        self.audit_entry(context, "workload.access_token", id.to_string(), json!({})).await?;
        let minted = self.kept_minted(&context.scope, id).await?;
        Ok(minted.into_values().next().map(|token| token.as_str().to_owned()))
    }

    /// Keeps the answer to a request, so that a repeat hears the same.
    pub async fn store_response(
        &self,
        context: &OrgContext,
        key: &IdempotencyKey,
        response: &StoredResponse,
    ) -> Result<()> {
        Ok(self.store().tenant(&context.scope).idempotency().answer(key, response).await?)
    }
}

/// Until the first change, at most `most`; returns how long it was.
async fn changes_within(mut changes: tokio::sync::watch::Receiver<u64>, most: Duration) -> Duration {
    let begun = tokio::time::Instant::now();
    let _ = tokio::time::timeout(most, changes.changed()).await;
    begun.elapsed()
}

/// Whether a deploy has come to an end that is worth answering: it runs (at least for the `runs`th time), or it failed.
fn settled(release: Option<ReleaseId>, runs: u32) -> impl Fn(&WorkloadDetail) -> bool {
    move |detail| {
        let (shown, _) = lifecycle::shown(&detail.view(), detail.workload.deleted_at.is_some());
        let fresh = present::serving(detail)
            .is_some_and(|one| one.run >= runs && release.is_none_or(|release| one.release == release));
        match shown {
            Shown::Running => fresh || release.is_some_and(|release| detail.newest_failed(release)),
            Shown::Failed | Shown::Deleted | Shown::Deleting | Shown::Stopped => true,
            _ => false,
        }
    }
}

trait Newest {
    fn newest_failed(&self, release: ReleaseId) -> bool;
}

impl Newest for WorkloadDetail {
    fn newest_failed(&self, release: ReleaseId) -> bool {
        self.instances.iter().find(|one| one.release == release).is_some_and(|one| one.failure.is_some())
    }
}

fn micros(watch: &mut Stopwatch) -> u64 {
    (watch.lap_ms() * 1000.0) as u64
}

pub(crate) fn event(
    workload: WorkloadId,
    instance: Option<InstanceId>,
    kind: &str,
    message: String,
    data: serde_json::Value,
) -> NewEvent {
    NewEvent { id: mint(), workload: Some(workload), instance, kind: kind.to_owned(), message, data }
}

/// `<what>-<5 random>`, such as `hello-k3x9q`.
fn default_name(release: &Release) -> Result<WorkloadName> {
    let what = match &release.template {
        Some(template) => template.to_string(),
        None => release
            .image
            .as_str()
            .split(['@', ':'])
            .next()
            .and_then(|path| path.rsplit('/').next())
            .unwrap_or("app")
            .to_owned(),
    };
    let mut plain: String = what
        .chars()
        .map(|c| if c.is_ascii_lowercase() || c.is_ascii_digit() { c } else { '-' })
        .take(30)
        .collect::<String>()
        .split('-')
        .filter(|part| !part.is_empty())
        .collect::<Vec<_>>()
        .join("-");
    if !plain.starts_with(|c: char| c.is_ascii_lowercase()) {
        plain.insert_str(0, "app");
    }
    const ALPHABET: &[u8] = b"23456789abcdefghjkmnpqrstuvwxyz";
    let tail: String = (0..5).map(|_| char::from(ALPHABET[rand::random_range(0..ALPHABET.len())])).collect();
    WorkloadName::parse(&format!("{plain}-{tail}"))
        .map_err(|why| Error::invalid("/name", Reason::new("name_invalid", why.0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_image_gives_a_name() {
        for image in ["alpine", "ghcr.example/Team/x:1".to_lowercase().as_str(), "a/b.c_d:2", "a/9lives"] {
            let image = ImageRef::parse(image).unwrap();
            let release = release::from_image(image, Config::default()).unwrap();
            assert!(default_name(&release).is_ok());
        }
    }
}
