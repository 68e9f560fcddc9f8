//! Lookups in a Kubernetes API whose answers the tests give.

use super::*;

use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Relaxed;

use http::{Request, Response};
use kube::client::Body;
use serde_json::{Value, json};
use tower_test::mock::{self, Handle};

type Api = Handle<Request<Body>, Response<Body>>;

const JOB: JobQuery<'_> = job("etl", "spark-1");

/// A job whose executors have no owner.
const fn job<'a>(namespace: &'a str, app_id: &'a str) -> JobQuery<'a> {
    JobQuery { job: JobRef { namespace, app_id }, label: "spark-app-selector", owner: None }
}

/// Lookups in a Kubernetes API whose answers the test gives.
fn lookup(limit: Duration) -> (Arc<DriverLookup>, Api) {
    let (service, api) = mock::pair();
    let client = kube::Client::new(service, "default");
    let source = DriverSource::Cluster { client, conventions: Arc::default() };
    (Arc::new(DriverLookup::new(source, limit)), api)
}

fn driver(created: &str, ratio: &str, phase: &str) -> Value {
    json!({
        "metadata": {"creationTimestamp": created, "annotations": {"workload/spot-ratio": ratio}},
        "status": {"phase": phase},
    })
}

/// A live driver that has a name and a uid.
fn named(name: &str, uid: &str, created: &str, ratio: &str) -> Value {
    let mut driver = driver(created, ratio, "Running");
    driver["metadata"]["name"] = name.into();
    driver["metadata"]["uid"] = uid.into();
    driver
}

/// [`JOB`] as an executor names it that this pod owns.
const fn owned_by<'a>(name: &'a str, uid: &'a str) -> JobQuery<'a> {
    JobQuery { owner: Some((name, uid)), ..JOB }
}

fn pods(drivers: Value) -> Response<Body> {
    Response::new(Body::from(json!({"items": drivers}).to_string().into_bytes()))
}

fn not_found() -> Value {
    json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "reason": "NotFound", "code": 404})
}

/// The answer to a request for a pod that does not exist.
fn missing() -> Response<Body> {
    Response::builder().status(404).body(Body::from(not_found().to_string().into_bytes())).expect("a response")
}

fn is_from_cache(uri: &str) -> bool {
    uri.contains("resourceVersion=0")
}

async fn answer(api: &mut Api, drivers: Value) -> String {
    let (request, answer) = api.next_request().await.expect("no request to the API");
    answer.send_response(pods(drivers));
    request.uri().to_string()
}

/// Answers every request with no driver and no owner, after `delay`. Returns the counts of requests so far.
fn answer_all(mut api: Api, delay: Duration) -> Arc<Requests> {
    let requests = Arc::new(Requests::default());
    let counts = Arc::clone(&requests);
    tokio::spawn(async move {
        while let Some((request, answer)) = api.next_request().await {
            let is_list = request.uri().query().is_some_and(|query| !query.is_empty());
            let count = match is_list {
                true if is_from_cache(&request.uri().to_string()) => &counts.cached,
                true => &counts.consistent,
                false => &counts.named,
            };
            count.fetch_add(1, Relaxed);
            let running = counts.running.fetch_add(1, Relaxed) + 1;
            counts.most_running.fetch_max(running, Relaxed);
            let counts = Arc::clone(&counts);
            tokio::spawn(async move {
                tokio::time::sleep(delay).await;
                counts.running.fetch_sub(1, Relaxed);
                answer.send_response(if is_list { pods(json!([])) } else { missing() });
            });
        }
    });
    requests
}

#[derive(Debug, Default)]
struct Requests {
    cached: AtomicUsize,
    consistent: AtomicUsize,
    named: AtomicUsize,
    running: AtomicUsize,
    most_running: AtomicUsize,
}

/// Looks up this many jobs of a namespace at once. Returns how many of them were busy.
async fn flood(lookup: &DriverLookup, namespace: &str, jobs: usize) -> usize {
    let found = (0..jobs).map(async |i| {
        let app_id = format!("spark-{namespace}-{i}");
        lookup.policy(job(namespace, &app_id)).await
    });
    let found = futures::future::join_all(found).await;
    found.iter().filter(|found| matches!(&***found, DriverPolicy::Busy)).count()
}

