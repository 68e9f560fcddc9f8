//! Collects the jobs of which executors were placed. The server keeps them for the reconciler, which soon confirms their
//! pods. Each job is sent every 100 ms at most, and jobs that come together are sent together.

use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use balancer_core::JobRef;

/// A job is sent once in each period of this length. The reconciler looks its placements up later than that, so it finds
/// those that were placed afterwards, too.
const PERIOD: Duration = Duration::from_millis(100);
/// Jobs that are remembered. Two jobs that take each other's place are only sent more often.
const SLOTS: usize = 1024;
/// Jobs that wait to be sent at most.
const MAX_WAITING: usize = 4096;

/// The jobs that wait to be sent, and those that were sent in the current period.
pub(super) struct PlacedJobs {
    hasher: RandomState,
    start: Instant,
    /// The hash of a job, and the period in which it was sent.
    slots: Box<[AtomicU64]>,
    /// Each as `<namespace>:<job id>`.
    waiting: Mutex<Vec<String>>,
}

impl PlacedJobs {
    pub(super) fn new(now: Instant) -> Self {
        let slots = (0..SLOTS).map(|_| AtomicU64::new(0)).collect();
        Self { hasher: RandomState::new(), start: now, slots, waiting: Mutex::default() }
    }

    /// An executor of the job was placed. Returns whether the caller has to [`take`](Self::take) the jobs, and send them:
    /// this is the first that waits.
    pub(super) fn add(&self, job: JobRef<'_>, now: Instant) -> bool {
        if !self.is_due(job, now) {
            return false;
        }
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if waiting.len() < MAX_WAITING {
            waiting.push(format!("{}:{}", job.namespace, job.app_id));
        }
        waiting.len() == 1
    }

    /// The jobs that wait to be sent. From now on they do not.
    pub(super) fn take(&self) -> Vec<String> {
        std::mem::take(&mut self.waiting.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The jobs could not be sent: those that have further placements are sent at once.
    pub(super) fn forget_sent(&self) {
        self.slots.iter().for_each(|slot| slot.store(0, Ordering::Relaxed));
    }

    /// Whether the job has to be sent now. From then on it counts as sent.
    fn is_due(&self, job: JobRef<'_>, now: Instant) -> bool {
        let period = now.duration_since(self.start).as_millis() / PERIOD.as_millis();
        let of_job = self.hasher.hash_one((job.namespace, job.app_id));
        let sent = of_job ^ u64::try_from(period).unwrap_or_default().wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let slot = usize::try_from(of_job % SLOTS as u64).unwrap_or_default();
        self.slots.get(slot).is_none_or(|slot| slot.swap(sent, Ordering::Relaxed) != sent)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(app_id: &str) -> JobRef<'_> {
        JobRef { namespace: "etl", app_id }
    }

    #[test]
    fn a_job_is_sent_once_in_each_period() {
        let start = Instant::now();
        let placed = PlacedJobs::new(start);
        for period in 0..3 {
            let now = start + PERIOD * period;
            assert!(placed.add(job("a"), now) && !placed.add(job("a"), now + PERIOD / 2), "{period}");
            assert!(!placed.add(JobRef { namespace: "ml", app_id: "a" }, now), "{period}");
            assert_eq!(placed.take(), ["etl:a", "ml:a"]);
        }
        placed.forget_sent();
        assert!(placed.add(job("a"), start + PERIOD * 2));
    }

    #[test]
    fn jobs_that_wait_are_bounded() {
        let placed = PlacedJobs::new(Instant::now());
        for id in 0..2 * MAX_WAITING {
            assert_eq!(placed.add(job(&id.to_string()), Instant::now()), id == 0);
        }
        assert_eq!(placed.take().len(), MAX_WAITING);
        assert!(placed.take().is_empty());
    }
}
