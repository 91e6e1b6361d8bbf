//! What a save is told, whom it asks, and what it tells.
#![forbid(unsafe_code)]

use std::fmt;
use std::io;
use std::time::Duration;

pub use mover::policy::Observation;
use mover::policy::{Decision, Wish};
use mover::wire::hello::MigrationId;

use super::{Frozen, LeftOut};
use crate::ferry::{Ferried, Lingering, Plan};

/// How a save is to be done.
#[derive(Clone, Debug)]
pub struct Options {
    /// Send memory while the guest runs.
    pub live: bool,
    /// Send all memory a second time at the end, for the other end to compare.
    pub verify: bool,
    /// When to stop the guest.
    pub policy: Policy,
    /// How to move page contents beside the stream, where the other end can; none keeps to the stream.
    pub ferry: Option<Plan>,
    /// Where a guest that is stopped and saved into a file may leave pages; none writes all of them.
    pub frozen: Option<Frozen>,
}

/// When to stop a guest that is saved while it runs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Policy {
    /// As libxenguest does: after five rounds, or under 50 pages.
    Stock,
    /// When the predicted downtime is short enough and does not shrink any more.
    Predict(Wish),
}

impl Policy {
    /// Downtime aimed for where nothing else is said.
    pub const MAX_DOWNTIME: Duration = Duration::from_millis(100);
    /// As many rounds as stock does, so that a guest that does not converge is not slower to move.
    pub const MAX_ROUNDS: u32 = 5;

    /// What to do next.
    pub(super) fn decide(&self, seen: &Observation) -> Decision {
        match self {
            Self::Stock => mover::policy::stock(seen.rounds, seen.dirty),
            Self::Predict(wish) => mover::policy::decide(seen, wish),
        }
    }
    /// Whether the guest may be stopped now, as far as its downtime goes.
    pub(super) fn fits(&self, seen: &Observation) -> bool {
        matches!(self, Self::Predict(wish) if seen.fits(wish))
    }
}

impl Default for Policy {
    fn default() -> Self {
        Self::Predict(Wish {
            max_downtime: Self::MAX_DOWNTIME,
            max_rounds: Self::MAX_ROUNDS,
            throttle: false,
            finish: true,
        })
    }
}

/// The toolstack that wants the domain saved.
pub trait Toolstack {
    /// Has the guest suspend itself; false if that failed.
    ///
    /// # Errors
    /// The toolstack can't be asked.
    fn suspend(&mut self) -> io::Result<bool>;
    /// Has an HVM or PVH guest's device model log the pages it writes, or stop; false if that failed.
    ///
    /// # Errors
    /// The toolstack can't be asked.
    fn device_log(&mut self, on: bool) -> io::Result<bool>;
    /// Is told that the guest can run on the target while pages of it are still here. As it stands, it waits until none are.
    ///
    /// # Errors
    /// A sentence: the target could not be reached any more.
    fn lingers(&mut self, left: Lingering) -> Result<(), String> {
        left.finish(|_| {}).map(drop)
    }
    /// What to do after a round, `written` pages in all, where the toolstack has a policy of its own: it goes before
    /// [`Options::policy`].
    fn judge(&mut self, _seen: &Observation, _written: u64) -> Option<Verdict> {
        None
    }
    /// Is told how it goes.
    fn report(&mut self, event: &Event<'_>);
}

/// What a toolstack with a policy of its own says after a round.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// Another round.
    GoOn,
    /// Stop the guest and send the rest.
    Stop,
    /// Leave the guest where it is.
    GiveUp,
}

/// How it goes.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Event<'a> {
    /// A phase begins.
    Phase(Phase),
    /// Pages were sent.
    Frames {
        /// Round, from 1; the last one is that of the stopped guest.
        round: u32,
        /// Pages of it looked at.
        sent: u64,
        /// Pages there are in this round.
        total: u64,
    },
    /// A round of a running guest is over.
    Round {
        /// Which, from 1.
        round: u32,
        /// Pages written meanwhile.
        dirty: u64,
        /// Bytes a second it went at.
        rate: f64,
        /// Downtime if the guest were stopped now.
        downtime: Duration,
    },
    /// Pages leave the stream for the lanes of this migration.
    Lanes(MigrationId),
    /// What the engine of the lanes tells, notices excepted.
    Engine(&'a mover::report::Event),
    /// Something an operator may want to know.
    Note(&'a str),
    /// Something for who wants to read more.
    Detail(&'a str),
}

/// What a save is doing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Phase {
    /// Writes the headers.
    Prepare,
    /// Writes what the guest can't change.
    StaticState,
    /// Sends memory while the guest runs.
    Rounds,
    /// Has the guest suspend itself.
    Suspend,
    /// Sends what is left.
    LastPages,
    /// Sends everything again.
    Verify,
    /// Writes what the guest is besides its memory.
    FinalState,
    /// Ends the stream.
    End,
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Prepare => "Start of stream",
            Self::StaticState => "Static state",
            Self::Rounds => "Frames while the guest runs",
            Self::Suspend => "Suspending the guest",
            Self::LastPages => "Last frames",
            Self::Verify => "Frames verify",
            Self::FinalState => "Final state",
            Self::End => "End of stream",
        })
    }
}

/// What a save has done.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Summary {
    /// Rounds while the guest ran.
    pub rounds: u32,
    /// Pages written into the stream, each as often as it was.
    pub pages: u64,
    /// Bytes of the stream.
    pub bytes: u64,
    /// How long it took.
    pub total: Duration,
    /// From asking the guest to suspend itself to the end of the stream.
    pub stopped: Duration,
    /// What went beside the stream, if anything did.
    pub ferried: Option<Ferried>,
    /// What was left on disks, if anything could be.
    pub left_out: Option<LeftOut>,
}
