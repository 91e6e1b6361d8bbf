//! Where this host keeps what outlives a command: indexes of disks, and the records of migrations.
#![forbid(unsafe_code)]

use std::path::PathBuf;

/// `$XDG_STATE_HOME/pageferry`, `/var/lib/pageferry` for root, else `~/.local/state/pageferry`.
fn directory() -> PathBuf {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    match (set("XDG_STATE_HOME"), set("HOME")) {
        (Some(state), _) => state.join("pageferry"),
        (None, Some(home)) if !rustix::process::getuid().is_root() => home.join(".local/state/pageferry"),
        _ => PathBuf::from("/var/lib/pageferry"),
    }
}

/// Where the records of migrations are.
#[must_use]
pub fn records() -> PathBuf {
    directory().join("migrations")
}

/// Where indexes are.
#[must_use]
pub fn indexes() -> PathBuf {
    directory().join("index")
}
