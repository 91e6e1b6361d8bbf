//! The project's own rules, where no lint can hold them: `unsafe` in few places, files of readable length, nothing
//! left to be done.

use std::fs;

use anyhow::{Context, Result, bail};

use crate::{lexer, run};

/// Where `unsafe` may stand.
const UNSAFE_ALLOWED: [&str; 4] =
    ["mover/src/kernel", "mover/src/memory", "mover/src/ring", "xen-glue/src/abi"];
/// Longest source file.
const LINES_MAX: usize = 800;
/// Marks of unfinished work. Put together here, so that this file does not break its own rule.
const UNFINISHED: [&str; 4] =
    [concat!("TO", "DO"), concat!("FIX", "ME"), concat!("to", "do!"), concat!("X", "XX")];

/// Checks every source file git knows or would take.
pub(crate) fn run() -> Result<String> {
    let listed = run::output(run::command("git")?.args(["ls-files", "-co", "--exclude-standard"]))?;
    let root = run::root()?;
    let mut files = 0;
    let mut broken = Vec::new();
    for name in listed.lines().filter(|name| is_source(name)) {
        // Listed, but deleted in the work tree.
        let Ok(true) = root.join(name).try_exists() else { continue };
        let text = fs::read_to_string(root.join(name)).with_context(|| format!("cannot read {name}"))?;
        broken.extend(check(name, &text));
        files += 1;
    }
    if !broken.is_empty() {
        bail!("{} rules broken:\n  {}", broken.len(), broken.join("\n  "));
    }
    Ok(format!(
        "{files} source files, unsafe only where it may be, none over {LINES_MAX} lines, nothing unfinished"
    ))
}

fn is_source(name: &str) -> bool {
    [".rs", ".sh", ".py", ".c", ".h"].iter().any(|ending| name.ends_with(ending)) || name.starts_with(".ci/")
}

/// What is wrong with a file.
fn check(name: &str, text: &str) -> Vec<String> {
    let mut broken = Vec::new();
    let lines = text.lines().count();
    if lines > LINES_MAX {
        broken.push(format!("{name}: {lines} lines, at most {LINES_MAX}; split it by concern"));
    }
    for (number, line) in text.lines().enumerate() {
        for mark in UNFINISHED.iter().filter(|mark| contains_word(line, mark)) {
            broken.push(format!("{name}:{}: {mark}: finish it, or open an issue and remove it", number + 1));
        }
    }
    let may_be_unsafe = UNSAFE_ALLOWED.iter().any(|place| name.starts_with(place));
    if name.ends_with(".rs") && !may_be_unsafe {
        for (number, line) in lexer::code_only(text).lines().enumerate() {
            if contains_word(line, "unsafe") {
                broken.push(format!(
                    "{name}:{}: unsafe outside of {}",
                    number + 1,
                    UNSAFE_ALLOWED.join(", ")
                ));
            }
        }
    }
    broken
}

/// Whether `word` stands in `line` with no letter, digit or underscore before or behind it.
fn contains_word(line: &str, word: &str) -> bool {
    let inside = |c: char| c.is_alphanumeric() || c == '_';
    line.match_indices(word).any(|(at, _)| {
        let before = line.get(..at).and_then(|part| part.chars().next_back());
        let behind = line.get(at + word.len()..).and_then(|part| part.chars().next());
        !before.is_some_and(inside) && !behind.is_some_and(inside)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unsafe_is_found_in_code_only_and_by_place() {
        let code = "#![forbid(unsafe_code)]\n// unsafe\nlet x = \"unsafe\";\n";
        assert!(check("mover/src/wire/mod.rs", code).is_empty());
        let bad = format!("{code}unsafe {{ }}\n");
        assert_eq!(check("mover/src/wire/mod.rs", &bad).len(), 1);
        assert!(check("mover/src/kernel/uffd.rs", &bad).is_empty());
    }

    #[test]
    fn long_files_and_unfinished_work_are_found() {
        let long = "x\n".repeat(LINES_MAX);
        assert!(check("a.rs", &long).is_empty());
        assert_eq!(check("a.rs", &format!("{long}x\n")).len(), 1);
        for mark in UNFINISHED {
            assert_eq!(check("a.rs", &format!("// {mark} later\n")).len(), 1, "{mark}");
        }
        assert!(check("a.rs", "// METHODOLOGY\n").is_empty());
    }
}
