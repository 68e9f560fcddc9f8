//! What a namespace's administrator sets, and what refuses pods after admission by our webhook: a ResourceQuota and a
//! LimitRange.

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::{LimitRange, ResourceQuota};
use kube::Client;
use kube::api::{Api, Patch, PatchParams};
use serde_json::json;

use crate::pods::{PodBuilder, executor};
use crate::wait::{SOON, until_true};

const NAME: &str = "tests";

/// Lets a namespace have so many pods, and waits until the apiserver refuses and accepts by that. The controller
/// manager has to run.
pub async fn set(client: &Client, namespace: &str, pods: u32) -> Result<()> {
    let quota = json!({
        "apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": NAME},
        "spec": {"hard": {"pods": pods.to_string()}},
    });
    let quotas = Api::<ResourceQuota>::namespaced(client.clone(), namespace);
    quotas.patch(NAME, &PatchParams::apply("tests").force(), &Patch::Apply(&quota)).await?;
    until_true(SOON, &format!("the quota of {pods} pods to be enforced"), async || {
        let status = quotas.get(NAME).await?.status.context("no status yet")?;
        let (hard, used) = (status.hard.context("no limit yet")?, status.used.context("no use yet")?);
        let used: u32 = used.get("pods").context("pods are not counted yet")?.0.parse()?;
        let full = used >= pods;
        let answer = bystander().dry_run(client, namespace).await?;
        let enforced = if full { answer.status == 403 } else { answer.status == 201 };
        Ok(hard.get("pods").is_some_and(|hard| hard.0 == pods.to_string()) && enforced)
    })
    .await
}

/// Fails unless as many pods live as fit, or one more: the quota controller counts by a cache, and what it writes may
/// undo the count of a pod that was accepted meanwhile.
pub fn ensure_full(live: usize, fit: usize) -> Result<()> {
    ensure!((fit..=fit + 1).contains(&live), "{live} pods live where {fit} fit");
    Ok(())
}

/// Refuses containers of a namespace that request more CPUs than this, and waits until the apiserver does so.
pub async fn limit_cpu(client: &Client, namespace: &str, cpus: u32) -> Result<()> {
    let limits = json!({
        "apiVersion": "v1", "kind": "LimitRange", "metadata": {"name": NAME},
        "spec": {"limits": [{"type": "Container", "max": {"cpu": cpus.to_string()}}]},
    });
    let ranges = Api::<LimitRange>::namespaced(client.clone(), namespace);
    ranges.patch(NAME, &PatchParams::apply("tests").force(), &Patch::Apply(&limits)).await?;
    until_true(SOON, "the limit to be enforced", async || {
        Ok(with_cpus(bystander(), cpus + 1).dry_run(client, namespace).await?.status == 403)
    })
    .await
}

/// A pod that requests so many CPUs, and may use no more.
pub fn with_cpus(pod: PodBuilder, cpus: u32) -> PodBuilder {
    pod.with(|pod| {
        let resources = &mut pod["spec"]["containers"][0]["resources"];
        // Both, because the LimitRange's default of the other would make the pod invalid.
        for kind in ["requests", "limits"] {
            resources[kind]["cpu"] = cpus.to_string().into();
        }
    })
}

/// A pod that is not sent to our webhook.
fn bystander() -> PodBuilder {
    executor("bystander", 0).without_label("spark-role")
}
