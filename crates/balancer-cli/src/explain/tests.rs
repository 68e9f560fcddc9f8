//! What is said about a pod in each state.

use k8s_openapi::api::core::v1;
use serde_json::{Value, json};

use crate::snapshot::Snapshot;
use crate::snapshot::testing::{
    core_pod, driver, event, on_node, placed, pod, running, settings, snapshot, time, untouched, without_rights,
};

use super::words::{Explanation, Outcome};

/// Explains a pod of a job of `d`.
fn explain(snapshot: &Snapshot, pod: &Value) -> Explanation {
    let mut snapshot = snapshot.clone();
    for (key, known) in Snapshot::by_name([core_pod(pod)]) {
        snapshot.pods.entry(key).or_insert(known);
    }
    let pod: v1::Pod = serde_json::from_value(pod.clone()).expect("a pod");
    Explanation::of(&snapshot, &pod).expect("an explanation")
}

fn text(explanation: &Explanation) -> String {
    let mut out = Vec::new();
    explanation.write(&mut out, false).expect("written");
    String::from_utf8(out).expect("text")
}

/// Fails unless the pod has this outcome, and each of the texts is in the explanation.
#[track_caller]
fn check(snapshot: &Snapshot, pod: &Value, outcome: Outcome, texts: &[&str]) -> String {
    let explanation = explain(snapshot, pod);
    let text = text(&explanation);
    assert_eq!(explanation.outcome, outcome, "{text}");
    for expected in texts {
        assert!(text.contains(expected), "{expected:?} is missing in\n{text}");
    }
    text
}

fn ratio(ratio: &str) -> Value {
    driver(json!({"workload/spot-ratio": ratio}))
}

#[test]
fn a_running_executor_is_explained_from_its_job_to_what_would_change_it() {
    let snapshot = snapshot(&[ratio("0.7"), running("b", "on-demand", "o1")]);
    let expected = "\
Pod etl/a

Job:
  Executor of the job j, which d drives.

Policy:
  70% of the executors on spot: the annotation workload/spot-ratio on the driver d.

Decision:
  To spot: the webhook wrote the annotation workload/capacity-type: spot.
  It added that the node must have karpenter.sh/capacity-type in (spot).
  The job now has 1 on spot and 1 on on-demand, pending ones included; 70% would be 1.4 on spot (distance 0).

Now:
  Running on the node s1 (spot, m6i.xlarge in a).

To change it:
  Another ratio (workload/spot-ratio on d) applies to new executors. This executor stays as it is until it ends.
";
    assert_eq!(check(&snapshot, &running("a", "spot", "s1"), Outcome::Placed, &[]), expected);
}

#[test]
fn a_pending_executor_tells_the_schedulers_and_the_autoscalers_last_words() {
    let mut waiting = placed("a", "spot");
    waiting["status"]["conditions"] = json!([{
        "type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes are\n available",
        "lastTransitionTime": "2026-01-01T11:57:00Z",
    }]);
    let mut snapshot = snapshot(&[ratio("0.7")]);
    snapshot.events = Some(vec![
        event("a", "default-scheduler", "FailedScheduling", "an older reason", "2026-01-01T11:51:00Z"),
        event("a", "default-scheduler", "FailedScheduling", "0/3 nodes", "2026-01-01T11:58:00Z"),
        event("a", "karpenter", "FailedScheduling", "no instance type", "2026-01-01T11:59:00Z"),
        event("a", "kubelet", "Pulled", "an image", "2026-01-01T11:59:30Z"),
        event("b", "karpenter", "FailedScheduling", "another pod", "2026-01-01T11:59:30Z"),
    ]);
    let text = check(
        &snapshot,
        &waiting,
        Outcome::Placed,
        &[
            "Pending for 10m.",
            "The scheduler finds no node for 3m: 0/3 nodes are available",
            "FailedScheduling 2m ago, by default-scheduler: 0/3 nodes",
            "FailedScheduling 60s ago, by karpenter: no instance type",
            "It waits for spot for any time. With workload/spot-fallback-seconds on d executors that find no spot are replaced",
        ],
    );
    for other in ["an older reason", "an image", "another pod"] {
        assert!(!text.contains(other), "{text}");
    }
}

