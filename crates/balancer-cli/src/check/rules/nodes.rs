//! Checks whether the nodes have the labels of the profile, and whether executors can run on the spot nodes.

use std::collections::BTreeSet;

use balancer_core::{Capacity, CapacityLabels, CapacityProfile, Conventions, LabelValues};
use k8s_openapi::api::core::v1::{Taint, Toleration};

use super::listed;
use crate::check::problem::{Finding, Problem};
use crate::check::snapshot::{Node, Snapshot, WEBHOOK, settings_of};

/// Taints that come and go with the state of a node, or that keep pods from nodes that are not ready yet.
const PASSING: [&str; 8] = [
    "node.kubernetes.io/",
    "node.cloudprovider.kubernetes.io/",
    "node.cilium.io/",
    "karpenter.sh/disrupt",
    "karpenter.sh/unregistered",
    "ToBeDeletedByClusterAutoscaler",
    "DeletionCandidateOfClusterAutoscaler",
    "aws-node-termination-handler/",
];

/// The spot nodes have the labels of the configured profile.
pub(super) fn profile(snapshot: &Snapshot) -> Vec<Finding> {
    let Some(configured) = configured(snapshot) else { return Vec::new() };
    let profile = configured.profile();
    let other = |node: &Node| profile.other_platform_of_spot_node(|key| node.label(key));
    let nodes = snapshot.nodes.as_deref().unwrap_or_default();
    let is_ours = |node: &Node| profile.of_node(|key| node.label(key)) == Some(Capacity::Spot) && other(node).is_none();
    let Some((likely, names)) = of_other(nodes, other).filter(|_| !nodes.iter().any(is_ours)) else {
        return Vec::new();
    };
    let text = format!(
        "The profile is {}, and the spot nodes have the labels of {likely}: {}.",
        configured.capacity_labels.profile,
        listed(&names)
    );
    let fix = format!("Set settings.capacityProfile to {likely}, and upgrade the release.");
    let object = format!("Nodes with the label {}", CapacityLabels::of(likely).label);
    vec![Finding::new(Problem::NodeProfile, object, text, fix)]
}

/// The platform of the first of these nodes, and its nodes.
fn of_other(nodes: &[Node], other: impl Fn(&Node) -> Option<CapacityProfile>) -> Option<(CapacityProfile, Vec<&str>)> {
    let likely = nodes.iter().find_map(&other)?;
    let names = nodes.iter().filter(|node| other(node) == Some(likely)).map(|node| node.name.as_str());
    Some((likely, names.collect()))
}

/// No node has a value of the capacity label that looks like a known one.
pub(super) fn values(snapshot: &Snapshot) -> Vec<Finding> {
    let Some(conventions) = configured(snapshot) else { return Vec::new() };
    let labels = &conventions.capacity_labels;
    let LabelValues::OneOf(spot) = &labels.spot_values else { return Vec::new() };
    let known = || spot.iter().chain(&labels.on_demand_values);
    let is_alike =
        |value: &&str| known().all(|known| known != value) && known().any(|known| known.eq_ignore_ascii_case(value));
    let nodes = snapshot.nodes.iter().flatten();
    let found: Vec<(&str, &str)> =
        nodes.filter_map(|node| Some((node.name.as_str(), node.label(&labels.label).filter(is_alike)?))).collect();
    let Some((_, value)) = found.first() else { return Vec::new() };
    let names: Vec<&str> = found.iter().map(|(name, _)| *name).collect();
    let text = format!(
        "The value {value:?} differs in case from a known one, so these nodes count as on-demand: {}.",
        listed(&names)
    );
    let fix = format!("Correct the label, or add {value} to settings.spotValues or settings.onDemandValues.");
    vec![Finding::new(Problem::NodeCapacity, format!("Nodes with the label {}", labels.label), text, fix)]
}

/// Every node that executors run on shows its capacity.
pub(super) fn unlabelled(snapshot: &Snapshot) -> Vec<Finding> {
    let Some(conventions) = configured(snapshot) else { return Vec::new() };
    let has_none = |node: &&Node| {
        snapshot.executor_nodes.contains(&node.name) && conventions.profile().of_node(|key| node.label(key)).is_none()
    };
    let nodes = snapshot.nodes.iter().flatten().filter(has_none);
    let names: Vec<&str> = nodes.map(|node| node.name.as_str()).collect();
    if names.is_empty() {
        return Vec::new();
    }
    let text = format!(
        "Executors run there and count as what they were sent to, because no label shows whether these are spot: {}.",
        listed(&names)
    );
    let label = &conventions.capacity_labels.label;
    let fix = format!("Give the nodes the label {label}, or set settings.capacityProfile to their platform.");
    vec![Finding::new(Problem::NodeUnlabelled, "Nodes of executors", text, fix)]
}

