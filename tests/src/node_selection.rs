//! Which nodes a pod may run on: nodeSelector, required node affinity and tolerations, written from Kubernetes'
//! documentation alone. Nothing of it comes from the programs under test.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1::{Node, NodeSelectorRequirement, NodeSelectorTerm, Pod, Taint, Toleration};
use kube::ResourceExt;

/// The names of the nodes that the pod may run on, if they have room.
pub fn nodes_for(pod: &Pod, nodes: &[Node]) -> BTreeSet<String> {
    nodes.iter().filter(|node| selects(pod, node) && tolerates(pod, node)).map(ResourceExt::name_any).collect()
}

/// Whether the pod's nodeSelector and required node affinity accept the node.
fn selects(pod: &Pod, node: &Node) -> bool {
    let Some(spec) = &pod.spec else { return true };
    let selected = spec.node_selector.iter().flatten().all(|(key, value)| node.labels().get(key) == Some(value));
    let affinity = spec.affinity.as_ref().and_then(|affinity| affinity.node_affinity.as_ref());
    let required = affinity.and_then(|own| own.required_during_scheduling_ignored_during_execution.as_ref());
    // One term is enough; without any, none is met.
    selected && required.is_none_or(|required| required.node_selector_terms.iter().any(|term| meets(node, term)))
}

/// All requirements of a term have to be met; a term without requirements matches nothing.
fn meets(node: &Node, term: &NodeSelectorTerm) -> bool {
    let labels = term.match_expressions.as_deref().unwrap_or_default();
    let fields = term.match_fields.as_deref().unwrap_or_default();
    let field = BTreeMap::from([("metadata.name".to_owned(), node.name_any())]);
    !(labels.is_empty() && fields.is_empty())
        && labels.iter().all(|requirement| is_met(requirement, node.labels()))
        && fields.iter().all(|requirement| is_met(requirement, &field))
}

fn is_met(requirement: &NodeSelectorRequirement, labels: &BTreeMap<String, String>) -> bool {
    let value = labels.get(&requirement.key);
    let values = requirement.values.as_deref().unwrap_or_default();
    let numbers = || {
        let [bound] = values else { return None };
        Some((value?.parse::<i64>().ok()?, bound.parse::<i64>().ok()?))
    };
    match requirement.operator.as_str() {
        "In" => value.is_some_and(|value| values.contains(value)),
        // Of a node without the label too.
        "NotIn" => !value.is_some_and(|value| values.contains(value)),
        "Exists" => value.is_some(),
        "DoesNotExist" => value.is_none(),
        "Gt" => numbers().is_some_and(|(value, bound)| value > bound),
        "Lt" => numbers().is_some_and(|(value, bound)| value < bound),
        _ => false,
    }
}

fn tolerates(pod: &Pod, node: &Node) -> bool {
    let tolerations = pod.spec.as_ref().and_then(|spec| spec.tolerations.as_deref()).unwrap_or_default();
    let taints = node.spec.as_ref().and_then(|spec| spec.taints.as_deref()).unwrap_or_default();
    let repels = |taint: &&Taint| matches!(taint.effect.as_str(), "NoSchedule" | "NoExecute");
    taints.iter().filter(repels).all(|taint| tolerations.iter().any(|toleration| accepts(toleration, taint)))
}

fn accepts(toleration: &Toleration, taint: &Taint) -> bool {
    let text = |text: &Option<String>| text.clone().unwrap_or_default();
    let (key, effect) = (text(&toleration.key), text(&toleration.effect));
    let exists = toleration.operator.as_deref() == Some("Exists");
    (effect.is_empty() || effect == taint.effect)
        && (key == taint.key || (key.is_empty() && exists))
        && (exists || text(&toleration.value) == text(&taint.value))
}

#[cfg(test)]
mod tests {
    use anyhow::Result;
    use serde_json::{Value, json};

    use super::*;

