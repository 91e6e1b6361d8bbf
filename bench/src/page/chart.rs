//! Charts of figures as plain HTML: a line for each case, a dot for the median, a bar for its range, a stroke for its
//! limit. What is called "total time, lazy" stands in one chart with "total time, stock", each in its colour.

#![forbid(unsafe_code)]

use std::fmt::Write as _;

use super::escaped;
use crate::report::{Limit, Outcome, Row, Verdict, number};

/// Colours there are in the style sheet; more series than that begin again.
const COLOURS: usize = 6;

/// One chart: rows of one quantity.
struct Chart<'r> {
    name: &'r str,
    unit: &'static str,
    series: Vec<&'r str>,
    rows: Vec<(&'r Row, usize)>,
}

/// All charts of a suite's rows, in their order.
pub(super) fn charts(rows: &[Row]) -> String {
    let mut out = String::new();
    for chart in grouped(rows) {
        put(&mut out, &chart);
    }
    out
}

/// Quantity and series of a figure's name: "total time, lazy" is the series "lazy" of "total time".
fn split(what: &str) -> (&str, &str) {
    what.split_once(", ").unwrap_or((what, ""))
}

fn grouped(rows: &[Row]) -> Vec<Chart<'_>> {
    let mut charts: Vec<Chart<'_>> = Vec::new();
    for row in rows {
        let (name, series) = split(&row.what);
        let place = charts.iter().position(|chart| chart.name == name && chart.unit == row.unit);
        let place = place.unwrap_or_else(|| {
            charts.push(Chart { name, unit: row.unit, series: Vec::new(), rows: Vec::new() });
            charts.len() - 1
        });
        let chart = &mut charts[place];
        let of = chart.series.iter().position(|known| *known == series).unwrap_or_else(|| {
            chart.series.push(series);
            chart.series.len() - 1
        });
        chart.rows.push((row, of));
    }
    charts
}

fn put(out: &mut String, chart: &Chart<'_>) {
    let reach = chart.rows.iter().map(|(row, _)| reach(row)).fold(0.0, f64::max);
    if reach <= 0.0 && chart.rows.iter().all(|(row, _)| row.figure().is_some()) {
        // All are zero: nothing to draw, and the table says so.
        return;
    }
    // With one case, or with more series than colours, lines are called by their series; else by their case.
    let cases_alike = chart.rows.iter().all(|(row, _)| row.case == chart.rows[0].0.case);
    let by_series = chart.series.len() > 1 && (cases_alike || chart.series.len() > COLOURS);
    let mut about = if chart.unit.is_empty() { String::new() } else { format!(" in {}", chart.unit) };
    if by_series && cases_alike {
        about += &format!(" \u{b7} {}", chart.rows[0].0.case);
    }
    if let [series] = chart.series[..]
        && !series.is_empty()
    {
        about += &format!(" \u{b7} {series}");
    }
    // Writing to a String can't fail, here and below.
    let _ =
        writeln!(out, "<figure><figcaption><b>{}</b>{}</figcaption>", escaped(chart.name), escaped(&about));
    if chart.series.len() > 1 && !by_series {
        out.push_str("<ul class=\"legend\">");
        for (at, series) in chart.series.iter().enumerate() {
            let _ = write!(out, "<li><i class=\"s{}\"></i>{}</li>", at % COLOURS, escaped(series));
        }
        out.push_str("</ul>\n");
    }
    out.push_str("<div class=\"plot\">\n");
    let mut last_case = None;
    for (row, series) in &chart.rows {
        let again = last_case.replace(&row.case) == Some(&row.case);
        let label = match (by_series, again) {
            (true, _) if cases_alike => chart.series[*series].to_owned(),
            (true, _) => format!("{}, {}", row.case, chart.series[*series]),
            (false, true) => String::new(),
            (false, false) => row.case.clone(),
        };
        let first = if label.is_empty() { "" } else { " first" };
        let _ = write!(out, "<div class=\"label{first}\">{}</div>", escaped(&label));
        line(out, row, *series, reach);
    }
    out.push_str("</div></figure>\n");
}

