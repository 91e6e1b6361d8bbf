//! The start info page of a PV guest that is resumed: where it finds what is new here.
#![forbid(unsafe_code)]

use crate::abi::{ForeignWindow, StartInfo};
use crate::domain::{DomainError, Frames, Wiring};

/// The 64-bit word that holds the 32-bit field at byte `at`, with the field replaced.
fn with_half(word: u64, at: usize, value: u32) -> u64 {
    let value = u64::from(value);
    if at.is_multiple_of(8) { word & !0xffff_ffff | value } else { word & 0xffff_ffff | value << 32 }
}

/// Rewrites the page in the first page of `window`. `to_machine` translates a frame of the guest's. Returns the
/// machine frames of the store and the console.
pub(super) fn rewrite(
    window: &mut ForeignWindow,
    pages: u64,
    shared_info_frame: u64,
    wiring: &Wiring,
    to_machine: impl Fn(u64, &str) -> Result<u64, DomainError>,
) -> Result<Frames, DomainError> {
    let read = |window: &ForeignWindow, at: usize| window.word(at / 8).unwrap_or(0);
    let store = to_machine(read(window, StartInfo::STORE_FRAME), "xenstore")?;
    let console = to_machine(read(window, StartInfo::CONSOLE_FRAME), "the console")?;
    for (at, value) in [
        (StartInfo::NR_PAGES, pages),
        (StartInfo::SHARED_INFO, shared_info_frame << 12),
        (StartInfo::STORE_FRAME, store),
        (StartInfo::CONSOLE_FRAME, console),
    ] {
        window.set_word(at / 8, value);
    }
    for (at, value) in [
        (StartInfo::FLAGS, 0),
        (StartInfo::STORE_PORT, wiring.store_port),
        (StartInfo::CONSOLE_PORT, wiring.console_port),
    ] {
        let word = with_half(read(window, at), at, value);
        window.set_word(at / 8, word);
    }
    Ok(Frames { store, console })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_half_word_leaves_the_other_half() {
        assert_eq!(with_half(0x1111_1111_2222_2222, 64, 7), 0x1111_1111_0000_0007);
        assert_eq!(with_half(0x1111_1111_2222_2222, 68, 7), 0x0000_0007_2222_2222);
    }
}
