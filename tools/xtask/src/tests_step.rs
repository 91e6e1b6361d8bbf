//! Every test, through nextest (a process each). Its report names the tests that had to skip something, and its
//! summary is the last thing printed.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::run;

/// Where the profile in .config/nextest.toml puts its report.
const REPORT: &str = "target/nextest/ci/junit.xml";

/// Runs them. What other steps left out is shown with what the tests did.
pub(crate) fn run(left_out: Vec<String>) -> Result<()> {
    let report = run::root()?.join(REPORT);
    if report.try_exists()? {
        fs::remove_file(&report).with_context(|| format!("cannot remove the old {REPORT}"))?;
    }
    let mut command = run::cargo([
        "nextest",
        "run",
        "--locked",
        "--cargo-quiet",
        "--workspace",
        "--profile",
        "ci",
        "--no-tests=fail",
    ])?;
    // The report's place is relative to the target directory.
    let summary = pass_through(command.env_remove("CARGO_TARGET_DIR"))?;
    let xml = fs::read_to_string(&report).with_context(|| format!("the test runner left no {REPORT}"))?;
    let mut skipped = left_out;
    skipped.extend(skipped_lines(&xml));
    if !skipped.is_empty() {
        println!("\nWhat could not run here:");
        for line in &skipped {
            println!("  {line}");
        }
        println!("\n{summary}");
    }
    Ok(())
}

/// Runs the command, passes on what it says as it says it, and returns its summary.
fn pass_through(command: &mut Command) -> Result<String> {
    let name = run::shown(command);
    let mut child =
        command.stderr(Stdio::piped()).spawn().with_context(|| format!("cannot start `{name}`"))?;
    let said = child.stderr.take().context("its standard error is a pipe")?;
    let mut summary = Vec::new();
    for line in BufReader::new(said).lines() {
        let line = line.context("reading what the test runner says")?;
        writeln!(std::io::stderr(), "{line}").context("writing to standard error")?;
        if line.trim_start().starts_with("Summary ") || !summary.is_empty() {
            summary.push(line);
        }
    }
    let status = child.wait()?;
    if !status.success() {
        let first = summary.first().map_or("it printed no summary", |line| line.trim());
        bail!("`{name}` ended with {status}; what failed is shown above\n{first}");
    }
    Ok(summary.join("\n"))
}

/// The lines in which tests say what they left out.
fn skipped_lines(xml: &str) -> Vec<String> {
    let mut lines: Vec<String> = xml
        .lines()
        .filter_map(|line| line.split_once("SKIPPED: "))
        .map(|(_, reason)| reason.split("</").next().unwrap_or(reason))
        .map(|reason| {
            let plain = [("&lt;", "<"), ("&gt;", ">"), ("&quot;", "\""), ("&apos;", "'"), ("&amp;", "&")];
            plain.iter().fold(reason.to_owned(), |text, (from, to)| text.replace(from, to))
        })
        .collect();
    lines.sort();
    lines.dedup();
    lines
}

#[cfg(test)]
mod tests {
    use super::skipped_lines;

    #[test]
    fn reasons_are_found_once_and_unescaped() {
        let xml = "<system-err>SKIPPED: needs root &amp; tc</system-err>\nx\nSKIPPED: needs root &amp; tc\n";
        assert_eq!(skipped_lines(xml), ["needs root & tc"]);
        assert!(skipped_lines("<system-out>fine</system-out>").is_empty());
    }
}
