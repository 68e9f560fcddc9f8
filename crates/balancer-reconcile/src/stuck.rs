//! The executors that were placed on spot alone and find no node there. Pure: the clock is the caller's.

use std::collections::HashMap;
use std::time::Duration;

use balancer_core::{Conventions, ExecutorPod, Pod};
use k8s_openapi::jiff::Timestamp;
use tokio::time::Instant;

/// The longest time that an executor is believed to have waited when it is first seen. Only the clocks of other machines
/// tell more.
const MAX_WAITED: Duration = Duration::from_secs(86_400);

/// One version of a pod.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct PodVersion {
    pub(crate) name: String,
    pub(crate) uid: String,
    pub(crate) resource_version: String,
}

/// An executor that finds no spot node, and for which no node is nominated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct StuckExecutor {
    pub(crate) pod: PodVersion,
    /// The executor's key in the ledger.
    pub(crate) key: String,
    /// Since when.
    pub(crate) since: Instant,
}

impl StuckExecutor {
    /// The executor, if it is stuck. `now` and `wall_clock` are the same moment.
    pub(crate) fn of(
        pod: &Pod<'_>,
        executor: &ExecutorPod<'_>,
        conventions: &Conventions,
        now: Instant,
        wall_clock: Timestamp,
    ) -> Option<Self> {
        pod.unschedulable()?;
        if !conventions.profile().is_held_to_spot(pod) {
            return None;
        }
        let metadata = &pod.metadata;
        let text = |text: Option<&str>| text.map(str::to_owned);
        let since = pod.unschedulable_since().and_then(|since| since.parse::<Timestamp>().ok());
        let waited = since.and_then(|since| Duration::try_from(wall_clock.duration_since(since)).ok());
        let waited = waited.unwrap_or_default().min(MAX_WAITED);
        Some(Self {
            pod: PodVersion {
                name: text(metadata.name.as_deref())?,
                uid: text(metadata.uid.as_deref())?,
                resource_version: text(metadata.resource_version.as_deref())?,
            },
            key: executor.key.to_owned(),
            since: now.checked_sub(waited).unwrap_or(now),
        })
    }
}

/// All of them, by namespace and name. There are no more than executors in the index.
#[derive(Debug, Default)]
pub(crate) struct StuckExecutors(HashMap<String, HashMap<String, StuckExecutor>>);

impl StuckExecutors {
    /// A pod was reported. `stuck` is `None` if it is not stuck.
    pub(crate) fn apply(&mut self, namespace: &str, name: &str, stuck: Option<StuckExecutor>) {
        let Some(mut stuck) = stuck else { return self.delete(namespace, name) };
        let executors = self.0.entry(namespace.to_owned()).or_default();
        // Another pod of the same name has not waited yet.
        if let Some(known) = executors.get(name).filter(|known| known.pod.uid == stuck.pod.uid) {
            stuck.since = stuck.since.min(known.since);
        }
        executors.insert(name.to_owned(), stuck);
    }

    /// A pod is gone.
    pub(crate) fn delete(&mut self, namespace: &str, name: &str) {
        let Some(executors) = self.0.get_mut(namespace) else { return };
        executors.remove(name);
        if executors.is_empty() {
            self.0.remove(namespace);
        }
    }

    /// Removes the executors that do not exist.
    pub(crate) fn retain(&mut self, exists: impl Fn(&str, &str) -> bool) {
        self.0.retain(|namespace, executors| {
            executors.retain(|name, _| exists(namespace, name));
            !executors.is_empty()
        });
    }

    /// Those of a namespace.
    pub(crate) fn of_namespace(&self, namespace: &str) -> impl Iterator<Item = &StuckExecutor> {
        self.0.get(namespace).into_iter().flat_map(HashMap::values)
    }

    /// The namespace of each, and the executor.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&str, &StuckExecutor)> {
        self.0
            .iter()
            .flat_map(|(namespace, executors)| executors.values().map(move |stuck| (namespace.as_str(), stuck)))
    }
}

#[cfg(test)]
mod tests {
    use balancer_core::{JobPod, SpotPreference};
    use serde_json::json;

    use super::*;

    const WALL_CLOCK: &str = "2026-01-02T00:00:00Z";

    /// An executor whose condition has this time.
    fn stuck(uid: &str, since: Option<&str>, now: Instant) -> Option<StuckExecutor> {
        let pod = json!({
            "metadata": {
                "name": "e1", "namespace": "etl", "uid": uid, "resourceVersion": "7",
                "labels": {"spark-role": "executor", "spark-app-selector": "j"},
                "annotations": {"workload/capacity-type": "spot"},
            },
            "spec": {"nodeSelector": {"karpenter.sh/capacity-type": "spot"}},
            "status": {"conditions": [{
                "type": "PodScheduled", "status": "False", "reason": "Unschedulable", "lastTransitionTime": since,
            }]},
        });
        let pod = pod.to_string();
        let pod: Pod<'_> = serde_json::from_str(&pod).expect("a pod");
        let conventions = Conventions { spot_preference: SpotPreference::Strict, ..Conventions::default() };
        let Some(JobPod::Executor(executor)) = JobPod::of(&pod, &conventions) else { panic!("no executor") };
        StuckExecutor::of(&pod, &executor, &conventions, now, WALL_CLOCK.parse().expect("a time"))
    }

    #[test]
    fn an_executor_waits_from_the_time_of_its_condition_or_from_when_it_was_first_seen() {
        let now = Instant::now() + 2 * MAX_WAITED;
        let waited = |since| stuck("u", since, now).map(|stuck| (now - stuck.since).as_secs());
        assert_eq!(waited(Some("2026-01-01T23:59:00Z")), Some(60));
        assert_eq!(waited(Some("2026-01-02T00:10:00Z")), Some(0), "that clock is ahead");
        assert_eq!(waited(Some("2020-01-01T00:00:00Z")), Some(86_400));
        assert_eq!((waited(None), waited(Some("yesterday"))), (Some(0), Some(0)));

        let (mut tracker, later) = (StuckExecutors::default(), now + Duration::from_secs(30));
        let since = |tracker: &StuckExecutors| tracker.iter().map(|(_, stuck)| stuck.since).collect::<Vec<_>>();
        tracker.apply("etl", "e1", stuck("u", None, now));
        tracker.apply("etl", "e1", stuck("u", None, later));
        assert_eq!(since(&tracker), [now]);
        tracker.apply("etl", "e1", stuck("another", None, later));
        assert_eq!(since(&tracker), [later]);
        tracker.retain(|_, name| name != "e1");
        assert_eq!((since(&tracker), tracker.0.len()), (vec![], 0));
    }
}
