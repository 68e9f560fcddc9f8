//! From which age on a placement without a pod is suspicious. Pure: the clock is the caller's.
//!
//! A creation that is refused is usually refused within milliseconds, and Spark retries half a second later. So a
//! placement is looked up early. Where creations take longer, because other webhooks are slow, its pod appears after the
//! placement was removed. The placements of its namespace then get more time.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use balancer_core::{JobId, Millis, Unconfirmed, millis};
use tokio::time::Instant;

/// The age from which a placement without a pod is looked up in the Kubernetes API, as long as creations are fast.
const CONFIRM_AFTER: Duration = Duration::from_millis(150);
/// The largest such age. The API server waits for a webhook for up to 30 s, but seldom for more than 10 s.
const MAX_CONFIRM_AFTER: Duration = Duration::from_secs(10);
/// The age is halved each time the namespace had no slow creation for so long: a control plane that was slow once is
/// usually fast again.
const HALVED_AFTER: Duration = Duration::from_secs(600);
/// Namespaces that are remembered, and placements of each of them after their removal.
const MAX_NAMESPACES: usize = 1024;
const MAX_REMOVED: usize = 256;

/// The namespaces in which placements were removed.
#[derive(Debug, Default)]
pub(crate) struct Confirmations {
    namespaces: HashMap<Box<str>, Namespace>,
}

#[derive(Debug)]
struct Namespace {
    confirm_after: Duration,
    /// When a pod last appeared after its placement was removed, or the age was last halved.
    changed_at: Instant,
    /// The executors whose placements were removed, and when each was placed at the latest.
    removed: HashMap<(Arc<JobId>, String), Instant>,
}

impl Confirmations {
    /// The age from which placements of the namespace are looked up, in milliseconds.
    pub(crate) fn confirm_after(&self, namespace: &str) -> Millis {
        millis(self.namespaces.get(namespace).map_or(CONFIRM_AFTER, |namespace| namespace.confirm_after))
    }

    /// A reconcile has found live executors of the job that were not in its ledger: `is_live` says whether one of this
    /// key is live. Those whose placements were removed were created slowly. Returns the new age, if it changed.
    pub(crate) fn added(&mut self, job: &JobId, is_live: impl Fn(&str) -> bool, now: Instant) -> Option<Duration> {
        let Namespace { confirm_after, changed_at, removed } = self.namespaces.get_mut(job.namespace.as_str())?;
        let before = *confirm_after;
        removed.retain(|(of, key), placed_at| {
            let is_late = **of == *job && is_live(key);
            let took = now.duration_since(*placed_at);
            if is_late && took <= MAX_CONFIRM_AFTER {
                // Twice as long, because the next creation may be a little slower.
                *confirm_after = (took * 2).clamp(*confirm_after, MAX_CONFIRM_AFTER);
                *changed_at = now;
            }
            !is_late
        });
        (*confirm_after != before).then_some(*confirm_after)
    }

    /// The pods of these placements did not exist, and so many of the placements were removed. If one was not, its pod
    /// may have ended meanwhile, and a late watch would show it as one that was created late. So none is remembered.
    pub(crate) fn removed(&mut self, job: &Arc<JobId>, absent: Vec<Unconfirmed>, number: u64, now: Instant) {
        let known = self.namespaces.contains_key(job.namespace.as_str());
        if number != absent.len() as u64 || !known && self.namespaces.len() >= MAX_NAMESPACES {
            return;
        }
        let namespace = self.namespaces.entry(job.namespace.as_str().into()).or_insert_with(|| Namespace {
            confirm_after: CONFIRM_AFTER,
            changed_at: now,
            removed: HashMap::new(),
        });
        let placed_at = now.checked_sub(namespace.confirm_after).unwrap_or(now);
        for Unconfirmed { key, .. } in absent {
            if namespace.removed.len() < MAX_REMOVED {
                namespace.removed.insert((Arc::clone(job), key), placed_at);
            }
        }
    }