/// Answers that the cache has these drivers, and then the request for the owner. Returns the URI of that request.
async fn answer_owner(api: &mut Api, drivers: Value, status: u16, owner: Value) -> String {
    assert!(is_from_cache(&answer(api, drivers).await));
    let (request, answer) = api.next_request().await.expect("no request to the API");
    let body = Body::from(owner.to_string().into_bytes());
    answer.send_response(Response::builder().status(status).body(body).expect("a response"));
    request.uri().to_string()
}

fn ratio(found: &DriverPolicy) -> String {
    match found {
        DriverPolicy::Found { overrides, .. } => {
            overrides.spot_ratio.map(|ratio| ratio.to_string()).unwrap_or_default()
        }
        other => format!("{other:?}"),
    }
}

#[tokio::test]
async fn executors_of_a_job_share_one_lookup() {
    let (lookup, mut api) = lookup(Duration::from_secs(5));
    let asking = (0..50).map(|_| lookup.policy(JOB));
    let answering = async {
        let uri = answer(&mut api, json!([driver("2026-01-01T00:00:00Z", "0.7", "Running")])).await;
        assert!(uri.starts_with("/api/v1/namespaces/etl/pods?"), "{uri}");
        assert!(uri.contains("spark-app-selector%3Dspark-1%2Cspark-role+in+%28driver%2Cconnect-server%29"), "{uri}");
        assert!(uri.contains("status.phase%21%3DSucceeded%2Cstatus.phase%21%3DFailed"), "{uri}");
        assert!(is_from_cache(&uri), "{uri}");
    };
    let (found, ()) = tokio::join!(futures::future::join_all(asking), answering);
    assert!(found.iter().all(|found| ratio(found) == "0.7"));
    // Cached: the test would not answer a second request.
    assert_eq!(ratio(&*lookup.policy(JOB).await), "0.7");
}

#[tokio::test]
async fn the_newest_live_driver_is_used() {
    let (lookup, mut api) = lookup(Duration::from_secs(5));
    let drivers = json!([
        driver("2026-01-01T00:00:02Z", "0.3", "Running"),
        driver("2026-01-01T00:00:09Z", "0.9", "Failed"),
        driver("2026-01-01T00:00:01Z", "0.1", "Pending"),
    ]);
    let (found, _) = tokio::join!(lookup.policy(JOB), answer(&mut api, drivers));
    assert_eq!(ratio(&found), "0.3");
}

#[tokio::test]
async fn a_driver_that_the_cache_does_not_have_is_found_by_a_consistent_list() {
    let (lookup, mut api) = lookup(Duration::from_secs(5));
    let answering = async {
        let cached = answer(&mut api, json!([driver("2026-01-01T00:00:01Z", "0.1", "Failed")])).await;
        let consistent = answer(&mut api, json!([driver("2026-01-01T00:00:02Z", "0.3", "Pending")])).await;
        assert!(is_from_cache(&cached) && !is_from_cache(&consistent), "{cached} {consistent}");
        assert!(consistent.contains("limit=50"), "{consistent}");
    };
    let (found, ()) = tokio::join!(lookup.policy(JOB), answering);
    assert_eq!(ratio(&found), "0.3");
}

#[tokio::test]
async fn a_job_without_a_driver_in_either_list_has_none() {
    let (lookup, mut api) = lookup(Duration::from_secs(5));
    let answering = async { (answer(&mut api, json!([])).await, answer(&mut api, json!([])).await) };
    let (found, _) = tokio::join!(lookup.policy(JOB), answering);
    assert!(matches!(&*found, DriverPolicy::NoDriver), "{found:?}");
}

#[tokio::test]
async fn an_answer_over_the_limit_fails_and_is_not_parsed() {
    let (lookup, mut api) = lookup(Duration::from_secs(5));
    let answering = async {
        let (_, answer) = api.next_request().await.expect("no request to the API");
        answer.send_response(Response::new(Body::from(vec![b' '; 3 << 20])));
    };
    let (found, ()) = tokio::join!(lookup.policy(JOB), answering);
    assert!(matches!(&*found, DriverPolicy::Failed(LookupError::TooLarge)), "{found:?}");
}

