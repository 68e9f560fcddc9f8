//! The kubectl plugin `kubectl spot-balancer`.

use std::process::ExitCode;

use balancer_cli::{Arguments, run};
use clap::Parser;

fn main() -> ExitCode {
    run(Arguments::parse())
}
