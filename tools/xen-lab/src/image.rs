//! File system images out of directories.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::Result;

use crate::run;

const LIMIT: Duration = Duration::from_secs(300);

/// Makes `image`, an ext4 file system of `mib` MiB (sparse) with 4 KiB blocks that holds what is in `directory`.
pub(crate) fn ext4(image: &Path, directory: &Path, mib: u64, log: &Path) -> Result<()> {
    let mut command = Command::new("mke2fs");
    command.args(["-q", "-F", "-t", "ext4", "-b", "4096", "-O", "^has_journal", "-m", "0", "-d"]);
    command.arg(directory).arg(image).arg(format!("{mib}M"));
    run::logged(&mut command, log, LIMIT)
}
