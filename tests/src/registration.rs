//! Puts a webhook into the apiserver's admission chain, for the Spark pods of one namespace.

use std::time::Duration;

use anyhow::Result;
use k8s_openapi::ByteString;
use k8s_openapi::api::admissionregistration::v1::{MutatingWebhookConfiguration, ValidatingWebhookConfiguration};
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, DeleteParams, Patch, PatchParams};
use kube::{Client, ResourceExt};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

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
    /// How long the apiserver waits for the answer to a creation.
    pub timeout_seconds: u8,
    /// How long it waits for the answer to a deletion.
    pub deletion_timeout_seconds: u8,
    /// The token in the path, if the webhook was started with one.
    pub token: Option<String>,
    /// Whether deletions are sent too.
    pub deletions: bool,
    /// Whether the webhook is called again after a later one has changed the pod.
    pub again: bool,
}

impl Registration {
    /// With the failure policy and the timeout that a cluster has: `Ignore` and 10 seconds.
    pub fn new(namespace: &str, port: u16) -> Self {
        Self {
            namespace: namespace.to_owned(),
            port,
            failure_policy: "Ignore",
            timeout_seconds: 10,
            deletion_timeout_seconds: 10,
            token: None,
            deletions: true,
            again: false,
        }
    }

    /// Makes the configurations, or changes those that are there to another token, and waits until the apiserver
    /// follows them.
    ///
    /// It checks this by dry runs with an executor that belongs to no job. So the webhook's count of
    /// requests does not begin at 0: compare with what it is afterwards.
    pub async fn apply(&self, plane: &ControlPlane) -> Result<()> {
        let client = plane.client()?;
        let pods = Api::<Pod>::namespaced(client.clone(), &self.namespace);
        // Created before the configurations, so that the webhook gets no review of its creation at first.
        let probe = executor("probe", 0)
            .without_label(JOB_ID_LABEL)
            .without_label("spark-app-selector")
            .with(|pod| pod["spec"]["schedulerName"] = "none".into())
            // An owner that does not exist would have it collected as garbage.
            .with(|pod| pod["metadata"]["ownerReferences"] = json!([]));
        let name = probe.post(&client, &self.namespace).await?.pod()?.name_any();

        let params = PatchParams::apply("tests").force();
        let configurations = Api::<MutatingWebhookConfiguration>::all(client.clone());
        let mutating = self.configuration("place", "/mutate", "CREATE")?;
        configurations.patch(&self.configuration_name("place"), &params, &Patch::Apply(&mutating)).await?;
        until_true(TAKES_EFFECT, "the mutating webhook to be called", async || {
            probe.dry_run(&client, &self.namespace).await?;
            self.called(&client, "place").await
        })
        .await?;
        if self.deletions {
            let configurations = Api::<ValidatingWebhookConfiguration>::all(client.clone());
            let validating = self.configuration("release", "/validate", "DELETE")?;
            configurations.patch(&self.configuration_name("release"), &params, &Patch::Apply(&validating)).await?;
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

    fn configuration(&self, what: &str, path: &str, operation: &str) -> Result<Value> {
        let (kind, timeout_seconds) = match operation {
            "CREATE" => ("MutatingWebhookConfiguration", self.timeout_seconds),
            _ => ("ValidatingWebhookConfiguration", self.deletion_timeout_seconds),
        };
        let mut configuration = json!({
            "apiVersion": "admissionregistration.k8s.io/v1",
            "kind": kind,
            "metadata": {"name": self.configuration_name(what)},
            "webhooks": [{
                "name": self.webhook(what),
                "admissionReviewVersions": ["v1"],
                "clientConfig": {
                    "url": self.url(path),
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
                    {"key": "spark-role", "operator": "In", "values": ["driver", "connect-server", "executor"]},
                ]},
                "sideEffects": "NoneOnDryRun",
                "failurePolicy": self.failure_policy,
                "timeoutSeconds": timeout_seconds,
            }],
        });
        // Validating webhooks have no such field: they always see the last version.
        if self.again && operation == "CREATE" {
            configuration["webhooks"][0]["reinvocationPolicy"] = "IfNeeded".into();
        }
        Ok(configuration)
    }

    /// Where the apiserver calls the webhook.
    fn url(&self, path: &str) -> String {
        let token = self.token.as_ref().map(|token| format!("/{token}")).unwrap_or_default();
        format!("{}{path}{token}", https(self.port))
    }

    /// Writes this token to the configurations, and waits for nothing.
    pub async fn switch(&mut self, plane: &ControlPlane, token: &str) -> Result<()> {
        async fn switch<T>(client: &Client, name: &str, url: &str) -> Result<()>
        where
            T: kube::Resource<DynamicType = ()> + Clone + DeserializeOwned + std::fmt::Debug,
        {
            let patch = json!([{"op": "replace", "path": "/webhooks/0/clientConfig/url", "value": url}]);
            let patch = Patch::Json::<()>(serde_json::from_value(patch)?);
            Api::<T>::all(client.clone()).patch(name, &PatchParams::default(), &patch).await?;
            Ok(())
        }
        self.token = Some(token.to_owned());
        let client = plane.client()?;
        switch::<MutatingWebhookConfiguration>(&client, &self.configuration_name("place"), &self.url("/mutate"))
            .await?;
        if self.deletions {
            switch::<ValidatingWebhookConfiguration>(
                &client,
                &self.configuration_name("release"),
                &self.url("/validate"),
            )
            .await?;
        }
        Ok(())
    }

    /// Whether the apiserver has counted a call of this webhook.
    async fn called(&self, client: &Client, what: &str) -> Result<bool> {
        let count = "apiserver_admission_webhook_admission_duration_seconds_count";
        let metrics = Metrics::of(client).await?;
        Ok(metrics.sum(count, &[("name", &self.webhook(what))]).is_some())
    }

    fn configuration_name(&self, what: &str) -> String {
        format!("{what}.{}.spot-balancer.test", self.namespace)
    }

    /// The name of a webhook. It has the token's start, so that the apiserver counts the calls with each token apart.
    fn webhook(&self, what: &str) -> String {
        match self.token.as_ref().and_then(|token| token.get(..8)) {
            Some(token) => format!("{what}.{token}.{}.spot-balancer.test", self.namespace),
            None => self.configuration_name(what),
        }
    }
}
