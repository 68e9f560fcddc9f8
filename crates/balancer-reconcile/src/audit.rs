//! A periodic check of the counts in the ledgers. Pure.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use balancer_core::{Counts, JobId};

/// The counts that were left in the ledgers, and which are checked next.
#[derive(Debug, Default)]
pub(crate) struct CountAudit {
    /// `None` for a job that has ended, until its turn comes.
    expected: HashMap<Arc<JobId>, Option<Counts>>,
    /// The same jobs, each once.
    turns: VecDeque<Arc<JobId>>,
}

impl CountAudit {
    /// These counts were left in the job's ledger.
    pub(crate) fn expect(&mut self, job: Arc<JobId>, counts: Counts) {
        if self.expected.insert(Arc::clone(&job), Some(counts)).is_none() {
            self.turns.push_back(job);
        }
    }

    /// The job has ended.
    pub(crate) fn forget(&mut self, job: &JobId) {
        if let Some(expected) = self.expected.get_mut(job) {
            *expected = None;
        }
    }

    /// The next jobs to check, one in `batches` of all: after so many batches each was checked.
    pub(crate) fn next_batch(&mut self, batches: usize) -> Vec<(Arc<JobId>, Counts)> {
        let mut batch = Vec::new();
        for _ in 0..self.turns.len().div_ceil(batches.max(1)) {
            let Some(job) = self.turns.pop_front() else { break };
            match self.expected.get(&job) {
                Some(Some(counts)) => {
                    batch.push((Arc::clone(&job), *counts));
                    self.turns.push_back(job);
                }
                Some(None) | None => drop(self.expected.remove(&job)),
            }
        }
        batch
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(id: usize) -> Arc<JobId> {
        Arc::new(JobId { namespace: "etl".into(), app_id: id.to_string() })
    }

    fn counts(spot: u64) -> Counts {
        Counts { spot, on_demand: 0 }
    }

    #[test]
    fn every_job_is_checked_once_before_any_is_checked_twice() {
        let mut audit = CountAudit::default();
        for id in 0..25 {
            audit.expect(job(id), counts(0));
            audit.expect(job(id), counts(1));
        }
        let turns: Vec<_> = (0..10).flat_map(|_| audit.next_batch(10)).collect();
        let mut first: Vec<_> = turns.iter().take(25).cloned().collect();
        first.sort_by_key(|(job, _)| job.app_id.parse::<usize>().unwrap_or_default());
        assert_eq!(first, (0..25).map(|id| (job(id), counts(1))).collect::<Vec<_>>());
    }

    #[test]
    fn a_job_that_has_ended_is_dropped_in_its_turn() {
        let mut audit = CountAudit::default();
        for id in 0..1000 {
            audit.expect(job(id), counts(1));
            audit.forget(&job(id));
            audit.next_batch(10);
            assert!(audit.turns.len() <= 1 && audit.expected.len() == audit.turns.len());
        }
        audit.expect(job(1), counts(1));
        audit.forget(&job(1));
        audit.expect(job(1), counts(2));
        assert_eq!(audit.next_batch(1), [(job(1), counts(2))]);
    }
}
