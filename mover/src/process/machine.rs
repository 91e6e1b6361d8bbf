//! A guest's machinery: its memory, its disks, its vCPUs.

#![forbid(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Instant;

use super::config::GuestConfig;
use super::control::{AccessTimes, GuestDisk, Phase, Status, Work};
use super::life::Machinery;
use super::shared::{SharedGate, SharedWriteLog};
use crate::error::GuestError;
use crate::memory::Mapping;
use crate::units::{u64_of, usize_of};

/// A guest as its server sees it.
pub(super) struct Machine {
    config: GuestConfig,
    born: Instant,
    memory_file: OwnedFd,
    memory: Mapping,
    writes_file: OwnedFd,
    _writes: SharedWriteLog,
    gate_file: OwnedFd,
    _gate: SharedGate,
    disks: Vec<GuestDisk>,
    throttle: AtomicU8,
}

impl Machine {
    /// Makes the memory and opens the disks.
    pub(super) fn new(config: &GuestConfig) -> Result<Self, GuestError> {
        config.check()?;
        let failed = |source: io::Error| GuestError::Os {
            doing: format!("cannot make {} bytes of guest memory", config.memory_bytes),
            remedy: "Give the guest less memory, or free some",
            source,
        };
        let memory_file = rustix::fs::memfd_create("pageferry-guest", rustix::fs::MemfdFlags::CLOEXEC)
            .map_err(|e| failed(e.into()))?;
        rustix::fs::ftruncate(&memory_file, config.memory_bytes).map_err(|e| failed(e.into()))?;
        let bytes = usize_of(config.memory_bytes);
        let memory = Mapping::shared(memory_file.as_fd(), bytes, config.prefault).map_err(failed)?;
        let mut disks = Vec::new();
        for (n, path) in config.disks.iter().enumerate() {
            let bytes = std::fs::metadata(path)
                .map_err(|source| GuestError::Os {
                    doing: format!("cannot open the disk image {}", path.display()),
                    remedy: "Make one with `pageferry image`, or name another",
                    source,
                })?
                .len();
            disks.push(GuestDisk { name: format!("disk{n}"), path: path.display().to_string(), bytes });
        }
        let sizes: Vec<u64> = disks.iter().map(|disk| disk.bytes).collect();
        let (writes, writes_file) = SharedWriteLog::create(&sizes).map_err(failed)?;
        let (gate, gate_file) = SharedGate::create(&sizes).map_err(failed)?;
        Ok(Self {
            config: config.clone(),
            born: Instant::now(),
            memory_file,
            memory,
            writes_file,
            _writes: writes,
            gate_file,
            _gate: gate,
            disks,
            throttle: AtomicU8::new(100),
        })
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
        Status {
            guest: self.config.name.clone(),
            pid: std::process::id(),
            phase,
            migration: migration.map(str::to_owned),
            holding,
            workload: self.config.workload.clone(),
            memory_bytes: self.memory_bytes(),
            uptime_ms: u64::try_from(self.born.elapsed().as_millis()).unwrap_or(u64::MAX),
            throttle_percent: self.throttle.load(Ordering::Relaxed),
            work: Work::default(),
            access: AccessTimes::default(),
            pages_checked: 0,
            full_checks: 0,
            wrong_pages: 0,
            first_wrong: Vec::new(),
        }
    }
}

impl Machinery for &Machine {
    fn pause(&mut self) -> Result<(), String> {
        Ok(())
    }
    fn resume(&mut self) {}
    fn save(&mut self) -> Result<Vec<u8>, String> {
        Ok(b"none".to_vec())
    }
    fn load(&mut self, _state: &[u8]) -> Result<(), String> {
        Ok(())
    }
    fn throttle(&mut self, percent: u8) {
        self.throttle.store(percent, Ordering::Relaxed);
    }
    fn holds_done(&mut self) {}
}
