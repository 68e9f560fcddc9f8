//! What spot means on each platform, compared with an evaluator of node selectors that knows nothing of the code under test:
//! it takes pods and nodes as JSON, and follows the definition of Kubernetes (`nodeaffinity` of its component helpers).
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test fails by a panic")]

use std::collections::BTreeMap;

use balancer_core::Capacity::{OnDemand, Spot};
use balancer_core::{
    Capacity, CapacityLabels, CapacityProfile, Conventions, DriverCapacity, LabelValues, Patch, Pod, SpotPreference,
    Spread, Toleration,
};
use proptest::prelude::*;
use proptest::sample::select;
use serde_json::{Value, json};

type Labels = BTreeMap<String, String>;

/// A node: its name and its labels.
#[derive(Clone, Debug, PartialEq)]
struct Node {
    name: String,
    labels: Labels,
}

fn texts(list: &Value) -> Vec<&str> {
    list.as_array().map(|list| list.iter().map(|text| text.as_str().unwrap_or_default()).collect()).unwrap_or_default()
}

fn is_label_value(value: &str) -> bool {
    let ends = |text: &str| text.chars().all(|c| c.is_ascii_alphanumeric());
    value.is_empty()
        || (value.len() <= 63
            && ends(&value[..1])
            && ends(&value[value.len() - 1..])
            && value.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c)))
}

/// labels.NewRequirement and Requirement.Matches; `None` for an invalid requirement.
fn meets(requirement: &Value, labels: &Labels) -> Option<bool> {
    let key = requirement["key"].as_str().unwrap_or_default();
    let (values, label) = (texts(&requirement["values"]), labels.get(key));
    if key.is_empty() || !values.iter().all(|value| is_label_value(value)) {
        return None;
    }
    let number = || match values.as_slice() {
        [value] => value.parse::<i64>().ok(),
        _ => None,
    };
    match requirement["operator"].as_str().unwrap_or_default() {
        "In" if !values.is_empty() => Some(label.is_some_and(|label| values.contains(&label.as_str()))),
        "NotIn" if !values.is_empty() => Some(!label.is_some_and(|label| values.contains(&label.as_str()))),
        "Exists" if values.is_empty() => Some(label.is_some()),
        "DoesNotExist" if values.is_empty() => Some(label.is_none()),
        "Gt" => {
            number().map(|number| label.and_then(|label| label.parse::<i64>().ok()).is_some_and(|own| own > number))
        }
        "Lt" => {
            number().map(|number| label.and_then(|label| label.parse::<i64>().ok()).is_some_and(|own| own < number))
        }
        _ => None,
    }
}

