//! Real AdmissionReviews, sent by real apiservers for pods of Spark: what is read from them, what is written back, and
//! that no bytes make the decoder panic.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test fails by a panic")]

use balancer_core::{
    Action, Capacity, CapacityLabels, CapacityProfile, Conventions, Counts, IgnoreReason, Ordinal, PolicyOverrides,
    Reply, Review, ReviewError, SpotPreference, SpotRatio, Spread,
};
use base64::Engine;
use proptest::prelude::*;
use serde_json::{Value, json};

const CREATE_1_20: &[u8] = include_bytes!("../../../tests/fixtures/k8s-1.20-spark-3.5-create-executor.json");
const CREATE_1_36: &[u8] = include_bytes!("../../../tests/fixtures/k8s-1.36-spark-3.5-create-executor.json");
const DRIVER_1_36: &[u8] = include_bytes!("../../../tests/fixtures/k8s-1.36-spark-3.5-create-driver.json");
const DELETE_1_20: &[u8] = include_bytes!("../../../tests/fixtures/k8s-1.20-spark-3.5-delete-executor-named.json");
const DELETE_AGAIN_1_20: &[u8] =
    include_bytes!("../../../tests/fixtures/k8s-1.20-spark-3.5-delete-executor-named-again.json");
const COLLECTION_1_20: &[u8] =
    include_bytes!("../../../tests/fixtures/k8s-1.20-spark-3.5-delete-executor-collection.json");
const COLLECTION_1_36: &[u8] =
    include_bytes!("../../../tests/fixtures/k8s-1.36-spark-3.5-delete-executor-collection.json");

fn value(bytes: &[u8]) -> Value {
    serde_json::from_slice(bytes).unwrap()
}

/// A real creation whose pod is changed by `change`.
fn create_with(change: impl FnOnce(&mut Value)) -> Vec<u8> {
    let mut review = value(CREATE_1_36);
    change(&mut review["request"]["object"]);
    serde_json::to_vec(&review).unwrap()
}

/// The pod after the patch for `capacity`.
fn patched(bytes: &[u8], conventions: &Conventions, capacity: Capacity) -> Value {
    let review = Review::decode(bytes).unwrap();
    let Action::Place(executor) = Action::of(&review, conventions) else { panic!("not an executor's creation") };
    let mut reply = Reply::allow(review.uid());
    reply.patch = conventions.profile().apply(executor.pod, capacity, executor.placeholder, &Spread::default());
    let reply = value(&reply.encode());
    let mut pod = value(bytes)["request"]["object"].clone();
    if let Some(patch) = reply["response"]["patch"].as_str() {
        let patch = base64::engine::general_purpose::STANDARD.decode(patch).unwrap();
        let patch: json_patch::Patch = serde_json::from_slice(&patch).unwrap();
        json_patch::patch(&mut pod, &patch).unwrap();
    }
    pod
}

fn strict() -> Conventions {
    Conventions { spot_preference: SpotPreference::Strict, ..Conventions::default() }
}

#[test]
fn old_and_new_apiservers_name_the_executor_alike() {
    let conventions = Conventions::default();
    for (bytes, id, name) in [
        (CREATE_1_20, "spark-pi-7abe5c", "spark-pi-7abe5c-exec-1"),
        (CREATE_1_36, "spark-pi-dd77a5", "spark-pi-dd77a5-exec-1"),
    ] {
        let review = Review::decode(bytes).unwrap();
        assert_eq!(review.uid(), value(bytes)["request"]["uid"]);
        let action = Action::of(&review, &conventions);
        assert!(!review.is_dry_run());
        let Action::Place(executor) = action else { panic!("{action:?}") };
        // On 1.20 the object has no namespace: it comes from the request.
        assert_eq!((executor.job.namespace, executor.job.app_id), ("sandbox", id));
        assert_eq!(executor.job_label, "emr-containers.amazonaws.com/job.id");
        assert_eq!((executor.key, executor.placeholder, executor.uid), (name, None, None));
        assert_eq!(executor.ordinal, Ordinal::Number(1));
        assert_eq!((executor.required, executor.overrides), (None, PolicyOverrides::default()));
    }
}

