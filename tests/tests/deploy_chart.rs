//! The chart as Helm renders it, without a cluster.

#![allow(clippy::indexing_slicing, reason = "JSON is read by index; a panic here fails a test, as it should")]

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use balancer_core::{Capacity, CapacityLabels, CapacityProfile, Conventions, LabelValues, Spread};
use balancer_tests::deployed::{RECONCILER, TOKENS, WEBHOOK};
use balancer_tests::helm::{Helm, every_option, object, objects, repository};
use balancer_tests::need;
use balancer_tests::parts::program;
use k8s_openapi::ByteString;
use serde_json::{Value, json};

const PEM: &str = "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n";

/// Values that render different objects.
fn variants() -> Vec<(&'static str, Value)> {
    vec![
        ("the defaults", json!({})),
        ("every option", every_option()),
        ("the memory store", json!({"store": "memory"})),
        ("sentinels", sentinels()),
        ("tokens of IAM", tokens_of_iam()),
        (
            "a cluster with a private CA",
            json!({
                "redis": {"mode": "cluster", "url": "valkeys://a:7000,b:7001/0", "caSecret": {"name": "on", "key": "yes"}},
                "networkPolicy": {"egress": {"enabled": true, "redisPorts": [7000, 7001]}},
            }),
        ),
        ("the webhook reconciles on Redis", json!({"reconciler": {"mode": "webhook"}})),
        ("nothing reconciles", json!({"reconciler": {"mode": "none"}})),
        ("a Secret with the URL", json!({"redis": {"existingSecret": {"name": "redis"}}})),
        ("certificates by Helm", json!({"certificates": {"source": "helm"}})),
        (
            "certificates of one's own",
            json!({"certificates": {
                "source": "secret", "secret": {"name": "own", "caBundle": PEM}, "certificateKey": "chain.pem", "privateKeyKey": "yes",
            }}),
        ),
        (
            "admission tokens of one's own",
            json!({"admissionToken": {"existingSecret": {"name": "on", "key": "yes", "token": "0123456789012345"}}}),
        ),
        ("no admission token", json!({"admissionToken": {"enabled": false}})),
        ("a password of one's own", json!({"redis": {"bundled": {"existingSecret": "on"}}})),
        (
            "another platform, and drivers of one role",
            json!({"settings": {"capacityProfile": "aks", "driverRoleValue": "driver", "defaultSpotRatio": "none"}}),
        ),
        (
            "replicas that never share a node",
            json!({"placement": {"antiAffinity": "required", "onDemand": "any"}, "reconciler": {"placement": {"antiAffinity": "none"}}}),
        ),
        ("namespaces by label", json!({"namespaces": {"selector": {"matchLabels": {"spark": "true"}}}})),
        ("a PodMonitor", json!({"monitoring": {"podMonitor": {"enabled": true}}})),
        (
            "names that YAML would take for something else",
            json!({
                "fullnameOverride": "off", "nameOverride": "on", "namespaces": {"names": ["2024", "null"]},
                "settings": {"workloadRoleLabel": "y", "logFormat": "text"}, "commonLabels": {"on": "off"},
            }),
        ),
        (
            "labels in the place of ours",
            json!({"commonLabels": {
                "app.kubernetes.io/part-of": "platform", "app.kubernetes.io/component": "mine",
            }}),
        ),
        ("the network of nodes", json!({"webhook": {"hostNetwork": true}, "networkPolicy": {"enabled": false}})),
        (
            "one label from two sides",
            json!({
                "commonLabels": {"release": "prometheus"},
                "monitoring": {
                    "serviceMonitor": {"enabled": true, "labels": {"release": "prometheus"}},
                    "prometheusRule": {"enabled": true, "labels": {"release": "other"}},
                    "dashboard": {"enabled": true, "labels": {"release": "prometheus"}},
                },
            }),
        ),
        (
            "times in seconds",
            json!({"certificates": {"certManager": {"duration": "7776000s", "renewBefore": "0720h"}}}),
        ),
        (
            "a part of another chart",
            json!({"enabled": true, "global": {"a": "b"}, "namespaces": {"names": null, "all": true}}),
        ),
        ("other names", json!({"nameOverride": "mix", "fullnameOverride": "spark-mix"})),
    ]
}

/// Servers that sentinels watch, with all that can be set for them.
fn sentinels() -> Value {
    json!({"redis": {
        "mode": "sentinel",
        "url": "redis://balancer@a,b:5000,[fd00::1]:26379/2",
        "passwordSecret": {"name": "servers", "key": "redis-password"},
        "sentinel": {
            "master": "mymaster", "username": "watcher", "passwordSecret": {"name": "sentinels", "key": "sentinel-password"},
        },
    }})
}

fn tokens_of_iam() -> Value {
    json!({
        "redis": {
            "mode": "cluster", "url": "rediss://balancer@a:6379",
            "awsIam": {"service": "elasticache-serverless", "cacheName": "ledger", "region": "eu-west-1"},
        },
        "networkPolicy": {"egress": {"enabled": true}},
    })
}

/// The container of a Deployment that has one.
fn container(deployment: &Value) -> Result<&Value> {
    let containers = deployment["spec"]["template"]["spec"]["containers"].as_array().context("no containers")?;
    ensure!(containers.len() == 1, "{} containers", containers.len());
    Ok(&containers[0])
}

fn environment(deployment: &Value) -> Result<BTreeMap<String, Value>> {
    let variables = container(deployment)?["env"].as_array().context("no env")?;
    let pairs = variables.iter().map(|variable| {
        let value = if variable["value"].is_null() { &variable["valueFrom"] } else { &variable["value"] };
        (variable["name"].as_str().unwrap_or_default().to_owned(), value.clone())
    });
    let environment: BTreeMap<_, _> = pairs.collect();
    ensure!(environment.len() == variables.len(), "a variable is set twice: {variables:?}");
    Ok(environment)
}

#[tokio::test]
async fn the_chart_lints_and_renders_with_the_defaults_and_with_every_option() -> Result<()> {
    need!(Helm);
    let mut helm = Helm::start().await?;
    for (what, values) in variants() {
        assert_eq!(helm.lint(&values).await?, [] as [Value; 0], "{what}");
        let objects = helm.render(&values).await.context(what)?;
        let mut names = BTreeSet::new();
        for object in &objects {
            let metadata = &object["metadata"];
            let name = format!("{} {} {}", object["kind"], metadata["namespace"], metadata["name"]);
            for label in ["name", "instance", "component", "part-of", "version", "managed-by"] {
                let key = format!("app.kubernetes.io/{label}");
                assert!(metadata["labels"][&key].is_string(), "{what}: {name} has no label {key}");
            }
            assert_eq!(metadata["labels"]["helm.sh/chart"], "spot-balancer-0.1.0", "{what}: {name}");
            assert!(names.insert(name.clone()), "{what}: twice {name}");
            let labels = metadata["labels"].as_object().context("no labels")?;
            assert!(labels.values().all(Value::is_string) && metadata["name"].is_string(), "{what}: {metadata}");
            if object["kind"] == "Deployment" {
                for variable in container(object)?["env"].as_array().into_iter().flatten() {
                    let value = &variable["value"];
                    assert!(value.is_string() || value.is_null(), "{what}: {name}: {variable}");
                }
            }
        }
    }
    Ok(())
}

