//! References held against the disks by themselves, outside of a migration: those of a guest that has been saved into a file.
//! Nobody can send a page after all there, so a run that can't be read as a whole is read again block by block: one bad block
//! takes no other page with it.
//!
//! Runs, gaps and alignment are the loader's ([`super::load`]); one thread reads, checks, and tells.
#![forbid(unsafe_code)]

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use super::load::Run;
use super::table::Wanted;
use crate::disk::{Completion, Disks, Read, Reader, Slot};
use crate::error::DiskError;
use crate::fingerprint::CheckKey;
use crate::units::{PAGE_BYTES, Sector, u64_of, usize_of};

/// How long to wait for the disks before looking whether to go on.
const GLANCE: Duration = Duration::from_millis(50);

/// What stands where a reference points.
#[derive(Clone, Copy, Debug)]
pub enum Found<'a> {
    /// The page: its bytes give the check.
    Right(&'a [u8; PAGE_BYTES]),
    /// Something else.
    Other,
    /// It can't be read.
    Unreadable(&'a DiskError),
}

/// How a sweep ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum End {
    /// Everything has been told.
    Whole,
    /// It was not to go on.
    Stopped,
}

/// One read under way.
struct Flight {
    /// The pages it is for: a stretch of the sweep.
    members: Range<usize>,
    /// First byte on disk.
    start: u64,
}

/// Loads references in sweeps.
pub struct Sweeper {
    disks: Arc<dyn Disks>,
    key: CheckKey,
    reader: Box<dyn Reader>,
    /// By slot.
    flights: Vec<Option<Flight>>,
    under_way: usize,
    done: Vec<Completion>,
}

impl Sweeper {
    /// From `disks`, with `depth` reads under way at most; what is right has its check under `key`.
    pub fn new(disks: Arc<dyn Disks>, key: CheckKey, depth: usize) -> Result<Self, DiskError> {
        let reader = disks.reader(depth)?;
        let slots = reader.slots();
        let flights = (0..slots).map(|_| None).collect();
        Ok(Self { disks, key, reader, flights, under_way: 0, done: Vec::with_capacity(slots) })
    }

