//! Reconciles the ledgers of some jobs, or of all.

use std::sync::Arc;
use std::time::Duration;

use balancer_core::{
    Counts, Drift, JobId, PlaceRequest, PolicyOverrides, ReconcileOutcome, ReconcileSummary, RemovalOutcome, SpotRatio,
    Term, Timing, Unconfirmed,
};
use balancer_store::{JobRecord, Ledger, StoreError};
use futures::{StreamExt, stream};
use tokio::sync::Semaphore;
use tokio::time::Instant;

use crate::audit::PolicyChange;
use crate::index::FixedCapacity;
use crate::metrics::{FaultLabel, JobOutcome};
use crate::resync::Resync;
use crate::state::{Parts, Progress, Reconciler, State};
use crate::store_check::HEARTBEAT_INTERVAL;
use crate::unconfirmed::LOOK_UP_AGAIN_AFTER;

/// Jobs that are reconciled before events are received again.
pub(crate) const BATCH: usize = 64;
/// Placements of a job that are moved before it is reconciled again. Each is a call of its own.
const MOVED_AT_ONCE: usize = 64;
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
    /// What all of the job's executors require by themselves.
    fixed: Option<FixedCapacity>,
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

/// The ledgers that a resync has reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reached {
    All,
    /// The store is up, but cannot list its jobs.
    Some,
    /// The store is down, or another process leads.
    Interrupted,
}

