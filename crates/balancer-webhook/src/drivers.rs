//! Looks up a job's driver in the Kubernetes API, for jobs whose policy the ledger does not have: at most one lookup in
//! flight per job, each with a deadline, and a short-lived cache of bounded size.

use std::fmt;
use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context;
use balancer_core::{Conventions, InvalidField, JobRef, Pod, PolicyOverrides};
use balancer_runtime::k8s_names::{is_dns_label, is_label_value};
use futures::FutureExt;
use futures::future::{BoxFuture, Shared};
use kube::api::ListParams;
use lru::LruCache;

/// Jobs whose lookups are in flight or cached.
const MAX_CACHED: NonZeroUsize = NonZeroUsize::new(1024).unwrap();
/// How long a policy is cached, for a ledger that is down and cannot store it.
const FOUND_TTL: Duration = Duration::from_secs(5);
/// How long a failure, or the absence of a driver, is cached.
const NOT_FOUND_TTL: Duration = Duration::from_secs(1);
/// A job has one live driver; a few more may remain from earlier attempts.
const MAX_DRIVERS: u32 = 50;

/// Far above the deadline of a lookup; it only frees a connection that would hang forever.
const API_READ_TIMEOUT: Duration = Duration::from_secs(30);

/// The result of a lookup.
#[derive(Debug)]
pub enum DriverPolicy {
    /// The newest live driver of the job.
    Found {
        /// The valid fields of its annotations.
        overrides: PolicyOverrides,
        /// The invalid fields of its annotations.
        invalid: Vec<InvalidField>,
    },
    /// The job has no live driver, or there is no cluster.
    NoDriver,
    /// The Kubernetes API did not answer, or not in time.
    Failed(LookupError),
}

/// Why a lookup failed.
#[derive(Debug, thiserror::Error)]
pub enum LookupError {
    /// The request failed.
    #[error("the Kubernetes API did not return the job's drivers: {0}")]
    Api(#[source] Box<kube::Error>),
    /// The answer is not a list of pods.
    #[error("the answer of the Kubernetes API is not a list of pods: {0}")]
    NotPods(#[source] serde_json::Error),
    /// The deadline passed.
    #[error("the Kubernetes API did not answer within {0:?}")]
    TimedOut(Duration),
}

/// Where drivers are looked up.
pub enum DriverSource {
    /// In the Kubernetes API.
    Cluster {
        /// The client.
        client: kube::Client,
        /// The labels of drivers and jobs.
        conventions: Arc<Conventions>,
    },
    /// There is no cluster, so no job has a driver.
    None,
}

impl fmt::Debug for DriverSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cluster { .. } => "Cluster",
            Self::None => "None",
        })
    }
}

impl DriverSource {
    /// A client for the cluster of the environment: a kubeconfig, or the pod's service account. `dev` has no cluster.
    ///
    /// # Errors
    /// There is no access to a cluster.
    pub async fn new(dev: bool, conventions: Arc<Conventions>) -> anyhow::Result<Self> {
        if dev {
            return Ok(Self::None);
        }
        let client = balancer_runtime::cluster::client(API_READ_TIMEOUT)
            .await
            .context("cannot look up drivers; accepted: access to a cluster, or --dev without one")?;
        Ok(Self::Cluster { client, conventions })
    }

