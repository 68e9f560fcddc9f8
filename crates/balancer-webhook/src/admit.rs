//! Answers an AdmissionReview: determines the action, applies it to the ledger, and writes the reply. If anything
//! fails on the way, the pod is still admitted.

use std::sync::Arc;
use std::time::Instant;

use balancer_core::{
    Action, Capacity, Conventions, Counts, Driver, Executor, IgnoreReason, InvalidField, PlaceOutcome, PlaceRequest,
    Placed, Policy, PolicyField, PolicyOverrides, Reply, Review, ReviewError, decide_without_ledger,
};
use balancer_store::{Ledger, StoreError};

use crate::drivers::{DriverLookup, DriverPolicy};
use crate::metrics::{
    AdmissionLabels, Metrics, OperationLabel, OutcomeLabel, PlacementSource, PolicySource, RoleLabel, StoreCall,
};

/// Everything that an admission needs.
#[derive(Debug)]
pub struct Admission<L> {
    /// Where executors are counted.
    pub ledger: Arc<L>,
    /// Finds the policy of a job whose policy the ledger does not have.
    pub drivers: DriverLookup,
    /// The labels and annotations of this cluster.
    pub conventions: Arc<Conventions>,
    /// The policy of a job that states none.
    pub defaults: Policy,
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

/// How one executor is placed.
#[derive(Clone, Debug)]
struct Decision {
    capacity: Capacity,
    source: PlacementSource,
    /// Where the ratio comes from, if one was used.
    policy: Option<PolicySource>,
    /// The job's counts with this executor, or why the store failed.
    counts: Result<Counts, StoreError>,
}

impl<L: Ledger> Admission<L> {
    /// Answers the review in `body`. Never denies a pod, and never blocks a deletion.
    ///
    /// # Errors
    /// `body` is not a valid AdmissionReview.
    pub async fn answer(&self, hook: Hook, body: &[u8]) -> Result<Vec<u8>, ReviewError> {
        let started = Instant::now();
        let review = Review::decode(body)?;
        let (action, dry_run) = (Action::of(&review, &self.conventions), review.is_dry_run());
        let mut reply = Reply::allow(review.uid());
        let labels = match (hook, &action) {
            (Hook::Mutate, Action::Place(executor)) => self.place(executor, dry_run, &mut reply).await,
            (Hook::Mutate, Action::Learn(driver)) => self.learn(driver, dry_run, &mut reply).await,
            (Hook::Validate, Action::Release(executor)) => self.release(executor, dry_run).await,
            (Hook::Mutate, Action::Release(_)) | (Hook::Validate, Action::Place(_) | Action::Learn(_)) => {
                AdmissionLabels::ignored(IgnoreReason::OtherOperation)
            }
            (_, Action::Ignore(reason)) => AdmissionLabels::ignored(*reason),
        };
        self.metrics.admitted(labels, started.elapsed());
        Ok(reply.encode())
    }

    async fn place(&self, executor: &Executor<'_>, dry_run: bool, reply: &mut Reply<'_>) -> AdmissionLabels {
        for invalid in &executor.invalid {
            let used = match invalid.field {
                PolicyField::SpotRatio => "the job's ratio",
                _ => "the job's value",
            };
            self.warn(reply, invalid, used);
        }
        let Decision { capacity, source, policy, counts } = self.decide(executor, dry_run, reply).await;
        reply.patch = self.conventions.profile().apply(executor.pod, capacity, executor.placeholder);
        if !dry_run {
            self.metrics.placed(capacity, source, policy);
        }
        let (namespace, job) = (executor.job.namespace, executor.job.app_id);
        let (name, capacity, policy) = (executor.key, capacity.as_str(), policy.map(PolicySource::as_str));
        let source_name = source.as_str();
        match counts {
            Ok(Counts { spot, on_demand }) => tracing::info!(
                namespace,
                job,
                executor = name,
                capacity,
                source = source_name,
                policy,
                spot,
                on_demand,
                dry_run,
                "executor placed"
            ),
            Err(error) => tracing::warn!(
                namespace,
                job,
                executor = name,
                capacity,
                source = source_name,
                policy,
                store = error.kind(), %error,
                dry_run,
                "executor placed without the store"
            ),
        }
        AdmissionLabels {
            role: RoleLabel::Executor,
            operation: OperationLabel::Create,
            outcome: match (dry_run, source) {
                (true, _) => OutcomeLabel::DryRun,
                (false, PlacementSource::Fallback) => OutcomeLabel::Degraded,
                (false, _) => OutcomeLabel::Placed,
            },
        }
    }

