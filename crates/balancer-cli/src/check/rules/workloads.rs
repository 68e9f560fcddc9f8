//! Checks what runs: the Deployments, their settings and replicas, and the leader.

use balancer_runtime::text::number_of;
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;

use crate::check::problem::{Finding, Problem};
use crate::check::snapshot::{
    COMPONENT_LABEL, Component, RECONCILER, Read, Snapshot, Unchecked, WEBHOOK, container, settings_of,
};

/// How much later than promised a leader may renew its Lease. The clock of this machine may be wrong by as much.
const LATE_SECONDS: i64 = 60;

/// The Deployments exist.
pub(super) fn deployments(snapshot: &Snapshot) -> Vec<Finding> {
    if snapshot.components.is_none() || snapshot.namespace.is_empty() || snapshot.has_webhook_elsewhere() {
        return Vec::new();
    }
    let mut findings = Vec::new();
    if snapshot.component(WEBHOOK).is_none() {
        let object = format!("Deployment of the webhook in {}", snapshot.namespace);
        let text = "There is none, so executors are created unchanged.";
        let fix = "Install the release again, or delete its webhook configurations.";
        findings.push(Finding::new(Problem::DeploymentMissing, object, text, fix));
    } else if snapshot.reconciling().is_none() {
        let object = format!("Deployment of the reconciler in {}", snapshot.namespace);
        let text = "There is none, so executors that end without a deletion stay counted.";
        let fix = "Leave reconciler.mode empty, and upgrade the release.";
        findings.push(Finding::new(Problem::NoReconciler, object, text, fix));
    }
    findings
}

/// The programs start with their settings, and agree on them.
pub(super) fn settings(snapshot: &Snapshot) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut valid = Vec::new();
    for component in snapshot.components.iter().flatten() {
        match settings_of(component) {
            Ok(settings) => valid.push((component, settings)),
            Err(error) if has_no_ready_replica(snapshot, component) => findings.push(Finding::new(
                Problem::SettingsInvalid,
                component.object(),
                format!("None of its replicas is ready, and its settings are invalid for this plugin: {error}."),
                "Correct the setting in your values, and upgrade the release. If the plugin is older than the release, use \
                 the plugin of the release.",
            )),
            // A newer program may accept what this plugin does not know.
            Err(_) => {}
        }
    }
    if let [(one, first), (other, second)] = valid.as_slice()
        && (&first.conventions, first.defaults, one.uses_memory())
            != (&second.conventions, second.defaults, other.uses_memory())
    {
        let mut names: Vec<&str> = one.environment.keys().chain(other.environment.keys()).map(String::as_str).collect();
        names.sort_unstable();
        names.dedup();
        names.retain(|name| {
            let differs = one.environment.get(*name) != other.environment.get(*name);
            differs && is_shared(name)
        });
        let text = format!("It has other settings than the {}: {}.", other.object(), super::listed(&names));
        let fix = "Upgrade the release, so that both have the same settings.";
        findings.push(Finding::new(Problem::SettingsDiffer, one.object(), text, fix));
    }
    findings
}

/// The settings that this plugin cannot read, although a replica runs with them or may do so.
pub(super) fn unreadable(snapshot: &Snapshot) -> Vec<Unchecked> {
    let components = snapshot.components.iter().flatten();
    let unreadable = components.filter_map(|component| {
        let error = settings_of(component).err()?;
        (!has_no_ready_replica(snapshot, component)).then(|| Unchecked {
            what: format!("the settings of the {}", component.object()),
            why: format!("this plugin cannot read them, and may be older than the release: {error}"),
        })
    });
    unreadable.collect()
}

/// The webhook, if it is not known where it runs.
pub(super) fn elsewhere(snapshot: &Snapshot) -> Vec<Unchecked> {
    if !snapshot.has_webhook_elsewhere() {
        return Vec::new();
    }
    let what = "the webhook and its settings".to_owned();
    vec![Unchecked { what, why: "its configurations call a URL, and no Deployment of it is here".to_owned() }]
}

/// The settings that the Deployments do not show, instead of which the defaults are checked.
pub(super) fn not_literal(snapshot: &Snapshot) -> Vec<Unchecked> {
    let components = snapshot.components.iter().flatten();
    let hidden = components.filter_map(|component| {
        let names = container(&component.deployment).map(crate::settings::not_literal).unwrap_or_default();
        (!names.is_empty()).then(|| Unchecked {
            what: format!("settings of the {}", component.object()),
            why: format!("they are not literal, and the defaults stand for them: {}", names.join(", ")),
        })
    });
    hidden.collect()
}

/// Whether it is known that no replica is ready.
fn has_no_ready_replica(snapshot: &Snapshot, component: &Component) -> bool {
    let is_ready =
        |pod: &Pod| pod.labels().get(COMPONENT_LABEL).is_some_and(|part| component.is(part)) && is_ready(pod);
    snapshot.pods.as_ref().is_some_and(|pods| !pods.iter().any(is_ready))
}

/// Whether this is one of the settings that both programs must agree on.
fn is_shared(name: &str) -> bool {
    name == "STORE" || crate::settings::is_setting(name)
}

