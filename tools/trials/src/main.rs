//! Migrations of real processes under faults and under load, beside the simulator's. Each guest checks all of its memory
//! itself; what is tried here is whether there is exactly one guest at the end, right in every page, and nothing left.
//!
//! Started by `cargo xtask faults` and `cargo xtask load`, in mount and process namespaces of its own: whatever ends it, nothing
//! of it stays.

#![forbid(unsafe_code)]
#![expect(clippy::print_stdout, reason = "a command-line program that reports what it does")]

mod ear;
mod faults;
mod files;
mod load;
mod settle;
mod weather;
mod world;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Migrations of real processes under faults and under load.
#[derive(Parser)]
struct Cli {
    /// The pageferry to try
    #[arg(long)]
    program: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Every fault in every phase and every mode
    Faults(faults::Arguments),
    /// One guest to and fro, again and again, with random faults
    Row(load::row::Arguments),
    /// Many guests at once in both directions
    Many(load::many::Arguments),
    /// One guest beside a flood of strangers, and alone, in turns
    Flood(load::flood::Arguments),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let outcome = match cli.command {
        Command::Faults(arguments) => faults::run(&cli.program, &arguments),
        Command::Row(arguments) => load::row::run(&cli.program, &arguments),
        Command::Many(arguments) => load::many::run(&cli.program, &arguments),
        Command::Flood(arguments) => load::flood::run(&cli.program, &arguments),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("FAILED: {error:#}");
            ExitCode::FAILURE
        }
    }
}
