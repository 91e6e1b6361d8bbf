//! What the target knows of every page: nothing yet, placed, outstanding, or just being written; and of which
//! version. One 32-bit word a page, so that one compare-and-swap decides any race (invariant 2).
//!
//! ```text
//!    31 30 | 29 ............ 0          empty ----------> busy(v) ---> placed(v)
//!    tag   | version                      |                 ^  |          |
//!                                         v                 |  v          |
//!    a newer version may always be        outstanding(v) <--+--+ <--------+
//!    claimed, an older one never
//! ```
//! Busy is a claim: its holder alone writes the page and then settles it. Whoever meets a busy page with newer data
//! waits for it to settle; a direct load under way into a page is such a claim.
//!
//! A reference's place and check stand in three words at the page's own slot, written under the page's claim and
//! read under a version that is looked at before and after, so that no reader takes half of two references.
//!
//! Words and slots may be memory that outlives the engine ([`PageTable::within`]): another one finds there what the first has left
//! outstanding, and where it stands. Once no more references come, a claim that nobody settles any more says "outstanding" too, and
//! the slot beside it is whole.

use crate::bitmap::{Bitmap, SharedBitmap};
use crate::fingerprint::Check;
use crate::sync::Ordering::{Acquire, Relaxed, Release, SeqCst};
use crate::sync::{self, AtomicU32, AtomicU64, fence};
use crate::units::{BlockAddress, PageCount, Pfn, Version, u64_of};
use crate::wire::frame::{pack_place, unpack_place};

const TAG_SHIFT: u32 = 30;
const EMPTY: u32 = 0;
const PLACED: u32 = 1;
const OUTSTANDING: u32 = 2;
const BUSY: u32 = 3;

/// What is known of a page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum State {
    /// Nothing has arrived; it reads as zero.
    Empty,
    /// Its bytes are there.
    Placed(Version),
    /// Referenced, not loaded.
    Outstanding(Version),
    /// Someone is writing it.
    Busy(Version),
}

impl State {
    fn word(self) -> u32 {
        match self {
            Self::Empty => EMPTY << TAG_SHIFT,
            Self::Placed(v) => PLACED << TAG_SHIFT | v.0,
            Self::Outstanding(v) => OUTSTANDING << TAG_SHIFT | v.0,
            Self::Busy(v) => BUSY << TAG_SHIFT | v.0,
        }
    }
    fn of(word: u32) -> Self {
        let version = Version(word & Version::MAX.0);
        match word >> TAG_SHIFT {
            EMPTY => Self::Empty,
            PLACED => Self::Placed(version),
            OUTSTANDING => Self::Outstanding(version),
            _ => Self::Busy(version),
        }
    }
}

/// Where words are.
enum Cells<T> {
    /// In this process's own memory.
    Own(Box<[T]>),
    /// So many of a mapping's, from this one on.
    #[cfg(not(all(test, feature = "loom")))]
    Within(std::sync::Arc<crate::memory::Mapping>, usize, usize),
}

impl std::ops::Deref for Cells<AtomicU32> {
    type Target = [AtomicU32];
    fn deref(&self) -> &[AtomicU32] {
        match self {
            Self::Own(cells) => cells,
            #[cfg(not(all(test, feature = "loom")))]
            Self::Within(mapping, first, count) => &mapping.half_words()[*first..first + count],
        }
    }
}

impl std::ops::Deref for Cells<AtomicU64> {
    type Target = [AtomicU64];
    fn deref(&self) -> &[AtomicU64] {
        match self {
            Self::Own(cells) => cells,
            #[cfg(not(all(test, feature = "loom")))]
            Self::Within(mapping, first, count) => &mapping.words()[*first..first + count],
        }
    }
}

/// The outcome of asking for a page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Claim {
    /// It is yours until you settle it; this is what it was.
    Granted(State),
    /// What you have is not newer; drop it.
    Stale,
    /// Someone is writing an older version; wait for it to settle.
    Busy,
}

