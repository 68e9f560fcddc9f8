//! The Spot Balancer webhook.

use std::process::ExitCode;

use balancer_runtime::exit_code;
use balancer_webhook::{Arguments, run};
use clap::Parser;

#[tokio::main]
async fn main() -> ExitCode {
    exit_code(run(Arguments::parse()).await)
}
