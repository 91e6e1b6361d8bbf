//! The lab's tests: functions with a name, a tier, and the hosts they need.

mod checkpoint;
mod drain;
mod dropin;
mod faults;
mod ferry;
mod left;
mod library;
mod libvirt;
pub(crate) mod runner;
mod stock;
mod strikes;

use anyhow::Result;
use clap::ValueEnum;

use crate::guest::Kind;
use crate::lab::Lab;
use crate::moves::{LIBRARY, OURS, PROGRAM};
use crate::spec::HostSpec;

/// How much of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Tier {
    /// What fits into 22 minutes with building everything, on two cores.
    Ci,
    /// The whole proof, each way a guest can take once.
    Full,
    /// Each way by itself as well, and by stock's helpers: to see where something goes wrong, and whether it does without us.
    All,
}

/// A pair of hosts tests run on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pair {
    /// Debian 12 on both, with shadow paging: all that stock ones do, and live migration of PV guests.
    BookwormFull,
    /// Debian 12 on both, as shipped.
    Bookworm,
    /// Debian 13 on both, as shipped.
    Trixie,
    /// Debian 12 and Debian 13, as shipped.
    Upgrade,
}

impl Pair {
    /// In the order in which they are brought up.
    const ALL: [Self; 4] = [Self::BookwormFull, Self::Bookworm, Self::Trixie, Self::Upgrade];

    /// Its name in tests' names.
    fn name(self) -> &'static str {
        match self {
            Self::BookwormFull => "4.17-full",
            Self::Bookworm => "4.17",
            Self::Trixie => "4.20",
            Self::Upgrade => "4.17-to-4.20",
        }
    }

    fn hosts(self) -> [HostSpec; 2] {
        match self {
            Self::BookwormFull => [HostSpec::BOOKWORM_FULL; 2],
            Self::Bookworm => [HostSpec::BOOKWORM; 2],
            Self::Trixie => [HostSpec::TRIXIE; 2],
            Self::Upgrade => [HostSpec::BOOKWORM, HostSpec::TRIXIE],
        }
    }

    /// Whether guests of this kind can be migrated live: PV ones need shadow paging.
    fn migrates_live(self, kind: Kind) -> bool {
        kind != Kind::Pv || self == Self::BookwormFull
    }

    /// Whether a guest can go back to where it came from: an older Xen does not take a newer one's.
    fn goes_back(self) -> bool {
        self != Self::Upgrade
    }

    /// Whether what goes wrong is tried on it too, and what does not depend on the hypervisor: once is enough, it is slow.
    fn is_broad(self) -> bool {
        self == Self::BookwormFull
    }

    /// Which tier its tests belong to.
    fn tier(self) -> Tier {
        if self == Self::BookwormFull { Tier::Ci } else { Tier::Full }
    }
}

/// What a test needs of the lab beyond its hosts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Needs {
    /// Nothing of ours: the test says whether the lab itself is right.
    Nothing,
    /// Our save helper among the binaries.
    Helper,
    /// Our library.
    Library,
    /// Our program, and the helper beside it.
    Program,
}

impl Needs {
    /// Files that have to stand in dom0.
    fn files(self) -> &'static [&'static str] {
        match self {
            Self::Nothing => &[],
            Self::Helper => &[OURS],
            Self::Library => &[LIBRARY],
            Self::Program => &[OURS, PROGRAM],
        }
    }
}

/// What a test does: an error is its failure.
type Body = Box<dyn Fn(&Lab) -> Result<()>>;

/// A test.
struct Test {
    /// `PAIR/GROUP/WHAT`.
    name: String,
    tier: Tier,
    pair: Pair,
    needs: Needs,
    body: Body,
}

impl Test {
    fn new(
        pair: Pair,
        what: &str,
        tier: Tier,
        needs: Needs,
        body: impl Fn(&Lab) -> Result<()> + 'static,
    ) -> Self {
        let name = format!("{}/{what}", pair.name());
        Self { name, tier: tier.max(pair.tier()), pair, needs, body: Box::new(body) }
    }
}

/// Every test, in the order in which they run.
fn all() -> Vec<Test> {
    let of = |pair: Pair| {
        let broad = if pair.is_broad() {
            [
                library::tests(pair),
                libvirt::tests(pair),
                faults::tests(pair),
                drain::tests(pair),
                checkpoint::tests(pair),
                strikes::tests(pair),
            ]
        } else {
            [const { vec![] }; 6]
        };
        [stock::tests(pair), dropin::tests(pair), ferry::tests(pair)].into_iter().chain(broad)
    };
    Pair::ALL.into_iter().flat_map(|pair| of(pair).flatten()).collect()
}

#[cfg(test)]
mod checks {
    use super::*;

    #[test]
    fn names_are_unique_and_every_tier_and_pair_has_tests() {
        let tests = all();
        let mut names: Vec<_> = tests.iter().map(|test| test.name.as_str()).collect();
        names.sort_unstable();
        let count = names.len();
        names.dedup();
        assert_eq!(names.len(), count);
        for pair in Pair::ALL {
            assert!(tests.iter().any(|test| test.pair == pair), "{pair:?}");
        }
        assert!(tests.iter().any(|test| test.tier == Tier::Ci));
    }
}
