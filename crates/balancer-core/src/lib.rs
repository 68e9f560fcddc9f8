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
//!         reply.patch = conventions.profile().apply(executor.pod, placed.capacity, executor.placeholder);
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

// Read: bytes -> review -> action; a pod of the cluster -> job pod.
mod action;
mod job_pod;
mod json;
mod pod;
mod review;
mod text;

// Decide: counts and policy -> capacity; the ledger of a job.
mod capacity;
mod decide;
mod ledger;
mod policy;
mod ratio;

// Write: pod and capacity -> patch -> reply -> bytes.
mod patch;
mod profile;
mod reply;

pub use json_patch::Patch;

pub use action::{Action, Driver, Executor, IgnoreReason, JobId, JobRef};
pub use capacity::{Capacity, Counts};
pub use conventions::{Conventions, SpotPreference, SpotPreferenceError};
pub use decide::{Ordinal, decide, decide_without_ledger};
pub use job_pod::{DriverPod, ExecutorPod, JobPod};
pub use json::JsonError;
pub use ledger::{
    Drift, Entry, JobLedger, JobState, LiveExecutor, Millis, PlaceOutcome, PlaceRequest, Placed, ReconcileOutcome,
    ReconcileSummary, Term,
};
pub use pod::{Metadata, Pod};
pub use policy::{
    DecodePolicyError, InvalidField, InvalidValue, OnDemandBaseError, Policy, PolicyField, PolicyOverrides,
};
pub use profile::Profile;
pub use ratio::{Ratio, RatioError};
pub use reply::Reply;
pub use review::{Operation, Request, Review, ReviewError};
pub use text::Text;
