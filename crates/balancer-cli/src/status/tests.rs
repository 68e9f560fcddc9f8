//! What is printed for each state of a job.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use clap::Parser;
use serde_json::{Value, json};

use crate::output::Format;
use crate::settings::{Origin, Settings};
use crate::snapshot::Snapshot;
use crate::snapshot::testing::{
    cluster, driver, event, items, node, on_node, placed, running, settings, snapshot, time, untouched, without_rights,
};

use super::job::Report;
use super::{Arguments, Reader, wait_after};

fn print(snapshot: &Snapshot, format: Format) -> String {
    let mut out = Vec::new();
    Report::of(snapshot, Some("etl")).write(&mut out, format).expect("written");
    String::from_utf8(out).expect("text")
}

/// The cells of the only job, by their headers. No cell of these tests has two words with three spaces in between.
fn row(snapshot: &Snapshot) -> Vec<(String, String)> {
    let text = print(snapshot, Format::Wide);
    let mut lines = text.lines();
    let mut cells = || {
        let line = lines.next().expect("a line");
        line.split("   ").map(str::trim).filter(|cell| !cell.is_empty()).map(str::to_owned).collect::<Vec<_>>()
    };
    let (header, row) = (cells(), cells());
    assert_eq!(header.len(), row.len(), "{text}");
    header.into_iter().zip(row).collect()
}

#[track_caller]
fn check(snapshot: &Snapshot, expected: &[(&str, &str)]) {
    let row = row(snapshot);
    for (header, value) in expected {
        let cell = row.iter().find(|(of, _)| of == header).map(|(_, value)| value.as_str());
        assert_eq!(cell, Some(*value), "{header} in {row:?}");
    }
}

fn ratio(ratio: &str) -> Value {
    driver(json!({"workload/spot-ratio": ratio}))
}

fn job(driver: Value, executors: impl IntoIterator<Item = Value>) -> Vec<Value> {
    [driver].into_iter().chain(executors).collect()
}

fn bound(spot: usize, on_demand: usize) -> Vec<Value> {
    let spot = (0..spot).map(|i| running(&format!("s{i}"), "spot", "s1"));
    spot.chain((0..on_demand).map(|i| running(&format!("o{i}"), "on-demand", "o1"))).collect()
}

#[test]
fn a_job_that_runs_as_wanted_is_at_no_distance() {
    let snapshot = snapshot(&job(ratio("0.7"), bound(7, 3)));
    let expected = "JOB   RATIO   SOURCE   SPOT   ON-DEMAND   PENDING   DISTANCE   LARGEST NODE   LARGEST POOL   \
                    SPOT STATE   AGE\n\
                    j     70%     driver   7      3           0         0          70%            70%            \
                    open         10m\n";
    assert_eq!(print(&snapshot, Format::Table), expected);
}

#[test]
fn pending_executors_count_for_the_distance_as_what_they_wait_for() {
    let pods = job(ratio("0.5"), [placed("a", "spot"), placed("b", "spot"), placed("c", "on-demand"), untouched("d1")]);
    let expected = [
        ("SPOT", "0"),
        ("PENDING", "4"),
        ("PENDING SPOT", "2"),
        ("PENDING ON-DEMAND", "1"),
        ("DISTANCE", "0"),
        ("LARGEST NODE", "-"),
        ("LARGEST POOL", "-"),
    ];
    check(&snapshot(&pods), &expected);
}

#[test]
fn the_distance_has_a_sign_and_starts_beyond_the_base() {
    check(&snapshot(&job(ratio("0.5"), bound(8, 2))), &[("DISTANCE", "+3"), ("WANTED SPOT", "5.0")]);
    check(&snapshot(&job(ratio("0.5"), bound(2, 8))), &[("DISTANCE", "-3")]);
    check(&snapshot(&job(ratio("0.33"), bound(1, 2))), &[("DISTANCE", "0")]);
    check(&snapshot(&job(ratio("0.34"), bound(1, 2))), &[("DISTANCE", "0")]);
    // A part of an executor is no distance, as on the page of the reconciler.
    check(&snapshot(&job(ratio("0.1"), bound(1, 0))), &[("DISTANCE", "0"), ("WANTED SPOT", "0.1")]);
    check(&snapshot(&job(ratio("0.7"), bound(0, 4))), &[("DISTANCE", "-2"), ("WANTED SPOT", "2.8")]);
    let based = driver(json!({"workload/spot-ratio": "1", "workload/on-demand-base": "2"}));
    check(&snapshot(&job(based, bound(8, 2))), &[("RATIO", "100%, base 2"), ("DISTANCE", "0"), ("WANTED SPOT", "8.0")]);
}