#[test]
fn a_node_on_its_way_and_a_scheduling_gate_are_told() {
    let mut nominated = placed("a", "spot");
    nominated["status"]["nominatedNodeName"] = json!("s9");
    check(&snapshot(&[ratio("1")]), &nominated, Outcome::Placed, &["Pending for 10m, and the node s9 is on its way."]);
    let mut gated = placed("a", "spot");
    gated["spec"]["schedulingGates"] = json!([{"name": "queue"}]);
    check(&snapshot(&[ratio("1")]), &gated, Outcome::Placed, &["Pending for 10m, and held by a scheduling gate."]);
}

/// With a limit of executors per node, and a preference against an instance type.
fn spread(selector: &Value, preferred: &[Value]) -> Value {
    let mut pod = running("a", "spot", "s1");
    pod["spec"]["topologySpreadConstraints"] = json!([
        {
            "topologyKey": "kubernetes.io/hostname", "whenUnsatisfiable": "DoNotSchedule", "maxSkew": 3,
            "minDomains": 10_000, "labelSelector": {"matchLabels": selector},
        },
        {"topologyKey": "topology.kubernetes.io/zone", "whenUnsatisfiable": "DoNotSchedule", "maxSkew": 5},
    ]);
    pod["spec"]["tolerations"] = json!([
        {"key": "kubernetes.azure.com/scalesetpriority", "operator": "Equal", "value": "spot", "effect": "NoSchedule"},
        {"key": "mine", "operator": "Exists"},
    ]);
    pod["spec"]["affinity"]["nodeAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"] =
        json!([{"weight": 100, "preference": {"matchExpressions": preferred}}]);
    pod
}

#[test]
fn what_the_webhook_wrote_beside_the_capacity_is_told_and_what_the_pod_has_itself_is_not() {
    let avoided = json!({"key": "node.kubernetes.io/instance-type", "operator": "NotIn", "values": ["m6i.xlarge"]});
    let spot = json!({"key": "kubernetes.azure.com/scalesetpriority", "operator": "In", "values": ["spot"]});
    let mut snapshot = snapshot(&[ratio("1")]);
    snapshot.settings = settings(&[("SPOT_PREFERENCE", "STRICT"), ("CAPACITY_PROFILE", "aks")]);
    let ours = spread(&json!({"spark-app-selector": "j", "spark-role": "executor"}), &[spot, avoided.clone()]);
    let texts = [
        "At most 3 of the job's executors may be on one node.",
        "It rather avoids m6i.xlarge:",
        "It tolerates kubernetes.azure.com/scalesetpriority=spot:NoSchedule.",
    ];
    let text = check(&snapshot, &ours, Outcome::Placed, &texts);
    assert!(!text.contains("At most 5") && !text.contains("mine"), "{text}");
    let text = check(&snapshot, &spread(&json!({"team": "etl"}), &[avoided]), Outcome::Placed, &[]);
    assert!(!text.contains("At most") && !text.contains("avoids"), "{text}");
}

#[test]
fn an_executor_that_prefers_spot_may_run_on_on_demand() {
    let mut preferred = untouched("a");
    preferred["metadata"]["annotations"] = json!({"workload/capacity-type": "spot"});
    let mut snapshot = snapshot(&[ratio("1")]);
    snapshot.settings = settings(&[]);
    check(
        &snapshot,
        &on_node(preferred, "o1"),
        Outcome::Placed,
        &[
            "It added no requirement: the pod prefers spot, and may run on on-demand too (BEST_EFFORT).",
            "It was sent to spot and runs on on-demand, so it counts as on-demand.",
        ],
    );
}

#[test]
fn an_executor_that_requires_a_capacity_itself_is_left_alone() {
    let mut fixed = on_node(untouched("a"), "o1");
    fixed["spec"]["nodeSelector"] = json!({"karpenter.sh/capacity-type": "on-demand"});
    let explanation = explain(&snapshot(&[ratio("1")]), &fixed);
    assert_eq!(explanation.capacity, Some("on-demand"));
    check(
        &snapshot(&[ratio("1")]),
        &fixed,
        Outcome::Fixed,
        &[
            "To on-demand, by the pod itself: it requires karpenter.sh/capacity-type in (on-demand).",
            "No capacity in the nodeSelector or affinity of the executor's template.",
        ],
    );
}