    fn node() -> Result<Node> {
        Ok(serde_json::from_value(json!({
            "metadata": {"name": "n", "labels": {"zone": "a", "generation": "5", "empty": ""}},
            "spec": {"taints": [
                {"key": "pool", "value": "x", "effect": "NoSchedule"},
                {"key": "soft", "value": "x", "effect": "PreferNoSchedule"},
            ]},
        }))?)
    }

    fn fits(spec: &Value) -> Result<bool> {
        let pod: Pod = serde_json::from_value(json!({"spec": spec}))?;
        Ok(!nodes_for(&pod, &[node()?]).is_empty())
    }

    fn with_terms(terms: &Value) -> Result<bool> {
        let required = json!({"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}});
        fits(&json!({
            "containers": [], "tolerations": [{"operator": "Exists"}], "affinity": {"nodeAffinity": required},
        }))
    }

    #[test]
    fn requirements_are_met_as_kubernetes_documents_it() -> Result<()> {
        for (key, operator, values, met) in [
            ("zone", "In", json!(["a", "b"]), true),
            ("zone", "In", json!(["b"]), false),
            ("gone", "In", json!(["a"]), false),
            ("zone", "NotIn", json!(["a"]), false),
            ("gone", "NotIn", json!(["a"]), true),
            ("empty", "Exists", Value::Null, true),
            ("gone", "Exists", Value::Null, false),
            ("empty", "DoesNotExist", Value::Null, false),
            ("gone", "DoesNotExist", Value::Null, true),
            ("generation", "Gt", json!(["4"]), true),
            ("generation", "Gt", json!(["5"]), false),
            ("generation", "Lt", json!(["6"]), true),
            ("zone", "Gt", json!(["4"]), false),
            ("gone", "Lt", json!(["4"]), false),
        ] {
            let requirement = json!({"key": key, "operator": operator, "values": values});
            assert_eq!(with_terms(&json!([{"matchExpressions": [requirement]}]))?, met, "{requirement}");
        }
        Ok(())
    }

    #[test]
    fn terms_are_alternatives_and_empty_ones_match_nothing() -> Result<()> {
        let is = |zone: &str| json!({"key": "zone", "operator": "In", "values": [zone]});
        let named = |name: &str| json!({"key": "metadata.name", "operator": "In", "values": [name]});
        for (terms, met) in [
            (json!([]), false),
            (json!([{}]), false),
            (json!([{}, {"matchExpressions": [is("a")]}]), true),
            (json!([{"matchExpressions": [is("b")]}, {"matchExpressions": [is("a")]}]), true),
            (json!([{"matchExpressions": [is("a"), is("b")]}]), false),
            (json!([{"matchFields": [named("n")]}]), true),
            (json!([{"matchFields": [named("n")], "matchExpressions": [is("b")]}]), false),
            (json!([{"matchFields": [named("m")]}]), false),
        ] {
            assert_eq!(with_terms(&terms)?, met, "{terms}");
        }
        Ok(())
    }

    #[test]
    fn taints_need_a_toleration_and_selectors_their_labels() -> Result<()> {
        for (tolerations, met) in [
            (json!([]), false),
            (json!([{"key": "pool", "operator": "Exists"}]), true),
            (json!([{"key": "pool", "value": "x", "effect": "NoSchedule"}]), true),
            (json!([{"key": "pool", "value": "y"}]), false),
            (json!([{"key": "pool", "value": "x", "effect": "NoExecute"}]), false),
        ] {
            assert_eq!(fits(&json!({"containers": [], "tolerations": tolerations}))?, met, "{tolerations}");
        }
        let tolerations = json!([{"operator": "Exists"}]);
        for (selector, met) in [(json!({"zone": "a"}), true), (json!({"zone": "a", "gone": "x"}), false)] {
            let spec = json!({"containers": [], "tolerations": tolerations, "nodeSelector": selector});
            assert_eq!(fits(&spec)?, met, "{selector}");
        }
        Ok(())
    }
}
