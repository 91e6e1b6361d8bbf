//! Prometheus' text format, version 0.0.4: families of samples, each with its help and its type before it.

use std::fmt::Write as _;

/// What a family's values are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Kind {
    /// Only grows.
    Counter,
    /// Goes up and down.
    Gauge,
}

/// A text under way. A family without a sample leaves nothing in it.
#[derive(Default)]
pub(super) struct Text {
    out: String,
    name: String,
    head: String,
}

impl Text {
    /// What follows belongs to this family.
    pub(super) fn family(&mut self, name: &str, kind: Kind, help: &str) {
        debug_assert_eq!(kind == Kind::Counter, name.ends_with("_total"), "{name}");
        let kind = match kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
        };
        name.clone_into(&mut self.name);
        let help = help.replace('\\', "\\\\").replace('\n', "\\n");
        self.head = format!("# HELP {name} {help}\n# TYPE {name} {kind}\n");
    }

    /// One with these labels.
    pub(super) fn sample(&mut self, labels: &[(&str, &str)], value: f64) {
        self.out.push_str(&std::mem::take(&mut self.head));
        self.out.push_str(&self.name);
        for (at, (label, text)) in labels.iter().enumerate() {
            let text = text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
            let before = if at == 0 { '{' } else { ',' };
            // Writing into a string does not fail.
            let _ = write!(self.out, "{before}{label}=\"{text}\"");
        }
        let end = if labels.is_empty() { "" } else { "}" };
        let _ = writeln!(self.out, "{end} {value}");
    }

    /// The whole.
    pub(super) fn into_string(self) -> String {
        self.out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_labels_say_is_escaped_and_empty_families_are_left_out() {
        let mut text = Text::default();
        text.family("a_total", Kind::Counter, "none");
        text.family("b", Kind::Gauge, "a\nb\\");
        text.sample(&[("x", "a\"b\\c\nd"), ("y", "")], 1.5);
        text.sample(&[], f64::NAN);
        let wanted = "# HELP b a\\nb\\\\\n# TYPE b gauge\nb{x=\"a\\\"b\\\\c\\nd\",y=\"\"} 1.5\nb NaN\n";
        assert_eq!(text.into_string(), wanted);
    }
}
