//! What the Spot Balancer binaries share, and nothing else: common arguments, telemetry, the admin
//! endpoint, shutdown, access to the cluster.
#![deny(missing_docs)]

pub mod admin;
pub mod arguments;
pub mod cluster;
pub mod k8s_names;
pub mod log;
pub mod metric_labels;
pub mod shutdown;
pub mod store;

use std::process::ExitCode;

pub use balancer_store::coalesce_wakeups;

/// How a program ends: well, or with its error and the causes of it on standard error.
pub fn exit_code(result: anyhow::Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
