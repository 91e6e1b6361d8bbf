//! Runs tests and says what came of each: passed, failed (with its logs' place), or skipped with the reason. What did not
//! run never counts as passed.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use comfy_table::Table;
use comfy_table::presets::ASCII_MARKDOWN;

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use super::{Needs, Pair, Test, Tier, all};

use crate::cache::Cache;
use crate::lab::Lab;
use crate::spec::{HOST_MEMORY_MIB, Spec};
use crate::{guest, payload, wait};

/// What to run, and where.
pub(crate) struct Order {
    /// The lab's name.
    pub(crate) lab: String,
    /// Parts of tests' names; none is all of the tier.
    pub(crate) names: Vec<String>,
    pub(crate) tier: Tier,
    /// Where the binaries are; built by us if nothing is said.
    pub(crate) binaries: Option<PathBuf>,
}

enum Outcome {
    Passed,
    Failed(String),
    Skipped(String),
}

struct Line {
    name: String,
    outcome: Outcome,
    elapsed: Duration,
}

impl Order {
    /// The tests it means: with names, those of any tier with that name or, if none has it, with that in their names.
    fn chosen(&self) -> Result<Vec<Test>> {
        let tests = all();
        let whole: Vec<&String> =
            self.names.iter().filter(|name| tests.iter().any(|test| test.name == **name)).collect();
        let named = |test: &Test| {
            self.names.iter().any(|name| {
                if whole.contains(&name) { test.name == *name } else { test.name.contains(name.as_str()) }
            })
        };
        let wanted = |test: &Test| if self.names.is_empty() { test.tier <= self.tier } else { named(test) };
        let (chosen, _): (Vec<Test>, Vec<Test>) = tests.into_iter().partition(wanted);
        if chosen.is_empty() {
            bail!("no test's name contains {}; `xen-lab test --list` names them", self.names.join(" or "));
        }
        Ok(chosen)
    }

    /// The tests' names.
    pub(crate) fn list(&self) -> Result<Vec<String>> {
        Ok(self.chosen()?.into_iter().map(|test| test.name).collect())
    }

    /// Runs them, prints a table, and says whether all passed or were skipped.
    pub(crate) fn run(&self, cache: &Cache) -> Result<bool> {
        let chosen = self.chosen()?;
        let binaries = self.binaries.clone().map_or_else(payload::built, Ok)?;
        let mut lines = Vec::new();
        for pair in Pair::ALL {
            let tests: Vec<&Test> = chosen.iter().filter(|test| test.pair == pair).collect();
            if !tests.is_empty() {
                self.run_pair(cache, pair, &tests, &binaries, &mut lines);
            }
        }
        Ok(report(&lines))
    }

    /// Runs the tests of one pair of hosts on a lab brought up for them, or on the one that is up if it is such a lab.
    fn run_pair(
        &self,
        cache: &Cache,
        pair: Pair,
        tests: &[&Test],
        binaries: &std::path::Path,
        lines: &mut Vec<Line>,
    ) {
        let spec =
            Spec { hosts: pair.hosts(), memory_mib: HOST_MEMORY_MIB, binaries: binaries.to_path_buf() };
        // Two runs on one lab would take each other's guests for what a test has left.
        let testing = Lab::lock_for_tests(cache, &self.lab);
        let found = Lab::find(cache, &self.lab).ok().flatten();
        let ours = found.is_none();
        let _ending = ours.then(|| EndOnSignal::arm(cache, &self.lab));
        let mut lab = match found {
            _ if testing.is_err() => {
                Err(anyhow::anyhow!("other tests run on the lab `{}` for very long", self.lab))
            }
            Some(lab) if lab.spec().hosts == spec.hosts => Ok(lab),
            Some(_) => Err(anyhow::anyhow!(
                "the lab `{}` is up with other hosts; end it, or give another --name",
                self.lab
            )),
            None => Lab::up(cache, &self.lab, spec.clone()),
        };
        for test in tests {
            let begun = Instant::now();
            // A lab that did not come up, or broke beyond repair, fails what was to run on it.
            let outcome = match &lab {
                Ok(lab) => one(lab, test),
                Err(error) => Outcome::Failed(format!("no lab: {error:#}")),
            };
            let line = Line { name: test.name.clone(), outcome, elapsed: begun.elapsed() };
            say(&line);
            let failed = matches!(line.outcome, Outcome::Failed(_));
            lines.push(line);
            if let (Ok(running), true) = (&lab, failed)
                && let Err(error) = tidy(running)
            {
                eprintln!("the hosts can't be brought back to order ({error:#}); starting them again");
                lab = Lab::down(cache, &self.lab).and_then(|()| Lab::up(cache, &self.lab, spec.clone()));
            }
        }
        if ours {
            let failed = lines.iter().any(|line| matches!(line.outcome, Outcome::Failed(_)));
            // Where something failed its logs are of use.
            let end = if failed { Lab::down } else { Lab::forget };
            if let Err(error) = end(cache, &self.lab) {
                eprintln!("the lab could not be ended: {error:#}");
            }
        }
    }
}

