//! libxl's stream around libxc's.
//!
//! ```text
//!   header, big-endian:   ident "LibxlFmt" | u32 version 2 | u32 options
//!   records, as libxc's:  LIBXC_CONTEXT (empty; libxc's whole stream stands behind it)
//!                         EMULATOR_XENSTORE_DATA, EMULATOR_CONTEXT (of HVM guests with a device model)
//!                         END
//! ```
//!
//! Source: `docs/specs/libxl-migration-stream.pandoc`. libxl refuses every record it does not know, optional ones
//! included, and so does this.
#![forbid(unsafe_code)]

use std::io::Read;

use mover::units::{u64_of, usize_of};

use super::error::{Fault, StreamError};
use super::fields::{bytes_at, padding, u32_at};
use super::input::Input;
use super::judge::Judge;
use super::limits::EMULATOR_BYTES_MAX;
use super::reader::Reader;

pub(crate) const IDENT: u64 = 0x4c69_6278_6c46_6d74;
/// Bytes of libxl's header.
pub const LIBXL_HEADER_BYTES: usize = 16;
const VERSION: u32 = 2;
const BIG_ENDIAN: u32 = 1;
const LEGACY: u32 = 2;

const END: u32 = 0;
const LIBXC_CONTEXT: u32 = 1;
const EMULATOR_XENSTORE_DATA: u32 = 2;
const EMULATOR_CONTEXT: u32 = 3;
const CHECKPOINT_END: u32 = 4;
const CHECKPOINT_STATE: u32 = 5;

/// A record of libxl's.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum LibxlRecord {
    /// libxc's stream follows: [`LibxlReader::libxc`].
    LibxcContext,
    /// Keys and values for the device model, each ended by a NUL, in turn.
    EmulatorXenstoreData {
        /// Which one.
        emulator: Emulator,
        /// The keys and values.
        data: Vec<u8>,
    },
    /// The device model's own state.
    EmulatorContext {
        /// Which one.
        emulator: Emulator,
        /// The state.
        data: Vec<u8>,
    },
    /// The last record.
    End,
}

/// A device model of a domain.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Emulator {
    /// 0 unknown, 1 QEMU traditional, 2 QEMU upstream.
    pub id: u32,
    /// Which of the domain's.
    pub index: u32,
}

impl Emulator {
    /// The name the specification gives the kind.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self.id {
            0 => "unknown",
            1 => "QEMU traditional",
            _ => "QEMU upstream",
        }
    }
}

impl LibxlRecord {
    /// The name the specification gives it.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::LibxcContext => name_of(LIBXC_CONTEXT),
            Self::EmulatorXenstoreData { .. } => name_of(EMULATOR_XENSTORE_DATA),
            Self::EmulatorContext { .. } => name_of(EMULATOR_CONTEXT),
            Self::End => name_of(END),
        }
    }

    /// The record's bytes. Emulator data is under [`EMULATOR_BYTES_MAX`].
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let (number, emulator, data): (u32, Option<Emulator>, &[u8]) = match self {
            Self::End => (END, None, &[]),
            Self::LibxcContext => (LIBXC_CONTEXT, None, &[]),
            Self::EmulatorXenstoreData { emulator, data } => (EMULATOR_XENSTORE_DATA, Some(*emulator), data),
            Self::EmulatorContext { emulator, data } => (EMULATOR_CONTEXT, Some(*emulator), data),
        };
        let head = if emulator.is_some() { 8 } else { 0 };
        let length = u32::try_from(data.len()).unwrap_or(u32::MAX).saturating_add(head);
        assert!(length <= EMULATOR_BYTES_MAX, "{} of {length} bytes", self.name());
        let mut out = Vec::with_capacity(24 + data.len());
        out.extend(number.to_le_bytes());
        out.extend(length.to_le_bytes());
        if let Some(Emulator { id, index }) = emulator {
            out.extend(id.to_le_bytes());
            out.extend(index.to_le_bytes());
        }
        out.extend(data);
        out.resize(out.len().next_multiple_of(8), 0);
        out
    }
}