/// Executors tolerate the taints of some spot node.
pub(super) fn taints(snapshot: &Snapshot) -> Vec<Finding> {
    let Some(conventions) = configured(snapshot) else { return Vec::new() };
    let nodes: Vec<&Node> = spot_nodes(snapshot, &conventions).collect();
    let refused = |node: &&Node| -> Vec<String> {
        let taints = node.taints.iter().filter(|taint| repels(taint, &conventions, &snapshot.tolerations));
        taints.map(described).collect()
    };
    let refused: Vec<Vec<String>> = nodes.iter().map(refused).collect();
    // A node pool of others is no problem while nothing shows that executors should run on it: theirs may have no node now.
    let is_meant = |node: &Node, refused: &[String]| {
        snapshot.spot_is_pending
            || snapshot.executor_nodes.contains(&node.name)
            || node.taints.iter().any(|taint| is_of_spot(taint, &conventions) && refused.contains(&described(taint)))
    };
    if refused.iter().any(Vec::is_empty) || !nodes.iter().zip(&refused).any(|(node, refused)| is_meant(node, refused)) {
        return Vec::new();
    }
    let taints: BTreeSet<String> = refused.into_iter().flatten().collect();
    let taints: Vec<String> = taints.into_iter().collect();
    let text = format!("Executors do not tolerate the taints of any spot node: {}.", listed(&taints));
    let fix = "Add them to settings.spotTolerations, or to the template of the executors.";
    vec![Finding::new(Problem::NodeTaints, "Spot nodes", text, fix)]
}

/// Whether the taint keeps executors away. Without a live executor nobody knows what their template tolerates, so only the
/// taints of spot nodes count.
fn repels(taint: &Taint, conventions: &Conventions, tolerations: &[Toleration]) -> bool {
    let labels = &conventions.capacity_labels;
    let is_role = taint.key == conventions.workload_role_label
        && taint.value.as_deref().unwrap_or_default() == conventions.executor_role_value;
    if taint.effect == "PreferNoSchedule" || is_role || PASSING.iter().any(|prefix| taint.key.starts_with(prefix)) {
        return false;
    }
    let is_added = labels.spot_tolerations.iter().any(|added| {
        added.key == taint.key
            && added.effect == taint.effect
            && added.value.as_deref().is_none_or(|value| value == taint.value.as_deref().unwrap_or_default())
    });
    !is_added
        && !tolerations.iter().any(|toleration| tolerates(toleration, taint))
        && (!tolerations.is_empty() || is_of_spot(taint, conventions))
}

/// Whether a platform puts the taint on spot nodes.
fn is_of_spot(taint: &Taint, conventions: &Conventions) -> bool {
    let of_platforms = CapacityProfile::ALL.into_iter().map(CapacityLabels::of);
    taint.key == conventions.capacity_labels.label
        || of_platforms.into_iter().any(|platform| {
            platform.label == taint.key || platform.spot_tolerations.iter().any(|own| own.key == taint.key)
        })
}

/// By Kubernetes' definition.
fn tolerates(toleration: &Toleration, taint: &Taint) -> bool {
    let exists = toleration.operator.as_deref() == Some("Exists");
    let key = toleration.key.as_deref().unwrap_or_default();
    let effect = toleration.effect.as_deref().unwrap_or_default();
    (effect.is_empty() || effect == taint.effect)
        && (key == taint.key || (key.is_empty() && exists))
        && (exists || toleration.value.as_deref().unwrap_or_default() == taint.value.as_deref().unwrap_or_default())
}

fn described(taint: &Taint) -> String {
    match &taint.value {
        Some(value) => format!("{}={value}:{}", taint.key, taint.effect),
        None => format!("{}:{}", taint.key, taint.effect),
    }
}

/// If executors select nodes for executors, some spot node is one.
pub(super) fn role(snapshot: &Snapshot) -> Vec<Finding> {
    let Some(conventions) = configured(snapshot).filter(|conventions| conventions.node_role_selector) else {
        return Vec::new();
    };
    let (key, value) = (&conventions.workload_role_label, &conventions.executor_role_value);
    let nodes: Vec<&Node> = spot_nodes(snapshot, &conventions).collect();
    if nodes.is_empty() || nodes.iter().any(|node| node.label(key) == Some(value.as_str())) {
        return Vec::new();
    }
    let names: Vec<&str> = nodes.iter().map(|node| node.name.as_str()).collect();
    let text =
        format!("Executors select nodes with {key}={value}, and no spot node has that label: {}.", listed(&names));
    let fix =
        format!("Label the node pool of the executors with {key}={value}, or set settings.nodeRoleSelector to false.");
    vec![Finding::new(Problem::NodeRole, "Spot nodes", text, fix)]
}

fn spot_nodes<'s>(snapshot: &'s Snapshot, conventions: &'s Conventions) -> impl Iterator<Item = &'s Node> {
    let nodes = snapshot.nodes.iter().flatten();
    nodes.filter(|node| conventions.profile().of_node(|key| node.label(key)) == Some(Capacity::Spot))
}

/// The conventions of the installation; `None` if they are not known, and the nodes cannot be compared with them.
fn configured(snapshot: &Snapshot) -> Option<Conventions> {
    let webhook = snapshot.component(WEBHOOK)?;
    Some(settings_of(webhook).ok()?.conventions)
}
