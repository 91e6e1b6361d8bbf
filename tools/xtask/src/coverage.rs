//! `cargo xtask fuzz --coverage`: what of each decoder's code its corpus reaches, once as kept in the repository and once with
//! what fuzzing has found since in `target/fuzz-corpus`. Counted by the compiler's own instrumentation; takes a nightly compiler with llvm-tools.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::nightly::{self, TARGET, TOOLS};
use crate::{fuzz, run};

/// Where its programs and counts are, in the target directory.
const HOME: &str = "coverage";

/// The files that each decoder is to reach. Writers stand in many of them too; [`Measured::unentered`] tells what a corpus leaves out.
const REACH: &[(&str, &[&str])] = &[
    ("greeting", &["mover/src/wire/hello.rs", "mover/src/wire/knock.rs"]),
    ("frame", &["mover/src/wire/frame.rs"]),
    ("message", &["mover/src/wire/control.rs"]),
    ("word", &["mover/src/net/pass.rs"]),
    (
        "xen_stream",
        &[
            "xen-glue/src/stream/scan.rs",
            "xen-glue/src/stream/reader.rs",
            "xen-glue/src/stream/input.rs",
            "xen-glue/src/stream/header.rs",
            "xen-glue/src/stream/body.rs",
            "xen-glue/src/stream/kind.rs",
            "xen-glue/src/stream/order.rs",
            "xen-glue/src/stream/page.rs",
            "xen-glue/src/stream/libxl.rs",
            "xen-glue/src/stream/xl.rs",
        ],
    ),
    ("offer", &["xen-glue/src/stream/ferry.rs"]),
    ("helper", &["xen-glue/src/helper/messages.rs", "xen-glue/src/helper/arguments.rs"]),
    ("xenstore", &["xen-glue/src/xenstore.rs", "xen-glue/src/ferry/attached.rs"]),
    (
        "clone",
        &["mover/src/disk/chain/mod.rs", "mover/src/disk/chain/qcow2.rs", "mover/src/disk/chain/vhd.rs"],
    ),
    ("record", &["mover/src/net/tls/record.rs"]),
    ("index", &["mover/src/index/file.rs", "mover/src/index/layout.rs", "mover/src/index/table.rs"]),
    ("workload", &["mover/src/process/inside/workload.rs"]),
    ("config", &["mover/src/process/config.rs"]),
];

/// Of a file.
struct Measured {
    file: String,
    lines: Share,
    regions: Share,
    /// Functions that were never entered: where they begin, and how.
    unentered: Vec<String>,
}

/// How many of how many.
#[derive(Clone, Copy, Default)]
struct Share {
    reached: u64,
    of: u64,
}

impl Share {
    fn of(summary: &Value) -> Self {
        let number = |name: &str| summary[name].as_u64().unwrap_or(0);
        Self { reached: number("covered"), of: number("count") }
    }

    fn shown(self) -> String {
        format!("{} of {}", self.reached, self.of)
    }
}

/// Prints the table, of every decoder or the one called `name`; on standard error, the functions that were never entered.
pub(crate) fn run(name: Option<&str>) -> Result<()> {
    nightly::need(&[TOOLS])?;
    let names = fuzz::names()?;
    let strange = names.iter().find(|name| !REACH.iter().any(|reach| reach.0 == name.as_str()));
    ensure!(strange.is_none(), "{strange:?} has no line in `REACH`: what is it to reach?");
    let chosen: Vec<_> = REACH.iter().filter(|reach| name.is_none_or(|name| name == reach.0)).collect();
    ensure!(!chosen.is_empty(), "there is no such fuzzer; they are {}", names.join(", "));
    let program = build()?;
    println!("| decoder | file | lines | regions | lines with what was found | regions |");
    println!("|---|---|---|---|---|---|");
    for (name, files) in chosen {
        let seeds = run::root()?.join(fuzz::HOME).join("corpus").join(name);
        let found = fuzz::found(name)?;
        let by_seeds = measure(&program, name, &[&seeds], files)?;
        let by_both =
            if found.is_dir() { Some(measure(&program, name, &[&seeds, &found], files)?) } else { None };
        for (at, kept) in by_seeds.iter().enumerate() {
            let both = by_both.as_ref().map_or(kept, |both| &both[at]);
            let [first, second] =
                [kept, both].map(|one| format!("{} | {}", one.lines.shown(), one.regions.shown()));
            println!("| {name} | `{}` | {first} | {second} |", kept.file);
            both.unentered.iter().for_each(|function| eprintln!("never entered: {function}"));
        }
    }
    Ok(())
}

