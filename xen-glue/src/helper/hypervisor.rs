//! The engine the program has: Xen, under the settings of this host, told to libxl in the stock helper's words.
#![forbid(unsafe_code)]

use std::error::Error;
use std::io;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use mover::journal::Role;
use mover::report::{Mode, Phase as Shown};
use mover::units::{PAGE_BYTES_U64, f64_of};
use rustix::io::Errno;

use super::arguments::{Invocation, Job};
use super::engine::{Engine, Failure, Outcome};
use super::errno_of;
use super::messages::Level;
use super::note::Noted;
use super::session::Session;
use super::stock;
use crate::abi::{DomainId, Scheduling, ShadowOp, Xen};
use crate::ferry::{Lingering, Plan, attached};
use crate::restore::{self, RestoreError, Wiring};
use crate::save::{self, Options, SaveError};
use crate::settings::{ModeName, Settings, Throttle};
use crate::xenstore::Xenstore;

/// Between two lines about rate and time left.
const LINE_EVERY: Duration = Duration::from_secs(2);
const MIB: f64 = 1_048_576.0;
/// Why a guest does not restart early where somebody could save it meanwhile with Xen's own helper.
const XENS_OWN: &str = "Xen's own helper is the one this host runs by itself, and would save a page that is outstanding as if \
                        there were none; `pageferry xen install` puts ours in its place";

/// Saves and restores domains of the Xen this runs on.
#[derive(Clone, Copy, Debug)]
pub struct Hypervisor;

impl Engine for Hypervisor {
    fn run(
        &self,
        invocation: &Invocation,
        io: BorrowedFd<'_>,
        session: &mut Session,
        stop: &AtomicBool,
    ) -> Result<Outcome, Failure> {
        match invocation.job {
            Job::Save { live, debug } => save_domain(invocation.domain, live, debug, io, session, stop),
            Job::Restore { store_port, store_domain, console_port, console_domain } => {
                let wiring = Wiring { store_port, store_domain, console_port, console_domain };
                restore_domain(invocation.domain, &wiring, io, session, stop)
            }
        }
    }

    fn share(&self, domain: DomainId) -> Option<Scheduling> {
        // A setting that can't be read is the worker's to report: it caps nothing then.
        Settings::load().ok().filter(|settings| settings.throttle == Throttle::Auto)?;
        Xen::open().and_then(|mut xen| xen.scheduling(domain)).ok()
    }

    fn put_back(&self, domain: DomainId, share: Option<Scheduling>) -> Result<(), Failure> {
        let failure = |error: io::Error, what: &str, remedy: &str| Failure {
            errno: error.raw_os_error().unwrap_or(errno_of(Errno::IO)),
            message: format!("cannot {what} of {domain}: {error}. It goes on, slower than before; {remedy}"),
        };
        let mut xen = Xen::open().map_err(|error| failure(error, "put back the state", "run as root"))?;
        let cap = share.map_or(Ok(()), |share| xen.set_scheduling(domain, &share));
        let log = xen.log_dirty(domain, ShadowOp::Off, None);
        log.map_err(|error| {
            failure(error, "end the log of written pages", "migrating it again ends the log")
        })?;
        cap.map_err(|error| {
            failure(error, "take back the cap on the processor time", "`xl sched-credit2 -d DOMAIN -c 0`")
        })
    }
}

fn save_domain(
    domain: DomainId,
    live: bool,
    debug: bool,
    io: BorrowedFd<'_>,
    session: &mut Session,
    stop: &AtomicBool,
) -> Result<Outcome, Failure> {
    let settings = Settings::load()
        .map_err(|error| Failure { errno: errno_of(Errno::INVAL), message: error.to_string() })?;
    session.log(Level::Info, &format!("Saving {domain}"));
    note(session, Role::Source, domain);
    let ferry = if live { plan(&settings, domain, session)? } else { None };
    let options = Options { live, verify: debug, policy: settings.save_policy(), ferry };
    let mut teller = Teller::new(session, live);
    let summary = save::domain(domain, io, &options, &mut teller, stop).map_err(|error| Failure {
        errno: if matches!(error, SaveError::Cancelled) { errno_of(Errno::CANCELED) } else { number(&error) },
        message: error.to_string(),
    })?;
    let seconds = summary.total.as_secs_f64().max(1e-6);
    session.log(
        Level::Info,
        &format!(
            "Saved {domain}: {} pages in {} rounds and {:.1} s, {:.1} MiB/s; stopped for {} ms",
            summary.pages,
            summary.rounds,
            seconds,
            f64_of(summary.bytes) / MIB / seconds,
            summary.stopped.as_millis()
        ),
    );
    if let Some(ferried) = &summary.ferried {
        session.log(Level::Info, &ferried.to_string());
    }
    session.progress("Complete", 0, 0);
    Ok(Outcome::default())
}

