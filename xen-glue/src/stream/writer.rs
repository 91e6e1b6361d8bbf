//! Writes a libxc stream of version 3, to the byte as the specification has it.
//!
//! Every record goes out whole before the next one, each in one `writev` where the descriptor takes that much; page
//! contents come from the caller's memory without a copy. The rules of order are those the reader enforces, so that
//! nothing is written here that a stock `xc_domain_restore` would refuse for its order. After an error the stream is
//! broken and is to be given up.
#![forbid(unsafe_code)]

use std::io::{self, IoSlice, Write};

use mover::units::{PAGE_BYTES_U64, u64_of, usize_of};

use super::body::{HvmParam, P2mFrames, PvWidth, TscInfo, VcpuState, page_data_bytes};
use super::error::{Fault, StreamError};
use super::ferry::{Lanes, LanesDone};
use super::fields::padding;
use super::frozen::{self, FrozenDisks, Reference};
use super::header::{DomainHeader, GuestType, VERSION_WRITTEN, encode_image_header};
use super::kind::{Kind, OPTIONAL, VcpuKind};
use super::limits::{OPTIONAL_BYTES_MAX, PAGES_WRITTEN_MAX, REFERENCES_WRITTEN_MAX};
use super::order::Order;
use super::page::{self, PageEntry, PageType};

/// Writes a libxc stream.
#[derive(Debug)]
pub struct Writer<W> {
    out: W,
    offset: u64,
    guest: GuestType,
    order: Order,
    head: Vec<u8>,
    scratch: Vec<u64>,
}

impl<W: Write> Writer<W> {
    /// Writes the two headers. Offsets in errors count from the first of them.
    ///
    /// # Errors
    /// Writing failed.
    pub fn start(out: W, domain: DomainHeader) -> Result<Self, StreamError> {
        let order = Order::new(VERSION_WRITTEN, domain.guest);
        let (head, scratch) = (Vec::with_capacity(16 + 8 * PAGES_WRITTEN_MAX), Vec::new());
        let mut writer = Self { out, offset: 0, guest: domain.guest, order, head, scratch };
        writer.slices(&mut [IoSlice::new(&encode_image_header()), IoSlice::new(&domain.encode())])?;
        Ok(writer)
    }

    /// Bytes written.
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// What it writes to.
    #[must_use]
    pub fn get_ref(&self) -> &W {
        &self.out
    }

    /// A PV guest's width.
    ///
    /// # Errors
    /// As every method: writing failed, or the record has no place here.
    pub fn pv_info(&mut self, width: PvWidth) -> Result<(), StreamError> {
        self.record(Kind::PvInfo, &[&width.encode()])?;
        self.order.set_width(width);
        Ok(())
    }

    /// The CPUID policy: `xen_cpuid_leaf_t`s of 24 bytes. An empty one is left out.
    ///
    /// # Errors
    /// Writing failed, no such length, or no place for it.
    pub fn cpuid_policy(&mut self, leaves: &[u8]) -> Result<(), StreamError> {
        if leaves.is_empty() { Ok(()) } else { self.record(Kind::CpuidPolicy, &[leaves]) }
    }

    /// The MSR policy: `xen_msr_entry_t`s of 16 bytes. An empty one is left out.
    ///
    /// # Errors
    /// Writing failed, no such length, or no place for it.
    pub fn msr_policy(&mut self, entries: &[u8]) -> Result<(), StreamError> {
        if entries.is_empty() { Ok(()) } else { self.record(Kind::MsrPolicy, &[entries]) }
    }

    /// Says that everything the guest can't change has been written.
    ///
    /// # Errors
    /// Writing failed, or no place for it.
    pub fn static_data_end(&mut self) -> Result<(), StreamError> {
        self.record(Kind::StaticDataEnd, &[])
    }

