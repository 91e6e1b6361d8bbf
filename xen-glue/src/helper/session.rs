//! The worker's side of the conversation with libxl, which the front passes on.
#![forbid(unsafe_code)]

use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::Receiver;

use mover::journal::Role;
use mover::process::launch;
use mover::runtime::{Runtime, Threads};
use mover::wire::hello::MigrationId;

use super::arguments::Invocation;
use super::messages::{Level, Message, STATIC_DATA_DONE, SUSPEND, SWITCH_QEMU_LOGDIRTY};
use super::note::Noted;
use crate::ferry::Lingering;

/// Who speaks in the engine's lines: libxc, whose place it has.
const CONTEXT: &str = "xc";

/// A conversation about one domain. Asking blocks until libxl has answered, or the front is gone.
#[derive(Debug)]
pub struct Session {
    invocation: Invocation,
    out: UnixStream,
    answers: Receiver<i32>,
    left: Option<Lingering>,
    noted: Option<Noted>,
}

impl Session {
    pub(crate) fn new(invocation: Invocation, out: UnixStream, answers: Receiver<i32>) -> Self {
        Self { invocation, out, answers, left: None, noted: None }
    }

    /// Has the guest suspended; false if libxl failed to.
    ///
    /// # Errors
    /// libxl is gone, or does not offer it.
    pub fn suspend(&mut self) -> io::Result<bool> {
        self.offered(SUSPEND)?;
        Ok(self.ask(&Message::Suspend)? != 0)
    }

    /// Has the device model log the pages it writes, or stop; false if libxl failed to. libxl does nothing, and says
    /// so with success, for guests without one.
    ///
    /// # Errors
    /// libxl is gone.
    pub fn switch_qemu_logdirty(&mut self, enable: bool) -> io::Result<bool> {
        if self.offered(SWITCH_QEMU_LOGDIRTY).is_err() {
            return Ok(true);
        }
        let domain = self.invocation.domain.0;
        Ok(self.ask(&Message::SwitchQemuLogdirty { domain, enable })? == 0)
    }

    /// Says that what the guest can't change is set; `missing` is 1 without a CPUID policy, 2 without an MSR policy,
    /// which libxl then makes up. False if it failed to.
    ///
    /// # Errors
    /// libxl is gone.
    pub fn static_data_done(&mut self, missing: u32) -> io::Result<bool> {
        if self.offered(STATIC_DATA_DONE).is_err() {
            return Ok(true);
        }
        Ok(self.ask(&Message::StaticDataDone { missing })? == 0)
    }

    /// A line for libxl's log. That it can't be delivered is found by the next question.
    pub fn log(&mut self, level: Level, text: &str) {
        let _ = self.tell(&Message::Log { level, errno: None, context: CONTEXT, text });
    }

    /// How far it is, for libxl's log; with a `total` of 0 a line without a percentage.
    pub fn progress(&mut self, what: &str, done: u64, total: u64) {
        let _ = self.tell(&Message::Progress { context: CONTEXT, what, done, total });
    }

    /// Notes from now on, for `pageferry status`, that this is an end of a migration of `guest`; an id of its own, until lanes
    /// bring the one that both ends have. Where that can't be done, it is only not shown there.
    pub fn note(&mut self, role: Role, guest: &str) {
        let mut id = MigrationId::default();
        Threads::new().random(&mut id.0);
        match Noted::begin(&launch::notes_dir(), id, role, guest) {
            Ok(noted) => self.noted = Some(noted),
            Err(error) => {
                self.log(Level::Detail, &format!("`pageferry status` will not show this: {error}"));
            }
        }
    }

    /// What is noted, if anything is.
    pub fn noted(&mut self) -> Option<&mut Noted> {
        self.noted.as_mut()
    }

    pub(crate) fn take_noted(&mut self) -> Option<Noted> {
        self.noted.take()
    }

    /// What is to go on when libxl has been told that it is done.
    pub fn linger(&mut self, left: Lingering) {
        self.left = Some(left);
    }

    /// Nothing more is said.
    pub(crate) fn hang_up(&self) {
        // A front that is gone has hung up itself.
        let _ = self.out.shutdown(std::net::Shutdown::Both);
    }

    pub(crate) fn take_left(&mut self) -> Option<Lingering> {
        self.left.take()
    }

    pub(crate) fn tell(&mut self, message: &Message<'_>) -> io::Result<()> {
        self.out.write_all(&message.encode())
    }

    fn ask(&mut self, message: &Message<'_>) -> io::Result<i32> {
        self.tell(message)?;
        let gone = || io::Error::new(io::ErrorKind::ConnectionAborted, "the save helper has been ended");
        self.answers.recv().map_err(|_| gone())
    }

    fn offered(&self, number: u16) -> io::Result<()> {
        if self.invocation.callbacks & (1 << number) != 0 {
            return Ok(());
        }
        Err(io::Error::new(io::ErrorKind::Unsupported, format!("libxl does not answer message {number}")))
    }
}
