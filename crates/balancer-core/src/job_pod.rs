//! A live pod of a job, as the reconciler sees it.

use crate::action::JobRef;
use crate::capacity::Capacity;
use crate::conventions::Conventions;
use crate::pod::Pod;
use crate::policy::{InvalidField, PolicyOverrides};

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
    /// The node that the pod is bound to. If it is known, its capacity is the executor's.
    pub node: Option<&'a str>,
    /// The capacity that the pod's nodeSelector or affinity requires, else the one in its decision annotation.
    pub asked: Option<Capacity>,
}

/// A live driver pod.
#[derive(Clone, Debug, PartialEq)]
pub struct DriverPod<'a> {
    /// The job.
    pub job: JobRef<'a>,
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
    /// Classifies a pod; `None` if it does not belong to a job or is not live.
    pub fn of(pod: &'a Pod<'_>, conventions: &'a Conventions) -> Option<Self> {
        if !pod.is_live() {
            return None;
        }
        let role = pod.label(&conventions.workload_role_label)?;
        let (_, id) = conventions.job(pod)?;
        let job = JobRef { namespace: pod.metadata.namespace.as_deref()?, app_id: id };
        let uid = pod.metadata.uid.as_deref()?;
        if role == conventions.driver_role_value {
            let (overrides, invalid) = conventions.overrides(pod);
            let created = pod.metadata.creation_timestamp.as_deref().unwrap_or_default();
            return Some(Self::Driver(DriverPod { job, uid, created, overrides, invalid }));
        }
        if role != conventions.executor_role_value {
            return None;
        }
        let spec = pod.spec.as_ref();
        Some(Self::Executor(ExecutorPod {
            job,
            key: conventions.placeholder(pod).or(pod.metadata.name.as_deref())?,
            uid,
            node: spec.and_then(|spec| spec.node_name.as_deref()).filter(|node| !node.is_empty()),
            asked: spec
                .and_then(|spec| conventions.profile().required_by(spec))
                .or_else(|| conventions.decision(pod).map(|(capacity, _)| capacity)),
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::PolicyField;
    use crate::ratio::Ratio;
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
        assert_eq!(seen.overrides, PolicyOverrides { spot_ratio: Some(Ratio::ONE), ..PolicyOverrides::default() });
        assert!(matches!(seen.invalid.as_slice(), [InvalidField { field: PolicyField::OnDemandBase, .. }]));
    }
}
