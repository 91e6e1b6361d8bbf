//! An operator's own authority, in place of trust in the token's word alone: both ends show X.509 certificates that it has
//! issued, and neither goes on with one that has none. The fingerprint in the token's word is held against the target's key
//! as ever: a certificate of the authority's for another host is not enough.
//!
//! Read once, before privileges are given up: a private key that only root can read will do.

#![forbid(unsafe_code)]

use std::path::Path;
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{verify_server_cert_signed_by_trust_anchor, verify_server_name};
use rustls::crypto::{WebPkiSupportedAlgorithms, verify_tls13_signature};
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::version::TLS13;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, PeerIncompatible, RootCertStore, ServerConfig,
    SignatureScheme,
};

use super::{Identity, answering, asking, dialling, provider, unusable};
use crate::error::NetError;
use crate::net::pass::Fingerprint;

/// Whom an end trusts, and what it shows.
#[derive(Clone)]
pub struct Authority {
    roots: Arc<RootCertStore>,
    chain: Vec<CertificateDer<'static>>,
    key: Arc<PrivateKeyDer<'static>>,
    fingerprint: Fingerprint,
}

impl Authority {
    /// From PEM files: the authority's certificates, this end's (its own first, then those between it and the
    /// authority's), and its private key.
    ///
    /// # Errors
    /// A file can't be read, or does not hold what it should, or the key is not the certificate's.
    pub fn load(ca: &Path, cert: &Path, key: &Path) -> Result<Self, NetError> {
        let mut roots = RootCertStore::empty();
        for root in certificates(ca)? {
            roots.add(root).map_err(|error| wrong(ca, &error.to_string()))?;
        }
        let chain = certificates(cert)?;
        let private = PrivateKeyDer::from_pem_file(key).map_err(|error| match error {
            pem::Error::NoItemsFound => wrong(key, "there is no private key in it"),
            other => wrong(key, &explained(&other)),
        })?;
        let own = ParsedCertificate::try_from(&chain[0]).map_err(|error| wrong(cert, &error.to_string()))?;
        let fingerprint = Fingerprint::of(&own.subject_public_key_info());
        let signer = provider().key_provider.load_private_key(private.clone_key());
        let signer = signer.map_err(|error| wrong(key, &error.to_string()))?;
        if signer.public_key().is_some_and(|public| Fingerprint::of(&public) != fingerprint) {
            return Err(wrong(key, &format!("it is not the key of the certificate in {}", cert.display())));
        }
        Ok(Self { roots: Arc::new(roots), chain, key: Arc::new(private), fingerprint })
    }

    /// What a target shows, and asks of its source.
    ///
    /// # Errors
    /// The authority has no certificate that could issue one.
    pub fn identity(&self) -> Result<Identity, NetError> {
        let provider = provider();
        let verifier =
            WebPkiClientVerifier::builder_with_provider(Arc::clone(&self.roots), Arc::clone(&provider))
                .build()
                .map_err(|error| unusable(&rustls::Error::General(error.to_string())))?;
        let config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])
            .map_err(|error| unusable(&error))?
            .with_client_cert_verifier(verifier)
            .with_single_cert(self.chain.clone(), self.key.clone_key())
            .map_err(|error| unusable(&error))?;
        Ok(Identity { config: answering(config), fingerprint: self.fingerprint, mutual: true, pair: None })
    }

    /// How to dial the target with that key, which has to be certified for `name`, where one is given.
    pub(super) fn dialling(
        &self,
        pin: Fingerprint,
        name: Option<ServerName<'static>>,
    ) -> Result<Arc<ClientConfig>, NetError> {
        let algorithms = provider().signature_verification_algorithms;
        let verifier = Certified { roots: Arc::clone(&self.roots), pin, name, algorithms };
        let config = dialling(Arc::new(verifier))?
            .with_client_auth_cert(self.chain.clone(), self.key.clone_key())
            .map_err(|error| unusable(&error))?;
        Ok(asking(config))
    }
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Authority({})", self.fingerprint)
    }
}

/// All certificates in a file; at least one.
fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, NetError> {
    let all = CertificateDer::pem_file_iter(path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    match all {
        Ok(all) if all.is_empty() => Err(wrong(path, "there is no certificate in it")),
        Ok(all) => Ok(all),
        Err(error) => Err(wrong(path, &explained(&error))),
    }
}

fn explained(error: &pem::Error) -> String {
    match error {
        pem::Error::Io(source) => source.to_string(),
        other => format!("it is not in PEM format ({other})"),
    }
}

fn wrong(path: &Path, why: &str) -> NetError {
    NetError::Credentials { path: path.display().to_string(), why: why.to_owned() }
}

/// What is wrong with a certificate, and what to do.
pub(in crate::net) fn judged(error: &CertificateError) -> String {
    let why = match error {
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
            "it has expired. Issue a new one; or is this host's clock wrong?"
        }
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
            "it is not valid yet. Is this host's clock wrong?"
        }
        CertificateError::UnknownIssuer | CertificateError::BadSignature => {
            "it was not issued by the authority this end trusts (--ca; lanes_ca on a Xen host)"
        }
        CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
            "it is for another name. If that host is the right one, say which name it has with --peer-name"
        }
        CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => {
            "it is not meant for this end of a connection (extended key usage)"
        }
        other => return other.to_string(),
    };
    why.to_owned()
}

/// Why the other end broke a handshake off, if that was about our certificate (RFC 8446, section 6.2).
pub(super) fn refused(alert: u8) -> Option<&'static str> {
    Some(match alert {
        116 => {
            "it asks for a certificate, and this end has shown none: give --ca, --cert and --key (on a Xen host lanes_ca, lanes_cert \
             and lanes_key)"
        }
        48 => "it was not issued by the authority the other end trusts",
        45 => "it has expired, by the other end's clock",
        42 | 43 | 44 | 46 => "it is revoked, or not meant for this; the other end's output says more",
        _ => return None,
    })
}

/// Takes the one key, in a certificate of the authority's.
#[derive(Debug)]
struct Certified {
    roots: Arc<RootCertStore>,
    pin: Fingerprint,
    name: Option<ServerName<'static>>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl ServerCertVerifier for Certified {
    fn verify_server_cert(
        &self,
        own: &CertificateDer<'_>,
        chain: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let parsed = ParsedCertificate::try_from(own)?;
        let algorithms = self.algorithms.all;
        verify_server_cert_signed_by_trust_anchor(&parsed, &self.roots, chain, now, algorithms)?;
        if let Some(name) = &self.name {
            verify_server_name(&parsed, name)?;
        }
        match Fingerprint::of(&parsed.subject_public_key_info()) == self.pin {
            true => Ok(ServerCertVerified::assertion()),
            false => Err(CertificateError::ApplicationVerificationFailure.into()),
        }
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(PeerIncompatible::Tls12NotOffered.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        own: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, own, signed, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}
