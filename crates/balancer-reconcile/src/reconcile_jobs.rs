//! Reconciles the ledgers of some jobs.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use balancer_core::{
    Counts, Drift, JobId, LedgerFault, PlaceRequest, PolicyOverrides, ReconcileOutcome, ReconcileSummary,
    RemovalOutcome, SpotRatio, Term, Unconfirmed, millis,
};
use balancer_store::{JobRecord, Ledger, StoreError};
use futures::{StreamExt, stream};
use tokio::time::Instant;

use crate::audit::PolicyChange;
use crate::compare::Comparison;
use crate::index::Executors;
use crate::metrics::{FaultLabel, JobOutcome};
use crate::queue::Due;
use crate::state::{Parts, Reconciler, State};
use crate::store_check::{HEARTBEAT_INTERVAL, SMALL};
use crate::unconfirmed::LOOK_UP_AGAIN_AFTER;
use crate::waiting::WaitingPlan;

/// Jobs that are reconciled before events are received again.
pub(crate) const BATCH: usize = 64;
/// Placements of a job that are moved before it is reconciled again. Each is a call of its own.
const MOVED_AT_ONCE: usize = 64;
/// Jobs that are reconciled at once. The store handles one after the other, and admissions wait in the same queue.
const CONCURRENCY: usize = 8;
/// Executors that are named in one call, which keeps the store busy for about a millisecond.
const NAMED_AT_ONCE: usize = 256;
/// A ledger of at most this many entries is counted anew by each call: see `Ledger::reconcile`.
const COUNTED: usize = 512;
/// Pages of a job's entries that are compared before others have their turn.
const PAGES_PER_TURN: usize = 4;
/// A job whose ledger could not be reconciled is retried after this time.
const RETRY_AFTER: Duration = Duration::from_secs(2);
/// A placement is checked a little later than its grace ends, because the store has another clock.
const AFTER_THE_GRACE: Duration = Duration::from_millis(100);
/// Executors that were named, and still wait, are named again after this time.
const NAME_AGAIN_AFTER: Duration = Duration::from_millis(250);
/// A comparison during which a large ledger changed shows nothing about its counts. It is repeated after this time.
const COMPARE_AGAIN_AFTER: Duration = Duration::from_secs(1);

/// The attempt to reconcile one job's ledger.
struct Attempt {
    due: Due,
    /// What was done until the attempt ended.
    done: Done,
    /// Why it ended early.
    stopped: Option<Stopped>,
}

/// What an attempt has done.
#[derive(Default)]
struct Done {
    /// The executors that were named.
    named: BTreeSet<Arc<str>>,
    drift: Drift,
    /// Of the last call.
    summary: Option<ReconcileSummary>,
    /// The comparison that goes on in the next turn.
    comparison: Option<Comparison>,
    /// Whether a comparison was under way in this turn. If the turn fails, it starts anew.
    was_comparing: bool,
    /// Whether a comparison has ended.
    has_compared: bool,
}

/// Why an attempt ended early.
enum Stopped {
    /// Another process leads.
    NotLeading,
    Superseded(Term),
    Failed(StoreError),
}

/// Whether more jobs may be reconciled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    Continue,
    /// Only if the store is up.
    CheckStore,
    /// Another process leads.
    Stop,
}

