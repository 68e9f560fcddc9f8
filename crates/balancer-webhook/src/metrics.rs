//! The webhook's metrics. Labels are enums, so the number of series is fixed when the program is compiled.

use std::sync::Arc;
use std::time::{Duration, Instant};

use balancer_core::{Capacity, IgnoreReason, InvalidField, Operation};
use balancer_runtime::metric_labels::{CapacityLabel, InvalidFieldLabels, StoreErrorLabels};
use balancer_runtime::{label, label_sets};
use balancer_store::StoreError;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

use crate::drivers::{DriverPolicy, StatedBy};

label! {
    /// The role of a pod in an AdmissionReview.
    RoleLabel {
        /// An executor.
        Executor = "executor",
        /// A driver.
        Driver = "driver",
        /// Any other pod.
        Other = "other",
    }
}

label! {
    /// The operation of an AdmissionReview.
    OperationLabel {
        /// A creation.
        Create = "create",
        /// A deletion.
        Delete = "delete",
        /// Any other operation, or one on any other pod.
        Other = "other",
    }
}

label! {
    /// The outcome of an admission.
    OutcomeLabel {
        /// The executor was placed.
        Placed = "placed",
        /// The executor was removed from the ledger.
        Released = "released",
        /// The driver's policy was stored.
        PolicyRecorded = "policy_recorded",
        /// The store failed, and the review was answered without it.
        Degraded = "degraded",
        /// The lookup failed or was refused, and as far as is known the job is opted out: the executor was left unchanged.
        LookupFailed = "lookup_failed",
        /// The namespace is over its limit of new jobs, so the job has no ledger.
        NewJobLimit = "new_job_limit",
        /// A dry run: answered, and nothing was stored.
        DryRun = "dry_run",
        /// There was nothing to do.
        Ignored = "ignored",
        /// The executor or driver has no job id.
        NoJobId = "no_job_id",
        /// The executor, the driver or the job is opted out: the pod was left unchanged.
        OptedOut = "opted_out",
        /// The driver has no name yet, or the job may have another one: the lookup for its first executor finds its policy.
        PolicyNotRecorded = "policy_not_recorded",
        /// A defect: the pod was allowed unchanged.
        Panicked = "panicked",
    }
}

label! {
    /// What determined an executor's capacity.
    PlacementSource {
        /// The job's ratio and counts, in the ledger.
        Ledger = "ledger",
        /// The job's ratio would have sent the executor to spot, but spot is closed to the job.
        SpotClosed = "spot_closed",
        /// The executor probes spot, which was closed to the job.
        Probe = "probe",
        /// The ledger already had the executor.
        Existing = "existing",
        /// The store failed: the fallback formula, or the pod itself.
        Fallback = "fallback",
        /// The namespace is over its limit of new jobs: the fallback formula, or the pod itself.
        NewJobLimit = "new_job_limit",
        /// The pod itself requires the capacity.
        Required = "required",
    }
}

label! {
    /// Where the ratio of a new placement comes from.
    PolicySource {
        /// The executor's annotation.
        Executor = "executor",
        /// The driver's annotation, by a lookup.
        Driver = "driver",
        /// The annotation of the pod that owns the executor, by a lookup.
        Owner = "owner",
        /// The ledger.
        Ledger = "ledger",
        /// The default, because none of them has one.
        Default = "default",
        /// The default, because the annotation of the driver or owner is invalid.
        Invalid = "invalid",
    }
}

label! {
    /// A call to the store.
    StoreCall {
        /// Place an executor.
        Place = "place",
        /// Decide without storing anything, for a dry run.
        Peek = "peek",
        /// Remove an executor.
        Release = "release",
        /// Store a driver's policy.
        Learn = "learn",
    }
}

label! {
    /// The outcome of a driver lookup.
    LookupOutcome {
        /// The job has a live driver.
        Found = "found",
        /// The job has none, but a live pod owns the executor.
        Owner = "owner",
        /// The job has neither.
        NoDriver = "no_driver",
        /// Too many other lookups run or wait.
        Busy = "busy",
        /// The Kubernetes API did not answer, or not in time.
        Failed = "failed",
    }
}

label! {
    /// Why a request was rejected.
    RejectReason {
        /// No such path.
        Path = "path",
        /// A review without an admission token, or with a wrong one.
        Token = "token",
        /// Another method.
        Method = "method",
        /// Another content type.
        ContentType = "content_type",
        /// The body is over the limit.
        TooLarge = "too_large",
        /// The body was incomplete, or not complete in time.
        Body = "body",
        /// The body is not a valid AdmissionReview.
        Review = "review",
    }
}

