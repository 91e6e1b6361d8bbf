//! `cargo xtask models`: the models of what is lock-free (`mover/src/loom_models`), under loom, and a step of `cargo xtask ci`
//! with fewer interruptions of a thread.

use anyhow::Result;

use crate::run;

/// Interruptions of a thread in the step: what is found is nearly always found with two.
const STEP_PREEMPTIONS: u32 = 2;

/// Runs them, or those whose names contain `name`, with at most `preemptions` interruptions.
pub(crate) fn run(name: Option<&str>, preemptions: u32) -> Result<()> {
    let mut command = run::cargo([
        "nextest",
        "run",
        "--locked",
        "--cargo-quiet",
        "--package",
        "mover",
        "--features",
        "loom",
        "--no-fail-fast",
        "--no-tests=fail",
    ])?;
    let filter = match name {
        Some(name) => format!("test(/^loom_models::/) & test({name})"),
        None => "test(/^loom_models::/)".to_owned(),
    };
    command.args(["--filterset", &filter]).env("LOOM_MAX_PREEMPTIONS", preemptions.to_string());
    run::succeed(&mut command)
}

/// The same, as a step.
pub(crate) fn step() -> Result<String> {
    run(None, STEP_PREEMPTIONS)?;
    Ok(format!("each holds with every thread interrupted up to {STEP_PREEMPTIONS} times"))
}
