//! Releases a deleted executor, or one that is opted out, from its job's ledger.

use std::time::Instant;

use balancer_core::{Executor, Reply};
use balancer_store::Ledger;

use super::Admission;
use crate::metrics::{AdmissionLabels, OperationLabel, OutcomeLabel, RoleLabel, StoreCall};

impl<L: Ledger> Admission<L> {
    pub(super) async fn release(&self, executor: &Executor<'_>, dry_run: bool) -> AdmissionLabels {
        let outcome = if dry_run { OutcomeLabel::DryRun } else { self.release_from_ledger(executor).await };
        AdmissionLabels { role: RoleLabel::Executor, operation: OperationLabel::Delete, outcome }
    }

    /// Undoes the placement of an executor that another webhook has opted out.
    pub(super) async fn withdraw(
        &self,
        executor: &Executor<'_>,
        dry_run: bool,
        reply: &mut Reply<'_>,
    ) -> AdmissionLabels {
        reply.patch = self.conventions.profile().withdraw(executor.pod);
        let outcome = if dry_run {
            OutcomeLabel::DryRun
        } else {
            match self.release_from_ledger(executor).await {
                OutcomeLabel::Degraded => OutcomeLabel::Degraded,
                _ => OutcomeLabel::OptedOut,
            }
        };
        AdmissionLabels { role: RoleLabel::Executor, operation: OperationLabel::Create, outcome }
    }

    async fn release_from_ledger(&self, executor: &Executor<'_>) -> OutcomeLabel {
        let (namespace, job, name) = (executor.job.namespace, executor.job.app_id, executor.key);
        let started = Instant::now();
        let released = self.ledger.release(executor.job, executor.key, executor.uid, executor.driver).await;
        self.metrics.called(StoreCall::Release, started, &released);
        match released {
            Ok(Some(capacity)) => {
                tracing::info!(namespace, job, executor = name, capacity = capacity.as_str(), "executor released");
                OutcomeLabel::Released
            }
            Ok(None) => {
                tracing::debug!(namespace, job, executor = name, "executor not in the ledger");
                OutcomeLabel::Ignored
            }
            Err(error) => {
                tracing::warn!(
                    namespace, job, executor = name, store = error.kind(), %error,
                    "executor not released: the store failed"
                );
                OutcomeLabel::Degraded
            }
        }
    }
}
