//! `xc_domain_save` and `xc_domain_restore`, as libxenguest has them: for programs that link the two functions
//! (`libpageferry_xen.so`), or are given them by `LD_PRELOAD`.
//!
//! ```text
//!   C program --> xc_domain_save --> crate::library --> crate::save      errors: errno and -1, a line to xch's log
//!                   | Remus, COLO
//!                   +-----------> the next xc_domain_save the program has (libxenguest's)
//! ```
//!
//! Source: `tools/include/xenguest.h`, the same byte for byte in Xen 4.17, 4.18, 4.19 and 4.20; 4.22 appends a number to
//! `xc_domain_restore`, which libxl passes as 0 and a callee that does not know of it never sees.
//! Invariants: callbacks run on the caller's thread and inside its call; no panic leaves; the interface `xch` is passed
//! to libxenctrl's own functions as it came, and never looked into.

use std::ffi::{CStr, CString, c_char, c_int, c_long, c_uint, c_ulong, c_void};
use std::io::{self, Write};
use std::mem::offset_of;
use std::os::fd::BorrowedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};

use super::layout::Layout;
use crate::library::{self, Caller, Failure};
use crate::restore::Wiring;
use crate::save::{Observation, Verdict};

/// `XC_STREAM_PLAIN`.
const STREAM_PLAIN: c_uint = 0;
/// `XC_INTERNAL_ERROR`, under which libxenguest reports all that goes wrong.
const INTERNAL_ERROR: c_int = 1;

type Plain = unsafe extern "C" fn(*mut c_void) -> c_int;

/// `struct precopy_stats`: how a save of a running domain goes.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct PrecopyStats {
    /// Rounds done.
    pub iteration: c_uint,
    /// Pages written so far.
    pub total_written: c_ulong,
    /// Pages to be sent; -1 where that is not known.
    pub dirty_count: c_long,
}

/// `struct save_callbacks`: what a save asks its caller for.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct SaveCallbacks {
    /// Has the guest suspended; 0 is failure.
    pub suspend: Option<Plain>,
    /// Says whether to go on with rounds: -1 gives up, 0 goes on, 1 stops the guest.
    pub precopy_policy: Option<unsafe extern "C" fn(PrecopyStats, *mut c_void) -> c_int>,
    /// Remus' and COLO's.
    pub postcopy: Option<Plain>,
    /// Remus' and COLO's.
    pub checkpoint: Option<Plain>,
    /// COLO's.
    pub wait_checkpoint: Option<Plain>,
    /// Has the device model log what it writes; 0 is success.
    pub switch_qemu_logdirty: Option<unsafe extern "C" fn(u32, c_uint, *mut c_void) -> c_int>,
    /// Passed to each of them.
    pub data: *mut c_void,
}

/// `struct restore_callbacks`: what a restore tells its caller.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct RestoreCallbacks {
    /// What the guest can't change is set; bit 0: no CPUID policy came, 1: no MSR policy. 0 is success.
    pub static_data_done: Option<unsafe extern "C" fn(c_uint, *mut c_void) -> c_int>,
    /// COLO's.
    pub suspend: Option<Plain>,
    /// COLO's.
    pub postcopy: Option<Plain>,
    /// Remus' and COLO's.
    pub checkpoint: Option<Plain>,
    /// COLO's.
    pub wait_checkpoint: Option<Plain>,
    /// COLO's.
    pub restore_results: Option<unsafe extern "C" fn(c_ulong, c_ulong, *mut c_void)>,
    /// Passed to each of them.
    pub data: *mut c_void,
}

