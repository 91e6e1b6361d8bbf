//! What a guest's memory holds, in one pass: nothing, what a disk holds too, and the rest.

use std::collections::HashSet;
use std::sync::atomic::AtomicBool;

use mover::bitmap::Bitmap;
use mover::fingerprint::hint;
use mover::guest::GuestMemory;
use mover::index::Duplicates;
use mover::memory::PageBuf;
use mover::units::{BlockAddress, Pfn, u64_of, usize_of};

use super::cancelled;
use crate::failure::Outcome;

/// Pages looked at together.
const PIECE: usize = 256;

/// What one pass over memory has found.
pub(crate) struct Seen {
    /// All pages.
    pub(crate) pages: u64,
    /// Of these, zero.
    pub(crate) zero: u64,
    /// Where those stand that the index knows.
    pub(crate) places: Vec<BlockAddress>,
    /// Different contents among the others: what a migration can't do without.
    pub(crate) unique: u64,
}

/// Looks at every page of a guest, which may run meanwhile.
pub(crate) fn classify(
    memory: &dyn GuestMemory,
    index: &dyn Duplicates,
    ending: &AtomicBool,
) -> Outcome<Seen> {
    let pages = memory.pages().0;
    let mut untouched = Bitmap::new(usize_of(pages));
    memory.untouched(&mut untouched)?;
    let mut window = memory.window(PIECE)?;
    let (mut zero, mut places, mut unique) = (0, Vec::new(), HashSet::new());
    let mut copy = PageBuf::zeroed();
    for first in (0..pages).step_by(PIECE) {
        cancelled(ending)?;
        let piece = first..(first + u64_of(PIECE)).min(pages);
        let touched: Vec<Pfn> = piece.clone().map(Pfn).filter(|pfn| !untouched.get(pfn.index())).collect();
        zero += piece.end - piece.start - u64_of(touched.len());
        memory.map(&touched, &mut window)?;
        for page in (0..window.len()).filter_map(|at| window.page(at)) {
            if page.is_zero() {
                zero += 1;
                continue;
            }
            page.copy_to(&mut copy);
            match index.find(&copy, places.last().copied()) {
                Some(place) => places.push(place),
                None => drop(unique.insert(hint(&copy.0))),
            }
        }
    }
    Ok(Seen { pages, zero, places, unique: u64_of(unique.len()) })
}
