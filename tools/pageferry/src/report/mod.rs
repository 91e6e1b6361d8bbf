//! The report: one HTML file with everything in it, for a browser without a network.

mod chart;

use std::fmt::Write;
use std::ops::Range;

use bench::page::{COMMON_STYLE, escaped};
use mover::report::{Event, Phase};

use crate::results::{Run, at_ms, rows};
use crate::units::{show_bytes, show_count, show_ms, show_rate};
use chart::Scale;

/// Everything the page says.
pub(crate) struct Report {
    /// The workload's name.
    pub(crate) workload: String,
    /// Guest size in bytes.
    pub(crate) guest_bytes: u64,
    /// How it was called.
    pub(crate) command: String,
    /// Name and value: processor, kernel, link and so on.
    pub(crate) machine: Vec<(String, String)>,
    /// The migrations, in the order they were made.
    pub(crate) runs: Vec<Run>,
}

/// The page as text.
pub(crate) fn html(report: &Report) -> Result<String, String> {
    let title = format!("{}, {}", report.workload, show_bytes(report.guest_bytes));
    let mut page = String::new();
    let out = &mut page;
    let written = write!(
        out,
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <title>Pageferry: {title}</title>\n<style>\n{COMMON_STYLE}{css}</style>\n</head>\n<body>\n<main>\n\
         <header><p class=\"kicker\">Pageferry &middot; live migration</p><h1>{heading}</h1>\n{lede}</header>\n\
         <section><h2>At a glance</h2>\n{glance}</section>\n\
         <section><h2>Figures</h2>\n{table}</section>\n\
         <section><h2>Timelines</h2>\n{timelines}</section>\n\
         <section><h2>How this was measured</h2>\n{origin}</section>\n\
         </main>\n</body>\n</html>\n",
        title = escaped(&title),
        heading = escaped(&title),
        css = include_str!("style.css"),
        lede = lede(report),
        glance = glance(&report.runs),
        table = table(&report.runs),
        timelines = timelines(&report.runs)?,
        origin = origin(report),
    );
    written.map_err(|error| error.to_string())?;
    Ok(page)
}

/// The result in a sentence.
fn lede(report: &Report) -> String {
    let verified: u64 = report.runs.iter().map(|run| run.result.summary.verified_pages).sum();
    let wrong: u64 = report.runs.iter().map(|run| run.result.summary.mismatched_pages).sum();
    let checked = match (verified, wrong) {
        (0, _) => "Pages were not verified in this run.".to_owned(),
        (n, 0) => format!("{} pages were verified on arrival, none differed.", show_count(n)),
        (n, wrong) => {
            format!("Of {} pages verified on arrival, {} DIFFERED.", show_count(n), show_count(wrong))
        }
    };
    let fastest =
        report.runs.iter().min_by(|a, b| a.result.summary.total_ms.total_cmp(&b.result.summary.total_ms));
    let compared = match (report.runs.first(), fastest) {
        (Some(first), Some(best)) if report.runs.len() > 1 => {
            let (a, b) = (&first.result.summary, &best.result.summary);
            format!(
                "The same running guest, moved {} times. <b>{}</b> took {}, <b>{}</b> {}. ",
                report.runs.len(),
                escaped(&a.mode),
                show_ms(a.total_ms),
                escaped(&b.mode),
                show_ms(b.total_ms),
            )
        }
        _ => String::new(),
    };
    format!("<p class=\"lede\">{compared}{checked}</p>\n")
}

/// A bar for each run: where the guest ran, and when it stood still.
fn glance(runs: &[Run]) -> String {
    let longest = runs.iter().map(|run| run.result.summary.total_ms).fold(1.0, f64::max);
    let mut out = String::from(
        "<ul class=\"legend\"><li><i class=\"source\"></i>guest runs on the source</li>\
         <li><i class=\"downtime\"></i>guest stands still</li>\
         <li><i class=\"target\"></i>guest runs on the target, pages still arriving</li></ul>\n<div class=\"bars\">\n",
    );
    for run in runs {
        let summary = &run.result.summary;
        let share = |span: Range<f64>| 100.0 * (span.end - span.start).max(0.0) / longest;
        let (before, still, after) = spans(run);
        let _infallible = writeln!(
            out,
            "<div class=\"mode\">{}</div><div class=\"bar\"><i class=\"source\" style=\"width:{:.3}%\"></i>\
             <i class=\"downtime\" style=\"width:{:.3}%\"></i><i class=\"target\" style=\"width:{:.3}%\"></i></div>\
             <div class=\"value\"><b>{}</b><span>downtime {}</span></div>",
            escaped(&summary.mode),
            share(before),
            share(still),
            share(after),
            show_ms(summary.total_ms),
            show_ms(summary.downtime_ms),
        );
    }
    out.push_str("</div>\n");
    out
}

