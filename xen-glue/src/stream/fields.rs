//! Integers at places in byte slices. Whoever calls has held the length against the layout.
#![forbid(unsafe_code)]

/// The `N` bytes at `at`. Asserts that they are there.
pub(crate) fn bytes_at<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[at..at + N]);
    out
}

/// Little-endian.
pub(crate) fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(bytes_at(bytes, at))
}

/// Little-endian.
pub(crate) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes_at(bytes, at))
}

/// Little-endian.
pub(crate) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes_at(bytes, at))
}

/// Zero bytes from a body of `length` bytes to the next multiple of 8.
pub(crate) fn padding(length: u32) -> u32 {
    length.wrapping_neg() % 8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn padding_reaches_the_next_multiple_of_eight() {
        for (length, zeroes) in [(0, 0), (1, 7), (7, 1), (8, 0), (9, 7), (u32::MAX, 1)] {
            assert_eq!(padding(length), zeroes, "{length}");
        }
    }
}
