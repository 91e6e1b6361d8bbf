//! Lanes between hosts that an operator's authority has certified, and what becomes of a migration where one is not: its pages
//! stay in the stream, and a line says why.

use std::path::PathBuf;

use mover::net::tls::Authority;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};

use super::*;

/// An authority, and the directory its files are in.
pub(super) struct Office {
    issuer: CertifiedIssuer<'static, KeyPair>,
    place: tempfile::TempDir,
}

impl Office {
    pub(super) fn new(name: &str) -> Self {
        let mut params = CertificateParams::new(Vec::<String>::new()).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let place = tempfile::tempdir().unwrap();
        std::fs::write(place.path().join("ca"), issuer.pem()).unwrap();
        Self { issuer, place }
    }

    /// What the host of that name goes by.
    pub(super) fn host(&self, name: &str, peer_name: Option<&str>) -> Option<Credentials> {
        let key = KeyPair::generate().unwrap();
        let cert =
            CertificateParams::new(vec![name.to_owned()]).unwrap().signed_by(&key, &self.issuer).unwrap();
        let path = |kind: &str| -> PathBuf { self.place.path().join(format!("{name}.{kind}")) };
        std::fs::write(path("cert"), cert.pem()).unwrap();
        std::fs::write(path("key"), key.serialize_pem()).unwrap();
        let authority = Authority::load(&self.place.path().join("ca"), &path("cert"), &path("key")).unwrap();
        Some(Credentials { authority, peer_name: peer_name.map(str::to_owned) })
    }
}

/// Moves a guest between ends with these; whether its pages went by lanes, and what the target's toolstack was told.
fn moved(source: Option<Credentials>, target: Option<Credentials>) -> (bool, Vec<String>) {
    let guest = Guest::new(800);
    let mut journey = Journey::new(Plan { credentials: source, ..plan(Mode::Plain) });
    journey.credentials = target;
    let trip = journey.go(&guest, &mut patient());
    let saved = trip.saved.unwrap();
    trip.restored.unwrap();
    assert_same(&guest, &trip.copy);
    (saved.ferried.is_some(), trip.target_notes)
}

#[test]
fn hosts_that_an_authority_has_certified_find_each_other() {
    let office = Office::new("ours");
    let (lanes, notes) = moved(office.host("127.0.0.1", None), office.host("target", None));
    assert!(lanes && notes.is_empty(), "{notes:?}");
    // By another name than the address dialled.
    let (lanes, notes) =
        moved(office.host("source.example", None), office.host("target", Some("source.example")));
    assert!(lanes && notes.is_empty(), "{notes:?}");
}

#[test]
fn who_is_not_certified_gets_no_lanes_and_is_told() {
    let (ours, theirs) = (Office::new("ours"), Office::new("theirs"));
    let source = || ours.host("127.0.0.1", None);
    for (what, source, target, words) in [
        ("a target that shows nothing", source(), None, "--ca"),
        ("a target of another authority's", source(), theirs.host("target", None), "--ca"),
        ("a source that has none", None, ours.host("target", None), "could not be taken up"),
        ("a source for another name", ours.host("another", None), ours.host("target", None), "--peer-name"),
        ("another name asked for", source(), ours.host("target", Some("source.example")), "--peer-name"),
    ] {
        let (lanes, notes) = moved(source, target);
        assert!(!lanes, "{what} has got lanes");
        assert!(notes.iter().any(|note| note.contains(words)), "{what}: {notes:?}");
    }
}
