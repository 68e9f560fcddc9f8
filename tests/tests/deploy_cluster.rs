//! The chart on a real apiserver, and the programs as it runs them.

#![allow(clippy::indexing_slicing, reason = "JSON is read by index; a panic here fails a test, as it should")]

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use balancer_tests::control_plane::{ControlPlane, Options};
use balancer_tests::deployed::{
    JOBS, RECONCILER, WEBHOOK, as_deployed, cluster, deployment, environment, in_sandbox, ledger, point,
};
use balancer_tests::helm::{Helm, RELEASE, every_option, object, repository};
use balancer_tests::parts::program;
use balancer_tests::process::scratch_path;
use balancer_tests::reconciler::Reconciler;
use balancer_tests::redis::RedisServer;
use balancer_tests::release::Options as Settings;
use balancer_tests::wait::{SOON, until_true};
use balancer_tests::webhook::Webhook;
use balancer_tests::{endpoint, guide, need, pods, reviews, stand_ins};
use futures::{TryStreamExt, stream};
use k8s_openapi::ByteString;
use k8s_openapi::api::admissionregistration::v1::{MutatingWebhookConfiguration, ValidatingWebhookConfiguration};
use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet};
use k8s_openapi::api::core::v1::{Namespace, Pod, Secret};
use k8s_openapi::api::rbac::v1::Role;
use kube::api::{Api, DeleteParams, DynamicObject, ListParams, Patch, PatchParams, PostParams};
use kube::discovery::{Discovery, verbs};
use kube::{Client, ResourceExt};
use serde_json::{Value, json};

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

fn by_helm(preference: &str) -> Value {
    json!({"certificates": {"source": "helm"}, "settings": {"spotPreference": preference}})
}

/// Waits until the Deployment controller wants pods with this preference.
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

/// The password of the release's Redis.
async fn redis_password(client: &Client) -> Result<Vec<u8>> {
    let secret = Api::<Secret>::namespaced(client.clone(), RELEASE).get("spot-balancer-redis-password").await?;
    let ByteString(password) = secret.data.unwrap_or_default().remove("password").context("no password")?;
    Ok(password)
}

/// What restarts the pods that read the password of Redis.
async fn redis_checksum(client: &Client) -> Result<String> {
    let mut checksums = BTreeSet::new();
    for name in [WEBHOOK, RECONCILER, "spot-balancer-redis"] {
        let annotations = &deployment(client, name).await?["spec"]["template"]["metadata"]["annotations"];
        checksums.insert(annotations["checksum/redis"].as_str().context("no checksum")?.to_owned());
    }
    ensure!(checksums.len() == 1, "{checksums:?}");
    checksums.pop_first().context("no checksum")
}

