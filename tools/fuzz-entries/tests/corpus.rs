//! Everything the fuzzers' corpora hold, on every run: seeds, and what once found a fault.

use std::fs;
use std::path::Path;

use fuzz_entries::ENTRIES;

#[test]
fn the_corpora_hold() {
    let corpora = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus");
    let mut tried = 0_u32;
    for (name, entry) in ENTRIES {
        let files =
            fs::read_dir(corpora.join(name)).unwrap_or_else(|error| panic!("no corpus {name}: {error}"));
        let mut own = 0_u32;
        for file in files {
            let bytes = fs::read(file.unwrap().path()).unwrap();
            entry(&bytes);
            // Cut off, and with a bit changed, at places spread over it.
            for at in (0..bytes.len()).step_by(1 + bytes.len() / 64) {
                entry(&bytes[..at]);
                let mut bent = bytes.clone();
                bent[at] ^= 1 << (at % 8);
                entry(&bent);
            }
            own += 1;
        }
        assert!(own > 0, "the corpus {name} is empty");
        tried += own;
    }
    assert!(tried > 20, "{tried} files");
}

/// The index's entry knows where its sums are: on what the writer made it changes nothing.
#[test]
fn an_index_as_it_was_written_has_its_sums() {
    let seed = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus/index/small");
    let bytes = fs::read(seed).unwrap();
    assert!(fuzz_entries::with_sums(&bytes) == bytes);
}

/// Each entry is fed by a program of its own.
#[test]
fn every_entry_has_its_fuzzer() {
    let programs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/fuzz_targets");
    for (name, _) in ENTRIES {
        let text = fs::read_to_string(programs.join(format!("{name}.rs"))).unwrap();
        assert!(text.contains(&format!("fuzz_entries::{name}(")), "{text}");
    }
}
