//! `cargo xtask ci`: the steps, in order. The first failure ends it. Tests come last, so that their runner's
//! summary is the last thing on the screen.

use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};

use crate::{
    bench_step, dependencies, fuzz, lab_step, models, package, rules, run, setup, tests_step, trials,
};

/// How the sentence of a step that did not run begins.
const SKIPPED: &str = "SKIPPED: ";

/// Says that `what` is left out, and why; the line is a step's closing sentence, and shown again behind the tests.
pub(crate) fn skipped(what: &str, why: &str) -> String {
    let line = format!("{SKIPPED}{what}: {why}");
    println!("{line}");
    line
}

/// What a step does; the sentence it returns goes into its closing line.
type Step = fn() -> Result<String>;

/// Runs every step, or only those whose names begin with one of `only`.
pub(crate) fn run(no_install: bool, only: &[String]) -> Result<()> {
    let begun = Instant::now();
    let wanted = |name: &str| only.is_empty() || only.iter().any(|word| name.starts_with(word.as_str()));
    let steps: [(&str, Step); 12] = [
        ("format", format),
        ("project rules", rules::run),
        ("dependencies", dependencies::run),
        ("lints", lints),
        ("documentation", documentation),
        ("command-line documentation", command_line),
        ("package", package::check::step),
        ("fuzzers", fuzz::step),
        ("models", models::step),
        ("faults", trials::step),
        ("benchmarks", bench_step::run),
        ("xen lab", if no_install { lab_step::leave_out } else { lab_step::run }),
    ];
    if let Some(word) = only.iter().find(|word| {
        !steps.iter().map(|step| step.0).chain(["tests"]).any(|name| name.starts_with(word.as_str()))
    }) {
        bail!("there is no step `{word}`; the steps are {}, tests", steps.map(|step| step.0).join(", "));
    }
    section("set-up", || setup::run(!no_install))?;
    let mut left_out = Vec::new();
    for (name, step) in steps.into_iter().filter(|step| wanted(step.0)) {
        let said = section(name, step)?;
        left_out.extend(said.strip_prefix(SKIPPED).map(str::to_owned));
    }
    if !wanted("tests") {
        return Ok(());
    }
    let so_far = begun.elapsed().as_secs_f64();
    println!("\n== tests (everything before them took {so_far:.0} s)");
    tests_step::run(left_out).context("tests")
}

/// A step between its heading and its closing line. Returns the sentence in that.
fn section(name: &str, step: impl FnOnce() -> Result<String>) -> Result<String> {
    println!("\n== {name}");
    let begun = Instant::now();
    let said = step().with_context(|| name.to_owned())?;
    println!("-- {name}: {said} ({:.1} s)", begun.elapsed().as_secs_f64());
    Ok(said)
}

fn format() -> Result<String> {
    run::succeed(&mut run::cargo(["fmt", "--all", "--", "--check"])?)
        .context("some files are not formatted; `cargo fmt --all` does it")?;
    Ok("clean".into())
}

fn lints() -> Result<String> {
    run::succeed(&mut run::cargo([
        "clippy",
        "--quiet",
        "--locked",
        "--workspace",
        "--all-targets",
        "--",
        "-D",
        "warnings",
    ])?)?;
    Ok("no warning in any target".into())
}

fn documentation() -> Result<String> {
    let mut doc = run::cargo(["doc", "--quiet", "--locked", "--workspace", "--no-deps"])?;
    run::succeed(doc.env("RUSTDOCFLAGS", "-D warnings"))?;
    let mut examples = run::cargo(["test", "--quiet", "--locked", "--workspace", "--doc"])?;
    run::succeed(&mut examples)?;
    Ok("rustdoc without a warning, its examples run".into())
}

/// The man page and the shell completions are made from the same definitions as the program: they must come out.
fn command_line() -> Result<String> {
    let pageferry = |arguments: &[&str]| -> Result<String> {
        // No package is named, as in the README's commands: they must not be ambiguous.
        let mut command = run::cargo(["run", "--quiet", "--locked", "--"])?;
        run::output(command.args(arguments))
    };
    let man = pageferry(&["man"])?;
    ensure!(man.contains(".TH pageferry 1"), "`pageferry man` printed no man page");
    for shell in ["bash", "zsh", "fish"] {
        let script = pageferry(&["completions", shell])?;
        ensure!(script.contains("pageferry"), "`pageferry completions {shell}` printed no completions");
    }
    Ok(format!("a man page of {} lines, completions for bash, zsh and fish", man.lines().count()))
}
