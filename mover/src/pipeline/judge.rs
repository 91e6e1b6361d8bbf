//! The judge: what happens to a page. Pure: the page's class, an index hit, and how long link and disk still have to
//! work go in, a fate comes out.
//!
//! Both pipes are to stay full to the end. A page that stands on a disk goes by the pipe that would be done with it
//! first: where the disk is the slower one, some duplicates travel as data; where the link is, all go by reference.
//!
//! The processors are a third pipe that both need, and a page that is looked up, read from a disk, checked and copied takes more of
//! them than one that is sent in the clear and received. So where not the link holds the lanes up but their own work and that
//! of who receives does, everything is sent, and nothing is looked up.

use std::time::Duration;

use crate::units::f64_of;

/// What is known of a page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Class {
    /// All zero.
    Zero,
    /// The index has a block that may hold it.
    Duplicate,
    /// Anything else.
    Unique,
}

/// What happens to it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fate {
    /// Told to be zero.
    Zero,
    /// Told where it stands.
    Reference,
    /// Sent.
    Data,
}

/// How long each pipe still has to work, and how long it may.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Backlog {
    /// Seconds until the link is done with what it has to carry for sure.
    pub link_s: f64,
    /// Seconds until the disk is done with the references made so far.
    pub disk_s: f64,
    /// Seconds the disk may be behind at most: the downtime budget in the last round of a migration that loads
    /// everything before the restart; else no limit.
    pub disk_limit_s: f64,
    /// Part of the time that lanes spend in sending in which they wait: near 1 where the link holds them up, a half where a
    /// receiver on the same processors does, less where they have a processor each.
    pub held_up: f64,
}

/// Disk work that is never worth balancing: less than what a sweep of the loader holds in flight.
const SMALL_DISK_BACKLOG_S: f64 = 0.004;

/// Where lanes wait for a smaller part of their sending, the processors are slower than the link.
const HELD_UP: f64 = 0.7;

/// How much a lane's latest frame counts in what part of its sending it waits.
const NEWS: f64 = 0.25;
/// What the link is taken to carry before anything has been sent, bytes a second.
const LINK_RATE_GUESS: f64 = 100e6;
/// Bytes after which what was sent tells what the link carries.
const TELLING_BYTES: u64 = 1 << 20;

/// What the link carries, bytes a second: by `bytes` for which lanes were busy sending for `busy_s`, all of them at once, or by the
/// cap where that is less, for which they wait before they send.
#[must_use]
pub fn link_rate(bytes: u64, busy_s: f64, cap: Option<u64>) -> f64 {
    let seen = if bytes < TELLING_BYTES || busy_s <= 0.0 { LINK_RATE_GUESS } else { f64_of(bytes) / busy_s };
    cap.map_or(seen, |cap| seen.min(f64_of(cap)))
}

/// What part of its sending a lane waits ([`Backlog::held_up`]), after a frame that took it `spent`, on a processor for `worked`.
#[must_use]
pub fn held_up(before: f64, worked: Duration, spent: Duration) -> f64 {
    let waited = 1.0 - worked.as_secs_f64() / spent.as_secs_f64().max(1e-9);
    before + (waited.clamp(0.0, 1.0) - before) * NEWS
}

/// Whether a page may become a reference at all now: if not, nobody need look whether it stands on a disk.
#[must_use]
pub fn may_refer(backlog: Backlog) -> bool {
    backlog.held_up >= HELD_UP && backlog.disk_s <= backlog.disk_limit_s
}

/// The fate of a page.
#[must_use]
pub fn judge(class: Class, backlog: Backlog) -> Fate {
    match class {
        Class::Zero => Fate::Zero,
        Class::Unique => Fate::Data,
        Class::Duplicate if !may_refer(backlog) => Fate::Data,
        Class::Duplicate if backlog.disk_s <= backlog.link_s.max(SMALL_DISK_BACKLOG_S) => Fate::Reference,
        Class::Duplicate => Fate::Data,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FREE: Backlog = Backlog { link_s: 0.0, disk_s: 0.0, disk_limit_s: f64::INFINITY, held_up: 1.0 };

    #[test]
    fn fates() {
        let busy_disk = Backlog { disk_s: 1.0, ..FREE };
        let both_busy = Backlog { link_s: 2.0, disk_s: 1.0, ..FREE };
        let last_round = Backlog { disk_limit_s: 0.01, ..both_busy };
        for (class, backlog, fate) in [
            (Class::Zero, busy_disk, Fate::Zero),
            (Class::Unique, FREE, Fate::Data),
            (Class::Duplicate, FREE, Fate::Reference),
            (Class::Duplicate, busy_disk, Fate::Data),
            (Class::Duplicate, both_busy, Fate::Reference),
            (Class::Duplicate, last_round, Fate::Data),
            (Class::Duplicate, Backlog { disk_s: 0.003, ..FREE }, Fate::Reference),
            (Class::Duplicate, Backlog { held_up: 0.5, ..both_busy }, Fate::Data),
            (Class::Duplicate, Backlog { held_up: 0.95, ..both_busy }, Fate::Reference),
            (Class::Zero, Backlog { held_up: 0.0, ..FREE }, Fate::Zero),
        ] {
            assert_eq!(judge(class, backlog), fate, "{class:?} {backlog:?}");
            assert!(
                fate != Fate::Reference || may_refer(backlog),
                "it would not have been looked up: {backlog:?}"
            );
        }
    }

    #[test]
    fn the_links_rate_is_what_was_seen_or_the_cap() {
        for (bytes, busy_s, cap, rate) in [
            (0, 0.0, None, LINK_RATE_GUESS),
            (0, 0.0, Some(5_000_000), 5e6),
            (1 << 30, 0.0, None, LINK_RATE_GUESS),
            (TELLING_BYTES - 1, 1.0, None, LINK_RATE_GUESS),
            (2_000_000_000, 2.0, None, 1e9),
            (2_000_000_000, 2.0, Some(60_000_000), 60e6),
            (2_000_000_000, 2.0, Some(60_000_000_000), 1e9),
        ] {
            let found = link_rate(bytes, busy_s, cap);
            assert!((found - rate).abs() < 1.0, "{bytes} in {busy_s} s, cap {cap:?}: {found}");
        }
    }

    #[test]
    fn a_lane_that_waits_is_held_up_and_one_that_works_is_not() {
        let after = |frames: u32, before, worked_us, spent_us| {
            let (worked, spent) = (Duration::from_micros(worked_us), Duration::from_micros(spent_us));
            (0..frames).fold(before, |part, _| held_up(part, worked, spent))
        };
        assert!(after(12, 1.0, 90, 150) < HELD_UP, "a frame in 0.15 ms, most of it work");
        assert!(after(12, 0.4, 200, 8_700) > HELD_UP, "a frame in 8.7 ms, as at 1 Gbit/s");
        assert!(after(1, 1.0, 150, 150) > HELD_UP, "one frame changes nothing yet");
        // Clocks that are read one after the other, and one that stands still.
        assert!((0.0..=1.0).contains(&after(1, 0.0, 200, 100)) && (0.0..=1.0).contains(&after(1, 1.0, 5, 0)));
    }
}