#[tokio::test]
async fn invalid_values_are_refused_with_a_reason() -> Result<()> {
    need!(Helm);
    let mut helm = Helm::start().await?;
    let refused = [
        (json!({"fullnameOverride": "123"}), "does not match pattern"),
        (json!({"nameOverride": "a b"}), "does not match pattern"),
        (json!({"setings": {}}), "additional properties 'setings' not allowed"),
        (json!({"settings": {"webhookTimeoutSeconds": 30}}), "maximum: got 30, want 29"),
        (json!({"settings": {"webhookTimeoutSeconds": 0}}), "minimum: got 0, want 1"),
        (
            json!({"settings": {"webhookTimeoutSeconds": 10}}),
            "The apiserver must wait longer than the webhook's budget",
        ),
        // As with the values of an older chart.
        (
            json!({"clientCertificates": null, "helmTest": null}),
            "a default: clientCertificates, helmTest. They are newer",
        ),
        (json!({"settings": {"capacityProfile": null}}), "a default: settings.capacityProfile. They are newer"),
        (
            json!({"settings": {"maxNewJobsPerMinute": null}, "admission": {"deletionTimeoutSeconds": null}}),
            "settings.maxNewJobsPerMinute, admission.deletionTimeoutSeconds. They are newer",
        ),
        (json!({"settings": {"webhookTimeoutSeconds": 5}}), "Set admission.timeoutSeconds to 6 or more, or lower"),
        (json!({"settings": {"spotPreference": "MAYBE"}}), "value must be one of 'BEST_EFFORT', 'STRICT'"),
        (
            json!({"settings": {"defaultSpotRatio": "1.5"}}),
            "settings.defaultSpotRatio is \"1.5\", which is not a ratio",
        ),
        (json!({"settings": {"defaultSpotRatio": "101%"}}), "which is not a ratio. Accepted: 0 to 1"),
        (json!({"settings": {"defaultSpotRatio": -0.1}}), "which is not a ratio"),
        (json!({"settings": {"maxPoolShare": 0}}), "settings.maxPoolShare is \"0\", which is not a share of a pool"),
        (json!({"settings": {"defaultSpotRatio": "CHEAP"}}), "or RELIABILITY_ONLY"),
        (
            json!({"settings": {"maxPoolShare": 1.5}}),
            "settings.maxPoolShare is \"1.5\", which is not a share of a pool. Accepted: above 0",
        ),
        (json!({"settings": {"maxPoolShare": "0%"}}), "settings.maxPoolShare is \"0%\""),
        (json!({"settings": {"maxPoolShare": "BALANCED"}}), "settings.maxPoolShare is \"BALANCED\""),
        (json!({"settings": {"spotFallbackSeconds": 86401}}), "maximum: got 86,401, want 86,400"),
        (json!({"settings": {"spotRetrySeconds": -1}}), "minimum: got -1, want 0"),
        (json!({"settings": {"maxExecutorsPerNode": 1.5}}), "got number, want integer"),
        (
            json!({"settings": {"spotFallbackSeconds": 60}, "reconciler": {"mode": "none"}}),
            "settings.spotFallbackSeconds is 60 and reconciler.mode is none",
        ),
        (
            json!({"reconciler": {"mode": "none", "allowSpotFallback": true}}),
            "Leave reconciler.mode empty, or set allowSpotFallback to false",
        ),
        (json!({"settings": {"jobIdLabel": []}}), "minItems: got 0, want 1"),
        (json!({"settings": {"jobIdLabel": ["a b"]}}), "does not match pattern"),
        (json!({"settings": {"driverRoleValue": "executor"}}), "both have \"executor\". Set different values"),
        (json!({"settings": {"driverRoleValue": ["driver", "executor"]}}), "both have \"executor\""),
        (json!({"settings": {"driverRoleValue": []}}), "minItems: got 0, want 1"),
        (json!({"settings": {"capacityProfile": "other"}}), "value must be one of 'karpenter', 'eks', 'gke'"),
        (json!({"settings": {"spotValues": ["*", "spot"]}}), "set * alone, or only the others"),
        (
            json!({"settings": {"spotValues": ["a", "b"], "onDemandValues": ["c", "b"]}}),
            "settings.onDemandValues both have \"b\"",
        ),
        // Against the values of the profile, as the programs do.
        (
            json!({"settings": {"spotValues": ["on-demand"]}}),
            "both have \"on-demand\" (unset, they are those of the profile",
        ),
        (
            json!({"settings": {"spotValues": ["*"]}}),
            "Set settings.onDemandValues to [], for the nodes without the label",
        ),
        (json!({"settings": {"capacityProfile": "gke", "onDemandValues": ["true"]}}), "both have \"true\""),
        (
            json!({"settings": {"capacityTypeLabel": "lifecycle", "spotValues": ["Ec2Spot"]}}),
            "settings.spotValues is set without settings.onDemandValues. With another label than that of the profile karpenter",
        ),
        (
            json!({"settings": {"capacityTypeLabel": "lifecycle", "onDemandValues": []}}),
            "settings.onDemandValues is set without settings.spotValues",
        ),
        (json!({"settings": {"capacityProfile": "openshift", "onDemandValues": ["a"]}}), "settings.spotValues is *"),
        (
            json!({"settings": {"spotRatioAnnotation": "a", "onDemandBaseAnnotation": "a"}}),
            "settings.spotRatioAnnotation and settings.onDemandBaseAnnotation are both \"a\"",
        ),
        (
            json!({"settings": {"decisionAnnotation": "workload/spot-ratio"}}),
            "settings.spotRatioAnnotation and settings.decisionAnnotation are both",
        ),
        (json!({"settings": {"spotTolerations": ["spot"]}}), "does not match pattern"),
        (json!({"settings": {"driverCapacity": "spot"}}), "value must be one of 'any', 'on-demand'"),
        (
            json!({"extraEnv": [{"name": "STORE", "value": "memory"}]}),
            "extraEnv has STORE, which the chart sets from another value",
        ),
        (
            json!({"extraEnv": [{"name": "ADMIN_PORT", "value": "80"}], "reconciler": {"mode": "webhook"}}),
            "extraEnv has ADMIN_PORT, which the chart sets",
        ),
        (
            json!({"extraEnv": [{"name": "A", "value": "1"}, {"name": "A", "value": "2"}]}),
            "extraEnv has A twice. Remove one of them",
        ),
        (json!({"extraVolumes": [{"name": "tls", "emptyDir": {}}]}), "there is another one of that name"),
        (
            json!({"extraVolumeMounts": [{"name": "tls", "mountPath": "/a"}]}),
            "extraVolumeMounts mounts the volume tls, which extraVolumes does not have",
        ),
        (json!({"extraVolumeMounts": [{"name": "a", "mountPath": "/a"}]}), "which extraVolumes does not have"),
        (
            json!({
                "extraVolumes": [{"name": "a", "emptyDir": {}}],
                "extraVolumeMounts": [{"name": "a", "mountPath": "/tls/"}],
            }),
            "at /tls/, where another volume is mounted",
        ),
        (
            json!({
                "extraVolumes": [{"name": "a", "emptyDir": {}}],
                "extraVolumeMounts": [{"name": "a", "mountPath": "/a"}, {"name": "a", "mountPath": "/a"}],
            }),
            "at /a, where another volume is mounted",
        ),
        (
            json!({"namespaces": {"names": ["a"]}, "helmTest": {"namespace": "b"}}),
            "helmTest.namespace is \"b\", whose pods are not sent to the webhook",
        ),
        (json!({"helmTest": {"namespace": "kube-system"}}), "so the test would always fail"),
        (
            json!({"monitoring": {"prometheusRule": {"runbookUrl": "docs/troubleshooting.md"}}}),
            "does not match pattern",
        ),
        (json!({"redis": {"bundled": {"renderNew": false}}}), "Set redis.bundled.existingSecret to a Secret of yours"),
        (json!({"settings": {"nodeRoleSelector": "yes"}}), "got string, want boolean"),
        (json!({"settings": {"reconcileGraceSeconds": 0}}), "minimum: got 0, want 5"),
        (json!({"store": "disk"}), "value must be one of 'redis', 'memory'"),
        (json!({"store": "memory", "reconciler": {"mode": "deployment"}}), "only the webhook can reconcile it"),
        (json!({"store": "memory", "reconciler": {"mode": "none"}}), "nothing would fill the ledger again"),
        (json!({"store": "memory", "webhook": {"autoscaling": {"enabled": true}}}), "works with one replica only"),
        (json!({"store": "memory", "redis": {"url": "redis://a"}}), "or redis.existingSecret.name names a server"),
        (json!({"redis": {"url": "http://a"}}), "does not match pattern"),
        (json!({"redis": {"url": "redis://a", "existingSecret": {"name": "b"}}}), "are both set"),
        (json!({"redis": {"ca": PEM}}), "does not use TLS"),
        // As with the values of a chart that knew one server only.
        (json!({"redis": {"mode": null}}), "a default: redis.mode. They are newer"),
        (json!({"redis": {"mode": "master"}}), "value must be one of 'auto', 'single', 'cluster', 'sentinel'"),
        (json!({"redis": {"mode": "cluster"}}), "redis.mode is for Redis servers of your own, but neither"),
        (
            json!({"redis": {"passwordSecret": {"name": "a"}}}),
            "redis.passwordSecret.name is for Redis servers of your own",
        ),
        (
            json!({"store": "memory", "redis": {"awsIam": {"service": "memorydb"}}}),
            "redis.awsIam.service is for Redis servers of your own",
        ),
        (
            json!({"redis": {"url": "rediss://a", "ca": PEM, "caSecret": {"name": "a"}}}),
            "redis.ca and redis.caSecret.name are both set",
        ),
        (
            json!({"redis": {"mode": "sentinel", "url": "redis://a"}}),
            "redis.mode is sentinel, but redis.sentinel.master is empty",
        ),
        (
            json!({"redis": {"mode": "cluster", "url": "redis://a", "sentinel": {"master": "m"}}}),
            "redis.sentinel.master is m and redis.mode is cluster",
        ),
        (
            json!({"redis": {"url": "redis://a", "sentinel": {"master": "m", "username": "u"}}}),
            "Set it to a Secret with the password of that user",
        ),
        (
            json!({"redis": {"url": "redis://a", "sentinel": {"passwordSecret": {"name": "s"}}}}),
            "The password of the Redis servers is redis.passwordSecret",
        ),
        (
            json!({"redis": {"url": "redis://a:b@c", "passwordSecret": {"name": "s"}}}),
            "redis.url has a password, and redis.passwordSecret.name is set",
        ),
        (json!({"redis": {"url": "redis://user@a"}}), "redis.url has a user and no password"),
        (json!({"redis": {"mode": "single", "url": "redis://a,b"}}), "redis.url names several hosts"),
        (
            json!({"redis": {"mode": "cluster", "url": "redis://a:6379,b:6379/1"}}),
            "redis.url names the database 1, but a cluster has only the database 0",
        ),
        (
            json!({"redis": {"url": "redis://:a@b:7000"}, "networkPolicy": {"egress": {"enabled": true}}}),
            "redis.url names the port 7000, which networkPolicy.egress.redisPorts does not have",
        ),
        (json!({"redis": {"awsIam": {"cacheName": "a"}}}), "but redis.awsIam.service is empty"),
        (
            json!({"redis": {"url": "rediss://u@a", "awsIam": {"service": "memorydb"}}}),
            "redis.awsIam.service is memorydb, but redis.awsIam.cacheName is empty",
        ),
        (
            json!({"redis": {"url": "rediss://u@a", "awsIam": {"service": "dynamodb"}}}),
            "value must be one of '', 'elasticache'",
        ),
        (json!({"redis": {"bundled": {"image": {"tag": ""}}}}), "has neither a tag nor a digest"),
        (
            json!({"redis": {"bundled": {"image": {"repository": "docker.io/library/redis"}}}}),
            "Set it to an image of Valkey, or use your own Redis",
        ),
        (json!({"redis": {"bundled": {"maxMemory": "0mb"}}}), "redis.bundled.maxMemory is 0, which means no limit"),
        (json!({"redis": {"bundled": {"maxMemory": "256mb"}}}), "Set maxMemory to less than the limit"),
        (
            json!({"redis": {"bundled": {"maxMemory": "1gb", "resources": {"limits": {"memory": "1G"}}}}}),
            "redis.bundled.maxMemory is 1gb and redis.bundled.resources.limits.memory is 1G",
        ),
        (
            json!({
                "admission": {"timeoutSeconds": 8, "deletionTimeoutSeconds": 1},
                "settings": {"webhookTimeoutSeconds": 7, "storeTimeoutMilliseconds": 1000},
            }),
            "the webhook may wait 1000 ms for its store",
        ),
        (json!({"admission": {"deletionTimeoutSeconds": 0}}), "minimum: got 0, want 1"),
        (json!({"admissionToken": {"rotation": 0}}), "minimum: got 0, want 1"),
        (json!({"admissionToken": {"existingSecret": {"name": "a"}}}), "Either Helm finds no such Secret"),
        (json!({"admissionToken": {"existingSecret": {"name": "a", "token": "UPPER-CASE-TOKEN"}}}), "does not match"),
        (json!({"admissionToken": {"existingSecret": {"token": "0123456789012345"}}}), "Set the name of the Secret"),
        (
            json!({"admissionToken": {"rotation": 2, "existingSecret": {"name": "a", "token": "0123456789012345"}}}),
            "The chart rotates only the tokens of its own Secret",
        ),
        (json!({"admissionToken": {"renderNew": false}}), "Set admissionToken.existingSecret.name and"),
        (
            json!({"admissionToken": {"enabled": false, "existingSecret": {"name": "a"}}}),
            "Set enabled to true to use that Secret",
        ),
        (
            json!({"networkPolicy": {"enabled": false, "webhookPeers": [{"ipBlock": {"cidr": "10.0.0.0/8"}}]}}),
            "Set networkPolicy.enabled to true",
        ),
        (
            json!({
                "networkPolicy": {"webhookPeers": [{"ipBlock": {"cidr": "10.0.0.0/8"}}]},
                "webhook": {"hostNetwork": true}, "redis": {"url": "redis://a"},
            }),
            "restrict the port by a firewall",
        ),
        (json!({"certificates": {"source": "none"}}), "'cert-manager', 'secret', 'helm'"),
        (json!({"certificates": {"source": "secret"}}), "Set certificates.secret.name"),
        (json!({"certificates": {"secret": {"name": "a"}}}), "Set certificates.source to secret"),
        (json!({"namespaces": {"names": ["kube-system"]}}), "Run jobs in another namespace"),
        (json!({"namespaces": {"names": ["spot-balancer"]}}), "Run jobs in another namespace"),
        (
            json!({"namespaces": {"names": ["a"], "selector": {"matchLabels": {"a": "b"}}}}),
            "namespaces.names and namespaces.selector are both set. Set only one of them",
        ),
        // Each would select all namespaces.
        (json!({"namespaces": {"selector": {"matchLabels": {}}}}), "so it would select all namespaces"),
        (json!({"namespaces": {"selector": {"matchExpressions": []}}}), "so it would select all namespaces"),
        (
            json!({"namespaces": {"selector": {"matchExpressions": [{"key": "a", "operator": "In"}]}}}),
            "for the label a with the operator In and without values",
        ),
        (
            json!({"namespaces": {"selector": {"matchExpressions": [{"key": "a", "operator": "NotIn", "values": []}]}}}),
            "with the operator NotIn and without values",
        ),
        (
            json!({"namespaces": {"selector": {"matchExpressions": [{"key": "a", "operator": "Exists", "values": ["b"]}]}}}),
            "with the operator Exists, which takes no values",
        ),
        (
            json!({"namespaces": {"selector": {
                "matchLabels": {"a": "b"}, "matchExpressions": [{"key": "a", "operator": "DoesNotExist", "values": ["b"]}],
            }}}),
            "with the operator DoesNotExist, which takes no values",
        ),
        (json!({"namespaces": {"names": ["a"], "all": true}}), "namespaces.names and namespaces.all are both set"),
        (json!({"namespaces": {"names": [], "all": false}}), "Set namespaces.names to the namespaces of your jobs"),
        (json!({"image": {"repository": ""}}), "Build it and push it to a registry of yours"),
        (json!({"webhook": {"replicas": 0}}), "minimum: got 0, want 1"),
        (json!({"webhook": {"service": {"port": 8080}}}), "The Service exposes both"),
        (json!({"certificates": {"certManager": {"duration": "24h"}}}), "certificates.certManager.duration is 24h"),
        (json!({"certificates": {"certManager": {"issuerRef": {"kind": "ClusterIssuer"}}}}), "issuerRef has no name"),
        (json!({"certificates": {"certificateKey": "chain.pem"}}), "have the keys tls.crt and tls.key"),
        (json!({"webhook": {"hostNetwork": true}}), "the bundled Redis would reject the webhook"),
        (json!({"webhook": {"port": 80}}), "minimum: got 80, want 1,024"),
        (json!({"webhook": {"port": 8080}}), "Set two different ports"),
        (
            json!({"webhook": {"autoscaling": {"minReplicas": 9}}}),
            "minReplicas is 9, more than webhook.autoscaling.maxReplicas, which is 6",
        ),
        (
            json!({"monitoring": {"serviceMonitor": {"enabled": true}, "podMonitor": {"enabled": true}}}),
            "Prometheus would scrape everything twice",
        ),
        (
            json!({
                "monitoring": {"prometheusRule": {"enabled": true}},
                "certificates": {"certManager": {"renewBefore": "335h59m"}},
            }),
            "Lower certificateDays, or set renewBefore to 336h or more",
        ),
    ];
    let iam = |other: Value| {
        let mut redis =
            json!({"url": "rediss://u@a", "awsIam": {"service": "elasticache-serverless", "cacheName": "c"}});
        for (name, value) in other.as_object().into_iter().flatten() {
            redis[name] = value.clone();
        }
        json!({"redis": redis})
    };
    let refused_with_iam = [
        (
            iam(json!({"passwordSecret": {"name": "s"}})),
            "redis.awsIam.service and redis.passwordSecret.name are both set",
        ),
        (iam(json!({"sentinel": {"master": "m"}})), "The services of AWS have no sentinels"),
        (iam(json!({"caSecret": {"name": "s"}})), "The services of AWS have certificates of a public CA"),
        (iam(json!({"url": "rediss://u:p@a"})), "redis.awsIam.service is set, and redis.url has a password"),
        (iam(json!({"url": "rediss://a"})), "redis.url has no user"),
        (iam(json!({"url": "redis://u@a"})), "redis.url has no TLS, which IAM needs"),
        (iam(json!({"url": "rediss://u@a/3"})), "a cluster has only the database 0"),
    ];
    for (values, reason) in refused.into_iter().chain(refused_with_iam) {
        let error = helm.template(&values).await.err().with_context(|| format!("not refused: {values}"))?;
        let error = format!("{error:#}");
        assert!(error.contains(reason), "{values} is refused by {error:?}, which does not say {reason:?}");
    }
    // What has no default is refused first, whatever else is missing.
    for (values, reason) in [
        (json!({}), "image.repository is empty, because no image of Spot Balancer is published."),
        (json!({"image": {"repository": "a"}}), "No namespaces are chosen"),
    ] {
        let error = helm.template_alone(&values).await.err().with_context(|| format!("not refused: {values}"))?;
        assert!(format!("{error:#}").contains(reason), "{values} is refused by {error:#}");
    }
    Ok(())
}

