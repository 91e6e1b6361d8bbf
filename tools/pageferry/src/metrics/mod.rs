//! `pageferry metrics`: what runs here and what has run, for Prometheus: its text format, once on standard output or, to
//! whoever asks, on a local socket.
//!
//! It reads what `pageferry status` reads (a note each running end rewrites some ten times a second), the records of
//! migrations, and a tally that each end adds itself to when it ends. No migration knows or waits for a scrape.

mod exposition;
mod serve;
pub(crate) mod tally;

use mover::journal::{self, Role};
use mover::process::launch;
use mover::report::{Phase, Sample};
use mover::units::f64_of;

use crate::cli::MetricsArgs;
use crate::console::Console;
use crate::failure::Outcome;
use crate::state;
use crate::status::{self, Running};
use exposition::{Kind, Text};

/// Does what the command says.
pub(crate) fn run(args: &MetricsArgs, console: &Console) -> Outcome {
    match &args.socket {
        Some(path) => serve::run(path, console),
        None => console.print(text().trim_end()),
    }
}

/// The phases, and the label of each.
const PHASES: [(Phase, &str); 8] = [
    (Phase::Connect, "connect"),
    (Phase::Arm, "arm"),
    (Phase::Rounds, "rounds"),
    (Phase::Stop, "stop"),
    (Phase::Verify, "verify"),
    (Phase::Commit, "commit"),
    (Phase::Drain, "drain"),
    (Phase::Done, "done"),
];

/// Every family, as it stands now.
fn text() -> String {
    let directory = launch::runtime_dir();
    let notes = status::look_everywhere();
    let mut out = Text::default();
    out.family("pageferry_build_info", Kind::Gauge, "The program's version, as a label; always 1.");
    out.sample(&[("version", env!("CARGO_PKG_VERSION"))], 1.0);

    out.family("pageferry_migrations_running", Kind::Gauge, "Ends of migrations that run on this host now.");
    for role in [Role::Source, Role::Target] {
        let count = notes.running.iter().filter(|one| one.role == role).count();
        out.sample(&[("role", name_of(role))], count_of(count));
    }
    out.family(
        "pageferry_migrations_forsaken",
        Kind::Gauge,
        "Ends that were killed and left their note behind; `pageferry status` clears them.",
    );
    out.sample(&[], count_of(notes.left.len()));
    unsettled(&notes.running, &mut out);
    running(&notes.running, &mut out);
    tally::read(&directory).show(&mut out);
    out.into_string()
}

/// Records of migrations whose end does not run: an operator's to settle.
fn unsettled(running: &[Running], out: &mut Text) {
    out.family(
        "pageferry_records_readable",
        Kind::Gauge,
        "Whether the records of migrations could be read; 0 means that pageferry_migrations_unsettled says nothing.",
    );
    let records = journal::list(&state::records_dir());
    out.sample(&[], f64::from(u8::from(records.is_ok())));
    let here = |id: &str, role| running.iter().any(|one| one.migration == id && one.role == role);
    let open = records.unwrap_or_default();
    let open = open.iter().filter(|(_, record)| !here(&record.migration, record.role)).count();
    out.family(
        "pageferry_migrations_unsettled",
        Kind::Gauge,
        "Records of migrations whose end does not run any more: `pageferry resolve` says what they are about.",
    );
    out.sample(&[], count_of(open));
}

/// What the ends that run have noted.
fn running(all: &[Running], out: &mut Text) {
    type Value = fn(&Sample) -> f64;
    const PREFIX: &str = "pageferry_migration_";
    let mut each = |name: &str, kind, help, only: Option<Role>, value: &dyn Fn(&Running) -> Option<f64>| {
        out.family(&format!("{PREFIX}{name}"), kind, help);
        for one in all.iter().filter(|one| only.is_none_or(|role| role == one.role)) {
            if let Some(value) = value(one) {
                out.sample(&labels(one), value);
            }
        }
    };
    each("age_seconds", Kind::Gauge, "Time from its begin to its last note.", None, &|one| {
        Some(one.at_ms / 1e3)
    });
    let source = Some(Role::Source);
    let gauges: [(&str, &str, Option<Role>, Value); 7] = [
        ("round", "Round it is in, from 1.", source, |s| f64::from(s.round)),
        ("pages_left", "Pages still to send in this round, and known dirty since.", source, |s| {
            f64_of(s.pages_left)
        }),
        ("outstanding_pages", "Pages sent by reference and not loaded yet.", None, |s| f64_of(s.outstanding)),
        ("link_bytes_per_second", "Rate over the link, in the last tenth of a second.", source, |s| {
            s.link_rate
        }),
        ("disk_bytes_per_second", "Rate of the target's loads from disks.", None, |s| s.disk_rate),
        ("guest_paused", "Whether the guest stands still.", source, |s| f64::from(u8::from(s.paused))),
        (
            "restart_in_seconds",
            "Predicted time to the restart; NaN where there is no prediction.",
            source,
            |s| s.restart_in_ms.map_or(f64::NAN, |ms| ms / 1e3),
        ),
    ];
    for (name, help, only, value) in gauges {
        each(name, Kind::Gauge, help, only, &|one| one.sample.as_ref().map(value));
    }
    each("downtime_seconds", Kind::Gauge, "Downtime, once it is over.", source, &|one| {
        Some(one.sample.as_ref()?.downtime_ms? / 1e3)
    });
    let counters: [(&str, &str, Option<Role>, Value); 5] = [
        ("link_bytes_total", "Bytes over the link, headers included.", source, |s| f64_of(s.link_bytes)),
        ("disk_bytes_total", "Bytes that the target has read from disks.", None, |s| f64_of(s.disk_bytes)),
        ("references_checked_total", "References loaded and checked.", None, |s| f64_of(s.pages.checked)),
        (
            "reference_failures_total",
            "References that did not hold: the page is sent after all.",
            None,
            |s| f64_of(s.pages.check_failures),
        ),
        ("faults_served_total", "Faults of the guest on outstanding pages, answered.", None, |s| {
            f64_of(s.pages.faults_served)
        }),
    ];
    for (name, help, only, value) in counters {
        each(name, Kind::Counter, help, only, &|one| one.sample.as_ref().map(value));
    }
    by_fate(all, out);
    out.family(&format!("{PREFIX}phase"), Kind::Gauge, "1 for the phase it is in, 0 for the others.");
    for one in all {
        for (phase, name) in PHASES {
            let mut labels = labels(one).to_vec();
            labels.push(("phase", name));
            out.sample(&labels, f64::from(u8::from(one.phase == Some(phase))));
        }
    }
}

fn by_fate(all: &[Running], out: &mut Text) {
    out.family("pageferry_migration_pages_total", Kind::Counter, "Pages sent, by what became of them.");
    for one in all.iter().filter(|one| one.role == Role::Source) {
        let Some(pages) = one.sample.map(|sample| sample.pages) else { continue };
        let fates = tally::fates([pages.zero, pages.data, pages.by_reference, pages.refetched]);
        for (fate, count) in fates {
            let mut labels = labels(one).to_vec();
            labels.push(("fate", fate));
            out.sample(&labels, f64_of(count));
        }
    }
}

fn labels(one: &Running) -> [(&'static str, &str); 3] {
    [("migration", &one.migration), ("role", name_of(one.role)), ("guest", &one.guest)]
}

fn name_of(role: Role) -> &'static str {
    match role {
        Role::Source => "source",
        Role::Target => "target",
    }
}

fn count_of(count: usize) -> f64 {
    f64_of(mover::units::u64_of(count))
}