fn name_of(number: u32) -> &'static str {
    match number {
        END => "libxl's END",
        LIBXC_CONTEXT => "LIBXC_CONTEXT",
        EMULATOR_XENSTORE_DATA => "EMULATOR_XENSTORE_DATA",
        EMULATOR_CONTEXT => "EMULATOR_CONTEXT",
        CHECKPOINT_END => "CHECKPOINT_END",
        CHECKPOINT_STATE => "CHECKPOINT_STATE",
        _ => "an unknown libxl record",
    }
}

/// libxl's header.
#[must_use]
pub fn libxl_header() -> [u8; LIBXL_HEADER_BYTES] {
    let mut out = [0; LIBXL_HEADER_BYTES];
    out[..8].copy_from_slice(&IDENT.to_be_bytes());
    out[8..12].copy_from_slice(&VERSION.to_be_bytes());
    out
}

/// Reads libxl's stream, and nothing behind it.
#[derive(Debug)]
pub struct LibxlReader<R> {
    input: Input<R>,
    judge: Judge,
    converted: bool,
    libxc_seen: bool,
    place: (u64, u32),
}

impl<R: Read> LibxlReader<R> {
    /// Reads the header. `offset` is what errors count from.
    ///
    /// # Errors
    /// Reading failed, or this is no libxl stream of version 2.
    pub fn start(inner: R, offset: u64) -> Result<Self, StreamError> {
        Self::judged(inner, offset, Judge::strict())
    }

    pub(crate) fn judged(inner: R, offset: u64, judge: Judge) -> Result<Self, StreamError> {
        let mut input = Input::new(inner, offset);
        let mut head = [0; LIBXL_HEADER_BYTES];
        input.exact(&mut head, "libxl's header")?;
        let error = |at: u64, fault| Err(StreamError::new(offset + at, fault));
        if u64::from_be_bytes(bytes_at(&head, 0)) != IDENT {
            return error(0, Fault::NotAStream { found: bytes_at(&head, 0) });
        }
        let version = u32::from_be_bytes(bytes_at(&head, 8));
        if version != VERSION {
            let (field, found) = ("the version in libxl's header", u64::from(version));
            return error(8, Fault::Field { field, found, expected: "2" });
        }
        let options = u32::from_be_bytes(bytes_at(&head, 12));
        if options & BIG_ENDIAN != 0 {
            return error(12, Fault::BigEndian);
        }
        if options & !LEGACY != 0 {
            let (field, found) = ("the options in libxl's header", u64::from(options & !LEGACY));
            return error(12, Fault::Reserved { field, found });
        }
        let converted = options & LEGACY != 0;
        Ok(Self { input, judge, converted, libxc_seen: false, place: (offset, 0) })
    }

    /// Whether it was converted from the format before Xen 4.6.
    #[must_use]
    pub fn converted(&self) -> bool {
        self.converted
    }

