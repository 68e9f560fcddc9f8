//! A periodic check of what is stored of each job as a whole: its counts and its policy. Pure.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use balancer_core::{Counts, JobId, Policy, Steering};
use balancer_store::JobRecord;

/// The records that were left in the ledgers, and which are checked next.
#[derive(Debug, Default)]
pub(crate) struct RecordAudit {
    /// `None` for a job that has ended, until its turn comes.
    expected: HashMap<Arc<JobId>, Option<Expected>>,
    /// The same jobs, each once.
    turns: VecDeque<Arc<JobId>>,
}

#[derive(Clone, Debug)]
struct Expected {
    record: JobRecord,
    /// The name of the pod that drives the job, if it is known.
    driver: Option<Box<str>>,
    /// Whether the ledger was found with another policy.
    has_other_policy: bool,
}

/// What became of a job's policy in a reconcile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PolicyChange {
    None,
    /// Something else than a reconcile had changed it, and the reconcile has restored it.
    Restored,
}

impl RecordAudit {
    /// A reconcile has left this record in the job's ledger, for this driver.
    pub(crate) fn expect(&mut self, job: Arc<JobId>, record: JobRecord, driver: Option<&str>) -> PolicyChange {
        let policy = record.policy;
        let expected = Expected { record, driver: driver.map(Into::into), has_other_policy: false };
        match self.expected.insert(Arc::clone(&job), Some(expected)) {
            Some(Some(before)) if before.has_other_policy && before.record.policy == policy => PolicyChange::Restored,
            Some(_) => PolicyChange::None,
            None => {
                self.turns.push_back(job);
                PolicyChange::None
            }
        }
    }

    /// The policy that was left in the job's ledger, unless that was for another driver.
    pub(crate) fn policy(&self, job: &JobId, driver: Option<&str>) -> Option<Policy> {
        let Expected { record, driver: known, .. } = self.expected.get(job)?.as_ref()?;
        let is_of_other = known.as_deref().zip(driver).is_some_and(|(known, driver)| known != driver);
        record.policy.filter(|_| !is_of_other)
    }

    /// The counts that were left in the job's ledger.
    pub(crate) fn counts(&self, job: &JobId) -> Option<Counts> {
        Some(self.expected.get(job)?.as_ref()?.record.counts)
    }

    /// The steering that was left in the job's ledger.
    pub(crate) fn steering(&self, job: &JobId) -> Option<&Steering> {
        Some(&self.expected.get(job)?.as_ref()?.record.steering)
    }

    /// The steering in the job's ledger was changed.
    pub(crate) fn steered(&mut self, job: &JobId, change: impl FnOnce(&mut Steering)) {
        if let Some(Some(expected)) = self.expected.get_mut(job) {
            change(&mut expected.record.steering);
        }
    }

    /// The job's ledger was found with this record. Returns whether that is the one that was left there.
    pub(crate) fn check(&mut self, job: &JobId, found: Option<&JobRecord>) -> bool {
        let Some(Some(expected)) = self.expected.get_mut(job) else { return true };
        // A ledger without a policy has lost it; nothing has changed it.
        let is_changed = |policy: Policy| expected.record.policy.is_some_and(|left| left != policy);
        expected.has_other_policy |= found.and_then(|found| found.policy).is_some_and(is_changed);
        // Placements change what the job is steered by, and what steers it looks after that itself.
        let counts_and_policy = |record: &JobRecord| (record.counts, record.policy);
        let is_same = found.map(counts_and_policy) == Some(counts_and_policy(&expected.record));
        expected.record.steering = found.map(|found| found.steering.clone()).unwrap_or_default();
        is_same
    }

    /// The job has ended.
    pub(crate) fn forget(&mut self, job: &JobId) {
        if let Some(expected) = self.expected.get_mut(job) {
            *expected = None;
        }
    }

    /// How many jobs are checked at once if all are in so many batches.
    pub(crate) fn batch_size(&self, batches: usize) -> usize {
        self.turns.len().div_ceil(batches.max(1))
    }

