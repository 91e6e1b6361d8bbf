//! An authority's certificates over loopback, made as they are needed: what is let through, and in which words the rest is not.

use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::Duration;

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    date_time_ymd,
};

use super::{Authority, Identity};
use crate::error::NetError;
use crate::net::entrance::{Entrance, Lock};
use crate::net::pass::Fingerprint;
use crate::net::tcp::{Settings, TcpAcceptor, TcpDialer};
use crate::net::{Acceptor, Connection, Dialer};
use crate::wire::hello::{Hello, MigrationId, Purpose, Secret};

const SECOND: Duration = Duration::from_secs(1);
static TOKEN: LazyLock<Secret> = LazyLock::new(|| Secret::of(&[7; 32]));

fn hello() -> Hello {
    Hello::new(Purpose::Control, MigrationId([1; 16]), TOKEN.clone())
}

/// An authority and the directory its files are in.
struct Office {
    issuer: CertifiedIssuer<'static, KeyPair>,
    place: tempfile::TempDir,
}

impl Office {
    fn new() -> Self {
        let mut params = CertificateParams::new(Vec::<String>::new()).unwrap();
        // Authorities have names of their own.
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("authority {}", COUNT.fetch_add(1, Ordering::SeqCst));
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let place = tempfile::tempdir().unwrap();
        std::fs::write(place.path().join("ca"), issuer.pem()).unwrap();
        Self { issuer, place }
    }

    fn ca(&self) -> PathBuf {
        self.place.path().join("ca")
    }

    /// Files of an end with that name; `change` has the last word on its certificate.
    fn files(&self, name: &str, change: impl Fn(&mut CertificateParams)) -> (PathBuf, PathBuf) {
        let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        change(&mut params);
        let key = KeyPair::generate().unwrap();
        let cert = params.signed_by(&key, &self.issuer).unwrap();
        let paths = [format!("{name}.cert"), format!("{name}.key")].map(|file| self.place.path().join(file));
        std::fs::write(&paths[0], cert.pem()).unwrap();
        std::fs::write(&paths[1], key.serialize_pem()).unwrap();
        let [cert, key] = paths;
        (cert, key)
    }

    fn end_with(&self, ca: &Path, name: &str, change: impl Fn(&mut CertificateParams)) -> Authority {
        let (cert, key) = self.files(name, change);
        Authority::load(ca, &cert, &key).unwrap()
    }

    fn end(&self, name: &str) -> Authority {
        self.end_with(&self.ca(), name, |_| {})
    }
}

/// What the two ends and the target's log have of a connection.
struct Outcome {
    near: Result<Connection, NetError>,
    far: Option<Connection>,
    told: Option<String>,
}

fn connect(identity: Identity, source: Option<(Authority, Option<&str>)>) -> Outcome {
    connect_to(identity.fingerprint(), identity, source)
}

fn connect_to(pin: Fingerprint, identity: Identity, source: Option<(Authority, Option<&str>)>) -> Outcome {
    let acceptor = TcpAcceptor::listen("127.0.0.1:0", Settings::default()).unwrap();
    let mut entrance = Entrance::new(acceptor, Lock::Tls(identity));
    let mut dialer = TcpDialer::new(&entrance.local().to_string(), Settings::default()).pinned(Some(pin));
    if let Some((authority, name)) = source {
        dialer = dialer.certified(authority, name).unwrap();
    }
    let near = thread::spawn(move || {
        let mut near = dialer.call(&hello(), 5 * SECOND)?;
        // What the other end makes of our certificate comes as its answer.
        near.receiver.recv(&mut [0])?;
        Ok(near)
    });
    let mut far = entrance.caller(&TOKEN, SECOND).unwrap().map(|caller| caller.connection);
    if let Some(far) = &mut far {
        far.sender.send(&[1], &[]).unwrap();
    }
    let near = near.join().unwrap();
    Outcome { near, far, told: entrance.turned_away() }
}

/// The source's words for a target it does not go on with.
fn source_refuses(outcome: &Outcome, words: &str) {
    let error = outcome.near.as_ref().err().expect("it is refused").to_string();
    assert!(error.contains("a certificate that can't be taken") && error.contains(words), "{error}");
    assert!(outcome.far.is_none());
}