#[test]
fn a_node_shows_what_an_executor_really_runs_on() {
    let snapshot = snapshot(&job(ratio("1"), [running("a", "spot", "s1"), running("b", "spot", "o1")]));
    check(&snapshot, &[("SPOT", "1"), ("ON-DEMAND", "1"), ("DISTANCE", "-1")]);
}

#[test]
fn the_largest_node_and_pool_are_named_with_their_shares() {
    let pods = job(
        ratio("1"),
        [
            running("a", "spot", "s1"),
            running("b", "spot", "s2"),
            running("c", "spot", "s2"),
            running("e", "on-demand", "o1"),
        ],
    );
    let expected = [("LARGEST NODE", "50%"), ("NODE", "s2 (2)"), ("LARGEST POOL", "50%"), ("POOL", "c6i.xlarge b (2)")];
    check(&snapshot(&pods), &expected);
}

#[test]
fn pools_are_unknown_if_nodes_do_not_show_them() {
    let mut snapshot = snapshot(&job(ratio("1"), bound(2, 0)));
    snapshot.nodes = Some(vec![node("s1", "spot", None)]);
    check(&snapshot, &[("LARGEST POOL", "unknown"), ("LARGEST NODE", "100%")]);
}

#[test]
fn a_job_without_a_ratio_has_the_default_of_the_webhook() {
    let mut snapshot = snapshot(&job(driver(json!({})), bound(1, 1)));
    check(&snapshot, &[("RATIO", "50%"), ("SOURCE", "default"), ("DISTANCE", "0")]);
    snapshot.settings = settings(&[("DEFAULT_SPOT_RATIO", "0.8")]);
    check(&snapshot, &[("RATIO", "80%"), ("SOURCE", "default")]);
    snapshot.settings = settings(&[("DEFAULT_SPOT_RATIO", "none")]);
    check(&snapshot, &[("RATIO", "off"), ("SOURCE", "default"), ("DISTANCE", "-")]);
}

#[test]
fn a_ratio_that_no_pod_shows_is_unknown() {
    let invalid = snapshot(&job(ratio("7"), bound(1, 1)));
    check(&invalid, &[("RATIO", "unknown"), ("SOURCE", "invalid"), ("DISTANCE", "unknown")]);
    let gone = snapshot(&bound(1, 1));
    check(&gone, &[("RATIO", "unknown"), ("SOURCE", "driver gone"), ("DRIVER", "d"), ("SPOT STATE", "unknown")]);
    let mut orphan = running("a", "spot", "s1");
    orphan["metadata"]["ownerReferences"] = json!([]);
    check(&snapshot(&[orphan]), &[("SOURCE", "no driver"), ("DRIVER", "-"), ("RATIO", "unknown")]);
}

#[test]
fn the_owner_of_executors_without_a_driver_states_their_ratio() {
    let mut owner = ratio("0.25");
    owner["metadata"]["labels"] = json!({"app": "notebook"});
    check(&snapshot(&job(owner, bound(1, 3))), &[("RATIO", "25%"), ("SOURCE", "owner"), ("DISTANCE", "0")]);
}

#[test]
fn a_job_that_is_opted_out_has_no_distance() {
    let snapshot = snapshot(&job(ratio("off"), [on_node(untouched("a"), "s1")]));
    check(&snapshot, &[("RATIO", "off"), ("SOURCE", "driver"), ("SPOT", "1"), ("DISTANCE", "-"), ("WANTED SPOT", "-")]);
}

