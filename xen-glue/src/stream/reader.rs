//! Reads a libxc stream record by record, page contents straight to where the caller wants them.
//!
//! ```text
//!   Reader::start      image header, domain header
//!   next_record        a record; of PAGE_DATA: header and entries
//!     entries          the frames and types, distinct within a record
//!     read_pages       contents, batch by batch, into the caller's memory; or read_pages_with, skip_pages
//!   next_record ...    Record::End: nothing more is read
//! ```
//!
//! Invariants: nothing behind the current record is ever read, behind END least of all, since libxl goes on reading
//! from the same descriptor; a record is handed out only when its length, fields and place have been found right; the
//! contents of a PAGE_DATA record are all taken before the next record.
#![forbid(unsafe_code)]

use std::io::{self, IoSliceMut, Read};

use mover::units::{PAGE_BYTES_U64, u64_of, usize_of};

use super::body::{self, HvmParam, P2mFrames, PvWidth, TscInfo, VcpuState, page_data_bytes};
use super::error::{Fault, StreamError};
use super::ferry::{Lanes, LanesDone};
use super::fields::{padding, u32_at, u64_at};
use super::frozen::{self, FrozenDisks, Reference};
use super::header::{DOMAIN_HEADER_BYTES, DomainHeader, GuestType, IMAGE_HEADER_BYTES, decode_image_header};
use super::input::Input;
use super::judge::Judge;
use super::kind::{Kind, OPTIONAL, SHARED_INFO_BYTES};
use super::limits::{OPTIONAL_BYTES_MAX, PAGES_READ_MAX, RECORD_BYTES_MAX};
use super::order::Order;
use super::page::{self, PageEntry};

const RECORD_HEADER: &str = "a record's header";

/// A record, found right, and admitted by the rules of order.
#[derive(Debug)]
pub enum Record {
    /// The guest's CPUID policy: `xen_cpuid_leaf_t`s of 24 bytes.
    CpuidPolicy(Vec<u8>),
    /// The guest's MSR policy: `xen_msr_entry_t`s of 16 bytes.
    MsrPolicy(Vec<u8>),
    /// A PV guest's width.
    PvInfo(PvWidth),
    /// Everything the guest can't change has come. Of a stream of version 2 this is made up where it would stand.
    StaticDataEnd,
    /// Where a PV guest's P2M is.
    P2mFrames(P2mFrames),
    /// Frames: [`Reader::page_entries`] has them, [`Reader::read_pages`] their contents.
    PageData,
    /// From here on pages are to be compared, not written.
    Verify,
    /// The time-stamp counter.
    TscInfo(TscInfo),
    /// A PV guest's shared info page.
    SharedInfo(Box<[u8; SHARED_INFO_LENGTH]>),
    /// State of a PV guest's virtual CPU.
    Vcpu(VcpuState),
    /// Xen's own blob of an HVM guest.
    HvmContext(Vec<u8>),
    /// An HVM guest's parameters; may be empty.
    HvmParams(Vec<HvmParam>),
    /// Ours: page contents come on the lanes from here on.
    Lanes(Lanes),
    /// Ours: what has come on the lanes.
    LanesDone(LanesDone),
    /// Ours: on which disks pages are left.
    FrozenDisks(FrozenDisks),
    /// Ours: where frames stand there whose contents PAGE_DATA has left out, each for the first time.
    References(Vec<Reference>),
    /// An optional record. Whoever does not know its type passes over it.
    Optional {
        /// Its type, bit 31 set.
        number: u32,
        /// Its body, or none if that was longer than [`OPTIONAL_BYTES_MAX`] and has been skipped.
        body: Option<Vec<u8>>,
    },
    /// The last record.
    End,
}

const SHARED_INFO_LENGTH: usize = 4096;
const _: () = assert!(SHARED_INFO_BYTES == 4096);

