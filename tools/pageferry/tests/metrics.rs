//! What `pageferry metrics` says is Prometheus' text format to the letter, and true: while a guest moves, when it has
//! moved, and when it could not.

mod host;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use host::{Host, LIMIT, end};

/// Samples by name and labels.
type Samples = BTreeMap<String, f64>;

/// Reads the format as strictly as its description allows: every family once, with its help, its type and then its
/// samples; names, labels and values of the right form; base units in names. Panics on anything else.
fn strict(text: &str) -> Samples {
    let mut samples = Samples::new();
    let mut families = BTreeSet::new();
    let (mut helped, mut family) = (None::<&str>, None::<(&str, &str)>);
    assert!(text.ends_with('\n'), "the last line has to end too");
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            let (name, help) = rest.split_once(' ').expect("a help text");
            assert!(!help.is_empty() && families.insert(name), "{line}: a family stands in one place");
            assert!(is_name(name) && name.starts_with("pageferry_"), "{line}");
            (helped, family) = (Some(name), None);
        } else if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').expect("a type");
            assert_eq!(helped.take(), Some(name), "{line}: it follows its help");
            assert!(["counter", "gauge"].contains(&kind), "{line}");
            assert_eq!(kind == "counter", name.ends_with("_total"), "{line}: counters end in _total");
            for unit in ["_ms", "_us", "millis", "_kib", "_mib", "percent", "minutes"] {
                assert!(!name.contains(unit), "{line}: base units only");
            }
            family = Some((name, kind));
        } else {
            let (name, kind) = family.unwrap_or_else(|| panic!("{line}: no type before it"));
            let (series, value) = line.rsplit_once(' ').expect("a value");
            let labels = series.strip_prefix(name).unwrap_or_else(|| panic!("{line}: not of {name}"));
            labels_are_right(labels);
            let value: f64 = value.parse().unwrap_or_else(|_| panic!("{line}: no number"));
            assert!(kind != "counter" || value >= 0.0, "{line}: counters don't go below nothing");
            assert!(samples.insert(series.to_owned(), value).is_none(), "{line}: twice");
        }
    }
    samples
}

fn is_name(name: &str) -> bool {
    let first = name.chars().next().is_some_and(|c| c.is_ascii_alphabetic() || c == '_');
    first && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
}

fn labels_are_right(mut text: &str) {
    if text.is_empty() {
        return;
    }
    text = text.strip_prefix('{').and_then(|text| text.strip_suffix('}')).expect("labels in braces");
    let mut seen = BTreeSet::new();
    loop {
        let (name, rest) = text.split_once("=\"").expect("a label and its value");
        assert!(is_name(name) && seen.insert(name), "{name}");
        let mut escaped = false;
        let close = rest.char_indices().find_map(|(at, c)| {
            let end = c == '"' && !escaped;
            assert!(!escaped || ['\\', '"', 'n'].contains(&c), "an escape of {c}");
            escaped = c == '\\' && !escaped;
            end.then_some(at)
        });
        text = &rest[close.expect("a closing quote") + 1..];
        match text.strip_prefix(',') {
            Some(more) => text = more,
            None => break,
        }
    }
    assert_eq!(text, "");
}

fn value(samples: &Samples, name: &str, labels: &[&str]) -> Option<f64> {
    let found = |series: &&String| {
        series.split('{').next() == Some(name) && labels.iter().all(|label| series.contains(label))
    };
    let mut all = samples.keys().filter(found);
    let one = all.next()?;
    assert_eq!(all.next(), None, "{name} {labels:?} is more than one series");
    samples.get(one).copied()
}

fn scrape(host: &Host) -> Samples {
    strict(&host.must(&["metrics", "--quiet"]))
}

