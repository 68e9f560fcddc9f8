//! What the webhook counts. Labels are enums: how many there can be is fixed when it is compiled.

use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use balancer_core::{Capacity, IgnoreReason, InvalidField};
use balancer_runtime::metric_labels::{CapacityLabel, InvalidFieldLabels, StoreErrorLabels};
use balancer_runtime::{label, label_sets};
use balancer_store::StoreError;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

use crate::drivers::DriverPolicy;
use crate::tls::Certificate;

label! {
    /// The role of an admitted pod.
    RoleLabel {
        /// An executor.
        Executor = "executor",
        /// A driver.
        Driver = "driver",
        /// Neither, or not told.
        Other = "other",
    }
}

label! {
    /// What was done to the pod.
    OperationLabel {
        /// It was created.
        Create = "create",
        /// It was deleted.
        Delete = "delete",
        /// Anything else.
        Other = "other",
    }
}

label! {
    /// What an admission came to.
    OutcomeLabel {
        /// The executor was placed.
        Placed = "placed",
        /// The executor left the ledger.
        Released = "released",
        /// The driver's policy was noted.
        Learned = "learned",
        /// Answered without the store.
        Degraded = "degraded",
        /// Answered, and nothing written.
        DryRun = "dry_run",
        /// Nothing of ours.
        Left = "left",
        /// An executor or driver without a job id.
        NoJob = "no_job",
    }
}

label! {
    /// Who told an executor's capacity.
    Source {
        /// The ledger, by the job's ratio.
        Ledger = "ledger",
        /// The ledger, which knew the executor.
        Reused = "reused",
        /// The closed form, or the pod itself, while the store was down.
        Degraded = "degraded",
        /// The pod itself.
        Pinned = "pinned",
    }
}

label! {
    /// Who told the ratio of a new placement.
    PolicySource {
        /// The executor's annotation.
        Executor = "executor",
        /// The driver's annotation, by a look-up.
        Driver = "driver",
        /// The ledger, which had learnt it.
        Ledger = "ledger",
        /// Nobody.
        Default = "default",
        /// The driver, wrongly: the default holds.
        Invalid = "invalid",
    }
}

label! {
    /// A call to the store.
    StoreCall {
        /// Decide and enter.
        Place = "place",
        /// Decide, for a dry run.
        Peek = "peek",
        /// Strike.
        Release = "release",
        /// Note a policy.
        Learn = "learn",
    }
}

label! {
    /// What a look-up of a driver came to.
    LookUpLabel {
        /// The driver was found.
        Found = "found",
        /// The job has none.
        NoDriver = "no_driver",
        /// The Kubernetes API did not tell.
        Failed = "failed",
    }
}

label! {
    /// Why a request got no admission.
    Refusal {
        /// No such path.
        Path = "path",
        /// Another method.
        Method = "method",
        /// Another content type.
        ContentType = "content_type",
        /// A body over the cap.
        TooLarge = "too_large",
        /// A body that did not come in time, or broke off.
        Body = "body",
        /// A body that is no AdmissionReview.
        Review = "review",
    }
}

/// The kind of an admission.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Admitted {
    /// Of what.
    pub role: RoleLabel,
    /// Doing what.
    pub operation: OperationLabel,
    /// With what end.
    pub outcome: OutcomeLabel,
}

impl Admitted {
    /// An admission that is none of ours.
    pub fn left(leave: IgnoreReason) -> Self {
        let outcome = if leave == IgnoreReason::NoJob { OutcomeLabel::NoJob } else { OutcomeLabel::Left };
        Self { role: RoleLabel::Other, operation: OperationLabel::Other, outcome }
    }
}

/// What an admission can come to.
const ADMITTED: [(RoleLabel, OperationLabel, OutcomeLabel); 12] = {
    use OperationLabel as Operation;
    use OutcomeLabel as Outcome;
    [
        (RoleLabel::Executor, Operation::Create, Outcome::Placed),
        (RoleLabel::Executor, Operation::Create, Outcome::Degraded),
        (RoleLabel::Executor, Operation::Create, Outcome::DryRun),
        (RoleLabel::Executor, Operation::Delete, Outcome::Released),
        (RoleLabel::Executor, Operation::Delete, Outcome::Left),
        (RoleLabel::Executor, Operation::Delete, Outcome::Degraded),
        (RoleLabel::Executor, Operation::Delete, Outcome::DryRun),
        (RoleLabel::Driver, Operation::Create, Outcome::Learned),
        (RoleLabel::Driver, Operation::Create, Outcome::Degraded),
        (RoleLabel::Driver, Operation::Create, Outcome::DryRun),
        (RoleLabel::Other, Operation::Other, Outcome::Left),
        (RoleLabel::Other, Operation::Other, Outcome::NoJob),
    ]
};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Placement {
    capacity: CapacityLabel,
    source: Source,
}

label_sets! {
    PolicyLabels { source: PolicySource }
    StoreLabels { call: StoreCall }
    LookUpLabels { outcome: LookUpLabel }
    RefusalLabels { reason: Refusal }
}

/// What is counted.
#[derive(Debug)]
pub struct Metrics {
    admissions: Family<Admitted, Counter>,
    admission_seconds: Histogram,
    placements: Family<Placement, Counter>,
    policies: Family<PolicyLabels, Counter>,
    store_seconds: Family<StoreLabels, Histogram>,
    store_errors: Family<StoreErrorLabels, Counter>,
    look_ups: Family<LookUpLabels, Counter>,
    refusals: Family<RefusalLabels, Counter>,
    invalid: Family<InvalidFieldLabels, Counter>,
    connections: Gauge,
}