/// Builds the program that feeds files to decoders; returns its path.
fn build() -> Result<PathBuf> {
    let mut command = nightly::cargo(HOME)?;
    command.env("RUSTFLAGS", "-Cinstrument-coverage");
    command.args(["build", "--quiet", "--locked", "--target", TARGET]);
    // Build scripts leave counts as well, which are nobody's.
    command.env("LLVM_PROFILE_FILE", nightly::target(HOME)?.join("ignored.profraw"));
    run::succeed(command.args(["--package", "fuzz-entries", "--example", "feed"]))?;
    Ok(nightly::target(HOME)?.join(TARGET).join("debug/examples/feed"))
}

/// What feeding `name` what is in `corpora` reaches of `files`.
fn measure(program: &Path, name: &str, corpora: &[&Path], files: &[&str]) -> Result<Vec<Measured>> {
    let home = nightly::target(HOME)?.join("counts");
    nightly::fresh(&home)?;
    let (raw, data) = (home.join("raw"), home.join("data"));
    run::succeed(run::command(program)?.arg(name).args(corpora).env("LLVM_PROFILE_FILE", &raw))?;
    let mut merge = nightly::llvm("llvm-profdata")?;
    run::succeed(merge.args(["merge", "--sparse", "-o"]).arg(&data).arg(&raw))?;
    let mut export = nightly::llvm("llvm-cov")?;
    export
        .args(["export", "--skip-expansions", "--skip-branches"])
        .arg(program)
        .arg("--instr-profile")
        .arg(&data);
    let json: Value = serde_json::from_str(&run::output(export.args(files))?).context("llvm-cov's JSON")?;
    files.iter().map(|file| measured(&json["data"][0], file)).collect()
}

/// What `data`, llvm-cov's, says of `file`.
fn measured(data: &Value, file: &str) -> Result<Measured> {
    let is_it = |name: &Value| name.as_str().is_some_and(|name| Path::new(name).ends_with(file));
    let all = |what: &str| data[what].as_array().cloned().unwrap_or_default();
    let files = all("files");
    let own = files.iter().find(|own| is_it(&own["filename"]));
    let summary = &own.with_context(|| format!("{file} is not in the program that was measured"))?["summary"];
    // A generic function stands there once for each of its types: one that was entered is enough.
    let functions = all("functions");
    let functions: Vec<_> = functions.iter().filter(|function| is_it(&function["filenames"][0])).collect();
    let begins = |function: &Value| function["regions"][0][0].as_u64().unwrap_or(0);
    let entered: Vec<_> =
        functions.iter().filter(|one| one["count"].as_u64() != Some(0)).map(|one| begins(one)).collect();
    let others: BTreeSet<_> =
        functions.iter().map(|one| begins(one)).filter(|line| !entered.contains(line)).collect();
    let text = fs::read_to_string(run::root()?.join(file)).with_context(|| format!("cannot read {file}"))?;
    let unentered = (1..).zip(text.lines()).filter(|(number, _)| others.contains(number));
    let unentered = unentered.map(|(number, line)| format!("{file}:{number}: {}", line.trim())).collect();
    let (lines, regions) = (Share::of(&summary["lines"]), Share::of(&summary["regions"]));
    Ok(Measured { file: file.to_owned(), lines, regions, unentered })
}