#[tokio::test]
async fn what_a_profile_leaves_out_is_not_set_and_an_empty_list_is() -> Result<()> {
    need!(Helm);
    const OWN: [&str; 4] = ["CAPACITY_TYPE_LABEL", "SPOT_VALUES", "ON_DEMAND_VALUES", "SPOT_TOLERATIONS"];
    let mut helm = Helm::start().await?;
    for (settings, wanted) in [
        (json!({"capacityProfile": "gke"}), [None; 4]),
        (json!({"onDemandValues": [], "spotTolerations": []}), [None, None, Some(""), Some("")]),
        (
            json!({
                "capacityTypeLabel": "lifecycle", "spotValues": ["Ec2Spot", "spot"], "onDemandValues": ["OnDemand"],
                "spotTolerations": ["spot=true:NoSchedule", "lifecycle:NoExecute"],
            }),
            [
                Some("lifecycle"),
                Some("Ec2Spot,spot"),
                Some("OnDemand"),
                Some("spot=true:NoSchedule,lifecycle:NoExecute"),
            ],
        ),
    ] {
        let objects = helm.render(&json!({"settings": settings})).await?;
        for name in [WEBHOOK, RECONCILER] {
            let set = environment(object(&objects, "Deployment", name)?)?;
            assert_eq!(OWN.map(|variable| set.get(variable).and_then(Value::as_str)), wanted, "{settings}");
        }
    }
    Ok(())
}

