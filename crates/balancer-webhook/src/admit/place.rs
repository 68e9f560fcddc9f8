//! Places a created executor: asks the ledger, and the Kubernetes API if the ledger has no policy of the job.

use std::time::Instant;

use balancer_core::{
    Capacity, Counts, Executor, PlaceOutcome, PlaceRequest, Placed, Policy, PolicyField, PolicyOverrides, Ratio, Reply,
    SpotAnswer, SpotRatio, Spread, decide_without_ledger,
};
use balancer_store::{Ledger, StoreError};

use super::Admission;
use crate::drivers::{DriverPolicy, JobQuery, StatedBy};
use crate::metrics::{
    AdmissionLabels, OperationLabel, OutcomeLabel, PlacementSource, PolicySource, RoleLabel, StoreCall,
};

/// The most characters of a pod's requirements in a warning.
const MAX_REQUIREMENTS: usize = 200;

/// How one executor is placed.
#[derive(Clone, Debug)]
struct Decision {
    capacity: Capacity,
    source: PlacementSource,
    /// Where the ratio comes from, if one was used.
    policy: Option<PolicySource>,
    /// Where on spot it should run.
    spread: Spread,
    ledger: LedgerState,
}

/// What the ledger contributed to a decision.
#[derive(Clone, Debug)]
enum LedgerState {
    /// The executor is in it, with these counts of the job.
    Counted(Counts),
    /// The job has none, because the namespace is over its limit of new jobs.
    NewJobLimit,
    /// The store failed.
    Failed(StoreError),
}

/// The executor is left unchanged, because its job is opted out.
#[derive(Clone, Copy, Debug)]
struct OptedOut {
    /// Where that is stated.
    by: PolicySource,
    /// Whether the job's driver was found, or surely has none. If its lookup failed or was refused, the job may state a
    /// ratio.
    is_certain: bool,
}

impl<L: Ledger> Admission<L> {
    pub(super) async fn place(&self, executor: &Executor<'_>, dry_run: bool, reply: &mut Reply<'_>) -> AdmissionLabels {
        for invalid in &executor.invalid {
            let used = match invalid.field {
                PolicyField::SpotRatio => "the job's ratio",
                _ => "the job's value",
            };
            self.warn(reply, invalid, used);
        }
        let Decision { capacity, source, policy, spread, ledger } = match self.decide(executor, dry_run, reply).await {
            Ok(decision) => decision,
            Err(opted_out) => return opted_out.report(executor, dry_run),
        };
        if let Some(required) = executor.required.filter(|_| !executor.is_placed) {
            self.warn_without_effect(executor, required, reply);
        }
        reply.patch = self.conventions.profile().apply(executor.pod, capacity, executor.placeholder, &spread);
        if capacity == Capacity::Spot
            && let Some(limit) = spread.max_executors_per_node.filter(|limit| *limit > 0)
        {
            self.warn_of_limit(executor, limit, reply);
        }
        if !dry_run {
            self.metrics.placed(capacity, source, policy);
        }
        let (namespace, job) = (executor.job.namespace, executor.job.app_id);
        let (name, capacity, policy) = (executor.key, capacity.as_str(), policy.map(PolicySource::as_str));
        let source_name = source.as_str();
        let message = match source {
            PlacementSource::SpotClosed => {
                "executor placed on on-demand, because there is no spot capacity for its job"
            }
            PlacementSource::Probe => "executor placed on spot, to find out whether there is spot capacity again",
            _ => "executor placed",
        };
        match ledger {
            LedgerState::Counted(Counts { spot, on_demand }) => tracing::info!(
                namespace,
                job,
                executor = name,
                capacity,
                source = source_name,
                policy,
                spot,
                on_demand,
                dry_run,
                "{message}"
            ),
            LedgerState::NewJobLimit => tracing::info!(
                namespace,
                job,
                executor = name,
                capacity,
                source = source_name,
                policy,
                dry_run,
                "executor placed without a ledger"
            ),
            LedgerState::Failed(error) => tracing::warn!(
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
                (false, PlacementSource::NewJobLimit) => OutcomeLabel::NewJobLimit,
                (false, _) => OutcomeLabel::Placed,
            },
        }
    }

