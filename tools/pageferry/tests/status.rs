//! What runs is shown while it runs, under the number that events and records have, and what has ended is not.

mod host;

use std::io::{BufRead, BufReader};
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use host::{Host, LIMIT, end};
use serde_json::Value;

fn shown(host: &Host) -> Vec<Value> {
    let text = host.must(&["status", "--json", "--quiet"]);
    text.lines().map(|line| serde_json::from_str(line).expect("a JSON object a line")).collect()
}

#[test]
fn both_ends_are_shown_while_they_run_and_gone_afterwards() {
    let Some(host) = Host::new() else { return };
    assert!(shown(&host).is_empty());
    let (target, line) = host.receive(&[]);
    assert!(shown(&host).is_empty(), "who waits for a source has no migration yet");
    let line = line.replace("NAME", "desk");
    let mut command = host.command();
    command.args(line.split_whitespace().skip(1)).args(["--bandwidth", "4MiB/s", "--max-rounds", "4"]);
    let mut source =
        command.arg("--json-events").stdout(Stdio::piped()).stderr(Stdio::null()).spawn().expect("it starts");
    let events = source.stdout.take().expect("a pipe");
    let events =
        thread::spawn(move || BufReader::new(events).lines().map_while(Result::ok).collect::<Vec<_>>());
    let began = Instant::now();
    let both = loop {
        let all = shown(&host);
        let sampled = all.iter().any(|one| one["sample"]["link_bytes"].as_u64() > Some(0));
        if all.len() == 2 && sampled {
            break all;
        }
        assert!(began.elapsed() < LIMIT, "{all:?}");
        thread::sleep(Duration::from_millis(10));
    };
    assert_eq!(both[0]["migration"], both[1]["migration"]);
    let of = |role: &str| both.iter().find(|one| one["role"] == role).expect("both ends run here");
    assert_eq!(of("source")["guest"], "desk");
    assert_eq!(of("source")["pid"], source.id());
    assert_eq!(of("target")["guest"], "moved");
    assert_eq!(of("target")["pid"], target.id());
    assert!(host.must(&["status"]).contains("desk to 127.0.0.1:"));

    assert!(source.wait().expect("it can be waited for").success());
    assert_eq!(end(target), Some(0));
    assert!(shown(&host).is_empty());
    let events = events.join().expect("it read");
    assert!(events.len() > 5);
    for event in events {
        let event: Value = serde_json::from_str(&event).expect("a JSON object a line");
        assert_eq!(event["migration"], both[0]["migration"], "{event}");
    }
}

/// An end that was killed is not shown as running; what it left is named once and cleared.
#[test]
fn a_killed_end_is_not_shown() {
    let Some(host) = Host::new() else { return };
    let (mut source, target) = host.begin(|host| shown(host).len() >= 2);
    source.kill().expect("it runs");
    source.wait().expect("it can be waited for");
    assert_ne!(end(target), Some(0));
    let told = host.run(&["status"]);
    assert!(host::said(&told).contains("ended without a word"), "{}", host::said(&told));
    assert!(shown(&host).is_empty());
    let told = host.run(&["status"]);
    assert!(host::said(&told).contains("no migration runs here"), "{}", host::said(&told));
}
