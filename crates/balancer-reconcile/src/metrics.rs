//! The metrics of the reconciler.

use std::collections::BTreeSet;
use std::iter::once;
use std::sync::atomic::AtomicU64;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use balancer_core::{Drift, LedgerFault, PolicyField};
use balancer_runtime::metric_labels::{CapacityLabel, InvalidFieldLabels, StoreErrorLabels};
use balancer_runtime::{label, label_sets};
use balancer_store::StoreError;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Metric, Registry, Unit};

use crate::blast_radius::Tenths;
use crate::fallback::Failure;
use crate::index::{NamespaceTotals, Totals};

label! {
    /// How an executor was wrong in a ledger.
    DriftKind {
        /// A live executor was not in it.
        Missing = "missing",
        /// An entry had no live executor.
        Stale = "stale",
        /// An executor counted as the other capacity.
        WrongCapacity = "wrong_capacity",
    }
}

label! {
    /// The outcome of an attempt to reconcile a job's ledger.
    JobOutcome {
        /// The ledger had no drift.
        InSync = "in_sync",
        /// Drift was corrected.
        Corrected = "corrected",
        /// Another process leads by now. Nothing was changed.
        Superseded = "superseded",
        /// The call to the store failed.
        Failed = "failed",
    }
}

label! {
    /// Why all jobs were reconciled.
    Cause {
        /// This process has started to lead.
        Start = "start",
        /// The interval is over, or a namespace is in sync again.
        Interval = "interval",
        /// The store was not reachable, or has lost data.
        Store = "store",
    }
}

label! {
    /// What was invalid in a ledger.
    FaultLabel {
        /// Its term was later than any that a Lease reaches.
        Term = "term",
        /// Something else than an admission or a reconcile had changed its policy.
        Policy = "policy",
        /// A key held something else than a ledger.
        Type = "type",
    }
}

impl From<LedgerFault> for FaultLabel {
    fn from(fault: LedgerFault) -> Self {
        match fault {
            LedgerFault::Term => Self::Term,
            LedgerFault::Type => Self::Type,
        }
    }
}

label! {
    /// A watched resource.
    WatchedLabel {
        /// Executors and drivers.
        Pods = "pods",
        /// Nodes.
        Nodes = "nodes",
    }
}

label! {
    /// The upper bound of a share.
    ShareLabel {
        /// A tenth.
        Tenth = "0.1",
        /// Two tenths.
        TwoTenths = "0.2",
        /// Three tenths.
        ThreeTenths = "0.3",
        /// Four tenths.
        FourTenths = "0.4",
        /// Five tenths.
        FiveTenths = "0.5",
        /// Six tenths.
        SixTenths = "0.6",
        /// Seven tenths.
        SevenTenths = "0.7",
        /// Eight tenths.
        EightTenths = "0.8",
        /// Nine tenths.
        NineTenths = "0.9",
        /// The whole job.
        Whole = "1.0",
        /// The same, because `histogram_quantile` requires it.
        Infinity = "+Inf",
    }
}

label! {
    /// What became of an attempt to replace an executor that found no spot node.
    ReplacedLabel {
        /// It was deleted.
        Deleted = "deleted",
        /// It did not exist any more.
        Gone = "gone",
        /// It had changed, so it was left alone.
        Changed = "changed",
        /// This process lacks the right.
        Forbidden = "forbidden",
        /// The Kubernetes API did not do it.
        Failed = "failed",
    }
}

label! {
    /// How the state of spot changed for a job.
    SpotLabel {
        /// New executors go to on-demand.
        Closed = "closed",
        /// The ratio alone decides.
        Open = "open",
    }
}

impl From<Failure> for ReplacedLabel {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Forbidden => Self::Forbidden,
            Failure::Unavailable => Self::Failed,
        }
    }
}

label_sets! {
    ShareLabels { le: ShareLabel }
    DriftLabels { kind: DriftKind }
    JobLabels { outcome: JobOutcome }
    FaultLabels { fault: FaultLabel }
    CauseLabels { cause: Cause }
    WatchLabels { resource: WatchedLabel }
    ExecutorLabels { capacity: CapacityLabel }
    ReplacedLabels { outcome: ReplacedLabel }
    SpotLabels { to: SpotLabel }
}

