//! `pageferry stream ...`: what stands in a stream of Xen's, and whether it is right.

mod findable;

use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::path::Path;

use mover::ExitClass;
use serde::Serialize;
use xen_glue::settings::disk_paths;
use xen_glue::stream::scan::{self, Found, Item, Layer, Pages, ScanError, Survey};

use crate::cli::StreamCommand;
use crate::console::Console;
use crate::failure::{Failure, OrFail, Outcome};
use crate::frozen::{Account, Lookup};
use crate::units::{show_bytes, show_count};

/// Bytes read at a time.
const BUFFER_BYTES: usize = 1 << 20;
/// Faults named on a screen.
const FAULTS_SHOWN_MAX: usize = 20;

/// Does what the command says.
pub(crate) fn run(command: &StreamCommand, console: &Console) -> Outcome {
    match command {
        StreamCommand::Inspect { file } => inspect(file, console),
        StreamCommand::Verify { file, disks, paths } => verify(file, disks.then_some(&paths[..]), console),
        StreamCommand::Findable { file, disks } => findable::run(file, disks, console),
    }
}

fn open(file: &Path) -> Outcome<Box<dyn BufRead>> {
    if file.as_os_str() == "-" {
        return Ok(Box::new(BufReader::with_capacity(BUFFER_BYTES, io::stdin())));
    }
    match File::open(file) {
        Ok(opened) => Ok(Box::new(BufReader::with_capacity(BUFFER_BYTES, opened))),
        Err(error) => Err(Failure::usage(format!(
            "{}: {error}. Give the file `xl save` wrote, or `-` for standard input",
            file.display()
        ))),
    }
}

fn walk(file: &Path, each: &mut dyn FnMut(Item) -> Outcome) -> Outcome<Survey> {
    scan::scan(open(file)?, each).map_err(|error| match error {
        ScanError::Stream(error) => Failure::new(ExitClass::Machine, format!("{}: {error}", file.display())),
        ScanError::Each(failure) => failure,
    })
}

/// The name of what was read.
fn name(file: &Path) -> String {
    if file.as_os_str() == "-" { "standard input".to_owned() } else { file.display().to_string() }
}

fn inspect(file: &Path, console: &Console) -> Outcome {
    let survey = if console.json { list_json(file, console)? } else { list_words(file, console)? };
    if survey.complete {
        return Ok(());
    }
    let fault = survey.faults.last().map_or(String::new(), fault_words);
    Err(Failure::new(ExitClass::Mismatch, format!("{} could not be listed to its end: {fault}", name(file))))
}

/// One JSON object, a record a line, so that a long stream takes no memory.
fn list_json(file: &Path, console: &Console) -> Outcome<Survey> {
    console.print("{\"records\":[")?;
    let mut between = "";
    let survey = walk(file, &mut |item| {
        let line = format!("{between}{}", json(&item)?);
        between = ",";
        console.print(&line)
    })?;
    console.print(&format!("],\"summary\":{}}}", json(&survey)?))?;
    Ok(survey)
}

fn list_words(file: &Path, console: &Console) -> Outcome<Survey> {
    let mut run = Run::default();
    let survey = walk(file, &mut |item| match (&item.pages, console.loud) {
        (Some(pages), false) => {
            run.take(&item, pages);
            Ok(())
        }
        _ => {
            run.print(console)?;
            console.print(&line(item.offset, item.layer, &item.name, item.length, &item.detail))
        }
    })?;
    run.print(console)?;
    console.print(&format!("\n{}{}", survey_words(&name(file), &survey), faults_words(&survey)))?;
    Ok(survey)
}

/// Neighbouring records of pages, to be shown as one line.
#[derive(Default)]
struct Run {
    offset: u64,
    records: u64,
    bytes: u64,
    pages: Pages,
}

impl Run {
    fn take(&mut self, item: &Item, pages: &Pages) {
        if self.records == 0 {
            self.offset = item.offset;
        }
        self.records += 1;
        self.bytes += item.length;
        self.pages.add(pages);
    }

    fn print(&mut self, console: &Console) -> Outcome {
        let run = std::mem::take(self);
        if run.records == 0 {
            return Ok(());
        }
        let name = match run.records {
            1 => "PAGE_DATA".to_owned(),
            n => format!("PAGE_DATA × {n}"),
        };
        console.print(&line(run.offset, Layer::Libxc, &name, run.bytes, &scan::pages_words(&run.pages)))
    }
}

