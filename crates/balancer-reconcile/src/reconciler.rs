//! The loop: what the watches tell becomes the view, what has changed in the view becomes repairs of
//! the ledgers. Nothing ends it but being told to leave.

use std::collections::HashSet;
use std::convert::Infallible;
use std::fmt;
use std::future::Future;
use std::hash::{BuildHasher, RandomState};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use balancer_core::{Counts, Drift, JobId, Policy, ReconcileOutcome, ReconcileSummary, Term};
use balancer_store::{Ledger, StoreError};
use futures::{FutureExt, StreamExt, stream};
use tokio::sync::{Semaphore, watch};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};

use crate::leader::Leadership;
use crate::metrics::{Cause, Metrics, RepairLabel};
use crate::observe::{Sight, Sources, Watches, Word};
use crate::report::Reports;
use crate::schedule::Schedule;
use crate::tallies::Tallies;
use crate::view::{Totals, View};

/// Jobs repaired before the watches are listened to again.
const BATCH: usize = 64;
/// Of them at once: the store does one after the other, and admissions wait in the same line.
const AT_ONCE: u32 = 8;
/// A job of so many executors counts as two of them, one of twice as many as three.
const LARGE: u32 = 500;
/// A job whose ledger could not be had is looked at again after so long.
const FAILED_REST: Duration = Duration::from_secs(2);
/// How often the store is asked whether it still is the one that we knew.
const BEAT: Duration = Duration::from_secs(1);
/// The most that a difference between a ledger's counts and ours goes unseen, where no watch tells.
const MOST_UNSEEN: Duration = Duration::from_secs(10);
/// A placement's grace is looked after a little later than it ends: the store's clock is not ours.
const AFTER_THE_GRACE: Duration = Duration::from_millis(100);
/// The most words of the watches that are heard before anything else has its turn.
const MOST_WORDS: usize = 1024;

/// How far the loop has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Progress {
    /// The cluster is not known yet.
    #[default]
    Listing,
    /// The cluster is known, and another leads.
    StandingBy,
    /// Every ledger was what the cluster says at least once.
    Synced,
}

/// Everything that the loop needs.
pub struct Reconciler<L> {
    /// What is kept right.
    pub(crate) ledger: Arc<L>,
    /// Whether this process may write.
    pub(crate) leadership: Leadership,
    /// What is watched.
    pub(crate) sources: Sources,
    /// What holds where a driver states nothing.
    pub(crate) defaults: Policy,
    /// From one round of all jobs to the next.
    pub(crate) interval: Duration,
    /// What is counted.
    pub(crate) metrics: Arc<Metrics>,
}

impl<L> fmt::Debug for Reconciler<L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reconciler").field("namespaces", &self.sources.namespaces).finish_non_exhaustive()
    }
}

impl<L: Ledger> Reconciler<L> {
    /// Reconciles until `leave`. When it returns, nothing is written any more.
    pub async fn run(self: Arc<Self>, progress: watch::Sender<Progress>, leave: impl Future<Output = ()>) {
        let mut leave = pin!(leave);
        // Whoever ran before may have shown what lives.
        self.metrics.live(Totals::default());
        let reports = Reports::start(self.sources.client.clone(), Arc::clone(&self.sources.conventions));
        let mut working = Working {
            view: View::new(Arc::clone(&self.sources.conventions), self.defaults),
            uncounted: true,
            schedule: Schedule::default(),
            listed: false,
            sight: Sight::default(),
            new_term: false,
            round: None,
            skipped: HashSet::new(),
            term: None,
            beaten: None,
            last_mark: None,
            store_is_up: true,
            tallies: Tallies::default(),
            reports,
            progress,
            reconciler: &*self,
        };
        tokio::select! {
            never = working.work() => match never {},
            () = &mut leave => {}
        }
    }
}

/// A round of all jobs that is to be made.
#[derive(Clone, Copy, Debug)]
struct Round {
    cause: Cause,
    /// When the lists that it follows were begun; `None` for one that goes by what is known.
    listing: Option<Instant>,
}

/// A look at one job's ledger: since when a change waits for it, and what it came to; `None` where
/// another leads.
struct Look {
    job: Arc<JobId>,
    since: Option<Instant>,
    answer: Option<Result<ReconcileOutcome, StoreError>>,
}

/// Whether there may be more looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    More,
    /// If the store answers at all.
    AskTheStore,
    /// Another leads.
    Stop,
}

