//! The program `pageferry`, built beside the harness.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, Result, bail};

/// Builds it in the harness's own profile and returns its path.
///
/// # Errors
/// When the harness was not started by cargo, or the build fails.
pub fn build() -> Result<PathBuf> {
    let harness = std::env::current_exe()?;
    let path = harness.with_file_name("pageferry");
    let Some(cargo) = std::env::var_os("CARGO") else {
        if path.exists() {
            eprintln!("  not started by cargo: {} is used as it is", path.display());
            return Ok(path);
        }
        bail!("start the harness with `cargo xtask bench`, which can build pageferry");
    };
    let mut command = Command::new(cargo);
    command.args(["build", "--quiet", "--package", "pageferry"]);
    if !cfg!(debug_assertions) {
        command.arg("--release");
    }
    let status = command.status().context("cannot run cargo")?;
    if !status.success() {
        bail!("pageferry does not build; the reason is above");
    }
    Ok(path)
}
