//! Connections over TLS 1.3: who the ends are, and how a connection becomes one.
//!
//! ```text
//!   dialler                                     acceptor
//!     | -- knock, 64 bytes ----------------------> |  hangs up on whoever does not know the secret
//!     | -- ClientHello ..                          |
//!     | <--- .. raw public key, signed, Finished - |  the dialler hangs up unless the key is the pinned one
//!     | -- Finished, then the Hello with the secret|
//!     | ==== records ============================= |
//! ```
//! rustls does the handshake (`handshake`) and then hands over the keys of both directions. From there each half of a
//! connection seals or opens records itself, on the task that owns it, in a buffer made with it (`halves`, `record`):
//! no lock, no allocation, no copy of rustls' own. Only a change of keys, once in 2^24 records (256 GiB), takes a lock
//! and allocates.
//!
//! A target makes a key pair for each migration ([`Identity`]); its certificate is a raw public key (RFC 7250), for a
//! name, a date or an authority would say nothing that the pinned fingerprint does not. Operators who have an authority of
//! their own can have both ends show its certificates as well ([`Authority`]). There are no tickets, no early data, no
//! other version and no renegotiation.

#![forbid(unsafe_code)]

mod authority;
mod halves;
pub(super) mod handshake;
mod record;

pub use record::open_anything;

use std::sync::Arc;

pub use authority::Authority;
pub(super) use authority::judged;
use ring::rand::SystemRandom;
use ring::signature::Ed25519KeyPair;
use rustls::client::WantsClientCert;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, verify_tls13_signature_with_raw_key};
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer, ServerName, SubjectPublicKeyInfoDer, UnixTime};
use rustls::server::AlwaysResolvesServerRawPublicKeys;
use rustls::sign::CertifiedKey;
use rustls::{
    CertificateError, ClientConfig, ConfigBuilder, DigitallySignedStruct, PeerIncompatible, ServerConfig,
    SignatureScheme, version::TLS13,
};

use zeroize::Zeroizing;

use crate::error::NetError;
use crate::net::pass::Fingerprint;

/// A key pair that one target shows to one source. Only this process ever has it, and the guest's, which keeps it while pages are
/// outstanding for an engine that takes over.
#[derive(Clone)]
pub struct Identity {
    config: Arc<ServerConfig>,
    fingerprint: Fingerprint,
    /// Whether the source has to show a certificate too.
    mutual: bool,
    pair: Option<Zeroizing<Vec<u8>>>,
}

impl Identity {
    /// Makes one.
    ///
    /// # Errors
    /// Where the system gives no randomness.
    pub fn new() -> Result<Self, NetError> {
        let pair = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).map_err(|_| NetError::Os {
            doing: "cannot make a key pair".to_owned(),
            remedy: "The system gives no randomness; is /dev/urandom or getrandom(2) forbidden here?",
            source: std::io::Error::other("no randomness"),
        })?;
        Self::of(Zeroizing::new(pair.as_ref().to_vec()))
    }

    /// The one whose [`Self::pair`] that is.
    ///
    /// # Errors
    /// Where it is none.
    pub fn of(pair: Zeroizing<Vec<u8>>) -> Result<Self, NetError> {
        let provider = provider();
        let key = rustls::crypto::ring::sign::any_eddsa_type(&PrivatePkcs8KeyDer::from(pair.as_slice()))
            .map_err(|error| unusable(&error))?;
        let public =
            key.public_key().ok_or_else(|| unusable(&rustls::Error::General("no public key".into())))?;
        let fingerprint = Fingerprint::of(&public);
        let shown = CertificateDer::from(public.to_vec());
        let certified = Arc::new(CertifiedKey::new(vec![shown], key));
        let config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])
            .map_err(|error| unusable(&error))?
            .with_no_client_auth()
            .with_cert_resolver(Arc::new(AlwaysResolvesServerRawPublicKeys::new(certified)));
        Ok(Self { config: answering(config), fingerprint, mutual: false, pair: Some(pair) })
    }

    /// The key pair itself, PKCS #8 in DER, where it was made for one migration: as secret as anything.
    #[must_use]
    pub fn pair(&self) -> Option<&Zeroizing<Vec<u8>>> {
        self.pair.as_ref()
    }

    /// What a source pins.
    #[must_use]
    pub fn fingerprint(&self) -> Fingerprint {
        self.fingerprint
    }

    pub(super) fn config(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.config)
    }

    pub(super) fn is_mutual(&self) -> bool {
        self.mutual
    }
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Identity({})", self.fingerprint)
    }
}

