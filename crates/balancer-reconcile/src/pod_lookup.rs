//! Asks the Kubernetes API whether the pods of unconfirmed placements exist. The watches alone cannot tell: a pod that
//! they have not reported may have been refused, or they may be late.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use balancer_core::{Conventions, JobId, JobPod, Unconfirmed};
use balancer_runtime::cluster;
use balancer_runtime::k8s_names::{is_dns_label, is_dns_subdomain, is_label_value};
use futures::{StreamExt, stream};
use kube::api::ListParams;
use kube::{Api, Client};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::index::is_of_job;
use crate::watch::WatchedPod;

/// Requests at once, for all jobs.
const MAX_REQUESTS: usize = 16;
/// Requests at once for one job.
const MAX_REQUESTS_OF_JOB: usize = 4;
/// Jobs whose pods are looked up at once. Others are looked up after their next reconcile.
const MAX_JOBS: usize = 256;
/// The most that one request may take, once it has its turn.
const LIMIT: Duration = Duration::from_secs(2);
/// The most that the lookup of one job may take. It is repeated for what is missing then.
const LOOKUP_LIMIT: Duration = Duration::from_secs(5);
/// Executors in a page of a list.
const PAGE: u32 = 500;

/// The lookups in flight: one for each job.
pub(crate) struct PodLookups {
    client: Client,
    conventions: Arc<Conventions>,
    permits: Arc<Semaphore>,
    tasks: JoinSet<Answer>,
    in_flight: HashSet<Arc<JobId>>,
}

/// What the API has answered about the placements of one job.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Answer {
    pub(crate) job: Arc<JobId>,
    /// The placements without a live pod.
    pub(crate) absent: Vec<Unconfirmed>,
    /// Whether a pod exists, which the watch will report, or the API did not answer.
    pub(crate) has_others: bool,
    /// Why a pod could not be looked up.
    pub(crate) error: Option<String>,
}

/// Why a pod could not be looked up.
#[derive(Debug, thiserror::Error)]
enum LookupError {
    #[error("the Kubernetes API returned an error: {0}")]
    Api(#[source] Box<kube::Error>),
    #[error("the Kubernetes API did not answer within {0:?}")]
    TimedOut(Duration),
}

impl PodLookups {
    pub(crate) fn new(client: Client, conventions: Arc<Conventions>) -> Self {
        Self {
            client,
            conventions,
            permits: Arc::new(Semaphore::new(MAX_REQUESTS)),
            tasks: JoinSet::new(),
            in_flight: HashSet::new(),
        }
    }

    /// Looks up the pods of these placements. Returns whether it does: not if a lookup of the job is in flight already, or
    /// too many others are.
    ///
    /// `primary` is the primary owner of the executors with the job's job id.
    pub(crate) fn start(
        &mut self,
        job: &Arc<JobId>,
        primary: Option<&Arc<str>>,
        unconfirmed: Vec<Unconfirmed>,
    ) -> bool {
        if self.in_flight.len() >= MAX_JOBS || !self.in_flight.insert(Arc::clone(job)) {
            return false;
        }
        let lookup = Lookup {
            pods: Api::namespaced(self.client.clone(), &job.namespace),
            conventions: Arc::clone(&self.conventions),
            permits: Arc::clone(&self.permits),
            job: Arc::clone(job),
            primary: primary.cloned(),
        };
        self.tasks.spawn(lookup.run(unconfirmed));
        true
    }

    /// The next answer; never if no lookup is in flight.
    pub(crate) async fn next(&mut self) -> Answer {
        loop {
            match self.tasks.join_next().await {
                Some(Ok(answer)) => {
                    self.in_flight.remove(&answer.job);
                    return answer;
                }
                // A panic is a defect. The other jobs are looked up all the same, and this one after its grace.
                Some(Err(error)) => {
                    tracing::error!(%error, "a lookup of pods panicked");
                    self.in_flight.clear();
                }
                None => std::future::pending().await,
            }
        }
    }
}

/// The lookup of one job's pods.
struct Lookup {
    pods: Api<WatchedPod>,
    conventions: Arc<Conventions>,
    permits: Arc<Semaphore>,
    job: Arc<JobId>,
    primary: Option<Arc<str>>,
}

impl Lookup {
    async fn run(self, unconfirmed: Vec<Unconfirmed>) -> Answer {
        let number = unconfirmed.len();
        let mut absent = Vec::new();
        let result = timeout(LOOKUP_LIMIT, self.look_up(unconfirmed, &mut absent)).await;
        let error = result.unwrap_or(Err(LookupError::TimedOut(LOOKUP_LIMIT))).err();
        let (error, has_others) = (error.map(|error| cluster::chain(&error)), absent.len() < number);
        Answer { job: self.job, absent, has_others, error }
    }

