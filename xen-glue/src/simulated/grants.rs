//! A grant table made up in memory, and mappings by it: what is mapped follows from what the entries say.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use mover::memory::{Mapping, Window};
use mover::units::Pfn;

use super::memory;
use crate::domain::Grants;

/// One entry.
#[derive(Clone, Copy)]
struct Entry {
    frame: u32,
    /// How often it is mapped.
    mapped: u32,
    /// Looks for which the hypervisor still says that it is, once it is not any more.
    lingers: u32,
}

#[derive(Default)]
struct State {
    entries: BTreeMap<usize, Entry>,
    /// Mapped entries, by the address of the first page they were mapped to.
    mapped: BTreeMap<usize, Vec<usize>>,
    linger: u32,
    /// Mappings that still succeed; all if `None`.
    refuse_after: Option<u32>,
    /// Entries that were ever mapped.
    times: usize,
}

/// The table of one domain; clones are of the same one.
#[derive(Clone)]
pub(crate) struct SimGrants {
    memory: Arc<Mapping>,
    state: Arc<Mutex<State>>,
}

/// An empty table of a domain of so many pages, and its memory.
pub(crate) fn grant_world(pages: usize) -> (SimGrants, Arc<Mapping>) {
    let memory = memory(pages);
    (SimGrants::of(&memory), memory)
}

impl SimGrants {
    /// An empty table of the domain with this memory.
    pub(crate) fn of(memory: &Arc<Mapping>) -> Self {
        Self { memory: Arc::clone(memory), state: Arc::default() }
    }
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }
    /// Entries are said to be in use for so many looks after they were unmapped.
    pub(crate) fn linger(&self, looks: u32) {
        self.state().linger = looks;
    }
    /// Only so many mappings succeed from now on; the next stops half way.
    pub(crate) fn refuse_after(&self, mappings: u32) {
        self.state().refuse_after = Some(mappings);
    }
    /// Entries that are mapped.
    pub(crate) fn in_use(&self) -> Vec<usize> {
        self.state().entries.iter().filter(|(_, entry)| entry.mapped > 0).map(|(at, _)| *at).collect()
    }
    /// Entries that are not empty.
    pub(crate) fn written(&self) -> Vec<usize> {
        self.state().entries.keys().copied().collect()
    }
    /// Pages that were ever mapped by it.
    pub(crate) fn times(&self) -> usize {
        self.state().times
    }
}

impl Grants for SimGrants {
    fn window(&self) -> Window {
        self.memory.window(256)
    }
    fn permit(&mut self, at: usize, frame: u32) {
        let entry = Entry { frame, mapped: 0, lingers: 0 };
        assert!(self.state().entries.insert(at, entry).is_none(), "entry {at} is written over");
    }
    fn clear(&mut self, at: usize) -> bool {
        let mut state = self.state();
        match state.entries.get_mut(&at) {
            Some(entry) if entry.mapped > 0 => panic!("entry {at} is to be emptied while it is mapped"),
            Some(entry) if entry.lingers > 0 => {
                entry.lingers -= 1;
                return false;
            }
            _ => {}
        }
        state.entries.remove(&at);
        true
    }
    fn is_clear(&self, at: usize) -> bool {
        !self.state().entries.contains_key(&at)
    }
    fn map(&mut self, window: &mut Window, first: usize, there: &[bool]) -> io::Result<()> {
        assert!(window.is_empty(), "a window in use");
        let mut guard = self.state();
        let state = &mut *guard;
        let count = there.iter().filter(|there| **there).count();
        let refused = state.refuse_after == Some(0);
        state.refuse_after = state.refuse_after.map(|left| left.saturating_sub(1));
        if refused {
            // The first half has been mapped and is unmapped again, which the hypervisor hears late.
            for at in first..first + count / 2 {
                state.entries.get_mut(&at).unwrap().lingers = state.linger;
            }
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        let mut next = first;
        let mut pages = Vec::new();
        for there in there {
            pages.push(there.then(|| {
                let entry = state.entries.get_mut(&next).expect("an empty entry lets nobody map anything");
                entry.mapped += 1;
                next += 1;
                Pfn(entry.frame.into())
            }));
        }
        state.times += count;
        self.memory.fill(pages.into_iter(), window);
        let address = (0..window.len()).find_map(|at| window.page(at)).unwrap().address().as_ptr().addr();
        assert!(state.mapped.insert(address, (first..next).collect()).is_none());
        Ok(())
    }
    fn unmap(&mut self, window: &mut Window) -> io::Result<()> {
        let mut guard = self.state();
        let state = &mut *guard;
        if let Some(page) = (0..window.len()).find_map(|at| window.page(at)) {
            let entries = state.mapped.remove(&page.address().as_ptr().addr()).expect("mapped by this");
            for at in entries {
                let entry = state.entries.get_mut(&at).unwrap();
                (entry.mapped, entry.lingers) = (entry.mapped - 1, state.linger);
            }
        }
        window.clear();
        Ok(())
    }
}
