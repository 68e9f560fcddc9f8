//! What the Spot Balancer binaries share, and nothing else: common arguments, telemetry, the admin
//! endpoint, shutdown.
#![deny(missing_docs)]

pub mod admin;
pub mod arguments;
pub mod log;
pub mod shutdown;
pub mod store;
