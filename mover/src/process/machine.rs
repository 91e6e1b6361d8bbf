//! A guest's machinery as its server drives it: memory, disks, vCPUs, checker.

#![forbid(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::config::GuestConfig;
use super::control::{GuestDisk, Phase, Status};
use super::image;
use super::inside::drive::{self, Drive};
use super::inside::layout::Layout;
use super::inside::program::Inside;
use super::inside::scrub::{self, ScrubSwitch};
use super::inside::vcpu::{self, RunGate};
use super::life::Machinery;
use super::shared::{SharedGate, SharedWriteLog};
use crate::error::GuestError;
use crate::memory::Mapping;
use crate::units::{DiskId, PAGE_BYTES_U64, u64_of, usize_of};

/// How long threads may take to end.
const END_PATIENCE: Duration = Duration::from_secs(2);

/// A guest as its server sees it.
pub(super) struct Machine {
    config: GuestConfig,
    born: Instant,
    memory_file: OwnedFd,
    memory: Arc<Mapping>,
    writes_file: OwnedFd,
    gate_file: OwnedFd,
    disks: Vec<GuestDisk>,
    inside: Arc<Inside>,
    gate: Arc<RunGate>,
    scrubbing: Arc<ScrubSwitch>,
}

fn no_memory(config: &GuestConfig, source: io::Error) -> GuestError {
    GuestError::Os {
        doing: format!("cannot make {} bytes of guest memory", config.memory_bytes),
        remedy: "Give the guest less memory, or free some",
        source,
    }
}

impl Machine {
    /// Makes the memory, opens the disks and starts the threads, which wait: for [`Self::boot`] or for a migration.
    pub(super) fn new(config: &GuestConfig) -> Result<Self, GuestError> {
        config.check()?;
        let failed = |e: io::Error| no_memory(config, e);
        let opened = config.disks.iter().map(|path| drive::open(path)).collect::<Result<Vec<_>, _>>()?;
        let sizes: Vec<u64> = opened.iter().map(|(_, bytes)| *bytes).collect();
        let layout = Layout::new(config.memory_bytes, &sizes)?;
        let memory_file = rustix::fs::memfd_create("pageferry-guest", rustix::fs::MemfdFlags::CLOEXEC)
            .map_err(|e| failed(e.into()))?;
        rustix::fs::ftruncate(&memory_file, config.memory_bytes).map_err(|e| failed(e.into()))?;
        let bytes = usize_of(config.memory_bytes);
        let memory = Arc::new(Mapping::shared(memory_file.as_fd(), bytes, config.prefault).map_err(failed)?);
        let (writes, writes_file) = SharedWriteLog::create(&sizes).map_err(failed)?;
        let (gate, gate_file) = SharedGate::create(&sizes).map_err(failed)?;
        let (writes, gate) = (Arc::new(writes), Arc::new(gate));
        let mut drives = Vec::new();
        let mut used = Vec::new();
        for (n, (opened, path)) in opened.into_iter().zip(&config.disks).enumerate() {
            used.push(used_blocks(path, opened.1)?);
            let id = DiskId(u8::try_from(n).unwrap_or(u8::MAX));
            drives.push(Drive::new(opened, path, id, Arc::clone(&writes), Arc::clone(&gate)));
        }
        let described = |(n, drive): (usize, &Drive)| GuestDisk {
            name: format!("disk{n}"),
            path: drive.path().to_owned(),
            bytes: drive.bytes(),
        };
        let disks = drives.iter().enumerate().map(described).collect();
        let inside = Inside::new(&config.name, Arc::clone(&memory), layout, drives, used);
        let machine = Self {
            config: config.clone(),
            born: Instant::now(),
            memory_file,
            memory,
            writes_file,
            gate_file,
            disks,
            inside: Arc::new(inside),
            gate: Arc::default(),
            scrubbing: Arc::default(),
        };
        let rate = config.scrub_pages_per_second;
        if rate > 0 {
            scrub::spawn(&machine.inside, &machine.scrubbing, rate).map_err(|e| machine.no_thread(e))?;
        }
        Ok(machine)
    }

    fn no_thread(&self, source: io::Error) -> GuestError {
        GuestError::Os {
            doing: format!("cannot start the threads of guest {}", self.config.name),
            remedy: "Raise the limit of processes (ulimit -u)",
            source,
        }
    }

