//! Answers an AdmissionReview: determines the action, applies it to the ledger, and writes the reply. If anything
//! fails on the way, the pod is still admitted.

mod learn;
mod place;
mod release;
#[cfg(test)]
mod tests;

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Instant;

use balancer_core::{
    Action, Conventions, IgnoreReason, InvalidField, JobRef, Policy, PolicyField, PolicyOverrides, Reply, Review,
    ReviewError,
};
use balancer_store::Ledger;
use futures::FutureExt;

use crate::drivers::DriverLookup;
use crate::metrics::{AdmissionLabels, Metrics};
use crate::new_jobs::NewJobs;
use crate::server_version::ServerVersion;

/// Everything that an admission needs.
#[derive(Debug)]
pub struct Admission<L> {
    /// Where executors are counted.
    pub ledger: Arc<L>,
    /// Finds the policy of a job whose policy the ledger does not have.
    pub drivers: DriverLookup,
    /// Limits how many jobs get a ledger.
    pub new_jobs: NewJobs,
    /// The labels and annotations of this cluster.
    pub conventions: Arc<Conventions>,
    /// The policy of a job that states none.
    pub defaults: Policy,
    /// What the cluster's version lacks.
    pub server_version: Arc<ServerVersion>,
    /// The webhook's metrics.
    pub metrics: Arc<Metrics>,
}

/// The webhook that a request is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// `/mutate`: places executors, and records the policies of drivers.
    Mutate,
    /// `/validate`: releases deleted executors.
    Validate,
}

impl<L: Ledger> Admission<L> {
    /// Answers the review in `body`. Never denies a pod, and never blocks a deletion.
    ///
    /// # Errors
    /// `body` is not a valid AdmissionReview.
    pub async fn answer(&self, hook: Hook, body: &[u8]) -> Result<Vec<u8>, ReviewError> {
        let started = Instant::now();
        let review = Review::decode(body)?;
        let mut reply = Reply::allow(review.uid());
        let labels = match AssertUnwindSafe(self.act(hook, &review, &mut reply)).catch_unwind().await {
            Ok(labels) => labels,
            // A panic is a defect, which the log shows. It must not cost the pod, nor the others on the connection. Decoding
            // and encoding stay outside: with them, the future that hyper moves made an HTTP/2 admission half as expensive
            // again.
            Err(_) => {
                reply = Reply::allow(review.uid());
                AdmissionLabels::PANICKED
            }
        };
        self.metrics.admitted(labels, started.elapsed());
        Ok(reply.encode())
    }

    async fn act(&self, hook: Hook, review: &Review<'_>, reply: &mut Reply<'_>) -> AdmissionLabels {
        let (action, dry_run) = (Action::of(review, &self.conventions), review.is_dry_run());
        let reason = match (hook, &action) {
            (Hook::Mutate, Action::Place(executor)) => return self.place(executor, dry_run, reply).await,
            (Hook::Mutate, Action::Learn(driver)) => return self.learn(driver, dry_run, reply).await,
            (Hook::Mutate, Action::Withdraw(executor)) => return self.withdraw(executor, dry_run, reply).await,
            (Hook::Validate, Action::Release(executor)) => return self.release(executor, dry_run).await,
            (Hook::Mutate, Action::Release(_))
            | (Hook::Validate, Action::Place(_) | Action::Learn(_) | Action::Withdraw(_)) => {
                IgnoreReason::OtherOperation
            }
            (_, Action::Ignore(reason)) => *reason,
        };
        if reason == IgnoreReason::OptedOut {
            let (namespace, executor) = (review.request.namespace.as_deref(), review.request.name.as_deref());
            tracing::debug!(namespace, executor, "executor left unchanged: it is opted out by its own annotation");
        }
        AdmissionLabels::ignored(reason, review.request.operation)
    }

    /// Logs one line per namespace and minute, because these jobs are many.
    fn report_new_job_limit(&self, job: JobRef<'_>) {
        if self.new_jobs.is_report_due(job.namespace, Instant::now()) {
            tracing::warn!(
                namespace = job.namespace,
                job = job.app_id,
                "too many new jobs in this namespace; their executors are placed without a ledger"
            );
        }
    }

    fn warn_of_default(&self, reply: &mut Reply<'_>, invalid: &InvalidField) {
        let default = PolicyOverrides::from(self.defaults).value(invalid.field).unwrap_or_default();
        let used = match invalid.field {
            PolicyField::OnDemandBase => format!("on-demand base {default}"),
            _ => format!("the default {default}"),
        };
        self.warn(reply, invalid, &used);
    }

    /// Warns the submitter of the pod about an invalid annotation, and counts it for the operator.
    fn warn(&self, reply: &mut Reply<'_>, invalid: &InvalidField, used: &str) {
        let annotation = self.conventions.annotation(invalid.field);
        self.metrics.invalid_annotation(invalid);
        reply.warnings.push(format!("{annotation}: {invalid}; using {used}"));
    }
}
