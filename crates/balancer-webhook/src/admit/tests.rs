//! Admissions with the memory store, and without a real cluster.

use super::*;

use std::time::Duration;

use balancer_core::{Capacity, DriverCapacity, Ratio, SpotPreference, SpotRatio, Steer, Term};
use balancer_store::MemoryLedger;
use base64::Engine;
use http::{Request, Response};
use kube::client::Body;
use prometheus_client::registry::Registry;
use serde_json::{Value, json};
use tower_test::mock::Handle;

use crate::drivers::DriverSource;
use crate::metrics::{LookupOutcome, OperationLabel, OutcomeLabel, PlacementSource, PolicySource, RoleLabel};
use crate::server_version::Version;

/// An admission without a cluster, so that no job has a driver, with this limit of new jobs per namespace.
fn admission(new_jobs_per_minute: u32) -> Admission<MemoryLedger> {
    Admission {
        ledger: Arc::new(MemoryLedger::new(Duration::from_secs(3600))),
        drivers: DriverLookup::new(DriverSource::None, Duration::from_secs(1)),
        new_jobs: NewJobs::new(new_jobs_per_minute, Instant::now()),
        conventions: Arc::default(),
        defaults: Policy::default(),
        server_version: Arc::default(),
        metrics: Arc::new(Metrics::register(&mut Registry::default())),
    }
}

/// The creation of a pod of this role, which states this ratio.
fn creation(namespace: &str, job: &str, name: &str, role: &str, ratio: Option<&str>) -> Value {
    let labels = json!({
        "spark-role": role, "spark-app-selector": job, "spark-exec-id": name.rsplit('-').next().unwrap_or_default(),
    });
    let annotations = ratio.map(|ratio| json!({"workload/spot-ratio": ratio}));
    json!({
        "apiVersion": "admission.k8s.io/v1",
        "kind": "AdmissionReview",
        "request": {
            "uid": name,
            "kind": {"group": "", "version": "v1", "kind": "Pod"},
            "resource": {"group": "", "version": "v1", "resource": "pods"},
            "namespace": namespace,
            "operation": "CREATE",
            "object": {
                "metadata": {"name": name, "labels": labels, "annotations": annotations},
                "spec": {"containers": [{"name": "spark"}]},
            },
        },
    })
}

fn executor(namespace: &str, job: &str, id: u32) -> Value {
    creation(namespace, job, &format!("{job}-exec-{id}"), "executor", None)
}

fn driver(namespace: &str, job: &str, ratio: &str) -> Value {
    creation(namespace, job, &format!("{job}-driver"), "driver", Some(ratio))
}

/// Returns the response.
async fn send(admission: &Admission<MemoryLedger>, review: &Value) -> Value {
    let reply = admission.answer(Hook::Mutate, review.to_string().as_bytes()).await.expect("a valid review");
    let mut reply: Value = serde_json::from_slice(&reply).expect("a reply in JSON");
    assert_eq!(reply["response"]["allowed"], true, "{reply}");
    reply["response"].take()
}

async fn jobs(admission: &Admission<MemoryLedger>) -> usize {
    admission.ledger.list_jobs(None).await.expect("a page").jobs.len()
}

/// The counts of a job, spot and on-demand.
async fn counts(admission: &Admission<MemoryLedger>, namespace: &str, job: &str) -> Option<(u64, u64)> {
    let ledger = admission.ledger.get(JobRef { namespace, app_id: job }).await.expect("no error in memory");
    ledger.map(|ledger| (ledger.counts().spot, ledger.counts().on_demand))
}

/// How many pods of this role were created with this outcome.
fn created(admission: &Admission<MemoryLedger>, role: RoleLabel, outcome: OutcomeLabel) -> u64 {
    admission.metrics.admissions(AdmissionLabels { role, operation: OperationLabel::Create, outcome })
}

/// Names this many new jobs of a namespace, each with one executor.
async fn flood(admission: &Admission<MemoryLedger>, namespace: &str, jobs: u32) {
    for job in 0..jobs {
        send(admission, &executor(namespace, &format!("new-{job}"), 1)).await;
    }
}

