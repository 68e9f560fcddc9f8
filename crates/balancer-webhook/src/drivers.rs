//! Looks a job's policy up by its driver in the Kubernetes API, for when the ledger knows none: one
//! look-up in flight per job, each bounded, few remembered and not for long.

use std::fmt;
use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context;
use balancer_core::{Conventions, InvalidField, JobRef, Pod, PolicyOverrides};
use futures::FutureExt;
use futures::future::{BoxFuture, Shared};
use kube::api::ListParams;
use lru::LruCache;

/// Jobs whose look-ups are under way or remembered.
const MOST_REMEMBERED: NonZeroUsize = NonZeroUsize::new(1024).unwrap();
/// A told policy serves again for so long where the ledger cannot keep it.
const TOLD_FOR: Duration = Duration::from_secs(5);
/// A failure, or a driver that is not there, is asked about again after so long.
const UNTOLD_FOR: Duration = Duration::from_secs(1);
/// A job has one driver; a few more may be left of earlier attempts.
const MOST_DRIVERS: u32 = 50;

/// Far above the budget, which is the bound that counts; a connection must not hang forever.
const API_SILENCE: Duration = Duration::from_secs(30);

/// What a look-up came to.
#[derive(Debug)]
pub enum DriverPolicy {
    /// The live, newest driver of the job states this.
    Found {
        /// What its annotations validly state.
        overrides: PolicyOverrides,
        /// What they state and we cannot read.
        invalid: Vec<InvalidField>,
    },
    /// The cluster has no driver of that job, or none to ask.
    NoDriver,
    /// The cluster could not be asked, or not in time.
    Failed(LookupError),
}

/// Why the cluster told nothing.
#[derive(Debug, thiserror::Error)]
pub enum LookupError {
    /// It refused, or answered nonsense.
    #[error("the Kubernetes API did not tell the job's driver: {0}")]
    Api(#[source] Box<kube::Error>),
    /// Its answer is not a list of pods.
    #[error("the Kubernetes API's answer is not a list of pods: {0}")]
    NotPods(#[source] serde_json::Error),
    /// The budget ran out.
    #[error("the Kubernetes API did not answer within {0:?}")]
    TimedOut(Duration),
}

/// Asks the cluster.
pub enum DriverSource {
    /// By the Kubernetes API.
    Cluster {
        /// The client.
        client: kube::Client,
        /// How the cluster names drivers and jobs.
        conventions: Arc<Conventions>,
    },
    /// There is no cluster: no job has a driver.
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
    /// Connects as the environment says: a kubeconfig, or the pod's service account.
    pub async fn new(dev: bool, conventions: Arc<Conventions>) -> anyhow::Result<Self> {
        if dev {
            return Ok(Self::None);
        }
        let client = balancer_runtime::cluster::client(API_SILENCE)
            .await
            .context("cannot look drivers up; accepted: access to a cluster, or --dev without any")?;
        Ok(Self::Cluster { client, conventions })
    }

    async fn find(&self, job: &Job) -> Result<DriverPolicy, LookupError> {
        let Self::Cluster { client, conventions } = self else { return Ok(DriverPolicy::NoDriver) };
        // They come from a pod that was not validated yet, and go into a URL and a selector.
        if !is_label_text(&job.namespace) || !is_label_text(&job.app_id) {
            return Ok(DriverPolicy::NoDriver);
        }
        let selector = format!(
            "{}={},{}={}",
            job.label, job.app_id, conventions.workload_role_label, conventions.driver_role_value
        );
        let api = |error: kube::Error| LookupError::Api(Box::new(error));
        // A consistent read, not one from the apiserver's cache: a driver that the cache has yet to
        // hear of would leave its whole job at the default.
        let list = ListParams::default().labels(&selector).limit(MOST_DRIVERS);
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

/// Whether it can be a namespace or a label's value at all; if not, no driver has it.
fn is_label_text(text: &str) -> bool {
    (1..=63).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
}

#[derive(serde::Deserialize)]
struct Pods<'a> {
    #[serde(borrow)]
    items: Vec<Pod<'a>>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Job {
    namespace: String,
    label: String,
    app_id: String,
}

type Inflight = Shared<BoxFuture<'static, Arc<DriverPolicy>>>;

/// The look-ups of all jobs.
pub struct DriverLookup {
    finder: Arc<DriverSource>,
    limit: Duration,
    inflight: Mutex<LruCache<Job, (Inflight, Instant)>>,
}

impl fmt::Debug for DriverLookup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DriverLookup").field("finder", &self.finder).field("limit", &self.limit).finish_non_exhaustive()
    }
}

impl DriverLookup {
    /// Look-ups by `finder`, each of at most `limit`.
    pub fn new(finder: DriverSource, limit: Duration) -> Self {
        Self { finder: Arc::new(finder), limit, inflight: Mutex::new(LruCache::new(MOST_REMEMBERED)) }
    }

    /// What the job's driver states. Admissions of one job share one look-up.
    pub async fn policy(&self, job: JobRef<'_>, label: &str) -> Arc<DriverPolicy> {
        let job = Job { namespace: job.namespace.into(), label: label.into(), app_id: job.app_id.into() };
        let flight = {
            let mut inflight = self.inflight.lock().unwrap_or_else(PoisonError::into_inner);
            match inflight.get(&job).filter(|(flight, since)| serves(flight, *since)) {
                Some((flight, _)) => flight.clone(),
                None => {
                    let flight = self.start(job.clone());
                    inflight.put(job, (flight.clone(), Instant::now()));
                    flight
                }
            }
        };
        // Whoever joins late waits no longer than whoever began.
        match tokio::time::timeout(self.limit, flight).await {
            Ok(looked) => looked,
            Err(_) => Arc::new(DriverPolicy::Failed(LookupError::TimedOut(self.limit))),
        }
    }

