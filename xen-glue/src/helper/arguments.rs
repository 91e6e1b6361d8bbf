//! The helper's command line, as libxl gives it (`libxl_save_callout.c`, `run_helper`): all decimal.
//!
//! ```text
//!   --save-domain    IOFD RECVFD     DOMID XCFLAGS CBFLAGS STREAMTYPE
//!   --restore-domain IOFD SENDBACKFD DOMID STORE_EVTCHN STORE_DOMID CONSOLE_EVTCHN CONSOLE_DOMID CBFLAGS STREAMTYPE
//! ```
#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::os::fd::RawFd;

use crate::abi::DomainId;

const XCFLAGS_LIVE: u32 = 1;
const XCFLAGS_DEBUG: u32 = 2;
const STREAM_PLAIN: u32 = 0;
const STREAM_MAX: u32 = 2;

/// What the helper is to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Invocation {
    /// Save or restore.
    pub job: Job,
    /// The domain.
    pub domain: DomainId,
    /// The descriptor of the stream.
    pub io_fd: RawFd,
    /// Bit n: libxl answers message n.
    pub callbacks: u32,
    /// Whether the stream is a plain one; Remus' and COLO's are not for us.
    pub plain: bool,
}

/// Save or restore.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Job {
    /// Save the domain into the stream.
    Save {
        /// While it runs.
        live: bool,
        /// Send all memory again for the other end to compare.
        debug: bool,
    },
    /// Restore the domain from the stream.
    Restore {
        /// The event channel port of its store.
        store_port: u32,
        /// The domain that serves its store.
        store_domain: DomainId,
        /// The event channel port of its console.
        console_port: u32,
        /// The domain that serves its console.
        console_domain: DomainId,
    },
}

impl Job {
    /// "save" or "restore".
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Save { .. } => "save",
            Self::Restore { .. } => "restore",
        }
    }
}

/// Reads the arguments behind the program's name.
///
/// # Errors
/// They are not libxl's; a sentence says which one is wrong.
pub fn parse(arguments: &[OsString]) -> Result<Invocation, String> {
    let mut rest = Arguments { all: arguments, at: 1 };
    let mode = arguments.first().and_then(|mode| mode.to_str()).unwrap_or_default();
    let invocation = match mode {
        "--save-domain" => {
            let (io_fd, domain) = rest.common("RECVFD")?;
            let flags = rest.number("XCFLAGS")?;
            if flags & !(XCFLAGS_LIVE | XCFLAGS_DEBUG) != 0 {
                return Err(format!("XCFLAGS are {flags:#x}; only live (1) and debug (2) are known here"));
            }
            let job = Job::Save { live: flags & XCFLAGS_LIVE != 0, debug: flags & XCFLAGS_DEBUG != 0 };
            rest.last(job, domain, io_fd)?
        }
        "--restore-domain" => {
            let (io_fd, domain) = rest.common("SENDBACKFD")?;
            let job = Job::Restore {
                store_port: rest.number("STORE_EVTCHN")?,
                store_domain: rest.domain("STORE_DOMID")?,
                console_port: rest.number("CONSOLE_EVTCHN")?,
                console_domain: rest.domain("CONSOLE_DOMID")?,
            };
            rest.last(job, domain, io_fd)?
        }
        _ => {
            return Err(format!(
                "`{mode}` is neither --save-domain nor --restore-domain. This program is started by libxl, in the place \
                 of libxl-save-helper: set LIBXL_SAVE_HELPER to its path, or `pageferry xen install` it"
            ));
        }
    };
    match arguments.get(rest.at) {
        None => Ok(invocation),
        Some(more) => Err(format!("there is an argument too many, {more:?}")),
    }
}

struct Arguments<'a> {
    all: &'a [OsString],
    at: usize,
}

