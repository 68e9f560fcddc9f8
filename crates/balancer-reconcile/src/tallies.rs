//! What each job's ledger should count, looked over in turns. Pure.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use balancer_core::{Counts, JobId};

/// The counts that were left in the ledgers.
#[derive(Debug, Default)]
pub(crate) struct Tallies {
    /// `None` for a job that has ended, until its turn comes.
    expected: HashMap<Arc<JobId>, Option<Counts>>,
    /// The same jobs, each once.
    turns: VecDeque<Arc<JobId>>,
}

impl Tallies {
    /// So much was left in the job's ledger.
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

    /// The jobs whose turn it is, one in `parts` of all: after so many turns each had its own.
    pub(crate) fn turn(&mut self, parts: usize) -> Vec<(Arc<JobId>, Counts)> {
        let mut turn = Vec::new();
        for _ in 0..self.turns.len().div_ceil(parts.max(1)) {
            let Some(job) = self.turns.pop_front() else { break };
            match self.expected.get(&job) {
                Some(Some(counts)) => {
                    turn.push((Arc::clone(&job), *counts));
                    self.turns.push_back(job);
                }
                Some(None) | None => drop(self.expected.remove(&job)),
            }
        }
        turn
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
    fn every_job_has_its_turn_and_none_twice_before_the_others() {
        let mut tallies = Tallies::default();
        for id in 0..25 {
            tallies.expect(job(id), counts(0));
            tallies.expect(job(id), counts(1));
        }
        let turns: Vec<_> = (0..10).flat_map(|_| tallies.turn(10)).collect();
        let mut first: Vec<_> = turns.iter().take(25).cloned().collect();
        first.sort_by_key(|(job, _)| job.app_id.parse::<usize>().unwrap_or_default());
        assert_eq!(first, (0..25).map(|id| (job(id), counts(1))).collect::<Vec<_>>());
    }

    #[test]
    fn a_job_that_has_ended_takes_no_room_after_its_turn() {
        let mut tallies = Tallies::default();
        for id in 0..1000 {
            tallies.expect(job(id), counts(1));
            tallies.forget(&job(id));
            tallies.turn(10);
            assert!(tallies.turns.len() <= 1 && tallies.expected.len() == tallies.turns.len());
        }
        tallies.expect(job(1), counts(1));
        tallies.forget(&job(1));
        tallies.expect(job(1), counts(2));
        assert_eq!(tallies.turn(1), [(job(1), counts(2))]);
    }
}
