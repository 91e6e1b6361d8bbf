//! A save's stream: what is written when, and batches of pages cut into records.
#![forbid(unsafe_code)]

use std::os::fd::BorrowedFd;
use std::sync::atomic::AtomicBool;

use mover::units::{PAGE_BYTES, u64_of, usize_of};

use super::SaveError;
use crate::abi::Part;
use crate::channel::Channel;
use crate::domain::{FinalState, KindState, StaticState};
use crate::stream::{
    DomainHeader, FrozenDisks, Lanes, LanesDone, OFFER, Offer, P2mFrames, PageEntry, Reference, Writer,
};

/// Most pages of a record.
const RECORD_PAGES: usize = crate::stream::limits::PAGES_WRITTEN_MAX;
/// Pages of a superpage: records are cut between them, so that the other end can populate them whole.
const SUPER_PAGES: u64 = 512;

/// The stream: to be started, being written, or ended.
pub(super) struct Records<'a> {
    state: State<'a>,
    bytes: u64,
}

enum State<'a> {
    New(Channel<'a>),
    Open(Box<Writer<Channel<'a>>>),
    Over,
}

impl<'a> Records<'a> {
    pub(super) fn new(to: BorrowedFd<'a>, stop: &'a AtomicBool) -> Self {
        Self { state: State::New(Channel::new(to, stop)), bytes: 0 }
    }

    /// Bytes written.
    pub(super) fn bytes(&self) -> u64 {
        match &self.state {
            State::Open(writer) => writer.offset(),
            _ => self.bytes,
        }
    }

    fn writer(&mut self) -> &mut Writer<Channel<'a>> {
        match &mut self.state {
            State::Open(writer) => writer,
            _ => unreachable!("records are written between the stream's start and its end"),
        }
    }

    /// Writes the headers.
    pub(super) fn start(&mut self, header: DomainHeader) -> Result<(), SaveError> {
        if let State::New(channel) = std::mem::replace(&mut self.state, State::Over) {
            self.state = State::Open(Box::new(Writer::start(channel, header)?));
        }
        Ok(())
    }

    /// Writes what the guest can't change.
    pub(super) fn static_state(
        &mut self,
        state: &StaticState,
        table: Option<&P2mFrames>,
    ) -> Result<(), SaveError> {
        let writer = self.writer();
        if let Some(width) = state.pv {
            writer.pv_info(width)?;
        }
        writer.cpuid_policy(&state.cpuid)?;
        writer.msr_policy(&state.msrs)?;
        writer.static_data_end()?;
        if let Some(table) = table {
            writer.p2m_frames(table)?;
        }
        Ok(())
    }

    /// Writes a batch whose contents are `content`'s, counted over the entries that have some; how many these are.
    pub(super) fn pages<'p>(
        &mut self,
        entries: &[PageEntry],
        content: impl Fn(usize) -> Part<'p>,
    ) -> Result<u64, SaveError> {
        let writer = self.writer();
        let (mut rest, mut first) = (entries, 0);
        while !rest.is_empty() {
            let (record, behind) = rest.split_at(cut(rest));
            let contents = record.iter().filter(|entry| entry.has_data()).count();
            writer.page_data_with(record, |channel, head, done| {
                // Everything went out in the first call, or it failed.
                debug_assert_eq!(done, 0, "a record is written in one call");
                let pages = (first..first + contents).map(|at| -> Part<'_> { content(at) });
                channel.send(head, pages)?;
                Ok(head.len() + contents * PAGE_BYTES)
            })?;
            first += contents;
            rest = behind;
        }
        Ok(u64_of(first))
    }

    /// Offers lanes.
    pub(super) fn offer(&mut self, offer: &Offer) -> Result<(), SaveError> {
        Ok(self.writer().optional(OFFER, &offer.encode())?)
    }

    /// Says that page contents come on lanes from here on.
    pub(super) fn lanes(&mut self, lanes: &Lanes) -> Result<(), SaveError> {
        Ok(self.writer().lanes(lanes)?)
    }

    /// Says what has gone over the lanes.
    pub(super) fn lanes_done(&mut self, done: &LanesDone) -> Result<(), SaveError> {
        Ok(self.writer().lanes_done(done)?)
    }

    /// Says on which disks pages are left.
    pub(super) fn frozen_disks(&mut self, frozen: &FrozenDisks) -> Result<(), SaveError> {
        Ok(self.writer().frozen_disks(frozen)?)
    }

    /// Says where pages stand.
    pub(super) fn references(&mut self, references: &[Reference]) -> Result<(), SaveError> {
        Ok(self.writer().references(references)?)
    }

    /// Says that what follows is for comparing.
    pub(super) fn verify(&mut self) -> Result<(), SaveError> {
        Ok(self.writer().verify()?)
    }

    /// Writes what the guest is besides its memory.
    pub(super) fn final_state(&mut self, state: &FinalState) -> Result<(), SaveError> {
        let writer = self.writer();
        writer.tsc_info(state.tsc)?;
        match &state.kind {
            KindState::Hvm { context, params } => {
                writer.hvm_context(context)?;
                if !params.is_empty() {
                    writer.hvm_params(params)?;
                }
            }
            KindState::Pv { shared_info, vcpus } => {
                writer.shared_info(shared_info)?;
                for vcpu in vcpus {
                    writer.vcpu(vcpu.kind, vcpu.vcpu, &vcpu.context)?;
                }
            }
        }
        Ok(())
    }

    /// Ends the stream.
    pub(super) fn end(&mut self) -> Result<(), SaveError> {
        if let State::Open(writer) = std::mem::replace(&mut self.state, State::Over) {
            // The END record itself: eight bytes.
            self.bytes = writer.offset() + 8;
            writer.end()?;
        }
        Ok(())
    }
}

/// How many of `entries` the next record takes: as many as go, but not part of a superpage whose rest would come in
/// the next one.
fn cut(entries: &[PageEntry]) -> usize {
    let Some(next) = entries.get(RECORD_PAGES) else { return entries.len() };
    let pfn = next.pfn().0;
    let back = usize_of(pfn % SUPER_PAGES);
    let begins_here =
        entries.get(RECORD_PAGES - back).is_some_and(|entry| entry.pfn().0 + u64_of(back) == pfn);
    if begins_here { RECORD_PAGES - back } else { RECORD_PAGES }
}

#[cfg(test)]
mod tests {
    use mover::units::Pfn;

    use super::*;
    use crate::stream::PageType;

    fn entries(pfns: impl Iterator<Item = u64>) -> Vec<PageEntry> {
        pfns.map(|pfn| PageEntry::new(Pfn(pfn), PageType::Normal)).collect()
    }

    #[test]
    fn records_are_cut_between_superpages() {
        assert_eq!(cut(&entries(0..4096)), 1024);
        assert_eq!(cut(&entries(0..1000)), 1000);
        // A hole before: the third superpage would be torn.
        assert_eq!(cut(&entries((0..160).chain(256..4096))), 928);
        // Pages far apart are not kept together.
        assert_eq!(cut(&entries((0..4096).map(|n| n * 7))), 1024);
    }
}
