//! What to do about placements whose pods no reconcile has found yet. Pure.

use std::collections::BTreeSet;
use std::sync::Arc;

use balancer_core::{Millis, Unconfirmed, Waiting};

/// If placements wait and the store names none of them, it is asked again after this time, in milliseconds.
const ASK_AGAIN_AFTER: Millis = 1_000;

/// What to do about the placements that a reconcile has reported as waiting.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct WaitingPlan {
    /// The executors to name in the next reconcile: their pods are live, or will not come any more.
    pub(crate) name: BTreeSet<Arc<str>>,
    /// The placements to look up in the Kubernetes API.
    pub(crate) look_up: Vec<Unconfirmed>,
    /// When the next of the others becomes old enough to be looked up or removed, or may be reported, in milliseconds.
    pub(crate) recheck_after: Option<Millis>,
    /// How many have no live pod.
    pub(crate) without_pod: u64,
}

impl WaitingPlan {
    /// `more_waiting` says whether there are more than `waiting`, and `is_live` whether the executor of a key is live. Placements are looked up from the age `confirm_after` on, and
    /// removed from the age `grace` on.
    pub(crate) fn new(
        waiting: Vec<Waiting>,
        more_waiting: bool,
        is_live: impl Fn(&str) -> bool,
        grace: Millis,
        confirm_after: Millis,
    ) -> Self {
        // Those that are reported lead to the others.
        let recheck_after = (more_waiting && waiting.is_empty()).then_some(ASK_AGAIN_AFTER);
        let mut plan = Self { recheck_after, ..Self::default() };
        for Waiting { placement, age } in waiting {
            if is_live(&placement.key) {
                plan.name.insert(placement.key.into());
                continue;
            }
            plan.without_pod += 1;
            if age >= grace {
                plan.name.insert(placement.key.into());
                continue;
            }
            let next = if age < confirm_after { confirm_after.min(grace) } else { grace };
            plan.recheck_after = Some(plan.recheck_after.unwrap_or(Millis::MAX).min(next - age));
            if age >= confirm_after {
                plan.look_up.push(placement);
            }
        }
        plan
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(waiting: &[(&str, Millis)]) -> WaitingPlan {
        let waiting = waiting
            .iter()
            .map(|(key, age)| Waiting { placement: Unconfirmed { placed_at: 0, key: (*key).to_owned() }, age: *age });
        WaitingPlan::new(waiting.collect(), false, |key| key.starts_with("live"), 100, 10)
    }

    fn keys(keys: &[&str]) -> BTreeSet<Arc<str>> {
        keys.iter().map(|key| Arc::from(*key)).collect()
    }

    #[test]
    fn a_store_that_names_none_of_the_placements_that_wait_is_asked_again() {
        let after = |more_waiting| WaitingPlan::new(Vec::new(), more_waiting, |_| false, 100, 10).recheck_after;
        assert_eq!((after(true), after(false)), (Some(ASK_AGAIN_AFTER), None));
    }

    #[test]
    fn a_live_executor_is_named_whatever_its_age() {
        let wanted = WaitingPlan { name: keys(&["live-1", "live-2"]), ..WaitingPlan::default() };
        assert_eq!(plan(&[("live-1", 0), ("live-2", 500)]), wanted);
    }

    #[test]
    fn a_placement_is_looked_up_from_its_age_on_until_the_grace_ends_and_then_removed() {
        let at = |age| {
            let plan = plan(&[("e1", age)]);
            (plan.name.len(), plan.look_up.len(), plan.recheck_after, plan.without_pod)
        };
        assert_eq!(at(0), (0, 0, Some(10), 1));
        assert_eq!(at(9), (0, 0, Some(1), 1));
        assert_eq!(at(10), (0, 1, Some(90), 1));
        assert_eq!(at(99), (0, 1, Some(1), 1));
        assert_eq!(at(100), (1, 0, None, 1));
    }

    #[test]
    fn the_first_that_becomes_old_enough_decides_when_to_come_back() {
        assert_eq!(plan(&[("e1", 50), ("e2", 3), ("e3", 200)]).recheck_after, Some(7));
    }

    #[test]
    fn with_a_grace_shorter_than_the_time_until_the_lookup_nothing_is_looked_up() {
        let waiting = vec![Waiting { placement: Unconfirmed { placed_at: 0, key: "e1".to_owned() }, age: 5 }];
        let plan = WaitingPlan::new(waiting, false, |_| false, 7, 10);
        assert_eq!((plan.look_up.len(), plan.recheck_after), (0, Some(2)));
    }
}
