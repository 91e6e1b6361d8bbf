//! What the lab needs of the machine it runs on: programs from Debian's packages, and its archive.

use std::env;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::run;
use crate::spec::Suite;

const APT_LIMIT: Duration = Duration::from_secs(600);

/// A program and the package it is in.
type Need = (&'static str, &'static str);

/// What running a lab needs.
pub(crate) const TO_RUN: [Need; 2] = [("qemu-system-x86_64", "qemu-system-x86"), ("mke2fs", "e2fsprogs")];
/// What building a host's root needs beyond that.
pub(crate) const TO_BUILD_ROOTS: [Need; 3] =
    [("mmdebstrap", "mmdebstrap"), ("mke2fs", "e2fsprogs"), ("xz", "xz-utils")];
/// What building a hypervisor needs.
pub(crate) const TO_BUILD_XEN: [Need; 7] = [
    ("dpkg-source", "dpkg-dev"),
    ("make", "make"),
    ("gcc", "gcc"),
    ("flex", "flex"),
    ("bison", "bison"),
    ("bc", "bc"),
    ("python3", "python3"),
];

/// Sees that these programs are here: installs their packages as root, else says how to.
pub(crate) fn ensure(needs: &[Need], log: &Path) -> Result<()> {
    let absent = || needs.iter().filter(|(program, _)| !in_path(program)).map(|(_, package)| *package);
    let packages: Vec<_> = absent().collect();
    if packages.is_empty() {
        return Ok(());
    }
    let how = format!("apt-get install --no-install-recommends {}", packages.join(" "));
    if !rustix::process::geteuid().is_root() || !in_path("apt-get") {
        bail!("the lab needs the packages {}; as root: {how}", packages.join(", "));
    }
    eprintln!("installing {}", packages.join(" "));
    let install = || {
        let mut command = Command::new("apt-get");
        command.env("DEBIAN_FRONTEND", "noninteractive");
        command.args(["install", "-y", "-q", "--no-install-recommends"]).args(&packages);
        run::logged(&mut command, log, APT_LIMIT)
    };
    if install().is_err() {
        // A fresh machine has no package lists yet.
        run::logged(Command::new("apt-get").args(["update", "-q"]), log, APT_LIMIT)?;
        install().with_context(|| format!("needed packages could not be installed; by hand: {how}"))?;
    }
    match absent().collect::<Vec<_>>().as_slice() {
        [] => Ok(()),
        missing => bail!("{} were installed, but their programs are not in PATH", missing.join(", ")),
    }
}

fn in_path(program: &str) -> bool {
    let path = env::var_os("PATH").unwrap_or_default();
    let places = env::split_paths(&path).chain(["/usr/sbin", "/sbin"].map(PathBuf::from));
    places.into_iter().any(|directory| directory.join(program).is_file())
}

/// Building roots makes files of other owners: an error unless this is root.
pub(crate) fn require_root() -> Result<()> {
    if rustix::process::geteuid().is_root() {
        return Ok(());
    }
    bail!("building a host's root needs root (mmdebstrap); run `cargo xtask xen-lab build` as root once")
}

/// The archive's lines for `suite` in sources.list form (`kind` is deb or deb-src): the mirrors this machine's own apt
/// uses for Debian, with the release's name put in.
pub(crate) fn sources(suite: Suite, kind: &str) -> Result<String> {
    let mut command = Command::new("apt-get");
    command.args(["indextargets", "--format", "$(ORIGIN)|$(REPO_URI)|$(RELEASE)", "Created-By: Packages"]);
    let targets =
        run::output(&mut command, APT_LIMIT).context("apt does not say where its packages come from")?;
    let lines = translate(&targets, suite, kind);
    if lines.is_empty() {
        bail!(
            "this machine's apt knows no Debian archive (`apt-get indextargets` names none after `apt-get update`), \
             so the lab can't tell where to get {suite} from; add a Debian mirror to its sources"
        );
    }
    Ok(lines)
}

fn translate(targets: &str, suite: Suite, kind: &str) -> String {
    let mut lines: Vec<String> = Vec::new();
    for target in targets.lines() {
        let mut parts = target.split('|');
        let (Some("Debian"), Some(uri), Some(release)) = (parts.next(), parts.next(), parts.next()) else {
            continue;
        };
        let known = Suite::ALL.iter().find_map(|known| release.strip_prefix(known.name()));
        // Backports would mix releases.
        let Some(rest @ ("" | "-updates" | "-security")) = known else { continue };
        lines.push(format!("{kind} {uri} {suite}{rest} main"));
    }
    lines.sort();
    lines.dedup();
    lines.iter().fold(String::new(), |mut text, line| {
        let _ = writeln!(text, "{line}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_release_is_taken_from_the_same_mirrors() {
        let targets = "Debian|http://m/debian/|bookworm\nDebian|http://m/debian/|bookworm\n\
                       Debian|http://m/debian/|bookworm-backports\nOther|http://o/|bookworm\n\
                       Debian|http://s/|bookworm-security\n";
        assert_eq!(
            translate(targets, Suite::Trixie, "deb"),
            "deb http://m/debian/ trixie main\ndeb http://s/ trixie-security main\n"
        );
    }
}