/// The largest that has to be drawn of a row.
fn reach(row: &Row) -> f64 {
    let limit = match row.limit {
        Some(Limit::AtLeast(limit) | Limit::AtMost(limit)) => limit,
        None => 0.0,
    };
    row.figure().map_or(limit, |figure| figure.high.max(limit)) * 1.02
}

fn line(out: &mut String, row: &Row, series: usize, reach: f64) {
    let percent = |value: f64| (100.0 * value / reach).clamp(0.0, 100.0);
    let figure = match &row.outcome {
        Outcome::Figure(figure) => figure,
        Outcome::Missing(reason) => {
            let _ = writeln!(out, "<div class=\"why\">{}</div><div class=\"value\">–</div>", escaped(reason));
            return;
        }
    };
    let colour = series % COLOURS;
    let _ = write!(
        out,
        "<div class=\"track\"><i class=\"range s{colour}\" style=\"left:{:.2}%;width:{:.2}%\"></i>",
        percent(figure.low),
        percent(figure.high) - percent(figure.low),
    );
    if !row.hidden() {
        let _ = write!(out, "<i class=\"dot s{colour}\" style=\"left:{:.2}%\"></i>", percent(figure.median));
    }
    if let Some(Limit::AtLeast(limit) | Limit::AtMost(limit)) = row.limit {
        let _ = write!(out, "<i class=\"limit\" style=\"left:{:.2}%\"></i>", percent(limit));
    }
    let shown = if row.hidden() { "spread".to_owned() } else { number(figure.median) };
    let class = match row.verdict() {
        Some(Verdict::Kept) => " kept",
        Some(Verdict::Missed) => " missed",
        _ => "",
    };
    let _ = writeln!(out, "</div><div class=\"value{class}\">{shown}</div>");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stats::Figure;

    fn row(case: &str, what: &str, unit: &'static str) -> Row {
        Row::new(case, what, unit, Figure { median: 2.0, low: 1.5, high: 4.0, runs: 7 })
    }

    #[test]
    fn one_chart_a_quantity_and_unit_one_colour_a_series() {
        let rows = [
            row("a", "total time, stock", "ms"),
            row("a", "total time, lazy", "ms"),
            row("a", "lazy / stock", ""),
            row("b", "total time, lazy", "ms"),
        ];
        let charts = grouped(&rows);
        assert_eq!(charts.len(), 2);
        assert_eq!(charts[0].series, ["stock", "lazy"]);
        assert_eq!(charts[0].rows.iter().map(|(_, series)| *series).collect::<Vec<_>>(), [0, 1, 1]);
    }

    #[test]
    fn lines_of_one_case_are_called_by_their_series() {
        let page = charts(&[row("2 GiB", "rate, ours", "GB/s"), row("2 GiB", "rate, theirs", "GB/s")]);
        assert!(page.contains("in GB/s \u{b7} 2 GiB") && page.contains("first\">theirs</div>"), "{page}");
        assert!(!page.contains("legend"));
        let page = charts(&[row("a", "rate, ours / theirs", ""), row("b", "rate, ours / theirs", "")]);
        assert!(page.contains("\u{b7} ours / theirs") && page.contains("first\">b</div>"), "{page}");
    }

    #[test]
    fn bars_stand_where_the_figures_are() {
        let mut out = String::new();
        line(&mut out, &row("a", "w", "").limited(Limit::AtMost(5.0)), 7, 5.0);
        assert!(out.contains("class=\"range s1\" style=\"left:30.00%;width:50.00%\""), "{out}");
        assert!(out.contains("class=\"limit\" style=\"left:100.00%\""), "{out}");
        assert!(out.contains("value kept"));
    }
}
