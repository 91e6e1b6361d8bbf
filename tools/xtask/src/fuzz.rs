//! The fuzzers: `cargo xtask fuzz` for as long as asked for, and a step of `cargo xtask ci` for some seconds each. What
//! their corpora hold is tried by a test as well (`tools/fuzz-entries/tests/corpus.rs`), on every compiler.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};

use crate::ci::skipped;
use crate::{nightly, run};

/// Where they stand.
pub(crate) const HOME: &str = "tools/fuzz";
/// Seconds a decoder in the step.
const STEP_SECONDS: u64 = 6;
/// Memory a fuzzer may take, in MiB: decoders promise to take little.
const MEMORY_MIB: u32 = 1024;
/// Longest input, in bytes: longer than any control message, as long as a small stream or index.
const LENGTH_MAX: u32 = 66_000;

/// Runs every fuzzer, or the one called `name`.
pub(crate) fn run(name: Option<&str>, seconds: u64) -> Result<()> {
    let names = names()?;
    let chosen: Vec<_> = names.iter().filter(|own| name.is_none_or(|name| name == own.as_str())).collect();
    ensure!(!chosen.is_empty(), "there is no such fuzzer; they are {}", names.join(", "));
    for name in chosen {
        println!("fuzzing {name} for {seconds} s");
        // What it finds worth keeping goes into the first directory; seeds are only read.
        let found = found(name)?;
        fs::create_dir_all(&found).with_context(|| format!("cannot make {}", found.display()))?;
        let mut command = nightly::cargo("fuzz")?;
        command
            .args(["fuzz", "run", "--fuzz-dir", HOME, name.as_str()])
            .arg(&found)
            .arg(format!("{HOME}/corpus/{name}"))
            .arg("--")
            .args([
                format!("-max_total_time={seconds}"),
                format!("-rss_limit_mb={MEMORY_MIB}"),
                format!("-max_len={LENGTH_MAX}"),
                "-timeout=10".to_owned(),
                "-print_final_stats=1".to_owned(),
                "-verbosity=1".to_owned(),
            ]);
        run::succeed(&mut command).with_context(|| {
            format!(
                "{name}: what it fell over is in {HOME}/artifacts/{name}; into its corpus with it once mended"
            )
        })?;
    }
    Ok(())
}

/// Where what fuzzing `name` found worth keeping is.
pub(crate) fn found(name: &str) -> Result<PathBuf> {
    Ok(run::root()?.join("target/fuzz-corpus").join(name))
}

/// The same, shortly, where the tools are there.
pub(crate) fn step() -> Result<String> {
    if let Some(missing) = missing() {
        return Ok(skipped("the fuzzers", &format!("{missing} (their corpora are tried by the tests)")));
    }
    run(None, STEP_SECONDS)?;
    Ok(format!("{} decoders, {STEP_SECONDS} s each, none fell", names()?.len()))
}

fn missing() -> Option<String> {
    if !run::in_path("cargo-fuzz") && !cargo_home_has("cargo-fuzz") {
        return Some("cargo-fuzz is not there; `cargo install cargo-fuzz` gets it".to_owned());
    }
    nightly::missing(&[])
}

fn cargo_home_has(program: &str) -> bool {
    std::env::var_os("CARGO_HOME")
        .is_some_and(|home| std::path::Path::new(&home).join("bin").join(program).is_file())
}

/// The fuzzers' names.
pub(crate) fn names() -> Result<Vec<String>> {
    let directory = run::root()?.join(HOME).join("fuzz_targets");
    let mut names = Vec::new();
    for file in fs::read_dir(&directory).with_context(|| format!("cannot read {}", directory.display()))? {
        names.extend(file?.path().file_stem().and_then(|stem| stem.to_str()).map(str::to_owned));
    }
    names.sort();
    Ok(names)
}
