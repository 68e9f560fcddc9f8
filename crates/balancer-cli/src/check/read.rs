//! Reads the snapshots of all installations with the rights of the caller. The rest is a list of notes.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use anyhow::{Context, bail};
use balancer_core::{Capacity, Conventions, JobPod, Pod as CorePod};
use balancer_reconcile::WatchedPod;
use balancer_runtime::admission_probe::{self, AdmissionProbe, Admitted, ProbeError};
use futures::{StreamExt, stream};
use http::Request;
use k8s_openapi::api::admissionregistration::v1::{
    MutatingWebhookConfiguration, ValidatingWebhook, ValidatingWebhookConfiguration,
};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::authorization::v1::{ResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{self, Endpoints, Namespace, Pod, Secret, Service, Toleration};
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt;
use kube::api::{Api, ListParams, ObjectMeta, PostParams};
use serde::Serialize;
use tokio::time::{Instant, sleep, timeout};

use crate::cluster::{Cluster, FirstOf, RequestError, list, list_first, within};
use crate::output::address;
use crate::snapshot::read::core_pod;

use super::metrics::Metrics;
use super::rules::rights::{MAX_NAMESPACES, needed};
use super::rules::{REACHED, served};
use super::snapshot::{
    COMPONENT_LABEL, Component, DryRun, Hook, HookKind, Node, RECONCILER, Read, Right, Sample, Snapshot, Unchecked,
    WEBHOOK,
};

/// What the objects of all installations have in common.
const OURS: &str = "app.kubernetes.io/part-of=spot-balancer";
/// What tells the objects of one installation from those of others.
const INSTANCE_LABEL: &str = "app.kubernetes.io/instance";
/// Helm's note on objects that have no namespace.
const RELEASE_NAMESPACE: &str = "meta.helm.sh/release-namespace";
/// Where the guides install it, for callers who may not list all Deployments.
const USUAL_NAMESPACE: &str = "spot-balancer";
/// How notes name them.
const DEPLOYMENTS: &str = "the Deployments of Spot Balancer";
/// How notes name what the metrics tell.
const REDIS: &str = "Redis, by the metrics";
/// The port with the metrics.
const ADMIN_PORT: &str = "admin";
/// How many replicas are asked for their metrics.
const MAX_REPLICAS: usize = 10;
/// How many live executors are read for what executors tolerate.
const MAX_EXECUTORS: u32 = 500;
/// How many nodes are checked. What holds for none of them or for all of them cannot be told of a part.
const MAX_NODES: usize = 20_000;
/// How many namespaces are checked, likewise.
const MAX_CLUSTER_NAMESPACES: usize = 20_000;
/// Of how many drivers the annotations are checked.
const MAX_DRIVERS: usize = 10_000;
/// How many requests run at once.
const AT_ONCE: usize = 8;
/// In how many namespaces an executor is tried.
const MAX_DRY_RUNS: usize = 3;
/// From an executor that the webhook has not changed to the next that is tried.
const BEFORE_NEXT_TRY: Duration = Duration::from_secs(1);
/// How notes name the drivers.
const DRIVERS: &str = "the drivers of jobs";
/// How to try it by hand.
const VERIFY: &str = address!("docs/install.md#verify");
/// What an apiserver says of a webhook that must answer and does not.
const NOT_CALLED: &str = "failed calling webhook";
/// From the first sample of metrics to the second. A reconciler calls the store once a second.
const BETWEEN_SAMPLES: Duration = Duration::from_millis(2500);
/// How long a replica may take for its metrics.
const PAGE_LIMIT: Duration = Duration::from_secs(3);
/// The largest page of metrics, in bytes. One of ours has less than a hundredth of it.
const MAX_PAGE: usize = 4 << 20;

/// An installation: its namespace, and the value of the label that all its objects have.
type Release = (String, String);

/// A configuration's hook, with what tells its installation.
struct FoundHook {
    hook: Hook,
    namespace: Option<String>,
    instance: String,
}

/// The Deployments that were found, and where they were searched; everywhere if there is no namespace.
struct Deployments {
    found: Vec<Deployment>,
    namespace: Option<String>,
}

/// Reads what the caller may read, and notes the rest.
struct Reader<'c> {
    cluster: &'c Cluster,
    /// Where installations are searched; `None` for everywhere.
    namespace: Option<&'c str>,
    unchecked: RefCell<Vec<Unchecked>>,
    /// Whether a request has failed for another reason than a right that the caller lacks.
    has_failed: Cell<bool>,
}

/// What was read.
#[derive(Debug)]
pub(crate) struct Reading {
    /// One of each installation.
    pub(crate) snapshots: Vec<Snapshot>,
    /// What could not be read.
    pub(crate) unchecked: Vec<Unchecked>,
    /// Whether that is only what the caller may not read, or what is more than is read.
    pub(crate) is_complete: bool,
}