/// While it lives, SIGINT, SIGTERM and SIGHUP end the lab we brought up before they end us.
struct EndOnSignal {
    signals: signal_hook::iterator::Handle,
}

impl EndOnSignal {
    fn arm(cache: &Cache, lab: &str) -> Option<Self> {
        let (cache, lab) = (cache.clone(), lab.to_owned());
        let mut signals = signal_hook::iterator::Signals::new([SIGINT, SIGTERM, SIGHUP]).ok()?;
        let handle = signals.handle();
        std::thread::spawn(move || {
            if let Some(signal) = signals.forever().next() {
                eprintln!("ending the lab `{lab}`");
                if let Err(error) = Lab::abandon(&cache, &lab) {
                    eprintln!("the lab could not be ended: {error:#}");
                }
                std::process::exit(128 + signal);
            }
        });
        Some(Self { signals: handle })
    }
}

impl Drop for EndOnSignal {
    fn drop(&mut self) {
        self.signals.close();
    }
}

fn one(lab: &Lab, test: &Test) -> Outcome {
    eprintln!("{} ...", test.name);
    match ready(lab, test.needs) {
        Ok(None) => {}
        Ok(Some(reason)) => return Outcome::Skipped(reason),
        Err(error) => return failed(lab, test, &error.context("before the test")),
    }
    let result = (test.body)(lab).and_then(|()| clean(lab).context("the test left something behind"));
    match result {
        Ok(()) => Outcome::Passed,
        Err(error) => failed(lab, test, &error),
    }
}

fn failed(lab: &Lab, test: &Test, error: &anyhow::Error) -> Outcome {
    let logs = match lab.save_logs(&test.name) {
        Ok(logs) => format!("logs: {}", logs.display()),
        Err(error) => format!("and its logs could not be saved: {error:#}"),
    };
    Outcome::Failed(format!("{error:#}\n{logs}"))
}

/// Whether the lab has what the test needs: a reason to leave it out, if not. An error if guests are in its way.
fn ready(lab: &Lab, needs: Needs) -> Result<Option<String>> {
    clean(lab)?;
    // An earlier test's guest of the same name counted further than this one will for a while.
    (1..=2).try_for_each(|number| guest::forget_all_counts(lab.host(number)))?;
    for file in needs.files() {
        for number in 1..=2 {
            let there = lab.host(number).attempt(&format!("test -x {file}"), wait::limit(30))?;
            if there.code != 0 {
                return Ok(Some(format!("host {number} has no {file}: it is not among the binaries")));
            }
        }
    }
    Ok(None)
}

/// An error unless both hosts run nothing but dom0.
fn clean(lab: &Lab) -> Result<()> {
    for number in 1..=2 {
        // A domain dies bit by bit.
        wait::until("guests to be gone", wait::limit(20), Duration::from_millis(500), || {
            let list = lab.host(number).run("xl list | tail -n +3")?;
            Ok(if list.trim().is_empty() { Ok(()) } else { Err(list.trim().to_owned()) })
        })
        .with_context(|| format!("host {number}"))?;
    }
    Ok(())
}

/// After a failure: removes guests and processes; an error if that does not help.
fn tidy(lab: &Lab) -> Result<()> {
    lab.set_wire(true)?;
    for number in 1..=2 {
        lab.set_disk_rate(number, 0)?;
        lab.host(number).run(
            "for d in $(xl list | awk 'NR>2 {print $2}'); do xl unpause $d 2>/dev/null; xl destroy $d; done; \
             pkill -9 -x socat; pkill -9 -x xl; pageferry xen uninstall; true",
        )?;
    }
    clean(lab)
}

fn say(line: &Line) {
    let seconds = line.elapsed.as_secs_f64();
    match &line.outcome {
        Outcome::Passed => eprintln!("{} passed in {seconds:.1} s", line.name),
        Outcome::Failed(why) => eprintln!("{} FAILED after {seconds:.1} s: {why}", line.name),
        Outcome::Skipped(why) => eprintln!("SKIPPED: {}: {why}", line.name),
    }
}

/// Prints the table. Whether nothing failed, and something passed.
#[expect(clippy::print_stdout, reason = "the table is the result")]
fn report(lines: &[Line]) -> bool {
    let mut table = Table::new();
    table.load_style(ASCII_MARKDOWN).set_header(["test", "outcome", "seconds"]);
    let (mut passed, mut failed, mut skipped) = (0, 0, 0);
    for line in lines {
        let (outcome, counter) = match &line.outcome {
            Outcome::Passed => ("passed", &mut passed),
            Outcome::Failed(_) => ("FAILED", &mut failed),
            Outcome::Skipped(_) => ("skipped", &mut skipped),
        };
        *counter += 1;
        table.add_row([line.name.clone(), outcome.to_owned(), format!("{:.1}", line.elapsed.as_secs_f64())]);
    }
    println!("{table}");
    if let Ok(commit) = payload::commit() {
        println!("commit {commit}");
    }
    println!("{passed} passed, {failed} failed, {skipped} skipped");
    failed == 0 && passed > 0
}
