//! Checks the webhook configurations: whether the apiserver sends the pods of jobs to the webhook, and waits long enough.

use std::collections::{BTreeMap, BTreeSet};

use balancer_core::{Pod, PolicyField};
use k8s_openapi::api::admissionregistration::v1::ValidatingWebhook;
use k8s_openapi::api::core::v1::{Namespace, Service};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use kube::ResourceExt;

use super::listed;
use crate::check::problem::{Finding, Problem};
use crate::check::snapshot::{
    DryRun, Hook, HookKind, NAME_LABEL, Read, Snapshot, Unchecked, WEBHOOK, container, settings_of,
};
use crate::settings::not_literal;
use crate::snapshot::selects;

const UPGRADE: &str = "Run `helm upgrade` with your values again, or apply the manifests again.";
/// How long the apiserver waits if the configuration states no time.
const DEFAULT_TIMEOUT_SECONDS: i32 = 10;

/// Both configurations exist.
pub(super) fn presence(snapshot: &Snapshot) -> Vec<Finding> {
    let Some(hooks) = &snapshot.hooks else { return Vec::new() };
    let missing = HookKind::ALL.into_iter().filter(|kind| !hooks.iter().any(|hook| hook.kind == *kind));
    let finding = |kind: HookKind| {
        let effect = match kind {
            HookKind::Mutating => "executors are created unchanged",
            HookKind::Validating => "deleted executors count until the reconciler notices",
        };
        let object = format!("{} of {}", kind.object_kind(), snapshot.namespace);
        Finding::new(Problem::WebhookMissing, object, format!("There is none, so {effect}."), UPGRADE)
    };
    missing.map(finding).collect()
}

/// The apiserver creates pods if the webhook does not answer.
pub(super) fn failure_policy(snapshot: &Snapshot) -> Vec<Finding> {
    each(snapshot, |hook| {
        let policy = hook.webhook.failure_policy.as_deref().unwrap_or("Fail");
        (policy != "Ignore").then(|| {
            let text = format!(
                "failurePolicy is {policy}, so no pod of a job is created or deleted while the webhook does not answer."
            );
            Finding::new(Problem::WebhookFailurePolicy, hook.object(), text, "Set failurePolicy to Ignore.")
        })
    })
}

/// The apiserver waits longer than the webhook may take.
pub(super) fn timeout(snapshot: &Snapshot) -> Vec<Finding> {
    let Some(webhook) = snapshot.component(WEBHOOK) else { return Vec::new() };
    each(snapshot, |hook| {
        let (setting, value, milliseconds) = match hook.kind {
            HookKind::Mutating => ("WEBHOOK_TIMEOUT_SECONDS", "admission.timeoutSeconds", 1000),
            HookKind::Validating => ("STORE_TIMEOUT_MILLISECONDS", "admission.deletionTimeoutSeconds", 1),
        };
        let own: i64 = webhook.variable(setting)?.parse().ok()?;
        let waits = hook.webhook.timeout_seconds.unwrap_or(DEFAULT_TIMEOUT_SECONDS);
        (i64::from(waits) * 1000 <= own * milliseconds).then(|| {
            let text = format!("The apiserver waits {waits} s, and the webhook may take as long ({setting}={own}).");
            let fix = format!("Raise {value} above {setting}.");
            Finding::new(Problem::WebhookTimeout, hook.object(), text, fix)
        })
    })
}

/// The rules have the pods and the operation.
pub(super) fn rules(snapshot: &Snapshot) -> Vec<Finding> {
    each(snapshot, |hook| {
        let operation = hook.kind.operation();
        let has = |list: Option<&Vec<String>>, value: &str| {
            list.into_iter().flatten().any(|item| item == value || item == "*")
        };
        let is_met = hook.webhook.rules.iter().flatten().any(|rule| {
            has(rule.operations.as_ref(), operation)
                && has(rule.api_groups.as_ref(), "")
                && has(rule.api_versions.as_ref(), "v1")
                && has(rule.resources.as_ref(), "pods")
                && rule.scope.as_deref().is_none_or(|scope| scope != "Cluster")
        });
        (!is_met).then(|| {
            let text = format!("No rule has the operation {operation} of pods, so the webhook is not called for it.");
            Finding::new(Problem::WebhookRules, hook.object(), text, UPGRADE)
        })
    })
}