impl Arguments<'_> {
    fn next<T: std::str::FromStr>(&mut self, name: &str) -> Result<T, String> {
        let text = self.all.get(self.at).ok_or_else(|| format!("{name} is missing"))?;
        self.at += 1;
        let number = text.to_str().and_then(|text| text.parse().ok());
        number.ok_or_else(|| format!("{name} is {text:?}, which is no number it can be"))
    }

    fn number(&mut self, name: &str) -> Result<u32, String> {
        self.next(name)
    }

    fn domain(&mut self, name: &str) -> Result<DomainId, String> {
        let number: u16 = self.next(name)?;
        if number >= DomainId::FIRST_RESERVED {
            return Err(format!("{name} is {number}, which is no domain's"));
        }
        Ok(DomainId(number))
    }

    /// The stream, the back channel, of which plain streams have none, and the domain.
    fn common(&mut self, back: &str) -> Result<(RawFd, DomainId), String> {
        let io_fd: RawFd = self.next("IOFD")?;
        if io_fd <= 2 {
            return Err(format!("IOFD is {io_fd}, which is a standard descriptor"));
        }
        let _: RawFd = self.next(back)?;
        Ok((io_fd, self.domain("DOMID")?))
    }

    fn last(&mut self, job: Job, domain: DomainId, io_fd: RawFd) -> Result<Invocation, String> {
        let callbacks = self.number("CBFLAGS")?;
        let stream = self.number("STREAMTYPE")?;
        if stream > STREAM_MAX {
            return Err(format!("STREAMTYPE is {stream}; 0 (plain), 1 (Remus) and 2 (COLO) are known"));
        }
        Ok(Invocation { job, domain, io_fd, callbacks, plain: stream == STREAM_PLAIN })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Result<Invocation, String> {
        parse(&line.split(' ').map(OsString::from).collect::<Vec<_>>())
    }

    /// Lines seen from libxl 4.17.
    #[test]
    fn libxls_lines_are_understood() {
        let save = parsed("--save-domain 14 11 1 0 136 0").unwrap();
        let job = Job::Save { live: false, debug: false };
        assert_eq!(save, Invocation { job, domain: DomainId(1), io_fd: 14, callbacks: 0x88, plain: true });
        let restore = parsed("--restore-domain 12 -1 2 1 0 2 0 768 0").unwrap();
        let job = Job::Restore {
            store_port: 1,
            store_domain: DomainId(0),
            console_port: 2,
            console_domain: DomainId(0),
        };
        assert_eq!(
            restore,
            Invocation { job, domain: DomainId(2), io_fd: 12, callbacks: 0x300, plain: true }
        );
        let live = parsed("--save-domain 14 -1 7 3 136 0").unwrap();
        assert_eq!(live.job, Job::Save { live: true, debug: true });
        assert!(!parsed("--save-domain 14 -1 7 1 136 2").unwrap().plain);
    }

    #[test]
    fn other_lines_are_refused_with_the_argument_named() {
        for (line, words) in [
            ("", "neither"),
            ("--help", "neither"),
            ("--save-domain 14 11 1 0 136", "STREAMTYPE is missing"),
            ("--save-domain 14 11 1 0 136 0 0", "too many"),
            ("--save-domain 14 11 1 0 136 3", "STREAMTYPE is 3"),
            ("--save-domain 1 11 1 0 136 0", "IOFD is 1"),
            ("--save-domain x 11 1 0 136 0", "IOFD is \"x\""),
            ("--save-domain 14 11 32752 0 136 0", "DOMID is 32752"),
            ("--save-domain 14 11 70000 0 136 0", "DOMID is \"70000\""),
            ("--save-domain 14 11 1 4 136 0", "XCFLAGS are 0x4"),
            ("--restore-domain 12 -1 2 1 0 2", "CONSOLE_DOMID is missing"),
            ("--restore-domain 12 -1 2 -1 0 2 0 768 0", "STORE_EVTCHN is \"-1\""),
        ] {
            let error = parsed(line).unwrap_err();
            assert!(error.contains(words), "{line}: {error}");
        }
    }
}
