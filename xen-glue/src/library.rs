//! What stands between the C functions ([`crate::abi`]'s `entry`) and save and restore: the caller's callbacks as a
//! toolstack, its flags as options, progress in libxenguest's words.
//!
//! Everything runs on the caller's thread. A write to a stream whose reader has gone is an error here, not the end of
//! the process: the log of written pages has to be turned off.
#![forbid(unsafe_code)]

use std::any::Any;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::AtomicBool;

use crate::abi::DomainId;
use crate::abi::process::BrokenPipes;
use crate::domain::Frames;
use crate::restore::{self, RestoreError, Wiring};
use crate::save::{self, Observation, Options, SaveError, Verdict};
use crate::settings::Settings;

/// `XCFLAGS_LIVE`.
const LIVE: u32 = 1;
/// `XCFLAGS_DEBUG`.
const DEBUG: u32 = 2;

/// Why a function returns -1.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Failure {
    /// What `errno` is set to.
    pub(crate) errno: i32,
    /// A sentence, for the caller's log.
    pub(crate) message: String,
}

impl Failure {
    fn new(errno: i32, message: impl Into<String>) -> Self {
        Self { errno, message: message.into() }
    }

    pub(crate) fn checkpointed() -> Self {
        let message = "this stream is Remus' or COLO's, which is left to libxenguest, and this process has none. Link it \
                       behind pageferry_xen";
        Self::new(libc::EOPNOTSUPP, message)
    }

    pub(crate) fn no_callbacks() -> Self {
        Self::new(libc::EINVAL, "a save needs callbacks to have the guest suspended, and was given none")
    }

    pub(crate) fn no_stream(fd: i32) -> Self {
        Self::new(libc::EBADF, format!("the stream's descriptor is {fd}, which is none"))
    }

    pub(crate) fn panicked(panic: &(dyn Any + Send)) -> Self {
        let what = panic.downcast_ref::<String>().map(String::as_str);
        let what = what.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message");
        Self::new(libc::EIO, format!("internal error: {what}. Please report it; the guest is left as it was"))
    }
}

impl From<SaveError> for Failure {
    fn from(error: SaveError) -> Self {
        Self::new(error.errno(), error.to_string())
    }
}

impl From<RestoreError> for Failure {
    fn from(error: RestoreError) -> Self {
        Self::new(error.errno(), error.to_string())
    }
}

/// Who has called.
pub(crate) trait Caller {
    /// Has the guest suspended; none if the caller offers no way to.
    fn suspend(&mut self) -> Option<bool> {
        None
    }
    /// Has the device model log what it writes; none if the caller offers no way to.
    fn device_log(&mut self, _on: bool) -> Option<bool> {
        None
    }
    /// The caller's own policy, if it has one, after a round and `written` pages.
    fn judge(&mut self, _seen: &Observation, _written: u64) -> Option<Verdict> {
        None
    }
    /// Is told what the guest can't change is set, and what of it the stream had none of.
    fn static_data_done(&mut self, _missing: u32) -> bool {
        true
    }
    /// How far it is; with a `total` of 0 a line by itself.
    fn progress(&mut self, what: &str, done: u64, total: u64);
    /// Something is off that does not end the call.
    fn complain(&mut self, text: &str);
}

/// A domain of this number.
pub(crate) fn domain(number: u32) -> Result<DomainId, Failure> {
    match u16::try_from(number) {
        Ok(found) if found < DomainId::FIRST_RESERVED => Ok(DomainId(found)),
        _ => Err(Failure::new(libc::ESRCH, format!("there is no domain {number}"))),
    }
}