/// Reads all installations.
///
/// # Errors
/// If the API does not answer, or there is no installation.
pub(crate) async fn snapshots(cluster: &Cluster, namespace: Option<&str>) -> anyhow::Result<Reading> {
    let reader = Reader::new(cluster, namespace);
    let (hooks, deployments) = tokio::join!(reader.hooks(), reader.deployments());
    let (hooks, deployments) = (hooks?, deployments?);
    let found = deployments.as_ref().map(|deployments| deployments.found.as_slice());
    let releases = releases(hooks.as_deref().unwrap_or_default(), found.unwrap_or_default(), namespace);
    if releases.is_empty() && hooks.is_some() && deployments.is_some() {
        let place = namespace.map_or("this cluster".to_owned(), |namespace| format!("the namespace {namespace:?}"));
        bail!("there is no Spot Balancer in {place}; to install it: {}", address!("docs/install.md"));
    }
    let mut snapshots = Vec::new();
    for release in &releases {
        snapshots.push(reader.snapshot(release, hooks.as_deref(), deployments.as_ref()).await);
    }
    if snapshots.is_empty() {
        reader.note("the installation", "you may read neither its Deployments nor the webhook configurations");
        let mut snapshot = Snapshot { now: Timestamp::now(), ..Snapshot::default() };
        (snapshot.drivers, _) = reader.job_pods(&Conventions::default()).await;
        if reader.unchecked.borrow().iter().any(|note| note.what == DRIVERS) {
            bail!("nothing can be checked: you may read no webhook configurations, no Deployments and no pods");
        }
        snapshots.push(snapshot);
    }
    let is_complete = !reader.has_failed.get();
    let mut unchecked = Vec::new();
    for one in reader.unchecked.into_inner().into_iter().chain(snapshots.iter().flat_map(super::rules::unchecked)) {
        if !unchecked.contains(&one) {
            unchecked.push(one);
        }
    }
    // Requests end in any order.
    unchecked.sort_by(|one, other| one.what.cmp(&other.what));
    Ok(Reading { snapshots, unchecked, is_complete })
}

/// The installations that these objects belong to.
fn releases(hooks: &[FoundHook], deployments: &[Deployment], namespace: Option<&str>) -> BTreeSet<Release> {
    let mut releases = BTreeSet::new();
    for deployment in deployments {
        let labels = deployment.labels();
        let is_program = labels.get(COMPONENT_LABEL).is_some_and(|part| [WEBHOOK, RECONCILER].contains(&part.as_str()));
        if let (true, Some(instance)) = (is_program, labels.get(INSTANCE_LABEL)) {
            releases.insert((deployment.namespace().unwrap_or_default(), instance.clone()));
        }
    }
    for found in hooks {
        if let Some(own) = &found.namespace {
            releases.insert((own.clone(), found.instance.clone()));
        }
    }
    releases.retain(|(own, _)| namespace.is_none_or(|namespace| namespace == own));
    releases
}

/// What live executors tolerate, where they run, and whether one waits for spot.
#[derive(Debug, Default)]
struct Executors {
    tolerations: Vec<Toleration>,
    nodes: BTreeSet<String>,
    spot_is_pending: bool,
}

impl Executors {
    fn of(pods: impl IntoIterator<Item = Pod>, conventions: &Conventions) -> Self {
        let mut found = Self::default();
        for pod in pods {
            let Some(core) = core_pod(&pod) else { continue };
            let Some(JobPod::Executor(executor)) = JobPod::of(&core, conventions) else { continue };
            found.nodes.extend(executor.node.map(str::to_owned));
            let is_for_spot = executor.fixed.or(executor.asked) == Some(Capacity::Spot);
            found.spot_is_pending |= is_for_spot && executor.node.is_none() && core.unschedulable().is_some();
            for toleration in pod.spec.and_then(|spec| spec.tolerations).into_iter().flatten() {
                if !found.tolerations.contains(&toleration) {
                    found.tolerations.push(toleration);
                }
            }
        }
        found
    }
}

impl<'c> Reader<'c> {
    fn new(cluster: &'c Cluster, namespace: Option<&'c str>) -> Self {
        Self { cluster, namespace, unchecked: RefCell::default(), has_failed: Cell::new(false) }
    }

    fn note(&self, what: impl Into<String>, why: impl Into<String>) {
        self.unchecked.borrow_mut().push(Unchecked { what: what.into(), why: why.into() });
    }

    /// The answer, or a note that there is none.
    fn known<T>(&self, what: &str, answer: Result<T, RequestError>) -> Option<T> {
        let error = match answer {
            Ok(value) => return Some(value),
            Err(error) => error,
        };
        match error {
            RequestError::Forbidden(_) => self.note(what, "you may not read it"),
            error @ RequestError::TooMany(_) => self.note(what, error.to_string()),
            error => self.failed(what, &error),
        }
        None
    }

    /// Notes that the API did not answer as it should.
    fn failed(&self, what: &str, error: &RequestError) {
        self.has_failed.set(true);
        self.note(what, error.to_string());
    }

    /// The same, and an error unless there is an answer or the caller may not have one: without what every check needs, nothing
    /// must look healthy.
    fn known_or_down<T>(&self, what: &str, answer: Result<T, RequestError>) -> anyhow::Result<Option<T>> {
        match answer {
            answer @ (Ok(_) | Err(RequestError::Forbidden(_))) => Ok(self.known(what, answer)),
            Err(error) => Err(error).with_context(|| format!("cannot read {what}")),
        }
    }

    async fn object<K>(&self, kind: &str, namespace: &str, name: &str) -> Read<K>
    where
        K: kube::Resource<Scope = k8s_openapi::NamespaceResourceScope, DynamicType = ()>
            + Clone
            + serde::de::DeserializeOwned
            + std::fmt::Debug,
    {
        let api = self.cluster.api::<K>(Some(namespace));
        match self.known(&format!("the {kind} {namespace}/{name}"), within(api.get_opt(name)).await) {
            Some(Some(object)) => Read::Found(object),
            Some(None) => Read::Absent,
            None => Read::Unknown,
        }
    }

