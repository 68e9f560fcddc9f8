//! What `check` knows of one installation and of the cluster, read once. Pure: `read` fills it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use balancer_core::{Capacity, Pod as CorePod};
use balancer_runtime::arguments::switch;
use k8s_openapi::api::admissionregistration::v1::ValidatingWebhook;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{Container, Endpoints, Namespace, Pod, Secret, Service, Taint, Toleration};
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt;

use crate::settings::Settings;

use super::metrics::Metrics;

/// The label that each namespace has by itself.
pub(crate) const NAME_LABEL: &str = "kubernetes.io/metadata.name";
/// The label with the part of an installation that an object belongs to, and its values.
pub(crate) const COMPONENT_LABEL: &str = "app.kubernetes.io/component";
pub(crate) const WEBHOOK: &str = "webhook";
pub(crate) const RECONCILER: &str = "reconciler";

/// An object that may be absent, or that the caller may not read.
#[derive(Clone, Debug, Default)]
pub(crate) enum Read<T> {
    /// It was read.
    Found(T),
    /// There is no such object.
    Absent,
    /// It is not known. A note says why.
    #[default]
    Unknown,
}

/// Which of the two webhook configurations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum HookKind {
    /// For creations: it places executors and changes pods.
    Mutating,
    /// For deletions: it releases executors.
    Validating,
}

impl HookKind {
    pub(crate) const ALL: [Self; 2] = [Self::Mutating, Self::Validating];

    /// The kind of the object.
    pub(crate) const fn object_kind(self) -> &'static str {
        match self {
            Self::Mutating => "MutatingWebhookConfiguration",
            Self::Validating => "ValidatingWebhookConfiguration",
        }
    }

    /// The operation of pods that it is for.
    pub(crate) const fn operation(self) -> &'static str {
        match self {
            Self::Mutating => "CREATE",
            Self::Validating => "DELETE",
        }
    }

    /// Where the webhook serves it.
    pub(crate) const fn path(self) -> &'static str {
        match self {
            Self::Mutating => "/mutate",
            Self::Validating => "/validate",
        }
    }
}

/// One webhook of a configuration. What both kinds have in common is all that is checked.
#[derive(Clone, Debug)]
pub(crate) struct Hook {
    pub(crate) kind: HookKind,
    /// The name of the configuration.
    pub(crate) configuration: String,
    pub(crate) webhook: ValidatingWebhook,
}

impl Hook {
    pub(crate) fn object(&self) -> String {
        format!("{} {}", self.kind.object_kind(), self.configuration)
    }
}

/// A node, as far as executors depend on it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Node {
    pub(crate) name: String,
    pub(crate) labels: BTreeMap<String, String>,
    pub(crate) taints: Vec<Taint>,
}

impl Node {
    pub(crate) fn label(&self, key: &str) -> Option<&str> {
        self.labels.get(key).map(String::as_str)
    }
}

/// A right that a service account needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Right {
    /// The service account, in the namespace of the installation.
    pub(crate) account: String,
    pub(crate) verb: &'static str,
    pub(crate) group: &'static str,
    pub(crate) resource: &'static str,
    /// The one object, if not all.
    pub(crate) name: Option<String>,
    /// The one namespace, if not all.
    pub(crate) namespace: Option<String>,
}

/// The metrics of one replica, read once or, if calls to the store have failed, twice.
#[derive(Clone, Debug)]
pub(crate) struct Sample {
    pub(crate) component: String,
    pub(crate) before: Metrics,
    pub(crate) after: Metrics,
}

/// What has become of an executor that was created by a dry run.
#[derive(Clone, Debug, Default)]
pub(crate) enum DryRun {
    /// The webhook changed it.
    Placed,
    /// It came back as it was sent, from this namespace.
    Unchanged { namespace: String },
    /// Another webhook makes it require this capacity, in this namespace.
    Overridden { namespace: String, capacity: Capacity },
    /// The apiserver refused it, because it could not call the webhook.
    NotCalled { error: String },
    /// The apiserver refused it in this namespace, because it could not call a webhook of somebody else.
    OtherNotCalled { namespace: String, error: String },
    /// It is not known. A note says why.
    #[default]
    Unknown,
}

