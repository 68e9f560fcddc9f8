//! Limits how many jobs of each namespace get a new ledger, so that someone who may create pods in one namespace cannot
//! fill the store.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::namespace_rate::NamespaceRate;

const MINUTE: Duration = Duration::from_secs(60);

/// The limit of new jobs. It receives the time.
#[derive(Debug)]
pub struct NewJobs {
    start: Instant,
    /// Until when some namespace is over its limit, in nanoseconds after the start. While none is, an admission only
    /// reads this.
    limited_until: AtomicU64,
    rates: Mutex<Rates>,
}

#[derive(Debug)]
struct Rates {
    new_jobs: NamespaceRate,
    reports: NamespaceRate,
}

impl NewJobs {
    /// A limit of `per_minute` new jobs in each namespace: as many at once, and then evenly over the time. At least 1.
    pub fn new(per_minute: u32, now: Instant) -> Self {
        let per_minute = per_minute.max(1);
        let new_jobs = NamespaceRate::new(per_minute, MINUTE / per_minute);
        let rates = Rates { new_jobs, reports: NamespaceRate::new(1, MINUTE) };
        Self { start: now, limited_until: AtomicU64::new(0), rates: Mutex::new(rates) }
    }

    /// Whether a job of this namespace that has no ledger may get one.
    pub(crate) fn may_create(&self, namespace: &str, now: Instant) -> bool {
        self.since_start(now) >= self.limited_until.load(Ordering::Relaxed)
            || self.rates().new_jobs.next_token(namespace, now).is_none()
    }

    /// Counts a job that got a ledger.
    pub(crate) fn created(&self, namespace: &str, now: Instant) {
        let mut rates = self.rates();
        // Requests that were in flight together may all have been allowed the last token. They delay the next one.
        rates.new_jobs.spend(namespace, now);
        if let Some(until) = rates.new_jobs.next_token(namespace, now) {
            self.limited_until.fetch_max(self.since_start(until), Ordering::Relaxed);
        }
    }

    /// Whether to log that a job of this namespace got no ledger: once a minute.
    pub(crate) fn is_report_due(&self, namespace: &str, now: Instant) -> bool {
        self.rates().reports.take(namespace, now)
    }

    fn since_start(&self, at: Instant) -> u64 {
        u64::try_from(at.saturating_duration_since(self.start).as_nanos()).unwrap_or(u64::MAX)
    }

    fn rates(&self) -> MutexGuard<'_, Rates> {
        self.rates.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// Names this many new jobs, one after another. Returns how many of them got a ledger.
    fn name_jobs(limit: &NewJobs, namespace: &str, now: Instant, jobs: u32) -> usize {
        let create = |_: &u32| {
            let may = limit.may_create(namespace, now);
            if may {
                limit.created(namespace, now);
            }
            may
        };
        (0..jobs).filter(create).count()
    }

    #[test]
    fn a_namespace_gets_its_limit_at_once_and_then_evenly() {
        let start = Instant::now();
        let limit = NewJobs::new(60, start);
        assert_eq!(name_jobs(&limit, "etl", start, 1500), 60);
        assert_eq!(name_jobs(&limit, "etl", start + SECOND, 1500), 1);
        assert_eq!(name_jobs(&limit, "etl", start + 11 * SECOND, 1500), 10);
        assert_eq!(name_jobs(&limit, "etl", start + 600 * SECOND, 1500), 60);
    }

    #[test]
    fn a_namespace_over_its_limit_leaves_the_others_alone() {
        let start = Instant::now();
        let limit = NewJobs::new(10, start);
        assert_eq!(name_jobs(&limit, "hostile", start, 1500), 10);
        assert_eq!(name_jobs(&limit, "etl", start, 10), 10);
        assert!(!limit.may_create("hostile", start));
        assert!(!limit.may_create("etl", start));
        assert!(limit.may_create("ml", start));
    }

    #[test]
    fn what_was_in_flight_together_delays_the_next_job() {
        let start = Instant::now();
        let limit = NewJobs::new(60, start);
        // All were allowed before the first was counted.
        (0..100).for_each(|_| limit.created("etl", start));
        assert!(!limit.may_create("etl", start + 40 * SECOND));
        assert!(limit.may_create("etl", start + 41 * SECOND));
    }

    #[test]
    fn every_accepted_limit_is_kept() {
        let start = Instant::now();
        for (per_minute, interval) in [(1, MINUTE), (1000, MINUTE / 1000), (1_000_000, MINUTE / 1_000_000)] {
            let limit = NewJobs::new(per_minute, start);
            assert_eq!(name_jobs(&limit, "etl", start, per_minute + 1), per_minute as usize);
            assert!(!limit.may_create("etl", start + interval - Duration::from_nanos(1)), "{per_minute}");
            assert!(limit.may_create("etl", start + interval), "{per_minute}");
        }
    }

    #[test]
    fn while_no_namespace_is_over_its_limit_nothing_waits_for_the_lock() {
        let start = Instant::now();
        let limit = NewJobs::new(10, start);
        name_jobs(&limit, "etl", start, 5);
        let _locked = limit.rates();
        assert!(limit.may_create("etl", start));
    }

    #[test]
    fn one_report_per_namespace_and_minute() {
        let start = Instant::now();
        let limit = NewJobs::new(10, start);
        let due = |namespace, after: u32| limit.is_report_due(namespace, start + after * SECOND);
        assert_eq!(
            [due("etl", 0), due("etl", 1), due("ml", 1), due("etl", 59), due("etl", 60)],
            [true, false, true, false, true]
        );
    }
}
