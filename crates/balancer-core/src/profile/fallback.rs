//! Which pods would find a node if they were not placed on spot.

use crate::capacity::Capacity;
use crate::pod::Pod;

use super::Profile;
use super::request::Request;

impl Profile<'_> {
    /// Whether a pod without a node may run on spot alone, and only because Spot Balancer has placed it there: a new pod
    /// in its place could run on on-demand. A pod that merely prefers spot may run on on-demand itself.
    pub fn is_held_to_spot(self, pod: &Pod<'_>) -> bool {
        let Some(spec) = pod.spec.as_ref().filter(|spec| !spec.is_bound()) else { return false };
        self.added(pod).is_some_and(|added| {
            let is_required = added.capacity == Capacity::Spot && !matches!(added.request, Request::Preferred(_));
            is_required && self.required_by(spec, Some(&added.request)).is_none()
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use crate::conventions::{Conventions, SpotPreference};
    use crate::pod::Pod;

    const LABEL: &str = "karpenter.sh/capacity-type";

    fn strict() -> Conventions {
        Conventions { spot_preference: SpotPreference::Strict, ..Conventions::default() }
    }

    /// A pod that was placed on spot with these conventions.
    fn is_held(conventions: &Conventions, change: impl FnOnce(&mut Value)) -> bool {
        let mut pod = json!({
            "metadata": {"name": "p", "annotations": {"workload/capacity-type": "spot"}},
            "spec": {"nodeSelector": {LABEL: "spot"}},
        });
        change(&mut pod);
        let pod = pod.to_string();
        conventions.profile().is_held_to_spot(&serde_json::from_str::<Pod<'_>>(&pod).expect("a pod"))
    }

    #[test]
    fn a_pod_that_was_placed_on_spot_strictly_is_held_there_until_it_has_a_node() {
        let conventions = strict();
        assert!(is_held(&conventions, |_| {}));
        assert!(!is_held(&conventions, |pod| pod["spec"]["nodeName"] = json!("n")));
        assert!(!is_held(&conventions, |pod| pod["metadata"]["annotations"] = json!({})), "it was not placed");
        assert!(!is_held(&conventions, |pod| pod["spec"] = json!({})), "it has nothing of the placement");
        assert!(!is_held(&conventions, |pod| {
            pod["metadata"]["annotations"] = json!({"workload/capacity-type": "on-demand"});
            pod["spec"]["nodeSelector"][LABEL] = json!("on-demand");
        }));
    }

    #[test]
    fn a_pod_that_prefers_spot_may_run_on_on_demand() {
        assert!(!is_held(&Conventions::default(), |_| {}));
    }

    #[test]
    fn a_pod_that_requires_a_capacity_by_itself_is_not_held_by_its_placement() {
        let affinity = |value: &'static str| {
            move |pod: &mut Value| {
                let term = json!({"matchExpressions": [{"key": LABEL, "operator": "In", "values": [value]}]});
                pod["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"] =
                    json!({"nodeSelectorTerms": [term]});
            }
        };
        assert!(!is_held(&strict(), affinity("spot")) && !is_held(&strict(), affinity("on-demand")));
        let zone = |pod: &mut Value| pod["spec"]["nodeSelector"]["topology.kubernetes.io/zone"] = json!("a");
        assert!(is_held(&strict(), zone), "a requirement of something else");
    }
}