/// One part of an installation.
#[derive(Clone, Debug)]
pub(crate) struct Component {
    pub(crate) deployment: Deployment,
    /// Its literal environment variables.
    pub(crate) environment: BTreeMap<String, String>,
}

impl Component {
    pub(crate) fn of(deployment: Deployment) -> Self {
        let container = container(&deployment);
        let variables = container.and_then(|container| container.env.as_ref()).into_iter().flatten();
        let environment = variables.filter_map(|variable| Some((variable.name.clone(), variable.value.clone()?)));
        let environment = environment.collect();
        Self { deployment, environment }
    }

    pub(crate) fn object(&self) -> String {
        let namespace = self.deployment.namespace().unwrap_or_default();
        format!("Deployment {namespace}/{}", self.deployment.name_any())
    }

    pub(crate) fn variable(&self, name: &str) -> Option<&str> {
        self.environment.get(name).map(String::as_str).filter(|value| !value.is_empty())
    }

    pub(crate) fn is(&self, component: &str) -> bool {
        self.deployment.labels().get(COMPONENT_LABEL).is_some_and(|label| label == component)
    }

    /// How many replicas it should have.
    pub(crate) fn replicas(&self) -> usize {
        let replicas = self.deployment.spec.as_ref().and_then(|spec| spec.replicas);
        replicas.and_then(|replicas| usize::try_from(replicas).ok()).unwrap_or(1)
    }

    pub(crate) fn account(&self) -> String {
        let template = self.deployment.spec.as_ref().and_then(|spec| spec.template.spec.as_ref());
        template.and_then(|pod| pod.service_account_name.clone()).unwrap_or_else(|| "default".to_owned())
    }

    pub(crate) fn uses_memory(&self) -> bool {
        self.variable("STORE").is_some_and(|store| store.eq_ignore_ascii_case("memory"))
    }

    /// The Secret, and its key, that the certificate comes from.
    pub(crate) fn certificate_secret(&self) -> Option<(String, String)> {
        self.secret_of_file(self.variable("TLS_CERT_PATH").unwrap_or("/tls/tls.crt"))
    }

    /// Whether the webhook accepts no review without a token.
    pub(crate) fn has_tokens(&self) -> bool {
        self.variable("ADMISSION_TOKEN_PATH").is_some()
    }

    /// The Secret, and its key, that the admission tokens come from.
    pub(crate) fn token_secret(&self) -> Option<(String, String)> {
        self.secret_of_file(self.variable("ADMISSION_TOKEN_PATH")?)
    }

    fn secret_of_file(&self, path: &str) -> Option<(String, String)> {
        let path = Path::new(path);
        let (folder, file) = (path.parent()?, path.file_name()?.to_str()?);
        let mounts = container(&self.deployment)?.volume_mounts.as_ref()?;
        let mount = mounts.iter().find(|mount| Path::new(&mount.mount_path) == folder)?;
        let pod = self.deployment.spec.as_ref()?.template.spec.as_ref()?;
        let volume = pod.volumes.as_ref()?.iter().find(|volume| volume.name == mount.name)?;
        let secret = volume.secret.as_ref()?;
        let item = secret.items.iter().flatten().find(|item| item.path == file);
        let key = item.map_or_else(|| file.to_owned(), |item| item.key.clone());
        Some((secret.secret_name.clone()?, key))
    }
}

pub(crate) fn container(deployment: &Deployment) -> Option<&Container> {
    deployment.spec.as_ref()?.template.spec.as_ref()?.containers.first()
}

/// What was not checked, and why.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Unchecked {
    pub(crate) what: String,
    pub(crate) why: String,
}

