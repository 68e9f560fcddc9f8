//! Placements whose pods are not created, because a quota or a policy refuses them: their jobs are reconciled soon after
//! the placements, and the placements whose pods the Kubernetes API does not have are removed.

use std::sync::Arc;
use std::time::Duration;

use balancer_core::{JobId, RemovalOutcome};
use balancer_store::{Ledger, StoreError};
use tokio::time::Instant;

use crate::index::Executors;
use crate::metrics::Cause;
use crate::pod_lookup::Answer;
use crate::state::{Parts, Reconciler, State};

/// How often the jobs with new placements are taken from the store.
pub(crate) const TAKE_INTERVAL: Duration = Duration::from_millis(100);
/// From then to the job's reconcile. Most pods are reported earlier, and confirm their placements.
pub(crate) const SETTLE: Duration = Duration::from_millis(200);
/// A pod that exists, or that could not be looked up, is looked up again after this time, unless the watch reports it.
pub(crate) const LOOK_UP_AGAIN_AFTER: Duration = Duration::from_secs(1);

impl<L: Ledger> State<'_, L> {
    /// Takes the jobs with new placements from the store.
    pub(crate) async fn take_placed(&mut self) {
        let Parts { ledger, metrics, settings, .. } = &self.reconciler.parts;
        match ledger.take_placed().await {
            Ok(jobs) => {
                let due = Instant::now() + SETTLE;
                for job in jobs.into_iter().filter(|job| settings.watches(&job.namespace)) {
                    self.queue.enqueue_at(Arc::new(job), Executors::default(), due);
                }
            }
            Err(error) => {
                metrics.store_failed(&error);
                let is_new = self.warn_of_refusals(&format!("cannot take the new placements from the store: {error}"));
                // The store may have returned the jobs in vain.
                if is_new && matches!(error, StoreError::TimedOut(_)) {
                    self.plan.request(Cause::Store);
                }
                self.is_store_up().await;
            }
        }
    }

    /// Logs, not too often, why placements whose pods are refused cannot be removed early. Returns whether it did.
    fn warn_of_refusals(&mut self, error: &str) -> bool {
        let is_due = self.refusals_logged.is_due(Instant::now());
        if is_due {
            tracing::warn!(error, "refused executors count until the grace period ends");
        }
        is_due
    }

    /// Removes the placements of a job whose pods the Kubernetes API does not have.
    pub(crate) async fn remove_absent(&mut self, answer: Answer) {
        let Answer { job, absent, has_others, error } = answer;
        if let Some(error) = error {
            self.warn_of_refusals(&format!("cannot look up the pods of a job in {}: {error}", job.namespace));
        }
        if has_others {
            let due = Instant::now() + LOOK_UP_AGAIN_AFTER;
            self.queue.enqueue_at(Arc::clone(&job), Executors::default(), due);
        }
        let Some(term) = self.reconciler.leadership.term().filter(|_| self.may_write() && !absent.is_empty()) else {
            return;
        };
        let Reconciler { parts: Parts { ledger, metrics, settings, .. }, .. } = self.reconciler;
        match ledger.remove_unconfirmed(job.as_job_ref(), &absent, term).await {
            Ok(RemovalOutcome::Done { removed, counts }) => {
                let now = Instant::now();
                metrics.refused(removed);
                if removed > 0 {
                    let JobId { namespace, app_id } = &*job;
                    let (spot, on_demand) = (counts.spot, counts.on_demand);
                    tracing::info!(
                        namespace,
                        job = app_id,
                        removed,
                        spot,
                        on_demand,
                        "placements removed: the Kubernetes API has no such pods"
                    );
                }
                let is_part = absent.len() >= balancer_core::JobLedger::WAITING_REPORTED;
                self.confirmations.removed(&job, absent, removed, now);
                if is_part {
                    self.queue.enqueue_at(job, Executors::default(), now);
                } else if !self.index.contains(&job) {
                    // The policy of a job without pods goes with its ledger, if nothing else is placed until then.
                    self.audit.forget(&job);
                    self.queue.enqueue_at(job, Executors::default(), now + settings.grace);
                }
            }
            Ok(RemovalOutcome::Superseded(term)) => self.superseded(&job, term),
            Err(error) => {
                metrics.store_failed(&error);
                self.queue.enqueue_at(job, Executors::default(), Instant::now() + LOOK_UP_AGAIN_AFTER);
                self.is_store_up().await;
            }
        }
    }
}