#[tokio::test(start_paused = true)]
async fn a_flood_of_new_jobs_sends_few_requests_and_leaves_other_namespaces_alone() {
    let (lookup, api) = lookup(Duration::from_secs(2));
    let requests = answer_all(api, Duration::from_millis(20));
    let flooding = flood(&lookup, "hostile", 200);
    let (busy, others) = tokio::join!(flooding, flood(&lookup, "etl", 5));
    assert_eq!(others, 0);
    assert!(busy >= 150, "{busy}");
    let (cached, consistent) = (requests.cached.load(Relaxed), requests.consistent.load(Relaxed));
    // 64 of the flood may wait, and they take half a second.
    assert_eq!(cached, 64 + 5);
    assert!((20 + 5..=30 + 5).contains(&consistent), "{consistent}");
    assert_eq!(requests.most_running.load(Relaxed), 4);
}

#[tokio::test(start_paused = true)]
async fn floods_of_many_namespaces_have_eight_requests_in_flight() {
    let (lookup, api) = lookup(Duration::from_secs(2));
    let requests = answer_all(api, Duration::from_millis(20));
    let floods = (0..10).map(|i| format!("namespace-{i}")).collect::<Vec<_>>();
    futures::future::join_all(floods.iter().map(|namespace| flood(&lookup, namespace, 50))).await;
    assert_eq!(requests.most_running.load(Relaxed), 8);
}

