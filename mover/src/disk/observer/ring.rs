//! The kernel's trace ring, as `trace_pipe_raw` gives it: which sectors a `block_bio_queue` event names.
//!
//! ```text
//!     page:   time u64 | length and flags u64 | records...
//!     record: kind (5 bits), time (27 bits) | 1..=28: as many words of data; 0: bytes u32, then data; 29: padding; 30, 31: time, 8 bytes
//!     data:   event's number u16 ... | fields where the event's `format` says
//! ```
//! Source: Linux' `include/linux/ring_buffer.h`, `Documentation/trace/events.rst`; the layout of pages is told by
//! `events/header_page` and `header_event`, and has not changed since 2.6.37.
#![forbid(unsafe_code)]

use crate::units::{u64_of, usize_of};

/// Bytes of a page of the ring.
pub(super) const PAGE: usize = 4096;
/// Bytes before its first record.
const HEAD: usize = 16;
/// The length, in the page's second word; and the flag that events before it were lost.
const LENGTH: u64 = 0xf_ffff;
const LOST: u64 = 1 << 31;
/// Kinds of records that hold no event.
const PADDING: u32 = 29;
const TIME: u32 = 30;

/// Where an event has what is asked of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Event {
    number: u16,
    sector: usize,
    count: usize,
}

impl Event {
    /// From the event's `format`.
    pub(super) fn parse(format: &str) -> Option<Self> {
        let after = |text: &str, key: &str| -> Option<usize> {
            let rest = text.split(key).nth(1)?;
            rest.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
        };
        let number = format.lines().find_map(|line| line.strip_prefix("ID: "))?.trim().parse().ok()?;
        let field = |name: &str, size: usize| {
            let line = format.lines().find(|line| line.contains(&format!(" {name};")))?;
            let offset = after(line, "offset:")?;
            (after(line, "size:")? == size && offset < PAGE).then_some(offset)
        };
        Some(Self { number, sector: field("sector", 8)?, count: field("nr_sector", 4)? })
    }
}

/// What one page held.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Page {
    /// Everything up to here.
    Whole,
    /// Events are missing before it, or it can't be read as what it should be.
    Lost,
}

/// Gives `each` the first sector and the number of sectors of every event in `page`.
pub(super) fn read(page: &[u8], event: &Event, each: &mut dyn FnMut(u64, u64)) -> Page {
    let Some(flags) = word::<8>(page, 8) else { return Page::Lost };
    let Some(records) = page.get(HEAD..).and_then(|rest| rest.get(..usize_of(flags & LENGTH))) else {
        return Page::Lost;
    };
    let mut left = records;
    while !left.is_empty() {
        let Some(used) = record(left, event, each) else { return Page::Lost };
        // Padding to the page's end has no length.
        left = left.get(used..).unwrap_or_default();
    }
    if flags & LOST == 0 { Page::Whole } else { Page::Lost }
}

/// Reads the record at the beginning of `left`; its length, none if it has none.
fn record(left: &[u8], event: &Event, each: &mut dyn FnMut(u64, u64)) -> Option<usize> {
    let head = u32::try_from(word::<4>(left, 0)?).ok()?;
    let (kind, time) = (head & 31, head >> 5);
    let (from, length) = match kind {
        PADDING if time == 0 => return Some(left.len()),
        PADDING => return Some(4 + usize_of(word::<4>(left, 4)?)),
        TIME.. => return Some(8),
        0 => (8, usize_of(word::<4>(left, 4)?).checked_sub(4)?),
        words => (4, usize_of(u64::from(words)) * 4),
    };
    let data = left.get(from..from + length)?;
    if word::<2>(data, 0)? == u64::from(event.number) {
        each(word::<8>(data, event.sector)?, word::<4>(data, event.count)?);
    }
    Some(from + length.next_multiple_of(4))
}

/// A little-endian number of `N` bytes at `at`.
fn word<const N: usize>(bytes: &[u8], at: usize) -> Option<u64> {
    let mut wide = [0; 8];
    wide[..N].copy_from_slice(bytes.get(at..)?.get(..N)?);
    Some(u64::from_le_bytes(wide))
}

