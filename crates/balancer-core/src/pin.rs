//! What capacity a pod's own nodeSelector and required node affinity leave open.

use crate::capacity::Capacity;
use crate::pod::{Affinity, NodeSelectorRequirement, PodSpec};

/// The capacity that the pod itself fixes; `None` if it may run on spot and on on-demand alike.
///
/// What permits spot but not on-demand counts as spot. What permits no spot counts as on-demand,
/// also where it asks for another lasting capacity such as `reserved`.
pub(crate) fn required(spec: &PodSpec<'_>, capacity_type_label: &str) -> Option<Capacity> {
    if let Some(value) = spec.node_selector.as_ref().and_then(|own| own.get(capacity_type_label)) {
        return Some(Capacity::of_label(value));
    }
    let required = spec.affinity.as_ref().and_then(Affinity::required)?;
    // Terms are alternatives: a capacity is open if any of them permits it.
    let open = |capacity: Capacity| {
        required.node_selector_terms.iter().any(|term| {
            term.match_expressions
                .iter()
                .flatten()
                .filter(|requirement| requirement.key.as_str() == capacity_type_label)
                .all(|requirement| permits(requirement, capacity))
        })
    };
    match (open(Capacity::Spot), open(Capacity::OnDemand)) {
        (true, true) => None,
        (true, false) => Some(Capacity::Spot),
        (false, _) => Some(Capacity::OnDemand),
    }
}

/// Whether a node of this capacity meets the requirement (Kubernetes' NodeSelectorRequirement).
fn permits(requirement: &NodeSelectorRequirement<'_>, capacity: Capacity) -> bool {
    let listed = || requirement.values.iter().flatten().any(|value| value.as_str() == capacity.as_str());
    match requirement.operator.as_str() {
        "In" => listed(),
        "NotIn" => !listed(),
        "DoesNotExist" => false,
        // Gt and Lt compare numbers, which a capacity is not: no node of ours meets them.
        "Gt" | "Lt" => false,
        _ => true,
    }
}
