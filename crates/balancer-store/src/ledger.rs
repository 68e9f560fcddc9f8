//! The interface of every store: what the admission and the reconciler call.

use std::future::Future;
use std::time::Duration;

use balancer_core::{
    Capacity, Counts, Entry, JobId, JobLedger, JobRef, JobState, LearnOutcome, PlaceOutcome, PlaceRequest, Policy,
    ReconcileOutcome, RemovalOutcome, Steer, SteerOutcome, Steering, Term, Unconfirmed,
};

use crate::StoreError;

/// Where the next page of a listing begins. Only the store that returned it can read it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cursor(String);

impl Cursor {
    /// A cursor that means `text` to its store.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// What the store passed to [`Cursor::new`].
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// A page of the jobs that have a ledger.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct JobPage {
    /// The jobs. The same job may be listed twice.
    pub jobs: Vec<JobId>,
    /// Where the next page begins; `None` after the last page.
    pub next: Option<Cursor>,
}

/// A page of the executors in a job's ledger.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EntryPage {
    /// Executors by their keys, and their entries. The same executor may be listed twice.
    pub entries: Vec<(String, Entry)>,
    /// Where the next page begins; `None` after the last page.
    pub next: Option<Cursor>,
}

/// What is stored of a job as a whole.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct JobRecord {
    /// The number of executors on each capacity.
    pub counts: Counts,
    /// The job's policy.
    pub policy: Option<Policy>,
    /// What later placements follow besides the policy.
    pub steering: Steering,
}

/// The ledgers of all jobs.
///
/// Each call does to one job's ledger what the [`JobLedger`] method of the same name does, atomically and by the
/// store's own clock. The store drops a job's ledger some time (the store's TTL) after the last call for the job.
/// [`peek`](Self::peek), [`get`](Self::get), and a [`reconcile`](Self::reconcile),
/// [`remove_unconfirmed`](Self::remove_unconfirmed) or [`steer`](Self::steer) that is superseded do not count.
///
/// Of several live drivers with one job id each has a ledger of its own. A [`place`](Self::place), [`peek`](Self::peek),
/// [`learn`](Self::learn) or [`release`](Self::release) that names a driver is for the ledger of [`JobId::of_driver`] if
/// the job's belongs to another driver ([`JobLedger::belongs_to`]), which the call then leaves as it is. Only
/// `learn` takes over a ledger without executors ([`JobLedger::learns_from`]). A job that was made by
/// [`JobId::of_driver`] for the named driver is this driver's in any case.
///
/// A call that failed may still have taken effect. All calls may be repeated: placing twice is placing once, and
/// releasing twice is releasing once.
pub trait Ledger: Send + Sync + 'static {
    /// Decides an executor's capacity and adds the executor. See [`JobLedger::place`].
    fn place(
        &self,
        job: JobRef<'_>,
        request: &PlaceRequest<'_>,
    ) -> impl Future<Output = Result<PlaceOutcome, StoreError>> + Send;

    /// Returns what [`place`](Self::place) would return, and writes nothing: for a dry run. See [`JobLedger::peek`].
    fn peek(
        &self,
        job: JobRef<'_>,
        request: &PlaceRequest<'_>,
    ) -> impl Future<Output = Result<PlaceOutcome, StoreError>> + Send;

    /// Removes an executor, and returns what it counted as. `driver` is the name of the pod that owns the executor. See
    /// [`JobLedger::release`].
    fn release(
        &self,
        job: JobRef<'_>,
        executor: &str,
        uid: Option<&str>,
        driver: Option<&str>,
    ) -> impl Future<Output = Result<Option<Capacity>, StoreError>> + Send;

    /// Stores the job's policy; the newest wins. See [`JobLedger::learn`].
    fn learn(
        &self,
        job: JobRef<'_>,
        policy: Policy,
        driver: Option<&str>,
        may_create: bool,
    ) -> impl Future<Output = Result<LearnOutcome, StoreError>> + Send;

    /// Corrects the entries of the executors that `state` names, unless the ledger was reconciled in a later term. Costs
    /// as much as there are names, however large the job is; so large a job's changes are named in parts. The counts
    /// are exact afterwards in a ledger of up to 512 entries, and else unless they were changed by something other than this
    /// trait's calls. See [`JobLedger::reconcile`].
    fn reconcile(
        &self,
        job: JobRef<'_>,
        state: &JobState<'_>,
        grace: Duration,
        term: Term,
    ) -> impl Future<Output = Result<ReconcileOutcome, StoreError>> + Send;

    /// A page of the job's entries: without a cursor the first page, else the page that [`EntryPage::next`] of the page
    /// before points to. An entry that exists during the whole listing is listed at least once. The pages are not of one
    /// moment.
    fn entries(
        &self,
        job: JobRef<'_>,
        cursor: Option<Cursor>,
    ) -> impl Future<Output = Result<EntryPage, StoreError>> + Send;

    /// Announces a listing of all entries whose result may be passed to [`correct_counts`](Self::correct_counts), unless the
    /// ledger has no entry, or was reconciled in a later term.
    fn begin_count(&self, job: JobRef<'_>, term: Term) -> impl Future<Output = Result<(), StoreError>> + Send;

    /// Replaces the job's counts by those that a listing of all entries has found, unless the ledger was reconciled in a
    /// later term, or the counts should have changed since [`begin_count`](Self::begin_count), which has to be called in the
    /// same term before the first page. Returns whether the counts are `found` now.
    fn correct_counts(
        &self,
        job: JobRef<'_>,
        found: Counts,
        term: Term,
    ) -> impl Future<Output = Result<bool, StoreError>> + Send;

    /// Removes placements whose pods do not exist. See [`JobLedger::remove_unconfirmed`].
    fn remove_unconfirmed(
        &self,
        job: JobRef<'_>,
        absent: &[Unconfirmed],
        term: Term,
    ) -> impl Future<Output = Result<RemovalOutcome, StoreError>> + Send;

    /// Changes what later placements of the job follow. See [`JobLedger::steer`].
    fn steer(
        &self,
        job: JobRef<'_>,
        steer: Steer<'_>,
        term: Term,
    ) -> impl Future<Output = Result<SteerOutcome, StoreError>> + Send;

    /// Takes some of the jobs of which executors were placed since they were taken last. It is a hint: a job may be missing
    /// after a failure, and a job in which nothing was placed may be there.
    fn take_placed(&self) -> impl Future<Output = Result<Vec<JobId>, StoreError>> + Send;

    /// The counts of the job's executors and its policy, at a cost that does not grow with the job; `None` if the store
    /// has no ledger of the job.
    fn record(&self, job: JobRef<'_>) -> impl Future<Output = Result<Option<JobRecord>, StoreError>> + Send;

    /// A page of the jobs that have a ledger: without a cursor the first page, else the page that [`JobPage::next`]
    /// of the page before points to. A job whose ledger exists during the whole listing is listed at least once.
    fn list_jobs(&self, cursor: Option<Cursor>) -> impl Future<Output = Result<JobPage, StoreError>> + Send;

    /// Stores a heartbeat, and returns the one stored before. If that is not the last one that the caller stored,
    /// the store has lost changes: it was emptied or replaced. The store may drop a heartbeat as it drops a ledger.
    fn heartbeat(&self, heartbeat: u64) -> impl Future<Output = Result<Option<u64>, StoreError>> + Send;

    /// Everything that the ledger holds, for people and tests; `None` for a job without policy and executors.
    fn get(&self, job: JobRef<'_>) -> impl Future<Output = Result<Option<JobLedger>, StoreError>> + Send;
}
