//! The second scheduler of `deploy/scheduler`, with the rights of its manifest, next to the default one.

#![allow(clippy::indexing_slicing, reason = "JSON is read by index; a panic here fails a test, as it should")]

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use balancer_tests::certificate::authority;
use balancer_tests::control_plane::{ControlPlane, Options, Plane};
use balancer_tests::endpoint::{self, https};
use balancer_tests::helm::{object, objects, repository};
use balancer_tests::nodes::CAPACITY;
use balancer_tests::parts::program;
use balancer_tests::pods::PodBuilder;
use balancer_tests::process::{Process, scratch_path};
use balancer_tests::scenario::{Counts, REPAIRED, Scenario, strict};
use balancer_tests::scheduling::node_of;
use balancer_tests::wait::SOON;
use balancer_tests::{need, pods, port};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::Node;
use kube::Client;
use kube::api::{Api, Patch, PatchParams};
use serde_json::{Value, json};

/// The scheduler's name, that of its objects and of its Lease.
const NAME: &str = "spot-balancer-packing";
/// How many executors a node has room for.
const ROOM: usize = 8;

fn manifest() -> Result<String> {
    Ok(std::fs::read_to_string(repository("deploy/scheduler/packing.yaml"))?)
}

/// The configuration in the manifest.
fn config() -> Result<Value> {
    let manifest = objects(&manifest()?)?;
    let text = object(&manifest, "ConfigMap", NAME)?["data"]["config.yaml"].as_str().context("no config")?;
    Ok(objects(text)?.remove(0))
}

/// The same configuration for Kubernetes 1.20, whose scheduler knows only an older form: the strategy of
/// NodeResourcesFit is a plugin of its own there, and a plugin gets another weight by being disabled and enabled.
fn config_of_1_20(mut config: Value) -> Result<Value> {
    ensure!(config["apiVersion"] == "kubescheduler.config.k8s.io/v1");
    config["apiVersion"] = "kubescheduler.config.k8s.io/v1beta1".into();
    let profile = &mut config["profiles"][0];
    let arguments = profile["pluginConfig"].as_array_mut().context("no pluginConfig")?;
    let fit =
        arguments.iter().position(|plugin| plugin["name"] == "NodeResourcesFit").context("no NodeResourcesFit")?;
    let fit = &mut arguments[fit];
    let mut strategy = fit["args"]["scoringStrategy"].take();
    ensure!(strategy["type"] == "MostAllocated", "{strategy}");
    *fit = json!({"name": "NodeResourcesMostAllocated", "args": {"resources": strategy["resources"].take()}});
    let score = &mut profile["plugins"]["score"];
    let again = score["enabled"].as_array().cloned().unwrap_or_default();
    let disabled = score["disabled"].as_array_mut().context("nothing is disabled")?;
    disabled.extend(again.iter().map(|plugin| json!({"name": plugin["name"]})));
    disabled.push(json!({"name": "NodeResourcesLeastAllocated"}));
    let enabled = score["enabled"].as_array_mut().context("nothing is enabled")?;
    enabled.push(json!({"name": "NodeResourcesMostAllocated", "weight": 1}));
    Ok(config)
}

