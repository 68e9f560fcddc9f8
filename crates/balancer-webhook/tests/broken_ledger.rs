//! Admissions with a ledger that fails or panics. A panic costs neither the pod nor the connection.

#![allow(clippy::expect_used, clippy::panic, clippy::indexing_slicing, reason = "a test")]

use std::sync::Arc;
use std::time::Duration;

use balancer_core::{
    Capacity, Counts, JobId, JobLedger, JobRef, JobState, LearnOutcome, PlaceOutcome, PlaceRequest, Policy,
    ReconcileOutcome, RemovalOutcome, Steer, SteerOutcome, Term, Unconfirmed,
};
use balancer_runtime::admin;
use balancer_store::{Cursor, EntryPage, JobPage, JobRecord, Ledger, StoreError};
use balancer_webhook::admit::{Admission, Hook};
use balancer_webhook::drivers::{DriverLookup, DriverSource};
use balancer_webhook::metrics::Metrics;
use balancer_webhook::new_jobs::NewJobs;
use kube::client::Body;
use prometheus_client::encoding::text::encode;
use prometheus_client::registry::Registry;
use serde_json::{Value, json};

/// A ledger that fails like this, whatever it is called for.
struct Broken(fn() -> StoreError);

impl Broken {
    fn fail<T>(&self) -> Result<T, StoreError> {
        Err((self.0)())
    }
}

impl Ledger for Broken {
    async fn place(&self, _: JobRef<'_>, _: &PlaceRequest<'_>) -> Result<PlaceOutcome, StoreError> {
        self.fail()
    }

    async fn peek(&self, _: JobRef<'_>, _: &PlaceRequest<'_>) -> Result<PlaceOutcome, StoreError> {
        self.fail()
    }

    async fn release(
        &self,
        _: JobRef<'_>,
        _: &str,
        _: Option<&str>,
        _: Option<&str>,
    ) -> Result<Option<Capacity>, StoreError> {
        self.fail()
    }

    async fn learn(&self, _: JobRef<'_>, _: Policy, _: Option<&str>, _: bool) -> Result<LearnOutcome, StoreError> {
        self.fail()
    }

    async fn reconcile(
        &self,
        _: JobRef<'_>,
        _: &JobState<'_>,
        _: Duration,
        _: Term,
    ) -> Result<ReconcileOutcome, StoreError> {
        self.fail()
    }

    async fn steer(&self, _: JobRef<'_>, _: Steer<'_>, _: Term) -> Result<SteerOutcome, StoreError> {
        self.fail()
    }

    async fn entries(&self, _: JobRef<'_>, _: Option<Cursor>) -> Result<EntryPage, StoreError> {
        self.fail()
    }

    async fn begin_count(&self, _: JobRef<'_>, _: Term) -> Result<(), StoreError> {
        self.fail()
    }

    async fn correct_counts(&self, _: JobRef<'_>, _: Counts, _: Term) -> Result<bool, StoreError> {
        self.fail()
    }

    async fn remove_unconfirmed(
        &self,
        _: JobRef<'_>,
        _: &[Unconfirmed],
        _: Term,
    ) -> Result<RemovalOutcome, StoreError> {
        self.fail()
    }

    async fn take_placed(&self) -> Result<Vec<JobId>, StoreError> {
        self.fail()
    }

    async fn record(&self, _: JobRef<'_>) -> Result<Option<JobRecord>, StoreError> {
        self.fail()
    }

    async fn list_jobs(&self, _: Option<Cursor>) -> Result<JobPage, StoreError> {
        self.fail()
    }

    async fn heartbeat(&self, _: u64) -> Result<Option<u64>, StoreError> {
        self.fail()
    }

    async fn get(&self, _: JobRef<'_>) -> Result<Option<JobLedger>, StoreError> {
        self.fail()
    }
}

