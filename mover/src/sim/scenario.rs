//! What a seed stands for: the world's shape, how the migration is configured, and what goes wrong when.

use std::time::Duration;

use super::disk::DiskShape;
use super::guest::GuestShape;
use super::net::LinkShape;
use super::rng::Rng;
use super::scheduler::{MILLI, SECOND, Tempo};
use crate::report::{Mode, Phase};
use crate::source::{Config, NotConverging};
use crate::units::{u64_of, usize_of};

/// When something goes wrong.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum When {
    /// So long after the source entered this phase.
    In(Phase, u64),
    /// So long after the start.
    After(u64),
}

/// What goes wrong.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Fault {
    /// The link is down for a while; connections survive it.
    Down(u64),
    /// Every connection is cut, told to both ends or not, and none can be made for a while.
    Cut {
        /// Both ends are told.
        notice: bool,
        /// For so long.
        lasts: u64,
    },
    /// One connection is cut.
    CutOne {
        /// Both ends are told.
        notice: bool,
    },
    /// The source's engine is killed.
    KillSource,
    /// The target's engine is killed.
    KillTarget,
    /// Someone cancels at the source.
    CancelSource,
    /// Someone cancels at the target.
    CancelTarget,
    /// The target's disks take so many times longer, for a while.
    SlowDisks(u64, u64),
    /// Every read fails for a while.
    BrokenDisks(u64),
    /// A stranger connects and misbehaves.
    Stranger(Stranger),
}

/// How a stranger misbehaves.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Stranger {
    /// Says nothing and stays.
    Silent,
    /// Sends bytes of no meaning.
    Garbage,
    /// Says a proper hello with a wrong secret.
    WrongToken,
    /// Sends half a hello and goes.
    Half,
}

/// All a seed decides.
#[derive(Clone, Debug)]
pub(crate) struct Scenario {
    /// The seed.
    pub(crate) seed: u64,
    /// How tasks are scheduled.
    pub(crate) tempo: Tempo,
    /// The guest.
    pub(crate) guest: GuestShape,
    /// Its disks.
    pub(crate) disk: DiskShape,
    /// The link.
    pub(crate) link: LinkShape,
    /// How the migration is configured.
    pub(crate) config: Config,
    /// The index is wrong once in so many lookups.
    pub(crate) lies: u64,
    /// The index is kept up to date.
    pub(crate) kept: bool,
    /// The target loads straight into guest memory where it can.
    pub(crate) direct: bool,
    /// Reads in flight.
    pub(crate) depth: usize,
    /// A journal entry fails once in so many.
    pub(crate) failing_journal: u64,
    /// What goes wrong.
    pub(crate) faults: Vec<(When, Fault)>,
}

impl Scenario {
    /// What `seed` stands for.
    pub(crate) fn of(seed: u64) -> Self {
        let mut rng = Rng::new(seed, "scenario");
        let mut guest = GuestShape::drawn(&mut rng);
        guest.ahead = guest.lazy && seed % 4 == 3;
        let disk = DiskShape::drawn(&mut rng, guest.pages);
        let link = LinkShape::drawn(&mut rng);
        let config = Config {
            mode: match rng.below(10) {
                0 => Mode::Stock,
                1 => Mode::Plain,
                2 | 3 => Mode::Refer,
                _ => Mode::Lazy,
            },
            workload: "simulated".to_owned(),
            lanes: usize_of(rng.range(1, 4)),
            max_downtime: Duration::from_millis(rng.pick(&[1, 50, 500])),
            max_rounds: rng.pick(&[1, 1, 3, 10]),
            bandwidth: rng.pick(&[None, None, Some(20_000_000)]),
            throttle: rng.once_in(3),
            not_converging: if rng.once_in(8) { NotConverging::Abort } else { NotConverging::Finish },
            verify: rng.once_in(3),
            patience: Duration::from_secs(10),
            redial_for: Duration::from_secs(rng.pick(&[5, 60])),
            holds_ahead: guest.ahead,
            toolstack: false,
        };
        let count = rng.pick(&[0, 1, 1, 1, 1, 2, 2, 3]);
        Self {
            seed,
            tempo: Tempo::drawn(&mut rng),
            guest,
            disk,
            link,
            config,
            lies: rng.pick(&[0, 0, 20, 3]),
            kept: !rng.once_in(4),
            direct: rng.once_in(2),
            depth: usize_of(rng.range(1, 8)),
            failing_journal: if rng.once_in(16) { 3 } else { 0 },
            faults: (0..count).map(|_| (When::drawn(&mut rng), Fault::drawn(&mut rng))).collect(),
        }
    }

    /// Whether nothing is in the migration's way, so that it has to succeed.
    pub(crate) fn is_fair(&self) -> bool {
        let harmless =
            |(_, fault): &(When, Fault)| matches!(fault, Fault::Stranger(_) | Fault::SlowDisks(..));
        // A window of a few pages on a lane with half a second's delay is as good as no lane.
        let rate = u64_of(self.link.buffer) * SECOND / (self.link.latency + self.link.slow_lane);
        self.faults.iter().all(harmless)
            && rate > 100_000
            && self.link.refuse == 0
            && self.failing_journal == 0
            && self.guest.failing_harvest == 0
            && self.config.not_converging == NotConverging::Finish
    }
}

impl When {
    fn drawn(rng: &mut Rng) -> Self {
        let delay = rng.magnitude(1, 2 * SECOND);
        let phase = match rng.below(16) {
            0 => Phase::Connect,
            1 => Phase::Arm,
            2 | 3 => Phase::Rounds,
            4 | 5 => Phase::Stop,
            6 => Phase::Verify,
            7..=10 => Phase::Commit,
            11..=14 => Phase::Drain,
            _ => Phase::Done,
        };
        if rng.once_in(10) { Self::After(delay) } else { Self::In(phase, rng.magnitude(1, 200 * MILLI)) }
    }
}

impl Fault {
    /// Its name.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Down(_) => "link down",
            Self::Cut { notice: true, .. } => "cut with notice",
            Self::Cut { notice: false, .. } => "silent cut",
            Self::CutOne { .. } => "one connection cut",
            Self::KillSource => "source killed",
            Self::KillTarget => "target killed",
            Self::CancelSource => "cancelled at the source",
            Self::CancelTarget => "cancelled at the target",
            Self::SlowDisks(..) => "slow disks",
            Self::BrokenDisks(_) => "broken disks",
            Self::Stranger(_) => "stranger",
        }
    }

    fn drawn(rng: &mut Rng) -> Self {
        let lasts = rng.pick(&[MILLI, 500 * MILLI, 8 * SECOND, 40 * SECOND, 900 * SECOND]);
        match rng.below(14) {
            0 | 1 => Self::Down(lasts),
            2..=4 => Self::Cut { notice: rng.once_in(2), lasts },
            5 => Self::CutOne { notice: rng.once_in(2) },
            6 | 7 => Self::KillSource,
            8 | 9 => Self::KillTarget,
            10 => Self::CancelSource,
            11 => Self::CancelTarget,
            12 if rng.once_in(2) => Self::SlowDisks(rng.range(2, 50), lasts),
            12 => Self::BrokenDisks(lasts.min(SECOND)),
            _ => Self::Stranger(rng.pick(&[
                Stranger::Silent,
                Stranger::Garbage,
                Stranger::WrongToken,
                Stranger::Half,
            ])),
        }
    }
}
