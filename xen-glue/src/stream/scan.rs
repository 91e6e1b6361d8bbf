//! Walks a whole stream, whatever it is framed in: lists it, counts it, and names every fault by its byte.
//!
//! A fault within a record does not end the walk, only one after which records can't be told apart. Memory is bounded
//! by the limits of single records; page contents are looked at for zeroes and dropped.
#![forbid(unsafe_code)]

use std::io::{BufRead, IoSliceMut, Read};

use mover::units::{PAGE_BYTES, u64_of, usize_of};
use serde::Serialize;

use super::body::VcpuState;
use super::error::{Fault, StreamError};
use super::ferry::{OFFER, Offer};
use super::frozen::{FrozenDisks, Reference};
use super::input::Input;
use super::judge::Judge;
use super::kind::{CPUID_LEAF_BYTES, Kind, MSR_ENTRY_BYTES};
use super::libxl::{self, LibxlReader, LibxlRecord};
use super::page::PageEntry;
use super::reader::{Reader, Record};
use super::xl::{self, XlHeader};
use super::{header, limits};

/// Pages looked at in one go.
const BATCH_PAGES: usize = 256;

/// Which layer of a stream something belongs to.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Layer {
    /// xl's file header.
    Xl,
    /// libxl's header and records.
    Libxl,
    /// libxc's headers and records.
    Libxc,
}

/// A header or record, as it goes by.
#[derive(Clone, Debug, Serialize)]
pub struct Item {
    /// The byte it begins at.
    pub offset: u64,
    /// Whose it is.
    pub layer: Layer,
    /// The specification's name for it.
    pub name: String,
    /// Bytes of its body; of a header, of the whole.
    pub length: u64,
    /// What it says, in words; empty for markers.
    pub detail: String,
    /// Of PAGE_DATA, the frames.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pages: Option<Pages>,
    /// Of FROZEN_DISKS and REFERENCES, what they say.
    #[serde(skip)]
    pub left: Option<Left>,
}

/// Pages left on disks.
#[derive(Clone, Debug)]
pub enum Left {
    /// On these.
    On(FrozenDisks),
    /// There.
    At(Vec<Reference>),
}

/// Frames counted.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize)]
pub struct Pages {
    /// All entries.
    pub entries: u64,
    /// Those with contents.
    pub with_contents: u64,
    /// Those whose contents are nothing but zeroes.
    pub zero: u64,
    /// Entries by the specification's name of their type; none without any.
    pub by_type: Vec<(&'static str, u64)>,
    /// The highest frame number.
    pub highest: u64,
}

impl Pages {
    fn note(&mut self, entries: &[PageEntry], zero: u64) {
        self.zero += zero;
        self.entries += u64_of(entries.len());
        for entry in entries {
            self.with_contents += u64::from(entry.has_data());
            self.highest = self.highest.max(entry.pfn().0);
            self.count(entry.page_type().name(), 1);
        }
    }

    fn count(&mut self, name: &'static str, more: u64) {
        match self.by_type.iter_mut().find(|(known, _)| *known == name) {
            Some((_, count)) => *count += more,
            None => self.by_type.push((name, more)),
        }
    }

    /// Adds those of another record.
    pub fn add(&mut self, other: &Self) {
        self.entries += other.entries;
        self.with_contents += other.with_contents;
        self.zero += other.zero;
        self.highest = self.highest.max(other.highest);
        other.by_type.iter().for_each(|(name, count)| self.count(name, *count));
    }
}

/// A fault, with its byte.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Found {
    /// The byte.
    pub offset: u64,
    /// What is wrong, as a sentence.
    pub fault: String,
}

/// What a walk has found.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Survey {
    /// Layers from the outside in: "xl", "libxl", "libxc".
    pub framing: Vec<&'static str>,
    /// libxc's version of the format.
    pub version: Option<u32>,
    /// "PV" or "HVM".
    pub guest: Option<&'static str>,
    /// Xen's version where the guest was saved, as "4.17"; of a converted stream none.
    pub xen: Option<String>,
    /// Bytes walked.
    pub bytes: u64,
    /// libxc's records by name.
    pub records: Vec<(String, u64)>,
    /// All frames, those to be verified included.
    pub pages: Pages,
    /// Frames that stand on disks, and not in the stream.
    pub references: u64,
    /// Whether the walk came to the last END.
    pub complete: bool,
    /// Every fault, in the order of the bytes.
    pub faults: Vec<Found>,
    /// Faults beyond [`limits::FAULTS_KEPT_MAX`] of a layer.
    pub more_faults: u64,
}

impl Survey {
    fn note(&mut self, error: &StreamError) {
        self.faults.push(Found { offset: error.offset, fault: error.fault.to_string() });
    }

