//! Reads a snapshot from the cluster, as far as the caller may.

use std::collections::BTreeSet;

use anyhow::Context;
use balancer_core::{Conventions, Pod};
use balancer_reconcile::WatchedPod;
use futures::future::try_join_all;
use k8s_openapi::api::admissionregistration::v1::MutatingWebhookConfiguration;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1;
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt;
use kube::api::{Api, ListParams};

use crate::cluster::{Cluster, Freshness, RequestError, if_allowed, list, list_metadata, within};
use crate::settings::{Origin, Settings, not_literal};

use super::{Event, Node, PodKey, SPOT_CLOSED, SPOT_REOPENED, Snapshot, key, selects};

/// What the objects of an installation have in common.
const NAME_LABEL: &str = "app.kubernetes.io/name=spot-balancer";
const WEBHOOK_LABELS: &str = "app.kubernetes.io/name=spot-balancer,app.kubernetes.io/component=webhook";
/// Where the manifests and the guides install it, for callers who may not list all Deployments.
const USUAL_NAMESPACE: &str = "spot-balancer";
const LIST_DEPLOYMENTS: &str = "cannot list the webhook's Deployment";
/// How many pods that own executors and are no drivers are read. The ratio of further jobs is unknown.
const MAX_OWNERS: usize = 100;
/// How many of them are read at once.
const AT_ONCE: usize = 8;

/// The Events that a command needs.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Wanted<'a> {
    /// Those about spot that is closed or opened again.
    SpotEvents,
    /// Those about a pod and the pods that own it.
    EventsOf(&'a v1::Pod),
}

/// Reads the pods of a namespace, or of all, the nodes and the Events, by these settings.
///
/// # Errors
/// If the caller may not list pods, or the API does not answer.
pub(crate) async fn snapshot(
    cluster: &Cluster,
    namespace: Option<&str>,
    settings: Settings,
    wanted: Wanted<'_>,
    freshness: Freshness,
) -> anyhow::Result<Snapshot> {
    let pods = async {
        pods(cluster, namespace, &settings.conventions, freshness).await.with_context(|| match namespace {
            Some(namespace) => format!("cannot list the pods of namespace {namespace:?}"),
            None => "cannot list the pods of all namespaces; with --namespace one is enough".to_owned(),
        })
    };
    let nodes = async { if_allowed(nodes(cluster, freshness).await).context("cannot list the nodes") };
    let events =
        async { if_allowed(events(cluster, namespace, wanted, freshness).await).context("cannot list the Events") };
    let registration = async { Ok(registration(cluster, namespace, wanted).await) };
    let ((pods, unread_owners), nodes, events, (registered, is_selected)) =
        tokio::try_join!(pods, nodes, events, registration)?;
    let pods = Snapshot::by_name(pods);
    Ok(Snapshot { settings, pods, unread_owners, nodes, events, registered, is_selected, now: Timestamp::now() })
}

/// The part of a pod that the core reads.
pub(crate) fn core_pod(pod: &v1::Pod) -> Option<Pod<'static>> {
    let json = serde_json::to_vec(pod).ok()?;
    serde_json::from_slice::<Pod<'_>>(&json).ok().map(Pod::into_owned)
}