/// From 50 µs, a placement from memory, to 6.5 s, past every budget that is the default.
fn latency() -> Histogram {
    Histogram::new(exponential_buckets(0.000_05, 2.0, 18))
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    /// All at nought.
    pub fn new() -> Self {
        let metrics = Self {
            admissions: Family::default(),
            admission_seconds: latency(),
            placements: Family::default(),
            policies: Family::default(),
            store_seconds: Family::new_with_constructor(latency),
            store_errors: Family::default(),
            look_ups: Family::default(),
            refusals: Family::default(),
            invalid: Family::default(),
            connections: Gauge::default(),
        };
        metrics.begin();
        metrics
    }

    /// All series are there from the start: a rate over one that appears with its first event does not
    /// see that event.
    fn begin(&self) {
        for (role, operation, outcome) in ADMITTED {
            drop(self.admissions.get_or_create(&Admitted { role, operation, outcome }));
        }
        for capacity in [CapacityLabel::Spot, CapacityLabel::OnDemand] {
            for &source in Source::ALL {
                drop(self.placements.get_or_create(&Placement { capacity, source }));
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
        for &outcome in LookUpLabel::ALL {
            drop(self.look_ups.get_or_create(&LookUpLabels { outcome }));
        }
        for &reason in Refusal::ALL {
            drop(self.refusals.get_or_create(&RefusalLabels { reason }));
        }
        for labels in InvalidFieldLabels::all() {
            drop(self.invalid.get_or_create(&labels));
        }
    }

    /// Shows all.
    pub fn register(&self, registry: &mut Registry, certificate: &Certificate) {
        let Self {
            admissions,
            admission_seconds,
            placements,
            policies,
            store_seconds,
            store_errors,
            look_ups,
            refusals,
            invalid,
            connections,
        } = self;
        registry.register("admissions", "Reviews answered", admissions.clone());
        registry.register_with_unit(
            "admission",
            "Time from a review's last byte to its answer",
            Unit::Seconds,
            admission_seconds.clone(),
        );
        registry.register("placements", "Executors placed, dry runs left out", placements.clone());
        registry.register("policies", "New placements by the ratio, by who told it", policies.clone());
        registry.register_with_unit("store", "Time for an answer of the store", Unit::Seconds, store_seconds.clone());
        registry.register("store_errors", "Calls that the store did not answer", store_errors.clone());
        registry.register(
            "driver_look_ups",
            "Admissions that asked the Kubernetes API for their job's driver, those that shared a look-up included",
            look_ups.clone(),
        );
        registry.register("refused_requests", "Requests that were no admission", refusals.clone());
        registry.register(
            "invalid_annotations",
            "Annotations that could not be read, and were warned of",
            invalid.clone(),
        );
        registry.register("connections", "Connections open", connections.clone());
        registry.register_with_unit(
            "certificate_expiry_timestamp",
            "When the served certificate expires, in Unix time",
            Unit::Seconds,
            certificate.expiry(),
        );
        registry.register(
            "certificate_reload_failures",
            "Looks at a changed certificate that cannot be used; the one before is served on",
            certificate.failures(),
        );
    }

    pub(crate) fn admitted(&self, admitted: Admitted, took: Duration) {
        self.admissions.get_or_create(&admitted).inc();
        self.admission_seconds.observe(took.as_secs_f64());
    }

    /// `policy` is who told the ratio, where one was used.
    pub(crate) fn placed(&self, capacity: Capacity, source: Source, policy: Option<PolicySource>) {
        self.placements.get_or_create(&Placement { capacity: capacity.into(), source }).inc();
        if let Some(source) = policy {
            self.policies.get_or_create(&PolicyLabels { source }).inc();
        }
    }

    pub(crate) fn looked_up(&self, looked: &DriverPolicy) {
        let outcome = match looked {
            DriverPolicy::Found { .. } => LookUpLabel::Found,
            DriverPolicy::NoDriver => LookUpLabel::NoDriver,
            DriverPolicy::Failed(_) => LookUpLabel::Failed,
        };
        self.look_ups.get_or_create(&LookUpLabels { outcome }).inc();
    }

    pub(crate) fn invalid(&self, invalid: &InvalidField) {
        self.invalid.get_or_create(&invalid.field.into()).inc();
    }

    pub(crate) fn refused(&self, reason: Refusal) {
        self.refusals.get_or_create(&RefusalLabels { reason }).inc();
    }

    /// Times a call to the store, and counts and logs its error.
    pub(crate) async fn timed<T>(
        &self,
        call: StoreCall,
        answer: impl Future<Output = Result<T, StoreError>>,
    ) -> Result<T, StoreError> {
        let started = Instant::now();
        let answer = answer.await;
        self.store_seconds.get_or_create(&StoreLabels { call }).observe(started.elapsed().as_secs_f64());
        if let Err(error) = &answer {
            self.store_errors.get_or_create(&StoreErrorLabels { kind: error.kind() }).inc();
            // The decision's own line tells the operator; this one tells why.
            tracing::debug!(call = call.as_str(), kind = error.kind(), %error, "the store did not answer");
        }
        answer
    }

    /// Counts a connection until the answer is dropped.
    pub(crate) fn connected(self: &Arc<Self>) -> Connected {
        self.connections.inc();
        Connected(Arc::clone(self))
    }
}

/// An open connection.
#[derive(Debug)]
pub(crate) struct Connected(Arc<Metrics>);

impl Drop for Connected {
    fn drop(&mut self) {
        self.0.connections.dec();
    }
}