    fn take(&mut self, judge: Judge) {
        let (faults, more) = judge.into_faults();
        faults.iter().for_each(|fault| self.note(fault));
        self.more_faults += more;
    }

    fn count(&mut self, name: String) {
        match self.records.iter_mut().find(|(known, _)| *known == name) {
            Some((_, count)) => *count += 1,
            None => self.records.push((name, 1)),
        }
    }
}

/// Walks a stream to its end. `each` is given every header and record; an error of its own ends the walk.
///
/// # Errors
/// Reading failed, or `each` did.
pub fn scan<R: BufRead, E>(
    inner: R,
    each: &mut dyn FnMut(Item) -> Result<(), E>,
) -> Result<Survey, ScanError<E>> {
    scan_pages(inner, each, &mut |_| {})
}

/// The same; `look` is given the contents of each page besides.
///
/// # Errors
/// As [`scan`].
pub fn scan_pages<R: BufRead, E>(
    mut inner: R,
    each: &mut dyn FnMut(Item) -> Result<(), E>,
    look: &mut dyn FnMut(&[u8; PAGE_BYTES]),
) -> Result<Survey, ScanError<E>> {
    let mut survey = Survey::default();
    let mut walk = Walk { survey: &mut survey, each, look };
    match walk.outermost(&mut inner) {
        Ok(()) => {}
        Err(ScanError::Stream(error)) if error.is_io() => return Err(ScanError::Stream(error)),
        Err(ScanError::Stream(error)) => survey.note(&error),
        Err(error) => return Err(error),
    }
    survey.faults.sort_by_key(|found| found.offset);
    Ok(survey)
}

/// Why a walk broke off.
#[derive(Debug)]
pub enum ScanError<E> {
    /// Reading failed.
    Stream(StreamError),
    /// The caller's function failed.
    Each(E),
}

impl<E> From<StreamError> for ScanError<E> {
    fn from(error: StreamError) -> Self {
        Self::Stream(error)
    }
}

struct Walk<'a, E> {
    survey: &'a mut Survey,
    each: &'a mut dyn FnMut(Item) -> Result<(), E>,
    look: &'a mut dyn FnMut(&[u8; PAGE_BYTES]),
}

