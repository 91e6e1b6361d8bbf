//! `pageferry demo`: one guest, moved from process to process, once in each mode.

mod child;
pub(crate) mod lease;
mod migration;
mod progress;
mod speed;
mod stage;

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use mover::ExitClass;
use mover::process::client::GuestClient;
use mover::process::config::GuestConfig;
use mover::process::control::Status;
use mover::process::launch;

use crate::cli::DemoArgs;
use crate::console::Console;
use crate::failure::{Failure, OrFail, Outcome};
use crate::report::{self, Report};
use crate::results::{self, Run};
use crate::units::{show_bytes, show_count, show_ms};
use crate::{guest, layout, machine, signals};
use child::{End, Process};
use migration::Scene;
use progress::Progress;
use stage::Stage;

/// Runs it.
pub(crate) fn run(args: &DemoArgs, console: &Console) -> Outcome {
    if args.modes.is_empty() {
        return Err(Failure::usage("name at least one mode with --modes"));
    }
    if let Some(path) = &args.report {
        // Now, not after minutes of work.
        fs::write(path, "")
            .or_fail(|| format!("cannot write {}", path.display()), "Name another --report")?;
    }
    let ending = Arc::new(AtomicBool::new(false));
    // However often it is pressed: there is always something to tidy up, and that does not take long.
    signals::set_on_end_always(&ending)?;
    let progress = Progress::new(console);
    let mut stage = Stage::new(&args.dir)?;
    let link = link(args, &mut stage, &progress);
    let scene = Scene { stage: &stage, args, ending: &ending, progress: &progress, loud: console.loud };
    boot(&scene)?;
    let runs = migrate_all(&scene, console)?;
    let last = name(runs.len());
    let status = watch(&scene, &last)?;
    drop(progress);
    if !console.json {
        console.print(&results::table(&runs, layout::width()))?;
        console.print(&layout::hanging("", 0, &self_check(&status), layout::width()))?;
        if args.link.is_none() {
            console.note(&layout::hanging("", 0, UNSHAPED, layout::width()));
        }
    }
    if let Some(path) = &args.report {
        write_report(path, args, &runs, &status, &link)?;
        console.note(&format!("report: {}", path.display()));
    }
    if args.keep_running {
        stage.keep(&last);
        let socket = stage.socket(&last);
        let text = format!(
            "the guest runs on: pageferry guest status {0}; to end it: pageferry guest stop {0}; its disk is {1}",
            socket.display(),
            stage.image().display()
        );
        console.note(&text);
    }
    verdict(&runs, &status)
}

/// What to make of figures from a link that no network is like.
const UNSHAPED: &str = "Over the loopback the link is about as fast as memory, so that leaving pages to the disk \
                        gains little or nothing. `--link 1gbit` (as root) shows a network.";

/// The guest's name after so many migrations.
fn name(migrations: usize) -> String {
    format!("demo-{}", migrations + 1)
}

/// Lays the link, or says what was done instead; in both cases what the report says about it.
fn link(args: &DemoArgs, stage: &mut Stage, progress: &Progress) -> String {
    let Some(rate) = args.link else { return "loopback, not shaped".to_owned() };
    let mbit = rate.0.saturating_mul(8) / 1_000_000;
    match stage.lay_link(rate.0) {
        Ok(()) => format!("{mbit} Mbit/s, shaped: two network namespaces, a veth pair, tbf"),
        Err(why) => {
            progress.say(&format!("no shaped link: {why}. Running over the loopback, unshaped, instead"));
            format!("loopback, not shaped ({mbit} Mbit/s were asked for: {why})")
        }
    }
}

