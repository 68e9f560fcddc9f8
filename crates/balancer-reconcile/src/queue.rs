//! When each job's ledger is reconciled, and of which executors: soon after a change, but not for every change. Pure: the
//! clock is the caller's.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use balancer_core::JobId;
use tokio::time::Instant;

use crate::index::{Change, Executors};

/// From a change to the reconcile: changes that arrive together are reconciled together.
const DEBOUNCE: Duration = Duration::from_millis(250);
/// From a loss to the reconcile. Spark requests another executor half a second after the loss or later, and its capacity
/// is decided by the ledger of that moment.
const LOSS_DEBOUNCE: Duration = Duration::from_millis(20);

/// Executors of all jobs that are taken at once. To name them keeps the store busy for less than a tenth of a second.
pub(crate) const MAX_NAMED: usize = 4 * Executors::MAX;

/// The jobs to reconcile, each once.
#[derive(Debug, Default)]
pub(crate) struct WorkQueue {
    order: BTreeSet<(Instant, Arc<JobId>)>,
    jobs: HashMap<Arc<JobId>, Waiting>,
    /// When a job that could not be reconciled may be reconciled again at the earliest.
    not_before: HashMap<Arc<JobId>, Instant>,
}

#[derive(Clone, Debug)]
struct Waiting {
    due: Instant,
    /// When the first of its changes came; `None` if the job did not change.
    changed_at: Option<Instant>,
    executors: BTreeSet<Arc<str>>,
    compares_all: bool,
}

/// A job to reconcile.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Due {
    pub(crate) job: Arc<JobId>,
    /// When the first of its changes came; `None` if the job did not change.
    pub(crate) changed_at: Option<Instant>,
    /// The executors whose entries are probably wrong. They do not wait until the whole ledger is compared.
    pub(crate) executors: BTreeSet<Arc<str>>,
    /// Whether any other entry may be wrong too.
    pub(crate) compares_all: bool,
}

impl WorkQueue {
    /// The job has changed, and the entries of these executors may be wrong.
    pub(crate) fn enqueue(&mut self, job: Arc<JobId>, change: Change, executors: Executors, now: Instant) {
        let debounce = match change {
            Change::Other => DEBOUNCE,
            Change::Loss => LOSS_DEBOUNCE,
        };
        self.put(job, Waiting::new(now + debounce, Some(now), executors));
    }

    /// Reconciles the job at `due`, if not earlier, with these executors.
    pub(crate) fn enqueue_at(&mut self, job: Arc<JobId>, executors: Executors, due: Instant) {
        self.put(job, Waiting::new(due, None, executors));
    }

    /// The job could not be reconciled: retries at `retry_at`, and not before. Its changes keep waiting.
    pub(crate) fn requeue(&mut self, due: Due, retry_at: Instant) {
        let Due { job, changed_at, executors, compares_all } = due;
        self.not_before.insert(Arc::clone(&job), retry_at);
        self.put(job, Waiting { due: retry_at, changed_at, executors, compares_all });
    }

    fn put(&mut self, job: Arc<JobId>, mut waiting: Waiting) {
        if let Some(not_before) = self.not_before.get(&job) {
            waiting.due = waiting.due.max(*not_before);
        }
        if let Some(before) = self.jobs.remove(&job) {
            waiting.changed_at = before.changed_at.or(waiting.changed_at);
            waiting.executors.extend(before.executors);
            waiting.compares_all |= before.compares_all;
            self.order.remove(&(before.due, Arc::clone(&job)));
            waiting.due = before.due.min(waiting.due);
        }
        if waiting.executors.len() > Executors::MAX {
            (waiting.executors, waiting.compares_all) = (BTreeSet::new(), true);
        }
        self.order.insert((waiting.due, Arc::clone(&job)));
        self.jobs.insert(job, waiting);
    }

    /// When the next job is due.
    pub(crate) fn next_due(&self) -> Option<Instant> {
        self.order.first().map(|(due, _)| *due)
    }

    /// Takes at most `max` of the jobs that are due, and fewer if many of their executors are named.
    pub(crate) fn take_due(&mut self, now: Instant, max: usize) -> Vec<Due> {
        self.not_before.retain(|_, not_before| *not_before > now);
        let (mut taken, mut named) = (Vec::new(), 0);
        while taken.len() < max
            && named < MAX_NAMED
            && let Some((due, _)) = self.order.first()
            && *due <= now
            && let Some((_, job)) = self.order.pop_first()
        {
            if let Some(Waiting { changed_at, executors, compares_all, .. }) = self.jobs.remove(&job) {
                named += executors.len();
                taken.push(Due { job, changed_at, executors, compares_all });
            }
        }
        taken
    }

    /// Removes a job that is reconciled without the queue.
    pub(crate) fn remove(&mut self, job: &Arc<JobId>) -> Option<Due> {
        let Waiting { due, changed_at, executors, compares_all } = self.jobs.remove(job)?;
        let job = Arc::clone(job);
        self.order.remove(&(due, Arc::clone(&job)));
        Some(Due { job, changed_at, executors, compares_all })
    }
}

impl Due {
    /// The whole ledger of a job that has not changed.
    pub(crate) fn all(job: Arc<JobId>) -> Self {
        Self { job, changed_at: None, executors: BTreeSet::new(), compares_all: true }
    }
}