impl<L: Ledger> State<'_, L> {
    /// Makes the ledgers of these jobs equal to the index. Returns whether more jobs may be reconciled.
    pub(crate) async fn reconcile_batch(&mut self, jobs: Vec<Due>) -> bool {
        let Reconciler { parts: Parts { ledger, .. }, leadership, .. } = self.reconciler;
        let (synced, unsynced): (Vec<_>, Vec<_>) =
            jobs.into_iter().partition(|(job, _)| self.sync.is_synced(&job.namespace));
        for (job, changed_at) in unsynced {
            self.queue.requeue(job, changed_at, Instant::now() + HEARTBEAT_INTERVAL);
        }
        let state = &*self;
        let permits = &Semaphore::new(CONCURRENCY as usize);
        let attempts: Vec<Attempt> = stream::iter(synced)
            .map(|(job, changed_at)| async move {
                let desired = state.index.desired(&job);
                let policy = state.audit.policy(&job, desired.driver());
                let desired = desired.or_policy(policy);
                // The semaphore is never closed. A large job takes several permits.
                let _permits = permits.acquire_many(CONCURRENCY.min(1 + desired.executors() / LARGE)).await;
                // Checked for each job, because the process may have been stopped in between.
                let answer = match leadership.term() {
                    Some(term) => {
                        Some(ledger.reconcile(job.as_job_ref(), &desired.job_state(), state.timing(&job), term).await)
                    }
                    None => None,
                };
                state.watchdog.turned();
                let fixed = desired.fixed();
                Attempt { job, changed_at, fixed, answer }
            })
            .buffer_unordered(CONCURRENCY as usize)
            .collect()
            .await;
        let moving: Vec<_> =
            attempts.iter().filter(|attempt| self.has_left(attempt)).map(|attempt| Arc::clone(&attempt.job)).collect();
        let mut nexts: Vec<Next> = attempts.into_iter().map(|attempt| self.record(attempt)).collect();
        for job in moving {
            nexts.push(self.move_placements(job).await);
        }
        self.show_leader();
        if nexts.contains(&Next::Stop) {
            return false;
        }
        // The ledger of one job may be invalid. That is no reason to give up the others.
        !nexts.contains(&Next::CheckStore) || self.is_store_up().await
    }

    fn record(&mut self, attempt: Attempt) -> Next {
        let Attempt { job, changed_at, fixed, answer } = attempt;
        let metrics = &self.reconciler.parts.metrics;
        let (namespace, id) = (&job.namespace, &job.app_id);
        match answer {
            Some(Ok(ReconcileOutcome::Done(summary))) => {
                if let (Some(fixed), Some(policy)) = (fixed, summary.policy) {
                    self.report_without_effect(&job, fixed, policy);
                }
                self.record_success(job, changed_at, summary);
                Next::Continue
            }
            Some(Ok(ReconcileOutcome::Superseded(term))) => {
                self.superseded(&job, term);
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

    /// Whether the ledger has placements that belong to another job's ledger by now.
    fn has_left(&self, attempt: &Attempt) -> bool {
        let Some(Ok(ReconcileOutcome::Done(summary))) = &attempt.answer else { return false };
        summary.counts.total() > 0 && self.index.moved_to(&attempt.job).is_some()
    }

    /// Moves the placements that wait for their pods to the job that their driver has taken over. The watch has not reported
    /// these pods, so nothing else shows that the placements count there.
    async fn move_placements(&mut self, from: Arc<JobId>) -> Next {
        let Reconciler { parts: Parts { ledger, metrics, .. }, leadership, .. } = self.reconciler;
        let (Some(to), Some(term)) = (self.index.moved_to(&from).cloned(), leadership.term()) else {
            return Next::Continue;
        };
        let index = &self.index;
        let moved = async {
            let left = ledger.get(from.as_job_ref()).await?.unwrap_or_default();
            let waiting = left.entries().iter().filter(|(_, entry)| entry.uid.is_none());
            let mut moved = Vec::new();
            for (key, entry) in waiting.take(MOVED_AT_ONCE) {
                // The store cannot refuse a placement of a former leader.
                if leadership.term().is_none() {
                    break;
                }
                // In the job of its driver, whatever its ledger says about drivers and opting out.
                let overrides = PolicyOverrides { spot_ratio: Some(SpotRatio::ONE), ..PolicyOverrides::default() };
                let (required, policy, driver) = (Some(entry.capacity), None, None);
                let request = PlaceRequest { key, required, overrides, policy, may_create: true, driver };
                if !index.has_executor(&to, key) {
                    ledger.place(to.as_job_ref(), &request).await?;
                }
                moved.push(Unconfirmed { placed_at: entry.placed_at, key: key.clone() });
            }
            ledger.remove_unconfirmed(from.as_job_ref(), &moved, term).await
        };
        let outcome = moved.await;
        self.watchdog.turned();
        // A placement that was in flight may follow. Without one, this removes the rest of the ledger.
        self.queue.enqueue_at(Arc::clone(&from), Instant::now() + LOOK_UP_AGAIN_AFTER);
        match outcome {
            Ok(RemovalOutcome::Done { removed, .. }) => {
                let (namespace, job) = (&from.namespace, &from.app_id);
                tracing::info!(namespace, job, removed, "placements moved to the job that their driver has taken over");
                Next::Continue
            }
            Ok(RemovalOutcome::Superseded(term)) => {
                self.superseded(&from, term);
                Next::Stop
            }
            Err(error) => {
                let (namespace, job) = (&from.namespace, &from.app_id);
                tracing::debug!(namespace, job, %error, "failed to move the placements of a driver; retrying");
                metrics.store_failed(&error);
                Next::CheckStore
            }
        }
    }

    /// The job's ledger was reconciled in a later term than this process's.
    pub(crate) fn superseded(&mut self, job: &JobId, term: Term) {
        let (namespace, job) = (&job.namespace, &job.app_id);
        tracing::warn!(namespace, job, term = term.0, "ledger already reconciled in a later term");
        self.reconciler.parts.metrics.reconciled(JobOutcome::Superseded, Drift::default());
        self.terms.supersede();
        self.reconciler.leadership.superseded(term);
    }

    fn timing(&self, job: &JobId) -> Timing {
        let confirm_after = self.confirmations.confirm_after(&job.namespace);
        Timing { confirm_after, ..Timing::only_grace(self.reconciler.parts.settings.grace) }
    }

    fn record_success(&mut self, job: Arc<JobId>, changed_at: Option<Instant>, summary: ReconcileSummary) {
        let ReconcileSummary { drift, counts, policy, recheck_after, unconfirmed, fault, steering } = summary;
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
        if let Some(fault) = fault {
            self.repaired(&job, fault.into());
        }
        self.queue.reconciled(&job, counts.total(), now);
        self.changed_shares.insert(&job, now);
        self.observe_steering(&job, &steering);
        if drift.missing > 0 {
            let (index, namespace) = (&self.index, &job.namespace);
            let confirm_after = self.confirmations.added(&job, |key| index.has_executor(&job, key), now);
            if let Some(confirm_after) = confirm_after {
                tracing::info!(
                    namespace,
                    ?confirm_after,
                    "creations are slow; placements get more time for their pods"
                );
            }
        }
        let primary = self.index.primary(job.as_job_ref());
        let is_moving = self.index.moved_to(&job).is_some();
        if !unconfirmed.is_empty() && !is_moving && !self.lookups.start(&job, primary, unconfirmed) {
            self.queue.enqueue_at(Arc::clone(&job), now + LOOK_UP_AGAIN_AFTER);
        }
        if let Some(recheck_after) = recheck_after {
            self.queue.enqueue_at(Arc::clone(&job), now + Duration::from_millis(recheck_after) + AFTER_THE_GRACE);
        }
        if self.index.contains(&job) || recheck_after.is_some() {
            let driver = self.index.desired_driver(&job);
            let change = self.audit.expect(Arc::clone(&job), JobRecord { counts, policy, steering }, driver);
            if change == PolicyChange::Restored {
                self.repaired(&job, FaultLabel::Policy);
            }
        } else {
            self.audit.forget(&job);
        }
    }

    fn repaired(&self, job: &JobId, fault: FaultLabel) {
        self.reconciler.parts.metrics.repaired(fault);
        let (namespace, job) = (&job.namespace, &job.app_id);
        tracing::warn!(namespace, job, fault = fault.as_str(), "ledger repaired: something else has changed it");
    }

    /// Reconciles all ledgers: of the jobs in the cluster, and of those that only the store has. A resync that is
    /// interrupted or incomplete stays pending.
    pub(crate) async fn resync(&mut self, resync: Resync) {
        self.plan.begin();
        let reached = self.resync_all(resync).await;
        match reached {
            Reached::All => {
                self.plan.finish();
                self.reach(Progress::Synced);
            }
            Reached::Some => self.plan.postpone(Instant::now()),
            Reached::Interrupted => self.plan.interrupt(),
        }
    }

    async fn resync_all(&mut self, resync: Resync) -> Reached {
        let Parts { metrics, .. } = &self.reconciler.parts;
        let started_at = resync.lists_started_at.unwrap_or_else(Instant::now);
        let jobs: Vec<_> = self.index.jobs().cloned().collect();
        for batch in jobs.chunks(BATCH) {
            let batch = batch.iter().map(|job| (Arc::clone(job), self.queue.remove(job))).collect();
            if !self.reconcile_batch(batch).await {
                return Reached::Interrupted;
            }
        }
        let ended = match self.reconcile_ended_jobs().await {
            Ok(ended) => ended,
            Err(reached) => return reached,
        };
        let (took, cause) = (started_at.elapsed(), resync.cause);
        metrics.resynced(cause, took);
        tracing::info!(cause = cause.as_str(), jobs = jobs.len(), ended, ?took, "resync finished");
        Reached::All
    }

    /// Reconciles the ledgers of the jobs that only the store has. Returns how many there were, or how far the resync
    /// has come if it cannot go on.
    async fn reconcile_ended_jobs(&mut self) -> Result<usize, Reached> {
        let Parts { ledger, metrics, .. } = &self.reconciler.parts;
        let (mut page, mut ended) = (Some(None), 0);
        self.plan.forget_skipped();
        while let Some(cursor) = page {
            let listed = match ledger.list_jobs(cursor).await {
                Ok(listed) => listed,
                Err(error) => {
                    metrics.store_failed(&error);
                    if !self.is_store_up().await {
                        return Err(Reached::Interrupted);
                    }
                    tracing::warn!(store = error.kind(), %error, "cannot list the jobs of the store; retrying the resync");
                    return Err(Reached::Some);
                }
            };
            page = listed.next.map(Some);
            let gone = self.ended_of(listed.jobs);
            ended += gone.len();
            if !self.reconcile_batch(gone).await {
                return Err(Reached::Interrupted);
            }
        }
        Ok(ended)
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
