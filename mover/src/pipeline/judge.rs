//! The judge: what happens to a page. Pure: the page's class, an index hit, and how long link and disk still have to
//! work go in, a fate comes out.
//!
//! Both pipes are to stay full to the end. A page that stands on a disk goes by the pipe that would be done with it
//! first: where the disk is the slower one, some duplicates travel as data; where the link is, all go by reference.

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
}

/// Disk work that is never worth balancing: less than what a sweep of the loader holds in flight.
const SMALL_DISK_BACKLOG_S: f64 = 0.004;

/// What the link is taken to carry before anything has been sent, bytes a second.
const LINK_RATE_GUESS: f64 = 100e6;
/// Bytes after which what was sent tells what the link carries.
const TELLING_BYTES: u64 = 1 << 20;

/// What the link carries, bytes a second: by `bytes` that lanes were busy sending for `busy_s`, all of them at once, or by the
/// cap where that is less: the time they wait for it is not among what they are busy.
#[must_use]
pub fn link_rate(bytes: u64, busy_s: f64, cap: Option<u64>) -> f64 {
    let seen = if bytes < TELLING_BYTES || busy_s <= 0.0 { LINK_RATE_GUESS } else { f64_of(bytes) / busy_s };
    cap.map_or(seen, |cap| seen.min(f64_of(cap)))
}

/// The fate of a page.
#[must_use]
pub fn judge(class: Class, backlog: Backlog) -> Fate {
    match class {
        Class::Zero => Fate::Zero,
        Class::Unique => Fate::Data,
        Class::Duplicate if backlog.disk_s > backlog.disk_limit_s => Fate::Data,
        Class::Duplicate if backlog.disk_s <= backlog.link_s.max(SMALL_DISK_BACKLOG_S) => Fate::Reference,
        Class::Duplicate => Fate::Data,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FREE: Backlog = Backlog { link_s: 0.0, disk_s: 0.0, disk_limit_s: f64::INFINITY };

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
        ] {
            assert_eq!(judge(class, backlog), fate, "{class:?} {backlog:?}");
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
}
