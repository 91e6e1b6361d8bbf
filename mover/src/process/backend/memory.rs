//! Guest memory: the guest's memory file, mapped here too.
//!
//! Owning thread: any. Invariant: a page marked as held is not handed out, so that nobody here touches a hole whose
//! content is still to come.

#![forbid(unsafe_code)]

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use super::os;
use crate::bitmap::{Bitmap, SharedBitmap};
use crate::error::GuestError;
use crate::guest::GuestMemory;
use crate::kernel::pagemap;
use crate::memory::{Mapping, Window};
use crate::units::{ByteCount, PageCount, Pfn, u64_of, usize_of};

/// A guest's memory.
pub(super) struct Memory {
    file: OwnedFd,
    mapping: Arc<Mapping>,
    /// Pages held back from the guest, and from us.
    held: SharedBitmap,
}

impl Memory {
    /// For the source, which only reads it; pages enter our page tables as it does.
    pub(super) fn of_source(file: OwnedFd, bytes: u64) -> Result<Self, GuestError> {
        let mapping = checked(&file, bytes)
            .and_then(|bytes| Mapping::read_only(file.as_fd(), bytes))
            .map_err(cannot_map)?;
        Ok(Self::new(file, mapping))
    }

    /// For the target, which fills it: what the guest has made of it beforehand is entered into our page tables.
    pub(super) fn of_target(file: OwnedFd, bytes: u64) -> Result<Self, GuestError> {
        let mapping = checked(&file, bytes)
            .and_then(|bytes| Mapping::shared(file.as_fd(), bytes, false))
            .map_err(cannot_map)?;
        let memory = Self::new(file, mapping);
        if let Err(error) = memory.enter() {
            // Only time is lost: the pages are entered at their first touch.
            tracing::debug!(%error, "cannot enter the guest's memory into the page tables beforehand");
        }
        Ok(memory)
    }

    fn new(file: OwnedFd, mapping: Mapping) -> Self {
        let held = SharedBitmap::new(mapping.pages().entries());
        Self { file, mapping: Arc::new(mapping), held }
    }

    /// Enters what the memory file has into our page tables; what it lacks is left alone.
    fn enter(&self) -> std::io::Result<()> {
        let (mut at, mut result) = (0, Ok(()));
        let mut enter = |from: u64, to: u64| {
            if from < to && result.is_ok() {
                result = self.mapping.populate(Pfn(from), Pfn(to));
            }
        };
        pagemap::holes(self.file.as_fd(), 0, self.pages().0, |from, to| {
            enter(at, from);
            at = to;
        })?;
        enter(at, self.pages().0);
        result
    }

    /// The memory file.
    pub(super) fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
    /// The pages held back.
    pub(super) fn held(&self) -> &SharedBitmap {
        &self.held
    }
    /// `pfn`, if the guest has it.
    pub(super) fn check(&self, pfn: Pfn) -> Result<(), GuestError> {
        let pages = self.pages().0;
        if pfn.0 < pages { Ok(()) } else { Err(GuestError::NoSuchPage { pfn, pages }) }
    }
}

/// `bytes`, if the file has that many: a mapping that reaches past its end is a SIGBUS to come.
fn checked(file: &OwnedFd, bytes: u64) -> std::io::Result<usize> {
    let has = u64::try_from(rustix::fs::fstat(file)?.st_size).unwrap_or(0);
    if has < bytes || ByteCount(bytes).whole_pages().bytes().0 != bytes || bytes == 0 {
        let why = format!("the guest speaks of {bytes} bytes of memory, its memory file has {has}");
        return Err(std::io::Error::new(std::io::ErrorKind::InvalidData, why));
    }
    Ok(usize_of(bytes))
}

fn cannot_map(source: std::io::Error) -> GuestError {
    os(
        "cannot map the guest's memory",
        "Raise the limit of address space (ulimit -v), or free memory",
        source,
    )
}

impl GuestMemory for Memory {
    fn pages(&self) -> PageCount {
        self.mapping.pages()
    }
    fn pinnable(&self) -> bool {
        true
    }
    fn window(&self, capacity: usize) -> Result<Window, GuestError> {
        Ok(self.mapping.window(capacity))
    }
    fn map(&self, pfns: &[Pfn], window: &mut Window) -> Result<(), GuestError> {
        pfns.iter().try_for_each(|pfn| self.check(*pfn))?;
        let pages = pfns.iter().map(|pfn| (!self.held.get(pfn.index())).then_some(*pfn));
        self.mapping.fill(pages, window);
        Ok(())
    }
    fn untouched(&self, into: &mut Bitmap) -> Result<(), GuestError> {
        assert_eq!(u64_of(into.len()), self.pages().0, "a bit per page");
        if self.held.is_clear() {
            pagemap::untouched(self.file(), into)
        } else {
            // What is held back is a hole too, and far from zero.
            pagemap::holes(self.file(), 0, self.pages().0, |from, to| {
                for at in (usize_of(from)..usize_of(to)).filter(|at| !self.held.get(*at)) {
                    into.set(at);
                }
            })
        }
        .map_err(|e| os("cannot ask which pages of the guest were never touched", "Report it, please", e))
    }
}