/// The drivers, the executors, and the pods that own executors and have no role themselves; and those of them that were not
/// read.
async fn pods(
    cluster: &Cluster,
    namespace: Option<&str>,
    conventions: &Conventions,
    freshness: Freshness,
) -> Result<(Vec<Pod<'static>>, BTreeSet<PodKey>), RequestError> {
    let roles = conventions.driver_role_values.iter().chain([&conventions.executor_role_value]);
    let roles = roles.map(String::as_str).collect::<Vec<_>>().join(",");
    let selector = format!("{} in ({roles})", conventions.workload_role_label);
    let api = cluster.api::<WatchedPod>(namespace);
    let mut pods = list(&api, freshness.parameters().labels(&selector), |pod| Some(pod.pod)).await?;
    let known: BTreeSet<_> = pods.iter().filter_map(key).collect();
    let owner = |pod: &Pod<'_>| Some((pod.metadata.namespace.as_deref()?.to_owned(), pod.owner()?.name.to_string()));
    let owners: BTreeSet<_> = pods.iter().filter(|pod| pod.is_live()).filter_map(owner).collect();
    let owners: Vec<_> = owners.difference(&known).collect();
    let (read, others) = owners.split_at(owners.len().min(MAX_OWNERS));
    let mut unread: BTreeSet<PodKey> = others.iter().map(|&owner| owner.clone()).collect();
    for some in read.chunks(AT_ONCE) {
        let answers = some.iter().map(async |&owner| {
            let (namespace, name) = owner;
            let api = cluster.api::<WatchedPod>(Some(namespace));
            // Who may list pods need not be allowed to get one.
            Ok::<_, RequestError>((owner, if_allowed(within(api.get_opt(name)).await)?))
        });
        for (owner, answer) in try_join_all(answers).await? {
            match answer {
                Some(found) => pods.extend(found.map(|pod| pod.pod)),
                None => drop(unread.insert(owner.clone())),
            }
        }
    }
    Ok((pods, unread))
}

async fn nodes(cluster: &Cluster, freshness: Freshness) -> Result<Vec<Node>, RequestError> {
    let api = Api::<v1::Node>::all(cluster.client.clone());
    list_metadata(&api, freshness.parameters(), |mut node| {
        let labels = std::mem::take(&mut node.metadata.labels).unwrap_or_default().into_iter().collect();
        Some(Node { name: node.name_any(), labels })
    })
    .await
}

async fn events(
    cluster: &Cluster,
    namespace: Option<&str>,
    wanted: Wanted<'_>,
    freshness: Freshness,
) -> Result<Vec<Event>, RequestError> {
    let selectors = match wanted {
        Wanted::SpotEvents => [SPOT_CLOSED, SPOT_REOPENED].map(|reason| format!("reason={reason}")).to_vec(),
        Wanted::EventsOf(pod) => {
            let owners = pod.owner_references().iter().filter(|owner| owner.kind == "Pod");
            let names = owners.map(|owner| owner.name.clone()).chain([pod.name_any()]);
            names.map(|name| format!("involvedObject.kind=Pod,involvedObject.name={name}")).collect()
        }
    };
    let api = cluster.api::<v1::Event>(namespace);
    let mut events = Vec::new();
    for selector in selectors {
        events.extend(list(&api, freshness.parameters().fields(&selector), |event| Some(Event::of(event))).await?);
    }
    events.sort_by_key(|event| event.at);
    Ok(events)
}

/// When the webhook was registered, and whether pods of the namespace are sent to it. Few may read it, and no answer depends
/// on it alone.
async fn registration(
    cluster: &Cluster,
    namespace: Option<&str>,
    wanted: Wanted<'_>,
) -> (Option<Timestamp>, Option<bool>) {
    let (Wanted::EventsOf(_), Some(name)) = (wanted, namespace) else { return (None, None) };
    let configurations = Api::<MutatingWebhookConfiguration>::all(cluster.client.clone());
    let namespaces = Api::<v1::Namespace>::all(cluster.client.clone());
    let (found, namespace) = tokio::join!(
        list(&configurations, ListParams::default().labels(NAME_LABEL), Some),
        within(namespaces.get(name))
    );
    let Ok(found) = found else { return (None, None) };
    let registered = found.iter().filter_map(|one| Some(one.metadata.creation_timestamp.as_ref()?.0)).min();
    let webhooks: Vec<_> = found.into_iter().flat_map(|one| one.webhooks.unwrap_or_default()).collect();
    let is_selected = namespace.ok().filter(|_| !webhooks.is_empty()).map(|namespace| {
        webhooks.iter().any(|webhook| selects(webhook.namespace_selector.as_ref(), namespace.labels()))
    });
    (registered, is_selected)
}

/// The settings of a webhook that the caller may read, of one that runs if there is one; else the defaults.
///
/// # Errors
/// If the API has a fault.
pub(crate) async fn settings(cluster: &Cluster) -> anyhow::Result<Settings> {
    for namespace in [None, Some(USUAL_NAMESPACE)] {
        let api = cluster.api::<Deployment>(namespace);
        let found = list(&api, ListParams::default().labels(WEBHOOK_LABELS), Some).await;
        if let Some(settings) = settings_of(found).context(LIST_DEPLOYMENTS)? {
            return Ok(settings);
        }
    }
    Ok(Settings::default())
}