#[tokio::test(start_paused = true)]
async fn a_steady_flood_sends_consistent_lists_at_the_rate_of_the_namespace() {
    let (lookup, api) = lookup(Duration::from_secs(2));
    let requests = answer_all(api, Duration::from_millis(1));
    for i in 0..600 {
        let app_id = format!("spark-{i}");
        lookup.policy(job("hostile", &app_id)).await;
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    // In half a minute 20, and 10 per second.
    let consistent = requests.consistent.load(Relaxed);
    assert!((310..=340).contains(&consistent), "{consistent}");
}

#[tokio::test(start_paused = true)]
async fn starting_hundreds_of_jobs_per_minute_is_never_busy() {
    let (lookup, api) = lookup(Duration::from_secs(2));
    let requests = answer_all(api, Duration::from_millis(5));
    // Jobs without drivers, the most expensive ones.
    for minute in 0..3 {
        assert_eq!(flood(&lookup, "etl", 20).await, 0, "{minute}");
        for i in 0..500 {
            let app_id = format!("spark-{minute}-{i}");
            let found = lookup.policy(job("etl", &app_id)).await;
            assert!(matches!(&*found, DriverPolicy::NoDriver), "{i}: {found:?}");
            tokio::time::sleep(Duration::from_millis(120)).await;
        }
    }
    assert_eq!(requests.consistent.load(Relaxed), 3 * 520);
}

#[tokio::test(start_paused = true)]
async fn a_lookup_waits_for_its_slot_half_of_the_limit_at_most() {
    let limit = Duration::from_secs(4);
    let (lookup, _api) = lookup(limit);
    let begin = Instant::now();
    // The first two never end.
    let first = lookup.policy(JOB);
    let second = lookup.policy(job("etl", "spark-2"));
    let waiting = async {
        let busy = flood(&lookup, "etl", 40).await;
        (busy, begin.elapsed())
    };
    let (_, _, waited) = tokio::join!(first, second, waiting);
    assert_eq!(waited, (40, limit / 2));
    assert_eq!(begin.elapsed(), limit);
}

#[tokio::test(start_paused = true)]
async fn a_silent_api_costs_each_lookup_at_most_the_limit() {
    let limit = Duration::from_secs(4);
    let (lookup, mut api) = lookup(limit);
    let begin = Instant::now();
    let (first, second) = tokio::join!(lookup.policy(JOB), lookup.policy(JOB));
    assert!(matches!((&*first, &*second), (DriverPolicy::Failed(_), DriverPolicy::Failed(_))));
    assert_eq!(begin.elapsed(), limit);
    // The failure is cached for a moment.
    assert!(matches!(&*lookup.policy(JOB).await, DriverPolicy::Failed(_)));
    assert_eq!(begin.elapsed(), limit);
    assert!(api.next_request().await.is_some());
}

/// Looks [`JOB`] up in an API that answers with these drivers, the cached list and the consistent one if it is empty.
async fn find(lookup: &DriverLookup, api: &mut Api, drivers: Value) -> Arc<DriverPolicy> {
    let answering = async {
        answer(api, drivers.clone()).await;
        if drivers == json!([]) {
            answer(api, drivers).await;
        }
    };
    tokio::join!(lookup.policy(JOB), answering).0
}

/// Looks [`JOB`] up in an API that fails, after everything in the cache has expired.
async fn fail(lookup: &DriverLookup, api: &mut Api) {
    tokio::time::sleep(FOUND_TTL).await;
    let failing = async { api.next_request().await.expect("no request to the API").1.send_error("down") };
    let (found, ()) = tokio::join!(lookup.policy(JOB), failing);
    assert!(matches!(&*found, DriverPolicy::Failed(_)), "{found:?}");
}

#[tokio::test(start_paused = true)]
async fn a_driver_that_was_found_is_remembered_while_lookups_fail_or_are_refused() {
    let (lookup, mut api) = lookup(Duration::from_secs(2));
    let last_found = || lookup.last_found(JOB).map(|found| ratio(&found));
    assert_eq!(last_found(), None);
    find(&lookup, &mut api, json!([driver("2026-01-01T00:00:00Z", "0.7", "Running")])).await;
    for _ in 0..3 {
        fail(&lookup, &mut api).await;
        assert_eq!(last_found().as_deref(), Some("0.7"));
    }
    // Other jobs of the namespace fill its queue.
    tokio::time::sleep(FOUND_TTL).await;
    let asking = async {
        assert!(matches!(&*lookup.policy(JOB).await, DriverPolicy::Busy));
        assert_eq!(last_found().as_deref(), Some("0.7"));
    };
    tokio::join!(flood(&lookup, JOB.job.namespace, 64), asking);
}

#[tokio::test(start_paused = true)]
async fn a_driver_that_is_gone_is_not_remembered() {
    let (lookup, mut api) = lookup(Duration::from_secs(2));
    find(&lookup, &mut api, json!([driver("2026-01-01T00:00:00Z", "0.7", "Running")])).await;
    tokio::time::sleep(FOUND_TTL).await;
    let found = find(&lookup, &mut api, json!([])).await;
    assert!(matches!(&*found, DriverPolicy::NoDriver), "{found:?}");
    fail(&lookup, &mut api).await;
    assert!(lookup.last_found(JOB).is_none());
}

#[tokio::test]
async fn names_that_no_driver_can_have_are_not_looked_up() {
    let (lookup, mut api) = lookup(Duration::from_secs(5));
    let long = "x".repeat(64);
    let ids = ["", "-x", "x-", "a b", "a,b=c", "é", ".", "x.", "_x", "x\n", "a/b", &long].map(|id| ("etl", id));
    let namespaces = ["", "etl/../secrets", "Etl", "-etl", &long].map(|namespace| (namespace, "x"));
    for (namespace, id) in ids.into_iter().chain(namespaces) {
        let found = lookup.policy(job(namespace, id)).await;
        assert!(matches!(&*found, DriverPolicy::NoDriver), "{namespace:?} {id:?}: {found:?}");
    }
    assert!(api.next_request().now_or_never().is_none());
}

#[tokio::test]
async fn every_valid_label_value_is_looked_up() {
    let (lookup, mut api) = lookup(Duration::from_secs(5));
    let long = "x".repeat(63);
    for app_id in ["x", "0", "X", "Spark_1.2-A", "00000003abc", &long] {
        let asking = lookup.policy(job("etl", app_id));
        let drivers = json!([driver("2026-01-01T00:00:00Z", "0.7", "Running")]);
        let (found, uri) = tokio::join!(asking, answer(&mut api, drivers));
        assert_eq!(ratio(&found), "0.7", "{app_id}");
        assert!(uri.contains(&format!("spark-app-selector%3D{app_id}%2C")), "{uri}");
    }
}

#[tokio::test]
async fn without_a_driver_the_pod_that_owns_the_executor_is_asked_for_by_name() {
    let (lookup, mut api) = lookup(Duration::from_secs(5));
    let owner = named("notebook-0.a", "u1", "2026-01-01T00:00:00Z", "0.3");
    let (found, uri) =
        tokio::join!(lookup.policy(owned_by("notebook-0.a", "u1")), answer_owner(&mut api, json!([]), 200, owner));
    assert_eq!(uri, "/api/v1/namespaces/etl/pods/notebook-0.a");
    assert!(matches!(&*found, DriverPolicy::Found { by: StatedBy::Owner, .. }), "{found:?}");
    assert_eq!(ratio(&found), "0.3");
    // Cached: the test would not answer a second request.
    assert_eq!(ratio(&*lookup.policy(owned_by("notebook-0.a", "u1")).await), "0.3");
}

#[tokio::test]
async fn an_owner_that_is_gone_has_ended_or_has_another_uid_states_nothing() {
    let with = |change: fn(&mut Value)| {
        let mut owner = named("notebook-0", "u1", "2026-01-01T00:00:00Z", "0.3");
        change(&mut owner);
        owner
    };
    for (status, owner) in [
        (404, not_found()),
        (200, with(|owner| owner["metadata"]["uid"] = "u2".into())),
        (200, with(|owner| owner["status"]["phase"] = "Failed".into())),
        (200, with(|owner| owner["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:01Z".into())),
    ] {
        let (lookup, mut api) = lookup(Duration::from_secs(5));
        let answering = async {
            answer_owner(&mut api, json!([]), status, owner).await;
            assert!(!is_from_cache(&answer(&mut api, json!([])).await));
        };
        let (found, ()) = tokio::join!(lookup.policy(owned_by("notebook-0", "u1")), answering);
        assert!(matches!(&*found, DriverPolicy::NoDriver), "{status}: {found:?}");
    }
}

#[tokio::test]
async fn an_owner_that_may_not_be_read_is_a_failed_lookup() {
    let (lookup, mut api) = lookup(Duration::from_secs(5));
    let forbidden = json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "reason": "Forbidden", "code": 403,
    });
    let asking = lookup.policy(owned_by("notebook-0", "u1"));
    let (found, _) = tokio::join!(asking, answer_owner(&mut api, json!([]), 403, forbidden));
    assert!(matches!(&*found, DriverPolicy::Failed(LookupError::Api(_))), "{found:?}");
}

