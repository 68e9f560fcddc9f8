//! Closes spot to jobs whose executors find no spot node, has these executors replaced, and opens spot again. What to do
//! is decided in `fallback`.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use balancer_core::{
    Capacity, JobId, Millis, Policy, SpotPreference, SpotRatio, SpotState, Steer, SteerOutcome, Steering, millis,
};
use balancer_runtime::text::number_of;
use balancer_store::Ledger;
use tokio::time::Instant;

use crate::events::{Warning, WarningReason};
use crate::fallback::{Deletion, Failure, Probe, Step, View, worst_failure};
use crate::index::Executors;
use crate::metrics::{ReplacedLabel, SpotLabel};
use crate::replace::{Answer, Result};
use crate::state::{Parts, State};
use crate::stuck::StuckExecutor;

/// Calls to the store about one job in a row: it is closed, and then its executors are deleted.
const MAX_STEPS: usize = 3;
/// No job has its turn later than this after the first one, so that a slow store does not keep the loop from anything else.
/// The others have their turn a second later.
const TURN: Duration = Duration::from_millis(500);
/// A longer time than this since spot was closed is not believed: the store's clock does not count from 1970.
const MAX_AGE: Duration = Duration::from_secs(30 * 86_400);

impl<L: Ledger> State<'_, L> {
    /// The job's ledger was found with this steering. What the store has lost is stored again.
    pub(crate) fn observe_steering(&mut self, job: &Arc<JobId>, steering: &Steering) {
        if self.audit.steering(job).is_some_and(|known| known.avoid != steering.avoid) {
            self.changed_shares.insert(job, Instant::now());
        }
        self.jobs_view.insert(job);
        let spot = &steering.spot;
        let age = match spot {
            SpotState::Open => Duration::ZERO,
            SpotState::Starved { since, .. } | SpotState::Probing { since, .. } => age(*since),
        };
        self.fallback.observe(job, spot, age, Instant::now());
    }

    /// Takes the next step for each job that needs one, and shows for how many spot is closed.
    pub(crate) async fn follow_spot(&mut self) {
        if !self.terms.leads() {
            return;
        }
        let index = &self.index;
        self.fallback.retain(|job| index.contains(job));
        let mut stuck = HashMap::<Arc<JobId>, Vec<StuckExecutor>>::new();
        for (namespace, executor) in self.waiting.stuck.iter() {
            if let Some(job) = index.job_of_executor(namespace, &executor.pod.name) {
                stuck.entry(job).or_default().push(executor.clone());
            }
        }
        for job in self.fallback.jobs() {
            if !stuck.contains_key(job) {
                stuck.insert(Arc::clone(job), Vec::new());
            }
        }
        let started = Instant::now();
        for (job, stuck) in stuck {
            if started.elapsed() >= TURN || !self.may_write() {
                break;
            }
            if self.sync.is_synced(&job.namespace) {
                self.take_steps(&job, &stuck).await;
            }
        }
        let (jobs, oldest) = self.fallback.closed(Instant::now());
        self.reconciler.parts.metrics.set_spot_closed(jobs, oldest);
    }

    /// The Kubernetes API has answered about the executors of a job.
    pub(crate) async fn replaced(&mut self, answer: Answer) {
        let Answer { job, result, error } = answer;
        let now = Instant::now();
        match result {
            Result::Checked(checked) => {
                if let (Some(failure), Some(error)) = (checked.failure, error) {
                    self.report_failure(&job, failure, "list events", &error);
                    self.reconciler.parts.metrics.replaced(failure.into());
                }
                self.fallback.checked(&job, checked, now);
            }
            Result::Deleted(deleted) => {
                if let (Some(failure), Some(error)) = (worst_failure(&deleted), error) {
                    self.report_failure(&job, failure, "delete pods", &error);
                }
                self.count_deletions(&job, deleted.iter().map(|(_, deletion)| *deletion));
                self.fallback.deleted(&job, &deleted, now);
            }
        }
        // The answer about the nodes of some executors grows old.
        if self.may_write() && self.sync.is_synced(&job.namespace) {
            let is_of_job = |stuck: &&StuckExecutor| {
                self.index.job_of_executor(&job.namespace, &stuck.pod.name).is_some_and(|other| other == job)
            };
            let stuck: Vec<_> = self.waiting.stuck.of_namespace(&job.namespace).filter(is_of_job).cloned().collect();
            self.take_steps(&job, &stuck).await;
        }
    }

    /// Takes the steps that the job needs now.
    async fn take_steps(&mut self, job: &Arc<JobId>, stuck: &[StuckExecutor]) {
        let policy = self.policy_in_use(job);
        // An executor that may run anywhere tells nothing about spot. Those placed before a change to BEST_EFFORT wait on.
        let is_held = !stuck.is_empty() || self.reconciler.parts.conventions.spot_preference == SpotPreference::Strict;
        let view = View {
            fallback: fallback(policy).filter(|_| is_held),
            retry: Duration::from_secs(policy.spot_retry_seconds.into()),
            live: self.index.executors(job),
            stuck,
            probe: self.probe(job),
        };
        for _ in 0..MAX_STEPS {
            match self.fallback.step(job, view, Instant::now()) {
                Step::None => return,
                Step::Check(pods) => {
                    self.pod_calls.check(job, pods, view.fallback.unwrap_or_default());
                    return;
                }
                Step::Delete(pods) => {
                    self.pod_calls.delete(job, pods);
                    return;
                }
                Step::Close { retry_after } => {
                    if !self.steer(job, Steer::CloseSpot { retry_after: millis(retry_after) }).await {
                        return;
                    }
                    if self.fallback.closed_spot(job, retry_after, Instant::now()) {
                        self.report_closed(job, view);
                    } else {
                        let (namespace, job) = (&job.namespace, &job.app_id);
                        tracing::info!(namespace, job, ?retry_after, "spot stays closed for the job");
                    }
                }
                Step::Open => {
                    if !self.steer(job, Steer::OpenSpot).await {
                        return;
                    }
                    let closed_for = self.fallback.opened_spot(job, Instant::now());
                    self.report_opened(job, closed_for, view.fallback.is_none());
                }
            }
        }
    }

    /// The policy that the job's placements follow.
    fn policy_in_use(&self, job: &JobId) -> Policy {
        self.index.policy(job, self.audit.policy(job, self.index.desired_driver(job)))
    }

    fn probe(&self, job: &JobId) -> Probe {
        let capacity = self.fallback.probe(job).and_then(|key| self.index.bound_capacity(job, key));
        match capacity {
            None => Probe::Waits,
            Some(Capacity::Spot) => Probe::OnSpot,
            Some(Capacity::OnDemand) => Probe::OnOnDemand,
        }
    }

    /// Changes what the job's placements follow. Returns whether it is stored.
    pub(crate) async fn steer(&mut self, job: &Arc<JobId>, steer: Steer<'_>) -> bool {
        let Parts { ledger, metrics, .. } = &self.reconciler.parts;
        let Some(term) = self.reconciler.leadership.term().filter(|_| self.may_write()) else { return false };
        let answer = ledger.steer(job.as_job_ref(), steer, term).await;
        self.watchdog.turned();
        match answer {
            Ok(SteerOutcome::Done) => {
                self.audit.steered(job, |steering| follow_steer(&mut steering.spot, steer));
                self.jobs_view.insert(job);
                true
            }
            Ok(SteerOutcome::NoLedger) => {
                self.queue.enqueue_at(Arc::clone(job), Executors::All, Instant::now());
                false
            }
            Ok(SteerOutcome::Superseded(term)) => {
                self.superseded(job, term);
                false
            }
            Err(error) => {
                let (namespace, job) = (&job.namespace, &job.app_id);
                tracing::debug!(namespace, job, %error, "failed to change what the job's placements follow; retrying");
                metrics.store_failed(&error);
                self.is_store_up().await;
                false
            }
        }
    }

    fn report_closed(&self, job: &JobId, view: View<'_>) {
        let metrics = &self.reconciler.parts.metrics;
        metrics.spot_changed(SpotLabel::Closed);
        let waited = view.fallback.unwrap_or_default();
        let is_ripe = |stuck: &&StuckExecutor| stuck.since.elapsed() >= waited;
        let stuck = view.stuck.iter().filter(is_ripe).count();
        let (namespace, id, retry) = (&job.namespace, &job.app_id, view.retry.as_secs());
        tracing::warn!(namespace, job = id, stuck, ?waited, retry_after = ?view.retry, "spot closed for the job");
        let have = if stuck == 1 { "has" } else { "have" };
        self.record_event(job, WarningReason::SpotClosed, || {
            format!(
                "{} {have} found no spot node for at least {} s. New executors go to on-demand. In {retry} s, and every \
                 {retry} s from then on, one executor tries spot; if it finds a node, the job returns to its spot ratio",
                number_of(stuck, "executor"),
                waited.as_secs(),
            )
        });
    }

    fn report_opened(&self, job: &JobId, closed_for: Duration, is_off: bool) {
        let metrics = &self.reconciler.parts.metrics;
        metrics.spot_changed(SpotLabel::Open);
        let (namespace, id) = (&job.namespace, &job.app_id);
        tracing::info!(namespace, job = id, ?closed_for, is_off, "spot opened for the job");
        let why = if is_off { "The fallback from spot is off" } else { "An executor has found a spot node" };
        self.record_event(job, WarningReason::SpotReopened, || {
            format!("{why}, after {} s without spot. The job's spot ratio applies again", closed_for.as_secs())
        });
    }

    /// A call about the job's executors has failed.
    fn report_failure(&self, job: &JobId, failure: Failure, right: &str, error: &str) {
        let (namespace, id) = (&job.namespace, &job.app_id);
        if failure == Failure::Unavailable {
            tracing::warn!(namespace, job = id, error, "cannot replace executors that find no spot node; retrying");
            return;
        }
        tracing::warn!(namespace, job = id, right, error, "may not replace executors that find no spot node");
        self.record_event(job, WarningReason::ExecutorReplacementForbidden, || {
            format!(
                "Executors that find no spot node are not replaced, because the reconciler may not {right} in this \
                 namespace; it needs the rights to list events and to delete pods. New executors go to on-demand all the \
                 same"
            )
        });
    }

    fn count_deletions(&self, job: &JobId, deletions: impl Iterator<Item = Deletion>) {
        let mut deleted = 0u64;
        for deletion in deletions {
            let outcome = match deletion {
                Deletion::Deleted => ReplacedLabel::Deleted,
                Deletion::Gone => ReplacedLabel::Gone,
                Deletion::Changed => ReplacedLabel::Changed,
                Deletion::Failed(failure) => failure.into(),
            };
            deleted += u64::from(deletion == Deletion::Deleted);
            self.reconciler.parts.metrics.replaced(outcome);
        }
        if deleted > 0 {
            let (namespace, job) = (&job.namespace, &job.app_id);
            tracing::info!(namespace, job, deleted, "executors deleted: they have found no spot node");
        }
    }

    /// Creates an Event on the job's driver, if it is known.
    fn record_event(&self, job: &JobId, reason: WarningReason, note: impl FnOnce() -> String) {
        let Some(driver) = self.index.driver(job) else { return };
        // Every time that spot is closed or opened gets an Event; a missing right gets one for each driver.
        let about = match reason {
            WarningReason::ExecutorReplacementForbidden => job.app_id.clone(),
            _ => format!("{} {}", job.app_id, unix_time().as_secs()),
        };
        self.events.record(Warning { driver, reason, about, note: note() });
    }
}