/// How pages are to travel beside the stream, as far as this host's settings want that.
fn plan(settings: &Settings, domain: DomainId, session: &mut Session) -> Result<Option<Plan>, Failure> {
    let mode = match settings.mode {
        ModeName::Stock => return Ok(None),
        ModeName::Plain => Mode::Plain,
        ModeName::Refer => Mode::Refer,
        ModeName::Lazy => Mode::Lazy,
    };
    let mut plan = Plan {
        mode,
        lanes: settings.lanes,
        plaintext: settings.lanes_plaintext,
        credentials: settings
            .credentials()
            .map_err(|error| Failure { errno: errno_of(Errno::INVAL), message: error.to_string() })?,
        addresses: settings.lanes_address.clone(),
        guest: domain.to_string(),
        disks: Vec::new(),
        indexes: mover::state::indexes(),
    };
    if let Err(error) = look_up(&mut plan, domain, session) {
        session.log(
            Level::Warning,
            &format!("xenstore does not tell the guest's disks: {error}. Pages are sent instead"),
        );
    }
    Ok(Some(plan))
}

/// The guest's name and disks.
fn look_up(plan: &mut Plan, domain: DomainId, session: &mut Session) -> io::Result<()> {
    let mut store = Xenstore::open()?;
    if let Some(name) = store.read(&format!("/local/domain/{}/name", domain.0))? {
        plan.guest = name;
    }
    if plan.mode.refers() {
        let (disks, notes) = attached::disks(&mut store, domain)?;
        plan.disks = disks;
        notes.iter().for_each(|note| session.log(Level::Warning, note));
    }
    Ok(())
}

fn restore_domain(
    domain: DomainId,
    wiring: &Wiring,
    io: BorrowedFd<'_>,
    session: &mut Session,
    stop: &AtomicBool,
) -> Result<Outcome, Failure> {
    session.log(Level::Info, "Restoring domain");
    note(session, Role::Target, domain);
    // Nothing of a restore depends on a setting but how fast it is.
    let options = Settings::load().and_then(|settings| {
        let dial_back = settings.mode != ModeName::Stock;
        let credentials = if dial_back { settings.credentials()? } else { None };
        let not_lazy = (!stock::is_replaced(Path::new("/"))).then(|| XENS_OWN.to_owned());
        let (plaintext, direct) = (settings.lanes_plaintext, settings.loads.are_direct());
        Ok(restore::Options { dial_back, plaintext, credentials, direct, not_lazy })
    });
    let options = match options {
        Ok(options) => options,
        Err(error) => {
            session.log(Level::Warning, &format!("{error}. No lanes are taken up"));
            restore::Options::default()
        }
    };
    let mut teller = Teller::new(session, false);
    let restored =
        restore::domain(domain, io, wiring, &options, &mut teller, stop).map_err(|error| Failure {
            errno: if matches!(error, RestoreError::Cancelled) {
                errno_of(Errno::CANCELED)
            } else {
                number(&error)
            },
            message: error.to_string(),
        })?;
    let (store, console) = (restored.frames.store, restored.frames.console);
    session.log(Level::Info, "Restore successful");
    if restored.references > 0 {
        let loaded = f64_of(restored.disk_bytes) / MIB;
        let how = if restored.lent.is_some() { "grants" } else { "staged" };
        let text = format!(
            "{} pages loaded from disks and checked, {loaded:.1} MiB read; loaded by: {how}",
            restored.references
        );
        session.log(Level::Info, &text);
        let (busy, cpu) = (restored.disk_busy_ms, restored.cpu_ms);
        let text =
            format!("loads took {busy} ms with reads under way; the engine's processor time was {cpu} ms");
        session.log(Level::Detail, &text);
    }
    if let Some(lent) = &restored.lent {
        session.log(Level::Info, &format!("direct loads: {lent}"));
    }
    let lines = [
        ("XenStore", store, wiring.store_domain, wiring.store_port),
        ("Console", console, wiring.console_domain, wiring.console_port),
    ];
    for (name, frame, served_by, port) in lines {
        session.log(Level::Info, &format!("{name}: mfn {frame:#x}, dom {}, evt {port}", served_by.0));
    }
    match (restored.compared, restored.different) {
        (0, _) => {}
        (all, 0) => {
            session.log(Level::Info, &format!("verify: none of {all} pages differs from the source's"))
        }
        (all, some) => {
            let text = format!("verify: {some} of {all} pages differ from the source's");
            session.log(Level::Error, &text);
        }
    }
    Ok(Outcome { store, console })
}