/// Applies the manifest, as far as this version of Kubernetes knows it.
async fn apply(plane: &ControlPlane) -> Result<()> {
    let manifest = manifest()?;
    let old = plane.minor_version().await? < 21;
    let manifest = if old { manifest.replace("policy/v1\n", "policy/v1beta1\n") } else { manifest };
    let path = scratch_path("packing.yaml")?;
    std::fs::write(&path, manifest)?;
    let mut kubectl = Command::new(program("kubectl")?);
    kubectl.env_clear().env("HOME", scratch_path("kubectl")?).env("KUBECONFIG", plane.kubeconfig());
    let output = kubectl.args(["apply", "--filename"]).arg(&path).output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// Starts the scheduler of the manifest, as its ServiceAccount.
async fn start(plane: &ControlPlane) -> Result<Process> {
    let account = plane.kubeconfig_of(NAME, NAME).await?;
    let mut config = config()?;
    if plane.minor_version().await? < 25 {
        config = config_of_1_20(config)?;
        // Before 1.23 it serves plain HTTP too.
        let address = format!("127.0.0.1:{}", port::free()?);
        config["healthzBindAddress"] = address.clone().into();
        config["metricsBindAddress"] = address.into();
    }
    // In a pod it finds the apiserver by itself.
    config["clientConnection"] = json!({"kubeconfig": account});
    let path = scratch_path("scheduler.json")?;
    std::fs::write(&path, config.to_string())?;
    let (port, certificate) = (port::free()?, authority()?.issue()?);
    let mut scheduler = Process::start(&program("kube-scheduler")?, |command| {
        let argument = |name: &str, value: &Path| format!("--{name}={}", value.display());
        command
            .arg(argument("config", &path))
            .arg(argument("authentication-kubeconfig", &account))
            .arg(argument("authorization-kubeconfig", &account))
            .arg(argument("tls-cert-file", &certificate.path))
            .arg(argument("tls-private-key-file", &certificate.key_path))
            .args(["--bind-address=127.0.0.1".to_owned(), format!("--secure-port={port}")]);
    })?;
    let client = endpoint::client(&https(port))?;
    scheduler.until_ok(SOON, &client, "/healthz").await?;
    Ok(scheduler)
}

/// Makes nodes with room for [`ROOM`] executors, `<type>-0` and on.
async fn nodes(client: &Client, capacity: &str, instance_type: &str, count: usize) -> Result<()> {
    let nodes = Api::<Node>::all(client.clone());
    let room = json!({"cpu": ROOM.to_string(), "memory": "64Gi", "pods": "110"});
    for number in 0..count {
        let name = format!("{instance_type}-{number}");
        let labels = json!({
            CAPACITY: capacity, "kubernetes.io/hostname": name, "spark-role": "executor", "node.kubernetes.io/instance-type": instance_type,
        });
        let conditions = json!([{"type": "Ready", "status": "True", "reason": "Simulated"}]);
        let node = json!({
            "apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": labels},
            "status": {"capacity": room, "allocatable": room, "conditions": conditions},
        });
        let params = PatchParams::apply("tests");
        nodes.patch(&name, &params, &Patch::Apply(&node)).await?;
        nodes.patch_status(&name, &params, &Patch::Apply(&node)).await?;
    }
    Ok(())
}

/// An executor for the scheduler of the manifest, by what `spark.kubernetes.executor.scheduler.name` writes.
fn packed(job: &str, id: u32) -> PodBuilder {
    pods::executor(job, id).with(|pod| pod["spec"]["schedulerName"] = NAME.into())
}

/// Makes executors one after the other, as one driver does, and counts those on each node.
async fn run(scenario: &Scenario, executors: impl IntoIterator<Item = PodBuilder>) -> Result<BTreeMap<String, usize>> {
    let mut on = BTreeMap::new();
    let mut job = None;
    for executor in executors {
        job = executor.value()["metadata"]["labels"][pods::JOB_ID_LABEL].as_str().map(str::to_owned);
        scenario.post(&executor).await?.pod()?;
    }
    let job = job.context("no executors")?;
    if let Err(error) = scenario.until_bound(&job).await {
        let waits = scenario.live(&job).await?.into_iter().filter(|pod| node_of(pod).is_none());
        let why = waits.map(|pod| json!({"spec": pod.spec, "status": pod.status}).to_string());
        return Err(error.context(why.collect::<Vec<_>>().join("\n")));
    }
    for pod in scenario.live(&job).await? {
        *on.entry(node_of(&pod).context("not bound")?.to_owned()).or_default() += 1;
    }
    Ok(on)
}

/// Makes the driver of a job on a node of its own, so that it takes no room from executors.
async fn driver(scenario: &Scenario, job: &str, annotations: &[(&str, &str)]) -> Result<()> {
    let driver = pods::driver(job).on_node("drivers-0");
    let driver = annotations.iter().fold(driver, |driver, (key, value)| driver.annotation(key, value));
    scenario.post(&driver).await?.pod()?;
    Ok(())
}

