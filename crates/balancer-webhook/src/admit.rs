//! The one orchestrator: a review becomes work, the work meets the ledger, the answer becomes a
//! reply. Whatever fails on the way, the pod is admitted.

use std::sync::Arc;
use std::time::Instant;

use balancer_core::{
    Action, Capacity, Conventions, Counts, Driver, Executor, IgnoreReason, InvalidField, PlaceOutcome, PlaceRequest,
    Placed, Policy, PolicyField, PolicyOverrides, Reply, Review, ReviewError, decide_without_ledger,
};
use balancer_store::{Ledger, StoreError};

use crate::drivers::{DriverLookup, DriverPolicy};
use crate::metrics::{Admitted, Metrics, OperationLabel, OutcomeLabel, PolicySource, RoleLabel, Source, StoreCall};

/// Everything an admission needs.
#[derive(Debug)]
pub struct Admission<L> {
    /// Where executors are counted.
    pub ledger: Arc<L>,
    /// Where a job's policy is looked up.
    pub drivers: DriverLookup,
    /// How the cluster names things.
    pub conventions: Arc<Conventions>,
    /// What holds where a job states nothing.
    pub defaults: Policy,
    /// What is counted.
    pub metrics: Arc<Metrics>,
}

/// Which of our two webhooks is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// `/mutate`: executors are placed, drivers learnt from.
    Mutate,
    /// `/validate`: deleted executors are released.
    Validate,
}

/// How one executor was placed.
#[derive(Clone, Debug)]
struct Placement {
    capacity: Capacity,
    source: Source,
    /// Who told the ratio, where one was used.
    policy: Option<PolicySource>,
    /// The job's executors with this one; or why the store did not tell.
    counts: Result<Counts, StoreError>,
}

impl<L: Ledger> Admission<L> {
    /// Answers the review in `body`, if it is one. Never denies a pod, never blocks a deletion.
    pub async fn answer(&self, hook: Hook, body: &[u8]) -> Result<Vec<u8>, ReviewError> {
        let started = Instant::now();
        let review = Review::decode(body)?;
        let (action, dry_run) = (Action::of(&review, &self.conventions), review.is_dry_run());
        let mut reply = Reply::allow(review.uid());
        let admitted = match (hook, &action) {
            (Hook::Mutate, Action::Place(executor)) => self.place(executor, dry_run, &mut reply).await,
            (Hook::Mutate, Action::Learn(driver)) => self.learn(driver, dry_run, &mut reply).await,
            (Hook::Validate, Action::Release(executor)) => self.release(executor, dry_run).await,
            (Hook::Mutate, Action::Release(_)) | (Hook::Validate, Action::Place(_) | Action::Learn(_)) => {
                Admitted::left(IgnoreReason::OtherOperation)
            }
            (_, Action::Ignore(leave)) => Admitted::left(*leave),
        };
        self.metrics.admitted(admitted, started.elapsed());
        Ok(reply.encode())
    }

