//! The requests of a lookup: the drivers of a job, and the pod that owns an executor.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use balancer_core::{Conventions, Pod};
use futures::AsyncReadExt;
use kube::api::{GetParams, ListParams};
use kube::core::Request;

use super::{DriverPolicy, JobKey, OwnerKey, StatedBy};

/// A job has one live driver; a few more may remain from earlier attempts.
const MAX_DRIVERS: u32 = 50;
/// The most bytes of an answer, because a list from the apiserver's cache has no limit. A driver has some 10 KB.
const MAX_ANSWER: u64 = 2 << 20;
/// The pods that are not over yet.
const UNFINISHED: &str = "status.phase!=Succeeded,status.phase!=Failed";

/// Far above the deadline of a lookup; it only frees a connection that would hang forever.
const API_READ_TIMEOUT: Duration = Duration::from_secs(30);

/// Why a lookup failed.
#[derive(Debug, thiserror::Error)]
pub enum LookupError {
    /// The request failed.
    #[error("the Kubernetes API did not return the job's drivers, or the owner of its executor: {}", balancer_runtime::cluster::chain(.0))]
    Api(#[source] Box<kube::Error>),
    /// The answer was not received completely.
    #[error("the answer of the Kubernetes API is incomplete: {0}")]
    Incomplete(#[source] std::io::Error),
    /// The answer is over the limit.
    #[error("the answer of the Kubernetes API has more than {MAX_ANSWER} bytes")]
    TooLarge,
    /// The answer is neither a list of pods nor a pod.
    #[error("the answer of the Kubernetes API is not a list of pods, nor a pod: {0}")]
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

    /// A client for the cluster, if there is one.
    pub fn client(&self) -> Option<kube::Client> {
        match self {
            Self::Cluster { client, .. } => Some(client.clone()),
            Self::None => None,
        }
    }
}

/// The API of the cluster, and the labels of drivers.
pub(super) struct Cluster {
    pub(super) client: kube::Client,
    pub(super) conventions: Arc<Conventions>,
}

/// The live drivers of a job, reduced to the two that matter.
#[derive(Default)]
pub(super) struct Drivers {
    /// The driver that owns the executor.
    pub(super) owner: Option<DriverPolicy>,
    /// The newest driver.
    pub(super) newest: Option<DriverPolicy>,
}

impl Cluster {
    /// The live drivers of the job, from the apiserver's cache or by a consistent list.
    pub(super) async fn drivers(&self, job: &JobKey, from: ListFrom) -> Result<Drivers, LookupError> {
        let selector = format!(
            "{}={},{} in ({})",
            job.label,
            job.app_id,
            self.conventions.workload_role_label,
            self.conventions.driver_role_values.join(",")
        );
        let list = ListParams::default().labels(&selector).fields(UNFINISHED);
        let list = match from {
            ListFrom::Cache => list.at("0"),
            ListFrom::Store => list.limit(MAX_DRIVERS),
        };
        let request = Request::new(pods_url(&job.namespace)).list(&list).map_err(not_built)?;
        let answer = self.answer(request).await?;
        let pods: Pods<'_> = serde_json::from_slice(&answer).map_err(LookupError::NotPods)?;
        let live = || pods.items.iter().filter(|pod| pod.is_live());
        // RFC 3339 in UTC compares as text.
        let newest = live().max_by_key(|pod| pod.metadata.creation_timestamp.as_deref());
        let owner = job.owner.as_ref().and_then(|owner| live().find(|pod| owner.is(pod)));
        let policy = |driver| self.policy(driver, StatedBy::Driver);
        Ok(Drivers { owner: owner.map(policy), newest: newest.map(policy) })
    }

    /// The policy that the pod which owns the executor states; `None` if that pod is not live. The read is consistent,
    /// because no other request can show that a pod which the apiserver's cache lacks is not there.
    pub(super) async fn owner(&self, job: &JobKey, owner: &OwnerKey) -> Result<Option<DriverPolicy>, LookupError> {
        let request =
            Request::new(pods_url(&job.namespace)).get(&owner.name, &GetParams::default()).map_err(not_built)?;
        let answer = match self.answer(request).await {
            Err(LookupError::Api(error)) if is_not_found(&error) => return Ok(None),
            answer => answer?,
        };
        let pod: Pod<'_> = serde_json::from_slice(&answer).map_err(LookupError::NotPods)?;
        let by = if self.is_driver(&pod, job) { StatedBy::Driver } else { StatedBy::Owner };
        Ok((owner.is(&pod) && pod.is_live()).then(|| self.policy(&pod, by)))
    }

    fn is_driver(&self, pod: &Pod<'_>, job: &JobKey) -> bool {
        let role = pod.label(&self.conventions.workload_role_label);
        role.is_some_and(|role| self.conventions.is_driver_role(role)) && pod.label(&job.label) == Some(&job.app_id)
    }

    fn policy(&self, pod: &Pod<'_>, by: StatedBy) -> DriverPolicy {
        let (overrides, invalid) = self.conventions.overrides(pod);
        DriverPolicy::Found { by, overrides, invalid }
    }

    /// The body of the API's answer.
    async fn answer(&self, request: http::Request<Vec<u8>>) -> Result<Vec<u8>, LookupError> {
        let stream = self.client.request_stream(request).await.map_err(|error| LookupError::Api(Box::new(error)))?;
        let mut answer = Vec::new();
        stream.take(MAX_ANSWER + 1).read_to_end(&mut answer).await.map_err(LookupError::Incomplete)?;
        if answer.len() as u64 > MAX_ANSWER {
            return Err(LookupError::TooLarge);
        }
        Ok(answer)
    }
}

fn pods_url(namespace: &str) -> String {
    format!("/api/v1/namespaces/{namespace}/pods")
}

fn not_built(error: kube::core::request::Error) -> LookupError {
    LookupError::Api(Box::new(kube::Error::BuildRequest(error)))
}

fn is_not_found(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == http::StatusCode::NOT_FOUND.as_u16())
}

/// Where a list of drivers comes from.
#[derive(Clone, Copy)]
pub(super) enum ListFrom {
    /// The apiserver's cache, which may be some moments old.
    Cache,
    /// A consistent read.
    Store,
}

#[derive(serde::Deserialize)]
struct Pods<'a> {
    #[serde(borrow)]
    items: Vec<Pod<'a>>,
}