    async fn find(&self, job: &JobKey) -> Result<DriverPolicy, LookupError> {
        let Self::Cluster { client, conventions } = self else { return Ok(DriverPolicy::NoDriver) };
        // Both come from a pod that is not validated yet, and are inserted into a URL and a selector.
        if !is_dns_label(&job.namespace) || !is_label_value(&job.app_id) {
            return Ok(DriverPolicy::NoDriver);
        }
        let selector = format!(
            "{}={},{}={}",
            job.label, job.app_id, conventions.workload_role_label, conventions.driver_role_value
        );
        let api = |error: kube::Error| LookupError::Api(Box::new(error));
        // A consistent read, not one from the apiserver's cache: if the cache does not have the driver yet, the whole
        // job would get the default.
        let list = ListParams::default().labels(&selector).limit(MAX_DRIVERS);
        let request = kube::core::Request::new(format!("/api/v1/namespaces/{}/pods", job.namespace))
            .list(&list)
            .map_err(|error| api(kube::Error::BuildRequest(error)))?;
        let answer = client.request_text(request).await.map_err(api)?;
        let pods: Pods<'_> = serde_json::from_str(&answer).map_err(LookupError::NotPods)?;
        // RFC 3339 in UTC compares as text.
        let newest =
            pods.items.iter().filter(|pod| pod.is_live()).max_by_key(|pod| pod.metadata.creation_timestamp.as_deref());
        Ok(match newest {
            Some(driver) => {
                let (overrides, invalid) = conventions.overrides(driver);
                DriverPolicy::Found { overrides, invalid }
            }
            None => DriverPolicy::NoDriver,
        })
    }
}

#[derive(serde::Deserialize)]
struct Pods<'a> {
    #[serde(borrow)]
    items: Vec<Pod<'a>>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct JobKey {
    namespace: String,
    label: String,
    app_id: String,
}

type Inflight = Shared<BoxFuture<'static, Arc<DriverPolicy>>>;

/// Looks up drivers; concurrent lookups of one job share one request.
pub struct DriverLookup {
    source: Arc<DriverSource>,
    limit: Duration,
    inflight: Mutex<LruCache<JobKey, (Inflight, Instant)>>,
}

impl fmt::Debug for DriverLookup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DriverLookup").field("source", &self.source).field("limit", &self.limit).finish_non_exhaustive()
    }
}

impl DriverLookup {
    /// Lookups in `source`, each of at most `limit`.
    pub fn new(source: DriverSource, limit: Duration) -> Self {
        Self { source: Arc::new(source), limit, inflight: Mutex::new(LruCache::new(MAX_CACHED)) }
    }

    /// What the annotations of the job's driver state. `label` is the pod label that has the job id.
    pub async fn policy(&self, job: JobRef<'_>, label: &str) -> Arc<DriverPolicy> {
        let job = JobKey { namespace: job.namespace.into(), label: label.into(), app_id: job.app_id.into() };
        let flight = {
            let mut inflight = self.inflight.lock().unwrap_or_else(PoisonError::into_inner);
            match inflight.get(&job).filter(|(flight, since)| is_fresh(flight, *since)) {
                Some((flight, _)) => flight.clone(),
                None => {
                    let flight = self.start(job.clone());
                    inflight.put(job, (flight.clone(), Instant::now()));
                    flight
                }
            }
        };
        // A caller that joins a lookup late waits at most as long as the first one.
        match tokio::time::timeout(self.limit, flight).await {
            Ok(policy) => policy,
            Err(_) => Arc::new(DriverPolicy::Failed(LookupError::TimedOut(self.limit))),
        }
    }

    /// Spawns a task, because an admission that gives up must not cancel the lookup for the others.
    fn start(&self, job: JobKey) -> Inflight {
        let (source, limit) = (Arc::clone(&self.source), self.limit);
        let task = tokio::spawn(async move {
            let policy = match tokio::time::timeout(limit, source.find(&job)).await {
                Ok(Ok(policy)) => policy,
                Ok(Err(error)) => DriverPolicy::Failed(error),
                Err(_) => DriverPolicy::Failed(LookupError::TimedOut(limit)),
            };
            if let DriverPolicy::Failed(error) = &policy {
                tracing::warn!(namespace = job.namespace, job = job.app_id, %error, "driver lookup failed");
            }
            Arc::new(policy)
        });
        // The task is never cancelled. If it panics, the policy is as unknown as after a timeout.
        let policy =
            task.map(move |done| done.unwrap_or_else(|_| Arc::new(DriverPolicy::Failed(LookupError::TimedOut(limit)))));
        policy.boxed().shared()
    }
}

