//! What a lab is given when it starts, made afresh each time (in a second or two): the scripts in dom0's initial RAM disk,
//! the guests' kernel and RAM disk, the project's binaries, the shared disk.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use xen_lab_checker::{FILE_BYTES, FILES, file_name, fill_blocks};

use crate::cache::Cache;
use crate::cpio::Archive;
use crate::{image, run};

const BOOT_INIT: &[u8] = include_bytes!("../guest/boot-init");
const DOM0_INIT: &[u8] = include_bytes!("../guest/dom0-init");
/// Behind the shared disk's file system, for who writes the disk's last block.
const BEATS_BYTES: u64 = 64 << 10;
const DOMU_INIT: &[u8] = include_bytes!("../guest/domu-init");
const AGENT: &[u8] = include_bytes!("../guest/agent.py");
const SPOIL: &[u8] = include_bytes!("../guest/spoil.py");

/// The project's programs, as far as they exist.
pub(crate) const BINARIES: [&str; 3] = ["pageferry", "pageferry-save-helper", "libpageferry_xen.so"];
/// Size of the shared disk's file system: the pattern files and some room.
const LUN_MIB: u64 = 512;
/// Smallest disk of binaries.
const BINARIES_MIB: u64 = 16;

/// Dom0's initial RAM disk: the root's, with the lab's scripts and the agents' secret behind it.
pub(crate) fn boot_ram_disk(root: &Path, token: &str) -> Result<Vec<u8>> {
    let mut archive = Archive::default();
    archive.file("init", BOOT_INIT)?;
    archive.file("lab/dom0-init", DOM0_INIT)?;
    archive.file("lab/agent.py", AGENT)?;
    archive.file("lab/spoil.py", SPOIL)?;
    archive.file("lab/token", token.as_bytes())?;
    joined(root, "boot.cpio", archive)
}

/// A guest's: the root's, with the checker.
fn guest_ram_disk(root: &Path, checker: &Path) -> Result<Vec<u8>> {
    let mut archive = Archive::default();
    archive.file("init", DOMU_INIT)?;
    archive.file("bin/checker", &fs::read(checker)?)?;
    joined(root, "guest.cpio", archive)
}

fn joined(root: &Path, kept: &str, added: Archive) -> Result<Vec<u8>> {
    let mut bytes = fs::read(root.join(kept))?;
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    bytes.extend(added.finish()?);
    Ok(bytes)
}

/// The disk mounted at `/lab` in dom0: what guests boot.
pub(crate) fn guests_disk(image: &Path, root: &Path, checker: &Path, log: &Path) -> Result<()> {
    let directory = tempfile::tempdir()?;
    fs::copy(root.join("vmlinuz"), directory.path().join("vmlinuz"))?;
    fs::write(directory.path().join("initrd"), guest_ram_disk(root, checker)?)?;
    // An HVM guest's firmware reads it through an emulated port: half the size is half a minute less.
    let mut pack = Command::new("sh");
    pack.args(["-c", "gzip -6 initrd && mv initrd.gz initrd"]).current_dir(directory.path());
    run::logged(&mut pack, log, Duration::from_secs(60))?;
    disk(image, directory.path(), log)
}

/// The disk mounted at `/opt/pageferry`: those of the project's programs that stand in `binaries`. Returns their names.
pub(crate) fn binaries_disk(image: &Path, binaries: &Path, log: &Path) -> Result<Vec<&'static str>> {
    let directory = tempfile::tempdir()?;
    let mut names = Vec::new();
    for name in BINARIES {
        let from = binaries.join(name);
        if from.is_file() {
            fs::copy(&from, directory.path().join(name))
                .with_context(|| format!("cannot copy {}", from.display()))?;
            names.push(name);
        }
    }
    disk(image, directory.path(), log)?;
    Ok(names)
}

fn disk(image: &Path, directory: &Path, log: &Path) -> Result<()> {
    let mut bytes = 0;
    for entry in fs::read_dir(directory)? {
        bytes += entry?.metadata()?.len();
    }
    let _ = fs::remove_file(image);
    image::ext4(image, directory, (bytes >> 20) * 5 / 4 + BINARIES_MIB, log)
}

