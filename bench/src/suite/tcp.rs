//! The engine's TCP layer alone, pages from one process to pages of another over loopback: what it costs to send from
//! pages, and what it costs to let the kernel hold few bytes unsent, against the best bare copy of the same run.

use anyhow::Result;

use super::bare::{Ends, Shape};
use super::{Context, Suite};
use crate::buffer::gib;
use crate::report::Row;
use crate::stats::Runs;
use crate::worker::By;

/// Limits on unsent bytes tried; the last one is none in effect.
const UNSENT: [u32; 6] = [64 << 10, 128 << 10, 256 << 10, 512 << 10, 1 << 20, 1 << 30];

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
        let mut cases: Vec<_> = UNSENT
            .iter()
            .map(|unsent| (*unsent, Runs::default(), Runs::default(), Runs::default()))
            .collect();
        ends.copy(Shape { by: By::Tcp { unsent: UNSENT[2] }, ..bare }, true)?;
        for round in 0..context.runs {
            for (unsent, rate, ratio, cpu) in &mut cases {
                let ours = Shape { by: By::Tcp { unsent: *unsent }, ..bare };
                let (first, second) = if round % 2 == 0 { (ours, bare) } else { (bare, ours) };
                let (first, second) = (ends.copy(first, false)?, ends.copy(second, false)?);
                let (ours, bare) = if round % 2 == 0 { (first, second) } else { (second, first) };
                rate.push(ours.gigabytes_per_second);
                ratio.push(ours.gigabytes_per_second / bare.gigabytes_per_second);
                cpu.push(ours.cpu_per_gigabyte / bare.cpu_per_gigabyte);
            }
        }
        let mut rows = Vec::new();
        for (unsent, rate, ratio, cpu) in cases {
            let case = if unsent == 1 << 30 {
                "2 × 1 MiB pinned, any number unsent".to_owned()
            } else {
                format!("2 × 1 MiB pinned, {} KiB unsent", unsent >> 10)
            };
            rows.push(Row::new(&case, "rate", "GB/s", rate.figure()));
            rows.push(Row::new(&case, "rate / bare copy", "", ratio.figure()));
            rows.push(Row::new(&case, "CPU / bare copy", "", cpu.figure()));
        }
        Ok(rows)
    }
}
