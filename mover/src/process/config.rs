//! What a guest is made of.

#![forbid(unsafe_code)]

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::error::GuestError;
use crate::limits::{DISKS_MAX, GUEST_PAGES_MAX};
use crate::units::PAGE_BYTES_U64;

/// vCPU threads a guest may have.
pub const VCPUS_MAX: u32 = 64;

/// A guest process's configuration: all it needs to boot, or to wait for a migration.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GuestConfig {
    /// Its name: letters, digits, `-`, `_`, `.`; names its control socket.
    pub name: String,
    /// Bytes of memory: a multiple of 2 MiB.
    pub memory_bytes: u64,
    /// vCPU threads, 1 to [`VCPUS_MAX`]. An incoming guest gets as many as the one it takes in has.
    pub vcpus: u32,
    /// Image files of its disks.
    pub disks: Vec<PathBuf>,
    /// Its workload: the name of a shipped one or the path of a TOML file.
    pub workload: String,
    /// Where its contents and choices start from.
    pub seed: u64,
    /// Touch all memory before booting, so that first touches cost nothing later.
    pub prefault: bool,
    /// Wait for a migration instead of booting.
    pub incoming: bool,
    /// Directory of the control socket.
    pub runtime_dir: PathBuf,
    /// An incoming guest ends if no engine has attached after so many seconds; `None`: it waits for ever.
    pub attach_within_seconds: Option<u64>,
    /// Pages a second the scrubber checks; 0: none but those the workload touches.
    pub scrub_pages_per_second: u64,
}

impl GuestConfig {
    /// A guest of that name and size with everything else at its default: one vCPU, no disk, the idle desktop,
    /// in the user's runtime directory.
    #[must_use]
    pub fn new(name: &str, memory_bytes: u64) -> Self {
        Self {
            name: name.to_owned(),
            memory_bytes,
            vcpus: 1,
            disks: Vec::new(),
            workload: "idle-desktop".to_owned(),
            seed: 1,
            prefault: false,
            incoming: false,
            runtime_dir: super::launch::runtime_dir(),
            attach_within_seconds: None,
            scrub_pages_per_second: 8192,
        }
    }

    /// Where its control socket is.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.runtime_dir.join(format!("{}.guest", self.name))
    }

    /// Where its standard error goes when it is started in a process of its own.
    #[must_use]
    pub fn log(&self) -> PathBuf {
        self.runtime_dir.join(format!("{}.log", self.name))
    }

    /// Holds every value against its limit.
    ///
    /// # Errors
    /// A sentence that names the value and what it may be.
    pub fn check(&self) -> Result<(), GuestError> {
        let wrong = |sentence: String| Err(GuestError::State(sentence));
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        if self.name.is_empty() || self.name.len() > 64 || !self.name.chars().all(plain) {
            return wrong(format!(
                "a guest can't be named {:?}: use 1 to 64 letters, digits, -, _ and dots",
                self.name
            ));
        }
        let smallest = 2 << 20;
        if self.memory_bytes < smallest
            || !self.memory_bytes.is_multiple_of(smallest)
            || self.memory_bytes / PAGE_BYTES_U64 > GUEST_PAGES_MAX
        {
            return wrong(format!(
                "a guest can't have {} bytes of memory: give a multiple of 2M, at most 1T",
                self.memory_bytes
            ));
        }
        if self.vcpus == 0 || self.vcpus > VCPUS_MAX {
            return wrong(format!("a guest can't have {} vCPUs: give 1 to {VCPUS_MAX}", self.vcpus));
        }
        if self.disks.len() > DISKS_MAX {
            return wrong(format!("a guest can't have {} disks: give at most {DISKS_MAX}", self.disks.len()));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_past_their_limits_are_refused() {
        let good = GuestConfig::new("a-guest_1.x", 64 << 20);
        assert!(good.check().is_ok());
        for bad in [
            GuestConfig { name: "../up".into(), ..good.clone() },
            GuestConfig { name: String::new(), ..good.clone() },
            GuestConfig { memory_bytes: 4096, ..good.clone() },
            GuestConfig { memory_bytes: (64 << 20) + 4096, ..good.clone() },
            GuestConfig { memory_bytes: 2 << 40, ..good.clone() },
            GuestConfig { vcpus: 0, ..good.clone() },
            GuestConfig { disks: vec!["x".into(); 17], ..good.clone() },
        ] {
            assert!(bad.check().is_err(), "{bad:?}");
        }
    }
}