    /// Where a PV guest's P2M is.
    ///
    /// # Errors
    /// Writing failed, the frames do not fit the pfns, or no place for it.
    pub fn p2m_frames(&mut self, frames: &P2mFrames) -> Result<(), StreamError> {
        let width = self.order.width().unwrap_or(PvWidth::Bits64);
        frames.check(width).map_err(|(at, fault)| self.error_at(8 + at, fault))?;
        self.record(Kind::P2mFrames, &[&frames.encode()])
    }

    /// Frames, and the contents of those that have some: `contents` together have 4,096 bytes for each of them, in
    /// the order of `entries`, of which there are 1 to [`PAGES_WRITTEN_MAX`].
    ///
    /// # Errors
    /// Writing failed, `contents` has another length, or no place for it.
    pub fn page_data(&mut self, entries: &[PageEntry], contents: &[IoSlice<'_>]) -> Result<(), StreamError> {
        let wanted = self.page_data_head(entries)?;
        let bytes = contents.iter().map(|slice| u64_of(slice.len())).sum();
        if bytes != wanted {
            let pages = usize_of(wanted / PAGE_BYTES_U64);
            return Err(self.error_at(0, Fault::Payload { pages, bytes }));
        }
        let head = std::mem::take(&mut self.head);
        let mut slices = Vec::with_capacity(1 + contents.len());
        slices.push(IoSlice::new(&head));
        slices.extend(contents.iter().map(|slice| IoSlice::new(slice)));
        let written = self.slices(&mut slices);
        drop(slices);
        self.head = head;
        written
    }

    /// As [`Self::page_data`], for contents that may not be slices, such as a running guest's memory. `write` is
    /// called with what this writes to, the bytes of the record's head that are still to go out, and the bytes of
    /// contents it has written so far, as often as it takes; it writes the head first, then contents, and returns how
    /// many bytes of both together went out, never 0. On [`io::ErrorKind::Interrupted`] it is called again.
    ///
    /// # Errors
    /// `write` failed, or no place for the record.
    pub fn page_data_with(
        &mut self,
        entries: &[PageEntry],
        mut write: impl FnMut(&mut W, &[u8], u64) -> io::Result<usize>,
    ) -> Result<(), StreamError> {
        let contents = self.page_data_head(entries)?;
        let head_bytes = u64_of(self.head.len());
        let mut done = 0;
        while done < head_bytes + contents {
            let head = self.head.get(usize_of(done)..).unwrap_or_default();
            match write(&mut self.out, head, done.saturating_sub(head_bytes)) {
                Ok(0) => return Err(self.io_error(io::ErrorKind::WriteZero.into())),
                Ok(n) => {
                    let left = head_bytes + contents - done;
                    assert!(u64_of(n) <= left, "a writer took {n} bytes where {left} were left");
                    done += u64_of(n);
                    self.offset += u64_of(n);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.io_error(error)),
            }
        }
        Ok(())
    }

    /// Checks the entries and builds what stands before the contents; returns the bytes of those.
    fn page_data_head(&mut self, entries: &[PageEntry]) -> Result<u64, StreamError> {
        if entries.is_empty() || entries.len() > PAGES_WRITTEN_MAX {
            let what = "the number of frames in PAGE_DATA";
            let (found, limit) = (u64_of(entries.len()), u64_of(PAGES_WRITTEN_MAX));
            return Err(self.error_at(0, Fault::Limit { what, found, limit }));
        }
        let table = |entry: &PageEntry| matches!(entry.page_type(), PageType::Table { .. });
        if self.guest == GuestType::Hvm
            && let Some(index) = entries.iter().position(table)
        {
            return Err(self.error_at(0, Fault::TableInHvm { pfn: entries[index].pfn(), index }));
        }
        if let Some(pfn) = page::repeated(entries, &mut self.scratch) {
            return Err(self.error_at(0, Fault::RepeatedPage { pfn }));
        }
        self.order.admit(Kind::PageData).map_err(|fault| self.error_at(0, fault))?;
        self.order.name_pages(entries);
        let with_data = u64_of(entries.iter().filter(|entry| entry.has_data()).count());
        let length = u32_of(page_data_bytes(u64_of(entries.len()), with_data));
        self.head.clear();
        self.head.extend(Kind::PageData.number().to_le_bytes());
        self.head.extend(length.to_le_bytes());
        self.head.extend(u32_of(u64_of(entries.len())).to_le_bytes());
        self.head.extend([0; 4]);
        entries.iter().for_each(|entry| self.head.extend(entry.encode().to_le_bytes()));
        Ok(PAGE_BYTES_U64 * with_data)
    }

    /// Says that pages from here on are to be compared.
    ///
    /// # Errors
    /// Writing failed, or no place for it.
    pub fn verify(&mut self) -> Result<(), StreamError> {
        self.record(Kind::Verify, &[])
    }

    /// The time-stamp counter.
    ///
    /// # Errors
    /// Writing failed, or no place for it.
    pub fn tsc_info(&mut self, tsc: TscInfo) -> Result<(), StreamError> {
        self.record(Kind::TscInfo, &[&tsc.encode()])
    }

    /// A PV guest's shared info page.
    ///
    /// # Errors
    /// Writing failed, or no place for it.
    pub fn shared_info(&mut self, page: &[u8; 4096]) -> Result<(), StreamError> {
        self.record(Kind::SharedInfo, &[page])
    }

    /// State of a PV guest's virtual CPU, as the domctl gave it. An empty one is left out.
    ///
    /// # Errors
    /// Writing failed, no such length or number, or no place for it.
    pub fn vcpu(&mut self, kind: VcpuKind, vcpu: u32, context: &[u8]) -> Result<(), StreamError> {
        if context.is_empty() {
            return Ok(());
        }
        let width = self.order.width().unwrap_or(PvWidth::Bits64);
        VcpuState::check(kind, vcpu, u64_of(context.len()), width)
            .map_err(|(at, fault)| self.error_at(8 + at, fault))?;
        self.order.admit_vcpu(kind, vcpu).map_err(|fault| self.error_at(8, fault))?;
        self.record(Kind::Vcpu(kind), &[&vcpu.to_le_bytes(), &[0; 4], context])
    }

    /// Xen's own blob of an HVM guest.
    ///
    /// # Errors
    /// Writing failed, no such length, or no place for it.
    pub fn hvm_context(&mut self, context: &[u8]) -> Result<(), StreamError> {
        self.record(Kind::HvmContext, &[context])
    }

    /// An HVM guest's parameters.
    ///
    /// # Errors
    /// Writing failed, none or too many of them, or no place for it.
    pub fn hvm_params(&mut self, params: &[HvmParam]) -> Result<(), StreamError> {
        self.record(Kind::HvmParams, &[&HvmParam::encode_all(params)])
    }

    /// Says that page contents come on the lanes from here on. Whoever does not know this record fails.
    ///
    /// # Errors
    /// Writing failed, numbers past their limits, or no place for it.
    pub fn lanes(&mut self, lanes: &Lanes) -> Result<(), StreamError> {
        lanes.check().map_err(|(at, fault)| self.error_at(8 + at, fault))?;
        self.record(Kind::Lanes, &[&lanes.encode()])
    }

    /// Says what has gone over the lanes.
    ///
    /// # Errors
    /// Writing failed, or no place for it.
    pub fn lanes_done(&mut self, done: &LanesDone) -> Result<(), StreamError> {
        self.record(Kind::LanesDone, &[&done.encode()])
    }

    /// On which disks pages are left: of frames that are [`PageType::AllocateOnly`] from here on the contents are owed. Whoever
    /// does not know this record fails.
    ///
    /// # Errors
    /// Writing failed, numbers past their limits, or no place for it.
    pub fn frozen_disks(&mut self, frozen: &FrozenDisks) -> Result<(), StreamError> {
        frozen.check().map_err(|(at, fault)| self.error_at(8 + at, fault))?;
        self.record(Kind::FrozenDisks, &[&frozen.encode()])?;
        self.order.set_frozen(frozen);
        Ok(())
    }

    /// Where frames stand whose contents are owed, 1 to [`REFERENCES_WRITTEN_MAX`] of them.
    ///
    /// # Errors
    /// Writing failed, one that is not owed or lies on no disk, too many, or no place for it.
    pub fn references(&mut self, references: &[Reference]) -> Result<(), StreamError> {
        let (found, limit) = (u64_of(references.len()), u64_of(REFERENCES_WRITTEN_MAX));
        if found > limit {
            return Err(self.error_at(0, Fault::Limit { what: "the number of REFERENCES", found, limit }));
        }
        for (at, reference) in references.iter().enumerate() {
            self.order.pay(reference).map_err(|fault| self.error_at(8 + frozen::place_of(at), fault))?;
        }
        self.record(Kind::References, &[&Reference::encode_all(references)])
    }

    /// A record of an extension that others may skip; bit 31 of `number` is set.
    ///
    /// # Errors
    /// Writing failed, `number` is not optional, or `body` is longer than [`OPTIONAL_BYTES_MAX`].
    pub fn optional(&mut self, number: u32, body: &[u8]) -> Result<(), StreamError> {
        if number & OPTIONAL == 0 {
            return Err(self.error_at(0, Fault::Unknown { number }));
        }
        let (found, limit) = (u64_of(body.len()), u64::from(OPTIONAL_BYTES_MAX));
        if found > limit {
            return Err(self.error_at(0, Fault::Limit { what: "an optional record's length", found, limit }));
        }
        self.framed(number, &[body])
    }

    /// The last record. Returns what was written to.
    ///
    /// # Errors
    /// Writing failed, or the stream lacks a record a guest needs.
    pub fn end(mut self) -> Result<W, StreamError> {
        self.record(Kind::End, &[])?;
        self.out.flush().map_err(|error| self.io_error(error))?;
        Ok(self.out)
    }

    fn record(&mut self, kind: Kind, parts: &[&[u8]]) -> Result<(), StreamError> {
        let length: u64 = parts.iter().map(|part| u64_of(part.len())).sum();
        kind.check_length(u32_of(length)).map_err(|fault| self.error_at(4, fault))?;
        self.order.admit(kind).map_err(|fault| self.error_at(0, fault))?;
        self.framed(kind.number(), parts)
    }

    fn framed(&mut self, number: u32, parts: &[&[u8]]) -> Result<(), StreamError> {
        let length = u32_of(parts.iter().map(|part| u64_of(part.len())).sum());
        let mut head = [0; 8];
        head[..4].copy_from_slice(&number.to_le_bytes());
        head[4..].copy_from_slice(&length.to_le_bytes());
        let zeroes = &[0; 8][..usize_of(u64::from(padding(length)))];
        let mut slices = vec![IoSlice::new(&head)];
        slices.extend(parts.iter().map(|part| IoSlice::new(part)));
        slices.push(IoSlice::new(zeroes));
        self.slices(&mut slices)
    }

    /// Writes all of `slices`.
    fn slices(&mut self, mut slices: &mut [IoSlice<'_>]) -> Result<(), StreamError> {
        IoSlice::advance_slices(&mut slices, 0);
        while !slices.is_empty() {
            match self.out.write_vectored(slices) {
                Ok(0) => return Err(self.io_error(io::ErrorKind::WriteZero.into())),
                Ok(n) => {
                    IoSlice::advance_slices(&mut slices, n);
                    self.offset += u64_of(n);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.io_error(error)),
            }
        }
        Ok(())
    }

    fn error_at(&self, place: u64, fault: Fault) -> StreamError {
        StreamError::new(self.offset + place, fault)
    }

    fn io_error(&self, source: io::Error) -> StreamError {
        StreamError::new(self.offset, Fault::Io { doing: "writing the stream", source })
    }
}

/// A length that has, or will be, held against a limit far below 4 GiB.
fn u32_of(length: u64) -> u32 {
    u32::try_from(length).unwrap_or(u32::MAX)
}
