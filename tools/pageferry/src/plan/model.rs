//! What a migration would take, from a few measured figures: how pages divide, how fast the guest dirties which part of
//! its memory, what link and disk carry. Pure; nothing here has a clock.

use std::time::Duration;

use mover::report::Mode;
use mover::units::{PAGE_BYTES_U64, f64_of};

/// Bytes on the wire for a page of data: the page and its share of a frame's head.
const DATA_BYTES: f64 = 4_110.0;
/// For a reference: page, sector, check.
const REFERENCE_BYTES: f64 = 40.0;
/// Time a stop takes besides the last pages: pausing, state, two turns over the link, starting.
const FIXED: Duration = Duration::from_millis(5);
/// What libxenguest does: it stops after so many rounds, or with fewer dirty pages than that.
const STOCK_ROUNDS: u32 = 5;
/// See [`STOCK_ROUNDS`].
const STOCK_DIRTY: f64 = 50.0;

/// How a guest dirties its memory: pages of a set, at random, at a rate. After a time t it has dirtied
/// set * (1 - e^(-rate * t / set)) different ones.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(super) struct Writing {
    /// Page writes a second.
    pub(super) rate: f64,
    /// Pages they go to; infinite where none was seen twice.
    pub(super) set: f64,
}

impl Writing {
    /// From two looks: `half` different pages after half of `time`, `whole` after all of it.
    pub(super) fn seen(half: u64, whole: u64, time: Duration) -> Self {
        let (half, whole, seconds) = (f64_of(half), f64_of(whole), time.as_secs_f64());
        if half == 0.0 || whole <= half {
            // Nothing new in the second half: all there is to dirty was dirtied in the first.
            return Self { rate: 10.0 * whole / seconds, set: whole.max(1.0) };
        }
        let ratio = (whole - half) / half;
        if ratio >= 0.98 {
            return Self { rate: whole / seconds, set: f64::INFINITY };
        }
        let set = half / (1.0 - ratio);
        Self { rate: -ratio.ln() * set / (seconds / 2.0), set }
    }

    /// Different pages dirtied within `seconds`.
    pub(super) fn dirty_after(&self, seconds: f64) -> f64 {
        if self.set.is_infinite() {
            return self.rate * seconds;
        }
        self.set * (1.0 - (-self.rate * seconds / self.set).exp())
    }
}

/// What is known before.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(super) struct Known {
    /// The guest's pages.
    pub(super) pages: u64,
    /// Of these, zero.
    pub(super) zero: u64,
    /// Of the others, those the index knows a place of.
    pub(super) hits: u64,
    /// How it dirties them.
    pub(super) writing: Writing,
    /// Link rate, bytes a second.
    pub(super) link: f64,
    /// Disk rate on the target, bytes a second.
    pub(super) disk: f64,
    /// The downtime to aim for.
    pub(super) max_downtime: Duration,
    /// The most rounds.
    pub(super) max_rounds: u32,
}

/// What a mode would take.
#[derive(Clone, Copy, PartialEq, Debug, serde::Serialize)]
pub(super) struct Prediction {
    /// Until the source is not needed any more.
    pub(super) total_ms: f64,
    /// While the guest stands still.
    pub(super) downtime_ms: f64,
    /// Until it runs on the target.
    pub(super) restart_ms: f64,
    /// Rounds, the last one included.
    pub(super) rounds: u32,
    /// Over the link.
    pub(super) link_bytes: f64,
    /// From the disk.
    pub(super) disk_bytes: f64,
    /// Whether the downtime aimed for is reached within the rounds allowed.
    pub(super) converges: bool,
}