    /// Calls the ledger. If the ledger has no policy for the job, looks the driver up and calls the ledger again.
    /// If the ledger fails, or the job may not get one, decides by the fallback formula.
    async fn decide(
        &self,
        executor: &Executor<'_>,
        dry_run: bool,
        reply: &mut Reply<'_>,
    ) -> Result<Decision, OptedOut> {
        let mut request = PlaceRequest::of(executor);
        let mut policy =
            if request.overrides.spot_ratio.is_some() { PolicySource::Executor } else { PolicySource::Ledger };
        // The executor alone may state what decides on its capacity.
        let mut known = executor.overrides.or(None).map(|_| executor.overrides.or_default(self.defaults));
        let mut is_certain = true;
        let mut outcome = self.ask_ledger(executor, &mut request, dry_run).await;
        if matches!(outcome, Ok(PlaceOutcome::NeedPolicy)) {
            // Boxed, because it is rare and its state is large.
            let jobs;
            (is_certain, jobs) = Box::pin(self.look_up(executor, &mut policy, reply)).await;
            let complete = executor.overrides.or_default(jobs);
            known = Some(complete);
            if is_certain {
                request.policy = Some(jobs);
            } else if complete.spot_ratio == SpotRatio::Off {
                return Err(OptedOut { by: policy, is_certain });
            } else {
                // The lookup failed or was refused. An older policy or the default is for this executor alone, and must not
                // be stored for the job.
                request.overrides = complete.into();
            }
            outcome = self.ask_ledger(executor, &mut request, dry_run).await;
        }
        let (source, ledger) = match outcome {
            Ok(PlaceOutcome::Placed(Placed { capacity, spot, spread, is_new, counts, .. })) => {
                let source = match (executor.required, spot) {
                    (Some(_), _) if executor.is_placed => PlacementSource::Existing,
                    (Some(_), _) => PlacementSource::Required,
                    (None, _) if !is_new => PlacementSource::Existing,
                    (None, SpotAnswer::Unchanged) => PlacementSource::Ledger,
                    (None, SpotAnswer::Closed) => PlacementSource::SpotClosed,
                    (None, SpotAnswer::Probe) => PlacementSource::Probe,
                };
                let is_by_ratio = !matches!(source, PlacementSource::Existing | PlacementSource::Required);
                let policy = is_by_ratio.then_some(policy);
                // The ledger lacks the job's policy if the executor states what decides on its capacity.
                let limit = spread.max_executors_per_node.or(executor.overrides.max_executors_per_node);
                let limit = limit.unwrap_or(self.defaults.max_executors_per_node);
                let spread = Spread { max_executors_per_node: Some(limit), ..spread };
                return Ok(Decision { capacity, source, policy, spread, ledger: LedgerState::Counted(counts) });
            }
            Ok(PlaceOutcome::NoLedger) => {
                self.report_new_job_limit(executor.job);
                (PlacementSource::NewJobLimit, LedgerState::NewJobLimit)
            }
            Ok(PlaceOutcome::NeedPolicy) => {
                let error = StoreError::InvalidReply("it needs a policy, although the request has one".to_owned());
                (PlacementSource::Fallback, LedgerState::Failed(error))
            }
            Ok(PlaceOutcome::OptedOut { .. }) => return Err(OptedOut { by: policy, is_certain: true }),
            Err(error) => (PlacementSource::Fallback, LedgerState::Failed(error)),
        };
        let known = match (executor.required, known) {
            (_, Some(known)) => known,
            (Some(_), None) => executor.overrides.or_default(self.defaults),
            (None, None) => {
                let jobs;
                (is_certain, jobs) = Box::pin(self.look_up(executor, &mut policy, reply)).await;
                executor.overrides.or_default(jobs)
            }
        };
        let capacity = executor.required.or_else(|| decide_without_ledger(executor.ordinal, known));
        let capacity = capacity.ok_or(OptedOut { by: policy, is_certain })?;
        let policy = executor.required.is_none().then_some(policy);
        let spread = Spread { max_executors_per_node: Some(known.max_executors_per_node), avoid: Vec::new() };
        Ok(Decision { capacity, source, policy, spread, ledger })
    }

    async fn ask_ledger(
        &self,
        executor: &Executor<'_>,
        request: &mut PlaceRequest<'_>,
        dry_run: bool,
    ) -> Result<PlaceOutcome, StoreError> {
        let now = Instant::now();
        // Again before the second call: a lookup takes long enough for many other new jobs.
        request.may_create = self.new_jobs.may_create(executor.job.namespace, now);
        let call = if dry_run { StoreCall::Peek } else { StoreCall::Place };
        let outcome = match dry_run {
            true => self.ledger.peek(executor.job, request).await,
            false => self.ledger.place(executor.job, request).await,
        };
        self.metrics.called(call, now, &outcome);
        let is_new_job = match outcome {
            Ok(PlaceOutcome::Placed(Placed { is_new_job, .. }) | PlaceOutcome::OptedOut { is_new_job }) => is_new_job,
            _ => false,
        };
        if is_new_job && !dry_run {
            self.new_jobs.created(executor.job.namespace, now);
        }
        outcome
    }