fn line(offset: u64, layer: Layer, name: &str, length: u64, detail: &str) -> String {
    let indent = match layer {
        Layer::Xl => "",
        Layer::Libxl => "  ",
        Layer::Libxc => "    ",
    };
    let name = format!("{indent}{name}");
    format!("{offset:#14x}  {name:<30} {:>9}  {detail}", show_bytes(length)).trim_end().to_owned()
}

/// A survey, and what was found on disks if that was looked for.
#[derive(Serialize)]
struct Verified<'a> {
    #[serde(flatten)]
    survey: &'a Survey,
    #[serde(skip_serializing_if = "Option::is_none")]
    on_disks: Option<&'a Account>,
}

/// Verifies `file`; with `paths` also what it leaves on disks, which are there or where they were.
fn verify(file: &Path, paths: Option<&[String]>, console: &Console) -> Outcome {
    let paths = paths.map(disk_paths).transpose().map_err(Failure::usage)?;
    let mut lookup = paths.map(Lookup::new);
    let survey = walk(file, &mut |item| match (&mut lookup, item.left) {
        (Some(lookup), Some(left)) => lookup.take(left),
        _ => Ok(()),
    })?;
    let account = lookup.map(Lookup::finish).transpose()?;
    if console.json {
        console.print(&json(&Verified { survey: &survey, on_disks: account.as_ref() })?)?;
    } else {
        let on_disks = account.as_ref().map(Account::words).unwrap_or_default();
        let text = format!("{}{}{on_disks}", survey_words(&name(file), &survey), faults_words(&survey));
        console.print(&text)?;
    }
    if survey.faults.is_empty() {
        return account.map_or(Ok(()), |account| account.verdict(&name(file)));
    }
    let message = match survey.faults.as_slice() {
        [one] => format!("{}: {}", name(file), fault_words(one)),
        [first, ..] => {
            let count = show_count(mover::units::u64_of(survey.faults.len()) + survey.more_faults);
            format!("{} has {count} faults, the first {}", name(file), fault_words(first))
        }
        [] => String::new(),
    };
    Err(Failure::new(ExitClass::Mismatch, message))
}

fn survey_words(name: &str, survey: &Survey) -> String {
    let version = survey.version.map_or(String::new(), |version| format!(", version {version}"));
    let guest = survey.guest.map_or(String::new(), |guest| format!(", {guest} guest"));
    let xen = survey.xen.as_ref().map_or(String::new(), |xen| format!(" of Xen {xen}"));
    let framing = match survey.framing.as_slice() {
        [] => "nothing known".to_owned(),
        layers => format!("{} stream", layers.join(" > ")),
    };
    let records: u64 = survey.records.iter().map(|(_, count)| count).sum();
    let pages = match survey.pages.entries {
        0 => String::new(),
        _ => format!("\n  {}", scan::pages_words(&survey.pages)),
    };
    let left = match survey.references {
        0 => String::new(),
        left => format!("\n  {} of these frames stand on disks", show_count(left)),
    };
    format!(
        "{name}: {framing}{version}{guest}{xen}\n  {} in {} records{pages}{left}",
        show_bytes(survey.bytes),
        show_count(records)
    )
}

fn faults_words(survey: &Survey) -> String {
    if survey.faults.is_empty() {
        return "\n  no fault".to_owned();
    }
    let mut out = String::new();
    for found in survey.faults.iter().take(FAULTS_SHOWN_MAX) {
        out.push_str(&format!("\n  fault {}", fault_words(found)));
    }
    let hidden = survey.faults.len().saturating_sub(FAULTS_SHOWN_MAX);
    let hidden = mover::units::u64_of(hidden) + survey.more_faults;
    if hidden > 0 {
        out.push_str(&format!("\n  and {} more; --json has the first 1000", show_count(hidden)));
    }
    out
}

fn fault_words(found: &Found) -> String {
    format!("at byte {0} ({0:#x}): {1}", found.offset, found.fault)
}

fn json<T: Serialize>(value: &T) -> Outcome<String> {
    serde_json::to_string(value)
        .map_err(io::Error::from)
        .or_fail(|| "cannot make JSON".to_owned(), "Please report it")
}
