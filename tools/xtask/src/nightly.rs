//! What takes a nightly compiler: miri, the fuzzers and what they cover. Each has a target directory of its
//! own, since its programs are no other build's.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::run;

/// The only target that coverage is asked of; named, so that build scripts stay as they are.
pub(crate) const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Cargo of the nightly toolchain: by name, which is rustup's proxy, for the cargo that runs us knows no `+nightly`. What it
/// builds goes into `target/<home>`.
pub(crate) fn cargo(home: &str) -> Result<Command> {
    let mut command = run::command("cargo")?;
    run::forget_ours(&mut command);
    // Chosen for us, not for it.
    command.env_remove("RUSTUP_TOOLCHAIN").env_remove("RUSTC").env_remove("CARGO");
    command.env("CARGO_TARGET_DIR", target(home)?).arg("+nightly");
    Ok(command)
}

/// Where what cargo builds for `home` is.
pub(crate) fn target(home: &str) -> Result<PathBuf> {
    Ok(run::root()?.join("target").join(home))
}

/// The nightly toolchain's directory.
pub(crate) fn sysroot() -> Result<PathBuf> {
    let mut rustc = run::command("rustc")?;
    rustc.env_remove("RUSTUP_TOOLCHAIN").args(["+nightly", "--print", "sysroot"]);
    Ok(PathBuf::from(run::output(&mut rustc)?.trim()))
}

/// What is missing, with its remedy: the toolchain, or one of `components` (a component's name, and a file that it brings).
pub(crate) fn missing(components: &[(&str, &str)]) -> Option<String> {
    let Ok(sysroot) = sysroot() else {
        return Some("there is no nightly compiler; `rustup toolchain install nightly` gets one".to_owned());
    };
    let (component, _) = components.iter().find(|(_, file)| !sysroot.join(file).exists())?;
    Some(format!(
        "its {component} is not there; `rustup component add {component} --toolchain nightly` gets it"
    ))
}

/// As [`missing`], as an error.
pub(crate) fn need(components: &[(&str, &str)]) -> Result<()> {
    match missing(components) {
        Some(missing) => bail!("{missing}"),
        None => Ok(()),
    }
}

/// A program of the component llvm-tools.
pub(crate) fn llvm(program: &str) -> Result<Command> {
    let path = sysroot()?.join("lib/rustlib").join(TARGET).join("bin").join(program);
    run::command(path)
}

/// The interpreter, and the standard library's source, which it interprets.
pub(crate) const MIRI: (&str, &str) = ("miri", "bin/cargo-miri");
pub(crate) const SOURCE: (&str, &str) = ("rust-src", "lib/rustlib/src/rust/library/Cargo.lock");
/// LLVM's tools.
pub(crate) const TOOLS: (&str, &str) = ("llvm-tools", "lib/rustlib/x86_64-unknown-linux-gnu/bin/llvm-cov");

/// Begins `directory` anew.
pub(crate) fn fresh(directory: &Path) -> Result<()> {
    if directory.exists() {
        std::fs::remove_dir_all(directory)
            .with_context(|| format!("cannot clear {}", directory.display()))?;
    }
    std::fs::create_dir_all(directory).with_context(|| format!("cannot make {}", directory.display()))
}
