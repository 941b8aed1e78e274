//! What most tests begin with: an org with its owner, a node, ready slots, a workload to deploy.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, bail};
use clawhq_domain::ids::{InstanceId, NodeId, ReleaseId, SlotId, UserId, VolumeId, WorkloadId};
use clawhq_domain::names::{Email, ImageRef, OrgSlug, TemplateName, WorkloadName};
use clawhq_domain::release::{Config, from_template};
use clawhq_domain::slot::{SlotReport, SlotState};
use clawhq_domain::template::{Port, Probe, Protocol, StateVolume, Template, WarmMode};
use clawhq_domain::tier::Tier;
use clawhq_domain::workload::ClaimPolicy;
use clawhq_store::{
    Authenticated, Change, Credential, Deployed, Entry, NewAccount, NewInstance, NewNode, NewOrg, NewRelease,
    NewSession, NewWorkload, NodeFacts, OrgKey, OrgRef, ReportOutcome, SlotSpec, TenantScope, TokenHash, UserScope,
    VolumeUse, WarmOrder,
};

use crate::TestDb;

/// A fresh id of any kind.
pub fn mint<T: From<u128>>() -> T {
    T::from(uuid::Uuid::now_v7().as_u128())
}

/// A small pooled template.
pub fn hello() -> Template {
    Template {
        name: TemplateName::parse("hello").expect("a valid name"),
        title: "Hello".to_owned(),
        description: "Answers.".to_owned(),
        icon: "wave".to_owned(),
        image: ImageRef::parse("clawhq/hello:test").expect("a valid reference"),
        image_digest: None,
        argv: vec!["/hello".to_owned()],
        env: BTreeMap::new(),
        working_dir: None,
        uid: 10001,
        gid: 10001,
        ports: vec![Port { name: "http".to_owned(), port: 8080, protocol: Protocol::Http }],
        probe: Probe::Tcp { port: 8080 },
        start_deadline_ms: 10_000,
        stop_deadline_ms: 5_000,
        least_memory_mib: 16,
        least_pids: 8,
        warm_mode: WarmMode::Exec,
        warm_limit: None,
        warm_up: Vec::new(),
        state: None,
        tmpfs: Vec::new(),
        minted: Vec::new(),
        files: Vec::new(),
        config_schema: None,
        unavailable: None,
    }
}

/// An org, its owner, and the owner's session.
pub struct TestOrg {
    pub scope: TenantScope,
    pub user_scope: UserScope,
    pub user: UserId,
    pub slug: OrgSlug,
    pub email: Email,
    /// Of the session.
    pub token: String,
    pub entered: Authenticated,
}

pub struct TestNode {
    pub id: NodeId,
    pub epoch: i64,
}

/// A workload about to be created; change what the test is about.
pub struct Deploy {
    pub name: String,
    pub template: Template,
    pub tier: Tier,
    pub config: Config,
    pub claim: ClaimPolicy,
    pub change: Change,
    pub max_workloads: u32,
}

impl Deploy {
    pub fn new(name: &str, tier: &Tier) -> Self {
        Self {
            name: name.to_owned(),
            template: hello(),
            tier: tier.clone(),
            config: Config::default(),
            claim: ClaimPolicy::Prefer,
            change: Change::default(),
            max_workloads: 1_000_000,
        }
    }

    /// A further instance of the same release.
    pub fn instance(&self) -> Result<NewInstance> {
        let release = from_template(&self.template, self.config.clone()).map_err(|why| anyhow::anyhow!("{why:?}"))?;
        let pool = SlotSpec::of_pool(&self.template, &self.tier).map_err(|why| anyhow::anyhow!("{why:?}"))?;
        Ok(NewInstance {
            id: mint::<InstanceId>(),
            claim: self.claim,
            pool: release.fits_template_slot().then_some(pool),
            slot: mint::<SlotId>(),
            volume: match release.state {
                Some(_) => VolumeUse::New(mint::<VolumeId>()),
                None => VolumeUse::None,
            },
            spec: SlotSpec { release, template: Some(self.template.clone()), tier: self.tier.clone() },
            minted: None,
        })
    }

    pub fn build(&self) -> Result<NewWorkload> {
        let instance = self.instance()?;
        Ok(NewWorkload {
            id: mint::<WorkloadId>(),
            name: WorkloadName::parse(&self.name)?,
            release: NewRelease { id: mint::<ReleaseId>(), release: instance.spec.release.clone() },
            instance,
            created_by: None,
            max_workloads: self.max_workloads,
        })
    }
}