#[test]
fn a_drivers_creation_states_its_jobs_policy() {
    let conventions = Conventions::default();
    let review = Review::decode(DRIVER_1_36).unwrap();
    let Action::Learn(driver) = Action::of(&review, &conventions) else { panic!() };
    assert_eq!((driver.job.unwrap().namespace, driver.job.unwrap().app_id), ("sandbox", "00000003abc"));
    assert_eq!(driver.overrides, PolicyOverrides { spot_ratio: "0.7".parse().ok(), ..PolicyOverrides::default() });
}

#[test]
fn a_driver_of_many_jobs_needs_neither_a_job_id_nor_a_name() {
    let conventions = Conventions::default();
    let bytes = create_with(|pod| {
        pod["metadata"]["labels"] = json!({"spark-role": "connect-server"});
        pod["metadata"]["name"] = Value::Null;
        pod["metadata"]["generateName"] = json!("connect-");
        pod["metadata"]["annotations"] = json!({"workload/spot-ratio": "off"});
    });
    let review = Review::decode(&bytes).unwrap();
    let Action::Learn(driver) = Action::of(&review, &conventions) else { panic!() };
    assert_eq!((driver.job, driver.name), (None, None));
    assert_eq!(driver.overrides.spot_ratio, Some(SpotRatio::Off));
}

#[test]
fn an_executor_names_the_pod_that_owns_it() {
    let conventions = Conventions::default();
    let owned = |kind: &str, name: &str, controller: bool| {
        let owner = json!({"apiVersion": "v1", "kind": kind, "name": name, "uid": "u1", "controller": controller});
        create_with(|pod| pod["metadata"]["ownerReferences"] = json!([owner]))
    };
    for (bytes, driver) in [
        (owned("Pod", "notebook-0", true), Some("notebook-0")),
        (owned("Pod", "notebook-0", false), None),
        (owned("StatefulSet", "notebook", true), None),
        (owned("Pod", "", true), None),
        (owned("Pod", "a }b", true), None),
    ] {
        let review = Review::decode(&bytes).unwrap();
        let Action::Place(executor) = Action::of(&review, &conventions) else { panic!() };
        assert_eq!(executor.driver, driver);
    }
}

#[test]
fn an_executor_that_opts_out_is_not_placed_but_released_if_it_was_before() {
    let conventions = Conventions::default();
    for (ratio, is_off) in [("off", true), (" Off", true), ("0", false), ("offf", false)] {
        let created = create_with(|pod| pod["metadata"]["annotations"] = json!({"workload/spot-ratio": ratio}));
        let mut deleted = value(&created);
        deleted["request"]["operation"] = json!("DELETE");
        deleted["request"]["oldObject"] = deleted["request"]["object"].take();
        let (review, bytes) = (Review::decode(&created).unwrap(), serde_json::to_vec(&deleted).unwrap());
        let action = Action::of(&review, &conventions);
        assert_eq!(action == Action::Ignore(IgnoreReason::OptedOut), is_off, "{ratio:?}: {action:?}");
        let review = Review::decode(&bytes).unwrap();
        assert!(matches!(Action::of(&review, &conventions), Action::Release(_)), "{ratio:?}");
    }
}

