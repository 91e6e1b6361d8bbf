//! `xen-lab compare`: one guest that has read files of the shared disk, migrated by stock's helper and by ours in each mode, in turns,
//! over a wire shaped to half of what stock's migration takes of it unshaped. Under emulation only the ratios mean anything.

use std::fmt;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use comfy_table::Table;
use comfy_table::presets::ASCII_MARKDOWN;

use crate::beats::Watch;
use crate::cache::Cache;
use crate::guest::{Count, Guest, Kind};
use crate::lab::Lab;
use crate::moves::{DRAINS, Helper, Migration, PROGRAM, number_before};
use crate::speed::{cpu, median};
use crate::wait;

/// Longest migration, and longest drain behind it.
const SECONDS: u32 = 900;
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
    /// Where the binaries are.
    pub(crate) binaries: PathBuf,
}

/// How the guest is migrated.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Way {
    Stock,
    Ours(&'static str),
}

const WAYS: [Way; 4] = [Way::Stock, Way::Ours("plain"), Way::Ours("refer"), Way::Ours("lazy")];

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Stock => "stock",
            Self::Ours(mode) => mode,
        })
    }
}

impl Way {
    /// The stream goes in the clear, and so do lanes.
    fn migration(self) -> Migration {
        let (helper, environment) = match self {
            Self::Stock => (Helper::Stock, String::new()),
            Self::Ours(mode) => {
                (Helper::Ours, format!("PAGEFERRY_MODE={mode} PAGEFERRY_LANES_PLAINTEXT=true"))
            }
        };
        Migration { environment, limit: wait::limit(SECONDS), ..Migration::new(helper, helper) }
    }
}

/// What one migration took.
#[derive(Clone, Copy, Default)]
struct Taken {
    /// Seconds until the source is not needed any more.
    total: f64,
    /// Seconds until the guest beats on the target.
    restart: f64,
    /// Seconds without a beat.
    downtime: f64,
    /// Seconds of CPU time of both dom0s.
    cpu: f64,
    /// Bytes on the wire, both ways; bytes the target's host read of the shared disk.
    wire: f64,
    disk: f64,
    /// Pages by reference, outstanding at the restart, accesses to those, where something tells.
    references: Option<u64>,
    outstanding: Option<u64>,
    faults: Option<u64>,
}

impl Order {
    /// Brings up the lab, measures, prints the table, ends the lab.
    pub(crate) fn run(&self, cache: &Cache) -> Result<String> {
        Lab::for_one(cache, &self.lab, &self.binaries, "compare", |lab| self.measure(lab))
    }

    fn measure(&self, lab: &Lab) -> Result<String> {
        let guest = Guest {
            memory_mib: self.files_mib + 256,
            files_mib: self.files_mib,
            checked_mib: 64,
            vcpus: 2,
            beat_ms: 50,
            ..Guest::small(Kind::Pvh)
        };
        lab.host(1).run_within(&format!("{PROGRAM} index build /dev/vdb"), wait::limit(SECONDS))?;
        let created = guest.create(lab.host(1))?;
        let mut count = guest.verifies_once(lab.host(1), created)?;
        let unshaped;
        (unshaped, count) = there_and_back(lab, &guest, count, Way::Stock)?;
        let rate = unshaped.wire / unshaped.restart / 2.0;
        shape(lab, rate)?;
        eprintln!("    the wire carries {:.1} MiB/s from here on", rate / MIB);
        let mut rows: Vec<(Way, Vec<Taken>)> = WAYS.iter().map(|way| (*way, Vec::new())).collect();
        for run in 0..self.runs {
            for at in 0..WAYS.len() {
                // None has the better place in every run.
                let (way, taken) = &mut rows[(at + run) % WAYS.len()];
                let one = there_and_back(lab, &guest, count, *way);
                let (one, after) = one.with_context(|| format!("{way}, run {run}"))?;
                eprintln!("    {way}: {:.1} s, without a beat for {:.2} s", one.total, one.downtime);
                taken.push(one);
                count = after;
            }
        }
        guest.verifies_all(lab.host(1), count)?;
        guest.destroy(lab.host(1))?;
        Ok(table(&rows, rate))
    }
}

