//! The Spot Balancer reconciler.

use std::process::ExitCode;

use balancer_reconcile::{Arguments, run};
use balancer_runtime::ended;
use clap::Parser;

#[tokio::main]
async fn main() -> ExitCode {
    ended(run(Arguments::parse()).await)
}
