//! An executor that is created by a dry run, to find out whether the apiserver sends executors to the webhook.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use balancer_core::{Capacity, Conventions, JobPod, Pod};
use http::Request;
use kube::Client;
use serde_json::{Map, Value, json};
use tokio::time::timeout;

/// How long the Kubernetes API may take for it: longer than it works on one creation (34 s), so that its own error is
/// reported.
pub const LIMIT: Duration = Duration::from_secs(40);

/// The label that every Spark job has.
const SPARK_JOB_ID: &str = "spark-app-selector";

/// An executor that the webhook always changes.
///
/// Its own annotation states the ratio 0. So the webhook sends it to on-demand, whatever the default ratio is. Nothing is
/// stored, neither in the cluster nor in a ledger, if it is created by a dry run.
#[derive(Debug)]
pub struct AdmissionProbe<'c>(pub &'c Conventions);

/// What has become of the executor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Admitted {
    /// The webhook placed it. The text says what shows it.
    Placed(String),
    /// It came back unchanged.
    Unchanged,
    /// Another webhook makes it require this capacity, so that what its ratio asks for has no effect.
    Overridden(Capacity),
}

/// Why it is not known whether the webhook is asked.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// The API did not answer.
    #[error("the Kubernetes API did not answer within {LIMIT:?}")]
    TimedOut,
    /// The API refuses the executor, or cannot be asked.
    #[error(transparent)]
    Failed(#[from] kube::Error),
}

impl AdmissionProbe<'_> {
    /// Creates the executor in the namespace by a dry run.
    ///
    /// # Errors
    /// If the API does not create it within [`LIMIT`].
    pub async fn run(&self, client: &Client, namespace: &str) -> Result<Admitted, ProbeError> {
        let request = Request::post(format!("/api/v1/namespaces/{namespace}/pods?dryRun=All"))
            .header("content-type", "application/json")
            .body(self.executor().to_string().into_bytes())
            .map_err(kube::Error::HttpError)?;
        let created = timeout(LIMIT, client.request::<Value>(request)).await.map_err(|_| ProbeError::TimedOut)??;
        Ok(match (self.overridden(&created), self.decision(&created)) {
            (Some(capacity), _) => Admitted::Overridden(capacity),
            (None, Some(decision)) => Admitted::Placed(decision),
            (None, None) => Admitted::Unchanged,
        })
    }

    /// A pod that restricted pod security accepts, of a job that no other probe has, so that no ledger has its policy. The
    /// image is never pulled.
    fn executor(&self) -> Value {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        self.executor_of(&format!("spot-balancer-test-{:x}", now.as_nanos()))
    }

    fn executor_of(&self, job: &str) -> Value {
        let Self(conventions) = self;
        let job_id_labels = &conventions.job_id_label;
        let spark = job_id_labels.iter().find(|label| *label == SPARK_JOB_ID);
        let job_id_label = spark.or(job_id_labels.first()).map_or(SPARK_JOB_ID, String::as_str);
        let labels: Map<String, Value> = [
            (conventions.workload_role_label.as_str(), conventions.executor_role_value.as_str()),
            (job_id_label, job),
            ("spark-exec-id", "1"),
        ]
        .into_iter()
        .map(|(label, value)| (label.to_owned(), value.into()))
        .collect();
        let ratio = &conventions.spot_ratio_annotation;
        let resources = json!({"cpu": "100m", "memory": "128Mi"});
        json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": format!("{job}-exec-1"), "labels": labels, "annotations": {ratio: "0"}},
            "spec": {
                "restartPolicy": "Never",
                "automountServiceAccountToken": false,
                "securityContext": {
                    "runAsNonRoot": true,
                    "runAsUser": 65_532,
                    "seccompProfile": {"type": "RuntimeDefault"},
                },
                "containers": [{
                    "name": "spark-kubernetes-executor",
                    "image": "registry.k8s.io/pause:3.10",
                    // Both, because a quota may require them.
                    "resources": {"requests": resources, "limits": resources},
                    "securityContext": {
                        "allowPrivilegeEscalation": false,
                        "readOnlyRootFilesystem": true,
                        "capabilities": {"drop": ["ALL"]},
                    },
                }],
            },
        })
    }

    /// The capacity that the created executor requires, if that is not what the ratio 0 asks for.
    fn overridden(&self, created: &Value) -> Option<Capacity> {
        let created = created.to_string();
        let pod: Pod<'_> = serde_json::from_str(&created).ok()?;
        let JobPod::Executor(executor) = JobPod::of(&pod, self.0)? else { return None };
        executor.fixed.or(executor.asked.filter(|asked| *asked == Capacity::Spot))
    }

    /// What shows in the created executor that the webhook changed it.
    fn decision(&self, created: &Value) -> Option<String> {
        let Self(conventions) = self;
        match &conventions.decision_annotation {
            Some(annotation) => {
                let decision = created.get("metadata")?.get("annotations")?.get(annotation)?.as_str()?;
                Some(format!("an executor got the annotation {annotation}={decision}"))
            }
            // The executor was sent without a nodeSelector and without an affinity.
            None => {
                let label = &conventions.capacity_labels.label;
                let spec = created.get("spec")?;
                let selects = spec.get("nodeSelector").is_some_and(|selector| selector.get(label).is_some());
                let requires = spec.get("affinity").is_some_and(|affinity| affinity.to_string().contains(label));
                (selects || requires).then(|| {
                    format!(
                        "an executor must run where the node label {label} allows it (DECISION_ANNOTATION is empty)"
                    )
                })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_capacity_that_another_webhook_demands_is_told() {
        let conventions = Conventions::default();
        let probe = AdmissionProbe(&conventions);
        let overridden = |annotation: Option<&str>, selector: Option<&str>| {
            let mut pod = probe.executor();
            (pod["metadata"]["namespace"], pod["metadata"]["uid"]) = ("etl".into(), "u".into());
            if let Some(capacity) = annotation {
                pod["metadata"]["annotations"]["workload/capacity-type"] = capacity.into();
            }
            if let Some(capacity) = selector {
                pod["spec"]["nodeSelector"] = json!({"karpenter.sh/capacity-type": capacity});
            }
            probe.overridden(&pod)
        };
        assert_eq!(overridden(None, None), None);
        assert_eq!(overridden(Some("on-demand"), None), None);
        assert_eq!(overridden(Some("on-demand"), Some("on-demand")), None);
        assert_eq!(overridden(Some("spot"), None), Some(Capacity::Spot));
        assert_eq!(overridden(Some("on-demand"), Some("spot")), Some(Capacity::Spot));
        assert_eq!(overridden(None, Some("on-demand")), Some(Capacity::OnDemand), "it lost its annotation");
    }

    #[test]
    fn the_job_id_has_the_first_label_if_spark_has_none_of_them() {
        let job_id_label = vec!["example.com/job".into(), "example.com/run".into()];
        let conventions = Conventions { job_id_label, ..Conventions::default() };
        let pod = AdmissionProbe(&conventions).executor_of("test-1");
        let label = |name| pod.pointer("/metadata/labels")?.get(name)?.as_str();
        assert_eq!(label("example.com/job"), Some("test-1"));
        assert_eq!(label("spark-app-selector"), None);
    }
}
