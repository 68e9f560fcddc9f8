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
use crate::comparisons::Running;
use crate::doubts::{Decision, Known};
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
const NAMED_AT_ONCE: usize = 128;
/// A ledger of at most this many entries is counted anew by each call: see `Ledger::reconcile`.
const COUNTED: usize = 512;
/// Pages of a job's entries that are compared before others have their turn.
const PAGES_PER_TURN: usize = 4;
/// The entries on a page, usually. A turn that has named nearly [`Executors::MAX`] reads no further page.
const A_PAGE: usize = 1024;
/// A ledger of so many entries is compared in one turn. A larger one waits until there is room for its comparison.
pub(crate) const IN_ONE_TURN: usize = 1024;
/// A job whose ledger could not be reconciled is retried after this time.
const RETRY_AFTER: Duration = Duration::from_secs(2);
/// A placement is checked a little later than its grace ends, because the store has another clock.
const AFTER_THE_GRACE: Duration = Duration::from_millis(100);
/// Executors that were named, and still wait, are named again after this time.
const NAME_AGAIN_AFTER: Duration = Duration::from_millis(250);
/// A comparison during which a large ledger changed shows nothing about its counts. It is repeated after this time.
const COMPARE_AGAIN_AFTER: Duration = Duration::from_secs(1);

/// The same if only the listing says that the counts are wrong: it shows other counts in any job that changes much.
const COUNT_AGAIN_AFTER: Duration = Duration::from_secs(30);

/// A job, and what its turn starts with.
struct Turn {
    due: Due,
    comparison: Option<Comparison>,
    /// Whether its comparison may go on in the next turn.
    may_continue: bool,
    /// When the change came that has requested the comparison; `None` if the job did not change.
    compared_since: Option<Instant>,
    /// Whether an earlier turn of the comparison has corrected something.
    has_corrected: bool,
}

impl Turn {
    /// Names the executors that are due, and compares nothing.
    fn without_comparison(due: Due) -> Self {
        Self { due, comparison: None, may_continue: false, compared_since: None, has_corrected: false }
    }
}