/// The state of one installation and of the cluster at one time. `None` and [`Read::Unknown`] stand for what the caller may
/// not read.
#[derive(Clone, Debug, Default)]
pub(crate) struct Snapshot {
    /// The namespace of the installation; empty if no installation could be read.
    pub(crate) namespace: String,
    pub(crate) hooks: Option<Vec<Hook>>,
    /// Those of the other installations.
    pub(crate) other_hooks: Vec<Hook>,
    pub(crate) components: Option<Vec<Component>>,
    /// The pods of the installation.
    pub(crate) pods: Option<Vec<Pod>>,
    /// The Service that the configuration for creations calls.
    pub(crate) service: Read<Service>,
    pub(crate) endpoints: Read<Endpoints>,
    pub(crate) certificate: Read<Secret>,
    pub(crate) tokens: Read<Secret>,
    pub(crate) lease: Read<Lease>,
    /// The rights that are missing.
    pub(crate) missing_rights: Vec<Right>,
    pub(crate) metrics: Vec<Sample>,
    pub(crate) dry_run: DryRun,
    pub(crate) namespaces: Option<Vec<Namespace>>,
    pub(crate) nodes: Option<Vec<Node>>,
    pub(crate) drivers: Vec<CorePod<'static>>,
    /// What live executors tolerate.
    pub(crate) tolerations: Vec<Toleration>,
    /// The nodes that executors run on.
    pub(crate) executor_nodes: BTreeSet<String>,
    /// Whether an executor that requires spot finds no node.
    pub(crate) spot_is_pending: bool,
    pub(crate) now: Timestamp,
}

impl Snapshot {
    pub(crate) fn component(&self, name: &str) -> Option<&Component> {
        self.components.iter().flatten().find(|component| component.is(name))
    }

    /// What corrects the ledgers: the reconciler, or the webhook if it does that itself.
    pub(crate) fn reconciling(&self) -> Option<&Component> {
        let reconciles = |webhook: &&Component| {
            let enabled = webhook.variable("RECONCILE_ENABLED").and_then(|text| switch(text).ok());
            enabled.unwrap_or(webhook.uses_memory())
        };
        self.component(RECONCILER).or_else(|| self.component(WEBHOOK).filter(reconciles))
    }

    /// The settings of the webhook. The defaults stand for those that cannot be read or are invalid.
    pub(crate) fn settings(&self) -> Settings {
        let component = self.component(WEBHOOK).or_else(|| self.component(RECONCILER));
        component.and_then(|component| settings_of(component).ok()).unwrap_or_default()
    }

    /// The namespaces of the jobs, if the installation has them by name: those whose jobs are reconciled, or without a
    /// reconciler those that are sent to the webhook. Empty for all.
    pub(crate) fn watched(&self) -> Vec<String> {
        let Some(component) = self.reconciling() else { return self.selected_by_name() };
        let names = component.variable("WATCH_NAMESPACES").into_iter().flat_map(|names| names.split(','));
        names.map(str::trim).filter(|name| !name.is_empty()).map(str::to_owned).collect()
    }

    fn selected_by_name(&self) -> Vec<String> {
        let mut creations = self.hooks.iter().flatten().filter(|hook| hook.kind == HookKind::Mutating);
        let selector = creations.find_map(|hook| hook.webhook.namespace_selector.as_ref());
        let mut expressions = selector.into_iter().flat_map(|selector| selector.match_expressions.iter().flatten());
        let names = expressions.find(|own| own.key == NAME_LABEL && own.operator == "In");
        names.and_then(|own| own.values.clone()).unwrap_or_default()
    }

    /// Whether the webhook is called by an address, and it is not known where it runs.
    pub(crate) fn has_webhook_elsewhere(&self) -> bool {
        let calls_url = |hook: &Hook| hook.webhook.client_config.url.is_some();
        self.components.is_some() && self.component(WEBHOOK).is_none() && self.hooks.iter().flatten().any(calls_url)
    }

    /// The name of the Lease that elects the leader, if there is one.
    pub(crate) fn lease_name(&self) -> Option<&str> {
        let component = self.reconciling().filter(|component| !component.uses_memory())?;
        Some(component.variable("RECONCILE_LEASE").unwrap_or("spot-balancer-reconciler"))
    }

    /// The object of this kind and name in the namespace of the installation.
    pub(crate) fn object(&self, kind: &str, name: &str) -> String {
        format!("{kind} {}/{name}", self.namespace)
    }
}

/// The settings of a Deployment, by the program's own parser.
pub(crate) fn settings_of(component: &Component) -> Result<Settings, crate::settings::SettingsError> {
    let origin = crate::settings::Origin::Deployment {
        namespace: component.deployment.namespace().unwrap_or_default(),
        name: component.deployment.name_any(),
    };
    let variables = component.environment.iter().map(|(name, value)| (name.as_str(), value.as_str()));
    Settings::of_environment(variables, origin)
}
