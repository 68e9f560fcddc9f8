//! Decides, per Spark job, whether an executor goes to spot or on-demand capacity.
//!
//! The crate is pure: it does no I/O, is not async and has no clock. With this crate and a ledger of its own, another
//! admission tool turns the bytes of an AdmissionReview into the bytes of its reply:
//!
//! ```
//! use balancer_core::{Conventions, PlaceOutcome, Review, Reply, JobLedger, PlaceRequest, Action, Policy};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let bytes = br#"{"apiVersion":"admission.k8s.io/v1","kind":"AdmissionReview","request":{
//!     "uid":"u1","operation":"CREATE","namespace":"etl","resource":{"group":"","version":"v1","resource":"pods"},
//!     "object":{"metadata":{"name":"job-exec-1","labels":{"spark-role":"executor","spark-app-selector":"job"},
//!                           "annotations":{"workload/spot-ratio":"0.7","workload/on-demand-base":"1"}}}}}"#;
//! let conventions = Conventions::default();
//! let review = Review::decode(bytes)?;
//! let mut reply = Reply::allow(review.uid());
//! if let Action::Place(executor) = Action::of(&review, &conventions) {
//!     let mut ledger = JobLedger::default();
//!     let mut request = PlaceRequest::of(&executor);
//!     request.policy = Some(Policy::default());
//!     if let PlaceOutcome::Placed(placed) = ledger.place(&request, 0) {
//!         reply.patch = conventions.profile().apply(executor.pod, placed.capacity, executor.placeholder, &placed.spread);
//!     }
//! }
//! assert!(String::from_utf8(reply.encode())?.contains("\"allowed\":true"));
//! # Ok(())
//! # }
//! ```
//!
//! A request goes one way: bytes → [`Review`] → [`Action`] → a ledger → [`Patch`] → [`Reply`] → bytes. See
//! `examples/embed.rs` for all of it, and `examples/simulate.rs` for how a ledger keeps the ratio of a job.
#![deny(missing_docs)]

// Settings: the conventions of a cluster.
mod conventions;
mod platform;

// Read: bytes -> review -> action; a pod of the cluster -> job pod.
mod action;
mod job_pod;
mod json;
pub mod k8s_names;
mod pod;
mod review;
mod text;

// Decide: counts and policy -> capacity; the ledger of a job.
mod capacity;
mod decide;
mod ledger;
mod policy;
mod pools;
mod ratio;
mod steering;
mod term;

// Write: pod and capacity -> patch -> reply -> bytes.
mod patch;
mod profile;
mod reply;

#[cfg(any(test, feature = "testing"))]
pub mod testing;

pub use action::{Action, Driver, Executor, IgnoreReason, JobId, JobRef};
pub use capacity::{Capacity, Counts};
pub use conventions::{Conventions, DriverCapacity, SpotPreference, SpotPreferenceError};
pub use decide::{Ordinal, decide, decide_without_ledger};
pub use job_pod::{DriverPod, ExecutorPod, JobPod};
pub use json::JsonError;
pub use ledger::{
    Drift, Entry, JobLedger, JobState, LearnOutcome, LedgerFault, LiveExecutor, PlaceOutcome, PlaceRequest, Placed,
    ReconcileOutcome, ReconcileSummary, RemovalOutcome, Unconfirmed, Waiting,
};
pub use patch::Patch;
pub use platform::{CapacityLabels, CapacityProfile, CapacityProfileError, LabelValues, Toleration};
pub use pod::{Metadata, OwnerReference, Pod};
pub use policy::{
    DecodePolicyError, InvalidField, InvalidValue, MaxPoolShareError, Policy, PolicyField, PolicyOverrides,
    WholeNumberError,
};
pub use pools::{Pool, Shares};
pub use profile::{NodeRequirements, Profile};
pub use ratio::{Ratio, RatioError, SpotRatio, SpotRatioError};
pub use reply::Reply;
pub use review::{Operation, Request, Review, ReviewError};
pub use steering::{SpotAnswer, SpotState, Spread, Steer, SteerOutcome, Steering};
pub use term::{Millis, Term, millis};
pub use text::Text;