#[tokio::test]
async fn all_roles_of_drivers_are_sent_to_the_webhook() -> Result<()> {
    need!(Helm);
    let mut helm = Helm::start().await?;
    for (roles, variable, wanted) in [
        (Value::Null, "driver,connect-server", json!(["driver", "connect-server", "executor"])),
        (json!("leads"), "leads", json!(["leads", "executor"])),
        (json!(["leads", "driver"]), "leads,driver", json!(["leads", "driver", "executor"])),
    ] {
        let values = if roles.is_null() { json!({}) } else { json!({"settings": {"driverRoleValue": roles}}) };
        let objects = helm.render(&values).await?;
        assert_eq!(environment(object(&objects, "Deployment", WEBHOOK)?)?["DRIVER_ROLE_VALUE"], variable);
        for (kind, wanted) in
            [("MutatingWebhookConfiguration", wanted), ("ValidatingWebhookConfiguration", json!(["executor"]))]
        {
            let selector = &object(&objects, kind, "spot-balancer")?["webhooks"][0]["objectSelector"];
            assert_eq!(selector["matchExpressions"][0]["values"], wanted, "{kind}");
        }
    }
    Ok(())
}

/// What a node must have, by key and operator.
type Requirements = BTreeMap<(String, String), BTreeSet<String>>;

/// The requirements of a node selector term.
fn requirements(term: &Value) -> Result<Requirements> {
    let expressions = term["matchExpressions"].as_array().with_context(|| format!("no expressions: {term}"))?;
    let requirement = |expression: &Value| {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let values = expression["values"].as_array().into_iter().flatten().map(text).collect();
        ((text(&expression["key"]), text(&expression["operator"])), values)
    };
    Ok(expressions.iter().map(requirement).collect())
}

/// What the programs require of the node of an on-demand executor.
fn required_by_the_programs(labels: CapacityLabels) -> Result<Requirements> {
    let conventions = Conventions { capacity_labels: labels, node_role_selector: false, ..Conventions::default() };
    let mut pod = json!({"metadata": {}, "spec": {}});
    let patch = conventions.profile().apply(
        &serde_json::from_str(&pod.to_string())?,
        Capacity::OnDemand,
        None,
        &Spread::default(),
    );
    json_patch::patch(&mut pod, &serde_json::from_slice::<json_patch::Patch>(patch.as_json())?)?;
    let selector = pod["spec"]["nodeSelector"].as_object().into_iter().flatten();
    let selected = selector.map(|(key, value)| json!({"key": key, "operator": "In", "values": [value]}));
    let affinity = &pod["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"];
    let expressions = affinity["nodeSelectorTerms"][0]["matchExpressions"].as_array().into_iter().flatten();
    requirements(&json!({"matchExpressions": selected.chain(expressions.cloned()).collect::<Vec<_>>()}))
}

