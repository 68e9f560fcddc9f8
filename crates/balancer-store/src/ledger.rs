//! What every store does for the admission and for the reconciler.

use std::future::Future;
use std::time::Duration;

use balancer_core::{Capacity, Drift, JobId, JobLedger, LiveExecutor, Outcome, Placing, Policy};

use crate::StoreError;

/// The ledgers of all jobs.
///
/// Each call does to one job's ledger what the [`JobLedger`] method of the same name does, atomically,
/// on the store's own clock. A job's ledger is dropped some time (the store's TTL) after its last
/// touch; every call touches it but [`peek`](Self::peek) and [`show`](Self::show).
///
/// A call that failed may still have happened. All of them may be repeated: placing twice is placing
/// once, and releasing twice is releasing once.
pub trait Ledger: Send + Sync + 'static {
    /// Decides and enters an executor. See [`JobLedger::place`].
    fn place(&self, job: JobId<'_>, placing: &Placing<'_>) -> impl Future<Output = Result<Outcome, StoreError>> + Send;

    /// What [`place`](Self::place) would answer, with nothing written and no life prolonged: for a dry
    /// run. See [`JobLedger::peek`].
    fn peek(&self, job: JobId<'_>, placing: &Placing<'_>) -> impl Future<Output = Result<Outcome, StoreError>> + Send;

    /// Strikes an executor; answers what it counted as. See [`JobLedger::release`].
    fn release(
        &self,
        job: JobId<'_>,
        executor: &str,
        uid: Option<&str>,
    ) -> impl Future<Output = Result<Option<Capacity>, StoreError>> + Send;

    /// Notes the job's policy; the newest wins. See [`JobLedger::learn`].
    fn learn(&self, job: JobId<'_>, policy: Policy) -> impl Future<Output = Result<(), StoreError>> + Send;

    /// Makes the ledger what the cluster says; answers what was wrong. See [`JobLedger::reconcile`].
    fn reconcile(
        &self,
        job: JobId<'_>,
        live: &[LiveExecutor<'_>],
        policy: Option<Policy>,
        grace: Duration,
    ) -> impl Future<Output = Result<Drift, StoreError>> + Send;

    /// What the ledger holds, for people and tests; `None` for a job with neither policy nor executors.
    fn show(&self, job: JobId<'_>) -> impl Future<Output = Result<Option<JobLedger>, StoreError>> + Send;
}
