//! Steers jobs away from pools of spot nodes that have too large a share of them, and shows how large the shares are.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use balancer_core::{JobId, SpotRatio, Steer, SteerOutcome};
use balancer_store::Ledger;
use futures::{StreamExt, stream};
use tokio::time::Instant;

use crate::blast_radius::Place;
use crate::events::{Warning, WarningReason};
use crate::state::{Parts, State};

/// From a change of a job to the next answer: pods that are bound together are handled together.
const DEBOUNCE: Duration = Duration::from_millis(50);
/// From one answer to the next. So no job's ledger is changed more often, and a pass over all jobs takes little time. Spark
/// requests executors once a second: this is so short that the next ones are placed by an answer that has all of the former
/// ones. With a whole second each answer had half of a request at best.
const PERIOD: Duration = Duration::from_millis(250);
/// Jobs that are handled before events are received again.
const BATCH: usize = 1024;
/// Calls to the store at once.
const CONCURRENCY: usize = 8;
/// No call is started later than this after the first one, so that a slow store does not keep the loop from anything else.
const TURN: Duration = Duration::from_millis(500);

/// The jobs whose executors may be spread in another way by now. Pure: the clock is the caller's.
#[derive(Debug, Default)]
pub(crate) struct ChangedShares {
    jobs: HashSet<Arc<JobId>>,
    due: Option<Instant>,
    taken_at: Option<Instant>,
}

impl ChangedShares {
    /// Something about the job has changed, or could not be done.
    pub(crate) fn insert(&mut self, job: &Arc<JobId>, now: Instant) {
        if !self.jobs.contains(job) {
            self.jobs.insert(Arc::clone(job));
        }
        self.due.get_or_insert_with(|| self.taken_at.map_or(now, |at| at + PERIOD).max(now + DEBOUNCE));
    }

    /// When jobs are to be taken.
    pub(crate) fn due(&self) -> Option<Instant> {
        self.due
    }

    /// Takes some of the jobs. The others are due at once.
    fn take(&mut self, now: Instant) -> Vec<Arc<JobId>> {
        if self.jobs.len() <= BATCH {
            (self.due, self.taken_at) = (None, Some(now));
            return self.jobs.drain().collect();
        }
        let taken: Vec<_> = self.jobs.iter().take(BATCH).cloned().collect();
        for job in &taken {
            self.jobs.remove(job);
        }
        taken
    }
}

impl<L: Ledger> State<'_, L> {
    /// Computes the shares of the jobs that have changed, and tells the ledgers which instance types to avoid, if that is
    /// something else than before.
    pub(crate) async fn steer_pools(&mut self) {
        let now = Instant::now();
        let mut steered = Vec::new();
        for job in self.changed_shares.take(now) {
            if !self.index.contains(&job) {
                self.blast_radius.remove(&job);
                continue;
            }
            if !self.sync.is_synced(&job.namespace) {
                self.changed_shares.insert(&job, now);
                continue;
            }
            let policy = self.index.policy(&job, self.audit.policy(&job, None));
            let shares = match policy.spot_ratio {
                SpotRatio::Off => Default::default(),
                SpotRatio::Share(_) => self.index.shares(&job),
            };
            self.blast_radius.update(&job, &shares, policy.max_pool_share, now);
            let avoid = shares.avoided(policy.max_pool_share);
            // Before its first reconcile it is not known what the ledger has. The reconcile leads here again.
            if self.audit.steering(&job).is_some_and(|known| known.avoid != avoid) {
                steered.push((job, avoid));
            }
        }
        let Some(term) = self.reconciler.leadership.term().filter(|_| !steered.is_empty()) else { return };
        let (watchdog, Parts { ledger, .. }) = (&self.watchdog, &self.reconciler.parts);
        let answers: Vec<_> = stream::iter(steered)
            .map(|(job, avoid)| async move {
                if now.elapsed() >= TURN {
                    return (job, avoid, None);
                }
                let answer = ledger.steer(job.as_job_ref(), Steer::Avoid(&avoid), term).await;
                watchdog.turned();
                (job, avoid, Some(answer))
            })
            .buffer_unordered(CONCURRENCY)
            .collect()
            .await;
        for (job, avoid, answer) in answers {
            let (namespace, id) = (&job.namespace, &job.app_id);
            match answer {
                None => self.changed_shares.insert(&job, now),
                Some(Ok(SteerOutcome::Done)) => {
                    tracing::debug!(namespace, job = id, ?avoid, "instance types to avoid stored");
                    self.audit.steered(&job, |steering| steering.avoid = avoid);
                }
                // A reconcile restores what was lost, and leads here again.
                Some(Ok(SteerOutcome::NoLedger)) => {}
                Some(Ok(SteerOutcome::Superseded(term))) => self.superseded(&job, term),
                Some(Err(error)) => {
                    tracing::debug!(namespace, job = id, %error, "failed to steer the job; retrying");
                    self.reconciler.parts.metrics.store_failed(&error);
                    self.changed_shares.insert(&job, now);
                }
            }
        }
    }

    /// Shows the shares of all jobs, and reports those that have been too large for a while.
    pub(crate) fn report_shares(&mut self) {
        if !self.terms.leads() {
            return;
        }
        self.reconciler.parts.metrics.set_shares(self.blast_radius.by_share());
        let is_synced = |namespace: &str| self.sync.is_synced(namespace);
        for report in self.blast_radius.take_reports(Instant::now(), self.events.room(), is_synced) {
            let (note, job) = (report.note(), report.job);
            let reason = match report.place {
                Place::Node => WarningReason::LargeNodeShare,
                Place::Pool(_) => WarningReason::LargePoolShare,
            };
            tracing::warn!(namespace = job.namespace, job = job.app_id, note, "too many executors in one place");
            if let Some(driver) = self.index.driver(&job) {
                self.events.record(Warning { driver, reason, about: job.app_id.clone(), note });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn job(id: usize) -> Arc<JobId> {
        Arc::new(JobId { namespace: "etl".into(), app_id: id.to_string() })
    }

    #[test]
    fn a_change_is_handled_soon_and_no_job_more_than_four_times_a_second() {
        let (mut changed, start) = (ChangedShares::default(), Instant::now());
        assert_eq!(changed.due(), None);
        for after in [0, 10, 40] {
            changed.insert(&job(1), start + after * MS);
        }
        assert_eq!(changed.due(), Some(start + 50 * MS));
        assert_eq!(changed.take(start + 60 * MS), [job(1)]);
        assert_eq!(changed.due(), None);
        changed.insert(&job(1), start + 100 * MS);
        assert_eq!(changed.due(), Some(start + 310 * MS));
        changed.take(start + 310 * MS);
        changed.insert(&job(1), start + 9_000 * MS);
        assert_eq!(changed.due(), Some(start + 9_050 * MS));
    }

    #[test]
    fn many_jobs_are_taken_in_parts() {
        let (mut changed, now) = (ChangedShares::default(), Instant::now());
        for id in 0..2 * BATCH + 1 {
            changed.insert(&job(id), now);
        }
        let taken: Vec<usize> = (0..3).map(|_| changed.take(now + DEBOUNCE).len()).collect();
        assert_eq!((taken, changed.due()), (vec![BATCH, BATCH, 1], None));
    }
}
