//! The Spot Balancer reconciler.

use std::process::ExitCode;

use balancer_reconcile::{Arguments, run};
use clap::Parser;

#[tokio::main]
async fn main() -> ExitCode {
    match run(Arguments::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