/// Reads a libxc stream.
#[derive(Debug)]
pub struct Reader<R> {
    input: Input<R>,
    version: u32,
    domain: DomainHeader,
    order: Order,
    judge: Judge,
    /// A record's header that waits behind a STATIC_DATA_END that was made up.
    held: Option<Header>,
    entries: Vec<PageEntry>,
    raw_entries: Vec<u8>,
    scratch: Vec<u64>,
    /// Bytes of page contents not yet taken.
    contents_left: u64,
    at: u64,
    length: u32,
}

#[derive(Clone, Copy, Debug)]
struct Header {
    at: u64,
    number: u32,
    length: u32,
}

impl<R: Read> Reader<R> {
    /// Reads the two headers. `offset` is what errors and [`Self::offset`] count from: the bytes before the stream.
    ///
    /// # Errors
    /// Reading failed, or this is no libxc stream of version 2 or 3 of an x86 guest.
    pub fn start(inner: R, offset: u64) -> Result<Self, StreamError> {
        Self::judged(inner, offset, Judge::strict())
    }

    pub(crate) fn judged(inner: R, offset: u64, judge: Judge) -> Result<Self, StreamError> {
        let mut input = Input::new(inner, offset);
        let mut image = [0; IMAGE_HEADER_BYTES];
        input.exact(&mut image, "the image header")?;
        let version = decode_image_header(&image).map_err(|(at, f)| StreamError::new(offset + at, f))?;
        let start = input.offset();
        let mut domain = [0; DOMAIN_HEADER_BYTES];
        input.exact(&mut domain, "the domain header")?;
        let domain = DomainHeader::decode(&domain).map_err(|(at, f)| StreamError::new(start + at, f))?;
        let order = Order::new(version, domain.guest);
        Ok(Self {
            input,
            version,
            domain,
            order,
            judge,
            held: None,
            entries: Vec::new(),
            raw_entries: Vec::new(),
            scratch: Vec::new(),
            contents_left: 0,
            at: 0,
            length: 0,
        })
    }

    /// The stream's version, 2 or 3.
    #[must_use]
    pub fn version(&self) -> u32 {
        self.version
    }

    /// The domain header.
    #[must_use]
    pub fn domain(&self) -> DomainHeader {
        self.domain
    }

