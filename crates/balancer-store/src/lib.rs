//! The stores that keep the ledgers of jobs: in memory, or in Redis.
//!
//! [`Ledger`] is the interface of both. [`MemoryLedger`] keeps [`JobLedger`]s under a lock, for one process.
//! [`RedisLedger`] keeps the same in Redis, for any number of processes: every change is one atomic script. Both do
//! what [`JobLedger`] does. The feature `contract` has the tests for that, for any other store too.
//!
//! ```
//! use balancer_core::{JobRef, PlaceOutcome, PlaceRequest, Policy, PolicyOverrides, SpotRatio};
//! use balancer_store::{Ledger, MemoryLedger};
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), balancer_store::StoreError> {
//! let ledger = MemoryLedger::new(std::time::Duration::from_secs(86_400));
//! let job = JobRef { namespace: "etl", app_id: "spark-1" };
//! ledger.learn(job, Policy { spot_ratio: SpotRatio::ONE, ..Policy::default() }, Some("driver"), true).await?;
//! let overrides = PolicyOverrides::default();
//! let request = PlaceRequest { key: "exec-1", required: None, overrides, policy: None, may_create: true, driver: None };
//! assert!(matches!(ledger.place(job, &request).await?, PlaceOutcome::Placed(_)));
//! # Ok(())
//! # }
//! ```
//!
//! [`JobLedger`]: balancer_core::JobLedger
#![deny(missing_docs)]

mod coalesce_wakeups;
#[cfg(feature = "contract")]
pub mod contract;
mod error;
mod ledger;
mod memory;
mod redis;

pub use self::coalesce_wakeups::coalesce_wakeups;
pub use self::error::StoreError;
pub use self::ledger::{Cursor, EntryPage, JobPage, JobRecord, Ledger};
pub use self::memory::MemoryLedger;
pub use self::redis::{
    AwsIam, AwsService, ConnectError, InvalidRedisUrl, RedisLedger, RedisMode, RedisOptions, RedisPassword,
};
