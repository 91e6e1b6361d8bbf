//! Where this program keeps what outlives a command: indexes, and the records of migrations.

use std::path::PathBuf;

/// `$XDG_STATE_HOME/pageferry`, `/var/lib/pageferry` for root, else `~/.local/state/pageferry`.
fn dir() -> PathBuf {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    match (set("XDG_STATE_HOME"), set("HOME")) {
        (Some(state), _) => state.join("pageferry"),
        (None, Some(home)) if !rustix::process::getuid().is_root() => home.join(".local/state/pageferry"),
        _ => PathBuf::from("/var/lib/pageferry"),
    }
}

/// Where the records of migrations are.
pub(crate) fn records_dir() -> PathBuf {
    dir().join("migrations")
}

/// Where indexes are.
pub(crate) fn index_dir() -> PathBuf {
    dir().join("index")
}
