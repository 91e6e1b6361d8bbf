//! Both ends under an operator's authority: real processes, certificates made as they are needed.

mod host;

use std::fs;
use std::path::Path;

use host::{Host, end, said};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};

/// Writes an authority's certificate into `place`, and those of hosts with these names.
fn office(place: &Path, authority: &str, hosts: &[&str]) {
    let mut params = CertificateParams::new(Vec::<String>::new()).expect("no names");
    params.distinguished_name.push(DnType::CommonName, authority);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let issuer =
        CertifiedIssuer::self_signed(params, KeyPair::generate().expect("a key")).expect("it is signed");
    let write = |name: String, text: String| fs::write(place.join(name), text).expect("it is written");
    write(format!("{authority}.ca"), issuer.pem());
    for host in hosts {
        let key = KeyPair::generate().expect("a key");
        let params = CertificateParams::new(vec![(*host).to_owned()]).expect("a name");
        let cert = params.signed_by(&key, &issuer).expect("it is signed");
        write(format!("{authority}.{host}.cert"), cert.pem());
        write(format!("{authority}.{host}.key"), key.serialize_pem());
    }
}

/// The flags of that host under that authority.
fn flags(place: &Path, authority: &str, host: &str) -> [String; 6] {
    let path = |name: String| place.join(name).display().to_string();
    [
        "--ca".to_owned(),
        path(format!("{authority}.ca")),
        "--cert".to_owned(),
        path(format!("{authority}.{host}.cert")),
        "--key".to_owned(),
        path(format!("{authority}.{host}.key")),
    ]
}

/// What `receive` printed, with a source's own flags in the place of those it can't know.
fn with_flags(line: &str, flags: &[String]) -> String {
    let printed = "--ca FILE --cert FILE --key FILE";
    assert!(line.contains(printed), "{line}");
    line.replace(printed, &flags.join(" "))
}

#[test]
fn two_hosts_of_one_authority_move_a_guest() {
    let Some(host) = Host::new() else { return };
    let place = tempfile::tempdir().expect("a directory");
    office(place.path(), "ours", &["target.example", "source.example"]);
    office(place.path(), "theirs", &["source.example"]);
    let own = flags(place.path(), "ours", "target.example");
    let own: Vec<&str> = own.iter().map(String::as_str).collect();
    let (target, line) = host.receive(&own);
    let ours = flags(place.path(), "ours", "source.example");
    let theirs = flags(place.path(), "theirs", "source.example");
    let by_name =
        |line: &str, flags: &[String]| format!("{} --peer-name target.example", with_flags(line, flags));
    let wrong: [(&str, String); 4] = [
        ("127.0.0.1 is not what it is certified for", with_flags(&line, &ours)),
        ("another name", with_flags(&line, &ours) + " --peer-name another.example"),
        ("a source that shows nothing", line.replace(" --ca FILE --cert FILE --key FILE", "")),
        ("a source of another authority's", by_name(&line, &theirs)),
    ];
    for (what, line) in wrong {
        let sent = host.send(&line, str::to_owned);
        let words = said(&sent);
        assert!(!sent.status.success(), "{what}: {words}");
        assert!(
            ["certificate", "another name", "--ca"].iter().any(|word| words.contains(word)),
            "{what}: {words}"
        );
        assert!(host.runs("desk") && !host.runs("moved"), "{what}: {words}");
    }
    // It has waited for the right one meanwhile.
    let sent = host.send(&line, |line| format!("{} --verify", by_name(line, &ours)));
    assert!(sent.status.success(), "{}", said(&sent));
    assert_eq!(end(target), Some(0));
    assert!(host.runs("moved"));
}
