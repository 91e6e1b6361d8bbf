//! What the two ends can still do while a guest is on its way between them.

mod host;

use std::fs;
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use host::{Host, end};

/// The statuses of all threads of a process, by their names.
fn threads(process: u32) -> Vec<(String, String)> {
    let tasks = fs::read_dir(format!("/proc/{process}/task")).into_iter().flatten().flatten();
    tasks
        .filter_map(|task| {
            let name = fs::read_to_string(task.path().join("comm")).ok()?;
            Some((name.trim().to_owned(), fs::read_to_string(task.path().join("status")).ok()?))
        })
        .collect()
}

fn field<'a>(status: &'a str, key: &str) -> &'a str {
    let line = status.lines().find_map(|line| line.strip_prefix(key));
    line.map_or("", str::trim)
}

#[test]
fn both_ends_work_without_privileges() {
    let Some(host) = Host::new() else { return };
    let (target, line) = host.receive(&[]);
    let line = line.replace("NAME", "desk");
    let words: Vec<_> = line.split_whitespace().skip(1).collect();
    let mut command = host.command();
    command.args(words).args(["--mode", "lazy", "--bandwidth", "4MiB/s", "--max-rounds", "4"]);
    let mut source = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("it starts");
    let began = Instant::now();
    for process in [source.id(), target.id()] {
        let all = loop {
            let all = threads(process);
            if all.iter().any(|(name, _)| name.starts_with("pf-lane")) {
                break all;
            }
            assert!(began.elapsed() < Duration::from_secs(60), "no lane ever started: {all:?}");
            thread::sleep(Duration::from_millis(5));
        };
        assert!(all.len() >= 3, "{all:?}");
        for (name, status) in &all {
            for set in ["CapEff:", "CapPrm:", "CapInh:", "CapAmb:"] {
                assert_eq!(field(status, set), "0000000000000000", "{name}: {set}");
            }
            assert_eq!(field(status, "NoNewPrivs:"), "1", "{name}");
            assert_eq!(field(status, "Seccomp:"), "2", "{name}");
            // Linux before 5.9 does not count them.
            let filters = field(status, "Seccomp_filters:");
            assert!(["", "3"].contains(&filters), "{name}: {filters} filters");
        }
    }
    assert!(source.wait().expect("it can be waited for").success());
    assert_eq!(end(target), Some(0));
    assert!(host.runs("moved"));
}