/// A reference the target has to load.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Wanted {
    /// The page.
    pub pfn: Pfn,
    /// Version of the reference.
    pub version: Version,
    /// Where it stands.
    pub block: BlockAddress,
    /// What its bytes must give.
    pub check: Check,
}

/// The table.
pub struct PageTable {
    words: Cells<AtomicU32>,
    /// Three words a page: place, and the check's two halves. Zero pages of the kernel's until first used.
    slots: Cells<AtomicU64>,
    outstanding: AtomicU64,
    /// Outstanding pages nobody has begun to load.
    pub wanted: SharedBitmap,
    /// Outstanding pages whose reference did not hold, to be asked of the source.
    pub ask: SharedBitmap,
    /// Those asked for and not answered.
    pub asked: SharedBitmap,
    /// Pages referenced again after the first round: the guest writes them now and then, and waits for them first.
    pub hot: SharedBitmap,
}

impl PageTable {
    /// For a guest of `pages`.
    ///
    /// # Panics
    /// If the address space can't hold it: 28 bytes a page, of which 4 are touched.
    #[must_use]
    pub fn new(pages: PageCount) -> Self {
        let bits = pages.entries();
        let words = sync::zeroed_halves(bits).expect("4 bytes a page");
        let slots = sync::zeroed(bits * 3).expect("24 bytes a page of address space");
        Self::over(bits, Cells::Own(words), Cells::Own(slots))
    }

    /// Bytes of memory for [`Self::within`].
    #[must_use]
    pub fn bytes(pages: PageCount) -> usize {
        (pages.entries().div_ceil(2) + 3 * pages.entries()) * 8
    }

    /// For a guest of `pages`, in the first [`Self::bytes`] of `memory`: zeroes, or what an engine has left there that is no more.
    ///
    /// # Panics
    /// If it is too short.
    #[cfg(not(all(test, feature = "loom")))]
    #[must_use]
    pub fn within(memory: &std::sync::Arc<crate::memory::Mapping>, pages: PageCount) -> Self {
        let bits = pages.entries();
        assert!(Self::bytes(pages) <= memory.bytes(), "a table of {bits} pages in {} bytes", memory.bytes());
        let within = std::sync::Arc::clone;
        let words = Cells::Within(within(memory), 0, bits);
        let slots = Cells::Within(within(memory), bits.div_ceil(2), 3 * bits);
        Self::over(bits, words, slots)
    }

    /// Models have no memory that is another process's too.
    #[cfg(all(test, feature = "loom"))]
    pub fn within(_: &std::sync::Arc<crate::memory::Mapping>, _: PageCount) -> Self {
        unreachable!("nothing that is modelled asks for it")
    }

    fn over(bits: usize, words: Cells<AtomicU32>, slots: Cells<AtomicU64>) -> Self {
        Self {
            words,
            slots,
            outstanding: AtomicU64::new(0),
            wanted: SharedBitmap::new(bits),
            ask: SharedBitmap::new(bits),
            asked: SharedBitmap::new(bits),
            hot: SharedBitmap::new(bits),
        }
    }

    /// Pages it knows.
    #[must_use]
    pub fn pages(&self) -> PageCount {
        PageCount(u64_of(self.words.len()))
    }

    /// What is known of `pfn`.
    #[must_use]
    pub fn state(&self, pfn: Pfn) -> State {
        State::of(self.words[pfn.index()].load(SeqCst))
    }

    /// Pages referenced and not yet there.
    #[must_use]
    pub fn outstanding(&self) -> u64 {
        self.outstanding.load(SeqCst)
    }

