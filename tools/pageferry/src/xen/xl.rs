//! `pageferry xen save`, `restore` and `migrate`: xl's commands with our save helper below, without anything being
//! installed.
//!
//! ```text
//!   pageferry xen save
//!     | LIBXL_SAVE_HELPER, PAGEFERRY_* from the flags
//!   xl save                              builds, names, attaches disks and networks: a toolstack's work
//!     | libxl
//!   pageferry-save-helper                memory and processors: ours
//! ```
//!
//! xl's words go to standard error as they come, with `--quiet` only if it fails. What it leaves behind when it fails is
//! looked up afterwards and said: whether the guest is still here, and whether the two hosts disagree about it.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use mover::ExitClass;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;
use xen_glue::settings::{ALL_DISKS, Settings};

use super::install;
use crate::cli::{XenMigrateArgs, XenRestoreArgs, XenSaveArgs};
use crate::console::Console;
use crate::failure::{Failure, OrFail, Outcome};
use crate::signals;

/// What names the helper to libxl.
const HELPER_VARIABLE: &str = "LIBXL_SAVE_HELPER";
/// What xl adds to the name of a guest that it has given away and not yet destroyed.
const AWAY: &str = "--migratedaway";

/// `pageferry xen save`.
pub(crate) fn save(args: &XenSaveArgs, console: &Console) -> Outcome {
    let frozen = args.disks_frozen.as_ref().map(|disks| ("PAGEFERRY_FROZEN_DISKS", disks.into()));
    let set: Vec<(&'static str, OsString)> = frozen.into_iter().collect();
    let settings = checked(&set)?;
    if args.keep_running && settings.frozen_disks.iter().any(|disk| disk == ALL_DISKS) {
        return Err(Failure::usage(
            "a guest that runs on writes its disks, and can't be restored from what was left on them. Name those that it does \
             not write (--disks-frozen=xvdb), or let it wait for a snapshot with --keep-paused",
        ));
    }
    let xl = Xl::with(args.helper.as_deref(), set, console)?;
    let guest = xl.guest(&args.domain)?;
    let mut arguments: Vec<OsString> = vec!["save".into()];
    arguments.extend(args.keep_running.then(|| "-c".into()));
    arguments.extend(args.keep_paused.then(|| "-p".into()));
    arguments.extend([guest.id.clone().into(), args.file.clone().into_os_string()]);
    let Ran { status, elapsed } = xl.run(&arguments, console)?;
    if !status.success() {
        let rest = if args.file.exists() {
            format!(" What stands in {} is not a whole guest.", args.file.display())
        } else {
            String::new()
        };
        return Err(xl.failed(&format!("save {}", guest.name), status, Some(&guest), &rest));
    }
    let bytes = fs::metadata(&args.file).map_or(0, |meta| meta.len());
    let text = format!(
        "Saved {} to {} ({} MiB) in {:.1} s.",
        guest.name,
        args.file.display(),
        bytes >> 20,
        elapsed.as_secs_f64()
    );
    let value = json!({ "did": "save", "domain": guest.name, "file": args.file, "bytes": bytes,
                        "seconds": elapsed.as_secs_f64() });
    tell(&text, &value, console)
}

/// `pageferry xen restore`.
pub(crate) fn restore(args: &XenRestoreArgs, console: &Console) -> Outcome {
    let set = match args.disks.as_slice() {
        [] => Vec::new(),
        disks => vec![("PAGEFERRY_DISK_PATHS", disks.join(",").into())],
    };
    checked(&set)?;
    let xl = Xl::with(args.helper.as_deref(), set, console)?;
    fs::File::open(&args.file)
        .map_err(|error| Failure::usage(format!("cannot read {}: {error}", args.file.display())))?;
    xl.list(None)?;
    let mut arguments: Vec<OsString> = vec!["restore".into()];
    arguments.extend(args.paused.then(|| "-p".into()));
    arguments.extend(args.config.clone().map(PathBuf::into_os_string));
    arguments.push(args.file.clone().into_os_string());
    let Ran { status, elapsed } = xl.run(&arguments, console)?;
    if !status.success() {
        let rest = " `pageferry stream verify` says whether the file is whole.";
        return Err(xl.failed(&format!("restore {}", args.file.display()), status, None, rest));
    }
    let text = format!("Restored {} in {:.1} s.", args.file.display(), elapsed.as_secs_f64());
    tell(&text, &json!({ "did": "restore", "file": args.file, "seconds": elapsed.as_secs_f64() }), console)
}

/// `pageferry xen migrate`.
pub(crate) fn migrate(args: &XenMigrateArgs, console: &Console) -> Outcome {
    let xl = Xl::with(args.helper.as_deref(), variables(args)?, console)?;
    let guest = xl.guest(&args.domain)?;
    let command = match (&args.host, &args.over) {
        (Some(host), None) => to_host(host, args, &xl.helper, console)?,
        (None, Some(command)) => command.clone(),
        _ => return Err(Failure::usage("give either the other host or --over")),
    };
    let mut arguments: Vec<OsString> = vec!["migrate".into()];
    arguments.extend(args.compare.then(|| "--debug".into()));
    arguments.extend(["-s".into(), OsString::new(), guest.id.clone().into(), command.into()]);
    let Ran { status, elapsed } = xl.run(&arguments, console)?;
    if !status.success() {
        return Err(xl.failed(&format!("migrate {}", guest.name), status, Some(&guest), ""));
    }
    let to = args.host.as_deref().unwrap_or("the other end");
    let text = format!("Moved {} to {to} in {:.1} s.", guest.name, elapsed.as_secs_f64());
    let value = json!({ "did": "migrate", "domain": guest.name, "to": to, "seconds": elapsed.as_secs_f64() });
    tell(&text, &value, console)
}

fn tell(text: &str, value: &serde_json::Value, console: &Console) -> Outcome {
    console.print(if console.json { value.to_string() } else { text.to_owned() }.as_str())
}

/// The flags as the variables the helper reads; they are checked here, so that a wrong one is found before the guest is
/// touched, as are the other settings of this host.
fn variables(args: &XenMigrateArgs) -> Outcome<Vec<(&'static str, OsString)>> {
    let seconds = |time: Duration| format!("{}s", time.as_secs_f64());
    let given = [
        ("PAGEFERRY_POLICY", args.policy.map(|policy| policy.name().to_owned())),
        ("PAGEFERRY_MAX_DOWNTIME", args.max_downtime.map(seconds)),
        ("PAGEFERRY_MAX_ROUNDS", args.max_rounds.map(|rounds| rounds.to_string())),
        ("PAGEFERRY_ON_NO_CONVERGENCE", args.if_not_converging.map(|what| what.name().to_owned())),
        ("PAGEFERRY_THROTTLE", args.throttle.map(|whether| whether.name().to_owned())),
    ];
    let set: Vec<(&'static str, OsString)> =
        given.into_iter().filter_map(|(name, value)| Some((name, value?.into()))).collect();
    checked(&set)?;
    Ok(set)
}

/// This host's settings with these variables, which are right.
fn checked(set: &[(&'static str, OsString)]) -> Outcome<Settings> {
    let variable = |name: &'static str| {
        let ours = set.iter().find(|(known, _)| *known == name).map(|(_, value)| value.clone());
        ours.or_else(|| std::env::var_os(name))
    };
    Settings::read(variable).map_err(|error| Failure::usage(error.to_string()))
}

/// The shell command that reaches `xl migrate-receive` on `host`, with our helper where it is there.
fn to_host(host: &str, args: &XenMigrateArgs, helper: &Path, console: &Console) -> Outcome<String> {
    let text = |path: &Path| {
        let text = path.to_str().map(quoted);
        text.ok_or_else(|| Failure::usage(format!("{} is no text, which a shell needs", path.display())))
    };
    let prepare = match &args.helper_there {
        Some(path) => {
            let path = text(path)?;
            format!(
                "test -x {path} || {{ echo no {path} here >&2; exit 127; }}; export {HELPER_VARIABLE}={path}"
            )
        }
        None => {
            let path = text(helper)?;
            format!("if test -x {path}; then export {HELPER_VARIABLE}={path}; fi")
        }
    };
    let loud = if console.loud { " -vvv" } else { "" };
    let debug = if args.compare { " -d" } else { "" };
    let paused = if args.paused { " -p" } else { "" };
    let there = format!("{prepare}; exec xl{loud} migrate-receive{debug}{paused}");
    Ok(format!("exec {} {} {}", args.ssh, quoted(host), quoted(&there)))
}

/// As one word of a shell's.
fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

/// A guest, as xl lists it.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Guest {
    name: String,
    id: String,
}

/// The guests in what `xl list` prints: a heading, then lines of name, number and four more columns.
fn listed(text: &str) -> Vec<Guest> {
    let guest = |line: &str| {
        let words: Vec<_> = line.split_whitespace().collect();
        let (name, columns) = words.split_at_checked(words.len().checked_sub(5)?)?;
        Some(Guest { name: name.join(" "), id: (*columns.first()?).to_owned() })
    };
    text.lines().skip(1).filter_map(guest).collect()
}

/// How a command of xl's went.
struct Ran {
    status: ExitStatus,
    elapsed: Duration,
}

/// xl with our helper below.
struct Xl {
    helper: PathBuf,
    variables: Vec<(&'static str, OsString)>,
    loud: bool,
}

impl Xl {
    fn with(
        helper: Option<&Path>,
        variables: Vec<(&'static str, OsString)>,
        console: &Console,
    ) -> Outcome<Self> {
        let helper = match helper {
            Some(path) => std::path::absolute(path)
                .or_fail(|| format!("cannot find {}", path.display()), "Give --helper a path")?,
            None => install::beside_us()?,
        };
        install::runs(&helper).map_err(|failure| {
            Failure::new(failure.class, format!("{}. Nothing was saved or moved", failure.message))
        })?;
        Ok(Self { helper, variables, loud: console.loud })
    }

    fn command<S: AsRef<OsStr>>(&self, arguments: &[S]) -> Command {
        let mut command = Command::new("xl");
        command.args(arguments).env(HELPER_VARIABLE, &self.helper);
        command.envs(self.variables.iter().map(|(name, value)| (name, value)));
        command
    }

    /// Starting xl failed.
    fn not_started(error: &io::Error) -> Failure {
        let why = match error.kind() {
            io::ErrorKind::NotFound if !on_xen() => NO_XEN.to_owned(),
            io::ErrorKind::NotFound => {
                "there is no xl in PATH, which is what builds guests here. Install Xen's tools \
                 (xen-utils); with another toolstack on libxl use `pageferry xen install`"
                    .to_owned()
            }
            _ => format!("cannot run xl: {error}"),
        };
        Failure::new(ExitClass::Machine, why)
    }

    /// What `xl list` says, of one domain or of all.
    fn list(&self, domain: Option<&str>) -> Outcome<Vec<Guest>> {
        let mut arguments = vec!["list"];
        arguments.extend(domain);
        let output = self.command(&arguments).output().map_err(|error| Self::not_started(&error))?;
        if output.status.success() {
            return Ok(listed(&String::from_utf8_lossy(&output.stdout)));
        }
        if !on_xen() {
            return Err(Failure::new(ExitClass::Machine, NO_XEN));
        }
        let words = String::from_utf8_lossy(&output.stderr).trim().replace('\n', "; ");
        Err(match domain {
            Some(domain) => Failure::new(
                ExitClass::Guest,
                format!("xl finds no domain `{domain}` ({words}). `xl list` names those there are"),
            ),
            None => {
                Failure::new(ExitClass::Machine, format!("xl does not work here: {words}. Are you root?"))
            }
        })
    }

    fn guest(&self, domain: &str) -> Outcome<Guest> {
        let found = self.list(Some(domain))?.into_iter().next();
        found.ok_or_else(|| {
            Failure::new(ExitClass::Guest, format!("xl lists `{domain}` in words not understood here"))
        })
    }

    /// Runs a command of xl's to its end. A signal that is to end this program ends xl instead.
    fn run(&self, arguments: &[OsString], console: &Console) -> Outcome<Ran> {
        let mut all: Vec<OsString> = Vec::new();
        all.extend(self.loud.then(|| "-vvv".into()));
        all.extend_from_slice(arguments);
        let mut command = self.command(&all);
        let doing = || "cannot make a descriptor".to_owned();
        if console.quiet {
            command.stdout(Stdio::null()).stderr(Stdio::piped());
        } else {
            // Standard output is for results.
            let ours = io::stderr().as_fd().try_clone_to_owned().or_fail(doing, "Raise `ulimit -n`")?;
            command.stdout(ours);
        }
        let begun = Instant::now();
        let mut child = command.spawn().map_err(|error| Self::not_started(&error))?;
        let pid = Pid::from_child(&child);
        let over = Arc::new(AtomicBool::new(false));
        let running = Arc::clone(&over);
        signals::call_on_end(move || {
            if !running.load(Ordering::SeqCst) {
                // It may have ended by itself.
                let _ = kill_process(pid, Signal::TERM);
            }
        })?;
        let mut words = Vec::new();
        if let Some(mut said) = child.stderr.take() {
            // What can't be read is not shown.
            let _ = said.read_to_end(&mut words);
        }
        let status = child.wait().or_fail(|| "cannot wait for xl".to_owned(), "Please report it")?;
        over.store(true, Ordering::SeqCst);
        if !status.success() {
            // Nobody is left to tell if that fails.
            let _ = io::stderr().write_all(&words);
        }
        Ok(Ran { status, elapsed: begun.elapsed() })
    }

    /// Why a command of xl's came to nothing, and how it stands with the guest.
    fn failed(&self, what: &str, status: ExitStatus, guest: Option<&Guest>, rest: &str) -> Failure {
        let class = match what.split(' ').next() {
            _ if status.signal().is_some() => ExitClass::Cancelled,
            Some("migrate") => ExitClass::Peer,
            _ => ExitClass::Machine,
        };
        let how = format!("xl could not {what} ({status}); its own words stand above.");
        let Some(guest) = guest else { return Failure::new(class, format!("{how}{rest}")) };
        let Ok(guests) = self.list(None) else {
            return Failure::new(
                class,
                format!("{how} How it stands with the guest could not be asked for.{rest}"),
            );
        };
        let away = format!("{}{AWAY}", guest.name);
        if guests.iter().any(|found| found.name == away) {
            let name = &guest.name;
            return Failure::new(
                ExitClass::InDoubt,
                format!(
                    "{how} The hosts lost each other while {name} changed hands: it stands still here as {away}, and may run \
                     there. If it runs there, `xl destroy {away}` here; if it does not, destroy what there is of it there, \
                     then `xl rename {away} {name}` and `xl resume {name}` here (before Xen 4.20, which has no such command: `xl destroy` and a \
                     new start). Never let both run"
                ),
            );
        }
        let here = guests.iter().any(|found| found.id == guest.id);
        let stands = if here { "is still here" } else { "is not here any more" };
        Failure::new(class, format!("{how} {} {stands}.{rest}", guest.name))
    }
}

const NO_XEN: &str = "this system does not run on Xen, so that it has no domains. Boot it as a control domain (dom0) of \
                      Xen 4.17 to 4.20; `cargo xtask xen-lab test stock/migrate-pvh` shows two such hosts under emulation";

/// Whether there is a hypervisor to talk to.
fn on_xen() -> bool {
    Path::new("/dev/xen/privcmd").exists()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn xls_list_is_understood() {
        let text = "Name                                        ID   Mem VCPUs\tState\tTime(s)\n\
                    Domain-0                                     0   800     1     r-----      25.9\n\
                    desk--migratedaway                          12   128     2     ---s--       1.0\n";
        let guest = |name: &str, id: &str| Guest { name: name.to_owned(), id: id.to_owned() };
        assert_eq!(listed(text), [guest("Domain-0", "0"), guest("desk--migratedaway", "12")]);
        assert!(listed("").is_empty() && listed("Name ID\n\nx 1\n").is_empty());
    }

    #[test]
    fn a_word_of_a_shells_survives_it() {
        let text = "it's $HOME; `ls` \"x\"";
        let output = Command::new("sh").arg("-c").arg(format!("printf %s {}", quoted(text))).output();
        assert_eq!(output.expect("there is a shell").stdout, text.as_bytes());
    }
}