    async fn hooks(&self) -> anyhow::Result<Option<Vec<FoundHook>>> {
        let ours = || ListParams::default().labels(OURS);
        let mutating = Api::<MutatingWebhookConfiguration>::all(self.cluster.client.clone());
        let validating = Api::<ValidatingWebhookConfiguration>::all(self.cluster.client.clone());
        let (mutating, validating) = tokio::join!(
            list(&mutating, ours(), |found| Some(found_hooks(HookKind::Mutating, &found.metadata, &found.webhooks))),
            list(&validating, ours(), |found| Some(found_hooks(
                HookKind::Validating,
                &found.metadata,
                &found.webhooks
            ))),
        );
        let mutating = self.known_or_down("the webhook configurations", mutating)?;
        let Some(mutating) = mutating else { return Ok(None) };
        let validating = self.known_or_down("the webhook configurations", validating)?;
        Ok(validating.map(|validating| mutating.into_iter().chain(validating).flatten().collect()))
    }

    /// The Deployments of all installations, or of those in one namespace.
    async fn deployments(&self) -> anyhow::Result<Option<Deployments>> {
        let mut namespace = self.namespace;
        let mut answer = self.deployments_in(namespace).await;
        if let (Err(RequestError::Forbidden(_)), None) = (&answer, namespace) {
            namespace = Some(USUAL_NAMESPACE);
            answer = self.deployments_in(namespace).await;
        }
        let found = self.known_or_down(DEPLOYMENTS, answer)?;
        Ok(found.map(|found| Deployments { found, namespace: namespace.map(str::to_owned) }))
    }

    async fn deployments_in(&self, namespace: Option<&str>) -> Result<Vec<Deployment>, RequestError> {
        list(&self.cluster.api::<Deployment>(namespace), ListParams::default().labels(OURS), Some).await
    }

    /// Those of one installation.
    async fn components(&self, (namespace, instance): &Release, known: Option<&Deployments>) -> Option<Vec<Component>> {
        let found = match known {
            Some(Deployments { namespace: Some(searched), .. }) if searched != namespace => {
                self.known(DEPLOYMENTS, self.deployments_in(Some(namespace)).await)?
            }
            Some(known) => known.found.clone(),
            None => return None,
        };
        let is_program = |part: &String| [WEBHOOK, RECONCILER].contains(&part.as_str());
        let is_ours = |deployment: &Deployment| {
            deployment.namespace().as_ref() == Some(namespace)
                && deployment.labels().get(INSTANCE_LABEL) == Some(instance)
                && deployment.labels().get(COMPONENT_LABEL).is_some_and(is_program)
        };
        Some(found.into_iter().filter(is_ours).map(Component::of).collect())
    }

    async fn snapshot(
        &self,
        release: &Release,
        hooks: Option<&[FoundHook]>,
        deployments: Option<&Deployments>,
    ) -> Snapshot {
        let (namespace, instance) = release;
        let is_ours = |found: &FoundHook| {
            found.instance == *instance && found.namespace.as_ref().is_none_or(|own| own == namespace)
        };
        let (own, others): (Vec<_>, Vec<_>) = hooks.into_iter().flatten().partition(|found| is_ours(found));
        let hooks_of = |found: Vec<&FoundHook>| found.into_iter().map(|found| found.hook.clone()).collect();
        let mut snapshot = Snapshot {
            namespace: namespace.clone(),
            hooks: hooks.map(|_| hooks_of(own)),
            other_hooks: hooks_of(others),
            components: self.components(release, deployments).await,
            now: Timestamp::now(),
            ..Snapshot::default()
        };
        let settings = snapshot.settings();
        let (webhook, pods, lease, cluster_wide, job_pods) = tokio::join!(
            self.webhook_objects(&snapshot),
            self.pods(release),
            self.lease(&snapshot),
            self.cluster_wide(),
            self.job_pods(&settings.conventions),
        );
        (snapshot.service, snapshot.endpoints, snapshot.certificate, snapshot.tokens) = webhook;
        (snapshot.pods, snapshot.lease) = (pods, lease);
        (snapshot.namespaces, snapshot.nodes) = cluster_wide;
        let executors;
        (snapshot.drivers, executors) = job_pods;
        (snapshot.tolerations, snapshot.executor_nodes) = (executors.tolerations, executors.nodes);
        snapshot.spot_is_pending = executors.spot_is_pending;
        let (rights, metrics, dry_run) =
            tokio::join!(self.missing_rights(&snapshot), self.metrics(&snapshot), self.dry_run(&snapshot));
        (snapshot.missing_rights, snapshot.metrics, snapshot.dry_run) = (rights, metrics, dry_run);
        snapshot
    }

    async fn webhook_objects(
        &self,
        snapshot: &Snapshot,
    ) -> (Read<Service>, Read<Endpoints>, Read<Secret>, Read<Secret>) {
        let Some(webhook) = snapshot.component(WEBHOOK) else { return Default::default() };
        let namespace = &snapshot.namespace;
        // The chart and the manifests give the Service the Deployment's name.
        let name = webhook.deployment.name_any();
        let secret = async |what, is_used, secret: Option<(String, String)>| match secret {
            Some((name, _)) => self.object("Secret", namespace, &name).await,
            None => {
                if is_used {
                    self.note(what, "the Deployment mounts no Secret with it");
                }
                Read::Unknown
            }
        };
        let (service, endpoints, certificate, tokens) = tokio::join!(
            self.object::<Service>("Service", namespace, &name),
            self.object::<Endpoints>("Endpoints", namespace, &name),
            secret("the certificate", true, webhook.certificate_secret()),
            secret("the admission token", webhook.has_tokens(), webhook.token_secret()),
        );
        // Without a Service there are none, which is no finding of its own.
        let endpoints = if matches!(service, Read::Absent) { Read::Unknown } else { endpoints };
        (service, endpoints, certificate, tokens)
    }

