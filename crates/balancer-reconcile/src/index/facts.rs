//! What is shown of one job.

use balancer_core::{JobId, Policy, PolicyField, Ratio, SpotState};

use super::ClusterIndex;
use super::shares::ExecutorCounts;
use crate::jobs::{InvalidAnnotationFacts, JobFacts, NodeShare, PoolShare, RatioSource, share};

/// Jobs with fewer executors on nodes than this lose nothing worth a warning.
const AT_RISK: u64 = 2;

impl ClusterIndex {
    /// What is shown of the job, whose ledger has this policy and this state; `None` if it has no live pod. The
    /// cost does not grow with the job's executors.
    pub(crate) fn facts(&self, job: &JobId, stored: Option<Policy>, spot: &SpotState) -> Option<JobFacts> {
        if !self.contains(job) {
            return None;
        }
        let id = job.as_job_ref();
        let policy = self.policy(job, stored);
        let mut facts = JobFacts {
            namespace: job.namespace.clone(),
            job_id: id.label_value().to_owned(),
            driver: self.driver_name(job).map(|driver| driver.to_string()),
            wanted_ratio: policy.spot_ratio.share().map(as_number),
            on_demand_base: policy.on_demand_base,
            source: self.ratio_source(job, stored),
            spot_state: spot.into(),
            invalid_annotations: self.invalid_now(job),
            ..JobFacts::default()
        };
        let ExecutorCounts { bound, pending, largest_node } = self.executors_by_capacity(job);
        (facts.spot, facts.on_demand, facts.unknown) = (bound.spot as u64, bound.on_demand as u64, bound.none as u64);
        (facts.pending, facts.pending_spot) = (pending.total() as u64, pending.spot as u64);
        if let Some(ratio) = policy.spot_ratio.share() {
            let (on_spot, elsewhere) = (facts.spot + facts.pending_spot, facts.on_demand + pending.on_demand as u64);
            facts.distance = distance(on_spot, elsewhere, policy.on_demand_base.into(), ratio);
        }
        let bound = bound.total() as u64;
        facts.largest_node = largest_node.map(|(name, executors)| NodeShare {
            name: name.to_string(),
            executors: executors as u64,
            share: share(executors as u64, bound),
        });
        let pools = self.shares(job).pools;
        let largest_pool =
            pools.iter().max_by(|(one, of_one), (other, of_other)| of_one.cmp(of_other).then_with(|| other.cmp(one)));
        facts.largest_pool = largest_pool.map(|(pool, executors)| PoolShare {
            instance_type: pool.instance_type.to_string(),
            zone: pool.zone.to_string(),
            executors: u64::from(*executors),
            share: share(u64::from(*executors), bound),
        });
        if bound >= AT_RISK {
            let of_node = facts.largest_node.as_ref().map_or(0.0, |node| node.share);
            let of_pool = facts.largest_pool.as_ref().map_or(0.0, |pool| pool.share);
            facts.risk = of_node.max(of_pool);
        }
        Some(facts)
    }

    fn ratio_source(&self, job: &JobId, stored: Option<Policy>) -> RatioSource {
        let elsewhere = if stored.is_some() { RatioSource::Ledger } else { RatioSource::Default };
        let Some(driver) = self.stated(job) else { return elsewhere };
        let is_invalid = driver.invalid.iter().any(|invalid| invalid.field == PolicyField::SpotRatio);
        match (driver.states_ratio, is_invalid, driver.overrides.spot_ratio) {
            (true, _, _) => RatioSource::Driver,
            (false, true, Some(_)) if driver.has_stated_ratio => RatioSource::Previous,
            (false, true, Some(_)) => RatioSource::Default,
            (false, true, None) => elsewhere,
            (false, false, _) => RatioSource::Default,
        }
    }

    fn invalid_now(&self, job: &JobId) -> Vec<InvalidAnnotationFacts> {
        let invalid = self.stated(job).map(|driver| driver.invalid.as_slice()).unwrap_or_default();
        let facts = invalid.iter().map(|invalid| InvalidAnnotationFacts {
            annotation: self.conventions.annotation(invalid.field).to_owned(),
            problem: invalid.to_string(),
        });
        facts.collect()
    }
}

