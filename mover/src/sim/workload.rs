//! What runs inside a simulated guest: tasks that write, read, cache, write back and overwrite, and that check every
//! byte they read. They know nothing of migrations; where the guest stands still, so do they, in the middle of
//! whatever they do.

use std::sync::Arc;

use super::content::Content;
use super::disk::{Host, SOURCE, TARGET};
use super::guest::Guest;
use super::rng::Rng;
use super::scheduler::{Group, MICRO, MILLI};
use crate::memory::PageBuf;
use crate::units::{PAGE_BYTES, Pfn, u64_of, usize_of};

/// Operations after which a task takes twice its time.
const TIRING: u64 = 300;

/// How a guest starts: its pages, and its disks' blocks.
pub(crate) struct Beginning {
    /// Contents of its pages.
    pub(crate) pages: Vec<Content>,
    /// Contents of its disks, block by block.
    pub(crate) blocks: Vec<Vec<Content>>,
}

impl Beginning {
    /// Disks of these many blocks, and memory that caches runs of them, holds data of its own, and is partly free.
    pub(crate) fn drawn(rng: &mut Rng, pages: u64, disks: &[u64]) -> Self {
        let mut blocks: Vec<Vec<Content>> = Vec::new();
        for (number, count) in disks.iter().enumerate() {
            let block = |b| if b % 13 == 0 { Content::ZERO } else { Content::of(1 + u64_of(number), b, 0) };
            blocks.push((0..*count).map(block).collect());
        }
        let (cached, own) = (rng.below(100), rng.below(100));
        let mut memory = Vec::new();
        while u64_of(memory.len()) < pages {
            let run = rng.magnitude(1, 64);
            if rng.below(100) < cached {
                let disk = &blocks[rng.index(blocks.len())];
                let from = rng.index(disk.len());
                memory.extend(disk.iter().skip(from).take(usize_of(run)));
            } else if rng.below(100) < own {
                let from = u64_of(memory.len());
                memory.extend((from..from + run).map(|at| Content::of(64, at, 0)));
            } else {
                memory.extend((0..run).map(|_| Content::ZERO));
            }
        }
        memory.truncate(usize_of(pages));
        Self { pages: memory, blocks }
    }
}

/// One task of the guest.
struct Worker {
    guest: Arc<Guest>,
    rng: Rng,
    /// The pages it changes: a hot few and all.
    hot: (u64, u64),
    pages: u64,
    gap: u64,
    generation: u64,
    kind: u64,
    weights: [u64; 7],
}

impl Guest {
    /// Starts the guest's tasks.
    pub(crate) fn go(self: &Arc<Self>, number: usize, rng: &mut Rng) {
        let shape = self.state().shape.clone();
        for task in 0..shape.tasks {
            let mut rng = Rng::new(rng.next(), "task");
            let first = rng.below(shape.pages);
            let worker = Worker {
                guest: Arc::clone(self),
                hot: (first, rng.range(1, shape.pages - first)),
                pages: shape.pages,
                gap: shape.gap,
                generation: 0,
                kind: 65 + task,
                weights: [10, 10, 1, 3, 3, 2, 1].map(|w| w * rng.below(4)),
                rng,
            };
            self.scheduler.spawn(Group::Guest(number), "guest", Box::new(move || worker.run()));
        }
    }
}

impl Worker {
    fn run(mut self) {
        let mut operations = 0;
        loop {
            self.operate();
            operations += 1;
            self.guest.state().operations += 1;
            let throttle = self.guest.state().throttle;
            let gap = self.gap * 100 / throttle * (1 + operations / TIRING).pow(2);
            let gap = self.rng.below(gap);
            self.guest.scheduler.sleep(gap);
        }
    }

    fn operate(&mut self) {
        let total: u64 = self.weights.iter().sum();
        let mut draw = self.rng.below(total.max(1));
        let mut which = 0;
        while which < 6 && draw >= self.weights[which] {
            draw -= self.weights[which];
            which += 1;
        }
        let at = self.page();
        match which {
            0 => {
                let content = self.fresh();
                self.write(at, content);
            }
            1 => self.read(at),
            2 => self.write(at, Content::ZERO),
            3 => self.load(at),
            4 => self.write_back(at),
            5 => {
                // The block changes, the page that caches it stays as it is.
                let (disk, block) = self.block();
                let content = self.fresh();
                self.write_block(disk, block, content);
            }
            _ => {
                let content = self.guest.state().expected[at].twin();
                if content != Content::ZERO.twin() {
                    self.write(at, content);
                }
            }
        }
    }

    fn page(&mut self) -> usize {
        let hot = !self.rng.once_in(4);
        usize_of(if hot { self.hot.0 + self.rng.below(self.hot.1) } else { self.rng.below(self.pages) })
    }

    fn block(&mut self) -> (usize, u64) {
        let state = self.guest.state();
        let disk = self.rng.index(state.disk_expected.len());
        (disk, self.rng.below(u64_of(state.disk_expected[disk].len())))
    }

    fn fresh(&mut self) -> Content {
        self.generation += 1;
        Content::of(self.kind, self.generation >> 24, self.generation)
    }

    /// Waits until the guest runs somewhere.
    fn host(&self) -> Host {
        loop {
            if let Some(host) = self.guest.runs_on() {
                return host;
            }
            self.guest.scheduler.block(self.guest.moved, None, "the guest to run");
        }
    }