/// The objectSelector has the roles.
pub(super) fn pods(snapshot: &Snapshot) -> Vec<Finding> {
    let conventions = snapshot.settings().conventions;
    each(snapshot, |hook| {
        let mut roles = vec![&conventions.executor_role_value];
        if hook.kind == HookKind::Mutating {
            roles.extend(&conventions.driver_role_values);
        }
        let selected = |role: &str| {
            let job = conventions.job_id_label.iter().map(|label| (label.clone(), "job".to_owned()));
            let labels = job.chain([(conventions.workload_role_label.clone(), role.to_owned())]).collect();
            selects(hook.webhook.object_selector.as_ref(), &labels)
        };
        let left_out: Vec<&String> = roles.into_iter().filter(|role| !selected(role)).collect();
        (!left_out.is_empty()).then(|| {
            let label = &conventions.workload_role_label;
            let text = format!("The objectSelector leaves out pods with {label}={}.", listed(&left_out));
            Finding::new(
                Problem::WebhookPods,
                hook.object(),
                text,
                format!("Upgrade the release with the settings for your pods, so that the selector has these values of {label}."),
            )
        })
    })
}

/// The namespaceSelector has the namespaces whose jobs are reconciled, or at least one.
pub(super) fn namespaces(snapshot: &Snapshot) -> Vec<Finding> {
    let Some(namespaces) = &snapshot.namespaces else { return Vec::new() };
    let (labels, watched) = (labels_of(namespaces), snapshot.watched());
    let is_selected = |hook: &Hook, name: &str| {
        labels.get(name).is_some_and(|labels| selects(hook.webhook.namespace_selector.as_ref(), labels))
    };
    let known = snapshot.hooks.iter().flatten().chain(&snapshot.other_hooks);
    let creations: Vec<&Hook> = known.filter(|hook| hook.kind == HookKind::Mutating).collect();
    let is_unserved = |name: &&str| !creations.iter().any(|hook| is_selected(hook, name));
    let unserved: Vec<&str> = stating_namespaces(snapshot).into_iter().filter(is_unserved).collect();
    each(snapshot, |hook| {
        let selected = |name: &str| is_selected(hook, name);
        let left_out: Vec<&String> = watched.iter().filter(|name| !selected(name)).collect();
        let (text, fix) = if !left_out.is_empty() {
            let exists = |name: &&String| labels.contains_key(name.as_str());
            let (exist, gone): (Vec<&String>, Vec<&String>) = left_out.into_iter().partition(exists);
            match exist.as_slice() {
                [] => (
                    format!("The namespaces of jobs do not exist: {}.", listed(&gone)),
                    "Create them, or correct namespaces.names.".to_owned(),
                ),
                exist => (
                    format!("The namespaceSelector leaves out namespaces of jobs: {}.", listed(exist)),
                    "Upgrade the release, so that the selector has them. Where their label kubernetes.io/metadata.name \
                     is missing, set it to their names first."
                        .to_owned(),
                ),
            }
        } else if watched.is_empty() && !labels.keys().any(|name| selected(name)) {
            (
                "The namespaceSelector selects no namespace that exists.".to_owned(),
                "Label the namespaces of your jobs as namespaces.selector says.".to_owned(),
            )
        } else if hook.kind == HookKind::Mutating && !unserved.is_empty() {
            (
                format!(
                    "Drivers state a ratio in namespaces that no webhook configuration found here selects: {}.",
                    listed(&unserved)
                ),
                "Add them to namespaces.names, or label them as namespaces.selector says.".to_owned(),
            )
        } else {
            return None;
        };
        Some(Finding::new(Problem::WebhookNamespaces, hook.object(), text, fix))
    })
}

/// How notes name what a dry run shows.
pub(crate) const REACHED: &str = "whether the apiserver reaches the webhook";

/// At most so many namespaces whose pods are sent to the webhook when they are created: first the caller's own, then those of
/// the settings and of jobs.
pub(crate) fn served(snapshot: &Snapshot, own: &str, most: usize) -> Vec<String> {
    let labels = snapshot.namespaces.as_ref().map(|namespaces| labels_of(namespaces));
    let creations: Vec<_> = snapshot.hooks.iter().flatten().filter(|hook| hook.kind == HookKind::Mutating).collect();
    let is_served = |name: &String| {
        creations.iter().any(|hook| {
            let selector = hook.webhook.namespace_selector.as_ref();
            match &labels {
                Some(labels) => labels.get(name.as_str()).is_some_and(|labels| selects(selector, labels)),
                // Only the label that each namespace has by itself is known.
                None => {
                    selector.is_none_or(is_by_name)
                        && selects(selector, &[(NAME_LABEL.to_owned(), name.clone())].into())
                }
            }
        })
    };
    let jobs = snapshot.drivers.iter().filter_map(|driver| driver.metadata.namespace.as_deref().map(str::to_owned));
    let all = snapshot.namespaces.iter().flatten().map(ResourceExt::name_any);
    let names = [own.to_owned()].into_iter().chain(snapshot.watched()).chain(jobs).chain(all);
    let mut seen = BTreeSet::new();
    names.filter(|name| seen.insert(name.clone()) && is_served(name)).take(most).collect()
}

