//! What the suites found, as JSON lines and as a Markdown table.

use std::fmt::Write as _;

use serde::Serialize;

use crate::machine::Machine;
use crate::stats::Figure;

/// What a figure has to keep.
#[derive(Clone, Copy, PartialEq, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Limit {
    /// At least this.
    AtLeast(f64),
    /// At most this.
    AtMost(f64),
}

/// Whether a figure keeps its limit.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// It does, with its whole range.
    Kept,
    /// Its median does; part of its range does not: more runs, or a quieter machine, would tell.
    Undecided,
    /// Its median does not.
    Missed,
}

/// One figure of a suite.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// The case, as "2 connections".
    pub case: String,
    /// What was measured, as "engine / bare copy".
    pub what: String,
    /// Its unit; empty for a ratio.
    pub unit: &'static str,
    /// The figure.
    pub figure: Figure,
    /// What it has to keep, if anything.
    pub limit: Option<Limit>,
}

impl Row {
    /// A figure with no limit.
    #[must_use]
    pub fn new(case: &str, what: &str, unit: &'static str, figure: Figure) -> Self {
        Self { case: case.to_owned(), what: what.to_owned(), unit, figure, limit: None }
    }

    /// The same with a limit.
    #[must_use]
    pub fn limited(mut self, limit: Limit) -> Self {
        self.limit = Some(limit);
        self
    }

    /// Whether it keeps its limit; `None` without one.
    #[must_use]
    pub fn verdict(&self) -> Option<Verdict> {
        let keeps = |value: f64| match self.limit {
            Some(Limit::AtLeast(limit)) => value >= limit,
            Some(Limit::AtMost(limit)) => value <= limit,
            None => true,
        };
        self.limit?;
        Some(if !keeps(self.figure.median) {
            Verdict::Missed
        } else if keeps(self.figure.low) && keeps(self.figure.high) {
            Verdict::Kept
        } else {
            Verdict::Undecided
        })
    }
}

/// Everything of one call of the harness.
pub struct Report {
    machine: Machine,
    command: Vec<String>,
    rows: Vec<(&'static str, Row)>,
}

/// A row as a JSON line.
#[derive(Serialize)]
struct Line<'r> {
    suite: &'r str,
    #[serde(flatten)]
    row: &'r Row,
    verdict: Option<Verdict>,
}

/// The first JSON line.
#[derive(Serialize)]
struct Head<'r> {
    machine: &'r Machine,
    command: &'r [String],
}

impl Report {
    /// An empty one.
    #[must_use]
    pub fn new(machine: Machine, command: Vec<String>) -> Self {
        Self { machine, command, rows: Vec::new() }
    }

    /// Adds a suite's rows.
    pub fn extend(&mut self, suite: &'static str, rows: Vec<Row>) {
        self.rows.extend(rows.into_iter().map(|row| (suite, row)));
    }

    /// All rows.
    pub fn rows(&self) -> impl Iterator<Item = &Row> {
        self.rows.iter().map(|(_, row)| row)
    }

    /// One line for the machine and command, then one a row.
    ///
    /// # Errors
    /// Never for figures that are numbers.
    pub fn json_lines(&self) -> serde_json::Result<String> {
        let mut text = serde_json::to_string(&Head { machine: &self.machine, command: &self.command })?;
        text.push('\n');
        for (suite, row) in &self.rows {
            text += &serde_json::to_string(&Line { suite, row, verdict: row.verdict() })?;
            text.push('\n');
        }
        Ok(text)
    }

    /// A paragraph on machine and command, then a table.
    #[must_use]
    pub fn markdown(&self) -> String {
        let mut text =
            format!("`cargo xtask bench {}` on {}.\n\n", self.command.join(" "), self.machine.sentence());
        text += "| suite | case | figure | median | range | runs | limit | |\n|---|---|---|---|---|---|---|---|\n";
        for (suite, row) in &self.rows {
            let Figure { median, low, high, runs } = row.figure;
            let limit = match row.limit {
                Some(Limit::AtLeast(limit)) => format!("≥ {}", number(limit)),
                Some(Limit::AtMost(limit)) => format!("≤ {}", number(limit)),
                None => String::new(),
            };
            let verdict = match row.verdict() {
                Some(Verdict::Kept) => "kept",
                Some(Verdict::Undecided) => "undecided",
                Some(Verdict::Missed) => "**missed**",
                None => "",
            };
            let unit = if row.unit.is_empty() { String::new() } else { format!(" {}", row.unit) };
            // Writing to a String can't fail.
            let _ = writeln!(
                text,
                "| {suite} | {} | {} | {}{unit} | {} to {} | {runs} | {limit} | {verdict} |",
                row.case,
                row.what,
                number(median),
                number(low),
                number(high),
            );
        }
        text
    }
}

/// Three significant digits, which is more than such figures hold.
fn number(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        size if size >= 1.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(low: f64, median: f64, high: f64, limit: Limit) -> Row {
        Row::new("case", "what", "", Figure { median, low, high, runs: 7 }).limited(limit)
    }

    #[test]
    fn a_range_across_the_limit_is_not_a_pass() {
        let at_least = Limit::AtLeast(0.75);
        assert_eq!(row(0.76, 0.8, 0.9, at_least).verdict(), Some(Verdict::Kept));
        assert_eq!(row(0.70, 0.8, 0.9, at_least).verdict(), Some(Verdict::Undecided));
        assert_eq!(row(0.60, 0.7, 0.9, at_least).verdict(), Some(Verdict::Missed));
        assert_eq!(row(1.0, 1.3, 1.4, Limit::AtMost(1.35)).verdict(), Some(Verdict::Undecided));
        let free = Row::new("c", "w", "s", Figure { median: 1.0, low: 1.0, high: 1.0, runs: 1 });
        assert_eq!(free.verdict(), None);
    }

    #[test]
    fn both_forms_say_the_same() {
        let mut report = Report::new(crate::machine::describe(), vec!["bare".to_owned()]);
        report.extend("bare", vec![row(0.5, 0.6254, 0.7, Limit::AtLeast(0.75))]);
        assert!(report.markdown().contains("| 0.625 | 0.500 to 0.700 | 7 | ≥ 0.750 | **missed** |"));
        let json = report.json_lines().unwrap();
        let line: serde_json::Value = serde_json::from_str(json.lines().nth(1).unwrap()).unwrap();
        assert_eq!(line["verdict"], "missed");
        assert_eq!(line["figure"]["median"], 0.6254);
        assert_eq!(line["limit"]["at_least"], 0.75);
    }
}