    /// Asks for `pfn` in order to write `version` of it. With `only_outstanding`, a page that is there already is
    /// not touched any more, however new the version: the guest may be using it.
    pub fn claim(&self, pfn: Pfn, version: Version, only_outstanding: bool) -> Claim {
        let word = &self.words[pfn.index()];
        let mut seen = word.load(SeqCst);
        loop {
            let state = State::of(seen);
            match state {
                State::Busy(v) if v < version => return Claim::Busy,
                State::Busy(_) => return Claim::Stale,
                State::Placed(v) if v >= version => return Claim::Stale,
                State::Outstanding(v) if v >= version => return Claim::Stale,
                State::Empty | State::Placed(_) if only_outstanding => return Claim::Stale,
                State::Empty | State::Placed(_) | State::Outstanding(_) => {}
            }
            match word.compare_exchange(seen, State::Busy(version).word(), SeqCst, SeqCst) {
                Ok(_) => return Claim::Granted(state),
                Err(now) => seen = now,
            }
        }
    }

    /// Claims `pfn` for the load of just this reference; `false` if anything newer has come.
    pub fn claim_load(&self, pfn: Pfn, version: Version) -> bool {
        let (from, to) = (State::Outstanding(version).word(), State::Busy(version).word());
        self.words[pfn.index()].compare_exchange(from, to, SeqCst, SeqCst).is_ok()
    }

    /// Settles a claimed page: its bytes are there. `before` is what the claim was granted on.
    ///
    /// # Panics
    /// If the page is not claimed with this version: a broken invariant.
    pub fn placed(&self, pfn: Pfn, version: Version, before: State) {
        self.settle(pfn, version, State::Placed(version));
        self.left_outstanding(pfn, before);
    }

    /// Settles a claimed page as it was before: nothing of it has been written that matters.
    ///
    /// # Panics
    /// If the page is not claimed with this version.
    pub fn unclaim(&self, pfn: Pfn, version: Version, before: State) {
        self.settle(pfn, version, before);
    }

    /// Records a reference. `Granted` says it is outstanding now.
    pub fn refer(&self, pfn: Pfn, version: Version, block: BlockAddress, check: Check) -> Claim {
        let claim = self.claim(pfn, version, false);
        if let Claim::Granted(before) = claim {
            // Who sees one of the new words sees the claim too, when it looks at the page's word again.
            fence(Release);
            let (low, high) = halves(check);
            let at = pfn.index() * 3;
            for (slot, value) in self.slots[at..at + 3].iter().zip([pack_place(block), low, high]) {
                slot.store(value, Relaxed);
            }
            if !matches!(before, State::Outstanding(_)) {
                self.outstanding.fetch_add(1, SeqCst);
            }
            self.ask.clear(pfn.index());
            self.asked.clear(pfn.index());
            self.settle(pfn, version, State::Outstanding(version));
            self.wanted.set(pfn.index());
        }
        claim
    }

    /// The reference outstanding for `pfn`, if there is one that nobody is changing right now.
    #[must_use]
    pub fn reference(&self, pfn: Pfn) -> Option<Wanted> {
        let word = &self.words[pfn.index()];
        loop {
            let seen = word.load(Acquire);
            let State::Outstanding(version) = State::of(seen) else { return None };
            let at = pfn.index() * 3;
            let [place, low, high] = [0, 1, 2].map(|i| self.slots[at + i].load(Relaxed));
            fence(Acquire);
            if word.load(Relaxed) == seen {
                let check = whole(low, high);
                return Some(Wanted { pfn, version, block: unpack_place(place), check });
            }
        }
    }

    /// Where `pfn` was last said to stand; for when no more references come.
    #[must_use]
    pub fn last_block(&self, pfn: Pfn) -> BlockAddress {
        unpack_place(self.slots[pfn.index() * 3].load(Relaxed))
    }

    /// The pages outstanding now, and one page that is busy, if any is.
    #[must_use]
    pub fn survey(&self) -> (Bitmap, Option<Pfn>) {
        let mut outstanding = Bitmap::new(self.words.len());
        let mut busy = None;
        for (at, word) in self.words.iter().enumerate() {
            match State::of(word.load(SeqCst)) {
                State::Outstanding(_) => {
                    outstanding.set(at);
                }
                State::Busy(_) => busy = Some(Pfn::at(at)),
                State::Empty | State::Placed(_) => {}
            }
        }
        (outstanding, busy)
    }

