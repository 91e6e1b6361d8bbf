//! What can go wrong, one enum a layer, and the class of exit code each belongs to.
//!
//! Every message is a sentence with the cause; where the user can do something about it, the remedy follows.

use std::io;
use thiserror::Error;

use crate::units::{DiskId, Pfn};

/// The class of an error as a process exit code, so that scripts can tell a bad flag from a lost link.
/// (0 is success and 1 an internal error; `pageferry help exit-codes` prints this list.)
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ExitClass {
    /// A broken invariant or an operating error nothing else covers.
    Internal = 1,
    /// A flag, a value or a file given by the user is wrong.
    Usage = 2,
    /// The machine lacks something (kernel feature, permission, memory, huge pages, disk space).
    Machine = 3,
    /// The network failed: no route, refused, cut, stalled.
    Network = 4,
    /// The peer answered, and refused or spoke another protocol.
    Peer = 5,
    /// A disk or its index: missing, shrunk, another one, unreadable.
    Disk = 6,
    /// The guest: not there, not in the state it should be in, could not converge.
    Guest = 7,
    /// Cancelled by either end; the guest runs on the source.
    Cancelled = 8,
    /// It is not known which end has the guest: `pageferry resolve` settles it.
    InDoubt = 9,
    /// Verification found a page that was not right; the guest was not restarted with it.
    Mismatch = 10,
}

impl ExitClass {
    /// All of them, in the order of their codes.
    pub const ALL: [Self; 10] = [
        Self::Internal,
        Self::Usage,
        Self::Machine,
        Self::Network,
        Self::Peer,
        Self::Disk,
        Self::Guest,
        Self::Cancelled,
        Self::InDoubt,
        Self::Mismatch,
    ];

    /// The class with this code.
    #[must_use]
    pub fn from_code(code: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|class| class.code() == code)
    }

    /// The number a process exits with.
    #[must_use]
    pub fn code(self) -> u8 {
        #[expect(clippy::as_conversions, reason = "a field-less enum's own discriminant, 1 to 10")]
        {
            self as u8
        }
    }
}

/// The engine's error.
#[derive(Debug, Error)]
pub enum Error {
    /// From the guest backend.
    #[error(transparent)]
    Guest(#[from] GuestError),
    /// From a connection.
    #[error(transparent)]
    Net(#[from] NetError),
    /// From what the peer said.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// From a disk.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The peer refused, or ended the migration, and said why.
    #[error("the other end says: {reason}")]
    Peer {
        /// Its sentence.
        reason: String,
        /// The class of the error it met, as it told.
        class: ExitClass,
    },
    /// Cancelled.
    #[error("cancelled {by}; the guest runs on the source as before")]
    Cancelled {
        /// Who did it: "here", "by the other end".
        by: &'static str,
    },
    /// The guest writes faster than the link carries, and the user asked to give up then.
    #[error(
        "the guest does not converge: after {rounds} rounds the predicted downtime is still {predicted_ms} ms \
         (allowed: {allowed_ms} ms). Allow more with --max-downtime, slow the guest with --throttle auto, or \
         accept it with --if-not-converging finish"
    )]
    NotConverging {
        /// Rounds done.
        rounds: u32,
        /// Predicted downtime.
        predicted_ms: u64,
        /// The limit.
        allowed_ms: u64,
    },
    /// The link was lost between the commit and its acknowledgement.
    #[error(
        "the link was lost while the guest changed hands ({detail}); it stays paused here. \
         Run `pageferry resolve {migration}` as soon as the other end can be reached"
    )]
    InDoubt {
        /// The migration's id.
        migration: String,
        /// What happened last.
        detail: String,
    },
    /// Verification found wrong pages.
    #[error(
        "{count} pages differ from what the source recorded at the pause, the first is {first}; {outcome}"
    )]
    Mismatch {
        /// How many.
        count: u64,
        /// The first one.
        first: Pfn,
        /// What was done about it.
        outcome: &'static str,
    },
    /// A journal or another file of the migration's own.
    #[error("{doing}: {source}. {remedy}")]
    Io {
        /// What was being done.
        doing: String,
        /// What to do about it.
        remedy: &'static str,
        /// The cause.
        source: io::Error,
    },
    /// A task of the pipeline panicked: a broken invariant. The migration fails, the guest stays where it is.
    #[error("internal error in {task}: {what}. Please report it; the guest is left as it was")]
    Panicked {
        /// The task's name.
        task: String,
        /// What it said.
        what: String,
    },
}