impl TestDb {
    /// Signs somebody up; `slug` names the org and the person.
    pub async fn org(&self, slug: &str, tier: &str) -> Result<TestOrg> {
        let token = format!("session-token-of-{slug}");
        let account = NewAccount {
            user: mint(),
            email: Email::parse(&format!("{slug}@example.org"))?,
            password_hash: "$argon2id$test".to_owned(),
            org: NewOrg {
                id: mint(),
                slug: OrgSlug::parse(slug)?,
                name: format!("Org {slug}"),
                tier: tier.to_owned(),
                key: OrgKey { dek_id: 1, kek_version: 1, sealed: vec![7; 60] },
            },
            session: NewSession {
                id: mint(),
                token: TokenHash::of(&token),
                lifetime_ms: 3_600_000,
                ip: None,
                user_agent: Some("test".to_owned()),
            },
        };
        let signed_in = self.store.accounts().sign_up(&account).await?;
        let credential = Credential::Session(TokenHash::of(&token));
        let entry = self.store.accounts().enter(&credential, &OrgRef::Slug(account.org.slug.clone())).await?;
        let Entry::Entered(entered) = entry else { bail!("the owner cannot enter: {entry:?}") };
        Ok(TestOrg {
            scope: entered.scope,
            user_scope: signed_in.scope,
            user: account.user,
            slug: account.org.slug,
            email: account.email,
            token,
            entered: *entered,
        })
    }

    pub async fn tier(&self, name: &str) -> Result<Tier> {
        self.store.tiers().await?.get(name).cloned().with_context(|| format!("no tier {name}"))
    }

    /// An enrolled node with an open stream and a lease of an hour.
    pub async fn node(&self, name: &str, capacity_mib: u32) -> Result<TestNode> {
        let token = TokenHash::of(&format!("join token of {name}"));
        let id = mint();
        let nodes = self.system().nodes();
        nodes.create(&NewNode { id, name: name.to_owned(), join_token: token, join_lifetime_ms: 60_000 }).await?;
        let facts = NodeFacts {
            capacity_mib,
            slots_max: 10_000,
            disk_free_mib: 100_000,
            ready: true,
            facts: serde_facts(name),
        };
        let mut fingerprint = [0; 32];
        fingerprint[..16].copy_from_slice(&mint::<u128>().to_be_bytes());
        let enrolled = nodes.enrol(&token, &fingerprint, 86_400_000, &facts).await?;
        anyhow::ensure!(enrolled == Some(id), "the node was not enrolled");
        let epoch = nodes.open_stream(id, &facts, 3_600_000).await?;
        Ok(TestNode { id, epoch })
    }

    /// Warm slots of a template, reported ready by their node.
    pub async fn ready_slots(
        &self,
        node: &TestNode,
        template: &Template,
        tier: &Tier,
        count: u32,
    ) -> Result<Vec<SlotId>> {
        let mut slots = Vec::new();
        for _ in 0..count {
            let order = WarmOrder {
                slot: mint(),
                spec: SlotSpec::of_pool(template, tier).map_err(|why| anyhow::anyhow!("{why:?}"))?,
                minted: None,
                volume: template.state.as_ref().map(|_: &StateVolume| mint()),
            };
            let placed = self.system().slots().order(&order).await?;
            anyhow::ensure!(placed == Ok(node.id), "the slot went elsewhere: {placed:?}");
            self.report(node, order.slot, 1, SlotState::Waiting).await?;
            slots.push(order.slot);
        }
        Ok(slots)
    }

    /// A node's report, without events.
    pub async fn report(
        &self,
        node: &TestNode,
        slot: SlotId,
        generation: i64,
        state: SlotState,
    ) -> Result<ReportOutcome> {
        let report = SlotReport {
            slot,
            generation,
            instance: None,
            state,
            run: 1,
            container: Some("c0ffee".to_owned()),
            image_digest: None,
            failure: None,
            steps: Vec::new(),
            at: 0,
        };
        Ok(self.system().slots().observe(node.id, node.epoch, &report, None).await?)
    }

    pub async fn deploy(&self, org: &TestOrg, deploy: &Deploy) -> Result<Deployed> {
        Ok(self.store.tenant(&org.scope).workloads().create(&deploy.build()?, &deploy.change).await?)
    }
}

fn serde_facts(name: &str) -> clawhq_store::Json {
    clawhq_store::Json::String(name.to_owned())
}