#[test]
fn an_executor_that_another_webhook_opts_out_after_its_placement_is_withdrawn() {
    let off = |pod: &mut Value| pod["metadata"]["annotations"]["workload/spot-ratio"] = json!("off");
    for (conventions, capacity) in [
        (strict(), Capacity::Spot),
        (strict(), Capacity::OnDemand),
        (Conventions::default(), Capacity::Spot),
        (Conventions { capacity_labels: CapacityLabels::of(CapacityProfile::Aks), ..strict() }, Capacity::OnDemand),
    ] {
        for (first, key) in [(CREATE_1_36.to_vec(), "spark-pi-dd77a5-exec-1"), (nameless("call-1", |_| {}), "call-1")] {
            let mut review = value(&first);
            let before = review["request"]["object"].clone();
            review["request"]["object"] = patched(&first, &conventions, capacity);
            off(&mut review["request"]["object"]);
            review["request"]["uid"] = json!("call-2");
            let again = serde_json::to_vec(&review).unwrap();
            let decoded = Review::decode(&again).unwrap();
            let Action::Withdraw(executor) = Action::of(&decoded, &conventions) else { panic!() };
            assert_eq!((executor.key, executor.uid), (key, None));
            let pod = &mut review["request"]["object"];
            let patch = conventions.profile().withdraw(executor.pod);
            let patch: json_patch::Patch = serde_json::from_slice(patch.as_json()).unwrap();
            json_patch::patch(pod, &patch).unwrap();
            // Empty parents may stay, and so does the role's selector.
            let selector = pod["spec"]["nodeSelector"].as_object().into_iter().flatten();
            assert!(selector.clone().all(|(key, _)| key == "spark-role"), "{pod}");
            assert!(!pod["spec"]["affinity"].to_string().contains("capacity"), "{pod}");
            assert!(!pod["spec"]["affinity"].to_string().contains("spot"), "{pod}");
            assert_eq!(pod["metadata"]["annotations"], json!({"workload/spot-ratio": "off"}));
            assert_eq!(pod["spec"]["containers"], before["spec"]["containers"]);
            let third = serde_json::to_vec(&review).unwrap();
            let decoded = Review::decode(&third).unwrap();
            assert_eq!(Action::of(&decoded, &conventions), Action::Ignore(IgnoreReason::OptedOut));
        }
    }
    // A copied decision, without anything that was added for it, is no placement.
    let copied = create_with(|pod| {
        pod["metadata"]["annotations"] = json!({"workload/capacity-type": "spot"});
        off(pod);
    });
    let review = Review::decode(&copied).unwrap();
    assert_eq!(Action::of(&review, &strict()), Action::Ignore(IgnoreReason::OptedOut));
}

#[test]
fn names_that_kubernetes_refuses_are_ignored() {
    let conventions = Conventions::default();
    let long = "x".repeat(254);
    for role in ["executor", "driver"] {
        for (label, value) in [("spark-app-selector", "app/driver"), ("spark-app-selector", long.as_str())] {
            let bytes = create_with(|pod| pod["metadata"]["labels"] = json!({"spark-role": role, label: value}));
            let review = Review::decode(&bytes).unwrap();
            assert_eq!(Action::of(&review, &conventions), Action::Ignore(IgnoreReason::InvalidName), "{role} {value}");
        }
    }
}

#[test]
fn every_kind_of_deletion_names_the_executor_and_its_uid() {
    let conventions = Conventions::default();
    for bytes in [DELETE_1_20, DELETE_AGAIN_1_20, COLLECTION_1_20, COLLECTION_1_36] {
        let old = &value(bytes)["request"]["oldObject"]["metadata"];
        let review = Review::decode(bytes).unwrap();
        let Action::Release(executor) = Action::of(&review, &conventions) else { panic!() };
        assert_eq!((executor.key, executor.uid), (old["name"].as_str().unwrap(), old["uid"].as_str()));
        assert_eq!(executor.job.namespace, "sandbox");
    }
}

#[test]
fn the_first_job_id_label_that_is_not_empty_counts() {
    let conventions = Conventions::default();
    let labelled = |labels: Value| create_with(|pod| pod["metadata"]["labels"] = labels);
    for (labels, expected) in [
        (json!({"spark-role": "executor", "spark-app-selector": "app"}), Some(("spark-app-selector", "app"))),
        (
            json!({"spark-role": "executor", "emr-containers.amazonaws.com/job.id": "", "spark-app-selector": "app"}),
            Some(("spark-app-selector", "app")),
        ),
        (json!({"spark-role": "executor"}), None),
    ] {
        let bytes = labelled(labels);
        let review = Review::decode(&bytes).unwrap();
        match (Action::of(&review, &conventions), expected) {
            (Action::Place(executor), Some(expected)) => {
                assert_eq!((executor.job_label, executor.job.app_id), expected)
            }
            (Action::Ignore(IgnoreReason::NoJobId), None) => {}
            (work, expected) => panic!("{work:?} instead of {expected:?}"),
        }
    }
}

