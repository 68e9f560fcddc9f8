//! The chart as Helm renders it, without a cluster.

#![allow(clippy::indexing_slicing, reason = "JSON is read by index; a panic here fails a test, as it should")]

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use balancer_tests::deployed::{RECONCILER, WEBHOOK};
use balancer_tests::helm::{Helm, every_option, object, objects, repository};
use balancer_tests::need;
use balancer_tests::parts::program;
use serde_json::{Value, json};

const PEM: &str = "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n";

/// Values that render different objects.
fn variants() -> Vec<(&'static str, Value)> {
    vec![
        ("the defaults", json!({})),
        ("every option", every_option()),
        ("the memory store", json!({"store": "memory"})),
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
        ("a part of another chart", json!({"enabled": true, "global": {"a": "b"}, "namespaces": {"names": null}})),
        ("other names", json!({"nameOverride": "mix", "fullnameOverride": "spark-mix"})),
    ]
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
        (json!({"settings": {"spotPreference": "MAYBE"}}), "value must be one of 'BEST_EFFORT', 'STRICT'"),
        (
            json!({"settings": {"defaultSpotRatio": "1.5"}}),
            "settings.defaultSpotRatio is \"1.5\", which is not a ratio",
        ),
        (json!({"settings": {"defaultSpotRatio": "101%"}}), "which is not a ratio. Accepted: 0 to 1"),
        (json!({"settings": {"defaultSpotRatio": -0.1}}), "which is not a ratio"),
        (json!({"settings": {"defaultSpotRatio": "CHEAP"}}), "or RELIABILITY_ONLY"),
        (json!({"settings": {"jobIdLabel": []}}), "minItems: got 0, want 1"),
        (json!({"settings": {"jobIdLabel": ["a b"]}}), "does not match pattern"),
        (json!({"settings": {"driverRoleValue": "executor"}}), "are both \"executor\". Set two different values"),
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
        (json!({"certificates": {"source": "none"}}), "'cert-manager', 'secret', 'helm'"),
        (json!({"certificates": {"source": "secret"}}), "Set certificates.secret.name"),
        (json!({"certificates": {"secret": {"name": "a"}}}), "Set certificates.source to secret"),
        (json!({"namespaces": {"names": ["kube-system"]}}), "Run jobs in another namespace"),
        (json!({"namespaces": {"names": ["spot-balancer"]}}), "Run jobs in another namespace"),
        (json!({"namespaces": {"names": ["a"], "selector": {"matchLabels": {"a": "b"}}}}), "Set only one of them"),
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
    for (values, reason) in refused {
        let error = helm.template(&values).await.err().with_context(|| format!("not refused: {values}"))?;
        let error = format!("{error:#}");
        assert!(error.contains(reason), "{values} is refused by {error:?}, which does not say {reason:?}");
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
    let within = helm.render(&json!({"store": "memory", "namespaces": {"names": ["jobs"]}})).await?;
    let within = environment(object(&within, "Deployment", WEBHOOK)?)?;
    let by_name = helm.render(&json!({"fullnameOverride": "spark-mix"})).await?;
    let by_name = environment(object(&by_name, "Deployment", "spark-mix-reconciler")?)?;
    for (deployment, name) in [(WEBHOOK, "balancer-webhook"), (RECONCILER, "balancer-reconcile")] {
        let defaults = environment(object(&defaults, "Deployment", deployment)?)?;
        let others = environment(object(&others, "Deployment", deployment)?)?;
        for variable in known_to(name)? {
            let differs = |set: &BTreeMap<String, Value>| set.get(&variable) != defaults.get(&variable);
            // Its newer name is WORKLOAD_ROLE_LABEL.
            let older = variable == "SPARK_ROLE_LABEL";
            // It goes by the name of the release.
            let named = variable == "RECONCILE_LEASE" && by_name[&variable] == "spark-mix-reconciler";
            // Of the reconciler there is none with another store.
            let fixed = variable == "STORE" && deployment == RECONCILER;
            let reached = differs(&others) || deployment == WEBHOOK && differs(&within);
            assert!(reached || named || older || fixed, "{name}: no value of the chart changes {variable}");
        }
        let known = known_to(name)?;
        for variable in
            others.keys().filter(|variable| !matches!(variable.as_str(), "SSL_CERT_FILE" | "RUST_BACKTRACE"))
        {
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
        // Helm's own, and what is empty unless it is set.
        let optional = ["global", ".enabled", ".selector.", ".issuerRef.", ".limits", ".requests"];
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

/// With `SPOT_BALANCER_UPDATE=1` it writes the file instead.
#[tokio::test]
async fn the_plain_manifests_are_what_the_chart_renders() -> Result<()> {
    need!(Helm);
    let path = repository("deploy/spot-balancer.yaml");
    let rendered = Helm::start().await?.template(&json!({})).await?;
    let head = "\
# Spot Balancer without Helm: the chart with its default values, for Kubernetes 1.27 and newer. It needs cert-manager, a
# namespace `spot-balancer` with nothing else in it, and your image, which you must enter in two places.
#
#   kubectl apply --filename spot-balancer.yaml
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
