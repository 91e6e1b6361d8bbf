//! The C headers of each release's Xen (`libxen-dev`), beside those this machine has installed: tests compare our layouts
//! with them.
//!
//! apt works in a directory of its own, with the machine's mirrors and keys and the release's name put in; neither the
//! machine's package lists nor what it has installed changes, and it need not be root.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::spec::Suite;
use crate::{machine, run};

const LIMIT: Duration = Duration::from_secs(180);
const PACKAGE: &str = "libxen-dev";

/// Puts each release's headers below `into`, where they are not yet: `into/RELEASE/usr/include`. Returns these
/// directories.
pub fn fetch(into: &Path) -> Result<Vec<PathBuf>> {
    let directories = Suite::ALL.map(|suite| into.join(suite.name()));
    for (suite, directory) in Suite::ALL.into_iter().zip(&directories) {
        if !directory.join("usr/include/xenguest.h").is_file() {
            download(suite, directory)
                .with_context(|| format!("the headers of {suite}'s Xen could not be had"))?;
        }
    }
    Ok(directories.map(|directory| directory.join("usr/include")).to_vec())
}

fn download(suite: Suite, directory: &Path) -> Result<()> {
    let into = directory.parent().context("headers stand in a directory of their own")?;
    fs::create_dir_all(into)?;
    let place = tempfile::tempdir_in(into)?;
    let at = |name: &str| place.path().join(name);
    for name in ["state/lists/partial", "cache/archives/partial"] {
        fs::create_dir_all(at(name))?;
    }
    fs::write(at("sources.list"), machine::sources(suite, "deb")?)?;
    let options = [
        ("Dir::State", at("state")),
        ("Dir::Cache", at("cache")),
        ("Dir::Etc::sourcelist", at("sources.list")),
        ("Dir::Etc::sourceparts", PathBuf::from("/dev/null")),
        // What the machine has installed is another release's.
        ("Dir::State::status", PathBuf::from("/dev/null")),
    ];
    let log = at("log");
    let apt = |words: &[&str]| {
        let mut command = Command::new("apt-get");
        command.current_dir(place.path()).args(["-q", "-o", "APT::Sandbox::User="]);
        for (name, value) in &options {
            command.arg("-o").arg(format!("{name}={}", value.display()));
        }
        run::logged(command.args(words), &log, LIMIT)
    };
    apt(&["update"])?;
    apt(&["download", PACKAGE])?;
    let mut files = fs::read_dir(place.path())?.filter_map(|entry| Some(entry.ok()?.path()));
    let package = files.find(|path| path.extension().is_some_and(|end| end == "deb"));
    let package = package.context("apt has downloaded no package")?;
    let unpacked = at("unpacked");
    run::logged(Command::new("dpkg-deb").arg("-x").arg(package).arg(&unpacked), &log, LIMIT)?;
    // Somebody else may have been faster, or a half of it be left from before: whole directories replace each other.
    let _ = fs::remove_dir_all(directory);
    fs::rename(&unpacked, directory)
        .with_context(|| format!("cannot put the headers into {}", directory.display()))
}