#[test]
fn other_objects_operations_and_roles_are_ignored() {
    let conventions = Conventions::default();
    let with = |path: &str, to: Value| {
        let mut review = value(CREATE_1_36);
        *review.pointer_mut(path).unwrap() = to;
        serde_json::to_vec(&review).unwrap()
    };
    let mut eviction = value(CREATE_1_36);
    eviction["request"]["subResource"] = json!("eviction");
    let mut delete_driver = value(DRIVER_1_36);
    delete_driver["request"]["operation"] = json!("DELETE");
    delete_driver["request"]["oldObject"] = delete_driver["request"]["object"].take();
    for (bytes, leave) in [
        (with("/request/resource/resource", json!("deployments")), IgnoreReason::NotAPod),
        (with("/request/resource/group", json!("apps")), IgnoreReason::NotAPod),
        (with("/request/object", Value::Null), IgnoreReason::NotAPod),
        (serde_json::to_vec(&eviction).unwrap(), IgnoreReason::NotAPod),
        (with("/request/operation", json!("UPDATE")), IgnoreReason::OtherOperation),
        (with("/request/operation", json!("CONNECT")), IgnoreReason::OtherOperation),
        (serde_json::to_vec(&delete_driver).unwrap(), IgnoreReason::OtherOperation),
        (with("/request/object/metadata/labels/spark-role", json!("worker")), IgnoreReason::OtherRole),
        (with("/request/object/metadata/labels", Value::Null), IgnoreReason::OtherRole),
        (create_with(|pod| pod["spec"]["nodeName"] = json!("node-1")), IgnoreReason::Bound),
    ] {
        let review = Review::decode(&bytes).unwrap();
        assert_eq!(Action::of(&review, &conventions), Action::Ignore(leave));
    }
}

#[test]
fn a_pod_without_a_name_gets_a_placeholder_that_finds_it_again() {
    let conventions = strict();
    let nameless = create_with(|pod| {
        pod["metadata"]["name"] = Value::Null;
        pod["metadata"]["generateName"] = json!("etl-exec-");
    });
    let mut review = value(&nameless);
    review["request"]["name"] = Value::Null;
    let nameless = serde_json::to_vec(&review).unwrap();
    let uid = review["request"]["uid"].as_str().unwrap().to_owned();
    {
        let review = Review::decode(&nameless).unwrap();
        let Action::Place(executor) = Action::of(&review, &conventions) else { panic!() };
        assert_eq!((executor.key, executor.placeholder), (uid.as_str(), Some(uid.as_str())));
    }
    let pod = patched(&nameless, &conventions, Capacity::Spot);
    assert_eq!(pod["metadata"]["annotations"]["workload/capacity-type"], format!("spot/{uid}"));

    // The same pod in another call of the same admission, and later in its deletion.
    review["request"]["uid"] = json!("another call");
    review["request"]["object"] = pod.clone();
    let again = serde_json::to_vec(&review).unwrap();
    let review_again = Review::decode(&again).unwrap();
    let Action::Place(executor) = Action::of(&review_again, &conventions) else { panic!() };
    assert_eq!(executor.key, uid);
    review["request"]["operation"] = json!("DELETE");
    review["request"]["oldObject"] = pod;
    review["request"]["oldObject"]["metadata"]["name"] = json!("etl-exec-x7k2p");
    let deleted = serde_json::to_vec(&review).unwrap();
    let review_deleted = Review::decode(&deleted).unwrap();
    let Action::Release(executor) = Action::of(&review_deleted, &conventions) else { panic!() };
    assert_eq!(executor.key, uid);
}

