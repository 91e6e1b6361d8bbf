//! Where a demonstration takes place: a directory of its own, the link, the guests. Whatever way the demonstration
//! ends, all of it is gone when this is dropped, or when it was killed ([`lease`]); only what it started is touched.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use mover::net::lab::{self, Lab, Shape};
use mover::process::client::GuestClient;
use rustix::process::{Pid, Signal, WaitOptions, kill_process, set_child_subreaper, wait};
use tempfile::TempDir;

use super::child::End;
use super::lease::{self, Lease};
use crate::failure::{OrFail, Outcome};

/// How long ended guests may take to be gone: they free their memory.
const GONE_WITHIN: Duration = Duration::from_secs(10);

/// The stage.
pub(super) struct Stage {
    directory: TempDir,
    /// Behind the directory, which is gone when the lock is.
    lease: Lease,
    lab: Option<Lab>,
    /// The guest to leave running, by name.
    kept: Option<String>,
}

impl Stage {
    /// Sets one up below `base`.
    pub(super) fn new(base: &Path) -> Outcome<Self> {
        match lease::sweep(base) {
            0 => {}
            n => tracing::info!(
                "removed what {n} demonstrations that were killed had left in {}",
                base.display()
            ),
        }
        let directory = tempfile::Builder::new().prefix(lease::PREFIX).tempdir_in(base).or_fail(
            || format!("cannot make a directory in {}", base.display()),
            "Name one with space for the guest's disk with --dir",
        )?;
        for name in ["run", "state"] {
            let path = directory.path().join(name);
            fs::create_dir(&path)
                .or_fail(|| format!("cannot make {}", path.display()), "Is the disk full?")?;
        }
        let lease = Lease::grant(directory.path())?;
        // Guests outlive the process that started them; their ends are then reported to us.
        set_child_subreaper(Some(rustix::process::getpid()))
            .or_fail(|| "cannot become the parent of orphans".to_owned(), "Please report it")?;
        Ok(Self { directory, lease, lab: None, kept: None })
    }

    /// Lays a shaped link; the sentence of why not where that can't be.
    pub(super) fn lay_link(&mut self, bytes_per_second: u64) -> Result<(), String> {
        let lab =
            Lab::new(Shape::of(bytes_per_second.saturating_mul(8))).map_err(|error| error.to_string())?;
        self.lab = Some(lab);
        Ok(())
    }

    /// The address a target at its end of the link listens on.
    pub(super) fn listen_address(&self) -> String {
        match self.lab {
            Some(_) => format!("{}:0", lab::End::Target.address()),
            None => "127.0.0.1:0".to_owned(),
        }
    }

    /// This program, with the demonstration's own directories.
    pub(super) fn program(&self) -> Outcome<Command> {
        let program = std::env::current_exe()
            .or_fail(|| "cannot find this program's own file".to_owned(), "Is /proc mounted?")?;
        let mut command = Command::new(program);
        command.env("XDG_RUNTIME_DIR", self.directory.path().join("run"));
        command.env("XDG_STATE_HOME", self.directory.path().join("state"));
        command.env(lease::VARIABLE, self.lease.path());
        Ok(command)
    }

    /// This program, to run at that end of the link.
    pub(super) fn program_at(&self, end: End) -> Outcome<Command> {
        let mut command = self.program()?;
        if let Some(lab) = &self.lab {
            let end = match end {
                End::Source => lab::End::Source,
                End::Target => lab::End::Target,
            };
            lab.place(end, &mut command)?;
        }
        Ok(command)
    }

    /// The directory of the guests' sockets.
    pub(super) fn runtime(&self) -> PathBuf {
        self.directory.path().join("run").join("pageferry")
    }

    /// The directory of indexes.
    pub(super) fn index_dir(&self) -> PathBuf {
        self.directory.path().join("state").join("pageferry").join("index")
    }

    /// The control socket of a guest.
    pub(super) fn socket(&self, name: &str) -> PathBuf {
        self.runtime().join(format!("{name}.guest"))
    }

    /// Where the guest's disk is.
    pub(super) fn image(&self) -> PathBuf {
        self.directory.path().join("disk.img")
    }

    /// Leaves that guest running, and its directory with it, from now on whatever happens.
    pub(super) fn keep(&mut self, guest: &str) {
        self.directory.disable_cleanup(true);
        self.lease.give_up();
        self.kept = Some(guest.to_owned());
    }

    /// The processes of guests that answer at sockets in this stage's own directory: nobody else's.
    fn guests(&self) -> Vec<Pid> {
        let sockets = fs::read_dir(self.runtime()).into_iter().flatten().flatten().map(|entry| entry.path());
        sockets
            .filter(|path| path.extension().is_some_and(|extension| extension == "guest"))
            .filter(|path| self.kept.as_ref().is_none_or(|kept| *path != self.socket(kept)))
            .filter_map(|path| GuestClient::connect(&path).ok()?.status().ok())
            .filter_map(|status| Pid::from_raw(i32::try_from(status.pid).ok()?))
            .collect()
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        let mut guests = self.guests();
        for guest in &guests {
            // Gone already: as good.
            let _ = kill_process(*guest, Signal::KILL);
        }
        // Those that became ours when the process that started them ended are waited for; of others, the going.
        let deadline = Instant::now() + GONE_WITHIN;
        while !guests.is_empty() && Instant::now() < deadline {
            while let Ok(Some(_)) = wait(WaitOptions::NOHANG) {}
            guests.retain(|guest| rustix::process::test_kill_process(*guest).is_ok());
            std::thread::sleep(Duration::from_millis(5));
        }
        if !guests.is_empty() {
            tracing::warn!("guests still there after {} s: {guests:?}", GONE_WITHIN.as_secs());
        }
    }
}
