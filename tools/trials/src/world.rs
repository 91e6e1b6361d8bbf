//! Two hosts on this machine: each a network namespace with a runtime and a state directory of its own, a cable between
//! them, and one disk that both reach.
//!
//! Every process started here has the world's directory in its environment, by which those that are left over are found.

#![forbid(unsafe_code)]

use std::fs::{self, File, OpenOptions};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use bench::fuse::Fuse;
use mover::net::lab::{End, Lab, Shape};
use mover::process::client::GuestClient;
use mover::process::control::{Phase, Status};
use serde_json::Value;
use tempfile::TempDir;

use crate::ear::Ear;
use crate::files::Files;
use crate::weather::{Trouble, Weather};

/// The cable's name in both namespaces (`mover::net::lab`).
const CABLE: &str = "pageferry0";
/// An address nobody has: what is sent to it is lost on the way.
const NOBODY: &str = "02:00:00:00:00:01";
const IMAGE_BYTES: &str = "64M";
/// What `pageferry metrics` counts from: kept for as long as the host runs.
const COUNTS: &str = "ended.tally";
/// The environment variable that names the world.
const MARK: &str = "PAGEFERRY_TRIAL";

/// Both ends, in order.
pub(crate) const ENDS: [End; 2] = [End::Source, End::Target];

/// Where cases take place, one after the other.
pub(crate) struct World {
    program: PathBuf,
    lab: Lab,
    fuse: Fuse,
    addresses: [String; 2],
    pub(crate) weather: Arc<Weather>,
    /// Of the source's and of the target's engine.
    pub(crate) ears: [Arc<Ear>; 2],
    /// Dropped last: it can be removed when nothing is mounted in it any more.
    directory: TempDir,
}

/// A word for an end.
pub(crate) fn name_of(end: End) -> &'static str {
    match end {
        End::Source => "source",
        End::Target => "target",
    }
}

fn at(end: End) -> usize {
    usize::from(end == End::Target)
}

impl World {
    /// A new one, with an image on its disk and an index of it, and a cable of `link` bits a second.
    pub(crate) fn new(program: &Path, link: u64) -> Result<Self> {
        let directory = tempfile::Builder::new().prefix("pageferry-trial-").tempdir_in("/var/tmp")?;
        let lab = Lab::new(Shape::of(link)).context("no link between two namespaces")?;
        let path = directory.path().join("image");
        let made = Command::new(program)
            .args(["image", "--size", IMAGE_BYTES, "--quiet"])
            .arg(&path)
            .output()
            .context("cannot run pageferry")?;
        ensure!(made.status.success(), "no image: {}", complaint(&made));
        let image = OpenOptions::new().read(true).write(true).open(&path)?;
        let weather = Arc::<Weather>::default();
        let ears = [Arc::<Ear>::default(), Arc::<Ear>::default()];
        let files = Files {
            image,
            weather: Arc::clone(&weather),
            source: Arc::clone(&ears[0]),
            target: Arc::clone(&ears[1]),
        };
        let fuse = Fuse::mount(&directory.path().join("disks"), files)?;
        let mut world = Self {
            directory,
            program: program.to_owned(),
            lab,
            fuse,
            addresses: [String::new(), String::new()],
            weather,
            ears,
        };
        for end in ENDS {
            for kind in ["run", "state"] {
                fs::create_dir_all(world.place(end, kind))?;
            }
            let shown = world.ip(end, &["-json", "link", "show", CABLE])?;
            let shown: Value = serde_json::from_str(&shown)?;
            let address = shown[0]["address"].as_str().context("the cable has an address")?;
            world.addresses[at(end)] = address.to_owned();
        }
        world.must(End::Source, &["index", "build", "--quiet", &world.disk()])?;
        Ok(world)
    }

    /// The disk, as both ends name it.
    pub(crate) fn disk(&self) -> String {
        self.fuse.path("disk").display().to_string()
    }

    fn place(&self, end: End, kind: &str) -> PathBuf {
        self.directory.path().join(format!("{kind}-{}", name_of(end)))
    }

