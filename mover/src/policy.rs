//! When to stop the guest: pure decisions from what the rounds have shown.
//!
//! Stock is libxenguest's (`xg_sr_save.c`, `SPP_TARGET_DIRTY_COUNT` and `SPP_MAX_ITERATIONS`). Ours goes on while the
//! next round still makes the downtime shorter, stops when it is under what is allowed and has settled (after waiting a
//! little for a better moment), throttles a guest that does not converge if that is wanted, and ends a migration that
//! can't, as configured.
//!
//! A guest is slowed late and by much. At full speed it rewrites pages that are still to be sent, which costs nothing; rounds
//! shrink until as many are dirtied as sent. From there on `left` bytes to send, at a link of L and writes of w at full speed,
//! take left / (L - s w) at speed s, and cost the guest (1 - s) of that time: the less the slower it goes.
#![forbid(unsafe_code)]

use std::time::Duration;

use crate::units::{PAGE_BYTES_U64, f64_of, u64_of_f64};

/// What is known after a round.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Observation {
    /// Rounds done.
    pub rounds: u32,
    /// Pages dirty now.
    pub dirty: u64,
    /// Pages that were dirty after the round before, if there was one.
    pub dirty_before: Option<u64>,
    /// Link rate, bytes a second.
    pub link_rate: f64,
    /// What a pause costs besides pages: pausing, state, acknowledgements.
    pub fixed: Duration,
    /// Guest's speed now, percent.
    pub speed: u8,
    /// Bytes a second that the guest dirties at that speed, as counted at the begin of the last round, when hardly a page
    /// was dirtied twice; none if that was not looked at.
    pub written: Option<f64>,
    /// How long ago the downtime first was what is allowed; zero if it was not before.
    pub waited: Duration,
}

impl Observation {
    /// How long the guest would be down if it were stopped now.
    #[must_use]
    pub fn predicted(&self) -> Duration {
        let seconds = f64_of(self.dirty * PAGE_BYTES_U64) / self.link_rate.max(1.0);
        self.fixed + Duration::from_secs_f64(seconds.min(1e6))
    }
    /// Whether the guest may be stopped now.
    #[must_use]
    pub fn fits(&self, wish: &Wish) -> bool {
        self.predicted() <= wish.max_downtime
    }
    fn shrinks(&self) -> bool {
        self.dirty_before.is_none_or(|before| self.dirty * 10 < before * 8)
    }
    /// The speed to slow the guest to, percent.
    fn slower(&self) -> u8 {
        let step = self.speed / 5 * 3;
        let full = self.written.unwrap_or(0.0) * 100.0 / f64::from(self.speed.max(1));
        let aim = 100.0 * LEFT_TO_WRITES * self.link_rate / full.max(1.0);
        u8::try_from(u64_of_f64(aim)).unwrap_or(u8::MAX).min(step).max(SLOWEST)
    }
}

/// What the user wants.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Wish {
    /// Longest downtime to aim for.
    pub max_downtime: Duration,
    /// Most rounds while the guest runs.
    pub max_rounds: u32,
    /// Whether the guest may be slowed down.
    pub throttle: bool,
    /// Whether to stop and copy in the end, however long that takes; else to give up.
    pub finish: bool,
}

/// What to do next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Decision {
    /// Another round.
    Round,
    /// Another round with the guest at this speed, percent.
    Throttle(u8),
    /// Stop the guest and send the rest.
    Stop,
    /// Leave it where it is.
    GiveUp,
}

/// Rounds of stock, the first included, and the number of dirty pages under which it stops earlier.
const STOCK_ROUNDS: u32 = 5;
const STOCK_DIRTY: u64 = 50;
/// Transfer time of the last round not worth another live one.
const SETTLED: Duration = Duration::from_millis(1);
/// Transfer time of the last round not worth waiting for a better moment.
const SHORT: Duration = Duration::from_millis(3);
/// How often the longest downtime one may be waited: a guest writes in bursts.
const PATIENCE: u32 = 10;
/// Slowest speed a guest is throttled to, percent.
const SLOWEST: u8 = 5;
/// The part of the link's rate that a guest that is slowed down may dirty: each round is about that of the one before.
const LEFT_TO_WRITES: f64 = 0.25;

/// libxenguest's decision.
#[must_use]
pub fn stock(rounds: u32, dirty: u64) -> Decision {
    if dirty < STOCK_DIRTY || rounds >= STOCK_ROUNDS { Decision::Stop } else { Decision::Round }
}