struct Working<'a, L> {
    reconciler: &'a Reconciler<L>,
    view: View,
    /// Whether the view has changed since its executors were counted.
    uncounted: bool,
    schedule: Schedule,
    /// Whether the view has been complete since this loop began: an incomplete one strikes the living.
    listed: bool,
    /// Whose pods are seen now.
    sight: Sight,
    /// Whether this term has had no list of its own yet.
    new_term: bool,
    round: Option<Round>,
    /// Namespaces that a round had to leave out, since they were not seen.
    skipped: HashSet<Box<str>>,
    /// The term that we write in; `None` where another leads.
    term: Option<Term>,
    /// The term of ours that was found to be over, though we were not told yet.
    beaten: Option<Term>,
    /// What the store is to answer to the next mark; `None` where it may answer anything.
    last_mark: Option<u64>,
    store_is_up: bool,
    tallies: Tallies,
    reports: Reports,
    progress: watch::Sender<Progress>,
}

impl<L: Ledger> Working<'_, L> {
    /// Never returns.
    async fn work(&mut self) -> Infallible {
        let reconciler = self.reconciler;
        let mut leadership = reconciler.leadership.clone();
        let mut watches = reconciler.sources.watch(&reconciler.metrics);
        let (mut began, mut listing) = (Instant::now(), true);
        let mut next_list = began + reconciler.interval;
        let mut beats = interval(BEAT);
        beats.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            self.sight = watches.sight(Instant::now());
            let due = self.schedule.next().filter(|_| self.may_write());
            let mut again = false;
            tokio::select! {
                word = watches.next() => {
                    self.hear(&mut watches, word);
                    if listing && (watches.listed() || self.can_do_without(&mut watches)) {
                        listing = false;
                        self.listed(began);
                    }
                }
                () = leadership.changed() => {}
                _ = beats.tick() => self.beat().await,
                () = sleep_until(next_list), if !listing => again = true,
                () = sleep_until(due.unwrap_or(next_list)), if due.is_some() => {
                    let due = self.schedule.take_due(Instant::now(), BATCH);
                    self.repair(due).await;
                }
            }
            // What was known before this process led may be what it heard before it was cut off.
            again |= self.follow_the_leader() && !listing && began.elapsed() > BEAT;
            if again {
                watches = reconciler.sources.watch(&reconciler.metrics);
                (began, listing) = (Instant::now(), true);
                next_list = began + reconciler.interval;
            } else if self.new_term && !listing {
                self.new_term = false;
                self.round = Some(Round { cause: Cause::Start, listing: None });
            }
            if self.term.is_some() {
                for complaint in self.view.take_complaints() {
                    complaint.invalid.iter().for_each(|invalid| reconciler.metrics.invalid(invalid));
                    self.reports.tell(complaint);
                }
            }
            self.sight = watches.sight(Instant::now());
            let sees = self.sight.sees_any(&reconciler.sources.namespaces);
            if self.round.is_none() && self.skipped.iter().any(|namespace| self.sight.covers(namespace)) {
                self.round = Some(Round { cause: Cause::Interval, listing: None });
            }
            if let Some(round) = self.round.filter(|_| sees && self.may_write()) {
                self.make(round).await;
            }
        }
    }

    /// Whether the lists that are missing cannot be had now, and the others have to do. Not at the start
    /// without the nodes: executors would count as what they were meant for.
    fn can_do_without(&self, watches: &mut Watches) -> bool {
        let namespaces = &self.reconciler.sources.namespaces;
        (self.listed || watches.knows_nodes()) && watches.can_do_without(namespaces, Instant::now())
    }

    /// Takes in all that the watches have to tell now.
    fn hear(&mut self, watches: &mut Watches, first: Word) {
        let label = &self.reconciler.sources.conventions.capacity_type_label;
        let (mut next, mut left) = (Some(first), MOST_WORDS);
        while let Some(word) = next.take() {
            watches.tell(&mut self.view, word, label);
            left -= 1;
            if left > 0 {
                next = watches.next().now_or_never();
            }
        }
        let (changed, now) = (self.view.take_changed(), Instant::now());
        self.uncounted |= !changed.is_empty();
        // Whoever comes to lead makes a round of all jobs first.
        if self.term.is_some() {
            for (job, change) in changed {
                self.schedule.changed(job, change, now);
            }
        }
    }

    /// All lists are complete, or cannot be had now.
    fn listed(&mut self, began: Instant) {
        let cause = if self.new_term || !self.listed { Cause::Start } else { Cause::Interval };
        (self.listed, self.new_term) = (true, false);
        self.count();
        if self.term.is_some() {
            self.round = Some(Round { cause, listing: Some(began) });
        }
    }

    /// Shows how many live, where this process leads: several would be added up. It goes through all
    /// executors, so only where something has changed.
    fn count(&mut self) {
        if self.term.is_some() && std::mem::take(&mut self.uncounted) {
            self.reconciler.metrics.live(self.view.totals());
        }
    }

    fn reach(&self, progress: Progress) {
        self.progress.send_if_modified(|reached| {
            let further = progress > *reached;
            *reached = progress.max(*reached);
            further
        });
    }

    fn may_write(&self) -> bool {
        self.term.is_some() && self.store_is_up && self.listed
    }

    /// Notes who leads. Each new term begins with a round of all jobs. Answers whether one does.
    fn follow_the_leader(&mut self) -> bool {
        let leadership = &self.reconciler.leadership;
        if self.listed && leadership.follows() {
            self.reach(Progress::StandingBy);
        }
        let term = leadership.term().filter(|term| Some(*term) != self.beaten);
        if term == self.term {
            return false;
        }
        self.term = term;
        if term.is_none() {
            self.reconciler.metrics.live(Totals::default());
        }
        self.uncounted = true;
        (self.schedule, self.tallies, self.last_mark) = (Schedule::default(), Tallies::default(), None);
        (self.new_term, self.round) = (term.is_some(), None);
        self.new_term
    }

    /// A round of all jobs: those that the cluster has, and those that only the store has.
    async fn make(&mut self, round: Round) {
        let begun = round.listing.unwrap_or_else(Instant::now);
        let jobs: Vec<_> = self.view.jobs().cloned().collect();
        for batch in jobs.chunks(BATCH) {
            let batch = batch.iter().map(|job| (Arc::clone(job), self.schedule.take(job))).collect();
            if !self.repair(batch).await {
                return;
            }
        }
        let (mut from, mut ended) = (Some(None), 0);
        self.skipped.clear();
        while let Some(cursor) = from {
            let page = match self.reconciler.ledger.list_jobs(cursor).await {
                Ok(page) => page,
                Err(error) => {
                    self.reconciler.metrics.store_failed(&error);
                    if !self.store_answers().await {
                        return;
                    }
                    tracing::warn!(store = error.kind(), %error, "cannot go through the jobs of the store");
                    break;
                }
            };
            from = page.next.map(Some);
            let gone: Vec<_> = page
                .jobs
                .into_iter()
                .filter(|job| self.reconciler.sources.covers(&job.namespace) && !self.view.knows(job))
                .filter(|job| {
                    let seen = self.sight.covers(&job.namespace);
                    if !seen {
                        self.skipped.insert(job.namespace.as_str().into());
                    }
                    seen
                })
                .map(|job| (Arc::new(job), None))
                .collect();
            ended += gone.len();
            if !self.repair(gone).await {
                return;
            }
        }
        self.round = None;
        let (took, cause) = (begun.elapsed(), round.cause);
        self.reconciler.metrics.resynced(cause, took);
        tracing::info!(cause = cause.as_str(), jobs = jobs.len(), ended, ?took, "went through all jobs");
        self.reach(Progress::Synced);
    }

    /// Makes the ledgers of these jobs what the view says. Answers whether that may go on.
    async fn repair(&mut self, jobs: Vec<(Arc<JobId>, Option<Instant>)>) -> bool {
        let Reconciler { ledger, leadership, sources, .. } = self.reconciler;
        let (seen, unseen): (Vec<_>, Vec<_>) = jobs.into_iter().partition(|(job, _)| self.sight.covers(&job.namespace));
        for (job, since) in unseen {
            self.schedule.put_back(job, since, Instant::now() + BEAT);
        }
        let (view, room) = (&self.view, &Semaphore::new(AT_ONCE as usize));
        let looks: Vec<Look> = stream::iter(seen)
            .map(|(job, since)| async move {
                let observed = view.observe(&job);
                // Never closed; a large job takes up the room of several.
                let _room = room.acquire_many(AT_ONCE.min(1 + observed.executors() / LARGE)).await;
                // Asked for each: the process may have been stopped in between.
                let answer = match leadership.term() {
                    Some(term) => {
                        Some(ledger.reconcile(job.as_job_ref(), &observed.observation(), sources.grace, term).await)
                    }
                    None => None,
                };
                Look { job, since, answer }
            })
            .buffer_unordered(AT_ONCE as usize)
            .collect()
            .await;
        let nexts: Vec<Next> = looks.into_iter().map(|look| self.note(look)).collect();
        if nexts.contains(&Next::Stop) {
            return false;
        }
        // The ledger of one job may be beyond reading; that is no reason to leave the others.
        !nexts.contains(&Next::AskTheStore) || self.store_answers().await
    }

    /// Notes what a look came to.
    fn note(&mut self, look: Look) -> Next {
        let Look { job, since, answer } = look;
        let (now, metrics) = (Instant::now(), &self.reconciler.metrics);
        match answer {
            Some(Ok(ReconcileOutcome::Done(mended))) => {
                self.mended(job, since, mended);
                Next::More
            }
            Some(Ok(ReconcileOutcome::Superseded(by))) => {
                let (namespace, id) = (&job.namespace, &job.app_id);
                tracing::warn!(namespace, job = id, term = by.0, "another reconciler has been here");
                metrics.repaired(RepairLabel::Superseded, Drift::default());
                self.beaten = self.term;
                self.reconciler.leadership.superseded(by);
                Next::Stop
            }
            Some(Err(error)) => {
                tracing::debug!(namespace = job.namespace, job = job.app_id, %error, "the ledger was not told");
                metrics.store_failed(&error);
                metrics.repaired(RepairLabel::Failed, Drift::default());
                self.schedule.put_back(job, since, now + FAILED_REST);
                Next::AskTheStore
            }
            None => Next::Stop,
        }
    }

    fn mended(&mut self, job: Arc<JobId>, since: Option<Instant>, mended: ReconcileSummary) {
        let ReconcileSummary { drift, counts, recheck_after } = mended;
        let (now, metrics) = (Instant::now(), &self.reconciler.metrics);
        metrics.repaired(if drift.is_none() { RepairLabel::Right } else { RepairLabel::Mended }, drift);
        if let Some(since) = since {
            metrics.lagged(now - since);
        }
        if !drift.is_none() {
            let (Drift { missing, stale, wrong_capacity }, Counts { spot, on_demand }) = (drift, counts);
            let (namespace, job) = (&job.namespace, &job.app_id);
            tracing::info!(namespace, job, missing, stale, wrong_capacity, spot, on_demand, "repaired");
        }
        self.schedule.repaired(&job, counts.total(), now);
        if let Some(recheck_after) = recheck_after {
            self.schedule.look_after(Arc::clone(&job), now + Duration::from_millis(recheck_after) + AFTER_THE_GRACE);
        }
        if self.view.knows(&job) || recheck_after.is_some() {
            self.tallies.expect(job, counts);
        } else {
            self.tallies.forget(&job);
        }
    }

    /// Once a second: whether the store is up and still knows what it knew, and whether the ledgers of
    /// some of the jobs count what we left in them.
    async fn beat(&mut self) {
        self.count();
        if self.term.is_some() && self.listed && self.store_answers().await && self.round.is_none() {
            self.look_over().await;
        }
    }

    /// Notes a mark in the store: whether it answers, and still has the last one. Where it does not,
    /// nothing more is asked of it but that.
    async fn store_answers(&mut self) -> bool {
        let mark = self.last_mark.map_or_else(|| RandomState::new().hash_one(()) >> 1, |last| last + 1);
        let before = match self.reconciler.ledger.heartbeat(mark).await {
            Ok(before) => before,
            Err(error) => {
                self.reconciler.metrics.store_failed(&error);
                if self.store_is_up {
                    tracing::warn!(store = error.kind(), %error, "the store does not answer; waiting for it");
                }
                self.store_is_up = false;
                return false;
            }
        };
        let forgot = self.last_mark.is_some() && before != self.last_mark;
        if forgot || !self.store_is_up {
            tracing::warn!(forgot, "the store is back, or has lost changes; going through all jobs");
            self.round = self.round.or(Some(Round { cause: Cause::Store, listing: None }));
        }
        (self.last_mark, self.store_is_up) = (Some(mark), true);
        true
    }

    /// Compares some of the ledgers' counts with what we left there: it tells of placements that came
    /// to no pod, and of ledgers that the store has lost. It also keeps the ledgers of jobs alive in
    /// which nothing happens.
    async fn look_over(&mut self) {
        let Reconciler { ledger, sources, .. } = self.reconciler;
        let seconds = (sources.grace / 4).clamp(BEAT, MOST_UNSEEN).as_secs();
        let some = self.tallies.turn(usize::try_from(seconds).unwrap_or(1));
        let answers: Vec<_> = stream::iter(some)
            .map(|(job, expected)| async move {
                let tally = ledger.counts(job.as_job_ref()).await;
                (job, expected, tally)
            })
            .buffer_unordered(AT_ONCE as usize)
            .collect()
            .await;
        for (job, expected, tally) in answers {
            match tally {
                Ok(Some(counts)) if counts == expected => {}
                Ok(_) => self.schedule.look_after(job, Instant::now()),
                // Whether the store is up is for the next mark to tell.
                Err(error) => self.reconciler.metrics.store_failed(&error),
            }
        }
    }
}
