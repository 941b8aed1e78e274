//! Envelope encryption: a key ring outside the database wraps one data key per org, the data key seals secrets.
//!
//! ```text
//! key ring (file, 0600, versions)  ──wraps──▶  data key (one per org, row of org_keys)  ──seals──▶  value
//! ```
//!
//! AES-256-GCM with random 96-bit nonces. What a value is for is bound to it as additional data, length-prefixed:
//! a row copied to another org, secret, version or purpose does not open. A data key seals at most 2^28 values
//! before it must be replaced (random nonces allow 2^32; the margin is for counting mistakes), which [`Dek`]
//! leaves to its caller to count.
//!
//! Plaintext has no `Debug`, `Display` or serialisation, and is overwritten when dropped.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use aes_gcm::aead::{Aead, Generate, Key, KeyInit, Payload};
use aes_gcm::{Aes256Gcm, Nonce};
use clawhq_domain::ids::OrgId;
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

/// `CQ`, then the format's version.
const MAGIC: [u8; 3] = *b"CQ\x01";
/// AES-256-GCM; a later algorithm takes another number, so that old values say how they were sealed.
const AES_256_GCM: u8 = 1;
const NONCE: usize = 12;
/// Magic, algorithm, key number, nonce.
const HEADER: usize = 3 + 1 + 4 + NONCE;
const TAG: usize = 16;
/// What sealing adds to a value, in bytes.
pub const OVERHEAD: usize = HEADER + TAG;

#[derive(Debug, thiserror::Error)]
pub enum SealError {
    /// Wrong key, wrong context or changed bytes: which of them cannot be told.
    #[error("the value does not open")]
    Refused,
    #[error("the value is not of a form this version reads")]
    Format,
    #[error("the key ring has no key {0}")]
    NoKey(u32),
    #[error("{path} cannot be read or written")]
    File {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    /// Others can read the keys.
    #[error("{path} must be readable by its owner alone (chmod 600)")]
    Exposed { path: PathBuf },
    #[error("line {line} of {path} is not `<version> <64 hex digits>`")]
    Line { path: PathBuf, line: usize },
}

/// A secret in the clear. Say [`expose`](Self::expose) where it is used and nowhere else.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct Plaintext(Vec<u8>);

impl Plaintext {
    pub fn new(bytes: impl Into<Vec<u8>>) -> Self {
        Self(bytes.into())
    }

    pub fn expose(&self) -> &[u8] {
        &self.0
    }
}

/// What a sealed value is and whose; all of it must match to open it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Context<'a> {
    pub org: OrgId,
    /// The id of the thing, such as the secret.
    pub object: u128,
    pub version: u32,
    /// Such as `secret` or `minted`.
    pub purpose: &'a str,
}

impl Context<'_> {
    fn additional_data(&self, header: &[u8]) -> Vec<u8> {
        let mut data = Vec::with_capacity(96);
        let org = self.org.as_u128().to_be_bytes();
        let object = self.object.to_be_bytes();
        let version = self.version.to_be_bytes();
        for part in [header, b"v1", &org, &object, &version, self.purpose.as_bytes()] {
            data.extend_from_slice(&(part.len() as u32).to_be_bytes());
            data.extend_from_slice(part);
        }
        data
    }
}

struct Cipher {
    key: Aes256Gcm,
    number: u32,
}

impl Cipher {
    fn new(bytes: &[u8; 32], number: u32) -> Self {
        Self { key: Aes256Gcm::new(&Key::<Aes256Gcm>::from(*bytes)), number }
    }

    fn seal(&self, context: &Context<'_>, plain: &[u8]) -> Vec<u8> {
        let nonce = Nonce::generate();
        let mut sealed = Vec::with_capacity(plain.len() + OVERHEAD);
        sealed.extend_from_slice(&MAGIC);
        sealed.push(AES_256_GCM);
        sealed.extend_from_slice(&self.number.to_be_bytes());
        sealed.extend_from_slice(&nonce);
        let aad = context.additional_data(&sealed);
        let body = self
            .key
            .encrypt(&nonce, Payload { msg: plain, aad: &aad })
            .expect("AES-GCM refuses only messages above 64 GiB, which no Vec of ours holds");
        sealed.extend_from_slice(&body);
        sealed
    }

