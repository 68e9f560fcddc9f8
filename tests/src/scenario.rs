//! A namespace whose Spark pods go through our webhook: apiserver, Redis, webhook processes, the
//! stand-in for the kubelet, and what a test asks of them again and again.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::api::{Api, ListParams};
use kube::{Client, ResourceExt};
use redis::AsyncCommands;

use crate::balance::Balance;
use crate::control_plane::ControlPlane;
use crate::kubelet::Kubelet;
use crate::nodes;
use crate::pods::{self, PodBuilder, Posted};
use crate::redis::RedisServer;
use crate::registration::Registration;
use crate::wait::until_true;
use crate::webhook::{Webhook, WebhookOptions};

const CAPACITY: &str = "karpenter.sh/capacity-type";
const DECISION: &str = "workload/capacity-type";
const SOON: Duration = Duration::from_secs(60);

/// A job's executors by capacity.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// On spot.
    pub spot: usize,
    /// On on-demand.
    pub on_demand: usize,
}

impl Counts {
    /// Fails unless the job is within `most` executors of its ratio.
    pub fn ensure_near(self, ratio: f64, most: f64) -> Result<()> {
        let total = self.spot + self.on_demand;
        #[expect(clippy::cast_precision_loss, reason = "a test's few hundred executors")]
        let distance = (self.spot as f64 - ratio * total as f64).abs();
        ensure!(distance <= most + 1e-9, "{self:?} is {distance} executors from {ratio}, more than {most}");
        Ok(())
    }

    fn add(&mut self, capacity: &str) -> Result<()> {
        match capacity {
            "spot" => self.spot += 1,
            "on-demand" => self.on_demand += 1,
            other => anyhow::bail!("{other} is no capacity"),
        }
        Ok(())
    }
}

/// A namespace served by webhooks.
pub struct Scenario {
    /// Whose apiserver calls us.
    pub plane: &'static ControlPlane,
    /// The administrator's client.
    pub client: Client,
    /// Whose pods are sent to us.
    pub namespace: String,
    /// Where the ledger is.
    pub redis: RedisServer,
    /// The processes.
    pub webhooks: Vec<Webhook>,
    _balance: Balance,
    _kubelet: Kubelet,
}

impl Scenario {
    /// Starts `replicas` webhooks with `options` before one address, and sends them the pods of a
    /// new namespace.
    pub async fn start(purpose: &str, replicas: usize, options: WebhookOptions) -> Result<Self> {
        let plane = ControlPlane::shared().await?;
        let client = plane.client()?;
        let namespace = plane.namespace(purpose).await?;
        let redis = RedisServer::start().await?;
        let mut webhooks = Vec::new();
        for _ in 0..replicas {
            webhooks.push(Webhook::start(options.clone().redis(&redis)?.cluster(plane)).await?);
        }
        let ports: Vec<u16> = webhooks.iter().map(|webhook| webhook.port).collect();
        let balance = Balance::start(&ports).await?;
        // Fails what the webhook does not answer: a test must not pass by being ignored.
        let registration = Registration { failure_policy: "Fail", ..Registration::new(&namespace, balance.port) };
        registration.apply(plane).await?;
        nodes::ensure(&client, "spot", 2).await?;
        nodes::ensure(&client, "on-demand", 2).await?;
        let kubelet = Kubelet::start(client.clone(), &namespace);
        Ok(Self { plane, client, namespace, redis, webhooks, _balance: balance, _kubelet: kubelet })
    }

