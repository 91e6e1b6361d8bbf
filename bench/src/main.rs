//! `cargo xtask bench SUITE...`: see the library.

#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    let called = std::iter::once("cargo xtask bench".to_owned()).chain(std::env::args().skip(1));
    bench::command::run(called).unwrap_or_else(|error| error.exit())
}