/// Plays the rounds.
pub(super) fn predict(mode: Mode, known: &Known) -> Prediction {
    let (zero, hits) = (f64_of(known.zero), f64_of(known.hits));
    let pages = f64_of(known.pages);
    let (data, references) = match mode {
        Mode::Stock => (pages, 0.0),
        Mode::Plain => (pages - zero, 0.0),
        Mode::Refer | Mode::Lazy => (pages - zero - hits, hits),
    };
    let disk_bytes = references * f64_of(PAGE_BYTES_U64);
    let disk_s = disk_bytes / known.disk;
    let mut link_bytes = data * DATA_BYTES + references * REFERENCE_BYTES;
    let mut elapsed = link_bytes / known.link;
    if mode == Mode::Refer {
        elapsed = elapsed.max(disk_s);
    }
    let mut dirty = known.writing.dirty_after(elapsed).min(pages);
    let mut rounds = 1;
    let aim = known.max_downtime.as_secs_f64();
    let downtime = |dirty: f64| dirty * DATA_BYTES / known.link + FIXED.as_secs_f64();
    loop {
        let enough = match mode {
            Mode::Stock => dirty < STOCK_DIRTY || rounds + 1 >= STOCK_ROUNDS,
            _ => downtime(dirty) <= aim || rounds + 1 >= known.max_rounds,
        };
        if enough {
            break;
        }
        let round_s = dirty * DATA_BYTES / known.link;
        link_bytes += dirty * DATA_BYTES;
        elapsed += round_s;
        rounds += 1;
        let next = known.writing.dirty_after(round_s).min(pages);
        // A set that is dirtied as fast as it is sent stays so.
        let stuck = mode != Mode::Stock && next > 0.98 * dirty;
        dirty = next;
        if stuck {
            break;
        }
    }
    link_bytes += dirty * DATA_BYTES;
    let stop = downtime(dirty);
    let restart = elapsed + stop;
    let total = if mode == Mode::Lazy { restart.max(disk_s) } else { restart };
    Prediction {
        total_ms: total * 1e3,
        downtime_ms: stop * 1e3,
        restart_ms: restart * 1e3,
        rounds: rounds + 1,
        link_bytes,
        disk_bytes,
        converges: stop <= aim,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known() -> Known {
        Known {
            pages: 262_144,
            zero: 52_000,
            hits: 131_000,
            writing: Writing { rate: 5_000.0, set: 8_000.0 },
            link: 118e6,
            disk: 1e9,
            max_downtime: Duration::from_millis(50),
            max_rounds: 30,
        }
    }

    #[test]
    fn a_hot_set_is_found_again_in_what_it_dirties() {
        let truth = Writing { rate: 5_000.0, set: 8_000.0 };
        let count = |seconds| mover::units::u64_of_f64(truth.dirty_after(seconds).round());
        let found = Writing::seen(count(1.0), count(2.0), Duration::from_secs(2));
        assert!((found.rate / truth.rate - 1.0).abs() < 0.01, "{found:?}");
        assert!((found.set / truth.set - 1.0).abs() < 0.01, "{found:?}");
        let wide = Writing::seen(1_000, 2_000, Duration::from_secs(2));
        assert!(wide.set.is_infinite() && (wide.rate - 1_000.0).abs() < 0.1);
        assert!(Writing::seen(0, 0, Duration::from_secs(2)).dirty_after(100.0) <= 1.0);
        assert!((Writing::seen(500, 500, Duration::from_secs(2)).dirty_after(100.0) - 500.0).abs() < 1.0);
    }

    #[test]
    fn modes_come_in_the_order_of_what_they_move() {
        let [stock, plain, refer, lazy] = Mode::ALL.map(|mode| predict(mode, &known()));
        assert!(
            stock.total_ms > plain.total_ms && plain.total_ms > refer.total_ms,
            "{stock:?} {plain:?} {refer:?}"
        );
        assert!(lazy.total_ms <= refer.total_ms * 1.001);
        assert!((lazy.disk_bytes - 131_000.0 * 4096.0).abs() < 1.0);
        assert!(plain.converges && plain.downtime_ms <= 50.0, "{plain:?}");
    }

    #[test]
    fn a_slow_disk_delays_refer_and_only_the_end_of_lazy() {
        let slow = Known { disk: 50e6, ..known() };
        let (refer, lazy) = (predict(Mode::Refer, &slow), predict(Mode::Lazy, &slow));
        assert!(lazy.restart_ms < 0.5 * refer.restart_ms, "{refer:?} {lazy:?}");
        assert!((lazy.total_ms - 131_000.0 * 4096.0 / 50e6 * 1e3).abs() < 1.0);
    }

    #[test]
    fn a_guest_that_outruns_the_link_is_called_that() {
        let hog = Known { writing: Writing { rate: 60_000.0, set: 200_000.0 }, ..known() };
        for mode in [Mode::Plain, Mode::Lazy] {
            let prediction = predict(mode, &hog);
            assert!(!prediction.converges && prediction.downtime_ms > 1_000.0, "{prediction:?}");
            assert!(prediction.rounds <= 30);
        }
    }
}
