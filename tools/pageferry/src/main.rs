//! `pageferry`: moves running guests between hosts, and leaves behind what the other host can fetch for itself.

#![forbid(unsafe_code)]

mod cli;
mod console;
mod doctor;
mod failure;
mod guest;
mod layout;
mod manual;
mod signals;
mod units;

use std::process::ExitCode;

use clap::Parser;

use cli::{Cli, Command};
use console::Console;
use failure::Outcome;

fn main() -> ExitCode {
    let cli = Cli::parse();
    console::log_to_stderr(cli.shared.verbose);
    let console = Console::new(&cli.shared);
    match dispatch(cli.command, &console) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            if !failure.message.is_empty() {
                console.complain(&failure.message);
            }
            ExitCode::from(failure.class.code())
        }
    }
}

fn dispatch(command: Command, console: &Console) -> Outcome {
    match command {
        Command::Guest { command } => guest::run(command, console),
        Command::Doctor { path } => doctor::run(&path, console),
        Command::Completions { shell } => manual::completions(shell, console),
        Command::Man { directory } => manual::man(directory.as_deref(), console),
        Command::Help { topic } => manual::help(&topic, console),
    }
}