/// The labels of a namespace's series. Not `namespace`, which is that of the scraped pod.
type NamespaceLabels = [(&'static str, String); 1];

fn of_namespace(namespace: &str) -> NamespaceLabels {
    [("job_namespace", namespace.to_owned())]
}

/// The metrics.
#[derive(Debug)]
pub struct Metrics {
    drift: Family<DriftLabels, Counter>,
    reconciled_jobs: Family<JobLabels, Counter>,
    refused_placements: Counter,
    repaired_ledgers: Family<FaultLabels, Counter>,
    lag_seconds: Histogram,
    resyncs: Family<CauseLabels, Counter>,
    resync_seconds: Histogram,
    watch_restarts: Family<WatchLabels, Counter>,
    relist_failures: Family<WatchLabels, Counter>,
    store_errors: Family<StoreErrorLabels, Counter>,
    invalid_annotations: Family<InvalidFieldLabels, Counter>,
    live_jobs: Gauge,
    live_executors: Family<ExecutorLabels, Gauge>,
    namespace_executors: Family<NamespaceLabels, Gauge>,
    namespace_spot_executors: Family<NamespaceLabels, Gauge>,
    namespace_wanted_spot_executors: Family<NamespaceLabels, Gauge<f64, AtomicU64>>,
    /// The namespaces that have series now.
    namespaces: Mutex<BTreeSet<String>>,
    leader: Gauge,
    unschedulable_executors: Gauge,
    jobs_by_largest_node_share: Family<ShareLabels, Gauge>,
    jobs_by_largest_pool_share: Family<ShareLabels, Gauge>,
    spot_closed_jobs: Gauge,
    spot_closed_oldest_seconds: Gauge,
    executors_replaced: Family<ReplacedLabels, Counter>,
    spot_transitions: Family<SpotLabels, Counter>,
}

fn register<M: Metric + Clone + Default>(registry: &mut Registry, name: &str, help: &str) -> M {
    let metric = M::default();
    registry.register(name, help, metric.clone());
    metric
}

impl Metrics {
    /// Registers all metrics: those about executors by their own names, and those about the reconciler's work under names
    /// that begin with `reconcile`.
    pub fn register(registry: &mut Registry) -> Self {
        // From 10 ms, which is less than the debounce of a loss, to 82 s.
        let seconds = || Histogram::new(exponential_buckets(0.01, 2.0, 14));
        let unschedulable_executors = register(
            registry,
            "unschedulable_executors",
            "Executors that have been unschedulable for more than a minute with selectors of ours; 0 unless this process \
             leads",
        );
        let jobs_by_largest_node_share = register(
            registry,
            "jobs_by_largest_node_share",
            "Jobs with at least 2 bound executors of which at most the share le is on one node; 0 unless this process leads",
        );
        let jobs_by_largest_pool_share = register(
            registry,
            "jobs_by_largest_pool_share",
            "Jobs with at least 2 bound executors of which at most the share le is on spot nodes of one instance type in one \
             zone; 0 unless this process leads",
        );
        let spot_closed_jobs = register(
            registry,
            "spot_closed_jobs",
            "Jobs whose new executors go to on-demand because there was no spot capacity; 0 unless this process leads",
        );
        let spot_closed_oldest_seconds = register(
            registry,
            "spot_closed_oldest_seconds",
            "For how long this has been so for the first of these jobs; 0 if there is none",
        );
        let executors_replaced = register(
            registry,
            "executors_replaced",
            "Attempts to replace an executor that found no spot node by one on on-demand",
        );
        let spot_transitions = register(registry, "spot_transitions", "Jobs for which spot was closed or opened again");
        let registry = registry.sub_registry_with_prefix("reconcile");
        let metrics = Self {
            drift: register(registry, "drift", "Executors that were wrong in a ledger, and were corrected"),
            reconciled_jobs: register(registry, "jobs", "Attempts to reconcile a job's ledger, by outcome"),
            refused_placements: register(
                registry,
                "refused_placements",
                "Placements that were removed because the Kubernetes API has no pod for them",
            ),
            repaired_ledgers: register(
                registry,
                "repaired_ledgers",
                "Ledgers that something else had changed, and that were repaired",
            ),
            lag_seconds: seconds(),
            resyncs: register(registry, "resyncs", "Passes over all jobs, by cause"),
            resync_seconds: seconds(),
            watch_restarts: register(registry, "watch_restarts", "Watches that were disconnected and restarted"),
            relist_failures: register(
                registry,
                "relist_failures",
                "Lists next to a watch, which find what it has missed, that failed",
            ),
            store_errors: register(registry, "store_errors", "Failed calls to the store"),
            invalid_annotations: register(
                registry,
                "invalid_annotations",
                "Invalid annotations of drivers; the last valid value stays in use",
            ),
            live_jobs: register(
                registry,
                "live_jobs",
                "Jobs with a live pod that have not opted out; 0 unless this process leads",
            ),
            live_executors: register(
                registry,
                "live_executors",
                "Live executors of these jobs by the capacity that they run on or must run on; 0 unless this process leads",
            ),
            namespace_executors: register(
                registry,
                "namespace_executors",
                "Live executors of jobs with a ratio, of the 20 namespaces that have most and of all others together; none unless this process leads",
            ),
            namespace_spot_executors: register(
                registry,
                "namespace_spot_executors",
                "Those of them that run on spot or must run there",
            ),
            namespace_wanted_spot_executors: register(
                registry,
                "namespace_wanted_spot_executors",
                "How many of them the ratios and bases of their jobs want on spot",
            ),
            namespaces: Mutex::default(),
            leader: register(
                registry,
                "leader",
                "1 if this process may change ledgers now: it leads, its lists are complete and the store is up; else 0",
            ),
            unschedulable_executors,
            jobs_by_largest_node_share,
            jobs_by_largest_pool_share,
            spot_closed_jobs,
            spot_closed_oldest_seconds,
            executors_replaced,
            spot_transitions,
        };
        registry.register_with_unit(
            "lag",
            "Time from the first event of a job's change until its ledger is reconciled",
            Unit::Seconds,
            metrics.lag_seconds.clone(),
        );
        registry.register_with_unit(
            "resync",
            "Time of a pass over all jobs, including the lists before it",
            Unit::Seconds,
            metrics.resync_seconds.clone(),
        );
        metrics.create_all_series();
        metrics
    }

    /// A rate over a series that appears with its first event does not count that event.
    fn create_all_series(&self) {
        for &kind in DriftKind::ALL {
            drop(self.drift.get_or_create(&DriftLabels { kind }));
        }
        for &outcome in JobOutcome::ALL {
            drop(self.reconciled_jobs.get_or_create(&JobLabels { outcome }));
        }
        for &fault in FaultLabel::ALL {
            drop(self.repaired_ledgers.get_or_create(&FaultLabels { fault }));
        }
        for &cause in Cause::ALL {
            drop(self.resyncs.get_or_create(&CauseLabels { cause }));
        }
        for &resource in WatchedLabel::ALL {
            drop(self.watch_restarts.get_or_create(&WatchLabels { resource }));
            drop(self.relist_failures.get_or_create(&WatchLabels { resource }));
        }
        for kind in StoreError::KINDS {
            drop(self.store_errors.get_or_create(&StoreErrorLabels { kind }));
        }
        for labels in InvalidFieldLabels::all() {
            drop(self.invalid_annotations.get_or_create(&labels));
        }
        for &outcome in ReplacedLabel::ALL {
            drop(self.executors_replaced.get_or_create(&ReplacedLabels { outcome }));
        }
        for &to in SpotLabel::ALL {
            drop(self.spot_transitions.get_or_create(&SpotLabels { to }));
        }
        self.set_live(Totals::default());
        self.set_shares(Default::default());
    }

    pub(crate) fn reconciled(&self, outcome: JobOutcome) {
        self.reconciled_jobs.get_or_create(&JobLabels { outcome }).inc();
    }

    pub(crate) fn corrected(&self, drift: Drift) {
        let Drift { missing, stale, wrong_capacity } = drift;
        let kinds =
            [(DriftKind::Missing, missing), (DriftKind::Stale, stale), (DriftKind::WrongCapacity, wrong_capacity)];
        for (kind, executors) in kinds {
            self.drift.get_or_create(&DriftLabels { kind }).inc_by(executors);
        }
    }

    pub(crate) fn refused(&self, placements: u64) {
        self.refused_placements.inc_by(placements);
    }

    pub(crate) fn repaired(&self, fault: FaultLabel) {
        self.repaired_ledgers.get_or_create(&FaultLabels { fault }).inc();
    }

    pub(crate) fn lagged(&self, lag: Duration) {
        self.lag_seconds.observe(lag.as_secs_f64());
    }

    pub(crate) fn resynced(&self, cause: Cause, took: Duration) {
        self.resyncs.get_or_create(&CauseLabels { cause }).inc();
        self.resync_seconds.observe(took.as_secs_f64());
    }

    pub(crate) fn watch_restarted(&self, resource: WatchedLabel) {
        self.watch_restarts.get_or_create(&WatchLabels { resource }).inc();
    }

    pub(crate) fn relist_failed(&self, resource: WatchedLabel) {
        self.relist_failures.get_or_create(&WatchLabels { resource }).inc();
    }

    pub(crate) fn store_failed(&self, error: &StoreError) {
        self.store_errors.get_or_create(&StoreErrorLabels { kind: error.kind() }).inc();
    }

    pub(crate) fn invalid(&self, field: PolicyField) {
        self.invalid_annotations.get_or_create(&field.into()).inc();
    }

    pub(crate) fn set_live(&self, totals: Totals) {
        let Totals { jobs, spot, on_demand, unknown, namespaces } = totals;
        let gauge = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
        self.live_jobs.set(gauge(jobs));
        let capacities =
            [(CapacityLabel::Spot, spot), (CapacityLabel::OnDemand, on_demand), (CapacityLabel::Unknown, unknown)];
        for (capacity, executors) in capacities {
            self.live_executors.get_or_create(&ExecutorLabels { capacity }).set(gauge(executors));
        }
        let mut before = self.namespaces.lock().unwrap_or_else(PoisonError::into_inner);
        let mut shown = BTreeSet::from([NamespaceTotals::OTHERS.to_owned()]);
        let none = NamespaceTotals { namespace: NamespaceTotals::OTHERS.to_owned(), ..NamespaceTotals::default() };
        for totals in once(none).chain(namespaces) {
            let labels = of_namespace(&totals.namespace);
            self.namespace_executors.get_or_create(&labels).set(gauge(totals.executors));
            self.namespace_spot_executors.get_or_create(&labels).set(gauge(totals.spot));
            self.namespace_wanted_spot_executors.get_or_create(&labels).set(totals.wanted_spot);
            shown.insert(totals.namespace);
        }
        for gone in before.difference(&shown) {
            let labels = of_namespace(gone);
            self.namespace_executors.remove(&labels);
            self.namespace_spot_executors.remove(&labels);
            self.namespace_wanted_spot_executors.remove(&labels);
        }
        *before = shown;
    }

    pub(crate) fn set_unschedulable(&self, executors: usize) {
        self.unschedulable_executors.set(i64::try_from(executors).unwrap_or(i64::MAX));
    }

    /// Of the jobs by their largest share on a node, and in a pool.
    pub(crate) fn set_shares(&self, (nodes, pools): (Tenths, Tenths)) {
        for (gauges, tenths) in [(&self.jobs_by_largest_node_share, nodes), (&self.jobs_by_largest_pool_share, pools)] {
            let all = tenths.last().copied();
            for (&le, jobs) in ShareLabel::ALL.iter().zip(tenths.into_iter().chain(all)) {
                gauges.get_or_create(&ShareLabels { le }).set(i64::try_from(jobs).unwrap_or(i64::MAX));
            }
        }
    }

    pub(crate) fn set_spot_closed(&self, jobs: usize, oldest: Duration) {
        self.spot_closed_jobs.set(i64::try_from(jobs).unwrap_or(i64::MAX));
        self.spot_closed_oldest_seconds.set(i64::try_from(oldest.as_secs()).unwrap_or(i64::MAX));
    }

    pub(crate) fn replaced(&self, outcome: ReplacedLabel) {
        self.executors_replaced.get_or_create(&ReplacedLabels { outcome }).inc();
    }

    pub(crate) fn spot_changed(&self, to: SpotLabel) {
        self.spot_transitions.get_or_create(&SpotLabels { to }).inc();
    }

    pub(crate) fn set_leads(&self, leads: bool) {
        self.leader.set(leads.into());
    }
}
