//! Stand-ins for what other projects define: kinds that the apiserver takes, without what acts on them.

use std::time::Duration;

use anyhow::{Result, ensure};
use kube::Client;
use serde_json::{Value, json};

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

/// The fields of a kind's spec that we use, as its project documents them; a text is a type, or `labels`
/// for any fields that are texts.
fn fields(kind: &str) -> Value {
    let expressions = json!([{"key": "string", "operator": "string", "values": ["string"]}]);
    let selector = json!({"matchLabels": "labels", "matchExpressions": expressions});
    let scrape = json!([{
        "port": "string",
        "interval": "string",
        "relabelings": [{
            "sourceLabels": ["string"], "targetLabel": "string", "replacement": "string", "regex": "string",
            "action": "string",
        }],
    }]);
    match kind {
        "Issuer" => json!({"selfSigned": {}, "ca": {"secretName": "string"}}),
        "Certificate" => json!({
            "isCA": "boolean",
            "commonName": "string",
            "secretName": "string",
            "dnsNames": ["string"],
            "usages": ["string"],
            "duration": "string",
            "renewBefore": "string",
            "privateKey": {"algorithm": "string", "size": "integer", "rotationPolicy": "string"},
            "issuerRef": {"name": "string", "kind": "string", "group": "string"},
        }),
        "ServiceMonitor" => json!({"selector": selector, "endpoints": scrape}),
        "PodMonitor" => json!({"selector": selector, "podMetricsEndpoints": scrape}),
        "PrometheusRule" => json!({"groups": [{
            "name": "string",
            "rules": [{
                "alert": "string", "expr": "string", "for": "string", "labels": "labels", "annotations": "labels",
            }],
        }]}),
        _ => json!({
            "limits": "labels",
            "weight": "integer",
            "template": {
                "metadata": {"labels": "labels"},
                "spec": {
                    "nodeClassRef": {"group": "string", "kind": "string", "name": "string"},
                    "taints": [{"key": "string", "value": "string", "effect": "string"}],
                    "requirements": [{
                        "key": "string", "operator": "string", "values": ["string"], "minValues": "integer",
                    }],
                    "expireAfter": "string",
                    "terminationGracePeriod": "string",
                },
            },
            "disruption": {
                "consolidationPolicy": "string",
                "consolidateAfter": "string",
                "budgets": [{"nodes": "string", "reasons": ["string"]}],
            },
        }),
    }
}

/// The schema of such fields: others are refused by who checks, and dropped by the apiserver.
fn schema(fields: &Value) -> Value {
    match fields {
        Value::Object(fields) => {
            let properties: Value = fields.iter().map(|(name, fields)| (name.clone(), schema(fields))).collect();
            json!({"type": "object", "properties": properties})
        }
        Value::Array(items) => json!({"type": "array", "items": schema(&items[0])}),
        Value::String(kind) if kind == "labels" => {
            json!({"type": "object", "additionalProperties": {"type": "string"}})
        }
        kind => json!({"type": kind}),
    }
}

/// Defines the kinds of cert-manager, the Prometheus operator and Karpenter that we have objects of, and
/// waits until they are served. They have the fields that we use and no others, so that one that is written
/// wrongly is found.
pub async fn define(client: &Client) -> Result<()> {
    for (group, version, kind, plural, scope) in KINDS {
        let schema = schema(&json!({"spec": fields(kind)}));
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
        ensure!(answer.status == 201, "{kind}: {}", answer.text);
    }
    for (group, version, kind, plural, _) in KINDS {
        until_true(Duration::from_secs(30), &format!("{kind} to be served"), async || {
            Ok(endpoint::get(client, &format!("/apis/{group}/{version}/{plural}")).await?.status == 200)
        })
        .await?;
    }
    // Whoever checks goes by what the apiserver publishes of them, which comes later.
    until_true(Duration::from_secs(30), "their fields to be published", async || {
        Ok(endpoint::get(client, "/openapi/v2").await?.text.contains("terminationGracePeriod\":{\"type\":\"string\"}"))
    })
    .await
}
