//! The kubectl plugin `kubectl spot-balancer`: it shows what every job has and why, finds what is wrong with an
//! installation, and helps to choose a ratio. It works with the caller's own kubeconfig and permissions, and needs no server
//! of ours.
//!
//! Each command is a module with its `Arguments` and its `run`; `output` is how all of them print.

mod advise;
mod check;
mod cluster;
mod completion;
mod explain;
mod output;
mod proxy;
mod settings;
mod simulate;
mod snapshot;
mod status;

use std::io::{self, ErrorKind, Write};
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};
use clap_complete::{Shell, generate};

use cluster::ClusterArguments;

/// What every job has and why, and which ratio to choose.
#[derive(Debug, Parser)]
#[command(name = "kubectl spot-balancer", bin_name = "kubectl spot-balancer", version)]
pub struct Arguments {
    #[command(flatten)]
    cluster: ClusterArguments,

    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show what every job wants and has
    Status(status::Arguments),
    /// Explain why a pod runs, or waits, where it does
    Explain(explain::Arguments),
    /// Find what is wrong with the installation, and how to fix it
    Check(check::Arguments),
    /// What a job costs, how long it takes and what it risks, by its spot ratio
    Simulate(Box<simulate::Arguments>),
    /// From the size of the input, or an earlier run, to executors, memory, a ratio and settings
    Advise(advise::Arguments),
    /// Print a script that completes this command in a shell
    Completions {
        /// The shell
        shell: Shell,
    },
    /// Print what may follow these words, as kubectl asks for it
    #[command(name = "__complete", hide = true, disable_help_flag = true)]
    Complete {
        /// The words after the plugin's name; the last one is to be completed
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        words: Vec<String>,
    },
}

/// The options do not fit together, which shows only once they are read.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct UsageError(pub(crate) String);

/// The exit code after wrong usage, as clap has it.
const WRONG_USAGE: u8 = 2;

/// Runs one command, and reports an error on standard error.
pub fn run(arguments: Arguments) -> ExitCode {
    let mut out = io::stdout().lock();
    match execute(arguments, &mut out).and_then(|()| Ok(out.flush()?)) {
        // A reader such as `head` may stop before the end of the output.
        Err(error) if error.downcast_ref().is_some_and(|error: &io::Error| error.kind() == ErrorKind::BrokenPipe) => {
            ExitCode::SUCCESS
        }
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if error.is::<check::Unhealthy>() => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            if error.is::<UsageError>() { ExitCode::from(WRONG_USAGE) } else { ExitCode::FAILURE }
        }
    }
}

fn execute(Arguments { cluster, command }: Arguments, out: &mut impl Write) -> anyhow::Result<()> {
    match command {
        Command::Status(arguments) => block_on(status::run(arguments.after(cluster)?, out)),
        Command::Explain(arguments) => block_on(explain::run(arguments.after(cluster), out)),
        Command::Check(arguments) => block_on(check::run(arguments.after(cluster), out)),
        Command::Complete { words } => Ok(completion::write(out, Arguments::command(), &words)?),
        _ if cluster.is_stated() => {
            let text =
                "--namespace, --context and --kubeconfig are for status, explain and check, which read the cluster";
            Err(UsageError(text.to_owned()).into())
        }
        Command::Simulate(arguments) => simulate::run(&arguments, out),
        Command::Advise(arguments) => advise::run(&arguments, out),
        Command::Completions { shell } => {
            // As kubectl names a plugin's program.
            generate(shell, &mut Arguments::command(), "kubectl-spot_balancer", out);
            Ok(())
        }
    }
}

/// Runs what asks the cluster.
fn block_on(command: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(command)
}