#[test]
fn executors_that_require_a_capacity_themselves_are_counted_as_fixed() {
    let mut fixed = on_node(untouched("a"), "o1");
    fixed["spec"]["nodeSelector"] = json!({"karpenter.sh/capacity-type": "on-demand"});
    check(&snapshot(&job(ratio("1"), [fixed])), &[("FIXED", "1"), ("ON-DEMAND", "1"), ("DISTANCE", "-1")]);
}

#[test]
fn executors_that_are_gone_or_leaving_do_not_count() {
    let mut leaving = running("a", "spot", "s1");
    leaving["metadata"]["deletionTimestamp"] = json!("2026-01-01T12:00:00Z");
    let mut failed = running("b", "spot", "s1");
    failed["status"]["phase"] = json!("Failed");
    check(&snapshot(&job(ratio("1"), [leaving, failed])), &[("SPOT", "0"), ("ON-DEMAND", "0"), ("PENDING", "0")]);
}

const OLD: &str = "2026-01-01T09:00:00Z";

fn with_fallback(created: &str) -> Value {
    let mut driver = driver(json!({"workload/spot-ratio": "0.5", "workload/spot-fallback-seconds": "60"}));
    driver["metadata"]["creationTimestamp"] = created.into();
    driver
}

#[test]
fn the_last_event_tells_whether_spot_is_closed() {
    let closed = event("d", "spot-balancer", "SpotClosed", "no spot", "2026-01-01T11:56:00Z");
    let reopened = event("d", "spot-balancer", "SpotReopened", "spot", "2026-01-01T11:58:00Z");
    let mut snapshot = snapshot(&job(with_fallback(OLD), bound(0, 2)));
    for (events, state) in [
        (vec![], "unknown"),
        (vec![closed.clone()], "closed for 4m"),
        (vec![reopened.clone(), closed.clone()], "open"),
        (vec![event("d", "somebody", "SpotClosed", "", "2026-01-01T11:59:00Z")], "unknown"),
        (vec![event("other", "spot-balancer", "SpotClosed", "", "2026-01-01T11:59:00Z")], "unknown"),
    ] {
        snapshot.events = Some(events);
        check(&snapshot, &[("SPOT STATE", state)]);
    }
    let json = serde_json::to_value(Report::of(&Snapshot { events: Some(vec![closed]), ..snapshot }, None));
    let json = json.expect("JSON");
    assert_eq!(json["jobs"][0]["spotState"], "closed");
    assert_eq!(json["jobs"][0]["spotClosedSince"], "2026-01-01T11:56:00Z");
}

#[test]
fn an_event_about_an_earlier_driver_of_the_same_name_says_nothing() {
    let mut snapshot = snapshot(&job(with_fallback(OLD), []));
    let mut closed = event("d", "spot-balancer", "SpotClosed", "", "2026-01-01T11:56:00Z");
    closed.uid = "another".into();
    snapshot.events = Some(vec![closed]);
    check(&snapshot, &[("SPOT STATE", "unknown")]);
}

#[test]
fn without_an_event_spot_is_open_if_it_cannot_be_closed_or_the_event_would_still_be_there() {
    check(&snapshot(&job(with_fallback("2026-01-01T11:30:00Z"), [])), &[("SPOT STATE", "open"), ("AGE", "30m")]);
    let mut best_effort = snapshot(&job(with_fallback(OLD), []));
    best_effort.settings = settings(&[("SPOT_PREFERENCE", "BEST_EFFORT")]);
    check(&best_effort, &[("SPOT STATE", "open")]);
    let mut off = ratio("0.5");
    off["metadata"]["creationTimestamp"] = OLD.into();
    check(&snapshot(&job(off, [])), &[("SPOT STATE", "open")]);
}

