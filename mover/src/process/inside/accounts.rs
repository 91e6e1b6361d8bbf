//! Counters of what a guest does: work, which moves with it, and access times, which stay with the process.

#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::process::control::{AccessTimes, Work};

/// How long something took, each time. Relaxed: every count is right by itself.
#[derive(Debug)]
pub(crate) struct Times {
    buckets: [AtomicU64; AccessTimes::BUCKETS],
    ns: AtomicU64,
}

impl Default for Times {
    fn default() -> Self {
        Self { buckets: [const { AtomicU64::new(0) }; AccessTimes::BUCKETS], ns: AtomicU64::new(0) }
    }
}

impl Times {
    /// Counts one.
    pub(super) fn add(&self, took: Duration) {
        let ns = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        add(&self.buckets[AccessTimes::bucket(ns)], 1);
        add(&self.ns, ns);
    }
    fn start_over(&self) {
        self.buckets.iter().chain([&self.ns]).for_each(|counter| counter.store(0, Ordering::Relaxed));
    }
    /// All so far.
    pub(crate) fn seen(&self) -> AccessTimes {
        let mut buckets: Vec<u64> = self.buckets.iter().map(|n| n.load(Ordering::Relaxed)).collect();
        buckets.truncate(buckets.iter().rposition(|n| *n > 0).map_or(0, |last| last + 1));
        AccessTimes { buckets, total_ns: self.ns.load(Ordering::Relaxed) }
    }
}

/// Counters that every vCPU adds to. Relaxed: each is right by itself.
#[derive(Debug)]
pub(crate) struct Accounts {
    pub(super) operations: AtomicU64,
    pub(super) dirtied_bytes: AtomicU64,
    pub(super) read_bytes: AtomicU64,
    pub(super) written_bytes: AtomicU64,
    pub(super) cache_hits: AtomicU64,
    pub(super) evicted: AtomicU64,
    pub(super) skipped_bytes: AtomicU64,
    pub(super) disk_errors: AtomicU64,
    /// Page accesses.
    pub(crate) access: Times,
}

/// Adds to a counter.
pub(super) fn add(counter: &AtomicU64, n: u64) {
    counter.fetch_add(n, Ordering::Relaxed);
}

impl Accounts {
    pub(super) fn new() -> Self {
        let zero = || AtomicU64::new(0);
        Self {
            operations: zero(),
            dirtied_bytes: zero(),
            read_bytes: zero(),
            written_bytes: zero(),
            cache_hits: zero(),
            evicted: zero(),
            skipped_bytes: zero(),
            disk_errors: zero(),
            access: Times::default(),
        }
    }
    /// Counts one page access.
    pub(super) fn access(&self, took: Duration) {
        self.access.add(took);
    }
    pub(crate) fn work(&self) -> Work {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Work {
            operations: get(&self.operations),
            dirtied_bytes: get(&self.dirtied_bytes),
            read_bytes: get(&self.read_bytes),
            written_bytes: get(&self.written_bytes),
            cache_hits: get(&self.cache_hits),
            evicted: get(&self.evicted),
            skipped_bytes: get(&self.skipped_bytes),
            disk_errors: get(&self.disk_errors),
        }
    }
    /// Forgets everything.
    pub(super) fn start_over(&self) {
        self.set_work(&Work::default());
        self.access.start_over();
    }
    /// Takes over what the guest has done elsewhere.
    pub(super) fn set_work(&self, work: &Work) {
        let set = |counter: &AtomicU64, n: u64| counter.store(n, Ordering::Relaxed);
        set(&self.operations, work.operations);
        set(&self.dirtied_bytes, work.dirtied_bytes);
        set(&self.read_bytes, work.read_bytes);
        set(&self.written_bytes, work.written_bytes);
        set(&self.cache_hits, work.cache_hits);
        set(&self.evicted, work.evicted);
        set(&self.skipped_bytes, work.skipped_bytes);
        set(&self.disk_errors, work.disk_errors);
    }
}
