//! What a command knows of the cluster: pods, nodes and Events, read once. Pure: `read` fills it.

pub(crate) mod read;
#[cfg(test)]
pub(crate) mod testing;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use balancer_core::Pool;
use balancer_core::{InvalidField, Pod, PolicyField, PolicyOverrides, SpotPreference};
use balancer_reconcile::WarningReason;
use balancer_reconcile::index::{ClusterIndex, DriverRef};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use k8s_openapi::jiff::Timestamp;
use kube::core::{Selector, SelectorExt};
use serde::Serialize;

use crate::settings::{Origin, Settings};

/// What is not known, because the caller may not read it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum Missing {
    /// The nodes.
    Nodes,
    /// The Events.
    Events,
    /// Pods that own executors.
    Owners,
    /// The webhook's Deployment.
    Settings,
}

/// A node's labels.
#[derive(Clone, Debug)]
pub(crate) struct Node {
    pub(crate) name: String,
    pub(crate) labels: Vec<(String, String)>,
}

/// An Event about a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Event {
    pub(crate) namespace: String,
    /// The pod's name.
    pub(crate) pod: String,
    /// The pod's uid; empty if the Event does not state it.
    pub(crate) uid: String,
    pub(crate) reason: String,
    pub(crate) note: String,
    /// What has reported it, such as `default-scheduler`.
    pub(crate) reporter: String,
    /// When it was last seen.
    pub(crate) at: Timestamp,
}

/// The namespace and the name of a pod.
pub(crate) type PodKey = (String, String);

/// The state of the cluster at one time.
#[derive(Clone, Debug)]
pub(crate) struct Snapshot {
    pub(crate) settings: Settings,
    /// Drivers, executors, and the pods that own executors.
    pub(crate) pods: BTreeMap<PodKey, Pod<'static>>,
    /// Pods that own executors and were not read.
    pub(crate) unread_owners: BTreeSet<PodKey>,
    /// `None` if they may not be read.
    pub(crate) nodes: Option<Vec<Node>>,
    /// Those that a command asks for; `None` if they may not be read.
    pub(crate) events: Option<Vec<Event>>,
    /// When the webhook was registered with the apiserver, if that may be read.
    pub(crate) registered: Option<Timestamp>,
    /// Whether the pods of the namespace are sent to the webhook, if that may be read.
    pub(crate) is_selected: Option<bool>,
    pub(crate) now: Timestamp,
}

/// Where the policy of a job comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum RatioSource {
    /// An annotation on the driver.
    Driver,
    /// An annotation on the pod that owns the executors, because the job has no driver.
    Owner,
    /// The pod that drives the job states no ratio.
    Default,
    /// The pod that drives the job states an invalid ratio.
    Invalid,
    /// The pod that drives the job was not read.
    NotRead,
    /// No pod that drives the job was found.
    Unknown,
}

/// The policy of a job, as far as pods and settings show it.
#[derive(Clone, Debug)]
pub(crate) struct JobPolicy<'s> {
    pub(crate) source: RatioSource,
    /// The fields that are known.
    pub(crate) fields: PolicyOverrides,
    pub(crate) invalid: Vec<InvalidField>,
    /// The pod that drives the job.
    pub(crate) driver: Option<&'s Pod<'static>>,
}

/// Whether a job's executors are sent to spot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SpotState {
    Open,
    /// There was no spot at this time.
    Closed(Timestamp),
    Unknown,
}

/// How long an apiserver keeps Events, unless it is told otherwise (`--event-ttl`).
const EVENTS_KEPT_SECONDS: i64 = 3600;

/// By what the reconciler's Events are known.
pub(crate) const REPORTER: &str = "spot-balancer";
pub(crate) const SPOT_CLOSED: &str = WarningReason::SpotClosed.as_str();
pub(crate) const SPOT_REOPENED: &str = WarningReason::SpotReopened.as_str();

impl Snapshot {
    /// The pods by their names. One without a name is none of a cluster.
    pub(crate) fn by_name(pods: impl IntoIterator<Item = Pod<'static>>) -> BTreeMap<PodKey, Pod<'static>> {
        pods.into_iter().filter_map(|pod| Some((key(&pod)?, pod))).collect()
    }

    /// The jobs and their executors, by the reconciler's own rules.
    pub(crate) fn index(&self) -> ClusterIndex {
        let profile = self.settings.conventions.profile();
        let mut index = ClusterIndex::new(Arc::new(self.settings.conventions.clone()), self.settings.defaults);
        index.init_nodes();
        for node in self.nodes.iter().flatten() {
            index.apply_node(&node.name, profile.of_node(|key| node.label(key)));
            index.set_pool(&node.name, Pool::of_node(|key| node.label(key)));
        }
        index.init_nodes_done();
        index.init_pods(None);
        for pod in self.pods.values() {
            index.list_pod(pod, None);
        }
        index.init_pods_done(None);
        index
    }

    pub(crate) fn node(&self, name: &str) -> Option<&Node> {
        self.nodes.iter().flatten().find(|node| node.name == name)
    }

    pub(crate) fn pod(&self, namespace: &str, name: &str) -> Option<&Pod<'static>> {
        self.pods.get(&(namespace.to_owned(), name.to_owned()))
    }

    /// What the caller may not read.
    pub(crate) fn missing(&self) -> Vec<Missing> {
        let missing = [
            (self.nodes.is_none(), Missing::Nodes),
            (self.events.is_none(), Missing::Events),
            (!self.unread_owners.is_empty(), Missing::Owners),
            (self.settings.known_defaults().is_none(), Missing::Settings),
        ];
        missing.into_iter().filter(|(is_missing, _)| *is_missing).map(|(_, missing)| missing).collect()
    }

