//! The loop: events change the index, and what has changed in the index is reconciled in the ledgers. It runs until the
//! process shuts down.

use std::convert::Infallible;
use std::future::{Future, pending, ready};
use std::iter::from_fn;
use std::pin::pin;
use std::sync::Arc;

use balancer_store::Ledger;
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};

use crate::apply::apply;
use crate::index::Changes;
use crate::metrics::Cause;
use crate::reconcile_jobs::BATCH;
use crate::state::{Parts, Progress, Reconciler, State};
use crate::store_check::HEARTBEAT_INTERVAL;
use crate::term::TermChange;
use crate::unconfirmed::TAKE_INTERVAL;
use crate::watch::{ClusterEvent, SyncStatus, WatchSet};

impl<L: Ledger> Reconciler<L> {
    /// Reconciles until `shutdown`. When it returns, nothing more is written.
    pub(crate) async fn run(self: Arc<Self>, progress: watch::Sender<Progress>, shutdown: impl Future<Output = ()>) {
        let mut shutdown = pin!(shutdown);
        let (watches, sync) = self.start_watches();
        let mut state = State::new(&*self, sync, progress);
        tokio::select! {
            never = state.run(watches) => match never {},
            () = &mut shutdown => {}
        }
    }

    fn start_watches(&self) -> (WatchSet, SyncStatus) {
        let Parts { conventions, settings, metrics, .. } = &self.parts;
        WatchSet::start(&self.client, conventions, settings, metrics)
    }
}

impl<L: Ledger> State<'_, L> {
    async fn run(&mut self, mut watches: WatchSet) -> Infallible {
        let mut leadership = self.reconciler.leadership.clone();
        let mut requests = self.reconciler.jobs.requests();
        let mut heartbeats = interval(HEARTBEAT_INTERVAL);
        heartbeats.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut placements = interval(TAKE_INTERVAL);
        placements.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            self.watchdog.turned();
            self.receive(&mut watches);
            self.show_leader();
            self.follow_jobs_requests();
            let due = self.queue.next_due().filter(|_| self.may_write());
            let steer_at = self.changed_shares.due().filter(|_| self.may_write());
            tokio::select! {
                event = watches.next() => self.apply(event),
                () = leadership.changed() => {}
                () = requests.next() => {}
                _ = heartbeats.tick() => {
                    self.check_store().await;
                    self.follow_spot().await;
                }
                _ = placements.tick(), if self.may_write() => self.take_placed().await,
                answer = self.lookups.next() => self.remove_absent(answer).await,
                answer = self.pod_calls.next() => self.replaced(answer).await,
                () = until(self.plan.relist_at()) => {
                    watches.relist();
                    self.sync.relist(Instant::now());
                    self.plan.lists_started(false, Instant::now());
                }
                () = until(steer_at) => self.steer_pools().await,
                () = until(self.jobs_view.due()) => self.update_jobs_view(),
                () = ready(()), if self.has_resync_step() => self.resync_step().await,
                () = ready(()), if self.has_audit_step() => self.audit_step().await,
                () = until(due) => {
                    let jobs = self.queue.take_due(Instant::now(), BATCH);
                    self.reconcile_batch(jobs).await;
                }
            }
            // What was received before this process led may be incomplete: it may have been cut off.
            if self.follow_leader() == TermChange::Started && self.plan.is_outdated(Instant::now()) {
                (watches, self.sync) = self.reconciler.start_watches();
                self.plan.lists_started(true, Instant::now());
            } else if !self.plan.is_listing() && self.terms.take_needs_list() {
                self.plan.request(Cause::Start);
            }
            self.report_invalid_annotations();
            self.plan.request_if_synced(|namespace| self.sync.is_synced(namespace));
            if let Some(resync) = self.plan.due(Instant::now())
                && self.resync.is_none()
                && self.sync.is_any_synced()
                && self.may_write()
            {
                self.start_resync(resync);
            }
        }
    }

    fn apply(&mut self, event: ClusterEvent) {
        apply(event, &mut self.index, &mut self.sync, &mut self.waiting, &self.reconciler.parts.conventions);
    }

    /// Applies the events that have arrived. Each turn does so, because a loss must not wait for the other work of the loop.
    fn receive(&mut self, watches: &mut WatchSet) {
        let (is_full, waiting) = (watches.is_full(), watches.waiting());
        from_fn(|| watches.try_next()).take(waiting).for_each(|event| self.apply(event));
        let (changed, now) = (self.index.take_changed(), Instant::now());
        if is_full {
            self.sync.restart_catch_up(now);
        } else {
            self.sync.advance(now);
        }
        if self.sync.take_relist_failed() {
            self.plan.list_failed(now);
        }
        self.has_outdated_totals |= !changed.is_empty();
        // A process that starts to lead begins with a resync.
        if self.terms.leads() {
            for (job, Changes { change, executors }) in changed {
                self.changed_shares.insert(&job, now);
                self.jobs_view.insert(&job);
                self.queue.enqueue(job, change, executors, now);
            }
        }
        if self.plan.is_listing() && self.sync.is_ready(self.plan.has_listed(), now) {
            self.plan.lists_done(self.terms.take_needs_list(), self.terms.leads());
            self.show_totals();
        }
    }

    /// Follows the elector. Each new term begins with a resync.
    fn follow_leader(&mut self) -> TermChange {
        let leadership = &self.reconciler.leadership;
        if self.plan.has_listed() && leadership.follows() {
            self.reach(Progress::StandingBy);
        }
        let change = self.terms.follow(leadership.term());
        if change != TermChange::None {
            self.reset_for_term();
        }
        change
    }
}

/// Waits until then, or forever.
async fn until(at: Option<Instant>) {
    match at {
        Some(at) => sleep_until(at).await,
        None => pending().await,
    }
}

#[cfg(test)]
pub(crate) mod tests;