/// What the structs above claim of `xenguest.h`'s.
pub(super) const STATS: Layout = Layout {
    c_type: "struct precopy_stats",
    bytes: size_of::<PrecopyStats>(),
    members: &[
        ("iteration", offset_of!(PrecopyStats, iteration)),
        ("total_written", offset_of!(PrecopyStats, total_written)),
        ("dirty_count", offset_of!(PrecopyStats, dirty_count)),
    ],
};
/// As [`STATS`].
pub(super) const SAVE: Layout = Layout {
    c_type: "struct save_callbacks",
    bytes: size_of::<SaveCallbacks>(),
    members: &[
        ("suspend", offset_of!(SaveCallbacks, suspend)),
        ("precopy_policy", offset_of!(SaveCallbacks, precopy_policy)),
        ("postcopy", offset_of!(SaveCallbacks, postcopy)),
        ("checkpoint", offset_of!(SaveCallbacks, checkpoint)),
        ("wait_checkpoint", offset_of!(SaveCallbacks, wait_checkpoint)),
        ("switch_qemu_logdirty", offset_of!(SaveCallbacks, switch_qemu_logdirty)),
        ("data", offset_of!(SaveCallbacks, data)),
    ],
};
/// As [`STATS`].
pub(super) const RESTORE: Layout = Layout {
    c_type: "struct restore_callbacks",
    bytes: size_of::<RestoreCallbacks>(),
    members: &[
        ("static_data_done", offset_of!(RestoreCallbacks, static_data_done)),
        ("suspend", offset_of!(RestoreCallbacks, suspend)),
        ("postcopy", offset_of!(RestoreCallbacks, postcopy)),
        ("checkpoint", offset_of!(RestoreCallbacks, checkpoint)),
        ("wait_checkpoint", offset_of!(RestoreCallbacks, wait_checkpoint)),
        ("restore_results", offset_of!(RestoreCallbacks, restore_results)),
        ("data", offset_of!(RestoreCallbacks, data)),
    ],
};

/// `xc_domain_save`'s type.
type SaveFunction =
    unsafe extern "C" fn(*mut c_void, c_int, u32, u32, *mut SaveCallbacks, c_uint, c_int) -> c_int;

/// Saves domain `dom` into `io_fd`, live and with a comparing pass as `flags` (`XCFLAGS_*`) say. 0, or -1 with `errno`
/// and a line in `xch`'s log.
///
/// # Safety
/// `xch` is an open interface of the libxenctrl this process has, or null; `io_fd` stays open during the call;
/// `callbacks` is null or points at callbacks that may be called with their data.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xc_domain_save(
    xch: *mut c_void,
    io_fd: c_int,
    dom: u32,
    flags: u32,
    callbacks: *mut SaveCallbacks,
    stream_type: c_uint,
    recv_fd: c_int,
) -> c_int {
    if stream_type != STREAM_PLAIN {
        return match next(c"xc_domain_save") {
            Some(address) => {
                // SAFETY: the next definition of this very symbol has this very type, and our caller's arguments are
                // passed on as they are. Worth it: Remus and COLO stay with the library that knows them.
                let function: SaveFunction = unsafe { std::mem::transmute(address) };
                // SAFETY: as above.
                unsafe { function(xch, io_fd, dom, flags, callbacks, stream_type, recv_fd) }
            }
            None => answer(xch, || Err(Failure::checkpointed())),
        };
    }
    // SAFETY: the caller's promise. Worth it: this is how C hands over functions.
    let callbacks = unsafe { callbacks.as_ref() };
    answer(xch, || {
        let io = borrow(&io_fd)?;
        let mut saver = CSave { xch, dom, callbacks: callbacks.ok_or_else(Failure::no_callbacks)? };
        library::save(dom, io, flags, &mut saver)
    })
}

/// `xc_domain_restore`'s type.
type RestoreFunction = unsafe extern "C" fn(
    *mut c_void,
    c_int,
    u32,
    c_uint,
    *mut c_ulong,
    u32,
    c_uint,
    *mut c_ulong,
    u32,
    c_uint,
    *mut RestoreCallbacks,
    c_int,
) -> c_int;

