use super::*;
use crate::kernel::uffd::tests::{Pair, check_against_c, skipped};
use crate::kernel::uffd::{self, Features, Userfaultfd, Watch};
use crate::units::Pfn;

#[test]
fn the_abi_is_the_c_headers() {
    let ours = [
        ("PAGEMAP_SCAN", u64::from(PAGEMAP_SCAN)),
        ("PAGE_IS_WRITTEN", PAGE_IS_WRITTEN),
        ("PM_SCAN_WP_MATCHING", PM_SCAN_WP_MATCHING),
        ("PM_SCAN_CHECK_WPASYNC", PM_SCAN_CHECK_WPASYNC),
    ];
    check_against_c("linux/fs.h", &ours);
}

fn logged(pages: u64) -> Option<(Userfaultfd, Pair, Scanner)> {
    let uffd = match uffd::open().and_then(|(fd, _)| Userfaultfd::new(fd, Features::LOG_WRITES)) {
        Ok(uffd) => uffd,
        Err(e) => {
            skipped("dirty log test", &e);
            return None;
        }
    };
    let pair = Pair::new(pages);
    uffd.register(pair.span(), Watch::WRITES).unwrap();
    let scanner = Scanner::new(Scanner::open_own().unwrap());
    Some((uffd, pair, scanner))
}

fn scan(scanner: &mut Scanner, pair: &Pair) -> Vec<u64> {
    let (mut pages, start) = (Vec::new(), pair.span().start);
    scanner
        .written(pair.span(), |from, to| {
            pages.extend((from - start) / PAGE_BYTES_U64..(to - start) / PAGE_BYTES_U64);
        })
        .unwrap();
    pages
}

#[test]
fn more_runs_than_a_call_reports_come_once_each() {
    let Some((uffd, pair, mut scanner)) = logged(4096) else { return };
    uffd.protect(pair.span()).unwrap();
    assert!(scan(&mut scanner, &pair).is_empty());
    let odd: Vec<u64> = (0..2048).map(|i| 2 * i + 1).collect();
    assert!(odd.len() > 3 * REGIONS);
    for page in &odd {
        pair.guest.page(Pfn(*page)).mark_written();
    }
    assert!(scan(&mut scanner, &pair) == odd, "each odd page once, in order");
    assert!(scan(&mut scanner, &pair).is_empty(), "protected again");
}

#[test]
fn a_read_is_no_write_and_the_engines_mapping_is_not_the_guests() {
    let Some((uffd, pair, mut scanner)) = logged(1024) else { return };
    for page in 0..1024 {
        pair.engine.page(Pfn(page)).mark_written();
    }
    uffd.protect(pair.span()).unwrap();
    assert!(pair.guest.page(Pfn(700)).is_zero());
    assert!(scan(&mut scanner, &pair).is_empty(), "a read through a page table made by `protect`");
    pair.engine.page(Pfn(9)).fill_zero();
    assert!(scan(&mut scanner, &pair).is_empty());
    pair.guest.page(Pfn(700)).mark_written();
    assert_eq!(scan(&mut scanner, &pair), [700]);
}

#[test]
fn memory_that_is_not_logged_is_an_error_not_a_clean_page() {
    let Some((uffd, pair, mut scanner)) = logged(64) else { return };
    uffd.protect(pair.span()).unwrap();
    drop(uffd);
    let error = scanner.written(pair.span(), |_, _| {}).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EPERM), "no log is left behind, and its absence shows");
    assert_eq!(scanner.protect(pair.span()).unwrap_err().raw_os_error(), Some(libc::EPERM));
}

/// Every write shows in a scan that began after it or ran during it: two writers count up in one page after the
/// other, and what was read at the last scan that reported a page must be what stands there at the end.
#[test]
fn no_write_is_lost_between_scans() {
    const PAGES: u64 = 600;
    let Some((uffd, pair, mut scanner)) = logged(PAGES) else { return };
    uffd.protect(pair.span()).unwrap();
    let mut kept = vec![0; usize_of(PAGES)];
    let count = |page| {
        let mut copy = crate::memory::PageBuf::zeroed();
        pair.engine.page(Pfn(page)).copy_to(&mut copy);
        u64::from_le_bytes(copy.0[..8].try_into().unwrap())
    };
    let mut scans = 0;
    std::thread::scope(|scope| {
        let writers: Vec<_> = (0..2)
            .map(|writer| {
                let guest = &pair.guest;
                scope.spawn(move || {
                    let mut page = crate::memory::PageBuf::zeroed();
                    for n in 1u64..=20_000 {
                        page.0[..8].copy_from_slice(&n.to_le_bytes());
                        // A stride that wanders over all pages of this writer's half.
                        guest.page(Pfn((n * 7 % (PAGES / 2)) * 2 + writer)).copy_from(&page);
                    }
                })
            })
            .collect();
        let mut last = false;
        while !last {
            last = writers.iter().all(|w| w.is_finished());
            for page in scan(&mut scanner, &pair) {
                kept[usize_of(page)] = count(page);
            }
            scans += 1;
        }
    });
    assert!(scans > 5, "writers and scans have met ({scans})");
    for page in 0..PAGES {
        assert_eq!(kept[usize_of(page)], count(page), "page {page}");
        assert_ne!(kept[usize_of(page)], 0, "the writers have been everywhere");
    }
}

#[test]
fn holes_are_found_without_filling_them() {
    let pair = Pair::new(2000);
    let memfd = pair.memfd.as_fd();
    for page in [0, 1, 700, 1999] {
        pair.guest.page(Pfn(page)).mark_written();
    }
    for _ in 0..2 {
        let mut map = Bitmap::new(2000);
        untouched(memfd, &mut map).unwrap();
        assert_eq!(map.count(), 1996);
        assert!(!map.get(0) && !map.get(1) && map.get(2) && !map.get(700) && !map.get(1999));
    }
    assert_eq!(next_data(memfd, 2).unwrap(), Some(700));
    let mut runs = Vec::new();
    holes(memfd, 1, 701, |from, to| runs.push((from, to))).unwrap();
    assert_eq!(runs, [(2, 700)]);
    assert_eq!(next_data(Pair::new(5).memfd.as_fd(), 0).unwrap(), None);
}
