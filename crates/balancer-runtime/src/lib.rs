//! The code that the Spot Balancer binaries share: common settings, logs, metrics, the admin endpoint, shutdown, and access
//! to the store and the cluster.

pub mod admin;
pub mod admission_probe;
pub mod arguments;
pub mod cluster;
pub mod connections;
pub mod http_port;
pub mod log;
pub mod metric_labels;
pub mod shutdown;
pub mod store;
pub mod tasks;
pub mod text;

use std::process::ExitCode;

pub use balancer_core::k8s_names;
pub use balancer_store::coalesce_wakeups;

/// The exit code of a program. Prints an error with its causes to standard error.
pub fn exit_code(result: anyhow::Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