    /// The pages that an engine has left outstanding which is no more; those it was writing are among them.
    #[must_use]
    pub fn left(&self) -> Bitmap {
        let mut left = Bitmap::new(self.words.len());
        for (at, word) in self.words.iter().enumerate() {
            if matches!(State::of(word.load(SeqCst)), State::Outstanding(_) | State::Busy(_)) {
                left.set(at);
            }
        }
        left
    }

    /// Goes on where that engine has stopped: of what it has left, the pages of `missing` are outstanding and wanted, the others
    /// have come. Called before anybody else uses the table.
    pub fn take_up(&self, missing: &Bitmap) {
        for at in self.left().iter() {
            let (State::Outstanding(version) | State::Busy(version)) = self.state(Pfn::at(at)) else {
                continue;
            };
            let (to, count) = match missing.get(at) {
                true => (State::Outstanding(version), u64::from(self.wanted.set(at))),
                false => (State::Placed(version), 0),
            };
            self.words[at].store(to.word(), SeqCst);
            self.outstanding.fetch_add(count, SeqCst);
        }
    }

    fn settle(&self, pfn: Pfn, version: Version, to: State) {
        let before = self.words[pfn.index()].swap(to.word(), SeqCst);
        assert_eq!(State::of(before), State::Busy(version), "{pfn} was settled without being claimed");
    }

    fn left_outstanding(&self, pfn: Pfn, before: State) {
        if matches!(before, State::Outstanding(_)) {
            self.asked.clear(pfn.index());
            self.ask.clear(pfn.index());
            self.outstanding.fetch_sub(1, SeqCst);
        }
    }
}

fn halves(check: Check) -> (u64, u64) {
    let n = u128::from_le_bytes(check.0);
    let low = u64::try_from(n & u128::from(u64::MAX)).unwrap_or(0);
    (low, u64::try_from(n >> 64).unwrap_or(0))
}

