//! `cargo xtask seeds`: many seeds of the simulator in one go, with everything optimised and every assertion kept (profile
//! `seeds` in Cargo.toml). By cargo's own runner: nextest ends a test that takes longer than five minutes, and this one may.

use std::time::Instant;

use anyhow::Result;

use crate::run;

/// What to run, and which of the test's variables say where to begin and how many.
struct Kind {
    test: &'static str,
    first: &'static str,
    count: &'static str,
    called: &'static str,
}

const MIGRATIONS: Kind = Kind {
    test: "sim::seeds::seeds",
    first: "PAGEFERRY_FIRST_SEED",
    count: "PAGEFERRY_SEEDS",
    called: "migrations",
};
const FLEETS: Kind = Kind {
    test: "sim::fleet::fleets",
    first: "PAGEFERRY_FIRST_FLEET",
    count: "PAGEFERRY_FLEETS",
    called: "fleets",
};

/// Runs `migrations` seeds of one guest's migration and `fleets` of several at once, both from seed `first` on.
pub(crate) fn run(first: u64, migrations: u64, fleets: u64) -> Result<()> {
    for (kind, count) in [(MIGRATIONS, migrations), (FLEETS, fleets)] {
        if count == 0 {
            continue;
        }
        let begun = Instant::now();
        let mut command = run::cargo([
            "test",
            "--quiet",
            "--locked",
            "--profile",
            "seeds",
            "--package",
            "mover",
            "--lib",
            "--",
        ])?;
        command.args([kind.test, "--exact", "--nocapture"]);
        command.env(kind.first, first.to_string()).env(kind.count, count.to_string());
        run::succeed(&mut command)?;
        let seconds = begun.elapsed().as_secs_f64();
        println!("{count} {} from seed {first} on, no violation, {seconds:.0} s with the build", kind.called);
    }
    Ok(())
}
