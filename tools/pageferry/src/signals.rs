//! SIGINT, SIGTERM and SIGHUP: the ways a user, a service manager or a closed terminal ends a program.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

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