/// Milliseconds in which the guest ran on the source, on neither end, on the target while pages were outstanding;
/// verification taken out, as in the figures.
fn spans(run: &Run) -> (Range<f64>, Range<f64>, Range<f64>) {
    let summary = &run.result.summary;
    let restart = summary.restart_ms.min(summary.total_ms);
    let stop = (restart - summary.downtime_ms).max(0.0);
    (0.0..stop, stop..restart, restart..summary.total_ms)
}

fn table(runs: &[Run]) -> String {
    let mut out = String::from("<div class=\"scroll\"><table>\n<thead><tr><th></th>");
    for run in runs {
        let _infallible = write!(out, "<th scope=\"col\">{}</th>", escaped(&run.result.summary.mode));
    }
    out.push_str("</tr></thead>\n<tbody>\n");
    for row in rows(runs) {
        let class = if row.begins_group { " class=\"group\"" } else { "" };
        let indent = if row.name.starts_with(' ') { " class=\"part\"" } else { "" };
        let _infallible =
            write!(out, "<tr{class}><th scope=\"row\"{indent}>{}</th>", escaped(row.name.trim()));
        for value in row.values {
            let _infallible = write!(out, "<td>{}</td>", escaped(&value));
        }
        out.push_str("</tr>\n");
    }
    out.push_str("</tbody></table></div>\n");
    out
}

fn timelines(runs: &[Run]) -> Result<String, String> {
    let scale = Scale::of(runs);
    let mut out = String::from(
        "<p>All on the same axes. Rates above, pages below; the shaded time is the one in which the guest stood \
         still.</p>\n<ul class=\"legend\"><li><i class=\"link\"></i>link rate</li>\
         <li><i class=\"disk\"></i>disk rate on the target</li><li><i class=\"dirty\"></i>dirty pages left to send</li>\
         <li><i class=\"outstanding\"></i>pages referenced, not yet loaded</li>\
         <li><i class=\"downtime\"></i>downtime</li><li><i class=\"verify\"></i>verification (not part of the \
         figures)</li></ul>\n",
    );
    for run in runs {
        let summary = &run.result.summary;
        let _infallible = writeln!(
            out,
            "<figure><figcaption><b>{}</b> {}</figcaption>\n{}\n</figure>",
            escaped(&summary.mode),
            escaped(&caption(run)),
            chart::timeline(run, scale)?,
        );
    }
    Ok(out)
}

/// A run in a line.
fn caption(run: &Run) -> String {
    let summary = &run.result.summary;
    let mut parts = vec![
        format!("{} in all", show_ms(summary.total_ms)),
        format!("{} downtime", show_ms(summary.downtime_ms)),
        format!("{} over the link", show_bytes(summary.link_bytes)),
    ];
    if summary.disk_bytes > 0 {
        parts.push(format!("{} from disk", show_bytes(summary.disk_bytes)));
    }
    if let Some(peak) = peak_link_rate(run) {
        parts.push(format!("link at most {}", show_rate(peak)));
    }
    let drained = run.events.iter().find(|e| matches!(e, Event::Phase { phase: Phase::Drain, .. }));
    if let Some(drain) = drained.filter(|_| summary.pages_lazy > 0) {
        let left = show_count(summary.pages_lazy);
        parts.push(format!("restarted at {} with {left} pages to come", show_ms(at_ms(drain))));
    }
    parts.join(" \u{b7} ")
}

fn peak_link_rate(run: &Run) -> Option<f64> {
    let rates = run.events.iter().filter_map(|event| match event {
        Event::Sample(sample) => Some(sample.link_rate),
        _ => None,
    });
    rates.max_by(f64::total_cmp).filter(|rate| *rate > 0.0)
}

/// Where the figures come from, and the figures as they came.
fn origin(report: &Report) -> String {
    let mut out = String::from("<dl>\n");
    let command = [("Command".to_owned(), report.command.clone())];
    for (name, value) in command.iter().chain(&report.machine) {
        let _infallible = writeln!(out, "<dt>{}</dt><dd>{}</dd>", escaped(name), escaped(value));
    }
    out.push_str("</dl>\n<details><summary>The figures as JSON, a line for each migration</summary>\n<pre>");
    for run in &report.runs {
        // A struct of plain fields always serialises.
        let line = serde_json::to_string(&run.result).unwrap_or_default();
        out.push_str(&escaped(&line));
        out.push('\n');
    }
    out.push_str("</pre></details>\n");
    out
}

#[cfg(test)]
mod tests;
