//! Guests made for one question each, moved by `pageferry demo` as a user would:
//!
//! - how long an access waits for a page that is not there yet, while the drain runs as fast as it can: nearly all of
//!   the guest stands on its disk, and it looks at its pages at random;
//! - how long a guest that does nothing is silent, seen from outside: from the last look that finds it running here to the
//!   first that finds it running there;
//! - what looking for duplicates costs a guest that has none;
//! - what becomes of a guest that writes faster than the link carries.

#![forbid(unsafe_code)]

use std::fs;
use std::path::PathBuf;

use anyhow::{Context as _, Result};
use mover::report::Mode;
use mover::units::f64_of;

use super::{Context, Suite};
use crate::demo::{Demo, Link, Moved};
use crate::program;
use crate::report::{Limit, Row};

/// How often a guest is looked at whose silence is asked for.
const LOOK: &str = "1ms";

/// The suite.
pub(crate) struct Limits;

impl Suite for Limits {
    fn name(&self) -> &'static str {
        "limits"
    }

    fn about(&self) -> &'static str {
        "waits behind a restart, silence from outside, the search for duplicates, guests that outrun the link (root)"
    }

    fn run(&self, context: &Context) -> Result<Vec<Row>> {
        let stage = Stage { program: program::build()?, context };
        let mut rows = waits(&stage)?;
        rows.extend(silence(&stage)?);
        rows.extend(search(&stage)?);
        rows.extend(outrun(&stage)?);
        Ok(rows)
    }
}

/// What all of them need.
struct Stage<'a> {
    program: PathBuf,
    context: &'a Context,
}

impl Stage<'_> {
    /// Shorter with `--quick`.
    fn memory(&self, full: &'static str) -> &'static str {
        if self.context.quick { "256M" } else { full }
    }

    /// Modes that are compared.
    fn modes(&self) -> &'static [Mode] {
        if self.context.quick { &[Mode::Lazy] } else { &[Mode::Plain, Mode::Lazy] }
    }

    /// Moves a guest with these shares of cache, anonymous and free memory that does `activity`, so many times in each mode.
    fn moved(&self, name: &str, guest: (&str, [u8; 3], &str), how: &How<'_>) -> Result<Vec<Moved>> {
        let (memory, [cache, anonymous, free], activity) = guest;
        eprintln!("  {name}, {}", how.link.name());
        let path = self.context.scratch.join(format!("{}.toml", name.replace(' ', "-")));
        let text = format!(
            "name = \"{name}\"\ndescription = \"Made for a measurement.\"\n[memory]\ncache = {cache}\n\
             anonymous = {anonymous}\nfree = {free}\n{activity}"
        );
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        let modes: Vec<Mode> = (0..self.context.runs)
            .flat_map(|round| {
                let forth = how.modes.iter().copied();
                // In turns, so that what disturbs the machine disturbs all.
                if round % 2 == 0 { forth.collect::<Vec<_>>() } else { forth.rev().collect() }
            })
            .collect();
        let demo = Demo {
            program: &self.program,
            workload: &path.display().to_string(),
            memory,
            link: how.link,
            modes: &modes,
            more: how.more,
            directory: &self.context.scratch,
        };
        demo.run()
    }
}

/// How it is moved.
struct How<'a> {
    link: Link,
    modes: &'a [Mode],
    more: &'a [&'a str],
}

/// A figure of all migrations in that mode.
fn row(
    case: &str,
    what: &str,
    unit: &'static str,
    moved: &[Moved],
    mode: Mode,
    value: fn(&Moved) -> f64,
) -> Row {
    let runs = moved.iter().filter(|moved| moved.summary.mode == mode.name()).map(value);
    Row::of(case, &format!("{what}, {}", mode.name()), unit, runs)
}

/// Accesses to pages that are not there yet.
fn waits(stage: &Stage<'_>) -> Result<Vec<Row>> {
    let memory = stage.memory("1G");
    let guest = (memory, [93, 2, 5], "[touch]\nrate = \"200MiB/s\"\n");
    let how = How { link: Link::Ten, modes: &[Mode::Lazy], more: &[] };
    let moved = stage.moved("all on disk", guest, &how)?;
    let case = format!("{memory} on disk, looked at at random, 10gbit");
    let figure = |what, unit, value| row(&case, what, unit, &moved, Mode::Lazy, value);
    Ok(vec![
        figure("p50 of waits for an absent page", "µs", |moved| moved.fared.waits.p50()),
        figure("p99 of waits for an absent page", "µs", |moved| moved.fared.waits.p99())
            .limited(Limit::AtMost(500.0)),
        figure("waits for an absent page", "", |moved| f64_of(moved.fared.waits.count)),
        figure("p99 of accesses meanwhile", "µs", |moved| moved.fared.access_during.p99()),
        figure("outstanding at the restart", "pages", |moved| f64_of(moved.summary.pages_lazy)),
        figure("drain", "ms", |moved| moved.summary.total_ms - moved.summary.restart_ms),
        figure("guest's work meanwhile / before", "", |moved| {
            moved.fared.work_during / moved.fared.work_before
        }),
    ])
}

