//! The real parts that the tests run on, each started by the test that needs it, on its own port:
//! Redis, a Kubernetes control plane, and the release binaries as separate processes.
//!
//! `tests/install` puts the parts in place. A test names those it needs on its first line with
//! [`need!`], and is left out, or fails where that is asked for, when one is missing. Whatever a
//! test process starts ends with it, however it ends.
//!
//! ```no_run
//! use balancer_tests::{control_plane::ControlPlane, kubelet::Kubelet, need, nodes, pods};
//! use balancer_tests::{redis::RedisServer, registration::Registration};
//! use balancer_tests::webhook::{Webhook, WebhookOptions};
//!
//! # #[tokio::main(flavor = "current_thread")] async fn main() -> anyhow::Result<()> {
//! need!(Redis, ControlPlane, Scheduler, Webhook);
//! let plane = ControlPlane::shared().await?;
//! let client = plane.client()?;
//! let namespace = plane.namespace("ratio").await?;
//! nodes::ensure(&client, "spot", 2).await?;
//! let _kubelet = Kubelet::start(client.clone(), &namespace);
//!
//! let redis = RedisServer::start().await?;
//! let webhook = Webhook::start(WebhookOptions::default().redis(&redis)?.cluster(plane)).await?;
//! Registration::new(&namespace, webhook.port).apply(plane).await?;
//!
//! pods::driver("etl").annotation("workload/spot-ratio", "0.7").post(&client, &namespace).await?.pod()?;
//! let executor = pods::executor("etl", 1).post(&client, &namespace).await?;
//! assert_eq!(executor.status, 201);
//! assert!(executor.warnings.is_empty());
//! # Ok(()) }
//! ```

#![allow(clippy::indexing_slicing, reason = "JSON is read and built by index; a panic here fails a test, as it should")]

pub mod account;
pub mod address;
pub mod allocator;
pub mod balance;
pub mod browser;
pub mod certificate;
pub mod containers;
pub mod control_plane;
pub mod deployed;
pub mod end_to_end;
pub mod endpoint;
pub mod events;
pub mod figures;
pub mod frames;
pub mod gateway;
pub mod guide;
pub mod helm;
mod hosts;
pub mod kubelet;
pub mod metrics;
pub mod mounted;
pub mod node_selection;
pub mod nodes;
pub mod original;
pub mod other_webhook;
pub mod parts;
pub mod placement;
pub mod platforms;
pub mod plugin;
pub mod pods;
pub mod port;
pub mod process;
pub mod prometheus;
mod provision;
pub mod quota;
pub mod random;
pub mod raw;
pub mod reconciler;
pub mod redis;
pub mod redis_cluster;
pub mod redis_sentinel;
pub mod registration;
pub mod release;
pub mod reviews;
pub mod samples;
mod sandbox;
pub mod scenario;
pub mod scheduling;
pub mod setup;
pub mod spark_client;
mod spark_image;
pub mod spark_local;
pub mod stand_ins;
pub mod steady;
mod variables;
pub mod wait;
mod watchdog;
pub mod webhook;
