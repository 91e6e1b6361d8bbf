//! Keeping the index of a disk fresh for as long as a guest writes it, off every critical path.
//!
//! ```text
//!     observer --harvest, once a turn--> written --(a turn without another write)--> due --> read, learnt, index written
//!                                           ^                                        |
//!                                           +------------ written meanwhile ---------+
//!     requests lost --> the whole disk is read again
//! ```
//!
//! The observer starts before the first scan, so that nothing falls between the two. What an index says of a block between its
//! being written and its being due is stale, which a migration finds by the check. Control path; sleeps to keep to a rate.
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};

use super::commands::{self, Built, Options};
use crate::bitmap::Bitmap;
use crate::disk::observer::Observer;
use crate::error::DiskError;
use crate::units::{PAGE_BYTES_U64, usize_of};

/// One disk whose index is kept.
#[derive(Debug)]
pub struct Watch {
    image: PathBuf,
    state: PathBuf,
    observer: Observer,
    /// Written in the last turn; pieces of 4 KiB.
    written: Bitmap,
    /// Quiet since, and not read yet: a scan was stopped.
    due: Bitmap,
    /// What was written before it was watched is not known.
    unknown: bool,
    /// Requests are missing: everything has to be read.
    lost: bool,
}

/// What a turn did.
#[derive(Clone, PartialEq, Debug)]
pub enum Turn {
    /// Nothing was due.
    Quiet,
    /// The index was brought up to date, or a scan for it stopped.
    Read(Built),
}

impl Watch {
    /// Begins to watch the disk at `image`, whose index is in `state`.
    ///
    /// # Errors
    /// The disk can't be opened, or writes to it can't be seen.
    pub fn start(image: &Path, state: &Path) -> Result<Self, DiskError> {
        Self::over(image, state, Observer::start(image)?)
    }

    pub(crate) fn over(image: &Path, state: &Path, observer: Observer) -> Result<Self, DiskError> {
        let bytes = commands::measure(image, state)?;
        let pieces = || Bitmap::new(usize_of(bytes.div_ceil(PAGE_BYTES_U64)));
        let (image, state) = (image.to_owned(), state.to_owned());
        Ok(Self { image, state, observer, written: pieces(), due: pieces(), unknown: true, lost: false })
    }

    /// One turn: what was written in the turn before the last and is quiet since is read again, or all of it.
    ///
    /// # Errors
    /// The kernel does not tell, the disk can't be read, or the index not be written. The next turn tries again.
    pub fn turn(&mut self, options: &mut Options<'_>) -> Result<Turn, DiskError> {
        let fresh = self.harvest()?;
        self.due.union(&self.written);
        self.due.subtract(&fresh);
        self.written = fresh;
        self.read(options)
    }

    /// The last turn: all that was written and not read yet is, quiet or not.
    ///
    /// # Errors
    /// As [`Watch::turn`].
    pub fn finish(mut self, options: &mut Options<'_>) -> Result<Turn, DiskError> {
        let fresh = self.harvest()?;
        self.due.union(&self.written);
        self.due.union(&fresh);
        self.read(options)
    }

    /// What was written since the last time.
    fn harvest(&mut self) -> Result<Bitmap, DiskError> {
        let mut fresh = Bitmap::new(self.written.len());
        match self.observer.harvest(&mut fresh) {
            Ok(found) => {
                self.lost |= found.lost;
                Ok(fresh)
            }
            Err(error) => {
                self.lost = true;
                Err(error)
            }
        }
    }