    async fn pods(&self, (namespace, instance): &Release) -> Option<Vec<Pod>> {
        let ours = ListParams::default().labels(&format!("{OURS},{INSTANCE_LABEL}={instance}"));
        let pods = list(&self.cluster.api::<Pod>(Some(namespace)), ours, Some).await;
        self.known(&format!("the pods of {namespace}"), pods)
    }

    async fn lease(&self, snapshot: &Snapshot) -> Read<Lease> {
        match snapshot.lease_name() {
            Some(name) => self.object("Lease", &snapshot.namespace, name).await,
            None => Read::Unknown,
        }
    }

    async fn cluster_wide(&self) -> (Option<Vec<Namespace>>, Option<Vec<Node>>) {
        let namespaces = Api::<Namespace>::all(self.cluster.client.clone());
        let nodes = Api::<v1::Node>::all(self.cluster.client.clone());
        let node = |node: v1::Node| {
            let taints = node.spec.and_then(|spec| spec.taints).unwrap_or_default();
            let (name, labels) = (node.metadata.name.unwrap_or_default(), node.metadata.labels.unwrap_or_default());
            Some(Node { name, labels, taints })
        };
        let namespace = |namespace: Namespace| {
            let ObjectMeta { name, labels, .. } = namespace.metadata;
            Some(Namespace { metadata: ObjectMeta { name, labels, ..ObjectMeta::default() }, ..Namespace::default() })
        };
        let (namespaces, nodes) = tokio::join!(
            list_first(&namespaces, ListParams::default(), MAX_CLUSTER_NAMESPACES, namespace),
            list_first(&nodes, ListParams::default(), MAX_NODES, node),
        );
        let (namespaces, nodes) = (namespaces.and_then(FirstOf::all), nodes.and_then(FirstOf::all));
        (self.known("the namespaces", namespaces), self.known("the nodes", nodes))
    }

    /// The drivers, and what is known of executors: of all namespaces, or of the caller's.
    async fn job_pods(&self, conventions: &Conventions) -> (Vec<CorePod<'static>>, Executors) {
        let roles = conventions.driver_role_values.join(",");
        let drivers = ListParams::default().labels(&format!("{} in ({roles})", conventions.workload_role_label));
        let role = &conventions.executor_role_value;
        let executors = ListParams::default().labels(&format!("{}={role}", conventions.workload_role_label));
        let mut namespace = None;
        let mut found = self.drivers_in(namespace, &drivers).await;
        if let Err(RequestError::Forbidden(_)) = found {
            let own = self.cluster.namespace.as_str();
            self.note(format!("the jobs outside of the namespace {own}"), "you may not read it");
            namespace = Some(own);
            found = self.drivers_in(namespace, &drivers).await;
        }
        let Some(drivers) = self.known(DRIVERS, found) else { return Default::default() };
        if drivers.has_more {
            self.note("further drivers of jobs", format!("only {MAX_DRIVERS} are checked"));
        }
        let executors = within(self.cluster.api::<Pod>(namespace).list(&executors.limit(MAX_EXECUTORS))).await;
        let executors = self.known("the executors of jobs", executors).map(|list| list.items).unwrap_or_default();
        (drivers.objects, Executors::of(executors, conventions))
    }