impl<E> Walk<'_, E> {
    fn show(&mut self, item: Item) -> Result<(), ScanError<E>> {
        (self.each)(item).map_err(ScanError::Each)
    }

    fn outermost<R: BufRead>(&mut self, inner: &mut R) -> Result<(), ScanError<E>> {
        let mut first = [0; 8];
        let mut probe = Input::new(&mut *inner, 0);
        probe.exact(&mut first, "the first header")?;
        let mut inner = first.chain(inner);
        let mut offset = 0;
        let mut libxl = u64::from_be_bytes(first) == libxl::IDENT;
        if xl::MAGIC.starts_with(&first) {
            self.survey.framing.push("xl");
            let (header, behind) = XlHeader::read(&mut inner, 0)?;
            let form = if header.json { "JSON" } else { "text" };
            let detail = format!("{} bytes of configuration ({form})", header.config.len());
            let name = "xl's file header".to_owned();
            let length = behind;
            self.show(Item { offset, layer: Layer::Xl, name, length, detail, pages: None, left: None })?;
            (offset, libxl) = (behind, header.libxl);
        } else if !libxl && u64::from_be_bytes(first) != header::MARKER {
            return Err(StreamError::new(0, Fault::NotAStream { found: first }).into());
        }
        self.survey.bytes = offset;
        let mut rest = if libxl {
            self.libxl(&mut inner, offset)?
        } else {
            let behind = self.libxc(&mut inner, offset)?;
            Input::new(&mut inner, behind)
        };
        self.survey.complete = true;
        if !rest.at_end()? {
            return Err(rest.fault(Fault::Trailing).into());
        }
        Ok(())
    }

    fn libxl<'r, R: Read>(
        &mut self,
        inner: &'r mut R,
        offset: u64,
    ) -> Result<Input<&'r mut R>, ScanError<E>> {
        self.survey.framing.push("libxl");
        let mut reader = LibxlReader::judged(inner, offset, Judge::lenient())?;
        let name = "libxl's header".to_owned();
        let detail =
            format!("version 2{}", if reader.converted() { ", converted from the older format" } else { "" });
        let length = u64_of(libxl::LIBXL_HEADER_BYTES);
        self.show(Item { offset, layer: Layer::Libxl, name, length, detail, pages: None, left: None })?;
        let ended = self.libxl_records(&mut reader);
        self.survey.bytes = self.survey.bytes.max(reader.offset());
        let (inner, behind, judge) = reader.into_parts();
        self.survey.take(judge);
        ended.map(|()| Input::new(inner, behind))
    }

    fn libxl_records<R: Read>(&mut self, reader: &mut LibxlReader<R>) -> Result<(), ScanError<E>> {
        loop {
            let record = reader.next_record()?;
            let (offset, length) = reader.place();
            let detail = match &record {
                LibxlRecord::EmulatorXenstoreData { emulator, data } => {
                    let pairs = data.iter().filter(|&&byte| byte == 0).count() / 2;
                    format!("{}, index {}: {pairs} keys", emulator.name(), emulator.index)
                }
                LibxlRecord::EmulatorContext { emulator, data } => {
                    format!("{}, index {}: {} bytes", emulator.name(), emulator.index, data.len())
                }
                LibxlRecord::LibxcContext | LibxlRecord::End => String::new(),
            };
            let (name, length) = (record.name().to_owned(), u64::from(length));
            self.show(Item { offset, layer: Layer::Libxl, name, length, detail, pages: None, left: None })?;
            match record {
                LibxlRecord::End => return Ok(()),
                LibxlRecord::LibxcContext => {
                    let at = reader.offset();
                    let behind = self.libxc(reader.inner(), at)?;
                    reader.libxc_read(behind);
                }
                _ => {}
            }
        }
    }

    /// Walks a libxc stream; returns the byte behind it.
    fn libxc<R: Read>(&mut self, inner: &mut R, offset: u64) -> Result<u64, ScanError<E>> {
        if !self.survey.framing.contains(&"libxc") {
            self.survey.framing.push("libxc");
        }
        let mut reader = Reader::judged(inner, offset, Judge::lenient())?;
        let domain = reader.domain();
        let xen = format!("{}.{}", domain.xen_major, domain.xen_minor);
        self.survey.version = Some(reader.version());
        self.survey.guest = Some(domain.guest.name());
        self.survey.xen = (domain.xen_major != 0).then(|| xen.clone());
        let by = if domain.xen_major == 0 { "the converter".to_owned() } else { format!("Xen {xen}") };
        let detail = format!("version {}, {} guest, by {by}", reader.version(), domain.guest.name());
        let length = u64_of(header::IMAGE_HEADER_BYTES + header::DOMAIN_HEADER_BYTES);
        let name = "libxc's headers".to_owned();
        self.show(Item { offset, layer: Layer::Libxc, name, length, detail, pages: None, left: None })?;
        let ended = self.libxc_records(&mut reader);
        let behind = reader.offset();
        self.survey.bytes = self.survey.bytes.max(behind);
        self.survey.take(reader.into_judge());
        ended.map(|()| behind)
    }

    fn libxc_records<R: Read>(&mut self, reader: &mut Reader<R>) -> Result<(), ScanError<E>> {
        let mut buffer = vec![0; BATCH_PAGES * PAGE_BYTES];
        loop {
            let record = reader.next_record()?;
            let (offset, length) = reader.place();
            let mut pages = None;
            if let Record::PageData = record {
                let zero = count_zero(reader, &mut buffer, self.look)?;
                let mut counted = Pages::default();
                counted.note(reader.page_entries(), zero);
                self.survey.pages.add(&counted);
                pages = Some(counted);
            }
            let name = name_of(&record);
            self.survey.count(name.clone());
            let detail = pages.as_ref().map_or_else(|| detail_of(&record), pages_words);
            let (length, ended) = (u64::from(length), matches!(record, Record::End));
            let left = match record {
                Record::FrozenDisks(frozen) => Some(Left::On(frozen)),
                Record::References(references) => {
                    self.survey.references += u64_of(references.len());
                    Some(Left::At(references))
                }
                _ => None,
            };
            self.show(Item { offset, layer: Layer::Libxc, name, length, detail, pages, left })?;
            if ended {
                return Ok(());
            }
        }
    }
}

/// Takes the contents of a PAGE_DATA record; returns how many pages are nothing but zeroes.
fn count_zero<R: Read>(
    reader: &mut Reader<R>,
    buffer: &mut [u8],
    look: &mut dyn FnMut(&[u8; PAGE_BYTES]),
) -> Result<u64, StreamError> {
    let mut zero = 0;
    while reader.contents_left() > 0 {
        let bytes = usize_of(reader.contents_left()).min(buffer.len());
        reader.read_pages(&mut [IoSliceMut::new(&mut buffer[..bytes])])?;
        let (pages, _) = buffer[..bytes].as_chunks::<PAGE_BYTES>();
        zero += u64_of(pages.iter().filter(|page| page.iter().all(|&byte| byte == 0)).count());
        pages.iter().for_each(&mut *look);
    }
    Ok(zero)
}

