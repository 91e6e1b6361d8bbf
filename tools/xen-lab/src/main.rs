//! `cargo xtask xen-lab ...`: see the library.

#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    match xen_lab::cli::Cli::parse().run() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("FAILED: {error:#}");
            ExitCode::FAILURE
        }
    }
}
