//! The report as one HTML file with everything in it, for a browser without a network: for each suite charts of its
//! figures with their ranges and limits, then the figures themselves.

#![forbid(unsafe_code)]

mod chart;

use std::fmt::Write as _;

use crate::report::{Cells, Outcome, Report, Row, Section, Verdict};

/// How every page of the project looks: type, head, definitions. Each adds its colours and what it draws.
pub const COMMON_STYLE: &str = include_str!("common.css");

/// The page as text.
#[must_use]
pub fn html(report: &Report) -> String {
    let mut page = format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <title>Pageferry: benchmarks</title>\n<style>\n{COMMON_STYLE}{css}</style>\n</head>\n<body>\n<main>\n\
         <header><p class=\"kicker\">Pageferry &middot; benchmarks</p><h1>{heading}</h1>\n{lede}</header>\n",
        css = include_str!("style.css"),
        heading = escaped(&heading(report)),
        lede = lede(report),
    );
    report.sections.iter().for_each(|section| put_section(&mut page, section));
    // Writing to a String can't fail, here and below.
    let _ = write!(
        page,
        "<section><h2>How this was measured</h2>\n{}</section>\n</main>\n</body>\n</html>\n",
        origin(report)
    );
    page
}

/// `text` with everything that means something in HTML replaced.
#[must_use]
pub fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c => out.push(c),
        }
    }
    out
}

fn heading(report: &Report) -> String {
    let names: Vec<_> = report.sections.iter().map(|section| section.suite).collect();
    names.join(", ")
}

/// The result in a sentence.
fn lede(report: &Report) -> String {
    let count = |wanted| report.rows().filter(|row| row.verdict() == Some(wanted)).count();
    let (kept, missed, undecided) = (count(Verdict::Kept), count(Verdict::Missed), count(Verdict::Undecided));
    let hidden = report.rows().filter(|row| row.hidden()).count();
    let absent = report.rows().filter(|row| row.figure().is_none()).count();
    let mut parts = vec![format!("<b>{kept}</b> of {} limits kept", kept + missed + undecided)];
    for (number, what) in [
        (missed, "missed"),
        (undecided, "undecided: the range crosses the limit"),
        (hidden, "not told, hidden by their spread"),
        (absent, "not to be had here"),
    ] {
        if number > 0 {
            parts.push(format!("<b>{number}</b> {what}"));
        }
    }
    format!("<p class=\"lede\">{}.</p>\n", parts.join(", "))
}

fn put_section(page: &mut String, section: &Section) {
    let Section { suite, about, rows } = section;
    let _ = writeln!(
        page,
        "<section id=\"{0}\"><h2>{0}</h2>\n<p>{1}</p>\n{2}{3}</section>",
        escaped(suite),
        escaped(about),
        chart::charts(rows),
        table(rows)
    );
}

/// The figures of a suite.
fn table(rows: &[Row]) -> String {
    let mut out = String::from(
        "<details><summary>The figures</summary>\n<div class=\"scroll\"><table>\n<thead><tr><th>case</th>\
         <th class=\"text\">figure</th><th>median</th><th>range</th><th>runs</th><th>limit</th>\
         <th class=\"text\"></th></tr></thead>\n<tbody>\n",
    );
    for row in rows {
        let Cells { median, range, runs, limit, verdict } = row.cells();
        let class = match (&row.outcome, row.verdict()) {
            (Outcome::Missing(_), _) => "text reason",
            (_, Some(Verdict::Missed)) => "text missed",
            _ => "text",
        };
        let _ = writeln!(
            out,
            "<tr><th scope=\"row\">{}</th><td class=\"text\">{}</td><td>{}</td><td>{}</td><td>{runs}</td>\
             <td>{}</td><td class=\"{class}\">{}</td></tr>",
            escaped(&row.case),
            escaped(&row.what),
            escaped(&median),
            escaped(&range),
            escaped(&limit),
            escaped(&verdict),
        );
    }
    out.push_str("</tbody>\n</table></div></details>\n");
    out
}

/// Where the figures come from, and the figures as they came.
fn origin(report: &Report) -> String {
    let machine = &report.machine;
    let mut out = String::from("<dl>\n");
    for (name, value) in [
        ("Command", report.call()),
        ("Commit", machine.commit.clone()),
        ("Processor", format!("{} cores of {}", machine.cores, machine.cpu)),
        ("Memory", format!("{} GiB", machine.memory_gib)),
        ("Kernel", machine.kernel.clone()),
        ("TCP", machine.congestion.clone()),
    ] {
        let _ = writeln!(out, "<dt>{name}</dt><dd>{}</dd>", escaped(&value));
    }
    out.push_str(
        "</dl>\n<p>A dot is the median of the runs, the bar behind it a range that holds the true median in 19 of 20 \
         cases (all runs where there are fewer than six), the stroke the limit. Source and target share this \
         machine, so ratios within one run mean more than the figures.</p>\n\
         <details><summary>The figures as JSON, a line each</summary>\n<pre>",
    );
    match report.json_lines() {
        Ok(lines) => out.push_str(&escaped(&lines)),
        Err(error) => out.push_str(&escaped(&format!("they can't be written as JSON: {error}"))),
    }
    out.push_str("</pre></details>\n");
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::Limit;
    use crate::stats::Figure;

    #[test]
    fn the_page_holds_all_of_it_and_nothing_that_is_loaded() {
        let mut report = Report::new(crate::machine::describe(), vec!["modes".to_owned()]);
        let figure = |median| Figure { median, low: median * 0.9, high: median * 1.1, runs: 7 };
        let rows = vec![
            Row::new("idle <desktop>", "total time, stock", "ms", figure(9000.0)),
            Row::new("idle <desktop>", "total time, lazy", "ms", figure(1800.0)),
            Row::new("idle <desktop>", "lazy / stock", "", figure(0.2)).limited(Limit::AtMost(0.4)),
            Row::missing("criu", "total time, criu", "ms", "it does not run on this kernel"),
        ];
        report.sections.push(Section { suite: "modes", about: "all \"four\"", rows });
        let page = html(&report);
        assert!(page.contains("idle &lt;desktop&gt;") && !page.contains("idle <desktop>"));
        assert!(page.contains("<b>1</b> of 1 limits kept") && page.contains("<b>1</b> not to be had here"));
        assert!(page.contains("it does not run on this kernel"));
        for outside in ["http:", "https:", "src=", "@import", "<script"] {
            assert!(!page.contains(outside), "the page refers to something outside: {outside}");
        }
        let opened = page.matches("<div").count();
        assert_eq!(opened, page.matches("</div>").count());
    }
}