/// The field selector; `None` for an invalid requirement.
fn meets_field(requirement: &Value, name: &str) -> Option<bool> {
    match (requirement["operator"].as_str().unwrap_or_default(), texts(&requirement["values"]).as_slice()) {
        ("In", [value]) => Some(*value == name),
        ("NotIn", [value]) => Some(*value != name),
        _ => None,
    }
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn matches_term(term: &Value, node: &Node) -> bool {
    let (expressions, fields) = (list(&term["matchExpressions"]), list(&term["matchFields"]));
    (!expressions.is_empty() || !fields.is_empty())
        && expressions.iter().all(|own| meets(own, &node.labels) == Some(true))
        && fields.iter().all(|own| meets_field(own, &node.name) == Some(true))
}

/// Whether kube-scheduler's required node affinity and nodeSelector let the pod run on the node.
fn matches(pod: &Value, node: &Node) -> bool {
    let selector = pod["spec"]["nodeSelector"].as_object();
    let selected = selector
        .into_iter()
        .flatten()
        .all(|(key, value)| node.labels.get(key).map(String::as_str) == Some(value.as_str().unwrap_or_default()));
    let required = &pod["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"];
    selected && (required.is_null() || list(&required["nodeSelectorTerms"]).iter().any(|term| matches_term(term, node)))
}

/// The keys and values that nodes have and pods mention: those of all platforms, one of the user, and the role.
const VOCABULARY: &[(&str, &[&str])] = &[
    ("karpenter.sh/capacity-type", &["spot", "on-demand", "reserved"]),
    ("karpenter.k8s.aws/capacity-reservation-interruptible", &["true", "false"]),
    ("eks.amazonaws.com/capacity-reservation-interruptible", &["true", "false"]),
    ("eks.amazonaws.com/capacityType", &["SPOT", "ON_DEMAND", "CAPACITY_BLOCK"]),
    ("cloud.google.com/gke-spot", &["true", "false"]),
    ("cloud.google.com/gke-preemptible", &["true"]),
    ("cloud.google.com/gke-provisioning", &["spot", "preemptible", "standard"]),
    ("kubernetes.azure.com/scalesetpriority", &["spot", "regular"]),
    ("kubernetes.azure.com/priority", &["spot", "regular"]),
    ("machine.openshift.io/interruptible-instance", &["", "5", "true"]),
    ("oci.oraclecloud.com/oke-is-preemptible", &["true"]),
    ("node.alibabacloud.com/spot-strategy", &["SpotAsPriceGo", "SpotWithPriceLimit", "NoSpot"]),
    ("spotinst.io/node-lifecycle", &["spot", "od"]),
    ("scheduling.cast.ai/spot", &["true", "false"]),
    ("scheduling.cast.ai/spot-fallback", &["true"]),
    ("example.com/lifecycle", &["Ec2Spot", "OnDemand", "6", "7"]),
    ("zone", &["a", "b"]),
    ("spark-role", &["executor", "driver"]),
];

/// A platform other than the configured one, whose nodes are in the same cluster.
fn other_platform(configured: &CapacityLabels) -> CapacityLabels {
    let eks = CapacityLabels::of(CapacityProfile::Eks);
    if configured.label == eks.label { CapacityLabels::of(CapacityProfile::Karpenter) } else { eks }
}

/// The keys and values that matter for a configuration, so that few cases are about something else.
fn words(labels: &CapacityLabels) -> Vec<(&'static str, &'static [&'static str])> {
    let group = |key: &str| match key.split_once('/') {
        // A label of Karpenter's nodes too.
        Some(("karpenter.k8s.aws", _) | (_, "capacity-reservation-interruptible")) => "karpenter.sh".to_owned(),
        Some((group, _)) => group.to_owned(),
        None => key.to_owned(),
    };
    let groups = [group(&labels.label), group(&other_platform(labels).label), "zone".into(), "spark-role".into()];
    VOCABULARY.iter().copied().filter(|(key, _)| groups.contains(&group(key))).collect()
}

fn node(words: Vec<(&'static str, &'static [&'static str])>) -> impl Strategy<Value = Node> {
    (select(vec!["n1", "n2"]), prop::collection::btree_map(select(words), any::<prop::sample::Index>(), 0..6)).prop_map(
        |(name, labels)| Node {
            name: name.to_owned(),
            labels: labels
                .into_iter()
                .map(|((key, values), at)| (key.to_owned(), (*at.get(values)).to_owned()))
                .collect(),
        },
    )
}

fn requirement(words: Vec<(&'static str, &'static [&'static str])>) -> impl Strategy<Value = Value> {
    let operators = vec!["In", "In", "In", "NotIn", "NotIn", "Exists", "DoesNotExist", "Gt", "Lt", "Near", ""];
    (select(words), select(operators), prop::collection::vec(any::<prop::sample::Index>(), 0..3), 0..12).prop_map(
        |((key, known), operator, values, odd)| {
            let mut values: Vec<Value> = values.iter().map(|at| json!(at.get(known))).collect();
            match (operator, odd) {
                // As it is, which may be incomplete.
                (_, 3) => {}
                ("Exists" | "DoesNotExist", 1..) => values.clear(),
                ("Gt" | "Lt", 1..) => values = vec![json!(["4", "6", "x"][odd as usize % 3])],
                (_, 0) => values.push(json!("not valid!")),
                (_, 1) => values.push(json!("other")),
                ("In" | "NotIn", _) if values.is_empty() => values.push(json!(known[0])),
                _ => {}
            }
            match (values.is_empty(), odd) {
                (true, 2) => json!({"key": key, "operator": operator, "values": null}),
                (true, _) => json!({"key": key, "operator": operator}),
                _ => json!({"key": key, "operator": operator, "values": values}),
            }
        },
    )
}

fn term(words: Vec<(&'static str, &'static [&'static str])>) -> impl Strategy<Value = Value> {
    let field = (select(vec!["In", "NotIn", "Exists"]), prop::collection::vec(select(vec!["n1", "n2"]), 0..3))
        .prop_map(|(operator, values)| json!({"key": "metadata.name", "operator": operator, "values": values}));
    let expressions = || prop::collection::vec(requirement(words.clone()), 0..4);
    prop_oneof![
        1 => Just(Value::Null),
        1 => Just(json!({})),
        1 => Just(json!({"matchExpressions": [], "matchFields": null})),
        1 => field.clone().prop_map(|field| json!({"matchFields": [field]})),
        1 => field.clone().prop_map(|field| json!({"matchExpressions": null, "matchFields": [field]})),
        2 => (expressions(), field).prop_map(|(own, field)| json!({"matchExpressions": own, "matchFields": [field]})),
        9 => expressions().prop_map(|own| json!({"matchExpressions": own})),
    ]
}

fn toleration() -> impl Strategy<Value = Value> {
    select(vec![
        json!({"operator": "Exists"}),
        json!({"key": "example.com/spot", "operator": "Exists"}),
        json!({"key": "example.com/spot", "value": "yes", "effect": "NoSchedule"}),
        json!({"key": "example.com/spot", "operator": "Equal", "value": "no", "effect": "NoSchedule"}),
        json!({"key": "node.kubernetes.io/not-ready", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 300}),
    ])
}

fn pod(words: Vec<(&'static str, &'static [&'static str])>) -> impl Strategy<Value = Value> {
    let selector = prop::collection::btree_map(select(words.clone()), any::<prop::sample::Index>(), 0..2);
    let terms = prop::collection::vec(term(words), 0..4);
    (
        prop::option::of(selector),
        prop::option::weighted(0.7, terms),
        prop::option::of(prop::collection::vec(toleration(), 0..3)),
        0..8,
    )
        .prop_map(|(selector, terms, tolerations, odd)| {
            let mut spec = json!({"containers": [{"name": "spark"}], "priority": 7});
            if let Some(selector) = selector {
                let pairs = selector.iter().map(|((key, values), at)| ((*key).to_owned(), json!(at.get(values))));
                spec["nodeSelector"] = Value::Object(pairs.collect());
            }
            if let Some(terms) = terms {
                let required = if odd == 0 { Value::Null } else { json!({"nodeSelectorTerms": terms}) };
                spec["affinity"] = json!({
                    "podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": []},
                    "nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": required},
                });
            } else if odd < 4 {
                spec["affinity"] = [
                    json!({}),
                    Value::Null,
                    json!({"nodeAffinity": null}),
                    json!({"nodeAffinity": {
                        "preferredDuringSchedulingIgnoredDuringExecution": [
                            {"weight": 1, "preference": {"matchExpressions": [{"key": "zone", "operator": "Exists"}]}},
                        ],
                    }}),
                ][odd as usize]
                    .clone();
            }
            if let Some(tolerations) = tolerations {
                spec["tolerations"] = json!(tolerations);
            }
            json!({"metadata": {"name": "p", "labels": {"spark-role": "executor"}}, "spec": spec})
        })
}

/// Each profile, and configurations of a user's own label.
fn configurations() -> Vec<CapacityLabels> {
    let own = |spot: LabelValues, on_demand: &[&str]| CapacityLabels {
        label: "example.com/lifecycle".into(),
        spot_values: spot,
        on_demand_values: on_demand.iter().map(|value| (*value).to_owned()).collect(),
        spot_tolerations: vec![
            Toleration { key: "example.com/spot".into(), value: Some("yes".into()), effect: "NoSchedule".into() },
            Toleration { key: "example.com/spot".into(), value: None, effect: "NoExecute".into() },
        ],
        ..CapacityLabels::of(CapacityProfile::Karpenter)
    };
    let one_of = |values: &[&str]| LabelValues::OneOf(values.iter().map(|value| (*value).to_owned()).collect());
    let reserved = CapacityLabels {
        on_demand_values: vec!["on-demand".into(), "reserved".into()],
        ..CapacityLabels::of(CapacityProfile::Karpenter)
    };
    let configured = [
        reserved,
        own(one_of(&["Ec2Spot"]), &["OnDemand"]),
        own(one_of(&["Ec2Spot", "6"]), &["OnDemand", "7"]),
        own(one_of(&["Ec2Spot", "6"]), &[]),
        own(LabelValues::Any, &[]),
    ];
    CapacityProfile::ALL.map(CapacityLabels::of).into_iter().chain(configured).collect()
}

fn conventions() -> impl Strategy<Value = Conventions> {
    (select(configurations()), any::<bool>(), any::<bool>(), any::<bool>()).prop_map(
        |(capacity_labels, strict, node_role_selector, annotated)| Conventions {
            capacity_labels,
            spot_preference: if strict { SpotPreference::Strict } else { SpotPreference::BestEffort },
            node_role_selector,
            decision_annotation: annotated.then(|| "workload/capacity-type".to_owned()),
            ..Conventions::default()
        },
    )
}

fn decoded(pod: &Value) -> Pod<'static> {
    serde_json::from_str::<Pod<'_>>(&pod.to_string()).unwrap().into_owned()
}

fn required(pod: &Value, conventions: &Conventions) -> Option<Capacity> {
    conventions.profile().required_capacity(&decoded(pod))
}

fn applied(pod: &Value, conventions: &Conventions, capacity: Capacity) -> Value {
    spread(pod, conventions, capacity, &Spread::default())
}

fn spread(pod: &Value, conventions: &Conventions, capacity: Capacity, spread: &Spread) -> Value {
    patched(pod, &conventions.profile().apply(&decoded(pod), capacity, None, spread))
}

fn patched(pod: &Value, patch: &Patch) -> Value {
    let patch: json_patch::Patch = serde_json::from_slice(patch.as_json()).unwrap();
    let mut after = pod.clone();
    json_patch::patch(&mut after, &patch).unwrap();
    after
}

/// The pod as a driver that is pinned to on-demand.
fn pinned(pod: &Value, conventions: &Conventions) -> Value {
    let conventions = Conventions { driver_capacity: DriverCapacity::OnDemand, ..conventions.clone() };
    patched(pod, &conventions.profile().apply_to_driver(&decoded(pod)))
}

/// Whether a request for the capacity reaches the node, by the configured values.
fn is_requested(node: &Node, labels: &CapacityLabels, capacity: Capacity) -> bool {
    let value = node.labels.get(&labels.label);
    let is_spot = match &labels.spot_values {
        LabelValues::Any => value.is_some(),
        LabelValues::OneOf(values) => value.is_some_and(|value| values.contains(value)),
    };
    let excluded = [
        ("karpenter.sh/capacity-type", "karpenter.k8s.aws/capacity-reservation-interruptible", "true"),
        ("karpenter.sh/capacity-type", "eks.amazonaws.com/capacity-reservation-interruptible", "true"),
        ("cloud.google.com/gke-spot", "cloud.google.com/gke-preemptible", "true"),
        ("kubernetes.azure.com/scalesetpriority", "kubernetes.azure.com/priority", "spot"),
    ];
    let is_excluded = excluded
        .iter()
        .any(|(label, other, value)| labels.label == *label && node.labels.get(*other).is_some_and(|own| own == value));
    match (capacity, labels.on_demand_values.as_slice()) {
        (Spot, _) => is_spot,
        (OnDemand, []) => !is_spot && !is_excluded,
        (OnDemand, [only]) => value == Some(only),
        (OnDemand, values) => value.is_some_and(|value| values.contains(value)) && !is_excluded,
    }
}

/// Whether nodes have no other values of this label than those of the vocabulary.
fn is_known(label: &str) -> bool {
    let known =
        ["cloud.google.com/gke-spot", "kubernetes.azure.com/scalesetpriority", "node.alibabacloud.com/spot-strategy"];
    known.contains(&label)
}

/// The nodes that requests reach on each platform, with the labels that such nodes really have.
fn typical_nodes(labels: &CapacityLabels, capacity: Capacity) -> Vec<Labels> {
    let others: &[(&str, &str, &str)] = match labels.label.as_str() {
        "cloud.google.com/gke-spot" => &[("cloud.google.com/gke-provisioning", "spot", "standard")],
        "kubernetes.azure.com/scalesetpriority" => &[("kubernetes.azure.com/priority", "spot", "regular")],
        _ => &[],
    };
    let (_, values) = VOCABULARY.iter().find(|(key, _)| *key == labels.label).unwrap();
    // Of some labels all values are known.
    let unknown: &[&str] = if is_known(&labels.label) { &[] } else { &["other", "3", "5", "8"] };
    let values = values.iter().chain(unknown).map(|value| Some(*value)).chain([None]);
    values
        .map(|value| {
            let mut node: Labels = value.map(|value| (labels.label.clone(), value.to_owned())).into_iter().collect();
            for (key, spot, on_demand) in others {
                let value = if capacity == Spot { spot } else { on_demand };
                node.insert((*key).to_owned(), (*value).to_owned());
            }
            node
        })
        .filter(|labels_of_node| {
            let node = Node { name: "n1".into(), labels: labels_of_node.clone() };
            is_requested(&node, labels, capacity)
        })
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4_000))]

    #[test]
    fn a_patch_leaves_the_pods_own_nodes_of_the_capacity_and_no_others(
        (conventions, pod, nodes) in conventions().prop_flat_map(|conventions| {
            let words = words(&conventions.capacity_labels);
            (Just(conventions), pod(words.clone()), prop::collection::vec(node(words), 1..24))
        }),
        capacity in select(vec![Spot, OnDemand]),
    ) {
        let labels = &conventions.capacity_labels;
        let decides_itself = required(&pod, &conventions).is_some();
        let after = applied(&pod, &conventions, capacity);
        let is_required = !decides_itself && (capacity == OnDemand || conventions.spot_preference == SpotPreference::Strict);
        let has_role = !pod["spec"]["nodeSelector"]["spark-role"].is_null();
        for node in &nodes {
            let in_role = !is_required || !conventions.node_role_selector || has_role
                || node.labels.get("spark-role").is_some_and(|role| role == "executor");
            let requested = !is_required || (is_requested(node, labels, capacity) && in_role);
            prop_assert_eq!(matches(&after, node), matches(&pod, node) && requested, "{} {}", node.name, after);
        }
        // Nothing else is changed.
        let mut undone = after.clone();
        for (parent, field) in [("spec", "nodeSelector"), ("spec", "affinity"), ("spec", "tolerations"), ("metadata", "annotations")] {
            let parent_after = undone[parent].as_object_mut().unwrap();
            match pod[parent].get(field) {
                Some(own) => drop(parent_after.insert(field.to_owned(), own.clone())),
                None => drop(parent_after.remove(field)),
            }
        }
        prop_assert_eq!(&undone, &pod);
        if after["spec"]["affinity"] != pod["spec"]["affinity"] {
            prop_assert_eq!(&after["spec"]["affinity"]["podAntiAffinity"], &pod["spec"]["affinity"]["podAntiAffinity"]);
        }
        let own = list(&pod["spec"]["tolerations"]);
        prop_assert_eq!(&list(&after["spec"]["tolerations"])[..own.len()], own);
        if decides_itself {
            prop_assert_eq!(&after["spec"], &pod["spec"]);
        }
        // On reinvocation.
        let expected = required(&pod, &conventions).unwrap_or(capacity);
        prop_assert_eq!(required(&after, &conventions).unwrap_or(capacity), expected);
        prop_assert_eq!(applied(&after, &conventions, capacity), after);
        if !decides_itself {
            let pinned = pinned(&pod, &conventions);
            for node in &nodes {
                let requested = is_requested(node, labels, OnDemand);
                prop_assert_eq!(matches(&pinned, node), matches(&pod, node) && requested, "{} {}", node.name, pinned);
            }
            prop_assert_eq!(self::pinned(&pinned, &conventions), pinned);
        }
    }

    #[test]
    fn a_spread_is_added_to_what_the_pod_has_and_replaced_in_a_later_call(
        (conventions, pod) in conventions().prop_flat_map(|conventions| {
            let words = words(&conventions.capacity_labels);
            (Just(conventions), with_constraints(pod(words)))
        }),
        (first, second) in (placement(), placement()),
        knows_min_domains: bool,
    ) {
        let own_capacity = required(&pod, &conventions);
        let place = |pod: &Value, (capacity, wanted): &(Capacity, Spread)| {
            spread(pod, &conventions, own_capacity.unwrap_or(*capacity), wanted)
        };
        let mut after = place(&pod, &first);
        // The apiserver refuses two constraints with the same key and the same answer to a node that breaks them.
        let mut pairs: Vec<_> = constraints(&after).iter().map(|own| (&own["topologyKey"], &own["whenUnsatisfiable"])).collect();
        let all = pairs.len();
        pairs.sort_by_key(|pair| format!("{pair:?}"));
        pairs.dedup();
        prop_assert_eq!(pairs.len(), all, "{}", after);
        prop_assert!(constraints(&after).starts_with(constraints(&pod)) && preferred(&after).starts_with(preferred(&pod)));
        prop_assert_eq!(place(&after, &first), after.clone());
        if own_capacity.is_some() || conventions.decision_annotation.is_none() {
            return Ok(());
        }
        if !knows_min_domains {
            forget_min_domains(&mut after);
            prop_assert_eq!(place(&after, &first), after.clone());
        }
        let (moved, direct) = (place(&after, &second), place(&pod, &second));
        let sorted = |terms: &[Value]| {
            let mut terms: Vec<_> = terms.iter().map(Value::to_string).collect();
            terms.sort();
            terms
        };
        let mut expected = direct.clone();
        // What need not change is left as it is.
        if constraints(&moved) == constraints(&after) && !knows_min_domains {
            forget_min_domains(&mut expected);
        }
        prop_assert_eq!(constraints(&moved), constraints(&expected), "{}", after);
        prop_assert_eq!(sorted(preferred(&moved)), sorted(preferred(&direct)), "{}", after);
        let withdrawn = patched(&after, &conventions.profile().withdraw(&decoded(&after)));
        prop_assert_eq!(constraints(&withdrawn), constraints(&pod));
        prop_assert_eq!(preferred(&withdrawn), preferred(&pod));
    }

    #[test]
    fn a_pod_requires_the_capacity_of_the_nodes_that_it_can_run_on(
        (conventions, pod) in conventions().prop_flat_map(|conventions| {
            let words = words(&conventions.capacity_labels);
            let words = words.into_iter().filter(|(key, _)| *key != "zone" && *key != "spark-role").collect::<Vec<_>>();
            (Just(conventions), pod(words))
        }),
    ) {
        let labels = &conventions.capacity_labels;
        let other = other_platform(labels);
        // Most nodes have the labels of one platform, and some those of two. Names do not matter.
        let runs_on = |nodes: Vec<Labels>| {
            ["n1", "n2", "n3"].iter().any(|name| {
                nodes.iter().any(|labels| matches(&pod, &Node { name: (*name).to_owned(), labels: labels.clone() }))
            })
        };
        let runs_on_ours = |capacity| {
            let others: Vec<_> = typical_nodes(&other, capacity).into_iter().chain([Labels::new()]).collect();
            let with_both = |node: Labels| others.iter().map(move |other| node.clone().into_iter().chain(other.clone()).collect());
            runs_on(typical_nodes(labels, capacity).into_iter().flat_map(with_both).collect())
        };
        let runs_on_others = |capacity| runs_on(typical_nodes(&other, capacity));
        let required = required(&pod, &conventions);
        match (runs_on_ours(Spot), runs_on_ours(OnDemand)) {
            (true, true) => prop_assert_eq!(required, None),
            (true, false) => prop_assert_eq!(required, Some(Spot)),
            (false, true) => prop_assert_eq!(required, Some(OnDemand)),
            // No request of ours would reach a node.
            (false, false) => match (runs_on_others(Spot), runs_on_others(OnDemand)) {
                (true, false) => prop_assert_eq!(required, Some(Spot)),
                (_, true) => prop_assert_eq!(required, Some(OnDemand)),
                (false, false) => prop_assert!(required.is_some()),
            },
        }
    }
}

fn constraints(pod: &Value) -> &[Value] {
    list(&pod["spec"]["topologySpreadConstraints"])
}

fn preferred(pod: &Value) -> &[Value] {
    list(&pod["spec"]["affinity"]["nodeAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"])
}

/// As an apiserver before Kubernetes 1.27 does.
fn forget_min_domains(pod: &mut Value) {
    for constraint in pod["spec"]["topologySpreadConstraints"].as_array_mut().into_iter().flatten() {
        constraint.as_object_mut().unwrap().remove("minDomains");
    }
}

/// The pod as one of a job, with constraints of its own.
fn with_constraints(pod: impl Strategy<Value = Value>) -> impl Strategy<Value = Value> {
    let own = |key: &str, unsatisfiable: &str| {
        json!({
            "topologyKey": key, "whenUnsatisfiable": unsatisfiable, "maxSkew": 1,
            "labelSelector": {"matchLabels": {"spark-role": "executor"}},
        })
    };
    let all = vec![
        own("kubernetes.io/hostname", "DoNotSchedule"),
        own("kubernetes.io/hostname", "ScheduleAnyway"),
        own("topology.kubernetes.io/zone", "DoNotSchedule"),
    ];
    let lists = prop_oneof![
        2 => Just(None),
        1 => Just(Some(Value::Null)),
        4 => prop::sample::subsequence(all, 0..=3).prop_map(|list| Some(list.into())),
    ];
    (pod, lists).prop_map(|(mut pod, list)| {
        pod["metadata"]["labels"]["spark-app-selector"] = json!("job");
        if let Some(list) = list {
            pod["spec"]["topologySpreadConstraints"] = list;
        }
        pod
    })
}

fn placement() -> impl Strategy<Value = (Capacity, Spread)> {
    let types = vec!["m5.large".to_owned(), "r5.xlarge".to_owned(), "c6g.2xlarge".to_owned()];
    let limit = select(vec![None, Some(0), Some(1), Some(3)]);
    (select(vec![Spot, Spot, OnDemand]), limit, prop::sample::subsequence(types, 0..=3))
        .prop_map(|(capacity, max_executors_per_node, avoid)| (capacity, Spread { max_executors_per_node, avoid }))
}

fn profile(profile: CapacityProfile) -> Conventions {
    Conventions {
        capacity_labels: CapacityLabels::of(profile),
        spot_preference: SpotPreference::Strict,
        node_role_selector: false,
        ..Conventions::default()
    }
}

/// An executor with this spec.
fn with_spec(spec: Value) -> Value {
    json!({"metadata": {"name": "p", "labels": {"spark-role": "executor"}}, "spec": spec})
}

fn with_terms(terms: Value) -> Value {
    let required = json!({"nodeSelectorTerms": terms});
    with_spec(json!({"affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": required}}}))
}

fn is(key: &str, operator: &str, values: &[&str]) -> Value {
    if values.is_empty() {
        return json!({"key": key, "operator": operator});
    }
    json!({"key": key, "operator": operator, "values": values})
}

fn one_term(requirements: &[Value]) -> Value {
    with_terms(json!([{"matchExpressions": requirements}]))
}

const KARPENTER: &str = "karpenter.sh/capacity-type";
const EKS: &str = "eks.amazonaws.com/capacityType";

#[test]
fn a_node_is_recognised_by_the_configured_profile_and_then_by_the_others() {
    use CapacityProfile::{Aks, CastAi, Gke, Karpenter, Openshift};
    type Case = (CapacityProfile, &'static [(&'static str, &'static str)], Option<Capacity>);
    let cases: &[Case] = &[
        (Karpenter, &[(KARPENTER, "spot")], Some(Spot)),
        (Karpenter, &[(KARPENTER, "on-demand")], Some(OnDemand)),
        (Karpenter, &[(KARPENTER, "reserved")], Some(OnDemand)),
        (
            Karpenter,
            &[(KARPENTER, "reserved"), ("karpenter.k8s.aws/capacity-reservation-interruptible", "true")],
            Some(Spot),
        ),
        (
            Karpenter,
            &[(KARPENTER, "reserved"), ("karpenter.k8s.aws/capacity-reservation-interruptible", "false")],
            Some(OnDemand),
        ),
        (Karpenter, &[], None),
        (Karpenter, &[("kubernetes.io/arch", "arm64")], None),
        (Karpenter, &[(EKS, "SPOT")], Some(Spot)),
        (Karpenter, &[(EKS, "ON_DEMAND")], Some(OnDemand)),
        (Karpenter, &[(EKS, "CAPACITY_BLOCK")], Some(OnDemand)),
        (Karpenter, &[(EKS, "spot")], Some(OnDemand)),
        (Karpenter, &[("cloud.google.com/gke-spot", "true")], Some(Spot)),
        (Karpenter, &[("cloud.google.com/gke-preemptible", "true")], Some(Spot)),
        (Karpenter, &[("cloud.google.com/gke-provisioning", "standard")], Some(OnDemand)),
        (Karpenter, &[("kubernetes.azure.com/priority", "regular")], Some(OnDemand)),
        (Karpenter, &[("machine.openshift.io/interruptible-instance", "")], Some(Spot)),
        (Karpenter, &[("oci.oraclecloud.com/oke-is-preemptible", "true")], Some(Spot)),
        (Karpenter, &[("node.alibabacloud.com/spot-strategy", "SpotWithPriceLimit")], Some(Spot)),
        (Karpenter, &[("node.alibabacloud.com/spot-strategy", "NoSpot")], Some(OnDemand)),
        (Karpenter, &[("spotinst.io/node-lifecycle", "od")], Some(OnDemand)),
        (Karpenter, &[("scheduling.cast.ai/spot", "true")], Some(Spot)),
        // The configured label comes first.
        (Karpenter, &[(KARPENTER, "on-demand"), (EKS, "SPOT")], Some(OnDemand)),
        (CapacityProfile::Eks, &[(KARPENTER, "on-demand"), (EKS, "SPOT")], Some(Spot)),
        (CastAi, &[("scheduling.cast.ai/spot", "true"), ("scheduling.cast.ai/spot-fallback", "true")], Some(OnDemand)),
        // Nodes without labels are on-demand where that is what they mean.
        (Gke, &[], Some(OnDemand)),
        (Gke, &[("cloud.google.com/gke-provisioning", "preemptible")], Some(Spot)),
        (Gke, &[(KARPENTER, "spot")], Some(Spot)),
        (Aks, &[("kubernetes.azure.com/scalesetpriority", "regular"), (KARPENTER, "on-demand")], Some(OnDemand)),
        (Aks, &[("kubernetes.azure.com/priority", "spot")], Some(Spot)),
        (Openshift, &[], Some(OnDemand)),
        (Openshift, &[(EKS, "SPOT")], Some(Spot)),
    ];
    for (name, labels, capacity) in cases {
        let label = |key: &str| labels.iter().find(|(own, _)| *own == key).map(|(_, value)| *value);
        assert_eq!(profile(*name).profile().of_node(label), *capacity, "{name} {labels:?}");
    }
}

#[test]
fn a_spot_node_of_another_platform_is_told_from_those_of_the_configured_one() {
    let other = |labels: &[(&str, &str)], profile_of: CapacityProfile| {
        let conventions = profile(profile_of);
        let label = |key: &str| labels.iter().find(|(own, _)| *own == key).map(|(_, value)| *value);
        conventions.profile().other_platform_of_spot_node(label)
    };
    let gke = [("cloud.google.com/gke-spot", "true")];
    assert_eq!(other(&gke, CapacityProfile::Karpenter), Some(CapacityProfile::Gke));
    assert_eq!(other(&gke, CapacityProfile::Gke), None);
    assert_eq!(other(&[(KARPENTER, "on-demand"), gke[0]], CapacityProfile::Karpenter), None);
    assert_eq!(other(&[("eks.amazonaws.com/capacityType", "ON_DEMAND")], CapacityProfile::Karpenter), None);
    assert_eq!(other(&[], CapacityProfile::Karpenter), None);
}

#[test]
fn a_label_of_ones_own_has_none_of_the_profiles_further_labels() {
    let mut conventions = profile(CapacityProfile::Aks);
    conventions.capacity_labels.label = "example.com/lifecycle".into();
    let after = applied(&with_spec(json!({})), &conventions, OnDemand);
    let terms = json!([{"matchExpressions": [is("example.com/lifecycle", "NotIn", &["spot"])]}]);
    assert_eq!(after["spec"], with_terms(terms)["spec"]);
    // The profile's own nodes are recognised nevertheless.
    let label = |key: &str| (key == "kubernetes.azure.com/priority").then_some("spot");
    assert_eq!(conventions.profile().of_node(label), Some(Spot));
}

#[test]
fn a_pod_can_require_a_capacity_by_the_labels_of_any_platform() {
    let (gke, gke_type) = ("cloud.google.com/gke-spot", "cloud.google.com/gke-provisioning");
    let (preemptible, fallback) = ("cloud.google.com/gke-preemptible", "scheduling.cast.ai/spot-fallback");
    let interruptible = "karpenter.k8s.aws/capacity-reservation-interruptible";
    let (priority, ack) = ("kubernetes.azure.com/priority", "node.alibabacloud.com/spot-strategy");
    let selects = |key: &str, value: &str| with_spec(json!({"nodeSelector": {key: value}}));
    let cases = [
        (selects(EKS, "SPOT"), Some(Spot)),
        (selects(EKS, "ON_DEMAND"), Some(OnDemand)),
        (selects(EKS, "CAPACITY_BLOCK"), Some(OnDemand)),
        (one_term(&[is(EKS, "In", &["SPOT", "ON_DEMAND"])]), None),
        (selects(gke, "true"), Some(Spot)),
        (one_term(&[is(gke_type, "In", &["standard"])]), Some(OnDemand)),
        (one_term(&[is(gke_type, "In", &["spot", "preemptible"])]), Some(Spot)),
        // Preemptible nodes are spot, but a request for spot does not reach them.
        (selects(preemptible, "true"), Some(Spot)),
        (one_term(&[is(gke_type, "In", &["preemptible"])]), Some(Spot)),
        (one_term(&[is(preemptible, "DoesNotExist", &[])]), None),
        (
            with_terms(json!([
                {"matchExpressions": [is(preemptible, "In", &["true"])]}, {"matchExpressions": [is(EKS, "In", &["ON_DEMAND"])]},
            ])),
            Some(OnDemand),
        ),
        (one_term(&[is(priority, "In", &["spot"])]), Some(Spot)),
        (selects("machine.openshift.io/interruptible-instance", ""), Some(Spot)),
        (one_term(&[is("machine.openshift.io/interruptible-instance", "Exists", &[])]), Some(Spot)),
        (one_term(&[is("node.alibabacloud.com/spot-strategy", "In", &["NoSpot", "SpotAsPriceGo"])]), None),
        (one_term(&[is("node.alibabacloud.com/spot-strategy", "In", &["NoSpot"])]), Some(OnDemand)),
        // There is no other value that is not spot.
        (one_term(&[is(ack, "Exists", &[]), is(ack, "NotIn", &["NoSpot"])]), Some(Spot)),
        (one_term(&[is(ack, "Exists", &[])]), None),
        (selects("scheduling.cast.ai/spot", "true"), Some(Spot)),
        (one_term(&[is(fallback, "DoesNotExist", &[])]), None),
        (selects(fallback, "true"), Some(OnDemand)),
        (one_term(&[is("scheduling.cast.ai/spot", "Exists", &[]), is(fallback, "Exists", &[])]), Some(OnDemand)),
        (selects(KARPENTER, "reserved"), Some(OnDemand)),
        (one_term(&[is(interruptible, "NotIn", &["true"])]), None),
        (selects(interruptible, "true"), Some(Spot)),
        (one_term(&[is(KARPENTER, "In", &["reserved"]), is(interruptible, "In", &["true"])]), Some(Spot)),
        // Both platforms must permit it.
        (one_term(&[is(EKS, "In", &["SPOT"]), is(KARPENTER, "In", &["on-demand"])]), Some(OnDemand)),
        (selects("kubernetes.io/arch", "arm64"), None),
        (with_terms(json!([])), Some(OnDemand)),
        (with_terms(json!([null, {}])), Some(OnDemand)),
        (with_terms(Value::Null), Some(OnDemand)),
    ];
    for name in [CapacityProfile::Karpenter, CapacityProfile::Gke, CapacityProfile::Ocean] {
        for (pod, capacity) in &cases {
            assert_eq!(required(pod, &profile(name)), *capacity, "{name} {pod}");
        }
    }
}

#[test]
fn a_pod_that_only_excludes_nodes_of_another_platform_may_run_on_both_capacities_of_ours() {
    use CapacityProfile::{Aks, Eks, Gke, Karpenter};
    let (gke, gke_type) = ("cloud.google.com/gke-spot", "cloud.google.com/gke-provisioning");
    let (aks, priority) = ("kubernetes.azure.com/scalesetpriority", "kubernetes.azure.com/priority");
    let (not_in, absent) = (|key, value| is(key, "NotIn", &[value]), |key| is(key, "DoesNotExist", &[]));
    for (configured, requirements, capacity) in [
        (Karpenter, vec![not_in(EKS, "SPOT")], None),
        (Karpenter, vec![not_in(EKS, "ON_DEMAND")], None),
        (Karpenter, vec![absent(gke)], None),
        (Karpenter, vec![not_in(gke_type, "standard")], None),
        (Karpenter, vec![not_in(EKS, "SPOT"), not_in(gke, "true"), not_in(priority, "spot")], None),
        (Aks, vec![not_in(KARPENTER, "spot")], None),
        (Eks, vec![not_in(EKS, "SPOT")], Some(OnDemand)),
        (Gke, vec![absent(gke)], Some(OnDemand)),
        (Gke, vec![not_in(gke_type, "standard")], Some(Spot)),
        (Gke, vec![not_in(gke_type, "spot")], Some(OnDemand)),
        (Aks, vec![not_in(priority, "spot")], Some(OnDemand)),
        (Aks, vec![not_in(priority, "regular")], Some(Spot)),
        // A node of ours does not have the label that they exclude.
        (Karpenter, vec![is(KARPENTER, "In", &["spot"]), not_in(EKS, "SPOT")], Some(Spot)),
        (Karpenter, vec![is(KARPENTER, "In", &["spot"]), absent(gke)], Some(Spot)),
        (Karpenter, vec![not_in(KARPENTER, "spot"), not_in(EKS, "SPOT")], Some(OnDemand)),
        // A node of the other platform does not have ours.
        (Karpenter, vec![is(EKS, "In", &["SPOT"]), absent(KARPENTER)], Some(Spot)),
        (Karpenter, vec![is(EKS, "In", &["ON_DEMAND"]), absent(KARPENTER)], Some(OnDemand)),
        (Gke, vec![is(EKS, "In", &["SPOT"]), absent(gke)], Some(Spot)),
        (Karpenter, vec![not_in(EKS, "ON_DEMAND"), absent(KARPENTER)], Some(Spot)),
        // They are on both capacities, but our requests could not be met.
        (Karpenter, vec![is(EKS, "Exists", &[]), absent(KARPENTER)], Some(OnDemand)),
        // Nodes with the labels of both, as those of Azure's node auto provisioning.
        (Karpenter, vec![is(KARPENTER, "In", &["spot"]), is(aks, "In", &["spot"])], Some(Spot)),
        (Karpenter, vec![is(aks, "In", &["regular"])], Some(OnDemand)),
        (Aks, vec![is(KARPENTER, "In", &["on-demand"]), not_in(aks, "spot")], Some(OnDemand)),
    ] {
        assert_eq!(required(&one_term(&requirements), &profile(configured)), capacity, "{configured} {requirements:?}");
    }
}

#[test]
fn reserved_capacity_is_on_demand_if_it_is_configured() {
    let mut conventions = profile(CapacityProfile::Karpenter);
    conventions.capacity_labels.on_demand_values.push("reserved".into());
    assert_eq!(required(&one_term(&[is(KARPENTER, "In", &["spot", "reserved"])]), &conventions), None);
    let after = applied(&with_spec(json!({})), &conventions, OnDemand);
    let interruptible = |group: &str| is(&format!("{group}/capacity-reservation-interruptible"), "NotIn", &["true"]);
    let [karpenter, auto_mode] = ["karpenter.k8s.aws", "eks.amazonaws.com"].map(interruptible);
    let required = one_term(&[is(KARPENTER, "In", &["on-demand", "reserved"]), karpenter, auto_mode]);
    assert_eq!(after["spec"], required["spec"]);
}

#[test]
fn each_platform_is_requested_by_its_own_labels() {
    use CapacityProfile::{Ack, Aks, CastAi, Eks, Gke, Karpenter, Ocean, Oke, Openshift};
    let selects = |key: &str, value: &str| json!({"nodeSelector": {key: value}});
    let tolerates = |mut spec: Value, toleration: Value| {
        spec["tolerations"] = json!([toleration]);
        spec
    };
    let expressions = |requirements: &[Value]| one_term(requirements)["spec"].clone();
    let (gke, aks) = ("cloud.google.com/gke-spot", "kubernetes.azure.com/scalesetpriority");
    let (oke, ack) = ("oci.oraclecloud.com/oke-is-preemptible", "node.alibabacloud.com/spot-strategy");
    let (openshift, ocean) = ("machine.openshift.io/interruptible-instance", "spotinst.io/node-lifecycle");
    let cast = "scheduling.cast.ai/spot";
    let equal =
        |key: &str, value: &str| json!({"key": key, "operator": "Equal", "value": value, "effect": "NoSchedule"});
    let exists = |key: &str| json!({"key": key, "operator": "Exists", "effect": "NoSchedule"});
    let strategies = ["SpotAsPriceGo", "SpotWithPriceLimit"];
    for (name, spot, on_demand) in [
        (Karpenter, selects(KARPENTER, "spot"), selects(KARPENTER, "on-demand")),
        (Eks, selects(EKS, "SPOT"), selects(EKS, "ON_DEMAND")),
        (
            Gke,
            tolerates(selects(gke, "true"), equal(gke, "true")),
            expressions(&[is(gke, "NotIn", &["true"]), is("cloud.google.com/gke-preemptible", "NotIn", &["true"])]),
        ),
        (
            Aks,
            tolerates(selects(aks, "spot"), equal(aks, "spot")),
            expressions(&[is(aks, "NotIn", &["spot"]), is("kubernetes.azure.com/priority", "NotIn", &["spot"])]),
        ),
        (Openshift, expressions(&[is(openshift, "Exists", &[])]), expressions(&[is(openshift, "DoesNotExist", &[])])),
        (Oke, tolerates(selects(oke, "true"), exists(oke)), expressions(&[is(oke, "NotIn", &["true"])])),
        (Ack, expressions(&[is(ack, "In", &strategies)]), expressions(&[is(ack, "NotIn", &strategies)])),
        (Ocean, selects(ocean, "spot"), selects(ocean, "od")),
        (CastAi, tolerates(selects(cast, "true"), exists(cast)), expressions(&[is(cast, "NotIn", &["true"])])),
    ] {
        let pod = with_spec(json!({}));
        assert_eq!(applied(&pod, &profile(name), Spot)["spec"], spot, "{name}");
        assert_eq!(applied(&pod, &profile(name), OnDemand)["spec"], on_demand, "{name}");
        let best_effort = Conventions { spot_preference: SpotPreference::BestEffort, ..profile(name) };
        let preferred = &applied(&pod, &best_effort, Spot)["spec"];
        let terms = &preferred["affinity"]["nodeAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"];
        assert_eq!((terms[0]["weight"].as_i64(), list(terms).len()), (Some(100), 1), "{name}");
        assert_eq!(
            (&preferred["tolerations"], &preferred["nodeSelector"]),
            (&spot["tolerations"], &Value::Null),
            "{name}"
        );
    }
}

#[test]
fn the_patch_of_the_default_settings_is_the_originals() {
    let patch = |preference, capacity| {
        let conventions = Conventions { spot_preference: preference, ..Conventions::default() };
        let pod = decoded(&with_spec(json!({})));
        let patch = conventions.profile().apply(&pod, capacity, None, &Spread::default());
        String::from_utf8(patch.as_json().to_vec()).unwrap()
    };
    let selected = |capacity: &str| {
        format!(
            concat!(
                r#"[{{"op":"add","path":"/spec/nodeSelector","value":{{}}}},"#,
                r#"{{"op":"add","path":"/spec/nodeSelector/karpenter.sh~1capacity-type","value":"{0}"}},"#,
                r#"{{"op":"add","path":"/spec/nodeSelector/spark-role","value":"executor"}},"#,
                r#"{{"op":"add","path":"/metadata/annotations","value":{{}}}},"#,
                r#"{{"op":"add","path":"/metadata/annotations/workload~1capacity-type","value":"{0}"}}]"#,
            ),
            capacity
        )
    };
    assert_eq!(patch(SpotPreference::Strict, Spot), selected("spot"));
    assert_eq!(patch(SpotPreference::Strict, OnDemand), selected("on-demand"));
    assert_eq!(patch(SpotPreference::BestEffort, OnDemand), selected("on-demand"));
    assert_eq!(
        patch(SpotPreference::BestEffort, Spot),
        concat!(
            r#"[{"op":"add","path":"/spec/affinity","value":{"nodeAffinity":"#,
            r#"{"preferredDuringSchedulingIgnoredDuringExecution":[{"preference":{"matchExpressions":"#,
            r#"[{"key":"karpenter.sh/capacity-type","operator":"In","values":["spot"]}]},"weight":100}]}}},"#,
            r#"{"op":"add","path":"/metadata/annotations","value":{}},"#,
            r#"{"op":"add","path":"/metadata/annotations/workload~1capacity-type","value":"spot"}]"#,
        )
    );
}

#[test]
fn a_toleration_is_added_unless_the_pod_has_one_that_covers_it() {
    let key = "kubernetes.azure.com/scalesetpriority";
    for (own, is_covered) in [
        (json!({"operator": "Exists"}), true),
        (json!({"operator": "Exists", "effect": "NoSchedule"}), true),
        (json!({"operator": "Exists", "effect": "NoExecute"}), false),
        (json!({"key": key, "operator": "Exists"}), true),
        (json!({"key": key, "operator": "Equal", "value": "spot", "effect": "NoSchedule"}), true),
        (json!({"key": key, "value": "spot"}), true),
        (json!({"key": key, "value": "regular"}), false),
        (json!({"key": "other", "operator": "Exists"}), false),
        (json!({"key": key, "operator": "Exists", "tolerationSeconds": 60}), false),
        (json!({"operator": "Equal", "value": "spot"}), false),
    ] {
        let pod = with_spec(json!({"tolerations": [own]}));
        let after = applied(&pod, &profile(CapacityProfile::Aks), Spot);
        assert_eq!(list(&after["spec"]["tolerations"]).len(), if is_covered { 1 } else { 2 }, "{own}");
        let on_demand = applied(&pod, &profile(CapacityProfile::Aks), OnDemand);
        assert_eq!(on_demand["spec"]["tolerations"], pod["spec"]["tolerations"]);
    }
}

#[test]
fn a_copied_decision_makes_no_impossible_pod_possible() {
    for capacity in [Spot, OnDemand] {
        let conventions = profile(CapacityProfile::Ack);
        for terms in [json!([]), json!([null, {}]), Value::Null] {
            let mut pod = with_terms(terms);
            pod["metadata"]["annotations"] = json!({"workload/capacity-type": "spot"});
            assert_eq!(applied(&pod, &conventions, capacity)["spec"], pod["spec"]);
        }
    }
}

/// The pod after Spot Balancer has placed it, another webhook has changed it, and Spot Balancer is called again.
fn called_again(conventions: &Conventions, capacity: Capacity, change: impl FnOnce(&mut Value)) -> (Capacity, Value) {
    let mut pod = applied(&with_spec(json!({"priority": 7})), conventions, capacity);
    change(&mut pod);
    let required = required(&pod, conventions).unwrap();
    let after = applied(&pod, conventions, required);
    assert_eq!(applied(&after, conventions, required), after, "a third call changes nothing");
    (required, after)
}

#[test]
fn a_selector_gives_way_to_a_later_webhooks_requirement() {
    let conventions = Conventions { node_role_selector: true, ..profile(CapacityProfile::Karpenter) };
    let (required, after) =
        called_again(&conventions, Spot, |pod| pod["spec"]["nodeSelector"][EKS] = json!("ON_DEMAND"));
    assert_eq!(required, OnDemand);
    assert_eq!(after["spec"], json!({"priority": 7, "nodeSelector": {EKS: "ON_DEMAND", "spark-role": "executor"}}));
    assert_eq!(after["metadata"]["annotations"], json!({"workload/capacity-type": "on-demand"}));
    // One for the same capacity stands next to ours, but one for another platform's nodes, which do not have our label,
    // would find none.
    let own = one_term(&[is(KARPENTER, "NotIn", &["on-demand"])])["spec"]["affinity"].clone();
    let (required, after) = called_again(&conventions, Spot, |pod| pod["spec"]["affinity"] = own);
    assert_eq!((required, &after["spec"]["nodeSelector"][KARPENTER]), (Spot, &json!("spot")));
    let (required, after) = called_again(&conventions, Spot, |pod| pod["spec"]["nodeSelector"][EKS] = json!("SPOT"));
    assert_eq!(required, Spot);
    assert_eq!(after["spec"]["nodeSelector"], json!({EKS: "SPOT", "spark-role": "executor"}));
    assert_eq!(after["metadata"]["annotations"], json!({"workload/capacity-type": "spot"}));
    // One that only excludes nodes of another platform does not concern ours.
    let own = one_term(&[is(EKS, "NotIn", &["SPOT"])])["spec"]["affinity"].clone();
    let (required, after) = called_again(&conventions, Spot, |pod| pod["spec"]["affinity"] = own);
    assert_eq!((required, &after["spec"]["nodeSelector"][KARPENTER]), (Spot, &json!("spot")));
    // One that replaces ours counts.
    let (required, after) =
        called_again(&conventions, Spot, |pod| pod["spec"]["nodeSelector"][KARPENTER] = json!("on-demand"));
    assert_eq!((required, &after["spec"]["nodeSelector"][KARPENTER]), (OnDemand, &json!("on-demand")));
    assert_eq!(after["metadata"]["annotations"], json!({"workload/capacity-type": "on-demand"}));
}

#[test]
fn an_affinity_gives_way_and_leaves_nothing_that_is_empty() {
    let conventions = profile(CapacityProfile::Gke);
    let required_path = "/spec/affinity/nodeAffinity/requiredDuringSchedulingIgnoredDuringExecution";
    let (required, after) = called_again(&conventions, OnDemand, |pod| {
        pod["spec"]["nodeSelector"] = json!({"cloud.google.com/gke-spot": "true"})
    });
    assert_eq!((required, after.pointer(required_path)), (Spot, None));
    let (required, after) = called_again(&conventions, OnDemand, |pod| {
        let terms = pod.pointer_mut(required_path).unwrap()["nodeSelectorTerms"].as_array_mut().unwrap();
        let own = terms[0]["matchExpressions"].as_array_mut().unwrap();
        own.insert(1, is(KARPENTER, "In", &["spot"]));
        terms.insert(0, Value::Null);
    });
    let terms = json!([null, {"matchExpressions": [is(KARPENTER, "In", &["spot"])]}]);
    assert_eq!((required, &after["spec"]["affinity"]), (Spot, &with_terms(terms)["spec"]["affinity"]));
    // A term without ours is an alternative that we did not write.
    let (required, after) = called_again(&conventions, OnDemand, |pod| {
        let terms = pod.pointer_mut(required_path).unwrap()["nodeSelectorTerms"].as_array_mut().unwrap();
        terms.push(json!({"matchExpressions": [is(KARPENTER, "In", &["on-demand"])]}));
    });
    assert_eq!(required, OnDemand);
    assert_eq!(list(&after.pointer(required_path).unwrap()["nodeSelectorTerms"]).len(), 2);
}

#[test]
fn a_preference_gives_way_and_the_tolerations_stay() {
    let conventions = Conventions { spot_preference: SpotPreference::BestEffort, ..profile(CapacityProfile::Aks) };
    let priority = "kubernetes.azure.com/priority";
    let (required, after) =
        called_again(&conventions, Spot, |pod| pod["spec"]["nodeSelector"] = json!({priority: "regular"}));
    assert_eq!(required, OnDemand);
    let preferred = "/spec/affinity/nodeAffinity/preferredDuringSchedulingIgnoredDuringExecution";
    assert_eq!(after.pointer(preferred), Some(&json!([])));
    assert_eq!(list(&after["spec"]["tolerations"]).len(), 1);
    assert_eq!(after["metadata"]["annotations"], json!({"workload/capacity-type": "on-demand"}));
}

fn driver(capacity: DriverCapacity, protect_drivers: bool, pod: &Value) -> Value {
    let conventions = Conventions { driver_capacity: capacity, protect_drivers, ..profile(CapacityProfile::Karpenter) };
    let conventions = Conventions { node_role_selector: true, ..conventions };
    let called = |pod: &Value| patched(pod, &conventions.profile().apply_to_driver(&decoded(pod)));
    let after = called(pod);
    assert_eq!(called(&after), after, "a second call changes nothing");
    after
}

#[test]
fn a_driver_that_chooses_no_capacity_is_pinned_to_on_demand() {
    let pinned = |spec: Value| driver(DriverCapacity::OnDemand, false, &with_spec(spec))["spec"].clone();
    assert_eq!(pinned(json!({"priority": 7})), json!({"priority": 7, "nodeSelector": {KARPENTER: "on-demand"}}));
    for own in
        [json!({"nodeSelector": {EKS: "SPOT"}}), json!({"nodeName": "n"}), with_terms(json!([{}]))["spec"].clone()]
    {
        assert_eq!(pinned(own.clone()), own);
    }
    let pod = with_spec(json!({}));
    assert_eq!(driver(DriverCapacity::Any, false, &pod), pod);
}

#[test]
fn a_pinned_driver_gives_way_to_a_later_webhooks_requirement() {
    let called_again = |profile_of: CapacityProfile, change: &dyn Fn(&mut Value)| {
        let apply = |pod: &Value| pinned(pod, &profile(profile_of));
        let mut first = apply(&with_spec(json!({"priority": 7})));
        change(&mut first);
        let after = apply(&first);
        assert_eq!(apply(&after), after, "a third call changes nothing");
        (first["spec"].clone(), after["spec"].clone())
    };
    let selects =
        |key: &'static str, value: &'static str| move |pod: &mut Value| pod["spec"]["nodeSelector"][key] = json!(value);
    let affinity = |own: Value| {
        move |pod: &mut Value| {
            pod["spec"]["affinity"] = one_term(std::slice::from_ref(&own))["spec"]["affinity"].clone()
        }
    };
    let ours = CapacityProfile::Karpenter;
    for capacity in ["SPOT", "ON_DEMAND"] {
        let (_, after) = called_again(ours, &selects(EKS, capacity));
        assert_eq!(after, json!({"priority": 7, "nodeSelector": {EKS: capacity}}));
    }
    let (pinned, after) = called_again(ours, &affinity(is(KARPENTER, "In", &["spot"])));
    assert_eq!(after, json!({"priority": 7, "nodeSelector": {}, "affinity": pinned["affinity"]}));
    let (pinned, after) = called_again(CapacityProfile::Gke, &selects("cloud.google.com/gke-spot", "true"));
    assert!(pinned["affinity"].is_object());
    assert_eq!(after["nodeSelector"], json!({"cloud.google.com/gke-spot": "true"}));
    assert!(
        after.pointer("/affinity/nodeAffinity/requiredDuringSchedulingIgnoredDuringExecution").is_none(),
        "{after}"
    );
    // These leave it on our on-demand nodes.
    for change in [
        &selects("zone", "a") as &dyn Fn(&mut Value),
        &affinity(is(KARPENTER, "NotIn", &["spot"])),
        &affinity(is(EKS, "NotIn", &["SPOT"])),
        &affinity(is("zone", "Near", &["a"])),
    ] {
        let (pinned, after) = called_again(ours, change);
        assert_eq!(after, pinned);
    }
}

#[test]
fn a_label_of_ones_own_stands_next_to_the_labels_of_the_profile() {
    const CLASS: &str = "cloud.google.com/compute-class";
    let conventions = Conventions {
        capacity_labels: CapacityLabels {
            label: CLASS.into(),
            spot_values: LabelValues::OneOf(vec!["spark-spot".into()]),
            on_demand_values: vec!["spark-on-demand".into()],
            ..CapacityLabels::of(CapacityProfile::Gke)
        },
        ..profile(CapacityProfile::Gke)
    };
    // The driver's own selectors, which look like our pin and a requirement for another platform.
    let both = json!({CLASS: "spark-on-demand", "cloud.google.com/gke-provisioning": "standard"});
    let driver = with_spec(json!({"nodeSelector": both}));
    assert_eq!(pinned(&driver, &conventions), driver);
    let (required, after) = called_again(&conventions, OnDemand, |pod| {
        pod["spec"]["nodeSelector"]["cloud.google.com/gke-provisioning"] = json!("standard")
    });
    assert_eq!((required, &after["spec"]["nodeSelector"]), (OnDemand, &both));
}

#[test]
fn a_protected_driver_keeps_what_it_says_itself() {
    let annotations = |own: Option<Value>| {
        let mut pod = with_spec(json!({"nodeName": "n"}));
        if let Some(own) = own {
            pod["metadata"]["annotations"] = own;
        }
        driver(DriverCapacity::Any, true, &pod)["metadata"]["annotations"].clone()
    };
    let both =
        json!({"karpenter.sh/do-not-disrupt": "true", "cluster-autoscaler.kubernetes.io/safe-to-evict": "false"});
    assert_eq!(annotations(None), both);
    assert_eq!(
        annotations(Some(json!({"karpenter.sh/do-not-disrupt": "30m"}))),
        json!({"karpenter.sh/do-not-disrupt": "30m", "cluster-autoscaler.kubernetes.io/safe-to-evict": "false"})
    );
    let own = json!({"karpenter.sh/do-not-disrupt": "", "cluster-autoscaler.kubernetes.io/safe-to-evict": "true"});
    assert_eq!(annotations(Some(own.clone())), own);
}

#[test]
fn requirements_are_told_apart_and_described() {
    let conventions = Conventions { node_role_selector: true, ..profile(CapacityProfile::Aks) };
    let own = with_terms(json!([
        {"matchExpressions": [is("zone", "In", &["a", "b"]), is("gpu", "Exists", &[])]},
        {"matchFields": [is("metadata.name", "NotIn", &["n"])]},
    ]));
    let mut placed = applied(&own, &conventions, OnDemand);
    placed["spec"]["nodeSelector"]["disk"] = json!("nvme");
    let found = conventions.profile().requirements(&decoded(&placed));
    assert_eq!((found.placed, found.own_capacity), (Some(OnDemand), None));
    assert_eq!(
        found.ours,
        [
            "kubernetes.azure.com/scalesetpriority not in (spot)",
            "kubernetes.azure.com/priority not in (spot)",
            "spark-role in (executor)"
        ]
    );
    assert_eq!(found.own, ["disk in (nvme)", "(zone in (a, b) and gpu exists) or (metadata.name not in (n))"]);

    let found = conventions.profile().requirements(&decoded(&applied(&with_spec(json!({})), &conventions, OnDemand)));
    assert_eq!((found.placed, found.ours.len(), found.own), (Some(OnDemand), 3, Vec::new()));

    let by_itself = with_spec(json!({"nodeSelector": {EKS: "SPOT"}}));
    let found = conventions.profile().requirements(&decoded(&by_itself));
    assert_eq!((found.placed, found.own_capacity, found.ours), (None, Some(Spot), Vec::new()));
    assert_eq!(found.own, ["eks.amazonaws.com/capacityType in (SPOT)"]);

    let nowhere = conventions.profile().requirements(&decoded(&with_terms(json!([{}]))));
    assert_eq!(nowhere.own, ["no node"]);
    assert_eq!(conventions.profile().requirements(&decoded(&json!({"metadata": {}}))).own.len(), 0);
}

#[test]
fn descriptions_of_a_hostile_pod_are_bounded() {
    let many: Vec<Value> =
        (0..1000).map(|i| json!({"matchExpressions": [is(&format!("k{i}"), "Exists", &[])]})).collect();
    let mut pod = with_terms(json!(many));
    pod["spec"]["nodeSelector"] = (0..1000).map(|i| (format!("s{i}"), json!("x".repeat(1000)))).collect();
    let found = profile(CapacityProfile::Karpenter).profile().requirements(&decoded(&pod));
    assert!(found.own.len() <= 16 && found.own.iter().all(|own| own.chars().count() <= 257));
}

#[test]
fn long_lists_take_no_more_than_their_length() {
    let values: Vec<String> = (0..100_000).map(|i| format!("v{i}")).collect();
    let others: Vec<String> = (0..100_000).map(|i| format!("w{i}")).collect();
    let key = "node.alibabacloud.com/spot-strategy";
    let lists = [&values, &others, &values].map(|values| json!({"key": key, "operator": "In", "values": values}));
    assert_eq!(required(&one_term(&lists), &profile(CapacityProfile::Ack)), Some(OnDemand));
}

#[test]
fn profiles_are_named_in_any_case() {
    for profile in CapacityProfile::ALL {
        assert_eq!(format!(" {} ", profile.as_str().to_uppercase()).parse(), Ok(profile));
    }
    let error = "ec2".parse::<CapacityProfile>().unwrap_err().to_string();
    let accepted = "accepted: karpenter, eks, gke, aks, openshift, oke, ack, ocean, cast-ai";
    assert_eq!(error, format!("\"ec2\" is not a capacity profile; {accepted}"));
}

/// An executor of a job with these constraints.
fn of_job(constraints: Value) -> Value {
    let mut pod = with_spec(json!({"topologySpreadConstraints": constraints}));
    pod["metadata"]["labels"]["spark-app-selector"] = json!("job-7");
    pod
}

#[test]
fn executors_per_node_are_limited_by_a_constraint_on_the_jobs_executors() {
    let conventions = profile(CapacityProfile::Karpenter);
    let wanted = Spread { max_executors_per_node: Some(3), avoid: Vec::new() };
    let limit = json!({
        "topologyKey": "kubernetes.io/hostname", "whenUnsatisfiable": "DoNotSchedule", "maxSkew": 3, "minDomains": 10_000,
        "labelSelector": {"matchLabels": {"spark-role": "executor", "spark-app-selector": "job-7"}},
    });
    for own in [json!(null), json!([])] {
        let after = spread(&of_job(own), &conventions, Spot, &wanted);
        assert_eq!(after["spec"]["topologySpreadConstraints"], json!([limit]));
    }
    let zone =
        json!({"topologyKey": "topology.kubernetes.io/zone", "whenUnsatisfiable": "DoNotSchedule", "maxSkew": 1});
    let after = spread(&of_job(json!([zone])), &conventions, Spot, &wanted);
    assert_eq!(after["spec"]["topologySpreadConstraints"], json!([zone, limit]));
    let on_demand = spread(&of_job(json!([zone])), &conventions, OnDemand, &wanted);
    assert_eq!(on_demand["spec"]["topologySpreadConstraints"], json!([zone]));
    // A pod that requires spot by itself is one of the job's executors as well.
    let mut own = of_job(json!([]));
    own["spec"]["nodeSelector"] = json!({EKS: "SPOT"});
    let after = spread(&own, &conventions, Spot, &wanted);
    assert_eq!(after["spec"]["topologySpreadConstraints"], json!([limit]));
}

#[test]
fn a_constraint_of_the_pods_own_on_its_nodes_precedes_the_limit() {
    let conventions = profile(CapacityProfile::Karpenter);
    let wanted = Spread { max_executors_per_node: Some(3), avoid: Vec::new() };
    let own = |unsatisfiable| json!({"topologyKey": "kubernetes.io/hostname", "whenUnsatisfiable": unsatisfiable, "maxSkew": 1});
    for (constraint, precedes) in [(own("DoNotSchedule"), true), (own("ScheduleAnyway"), false)] {
        let pod = of_job(json!([constraint]));
        let after = spread(&pod, &conventions, Spot, &wanted);
        assert_eq!(constraints(&after).len(), if precedes { 1 } else { 2 });
        for pod in [pod, after] {
            assert_eq!(conventions.profile().spreads_itself(&decoded(&pod)), precedes, "{pod}");
        }
    }
    // The apiserver refuses what is not a list.
    let pod = of_job(json!({"maxSkew": 1}));
    assert_eq!(constraints(&spread(&pod, &conventions, Spot, &wanted)).len(), 0);
    assert!(!conventions.profile().spreads_itself(&decoded(&pod)));
}

#[test]
fn instance_types_are_avoided_among_spot_nodes_only() {
    let wanted = Spread { max_executors_per_node: None, avoid: vec!["m5.large".into(), "r5.xlarge".into()] };
    for preference in [SpotPreference::Strict, SpotPreference::BestEffort] {
        let conventions = Conventions { spot_preference: preference, ..profile(CapacityProfile::Karpenter) };
        let after = spread(&of_job(json!(null)), &conventions, Spot, &wanted);
        let types = is("node.kubernetes.io/instance-type", "NotIn", &["m5.large", "r5.xlarge"]);
        let spot = is(KARPENTER, "In", &["spot"]);
        let avoids = json!({"weight": 100, "preference": {"matchExpressions": [spot, types]}});
        let prefers = json!({"weight": 100, "preference": {"matchExpressions": [spot]}});
        // Karpenter follows the first of the heaviest alone, as long as it finds a node with it.
        let terms = if preference == SpotPreference::Strict { vec![avoids] } else { vec![avoids, prefers] };
        assert_eq!(preferred(&after), terms, "{after}");
        let other = Spread { avoid: vec!["c5.large".into()], ..wanted.clone() };
        let moved = spread(&spread(&after, &conventions, Spot, &other), &conventions, Spot, &wanted);
        assert_eq!(preferred(&moved), terms, "{moved}");
        assert_eq!(preferred(&spread(&of_job(json!(null)), &conventions, OnDemand, &wanted)).len(), 0);
    }
}
