//! The real parts themselves, before anything of ours runs on them.

use std::io::{BufRead, BufReader};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use balancer_tests::account::{Account, LIST_PODS};
use balancer_tests::balance::Balance;
use balancer_tests::certificate::authority;
use balancer_tests::control_plane::{ControlPlane, Options};
use balancer_tests::kubelet::Kubelet;
use balancer_tests::process::scratch_path;
use balancer_tests::redis::{RedisServer, ServerOptions, Servers};
use balancer_tests::redis_cluster::{RedisCluster, slot};
use balancer_tests::redis_sentinel::SentinelSet;
use balancer_tests::registration::Registration;
use balancer_tests::wait::{SOON, until, until_true};
use balancer_tests::{need, nodes, pods};
use futures::{StreamExt, TryStreamExt};
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::api::{Api, DeleteParams, ListParams, WatchEvent, WatchParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config, ResourceExt};
use redis::AsyncCommands;

#[tokio::test]
async fn an_executor_is_bound_to_its_selected_capacity_runs_and_is_deleted() -> Result<()> {
    need!(ControlPlane, Scheduler);
    let plane = ControlPlane::shared().await?;
    let client = plane.client()?;
    let namespace = plane.namespace("bound").await?;
    let _kubelet = Kubelet::start(client.clone(), &namespace);
    nodes::ensure(&client, "on-demand", 1).await?;
    let spot = nodes::ensure(&client, "spot", 2).await?;

    let executor = pods::executor("etl", 1).node_selector("karpenter.sh/capacity-type", "spot");
    let posted = executor.post(&client, &namespace).await?;
    assert_eq!(posted.pod()?.metadata.namespace, Some(namespace.clone()));
    assert!(posted.warnings.is_empty());

    let executors = Api::<Pod>::namespaced(client, &namespace);
    let node = until(SOON, "the executor to run", async || {
        let pod = executors.get("etl-exec-1").await?;
        let running = pod.status.is_some_and(|status| status.phase.as_deref() == Some("Running"));
        Ok(pod.spec.filter(|_| running).and_then(|spec| spec.node_name))
    })
    .await?;
    assert!(spot.contains(&node), "bound to {node}");

    executors.delete("etl-exec-1", &DeleteParams::default()).await?;
    until_true(SOON, "the executor to be gone", async || Ok(executors.get_opt("etl-exec-1").await?.is_none())).await
}

#[tokio::test]
async fn an_executor_that_selects_missing_capacity_stays_pending() -> Result<()> {
    need!(ControlPlane, Scheduler);
    let plane = ControlPlane::shared().await?;
    let client = plane.client()?;
    let namespace = plane.namespace("pending").await?;
    let executor = pods::executor("etl", 1).node_selector("karpenter.sh/capacity-type", "reserved");
    executor.post(&client, &namespace).await?.pod()?;
    let executors = Api::<Pod>::namespaced(client, &namespace);
    until_true(SOON, "the scheduler to say that nothing fits", async || {
        let status = executors.get("etl-exec-1").await?.status.unwrap_or_default();
        let said = status.conditions.unwrap_or_default();
        Ok(said.iter().any(|condition| condition.reason.as_deref() == Some("Unschedulable")))
    })
    .await
}

#[tokio::test]
async fn nodes_are_ready_untainted_and_of_their_capacity() -> Result<()> {
    need!(ControlPlane);
    let client = ControlPlane::shared().await?.client()?;
    // Twice: tests that share a control plane share its nodes.
    nodes::ensure(&client, "spot", 2).await?;
    let names = nodes::ensure(&client, "spot", 2).await?;
    assert_eq!(names, ["spot-0", "spot-1"]);
    let node = Api::<Node>::all(client).get("spot-1").await?;
    let capacity = node.labels().get("karpenter.sh/capacity-type");
    assert_eq!(capacity.map(String::as_str), Some("spot"));
    assert!(node.spec.and_then(|spec| spec.taints).is_none());
    let status = node.status.context("no status")?;
    let room = status.allocatable.context("no room")?;
    assert_eq!(room.get("pods").map(|pods| pods.0.as_str()), Some("2k"));
    assert!(status.conditions.is_some());
    Ok(())
}

#[tokio::test]
async fn a_dry_run_stores_nothing() -> Result<()> {
    need!(ControlPlane);
    let plane = ControlPlane::shared().await?;
    let client = plane.client()?;
    let namespace = plane.namespace("dry").await?;
    pods::driver("etl").dry_run(&client, &namespace).await?.pod()?;
    let stored = Api::<Pod>::namespaced(client, &namespace).list(&ListParams::default()).await?;
    assert!(stored.items.is_empty());
    Ok(())
}

