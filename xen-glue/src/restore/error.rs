//! Why a restore ended without a domain that could run. The toolstack destroys what there is of it.
#![forbid(unsafe_code)]

use std::io;

use mover::error::DiskError;
use thiserror::Error;

use crate::domain::DomainError;
use crate::stream::{Fault, StreamError};

/// Why a restore failed.
#[derive(Debug, Error)]
pub enum RestoreError {
    /// The hypervisor or the domain.
    #[error(transparent)]
    Domain(#[from] DomainError),
    /// The stream.
    #[error(transparent)]
    Stream(#[from] StreamError),
    /// A stream of another kind of guest.
    #[error(
        "the stream is of {article} {stream} guest, the domain was created for {created}. The configuration that goes \
         with the stream is another one (`type=` of xl.cfg)"
    )]
    Kind {
        /// "a" or "an".
        article: &'static str,
        /// The stream's kind.
        stream: &'static str,
        /// The domain's.
        created: &'static str,
    },
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
    /// The lanes, or the other end of them.
    #[error("{what}")]
    Ferry {
        /// A sentence.
        what: String,
    },
    /// Pages that were left on disks.
    #[error("{what}")]
    Frozen {
        /// A sentence.
        what: String,
    },
    /// Reading from disks.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// Told to stop.
    #[error("cancelled; what there is of the domain is of no use")]
    Cancelled,
}

impl RestoreError {
    /// The number a C caller is told (`errno.h`).
    #[must_use]
    pub fn errno(&self) -> i32 {
        match self {
            Self::Domain(error) => error.errno(),
            Self::Stream(StreamError { fault: Fault::Io { source, .. }, .. })
            | Self::Toolstack { source, .. } => source.raw_os_error().unwrap_or(libc::EIO),
            Self::Stream(_) | Self::Kind { .. } | Self::Refused { .. } => libc::EINVAL,
            Self::Ferry { .. } | Self::Frozen { .. } | Self::Disk(_) => libc::EIO,
            Self::Cancelled => libc::EINTR,
        }
    }
}