/// The number of the system's error at the root of `error`.
fn number(error: &(dyn Error + 'static)) -> i32 {
    let mut cause = Some(error);
    while let Some(found) = cause {
        if let Some(number) = found.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error) {
            return number;
        }
        cause = found.source();
    }
    errno_of(Errno::IO)
}

/// Asks libxl, and tells it how it goes: progress in the stock helper's words, and what ours knows besides as lines
/// of detail.
struct Teller<'a> {
    session: &'a mut Session,
    live: bool,
    verifying: bool,
    suspended: bool,
    percent: Option<u64>,
    round: u32,
    round_began: Instant,
    line_said: Instant,
}

impl<'a> Teller<'a> {
    fn new(session: &'a mut Session, live: bool) -> Self {
        let now = Instant::now();
        Self {
            session,
            live,
            verifying: false,
            suspended: false,
            percent: None,
            round: 0,
            round_began: now,
            line_said: now,
        }
    }

    /// Frames, as often as the percentage changes: libxl shows no more.
    fn frames(&mut self, round: u32, sent: u64, total: u64) {
        if round != self.round || self.percent.is_none() {
            (self.round, self.round_began, self.percent) = (round, Instant::now(), None);
        }
        let what = match (self.verifying, self.live) {
            (true, _) => "Frames verify".to_owned(),
            (false, true) => format!("Frames iteration {}", round.saturating_sub(1)),
            (false, false) => "Frames".to_owned(),
        };
        let percent = 100 * sent / total.max(1);
        if self.percent.is_none() {
            self.session.progress(&what, 0, total);
        }
        if self.percent != Some(percent) {
            self.percent = Some(percent);
            self.session.progress(&what, sent, total);
        }
        if self.line_said.elapsed() >= LINE_EVERY && sent < total {
            self.line_said = Instant::now();
            let rate = f64_of(sent) / self.round_began.elapsed().as_secs_f64().max(1e-6);
            let left = f64_of(total - sent) / rate.max(1e-6);
            let speed = rate * f64_of(PAGE_BYTES_U64) / MIB;
            let text =
                format!("round {round}: {sent} of {total} pages, {speed:.1} MiB/s, {left:.0} s to its end");
            self.session.log(Level::Detail, &text);
        }
    }
}

/// What of a save goes into its note.
fn note_save(noted: &mut Noted, event: &save::Event<'_>) {
    match *event {
        save::Event::Phase(phase) => noted.phase(match phase {
            save::Phase::Prepare => Shown::Connect,
            save::Phase::StaticState => Shown::Arm,
            save::Phase::Rounds => Shown::Rounds,
            save::Phase::Suspend | save::Phase::LastPages | save::Phase::FinalState => Shown::Stop,
            save::Phase::Verify => Shown::Verify,
            save::Phase::End => Shown::Commit,
        }),
        save::Event::Frames { round, sent, total } => noted.pages(round, sent, Some(total)),
        save::Event::Lanes(migration) => noted.lanes(migration),
        save::Event::Engine(told) => noted.engine(told),
        save::Event::Round { .. } | save::Event::Note(_) | save::Event::Detail(_) => {}
    }
}

