//! Puts our save helper in the place of Xen's, the packaged way, and takes it out again.
//!
//! ```text
//!   stock      libxl-save-helper is Xen's
//!     | link to libxl-save-helper.stock, dpkg-divert, rename ours over it
//!   diverted   libxl-save-helper is ours; libxl-save-helper.stock Xen's, which updates of the package go to
//!     | rename the .stock one over it, take the diversion back
//!   stock
//! ```
//!
//! Invariants: at every instant there is a helper that works under Xen's name, so that a migration that starts meanwhile
//! does not fail; every step done twice is done once, so that a broken-off command is simply run again. Ours goes in as
//! a copy: a host must be able to migrate its guests away even if where pageferry came from is not mounted any more.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use mover::ExitClass;
use serde::Serialize;
use xen_glue::helper::{DIVERTED, HELPER, PROGRAM};

use crate::console::Console;
use crate::failure::{Failure, OrFail, Outcome};
use crate::status;

/// Minor versions of Xen 4 this was made for and tried on.
const MINORS: std::ops::RangeInclusive<u32> = 17..=20;

/// What was found, and done about it.
#[derive(Serialize)]
struct Done {
    /// Where the helper is, below the root.
    path: String,
    /// "pageferry" or "stock".
    helper: &'static str,
    /// Whether anything was changed.
    changed: bool,
}

/// Installs into every Xen below `root`.
pub(crate) fn install(helper: Option<&Path>, root: &Path, console: &Console) -> Outcome {
    let helper = match helper {
        Some(path) => path.to_owned(),
        None => beside_us()?,
    };
    runs(&helper)?;
    let places = places(root)?;
    // Nothing is changed anywhere before it is known that it can be changed everywhere.
    let states = places.iter().map(Place::state).collect::<Outcome<Vec<_>>>()?;
    let mut done = Vec::new();
    for (place, state) in places.iter().zip(states) {
        let changed = place.install(&helper, state)?;
        done.push(Done { path: place.shown(HELPER), helper: "pageferry", changed });
    }
    tell(&done, console)
}

/// Takes ours out of every Xen below `root`.
pub(crate) fn uninstall(root: &Path, console: &Console) -> Outcome {
    let draining = status::draining();
    if let (Some(first), true) = (draining.first(), root == Path::new("/")) {
        return Err(Failure::new(
            ExitClass::Guest,
            format!(
                "{first} has pages outstanding, which Xen's own helper would save as if they were not there. Wait for them: \
                 `pageferry status --wait`"
            ),
        ));
    }
    let places = places(root)?;
    let states = places.iter().map(Place::state).collect::<Outcome<Vec<_>>>()?;
    let mut done = Vec::new();
    for (place, state) in places.iter().zip(states) {
        let changed = place.uninstall(state)?;
        done.push(Done { path: place.shown(HELPER), helper: "stock", changed });
    }
    tell(&done, console)
}

fn tell(done: &[Done], console: &Console) -> Outcome {
    if console.json {
        let text = serde_json::to_string(done).map_err(io::Error::from);
        return console.print(&text.or_fail(|| "cannot make JSON".to_owned(), "Please report it")?);
    }
    let lines: Vec<_> = done
        .iter()
        .map(|Done { path, helper, changed }| match (*helper, changed) {
            ("pageferry", true) => format!("{path}: pageferry's now; Xen's own is kept as {DIVERTED}"),
            ("pageferry", false) => format!("{path}: pageferry's already"),
            (_, true) => format!("{path}: Xen's own again"),
            (_, false) => format!("{path}: Xen's own already"),
        })
        .collect();
    console.print(&lines.join("\n"))
}

/// The helper that came with this program: beside it, or where its package has it.
pub(super) fn beside_us() -> Outcome<PathBuf> {
    let ourselves = std::env::current_exe()
        .or_fail(|| "cannot tell where this program is".to_owned(), "Give --helper")?;
    let beside = ourselves.with_file_name(PROGRAM);
    let packaged = ourselves.with_file_name("../libexec/pageferry").join(PROGRAM);
    match fs::canonicalize(packaged) {
        Ok(packaged) if !beside.exists() => Ok(packaged),
        _ => Ok(beside),
    }
}

