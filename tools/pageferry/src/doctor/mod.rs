//! `pageferry doctor`: what this kernel and machine offer, by trying it; what is lost without it, and how to get it.

mod disk;
mod kernel;
mod machine;
mod network;
mod safety;
mod xen;

use std::path::Path;

use mover::ExitClass;
use serde::Serialize;

use crate::console::Console;
use crate::failure::{Failure, Outcome};
use crate::layout;

/// How much of a capability is there.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum State {
    /// All of it.
    Yes,
    /// Some; the rest is worth having.
    Partly,
    /// None.
    No,
}

/// Something a migration can use.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Capability {
    /// Its name.
    pub(crate) name: &'static str,
    /// Whether it is there.
    pub(crate) state: State,
    /// What the probe saw.
    pub(crate) found: String,
    /// What is lost without it.
    pub(crate) lost: &'static str,
    /// How to get it.
    pub(crate) remedy: String,
    /// Whether no mode works without it.
    pub(crate) required: bool,
}

impl Capability {
    /// One that a migration also works without.
    fn optional(name: &'static str, lost: &'static str) -> Self {
        Self { name, state: State::No, found: String::new(), lost, remedy: String::new(), required: false }
    }
    /// One that no migration of a process works without.
    fn required(name: &'static str, lost: &'static str) -> Self {
        Self { required: true, ..Self::optional(name, lost) }
    }
    fn word(&self) -> &'static str {
        match self.state {
            State::Yes => "yes",
            State::Partly => "partly",
            State::No if self.required => "NEEDED",
            State::No => "no",
        }
    }
    fn yes(self, found: impl Into<String>) -> Self {
        Self { state: State::Yes, found: found.into(), ..self }
    }
    fn partly(self, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { state: State::Partly, found: found.into(), remedy: remedy.into(), ..self }
    }
    fn no(self, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { state: State::No, found: found.into(), remedy: remedy.into(), ..self }
    }
}

/// Probes everything and prints it; `path` is where disks are to be read from.
pub(crate) fn run(path: &Path, console: &Console) -> Outcome {
    let mut all = vec![kernel::release(), machine::processors()];
    all.extend(kernel::probes());
    all.extend(machine::probes());
    all.extend(disk::probes(path)?);
    all.extend(network::probes());
    all.extend(safety::probes());
    all.extend(xen::probes());
    if console.json {
        let text = serde_json::to_string(&all)
            .map_err(|error| Failure::new(ExitClass::Internal, error.to_string()))?;
        console.print(&text)?;
    } else {
        console.print(&table(&all, layout::width()))?;
    }
    let missing: Vec<_> = all.iter().filter(|c| c.required && c.state == State::No).map(|c| c.name).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let names = missing.join(" and ");
    let verb = if missing.len() == 1 { "is" } else { "are" };
    Err(Failure::new(
        ExitClass::Machine,
        format!("{names} {verb} missing here, and no mode works without; the list above says how to get it"),
    ))
}

/// The list for people: what is there in a line each, what is not with its price and its remedy.
fn table(all: &[Capability], width: usize) -> String {
    let name_width = all.iter().map(|c| c.name.chars().count()).max().unwrap_or(0);
    let indent = 2 + 6 + 2 + name_width + 2;
    let mut out = String::new();
    for capability in all {
        let lead = format!("  {:<6}  {:<name_width$}  ", capability.word(), capability.name);
        out.push_str(&layout::hanging(&lead, indent, &capability.found, width));
        if capability.state != State::Yes {
            let blank = " ".repeat(indent);
            let lost = format!("without it: {}", capability.lost);
            out.push_str(&layout::hanging(&blank, indent + 2, &lost, width));
            let remedy = format!("to get it: {}", capability.remedy);
            out.push_str(&layout::hanging(&blank, indent + 2, &remedy, width));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_comes_with_its_price_and_its_remedy() {
        let all = [
            Capability::optional("one", "speed").yes("fine"),
            Capability::required("another", "everything").no("not here", "buy it"),
        ];
        let text = table(&all, 80);
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.first(), Some(&"  yes     one      fine"));
        assert_eq!(lines.len(), 4, "{text}");
        assert!(text.contains("without it: everything") && text.contains("to get it: buy it"), "{text}");
        assert!(!text.contains("speed"), "{text}");
    }
}
