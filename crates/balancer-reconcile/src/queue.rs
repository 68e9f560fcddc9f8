//! When each job's ledger is reconciled: soon after a change, but not for every change, and never so often that a large
//! job keeps the store busy. Pure: the clock is the caller's.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use balancer_core::JobId;
use tokio::time::Instant;

use crate::index::Change;

/// From a change to the reconcile: changes that arrive together are reconciled together.
const DEBOUNCE: Duration = Duration::from_millis(250);
/// From a loss to the reconcile. Spark requests another executor half a second after the loss or later, and its capacity
/// is decided by the ledger of that moment.
const LOSS_DEBOUNCE: Duration = Duration::from_millis(20);
/// The pause after a job was reconciled, for each of its executors. The store spends some 6 µs on each, and one job may
/// take a twentieth of its time.
const PAUSE_PER_EXECUTOR: Duration = Duration::from_micros(120);
/// The longest pause, however large the job is.
const MAX_PAUSE: Duration = Duration::from_secs(10);

/// The jobs to reconcile, each once.
#[derive(Debug, Default)]
pub(crate) struct WorkQueue {
    order: BTreeSet<(Instant, Arc<JobId>)>,
    jobs: HashMap<Arc<JobId>, Waiting>,
    /// When a large or failed job may be reconciled again at the earliest.
    not_before: HashMap<Arc<JobId>, Instant>,
}

#[derive(Clone, Copy, Debug)]
struct Waiting {
    due: Instant,
    /// When the first of its changes came; `None` if the job did not change.
    changed_at: Option<Instant>,
}

impl WorkQueue {
    /// The job has changed.
    pub(crate) fn enqueue(&mut self, job: Arc<JobId>, change: Change, now: Instant) {
        let debounce = match change {
            Change::Other => DEBOUNCE,
            Change::Loss => LOSS_DEBOUNCE,
        };
        self.put(job, Waiting { due: now + debounce, changed_at: Some(now) });
    }

    /// Reconciles the job at `due`, if not earlier.
    pub(crate) fn enqueue_at(&mut self, job: Arc<JobId>, due: Instant) {
        self.put(job, Waiting { due, changed_at: None });
    }

    /// The job could not be reconciled: retries at `due`, and not before. Its change keeps waiting.
    pub(crate) fn requeue(&mut self, job: Arc<JobId>, changed_at: Option<Instant>, due: Instant) {
        self.not_before.insert(Arc::clone(&job), due);
        self.put(job, Waiting { due, changed_at });
    }

    fn put(&mut self, job: Arc<JobId>, mut waiting: Waiting) {
        if let Some(not_before) = self.not_before.get(&job) {
            waiting.due = waiting.due.max(*not_before);
        }
        if let Some(before) = self.jobs.get(&job) {
            waiting.changed_at = before.changed_at.or(waiting.changed_at);
            waiting.due = before.due.min(waiting.due);
            self.order.remove(&(before.due, Arc::clone(&job)));
        }
        self.order.insert((waiting.due, Arc::clone(&job)));
        self.jobs.insert(job, waiting);
    }

    /// When the next job is due.
    pub(crate) fn next_due(&self) -> Option<Instant> {
        self.order.first().map(|(due, _)| *due)
    }

    /// Takes at most `max` of the jobs that are due, with the time of the first change of each.
    pub(crate) fn take_due(&mut self, now: Instant, max: usize) -> Vec<(Arc<JobId>, Option<Instant>)> {
        let mut taken = Vec::new();
        while taken.len() < max
            && let Some((due, _)) = self.order.first()
            && *due <= now
            && let Some((_, job)) = self.order.pop_first()
        {
            let changed_at = self.jobs.remove(&job).and_then(|waiting| waiting.changed_at);
            taken.push((job, changed_at));
        }
        taken
    }

    /// Removes a job that is reconciled without the queue. Returns the time of its first change.
    pub(crate) fn remove(&mut self, job: &Arc<JobId>) -> Option<Instant> {
        let waiting = self.jobs.remove(job)?;
        self.order.remove(&(waiting.due, Arc::clone(job)));
        waiting.changed_at
    }

