//! The engine's small parts, one at a time: `cargo bench -p bench`. Rates are bytes of guest memory a second.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use mover::bitmap::Bitmap;
use mover::fingerprint::{CheckKey, hint};
use mover::memory::PageBuf;
use mover::pipeline::judge::{Backlog, Class, judge};
use mover::units::PAGE_BYTES_U64;
use mover::units::Version;
use mover::wire::frame::{Header, Kind};

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
    let backlog = Backlog { link_s: 0.5, disk_s: 0.2, disk_limit_s: f64::INFINITY };
    c.bench_function("judge", |b| b.iter(|| judge(black_box(Class::Duplicate), black_box(backlog))));
    let header =
        Header { kind: Kind::Data, lane: 1, count: 256, round: 3, version: Version(9), sequence: 77 };
    c.bench_function("frame header, there and back", |b| {
        b.iter(|| Header::decode(&black_box(header).encode()))
    });
}

criterion_group!(micro, pages, bitmaps, decisions);
criterion_main!(micro);
