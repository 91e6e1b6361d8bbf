//! What takes long to build, kept: each object is a directory named by a hash of everything it was built from.
//!
//! An object is built in a directory of its own and renamed when it is whole, so a crash leaves no half object; builds
//! of the same object wait for one another, others go on side by side.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use std::{env, thread};

use anyhow::{Context, Result, bail};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

/// How long a build of the same object by somebody else may take.
const BUILD_LIMIT: Duration = Duration::from_secs(45 * 60);

/// The cache.
#[derive(Debug, Clone)]
pub struct Cache {
    directory: PathBuf,
}

impl Cache {
    /// The user's: `$PAGEFERRY_LAB_CACHE`, else `pageferry-lab` in `$XDG_CACHE_HOME` or `~/.cache`.
    pub fn open() -> Result<Self> {
        let named = |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let directory = named("PAGEFERRY_LAB_CACHE")
            .or_else(|| named("XDG_CACHE_HOME").map(|caches| caches.join("pageferry-lab")))
            .or_else(|| named("HOME").map(|home| home.join(".cache/pageferry-lab")))
            .context("neither PAGEFERRY_LAB_CACHE nor HOME is set: say where the lab may keep its files")?;
        for part in ["objects", "locks", "building", "logs", "labs"] {
            fs::create_dir_all(directory.join(part))
                .with_context(|| format!("cannot make the lab's cache in {}", directory.display()))?;
        }
        Ok(Self { directory: directory.canonicalize()? })
    }

    /// Where labs have their directories.
    pub(crate) fn labs(&self) -> PathBuf {
        self.directory.join("labs")
    }

    /// The log of what builds objects of this kind.
    pub(crate) fn log(&self, kind: &str) -> PathBuf {
        self.directory.join("logs").join(format!("{kind}.log"))
    }

    /// The object of `kind` that follows from `inputs`: found, or built by `build` in the directory it is given.
    pub(crate) fn object(
        &self,
        kind: &str,
        inputs: &[&str],
        build: impl FnOnce(&Path, &Path) -> Result<()>,
    ) -> Result<PathBuf> {
        let name = format!("{kind}-{}", key(inputs));
        let object = self.directory.join("objects").join(&name);
        if object.exists() {
            return Ok(object);
        }
        let _lock = lock(&self.directory.join("locks").join(&name), BUILD_LIMIT)?;
        if object.exists() {
            return Ok(object);
        }
        let log = self.log(kind);
        eprintln!("building {kind} (log: {})", log.display());
        let begun = Instant::now();
        // Under the lock nobody else builds it: what is there is left from a crash.
        let building = self.directory.join("building").join(&name);
        if building.exists() {
            fs::remove_dir_all(&building)
                .with_context(|| format!("cannot remove the rest of a build, {}", building.display()))?;
        }
        fs::create_dir(&building)?;
        let _ = fs::remove_file(&log);
        build(&building, &log).with_context(|| format!("{kind} could not be built"))?;
        fs::rename(&building, &object)?;
        eprintln!("built {kind} in {:.0} s", begun.elapsed().as_secs_f64());
        Ok(object)
    }
}

/// A name for these inputs: their order and limits count.
fn key(inputs: &[&str]) -> String {
    let mut hasher = blake3::Hasher::new();
    for input in inputs {
        hasher.update(&u64::try_from(input.len()).unwrap_or(u64::MAX).to_le_bytes());
        hasher.update(input.as_bytes());
    }
    hasher.finalize().to_hex().chars().take(16).collect()
}

/// Takes the lock file at `path`, waiting for whoever has it; it is given back when the file is dropped.
pub(crate) fn lock(path: &Path, limit: Duration) -> Result<File> {
    let file = File::options().create(true).append(true).open(path);
    let file = file.with_context(|| format!("cannot open the lock {}", path.display()))?;
    let begun = Instant::now();
    let mut said = false;
    loop {
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(file),
            Err(Errno::WOULDBLOCK) if begun.elapsed() < limit => {
                if !said && begun.elapsed() > Duration::from_secs(2) {
                    eprintln!("waiting for another process that has {}", path.display());
                    said = true;
                }
                thread::sleep(Duration::from_millis(100));
            }
            Err(Errno::WOULDBLOCK) => {
                bail!("{} was held by another process for {} s", path.display(), limit.as_secs())
            }
            Err(error) => return Err(error).context("cannot take a lock"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cache(directory: &Path) -> Cache {
        for part in ["objects", "locks", "building", "logs"] {
            fs::create_dir_all(directory.join(part)).unwrap();
        }
        Cache { directory: directory.to_path_buf() }
    }

    #[test]
    fn an_object_is_built_once_and_never_half() {
        let directory = tempfile::tempdir().unwrap();
        let cache = cache(directory.path());
        let failed = cache.object("thing", &["a", "b"], |into, _| {
            fs::write(into.join("half"), "")?;
            bail!("power failure")
        });
        assert!(failed.is_err());
        let build = |into: &Path, _: &Path| {
            assert!(!into.join("half").exists(), "the rest of the failed build is gone");
            Ok(fs::write(into.join("whole"), "")?)
        };
        let object = cache.object("thing", &["a", "b"], build).unwrap();
        assert!(object.join("whole").exists());
        let again = cache.object("thing", &["a", "b"], |_, _| bail!("built twice")).unwrap();
        assert_eq!(object, again);
        assert!(cache.object("thing", &["ab", ""], |_, _| bail!("other inputs")).is_err());
    }

    #[test]
    fn two_builders_of_one_object_take_turns() {
        let directory = tempfile::tempdir().unwrap();
        let cache = cache(directory.path());
        let builds = std::sync::atomic::AtomicU32::new(0);
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    let build = |into: &Path, _: &Path| {
                        builds.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                        thread::sleep(Duration::from_millis(100));
                        Ok(fs::write(into.join("x"), "")?)
                    };
                    assert!(cache.object("thing", &[], build).unwrap().join("x").exists());
                });
            }
        });
        assert_eq!(builds.into_inner(), 1);
    }
}
