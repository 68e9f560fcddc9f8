//! Nodes without machines: objects that the real scheduler accepts and binds pods to.

use anyhow::Result;
use k8s_openapi::api::core::v1::Node;
use kube::Client;
use kube::api::{Api, Patch, PatchParams};
use serde_json::json;

/// Makes sure that there are `count` nodes of this capacity, `<capacity>-0` and on: Ready, untainted,
/// large, with the labels that a node pool for executors gives its nodes. Answers their names.
pub async fn ensure(client: &Client, capacity: &str, count: usize) -> Result<Vec<String>> {
    let nodes = Api::<Node>::all(client.clone());
    let mut names = Vec::with_capacity(count);
    for number in 0..count {
        let name = format!("{capacity}-{number}");
        let room = json!({"cpu": "4000", "memory": "16Ti", "pods": "2000"});
        let node = json!({
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": name, "labels": {
                "karpenter.sh/capacity-type": capacity,
                "kubernetes.io/hostname": name,
                "spark-role": "executor",
            }},
            "status": {
                "capacity": room,
                "allocatable": room,
                "conditions": [{"type": "Ready", "status": "True", "reason": "Simulated"}],
            },
        });
        // The object makes the node, its status fills it in where the node was there before.
        let params = PatchParams::apply("tests");
        nodes.patch(&name, &params, &Patch::Apply(&node)).await?;
        nodes.patch_status(&name, &params, &Patch::Apply(&node)).await?;
        names.push(name);
    }
    Ok(names)
}
