//! `pageferry send` and `receive`, the two ends of a migration; `resume` and `resolve`, for when one was lost.

pub(crate) mod receive;
pub(crate) mod resolve;
pub(crate) mod resume;
pub(crate) mod send;

use std::sync::Arc;

use mover::report::{Event, Observer};
use mover::runtime::{Runtime, Threads};
use mover::source::{Cancel, Surroundings};

use crate::console::Console;
use crate::failure::Outcome;
use crate::signals;
use crate::status::Noted;
use crate::told::Teller;

/// Time and threads, where events go, and a cancel request tied to Ctrl-C; and where events are noted for
/// `pageferry status`.
pub(crate) fn surroundings(
    console: &Console,
    teller: Option<Arc<Teller>>,
) -> Outcome<(Surroundings, Arc<Noted>)> {
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
    let noted = Arc::new(Noted::new(observer));
    Ok((Surroundings { runtime, observer: noted.clone(), cancel }, noted))
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