#[tokio::test]
async fn a_namespace_over_its_limit_gets_no_more_ledgers_and_its_known_jobs_keep_their_ratio() {
    let admission = admission(10);
    send(&admission, &driver("hostile", "known", "0.7")).await;
    for id in 1..=5 {
        send(&admission, &executor("hostile", "known", id)).await;
    }
    flood(&admission, "hostile", 200).await;
    assert_eq!(jobs(&admission).await, 10);
    let placed = |capacity: Capacity, source| admission.metrics.placements(capacity, source);
    // The fallback formula sends a job's first executor to spot.
    assert_eq!(placed(Capacity::Spot, PlacementSource::NewJobLimit), 191);
    assert_eq!(placed(Capacity::Spot, PlacementSource::Fallback), 0);
    for id in 6..=10 {
        send(&admission, &executor("hostile", "known", id)).await;
    }
    assert_eq!(counts(&admission, "hostile", "known").await, Some((7, 3)));
}

#[tokio::test(start_paused = true)]
async fn the_default_after_a_busy_lookup_is_used_and_not_stored() {
    let (service, _silent) = tower_test::mock::pair::<http::Request<Body>, http::Response<Body>>();
    let client = kube::Client::new(service, "default");
    let drivers = DriverSource::Cluster { client, conventions: Arc::default() };
    let admission = Admission { drivers: DriverLookup::new(drivers, Duration::from_secs(1)), ..admission(1000) };
    let reviews: Vec<_> = (0..50).map(|job| executor("etl", &format!("job-{job}"), 1)).collect();
    futures::future::join_all(reviews.iter().map(|review| send(&admission, review))).await;
    assert_eq!(admission.metrics.lookups(LookupOutcome::Busy), 48);
    assert_eq!(admission.metrics.placements(Capacity::Spot, PlacementSource::Ledger), 50);
    for job in 0..50 {
        let app_id = format!("job-{job}");
        let ledger = admission.ledger.get(JobRef { namespace: "etl", app_id: &app_id }).await;
        let ledger = ledger.expect("no error in memory").expect("a ledger");
        assert_eq!((ledger.counts().spot, ledger.policy()), (1, None));
    }
}

#[tokio::test]
async fn other_namespaces_notice_nothing_of_one_over_its_limit() {
    let admission = admission(10);
    flood(&admission, "hostile", 200).await;
    send(&admission, &driver("etl", "job", "0.7")).await;
    for id in 1..=10 {
        send(&admission, &executor("etl", "job", id)).await;
    }
    assert_eq!(counts(&admission, "etl", "job").await, Some((7, 3)));
}

#[tokio::test]
async fn the_formula_keeps_the_ratio_that_the_executors_of_a_job_over_the_limit_state() {
    let admission = admission(1);
    flood(&admission, "etl", 1).await;
    for id in 1..=10 {
        let name = format!("over-exec-{id}");
        send(&admission, &creation("etl", "over", &name, "executor", Some("0.7"))).await;
    }
    let placed = |capacity: Capacity| admission.metrics.placements(capacity, PlacementSource::NewJobLimit);
    assert_eq!((placed(Capacity::Spot), placed(Capacity::OnDemand)), (7, 3));
    assert_eq!(counts(&admission, "etl", "over").await, None);
}

#[tokio::test]
async fn the_policy_of_a_driver_over_the_limit_is_not_recorded() {
    let admission = admission(1);
    send(&admission, &driver("etl", "first", "0.7")).await;
    send(&admission, &driver("etl", "second", "0.7")).await;
    assert_eq!(jobs(&admission).await, 1);
    let drivers = |outcome| created(&admission, RoleLabel::Driver, outcome);
    assert_eq!((drivers(OutcomeLabel::PolicyRecorded), drivers(OutcomeLabel::NewJobLimit)), (1, 1));
    // The driver of a known job is recorded as ever.
    send(&admission, &driver("etl", "first", "0.3")).await;
    assert_eq!(drivers(OutcomeLabel::PolicyRecorded), 2);
}

#[tokio::test]
async fn dry_runs_do_not_count_as_new_jobs() {
    let admission = admission(2);
    for job in 0..10 {
        let mut review = executor("etl", &format!("dry-{job}"), 1);
        review["request"]["dryRun"] = true.into();
        send(&admission, &review).await;
    }
    flood(&admission, "etl", 2).await;
    assert_eq!(jobs(&admission).await, 2);
}

