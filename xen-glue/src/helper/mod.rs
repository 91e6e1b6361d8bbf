//! The program in `libxl-save-helper`'s place: libxl starts it for every save and restore, and whatever sits on libxl
//! (`xl`, libvirt) uses it without knowing.
//!
//! ```text
//!   xl, libvirt
//!     | argv, control pipes on 0 and 1, the stream on another descriptor
//!   front    a thin process: passes messages on, minds signals              (front)
//!     | socket
//!   worker   in a session of its own: the engine, mappings, hypercalls      (worker, session)
//!     | started by a restore whose guest is to run before all of it is there
//!   standby  takes the worker's place if it is killed behind that           (standby)
//! ```
//!
//! Source: `tools/libs/light/libxl_save_helper.c`, `libxl_save_callout.c` and `libxl_save_msgs_gen.pl` of Xen; the same
//! from 4.17 to 4.20. The contract: a restore sends its results and then "complete", a save "complete", failed ones
//! too, and the program exits with 0; nothing behind the stream's END is read; the stream's descriptor is never made
//! non-blocking; libxl goes on when the program has exited.
#![forbid(unsafe_code)]

pub mod arguments;
mod engine;
mod front;
mod hypervisor;
mod lingering;
mod messages;
mod note;
mod session;
mod standby;
mod stock;
mod worker;

use std::ffi::OsString;
use std::os::fd::RawFd;
use std::process::ExitCode;

pub use engine::{Engine, Failure, Outcome};
pub use hypervisor::Hypervisor;
pub use messages::{Level, Message, Note, Passed};
pub use note::Noted;
pub use session::Session;
pub use stock::{DIVERTED, HELPER, OVERRIDE};

/// The name under which lines of the program itself, not the engine, reach libxl's log.
pub const PROGRAM: &str = "pageferry-save-helper";
/// The first argument of a worker, before its socket's number and libxl's arguments.
const WORKER_ARGUMENT: &str = "--worker";
/// Signals that end a save or restore.
const ENDING: [i32; 3] =
    [signal_hook::consts::SIGTERM, signal_hook::consts::SIGINT, signal_hook::consts::SIGHUP];

/// The program: front or worker, as its arguments say. Exits with 2 if it was not libxl that called it.
#[must_use]
pub fn main(engine: &dyn Engine) -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    if let [first, socket, rest @ ..] = arguments.as_slice()
        && first == WORKER_ARGUMENT
    {
        let socket = socket.to_str().and_then(|socket| socket.parse::<RawFd>().ok());
        return match (socket, arguments::parse(rest)) {
            (Some(socket), Ok(invocation)) => worker::run(engine, socket, invocation),
            _ => ExitCode::from(2),
        };
    }
    if let [first, rest @ ..] = arguments.as_slice()
        && first == crate::standby::ARGUMENT
    {
        return standby::run(rest);
    }
    match arguments::parse(&arguments) {
        Ok(invocation) if invocation.plain => front::run(engine, &invocation, &arguments),
        Ok(_) => refuse(&stock::become_it(&arguments)),
        Err(error) => refuse(&error),
    }
}

/// Says on standard error, which is libxl's, why nothing was done.
fn refuse(why: &str) -> ExitCode {
    eprintln!("{PROGRAM}: {why}");
    ExitCode::from(2)
}

/// The number libxl knows an error by.
fn errno_of(errno: rustix::io::Errno) -> i32 {
    errno.raw_os_error()
}