    /// The policy of the job that this pod drives.
    pub(crate) fn policy(&self, driver: Option<&DriverRef>) -> JobPolicy<'_> {
        let pod = driver.and_then(|driver| {
            self.pod(&driver.namespace, &driver.name).filter(|pod| pod.metadata.uid.as_deref() == Some(&driver.uid))
        });
        let Some(pod) = pod else {
            let (fields, invalid) = (PolicyOverrides::default(), Vec::new());
            let is_unread =
                |driver: &DriverRef| self.unread_owners.contains(&(driver.namespace.clone(), driver.name.clone()));
            let source = if driver.is_some_and(is_unread) { RatioSource::NotRead } else { RatioSource::Unknown };
            return JobPolicy { source, fields, invalid, driver: None };
        };
        let conventions = &self.settings.conventions;
        let (stated, invalid) = conventions.overrides(pod);
        let is_invalid = |field| invalid.iter().any(|invalid: &InvalidField| invalid.field == field);
        let source = match stated.spot_ratio {
            Some(_)
                if pod.label(&conventions.workload_role_label).is_some_and(|role| conventions.is_driver_role(role)) =>
            {
                RatioSource::Driver
            }
            Some(_) => RatioSource::Owner,
            None if is_invalid(PolicyField::SpotRatio) => RatioSource::Invalid,
            None => RatioSource::Default,
        };
        // No setting changes the base. Instead of an invalid value another one may be in use, which no pod shows.
        let is_known = |field| {
            !is_invalid(field) && (field == PolicyField::OnDemandBase || self.settings.known_defaults().is_some())
        };
        let fields = stated.or_overrides(PolicyOverrides::from(self.settings.defaults).filter(is_known));
        JobPolicy { source, fields, invalid, driver: Some(pod) }
    }

    /// Whether spot is open to the job that this pod drives. The ledger is not readable, so Events tell it.
    pub(crate) fn spot_state(&self, driver: Option<&DriverRef>, policy: &JobPolicy<'_>) -> SpotState {
        let Some(driver) = driver else { return SpotState::Unknown };
        let is_best_effort = self.settings.known_defaults().is_some()
            && self.settings.conventions.spot_preference == SpotPreference::BestEffort;
        if policy.fields.spot_fallback_seconds == Some(0) || is_best_effort {
            return SpotState::Open;
        }
        let Some(events) = &self.events else { return SpotState::Unknown };
        let about = events.iter().filter(|event| {
            let is_meant = event.reason == SPOT_CLOSED || event.reason == SPOT_REOPENED;
            is_meant && event.reporter == REPORTER && event.is_about(&driver.namespace, &driver.name, &driver.uid)
        });
        match about.max_by_key(|event| event.at) {
            Some(event) if event.reason == SPOT_CLOSED => SpotState::Closed(event.at),
            Some(_) => SpotState::Open,
            // An older Event may be gone.
            None => {
                let created = policy.driver.and_then(created);
                let is_young = created.is_some_and(|created| self.seconds_since(created) < EVENTS_KEPT_SECONDS);
                if is_young { SpotState::Open } else { SpotState::Unknown }
            }
        }
    }

    pub(crate) fn seconds_since(&self, time: Timestamp) -> i64 {
        (self.now.as_second() - time.as_second()).max(0)
    }
}

impl Node {
    pub(crate) fn label(&self, key: &str) -> Option<&str> {
        self.labels.iter().find(|(label, _)| label == key).map(|(_, value)| value.as_str())
    }
}

impl Event {
    pub(crate) fn is_about(&self, namespace: &str, pod: &str, uid: &str) -> bool {
        self.namespace == namespace && self.pod == pod && (self.uid.is_empty() || self.uid == uid)
    }
}

/// The namespace and the name of a pod.
pub(crate) fn key(pod: &Pod<'_>) -> Option<PodKey> {
    Some((pod.metadata.namespace.as_deref()?.to_owned(), pod.metadata.name.as_deref()?.to_owned()))
}

/// Whether a selector selects an object with these labels. Without a selector all are selected, and none by an invalid one.
pub(crate) fn selects(selector: Option<&LabelSelector>, labels: &BTreeMap<String, String>) -> bool {
    selector.is_none_or(|selector| Selector::try_from(selector.clone()).is_ok_and(|selector| selector.matches(labels)))
}

/// When a pod was created.
pub(crate) fn created(pod: &Pod<'_>) -> Option<Timestamp> {
    pod.metadata.creation_timestamp.as_deref()?.parse().ok()
}

/// What is not known because of what was not read, and what is in doubt, in a line each; `None` if all is known.
pub(crate) fn note(missing: &[Missing], origin: &Origin, doubt: Option<&str>) -> Option<String> {
    let parts: Vec<String> = missing
        .iter()
        .map(|missing| match (missing, origin) {
            (Missing::Nodes, _) => {
                "nodes (so capacities are those that the pods ask for, and pools are unknown)".into()
            }
            (Missing::Events, _) => "Events (so whether spot is closed is unknown)".into(),
            (Missing::Owners, _) => "pods that own executors (so the ratios of their jobs are unknown)".into(),
            (Missing::Settings, Origin::Defaults { error: Some(error) }) => {
                format!("the webhook's settings (so the default ratio is unknown): {error}")
            }
            (Missing::Settings, _) => "the webhook's Deployment (so the default ratio is unknown)".into(),
        })
        .collect();
    let unread = (!parts.is_empty()).then(|| format!("note: not read: {}", parts.join(", ")));
    let notes: Vec<String> = unread.into_iter().chain(doubt.map(|doubt| format!("note: {doubt}"))).collect();
    (!notes.is_empty()).then(|| notes.join("\n"))
}