#[tokio::test]
async fn a_registered_webhook_is_called_from_the_first_pod_in_its_namespace_only() -> Result<()> {
    need!(ControlPlane);
    let plane = ControlPlane::shared().await?;
    let client = plane.client()?;
    let namespace = plane.namespace("called").await?;
    let elsewhere = plane.namespace("not-called").await?;
    // Nothing listens there, so that every call shows as a failure.
    let mut registration = Registration::new(&namespace, balancer_tests::port::free()?);
    registration.failure_policy = "Fail";
    registration.apply(plane).await?;

    let refused = pods::executor("etl", 1).post(&client, &namespace).await?;
    assert_eq!(refused.status, 500, "{}", refused.object);
    pods::executor("etl", 1).post(&client, &elsewhere).await?.pod()?;
    let other = pods::executor("etl", 2).label("spark-role", "other");
    other.post(&client, &namespace).await?.pod()?;
    let left = Api::<Pod>::namespaced(client, &namespace).list(&ListParams::default()).await?;
    assert_eq!(left.items.len(), 1, "the probe of the registration is gone");
    Ok(())
}

#[tokio::test]
async fn a_service_account_has_the_rights_it_was_granted_only() -> Result<()> {
    need!(ControlPlane);
    let plane = ControlPlane::shared().await?;
    let (namespace, elsewhere) = (plane.namespace("accounts").await?, plane.namespace("elsewhere").await?);
    let account = Account::new(plane, &namespace, "webhook").await?;
    let kubeconfig = Kubeconfig::read_from(&account.kubeconfig)?;
    let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?;
    assert_eq!(config.default_namespace, namespace);
    let client = Client::try_from(config)?;
    let list = async |namespace: &str| match Api::<Pod>::namespaced(client.clone(), namespace)
        .list(&ListParams::default())
        .await
    {
        Err(kube::Error::Api(status)) if status.code == 403 => Ok(false),
        listed => listed.map(|_| true),
    };
    assert!(!list(&namespace).await?);
    account.allow(plane, &namespace, LIST_PODS).await?;
    assert!(list(&namespace).await? && !list(&elsewhere).await?);
    account.allow_everywhere(plane, LIST_PODS).await?;
    assert!(list(&elsewhere).await?);
    let refused = Api::<Pod>::namespaced(client, &namespace).delete("any", &DeleteParams::default()).await;
    assert!(matches!(refused, Err(kube::Error::Api(status)) if status.code == 403));
    Ok(())
}

#[tokio::test]
async fn objects_survive_an_outage_and_compaction_removes_history() -> Result<()> {
    need!(ControlPlane);
    let mut plane = ControlPlane::start(Options::default()).await?;
    let namespace = plane.namespace("outage").await?;
    pods::driver("etl").post(&plane.client()?, &namespace).await?.pod()?;

    plane.stop_apiserver();
    let drivers = Api::<Pod>::namespaced(plane.client()?, &namespace);
    assert!(drivers.get("etl-driver").await.is_err());
    plane.start_apiserver().await?;
    let before = drivers.get("etl-driver").await?.metadata.resource_version;
    let before = before.context("no resourceVersion")?;

    pods::driver("ads").post(&plane.client()?, &namespace).await?.pod()?;
    let watch = WatchParams::default().timeout(60);
    let mut seen = drivers.watch(&watch, &before).await?.boxed();
    assert!(matches!(seen.try_next().await?, Some(WatchEvent::Added(_))));

    plane.compact().await?;
    let drivers = Api::<Pod>::namespaced(plane.client()?, &namespace);
    let code = match drivers.watch(&watch, &before).await {
        Err(kube::Error::Api(status)) => status.code,
        Err(error) => return Err(error.into()),
        Ok(events) => match events.boxed().try_next().await? {
            Some(WatchEvent::Error(status)) => status.code,
            event => anyhow::bail!("the past is still there: {event:?}"),
        },
    };
    assert_eq!(code, 410);
    Ok(())
}

#[tokio::test]
async fn the_controller_manager_collects_executors_of_a_deleted_driver() -> Result<()> {
    need!(ControlPlane, ControllerManager);
    let options = Options { controller_manager: true, ..Options::default() };
    let plane = ControlPlane::start(options).await?;
    let namespace = plane.namespace("orphans").await?;
    let client = plane.client()?;
    let driver = pods::driver("etl").post(&client, &namespace).await?.pod()?;
    let uid = driver.metadata.uid.context("no uid")?;
    let executor = pods::executor("etl", 1).owned_by("etl-driver", &uid);
    executor.post(&client, &namespace).await?.pod()?;

    let all = Api::<Pod>::namespaced(client, &namespace);
    all.delete("etl-driver", &DeleteParams::background()).await?;
    until_true(SOON, "the executor to be collected", async || Ok(all.get_opt("etl-exec-1").await?.is_none())).await
}