    /// The policy of the job by the annotations of its driver, or of the executor's owner, and the defaults; and whether it
    /// is certain: a lookup that failed or was refused leaves only what an earlier one found, and the defaults.
    async fn look_up(
        &self,
        executor: &Executor<'_>,
        source: &mut PolicySource,
        reply: &mut Reply<'_>,
    ) -> (bool, Policy) {
        let query = JobQuery::of(executor);
        let found = self.drivers.policy(query).await;
        self.metrics.looked_up(&found);
        let (certain, found) = match &*found {
            DriverPolicy::Found { .. } | DriverPolicy::NoDriver => (true, Some(found)),
            DriverPolicy::Busy | DriverPolicy::Failed(_) => (false, self.drivers.last_found(query)),
        };
        let (by, overrides, invalid) = match found.as_deref() {
            Some(DriverPolicy::Found { by, overrides, invalid }) => (*by, *overrides, invalid.as_slice()),
            _ => (StatedBy::Driver, PolicyOverrides::default(), [].as_slice()),
        };
        for invalid in invalid {
            self.warn_of_default(reply, invalid);
        }
        if *source != PolicySource::Executor {
            *source = match overrides.spot_ratio {
                Some(_) if by == StatedBy::Owner => PolicySource::Owner,
                Some(_) => PolicySource::Driver,
                None if invalid.iter().any(|invalid| invalid.field == PolicyField::SpotRatio) => PolicySource::Invalid,
                None => PolicySource::Default,
            };
        }
        (certain, overrides.or_default(self.defaults))
    }

    /// Warns the submitter if the limit of executors per node does not hold as it is stated.
    fn warn_of_limit(&self, executor: &Executor<'_>, limit: u32, reply: &mut Reply<'_>) {
        let annotation = self.conventions.annotation(PolicyField::MaxExecutorsPerNode);
        if self.conventions.profile().spreads_itself(executor.pod) {
            reply.warnings.push(format!(
                "{annotation}: {limit} has no effect on this executor, because its own topologySpreadConstraints have one with \
                 topologyKey kubernetes.io/hostname and whenUnsatisfiable DoNotSchedule"
            ));
        } else if let Some(version) = self.server_version.without_min_domains() {
            reply.warnings.push(format!(
                "{annotation}: Kubernetes {version} ignores minDomains, which needs 1.27 or later; the limit of {limit} holds \
                 only while some node that this executor may use has none of the job's executors"
            ));
        }
    }

    /// Warns the submitter that what the executor states has no effect, because it requires a capacity by itself.
    ///
    /// What its job states is not known here: the ledger keeps a default like a stated value. The reconciler, which has the
    /// driver, reports that with an Event.
    fn warn_without_effect(&self, executor: &Executor<'_>, required: Capacity, reply: &mut Reply<'_>) {
        let Some(field) = contradicted(&executor.overrides, required) else { return };
        let annotation = self.conventions.annotation(field);
        let value = executor.overrides.value(field).unwrap_or_default();
        let own = self.conventions.profile().requirements(executor.pod).own.join(" and ");
        // A selector can have any number of values, and an apiserver cuts long warnings.
        let own = own
            .char_indices()
            .nth(MAX_REQUIREMENTS)
            .map_or(own.as_str(), |(end, _)| own.get(..end).unwrap_or_default());
        reply.warnings.push(format!(
            "{annotation}: {value} has no effect on this executor, because its own nodeSelector or affinity requires {required} \
             capacity: {own}"
        ));
    }
}

impl OptedOut {
    /// Logs the job once at level info: only its first executor needs a lookup.
    fn report(self, executor: &Executor<'_>, dry_run: bool) -> AdmissionLabels {
        let (namespace, job) = (executor.job.namespace, executor.job.app_id);
        let (name, policy) = (executor.key, self.by.as_str());
        match self.by {
            _ if !self.is_certain => {
                tracing::warn!(
                    namespace,
                    job,
                    executor = name,
                    policy,
                    dry_run,
                    "executor left unchanged: the lookup of its driver failed, and as far as is known its job is opted out"
                );
            }
            PolicySource::Executor | PolicySource::Ledger => {
                tracing::debug!(
                    namespace,
                    job,
                    executor = name,
                    policy,
                    "executor left unchanged: its job is opted out"
                );
            }
            PolicySource::Driver | PolicySource::Owner | PolicySource::Default | PolicySource::Invalid => {
                tracing::info!(
                    namespace,
                    job,
                    executor = name,
                    policy,
                    "executor left unchanged: its job is opted out"
                );
            }
        }
        AdmissionLabels {
            role: RoleLabel::Executor,
            operation: OperationLabel::Create,
            outcome: match (self.is_certain, dry_run) {
                (true, _) => OutcomeLabel::OptedOut,
                (false, true) => OutcomeLabel::DryRun,
                (false, false) => OutcomeLabel::LookupFailed,
            },
        }
    }
}

/// The stated field that an executor with this requirement contradicts.
fn contradicted(stated: &PolicyOverrides, required: Capacity) -> Option<PolicyField> {
    let share = stated.spot_ratio.and_then(SpotRatio::share);
    let base = stated.on_demand_base.unwrap_or_default();
    match required {
        Capacity::Spot if share.is_some_and(|share| share < Ratio::ONE) => Some(PolicyField::SpotRatio),
        Capacity::Spot if base > 0 => Some(PolicyField::OnDemandBase),
        Capacity::OnDemand if share.is_some_and(|share| share > Ratio::ZERO) => Some(PolicyField::SpotRatio),
        Capacity::Spot | Capacity::OnDemand => None,
    }
}