#[tokio::test]
async fn the_pods_of_the_release_require_what_on_demand_executors_do() -> Result<()> {
    need!(Helm);
    let mut helm = Helm::start().await?;
    for profile in CapacityProfile::ALL {
        let (name, of_profile) = (profile.as_str(), CapacityLabels::of(profile));
        let with_label = CapacityLabels { label: "example.com/capacity".into(), ..of_profile.clone() };
        let unlabelled = CapacityLabels { on_demand_values: Vec::new(), ..of_profile.clone() };
        let several = CapacityLabels { on_demand_values: vec!["a".into(), "b".into()], ..of_profile.clone() };
        for (settings, labels) in [
            (json!({}), of_profile),
            (json!({"capacityTypeLabel": "example.com/capacity"}), with_label),
            (json!({"onDemandValues": []}), unlabelled),
            (json!({"onDemandValues": ["a", "b"]}), several),
        ] {
            let what = format!("{name} {settings}");
            // Both the chart and the programs refuse that.
            if labels.spot_values == LabelValues::Any && !labels.on_demand_values.is_empty() {
                continue;
            }
            let mut values = json!({"settings": settings, "placement": {"onDemand": "required"}});
            values["settings"]["capacityProfile"] = name.into();
            let affinity = affinity(&helm.render(&values).await.with_context(|| what.clone())?, WEBHOOK)?;
            let required = &affinity["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"];
            let ours = requirements(&required["nodeSelectorTerms"][0])?;
            assert_eq!(ours, required_by_the_programs(labels)?, "{what}");
        }
    }
    Ok(())
}

/// What a Deployment's pods require or prefer of their node, and of the pods next to them.
fn affinity(objects: &[Value], name: &str) -> Result<Value> {
    Ok(object(objects, "Deployment", name)?["spec"]["template"]["spec"]["affinity"].clone())
}

#[tokio::test]
async fn pods_of_a_component_go_where_it_says_and_else_where_all_go() -> Result<()> {
    need!(Helm);
    let mut helm = Helm::start().await?;
    let common =
        json!({"nodeSelector": {"pool": "tools"}, "tolerations": [{"key": "pool"}], "priorityClassName": "low"});
    let own = json!({"nodeSelector": {}, "priorityClassName": "high", "onDemand": "any", "antiAffinity": "required"});
    let objects = helm.render(&json!({"placement": common, "webhook": {"placement": own}})).await?;
    let spec = |name| Ok::<_, anyhow::Error>(&object(&objects, "Deployment", name)?["spec"]["template"]["spec"]);
    for name in [RECONCILER, "spot-balancer-redis"] {
        let spec = spec(name)?;
        assert_eq!(spec["nodeSelector"], json!({"pool": "tools"}), "{name}");
        assert_eq!(spec["priorityClassName"], "low", "{name}");
        let affinity = affinity(&objects, name)?;
        assert!(affinity["nodeAffinity"].is_object(), "{name}");
        let apart =
            &affinity["podAntiAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"][0]["podAffinityTerm"];
        if name == RECONCILER {
            assert_eq!(apart["labelSelector"]["matchLabels"]["app.kubernetes.io/component"], "reconciler");
        } else {
            assert!(affinity["podAntiAffinity"].is_null(), "one replica has nothing to keep apart from");
        }
    }
    let webhook = spec(WEBHOOK)?;
    assert!(webhook["nodeSelector"].is_null());
    assert_eq!(webhook["tolerations"], json!([{"key": "pool"}]));
    assert_eq!(webhook["priorityClassName"], "high");
    let affinity = affinity(&objects, WEBHOOK)?;
    assert!(affinity["nodeAffinity"].is_null());
    let apart = &affinity["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"][0];
    assert_eq!(apart["topologyKey"], "kubernetes.io/hostname");
    Ok(())
}

#[tokio::test]
async fn labels_and_volumes_of_the_values_are_added_to_pods() -> Result<()> {
    need!(Helm);
    let values = json!({
        "commonLabels": {"team": "data"},
        "webhook": {"podLabels": {"part": "webhook", "app.kubernetes.io/component": "mine"}},
        "reconciler": {"podLabels": {"part": "reconciler", "team": "other"}},
        "extraVolumes": [{"name": "a", "configMap": {"name": "a"}}],
        "extraVolumeMounts": [{"name": "a", "mountPath": "/a", "readOnly": true}],
    });
    let objects = Helm::start().await?.render(&values).await?;
    for (name, part, team) in [(WEBHOOK, "webhook", "data"), (RECONCILER, "reconciler", "other")] {
        let deployment = object(&objects, "Deployment", name)?;
        let template = &deployment["spec"]["template"];
        let labels = &template["metadata"]["labels"];
        assert_eq!((&labels["part"], &labels["team"]), (&json!(part), &json!(team)));
        assert_eq!(labels["app.kubernetes.io/component"], part, "the label of the selector stays");
        let volumes = template["spec"]["volumes"].as_array().context("no volumes")?;
        ensure!(volumes.contains(&json!({"name": "a", "configMap": {"name": "a"}})), "{name}: {volumes:?}");
        let mounts = container(deployment)?["volumeMounts"].as_array().context("no mounts")?;
        ensure!(mounts.contains(&json!({"name": "a", "mountPath": "/a", "readOnly": true})), "{name}: {mounts:?}");
    }
    Ok(())
}

#[tokio::test]
async fn the_redis_user_of_the_chart_has_the_documented_rights_and_its_password_is_only_in_its_secret() -> Result<()> {
    need!(Helm);
    let documented = std::fs::read_to_string(repository("docs/redis.md"))?;
    let rights = documented.lines().find(|line| line.starts_with("~exec-")).context("no rights in docs/redis.md")?;
    let mut helm = Helm::start().await?;
    let rendered = helm.template(&json!({})).await?;
    let objects = objects(&rendered)?;
    let arguments = &container(object(&objects, "Deployment", "spot-balancer-redis")?)?["args"];
    let arguments: Vec<String> = serde_json::from_value(arguments.clone())?;
    let user = arguments.join(" ");
    ensure!(user.contains(&format!(" --user balancer on >$(REDIS_PASSWORD) {rights} --")), "{user}");
    let secret = &object(&objects, "Secret", "spot-balancer-redis-password")?["data"]["password"];
    let ByteString(password) = serde_json::from_value(secret.clone())?;
    ensure!(!rendered.contains(&String::from_utf8(password)?), "the password is not in its Secret alone");
    for name in [WEBHOOK, RECONCILER] {
        let set = container(object(&objects, "Deployment", name)?)?["env"].as_array().context("no env")?;
        let at = |name: &str| set.iter().position(|variable| variable["name"] == name).context("not set");
        // The kubelet replaces what was set before.
        ensure!(at("REDIS_PASSWORD")? < at("REDIS_URL")?, "{set:?}");
        assert_eq!(
            set[at("REDIS_URL")?]["value"],
            "redis://balancer:$(REDIS_PASSWORD)@spot-balancer-redis.spot-balancer.svc:6379"
        );
    }
    let own = helm.render(&json!({"redis": {"bundled": {"existingSecret": "own"}}})).await?;
    ensure!(
        object(&own, "Secret", "spot-balancer-redis-password").is_err(),
        "the chart makes a Secret that nobody uses"
    );
    let from = &environment(object(&own, "Deployment", WEBHOOK)?)?["REDIS_PASSWORD"]["secretKeyRef"];
    assert_eq!(*from, json!({"name": "own", "key": "password"}));
    Ok(())
}

/// The Secrets that a Deployment mounts whole, by the paths where their one file is. A subPath would never be updated.
fn mounted_secrets(deployment: &Value) -> Result<BTreeMap<String, (String, String)>> {
    let volumes = deployment["spec"]["template"]["spec"]["volumes"].as_array().context("no volumes")?;
    let mut secrets = BTreeMap::new();
    for mount in container(deployment)?["volumeMounts"].as_array().context("no mounts")? {
        ensure!(mount["subPath"].is_null() && mount["readOnly"] == true, "{mount}");
        let volume = volumes.iter().find(|volume| volume["name"] == mount["name"]).context("no volume")?;
        let (secret, item) = (&volume["secret"], &volume["secret"]["items"][0]);
        if let (Some(name), Some(key), Some(path)) =
            (secret["secretName"].as_str(), item["key"].as_str(), item["path"].as_str())
        {
            let file = format!("{}/{path}", mount["mountPath"].as_str().context("no path")?);
            secrets.insert(file, (name.to_owned(), key.to_owned()));
        }
    }
    Ok(secrets)
}

