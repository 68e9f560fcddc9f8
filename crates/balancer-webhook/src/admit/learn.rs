//! Records the policy of a created driver, and patches the driver.

use std::time::Instant;

use balancer_core::{Driver, JobRef, LearnOutcome, Policy, Reply, SpotRatio};
use balancer_store::Ledger;

use super::Admission;
use crate::metrics::{AdmissionLabels, OperationLabel, OutcomeLabel, RoleLabel, StoreCall};

impl<L: Ledger> Admission<L> {
    pub(super) async fn learn(&self, driver: &Driver<'_>, dry_run: bool, reply: &mut Reply<'_>) -> AdmissionLabels {
        for invalid in &driver.invalid {
            self.warn_of_default(reply, invalid);
        }
        let policy = driver.overrides.or_default(self.defaults);
        let is_opted_out = policy.spot_ratio == SpotRatio::Off;
        if !is_opted_out {
            reply.patch = self.conventions.profile().apply_to_driver(driver.pod);
        }
        let outcome = match driver.job {
            _ if dry_run => OutcomeLabel::DryRun,
            Some(job) => self.record(job, driver, policy).await,
            // It drives many jobs, whose executors it owns: their lookups find it.
            None if is_opted_out => OutcomeLabel::OptedOut,
            None => OutcomeLabel::NoJobId,
        };
        AdmissionLabels { role: RoleLabel::Driver, operation: OperationLabel::Create, outcome }
    }

    async fn record(&self, job: JobRef<'_>, driver: &Driver<'_>, policy: Policy) -> OutcomeLabel {
        let JobRef { namespace, app_id } = job;
        let invalid = driver.invalid.first().map(tracing::field::display);
        let now = Instant::now();
        let may_create = self.new_jobs.may_create(namespace, now);
        let learned = self.ledger.learn(job, policy, driver.name, may_create).await;
        self.metrics.called(StoreCall::Learn, now, &learned);
        match learned {
            Ok(LearnOutcome::Stored { is_new_job }) => {
                if is_new_job {
                    self.new_jobs.created(namespace, now);
                }
                tracing::info!(
                    namespace, job = app_id, driver = driver.name, %policy, invalid,
                    "driver policy recorded"
                );
                OutcomeLabel::PolicyRecorded
            }
            Ok(LearnOutcome::NotStored) => {
                tracing::info!(
                    namespace, job = app_id, driver = driver.name, %policy, invalid,
                    "driver policy not recorded: the job may have another driver, or this one has no name yet; the first \
                     executor's lookup will find it"
                );
                OutcomeLabel::PolicyNotRecorded
            }
            Ok(LearnOutcome::NoLedger) => {
                self.report_new_job_limit(job);
                OutcomeLabel::NewJobLimit
            }
            Err(error) => {
                tracing::warn!(
                    namespace, job = app_id, driver = driver.name, %policy, invalid, store = error.kind(), %error,
                    "driver policy not recorded; the first executor's lookup will find it"
                );
                OutcomeLabel::Degraded
            }
        }
    }
}