    /// The job was reconciled now, and has so many executors.
    pub(crate) fn reconciled(&mut self, job: &Arc<JobId>, executors: u64, now: Instant) {
        self.not_before.retain(|_, not_before| *not_before > now);
        let pause = PAUSE_PER_EXECUTOR.saturating_mul(u32::try_from(executors).unwrap_or(u32::MAX)).min(MAX_PAUSE);
        if pause > LOSS_DEBOUNCE {
            self.not_before.insert(Arc::clone(job), now + pause);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn job(id: &str) -> Arc<JobId> {
        Arc::new(JobId { namespace: "etl".into(), app_id: id.into() })
    }

    #[test]
    fn changes_that_arrive_together_are_reconciled_together_a_debounce_after_the_first() {
        let (mut queue, start) = (WorkQueue::default(), Instant::now());
        for i in 0..100 {
            queue.enqueue(job("a"), Change::Other, start + i * MS);
        }
        assert_eq!(queue.next_due(), Some(start + DEBOUNCE));
        assert!(queue.take_due(start + DEBOUNCE - MS, 9).is_empty());
        assert_eq!(queue.take_due(start + DEBOUNCE, 9), [(job("a"), Some(start))]);
        assert_eq!(queue.next_due(), None);
    }

    #[test]
    fn a_change_comes_before_a_later_recheck() {
        let (mut queue, start) = (WorkQueue::default(), Instant::now());
        queue.enqueue_at(job("a"), start + 60_000 * MS);
        queue.enqueue(job("a"), Change::Other, start);
        assert_eq!(queue.next_due(), Some(start + DEBOUNCE));
        queue.enqueue_at(job("a"), start + 60_000 * MS);
        assert_eq!(queue.take_due(start + DEBOUNCE, 9).len(), 1);
        assert_eq!(queue.next_due(), None);
    }

    #[test]
    fn a_loss_is_reconciled_sooner_together_with_the_other_changes() {
        let (mut queue, start) = (WorkQueue::default(), Instant::now());
        queue.enqueue(job("a"), Change::Other, start);
        queue.enqueue(job("a"), Change::Loss, start + 10 * MS);
        queue.enqueue(job("a"), Change::Other, start + 11 * MS);
        assert_eq!(queue.next_due(), Some(start + 10 * MS + LOSS_DEBOUNCE));
        assert_eq!(queue.take_due(start + 30 * MS, 9), [(job("a"), Some(start))]);
        // 500 executors pause for 60 ms.
        queue.reconciled(&job("a"), 500, start + 30 * MS);
        queue.enqueue(job("a"), Change::Loss, start + 31 * MS);
        assert_eq!(queue.next_due(), Some(start + 90 * MS));
    }

    #[test]
    fn a_requeued_job_waits_even_if_it_changes() {
        let (mut queue, start) = (WorkQueue::default(), Instant::now());
        queue.requeue(job("a"), Some(start), start + 2_000 * MS);
        queue.enqueue(job("a"), Change::Loss, start + MS);
        assert_eq!(queue.next_due(), Some(start + 2_000 * MS));
        assert_eq!(queue.take_due(start + 2_000 * MS, 9), [(job("a"), Some(start))]);
    }

    #[test]
    fn take_due_returns_at_most_max_jobs_longest_due_first() {
        let (mut queue, start) = (WorkQueue::default(), Instant::now());
        for (i, id) in ["c", "b", "a"].into_iter().enumerate() {
            queue.enqueue_at(job(id), start + MS * u32::try_from(i).unwrap_or_default());
        }
        let taken = queue.take_due(start + DEBOUNCE, 2);
        assert_eq!(taken, [(job("c"), None), (job("b"), None)]);
    }

    #[test]
    fn a_large_job_is_reconciled_less_often() {
        let (mut queue, start) = (WorkQueue::default(), Instant::now());
        queue.reconciled(&job("large"), 10_000, start);
        queue.reconciled(&job("larger"), 1_000_000, start);
        queue.reconciled(&job("small"), 100, start);
        queue.enqueue(job("large"), Change::Other, start);
        queue.enqueue_at(job("larger"), start);
        queue.enqueue(job("small"), Change::Other, start);
        assert_eq!(queue.take_due(start + DEBOUNCE, 9), [(job("small"), Some(start))]);
        assert_eq!(queue.next_due(), Some(start + 1_200 * MS));
        assert_eq!(queue.take_due(start + MAX_PAUSE, 9).len(), 2);
    }
}
