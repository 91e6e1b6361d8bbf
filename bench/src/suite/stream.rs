//! The engine's main figure: a guest of 2 GiB that nothing can compress, prefaulted on both ends and idle, migrated in
//! mode `plain` over loopback with two lanes, against the best bare copy of the same buffer over two connections.
//!
//! The guest is a buffer without a process of its own, so both sides of the comparison do the same work; handshake,
//! rounds and commit are in the engine's time. Both sides of the comparison are in the clear; the engine over TLS, as it
//! runs unless told otherwise, is measured beside it and held against the engine in the clear.

use anyhow::{Context as _, Result};

use super::bare::{CHUNKS, Copied, Ends, Shape};
use super::{Context, Suite};
use crate::buffer::gib;
use crate::report::{Limit, Row};
use crate::stats::{Runs, in_turns};
use crate::worker::By;

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
        let mut ends = Ends::start(if context.quick { gib(1) / 2 } else { gib(2) })?;
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
        Ok(vec![
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
        ])
    }
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