fn as_number(ratio: Ratio) -> f64 {
    f64::from(ratio.billionths()) / f64::from(Ratio::ONE_IN_BILLIONTHS)
}

/// How many of these executors the ratio wants on spot.
#[expect(clippy::cast_precision_loss, reason = "a job has less than 2^53 executors")]
pub fn wanted_spot(executors: u64, base: u64, ratio: Ratio) -> f64 {
    executors.saturating_sub(base) as f64 * as_number(ratio)
}

/// How many whole executors more than the ratio wants are on spot. The rule itself stays within one executor of the ratio,
/// so a part of one is no distance.
pub fn distance(spot: u64, on_demand: u64, base: u64, ratio: Ratio) -> i64 {
    let one = i128::from(Ratio::ONE_IN_BILLIONTHS);
    let beyond_base = (spot + on_demand).saturating_sub(base);
    let wanted = i128::from(beyond_base) * i128::from(ratio.billionths());
    i64::try_from((i128::from(spot) * one - wanted) / one).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use balancer_core::{Capacity, Conventions, Pod, SpotRatio};
    use serde_json::{Value, json};

    use super::*;
    use crate::index::Pool;
    use crate::jobs::SpotFacts;

    fn ratio(tenths: u32) -> Ratio {
        Ratio::from_billionths(tenths * 100_000_000).expect("a ratio")
    }

    fn apply(index: &mut ClusterIndex, pod: &Value) {
        let text = pod.to_string();
        index.apply_pod(&serde_json::from_str::<Pod<'_>>(&text).expect("a pod"), None);
    }

    fn driver(annotations: &Value) -> Value {
        json!({
            "metadata": {
                "name": "d", "namespace": "etl", "uid": "d", "creationTimestamp": "2026-01-01T00:00:00Z",
                "labels": {"spark-role": "driver", "spark-app-selector": "j"}, "annotations": annotations,
            },
            "spec": {},
        })
    }

    fn executor(number: usize, asked: &str, node: Option<&str>) -> Value {
        let owner = json!({"apiVersion": "v1", "kind": "Pod", "name": "d", "uid": "d", "controller": true});
        json!({
            "metadata": {
                "name": format!("e{number}"), "namespace": "etl", "uid": format!("{number}"),
                "labels": {"spark-role": "executor", "spark-app-selector": "j"},
                "annotations": {"workload/capacity-type": asked}, "ownerReferences": [owner],
            },
            "spec": {"nodeName": node},
        })
    }

    fn job() -> JobId {
        JobId { namespace: "etl".into(), app_id: "j".into() }
    }

    fn index() -> ClusterIndex {
        let mut index = ClusterIndex::new(Arc::new(Conventions::default()), Policy::default());
        for (node, capacity) in [("s1", Capacity::Spot), ("s2", Capacity::Spot), ("o1", Capacity::OnDemand)] {
            index.apply_node(node, Some(capacity));
            index.set_pool(node, Some(Pool { instance_type: "m5".into(), zone: "a".into() }));
        }
        index
    }

    fn facts(index: &ClusterIndex, stored: Option<Policy>) -> JobFacts {
        index.facts(&job(), stored, &SpotState::Open).expect("a live job")
    }

    #[test]
    fn a_job_without_a_live_pod_has_no_facts() {
        assert_eq!(index().facts(&job(), None, &SpotState::Open), None);
    }

    #[test]
    fn executors_count_by_their_nodes_and_those_without_one_are_pending() {
        let mut index = index();
        apply(&mut index, &driver(&json!({"workload/spot-ratio": "0.7"})));
        let nodes = [Some("s1"), Some("s1"), Some("s2"), Some("o1"), Some("other"), None];
        for (number, node) in nodes.into_iter().enumerate() {
            // The node's label comes first.
            apply(&mut index, &executor(number, if node == Some("other") { "" } else { "spot" }, node));
        }
        apply(&mut index, &executor(9, "on-demand", None));
        let facts = facts(&index, None);
        assert_eq!((facts.spot, facts.on_demand, facts.pending, facts.pending_spot, facts.unknown), (3, 1, 2, 1, 1));
        assert_eq!(facts.largest_node, Some(NodeShare { name: "s1".into(), executors: 2, share: 0.4 }));
        let pool = PoolShare { instance_type: "m5".into(), zone: "a".into(), executors: 3, share: 0.6 };
        assert_eq!((facts.largest_pool, facts.risk), (Some(pool), 0.6));
        assert_eq!(
            (facts.driver.as_deref(), facts.wanted_ratio, facts.source),
            (Some("d"), Some(0.7), RatioSource::Driver)
        );
        assert_eq!((facts.distance, facts.spot_state), (0, SpotFacts::Open));
    }

    #[test]
    fn one_executor_on_a_node_is_no_risk() {
        let mut index = index();
        apply(&mut index, &executor(1, "spot", Some("s1")));
        assert_eq!(facts(&index, None).risk, 0.0);
    }

    #[test]
    fn the_distance_is_in_whole_executors_beyond_the_base() {
        for (spot, on_demand, base, tenths, expected) in [
            (7, 3, 0, 7, 0),
            (10, 0, 0, 7, 3),
            (0, 10, 0, 7, -7),
            (5, 2, 0, 7, 0),
            // 0.9 executors are no distance, 1 is.
            (1, 0, 0, 1, 0),
            (2, 8, 0, 1, 1),
            (0, 5, 5, 10, 0),
            (4, 1, 5, 5, 4),
            (0, 0, 0, 5, 0),
        ] {
            assert_eq!(distance(spot, on_demand, base, ratio(tenths)), expected, "{spot} {on_demand} {base} {tenths}");
        }
    }

    #[test]
    fn an_opted_out_job_has_no_ratio_and_no_distance() {
        let mut index = index();
        apply(&mut index, &driver(&json!({"workload/spot-ratio": "off"})));
        (0..9).for_each(|number| apply(&mut index, &executor(number, "", Some("o1"))));
        let facts = facts(&index, None);
        assert_eq!((facts.wanted_ratio, facts.distance, facts.on_demand), (None, 0, 9));
    }

    #[test]
    fn the_source_of_the_ratio_is_shown() {
        let stored = Some(Policy { spot_ratio: SpotRatio::ONE, ..Policy::DEFAULT });
        let mut index = index();
        apply(&mut index, &executor(1, "spot", None));
        assert_eq!(facts(&index, None).source, RatioSource::Default);
        assert_eq!(
            (facts(&index, stored).source, facts(&index, stored).wanted_ratio),
            (RatioSource::Ledger, Some(1.0))
        );
        apply(&mut index, &driver(&json!({"workload/spot-ratio": "lots"})));
        assert_eq!(facts(&index, stored).source, RatioSource::Ledger);
        apply(&mut index, &driver(&json!({"workload/spot-ratio": "0.3"})));
        assert_eq!(facts(&index, stored).source, RatioSource::Driver);
        apply(&mut index, &driver(&json!({"workload/spot-ratio": "lots"})));
        let previous = facts(&index, stored);
        assert_eq!((previous.source, previous.wanted_ratio), (RatioSource::Previous, Some(0.3)));
        let [invalid] = previous.invalid_annotations.as_slice() else { panic!("{previous:?}") };
        assert!(invalid.annotation == "workload/spot-ratio" && invalid.problem.contains("\"lots\""), "{invalid:?}");
        apply(&mut index, &driver(&json!({})));
        assert_eq!(facts(&index, stored).source, RatioSource::Default);
    }

    #[test]
    fn an_invalid_ratio_of_a_driver_that_had_stated_none_leaves_the_default() {
        let mut index = index();
        let mut source = |annotations: Value| {
            apply(&mut index, &driver(&annotations));
            let facts = facts(&index, None);
            (facts.source, facts.wanted_ratio)
        };
        source(json!({}));
        assert_eq!(source(json!({"workload/spot-ratio": "lots"})), (RatioSource::Default, Some(0.5)));
        assert_eq!(source(json!({"workload/spot-ratio": "more"})), (RatioSource::Default, Some(0.5)));
        source(json!({"workload/spot-ratio": "0.3"}));
        source(json!({"workload/spot-ratio": "lots"}));
        assert_eq!(source(json!({"workload/spot-ratio": "more"})), (RatioSource::Previous, Some(0.3)));
        source(json!({}));
        assert_eq!(source(json!({"workload/spot-ratio": "lots"})), (RatioSource::Default, Some(0.5)));
    }
}
