//! `xen-lab compare`: one guest that has read files of the shared disk, migrated by stock's helper and by ours in each mode, in turns,
//! over a wire shaped to half of what stock's migration takes of it unshaped. On each host a second guest sees all the while how
//! late its timer wakes it. Under emulation only the ratios mean anything.

mod table;

use std::fmt;
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use serde::{Deserialize, Serialize};

use crate::beats::Watch;
use crate::cache::Cache;
use crate::guest::{Count, Guest, Kind};
use crate::lab::Lab;
use crate::moves::{DRAINS, Helper, Migration, PROGRAM, number_before};
use crate::probe::Lateness;
use crate::{payload, wait};
use table::MIB;

/// Longest migration, and longest drain behind it.
const SECONDS: u32 = 900;
/// How long the guests beside are watched while nobody migrates.
const CALM: Duration = Duration::from_secs(15);
/// How long a guest that has moved is watched to see how fast it is.
const PACE: Duration = Duration::from_secs(6);
/// What the wire is called in dom0.
const WIRE: &str = "grep -l 52:54:00:77 /sys/class/net/*/address | head -1 | xargs dirname";

/// What to measure, and where.
pub(crate) struct Order {
    /// The lab's name: it is brought up for this, and ended.
    pub(crate) lab: String,
    /// Migrations each way is measured for.
    pub(crate) runs: usize,
    /// MiB of files the guest has read.
    pub(crate) files_mib: u32,
    /// Where each run is added to those before.
    pub(crate) record: Option<PathBuf>,
    /// Where the binaries are.
    pub(crate) binaries: PathBuf,
}

/// How the guest is migrated.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Way {
    Stock,
    Plain,
    Refer,
    Lazy,
}

const WAYS: [Way; 4] = [Way::Stock, Way::Plain, Way::Refer, Way::Lazy];

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Stock => "stock",
            Self::Plain => "plain",
            Self::Refer => "refer",
            Self::Lazy => "lazy",
        })
    }
}

impl Way {
    /// The stream goes in the clear, and so do lanes.
    fn migration(self) -> Migration {
        let (helper, environment) = match self {
            Self::Stock => (Helper::Stock, String::new()),
            mode => (Helper::Ours, format!("PAGEFERRY_MODE={mode} PAGEFERRY_LANES_PLAINTEXT=true")),
        };
        Migration { environment, limit: wait::limit(SECONDS), ..Migration::new(helper, helper) }
    }
}

/// What one migration took.
#[derive(Clone, Default, Serialize, Deserialize)]
struct Taken {
    /// Seconds until the source is not needed any more.
    total: f64,
    /// Seconds until the guest beats on the target.
    restart: f64,
    /// Seconds without a beat.
    downtime: f64,
    /// Seconds of CPU time of each dom0.
    cpu: [f64; 2],
    /// Seconds each host's processor had nothing to do.
    idle: [f64; 2],
    /// Bytes on the wire, both ways; bytes the target's host read of the shared disk.
    wire: f64,
    disk: f64,
    /// Pages the guest verified in a second when it was whole.
    pace: f64,
    /// How late the guests beside woke.
    beside: [Lateness; 2],
    /// Where pages went by lanes: sent, zero, by reference, sent after all.
    sent: Option<u64>,
    zero: Option<u64>,
    references: Option<u64>,
    refetched: Option<u64>,
    /// Outstanding at the restart, accesses to those; what paging took, in the helper's words.
    outstanding: Option<u64>,
    faults: Option<u64>,
    paging: Option<String>,
}

/// Each way once, over the same wire.
#[derive(Clone, Serialize, Deserialize)]
struct Run {
    commit: String,
    files_mib: u32,
    /// Bytes a second that the wire carried, unshaped by stock, and shaped.
    unshaped: f64,
    rate: f64,
    /// How late the guests beside woke while nobody migrated.
    calm: [Lateness; 2],
    /// In the order of [`WAYS`].
    taken: Vec<Taken>,
}

impl Order {
    /// Brings up the lab, measures, prints the table, ends the lab.
    pub(crate) fn run(&self, cache: &Cache) -> Result<String> {
        let mut runs = self.recorded()?;
        runs.extend(Lab::for_one(cache, &self.lab, &self.binaries, "compare", |lab| self.measure(lab))?);
        table::table(&runs)
    }