#[test]
fn a_caller_who_may_only_read_pods_gets_what_they_tell_and_one_note() {
    let snapshot = without_rights(&job(ratio("0.5"), bound(1, 1)));
    let expected = [
        ("RATIO", "50%"),
        ("SPOT", "1"),
        ("ON-DEMAND", "1"),
        ("DISTANCE", "0"),
        ("LARGEST NODE", "50%"),
        ("LARGEST POOL", "unknown"),
        ("SPOT STATE", "unknown"),
    ];
    check(&snapshot, &expected);
    assert_eq!(
        Report::of(&snapshot, None).note().as_deref(),
        Some(
            "note: not read: nodes (so capacities are those that the pods ask for, and pools are unknown), Events (so \
             whether spot is closed is unknown), the webhook's Deployment (so the default ratio is unknown)"
        )
    );
    check(&without_rights(&job(driver(json!({})), bound(1, 1))), &[("RATIO", "unknown"), ("SOURCE", "default")]);
}

#[test]
fn several_drivers_with_one_job_id_are_several_jobs() {
    let mut second = ratio("0.9");
    second["metadata"]["name"] = json!("d2");
    second["metadata"]["uid"] = json!("uid of d2");
    second["metadata"]["creationTimestamp"] = json!("2026-01-01T11:55:00Z");
    let mut of_second = running("x", "spot", "s1");
    of_second["metadata"]["ownerReferences"][0]["name"] = json!("d2");
    of_second["metadata"]["ownerReferences"][0]["uid"] = json!("uid of d2");
    let report = Report::of(&snapshot(&[ratio("0.5"), second, running("a", "spot", "s1"), of_second]), None);
    let jobs: Vec<_> = report.jobs.iter().map(|job| (job.job.as_str(), job.driver.as_deref(), job.spot)).collect();
    assert_eq!(jobs, [("j", Some("d"), 1), ("j/d2", Some("d2"), 1)]);
}

#[test]
fn no_jobs_are_said_in_words_and_an_empty_list_in_json() {
    let empty = snapshot(&[]);
    assert_eq!(print(&empty, Format::Table), "No live jobs found in namespace etl.\n");
    let json: Value = serde_json::from_str(&print(&empty, Format::Json)).expect("JSON");
    let settings = json!({
        "capacityProfile": "karpenter", "from": "deployment", "namespace": "spot-balancer", "name": "spot-balancer-webhook",
    });
    assert_eq!(json, json!({"settings": settings, "missing": [], "jobs": []}));
}

#[test]
fn the_fields_of_a_job_in_json_are_stable() {
    let json: Value =
        serde_json::from_str(&print(&snapshot(&job(ratio("0.5"), bound(1, 1))), Format::Json)).expect("JSON");
    assert_eq!(
        json["jobs"],
        json!([{
            "namespace": "etl", "job": "j", "driver": "d", "spotRatio": 0.5, "optedOut": false, "onDemandBase": 0,
            "ratioSource": "driver", "spot": 1, "onDemand": 1, "unknown": 0, "pending": 0, "pendingSpot": 0,
            "pendingOnDemand": 0, "fixed": 0, "wantedSpot": 1.0, "distance": 0,
            "largestNode": {"name": "o1", "executors": 1, "share": 0.5},
            "largestPool": {"instanceType": "m6i.xlarge", "zone": "a", "executors": 1, "share": 0.5},
            "spotState": "open", "spotClosedSince": null, "created": "2026-01-01T11:50:00Z",
        }])
    );
}

#[test]
fn only_time_is_no_change() {
    let snapshot = snapshot(&job(ratio("0.5"), bound(1, 1)));
    let (before, mut later) = (Report::of(&snapshot, None), snapshot);
    later.now = time("2026-01-01T13:00:00Z");
    assert!(before.is_same(&Report::of(&later, None)));
    later.pods.pop_last();
    assert!(!before.is_same(&Report::of(&later, None)));
}

#[test]
fn settings_that_cannot_be_used_are_unknown_and_the_note_says_why() {
    let mut snapshot = snapshot(&job(driver(json!({})), bound(1, 1)));
    let error = Some("the Deployment a/b cannot be used: a setting is invalid".to_owned());
    snapshot.settings = Settings { origin: Origin::Defaults { error }, ..Settings::default() };
    check(&snapshot, &[("RATIO", "unknown"), ("SOURCE", "default")]);
    assert_eq!(
        Report::of(&snapshot, None).note().as_deref(),
        Some(
            "note: not read: the webhook's settings (so the default ratio is unknown): the Deployment a/b cannot be \
             used: a setting is invalid"
        )
    );
}

