//! What the suites found, as JSON lines and as a Markdown table.

use std::fmt::Write as _;

use serde::Serialize;

use crate::machine::Machine;
use crate::stats::{Figure, Runs};

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

/// What became of one figure of a suite.
#[derive(Clone, PartialEq, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// Measured.
    Figure(Figure),
    /// Not to be had here, and why: an empty cell with its reason.
    Missing(String),
}

/// One figure of a suite.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// The case, as "2 connections".
    pub case: String,
    /// What was measured, as "engine / bare copy"; "total time, lazy" is one of several that are shown together.
    pub what: String,
    /// Its unit; empty for a ratio.
    pub unit: &'static str,
    /// The figure, or why there is none.
    pub outcome: Outcome,
    /// What it has to keep, if anything.
    pub limit: Option<Limit>,
}

impl Row {
    /// A figure with no limit.
    #[must_use]
    pub fn new(case: &str, what: &str, unit: &'static str, figure: Figure) -> Self {
        Self {
            case: case.to_owned(),
            what: what.to_owned(),
            unit,
            outcome: Outcome::Figure(figure),
            limit: None,
        }
    }

    /// The figure of these runs; an empty cell if one of them gave no number (of a part of nothing, say).
    #[must_use]
    pub fn of(case: &str, what: &str, unit: &'static str, runs: impl IntoIterator<Item = f64>) -> Self {
        let values: Vec<f64> = runs.into_iter().collect();
        if values.is_empty() || !values.iter().all(|value| value.is_finite()) {
            return Self::missing(case, what, unit, "a run had nothing to measure it by");
        }
        Self::new(case, what, unit, values.into_iter().collect::<Runs>().figure())
    }

    /// A figure that can't be had here, and why.
    #[must_use]
    pub fn missing(case: &str, what: &str, unit: &'static str, reason: &str) -> Self {
        let outcome = Outcome::Missing(reason.to_owned());
        Self { case: case.to_owned(), what: what.to_owned(), unit, outcome, limit: None }
    }

    /// The same with a limit.
    #[must_use]
    pub fn limited(mut self, limit: Limit) -> Self {
        self.limit = Some(limit);
        self
    }

    /// The figure, if there is one.
    #[must_use]
    pub fn figure(&self) -> Option<Figure> {
        match self.outcome {
            Outcome::Figure(figure) => Some(figure),
            Outcome::Missing(_) => None,
        }
    }

    /// Whether its spread hides it: the range reaches from its low end to more than twice that, and no limit lies
    /// clear of it. Such a figure is not reported as one.
    #[must_use]
    pub fn hidden(&self) -> bool {
        self.figure().is_some_and(|figure| {
            let wide = figure.high > 2.0 * figure.low.max(0.0) && figure.high != figure.low;
            wide && matches!(self.verdict(), None | Some(Verdict::Undecided))
        })
    }

    /// Whether it keeps its limit; `None` without one, or without a figure.
    #[must_use]
    pub fn verdict(&self) -> Option<Verdict> {
        let keeps = |value: f64| match self.limit {
            Some(Limit::AtLeast(limit)) => value >= limit,
            Some(Limit::AtMost(limit)) => value <= limit,
            None => true,
        };
        self.limit?;
        let figure = self.figure()?;
        Some(if !keeps(figure.median) {
            Verdict::Missed
        } else if keeps(figure.low) && keeps(figure.high) {
            Verdict::Kept
        } else {
            Verdict::Undecided
        })
    }
}

/// What one suite came to.
pub struct Section {
    /// The suite's name.
    pub suite: &'static str,
    /// What it measures, in a line.
    pub about: &'static str,
    /// Its figures.
    pub rows: Vec<Row>,
}

/// Everything of one call of the harness.
pub struct Report {
    /// What it was measured on.
    pub machine: Machine,
    /// The call, word by word.
    pub command: Vec<String>,
    /// Suite by suite.
    pub sections: Vec<Section>,
}