#[tokio::test]
async fn passwords_and_authorities_of_redis_are_files_that_a_changed_secret_replaces() -> Result<()> {
    need!(Helm);
    let mut helm = Helm::start().await?;
    let mut values = sentinels();
    values["redis"]["caSecret"] = json!({"name": "authority", "key": "root.crt"});
    let objects = helm.render(&values).await?;
    for name in [WEBHOOK, RECONCILER] {
        let deployment = object(&objects, "Deployment", name)?;
        let (set, secrets) = (environment(deployment)?, mounted_secrets(deployment)?);
        for (variable, secret, key) in [
            ("REDIS_PASSWORD_FILE", "servers", "redis-password"),
            ("REDIS_SENTINEL_PASSWORD_FILE", "sentinels", "sentinel-password"),
            ("SSL_CERT_FILE", "authority", "root.crt"),
        ] {
            let path = set.get(variable).and_then(Value::as_str).with_context(|| format!("{name}: no {variable}"))?;
            assert_eq!(secrets.get(path), Some(&(secret.to_owned(), key.to_owned())), "{name}: {variable}");
        }
        assert_eq!(set["REDIS_MODE"], "sentinel");
        assert_eq!(set["REDIS_SENTINEL_MASTER"], "mymaster");
        assert_eq!(set["REDIS_SENTINEL_USERNAME"], "watcher");
    }
    let defaults = helm.render(&json!({})).await?;
    let set = environment(object(&defaults, "Deployment", WEBHOOK)?)?;
    assert_eq!(set["REDIS_MODE"], "auto");
    ensure!(!set.contains_key("REDIS_PASSWORD_FILE") && !set.contains_key("SSL_CERT_FILE"), "{set:?}");
    Ok(())
}

/// The ports that the webhook's pods may connect to, and whether at any address.
fn egress(objects: &[Value]) -> Result<BTreeSet<(u64, bool)>> {
    let rules = object(objects, "NetworkPolicy", WEBHOOK)?["spec"]["egress"].as_array().context("no egress")?;
    let mut allowed = BTreeSet::new();
    for rule in rules {
        let ports = rule["ports"].as_array().context("no ports")?;
        allowed.extend(ports.iter().filter_map(|port| Some((port["port"].as_u64()?, rule["to"].is_null()))));
    }
    Ok(allowed)
}

#[tokio::test]
async fn pods_may_reach_sentinels_the_nodes_of_a_cluster_and_the_credentials_of_aws() -> Result<()> {
    need!(Helm);
    let mut helm = Helm::start().await?;
    let common = [(53, true), (443, true), (6443, true)];
    let outside = [(6379, true), (6380, true), (26379, true)];
    let enabled = json!({"egress": {"enabled": true, "apiServerPorts": [443, 6443]}});
    let cases = [
        (json!({"networkPolicy": enabled}), vec![(6379, false)]),
        (json!({"networkPolicy": enabled, "redis": {"url": "redis://a"}}), outside.to_vec()),
        (tokens_of_iam(), [outside.as_slice(), &[(80, false)]].concat()),
    ];
    for (values, wanted) in cases {
        let allowed = egress(&helm.render(&values).await?)?;
        assert_eq!(allowed, common.into_iter().chain(wanted).collect(), "{values}");
    }
    Ok(())
}

#[tokio::test]
async fn ratios_in_every_form_are_accepted() -> Result<()> {
    need!(Helm);
    let mut helm = Helm::start().await?;
    for (value, text) in [
        (json!("0"), "0"),
        (json!(0), "0"),
        (json!(1), "1"),
        (json!(0.7), "0.7"),
        (json!(".5"), ".5"),
        (json!("100%"), "100%"),
        (json!("cost_only"), "cost_only"),
    ] {
        let objects = helm.render(&json!({"settings": {"defaultSpotRatio": value}})).await.context(text)?;
        assert_eq!(environment(object(&objects, "Deployment", WEBHOOK)?)?["DEFAULT_SPOT_RATIO"], text);
    }
    Ok(())
}

/// The environment variables that a program knows, by its `--help`.
fn known_to(name: &str) -> Result<BTreeSet<String>> {
    let help = Command::new(program(name)?).arg("--help").env_clear().output()?;
    let help = String::from_utf8(help.stdout)?;
    let names = help.split("[env: ").skip(1).filter_map(|rest| rest.split(['=', ']']).next());
    Ok(names.map(str::to_owned).collect())
}

#[tokio::test]
async fn every_setting_of_the_programs_is_reachable_from_values() -> Result<()> {
    need!(Helm, Webhook, Reconciler);
    let mut helm = Helm::start().await?;
    let (defaults, others) = (helm.render(&json!({})).await?, helm.render(&every_option()).await?);
    // REDIS_URL is a value, or a reference to a Secret; STORE and RECONCILE_ENABLED go with other objects.
    let within = json!({
        "store": "memory", "namespaces": {"names": ["jobs"]}, "admissionToken": {"enabled": false},
    });
    let within = helm.render(&within).await?;
    let within = environment(object(&within, "Deployment", WEBHOOK)?)?;
    let servers = [helm.render(&sentinels()).await?, helm.render(&tokens_of_iam()).await?];
    let by_name = helm.render(&json!({"fullnameOverride": "spark-mix"})).await?;
    let by_name = environment(object(&by_name, "Deployment", "spark-mix-reconciler")?)?;
    for (deployment, name) in [(WEBHOOK, "balancer-webhook"), (RECONCILER, "balancer-reconcile")] {
        let defaults = environment(object(&defaults, "Deployment", deployment)?)?;
        let others = environment(object(&others, "Deployment", deployment)?)?;
        let mut servers_set = BTreeMap::new();
        for objects in &servers {
            servers_set.extend(environment(object(objects, "Deployment", deployment)?)?);
        }
        for variable in known_to(name)? {
            let differs = |set: &BTreeMap<String, Value>| set.get(&variable) != defaults.get(&variable);
            // Its newer name is WORKLOAD_ROLE_LABEL.
            let older = variable == "SPARK_ROLE_LABEL";
            // It goes by the name of the release.
            let named = variable == "RECONCILE_LEASE" && by_name[&variable] == "spark-mix-reconciler";
            // Of the reconciler there is none with another store.
            let fixed = variable == "STORE" && deployment == RECONCILER;
            let reached = differs(&others) || differs(&servers_set) || deployment == WEBHOOK && differs(&within);
            assert!(reached || named || older || fixed, "{name}: no value of the chart changes {variable}");
        }
        let known = known_to(name)?;
        let of_others = ["AWS_REGION", "RUST_BACKTRACE", "SSL_CERT_FILE"];
        for variable in others.keys().chain(servers_set.keys()).filter(|name| !of_others.contains(&name.as_str())) {
            assert!(known.contains(variable), "{name} does not know {variable}");
        }
    }
    assert_eq!(within["STORE"], "memory");
    assert_eq!(within["RECONCILE_ENABLED"], "true");
    Ok(())
}

/// Calls `see` with the path of each value, what the schema says of it and what the defaults have there.
fn walk(path: &str, schema: &Value, defaults: &Value, see: &mut impl FnMut(&str, &Value, &Value)) {
    see(path, schema, defaults);
    for (name, schema) in schema["properties"].as_object().into_iter().flatten() {
        walk(&format!("{path}.{name}"), schema, &defaults[name], see);
    }
}

