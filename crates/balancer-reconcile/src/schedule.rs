//! When which job's ledger is looked at: soon after a change, not for every change, and never so often
//! that a large job keeps the store busy. Pure: the clock is the caller's.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use balancer_core::JobId;
use tokio::time::Instant;

use crate::view::Change;

/// From a change to the repair: the changes that come with it are repaired together.
const DEBOUNCE: Duration = Duration::from_millis(250);
/// From a loss to the repair. Spark asks for another executor half a second after the loss or later, and
/// that one is decided by what the ledger has then.
const LOSS_DEBOUNCE: Duration = Duration::from_millis(20);
/// How long a job rests after a repair, for each of its executors: the store is at each for some 6 µs, and
/// one job may have a twentieth of its time.
const REST: Duration = Duration::from_micros(120);
/// However large the job is, it rests no longer.
const MOST_REST: Duration = Duration::from_secs(10);

/// The jobs that are to be looked at, each once.
#[derive(Debug, Default)]
pub(crate) struct Schedule {
    order: BTreeSet<(Instant, Arc<JobId>)>,
    jobs: HashMap<Arc<JobId>, Waiting>,
    /// Not before when a job is to be looked at again, where it costs too much to do so at once.
    rests: HashMap<Arc<JobId>, Instant>,
}

#[derive(Clone, Copy, Debug)]
struct Waiting {
    due: Instant,
    /// When the first of the changes came; `None` for one that is only looked after.
    since: Option<Instant>,
}

impl Schedule {
    /// Something of the job has changed.
    pub(crate) fn changed(&mut self, job: Arc<JobId>, change: Change, now: Instant) {
        let debounce = match change {
            Change::Other => DEBOUNCE,
            Change::Loss => LOSS_DEBOUNCE,
        };
        self.put(job, Waiting { due: now + debounce, since: Some(now) });
    }

    /// The job is to be looked at then, if not earlier.
    pub(crate) fn look_after(&mut self, job: Arc<JobId>, due: Instant) {
        self.put(job, Waiting { due, since: None });
    }

    /// A look came to nothing: the job is to be looked at again then and not before, and its change waits on.
    pub(crate) fn put_back(&mut self, job: Arc<JobId>, since: Option<Instant>, due: Instant) {
        self.rests.insert(Arc::clone(&job), due);
        self.put(job, Waiting { due, since });
    }

    fn put(&mut self, job: Arc<JobId>, mut waiting: Waiting) {
        if let Some(rest) = self.rests.get(&job) {
            waiting.due = waiting.due.max(*rest);
        }
        if let Some(before) = self.jobs.get(&job) {
            waiting.since = before.since.or(waiting.since);
            waiting.due = before.due.min(waiting.due);
            self.order.remove(&(before.due, Arc::clone(&job)));
        }
        self.order.insert((waiting.due, Arc::clone(&job)));
        self.jobs.insert(job, waiting);
    }

    /// When the next job is due.
    pub(crate) fn next(&self) -> Option<Instant> {
        self.order.first().map(|(due, _)| *due)
    }

    /// The jobs that are due, `most` of them, and since when they wait for a change to be repaired.
    pub(crate) fn take_due(&mut self, now: Instant, most: usize) -> Vec<(Arc<JobId>, Option<Instant>)> {
        let mut taken = Vec::new();
        while taken.len() < most
            && let Some((due, _)) = self.order.first()
            && *due <= now
            && let Some((_, job)) = self.order.pop_first()
        {
            let since = self.jobs.remove(&job).and_then(|waiting| waiting.since);
            taken.push((job, since));
        }
        taken
    }

    /// The job is looked at by other means: it need not wait any longer. Answers since when it did.
    pub(crate) fn take(&mut self, job: &Arc<JobId>) -> Option<Instant> {
        let waiting = self.jobs.remove(job)?;
        self.order.remove(&(waiting.due, Arc::clone(job)));
        waiting.since
    }

