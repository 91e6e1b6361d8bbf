//! `cargo xtask miri`: the tests that miri can interpret, which sees undefined behaviour, racing accesses and what an ordering
//! allows.

use anyhow::Result;

use crate::nightly::{self, MIRI, SOURCE};
use crate::run;

/// Where its programs are, in the target directory.
const HOME: &str = "miri";

/// The beginnings of the names of those that are interpreted, by package: memory as far as it is copies, what threads share without
/// locks, headers and codecs, what is pure. What is tried in full takes it minutes each, and so would properties: one case of each.
const TESTS: &[(&str, &[&str])] = &[
    (
        "mover",
        &[
            "bitmap::",
            "fingerprint::tests::a_key",
            "fingerprint::tests::values",
            "index::layout::",
            "memory::owned::",
            "memory::raw::tests::copies",
            "net::pass::",
            "pipeline::judge::",
            "pipeline::load::",
            "pipeline::table::",
            "pipeline::work::tests::a_batch",
            "pipeline::work::tests::hot",
            "pipeline::work::tests::pages",
            "policy::",
            "wire::frame::",
            "wire::hello::",
            "wire::knock::",
        ],
    ),
    (
        "xen-glue",
        &[
            "helper::arguments::",
            "helper::messages::",
            "stream::ferry::",
            "stream::fields::",
            "stream::input::",
            "stream::kind::",
            "stream::page::",
            "stream::xl::",
        ],
    ),
];

/// Runs them, or those with `name` in their names, whatever miri makes of them.
pub(crate) fn run(name: Option<&str>) -> Result<()> {
    nightly::need(&[MIRI, SOURCE])?;
    for (package, tests) in TESTS {
        let mut command = nightly::cargo(HOME)?;
        // One process for all of a package's: the interpreter reads the whole crate before the first of them.
        command.args(["miri", "test", "--locked", "--package", package, "--lib", "--"]);
        // The clock and files are the machine's; a property is tried once.
        command.env("MIRIFLAGS", "-Zmiri-disable-isolation").env("PROPTEST_CASES", "1");
        run::succeed(match name {
            Some(name) => command.arg(name),
            None => command.args(*tests),
        })?;
    }
    Ok(())
}