/// The creation of a pod whose name the apiserver generates, in the call with this uid.
fn nameless(uid: &str, change: impl FnOnce(&mut Value)) -> Vec<u8> {
    let mut review = value(&create_with(|pod| {
        pod["metadata"]["name"] = Value::Null;
        pod["metadata"]["generateName"] = json!("etl-exec-");
        change(pod);
    }));
    review["request"]["name"] = Value::Null;
    review["request"]["uid"] = json!(uid);
    serde_json::to_vec(&review).unwrap()
}

#[test]
fn a_template_with_a_copied_decision_does_not_make_its_pods_one_executor() {
    for conventions in [strict(), Conventions::default()] {
        for capacity in [Capacity::Spot, Capacity::OnDemand] {
            let decision = format!("{}/of-a-live-pod", capacity.as_str());
            for uid in ["call-1", "call-2"] {
                let bytes = nameless(uid, |pod| {
                    pod["metadata"]["annotations"] = json!({"workload/capacity-type": decision});
                });
                let review = Review::decode(&bytes).unwrap();
                let Action::Place(executor) = Action::of(&review, &conventions) else { panic!() };
                assert_eq!((executor.key, executor.placeholder), (uid, Some(uid)));
                // The pod then has its own, which the next call finds.
                let pod = patched(&bytes, &conventions, Capacity::Spot);
                assert_eq!(pod["metadata"]["annotations"]["workload/capacity-type"], format!("spot/{uid}"));
                let again = nameless("again", |own| *own = pod);
                let review = Review::decode(&again).unwrap();
                let Action::Place(executor) = Action::of(&review, &conventions) else { panic!() };
                assert_eq!(executor.key, uid);
            }
        }
    }
}

#[test]
fn a_pod_that_chooses_its_capacity_itself_keeps_its_placeholder() {
    let conventions = strict();
    let chooses = |pod: &mut Value| pod["spec"]["nodeSelector"] = json!({"eks.amazonaws.com/capacityType": "SPOT"});
    let bytes = nameless("call-1", chooses);
    let again = nameless("call-2", |pod| *pod = patched(&bytes, &conventions, Capacity::Spot));
    let review = Review::decode(&again).unwrap();
    let Action::Place(executor) = Action::of(&review, &conventions) else { panic!() };
    assert_eq!((executor.key, executor.required), ("call-1", Some(Capacity::Spot)));
}

#[test]
fn a_copied_decision_does_not_rename_a_pod_that_has_a_name() {
    let conventions = Conventions::default();
    let bytes = create_with(|pod| {
        pod["metadata"]["annotations"] = json!({"workload/capacity-type": "spot/of-another-pod"});
    });
    let review = Review::decode(&bytes).unwrap();
    let Action::Place(executor) = Action::of(&review, &conventions) else { panic!() };
    assert_eq!(executor.key, "spark-pi-dd77a5-exec-1");
    let pod = patched(&bytes, &conventions, Capacity::OnDemand);
    assert_eq!(pod["metadata"]["annotations"]["workload/capacity-type"], "on-demand");
}

#[test]
fn the_patch_keeps_what_the_pod_has() {
    let own_affinity = json!({"podAntiAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": []}});
    let bytes = create_with(|pod| {
        pod["spec"]["nodeSelector"] = json!({"disk": "nvme", "a/b~c": "x"});
        pod["spec"]["affinity"] = own_affinity.clone();
        pod["metadata"]["annotations"] = json!({"team": "etl"});
    });
    let before = value(&bytes)["request"]["object"].clone();
    let after = patched(&bytes, &strict(), Capacity::Spot);
    assert_eq!(
        after["spec"]["nodeSelector"],
        json!({"disk": "nvme", "a/b~c": "x", "karpenter.sh/capacity-type": "spot", "spark-role": "executor"})
    );
    assert_eq!(after["metadata"]["annotations"], json!({"team": "etl", "workload/capacity-type": "spot"}));
    let mut undone = after;
    undone["spec"]["nodeSelector"] = before["spec"]["nodeSelector"].clone();
    undone["metadata"]["annotations"] = before["metadata"]["annotations"].clone();
    assert_eq!(undone, before);
}

