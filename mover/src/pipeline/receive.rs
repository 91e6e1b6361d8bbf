//! A lane on the target: takes frames off the connection and places what they carry.
//!
//! Owned by one task a lane. A data frame's pages are received straight into guest memory where they can be claimed,
//! and aside where they can't: stale ones are dropped there, contested ones land when the contest is over. So a
//! lane holds claims only while it receives, and never waits with one.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::SeqCst};
use std::time::Duration;

use zerocopy::byteorder::little_endian::U64;

use crate::error::{Error, GuestError, WireError};
use crate::fingerprint::{Check, CheckKey};
use crate::limits::PAGES_PER_FRAME;
use crate::memory::{GuestPage, PageBuf, Window};
use crate::net::Receiver;
use crate::pipeline::landing::{Incoming, Landing};
use crate::pipeline::table::{Claim, State};
use crate::units::{Pfn, Version, u64_of};
use crate::wire::frame::{
    Digest, HEADER_BYTES, Header, Kind, Reference, TABLE_BYTES_MAX, ZeroRun, pfn_within, table,
};

/// How far one lane has come.
#[derive(Default)]
pub struct LaneProgress {
    /// The highest round whose barrier has arrived; everything before it on this lane is placed.
    pub barrier: AtomicU32,
}

/// What lanes share.
pub struct Reception {
    /// Where pages land.
    pub landing: Arc<Landing>,
    /// Key of the checks.
    pub key: CheckKey,
    /// Disks that references may name.
    pub disks: usize,
    /// Progress by lane.
    pub lanes: Vec<LaneProgress>,
    /// How long a frame that has begun may stand still.
    pub patience: Duration,
    /// Whether losing a lane is losing the migration: until everything has arrived. After that a lane only brings
    /// refetches, and a new one can.
    pub vital: AtomicBool,
    /// Whether the reference that a refetch answers is known, so that the page can be held against its check. An engine that takes
    /// over knows none: what the source kept is the authority then.
    pub checks: bool,
}

impl Reception {
    /// The round that all lanes have finished.
    #[must_use]
    pub fn finished_round(&self) -> u32 {
        self.lanes.iter().map(|lane| lane.barrier.load(SeqCst)).min().unwrap_or(0)
    }
}

/// Where a page of a data frame is received.
#[derive(Clone, Copy)]
enum Aim {
    Guest(State),
    Aside,
    Nowhere,
}

/// One lane's receiving end, with all the buffers it will ever need.
pub struct Lane {
    shared: Arc<Reception>,
    number: u16,
    receiver: Box<dyn Receiver>,
    sequence: u64,
    table: Box<[u8]>,
    window: Window,
    aside: Vec<PageBuf>,
    pfns: Vec<Pfn>,
    aims: Vec<Aim>,
    zero_check: Check,
}

impl Lane {
    /// For lane `number`, whose handshake is over.
    pub fn new(shared: Arc<Reception>, number: u16, receiver: Box<dyn Receiver>) -> Result<Self, Error> {
        let window = shared.landing.memory.window(PAGES_PER_FRAME)?;
        Ok(Self {
            number,
            receiver,
            sequence: 0,
            table: vec![0; TABLE_BYTES_MAX].into_boxed_slice(),
            window,
            aside: vec![PageBuf::zeroed(); PAGES_PER_FRAME],
            pfns: Vec::with_capacity(PAGES_PER_FRAME),
            aims: Vec::with_capacity(PAGES_PER_FRAME),
            zero_check: shared.key.check(&PageBuf::zeroed()),
            shared,
        })
    }

    /// Receives frames until the connection ends; the error says how.
    pub fn run(mut self) -> Error {
        loop {
            if let Err(error) = self.frame() {
                return error;
            }
        }
    }

    fn frame(&mut self) -> Result<(), Error> {
        let mut header = [0; HEADER_BYTES];
        self.receiver.set_patience(None);
        self.receiver.recv(&mut header)?;
        self.receiver.set_patience(Some(self.shared.patience));
        let header = Header::decode(&header)?;
        if header.lane != self.number || header.sequence != self.sequence {
            return Err(WireError::Invalid {
                what: "the sequence of a lane's frames",
                found: header.sequence,
            }
            .into());
        }
        self.sequence += 1;
        let bytes = header.filled_table_bytes();
        self.receiver.recv(&mut self.table[..bytes])?;
        match header.kind {
            Kind::Data => self.data(header),
            Kind::Zero => self.zero(header),
            Kind::References => self.references(header),
            Kind::Digests => self.digests(header),
            Kind::Barrier => self.barrier(header),
        }
    }

