//! `pageferry`: moves running guests between hosts, and leaves behind what the other host can fetch for itself.

#![forbid(unsafe_code)]

mod cli;
mod console;
mod demo;
mod doctor;
mod failure;
mod frozen;
mod guest;
mod image;
mod index;
mod layout;
mod lockdown;
mod machine;
mod manual;
mod metrics;
mod migrate;
mod plan;
mod report;
mod results;
mod signals;
mod state;
mod status;
mod stream;
mod told;
mod units;
mod words;
mod xen;

use std::process::ExitCode;

use clap::Parser;

use cli::{Cli, Command, GuestCommand};
use console::Console;
use failure::Failure;

fn main() -> ExitCode {
    let cli = Cli::parse();
    console::log_to_stderr(cli.shared.verbose);
    lockdown::no_core_dumps();
    let console = Console::new(&cli.shared);
    // What a guest's process complains of is quoted by the one that started it.
    let quoted = matches!(cli.command, Command::Guest { command: GuestCommand::Run });
    match demo::lease::hold().and_then(|()| dispatch(cli.command, &console)) {
        Ok(code) => code,
        Err(failure) => {
            match failure.message.as_str() {
                "" => {}
                message if quoted => eprintln!("{message}"),
                message => console.complain(message),
            }
            ExitCode::from(failure.class.code())
        }
    }
}

fn dispatch(command: Command, console: &Console) -> Result<ExitCode, Failure> {
    let outcome = match command {
        Command::Bench { arguments } => return Ok(measure(arguments)),
        Command::Demo(args) => demo::run(&args, console),
        Command::Send(args) => migrate::send::run(&args, console),
        Command::Receive(args) => migrate::receive::run(&args, console),
        Command::Plan(args) => plan::run(&args, console),
        Command::Status { wait } => status::run(wait, console),
        Command::Metrics(args) => metrics::run(&args, console),
        Command::Resume(args) => migrate::resume::run(&args, console),
        Command::Resolve(args) => migrate::resolve::run(&args, console),
        Command::Guest { command } => guest::run(command, console),
        Command::Index { command } => index::run(&command, console),
        Command::Xen { command } => xen::run(&command, console),
        Command::Stream { command } => stream::run(&command, console),
        Command::Image { path, size, content, from } => {
            image::run(&path, size.0, content.map(|size| size.0), &from, console)
        }
        Command::Doctor { path } => doctor::run(&path, console),
        Command::Completions { shell } => manual::completions(shell, console),
        Command::Man { directory } => manual::man(directory.as_deref(), console),
        Command::Help { topic } => manual::help(&topic, console),
    };
    outcome.map(|()| ExitCode::SUCCESS)
}

/// The harness, which has a command line, a report and an exit code of its own.
fn measure(arguments: Vec<String>) -> ExitCode {
    let called = std::iter::once("pageferry bench".to_owned()).chain(arguments);
    bench::command::run(called).unwrap_or_else(|error| error.exit())
}
