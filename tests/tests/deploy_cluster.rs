//! The chart on a real apiserver, and the programs as it runs them.

#![allow(clippy::indexing_slicing, reason = "JSON is read by index; a panic here fails a test, as it should")]

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Deref;
use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use balancer_tests::certificate::authority;
use balancer_tests::control_plane::{ControlPlane, Options};
use balancer_tests::endpoint::{self, https};
use balancer_tests::helm::{Helm, RELEASE, every_option, repository};
use balancer_tests::metrics::Metrics;
use balancer_tests::parts::program;
use balancer_tests::process::scratch_path;
use balancer_tests::reconciler::Reconciler;
use balancer_tests::redis::RedisServer;
use balancer_tests::release::{Options as Settings, Release};
use balancer_tests::wait::{until, until_true};
use balancer_tests::webhook::Webhook;
use balancer_tests::{need, nodes, pods, reviews, stand_ins};
use k8s_openapi::ByteString;
use k8s_openapi::api::admissionregistration::v1::{MutatingWebhookConfiguration, ValidatingWebhookConfiguration};
use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet};
use k8s_openapi::api::authorization::v1::SubjectAccessReview;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{Namespace, Pod, Secret};
use k8s_openapi::api::events::v1::Event;
use kube::api::{Api, DeleteParams, DynamicObject, ListParams, Patch, PatchParams, PostParams};
use kube::discovery::{Discovery, verbs};
use kube::{Client, ResourceExt};
use redis::AsyncCommands;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(60);
const WEBHOOK: &str = "spot-balancer-webhook";
const RECONCILER: &str = "spot-balancer-reconciler";
/// Where jobs run; that of the reviews in `reviews`.
const JOBS: &str = "sandbox";

/// A control plane of the test's own, with the namespace of the release and others.
async fn cluster(options: Options, namespaces: &[&str]) -> Result<(ControlPlane, Helm)> {
    let plane = ControlPlane::start(options).await?;
    let all = Api::<Namespace>::all(plane.client()?);
    for name in [RELEASE, "kube-system"].iter().chain(namespaces) {
        // Newer apiservers write the label by themselves.
        let namespace = json!({
            "apiVersion": "v1", "kind": "Namespace",
            "metadata": {"name": name, "labels": {"kubernetes.io/metadata.name": name}},
        });
        all.patch(name, &PatchParams::apply("tests"), &Patch::Apply(&namespace)).await?;
    }
    let helm = Helm::of(plane.kubeconfig()).await?;
    Ok((plane, helm))
}

/// All objects of the cluster that have to do with the release, but Events.
async fn of_the_release(client: &Client) -> Result<BTreeSet<String>> {
    let mut found = BTreeSet::new();
    for group in Discovery::new(client.clone()).run().await?.groups() {
        for (resource, capabilities) in group.recommended_resources() {
            if !capabilities.supports_operation(verbs::LIST) || matches!(resource.kind.as_str(), "Event" | "Namespace")
            {
                continue;
            }
            for object in Api::<DynamicObject>::all_with(client.clone(), &resource).list(&ListParams::default()).await?
            {
                let name = object.name_any();
                if name.contains(RELEASE) {
                    found.insert(format!("{} {} {name}", resource.kind, object.namespace().unwrap_or_default()));
                }
            }
        }
    }
    Ok(found)
}

async fn until_nothing_is_left(client: &Client) -> Result<()> {
    let mut left = BTreeSet::new();
    let gone = until_true(SOON, "the release to be gone", async || {
        left = of_the_release(client).await?;
        Ok(left.is_empty())
    });
    gone.await.with_context(|| format!("left behind: {left:?}"))
}

async fn deployment(client: &Client, name: &str) -> Result<Value> {
    Ok(serde_json::to_value(Api::<Deployment>::namespaced(client.clone(), RELEASE).get(name).await?)?)
}

