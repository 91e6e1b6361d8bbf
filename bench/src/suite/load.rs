//! Loading by reference: a guest whose pages all stand on its disk, migrated in mode `refer` over a capped link, against fio
//! on the same file with the same run lengths and reads in flight. Its pages stand there in one piece, as files do (runs of
//! 4 to 256 KiB at random places), or each alone.
//!
//! The link is capped so that hardly a page is worth sending as data; what counts is how fast the target reads,
//! checks and places.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::thread;

use anyhow::{Context as _, Result, anyhow};
use mover::index::Duplicates;
use mover::limits::READ_DEPTH;
use mover::memory::{Mapping, PageBuf};
use mover::report::{Mode, Summary};
use mover::units::{BlockAddress, DiskId, PAGE_BYTES, PAGE_BYTES_U64, Pfn, Sector, f64_of, u64_of, usize_of};

use super::disk::{MIXED, Random, image, length};
use super::{Context, Suite};
use crate::buffer::{digest, gib, incompressible};
use crate::fio::{self, Order, RunLength};
use crate::idle::{self, Plan};
use crate::report::{Limit, Row};
use crate::stats::{Runs, in_turns};

/// How pages stand on the disk.
struct Locality {
    name: &'static str,
    lengths: &'static [RunLength],
    order: Order,
    /// Blocks between runs: so many at least, and the range that a random number is added of; never so few that the gap would be
    /// read through.
    gap: (u64, u64),
    /// The guest's size, of the file's the so many-th part.
    part: usize,
    /// Bytes a second on the link: enough for references, far below the disk's rate.
    link: u64,
}

/// All that are measured.
const LOCALITIES: [Locality; 3] = [
    Locality {
        name: "4 to 256 KiB runs",
        lengths: MIXED,
        order: Order::Random,
        gap: (32, 20),
        part: 4,
        link: 60_000_000,
    },
    Locality {
        name: "in one piece",
        lengths: &[RunLength { bytes: 1 << 20, percent: 100 }],
        order: Order::Sequential,
        gap: (0, 1),
        part: 4,
        link: 60_000_000,
    },
    // Gaps are just too wide to be read through: there is room for few pages, and with too few of them a migration's begin and
    // end would be what is measured.
    Locality {
        name: "4 KiB runs",
        lengths: &[RunLength { bytes: 4 << 10, percent: 100 }],
        order: Order::Random,
        gap: (17, 4),
        part: 24,
        link: 5_000_000,
    },
];

/// The suite.
pub(crate) struct Load;

impl Suite for Load {
    fn name(&self) -> &'static str {
        "load"
    }

    fn about(&self) -> &'static str {
        "loading by reference against fio: same file, run lengths and depth"
    }

    fn run(&self, context: &Context) -> Result<Vec<Row>> {
        let gibibytes = if context.quick { 1 } else { 4 };
        let file = image(&context.scratch, gibibytes << 30)?;
        let mut rows = Vec::new();
        for locality in &LOCALITIES {
            rows.extend(locality.measure(context, &file, gib(gibibytes) / locality.part)?);
        }
        Ok(rows)
    }
}

impl Locality {
    fn measure(&self, context: &Context, file: &Path, guest_bytes: usize) -> Result<Vec<Row>> {
        let source = Arc::new(incompressible(guest_bytes, 1)?);
        let known: Arc<dyn Duplicates> = Arc::new(Known::fill(&source, file, self)?);
        let target = Arc::new(incompressible(guest_bytes, 2)?);
        let seconds = if context.quick { 0.5 } else { 2.0 };
        let pairs = in_turns(
            context.runs,
            |_| fio::read_in(self.order, file, self.lengths, READ_DEPTH, seconds),
            |round| {
                let summary = migrate(&source, &target, file, &known, self.link)?;
                if round == 0 && digest(&source) != digest(&target) {
                    return Err(anyhow!("the target has other bytes than the source"));
                }
                Ok(summary)
            },
        )?;
        let rate = |summary: &Summary| f64_of(summary.disk_bytes) / summary.total_ms / 1e6;
        let case = format!("{}, depth {READ_DEPTH}", self.name);
        let figure = |value: &dyn Fn(&(fio::Reached, Summary)) -> f64| {
            pairs.iter().map(value).collect::<Runs>().figure()
        };
        let pages = f64_of(u64_of(guest_bytes) / PAGE_BYTES_U64);
        Ok(vec![
            Row::new(&case, "fio", "GB/s", figure(&|(fio, _)| fio.bytes_per_second / 1e9)),
            Row::new(&case, "loaded", "GB/s", figure(&|(_, summary)| rate(summary))),
            Row::new(
                &case,
                "loaded / fio",
                "",
                figure(&|(fio, summary)| rate(summary) / (fio.bytes_per_second / 1e9)),
            )
            .limited(Limit::AtLeast(0.8)),
            Row::new(
                &case,
                "pages by reference / all",
                "",
                figure(&|(_, summary)| f64_of(summary.pages_by_reference) / pages),
            ),
        ])
    }
}

