//! Connect and arm: the control connection, what both ends can do, the lanes, and the dirty log.

use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use crossbeam_queue::ArrayQueue;

use crate::error::Error;
use crate::net::Connection;
use crate::pipeline::control::{self, Mail};
use crate::pipeline::send::Lane;
use crate::report::Mode;
use crate::runtime::Placement;
use crate::source::migration::{Hold, LaneHandle, Migration, Peer};
use crate::units::usize_of;
use crate::wire::control::{Message, Offer};
use crate::wire::hello::{Hello, Purpose};

/// Rounds a lane may have waiting: the control task gives one at a time.
const JOBS: usize = 4;

impl Migration {
    /// Dials the target, agrees with it on disks and mode, opens the lanes.
    pub(super) fn connect(&mut self) -> Result<(), Error> {
        let hello = Hello::new(Purpose::Control, self.id, self.token.clone());
        let (connection, welcome) = control::open(&*self.dialer, &hello, self.config.patience)?;
        self.session = Some(welcome.secret.clone());
        self.listen(connection);
        let shape = self.shape(self.config.mode == Mode::Lazy)?;
        self.tell(&shape)?;
        self.wait_for(|m| m.heard.accept.is_some())?;
        let Offer { disks, lazy } = self.heard.accept.take().expect("just waited for");
        for (disk, outcome) in self.disks.infos().iter().zip(&disks) {
            if let Err(why) = outcome {
                self.notice(format!("disk {} is left out: {why}", disk.name));
            }
        }
        if let (Mode::Lazy, Err(why)) = (self.config.mode, lazy) {
            self.notice(format!("no early restart on the target, all pages are loaded before: {why}"));
            self.config.mode = Mode::Refer;
            self.summary.mode = Mode::Refer.name().into();
        }
        let usable =
            disks.iter().enumerate().filter(|(_, disk)| disk.is_ok()).fold(0, |mask, (at, _)| mask | 1 << at);
        self.sending.usable.store(usable, SeqCst);
        self.dial_lanes(self.config.patience)
    }

    /// Starts receiving control messages; refetches go straight to the lanes.
    pub(super) fn listen(&mut self, connection: Connection) {
        let Connection { sender, mut receiver, hang_up, .. } = connection;
        receiver.set_patience(Some(self.config.patience));
        let pages = self.memory.pages();
        let to = Arc::clone(&self.sending);
        let divert = Box::new(move |message| match message {
            Message::Refetch { urgent, pfns } => {
                for pfn in pfns.into_iter().filter(|pfn| pfn.0 < pages.0) {
                    if !urgent || to.urgent.push(pfn).is_err() {
                        to.refetch.set(pfn.index());
                    }
                }
                to.refetch_asked.store(true, SeqCst);
                to.runtime.ring(&to.work);
                None
            }
            other => Some(other),
        });
        let (runtime, bell) = (Arc::clone(&self.around.runtime), Arc::clone(&self.bell));
        let ring = Box::new(move || runtime.ring(&bell));
        let mail = Mail::start(&self.around.runtime, receiver, Arc::clone(&hang_up), divert, ring);
        self.peer = Some(Peer { sender, mail, hang_up });
    }

    /// Opens all lanes and starts their tasks; waits no longer than `within` for the answer to one.
    pub(super) fn dial_lanes(&mut self, within: Duration) -> Result<(), Error> {
        let session = self.session.clone().expect("connected");
        for number in 0..u8::try_from(self.config.lanes).unwrap_or(u8::MAX) {
            let hello = Hello::new(Purpose::Lane(number), self.id, session.clone());
            let (connection, _) = control::open(&*self.dialer, &hello, within)?;
            let Connection { sender, hang_up, .. } = connection;
            let jobs = Arc::new(ArrayQueue::new(JOBS));
            let lane = Lane::new(Arc::clone(&self.sending), number.into(), sender, Arc::clone(&jobs))?;
            let shared = Arc::clone(&self.sending);
            let task = self.around.runtime.spawn(
                &format!("pf-lane{number}"),
                Placement::Core(usize::from(number)),
                Box::new(move || {
                    if let Err(error) = lane.run() {
                        shared.failure.set(&*shared.runtime, &shared.done, error);
                    }
                }),
            );
            self.lanes.push(LaneHandle { task, hang_up, jobs });
        }
        Ok(())
    }

    /// Arms the dirty log: from here on every write is in some round.
    pub(super) fn arm(&mut self) -> Result<(), Error> {
        assert_eq!(self.hold, Hold::Running);
        if let Some(keeper) = &mut self.keeper {
            keeper.forget_written()?;
        }
        self.armed = true;
        self.dirty.arm()?;
        self.dirty.first_round(&mut self.next)?;
        debug_assert_eq!(self.next.len(), usize_of(self.memory.pages().0));
        Ok(())
    }
}