fn off() -> Policy {
    Policy { spot_ratio: SpotRatio::Off, ..Policy::DEFAULT }
}

/// The same admission, with settings that change every pod that is not opted out.
fn pinning(admission: Admission<MemoryLedger>) -> Admission<MemoryLedger> {
    let conventions = Conventions {
        driver_capacity: DriverCapacity::OnDemand,
        protect_drivers: true,
        spot_preference: SpotPreference::Strict,
        ..Conventions::default()
    };
    Admission { conventions: Arc::new(conventions), ..admission }
}

#[tokio::test]
async fn an_executor_that_opts_out_is_left_unchanged_and_not_counted() {
    let admission = pinning(admission(10));
    send(&admission, &driver("etl", "job", "1")).await;
    for off in ["off", "OFF "] {
        let response = send(&admission, &creation("etl", "job", "job-exec-1", "executor", Some(off))).await;
        assert!(response["patch"].is_null() && response["warnings"].is_null(), "{response}");
    }
    assert_eq!(counts(&admission, "etl", "job").await, Some((0, 0)));
    assert_eq!(created(&admission, RoleLabel::Executor, OutcomeLabel::OptedOut), 2);
}

#[tokio::test]
async fn an_executor_that_another_webhook_opts_out_after_its_placement_leaves_the_ledger() {
    let admission = pinning(admission(10));
    send(&admission, &driver("etl", "job", "1")).await;
    let mut review = executor("etl", "job", 1);
    let before = review["request"]["object"].clone();
    let response = send(&admission, &review).await;
    patch(&mut review, &response);
    assert_eq!(review["request"]["object"]["spec"]["nodeSelector"]["karpenter.sh/capacity-type"], "spot");
    assert_eq!(counts(&admission, "etl", "job").await, Some((1, 0)));

    review["request"]["object"]["metadata"]["annotations"]["workload/spot-ratio"] = "off".into();
    review["request"]["dryRun"] = true.into();
    let response = send(&admission, &review).await;
    assert!(response["patch"].is_string(), "{response}");
    assert_eq!(counts(&admission, "etl", "job").await, Some((1, 0)));
    review["request"]["dryRun"] = false.into();
    assert_eq!(send(&admission, &review).await["patch"], response["patch"]);
    assert_eq!(counts(&admission, "etl", "job").await, Some((0, 0)));
    assert_eq!(created(&admission, RoleLabel::Executor, OutcomeLabel::OptedOut), 1);

    patch(&mut review, &response);
    let after = &review["request"]["object"];
    // The role's selector could be the pod's own.
    assert_eq!(after["spec"]["nodeSelector"], json!({"spark-role": "executor"}));
    assert_eq!(after["metadata"]["annotations"], json!({"workload/spot-ratio": "off"}));
    assert_eq!(after["spec"]["containers"], before["spec"]["containers"]);
    assert!(send(&admission, &review).await["patch"].is_null(), "a third call changes nothing");
    assert_eq!(counts(&admission, "etl", "job").await, Some((0, 0)));
}

/// Applies the patch of a response to the pod of the review.
fn patch(review: &mut Value, response: &Value) {
    let patch = base64::engine::general_purpose::STANDARD.decode(response["patch"].as_str().expect("a patch"));
    let patch: json_patch::Patch = serde_json::from_slice(&patch.expect("base64")).expect("a JSON Patch");
    json_patch::patch(&mut review["request"]["object"], &patch).expect("it applies");
}

#[tokio::test]
async fn a_driver_that_opts_out_keeps_its_executors_and_itself_unchanged() {
    let admission = pinning(admission(10));
    let mut created_pods = vec![driver("etl", "job", "off")];
    created_pods.extend((1..=5).map(|id| executor("etl", "job", id)));
    for review in &created_pods {
        let response = send(&admission, review).await;
        assert!(response["patch"].is_null() && response["warnings"].is_null(), "{response}");
    }
    assert_eq!(counts(&admission, "etl", "job").await, Some((0, 0)));
    assert_eq!(created(&admission, RoleLabel::Driver, OutcomeLabel::PolicyRecorded), 1);
    assert_eq!(created(&admission, RoleLabel::Executor, OutcomeLabel::OptedOut), 5);
    // Its own ratio precedes the job's.
    let response = send(&admission, &creation("etl", "job", "job-exec-6", "executor", Some("1"))).await;
    assert!(response["patch"].is_string(), "{response}");
    assert_eq!(counts(&admission, "etl", "job").await, Some((1, 0)));
}