    /// Reads what is due: some of the disk, or all of it.
    fn read(&mut self, options: &mut Options<'_>) -> Result<Turn, DiskError> {
        let built = match () {
            () if self.lost => commands::build(&self.image, &self.state, options)?,
            () if self.unknown => commands::update(&self.image, &self.state, None, options)?,
            () if self.due.next_run(0).is_none() => return Ok(Turn::Quiet),
            () => commands::update(&self.image, &self.state, Some(&self.due), options)?,
        };
        if built.outcome != "stopped" {
            // Requests that were seen before the reading began are in what was read.
            (self.unknown, self.lost) = (false, false);
            self.due.clear_all();
        }
        Ok(Turn::Read(built))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::image::{DiskSpec, ImageDisks, Role};
    use crate::disk::observer::tests::Bench;
    use crate::index::Duplicates;
    use crate::memory::PageBuf;
    use std::os::unix::fs::FileExt;

    fn page(seed: u64) -> PageBuf {
        let mut page = PageBuf::zeroed();
        for (at, word) in (1_u64..).zip(page.0.chunks_exact_mut(8)) {
            word.copy_from_slice(&(seed << 20 | at).to_le_bytes());
        }
        page
    }

    /// Where the index, as it stands in its file, finds these.
    fn found(image: &Path, state: &Path, seeds: &[u64]) -> Vec<Option<u64>> {
        let spec = DiskSpec { name: "disk".to_owned(), path: image.to_owned(), role: Role::ReadOnly };
        let (tables, notes) = commands::load(&ImageDisks::open_images(&[spec]).unwrap(), state).unwrap();
        assert_eq!(notes, [""; 0]);
        seeds.iter().map(|seed| Some(tables.find(&page(*seed), None)?.sector.0 / 8)).collect()
    }

    #[test]
    fn what_is_written_is_found_when_it_has_been_quiet_for_a_turn() {
        let bench = match Bench::new() {
            Ok(bench) => bench,
            Err(why) => return eprintln!("SKIPPED: an index kept by what is written: {why}"),
        };
        let (image, state) = (bench.image(), tempfile::tempdir().unwrap());
        let file = bench.open();
        let write = |piece: u64, seed: u64| file.write_all_at(&page(seed).0, piece * PAGE_BYTES_U64).unwrap();
        (0..200).for_each(|piece| write(piece, piece));
        let mut watch = Watch::over(&image, state.path(), bench.watch(&image, 1024)).unwrap();
        let mut on = |_, _| true;
        let mut options = Options { bytes_per_second: None, progress: &mut on };
        let Turn::Read(first) = watch.turn(&mut options).unwrap() else { panic!("there was no index") };
        assert_eq!(first.outcome, "built");
        assert_eq!(found(&image, state.path(), &[7, 100, 1000]), [Some(7), Some(100), None]);
        assert_eq!(watch.turn(&mut options).unwrap(), Turn::Quiet);

        write(100, 1000);
        write(300, 1001);
        assert_eq!(watch.turn(&mut options).unwrap(), Turn::Quiet, "it has just been written");
        write(300, 1002);
        let Turn::Read(second) = watch.turn(&mut options).unwrap() else { panic!("a piece was quiet") };
        assert!(second.outcome == "updated" && second.counts.bytes_read < 1 << 20, "{second:?}");
        assert_eq!(found(&image, state.path(), &[100, 1000, 1001, 1002]), [None, Some(100), None, None]);
        let Turn::Read(_) = watch.turn(&mut options).unwrap() else { panic!("the other was quiet") };
        assert_eq!(found(&image, state.path(), &[1001, 1002]), [None, Some(300)]);

        // Nothing that was written is forgotten when it ends.
        write(7, 1003);
        let Turn::Read(_) = watch.finish(&mut options).unwrap() else { panic!("it was not read") };
        assert_eq!(found(&image, state.path(), &[7, 1003]), [None, Some(7)]);
    }

    /// Requests that the kernel's ring had no room for: the disk is read whole, though the file looks as it was.
    #[test]
    fn what_is_lost_is_a_whole_scan() {
        let bench = match Bench::new() {
            Ok(bench) => bench,
            Err(why) => return eprintln!("SKIPPED: an index kept by what is written: {why}"),
        };
        let (image, state) = (bench.image(), tempfile::tempdir().unwrap());
        let file = bench.open();
        let write = |piece: u64, seed: u64| file.write_all_at(&page(seed).0, piece * PAGE_BYTES_U64).unwrap();
        let mut watch = Watch::over(&image, state.path(), bench.watch(&image, 8)).unwrap();
        let (mut on, mut off) = (|_, _| true, |_, _| false);
        let mut options = Options { bytes_per_second: None, progress: &mut on };
        watch.turn(&mut options).unwrap();
        (0..2000).for_each(|piece| write(piece, piece));
        // Broken off, it is still to be done.
        let mut stopping = Options { bytes_per_second: None, progress: &mut off };
        assert!(
            matches!(watch.turn(&mut stopping).unwrap(), Turn::Read(built) if built.outcome == "stopped")
        );
        assert!(matches!(watch.turn(&mut options).unwrap(), Turn::Read(built) if built.outcome == "built"));
        assert_eq!(found(&image, state.path(), &[0, 999, 1999]), [Some(0), Some(999), Some(1999)]);
    }
}
