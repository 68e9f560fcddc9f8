//! Everything that the reconciler works with, and what it has learned so far.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use balancer_core::{Conventions, JobId, Policy};
use balancer_runtime::tasks::{Task, Tasks, Watchdog};
use balancer_store::Cursor;
use kube::Client;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::apply::WaitingExecutors;
use crate::arguments::ReconcileSettings;
use crate::audit::RecordAudit;
use crate::blast_radius::BlastRadius;
use crate::comparisons::Comparisons;
use crate::confirmation::Confirmations;
use crate::doubts::Doubts;
use crate::events::EventRecorder;
use crate::fallback::Fallback;
use crate::index::{ClusterIndex, Totals};
use crate::jobs::{JobsView, Publisher};
use crate::leader::Leadership;
use crate::log_limit::LogLimit;
use crate::metrics::Metrics;
use crate::pod_lookup::PodLookups;
use crate::pool_steering::ChangedShares;
use crate::queue::WorkQueue;
use crate::replace::PodCalls;
use crate::resync::ResyncPlan;
use crate::resync_jobs::ResyncRun;
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
    /// What keeps its tasks running.
    pub tasks: Tasks,
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
    /// Where the facts of all jobs are published.
    pub(crate) jobs: Publisher,
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
    pub(crate) comparisons: Comparisons,
    /// Where the search goes on for placements to move, in ledgers that their drivers have left.
    pub(crate) moves: HashMap<Arc<JobId>, Cursor>,
    pub(crate) doubts: Doubts,
    /// The resync that has begun.
    pub(crate) resync: Option<ResyncRun>,
    /// Whether a resync has ended in this term.
    pub(crate) has_resynced: bool,
    pub(crate) audit: RecordAudit,
    /// The jobs whose records are audited next.
    pub(crate) auditing: Vec<Arc<JobId>>,
    pub(crate) confirmations: Confirmations,
    pub(crate) lookups: PodLookups,
    pub(crate) events: EventRecorder,
    pub(crate) changed_shares: ChangedShares,
    pub(crate) blast_radius: BlastRadius,
    pub(crate) waiting: WaitingExecutors,
    pub(crate) fallback: Fallback,
    pub(crate) pod_calls: PodCalls,
    pub(crate) jobs_view: JobsView,
    /// Of the line that refused placements cannot be removed early.
    pub(crate) refusals_logged: LogLimit,
    /// Of the line that the store is full.
    pub(crate) full_logged: LogLimit,
    /// Whether the index has changed after its totals were last shown.
    pub(crate) has_outdated_totals: bool,
    /// Reports that the loop turns.
    pub(crate) watchdog: Watchdog,
    progress: watch::Sender<Progress>,
}

impl<'a, L> State<'a, L> {
    pub(crate) fn new(reconciler: &'a Reconciler<L>, sync: SyncStatus, progress: watch::Sender<Progress>) -> Self {
        let Parts { conventions, defaults, settings, tasks, .. } = &reconciler.parts;
        Self {
            reconciler,
            index: ClusterIndex::new(Arc::clone(conventions), *defaults),
            sync,
            terms: TermTracker::default(),
            plan: ResyncPlan::new(settings.interval, Instant::now()),
            store: StoreEpoch::default(),
            queue: WorkQueue::default(),
            comparisons: Comparisons::default(),
            moves: HashMap::new(),
            doubts: Doubts::default(),
            resync: None,
            has_resynced: false,
            audit: RecordAudit::default(),
            auditing: Vec::new(),
            confirmations: Confirmations::default(),
            lookups: PodLookups::new(reconciler.client.clone(), Arc::clone(conventions)),
            events: EventRecorder::start(reconciler.client.clone(), tasks),
            changed_shares: ChangedShares::default(),
            blast_radius: BlastRadius::default(),
            waiting: WaitingExecutors::default(),
            fallback: Fallback::default(),
            pod_calls: PodCalls::new(reconciler.client.clone(), reconciler.leadership.clone()),
            jobs_view: JobsView::default(),
            refusals_logged: LogLimit::default(),
            full_logged: LogLimit::default(),
            has_outdated_totals: true,
            watchdog: tasks.watch(Task::Reconciler),
            progress,
        }
    }

    /// Whether ledgers may be changed now.
    pub(crate) fn may_write(&self) -> bool {
        self.terms.may_write(self.reconciler.leadership.term()) && self.store.is_up() && self.plan.has_listed()
    }

    /// Shows whether ledgers may be changed now.
    pub(crate) fn show_leader(&self) {
        self.reconciler.parts.metrics.set_leads(self.may_write());
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
            self.reconciler.parts.metrics.set_live(self.index.totals(|job| self.audit.policy(job, None)));
        }
    }

    /// The term has changed: what was planned and expected belongs to the former one.
    pub(crate) fn reset_for_term(&mut self) {
        if !self.terms.leads() {
            self.reconciler.parts.metrics.set_live(Totals::default());
            self.reconciler.parts.metrics.set_unschedulable(0);
            self.reconciler.parts.metrics.set_shares(Default::default());
            self.reconciler.parts.metrics.set_spot_closed(0, Duration::ZERO);
        }
        self.has_outdated_totals = true;
        (self.queue, self.audit, self.auditing) = (WorkQueue::default(), RecordAudit::default(), Vec::new());
        (self.comparisons, self.moves, self.resync) = (Comparisons::default(), HashMap::new(), None);
        self.has_resynced = false;
        self.doubts = Doubts::default();
        (self.changed_shares, self.blast_radius) = (ChangedShares::default(), BlastRadius::default());
        self.store.forget();
        self.plan.cancel();
        self.jobs_view = JobsView::default();
        let Reconciler { client, parts, leadership, .. } = self.reconciler;
        self.lookups = PodLookups::new(client.clone(), Arc::clone(&parts.conventions));
        (self.fallback, self.pod_calls) = (Fallback::default(), PodCalls::new(client.clone(), leadership.clone()));
    }
}

impl<L> Drop for State<'_, L> {
    /// The loop ends, by a shutdown or a panic: this process neither leads nor counts.
    fn drop(&mut self) {
        self.reconciler.parts.metrics.set_leads(false);
        self.reconciler.parts.metrics.set_live(Totals::default());
        self.reconciler.parts.metrics.set_unschedulable(0);
        self.reconciler.parts.metrics.set_shares(Default::default());
        self.reconciler.parts.metrics.set_spot_closed(0, Duration::ZERO);
    }
}
