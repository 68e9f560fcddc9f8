//! Everything that the reconciler works with, and what it has learned so far.

use std::sync::Arc;

use balancer_core::{Conventions, Policy};
use kube::Client;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::arguments::ReconcileSettings;
use crate::audit::CountAudit;
use crate::events::EventRecorder;
use crate::index::{ClusterIndex, Totals};
use crate::leader::Leadership;
use crate::metrics::Metrics;
use crate::queue::WorkQueue;
use crate::resync::ResyncPlan;
use crate::store_epoch::StoreEpoch;
use crate::term::TermTracker;
use crate::watch::SyncStatus;

/// What a reconciler is made of.
#[derive(Debug)]
pub struct Parts<L> {
    /// The ledgers to reconcile.
    pub ledger: Arc<L>,
    /// Whether other processes reconcile them too, so that one has to be elected.
    pub shared: bool,
    /// How the cluster names things.
    pub conventions: Arc<Conventions>,
    /// The policy of a job that states nothing; the same as the webhook's.
    pub defaults: Policy,
    /// What is reconciled, and when.
    pub settings: ReconcileSettings,
    pub metrics: Arc<Metrics>,
}

/// How far the reconciler has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Progress {
    /// The first lists are not complete yet.
    #[default]
    Listing,
    /// The first lists are complete, and another process leads.
    StandingBy,
    /// Every ledger was reconciled at least once.
    Synced,
}

/// Its parts, and its access to the cluster.
pub(crate) struct Reconciler<L> {
    pub(crate) parts: Parts<L>,
    pub(crate) client: Client,
    pub(crate) leadership: Leadership,
}

/// What is known of the cluster, of the store and of what is to be done.
pub(crate) struct State<'a, L> {
    pub(crate) reconciler: &'a Reconciler<L>,
    pub(crate) index: ClusterIndex,
    pub(crate) sync: SyncStatus,
    pub(crate) terms: TermTracker,
    pub(crate) plan: ResyncPlan,
    pub(crate) store: StoreEpoch,
    pub(crate) queue: WorkQueue,
    pub(crate) audit: CountAudit,
    pub(crate) events: EventRecorder,
    /// Whether the index has changed after its totals were last shown.
    pub(crate) has_outdated_totals: bool,
    progress: watch::Sender<Progress>,
}

impl<'a, L> State<'a, L> {
    pub(crate) fn new(reconciler: &'a Reconciler<L>, sync: SyncStatus, progress: watch::Sender<Progress>) -> Self {
        let Parts { conventions, defaults, settings, .. } = &reconciler.parts;
        Self {
            reconciler,
            index: ClusterIndex::new(Arc::clone(conventions), *defaults),
            sync,
            terms: TermTracker::default(),
            plan: ResyncPlan::new(settings.interval, Instant::now()),
            store: StoreEpoch::default(),
            queue: WorkQueue::default(),
            audit: CountAudit::default(),
            events: EventRecorder::start(reconciler.client.clone(), Arc::clone(conventions)),
            has_outdated_totals: true,
            progress,
        }
    }

    /// Whether ledgers may be changed now.
    pub(crate) fn may_write(&self) -> bool {
        self.terms.leads() && self.store.is_up() && self.plan.has_listed()
    }

    pub(crate) fn reach(&self, progress: Progress) {
        self.progress.send_if_modified(|reached| {
            let is_further = progress > *reached;
            *reached = progress.max(*reached);
            is_further
        });
    }

    /// Shows how many jobs and executors are live, if this process leads: the gauges of several processes would be
    /// added up. It goes through all executors, so it does so only if something has changed.
    pub(crate) fn show_totals(&mut self) {
        if self.terms.leads() && std::mem::take(&mut self.has_outdated_totals) {
            self.reconciler.parts.metrics.set_live(self.index.totals());
        }
    }

    /// The term has changed: what was planned and expected belongs to the former one.
    pub(crate) fn reset_for_term(&mut self) {
        if !self.terms.leads() {
            self.reconciler.parts.metrics.set_live(Totals::default());
        }
        self.has_outdated_totals = true;
        (self.queue, self.audit) = (WorkQueue::default(), CountAudit::default());
        self.store.forget();
        self.plan.cancel();
    }
}
