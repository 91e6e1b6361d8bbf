//! The exit codes are what the manual says they are: for each class that can be provoked from a shell, what provokes it.
//! (1 is for what must not happen; 9 is in `in_doubt.rs`.)

mod host;

use std::fs;
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use host::{Host, end, said};

/// The program, with directories of its own.
fn pageferry(place: &tempfile::TempDir, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pageferry"));
    command.env("XDG_RUNTIME_DIR", place.path()).env("XDG_STATE_HOME", place.path());
    command.args(arguments).output().expect("the program starts")
}

/// It exits with that, and says a sentence with these words.
fn refused(output: &Output, code: i32, words: &str) {
    assert_eq!(output.status.code(), Some(code), "{}", said(output));
    assert!(said(output).contains(words), "{}", said(output));
}

#[test]
fn the_list_is_in_the_help_and_in_the_manual() {
    let place = tempfile::tempdir().expect("a directory");
    let help = pageferry(&place, &["help", "exit-codes"]);
    assert!(help.status.success());
    let help = String::from_utf8_lossy(&help.stdout).into_owned();
    let page = pageferry(&place, &["man"]);
    let page = String::from_utf8_lossy(&page.stdout).into_owned();
    for code in 0..=10 {
        assert!(
            help.lines().any(|line| line.trim_start().starts_with(&format!("{code}  "))),
            "{code}: {help}"
        );
        assert!(page.contains(&format!("\\fB{code}\\fR\n")), "{code}: {page}");
    }
}

#[test]
fn what_needs_no_migration_fails_with_its_class() {
    let place = tempfile::tempdir().expect("a directory");
    refused(&pageferry(&place, &["--nonsense"]), 2, "--nonsense");
    let send = ["send", "--guest", "nobody", "--to", "127.0.0.1:1", "--token"];
    refused(&pageferry(&place, &[&send[..], &["abc"]].concat()), 2, "not a token");
    refused(&pageferry(&place, &["doctor", "--path", "/nowhere"]), 2, "/nowhere");
    refused(&pageferry(&place, &["man", "--dir", "/proc/nowhere"]), 3, "/proc/nowhere");
    refused(&pageferry(&place, &["receive", "--listen", "203.0.113.9:1"]), 4, "203.0.113.9");
    refused(&pageferry(&place, &["receive", "--listen", "127.0.0.1:0", "--wait", "100ms"]), 4, "silent");
    refused(&pageferry(&place, &["index", "stat", "/nowhere"]), 6, "/nowhere");
    refused(&pageferry(&place, &["guest", "status", "nobody"]), 7, "nobody");
    let token = "a5".repeat(32);
    refused(&pageferry(&place, &[&send[..], &[&token, "--plaintext"]].concat()), 7, "nobody");
    let junk = place.path().join("junk");
    fs::write(&junk, [0xa5; 5000]).expect("it is written");
    refused(&pageferry(&place, &["stream", "verify", junk.to_str().expect("a path")]), 10, "byte 0");
}

#[test]
fn a_migration_that_fails_does_so_with_its_class_at_both_ends() {
    let Some(host) = Host::new() else { return };
    let token = "a5".repeat(32);
    let nobody = ["send", "--guest", "desk", "--to", "127.0.0.1:1", "--plaintext", "--token", &token];
    refused(&host.run(&nobody), 4, "127.0.0.1:1");
    assert!(host.runs("desk"));

    // Another token than the target's: it hangs up, and goes on waiting.
    let (mut target, line) = host.receive(&[]);
    let other = host.send(&line, |line| {
        let word = line.split("--token ").nth(1).expect("a token").trim();
        let print = word.split_once('-').expect("a fingerprint").1;
        line.replace(word, &format!("{token}-{print}"))
    });
    refused(&other, 5, "token");
    assert!(host.runs("desk"));

    // Cancelled here: 8 at both ends.
    let line = line.replace("NAME", "desk");
    let mut command = host.command();
    command.args(line.split_whitespace().skip(1)).args(["--bandwidth", "1MiB/s"]);
    let mut source = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("it starts");
    let begun = Instant::now();
    while host.must(&["status", "--json", "--quiet"]).lines().count() < 2 {
        assert!(begun.elapsed() < Duration::from_secs(60), "the migration never began");
        assert!(target.try_wait().expect("it can be asked").is_none());
        thread::sleep(Duration::from_millis(10));
    }
    let pid = rustix::process::Pid::from_child(&source);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).expect("it runs");
    assert_eq!(source.wait().expect("it can be waited for").code(), Some(8));
    assert_eq!(end(target), Some(8));
    assert!(host.runs("desk"));
}