#[test]
fn every_value_is_described_and_every_described_value_exists() -> Result<()> {
    let chart = repository("deploy/chart/spot-balancer");
    let schema: Value = serde_json::from_slice(&std::fs::read(chart.join("values.schema.json"))?)?;
    let values = objects(&std::fs::read_to_string(chart.join("values.yaml"))?)?.remove(0);
    walk("", &schema, &values, &mut |path, schema, value| {
        assert!(schema["description"].as_str().is_some_and(|text| text.ends_with('.')), "{path} is not described");
        // Helm's own, what is empty unless it is set, and what follows from the profile.
        let optional = [
            "global",
            ".enabled",
            ".selector.",
            ".issuerRef.",
            ".limits",
            ".requests",
            ".webhook.placement.",
            ".reconciler.placement.",
            ".onDemandValues",
            ".spotTolerations",
        ];
        assert!(!value.is_null() || optional.iter().any(|part| path.contains(part)), "{path} is not in values.yaml");
        if schema["properties"].is_object() {
            assert_eq!(schema["additionalProperties"], false, "{path}");
            for name in value.as_object().into_iter().flatten().map(|(name, _)| name) {
                assert!(schema["properties"][name].is_object(), "{path}.{name} is not in the schema");
            }
        }
    });
    Ok(())
}

#[tokio::test]
async fn every_pod_is_restricted_bounded_and_has_its_own_account() -> Result<()> {
    need!(Helm);
    let mut helm = Helm::start().await?;
    for (what, values) in variants() {
        for deployment in helm.render(&values).await?.iter().filter(|object| object["kind"] == "Deployment") {
            let what = format!("{what}: {}", deployment["metadata"]["name"]);
            let pod = &deployment["spec"]["template"]["spec"];
            let security = &pod["securityContext"];
            assert_eq!(security["runAsNonRoot"], true, "{what}");
            assert_eq!(security["seccompProfile"]["type"], "RuntimeDefault", "{what}");
            let container = container(deployment)?;
            let security = &container["securityContext"];
            assert_eq!(security["allowPrivilegeEscalation"], false, "{what}");
            assert_eq!(security["readOnlyRootFilesystem"], true, "{what}");
            assert_eq!(security["capabilities"], json!({"drop": ["ALL"]}), "{what}");
            assert!(container["resources"]["limits"]["memory"].is_string(), "{what}");
            assert!(container["resources"]["requests"]["cpu"].is_string(), "{what}");
            assert!(container["livenessProbe"].is_object() && container["readinessProbe"].is_object(), "{what}");
            let keys: Vec<&Value> = pod["topologySpreadConstraints"]
                .as_array()
                .context("no spread")?
                .iter()
                .map(|constraint| &constraint["topologyKey"])
                .collect();
            assert_eq!(keys, ["kubernetes.io/hostname", "topology.kubernetes.io/zone"], "{what}");
            let selector = &deployment["spec"]["selector"]["matchLabels"];
            let labels = &deployment["spec"]["template"]["metadata"]["labels"];
            for (key, value) in selector.as_object().context("no selector")? {
                assert_eq!(labels[key], *value, "{what}: {key}");
            }
            // Redis asks nothing of the API; the others run as an account of their own.
            let asks = pod["automountServiceAccountToken"].as_bool().context("not said")?;
            assert_eq!(asks, pod["serviceAccountName"].is_string(), "{what}");
        }
    }
    Ok(())
}

#[tokio::test]
async fn the_memory_store_is_one_replica_that_reconciles_by_itself() -> Result<()> {
    need!(Helm);
    let objects = Helm::start().await?.render(&json!({"store": "memory", "webhook": {"replicas": 3}})).await?;
    let deployments: Vec<&Value> = objects.iter().filter(|object| object["kind"] == "Deployment").collect();
    assert_eq!(deployments.len(), 1);
    assert_eq!(deployments[0]["spec"]["replicas"], 1);
    let environment = environment(deployments[0])?;
    assert_eq!((&environment["STORE"], &environment["RECONCILE_ENABLED"]), (&json!("memory"), &json!("true")));
    assert!(!environment.contains_key("REDIS_URL"));
    let kinds: Vec<&Value> = objects.iter().map(|object| &object["kind"]).collect();
    assert!(!kinds.contains(&&json!("PodDisruptionBudget")), "one replica could not be evicted in time");
    assert!(!kinds.contains(&&json!("Role")), "no Lease is needed");
    Ok(())
}

#[tokio::test]
async fn a_changed_redis_url_restarts_the_pods_and_stays_in_its_secret() -> Result<()> {
    need!(Helm);
    let mut helm = Helm::start().await?;
    let mut checksums = BTreeSet::new();
    for url in ["redis://:secret@a", "redis://:secret@b"] {
        let rendered = helm.template(&json!({"redis": {"url": url}})).await?;
        assert_eq!(rendered.matches("secret@").count(), 1, "the URL is in its Secret alone");
        let objects = objects(&rendered)?;
        assert_eq!(object(&objects, "Secret", "spot-balancer-redis")?["stringData"]["url"], url);
        for deployment in [WEBHOOK, RECONCILER] {
            let template = &object(&objects, "Deployment", deployment)?["spec"]["template"];
            let checksum = template["metadata"]["annotations"]["checksum/redis"].as_str().context("no checksum")?;
            checksums.insert(checksum.to_owned());
        }
    }
    assert_eq!(checksums.len(), 2);
    Ok(())
}

#[tokio::test]
async fn a_new_password_restarts_the_pods_that_use_it() -> Result<()> {
    need!(Helm);
    let mut helm = Helm::start().await?;
    let deployments = [WEBHOOK, RECONCILER, "spot-balancer-redis"];
    let mut checksums = BTreeSet::new();
    // Without a cluster each rendering has a password of its own.
    for _ in 0..2 {
        let objects = helm.render(&json!({})).await?;
        for deployment in deployments {
            let template = &object(&objects, "Deployment", deployment)?["spec"]["template"];
            let checksum = template["metadata"]["annotations"]["checksum/redis"].as_str().context("no checksum")?;
            checksums.insert(checksum.to_owned());
        }
    }
    assert_eq!(checksums.len(), 2, "one for all pods of a rendering");
    let own = helm.render(&json!({"redis": {"bundled": {"existingSecret": "own"}}})).await?;
    for deployment in deployments {
        let template = &object(&own, "Deployment", deployment)?["spec"]["template"];
        assert!(template["metadata"]["annotations"].is_null(), "{deployment}");
    }
    Ok(())
}

/// The paths at which the rendered configurations call the webhook, and their time limits.
fn calls(objects: &[Value]) -> Result<[(String, u64); 2]> {
    let call = |kind: &str| -> Result<(String, u64)> {
        let webhook = &object(objects, kind, "spot-balancer")?["webhooks"][0];
        let path = webhook["clientConfig"]["service"]["path"].as_str().context("no path")?;
        Ok((path.to_owned(), webhook["timeoutSeconds"].as_u64().context("no timeoutSeconds")?))
    };
    Ok([call("MutatingWebhookConfiguration")?, call("ValidatingWebhookConfiguration")?])
}

#[tokio::test]
async fn the_configurations_have_the_current_token_and_the_pods_have_the_next_one_too() -> Result<()> {
    need!(Helm);
    let mut helm = Helm::start().await?;
    let objects = helm.render(&json!({})).await?;
    let ByteString(tokens) = serde_json::from_value(object(&objects, "Secret", TOKENS)?["data"]["tokens"].clone())?;
    let tokens = String::from_utf8(tokens)?;
    let [current, next] = tokens.lines().collect::<Vec<_>>()[..] else { panic!("{} lines", tokens.lines().count()) };
    ensure!(current != next, "one token twice");
    for token in [current, next] {
        let valid = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
        ensure!(token.len() == 40 && token.bytes().all(valid), "{token}");
    }
    assert_eq!(calls(&objects)?, [(format!("/mutate/{current}"), 3), (format!("/validate/{current}"), 2)]);
    let deployment = object(&objects, "Deployment", WEBHOOK)?;
    assert_eq!(environment(deployment)?["ADMISSION_TOKEN_PATH"], "/admission-token/tokens");
    let volumes = deployment["spec"]["template"]["spec"]["volumes"].as_array().context("no volumes")?;
    let volume = volumes.iter().find(|volume| volume["name"] == "admission-token").context("no volume")?;
    assert_eq!(volume["secret"]["secretName"], TOKENS);
    assert_eq!(volume["secret"]["items"], json!([{"key": "tokens", "path": "tokens"}]));
    ensure!(
        !object(&objects, "Deployment", RECONCILER)?.to_string().contains("token/"),
        "the reconciler needs no token"
    );
    // A subPath would not be updated.
    let mounts = container(deployment)?["volumeMounts"].as_array().context("no mounts")?;
    ensure!(mounts.contains(&json!({"name": "admission-token", "mountPath": "/admission-token", "readOnly": true})));

    let disabled = helm.template(&json!({"admissionToken": {"enabled": false}})).await?;
    ensure!(!disabled.contains("admission-token") && !disabled.contains("ADMISSION_TOKEN_PATH"), "{disabled}");
    assert_eq!(calls(&balancer_tests::helm::objects(&disabled)?)?, [("/mutate".into(), 3), ("/validate".into(), 2)]);
    let own = json!({"admissionToken": {"existingSecret": {"name": "own", "token": "0123456789012345"}}});
    let own = helm.render(&own).await?;
    ensure!(object(&own, "Secret", TOKENS).is_err(), "the chart makes a Secret that nobody uses");
    assert_eq!(calls(&own)?[0].0, "/mutate/0123456789012345");
    Ok(())
}