    /// The byte up to which has been read.
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.input.offset()
    }

    /// The byte at which the last record began, and its `body_length`.
    #[must_use]
    pub fn place(&self) -> (u64, u32) {
        (self.at, self.length)
    }

    /// What it reads from.
    #[must_use]
    pub fn get_ref(&self) -> &R {
        &self.input.inner
    }

    /// What it has read from; nothing of it is held here.
    #[must_use]
    pub fn into_inner(self) -> R {
        self.input.inner
    }

    pub(crate) fn into_judge(self) -> Judge {
        self.judge
    }

    /// Reads the next record; of PAGE_DATA only up to the contents. Asserts that the contents of the last record
    /// have been taken, and that it was not END.
    ///
    /// # Errors
    /// Reading failed, the stream is cut off, or the record is wrong in itself or in its place. The stream can't be
    /// gone on with then.
    pub fn next_record(&mut self) -> Result<Record, StreamError> {
        assert!(self.contents_left == 0, "{} bytes of page contents have not been read", self.contents_left);
        assert!(!self.order.ended(), "there is nothing behind END");
        loop {
            let header = match self.held.take() {
                Some(header) => header,
                None => self.header()?,
            };
            (self.at, self.length) = (header.at, header.length);
            let Some(kind) = Kind::from_number(header.number) else {
                match self.foreign(header)? {
                    Some(record) => return Ok(record),
                    None => continue,
                }
            };
            if self.order.infers_static_data_end(kind) {
                self.order.infer_static_data_end();
                self.held = Some(header);
                self.length = 0;
                return Ok(Record::StaticDataEnd);
            }
            if let Some(record) = self.known(kind, header)? {
                return Ok(record);
            }
        }
    }

    fn header(&mut self) -> Result<Header, StreamError> {
        let at = self.input.offset();
        let mut bytes = [0; 8];
        self.input.exact(&mut bytes, RECORD_HEADER).map_err(|mut error| {
            if matches!(error.fault, Fault::Truncated { missing: 8, .. }) {
                error.fault = Fault::NoEnd;
            }
            error
        })?;
        let header = Header { at, number: u32_at(&bytes, 0), length: u32_at(&bytes, 4) };
        if header.length > RECORD_BYTES_MAX {
            let (found, limit) = (u64::from(header.length), u64::from(RECORD_BYTES_MAX));
            return Err(StreamError::new(at + 4, Fault::Limit { what: "a record's length", found, limit }));
        }
        Ok(header)
    }

    /// A record of a type the specification does not have.
    fn foreign(&mut self, header: Header) -> Result<Option<Record>, StreamError> {
        let Header { at, number, length } = header;
        if number & OPTIONAL == 0 {
            self.judge.fault(at, Fault::Unknown { number })?;
            self.skip_body(length, "an unknown record")?;
            return Ok(None);
        }
        let body = if length <= OPTIONAL_BYTES_MAX {
            Some(self.input.body(usize_of(u64::from(length)), "an optional record")?)
        } else {
            self.input.skip(u64::from(length), "an optional record")?;
            None
        };
        self.padding(length, "an optional record")?;
        Ok(Some(Record::Optional { number, body }))
    }

    /// A record the specification has; none if it was at fault and faults are only collected.
    fn known(&mut self, kind: Kind, header: Header) -> Result<Option<Record>, StreamError> {
        let Header { at, length, .. } = header;
        if let Err(fault) = self.order.admit(kind) {
            self.judge.fault(at, fault)?;
            // What has no place here has no meaning here either.
            if matches!(kind, Kind::Toolstack | Kind::CheckpointDirtyPfns | Kind::Checkpoint) {
                self.skip_body(length, kind.name())?;
                return Ok(None);
            }
        }
        if let Err(fault) = kind.check_length(length) {
            self.judge.fault(at + 4, fault)?;
            self.skip_body(length, kind.name())?;
            if kind == Kind::End {
                self.order.end();
                return Ok(Some(Record::End));
            }
            return Ok(None);
        }
        if kind == Kind::PageData {
            return self.page_data(length);
        }
        let start = self.input.offset();
        let body = self.input.body(usize_of(u64::from(length)), kind.name())?;
        self.padding(length, kind.name())?;
        match self.decode(kind, body) {
            Ok(record) => Ok(Some(record)),
            Err((place, fault)) => self.judge.fault(start + place, fault).map(|()| None),
        }
    }

    fn decode(&mut self, kind: Kind, body: Vec<u8>) -> Result<Record, body::BodyFault> {
        // Without X86_PV_INFO the stream has been found wrong already, and is only looked through.
        let width = self.order.width().unwrap_or(PvWidth::Bits64);
        Ok(match kind {
            Kind::PvInfo => {
                let width = PvWidth::decode(&body)?;
                self.order.set_width(width);
                Record::PvInfo(width)
            }
            Kind::P2mFrames => Record::P2mFrames(P2mFrames::decode(&body, width)?),
            Kind::Vcpu(state) => {
                let state = VcpuState::decode(state, &body, width)?;
                self.order.admit_vcpu(state.kind, state.vcpu).map_err(|fault| (0, fault))?;
                Record::Vcpu(state)
            }
            Kind::SharedInfo => {
                let mut page = Box::new([0; SHARED_INFO_LENGTH]);
                page.copy_from_slice(&body);
                Record::SharedInfo(page)
            }
            Kind::TscInfo => Record::TscInfo(TscInfo::decode(&body)?),
            Kind::HvmContext => Record::HvmContext(body),
            Kind::HvmParams => Record::HvmParams(HvmParam::decode_all(&body)?),
            Kind::CpuidPolicy => Record::CpuidPolicy(body),
            Kind::MsrPolicy => Record::MsrPolicy(body),
            Kind::StaticDataEnd => Record::StaticDataEnd,
            Kind::Verify => Record::Verify,
            Kind::Lanes => Record::Lanes(Lanes::decode(&body)?),
            Kind::LanesDone => Record::LanesDone(LanesDone::decode(&body)?),
            Kind::FrozenDisks => {
                let frozen = FrozenDisks::decode(&body)?;
                self.order.set_frozen(&frozen);
                Record::FrozenDisks(frozen)
            }
            Kind::References => {
                let references = Reference::decode_all(&body)?;
                for (at, reference) in references.iter().enumerate() {
                    self.order.pay(reference).map_err(|fault| (frozen::place_of(at), fault))?;
                }
                Record::References(references)
            }
            Kind::End => {
                self.order.end();
                Record::End
            }
            Kind::PageData | Kind::Toolstack | Kind::Checkpoint | Kind::CheckpointDirtyPfns => {
                unreachable!("{} has been dealt with before", kind.name())
            }
        })
    }

    /// The entries of a PAGE_DATA record.
    fn page_data(&mut self, length: u32) -> Result<Option<Record>, StreamError> {
        const NAME: &str = "PAGE_DATA";
        let start = self.input.offset();
        let mut head = [0; 8];
        self.input.exact(&mut head, NAME)?;
        let (count, reserved) = (u32_at(&head, 0), u32_at(&head, 4));
        if reserved != 0 {
            self.judge.fault(start + 4, Fault::Reserved { field: NAME, found: u64::from(reserved) })?;
        }
        let wrong = if count == 0 {
            Some(Fault::Field { field: "PAGE_DATA's count", found: 0, expected: "1 or more" })
        } else if count > PAGES_READ_MAX {
            let (found, limit) = (u64::from(count), u64::from(PAGES_READ_MAX));
            Some(Fault::Limit { what: "the number of frames in PAGE_DATA", found, limit })
        } else if u64::from(length) < page_data_bytes(u64::from(count), 0) {
            let expected = format!("its {count} entries alone take {}", 8 * u64::from(count) + 8);
            Some(Fault::Length { record: NAME, found: u64::from(length), expected })
        } else {
            None
        };
        if let Some(fault) = wrong {
            self.judge.fault(start, fault)?;
            self.input.skip(u64::from(length) - 8, NAME)?;
            self.padding(length, NAME)?;
            return Ok(None);
        }
        let listed = self.entries(count, start + 8)?;
        let with_data = u64_of(self.entries.iter().filter(|entry| entry.has_data()).count());
        let expected = page_data_bytes(u64::from(count), with_data);
        if listed && u64::from(length) == expected {
            self.contents_left = PAGE_BYTES_U64 * with_data;
            return Ok(Some(Record::PageData));
        }
        // Where an entry could not be read, how many contents follow is not known either.
        if listed {
            let expected = format!("its {count} entries, {with_data} of them with contents, take {expected}");
            let fault = Fault::Length { record: NAME, found: u64::from(length), expected };
            self.judge.fault(start - 4, fault)?;
        }
        self.input.skip(u64::from(length) - page_data_bytes(u64::from(count), 0), NAME)?;
        self.padding(length, NAME)?;
        Ok(None)
    }

    /// Reads `count` entries; false if some were at fault and faults are only collected.
    fn entries(&mut self, count: u32, start: u64) -> Result<bool, StreamError> {
        let bytes = usize_of(8 * u64::from(count));
        self.input.body_into(&mut self.raw_entries, bytes, "PAGE_DATA's entries")?;
        self.entries.clear();
        let mut listed = true;
        for (index, raw) in self.raw_entries.chunks_exact(8).enumerate() {
            let decoded = PageEntry::decode(u64_at(raw, 0), index).and_then(|entry| {
                let table = matches!(entry.page_type(), page::PageType::Table { .. });
                if table && self.domain.guest == GuestType::Hvm {
                    return Err(Fault::TableInHvm { pfn: entry.pfn(), index });
                }
                Ok(entry)
            });
            match decoded {
                Ok(entry) => self.entries.push(entry),
                Err(fault) => {
                    listed = false;
                    self.judge.fault(start + 8 * u64_of(index), fault)?;
                }
            }
        }
        if let Some(pfn) = page::repeated(&self.entries, &mut self.scratch) {
            self.judge.fault(start, Fault::RepeatedPage { pfn })?;
        }
        self.order.name_pages(&self.entries);
        Ok(listed)
    }

    /// The frames and types of the last record, if that was PAGE_DATA; their numbers are distinct.
    #[must_use]
    pub fn page_entries(&self) -> &[PageEntry] {
        &self.entries
    }

    /// Bytes of page contents of this record not yet taken, a multiple of 4,096: those of the entries for which
    /// [`PageEntry::has_data`] holds, in their order.
    #[must_use]
    pub fn contents_left(&self) -> u64 {
        self.contents_left
    }

    /// Reads the next contents into `buffers`, which together have a multiple of 4,096 bytes. Asserts that there are
    /// as many left.
    ///
    /// # Errors
    /// Reading failed or the stream is cut off.
    pub fn read_pages(&mut self, buffers: &mut [IoSliceMut<'_>]) -> Result<(), StreamError> {
        let wanted = buffers.iter().map(|buffer| u64_of(buffer.len())).sum();
        self.take_contents(wanted);
        self.input.vectored(buffers, "a page's contents")
    }

    /// Has `read` take the next `pages` pages' contents from what this reads from, for memory that may not be a
    /// slice. It is called with that and the bytes it has read so far, as often as it takes, reads no more than are
    /// left of `pages`, and returns how many bytes it got, 0 at the end of the stream. On
    /// [`io::ErrorKind::Interrupted`] it is called again.
    ///
    /// # Errors
    /// `read` failed, or the stream is cut off.
    pub fn read_pages_with(
        &mut self,
        pages: usize,
        read: impl FnMut(&mut R, u64) -> io::Result<usize>,
    ) -> Result<(), StreamError> {
        let wanted = PAGE_BYTES_U64 * u64_of(pages);
        self.take_contents(wanted);
        self.input.pull(wanted, "a page's contents", read)
    }

    /// Drops what contents are left of this record.
    ///
    /// # Errors
    /// Reading failed or the stream is cut off.
    pub fn skip_pages(&mut self) -> Result<(), StreamError> {
        let left = self.contents_left;
        self.take_contents(left);
        self.input.skip(left, "a page's contents")
    }

    fn take_contents(&mut self, wanted: u64) {
        assert!(
            wanted.is_multiple_of(PAGE_BYTES_U64),
            "contents are read in whole pages, not {wanted} bytes"
        );
        assert!(
            wanted <= self.contents_left,
            "{wanted} bytes asked for, {} left in the record",
            self.contents_left
        );
        self.contents_left -= wanted;
    }

    fn skip_body(&mut self, length: u32, record: &'static str) -> Result<(), StreamError> {
        self.input.skip(u64::from(length), record)?;
        self.padding(length, record)
    }

    fn padding(&mut self, length: u32, record: &'static str) -> Result<(), StreamError> {
        let at = self.input.offset();
        let mut zeroes = [0; 8];
        let zeroes = &mut zeroes[..usize_of(u64::from(padding(length)))];
        self.input.exact(zeroes, record)?;
        if zeroes.iter().any(|&byte| byte != 0) {
            self.judge.fault(at, Fault::Padding { record })?;
        }
        Ok(())
    }
}