#[test]
fn who_has_opted_an_executor_out_is_told() {
    let mut own = untouched("a");
    own["metadata"]["annotations"] = json!({"workload/spot-ratio": "off"});
    let job = snapshot(&[ratio("1")]);
    check(&job, &own, Outcome::OptedOut, &["its own annotation workload/spot-ratio is off"]);
    let off = snapshot(&[ratio("off")]);
    check(
        &off,
        &untouched("a"),
        Outcome::OptedOut,
        &["Opted out (off)", "the annotation workload/spot-ratio of d is off"],
    );
    let mut none = snapshot(&[driver(json!({}))]);
    none.settings = settings(&[("DEFAULT_SPOT_RATIO", "none")]);
    check(&none, &untouched("a"), Outcome::OptedOut, &["d states no ratio, and DEFAULT_SPOT_RATIO is none"]);
}

#[test]
fn an_executor_that_no_webhook_has_placed_gets_the_possible_causes() {
    let mut snapshot = snapshot(&[ratio("1")]);
    check(
        &snapshot,
        &untouched("a"),
        Outcome::NotPlaced,
        &[
            "it has no annotation workload/capacity-type, so no webhook has placed it.",
            "it was created before Spot Balancer was installed; the webhook did not answer",
        ],
    );
    snapshot.registered = Some(time("2026-01-01T11:55:00Z"));
    let text =
        check(&snapshot, &untouched("a"), Outcome::NotPlaced, &["It was created before the webhook was registered."]);
    assert!(!text.contains("Possible causes"), "{text}");
    snapshot.registered = Some(time("2026-01-01T11:00:00Z"));
    let text = check(&snapshot, &untouched("a"), Outcome::NotPlaced, &["Possible causes: the webhook did not answer"]);
    assert!(!text.contains("before Spot Balancer was installed"), "{text}");
    check(&snapshot, &on_node(untouched("a"), "s1"), Outcome::NotPlaced, &["It was created with a nodeName"]);
}

#[test]
fn a_namespace_that_is_not_sent_to_the_webhook_explains_its_pods() {
    let mut snapshot = snapshot(&[ratio("1")]);
    snapshot.is_selected = Some(false);
    for (pod, outcome) in [(untouched("a"), Outcome::NotPlaced), (ratio("1"), Outcome::Driver)] {
        let text = check(&snapshot, &pod, outcome, &["The namespace is not sent to the webhook", "namespaces.names"]);
        assert!(!text.contains("Possible causes") && !text.contains("follow an edit"), "{text}");
    }
    snapshot.is_selected = Some(true);
    let causes = ["Possible causes", "the namespace was not sent to it then"];
    let text = check(&snapshot, &untouched("a"), Outcome::NotPlaced, &causes);
    assert!(!text.contains("not sent to the webhook"), "{text}");
}

#[test]
fn a_pod_that_owns_executors_is_explained_as_the_one_that_drives_their_job() {
    let mut notebook = ratio("0.25");
    notebook["metadata"]["labels"] = json!({"app": "notebook"});
    let texts = [
        "It owns the executors of the job j, which has no driver pod",
        "25% of the executors on spot: the annotation workload/spot-ratio on d, which owns the executors.",
        "It is not placed itself.",
        "an edit applies to new sessions",
    ];
    check(&snapshot(&[notebook.clone(), placed("a", "spot")]), &notebook, Outcome::Owner, &texts);
    check(&snapshot(std::slice::from_ref(&notebook)), &notebook, Outcome::OtherRole, &["it has no label spark-role"]);
}

