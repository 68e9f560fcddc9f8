//! Puts a webhook into the apiserver's admission chain, for the Spark pods of one namespace.

use std::time::Duration;

use anyhow::Result;
use k8s_openapi::ByteString;
use k8s_openapi::api::admissionregistration::v1::{MutatingWebhookConfiguration, ValidatingWebhookConfiguration};
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, DeleteParams, Patch, PatchParams, PostParams};
use kube::{Client, ResourceExt};
use serde::de::DeserializeOwned;
use serde_json::json;

use crate::certificate::authority;
use crate::control_plane::ControlPlane;
use crate::endpoint::https;
use crate::metrics::Metrics;
use crate::pods::{JOB_ID_LABEL, executor};
use crate::wait::until_true;

const TAKES_EFFECT: Duration = Duration::from_secs(20);

/// The two webhook configurations for one namespace.
#[derive(Debug, Clone)]
pub struct Registration {
    /// Whose pods are sent to the webhook.
    pub namespace: String,
    /// Where the webhook, or a [`Balance`](crate::balance::Balance) before it, serves HTTPS.
    pub port: u16,
    /// `Ignore` or `Fail`.
    pub failure_policy: &'static str,
    /// How long the apiserver waits for an answer.
    pub timeout_seconds: u8,
    /// Whether deletions are sent too.
    pub deletions: bool,
}

impl Registration {
    /// With the failure policy and the timeout that a cluster has: `Ignore` and 10 seconds.
    pub fn new(namespace: &str, port: u16) -> Self {
        Self { namespace: namespace.to_owned(), port, failure_policy: "Ignore", timeout_seconds: 10, deletions: true }
    }

    /// Makes the configurations and waits until the apiserver follows them.
    ///
    /// It checks this by dry runs with an executor that belongs to no job. So the webhook's count of
    /// requests does not begin at 0: compare with what it is afterwards.
    pub async fn apply(&self, plane: &ControlPlane) -> Result<()> {
        let client = plane.client()?;
        let pods = Api::<Pod>::namespaced(client.clone(), &self.namespace);
        // Created before the configurations, so that the webhook gets no review of its creation.
        let probe = executor("probe", 0)
            .without_label(JOB_ID_LABEL)
            .without_label("spark-app-selector")
            .with(|pod| pod["spec"]["schedulerName"] = "none".into());
        let name = probe.post(&client, &self.namespace).await?.pod()?.name_any();

        let params = PostParams::default();
        let mutating: MutatingWebhookConfiguration = self.configuration("place", "/mutate", "CREATE")?;
        Api::all(client.clone()).create(&params, &mutating).await?;
        until_true(TAKES_EFFECT, "the mutating webhook to be called", async || {
            probe.dry_run(&client, &self.namespace).await?;
            self.called(&client, "place").await
        })
        .await?;
        if self.deletions {
            let validating: ValidatingWebhookConfiguration = self.configuration("release", "/validate", "DELETE")?;
            Api::all(client.clone()).create(&params, &validating).await?;
            until_true(TAKES_EFFECT, "the validating webhook to be called", async || {
                // Refused where the webhook fails and has to succeed; it was called all the same.
                let _ = pods.delete(&name, &DeleteParams::default().dry_run()).await;
                self.called(&client, "release").await
            })
            .await?;
        }

        // Without its role the deletion of the probe is not sent to the webhook.
        let unlabelled = json!({"metadata": {"labels": {"spark-role": null}}});
        let patch = Patch::Merge(&unlabelled);
        pods.patch(&name, &PatchParams::default(), &patch).await?;
        pods.delete(&name, &DeleteParams::default().grace_period(0)).await?;
        Ok(())
    }

    fn configuration<T: DeserializeOwned>(&self, what: &str, path: &str, operation: &str) -> Result<T> {
        Ok(serde_json::from_value(json!({
            "metadata": {"name": self.webhook(what)},
            "webhooks": [{
                "name": self.webhook(what),
                "admissionReviewVersions": ["v1"],
                "clientConfig": {
                    "url": format!("{}{path}", https(self.port)),
                    "caBundle": ByteString(authority()?.pem.clone().into_bytes()),
                },
                "rules": [{
                    "operations": [operation],
                    "apiGroups": [""],
                    "apiVersions": ["v1"],
                    "resources": ["pods"],
                }],
                "namespaceSelector": {
                    "matchLabels": {"kubernetes.io/metadata.name": self.namespace},
                },
                "objectSelector": {"matchExpressions": [
                    {"key": "spark-role", "operator": "In", "values": ["driver", "executor"]},
                ]},
                "sideEffects": "NoneOnDryRun",
                "failurePolicy": self.failure_policy,
                "timeoutSeconds": self.timeout_seconds,
            }],
        }))?)
    }

    /// Whether the apiserver has counted a call of this webhook.
    async fn called(&self, client: &Client, what: &str) -> Result<bool> {
        let count = "apiserver_admission_webhook_admission_duration_seconds_count";
        let metrics = Metrics::of(client).await?;
        Ok(metrics.sum(count, &[("name", &self.webhook(what))]).is_some())
    }

    /// The name of a webhook and of the configuration that holds it.
    fn webhook(&self, what: &str) -> String {
        format!("{what}.{}.spot-balancer.test", self.namespace)
    }
}