impl Error {
    /// The class of exit code this error belongs to.
    #[must_use]
    pub fn class(&self) -> ExitClass {
        match self {
            Self::Guest(e) => e.class(),
            Self::Net(e) => e.class(),
            Self::Wire(_) => ExitClass::Peer,
            Self::Disk(_) => ExitClass::Disk,
            Self::Peer { class, .. } => *class,
            Self::Cancelled { .. } => ExitClass::Cancelled,
            Self::NotConverging { .. } => ExitClass::Guest,
            Self::InDoubt { .. } => ExitClass::InDoubt,
            Self::Mismatch { .. } => ExitClass::Mismatch,
            Self::Io { .. } => ExitClass::Machine,
            Self::Panicked { .. } => ExitClass::Internal,
        }
    }
}

/// From a guest backend.
#[derive(Debug, Error)]
pub enum GuestError {
    /// A system call failed.
    #[error("{doing}: {source}. {remedy}")]
    Os {
        /// What was being done, as "cannot map the guest's memory".
        doing: String,
        /// What the user can do, as a sentence.
        remedy: &'static str,
        /// The cause.
        source: io::Error,
    },
    /// The kernel lacks what is needed.
    #[error("{what} is not to be had here: {why}. {remedy}")]
    Unsupported {
        /// The feature.
        what: &'static str,
        /// How that was found.
        why: String,
        /// What to do.
        remedy: &'static str,
    },
    /// The guest is gone or not in the state asked for.
    #[error("{0}")]
    State(String),
    /// A page that the guest does not have.
    #[error("{pfn} is outside the guest ({pages} pages)")]
    NoSuchPage {
        /// The page.
        pfn: Pfn,
        /// The guest's size.
        pages: u64,
    },
}

impl GuestError {
    fn class(&self) -> ExitClass {
        match self {
            Self::Os { .. } | Self::Unsupported { .. } => ExitClass::Machine,
            Self::State(_) | Self::NoSuchPage { .. } => ExitClass::Guest,
        }
    }
}

/// From a connection.
#[derive(Debug, Error)]
pub enum NetError {
    /// A system call failed.
    #[error("{doing}: {source}. {remedy}")]
    Os {
        /// What was being done, with the peer's address.
        doing: String,
        /// What the user can do.
        remedy: &'static str,
        /// The cause.
        source: io::Error,
    },
    /// The peer closed the connection where more was due.
    #[error("{peer} closed the connection while {doing}. Look at its output for the reason")]
    Closed {
        /// The peer.
        peer: String,
        /// What was being done.
        doing: &'static str,
    },
    /// Nothing moved for too long.
    #[error(
        "{peer} has been silent for {seconds} s while {doing}. Is it overloaded, stopped, or is the link down?"
    )]
    Stalled {
        /// The peer.
        peer: String,
        /// How long.
        seconds: u64,
        /// What was being done.
        doing: &'static str,
    },
    /// A page of the guest that the kernel could not read or write for the connection (`EFAULT`). What the peer has
    /// got of the message is cut off there.
    #[error(
        "page {index} of a message with {peer} lies at {address:#x}, where the kernel can't {access} it. \
         Has the guest gone, or has its memory shrunk?"
    )]
    Page {
        /// The peer.
        peer: String,
        /// Its place among the pages of the call.
        index: usize,
        /// Its address in this process.
        address: usize,
        /// "read" or "write".
        access: &'static str,
    },
    /// The peer hung up before it answered.
    #[error(
        "{peer} hung up without an answer: the token is wrong, already used or expired, or it is not for this target.          Copy it again from the `pageferry receive` that is waiting now"
    )]
    TurnedAway {
        /// The peer.
        peer: String,
    },
    /// The target showed another key than the one that came with the token.
    #[error(
        "{peer} is not the target that the token is for: it has another key. Was the token printed by another target,          or does somebody else answer at that address? Nothing was told to it"
    )]
    OtherKey {
        /// The peer.
        peer: String,
    },
    /// What an end is to show, or to trust, can't be used.
    #[error("cannot use {path}: {why}")]
    Credentials {
        /// The file.
        path: String,
        /// What is wrong with it.
        why: String,
    },
    /// The target's certificate is not one to go on with.
    #[error("{peer} has shown a certificate that can't be taken: {why}. Nothing was told to it")]
    Certificate {
        /// The peer.
        peer: String,
        /// What is wrong with it, and what to do.
        why: String,
    },
    /// The other end does not take our certificate.
    #[error("{peer} does not take this end's certificate: {why}")]
    Refused {
        /// The peer.
        peer: String,
        /// What it says of it.
        why: &'static str,
    },
    /// Encryption failed: what came is not what the peer sent, or the peer does not keep to the protocol.
    #[error("the encrypted connection with {peer} can't be trusted: {why}. The connection is given up")]
    Untrusted {
        /// The peer.
        peer: String,
        /// What is wrong.
        why: String,
    },
    /// Our own side hung up to unblock this call.
    #[error("the connection was hung up on this side")]
    HungUp,
}

