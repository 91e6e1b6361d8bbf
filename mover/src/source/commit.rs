//! The guest changes hands, and what follows: the drain, and finding the target again after a cut.
//!
//! The order is what invariant 3 stands on. The guest is given up durably *before* the commit is sent, and the target
//! starts it only on the commit. If the link is lost in between, the guest stays paused here until the target has
//! been reached and has said which it is.

use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use crate::error::{Error, ExitClass, NetError};
use crate::journal::Entry;
use crate::pipeline::control;
use crate::source::migration::{Heard, Hold, Migration, ms};
use crate::units::f64_of;
use crate::wire::control::{Message, Standing};
use crate::wire::hello::{Hello, Purpose};

/// Between two attempts to reach the target again.
const REDIAL: Duration = Duration::from_millis(250);
/// Attempts there must be time for: one that falls into a silence must not use up what is left to the others.
const ATTEMPTS: u32 = 4;
/// What an attempt gets at least, so that a far target is reached even where there is little time.
const ATTEMPT: Duration = Duration::from_secs(1);

impl Migration {
    /// Waits until the target could start the guest, gives it up, and has the target start it.
    pub(super) fn commit(&mut self) -> Result<(), Error> {
        self.wait_for(|m| m.heard.ready)?;
        self.keep_referred()?;
        self.journal.record(Entry::Committed)?;
        self.life.release()?;
        self.hold = Hold::Released;
        let mut told = self.tell(&Message::Commit);
        while !self.heard.started {
            let answered = told.and_then(|()| self.wait_for(|m| m.heard.started || m.discarded()));
            if self.discarded() {
                return self.take_back();
            }
            told = match answered {
                Ok(()) => Ok(()),
                Err(error) if self.config.toolstack => return Err(error),
                Err(error) => Ok(self.reach_again(error)?),
            };
        }
        self.hold = Hold::Theirs;
        Ok(())
    }

    fn discarded(&self) -> bool {
        self.heard.standing == Some(Standing::Discarded)
    }

    /// The target says that it never started the guest and never will: it is ours again.
    fn take_back(&mut self) -> Result<(), Error> {
        self.life.reclaim()?;
        self.hold = Hold::Paused;
        self.journal.record(Entry::Open)?;
        let reason = "it gave the guest up before starting it; the guest goes on at the source".into();
        Err(Error::Peer { reason, class: ExitClass::Peer })
    }

    /// Answers refetches until nothing is outstanding on the target.
    pub(super) fn drain(&mut self) -> Result<(), Error> {
        while let Err(error) = self.wait_for(|m| m.heard.account.is_some()) {
            self.reach_again(error)?;
        }
        self.summary.total_ms = self.at_ms() - self.summary.verify_ms;
        Ok(())
    }

    /// The guest runs on the target and needs nothing from here any more.
    pub(super) fn finish(&mut self) -> Result<(), Error> {
        // If the link goes now, the target notices the end of the connection instead; the outcome is the same.
        let _ = self.tell(&Message::Finished);
        self.life.destroy()?;
        self.journal.close()?;
        let account = self.heard.account.unwrap_or_default();
        let feedback = account.feedback;
        let sent = &self.sending.sent;
        let summary = &mut self.summary;
        summary.rounds = self.rounds;
        summary.pages_zero = sent.zero.load(SeqCst);
        summary.pages_data = sent.data.load(SeqCst);
        summary.pages_by_reference = sent.references.load(SeqCst);
        summary.pages_refetched = sent.refetched.load(SeqCst);
        summary.pages_lazy = account.lazy;
        summary.faults_served = feedback.faults;
        summary.disk_bytes = feedback.disk_bytes;
        summary.verified_pages = feedback.verified;
        summary.mismatched_pages = feedback.mismatched;
        summary.pages_checked = feedback.checked;
        summary.check_failures = feedback.failed;
        summary.lanes = u32::try_from(self.config.lanes).unwrap_or(u32::MAX);
        summary.send_path = match (sent.encrypted.load(SeqCst), sent.zero_copy.load(SeqCst)) {
            (true, _) => "encrypted",
            (_, true) => "zero-copy",
            _ => "copy",
        }
        .into();
        summary.load_path = match (feedback.checked, account.direct) {
            (0, _) => "none",
            (_, true) => "direct",
            (_, false) => "staged",
        }
        .into();
        summary.cpu_ms_source = ms(self.around.runtime.cpu_time());
        summary.cpu_ms_target = f64_of(account.cpu_us) / 1e3;
        summary.extra_memory_source_bytes = self.around.runtime.private_memory();
        summary.extra_memory_target_bytes = account.memory_bytes;
        summary.link_bytes = self.control_bytes + sent.bytes.load(SeqCst);
        Ok(())
    }

