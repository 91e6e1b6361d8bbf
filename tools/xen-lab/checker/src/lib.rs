//! What a test guest's checker and the lab that made its disk agree on: content that anybody can derive again from
//! where it stands.
//!
//! A page of memory is derived from its number and its version, a block of the shared disk from its file and offset;
//! so a page that is lost, stale, doubled or in the wrong place is seen as such, by 512 words, not by a checksum that
//! moved along with it.

#![forbid(unsafe_code)]

/// Bytes in one pattern file on the shared disk.
pub const FILE_BYTES: u64 = 16 << 20;
/// Pattern files on the shared disk.
pub const FILES: u64 = 24;
/// Bytes in a page.
pub const PAGE_BYTES: usize = 4096;
/// 64-bit words in a page.
pub const PAGE_WORDS: usize = PAGE_BYTES / 8;

/// The name of pattern file number `file` in the file system's root.
#[must_use]
pub fn file_name(file: u64) -> String {
    format!("pattern-{file:02}")
}

/// Words that follow from a seed (Steele, Lea, Flood: SplitMix64).
#[derive(Debug, Clone)]
pub struct Words(u64);

impl Words {
    /// The words of page `page` in its version `version`.
    #[must_use]
    pub fn of_page(page: u64, version: u64) -> Self {
        Self(mix(page ^ mix(version.wrapping_add(0x5bd1_e995))))
    }

    /// The words of the 4 KiB block `block` of pattern file `file`.
    #[must_use]
    pub fn of_block(file: u64, block: u64) -> Self {
        Self(mix(block ^ mix(file.wrapping_add(0x9747_b28c_0000))))
    }

    /// The next word.
    pub fn next_word(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }
}

fn mix(word: u64) -> u64 {
    let word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

/// Fills `bytes`, whole blocks of pattern file `file` from block `first` on, with what stands there.
pub fn fill_blocks(file: u64, first: u64, bytes: &mut [u8]) {
    for (block, content) in (first..).zip(bytes.chunks_exact_mut(PAGE_BYTES)) {
        let mut words = Words::of_block(file, block);
        for word in content.chunks_exact_mut(8) {
            word.copy_from_slice(&words.next_word().to_le_bytes());
        }
    }
}

/// The first block of `bytes` (blocks of file `file` from `first` on) that is not as [`fill_blocks`] made it.
#[must_use]
pub fn wrong_block(file: u64, first: u64, bytes: &[u8]) -> Option<u64> {
    let mut expected = vec![0; PAGE_BYTES];
    (first..).zip(bytes.chunks_exact(PAGE_BYTES)).find_map(|(block, content)| {
        fill_blocks(file, block, &mut expected);
        (content != expected).then_some(block)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_changed_or_moved_block_is_found() {
        let mut bytes = vec![0; 4 * PAGE_BYTES];
        fill_blocks(3, 7, &mut bytes);
        assert_eq!(wrong_block(3, 7, &bytes), None);
        assert_eq!(wrong_block(3, 8, &bytes), Some(8), "another place");
        assert_eq!(wrong_block(2, 7, &bytes), Some(7), "another file");
        bytes[2 * PAGE_BYTES + 4095] ^= 1;
        assert_eq!(wrong_block(3, 7, &bytes), Some(9));
    }
}
