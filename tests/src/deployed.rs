//! A release of the chart on a control plane: the programs as its Deployments run them, and its webhook
//! configurations directed to them.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use k8s_openapi::ByteString;
use k8s_openapi::api::admissionregistration::v1::{MutatingWebhookConfiguration, ValidatingWebhookConfiguration};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{Namespace, Pod, Secret};
use kube::api::{Api, DeleteParams, Patch, PatchParams, PostParams};
use kube::{Client, ResourceExt};
use redis::AsyncCommands;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::certificate::{ServerCertificate, authority};
use crate::control_plane::{ControlPlane, Options};
use crate::endpoint::https;
use crate::helm::{Helm, RELEASE};
use crate::metrics::Metrics;
use crate::pods;
use crate::process::scratch_path;
use crate::redis::{RedisServer, policy_word};
use crate::release::Options as Settings;
use crate::wait::{SOON, until_true};

/// The webhook's Deployment, Service and ServiceAccount.
pub const WEBHOOK: &str = "spot-balancer-webhook";
/// The reconciler's.
pub const RECONCILER: &str = "spot-balancer-reconciler";
/// The Secret with the admission tokens.
pub const TOKENS: &str = "spot-balancer-webhook-token";
/// The Secret with the certificate that Helm has made for the webhook.
pub const CERTIFICATE: &str = "spot-balancer-webhook-helm-tls";
/// Where jobs run; that of the reviews in `reviews`.
pub const JOBS: &str = "sandbox";

/// A control plane of the test's own, made ready for a release, with these namespaces besides.
pub async fn cluster(options: Options, namespaces: &[&str]) -> Result<(ControlPlane, Helm)> {
    let plane = ControlPlane::start(options).await?;
    let helm = prepare(&plane, namespaces).await?;
    Ok((plane, helm))
}

/// Makes the namespace of the release and these, and starts Helm for this cluster.
pub async fn prepare(plane: &ControlPlane, namespaces: &[&str]) -> Result<Helm> {
    let all = Api::<Namespace>::all(plane.client()?);
    for name in [RELEASE, "kube-system"].iter().chain(namespaces) {
        // Newer apiservers write the label by themselves.
        let namespace = json!({
            "apiVersion": "v1", "kind": "Namespace",
            "metadata": {"name": name, "labels": {"kubernetes.io/metadata.name": name}},
        });
        all.patch(name, &PatchParams::apply("tests"), &Patch::Apply(&namespace)).await?;
    }
    Helm::of(plane.kubeconfig()).await
}

/// One of the release's Deployments.
pub async fn deployment(client: &Client, name: &str) -> Result<Value> {
    Ok(serde_json::to_value(Api::<Deployment>::namespaced(client.clone(), RELEASE).get(name).await?)?)
}

/// The variables of a Deployment's container that have literal values.
pub fn environment(deployment: &Value) -> BTreeMap<String, String> {
    let variables = deployment["spec"]["template"]["spec"]["containers"][0]["env"].as_array();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    variables.into_iter().flatten().map(|variable| (text(&variable["name"]), text(&variable["value"]))).collect()
}

/// The admission tokens of the installed release, as a pod's file has them.
pub async fn tokens(client: &Client) -> Result<String> {
    let secret = Api::<Secret>::namespaced(client.clone(), RELEASE).get(TOKENS).await?;
    let ByteString(tokens) = secret.data.unwrap_or_default().remove("tokens").context("no tokens")?;
    Ok(String::from_utf8(tokens)?)
}

/// The installed certificate of the webhook and its key, in files as a pod has them.
pub async fn certificate(client: &Client) -> Result<ServerCertificate> {
    let secret = Api::<Secret>::namespaced(client.clone(), RELEASE).get(CERTIFICATE).await?;
    let files = ServerCertificate { path: scratch_path("tls.crt")?, key_path: scratch_path("tls.key")? };
    for (name, path) in [("tls.crt", &files.path), ("tls.key", &files.key_path)] {
        let content = secret.data.as_ref().and_then(|data| data.get(name)).with_context(|| format!("no {name}"))?;
        std::fs::write(path, &content.0)?;
    }
    Ok(files)
}

/// The path at which the installed configurations, both of them, call the webhook: the token's too, if there is one.
pub async fn review_paths(client: &Client) -> Result<[String; 2]> {
    async fn path<T>(client: &Client) -> Result<String>
    where
        T: kube::Resource<DynamicType = ()> + Clone + DeserializeOwned + Serialize + std::fmt::Debug,
    {
        let configuration = serde_json::to_value(Api::<T>::all(client.clone()).get(RELEASE).await?)?;
        let path = &configuration["webhooks"][0]["clientConfig"]["service"]["path"];
        Ok(path.as_str().with_context(|| format!("no path: {configuration}"))?.to_owned())
    }
    Ok([path::<MutatingWebhookConfiguration>(client).await?, path::<ValidatingWebhookConfiguration>(client).await?])
}

