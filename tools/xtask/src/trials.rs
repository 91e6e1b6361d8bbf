//! `cargo xtask faults` and `cargo xtask load`: real processes under faults and under load, in mount and process namespaces of
//! their own, so that nothing of them outlives the command, however it ends.

use anyhow::{Result, ensure};

use crate::ci::skipped;
use crate::{run, setup};

/// What is left out where it can't be had.
const WHAT: &str = "faults and load";

/// Runs the trials' program with these arguments.
pub(crate) fn run(arguments: &[String]) -> Result<()> {
    if let Some(why) = missing()? {
        skipped(WHAT, why);
        return Ok(());
    }
    // As tests are built: optimised a little, every assertion in.
    let binaries = ["build", "--quiet", "--profile", "test", "-p", "pageferry", "-p", "trials", "--bins"];
    run::succeed(&mut run::cargo(binaries)?)?;
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or(run::root()?.join("target"), Into::into);
    let mut command = run::command("unshare")?;
    command.args(["--mount", "--propagation", "private", "--pid", "--fork", "--kill-child", "--mount-proc"]);
    // A shell is the first process in there: orphans become its children, and it waits for them.
    command.args(["sh", "-c", "\"$@\"; exit $?", "sh"]).arg(target.join("debug/trials"));
    command.arg("--program").arg(target.join("debug/pageferry")).args(arguments);
    run::succeed(&mut command)
}

/// The short tier of the fault matrix, as a step.
pub(crate) fn step() -> Result<String> {
    if let Some(why) = missing()? {
        return Ok(skipped(WHAT, why));
    }
    run(&["faults".to_owned()])?;
    Ok("one guest each time, right in every page, nothing left".into())
}

/// What this machine lacks for it.
fn missing() -> Result<Option<&'static str>> {
    if !setup::is_root() {
        return Ok(Some("they take root, for namespaces and mounts of their own"));
    }
    ensure!(run::in_path("unshare") && run::in_path("mount"), "unshare and mount come with util-linux");
    if !std::path::Path::new("/dev/fuse").exists() {
        return Ok(Some("there is no /dev/fuse (CONFIG_FUSE_FS), so no disk that fails on demand"));
    }
    if !run::in_path("ip") || !run::in_path("tc") {
        return Ok(Some("ip and tc are missing; apt-get install iproute2"));
    }
    Ok(None)
}
