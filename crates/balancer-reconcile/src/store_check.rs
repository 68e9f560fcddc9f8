//! Checks every second whether the store answers, has lost data, and counts what was left in it.

use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

use balancer_store::Ledger;
use futures::{StreamExt, stream};
use tokio::time::Instant;

use crate::metrics::Cause;
use crate::state::{Parts, State};

/// From one heartbeat to the next.
pub(crate) const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(1);
/// Counts that differ from those that were left in a ledger are noticed within this time at the latest. No watch
/// reports them.
const MAX_AUDIT_PERIOD: Duration = Duration::from_secs(10);
/// Calls to the store at once.
const CONCURRENCY: usize = 8;

impl<L: Ledger> State<'_, L> {
    /// Sends a heartbeat to the store, and audits the counts of some of the jobs.
    pub(crate) async fn check_store(&mut self) {
        self.show_totals();
        let is_due = self.terms.leads() && self.plan.has_listed();
        if is_due && self.is_store_up().await && self.plan.pending().is_none() {
            self.audit_counts().await;
        }
    }

    /// Sends a heartbeat. If the store does not answer, nothing else is sent to it until it does. If it has lost data,
    /// or was not reachable, a resync follows.
    pub(crate) async fn is_store_up(&mut self) -> bool {
        let Parts { ledger, metrics, .. } = &self.reconciler.parts;
        let heartbeat = self.store.next(|| RandomState::new().hash_one(()));
        match ledger.heartbeat(heartbeat).await {
            Ok(before) => {
                if let Some(returned) = self.store.answered(heartbeat, before) {
                    let lost_data = returned.lost_data;
                    tracing::warn!(lost_data, "store is back or lost data; starting a resync");
                    self.plan.request(Cause::Store);
                }
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

    /// Compares some of the ledgers' counts with those that were left there. That reveals placements without a pod and
    /// ledgers that the store has lost. It also keeps the ledgers of quiet jobs from expiring.
    async fn audit_counts(&mut self) {
        let Parts { ledger, metrics, settings, .. } = &self.reconciler.parts;
        let period = (settings.grace / 4).clamp(HEARTBEAT_INTERVAL, MAX_AUDIT_PERIOD).as_secs();
        let batch = self.audit.next_batch(usize::try_from(period).unwrap_or(1));
        let answers: Vec<_> = stream::iter(batch)
            .map(|(job, expected)| async move {
                let counts = ledger.counts(job.as_job_ref()).await;
                (job, expected, counts)
            })
            .buffer_unordered(CONCURRENCY)
            .collect()
            .await;
        for (job, expected, counts) in answers {
            match counts {
                Ok(Some(counts)) if counts == expected => {}
                Ok(_) => self.queue.enqueue_at(job, Instant::now()),
                // The next heartbeat shows whether the store is up.
                Err(error) => metrics.store_failed(&error),
            }
        }
    }
}