/// Ours.
#[must_use]
pub fn decide(seen: &Observation, wish: &Wish) -> Decision {
    let predicted = seen.predicted();
    let last = seen.rounds >= wish.max_rounds;
    if seen.fits(wish) {
        let transfer = predicted.saturating_sub(seen.fixed);
        let slowed = seen.speed < 100;
        let waited = slowed || seen.waited >= PATIENCE * wish.max_downtime;
        let settled = transfer <= SETTLED || !seen.shrinks() && (transfer <= SHORT || waited);
        return if settled || last { Decision::Stop } else { Decision::Round };
    }
    match (seen.shrinks(), last) {
        (true, false) => Decision::Round,
        (false, _) if wish.throttle && seen.speed > SLOWEST => Decision::Throttle(seen.slower()),
        (false, false) => Decision::Round,
        (_, true) if wish.finish => Decision::Stop,
        (_, true) => Decision::GiveUp,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WISH: Wish =
        Wish { max_downtime: Duration::from_millis(50), max_rounds: 10, throttle: false, finish: true };
    /// 100 MB/s: 1,000 pages take 41 ms.
    const SEEN: Observation = Observation {
        rounds: 2,
        dirty: 1000,
        dirty_before: Some(10_000),
        link_rate: 100e6,
        fixed: Duration::from_millis(5),
        speed: 100,
        written: None,
        waited: Duration::ZERO,
    };

    #[test]
    fn stock_stops_after_five_rounds_or_under_fifty_pages() {
        assert_eq!(
            [stock(1, 50), stock(1, 49), stock(4, 9999), stock(5, 9999)].map(|d| d == Decision::Stop),
            [false, true, false, true]
        );
    }

    #[test]
    fn decisions() {
        let seen = |f: fn(&mut Observation)| {
            let mut seen = SEEN;
            f(&mut seen);
            seen
        };
        let throttle = Wish { throttle: true, ..WISH };
        let give_up = Wish { finish: false, ..WISH };
        for (what, seen, wish, decision) in [
            ("short enough, but still shrinking", SEEN, WISH, Decision::Round),
            (
                "short enough, but a better moment may come",
                seen(|s| s.dirty_before = Some(1100)),
                WISH,
                Decision::Round,
            ),
            (
                "short enough, and no better moment came",
                seen(|s| (s.dirty_before, s.waited) = (Some(1100), WISH.max_downtime * 10)),
                WISH,
                Decision::Stop,
            ),
            (
                "short, and not shrinking",
                seen(|s| (s.dirty, s.dirty_before) = (70, Some(60))),
                WISH,
                Decision::Stop,
            ),
            ("hardly anything left", seen(|s| s.dirty = 20), WISH, Decision::Stop),
            (
                "nothing at all left, first round",
                seen(|s| (s.dirty, s.dirty_before) = (0, None)),
                WISH,
                Decision::Stop,
            ),
            ("short enough, rounds used up", seen(|s| s.rounds = 10), WISH, Decision::Stop),
            ("too long, shrinking", seen(|s| s.dirty = 5000), WISH, Decision::Round),
            (
                "too long, first round",
                seen(|s| (s.dirty, s.dirty_before) = (90_000, None)),
                WISH,
                Decision::Round,
            ),
            ("too long, not shrinking", seen(|s| s.dirty = 9900), WISH, Decision::Round),
            (
                "too long, not shrinking, may throttle",
                seen(|s| s.dirty = 9900),
                throttle,
                Decision::Throttle(60),
            ),
            (
                "writes half as fast again as the link: a quarter of the link is left to it",
                seen(|s| (s.dirty, s.written) = (9900, Some(150e6))),
                throttle,
                Decision::Throttle(16),
            ),
            (
                "writes far more than could be left to it",
                seen(|s| (s.dirty, s.written) = (9900, Some(9e9))),
                throttle,
                Decision::Throttle(5),
            ),
            (
                "writes little, and yet does not shrink: a step",
                seen(|s| (s.dirty, s.written) = (9900, Some(1e6))),
                throttle,
                Decision::Throttle(60),
            ),
            (
                "slowed, and still too much: by what it does at that speed",
                seen(|s| (s.dirty, s.speed, s.written) = (9900, 50, Some(100e6))),
                throttle,
                Decision::Throttle(12),
            ),
            (
                "slowed and short enough: no better moment is waited for",
                seen(|s| (s.dirty_before, s.speed) = (Some(1100), 20)),
                throttle,
                Decision::Stop,
            ),
            (
                "throttled to the end",
                seen(|s| (s.dirty, s.speed, s.rounds) = (9900, 5, 10)),
                throttle,
                Decision::Stop,
            ),
            ("too long, rounds used up", seen(|s| (s.dirty, s.rounds) = (9900, 10)), WISH, Decision::Stop),
            ("the same, rather not", seen(|s| (s.dirty, s.rounds) = (9900, 10)), give_up, Decision::GiveUp),
            ("a link that does not move", seen(|s| s.link_rate = 0.0), WISH, Decision::Round),
        ] {
            assert_eq!(decide(&seen, &wish), decision, "{what}");
        }
    }
}