/// From host 1 to host 2 this way; and back, over a wire that is not shaped there.
fn there_and_back(lab: &Lab, guest: &Guest, before: Count, way: Way) -> Result<(Taken, Count)> {
    for number in 1..=2 {
        lab.host(number).run(&format!("rm -f {DRAINS}"))?;
    }
    // A guest restarts early only where no other helper can save it.
    let early = way == Way::Ours("lazy");
    if early {
        lab.host(2).run(&format!("{PROGRAM} xen install"))?;
    }
    let (cpu_before, wire, disk) = (cpu(lab)?, wire_bytes(lab)?, disk_bytes(lab)?);
    let (watch, began) = (Watch::begin(&lab.directory().join("lun.img"))?, Instant::now());
    let report = lab.try_migrate(guest, 1, &way.migration())?;
    if report.source.code != 0 {
        bail!("the migration failed:\n{}", report.text());
    }
    if early {
        lab.host(1).run_within(&format!("{PROGRAM} status --wait"), wait::limit(SECONDS))?;
    }
    let total = began.elapsed().as_secs_f64();
    let taken = Taken {
        total,
        wire: wire_bytes(lab)? - wire,
        disk: disk_bytes(lab)? - disk,
        cpu: cpu(lab)? - cpu_before,
        references: number_before(&report.source.text(), " by reference"),
        ..Taken::default()
    };
    let drained = lab.host(2).run(&format!("cat {DRAINS} 2>/dev/null; true"))?;
    let count = guest.is_back(lab.host(2), before)?;
    let pause = watch.end()?;
    if early {
        lab.host(2).run(&format!("{PROGRAM} status --wait && {PROGRAM} xen uninstall"))?;
    }
    let back = lab.migrate(guest, 2, count, &Way::Ours("plain").migration())?;
    Ok((
        Taken {
            restart: (pause.ended - began).as_secs_f64(),
            downtime: pause.length().as_secs_f64(),
            outstanding: number_before(&drained, " pages were outstanding"),
            faults: number_before(&drained, " accesses to them answered"),
            ..taken
        },
        back,
    ))
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

const MIB: f64 = 1_048_576.0;

fn table(rows: &[(Way, Vec<Taken>)], rate: f64) -> String {
    let mut table = Table::new();
    table.load_style(ASCII_MARKDOWN);
    table.set_header([
        "helper",
        "total",
        "to the restart",
        "of stock's total",
        "downtime",
        "dom0s' CPU",
        "wire",
        "disk",
        "by reference",
        "outstanding",
        "accesses",
    ]);
    let stock = &rows[0].1;
    for (way, taken) in rows {
        let of = |value: fn(&Taken) -> f64| median(taken.iter().map(value));
        let pages = |value: fn(&Taken) -> Option<u64>| {
            let least = taken.iter().filter_map(value).min();
            least.map_or_else(|| "–".to_owned(), |least| least.to_string())
        };
        let ratio = |value: fn(&Taken) -> f64| {
            median(taken.iter().zip(stock).map(|(taken, stock)| value(taken) / stock.total))
        };
        table.add_row([
            way.to_string(),
            format!("{:.1} s", of(|taken| taken.total)),
            format!("{:.1} s", of(|taken| taken.restart)),
            format!("{:.2}, restart {:.2}", ratio(|taken| taken.total), ratio(|taken| taken.restart)),
            format!("{:.2} s", of(|taken| taken.downtime)),
            format!("{:.1} s", of(|taken| taken.cpu)),
            format!("{:.0} MiB", of(|taken| taken.wire) / MIB),
            format!("{:.0} MiB", of(|taken| taken.disk) / MIB),
            pages(|taken| taken.references),
            pages(|taken| taken.outstanding),
            pages(|taken| taken.faults),
        ]);
    }
    format!("the wire: {:.1} MiB/s; medians of {} runs\n\n{table}", rate / MIB, stock.len())
}
