//! Reconciles the ledgers of some jobs, or of all.

use std::sync::Arc;
use std::time::Duration;

use balancer_core::{Counts, Drift, JobId, ReconcileOutcome, ReconcileSummary};
use balancer_store::{Ledger, StoreError};
use futures::{StreamExt, stream};
use tokio::sync::Semaphore;
use tokio::time::Instant;

use crate::metrics::JobOutcome;
use crate::resync::Resync;
use crate::state::{Parts, Progress, Reconciler, State};
use crate::store_check::HEARTBEAT_INTERVAL;

/// Jobs that are reconciled before events are received again.
pub(crate) const BATCH: usize = 64;
/// Jobs that are reconciled at once. The store handles one after the other, and admissions wait in the same queue.
const CONCURRENCY: u32 = 8;
/// A job with so many executors counts as two jobs, one with twice as many as three.
const LARGE: u32 = 500;
/// A job whose ledger could not be reconciled is retried after this time.
const RETRY_AFTER: Duration = Duration::from_secs(2);
/// A placement is checked a little later than its grace ends, because the store has another clock.
const AFTER_THE_GRACE: Duration = Duration::from_millis(100);

/// A job, and when the first of its changes came; `None` if it did not change.
type Due = (Arc<JobId>, Option<Instant>);

/// The attempt to reconcile one job's ledger.
struct Attempt {
    job: Arc<JobId>,
    changed_at: Option<Instant>,
    /// `None` if another process leads.
    answer: Option<Result<ReconcileOutcome, StoreError>>,
}

/// Whether more jobs may be reconciled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    Continue,
    /// Only if the store is up.
    CheckStore,
    /// Another process leads.
    Stop,
}