label! {
    /// Why a connection was closed to make room for another.
    EvictReason {
        /// No request was complete.
        NoRequest = "no_request",
        /// No request was a review that was accepted.
        NoReview = "no_review",
        /// It was idle for the longest time.
        Idle = "idle",
    }
}

/// The labels of one admission.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct AdmissionLabels {
    /// The role of the pod.
    pub role: RoleLabel,
    /// What happens to the pod.
    pub operation: OperationLabel,
    /// What the webhook did.
    pub outcome: OutcomeLabel,
}

impl AdmissionLabels {
    /// An admission during which the webhook panicked.
    pub const PANICKED: Self =
        Self { role: RoleLabel::Other, operation: OperationLabel::Other, outcome: OutcomeLabel::Panicked };

    /// An admission with nothing to do.
    pub fn ignored(reason: IgnoreReason, operation: Operation) -> Self {
        let (role, outcome) = match reason {
            IgnoreReason::NoJobId => (RoleLabel::Executor, OutcomeLabel::NoJobId),
            IgnoreReason::OptedOut => (RoleLabel::Executor, OutcomeLabel::OptedOut),
            _ => (RoleLabel::Other, OutcomeLabel::Ignored),
        };
        let operation = match (role, operation) {
            (RoleLabel::Executor, Operation::Create) => OperationLabel::Create,
            (RoleLabel::Executor, Operation::Delete) => OperationLabel::Delete,
            _ => OperationLabel::Other,
        };
        Self { role, operation, outcome }
    }
}

/// Every combination of labels that an admission can have.
const ADMISSIONS: [(RoleLabel, OperationLabel, OutcomeLabel); 22] = {
    use OperationLabel as Operation;
    use OutcomeLabel as Outcome;
    [
        (RoleLabel::Executor, Operation::Create, Outcome::Placed),
        (RoleLabel::Executor, Operation::Create, Outcome::Degraded),
        (RoleLabel::Executor, Operation::Create, Outcome::LookupFailed),
        (RoleLabel::Executor, Operation::Create, Outcome::NewJobLimit),
        (RoleLabel::Executor, Operation::Create, Outcome::DryRun),
        (RoleLabel::Executor, Operation::Create, Outcome::OptedOut),
        (RoleLabel::Executor, Operation::Create, Outcome::NoJobId),
        (RoleLabel::Executor, Operation::Delete, Outcome::Released),
        (RoleLabel::Executor, Operation::Delete, Outcome::Ignored),
        (RoleLabel::Executor, Operation::Delete, Outcome::Degraded),
        (RoleLabel::Executor, Operation::Delete, Outcome::DryRun),
        (RoleLabel::Executor, Operation::Delete, Outcome::OptedOut),
        (RoleLabel::Executor, Operation::Delete, Outcome::NoJobId),
        (RoleLabel::Driver, Operation::Create, Outcome::PolicyRecorded),
        (RoleLabel::Driver, Operation::Create, Outcome::Degraded),
        (RoleLabel::Driver, Operation::Create, Outcome::NewJobLimit),
        (RoleLabel::Driver, Operation::Create, Outcome::DryRun),
        (RoleLabel::Driver, Operation::Create, Outcome::OptedOut),
        (RoleLabel::Driver, Operation::Create, Outcome::PolicyNotRecorded),
        (RoleLabel::Driver, Operation::Create, Outcome::NoJobId),
        (RoleLabel::Other, Operation::Other, Outcome::Ignored),
        (RoleLabel::Other, Operation::Other, Outcome::Panicked),
    ]
};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PlacementLabels {
    capacity: CapacityLabel,
    source: PlacementSource,
}

label_sets! {
    PolicyLabels { source: PolicySource }
    StoreLabels { call: StoreCall }
    LookupLabels { outcome: LookupOutcome }
    RejectLabels { reason: RejectReason }
    EvictLabels { reason: EvictReason }
}

/// The webhook's metrics.
#[derive(Debug)]
pub struct Metrics {
    admissions: Family<AdmissionLabels, Counter>,
    admission_seconds: Histogram,
    placements: Family<PlacementLabels, Counter>,
    policies: Family<PolicyLabels, Counter>,
    store_seconds: Family<StoreLabels, Histogram>,
    store_errors: Family<StoreErrorLabels, Counter>,
    lookups: Family<LookupLabels, Counter>,
    rejected: Family<RejectLabels, Counter>,
    invalid_annotations: Family<InvalidFieldLabels, Counter>,
    connections: Gauge,
    evicted: Family<EvictLabels, Counter>,
    certificate: CertificateMetrics,
    token_reload_failures: Counter,
}

