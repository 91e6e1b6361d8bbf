//! What is tried: faults, the moments at which they strike, modes. Every combination is a case.

#![forbid(unsafe_code)]

use std::fmt;

use mover::net::lab::End;
use mover::report::Mode;
use serde_json::Value;

/// What goes wrong.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Fault {
    /// The engine of that end is killed.
    Kill(End),
    /// All that leaves that end is lost, for longer than the other end is patient.
    Cut(End),
    /// All that leaves either end is.
    CutBoth,
    /// Every read and write of the disk fails, for a while.
    DiskErrors,
    /// Every read takes long, for a while.
    DiskSlow,
    /// What the engines read is something else, or too little, for a while.
    DiskTorn,
    /// That end's engine gets no more memory, for a while.
    Memory(End),
    /// That end's engine gets no more descriptors, for a while.
    Descriptors(End),
    /// Time jumps for that end's engine: it does not run for longer than the other end is patient.
    Clock(End),
}

impl Fault {
    /// All, in the table's order.
    pub(crate) const ALL: [Self; 14] = [
        Self::Kill(End::Source),
        Self::Kill(End::Target),
        Self::Cut(End::Source),
        Self::Cut(End::Target),
        Self::CutBoth,
        Self::DiskErrors,
        Self::DiskSlow,
        Self::DiskTorn,
        Self::Memory(End::Source),
        Self::Memory(End::Target),
        Self::Descriptors(End::Source),
        Self::Descriptors(End::Target),
        Self::Clock(End::Source),
        Self::Clock(End::Target),
    ];
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Kill(End::Source) => "source-killed",
            Self::Kill(End::Target) => "target-killed",
            Self::Cut(End::Source) => "cut-to-target",
            Self::Cut(End::Target) => "cut-to-source",
            Self::CutBoth => "cut-both-ways",
            Self::DiskErrors => "disk-errors",
            Self::DiskSlow => "disk-slow",
            Self::DiskTorn => "disk-torn",
            Self::Memory(End::Source) => "source-memory",
            Self::Memory(End::Target) => "target-memory",
            Self::Descriptors(End::Source) => "source-files",
            Self::Descriptors(End::Target) => "target-files",
            Self::Clock(End::Source) => "source-clock",
            Self::Clock(End::Target) => "target-clock",
        })
    }
}

/// When it strikes: as an end is about to write the event of that moment, and waits there until the fault is in place.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Moment {
    /// The source begins.
    Connect,
    /// Both ends have agreed, lanes are open.
    Arm,
    /// The guest runs, pages have travelled.
    Rounds,
    /// The guest is about to be paused.
    Stop,
    /// The guest is paused, its last pages are about to travel.
    Paused,
    /// The target has the last pages.
    Prepare,
    /// The source is about to give the guest up.
    Commit,
    /// The source has given it up; the target has not started it.
    Handover,
    /// The target has started it.
    Started,
    /// The source knows that.
    Drain,
}

impl Moment {
    /// All, in order.
    pub(crate) const ALL: [Self; 10] = [
        Self::Connect,
        Self::Arm,
        Self::Rounds,
        Self::Stop,
        Self::Paused,
        Self::Prepare,
        Self::Commit,
        Self::Handover,
        Self::Started,
        Self::Drain,
    ];

    /// Whose event it is.
    pub(crate) fn end(self) -> End {
        match self {
            Self::Prepare | Self::Handover | Self::Started => End::Target,
            _ => End::Source,
        }
    }

    /// Tells its event from the others; a new one for each migration.
    pub(crate) fn event(self) -> impl FnMut(&Value) -> bool + Send + 'static {
        let mut phase = String::new();
        move |event| {
            if event["event"] == "phase" {
                phase = event["phase"].as_str().unwrap_or_default().to_owned();
            }
            let begins = |wanted: &str| event["event"] == "phase" && phase == wanted;
            match self {
                Self::Connect => begins("connect"),
                Self::Arm => begins("arm"),
                // Where there are hardly any pages to send, the rounds are over before the first sample.
                Self::Rounds => {
                    phase == "rounds" && event["event"] == "sample" && event["round"].as_u64() > Some(0)
                        || begins("stop")
                }
                Self::Stop | Self::Prepare => begins("stop"),
                Self::Paused => phase == "stop" && event["event"] == "round",
                Self::Commit | Self::Handover => begins("commit"),
                Self::Started | Self::Drain => begins("drain"),
            }
        }
    }

    /// Whether the guest may run at the target from here on.
    pub(crate) fn is_late(self) -> bool {
        matches!(self, Self::Handover | Self::Started | Self::Drain)
    }
}