fn whole(low: u64, high: u64) -> Check {
    Check((u128::from(high) << 64 | u128::from(low)).to_le_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::{DiskId, Sector};
    use proptest::prelude::*;

    const BLOCK: BlockAddress = BlockAddress { disk: DiskId(1), sector: Sector(8) };
    const CHECK: Check = Check([0xab; 16]);

    fn table() -> PageTable {
        PageTable::new(PageCount(4))
    }

    #[test]
    fn older_arrivals_are_dropped() {
        let t = table();
        assert_eq!(t.claim(Pfn(0), Version(5), false), Claim::Granted(State::Empty));
        assert_eq!(t.claim(Pfn(0), Version(4), false), Claim::Stale, "older than what is being written");
        assert_eq!(t.claim(Pfn(0), Version(6), false), Claim::Busy, "newer than what is being written");
        t.placed(Pfn(0), Version(5), State::Empty);
        assert_eq!(t.claim(Pfn(0), Version(5), false), Claim::Stale, "a page twice in a round");
        assert_eq!(t.refer(Pfn(0), Version(4), BLOCK, CHECK), Claim::Stale);
        assert_eq!(t.claim(Pfn(0), Version(6), true), Claim::Stale, "the guest may be using it");
    }

    #[test]
    fn a_reference_is_replaced_by_newer_data_and_not_loaded_over_it() {
        let t = table();
        assert_eq!(t.refer(Pfn(1), Version(2), BLOCK, CHECK), Claim::Granted(State::Empty));
        let wanted = t.reference(Pfn(1)).unwrap();
        assert_eq!((wanted.version, wanted.block, wanted.check), (Version(2), BLOCK, CHECK));
        assert_eq!(t.outstanding(), 1);
        let Claim::Granted(before) = t.claim(Pfn(1), Version(3), false) else { panic!("newer data") };
        t.placed(Pfn(1), Version(3), before);
        assert_eq!(t.outstanding(), 0);
        assert!(!t.claim_load(Pfn(1), Version(2)), "the load that was under way comes too late");
    }

    #[test]
    fn newer_data_waits_for_a_load_under_way() {
        let t = table();
        t.refer(Pfn(2), Version(2), BLOCK, CHECK);
        assert!(t.claim_load(Pfn(2), Version(2)));
        assert_eq!(t.claim(Pfn(2), Version(3), false), Claim::Busy);
        t.unclaim(Pfn(2), Version(2), State::Outstanding(Version(2)));
        assert_eq!(t.outstanding(), 1);
        assert_eq!(t.claim(Pfn(2), Version(3), true), Claim::Granted(State::Outstanding(Version(2))));
    }

    /// An engine that is killed leaves pages outstanding, one of them in its hands, and another one that it has just placed.
    #[cfg(not(feature = "loom"))]
    #[test]
    #[cfg_attr(miri, ignore = "miri knows no memory files")]
    fn another_engine_finds_what_was_outstanding_and_where_it_stands() {
        use std::os::fd::AsFd;
        let pages = PageCount(5);
        let file = rustix::fs::memfd_create("table", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&file, 4096).unwrap();
        let memory =
            || std::sync::Arc::new(crate::memory::Mapping::shared(file.as_fd(), 4096, false).unwrap());
        let killed = PageTable::within(&memory(), pages);
        for at in 0..4 {
            let block = BlockAddress { disk: DiskId(1), sector: Sector(8 * at) };
            killed.refer(Pfn(at), Version(2), block, CHECK);
        }
        assert!(killed.claim_load(Pfn(0), Version(2)));
        killed.placed(Pfn(0), Version(2), State::Outstanding(Version(2)));
        assert!(killed.claim_load(Pfn(1), Version(2)));
        assert_eq!(killed.claim(Pfn(2), Version(7), true), Claim::Granted(State::Outstanding(Version(2))));
        drop(killed);
        let t = PageTable::within(&memory(), pages);
        assert_eq!((t.left().iter().collect::<Vec<_>>(), t.outstanding()), (vec![1, 2, 3], 0));
        // The hypervisor says that page 1 is there.
        let mut missing = t.left();
        missing.clear(1);
        t.take_up(&missing);
        assert_eq!(t.outstanding(), 2);
        assert_eq!(t.wanted.snapshot().iter().collect::<Vec<_>>(), [2, 3]);
        assert_eq!(t.state(Pfn(1)), State::Placed(Version(2)));
        let wanted = t.reference(Pfn(2)).unwrap();
        assert_eq!((wanted.version, wanted.block.sector, wanted.check), (Version(7), Sector(16), CHECK));
        assert!(t.claim_load(Pfn(2), Version(7)));
        t.placed(Pfn(2), Version(7), State::Outstanding(Version(7)));
        assert_eq!(t.outstanding(), 1);
    }

    proptest! {
        /// Any order of whole transmissions ends with the newest, and the count of outstanding pages is right.
        #[test]
        fn the_newest_version_wins(arrivals in proptest::collection::vec((1u32..50, any::<bool>()), 1..40)) {
            let t = table();
            for (version, by_reference) in &arrivals {
                let version = Version(*version);
                if *by_reference {
                    t.refer(Pfn(3), version, BLOCK, CHECK);
                } else if let Claim::Granted(before) = t.claim(Pfn(3), version, false) {
                    t.placed(Pfn(3), version, before);
                }
            }
            let newest = arrivals.iter().map(|a| a.0).max().unwrap();
            let first_of_newest = arrivals.iter().find(|a| a.0 == newest).unwrap();
            let expected = if first_of_newest.1 { State::Outstanding(Version(newest)) } else { State::Placed(Version(newest)) };
            prop_assert_eq!(t.state(Pfn(3)), expected);
            prop_assert_eq!(t.outstanding(), u64::from(first_of_newest.1));
        }
    }
}
