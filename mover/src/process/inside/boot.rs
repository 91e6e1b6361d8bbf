//! Booting: the plan for a workload on this memory and these disks, and filling memory as it says.

#![forbid(unsafe_code)]

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use super::accounts::Accounts;
use super::cache::{Cache, RUN_BLOCKS_MAX};
use super::content::{Rng, mix_all};
use super::drive::Drive;
use super::frames::{Frame, Frames, Kind};
use super::layout::{FRAMES_PER_ZONE, Layout};
use super::program::{ACTIVITIES, BOUNCE_PAGES, Inside, Plan, Vcpu};
use super::workload::Workload;
use crate::error::GuestError;
use crate::memory::Mapping;
use crate::units::{Pfn, u64_of, usize_of};

impl Inside {
    /// An inside that is neither booted nor loaded. `used` has the blocks with files of each drive.
    pub(crate) fn new(
        guest: &str,
        memory: Arc<Mapping>,
        layout: Layout,
        drives: Vec<Drive>,
        used: Vec<u64>,
    ) -> Self {
        let pages = layout.pages;
        Self {
            frames: Frames::new(memory, layout, guest),
            cache: Cache::new(drives, pages),
            accounts: Accounts::new(),
            used,
            plan: OnceLock::new(),
            vcpus: OnceLock::new(),
            generation: AtomicU64::new(1),
            throttle: AtomicU8::new(100),
        }
    }

    /// Makes the plan for a workload, and sets the cache's size by it.
    pub(super) fn make_plan(
        &self,
        workload: Workload,
        text: String,
        seed: u64,
        vcpus: u64,
    ) -> Result<Plan, GuestError> {
        let layout = &self.frames.layout;
        let share = |percent: u8| layout.pages * u64::from(percent) / 100;
        let bounce = BOUNCE_PAGES * vcpus;
        let reserved = layout.metadata + bounce;
        let anonymous = share(workload.memory.anonymous).checked_sub(reserved).filter(|pages| *pages > 0);
        let Some(anonymous) = anonymous else {
            return Err(GuestError::State(format!(
                "{} % of this guest's memory are too little for its own tables ({reserved} pages). Give it more \
                 memory, smaller disks or a larger anonymous share",
                workload.memory.anonymous
            )));
        };
        let cache = share(workload.memory.cache);
        let used: u64 = self.used.iter().sum();
        if cache > used {
            return Err(GuestError::State(format!(
                "the guest's disks hold {used} blocks of files and its page cache is to hold {cache}. Give it a \
                 larger image, or less memory"
            )));
        }
        self.cache.target.store(cache, Ordering::Relaxed);
        let scratch = self.scratch(layout.pages);
        if (workload.write.is_some() || workload.copy.is_some()) && scratch.2 == 0 {
            return Err(GuestError::State(
                "this workload writes new files and no disk of the guest has room. Give it a larger image"
                    .to_owned(),
            ));
        }
        let first = Pfn(layout.metadata);
        Ok(Plan { workload, text, seed, anonymous: (first, anonymous), used: self.used.clone(), scratch })
    }

    /// Where new files go: past the files of the last disk with room there, at most half as much as memory.
    fn scratch(&self, pages: u64) -> (u8, u64, u64) {
        let rooms = (0u8..).zip(self.cache.drives.iter().zip(&self.used));
        rooms
            .map(|(disk, (drive, used))| (disk, *used, drive.blocks().saturating_sub(*used).min(pages / 2)))
            .filter(|(_, _, room)| *room > 0)
            .last()
            .unwrap_or((0, 0, 0))
    }

    /// Fills memory as the workload says: tables, anonymous pages, page cache. Ends early when `stop` is set.
    pub(crate) fn boot(
        &self,
        workload: &str,
        seed: u64,
        vcpus: u32,
        stop: &AtomicBool,
    ) -> Result<(), GuestError> {
        let (workload, text) = Workload::find(workload)?;
        let vcpus = u64::from(vcpus);
        let plan = self.make_plan(workload, text, seed, vcpus)?;
        self.write_books();
        let (first, pages) = plan.anonymous;
        let bounce = BOUNCE_PAGES * vcpus;
        for pfn in first.0..first.0 + pages + bounce {
            if stop.load(Ordering::Relaxed) {
                return Ok(());
            }
            self.frames.zone(Pfn(pfn)).set(Pfn(pfn), Frame { kind: Kind::Busy, ..Frame::default() });
            self.rewrite(&plan, Pfn(pfn));
        }
        let vcpu = |number: u64| Vcpu {
            number,
            rng: Rng(mix_all(&[seed, number, 2])),
            credits: [0; ACTIVITIES],
            stream: number * 4096,
            scratch: number * (plan.scratch.2 / vcpus),
            churn: Vec::new(),
            filling: true,
        };
        self.set_vcpus((0..vcpus).map(vcpu));
        self.warm_cache(&plan, stop)?;
        // What booting did is not the workload's doing.
        self.accounts.start_over();
        let fresh = self.plan.set(plan).is_ok();
        assert!(fresh, "a guest boots once");
        Ok(())
    }

    /// Gives it its vCPUs.
    pub(super) fn set_vcpus(&self, vcpus: impl Iterator<Item = Vcpu>) {
        let fresh = self.vcpus.set(vcpus.map(Mutex::new).collect()).is_ok();
        assert!(fresh, "a guest gets its vCPUs once");
    }

    /// Says in the books what every page is before anything is filled.
    fn write_books(&self) {
        let layout = &self.frames.layout;
        for first in (0..layout.pages).step_by(usize_of(FRAMES_PER_ZONE)) {
            let mut zone = self.frames.zone(Pfn(first));
            for pfn in (first..(first + FRAMES_PER_ZONE).min(layout.pages)).map(Pfn) {
                zone.found_free(pfn);
                if pfn.0 < layout.metadata {
                    zone.set(pfn, Frame { kind: Kind::Metadata, ..Frame::default() });
                }
            }
        }
    }

    /// Reads files in no particular order until the cache is full.
    fn warm_cache(&self, plan: &Plan, stop: &AtomicBool) -> Result<(), GuestError> {
        let mut rng = Rng(mix_all(&[plan.seed, 3]));
        let mut files = Vec::new();
        for (disk, used) in (0u8..).zip(&plan.used) {
            let mut at = 0;
            while at < *used {
                let blocks = rng.file_blocks().min(used - at);
                files.push((disk, at, usize_of(blocks)));
                at += blocks;
            }
        }
        for n in (1..files.len()).rev() {
            files.swap(n, usize_of(rng.below(u64_of(n) + 1)));
        }
        let target = self.cache.target.load(Ordering::Relaxed);
        for (disk, block, blocks) in files {
            let room = target.saturating_sub(self.frames.counts.cache.load(Ordering::Relaxed));
            if room == 0 || stop.load(Ordering::Relaxed) {
                break;
            }
            let blocks = blocks.min(usize_of(room)).min(RUN_BLOCKS_MAX);
            self.cache.read_run(&self.frames, &self.accounts, disk, block, blocks);
            if self.accounts.work().disk_errors > 0 {
                return Err(GuestError::State(
                    "the guest's disk can't be read, so it does not boot; the cause is said above".to_owned(),
                ));
            }
        }
        Ok(())
    }
}
