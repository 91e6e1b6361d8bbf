//! Text that fits the screen.

use std::io;

use rustix::termios::tcgetwinsize;

/// Columns where nobody says how many there are.
const WIDTH_DEFAULT: usize = 100;
/// Longer lines are hard to read.
const WIDTH_MAX: usize = 120;

/// Columns to use on standard output.
pub(crate) fn width() -> usize {
    let columns = tcgetwinsize(io::stdout()).map_or(0, |size| usize::from(size.ws_col));
    let columns = if columns == 0 { WIDTH_DEFAULT } else { columns };
    columns.clamp(40, WIDTH_MAX)
}

/// `lead` and `text` behind it, broken at spaces to `width` columns, further lines indented by `indent`; ends with a
/// line break.
pub(crate) fn hanging(lead: &str, indent: usize, text: &str, width: usize) -> String {
    let mut out = lead.to_owned();
    let mut column = lead.chars().count();
    let mut fresh = true;
    for word in text.split_whitespace() {
        let length = word.chars().count();
        if !fresh && column + 1 + length > width {
            out.push('\n');
            out.push_str(&" ".repeat(indent));
            column = indent;
        } else if !fresh {
            out.push(' ');
            column += 1;
        }
        out.push_str(word);
        column += length;
        fresh = false;
    }
    out.push('\n');
    out
}

#[cfg(test)]
mod tests {
    use super::hanging;

    #[test]
    fn lines_break_at_spaces_and_hang() {
        assert_eq!(hanging("- ", 2, "aaa bbb ccc", 9), "- aaa bbb\n  ccc\n");
        assert_eq!(hanging("- ", 2, "aaaaaaaaaaaa b", 9), "- aaaaaaaaaaaa\n  b\n");
        assert_eq!(hanging("- ", 2, "", 9), "- \n");
    }
}