#[test]
fn an_event_about_an_annotation_is_a_warning_only_while_it_has_that_value() {
    let (_, invalid) = settings(&[]).conventions.overrides(&core_pod(&ratio("7")));
    let invalid = format!("workload/spot-ratio: {}; still using 0.5", invalid[0]);
    let without = "workload/spot-ratio: 0.7, workload/on-demand-base: 0 has no effect, because the executors' own";
    let warned = |ratio_now: &str| {
        let mut snapshot = snapshot(&[ratio(ratio_now)]);
        snapshot.events = Some(vec![
            event("d", "spot-balancer", "InvalidSpotRatio", &invalid, "2026-01-01T11:58:00Z"),
            event("d", "spot-balancer", "SpotRatioWithoutEffect", without, "2026-01-01T11:59:00Z"),
        ]);
        let text = text(&explain(&snapshot, &running("a", "spot", "s1")));
        ["InvalidSpotRatio", "SpotRatioWithoutEffect"].map(|reason| text.contains(reason))
    };
    assert_eq!(warned("7"), [true, true], "the ratio that is used instead is not known");
    assert_eq!(warned("8"), [false, true]);
    assert_eq!(warned("0.7"), [false, true]);
    assert_eq!(warned("0.75"), [false, false]);
}

#[test]
fn what_helps_an_executor_depends_on_what_it_waits_for() {
    let best_effort = |pod: &Value| {
        let mut snapshot = snapshot(&[ratio("0.7")]);
        snapshot.settings = settings(&[]);
        text(&explain(&snapshot, pod))
    };
    let again = "If it is deleted, its driver may request another executor, which is placed anew.";
    let text = best_effort(&placed("a", "spot"));
    assert!(text.contains("a node of either that has room for it helps") && text.contains(again), "{text}");
    let text = best_effort(&placed("a", "on-demand"));
    assert!(text.contains("an on-demand node that has room for it helps") && text.contains(again), "{text}");
    let mut failed = placed("a", "spot");
    failed["status"]["phase"] = json!("Failed");
    let mut leaving = placed("a", "spot");
    leaving["metadata"]["deletionTimestamp"] = json!("2026-01-01T12:00:00Z");
    for pod in [failed, leaving] {
        let text = best_effort(&pod);
        assert!(!text.contains("helps") && !text.contains(again) && !text.contains("stays as it is"), "{text}");
    }
}

#[test]
fn what_the_scheduler_says_in_the_pod_and_in_an_event_is_told_once() {
    let mut waiting = placed("a", "spot");
    waiting["status"]["conditions"] = json!([{
        "type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes are available",
    }]);
    let mut snapshot = snapshot(&[ratio("0.7")]);
    snapshot.events = Some(vec![event(
        "a",
        "default-scheduler",
        "FailedScheduling",
        "0/3 nodes are available",
        "2026-01-01T11:58:00Z",
    )]);
    let text = check(&snapshot, &waiting, Outcome::Placed, &["The scheduler finds no node"]);
    assert_eq!(text.matches("0/3 nodes are available").count(), 1, "{text}");
}

#[test]
fn a_webhook_that_leaves_no_mark_is_told() {
    let mut snapshot = snapshot(&[ratio("1")]);
    snapshot.settings = settings(&[("DECISION_ANNOTATION", "")]);
    let mut selecting = untouched("a");
    selecting["spec"]["nodeSelector"] = json!({"karpenter.sh/capacity-type": "spot"});
    check(&snapshot, &selecting, Outcome::NotRecorded, &["DECISION_ANNOTATION", "by itself or because of the webhook"]);
}

#[test]
fn pods_that_are_no_executors_of_a_job_say_why() {
    let snapshot = snapshot(&[ratio("1")]);
    check(&snapshot, &pod("h", "history"), Outcome::OtherRole, &["its label spark-role is \"history\""]);
    let mut plain = pod("p", "x");
    plain["metadata"]["labels"] = json!({});
    check(&snapshot, &plain, Outcome::OtherRole, &["it has no label spark-role"]);
    let mut without_id = untouched("a");
    without_id["metadata"]["labels"] = json!({"spark-role": "executor"});
    check(
        &snapshot,
        &without_id,
        Outcome::NoJobId,
        &["an executor without a job id (label emr-containers.amazonaws.com/job.id or spark-app-selector)"],
    );
}

