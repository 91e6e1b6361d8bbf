//! `pageferry receive` and `pageferry send` in two processes, as in two shells: what is printed can be pasted, what is
//! wrong is refused, and the guest is always somewhere.

mod host;

use std::path::Path;
use std::process::Output;

use host::{Host, end, said};

#[test]
fn what_receive_prints_moves_the_guest() {
    let Some(host) = Host::new() else { return };
    let (target, line) = host.receive(&[]);
    let wrong = host.send(&line, |line| {
        let (rest, token) = line.rsplit_once(' ').expect("the token comes last");
        let (token, fingerprint) = token.split_once('-').expect("encrypted unless told otherwise");
        format!("{rest} {}-{fingerprint}", "0".repeat(token.len()))
    });
    assert_eq!(wrong.status.code(), Some(5), "{}", said(&wrong));
    assert!(said(&wrong).contains("token"), "{}", said(&wrong));
    assert!(host.runs("desk"), "a refused migration changes nothing");

    // Another target's key: whoever answers there is told nothing.
    let other = host.send(&line, |line| {
        let (rest, _) = line.rsplit_once('-').expect("the fingerprint comes last");
        format!("{rest}-{}", "0".repeat(64))
    });
    assert_eq!(other.status.code(), Some(5), "{}", said(&other));
    assert!(said(&other).contains("another key"), "{}", said(&other));
    assert!(host.runs("desk"), "a refused migration changes nothing");

    let sent = host.send(&line, |line| format!("{line} --verify --json"));
    assert!(sent.status.success(), "{}", said(&sent));
    let summary: serde_json::Value = serde_json::from_slice(&sent.stdout).expect("one JSON object");
    assert_eq!(summary["mode"], "lazy");
    assert_eq!(summary["send_path"], "encrypted");
    assert_eq!(summary["verified_pages"], (32 << 20) / 4096);
    assert_eq!(summary["mismatched_pages"], 0);
    assert!(summary["pages_by_reference"].as_u64() > Some(0), "{summary}");
    assert_eq!(end(target), Some(0));
    assert!(host.runs("moved"));
    assert!(host.must(&["guest", "check", "moved"]).contains("none wrong"));
    assert!(host.must(&["resolve", "--quiet"]).is_empty(), "nothing is left in doubt");
}

#[test]
fn refusals_name_their_cause_and_leave_the_guest() {
    let Some(host) = Host::new() else { return };
    let refused = |output: Output, code: i32, word: &str| {
        assert_eq!(output.status.code(), Some(code), "{}", said(&output));
        assert!(said(&output).contains(word), "{}", said(&output));
        assert!(host.runs("desk"));
    };
    let token = format!("{0}-{0}", "0".repeat(64));
    let nobody = ["send", "--guest", "desk", "--to", "127.0.0.1:1", "--token", &token];
    refused(host.run(&nobody), 4, "receive");
    refused(
        host.run(&["send", "--guest", "desk", "--to", "127.0.0.1:1", "--token", "abc"]),
        2,
        "64 hexadecimal",
    );
    let clear = "0".repeat(64);
    let unsaid = ["send", "--guest", "desk", "--to", "127.0.0.1:1", "--token", &clear];
    refused(host.run(&unsaid), 2, "say --plaintext here too");
    let too_much = ["send", "--plaintext", "--guest", "desk", "--to", "127.0.0.1:1", "--token", &token];
    refused(host.run(&too_much), 2, "leave --plaintext away");
    refused(
        host.run(&["send", "--guest", "other", "--to", "127.0.0.1:1", "--token", &token]),
        7,
        "guest list",
    );

    // Another disk under the same name: the guest would run on something else.
    let other = host.path("other.img");
    let other = other.to_str().expect("a plain name");
    host.must(&["image", other, "--size", "64M", "--from", "/etc"]);
    let (target, line) = host.receive(&["--disk", &format!("disk0={other}")]);
    refused(host.send(&line, str::to_owned), 6, "not the disk");
    assert_ne!(end(target), Some(0));
    assert!(!host.runs("moved"), "nothing is left on the target");

    // A taken address.
    let (mut target, line) = host.receive(&[]);
    let address = line.split_whitespace().nth(5).expect("an address");
    refused(host.run(&["receive", "--listen", address]), 4, "listens there");
    target.kill().expect("it runs");
    end(target);
}

/// In the clear where both sides say so, and only then.
#[test]
fn plaintext_is_for_who_asks_for_it() {
    let Some(host) = Host::new() else { return };
    let (target, line) = host.receive(&["--plaintext"]);
    let unsaid = host.send(&line, |line| line.replace("--plaintext ", ""));
    assert_eq!(unsaid.status.code(), Some(2), "{}", said(&unsaid));
    let sent = host.send(&line, |line| format!("{line} --json"));
    assert!(sent.status.success(), "{}", said(&sent));
    let summary: serde_json::Value = serde_json::from_slice(&sent.stdout).expect("one JSON object");
    assert_eq!(summary["send_path"], "copy");
    assert_eq!(end(target), Some(0));
    assert!(host.must(&["guest", "check", "moved"]).contains("none wrong"));
}

#[test]
fn a_plan_moves_nothing() {
    let Some(host) = Host::new() else { return };
    let plan = host.must(&["plan", "--guest", "desk", "--sample", "1s", "--json"]);
    let plan: serde_json::Value = serde_json::from_str(&plan).expect("one JSON object");
    assert_eq!(plan["pages"], (32 << 20) / 4096);
    assert!(plan["hit_rate"].as_f64() > Some(0.3), "{plan}");
    assert_eq!(plan["modes"].as_array().map(Vec::len), Some(4));
    assert!(host.runs("desk"));
    let missing = host.run(&["index", "stat", Path::new("/nowhere/image").to_str().expect("a plain name")]);
    assert_eq!(missing.status.code(), Some(6), "{}", said(&missing));
}
