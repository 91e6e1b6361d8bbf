//! C callbacks under a save of a simulated guest, and signals of broken pipes.

use std::ffi::{c_int, c_uint, c_void};
use std::io;
use std::os::fd::AsFd;
use std::ptr::null_mut;
use std::sync::atomic::AtomicBool;

use super::entry::{CSave, PrecopyStats, SaveCallbacks};
use super::process::BrokenPipes;
use crate::library::Teller;
use crate::save::{self, Options, Policy, SaveError};
use crate::simulated::{Guest, SimSource};

/// What the callbacks were asked for.
#[derive(Default)]
struct Seen {
    /// Suspends the guest.
    guest: Option<std::rc::Rc<std::cell::RefCell<Guest>>>,
    switched: Vec<(u32, c_uint)>,
    stats: Vec<(c_uint, u64, i64)>,
    /// What the policy answers after the second round.
    answer: c_int,
}

/// # Safety
/// `data` is what the test has put into the callbacks.
unsafe fn seen<'a>(data: *mut c_void) -> &'a mut Seen {
    // SAFETY: the caller's promise; nobody else looks meanwhile.
    unsafe { &mut *data.cast::<Seen>() }
}

unsafe extern "C" fn suspend(data: *mut c_void) -> c_int {
    // SAFETY: called with the test's data.
    let seen = unsafe { seen(data) };
    seen.guest.as_ref().unwrap().borrow_mut().life = crate::domain::Life::Suspended;
    1
}

unsafe extern "C" fn switch(domain: u32, enable: c_uint, data: *mut c_void) -> c_int {
    // SAFETY: called with the test's data.
    unsafe { seen(data) }.switched.push((domain, enable));
    0
}

unsafe extern "C" fn policy(stats: PrecopyStats, data: *mut c_void) -> c_int {
    // SAFETY: called with the test's data.
    let seen = unsafe { seen(data) };
    seen.stats.push((stats.iteration, stats.total_written, stats.dirty_count));
    if stats.iteration < 2 { 0 } else { seen.answer }
}

fn callbacks(seen: &mut Seen) -> SaveCallbacks {
    SaveCallbacks {
        suspend: Some(suspend),
        precopy_policy: Some(policy),
        postcopy: None,
        checkpoint: None,
        wait_checkpoint: None,
        switch_qemu_logdirty: Some(switch),
        data: std::ptr::from_mut(seen).cast(),
    }
}

fn save_with(
    callbacks: &SaveCallbacks,
    guest: &std::rc::Rc<std::cell::RefCell<Guest>>,
) -> Result<u32, SaveError> {
    let mut caller = CSave { xch: null_mut(), dom: 7, callbacks };
    let options = Options { live: true, verify: false, policy: Policy::Stock, ferry: None, frozen: None };
    let file = tempfile::tempfile().unwrap();
    let stop = AtomicBool::new(false);
    let mut teller = Teller::new(&mut caller, true);
    let saved = save::run(SimSource::new(guest), file.as_fd(), &options, &mut teller, &stop);
    assert!(!guest.borrow().logging, "the log is still on");
    saved.map(|summary| summary.rounds)
}

#[test]
fn a_c_callers_policy_goes_before_ours() {
    let guest = Guest::new(300);
    // Enough for stock's policy to go on to its fifth round.
    guest.borrow_mut().writes = vec![(0..100).collect(); 100];
    let mut seen = Seen { guest: Some(guest.clone()), answer: 1, ..Seen::default() };
    let callbacks = callbacks(&mut seen);
    assert_eq!(save_with(&callbacks, &guest).unwrap(), 2);
    assert_eq!(seen.switched, [(7, 1), (7, 0)]);
    assert_eq!(seen.stats, [(1, 300, 100), (2, 400, 100)]);
}

#[test]
fn a_c_callers_policy_can_give_up() {
    let guest = Guest::new(300);
    guest.borrow_mut().writes = vec![(0..100).collect(); 100];
    let mut seen = Seen { guest: Some(guest.clone()), answer: -1, ..Seen::default() };
    let error = save_with(&callbacks(&mut seen), &guest).unwrap_err();
    assert!(matches!(error, SaveError::GivenUp { rounds: 2 }), "{error}");
    assert_eq!(guest.borrow().life, crate::domain::Life::Running);
    assert_eq!(seen.switched, [(7, 1), (7, 0)]);
}

#[test]
fn a_missing_callback_is_an_error_that_names_it() {
    let guest = Guest::new(30);
    let mut seen = Seen { guest: Some(guest.clone()), answer: 1, ..Seen::default() };
    let all = callbacks(&mut seen);
    for (callbacks, name) in [
        (SaveCallbacks { suspend: None, ..all }, "suspend"),
        (SaveCallbacks { switch_qemu_logdirty: None, ..all }, "switch_qemu_logdirty"),
    ] {
        let error = save_with(&callbacks, &guest).unwrap_err().to_string();
        assert!(error.contains(&format!("the callback {name} is missing")), "{error}");
    }
}

/// With the signal's own effect, the end of the process.
#[test]
fn a_broken_pipe_is_an_error_and_the_signal_is_gone_afterwards() {
    let write = |fd: &io::PipeWriter| rustix::io::write(fd, b"x");
    let (reader, writer) = io::pipe().unwrap();
    drop(reader);
    // SAFETY: no handler runs; the disposition is put back below.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
    let errors = BrokenPipes::as_errors();
    assert_eq!(write(&writer), Err(rustix::io::Errno::PIPE));
    drop(errors);
    // SAFETY: as above.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
}