#[tokio::test]
async fn without_a_default_ratio_only_jobs_that_state_one_are_changed() {
    let admission = Admission { defaults: off(), ..pinning(admission(10)) };
    let silent = creation("etl", "silent", "silent-driver", "driver", None);
    for review in [silent, executor("etl", "silent", 1), executor("etl", "unknown", 1)] {
        let response = send(&admission, &review).await;
        assert!(response["patch"].is_null(), "{response}");
    }
    send(&admission, &driver("etl", "job", "0")).await;
    let response = send(&admission, &executor("etl", "job", 1)).await;
    assert!(response["patch"].is_string(), "{response}");
    assert_eq!(counts(&admission, "etl", "job").await, Some((0, 1)));
}

/// Their drivers may state one.
#[tokio::test(start_paused = true)]
async fn without_a_default_ratio_executors_whose_lookup_fails_are_left_unchanged_and_reported() {
    let (service, _silent) = tower_test::mock::pair::<http::Request<Body>, http::Response<Body>>();
    let client = kube::Client::new(service, "default");
    let drivers = DriverSource::Cluster { client, conventions: Arc::default() };
    let drivers = DriverLookup::new(drivers, Duration::from_secs(1));
    let admission = Admission { defaults: off(), drivers, ..admission(10) };
    for id in 1..=2 {
        let response = send(&admission, &executor("etl", "job", id)).await;
        assert!(response["patch"].is_null(), "{response}");
    }
    assert_eq!(created(&admission, RoleLabel::Executor, OutcomeLabel::LookupFailed), 2);
    // The store did not fail.
    assert_eq!(created(&admission, RoleLabel::Executor, OutcomeLabel::Degraded), 0);
    assert_eq!(created(&admission, RoleLabel::Executor, OutcomeLabel::OptedOut), 0);
    assert_eq!(jobs(&admission).await, 0);
}

#[tokio::test]
async fn a_flood_of_jobs_that_are_opted_out_gets_no_more_ledgers_than_others() {
    let admission = Admission { defaults: off(), ..admission(10) };
    flood(&admission, "hostile", 200).await;
    assert_eq!(jobs(&admission).await, 10);
    assert_eq!(created(&admission, RoleLabel::Executor, OutcomeLabel::OptedOut), 200);
}

#[tokio::test]
async fn a_driver_without_a_job_id_is_counted_and_nothing_is_recorded() {
    let admission = pinning(admission(10));
    let mut review = creation("etl", "", "connect-server-0", "connect-server", Some("0.3"));
    send(&admission, &review).await;
    assert_eq!(created(&admission, RoleLabel::Driver, OutcomeLabel::NoJobId), 1);
    review["request"]["object"]["metadata"]["annotations"]["workload/spot-ratio"] = "off".into();
    let response = send(&admission, &review).await;
    assert!(response["patch"].is_null(), "{response}");
    assert_eq!(created(&admission, RoleLabel::Driver, OutcomeLabel::OptedOut), 1);
    review["request"]["object"]["metadata"]["annotations"]["workload/spot-ratio"] = "much".into();
    let response = send(&admission, &review).await;
    assert_eq!(response["warnings"].as_array().map(Vec::len), Some(1), "{response}");
    assert_eq!(jobs(&admission).await, 0);
}

/// An API without drivers, which has one pod with this name, uid and ratio.
async fn owner_api(mut api: Handle<Request<Body>, Response<Body>>, name: &'static str, uid: &str, ratio: &str) {
    let pod = json!({"metadata": {"name": name, "uid": uid, "annotations": {"workload/spot-ratio": ratio}}});
    while let Some((request, answer)) = api.next_request().await {
        let is_get = request.uri().path().ends_with(&format!("/pods/{name}"));
        let body = if is_get { pod.clone() } else { json!({"items": []}) };
        answer.send_response(Response::new(Body::from(body.to_string().into_bytes())));
    }
}

