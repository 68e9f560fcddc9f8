//! What spot means in this cluster: which capacity a node has, which capacity a pod requires, and what a pod
//! needs to run on a capacity.

use json_patch::Patch;

use crate::capacity::Capacity;
use crate::conventions::{Conventions, SpotPreference};
use crate::patch::add_pairs;
use crate::pod::{Affinity, NodeSelectorRequirement, Pod, PodSpec};

/// The only reader of the capacity type label. See [`Conventions::profile`].
#[derive(Clone, Copy, Debug)]
pub struct Profile<'a>(&'a Conventions);

impl Conventions {
    /// What spot means in this cluster.
    pub const fn profile(&self) -> Profile<'_> {
        Profile(self)
    }
}

impl Profile<'_> {
    /// The capacity of a node; `None` if the node has no capacity type label. `label` returns the value of one
    /// of the node's labels.
    pub fn of_node<'v>(self, label: impl FnOnce(&str) -> Option<&'v str>) -> Option<Capacity> {
        label(&self.0.capacity_type_label).map(capacity_of)
    }

    /// The capacity that the pod requires by its own nodeSelector and required node affinity; `None` if it may
    /// run on both.
    ///
    /// A pod that may run on spot but not on on-demand requires spot. A pod that may not run on spot counts as
    /// on-demand, even if it requires another capacity such as `reserved`.
    pub(crate) fn required_by(self, spec: &PodSpec<'_>) -> Option<Capacity> {
        let label = self.0.capacity_type_label.as_str();
        if let Some(value) = spec.node_selector.as_ref().and_then(|selector| selector.get(label)) {
            return Some(capacity_of(value));
        }
        let required = spec.affinity.as_ref().and_then(Affinity::required)?;
        // The node must match one of the terms.
        let permitted = |capacity: Capacity| {
            required.terms.iter().any(|term| {
                let requirements = term.match_expressions.iter().flatten();
                requirements.filter(|requirement| *requirement.key == *label).all(|own| permits(own, capacity))
            })
        };
        match (permitted(Capacity::Spot), permitted(Capacity::OnDemand)) {
            (true, true) => None,
            (true, false) => Some(Capacity::Spot),
            (false, _) => Some(Capacity::OnDemand),
        }
    }

    /// What to change in a pod that was placed on `capacity`: the nodeSelector, merged into the pod's own, and
    /// the decision annotation with the placeholder. A pod that requires a capacity by itself keeps its spec.
    pub fn apply(self, pod: &Pod<'_>, capacity: Capacity, placeholder: Option<&str>) -> Patch {
        // At most two objects and two keys of the selector, and one of each of the annotations.
        let mut patch = Patch(Vec::with_capacity(6));
        let conventions = self.0;
        let spec = pod.spec.as_ref();
        let decides_itself = spec.is_some_and(|spec| self.required_by(spec).is_some());
        let selects = match (capacity, conventions.spot_preference) {
            (Capacity::OnDemand, _) | (Capacity::Spot, SpotPreference::Strict) => true,
            (Capacity::Spot, SpotPreference::BestEffort) => false,
        };
        if selects && !decides_itself {
            let own = spec.and_then(|spec| spec.node_selector.as_ref());
            let role = conventions.workload_role_label.as_str();
            // The pod's own selector for the role stays.
            let selects_role = conventions.node_role_selector && own.is_none_or(|own| own.get(role).is_none());
            let pairs = [
                (conventions.capacity_type_label.as_str(), capacity.as_str()),
                (role, conventions.executor_role_value.as_str()),
            ];
            let parents: &[(&str, bool)] = &[("spec", spec.is_some()), ("nodeSelector", own.is_some())];
            add_pairs(&mut patch, parents, pairs.into_iter().take(if selects_role { 2 } else { 1 }));
        }
        if let Some(key) = conventions.decision_annotation.as_deref()
            && (!decides_itself || placeholder.is_some())
        {
            let decision = match placeholder {
                Some(id) => format!("{capacity}/{id}"),
                None => capacity.as_str().to_owned(),
            };
            let own = pod.metadata.annotations.as_ref();
            // On reinvocation the pod has it already.
            if own.and_then(|own| own.get(key)) != Some(decision.as_str()) {
                let parents = &[("metadata", true), ("annotations", own.is_some())];
                add_pairs(&mut patch, parents, [(key, decision.as_str())].into_iter());
            }
        }
        patch
    }
}

/// What a value of the capacity type label counts as. Only `spot` nodes are reclaimed. Every other value, such as
/// Karpenter's `reserved`, counts as on-demand.
fn capacity_of(value: &str) -> Capacity {
    if value == Capacity::Spot.as_str() { Capacity::Spot } else { Capacity::OnDemand }
}

/// Whether a node of this capacity meets the requirement (Kubernetes' NodeSelectorRequirement).
fn permits(requirement: &NodeSelectorRequirement<'_>, capacity: Capacity) -> bool {
    let listed = || requirement.values.iter().flatten().any(|value| value.as_str() == capacity.as_str());
    match requirement.operator.as_str() {
        "In" => listed(),
        "NotIn" => !listed(),
        // Gt and Lt compare numbers, and the name of a capacity is not a number.
        "DoesNotExist" | "Gt" | "Lt" => false,
        _ => true,
    }
}