    fn open(&self, context: &Context<'_>, sealed: &[u8]) -> Result<Plaintext, SealError> {
        let header = sealed.get(..HEADER).ok_or(SealError::Format)?;
        let nonce: [u8; NONCE] = header[HEADER - NONCE..].try_into().map_err(|_| SealError::Format)?;
        let aad = context.additional_data(header);
        let payload = Payload { msg: &sealed[HEADER..], aad: &aad };
        self.key.decrypt(&Nonce::from(nonce), payload).map(Plaintext).map_err(|_| SealError::Refused)
    }
}

/// The number of the key a value was sealed with: a data key's id, or for a wrapped data key the ring's version.
pub fn key_number(sealed: &[u8]) -> Result<u32, SealError> {
    if sealed.len() < OVERHEAD || sealed[..3] != MAGIC || sealed[3] != AES_256_GCM {
        return Err(SealError::Format);
    }
    Ok(u32::from_be_bytes([sealed[4], sealed[5], sealed[6], sealed[7]]))
}

/// An org's data key, unwrapped.
pub struct Dek {
    org: OrgId,
    cipher: Cipher,
}

impl Dek {
    pub fn id(&self) -> u32 {
        self.cipher.number
    }

    /// Seals a value for this org. The context names what it is.
    pub fn seal(&self, object: u128, version: u32, purpose: &str, value: &Plaintext) -> Vec<u8> {
        self.cipher.seal(&Context { org: self.org, object, version, purpose }, value.expose())
    }

    pub fn open(&self, object: u128, version: u32, purpose: &str, sealed: &[u8]) -> Result<Plaintext, SealError> {
        if key_number(sealed)? != self.cipher.number {
            return Err(SealError::NoKey(key_number(sealed)?));
        }
        self.cipher.open(&Context { org: self.org, object, version, purpose }, sealed)
    }
}

/// A data key as its row holds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WrappedDek {
    pub dek_id: u32,
    pub kek_version: u32,
    pub sealed: Vec<u8>,
}

/// The root keys by version; the newest wraps, the older ones still unwrap.
pub struct KeyRing {
    keys: BTreeMap<u32, Cipher>,
}

const DEK_PURPOSE: &str = "dek";

