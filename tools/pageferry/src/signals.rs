//! SIGINT, SIGTERM and SIGHUP: the ways a user, a service manager or a closed terminal ends a program.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use mover::confine::{self, Keep};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::failure::{OrFail, Outcome};

const ENDING: [i32; 3] = [SIGINT, SIGTERM, SIGHUP];
const REMEDY: &str = "Please report it";

/// Sets `flag` when one of them comes; a second one ends the process at once.
pub(crate) fn set_on_end(flag: &Arc<AtomicBool>) -> Outcome {
    for signal in ENDING {
        let doing = || "cannot handle signals".to_owned();
        signal_hook::flag::register_conditional_default(signal, Arc::clone(flag)).or_fail(doing, REMEDY)?;
        signal_hook::flag::register(signal, Arc::clone(flag)).or_fail(doing, REMEDY)?;
    }
    Ok(())
}

/// As [`set_on_end`], however often one comes.
pub(crate) fn set_on_end_always(flag: &Arc<AtomicBool>) -> Outcome {
    for signal in ENDING {
        let doing = || "cannot handle signals".to_owned();
        signal_hook::flag::register(signal, Arc::clone(flag)).or_fail(doing, REMEDY)?;
    }
    Ok(())
}

/// Calls `act` each time one of them comes, on a thread of its own that ends with the process.
pub(crate) fn call_on_end(mut act: impl FnMut() + Send + 'static) -> Outcome {
    let mut signals = Signals::new(ENDING).or_fail(|| "cannot handle signals".to_owned(), REMEDY)?;
    std::thread::Builder::new()
        .name("signals".to_owned())
        .spawn(move || {
            // Its work takes no privilege, and the rest of the process gives its own up later, thread by thread.
            if let Err(error) = confine::drop_capabilities(Keep::Nothing) {
                tracing::warn!("the signals' thread keeps its privileges: {error}");
            }
            signals.forever().for_each(|_| act());
        })
        .or_fail(|| "cannot start a thread".to_owned(), "Raise the limit on processes (`ulimit -u`)")?;
    Ok(())
}