/// The settings by this answer; `None` if it shows no Deployment. What pods tell is worth printing without settings too.
fn settings_of(answer: Result<Vec<Deployment>, RequestError>) -> Result<Option<Settings>, RequestError> {
    let found = match answer {
        Err(error @ RequestError::TimedOut) => {
            let error = Some(format!("{LIST_DEPLOYMENTS}: {error}"));
            return Ok(Some(Settings { origin: Origin::Defaults { error }, ..Settings::default() }));
        }
        answer => if_allowed(answer)?.unwrap_or_default(),
    };
    let is_ready = |deployment: &&Deployment| {
        deployment.status.as_ref().is_some_and(|status| status.ready_replicas.unwrap_or(0) > 0)
    };
    // One that is left behind and does not run places no executor.
    let Some(deployment) = found.iter().find(is_ready).or(found.first()) else { return Ok(None) };
    let origin =
        Origin::Deployment { namespace: deployment.namespace().unwrap_or_default(), name: deployment.name_any() };
    let template = deployment.spec.as_ref().and_then(|spec| spec.template.spec.as_ref());
    let containers = template.map(|pod| pod.containers.as_slice()).unwrap_or_default();
    let variables = containers.iter().flat_map(|container| container.env.iter().flatten());
    let variables = variables.filter_map(|variable| Some((variable.name.as_str(), variable.value.as_deref()?)));
    // A newer webhook may have settings that this plugin does not know.
    let settings = Settings::of_environment(variables, origin.clone()).unwrap_or_else(|error| {
        let error = Some(format!("the Deployment {origin} cannot be used: {error}"));
        Settings { origin: Origin::Defaults { error }, ..Settings::default() }
    });
    let hidden: Vec<String> = containers.iter().flat_map(not_literal).collect();
    let several = (found.len() > 1)
        .then(|| format!("there are {} installations, and the settings are those of {origin}", found.len()));
    let hidden = (!hidden.is_empty()).then(|| {
        let names = hidden.join(", ");
        format!("the Deployment {origin} has settings that are not literal, and the defaults stand for them: {names}")
    });
    let doubts: Vec<String> = several.into_iter().chain(hidden).collect();
    Ok(Some(Settings { doubt: (!doubts.is_empty()).then(|| doubts.join("; ")), ..settings }))
}