    async fn drivers_in(
        &self,
        namespace: Option<&str>,
        drivers: &ListParams,
    ) -> Result<FirstOf<CorePod<'static>>, RequestError> {
        list_first(&self.cluster.api::<WatchedPod>(namespace), drivers.clone(), MAX_DRIVERS, |pod| Some(pod.pod)).await
    }

    /// Asks the API which of the rights that the programs need are missing.
    async fn missing_rights(&self, snapshot: &Snapshot) -> Vec<Right> {
        let rights = needed(snapshot);
        if snapshot.watched().len() > MAX_NAMESPACES {
            self.note("the rights in further namespaces", format!("only {MAX_NAMESPACES} are checked"));
        }
        let api = Api::<SubjectAccessReview>::all(self.cluster.client.clone());
        let reviews = rights.into_iter().map(|right| {
            let review = review(&right, &snapshot.namespace);
            let api = api.clone();
            async move { (right, within(api.create(&PostParams::default(), &review)).await) }
        });
        let mut missing = Vec::new();
        let mut reviews = stream::iter(reviews).buffered(AT_ONCE);
        while let Some((right, answer)) = reviews.next().await {
            match answer {
                Ok(review) if review.status.as_ref().is_some_and(|status| status.allowed) => {}
                Ok(_) => missing.push(right),
                Err(RequestError::Forbidden(_)) => {
                    self.note("the rights of the service accounts", "you may not create a SubjectAccessReview");
                    return Vec::new();
                }
                Err(error) => {
                    self.failed("the rights of the service accounts", &error);
                    return Vec::new();
                }
            }
        }
        missing
    }

    /// Creates an executor by a dry run, as the apiserver would create one of a job. Nothing is stored.
    async fn dry_run(&self, snapshot: &Snapshot) -> DryRun {
        let mut why = "no namespace is known whose pods are sent to it".to_owned();
        let began = Instant::now();
        for namespace in served(snapshot, &self.cluster.namespace, MAX_DRY_RUNS) {
            let mut tried = self.try_executor(snapshot, &namespace).await;
            if !matches!(tried, Ok(DryRun::Placed) | Err(_)) {
                // One call may be lost while a replica is replaced.
                sleep(BEFORE_NEXT_TRY).await;
                tried = self.try_executor(snapshot, &namespace).await;
            }
            match tried {
                Ok(found) => return found,
                // A quota or a policy may refuse it, and another namespace may have none.
                Err(error) => why = format!("an executor cannot be created in {namespace} by a dry run: {error}"),
            }
            if began.elapsed() >= admission_probe::LIMIT {
                break;
            }
        }
        self.note(REACHED, format!("{why}; to try it by hand: {VERIFY}"));
        DryRun::Unknown
    }

    /// What becomes of an executor in this namespace, or why it is not created.
    async fn try_executor(&self, snapshot: &Snapshot, namespace: &str) -> Result<DryRun, String> {
        let conventions = snapshot.settings().conventions;
        match AdmissionProbe(&conventions).run(&self.cluster.client, namespace).await {
            Ok(Admitted::Placed(_)) => Ok(DryRun::Placed),
            Ok(Admitted::Unchanged) => Ok(DryRun::Unchanged { namespace: namespace.to_owned() }),
            Ok(Admitted::Overridden(capacity)) => Ok(DryRun::Overridden { namespace: namespace.to_owned(), capacity }),
            Err(error @ ProbeError::TimedOut) => Err(error.to_string()),
            Err(ProbeError::Failed(error)) => match RequestError::from(error) {
                RequestError::Unavailable(error) if is_of_hook(snapshot, &error) => Ok(DryRun::NotCalled { error }),
                RequestError::Unavailable(error) if error.contains(NOT_CALLED) => {
                    Ok(DryRun::OtherNotCalled { namespace: namespace.to_owned(), error })
                }
                error => {
                    let is_refused = matches!(error, RequestError::Unauthenticated(_));
                    self.has_failed.set(self.has_failed.get() || is_refused);
                    Err(error.to_string())
                }
            },
        }
    }

    /// The metrics of the replicas, through the apiserver.
    async fn metrics(&self, snapshot: &Snapshot) -> Vec<Sample> {
        let is_asked = |pod: &&Pod| pod.metadata.deletion_timestamp.is_none() && is_running(pod);
        let mut replicas = Vec::new();
        let mut silent = BTreeMap::<String, Vec<String>>::new();
        for pod in snapshot.pods.iter().flatten().filter(is_asked) {
            let Some(component) = component_of(pod) else { continue };
            let skipped = match metrics_port(pod) {
                Some(_) if replicas.len() == MAX_REPLICAS => format!("only {MAX_REPLICAS} replicas are asked"),
                Some(port) => {
                    replicas.push((component, pod.name_any(), port));
                    continue;
                }
                None => format!("no port is named {ADMIN_PORT}"),
            };
            silent.entry(skipped).or_default().push(pod.name_any());
        }
        let samples = replicas.into_iter().map(|(component, name, port)| async move {
            let page = async || self.page(&snapshot.namespace, &name, port).await.map_err(|why| (why, name.clone()));
            let before = page().await?;
            let has_failed =
                super::rules::STORE_ERRORS.iter().any(|name| before.sum(name).is_some_and(|sum| sum > 0.0));
            // An old error is no finding. A new one is.
            let after = if has_failed {
                tokio::time::sleep(BETWEEN_SAMPLES).await;
                page().await?
            } else {
                before.clone()
            };
            Ok::<_, (String, String)>(Sample { component, before, after })
        });
        let samples: Vec<_> = stream::iter(samples).buffered(MAX_REPLICAS).collect().await;
        let mut read = Vec::new();
        for sample in samples {
            match sample {
                Ok(sample) => read.push(sample),
                Err((why, pod)) => silent.entry(why).or_default().push(pod),
            }
        }
        for (why, pods) in silent {
            let pods =
                if let [pod] = pods.as_slice() { format!("pod {pod}") } else { format!("pods {}", pods.join(", ")) };
            self.note(format!("{REDIS} of the {pods}"), why);
        }
        read
    }

    /// The metrics of one replica, or why there are none. The API answers for the pod, so its error says nothing about the API.
    async fn page(&self, namespace: &str, name: &str, port: i32) -> Result<Metrics, String> {
        let path = format!("/api/v1/namespaces/{namespace}/pods/{name}:{port}/proxy/metrics");
        let request = Request::get(path).body(Vec::new()).map_err(|error| error.to_string())?;
        match timeout(PAGE_LIMIT, within(self.cluster.once.request_text(request))).await {
            Ok(Ok(page)) if page.len() <= MAX_PAGE => Ok(Metrics(page)),
            Ok(Ok(_)) => Err("the page of metrics is too large".to_owned()),
            Ok(Err(RequestError::Forbidden(_))) => Err("you may not read it".to_owned()),
            // The cause names the address of the pod, and several pods are to have one line.
            Ok(Err(RequestError::Unavailable(why))) => {
                let cause = why.rsplit(": ").next().unwrap_or_default();
                Err(format!("the apiserver cannot reach port {port}: {cause}"))
            }
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err(format!("no answer within {} s", PAGE_LIMIT.as_secs())),
        }
    }
}

