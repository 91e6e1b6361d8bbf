//! The engine's main figure: a guest of 2 GiB that nothing can compress, prefaulted on both ends and idle, migrated in
//! mode `plain` over loopback with two lanes, against the best bare copy of the same buffer over two connections.
//!
//! The guest is a buffer without a process of its own, so both sides of the comparison do the same work; handshake,
//! rounds and commit are in the engine's time. Both sides of the comparison are in the clear; the engine over TLS, as it
//! runs unless told otherwise, is measured beside it and held against the engine in the clear.
//!
//! Behind that, in turns with the engine over two lanes: 1 to 8 lanes, a guest that writes meanwhile, memory of huge pages,
//! each in the clear and over TLS; and iperf3.

use anyhow::{Context as _, Result};

use super::bare::{CHUNKS, Copied, Ends, Shape};
use super::{Context, Suite};
use crate::buffer::{Pages, gib};
use crate::iperf3;
use crate::report::{Limit, Row};
use crate::stats::{Runs, in_turns};
use crate::worker::By;
use crate::writer::Writes;

/// Least rate, as a part of the bare copy's.
const RATE: Limit = Limit::AtLeast(0.75);
/// Most CPU time, as a multiple of the bare copy's.
const CPU: Limit = Limit::AtMost(1.35);

/// The suite.
pub(crate) struct Stream;

impl Suite for Stream {
    fn name(&self) -> &'static str {
        "stream"
    }

    fn about(&self) -> &'static str {
        "2 GiB of an idle guest, mode plain, loopback, against the best bare two-connection copy"
    }

    fn run(&self, context: &Context) -> Result<Vec<Row>> {
        let bytes = if context.quick { gib(1) / 2 } else { gib(2) };
        let mut ends = Ends::start(bytes)?;
        let engine = Shape::engine(false);
        let encrypted = Shape::engine(true);
        ends.copy(engine, true).context("the engine's first run, every byte compared")?;
        ends.copy(encrypted, true).context("its first run over TLS, every byte compared")?;
        let bare = best_bare(&mut ends, context)?;
        let ends = std::cell::RefCell::new(ends);
        let pairs = in_turns(
            context.runs,
            |_| ends.borrow_mut().copy(bare, false),
            |_| {
                let mut ends = ends.borrow_mut();
                Ok((ends.copy(engine, false)?, ends.copy(encrypted, false)?))
            },
        )?;
        let triples: Vec<_> = pairs.into_iter().map(|(bare, (plain, tls))| (bare, plain, tls)).collect();
        let figure = |value: fn(&(Copied, Copied, Copied)) -> f64| {
            triples.iter().map(value).collect::<Runs>().figure()
        };
        let case = format!("2 lanes; bare copy {}", bare.name());
        let mut rows = vec![
            Row::new(&case, "rate, bare copy", "GB/s", figure(|(bare, ..)| bare.gigabytes_per_second)),
            Row::new(&case, "rate, engine", "GB/s", figure(|(_, ours, _)| ours.gigabytes_per_second)),
            Row::new(
                &case,
                "rate, engine / bare copy",
                "",
                figure(|(bare, ours, _)| ours.gigabytes_per_second / bare.gigabytes_per_second),
            )
            .limited(RATE),
            Row::new(
                &case,
                "CPU of both ends, bare copy",
                "s/GB",
                figure(|(bare, ..)| bare.cpu_per_gigabyte),
            ),
            Row::new(
                &case,
                "CPU, engine / bare copy",
                "",
                figure(|(bare, ours, _)| ours.cpu_per_gigabyte / bare.cpu_per_gigabyte),
            )
            .limited(CPU),
            Row::new(&case, "rate, engine over TLS", "GB/s", figure(|(_, _, tls)| tls.gigabytes_per_second)),
            Row::new(
                &case,
                "rate, TLS / in the clear",
                "",
                figure(|(_, ours, tls)| tls.gigabytes_per_second / ours.gigabytes_per_second),
            ),
            Row::new(
                &case,
                "CPU, TLS / in the clear",
                "",
                figure(|(_, ours, tls)| tls.cpu_per_gigabyte / ours.cpu_per_gigabyte),
            ),
        ];
        rows.extend(ways(&mut ends.borrow_mut(), context, bytes)?);
        Ok(rows)
    }
}

/// A way to run the engine, or iperf3.
#[derive(Clone, Copy, Debug)]
enum Way {
    /// The engine with such pages.
    Engine(Shape, Pages),
    /// iperf3 with so many connections.
    Iperf3(usize),
}

