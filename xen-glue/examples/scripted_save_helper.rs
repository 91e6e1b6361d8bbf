//! A save helper whose engine needs no Xen: it writes and reads streams of a guest that is not there. The tests of the
//! helper drive it as libxl does; it also shows what an engine has to do.
//!
//! `SCRIPT` says what it does besides: `endless` saves for ever, `panic` panics, `die` ends without a word. `SCRIPT_MARK`
//! names a file into which it writes what has happened.
#![forbid(unsafe_code)]

use std::fs::OpenOptions;
use std::io::{self, IoSlice, Read, Write};
use std::os::fd::BorrowedFd;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};

use mover::units::Pfn;
use xen_glue::abi::{DomainId, Scheduling};
use xen_glue::helper::arguments::{Invocation, Job};
use xen_glue::helper::{self, Engine, Failure, Level, Outcome, Session};
use xen_glue::stream::{DomainHeader, GuestType, HvmParam, PageEntry, PageType, Reader, Record, Writer};

fn main() -> ExitCode {
    helper::main(&Scripted)
}

struct Scripted;

impl Engine for Scripted {
    fn run(
        &self,
        invocation: &Invocation,
        io: BorrowedFd<'_>,
        session: &mut Session,
        stop: &AtomicBool,
    ) -> Result<Outcome, Failure> {
        let session_id = rustix::process::getsid(None).map_or(0, |pid| pid.as_raw_nonzero().get());
        mark(&format!("began {} {session_id}", std::process::id()));
        let io = Io { fd: io, stop };
        let result = match invocation.job {
            Job::Save { .. } => save(io, session),
            Job::Restore { .. } => restore(io, session),
        };
        mark(if result.is_ok() { "done" } else { "cleaned up" });
        result.map_err(|error| {
            let errno =
                if stop.load(Ordering::SeqCst) { rustix::io::Errno::CANCELED } else { rustix::io::Errno::IO };
            Failure { errno: errno.raw_os_error(), message: error.to_string() }
        })
    }

    fn share(&self, _: DomainId) -> Option<Scheduling> {
        Some(Scheduling { cap: 70, ..Scheduling::default() })
    }

    fn put_back(&self, domain: DomainId, share: Option<Scheduling>) -> Result<(), Failure> {
        mark(&format!("put back {domain}, {} %", share.map_or(0, |share| share.cap)));
        Ok(())
    }
}

fn script() -> String {
    std::env::var("SCRIPT").unwrap_or_default()
}

fn mark(line: &str) {
    let Some(path) = std::env::var_os("SCRIPT_MARK") else { return };
    let file = OpenOptions::new().create(true).append(true).open(path);
    file.and_then(|mut file| writeln!(file, "{line}")).expect("the mark can be written");
}

fn save(io: Io<'_>, session: &mut Session) -> io::Result<Outcome> {
    session.log(Level::Info, "Saving domain");
    if !session.switch_qemu_logdirty(true)? {
        return Err(io::Error::other("the device model does not log what it writes"));
    }
    let domain = DomainHeader { guest: GuestType::Hvm, xen_major: 4, xen_minor: 17 };
    let mut writer = Writer::start(io, domain).map_err(io::Error::other)?;
    writer.static_data_end().map_err(io::Error::other)?;
    let script = script();
    match script.as_str() {
        "panic" => panic!("as the script says"),
        "die" => std::process::abort(),
        _ => {}
    }
    for round in 0u64.. {
        let entries: Vec<_> = (0..64).map(|pfn| PageEntry::new(Pfn(pfn), PageType::Normal)).collect();
        writer.page_data(&entries, &[IoSlice::new(&[0x5a; 64 * 4096])]).map_err(io::Error::other)?;
        session.progress("Frames", 64 * round, 256);
        if round == 3 && script != "endless" {
            break;
        }
    }
    if !session.suspend()? {
        return Err(io::Error::other("the guest did not suspend"));
    }
    writer.hvm_params(&[HvmParam { index: 1, value: 2 }]).map_err(io::Error::other)?;
    writer.hvm_context(&[7; 99]).map_err(io::Error::other)?;
    writer.end().map_err(io::Error::other)?;
    session.switch_qemu_logdirty(false)?;
    Ok(Outcome::default())
}

fn restore(io: Io<'_>, session: &mut Session) -> io::Result<Outcome> {
    let mut reader = Reader::start(io, 0).map_err(io::Error::other)?;
    loop {
        match reader.next_record().map_err(io::Error::other)? {
            Record::StaticDataEnd => policies_made_up(session)?,
            Record::PageData => reader.skip_pages().map_err(io::Error::other)?,
            Record::End => return Ok(Outcome { store: 0xfeffc, console: 0xfefff }),
            _ => {}
        }
    }
}

fn policies_made_up(session: &mut Session) -> io::Result<()> {
    if session.static_data_done(3)? {
        return Ok(());
    }
    Err(io::Error::other("libxl could not make up the policies"))
}

/// The stream, given up when told to stop.
struct Io<'a> {
    fd: BorrowedFd<'a>,
    stop: &'a AtomicBool,
}

impl Io<'_> {
    fn call(&self, mut call: impl FnMut() -> rustix::io::Result<usize>) -> io::Result<usize> {
        loop {
            if self.stop.load(Ordering::SeqCst) {
                return Err(io::Error::other("told to stop"));
            }
            match call() {
                Err(rustix::io::Errno::INTR) => {}
                done => return Ok(done?),
            }
        }
    }
}

impl Read for Io<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.call(|| rustix::io::read(self.fd, &mut *bytes))
    }
}

impl Write for Io<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.call(|| rustix::io::write(self.fd, bytes))
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
