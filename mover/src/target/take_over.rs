//! A target's engine was lost while pages were outstanding. Its guest waits for them, the source keeps each and dials again: another
//! engine takes the first one's place.
//!
//! What the references were has gone with the first engine, so every page that is not there is asked of the source. A page that was never
//! touched is not there either, and is a zero page at the source too. If the source does not come, the guest goes on waiting, and
//! a third engine may try.

use std::sync::Arc;

use crate::bitmap::Bitmap;
use crate::error::{Error, GuestError, NetError};
use crate::fingerprint::{Check, CheckKey};
use crate::guest::TargetGuest;
use crate::journal::Journal;
use crate::net::Acceptor;
use crate::pipeline::faults::FaultServer;
use crate::report::Phase;
use crate::source::Surroundings;
use crate::target::connect::{Arrival, Door};
use crate::target::reception::{Reception, Stage};
use crate::target::{Config, Host};
use crate::units::{BlockAddress, DiskId, Pfn, Sector, Version};
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
    /// Lanes it comes with.
    pub lanes: u8,
    /// Its name.
    pub name: String,
    /// The guest, attached to again.
    pub guest: TargetGuest,
    /// The record that says that it was started here.
    pub journal: Box<dyn Journal>,
}

/// Loads what is outstanding. On success all of the guest is here. On an error it waits for its pages as before, unless the error
/// says that it was stopped.
pub fn take_over(orphan: Orphan, config: Config, surroundings: Surroundings) -> Result<Account, Error> {
    let Orphan { acceptor, migration, session, lanes, name, guest, journal } = orphan;
    let shape = Shape {
        guest: name,
        pages: guest.memory.pages().0,
        lanes,
        refers: false,
        lazy: true,
        verify: false,
        // Nothing will be checked against it.
        key: CheckKey::new([0; 32]),
        disks: Vec::new(),
    };
    let arrival = Arrival {
        connection: None,
        door: Arc::new(Door::new(migration, session)),
        acceptor,
        shape,
        host: Host { guest, disks: None, readable: Vec::new() },
        journal,
    };
    let mut reception = Reception::new(arrival, config, surroundings)?;
    reception.stage = Stage::Started;
    let outcome = reception.go_on();
    reception.wind_up(outcome)
}

impl Reception {
    /// The phases that are left.
    fn go_on(&mut self) -> Result<(), Error> {
        self.phase(Phase::Connect, Self::hold_again)?;
        self.phase(Phase::Drain, Self::fetch_rest)
    }

    /// Takes up what is missing, and answers the guest's faults from here on.
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
        self.lazy_pages = self.landing.hold_back(&hold)?.count();
        self.lost_at = Some(self.around.runtime.now());
        let server = FaultServer {
            landing: Arc::clone(&self.landing),
            hold,
            loader: None,
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