    /// Adds the placements without a live pod to `absent`. Fails after the others were looked up.
    async fn look_up(&self, unconfirmed: Vec<Unconfirmed>, absent: &mut Vec<Unconfirmed>) -> Result<(), LookupError> {
        // The name of a pod that the API server generates is not known to the ledger, which has the uid of the review.
        let (generated, named): (Vec<_>, Vec<_>) =
            unconfirmed.into_iter().partition(|placement| is_uuid(&placement.key));
        let mut answers = stream::iter(named)
            .map(|placement| async move { (self.is_live(&placement.key).await, placement) })
            .buffer_unordered(MAX_REQUESTS_OF_JOB);
        let mut result = Ok(());
        while let Some((is_live, placement)) = answers.next().await {
            match is_live {
                Ok(false) => absent.push(placement),
                Ok(true) => {}
                Err(error) => result = Err(error),
            }
        }
        if !generated.is_empty() {
            let live = self.live_keys().await?;
            absent.extend(generated.into_iter().filter(|placement| !live.contains(&placement.key)));
        }
        result
    }

    /// Whether the pod of this name is a live executor of the job. The read is consistent, not one from the API server's
    /// cache, and it is one key of etcd.
    async fn is_live(&self, name: &str) -> Result<bool, LookupError> {
        // No pod can have another name, and the name becomes a part of the URL.
        if !is_dns_label(&self.job.namespace) || !is_dns_subdomain(name) {
            return Ok(false);
        }
        let pod = self.request(self.pods.get_opt(name)).await?;
        Ok(pod.is_some_and(|pod| self.key(&pod).is_some_and(|key| key == name)))
    }

    /// The keys of all live executors of the job.
    async fn live_keys(&self) -> Result<HashSet<String>, LookupError> {
        let mut live = HashSet::new();
        let job = self.job.as_job_ref();
        let job_id = job.label_value();
        if !is_dns_label(job.namespace) || !is_label_value(job_id) {
            return Ok(live);
        }
        let Conventions { workload_role_label, executor_role_value, job_id_label, .. } = &*self.conventions;
        for label in job_id_label {
            let selector = format!("{label}={job_id},{workload_role_label}={executor_role_value}");
            let mut params = ListParams::default().labels(&selector).limit(PAGE);
            loop {
                let page = self.request(self.pods.list(&params)).await?;
                live.extend(page.items.iter().filter_map(|pod| self.key(pod)));
                params.continue_token = page.metadata.continue_.filter(|token| !token.is_empty());
                if params.continue_token.is_none() {
                    break;
                }
            }
        }
        Ok(live)
    }

    /// The key of the pod in the job's ledger, if it is a live executor of the job.
    fn key(&self, pod: &WatchedPod) -> Option<String> {
        let Some(JobPod::Executor(executor)) = JobPod::of(&pod.pod, &self.conventions) else { return None };
        let job = self.job.as_job_ref();
        let has_label = (executor.job.namespace, executor.job.app_id) == (job.namespace, job.label_value());
        let is_of_job = has_label && is_of_job(job, executor.driver, self.primary.as_deref());
        is_of_job.then(|| executor.key.to_owned())
    }

    async fn request<T>(&self, request: impl Future<Output = kube::Result<T>>) -> Result<T, LookupError> {
        // The semaphore is never closed.
        let _permit = self.permits.acquire().await;
        match timeout(LIMIT, request).await {
            Ok(answer) => answer.map_err(|error| LookupError::Api(Box::new(error))),
            Err(_) => Err(LookupError::TimedOut(LIMIT)),
        }
    }
}

/// Whether a text has the form of a uid.
fn is_uuid(text: &str) -> bool {
    text.len() == 36
        && text.bytes().enumerate().all(|(at, byte)| match at {
            8 | 13 | 18 | 23 => byte == b'-',
            _ => byte.is_ascii_hexdigit(),
        })
}
