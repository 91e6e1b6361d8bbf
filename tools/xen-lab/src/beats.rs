//! A guest's beats on the shared disk's last block, seen from outside the hosts: when it ran, by this machine's clock.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// Between two looks at the block.
const LOOK: Duration = Duration::from_millis(2);
/// Bytes of a block.
const BLOCK: u64 = 4096;

/// Looks at the block until it is asked what it has seen.
pub(crate) struct Watch {
    seen: JoinHandle<std::io::Result<Vec<Instant>>>,
    stop: Arc<AtomicBool>,
}

/// The longest time without a beat.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pause {
    /// The last beat before it.
    pub(crate) began: Instant,
    /// The first beat after it.
    pub(crate) ended: Instant,
}

impl Pause {
    /// How long it was.
    pub(crate) fn length(&self) -> Duration {
        self.ended - self.began
    }
}

impl Watch {
    /// Begins to watch the disk's image.
    pub(crate) fn begin(image: &Path) -> Result<Self> {
        let file = File::open(image).with_context(|| format!("cannot open {}", image.display()))?;
        let at =
            file.metadata()?.len().checked_sub(BLOCK).context("the shared disk is smaller than a block")?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let seen = thread::spawn(move || watch(&file, at, &stopped));
        Ok(Self { seen, stop })
    }

    /// Ends it: the longest pause.
    pub(crate) fn end(self) -> Result<Pause> {
        self.stop.store(true, Ordering::Relaxed);
        let seen = self.seen.join().map_err(|_| anyhow::anyhow!("who watches the beats died"))??;
        let pauses = seen.windows(2).map(|pair| Pause { began: pair[0], ended: pair[1] });
        match pauses.max_by_key(Pause::length) {
            Some(pause) => Ok(pause),
            None => bail!("the guest has not beaten twice"),
        }
    }
}

/// When the number there was another than before.
fn watch(file: &File, at: u64, stop: &AtomicBool) -> std::io::Result<Vec<Instant>> {
    let (mut seen, mut last) = (Vec::new(), None);
    while !stop.load(Ordering::Relaxed) {
        let mut number = [0; 8];
        file.read_exact_at(&mut number, at)?;
        if last.replace(number).is_some_and(|last| last != number) {
            seen.push(Instant::now());
        }
        thread::sleep(LOOK);
    }
    Ok(seen)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_pause_is_found() {
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(2 * BLOCK).unwrap();
        let watch = Watch::begin(image.path()).unwrap();
        for (number, wait) in (1_u64..).zip([30, 20, 300, 20, 20]) {
            thread::sleep(Duration::from_millis(wait));
            image.as_file().write_all_at(&number.to_le_bytes(), BLOCK).unwrap();
        }
        thread::sleep(Duration::from_millis(50));
        // No beat comes earlier than it was written; how much later is the machine's business.
        assert!(watch.end().unwrap().length() >= Duration::from_millis(200));
        assert!(Watch::begin(image.path()).unwrap().end().is_err());
    }
}