/// Restores domain `dom` from `io_fd`, and fills in where its store and its console are. 0, or -1 with `errno` and a
/// line in `xch`'s log.
///
/// # Safety
/// As [`xc_domain_save`]; `store_mfn` and `console_mfn` are null or may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xc_domain_restore(
    xch: *mut c_void,
    io_fd: c_int,
    dom: u32,
    store_evtchn: c_uint,
    store_mfn: *mut c_ulong,
    store_domid: u32,
    console_evtchn: c_uint,
    console_mfn: *mut c_ulong,
    console_domid: u32,
    stream_type: c_uint,
    callbacks: *mut RestoreCallbacks,
    send_back_fd: c_int,
) -> c_int {
    if stream_type != STREAM_PLAIN {
        return match next(c"xc_domain_restore") {
            Some(address) => {
                // SAFETY: as in `xc_domain_save`.
                let function: RestoreFunction = unsafe { std::mem::transmute(address) };
                // SAFETY: as above.
                unsafe {
                    function(
                        xch,
                        io_fd,
                        dom,
                        store_evtchn,
                        store_mfn,
                        store_domid,
                        console_evtchn,
                        console_mfn,
                        console_domid,
                        stream_type,
                        callbacks,
                        send_back_fd,
                    )
                }
            }
            None => answer(xch, || Err(Failure::checkpointed())),
        };
    }
    // SAFETY: the caller's promise. Worth it: this is how C hands over functions.
    let callbacks = unsafe { callbacks.as_ref() };
    answer(xch, || {
        let io = borrow(&io_fd)?;
        let wiring = Wiring {
            store_port: store_evtchn,
            store_domain: library::domain(store_domid)?,
            console_port: console_evtchn,
            console_domain: library::domain(console_domid)?,
        };
        let frames = library::restore(dom, io, &wiring, &mut CRestore { xch, callbacks })?;
        for (place, frame) in [(store_mfn, frames.store), (console_mfn, frames.console)] {
            if !place.is_null() {
                // SAFETY: not null, and the caller's to be written. Worth it: C has no other way to return two numbers.
                unsafe { place.write(frame) };
            }
        }
        Ok(())
    })
}

/// Runs `call` and says what came of it as C does. A panic is an error like another: unwinding into C is undefined.
fn answer(xch: *mut c_void, call: impl FnOnce() -> Result<(), Failure>) -> c_int {
    let result = catch_unwind(AssertUnwindSafe(call)).unwrap_or_else(|panic| Err(Failure::panicked(&*panic)));
    let Err(failure) = result else { return 0 };
    report_error(xch, &failure.message);
    // SAFETY: the address of this thread's errno. Worth it: the caller reads the cause from there.
    unsafe { *libc::__errno_location() = failure.errno };
    -1
}

/// The caller's descriptor, for as long as its number lives here.
fn borrow(fd: &c_int) -> Result<BorrowedFd<'_>, Failure> {
    if *fd < 0 {
        return Err(Failure::no_stream(*fd));
    }
    // SAFETY: not -1, and the caller keeps it open during the call. Worth it: C passes descriptors by number.
    Ok(unsafe { BorrowedFd::borrow_raw(*fd) })
}

/// The definition of `symbol` behind ours in the order the dynamic linker searches; never our own.
fn next(symbol: &CStr) -> Option<*mut c_void> {
    // SAFETY: a terminated name and a handle glibc defines. Worth it: what is not for us goes to who was asked before.
    let address = unsafe { libc::dlsym(libc::RTLD_NEXT, symbol.as_ptr()) };
    (!address.is_null()).then_some(address)
}

/// A function of the libxenctrl this process has, if it has one.
fn of_libxenctrl(symbol: &CStr) -> Option<*mut c_void> {
    // SAFETY: as in `next`. Worth it: no link to a library whose name changes with every release of Xen.
    let address = unsafe { libc::dlsym(libc::RTLD_DEFAULT, symbol.as_ptr()) };
    (!address.is_null()).then_some(address)
}

fn terminated(text: &str) -> CString {
    CString::new(text.replace('\0', "?")).unwrap_or_default()
}

/// An error for `xch`'s log; for standard error without one.
fn report_error(xch: *mut c_void, text: &str) {
    match of_libxenctrl(c"xc_report_error").filter(|_| !xch.is_null()) {
        Some(address) => {
            type Report = unsafe extern "C" fn(*mut c_void, c_int, *const c_char, ...);
            // SAFETY: libxenctrl's declaration of this name, the same from 4.17 to 4.20. Worth it: the line lands where
            // the caller's other ones do.
            let report: Report = unsafe { std::mem::transmute(address) };
            // SAFETY: `xch` is the caller's open interface, and one string for the one `%s`, alive during the call.
            unsafe { report(xch, INTERNAL_ERROR, c"%s".as_ptr(), terminated(text).as_ptr()) };
        }
        None => {
            // Who reads it may be gone, which must not end the caller's process.
            let _ = writeln!(io::stderr(), "pageferry: {text}");
        }
    }
}