/// The shared disk's object (`lun.img`): an ext4 file system with pattern files; what stands in each block follows from
/// where it stands.
pub(crate) fn lun_object(cache: &Cache) -> Result<PathBuf> {
    // A change of the pattern changes the checker, too: it must not find disks of another.
    let inputs = ["1", include_str!("../checker/src/lib.rs"), &LUN_MIB.to_string()];
    cache.object("shared-disk", &inputs, |into, log| {
        let files = into.join("files");
        fs::create_dir(&files)?;
        let mut content = vec![0; usize::try_from(FILE_BYTES)?];
        for file in 0..FILES {
            fill_blocks(file, 0, &mut content);
            fs::write(files.join(file_name(file)), &content)?;
        }
        image::ext4(&into.join("lun.img"), &files, LUN_MIB, log)?;
        Ok(fs::remove_dir_all(&files)?)
    })
}

/// A lab's own copy of the shared disk: its guests may write it. Behind the file system it has room for their beats.
pub(crate) fn shared_disk(from: &Path, to: &Path, log: &Path) -> Result<()> {
    let mut command = Command::new("cp");
    command.args(["--sparse=always", "--reflink=auto"]).arg(from).arg(to);
    run::logged(&mut command, log, Duration::from_secs(120))?;
    let image = fs::OpenOptions::new().write(true).open(to)?;
    Ok(image.set_len(image.metadata()?.len() + BEATS_BYTES)?)
}

/// The workspace's root.
pub(crate) fn workspace() -> Result<PathBuf> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    Ok(here.ancestors().nth(2).context("the lab stands two directories below the root")?.to_path_buf())
}

/// The workspace's commit, and whether anything there differs from it: what results are of.
pub(crate) fn commit() -> Result<String> {
    let mut command = Command::new("git");
    command.current_dir(workspace()?).args(["describe", "--always", "--dirty", "--exclude=*"]);
    Ok(run::output(&mut command, Duration::from_secs(10))?.trim().to_owned())
}

/// Runs the workspace's cargo.
fn cargo(arguments: &[&str], flags: Option<&str>) -> Result<()> {
    let program = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(program);
    command.current_dir(workspace()?).args(arguments);
    // `cargo run` sets these for us; a nested cargo would take them for its own package's.
    for (name, _) in std::env::vars_os() {
        if name.to_str().is_some_and(|n| n.starts_with("CARGO_PKG_") || n.starts_with("CARGO_MANIFEST")) {
            command.env_remove(name);
        }
    }
    if let Some(flags) = flags {
        command.env("RUSTFLAGS", flags);
    }
    let status = command.status().context("cannot start cargo")?;
    if !status.success() {
        bail!("`cargo {}` ended with {status}", arguments.join(" "));
    }
    Ok(())
}

/// Builds the guests' checker, linked statically (a guest has no libraries), and says where it is.
pub(crate) fn checker() -> Result<PathBuf> {
    const TARGET: &str = "x86_64-unknown-linux-gnu";
    let into = workspace()?.join("target/xen-lab");
    let directory = into.to_str().context("the workspace's path is not text")?;
    cargo(
        &["build", "-q", "--release", "-p", "xen-lab-checker", "--target", TARGET, "--target-dir", directory],
        Some("-C target-feature=+crt-static -C strip=symbols"),
    )?;
    Ok(into.join(TARGET).join("release/checker"))
}

/// Where the project's release binaries are built.
pub(crate) fn release_directory() -> Result<PathBuf> {
    let target = std::env::var_os("CARGO_TARGET_DIR").map(PathBuf::from);
    Ok(workspace()?.join(target.unwrap_or_else(|| "target".into())).join("release"))
}

/// Builds the project's release binaries, as far as there are packages for them; where they are.
pub(crate) fn built() -> Result<PathBuf> {
    eprintln!("building the project's binaries");
    let mut arguments = vec!["build", "-q", "--release"];
    let tools = workspace()?.join("tools");
    for (directory, package) in [
        ("pageferry", "pageferry"),
        ("save-helper", "pageferry-save-helper"),
        ("xen-library", "pageferry-xen"),
    ] {
        if tools.join(directory).join("Cargo.toml").is_file() {
            arguments.extend(["-p", package]);
        }
    }
    cargo(&arguments, None)?;
    release_directory()
}