    /// Calls the ledger. If the ledger has no policy for the job, looks the driver up and calls the ledger again.
    /// If the ledger fails, decides by the fallback formula.
    async fn decide(&self, executor: &Executor<'_>, dry_run: bool, reply: &mut Reply<'_>) -> Decision {
        let mut request = PlaceRequest::of(executor);
        let mut policy =
            if request.overrides.spot_ratio.is_some() { PolicySource::Executor } else { PolicySource::Ledger };
        let mut known = executor.overrides.or(None);
        let mut outcome = self.ask_ledger(executor, &request, dry_run).await;
        if matches!(outcome, Ok(PlaceOutcome::NeedPolicy)) {
            let (certain, jobs) = self.look_up(executor, &mut policy, reply).await;
            let complete = executor.overrides.or_default(jobs);
            known = Some(complete);
            if certain {
                request.policy = Some(jobs);
            } else {
                // The lookup failed. The default is for this executor alone, and must not be stored for the job.
                request.overrides = complete.into();
            }
            outcome = self.ask_ledger(executor, &request, dry_run).await;
        }
        let error = match outcome {
            Ok(PlaceOutcome::Placed(Placed { capacity, is_new, counts })) => {
                let source = match (executor.required, is_new) {
                    (Some(_), _) => PlacementSource::Required,
                    (None, false) => PlacementSource::Existing,
                    (None, true) => PlacementSource::Ledger,
                };
                let policy = (source == PlacementSource::Ledger).then_some(policy);
                return Decision { capacity, source, policy, counts: Ok(counts) };
            }
            Ok(PlaceOutcome::NeedPolicy) => {
                StoreError::InvalidReply("it needs a policy, although the request has one".to_owned())
            }
            Err(error) => error,
        };
        let capacity = match (executor.required, known) {
            (Some(required), _) => required,
            (None, Some(known)) => decide_without_ledger(executor.ordinal, known),
            (None, None) => {
                let (_, jobs) = self.look_up(executor, &mut policy, reply).await;
                decide_without_ledger(executor.ordinal, executor.overrides.or_default(jobs))
            }
        };
        let policy = executor.required.is_none().then_some(policy);
        Decision { capacity, source: PlacementSource::Fallback, policy, counts: Err(error) }
    }

    async fn ask_ledger(
        &self,
        executor: &Executor<'_>,
        request: &PlaceRequest<'_>,
        dry_run: bool,
    ) -> Result<PlaceOutcome, StoreError> {
        let call = if dry_run { StoreCall::Peek } else { StoreCall::Place };
        let outcome = async {
            match dry_run {
                true => self.ledger.peek(executor.job, request).await,
                false => self.ledger.place(executor.job, request).await,
            }
        };
        self.metrics.timed(call, outcome).await
    }

    /// The policy of the job by its driver's annotations and the defaults, and whether it is certain: a failed
    /// lookup leaves only the defaults.
    async fn look_up(
        &self,
        executor: &Executor<'_>,
        source: &mut PolicySource,
        reply: &mut Reply<'_>,
    ) -> (bool, Policy) {
        let found = self.drivers.policy(executor.job, executor.job_label).await;
        let (certain, overrides, invalid) = match &*found {
            DriverPolicy::Found { overrides, invalid } => (true, *overrides, invalid.as_slice()),
            DriverPolicy::NoDriver => (true, PolicyOverrides::default(), [].as_slice()),
            DriverPolicy::Failed(_) => (false, PolicyOverrides::default(), [].as_slice()),
        };
        self.metrics.looked_up(&found);
        for invalid in invalid {
            self.warn_of_default(reply, invalid);
        }
        if *source != PolicySource::Executor {
            *source = match overrides.spot_ratio {
                Some(_) => PolicySource::Driver,
                None if invalid.iter().any(|invalid| invalid.field == PolicyField::SpotRatio) => PolicySource::Invalid,
                None => PolicySource::Default,
            };
        }
        (certain, overrides.or_default(self.defaults))
    }

    async fn learn(&self, driver: &Driver<'_>, dry_run: bool, reply: &mut Reply<'_>) -> AdmissionLabels {
        for invalid in &driver.invalid {
            self.warn_of_default(reply, invalid);
        }
        let policy = driver.overrides.or_default(self.defaults);
        let (namespace, job) = (driver.job.namespace, driver.job.app_id);
        let invalid = driver.invalid.first().map(tracing::field::display);
        let mut outcome = OutcomeLabel::DryRun;
        if !dry_run {
            let learning = self.ledger.learn(driver.job, policy);
            outcome = match self.metrics.timed(StoreCall::Learn, learning).await {
                Ok(()) => {
                    tracing::info!(namespace, job, %policy, invalid, "driver policy recorded");
                    OutcomeLabel::PolicyRecorded
                }
                Err(error) => {
                    tracing::warn!(
                        namespace, job, %policy, invalid, store = error.kind(), %error,
                        "driver policy not recorded; the first executor's lookup will find it"
                    );
                    OutcomeLabel::Degraded
                }
            };
        }
        AdmissionLabels { role: RoleLabel::Driver, operation: OperationLabel::Create, outcome }
    }

    async fn release(&self, executor: &Executor<'_>, dry_run: bool) -> AdmissionLabels {
        let (namespace, job, name) = (executor.job.namespace, executor.job.app_id, executor.key);
        let mut outcome = OutcomeLabel::DryRun;
        if !dry_run {
            let releasing = self.ledger.release(executor.job, executor.key, executor.uid);
            outcome = match self.metrics.timed(StoreCall::Release, releasing).await {
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
            };
        }
        AdmissionLabels { role: RoleLabel::Executor, operation: OperationLabel::Delete, outcome }
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
