//! The man pages, the completions and `help`, all made from the definitions in [`crate::cli`].

use std::fs;
use std::path::Path;

use clap::{Command, CommandFactory};
use clap_complete::Shell;
use clap_mangen::Man;

use crate::cli::Cli;
use crate::console::Console;
use crate::failure::{self, Failure, OrFail, Outcome};

/// `pageferry completions`.
pub(crate) fn completions(shell: Shell, console: &Console) -> Outcome {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "pageferry", &mut script);
    console.print(&String::from_utf8_lossy(&script))
}

/// `pageferry man`.
pub(crate) fn man(directory: Option<&Path>, console: &Console) -> Outcome {
    let mut root = Cli::command();
    root.build();
    let Some(directory) = directory else {
        return console.print(&page(&root)?);
    };
    let remedy = "Choose a directory that can be written to with --dir";
    fs::create_dir_all(directory).or_fail(|| format!("cannot make {}", directory.display()), remedy)?;
    for (name, command) in pages(root, "pageferry") {
        let path = directory.join(format!("{name}.1"));
        fs::write(&path, page(&command)?).or_fail(|| format!("cannot write {}", path.display()), remedy)?;
        console.note(&format!("wrote {}", path.display()));
    }
    Ok(())
}

/// A command and all below it, each under the name of its page.
fn pages(command: Command, name: &str) -> Vec<(String, Command)> {
    let below = command.get_subcommands().cloned().collect::<Vec<_>>();
    let mut all = vec![(name.to_owned(), command.display_name(name.to_owned()))];
    for sub in below.into_iter().filter(|sub| !sub.is_hide_set()) {
        let name = format!("{name}-{}", sub.get_name());
        all.extend(pages(sub, &name));
    }
    all
}

fn page(command: &Command) -> Outcome<String> {
    let mut roff = Vec::new();
    Man::new(command.clone())
        .render(&mut roff)
        .or_fail(|| "cannot make the man page".to_owned(), "Please report it")?;
    Ok(with_exit_status(&String::from_utf8_lossy(&roff), command.get_name()))
}

/// The page with the section man(7) has for it: the list in the program's page, a word where to find it in the others.
fn with_exit_status(page: &str, name: &str) -> String {
    let (before, rest) = page.split_once(".SH EXTRA\n").unwrap_or((page, ""));
    let after = rest.find(".SH VERSION").map_or("", |at| &rest[at..]);
    let section = if name == "pageferry" {
        failure::EXIT_CODES.iter().fold(String::new(), |text, (code, meaning)| {
            format!("{text}.TP\n\\fB{code}\\fR\n{}\n", meaning.replace('-', "\\-"))
        })
    } else {
        "0 on success; what any other code means stands in \\fBpageferry\\fR(1).\n".to_owned()
    };
    format!("{before}.SH \"EXIT STATUS\"\n{section}{after}")
}

/// `pageferry help`.
pub(crate) fn help(topic: &[String], console: &Console) -> Outcome {
    if let [word] = topic
        && word == "exit-codes"
    {
        return console.print(&failure::exit_codes_text());
    }
    let mut root = Cli::command();
    root.build();
    let mut command = &mut root;
    for word in topic {
        command = command.find_subcommand_mut(word).ok_or_else(|| {
            Failure::usage(format!("there is no help on `{word}`. `pageferry help` lists the commands"))
        })?;
    }
    console.print(&command.render_long_help().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_has_a_page_with_its_name() {
        let mut root = Cli::command();
        root.build();
        let pages = pages(root, "pageferry");
        assert!(pages.iter().any(|(name, _)| name == "pageferry-completions"));
        for (name, command) in pages {
            let text = page(&command).expect("a page renders into memory");
            assert!(text.contains(&format!(".TH {name} 1")), "{name}: {}", &text[..200]);
            assert_eq!(text.matches(".SH \"EXIT STATUS\"").count(), 1, "{name}");
            assert!(!text.contains(".SH EXTRA"), "{name}");
            if name == "pageferry" {
                for (code, _) in failure::EXIT_CODES {
                    assert!(text.contains(&format!("\\fB{code}\\fR\n")), "{code}: {text}");
                }
                assert!(text.contains(".SH VERSION"), "{text}");
            }
        }
    }
}
