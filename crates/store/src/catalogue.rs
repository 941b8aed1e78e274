//! Tiers and templates: data of the platform that everybody may read.

use std::collections::BTreeSet;

use clawhq_domain::names::TemplateName;
use clawhq_domain::template::Template;
use clawhq_domain::tier::{Tier, Tiers};
use sea_orm::{ConnectionTrait, EntityTrait, QueryOrder, Value};

use crate::entity::{template, tier};
use crate::error::{OrStore, Result, StoreError};
use crate::row::json;
use crate::tx::{in_transaction, reading, sql};
use crate::{Store, System, codec};

/// Reads a template as `templates/*.json` and its row write it; `None` when it is of another form.
pub fn template_from_json(value: serde_json::Value) -> Option<Template> {
    codec::read_template(value)
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CatalogueEntry {
    pub template: Template,
    /// Offered for new workloads; existing ones go on.
    pub enabled: bool,
    /// Order in the catalogue, least first.
    pub position: u32,
}

/// Everything in the catalogue.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CatalogueEntries {
    pub entries: Vec<CatalogueEntry>,
    /// Names of those of another form, as when a newer release wrote them.
    pub unreadable: BTreeSet<String>,
}

/// What a release of the platform ships.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewCatalogueEntry {
    pub template: Template,
    pub position: u32,
}

impl TryFrom<tier::Model> for Tier {
    type Error = StoreError;

    fn try_from(model: tier::Model) -> Result<Self> {
        let name = model.name.clone();
        let number = |value: i32, field: &'static str| {
            u32::try_from(value).map_err(|_| StoreError::corrupt("tiers", &name, field))
        };
        Ok(Self {
            memory_mib: number(model.memory_mib, "memory_mib")?,
            memory_burst_mib: number(model.memory_burst_mib, "memory_burst_mib")?,
            cpu_shares: number(model.cpu_shares, "cpu_shares")?,
            cpu_millis: number(model.cpu_millis, "cpu_millis")?,
            pids: number(model.pids, "pids")?,
            max_per_node: number(model.max_per_node, "max_per_node")?,
            warm_target: number(model.warm_target, "warm_target")?,
            rate_per_min: number(model.rate_per_min, "rate_per_min")?,
            max_workloads: number(model.max_workloads, "max_workloads")?,
            volume_mib: number(model.volume_mib, "volume_mib")?,
            name: model.name,
        })
    }
}

impl TryFrom<template::Model> for CatalogueEntry {
    type Error = StoreError;

    fn try_from(model: template::Model) -> Result<Self> {
        let corrupt = |field| StoreError::corrupt("templates", &model.name, field);
        let template = codec::read_template(model.spec.clone()).ok_or_else(|| corrupt("spec"))?;
        if template.name.as_str() != model.name {
            return Err(corrupt("name"));
        }
        let position = u32::try_from(model.position).map_err(|_| corrupt("position"))?;
        Ok(Self { template, enabled: model.enabled, position })
    }
}

impl Store {
    /// Least first.
    pub async fn tiers(&self) -> Result<Tiers> {
        let find = || tier::Entity::find().order_by_asc(tier::Column::Position);
        let models = reading!(self.pool, find().all(&self.system))?;
        models.into_iter().map(Tier::try_from).collect::<Result<_>>().map(Tiers)
    }

    /// The catalogue in its order, disabled ones included. One that cannot be read, as when a newer release wrote it, is
    /// only named: the others can still be deployed.
    pub async fn templates(&self) -> Result<CatalogueEntries> {
        let find =
            || template::Entity::find().order_by_asc(template::Column::Position).order_by_asc(template::Column::Name);
        let models = reading!(self.pool, find().all(&self.system))?;
        let mut all = CatalogueEntries::default();
        for model in models {
            let name = model.name.clone();
            match CatalogueEntry::try_from(model) {
                Ok(entry) => all.entries.push(entry),
                Err(_) => drop(all.unreadable.insert(name)),
            }
        }
        Ok(all)
    }

    pub async fn template(&self, name: &TemplateName) -> Result<Option<CatalogueEntry>> {
        let find = || template::Entity::find_by_id(name.as_str());
        let model = reading!(self.pool, find().one(&self.system))?;
        model.map(CatalogueEntry::try_from).transpose()
    }
}

impl System<'_> {
    /// Makes the catalogue what this release ships: entries are added or renewed, those not named are disabled.
    pub async fn publish_templates(self, entries: &[NewCatalogueEntry]) -> Result<()> {
        in_transaction!(self.store.begin(), |tx| {
            let upsert = "insert into templates (name, position, enabled, spec) values ($1, $2, true, $3)
                on conflict (name) do update set position = $2, enabled = true, spec = $3, updated_at = now()
                where (templates.position, templates.enabled, templates.spec) is distinct from ($2, true, $3)";
            for NewCatalogueEntry { template, position } in entries {
                let values = [
                    template.name.as_str().into(),
                    Value::from(*position as i32),
                    json(codec::write_template(template)),
                ];
                tx.execute_raw(sql(upsert, values)).await.or_store()?;
            }
            let names = entries.iter().map(|entry| entry.template.name.to_string()).collect();
            let disable = "update templates set enabled = false, updated_at = now()
                where enabled and name not in (select jsonb_array_elements_text($1))";
            tx.execute_raw(sql(disable, [json(names)])).await.or_store().map(drop)
        })
    }

    /// Puts an org on another tier: what runs stays as it is, what is made next has the new limits.
    pub async fn set_org_tier(self, slug: &str, tier: &str) -> Result<()> {
        in_transaction!(self.store.begin(), |tx| {
            let update = "update orgs set tier = t.name, version = version + 1, updated_at = now() from tiers t
                where orgs.slug = $1 and t.name = $2";
            let done = tx.execute_raw(sql(update, [slug.into(), tier.into()])).await.or_store()?;
            if done.rows_affected() == 1 { Ok(()) } else { Err(crate::StoreError::NotFound("org or tier")) }
        })
    }

    /// Changes one tier's row or adds it at the end.
    pub async fn put_tier(self, tier: &Tier) -> Result<()> {
        let upsert = "insert into tiers (name, position, memory_mib, memory_burst_mib, cpu_shares, cpu_millis, pids,
                max_per_node, warm_target, rate_per_min, max_workloads, volume_mib)
            values ($1, (select coalesce(max(position), 0) + 1 from tiers), $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)
            on conflict (name) do update set memory_mib = $2, memory_burst_mib = $3, cpu_shares = $4, cpu_millis = $5,
                pids = $6, max_per_node = $7, warm_target = $8, rate_per_min = $9, max_workloads = $10, volume_mib = $11,
                updated_at = now()";
        let number = |value: u32| Value::from(value as i32);
        let values = [
            tier.name.as_str().into(),
            number(tier.memory_mib),
            number(tier.memory_burst_mib),
            number(tier.cpu_shares),
            number(tier.cpu_millis),
            number(tier.pids),
            number(tier.max_per_node),
            number(tier.warm_target),
            number(tier.rate_per_min),
            number(tier.max_workloads),
            number(tier.volume_mib),
        ];
        self.store.system.execute_raw(sql(upsert, values)).await.or_store().map(drop)
    }
}
