//! The dependency check: licences, sources, banned and doubled crates (deny.toml); security advisories where their
//! database can be had.

use std::time::Duration;

use anyhow::Result;

use crate::run;

/// How long fetching the advisory database may take.
const FETCH_LIMIT: Duration = Duration::from_secs(60);

/// Runs the checks.
pub(crate) fn run() -> Result<String> {
    let deny = || run::cargo(["deny", "--locked", "--log-level", "error"]);
    run::succeed(deny()?.args(["check", "--hide-inclusion-graph", "bans", "licenses", "sources"]))?;
    match run::output_within(deny()?.args(["fetch", "db"]), FETCH_LIMIT) {
        Ok(_) => {
            run::succeed(deny()?.args(["check", "--disable-fetch", "advisories"]))?;
            Ok("bans, licences, sources and advisories hold".into())
        }
        Err(error) => {
            println!("NOT CHECKED: security advisories: their database could not be fetched ({error:#})");
            Ok("bans, licences and sources hold; advisories NOT CHECKED".into())
        }
    }
}
