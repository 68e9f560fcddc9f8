//! Driver and executor pods as Spark 3.5 makes them, posted as Spark posts them.

use std::hash::{DefaultHasher, Hash, Hasher};

use anyhow::{Context, Result};
use http::HeaderMap;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, DeleteParams, Patch, PatchParams};
use kube::{Client, Error};
use serde_json::{Value, json};

use crate::{endpoint, nodes};

/// The label that carries the job's id on EMR.
pub const JOB_ID_LABEL: &str = "emr-containers.amazonaws.com/job.id";

/// The driver pod of a job: `<job>-driver`.
pub fn driver(job: &str) -> PodBuilder {
    let container = json!({
        "name": "spark-kubernetes-driver",
        "image": "apache/spark:3.5.9",
        "args": ["driver", "--properties-file", "/opt/spark/conf/spark.properties"],
        "ports": [{"name": "driver-rpc-port", "containerPort": 7078, "protocol": "TCP"}],
        "env": [{"name": "SPARK_APPLICATION_ID", "value": application(job)}],
        "resources": {"requests": {"cpu": "1", "memory": "1408Mi"}, "limits": {"memory": "1408Mi"}},
        "volumeMounts": [{"name": "spark-local-dir-1", "mountPath": "/var/data/spark"}],
    });
    PodBuilder::new(&driver_name(job), job, "driver", container)
}

/// The executor pod number `id` of a job: `<job>-exec-<id>`, owned by the pod of [`driver`].
///
/// The owner's uid is made up. Where the garbage collector runs, say the real one by
/// [`PodBuilder::owned_by`].
pub fn executor(job: &str, id: u32) -> PodBuilder {
    let container = json!({
        "name": "spark-kubernetes-executor",
        "image": "apache/spark:3.5.9",
        "args": ["executor"],
        "ports": [{"name": "blockmanager", "containerPort": 7079, "protocol": "TCP"}],
        "env": [
            {"name": "SPARK_APPLICATION_ID", "value": application(job)},
            {"name": "SPARK_EXECUTOR_ID", "value": id.to_string()},
            {"name": "SPARK_EXECUTOR_POD_NAME", "valueFrom": {
                "fieldRef": {"apiVersion": "v1", "fieldPath": "metadata.name"},
            }},
        ],
        "resources": {"requests": {"cpu": "1", "memory": "640Mi"}, "limits": {"memory": "640Mi"}},
        "volumeMounts": [{"name": "spark-local-dir-1", "mountPath": "/var/data/spark"}],
    });
    PodBuilder::new(&format!("{job}-exec-{id}"), job, "executor", container)
        .label("spark-exec-id", &id.to_string())
        .label("spark-exec-resourceprofile-id", "0")
        .owned_by(&driver_name(job), "00000000-0000-4000-8000-000000000000")
}

/// A pod without Spark's labels, such as a notebook or an Airflow worker, in which a driver runs.
pub fn plain(name: &str) -> PodBuilder {
    let container = json!({"name": "main", "image": "jupyter/pyspark-notebook:spark-3.5.3"});
    PodBuilder(json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": {"app": name}},
        "spec": {"containers": [container], "restartPolicy": "Never"},
    }))
}

/// The pod of a Spark Connect server: it has a role, and no job of its own.
pub fn connect_server(name: &str) -> PodBuilder {
    plain(name).label("spark-role", "connect-server").label("spark-version", "4.0.0")
}

fn driver_name(job: &str) -> String {
    format!("{job}-driver")
}

/// Spark's own id of an application, the same for each call.
fn application(job: &str) -> String {
    let mut hasher = DefaultHasher::new();
    job.hash(&mut hasher);
    format!("spark-{:032x}", hasher.finish())
}

/// Builds a pod.
#[derive(Debug, Clone)]
pub struct PodBuilder(Value);

