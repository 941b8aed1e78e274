//! The platform's own certificate authority: it signs what node agents and the node stream's server speak with.
//!
//! Names in a request are never trusted: the signer writes them.

use std::io::Write as _;
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use clawhq_domain::Millis;
use clawhq_domain::ids::NodeId;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, SanType,
};
use sha2::{Digest, Sha256};
use time::{Duration, OffsetDateTime};

/// A node's certificate lives a day and is renewed at half of it, so that a stolen one is soon worth nothing.
pub const NODE_LIFE: Duration = Duration::hours(24);
/// The server's certificate; made anew at each start.
const SERVER_LIFE: Duration = Duration::days(30);
const CA_LIFE: Duration = Duration::days(3650);
/// Clocks of nodes may be this far behind.
const SKEW: Duration = Duration::minutes(5);

/// The name the node stream's server certificate carries beside its addresses.
pub const SERVER_NAME: &str = "control-plane.clawhq.internal";
/// A node's name in its certificate is this with its id.
const NODE_URI: &str = "clawhq://node/";

#[derive(Debug, thiserror::Error)]
pub enum CaError {
    #[error("{path} cannot be read or written")]
    File {
        path: String,
        #[source]
        source: std::io::Error,
    },
    #[error("the certificate authority's files are not usable")]
    Material(#[source] rcgen::Error),
    #[error("the certificate request is not usable")]
    Request(#[source] rcgen::Error),
    #[error("the certificate does not name a node")]
    NotANode,
}

pub struct Ca {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

/// A key with its certificate, both PEM.
pub struct Identity {
    pub certificate_pem: String,
    pub key_pem: String,
}

/// A signed node certificate.
pub struct NodeCertificate {
    pub pem: String,
    /// SHA-256 of its DER form.
    pub fingerprint: [u8; 32],
    pub not_after: Millis,
}

fn file_error(path: &Path) -> impl FnOnce(std::io::Error) -> CaError {
    let path = path.display().to_string();
    move |source| CaError::File { path, source }
}

/// Written beside and renamed, so that a crash leaves the old file or the new one.
fn write_private(path: &Path, text: &str) -> Result<(), CaError> {
    let beside = path.with_extension("new");
    let write = || {
        let mut file = std::fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&beside)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        std::fs::rename(&beside, path)
    };
    write().map_err(file_error(path))
}

impl Ca {
    /// Reads `ca.pem` and `ca.key` (0600) from the folder, or makes them.
    pub fn open(folder: &Path) -> Result<Self, CaError> {
        let (pem_path, key_path) = (folder.join("ca.pem"), folder.join("ca.key"));
        if !key_path.exists() {
            std::fs::create_dir_all(folder).map_err(file_error(folder))?;
            let key = KeyPair::generate().map_err(CaError::Material)?;
            let mut params = CertificateParams::default();
            params.distinguished_name.push(DnType::CommonName, "ClawHQ certificate authority");
            params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
            params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
            params.not_before = OffsetDateTime::now_utc() - SKEW;
            params.not_after = OffsetDateTime::now_utc() + CA_LIFE;
            let certificate = params.self_signed(&key).map_err(CaError::Material)?;
            // The certificate first: a key without one would be taken for complete.
            write_private(&pem_path, &certificate.pem())?;
            write_private(&key_path, &key.serialize_pem())?;
        }
        let pem = std::fs::read_to_string(&pem_path).map_err(file_error(&pem_path))?;
        let key_pem = std::fs::read_to_string(&key_path).map_err(file_error(&key_path))?;
        let key = KeyPair::from_pem(&key_pem).map_err(CaError::Material)?;
        let issuer = Issuer::from_ca_cert_pem(&pem, key).map_err(CaError::Material)?;
        Ok(Self { issuer, pem })
    }

    /// What node agents pin.
    pub fn pem(&self) -> &str {
        &self.pem
    }

    /// A certificate for the node stream's server on these addresses.
    pub fn server(&self, names: &[String], addresses: &[IpAddr]) -> Result<Identity, CaError> {
        let key = KeyPair::generate().map_err(CaError::Material)?;
        let mut all = vec![SERVER_NAME.to_owned()];
        all.extend_from_slice(names);
        let mut params = CertificateParams::new(all).map_err(CaError::Material)?;
        params.subject_alt_names.extend(addresses.iter().map(|address| SanType::IpAddress(*address)));
        params.distinguished_name.push(DnType::CommonName, SERVER_NAME);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.not_before = OffsetDateTime::now_utc() - SKEW;
        params.not_after = OffsetDateTime::now_utc() + SERVER_LIFE;
        let certificate = params.signed_by(&key, &self.issuer).map_err(CaError::Material)?;
        Ok(Identity { certificate_pem: certificate.pem(), key_pem: key.serialize_pem() })
    }

    /// Signs a node's request. Only its public key is taken from it.
    pub fn sign_node(&self, node: NodeId, csr_pem: &str, now: Millis) -> Result<NodeCertificate, CaError> {
        let mut request = CertificateSigningRequestParams::from_pem(csr_pem).map_err(CaError::Request)?;
        let now = OffsetDateTime::from_unix_timestamp_nanos(i128::from(now) * 1_000_000)
            .unwrap_or_else(|_| OffsetDateTime::now_utc());
        let not_after = now + NODE_LIFE;
        let uri = format!("{NODE_URI}{node}").try_into().map_err(CaError::Request)?;
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, node.to_string());
        params.subject_alt_names = vec![SanType::URI(uri)];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.not_before = now - SKEW;
        params.not_after = not_after;
        request.params = params;
        let certificate = request.signed_by(&self.issuer).map_err(CaError::Request)?;
        Ok(NodeCertificate {
            pem: certificate.pem(),
            fingerprint: fingerprint(certificate.der()),
            not_after: (not_after.unix_timestamp_nanos() / 1_000_000) as Millis,
        })
    }
}

/// SHA-256 of a certificate's DER form: what the node's row is compared with.
pub fn fingerprint(der: &[u8]) -> [u8; 32] {
    Sha256::digest(der).into()
}

/// The node a certificate names. Its signature and dates were checked by TLS.
pub fn node_of(der: &[u8]) -> Result<NodeId, CaError> {
    let (_, certificate) = x509_parser::parse_x509_certificate(der).map_err(|_| CaError::NotANode)?;
    let names = certificate.subject_alternative_name().ok().flatten().ok_or(CaError::NotANode)?;
    let mut nodes = names.value.general_names.iter().filter_map(|name| match name {
        x509_parser::extensions::GeneralName::URI(uri) => uri.strip_prefix(NODE_URI)?.parse().ok(),
        _ => None,
    });
    match (nodes.next(), nodes.next()) {
        (Some(node), None) => Ok(node),
        _ => Err(CaError::NotANode),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn der(pem: &str) -> Vec<u8> {
        x509_parser::pem::parse_x509_pem(pem.as_bytes()).unwrap().1.contents
    }

    #[test]
    fn a_request_cannot_name_another_node() {
        let folder = std::env::temp_dir().join(format!("clawhq-ca-{}", std::process::id()));
        let ca = Ca::open(&folder).unwrap();
        let node = NodeId::from_u128(42);
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec!["admin.example".to_owned()]).unwrap();
        let other = format!("{NODE_URI}{}", NodeId::from_u128(7));
        params.subject_alt_names.push(SanType::URI(other.try_into().unwrap()));
        let csr = params.serialize_request(&key).unwrap().pem().unwrap();
        let signed = ca.sign_node(node, &csr, 1_800_000_000_000).unwrap();
        assert_eq!(node_of(&der(&signed.pem)).unwrap(), node);
        assert_eq!(signed.fingerprint, fingerprint(&der(&signed.pem)));
        assert_eq!(signed.not_after, 1_800_086_400_000);
        let again = Ca::open(&folder).unwrap();
        assert_eq!(again.pem(), ca.pem(), "made once");
        assert!(again.sign_node(node, "nonsense", 0).is_err());
        assert!(node_of(&der(ca.pem())).is_err());
        std::fs::remove_dir_all(folder).unwrap();
    }
}
