//! The wrong pages found: counted, the first ones kept and printed, each once.

#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::process::control::WrongPage;
use crate::units::{Pfn, usize_of};

/// Wrong pages kept and printed.
const KEPT_MAX: usize = 16;

/// Pages checked and pages found wrong.
#[derive(Debug)]
pub(crate) struct Ledger {
    guest: String,
    checked: AtomicU64,
    full_checks: AtomicU64,
    wrong: AtomicU64,
    first: Mutex<Vec<WrongPage>>,
    /// A bit for each page reported and not rewritten since.
    reported: Vec<AtomicU64>,
}

impl Ledger {
    pub(super) fn new(guest: &str, pages: u64) -> Self {
        Self {
            guest: guest.to_owned(),
            checked: AtomicU64::new(0),
            full_checks: AtomicU64::new(0),
            wrong: AtomicU64::new(0),
            first: Mutex::new(Vec::new()),
            reported: (0..pages.div_ceil(64)).map(|_| AtomicU64::new(0)).collect(),
        }
    }
    pub(crate) fn checked(&self) -> u64 {
        self.checked.load(Ordering::Relaxed)
    }
    pub(crate) fn full_checks(&self) -> u64 {
        self.full_checks.load(Ordering::Relaxed)
    }
    pub(crate) fn wrong(&self) -> u64 {
        self.wrong.load(Ordering::Relaxed)
    }
    pub(crate) fn first(&self) -> Vec<WrongPage> {
        self.first.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn count_check(&self) {
        self.checked.fetch_add(1, Ordering::Relaxed);
    }
    pub(super) fn count_full_check(&self) {
        self.full_checks.fetch_add(1, Ordering::Relaxed);
    }
    /// The page has been rewritten: what is found wrong from now on is news.
    pub(super) fn forget(&self, pfn: Pfn) {
        let word = &self.reported[usize_of(pfn.0 / 64)];
        let bit = 1 << (pfn.0 % 64);
        if word.load(Ordering::Relaxed) & bit != 0 {
            word.fetch_and(!bit, Ordering::Relaxed);
        }
    }
    /// Reports a wrong page, unless it stands reported.
    pub(super) fn report(&self, pfn: Pfn, kind: &str, what: String, expected: u64, found: u64) {
        let bit = 1 << (pfn.0 % 64);
        if self.reported[usize_of(pfn.0 / 64)].fetch_or(bit, Ordering::Relaxed) & bit != 0 {
            return;
        }
        self.wrong.fetch_add(1, Ordering::Relaxed);
        let mut first = self.first.lock().unwrap_or_else(PoisonError::into_inner);
        if first.len() < KEPT_MAX {
            eprintln!(
                "guest {}: WRONG PAGE {pfn} ({kind}): {what}; expected {expected:016x}, found {found:016x}",
                self.guest
            );
            first.push(WrongPage { pfn: pfn.0, kind: kind.to_owned(), what, expected, found });
        }
    }
}
