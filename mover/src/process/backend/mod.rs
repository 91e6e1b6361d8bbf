//! The engine's side of a guest that is a process: the traits of [`crate::guest`] over its control socket and the
//! descriptors that come with an attachment.
//!
//! ```text
//!   attach_source ─> Source ─ with_disks ─> SourceGuest      attach_target ─> Target { guest, info }
//!     memory  Memory    the memory file, mapped read-only       memory  Memory    mapped read-write
//!     dirty   WriteTracker   userfaultfd WP_ASYNC + PAGEMAP_SCAN  life    TargetEnd
//!     life    SourceEnd                                         lazy    PageHold  userfaultfd MISSING
//!     writes  DiskWrites    the shared log of disk writes       gate    Gate      the shared gate
//! ```
//!
//! Invariants:
//! - Everything here ends with the engine: its death closes the socket, the guest goes on by the rules of
//!   [`super::control`], and the kernel ends the dirty log with the last copy of its userfaultfd (the guest keeps none
//!   of a source's). Pages held back stay so: the guest keeps a copy of a target's.
//! - The engine never touches a page that is held back through its own mapping: [`GuestMemory::map`] gives `None` for
//!   it. Reading a hole would make a zero page of it, which the guest would then see.
//! - Requests on the control socket are strictly in turn, under one lock.

#![forbid(unsafe_code)]

mod disks;
mod hold;
mod life;
mod memory;
mod tracker;

#[cfg(test)]
mod tests;

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::client::{Attachment, GuestClient};
use super::control::{Attached, Phase, Role};
use super::keepsake::{Keepsake, Way};
use crate::disk::Disks;
use crate::error::GuestError;
use crate::guest::{HoldBack, SourceGuest, TargetGuest};
use crate::kernel::uffd::{Features, Span, Userfaultfd};

use disks::{DiskWrites, Gate};
use hold::PageHold;
use life::{SourceEnd, TargetEnd};
use memory::Memory;
use tracker::WriteTracker;

#[cfg(doc)]
use crate::guest::GuestMemory;

/// An attached guest on the source, before its disks are opened.
pub struct Source {
    /// What it says of itself: name, disks, phase.
    pub info: Attached,
    memory: Arc<Memory>,
    tracker: WriteTracker,
    life: SourceEnd,
    writes: DiskWrites,
}

impl Source {
    /// The guest for the engine, with its disks (those that `info` names) opened for reading.
    #[must_use]
    pub fn with_disks(self, disks: Arc<dyn Disks>) -> SourceGuest {
        SourceGuest {
            memory: self.memory,
            dirty: Box::new(self.tracker),
            life: Box::new(self.life),
            disks,
            writes: Box::new(self.writes),
        }
    }
}

/// An attached guest on the target.
pub struct Target {
    /// What it says of itself.
    pub info: Attached,
    /// The guest for the engine.
    pub guest: TargetGuest,
    /// What the engine before this one has put by, where this one goes on with its pages.
    pub kept: Option<Keepsake>,
}

/// Attaches to a running guest as the source of `migration`.
///
/// # Errors
/// The guest refuses (another migration has it, it is not running), or this kernel can't log its writes: a sentence
/// with the remedy.
pub fn attach_source(client: GuestClient, migration: &str) -> Result<Source, GuestError> {
    let attachment = client.attach(Role::Source, migration)?;
    let writes = DiskWrites::new(attachment.write_log()?, attachment.info.disks.len());
    let span = span_of(&attachment.info);
    let Attachment { info, memory, pagemap, fault_fd, .. } = attachment;
    let memory = Arc::new(Memory::of_source(memory, info.memory_bytes)?);
    let unsupported = |why: String| GuestError::Unsupported {
        what: "the log of pages a running guest writes (userfaultfd with WP_ASYNC)",
        why,
        remedy: "It needs Linux 6.7 or later with CONFIG_USERFAULTFD; `pageferry doctor` shows what is missing",
    };
    let fd = fault_fd.map_err(unsupported)?;
    let uffd = Userfaultfd::new(fd, Features::LOG_WRITES).map_err(|e| unsupported(e.to_string()))?;
    let tracker = WriteTracker::new(uffd, pagemap, span);
    let life = SourceEnd::new(Arc::new(Line::new(client)));
    Ok(Source { info, memory, tracker, life, writes })
}

/// Attaches to an incoming guest as the target of `migration`; or to a running one whose pages an engine that is gone
/// held back, to go on with releasing them.
///
/// # Errors
/// The guest refuses (another migration has it, it is not waiting for one), or its memory can't be mapped. A kernel
/// that can't hold pages back is no error: `lazy` says why then.
pub fn attach_target(client: GuestClient, migration: &str) -> Result<Target, GuestError> {
    attach_target_by(client, migration, None)
}

/// As [`attach_target`], by an engine that the source reaches that `way`: the guest keeps it for one that comes after it.
///
/// # Errors
/// As for [`attach_target`].
pub fn attach_target_by(
    client: GuestClient,
    migration: &str,
    way: Option<Way>,
) -> Result<Target, GuestError> {
    let attachment = client.attach(Role::Target, migration)?;
    let gate = Arc::new(Gate::new(attachment.write_gate()?));
    let span = span_of(&attachment.info);
    let Attachment { info, memory, fault_fd, kept, .. } = attachment;
    let kept = kept.map(|kept| Keepsake::decode(kept).map_err(GuestError::State)).transpose()?;
    let again = info.phase == Phase::Running;
    let memory = Arc::new(Memory::of_target(memory, info.memory_bytes)?);
    let line = Arc::new(Line::new(client));
    line.holding.store(again, Ordering::SeqCst);
    line.started.store(again, Ordering::SeqCst);
    let uffd = fault_fd.and_then(|fd| {
        if again {
            return Ok(Userfaultfd::used(fd));
        }
        Userfaultfd::new(fd, Features::HOLD_BACK).map_err(|e| format!("{e} (Linux 4.11 or later has it)"))
    });
    let lazy = uffd.map(|uffd| -> Arc<dyn HoldBack> {
        let (memory, line, gate) = (Arc::clone(&memory), Arc::clone(&line), Arc::clone(&gate));
        Arc::new(PageHold::new(uffd, span, memory, line, gate, again).reached_by(way))
    });
    let guest = TargetGuest { memory, life: Box::new(TargetEnd::new(line)), lazy, gate: Some(gate) };
    Ok(Target { info, guest, kept })
}

/// The one connection to the guest, shared by whoever has something to ask, and what this end has told it.
struct Line {
    client: Mutex<GuestClient>,
    /// Pages are held back, or were when the guest started.
    holding: AtomicBool,
    /// The guest has been started.
    started: AtomicBool,
}

impl Line {
    fn new(client: GuestClient) -> Self {
        Self { client: Mutex::new(client), holding: AtomicBool::new(false), started: AtomicBool::new(false) }
    }
    fn client(&self) -> MutexGuard<'_, GuestClient> {
        // A task that panicked while it asked leaves at worst an answer unread, which the next asker reports.
        self.client.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn span_of(info: &Attached) -> Span {
    Span { start: info.base_address, bytes: info.memory_bytes }
}

/// The guest's process has ended under us.
fn gone() -> GuestError {
    GuestError::State("the guest's process has ended. Its standard error or log says why".to_owned())
}

fn os(doing: &str, remedy: &'static str, source: io::Error) -> GuestError {
    GuestError::Os { doing: doing.to_owned(), remedy, source }
}
