//! `helm test`, on a real apiserver: its pod runs as a process of this machine.

#![allow(clippy::indexing_slicing, reason = "JSON is read by index; a panic here fails a test, as it should")]

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use balancer_tests::control_plane::{ControlPlane, Options};
use balancer_tests::deployed::{JOBS, WEBHOOK, as_deployed, cluster, environment, in_sandbox, point};
use balancer_tests::helm::{Helm, RELEASE};
use balancer_tests::parts::program;
use balancer_tests::process::Process;
use balancer_tests::redis::RedisServer;
use balancer_tests::wait::{SOON, until};
use balancer_tests::webhook::Webhook;
use balancer_tests::{need, pods};
use k8s_openapi::api::core::v1::{Pod, ServiceAccount};
use k8s_openapi::api::rbac::v1::{Role, RoleBinding};
use kube::Client;
use kube::api::{Api, ListParams};
use serde_json::{Value, json};

const POD: &str = "spot-balancer-test";

/// Runs the pod of a test as soon as Helm has created it, as its account and with its settings alone, and reports how it
/// ended. Returns what it printed.
async fn run_pod(plane: &ControlPlane) -> Result<String> {
    let api = Api::<Pod>::namespaced(plane.client()?, RELEASE);
    let pod: Value = until(SOON, "the pod of the test", async || {
        let pod = api.get_opt(POD).await?.map(serde_json::to_value).transpose()?;
        Ok(pod.filter(|pod| pod["status"]["phase"] == "Pending"))
    })
    .await?;
    let container = &pod["spec"]["containers"][0];
    let command: Vec<String> = serde_json::from_value(container["command"].clone())?;
    assert_eq!(command, ["/balancer-webhook", "--test-admission", JOBS]);
    let account = pod["spec"]["serviceAccountName"].as_str().context("no account")?;
    let kubeconfig = plane.kubeconfig_of(RELEASE, account).await?;
    let settings = environment(&json!({"spec": {"template": {"spec": pod["spec"]}}}));
    let mut process = Process::start(&program("balancer-webhook")?, |process| {
        process.args(command.iter().skip(1)).envs(settings).env("KUBECONFIG", kubeconfig);
    })?;
    let status = process.ended(Duration::from_secs(60)).await?;
    pods::set_phase(&api, POD, if status.success() { "Succeeded" } else { "Failed" }).await?;
    process.log()
}

/// `helm test` with a stand-in for the node on which its pod runs: Helm's own result, and what the pod printed.
async fn test(helm: &mut Helm, plane: &ControlPlane) -> Result<(Result<String>, String)> {
    let (tested, printed) = tokio::join!(helm.test(), run_pod(plane));
    Ok((tested, printed?))
}

/// This version of Helm deletes the account of a test and its rights, whether the test passes or fails.
async fn nothing_may_create_pods(client: &Client) -> Result<()> {
    let role = Api::<Role>::namespaced(client.clone(), JOBS).get_opt(POD).await?;
    let binding = Api::<RoleBinding>::namespaced(client.clone(), JOBS).get_opt(POD).await?;
    let account = Api::<ServiceAccount>::namespaced(client.clone(), RELEASE).get_opt(POD).await?;
    ensure!(role.is_none() && binding.is_none() && account.is_none(), "{role:?} {binding:?} {account:?} stay");
    Ok(())
}

#[tokio::test]
async fn helm_test_passes_where_executors_are_placed_and_leaves_its_pod_alone() -> Result<()> {
    need!(Helm, ControlPlane, Redis, Webhook);
    let (plane, mut helm) = cluster(Options::default(), &[JOBS]).await?;
    let client = plane.client()?;
    helm.install(&in_sandbox()).await?;
    assert!(helm.notes().await?.contains("helm test spot-balancer --namespace spot-balancer"));
    let hooks = helm.hooks().await?;
    let kinds: Vec<&Value> = hooks.iter().map(|hook| &hook["kind"]).collect();
    ensure!(kinds.len() == 4, "{kinds:?}");

    // Nothing answers at the Service.
    let (tested, printed) = test(&mut helm, &plane).await?;
    ensure!(tested.is_err() && printed.contains("did not change an executor"), "{tested:?} {printed}");
    nothing_may_create_pods(&client).await.context("after a test that failed")?;
    let redis = RedisServer::start().await?;
    let webhook = Webhook::start(as_deployed(&plane, WEBHOOK, "/balancer-webhook", &redis).await?).await?;
    point(&plane, webhook.port, "tested").await?;
    let (tested, printed) = test(&mut helm, &plane).await?;
    tested.with_context(|| printed.clone())?;
    ensure!(printed.lines().count() == 1 && printed.contains("workload/capacity-type=on-demand"), "{printed}");
    let all = ListParams::default();
    ensure!(Api::<Pod>::namespaced(client.clone(), JOBS).list(&all).await?.items.is_empty(), "an executor was created");
    nothing_may_create_pods(&client).await.context("after a test that passed")
}

#[tokio::test]
async fn there_is_a_test_only_if_a_namespace_is_known() -> Result<()> {
    need!(Helm, ControlPlane);
    let (_plane, mut helm) = cluster(Options::default(), &[JOBS]).await?;
    let by_helm = |namespaces: Value, test: Value| json!({"certificates": {"source": "helm"}, "namespaces": namespaces, "helmTest": test});
    helm.install(&by_helm(json!({"all": true}), json!({}))).await?;
    for (namespaces, test, there_is) in [
        (json!({"all": true}), json!({}), false),
        (json!({"all": true}), json!({"namespace": JOBS}), true),
        (json!({"names": [JOBS]}), json!({}), true),
        (json!({"names": [JOBS]}), json!({"enabled": false}), false),
    ] {
        let what = format!("{namespaces} {test}");
        helm.upgrade(&by_helm(namespaces, test)).await?;
        assert_eq!(!helm.hooks().await?.is_empty(), there_is, "{what}");
        assert_eq!(helm.notes().await?.contains("helm test "), there_is, "{what}");
    }
    Ok(())
}
