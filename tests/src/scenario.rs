//! A namespace whose Spark pods go through our webhook and are followed by our reconciler: apiserver,
//! Redis, our processes, the stand-in for the kubelet, and the checks that many tests share.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::api::{Api, DeleteParams, ListParams};
use kube::{Client, ResourceExt};
use redis::AsyncCommands;
use redis::aio::MultiplexedConnection;
use tokio::time::sleep;

use crate::account::{Account, EVENTS, LIST_PODS, NODES, PODS, Right};
use crate::balance::Balance;
use crate::control_plane::Plane;
use crate::kubelet::Kubelet;
use crate::nodes::{self, CAPACITY, TRUTH};
use crate::pods::{self, PodBuilder, Posted};
use crate::reconciler::{Reconciler, ReconcilerOptions};
use crate::redis::{RedisServer, Servers, policy_word};
use crate::registration::Registration;
use crate::wait::{SOON, until, until_true};
use crate::webhook::{Webhook, WebhookOptions};

/// The grace of the scenarios' reconcilers: how long a placement may wait for its pod.
pub const GRACE: Duration = Duration::from_secs(5);
/// Within this time the ledger matches the pods again after any failure.
pub const REPAIRED: Duration = Duration::from_secs(5);
/// The number of new executors that must bring a job back to its ratio.
const MORE: usize = 20;

const LEASE: &str = "spot-balancer-reconciler";
const DECISION: &str = "workload/capacity-type";
/// Between two checks of a ledger that has to stay correct.
const HOLDS: Duration = Duration::from_millis(300);
/// Between two checks of one that is not correct yet: a check lists all pods of a job.
const LOOK: Duration = Duration::from_millis(80);

/// Executors by their names in the ledger, and what they count as.
pub type Executors = BTreeMap<String, String>;

/// A job's executors by capacity.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// On spot.
    pub spot: usize,
    /// On on-demand.
    pub on_demand: usize,
}

impl Counts {
    /// How many executors the job is from its ratio.
    #[expect(clippy::cast_precision_loss, reason = "a test's few hundred executors")]
    pub fn distance(self, ratio: f64) -> f64 {
        (self.spot as f64 - ratio * (self.spot + self.on_demand) as f64).abs()
    }

