//! What can be wrong with a migration stream, and where.
#![forbid(unsafe_code)]

use std::io;

use mover::units::Pfn;
use thiserror::Error;

/// A fault of a stream, or of reading or writing it, at its byte.
#[derive(Debug, Error)]
#[error("at byte {offset} ({offset:#x}): {fault}")]
pub struct StreamError {
    /// Bytes from the start of the file, or of what this process has seen of the stream, to the field at fault.
    pub offset: u64,
    /// What is wrong.
    #[source]
    pub fault: Fault,
}

impl StreamError {
    pub(crate) fn new(offset: u64, fault: Fault) -> Self {
        Self { offset, fault }
    }

    /// Whether reading or writing failed, rather than what was read.
    #[must_use]
    pub fn is_io(&self) -> bool {
        matches!(self.fault, Fault::Io { .. })
    }
}

/// What is wrong with a stream.
#[derive(Debug, Error)]
pub enum Fault {
    /// The system call failed.
    #[error("{doing} failed: {source}")]
    Io {
        /// "reading the stream", "writing the stream".
        doing: &'static str,
        /// The cause.
        source: io::Error,
    },
    /// The stream is cut off within something.
    #[error(
        "the stream is cut off: {what} lacks {missing} bytes. Has the other end failed, or the file been truncated?"
    )]
    Truncated {
        /// What was being read.
        what: &'static str,
        /// Bytes that did not come.
        missing: u64,
    },
    /// The stream is cut off between records.
    #[error("the stream ends without an END record. Has the other end failed, or the file been truncated?")]
    NoEnd,
    /// Bytes behind the last record of a file.
    #[error("there are bytes behind the END record, where the file should end")]
    Trailing,
    /// Nothing of this module's.
    #[error(
        "this is no xl, libxl or libxc stream (it begins with {found:02x?}). Xen 4.5 and older wrote another \
         format: convert it with Xen's `convert-legacy-stream`"
    )]
    NotAStream {
        /// The first bytes.
        found: [u8; 8],
    },
    /// A field with a fixed value has another one.
    #[error("{field} is {found:#x} where only {expected} will do")]
    Field {
        /// Which one.
        field: &'static str,
        /// Its value.
        found: u64,
        /// What it may be.
        expected: &'static str,
    },
    /// A stream of a big-endian machine.
    #[error("the stream is big-endian; x86 machines write little-endian ones")]
    BigEndian,
    /// Reserved bits or bytes are set.
    #[error("reserved bits of {field} are set ({found:#x})")]
    Reserved {
        /// Of what.
        field: &'static str,
        /// Their value.
        found: u64,
    },
    /// The bytes between a body and the next record are not zero.
    #[error("the padding behind {record} is not zero")]
    Padding {
        /// The record's name.
        record: &'static str,
    },
    /// A body's length is not one this record can have.
    #[error("{record} has a body of {found} bytes; {expected}")]
    Length {
        /// The record's name.
        record: &'static str,
        /// Its `body_length`.
        found: u64,
        /// What it may be, as a clause.
        expected: String,
    },
    /// A number is past its limit.
    #[error("{what} is {found}; the limit here is {limit}")]
    Limit {
        /// Which one.
        what: &'static str,
        /// Its value.
        found: u64,
        /// The limit.
        limit: u64,
    },
    /// A mandatory record nobody here knows.
    #[error(
        "record type {number:#010x} is mandatory and unknown here. The stream comes from a newer Xen or an extension; \
         restore it there"
    )]
    Unknown {
        /// Its type.
        number: u32,
    },
    /// A record that has no place in a stream of this kind.
    #[error("{record} does not belong into {stream}")]
    Misplaced {
        /// The record's name.
        record: &'static str,
        /// What kind of stream.
        stream: &'static str,
    },
    /// A record before one it depends on.
    #[error("{record} comes before {needs}, which it depends on")]
    Early {
        /// The record's name.
        record: &'static str,
        /// The one that is missing.
        needs: &'static str,
    },
    /// A record behind one that closes its part of the stream.
    #[error("{record} comes after {closed_by}")]
    Late {
        /// The record's name.
        record: &'static str,
        /// What ended its part.
        closed_by: &'static str,
    },
    /// A record that may come once, again.
    #[error("{record} comes a second time")]
    Repeated {
        /// The record's name.
        record: &'static str,
    },
    /// A virtual CPU's record, again.
    #[error("{record} comes a second time for virtual CPU {vcpu}")]
    RepeatedVcpu {
        /// The record's name.
        record: &'static str,
        /// The CPU.
        vcpu: u32,
    },
    /// The stream ends without a record a guest needs.
    #[error("the stream ends without {record}, without which the guest can't be restored")]
    Missing {
        /// The record's name.
        record: &'static str,
    },
    /// A reference to a frame whose contents were to come otherwise.
    #[error("a reference names {pfn}, whose contents no PAGE_DATA has left to one")]
    NotOwed {
        /// The frame.
        pfn: Pfn,
    },
    /// Frames whose contents were to come by reference.
    #[error(
        "the stream ends, and {count} frames that were to come by reference have not, the first is {first}"
    )]
    Owed {
        /// How many.
        count: u64,
        /// The first.
        first: Pfn,
    },
    /// A page type that does not exist.
    #[error("{pfn} (entry {index}) has the reserved page type {found:#x}")]
    PageType {
        /// The frame.
        pfn: Pfn,
        /// Its place in the record.
        index: usize,
        /// The four bits.
        found: u8,
    },
    /// A page table in a guest whose page tables Xen does not know.
    #[error("{pfn} (entry {index}) is typed as a page table, which only PV guests have")]
    TableInHvm {
        /// The frame.
        pfn: Pfn,
        /// Its place in the record.
        index: usize,
    },
    /// The same frame twice in one record.
    #[error("{pfn} stands in the record twice")]
    RepeatedPage {
        /// The frame.
        pfn: Pfn,
    },
    /// Text that should end with a NUL, or pairs that are not.
    #[error("{what}")]
    Text {
        /// The rule, as a sentence.
        what: &'static str,
    },
    /// Fewer or more bytes than pages with contents.
    #[error("{pages} pages have contents, yet {bytes} bytes were given for them")]
    Payload {
        /// Entries with contents.
        pages: usize,
        /// Bytes given.
        bytes: u64,
    },
}
