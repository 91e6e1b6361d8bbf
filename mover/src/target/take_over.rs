//! A target's engine was lost while pages were outstanding. Its guest waits for them, the source keeps each: another engine takes the
//! first one's place.
//!
//! Where what the references were has gone with the first engine, every page that is not there is asked of the source, which dials
//! again. A page that was never touched is not there either, and is a zero page at the source too. If the source does not come,
//! the guest goes on waiting, and a third engine may try.
//!
//! Where the first engine's table of pages has outlived it ([`HoldBack::table`]), the drain goes on as
//! it was: pages come from the disks, and what does not stand there any more from the source. Whatever was on its way in the first
//! engine, from a disk or from the source, is begun anew. If pages can't be had, the guest is stopped, as the first engine had
//! stopped it.

use std::sync::Arc;

use crate::bitmap::Bitmap;
use crate::error::{Error, GuestError, NetError};
use crate::fingerprint::{Check, CheckKey};
use crate::guest::HoldBack;
use crate::journal::Journal;
use crate::net::Acceptor;
use crate::pipeline::faults::{FaultServer, SmallLoader};
use crate::report::Phase;
use crate::source::Surroundings;
use crate::target::connect::{Arrival, Door};
use crate::target::reception::{Reception, Stage};
use crate::target::{Config, Host};
use crate::units::{BlockAddress, DiskId, PageCount, Pfn, Sector, Version};
use crate::wire::control::{Account, Shape};
use crate::wire::hello::{MigrationId, Secret};

/// A guest whose engine was lost while pages were held back from it.
pub struct Orphan {
    /// Where the source dials again: the lost engine's address, behind its key.
    pub acceptor: Box<dyn Acceptor>,
    /// The migration.
    pub migration: MigrationId,
    /// What the source shows.
    pub session: Secret,
    /// The guest's, as the source has told it; [`Orphan::bare`] where nobody knows it any more.
    pub shape: Shape,
    /// The guest, attached to again, and its disks, where there are references to them.
    pub host: Host,
    /// The record that says that it was started here.
    pub journal: Box<dyn Journal>,
}

impl Orphan {
    /// The shape of a guest of which the references and their key have gone.
    #[must_use]
    pub fn bare(guest: String, pages: PageCount, lanes: u8) -> Shape {
        Shape {
            guest,
            pages: pages.0,
            lanes,
            refers: false,
            lazy: true,
            verify: false,
            // Nothing will be checked against it.
            key: CheckKey::new([0; 32]),
            disks: Vec::new(),
        }
    }
}

/// Loads what is outstanding. On success all of the guest is here. On an error it waits for its pages as before, unless the error
/// says that it was stopped.
pub fn take_over(orphan: Orphan, config: Config, surroundings: Surroundings) -> Result<Account, Error> {
    let Orphan { acceptor, migration, session, shape, host, journal } = orphan;
    let door = Arc::new(Door::new(migration, session));
    let arrival = Arrival { connection: None, door, acceptor, shape, host, journal };
    let mut reception = Reception::new(arrival, config, surroundings)?;
    reception.stage = Stage::Started;
    let outcome = reception.go_on();
    reception.wind_up(outcome)
}

impl Reception {
    /// The phases that are left.
    fn go_on(&mut self) -> Result<(), Error> {
        if self.shape.refers {
            self.phase(Phase::Connect, Self::take_up)?;
            return self.phase(Phase::Drain, Self::drain);
        }
        self.phase(Phase::Connect, Self::hold_again)?;
        self.phase(Phase::Drain, Self::fetch_rest)
    }

    /// Takes up what is missing, and answers the guest's faults from here on: all of it is the source's to send.
    fn hold_again(&mut self) -> Result<(), Error> {
        let hold = self.lazy.clone().map_err(GuestError::State)?;
        let table = &self.landing.table;
        let mut absent = Bitmap::new(table.pages().entries());
        hold.absent(&mut absent)?;
        let nowhere = BlockAddress { disk: DiskId(0), sector: Sector(0) };
        for pfn in absent.iter().map(Pfn::at) {
            table.refer(pfn, Version(0), nowhere, Check::default());
            table.ask.set(pfn.index());
        }
        self.serve(hold, None)
    }

    /// Takes up what is missing, and where it stands; answers the guest's faults from here on.
    fn take_up(&mut self) -> Result<(), Error> {
        let hold = self.lazy.clone().map_err(GuestError::State)?;
        let table = &self.landing.table;
        let mut left = table.left();
        hold.take_up(&mut left)?;
        table.take_up(&left);
        if hold.holds_ahead() {
            self.landing.hold_ahead_with(&hold);
        }
        let Some(disks) = self.disks.clone() else {
            // Not one of them can be read any more.
            for at in left.iter() {
                table.ask.set(at);
            }
            return self.serve(hold, None);
        };
        let small = SmallLoader::new(Arc::clone(&self.landing), Arc::clone(&disks), self.shape.key.clone())?;
        self.serve(hold, Some(small))?;
        self.load_from(&disks)
    }

    /// Holds back what is outstanding, answers faults on it, and expects the source.
    fn serve(&mut self, hold: Arc<dyn HoldBack>, loader: Option<SmallLoader>) -> Result<(), Error> {
        self.lazy_pages = self.landing.hold_back(&hold)?.count();
        self.lost_at = Some(self.around.runtime.now());
        let server = FaultServer {
            landing: Arc::clone(&self.landing),
            hold,
            loader,
            urgent: Arc::clone(&self.urgent),
            finish: Arc::clone(&self.finish),
        };
        self.spawn("pf-faults", |_| server.run());
        self.expect_source();
        Ok(())
    }

    fn fetch_rest(&mut self) -> Result<(), Error> {
        let redial_for = self.config.redial_for;
        self.wait_for(|r| r.landing.table.outstanding() == 0 || r.lost_for(redial_for))?;
        if self.landing.table.outstanding() > 0 {
            let doing = "the source was waited for, which has the pages that are missing; the guest waits for them still";
            return Err(NetError::Stalled {
                peer: "the source".into(),
                seconds: redial_for.as_secs(),
                doing,
            }
            .into());
        }
        self.all_loaded()?;
        self.let_source_go()
    }
}
