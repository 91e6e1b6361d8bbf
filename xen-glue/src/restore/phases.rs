//! The phases of a restore.
#![forbid(unsafe_code)]

use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};

use mover::memory::PageBuf;
use mover::units::u64_of;

use super::ferry::Ferry;
use super::{Event, Options, Phase, RestoreError, Restored, Toolstack, Wiring};
use crate::abi::PartMut;
use crate::channel::Channel;
use crate::domain::{DomainError, FinalState, KindState, StaticState, Target};
use crate::stream::{GuestType, HvmParam, OFFER, PageEntry, Reader, Record, TscInfo, VcpuState};

/// Pages compared at once.
const COMPARED: usize = 64;
/// Most pages that are named one by one where they differ.
const NAMED: u64 = 16;

/// A restore under way.
pub(super) struct Restore<'a, T: Target, K: Toolstack> {
    pub(super) target: T,
    wiring: &'a Wiring,
    pub(super) options: &'a Options,
    pub(super) toolstack: &'a mut K,
    pub(super) stop: &'a AtomicBool,
    pub(super) ferry: Ferry,
    static_state: StaticState,
    last: Collected,
    /// Pages are compared with what is there, here.
    comparing: Option<Vec<PageBuf>>,
    pub(super) restored: Restored,
}

/// What comes behind the pages, until all of it is there. The stream's reader bounds every part and lets none repeat.
#[derive(Default)]
struct Collected {
    tsc: Option<TscInfo>,
    context: Vec<u8>,
    params: Vec<HvmParam>,
    shared_info: Option<Box<[u8; 4096]>>,
    vcpus: Vec<VcpuState>,
}

impl<'a, T: Target, K: Toolstack> Restore<'a, T, K> {
    pub(super) fn new(
        target: T,
        wiring: &'a Wiring,
        options: &'a Options,
        toolstack: &'a mut K,
        stop: &'a AtomicBool,
    ) -> Self {
        Self {
            target,
            wiring,
            options,
            toolstack,
            stop,
            ferry: Ferry::None,
            static_state: StaticState::default(),
            last: Collected::default(),
            comparing: None,
            restored: Restored::default(),
        }
    }

    /// All of it.
    pub(super) fn run(mut self, from: BorrowedFd<'a>) -> Result<Restored, RestoreError> {
        match self.phases(from).map_err(|error| self.give_up(error)) {
            Ok(()) => Ok(self.restored),
            // Whatever a stop has made fail, it is the reason.
            Err(_) if self.stop.load(Ordering::Relaxed) => Err(RestoreError::Cancelled),
            Err(error) => Err(error),
        }
    }

    fn phases(&mut self, from: BorrowedFd<'a>) -> Result<(), RestoreError> {
        self.begin(Phase::Headers)?;
        let mut reader = self.headers(Channel::new(from, self.stop))?;
        self.begin(Phase::Records)?;
        self.records(&mut reader)?;
        self.begin(Phase::Finish)?;
        self.finish()?;
        self.confirm()
    }

    fn begin(&mut self, phase: Phase) -> Result<(), RestoreError> {
        self.toolstack.report(&Event::Phase(phase));
        if self.stop.load(Ordering::Relaxed) { Err(RestoreError::Cancelled) } else { Ok(()) }
    }

