//! How often something may happen in each namespace: one token bucket per namespace. A pure value that receives the
//! time.

use std::num::NonZeroUsize;
use std::time::{Duration, Instant};

use lru::LruCache;

/// Namespaces that are remembered. With more, the least recently active one starts with a full bucket again.
const MAX_NAMESPACES: NonZeroUsize = NonZeroUsize::new(4096).unwrap();

/// A token bucket for each namespace.
#[derive(Debug)]
pub(crate) struct NamespaceRate {
    /// The time in which a bucket gains one token.
    interval: Duration,
    /// The time in which an empty bucket becomes full.
    capacity: Duration,
    /// When the namespace's bucket is full. A namespace without an entry has a full one.
    full_at: LruCache<Box<str>, Instant>,
}

impl NamespaceRate {
    /// Buckets of `burst` tokens that gain one token in each `interval`.
    pub(crate) fn new(burst: u32, interval: Duration) -> Self {
        // Unlike `new`, this allocates with use, not for all namespaces at once.
        let mut full_at = LruCache::unbounded();
        full_at.resize(MAX_NAMESPACES);
        Self { interval, capacity: interval.saturating_mul(burst), full_at }
    }

    /// Takes a token of the namespace. False if it has none.
    pub(crate) fn take(&mut self, namespace: &str, now: Instant) -> bool {
        let has_token = self.next_token(namespace, now).is_none();
        if has_token {
            self.spend(namespace, now);
        }
        has_token
    }

    /// When the namespace has a token again, if it has none.
    pub(crate) fn next_token(&mut self, namespace: &str, now: Instant) -> Option<Instant> {
        // The bucket has one token when all the others are still missing.
        let at = *self.full_at.get(namespace)? - self.capacity.saturating_sub(self.interval);
        (at > now).then_some(at)
    }

    /// Takes a token of the namespace even if it has none, and so delays the next one.
    pub(crate) fn spend(&mut self, namespace: &str, now: Instant) {
        match self.full_at.get_mut(namespace) {
            Some(full_at) => *full_at = (*full_at).max(now) + self.interval,
            None => {
                self.full_at.put(namespace.into(), now + self.interval);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn taken(rate: &mut NamespaceRate, namespace: &str, now: Instant, times: u32) -> usize {
        (0..times).filter(|_| rate.take(namespace, now)).count()
    }

    #[test]
    fn a_burst_is_followed_by_one_token_per_interval() {
        let (mut rate, start) = (NamespaceRate::new(3, SECOND), Instant::now());
        assert_eq!(taken(&mut rate, "etl", start, 10), 3);
        assert_eq!(taken(&mut rate, "etl", start + SECOND - Duration::from_nanos(1), 10), 0);
        assert_eq!(taken(&mut rate, "etl", start + SECOND, 10), 1);
        assert_eq!(taken(&mut rate, "etl", start + 3 * SECOND, 10), 2);
        // However long it rests, a bucket holds the burst at most.
        assert_eq!(taken(&mut rate, "etl", start + 1000 * SECOND, 10), 3);
    }

    #[test]
    fn a_burst_of_one_is_one_token_per_interval() {
        let (mut rate, start) = (NamespaceRate::new(1, 60 * SECOND), Instant::now());
        let taken = (0..180).filter(|second| rate.take("etl", start + *second * SECOND)).count();
        assert_eq!(taken, 3);
    }

    #[test]
    fn namespaces_have_buckets_of_their_own() {
        let (mut rate, start) = (NamespaceRate::new(3, SECOND), Instant::now());
        assert_eq!(taken(&mut rate, "etl", start, 10), 3);
        assert_eq!(taken(&mut rate, "ml", start, 10), 3);
    }

    #[test]
    fn what_is_spent_without_a_token_delays_the_next_one() {
        let (mut rate, start) = (NamespaceRate::new(2, SECOND), Instant::now());
        (0..5).for_each(|_| rate.spend("etl", start));
        assert_eq!(rate.next_token("etl", start), Some(start + 4 * SECOND));
        assert!(!rate.take("etl", start + 4 * SECOND - Duration::from_nanos(1)));
        assert!(rate.take("etl", start + 4 * SECOND));
    }

    #[test]
    fn the_number_of_namespaces_is_bounded() {
        let (mut rate, start) = (NamespaceRate::new(1, SECOND), Instant::now());
        for i in 0..2 * MAX_NAMESPACES.get() {
            assert!(rate.take(&format!("namespace-{i}"), start));
        }
        assert_eq!(rate.full_at.len(), MAX_NAMESPACES.get());
    }
}
