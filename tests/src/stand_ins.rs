//! Stand-ins for what other projects define: kinds that the apiserver takes, without what acts on them.

use std::time::Duration;

use anyhow::Result;
use kube::Client;
use serde_json::json;

use crate::endpoint;
use crate::wait::until_true;

/// Group, version, kind, plural, scope.
const KINDS: [(&str, &str, &str, &str, &str); 6] = [
    ("cert-manager.io", "v1", "Issuer", "issuers", "Namespaced"),
    ("cert-manager.io", "v1", "Certificate", "certificates", "Namespaced"),
    ("monitoring.coreos.com", "v1", "ServiceMonitor", "servicemonitors", "Namespaced"),
    ("monitoring.coreos.com", "v1", "PodMonitor", "podmonitors", "Namespaced"),
    ("monitoring.coreos.com", "v1", "PrometheusRule", "prometheusrules", "Namespaced"),
    ("karpenter.sh", "v1", "NodePool", "nodepools", "Cluster"),
];

/// Defines the kinds of cert-manager, the Prometheus operator and Karpenter that we have objects of, and
/// waits until they are served. Their fields are not checked.
pub async fn define(client: &Client) -> Result<()> {
    for (group, version, kind, plural, scope) in KINDS {
        let schema = json!({"type": "object", "x-kubernetes-preserve-unknown-fields": true});
        let definition = json!({
            "apiVersion": "apiextensions.k8s.io/v1",
            "kind": "CustomResourceDefinition",
            "metadata": {"name": format!("{plural}.{group}")},
            "spec": {
                "group": group,
                "scope": scope,
                "names": {"kind": kind, "plural": plural, "singular": kind.to_lowercase()},
                "versions": [
                    {"name": version, "served": true, "storage": true, "schema": {"openAPIV3Schema": schema}},
                ],
            },
        });
        let path = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions";
        let answer = endpoint::post(client, path, &definition).await?;
        anyhow::ensure!(answer.status == 201, "{kind}: {}", answer.text);
    }
    for (group, version, kind, plural, _) in KINDS {
        until_true(Duration::from_secs(30), &format!("{kind} to be served"), async || {
            Ok(endpoint::get(client, &format!("/apis/{group}/{version}/{plural}")).await?.status == 200)
        })
        .await?;
    }
    Ok(())
}