    /// Fails unless the job is within `most` executors of its ratio.
    pub fn ensure_near(self, ratio: f64, most: f64) -> Result<()> {
        let distance = self.distance(ratio);
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

/// A namespace served by webhooks and reconcilers, with its ledgers in one Redis server or in several.
pub struct Scenario<R = RedisServer> {
    /// The administrator's client.
    pub client: Client,
    /// The namespace whose pods are sent to the webhooks.
    pub namespace: String,
    /// Where the ledger is.
    pub redis: R,
    /// The processes.
    pub webhooks: Vec<Webhook>,
    /// The processes.
    pub reconcilers: Vec<Reconciler>,
    /// The address in front of the webhooks.
    pub balance: Balance,
    /// Without it bound pods stay Pending, and deleted ones stay until their grace period is over.
    pub kubelet: Option<Kubelet>,
    /// The control plane whose apiserver calls the webhooks.
    pub plane: Plane,
    /// The label by which the pods of a job are found.
    pub job_id_label: &'static str,
    /// How long a placement may wait for its pod; by default [`GRACE`]. `None` is the default of the programs.
    pub grace: Option<Duration>,
    account: Option<Account>,
    next_id: AtomicU32,
}

impl Scenario {
    /// Starts `replicas` webhooks with `options` before one address, and sends them the pods of a
    /// new namespace.
    pub async fn start(purpose: &str, replicas: usize, options: WebhookOptions) -> Result<Self> {
        let mut scenario = Self::bare(Plane::shared().await?, purpose).await?;
        scenario.start_webhooks(replicas, options).await?;
        scenario.registration().apply(&scenario.plane).await?;
        Ok(scenario)
    }

    /// The same with webhooks that are `STRICT`, and with reconcilers.
    pub async fn reconciled(purpose: &str, webhooks: usize, reconcilers: usize) -> Result<Self> {
        let mut scenario = Self::start(purpose, webhooks, strict()).await?;
        scenario.start_reconcilers(reconcilers).await?;
        Ok(scenario)
    }

    /// The same with one webhook, which gets no DELETE reviews, and one reconciler.
    pub async fn without_deletions(plane: Plane, purpose: &str) -> Result<Self> {
        let mut scenario = Self::bare(plane, purpose).await?;
        scenario.start_webhooks(1, strict()).await?;
        Registration { deletions: false, ..scenario.registration() }.apply(&scenario.plane).await?;
        scenario.start_reconcilers(1).await?;
        Ok(scenario)
    }

    /// A new namespace, nodes and a Redis, and nothing of ours.
    pub async fn bare(plane: Plane, purpose: &str) -> Result<Self> {
        let client = plane.client()?;
        nodes::ensure(&client, "spot", 2).await?;
        nodes::ensure(&client, "on-demand", 2).await?;
        Self::without_nodes(plane, purpose).await
    }

    /// The same on nodes that the test has made.
    pub async fn without_nodes(plane: Plane, purpose: &str) -> Result<Self> {
        Self::with_ledger_in(RedisServer::start().await?, plane, purpose).await
    }
}

impl<R: Servers> Scenario<R> {
    /// A new namespace whose ledgers are in these servers, and nothing of ours.
    pub async fn with_ledger_in(redis: R, plane: Plane, purpose: &str) -> Result<Self> {
        let client = plane.client()?;
        let namespace = plane.namespace(purpose).await?;
        Ok(Self {
            kubelet: Some(Kubelet::start(client.clone(), &namespace)),
            redis,
            balance: Balance::start(&[]).await?,
            webhooks: Vec::new(),
            reconcilers: Vec::new(),
            account: None,
            // Larger than the ids that tests choose.
            next_id: AtomicU32::new(10_000),
            job_id_label: pods::JOB_ID_LABEL,
            grace: Some(GRACE),
            plane,
            client,
            namespace,
        })
    }

    /// Starts more webhooks, with the ledger in the scenario's Redis and as the cluster's administrator.
    pub async fn start_webhooks(&mut self, count: usize, options: WebhookOptions) -> Result<()> {
        for _ in 0..count {
            self.webhooks.push(Webhook::start(options.clone().redis(&self.redis)?.cluster(&self.plane)).await?);
        }
        self.send_to_webhooks();
        Ok(())
    }

    /// Starts webhooks and a reconciler with the same settings, and sends them the namespace's pods.
    pub async fn serve(&mut self, webhooks: usize, settings: &WebhookOptions) -> Result<()> {
        self.start_webhooks(webhooks, settings.clone()).await?;
        self.registration().apply(&self.plane).await?;
        let options = self.reconciler_options().await?.with(settings.clone());
        self.reconcilers.push(Reconciler::start(options).await?);
        Ok(())
    }

    /// The same with one webhook, which keeps the ledger in memory and reconciles by itself.
    pub async fn serve_in_memory(&mut self, settings: &WebhookOptions) -> Result<()> {
        let account = self.account_without_leases().await?;
        let options = self.in_memory(&account.kubeconfig).with(settings.clone());
        self.webhooks.push(Webhook::start(options).await?);
        self.send_to_webhooks();
        self.registration().apply(&self.plane).await
    }

    /// Has the address before the webhooks lead to those that there are now.
    pub fn send_to_webhooks(&self) {
        let ports: Vec<u16> = self.webhooks.iter().map(|webhook| webhook.port).collect();
        self.balance.send_to(&ports);
    }

    /// Waits until the apiserver reaches a webhook: a creation may meet a connection to one that was killed, and is then not
    /// placed.
    pub async fn until_placing(&self, job: &str) -> Result<()> {
        until_true(SOON, "the apiserver to reach a webhook", async || {
            let posted = pods::executor(job, 0).dry_run(&self.client, &self.namespace).await?;
            Ok(placed(&posted.pod()?).is_ok())
        })
        .await
    }

    /// How the scenario's pods are sent to its webhooks. A pod is refused if they do not respond: a
    /// test must not pass because its webhook was ignored.
    pub fn registration(&self) -> Registration {
        Registration { failure_policy: "Fail", ..Registration::new(&self.namespace, self.balance.port) }
    }

    /// Starts more reconcilers and waits until each is ready.
    pub async fn start_reconcilers(&mut self, count: usize) -> Result<()> {
        for _ in 0..count {
            let options = self.reconciler_options().await?;
            self.reconcilers.push(Reconciler::start(options).await?);
        }
        Ok(())
    }

    /// What a reconciler of this scenario starts with: it follows this namespace alone and may do what a
    /// reconciler has to, no more.
    pub async fn reconciler_options(&mut self) -> Result<ReconcilerOptions> {
        let kubeconfig = self.account().await?.kubeconfig.clone();
        self.reconciling(&kubeconfig).redis(&self.redis)
    }

    /// As whom the scenario's reconcilers run.
    pub async fn account(&mut self) -> Result<&Account> {
        if self.account.is_none() {
            self.account = Some(Account::for_reconciler(&self.plane, &self.namespace, &[&self.namespace]).await?);
        }
        self.account.as_ref().context("no account")
    }

    /// Gives the scenario's reconcilers further rights in the namespace.
    pub async fn allow_reconcilers(&mut self, rights: &[Right]) -> Result<()> {
        self.account().await?;
        let account = self.account.as_ref().context("no account")?;
        for right in rights {
            account.allow(&self.plane, &self.namespace, *right).await?;
        }
        Ok(())
    }

    /// The settings of reconciling, for a reconciler or for a webhook that reconciles by itself.
    pub fn reconciling(&self, kubeconfig: &Path) -> ReconcilerOptions {
        let options = ReconcilerOptions::default().kubeconfig(kubeconfig).env("WATCH_NAMESPACES", &self.namespace);
        match self.grace {
            Some(grace) => options.env("RECONCILE_GRACE_SECONDS", grace.as_secs().to_string()),
            None => options,
        }
    }

    /// As whom a webhook runs that reconciles alone: it may do what a reconciler has to, without leases.
    pub async fn account_without_leases(&self) -> Result<Account> {
        let account = Account::new(&self.plane, &self.namespace, "webhook").await?;
        for right in [LIST_PODS, PODS, EVENTS] {
            account.allow(&self.plane, &self.namespace, right).await?;
        }
        account.allow_everywhere(&self.plane, NODES).await?;
        Ok(account)
    }

    /// What a webhook starts with that keeps its ledger in memory and reconciles by itself. Of reconciling nothing
    /// is set except where and how quickly.
    pub fn in_memory(&self, kubeconfig: &Path) -> WebhookOptions {
        self.reconciling(kubeconfig).env("SPOT_PREFERENCE", "STRICT").env("STORE", "memory")
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

    /// Makes executor `id` of a job and returns what it was placed on.
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
        let list = ListParams::default().labels(&format!("spark-role=executor,{}={job}", self.job_id_label));
        let live = |pod: &Pod| {
            let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
            pod.metadata.deletion_timestamp.is_none() && !matches!(phase, Some("Succeeded" | "Failed"))
        };
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
        let (spot, on_demand): (Option<usize>, Option<usize>) =
            self.store_of(job).await?.hmget(self.keys(job).0, &["spot", "on-demand"]).await?;
        Ok(Counts { spot: spot.unwrap_or(0), on_demand: on_demand.unwrap_or(0) })
    }

    /// The ratio and the base that the ledger holds of a job, as they are written there.
    pub async fn policy(&self, job: &str) -> Result<(Option<String>, Option<String>)> {
        let policy: Option<String> = self.store_of(job).await?.hget(self.keys(job).0, "policy").await?;
        let word = |key| policy_word(policy.as_deref(), key);
        Ok((word("spot-ratio"), word("on-demand-base")))
    }

    /// The job's executors by the ledger's entries.
    pub async fn entries(&self, job: &str) -> Result<Executors> {
        let entries: Executors = self.store_of(job).await?.hgetall(self.keys(job).1).await?;
        let capacity = |entry: String| entry.split(' ').next().unwrap_or_default().to_owned();
        Ok(entries.into_iter().map(|(name, entry)| (name, capacity(entry))).collect())
    }

    /// A connection to the server that has both keys of a job.
    async fn store_of(&self, job: &str) -> Result<MultiplexedConnection> {
        self.redis.connection_for(&self.keys(job).0).await
    }

    /// The keys of a job's counts and entries.
    pub fn keys(&self, job: &str) -> (String, String) {
        let job = format!("{{{}:{job}}}", self.namespace);
        (format!("exec-count:{job}"), format!("exec-pods:{job}"))
    }

    /// The job's live executors by what they really run on: the node that they are on, else the one that
    /// they wait for, else what was decided. An error while none of them is known.
    pub async fn real(&self, job: &str) -> Result<Executors> {
        let nodes = Api::<Node>::all(self.client.clone()).list(&ListParams::default()).await?;
        let nodes: HashMap<String, Node> = nodes.into_iter().map(|node| (node.name_any(), node)).collect();
        let real = |pod: Pod| {
            let node = pod.spec.as_ref().and_then(|spec| nodes.get(spec.node_name.as_deref()?));
            let capacity = match node.and_then(real_capacity) {
                Some(capacity) => capacity.to_owned(),
                None => placed(&pod)?,
            };
            Ok((key(&pod), capacity))
        };
        self.live(job).await?.into_iter().map(real).collect()
    }

    /// The names of some live executors of a job that run on this capacity.
    pub async fn some(&self, job: &str, capacity: &str, count: usize) -> Result<Vec<String>> {
        let real = self.real(job).await?.into_iter();
        let names: Vec<_> = real.filter(|(_, on)| on == capacity).map(|(name, _)| name).take(count).collect();
        ensure!(names.len() == count, "{job} has only {} executors on {capacity}, not {count}", names.len());
        Ok(names)
    }

    /// Makes a job's driver and its first executors; answers when they are bound and the reconciler has
    /// seen them.
    pub async fn grow(&self, job: &str, ratio: &str, count: u32) -> Result<Counts> {
        self.driver(job, ratio).await?.pod()?;
        self.executors(job, 1..=count, 4).await?;
        self.until_bound(job).await?;
        self.until_uids_recorded(job).await?;
        self.until_ledger_matches_pods(job, REPAIRED).await
    }

    /// Fails unless the ledger, entries and counts, matches the live pods.
    pub async fn ensure_ledger_matches_pods(&self, job: &str) -> Result<Counts> {
        let (real, entries, ledger) = (self.real(job).await?, self.entries(job).await?, self.ledger(job).await?);
        let mut counts = Counts::default();
        for capacity in real.values() {
            counts.add(capacity)?;
        }
        let differs = |of: &Executors, from: &Executors| {
            let differ = of.iter().filter(|(name, capacity)| from.get(*name) != Some(*capacity));
            differ.map(|(name, capacity)| format!("{name}: {capacity}")).collect::<Vec<_>>()
        };
        ensure!(
            real == entries && counts == ledger,
            "{counts:?} are live, and the ledger counts {ledger:?}; live alone {:?}, in the ledger alone {:?}",
            differs(&real, &entries),
            differs(&entries, &real)
        );
        Ok(counts)
    }

    /// Waits until the ledger matches the live pods, and keeps matching them.
    pub async fn until_ledger_matches_pods(&self, job: &str, within: Duration) -> Result<Counts> {
        until(within, &format!("the ledger of {job} to match its pods"), async || {
            let look = async || match self.ensure_ledger_matches_pods(job).await {
                Ok(counts) => Ok(counts),
                Err(error) => {
                    sleep(LOOK).await;
                    Err(error)
                }
            };
            look().await?;
            sleep(HOLDS).await;
            look().await.context("it matched, and then did not").map(Some)
        })
        .await
    }

    /// Waits until the ledger has the uid of every live pod, which the reconciler adds.
    pub async fn until_uids_recorded(&self, job: &str) -> Result<()> {
        until_true(REPAIRED, "the reconciler to have seen all pods", async || {
            sleep(LOOK).await;
            let entries: Executors = self.store_of(job).await?.hgetall(self.keys(job).1).await?;
            let known = |pod: &Pod| {
                let (entry, uid) = (entries.get(&key(pod)), pod.uid());
                entry.zip(uid).is_some_and(|(entry, uid)| entry.ends_with(&uid))
            };
            Ok(self.live(job).await?.iter().all(known))
        })
        .await
    }

    /// Makes 20 more executors; fails unless they bring the job within one of its ratio, and the ledger
    /// matches the pods then.
    pub async fn ensure_ratio_recovers(&self, job: &str, ratio: f64) -> Result<()> {
        self.executors(job, self.fresh_ids().take(MORE), 4).await?;
        self.until_ledger_matches_pods(job, REPAIRED).await?.ensure_near(ratio, 1.0)
    }

    /// Ids that no executor of the scenario had.
    pub fn fresh_ids(&self) -> impl Iterator<Item = u32> {
        std::iter::repeat_with(|| self.next_id.fetch_add(1, Ordering::Relaxed))
    }

    /// Fails unless the ledger's counts are those of the live executors.
    pub async fn ensure_counts_match_pods(&self, job: &str) -> Result<Counts> {
        let (live, ledger) = (self.counts(job).await?, self.ledger(job).await?);
        ensure!(live == ledger, "{live:?} are live, and the ledger counts {ledger:?}");
        Ok(live)
    }

    /// Waits until the scheduler has bound all executors of a job.
    pub async fn until_bound(&self, job: &str) -> Result<()> {
        until_true(SOON, "all executors to be bound", async || {
            let bound = |pod: &Pod| pod.spec.as_ref().is_some_and(|spec| spec.node_name.is_some());
            Ok(self.live(job).await?.iter().all(bound))
        })
        .await
    }

    /// Waits until the scheduler has bound all executors of a job, and fails unless each is on a
    /// node of the capacity that it was placed on.
    pub async fn ensure_bound_as_placed(&self, job: &str) -> Result<()> {
        self.until_bound(job).await?;
        for pod in self.live(job).await? {
            let node = pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()).context("not bound")?;
            let node = Api::<Node>::all(self.client.clone()).get(node).await?;
            let on = real_capacity(&node).context("a node without capacity")?;
            ensure!(on == placed(&pod)?, "{} was placed on {} and is on {on}", pod.name_any(), placed(&pod)?);
        }
        Ok(())
    }

    /// Waits until the apiserver's cache has the namespace's pods as they are: a list from it may be some moments old.
    pub async fn until_cache_is_current(&self) -> Result<()> {
        until_true(SOON, "the apiserver's cache to have all pods as they are", async || {
            let versions = async |list: ListParams| {
                let pods = self.pods().list_metadata(&list).await?;
                Ok::<_, anyhow::Error>(pods.iter().map(ResourceExt::resource_version).collect::<BTreeSet<_>>())
            };
            Ok(versions(ListParams::default().match_any()).await? == versions(ListParams::default()).await?)
        })
        .await
    }

    /// The sum of a metric over all webhooks.
    pub async fn metric(&self, name: &str, labels: &[(&str, &str)]) -> Result<f64> {
        let mut sum = 0.0;
        for webhook in &self.webhooks {
            sum += webhook.metrics().await?.sum(name, labels).unwrap_or(0.0);
        }
        Ok(sum)
    }

    /// The sum over all reconcilers of the metric `spot_balancer_reconcile_<name>`.
    pub async fn reconcile_metric(&self, name: &str, labels: &[(&str, &str)]) -> Result<f64> {
        let name = format!("spot_balancer_reconcile_{name}");
        let mut sum = 0.0;
        for reconciler in &self.reconcilers {
            sum += reconciler.metrics().await?.sum(&name, labels).unwrap_or(0.0);
        }
        Ok(sum)
    }

    /// The index of the reconciler that leads, if exactly one does.
    pub async fn leader(&self) -> Result<Option<usize>> {
        let mut leaders = Vec::new();
        for (number, reconciler) in self.reconcilers.iter().enumerate() {
            if reconciler.leads().await? {
                leaders.push(number);
            }
        }
        Ok(<[usize; 1]>::try_from(leaders).ok().map(|[leader]| leader))
    }

    /// The lease by which one of the reconcilers leads.
    pub async fn lease(&self) -> Result<LeaseSpec> {
        self.leases().get(LEASE).await?.spec.context("an empty lease")
    }

    /// Deletes the reconcilers' Lease.
    pub async fn delete_lease(&self) -> Result<()> {
        self.leases().delete(LEASE, &DeleteParams::default()).await?;
        Ok(())
    }

    fn leases(&self) -> Api<Lease> {
        Api::namespaced(self.client.clone(), &self.namespace)
    }
}

/// Options of a webhook with SPOT_PREFERENCE=STRICT.
pub fn strict() -> WebhookOptions {
    WebhookOptions::default().env("SPOT_PREFERENCE", "STRICT")
}

/// An executor's name in the ledger: that of its pod, or the id that it was stamped with while it had none.
fn key(pod: &Pod) -> String {
    let stamp = || pod.annotations().get(DECISION)?.split_once('/').map(|(_, id)| id.to_owned());
    let stamp = pod.metadata.generate_name.as_ref().and_then(|_| stamp());
    stamp.unwrap_or_else(|| pod.name_any())
}

/// What an executor was placed on: by its decision, or by its own selector where it was left alone.
pub fn placed(pod: &Pod) -> Result<String> {
    let selector = || pod.spec.as_ref()?.node_selector.as_ref()?.get(CAPACITY);
    let decision = pod.annotations().get(DECISION).or_else(selector);
    let capacity = decision.with_context(|| format!("{} was not placed", pod.name_any()))?;
    Ok(capacity.split('/').next().unwrap_or_default().to_owned())
}

/// What runs on the node counts as: what a test says about it, or else its label.
fn real_capacity(node: &Node) -> Option<&str> {
    node.labels().get(TRUTH).or_else(|| node.labels().get(CAPACITY)).map(String::as_str)
}

/// The pod's selector of a capacity.
pub fn selected(pod: &Pod) -> Option<&str> {
    pod.spec.as_ref()?.node_selector.as_ref()?.get(CAPACITY).map(String::as_str)
}
