//! Templates and tiers: rows that change rarely and are read with every deploy.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Instant;

use clawhq_domain::Millis;
use clawhq_domain::names::TemplateName;
use clawhq_domain::template::Template;
use clawhq_domain::tier::{Tier, Tiers};
use clawhq_store::{CatalogueEntries, NewCatalogueEntry};
use parking_lot::RwLock;

use crate::{App, Error, Result};

/// A kept catalogue older than this is read anew beside the request that finds it so;
const FRESH_MS: Millis = 1_000;
/// one older than this before it. An operator's change shows within this.
const STALE_MS: Millis = 3_000;

#[derive(Default)]
pub(crate) struct Cache {
    kept: RwLock<Option<Kept>>,
    /// Held while it is read: a burst of requests reads it once. When that failed last.
    reading: Arc<tokio::sync::Mutex<Option<Instant>>>,
}

#[derive(Clone)]
struct Kept {
    at: Millis,
    templates: Arc<Vec<Template>>,
    /// Names of those that a newer release wrote.
    unreadable: Arc<BTreeSet<String>>,
    tiers: Arc<Tiers>,
}

impl App {
    async fn catalogue(&self) -> Result<Kept> {
        let cache = &self.0.catalogue;
        // One from the future is from before the clock was set back.
        let fresh = |kept: &&Kept, most| (0..most).contains(&(self.now() - kept.at));
        let kept = |most: Millis| cache.kept.read().as_ref().filter(|kept| fresh(kept, most)).cloned();
        if let Some(fresh) = kept(FRESH_MS) {
            return Ok(fresh);
        }
        if let Some(stale) = kept(STALE_MS) {
            if let Ok(reading) = cache.reading.clone().try_lock_owned() {
                let app = self.clone();
                tokio::spawn(async move {
                    if let Err(error) = app.read_catalogue().await {
                        tracing::warn!("the catalogue could not be read anew: {error}");
                    }
                    drop(reading);
                });
            }
            return Ok(stale);
        }
        let came = Instant::now();
        let mut failed = cache.reading.lock().await;
        if let Some(fresh) = kept(FRESH_MS) {
            return Ok(fresh);
        }
        // Whoever waited through a failure has it: one after the other they would each wait for the database again.
        if failed.is_some_and(|failed| failed >= came) {
            return Err(Error::Unavailable("database"));
        }
        let read = self.read_catalogue().await;
        *failed = read.is_err().then(Instant::now);
        read
    }

    async fn read_catalogue(&self) -> Result<Kept> {
        // From before it is read: what changes meanwhile is not taken for fresh.
        let now = self.now();
        let (CatalogueEntries { entries, unreadable }, tiers) =
            tokio::try_join!(self.store().templates(), self.store().tiers())?;
        let templates = entries.into_iter().filter(|entry| entry.enabled).map(|entry| entry.template).collect();
        let kept =
            Kept { at: now, templates: Arc::new(templates), unreadable: Arc::new(unreadable), tiers: Arc::new(tiers) };
        let before = self.0.catalogue.kept.write().replace(kept.clone());
        if !kept.unreadable.is_empty() && before.is_none_or(|before| before.unreadable != kept.unreadable) {
            tracing::error!("templates that this release cannot read cannot be deployed by it: {:?}", kept.unreadable);
        }
        Ok(kept)
    }

    /// What can be deployed, in the catalogue's order.
    pub async fn templates(&self) -> Result<Arc<Vec<Template>>> {
        Ok(self.catalogue().await?.templates)
    }

    /// Templates that are there, but that this release cannot read: what exists of them is another's to judge.
    pub(crate) async fn unreadable_templates(&self) -> Result<Arc<BTreeSet<String>>> {
        Ok(self.catalogue().await?.unreadable)
    }

    pub async fn template(&self, name: &TemplateName) -> Result<Template> {
        let templates = self.templates().await?;
        templates.iter().find(|template| template.name == *name).cloned().ok_or(Error::NotFound("template"))
    }

    /// Least first.
    pub async fn tiers(&self) -> Result<Arc<Tiers>> {
        Ok(self.catalogue().await?.tiers)
    }

    /// An operator's act: another tier for an org.
    pub async fn set_org_tier(&self, slug: &str, tier: &str) -> Result<()> {
        Ok(self.store().system(&self.system()).set_org_tier(slug, tier).await?)
    }

    /// An operator's act: other limits for a tier, or a new tier at the end.
    pub async fn put_tier(&self, tier: &Tier) -> Result<()> {
        self.store().system(&self.system()).put_tier(tier).await?;
        *self.0.catalogue.kept.write() = None;
        Ok(())
    }

    /// Makes the catalogue what this build ships.
    pub async fn publish_templates(&self, templates: Vec<Template>) -> Result<()> {
        let entries: Vec<_> = templates
            .into_iter()
            .enumerate()
            .map(|(position, template)| NewCatalogueEntry { template, position: position as u32 })
            .collect();
        self.store().system(&self.system()).publish_templates(&entries).await?;
        *self.0.catalogue.kept.write() = None;
        Ok(())
    }
}
