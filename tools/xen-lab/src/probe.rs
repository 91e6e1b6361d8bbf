//! What a guest beside says of how late its timer wakes it (`checker/src/probe.rs` has the line).

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::guest::{CONSOLES, Guest};
use crate::host::Host;
use crate::wait;

/// How often it was late by less than so many microseconds, and not by less than the bound before.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Lateness(BTreeMap<u64, u64>);

impl Lateness {
    /// All that `guest` has seen on `host` so far.
    pub(crate) fn of(guest: &Guest, host: &Host) -> Result<Self> {
        let command = format!("grep -a 'PROBE:.* end' {CONSOLES}/guest-{}.log | tail -n 1", guest.name);
        let what = format!("what {} sees on host {}", guest.name, host.number());
        wait::until(&what, wait::limit(60), Duration::from_millis(500), || {
            let line = host.run(&command)?;
            Ok(Self::parse(&line).ok_or(line))
        })
    }

    fn parse(line: &str) -> Option<Self> {
        let (_, counts) = line.split_once("PROBE:")?;
        let words = counts.split_once(" end")?.0.split_whitespace();
        let counts = words.map(|word| {
            let (bound, count) = word.split_once("us=")?;
            Some((bound.parse().ok()?, count.parse().ok()?))
        });
        counts.collect::<Option<_>>().map(Self)
    }

    /// What has been seen since `before`.
    pub(crate) fn since(&self, before: &Self) -> Self {
        let counts = self.0.iter().map(|(bound, count)| {
            (*bound, count.saturating_sub(before.0.get(bound).copied().unwrap_or_default()))
        });
        Self(counts.collect())
    }

    /// Of several times together.
    pub(crate) fn add(&mut self, more: &Self) {
        for (bound, count) in &more.0 {
            *self.0.entry(*bound).or_default() += count;
        }
    }

    /// Under how many milliseconds `per_mille` of 1000 stayed.
    pub(crate) fn quantile(&self, per_mille: u64) -> Result<f64> {
        let all: u64 = self.0.values().sum();
        let mut below = 0;
        for (bound, count) in &self.0 {
            below += count;
            if *count > 0 && below * 1000 >= all * per_mille {
                return Ok(Duration::from_micros(*bound).as_secs_f64() * 1000.0);
            }
        }
        None.context("the guest beside has not been seen to wake")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_read_and_quantiles_are_of_what_lies_between_two() {
        let before = Lateness::parse("PROBE: 100us=100 250us=1 end").unwrap();
        let after = Lateness::parse("x PROBE: 100us=190 250us=10 3200us=2 end\r").unwrap();
        assert_eq!(Lateness::parse("PROBE: 100us=190 250us=1"), None, "torn");
        let seen = after.since(&before);
        assert!((seen.quantile(500).unwrap() - 0.1).abs() < 1e-9);
        assert!((seen.quantile(950).unwrap() - 0.25).abs() < 1e-9);
        assert!((seen.quantile(990).unwrap() - 3.2).abs() < 1e-9);
        assert!(after.since(&after).quantile(500).is_err());
        let mut both = seen.clone();
        both.add(&seen);
        assert!((both.quantile(950).unwrap() - 0.25).abs() < 1e-9);
    }
}
