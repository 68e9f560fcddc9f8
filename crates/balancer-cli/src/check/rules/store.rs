//! Checks by the metrics of the replicas whether calls to Redis fail, and whether a reconciler may change ledgers.

use k8s_openapi::api::core::v1::Pod;

use super::workloads::is_of;
use crate::check::problem::{Finding, Problem};
use crate::check::snapshot::{RECONCILER, Read, Sample, Snapshot, WEBHOOK};

/// The counters of failed calls to the store, of the webhook and of the reconciler.
pub(crate) const STORE_ERRORS: [&str; 2] =
    ["spot_balancer_store_errors_total", "spot_balancer_reconcile_store_errors_total"];
const LEADER: &str = "spot_balancer_reconcile_leader";

/// After a leader has ended, another one leads within this time.
const FAILOVER_SECONDS: i64 = 60;

/// No calls to the store fail now, and the leader may change ledgers.
pub(super) fn store(snapshot: &Snapshot) -> Vec<Finding> {
    let mut failing: Vec<String> = snapshot.metrics.iter().flat_map(failing).collect();
    failing.sort_unstable();
    failing.dedup();
    if !failing.is_empty() {
        let text = format!("Calls fail: {}.", failing.join(", "));
        let fix = match failing.as_slice() {
            [only] if only == "full" => "Give Redis more memory, or lower what else is in it.",
            [only] if only == "refused" => "Allow its user the commands and keys that Spot Balancer needs.",
            _ => {
                "Check that Redis runs, and that REDIS_URL, its password and the NetworkPolicies let the pods reach it."
            }
        };
        return vec![Finding::new(Problem::Store, format!("Redis of {}", snapshot.namespace), text, fix)];
    }
    not_reconciling(snapshot)
}

/// The kinds of errors that have become more between the two samples.
fn failing(sample: &Sample) -> Vec<String> {
    let mut kinds = Vec::new();
    for name in STORE_ERRORS {
        for (labels, value) in sample.after.samples(name) {
            let before =
                sample.before.samples(name).find(|(other, _)| *other == labels).map_or(0.0, |(_, value)| value);
            if value > before {
                let kind = labels.split('"').nth(1).unwrap_or("unknown");
                kinds.push(kind.replace('_', " "));
            }
        }
    }
    kinds
}

/// If all replicas that could lead were asked, one of them may change ledgers.
fn not_reconciling(snapshot: &Snapshot) -> Vec<Finding> {
    let Some(reconciling) = snapshot.reconciling() else { return Vec::new() };
    let component = if reconciling.is(RECONCILER) { RECONCILER } else { WEBHOOK };
    let samples: Vec<&Sample> = snapshot.metrics.iter().filter(|sample| sample.component == component).collect();
    let all_were_read = !samples.is_empty() && samples.len() >= reconciling.replicas();
    let is_held = reconciling.uses_memory()
        || matches!(&snapshot.lease, Read::Found(lease) if lease.spec.as_ref().is_some_and(|spec| spec.holder_identity.is_some()));
    // The Lease may still name a leader that has ended.
    let is_new = snapshot
        .pods
        .iter()
        .flatten()
        .any(|pod| is_of(pod, component) && has_started_since(pod, snapshot.now.as_second() - FAILOVER_SECONDS));
    let leads = samples.iter().any(|sample| sample.after.sum(LEADER).is_some_and(|value| value > 0.0));
    if !all_were_read || !is_held || leads || is_new {
        return Vec::new();
    }
    let text =
        "One of its replicas leads, and none may change ledgers: the store or the Kubernetes API does not answer.";
    let fix = "Look at the log of the leader, which the Lease names.";
    vec![Finding::new(Problem::NotReconciling, reconciling.object(), text, fix)]
}

/// Whether a container of the pod has been started since then.
fn has_started_since(pod: &Pod, since: i64) -> bool {
    let containers = pod.status.iter().flat_map(|status| status.container_statuses.iter().flatten());
    let mut running =
        containers.filter_map(|container| container.state.as_ref()?.running.as_ref()?.started_at.as_ref());
    running.any(|started| started.0.as_second() >= since)
}
