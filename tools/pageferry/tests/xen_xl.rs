//! `pageferry xen save`, `restore` and `migrate` over an `xl` that writes down how it was called. The real one is
//! `tools/xen-lab`'s business.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use tempfile::TempDir;

/// Says what it was called with; lists what stands in `guests`; ends as `fate` says.
const XL: &str = r#"
cd "$PLACE"
if [ "$1" = list ]; then
    [ -e guests ] || { echo "xl: no privilege" >&2; exit 1; }
    echo "Name ID Mem VCPUs State Time(s)"
    if [ -n "$2" ]; then
        grep -w -- "$2" guests || { echo "$2 is an invalid domain identifier" >&2; exit 1; }
    else
        cat guests
    fi
    exit 0
fi
{
    echo "helper=$LIBXL_SAVE_HELPER"
    env | grep ^PAGEFERRY_ | sort
    for word; do echo "<$word>"; done
} > called
echo "words of xl" >&2
. ./fate
"#;

struct Place(TempDir);

impl Place {
    /// A host with one guest and an `xl` that does well.
    fn new() -> Self {
        let place = Self(tempfile::tempdir().expect("a temporary directory"));
        fs::create_dir(place.path("bin")).expect("it is made");
        place.program("bin/xl", XL);
        place.program("helper", "echo pageferry-save-helper: one >&2; exit 2");
        place.write("guests", "desk 7 512 1 -b---- 1.5\n");
        place.write("fate", "exit 0\n");
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.path(name), text).expect("it is written");
    }

    fn program(&self, name: &str, script: &str) {
        self.write(name, &format!("#!/bin/sh\n{script}\n"));
        fs::set_permissions(self.path(name), fs::Permissions::from_mode(0o755)).expect("it may be run");
    }

    fn helper(&self) -> String {
        self.path("helper").to_str().expect("an ordinary path").to_owned()
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pageferry"));
        let path = format!("{}:{}", self.path("bin").display(), std::env::var("PATH").unwrap_or_default());
        command.arg("xen").args(arguments).args(["--helper", &self.helper()]);
        command.env("PATH", path).env("PLACE", self.0.path()).env_remove("PAGEFERRY_CONFIG");
        command
    }

    fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().expect("the program starts")
    }

    /// How `xl` was called last: a line for the helper, each setting, and each argument.
    fn called(&self) -> Vec<String> {
        fs::read_to_string(self.path("called")).unwrap_or_default().lines().map(str::to_owned).collect()
    }
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn save_and_restore_are_xls_with_our_helper() {
    let place = Place::new();
    let file = place.path("desk.save").display().to_string();
    place.write("fate", "echo 12345678 > desk.save; exit 0\n");
    let output = place.run(&["save", "desk", &file, "--keep-running"]);
    assert!(output.status.success(), "{}", said(&output));
    assert!(said(&output).contains("words of xl"), "{}", said(&output));
    assert!(String::from_utf8_lossy(&output.stdout).starts_with("Saved desk to "));
    let helper = format!("helper={}", place.helper());
    let path = format!("<{file}>");
    assert_eq!(place.called(), [helper.as_str(), "<save>", "<-c>", "<7>", &path]);

    let output = place.run(&["restore", &file, "--paused", "--json", "--quiet"]);
    assert!(output.status.success() && output.stderr.is_empty(), "{}", said(&output));
    let value: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!((&value["did"], &value["file"]), (&"restore".into(), &file.clone().into()));
    assert_eq!(place.called(), [helper.as_str(), "<restore>", "<-p>", &path]);
}