#[tokio::test]
async fn redis_freezes_thaws_and_restarts_empty() -> Result<()> {
    need!(Redis);
    let mut redis = RedisServer::start().await?;
    let mut connection = redis.connection().await?;
    let _: () = connection.set("job", 1).await?;

    redis.freeze()?;
    assert!(connection.get::<_, i64>("job").await.is_err(), "it answers though frozen");
    redis.thaw()?;
    until_true(SOON, "it to answer again", async || Ok(connection.get::<_, i64>("job").await? == 1)).await?;

    redis.flush().await?;
    assert!(!connection.exists::<_, bool>("job").await?);
    let _: () = connection.set("job", 1).await?;
    let url = redis.url();
    redis.stop();
    assert!(redis.connection().await.is_err(), "it accepts though stopped");
    redis.start_again_empty().await?;
    assert_eq!(redis.url(), url);
    assert!(!redis.connection().await?.exists::<_, bool>("job").await?);
    Ok(())
}

#[tokio::test]
async fn redis_over_tls_requires_its_password() -> Result<()> {
    need!(Redis);
    let redis = RedisServer::start_tls().await?;
    let _: () = redis.connection().await?.set("job", 1).await?;
    let without = redis.url().replace(":correct-horse@", "");
    let tls = redis::TlsCertificates { client_tls: None, root_cert: Some(authority()?.pem.clone().into_bytes()) };
    let client = redis::Client::build_with_tls(without, tls)?;
    let mut connection = client.get_multiplexed_async_connection().await?;
    let refused = connection.get::<_, i64>("job").await;
    assert!(refused.is_err_and(|error| error.to_string().contains("NOAUTH")));
    Ok(())
}

#[tokio::test]
async fn connections_alternate_and_skip_a_stopped_server() -> Result<()> {
    need!(Redis);
    let (mut one, two) = (RedisServer::start().await?, RedisServer::start().await?);
    for (server, name) in [(&one, "one"), (&two, "two")] {
        let _: () = server.connection().await?.set("name", name).await?;
    }
    let balance = Balance::start(&[one.port(), two.port()]).await?;
    let client = redis::Client::open(format!("redis://127.0.0.1:{}", balance.port))?;
    let ask = async || {
        let mut connection = client.get_multiplexed_async_connection().await?;
        anyhow::Ok(connection.get::<_, String>("name").await?)
    };
    let answers = [ask().await?, ask().await?, ask().await?];
    assert_eq!(answers, ["one", "two", "one"]);
    one.stop();
    assert_eq!([ask().await?, ask().await?], ["two", "two"]);

    let mut kept = client.get_multiplexed_async_connection().await?;
    balance.send_to(&[]);
    until_true(SOON, "the connection to break", async || Ok(kept.get::<_, String>("name").await.is_err())).await?;
    assert!(ask().await.is_err(), "it forwards to nobody");
    balance.send_to(&[two.port()]);
    until_true(SOON, "it to forward again", async || Ok(ask().await? == "two")).await?;

    let mut kept = client.get_multiplexed_async_connection().await?;
    balance.swallow();
    let mut lost = std::pin::pin!(kept.get::<_, String>("name"));
    let silent = tokio::time::timeout(Duration::from_millis(200), &mut lost).await;
    assert!(silent.is_err(), "it does not swallow: {silent:?}");
    balance.send_to(&[two.port()]);
    assert!(lost.await.is_err(), "what was swallowed came after all");
    assert_eq!(ask().await?, "two");
    Ok(())
}

#[tokio::test]
async fn a_test_without_its_parts_reports_it_or_fails_if_parts_are_required() -> Result<()> {
    let test = |variable: &str| {
        rerun("redis_freezes_thaws_and_restarts_empty")?
            .env("PATH", "")
            .env(variable, "1")
            .output()
            .context("running the test")
    };
    let told = |output: &Output| String::from_utf8_lossy(&output.stderr).into_owned();
    let left_out = test("UNRELATED")?;
    assert!(left_out.status.success());
    let told_plainly = "LEFT OUT: redis_freezes_thaws_and_restarts_empty (redis-server is not";
    assert!(told(&left_out).contains(told_plainly), "{}", told(&left_out));
    assert!(!test("CI")?.status.success());
    assert!(!test("SPOT_BALANCER_REQUIRE_PARTS")?.status.success());
    Ok(())
}

