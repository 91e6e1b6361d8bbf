//! Just enough of Rust's lexical structure to tell code from comments and literals.

/// What a character belongs to.
#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Code,
    LineComment,
    /// How deep: they nest.
    BlockComment(u32),
    Text,
    /// With this many `#` around it.
    RawText(usize),
}

/// `source` with comments and the insides of literals replaced by spaces; line breaks stay.
pub(crate) fn code_only(source: &str) -> String {
    let characters: Vec<char> = source.chars().collect();
    let mut out = String::with_capacity(source.len());
    let mut state = State::Code;
    let mut at = 0;
    while let Some(&c) = characters.get(at) {
        let next = characters.get(at + 1).copied();
        let (taken, new_state) = match state {
            State::Code => in_code(&characters, at),
            State::LineComment => (1, if c == '\n' { State::Code } else { state }),
            State::BlockComment(depth) => match (c, next) {
                ('*', Some('/')) if depth == 1 => (2, State::Code),
                ('*', Some('/')) => (2, State::BlockComment(depth - 1)),
                ('/', Some('*')) => (2, State::BlockComment(depth + 1)),
                _ => (1, state),
            },
            State::Text => match c {
                '\\' => (2, state),
                '"' => (1, State::Code),
                _ => (1, state),
            },
            State::RawText(hashes) => {
                let closed = c == '"' && (1..=hashes).all(|i| characters.get(at + i) == Some(&'#'));
                if closed { (1 + hashes, State::Code) } else { (1, state) }
            }
        };
        let visible = state == State::Code && new_state == State::Code && taken == 1;
        for &c in characters.iter().skip(at).take(taken) {
            out.push(if visible || c == '\n' { c } else { ' ' });
        }
        at += taken;
        state = new_state;
    }
    out
}

/// How many characters the piece of code at `at` takes, and what follows it.
fn in_code(characters: &[char], at: usize) -> (usize, State) {
    let get = |i: usize| characters.get(at + i).copied();
    match (get(0), get(1)) {
        (Some('/'), Some('/')) => (2, State::LineComment),
        (Some('/'), Some('*')) => (2, State::BlockComment(1)),
        (Some('"'), _) => (1, State::Text),
        (Some('r'), Some('"' | '#')) if !part_of_a_word(characters, at) => {
            let hashes = characters.iter().skip(at + 1).take_while(|&&c| c == '#').count();
            if get(1 + hashes) == Some('"') { (2 + hashes, State::RawText(hashes)) } else { (1, State::Code) }
        }
        // A character literal; a lifetime has no closing quote there.
        (Some('\''), Some('\\')) => {
            let close = characters.iter().skip(at + 3).take_while(|&&c| c != '\'').count();
            (4 + close, State::Code)
        }
        (Some('\''), Some(_)) if get(2) == Some('\'') => (3, State::Code),
        _ => (1, State::Code),
    }
}

/// Whether the `r` at `at` ends an identifier instead of opening a raw literal (`br"` opens one).
fn part_of_a_word(characters: &[char], at: usize) -> bool {
    let before = |n: usize| at.checked_sub(n).and_then(|i| characters.get(i));
    let word = |c: Option<&char>| c.is_some_and(|c| c.is_alphanumeric() || *c == '_');
    let byte_literal = before(1) == Some(&'b') && !word(before(2));
    word(before(1)) && !byte_literal
}

#[cfg(test)]
mod tests {
    use super::code_only;

    #[test]
    fn comments_and_literals_vanish_and_code_stays() {
        for (source, words) in [
            ("a // unsafe\nb", "a b"),
            ("a /* x /* unsafe */ y */ b", "a b"),
            ("f(\"unsafe \\\" more\") g", "f( ) g"),
            ("f(r#\"un\"safe\"#) g", "f( ) g"),
            ("f(br\"unsafe\") g", "f(b ) g"),
            ("let c = '\"'; unsafe", "let c = ; unsafe"),
            ("let c = '\\''; x", "let c = ; x"),
            ("fn f<'a>(x: &'a str)", "fn f<'a>(x: &'a str)"),
            ("for\"x\"", "for"),
        ] {
            let found = code_only(source);
            assert_eq!(found.len(), source.len(), "{source}: columns stay");
            assert_eq!(found.split_whitespace().collect::<Vec<_>>().join(" "), words, "{source}");
        }
    }
}
