//! Streams cut off, bent and made up: no panic, no memory beyond what has arrived, always a fault with its byte.

use std::convert::Infallible;

use super::super::scan::{ScanError, Survey, scan};
use super::super::*;
use super::samples::{self, boundaries, cases, read_all};

fn survey(bytes: &[u8]) -> Survey {
    match scan(bytes, &mut |_| Ok::<(), Infallible>(())) {
        Ok(survey) => survey,
        Err(ScanError::Stream(error)) => panic!("a slice can't fail to be read: {error}"),
    }
}

fn all() -> [Vec<u8>; 5] {
    [
        samples::hvm(2),
        samples::pv(2),
        samples::ferried(2),
        samples::frozen(GuestType::Hvm, 2),
        samples::frozen(GuestType::Pv, 2),
    ]
}

/// Cut at every record's start, within every record, and at every byte of the headers.
#[test]
fn a_stream_cut_off_anywhere_is_named_as_that() {
    for bytes in all() {
        let starts = boundaries(&bytes);
        let mut cuts: Vec<usize> = (0..starts[0] + 64).collect();
        for pair in starts.windows(2) {
            cuts.extend(
                [0, 1, 4, 7, 8, 9, 12, 16, 20, 4000, 4200].map(|step| (pair[0] + step).min(pair[1] - 1)),
            );
            cuts.extend([(pair[0] + pair[1]) / 2, pair[1] - 1]);
        }
        for cut in cuts {
            let error = read_all(&bytes[..cut]).expect_err("a cut stream was read to its end");
            assert!(matches!(error.fault, Fault::Truncated { .. } | Fault::NoEnd), "cut at {cut}: {error}");
            assert_eq!(error.offset, u64::try_from(cut).unwrap(), "{error}");
            if starts.contains(&cut) {
                assert!(matches!(error.fault, Fault::NoEnd), "cut at {cut}: {error}");
            }
            let survey = survey(&bytes[..cut]);
            assert!(!survey.complete && !survey.faults.is_empty(), "cut at {cut}");
        }
    }
}

/// Every bit outside of page contents and blobs, turned over by itself.
#[test]
fn no_bit_of_a_header_can_be_turned_unnoticed() {
    for bytes in all() {
        let starts = boundaries(&bytes);
        for &start in &starts[..starts.len() - 1] {
            for at in start..start + 8 {
                for bit in 0..8 {
                    let mut broken = bytes.clone();
                    broken[at] ^= 1 << bit;
                    let strict = read_all(&broken);
                    let lenient = survey(&broken);
                    // An unknown optional record is all that a type's bit can make of one unnoticed.
                    let optional = at == start + 3 && bit == 7 || bytes[start + 3] & 0x80 != 0;
                    // A blob may have any length, as long as its padding fits.
                    let blob = at == start + 4 && bit < 3 && !bytes[at].is_multiple_of(8);
                    assert!(strict.is_err() || optional || blob, "bit {bit} of byte {at}");
                    assert_eq!(strict.is_err(), !lenient.faults.is_empty(), "bit {bit} of byte {at}");
                }
            }
        }
    }
}

/// A deterministic source of choices.
pub(crate) struct Dice(pub(crate) u64);

impl Dice {
    /// A number under `below`.
    pub(crate) fn roll(&mut self, below: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % u64::try_from(below.max(1)).unwrap()).unwrap()
    }
}

/// Bends `bytes` once.
pub(crate) fn mutate(bytes: &mut Vec<u8>, dice: &mut Dice) {
    const VALUES: [u32; 12] =
        [0, 1, 7, 8, 16, 0x10, 0x1000, 0x7fff_ffff, 0x8000_0000, 0xffff_ffff, 128 << 20, (128 << 20) + 1];
    let starts = boundaries(bytes);
    let field = starts[dice.roll(starts.len())] + 4 * dice.roll(6);
    match dice.roll(7) {
        0 => {
            let at = dice.roll(bytes.len());
            if let Some(byte) = bytes.get_mut(at) {
                *byte ^= 1 << dice.roll(8);
            }
        }
        1 | 2 => {
            let value = VALUES[dice.roll(VALUES.len())].to_le_bytes();
            if let Some(place) = bytes.get_mut(field..field + 4) {
                place.copy_from_slice(&value);
            }
        }
        3 => bytes.truncate(dice.roll(bytes.len() + 1)),
        4 => {
            let (from, to) = (starts[dice.roll(starts.len())], starts[dice.roll(starts.len())]);
            if from < to && to <= bytes.len() {
                bytes.drain(from..to);
            }
        }
        5 => {
            let (from, to) = (starts[dice.roll(starts.len())], starts[dice.roll(starts.len())]);
            let into = starts[dice.roll(starts.len())];
            if from < to && to <= bytes.len() && into <= bytes.len() && to - from < 20_000 {
                let piece = bytes[from..to].to_vec();
                bytes.splice(into..into, piece);
            }
        }
        _ => {
            let at = dice.roll(bytes.len());
            let noise: Vec<u8> = (0..dice.roll(24)).map(|_| u8::try_from(dice.roll(256)).unwrap()).collect();
            bytes.splice(at..at, noise);
        }
    }
}