impl Waiting {
    fn new(due: Instant, changed_at: Option<Instant>, executors: Executors) -> Self {
        let (executors, compares_all) = match executors {
            Executors::Some(executors) => (executors, false),
            Executors::All => (BTreeSet::new(), true),
        };
        Self { due, changed_at, executors, compares_all }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn job(id: &str) -> Arc<JobId> {
        Arc::new(JobId { namespace: "etl".into(), app_id: id.into() })
    }

    fn executors(keys: &[&str]) -> Executors {
        Executors::Some(keys.iter().map(|key| Arc::from(*key)).collect())
    }

    fn due(id: &str, changed_at: Option<Instant>, keys: &[&str]) -> Due {
        let executors = keys.iter().map(|key| Arc::from(*key)).collect();
        Due { job: job(id), changed_at, executors, compares_all: false }
    }

    #[test]
    fn changes_that_arrive_together_are_reconciled_together_a_debounce_after_the_first() {
        let (mut queue, start) = (WorkQueue::default(), Instant::now());
        for (i, key) in (0..100).zip(["e1", "e2"].into_iter().cycle()) {
            queue.enqueue(job("a"), Change::Other, executors(&[key]), start + i * MS);
        }
        assert_eq!(queue.next_due(), Some(start + DEBOUNCE));
        assert!(queue.take_due(start + DEBOUNCE - MS, 9).is_empty());
        assert_eq!(queue.take_due(start + DEBOUNCE, 9), [due("a", Some(start), &["e1", "e2"])]);
        assert_eq!(queue.next_due(), None);
    }

    #[test]
    fn a_change_comes_before_a_later_recheck() {
        let (mut queue, start) = (WorkQueue::default(), Instant::now());
        queue.enqueue_at(job("a"), executors(&["e1"]), start + 60_000 * MS);
        queue.enqueue(job("a"), Change::Other, executors(&["e2"]), start);
        assert_eq!(queue.next_due(), Some(start + DEBOUNCE));
        queue.enqueue_at(job("a"), executors(&[]), start + 60_000 * MS);
        assert_eq!(queue.take_due(start + DEBOUNCE, 9), [due("a", Some(start), &["e1", "e2"])]);
        assert_eq!(queue.next_due(), None);
    }

    #[test]
    fn a_loss_is_reconciled_sooner_together_with_the_other_changes() {
        let (mut queue, start) = (WorkQueue::default(), Instant::now());
        queue.enqueue(job("a"), Change::Other, executors(&["e1"]), start);
        queue.enqueue(job("a"), Change::Loss, executors(&["e2"]), start + 10 * MS);
        queue.enqueue(job("a"), Change::Other, executors(&[]), start + 11 * MS);
        assert_eq!(queue.next_due(), Some(start + 10 * MS + LOSS_DEBOUNCE));
        assert_eq!(queue.take_due(start + 30 * MS, 9), [due("a", Some(start), &["e1", "e2"])]);
    }

    #[test]
    fn a_requeued_job_waits_even_if_it_changes_and_keeps_its_executors() {
        let (mut queue, start) = (WorkQueue::default(), Instant::now());
        queue.requeue(due("a", Some(start), &["e1"]), start + 2_000 * MS);
        queue.enqueue(job("a"), Change::Loss, executors(&["e2"]), start + MS);
        assert_eq!(queue.next_due(), Some(start + 2_000 * MS));
        assert_eq!(queue.take_due(start + 2_000 * MS, 9), [due("a", Some(start), &["e1", "e2"])]);
    }

    #[test]
    fn take_due_returns_at_most_max_jobs_longest_due_first() {
        let (mut queue, start) = (WorkQueue::default(), Instant::now());
        for (i, id) in ["c", "b", "a"].into_iter().enumerate() {
            queue.enqueue_at(job(id), executors(&[]), start + MS * u32::try_from(i).unwrap_or_default());
        }
        let taken = queue.take_due(start + DEBOUNCE, 2);
        assert_eq!(taken, [due("c", None, &[]), due("b", None, &[])]);
    }

    #[test]
    fn few_jobs_are_taken_at_once_if_many_of_their_executors_are_named() {
        let (mut queue, start) = (WorkQueue::default(), Instant::now());
        let names: Vec<_> = (0..Executors::MAX).map(|number| number.to_string()).collect();
        let names: Vec<_> = names.iter().map(String::as_str).collect();
        for id in 0..10 {
            queue.enqueue_at(job(&id.to_string()), executors(&names), start);
        }
        let taken: Vec<_> = (0..3).map(|_| queue.take_due(start, 9).len()).collect();
        assert_eq!(taken, [4, 4, 2]);
    }

    #[test]
    fn what_is_named_does_not_wait_for_a_comparison_of_everything() {
        let (mut queue, start) = (WorkQueue::default(), Instant::now());
        queue.enqueue_at(job("a"), executors(&["e1"]), start);
        queue.enqueue_at(job("a"), Executors::All, start);
        queue.enqueue_at(job("a"), executors(&["e2"]), start);
        let taken = queue.take_due(start, 9);
        assert_eq!(taken, [Due { compares_all: true, ..due("a", None, &["e1", "e2"]) }]);
    }

    #[test]
    fn so_many_names_that_they_take_much_memory_are_all() {
        let (mut queue, start) = (WorkQueue::default(), Instant::now());
        for number in 0..=Executors::MAX {
            queue.enqueue_at(job("a"), executors(&[&number.to_string()]), start);
        }
        assert_eq!(queue.take_due(start, 9), [Due::all(job("a"))]);
    }
}