/// The attempt to reconcile one job's ledger.
struct Attempt {
    turn: Turn,
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
    /// Those of them that were named in a call after which some have to be named again, because they were released.
    released: BTreeSet<Arc<str>>,
    drift: Drift,
    /// Of the last call.
    summary: Option<ReconcileSummary>,
    /// The comparison that goes on in the next turn.
    comparison: Option<Comparison>,
    /// Whether a comparison was under way in this turn. If the turn fails, it starts anew.
    was_comparing: bool,
    /// Whether a comparison has ended.
    has_compared: bool,
    /// Whether it has found other counts than the ledger's, and the ledger changed too much to say which are right.
    has_other_counts: bool,
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
        let turns = self.start_turns(jobs);
        let state = &*self;
        let attempts: Vec<Attempt> = stream::iter(turns)
            .map(|mut turn| async move {
                let comparison = turn.comparison.take();
                let mut done = Done { was_comparing: comparison.is_some(), comparison, ..Done::default() };
                let stopped = state.attempt(&turn.due, &mut done).await.err();
                state.watchdog.turned();
                Attempt { turn, done, stopped }
            })
            .buffer_unordered(CONCURRENCY)
            .collect()
            .await;
        let mut moving = Vec::new();
        for Attempt { turn: Turn { due: Due { job, .. }, .. }, done, stopped } in &attempts {
            let has_executors = done.summary.as_ref().is_some_and(|summary| summary.counts.total() > 0);
            if stopped.is_none() && has_executors && self.index.moved_to(job).is_some() {
                moving.push(Arc::clone(job));
            } else {
                self.moves.remove(job);
            }
        }
        let mut nexts: Vec<Next> = attempts.into_iter().map(|attempt| self.record(attempt)).collect();
        for (at, job) in moving.into_iter().enumerate() {
            if at == 0 {
                nexts.push(self.move_placements(job).await);
            } else {
                self.queue.enqueue_at(job, Executors::default(), Instant::now());
            }
        }
        for job in self.comparisons.next() {
            self.queue.enqueue_at(Arc::clone(job), Executors::default(), Instant::now());
        }
        self.show_leader();
        if nexts.contains(&Next::Stop) {
            return false;
        }
        // The ledger of one job may be invalid. That is no reason to give up the others.
        !nexts.contains(&Next::CheckStore) || self.is_store_up().await
    }

    /// The turns of these jobs. Large ledgers are compared a few at a time, and the others when these have been.
    fn start_turns(&mut self, jobs: Vec<Due>) -> Vec<Turn> {
        let (mut turns, mut room) = (Vec::new(), self.comparisons.room());
        for mut due in jobs {
            let job = Arc::clone(&due.job);
            if !self.sync.is_synced(&job.namespace) {
                // A resync does not wait for a namespace that may stay out of sync.
                self.requeue(due, false, HEARTBEAT_INTERVAL);
                continue;
            }
            let is_waiting = self.comparisons.is_waiting(&job);
            let running = self.comparisons.take(&job);
            let is_large = is_waiting || self.index.executors(&job) > IN_ONE_TURN;
            // The lag of executors that are named is theirs, because they do not wait for the comparison.
            let since = if due.compares_all && due.executors.is_empty() { due.changed_at.take() } else { None };
            turns.push(if let Some(Running { comparison, changed_at, has_corrected }) = running {
                // One that started anew with each request might never end.
                if due.compares_all {
                    self.comparisons.wait(&job, since);
                }
                let comparison = Some(comparison);
                Turn { due, comparison, may_continue: true, compared_since: changed_at, has_corrected }
            } else if !(due.compares_all || is_waiting) {
                Turn::without_comparison(due)
            } else if is_large && room == 0 {
                self.comparisons.wait(&job, since);
                Turn::without_comparison(due)
            } else {
                room -= usize::from(is_large);
                self.doubts.forget(&job);
                let compared_since = self.comparisons.stop_waiting(&job).or(since);
                let comparison = Some(Comparison::new(self.index.keys(&job)));
                Turn { comparison, may_continue: is_large, compared_since, ..Turn::without_comparison(due) }
            });
        }
        turns
    }

    /// The job could not be reconciled. `is_comparing` says whether its comparison was under way: that starts anew.
    fn requeue(&mut self, due: Due, is_comparing: bool, after: Duration) {
        let job = &due.job;
        let is_waiting = self.comparisons.is_waiting(job);
        let waited_since = self.comparisons.stop_waiting(job);
        let running = self.comparisons.take(job);
        let compares_all = due.compares_all || is_comparing || is_waiting || running.is_some();
        let compared_since = waited_since.or(running.and_then(|running| running.changed_at));
        let changed_at = due.changed_at.into_iter().chain(compared_since).min();
        self.queue.requeue(Due { compares_all, changed_at, ..due }, Instant::now() + after);
    }

    /// Names the executors that are due, and goes on with the comparison of the job's entries.
    async fn attempt(&self, due: &Due, done: &mut Done) -> Result<(), Stopped> {
        let (ledger, job) = (&self.reconciler.parts.ledger, &due.job);
        self.name_all(job, &due.executors, done).await?;
        if let Some(comparison) = &mut done.comparison {
            comparison.exclude(&due.executors);
            if comparison.is_new() && self.index.executors(job) > COUNTED {
                let term = self.reconciler.leadership.term().ok_or(Stopped::NotLeading)?;
                match ledger.begin_count(job.as_job_ref(), term).await {
                    // A full store cannot correct counts, but it can lose entries.
                    Ok(()) | Err(StoreError::Full(_)) => {}
                    Err(error) => return Err(Stopped::Failed(error)),
                }
            }
        }
        for page in 0..PAGES_PER_TURN {
            // One page in any case, because a comparison that does not go on keeps others from theirs.
            if page > 0 && done.named.len() + A_PAGE > Executors::MAX {
                break;
            }
            let Some(mut comparison) = done.comparison.take() else { break };
            let live = |key: &str| self.index.live(job, key);
            let compared = if comparison.has_all_pages() {
                comparison.add_missing(Executors::MAX.saturating_sub(done.named.len()).max(NAMED_AT_ONCE), live)
            } else {
                let page = ledger.entries(job.as_job_ref(), comparison.cursor()).await.map_err(Stopped::Failed)?;
                comparison.add(page, live)
            };
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
        done.has_other_counts = !corrected;
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
                // Which of those that were named are excused is not known.
                if summary.recheck_after.is_some() {
                    let live = keys.iter().filter(|key| self.index.has_executor(job, key));
                    done.released.extend(live.map(|key| Arc::clone(key)));
                }
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

    fn record(&mut self, Attempt { turn, done, stopped }: Attempt) -> Next {
        let metrics = &self.reconciler.parts.metrics;
        // What was corrected is corrected, however the attempt ends.
        metrics.corrected(done.drift);
        let (next, retry_after) = match stopped {
            None => {
                self.record_success(turn, done);
                return Next::Continue;
            }
            Some(Stopped::Superseded(term)) => {
                self.superseded(&turn.due.job, term);
                return Next::Stop;
            }
            Some(Stopped::Failed(error)) => {
                let (namespace, id) = (&turn.due.job.namespace, &turn.due.job.app_id);
                tracing::debug!(namespace, job = id, %error, "failed to reconcile the ledger; retrying");
                metrics.store_failed(&error);
                metrics.reconciled(JobOutcome::Failed);
                (Next::CheckStore, RETRY_AFTER)
            }
            // A later term starts with a resync. This one may go on, if the Lease is renewed.
            Some(Stopped::NotLeading) => (Next::Stop, HEARTBEAT_INTERVAL),
        };
        // A call that failed may have taken effect, and a comparison has lost a page.
        let changed_at = turn.due.changed_at.into_iter().chain(turn.compared_since).min();
        self.requeue(Due { changed_at, ..turn.due }, done.was_comparing, retry_after);
        next
    }

    /// Moves the placements that wait for their pods to the job that their driver has taken over. The watch has not reported
    /// these pods, so nothing else shows that the placements count there.
    async fn move_placements(&mut self, from: Arc<JobId>) -> Next {
        let Reconciler { parts: Parts { ledger, metrics, .. }, leadership, .. } = self.reconciler;
        let (Some(to), Some(term)) = (self.index.moved_to(&from).cloned(), leadership.term()) else {
            return Next::Continue;
        };
        let (index, mut cursor) = (&self.index, self.moves.remove(&from));
        let mut goes_on = false;
        let moved = async {
            let mut waiting = Vec::new();
            for _ in 0..PAGES_PER_TURN {
                let page = ledger.entries(from.as_job_ref(), cursor.clone()).await?;
                waiting.extend(page.entries.into_iter().filter(|(_, entry)| entry.uid.is_none()));
                // The rest of a page is found when it is read again.
                goes_on = page.next.is_some() || waiting.len() > MOVED_AT_ONCE;
                if !goes_on || waiting.len() > MOVED_AT_ONCE {
                    break;
                }
                cursor = page.next;
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
        let mut again_after = LOOK_UP_AGAIN_AFTER;
        if goes_on && outcome.is_ok() {
            again_after = Duration::ZERO;
            if let Some(cursor) = cursor {
                self.moves.insert(Arc::clone(&from), cursor);
            }
        }
        self.queue.enqueue_at(Arc::clone(&from), Executors::default(), Instant::now() + again_after);
        match outcome {
            Ok(RemovalOutcome::Done { removed, .. }) => {
                let (namespace, job) = (&from.namespace, &from.app_id);
                if removed > 0 {
                    tracing::info!(
                        namespace,
                        job,
                        removed,
                        "placements moved to the job that their driver has taken over"
                    );
                }
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
        self.reconciler.parts.metrics.reconciled(JobOutcome::Superseded);
        self.terms.supersede();
        self.reconciler.leadership.superseded(term);
    }

    fn record_success(&mut self, turn: Turn, done: Done) {
        let Turn { due: Due { job, changed_at, .. }, may_continue, compared_since, has_corrected, .. } = turn;
        let Done { named, released, drift, summary, comparison, has_compared, was_comparing, has_other_counts } = done;
        let Some(summary) = summary else { return };
        let has_corrected = has_corrected || !drift.is_none();
        let metrics = &self.reconciler.parts.metrics;
        let now = Instant::now();
        // A comparison of several turns is one attempt.
        if comparison.is_none() || !may_continue {
            metrics.reconciled(if has_corrected { JobOutcome::Corrected } else { JobOutcome::InSync });
        }
        for changed_at in changed_at.into_iter().chain(compared_since.filter(|_| has_compared)) {
            metrics.lagged(now - changed_at);
        }
        let is_comparing = was_comparing && !has_compared;
        if let Some(run) = self.resync.as_mut().filter(|_| has_compared) {
            run.compared(&job);
        }
        if let Some(comparison) = comparison {
            if may_continue {
                let running = Running { comparison, changed_at: compared_since, has_corrected };
                self.comparisons.keep(Arc::clone(&job), running);
                self.queue.enqueue_at(Arc::clone(&job), Executors::default(), now);
            } else {
                // The ledger is larger than the job.
                self.comparisons.wait(&job, compared_since);
            }
        }
        self.report_summary(&job, drift, &summary, now);
        let without_pod = self.plan_waiting(&job, &summary, &named, now);
        if let Some(recheck_after) = summary.recheck_after {
            let due = now + Duration::from_millis(recheck_after) + AFTER_THE_GRACE;
            self.queue.enqueue_at(Arc::clone(&job), Executors::Some(released), due);
        }
        if !is_comparing {
            if has_compared {
                self.plan_recount(&job, &summary, has_other_counts, now);
            } else {
                self.plan_comparison(&job, &summary, without_pod, now);
            }
        }
        self.expect_record(job, summary);
    }

    /// Reports what was corrected, repaired or found, and passes it on to whom it concerns.
    fn report_summary(&mut self, job: &Arc<JobId>, drift: Drift, summary: &ReconcileSummary, now: Instant) {
        let namespace = &job.namespace;
        if !drift.is_none() {
            let (Drift { missing, stale, wrong_capacity }, Counts { spot, on_demand }) = (drift, summary.counts);
            let job = &job.app_id;
            tracing::info!(namespace, job, missing, stale, wrong_capacity, spot, on_demand, "ledger corrected");
        }
        if let (Some(fixed), Some(policy)) = (self.index.fixed(job), summary.policy) {
            self.report_without_effect(job, fixed, policy);
        }
        if let Some(fault) = summary.fault {
            self.repaired(job, fault.into());
        }
        self.changed_shares.insert(job, now);
        self.observe_steering(job, &summary.steering);
        if drift.missing > 0 {
            let index = &self.index;
            let confirm_after = self.confirmations.added(job, |key| index.has_executor(job, key), now);
            if let Some(confirm_after) = confirm_after {
                tracing::info!(
                    namespace,
                    ?confirm_after,
                    "creations are slow; placements get more time for their pods"
                );
            }
        }
    }

    /// Plans what to do about the placements that wait for their pods. Returns how many of them have none.
    fn plan_waiting(
        &mut self,
        job: &Arc<JobId>,
        summary: &ReconcileSummary,
        named: &BTreeSet<Arc<str>>,
        now: Instant,
    ) -> u64 {
        let grace = millis(self.reconciler.parts.settings.grace);
        let confirm_after = self.confirmations.confirm_after(&job.namespace);
        let ReconcileSummary { waiting, more_waiting, .. } = summary;
        let is_live = |key: &str| self.index.has_executor(job, key);
        let plan = WaitingPlan::new(waiting.clone(), *more_waiting, is_live, grace, confirm_after);
        let WaitingPlan { name, look_up, recheck_after, without_pod } = plan;
        let (again, first): (BTreeSet<_>, BTreeSet<_>) = name.into_iter().partition(|key| named.contains(key));
        if !first.is_empty() {
            self.queue.enqueue_at(Arc::clone(job), Executors::Some(first), now);
        }
        if !again.is_empty() {
            self.queue.enqueue_at(Arc::clone(job), Executors::Some(again), now + NAME_AGAIN_AFTER);
        }
        if let Some(recheck_after) = recheck_after {
            let due = now + Duration::from_millis(recheck_after) + AFTER_THE_GRACE;
            self.queue.enqueue_at(Arc::clone(job), Executors::default(), due);
        }
        let primary = self.index.primary(job.as_job_ref());
        let is_moving = self.index.moved_to(job).is_some();
        if !look_up.is_empty() && !is_moving && !self.lookups.start(job, primary, look_up) {
            self.queue.enqueue_at(Arc::clone(job), Executors::default(), now + LOOK_UP_AGAIN_AFTER);
        }
        without_pod
    }

    /// All entries were compared. Plans another comparison if the counts are still an estimate, or may be wrong.
    fn plan_recount(&mut self, job: &Arc<JobId>, summary: &ReconcileSummary, has_other_counts: bool, now: Instant) {
        self.doubts.explain(job, self.known(job, summary.counts).missing());
        let again_after = match (summary.has_exact_counts, has_other_counts) {
            (false, _) => COMPARE_AGAIN_AFTER,
            (true, true) => COUNT_AGAIN_AFTER,
            (true, false) => return,
        };
        // Not in the queue: there the next change of the job would bring it forward.
        self.doubts.recount(job, now + again_after);
        self.queue.enqueue_at(Arc::clone(job), Executors::default(), now + again_after);
    }

    /// Plans a comparison of all entries if the ledger is still wrong.
    fn plan_comparison(&mut self, job: &Arc<JobId>, summary: &ReconcileSummary, without_pod: u64, now: Instant) {
        let ReconcileSummary { counts, has_exact_counts, policy, more_waiting, recheck_after, fault, .. } = summary;
        let is_certain = recheck_after.is_none() && !more_waiting;
        let is_off = policy.is_some_and(|policy| policy.spot_ratio == SpotRatio::Off);
        // Going through all executors costs little only in a small job. In a large one the audit finds what is missing.
        let is_plausible = match self.index.executors(job) {
            live if live <= SMALL => self.index.bounds(job, is_off).allow(*counts, without_pod),
            live => counts.total() <= live as u64 + without_pod,
        };
        let decision = self.doubts.decide(job, self.known(job, *counts), now);
        let recount = self.doubts.recount_due(job, now);
        for decision in [decision, recount] {
            if let Decision::Later(at) = decision {
                self.queue.enqueue_at(Arc::clone(job), Executors::default(), at);
            }
        }
        // Something else than a placement, a release and a reconcile has changed the ledger, or another version has.
        if *fault == Some(LedgerFault::Type)
            || !has_exact_counts && recount == Decision::Right
            || is_certain && !is_plausible
            || [decision, recount].contains(&Decision::Wrong)
        {
            self.queue.enqueue_at(Arc::clone(job), Executors::All, now);
        }
    }

    /// What is known of the job, if its ledger has these counts.
    pub(crate) fn known(&self, job: &JobId, counts: Counts) -> Known {
        Known { counts, live: self.index.executors(job) as u64, churn: self.index.churn(job) }
    }

    /// Stores what was left in the ledger, for the audit.
    fn expect_record(&mut self, job: Arc<JobId>, summary: ReconcileSummary) {
        let ReconcileSummary { counts, policy, steering, .. } = summary;
        if !self.index.contains(&job) && counts.total() == 0 {
            self.audit.forget(&job);
            self.doubts.ended(&job);
            return;
        }
        let driver = self.index.desired_driver(&job);
        let change = self.audit.expect(Arc::clone(&job), JobRecord { counts, policy, steering }, driver);
        if change == PolicyChange::Restored {
            self.repaired(&job, FaultLabel::Policy);
        }
    }

    fn repaired(&self, job: &JobId, fault: FaultLabel) {
        self.reconciler.parts.metrics.repaired(fault);
        let (namespace, job) = (&job.namespace, &job.app_id);
        tracing::warn!(namespace, job, fault = fault.as_str(), "ledger repaired: something else has changed it");
    }
}

#[cfg(test)]
pub(crate) mod tests;