    fn headers(&mut self, channel: Channel<'a>) -> Result<Reader<Channel<'a>>, RestoreError> {
        let reader = Reader::start(channel, 0)?;
        let (stream, created) = (reader.domain().guest, self.target.guest());
        if stream != created {
            let article = if stream == GuestType::Hvm { "an" } else { "a" };
            return Err(RestoreError::Kind { article, stream: stream.name(), created: created.name() });
        }
        Ok(reader)
    }

    fn records(&mut self, reader: &mut Reader<Channel<'a>>) -> Result<(), RestoreError> {
        loop {
            self.wait_for_record(reader.get_ref())?;
            match reader.next_record()? {
                Record::PageData if self.comparing.is_some() => self.compare(reader)?,
                Record::PageData => self.pages(reader)?,
                Record::PvInfo(width) => self.static_state.pv = Some(width),
                Record::CpuidPolicy(leaves) => self.static_state.cpuid = leaves,
                Record::MsrPolicy(msrs) => self.static_state.msrs = msrs,
                Record::StaticDataEnd => self.static_state_is_whole()?,
                Record::P2mFrames(frames) => self.target.set_table_frames(frames)?,
                Record::Verify => self.comparing = Some(vec![PageBuf::zeroed(); COMPARED]),
                Record::TscInfo(tsc) => self.last.tsc = Some(tsc),
                Record::HvmContext(context) => self.last.context = context,
                Record::HvmParams(params) => self.last.params = params,
                Record::SharedInfo(page) => self.last.shared_info = Some(page),
                Record::Vcpu(state) => self.last.vcpu(state, self.target.vcpus())?,
                Record::Lanes(lanes) => self.begin_lanes(&lanes)?,
                Record::LanesDone(done) => self.end_lanes(&done)?,
                Record::Optional { number: OFFER, body } => self.offered(body.as_deref()),
                Record::Optional { .. } => {}
                Record::End => break,
            }
        }
        self.restored.bytes = reader.offset();
        Ok(())
    }

    fn static_state_is_whole(&mut self) -> Result<(), RestoreError> {
        self.target.set_static_state(&self.static_state)?;
        let doing = "complete the guest's CPU policy";
        match self.toolstack.static_data_done(self.static_state.missing()) {
            Ok(true) => Ok(()),
            Ok(false) => Err(RestoreError::Refused { doing }),
            Err(source) => Err(RestoreError::Toolstack { doing, source }),
        }
    }

    /// Reads a record's pages straight into the guest's memory.
    fn pages(&mut self, reader: &mut Reader<Channel<'a>>) -> Result<(), RestoreError> {
        let mut from = 0;
        while let Some(contents) = self.place(reader, &mut from)? {
            let target = &self.target;
            reader.read_pages_with(contents, |channel, done| {
                // A second time it is asked only where the stream has ended before all had come.
                if done > 0 {
                    return Ok(0);
                }
                channel.receive((0..contents).map(|at| PartMut::Page(target.page(at))))
            })?;
            self.target.settle()?;
        }
        self.toolstack.report(&Event::Pages(self.restored.pages));
        Ok(())
    }

    /// Has the next batch of a record's entries, from `from` on, placed; the number of contents to come for it, none
    /// at the record's end.
    fn place(
        &mut self,
        reader: &Reader<Channel<'a>>,
        from: &mut usize,
    ) -> Result<Option<usize>, RestoreError> {
        if self.stop.load(Ordering::Relaxed) {
            return Err(RestoreError::Cancelled);
        }
        let Some(rest) = reader.page_entries().get(*from..).filter(|rest| !rest.is_empty()) else {
            return Ok(None);
        };
        let batch = &rest[..rest.len().min(self.target.batch_pages())];
        *from += batch.len();
        let contents = self.target.place(batch)?;
        self.restored.pages += u64_of(contents);
        Ok(Some(contents))
    }

    /// Reads a record's pages and compares them with the guest's.
    fn compare(&mut self, reader: &mut Reader<Channel<'a>>) -> Result<(), RestoreError> {
        let Some(mut buffers) = self.comparing.take() else { return Ok(()) };
        let mut from = 0;
        loop {
            let first = from;
            let Some(contents) = self.place(reader, &mut from)? else { break };
            let mut done = 0;
            while done < contents {
                let some = &mut buffers[..COMPARED.min(contents - done)];
                reader.read_pages_with(some.len(), |channel, done| {
                    if done > 0 {
                        return Ok(0);
                    }
                    channel.receive(some.iter_mut().map(|page| PartMut::Bytes(&mut page.0)))
                })?;
                for page in some {
                    if let Some(bytes) = self.target.difference(done, page)? {
                        let batch = &reader.page_entries()[first..from];
                        self.differs(batch.iter().filter(|entry| entry.has_data()).nth(done), &bytes);
                    }
                    self.restored.compared += 1;
                    done += 1;
                }
            }
        }
        self.comparing = Some(buffers);
        Ok(())
    }

    /// Counts a page that is not what the source says, and names it unless too many were named.
    fn differs(&mut self, entry: Option<&PageEntry>, bytes: &Range<usize>) {
        self.restored.different += 1;
        if let (Some(entry), true) = (entry, self.restored.different <= NAMED) {
            let (pfn, first, last) = (entry.pfn(), bytes.start, bytes.end - 1);
            let what = format!("verify: {pfn} differs from the source's between bytes {first} and {last}");
            self.toolstack.report(&Event::Note(&what));
        }
    }

    fn finish(&mut self) -> Result<(), RestoreError> {
        let state = std::mem::take(&mut self.last).whole(self.target.guest())?;
        self.restored.frames = self.target.finish(&state, self.wiring)?;
        self.restored.lent = self.target.lent();
        Ok(())
    }
}

impl Collected {
    fn vcpu(&mut self, state: VcpuState, vcpus: u32) -> Result<(), DomainError> {
        if state.vcpu >= vcpus {
            let what = format!("it has a virtual CPU {} for a guest with {vcpus} of them", state.vcpu);
            return Err(DomainError::Stream { what });
        }
        self.vcpus.push(state);
        Ok(())
    }

    fn whole(self, guest: GuestType) -> Result<FinalState, DomainError> {
        let missing =
            |what: &str| DomainError::Stream { what: format!("it ends without the guest's {what}") };
        let tsc = self.tsc.ok_or_else(|| missing("clock"))?;
        let kind = match guest {
            GuestType::Hvm => KindState::Hvm { context: self.context, params: self.params },
            GuestType::Pv => KindState::Pv {
                shared_info: self.shared_info.ok_or_else(|| missing("shared info"))?,
                vcpus: self.vcpus,
            },
        };
        Ok(FinalState { tsc, kind })
    }
}