#[test]
fn best_effort_adds_a_selector_to_on_demand_executors_only() {
    let conventions = Conventions::default();
    let spot = patched(CREATE_1_20, &conventions, Capacity::Spot);
    assert_eq!(spot["spec"]["nodeSelector"], Value::Null);
    assert_eq!(spot["metadata"]["annotations"]["workload/capacity-type"], "spot");
    let on_demand = patched(CREATE_1_20, &conventions, Capacity::OnDemand);
    assert_eq!(
        on_demand["spec"]["nodeSelector"],
        json!({"karpenter.sh/capacity-type": "on-demand", "spark-role": "executor"})
    );
}

#[test]
fn the_role_selector_and_the_decision_can_be_turned_off() {
    let conventions = Conventions { node_role_selector: false, decision_annotation: None, ..strict() };
    let pod = patched(CREATE_1_36, &conventions, Capacity::Spot);
    assert_eq!(pod["spec"]["nodeSelector"], json!({"karpenter.sh/capacity-type": "spot"}));
    assert_eq!(pod["metadata"]["annotations"], Value::Null);
}

#[test]
fn the_pods_own_role_selector_stays() {
    let bytes = create_with(|pod| pod["spec"]["nodeSelector"] = json!({"spark-role": "heavy"}));
    let pod = patched(&bytes, &strict(), Capacity::Spot);
    assert_eq!(pod["spec"]["nodeSelector"], json!({"spark-role": "heavy", "karpenter.sh/capacity-type": "spot"}));
}

#[test]
fn absent_null_and_empty_parents_are_all_patched() {
    for (selector, annotations) in
        [(None, None), (Some(Value::Null), Some(Value::Null)), (Some(json!({})), Some(json!({})))]
    {
        let bytes = create_with(|pod| {
            for (parent, key, own) in [("spec", "nodeSelector", &selector), ("metadata", "annotations", &annotations)] {
                let parent = pod[parent].as_object_mut().unwrap();
                parent.remove(key);
                if let Some(own) = own {
                    parent.insert(key.into(), own.clone());
                }
            }
        });
        let pod = patched(&bytes, &strict(), Capacity::Spot);
        assert_eq!(pod["spec"]["nodeSelector"]["karpenter.sh/capacity-type"], "spot");
        assert_eq!(pod["metadata"]["annotations"]["workload/capacity-type"], "spot");
    }
    let specless = create_with(|pod| {
        pod.as_object_mut().unwrap().remove("spec");
    });
    assert_eq!(patched(&specless, &strict(), Capacity::Spot)["spec"]["nodeSelector"]["spark-role"], "executor");
}

#[test]
fn reinvocation_changes_nothing() {
    let mut review = value(CREATE_1_36);
    review["request"]["object"] = patched(CREATE_1_36, &strict(), Capacity::Spot);
    let again = serde_json::to_vec(&review).unwrap();
    assert_eq!(patched(&again, &strict(), Capacity::Spot), review["request"]["object"]);
    let review = Review::decode(&again).unwrap();
    let conventions = strict();
    let Action::Place(executor) = Action::of(&review, &conventions) else { panic!() };
    assert_eq!((executor.required, executor.is_placed), (Some(Capacity::Spot), true));
}

