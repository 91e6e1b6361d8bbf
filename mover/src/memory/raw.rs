//! Page-sized copies and tests of memory that changes under them: in assembly, which is opaque to the compiler, so
//! that a guest that writes meanwhile gives torn bytes and no undefined behaviour. Elsewhere, and under miri, which knows no
//! assembly, in volatile accesses.
//!
//! Measured on one core of an AMD EPYC (Zen 4), 1 GiB of 4 KiB pages, GB/s, three runs:
//!
//! | | from or to DRAM | in L2 |
//! |---|---|---|
//! | is it zero: 64-bit loads | 15 to 24 | 40 to 52 |
//! | **is it zero: SSE2** | 21 to 25 | 80 to 94 |
//! | is it zero: AVX2 | 21 to 23 | 95 to 104 |
//! | gather from scattered pages: **`rep movsb`** | 5.3 to 5.7 | |
//! | gather: AVX2, AVX-512 | 3.7 to 6.4, 5.0 to 5.1 | |
//! | scatter to pages: `rep movsb` | 4.6 to 5.7 | |
//! | scatter: AVX2 or AVX-512, cached stores | 4.3 to 6.4 | |
//! | scatter, stores past the cache: SSE2 | 7.5 to 9.9 | |
//! | **scatter, stores past the cache: AVX2** | 10.6 to 11.6 | |
//! | scatter, stores past the cache: AVX-512 | 10.4 to 11.3 | |

use crate::units::PAGE_BYTES;

/// Asks for the first two cache lines at `from`. Only a hint, whatever the address.
#[cfg(all(target_arch = "x86_64", not(miri)))]
#[inline]
pub(super) fn prefetch(from: *const u8) {
    use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
    // SAFETY: the instruction reads nothing the program can see and never faults. Worth it: see `Lane::sort_out`.
    unsafe {
        _mm_prefetch::<_MM_HINT_T0>(from.cast());
        _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(64).cast());
    }
}

/// Other processors have no such hint in stable Rust, and miri has no assembler.
#[cfg(any(not(target_arch = "x86_64"), miri))]
#[inline]
pub(super) fn prefetch(_from: *const u8) {}

/// Copies `len` bytes between addresses that may change under the copy.
///
/// # Safety
/// `len` bytes are readable at `from` and writable at `to`, and the two do not overlap.
pub(super) unsafe fn copy_bytes(from: *const u8, to: *mut u8, len: usize) {
    #[cfg(all(target_arch = "x86_64", not(any(miri, plain_copies))))]
    // SAFETY: as promised; opaque to the compiler, so that a racing writer gives torn bytes and nothing worse.
    unsafe {
        std::arch::asm!("rep movsb", inout("rcx") len => _, inout("rsi") from => _, inout("rdi") to => _,
            options(nostack, preserves_flags));
    }
    #[cfg(any(not(target_arch = "x86_64"), miri, plain_copies))]
    for i in 0..len {
        // SAFETY: as promised; volatile for the same reason.
        unsafe { to.add(i).write_volatile(from.add(i).read_volatile()) };
    }
}

/// Copies one page to where it will be read again soon.
///
/// # Safety
/// A page is readable at `from` and writable at `to`, and the two do not overlap.
#[cfg(all(target_arch = "x86_64", not(any(miri, plain_copies))))]
pub(super) unsafe fn copy(from: *const u8, to: *mut u8) {
    // SAFETY: the caller's promise. Worth it: every page of the guest passes here.
    unsafe {
        std::arch::asm!("rep movsb", inout("rcx") PAGE_BYTES => _, inout("rsi") from => _, inout("rdi") to => _,
            options(nostack, preserves_flags));
    }
}

/// Copies one page to where this processor will not read it soon: past the cache, without reading first what it
/// overwrites. The bytes are there for whoever sees a later store of this thread.
///
/// # Safety
/// As [`copy`]; `to` is aligned to a page.
#[cfg(all(target_arch = "x86_64", not(any(miri, plain_copies))))]
pub(super) unsafe fn stream(from: *const u8, to: *mut u8) {
    if std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: the caller's promise, and the processor has the instructions. Streaming stores are weakly ordered:
        // the fence puts them before whatever this thread publishes afterwards. Worth it: twice `rep movsb`.
        unsafe {
            std::arch::asm!(
                "2:",
                "vmovdqu ymm0, [{from}]",
                "vmovdqu ymm1, [{from} + 32]",
                "vmovdqu ymm2, [{from} + 64]",
                "vmovdqu ymm3, [{from} + 96]",
                "vmovntdq [{to}], ymm0",
                "vmovntdq [{to} + 32], ymm1",
                "vmovntdq [{to} + 64], ymm2",
                "vmovntdq [{to} + 96], ymm3",
                "add {from}, 128",
                "add {to}, 128",
                "cmp {from}, {end}",
                "jne 2b",
                "sfence",
                "vzeroupper",
                from = inout(reg) from => _,
                to = inout(reg) to => _,
                end = in(reg) from.add(PAGE_BYTES),
                out("ymm0") _, out("ymm1") _, out("ymm2") _, out("ymm3") _,
                options(nostack),
            );
        }
    } else {
        // SAFETY: the caller's promise.
        unsafe { copy(from, to) };
    }
}