#[test]
fn a_migration_is_counted_while_it_runs_and_when_it_has_ended() {
    let Some(host) = Host::new() else { return };
    let idle = scrape(&host);
    assert_eq!(value(&idle, "pageferry_migrations_running", &["source"]), Some(0.0));
    assert_eq!(value(&idle, "pageferry_migrations_ended_total", &["source", "success"]), Some(0.0));

    let (target, line) = host.receive(&[]);
    let line = line.replace("NAME", "desk");
    let mut command = host.command();
    command.args(line.split_whitespace().skip(1)).args(["--bandwidth", "4MiB/s", "--max-rounds", "4"]);
    let mut source = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("it starts");
    let begun = Instant::now();
    let running = loop {
        let seen = scrape(&host);
        let bytes = value(&seen, "pageferry_migration_link_bytes_total", &["source"]);
        if bytes > Some(0.0) && value(&seen, "pageferry_migrations_running", &["target"]) == Some(1.0) {
            break seen;
        }
        assert!(begun.elapsed() < LIMIT, "{seen:?}");
        thread::sleep(Duration::from_millis(10));
    };
    assert_eq!(value(&running, "pageferry_migrations_running", &["source"]), Some(1.0));
    assert_eq!(value(&running, "pageferry_migrations_unsettled", &[]), Some(0.0), "they run");
    let phases = running.iter().filter(|(series, _)| {
        series.starts_with("pageferry_migration_phase{") && series.contains("role=\"source\"")
    });
    assert!(phases.map(|(_, value)| value).sum::<f64>() <= 1.0, "one phase at a time");
    assert!(source.wait().expect("it can be waited for").success());
    assert_eq!(end(target), Some(0));

    let after = scrape(&host);
    assert_eq!(value(&after, "pageferry_migrations_running", &["source"]), Some(0.0));
    for role in ["source", "target"] {
        let ended = value(&after, "pageferry_migrations_ended_total", &[role, "success"]);
        assert_eq!(ended, Some(1.0), "{role}");
    }
    assert!(!after.keys().any(|series| series.starts_with("pageferry_migration_")), "nothing runs");
    let pages: f64 = after
        .iter()
        .filter(|(series, _)| series.starts_with("pageferry_moved_pages_total"))
        .map(|(_, value)| value)
        .sum();
    assert!(pages >= f64::from(32 << 8), "{pages} pages of a guest of 32 MiB");
    assert!(value(&after, "pageferry_moved_downtime_seconds_total", &[]) > Some(0.0));
}

/// An end that was killed is seen; so is the failure it means for the other one, and the record it leaves.
#[test]
fn what_failed_is_counted_by_its_class() {
    let Some(host) = Host::new() else { return };
    let (mut source, target) =
        host.begin(|host| value(&scrape(host), "pageferry_migrations_running", &["target"]) == Some(1.0));
    source.kill().expect("it runs");
    source.wait().expect("it can be waited for");
    let code = end(target);
    let seen = scrape(&host);
    assert_eq!(value(&seen, "pageferry_migrations_forsaken", &[]), Some(1.0));
    assert!(value(&seen, "pageferry_migrations_unsettled", &[]) >= Some(1.0), "the killed one's record");
    let failed: f64 = seen
        .iter()
        .filter(|(series, _)| {
            series.starts_with("pageferry_migrations_ended_total{role=\"target\"")
                && !series.contains("success")
        })
        .map(|(_, value)| value)
        .sum();
    assert_eq!(failed, 1.0, "the target ended with {code:?}");
}

fn ask(path: &std::path::Path, question: &str) -> String {
    let mut stream = UnixStream::connect(path).expect("somebody listens");
    stream.write_all(question.as_bytes()).expect("it is asked");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer");
    answer
}

#[test]
fn a_scraper_asks_on_the_socket() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("metrics.sock");
    let program = || {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_pageferry"));
        command.env("XDG_RUNTIME_DIR", directory.path()).env("XDG_STATE_HOME", directory.path());
        command.args(["--quiet", "metrics", "--socket"]).arg(&path);
        command
    };
    // Left behind by one that was killed: nobody answers there.
    drop(std::os::unix::net::UnixListener::bind(&path).expect("a socket"));
    let mut server = program().spawn().expect("it starts");
    let begun = Instant::now();
    while UnixStream::connect(&path).is_err() {
        assert!(begun.elapsed() < LIMIT, "nobody listens");
        thread::sleep(Duration::from_millis(10));
    }
    // One who says nothing holds up the next for a moment, not for good.
    let silent = UnixStream::connect(&path).expect("somebody listens");
    let answer = ask(&path, "GET /metrics HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n\r\n");
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head and a body");
    assert!(head.starts_with("HTTP/1.0 200 OK\r\n"), "{head}");
    assert!(head.contains("\r\nContent-Type: text/plain; version=0.0.4"), "{head}");
    assert!(head.contains(&format!("\r\nContent-Length: {}\r\n", body.len())), "{head}");
    assert!(strict(body).contains_key("pageferry_migrations_running{role=\"source\"}"));
    assert!(ask(&path, "GET /other HTTP/1.0\r\n\r\n").starts_with("HTTP/1.0 404 "));
    assert!(ask(&path, "POST /metrics HTTP/1.0\r\n\r\n").starts_with("HTTP/1.0 405 "));
    drop(silent);

    let second = program().output().expect("it starts");
    assert_eq!(second.status.code(), Some(2), "somebody answers there already");
    let pid = rustix::process::Pid::from_child(&server);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("it runs");
    assert!(server.wait().expect("it can be waited for").success());
    assert!(!path.exists(), "the socket is left behind");
}