/// Migrates `source` into `target`, both in this process.
fn migrate(
    source: &Arc<Mapping>,
    target: &Arc<Mapping>,
    file: &Path,
    known: &Arc<dyn Duplicates>,
    link: u64,
) -> Result<Summary> {
    let entrance = idle::entrance(false)?;
    let port = entrance.local().port();
    let plan = Plan {
        mode: Mode::Refer,
        lanes: 2,
        bandwidth: Some(link),
        disk: Some(file.to_owned()),
        known: Some(Arc::clone(known)),
        pin: None,
        writes: None,
    };
    thread::scope(|scope| {
        let receiving = scope.spawn(|| idle::receive(target, entrance, Some(file)));
        let summary = idle::send(source, port, plan);
        receiving.join().map_err(|_| anyhow!("the target panicked"))??;
        summary
    })
}

/// Where each of the guest's pages stands: by its first eight bytes, which are enough in a file of random ones.
struct Known(HashMap<[u8; 8], Sector>);

impl Known {
    /// Fills `memory` with runs of blocks of `file`, of the given lengths: one behind the other, or from random places with
    /// gaps between them.
    fn fill(memory: &Mapping, file: &Path, locality: &Locality) -> Result<Self> {
        let open = File::open(file).with_context(|| format!("cannot open {}", file.display()))?;
        let pages = memory.pages().0;
        let blocks = open.metadata()?.len() / PAGE_BYTES_U64;
        let mut random = Random(0x5851_f42d_4c95_7f2d);
        let mut runs = Vec::new();
        let (mut at, mut listed) = (0, 0);
        let scattered = locality.order == Order::Random;
        let (least, range) = locality.gap;
        while listed < pages {
            let length = u64_of(length(locality.lengths, random.next()) / PAGE_BYTES).min(pages - listed);
            let gap = least + random.next() % range;
            if at + length >= blocks {
                anyhow::bail!("the file is too small for a guest of {pages} pages");
            }
            runs.push((at, length));
            listed += length;
            at += length + gap;
        }
        for last in (1..runs.len()).rev().filter(|_| scattered) {
            runs.swap(last, usize_of(random.next() % u64_of(last + 1)));
        }
        let mut known = HashMap::with_capacity(usize_of(pages));
        let mut page = PageBuf::zeroed();
        let mut pfn = 0;
        for (start, length) in runs {
            for block in start..start + length {
                open.read_exact_at(&mut page.0, block * PAGE_BYTES_U64)?;
                memory.page(Pfn(pfn)).copy_from(&page);
                known.insert(key(&page), Sector::holding(block * PAGE_BYTES_U64));
                pfn += 1;
            }
        }
        Ok(Self(known))
    }
}

fn key(page: &PageBuf) -> [u8; 8] {
    let [a, b, c, d, e, f, g, h, ..] = page.0;
    [a, b, c, d, e, f, g, h]
}

impl Duplicates for Known {
    fn find(&self, page: &PageBuf, _near: Option<BlockAddress>) -> Option<BlockAddress> {
        self.0.get(&key(page)).map(|sector| BlockAddress { disk: DiskId(0), sector: *sector })
    }
    fn mapped_bytes(&self) -> u64 {
        0
    }
}
