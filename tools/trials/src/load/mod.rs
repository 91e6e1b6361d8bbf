//! Migrations under load: [`row`], one guest a thousand times; [`many`], several at once.

#![forbid(unsafe_code)]

pub(crate) mod many;
pub(crate) mod row;

use mover::net::lab::End;

/// The end across the cable.
fn across(end: End) -> End {
    match end {
        End::Source => End::Target,
        End::Target => End::Source,
    }
}

/// Numbers that look random and are the same for the same seed (splitmix64).
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// One of 0 to `sides - 1`.
    fn throw(&mut self, sides: u64) -> u64 {
        self.next() % sides
    }
}
