//! Nodes without machines: objects that the real scheduler accepts and binds pods to.

use anyhow::Result;
use k8s_openapi::api::core::v1::Node;
use kube::Client;
use kube::api::{Api, DeleteParams, Patch, PatchParams};
use serde_json::{Value, json};

/// The label with a node's capacity type.
pub const CAPACITY: &str = "karpenter.sh/capacity-type";
/// The label, and the taint, of nodes that only some pods may use.
pub const POOL: &str = "pool";

/// Makes sure that there are `count` nodes of this capacity, `<capacity>-0` and on: Ready, untainted,
/// large, with the labels that a node pool for executors gives its nodes. Returns their names.
pub async fn ensure(client: &Client, capacity: &str, count: usize) -> Result<Vec<String>> {
    let mut names = Vec::with_capacity(count);
    for number in 0..count {
        let name = format!("{capacity}-{number}");
        apply(client, &name, &labels(&name, capacity), &json!([])).await?;
        names.push(name);
    }
    Ok(names)
}

/// Makes a node, `<pool>-<capacity>`, for the pods of [`PodBuilder::on_pool`] alone: a test that
/// deletes it disturbs no other. Returns its name.
///
/// [`PodBuilder::on_pool`]: crate::pods::PodBuilder::on_pool
pub async fn of_pool(client: &Client, pool: &str, capacity: &str) -> Result<String> {
    let name = format!("{pool}-{capacity}");
    let mut labels = labels(&name, capacity);
    labels[POOL] = pool.into();
    let taint = json!([{"key": POOL, "value": pool, "effect": "NoSchedule"}]);
    apply(client, &name, &labels, &taint).await?;
    Ok(name)
}

/// Makes nodes as the executor pool of `deploy/node-pools.yaml` has them, one of each capacity, for executors
/// alone; and an open one for drivers and all else.
pub async fn ensure_executor_pool(client: &Client) -> Result<()> {
    let taint = json!([{"key": "spark-role", "value": "executor", "effect": "NoSchedule"}]);
    for capacity in ["spot", "on-demand"] {
        let name = format!("executors-{capacity}");
        apply(client, &name, &labels(&name, capacity), &taint).await?;
    }
    let mut other = labels("open", "on-demand");
    if let Some(labels) = other.as_object_mut() {
        labels.remove("spark-role");
    }
    apply(client, "open", &other, &json!([])).await
}

/// Deletes a node. Its pods stay until a controller or the test deletes them.
pub async fn remove(client: &Client, name: &str) -> Result<()> {
    Api::<Node>::all(client.clone()).delete(name, &DeleteParams::default()).await?;
    Ok(())
}

fn labels(name: &str, capacity: &str) -> Value {
    json!({CAPACITY: capacity, "kubernetes.io/hostname": name, "spark-role": "executor"})
}

async fn apply(client: &Client, name: &str, labels: &Value, taints: &Value) -> Result<()> {
    let nodes = Api::<Node>::all(client.clone());
    let room = json!({"cpu": "4000", "memory": "16Ti", "pods": "2000"});
    let node = json!({
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "labels": labels},
        "spec": {"taints": taints},
        "status": {
            "capacity": room,
            "allocatable": room,
            "conditions": [{"type": "Ready", "status": "True", "reason": "Simulated"}],
        },
    });
    // The object makes the node, its status fills it in where the node was there before.
    let params = PatchParams::apply("tests");
    nodes.patch(name, &params, &Patch::Apply(&node)).await?;
    nodes.patch_status(name, &params, &Patch::Apply(&node)).await?;
    Ok(())
}
