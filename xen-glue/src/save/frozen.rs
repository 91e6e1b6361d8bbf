//! A save that leaves pages where they stand on disks which, so its operator declares, do not change any more.
//!
//! ```text
//!   suspend | freeze: open, flush, index, key -> FROZEN_DISKS | last pages: those that may stand on a disk are left out (XALLOC)
//!           | refer: read what they were left for, along the disks -> right: REFERENCES; not right: the page itself | state, END
//! ```
//!
//! A file has nobody to ask again, so an index is believed nothing here: a page is left out of the file only if the disk was
//! read and gave it. That is done once, at the end, when whatever requests the guest had under way as it stopped have
//! reached the disk as well. A save of a running guest writes every page: it writes its disks meanwhile.
//!
//! Whatever can't be had costs space: the page is written.
#![forbid(unsafe_code)]

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use mover::disk::Disks;
use mover::disk::image::{DiskSpec, ImageDisks, Role};
use mover::error::DiskError;
use mover::fingerprint::CheckKey;
use mover::index::Duplicates;
use mover::index::commands;
use mover::index::set::Tables;
use mover::limits::READ_DEPTH;
use mover::memory::PageBuf;
use mover::pipeline::load::SWEEP_PAGES;
use mover::pipeline::sweep::{End, Found, Sweeper};
use mover::pipeline::table::Wanted;
use mover::runtime::{Runtime, Threads};
use mover::units::{BlockAddress, DiskId, PAGE_BYTES_U64, f64_of, u64_of};
use mover::wire::hello::Secret;

use super::phases::Save;
use super::{Event, SaveError, Toolstack};
use crate::abi::Part;
use crate::domain::Source;
use crate::stream::limits::REFERENCES_WRITTEN_MAX;
use crate::stream::{FrozenDisks, PageEntry, PageType, Reference};

/// Most pages that are left out of one file, 16 GiB of them; any further ones are written. Each takes 48 bytes until the end.
const LEFT_MAX: usize = 1 << 22;
const MIB: f64 = 1_048_576.0;

/// Where pages may be left.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Frozen {
    /// The guest's disks that have been declared frozen.
    pub disks: Vec<DiskSpec>,
    /// Where `pageferry index` keeps what it knows of disks.
    pub indexes: PathBuf,
}

/// What was left on disks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LeftOut {
    /// Pages.
    pub references: u64,
    /// Pages that were looked for there and stand there no more, so that they were written.
    pub stale: u64,
    /// Bytes that the file is shorter for it.
    pub spared: u64,
}

impl fmt::Display for LeftOut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} pages by reference on frozen disks, {:.1} MiB spared; {} more were looked for there and written after all",
            self.references,
            f64_of(self.spared) / MIB,
            self.stale
        )
    }
}

/// What a save with references works with.
pub(super) struct Referrer {
    disks: Arc<ImageDisks>,
    /// Names of those that the guest may write.
    writable: Vec<String>,
    tables: Tables,
    key: CheckKey,
    /// Pages left out so far.
    left: Vec<Wanted>,
    near: Option<BlockAddress>,
    page: PageBuf,
    entries: Vec<PageEntry>,
    /// Which contents of the batch are written.
    written: Vec<usize>,
}

impl Referrer {
    /// Leaves out of a batch what may stand on a disk. Entries and contents to be written are in [`Self::batch`] then.
    pub(super) fn judge(&mut self, entries: &[PageEntry], source: &impl Source) {
        self.entries.clear();
        self.written.clear();
        let mut at = 0;
        for &entry in entries {
            let mut entry = entry;
            if entry.has_data() {
                match source.content(at) {
                    Part::Bytes(bytes) => self.page.0.copy_from_slice(bytes),
                    Part::Page(page) => page.copy_to(&mut self.page),
                }
                // A PV guest's page tables are other bytes on every host, and stand on no disk.
                match self.look_up().filter(|_| entry.page_type() == PageType::Normal) {
                    Some(block) => {
                        let (pfn, check) = (entry.pfn(), self.key.check(&self.page));
                        self.left.push(Reference { pfn, block, check }.wanted());
                        self.near = Some(block);
                        entry = PageEntry::new(pfn, PageType::AllocateOnly);
                    }
                    None => self.written.push(at),
                }
                at += 1;
            }
            self.entries.push(entry);
        }
    }

    fn look_up(&self) -> Option<BlockAddress> {
        (self.left.len() < LEFT_MAX).then(|| self.tables.find(&self.page, self.near)).flatten()
    }

    /// The batch as it is to be written: entries, and the places of their contents in the source's.
    pub(super) fn batch(&self) -> (&[PageEntry], &[usize]) {
        (&self.entries, &self.written)
    }
}

