//! Page contents beside the stream: the engine of `mover` moves them over connections of its own, dialled back by the target,
//! while everything else of libxc's stream stays in-band (`docs/PROTOCOL.md`, "Under a toolstack").
//!
//! ```text
//!   save                                                                                    restore
//!     phases' thread                    engine's threads      engine's threads       phases' thread
//!     in-band: OFFER, first pages .....................................................> in-band
//!       |        harbour <=============== dial-back ================= dial                |
//!     LANES ..........................................................................> LANES
//!       | <-- asks: harvest, pause, whole -- source === lanes ===> target --- told --->   |
//!       | --- answers ---------------------> engine                engine <-- go --------- |
//!     LANES_DONE, state, END ..........................................................> END
//! ```
//!
//! Domain, toolstack and stream belong to the thread of the phases on either side; the engine, which knows none of them,
//! asks that thread for what it needs (the log of written pages, a stopped guest, the end of the stream). The guest's memory
//! is the one thing both have, each through mappings of its own.
//!
//! Invariant: whatever ends a save or restore, the engine's threads have ended before it returns.
#![forbid(unsafe_code)]

mod again;
pub mod attached;
mod dial;
mod disks;
mod engine;
mod harbour;
mod lingering;
mod net;
mod orphan;
mod source;
mod tally;
mod target;
#[cfg(test)]
mod tests;

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use mover::disk::image::DiskSpec;
use mover::net::tls::Authority;
use mover::report::Mode;
use mover::units::f64_of;

pub(crate) use again::Return;
pub(crate) use dial::DialBack;
pub(crate) use harbour::{Harbour, Terms};
pub(crate) use lingering::GRACE;
pub use lingering::Lingering;
pub(crate) use orphan::{Shelves, take_over};
pub(crate) use source::{Answer, Call, Departure, Word, depart};
pub(crate) use target::{Arrival, Started, arrive};

const MIB: f64 = 1_048_576.0;
/// How long an end of a lane may be silent. Longer than libxl waits for a guest to suspend itself (60 s), during which
/// nothing is said.
const SILENCE_MAX: Duration = Duration::from_secs(90);
/// How long the network may deliver nothing of what was sent.
const NETWORK_PATIENCE: Duration = Duration::from_secs(30);

/// An operator's own authority, in place of trust in the stream's word alone.
#[derive(Clone, Debug)]
pub struct Credentials {
    /// Whom this end trusts, and what it shows.
    pub authority: Authority,
    /// What the source's certificate has to be for, as the target sees it; without it, for the host dialled.
    pub peer_name: Option<String>,
}

/// How a save is to move page contents, if the target can.
#[derive(Clone, Debug)]
pub struct Plan {
    /// [`Mode::Plain`], [`Mode::Refer`] or [`Mode::Lazy`].
    pub mode: Mode,
    /// Data connections, 1 to [`mover::limits::LANES_MAX`].
    pub lanes: u8,
    /// Without TLS: whoever sees or changes what crosses the network sees or changes the guest.
    pub plaintext: bool,
    /// Lanes are for targets that this authority has certified; none are in the clear then.
    pub credentials: Option<Credentials>,
    /// Where to listen for the target, `HOST` or `HOST:PORT`; none is everywhere.
    pub addresses: Vec<String>,
    /// The guest's name, for the other end's messages.
    pub guest: String,
    /// The guest's disks, and images that its pages may be referred to on, in the order that numbers them.
    pub disks: Vec<DiskSpec>,
    /// Where `pageferry index` keeps what it knows of disks.
    pub indexes: PathBuf,
    /// How long to wait for the target when it is lost while pages are outstanding.
    pub redial_for: Duration,
}

/// What has gone beside the stream.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Ferried {
    /// How pages travelled.
    pub mode: Mode,
    /// Connections.
    pub lanes: u32,
    /// Zero pages told.
    pub zero: u64,
    /// Pages sent, refetches not counted.
    pub data: u64,
    /// Pages named by where they stand on disks.
    pub references: u64,
    /// Of those, pages that had to be sent after all.
    pub refetched: u64,
    /// Bytes over the connections.
    pub link_bytes: u64,
    /// Bytes the target read from disks.
    pub disk_bytes: u64,
}

impl fmt::Display for Ferried {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "lanes ({}, {} of them): {} pages sent, {} zero, {} by reference, of which {} had to be sent; {:.1} MiB over the \
             wire, {:.1} MiB from disks",
            self.mode.name(),
            self.lanes,
            self.data,
            self.zero,
            self.references,
            self.refetched,
            f64_of(self.link_bytes) / MIB,
            f64_of(self.disk_bytes) / MIB
        )
    }
}