fn name_of(record: &Record) -> String {
    let kind = match record {
        Record::CpuidPolicy(_) => Kind::CpuidPolicy,
        Record::MsrPolicy(_) => Kind::MsrPolicy,
        Record::PvInfo(_) => Kind::PvInfo,
        Record::StaticDataEnd => Kind::StaticDataEnd,
        Record::P2mFrames(_) => Kind::P2mFrames,
        Record::PageData => Kind::PageData,
        Record::Verify => Kind::Verify,
        Record::TscInfo(_) => Kind::TscInfo,
        Record::SharedInfo(_) => Kind::SharedInfo,
        Record::Vcpu(state) => Kind::Vcpu(state.kind),
        Record::HvmContext(_) => Kind::HvmContext,
        Record::HvmParams(_) => Kind::HvmParams,
        Record::End => Kind::End,
        Record::Lanes(_) => Kind::Lanes,
        Record::LanesDone(_) => Kind::LanesDone,
        Record::FrozenDisks(_) => Kind::FrozenDisks,
        Record::References(_) => Kind::References,
        Record::Optional { number: OFFER, .. } => return "OFFER".to_owned(),
        Record::Optional { number, .. } => return format!("optional {number:#010x}"),
    };
    kind.name().to_owned()
}

fn detail_of(record: &Record) -> String {
    match record {
        Record::CpuidPolicy(leaves) => {
            format!("{} leaves", u64_of(leaves.len()) / u64::from(CPUID_LEAF_BYTES))
        }
        Record::MsrPolicy(entries) => {
            format!("{} registers", u64_of(entries.len()) / u64::from(MSR_ENTRY_BYTES))
        }
        Record::PvInfo(width) => {
            format!("{}-bit, {} levels of page tables", u32::from(width.bytes()) * 8, width.levels())
        }
        Record::P2mFrames(p2m) => {
            format!("pfns {:#x} to {:#x} in {} frames", p2m.start, p2m.end, p2m.frames.len())
        }
        Record::TscInfo(tsc) => {
            format!("mode {}, {} kHz, {} ns, incarnation {}", tsc.mode, tsc.khz, tsc.nsec, tsc.incarnation)
        }
        Record::Vcpu(VcpuState { vcpu, context, .. }) => {
            format!("virtual CPU {vcpu}, {} bytes", context.len())
        }
        Record::HvmParams(params) => {
            let words: Vec<_> =
                params.iter().map(|param| format!("{}={:#x}", param.index, param.value)).collect();
            words.join(" ")
        }
        Record::Lanes(lanes) => {
            let frames: u64 = lanes.populated.iter().map(|run| run.end - run.start).sum();
            format!(
                "{frames} frames with memory in {} runs, all below {:#x}",
                lanes.populated.len(),
                lanes.pages
            )
        }
        Record::LanesDone(done) => {
            format!(
                "{} frames on the lanes, up to version {}, round {}",
                done.frames, done.version, done.round
            )
        }
        Record::FrozenDisks(frozen) => {
            let words: Vec<_> = frozen
                .disks
                .iter()
                .map(|disk| format!("{} ({}, {} bytes)", disk.name, disk.path, disk.bytes))
                .collect();
            words.join(", ")
        }
        Record::References(references) => {
            let first = references.first().map(|first| first.block);
            let from =
                first.map(|block| format!(", from sector {} of disk {} on", block.sector.0, block.disk.0));
            format!("{} frames by where they stand{}", references.len(), from.unwrap_or_default())
        }
        Record::Optional { number: OFFER, body: Some(body) } => match Offer::decode(body) {
            Ok(offer) => {
                let how = if offer.fingerprint.is_some() { "under TLS" } else { "in the clear" };
                format!("{} lanes {how} at {}", offer.lanes, offer.addresses.join(", "))
            }
            Err(why) => format!("no good: {why}"),
        },
        Record::Optional { body: None, .. } => {
            format!("more than {} bytes, passed over", limits::OPTIONAL_BYTES_MAX)
        }
        Record::StaticDataEnd
        | Record::PageData
        | Record::Verify
        | Record::SharedInfo(_)
        | Record::HvmContext(_)
        | Record::Optional { .. }
        | Record::End => String::new(),
    }
}

/// Frames in words, as "1024 frames up to 0x3ff: 1000 NOTAB, 24 XTAB; contents of 30 all zero".
#[must_use]
pub fn pages_words(pages: &Pages) -> String {
    let types: Vec<_> = pages.by_type.iter().map(|(name, count)| format!("{count} {name}")).collect();
    let zero = if pages.zero > 0 { format!("; contents of {} all zero", pages.zero) } else { String::new() };
    format!("{} frames up to {:#x}: {}{zero}", pages.entries, pages.highest, types.join(", "))
}