    /// The job was repaired now, and has so many executors.
    pub(crate) fn repaired(&mut self, job: &Arc<JobId>, executors: u64, now: Instant) {
        self.rests.retain(|_, rest| *rest > now);
        let rest = REST.saturating_mul(u32::try_from(executors).unwrap_or(u32::MAX)).min(MOST_REST);
        if rest > LOSS_DEBOUNCE {
            self.rests.insert(Arc::clone(job), now + rest);
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
    fn changes_that_come_together_are_repaired_together_and_none_waits_for_the_last() {
        let (mut schedule, start) = (Schedule::default(), Instant::now());
        for i in 0..100 {
            schedule.changed(job("a"), Change::Other, start + i * MS);
        }
        assert_eq!(schedule.next(), Some(start + DEBOUNCE));
        assert!(schedule.take_due(start + DEBOUNCE - MS, 9).is_empty());
        assert_eq!(schedule.take_due(start + DEBOUNCE, 9), [(job("a"), Some(start))]);
        assert_eq!(schedule.next(), None);
    }

    #[test]
    fn a_job_that_is_looked_after_later_is_repaired_soon_when_it_changes() {
        let (mut schedule, start) = (Schedule::default(), Instant::now());
        schedule.look_after(job("a"), start + 60_000 * MS);
        schedule.changed(job("a"), Change::Other, start);
        assert_eq!(schedule.next(), Some(start + DEBOUNCE));
        schedule.look_after(job("a"), start + 60_000 * MS);
        assert_eq!(schedule.take_due(start + DEBOUNCE, 9).len(), 1);
        assert_eq!(schedule.next(), None);
    }

    #[test]
    fn a_loss_is_repaired_sooner_and_takes_the_other_changes_with_it() {
        let (mut schedule, start) = (Schedule::default(), Instant::now());
        schedule.changed(job("a"), Change::Other, start);
        schedule.changed(job("a"), Change::Loss, start + 10 * MS);
        schedule.changed(job("a"), Change::Other, start + 11 * MS);
        assert_eq!(schedule.next(), Some(start + 10 * MS + LOSS_DEBOUNCE));
        assert_eq!(schedule.take_due(start + 30 * MS, 9), [(job("a"), Some(start))]);
        // 500 executors rest for 60 ms.
        schedule.repaired(&job("a"), 500, start + 30 * MS);
        schedule.changed(job("a"), Change::Loss, start + 31 * MS);
        assert_eq!(schedule.next(), Some(start + 90 * MS));
    }

    #[test]
    fn a_look_that_came_to_nothing_is_not_hurried_by_what_comes_after() {
        let (mut schedule, start) = (Schedule::default(), Instant::now());
        schedule.put_back(job("a"), Some(start), start + 2_000 * MS);
        schedule.changed(job("a"), Change::Loss, start + MS);
        assert_eq!(schedule.next(), Some(start + 2_000 * MS));
        assert_eq!(schedule.take_due(start + 2_000 * MS, 9), [(job("a"), Some(start))]);
    }

    #[test]
    fn no_more_than_asked_for_are_taken_and_the_longest_due_first() {
        let (mut schedule, start) = (Schedule::default(), Instant::now());
        for (i, id) in ["c", "b", "a"].into_iter().enumerate() {
            schedule.look_after(job(id), start + MS * u32::try_from(i).unwrap_or_default());
        }
        let taken = schedule.take_due(start + DEBOUNCE, 2);
        assert_eq!(taken, [(job("c"), None), (job("b"), None)]);
    }

    #[test]
    fn a_large_job_is_repaired_less_often_whatever_calls_for_it() {
        let (mut schedule, start) = (Schedule::default(), Instant::now());
        schedule.repaired(&job("large"), 10_000, start);
        schedule.repaired(&job("larger"), 1_000_000, start);
        schedule.repaired(&job("small"), 100, start);
        schedule.changed(job("large"), Change::Other, start);
        schedule.look_after(job("larger"), start);
        schedule.changed(job("small"), Change::Other, start);
        assert_eq!(schedule.take_due(start + DEBOUNCE, 9), [(job("small"), Some(start))]);
        assert_eq!(schedule.next(), Some(start + 1_200 * MS));
        assert_eq!(schedule.take_due(start + MOST_REST, 9).len(), 2);
    }
}