impl<L: Ledger> State<'_, L> {
    /// Makes the ledgers of these jobs equal to the index. Returns whether more jobs may be reconciled.
    pub(crate) async fn reconcile_batch(&mut self, jobs: Vec<Due>) -> bool {
        let Reconciler { parts: Parts { ledger, settings, .. }, leadership, .. } = self.reconciler;
        let (synced, unsynced): (Vec<_>, Vec<_>) =
            jobs.into_iter().partition(|(job, _)| self.sync.is_synced(&job.namespace));
        for (job, changed_at) in unsynced {
            self.queue.requeue(job, changed_at, Instant::now() + HEARTBEAT_INTERVAL);
        }
        let (index, permits) = (&self.index, &Semaphore::new(CONCURRENCY as usize));
        let attempts: Vec<Attempt> = stream::iter(synced)
            .map(|(job, changed_at)| async move {
                let desired = index.desired(&job);
                // The semaphore is never closed. A large job takes several permits.
                let _permits = permits.acquire_many(CONCURRENCY.min(1 + desired.executors() / LARGE)).await;
                // Checked for each job, because the process may have been stopped in between.
                let answer = match leadership.term() {
                    Some(term) => {
                        Some(ledger.reconcile(job.as_job_ref(), &desired.job_state(), settings.grace, term).await)
                    }
                    None => None,
                };
                Attempt { job, changed_at, answer }
            })
            .buffer_unordered(CONCURRENCY as usize)
            .collect()
            .await;
        let nexts: Vec<Next> = attempts.into_iter().map(|attempt| self.record(attempt)).collect();
        if nexts.contains(&Next::Stop) {
            return false;
        }
        // The ledger of one job may be invalid. That is no reason to give up the others.
        !nexts.contains(&Next::CheckStore) || self.is_store_up().await
    }

    fn record(&mut self, attempt: Attempt) -> Next {
        let Attempt { job, changed_at, answer } = attempt;
        let metrics = &self.reconciler.parts.metrics;
        let (namespace, id) = (&job.namespace, &job.app_id);
        match answer {
            Some(Ok(ReconcileOutcome::Done(summary))) => {
                self.record_success(job, changed_at, summary);
                Next::Continue
            }
            Some(Ok(ReconcileOutcome::Superseded(term))) => {
                tracing::warn!(namespace, job = id, term = term.0, "ledger already reconciled in a later term");
                metrics.reconciled(JobOutcome::Superseded, Drift::default());
                self.terms.supersede();
                self.reconciler.leadership.superseded(term);
                Next::Stop
            }
            Some(Err(error)) => {
                tracing::debug!(namespace, job = id, %error, "failed to reconcile the ledger; retrying");
                metrics.store_failed(&error);
                metrics.reconciled(JobOutcome::Failed, Drift::default());
                self.queue.requeue(job, changed_at, Instant::now() + RETRY_AFTER);
                Next::CheckStore
            }
            None => Next::Stop,
        }
    }

    fn record_success(&mut self, job: Arc<JobId>, changed_at: Option<Instant>, summary: ReconcileSummary) {
        let ReconcileSummary { drift, counts, recheck_after } = summary;
        let (now, metrics) = (Instant::now(), &self.reconciler.parts.metrics);
        let outcome = if drift.is_none() { JobOutcome::InSync } else { JobOutcome::Corrected };
        metrics.reconciled(outcome, drift);
        if let Some(changed_at) = changed_at {
            metrics.lagged(now - changed_at);
        }
        if !drift.is_none() {
            let (Drift { missing, stale, wrong_capacity }, Counts { spot, on_demand }) = (drift, counts);
            let (namespace, job) = (&job.namespace, &job.app_id);
            tracing::info!(namespace, job, missing, stale, wrong_capacity, spot, on_demand, "ledger corrected");
        }
        self.queue.reconciled(&job, counts.total(), now);
        if let Some(recheck_after) = recheck_after {
            self.queue.enqueue_at(Arc::clone(&job), now + Duration::from_millis(recheck_after) + AFTER_THE_GRACE);
        }
        if self.index.contains(&job) || recheck_after.is_some() {
            self.audit.expect(job, counts);
        } else {
            self.audit.forget(&job);
        }
    }

    /// Reconciles all ledgers: of the jobs in the cluster, and of those that only the store has. A resync that is
    /// interrupted stays pending.
    pub(crate) async fn resync(&mut self, resync: Resync) {
        let Parts { metrics, .. } = &self.reconciler.parts;
        let started_at = resync.lists_started_at.unwrap_or_else(Instant::now);
        let jobs: Vec<_> = self.index.jobs().cloned().collect();
        for batch in jobs.chunks(BATCH) {
            let batch = batch.iter().map(|job| (Arc::clone(job), self.queue.remove(job))).collect();
            if !self.reconcile_batch(batch).await {
                return;
            }
        }
        let Some(ended) = self.reconcile_ended_jobs().await else { return };
        self.plan.finish();
        let (took, cause) = (started_at.elapsed(), resync.cause);
        metrics.resynced(cause, took);
        tracing::info!(cause = cause.as_str(), jobs = jobs.len(), ended, ?took, "resync finished");
        self.reach(Progress::Synced);
    }

    /// Reconciles the ledgers of the jobs that only the store has. Returns how many there were, or `None` if the resync
    /// cannot go on.
    async fn reconcile_ended_jobs(&mut self) -> Option<usize> {
        let Parts { ledger, metrics, .. } = &self.reconciler.parts;
        let (mut page, mut ended) = (Some(None), 0);
        self.plan.forget_skipped();
        while let Some(cursor) = page {
            let listed = match ledger.list_jobs(cursor).await {
                Ok(listed) => listed,
                Err(error) => {
                    metrics.store_failed(&error);
                    if !self.is_store_up().await {
                        return None;
                    }
                    tracing::warn!(store = error.kind(), %error, "cannot list the jobs of the store");
                    break;
                }
            };
            page = listed.next.map(Some);
            let gone = self.ended_of(listed.jobs);
            ended += gone.len();
            if !self.reconcile_batch(gone).await {
                return None;
            }
        }
        Some(ended)
    }

    /// Those of the jobs that have no live pod, in the namespaces that are in sync.
    fn ended_of(&mut self, jobs: Vec<JobId>) -> Vec<Due> {
        let settings = &self.reconciler.parts.settings;
        let is_unknown = |job: &JobId| settings.watches(&job.namespace) && !self.index.contains(job);
        let (ended, skipped): (Vec<_>, Vec<_>) =
            jobs.into_iter().filter(is_unknown).partition(|job| self.sync.is_synced(&job.namespace));
        for job in skipped {
            self.plan.skip(&job.namespace);
        }
        ended.into_iter().map(|job| (Arc::new(job), None)).collect()
    }
}