    /// The pods of the namespace.
    pub fn pods(&self) -> Api<Pod> {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    /// Posts a pod to the namespace.
    pub async fn post(&self, pod: &PodBuilder) -> Result<Posted> {
        pod.post(&self.client, &self.namespace).await
    }

    /// Makes a job's driver, which asks for `ratio`.
    pub async fn driver(&self, job: &str, ratio: &str) -> Result<Posted> {
        self.post(&pods::driver(job).annotation("workload/spot-ratio", ratio)).await
    }

    /// Makes executor `id` of a job and answers what it was placed on.
    pub async fn executor(&self, job: &str, id: u32) -> Result<String> {
        placed(&self.post(&pods::executor(job, id)).await?.pod()?)
    }

    /// Makes many executors, `at_once` at a time.
    pub async fn executors(&self, job: &str, ids: impl Iterator<Item = u32>, at_once: usize) -> Result<()> {
        use futures::{StreamExt, TryStreamExt};
        futures::stream::iter(ids.map(Ok))
            .map(|id: Result<u32>| async move { self.executor(job, id?).await.map(drop) })
            .buffer_unordered(at_once)
            .try_collect()
            .await
    }

    /// The job's live executors.
    pub async fn live(&self, job: &str) -> Result<Vec<Pod>> {
        let list = ListParams::default().labels(&format!("spark-role=executor,{}={job}", pods::JOB_ID_LABEL));
        let live = |pod: &Pod| pod.metadata.deletion_timestamp.is_none();
        Ok(self.pods().list(&list).await?.items.into_iter().filter(live).collect())
    }

    /// The job's live executors by what they were placed on.
    pub async fn counts(&self, job: &str) -> Result<Counts> {
        let mut counts = Counts::default();
        for pod in self.live(job).await? {
            counts.add(&placed(&pod)?)?;
        }
        Ok(counts)
    }

    /// The job's executors by the ledger's counts.
    pub async fn ledger(&self, job: &str) -> Result<Counts> {
        let key = format!("exec-count:{{{}:{job}}}", self.namespace);
        let (spot, on_demand): (Option<usize>, Option<usize>) =
            self.redis.connection().await?.hmget(key, &["spot", "on-demand"]).await?;
        Ok(Counts { spot: spot.unwrap_or(0), on_demand: on_demand.unwrap_or(0) })
    }

    /// Fails unless ledger and live executors are the same.
    pub async fn ensure_ledger_is_true(&self, job: &str) -> Result<Counts> {
        let (live, ledger) = (self.counts(job).await?, self.ledger(job).await?);
        ensure!(live == ledger, "live are {live:?}, and the ledger says {ledger:?}");
        Ok(live)
    }

    /// Waits until the scheduler has bound all executors of a job, and fails unless each is on a
    /// node of the capacity that it was placed on.
    pub async fn ensure_bound_as_placed(&self, job: &str) -> Result<()> {
        until_true(SOON, "all executors to be bound", async || {
            let bound = |pod: &Pod| pod.spec.as_ref().is_some_and(|spec| spec.node_name.is_some());
            Ok(self.live(job).await?.iter().all(bound))
        })
        .await?;
        for pod in self.live(job).await? {
            let node = pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()).context("not bound")?;
            let node = Api::<Node>::all(self.client.clone()).get(node).await?;
            let on = node.labels().get(CAPACITY).context("a node without capacity")?;
            ensure!(*on == placed(&pod)?, "{} was placed on {} and is on {on}", pod.name_any(), placed(&pod)?);
        }
        Ok(())
    }

    /// The sum of a metric over all webhooks.
    pub async fn metric(&self, name: &str, labels: &[(&str, &str)]) -> Result<f64> {
        let mut sum = 0.0;
        for webhook in &self.webhooks {
            sum += webhook.metrics().await?.sum(name, labels).unwrap_or(0.0);
        }
        Ok(sum)
    }
}

/// What an executor was placed on: by its decision, or by its own selector where it was left alone.
pub fn placed(pod: &Pod) -> Result<String> {
    let selector = || pod.spec.as_ref()?.node_selector.as_ref()?.get(CAPACITY);
    let decision = pod.annotations().get(DECISION).or_else(selector);
    let capacity = decision.with_context(|| format!("{} was not placed", pod.name_any()))?;
    Ok(capacity.split('/').next().unwrap_or_default().to_owned())
}

/// The pod's selector of a capacity.
pub fn selected(pod: &Pod) -> Option<&str> {
    pod.spec.as_ref()?.node_selector.as_ref()?.get(CAPACITY).map(String::as_str)
}