/// A ledger in memory has one owner.
pub(super) fn memory(snapshot: &Snapshot) -> Vec<Finding> {
    let Some(webhook) = snapshot.component(WEBHOOK).filter(|webhook| webhook.uses_memory()) else {
        return Vec::new();
    };
    if webhook.replicas() <= 1 {
        return Vec::new();
    }
    let text = format!("STORE=memory, and each of the {} replicas counts by itself.", webhook.replicas());
    let fix = "Set the replicas to 1, or use Redis.";
    vec![Finding::new(Problem::MemoryReplicas, webhook.object(), text, fix)]
}

/// The apiserver reaches all replicas of the webhook.
pub(super) fn webhook_replicas(snapshot: &Snapshot) -> Vec<Finding> {
    let Some(webhook) = snapshot.component(WEBHOOK) else { return Vec::new() };
    let ready = match &snapshot.endpoints {
        Read::Found(endpoints) => {
            let subsets = endpoints.subsets.iter().flatten();
            subsets.map(|subset| subset.addresses.as_ref().map_or(0, Vec::len)).sum()
        }
        Read::Absent => 0,
        Read::Unknown => return Vec::new(),
    };
    replicas(webhook, ready, "Executors are created unchanged.")
}

/// All replicas of the reconciler are ready.
pub(super) fn reconciler_replicas(snapshot: &Snapshot) -> Vec<Finding> {
    let Some((reconciler, pods)) = snapshot.component(RECONCILER).zip(snapshot.pods.as_ref()) else {
        return Vec::new();
    };
    let ready = pods.iter().filter(|pod| is_of(pod, RECONCILER) && is_ready(pod)).count();
    replicas(reconciler, ready, "Ledgers are not corrected.")
}

/// The newest version of a program is the one that runs.
pub(super) fn rollouts(snapshot: &Snapshot) -> Vec<Finding> {
    let finding = |component: &Component| {
        let status = component.deployment.status.as_ref()?;
        let mut conditions = status.conditions.iter().flatten();
        let stuck = conditions.find(|condition| condition.type_ == "Progressing" && condition.status == "False")?;
        let updated = status.updated_replicas.unwrap_or(0);
        let has_older = status.replicas.unwrap_or(0) > updated && status.ready_replicas.unwrap_or(0) > 0;
        if !has_older {
            return None;
        }
        let message = stuck.message.as_deref().unwrap_or_default().trim_end_matches('.');
        let text = format!(
            "Its rollout is stuck: {updated} of {} of the new version, and older ones serve with their settings. {message}.",
            number_of(component.replicas(), "replica")
        );
        let fix =
            "Look at the Events and the logs of its newest pods; `kubectl rollout undo` goes back to the last version.";
        Some(Finding::new(Problem::RolloutStuck, component.object(), text, fix))
    };
    snapshot.components.iter().flatten().filter_map(finding).collect()
}

fn replicas(component: &Component, ready: usize, effect: &str) -> Vec<Finding> {
    let wanted = component.replicas();
    let fix = if wanted == 0 { "Scale it up." } else { "Look at the Events and the logs of its pods." };
    let finding = |problem, text: String| vec![Finding::new(problem, component.object(), text, fix)];
    match ready {
        // Nobody wants it to run.
        _ if wanted == 0 => finding(Problem::NoReadyReplica, format!("It is scaled to 0 replicas. {effect}")),
        0 => finding(
            Problem::NoReadyReplica,
            format!("It has no ready replica, and should have {}. {effect}", number_of(wanted, "replica")),
        ),
        ready if ready < wanted => finding(
            Problem::ReplicaNotReady,
            format!("It has {}, and should have {wanted}.", number_of(ready, "ready replica")),
        ),
        _ => Vec::new(),
    }
}

pub(crate) fn is_of(pod: &Pod, component: &str) -> bool {
    pod.labels().get(COMPONENT_LABEL).is_some_and(|label| label == component)
}

fn is_ready(pod: &Pod) -> bool {
    if pod.metadata.deletion_timestamp.is_some() {
        return false;
    }
    let conditions = pod.status.iter().flat_map(|status| status.conditions.iter().flatten());
    let mut ready = conditions.filter(|condition| condition.type_ == "Ready");
    ready.any(|condition| condition.status == "True")
}

/// A reconciler leads.
pub(super) fn leader(snapshot: &Snapshot) -> Vec<Finding> {
    let Some(name) = snapshot.lease_name() else { return Vec::new() };
    let text = match &snapshot.lease {
        Read::Unknown => return Vec::new(),
        Read::Absent => "It does not exist, so no reconciler has ever led.".to_owned(),
        Read::Found(lease) => {
            let spec = lease.spec.clone().unwrap_or_default();
            let holder = spec.holder_identity.filter(|holder| !holder.is_empty());
            let Some((holder, renewed)) = holder.zip(spec.renew_time) else {
                return no_leader(snapshot, name, "Nobody holds it, so no reconciler corrects ledgers.".to_owned());
            };
            let late =
                snapshot.now.as_second() - renewed.0.as_second() - i64::from(spec.lease_duration_seconds.unwrap_or(0));
            if late <= LATE_SECONDS {
                return Vec::new();
            }
            format!("{holder} holds it, and has not renewed it for {late} s longer than it may.")
        }
    };
    no_leader(snapshot, name, text)
}

fn no_leader(snapshot: &Snapshot, lease: &str, text: String) -> Vec<Finding> {
    let fix = "Look for `cannot determine the leader` in the log of the reconciler.";
    vec![Finding::new(Problem::NoLeader, snapshot.object("Lease", lease), text, fix)]
}
