//! What only an onlooker can tell of a migration: how the guest fared. `pageferry demo --closely` measures it, and the
//! suites read it beside the engine's own summary.

#![forbid(unsafe_code)]

use mover::process::control::AccessTimes;
use mover::units::f64_of;
use serde::{Deserialize, Serialize};

/// How a guest fared before, during and after a migration.
#[derive(Clone, Copy, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct Fared {
    /// Operations a second before.
    pub work_before: f64,
    /// Operations a second from the migration's begin to its end, downtime included, verification taken out.
    pub work_during: f64,
    /// Operations a second behind it.
    pub work_after: f64,
    /// Page accesses before.
    pub access_before: Access,
    /// Page accesses meanwhile, on both ends.
    pub access_during: Access,
    /// Page accesses behind it.
    pub access_after: Access,
    /// Of those meanwhile, accesses to pages that were not there yet, each for the time it waited.
    pub waits: Access,
    /// From the last look that found the guest running on the source to the first that found it so on the target,
    /// milliseconds, verification taken out. No finer than the looks.
    pub silent_ms: f64,
    /// Bytes of what was nonzero, on no disk, and different from all else just before: what had to go over the link.
    pub least_link_bytes: u64,
}

/// How long accesses to pages took.
#[derive(Clone, Copy, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct Access {
    /// How many there were.
    pub count: u64,
    /// Half of them stayed under this, in microseconds; 0 where there were none.
    pub p50_us: f64,
    /// 99 of 100 stayed under this, in microseconds.
    pub p99_us: f64,
}

impl Access {
    /// The two figures of a histogram.
    #[must_use]
    pub fn of(times: &AccessTimes) -> Self {
        let us = |share| times.quantile_ns(share).map_or(0.0, f64_of) / 1e3;
        Self { count: times.count(), p50_us: us(0.5), p99_us: us(0.99) }
    }

    /// Half of them stayed under this, in microseconds; not a number where there were none.
    #[must_use]
    pub fn p50(&self) -> f64 {
        if self.count == 0 { f64::NAN } else { self.p50_us }
    }

    /// 99 of 100 stayed under this, in microseconds; not a number where there were none.
    #[must_use]
    pub fn p99(&self) -> f64 {
        if self.count == 0 { f64::NAN } else { self.p99_us }
    }
}
