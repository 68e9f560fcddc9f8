//! Checks every second whether the store answers, has lost data, and has the counts and policies that were left in it.

use std::hash::{BuildHasher, RandomState};
use std::mem;
use std::sync::Arc;
use std::time::Duration;

use balancer_core::{JobId, SpotRatio, Steering};
use balancer_store::{JobRecord, Ledger, StoreError};
use futures::{StreamExt, stream};
use tokio::time::Instant;

use crate::index::Executors;
use crate::metrics::Cause;
use crate::state::{Parts, State};
use crate::store_epoch::StoreReturned;

/// From one heartbeat to the next.
pub(crate) const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(1);
/// Counts or a policy that differ from those that were left in a ledger are noticed within this time at the latest, and
/// corrected within ten seconds. No watch reports them.
const MAX_AUDIT_PERIOD: Duration = Duration::from_secs(9);
/// A job of so many executors is compared as a whole whenever its record differs: that is a few calls.
pub(crate) const SMALL: usize = 2048;
/// Records that are read before others have their turn in the loop.
const RECORDS_PER_TURN: usize = 64;
/// Calls to the store at once.
const CONCURRENCY: usize = 8;

impl<L: Ledger> State<'_, L> {
    /// Sends a heartbeat to the store, and starts to audit the records of some of the jobs.
    pub(crate) async fn check_store(&mut self) {
        self.show_totals();
        self.report_unschedulable();
        self.report_shares();
        self.confirmations.sweep(Instant::now());
        let is_due = self.terms.leads() && self.plan.has_listed();
        if is_due && self.is_store_up().await && self.plan.due(Instant::now()).is_none() {
            self.start_audit();
        }
    }

    /// Sends a heartbeat. If the store does not answer, nothing else is sent to it until it does. If it has lost data,
    /// or was not reachable, a resync follows.
    pub(crate) async fn is_store_up(&mut self) -> bool {
        let Parts { ledger, metrics, .. } = &self.reconciler.parts;
        let heartbeat = self.store.next(|| RandomState::new().hash_one(()));
        match ledger.heartbeat(heartbeat).await {
            Ok(before) => {
                let returned = self.store.answered(heartbeat, before);
                self.follow_store(returned);
                true
            }
            // Entries can still be removed, which may be what makes room again.
            Err(error @ StoreError::Full(_)) => {
                metrics.store_failed(&error);
                if self.full_logged.is_due(Instant::now()) {
                    tracing::warn!(%error, "store is full; still removing entries without an executor");
                }
                let returned = self.store.refused();
                self.follow_store(returned);
                true
            }
            Err(error) => {
                metrics.store_failed(&error);
                if self.store.failed() {
                    tracing::warn!(store = error.kind(), %error, "store not reachable; waiting");
                }
                false
            }
        }
    }

    fn follow_store(&mut self, returned: Option<StoreReturned>) {
        if let Some(StoreReturned { lost_data }) = returned {
            tracing::warn!(lost_data, "store is back or lost data; starting a resync");
            self.plan.request(Cause::Store);
        }
    }

    /// Compares a job's record with the one that was left there. Returns the executors to name if it differs. In a large
    /// job that changes, placements and releases in flight are no reason to compare everything.
    fn audited(&mut self, job: &Arc<JobId>, found: Option<&JobRecord>) -> Option<Executors> {
        let left = self.audit.counts(job);
        let is_as_left = self.audit.check(job, found);
        let live = self.index.executors(job);
        let Some(record) = found.filter(|_| live > SMALL) else { return (!is_as_left).then_some(Executors::All) };
        let known = self.known(job, record.counts);
        let is_off = record.policy.is_some_and(|policy| policy.spot_ratio == SpotRatio::Off);
        let is_lacking = !is_off && known.missing() > self.doubts.explained(job);
        let is_recounted = left.is_some_and(|left| left != record.counts && left.total() == record.counts.total());
        if is_recounted || is_lacking {
            self.doubts.add(job, known, is_recounted, Instant::now());
        }
        (!is_as_left || is_lacking).then(Executors::default)
    }

    /// Chooses the records to audit until the next heartbeat. What is left of the last ones comes first; if more than that is
    /// left, the loop cannot audit so many.
    pub(crate) fn start_audit(&mut self) {
        let grace = self.reconciler.parts.settings.grace;
        let period = (grace / 4).clamp(HEARTBEAT_INTERVAL, MAX_AUDIT_PERIOD).as_secs();
        let batches = usize::try_from(period).unwrap_or(1);
        if self.auditing.len() <= self.audit.batch_size(batches) {
            let left = mem::replace(&mut self.auditing, self.audit.next_batch(batches));
            self.auditing.extend(left);
        }
    }

    /// Whether the audit goes on at once.
    pub(crate) fn has_audit_step(&self) -> bool {
        !self.auditing.is_empty() && self.may_write()
    }

    /// Compares some of the ledgers' counts and policies with those that were left there. That reveals placements without a
    /// pod, ledgers that the store has lost, and policies that something else has changed. It also keeps the ledgers of
    /// quiet jobs from expiring.
    pub(crate) async fn audit_step(&mut self) {
        let batch = self.auditing.split_off(self.auditing.len().saturating_sub(RECORDS_PER_TURN));
        let (watchdog, Parts { ledger, metrics, .. }) = (&self.watchdog, &self.reconciler.parts);
        let answers: Vec<_> = stream::iter(batch)
            .map(|job| async move {
                let found = ledger.record(job.as_job_ref()).await;
                watchdog.turned();
                (job, found)
            })
            .buffer_unordered(CONCURRENCY)
            .collect()
            .await;
        for (job, found) in answers {
            if let Ok(found) = &found {
                let none = Steering::default();
                self.observe_steering(&job, found.as_ref().map_or(&none, |record| &record.steering));
            }
            match found {
                Ok(found) => {
                    if let Some(executors) = self.audited(&job, found.as_ref()) {
                        self.queue.enqueue_at(job, executors, Instant::now());
                    }
                }
                // The next heartbeat shows whether the store is up. A reconcile repairs a ledger that cannot be read.
                Err(error) => {
                    metrics.store_failed(&error);
                    if matches!(error, StoreError::Refused { .. } | StoreError::InvalidReply(_)) {
                        self.queue.enqueue_at(job, Executors::All, Instant::now());
                    }
                }
            }
        }
    }
}