/// Refuses a helper that does not run here: with it no guest could be saved or moved.
pub(super) fn runs(helper: &Path) -> Outcome {
    let refuse = |why: String| {
        let remedy = "Give the path of a pageferry-save-helper built for this machine with --helper";
        Err(Failure::usage(format!("{} can't be used: {why}. {remedy}", helper.display())))
    };
    // Called by anybody but libxl it says who it is, and exits with 2.
    match Command::new(helper).output() {
        Ok(Output { status, stderr, .. })
            if status.code() == Some(2) && stderr.starts_with(PROGRAM.as_bytes()) =>
        {
            Ok(())
        }
        Ok(output) => refuse(format!("it does not answer as {PROGRAM} does ({})", output.status)),
        Err(error) => refuse(error.to_string()),
    }
}

/// How it stands with a Xen's helper.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    /// Xen's own.
    Stock,
    /// Ours, Xen's diverted.
    Diverted,
}

/// A Xen's directory of programs.
struct Place {
    root: PathBuf,
    /// As seen from the root: `/usr/lib/xen-4.17/bin`.
    directory: PathBuf,
}

/// Every Xen below `root` with a save helper.
fn places(root: &Path) -> Outcome<Vec<Place>> {
    let root = fs::canonicalize(root)
        .or_fail(|| format!("{} is no root", root.display()), "Give --root a directory")?;
    let lib = root.join("usr/lib");
    let mut places = Vec::new();
    let mut others = Vec::new();
    for entry in fs::read_dir(&lib).or_fail(|| format!("cannot read {}", lib.display()), "Is this a root?")? {
        let name = entry.or_fail(|| format!("cannot read {}", lib.display()), "Is this a root?")?.file_name();
        let Some(version) = name.to_str().and_then(|name| name.strip_prefix("xen-")) else { continue };
        let directory = Path::new("/usr/lib").join(&name).join("bin");
        let place = Place { root: root.clone(), directory };
        if !place.path(HELPER).exists() && !place.path(DIVERTED).exists() {
            continue;
        }
        let minor = version.strip_prefix("4.").and_then(|minor| minor.parse::<u32>().ok());
        if minor.is_some_and(|minor| MINORS.contains(&minor)) {
            places.push(place);
        } else {
            others.push(version.to_owned());
        }
    }
    places.sort_by(|a, b| a.directory.cmp(&b.directory));
    if places.is_empty() {
        let versions = format!("4.{} to 4.{}", MINORS.start(), MINORS.end());
        let found = match others.as_slice() {
            [] => "no Xen with a toolstack is installed".to_owned(),
            others => format!("Xen {} is installed", others.join(" and ")),
        };
        return Err(Failure::new(
            ExitClass::Machine,
            format!(
                "{found} in {}; pageferry works with {versions}. Install xen-utils of one of these",
                lib.display()
            ),
        ));
    }
    Ok(places)
}

impl Place {
    /// A file of it, from outside of the root.
    fn path(&self, name: &str) -> PathBuf {
        let inside = self.directory.join(name);
        self.root.join(inside.strip_prefix("/").unwrap_or(&inside))
    }

    /// A file of it, as seen from the root.
    fn inside(&self, name: &str) -> OsString {
        self.directory.join(name).into_os_string()
    }

    fn shown(&self, name: &str) -> String {
        self.directory.join(name).display().to_string()
    }