/// A guest that does nothing, looked at often.
fn silence(stage: &Stage<'_>) -> Result<Vec<Row>> {
    let memory = stage.memory("2G");
    let modes = stage.modes();
    let how = How { link: Link::Ten, modes, more: &["--look-every", LOOK] };
    let moved = stage.moved("idle", (memory, [40, 40, 20], ""), &how)?;
    let case = format!("{memory}, idle, 10gbit, looked at every {LOOK}");
    let mut rows = Vec::new();
    for mode in modes.iter().copied() {
        let silent = row(&case, "from stop to go", "ms", &moved, mode, |moved| moved.fared.silent_ms);
        rows.push(silent.limited(Limit::AtMost(30.0)));
        rows.push(row(&case, "downtime", "ms", &moved, mode, |moved| moved.summary.downtime_ms));
    }
    Ok(rows)
}

/// A guest none of whose pages stands on its disk.
fn search(stage: &Stage<'_>) -> Result<Vec<Row>> {
    let memory = stage.memory("1G");
    let modes = [Mode::Plain, Mode::Refer];
    let links: &[Link] = if stage.context.quick { &[Link::Ten] } else { &[Link::One, Link::Ten] };
    let mut rows = Vec::new();
    for link in links {
        let how = How { link: *link, modes: &modes, more: &[] };
        let moved = stage.moved("nothing on disk", (memory, [0, 95, 5], ""), &how)?;
        let case = format!("{memory}, nothing on disk, {}", link.name());
        for mode in modes {
            rows.push(row(&case, "total time", "ms", &moved, mode, |moved| moved.summary.total_ms));
            rows.push(row(&case, "CPU of the source", "ms", &moved, mode, |moved| {
                moved.summary.cpu_ms_source
            }));
        }
        let pair = |pair: &[Moved]| {
            let of = |mode: Mode| pair.iter().find(|moved| moved.summary.mode == mode.name());
            Some(of(Mode::Refer)?.summary.total_ms / of(Mode::Plain)?.summary.total_ms)
        };
        let ratios = moved.chunks(modes.len()).filter_map(pair);
        let row = Row::of(&case, "total time, refer / plain", "", ratios);
        rows.push(row.limited(Limit::AtMost(1.02)));
    }
    Ok(rows)
}

/// A guest that rewrites a quarter of its memory faster than the link carries it, left at it and slowed down.
fn outrun(stage: &Stage<'_>) -> Result<Vec<Row>> {
    let memory = stage.memory("1G");
    // 27 % of the anonymous pages of 1 GiB are 259 MiB.
    let guest = (memory, [0, 94, 6], "[dirty]\nrate = \"150MiB/s\"\nover_percent = 27\n");
    let modes = stage.modes();
    let mut rows = Vec::new();
    for throttle in ["auto", "off"].into_iter().take(if stage.context.quick { 1 } else { 2 }) {
        let more = ["--max-downtime", "300ms", "--throttle", throttle];
        let how = How { link: Link::One, modes, more: &more };
        let moved = stage.moved("outruns the link", guest, &how)?;
        let case = format!("{memory}, 150 MiB/s over a quarter of it, 1gbit, throttle {throttle}");
        for mode in modes.iter().copied() {
            let figure = |what, unit, value| row(&case, what, unit, &moved, mode, value);
            let total = figure("total time", "ms", |moved| moved.summary.total_ms);
            let downtime = figure("downtime", "ms", |moved| moved.summary.downtime_ms);
            let slowed = throttle == "auto";
            let limit = |row: Row, most: f64| if slowed { row.limited(Limit::AtMost(most)) } else { row };
            rows.push(limit(total, 15_000.0));
            rows.push(limit(downtime, 300.0));
            rows.push(figure("guest's work meanwhile / before", "", |moved| {
                moved.fared.work_during / moved.fared.work_before
            }));
            rows.push(figure("rounds", "", |moved| f64_of(u64::from(moved.summary.rounds))));
        }
    }
    Ok(rows)
}