/// Whether this error of the apiserver is about one of the installation's webhooks.
fn is_of_hook(snapshot: &Snapshot, error: &str) -> bool {
    error.contains(NOT_CALLED)
        && snapshot.hooks.iter().flatten().any(|hook| error.contains(&format!("\"{}\"", hook.webhook.name)))
}

/// Which program the pod is a replica of; `None` if it is of another one.
fn component_of(pod: &Pod) -> Option<String> {
    let component = pod.labels().get(COMPONENT_LABEL)?;
    [WEBHOOK, RECONCILER].contains(&component.as_str()).then(|| component.clone())
}

fn is_running(pod: &Pod) -> bool {
    pod.status.as_ref().and_then(|status| status.phase.as_deref()) == Some("Running")
}

/// The port where a replica has its metrics.
fn metrics_port(pod: &Pod) -> Option<i32> {
    let containers = pod.spec.iter().flat_map(|spec| &spec.containers);
    let mut ports = containers.flat_map(|container| container.ports.iter().flatten());
    Some(ports.find(|port| port.name.as_deref() == Some(ADMIN_PORT))?.container_port)
}

fn review(right: &Right, namespace: &str) -> SubjectAccessReview {
    let Right { account, verb, group, resource, name, namespace: place } = right;
    let attributes = ResourceAttributes {
        group: Some((*group).to_owned()),
        resource: Some((*resource).to_owned()),
        verb: Some((*verb).to_owned()),
        name: name.clone(),
        namespace: place.clone(),
        ..ResourceAttributes::default()
    };
    let spec = SubjectAccessReviewSpec {
        user: Some(format!("system:serviceaccount:{namespace}:{account}")),
        // What every service account belongs to, because a binding may name these.
        groups: Some(vec![
            "system:serviceaccounts".to_owned(),
            format!("system:serviceaccounts:{namespace}"),
            "system:authenticated".to_owned(),
        ]),
        resource_attributes: Some(attributes),
        ..SubjectAccessReviewSpec::default()
    };
    SubjectAccessReview { spec, ..SubjectAccessReview::default() }
}

