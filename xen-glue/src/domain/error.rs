//! What can go wrong with a domain.
#![forbid(unsafe_code)]

use std::io;

use mover::units::Pfn;
use thiserror::Error;

use crate::abi::DomainId;

/// A failure to do something with a domain.
#[derive(Debug, Error)]
pub enum DomainError {
    /// The hypervisor can't be talked to at all.
    #[error(
        "cannot talk to the hypervisor: {source}. Run this as root in the control domain of Xen 4.17 to 4.20, with \
         the xen_privcmd module loaded"
    )]
    NoXen {
        /// The cause.
        source: io::Error,
    },
    /// The hypervisor or the kernel refused.
    #[error("cannot {doing} of {domain}: {source}. {remedy}")]
    Call {
        /// What was tried, as "read the state".
        doing: &'static str,
        /// Whose.
        domain: DomainId,
        /// What the user can do, as a sentence.
        remedy: &'static str,
        /// The cause.
        source: io::Error,
    },
    /// There is no such domain, or it is going away.
    #[error("there is no {domain} any more. It was destroyed meanwhile; look at `xl list` and its log")]
    Gone {
        /// Which.
        domain: DomainId,
    },
    /// A page of a domain that stands still can't be mapped.
    #[error("cannot map {pfn} of {domain}: {source}. The hypervisor's log (`xl dmesg`) says more")]
    Map {
        /// The page.
        pfn: Pfn,
        /// Whose.
        domain: DomainId,
        /// The cause.
        source: io::Error,
    },
    /// The host has less memory than the domain needs.
    #[error(
        "this host has no memory for {domain}: {done} of {wanted} pages could be had. Free memory (`xl info`) or \
         balloon other domains down, and try again"
    )]
    NoMemory {
        /// Whose.
        domain: DomainId,
        /// Pages populated of the last batch.
        done: usize,
        /// Pages of that batch.
        wanted: usize,
    },
    /// Pages of a domain that is to run are still somebody's.
    #[error("{domain} can't be let run: {what}. It is destroyed; report this, please")]
    Lent {
        /// Which.
        domain: DomainId,
        /// What is left.
        what: String,
    },
    /// The stream has more pages than the domain may have.
    #[error(
        "the stream has more than the {max} pages that {domain} may have. It belongs to another configuration, or is \
         damaged"
    )]
    TooMany {
        /// Whose.
        domain: DomainId,
        /// How many it may have.
        max: u64,
    },
    /// The domain is of a kind this program can't move.
    #[error("{domain} can't be moved: {why}. {remedy}")]
    Unsupported {
        /// Which.
        domain: DomainId,
        /// Why not.
        why: String,
        /// What to do instead.
        remedy: &'static str,
    },
    /// What a PV guest says of its memory can't be.
    #[error(
        "{domain} is inconsistent: {what}. It can't be moved like this; `xl save` after a clean boot works"
    )]
    Guest {
        /// Which.
        domain: DomainId,
        /// What can't be.
        what: String,
    },
    /// What a stream says of a guest can't be.
    #[error("the stream can't be restored: {what}. It is damaged, or was not written by a Xen toolstack")]
    Stream {
        /// What can't be.
        what: String,
    },
}

impl DomainError {
    /// Wraps the error of a call that does `doing` (as "read the state") for `domain`.
    pub(crate) fn call(
        doing: &'static str,
        domain: DomainId,
        remedy: &'static str,
    ) -> impl FnOnce(io::Error) -> Self {
        move |source| match source.raw_os_error() {
            // The domain has gone between two calls.
            Some(libc::ESRCH) => Self::Gone { domain },
            _ => Self::Call { doing, domain, remedy, source },
        }
    }

    /// The number a C caller is told (`errno.h`).
    #[must_use]
    pub fn errno(&self) -> i32 {
        match self {
            Self::NoXen { source } | Self::Call { source, .. } | Self::Map { source, .. } => {
                source.raw_os_error().unwrap_or(libc::EINVAL)
            }
            Self::Gone { .. } => libc::ESRCH,
            Self::NoMemory { .. } => libc::ENOMEM,
            Self::TooMany { .. } | Self::Guest { .. } | Self::Stream { .. } => libc::EINVAL,
            Self::Lent { .. } => libc::EBUSY,
            Self::Unsupported { .. } => libc::EOPNOTSUPP,
        }
    }
}