impl PodBuilder {
    fn new(name: &str, job: &str, role: &str, container: Value) -> Self {
        Self(json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": name,
                "labels": {
                    JOB_ID_LABEL: job,
                    "spark-app-name": job,
                    "spark-app-selector": application(job),
                    "spark-role": role,
                    "spark-version": "3.5.9",
                },
            },
            "spec": {
                "containers": [container],
                "restartPolicy": "Never",
                "terminationGracePeriodSeconds": 30,
                "volumes": [{"name": "spark-local-dir-1", "emptyDir": {}}],
                "tolerations": [
                    {"key": "dedicated", "operator": "Equal", "value": "spark", "effect": "NoSchedule"},
                ],
            },
        }))
    }

    /// With this label.
    pub fn label(self, key: &str, value: &str) -> Self {
        self.with(|pod| pod["metadata"]["labels"][key] = value.into())
    }

    /// Without this label.
    pub fn without_label(self, key: &str) -> Self {
        self.with(|pod| {
            if let Some(labels) = pod["metadata"]["labels"].as_object_mut() {
                labels.remove(key);
            }
        })
    }

    /// With this annotation.
    pub fn annotation(self, key: &str, value: &str) -> Self {
        self.with(|pod| pod["metadata"]["annotations"][key] = value.into())
    }

    /// With this key in its nodeSelector.
    pub fn node_selector(self, key: &str, value: &str) -> Self {
        self.with(|pod| pod["spec"]["nodeSelector"][key] = value.into())
    }

    /// With a required node affinity: the node's label `key` is one of `values`.
    pub fn required_affinity(self, key: &str, values: &[&str]) -> Self {
        let expression = json!({"key": key, "operator": "In", "values": values});
        self.node_terms(&json!([{"matchExpressions": [expression]}]))
    }

    /// With a required node affinity of these terms.
    pub fn node_terms(self, terms: &Value) -> Self {
        let terms = json!({"nodeSelectorTerms": terms});
        self.with(|pod| {
            pod["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"] = terms;
        })
    }

    /// Under another name.
    pub fn named(self, name: &str) -> Self {
        self.with(|pod| pod["metadata"]["name"] = name.into())
    }

    /// Without a name: the apiserver makes one, after admission, from this prefix.
    pub fn generate_name(self, prefix: &str) -> Self {
        self.with(|pod| {
            pod["metadata"]["generateName"] = prefix.into();
            if let Some(metadata) = pod["metadata"].as_object_mut() {
                metadata.remove("name");
            }
        })
    }

    /// On the nodes of [`nodes::of_pool`] and [`nodes::of_platform`] alone.
    pub fn on_pool(self, pool: &str) -> Self {
        self.node_selector(nodes::POOL, pool).tolerating(nodes::POOL, pool)
    }

    /// With a toleration of this `NoSchedule` taint.
    pub fn tolerating(self, key: &str, value: &str) -> Self {
        let toleration = json!({"key": key, "operator": "Equal", "value": value, "effect": "NoSchedule"});
        self.with(|pod| match pod["spec"]["tolerations"].as_array_mut() {
            Some(tolerations) => tolerations.push(toleration),
            None => pod["spec"]["tolerations"] = json!([toleration]),
        })
    }

    /// Bound to this node, without a scheduler.
    pub fn on_node(self, node: &str) -> Self {
        self.with(|pod| pod["spec"]["nodeName"] = node.into())
    }

    /// With this environment instead of its own: Kubernetes' list of variables.
    pub fn environment(self, variables: &Value) -> Self {
        self.with(|pod| pod["spec"]["containers"][0]["env"] = variables.clone())
    }

    /// With `metadata.namespace`, which Spark leaves out.
    pub fn namespace(self, namespace: &str) -> Self {
        self.with(|pod| pod["metadata"]["namespace"] = namespace.into())
    }

    /// Owned by this pod.
    pub fn owned_by(self, driver: &str, uid: &str) -> Self {
        let owner = json!({
            "apiVersion": "v1", "kind": "Pod", "name": driver, "uid": uid, "controller": true,
        });
        self.with(|pod| pod["metadata"]["ownerReferences"] = json!([owner]))
    }

    /// Refused by the apiserver's validation, which comes after admission.
    pub fn invalid(self) -> Self {
        self.with(|pod| pod["spec"]["restartPolicy"] = "Sometimes".into())
    }

    /// Changed in any other way.
    pub fn with(mut self, change: impl FnOnce(&mut Value)) -> Self {
        change(&mut self.0);
        self
    }

    /// The pod as JSON.
    pub fn value(&self) -> &Value {
        &self.0
    }

    /// Posts the pod to the apiserver, as it is.
    pub async fn post(&self, client: &Client, namespace: &str) -> Result<Posted> {
        self.send(client, namespace, "").await
    }

    /// Posts the pod with `dryRun=All`: admission happens, nothing is stored.
    pub async fn dry_run(&self, client: &Client, namespace: &str) -> Result<Posted> {
        self.send(client, namespace, "?dryRun=All").await
    }

    async fn send(&self, client: &Client, namespace: &str, query: &str) -> Result<Posted> {
        let path = format!("/api/v1/namespaces/{namespace}/pods{query}");
        let answer = endpoint::post(client, &path, &self.0).await?;
        Ok(Posted { status: answer.status, object: answer.json()?, warnings: warnings(&answer.headers)? })
    }
}

