//! What every store does for the admission and for the reconciler.

use std::future::Future;
use std::time::Duration;

use balancer_core::{
    Capacity, Counts, JobId, JobLedger, JobRef, JobState, PlaceOutcome, PlaceRequest, Policy, ReconcileOutcome, Term,
};

use crate::StoreError;

/// Some of the jobs that have a ledger.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct JobPage {
    /// The jobs; one may come twice.
    pub jobs: Vec<JobId>,
    /// Where the next page begins; `None` after the last.
    pub next: Option<u64>,
}

/// The ledgers of all jobs.
///
/// Each call does to one job's ledger what the [`JobLedger`] method of the same name does, atomically,
/// on the store's own clock. A job's ledger is dropped some time (the store's TTL) after its last
/// touch; every call for a job touches it but [`peek`](Self::peek), [`show`](Self::show), and a
/// [`reconcile`](Self::reconcile) that is superseded.
///
/// A call that failed may still have happened. All of them may be repeated: placing twice is placing
/// once, and releasing twice is releasing once.
pub trait Ledger: Send + Sync + 'static {
    /// Decides and enters an executor. See [`JobLedger::place`].
    fn place(
        &self,
        job: JobRef<'_>,
        request: &PlaceRequest<'_>,
    ) -> impl Future<Output = Result<PlaceOutcome, StoreError>> + Send;

    /// What [`place`](Self::place) would answer, with nothing written and no life prolonged: for a dry
    /// run. See [`JobLedger::peek`].
    fn peek(
        &self,
        job: JobRef<'_>,
        request: &PlaceRequest<'_>,
    ) -> impl Future<Output = Result<PlaceOutcome, StoreError>> + Send;

    /// Strikes an executor; answers what it counted as. See [`JobLedger::release`].
    fn release(
        &self,
        job: JobRef<'_>,
        executor: &str,
        uid: Option<&str>,
    ) -> impl Future<Output = Result<Option<Capacity>, StoreError>> + Send;

    /// Notes the job's policy; the newest wins. See [`JobLedger::learn`].
    fn learn(&self, job: JobRef<'_>, policy: Policy) -> impl Future<Output = Result<(), StoreError>> + Send;

    /// Makes the ledger what the cluster says, unless it was reconciled in a later term. See
    /// [`JobLedger::reconcile`].
    fn reconcile(
        &self,
        job: JobRef<'_>,
        seen: &JobState<'_>,
        grace: Duration,
        term: Term,
    ) -> impl Future<Output = Result<ReconcileOutcome, StoreError>> + Send;

    /// The job's executors as counted, at a cost that does not grow with the job; `None` where the
    /// store has no ledger of the job. It touches the ledger.
    fn counts(&self, job: JobRef<'_>) -> impl Future<Output = Result<Option<Counts>, StoreError>> + Send;

    /// The jobs that have a ledger, page by page: `from` is [`JobPage::next`] of the page before, 0 for
    /// the first. A job whose ledger is there all the while is told at least once.
    fn list_jobs(&self, from: u64) -> impl Future<Output = Result<JobPage, StoreError>> + Send;

    /// Notes a mark, and tells the one noted before. Where that is not the last one noted, the store has
    /// lost changes: it was emptied, or is another by now. A mark may be dropped as a ledger is.
    fn heartbeat(&self, mark: u64) -> impl Future<Output = Result<Option<u64>, StoreError>> + Send;

    /// What the ledger holds, for people and tests; `None` for a job with neither policy nor executors.
    fn get(&self, job: JobRef<'_>) -> impl Future<Output = Result<Option<JobLedger>, StoreError>> + Send;
}
