//! The metrics of the reconciler.

use std::time::Duration;

use balancer_core::{Drift, PolicyField};
use balancer_runtime::metric_labels::{CapacityLabel, InvalidFieldLabels, StoreErrorLabels};
use balancer_runtime::{label, label_sets};
use balancer_store::StoreError;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Metric, Registry, Unit};

use crate::index::Totals;

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
    /// A watched resource.
    WatchedLabel {
        /// Executors and drivers.
        Pods = "pods",
        /// Nodes.
        Nodes = "nodes",
    }
}

label_sets! {
    DriftLabels { kind: DriftKind }
    JobLabels { outcome: JobOutcome }
    CauseLabels { cause: Cause }
    WatchLabels { resource: WatchedLabel }
    ExecutorLabels { capacity: CapacityLabel }
}

/// The metrics.
#[derive(Debug)]
pub struct Metrics {
    drift: Family<DriftLabels, Counter>,
    reconciled_jobs: Family<JobLabels, Counter>,
    lag_seconds: Histogram,
    resyncs: Family<CauseLabels, Counter>,
    resync_seconds: Histogram,
    watch_restarts: Family<WatchLabels, Counter>,
    store_errors: Family<StoreErrorLabels, Counter>,
    invalid_annotations: Family<InvalidFieldLabels, Counter>,
    live_jobs: Gauge,
    live_executors: Family<ExecutorLabels, Gauge>,
    leader: Gauge,
}

fn register<M: Metric + Clone + Default>(registry: &mut Registry, name: &str, help: &str) -> M {
    let metric = M::default();
    registry.register(name, help, metric.clone());
    metric
}

impl Metrics {
    /// Registers all metrics, under names that begin with `reconcile`.
    pub fn register(registry: &mut Registry) -> Self {
        // From 10 ms, which is less than the debounce of a loss, to 82 s.
        let seconds = || Histogram::new(exponential_buckets(0.01, 2.0, 14));
        let registry = registry.sub_registry_with_prefix("reconcile");
        let metrics = Self {
            drift: register(registry, "drift", "Executors that were wrong in a ledger, and were corrected"),
            reconciled_jobs: register(registry, "jobs", "Attempts to reconcile a job's ledger, by outcome"),
            lag_seconds: seconds(),
            resyncs: register(registry, "resyncs", "Passes over all jobs, by cause"),
            resync_seconds: seconds(),
            watch_restarts: register(registry, "watch_restarts", "Watches that were disconnected and restarted"),
            store_errors: register(registry, "store_errors", "Failed calls to the store"),
            invalid_annotations: register(
                registry,
                "invalid_annotations",
                "Invalid annotations of drivers; the last valid value stays in use",
            ),
            live_jobs: register(registry, "live_jobs", "Jobs with a live pod; 0 unless this process leads"),
            live_executors: register(
                registry,
                "live_executors",
                "Live executors by the capacity that they run on or must run on; 0 unless this process leads",
            ),
            leader: register(registry, "leader", "1 if this process leads, else 0"),
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
        for &cause in Cause::ALL {
            drop(self.resyncs.get_or_create(&CauseLabels { cause }));
        }
        for &resource in WatchedLabel::ALL {
            drop(self.watch_restarts.get_or_create(&WatchLabels { resource }));
        }
        for kind in StoreError::KINDS {
            drop(self.store_errors.get_or_create(&StoreErrorLabels { kind }));
        }
        for labels in InvalidFieldLabels::all() {
            drop(self.invalid_annotations.get_or_create(&labels));
        }
        self.set_live(Totals::default());
    }

    pub(crate) fn reconciled(&self, outcome: JobOutcome, drift: Drift) {
        self.reconciled_jobs.get_or_create(&JobLabels { outcome }).inc();
        let Drift { missing, stale, wrong_capacity } = drift;
        let kinds =
            [(DriftKind::Missing, missing), (DriftKind::Stale, stale), (DriftKind::WrongCapacity, wrong_capacity)];
        for (kind, executors) in kinds {
            self.drift.get_or_create(&DriftLabels { kind }).inc_by(executors);
        }
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

    pub(crate) fn store_failed(&self, error: &StoreError) {
        self.store_errors.get_or_create(&StoreErrorLabels { kind: error.kind() }).inc();
    }

    pub(crate) fn invalid(&self, field: PolicyField) {
        self.invalid_annotations.get_or_create(&field.into()).inc();
    }

    pub(crate) fn set_live(&self, totals: Totals) {
        let Totals { jobs, spot, on_demand, unknown } = totals;
        let gauge = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
        self.live_jobs.set(gauge(jobs));
        let capacities =
            [(CapacityLabel::Spot, spot), (CapacityLabel::OnDemand, on_demand), (CapacityLabel::Unknown, unknown)];
        for (capacity, executors) in capacities {
            self.live_executors.get_or_create(&ExecutorLabels { capacity }).set(gauge(executors));
        }
    }

    pub(crate) fn set_leads(&self, leads: bool) {
        self.leader.set(leads.into());
    }
}
