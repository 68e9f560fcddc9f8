//! A live pod of a job, as the reconciler sees it.

use crate::action::JobRef;
use crate::capacity::Capacity;
use crate::conventions::Conventions;
use crate::pod::Pod;
use crate::policy::{InvalidField, PolicyOverrides};
use crate::ratio::SpotRatio;

/// A live pod of a job.
#[derive(Clone, Debug, PartialEq)]
pub enum JobPod<'a> {
    /// An executor.
    Executor(ExecutorPod<'a>),
    /// A driver.
    Driver(DriverPod<'a>),
}

/// A live executor pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExecutorPod<'a> {
    /// The job.
    pub job: JobRef<'a>,
    /// The executor's key in the ledger: its name, or the placeholder if the apiserver generated the name.
    pub key: &'a str,
    /// The pod's uid.
    pub uid: &'a str,
    /// The name of the pod that owns the executor: its driver.
    pub driver: Option<&'a str>,
    /// The uid of that pod.
    pub driver_uid: Option<&'a str>,
    /// The node that the pod is bound to. If it is known, its capacity is the executor's.
    pub node: Option<&'a str>,
    /// The capacity that the pod's nodeSelector or affinity requires, else the one in its decision annotation.
    pub asked: Option<Capacity>,
    /// The capacity that the pod requires by itself, so that no ratio applies to it; `None` if it requires none, or if
    /// what Spot Balancer has added cannot be told from the pod's own.
    pub fixed: Option<Capacity>,
    /// Whether the executor states a ratio of its own, so that it counts in a job that is opted out.
    pub states_ratio: bool,
}

/// A live driver pod.
#[derive(Clone, Debug, PartialEq)]
pub struct DriverPod<'a> {
    /// The namespace.
    pub namespace: &'a str,
    /// The job. A driver of many jobs, such as a Spark Connect server, has no job id.
    pub job: Option<JobRef<'a>>,
    /// The pod's uid.
    pub uid: &'a str,
    /// The creation time, RFC 3339 in UTC, so that comparing texts compares times. The newest driver of a job
    /// determines its policy.
    pub created: &'a str,
    /// The policy fields that the driver's annotations state.
    pub overrides: PolicyOverrides,
    /// The fields whose values are invalid.
    pub invalid: Vec<InvalidField>,
}

