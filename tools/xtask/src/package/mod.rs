//! `cargo xtask package`: a Debian package of the programs, their man pages, completions and units, by Debian's own tools
//! (debhelper). `tools/package` says what goes where; this lays it out.
//!
//! ```text
//!   target/package/PROFILE/source      tools/package, the built programs, what they print of themselves
//!   target/package/PROFILE/*.deb       what dpkg-buildpackage makes of it
//! ```

pub(crate) mod check;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::run;
use crate::setup::target;

/// What is built, as `-p` of cargo's.
const PACKAGES: [&str; 3] = ["pageferry", "pageferry-save-helper", "pageferry-xen"];
/// What comes of it, and where debhelper finds it.
const BUILT: [(&str, &str); 3] = [
    ("pageferry", "bin/pageferry"),
    ("pageferry-save-helper", "libexec/pageferry-save-helper"),
    ("libpageferry_xen.so", "lib/libpageferry_xen.so"),
];
/// Files of the tree that go in as they are.
const KEPT: [(&str, &str); 7] = [
    ("tools/package/pageferry.toml", "etc/pageferry.toml"),
    ("tools/package/pageferry-index@.service", "systemd/pageferry-index@.service"),
    ("tools/package/pageferry-index@.timer", "systemd/pageferry-index@.timer"),
    ("tools/package/pageferry-index-watch.service", "systemd/pageferry-index-watch.service"),
    ("tools/package/pageferry-metrics.service", "systemd/pageferry-metrics.service"),
    ("tools/xen-library/include/pageferry_xen.h", "include/pageferry_xen.h"),
    ("README.md", "README.md"),
];
/// Shells, and where each looks for completions.
const COMPLETIONS: [(&str, &str); 3] = [
    ("bash", "completions/bash/pageferry"),
    ("zsh", "completions/zsh/_pageferry"),
    ("fish", "completions/fish/pageferry.fish"),
];

/// How the programs are built.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Profile {
    /// To be used.
    Release,
    /// What other steps have built already, to try the packaging with.
    Debug,
}

impl Profile {
    fn name(self) -> &'static str {
        match self {
            Self::Release => "release",
            Self::Debug => "debug",
        }
    }
}

/// Builds it; where it is.
pub(crate) fn build(profile: Profile) -> Result<PathBuf> {
    ensure!(
        run::in_path("dh") && run::in_path("dpkg-buildpackage"),
        "a Debian package is made with debhelper; `apt-get install debhelper` has it"
    );
    let place = target()?.join("package").join(profile.name());
    let source = place.join("source");
    if place.exists() {
        fs::remove_dir_all(&place).with_context(|| format!("cannot empty {}", place.display()))?;
    }
    fs::create_dir_all(&source)?;
    programs(profile, &source)?;
    described(&source)?;
    for (from, to) in KEPT {
        copy(&run::root()?.join(from), &source.join(to))?;
    }
    directory(&run::root()?.join("docs"), &source.join("docs"))?;
    directory(&run::root()?.join("tools/package/debian"), &source.join("debian"))?;
    same_version(&source)?;

    let mut command = run::command("dpkg-buildpackage")?;
    command.current_dir(&source).args(["--build=binary", "--no-sign", "--no-check-builddeps"]);
    // What it says is for when it fails.
    run::output(&mut command)?;
    let files = fs::read_dir(&place)?.filter_map(|entry| Some(entry.ok()?.path()));
    let mut packages = files.filter(|path| path.extension().is_some_and(|ending| ending == "deb"));
    packages.next().context("dpkg-buildpackage has made no package")
}

fn programs(profile: Profile, source: &Path) -> Result<()> {
    let mut cargo = run::cargo(["build", "--quiet", "--locked"])?;
    cargo.args(PACKAGES.iter().flat_map(|name| ["--package", name]));
    if profile == Profile::Release {
        cargo.arg("--release");
    }
    run::succeed(&mut cargo)?;
    let built = target()?.join(profile.name());
    BUILT.iter().try_for_each(|(from, to)| copy(&built.join(from), &source.join(to)))
}

/// What the program prints of itself, and the list of what is linked into it.
fn described(source: &Path) -> Result<()> {
    let program = source.join("bin/pageferry");
    let mut man = run::command(&program)?;
    run::output(man.args(["man", "--quiet", "--dir"]).arg(source.join("man")))?;
    for (shell, to) in COMPLETIONS {
        let script = run::output(run::command(&program)?.args(["completions", shell]))?;
        write(&source.join(to), &script)?;
    }
    let mut tree =
        run::cargo(["tree", "--locked", "--edges", "normal", "--prefix", "none", "--format", "{p}: {l}"])?;
    tree.args(PACKAGES.iter().flat_map(|name| ["--package", name]));
    let said = run::output(&mut tree)?;
    // Those of the tree itself stand with their paths, those seen before with a star.
    let mut crates: Vec<_> =
        said.lines().filter(|line| !line.contains("(/") && !line.ends_with("(*)")).collect();
    crates.retain(|line| !line.is_empty());
    crates.sort_unstable();
    crates.dedup();
    write(&source.join("crates"), &format!("{}\n", crates.join("\n")))
}

/// Debian's list of versions and cargo's have to agree.
fn same_version(source: &Path) -> Result<()> {
    let debian =
        run::output(run::command("dpkg-parsechangelog")?.current_dir(source).args(["-S", "Version"]))?;
    let ours = env!("CARGO_PKG_VERSION");
    ensure!(
        debian.trim() == ours,
        "tools/package/debian/changelog is at {}, Cargo.toml at {ours}: add an entry",
        debian.trim()
    );
    Ok(())
}

/// Every file of a directory, and those below it.
fn directory(from: &Path, to: &Path) -> Result<()> {
    for entry in fs::read_dir(from).with_context(|| format!("cannot read {}", from.display()))? {
        let path = entry?.path();
        let into = to.join(path.file_name().context("an entry without a name")?);
        match path.is_dir() {
            true => directory(&path, &into)?,
            false => copy(&path, &into)?,
        }
    }
    Ok(())
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to.parent().context("a file without a directory")?)?;
    fs::copy(from, to).with_context(|| format!("cannot copy {}", from.display())).map(drop)
}

fn write(to: &Path, text: &str) -> Result<()> {
    fs::create_dir_all(to.parent().context("a file without a directory")?)?;
    fs::write(to, text).with_context(|| format!("cannot write {}", to.display()))
}