    /// Waits until the guest runs and page `at` is there for it; where. A touch of a page held back is a fault.
    fn reach(&self, at: usize) -> Host {
        loop {
            let host = self.host();
            {
                let mut state = self.guest.state();
                if host == SOURCE || !state.held.get(at) {
                    return host;
                }
                let pfn = Pfn::at(at);
                if !state.faults.contains(&pfn) {
                    state.faults.push_back(pfn);
                }
            }
            self.guest.scheduler.wake(self.guest.faulted);
            self.guest.scheduler.block(self.guest.released, None, "a page held back");
        }
    }

    /// Takes page `at` for itself among the guest's tasks, if no other has it.
    fn take(&self, at: usize) -> bool {
        let busy = &mut self.guest.state().busy[at];
        !std::mem::replace(busy, true)
    }

    fn give(&self, at: usize, content: Content) {
        let mut state = self.guest.state();
        state.expected[at] = content;
        state.busy[at] = false;
    }

    /// Stores bytes `from..to`: one step, the dirty log knows of it.
    fn store(&self, host: Host, at: usize, page: &PageBuf, from: usize, to: usize) {
        self.guest.memory[host].page(at).copy_part_from(from, &page.0[from..to]);
        let mut state = self.guest.state();
        if host == SOURCE {
            state.touched.set(at);
            if state.armed {
                state.dirty.set(at);
            }
        }
    }

    fn write(&mut self, at: usize, content: Content) {
        if !self.take(at) {
            return;
        }
        let page = content.page();
        let split = self.rng.index(PAGE_BYTES / 64) * 64;
        self.store(self.reach(at), at, &page, 0, split);
        self.pause();
        self.store(self.reach(at), at, &page, split, PAGE_BYTES);
        self.give(at, content);
    }

    fn pause(&mut self) {
        if self.rng.once_in(2) {
            let most = self.rng.pick(&[MICRO, 100 * MICRO, 10 * MILLI]);
            let pause = self.rng.below(most);
            self.guest.scheduler.sleep(pause);
        } else {
            self.guest.scheduler.interleave();
        }
    }

    fn read(&self, at: usize) {
        let host = self.reach(at);
        let wrong = {
            let state = self.guest.state();
            if state.busy[at] { None } else { self.guest.wrong_on(&state, host, at) }
        };
        if let Some(text) = wrong {
            self.guest.scheduler.fail(text);
        }
    }

    /// Begins I/O on a block, if no other task does I/O there; on the target the gate may make a write wait.
    fn begin(&self, disk: usize, block: u64, page: Option<usize>, writes: bool) -> Host {
        loop {
            let host = page.map_or_else(|| self.host(), |at| self.reach(at));
            {
                let mut state = self.guest.state();
                if host == SOURCE || !writes || !state.gated[disk].get(usize_of(block)) {
                    state.io_in_flight += 1;
                    return host;
                }
                if !state.wanted.contains(&(disk, block)) {
                    state.wanted.push_back((disk, block));
                }
            }
            self.guest.scheduler.block(self.guest.gate_opened, None, "the gate before a disk");
        }
    }

    fn end(&self, disk: usize, block: u64) {
        {
            let mut state = self.guest.state();
            state.io_in_flight -= 1;
            state.disk_busy[disk][usize_of(block)] = false;
            state.wanted.retain(|w| *w != (disk, block));
        }
        self.guest.scheduler.wake(self.guest.io_done);
    }

    fn take_block(&self, disk: usize, block: u64) -> bool {
        !std::mem::replace(&mut self.guest.state().disk_busy[disk][usize_of(block)], true)
    }

    /// Reads a block of the disk into a page, as a page cache does.
    fn load(&mut self, at: usize) {
        let (disk, block) = self.block();
        if !self.take(at) {
            return;
        }
        let before = self.guest.state().expected[at];
        if !self.take_block(disk, block) {
            self.give(at, before);
            return;
        }
        let host = self.begin(disk, block, Some(at), false);
        self.pause();
        let mut page = PageBuf::zeroed();
        self.guest.disks.guest_read(host, disk, block, &mut page);
        let due = self.guest.state().disk_expected[disk][usize_of(block)];
        if page != due.page() {
            let what = super::content::difference(&page, due);
            let text = format!("the guest on host {host} reads block {block} of disk {disk} wrong: {what}");
            self.guest.scheduler.fail(text);
        }
        let split = self.rng.index(PAGE_BYTES / 512) * 512;
        self.store(host, at, &page, 0, split);
        self.pause();
        self.store(host, at, &page, split, PAGE_BYTES);
        self.give(at, due);
        self.end(disk, block);
    }

    /// Writes a page to a block, after which the two are duplicates.
    fn write_back(&mut self, at: usize) {
        let (disk, block) = self.block();
        if !self.take(at) {
            return;
        }
        self.reach(at);
        let content = self.guest.state().expected[at];
        self.write_block(disk, block, content);
        self.give(at, content);
    }

    fn write_block(&mut self, disk: usize, block: u64, content: Content) {
        if !self.take_block(disk, block) {
            return;
        }
        let host = self.begin(disk, block, None, true);
        if host != TARGET {
            self.guest.disks.announce_write(disk, block);
        }
        self.pause();
        let page = content.page();
        let split = self.rng.index(PAGE_BYTES / 512) * 512;
        self.guest.disks.guest_write(host, disk, block, &page, 0, split);
        self.pause();
        self.guest.disks.guest_write(host, disk, block, &page, split, PAGE_BYTES);
        self.guest.state().disk_expected[disk][usize_of(block)] = content;
        self.end(disk, block);
    }
}
