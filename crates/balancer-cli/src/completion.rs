//! What may follow on a command line, in the form in which kubectl asks plugins for it.

use std::ffi::OsString;
use std::io::{self, Write};

use clap::Command;
use clap_complete::engine::complete;

/// The shell adds no names of files. By the protocol of Cobra, as the other one.
const NO_FILES: u8 = 4;
/// The shell adds no space, because a path goes on.
const NO_SPACE: u8 = 2;

/// Writes a line for each word that may stand in place of the last one, and then the directive for the shell.
pub(crate) fn write(out: &mut impl Write, mut command: Command, words: &[String]) -> io::Result<()> {
    let (last, before) = words.split_last().map_or(("", &[][..]), |(last, before)| (last.as_str(), before));
    let program = command.get_name().to_owned();
    let words: Vec<OsString> = [&program].into_iter().chain(before).map(OsString::from).chain([last.into()]).collect();
    let at = words.len() - 1;
    let found = complete(&mut command, words, at, std::env::current_dir().ok().as_deref())?;
    for candidate in &found {
        let help = candidate.get_help().map(ToString::to_string).unwrap_or_default();
        let help = help.lines().next().unwrap_or_default();
        writeln!(out, "{}\t{help}", candidate.get_value().display())?;
    }
    let is_folder = found.iter().any(|candidate| candidate.get_value().to_string_lossy().ends_with('/'));
    let directive = if is_folder { NO_FILES | NO_SPACE } else { NO_FILES };
    writeln!(out, ":{directive}")
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    /// The words that may follow, and the directive.
    fn complete(words: &str) -> (Vec<String>, String) {
        let words: Vec<String> = words.split(' ').map(str::to_owned).collect();
        let mut out = Vec::new();
        write(&mut out, crate::Arguments::command(), &words).expect("written");
        let text = String::from_utf8(out).expect("text");
        let mut lines: Vec<String> =
            text.lines().map(|line| line.split('\t').next().unwrap_or_default().to_owned()).collect();
        let directive = lines.pop().expect("a directive");
        (lines, directive)
    }

    #[test]
    fn commands_options_and_values_are_completed() {
        assert_eq!(complete("st"), (vec!["status".to_owned()], ":4".to_owned()));
        assert_eq!(complete("-n etl ex").0, ["explain"]);
        assert_eq!(complete("status --all").0, ["--all-namespaces"]);
        assert_eq!(complete("status -o ").0, ["table", "wide", "json"]);
        assert_eq!(complete("status --output w").0, ["wide"]);
        assert_eq!(complete("completions z").0, ["zsh"]);
        let all = complete("").0;
        assert!(all.contains(&"simulate".to_owned()) && !all.contains(&"__complete".to_owned()), "{all:?}");
    }

    #[test]
    fn a_path_is_completed_and_no_file_stands_for_a_name() {
        assert_eq!(complete("status --kubeconfig ./sr"), (vec!["./src/".to_owned()], ":6".to_owned()));
        assert_eq!(complete("status -n s"), (vec![], ":4".to_owned()));
    }
}