    /// In a task of its own: an admission that gives up must not stop the others' look-up.
    fn start(&self, job: Job) -> Inflight {
        let (finder, limit) = (Arc::clone(&self.finder), self.limit);
        let task = tokio::spawn(async move {
            let looked = match tokio::time::timeout(limit, finder.find(&job)).await {
                Ok(Ok(looked)) => looked,
                Ok(Err(error)) => DriverPolicy::Failed(error),
                Err(_) => DriverPolicy::Failed(LookupError::TimedOut(limit)),
            };
            if let DriverPolicy::Failed(error) = &looked {
                tracing::warn!(namespace = job.namespace, job = job.app_id, %error, "the job's driver is not known");
            }
            Arc::new(looked)
        });
        // The task is never cancelled; should it panic, the policy is as unknown as after a time-out.
        let told =
            task.map(move |done| done.unwrap_or_else(|_| Arc::new(DriverPolicy::Failed(LookupError::TimedOut(limit)))));
        told.boxed().shared()
    }
}

/// Whether a look-up still serves: under way, or told not long ago.
fn serves(flight: &Inflight, since: Instant) -> bool {
    let most = match flight.peek().map(Arc::as_ref) {
        None => return true,
        Some(DriverPolicy::Found { .. }) => TOLD_FOR,
        Some(DriverPolicy::NoDriver | DriverPolicy::Failed(_)) => UNTOLD_FOR,
    };
    since.elapsed() < most
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

    /// Look-ups in a Kubernetes API that the test answers for.
    fn look_up(limit: Duration) -> (Arc<DriverLookup>, Api) {
        let (service, api) = mock::pair();
        let client = kube::Client::new(service, "default");
        let finder = DriverSource::Cluster { client, conventions: Arc::default() };
        (Arc::new(DriverLookup::new(finder, limit)), api)
    }

    fn driver(created: &str, ratio: &str, phase: &str) -> Value {
        json!({
            "metadata": {"creationTimestamp": created, "annotations": {"workload/spot-ratio": ratio}},
            "status": {"phase": phase},
        })
    }

    async fn answer(api: &mut Api, drivers: Value) -> String {
        let (request, answer) = api.next_request().await.expect("the API was not asked");
        let body = json!({"items": drivers}).to_string();
        answer.send_response(Response::new(Body::from(body.into_bytes())));
        request.uri().to_string()
    }

    fn ratio(looked: &DriverPolicy) -> String {
        match looked {
            DriverPolicy::Found { overrides, .. } => {
                overrides.spot_ratio.map(|ratio| ratio.to_string()).unwrap_or_default()
            }
            other => format!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn many_executors_of_a_job_share_one_look_up() {
        let (look_up, mut api) = look_up(Duration::from_secs(5));
        let asking = (0..50).map(|_| look_up.policy(JOB, LABEL));
        let answering = async {
            let uri = answer(&mut api, json!([driver("2026-01-01T00:00:00Z", "0.7", "Running")])).await;
            assert!(uri.starts_with("/api/v1/namespaces/etl/pods?"), "{uri}");
            assert!(uri.contains("spark-app-selector%3Dspark-1%2Cspark-role%3Ddriver"), "{uri}");
        };
        let (looked, ()) = tokio::join!(futures::future::join_all(asking), answering);
        assert!(looked.iter().all(|looked| ratio(looked) == "0.7"));
        // Remembered for a while: nobody answers a second question here.
        assert_eq!(ratio(&*look_up.policy(JOB, LABEL).await), "0.7");
    }

    #[tokio::test]
    async fn the_newest_live_driver_is_the_one_that_counts() {
        let (look_up, mut api) = look_up(Duration::from_secs(5));
        let drivers = json!([
            driver("2026-01-01T00:00:02Z", "0.3", "Running"),
            driver("2026-01-01T00:00:09Z", "0.9", "Failed"),
            driver("2026-01-01T00:00:01Z", "0.1", "Pending"),
        ]);
        let (looked, _) = tokio::join!(look_up.policy(JOB, LABEL), answer(&mut api, drivers));
        assert_eq!(ratio(&looked), "0.3");
    }

    #[tokio::test(start_paused = true)]
    async fn an_api_that_does_not_answer_costs_no_more_than_the_limit_and_is_not_asked_by_each() {
        let limit = Duration::from_secs(4);
        let (look_up, mut api) = look_up(limit);
        let begin = tokio::time::Instant::now();
        let (first, second) = tokio::join!(look_up.policy(JOB, LABEL), look_up.policy(JOB, LABEL));
        assert!(matches!((&*first, &*second), (DriverPolicy::Failed(_), DriverPolicy::Failed(_))));
        assert_eq!(begin.elapsed(), limit);
        // For a moment it is not asked again.
        assert!(matches!(&*look_up.policy(JOB, LABEL).await, DriverPolicy::Failed(_)));
        assert_eq!(begin.elapsed(), limit);
        assert!(api.next_request().await.is_some());
    }

    #[tokio::test]
    async fn a_job_that_no_driver_can_have_is_not_asked_for() {
        let (look_up, _api) = look_up(Duration::from_secs(5));
        for (namespace, id) in [("etl/../secrets", "x"), ("etl", "a,b=c"), ("etl", ""), ("", "x"), ("etl", "é")] {
            let looked = look_up.policy(JobRef { namespace, app_id: id }, LABEL).await;
            assert!(matches!(&*looked, DriverPolicy::NoDriver), "{namespace:?} {id:?}: {looked:?}");
        }
    }
}
