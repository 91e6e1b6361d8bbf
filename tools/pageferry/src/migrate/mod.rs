//! `pageferry send`, `receive` and `resolve`: the two ends of a migration, and what is left when one was lost.

pub(crate) mod receive;
pub(crate) mod resolve;
pub(crate) mod send;

use std::path::PathBuf;
use std::sync::Arc;

use mover::report::{Event, Observer};
use mover::runtime::{Runtime, Threads};
use mover::source::{Cancel, Surroundings};

use crate::console::Console;
use crate::failure::Outcome;
use crate::signals;
use crate::told::Teller;

/// Where indexes and the records of migrations are kept: `$XDG_STATE_HOME/pageferry`, `/var/lib/pageferry` for root,
/// else `~/.local/state/pageferry`.
pub(crate) fn state_dir() -> PathBuf {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    match (set("XDG_STATE_HOME"), set("HOME")) {
        (Some(state), _) => state.join("pageferry"),
        (None, Some(home)) if !rustix::process::getuid().is_root() => home.join(".local/state/pageferry"),
        _ => PathBuf::from("/var/lib/pageferry"),
    }
}

/// Where the records of migrations are.
pub(crate) fn records_dir() -> PathBuf {
    state_dir().join("migrations")
}

/// Time and threads, where events go, and a cancel request tied to Ctrl-C.
pub(crate) fn surroundings(console: &Console, teller: Option<Arc<Teller>>) -> Outcome<Surroundings> {
    let runtime: Arc<dyn Runtime> = Arc::new(Threads::new());
    let cancel = Arc::new(Cancel::default());
    let (asked, waking) = (Arc::clone(&cancel), Arc::clone(&runtime));
    let console = *console;
    let to_people = teller.is_none();
    signals::call_on_end(move || {
        if to_people {
            console.note("cancelling");
        }
        asked.ask(&*waking);
    })?;
    let observer: Arc<dyn Observer> = match teller {
        Some(teller) => teller,
        None => Arc::new(People { console }),
    };
    Ok(Surroundings { runtime, observer, cancel })
}

/// Tells people, on standard error.
struct People {
    console: Console,
}

impl Observer for People {
    fn event(&self, event: Event) {
        if let Some(text) = crate::words::event(&event) {
            self.console.note(&text);
        }
    }
}