fn with_api(admission: Admission<MemoryLedger>) -> (Admission<MemoryLedger>, Handle<Request<Body>, Response<Body>>) {
    let (service, api) = tower_test::mock::pair();
    let client = kube::Client::new(service, "default");
    let drivers = DriverSource::Cluster { client, conventions: Arc::clone(&admission.conventions) };
    (Admission { drivers: DriverLookup::new(drivers, Duration::from_secs(1)), ..admission }, api)
}

/// An executor with this owner.
fn owned(job: &str, id: u32, owner: &str, uid: &str) -> Value {
    let mut review = executor("etl", job, id);
    review["request"]["object"]["metadata"]["ownerReferences"] =
        json!([{"apiVersion": "v1", "kind": "Pod", "name": owner, "uid": uid, "controller": true}]);
    review
}

#[tokio::test]
async fn executors_of_a_pod_that_is_no_driver_get_the_ratio_of_that_pod() {
    let (admission, api) = with_api(admission(10));
    tokio::spawn(owner_api(api, "notebook-0", "uid-1", "0"));
    for id in 1..=4 {
        send(&admission, &owned("app", id, "notebook-0", "uid-1")).await;
    }
    assert_eq!(counts(&admission, "etl", "app").await, Some((0, 4)));
    assert_eq!(admission.metrics.lookups(LookupOutcome::Owner), 1);
    assert_eq!(admission.metrics.policies(PolicySource::Owner), 1);
}

#[tokio::test]
async fn executors_of_a_pod_that_opts_out_are_left_unchanged() {
    let (admission, api) = with_api(pinning(admission(1)));
    tokio::spawn(owner_api(api, "notebook-0", "uid-1", "off"));
    // The second job is over the limit, so only the lookup has its policy.
    for job in ["app", "over"] {
        for id in 1..=2 {
            let response = send(&admission, &owned(job, id, "notebook-0", "uid-1")).await;
            assert!(response["patch"].is_null(), "{response}");
        }
    }
    assert_eq!(counts(&admission, "etl", "app").await, Some((0, 0)));
    assert_eq!(counts(&admission, "etl", "over").await, None);
    assert_eq!(created(&admission, RoleLabel::Executor, OutcomeLabel::OptedOut), 4);
}

/// What an executor is warned of that states these values and has this nodeSelector.
async fn warnings(annotations: Value, selector: Value) -> Vec<String> {
    let admission = admission(10);
    let mut review = executor("etl", "job", 1);
    review["request"]["object"]["metadata"]["annotations"] = annotations;
    review["request"]["object"]["spec"]["nodeSelector"] = selector;
    let response = send(&admission, &review).await;
    serde_json::from_value(response["warnings"].clone()).unwrap_or_default()
}

#[tokio::test]
async fn a_ratio_that_the_executors_own_selector_contradicts_is_warned_of() {
    let (ratio, base) = ("workload/spot-ratio", "workload/on-demand-base");
    let on = |capacity: &str| json!({"karpenter.sh/capacity-type": capacity});
    for (annotations, capacity, warned) in [
        (json!({ratio: "0.7"}), "spot", Some("workload/spot-ratio: 0.7 has no effect")),
        (json!({ratio: "1", base: "2"}), "spot", Some("workload/on-demand-base: 2 has no effect")),
        (json!({ratio: "0.7"}), "on-demand", Some("workload/spot-ratio: 0.7 has no effect")),
        (json!({ratio: "1"}), "spot", None),
        (json!({ratio: "0", base: "2"}), "on-demand", None),
        (json!({}), "spot", None),
    ] {
        let warnings = warnings(annotations.clone(), on(capacity)).await;
        match warned {
            Some(begin) => {
                let [warning] = warnings.as_slice() else { panic!("{annotations} {capacity}: {warnings:?}") };
                assert!(warning.starts_with(begin) && warning.contains(capacity), "{warning}");
            }
            None => assert!(warnings.is_empty(), "{annotations} {capacity}: {warnings:?}"),
        }
    }
    assert!(warnings(json!({ratio: "0.7"}), json!({"disk": "nvme"})).await.is_empty());
}

