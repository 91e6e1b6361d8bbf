//! A page for models: loom sees who reads and writes it, and two that do at once, or without an ordering between them,
//! end the model with a race. Built for `loom_models` alone. `unsafe` is allowed here.

use std::sync::Arc;

use loom::cell::UnsafeCell;

/// A page of one number.
#[derive(Debug)]
pub(crate) struct WatchedPage(UnsafeCell<u32>);

// SAFETY: every access goes through loom's cell, which ends the run before a race could happen; threads of a model are
// coroutines of one thread. Worth it: that the cell can be reached from two of them is what is tested.
unsafe impl Sync for WatchedPage {}

impl WatchedPage {
    /// Holds 0.
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self(UnsafeCell::new(0)))
    }
    /// Overwrites it.
    pub(crate) fn write(&self, number: u32) {
        // SAFETY: the cell hands out its own content, and nobody else has it meanwhile, or loom ends the run.
        self.0.with_mut(|content| unsafe { *content = number });
    }
    /// What it holds.
    pub(crate) fn read(&self) -> u32 {
        // SAFETY: as in `write`.
        self.0.with(|content| unsafe { *content })
    }
}