fn review(operation: &str, role: &str, dry_run: bool) -> Vec<u8> {
    let labels = json!({"spark-role": role, "spark-app-selector": "spark-1", "spark-exec-id": "1"});
    let pod = json!({
        "metadata": {"name": "pod-1", "namespace": "etl", "uid": "uid-1", "labels": labels},
        "spec": {"containers": []},
    });
    let (object, old) = if operation == "DELETE" { (Value::Null, pod) } else { (pod, Value::Null) };
    let request = json!({
        "uid": "review-1", "kind": {"group": "", "version": "v1", "kind": "Pod"}, "operation": operation,
        "resource": {"group": "", "version": "v1", "resource": "pods"}, "namespace": "etl", "name": "pod-1",
        "object": object, "oldObject": old, "dryRun": dry_run,
    });
    json!({"kind": "AdmissionReview", "apiVersion": "admission.k8s.io/v1", "request": request}).to_string().into_bytes()
}

/// An admission with this ledger, and these lookups.
fn admission(registry: &mut Registry, ledger: Broken, source: DriverSource) -> Admission<Broken> {
    Admission {
        new_jobs: NewJobs::new(1_000, std::time::Instant::now()),
        ledger: Arc::new(ledger),
        drivers: DriverLookup::new(source, Duration::from_secs(1)),
        conventions: Arc::default(),
        defaults: Policy::DEFAULT,
        server_version: Arc::default(),
        metrics: Arc::new(Metrics::register(registry)),
    }
}

/// The response to a review, which is allowed.
async fn send(admission: &Admission<Broken>, hook: Hook, body: &[u8]) -> Value {
    let reply = admission.answer(hook, body).await.expect("a valid review");
    let mut reply: Value = serde_json::from_slice(&reply).expect("JSON");
    let response = reply["response"].take();
    assert_eq!((&response["uid"], &response["allowed"]), (&json!("review-1"), &json!(true)), "{response}");
    response
}

#[tokio::test]
async fn a_review_is_allowed_unchanged_if_the_webhook_panics() {
    let mut registry = admin::registry("test");
    let admission = admission(&mut registry, Broken(|| panic!("a panic of the test's own")), DriverSource::None);
    let reviews = [
        (Hook::Mutate, review("CREATE", "executor", false)),
        (Hook::Mutate, review("CREATE", "executor", true)),
        (Hook::Mutate, review("CREATE", "driver", false)),
        (Hook::Validate, review("DELETE", "executor", false)),
    ];
    for (hook, body) in &reviews {
        let response = send(&admission, *hook, body).await;
        assert!(response["patch"].is_null(), "{response}");
    }
    let mut text = String::new();
    encode(&mut text, &registry).expect("a text");
    let panicked = text.lines().find(|line| line.contains("outcome=\"panicked\"")).expect("a series");
    assert!(panicked.ends_with(&format!(" {}", reviews.len())), "{panicked}");
}

#[tokio::test]
async fn a_job_whose_driver_opts_out_is_left_unchanged_while_the_store_fails() {
    let (service, mut api) = tower_test::mock::pair::<http::Request<Body>, http::Response<Body>>();
    let source = DriverSource::Cluster { client: kube::Client::new(service, "default"), conventions: Arc::default() };
    let ledger = Broken(|| StoreError::NoConnection("a failure of the test's own".to_owned()));
    let admission = admission(&mut Registry::default(), ledger, source);
    let answering = async {
        for ratio in ["off", "1"] {
            let driver = json!({"metadata": {"name": "driver", "annotations": {"workload/spot-ratio": ratio}}});
            let (_, answer) = api.next_request().await.expect("no request to the API");
            answer.send_response(http::Response::new(Body::from(json!({"items": [driver]}).to_string().into_bytes())));
        }
    };
    let sending = async {
        let opted_out = send(&admission, Hook::Mutate, &review("CREATE", "executor", false)).await;
        // Another job.
        let body =
            String::from_utf8(review("CREATE", "executor", false)).expect("a text").replace("spark-1", "spark-2");
        (opted_out, send(&admission, Hook::Mutate, body.as_bytes()).await)
    };
    let ((opted_out, placed), ()) = tokio::join!(sending, answering);
    assert!(opted_out["patch"].is_null(), "{opted_out}");
    assert!(placed["patch"].is_string(), "{placed}");
}