fn labels_of(namespaces: &[Namespace]) -> BTreeMap<&str, &BTreeMap<String, String>> {
    namespaces.iter().filter_map(|namespace| Some((namespace.metadata.name.as_deref()?, namespace.labels()))).collect()
}

/// Whether a selector asks for the names of namespaces alone.
fn is_by_name(selector: &LabelSelector) -> bool {
    let labels = selector.match_labels.iter().flat_map(BTreeMap::keys);
    let expressions = selector.match_expressions.iter().flatten().map(|expression| &expression.key);
    labels.chain(expressions).all(|key| key == NAME_LABEL)
}

/// The apiserver reaches the webhook, as far as the other findings do not explain that an executor is unchanged.
pub(super) fn reached(snapshot: &Snapshot, others: &[Finding]) -> Option<Finding> {
    let text = match &snapshot.dry_run {
        DryRun::Unchanged { namespace } => {
            if !knows_settings(snapshot) || others.iter().any(|finding| keeps_executors_from_it(snapshot, finding)) {
                return None;
            }
            let has_conditions = others.iter().any(|finding| finding.problem == Problem::WebhookConditions);
            let unless = if has_conditions { ", unless its matchConditions leave such an executor out" } else { "" };
            format!(
                "An executor that a dry run created in {namespace} came back unchanged, so the webhook gave the apiserver no \
                 valid answer in time{unless}."
            )
        }
        DryRun::NotCalled { error } => format!("The apiserver cannot call the webhook: {error}."),
        _ => return None,
    };
    let hook = snapshot.hooks.iter().flatten().find(|hook| hook.kind == HookKind::Mutating)?;
    let fix = "Look for `failed calling webhook` in the log of the apiserver. Usual causes: a firewall or a NetworkPolicy \
               between the control plane and the webhook, a caBundle of another CA than that of the certificate which is \
               served, an expired certificate, an old token in the path, a replica that hangs; or another webhook that \
               removes annotations.";
    Some(Finding::new(Problem::WebhookUnreached, hook.object(), text, fix))
}

/// No webhook of somebody else comes between.
pub(super) fn others(snapshot: &Snapshot) -> Vec<Finding> {
    let (namespace, text, fix) = match &snapshot.dry_run {
        DryRun::Overridden { namespace, capacity } if knows_settings(snapshot) => (
            namespace,
            format!("Another webhook makes executors require {capacity}, so their ratios have no effect."),
            "Find it among the MutatingWebhookConfigurations, and let it leave executors out.",
        ),
        DryRun::OtherNotCalled { namespace, error } => (
            namespace,
            format!(
                "Executors cannot be created, because the apiserver cannot call a webhook of somebody else: {error}."
            ),
            "Repair that webhook, or set its failurePolicy to Ignore.",
        ),
        _ => return Vec::new(),
    };
    vec![Finding::new(Problem::OtherWebhook, format!("Namespace {namespace}"), text, fix)]
}

/// What has become of an executor that may have had other labels than the webhook is set to.
pub(super) fn doubtful(snapshot: &Snapshot) -> Vec<Unchecked> {
    let came_back = match &snapshot.dry_run {
        DryRun::Unchanged { namespace } => format!("in {namespace} came back unchanged"),
        DryRun::Overridden { namespace, capacity } => format!("in {namespace} came back requiring {capacity}"),
        _ => return Vec::new(),
    };
    if knows_settings(snapshot) {
        return Vec::new();
    }
    let why = format!(
        "an executor that a dry run created {came_back}, but it had the default labels and annotations, because the \
         settings are not known"
    );
    vec![Unchecked { what: REACHED.to_owned(), why }]
}

fn knows_settings(snapshot: &Snapshot) -> bool {
    snapshot.component(WEBHOOK).is_some_and(|webhook| {
        let container = container(&webhook.deployment);
        settings_of(webhook).is_ok() && container.is_some_and(|container| not_literal(container).is_empty())
    })
}

