//! `pageferry image`: disks made of real files, without a download.

use std::path::{Path, PathBuf};

use mover::process::image::{self, Made};
use mover::units::PAGE_BYTES_U64;

use crate::console::Console;
use crate::failure::Outcome;
use crate::units::{show_bytes, show_count};

/// Does it, and says what came of it.
pub(crate) fn run(
    path: &Path,
    size: u64,
    content: Option<u64>,
    from: &[PathBuf],
    console: &Console,
) -> Outcome {
    let made = make(path, size, content.unwrap_or(size / 2), &roots(from))?;
    let files = show_count(made.header.files);
    let bytes = show_bytes(made.header.used_blocks * PAGE_BYTES_U64);
    console.note(&match (made.cached, made.skipped) {
        (true, _) => format!("{} is there already: {files} files, {bytes}", path.display()),
        (false, 0) => format!("{}: {files} files, {bytes}", path.display()),
        (false, skipped) => {
            format!("{}: {files} files, {bytes}; {} could not be read", path.display(), show_count(skipped))
        }
    });
    Ok(())
}

/// Makes one.
pub(crate) fn make(path: &Path, size: u64, content: u64, roots: &[PathBuf]) -> Outcome<Made> {
    Ok(image::make(path, size, content, roots)?)
}

/// Where files are taken from: `given`, or what every machine that builds this has. Nothing of a person's.
pub(crate) fn roots(given: &[PathBuf]) -> Vec<PathBuf> {
    if !given.is_empty() {
        return given.to_vec();
    }
    let home = std::env::var_os("HOME").map(PathBuf::from);
    let toolchain = std::env::var_os("RUSTUP_HOME").map(PathBuf::from);
    let toolchain = toolchain.or_else(|| home.map(|home| home.join(".rustup")));
    [Some(PathBuf::from("/usr")), Some(PathBuf::from("/opt")), toolchain]
        .into_iter()
        .flatten()
        .filter(|path| path.is_dir())
        .collect()
}