    /// Fills the memory and lets the vCPUs run. Ends early, not running, when `stop` is set.
    pub(super) fn boot(&self, stop: &AtomicBool) -> Result<(), GuestError> {
        let config = &self.config;
        self.inside.boot(&config.workload, config.seed, config.vcpus, stop)?;
        self.start_vcpus()?;
        self.run(false);
        Ok(())
    }

    /// Starts the threads of vCPUs that are there now. They wait at the gate.
    fn start_vcpus(&self) -> Result<(), GuestError> {
        vcpu::spawn(&self.inside, &self.gate).map_err(|e| self.no_thread(e))
    }

    fn run(&self, holding: bool) {
        self.hold(holding);
        self.scrubbing.on.store(true, Ordering::SeqCst);
        self.gate.start();
    }

    /// Whether pages are held back from now on.
    fn hold(&self, holding: bool) {
        self.scrubbing.holding.store(holding, Ordering::SeqCst);
        self.inside.frames.holding.store(holding, Ordering::SeqCst);
    }

    /// Stops the vCPUs at their next chance, for good.
    pub(super) fn halt(&self) {
        self.gate.halt();
    }

    /// Ends the threads, and gives those a moment that are in a disk operation. Where they may wait for absent pages
    /// they are left to the process's end instead.
    pub(super) fn end(&self, holding: bool) {
        self.gate.end();
        self.scrubbing.end();
        let begun = Instant::now();
        while !holding && Arc::strong_count(&self.inside) > 1 && begun.elapsed() < END_PATIENCE {
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Checks every page now; waits for it.
    pub(super) fn check_all(&self, holding: bool) {
        self.inside.check_all(holding);
    }

    pub(super) fn disks(&self) -> &[GuestDisk] {
        &self.disks
    }
    pub(super) fn memory_bytes(&self) -> u64 {
        u64_of(self.memory.bytes())
    }
    pub(super) fn base_address(&self) -> u64 {
        u64_of(self.memory.address().as_ptr().addr())
    }
    /// Guest memory, the log of disk writes, the gate.
    pub(super) fn files(&self) -> [BorrowedFd<'_>; 3] {
        [self.memory_file.as_fd(), self.writes_file.as_fd(), self.gate_file.as_fd()]
    }
    pub(super) fn status(&self, phase: Phase, migration: Option<&str>, holding: bool) -> Status {
        let ledger = &self.inside.frames.ledger;
        Status {
            guest: self.config.name.clone(),
            pid: std::process::id(),
            phase,
            migration: migration.map(str::to_owned),
            holding,
            workload: self.inside.workload_name().unwrap_or_default(),
            memory_bytes: self.memory_bytes(),
            uptime_ms: u64::try_from(self.born.elapsed().as_millis()).unwrap_or(u64::MAX),
            throttle_percent: self.inside.throttle.load(Ordering::Relaxed),
            work: self.inside.accounts.work(),
            access: self.inside.accounts.access.seen(),
            waits: self.inside.frames.waits.seen(),
            pages_checked: ledger.checked(),
            full_checks: ledger.full_checks(),
            wrong_pages: ledger.wrong(),
            first_wrong: ledger.first(),
        }
    }
}

/// Blocks of an image a guest reads as files: what its header says, or all of it.
fn used_blocks(path: &Path, bytes: u64) -> Result<u64, GuestError> {
    let blocks = bytes / PAGE_BYTES_U64;
    match image::header(path) {
        Ok(Some(header)) => Ok(header.used_blocks.min(blocks)),
        Ok(None) => Ok(blocks),
        Err(source) => Err(GuestError::Os {
            doing: format!("cannot read the guest's disk {}", path.display()),
            remedy: "Is the image whole, and readable for you?",
            source,
        }),
    }
}

impl Machinery for &Machine {
    fn pause(&mut self) -> Result<(), String> {
        self.gate.stop(self.inside.vcpus().len())
    }
    fn resume(&mut self) {
        self.gate.start();
    }
    fn save(&mut self) -> Result<Vec<u8>, String> {
        self.inside.save()
    }
    fn load(&mut self, state: &[u8]) -> Result<(), String> {
        self.inside.load(state)?;
        self.start_vcpus().map_err(|e| e.to_string())
    }
    fn start(&mut self, holding: bool) {
        self.run(holding);
    }
    fn throttle(&mut self, percent: u8) {
        self.inside.throttle.store(percent, Ordering::Relaxed);
    }
    fn holds_done(&mut self) {
        self.hold(false);
    }
}
