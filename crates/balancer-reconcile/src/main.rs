//! The Spot Balancer reconciler.

use std::process::ExitCode;

use balancer_reconcile::{Arguments, run};
use balancer_runtime::exit_code;
use clap::Parser;

#[tokio::main]
async fn main() -> ExitCode {
    exit_code(run(Arguments::parse()).await)
}