#[tokio::test]
async fn of_several_drivers_the_one_that_owns_the_executor_is_used() {
    let (lookup, mut api) = lookup(Duration::from_secs(5));
    let drivers = json!([
        named("first", "u1", "2026-01-01T00:00:01Z", "0.1"),
        named("second", "u2", "2026-01-01T00:00:02Z", "0.2"),
    ]);
    for (owner, uid, expected) in [("first", "u1", "0.1"), ("second", "u2", "0.2")] {
        let (found, _) = tokio::join!(lookup.policy(owned_by(owner, uid)), answer(&mut api, drivers.clone()));
        assert_eq!(ratio(&found), expected);
    }
    // The executors of other pods belong to the newest: of one that is gone, and of one that is no driver.
    let notebook = named("notebook-0", "u4", "2026-01-01T00:00:03Z", "0.4");
    for (owner, uid, status, pod) in [("first", "u3", 404, not_found()), ("notebook-0", "u4", 200, notebook)] {
        let answering = answer_owner(&mut api, drivers.clone(), status, pod);
        let (found, _) = tokio::join!(lookup.policy(owned_by(owner, uid)), answering);
        assert_eq!(ratio(&found), "0.2", "{owner}");
    }
}

/// A driver of [`JOB`], as a request by its name returns it.
fn second_driver() -> Value {
    let mut driver = named("second", "u2", "2026-01-01T00:00:02Z", "0.2");
    driver["metadata"]["labels"] = json!({"spark-role": "driver", "spark-app-selector": "spark-1"});
    driver
}

