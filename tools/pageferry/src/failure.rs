//! How a command fails: one sentence with its cause, a remedy, and the class of exit code scripts go by.

use std::fmt;
use std::io;

use mover::ExitClass;
use mover::error::{DiskError, GuestError, NetError};

/// Why a command ended without having done its work.
#[derive(Debug)]
pub(crate) struct Failure {
    /// What the process exits with.
    pub(crate) class: ExitClass,
    /// The sentences for standard error; empty where everything has been said.
    pub(crate) message: String,
}

/// What commands return.
pub(crate) type Outcome<T = ()> = Result<T, Failure>;

impl Failure {
    /// One with these sentences.
    pub(crate) fn new(class: ExitClass, message: impl Into<String>) -> Self {
        Self { class, message: message.into() }
    }
    /// A wrong flag, value or file.
    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Self::new(ExitClass::Usage, message)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl From<mover::Error> for Failure {
    fn from(error: mover::Error) -> Self {
        Self::new(error.class(), error.to_string())
    }
}

impl From<GuestError> for Failure {
    fn from(error: GuestError) -> Self {
        mover::Error::from(error).into()
    }
}

impl From<DiskError> for Failure {
    fn from(error: DiskError) -> Self {
        mover::Error::from(error).into()
    }
}

impl From<NetError> for Failure {
    fn from(error: NetError) -> Self {
        mover::Error::from(error).into()
    }
}

/// Turns a system call's error into a failure of the machine's.
pub(crate) trait OrFail<T> {
    /// `doing` as "cannot write to x.html"; `remedy` as a sentence.
    fn or_fail(self, doing: impl FnOnce() -> String, remedy: &str) -> Outcome<T>;
}

impl<T, E: Into<io::Error>> OrFail<T> for Result<T, E> {
    fn or_fail(self, doing: impl FnOnce() -> String, remedy: &str) -> Outcome<T> {
        self.map_err(|error| {
            Failure::new(ExitClass::Machine, format!("{}: {}. {remedy}", doing(), error.into()))
        })
    }
}

/// Every class, with what it means: `pageferry help exit-codes`, and a section of the man page.
pub(crate) const EXIT_CODES: [(u8, &str); 11] = [
    (0, "success"),
    (1, "internal error: a broken invariant, or something nothing below covers; please report it"),
    (2, "usage: a flag, a value or a file given is wrong"),
    (
        3,
        "machine: a kernel feature, a permission, memory, huge pages or disk space is missing; see `pageferry doctor`",
    ),
    (4, "network: no route, refused, cut, stalled"),
    (5, "peer: the other end answered, and refused or spoke another protocol"),
    (6, "disk: an image or its index is missing, shrunk, another one or unreadable"),
    (7, "guest: not there, not in the state it should be in, or writing faster than the link carries"),
    (8, "cancelled by either end; the guest runs on the source"),
    (9, "in doubt: it is not known which end has the guest; `pageferry resolve` settles it"),
    (
        10,
        "mismatch: verification found a page that was not right (the guest was not restarted with it), or a faulty stream",
    ),
];

/// The list as text.
pub(crate) fn exit_codes_text() -> String {
    let lines = EXIT_CODES.map(|(code, meaning)| format!("  {code:>2}  {meaning}"));
    format!("Exit codes:\n{}", lines.join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_class_is_in_the_list() {
        for class in ExitClass::ALL {
            assert!(EXIT_CODES.iter().any(|(code, _)| *code == class.code()), "{class:?}");
        }
    }
}
