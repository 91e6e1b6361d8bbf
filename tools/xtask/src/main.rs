//! The project's own commands: `cargo xtask ci` (everything a change must pass), `cargo xtask bench` (the comparison
//! harness, in a release build) and `cargo xtask xen-lab` (two Xen hosts under emulation).

#![forbid(unsafe_code)]
#![expect(clippy::print_stdout, reason = "a command-line program that reports what it does")]

mod bench_step;
mod ci;
mod coverage;
mod dependencies;
mod fuzz;
mod lab_step;
mod lexer;
mod miri;
mod models;
mod mutants;
mod nightly;
mod package;
mod rules;
mod run;
mod sanitize;
mod seeds;
mod setup;
mod tests_step;
mod trials;

use std::process::{ExitCode, Stdio};

use anyhow::Result;
use clap::{Parser, Subcommand};

/// The project's own commands.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Format, lints, dependency check, docs, the Xen lab's short tier and every test; installs what that needs.
    Ci {
        /// Install nothing: fail where a tool is missing, and say how to get it.
        #[arg(long)]
        no_install: bool,
        /// Only these steps, by the beginning of their names: format, project, dependencies, lints, documentation,
        /// command-line, package, fuzzers, models, faults, benchmarks, xen lab, tests
        #[arg(long, value_name = "STEP,...", value_delimiter = ',')]
        only: Vec<String>,
    },
    /// The comparison harness, in a release build; arguments go to it as they are.
    Bench {
        /// Arguments for the harness.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Every fault, at every moment of a migration, in every mode, on real processes; takes root
    Faults {
        /// `--tier full` for all of it, `--jobs N`, words that a case's name (fault/moment/mode) must contain.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Real processes under load: `row` (one guest to and fro a thousand times, with random faults), `many` (eight guests at
    /// once in both directions, for ten minutes) or `flood` (one beside a hundred thousand strangers, and alone); takes root
    Load {
        /// `row`, `many` or `flood`, and its arguments; --help tells them.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
        arguments: Vec<String>,
    },
    /// Feeds every decoder of bytes from outside with what libFuzzer makes up; takes a nightly compiler and cargo-fuzz.
    Fuzz {
        /// Only the decoder of that name.
        name: Option<String>,
        /// How long each.
        #[arg(long, default_value_t = 60)]
        seconds: u64,
        /// Feed nothing new: a table of what of each decoder's code the corpora reach.
        #[arg(long, conflicts_with = "seconds")]
        coverage: bool,
    },
    /// A Debian package in target/package, of a release build.
    Package {
        /// Install, use, upgrade, remove and purge it in a clean root as well; takes root and a Debian mirror.
        #[arg(long)]
        check: bool,
    },
    /// Plants bugs that break the invariants, one at a time, in a copy of the tree: each must make its test fail.
    Mutants {
        /// Only those with this in their names.
        name: Option<String>,
    },
    /// Models of everything lock-free, under loom: every interleaving, and what weak orderings let a load return.
    Models {
        /// Only those with this in their names.
        name: Option<String>,
        /// How often threads may be interrupted in a run; the number of runs grows fast with it.
        #[arg(long, default_value_t = 4)]
        preemptions: u32,
    },
    /// Many seeds of the simulator in one go, in an optimised build that keeps every assertion.
    Seeds {
        /// Migrations of one guest, a seed each.
        #[arg(long, default_value_t = 100_000)]
        migrations: u64,
        /// Migrations of several guests at once, a seed for all of them.
        #[arg(long, default_value_t = 2_000)]
        fleets: u64,
        /// The first seed of either.
        #[arg(long, default_value_t = 0)]
        first: u64,
    },
    /// The tests that miri can interpret; takes a nightly compiler with miri and rust-src.
    Miri {
        /// Those with this in their names instead, whatever miri makes of them.
        name: Option<String>,
    },
    /// The tests under the address or the thread sanitizer; takes a nightly compiler with rust-src.
    Sanitize {
        /// Which.
        sanitizer: sanitize::Sanitizer,
        /// Only tests with this in their names.
        name: Option<String>,
    },
    /// Two Xen hosts under emulation: up, run, shell, test, down; arguments go to it as they are.
    #[command(disable_help_flag = true)]
    XenLab {
        /// Arguments for the lab; --help tells them.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
}

fn package(check: bool) -> Result<()> {
    let package = package::build(package::Profile::Release)?;
    println!("{}", package.display());
    if check {
        println!("{}", package::check::run(&package)?);
    }
    Ok(())
}

fn main() -> ExitCode {
    let outcome: Result<()> = match Cli::parse().command {
        Command::Ci { no_install, only } => ci::run(no_install, &only),
        Command::Fuzz { name, coverage: true, .. } => coverage::run(name.as_deref()),
        Command::Fuzz { name, seconds, .. } => fuzz::run(name.as_deref(), seconds),
        Command::Faults { arguments } => trials::run(&[vec!["faults".to_owned()], arguments].concat()),
        Command::Package { check } => package(check),
        Command::Load { arguments } => trials::run(&arguments),
        Command::Mutants { name } => mutants::run(name.as_deref()),
        Command::Seeds { migrations, fleets, first } => seeds::run(first, migrations, fleets),
        Command::Sanitize { sanitizer, name } => sanitize::run(sanitizer, name.as_deref()),
        Command::Miri { name } => miri::run(name.as_deref()),
        Command::Models { name, preemptions } => models::run(name.as_deref(), preemptions),
        Command::Bench { arguments } => {
            run::cargo(["run", "--release", "--quiet", "--package", "bench", "--"])
                .and_then(|mut command| run::succeed(command.args(arguments)))
        }
        Command::XenLab { arguments } => {
            // Its own exit code is the command's that it ran: nothing is added to it.
            return match run::cargo(["run", "--quiet", "--package", "xen-lab", "--"])
                .and_then(|mut command| run::exit_code(command.args(arguments).stdin(Stdio::inherit())))
            {
                Ok(code) => code,
                Err(error) => {
                    eprintln!("FAILED: {error:#}");
                    ExitCode::FAILURE
                }
            };
        }
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\nFAILED: {error:#}");
            ExitCode::FAILURE
        }
    }
}
