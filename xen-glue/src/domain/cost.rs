//! What holding pages back has cost: how many, and how long each took.
#![forbid(unsafe_code)]

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Instant;

/// Calls of one kind.
#[derive(Debug, Default)]
pub(super) struct Calls {
    count: AtomicU64,
    nanoseconds: AtomicU64,
}

impl Calls {
    /// Does `call`, which counts if it has done something.
    pub(super) fn timed<T, E>(
        &self,
        call: impl FnOnce() -> Result<T, E>,
        counts: impl FnOnce(&T) -> bool,
    ) -> Result<T, E> {
        let began = Instant::now();
        let done = call()?;
        if counts(&done) {
            self.count.fetch_add(1, Relaxed);
            let nanoseconds = u64::try_from(began.elapsed().as_nanos()).unwrap_or(u64::MAX);
            self.nanoseconds.fetch_add(nanoseconds, Relaxed);
        }
        Ok(done)
    }

    /// Microseconds of one; 0 of none.
    fn each(&self) -> u64 {
        self.nanoseconds.load(Relaxed) / self.count.load(Relaxed).max(1) / 1000
    }
}

/// What paging a guest's memory has cost so far.
#[derive(Debug, Default)]
pub struct PagingCost {
    pub(super) out: Calls,
    pub(super) back: Calls,
}

impl fmt::Display for PagingCost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { out, back } = self;
        let (gone, came) = (out.count.load(Relaxed), back.count.load(Relaxed));
        write!(
            f,
            "{gone} pages paged out at {} us each, {came} of them paged in at {} us",
            out.each(),
            back.each()
        )
    }
}
