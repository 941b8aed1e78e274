//! Bringing one workload nearer to what is wanted of it: read, let `domain::lifecycle` plan, do it.

use clawhq_domain::Millis;
use clawhq_domain::ids::{OrgId, WorkloadId};
use clawhq_domain::lifecycle::{self, Act};
use clawhq_domain::names::EnvName;
use clawhq_domain::workload::{ClaimPolicy, Desired, PlacementKind};
use clawhq_runtime::ids::mint;
use clawhq_sealing::Plaintext;
use clawhq_store::{Actor, Change, NewAudit, StoreError, TenantScope, VolumeUse, Wakeup, WorkloadDetail, WorkloadRef};
use serde_json::json;
use std::collections::BTreeMap;
use zeroize::Zeroizing;

use crate::caller::OrgContext;
use crate::nodes::{Minted, read_minted, write_minted};
use crate::workloads::event;
use crate::{App, Error, Result};

/// Looks at one workload in one call: each may find something new to do.
const ROUNDS_MAX: usize = 4;
/// Queued instances read at once, and how often in one pass: first come first.
const QUEUE_BATCH: u32 = 100;
const QUEUE_BATCHES_MAX: usize = 20;
/// Workloads a sweep wakes at once.
const UNSETTLED_BATCH: u32 = 500;
const MINTED_PURPOSE: &str = "minted";

impl App {
    /// Does what is to be done for a workload. `Some`: look again then, if nothing is reported before.
    pub async fn converge(&self, org: OrgId, workload: WorkloadId) -> Result<Option<Millis>> {
        let Some(scope) = self.store().system(&self.system()).workloads().scope(workload).await? else {
            return Ok(None);
        };
        if scope.org() != org {
            return Ok(None);
        }
        for _ in 0..ROUNDS_MAX {
            let detail = self.store().tenant(&scope).workloads().get(&WorkloadRef::Id(workload)).await?;
            if detail.workload.deleted_at.is_some() {
                return Ok(None);
            }
            let plan = lifecycle::converge(&detail.view(), self.now());
            if plan.acts.is_empty() {
                self.tell_again(&detail);
                return Ok(plan.wake_at);
            }
            for act in plan.acts {
                self.perform(&scope, &detail, act).await?;
            }
            self.changed(org, workload);
        }
        Ok(Some(self.now() + 1_000))
    }

    async fn perform(&self, scope: &TenantScope, detail: &WorkloadDetail, act: Act) -> Result<()> {
        let id = detail.workload.id;
        let rows = self.store().tenant(scope).workloads();
        match act {
            Act::Create => self.launch(scope, detail).await,
            Act::Leave { instance, why } => {
                let message = format!("Its container is taken away: {why}.");
                let change = Change {
                    events: vec![event(id, Some(instance), "instance.leaving", message, json!({ "why": why }))],
                    ..Change::default()
                };
                if let Some((slot, node)) = rows.leave(instance, &change).await? {
                    self.slot_changed(node, slot);
                }
                Ok(())
            }
            Act::Fail { instance, failure } => {
                let data = json!({ "code": failure.kind.code() });
                let change = Change {
                    events: vec![event(id, Some(instance), "instance.failed", failure.message.clone(), data)],
                    ..Change::default()
                };
                rows.fail(instance, &failure, &change).await?;
                Ok(())
            }
            Act::Finish => {
                let object = id.to_string();
                let name = detail.workload.name.as_str();
                let change = Change {
                    events: vec![event(id, None, "workload.deleted", format!("{name} is gone."), json!({}))],
                    audit: Some(NewAudit {
                        actor: Actor::System("worker"),
                        action: "workload.deleted",
                        object,
                        ip: None,
                        request: None,
                        detail: json!({ "name": name }),
                    }),
                    ..Change::default()
                };
                rows.finish(id, &change).await?;
                Ok(())
            }
        }
    }

