//! `pageferry index watch`: indexes kept fresh for as long as it runs, by what the kernel sees guests write.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use mover::disk::image::{DiskSpec, Role};
use mover::index::commands::{self, Built, Options};
use mover::index::watch::{Turn, Watch};
use mover::units::PAGE_BYTES_U64;
use xen_glue::abi::DomainId;
use xen_glue::ferry::attached;
use xen_glue::xenstore::Xenstore;

use crate::cli::WatchArgs;
use crate::console::Console;
use crate::failure::Outcome;
use crate::signals;
use crate::state;
use crate::units::{show_bytes, show_ms};

/// How long to sleep before looking whether this is to end.
const GLANCE: Duration = Duration::from_millis(200);
/// How long to go on reading what is not read yet when it is.
const LAST_WORDS: Duration = Duration::from_secs(10);
/// A turn shorter than this would be all reading.
const TURN_MIN: Duration = Duration::from_millis(100);

/// A disk that is to be kept.
enum Kept {
    /// It is watched.
    Watched(Watch),
    /// Nobody writes it, or its writes can't be seen: its index was looked after once.
    Once,
}

/// Watches until it is ended.
pub(super) fn run(args: &WatchArgs, console: &Console) -> Outcome {
    let ending = Arc::new(AtomicBool::new(false));
    signals::set_on_end(&ending)?;
    for refused in mover::kernel::priority::yield_to_all() {
        console.note(&refused);
    }
    let mut keeper =
        Keeper { console, directory: state::index_dir(), kept: BTreeMap::new(), rate: args.rate.0 };
    while !ending.load(Ordering::SeqCst) {
        let began = Instant::now();
        let mut wanted: Vec<DiskSpec> = args.images.iter().map(|image| spec(image)).collect();
        if args.xen {
            match guests() {
                Ok(disks) => wanted.extend(disks),
                Err(error) => console.complain(&format!("xenstore does not tell the guests' disks: {error}")),
            }
        }
        keeper.follow(&wanted, &ending);
        keeper.turn(&ending);
        while began.elapsed() < args.every.max(TURN_MIN) && !ending.load(Ordering::SeqCst) {
            std::thread::sleep(GLANCE.min(args.every));
        }
    }
    keeper.finish();
    Ok(())
}

fn spec(image: &Path) -> DiskSpec {
    DiskSpec { name: "disk".to_owned(), path: image.to_owned(), role: Role::Own }
}

/// The disks of all guests of this Xen host, and the images under them.
fn guests() -> std::io::Result<Vec<DiskSpec>> {
    let mut store = Xenstore::open()?;
    let mut all = Vec::new();
    for name in store.list("/libxl")? {
        let Ok(number) = name.parse() else { continue };
        // What is left out a save's log tells.
        let (disks, _) = attached::disks(&mut store, DomainId(number))?;
        all.extend(disks);
    }
    Ok(all)
}

struct Keeper<'c> {
    console: &'c Console,
    directory: PathBuf,
    kept: BTreeMap<PathBuf, Kept>,
    rate: u64,
}

impl Keeper<'_> {
    /// Begins with disks that are new, and ends with those that are gone.
    fn follow(&mut self, wanted: &[DiskSpec], ending: &AtomicBool) {
        let gone: Vec<PathBuf> =
            self.kept.keys().filter(|path| !wanted.iter().any(|disk| disk.path == **path)).cloned().collect();
        for path in gone {
            if let Some(Kept::Watched(watch)) = self.kept.remove(&path) {
                self.finish_one(&path, watch);
            }
        }
        for disk in wanted {
            let Entry::Vacant(place) = self.kept.entry(disk.path.clone()) else { continue };
            if disk.role == Role::Own {
                match Watch::start(&disk.path, &self.directory) {
                    Ok(watch) => {
                        place.insert(Kept::Watched(watch));
                        continue;
                    }
                    Err(error) => self.console.complain(&format!(
                        "{}: not watched, its index is brought up to date this once: {error}",
                        disk.path.display()
                    )),
                }
            }
            place.insert(Kept::Once);
            let mut on = |_, _| !ending.load(Ordering::SeqCst);
            let mut options = Options { bytes_per_second: Some(self.rate), progress: &mut on };
            match commands::update(&disk.path, &self.directory, None, &mut options) {
                Ok(built) => self.tell(&disk.path, &built),
                Err(error) => self.console.complain(&error.to_string()),
            }
        }
    }

    /// A turn of each.
    fn turn(&mut self, ending: &AtomicBool) {
        let mut told = Vec::new();
        for (path, kept) in &mut self.kept {
            let Kept::Watched(watch) = kept else { continue };
            let mut on = |_, _| !ending.load(Ordering::SeqCst);
            let mut options = Options { bytes_per_second: Some(self.rate), progress: &mut on };
            told.push((path.clone(), watch.turn(&mut options)));
        }
        for (path, turn) in told {
            match turn {
                Ok(Turn::Quiet) => {}
                Ok(Turn::Read(built)) => self.tell(&path, &built),
                Err(error) => self.console.complain(&error.to_string()),
            }
        }
    }

    /// What is not read yet is, so that the indexes are as fresh as they can be.
    fn finish(mut self) {
        for (path, kept) in std::mem::take(&mut self.kept) {
            if let Kept::Watched(watch) = kept {
                self.finish_one(&path, watch);
            }
        }
    }

    fn finish_one(&self, path: &Path, watch: Watch) {
        let began = Instant::now();
        let mut on = |_, _| began.elapsed() < LAST_WORDS;
        let mut options = Options { bytes_per_second: Some(self.rate), progress: &mut on };
        match watch.finish(&mut options) {
            Ok(Turn::Quiet) => {}
            Ok(Turn::Read(built)) => self.tell(path, &built),
            Err(error) => self.console.complain(&error.to_string()),
        }
    }

    fn tell(&self, path: &Path, built: &Built) {
        let reason = built.reason.as_ref().map_or(String::new(), |reason| format!(" ({reason})"));
        self.console.note(&format!(
            "{}: index {}{reason}: {} read in {}, {} can be found",
            path.display(),
            built.outcome,
            show_bytes(built.counts.bytes_read),
            show_ms(built.seconds * 1e3),
            show_bytes(built.entries.saturating_mul(PAGE_BYTES_U64)),
        ));
    }
}