fn provider() -> Arc<CryptoProvider> {
    provider_for(has_aes())
}

/// The ciphers, the one this processor is quickest at first: without instructions for AES, ChaCha20-Poly1305.
fn provider_for(aes: bool) -> Arc<CryptoProvider> {
    use rustls::crypto::ring::cipher_suite::{
        TLS13_AES_128_GCM_SHA256, TLS13_AES_256_GCM_SHA384, TLS13_CHACHA20_POLY1305_SHA256,
    };
    let mut provider = rustls::crypto::ring::default_provider();
    provider.cipher_suites = match aes {
        true => vec![TLS13_AES_128_GCM_SHA256, TLS13_AES_256_GCM_SHA384, TLS13_CHACHA20_POLY1305_SHA256],
        false => vec![TLS13_CHACHA20_POLY1305_SHA256, TLS13_AES_128_GCM_SHA256, TLS13_AES_256_GCM_SHA384],
    };
    Arc::new(provider)
}

/// Whether the processor has instructions for AES and for GCM's multiplication.
fn has_aes() -> bool {
    #[cfg(target_arch = "x86_64")]
    return std::arch::is_x86_feature_detected!("aes") && std::arch::is_x86_feature_detected!("pclmulqdq");
    #[cfg(not(target_arch = "x86_64"))]
    return true;
}

fn unusable(error: &rustls::Error) -> NetError {
    NetError::Os {
        doing: "cannot set up TLS".to_owned(),
        remedy: "Please report it",
        source: std::io::Error::other(error.to_string()),
    }
}

/// Whom a dialler wants to reach.
#[derive(Clone, Debug)]
pub(crate) struct Wanted {
    /// The key it has to have.
    pub(super) pin: Fingerprint,
    /// The operator's authority, and the name that the other end's certificate has to be for, if any.
    pub(super) authority: Option<(Authority, Option<ServerName<'static>>)>,
}

impl Wanted {
    /// How to dial it.
    fn config(&self) -> Result<Arc<ClientConfig>, NetError> {
        match &self.authority {
            Some((authority, name)) => authority.dialling(self.pin, name.clone()),
            None => pinning(self.pin),
        }
    }
}

/// How to dial the target that has the key with that fingerprint.
fn pinning(pin: Fingerprint) -> Result<Arc<ClientConfig>, NetError> {
    let algorithms = provider().signature_verification_algorithms;
    Ok(asking(dialling(Arc::new(Pinned { pin, algorithms }))?.with_no_client_auth()))
}

/// How to dial whoever `verifier` lets pass, but for what this end shows.
fn dialling(
    verifier: Arc<dyn ServerCertVerifier>,
) -> Result<ConfigBuilder<ClientConfig, WantsClientCert>, NetError> {
    let config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])
        .map_err(|error| unusable(&error))?;
    Ok(config.dangerous().with_custom_certificate_verifier(verifier))
}

/// What holds of a source's sessions, whomever it trusts: their keys go to the lanes, each is new, none tells a name.
fn asking(mut config: ClientConfig) -> Arc<ClientConfig> {
    config.enable_secret_extraction = true;
    config.enable_sni = false;
    config.resumption = rustls::client::Resumption::disabled();
    Arc::new(config)
}

/// What holds of a target's, whatever it shows: their keys go to the lanes, none can be resumed.
fn answering(mut config: ServerConfig) -> Arc<ServerConfig> {
    config.enable_secret_extraction = true;
    config.send_tls13_tickets = 0;
    // The dialler's order, unless this end is the slow one.
    config.ignore_client_order = !has_aes();
    Arc::new(config)
}

/// Takes one key and no other.
#[derive(Debug)]
struct Pinned {
    pin: Fingerprint,
    algorithms: WebPkiSupportedAlgorithms,
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        key: &CertificateDer<'_>,
        chain: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        match chain.is_empty() && Fingerprint::of(key) == self.pin {
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
        key: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let key = SubjectPublicKeyInfoDer::from(key.as_ref());
        verify_tls13_signature_with_raw_key(message, &key, signed, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }

    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod authority_tests;
#[cfg(test)]
mod tests;
