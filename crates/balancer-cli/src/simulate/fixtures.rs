//! What the tests simulate: jobs as the command line states them.

use clap::Parser;

use super::Arguments;
use super::input::Plan;

#[derive(Debug, Parser)]
struct CommandLine {
    #[command(flatten)]
    arguments: Arguments,
}

/// The arguments of a command line, with spaces between the options.
pub(super) fn parse(options: &str) -> Result<Arguments, clap::Error> {
    let options = ["simulate"].into_iter().chain(options.split_whitespace());
    CommandLine::try_parse_from(options).map(|line| line.arguments)
}

/// A job of 100 executors and two hours with these options.
pub(super) fn job(options: &str) -> Arguments {
    parse(&format!("--executors 100 --hours 2 {options}")).expect("valid options")
}

/// What that job means.
pub(super) fn plan(options: &str) -> Plan {
    job(options).plan().expect("options that fit together")
}