    /// The byte up to which has been read.
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.input.offset()
    }

    /// The byte at which the last record began, and its `body_length`.
    #[must_use]
    pub fn place(&self) -> (u64, u32) {
        self.place
    }

    /// What it has read from.
    #[must_use]
    pub fn into_inner(self) -> R {
        self.input.inner
    }

    pub(crate) fn into_parts(self) -> (R, u64, Judge) {
        let offset = self.input.offset();
        (self.input.inner, offset, self.judge)
    }

    /// libxc's stream, behind [`LibxlRecord::LibxcContext`]. Read it up to its END, then say so with
    /// [`Self::libxc_read`].
    ///
    /// # Errors
    /// As [`Reader::start`].
    pub fn libxc(&mut self) -> Result<Reader<&mut R>, StreamError> {
        let offset = self.input.offset();
        Reader::start(&mut self.input.inner, offset)
    }

    pub(crate) fn inner(&mut self) -> &mut R {
        &mut self.input.inner
    }

    /// libxc's stream has been read up to `offset`, that reader's [`Reader::offset`].
    pub fn libxc_read(&mut self, offset: u64) {
        self.input.continue_at(offset);
    }

    /// Reads the next record.
    ///
    /// # Errors
    /// Reading failed, the stream is cut off, or the record is wrong in itself or in its place.
    pub fn next_record(&mut self) -> Result<LibxlRecord, StreamError> {
        loop {
            if let Some(record) = self.record()? {
                return Ok(record);
            }
        }
    }

    /// One record; none if it was at fault and faults are only collected.
    fn record(&mut self) -> Result<Option<LibxlRecord>, StreamError> {
        let at = self.input.offset();
        let mut head = [0; 8];
        self.input.exact(&mut head, "a libxl record's header").map_err(|mut error| {
            if matches!(error.fault, Fault::Truncated { missing: 8, .. }) {
                error.fault = Fault::NoEnd;
            }
            error
        })?;
        let (number, length) = (u32_at(&head, 0), u32_at(&head, 4));
        self.place = (at, length);
        let record = name_of(number);
        if length > EMULATOR_BYTES_MAX {
            let (found, limit) = (u64::from(length), u64::from(EMULATOR_BYTES_MAX));
            let what = "the length of a libxl record";
            return Err(StreamError::new(at + 4, Fault::Limit { what, found, limit }));
        }
        let body = self.input.body(usize_of(u64::from(length)), record)?;
        let behind = self.input.offset();
        let mut zeroes = [0; 8];
        let zeroes = &mut zeroes[..usize_of(u64::from(padding(length)))];
        self.input.exact(zeroes, record)?;
        if zeroes.iter().any(|&byte| byte != 0) {
            self.judge.fault(behind, Fault::Padding { record })?;
        }
        match number {
            END | LIBXC_CONTEXT => self.marker(number, at, length).map(Some),
            EMULATOR_XENSTORE_DATA | EMULATOR_CONTEXT => self.emulator(number, at, body),
            CHECKPOINT_END | CHECKPOINT_STATE => {
                let stream = "a plain stream: Remus and COLO are left to Xen's own tools";
                self.judge.fault(at, Fault::Misplaced { record, stream }).map(|()| None)
            }
            _ => self.judge.fault(at, Fault::Unknown { number }).map(|()| None),
        }
    }

    fn marker(&mut self, number: u32, at: u64, length: u32) -> Result<LibxlRecord, StreamError> {
        let record = name_of(number);
        if length != 0 {
            let expected = "it has exactly 0".to_owned();
            self.judge.fault(at + 4, Fault::Length { record, found: u64::from(length), expected })?;
        }
        if number == END {
            if !self.libxc_seen {
                self.judge.fault(at, Fault::Missing { record: name_of(LIBXC_CONTEXT) })?;
            }
            return Ok(LibxlRecord::End);
        }
        if self.libxc_seen {
            self.judge.fault(at, Fault::Repeated { record })?;
        }
        self.libxc_seen = true;
        Ok(LibxlRecord::LibxcContext)
    }

    fn emulator(
        &mut self,
        number: u32,
        at: u64,
        mut body: Vec<u8>,
    ) -> Result<Option<LibxlRecord>, StreamError> {
        let record = name_of(number);
        if !self.libxc_seen {
            self.judge.fault(at, Fault::Early { record, needs: name_of(LIBXC_CONTEXT) })?;
        }
        let Some((head, _)) = body.split_first_chunk::<8>() else {
            let (found, expected) = (u64_of(body.len()), "it has at least 8".to_owned());
            return self.judge.fault(at + 4, Fault::Length { record, found, expected }).map(|()| None);
        };
        let emulator = Emulator { id: u32_at(head, 0), index: u32_at(head, 4) };
        if emulator.id > 2 {
            let (field, found) = ("the emulator's kind", u64::from(emulator.id));
            self.judge.fault(at + 8, Fault::Field { field, found, expected: "0, 1 or 2" })?;
        }
        let data = body.split_off(8);
        if number == EMULATOR_CONTEXT {
            return Ok(Some(LibxlRecord::EmulatorContext { emulator, data }));
        }
        let strings = data.iter().filter(|&&byte| byte == 0).count();
        if data.last().is_some_and(|&byte| byte != 0) || strings % 2 != 0 {
            let what = "EMULATOR_XENSTORE_DATA is not pairs of strings, each ended by a NUL";
            self.judge.fault(at + 16, Fault::Text { what })?;
        }
        Ok(Some(LibxlRecord::EmulatorXenstoreData { emulator, data }))
    }
}
