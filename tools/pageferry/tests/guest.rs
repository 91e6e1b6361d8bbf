//! `pageferry guest` as its user meets it: real processes, a runtime directory of their own.

use std::path::Path;
use std::process::{Command, Output};

/// Runs the program with its sockets in `runtime`.
fn pageferry(runtime: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_pageferry"))
        .args(arguments)
        .env("XDG_RUNTIME_DIR", runtime)
        .output()
        .expect("the program starts")
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn a_guest_from_start_to_stop() {
    let runtime = tempfile::tempdir().expect("a temporary directory");
    let run = |arguments: &[&str]| pageferry(runtime.path(), arguments);
    let started = run(&["guest", "start", "one", "--memory", "16M", "--workload", "memory-hog", "--json"]);
    assert!(started.status.success(), "{}", stderr(&started));
    let status: serde_json::Value = serde_json::from_str(&stdout(&started)).expect("one JSON object");
    assert_eq!(status["guest"], "one");
    assert_eq!(status["memory_bytes"], 16 << 20);

    let again = run(&["guest", "start", "one", "--memory", "16M"]);
    assert_eq!(again.status.code(), Some(7), "{}", stderr(&again));
    assert!(stderr(&again).contains("already running"), "{}", stderr(&again));

    let list = run(&["guest", "list"]);
    assert!(stdout(&list).starts_with("one: running, 16.0 MiB, memory-hog"), "{}", stdout(&list));
    let check = run(&["guest", "check", "one"]);
    assert!(check.status.success() && stdout(&check).contains("none wrong"), "{}", stdout(&check));

    assert!(run(&["guest", "stop", "one"]).status.success());
    let pid = status["pid"].as_u64().expect("a pid");
    for _ in 0..200 {
        if !Path::new(&format!("/proc/{pid}/cmdline")).exists() {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    let list = run(&["guest", "list", "--quiet"]);
    assert!(list.status.success() && stdout(&list).is_empty(), "{}", stdout(&list));
    let gone = run(&["guest", "status", "one"]);
    assert!(!gone.status.success() && stderr(&gone).contains("one"), "{}", stderr(&gone));
}

#[test]
fn wrong_values_are_named_and_classed() {
    let runtime = tempfile::tempdir().expect("a temporary directory");
    let cases: [(&[&str], i32, &str); 4] = [
        (&["guest", "start", "x", "--memory", "5M"], 2, "multiple of 2M"),
        (&["guest", "start", "x", "--memory", "lots"], 2, "does not begin with a number"),
        (&["guest", "start", "../x"], 2, "can't be named"),
        (&["guest", "start", "x", "--disk", "/nowhere/image"], 6, "/nowhere/image"),
    ];
    for (arguments, code, text) in cases {
        let output = pageferry(runtime.path(), arguments);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {}", stderr(&output));
        assert!(stderr(&output).contains(text), "{arguments:?}: {}", stderr(&output));
        assert!(stdout(&output).is_empty(), "{arguments:?}");
    }
}