/// The webhooks of one configuration. The two kinds have the same fields, except one that is not checked.
fn found_hooks(
    kind: HookKind,
    metadata: &kube::core::ObjectMeta,
    webhooks: &Option<Vec<impl Serialize>>,
) -> Vec<FoundHook> {
    let label = |labels: &Option<BTreeMap<String, String>>, key: &str| labels.as_ref()?.get(key).cloned();
    let of_helm = label(&metadata.annotations, RELEASE_NAMESPACE);
    let instance = label(&metadata.labels, INSTANCE_LABEL).unwrap_or_default();
    let configuration = metadata.name.clone().unwrap_or_default();
    let webhooks = webhooks.iter().flatten();
    let webhooks = webhooks
        .filter_map(|webhook| serde_json::from_value::<ValidatingWebhook>(serde_json::to_value(webhook).ok()?).ok());
    webhooks
        .map(|webhook| {
            let called = webhook.client_config.service.as_ref().map(|service| service.namespace.clone());
            let hook = Hook { kind, configuration: configuration.clone(), webhook };
            FoundHook { hook, namespace: of_helm.clone().or(called), instance: instance.clone() }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    use serde_json::{Value, json};

    use crate::snapshot::testing::{cluster, items, refusal};

    fn deployment(namespace: &str, instance: &str, component: &str) -> Deployment {
        let labels = json!({INSTANCE_LABEL: instance, COMPONENT_LABEL: component});
        let object = json!({"metadata": {"name": component, "namespace": namespace, "labels": labels}});
        serde_json::from_value(object).expect("a Deployment")
    }

    fn hooks(annotations: serde_json::Value, client: serde_json::Value) -> Vec<FoundHook> {
        let configuration: MutatingWebhookConfiguration = serde_json::from_value(json!({
            "metadata": {"name": "x", "annotations": annotations, "labels": {INSTANCE_LABEL: "one"}},
            "webhooks": [{
                "name": "place.x.local", "clientConfig": client, "admissionReviewVersions": ["v1"], "sideEffects": "None",
                "reinvocationPolicy": "IfNeeded",
            }],
        }))
        .expect("a configuration");
        found_hooks(HookKind::Mutating, &configuration.metadata, &configuration.webhooks)
    }

    #[test]
    fn an_installation_is_known_by_its_programs_or_by_its_configurations() {
        let deployments = [
            deployment("a", "one", WEBHOOK),
            deployment("a", "one", RECONCILER),
            deployment("a", "two", RECONCILER),
            deployment("redis", "three", "redis"),
        ];
        let called = hooks(json!({}), json!({"service": {"name": "w", "namespace": "b"}}));
        let found = |namespace| -> Vec<String> {
            let releases = releases(&called, &deployments, namespace).into_iter();
            releases.map(|(namespace, instance)| format!("{namespace}/{instance}")).collect()
        };
        assert_eq!(found(None), ["a/one", "a/two", "b/one"]);
        assert_eq!(found(Some("b")), ["b/one"]);
    }

    #[test]
    fn an_executor_that_finds_no_spot_node_is_pending_until_it_has_one() {
        let executor = |capacity: &str, node: Option<&str>, condition: &str| -> Pod {
            serde_json::from_value(json!({
                "metadata": {
                    "name": "a", "namespace": "etl", "uid": "a", "labels": {"spark-role": "executor", "spark-app-selector": "j"},
                    "annotations": {"workload/capacity-type": capacity},
                },
                "spec": {"containers": [], "nodeName": node, "tolerations": [{"key": "team", "operator": "Exists"}]},
                "status": {"phase": "Pending", "conditions": [
                    {"type": "PodScheduled", "status": "False", "reason": condition, "message": "0/3 nodes"},
                ]},
            }))
            .expect("a pod")
        };
        let found = |pods: Vec<Pod>| Executors::of(pods, &Conventions::default());
        assert!(found(vec![executor("spot", None, "Unschedulable")]).spot_is_pending);
        assert!(!found(vec![executor("on-demand", None, "Unschedulable")]).spot_is_pending);
        assert!(!found(vec![executor("spot", None, "SchedulingGated")]).spot_is_pending);
        let bound = found(vec![executor("spot", Some("n"), "Unschedulable"), executor("spot", Some("n"), "")]);
        assert!(!bound.spot_is_pending && bound.nodes.contains("n"), "{bound:?}");
        assert_eq!(bound.tolerations.len(), 1);
    }

    /// What is kept of so many nodes, namespaces and drivers, and the notes.
    async fn large(nodes: usize, namespaces: usize, drivers: usize) -> ((bool, bool, usize), Vec<String>) {
        let objects =
            |number: usize| items((0..number).map(|name| json!({"metadata": {"name": format!("{name}")}})).collect());
        let cluster = cluster(move |request| {
            let numbers = [("/nodes?", nodes), ("/namespaces?", namespaces), ("driver", drivers)];
            let asked = numbers.into_iter().find(|(part, _)| request.contains(part));
            objects(asked.map_or(0, |(_, number)| number))
        });
        let cluster = cluster.await;
        let reader = Reader::new(&cluster, None);
        let (namespaces, nodes) = reader.cluster_wide().await;
        let (drivers, _) = reader.job_pods(&Conventions::default()).await;
        let notes = reader.unchecked.into_inner().into_iter().map(|Unchecked { what, why }| format!("{what}: {why}"));
        ((nodes.is_some(), namespaces.is_some(), drivers.len()), notes.collect())
    }

    #[tokio::test]
    async fn a_cluster_that_refuses_the_credentials_does_not_look_healthy() {
        for code in [401, 400, 404, 500] {
            let cluster = cluster(move |_| refusal(code, "", "for the test")).await;
            let error = snapshots(&cluster, None).await.map(|_| ()).expect_err("nothing could be read");
            let text = format!("{:#}", cluster.located(error));
            assert!(text.contains("cannot read the webhook configurations") && text.contains("for the test"), "{text}");
            assert_eq!(text.starts_with(&cluster.server), [401, 500].contains(&code), "{text}");
        }
    }

    #[tokio::test]
    async fn what_is_more_than_can_be_checked_is_noted() {
        let most = large(MAX_NODES, MAX_CLUSTER_NAMESPACES, MAX_DRIVERS).await;
        assert_eq!(most, ((true, true, MAX_DRIVERS), vec![]));
        let more = large(MAX_NODES + 1, MAX_CLUSTER_NAMESPACES + 1, MAX_DRIVERS + 1).await;
        let notes = [
            "the namespaces: there are more than 20000 of them",
            "the nodes: there are more than 20000 of them",
            "further drivers of jobs: only 10000 are checked",
        ];
        assert_eq!(more, ((false, false, MAX_DRIVERS), notes.map(str::to_owned).to_vec()));
    }

    /// What a reader notes of these pods, and the paths that it asks for. Each answer has this status.
    async fn notes_of_replicas(pods: &[(&str, &str, &str)], code: u16, answer: Value) -> Vec<String> {
        let pod = |&(name, phase, port): &(&str, &str, &str)| -> Pod {
            let container = json!({"name": "c", "ports": [{"name": port, "containerPort": 8081}]});
            let labels = json!({COMPONENT_LABEL: WEBHOOK});
            serde_json::from_value(json!({
                "metadata": {"name": name, "labels": labels},
                "spec": {"containers": [container]}, "status": {"phase": phase},
            }))
            .expect("a pod")
        };
        let mut pods: Vec<Pod> = pods.iter().map(pod).collect();
        let mut ending = pods[0].clone();
        ending.metadata.name = Some("ending".into());
        ending.metadata.deletion_timestamp = serde_json::from_value(json!("2030-06-01T00:00:30Z")).expect("a time");
        pods.push(ending);
        let cluster = cluster(move |_| (code, answer.clone())).await;
        let reader = Reader::new(&cluster, None);
        let snapshot = Snapshot { pods: Some(pods), ..Snapshot::default() };
        assert!(reader.metrics(&snapshot).await.is_empty());
        assert!(!reader.has_failed.get(), "a pod that does not answer is no fault of the API");
        let notes = reader.unchecked.into_inner();
        notes.into_iter().map(|Unchecked { what, why }| format!("{what}: {why}")).collect()
    }

    #[tokio::test]
    async fn replicas_whose_metrics_cannot_be_read_for_one_reason_have_one_line() {
        let message = "error trying to reach service: dial tcp 10.0.0.1:8081: connect: connection refused";
        let status = json!({"kind": "Status", "status": "Failure", "code": 503, "reason": "", "message": message});
        let pods = [
            ("b", "Running", "admin"),
            ("a", "Running", "admin"),
            ("c", "Running", "other"),
            ("waits", "Pending", "admin"),
        ];
        let notes = notes_of_replicas(&pods, 503, status).await;
        let expected = [
            "Redis, by the metrics of the pod c: no port is named admin",
            "Redis, by the metrics of the pods b, a: the apiserver cannot reach port 8081: connection refused",
        ];
        assert_eq!(notes, expected);
    }

    #[tokio::test]
    async fn metrics_that_may_not_be_read_are_one_note() {
        let (code, status) = crate::snapshot::testing::forbidden();
        let notes = notes_of_replicas(&[("a", "Running", "admin"), ("b", "Running", "admin")], code, status).await;
        assert_eq!(notes, ["Redis, by the metrics of the pods a, b: you may not read it"]);
    }

    /// What a dry run shows if the API answers it in this way, and what is noted.
    async fn dry_run(answer: impl Fn(&str) -> (u16, Value) + Send + Sync + 'static) -> (DryRun, Vec<Unchecked>) {
        let cluster = cluster(answer).await;
        let reader = Reader::new(&cluster, None);
        let all = json!({"service": {"name": "w", "namespace": "b"}});
        let hooks = hooks(json!({}), all).into_iter().map(|found| found.hook).collect();
        let snapshot = Snapshot { hooks: Some(hooks), ..Snapshot::default() };
        (reader.dry_run(&snapshot).await, reader.unchecked.into_inner())
    }

    #[tokio::test]
    async fn an_executor_that_a_dry_run_creates_shows_whether_the_webhook_is_asked() {
        let (found, notes) = dry_run(|request| {
            assert_eq!(request, "POST /api/v1/namespaces/etl/pods?dryRun=All");
            (201, json!({"metadata": {"annotations": {"workload/capacity-type": "on-demand"}}}))
        })
        .await;
        assert!(matches!(found, DryRun::Placed) && notes.is_empty(), "{found:?} {notes:?}");
        let (found, _) = dry_run(|_| (201, json!({"metadata": {"annotations": {"workload/spot-ratio": "0"}}}))).await;
        assert!(matches!(&found, DryRun::Unchanged { namespace } if namespace == "etl"), "{found:?}");
        let call = "failed calling webhook \"place.x.local\": Post \"https://w.b.svc:443/mutate/0123456789abcdef?timeout=3s\": EOF";
        let (found, _) = dry_run(move |_| refusal(500, "", call)).await;
        let shows_token = format!("{found:?}").contains("0123456789abcdef");
        assert!(matches!(found, DryRun::NotCalled { .. }) && !shows_token, "{found:?}");
        let lost = std::sync::atomic::AtomicBool::new(true);
        let (found, _) = dry_run(move |_| {
            let is_lost = lost.swap(false, std::sync::atomic::Ordering::Relaxed);
            (201, json!({"metadata": {"annotations": {if is_lost { "a" } else { "workload/capacity-type" }: "on-demand"}}}))
        })
        .await;
        assert!(matches!(found, DryRun::Placed), "one call may be lost: {found:?}");
        let (found, _) = dry_run(|_| refusal(500, "", "failed calling webhook \"another\": timeout")).await;
        assert!(matches!(found, DryRun::OtherNotCalled { .. }), "{found:?}");
        let denied = "admission webhook \"another\" denied the request";
        for refused in [refusal(403, "", "exceeded quota"), refusal(400, "", denied)] {
            let message = refused.1["message"].as_str().expect("text").to_owned();
            let (found, notes) = dry_run(move |_| refused.clone()).await;
            assert!(matches!(found, DryRun::Unknown), "{found:?}");
            assert!(notes[0].why.contains(&message) && notes[0].why.contains("docs/install.md#verify"), "{notes:?}");
        }
    }

    #[tokio::test]
    async fn a_cluster_that_fails_in_part_does_not_look_healthy() {
        let label = |part: &str| json!({INSTANCE_LABEL: "one", COMPONENT_LABEL: part});
        let deployments = |part| json!({"metadata": {"name": part, "namespace": "b", "labels": label(part)}});
        for (code, is_complete) in [(403, true), (401, false), (500, false), (404, false)] {
            let (code, status) = refusal(code, "", "for the test");
            let deployments = [WEBHOOK, RECONCILER].map(deployments).to_vec();
            let cluster = cluster(move |request| match request {
                nodes if nodes.contains("/nodes?") => (code, status.clone()),
                found if found.contains("/deployments?") => items(deployments.clone()),
                one if one.starts_with("GET /apis/coordination") => refusal(403, "", "no"),
                one if one.contains("/secrets/") || one.contains("/endpoints/") || one.contains("/services/") => {
                    refusal(403, "", "no")
                }
                post if post.starts_with("POST") => refusal(403, "", "no"),
                _ => items(Vec::new()),
            });
            let reading = snapshots(&cluster.await, None).await.expect("most was read");
            assert_eq!(reading.is_complete, is_complete, "{code}: {:?}", reading.unchecked);
            let whats: Vec<&String> = reading.unchecked.iter().map(|note| &note.what).collect();
            assert!(whats.is_sorted() && whats.iter().any(|what| *what == "the nodes"), "{whats:?}");
        }
    }

    #[test]
    fn helm_says_to_which_namespace_a_configuration_belongs_that_calls_another() {
        let elsewhere = json!({"service": {"name": "w", "namespace": "elsewhere"}});
        let namespace = |annotations, client| hooks(annotations, client).remove(0).namespace;
        assert_eq!(namespace(json!({RELEASE_NAMESPACE: "b"}), elsewhere.clone()).as_deref(), Some("b"));
        assert_eq!(namespace(json!({}), elsewhere).as_deref(), Some("elsewhere"));
        assert_eq!(namespace(json!({}), json!({"url": "https://x"})), None);
    }
}