impl NetError {
    fn class(&self) -> ExitClass {
        match self {
            Self::TurnedAway { .. }
            | Self::OtherKey { .. }
            | Self::Certificate { .. }
            | Self::Refused { .. } => ExitClass::Peer,
            Self::Credentials { .. } => ExitClass::Usage,
            _ => ExitClass::Network,
        }
    }
}

/// From decoding what a peer sent. Every one ends the connection.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum WireError {
    /// Not our protocol.
    #[error(
        "the other end does not speak pageferry's protocol (first bytes {found:02x?}). Is that the right port?"
    )]
    NotPageferry {
        /// What it sent.
        found: [u8; 4],
    },
    /// Another version.
    #[error(
        "the other end speaks protocol version {theirs}, this one {oldest} to {newest}. Update the older one"
    )]
    Version {
        /// What it sent.
        theirs: u16,
        /// Oldest understood here.
        oldest: u16,
        /// Newest understood here.
        newest: u16,
    },
    /// A length past its limit.
    #[error("{what} of {found} is over the limit of {limit}")]
    TooLong {
        /// The field.
        what: &'static str,
        /// Its value.
        found: u64,
        /// The limit in [`crate::limits`].
        limit: u64,
    },
    /// A field with a value it can't have.
    #[error("{what} can't be {found}")]
    Invalid {
        /// The field.
        what: &'static str,
        /// Its value.
        found: u64,
    },
    /// A message that has no place in this phase.
    #[error("{message} has no place while {phase}")]
    OutOfOrder {
        /// The message.
        message: &'static str,
        /// The phase.
        phase: &'static str,
    },
}

/// From a disk or an image file.
#[derive(Debug, Error)]
pub enum DiskError {
    /// A system call failed.
    #[error("{doing}: {source}. {remedy}")]
    Os {
        /// What was being done, with the path.
        doing: String,
        /// What the user can do.
        remedy: &'static str,
        /// The cause.
        source: io::Error,
    },
    /// A read that ended early: the image has shrunk.
    #[error("disk {} ended at byte {end} while {wanted} was read; the image has shrunk", disk.0)]
    Short {
        /// The disk.
        disk: DiskId,
        /// Where it ended.
        end: u64,
        /// What was wanted.
        wanted: u64,
    },
    /// Another disk than the one named.
    #[error("{path} is not the disk the source means: {why}. {remedy}")]
    Identity {
        /// The path tried.
        path: String,
        /// What differs.
        why: String,
        /// What to do.
        remedy: &'static str,
    },
    /// A clone's header that can't be followed to the image under it.
    #[error("{path}: {why}. {remedy}")]
    Chain {
        /// The clone.
        path: String,
        /// What is wrong with it.
        why: String,
        /// What to do.
        remedy: &'static str,
    },
    /// An index file that can't be used.
    #[error("index {path}: {why}. {remedy}")]
    Index {
        /// The file.
        path: String,
        /// What is wrong with it.
        why: String,
        /// What to do.
        remedy: &'static str,
    },
}