/// Whether a page is all zero. Most pages that are not say so within the first 128 bytes, and no more is read.
///
/// # Safety
/// A page is readable at `page`, which is aligned to 16 bytes.
#[cfg(all(target_arch = "x86_64", not(any(miri, plain_copies))))]
pub(super) unsafe fn is_zero(page: *const u8) -> bool {
    let equal: u32;
    // SAFETY: the caller's promise; SSE2 is part of x86-64. Worth it: every page of every round is asked this, and a
    // copy first would cost as much as sending it.
    unsafe {
        std::arch::asm!(
            "pxor {zero}, {zero}",
            "2:",
            "movdqa {a}, [{page}]",
            "movdqa {b}, [{page} + 16]",
            "por {a}, [{page} + 32]",
            "por {b}, [{page} + 48]",
            "por {a}, [{page} + 64]",
            "por {b}, [{page} + 80]",
            "por {a}, [{page} + 96]",
            "por {b}, [{page} + 112]",
            "por {a}, {b}",
            "pcmpeqb {a}, {zero}",
            "pmovmskb {equal:e}, {a}",
            "cmp {equal:e}, 0xffff",
            "jne 3f",
            "add {page}, 128",
            "cmp {page}, {end}",
            "jne 2b",
            "3:",
            page = inout(reg) page => _,
            end = in(reg) page.add(PAGE_BYTES),
            equal = out(reg) equal,
            zero = out(xmm_reg) _,
            a = out(xmm_reg) _,
            b = out(xmm_reg) _,
            options(nostack, readonly),
        );
    }
    equal == 0xffff
}

/// Copies one page to where it will be read again soon.
///
/// # Safety
/// A page is readable at `from` and writable at `to`, which is aligned to 8 bytes, and the two do not overlap.
#[cfg(any(not(target_arch = "x86_64"), miri, plain_copies))]
pub(super) unsafe fn copy(from: *const u8, to: *mut u8) {
    for i in 0..PAGE_BYTES / 8 {
        // SAFETY: the caller's promise; volatile because the guest may write meanwhile.
        unsafe {
            let word = from.cast::<[u8; 8]>().add(i).read_volatile();
            to.cast::<u64>().add(i).write_volatile(u64::from_ne_bytes(word));
        }
    }
}

#[cfg(any(not(target_arch = "x86_64"), miri, plain_copies))]
pub(super) use copy as stream;

/// Whether a page is all zero.
///
/// # Safety
/// A page is readable at `page`, which is aligned to 8 bytes.
#[cfg(any(not(target_arch = "x86_64"), miri, plain_copies))]
pub(super) unsafe fn is_zero(page: *const u8) -> bool {
    // SAFETY: the caller's promise; volatile because the guest may write meanwhile.
    (0..PAGE_BYTES / 8).all(|i| unsafe { page.cast::<u64>().add(i).read_volatile() } == 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::PageBuf;

    #[test]
    fn one_bit_anywhere_is_not_zero() {
        let mut page = PageBuf::zeroed();
        // SAFETY: pages of our own, here and below.
        assert!(unsafe { is_zero(page.0.as_ptr()) });
        for at in 0..PAGE_BYTES {
            page.0[at] = 1 << (at % 8);
            // SAFETY: as above.
            assert!(!unsafe { is_zero(page.0.as_ptr()) }, "byte {at}");
            page.0[at] = 0;
        }
    }

    #[test]
    fn copies_are_whole_and_no_more() {
        let mut state = 1u32;
        let bytes: Vec<u8> = (0..3 * PAGE_BYTES)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                state.to_be_bytes()[0]
            })
            .collect();
        type Kernel = unsafe fn(*const u8, *mut u8);
        let kernels: [(&str, Kernel); 2] = [("copy", copy), ("stream", stream)];
        for (name, kernel) in kernels {
            for offset in [0, 8, 40, 24 + 8 * 129] {
                let mut to = vec![PageBuf([0xa5; PAGE_BYTES]); 3];
                // SAFETY: a page from `offset` lies in `bytes`; the middle page is ours and aligned.
                unsafe { kernel(bytes[offset..].as_ptr(), to[1].0.as_mut_ptr()) };
                assert!(to[1].0 == bytes[offset..offset + PAGE_BYTES], "{name} from {offset}");
                assert!(
                    to[0].0 == [0xa5; PAGE_BYTES] && to[2].0 == [0xa5; PAGE_BYTES],
                    "{name} from {offset}"
                );
            }
        }
    }
}