/// Whether a lookup can be shared: it is in flight, or its result has not expired.
fn is_fresh(flight: &Inflight, since: Instant) -> bool {
    let ttl = match flight.peek().map(Arc::as_ref) {
        None => return true,
        Some(DriverPolicy::Found { .. }) => FOUND_TTL,
        Some(DriverPolicy::NoDriver | DriverPolicy::Failed(_)) => NOT_FOUND_TTL,
    };
    since.elapsed() < ttl
}

#[cfg(test)]
mod tests {
    use super::*;

    use http::{Request, Response};
    use kube::client::Body;
    use serde_json::{Value, json};
    use tower_test::mock::{self, Handle};

    type Api = Handle<Request<Body>, Response<Body>>;

    const JOB: JobRef<'_> = JobRef { namespace: "etl", app_id: "spark-1" };
    const LABEL: &str = "spark-app-selector";

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

    async fn answer(api: &mut Api, drivers: Value) -> String {
        let (request, answer) = api.next_request().await.expect("no request to the API");
        let body = json!({"items": drivers}).to_string();
        answer.send_response(Response::new(Body::from(body.into_bytes())));
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
        let asking = (0..50).map(|_| lookup.policy(JOB, LABEL));
        let answering = async {
            let uri = answer(&mut api, json!([driver("2026-01-01T00:00:00Z", "0.7", "Running")])).await;
            assert!(uri.starts_with("/api/v1/namespaces/etl/pods?"), "{uri}");
            assert!(uri.contains("spark-app-selector%3Dspark-1%2Cspark-role%3Ddriver"), "{uri}");
        };
        let (found, ()) = tokio::join!(futures::future::join_all(asking), answering);
        assert!(found.iter().all(|found| ratio(found) == "0.7"));
        // Cached: the test would not answer a second request.
        assert_eq!(ratio(&*lookup.policy(JOB, LABEL).await), "0.7");
    }

    #[tokio::test]
    async fn the_newest_live_driver_is_used() {
        let (lookup, mut api) = lookup(Duration::from_secs(5));
        let drivers = json!([
            driver("2026-01-01T00:00:02Z", "0.3", "Running"),
            driver("2026-01-01T00:00:09Z", "0.9", "Failed"),
            driver("2026-01-01T00:00:01Z", "0.1", "Pending"),
        ]);
        let (found, _) = tokio::join!(lookup.policy(JOB, LABEL), answer(&mut api, drivers));
        assert_eq!(ratio(&found), "0.3");
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_api_costs_each_lookup_at_most_the_limit() {
        let limit = Duration::from_secs(4);
        let (lookup, mut api) = lookup(limit);
        let begin = tokio::time::Instant::now();
        let (first, second) = tokio::join!(lookup.policy(JOB, LABEL), lookup.policy(JOB, LABEL));
        assert!(matches!((&*first, &*second), (DriverPolicy::Failed(_), DriverPolicy::Failed(_))));
        assert_eq!(begin.elapsed(), limit);
        // The failure is cached for a moment.
        assert!(matches!(&*lookup.policy(JOB, LABEL).await, DriverPolicy::Failed(_)));
        assert_eq!(begin.elapsed(), limit);
        assert!(api.next_request().await.is_some());
    }

    #[tokio::test]
    async fn names_that_no_driver_can_have_are_not_looked_up() {
        let (lookup, _api) = lookup(Duration::from_secs(5));
        for (namespace, id) in [("etl/../secrets", "x"), ("etl", "a,b=c"), ("etl", ""), ("", "x"), ("etl", "é")] {
            let found = lookup.policy(JobRef { namespace, app_id: id }, LABEL).await;
            assert!(matches!(&*found, DriverPolicy::NoDriver), "{namespace:?} {id:?}: {found:?}");
        }
    }
}