    /// Runs of before, which must be of the same guest.
    fn recorded(&self) -> Result<Vec<Run>> {
        let Some(record) = self.record.as_ref().filter(|record| record.exists()) else { return Ok(vec![]) };
        let text = fs::read_to_string(record)?;
        let runs: Result<Vec<Run>, _> = text.lines().map(serde_json::from_str).collect();
        let runs = runs.with_context(|| format!("{} has no runs in it", record.display()))?;
        if let Some(other) = runs.iter().find(|run| run.files_mib != self.files_mib) {
            bail!("{} is of a guest that has read {} MiB", record.display(), other.files_mib);
        }
        Ok(runs)
    }

    fn measure(&self, lab: &Lab) -> Result<Vec<Run>> {
        let guest = Guest {
            memory_mib: self.files_mib + 256,
            files_mib: self.files_mib,
            checked_mib: 32,
            vcpus: 2,
            beat_ms: 50,
            ..Guest::small(Kind::Pvh)
        };
        let index = format!("{PROGRAM} index build /dev/vdb");
        wait::timed("the disk's index", || lab.host(1).run_within(&index, wait::limit(SECONDS)))?;
        let beside = Guest::probe();
        let mut count = thread::scope(|scope| {
            let others = scope.spawn(|| (1..=2).try_for_each(|host| beside.create(lab.host(host)).map(drop)));
            let created = guest.create(lab.host(1)).and_then(|count| guest.verifies_once(lab.host(1), count));
            others.join().map_err(|_| anyhow!("who creates the guests beside died"))??;
            created
        })?;
        let unshaped;
        (unshaped, count) = there_and_back(lab, &guest, &beside, count, Way::Stock)?;
        let unshaped = unshaped.wire / unshaped.restart;
        let rate = unshaped / 2.0;
        shape(lab, rate)?;
        eprintln!("    the wire carries {:.1} MiB/s from here on", rate / MIB);
        let mut runs = Vec::new();
        for number in 0..self.runs {
            let mut run = Run {
                commit: payload::commit()?,
                files_mib: self.files_mib,
                unshaped,
                rate,
                calm: calm(lab, &beside)?,
                taken: vec![Taken::default(); WAYS.len()],
            };
            for at in 0..WAYS.len() {
                // None has the better place in every run.
                let at = (at + number) % WAYS.len();
                let way = WAYS[at];
                let one = there_and_back(lab, &guest, &beside, count, way);
                let (one, after) = one.with_context(|| format!("{way}, run {number}"))?;
                eprintln!(
                    "    {way}: {:.1} s, restart after {:.1} s, without a beat for {:.2} s",
                    one.total, one.restart, one.downtime
                );
                run.taken[at] = one;
                count = after;
            }
            self.keep(&run)?;
            runs.push(run);
        }
        guest.verifies_all(lab.host(1), count)?;
        Ok(runs)
    }

    fn keep(&self, run: &Run) -> Result<()> {
        let Some(record) = &self.record else { return Ok(()) };
        let mut file = OpenOptions::new().append(true).create(true).open(record)?;
        writeln!(file, "{}", serde_json::to_string(run)?)?;
        Ok(())
    }
}

fn on_both<T>(each: impl Fn(usize) -> Result<T>) -> Result<[T; 2]> {
    Ok([each(1)?, each(2)?])
}

/// How late the guests beside wake while nobody migrates.
fn calm(lab: &Lab, beside: &Guest) -> Result<[Lateness; 2]> {
    let look = || on_both(|number| Lateness::of(beside, lab.host(number)));
    let before = look()?;
    thread::sleep(CALM);
    let after = look()?;
    Ok([0, 1].map(|at| after[at].since(&before[at])))
}

/// What stands on meters that only rise.
struct Meters {
    cpu: [f64; 2],
    idle: [f64; 2],
    wire: f64,
    disk: f64,
    beside: [Lateness; 2],
}

impl Meters {
    fn read(lab: &Lab, beside: &Guest) -> Result<Self> {
        Ok(Self {
            cpu: on_both(|number| figure(lab, number, "xl list Domain-0 | awk 'NR == 2 { print $6 }'"))?,
            idle: on_both(|number| figure(lab, number, IDLE))?,
            wire: wire_bytes(lab)?,
            disk: disk_bytes(lab)?,
            beside: on_both(|number| Lateness::of(beside, lab.host(number)))?,
        })
    }

    /// What has been added since `before`.
    fn since(&self, before: &Self) -> Taken {
        Taken {
            cpu: [0, 1].map(|at| self.cpu[at] - before.cpu[at]),
            idle: [0, 1].map(|at| self.idle[at] - before.idle[at]),
            wire: self.wire - before.wire,
            disk: self.disk - before.disk,
            beside: [0, 1].map(|at| self.beside[at].since(&before.beside[at])),
            ..Taken::default()
        }
    }
}