/// A row as a JSON line.
#[derive(Serialize)]
struct Line<'r> {
    suite: &'r str,
    case: &'r str,
    what: &'r str,
    unit: &'r str,
    figure: Option<Figure>,
    /// Why there is no figure.
    #[serde(skip_serializing_if = "Option::is_none")]
    missing: Option<&'r str>,
    limit: Option<Limit>,
    verdict: Option<Verdict>,
    hidden_by_spread: bool,
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
        Self { machine, command, sections: Vec::new() }
    }

    /// All rows.
    pub fn rows(&self) -> impl Iterator<Item = &Row> {
        self.sections.iter().flat_map(|section| &section.rows)
    }

    /// How it was called.
    #[must_use]
    pub fn call(&self) -> String {
        self.command.join(" ")
    }

    /// One line for the machine and command, then one a row.
    ///
    /// # Errors
    /// Never for figures that are numbers.
    pub fn json_lines(&self) -> serde_json::Result<String> {
        let mut text = serde_json::to_string(&Head { machine: &self.machine, command: &self.command })?;
        text.push('\n');
        for Section { suite, rows, .. } in &self.sections {
            for row in rows {
                let missing = match &row.outcome {
                    Outcome::Missing(reason) => Some(reason.as_str()),
                    Outcome::Figure(_) => None,
                };
                let Row { case, what, unit, limit, .. } = row;
                let (figure, limit, verdict) = (row.figure(), *limit, row.verdict());
                let hidden_by_spread = row.hidden();
                text += &serde_json::to_string(&Line {
                    suite,
                    case,
                    what,
                    unit,
                    figure,
                    missing,
                    limit,
                    verdict,
                    hidden_by_spread,
                })?;
                text.push('\n');
            }
        }
        Ok(text)
    }

    /// A paragraph on machine and command, then a table.
    #[must_use]
    pub fn markdown(&self) -> String {
        let mut text = format!("`{}` on {}.\n\n", self.call(), self.machine.sentence());
        text += "| suite | case | figure | median | range | runs | limit | |\n|---|---|---|---|---|---|---|---|\n";
        for Section { suite, rows, .. } in &self.sections {
            for row in rows {
                let Cells { median, range, runs, limit, verdict } = row.cells();
                let verdict =
                    if row.verdict() == Some(Verdict::Missed) { format!("**{verdict}**") } else { verdict };
                // Writing to a String can't fail.
                let _ = writeln!(
                    text,
                    "| {suite} | {} | {} | {median} | {range} | {runs} | {limit} | {verdict} |",
                    row.case, row.what,
                );
            }
        }
        text
    }
}

/// A row as text, for any table.
pub struct Cells {
    /// The median with its unit; a dash where there is none to report.
    pub median: String,
    /// From where to where.
    pub range: String,
    /// How many runs.
    pub runs: String,
    /// What it has to keep.
    pub limit: String,
    /// Whether it does; or why there is no figure.
    pub verdict: String,
}

impl Row {
    /// As text.
    #[must_use]
    pub fn cells(&self) -> Cells {
        let limit = match self.limit {
            Some(Limit::AtLeast(limit)) => format!("≥ {}", number(limit)),
            Some(Limit::AtMost(limit)) => format!("≤ {}", number(limit)),
            None => String::new(),
        };
        let Figure { median, low, high, runs } = match &self.outcome {
            Outcome::Figure(figure) => *figure,
            Outcome::Missing(reason) => {
                let (median, range, runs) = ("–".to_owned(), String::new(), String::new());
                return Cells { median, range, runs, limit, verdict: reason.clone() };
            }
        };
        let unit = if self.unit.is_empty() { String::new() } else { format!(" {}", self.unit) };
        let range = format!("{} to {}", number(low), number(high));
        if self.hidden() {
            let verdict = "hidden by its spread: more runs, or a quieter machine, would tell".to_owned();
            return Cells {
                median: "–".to_owned(),
                range: range + &unit,
                runs: runs.to_string(),
                limit,
                verdict,
            };
        }
        let verdict = match self.verdict() {
            Some(Verdict::Kept) => "kept",
            Some(Verdict::Undecided) => "undecided",
            Some(Verdict::Missed) => "missed",
            None => "",
        };
        let median = number(median) + &unit;
        Cells { median, range, runs: runs.to_string(), limit, verdict: verdict.to_owned() }
    }
}

/// Three significant digits, which is more than such figures hold.
pub(crate) fn number(value: f64) -> String {
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
        let rows = vec![
            row(0.5, 0.6254, 0.7, Limit::AtLeast(0.75)),
            Row::missing("peer", "total time", "ms", "it needs a network card"),
        ];
        report.sections.push(Section { suite: "bare", about: "a copy", rows });
        assert!(report.markdown().contains("| 0.625 | 0.500 to 0.700 | 7 | ≥ 0.750 | **missed** |"));
        let json = report.json_lines().unwrap();
        let line: serde_json::Value = serde_json::from_str(json.lines().nth(1).unwrap()).unwrap();
        assert_eq!(line["verdict"], "missed");
        assert_eq!(line["figure"]["median"], 0.6254);
        assert_eq!(line["limit"]["at_least"], 0.75);
        assert!(report.markdown().contains("| peer | total time | – |  |  |  | it needs a network card |"));
        let line: serde_json::Value = serde_json::from_str(json.lines().nth(2).unwrap()).unwrap();
        assert_eq!(line["missing"], "it needs a network card");
        assert!(line["figure"].is_null());
    }

    #[test]
    fn a_figure_hidden_by_its_spread_is_not_reported() {
        let free = |low, high| Row::new("c", "w", "s", Figure { median: 1.0, low, high, runs: 7 });
        assert!(free(0.6, 1.3).hidden());
        assert!(!free(0.7, 1.3).hidden());
        assert_eq!(free(0.1, 9.0).cells().median, "–");
        // All of the range on one side of the limit: the question has its answer.
        assert!(!row(0.1, 0.5, 0.7, Limit::AtMost(0.75)).hidden());
        assert!(row(0.1, 0.5, 0.8, Limit::AtMost(0.75)).hidden());
    }
}