/// What of a restore does.
fn note_restore(noted: &mut Noted, event: &restore::Event<'_>) {
    match *event {
        restore::Event::Phase(phase) => noted.phase(match phase {
            restore::Phase::Headers => Shown::Connect,
            restore::Phase::Records => Shown::Rounds,
            restore::Phase::Finish => Shown::Stop,
        }),
        restore::Event::Pages(pages) => noted.pages(1, pages, None),
        restore::Event::Lanes(migration) => noted.lanes(migration),
        restore::Event::Engine(told) => noted.engine(told),
        restore::Event::Note(_) | restore::Event::Detail(_) => {}
    }
}

/// Notes that `domain` is on its way, under its name, as far as xenstore knows it. Where there is no xenstore, there is no domain.
fn note(session: &mut Session, role: Role, domain: DomainId) {
    let Ok(mut store) = Xenstore::open() else { return };
    let name = store.read(&format!("/local/domain/{}/name", domain.0)).ok().flatten();
    session.note(role, &name.unwrap_or_else(|| domain.to_string()));
}

impl save::Toolstack for Teller<'_> {
    fn suspend(&mut self) -> io::Result<bool> {
        let suspended = self.session.suspend()?;
        if suspended {
            self.suspended = true;
            self.session.progress("Domain now suspended", 0, 0);
        }
        Ok(suspended)
    }

    fn device_log(&mut self, on: bool) -> io::Result<bool> {
        self.session.switch_qemu_logdirty(on)
    }

    fn lingers(&mut self, left: Lingering) -> Result<(), String> {
        self.session.log(
            Level::Notice,
            "the guest can run on the target; pages of it are still here, and this host is needed until the target has them: \
             `pageferry status --wait` says when",
        );
        self.session.linger(left);
        Ok(())
    }

    fn report(&mut self, event: &save::Event<'_>) {
        if let Some(noted) = self.session.noted() {
            note_save(noted, event);
        }
        match *event {
            save::Event::Phase(phase) => {
                match phase {
                    save::Phase::Prepare | save::Phase::End => {
                        self.session.progress(&phase.to_string(), 0, 0)
                    }
                    _ => self.session.log(Level::Debug, &phase.to_string()),
                }
                if phase == save::Phase::Verify {
                    (self.verifying, self.percent) = (true, None);
                }
            }
            save::Event::Frames { round, sent, total } => self.frames(round, sent, total),
            save::Event::Round { round, dirty, rate, downtime } => {
                self.line_said = Instant::now();
                let text = format!(
                    "round {round}: {:.1} MiB/s; {dirty} pages written meanwhile, downtime now {} ms",
                    rate / MIB,
                    downtime.as_millis()
                );
                self.session.log(Level::Detail, &text);
            }
            save::Event::Lanes(_) | save::Event::Engine(_) => {}
            save::Event::Note(text) => self.session.log(Level::Warning, text),
            save::Event::Detail(text) => self.session.log(Level::Detail, text),
        }
    }
}

impl restore::Toolstack for Teller<'_> {
    fn lingers(&mut self, left: Lingering) -> Result<(), String> {
        self.session.log(
            Level::Notice,
            "the guest can run; pages of it are outstanding, and the source host is needed until they are here: \
             `pageferry status --wait` says when",
        );
        self.session.linger(left);
        Ok(())
    }

    fn static_data_done(&mut self, missing: u32) -> io::Result<bool> {
        self.session.static_data_done(missing)
    }

    fn report(&mut self, event: &restore::Event<'_>) {
        if let Some(noted) = self.session.noted() {
            note_restore(noted, event);
        }
        match *event {
            restore::Event::Phase(phase) => self.session.log(Level::Debug, &phase.to_string()),
            restore::Event::Pages(pages) => {
                if self.line_said.elapsed() >= LINE_EVERY {
                    self.line_said = Instant::now();
                    let rate = f64_of(pages) / self.round_began.elapsed().as_secs_f64().max(1e-6);
                    let speed = rate * f64_of(PAGE_BYTES_U64) / MIB;
                    self.session.log(Level::Detail, &format!("{pages} pages restored, {speed:.1} MiB/s"));
                }
            }
            restore::Event::Lanes(_) | restore::Event::Engine(_) => {}
            restore::Event::Note(text) => self.session.log(Level::Warning, text),
            restore::Event::Detail(text) => self.session.log(Level::Detail, text),
        }
    }
}