    /// Another instance of the current release. Losing against another that did the same is fine.
    async fn launch(&self, scope: &TenantScope, detail: &WorkloadDetail) -> Result<()> {
        let row = &detail.workload;
        let new = self.instance_for(scope, detail, mint(), launch_claim(detail)).await?;
        let instance = new.id;
        let change = Change {
            events: vec![event(
                row.id,
                Some(instance),
                "instance.created",
                "A container is on its way.".to_owned(),
                json!({}),
            )],
            ..Change::default()
        };
        let rows = self.store().tenant(scope).workloads();
        match rows.launch(row.id, row.generation, row.release, &new, &change).await {
            Ok(mut made) => {
                let minted = self.after_placing(row.id, &mut made.placed)?;
                if let Some(minted) = minted.filter(|minted| !minted.is_empty()) {
                    self.write_minted_row(scope, row.id, &minted).await?;
                }
                if made.placed.placement.kind() == PlacementKind::Warm {
                    self.hint_claimed();
                }
                Ok(())
            }
            Err(StoreError::Conflict { .. } | StoreError::InUse(_)) => Ok(()),
            Err(other) => Err(other.into()),
        }
    }

    /// A restart of what has failed: the record of the failure stays, a new instance comes.
    pub(crate) async fn launch_anew(&self, context: &OrgContext, workload: WorkloadId) -> Result<()> {
        let detail = self.store().tenant(&context.scope).workloads().get(&WorkloadRef::Id(workload)).await?;
        if detail.workload.desired == Desired::Running {
            self.launch(&context.scope, &detail).await?;
            self.changed(context.org, workload);
            self.hint_outbox();
        }
        Ok(())
    }

    async fn instance_for(
        &self,
        scope: &TenantScope,
        detail: &WorkloadDetail,
        id: clawhq_domain::ids::InstanceId,
        claim: ClaimPolicy,
    ) -> Result<clawhq_store::NewInstance> {
        let row = &detail.workload;
        let release = &detail.release.release;
        let template = match &row.template {
            // A template that was withdrawn since still serves what was made from it.
            Some(name) => self.store().template(name).await?.map(|entry| entry.template),
            None => None,
        };
        let tier = self.tiers().await?.get(&row.tier).cloned().ok_or(Error::Unavailable("tier table"))?;
        let volume = match (&release.state, detail.volume) {
            (None, _) => VolumeUse::None,
            (Some(_), Some((volume, node))) => VolumeUse::Existing(volume, node),
            (Some(_), None) => VolumeUse::New(mint()),
        };
        let mints = template.as_ref().is_some_and(|template| !template.minted.is_empty());
        let minted = if mints { self.kept_minted(scope, row.id).await? } else { Minted::new() };
        Ok(self.new_instance(id, release, template, &tier, claim, volume, Some(&minted)))
    }

    /// Gives queued instances their containers, first come first; one that does not fit, or cannot be read, does not hold
    /// up the others.
    pub async fn place_queued(&self) -> Result<()> {
        let mut after = None;
        for _ in 0..QUEUE_BATCHES_MAX {
            let queued = self.store().system(&self.system()).instances().queued(after, QUEUE_BATCH).await?;
            for (scope, instance) in &queued {
                match self.place_one(scope, instance).await {
                    Ok(()) => {}
                    // Not this one's fault: the next turn is as good as the rest of this one.
                    Err(error @ Error::Unavailable("database")) => return Err(error),
                    Err(error) => {
                        tracing::error!(instance.id = %instance.id, "a queued instance cannot be placed: {error}");
                    }
                }
            }
            match queued.last() {
                Some((scope, last)) if queued.len() == QUEUE_BATCH as usize => after = Some((scope.org(), last.id)),
                _ => return Ok(()),
            }
        }
        Ok(())
    }