const _: () = assert!(u64_of(PAGE) <= LENGTH);

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// As Linux 6.18 tells it; in 6.1 `rwbs` is two bytes shorter.
    const FORMAT: &str = "name: block_bio_queue\nID: 2097\nformat:\n\
        \tfield:unsigned short common_type;\toffset:0;\tsize:2;\tsigned:0;\n\
        \tfield:dev_t dev;\toffset:8;\tsize:4;\tsigned:0;\n\
        \tfield:sector_t sector;\toffset:16;\tsize:8;\tsigned:0;\n\
        \tfield:unsigned int nr_sector;\toffset:24;\tsize:4;\tsigned:0;\n\
        \tfield:char rwbs[10];\toffset:28;\tsize:10;\tsigned:0;\n";

    fn event() -> Event {
        Event::parse(FORMAT).unwrap()
    }

    fn data(number: u16, sector: u64, count: u32) -> Vec<u8> {
        let mut data = vec![0; 56];
        data[..2].copy_from_slice(&number.to_le_bytes());
        data[16..24].copy_from_slice(&sector.to_le_bytes());
        data[24..28].copy_from_slice(&count.to_le_bytes());
        data
    }

    fn page(records: &[u8], flags: u64) -> Vec<u8> {
        let mut page = vec![0; HEAD];
        page[8..16].copy_from_slice(&(u64_of(records.len()) | flags).to_le_bytes());
        page.extend(records);
        page.resize(PAGE, 0xee);
        page
    }

    fn seen(page: &[u8]) -> (Vec<(u64, u64)>, Page) {
        let mut found = Vec::new();
        let how = read(page, &event(), &mut |sector, count| found.push((sector, count)));
        (found, how)
    }

    #[test]
    fn records_of_every_kind_are_read() {
        assert_eq!(event(), Event { number: 2097, sector: 16, count: 24 });
        let short = |number, sector| [14_u32.to_le_bytes().to_vec(), data(number, sector, 8)].concat();
        let records = [
            [30_u32.to_le_bytes(), [9; 4]].concat(),
            short(2097, 80),
            [(29_u32 | 1 << 5).to_le_bytes(), 4_u32.to_le_bytes(), [7; 4]].concat()[..8].to_vec(),
            short(2096, 1),
            [0_u32.to_le_bytes(), 60_u32.to_le_bytes()].concat(),
            data(2097, u64::MAX, u32::MAX),
            29_u32.to_le_bytes().to_vec(),
            vec![0xff; 40],
        ];
        let all = records.concat();
        assert_eq!(seen(&page(&all, 0)), (vec![(80, 8), (u64::MAX, u32::MAX.into())], Page::Whole));
        assert_eq!(seen(&page(&all, LOST)).1, Page::Lost);
        assert_eq!(seen(&page(&[], 0)), (Vec::new(), Page::Whole));
    }

    #[test]
    fn what_is_no_page_is_a_loss() {
        for bytes in [vec![], vec![0; 15], page(&[1, 2], 0), page(&[14, 0, 0, 0, 1, 2], 0)] {
            assert_eq!(seen(&bytes), (Vec::new(), Page::Lost));
        }
        assert_eq!(seen(&page(&[0, 0, 0, 0, 3, 0, 0, 0], 0)).1, Page::Lost, "shorter than its own length");
        assert_eq!(seen(&page(&[], LENGTH)).1, Page::Lost, "longer than the page");
        for bad in
            ["", "ID: 7", "ID: 70000\n sector;\toffset:1;\tsize:8;", &FORMAT.replace("size:8", "size:4")]
        {
            assert_eq!(Event::parse(bad), None, "{bad}");
        }
    }

    proptest! {
        #[test]
        fn any_page_is_read_to_its_end(bytes in prop::collection::vec(any::<u8>(), 0..300), length in 0_u64..400) {
            let mut page = vec![0; HEAD];
            page[8..16].copy_from_slice(&length.to_le_bytes());
            page.extend(bytes);
            let mut events = 0_usize;
            read(&page, &event(), &mut |_, _| events += 1);
            prop_assert!(events <= page.len() / 8);
        }
    }
}
