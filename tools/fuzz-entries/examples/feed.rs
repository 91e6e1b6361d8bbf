//! Feeds files to a decoder's entry: `feed NAME DIRECTORY...`. `cargo xtask fuzz --coverage` counts what that reaches.

#![forbid(unsafe_code)]

use std::fs;

use fuzz_entries::ENTRIES;

fn main() -> std::io::Result<()> {
    let mut arguments = std::env::args_os().skip(1);
    let name = arguments.next().unwrap_or_default();
    let Some((_, entry)) = ENTRIES.iter().find(|entry| name == entry.0) else {
        return Err(std::io::Error::other(format!("there is no decoder called {}", name.display())));
    };
    for directory in arguments {
        for file in fs::read_dir(directory)? {
            entry(&fs::read(file?.path())?);
        }
    }
    Ok(())
}
