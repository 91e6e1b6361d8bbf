//! A lab's directory: its sockets, logs, disks and what it was started from.
//!
//! ```text
//! <cache>/labs/NAME/            lock  lab.json  lun.img  binaries.img  guests.img
//!                   host1/      console.log  qemu.log  pid  monitor  console  (sockets)
//!                   logs/       what was saved of failures, a directory each
//! ```

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::cache::{self, Cache};
use crate::spec::Spec;

/// What a running lab is known by.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Record {
    /// What it was started from.
    pub(crate) spec: Spec,
    /// The secret its agents ask for.
    pub(crate) token: String,
    /// The local port of each host's agent.
    pub(crate) ports: [u16; 2],
}

/// The directory.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    directory: PathBuf,
}

impl Place {
    /// The directory of the lab `name`, made if need be.
    pub(crate) fn of(cache: &Cache, name: &str) -> Result<Self> {
        if name.is_empty() || !name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-') {
            bail!("`{name}` can't be a lab's name: letters, digits and hyphens only");
        }
        let place = Self { directory: cache.labs().join(name) };
        for host in 1..=2 {
            fs::create_dir_all(place.host(host))?;
        }
        Ok(place)
    }

    /// The directory itself.
    pub(crate) fn directory(&self) -> &Path {
        &self.directory
    }

    /// A file in it.
    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// The directory of host 1 or 2.
    pub(crate) fn host(&self, host: usize) -> PathBuf {
        self.directory.join(format!("host{host}"))
    }

    /// Where failures' logs go.
    pub(crate) fn logs(&self) -> PathBuf {
        self.directory.join("logs")
    }

    /// Keeps others from starting or stopping this lab meanwhile.
    pub(crate) fn lock(&self) -> Result<File> {
        cache::lock(&self.file("lock"), Duration::from_secs(300))
    }

    /// What the running lab is; nothing if none was started.
    pub(crate) fn record(&self) -> Result<Option<Record>> {
        match fs::read(self.file("lab.json")) {
            Ok(bytes) => Ok(Some(serde_json::from_slice(&bytes).context("the lab's record is damaged")?)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).context("the lab's record can't be read"),
        }
    }

    /// Writes it, whole or not at all; readable by its owner only, for the secret in it.
    pub(crate) fn keep(&self, record: &Record) -> Result<()> {
        let mut file = tempfile::NamedTempFile::new_in(&self.directory)?;
        std::io::Write::write_all(&mut file, &serde_json::to_vec_pretty(record)?)?;
        file.persist(self.file("lab.json"))?;
        Ok(())
    }

    /// Forgets it.
    pub(crate) fn forget(&self) -> Result<()> {
        match fs::remove_file(self.file("lab.json")) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
            _ => Ok(()),
        }
    }
}

/// Connects to the Unix socket `name` in `directory`, however long the directory's path is (a socket's address holds 107
/// bytes): through the directory's descriptor.
pub(crate) fn connect(directory: &Path, name: &str) -> Result<UnixStream> {
    let opened = File::open(directory)?;
    let short = format!("/proc/self/fd/{}/{name}", opened.as_raw_fd());
    UnixStream::connect(short)
        .with_context(|| format!("nobody answers at {}", directory.join(name).display()))
}