#[tokio::test]
async fn a_release_is_installed_upgraded_rolled_back_and_uninstalled_completely() -> Result<()> {
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
    let secret = Api::<Secret>::namespaced(client.clone(), RELEASE).get("spot-balancer-webhook-helm-tls").await?;
    assert_eq!(secret.data.context("no data")?["ca.crt"].0, authority[0]);
    let password = redis_password(&client).await?;
    ensure!(password.len() == 40 && password.iter().all(u8::is_ascii_alphanumeric), "{password:?}");
    let checksum = redis_checksum(&client).await?;
    helm.upgrade(&by_helm("STRICT")).await?;
    until_rolled_out(&client, "STRICT").await?;
    assert_eq!(bundles(&client).await?, authority, "an upgrade keeps the CA");
    assert_eq!(redis_password(&client).await?, password, "an upgrade keeps the password");
    assert_eq!(redis_checksum(&client).await?, checksum, "an upgrade does not restart the pods for their password");
    let secrets = Api::<Secret>::namespaced(client.clone(), RELEASE);
    secrets.delete("spot-balancer-redis-password", &DeleteParams::default()).await?;
    helm.upgrade(&by_helm("STRICT")).await?;
    ensure!(
        redis_password(&client).await? != password && redis_checksum(&client).await? != checksum,
        "no new password"
    );
    helm.rollback(1).await?;
    until_rolled_out(&client, "BEST_EFFORT").await?;
    assert_eq!(bundles(&client).await?, authority, "a rollback keeps the CA");
    assert_eq!(redis_password(&client).await?, password, "a rollback brings the password back");
    assert_eq!(redis_checksum(&client).await?, checksum, "a rollback restarts the pods for it");
    helm.uninstall().await?;
    until_nothing_is_left(&client).await?;

    stand_ins::define(&client).await?;
    helm.install(&json!({})).await.context("the defaults")?;
    helm.upgrade(&every_option()).await.context("every option")?;
    helm.upgrade(&json!({"store": "memory"})).await.context("the memory store")?;
    assert!(Api::<Deployment>::namespaced(client.clone(), RELEASE).get_opt(RECONCILER).await?.is_none());
    helm.upgrade(&json!({})).await.context("the defaults again")?;
    for name in [WEBHOOK, RECONCILER, "spot-balancer-redis"] {
        deployment(&client, name).await.context(name)?;
    }

    // cert-manager's Secret, which is not Helm's, stays when another source takes over.
    let secrets = Api::<Secret>::namespaced(client.clone(), RELEASE);
    let issued: Secret = serde_json::from_value(json!({"metadata": {"name": "spot-balancer-webhook-tls"}}))?;
    secrets.create(&PostParams::default(), &issued).await?;
    helm.upgrade(&by_helm("STRICT")).await.context("from cert-manager to Helm's certificate")?;
    assert_eq!(bundles(&client).await?.len(), 2);
    helm.upgrade(&json!({"certificates": {"source": "cert-manager"}})).await.context("and back")?;
    secrets.delete("spot-balancer-webhook-tls", &DeleteParams::default()).await?;
    helm.uninstall().await?;
    until_nothing_is_left(&client).await
}

