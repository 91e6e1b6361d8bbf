//! What a comparison of modes comes to: the figures of each run, and the rows they are shown in, on the terminal and
//! in the report alike.

use bench::onlooker::Fared;
use comfy_table::presets::UTF8_HORIZONTAL_ONLY;
use comfy_table::{CellAlignment, ContentArrangement, Table};
use mover::report::{Event, Summary};
use mover::units::f64_of;
use serde::{Deserialize, Serialize};

use crate::units::{show_bytes, show_count, show_ms};

/// How often the guest is asked for its speed after a restart.
pub(crate) const WATCHED_EVERY_MS: f64 = 20.0;

/// One migration, as it is kept.
#[derive(Clone, Debug)]
pub(crate) struct Run {
    /// Its figures.
    pub(crate) result: Figures,
    /// What the source told on the way.
    pub(crate) events: Vec<Event>,
    /// Whether the guest's speed was looked at.
    pub(crate) watched: bool,
}

/// One line of `demo --json`: the engine's summary, and what only an onlooker can measure.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub(crate) struct Figures {
    /// From the source.
    #[serde(flatten)]
    pub(crate) summary: Summary,
    /// From the restart until the guest works at 95 % of its rate before; nothing if it did not get there while it
    /// was watched.
    pub(crate) full_speed_ms: Option<f64>,
    /// How the guest fared, where it was looked at closely.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) fared: Option<Fared>,
}

/// A row: what it is called, and a value for each run.
pub(crate) struct Row {
    /// The first column.
    pub(crate) name: &'static str,
    /// The others.
    pub(crate) values: Vec<String>,
    /// Whether a line is drawn above it.
    pub(crate) begins_group: bool,
}

/// All rows for these runs.
pub(crate) fn rows(runs: &[Run]) -> Vec<Row> {
    let mut rows = Vec::new();
    let mut row = |begins_group, name, value: &dyn Fn(&Figures) -> String| {
        rows.push(Row { name, begins_group, values: runs.iter().map(|run| value(&run.result)).collect() });
    };
    let first_total = runs.first().map_or(0.0, |run| run.result.summary.total_ms);
    row(true, "total time", &|f| show_ms(f.summary.total_ms));
    if runs.len() > 1 && first_total > 0.0 {
        row(false, "  of the first", &|f| format!("{:.0} %", 100.0 * f.summary.total_ms / first_total));
    }
    row(false, "time to restart", &|f| show_ms(f.summary.restart_ms));
    row(false, "downtime", &|f| show_ms(f.summary.downtime_ms));
    if runs.iter().any(|run| run.watched) {
        row(false, "time to full speed", &full_speed);
    }
    row(false, "rounds", &|f| show_count(f.summary.rounds.into()));
    row(true, "pages: zero", &|f| show_count(f.summary.pages_zero));
    row(false, "  data", &|f| show_count(f.summary.pages_data));
    row(false, "  by reference", &|f| show_count(f.summary.pages_by_reference));
    row(false, "  refetched", &|f| show_count(f.summary.pages_refetched));
    row(false, "  after the restart", &|f| show_count(f.summary.pages_lazy));
    row(false, "faults served", &|f| show_count(f.summary.faults_served));
    row(true, "over the link", &|f| show_bytes(f.summary.link_bytes));
    row(false, "from disk", &|f| show_bytes(f.summary.disk_bytes));
    row(false, "lanes", &|f| show_count(f.summary.lanes.into()));
    row(false, "sent by", &|f| f.summary.send_path.clone());
    row(false, "loaded by", &|f| f.summary.load_path.clone());
    row(false, "CPU source", &|f| show_ms(f.summary.cpu_ms_source));
    row(false, "CPU target", &|f| show_ms(f.summary.cpu_ms_target));
    row(true, "references checked", &|f| show_count(f.summary.pages_checked));
    row(false, "  did not hold", &|f| show_count(f.summary.check_failures));
    row(false, "pages verified", &|f| show_count(f.summary.verified_pages));
    row(false, "  mismatched", &|f| show_count(f.summary.mismatched_pages));
    rows
}

/// How soon the guest was as fast as before, no finer than it was looked at.
fn full_speed(figures: &Figures) -> String {
    match figures.full_speed_ms {
        None => "not reached".to_owned(),
        Some(ms) if ms < WATCHED_EVERY_MS => format!("< {WATCHED_EVERY_MS:.0} ms"),
        Some(ms) => show_ms(ms),
    }
}

/// The rows for a terminal of `width` columns.
pub(crate) fn table(runs: &[Run], width: usize) -> String {
    let mut table = Table::new();
    table.load_style(UTF8_HORIZONTAL_ONLY).set_content_arrangement(ContentArrangement::Dynamic);
    table.set_width(u16::try_from(width).unwrap_or(u16::MAX));
    let modes = runs.iter().map(|run| run.result.summary.mode.clone());
    table.set_header(std::iter::once(String::new()).chain(modes));
    let mut cells: Vec<Vec<String>> = Vec::new();
    // A group is one cell row of several lines, so that lines are only drawn between groups.
    for row in rows(runs) {
        let values = std::iter::once(row.name.to_owned()).chain(row.values);
        match cells.last_mut() {
            Some(last) if !row.begins_group => {
                for (cell, value) in last.iter_mut().zip(values) {
                    cell.push('\n');
                    cell.push_str(&value);
                }
            }
            _ => cells.push(values.collect()),
        }
    }
    for row in cells {
        table.add_row(row);
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table.to_string()
}

/// How long `run` took, in milliseconds: the axis of its drawing ends there.
pub(crate) fn wall_ms(run: &Run) -> f64 {
    let last = run.events.iter().map(at_ms).fold(0.0, f64::max);
    last.max(run.result.summary.total_ms)
}

/// When an event happened, in milliseconds since the migration began.
pub(crate) fn at_ms(event: &Event) -> f64 {
    match event {
        Event::Phase { at_ms, .. } | Event::Round { at_ms, .. } | Event::Notice { at_ms, .. } => *at_ms,
        Event::Sample(sample) => sample.at_ms,
    }
}

/// Megabytes (binary) for an axis.
pub(crate) fn mib(bytes: f64) -> f64 {
    bytes / f64_of(1 << 20)
}