    /// A file of this world's own.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// How the guest called `desk` at that end is, if there is one.
    pub(crate) fn status(&self, end: End) -> Option<Status> {
        self.status_of(end, "desk")
    }

    /// How that guest at that end is, if there is one; it has the same name at both.
    pub(crate) fn status_of(&self, end: End, guest: &str) -> Option<Status> {
        let socket = self.place(end, "run").join(format!("pageferry/{guest}.guest"));
        GuestClient::connect(&socket).and_then(|client| client.status()).ok()
    }

    /// Whether a guest is in its phase `running` at that end.
    pub(crate) fn runs(&self, end: End) -> bool {
        self.status(end).is_some_and(|status| status.phase == Phase::Running)
    }

    /// pageferry at that end.
    pub(crate) fn command(&self, end: End) -> Result<Command> {
        let mut command = Command::new(&self.program);
        command
            .env("XDG_RUNTIME_DIR", self.place(end, "run"))
            .env("XDG_STATE_HOME", self.place(end, "state"))
            .env(MARK, self.directory.path())
            .stdin(Stdio::null());
        self.lab.place(end, &mut command)?;
        Ok(command)
    }

    /// Runs pageferry at that end.
    pub(crate) fn run(&self, end: End, arguments: &[&str]) -> Result<Output> {
        self.command(end)?.args(arguments).output().context("cannot run pageferry")
    }