/// Both ends' words for a source that the target does not go on with.
fn target_refuses(outcome: &Outcome, there: &str, here: &str) {
    let error = outcome.near.as_ref().err().expect("it is refused").to_string();
    assert!(error.contains("does not take this end's certificate") && error.contains(there), "{error}");
    let told = outcome.told.as_ref().expect("the target tells its user");
    assert!(told.contains(here), "{told}");
    assert!(outcome.far.is_none());
}

#[test]
fn ends_of_one_authority_meet() {
    let office = Office::new();
    for name in [None, Some("target.example")] {
        let target = office.end("target.example").identity().unwrap();
        let outcome = connect(target, Some((office.end("source.example"), name)));
        assert!(outcome.near.is_ok() && outcome.far.is_some(), "{:?}", outcome.near.err());
    }
    let by_address = office.end("127.0.0.1").identity().unwrap();
    assert!(connect(by_address, Some((office.end("s"), Some("127.0.0.1")))).near.is_ok());
}

#[test]
fn a_target_of_another_authority_is_refused() {
    let (office, other) = (Office::new(), Office::new());
    let target = other.end("target.example").identity().unwrap();
    source_refuses(&connect(target, Some((office.end("s"), None))), "not issued by the authority");
}

#[test]
fn a_target_of_another_name_is_refused() {
    let office = Office::new();
    let target = office.end("target.example").identity().unwrap();
    let outcome = connect(target, Some((office.end("s"), Some("elsewhere.example"))));
    source_refuses(&outcome, "for another name");
}

#[test]
fn a_target_whose_certificate_has_expired_is_refused() {
    let office = Office::new();
    let target = office.end_with(&office.ca(), "target.example", |params| {
        (params.not_before, params.not_after) = (date_time_ymd(2001, 1, 1), date_time_ymd(2002, 1, 1));
    });
    source_refuses(&connect(target.identity().unwrap(), Some((office.end("s"), None))), "expired");
}

/// The authority's word is not enough: the token is for one target.
#[test]
fn another_target_of_the_same_authority_is_refused() {
    let office = Office::new();
    let pin = office.end("target.example").identity().unwrap().fingerprint();
    let other = office.end("other.example").identity().unwrap();
    let outcome = connect_to(pin, other, Some((office.end("s"), None)));
    assert!(matches!(outcome.near, Err(NetError::OtherKey { .. })));
    assert!(outcome.far.is_none());
}

#[test]
fn a_source_without_a_certificate_is_refused() {
    let office = Office::new();
    let target = office.end("target.example").identity().unwrap();
    let outcome = connect(target, None);
    let error = outcome.near.err().expect("it is refused").to_string();
    assert!(error.contains("--ca"), "{error}");
    assert!(outcome.far.is_none() && outcome.told.is_some());
}

#[test]
fn a_source_of_another_authority_is_refused() {
    let (office, other) = (Office::new(), Office::new());
    let target = office.end("target.example").identity().unwrap();
    // It trusts the right one, and shows another's.
    let source = other.end_with(&office.ca(), "source.example", |_| {});
    let outcome = connect(target, Some((source, None)));
    target_refuses(&outcome, "authority the other end trusts", "not issued by the authority");
}

#[test]
fn a_source_whose_certificate_has_expired_is_refused() {
    let office = Office::new();
    let target = office.end("target.example").identity().unwrap();
    let source = office.end_with(&office.ca(), "source.example", |params| {
        (params.not_before, params.not_after) = (date_time_ymd(2001, 1, 1), date_time_ymd(2002, 1, 1));
    });
    target_refuses(&connect(target, Some((source, None))), "expired", "expired");
}

#[test]
fn files_that_are_not_what_they_should_be_are_named() {
    let office = Office::new();
    let (cert, key) = office.files("one.example", |_| {});
    let (_, other) = office.files("two.example", |_| {});
    let nowhere = Path::new("/nowhere/file");
    let ca = office.ca();
    for (ca, cert, key, words) in [
        (nowhere, cert.as_path(), key.as_path(), "No such file"),
        (&key, &cert, &key, "no certificate in it"),
        (&ca, &key, &key, "no certificate in it"),
        (&ca, &cert, &cert, "no private key in it"),
        (&ca, &cert, &other, "not the key of the certificate"),
    ] {
        let error = Authority::load(ca, cert, key).unwrap_err().to_string();
        assert!(error.starts_with("cannot use /") && error.contains(words), "{error}");
    }
    assert!(!format!("{:?}", office.end("one.example")).contains("BEGIN"), "a key is not printed");
}
