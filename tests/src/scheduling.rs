//! What the scheduler made of a pod.

use anyhow::{Result, ensure};
use k8s_openapi::api::core::v1::Pod;
use kube::api::Api;

use crate::wait::{SOON, until, until_true};

/// The node that a pod is bound to.
pub fn node_of(pod: &Pod) -> Option<&str> {
    pod.spec.as_ref()?.node_name.as_deref()
}

/// Whether the scheduler has found no node for a pod.
pub fn is_unschedulable(pod: &Pod) -> bool {
    let conditions = pod.status.as_ref().and_then(|status| status.conditions.as_deref()).unwrap_or_default();
    conditions.iter().any(|condition| {
        (condition.type_.as_str(), condition.status.as_str(), condition.reason.as_deref())
            == ("PodScheduled", "False", Some("Unschedulable"))
    })
}

/// Waits until a pod is bound, and returns the name of its node.
pub async fn until_bound(pods: &Api<Pod>, name: &str) -> Result<String> {
    until(SOON, &format!("{name} to be bound"), async || Ok(node_of(&pods.get(name).await?).map(str::to_owned))).await
}

/// Waits until the scheduler has found no node for a pod; an error if it finds one.
pub async fn until_unschedulable(pods: &Api<Pod>, name: &str) -> Result<()> {
    let mut bound = None;
    until_true(SOON, &format!("{name} to be unschedulable"), async || {
        let pod = pods.get(name).await?;
        bound = node_of(&pod).map(str::to_owned);
        Ok(bound.is_some() || is_unschedulable(&pod))
    })
    .await?;
    ensure!(bound.is_none(), "{name} is on {bound:?}");
    Ok(())
}
