//! `pageferry receive` and `pageferry send` in two processes, as in two shells: what is printed can be pasted, what is
//! wrong is refused, and the guest is always somewhere.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

/// A host of its own: directories, an image, a guest called `desk`.
struct Host {
    directory: tempfile::TempDir,
}

impl Host {
    fn new() -> Option<Self> {
        let host = Self { directory: tempfile::tempdir_in("/var/tmp").expect("a temporary directory") };
        if !host.run(&["doctor", "--quiet"]).status.success() {
            eprintln!(
                "SKIPPED: two ends: this kernel lacks something no migration works without (pageferry doctor)"
            );
            return None;
        }
        let image = host.image();
        let image = image.to_str().expect("a plain name");
        host.must(&["image", image, "--size", "64M"]);
        host.must(&["index", "build", image]);
        host.must(&["guest", "start", "desk", "--memory", "32M", "--disk", image]);
        Some(host)
    }
    fn image(&self) -> PathBuf {
        self.directory.path().join("disk.img")
    }
    fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pageferry"));
        command.env("XDG_RUNTIME_DIR", self.path("run")).env("XDG_STATE_HOME", self.path("state"));
        command
    }
    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }
    fn run(&self, arguments: &[&str]) -> Output {
        self.command().args(arguments).output().expect("the program starts")
    }
    fn must(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        assert!(output.status.success(), "{arguments:?}: {}", said(&output));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }
    /// Starts a target; its process and the command it prints for the source.
    fn receive(&self, more: &[&str]) -> (Child, String) {
        let mut target = self
            .command()
            .args(["receive", "--listen", "127.0.0.1:0", "--name", "moved", "--quiet"])
            .args(more)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("the program starts");
        let stdout = target.stdout.take().expect("a pipe");
        let line = BufReader::new(stdout).lines().next().expect("a line").expect("text");
        (target, line)
    }
    /// Runs what `receive` printed, changed by `change`.
    fn send(&self, line: &str, change: impl Fn(&str) -> String) -> Output {
        let line = change(&line.replace("NAME", "desk"));
        let words: Vec<_> = line.split_whitespace().skip(1).collect();
        self.run(&words)
    }
    fn runs(&self, guest: &str) -> bool {
        self.must(&["guest", "list", "--quiet"]).contains(&format!("{guest}: running"))
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // Those that are not there any more: as good.
        for guest in ["desk", "moved"] {
            let _ = self.command().args(["guest", "stop", guest, "--quiet"]).output();
        }
    }
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn end(mut target: Child) -> Option<i32> {
    target.wait().expect("it can be waited for").code()
}

#[test]
fn what_receive_prints_moves_the_guest() {
    let Some(host) = Host::new() else { return };
    let (target, line) = host.receive(&[]);
    let wrong = host.send(&line, |line| {
        let (rest, token) = line.rsplit_once(' ').expect("the token comes last");
        format!("{rest} {}", "0".repeat(token.len()))
    });
    assert_eq!(wrong.status.code(), Some(5), "{}", said(&wrong));
    assert!(said(&wrong).contains("token"), "{}", said(&wrong));
    assert!(host.runs("desk"), "a refused migration changes nothing");

    let sent = host.send(&line, |line| format!("{line} --verify --json"));
    assert!(sent.status.success(), "{}", said(&sent));
    let summary: serde_json::Value = serde_json::from_slice(&sent.stdout).expect("one JSON object");
    assert_eq!(summary["mode"], "lazy");
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
    let token = "0".repeat(64);
    let nobody = ["send", "--guest", "desk", "--to", "127.0.0.1:1", "--token", &token];
    refused(host.run(&nobody), 4, "receive");
    refused(
        host.run(&["send", "--guest", "desk", "--to", "127.0.0.1:1", "--token", "abc"]),
        2,
        "64 hexadecimal",
    );
    refused(
        host.run(&["send", "--guest", "other", "--to", "127.0.0.1:1", "--token", &token]),
        3,
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