impl<S: Source, T: Toolstack> Save<'_, S, T> {
    /// Opens the disks that pages may be left on, and says so in the stream; without a word of it where none can be.
    pub(super) fn freeze(&mut self) -> Result<(), SaveError> {
        let Some(frozen) = self.options.frozen.as_ref().filter(|frozen| !frozen.disks.is_empty()) else {
            return Ok(());
        };
        let why = match (self.options.live, self.options.verify, self.to_file) {
            (true, _, true) => "the guest runs while it is saved, and writes its disks",
            (false, true, true) => "all pages are to be written twice and compared",
            (_, _, false) => return Ok(()),
            (false, false, true) => {
                match referrer(frozen, &mut |text| self.toolstack.report(&Event::Note(text))) {
                    Ok(Some((referrer, disks))) => {
                        self.records.frozen_disks(&disks)?;
                        self.referrer = Some(referrer);
                        return Ok(());
                    }
                    Ok(None) => "none of the frozen disks has an index that could be used",
                    Err(error) => {
                        self.toolstack.report(&Event::Note(&error.to_string()));
                        "a frozen disk can't be read"
                    }
                }
            }
        };
        self.toolstack.report(&Event::Note(&format!("every page is written into the file: {why}")));
        Ok(())
    }

    /// Reads what pages were left out for: what is right is referred to, the other pages are written after all.
    pub(super) fn refer(&mut self) -> Result<(), SaveError> {
        let Some(mut referrer) = self.referrer.take() else { return Ok(()) };
        let looked_for = u64_of(referrer.left.len());
        self.toolstack.report(&Event::Detail(&format!("{looked_for} pages are looked for on the disks")));
        referrer.left.sort_unstable_by_key(|page| (page.block, page.pfn));
        let (right, mut stale) = self.read_back(&referrer)?;
        stale.sort_unstable();
        for some in stale.chunks(self.source.batch_pages()) {
            self.cancelled()?;
            self.source.fetch(some, true, &mut self.batch)?;
            let source = &self.source;
            self.summary.pages += self.records.pages(&self.batch.entries, |at| source.content(at))?;
        }
        self.source.release()?;
        for some in right.chunks(REFERENCES_WRITTEN_MAX) {
            self.records.references(some)?;
        }
        let references = u64_of(right.len());
        let spared = references * (PAGE_BYTES_U64 - u64::from(crate::stream::REFERENCE_BYTES));
        self.summary.left_out = Some(LeftOut { references, stale: looked_for - references, spared });
        if references > 0 && !referrer.writable.is_empty() {
            let text = format!(
                "pages were left on disks that the guest can write ({}): where it runs on from here, as after `xl save -c`, it \
                 writes them, and can't be restored from this file any more",
                referrer.writable.join(", ")
            );
            self.toolstack.report(&Event::Note(&text));
        }
        Ok(())
    }

    /// References to those of the pages left out that the disks gave, in the disks' order, and the other pages.
    fn read_back(&self, referrer: &Referrer) -> Result<(Vec<Reference>, Vec<u64>), SaveError> {
        let (mut right, mut stale) = (Vec::with_capacity(referrer.left.len()), Vec::new());
        let disks: Arc<dyn Disks> = Arc::<ImageDisks>::clone(&referrer.disks);
        let mut sweeper = Sweeper::new(disks, referrer.key.clone(), READ_DEPTH)?;
        let go_on = || !self.stop.load(Ordering::Relaxed);
        for some in referrer.left.chunks(SWEEP_PAGES) {
            let ended = sweeper.sweep(some, &go_on, &mut |pages, found| {
                for (page, found) in pages.iter().zip(found) {
                    match found {
                        Found::Right(_) => {
                            right.push(Reference { pfn: page.pfn, block: page.block, check: page.check })
                        }
                        Found::Other | Found::Unreadable(_) => stale.push(page.pfn.0),
                    }
                }
                Ok::<(), DiskError>(())
            })?;
            if ended == End::Stopped {
                return Err(SaveError::Cancelled);
            }
        }
        right.sort_unstable_by_key(|reference| (reference.block, reference.pfn));
        Ok((right, stale))
    }
}

/// What is needed for references to those of the disks that can be read, whose caches are flushed; a line for each that
/// can't. None if nothing is known of any.
fn referrer(
    frozen: &Frozen,
    note: &mut dyn FnMut(&str),
) -> Result<Option<(Referrer, FrozenDisks)>, DiskError> {
    let readable = |spec: &&DiskSpec| match ImageDisks::open_images(std::slice::from_ref(*spec)) {
        Ok(_) => true,
        Err(error) => {
            note(&format!("disk {} is left out: {error}", spec.name));
            false
        }
    };
    let specs: Vec<DiskSpec> = frozen.disks.iter().filter(readable).cloned().collect();
    // What they are recognised by is read below, when they have been flushed.
    let disks = ImageDisks::open_unidentified(&specs)?;
    // What this host has cached of the guest's last writes is on the disk before anything is looked for there.
    disks.flush()?;
    let (tables, notes) = commands::load(&disks, &frozen.indexes)?;
    disks.notes().iter().chain(&notes).for_each(|text| note(text));
    let known = |number| tables.table(DiskId(number)).is_some();
    if !(0..u8::try_from(specs.len()).unwrap_or(u8::MAX)).any(known) {
        return Ok(None);
    }
    let mut infos = disks.infos().to_vec();
    for (info, identity) in infos.iter_mut().zip(disks.identities()?) {
        info.identity = identity;
    }
    let key = Secret::made(|place| Threads::new().random(place));
    let disks_said = FrozenDisks { key, disks: infos };
    let referrer = Referrer {
        disks: Arc::new(disks),
        writable: specs.iter().filter(|spec| spec.role == Role::Own).map(|spec| spec.name.clone()).collect(),
        tables,
        key: disks_said.check_key(),
        left: Vec::new(),
        near: None,
        page: PageBuf::zeroed(),
        entries: Vec::new(),
        written: Vec::new(),
    };
    Ok(Some((referrer, disks_said)))
}
