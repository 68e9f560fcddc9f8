//! The Spot Balancer webhook.

use std::process::ExitCode;

use balancer_runtime::ended;
use balancer_webhook::{Arguments, run};
use clap::Parser;

#[tokio::main]
async fn main() -> ExitCode {
    ended(run(Arguments::parse()).await)
}
