//! The faults themselves: put in place while an end is held, and taken away again where they pass by themselves.

#![forbid(unsafe_code)]

use std::process::Child;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use mover::net::lab::End;
use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, kill_process, prlimit};

use super::plan::Fault;
use crate::weather::Trouble;
use crate::world::World;

/// How long an end may be silent before the other takes it for lost, in these trials.
pub(crate) const PATIENCE: Duration = Duration::from_secs(2);
/// How long a cut or a standstill lasts: longer than that.
const LONG: Duration = Duration::from_millis(3500);
/// How long other troubles last.
const WHILE: Duration = Duration::from_millis(1500);
/// By how much a slow read is slower.
const SLOWER: Duration = Duration::from_millis(300);
/// Address space that is left to a process that is to get no more memory.
const LITTLE_BYTES: u64 = 128 * 1024;

/// The engines of both ends.
pub(crate) struct Engines<'a> {
    pub(crate) source: &'a Child,
    pub(crate) target: &'a Child,
}

impl Engines<'_> {
    fn pid(&self, end: End) -> Result<Pid> {
        let child = if end == End::Source { self.source } else { self.target };
        i32::try_from(child.id()).ok().and_then(Pid::from_raw).context("a process has a number")
    }
}

/// A fault that is in place, and how it passes.
pub(crate) struct Struck<'a> {
    world: &'a World,
    fault: Fault,
    victim: Option<(Pid, Rlimit)>,
}

/// Puts the fault in place.
pub(crate) fn strike<'a>(world: &'a World, fault: Fault, engines: &Engines<'_>) -> Result<Struck<'a>> {
    let mut victim = None;
    match fault {
        Fault::Kill(end) => kill_process(engines.pid(end)?, Signal::KILL)?,
        Fault::Cut(from) => world.cut(from, true)?,
        Fault::CutBoth => {
            world.cut(End::Source, true)?;
            world.cut(End::Target, true)?;
        }
        Fault::DiskErrors => world.weather.becomes(Trouble::Errors),
        Fault::DiskSlow => world.weather.becomes(Trouble::Slow(SLOWER)),
        Fault::DiskTorn => {
            world.weather.becomes(Trouble::Torn { processes: vec![engines.source.id(), engines.target.id()] })
        }
        Fault::Memory(end) => {
            let limit = address_space(engines.pid(end)?)? + LITTLE_BYTES;
            victim = Some(limited(engines.pid(end)?, Resource::As, limit)?);
        }
        Fault::Descriptors(end) => victim = Some(limited(engines.pid(end)?, Resource::Nofile, 3)?),
        Fault::Clock(end) => kill_process(engines.pid(end)?, Signal::STOP)?,
    }
    if let Fault::Clock(end) = fault {
        victim = Some((engines.pid(end)?, getrlimit(Resource::As)));
    }
    Ok(Struck { world, fault, victim })
}

/// Lowers the soft limit of a process; what it was before.
fn limited(pid: Pid, resource: Resource, limit: u64) -> Result<(Pid, Rlimit)> {
    let maximum = getrlimit(resource).maximum;
    let before = prlimit(Some(pid), resource, Rlimit { current: Some(limit), maximum })?;
    Ok((pid, before))
}

fn address_space(pid: Pid) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{}/status", pid.as_raw_nonzero()))?;
    let line =
        status.lines().find_map(|line| line.strip_prefix("VmSize:")).context("a process has a size")?;
    let kib: u64 = line.split_whitespace().next().context("a number")?.parse()?;
    Ok(kib * 1024)
}

impl Struck<'_> {
    /// Waits for as long as the fault lasts, and takes it away.
    pub(crate) fn pass(self) -> Result<()> {
        let lasting = match self.fault {
            Fault::Kill(_) => Duration::ZERO,
            Fault::Cut(_) | Fault::CutBoth | Fault::Clock(_) => LONG,
            _ => WHILE,
        };
        thread::sleep(lasting);
        self.world.cut(End::Source, false)?;
        self.world.cut(End::Target, false)?;
        self.world.weather.becomes(Trouble::None);
        let Some((pid, before)) = self.victim else { return Ok(()) };
        // It may have ended by what struck it: there is nothing to take away then.
        match self.fault {
            Fault::Memory(_) => drop(prlimit(Some(pid), Resource::As, before)),
            Fault::Descriptors(_) => drop(prlimit(Some(pid), Resource::Nofile, before)),
            _ => drop(kill_process(pid, Signal::CONT)),
        }
        Ok(())
    }
}