/// Whether this explains by itself that executors come back unchanged.
fn keeps_executors_from_it(snapshot: &Snapshot, finding: &Finding) -> bool {
    match finding.problem {
        Problem::WebhookMissing
        | Problem::WebhookRules
        | Problem::WebhookPods
        | Problem::WebhookService
        | Problem::AdmissionToken
        | Problem::CaBundle => !finding.object.starts_with(HookKind::Validating.object_kind()),
        Problem::CertificateMissing
        | Problem::CertificateExpired
        | Problem::CertificateName
        | Problem::DeploymentMissing => true,
        Problem::SettingsInvalid | Problem::NoReadyReplica => {
            snapshot.component(WEBHOOK).is_some_and(|webhook| webhook.object() == finding.object)
        }
        _ => false,
    }
}

/// The namespaces of the live drivers that state a ratio.
fn stating_namespaces(snapshot: &Snapshot) -> BTreeSet<&str> {
    let conventions = snapshot.settings().conventions;
    let annotation = conventions.annotation(PolicyField::SpotRatio);
    let states = |driver: &&Pod<'_>| {
        let ratio = driver.annotation(annotation);
        driver.is_live() && ratio.is_some_and(|ratio| !ratio.trim().eq_ignore_ascii_case("off"))
    };
    snapshot.drivers.iter().filter(states).filter_map(|driver| driver.metadata.namespace.as_deref()).collect()
}

/// No expression leaves out pods.
pub(super) fn conditions(snapshot: &Snapshot) -> Vec<Finding> {
    each(snapshot, |hook| {
        let conditions: Vec<&str> =
            hook.webhook.match_conditions.iter().flatten().map(|condition| condition.name.as_str()).collect();
        (!conditions.is_empty()).then(|| {
            let text = format!("Pods that do not meet these matchConditions are left out: {}.", listed(&conditions));
            let fix = "Remove them, or make sure that executors and drivers meet them.";
            Finding::new(Problem::WebhookConditions, hook.object(), text, fix)
        })
    })
}

/// The Service and its port exist.
pub(super) fn service(snapshot: &Snapshot) -> Vec<Finding> {
    each(snapshot, |hook| {
        let finding = |text: String| Some(Finding::new(Problem::WebhookService, hook.object(), text, UPGRADE));
        // An address may lead to the webhook from anywhere.
        let called = hook.webhook.client_config.service.as_ref()?;
        if called.namespace != snapshot.namespace {
            return finding(format!("It calls a Service in another namespace, {}.", called.namespace));
        }
        let service = match &snapshot.service {
            Read::Found(service) if service.name_any() == called.name => service,
            Read::Found(service) => {
                let (name, other) = (service.name_any(), &called.name);
                return finding(format!("It calls the Service {other}, and the webhook's is {name}."));
            }
            Read::Absent => {
                let name = snapshot.object("Service", &called.name);
                return finding(format!("It calls the {name}, which does not exist."));
            }
            Read::Unknown => return None,
        };
        let port = called.port.unwrap_or(443);
        let has_port = service.spec.iter().flat_map(|spec| spec.ports.iter().flatten()).any(|one| one.port == port);
        if !has_port {
            return finding(format!("It calls the port {port}, which the Service does not have."));
        }
        if selects_webhook(snapshot, service) {
            return None;
        }
        let name = service.name_any();
        finding(format!("It calls the Service {name}, whose selector does not select the pods of the webhook."))
    })
}

/// Whether the Service leads to the pods of the webhook's Deployment. Without a selector somebody else makes its Endpoints.
fn selects_webhook(snapshot: &Snapshot, service: &Service) -> bool {
    let selector = service.spec.as_ref().and_then(|spec| spec.selector.as_ref());
    let labels = snapshot
        .component(WEBHOOK)
        .and_then(|webhook| webhook.deployment.spec.as_ref()?.template.metadata.as_ref()?.labels.as_ref());
    let Some((selector, labels)) = selector.zip(labels) else { return true };
    selector.iter().all(|(name, value)| labels.get(name) == Some(value))
}

/// What a check finds in each of the configurations.
fn each(snapshot: &Snapshot, check: impl FnMut(&Hook) -> Option<Finding>) -> Vec<Finding> {
    snapshot.hooks.iter().flatten().filter_map(check).collect()
}

/// The name of the Service that a webhook calls, and the path.
pub(super) fn called(webhook: &ValidatingWebhook) -> Option<(&str, &str)> {
    let service = webhook.client_config.service.as_ref()?;
    Some((&service.name, service.path.as_deref().unwrap_or("/")))
}