impl<L: Ledger> State<'_, L> {
    /// Makes the ledgers of these jobs equal to the index. Returns whether more jobs may be reconciled.
    pub(crate) async fn reconcile_batch(&mut self, jobs: Vec<Due>) -> bool {
        let (synced, unsynced): (Vec<_>, Vec<_>) =
            jobs.into_iter().partition(|due| self.sync.is_synced(&due.job.namespace));
        for mut due in unsynced {
            // A resync does not wait for a namespace that may stay out of sync.
            if self.comparisons.remove(&due.job).is_some() {
                due.executors = Executors::All;
            }
            self.queue.requeue(due, Instant::now() + HEARTBEAT_INTERVAL);
        }
        let started: Vec<_> = synced
            .into_iter()
            .map(|due| {
                let comparison = self.comparisons.remove(&due.job);
                (due, comparison)
            })
            .collect();
        let state = &*self;
        let attempts: Vec<Attempt> = stream::iter(started)
            .map(|(due, comparison)| async move {
                let was_comparing = comparison.is_some() || due.executors == Executors::All;
                let mut done = Done { comparison, was_comparing, ..Done::default() };
                let stopped = state.attempt(&due, &mut done).await.err();
                state.watchdog.turned();
                Attempt { due, done, stopped }
            })
            .buffer_unordered(CONCURRENCY)
            .collect()
            .await;
        let has_left = |attempt: &&Attempt| {
            let has_executors = attempt.done.summary.as_ref().is_some_and(|summary| summary.counts.total() > 0);
            attempt.stopped.is_none() && has_executors && self.index.moved_to(&attempt.due.job).is_some()
        };
        let moving: Vec<_> = attempts.iter().filter(has_left).map(|attempt| Arc::clone(&attempt.due.job)).collect();
        let mut nexts: Vec<Next> = attempts.into_iter().map(|attempt| self.record(attempt)).collect();
        for job in moving {
            nexts.push(self.move_placements(job).await);
        }
        self.show_leader();
        if nexts.contains(&Next::Stop) {
            return false;
        }
        // The ledger of one job may be invalid. That is no reason to give up the others.
        !nexts.contains(&Next::CheckStore) || self.is_store_up().await
    }

    /// Names the executors that are due, and compares some pages of the job's entries if all of them are.
    async fn attempt(&self, due: &Due, done: &mut Done) -> Result<(), Stopped> {
        let (ledger, job) = (&self.reconciler.parts.ledger, &due.job);
        match &due.executors {
            Executors::All => {
                done.comparison = Some(Comparison::new(self.index.keys(job)));
                if self.index.executors(job) > COUNTED {
                    let term = self.reconciler.leadership.term().ok_or(Stopped::NotLeading)?;
                    ledger.begin_count(job.as_job_ref(), term).await.map_err(Stopped::Failed)?;
                }
            }
            Executors::Some(keys) => self.name_all(job, keys, done).await?,
        }
        for _ in 0..PAGES_PER_TURN {
            let Some(mut comparison) = done.comparison.take() else { break };
            let page = ledger.entries(job.as_job_ref(), comparison.cursor()).await.map_err(Stopped::Failed)?;
            let compared = comparison.add(page, |key| self.index.live(job, key));
            self.name_all(job, &compared.differ, done).await?;
            if compared.is_last {
                done.has_compared = true;
                if self.index.executors(job) > COUNTED {
                    self.correct_counts(job, comparison.found(), done).await?;
                }
            } else {
                done.comparison = Some(comparison);
            }
        }
        if done.summary.is_none() {
            self.name(job, &[], done).await?;
        }
        Ok(())
    }

    /// A large ledger whose entries are as they should be may still have other counts.
    async fn correct_counts(&self, job: &JobId, found: Counts, done: &mut Done) -> Result<(), Stopped> {
        self.name(job, &[], done).await?;
        let summary = done.summary.as_ref();
        let is_right = summary.is_none_or(|summary| summary.counts == found && summary.has_exact_counts);
        let Some(term) = self.reconciler.leadership.term().filter(|_| !is_right) else { return Ok(()) };
        let ledger = &self.reconciler.parts.ledger;
        let corrected = ledger.correct_counts(job.as_job_ref(), found, term).await.map_err(Stopped::Failed)?;
        if corrected { self.name(job, &[], done).await } else { Ok(()) }
    }

    async fn name_all(&self, job: &JobId, keys: &BTreeSet<Arc<str>>, done: &mut Done) -> Result<(), Stopped> {
        let keys: Vec<_> = keys.iter().collect();
        for keys in keys.chunks(NAMED_AT_ONCE) {
            self.name(job, keys, done).await?;
        }
        Ok(())
    }

    /// Corrects the entries of these executors, and what the ledger has of the job as a whole.
    async fn name(&self, job: &JobId, keys: &[&Arc<str>], done: &mut Done) -> Result<(), Stopped> {
        let Reconciler { parts: Parts { ledger, settings, .. }, leadership, .. } = self.reconciler;
        let desired = self.index.desired(job, keys.iter().copied());
        let policy = self.audit.policy(job, desired.driver());
        let desired = desired.or_policy(policy);
        // Checked for each call, because the process may have been stopped in between.
        let term = leadership.term().ok_or(Stopped::NotLeading)?;
        match ledger.reconcile(job.as_job_ref(), &desired.job_state(), settings.grace, term).await {
            Ok(ReconcileOutcome::Done(summary)) => {
                done.drift += summary.drift;
                done.named.extend(keys.iter().map(|key| Arc::clone(key)));
                // The other parts of the last answer hold for the whole ledger.
                let before = done.summary.take();
                let (fault, recheck) = before.map_or((None, None), |before| (before.fault, before.recheck_after));
                let recheck_after = summary.recheck_after.into_iter().chain(recheck).min();
                done.summary = Some(ReconcileSummary { fault: summary.fault.or(fault), recheck_after, ..summary });
                Ok(())
            }
            Ok(ReconcileOutcome::Superseded(term)) => Err(Stopped::Superseded(term)),
            Err(error) => Err(Stopped::Failed(error)),
        }
    }

    fn record(&mut self, attempt: Attempt) -> Next {
        let Attempt { due, done, stopped } = attempt;
        let metrics = &self.reconciler.parts.metrics;
        match stopped {
            None => {
                self.record_success(&due, done);
                Next::Continue
            }
            Some(Stopped::Superseded(term)) => {
                self.superseded(&due.job, term);
                Next::Stop
            }
            Some(Stopped::Failed(error)) => {
                let (namespace, id) = (&due.job.namespace, &due.job.app_id);
                tracing::debug!(namespace, job = id, %error, "failed to reconcile the ledger; retrying");
                metrics.store_failed(&error);
                metrics.reconciled(JobOutcome::Failed, Drift::default());
                // A call that failed may have taken effect, and a comparison has lost a page.
                let executors = if done.was_comparing { Executors::All } else { due.executors };
                self.queue.requeue(Due { executors, ..due }, Instant::now() + RETRY_AFTER);
                Next::CheckStore
            }
            Some(Stopped::NotLeading) => {
                // A later term starts with a resync. This one may go on, if the Lease is renewed.
                let executors = if done.was_comparing { Executors::All } else { due.executors };
                self.queue.requeue(Due { executors, ..due }, Instant::now() + HEARTBEAT_INTERVAL);
                Next::Stop
            }
        }
    }

    /// Moves the placements that wait for their pods to the job that their driver has taken over. The watch has not reported
    /// these pods, so nothing else shows that the placements count there.
    async fn move_placements(&mut self, from: Arc<JobId>) -> Next {
        let Reconciler { parts: Parts { ledger, metrics, .. }, leadership, .. } = self.reconciler;
        let (Some(to), Some(term)) = (self.index.moved_to(&from).cloned(), leadership.term()) else {
            return Next::Continue;
        };
        let index = &self.index;
        let moved = async {
            let (mut waiting, mut cursor) = (Vec::new(), None);
            loop {
                let page = ledger.entries(from.as_job_ref(), cursor).await?;
                waiting.extend(page.entries.into_iter().filter(|(_, entry)| entry.uid.is_none()));
                cursor = page.next;
                if cursor.is_none() || waiting.len() >= MOVED_AT_ONCE {
                    break;
                }
            }
            let mut moved = Vec::new();
            for (key, entry) in waiting.iter().take(MOVED_AT_ONCE) {
                // The store cannot refuse a placement of a former leader.
                if leadership.term().is_none() {
                    break;
                }
                // In the job of its driver, whatever its ledger says about drivers and opting out.
                let overrides = PolicyOverrides { spot_ratio: Some(SpotRatio::ONE), ..PolicyOverrides::default() };
                let (required, policy, driver) = (Some(entry.capacity), None, None);
                let request = PlaceRequest { key, required, overrides, policy, may_create: true, driver };
                if !index.has_executor(&to, key) {
                    ledger.place(to.as_job_ref(), &request).await?;
                }
                moved.push(Unconfirmed { placed_at: entry.placed_at, key: key.clone() });
            }
            ledger.remove_unconfirmed(from.as_job_ref(), &moved, term).await
        };
        let outcome = moved.await;
        self.watchdog.turned();
        // A placement that was in flight may follow. Without one, this removes the rest of the ledger.
        self.queue.enqueue_at(Arc::clone(&from), Executors::default(), Instant::now() + LOOK_UP_AGAIN_AFTER);
        match outcome {
            Ok(RemovalOutcome::Done { removed, .. }) => {
                let (namespace, job) = (&from.namespace, &from.app_id);
                tracing::info!(namespace, job, removed, "placements moved to the job that their driver has taken over");
                Next::Continue
            }
            Ok(RemovalOutcome::Superseded(term)) => {
                self.superseded(&from, term);
                Next::Stop
            }
            Err(error) => {
                let (namespace, job) = (&from.namespace, &from.app_id);
                tracing::debug!(namespace, job, %error, "failed to move the placements of a driver; retrying");
                metrics.store_failed(&error);
                Next::CheckStore
            }
        }
    }

    /// The job's ledger was reconciled in a later term than this process's.
    pub(crate) fn superseded(&mut self, job: &JobId, term: Term) {
        let (namespace, job) = (&job.namespace, &job.app_id);
        tracing::warn!(namespace, job, term = term.0, "ledger already reconciled in a later term");
        self.reconciler.parts.metrics.reconciled(JobOutcome::Superseded, Drift::default());
        self.terms.supersede();
        self.reconciler.leadership.superseded(term);
    }

    fn record_success(&mut self, due: &Due, done: Done) {
        let Done { named, drift, summary, comparison, has_compared, was_comparing: _ } = done;
        let Some(ReconcileSummary {
            drift: _,
            counts,
            has_exact_counts,
            policy,
            waiting,
            more_waiting,
            recheck_after,
            fault,
            steering,
        }) = summary
        else {
            return;
        };
        let job = &due.job;
        let Parts { metrics, settings, .. } = &self.reconciler.parts;
        let now = Instant::now();
        let outcome = if drift.is_none() { JobOutcome::InSync } else { JobOutcome::Corrected };
        metrics.reconciled(outcome, drift);
        if let Some(changed_at) = due.changed_at {
            metrics.lagged(now - changed_at);
        }
        if !drift.is_none() {
            let (Drift { missing, stale, wrong_capacity }, Counts { spot, on_demand }) = (drift, counts);
            let (namespace, job) = (&job.namespace, &job.app_id);
            tracing::info!(namespace, job, missing, stale, wrong_capacity, spot, on_demand, "ledger corrected");
        }
        if let (Some(fixed), Some(policy)) = (self.index.fixed(job), policy) {
            self.report_without_effect(job, fixed, policy);
        }
        let grace = millis(settings.grace);
        if let Some(fault) = fault {
            self.repaired(job, fault.into());
        }
        self.changed_shares.insert(job, now);
        self.observe_steering(job, &steering);
        if drift.missing > 0 {
            let (index, namespace) = (&self.index, &job.namespace);
            let confirm_after = self.confirmations.added(job, |key| index.has_executor(job, key), now);
            if let Some(confirm_after) = confirm_after {
                tracing::info!(
                    namespace,
                    ?confirm_after,
                    "creations are slow; placements get more time for their pods"
                );
            }
        }
        let confirm_after = self.confirmations.confirm_after(&job.namespace);
        let plan = WaitingPlan::new(waiting, |key| self.index.has_executor(job, key), grace, confirm_after);
        let WaitingPlan { name, look_up, recheck_after: waits, without_pod } = plan;
        let at = |millis| now + Duration::from_millis(millis) + AFTER_THE_GRACE;
        let (again, first): (BTreeSet<_>, BTreeSet<_>) = name.into_iter().partition(|key| named.contains(key));
        if !first.is_empty() {
            self.queue.enqueue_at(Arc::clone(job), Executors::Some(first), now);
        }
        if !again.is_empty() {
            self.queue.enqueue_at(Arc::clone(job), Executors::Some(again), now + NAME_AGAIN_AFTER);
        }
        // Which of those that were named are excused is not known.
        if let Some(recheck_after) = recheck_after {
            let live = named.into_iter().filter(|key| self.index.has_executor(job, key)).collect();
            self.queue.enqueue_at(Arc::clone(job), Executors::Some(live), at(recheck_after));
        }
        if let Some(waits) = waits {
            self.queue.enqueue_at(Arc::clone(job), Executors::default(), at(waits));
        }
        let primary = self.index.primary(job.as_job_ref());
        let is_moving = self.index.moved_to(job).is_some();
        if !look_up.is_empty() && !is_moving && !self.lookups.start(job, primary, look_up) {
            self.queue.enqueue_at(Arc::clone(job), Executors::default(), now + LOOK_UP_AGAIN_AFTER);
        }
        let is_certain = recheck_after.is_none() && !more_waiting;
        let is_off = policy.is_some_and(|policy| policy.spot_ratio == SpotRatio::Off);
        // Going through all executors costs little only in a small job. In a large one the audit finds what is missing.
        let is_plausible = match self.index.executors(job) {
            live if live <= SMALL => self.index.bounds(job, is_off).allow(counts, without_pod),
            live => counts.total() <= live as u64 + without_pod,
        };
        if let Some(comparison) = comparison {
            self.comparisons.insert(Arc::clone(job), comparison);
            self.queue.enqueue_at(Arc::clone(job), Executors::default(), now);
        } else if has_compared {
            if !has_exact_counts {
                self.queue.enqueue_at(Arc::clone(job), Executors::All, now + COMPARE_AGAIN_AFTER);
            }
        } else if fault == Some(LedgerFault::Type) || !has_exact_counts || is_certain && !is_plausible {
            // Something else than a placement, a release and a reconcile has changed the ledger, or another version has.
            self.queue.enqueue_at(Arc::clone(job), Executors::All, now);
        }
        if self.index.contains(job) || counts.total() > 0 {
            let driver = self.index.desired_driver(job);
            let change = self.audit.expect(Arc::clone(job), JobRecord { counts, policy, steering }, driver);
            if change == PolicyChange::Restored {
                self.repaired(job, FaultLabel::Policy);
            }
        } else {
            self.audit.forget(job);
        }
    }

    fn repaired(&self, job: &JobId, fault: FaultLabel) {
        self.reconciler.parts.metrics.repaired(fault);
        let (namespace, job) = (&job.namespace, &job.app_id);
        tracing::warn!(namespace, job, fault = fault.as_str(), "ledger repaired: something else has changed it");
    }
}