impl KeyRing {
    /// Reads the file, or makes it with one fresh key. Lines are `<version> <64 hex digits>`.
    pub fn open(path: &Path) -> Result<Self, SealError> {
        let failed = |source| SealError::File { path: path.to_owned(), source };
        if !path.exists() {
            let mut text = Zeroizing::new(String::from("1 "));
            text.push_str(&fresh_hex());
            text.push('\n');
            // A name of its own: two that start at once must not write into one file.
            let beside = path.with_extension(format!("new-{}", &fresh_hex()[..16]));
            let mut file =
                std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&beside).map_err(failed)?;
            file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).map_err(failed)?;
            // A link, not a rename: of two that start at once, one makes the ring and the other reads it.
            match std::fs::hard_link(&beside, path) {
                Ok(()) => {}
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(failed(error)),
            }
            std::fs::remove_file(&beside).map_err(failed)?;
            if let Some(dir) = path.parent().filter(|dir| !dir.as_os_str().is_empty()) {
                // Without the key everything sealed is lost: the file's name is on the disk before anything is.
                std::fs::File::open(dir).and_then(|dir| dir.sync_all()).map_err(failed)?;
            }
        }
        let mode = std::fs::metadata(path).map_err(failed)?.permissions().mode();
        if mode & 0o077 != 0 {
            return Err(SealError::Exposed { path: path.to_owned() });
        }
        let text = Zeroizing::new(std::fs::read_to_string(path).map_err(failed)?);
        let mut keys = BTreeMap::new();
        for (at, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
            let wrong = || SealError::Line { path: path.to_owned(), line: at + 1 };
            let (version, hex) = line.trim().split_once(' ').ok_or_else(wrong)?;
            let version: u32 = version.parse().map_err(|_| wrong())?;
            let bytes = Zeroizing::new(data_encoding::HEXLOWER.decode(hex.as_bytes()).map_err(|_| wrong())?);
            let key = Zeroizing::new(<[u8; 32]>::try_from(bytes.as_slice()).map_err(|_| wrong())?);
            if keys.insert(version, Cipher::new(&key, version)).is_some() {
                return Err(wrong());
            }
        }
        if keys.is_empty() {
            return Err(SealError::Line { path: path.to_owned(), line: 1 });
        }
        Ok(Self { keys })
    }

    /// The version that wraps new data keys.
    pub fn newest(&self) -> u32 {
        self.keys.last_key_value().map_or(0, |(version, _)| *version)
    }

    fn wrapping(&self) -> &Cipher {
        self.keys.last_key_value().map(|(_, cipher)| cipher).expect("a ring is never empty")
    }

    /// A fresh data key for an org, unwrapped and as its row keeps it.
    pub fn new_dek(&self, org: OrgId, dek_id: u32) -> (Dek, WrappedDek) {
        let key = Key::<Aes256Gcm>::generate();
        let bytes: Zeroizing<[u8; 32]> = Zeroizing::new(key.into());
        (Dek { org, cipher: Cipher::new(&bytes, dek_id) }, self.wrap(org, dek_id, bytes.as_slice()))
    }

    fn wrap(&self, org: OrgId, dek_id: u32, bytes: &[u8]) -> WrappedDek {
        let context = Context { org, object: u128::from(dek_id), version: 0, purpose: DEK_PURPOSE };
        let sealed = self.wrapping().seal(&context, bytes);
        WrappedDek { dek_id, kek_version: self.newest(), sealed }
    }

    fn unwrap_bytes(&self, org: OrgId, wrapped: &WrappedDek) -> Result<Zeroizing<[u8; 32]>, SealError> {
        let version = key_number(&wrapped.sealed)?;
        let cipher = self.keys.get(&version).ok_or(SealError::NoKey(version))?;
        let context = Context { org, object: u128::from(wrapped.dek_id), version: 0, purpose: DEK_PURPOSE };
        let plain = cipher.open(&context, &wrapped.sealed)?;
        <[u8; 32]>::try_from(plain.expose()).map(Zeroizing::new).map_err(|_| SealError::Format)
    }

    /// The data key of a row.
    pub fn unwrap(&self, org: OrgId, wrapped: &WrappedDek) -> Result<Dek, SealError> {
        let bytes = self.unwrap_bytes(org, wrapped)?;
        Ok(Dek { org, cipher: Cipher::new(&bytes, wrapped.dek_id) })
    }

    /// Seals what belongs to no org yet, such as credentials minted for a warm slot, under the newest root key.
    pub fn seal_platform(&self, object: u128, purpose: &str, value: &Plaintext) -> Vec<u8> {
        self.wrapping().seal(&platform(object, purpose), value.expose())
    }

    pub fn open_platform(&self, object: u128, purpose: &str, sealed: &[u8]) -> Result<Plaintext, SealError> {
        let version = key_number(sealed)?;
        self.keys.get(&version).ok_or(SealError::NoKey(version))?.open(&platform(object, purpose), sealed)
    }

    /// The same data key under the newest root key; values it sealed stay as they are.
    pub fn rewrap(&self, org: OrgId, wrapped: &WrappedDek) -> Result<WrappedDek, SealError> {
        let bytes = self.unwrap_bytes(org, wrapped)?;
        Ok(self.wrap(org, wrapped.dek_id, bytes.as_slice()))
    }
}

/// No org has the id 0, so nothing of an org's opens here and nothing of here as an org's.
fn platform(object: u128, purpose: &str) -> Context<'_> {
    Context { org: OrgId::from_u128(0), object, version: 0, purpose }
}

