//! The kubectl plugin `kubectl spot-balancer`: it shows what every job has and why, finds what is wrong with an
//! installation, and helps to choose a ratio. It works with the caller's own kubeconfig and permissions, and needs no server
//! of ours.
//!
//! Each command is a module with its `Arguments` and its `run`; `output` is how all of them print.

mod output;
mod simulate;

use std::io::{self, ErrorKind, Write};
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};
use clap_complete::{Shell, generate};

/// What every job has and why, and which ratio to choose.
#[derive(Debug, Parser)]
#[command(name = "kubectl spot-balancer", bin_name = "kubectl spot-balancer", version)]
pub struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Print a script that completes this command in a shell
    Completions {
        /// The shell
        shell: Shell,
    },
    /// What a job costs, how long it takes and what it risks, by its spot ratio
    Simulate(Box<simulate::Arguments>),
}

/// Runs one command, and reports an error on standard error.
pub fn run(arguments: Arguments) -> ExitCode {
    let mut out = io::stdout().lock();
    match execute(arguments.command, &mut out).and_then(|()| Ok(out.flush()?)) {
        // The reader may stop before the end of the output, as `head` does.
        Err(error) if error.downcast_ref().is_some_and(|error: &io::Error| error.kind() == ErrorKind::BrokenPipe) => {
            ExitCode::SUCCESS
        }
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn execute(command: Command, out: &mut impl Write) -> anyhow::Result<()> {
    match command {
        Command::Completions { shell } => {
            // As kubectl names a plugin's program.
            generate(shell, &mut Arguments::command(), "kubectl-spot_balancer", out);
            Ok(())
        }
        Command::Simulate(arguments) => simulate::run(&arguments, out),
    }
}