#[test]
fn a_later_webhook_that_requires_the_other_capacity_replaces_ours() {
    let conventions = strict();
    let mut review = value(CREATE_1_36);
    review["request"]["object"] = patched(CREATE_1_36, &conventions, Capacity::Spot);
    // Another webhook, by the label of another platform.
    review["request"]["object"]["spec"]["nodeSelector"]["eks.amazonaws.com/capacityType"] = json!("ON_DEMAND");
    let again = serde_json::to_vec(&review).unwrap();
    let decoded = Review::decode(&again).unwrap();
    let Action::Place(executor) = Action::of(&decoded, &conventions) else { panic!() };
    assert_eq!((executor.required, executor.is_placed), (Some(Capacity::OnDemand), false));
    let pod = patched(&again, &conventions, Capacity::OnDemand);
    let selector = json!({"eks.amazonaws.com/capacityType": "ON_DEMAND", "spark-role": "executor"});
    assert_eq!(pod["spec"]["nodeSelector"], selector);
    assert_eq!(pod["metadata"]["annotations"]["workload/capacity-type"], "on-demand");
}

#[test]
fn a_pod_that_requires_a_capacity_counts_as_it_and_is_not_patched() {
    let affinity = |terms: Value| json!({"affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}}});
    let key = "karpenter.sh/capacity-type";
    let term = |operator: &str, values: Value| json!({"matchExpressions": [{"key": key, "operator": operator, "values": values}]});
    let elsewhere = json!({"matchExpressions": [{"key": "zone", "operator": "In", "values": ["a"]}]});
    let (spot, on_demand) = (Some(Capacity::Spot), Some(Capacity::OnDemand));
    for (spec, required) in [
        (json!({}), None),
        (json!({"nodeSelector": {key: "spot"}}), spot),
        (json!({"nodeSelector": {key: "on-demand"}}), on_demand),
        (json!({"nodeSelector": {key: "reserved"}}), on_demand),
        (affinity(json!([term("In", json!(["spot"]))])), spot),
        (affinity(json!([term("In", json!(["on-demand"]))])), on_demand),
        (affinity(json!([term("In", json!(["on-demand", "spot"]))])), None),
        (affinity(json!([term("In", json!(["spot", "reserved"]))])), spot),
        (affinity(json!([term("NotIn", json!(["spot"]))])), on_demand),
        (affinity(json!([term("NotIn", json!(["on-demand"]))])), spot),
        (affinity(json!([term("Exists", Value::Null)])), None),
        (affinity(json!([term("DoesNotExist", Value::Null)])), on_demand),
        (affinity(json!([elsewhere])), None),
        // Terms are alternatives.
        (affinity(json!([term("In", json!(["spot"])), term("In", json!(["on-demand"]))])), None),
        (affinity(json!([term("In", json!(["spot"])), elsewhere])), None),
        (affinity(json!([term("In", json!(["spot"])), term("NotIn", json!(["on-demand"]))])), spot),
        // Expressions of one term are not.
        (
            affinity(json!([{"matchExpressions": [
                {"key": "zone", "operator": "In", "values": ["a"]},
                {"key": key, "operator": "In", "values": ["spot"]},
            ]}])),
            spot,
        ),
        (json!({"affinity": {"nodeAffinity": null}}), None),
        (
            json!({"affinity": {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 1, "spot_preference": term("In", json!(["spot"]))}]}}}),
            None,
        ),
    ] {
        let bytes = create_with(|pod| {
            for (name, own) in spec.as_object().unwrap() {
                pod["spec"][name] = own.clone();
            }
        });
        let review = Review::decode(&bytes).unwrap();
        let conventions = strict();
        let Action::Place(executor) = Action::of(&review, &conventions) else { panic!() };
        assert_eq!(executor.required, required, "{spec}");
        if let Some(capacity) = required {
            assert_eq!(patched(&bytes, &conventions, capacity), value(&bytes)["request"]["object"], "{spec}");
        }
    }
}

#[test]
fn an_executors_own_annotations_are_read_and_invalid_ones_reported() {
    let conventions = Conventions::default();
    let bytes = create_with(|pod| {
        pod["metadata"]["annotations"] = json!({"workload/spot-ratio": "COST_ONLY", "workload/on-demand-base": "many"});
    });
    let review = Review::decode(&bytes).unwrap();
    let Action::Place(executor) = Action::of(&review, &conventions) else { panic!() };
    assert_eq!(executor.overrides, PolicyOverrides { spot_ratio: Some(SpotRatio::ONE), ..PolicyOverrides::default() });
    assert_eq!(executor.invalid.len(), 1);
}