fn fresh_hex() -> Zeroizing<String> {
    let key = Key::<Aes256Gcm>::generate();
    let bytes: Zeroizing<[u8; 32]> = Zeroizing::new(key.into());
    Zeroizing::new(data_encoding::HEXLOWER.encode(bytes.as_slice()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ring() -> (tempfile::TempDir, KeyRing) {
        let folder = tempfile::tempdir().unwrap();
        let ring = KeyRing::open(&folder.path().join("keys")).unwrap();
        (folder, ring)
    }

    fn org(number: u128) -> OrgId {
        OrgId::from_u128(number)
    }

    #[test]
    fn the_file_is_made_once_and_kept_private() {
        let (folder, ring) = ring();
        let path = folder.path().join("keys");
        let (dek, wrapped) = ring.new_dek(org(1), 1);
        let sealed = dek.seal(5, 1, "secret", &Plaintext::new("value"));
        let again = KeyRing::open(&path).unwrap().unwrap(org(1), &wrapped).unwrap();
        assert_eq!(again.open(5, 1, "secret", &sealed).unwrap().expose(), b"value");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        assert!(matches!(KeyRing::open(&path), Err(SealError::Exposed { .. })));
    }

    #[test]
    fn of_many_that_start_at_once_all_have_the_ring_that_is_kept() {
        let org = OrgId::from_u128(9);
        for _ in 0..50 {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("keys");
            let rings: Vec<_> = std::thread::scope(|scope| {
                let starts: Vec<_> = (0..6).map(|_| scope.spawn(|| KeyRing::open(&path).unwrap())).collect();
                starts.into_iter().map(|start| start.join().unwrap()).collect()
            });
            let kept = KeyRing::open(&path).unwrap();
            for ring in rings {
                assert!(kept.unwrap(org, &ring.new_dek(org, 1).1).is_ok(), "what it sealed is lost with its process");
            }
            assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "drafts are left");
        }
    }

    #[test]
    fn a_broken_file_names_its_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("keys");
        for (text, wrong) in [("1 zz\n", 1), ("", 1), (&format!("1 {}\n1 {}\n", "00".repeat(32), "11".repeat(32)), 2)] {
            std::fs::write(&path, text).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
            assert!(matches!(KeyRing::open(&path), Err(SealError::Line { line, .. }) if line == wrong), "{text:?}");
        }
    }

    #[test]
    fn no_value_opens_in_the_place_of_another() {
        let (_folder, ring) = ring();
        let deks = [ring.new_dek(org(1), 1).0, ring.new_dek(org(2), 1).0, ring.new_dek(org(1), 2).0];
        let mut places = Vec::new();
        for dek in &deks {
            for object in [1, 2] {
                for version in [1, 2] {
                    for purpose in ["secret", "minted"] {
                        places.push((dek, object, version, purpose));
                    }
                }
            }
        }
        let sealed: Vec<_> = places
            .iter()
            .map(|(dek, object, version, purpose)| dek.seal(*object, *version, purpose, &Plaintext::new("x")))
            .collect();
        for (at, (dek, object, version, purpose)) in places.iter().enumerate() {
            for (from, value) in sealed.iter().enumerate() {
                assert_eq!(
                    dek.open(*object, *version, purpose, value).is_ok(),
                    at == from,
                    "{from} in the place of {at}"
                );
            }
        }
    }

    #[test]
    fn what_is_the_platforms_opens_only_as_that() {
        let (_folder, ring) = ring();
        let sealed = ring.seal_platform(7, "minted", &Plaintext::new("token"));
        assert_eq!(ring.open_platform(7, "minted", &sealed).unwrap().expose(), b"token");
        assert!(ring.open_platform(8, "minted", &sealed).is_err());
        assert!(ring.open_platform(7, "other", &sealed).is_err());
        assert!(ring.new_dek(org(0), 1).0.open(7, 0, "minted", &sealed).is_err());
    }

    #[test]
    fn a_new_root_key_takes_over_by_rewrapping() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("keys");
        let old = KeyRing::open(&path).unwrap();
        let (dek, wrapped) = old.new_dek(org(1), 1);
        let sealed = dek.seal(1, 1, "secret", &Plaintext::new("kept"));
        let mut text = std::fs::read_to_string(&path).unwrap();
        text.push_str(&format!("2 {}\n", "7f".repeat(32)));
        std::fs::write(&path, &text).unwrap();
        let both = KeyRing::open(&path).unwrap();
        let moved = both.rewrap(org(1), &wrapped).unwrap();
        assert_eq!((wrapped.kek_version, moved.kek_version), (1, 2));
        std::fs::write(&path, text.lines().last().unwrap()).unwrap();
        let new = KeyRing::open(&path).unwrap();
        assert_eq!(new.unwrap(org(1), &moved).unwrap().open(1, 1, "secret", &sealed).unwrap().expose(), b"kept");
        assert!(matches!(new.unwrap(org(1), &wrapped), Err(SealError::NoKey(1))));
        assert!(both.unwrap(org(2), &moved).is_err(), "another org's row");
    }

    proptest! {
        #[test]
        fn any_changed_byte_is_noticed(value in prop::collection::vec(any::<u8>(), 0..64), at: prop::sample::Index, flip in 1u8..) {
            let (_folder, ring) = ring();
            let dek = ring.new_dek(org(1), 1).0;
            let mut sealed = dek.seal(1, 1, "secret", &Plaintext::new(value.clone()));
            let opened = dek.open(1, 1, "secret", &sealed).unwrap();
            prop_assert_eq!(opened.expose(), value.as_slice());
            let at = at.index(sealed.len());
            sealed[at] ^= flip;
            prop_assert!(dek.open(1, 1, "secret", &sealed).is_err());
            prop_assert!(dek.open(1, 1, "secret", &sealed[..at]).is_err());
        }
    }
}
