//! The program `pageferry`: built beside the harness, or the harness itself is a part of it (`pageferry bench`).

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, Result, bail};

/// The program's name.
const NAME: &str = "pageferry";

/// Whether this process is `pageferry bench`.
fn installed() -> Result<bool> {
    Ok(std::env::current_exe()?.file_name().is_some_and(|name| name == NAME))
}

/// The harness itself, for the roles of it that are processes of their own.
///
/// # Errors
/// When this process can't tell its own path.
pub fn itself() -> Result<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    if installed()? {
        command.arg("bench");
    }
    Ok(command)
}

/// Builds it in the harness's own profile, unless the harness is a part of it, and returns its path.
///
/// # Errors
/// When the harness was not started by cargo, or the build fails.
pub fn build() -> Result<PathBuf> {
    let harness = std::env::current_exe()?;
    if installed()? {
        return Ok(harness);
    }
    let path = harness.with_file_name(NAME);
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