/// The pod of a creation after the patch in the response.
fn patched(review: &Value, response: &Value) -> Value {
    let mut pod = review["request"]["object"].clone();
    let patch = base64::engine::general_purpose::STANDARD.decode(response["patch"].as_str().expect("a patch"));
    let patch: json_patch::Patch = serde_json::from_slice(&patch.expect("base64")).expect("a patch");
    json_patch::patch(&mut pod, &patch).expect("a patch for this pod");
    pod
}

#[tokio::test]
async fn an_unchanged_reinvocation_changes_nothing_and_a_later_requirement_moves_the_executor() {
    let admission = pinning(admission(10));
    send(&admission, &driver("etl", "job", "1")).await;
    let mut review = executor("etl", "job", 1);
    let response = send(&admission, &review).await;
    review["request"]["object"] = patched(&review, &response);
    let response = send(&admission, &review).await;
    assert!(response["patch"].is_null(), "{response}");
    assert_eq!(admission.metrics.placements(Capacity::Spot, PlacementSource::Existing), 1);
    assert_eq!(counts(&admission, "etl", "job").await, Some((1, 0)));
    // Another webhook adds a requirement.
    review["request"]["object"]["spec"]["nodeSelector"]["eks.amazonaws.com/capacityType"] = "ON_DEMAND".into();
    let response = send(&admission, &review).await;
    let pod = patched(&review, &response);
    assert!(pod["spec"]["nodeSelector"]["karpenter.sh/capacity-type"].is_null(), "{pod}");
    assert_eq!(pod["metadata"]["annotations"]["workload/capacity-type"], "on-demand");
    assert_eq!(admission.metrics.placements(Capacity::OnDemand, PlacementSource::Required), 1);
    assert_eq!(counts(&admission, "etl", "job").await, Some((0, 1)));
}

#[tokio::test]
async fn every_creation_of_a_driver_that_is_not_opted_out_is_patched() {
    let admission = pinning(admission(10));
    let mut review = driver("etl", "job", "0.7");
    let server = creation("etl", "", "connect-server-0", "connect-server", Some("0.7"));
    let mut dry_run = driver("etl", "job", "0.7");
    dry_run["request"]["dryRun"] = true.into();
    for review in [&review, &server, &dry_run] {
        let pod = patched(review, &send(&admission, review).await);
        assert_eq!(pod["spec"]["nodeSelector"]["karpenter.sh/capacity-type"], "on-demand", "{pod}");
        assert_eq!(pod["metadata"]["annotations"]["karpenter.sh/do-not-disrupt"], "true", "{pod}");
    }
    let response = send(&admission, &review).await;
    review["request"]["object"] = patched(&review, &response);
    let response = send(&admission, &review).await;
    assert!(response["patch"].is_null(), "{response}");
}

const LIMIT: &str = "workload/max-executors-per-node";

/// The first constraint of the pod after the patch, and the warnings.
async fn limited(admission: &Admission<MemoryLedger>, review: &Value) -> (Value, Vec<String>) {
    let response = send(admission, review).await;
    let warnings = serde_json::from_value(response["warnings"].clone()).unwrap_or_default();
    (patched(review, &response)["spec"]["topologySpreadConstraints"].take(), warnings)
}

#[tokio::test]
async fn the_limit_of_executors_per_node_is_that_of_the_executor_the_job_or_the_settings() {
    let defaults = Policy { max_executors_per_node: 5, spot_ratio: SpotRatio::Share(Ratio::ONE), ..Policy::DEFAULT };
    let new = || Admission { defaults, ..pinning(admission(1)) };
    let skew = |constraints: &Value| constraints[0]["maxSkew"].as_u64();
    let with = |mut review: Value, limit: &str| {
        review["request"]["object"]["metadata"]["annotations"][LIMIT] = limit.into();
        review
    };
    let counted = new();
    send(&counted, &with(driver("etl", "job", "1"), "4")).await;
    assert_eq!(skew(&limited(&counted, &executor("etl", "job", 1)).await.0), Some(4));
    assert_eq!(skew(&limited(&counted, &with(executor("etl", "job", 2), "3")).await.0), Some(3));
    assert_eq!(limited(&counted, &with(executor("etl", "job", 3), "0")).await.0, Value::Null);
    // These get no ledger.
    assert_eq!(skew(&limited(&counted, &executor("etl", "over", 1)).await.0), Some(5));
    assert_eq!(skew(&limited(&counted, &with(executor("etl", "over", 2), "3")).await.0), Some(3));
    let mut by_itself = executor("etl", "over", 3);
    by_itself["request"]["object"]["spec"]["nodeSelector"] = json!({"karpenter.sh/capacity-type": "spot"});
    assert_eq!(skew(&limited(&counted, &by_itself).await.0), Some(5));
    let alone = new();
    let stated = with(creation("etl", "new", "new-exec-1", "executor", Some("1")), "2");
    assert_eq!(skew(&limited(&alone, &stated).await.0), Some(2));
}