#[test]
fn each_invalid_review_has_its_error() {
    let wrong = |change: fn(&mut Value)| {
        let mut review = value(CREATE_1_36);
        change(&mut review);
        serde_json::to_vec(&review).unwrap()
    };
    type IsCause = fn(&ReviewError) -> bool;
    let unreadable: IsCause = |e| matches!(e, ReviewError::InvalidJson(_));
    let wrong_kind: IsCause = |e| matches!(e, ReviewError::WrongKind { .. });
    let cases: [(Vec<u8>, IsCause); 13] = [
        (b"".to_vec(), unreadable),
        (b"hello".to_vec(), unreadable),
        (b"[]".to_vec(), unreadable),
        (b"7".to_vec(), unreadable),
        (CREATE_1_36[..CREATE_1_36.len() / 2].to_vec(), unreadable),
        ([CREATE_1_36, b"}"].concat(), unreadable),
        (wrong(|r| r["request"] = json!("x")), unreadable),
        (wrong(|r| r["request"]["object"]["metadata"]["labels"] = json!(["x"])), unreadable),
        (b"{}".to_vec(), wrong_kind),
        (b"null".to_vec(), wrong_kind),
        (wrong(|r| r["apiVersion"] = json!("admission.k8s.io/v1beta1")), wrong_kind),
        (wrong(|r| r["request"] = Value::Null), |e| matches!(e, ReviewError::NoRequest)),
        (wrong(|r| r["request"]["uid"] = json!("")), |e| matches!(e, ReviewError::NoUid)),
    ];
    for (bytes, is_cause) in cases {
        let error = Review::decode(&bytes).unwrap_err();
        assert!(is_cause(&error), "{error:?}");
    }
}

#[test]
fn a_reply_without_changes_has_no_patch() {
    let reply = value(&Reply::allow("u\"1").encode());
    assert_eq!(
        reply,
        json!({"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "response": {"uid": "u\"1", "allowed": true}})
    );
}

#[test]
fn escaped_strings_are_unescaped() {
    let bytes = String::from_utf8(CREATE_1_36.to_vec())
        .unwrap()
        .replace("spark-pi-dd77a5-exec-1", r"spark-pi-dd77a5\u002dexec\u002d1");
    let conventions = Conventions::default();
    let review = Review::decode(bytes.as_bytes()).unwrap();
    let Action::Place(executor) = Action::of(&review, &conventions) else { panic!() };
    assert_eq!(executor.key, "spark-pi-dd77a5-exec-1");
}

#[test]
fn counts_do_not_fall_below_zero() {
    let mut counts = Counts::default();
    counts.remove(Capacity::Spot);
    assert_eq!(counts, Counts::default());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(10_000))]
    #[test]
    fn no_mutation_of_a_real_review_panics(at in any::<prop::sample::Index>(), byte: u8, cut in prop::option::of(any::<prop::sample::Index>()), splice in prop::option::of("[\\[\\]{}\",:0-9a-z\\\\]{0,6}")) {
        let mut bytes = CREATE_1_36.to_vec();
        let index = at.index(bytes.len());
        match splice {
            Some(text) => { bytes.splice(index..index, text.bytes()); }
            None => bytes[index] = byte,
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        let conventions = Conventions::default();
        if let Ok(review) = Review::decode(&bytes)
            && let Action::Place(executor) = Action::of(&review, &conventions)
        {
            let mut reply = Reply::allow(review.uid());
            reply.patch = conventions.profile().apply(executor.pod, Capacity::OnDemand, executor.placeholder, &Spread::default());
            let _: Value = serde_json::from_slice(&reply.encode()).unwrap();
        }
    }
}