/// The variables of a Deployment's container that are told by value.
fn environment(deployment: &Value) -> BTreeMap<String, String> {
    let variables = deployment["spec"]["template"]["spec"]["containers"][0]["env"].as_array();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    variables.into_iter().flatten().map(|variable| (text(&variable["name"]), text(&variable["value"]))).collect()
}

fn by_helm(preference: &str) -> Value {
    json!({"certificates": {"source": "helm"}, "settings": {"spotPreference": preference}})
}

/// Waits until the Deployment controller wants pods with this preference, and no others.
async fn until_rolled_out(client: &Client, preference: &str) -> Result<()> {
    for name in [WEBHOOK, RECONCILER] {
        assert_eq!(environment(&deployment(client, name).await?)["SPOT_PREFERENCE"], preference);
        until_true(SOON, &format!("{name} with {preference} to be rolled out"), async || {
            let sets = Api::<ReplicaSet>::namespaced(client.clone(), RELEASE).list(&ListParams::default()).await?;
            Ok(sets.items.iter().any(|set| {
                let set = serde_json::to_value(set).unwrap_or_default();
                set["metadata"]["ownerReferences"][0]["name"] == name
                    && set["spec"]["replicas"].as_u64().is_some_and(|replicas| replicas > 0)
                    && environment(&set)["SPOT_PREFERENCE"] == preference
            }))
        })
        .await?;
    }
    Ok(())
}

/// The CA in each of the webhook configurations.
async fn bundles(client: &Client) -> Result<Vec<Vec<u8>>> {
    let mutating = Api::<MutatingWebhookConfiguration>::all(client.clone()).get(RELEASE).await?;
    let validating = Api::<ValidatingWebhookConfiguration>::all(client.clone()).get(RELEASE).await?;
    let mutating = mutating.webhooks.into_iter().flatten().map(|webhook| webhook.client_config);
    let validating = validating.webhooks.into_iter().flatten().map(|webhook| webhook.client_config);
    Ok(mutating.chain(validating).filter_map(|config| config.ca_bundle).map(|ByteString(bytes)| bytes).collect())
}

#[tokio::test]
async fn a_release_is_installed_upgraded_rolled_back_and_uninstalled_without_a_trace() -> Result<()> {
    need!(Helm, ControlPlane, ControllerManager);
    let options = Options { controller_manager: true, ..Options::default() };
    let (plane, mut helm) = cluster(options, &["jobs-a", "jobs-b"]).await?;
    let client = plane.client()?;

    let refusal = helm.install(&json!({})).await.err().context("installed without cert-manager")?;
    assert!(format!("{refusal:#}").contains("Install cert-manager first"), "{refusal:#}");
    until_nothing_is_left(&client).await?;

    helm.install(&by_helm("BEST_EFFORT")).await?;
    let notes = helm.notes().await?;
    assert!(notes.contains("rollout status deployment/spot-balancer-webhook"), "{notes}");
    assert!(notes.contains("annotation.workload/spot-ratio=0.7"), "{notes}");
    until_rolled_out(&client, "BEST_EFFORT").await?;
    let authority = bundles(&client).await?;
    assert_eq!(authority.len(), 2);
    let secret = Api::<Secret>::namespaced(client.clone(), RELEASE).get("spot-balancer-webhook-tls").await?;
    assert_eq!(secret.data.context("no data")?["ca.crt"].0, authority[0]);
    helm.upgrade(&by_helm("STRICT")).await?;
    until_rolled_out(&client, "STRICT").await?;
    assert_eq!(bundles(&client).await?, authority, "an upgrade keeps the CA");
    helm.rollback(1).await?;
    until_rolled_out(&client, "BEST_EFFORT").await?;
    assert_eq!(bundles(&client).await?, authority, "a rollback keeps the CA");
    helm.uninstall().await?;
    until_nothing_is_left(&client).await?;

    stand_ins::define(&client).await?;
    helm.install(&json!({})).await.context("the defaults")?;
    helm.upgrade(&every_option()).await.context("every option")?;
    helm.upgrade(&json!({"store": "memory"})).await.context("the memory store")?;
    assert!(Api::<Deployment>::namespaced(client.clone(), RELEASE).get_opt(RECONCILER).await?.is_none());
    helm.upgrade(&json!({})).await.context("the defaults again")?;
    helm.uninstall().await?;
    until_nothing_is_left(&client).await
}