impl Event {
    fn of(event: v1::Event) -> Self {
        let created = event.metadata.creation_timestamp.map(|time| time.0);
        let series = event.series.and_then(|series| series.last_observed_time).map(|time| time.0);
        let at = [series, event.last_timestamp.map(|time| time.0), event.event_time.map(|time| time.0), created];
        let source = event.source.and_then(|source| source.component);
        let object = event.involved_object;
        Self {
            namespace: object.namespace.unwrap_or_default(),
            pod: object.name.unwrap_or_default(),
            uid: object.uid.unwrap_or_default(),
            reason: event.reason.unwrap_or_default(),
            note: event.message.unwrap_or_default(),
            reporter: event.reporting_component.filter(|name| !name.is_empty()).or(source).unwrap_or_default(),
            at: at.into_iter().flatten().next().unwrap_or_default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::snapshot::testing::{cluster, forbidden, items, pod, untouched};

    /// An executor of a pod that has no role.
    fn executor_of(owner: usize) -> Value {
        let mut executor = untouched(&format!("executor-{owner}"));
        executor["metadata"]["ownerReferences"][0]["name"] = json!(format!("owner-{owner}"));
        executor
    }

    async fn read_owners(executors: usize, may_get: bool) -> Snapshot {
        let cluster = cluster(move |request| match request.split_once("/pods").map(|(_, rest)| rest) {
            Some(rest) if rest.starts_with('?') => items((0..executors).map(executor_of).collect()),
            Some(rest) if may_get => (200, pod(rest.trim_start_matches('/').trim_end_matches('?'), "")),
            Some(_) => forbidden(),
            None => items(Vec::new()),
        });
        let cluster = cluster.await;
        let settings = Settings::default();
        snapshot(&cluster, Some("etl"), settings, Wanted::SpotEvents, Freshness::Now).await.expect("a snapshot")
    }

    #[tokio::test]
    async fn owners_beyond_the_limit_are_known_not_to_be_read() {
        let snapshot = read_owners(MAX_OWNERS + 2, true).await;
        assert_eq!((snapshot.pods.len(), snapshot.unread_owners.len()), (2 * MAX_OWNERS + 2, 2));
        assert!(snapshot.unread_owners.iter().all(|owner| !snapshot.pods.contains_key(owner)));
    }

    #[tokio::test]
    async fn owners_that_the_caller_may_not_get_are_known_not_to_be_read() {
        let snapshot = read_owners(1, false).await;
        assert_eq!(snapshot.unread_owners, [("etl".to_owned(), "owner-0".to_owned())].into());
        assert!(read_owners(1, true).await.unread_owners.is_empty());
    }

    fn deployment(name: &str, variables: &Value) -> Deployment {
        let container = json!({"name": "webhook", "env": variables});
        serde_json::from_value(json!({
            "metadata": {"name": name, "namespace": "spot-balancer"},
            "spec": {"selector": {}, "template": {"spec": {"containers": [container]}}},
        }))
        .expect("a Deployment")
    }

    fn doubt(found: Vec<Deployment>) -> Option<String> {
        settings_of(Ok(found)).expect("an answer").expect("settings").doubt
    }

    #[test]
    fn several_installations_and_settings_that_are_not_literal_are_doubts() {
        let literal = json!([
            {"name": "DEFAULT_SPOT_RATIO", "value": "0.9"},
            {"name": "REDIS_PASSWORD", "valueFrom": {"secretKeyRef": {"name": "redis", "key": "password"}}},
        ]);
        assert_eq!(doubt(vec![deployment("one", &literal)]), None);
        assert_eq!(
            doubt(vec![deployment("one", &literal), deployment("two", &literal)]).as_deref(),
            Some("there are 2 installations, and the settings are those of spot-balancer/one")
        );
        let mut runs = deployment("two", &literal);
        runs.status = serde_json::from_value(json!({"readyReplicas": 1})).expect("a status");
        assert_eq!(
            doubt(vec![deployment("one", &literal), runs]).as_deref(),
            Some("there are 2 installations, and the settings are those of spot-balancer/two"),
        );
        let of_map = json!({"configMapKeyRef": {"name": "settings", "key": "ratio"}});
        let elsewhere = json!([{"name": "DEFAULT_SPOT_RATIO", "valueFrom": of_map}]);
        let mut hidden = deployment("one", &elsewhere);
        let hides =
            "the Deployment spot-balancer/one has settings that are not literal, and the defaults stand for them: ";
        assert_eq!(doubt(vec![hidden.clone()]), Some(format!("{hides}DEFAULT_SPOT_RATIO")));
        let template = hidden.spec.as_mut().and_then(|spec| spec.template.spec.as_mut()).expect("a template");
        template.containers[0].env_from =
            serde_json::from_value(json!([{"configMapRef": {"name": "settings"}}])).expect("sources");
        assert_eq!(doubt(vec![hidden]), Some(format!("{hides}DEFAULT_SPOT_RATIO, envFrom")));
    }

    #[test]
    fn a_list_of_deployments_that_times_out_means_that_the_settings_are_not_known() {
        let settings = settings_of(Err(RequestError::TimedOut)).expect("no error").expect("settings");
        let Origin::Defaults { error: Some(error) } = &settings.origin else { panic!("{settings:?}") };
        assert_eq!(error, "cannot list the webhook's Deployment: the Kubernetes API did not answer within 15 s");
        assert!(settings.known_defaults().is_none());
        assert!(settings_of(Err(RequestError::Unavailable("down".into()))).is_err());
        assert!(settings_of(Err(RequestError::Forbidden("no".into()))).expect("no error").is_none());
    }
}
