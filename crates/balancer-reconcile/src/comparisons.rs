//! Which large ledgers are compared, and which wait until others have been. Pure: the clock is the caller's.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use balancer_core::JobId;
use tokio::time::Instant;

use crate::compare::Comparison;

/// Large ledgers that are compared at once. Each comparison keeps the names of the job's executors, and reads pages of
/// entries as fast as the store returns them.
const MAX_RUNNING: usize = 2;

/// The comparisons that go on in the next turn, and the jobs that wait for theirs.
#[derive(Debug, Default)]
pub(crate) struct Comparisons {
    running: HashMap<Arc<JobId>, Running>,
    /// When the first change came that each job waits with; `None` if it did not change.
    waiting: HashMap<Arc<JobId>, Option<Instant>>,
    /// The same jobs, each once, in the order in which they were requested. Those that wait no longer are skipped.
    order: VecDeque<Arc<JobId>>,
}

/// A comparison of several turns.
#[derive(Debug)]
pub(crate) struct Running {
    pub(crate) comparison: Comparison,
    /// When the change came that has requested it; `None` if the job did not change.
    pub(crate) changed_at: Option<Instant>,
    /// Whether something was corrected in an earlier turn.
    pub(crate) has_corrected: bool,
}

impl Comparisons {
    /// How many comparisons of the job have to end until one that was requested now has ended.
    pub(crate) fn until_requested(&self, job: &JobId) -> usize {
        usize::from(self.running.contains_key(job)) + usize::from(self.is_waiting(job))
    }

    /// How many comparisons may begin now.
    pub(crate) fn room(&self) -> usize {
        MAX_RUNNING.saturating_sub(self.running.len())
    }

    /// Takes the job's comparison for the length of a turn.
    pub(crate) fn take(&mut self, job: &JobId) -> Option<Running> {
        self.running.remove(job)
    }

    /// The job's comparison goes on in the next turn.
    pub(crate) fn keep(&mut self, job: Arc<JobId>, running: Running) {
        self.running.insert(job, running);
    }

    /// The job's comparison begins when there is room for it.
    pub(crate) fn wait(&mut self, job: &Arc<JobId>, changed_at: Option<Instant>) {
        match self.waiting.get_mut(job) {
            Some(known) => *known = known.or(changed_at),
            None => {
                self.waiting.insert(Arc::clone(job), changed_at);
                self.order.push_back(Arc::clone(job));
            }
        }
    }

    /// Whether the job waits for its comparison.
    pub(crate) fn is_waiting(&self, job: &JobId) -> bool {
        self.waiting.contains_key(job)
    }

    /// The job waits no longer. Returns when the first change came that it has waited with.
    pub(crate) fn stop_waiting(&mut self, job: &JobId) -> Option<Instant> {
        let changed_at = self.waiting.remove(job)?;
        self.order.retain(|waiting| **waiting != *job);
        changed_at
    }

    /// The jobs whose comparisons may begin now.
    pub(crate) fn next(&self) -> impl Iterator<Item = &Arc<JobId>> {
        self.order.iter().take(self.room())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn job(id: &str) -> Arc<JobId> {
        Arc::new(JobId { namespace: "etl".into(), app_id: id.into() })
    }

    fn running() -> Running {
        Running { comparison: Comparison::new(std::iter::empty()), changed_at: None, has_corrected: false }
    }

    fn next(comparisons: &Comparisons) -> Vec<&str> {
        comparisons.next().map(|job| job.app_id.as_str()).collect()
    }

    #[test]
    fn jobs_wait_while_two_are_compared_and_then_have_their_turns_in_order() {
        let mut comparisons = Comparisons::default();
        for id in ["a", "b"] {
            comparisons.keep(job(id), running());
        }
        for id in ["c", "d", "e", "c"] {
            comparisons.wait(&job(id), None);
        }
        assert_eq!((comparisons.room(), next(&comparisons)), (0, vec![]));
        assert!(comparisons.take(&job("a")).is_some());
        assert_eq!(next(&comparisons), ["c"]);
        assert!(comparisons.take(&job("b")).is_some());
        assert_eq!(next(&comparisons), ["c", "d"]);
        comparisons.stop_waiting(&job("c"));
        comparisons.wait(&job("c"), None);
        assert_eq!(next(&comparisons), ["d", "e"]);
        for id in ["c", "d", "e"] {
            assert!(comparisons.is_waiting(&job(id)));
            comparisons.stop_waiting(&job(id));
        }
        assert!(comparisons.running.is_empty() && comparisons.waiting.is_empty() && comparisons.order.is_empty());
    }

    #[test]
    fn a_job_waits_with_the_first_of_its_changes() {
        let (mut comparisons, start) = (Comparisons::default(), Instant::now());
        for changed_at in [None, Some(start), Some(start + Duration::from_secs(1))] {
            comparisons.wait(&job("a"), changed_at);
        }
        assert_eq!(comparisons.stop_waiting(&job("a")), Some(start));
        assert_eq!(comparisons.stop_waiting(&job("a")), None);
    }
}