#[test]
fn a_driver_is_explained_by_its_policy() {
    let driver = on_node(driver(json!({"workload/spot-ratio": "0.7", "workload/on-demand-base": "2"})), "o1");
    check(
        &snapshot(std::slice::from_ref(&driver)),
        &driver,
        Outcome::Driver,
        &[
            "It drives the job j.",
            "70% of the executors on spot: the annotation workload/spot-ratio on the driver d.",
            "The first 2 executors go to on-demand",
            "It may run on spot, and its job ends if its node is reclaimed.",
            "Running on the node o1 (on-demand",
        ],
    );
}

#[test]
fn the_source_of_every_policy_is_told() {
    let of = |snapshot: &Snapshot, texts: &[&str]| {
        check(snapshot, &placed("a", "spot"), Outcome::Placed, texts);
    };
    of(
        &snapshot(&[driver(json!({}))]),
        &["50% of the executors on spot: the default of the installation, because d states none."],
    );
    of(
        &without_rights(&[driver(json!({}))]),
        &["An unknown ratio: the default of the installation, which was not read"],
    );
    of(&snapshot(&[]), &["An unknown ratio: no live pod that drives the job was found."]);
    of(&snapshot(&[ratio("7")]), &["An invalid ratio: d states it", "workload/spot-ratio: \"7\" is outside 0 to 1"]);
    let mut owner = ratio("0.25");
    owner["metadata"]["labels"] = json!({"app": "notebook"});
    of(
        &snapshot(&[owner]),
        &["25% of the executors on spot: the annotation workload/spot-ratio on d, which owns the executors."],
    );
    let mut own = placed("a", "spot");
    own["metadata"]["annotations"]["workload/spot-ratio"] = json!("1");
    let texts = ["The executor states workload/spot-ratio: 1 itself, which comes first."];
    check(&snapshot(&[ratio("0.5")]), &own, Outcome::Placed, &texts);
}

#[test]
fn a_closed_spot_explains_who_went_to_on_demand_and_who_probes() {
    let starved = driver(json!({"workload/spot-ratio": "0.5", "workload/spot-fallback-seconds": "60"}));
    let mut snapshot = snapshot(&[starved]);
    snapshot.events = Some(vec![event("d", "spot-balancer", "SpotClosed", "2 executors", "2026-01-01T11:40:00.7Z")]);
    check(
        &snapshot,
        &running("a", "on-demand", "o1"),
        Outcome::Placed,
        &[
            "An executor that finds no spot for 60 s is replaced on on-demand.",
            "Spot was closed to the job when it was created",
            "SpotClosed 20m ago, by spot-balancer: 2 executors",
            "Spot opens by itself: every 300 s one executor tries spot",
        ],
    );
    check(
        &snapshot,
        &placed("a", "spot"),
        Outcome::Placed,
        &[
            "this executor probes whether there is spot again",
            "If it finds no spot for 60 s, it is replaced on on-demand.",
        ],
    );
    let at = |created: &str| {
        let mut pod = running("a", "on-demand", "o1");
        pod["metadata"]["creationTimestamp"] = created.into();
        pod
    };
    check(
        &snapshot,
        &at("2026-01-01T11:39:59Z"),
        Outcome::Placed,
        &["Spot was closed to the job after it was created."],
    );
    let texts = ["Spot was closed to the job in the second in which it was created."];
    check(&snapshot, &at("2026-01-01T11:40:00Z"), Outcome::Placed, &texts);
    let reopened = event("d", "spot-balancer", "SpotReopened", "an executor", "2026-01-01T11:45:00Z");
    snapshot.events.get_or_insert_default().push(reopened);
    let text = check(&snapshot, &running("a", "on-demand", "o1"), Outcome::Placed, &["SpotReopened 15m ago"]);
    assert!(!text.contains("SpotClosed") && !text.contains("Spot was closed"), "{text}");
}

