//! Nodes without machines: objects that the real scheduler accepts and binds pods to.

use anyhow::Result;
use k8s_openapi::api::core::v1::Node;
use kube::Client;
use kube::api::{Api, DeleteParams, Patch, PatchParams};
use serde_json::{Value, json};

use crate::platforms::Shape;

/// The label with a node's capacity type.
pub const CAPACITY: &str = "karpenter.sh/capacity-type";
/// The label, and the taint, of nodes that only some pods may use.
pub const POOL: &str = "pool";
/// The label by which a test says what capacity a node has, whatever its platform's labels say. No program of ours
/// reads it.
pub const TRUTH: &str = "tests/capacity";

const LARGE: u32 = 2000;

/// Makes sure that there are `count` nodes of this capacity, `<capacity>-0` and on: Ready, untainted,
/// large, with the labels that a node pool for executors gives its nodes. Returns their names.
pub async fn ensure(client: &Client, capacity: &str, count: usize) -> Result<Vec<String>> {
    let mut names = Vec::with_capacity(count);
    for number in 0..count {
        let name = format!("{capacity}-{number}");
        apply(client, &name, &labels(&name, capacity), &json!([]), &room_for(LARGE)).await?;
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
    apply(client, &name, &labels, &taint, &room_for(LARGE)).await?;
    Ok(name)
}

/// Closes a node to new pods, as `kubectl cordon` does, or opens it again.
pub async fn cordon(client: &Client, name: &str, closed: bool) -> Result<()> {
    let patch = json!({"spec": {"unschedulable": closed}});
    Api::<Node>::all(client.clone()).patch(name, &PatchParams::default(), &Patch::Merge(&patch)).await?;
    Ok(())
}

/// Makes a node of a platform, of this name and with room for so many pods, for the pods of
/// [`PodBuilder::on_pool`] alone. It has the labels of node pools for executors, and `labels`.
///
/// [`PodBuilder::on_pool`]: crate::pods::PodBuilder::on_pool
pub async fn of_platform(
    client: &Client,
    (pool, name): (&str, &str),
    shape: &Shape,
    labels: &[(&str, &str)],
    room: u32,
) -> Result<()> {
    of_size(client, (pool, name), shape, labels, &room_for(room)).await
}

/// The same with this capacity, as a node has it in its status. A real size lets the scheduler tell an emptier node.
pub async fn of_size(
    client: &Client,
    (pool, name): (&str, &str),
    shape: &Shape,
    labels: &[(&str, &str)],
    room: &Value,
) -> Result<()> {
    let mut all = of_shape(name, shape);
    for (key, value) in labels.iter().copied().chain([(POOL, pool)]) {
        all[key] = value.into();
    }
    apply(client, name, &all, &taints((POOL, pool), shape), room).await
}

/// Writes labels of a node, or removes those that are `None`.
pub async fn label(client: &Client, name: &str, labels: &[(&str, Option<&str>)]) -> Result<()> {
    let labels: Value = labels.iter().map(|(key, value)| ((*key).to_owned(), json!(value))).collect();
    let patch = json!({"metadata": {"labels": labels}});
    Api::<Node>::all(client.clone()).patch(name, &PatchParams::default(), &Patch::Merge(&patch)).await?;
    Ok(())
}

/// Makes nodes as the executor pool of `deploy/node-pools.yaml` has them, one of each shape of a platform, for
/// executors alone; and an open one for drivers and all else.
pub async fn ensure_executor_pool(client: &Client, platform: &str, shapes: &[Shape]) -> Result<()> {
    let taint = ("spark-role", "executor");
    for shape in shapes {
        let name = format!("executors-{platform}-{}", shape.name);
        apply(client, &name, &of_shape(&name, shape), &taints(taint, shape), &room_for(LARGE)).await?;
    }
    let mut other = labels("open", "on-demand");
    if let Some(labels) = other.as_object_mut() {
        labels.remove("spark-role");
    }
    apply(client, "open", &other, &json!([]), &room_for(LARGE)).await
}

/// Deletes a node. Its pods stay until a controller or the test deletes them.
pub async fn remove(client: &Client, name: &str) -> Result<()> {
    Api::<Node>::all(client.clone()).delete(name, &DeleteParams::default()).await?;
    Ok(())
}

fn labels(name: &str, capacity: &str) -> Value {
    json!({CAPACITY: capacity, "kubernetes.io/hostname": name, "spark-role": "executor"})
}

/// The labels of a platform's node for executors.
fn of_shape(name: &str, shape: &Shape) -> Value {
    let mut all = json!({"kubernetes.io/hostname": name, "spark-role": "executor", TRUTH: shape.capacity});
    for (key, value) in shape.labels {
        all[key] = (*value).into();
    }
    all
}

/// A pool's taint, and that of the platform.
fn taints(of_pool: (&str, &str), shape: &Shape) -> Value {
    let taints = [of_pool].into_iter().chain(shape.taint);
    taints.map(|(key, value)| json!({"key": key, "value": value, "effect": "NoSchedule"})).collect()
}

/// Room for so many pods, whatever they request.
fn room_for(pods: u32) -> Value {
    json!({"cpu": "4000", "memory": "16Ti", "pods": pods.to_string()})
}

async fn apply(client: &Client, name: &str, labels: &Value, taints: &Value, room: &Value) -> Result<()> {
    let nodes = Api::<Node>::all(client.clone());
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