    /// After the link was lost behind the commit: dials until the target answers, and learns how far it has come.
    fn reach_again(&mut self, error: Error) -> Result<(), Error> {
        if !matches!(error, Error::Net(_)) {
            return Err(error);
        }
        self.notice(format!("{error}; dialling again"));
        self.drop_link()?;
        let give_up = self.around.runtime.now().plus(self.config.redial_for);
        let hello = Hello::new(Purpose::Resume, self.id, self.session.clone().expect("connected once"));
        let within = attempt(self.config.patience, self.config.redial_for);
        loop {
            match self.resume(&hello, within) {
                Ok(()) => {
                    self.notice("the target is there again".to_owned());
                    return Ok(());
                }
                Err(Error::Net(_) | Error::Peer { .. }) => self.drop_link()?,
                Err(other) => return Err(other),
            }
            let cancelled = self.around.cancel.asked();
            if cancelled || self.around.runtime.now() >= give_up {
                return Err(self.unreachable(&error));
            }
            self.around.runtime.sleep(REDIAL);
        }
    }

    fn unreachable(&self, error: &Error) -> Error {
        let detail = match self.hold {
            Hold::Theirs => {
                format!("the guest runs on the target, which may still need pages from here: {error}")
            }
            _ => error.to_string(),
        };
        Error::InDoubt { migration: self.id.to_string(), detail }
    }

    fn drop_link(&mut self) -> Result<(), Error> {
        // Lanes end on the failure, those that have nothing to send too; it is forgotten once they have.
        self.failure.set(&*self.around.runtime, &self.bell, Error::Net(NetError::HungUp));
        self.around.runtime.ring(&self.sending.work);
        self.end_lanes()?;
        if let Some(mut peer) = self.peer.take() {
            peer.hang_up.hang_up();
            peer.mail.end()?;
        }
        self.failure.reset();
        Ok(())
    }

    /// One attempt: comes in again, hears how far the target is, and opens the lanes; waits no longer than `within` for any
    /// answer. The target lets a later attempt take the place of an earlier one that it takes for alive still.
    fn resume(&mut self, hello: &Hello, within: Duration) -> Result<(), Error> {
        let (connection, _) = control::open(&*self.dialer, hello, within)?;
        let peer = connection.peer.clone();
        self.heard = Heard { feedback: self.heard.feedback, started: self.heard.started, ..Heard::default() };
        self.listen(connection);
        let give_up = self.around.runtime.now().plus(within);
        self.wait_for(|m| m.heard.standing.is_some() || m.around.runtime.now() >= give_up)?;
        match self.heard.standing {
            Some(Standing::Ready) => self.tell(&Message::Commit)?,
            Some(Standing::Started | Standing::Drained) => self.heard.started = true,
            Some(Standing::Discarded) => return Ok(()),
            None => {
                let doing = "it was asked how far it has come";
                return Err(NetError::Stalled { peer, seconds: within.as_secs(), doing }.into());
            }
        }
        self.dial_lanes(within)
    }
}

/// How long one attempt waits for an answer.
fn attempt(patience: Duration, redial_for: Duration) -> Duration {
    if redial_for.is_zero() { patience } else { patience.min(ATTEMPT.max(redial_for / ATTEMPTS)) }
}