    /// As [`Self::run`], for what has to succeed; what it printed.
    pub(crate) fn must(&self, end: End, arguments: &[&str]) -> Result<String> {
        let output = self.run(end, arguments)?;
        ensure!(
            output.status.success(),
            "`pageferry {}` at the {}: {}",
            arguments.join(" "),
            name_of(end),
            complaint(&output)
        );
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Starts one end's engine, its events going to that end's ear and what it complains of to a file.
    pub(crate) fn start(&self, end: End, arguments: &[&str]) -> Result<Child> {
        let events = OpenOptions::new().write(true).open(self.fuse.path(name_of(end)))?;
        let complaints = File::create(self.complaints(end))?;
        let mut command = self.command(end)?;
        command.args(arguments).arg("--json-events").stdout(events).stderr(complaints);
        command.spawn().context("cannot run pageferry")
    }

    fn complaints(&self, end: End) -> PathBuf {
        self.directory.path().join(format!("stderr-{}", name_of(end)))
    }

    /// The last line an end's engine complained of.
    pub(crate) fn last_words(&self, end: End) -> String {
        let said = fs::read_to_string(self.complaints(end)).unwrap_or_default();
        said.lines().last().unwrap_or("nothing").trim_start_matches("pageferry: ").to_owned()
    }

    /// Lets everything that leaves that end be lost on the way, or arrive again.
    pub(crate) fn cut(&self, from: End, lost: bool) -> Result<()> {
        let to = if from == End::Source { End::Target } else { End::Source };
        let address = if lost { NOBODY } else { &self.addresses[at(to)] };
        let peer = to.address().to_string();
        let words = ["neighbour", "replace", &peer, "lladdr", address, "dev", CABLE, "nud", "permanent"];
        self.ip(from, &words).map(drop)
    }

    /// Gives the source's end these addresses as well; the target's knows the way to them.
    pub(crate) fn more_addresses(&self, addresses: impl Iterator<Item = Ipv4Addr>) -> Result<()> {
        for address in addresses {
            let whole = format!("{address}/32");
            self.ip(End::Source, &["address", "add", &whole, "dev", CABLE])?;
            let via = End::Source.address().to_string();
            self.ip(End::Target, &["route", "add", &whole, "via", &via, "dev", CABLE])?;
        }
        Ok(())
    }

    /// Does `work` at that end of the cable.
    pub(crate) fn inside<T: Send>(&self, end: End, work: impl FnOnce() -> T + Send) -> Result<T> {
        Ok(self.lab.inside(end, work)?)
    }

    fn ip(&self, end: End, arguments: &[&str]) -> Result<String> {
        let mut command = Command::new("ip");
        command.args(arguments).stdin(Stdio::null());
        self.lab.place(end, &mut command)?;
        let output = command.output().context("cannot run ip")?;
        ensure!(output.status.success(), "ip {}: {}", arguments.join(" "), complaint(&output));
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// The records of migrations at that end, with what `resolve` says of them.
    pub(crate) fn records(&self, end: End) -> Result<Vec<Value>> {
        let said = self.must(end, &["resolve", "--json", "--quiet"])?;
        said.lines().map(|line| Ok(serde_json::from_str(line)?)).collect()
    }

    /// Everything as it was: what a case may have changed and left.
    pub(crate) fn calm(&self) -> Result<()> {
        self.weather.becomes(Trouble::None);
        self.weather.keep_waiting(None);
        for end in ENDS {
            self.ears[at(end)].clear();
            self.cut(end, false)?;
        }
        Ok(())
    }

    /// What is there that a case should not have left: processes, files, listening sockets. Waits a moment for what is
    /// just ending.
    pub(crate) fn left(&self, limit: Duration) -> Result<Vec<String>> {
        let deadline = Instant::now() + limit;
        loop {
            let mut left: Vec<_> = self
                .processes()?
                .into_iter()
                .map(|(number, words)| format!("process {number} {words}"))
                .collect();
            for end in ENDS {
                for kind in ["run/pageferry", "state/pageferry/migrations"] {
                    let (kind, below) = kind.split_once('/').context("two parts")?;
                    let entries = fs::read_dir(self.place(end, kind).join(below)).into_iter().flatten();
                    let entries = entries.flatten().filter(|entry| entry.file_name() != COUNTS);
                    left.extend(entries.map(|entry| format!("file {}", entry.path().display())));
                }
                let sockets = self.lab.inside(end, || fs::read_to_string("/proc/thread-self/net/tcp"))??;
                // The fourth column: 0A is a socket that listens.
                let listening = sockets.lines().filter(|line| line.split_whitespace().nth(3) == Some("0A"));
                left.extend(listening.map(|_| format!("a listener at the {}", name_of(end))));
            }
            if left.is_empty() || Instant::now() >= deadline {
                return Ok(left);
            }
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Processes that were started in this world and are not dead: number and first words.
    pub(crate) fn processes(&self) -> Result<Vec<(u32, String)>> {
        let mark = format!("{MARK}={}", self.directory.path().display());
        let mut found = Vec::new();
        for entry in fs::read_dir("/proc")?.flatten() {
            let Some(number) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
                continue;
            };
            // Gone meanwhile, or dead and not waited for: its environment is empty.
            let environment = fs::read(entry.path().join("environ")).unwrap_or_default();
            if environment.split(|byte| *byte == 0).any(|variable| variable == mark.as_bytes()) {
                let words = fs::read(entry.path().join("cmdline")).unwrap_or_default();
                let words = String::from_utf8_lossy(&words).replace('\0', " ");
                found.push((number, words.split_whitespace().take(4).collect::<Vec<_>>().join(" ")));
            }
        }
        Ok(found)
    }

    /// Ends what is left of a case that failed, so that the next one finds nothing.
    pub(crate) fn sweep(&self) -> Result<()> {
        self.calm()?;
        for (number, _) in self.processes()? {
            let number = i32::try_from(number).ok();
            if let Some(process) = number.and_then(rustix::process::Pid::from_raw) {
                // Gone meanwhile: as good.
                let _ = rustix::process::kill_process(process, rustix::process::Signal::KILL);
            }
        }
        for end in ENDS {
            for kind in ["run", "state"] {
                let place = self.place(end, kind).join("pageferry");
                let place = if kind == "state" { place.join("migrations") } else { place };
                if place.exists() {
                    fs::remove_dir_all(place)?;
                }
            }
        }
        let left = self.left(Duration::from_secs(5))?;
        if !left.is_empty() {
            bail!("can't be cleared away: {}", left.join(", "));
        }
        Ok(())
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if let Err(error) = self.sweep() {
            eprintln!("left behind: {error:#}");
        }
    }
}

/// What a program complained of last.
pub(crate) fn complaint(output: &Output) -> String {
    let said = String::from_utf8_lossy(&output.stderr);
    said.lines().last().unwrap_or("it said nothing").trim_start_matches("pageferry: ").to_owned()
}