    fn data(&mut self, header: Header) -> Result<(), Error> {
        let guest = self.shared.landing.memory.pages();
        self.pfns.clear();
        for word in table::<U64>(&self.table[..header.table_bytes()]) {
            self.pfns.push(pfn_within(*word, guest)?);
        }
        // Once the guest is being started a page is given to it whole; mapping one that it has not got would wait for it.
        if self.shared.landing.is_early() {
            self.shared.landing.memory.map(&self.pfns, &mut self.window)?;
        } else {
            self.window.clear();
        }
        self.aim(header.version);
        let received = self.receive_payload();
        self.settle(header.version, received.is_ok());
        received?;
        self.land_aside(header.version)
    }

    /// Decides for every page of the frame where it is received, claiming those that go to the guest.
    fn aim(&mut self, version: Version) {
        let landing = &self.shared.landing;
        self.aims.clear();
        for (at, pfn) in self.pfns.iter().enumerate() {
            // Nothing was mapped where the guest was being started already.
            let there = at < self.window.len() && self.window.page(at).is_some();
            self.aims.push(match there {
                true => match landing.claim_early(*pfn, version) {
                    // Held back since it was mapped: what the window shows is not the guest's any more, and it waits to be given
                    // the page whole.
                    Claim::Granted(before) if landing.is_ahead(*pfn) => {
                        landing.give_back(*pfn, version, before);
                        Aim::Aside
                    }
                    Claim::Granted(before) => Aim::Guest(before),
                    Claim::Stale => Aim::Nowhere,
                    Claim::Busy => Aim::Aside,
                },
                false => Aim::Aside,
            });
        }
    }