/// Most memory this process has ever had mapped, in bytes.
fn mapped_peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux has it");
    let line = status.lines().find_map(|line| line.strip_prefix("VmPeak:")).expect("a line of it");
    line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") * 1024
}

/// Thousands of bent streams. What is read strictly and what is looked through agree on whether there is a fault, and
/// nothing a stream of some kilobytes claims makes this process take the memory for it.
#[test]
fn bent_streams_neither_panic_nor_take_memory() {
    let cases = cases(6000);
    let samples = [
        samples::hvm(2),
        samples::pv(2),
        samples::hvm_with(1, false),
        samples::ferried(1),
        samples::frozen(GuestType::Hvm, 2),
        samples::frozen(GuestType::Pv, 2),
    ];
    let mut dice = Dice(0x5eed);
    let (mut broken, mut passed) = (0, 0);
    survey(&samples::xl_file(&samples[0], true));
    let before = mapped_peak();
    for case in 0..cases {
        let mut bytes = samples[case % samples.len()].clone();
        for _ in 0..=dice.roll(4) {
            mutate(&mut bytes, &mut dice);
        }
        let strict = read_all(&bytes);
        let mut lenient = survey(&bytes);
        lenient.faults.retain(|found| !found.fault.contains("behind the END"));
        assert_eq!(
            strict.is_err(),
            !lenient.faults.is_empty(),
            "case {case}: {strict:?}, {:?}",
            lenient.faults
        );
        if let Err(error) = strict {
            assert!(error.offset <= u64::try_from(bytes.len()).unwrap(), "case {case}: {error}");
            broken += 1;
        } else {
            passed += 1;
        }
        if case % 7 == 0 {
            let mut file = samples::xl_file(&bytes, true);
            let at = dice.roll(100);
            file[at] ^= 1 << dice.roll(8);
            survey(&file);
        }
    }
    let grown = mapped_peak() - before;
    assert!(grown < 64 << 20, "{} MiB more were mapped for streams of some kilobytes", grown >> 20);
    assert!(
        broken > cases / 2 && passed > cases / 100,
        "{broken} broken, {passed} right: the bending is off"
    );
}

/// Bytes without any sense, at the start and in every place where a record could begin.
#[test]
fn noise_is_read_as_faults() {
    let samples = [samples::hvm(1), samples::pv(1)];
    let mut dice = Dice(0x0dd);
    for case in 0..cases(2000) {
        let sample = &samples[case % 2];
        let starts = boundaries(sample);
        let start = [0, starts[dice.roll(starts.len())]][usize::from(case % 5 != 0)];
        let mut bytes = sample[..start.min(sample.len())].to_vec();
        bytes.extend((0..dice.roll(300)).map(|_| u8::try_from(dice.roll(256)).unwrap()));
        let (strict, mut lenient) = (read_all(&bytes), survey(&bytes));
        lenient.faults.retain(|found| !found.fault.contains("behind the END"));
        assert_eq!(strict.is_err(), !lenient.faults.is_empty(), "case {case}: {strict:?}");
        assert!(strict.is_err() || start == sample.len(), "case {case}");
    }
}

/// The largest lengths there can be, with nothing behind them. They are bodies of 16 to 64 MiB.
#[test]
fn claims_are_not_believed_before_the_bytes_are_there() {
    let (hvm, pv) = (samples::hvm(1), samples::pv(1));
    let (in_hvm, in_pv) = (&hvm[..boundaries(&hvm)[3]], &pv[..boundaries(&pv)[3]]);
    let file = samples::xl_file(&hvm, false);
    let in_libxl = &file[..file.len() - 8 - 96];
    let claims: [(&[u8], u32, u32); 10] = [
        (in_hvm, 0x5046_0003, 40 + 16 * (14 + 3 * 2048)),
        (in_hvm, 0x5046_0004, 8 + 32 * 32_768),
        (in_hvm, 0x5046_0001, 32 + 16 * (1 << 16)),
        (in_hvm, 1, 128 << 20),
        (in_hvm, 9, 16 << 20),
        (in_hvm, 0x8000_0001, 128 << 20),
        (in_hvm, 0x13, 128 << 20),
        (in_pv, 3, 8 + 8 * (1 << 23)),
        (in_libxl, 3, 64 << 20),
        (&hvm[..40], 0x11, 24 * 4096),
    ];
    survey(&hvm);
    // What was mapped at most so far may be more than what is now.
    let ballast = vec![1u8; 256 << 20];
    let before = mapped_peak();
    for (start, number, length) in claims {
        let mut bytes = start.to_vec();
        bytes.extend(number.to_le_bytes());
        bytes.extend(length.to_le_bytes());
        bytes.extend([0xff, 0x7f, 0, 0, 0, 0, 0, 0]);
        assert!(read_all(&bytes).is_err());
        assert!(!survey(&bytes).complete);
    }
    let grown = mapped_peak() - before;
    assert!(grown < 8 << 20, "{} MiB were mapped for a claim", grown >> 20);
    drop(ballast);
}
