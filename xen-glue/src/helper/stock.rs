//! Hands over to Xen's own helper: Remus and COLO are its business.
//!
//! It is looked for at `PAGEFERRY_STOCK_HELPER`; under the name the diversion gives it, beside this program as it was
//! called; then in Xen's directories, the running version's first.
#![forbid(unsafe_code)]

use std::env;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The name of Xen's helper.
pub const HELPER: &str = "libxl-save-helper";
/// The name it is diverted to.
pub const DIVERTED: &str = "libxl-save-helper.stock";
/// Overrides where it is looked for.
pub const OVERRIDE: &str = "PAGEFERRY_STOCK_HELPER";

/// Becomes Xen's helper; returns only if that fails, with a sentence.
pub(crate) fn become_it(arguments: &[OsString]) -> String {
    let called = env::args_os().next().map(PathBuf::from).unwrap_or_default();
    let Some(helper) = find(env::var_os(OVERRIDE), &called, Path::new("/")) else {
        return format!(
            "this stream is Remus' or COLO's, which is left to Xen's own helper, and that was not found. Set {OVERRIDE} to \
             its path"
        );
    };
    let error = Command::new(&helper).args(arguments).exec();
    format!("cannot run Xen's own helper {}: {error}", helper.display())
}

/// Where it is. An override is taken as it is, to fail with its own name.
fn find(override_path: Option<OsString>, called: &Path, root: &Path) -> Option<PathBuf> {
    if let Some(path) = override_path {
        return Some(PathBuf::from(path));
    }
    let ourselves = fs::canonicalize("/proc/self/exe").ok();
    let beside = called.parent().filter(|parent| !parent.as_os_str().is_empty());
    let mut candidates: Vec<PathBuf> = beside.map(|parent| parent.join(DIVERTED)).into_iter().collect();
    let mut directories = directories(root).unwrap_or_default();
    directories.sort_by_key(|directory| Some(directory.as_path()) != running(root).as_deref());
    for directory in directories {
        candidates.extend([DIVERTED, HELPER].map(|name| directory.join("bin").join(name)));
    }
    candidates.into_iter().find(|path| path.is_file() && fs::canonicalize(path).ok() != ourselves)
}

/// `/usr/lib/xen-*`.
fn directories(root: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = fs::read_dir(root.join("usr/lib"))?;
    let paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
    let named = |path: &PathBuf| {
        path.file_name().and_then(OsStr::to_str).is_some_and(|name| name.starts_with("xen-"))
    };
    let mut paths: Vec<PathBuf> = paths.filter(named).collect();
    paths.sort();
    Ok(paths)
}

/// Whether what libxl runs by itself below `root` is ours: Xen's own has been put aside.
pub(crate) fn is_replaced(root: &Path) -> bool {
    running(root).is_some_and(|xen| xen.join("bin").join(DIVERTED).is_file())
}

/// The directory of the running Xen.
fn running(root: &Path) -> Option<PathBuf> {
    let part = |name: &str| fs::read_to_string(root.join("sys/hypervisor/version").join(name)).ok();
    let version = format!("xen-{}.{}", part("major")?.trim(), part("minor")?.trim());
    Some(root.join("usr/lib").join(version))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn xens_helper_is_found_where_it_may_be() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path();
        let none = Path::new("pageferry-save-helper");
        assert_eq!(find(None, none, root), None);
        assert_eq!(find(Some("/x".into()), none, root), Some("/x".into()));
        let put = |path: &str| {
            let path = root.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, "").unwrap();
            path
        };
        let old = put("usr/lib/xen-4.17/bin/libxl-save-helper");
        assert_eq!(find(None, none, root), Some(old));
        let diverted = put("usr/lib/xen-4.17/bin/libxl-save-helper.stock");
        assert_eq!(find(None, none, root), Some(diverted.clone()));
        let newer = put("usr/lib/xen-4.20/bin/libxl-save-helper.stock");
        assert_eq!(find(None, none, root), Some(diverted.clone()));
        put("sys/hypervisor/version/major");
        fs::write(root.join("sys/hypervisor/version/major"), "4\n").unwrap();
        put("sys/hypervisor/version/minor");
        fs::write(root.join("sys/hypervisor/version/minor"), "20\n").unwrap();
        assert_eq!(find(None, none, root), Some(newer.clone()));
        assert!(is_replaced(root));
        fs::remove_file(&newer).unwrap();
        assert!(!is_replaced(root), "another Xen's is");
        fs::write(&newer, "").unwrap();
        let called = root.join("usr/lib/xen-4.17/bin/libxl-save-helper");
        assert_eq!(find(None, &called, root), Some(diverted));
    }

    #[test]
    fn this_program_is_never_taken_for_xens() {
        let directory = tempfile::tempdir().unwrap();
        let place = directory.path().join("usr/lib/xen-4.17/bin");
        fs::create_dir_all(&place).unwrap();
        std::os::unix::fs::symlink(env::current_exe().unwrap(), place.join(HELPER)).unwrap();
        assert_eq!(find(None, Path::new("helper"), directory.path()), None);
    }
}