    /// The next jobs to check, one in `batches` of all: after so many batches each was checked.
    pub(crate) fn next_batch(&mut self, batches: usize) -> Vec<Arc<JobId>> {
        let mut batch = Vec::new();
        for _ in 0..self.batch_size(batches) {
            let Some(job) = self.turns.pop_front() else { break };
            match self.expected.get(&job) {
                Some(Some(_)) => {
                    batch.push(Arc::clone(&job));
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
    use balancer_core::SpotRatio;

    use super::*;

    const STATED: Option<Policy> = Some(Policy { spot_ratio: SpotRatio::ZERO, ..Policy::DEFAULT });
    const OTHER: Option<Policy> = Some(Policy { spot_ratio: SpotRatio::ONE, ..Policy::DEFAULT });

    fn job(id: usize) -> Arc<JobId> {
        Arc::new(JobId { namespace: "etl".into(), app_id: id.to_string() })
    }

    fn record(spot: u64, policy: Option<Policy>) -> JobRecord {
        JobRecord { counts: Counts { spot, on_demand: 0 }, policy, ..JobRecord::default() }
    }

    #[test]
    fn every_job_is_checked_once_before_any_is_checked_twice() {
        let mut audit = RecordAudit::default();
        for id in 0..25 {
            audit.expect(job(id), record(0, None), None);
            audit.expect(job(id), record(1, None), None);
        }
        let turns: Vec<_> = (0..10).flat_map(|_| audit.next_batch(10)).collect();
        let mut first: Vec<_> = turns.iter().take(25).cloned().collect();
        first.sort_by_key(|job| job.app_id.parse::<usize>().unwrap_or_default());
        assert_eq!(first, (0..25).map(job).collect::<Vec<_>>());
    }

    #[test]
    fn a_job_that_has_ended_is_dropped_in_its_turn() {
        let mut audit = RecordAudit::default();
        for id in 0..1000 {
            audit.expect(job(id), record(1, None), None);
            audit.forget(&job(id));
            audit.next_batch(10);
            assert!(audit.turns.len() <= 1 && audit.expected.len() == audit.turns.len());
        }
        audit.expect(job(1), record(1, None), None);
        audit.forget(&job(1));
        assert!(audit.check(&job(1), None), "nothing is expected of it");
        audit.expect(job(1), record(2, None), None);
        assert_eq!(audit.next_batch(1), [job(1)]);
    }

    #[test]
    fn a_record_with_other_counts_or_another_policy_differs_and_so_does_a_lost_one() {
        let mut audit = RecordAudit::default();
        audit.expect(job(1), record(3, STATED), None);
        assert!(audit.check(&job(1), Some(&record(3, STATED))));
        for found in [None, Some(record(2, STATED)), Some(record(3, OTHER)), Some(record(3, None))] {
            assert!(!audit.check(&job(1), found.as_ref()), "{found:?}");
        }
        assert_eq!(audit.policy(&job(1), None), STATED);
        assert!(audit.check(&job(2), Some(&record(3, STATED))), "nothing is expected of it");
    }

    #[test]
    fn placements_change_the_steering_of_a_job_and_it_is_known_what_was_found_last() {
        let mut audit = RecordAudit::default();
        audit.expect(job(1), record(3, STATED), None);
        let steering = Steering { avoid: vec!["m5".into()], ..Steering::default() };
        let found = JobRecord { steering: steering.clone(), ..record(3, STATED) };
        assert!(audit.check(&job(1), Some(&found)));
        assert_eq!(audit.steering(&job(1)), Some(&steering));
        audit.check(&job(1), None);
        assert_eq!(audit.steering(&job(1)), Some(&Steering::default()));
    }

    #[test]
    fn a_policy_that_something_else_has_changed_is_restored_once() {
        let mut audit = RecordAudit::default();
        audit.expect(job(1), record(3, STATED), None);
        audit.check(&job(1), Some(&record(3, OTHER)));
        assert_eq!(audit.expect(job(1), record(3, STATED), None), PolicyChange::Restored);
        assert_eq!(audit.expect(job(1), record(3, STATED), None), PolicyChange::None);
        audit.check(&job(1), Some(&record(3, OTHER)));
        assert_eq!(
            audit.expect(job(1), record(3, OTHER), None),
            PolicyChange::None,
            "the driver has stated it meanwhile"
        );
    }

    #[test]
    fn a_policy_is_not_used_for_another_driver() {
        let mut audit = RecordAudit::default();
        audit.expect(job(1), record(3, STATED), None);
        assert_eq!(audit.policy(&job(1), Some("a")), STATED);
        audit.expect(job(1), record(3, STATED), Some("a"));
        assert_eq!((audit.policy(&job(1), Some("a")), audit.policy(&job(1), Some("b"))), (STATED, None));
        assert_eq!(audit.policy(&job(1), None), STATED);
    }

    #[test]
    fn a_policy_that_is_lost_or_that_an_admission_has_stored_first_was_not_changed() {
        let mut audit = RecordAudit::default();
        for (left, found) in [(STATED, None), (None, STATED)] {
            audit.expect(job(1), record(3, left), None);
            assert!(!audit.check(&job(1), Some(&record(3, found))));
            assert_eq!(audit.expect(job(1), record(3, left), None), PolicyChange::None);
        }
    }
}