/// What a program starts with as the installed Deployment runs it: its environment, and the token of its
/// account. Only what a pod's network and volumes would give is this machine's.
pub async fn as_deployed(plane: &ControlPlane, name: &str, command: &str, redis: &RedisServer) -> Result<Settings> {
    let deployment = deployment(&plane.client()?, name).await?;
    let pod = &deployment["spec"]["template"]["spec"];
    let container = &pod["containers"][0];
    ensure!(container["command"] == json!([command]) && container["args"].is_null(), "{container}");
    let account = pod["serviceAccountName"].as_str().context("no account")?;
    let mut settings = Settings::default().kubeconfig(&plane.kubeconfig_of(RELEASE, account).await?);
    let environment = environment(&deployment);
    for (variable, value) in &environment {
        if variable == "ADMISSION_TOKEN_PATH" {
            let path = scratch_path("tokens")?;
            std::fs::write(&path, tokens(&plane.client()?).await?)?;
            settings = settings.env(variable, path);
        } else if !matches!(variable.as_str(), "PORT" | "ADMIN_PORT" | "TLS_CERT_PATH" | "TLS_KEY_PATH" | "REDIS_URL") {
            settings = settings.env(variable, value);
        }
    }
    if environment["STORE"] == "redis" { settings.redis(redis) } else { Ok(settings) }
}

/// Has the installed webhook configurations call the process on this port instead of the Service, under
/// names of this `round`.
pub async fn lead(plane: &ControlPlane, port: u16, round: &str) -> Result<()> {
    async fn lead<T>(client: &Client, port: u16, round: &str) -> Result<()>
    where
        T: kube::Resource<DynamicType = ()> + Clone + DeserializeOwned + Serialize + std::fmt::Debug,
    {
        let api = Api::<T>::all(client.clone());
        let mut configuration = serde_json::to_value(api.get(RELEASE).await?)?;
        let webhook = &mut configuration["webhooks"][0];
        let path = webhook["clientConfig"]["service"]["path"].as_str().context("no path")?;
        let bundle = ByteString(authority()?.pem.clone().into_bytes());
        webhook["clientConfig"] = json!({"url": format!("{}{path}", https(port)), "caBundle": bundle});
        webhook["name"] = format!("{round}.{}", webhook["name"].as_str().context("no name")?).into();
        api.replace(RELEASE, &PostParams::default(), &serde_json::from_value(configuration)?).await?;
        Ok(())
    }
    let client = plane.client()?;
    lead::<MutatingWebhookConfiguration>(&client, port, round).await?;
    lead::<ValidatingWebhookConfiguration>(&client, port, round).await
}

/// The same, and waits until the apiserver follows them.
pub async fn point(plane: &ControlPlane, port: u16, round: &str) -> Result<()> {
    let client = plane.client()?;
    // There before, so that it can be deleted.
    let probe = pods::executor(&format!("probe-{round}"), 1);
    let name = probe.post(&client, JOBS).await?.pod()?.name_any();
    lead(plane, port, round).await?;
    let pods = Api::<Pod>::namespaced(client.clone(), JOBS);
    for (what, webhook) in [("place", "mutating"), ("release", "validating")] {
        until_true(SOON, &format!("the {webhook} webhook to be called"), async || {
            if what == "place" {
                pods::executor("probe", 2).dry_run(&client, JOBS).await?;
            } else {
                pods.delete(&name, &DeleteParams::default().dry_run()).await?;
            }
            let count = "apiserver_admission_webhook_admission_duration_seconds_count";
            let label = format!("{round}.{what}.spot-balancer.local");
            Ok(Metrics::of(&client).await?.sum(count, &[("name", &label)]).is_some())
        })
        .await?;
    }
    pods::remove(&pods, &name).await?;
    Ok(())
}

/// Values of a release for the jobs in [`JOBS`], with a log that people read.
pub fn in_sandbox() -> Value {
    json!({"certificates": {"source": "helm"}, "namespaces": {"names": [JOBS]}, "settings": {"logFormat": "text"}})
}

/// The driver's ratio in the ledger, and how many executors it counts.
pub async fn ledger(redis: &RedisServer, job: &str) -> Result<(Option<String>, u32, u32)> {
    let key = format!("exec-count:{{{JOBS}:{job}}}");
    let (policy, spot, on_demand): (Option<String>, Option<u32>, Option<u32>) =
        redis.connection().await?.hmget(key, &["policy", "spot", "on-demand"]).await?;
    Ok((policy_word(policy.as_deref(), "spot-ratio"), spot.unwrap_or(0), on_demand.unwrap_or(0)))
}