#[tokio::test]
async fn several_releases_coexist_and_conflicting_ones_are_refused_before_anything_is_created() -> Result<()> {
    need!(Helm, ControlPlane);
    let (plane, mut helm) = cluster(Options::default(), &["elsewhere", "2024"]).await?;
    let client = plane.client()?;
    stand_ins::define(&client).await?;
    helm.install(&by_helm("STRICT")).await?;
    helm.namespace = "elsewhere".into();
    let refusal = helm.install(&by_helm("STRICT")).await.err().context("two of one name")?;
    let refusal = format!("{refusal:#}");
    assert!(refusal.contains("a release in the namespace spot-balancer") && refusal.contains("Choose"), "{refusal}");
    helm.release = "1st".into();
    let refusal = helm.install(&by_helm("STRICT")).await.err().context("a Service that begins with a digit")?;
    assert!(format!("{refusal:#}").contains("Set fullnameOverride"), "{refusal:#}");

    // Beside the first, in a namespace that YAML takes for a number, and with the longest name that there is.
    let monitored = json!({
        "certificates": {"source": "helm"},
        "monitoring": {"serviceMonitor": {"enabled": true}, "prometheusRule": {"enabled": true}},
    });
    for (namespace, release) in [(RELEASE, "on"), ("2024", "null"), ("elsewhere", &*"a".repeat(53))] {
        (helm.namespace, helm.release) = (namespace.into(), release.into());
        helm.install(&monitored).await.with_context(|| format!("{release} in {namespace}"))?;
    }
    let roles = Api::<Role>::namespaced(client.clone(), RELEASE).list(&ListParams::default()).await?;
    let named = roles.items.iter().flat_map(|role| role.rules.iter().flatten());
    let leases: BTreeSet<&String> = named.flat_map(|rule| rule.resource_names.iter().flatten()).collect();
    assert_eq!(leases.len(), 2, "each release in one namespace has a Lease of its own: {leases:?}");
    Ok(())
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
async fn helm_4_with_server_side_apply_does_the_same() -> Result<()> {
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

#[tokio::test]
async fn the_programs_work_as_the_chart_runs_them() -> Result<()> {
    need!(Helm, ControlPlane, Redis, Webhook, Reconciler, Kubectl);
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
    // How to verify it, as the guide and as Helm's notes say.
    let notes = helm.notes().await?;
    let noted = notes.lines().find(|line| line.contains("spot-balancer-check")).context("no check in the notes")?;
    let guided = guide::block("docs/install.md", "spot-balancer-check")?;
    for check in [noted, &format!("JOBS={JOBS}\n{guided}")] {
        assert_eq!(guide::run(&plane, check)?, "on-demand\n", "{check}");
    }
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

/// What redis-cli prints, in the place of the image's valkey-cli; `None` if it has not ended by then.
async fn redis_cli(arguments: &[String], port: u16, limit: Duration) -> Result<Option<Output>> {
    let mut command = tokio::process::Command::new("redis-cli");
    let command = command.arg("-p").arg(port.to_string()).args(arguments).kill_on_drop(true);
    Ok(tokio::time::timeout(limit, command.output()).await.ok().transpose()?)
}

#[tokio::test]
async fn the_probe_of_the_charts_redis_fails_on_a_frozen_server_and_passes_while_a_script_runs() -> Result<()> {
    need!(Helm, Redis);
    let rendered = Helm::start().await?.render(&json!({})).await?;
    let deployment = object(&rendered, "Deployment", "spot-balancer-redis")?;
    let probe = &deployment["spec"]["template"]["spec"]["containers"][0]["livenessProbe"];
    let command: Vec<String> = serde_json::from_value(probe["exec"]["command"].clone())?;
    let [program, option, port, arguments @ ..] = command.as_slice() else { panic!("{probe}") };
    assert_eq!([program, option, port], ["valkey-cli", "-p", "6379"]);
    let limit = Duration::from_secs(probe["timeoutSeconds"].as_u64().context("no limit")?);

    let redis = RedisServer::start().await?;
    let passes = async || -> Result<bool> {
        Ok(redis_cli(arguments, redis.port(), limit).await?.is_some_and(|output| output.status.success()))
    };
    ensure!(passes().await?, "a healthy server fails");
    redis.freeze()?;
    ensure!(!passes().await?, "a frozen server passes");
    redis.thaw()?;
    ensure!(passes().await?, "a server that goes on fails");
    let script = ["eval", "while true do end", "0"].map(str::to_owned);
    let script = redis_cli(&script, redis.port(), Duration::from_secs(60));
    let during = async {
        // The server answers that it is busy once the script has run for five seconds.
        until_true(Duration::from_secs(30), "the server to be busy", async || {
            let output = redis_cli(arguments, redis.port(), limit).await?.context("no answer while a script runs")?;
            ensure!(output.status.success(), "fails while a script runs");
            Ok(output.stdout.starts_with(b"BUSY"))
        })
        .await?;
        redis_cli(&["script", "kill"].map(str::to_owned), redis.port(), SOON).await
    };
    let (ended, killed) = tokio::join!(script, during);
    ensure!(killed?.is_some_and(|output| output.status.success()) && ended?.is_some(), "the script goes on");
    Ok(())
}

#[tokio::test]
async fn the_charts_redis_keeps_within_its_memory_limit_writes_nothing_to_disk_and_allows_no_more_than_is_needed()
-> Result<()> {
    need!(Helm, Redis, Webhook);
    let rendered = Helm::start().await?.render(&json!({})).await?;
    let deployment = object(&rendered, "Deployment", "spot-balancer-redis")?;
    let container = &deployment["spec"]["template"]["spec"]["containers"][0];
    assert_eq!(container["command"], json!(["valkey-server"]));
    let mut arguments: Vec<String> = serde_json::from_value(container["args"].clone())?;
    // Its port and its folder are this machine's.
    for name in ["--port", "--dir"] {
        let at = arguments.iter().position(|argument| argument == name).with_context(|| format!("no {name}"))?;
        arguments.drain(at..at + 2);
    }
    // As the kubelet replaces it.
    let arguments = arguments.into_iter().map(|argument| argument.replace("$(REDIS_PASSWORD)", "secret"));
    // A user of the test's own, who may ask what the server's settings are.
    let administrator = ["--user", "tests", "on", ">tests", "~*", "+@all"].map(str::to_owned);
    let redis = RedisServer::start_as(arguments.chain(administrator).collect()).await?;
    let as_user = |user: &str| format!("redis://{user}@127.0.0.1:{}", redis.port());
    let mut connection = redis::Client::open(as_user("tests:tests"))?.get_multiplexed_async_connection().await?;
    let wanted = [("appendonly", "no"), ("maxmemory", "134217728"), ("maxmemory-policy", "allkeys-lru"), ("save", "")];
    for (name, wanted) in wanted {
        let (_, is): (String, String) = redis::cmd("CONFIG").arg("GET").arg(name).query_async(&mut connection).await?;
        assert_eq!(is, wanted, "{name}");
    }
    let mut anyone = redis.connection().await?;
    let () = redis::cmd("PING").query_async(&mut anyone).await?;
    let mut balancer = redis::Client::open(as_user("balancer:secret"))?.get_multiplexed_async_connection().await?;
    for (user, connection, refused) in [
        ("nobody", &mut anyone, ["GET exec-heartbeat", "CONFIG GET save"]),
        ("balancer", &mut balancer, ["FLUSHALL", "GET other"]),
    ] {
        for command in refused {
            let mut words = command.split(' ');
            let mut command = redis::cmd(words.next().unwrap_or_default());
            let answer = command.arg(words.collect::<Vec<_>>()).query_async::<()>(connection).await;
            ensure!(answer.is_err_and(|error| error.code() == Some("NOPERM")), "{user} may {command:?}");
        }
    }
    let settings = Settings::default().without_cluster()?.env("STORE", "redis");
    let webhook = Webhook::start(settings.env("REDIS_URL", as_user("balancer:secret"))).await?;
    let client = webhook.client()?;
    let post = async |job| {
        let review = reviews::creation(&format!("etl-{job}"), 1)?;
        reviews::patch(&review, &endpoint::post(&client, "/mutate", &review).await?).map(drop)
    };
    let place = async |jobs: Range<usize>| stream::iter(jobs.map(Ok)).try_for_each_concurrent(8, post).await;
    // A bound that is met soon: jobs that nobody asks for go, and no admission fails for want of room.
    place(0..100).await?;
    let info: String = redis::cmd("INFO").arg("memory").query_async(&mut connection).await?;
    let used = info.lines().find_map(|line| line.strip_prefix("used_memory:")).context("no used_memory")?;
    let bound = used.trim().parse::<u64>()? + (300 << 10);
    let () = redis::cmd("CONFIG").arg(&["SET", "maxmemory", &bound.to_string()]).query_async(&mut connection).await?;
    place(100..2500).await?;
    let keys: usize = redis::cmd("DBSIZE").query_async(&mut connection).await?;
    ensure!((200..5000).contains(&keys), "{keys} keys: the bound was not met");
    let fallback = webhook.metrics().await?.sum("spot_balancer_placements_total", &[("source", "fallback")]);
    assert_eq!(fallback, Some(0.0), "{}", webhook.process().log()?);
    Ok(())
}

/// Makes the apiserver refuse what the restricted pod security standard refuses, by a label of the namespace. Before
/// 1.25 by a PodSecurityPolicy, the only one of the cluster; it adds nothing to a pod except what it requires.
async fn restrict(plane: &ControlPlane) -> Result<()> {
    let client = plane.client()?;
    if plane.minor_version().await? >= 25 {
        let labels = json!({"metadata": {"labels": {"pod-security.kubernetes.io/enforce": "restricted"}}});
        let namespaces = Api::<Namespace>::all(client);
        namespaces.patch(RELEASE, &PatchParams::default(), &Patch::Merge(&labels)).await?;
        return Ok(());
    }
    let policy = json!({
        "apiVersion": "policy/v1beta1",
        "kind": "PodSecurityPolicy",
        "metadata": {
            "name": "restricted",
            "annotations": {"seccomp.security.alpha.kubernetes.io/allowedProfileNames": "runtime/default"},
        },
        "spec": {
            "privileged": false,
            "allowPrivilegeEscalation": false,
            "requiredDropCapabilities": ["ALL"],
            "volumes": ["configMap", "emptyDir", "projected", "secret", "downwardAPI", "persistentVolumeClaim"],
            "hostNetwork": false, "hostIPC": false, "hostPID": false,
            "runAsUser": {"rule": "MustRunAsNonRoot"},
            "runAsGroup": {"rule": "MustRunAs", "ranges": [{"min": 1, "max": 65535}]},
            "fsGroup": {"rule": "MustRunAs", "ranges": [{"min": 1, "max": 65535}]},
            "supplementalGroups": {"rule": "MayRunAs", "ranges": [{"min": 1, "max": 65535}]},
            "seLinux": {"rule": "RunAsAny"},
            "readOnlyRootFilesystem": true,
        },
    });
    let answer = endpoint::post(&client, "/apis/policy/v1beta1/podsecuritypolicies", &policy).await?;
    ensure!(answer.status == 201, "{}", answer.text);
    Ok(())
}

#[tokio::test]
async fn the_pods_pass_restricted_pod_security_unchanged() -> Result<()> {
    need!(Helm, ControlPlane, ControllerManager);
    let options = Options { controller_manager: true, pod_security_policy: true, ..Options::default() };
    let (plane, mut helm) = cluster(options, &[JOBS]).await?;
    let client = plane.client()?;
    restrict(&plane).await?;
    // The apiserver notices the label of a namespace with a delay.
    until_true(SOON, "an unrestricted pod to be refused", async || {
        let refused = pods::executor("open", 1).dry_run(&client, RELEASE).await?;
        ensure!(refused.status == 403, "status {}: {}", refused.status, refused.object);
        Ok(true)
    })
    .await?;

    helm.install(&in_sandbox()).await?;
    let pods = Api::<Pod>::namespaced(client.clone(), RELEASE);
    for (name, replicas) in [(WEBHOOK, 2), (RECONCILER, 2), ("spot-balancer-redis", 1)] {
        let template = deployment(&client, name).await?["spec"]["template"].clone();
        let labels = template["metadata"]["labels"].as_object().context("no labels")?;
        let labels: Vec<String> =
            labels.iter().map(|(key, value)| format!("{key}={}", value.as_str().unwrap_or_default())).collect();
        let list = ListParams::default().labels(&labels.join(","));
        until_true(SOON, &format!("the pods of {name} to be made"), async || {
            Ok(pods.list(&list).await?.items.len() == replicas)
        })
        .await?;
        for pod in pods.list(&list).await? {
            let pod = serde_json::to_value(pod)?;
            assert_eq!(pod["spec"]["securityContext"], template["spec"]["securityContext"], "{name}");
            let (container, wanted) = (&pod["spec"]["containers"][0], &template["spec"]["containers"][0]);
            assert_eq!(container["securityContext"], wanted["securityContext"], "{name}: something was added");
        }
    }
    Ok(())
}

#[tokio::test]
async fn a_redis_user_with_the_documented_rights_is_enough() -> Result<()> {
    need!(Helm, ControlPlane, Redis, Webhook, Reconciler);
    let documented = std::fs::read_to_string(repository("docs/redis.md"))?;
    let rights = documented.lines().find(|line| line.starts_with("~exec-")).context("no rights in docs/redis.md")?;
    let redis = RedisServer::start().await?;
    let mut connection = redis.connection().await?;
    let mut user = redis::cmd("ACL");
    user.arg(&["SETUSER", "balancer", "on", ">p@ss"]);
    let () = user.arg(rights.split(' ').collect::<Vec<_>>()).query_async(&mut connection).await?;

    let (plane, mut helm) = cluster(Options::default(), &[JOBS]).await?;
    let client = plane.client()?;
    let mut values = in_sandbox();
    values["admissionToken"] = json!({"enabled": false});
    helm.install(&values).await?;
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
    for (page, metric) in [
        (webhook.metrics().await?, "spot_balancer_store_errors_total"),
        (reconciler.metrics().await?, "spot_balancer_reconcile_store_errors_total"),
    ] {
        assert_eq!(page.sum(metric, &[]), Some(0.0), "{}", page.0);
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
async fn the_webhook_is_called_for_the_chosen_namespaces_only() -> Result<()> {
    need!(Helm, ControlPlane, Webhook);
    let (plane, mut helm) = cluster(Options::default(), &[JOBS, "labelled", "other"]).await?;
    let client = plane.client()?;
    let labels = json!({"metadata": {"labels": {"spark": "true"}}});
    for name in [JOBS, "labelled", RELEASE, "kube-system"] {
        let namespaces = Api::<Namespace>::all(client.clone());
        namespaces.patch(name, &PatchParams::default(), &Patch::Merge(&labels)).await?;
    }
    let webhook = Webhook::start(Settings::default().cluster(&plane)).await?;
    let values = |namespaces: Value| json!({"certificates": {"source": "helm"}, "admissionToken": {"enabled": false}, "namespaces": namespaces});
    helm.install(&values(json!({"all": true}))).await?;
    for (round, namespaces, chosen) in [
        ("all", json!({"all": true}), vec![JOBS, "labelled", "other"]),
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
        helm.install(&values(namespaces)).await?;
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

/// How often the spec of each PodDisruptionBudget was written.
async fn budget_generations(client: &Client, old: bool) -> Result<BTreeMap<String, i64>> {
    let version = if old { "v1beta1" } else { "v1" };
    let list = endpoint::get(client, &format!("/apis/policy/{version}/poddisruptionbudgets")).await?.json()?;
    let budgets = list["items"].as_array().context("no items")?;
    budgets
        .iter()
        .map(|budget| {
            let name = budget["metadata"]["name"].as_str().context("no name")?;
            Ok((name.to_owned(), budget["metadata"]["generation"].as_i64().context("no generation")?))
        })
        .collect()
}

#[tokio::test]
async fn manifests_and_node_pools_apply_cleanly_twice() -> Result<()> {
    need!(Helm, ControlPlane, ControllerManager, Kubectl);
    // Which ends namespaces.
    let plane = ControlPlane::start(Options { controller_manager: true, ..Options::default() }).await?;
    let client = plane.client()?;
    stand_ins::define(&client).await?;
    let manifests = std::fs::read_to_string(repository("deploy/spot-balancer.yaml"))?;
    let old = plane.minor_version().await? < 21;
    // They are rendered for clusters of today.
    let manifests = if old {
        let newer = ["  unhealthyPodEvictionPolicy: AlwaysAllow\n", "    matchLabelKeys: [pod-template-hash]\n"];
        let less = newer.iter().fold(manifests, |manifests, newer| manifests.replace(newer, ""));
        less.replace("policy/v1\n", "policy/v1beta1\n")
    } else {
        manifests
    };
    let path = scratch_path("spot-balancer.yaml")?;
    std::fs::write(&path, manifests)?;
    // What no one would find out about is no check of anything.
    let wrong = std::fs::read_to_string(repository("deploy/node-pools.yaml"))?.replace("expireAfter", "expiresAfter");
    let wrong_path = scratch_path("wrong.yaml")?;
    std::fs::write(&wrong_path, wrong)?;
    let output = kubectl(plane.kubeconfig(), &["apply"], &wrong_path)?;
    let said = String::from_utf8(output.stderr)?;
    ensure!(!output.status.success() && said.contains("expiresAfter"), "a wrong field is taken: {said}");
    for file in [path, repository("deploy/node-pools.yaml")] {
        let mut created = BTreeMap::new();
        for (arguments, wanted) in [(["apply"], "created"), (["apply"], "unchanged"), (["delete"], "deleted")] {
            let output = kubectl(plane.kubeconfig(), &arguments, &file)?;
            let (said, wrong) = (String::from_utf8(output.stdout)?, String::from_utf8(output.stderr)?);
            ensure!(output.status.success(), "{arguments:?} {}: {wrong}", file.display());
            let wrong: Vec<&str> = wrong.lines().filter(|line| !line.contains("deprecated")).collect();
            assert_eq!(wrong, [""; 0], "{arguments:?}");
            // kubectl always sends the selector of a policy/v1 PodDisruptionBudget, and so reports an unchanged one as
            // configured. That nothing changes is asked of the apiserver.
            let may_say_configured = |line: &str| wanted == "unchanged" && line.starts_with("poddisruptionbudget");
            for line in said.lines().filter(|line| !line.is_empty()) {
                let configured = may_say_configured(line) && line.contains("configured");
                assert!(line.contains(wanted) || configured, "{arguments:?}: {line}");
            }
            match wanted {
                "created" => created = budget_generations(&client, old).await?,
                "unchanged" => assert_eq!(budget_generations(&client, old).await?, created),
                _ => {}
            }
        }
    }
    Ok(())
}