/// Makes the disk and its index, and starts the guest.
fn boot(scene: &Scene<'_>) -> Outcome {
    let (args, stage) = (scene.args, scene.stage);
    let disk = args.disk_size.map_or(args.memory.0.saturating_mul(2), |size| size.0);
    scene.progress.waiting(&format!("making a disk of {} from files of this machine", show_bytes(disk)));
    make_image(scene, disk)?;
    scene.go_on()?;
    scene.progress.waiting("starting the guest");
    let mut config = GuestConfig::new(&name(0), args.memory.0);
    config.vcpus = args.vcpus;
    config.workload.clone_from(&args.workload);
    config.seed = args.seed;
    config.disks = vec![stage.image()];
    config.runtime_dir = stage.runtime();
    config.prefault = true;
    config.check().map_err(|error| Failure::usage(error.to_string()))?;
    let mut program = stage.program()?;
    program.args(guest::PROCESS);
    launch::spawn(program, &config)?;
    scene.go_on()
}

/// In a process of its own, which can be ended at any time.
fn make_image(scene: &Scene<'_>, bytes: u64) -> Outcome {
    let mut command = scene.stage.program()?;
    command.args(["image", "--size", &bytes.to_string()]).arg(scene.stage.image());
    let (heard, ear) = channel();
    let process = Process::start(command, End::Source, heard, scene.loud)?;
    loop {
        scene.go_on()?;
        if !matches!(ear.recv_timeout(Duration::from_millis(50)), Err(RecvTimeoutError::Timeout)) {
            return process.finish()?.map_or(Ok(()), Err);
        }
    }
}

fn migrate_all(scene: &Scene<'_>, console: &Console) -> Outcome<Vec<Run>> {
    let mut runs = Vec::new();
    for mode in &scene.args.modes {
        let run = scene.migrate(*mode, &name(runs.len()), &name(runs.len() + 1))?;
        if console.json {
            let line = serde_json::to_string(&run.result)
                .map_err(|error| Failure::new(ExitClass::Internal, error.to_string()))?;
            console.print(&line)?;
        }
        runs.push(run);
    }
    Ok(runs)
}

/// Lets the guest go on for a while and has it check all of its memory.
fn watch(scene: &Scene<'_>, guest: &str) -> Outcome<Status> {
    let wait = scene.args.watch;
    scene.progress.waiting(&format!("the guest goes on for {}", show_ms(wait.as_secs_f64() * 1e3)));
    scene.wait(wait, || false)?;
    Ok(GuestClient::connect(&scene.stage.socket(guest))?.check()?)
}

/// What the guest found, in a sentence.
fn self_check(status: &Status) -> String {
    let found = match status.wrong_pages {
        0 => "and found none wrong".to_owned(),
        n => format!("and found {} WRONG", show_count(n)),
    };
    let time = show_ms(mover::units::f64_of(status.uptime_ms));
    format!(
        "The guest runs on and checks itself: {} pages in the {time} since its last restart, {found}.",
        show_count(status.pages_checked)
    )
}

fn write_report(path: &Path, args: &DemoArgs, runs: &[Run], status: &Status, link: &str) -> Outcome {
    let mut facts = machine::facts();
    facts.push(("Link".to_owned(), link.to_owned()));
    facts.push(("Self-check".to_owned(), self_check(status)));
    let report = Report {
        workload: status.workload.clone(),
        guest_bytes: args.memory.0,
        command: std::env::args().collect::<Vec<_>>().join(" "),
        machine: facts,
        runs: runs.to_vec(),
    };
    let page = report::html(&report).map_err(|error| Failure::new(ExitClass::Internal, error))?;
    fs::write(path, page).or_fail(|| format!("cannot write {}", path.display()), "Name another --report")
}

/// A demonstration with a wrong page has failed.
fn verdict(runs: &[Run], status: &Status) -> Outcome {
    let wrong: u64 = runs.iter().map(|run| run.result.summary.mismatched_pages).sum();
    if wrong + status.wrong_pages == 0 {
        return Ok(());
    }
    Err(Failure::new(
        ExitClass::Mismatch,
        format!(
            "{} pages were wrong on arrival, and the guest found {} itself. Please report it",
            show_count(wrong),
            show_count(status.wrong_pages)
        ),
    ))
}