#[tokio::test]
async fn client_certificates_and_peers_of_the_webhook_are_as_the_values_say() -> Result<()> {
    need!(Helm);
    let mut helm = Helm::start().await?;
    let peers = json!([{"ipBlock": {"cidr": "10.0.0.0/24"}}]);
    let values = json!({"clientCertificates": {"caSecret": "apiserver"}, "networkPolicy": {"webhookPeers": peers}});
    for (values, ca, from) in [(values, json!("apiserver"), peers), (json!({}), Value::Null, Value::Null)] {
        let objects = helm.render(&values).await?;
        let deployment = object(&objects, "Deployment", WEBHOOK)?;
        let path = environment(deployment)?.remove("CLIENT_CA_PATH").unwrap_or_default();
        assert_eq!(path, if ca.is_null() { Value::Null } else { json!("/client-ca/ca.crt") });
        let volumes = deployment["spec"]["template"]["spec"]["volumes"].as_array().context("no volumes")?;
        let volume = volumes.iter().find(|volume| volume["name"] == "client-ca").cloned().unwrap_or_default();
        assert_eq!(volume["secret"]["secretName"], ca);
        let rules = &object(&objects, "NetworkPolicy", WEBHOOK)?["spec"]["ingress"];
        assert_eq!((&rules[0]["ports"][0]["port"], &rules[0]["from"]), (&json!("https"), &from));
        assert_eq!((&rules[1]["ports"][0]["port"], &rules[1]["from"]), (&json!("admin"), &Value::Null));
    }
    Ok(())
}

/// The verbs on each resource that the role of the reconciler of jobs has, as `group/resource verb`.
fn reconcile_rights(objects: &[Value], role: &str) -> Result<BTreeSet<String>> {
    let rules = object(objects, "ClusterRole", role)?["rules"].as_array().context("no rules")?;
    let mut rights = BTreeSet::new();
    for rule in rules {
        let texts = |key: &str| rule[key].as_array().into_iter().flatten().filter_map(Value::as_str);
        for resource in texts("resources") {
            rights.extend(texts("verbs").map(|verb| format!("{resource} {verb}")));
        }
    }
    Ok(rights)
}

#[tokio::test]
async fn pods_may_be_deleted_only_where_jobs_run_and_only_with_the_fallback() -> Result<()> {
    need!(Helm);
    let mut helm = Helm::start().await?;
    let plain = ["events create", "pods get", "pods list", "pods watch"].map(str::to_owned);
    let added = ["events list", "pods delete"].map(str::to_owned);
    let all: BTreeSet<String> = plain.iter().chain(&added).cloned().collect();
    let (setting, by_annotation) =
        (json!({"settings": {"spotFallbackSeconds": 1}}), json!({"reconciler": {"allowSpotFallback": true}}));
    let within = json!({"store": "memory", "settings": {"spotFallbackSeconds": 86400}});
    for (values, component, rights) in [
        (json!({}), RECONCILER, plain.into()),
        (setting, RECONCILER, all.clone()),
        (by_annotation, RECONCILER, all.clone()),
        (within, WEBHOOK, all),
    ] {
        let role = format!("{component}-reconcile");
        let mut values = values;
        let rendered = helm.render(&values).await?;
        assert_eq!(reconcile_rights(&rendered, &role)?, rights, "{values}");
        let can_delete = rendered.iter().filter(|object| object.to_string().contains(r#""delete""#)).count();
        assert_eq!(can_delete, usize::from(rights.contains("pods delete")), "no other role: {values}");
        // With namespaces by name, the role is bound in each of them and nowhere else.
        values["namespaces"] = json!({"names": ["jobs-a", "jobs-b"]});
        let rendered = helm.render(&values).await?;
        let bound: Vec<_> = rendered
            .iter()
            .filter(|object| object["roleRef"]["name"] == role)
            .map(|binding| (binding["kind"].as_str(), binding["metadata"]["namespace"].as_str()))
            .collect();
        assert_eq!(bound, ["jobs-a", "jobs-b"].map(|namespace| (Some("RoleBinding"), Some(namespace))));
    }
    Ok(())
}

/// With `SPOT_BALANCER_UPDATE=1` it writes the file instead.
#[tokio::test]
async fn the_plain_manifests_are_what_the_chart_renders() -> Result<()> {
    need!(Helm);
    let path = repository("deploy/spot-balancer.yaml");
    // A secret does not belong into a file that everybody has.
    let values = json!({
        "image": {"repository": "REGISTRY/spot-balancer"},
        "namespaces": {"selector": {"matchLabels": {"spot-balancer": "enabled"}}},
        "admissionToken": {"enabled": false},
        "redis": {"bundled": {"existingSecret": "spot-balancer-redis-password"}},
    });
    let rendered = Helm::start().await?.template_alone(&values).await?;
    let head = "\
# Spot Balancer without Helm: the chart with its default values, for Kubernetes 1.27 and newer. It needs cert-manager and a
# namespace `spot-balancer` with nothing else in it.
#
# 1. Replace REGISTRY/spot-balancer, in two places, with the name of your image: see docs/install.md.
# 2. Make a password for Redis, without which no pod starts:
#
#      kubectl create namespace spot-balancer
#      kubectl --namespace spot-balancer create secret generic spot-balancer-redis-password --from-literal password=$(openssl rand -hex 20)
#
# 3. Choose the namespaces of your jobs, and apply this file:
#
#      kubectl label namespace spark-jobs spot-balancer=enabled
#      kubectl apply --filename spot-balancer.yaml
#
# There is no admission token in this file, because a token is secret and everybody has this file. Without a token, all
# who can reach the webhook's port can change the ledger. docs/install.md says how to make manifests with a token.
#
# Rendered from deploy/chart/spot-balancer. Do not edit this file.
apiVersion: v1
kind: Namespace
metadata:
  name: spot-balancer
  labels:
    pod-security.kubernetes.io/enforce: restricted
";
    // Helm is not there to manage them.
    let rendered = rendered.replace("    app.kubernetes.io/managed-by: Helm\n", "");
    ensure!(!rendered.contains("Helm"), "Helm is named where there is none");
    let manifests = format!("{head}{rendered}\n");
    if std::env::var_os("SPOT_BALANCER_UPDATE").is_some_and(|value| !value.is_empty()) {
        std::fs::write(&path, &manifests)?;
    }
    let written = std::fs::read_to_string(&path).unwrap_or_default();
    let different = manifests.lines().zip(written.lines()).position(|(now, then)| now != then);
    ensure!(
        written == manifests,
        "deploy/spot-balancer.yaml is stale (line {}); SPOT_BALANCER_UPDATE=1 tests/run --test deploy_chart renders it again",
        different.map_or(0, |line| line + 1)
    );
    Ok(())
}