#[test]
fn the_scheduler_has_one_name_and_elects_by_its_own_lease() -> Result<()> {
    let (manifest, config) = (objects(&manifest()?)?, config()?);
    assert_eq!(config["profiles"].as_array().map(Vec::len), Some(1));
    assert_eq!(config["profiles"][0]["schedulerName"], NAME);
    let election = &config["leaderElection"];
    assert_eq!((&election["resourceName"], &election["resourceNamespace"]), (&json!(NAME), &json!(NAME)));
    let leases = object(&manifest, "Role", NAME)?["rules"].as_array().context("no rules")?;
    assert_eq!(leases[1]["resourceNames"], json!([NAME]));
    let pod = &object(&manifest, "Deployment", NAME)?["spec"]["template"]["spec"];
    let container = &pod["containers"][0];
    assert_eq!(pod["securityContext"]["runAsNonRoot"], true);
    assert_eq!(container["securityContext"]["readOnlyRootFilesystem"], true);
    assert_eq!(container["args"], json!(["--config=/config/config.yaml"]));
    assert_eq!(container["volumeMounts"][0]["mountPath"], "/config");
    for other in &manifest {
        let bound = other["subjects"].as_array().into_iter().flatten();
        for subject in bound {
            assert_eq!((&subject["name"], &subject["namespace"]), (&json!(NAME), &json!(NAME)), "{other}");
        }
    }
    Ok(())
}

#[tokio::test]
async fn executors_are_packed_and_keep_ratio_preferences_and_caps() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Kubectl, Webhook, Reconciler);
    let plane = ControlPlane::start(Options { scheduler: true, ..Options::default() }).await?;
    let client = plane.client()?;
    apply(&plane).await?;
    let scheduler = start(&plane).await?;
    for (capacity, instance_type, count) in
        [("spot", "m5", 4), ("spot", "c5", 2), ("on-demand", "r5", 4), ("on-demand", "drivers", 1)]
    {
        nodes(&client, capacity, instance_type, count).await?;
    }
    let mut scenario = Scenario::without_nodes(Plane::Own(Box::new(plane)), "packing").await?;
    scenario.serve(1, &strict()).await?;

    // Packed, half on spot.
    driver(&scenario, "packed", &[("workload/spot-ratio", "0.5")]).await?;
    let on = run(&scenario, (1..=12).map(|id| packed("packed", id))).await?;
    assert_eq!(on.values().copied().collect::<Vec<_>>(), [6, 6], "one node of each capacity: {on:?}");
    let counts = scenario.until_ledger_matches_pods("packed", REPAIRED).await?;
    assert_eq!(counts, Counts { spot: 6, on_demand: 6 });

    // The default scheduler goes on to spread the others.
    driver(&scenario, "spread", &[("workload/spot-ratio", "1")]).await?;
    let on = run(&scenario, (1..=10).map(|id| pods::executor("spread", id))).await?;
    ensure!(on.len() >= 4, "spread over the nodes: {on:?}");

    // A preference of the pod outweighs the fullest node, even one of several preferences.
    ensure!(on.keys().any(|node| node.starts_with("m5")), "{on:?}");
    let prefers_others = |pod: PodBuilder| {
        let not_in = json!({"key": "node.kubernetes.io/instance-type", "operator": "NotIn", "values": ["m5"]});
        let spot = json!({"key": CAPACITY, "operator": "In", "values": ["spot"]});
        let term = |expressions: Value| json!({"weight": 100, "preference": {"matchExpressions": expressions}});
        pod.with(|pod| {
            pod["spec"]["affinity"]["nodeAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"] =
                json!([term(json!([spot])), term(json!([spot, not_in]))]);
        })
    };
    driver(&scenario, "steered", &[("workload/spot-ratio", "1")]).await?;
    let on = run(&scenario, (1..=4).map(|id| prefers_others(packed("steered", id)))).await?;
    ensure!(on.keys().all(|node| node.starts_with("c5")), "{on:?}");

    // A cap holds, although each node with room is fuller than the last one. As many nodes as before 1.27 need stay empty.
    driver(&scenario, "capped", &[("workload/spot-ratio", "1")]).await?;
    let capped = |id| packed("capped", id).annotation("workload/max-executors-per-node", "2");
    let on = run(&scenario, (1..=6).map(capped)).await?;
    assert_eq!(on.values().copied().collect::<Vec<_>>(), [2, 2, 2], "{on:?}");

    let lease = Api::<Lease>::namespaced(client.clone(), NAME).get(NAME).await?;
    ensure!(lease.spec.is_some_and(|spec| spec.holder_identity.is_some()), "nobody holds the Lease");
    let log = scheduler.log()?;
    ensure!(!log.contains("forbidden"), "{log}");
    Ok(())
}