#[test]
fn a_pod_that_has_ended_or_is_leaving_does_not_count() {
    let mut failed = running("a", "spot", "s1");
    failed["status"] = json!({"phase": "Failed", "reason": "Evicted", "message": "the node was low on memory"});
    let snapshot = snapshot(&[ratio("1")]);
    check(
        &snapshot,
        &failed,
        Outcome::Placed,
        &["It has failed (Evicted): the node was low on memory. It does not count"],
    );
    let mut leaving = running("a", "spot", "s1");
    leaving["metadata"]["deletionTimestamp"] = json!("2026-01-01T12:00:00Z");
    check(&snapshot, &leaving, Outcome::Placed, &["It is being deleted, and does not count any more."]);
}

#[test]
fn a_caller_who_may_only_read_pods_is_told_what_is_not_known() {
    let snapshot = without_rights(&[ratio("0.5")]);
    check(
        &snapshot,
        &running("a", "spot", "s1"),
        Outcome::Placed,
        &["Running on the node s1 (whose capacity may not be read)."],
    );
    check(
        &snapshot,
        &placed("a", "spot"),
        Outcome::Placed,
        &["Why is not known here, because Events may not be read."],
    );
}

#[test]
fn the_fields_of_an_explanation_in_json_are_stable() {
    let explanation = explain(&snapshot(&[ratio("0.5")]), &running("a", "spot", "s1"));
    let mut json = serde_json::to_value(&explanation).expect("JSON");
    let steps = json.as_object_mut().and_then(|fields| fields.remove("steps")).expect("steps");
    assert_eq!(steps[0], json!({"about": "job", "text": "Executor of the job j, which d drives."}));
    assert_eq!(
        json,
        json!({
            "namespace": "etl", "pod": "a", "outcome": "placed", "job": "j", "driver": "d", "capacity": "spot",
            "node": "s1", "nodeCapacity": "spot", "missing": [],
            "settings": {
                "capacityProfile": "karpenter", "from": "deployment", "namespace": "spot-balancer",
                "name": "spot-balancer-webhook",
            },
        })
    );
}

#[test]
fn an_executor_with_a_generated_name_that_requires_a_capacity_itself_is_left_alone() {
    let mut generated = on_node(untouched("a"), "s1");
    generated["metadata"]["generateName"] = json!("a-");
    generated["metadata"]["annotations"] = json!({"workload/capacity-type": "spot/id-1"});
    let spot = json!({"key": "karpenter.sh/capacity-type", "operator": "In", "values": ["spot"]});
    generated["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"] =
        json!({"nodeSelectorTerms": [{"matchExpressions": [spot]}]});
    check(&snapshot(&[ratio("1")]), &generated, Outcome::Fixed, &["To spot, by the pod itself"]);
}

#[test]
fn nothing_that_others_have_written_controls_a_terminal() {
    let mut snapshot = snapshot(&[ratio("1\u{1b}[31m")]);
    snapshot.events = Some(vec![event(
        "a",
        "karp\u{1b}[1menter",
        "Failed\u{7}",
        "\u{1b}]0;title\u{7} no\tspot",
        "2026-01-01T11:59:00Z",
    )]);
    let mut waiting = placed("a", "spot");
    waiting["metadata"]["annotations"] = json!({"workload/capacity-type": "spot/\u{9b}2J"});
    let text = check(
        &snapshot,
        &waiting,
        Outcome::Placed,
        &["Failed? 60s ago, by karp?[1menter: ?]0;title? no spot", "spot/?2J"],
    );
    assert!(!text.contains(|c: char| c.is_control() && c != '\n'), "{text:?}");
}

#[test]
fn the_message_of_a_pod_that_has_ended_is_one_line_that_ends() {
    let mut failed = running("a", "spot", "s1");
    failed["status"] = json!({"phase": "Failed", "reason": "Evicted\u{1b}[2J", "message": format!("low on\nmemory\u{1b}[0m {}", "x".repeat(9999))});
    let text = check(
        &snapshot(&[ratio("1")]),
        &failed,
        Outcome::Placed,
        &["It has failed (Evicted?[2J): low on memory?[0m xxx"],
    );
    assert!(text.contains("x…. It does not count any more.") && text.len() < 2000, "{text}");
}
