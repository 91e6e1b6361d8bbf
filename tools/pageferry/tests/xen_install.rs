//! `pageferry xen install` and `uninstall`, on a root directory made for it, with the real `dpkg-divert`.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use tempfile::TempDir;

const XEN: &str = "usr/lib/xen-4.17/bin";
const SHIPPED: &str = "what Xen ships";

struct Root(TempDir);

impl Root {
    /// A root with a Xen's helper and an empty list of diversions; none without `dpkg-divert`.
    fn new() -> Option<Self> {
        if Command::new("dpkg-divert").arg("--version").output().is_err() {
            eprintln!("SKIPPED: no dpkg-divert here; it comes with dpkg");
            return None;
        }
        let root = Self(tempfile::tempdir().expect("a temporary directory"));
        fs::create_dir_all(root.path("var/lib/dpkg")).expect("it is made");
        fs::create_dir_all(root.path(XEN)).expect("it is made");
        fs::write(root.helper(), SHIPPED).expect("it is written");
        root.make_program("ours", "echo pageferry-save-helper: one >&2; exit 2");
        Some(root)
    }

    fn path(&self, path: &str) -> PathBuf {
        self.0.path().join(path)
    }

    fn helper(&self) -> PathBuf {
        self.path(XEN).join("libxl-save-helper")
    }

    fn stock(&self) -> PathBuf {
        self.path(XEN).join("libxl-save-helper.stock")
    }

    fn make_program(&self, name: &str, script: &str) {
        let path = self.path(name);
        fs::write(&path, format!("#!/bin/sh\n{script}\n")).expect("it is written");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("it may be run");
    }

    fn run(&self, arguments: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_pageferry"))
            .arg("xen")
            .args(arguments)
            .arg("--root")
            .arg(self.0.path())
            .output()
            .expect("the program starts")
    }

    fn install(&self) -> Output {
        let helper = self.path("ours");
        self.run(&["install", "--helper", helper.to_str().expect("an ordinary path")])
    }

    /// Xen's own stands in its place and nothing else does.
    fn assert_stock(&self) {
        assert_eq!(text(&self.helper()), SHIPPED);
        let names: Vec<_> = fs::read_dir(self.path(XEN))
            .expect("it is there")
            .map(|entry| entry.expect("a file").file_name())
            .collect();
        assert_eq!(names, ["libxl-save-helper"]);
        assert_eq!(text(&self.path("var/lib/dpkg/diversions")), "");
    }
}

fn text(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

#[test]
fn there_and_back_again_and_each_step_twice() {
    let Some(root) = Root::new() else { return };
    let ours = text(&root.path("ours"));
    let first = root.install();
    assert!(first.status.success() && said(&first).contains("pageferry's now"), "{}", said(&first));
    assert_eq!((text(&root.helper()), text(&root.stock())), (ours.clone(), SHIPPED.to_owned()));
    let mode = fs::metadata(root.helper()).expect("it is there").permissions().mode();
    assert_eq!(mode & 0o777, 0o755);
    assert!(
        text(&root.path("var/lib/dpkg/diversions"))
            .contains("/usr/lib/xen-4.17/bin/libxl-save-helper.stock\n")
    );

    let again = root.install();
    assert!(again.status.success() && said(&again).contains("pageferry's already"), "{}", said(&again));
    root.make_program("ours", "echo pageferry-save-helper: two >&2; exit 2");
    assert!(root.install().status.success());
    assert_eq!((text(&root.helper()), text(&root.stock())), (text(&root.path("ours")), SHIPPED.to_owned()));

    let back = root.run(&["uninstall"]);
    assert!(back.status.success() && said(&back).contains("Xen's own again"), "{}", said(&back));
    root.assert_stock();
    let back = root.run(&["uninstall", "--json"]);
    assert!(back.status.success(), "{}", said(&back));
    let value: serde_json::Value = serde_json::from_slice(&back.stdout).expect("JSON");
    assert_eq!(value[0]["changed"], false);
    root.assert_stock();
}

/// Where a command was broken off, the next one of either kind goes on.
#[test]
fn what_was_broken_off_is_finished() {
    for arguments in [&["uninstall"][..], &["install"]] {
        let Some(root) = Root::new() else { return };
        fs::hard_link(root.helper(), root.stock()).expect("a second name");
        let finish =
            |root: &Root| if arguments == ["install"] { root.install() } else { root.run(arguments) };
        let output = finish(&root);
        assert!(output.status.success(), "{}", said(&output));
        if arguments == ["install"] {
            assert_eq!(text(&root.stock()), SHIPPED);
            // Ours did not come into place: Xen's own stands under both names, diverted.
            fs::remove_file(root.helper()).expect("it is removed");
            fs::hard_link(root.stock(), root.helper()).expect("a second name");
            assert!(root.install().status.success());
            assert_eq!(text(&root.helper()), text(&root.path("ours")));
            assert!(root.run(&["uninstall"]).status.success());
        }
        root.assert_stock();
    }
}

#[test]
fn what_would_break_a_host_is_refused() {
    let Some(root) = Root::new() else { return };
    let refused = |output: Output, code: i32, words: &str| {
        assert_eq!(output.status.code(), Some(code), "{}", said(&output));
        assert!(said(&output).contains(words), "{}", said(&output));
    };
    root.make_program("other", "exit 0");
    let other = root.path("other");
    refused(root.run(&["install", "--helper", other.to_str().expect("a path")]), 2, "does not answer");
    refused(root.run(&["install", "--helper", "/nowhere/helper"]), 2, "/nowhere/helper");
    root.assert_stock_files();

    fs::write(root.stock(), "whose is this?").expect("it is written");
    refused(root.install(), 3, "without a diversion");
    fs::remove_file(root.stock()).expect("it is removed");

    assert!(root.install().status.success());
    fs::remove_file(root.stock()).expect("it is removed");
    refused(root.install(), 3, "Reinstall xen-utils");
    refused(root.run(&["uninstall"]), 3, "Reinstall xen-utils");
    assert_eq!(text(&root.helper()), text(&root.path("ours")));

    let Some(root) = Root::new() else { return };
    let diversion = "/usr/lib/xen-4.17/bin/libxl-save-helper\n/usr/lib/xen-4.17/bin/theirs\n:\n";
    fs::write(root.path("var/lib/dpkg/diversions"), diversion).expect("it is written");
    refused(root.install(), 3, "by somebody else");

    let Some(root) = Root::new() else { return };
    fs::rename(root.path("usr/lib/xen-4.17"), root.path("usr/lib/xen-4.14")).expect("it is renamed");
    refused(root.install(), 3, "Xen 4.14 is installed");
    fs::remove_dir_all(root.path("usr/lib/xen-4.14")).expect("it is removed");
    refused(root.install(), 3, "no Xen");
}

impl Root {
    fn assert_stock_files(&self) {
        assert_eq!(text(&self.helper()), SHIPPED);
        assert!(!self.stock().exists());
    }
}