/// `xc_domain_save`, of a plain stream.
pub(crate) fn save(dom: u32, to: BorrowedFd<'_>, flags: u32, caller: &mut dyn Caller) -> Result<(), Failure> {
    let id = domain(dom)?;
    if flags & !(LIVE | DEBUG) != 0 {
        let message = format!("the flags are {flags:#x}; only live (1) and debug (2) are known here");
        return Err(Failure::new(libc::EINVAL, message));
    }
    let settings = Settings::load().map_err(|error| Failure::new(libc::EINVAL, error.to_string()))?;
    let live = flags & LIVE != 0;
    let options = Options {
        live,
        verify: flags & DEBUG != 0,
        policy: settings.save_policy(),
        ferry: None,
        frozen: None,
    };
    let _errors = BrokenPipes::as_errors();
    save::domain(id, to, &options, &mut Teller::new(caller, live), &AtomicBool::new(false))?;
    Ok(())
}

/// `xc_domain_restore`, of a plain stream.
pub(crate) fn restore(
    dom: u32,
    from: BorrowedFd<'_>,
    wiring: &Wiring,
    caller: &mut dyn Caller,
) -> Result<Frames, Failure> {
    let id = domain(dom)?;
    let mut teller = Teller::new(caller, false);
    let restored = restore::domain(
        id,
        from,
        wiring,
        &restore::Options::default(),
        &mut teller,
        &AtomicBool::new(false),
    )?;
    if restored.different > 0 {
        let text = format!("verify: {} pages are not what the source has", restored.different);
        teller.caller.complain(&text);
    }
    Ok(restored.frames)
}

/// Asks the caller, and tells it how it goes.
pub(crate) struct Teller<'a> {
    caller: &'a mut dyn Caller,
    live: bool,
    verifying: bool,
    /// Round and percentage told last.
    shown: Option<(u32, u64)>,
}

impl<'a> Teller<'a> {
    pub(crate) fn new(caller: &'a mut dyn Caller, live: bool) -> Self {
        Self { caller, live, verifying: false, shown: None }
    }
}

fn missing(name: &str) -> io::Error {
    io::Error::new(io::ErrorKind::Unsupported, format!("the callback {name} is missing"))
}

impl save::Toolstack for Teller<'_> {
    fn suspend(&mut self) -> io::Result<bool> {
        let suspended = self.caller.suspend().ok_or_else(|| missing("suspend"))?;
        if suspended {
            self.caller.progress("Domain now suspended", 0, 0);
        }
        Ok(suspended)
    }

    fn device_log(&mut self, on: bool) -> io::Result<bool> {
        self.caller.device_log(on).ok_or_else(|| missing("switch_qemu_logdirty"))
    }

    fn judge(&mut self, seen: &Observation, written: u64) -> Option<Verdict> {
        self.caller.judge(seen, written)
    }

    fn report(&mut self, event: &save::Event<'_>) {
        match *event {
            save::Event::Phase(phase @ (save::Phase::Prepare | save::Phase::End)) => {
                self.caller.progress(&phase.to_string(), 0, 0);
            }
            save::Event::Phase(save::Phase::Verify) => (self.verifying, self.shown) = (true, None),
            save::Event::Phase(_)
            | save::Event::Round { .. }
            | save::Event::Lanes(_)
            | save::Event::Engine(_)
            | save::Event::Detail(_) => {}
            save::Event::Frames { round, sent, total } => {
                let now = (round, 100 * sent / total.max(1));
                if self.shown.replace(now) != Some(now) {
                    let what = match (self.verifying, self.live) {
                        (true, _) => "Frames verify".to_owned(),
                        (false, true) => format!("Frames iteration {}", round.saturating_sub(1)),
                        (false, false) => "Frames".to_owned(),
                    };
                    self.caller.progress(&what, sent, total);
                }
            }
            save::Event::Note(text) => self.caller.complain(text),
        }
    }
}

impl restore::Toolstack for Teller<'_> {
    fn static_data_done(&mut self, missing: u32) -> io::Result<bool> {
        Ok(self.caller.static_data_done(missing))
    }

    fn report(&mut self, event: &restore::Event<'_>) {
        if let restore::Event::Note(text) = event {
            self.caller.complain(text);
        }
    }
}
