//! How late this guest's timer wakes it: what its neighbours, and what is done with those, cost it.
//!
//! Once a second all that was seen is said, added up since the start, so that nothing is lost where a line is:
//!
//! ```text
//! PROBE: 250us=812 500us=41 1000us=3 2000us=1
//! ```
//!
//! A word is a bound and how often the lateness was below it, and not below the one before.

use std::fmt::Write as _;
use std::thread;
use std::time::{Duration, Instant};

/// Bounds in microseconds: four to an octave, from 100 us to 13 s.
const BOUNDS: usize = 70;
/// Between two lines.
const LINE_EVERY: Duration = Duration::from_secs(1);

fn bound(at: usize) -> u64 {
    let (octave, step) = (at / 4, u64::try_from(at % 4).unwrap_or(0));
    (100 << octave) + (25 << octave) * step
}

/// Sleeps for `every` and sees how late it is, without end.
pub(crate) fn wake_up(every: Duration) {
    let mut counts = [0_u64; BOUNDS];
    let mut said = Instant::now();
    loop {
        let begun = Instant::now();
        thread::sleep(every);
        let late = u64::try_from(begun.elapsed().saturating_sub(every).as_micros()).unwrap_or(u64::MAX);
        let at = (0..BOUNDS - 1).find(|at| late < bound(*at)).unwrap_or(BOUNDS - 1);
        counts[at] += 1;
        if said.elapsed() >= LINE_EVERY {
            said = Instant::now();
            println!("PROBE:{}", line(&counts));
        }
    }
}

fn line(counts: &[u64; BOUNDS]) -> String {
    let mut line = String::new();
    for (at, count) in counts.iter().enumerate().filter(|(_, count)| **count > 0) {
        // Into a string it can't fail.
        let _ = write!(line, " {}us={count}", bound(at));
    }
    // Without its last word a line is torn.
    line + " end"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_rise_and_counts_stand_at_theirs() {
        assert!((1..BOUNDS).all(|at| bound(at) > bound(at - 1)));
        let mut counts = [0; BOUNDS];
        (counts[0], counts[5]) = (3, 1);
        assert_eq!(line(&counts), " 100us=3 250us=1 end");
    }
}
