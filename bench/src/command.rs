//! The command line of the harness: `cargo xtask bench`, and `pageferry bench` for an installed copy.

#![forbid(unsafe_code)]
#![expect(clippy::print_stdout, reason = "a command-line program that reports what it measured")]

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::AtomicBool;

use anyhow::{Context as _, Result, bail};
use clap::{Parser, Subcommand};
use mover::process::launch;

use crate::buffer::Pages;
use crate::demo::Link;
use crate::report::{Report, Section, Verdict};
use crate::suite::{self, Context, Storage, Suite};
use crate::{machine, page, worker};

/// Measures the engine against plain references and its own limits.
#[derive(Parser)]
#[command(args_conflicts_with_subcommands = true)]
struct Cli {
    /// Suites to run; `all` is every one of them.
    #[arg(required_unless_present_any = ["list", "quick"])]
    suites: Vec<String>,
    /// Lists the suites.
    #[arg(long)]
    list: bool,
    /// Runs of each case; the median counts [default: 7, with --quick 3].
    #[arg(long)]
    runs: Option<usize>,
    /// Smaller sizes, for a look, under five minutes if no suite is named: fails on a wrong page or where something
    /// does not work, never on a figure. Figures of it are not comparable with those of a full run.
    #[arg(long)]
    quick: bool,
    /// JSON lines on standard output instead of the table.
    #[arg(long)]
    json: bool,
    /// Writes the table (Markdown), and next to it the JSON lines (.jsonl) and a page with charts (.html).
    #[arg(long, value_name = "FILE.md")]
    out: Option<PathBuf>,
    /// Only this workload, in suites that go through all; give it again for more.
    #[arg(long = "workload", value_name = "NAME")]
    workloads: Vec<String>,
    /// Over which links the suite `modes` goes; give it again for more.
    #[arg(long = "link", value_name = "LINK", value_enum, default_value = "1gbit")]
    links: Vec<Link>,
    /// Where the guests' disks are in the suite `modes`; give it again for both.
    #[arg(long, value_name = "WHERE", value_enum, default_value = "own")]
    storage: Vec<Storage>,
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
        /// Pages it is made of.
        pages: Pages,
    },
    /// The guest process of a measurement, started by the harness itself.
    #[command(hide = true)]
    Guest,
}

/// Runs the harness with `arguments`, the first of which is what it is called by, and tells errors and figures.
///
/// # Errors
/// What clap says of arguments that are none, help among them; [`clap::Error::exit`] tells it.
pub fn run(arguments: impl IntoIterator<Item = String>) -> Result<ExitCode, clap::Error> {
    let called: Vec<String> = arguments.into_iter().collect();
    let cli = Cli::try_parse_from(&called)?;
    Ok(match measure(cli, called) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    })
}

fn measure(cli: Cli, words: Vec<String>) -> Result<ExitCode> {
    match cli.role {
        Some(Role::Worker { which, bytes, pages }) => {
            worker::serve(which, bytes, pages)?;
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
    let short = cli.quick && cli.suites.is_empty();
    let (names, workloads) = if short {
        (
            owned(&suite::QUICK),
            if cli.workloads.is_empty() { owned(&suite::QUICK_WORKLOADS) } else { cli.workloads },
        )
    } else {
        (cli.suites, cli.workloads)
    };
    let wanted = choose(all, &names)?;
    let runs = cli.runs.unwrap_or(if cli.quick { 3 } else { 7 });
    let context = Context {
        runs: runs.max(1),
        quick: cli.quick,
        workloads,
        links: cli.links,
        storage: cli.storage,
        scratch: cli.scratch,
    }
    .ready()?;
    let mut report = Report::new(machine::describe(), words);
    for suite in wanted {
        eprintln!("{}: {}", suite.name(), suite.about());
        let rows = suite.run(&context).with_context(|| format!("suite {} did not finish", suite.name()))?;
        report.sections.push(Section { suite: suite.name(), about: suite.about(), rows });
    }
    if cli.json {
        print!("{}", report.json_lines()?);
    } else {
        print!("{}", report.markdown());
    }
    if let Some(path) = cli.out {
        let forms = [
            (path.clone(), report.markdown()),
            (path.with_extension("jsonl"), report.json_lines()?),
            (path.with_extension("html"), page::html(&report)),
        ];
        for (path, text) in forms {
            fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        }
    }
    let missed = report.rows().any(|row| row.verdict() == Some(Verdict::Missed));
    Ok(if missed && !cli.quick { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn owned(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

/// The suites of these names.
fn choose(all: Vec<Box<dyn Suite>>, names: &[String]) -> Result<Vec<Box<dyn Suite>>> {
    if names.iter().any(|name| name == "all") {
        return Ok(all);
    }
    let known: Vec<_> = all.iter().map(|suite| suite.name()).collect();
    if let Some(name) = names.iter().find(|name| !known.contains(&name.as_str())) {
        bail!("there is no suite {name}; there are {}", known.join(", "));
    }
    Ok(all.into_iter().filter(|suite| names.iter().any(|name| name == suite.name())).collect())
}