    async fn place(&self, executor: &Executor<'_>, dry_run: bool, reply: &mut Reply<'_>) -> Admitted {
        for invalid in &executor.invalid {
            self.warn(reply, invalid, "it is ignored, and the job's own holds");
        }
        let Placement { capacity, source, policy, counts } = self.decide(executor, dry_run, reply).await;
        reply.patch = self.conventions.patch(executor, capacity);
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
                "placed"
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
                "placed without the store"
            ),
        }
        Admitted {
            role: RoleLabel::Executor,
            operation: OperationLabel::Create,
            outcome: match (dry_run, source) {
                (true, _) => OutcomeLabel::DryRun,
                (false, Source::Degraded) => OutcomeLabel::Degraded,
                (false, _) => OutcomeLabel::Placed,
            },
        }
    }

    /// Asks the ledger; where it knows no policy, asks the cluster and then the ledger again; where
    /// there is no ledger to ask, decides by the closed form.
    async fn decide(&self, executor: &Executor<'_>, dry_run: bool, reply: &mut Reply<'_>) -> Placement {
        let mut request = PlaceRequest::of(executor);
        let mut policy =
            if request.overrides.spot_ratio.is_some() { PolicySource::Executor } else { PolicySource::Ledger };
        let mut known = executor.overrides.or(None);
        let mut answer = self.ask(executor, &request, dry_run).await;
        if matches!(answer, Ok(PlaceOutcome::NeedPolicy)) {
            let (told, jobs) = self.look_up(executor, &mut policy, reply).await;
            let complete = executor.overrides.or_default(jobs);
            known = Some(complete);
            if told {
                request.policy = Some(jobs);
            } else {
                // A default that nobody told must not be noted as the job's policy.
                request.overrides = complete.into();
            }
            answer = self.ask(executor, &request, dry_run).await;
        }
        let why = match answer {
            Ok(PlaceOutcome::Placed(Placed { capacity, is_new, counts })) => {
                let source = match (executor.required, is_new) {
                    (Some(_), _) => Source::Pinned,
                    (None, false) => Source::Reused,
                    (None, true) => Source::Ledger,
                };
                let policy = (source == Source::Ledger).then_some(policy);
                return Placement { capacity, source, policy, counts: Ok(counts) };
            }
            // A ledger that asks again though it was told is as good as none.
            Ok(PlaceOutcome::NeedPolicy) => {
                StoreError::InvalidReply("it asks for a policy that it was told".to_owned())
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
        Placement { capacity, source: Source::Degraded, policy, counts: Err(why) }
    }

    async fn ask(
        &self,
        executor: &Executor<'_>,
        request: &PlaceRequest<'_>,
        dry_run: bool,
    ) -> Result<PlaceOutcome, StoreError> {
        let call = if dry_run { StoreCall::Peek } else { StoreCall::Place };
        let asking = async {
            match dry_run {
                true => self.ledger.peek(executor.job, request).await,
                false => self.ledger.place(executor.job, request).await,
            }
        };
        self.metrics.timed(call, asking).await
    }

    /// The job's policy by its driver, and whether the cluster told it.
    async fn look_up(&self, executor: &Executor<'_>, from: &mut PolicySource, reply: &mut Reply<'_>) -> (bool, Policy) {
        let looked = self.drivers.policy(executor.job, executor.job_label).await;
        let (told, overrides, invalid) = match &*looked {
            DriverPolicy::Found { overrides, invalid } => (true, *overrides, invalid.as_slice()),
            DriverPolicy::NoDriver => (true, PolicyOverrides::default(), [].as_slice()),
            DriverPolicy::Failed(_) => (false, PolicyOverrides::default(), [].as_slice()),
        };
        self.metrics.looked_up(&looked);
        for invalid in invalid {
            self.warn_of_default(reply, invalid);
        }
        if *from != PolicySource::Executor {
            *from = match overrides.spot_ratio {
                Some(_) => PolicySource::Driver,
                None if invalid.iter().any(|invalid| invalid.field == PolicyField::SpotRatio) => PolicySource::Invalid,
                None => PolicySource::Default,
            };
        }
        (told, overrides.or_default(self.defaults))
    }

    async fn learn(&self, driver: &Driver<'_>, dry_run: bool, reply: &mut Reply<'_>) -> Admitted {
        for invalid in &driver.invalid {
            self.warn_of_default(reply, invalid);
        }
        let policy = driver.overrides.or_default(self.defaults);
        let (namespace, job, ratio, base) =
            (driver.job.namespace, driver.job.app_id, policy.spot_ratio, policy.on_demand_base);
        let invalid = driver.invalid.first().map(tracing::field::display);
        let mut outcome = OutcomeLabel::DryRun;
        if !dry_run {
            let learning = self.ledger.learn(driver.job, policy);
            outcome = match self.metrics.timed(StoreCall::Learn, learning).await {
                Ok(()) => {
                    tracing::info!(namespace, job, %ratio, base, invalid, "learned");
                    OutcomeLabel::Learned
                }
                Err(error) => {
                    tracing::warn!(namespace, job, %ratio, base, invalid, store = error.kind(), %error, "not learned; the first executor's look-up will find it");
                    OutcomeLabel::Degraded
                }
            };
        }
        Admitted { role: RoleLabel::Driver, operation: OperationLabel::Create, outcome }
    }

    async fn release(&self, executor: &Executor<'_>, dry_run: bool) -> Admitted {
        let (namespace, job, name) = (executor.job.namespace, executor.job.app_id, executor.key);
        let mut outcome = OutcomeLabel::DryRun;
        if !dry_run {
            let releasing = self.ledger.release(executor.job, executor.key, executor.uid);
            outcome = match self.metrics.timed(StoreCall::Release, releasing).await {
                Ok(Some(capacity)) => {
                    tracing::info!(namespace, job, executor = name, capacity = capacity.as_str(), "released");
                    OutcomeLabel::Released
                }
                Ok(None) => {
                    tracing::debug!(namespace, job, executor = name, "not in the ledger");
                    OutcomeLabel::Left
                }
                Err(error) => {
                    tracing::warn!(namespace, job, executor = name, store = error.kind(), %error, "not released");
                    OutcomeLabel::Degraded
                }
            };
        }
        Admitted { role: RoleLabel::Executor, operation: OperationLabel::Delete, outcome }
    }

    fn warn_of_default(&self, reply: &mut Reply<'_>, invalid: &InvalidField) {
        let default = PolicyOverrides::from(self.defaults).value(invalid.field).unwrap_or_default();
        self.warn(reply, invalid, &format!("using the default {default}"));
    }

    /// Tells whoever submits the pod, and whoever runs the cluster, of an annotation that is wrong.
    fn warn(&self, reply: &mut Reply<'_>, invalid: &InvalidField, holds: &str) {
        let annotation = self.conventions.annotation(invalid.field);
        self.metrics.invalid(invalid);
        reply.warnings.push(format!("{annotation}: {invalid}; {holds}"));
    }
}