#[test]
fn an_owner_that_was_not_read_is_not_said_to_be_gone() {
    let mut snapshot = snapshot(&bound(1, 1));
    snapshot.unread_owners = [("etl".to_owned(), "d".to_owned())].into();
    check(&snapshot, &[("RATIO", "unknown"), ("SOURCE", "not read"), ("DRIVER", "d")]);
    let report = Report::of(&snapshot, None);
    assert_eq!(
        report.note().as_deref(),
        Some("note: not read: pods that own executors (so the ratios of their jobs are unknown)")
    );
    let json = serde_json::to_value(&report).expect("JSON");
    assert_eq!((&json["jobs"][0]["ratioSource"], &json["missing"]), (&json!("notRead"), &json!(["owners"])));
    snapshot.unread_owners = [("other".to_owned(), "d".to_owned())].into();
    check(&snapshot, &[("SOURCE", "driver gone")]);
}

#[test]
fn a_doubt_about_the_settings_is_a_note_of_its_own() {
    let mut snapshot = snapshot(&[]);
    assert_eq!(Report::of(&snapshot, None).note(), None);
    snapshot.settings.doubt = Some("there are 2 installations".into());
    assert_eq!(Report::of(&snapshot, None).note().as_deref(), Some("note: there are 2 installations"));
    snapshot.events = None;
    let note = Report::of(&snapshot, None).note().expect("notes");
    assert!(
        note.starts_with("note: not read: Events") && note.ends_with("\nnote: there are 2 installations"),
        "{note}"
    );
}

#[test]
fn a_later_pod_with_the_owners_name_is_not_the_owner() {
    let mut owner = ratio("0.25");
    owner["metadata"]["labels"] = json!({"app": "notebook"});
    owner["metadata"]["uid"] = json!("another");
    check(&snapshot(&job(owner, bound(1, 3))), &[("RATIO", "unknown"), ("SOURCE", "driver gone")]);
}

#[derive(clap::Parser)]
struct Line {
    #[command(flatten)]
    arguments: Arguments,
}

#[tokio::test]
async fn a_watch_reads_settings_once_and_then_lists_from_the_caches_of_the_apiserver() {
    let requests = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&requests);
    let cluster = cluster(move |request| {
        seen.lock().expect("requests").push(request.to_owned());
        items(Vec::new())
    })
    .await;
    let Line { arguments } = Line::parse_from(["status", "--watch"]);
    let mut reader = Reader { cluster: &cluster, namespace: Some("etl"), arguments: &arguments, settings: None };
    let mut read = async || {
        reader.report().await.expect("a report");
        std::mem::take(&mut *requests.lock().expect("requests"))
    };
    let first = read().await;
    assert!(first.iter().any(|request| request.contains("/deployments")), "{first:#?}");
    assert!(
        first.iter().all(|request| request.contains("limit=") && !request.contains("resourceVersion")),
        "{first:#?}"
    );
    for _ in 0..2 {
        let again = read().await;
        for resource in ["pods", "nodes", "events"] {
            assert!(again.iter().any(|request| request.contains(&format!("/{resource}?"))), "{resource}: {again:#?}");
        }
        assert!(!again.iter().any(|request| request.contains("/deployments")), "{again:#?}");
        let is_of_cache = |request: &String| request.contains("resourceVersion=0") && !request.contains("limit=");
        assert!(again.iter().all(is_of_cache), "{again:#?}");
    }
}

#[test]
fn a_watch_waits_ten_times_as_long_as_a_read_takes() {
    let seconds = Duration::from_secs;
    assert_eq!(wait_after(Duration::from_millis(20)), seconds(2));
    assert_eq!(wait_after(seconds(1)), seconds(10));
    assert_eq!(wait_after(seconds(12)), seconds(30));
}