#[tokio::test]
async fn a_limit_that_does_not_hold_as_it_is_stated_is_warned_of() {
    let admission = pinning(admission(10));
    let mut stated = driver("etl", "job", "1");
    stated["request"]["object"]["metadata"]["annotations"][LIMIT] = "4".into();
    send(&admission, &stated).await;
    assert_eq!(limited(&admission, &executor("etl", "job", 1)).await.1, [""; 0]);
    let mut own = executor("etl", "job", 2);
    let constraint =
        json!({"topologyKey": "kubernetes.io/hostname", "whenUnsatisfiable": "DoNotSchedule", "maxSkew": 1});
    own["request"]["object"]["spec"]["topologySpreadConstraints"] = json!([constraint]);
    let (constraints, warnings) = limited(&admission, &own).await;
    assert_eq!(constraints, json!([constraint]));
    assert!(
        matches!(warnings.as_slice(), [warning] if warning.starts_with(&format!("{LIMIT}: 4 has no effect"))),
        "{warnings:?}"
    );

    admission.server_version.set(Version::parse("1", "20").expect("a version"));
    let (_, warnings) = limited(&admission, &executor("etl", "job", 3)).await;
    let begin = format!("{LIMIT}: Kubernetes 1.20 ignores minDomains");
    assert!(matches!(warnings.as_slice(), [warning] if warning.starts_with(&begin)), "{warnings:?}");

    let mut invalid = executor("etl", "job", 4);
    invalid["request"]["object"]["metadata"]["annotations"] = json!({LIMIT: "few"});
    let (constraints, warnings) = limited(&admission, &invalid).await;
    assert_eq!(constraints[0]["maxSkew"], 4);
    let begin =
        format!("{LIMIT}: \"few\" is not a number of executors; accepted: a whole number from 0 to 1000000; using");
    assert!(warnings.iter().any(|warning| warning.starts_with(&begin)), "{warnings:?}");
}

#[tokio::test]
async fn executors_go_to_on_demand_while_spot_is_closed_and_one_probes_it() {
    let admission = pinning(admission(10));
    send(&admission, &driver("etl", "job", "1")).await;
    send(&admission, &executor("etl", "job", 1)).await;
    let job = JobRef { namespace: "etl", app_id: "job" };
    let close = |retry_after| admission.ledger.steer(job, Steer::CloseSpot { retry_after }, Term(1));
    close(3_600_000).await.expect("no error in memory");
    send(&admission, &executor("etl", "job", 2)).await;
    close(0).await.expect("no error in memory");
    for id in 3..=4 {
        send(&admission, &executor("etl", "job", id)).await;
    }
    let placed = |capacity: Capacity, source| admission.metrics.placements(capacity, source);
    assert_eq!(placed(Capacity::Spot, PlacementSource::Ledger), 1);
    assert_eq!(placed(Capacity::OnDemand, PlacementSource::SpotClosed), 2);
    assert_eq!(placed(Capacity::Spot, PlacementSource::Probe), 1);
    assert_eq!(counts(&admission, "etl", "job").await, Some((2, 2)));
    // What the reconciler wants avoided is avoided.
    admission.ledger.steer(job, Steer::OpenSpot, Term(1)).await.expect("no error in memory");
    let types = ["m5.large".to_owned()];
    admission.ledger.steer(job, Steer::Avoid(&types), Term(1)).await.expect("no error in memory");
    let review = executor("etl", "job", 5);
    let pod = patched(&review, &send(&admission, &review).await);
    let preferred = &pod["spec"]["affinity"]["nodeAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"];
    assert_eq!(preferred[0]["preference"]["matchExpressions"][1]["values"], json!(types));
}