#[tokio::test]
async fn a_new_driver_that_the_cache_lacks_is_found_although_the_cache_has_another() {
    let (lookup, mut api) = lookup(Duration::from_secs(5));
    let first = json!([named("first", "u1", "2026-01-01T00:00:01Z", "0.1")]);
    let answering = answer_owner(&mut api, first, 200, second_driver());
    let (found, _) = tokio::join!(lookup.policy(owned_by("second", "u2")), answering);
    assert!(matches!(&*found, DriverPolicy::Found { by: StatedBy::Driver, .. }), "{found:?}");
    assert_eq!(ratio(&found), "0.2");
}

#[tokio::test(start_paused = true)]
async fn the_policy_of_another_driver_is_not_used_while_other_jobs_take_all_consistent_lists() {
    let (lookup, mut api) = lookup(Duration::from_secs(5));
    for i in 0..CONSISTENT_LISTS.0 {
        let app_id = format!("other-{i}");
        let answering = async { (answer(&mut api, json!([])).await, answer(&mut api, json!([])).await) };
        tokio::join!(lookup.policy(job(JOB.job.namespace, &app_id)), answering);
    }
    let (found, _) = tokio::join!(lookup.policy(JOB), answer(&mut api, json!([])));
    assert!(matches!(&*found, DriverPolicy::Busy), "{found:?}");
    let first = json!([named("first", "u1", "2026-01-01T00:00:01Z", "0.1")]);
    let answering = answer_owner(&mut api, first, 200, second_driver());
    let (found, _) = tokio::join!(lookup.policy(owned_by("second", "u2")), answering);
    assert_eq!(ratio(&found), "0.2");
}

#[tokio::test(start_paused = true)]
async fn all_requests_of_a_lookup_share_one_deadline() {
    let limit = Duration::from_secs(4);
    let (lookup, mut api) = lookup(limit);
    let begin = Instant::now();
    let slow = async {
        for response in [pods(json!([])), missing()] {
            let (_, answer) = api.next_request().await.expect("no request to the API");
            tokio::time::sleep(limit / 4).await;
            answer.send_response(response);
        }
        // The consistent list gets no answer.
        api.next_request().await.expect("no request to the API")
    };
    let (found, _silent) = tokio::join!(lookup.policy(owned_by("notebook-0", "u1")), slow);
    assert!(matches!(&*found, DriverPolicy::Failed(LookupError::TimedOut(_))), "{found:?}");
    assert_eq!(begin.elapsed(), limit);
}

#[tokio::test(start_paused = true)]
async fn a_steady_flood_of_owners_is_asked_for_at_the_rate_of_lookups() {
    let (lookup, api) = lookup(Duration::from_secs(2));
    let requests = answer_all(api, Duration::from_millis(1));
    let begin = Instant::now();
    for i in 0..1_000 {
        let owner = format!("owner-{i}");
        lookup.policy(owned_by(&owner, "u1")).await;
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    let (cached, named) = (requests.cached.load(Relaxed), requests.named.load(Relaxed));
    assert_eq!(cached, named);
    // 200, and 100 per second.
    let allowed = 200 + begin.elapsed().as_millis() as usize / 10;
    assert!(allowed < 800 && (allowed - 1..=allowed).contains(&named), "{named} of {allowed}");
    assert_eq!(requests.most_running.load(Relaxed), 1);
}

#[tokio::test]
async fn owners_with_uids_that_no_pod_has_are_not_asked_for() {
    let (lookup, mut api) = lookup(Duration::from_secs(5));
    let uid = "x".repeat(37);
    let answering = async { (answer(&mut api, json!([])).await, answer(&mut api, json!([])).await) };
    let (found, uris) = tokio::join!(lookup.policy(owned_by("a", &uid)), answering);
    assert!(matches!(&*found, DriverPolicy::NoDriver), "{found:?}");
    assert!(is_from_cache(&uris.0) && !is_from_cache(&uris.1) && uris.1.contains('?'), "{uris:?}");
}
