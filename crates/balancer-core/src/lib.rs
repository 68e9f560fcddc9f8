//! Decides, per Spark job, whether an executor goes to spot or on-demand capacity.
//!
//! Pure: no I/O, no async, no clock. An embedding tool goes from the bytes of an AdmissionReview to
//! the bytes of its reply with this crate and a ledger of its own:
//!
//! ```
//! use balancer_core::{Conventions, Outcome, Review, Reply, JobLedger, Placing, Subject, Work, Defaults};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let bytes = br#"{"apiVersion":"admission.k8s.io/v1","kind":"AdmissionReview","request":{
//!     "uid":"u1","operation":"CREATE","namespace":"etl","resource":{"group":"","version":"v1","resource":"pods"},
//!     "object":{"metadata":{"name":"job-exec-1","labels":{"spark-role":"executor","spark-app-selector":"job"},
//!                           "annotations":{"workload/spot-ratio":"0.7","workload/on-demand-base":"1"}}}}}"#;
//! let conventions = Conventions::default();
//! let review = Review::decode(bytes)?;
//! let mut reply = Reply::allow(review.uid());
//! if let Work::Place(executor) = Subject::of(&review, &conventions).work {
//!     let mut ledger = JobLedger::default();
//!     let mut placing = Placing::of(&executor);
//!     placing.policy = Some(Defaults::default().policy());
//!     if let Outcome::Placed(placed) = ledger.place(&placing, 0) {
//!         reply.patch = conventions.patch(&executor, placed.capacity);
//!     }
//! }
//! assert!(String::from_utf8(reply.encode())?.contains("\"allowed\":true"));
//! # Ok(())
//! # }
//! ```
//!
//! The way of a request: bytes → [`Review`] → [`Subject`] (job, role, policy) → a ledger → [`Patch`]
//! → [`Reply`] → bytes. `examples/embed.rs` walks it whole; `examples/simulate.rs` plays a job's life.
#![deny(missing_docs)]

mod capacity;
mod container;
mod conventions;
mod decide;
mod ledger;
mod patch;
mod pin;
mod pod;
mod policy;
mod ratio;
mod reply;
mod review;
mod sighting;
mod skim;
mod subject;
mod text;

pub use capacity::{Capacity, Counts};
pub use conventions::{Conventions, Preference, PreferenceError};
pub use decide::{Ordinal, decide, decide_without_ledger};
pub use ledger::{
    Drift, Entry, JobLedger, LiveExecutor, Mended, Millis, Observation, Outcome, Placed, Placing, Reconciled, Standing,
    Term,
};
pub use patch::Patch;
pub use pod::{Affinity, Metadata, Pairs, Pod, PodSpec, PodStatus};
pub use policy::{BaseError, Defaults, Invalid, Policy, Stated};
pub use ratio::{Ratio, RatioError};
pub use reply::Reply;
pub use review::{Operation, Request, Review, ReviewError};
pub use sighting::{SeenDriver, SeenExecutor, Sighting};
pub use skim::SkimError;
pub use subject::{Driver, Executor, JobId, JobKey, Leave, Subject, Work};
pub use text::Text;
