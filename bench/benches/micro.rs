//! The engine's small parts, one at a time: `cargo bench -p bench`, or `cargo xtask bench micro`, which holds them against
//! the memory bandwidth of the same run. Rates are bytes of guest memory a second.

use std::hint::black_box;
use std::sync::Arc;

use bench::buffer::incompressible;
use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use crossbeam_queue::ArrayQueue;
use mover::bitmap::Bitmap;
use mover::fingerprint::{CheckKey, hint};
use mover::index::layout::Layout;
use mover::index::table::{Learned, Table};
use mover::memory::PageBuf;
use mover::pipeline::judge::{Backlog, Class, judge};
use mover::units::{PAGE_BYTES_U64, Pfn, Sector, Version, u64_of};
use mover::wire::frame::{Header, Kind};

/// Memory that no cache holds.
const MEMORY: usize = 512 << 20;
/// Pages of a batch that is gathered or scattered: a frame of 1 MiB.
const BATCH: usize = 256;

fn pages(c: &mut Criterion) {
    let key = CheckKey::new([7; 32]);
    let (mut page, mut target) = (PageBuf::zeroed(), PageBuf::zeroed());
    let mut group = c.benchmark_group("page");
    group.throughput(Throughput::Bytes(PAGE_BYTES_U64));
    group.bench_function("index hash", |b| b.iter(|| hint(black_box(&page.0))));
    group.bench_function("check", |b| b.iter(|| key.check(black_box(&page))));
    group.bench_function("zero test of a zero page", |b| {
        b.iter(|| black_box(&mut page).as_guest_page().is_zero())
    });
    group.bench_function("copy in", |b| b.iter(|| target.as_guest_page().copy_from(black_box(&page))));
    group.finish();
}

/// Memory by memory: the bandwidth of this machine, and pages gathered from all over a guest and scattered over it.
fn memory(c: &mut Criterion) {
    let guest = incompressible(MEMORY, 1).expect("half a GiB of memory for the benchmark");
    let count = guest.pages().0;
    // A walk that comes by every page once and never at a neighbour's; 40503 has no factor in common with any power of 2.
    let scattered = |n: u64| Pfn(n.wrapping_mul(40_503) % count);
    let mut buffers: Vec<PageBuf> = (0..BATCH).map(|_| PageBuf::zeroed()).collect();
    let words = guest.words();
    let mut group = c.benchmark_group("memory");
    group.sample_size(20);
    group.throughput(Throughput::Bytes(u64_of(MEMORY)));
    group.bench_function("bandwidth, read", |b| {
        b.iter(|| {
            words.iter().fold(0, |sum: u64, word| sum ^ word.load(std::sync::atomic::Ordering::Relaxed))
        })
    });
    group.throughput(Throughput::Bytes(u64_of(BATCH) * PAGE_BYTES_U64));
    let mut at = 0;
    group.bench_function("gather a frame", |b| {
        b.iter(|| {
            for buffer in &mut buffers {
                guest.page(scattered(at)).copy_to(buffer);
                at += 1;
            }
        })
    });
    group.bench_function("scatter a frame", |b| {
        b.iter(|| {
            for buffer in &buffers {
                guest.page(scattered(at)).copy_from(buffer);
                at += 1;
            }
        })
    });
    group.finish();
}

fn bitmaps(c: &mut Criterion) {
    const PAGES: usize = 1 << 20;
    for percent in [0, 1, 50] {
        let mut dirty = Bitmap::new(PAGES);
        (0..PAGES).filter(|at| at * 7919 % 100 < percent).for_each(|at| {
            dirty.set(at);
        });
        c.bench_function(&format!("walk a million pages, {percent} % dirty"), |b| {
            b.iter(|| black_box(&dirty).iter().fold(0, |sum, at| sum ^ at));
        });
    }
}

fn decisions(c: &mut Criterion) {
    let backlog = Backlog { link_s: 0.5, disk_s: 0.2, disk_limit_s: f64::INFINITY, held_up: 1.0 };
    c.bench_function("judge", |b| b.iter(|| judge(black_box(Class::Duplicate), black_box(backlog))));
    let header =
        Header { kind: Kind::Data, lane: 1, count: 256, round: 3, version: Version(9), sequence: 77 };
    c.bench_function("frame header, there and back", |b| {
        b.iter(|| Header::decode(&black_box(header).encode()))
    });
    let ring = ArrayQueue::new(256);
    c.bench_function("ring, in and out", |b| {
        b.iter(|| {
            // One in, one out: it is never full.
            let _ = ring.push(black_box(7_u64));
            ring.pop()
        })
    });
    let tokens = Arc::new(ArrayQueue::new(256));
    c.bench_function("ring, filled and emptied", |b| {
        b.iter_batched(
            || Arc::clone(&tokens),
            |ring| {
                assert!((0..256_u64).all(|n| ring.push(n).is_ok()));
                while ring.pop().is_some() {}
            },
            BatchSize::SmallInput,
        )
    });
}

/// Lookups in the index of a disk of 16 GiB, of which every block is known.
fn index(c: &mut Criterion) {
    const UNITS: u64 = 4 << 20;
    // The golden ratio's multiples are spread as a hash's values are, and no two are the same.
    let mark = |unit: u64| (unit + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let table = Table::new(Layout::plain(UNITS * PAGE_BYTES_U64), UNITS);
    let learned = (0..UNITS).filter(|unit| table.learn(*unit, mark(*unit)) == Learned::Added).count();
    assert!(u64_of(learned) > UNITS / 10 * 9, "only {learned} of {UNITS} blocks found room");
    let mut group = c.benchmark_group("index");
    let mut at = 0_u64;
    let mut next = move || {
        at = at.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (at >> 33) % UNITS
    };
    group.bench_function("hit, anywhere", |b| b.iter(|| table.find(mark(next()), None)));
    group.bench_function("miss", |b| b.iter(|| table.find(mark(next() + UNITS), None)));
    let mut unit = 0;
    group.bench_function("hit, the block after the last", |b| {
        b.iter(|| {
            unit = (unit + 1) % (UNITS - 1);
            table.find(mark(unit + 1), Some(Sector::holding(unit * PAGE_BYTES_U64)))
        })
    });
    group.finish();
}

criterion_group!(micro, pages, memory, bitmaps, decisions, index);
criterion_main!(micro);
