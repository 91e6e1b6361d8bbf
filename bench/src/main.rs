//! `cargo xtask bench SUITE...`: see the library.

#![forbid(unsafe_code)]
#![expect(clippy::print_stdout, reason = "a command-line program that reports what it measured")]

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::AtomicBool;

use anyhow::{Context as _, Result, bail};
use bench::report::{Report, Verdict};
use bench::suite::{self, Context};
use bench::{machine, worker};
use clap::{Parser, Subcommand};
use mover::process::launch;

/// Measures the engine against plain references and its own limits.
#[derive(Parser)]
#[command(name = "cargo xtask bench", args_conflicts_with_subcommands = true)]
struct Cli {
    /// Suites to run, in this order; `all` is every one of them.
    #[arg(required_unless_present = "list")]
    suites: Vec<String>,
    /// Lists the suites.
    #[arg(long)]
    list: bool,
    /// Runs of each case; the median counts.
    #[arg(long, default_value_t = 7)]
    runs: usize,
    /// Smaller sizes, for a look; figures of it are not comparable with those of a full run.
    #[arg(long)]
    quick: bool,
    /// JSON lines on standard output instead of the table.
    #[arg(long)]
    json: bool,
    /// Writes the table (Markdown) and the JSON lines next to it (.jsonl).
    #[arg(long, value_name = "FILE.md")]
    out: Option<PathBuf>,
    /// Only this workload, in suites that go through all; give it again for more.
    #[arg(long = "workload", value_name = "NAME")]
    workloads: Vec<String>,
    /// Where files to read from disk are made; needs a few GiB and O_DIRECT.
    #[arg(long, value_name = "DIRECTORY", default_value = "target/bench")]
    scratch: PathBuf,
    #[command(subcommand)]
    role: Option<Role>,
}

#[derive(Subcommand)]
enum Role {
    /// One end of a measurement, started by the harness itself.
    #[command(hide = true)]
    Worker {
        /// Which end.
        which: worker::Which,
        /// Bytes of its buffer.
        bytes: usize,
    },
    /// The guest process of a measurement, started by the harness itself.
    #[command(hide = true)]
    Guest,
}

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> Result<ExitCode> {
    match cli.role {
        Some(Role::Worker { which, bytes }) => {
            worker::serve(which, bytes)?;
            return Ok(ExitCode::SUCCESS);
        }
        Some(Role::Guest) => {
            launch::run_spawned(&AtomicBool::new(false))?;
            return Ok(ExitCode::SUCCESS);
        }
        None => {}
    }
    let all = suite::all();
    if cli.list {
        for suite in &all {
            println!("{:12} {}", suite.name(), suite.about());
        }
        return Ok(ExitCode::SUCCESS);
    }
    let wanted: Vec<_> = if cli.suites.iter().any(|name| name == "all") {
        all
    } else {
        let known: Vec<_> = all.iter().map(|suite| suite.name()).collect();
        if let Some(name) = cli.suites.iter().find(|name| !known.contains(&name.as_str())) {
            bail!("there is no suite {name}; there are {}", known.join(", "));
        }
        all.into_iter().filter(|suite| cli.suites.iter().any(|name| name == suite.name())).collect()
    };
    let context = Context::new(cli.runs, cli.quick, cli.workloads, cli.scratch)?;
    let mut report = Report::new(machine::describe(), std::env::args().skip(1).collect());
    for suite in wanted {
        eprintln!("{}: {}", suite.name(), suite.about());
        let rows = suite.run(&context).with_context(|| format!("suite {} did not finish", suite.name()))?;
        report.extend(suite.name(), rows);
    }
    if cli.json {
        print!("{}", report.json_lines()?);
    } else {
        print!("{}", report.markdown());
    }
    if let Some(path) = cli.out {
        fs::write(&path, report.markdown()).with_context(|| format!("cannot write {}", path.display()))?;
        let lines = path.with_extension("jsonl");
        fs::write(&lines, report.json_lines()?)
            .with_context(|| format!("cannot write {}", lines.display()))?;
    }
    let missed = report.rows().any(|row| row.verdict() == Some(Verdict::Missed));
    Ok(if missed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}