/// From host 1 to host 2 this way; and back, over a wire that is not shaped there.
fn there_and_back(
    lab: &Lab,
    guest: &Guest,
    beside: &Guest,
    before: Count,
    way: Way,
) -> Result<(Taken, Count)> {
    for number in 1..=2 {
        lab.host(number).run(&format!("rm -f {DRAINS}"))?;
    }
    guest.forget_counts(lab.host(2))?;
    // A guest restarts early only where no other helper can save it.
    let early = way == Way::Lazy;
    if early {
        lab.host(2).run(&format!("{PROGRAM} xen install"))?;
    }
    let meters = Meters::read(lab, beside)?;
    let (watch, began) = (Watch::begin(&lab.directory().join("lun.img"))?, Instant::now());
    let report = lab.try_migrate(guest, 1, &way.migration())?;
    if report.source.code != 0 {
        bail!("the migration failed:\n{}", report.text());
    }
    if early {
        lab.host(1).run_within(&format!("{PROGRAM} status --wait"), wait::limit(SECONDS))?;
    }
    let total = began.elapsed().as_secs_f64();
    let taken = Meters::read(lab, beside)?.since(&meters);
    let count = guest.is_back(lab.host(2), before)?;
    let pause = watch.end()?;
    if early {
        lab.host(2).run(&format!("{PROGRAM} status --wait && {PROGRAM} xen uninstall"))?;
    }
    let pace = pace(lab, guest, count)?;
    // The one says it when it is through, the other long after its libxl is gone.
    let source = report.source.text() + &lab.host(1).run(&format!("cat {DRAINS} 2>/dev/null; true"))?;
    let target = lab.host(2).run(&format!("cat {DRAINS} 2>/dev/null; true"))?;
    guest.forget_counts(lab.host(1))?;
    let back = lab.migrate(guest, 2, count, &Way::Plain.migration())?;
    let lanes = source.lines().find(|line| line.contains("lanes (")).unwrap_or_default();
    Ok((
        Taken {
            total,
            restart: (pause.ended - began).as_secs_f64(),
            downtime: pause.length().as_secs_f64(),
            pace,
            sent: number_before(lanes, " pages sent"),
            zero: number_before(lanes, " zero,"),
            references: number_before(lanes, " by reference"),
            refetched: number_before(lanes, " had to be sent"),
            outstanding: number_before(&target, " pages were outstanding"),
            faults: number_before(&target, " accesses to them answered"),
            paging: target.split_once("had to be sent; ").map(|(_, cost)| cost.trim().to_owned()),
            ..taken
        },
        back,
    ))
}

/// Pages that the guest, whole on host 2, verifies in a second.
fn pace(lab: &Lab, guest: &Guest, since: Count) -> Result<f64> {
    let first = guest.counts_on(lab.host(2), since)?;
    thread::sleep(PACE);
    let last = guest.counts_on(lab.host(2), first)?;
    let milliseconds = u32::try_from(last.at_ms - first.at_ms)?;
    Ok(f64::from(u32::try_from(last.verified - first.verified)?) / f64::from(milliseconds) * 1000.0)
}

/// Has host 1 send no more than `rate` bytes a second.
fn shape(lab: &Lab, rate: f64) -> Result<()> {
    let command = format!(
        "modprobe sch_tbf; tc qdisc replace dev $(basename $({WIRE})) root tbf rate {rate:.0}bps burst 262144 latency 400ms"
    );
    lab.host(1).run(&command).map(drop)
}

fn figure(lab: &Lab, host: usize, command: &str) -> Result<f64> {
    let said = lab.host(host).run(command)?;
    said.trim().parse().with_context(|| format!("host {host}: `{command}` says {said:?}"))
}

/// Seconds its processor has had nothing to do, from xen-utils' own bindings (Debian 12 has them), which tell nanoseconds.
const IDLE: &str =
    "python3 -c \"from xen.lowlevel.xc import xc; print(xc().getcpuinfo(1)[0]['idletime'] / 1e9)\"";

/// What host 1 has sent and been sent over the wire.
fn wire_bytes(lab: &Lab) -> Result<f64> {
    figure(
        lab,
        1,
        &format!(
            "cd $({WIRE})/statistics && awk '{{ sum += $1 }} END {{ printf \"%.0f\", sum }}' rx_bytes tx_bytes"
        ),
    )
}

/// What host 2 has read of the shared disk. (Documentation/block/stat.rst of Linux: the third figure, in sectors of 512.)
fn disk_bytes(lab: &Lab) -> Result<f64> {
    figure(lab, 2, "awk '{ printf \"%.0f\", $3 * 512 }' /sys/block/vdb/stat")
}
