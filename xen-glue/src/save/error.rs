//! Why a save ended without a saved domain. The guest runs on, or is the toolstack's to resume.
#![forbid(unsafe_code)]

use std::io;

use mover::error::DiskError;
use thiserror::Error;

use crate::domain::{DomainError, Life};
use crate::stream::StreamError;

/// Why a save failed.
#[derive(Debug, Error)]
pub enum SaveError {
    /// The hypervisor or the domain.
    #[error(transparent)]
    Domain(#[from] DomainError),
    /// The stream.
    #[error("{0}. If the other end has failed, its output says why")]
    Stream(#[from] StreamError),
    /// Talking to the toolstack.
    #[error("cannot ask the toolstack to {doing}: {source}. It has ended, or its log says why")]
    Toolstack {
        /// What it was to do.
        doing: &'static str,
        /// The cause.
        source: io::Error,
    },
    /// The toolstack did not do what it was asked for.
    #[error("the toolstack could not {doing}. Its log (`xl -vvv`) says why")]
    Refused {
        /// What it was to do.
        doing: &'static str,
    },
    /// The guest is not suspended though the toolstack says so.
    #[error("the guest was to suspend itself, but {}", told(.0))]
    NotSuspended(Life),
    /// The guest writes faster than the link carries, and is not to be stopped for as long as the rest takes.
    #[error(
        "after {rounds} rounds there are still {dirty} pages to send, more than the allowed downtime has room for. \
         Allow a longer one, or slow the guest down"
    )]
    NotConverging {
        /// Rounds done.
        rounds: u32,
        /// Pages written meanwhile.
        dirty: u64,
    },
    /// The toolstack's own policy wants it so.
    #[error("the toolstack gave this up after {rounds} rounds; the guest goes on")]
    GivenUp {
        /// Rounds done.
        rounds: u32,
    },
    /// The lanes, or the other end of them.
    #[error("{what}")]
    Ferry {
        /// A sentence.
        what: String,
    },
    /// A disk that pages were to be left on.
    #[error(
        "{0}. The guest's pages were to be left on it (`frozen_disks`); without that setting they are all written"
    )]
    Disk(#[from] DiskError),
    /// Told to stop.
    #[error("cancelled; the guest goes on")]
    Cancelled,
}

fn told(life: &Life) -> &'static str {
    match life {
        Life::Running => {
            "it runs on. Its kernel may lack suspend support, or is stuck; its console says more"
        }
        Life::Suspended => "is suspended",
        Life::ShutDown(0) => "it has powered off",
        Life::ShutDown(1) => "it has rebooted",
        Life::ShutDown(3) => "it has crashed; its console says more",
        Life::ShutDown(_) => "it has shut down",
    }
}

impl SaveError {
    /// The number a C caller is told (`errno.h`).
    #[must_use]
    pub fn errno(&self) -> i32 {
        match self {
            Self::Domain(error) => error.errno(),
            Self::Stream(StreamError { fault: crate::stream::Fault::Io { source, .. }, .. })
            | Self::Toolstack { source, .. } => source.raw_os_error().unwrap_or(libc::EIO),
            Self::Stream(_) => libc::EIO,
            Self::Refused { .. } | Self::NotSuspended(_) => libc::EINVAL,
            Self::NotConverging { .. } => libc::EBUSY,
            Self::Ferry { .. } | Self::Disk(_) => libc::EIO,
            Self::GivenUp { .. } => libc::ECANCELED,
            Self::Cancelled => libc::EINTR,
        }
    }
}