    async fn place_one(&self, scope: &TenantScope, instance: &clawhq_store::Instance) -> Result<()> {
        let rows = self.store().tenant(scope).workloads();
        let detail = rows.get(&WorkloadRef::Id(instance.workload)).await?;
        if detail.workload.release != instance.release || detail.workload.desired != Desired::Running {
            // It is about to leave the queue: nothing is to be made for it of what is wanted instead.
            return Ok(());
        }
        let claim = launch_claim(&detail);
        let new = self.instance_for(scope, &detail, instance.id, claim).await?;
        let message = "There is room: its container is on its way.".to_owned();
        let change = Change {
            events: vec![event(instance.workload, Some(instance.id), "instance.placed", message, json!({}))],
            ..Change::default()
        };
        match rows.place_queued(instance, &new, &change).await {
            Ok(mut placed) if placed.slot.is_some() => {
                let minted = self.after_placing(instance.workload, &mut placed)?;
                if let Some(minted) = minted.filter(|minted| !minted.is_empty()) {
                    self.write_minted_row(scope, instance.workload, &minted).await?;
                }
                self.changed(scope.org(), instance.workload);
                Ok(())
            }
            Ok(_) | Err(StoreError::Conflict { .. } | StoreError::InUse(_)) => Ok(()),
            Err(other) => Err(other.into()),
        }
    }

    /// Wakes workloads whose rows say that something is left to do: what a lost wake-up missed is found here.
    pub(crate) async fn wake_unsettled(&self) -> Result<()> {
        let system = self.store().system(&self.system());
        let mut after = None;
        loop {
            let found = system.workloads().unsettled(after, UNSETTLED_BATCH).await?;
            let Some(last) = found.last() else { return Ok(()) };
            after = Some(last.workload);
            let wakeups: Vec<_> = found.iter().map(|one| Wakeup::workload(one.scope.org(), one.workload)).collect();
            system.outbox().append(&wakeups).await?;
            self.hint_outbox();
            if found.len() < UNSETTLED_BATCH as usize {
                return Ok(());
            }
        }
    }

    // -------------------------------------------------------------------- credentials that outlive containers

    /// Keeps what was minted for a workload's first container, sealed with the org's key, for those that follow.
    pub(crate) async fn keep_minted(&self, context: &OrgContext, workload: WorkloadId, minted: &Minted) -> Result<()> {
        self.write_minted_row(&context.scope, workload, minted).await
    }

    async fn write_minted_row(&self, scope: &TenantScope, workload: WorkloadId, minted: &Minted) -> Result<()> {
        let dek = self.dek(scope).await?;
        let sealed = dek.seal(workload.as_u128(), 0, MINTED_PURPOSE, &write_minted(minted));
        Ok(self.store().tenant(scope).workloads().keep_minted(workload, &sealed).await?)
    }

    pub(crate) async fn kept_minted(&self, scope: &TenantScope, workload: WorkloadId) -> Result<Minted> {
        let Some(sealed) = self.store().tenant(scope).workloads().minted(workload).await? else {
            return self.minted_of_slot(scope, workload).await;
        };
        let number =
            clawhq_sealing::key_number(&sealed).map_err(|error| Error::internal("minted credentials", error))?;
        let keys = self.store().tenant(scope).org().keys().await?;
        let key = keys.iter().find(|key| key.dek_id == number).ok_or(Error::NotFound("data key"))?;
        let plain: Plaintext = self
            .0
            .keys
            .unwrap(scope.org(), key)?
            .open(workload.as_u128(), 0, MINTED_PURPOSE, &sealed)
            .map_err(|error| Error::internal("minted credentials", error))?;
        read_minted(&plain)
    }

    /// They come with the container and are kept in a second step: whoever died between the two left them to be kept by
    /// the next one who asks.
    async fn minted_of_slot(&self, scope: &TenantScope, workload: WorkloadId) -> Result<Minted> {
        let Some((slot, sealed)) = self.store().tenant(scope).workloads().minted_of_slot(workload).await? else {
            return Ok(BTreeMap::<EnvName, Zeroizing<String>>::new());
        };
        let minted = read_minted(&self.0.keys.open_minted(slot, &sealed)?)?;
        if !minted.is_empty() {
            self.write_minted_row(scope, workload, &minted).await?;
        }
        Ok(minted)
    }
}

/// What the tenant asked for at the deploy; "require" was about that one deploy and must not keep a restart waiting.
fn launch_claim(detail: &WorkloadDetail) -> ClaimPolicy {
    match detail.workload.claim {
        ClaimPolicy::Never => ClaimPolicy::Never,
        ClaimPolicy::Prefer | ClaimPolicy::Require => ClaimPolicy::Prefer,
    }
}
