//! Sizes, rates and durations as people write them, and as they like to read them.
//!
//! Sizes follow the habits of hypervisors: `512M`, `2G`, powers of 1024. Rates follow those of `tc` and of disks:
//! `1gbit` is decimal and in bits, `100MiB/s` in bytes. Bytes a second are kept.

use std::time::Duration;

use mover::units::{f64_of, u64_of_f64};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const TIB: u64 = 1 << 40;

/// A number of bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Size(pub(crate) u64);

/// Bytes a second.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Rate(pub(crate) u64);

/// The number a text begins with, and the rest in lower case.
fn split(text: &str) -> Result<(f64, String), String> {
    let text = text.trim();
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (digits, unit) = text.split_at(end);
    let number = digits.parse::<f64>().map_err(|_| format!("`{text}` does not begin with a number"))?;
    Ok((number, unit.trim().to_ascii_lowercase()))
}

/// `number` of `unit` as a whole number of bytes that a disk or a memory can have.
fn whole(number: f64, unit: f64, text: &str) -> Result<u64, String> {
    let bytes = number * unit;
    if !(1.0..=f64_of(1 << 62)).contains(&bytes) {
        return Err(format!("`{text}` is out of range"));
    }
    Ok(u64_of_f64(bytes))
}

impl std::str::FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (number, unit) = split(text)?;
        let factor = match unit.as_str() {
            "" | "b" => 1,
            "k" | "kib" => KIB,
            "m" | "mib" => MIB,
            "g" | "gib" => GIB,
            "t" | "tib" => TIB,
            "kb" | "mb" | "gb" | "tb" => {
                return Err(format!("`{text}` is ambiguous: write 512M or 512MiB for powers of 1024"));
            }
            other => return Err(format!("`{other}` is no unit of size; K, M, G and T are (as in 512M, 2G)")),
        };
        whole(number, f64_of(factor), text).map(Self)
    }
}

impl std::str::FromStr for Rate {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (number, unit) = split(text)?;
        let factor = match unit.as_str() {
            "kbit" | "kbit/s" => 1e3 / 8.0,
            "mbit" | "mbit/s" => 1e6 / 8.0,
            "gbit" | "gbit/s" => 1e9 / 8.0,
            "b/s" => 1.0,
            "kb/s" => 1e3,
            "mb/s" => 1e6,
            "gb/s" => 1e9,
            "kib/s" => f64_of(KIB),
            "mib/s" => f64_of(MIB),
            "gib/s" => f64_of(GIB),
            "" => return Err(format!("`{text}` needs a unit, as in 1gbit or 100MiB/s")),
            other => {
                return Err(format!(
                    "`{other}` is no unit of rate; 1gbit, 500mbit, 100MiB/s and 100MB/s are"
                ));
            }
        };
        whole(number, factor, text).map(Self)
    }
}

/// A duration from `50ms`, `2s`, `1.5s` or `1m`.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    let (number, unit) = split(text)?;
    let seconds = match unit.as_str() {
        "ms" => number / 1e3,
        "s" => number,
        "m" | "min" => number * 60.0,
        "" => return Err(format!("`{text}` needs a unit, as in 50ms or 2s")),
        other => return Err(format!("`{other}` is no unit of time; ms, s and m are")),
    };
    // A day is more than anybody waits for anything here.
    if !(0.0..=86_400.0).contains(&seconds) {
        return Err(format!("`{text}` is out of range (at most a day)"));
    }
    Ok(Duration::from_secs_f64(seconds))
}

/// Bytes with three digits that count: "1.50 GiB", "812 MiB".
pub(crate) fn show_bytes(bytes: u64) -> String {
    let n = f64_of(bytes);
    for (factor, unit) in [(TIB, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")] {
        if bytes >= factor {
            return format!("{} {unit}", three_digits(n / f64_of(factor)));
        }
    }
    format!("{bytes} B")
}

/// A rate in bytes a second, as [`show_bytes`].
pub(crate) fn show_rate(bytes_per_second: f64) -> String {
    format!("{}/s", show_bytes(u64_of_f64(bytes_per_second)))
}

/// Milliseconds: "38.2 ms", "1.27 s", "2 min 05 s".
pub(crate) fn show_ms(ms: f64) -> String {
    if ms < 999.5 {
        format!("{} ms", three_digits(ms))
    } else if ms < 119_500.0 {
        format!("{} s", three_digits(ms / 1e3))
    } else {
        let seconds = u64_of_f64((ms / 1e3).round());
        format!("{} min {:02} s", seconds / 60, seconds % 60)
    }
}

/// A count with thin groups: "1 048 576".
pub(crate) fn show_count(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::with_capacity(digits.len() * 4 / 3);
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            out.push('\u{202f}');
        }
        out.push(digit);
    }
    out
}

fn three_digits(n: f64) -> String {
    match n {
        n if n < 9.995 => format!("{n:.2}"),
        n if n < 99.95 => format!("{n:.1}"),
        n => format!("{n:.0}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_powers_of_1024() {
        for (text, bytes) in
            [("512M", 512 * MIB), ("2G", 2 * GIB), ("1.5GiB", 3 * GIB / 2), ("4096", 4096), ("64k", 65536)]
        {
            assert_eq!(text.parse::<Size>(), Ok(Size(bytes)), "{text}");
        }
        for text in ["", "G", "2X", "-1G", "0", "1..5G", "99999999999999T", "2 GB", "NaN", "inf"] {
            assert!(text.parse::<Size>().is_err(), "{text}");
        }
    }

    #[test]
    fn rates_know_bits_from_bytes() {
        for (text, bytes) in [
            ("1gbit", 125_000_000),
            ("1Gbit/s", 125_000_000),
            ("100MiB/s", 100 * MIB),
            ("100MB/s", 100_000_000),
            ("2.5gbit", 312_500_000),
        ] {
            assert_eq!(text.parse::<Rate>(), Ok(Rate(bytes)), "{text}");
        }
        for text in ["1", "1gbps", "fast", "0gbit", "1G"] {
            assert!(text.parse::<Rate>().is_err(), "{text}");
        }
    }

    #[test]
    fn durations_need_a_unit() {
        assert_eq!(duration("50ms"), Ok(Duration::from_millis(50)));
        assert_eq!(duration("1.5s"), Ok(Duration::from_millis(1500)));
        assert_eq!(duration("2m"), Ok(Duration::from_secs(120)));
        for text in ["50", "5h", "-1s", "9999999m"] {
            assert!(duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn what_is_shown_has_three_digits() {
        assert_eq!(show_bytes(1536 * MIB), "1.50 GiB");
        assert_eq!(show_bytes(812 * MIB), "812 MiB");
        assert_eq!(show_bytes(17), "17 B");
        assert_eq!(show_ms(38.25), "38.2 ms");
        assert_eq!(show_ms(9.996), "10.0 ms");
        assert_eq!(show_ms(1270.0), "1.27 s");
        assert_eq!(show_ms(125_000.0), "2 min 05 s");
        assert_eq!(show_count(1_048_576), "1\u{202f}048\u{202f}576");
        assert_eq!(show_count(12), "12");
    }
}
