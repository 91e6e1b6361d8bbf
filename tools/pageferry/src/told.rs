//! What `send` and `receive` tell the program that started them: JSON objects, a line each, on standard output.

use std::io::{self, Write};
use std::sync::{Mutex, OnceLock};

use mover::report::{Event, Observer, Summary};
use mover::wire::hello::MigrationId;
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

/// More than a line takes that has a token in it: the longest name of a host, a token's word, and what is around them.
const TOLD_BYTES: usize = 1024;

/// A line.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(untagged)]
pub(crate) enum Line {
    /// From the program around the engine.
    Told(Told),
    /// From the engine.
    Event(Event),
}

/// What the program around the engine tells.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub(crate) enum Told {
    /// A target waits for its source.
    Listening {
        /// Where, the port filled in.
        address: String,
        /// What the source has to show, once.
        token: Zeroizing<String>,
    },
    /// The migration has succeeded.
    Ended {
        /// The source's account of it; a target's has less in it.
        summary: Box<Summary>,
    },
}

/// A line with its migration's number.
#[derive(Serialize)]
struct Numbered<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    migration: Option<&'a str>,
    #[serde(flatten)]
    line: &'a Line,
}

/// A line's text, which is overwritten when it is dropped, for there may be a token in it.
pub(crate) fn text_of(line: &impl Serialize) -> serde_json::Result<Zeroizing<String>> {
    // As long as what has a token in it gets, and a line break: what a String leaves where it grew out of its place, nobody
    // overwrites.
    let mut bytes = Zeroizing::new(Vec::with_capacity(TOLD_BYTES));
    serde_json::to_writer(&mut *bytes, line)?;
    let text = String::from_utf8(std::mem::take(&mut *bytes)).map_err(serde::ser::Error::custom)?;
    Ok(Zeroizing::new(text))
}

/// Prints lines; one that can't be printed is lost, and with it nothing of the migration.
pub(crate) struct Teller {
    out: Mutex<io::Stdout>,
    migration: OnceLock<String>,
}

impl Teller {
    /// To standard output.
    pub(crate) fn new() -> Self {
        Self { out: Mutex::new(io::stdout()), migration: OnceLock::new() }
    }

    /// From now on every line has the migration's number, as `migration`.
    pub(crate) fn migration_is(&self, id: &MigrationId) {
        self.migration.get_or_init(|| id.to_string());
    }

    /// Prints one.
    pub(crate) fn tell(&self, line: &Line) {
        let numbered = Numbered { migration: self.migration.get().map(String::as_str), line };
        let Ok(mut text) = text_of(&numbered) else { return };
        text.push('\n');
        let mut out = self.out.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        // The reader being gone is noticed by it, not by us.
        let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
    }
}

impl Observer for Teller {
    fn event(&self, event: Event) {
        self.tell(&Line::Event(event));
    }
}

#[cfg(test)]
mod tests {
    use mover::report::{Phase, Sample};

    use super::*;

    #[test]
    fn lines_come_back_as_they_went() {
        let lines = [
            Line::Told(Told::Listening {
                address: "127.0.0.1:7700".into(),
                token: Zeroizing::new("ab".into()),
            }),
            Line::Told(Told::Ended { summary: Box::default() }),
            Line::Event(Event::Phase { at_ms: 1.5, phase: Phase::Drain }),
            Line::Event(Event::Sample(Sample { at_ms: 2.0, round: 3, ..Sample::default() })),
            Line::Event(Event::Notice { at_ms: 2.0, text: "a\nb".into() }),
        ];
        for line in lines {
            let text = serde_json::to_string(&line).expect("serialises");
            assert!(!text.contains('\n'));
            assert_eq!(serde_json::from_str::<Line>(&text).expect("parses"), line);
        }
    }
}