/// The apiserver's answer to a posted pod.
#[derive(Debug)]
pub struct Posted {
    /// The HTTP status: 201 for a pod made.
    pub status: u16,
    /// The pod as it was stored, or the `Status` with the reason why it was not.
    pub object: Value,
    /// What `kubectl` would print as `Warning: ...`.
    pub warnings: Vec<String>,
}

impl Posted {
    /// The pod; an error where none was made.
    pub fn pod(&self) -> Result<Pod> {
        anyhow::ensure!(self.status == 201, "status {}: {}", self.status, self.object);
        Ok(serde_json::from_value(self.object.clone())?)
    }
}

/// The texts of `Warning: 299 - "text"` headers.
fn warnings(headers: &HeaderMap) -> Result<Vec<String>> {
    let text = |header: &http::HeaderValue| {
        let (_, quoted) = std::str::from_utf8(header.as_bytes())?.split_once(" - ").context("no warning")?;
        Ok(serde_json::from_str(quoted)?)
    };
    headers.get_all("warning").iter().map(text).collect()
}

/// Puts a pod into a phase, as its kubelet would.
pub async fn set_phase(api: &Api<Pod>, name: &str, phase: &str) -> Result<(), Error> {
    let status = json!({"status": {"phase": phase}});
    let patch = Patch::Merge(&status);
    api.patch_status(name, &PatchParams::default(), &patch).await?;
    Ok(())
}

/// Writes an annotation on a pod, or removes it, as `kubectl annotate --overwrite` does.
pub async fn annotate(api: &Api<Pod>, name: &str, key: &str, value: Option<&str>) -> Result<(), Error> {
    let annotation = json!({"metadata": {"annotations": {key: value}}});
    api.patch(name, &PatchParams::default(), &Patch::Merge(&annotation)).await?;
    Ok(())
}

/// Deletes a pod at once, as `kubectl delete --force` does.
pub async fn remove(api: &Api<Pod>, name: &str) -> Result<(), Error> {
    api.delete(name, &DeleteParams::default().grace_period(0)).await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warnings_are_read_from_their_headers() -> Result<()> {
        let mut headers = HeaderMap::new();
        headers.append("warning", r#"299 - "ratio \"1.5\" is - no ratio""#.parse()?);
        headers.append("warning", r#"299 - "another""#.parse()?);
        assert_eq!(warnings(&headers)?, [r#"ratio "1.5" is - no ratio"#, "another"]);
        Ok(())
    }
}