#[tokio::test]
async fn a_killed_test_process_leaves_nothing_behind() -> Result<()> {
    need!(Redis);
    let mut child = rerun("helper_that_starts_a_server_and_hangs")?.env(HANG, "1").stdout(Stdio::piped()).spawn()?;
    let mut lines = BufReader::new(child.stdout.take().context("no output")?).lines();
    let told = lines.find_map(|line| line.ok()?.strip_prefix(HANG).map(str::to_owned));
    let told = told.context("the helper tells nothing")?;
    let (port, folder) = told.trim().split_once(' ').context("no folder")?;
    let (port, folder) = (port.parse::<u16>()?, Path::new(folder));
    assert!(TcpStream::connect(("127.0.0.1", port)).is_ok());
    assert!(folder.is_dir());

    child.kill()?;
    child.wait()?;
    until_true(SOON, "the server and its folder to be gone", async || {
        Ok(TcpStream::connect(("127.0.0.1", port)).is_err() && !folder.exists())
    })
    .await
}

/// Set for the process that is to be killed; it also marks what that process tells.
const HANG: &str = "SPOT_BALANCER_TEST_HANG";

#[tokio::test]
async fn helper_that_starts_a_server_and_hangs() -> Result<()> {
    if std::env::var_os(HANG).is_none() {
        return Ok(());
    }
    let redis = RedisServer::start().await?;
    // Frozen, it would not notice anything gentler than SIGKILL.
    redis.freeze()?;
    let folder = scratch_path("marker")?;
    println!("{HANG} {} {}", redis.port(), folder.with_file_name("").display());
    tokio::time::sleep(SOON).await;
    Ok(())
}

/// A run of one test of this file in a process of its own.
fn rerun(test: &str) -> Result<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["--exact", "--nocapture", test]);
    command.env_remove("CI").env_remove("SPOT_BALANCER_REQUIRE_PARTS");
    Ok(command)
}

#[tokio::test]
async fn a_cluster_moves_slots_and_replaces_its_primaries() -> Result<()> {
    need!(Redis);
    let mut cluster = RedisCluster::start_with(ServerOptions::tls()?).await?;
    let key = "exec-count:{etl:spark-1}";
    for key in [key, "plain", "{}empty", "{a}{b}", "a}{b", "{", "123456789"] {
        assert_eq!(
            slot(key),
            cluster.nodes[0].ask::<u16>(redis::cmd("CLUSTER").arg("KEYSLOT").arg(key)).await?,
            "{key}"
        );
    }
    let (slot, first) = (slot(key), cluster.primary_of(key).await?);
    let _: () = cluster.connection_for(key).await?.set(key, 1).await?;

    let to = cluster.primaries().await.into_iter().find(|node| *node != first).context("one primary")?;
    cluster.migrate_slot(slot, to).await?;
    assert_eq!(cluster.primary_of(key).await?, to);
    cluster.until_healthy().await?;
    let replica = cluster.replicas_of(to).await?.first().copied().context("no replica")?;
    cluster.fail_over(replica).await?;
    cluster.until_healthy().await?;
    assert_eq!(cluster.primary_of(key).await?, replica);

    cluster.nodes[replica].stop();
    cluster.until_healthy().await?;
    assert_eq!(cluster.primary_of(key).await?, to);
    assert_eq!(cluster.connection_for(key).await?.get::<_, i64>(key).await?, 1);
    cluster.nodes[replica].start_again_empty().await?;
    until_true(SOON, "the replica to return", async || Ok(cluster.replicas_of(to).await? == [replica])).await?;
    cluster.until_healthy().await?;
    assert_eq!(cluster.keys("exec-*").await?, [key]);
    Ok(())
}

#[tokio::test]
async fn sentinels_replace_a_primary_that_is_killed_or_told_to_go() -> Result<()> {
    need!(Redis);
    let mut set = SentinelSet::start_with(ServerOptions::tls()?, Some("watchful")).await?;
    let first = set.primary().await?;
    let _: () = set.connection_for("job").await?.set("job", 1).await?;
    let second = set.fail_over().await?;
    assert_ne!(first, second);
    set.until_whole().await?;
    assert_eq!(set.connection_for("job").await?.get::<_, i64>("job").await?, 1);

    set.sentinels[0].stop();
    set.servers[second].stop();
    let third =
        until(SOON, "another primary", async || Ok(Some(set.primary().await?).filter(|it| *it != second))).await?;
    assert_eq!(set.until_agreed().await?, third);
    assert_eq!(set.connection_for("job").await?.get::<_, i64>("job").await?, 1);
    set.sentinels[0].start_again_empty().await?;
    set.servers[second].start_again_empty().await?;
    assert_eq!(set.until_whole().await?, third);
    Ok(())
}