/// How long an executor of a job with this policy may find no spot node; `None` if it may do so forever.
fn fallback(policy: Policy) -> Option<Duration> {
    let is_on = policy.spot_fallback_seconds > 0 && policy.spot_ratio != SpotRatio::Off;
    is_on.then(|| Duration::from_secs(policy.spot_fallback_seconds.into()))
}

/// What the ledger has of spot after this change, by the clock of this process.
fn follow_steer(spot: &mut SpotState, steer: Steer<'_>) {
    let now = Millis::try_from(unix_time().as_millis()).unwrap_or(Millis::MAX);
    match steer {
        Steer::Avoid(_) => {}
        Steer::OpenSpot => *spot = SpotState::Open,
        Steer::CloseSpot { retry_after } => {
            let since = match *spot {
                SpotState::Open => now,
                SpotState::Starved { since, .. } | SpotState::Probing { since, .. } => since,
            };
            *spot = SpotState::Starved { since, retry_at: now.saturating_add(retry_after) };
        }
    }
}

/// How long ago this was. The clock of Redis is that of its machine, and the store in memory has one of its own.
fn age(since: Millis) -> Duration {
    let age = unix_time().saturating_sub(Duration::from_millis(since));
    if age > MAX_AGE { Duration::ZERO } else { age }
}

fn unix_time() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}