    fn receive_payload(&mut self) -> Result<(), Error> {
        let count = self.pfns.len();
        // A frame has at least one page and `aside` a buffer for each, so the array has something to start from.
        let mut pages: [Option<GuestPage<'_>>; PAGES_PER_FRAME] = [None; PAGES_PER_FRAME];
        for (at, buffer) in self.aside[..count].iter_mut().enumerate() {
            pages[at] = match self.aims[at] {
                Aim::Guest(_) => self.window.page(at),
                Aim::Aside | Aim::Nowhere => Some(buffer.as_guest_page()),
            };
        }
        let first = pages[0].expect("mapped, or aside");
        let pages = pages.map(|page| page.unwrap_or(first));
        self.receiver.recv_pages(&pages[..count])?;
        Ok(())
    }

    /// Settles the claims of [`Self::aim`]. If the payload broke off, outstanding pages are outstanding again; others
    /// stay claimed, for they may be half written: the migration has failed, or the guest never sees them.
    fn settle(&self, version: Version, whole: bool) {
        let landing = &self.shared.landing;
        for (pfn, aim) in self.pfns.iter().zip(&self.aims) {
            match (*aim, whole) {
                (Aim::Guest(before), true) => landing.table.placed(*pfn, version, before),
                (Aim::Guest(before @ State::Outstanding(_)), false) => {
                    landing.table.unclaim(*pfn, version, before)
                }
                _ => {}
            }
        }
        landing.runtime.ring(&landing.settled);
    }

    fn land_aside(&mut self, version: Version) -> Result<(), Error> {
        let landing = Arc::clone(&self.shared.landing);
        for at in 0..self.pfns.len() {
            if !matches!(self.aims[at], Aim::Aside) {
                continue;
            }
            let pfn = self.pfns[at];
            // After the restart, data answers a refetch: a page that was frozen when its reference was made.
            if self.shared.checks
                && !landing.is_early()
                && let Some(wanted) = landing.table.reference(pfn)
            {
                let good = self.shared.key.check(&self.aside[at]) == wanted.check;
                if !good {
                    landing.counts.mismatch(pfn);
                    return Err(Error::Mismatch {
                        count: 1,
                        first: pfn,
                        outcome: "the guest is stopped before it sees it",
                    });
                }
            }
            landing.land(pfn, version, &mut self.aside[at], &mut self.window)?;
        }
        Ok(())
    }

    fn zero(&mut self, header: Header) -> Result<(), Error> {
        let landing = Arc::clone(&self.shared.landing);
        let guest = landing.memory.pages();
        for at in 0..header.count {
            let run = table::<ZeroRun>(&self.table[..header.table_bytes()])[at];
            for pfn in run.range(guest)?.map(Pfn) {
                self.zero_page(&landing, pfn, header.version)?;
            }
        }
        landing.runtime.ring(&landing.settled);
        Ok(())
    }

    fn zero_page(&mut self, landing: &Landing, pfn: Pfn, version: Version) -> Result<(), Error> {
        if let Claim::Granted(before) = landing.claim_early(pfn, version) {
            // What was never touched reads as zero already, mostly; touching it would only cost memory.
            if before != State::Empty || !landing.memory.starts_zero() {
                let zero = Incoming::Page(&mut PageBuf::zeroed());
                if landing.is_ahead(pfn) {
                    return landing.write(pfn, version, before, zero, &mut self.window).map(drop);
                }
                landing.memory.map(&[pfn], &mut self.window)?;
                match self.window.page(0) {
                    Some(page) => page.fill_zero(),
                    None if landing.memory.starts_zero() => {}
                    None => {
                        return Err(GuestError::State(format!("{pfn} can't be mapped on this host")).into());
                    }
                }
            }
            landing.table.placed(pfn, version, before);
            return Ok(());
        }
        landing.land(pfn, version, &mut PageBuf::zeroed(), &mut self.window)?;
        Ok(())
    }

    fn references(&mut self, header: Header) -> Result<(), Error> {
        let landing = &self.shared.landing;
        if !landing.is_early() {
            let phase = "the guest is being started";
            return Err(WireError::OutOfOrder { message: "a reference", phase }.into());
        }
        let guest = landing.memory.pages();
        for reference in table::<Reference>(&self.table[..header.table_bytes()]) {
            let (pfn, block, check) = reference.parts(guest, self.shared.disks)?;
            loop {
                let heard = landing.settled.heard();
                match landing.table.refer(pfn, header.version, block, check) {
                    Claim::Granted(_) if header.round > 1 => {
                        landing.table.hot.set(pfn.index());
                        break;
                    }
                    Claim::Granted(_) | Claim::Stale => break,
                    Claim::Busy => landing.wait_settled(heard)?,
                }
            }
            landing.runtime.interleave();
        }
        landing.runtime.ring(&landing.settled);
        landing.runtime.ring(&landing.work);
        Ok(())
    }

    /// Compares every page with what the source recorded at the pause. An outstanding page's reference must carry
    /// the very same value: its load will be checked against that.
    fn digests(&mut self, header: Header) -> Result<(), Error> {
        let landing = Arc::clone(&self.shared.landing);
        let guest = landing.memory.pages();
        let mut page = PageBuf::zeroed();
        for at in 0..header.count {
            let (pfn, check) = table::<Digest>(&self.table[..header.table_bytes()])[at].parts(guest)?;
            let good = loop {
                let heard = landing.settled.heard();
                match landing.table.state(pfn) {
                    State::Empty => break check == self.zero_check,
                    State::Busy(_) => landing.wait_settled(heard)?,
                    State::Outstanding(_) => match landing.table.reference(pfn) {
                        Some(wanted) => break wanted.check == check,
                        None => continue,
                    },
                    State::Placed(_) => break self.placed_is(&landing, pfn, &mut page, check)?,
                }
            };
            landing.counts.verified.fetch_add(1, SeqCst);
            if !good {
                landing.counts.mismatch(pfn);
            }
        }
        Ok(())
    }

    fn placed_is(
        &mut self,
        landing: &Landing,
        pfn: Pfn,
        page: &mut PageBuf,
        check: Check,
    ) -> Result<bool, Error> {
        landing.memory.map(&[pfn], &mut self.window)?;
        if let Some(mapped) = self.window.page(0) {
            mapped.copy_to(page);
        } else {
            *page = PageBuf::zeroed();
        }
        Ok(self.shared.key.check(page) == check)
    }

    fn barrier(&mut self, header: Header) -> Result<(), Error> {
        let progress = &self.shared.lanes[usize::from(self.number)];
        let before = progress.barrier.swap(header.round, SeqCst);
        if before >= header.round {
            let found = u64::from(header.round);
            return Err(WireError::Invalid { what: "a barrier of a round that is over,", found }.into());
        }
        debug_assert!(u64_of(header.count) == 0);
        self.shared.landing.runtime.ring(&self.shared.landing.work);
        Ok(())
    }
}