impl fmt::Display for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Connect => "connect",
            Self::Arm => "arm",
            Self::Rounds => "rounds",
            Self::Stop => "stop",
            Self::Paused => "paused",
            Self::Prepare => "prepare",
            Self::Commit => "commit",
            Self::Handover => "handover",
            Self::Started => "started",
            Self::Drain => "drain",
        })
    }
}

/// One case.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Case {
    pub(crate) fault: Fault,
    pub(crate) moment: Moment,
    pub(crate) mode: Mode,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.fault, self.moment, self.mode.name())
    }
}

/// The cases of a tier whose names contain each of `filter`.
pub(crate) fn cases(full: bool, filter: &[String]) -> Vec<Case> {
    let mut all = Vec::new();
    for fault in Fault::ALL {
        for moment in Moment::ALL {
            for mode in [Mode::Plain, Mode::Refer, Mode::Lazy] {
                all.push(Case { fault, moment, mode });
            }
        }
    }
    let wanted = |case: &Case| {
        let name = case.to_string();
        filter.iter().all(|word| name.contains(word.as_str()))
    };
    let short = |case: &Case| full || SHORT.contains(&(case.fault, case.moment)) && case.mode == Mode::Lazy;
    all.into_iter().filter(|case| short(case) && wanted(case)).collect()
}

/// What CI tries, in mode `lazy`: each fault once, kills and cuts where the guest changes hands too.
const SHORT: [(Fault, Moment); 18] = [
    (Fault::Kill(End::Source), Moment::Paused),
    (Fault::Kill(End::Source), Moment::Handover),
    (Fault::Kill(End::Source), Moment::Drain),
    (Fault::Kill(End::Target), Moment::Rounds),
    (Fault::Kill(End::Target), Moment::Handover),
    (Fault::Kill(End::Target), Moment::Started),
    (Fault::Cut(End::Source), Moment::Commit),
    (Fault::Cut(End::Target), Moment::Handover),
    (Fault::CutBoth, Moment::Drain),
    (Fault::DiskErrors, Moment::Drain),
    (Fault::DiskSlow, Moment::Drain),
    (Fault::DiskTorn, Moment::Drain),
    (Fault::Memory(End::Source), Moment::Rounds),
    (Fault::Memory(End::Target), Moment::Connect),
    (Fault::Descriptors(End::Source), Moment::Connect),
    (Fault::Descriptors(End::Target), Moment::Arm),
    (Fault::Clock(End::Source), Moment::Commit),
    (Fault::Clock(End::Target), Moment::Rounds),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_combination_is_a_case_and_names_tell_them_apart() {
        let all = cases(true, &[]);
        assert_eq!(all.len(), 14 * 10 * 3);
        let mut names: Vec<_> = all.iter().map(Case::to_string).collect();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), all.len());
        assert_eq!(cases(false, &[]).len(), SHORT.len());
        assert_eq!(cases(true, &["drain".into(), "lazy".into()]).len(), 14);
    }

    #[test]
    fn moments_tell_their_events() {
        let phase = |name: &str| serde_json::json!({"event": "phase", "phase": name});
        let round = serde_json::json!({"event": "round", "round": 2});
        let mut paused = Moment::Paused.event();
        assert!(!paused(&phase("rounds")) && !paused(&round) && !paused(&phase("stop")) && paused(&round));
        let mut rounds = Moment::Rounds.event();
        let sample = serde_json::json!({"event": "sample", "round": 1});
        assert!(!rounds(&sample) && !rounds(&phase("rounds")) && rounds(&sample));
    }
}