impl<'a> JobPod<'a> {
    /// Classifies a pod; `None` if it does not belong to a job or is not live, or is an executor that has opted out.
    pub fn of(pod: &'a Pod<'_>, conventions: &'a Conventions) -> Option<Self> {
        if !pod.is_live() {
            return None;
        }
        let role = pod.label(&conventions.workload_role_label)?;
        let namespace = pod.metadata.namespace.as_deref()?;
        let job = conventions.job(pod).map(|(_, id)| JobRef { namespace, app_id: id });
        let uid = pod.metadata.uid.as_deref()?;
        if conventions.is_driver_role(role) {
            let (overrides, invalid) = conventions.overrides(pod);
            let created = pod.metadata.creation_timestamp.as_deref().unwrap_or_default();
            return Some(Self::Driver(DriverPod { namespace, job, uid, created, overrides, invalid }));
        }
        if role != conventions.executor_role_value {
            return None;
        }
        let stated = pod.annotation(&conventions.spot_ratio_annotation).and_then(|ratio| ratio.parse().ok());
        if stated == Some(SpotRatio::Off) {
            return None;
        }
        let job = job?;
        let spec = pod.spec.as_ref();
        let required = conventions.profile().required_capacity(pod);
        let decision = conventions.decision(pod);
        let owner = pod.owner();
        Some(Self::Executor(ExecutorPod {
            job,
            key: conventions.placeholder(pod).or(pod.metadata.name.as_deref())?,
            uid,
            driver: owner.map(|owner| owner.name.as_str()),
            driver_uid: owner.map(|owner| owner.uid.as_str()),
            node: spec.and_then(|spec| spec.node_name.as_deref()).filter(|node| !node.is_empty()),
            asked: required.or_else(|| decision.map(|(capacity, _)| capacity)),
            fixed: match decision {
                // The annotation of a pod with a generated name has its key, even if the pod has chosen its capacity.
                Some(_) if required.is_some() && conventions.placeholder(pod).is_some() => {
                    conventions.profile().requirements(pod).own_capacity
                }
                Some(_) => None,
                None => required.filter(|_| conventions.decision_annotation.is_some()),
            },
            states_ratio: stated.is_some(),
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::PolicyField;
    use serde_json::{Value, json};

    fn pod(change: impl FnOnce(&mut Value)) -> Pod<'static> {
        let mut pod = json!({
            "metadata": {
                "name": "p", "namespace": "etl", "uid": "u", "creationTimestamp": "2026-01-01T00:00:00Z",
                "labels": {"spark-role": "executor", "spark-app-selector": "j"},
            },
            "spec": {},
            "status": {"phase": "Running"},
        });
        change(&mut pod);
        serde_json::from_str::<Pod<'_>>(&pod.to_string()).expect("a pod").into_owned()
    }

    fn executor(pod: &Pod<'_>) -> (String, Option<String>, Option<Capacity>) {
        match JobPod::of(pod, &Conventions::default()) {
            Some(JobPod::Executor(seen)) => (seen.key.to_owned(), seen.node.map(str::to_owned), seen.asked),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn only_live_pods_of_a_job_count() {
        let seen = |pod: Pod<'_>| JobPod::of(&pod, &Conventions::default()).is_some();
        assert!(seen(pod(|_| {})));
        assert!(seen(pod(|pod| pod["status"]["phase"] = json!("Pending"))));
        assert!(!seen(pod(|pod| pod["status"]["phase"] = json!("Succeeded"))));
        assert!(!seen(pod(|pod| pod["status"]["phase"] = json!("Failed"))));
        assert!(!seen(pod(|pod| pod["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z"))));
        assert!(!seen(pod(|pod| pod["metadata"]["labels"] = json!({"spark-role": "executor"}))));
        assert!(!seen(pod(|pod| pod["metadata"]["labels"]["spark-role"] = json!("history"))));
    }

    #[test]
    fn the_pods_own_selector_precedes_its_decision_annotation() {
        let decided = |pod: &mut Value| pod["metadata"]["annotations"] = json!({"workload/capacity-type": "spot"});
        assert_eq!(executor(&pod(|_| {})), ("p".into(), None, None));
        assert_eq!(executor(&pod(decided)).2, Some(Capacity::Spot));
        let both = pod(|pod| {
            decided(pod);
            pod["spec"]["nodeSelector"] = json!({"karpenter.sh/capacity-type": "on-demand"});
            pod["spec"]["nodeName"] = json!("n");
        });
        assert_eq!(executor(&both), ("p".into(), Some("n".into()), Some(Capacity::OnDemand)));
    }

    #[test]
    fn an_executor_that_has_opted_out_does_not_count() {
        let of = |ratio: &str| {
            let pod = pod(|pod| pod["metadata"]["annotations"] = json!({"workload/spot-ratio": ratio}));
            JobPod::of(&pod, &Conventions::default()).is_some()
        };
        assert!(!of("off") && !of(" OFF"));
        assert!(of("0") && of("of"));
        let states = |annotations: Value| {
            let pod = pod(|pod| pod["metadata"]["annotations"] = annotations);
            matches!(JobPod::of(&pod, &Conventions::default()), Some(JobPod::Executor(seen)) if seen.states_ratio)
        };
        assert!(states(json!({"workload/spot-ratio": "0.5"})));
        assert!(!states(json!({"workload/spot-ratio": "of"})) && !states(json!({"workload/on-demand-base": "1"})));
    }

    #[test]
    fn a_capacity_is_the_pods_own_if_nothing_was_decided_for_it() {
        let fixed = |change: &dyn Fn(&mut Value), conventions: &Conventions| match JobPod::of(&pod(change), conventions)
        {
            Some(JobPod::Executor(seen)) => seen.fixed,
            other => panic!("{other:?}"),
        };
        let selects = |pod: &mut Value| pod["spec"]["nodeSelector"] = json!({"karpenter.sh/capacity-type": "spot"});
        let placed = |pod: &mut Value| {
            selects(pod);
            pod["metadata"]["annotations"] = json!({"workload/capacity-type": "spot"});
        };
        let conventions = Conventions::default();
        assert_eq!(fixed(&|_| {}, &conventions), None);
        assert_eq!(fixed(&selects, &conventions), Some(Capacity::Spot));
        assert_eq!(fixed(&placed, &conventions), None);
        // The webhook leaves the key of a pod with a generated name in the annotation, even if the pod has chosen its
        // capacity.
        let generated = |pod: &mut Value| {
            pod["metadata"]["generateName"] = json!("p-");
            pod["metadata"]["annotations"] = json!({"workload/capacity-type": "spot/id-1"});
            let spot = json!({"key": "karpenter.sh/capacity-type", "operator": "In", "values": ["spot"]});
            pod["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"] =
                json!({"nodeSelectorTerms": [{"matchExpressions": [spot]}]});
        };
        assert_eq!(fixed(&generated, &conventions), Some(Capacity::Spot));
        let without = Conventions { decision_annotation: None, ..conventions };
        assert_eq!(fixed(&selects, &without), None, "it may be ours");
    }

    #[test]
    fn an_executor_names_the_pod_that_owns_it() {
        let owned = pod(|pod| {
            let owner = |name, controller| json!({"kind": "Pod", "name": name, "uid": "u1", "controller": controller});
            pod["metadata"]["ownerReferences"] = json!([owner("other", false), owner("d", true)]);
        });
        let conventions = Conventions::default();
        let Some(JobPod::Executor(seen)) = JobPod::of(&owned, &conventions) else { panic!("no executor") };
        assert_eq!((seen.driver, seen.driver_uid), (Some("d"), Some("u1")));
    }

    #[test]
    fn a_pod_is_unschedulable_if_the_scheduler_says_so() {
        let why = |condition: Value| {
            let pod = pod(|pod| pod["status"]["conditions"] = json!([{"type": "Ready", "status": "False"}, condition]));
            pod.unschedulable().map(str::to_owned)
        };
        let scheduled =
            |status, reason| json!({"type": "PodScheduled", "status": status, "reason": reason, "message": "0/3"});
        assert_eq!(why(scheduled("False", "Unschedulable")), Some("0/3".into()));
        assert_eq!(why(scheduled("False", "SchedulingGated")), None);
        assert_eq!(why(scheduled("True", "Unschedulable")), None);
        assert_eq!(
            why(json!({"type": "PodScheduled", "status": "False", "reason": "Unschedulable"})),
            Some(String::new())
        );
        assert_eq!(why(json!({"status": null})), None);
        for (node, is_unschedulable) in [("", true), ("n", false)] {
            let pod = pod(|pod| {
                pod["status"]["conditions"] = json!([scheduled("False", "Unschedulable")]);
                pod["status"]["nominatedNodeName"] = json!(node);
            });
            assert_eq!(pod.unschedulable().is_some(), is_unschedulable, "a node is on its way: {node:?}");
        }
    }

    #[test]
    fn a_pod_with_a_generated_name_is_known_by_its_placeholder() {
        let stamped = pod(|pod| {
            pod["metadata"]["generateName"] = json!("p-");
            pod["metadata"]["annotations"] = json!({"workload/capacity-type": "on-demand/id-1"});
        });
        assert_eq!(executor(&stamped), ("id-1".into(), None, Some(Capacity::OnDemand)));
    }

    #[test]
    fn a_driver_states_each_policy_field_by_itself() {
        let driver = pod(|pod| {
            pod["metadata"]["labels"]["spark-role"] = json!("driver");
            pod["metadata"]["annotations"] = json!({"workload/spot-ratio": "1", "workload/on-demand-base": "x"});
        });
        let conventions = Conventions::default();
        let Some(JobPod::Driver(seen)) = JobPod::of(&driver, &conventions) else { panic!("no driver") };
        assert_eq!(seen.overrides, PolicyOverrides { spot_ratio: Some(SpotRatio::ONE), ..PolicyOverrides::default() });
        assert!(matches!(seen.invalid.as_slice(), [InvalidField { field: PolicyField::OnDemandBase, .. }]));
    }
}