    fn divert(&self, arguments: &[&OsStr]) -> Outcome<String> {
        let mut command = Command::new("dpkg-divert");
        if self.root != Path::new("/") {
            command.arg("--root").arg(&self.root);
        }
        let doing = || "cannot run dpkg-divert".to_owned();
        let output = command.args(arguments).output().or_fail(
            doing,
            "Only Debian and its kin have it; elsewhere set LIBXL_SAVE_HELPER for the toolstack",
        )?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned());
        }
        let words = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        Err(Failure::new(ExitClass::Machine, format!("dpkg-divert refuses: {words}. Are you root?")))
    }

    /// How it stands. An error where going on in either direction could leave the host without a helper that works.
    fn state(&self) -> Outcome<State> {
        let helper = self.inside(HELPER);
        let target = self.divert(&["--truename".as_ref(), &helper])?;
        let (ours, stock) = (self.path(HELPER), self.path(DIVERTED));
        let refuse = |why: String| Err(Failure::new(ExitClass::Machine, why));
        if OsStr::new(&target) == helper {
            if !ours.exists() {
                return refuse(format!(
                    "{} is not there, though {} is. Reinstall xen-utils first",
                    self.shown(HELPER),
                    self.shown(DIVERTED)
                ));
            }
            if stock.exists() && !same_file(&ours, &stock)? {
                return refuse(format!(
                    "{} is there without a diversion, so that it is not known which of the two is Xen's. Reinstall \
                     xen-utils, remove that file, and try again",
                    self.shown(DIVERTED)
                ));
            }
            return Ok(State::Stock);
        }
        if OsStr::new(&target) != self.inside(DIVERTED) {
            return refuse(format!(
                "{} is diverted to {target} by somebody else. Remove that diversion first",
                self.shown(HELPER)
            ));
        }
        if !stock.exists() {
            return refuse(format!(
                "{} is diverted, but Xen's own is not at {target}. Reinstall xen-utils first",
                self.shown(HELPER)
            ));
        }
        Ok(State::Diverted)
    }

    fn install(&self, helper: &Path, state: State) -> Outcome<bool> {
        let (ours, stock) = (self.path(HELPER), self.path(DIVERTED));
        let remedy = "Are you root, and is the file system writable?";
        let doing = || format!("cannot install into {}", self.directory.display());
        let wanted = fs::read(helper).or_fail(|| format!("cannot read {}", helper.display()), remedy)?;
        if state == State::Diverted && fs::read(&ours).is_ok_and(|found| found == wanted) {
            return Ok(false);
        }
        let new = self.path(&format!("{HELPER}.pageferry-new"));
        fs::write(&new, &wanted)
            .and_then(|()| fs::set_permissions(&new, fs::Permissions::from_mode(0o755)))
            .and_then(|()| fs::File::open(&new)?.sync_all())
            .or_fail(doing, remedy)?;
        if state == State::Stock {
            if !stock.exists() {
                fs::hard_link(&ours, &stock).or_fail(doing, remedy)?;
            }
            let (from, to) = (self.inside(HELPER), self.inside(DIVERTED));
            let arguments: [&OsStr; 6] = [
                "--local".as_ref(),
                "--no-rename".as_ref(),
                "--divert".as_ref(),
                &to,
                "--add".as_ref(),
                &from,
            ];
            self.divert(&arguments)?;
        }
        fs::rename(&new, &ours).or_fail(doing, remedy)?;
        Ok(true)
    }

    fn uninstall(&self, state: State) -> Outcome<bool> {
        let (ours, stock) = (self.path(HELPER), self.path(DIVERTED));
        let doing = || format!("cannot put Xen's own helper back into {}", self.directory.display());
        let remedy = "Are you root, and is the file system writable?";
        if state == State::Stock {
            // A second name of it, left by a command that was broken off.
            return if stock.exists() {
                fs::remove_file(&stock).or_fail(doing, remedy).map(|()| true)
            } else {
                Ok(false)
            };
        }
        let back = self.path(&format!("{HELPER}.pageferry-back"));
        let _ = fs::remove_file(&back);
        fs::hard_link(&stock, &back).or_fail(doing, remedy)?;
        fs::rename(&back, &ours).or_fail(doing, remedy)?;
        let helper = self.inside(HELPER);
        self.divert(&["--local".as_ref(), "--no-rename".as_ref(), "--remove".as_ref(), &helper])?;
        fs::remove_file(&stock).or_fail(doing, remedy).map(|()| true)
    }
}

fn same_file(a: &Path, b: &Path) -> Outcome<bool> {
    let identity = |path: &Path| {
        let doing = || format!("cannot look at {}", path.display());
        fs::metadata(path).map(|meta| (meta.dev(), meta.ino())).or_fail(doing, "Are you root?")
    };
    Ok(identity(a)? == identity(b)?)
}
