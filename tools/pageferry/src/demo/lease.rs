//! A demonstration that is killed (`kill -9`) can't tidy up. So each process that it starts holds a lease: a file in the
//! demonstration's directory that the demonstration keeps locked for as long as it lives. When the lock can be had, the
//! demonstration is gone: the process removes the directory, and ends. What is left where no such process lived any more, the
//! next demonstration in the same place removes.
//!
//! A guest that is to stay (`--keep-running`) loses its lease: the file is removed before the lock is released.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use mover::ExitClass;
use mover::confine::{self, Keep};
use rustix::fs::{FlockOperation, flock};

use crate::failure::{Failure, OrFail, Outcome};

/// Names the file to who is started.
pub(super) const VARIABLE: &str = "PAGEFERRY_LEASE";
/// The file.
const FILE: &str = "alive";
/// How a demonstration's directory begins.
pub(super) const PREFIX: &str = "pageferry-demo-";
/// How long removing a directory is tried in which others, who end too, may still write.
const REMOVED_WITHIN: Duration = Duration::from_secs(1);

/// What says that the demonstration lives, to be kept as long as it does.
pub(super) struct Lease {
    path: PathBuf,
    // The lock goes with it.
    _file: File,
}

impl Lease {
    /// Of the demonstration in `directory`.
    pub(super) fn grant(directory: &Path) -> Outcome<Self> {
        let path = directory.join(FILE);
        let doing = || format!("cannot make {}", path.display());
        let file = File::create(&path).or_fail(doing, "Is the disk full?")?;
        let locked = flock(&file, FlockOperation::NonBlockingLockExclusive).map_err(io::Error::from);
        locked.or_fail(|| format!("cannot lock {}", path.display()), "Name a local directory with --dir")?;
        Ok(Self { path, _file: file })
    }

    /// For the environment of a process that is to end with the demonstration.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// From now on nobody ends with the demonstration.
    pub(super) fn give_up(&self) {
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(
                "the guest will end with this program: cannot remove {}: {error}",
                self.path.display()
            );
        }
    }
}

/// Ends this process with the demonstration that has started it, if one has.
pub(crate) fn hold() -> Outcome {
    let Some(path) = std::env::var_os(VARIABLE).map(PathBuf::from) else { return Ok(()) };
    let Some(directory) = directory_of(&path).map(Path::to_owned) else {
        return Err(Failure::usage(format!("{VARIABLE} is for processes of `pageferry demo`: unset it")));
    };
    let gone = |error: io::Error| {
        Failure::new(ExitClass::Cancelled, format!("the demonstration has ended already ({error})"))
    };
    let file = File::open(&path).map_err(gone)?;
    let waiting = move || {
        if let Err(error) = confine::drop_capabilities(Keep::Nothing) {
            tracing::warn!("the lease's thread keeps its privileges: {error}");
        }
        if let Err(error) = flock(&file, FlockOperation::LockShared) {
            tracing::warn!("this process will not end with its demonstration: {error}");
            return;
        }
        // Given up: this one is to stay.
        if file.metadata().is_ok_and(|meta| meta.nlink() == 0) && directory.exists() {
            return;
        }
        remove(&directory);
        std::process::exit(ExitClass::Cancelled.code().into());
    };
    let thread = thread::Builder::new().name("lease".to_owned()).spawn(waiting);
    thread
        .map(drop)
        .or_fail(|| "cannot start a thread".to_owned(), "Raise the limit on processes (`ulimit -u`)")
}

/// The demonstration's directory, if the file is in one: nothing else is ever removed.
fn directory_of(path: &Path) -> Option<&Path> {
    let directory = path.parent().filter(|_| path.file_name().is_some_and(|name| name == FILE))?;
    directory.file_name()?.to_str()?.starts_with(PREFIX).then_some(directory)
}

fn remove(directory: &Path) {
    let begun = Instant::now();
    while fs::remove_dir_all(directory).is_err() && directory.exists() && begun.elapsed() < REMOVED_WITHIN {
        thread::sleep(Duration::from_millis(10));
    }
}

/// Removes what killed demonstrations of this user have left below `base`; how many there were.
pub(super) fn sweep(base: &Path) -> usize {
    let ours = rustix::process::geteuid().as_raw();
    let entries = fs::read_dir(base).into_iter().flatten().flatten().map(|entry| entry.path().join(FILE));
    let forsaken = entries.filter(|path| {
        let file = directory_of(path).and_then(|_| File::open(path).ok());
        file.is_some_and(|file| {
            file.metadata().is_ok_and(|meta| meta.uid() == ours)
                && flock(&file, FlockOperation::NonBlockingLockShared).is_ok()
        })
    });
    let found: Vec<_> = forsaken.collect();
    found.iter().filter_map(|path| path.parent()).for_each(remove);
    found.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_a_dead_demonstration_left_is_swept() {
        let base = tempfile::tempdir().expect("a directory");
        let make = |name: &str| {
            let path = base.path().join(name);
            fs::create_dir(&path).expect("it is made");
            path
        };
        let (dead, alive, other) = (make("pageferry-demo-a"), make("pageferry-demo-b"), make("others"));
        let kept = make("pageferry-demo-c");
        fs::write(dead.join("disk.img"), "x").expect("it is written");
        drop(Lease::grant(&dead).expect("a lease"));
        drop(Lease::grant(&other).expect("a lease"));
        let lease = Lease::grant(&alive).expect("a lease");
        Lease::grant(&kept).expect("a lease").give_up();
        assert_eq!(sweep(base.path()), 1);
        let there = [&dead, &alive, &other, &kept].map(|path| path.exists());
        assert_eq!(there, [false, true, true, true]);
        drop(lease);
        assert_eq!(sweep(base.path()), 1);
        assert!(directory_of(Path::new("/home/me/alive")).is_none());
    }
}