/// The metrics of the served certificate. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct CertificateMetrics {
    pub(crate) expiry: Gauge,
    pub(crate) reload_failures: Counter,
}

/// From 50 µs, a placement in memory, to 6.5 s, more than the default budget of an admission.
fn latency() -> Histogram {
    Histogram::new(exponential_buckets(0.000_05, 2.0, 18))
}

impl Metrics {
    /// Registers all metrics, each with all its series: a rate over a series that appears with its first event
    /// does not include that event.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self {
            admissions: Family::default(),
            admission_seconds: latency(),
            placements: Family::default(),
            policies: Family::default(),
            store_seconds: Family::new_with_constructor(latency),
            store_errors: Family::default(),
            lookups: Family::default(),
            rejected: Family::default(),
            invalid_annotations: Family::default(),
            connections: Gauge::default(),
            evicted: Family::default(),
            certificate: CertificateMetrics::default(),
            token_reload_failures: Counter::default(),
        };
        metrics.create_series();
        metrics.add_to(registry);
        metrics
    }

    fn create_series(&self) {
        for (role, operation, outcome) in ADMISSIONS {
            drop(self.admissions.get_or_create(&AdmissionLabels { role, operation, outcome }));
        }
        for capacity in [CapacityLabel::Spot, CapacityLabel::OnDemand] {
            for &source in PlacementSource::ALL {
                drop(self.placements.get_or_create(&PlacementLabels { capacity, source }));
            }
        }
        for &source in PolicySource::ALL {
            drop(self.policies.get_or_create(&PolicyLabels { source }));
        }
        for &call in StoreCall::ALL {
            drop(self.store_seconds.get_or_create(&StoreLabels { call }));
        }
        for kind in StoreError::KINDS {
            drop(self.store_errors.get_or_create(&StoreErrorLabels { kind }));
        }
        for &outcome in LookupOutcome::ALL {
            drop(self.lookups.get_or_create(&LookupLabels { outcome }));
        }
        for &reason in RejectReason::ALL {
            drop(self.rejected.get_or_create(&RejectLabels { reason }));
        }
        for &reason in EvictReason::ALL {
            drop(self.evicted.get_or_create(&EvictLabels { reason }));
        }
        for labels in InvalidFieldLabels::all() {
            drop(self.invalid_annotations.get_or_create(&labels));
        }
    }

    fn add_to(&self, registry: &mut Registry) {
        let Self {
            admissions,
            admission_seconds,
            placements,
            policies,
            store_seconds,
            store_errors,
            lookups,
            rejected,
            invalid_annotations,
            connections,
            evicted,
            certificate: CertificateMetrics { expiry, reload_failures },
            token_reload_failures,
        } = self;
        registry.register(
            "admissions",
            "AdmissionReviews answered; role and operation are other if the pod is neither an executor nor a driver, or the \
             operation needs nothing; the release of an executor that is not in the ledger is ignored",
            admissions.clone(),
        );
        registry.register_with_unit(
            "admission",
            "Time from the last byte of an AdmissionReview to its answer",
            Unit::Seconds,
            admission_seconds.clone(),
        );
        registry.register(
            "placements",
            "Executors placed, without dry runs, by what determined the capacity: the job's ratio (ledger), the job's ratio \
             although there was no spot capacity and the executor thus goes to on-demand (spot_closed) or tries spot first \
             (probe), an earlier placement of the same executor (existing), the pod's own selector or affinity (required), or the fallback \
             formula because the store failed (fallback) or the namespace is over MAX_NEW_JOBS_PER_MINUTE (new_job_limit)",
            placements.clone(),
        );
        registry.register("policies", "New placements by a ratio, by where the ratio comes from", policies.clone());
        registry.register_with_unit("store", "Duration of calls to the store", Unit::Seconds, store_seconds.clone());
        registry.register("store_errors", "Calls to the store that failed", store_errors.clone());
        registry.register(
            "driver_lookups",
            "Admissions that needed the job's driver from the Kubernetes API, or the pod that owns the executor if there is no \
             driver (owner); concurrent ones of a job share one lookup, and busy means that too many others of the \
             namespace ran or waited",
            lookups.clone(),
        );
        registry.register(
            "rejected_requests",
            "Requests that were not a valid AdmissionReview, or a review without an admission token (token)",
            rejected.clone(),
        );
        registry.register(
            "invalid_annotations",
            "Annotations with an invalid value; the value was ignored and the submitter warned",
            invalid_annotations.clone(),
        );
        registry.register("connections", "Open connections", connections.clone());
        registry.register(
            "connections_evicted",
            "Connections closed to make room for another when there were too many, by what they had done: no complete \
             request (no_request), no accepted review (no_review), or nothing for the longest time (idle)",
            evicted.clone(),
        );
        registry.register_with_unit(
            "certificate_expiry_timestamp",
            "When the served certificate expires, as a Unix time",
            Unit::Seconds,
            expiry.clone(),
        );
        registry.register(
            "certificate_reload_failures",
            "Failed attempts to load a changed certificate, one every five seconds; the previous one stays in use",
            reload_failures.clone(),
        );
        registry.register(
            "admission_token_reload_failures",
            "Failed attempts to load changed admission tokens, one every five seconds; the previous ones stay in use",
            token_reload_failures.clone(),
        );
    }

    /// The metrics of the certificate, for the code that loads it.
    pub fn certificate(&self) -> CertificateMetrics {
        self.certificate.clone()
    }

    /// Counts failures to load changed admission tokens, for the code that loads them.
    pub fn token_reload_failures(&self) -> Counter {
        self.token_reload_failures.clone()
    }

    pub(crate) fn admitted(&self, labels: AdmissionLabels, took: Duration) {
        self.admissions.get_or_create(&labels).inc();
        self.admission_seconds.observe(took.as_secs_f64());
    }

    /// Counts a placement. `policy` is where its ratio comes from, if a ratio was used.
    pub(crate) fn placed(&self, capacity: Capacity, source: PlacementSource, policy: Option<PolicySource>) {
        self.placements.get_or_create(&PlacementLabels { capacity: capacity.into(), source }).inc();
        if let Some(source) = policy {
            self.policies.get_or_create(&PolicyLabels { source }).inc();
        }
    }

    pub(crate) fn looked_up(&self, policy: &DriverPolicy) {
        let outcome = match policy {
            DriverPolicy::Found { by: StatedBy::Driver, .. } => LookupOutcome::Found,
            DriverPolicy::Found { by: StatedBy::Owner, .. } => LookupOutcome::Owner,
            DriverPolicy::NoDriver => LookupOutcome::NoDriver,
            DriverPolicy::Busy => LookupOutcome::Busy,
            DriverPolicy::Failed(_) => LookupOutcome::Failed,
        };
        self.lookups.get_or_create(&LookupLabels { outcome }).inc();
    }

    pub(crate) fn invalid_annotation(&self, invalid: &InvalidField) {
        self.invalid_annotations.get_or_create(&invalid.field.into()).inc();
    }

    pub(crate) fn rejected(&self, reason: RejectReason) {
        self.rejected.get_or_create(&RejectLabels { reason }).inc();
    }

    pub(crate) fn evicted(&self, reason: EvictReason) {
        self.evicted.get_or_create(&EvictLabels { reason }).inc();
    }

    /// Measures a call to the store that began at `started`, and counts and logs its error.
    ///
    /// It does not take the call's future: an async function would keep that twice, and hyper moves all of it with every
    /// request.
    pub(crate) fn called<T>(&self, call: StoreCall, started: Instant, answer: &Result<T, StoreError>) {
        self.store_seconds.get_or_create(&StoreLabels { call }).observe(started.elapsed().as_secs_f64());
        if let Err(error) = answer {
            self.store_errors.get_or_create(&StoreErrorLabels { kind: error.kind() }).inc();
            // The line of the decision warns the operator; this line has the first of two failed calls, too.
            tracing::debug!(call = call.as_str(), kind = error.kind(), %error, "the store failed");
        }
    }

    #[cfg(test)]
    pub(crate) fn placements(&self, capacity: Capacity, source: PlacementSource) -> u64 {
        self.placements.get_or_create(&PlacementLabels { capacity: capacity.into(), source }).get()
    }

    #[cfg(test)]
    pub(crate) fn policies(&self, source: PolicySource) -> u64 {
        self.policies.get_or_create(&PolicyLabels { source }).get()
    }

    #[cfg(test)]
    pub(crate) fn lookups(&self, outcome: LookupOutcome) -> u64 {
        self.lookups.get_or_create(&LookupLabels { outcome }).get()
    }

    #[cfg(test)]
    pub(crate) fn admissions(&self, labels: AdmissionLabels) -> u64 {
        self.admissions.get_or_create(&labels).get()
    }

    /// Counts a connection until the returned guard is dropped.
    pub(crate) fn connected(self: &Arc<Self>) -> ConnectionGuard {
        self.connections.inc();
        ConnectionGuard(Arc::clone(self))
    }
}

/// An open connection.
#[derive(Debug)]
pub(crate) struct ConnectionGuard(Arc<Metrics>);

impl Drop for ConnectionGuard {
    fn drop(&mut self) {
        self.0.connections.dec();
    }
}