/// Says of all Deployments of the release that they are ready, as where there are machines.
async fn keep_ready(client: Client) -> Result<()> {
    let deployments = Api::<Deployment>::namespaced(client, RELEASE);
    loop {
        for deployment in deployments.list(&ListParams::default()).await? {
            let replicas = deployment.spec.as_ref().and_then(|spec| spec.replicas);
            let status = json!({"status": {
                "observedGeneration": deployment.metadata.generation,
                "replicas": replicas, "updatedReplicas": replicas, "readyReplicas": replicas,
                "availableReplicas": replicas,
                "conditions": [
                    {"type": "Available", "status": "True"},
                    {"type": "Progressing", "status": "True", "reason": "NewReplicaSetAvailable"},
                ],
            }});
            let name = deployment.name_any();
            // Gone in the meantime, or not.
            let _ = deployments.patch_status(&name, &PatchParams::default(), &Patch::Merge(&status)).await;
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

#[tokio::test]
async fn helm_4_does_the_same_by_applying_on_the_servers_side() -> Result<()> {
    need!(Helm, ControlPlane);
    let (plane, mut helm) = cluster(Options::default(), &[]).await?;
    let client = plane.client()?;
    helm.version = "v4";
    let life = async {
        helm.install(&by_helm("BEST_EFFORT")).await?;
        let authority = bundles(&client).await?;
        for (step, preference) in [("upgrade", "STRICT"), ("rollback", "BEST_EFFORT")] {
            match step {
                "upgrade" => drop(helm.upgrade(&by_helm(preference)).await.context(step)?),
                _ => helm.rollback(1).await.context(step)?,
            }
            for name in [WEBHOOK, RECONCILER] {
                assert_eq!(environment(&deployment(&client, name).await?)["SPOT_PREFERENCE"], preference, "{step}");
            }
            assert_eq!(bundles(&client).await?, authority, "{step}");
        }
        helm.uninstall().await?;
        until_nothing_is_left(&client).await
    };
    tokio::select! {
        lived = life => lived,
        ended = keep_ready(client.clone()) => ended,
    }
}

/// What a program starts with as the installed Deployment runs it: its environment, and the token of its
/// account. Only what a pod's network and volumes would give is this machine's.
async fn as_deployed(plane: &ControlPlane, name: &str, command: &str, redis: &RedisServer) -> Result<Settings> {
    let deployment = deployment(&plane.client()?, name).await?;
    let pod = &deployment["spec"]["template"]["spec"];
    let container = &pod["containers"][0];
    ensure!(container["command"] == json!([command]) && container["args"].is_null(), "{container}");
    let account = pod["serviceAccountName"].as_str().context("no account")?;
    let mut settings = Settings::default().kubeconfig(&plane.kubeconfig_of(RELEASE, account).await?);
    let environment = environment(&deployment);
    for (variable, value) in &environment {
        if !matches!(variable.as_str(), "PORT" | "ADMIN_PORT" | "TLS_CERT_PATH" | "TLS_KEY_PATH" | "REDIS_URL") {
            settings = settings.env(variable, value);
        }
    }
    if environment["STORE"] == "redis" { settings.redis(redis) } else { Ok(settings) }
}

/// Has the installed webhook configurations call the process on this port instead of the Service, under
/// names of this `round`, and waits until the apiserver follows them.
async fn point(plane: &ControlPlane, port: u16, round: &str) -> Result<()> {
    async fn point<T>(client: &Client, port: u16, path: &str, round: &str) -> Result<()>
    where
        T: kube::Resource<DynamicType = ()> + Clone + DeserializeOwned + Serialize + std::fmt::Debug,
    {
        let api = Api::<T>::all(client.clone());
        let mut configuration = serde_json::to_value(api.get(RELEASE).await?)?;
        let webhook = &mut configuration["webhooks"][0];
        ensure!(webhook["clientConfig"]["service"]["path"] == path, "{webhook}");
        let bundle = ByteString(authority()?.pem.clone().into_bytes());
        webhook["clientConfig"] = json!({"url": format!("{}{path}", https(port)), "caBundle": bundle});
        webhook["name"] = format!("{round}.{}", webhook["name"].as_str().context("no name")?).into();
        api.replace(RELEASE, &PostParams::default(), &serde_json::from_value(configuration)?).await?;
        Ok(())
    }
    let client = plane.client()?;
    // There before, so that it can be deleted.
    let probe = pods::executor(&format!("probe-{round}"), 1);
    let name = probe.post(&client, JOBS).await?.pod()?.name_any();
    point::<MutatingWebhookConfiguration>(&client, port, "/mutate", round).await?;
    point::<ValidatingWebhookConfiguration>(&client, port, "/validate", round).await?;
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

fn in_sandbox() -> Value {
    json!({"certificates": {"source": "helm"}, "namespaces": {"names": [JOBS]}, "settings": {"logFormat": "text"}})
}

/// The driver's ratio in the ledger, and how many executors it counts.
async fn ledger(redis: &RedisServer, job: &str) -> Result<(Option<String>, u32, u32)> {
    let key = format!("exec-count:{{{JOBS}:{job}}}");
    let (ratio, spot, on_demand): (_, Option<u32>, Option<u32>) =
        redis.connection().await?.hmget(key, &["ratio", "spot", "on-demand"]).await?;
    Ok((ratio, spot.unwrap_or(0), on_demand.unwrap_or(0)))
}

#[tokio::test]
async fn the_programs_work_as_the_chart_runs_them() -> Result<()> {
    need!(Helm, ControlPlane, Redis, Webhook, Reconciler);
    let (plane, mut helm) = cluster(Options::default(), &[JOBS]).await?;
    let client = plane.client()?;
    helm.install(&in_sandbox()).await?;
    let redis = RedisServer::start().await?;
    let webhook = Webhook::start(as_deployed(&plane, WEBHOOK, "/balancer-webhook", &redis).await?).await?;
    let reconciler = as_deployed(&plane, RECONCILER, "/balancer-reconcile", &redis).await?;
    let reconciler = Reconciler::start(reconciler).await?;
    until_true(SOON, "the reconciler to lead", async || reconciler.leads().await).await?;

    // A driver that is older than the webhook: its ratio has to be looked up.
    pods::driver("old").annotation("workload/spot-ratio", "0").post(&client, JOBS).await?.pod()?;
    point(&plane, webhook.port, "works").await?;
    pods::driver("etl").annotation("workload/spot-ratio", "0.8").post(&client, JOBS).await?.pod()?;
    for id in 1..=10 {
        for job in ["old", "etl"] {
            pods::executor(job, id).post(&client, JOBS).await?.pod()?;
        }
    }
    assert_eq!(ledger(&redis, "etl").await?, (Some("0.8".into()), 8, 2));
    assert_eq!(ledger(&redis, "old").await?.2, 10);
    let executors = Api::<Pod>::namespaced(client.clone(), JOBS);
    pods::remove(&executors, "etl-exec-1").await?;
    assert_eq!(ledger(&redis, "etl").await?.1, 7, "the DELETE review was answered");
    redis.flush().await?;
    until_true(SOON, "the ledger to be filled again", async || Ok(ledger(&redis, "etl").await?.1 == 7)).await?;
    // Where the executors run is known by the nodes.
    assert!(!webhook.process().log()?.contains("forbidden"), "{}", webhook.process().log()?);
    assert!(!reconciler.process().log()?.contains("forbidden"), "{}", reconciler.process().log()?);
    Ok(())
}

#[tokio::test]
async fn a_user_of_redis_with_the_documented_rights_is_enough() -> Result<()> {
    need!(Helm, ControlPlane, Redis, Webhook, Reconciler);
    let documented = std::fs::read_to_string(repository("docs/install.md"))?;
    let rights = documented.lines().find(|line| line.starts_with("~exec-")).context("no rights in docs/install.md")?;
    let redis = RedisServer::start().await?;
    let mut connection = redis.connection().await?;
    let mut user = redis::cmd("ACL");
    user.arg(&["SETUSER", "balancer", "on", ">p@ss"]);
    let () = user.arg(rights.split(' ').collect::<Vec<_>>()).query_async(&mut connection).await?;

    let (plane, mut helm) = cluster(Options::default(), &[JOBS]).await?;
    let client = plane.client()?;
    helm.install(&in_sandbox()).await?;
    let url = format!("redis://balancer:p%40ss@127.0.0.1:{}", redis.port());
    let settings = Settings::default().cluster(&plane).env("STORE", "redis").env("REDIS_URL", url);
    let webhook = Webhook::start(settings.clone()).await?;
    let reconciler = Reconciler::start(settings).await?;
    // Every call of the store: learn, place, peek, release, and what a reconciler asks.
    point(&plane, webhook.port, "user").await?;
    pods::driver("etl").annotation("workload/spot-ratio", "0.5").post(&client, JOBS).await?.pod()?;
    for id in 1..=4 {
        pods::executor("etl", id).dry_run(&client, JOBS).await?.pod()?;
        pods::executor("etl", id).post(&client, JOBS).await?.pod()?;
    }
    pods::remove(&Api::namespaced(client.clone(), JOBS), "etl-exec-1").await?;
    assert_eq!(ledger(&redis, "etl").await?, (Some("0.5".into()), 1, 2));
    redis.flush().await?;
    until_true(SOON, "the ledger to be filled again", async || Ok(ledger(&redis, "etl").await?.2 == 2)).await?;
    for page in [webhook.metrics().await?, reconciler.metrics().await?] {
        for metric in ["spot_balancer_store_errors_total", "spot_balancer_reconcile_store_errors_total"] {
            assert_eq!(page.sum(metric, &[]), None, "{}", page.0);
        }
    }
    Ok(())
}

/// One verb of one rule of an installed role.
#[derive(Debug, Clone)]
struct Allowed {
    /// ClusterRole or Role.
    kind: &'static str,
    role: String,
    rule: usize,
    verb: String,
    resource: String,
}

fn role_path(kind: &str, name: &str) -> String {
    let group = "/apis/rbac.authorization.k8s.io/v1";
    match kind {
        "Role" => format!("{group}/namespaces/{RELEASE}/roles/{name}"),
        _ => format!("{group}/clusterroles/{name}"),
    }
}

/// All that the installed roles allow.
async fn all_that_is_allowed(client: &Client) -> Result<Vec<Allowed>> {
    let mut all = Vec::new();
    for kind in ["ClusterRole", "Role"] {
        let list = endpoint::get(client, role_path(kind, "").trim_end_matches('/')).await?.json()?;
        for role in list["items"].as_array().context("no items")? {
            let name = role["metadata"]["name"].as_str().unwrap_or_default();
            if !name.starts_with(RELEASE) {
                continue;
            }
            for (number, rule) in role["rules"].as_array().into_iter().flatten().enumerate() {
                for verb in rule["verbs"].as_array().into_iter().flatten() {
                    all.push(Allowed {
                        kind,
                        role: name.to_owned(),
                        rule: number,
                        verb: verb.as_str().unwrap_or_default().to_owned(),
                        resource: rule["resources"][0].as_str().unwrap_or_default().to_owned(),
                    });
                }
            }
        }
    }
    Ok(all)
}

/// Writes a role's rules; the apiserver follows them soon.
async fn write_rules(client: &Client, allowed: &Allowed, rules: &Value) -> Result<()> {
    let body = serde_json::to_vec(&json!({"rules": rules}))?;
    let request = http::Request::patch(role_path(allowed.kind, &allowed.role))
        .header("content-type", "application/merge-patch+json")
        .body(body)?;
    client.request::<Value>(request).await?;
    Ok(())
}

/// Waits until this account is allowed, or is not, what a rule allows.
async fn until_followed(client: &Client, account: &str, allowed: &Allowed, rule: &Value, is: bool) -> Result<()> {
    let namespace = match (allowed.kind, allowed.resource.as_str()) {
        ("Role", _) => Some(RELEASE),
        (_, "nodes") => None,
        _ => Some(JOBS),
    };
    let review: SubjectAccessReview = serde_json::from_value(json!({"spec": {
        "user": format!("system:serviceaccount:{RELEASE}:{account}"),
        "resourceAttributes": {
            "group": rule["apiGroups"][0], "resource": allowed.resource, "verb": allowed.verb,
            "namespace": namespace, "name": rule["resourceNames"][0],
        },
    }}))?;
    let reviews = Api::<SubjectAccessReview>::all(client.clone());
    until_true(SOON, &format!("{allowed:?} to be {is}"), async || {
        let answer = reviews.create(&PostParams::default(), &review).await?;
        Ok(answer.status.is_some_and(|status| status.allowed == is))
    })
    .await
}

/// Runs a program as deployed, does what makes it use its rights, and waits until its log has `wanted`, or
/// until it has used all of them.
async fn use_all_rights(plane: &ControlPlane, account: &str, redis: &RedisServer, wanted: Option<&str>) -> Result<()> {
    let client = plane.client()?;
    let pods = Api::<Pod>::namespaced(client.clone(), JOBS);
    let says = |log: String| wanted.is_some_and(|wanted| log.replace('\\', "").contains(wanted));
    let ensure_silent = |log: String| {
        ensure!(wanted.is_none(), "{account} does without: {wanted:?}\n{log}");
        ensure!(!log.contains("forbidden"), "{log}");
        Ok(())
    };
    redis.flush().await?;
    let reconciles =
        environment(&deployment(&client, account).await?).get("RECONCILE_ENABLED").is_none_or(|is| is == "true");
    if !reconciles {
        let webhook = Webhook::start(as_deployed(plane, WEBHOOK, "/balancer-webhook", redis).await?).await?;
        let review = reviews::creation("etl", 1)?;
        reviews::patch(&review, &endpoint::post(&webhook.client()?, "/mutate", &review).await?)?;
        let log = until(SOON, "the line of the placement", async || {
            Ok(Some(webhook.process().log()?).filter(|log| log.contains("etl-exec-1")))
        })
        .await?;
        return if says(log.clone()) { Ok(()) } else { ensure_silent(log) };
    }
    let leases = Api::<Lease>::namespaced(client.clone(), RELEASE);
    if leases.get_opt(RECONCILER).await?.is_some() {
        leases.delete(RECONCILER, &DeleteParams::default()).await?;
    }
    let events = Api::<Event>::namespaced(client.clone(), JOBS);
    events.delete_collection(&DeleteParams::default(), &ListParams::default()).await?;
    let running: Box<dyn Deref<Target = Release>> = if account == WEBHOOK {
        Box::new(Webhook::begin(as_deployed(plane, WEBHOOK, "/balancer-webhook", redis).await?)?)
    } else {
        Box::new(Reconciler::begin(as_deployed(plane, RECONCILER, "/balancer-reconcile", redis).await?)?)
    };
    // A driver's ratio that becomes wrong is told by an Event.
    let mut edits = ["0.5", "much"].iter().cycle();
    until_true(SOON, &format!("{account} to use its rights ({wanted:?})"), async || {
        let edit = edits.next().copied();
        pods::annotate(&pods, "etl-driver", "workload/spot-ratio", edit).await?;
        tokio::time::sleep(Duration::from_millis(300)).await;
        if says(running.process().log()?) {
            return Ok(true);
        }
        let told = !events.list(&ListParams::default()).await?.items.is_empty();
        Ok(wanted.is_none() && told && running.is_ready().await?)
    })
    .await
    .with_context(|| running.process().log().unwrap_or_default())?;
    if wanted.is_none() { ensure_silent(running.process().log()?) } else { Ok(()) }
}

#[tokio::test]
async fn each_verb_of_each_rule_is_needed_and_no_other_is() -> Result<()> {
    need!(Helm, ControlPlane, Redis, Webhook, Reconciler);
    let (plane, mut helm) = cluster(Options::default(), &[JOBS]).await?;
    let client = plane.client()?;
    let redis = RedisServer::start().await?;
    nodes::ensure(&client, "spot", 1).await?;
    pods::driver("etl").annotation("workload/spot-ratio", "0.5").post(&client, JOBS).await?.pod()?;

    helm.install(&in_sandbox()).await?;
    each_is_needed(&plane, &redis, &[WEBHOOK, RECONCILER], 9).await?;
    let mut in_memory = in_sandbox();
    in_memory["store"] = "memory".into();
    helm.upgrade(&in_memory).await?;
    each_is_needed(&plane, &redis, &[WEBHOOK], 5).await.context("with the memory store")
}

/// Takes each verb of each rule of these accounts away in turn; there are `count` of them.
async fn each_is_needed(plane: &ControlPlane, redis: &RedisServer, accounts: &[&str], count: usize) -> Result<()> {
    let client = plane.client()?;
    let all = all_that_is_allowed(&client).await?;
    assert_eq!(all.len(), count, "{all:?}");
    for account in accounts {
        use_all_rights(plane, account, redis, None).await.with_context(|| (*account).to_owned())?;
    }
    for allowed in all {
        let account = if allowed.role.starts_with(WEBHOOK) { WEBHOOK } else { RECONCILER };
        let role = endpoint::get(&client, &role_path(allowed.kind, &allowed.role)).await?.json()?;
        let rule = role["rules"][allowed.rule].clone();
        let mut less = role["rules"].clone();
        let kept = rule["verbs"].as_array().into_iter().flatten().filter(|verb| **verb != allowed.verb);
        less[allowed.rule]["verbs"] = kept.cloned().collect::<Vec<_>>().into();
        if less[allowed.rule]["verbs"] == json!([]) {
            less.as_array_mut().context("no rules")?.remove(allowed.rule);
        }
        write_rules(&client, &allowed, &less).await?;
        until_followed(&client, account, &allowed, &rule, false).await?;
        let wanted = format!("cannot {} resource \"{}\"", allowed.verb, allowed.resource);
        use_all_rights(plane, account, redis, Some(&wanted)).await.with_context(|| format!("{allowed:?}"))?;
        write_rules(&client, &allowed, &role["rules"]).await?;
        until_followed(&client, account, &allowed, &rule, true).await?;
    }
    Ok(())
}

/// The pods, by namespace, operation and role, that the webhook is called for.
async fn called_for(client: &Client, webhook: &Webhook, round: &str) -> Result<BTreeSet<String>> {
    let mut called = BTreeSet::new();
    let count = async || Ok::<_, anyhow::Error>(webhook.metrics().await?.sum("spot_balancer_admissions_total", &[]));
    for namespace in ["sandbox", "labelled", "other", RELEASE, "kube-system"] {
        let pods = Api::<Pod>::namespaced(client.clone(), namespace);
        for role in ["driver", "executor", "neither"] {
            let job = format!("{round}-{role}");
            let pod = match role {
                "driver" => pods::driver(&job),
                "executor" => pods::executor(&job, 1),
                _ => pods::executor(&job, 1).label("spark-role", "other"),
            };
            let before = count().await?;
            let name = pod.post(client, namespace).await?.pod()?.name_any();
            let between = count().await?;
            pods::remove(&pods, &name).await?;
            for (what, then, now) in [("CREATE", before, between), ("DELETE", between, count().await?)] {
                if now > then {
                    called.insert(format!("{what} {role} in {namespace}"));
                }
            }
        }
    }
    Ok(called)
}

#[tokio::test]
async fn the_webhook_is_called_for_the_pods_of_chosen_namespaces_and_for_no_other() -> Result<()> {
    need!(Helm, ControlPlane, Webhook);
    let (plane, mut helm) = cluster(Options::default(), &[JOBS, "labelled", "other"]).await?;
    let client = plane.client()?;
    let labels = json!({"metadata": {"labels": {"spark": "true"}}});
    for name in [JOBS, "labelled", RELEASE, "kube-system"] {
        let namespaces = Api::<Namespace>::all(client.clone());
        namespaces.patch(name, &PatchParams::default(), &Patch::Merge(&labels)).await?;
    }
    let webhook = Webhook::start(Settings::default().cluster(&plane)).await?;
    helm.install(&json!({"certificates": {"source": "helm"}})).await?;
    for (round, namespaces, chosen) in [
        ("all", json!({}), vec![JOBS, "labelled", "other"]),
        ("names", json!({"names": [JOBS]}), vec![JOBS]),
        ("label", json!({"selector": {"matchLabels": {"spark": "true"}}}), vec![JOBS, "labelled"]),
        (
            "expression",
            json!({"selector": {"matchExpressions": [{"key": "spark", "operator": "Exists"}]}}),
            vec![JOBS, "labelled"],
        ),
    ] {
        // From scratch: what the test writes into the configurations is not Helm's to undo.
        helm.uninstall().await?;
        helm.install(&json!({"certificates": {"source": "helm"}, "namespaces": namespaces})).await?;
        point(&plane, webhook.port, round).await?;
        let mut wanted = BTreeSet::new();
        for namespace in chosen {
            for what in ["CREATE driver", "CREATE executor", "DELETE executor"] {
                wanted.insert(format!("{what} in {namespace}"));
            }
        }
        assert_eq!(called_for(&client, &webhook, round).await?, wanted, "{round}");
    }
    Ok(())
}

fn kubectl(kubeconfig: &Path, arguments: &[&str], file: &Path) -> Result<Output> {
    let mut command = Command::new(program("kubectl")?);
    command.env_clear().env("HOME", scratch_path("kubectl")?).env("KUBECONFIG", kubeconfig);
    Ok(command.args(arguments).arg("--filename").arg(file).output()?)
}

#[tokio::test]
async fn the_plain_manifests_and_the_node_pools_apply_cleanly_and_again() -> Result<()> {
    need!(Helm, ControlPlane, ControllerManager, Kubectl);
    // Which ends namespaces.
    let plane = ControlPlane::start(Options { controller_manager: true, ..Options::default() }).await?;
    let client = plane.client()?;
    stand_ins::define(&client).await?;
    let manifests = std::fs::read_to_string(repository("deploy/spot-balancer.yaml"))?;
    let version = client.apiserver_version().await?;
    let old = version.minor.trim_end_matches('+').parse::<u32>()? < 21;
    // They are rendered for clusters of today.
    let manifests = if old { manifests.replace("policy/v1\n", "policy/v1beta1\n") } else { manifests };
    let path = scratch_path("spot-balancer.yaml")?;
    std::fs::write(&path, manifests)?;
    for file in [path, repository("deploy/node-pools.yaml")] {
        for (arguments, wanted) in [(["apply"], "created"), (["apply"], "unchanged"), (["delete"], "deleted")] {
            let output = kubectl(plane.kubeconfig(), &arguments, &file)?;
            let (said, wrong) = (String::from_utf8(output.stdout)?, String::from_utf8(output.stderr)?);
            ensure!(output.status.success(), "{arguments:?} {}: {wrong}", file.display());
            let wrong: Vec<&str> = wrong.lines().filter(|line| !line.contains("deprecated")).collect();
            assert_eq!(wrong, [""; 0], "{arguments:?}");
            for line in said.lines().filter(|line| !line.is_empty()) {
                assert!(line.contains(wanted), "{arguments:?}: {line}");
            }
        }
    }
    Ok(())
}
