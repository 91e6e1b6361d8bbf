//! The engine's TCP layer alone, pages from one process to pages of another over loopback: what it costs to send from
//! pages, to let the kernel hold few bytes unsent, and to have pages off cache lines in its buffers, against a bare copy in
//! the same run.

use anyhow::Result;
use mover::net::tcp::Settings;

use super::bare::{Ends, Shape};
use super::{Context, Suite};
use crate::buffer::gib;
use crate::report::Row;
use crate::stats::Runs;
use crate::worker::By;

/// Limits on unsent bytes tried; the last one is none in effect.
const UNSENT: [u32; 7] = [32 << 10, 64 << 10, 128 << 10, 256 << 10, 512 << 10, 1 << 20, 1 << 30];
/// Bytes before the pages of a chunk: as the engine has them, and off a cache line.
const HEADS: [usize; 2] = [2112, 2088];

/// The suite.
pub(crate) struct Tcp;

impl Suite for Tcp {
    fn name(&self) -> &'static str {
        "tcp"
    }

    fn about(&self) -> &'static str {
        "the engine's TCP layer against a bare copy, by the bytes its sockets may hold unsent"
    }

    fn run(&self, context: &Context) -> Result<Vec<Row>> {
        let bytes = if context.quick { gib(1) / 4 } else { gib(2) };
        let mut ends = Ends::start(bytes)?;
        let bare = Shape { connections: 2, chunk: 1 << 20, wait_all: false, pinned: true, by: By::Calls };
        let usual = Settings::default().unsent;
        let mut cases: Vec<_> = UNSENT
            .iter()
            .map(|unsent| By::Tcp { head: HEADS[0], unsent: *unsent })
            .chain([By::Tcp { head: HEADS[1], unsent: usual }])
            .map(|by| (by, Runs::default(), Runs::default(), Runs::default()))
            .collect();
        ends.copy(Shape { by: By::Tcp { head: HEADS[0], unsent: usual }, ..bare }, true)?;
        for round in 0..context.runs {
            for (by, rate, ratio, cpu) in &mut cases {
                let ours = Shape { by: *by, ..bare };
                let (first, second) = if round % 2 == 0 { (ours, bare) } else { (bare, ours) };
                let (first, second) = (ends.copy(first, false)?, ends.copy(second, false)?);
                let (ours, bare) = if round % 2 == 0 { (first, second) } else { (second, first) };
                rate.push(ours.gigabytes_per_second);
                ratio.push(ours.gigabytes_per_second / bare.gigabytes_per_second);
                cpu.push(ours.cpu_per_gigabyte / bare.cpu_per_gigabyte);
            }
        }
        let mut rows = Vec::new();
        for (by, rate, ratio, cpu) in cases {
            let By::Tcp { head, unsent } = by else { unreachable!("made above") };
            let unsent = if unsent == 1 << 30 { "any".to_owned() } else { format!("{} KiB", unsent >> 10) };
            let case = format!("2 × 1 MiB pinned, head of {head} bytes, {unsent} unsent");
            rows.push(Row::new(&case, "rate", "GB/s", rate.figure()));
            rows.push(Row::new(&case, "rate / bare copy", "", ratio.figure()));
            rows.push(Row::new(&case, "CPU / bare copy", "", cpu.figure()));
        }
        Ok(rows)
    }
}