    /// Forgets old placements, and in time also that a namespace was slow.
    pub(crate) fn sweep(&mut self, now: Instant) {
        self.namespaces.retain(|_, Namespace { confirm_after, changed_at, removed }| {
            removed.retain(|_, placed_at| now.duration_since(*placed_at) <= MAX_CONFIRM_AFTER);
            if now.duration_since(*changed_at) >= HALVED_AFTER {
                (*confirm_after, *changed_at) = ((*confirm_after / 2).max(CONFIRM_AFTER), now);
            }
            *confirm_after > CONFIRM_AFTER || !removed.is_empty()
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(namespace: &str) -> Arc<JobId> {
        Arc::new(JobId { namespace: namespace.into(), app_id: "j".into() })
    }

    fn placements(names: impl IntoIterator<Item = String>) -> Vec<Unconfirmed> {
        names.into_iter().map(|key| Unconfirmed { placed_at: 0, key }).collect()
    }

    #[test]
    fn a_namespace_whose_removed_pod_appears_later_gets_more_time_up_to_a_bound() {
        let (mut confirmations, start) = (Confirmations::default(), Instant::now());
        confirmations.removed(&job("slow"), placements(["e1".into(), "e2".into()]), 2, start);
        confirmations.removed(&job("slow"), placements(["e3".into(), "e4".into()]), 1, start);
        let after = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(confirmations.confirm_after("slow"), 150);
        assert_eq!(confirmations.added(&job("slow"), |key| key == "e3", after(1)), None);
        assert_eq!(confirmations.added(&job("other"), |_| true, after(1)), None);
        let longer = Some(Duration::from_millis(4_300));
        assert_eq!(confirmations.added(&job("slow"), |key| key == "e1", after(2)), longer);
        assert_eq!(confirmations.added(&job("slow"), |key| key == "e1", after(3)), None, "counted once");
        assert_eq!(confirmations.confirm_after("slow"), 4_300);
        assert_eq!(confirmations.added(&job("slow"), |_| true, after(9)), Some(MAX_CONFIRM_AFTER));
        assert_eq!(confirmations.confirm_after("other"), 150);
        confirmations.sweep(after(608));
        assert_eq!(confirmations.confirm_after("slow"), 10_000);
        confirmations.sweep(after(609));
        confirmations.sweep(after(610));
        assert_eq!(confirmations.confirm_after("slow"), 5_000, "ten minutes without a slow creation");
        (2..9).for_each(|times| confirmations.sweep(after(650 + 600 * times)));
        assert!(confirmations.namespaces.is_empty());
    }

    #[test]
    fn an_executor_that_was_accepted_long_after_it_was_refused_was_not_slow() {
        let (mut confirmations, start) = (Confirmations::default(), Instant::now());
        confirmations.removed(&job("etl"), placements(["e1".into()]), 1, start);
        assert_eq!(confirmations.added(&job("etl"), |_| true, start + 2 * MAX_CONFIRM_AFTER), None);
        assert_eq!(confirmations.confirm_after("etl"), 150);
    }

    #[test]
    fn what_is_remembered_is_bounded_and_soon_forgotten() {
        let (mut confirmations, start) = (Confirmations::default(), Instant::now());
        for batch in 0..100 {
            confirmations.removed(&job("etl"), placements((0..10).map(|at| format!("e{batch}-{at}"))), 10, start);
        }
        assert_eq!(confirmations.namespaces["etl"].removed.len(), MAX_REMOVED);
        for number in 0..2 * MAX_NAMESPACES {
            confirmations.removed(&job(&number.to_string()), placements(["e1".into()]), 1, start);
        }
        assert_eq!(confirmations.namespaces.len(), MAX_NAMESPACES);
        confirmations.sweep(start + MAX_CONFIRM_AFTER - CONFIRM_AFTER);
        assert_eq!(confirmations.namespaces.len(), MAX_NAMESPACES);
        confirmations.sweep(start + MAX_CONFIRM_AFTER + CONFIRM_AFTER);
        assert!(confirmations.namespaces.is_empty());
    }
}