#[test]
fn frozen_disks_are_the_helpers_settings_and_not_a_running_guests() {
    let place = Place::new();
    let file = place.path("desk.save").display().to_string();
    let (helper, path) = (format!("helper={}", place.helper()), format!("<{file}>"));
    for (flag, disks) in
        [("--disks-frozen", "all"), ("--disks-frozen=xvda,/images/base", "xvda,/images/base")]
    {
        let output = place.run(&["save", "desk", &file, "--keep-paused", flag]);
        assert!(output.status.success(), "{}", said(&output));
        let variable = format!("PAGEFERRY_FROZEN_DISKS={disks}");
        assert_eq!(place.called(), [helper.as_str(), &variable, "<save>", "<-p>", "<7>", &path]);
    }
    let output = place.run(&["save", "desk", &file, "--keep-running", "--disks-frozen=xvdb"]);
    assert!(output.status.success(), "{}", said(&output));
    fs::remove_file(place.path("called")).expect("it was called");
    let output = place.run(&["save", "desk", &file, "--keep-running", "--disks-frozen"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(said(&output).contains("writes its disks") && place.called().is_empty(), "{}", said(&output));
    place.write("desk.save", "x");
    let output = place.run(&["restore", &file, "--disk", "xvda=/dev/vg/a", "--disk", "xvdb=/b"]);
    assert!(output.status.success(), "{}", said(&output));
    let variable = "PAGEFERRY_DISK_PATHS=xvda=/dev/vg/a,xvdb=/b";
    assert_eq!(place.called(), [helper.as_str(), variable, "<restore>", &path]);
    assert_eq!(place.run(&["restore", &file, "--disk", "xvda"]).status.code(), Some(2));
}

#[test]
fn flags_become_the_helpers_settings() {
    let place = Place::new();
    let output = place.run(&[
        "migrate",
        "7",
        "--over",
        "socat - TCP:there:9999",
        "--policy",
        "stock",
        "--max-downtime",
        "20ms",
        "--max-rounds",
        "9",
        "--if-not-converging",
        "abort",
        "--throttle",
        "auto",
        "-v",
    ]);
    assert!(output.status.success(), "{}", said(&output));
    let expected = [
        &format!("helper={}", place.helper()),
        "PAGEFERRY_MAX_DOWNTIME=0.02s",
        "PAGEFERRY_MAX_ROUNDS=9",
        "PAGEFERRY_ON_NO_CONVERGENCE=abort",
        "PAGEFERRY_POLICY=stock",
        "PAGEFERRY_THROTTLE=auto",
        "<-vvv>",
        "<migrate>",
        "<-s>",
        "<>",
        "<7>",
        "<socat - TCP:there:9999>",
    ];
    assert_eq!(place.called(), expected);
}

/// What xl hands to the shell reaches the other host: `ssh` here is a program that runs its words as sshd would.
#[test]
fn the_other_host_uses_our_helper_where_it_is_there() {
    let place = Place::new();
    place.program(
        "bin/ssh",
        r#"echo "<$1>" > host; shift; [ ! -e bare ] || rm helper; exec env -u LIBXL_SAVE_HELPER sh -c "$*""#,
    );
    let dial = |otherwise: &str| {
        let last = "for last; do :; done";
        place.write(
            "fate",
            &format!("case \"$*\" in *'-s '*) {last}; sh -c \"$last\" {otherwise};; esac; exit 0\n"),
        );
    };
    dial("");
    let there = |arguments: &[&str]| {
        let output = place.run(&[&["migrate", "desk", "other host"], arguments].concat());
        (output.status.success(), place.called(), said(&output))
    };
    let (well, called, said) = there(&[]);
    assert!(well, "{said}");
    assert_eq!(fs::read_to_string(place.path("host")).expect("ssh was run"), "<other host>\n");
    assert_eq!(called, [&format!("helper={}", place.helper()), "<migrate-receive>"]);
    let (well, called, said) = there(&["--compare", "--paused"]);
    assert!(well, "{said}");
    assert!(called.ends_with(&["<migrate-receive>", "<-d>", "<-p>"].map(str::to_owned)), "{called:?}");

    place.program("it's here", "");
    let other = place.path("it's here").display().to_string();
    let (well, called, said) = there(&["--helper-there", &other]);
    assert!(well && called.first() == Some(&format!("helper={other}")), "{said} {called:?}");
    dial("|| exit 1");
    let (well, _, said) = there(&["--helper-there", "/nowhere/helper"]);
    assert!(!well && said.contains("no /nowhere/helper here"), "{said}");
    place.write("bare", "");
    let (well, called, said) = there(&[]);
    assert!(well && called == ["helper=", "<migrate-receive>"], "{said} {called:?}");
}

#[test]
fn what_is_wrong_is_said_before_anything_is_done() {
    let place = Place::new();
    let refused = |output: Output, code: i32, words: &str| {
        assert_eq!(output.status.code(), Some(code), "{}", said(&output));
        assert!(said(&output).contains(words), "{}", said(&output));
        assert!(place.called().is_empty(), "{:?}", place.called());
    };
    refused(place.run(&["migrate", "desk", "there", "--max-rounds", "0"]), 2, "PAGEFERRY_MAX_ROUNDS");
    refused(place.run(&["migrate", "desk", "there", "--over", "x"]), 2, "cannot be used with");
    refused(place.run(&["migrate", "desk"]), 2, "HOST");
    refused(place.run(&["restore", "/nowhere/desk.save"]), 2, "/nowhere/desk.save");
    let mut settings = place.command(&["migrate", "desk", "there"]);
    settings.env("PAGEFERRY_CONFIG", "/nowhere/x.toml");
    refused(settings.output().expect("it starts"), 2, "/nowhere/x.toml");
    if Path::new("/dev/xen/privcmd").exists() {
        refused(place.run(&["save", "other", "x"]), 7, "`xl list` names those there are");
    } else {
        refused(place.run(&["save", "other", "x"]), 3, "does not run on Xen");
        fs::remove_file(place.path("bin/xl")).expect("it is removed");
        refused(place.run(&["save", "desk", "x"]), 3, "does not run on Xen");
    }
    place.program("helper", "exit 0");
    refused(place.run(&["save", "desk", "x"]), 2, "does not answer as pageferry-save-helper does");
    fs::remove_file(place.path("helper")).expect("it is removed");
    refused(place.run(&["save", "desk", "x"]), 2, "Nothing was saved or moved");
}

#[test]
fn how_it_stands_with_the_guest_is_said_when_xl_fails() {
    let place = Place::new();
    let failed = |fate: &str, arguments: &[&str], code: i32, words: &[&str]| {
        place.write("guests", "desk 7 512 1 -b---- 1.5\n");
        place.write("fate", fate);
        let output = place.run(arguments);
        let text = said(&output);
        assert_eq!(output.status.code(), Some(code), "{text}");
        for words in words {
            assert!(text.contains(words), "{words}: {text}");
        }
    };
    let file = place.path("desk.save").display().to_string();
    let save = ["save", "desk", &file, "--quiet"];
    failed(
        "echo half > desk.save; exit 1",
        &save,
        3,
        &["words of xl", "desk is still here", "not a whole guest"],
    );
    failed("> guests; exit 1", &save, 3, &["desk is not here any more"]);
    failed("exit 1", &["restore", &file], 3, &["stream verify"]);
    let migrate = ["migrate", "desk", "--over", "true"];
    failed("exit 1", &migrate, 5, &["desk is still here"]);
    let away = "echo 'desk--migratedaway 7 512 1 ---s-- 1.5' > guests; exit 1";
    failed(away, &migrate, 9, &["xl destroy desk--migratedaway", "Never let both run"]);
}

/// A signal to the program ends xl, and the guest's state is told.
#[test]
fn a_signal_ends_xl() {
    let place = Place::new();
    place.write("fate", "echo > begun; exec sleep 600\n");
    let mut command = place.command(&["save", "desk", "x"]);
    let child = command.stderr(Stdio::piped()).spawn().expect("it starts");
    while !place.path("begun").exists() {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    rustix::process::kill_process(rustix::process::Pid::from_child(&child), rustix::process::Signal::TERM)
        .expect("it runs");
    let output = child.wait_with_output().expect("it ends");
    assert_eq!(output.status.code(), Some(8), "{}", said(&output));
    assert!(said(&output).contains("desk is still here"), "{}", said(&output));
}
