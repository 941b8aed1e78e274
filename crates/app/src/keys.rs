//! Orgs' data keys in memory: unwrapped once, kept for a while, never written.

use std::collections::BTreeMap;
use std::sync::Arc;

use clawhq_domain::Millis;
use clawhq_domain::ids::{ApiKeyId, OrgId, SlotId};
use clawhq_sealing::{Dek, KeyRing, Plaintext, WrappedDek};
use clawhq_store::{OrgKey, TenantScope};
use parking_lot::Mutex;

use crate::{App, Error, Result};

/// The key every value of an org is sealed with until it is replaced.
const FIRST_DEK: u32 = 1;
/// Orgs whose keys are kept unwrapped; beyond it all are forgotten and unwrapped again as needed (a few µs each).
const CACHED_MAX: usize = 10_000;

pub(crate) struct OrgKeys {
    ring: KeyRing,
    deks: Mutex<BTreeMap<(OrgId, u32), Arc<Dek>>>,
    /// Which minute a program's key was last marked as used in.
    used: Mutex<BTreeMap<ApiKeyId, Millis>>,
}

impl OrgKeys {
    pub(crate) fn new(ring: KeyRing) -> Self {
        Self { ring, deks: Mutex::default(), used: Mutex::default() }
    }

    /// The first data key of a new org, as its row keeps it.
    pub(crate) fn first(&self, org: OrgId) -> OrgKey {
        let (_, wrapped) = self.ring.new_dek(org, FIRST_DEK);
        OrgKey { dek_id: wrapped.dek_id, kek_version: wrapped.kek_version, sealed: wrapped.sealed }
    }

    /// The data key of a row.
    pub(crate) fn unwrap(&self, org: OrgId, key: &OrgKey) -> Result<Arc<Dek>> {
        if let Some(known) = self.deks.lock().get(&(org, key.dek_id)) {
            return Ok(known.clone());
        }
        let wrapped = WrappedDek { dek_id: key.dek_id, kek_version: key.kek_version, sealed: key.sealed.clone() };
        let dek = Arc::new(self.ring.unwrap(org, &wrapped).map_err(|error| Error::internal("data key", error))?);
        let mut deks = self.deks.lock();
        if deks.len() >= CACHED_MAX {
            deks.clear();
        }
        deks.insert((org, key.dek_id), dek.clone());
        Ok(dek)
    }

    /// Seals credentials minted for a slot, which has no org yet: under the ring itself, bound to the slot.
    pub(crate) fn seal_minted(&self, slot: SlotId, minted: &Plaintext) -> Vec<u8> {
        self.ring.seal_platform(slot.as_u128(), "minted", minted)
    }

    pub(crate) fn open_minted(&self, slot: SlotId, sealed: &[u8]) -> Result<Plaintext> {
        self.ring
            .open_platform(slot.as_u128(), "minted", sealed)
            .map_err(|error| Error::internal("minted credentials", error))
    }

    /// Whether this is the key's first use within a minute, as far as this process saw.
    pub(crate) fn first_use_this_minute(&self, key: ApiKeyId, now: Millis) -> bool {
        let mut used = self.used.lock();
        if used.len() >= CACHED_MAX {
            used.clear();
        }
        let minute = now / 60_000;
        used.insert(key, minute) != Some(minute)
    }
}

impl App {
    /// The data key that new values of this org are sealed with.
    pub(crate) async fn dek(&self, scope: &TenantScope) -> Result<Arc<Dek>> {
        let keys = self.store().tenant(scope).org().keys().await?;
        let newest = keys.iter().max_by_key(|key| key.dek_id).ok_or(Error::Unavailable("data key"))?;
        self.0.keys.unwrap(scope.org(), newest)
    }
}
