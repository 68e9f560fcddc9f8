//! Real Spark in client mode: a pod that runs `spark-submit`, as a notebook does, and owns its executors.

use anyhow::Result;
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::core::v1::{ConfigMap, Pod, ServiceAccount};
use k8s_openapi::api::rbac::v1::{Role, RoleBinding};
use kube::api::{Api, PostParams};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::certificate::APISERVER;
use crate::helm::repository;
use crate::scenario::Scenario;

/// Starts a driver in a pod with these labels and annotations. Its name, and that of all that belongs to it, is `id`,
/// the application's id.
pub async fn start(
    scenario: &Scenario,
    (id, application): (&str, &str),
    settings: &[String],
    (labels, annotations): (&Value, &Value),
) -> Result<()> {
    make::<ServiceAccount>(scenario, json!({"metadata": {"name": id}})).await?;
    let verbs = ["create", "get", "list", "watch", "patch", "update", "delete", "deletecollection"];
    let resources = ["pods", "services", "configmaps", "persistentvolumeclaims"];
    let rule = json!({"apiGroups": [""], "resources": resources, "verbs": verbs});
    make::<Role>(scenario, json!({"metadata": {"name": id}, "rules": [rule]})).await?;
    let role = json!({"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": id});
    let subject = json!({"kind": "ServiceAccount", "name": id, "namespace": scenario.namespace});
    make::<RoleBinding>(scenario, json!({"metadata": {"name": id}, "roleRef": role, "subjects": [subject]})).await?;
    let template = std::fs::read_to_string(repository("deploy/executor-template.yaml"))?;
    let files = json!({"application.py": application, "executor.yaml": template});
    make::<ConfigMap>(scenario, json!({"metadata": {"name": id}, "data": files})).await?;
    let of_cluster = [
        format!("spark.app.id={id}"),
        "spark.driver.host=$(ADDRESS)".to_owned(),
        "spark.driver.bindAddress=$(ADDRESS)".to_owned(),
        "spark.driver.memory=512m".to_owned(),
        format!("spark.kubernetes.namespace={}", scenario.namespace),
        "spark.kubernetes.driver.pod.name=$(HOSTNAME)".to_owned(),
        "spark.kubernetes.container.image=docker.io/apache/spark:3.5.6".to_owned(),
        format!("spark.kubernetes.authenticate.serviceAccountName={id}"),
        format!("spark.kubernetes.executor.podNamePrefix={id}"),
        "spark.kubernetes.executor.request.cores=500m".to_owned(),
        "spark.kubernetes.executor.podTemplateFile=/application/executor.yaml".to_owned(),
        "spark.executor.memory=512m".to_owned(),
    ];
    let mut command = vec!["/opt/spark/bin/spark-submit".to_owned()];
    command.push(format!("--master=k8s://https://{APISERVER}"));
    command.push("--deploy-mode=client".to_owned());
    command.extend(of_cluster.iter().chain(settings).map(|setting| format!("--conf={setting}")));
    command.push("/application/application.py".to_owned());
    let driver = json!({
        "metadata": {"name": id, "labels": labels, "annotations": annotations},
        "spec": {
            "restartPolicy": "Never",
            "serviceAccountName": id,
            "containers": [{
                "name": "driver",
                "image": "docker.io/apache/spark:3.5.6",
                "command": command,
                "env": [
                    {"name": "ADDRESS", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
                    {"name": "HOSTNAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
                ],
                "volumeMounts": [{"name": "application", "mountPath": "/application"}],
            }],
            "volumes": [{"name": "application", "configMap": {"name": id}}],
        },
    });
    make::<Pod>(scenario, driver).await
}

/// Makes an object in the namespace of the scenario.
async fn make<K>(scenario: &Scenario, object: Value) -> Result<()>
where
    K: kube::Resource<DynamicType = (), Scope = NamespaceResourceScope>
        + Clone
        + DeserializeOwned
        + Serialize
        + std::fmt::Debug,
{
    let object: K = serde_json::from_value(object)?;
    Api::namespaced(scenario.client.clone(), &scenario.namespace).create(&PostParams::default(), &object).await?;
    Ok(())
}
