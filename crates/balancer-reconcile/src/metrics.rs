//! What the reconciler counts.

use std::time::Duration;

use balancer_core::{Drift, InvalidField};
use balancer_runtime::metric_labels::{CapacityLabel, InvalidFieldLabels, StoreErrorLabels};
use balancer_runtime::{label, label_sets};
use balancer_store::StoreError;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

use crate::view::Totals;

label! {
    /// What was wrong with a ledger.
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
    /// What a look at a job's ledger came to.
    RepairLabel {
        /// It was right.
        Right = "right",
        /// It was mended.
        Mended = "mended",
        /// Another leads by now: nothing was changed.
        Superseded = "superseded",
        /// The store did not answer.
        Failed = "failed",
    }
}

label! {
    /// Why all jobs were looked at.
    Cause {
        /// This process leads from now on.
        Start = "start",
        /// It was time.
        Interval = "interval",
        /// The store was away, or has lost changes.
        Store = "store",
    }
}

label! {
    /// What is watched.
    WatchedLabel {
        /// Executors and drivers.
        Pods = "pods",
        /// Nodes.
        Nodes = "nodes",
    }
}

label_sets! {
    DriftLabels { kind: DriftKind }
    RepairLabels { outcome: RepairLabel }
    CauseLabels { cause: Cause }
    WatchLabels { resource: WatchedLabel }
    ExecutorLabels { capacity: CapacityLabel }
}

/// What is counted.
#[derive(Debug)]
pub struct Metrics {
    drift: Family<DriftLabels, Counter>,
    repairs: Family<RepairLabels, Counter>,
    lag_seconds: Histogram,
    resyncs: Family<CauseLabels, Counter>,
    resync_seconds: Histogram,
    watch_restarts: Family<WatchLabels, Counter>,
    store_errors: Family<StoreErrorLabels, Counter>,
    invalid_edits: Family<InvalidFieldLabels, Counter>,
    jobs: Gauge,
    executors: Family<ExecutorLabels, Gauge>,
    leader: Gauge,
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
            drift: Family::default(),
            repairs: Family::default(),
            // From 10 ms, less than a loss waits, to 82 s.
            lag_seconds: Histogram::new(exponential_buckets(0.01, 2.0, 14)),
            resyncs: Family::default(),
            // From 10 ms, a handful of jobs, to 82 s.
            resync_seconds: Histogram::new(exponential_buckets(0.01, 2.0, 14)),
            watch_restarts: Family::default(),
            store_errors: Family::default(),
            invalid_edits: Family::default(),
            jobs: Gauge::default(),
            executors: Family::default(),
            leader: Gauge::default(),
        };
        // There from the start: a rate over a series that appears with its first event does not see that.
        for &kind in DriftKind::ALL {
            drop(metrics.drift.get_or_create(&DriftLabels { kind }));
        }
        for &outcome in RepairLabel::ALL {
            drop(metrics.repairs.get_or_create(&RepairLabels { outcome }));
        }
        for &cause in Cause::ALL {
            drop(metrics.resyncs.get_or_create(&CauseLabels { cause }));
        }
        for &resource in WatchedLabel::ALL {
            drop(metrics.watch_restarts.get_or_create(&WatchLabels { resource }));
        }
        for kind in StoreError::KINDS {
            drop(metrics.store_errors.get_or_create(&StoreErrorLabels { kind }));
        }
        for labels in InvalidFieldLabels::all() {
            drop(metrics.invalid_edits.get_or_create(&labels));
        }
        metrics.live(Totals::default());
        metrics
    }

    /// Shows all under names that begin with `reconcile`.
    pub fn register(&self, registry: &mut Registry) {
        let Self {
            drift,
            repairs,
            lag_seconds,
            resyncs,
            resync_seconds,
            watch_restarts,
            store_errors,
            invalid_edits,
            jobs,
            executors,
            leader,
        } = self;
        let registry = registry.sub_registry_with_prefix("reconcile");
        registry.register("drift", "Executors that a ledger had wrong, and that were put right", drift.clone());
        registry.register("repairs", "Looks at a job's ledger", repairs.clone());
        registry.register_with_unit(
            "lag",
            "Time from the first news of a job's change to its ledger being right",
            Unit::Seconds,
            lag_seconds.clone(),
        );
        registry.register("resyncs", "Rounds of all jobs", resyncs.clone());
        registry.register_with_unit(
            "resync",
            "Time of a round of all jobs, the lists included where all was listed again",
            Unit::Seconds,
            resync_seconds.clone(),
        );
        registry.register("watch_restarts", "Watches that broke off and began again", watch_restarts.clone());
        registry.register("store_errors", "Calls that the store did not answer", store_errors.clone());
        registry.register(
            "invalid_edits",
            "Annotations of drivers that could not be read; the last good ones hold on",
            invalid_edits.clone(),
        );
        registry.register("jobs", "Jobs with a live pod, where this process leads", jobs.clone());
        registry.register(
            "executors",
            "Live executors, by where they run or must run, where this process leads",
            executors.clone(),
        );
        registry.register("leader", "1 where this process may write", leader.clone());
    }

    pub(crate) fn repaired(&self, outcome: RepairLabel, drift: Drift) {
        self.repairs.get_or_create(&RepairLabels { outcome }).inc();
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

    pub(crate) fn watch_broke(&self, resource: WatchedLabel) {
        self.watch_restarts.get_or_create(&WatchLabels { resource }).inc();
    }

    pub(crate) fn store_failed(&self, error: &StoreError) {
        self.store_errors.get_or_create(&StoreErrorLabels { kind: error.kind() }).inc();
    }

    pub(crate) fn invalid(&self, invalid: &InvalidField) {
        self.invalid_edits.get_or_create(&invalid.field.into()).inc();
    }

    pub(crate) fn live(&self, totals: Totals) {
        let Totals { jobs, spot, on_demand, unknown } = totals;
        let gauge = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
        self.jobs.set(gauge(jobs));
        let capacities =
            [(CapacityLabel::Spot, spot), (CapacityLabel::OnDemand, on_demand), (CapacityLabel::Unknown, unknown)];
        for (capacity, executors) in capacities {
            self.executors.get_or_create(&ExecutorLabels { capacity }).set(gauge(executors));
        }
    }

    pub(crate) fn leads(&self, leads: bool) {
        self.leader.set(leads.into());
    }
}
