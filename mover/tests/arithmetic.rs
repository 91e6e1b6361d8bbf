//! Index arithmetic and codecs, tried in full where the domain is small enough: no sampling, no luck. What is too large for that
//! has its properties beside the code, and its fuzzer.

use mover::bitmap::Bitmap;
use mover::limits::{CONTROL_MESSAGE_BYTES_MAX, DISKS_MAX};
use mover::pipeline::work::{self, Round};
use mover::units::{BlockAddress, DiskId, Pfn, Sector, Version};
use mover::wire::control::{self, Message};
use mover::wire::frame::{self, Header, Kind, TABLE_BYTES_MAX, pack_place, unpack_place};
use mover::wire::hello::{Hello, MigrationId, Purpose, Secret, Welcome};

/// Every kind, and every count around each limit: what is taken is within its limits, fits a table and is written back as it came.
#[test]
fn every_frame_header_is_within_its_limits_or_refused() {
    let kinds = [Kind::Data, Kind::Zero, Kind::References, Kind::Digests, Kind::Barrier];
    let (lane, round, version, sequence) = (3, 7, Version(9), 11);
    let valid = Header { kind: Kind::Barrier, lane, count: 0, round, version, sequence }.encode();
    let mut taken = 0;
    for kind in 0..=u8::MAX {
        for count in (0..1100_u32).chain([u32::MAX, 1 << 31, 1 << 16]) {
            let mut bytes = valid;
            bytes[4] = kind;
            bytes[8..12].copy_from_slice(&count.to_le_bytes());
            let Ok(header) = Header::decode(&bytes) else { continue };
            taken += 1;
            assert!(kinds.contains(&header.kind));
            assert_eq!(u32::try_from(header.count), Ok(count));
            assert!(
                header.count <= header.kind.limit() && (header.count > 0) == (header.kind != Kind::Barrier)
            );
            assert_eq!(header.table_bytes(), header.count * header.kind.entry_bytes());
            let filled = frame::HEADER_BYTES + header.filled_table_bytes();
            assert!(
                filled.is_multiple_of(frame::ALIGNMENT) && header.filled_table_bytes() <= TABLE_BYTES_MAX
            );
            assert!(header.filled_table_bytes() - header.table_bytes() < frame::ALIGNMENT);
            assert_eq!(header.encode(), bytes);
        }
    }
    let all: usize = kinds.iter().map(|kind| if *kind == Kind::Barrier { 1 } else { kind.limit() }).sum();
    assert_eq!(taken, all, "no valid header is refused");
}

/// Every one of the 65,536 kinds, with lengths around the limit.
#[test]
fn every_message_header_is_within_its_limits_or_refused() {
    let most = u32::try_from(CONTROL_MESSAGE_BYTES_MAX).unwrap();
    let mut kinds = 0;
    for kind in 0..=u16::MAX {
        for length in [0, 1, most - 1, most, most + 1, u32::MAX] {
            let mut bytes = [0; control::HEADER_BYTES];
            bytes[..2].copy_from_slice(&kind.to_le_bytes());
            bytes[4..].copy_from_slice(&length.to_le_bytes());
            match Message::header(&bytes) {
                Ok((found, found_length)) => {
                    assert_eq!((found, u32::try_from(found_length)), (kind, Ok(length)));
                    assert!(length <= most);
                    kinds += u32::from(length == 0);
                }
                Err(_) => assert!(length > most || Message::decode(kind, &[]).is_err(), "kind {kind}"),
            }
        }
    }
    assert_eq!(kinds, 17);
}

/// Every purpose and lane, every verdict.
#[test]
fn every_greeting_is_read_back_or_refused() {
    let hello = Hello::new(Purpose::Control, MigrationId([1; 16]), Secret::of(&[2; 32])).encode();
    let welcome = Welcome::refuse(mover::wire::hello::Verdict::Busy).encode();
    for first in 0..=u8::MAX {
        for second in 0..=u8::MAX {
            let mut bytes = hello;
            (bytes[8], bytes[9]) = (first, second);
            match Hello::decode(&bytes).map(|hello| hello.purpose) {
                Ok(Purpose::Control) => assert_eq!(first, 0),
                Ok(Purpose::Lane(lane)) => assert_eq!((first, second), (1, lane)),
                Ok(Purpose::Resume) => assert_eq!(first, 2),
                Err(_) => assert!(first > 2),
            }
        }
        let mut bytes = welcome;
        bytes[8] = first;
        match Welcome::decode(&bytes) {
            Ok(welcome) => assert!(welcome.encode() == bytes && first < 5 && first != 3),
            Err(_) => assert!(first >= 5 || first == 3),
        }
    }
}

/// Every disk, with sectors around every power of two.
#[test]
fn places_are_packed_without_loss() {
    for disk in (0..DISKS_MAX).map(|disk| u8::try_from(disk).unwrap()) {
        for shift in 0..56 {
            for sector in [(1_u64 << shift) - 1, 1 << shift, (1 << shift) + 1] {
                let block = BlockAddress { disk: DiskId(disk), sector: Sector(sector & ((1 << 56) - 1)) };
                assert_eq!(unpack_place(pack_place(block)), block);
            }
        }
    }
}

/// The round's walk over its words, for every size up to where its stripes have two pieces: every page once, hot ones last.
#[test]
fn every_round_hands_out_every_page_once() {
    for pages in 1..=64 * 4 * 16 * 2 + 1 {
        if pages > 600 && pages % 61 != 0 {
            continue;
        }
        let (mut all, mut hot) = (Bitmap::new(pages), Bitmap::new(pages));
        all.set_all();
        (0..pages).step_by(7).for_each(|at| {
            hot.set(at);
        });
        let round = Round::new(1, work::Purpose::Live, &all, Some(&hot));
        let (mut order, mut batch): (Vec<Pfn>, _) = (Vec::new(), Vec::with_capacity(256));
        loop {
            round.take(&mut batch, None);
            if batch.is_empty() {
                break;
            }
            order.append(&mut batch);
            batch.reserve(256);
        }
        let cold = pages - pages.div_ceil(7);
        assert!(order[cold..].iter().all(|pfn| pfn.0 % 7 == 0), "{pages} pages: a hot page goes early");
        order.sort_unstable();
        assert!(order.iter().map(|pfn| pfn.0).eq(0..u64::try_from(pages).unwrap()), "{pages} pages");
        assert_eq!(round.left(), 0);
    }
}
