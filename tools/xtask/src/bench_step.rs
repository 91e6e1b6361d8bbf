//! The benchmarks' short run: the program as it is shipped, between two network namespaces, all four modes. It fails on a
//! wrong page or on something that does not work, never on a figure.

use anyhow::Result;

use crate::ci::skipped;
use crate::{run, setup};

/// Runs it.
pub(crate) fn run() -> Result<String> {
    let obstacle = if !setup::is_root() {
        Some("its links are network namespaces, which take root")
    } else if !run::in_path("fio") {
        Some("it reads against fio, which is not installed (apt-get install fio)")
    } else {
        None
    };
    if let Some(obstacle) = obstacle {
        return Ok(skipped("the benchmarks' short run", obstacle));
    }
    let words = ["run", "--quiet", "--locked", "--release", "--package", "bench", "--", "--quick"];
    let mut command = run::cargo(words)?;
    run::succeed(command.args(["--runs", "1", "--out", "target/bench-quick.md"]))?;
    Ok("every page was right; the figures are above, and with charts in target/bench-quick.html".to_owned())
}
