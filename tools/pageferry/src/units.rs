//! Sizes as people write them, and as they like to read them: `512M`, `2G`, powers of 1024.

use mover::units::{f64_of, u64_of_f64};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const TIB: u64 = 1 << 40;

/// A number of bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Size(pub(crate) u64);

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