/// How far it is, for `xch`'s log; nobody is told without one. With a `total` of 0 it is a line by itself.
fn report_progress(xch: *mut c_void, what: &str, done: u64, total: u64) {
    type Name = unsafe extern "C" fn(*mut c_void, *const c_char) -> *const c_char;
    type Single = unsafe extern "C" fn(*mut c_void, *const c_char);
    type Step = unsafe extern "C" fn(*mut c_void, c_ulong, c_ulong);
    let names = [c"xc_set_progress_prefix", c"xc_report_progress_single", c"xc_report_progress_step"];
    let [Some(prefix), Some(single), Some(step)] = names.map(of_libxenctrl) else { return };
    if xch.is_null() {
        return;
    }
    let what = terminated(what);
    // SAFETY: libxenctrl's declarations of these names, the same from 4.17 to 4.20. Worth it: xl draws from them.
    let (prefix, single, step) = unsafe {
        (
            std::mem::transmute::<*mut c_void, Name>(prefix),
            std::mem::transmute::<*mut c_void, Single>(single),
            std::mem::transmute::<*mut c_void, Step>(step),
        )
    };
    // SAFETY: `xch` is the caller's open interface; the text outlives the prefix, which is taken back.
    unsafe {
        if total == 0 {
            single(xch, what.as_ptr());
        } else {
            let before = prefix(xch, what.as_ptr());
            step(xch, done, total);
            prefix(xch, before);
        }
    }
}

/// A C caller that wants a domain saved.
pub(super) struct CSave<'a> {
    pub(super) xch: *mut c_void,
    pub(super) dom: u32,
    pub(super) callbacks: &'a SaveCallbacks,
}

impl Caller for CSave<'_> {
    fn suspend(&mut self) -> Option<bool> {
        let suspend = self.callbacks.suspend?;
        // SAFETY: the caller's function with the caller's data, on the caller's thread. Worth it: only a toolstack can
        // have a guest suspended.
        Some(unsafe { suspend(self.callbacks.data) } != 0)
    }

    fn device_log(&mut self, on: bool) -> Option<bool> {
        let switch = self.callbacks.switch_qemu_logdirty?;
        // SAFETY: as above. Worth it: what a device model writes is in no log of the hypervisor's.
        Some(unsafe { switch(self.dom, c_uint::from(on), self.callbacks.data) } == 0)
    }

    fn judge(&mut self, seen: &Observation, written: u64) -> Option<Verdict> {
        let policy = self.callbacks.precopy_policy?;
        let stats = PrecopyStats {
            iteration: seen.rounds,
            total_written: written,
            dirty_count: c_long::try_from(seen.dirty).unwrap_or(c_long::MAX),
        };
        // SAFETY: as above. Worth it: a caller with a policy of its own relies on being asked.
        Some(match unsafe { policy(stats, self.callbacks.data) } {
            0 => Verdict::GoOn,
            1 => Verdict::Stop,
            _ => Verdict::GiveUp,
        })
    }

    fn progress(&mut self, what: &str, done: u64, total: u64) {
        report_progress(self.xch, what, done, total);
    }

    fn complain(&mut self, text: &str) {
        report_error(self.xch, text);
    }
}

/// A C caller that wants a domain restored.
struct CRestore<'a> {
    xch: *mut c_void,
    callbacks: Option<&'a RestoreCallbacks>,
}

impl Caller for CRestore<'_> {
    fn static_data_done(&mut self, missing: u32) -> bool {
        let Some(callbacks) = self.callbacks else { return true };
        let Some(done) = callbacks.static_data_done else { return true };
        // SAFETY: the caller's function with the caller's data, on the caller's thread. Worth it: only a toolstack can
        // make up the policies an old stream lacks.
        unsafe { done(missing, callbacks.data) == 0 }
    }

    fn progress(&mut self, what: &str, done: u64, total: u64) {
        report_progress(self.xch, what, done, total);
    }

    fn complain(&mut self, text: &str) {
        report_error(self.xch, text);
    }
}