/// What writes in a guest that does.
const WRITES: Writes = Writes { rate: 200 << 20, over: 256 << 20 };
/// How long iperf3 sends, in seconds.
const IPERF3_SECONDS: u32 = 2;

/// All ways, by case.
fn all_ways(quick: bool) -> Vec<(String, Way)> {
    let mut all = Vec::new();
    let lanes: &[usize] = if quick { &[1, 4] } else { &[1, 2, 3, 4, 5, 6, 7, 8] };
    for encrypted in [false, true] {
        let how = if encrypted { "TLS" } else { "in the clear" };
        let shape = Shape::engine(encrypted);
        for count in lanes {
            let way = Way::Engine(Shape { connections: *count, ..shape }, Pages::Small);
            all.push((format!("{count} lanes, {how}"), way));
        }
        let by = By::Engine { encrypted, writes: Some(WRITES) };
        let case = format!(
            "2 lanes, {how}, guest writes {} MiB/s over {} MiB",
            WRITES.rate >> 20,
            WRITES.over >> 20
        );
        all.push((case, Way::Engine(Shape { by, ..shape }, Pages::Small)));
        all.push((format!("2 lanes, {how}, huge pages"), Way::Engine(shape, Pages::Huge)));
    }
    for count in [1, 2, 4, 8].into_iter().filter(|count| lanes.contains(count)) {
        all.push((format!("iperf3, {count} connections"), Way::Iperf3(count)));
    }
    all
}

/// Every way in turns, the figures of each.
fn ways(ends: &mut Ends, context: &Context, bytes: usize) -> Result<Vec<Row>> {
    let no_huge = Pages::Huge.obstacle(2 * bytes);
    let mut huge = if no_huge.is_none() { Some(Ends::start_on(bytes, Pages::Huge)?) } else { None };
    let no_iperf3 = iperf3::obstacle();
    let mut measured: Vec<_> = all_ways(context.quick)
        .into_iter()
        .map(|(case, way)| (case, way, Runs::default(), Runs::default()))
        .collect();
    for round in 0..=context.runs {
        for (case, way, rate, cpu) in &mut measured {
            // The first round is the one in which every byte is compared.
            let copied = match way {
                Way::Engine(shape, pages) => {
                    let Some(ends) = (if *pages == Pages::Huge { huge.as_mut() } else { Some(&mut *ends) })
                    else {
                        continue;
                    };
                    ends.copy(*shape, round == 0).with_context(|| case.clone())?
                }
                Way::Iperf3(_) if no_iperf3.is_some() || round == 0 => continue,
                Way::Iperf3(count) => {
                    rate.push(iperf3::rate(*count, if context.quick { 1 } else { IPERF3_SECONDS })?);
                    continue;
                }
            };
            if round > 0 {
                rate.push(copied.gigabytes_per_second);
                cpu.push(copied.cpu_per_gigabyte);
            }
        }
    }
    let mut rows = Vec::new();
    for (case, way, rate, cpu) in measured {
        let reason = match way {
            Way::Engine(_, Pages::Huge) => no_huge.as_deref(),
            Way::Engine(..) => None,
            Way::Iperf3(_) => no_iperf3.as_deref(),
        };
        if let Some(reason) = reason {
            rows.push(Row::missing(&case, "rate of the guest's memory", "GB/s", reason));
            continue;
        }
        rows.push(Row::new(&case, "rate of the guest's memory", "GB/s", rate.figure()));
        if matches!(way, Way::Engine(..)) {
            rows.push(Row::new(&case, "CPU of both ends", "s/GB", cpu.figure()));
        }
    }
    Ok(rows)
}

/// The bare copy with the highest median rate over all chunk sizes, threads pinned as the engine's
/// lanes are and not.
fn best_bare(ends: &mut Ends, context: &Context) -> Result<Shape> {
    let mut cases = Vec::new();
    for chunk in CHUNKS {
        for pinned in [false, true] {
            let shape = Shape { connections: 2, chunk, wait_all: false, pinned, by: By::Calls };
            cases.push((shape, Runs::default()));
        }
    }
    for _ in 0..context.runs.div_ceil(2) {
        for (shape, rate) in &mut cases {
            rate.push(ends.copy(*shape, false)?.gigabytes_per_second);
        }
    }
    let best = cases
        .into_iter()
        .max_by(|(_, one), (_, other)| one.figure().median.total_cmp(&other.figure().median))
        .context("there are chunk sizes")?;
    Ok(best.0)
}
