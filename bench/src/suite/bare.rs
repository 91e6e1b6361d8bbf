//! A bare socket copy of a buffer between two processes over loopback: what the engine's stream is held against. Every
//! number of connections with every chunk size, and both ways to receive.

use anyhow::Result;
use mover::units::{f64_of, u64_of};

use super::{Context, Suite};
use crate::buffer::{Pages, gib};
use crate::report::Row;
use crate::stats::Runs;
use crate::worker::{By, Run, Which, Worker, copy};

/// Chunk sizes tried.
pub(crate) const CHUNKS: [usize; 7] = [64 << 10, 128 << 10, 256 << 10, 512 << 10, 1 << 20, 2 << 20, 4 << 20];

/// The suite.
pub(crate) struct Bare;

impl Suite for Bare {
    fn name(&self) -> &'static str {
        "bare"
    }

    fn about(&self) -> &'static str {
        "a plain socket copy of 2 GiB between two processes: GB/s and CPU time by connections and chunk"
    }

    fn run(&self, context: &Context) -> Result<Vec<Row>> {
        let bytes = if context.quick { gib(1) / 4 } else { gib(2) };
        let mut ends = Ends::start(bytes)?;
        let mut cases = Vec::new();
        for connections in [1, 2, 4] {
            for chunk in CHUNKS {
                for (wait_all, pinned) in [(false, false), (true, false), (false, true)] {
                    let shape = Shape { connections, chunk, wait_all, pinned, by: By::Calls };
                    cases.push((shape, Runs::default(), Runs::default()));
                }
            }
        }
        // Round after round through all cases, so that a disturbance spoils one run of many and not one case.
        for _ in 0..context.runs {
            for (shape, rate, cpu) in &mut cases {
                let copied = ends.copy(*shape, false)?;
                rate.push(copied.gigabytes_per_second);
                cpu.push(copied.cpu_per_gigabyte);
            }
        }
        let mut rows = Vec::new();
        for (shape, rate, cpu) in cases {
            let case = shape.name();
            rows.push(Row::new(&case, "rate", "GB/s", rate.figure()));
            rows.push(Row::new(&case, "CPU, both ends", "s/GB", cpu.figure()));
        }
        Ok(rows)
    }
}

/// How a copy goes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    /// Connections.
    pub(crate) connections: usize,
    /// Bytes a call.
    pub(crate) chunk: usize,
    /// Whether the receiver waits for whole chunks.
    pub(crate) wait_all: bool,
    /// Whether threads are pinned as the engine's lanes are.
    pub(crate) pinned: bool,
    /// What copies.
    pub(crate) by: By,
}

impl Shape {
    /// The whole engine over two lanes, over TLS or in the clear.
    pub(crate) fn engine(encrypted: bool) -> Self {
        let by = By::Engine { encrypted, writes: None };
        Self { connections: 2, chunk: 1 << 20, wait_all: false, pinned: false, by }
    }

    /// In a table.
    pub(crate) fn name(self) -> String {
        let Self { connections, chunk, wait_all, pinned, .. } = self;
        let how = if wait_all { ", whole chunks received" } else { "" };
        let place = if pinned { ", pinned" } else { "" };
        format!("{connections} × {} KiB{how}{place}", chunk >> 10)
    }
}

/// What a copy came to.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Copied {
    pub(crate) gigabytes_per_second: f64,
    /// CPU seconds of both ends together for a gigabyte (10^9 bytes).
    pub(crate) cpu_per_gigabyte: f64,
}

/// The two processes with their buffers.
pub(crate) struct Ends {
    sender: Worker,
    receiver: Worker,
    bytes: usize,
}

impl Ends {
    /// Starts them, fills the buffers, and copies once with a check that every byte arrives.
    pub(crate) fn start(bytes: usize) -> Result<Self> {
        Self::start_on(bytes, Pages::Small)
    }

    /// The same with buffers of such pages.
    pub(crate) fn start_on(bytes: usize, pages: Pages) -> Result<Self> {
        let sender = Worker::start(Which::Sender, bytes, pages)?;
        let receiver = Worker::start(Which::Receiver, bytes, pages)?;
        let mut ends = Self { sender, receiver, bytes };
        ends.copy(
            Shape { connections: 2, chunk: 1 << 20, wait_all: false, pinned: false, by: By::Calls },
            true,
        )?;
        Ok(ends)
    }

    pub(crate) fn copy(&mut self, shape: Shape, check: bool) -> Result<Copied> {
        let Shape { connections, chunk, wait_all, pinned, by } = shape;
        let run = Run { connections, chunk, wait_all, pinned, by, port: 0, pin: None, check };
        let (sent, received) = copy(&mut self.sender, &mut self.receiver, run)?;
        let gigabytes = f64_of(u64_of(self.bytes)) / 1e9;
        Ok(Copied {
            gigabytes_per_second: gigabytes / sent.seconds,
            cpu_per_gigabyte: (sent.cpu_seconds + received.cpu_seconds) / gigabytes,
        })
    }
}
