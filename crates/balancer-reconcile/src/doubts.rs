//! Whether a large ledger that looks wrong is wrong, or only ahead of the watch. Pure: the clock is the caller's.
//!
//! A release removes an executor from the ledger before the watch shows that its pod has ended, and a placement adds one
//! before the watch shows its pod. The watch shows both within the release grace. So a large ledger is compared only if
//! what happens meanwhile in the cluster does not explain the difference. As much as is lost in a release grace can hide
//! executors that the ledger lacks: they are found when the job is quieter, or by the next resync.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use balancer_core::{Counts, JobId, JobLedger};
use tokio::time::Instant;

use crate::index::Churn;

/// From the doubt to the decision.
const DECIDED_AFTER: Duration = Duration::from_millis(JobLedger::RELEASE_GRACE);

/// The jobs whose ledgers look wrong. They are jobs of the index, each once.
#[derive(Debug, Default)]
pub(crate) struct Doubts {
    jobs: HashMap<Arc<JobId>, Doubt>,
    /// How many executors each ledger lacked after its last comparison, because nobody knows what they count as; without
    /// those that lacked none.
    explained: HashMap<Arc<JobId>, u64>,
    /// When the ledgers are compared again whose counts the last comparison could not correct, because they changed
    /// meanwhile.
    recounts: HashMap<Arc<JobId>, Instant>,
}

/// Whether the ledger of a job is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Decision {
    /// Nothing shows that it is.
    Right,
    Wrong,
    /// It is too early to decide until then.
    Later(Instant),
}

/// What is known of a job, from its ledger and from the cluster.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Known {
    /// The counts of the ledger.
    pub(crate) counts: Counts,
    /// The live executors.
    pub(crate) live: u64,
    /// How many came and went so far.
    pub(crate) churn: Churn,
}

#[derive(Debug)]
struct Doubt {
    since: Instant,
    known: Known,
    /// Whether the ledger has as many executors as a reconcile has left there, but on other capacities.
    is_recounted: bool,
}

impl Known {
    /// How many live executors the ledger lacks at least.
    pub(crate) fn missing(&self) -> u64 {
        self.live.saturating_sub(self.counts.total())
    }
}

impl Doubts {
    /// The ledger looks wrong. The reconcile that follows leads to the decision.
    pub(crate) fn add(&mut self, job: &Arc<JobId>, known: Known, is_recounted: bool, now: Instant) {
        if !self.jobs.contains_key(job) {
            self.jobs.insert(Arc::clone(job), Doubt { since: now, known, is_recounted });
        }
    }

    /// The job's ledger was reconciled: decides whether it is wrong.
    pub(crate) fn decide(&mut self, job: &JobId, now_known: Known, now: Instant) -> Decision {
        let Some(&Doubt { since, known, is_recounted }) = self.jobs.get(job) else { return Decision::Right };
        if now < since + DECIDED_AFTER {
            return Decision::Later(since + DECIDED_AFTER);
        }
        self.jobs.remove(job);
        let lost = now_known.churn.lost.saturating_sub(known.churn.lost);
        let missing = known.missing().saturating_sub(lost).min(now_known.missing());
        let is_unexplained = now_known.counts == known.counts && now_known.churn == known.churn;
        if missing > 0 || is_recounted && is_unexplained { Decision::Wrong } else { Decision::Right }
    }

    /// The ledger is to be compared again then.
    pub(crate) fn recount(&mut self, job: &Arc<JobId>, at: Instant) {
        self.recounts.insert(Arc::clone(job), at);
    }

    /// Whether the ledger is to be compared again, because its counts may be wrong.
    pub(crate) fn recount_due(&self, job: &JobId, now: Instant) -> Decision {
        match self.recounts.get(job) {
            None => Decision::Right,
            Some(at) if now < *at => Decision::Later(*at),
            Some(_) => Decision::Wrong,
        }
    }

    /// A comparison has ended, after which the ledger still lacks so many executors.
    pub(crate) fn explain(&mut self, job: &Arc<JobId>, missing: u64) {
        if missing == 0 {
            self.explained.remove(job);
        } else {
            self.explained.insert(Arc::clone(job), missing);
        }
    }

    /// How many executors the ledger may lack for a reason that is known.
    pub(crate) fn explained(&self, job: &JobId) -> u64 {
        self.explained.get(job).copied().unwrap_or_default()
    }

    /// The ledger is compared from now on: nothing is in doubt.
    pub(crate) fn forget(&mut self, job: &JobId) {
        self.jobs.remove(job);
        self.recounts.remove(job);
    }

    /// The job has ended.
    pub(crate) fn ended(&mut self, job: &JobId) {
        self.forget(job);
        self.explained.remove(job);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job() -> Arc<JobId> {
        Arc::new(JobId { namespace: "etl".into(), app_id: "a".into() })
    }

    fn known(spot: u64, live: u64, lost: u64) -> Known {
        Known { counts: Counts { spot, on_demand: 0 }, live, churn: Churn { added: 0, lost } }
    }

    /// Whether the ledger is wrong that was in doubt with the first, and is decided on with the second.
    fn is_wrong(first: Known, then: Known, is_recounted: bool) -> bool {
        let (mut doubts, start) = (Doubts::default(), Instant::now());
        doubts.add(&job(), first, is_recounted, start);
        doubts.add(&job(), then, is_recounted, start + Duration::from_secs(1));
        let early = doubts.decide(&job(), then, start + DECIDED_AFTER - Duration::from_millis(1));
        assert_eq!(early, Decision::Later(start + DECIDED_AFTER));
        let decision = doubts.decide(&job(), then, start + DECIDED_AFTER);
        assert_eq!(doubts.decide(&job(), first, start + 2 * DECIDED_AFTER), Decision::Right, "decided once");
        decision == Decision::Wrong
    }

    #[test]
    fn what_was_in_flight_explains_as_many_missing_executors_as_were_lost_meanwhile() {
        assert!(!is_wrong(known(98, 100, 7), known(98, 98, 9), false), "two were released");
        assert!(!is_wrong(known(98, 100, 7), known(96, 98, 9), false), "and two others later");
        assert!(is_wrong(known(98, 100, 7), known(98, 100, 7), false));
        assert!(is_wrong(known(98, 100, 7), known(97, 99, 8), false), "one of them");
        assert!(!is_wrong(known(98, 100, 7), known(100, 100, 7), false), "they were added");
    }

    #[test]
    fn other_counts_of_as_many_executors_are_wrong_if_nothing_comes_or_goes_meanwhile() {
        assert!(is_wrong(known(100, 100, 7), known(100, 100, 7), true));
        assert!(!is_wrong(known(100, 100, 7), known(100, 100, 7), false));
        assert!(!is_wrong(known(100, 100, 7), known(100, 100, 8), true));
        assert!(!is_wrong(known(100, 100, 7), known(101, 100, 7), true));
    }
}