    /// Loads all of `wanted`, which is sorted by its place on the disks, and has `each` told of every page once, in runs and in
    /// no particular order. Goes on as long as `go_on` says. After an error, or stopped, it is to be dropped.
    ///
    /// # Panics
    /// If `wanted` is not sorted, or this has ended early before.
    pub fn sweep<E: From<DiskError>>(
        &mut self,
        wanted: &[Wanted],
        go_on: &dyn Fn() -> bool,
        each: &mut dyn FnMut(&[Wanted], &[Found<'_>]) -> Result<(), E>,
    ) -> Result<End, E> {
        assert!(wanted.is_sorted_by_key(|w| w.block), "a sweep goes along the disk");
        assert!(self.under_way == 0, "it was broken off before");
        let (mut next, mut again) = (0, Vec::new());
        loop {
            while self.under_way < self.flights.len() && (next < wanted.len() || !again.is_empty()) {
                let members = again.pop().unwrap_or(next..wanted.len());
                let taken = self.launch(wanted, members)?;
                next = next.max(taken);
            }
            if self.under_way == 0 {
                return Ok(End::Whole);
            }
            if !go_on() {
                return Ok(End::Stopped);
            }
            let mut done = std::mem::take(&mut self.done);
            self.reader.complete(&mut done, GLANCE)?;
            for completion in done.drain(..) {
                self.land(wanted, completion, &mut again, each)?;
            }
            self.done = done;
        }
    }

    /// Starts the read of the first run of `members`; where that ends.
    fn launch(&mut self, wanted: &[Wanted], members: Range<usize>) -> Result<usize, DiskError> {
        let disk = wanted[members.start].block.disk;
        let run = Run::at(&wanted[..members.end], members.start, u64_of(self.disks.alignment(disk)));
        let slot = self.flights.iter().position(Option::is_none).expect("fewer are under way than there are");
        let (sector, bytes) = (Sector::holding(run.start), usize_of(run.end - run.start));
        self.reader.read(Read { disk, sector, bytes, slot: Slot(slot) })?;
        let end = run.members.end;
        self.flights[slot] = Some(Flight { members: run.members, start: run.start });
        self.under_way += 1;
        Ok(end)
    }

    /// Checks a completed read's pages and tells of them; those of a run that can't be read go to `again` one by one.
    fn land<E>(
        &mut self,
        wanted: &[Wanted],
        completion: Completion,
        again: &mut Vec<Range<usize>>,
        each: &mut dyn FnMut(&[Wanted], &[Found<'_>]) -> Result<(), E>,
    ) -> Result<(), E> {
        let Completion { slot, result } = completion;
        let flight = self.flights[slot.0].take().expect("only reads in flight complete");
        self.under_way -= 1;
        let pages = &wanted[flight.members.clone()];
        let found: Vec<Found<'_>> = match &result {
            Err(_) if pages.len() > 1 => {
                again.extend(flight.members.map(|at| at..at + 1));
                return Ok(());
            }
            Err(error) => vec![Found::Unreadable(error)],
            Ok(bytes) => {
                let staged = &self.reader.staged(slot)[..*bytes];
                pages.iter().map(|page| self.judge(page, staged, flight.start)).collect()
            }
        };
        each(pages, &found)
    }

    /// What `staged`, read from byte `start` on, has for `wanted`.
    fn judge<'a>(&self, wanted: &Wanted, staged: &'a [u8], start: u64) -> Found<'a> {
        let from = usize_of(wanted.block.sector.bytes() - start);
        match staged.get(from..).and_then(|rest| rest.first_chunk()) {
            Some(bytes) if self.key.check_bytes(bytes) == wanted.check => Found::Right(bytes),
            _ => Found::Other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::image::{DiskSpec, ImageDisks, Role};
    use crate::fingerprint::Check;
    use crate::units::{BlockAddress, DiskId, Pfn, Version};
    use std::os::unix::fs::FileExt;

    const BLOCKS: usize = 3000;

    fn block(number: usize) -> [u8; PAGE_BYTES] {
        let mut out = [0; PAGE_BYTES];
        for (at, byte) in out.iter_mut().enumerate() {
            *byte = u8::try_from((number * 7 + at / 16) % 253).unwrap();
        }
        out
    }

    fn wanted(pfn: usize, at: u64, check: Check) -> Wanted {
        let block = BlockAddress { disk: DiskId(0), sector: Sector::holding(at) };
        Wanted { pfn: Pfn::at(pfn), version: Version(1), block, check }
    }

    /// Right, other and unreadable pages, by their pfns.
    fn sweep(path: &std::path::Path, shrink: Option<u64>, all: &[Wanted]) -> [Vec<u64>; 3] {
        let spec = DiskSpec { name: "xvda".into(), path: path.to_owned(), role: Role::ReadOnly };
        let disks = ImageDisks::open(&[spec]).unwrap();
        if let Some(bytes) = shrink {
            std::fs::OpenOptions::new().write(true).open(path).unwrap().set_len(bytes).unwrap();
        }
        let mut sweeper = Sweeper::new(disks, CheckKey::new([3; 32]), 4).unwrap();
        let mut fates: [Vec<u64>; 3] = Default::default();
        let mut each = |pages: &[Wanted], found: &[Found<'_>]| {
            assert_eq!(pages.len(), found.len());
            for (page, found) in pages.iter().zip(found) {
                let fate = match found {
                    Found::Right(bytes) => {
                        assert!(**bytes == block(page.pfn.index() % BLOCKS));
                        0
                    }
                    Found::Other => 1,
                    Found::Unreadable(_) => 2,
                };
                fates[fate].push(page.pfn.0);
            }
            Ok::<(), DiskError>(())
        };
        assert_eq!(sweeper.sweep(all, &|| true, &mut each).unwrap(), End::Whole);
        fates.iter_mut().for_each(|pages| pages.sort_unstable());
        fates
    }

    #[test]
    fn every_page_is_told_of_once_and_none_suffers_for_another() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("image");
        let image: Vec<u8> = (0..BLOCKS).flat_map(block).collect();
        std::fs::write(&path, &image).unwrap();
        let key = CheckKey::new([3; 32]);
        let all = |block_of: &dyn Fn(usize) -> usize| -> Vec<Wanted> {
            let at = |pfn| u64_of(block_of(pfn) * PAGE_BYTES);
            let mut all: Vec<_> = (0..2 * BLOCKS)
                .map(|pfn| wanted(pfn, at(pfn), key.check_bytes(&block(pfn % BLOCKS))))
                .collect();
            all.sort_unstable_by_key(|w| (w.block, w.pfn));
            all
        };
        // Each block is wanted by two pages.
        let right = all(&|pfn| pfn % BLOCKS);
        assert_eq!(sweep(&path, None, &right).map(|pages| pages.len()), [2 * BLOCKS, 0, 0]);
        // One bit of one block is another one.
        let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
        file.write_all_at(&[0xff], 1000 * 4096 + 77).unwrap();
        file.sync_all().unwrap();
        let fates = sweep(&path, None, &right);
        assert_eq!((fates[0].len(), &fates[1][..]), (2 * BLOCKS - 2, &[1000, 4000][..]));
        // The file ends in the middle of a run: what stands before the end is there all the same.
        let end = 2500;
        let fates = sweep(&path, Some(end * 4096), &right);
        let lost = usize_of(u64_of(BLOCKS) - end);
        assert_eq!((fates[0].len(), fates[2].len()), (2 * (BLOCKS - lost) - 2, 2 * lost));
    }

    #[test]
    fn it_stops_when_told_to() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("image");
        std::fs::write(&path, vec![1; PAGE_BYTES]).unwrap();
        let spec = DiskSpec { name: "xvda".into(), path, role: Role::ReadOnly };
        let disks = ImageDisks::open(&[spec]).unwrap();
        let mut sweeper = Sweeper::new(disks, CheckKey::new([3; 32]), 4).unwrap();
        let mut each = |_: &[Wanted], _: &[Found<'_>]| Ok::<(), DiskError>(());
        let one = [wanted(0, 0, Check::default())];
        assert_eq!(sweeper.sweep(&one, &|| false, &mut each).unwrap(), End::Stopped);
    }
}
