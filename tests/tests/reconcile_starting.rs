//! The reconciler as the person who runs it meets it: its settings, its rights, its probes and metrics.

use anyhow::{Context, Result, ensure};
use balancer_tests::account::{Account, EVENTS, LEASES, NODES, PODS, Right};
use balancer_tests::control_plane::Plane;
use balancer_tests::pods::{self, executor};
use balancer_tests::reconciler::{Reconciler, ReconcilerOptions};
use balancer_tests::redis::RedisServer;
use balancer_tests::release::refusal;
use balancer_tests::scenario::{REPAIRED, Scenario, strict};
use balancer_tests::wait::{SOON, until_true};
use balancer_tests::{endpoint, need, nodes};

const JOB: &str = "etl";

#[tokio::test]
async fn an_invalid_setting_is_reported_with_its_name_value_and_what_is_accepted() -> Result<()> {
    need!(Reconciler);
    let right = ReconcilerOptions::default()
        .without_cluster()?
        .env("ADMIN_PORT", "0")
        .env("REDIS_URL", "redis://me:pa55word@127.0.0.1:1");
    let cases: &[(&str, &str, &[&str])] = &[
        ("RECONCILE_GRACE_SECONDS", "0", &["\"0\"", "accepted"]),
        ("RECONCILE_GRACE_SECONDS", "soon", &["soon", "accepted"]),
        ("RECONCILE_INTERVAL_SECONDS", "-1", &["-1", "accepted"]),
        ("WATCH_NAMESPACES", "etl,No_Such", &["No_Such", "accepted"]),
        ("RECONCILE_LEASE", "No_Such", &["No_Such", "accepted"]),
        ("STORE", "memory", &["memory", "accepted: redis"]),
        ("STORE", "etcd", &["etcd", "redis or memory"]),
        ("REDIS_URL", "", &["not set", "rediss://"]),
        ("REDIS_URL", "http://me:pa55word@127.0.0.1", &["accepted: redis://"]),
        ("STORE_TIMEOUT_MILLISECONDS", "0", &["accepted", "15000"]),
        ("REDIS_DEFAULT_TTL_SECONDS", "0", &["accepted"]),
        ("DEFAULT_SPOT_RATIO", "1.5", &["1.5", "70%"]),
        ("CAPACITY_TYPE_LABEL", "capacity type", &["capacity type", "label key"]),
        ("JOB_ID_LABEL", "job id", &["job id", "label key"]),
        ("EXECUTOR_ROLE_VALUE", "driver", &["DRIVER_ROLE_VALUE", "accepted"]),
        ("LOG_LEVEL", "loud", &["loud", "WARNING"]),
        ("LOG_FORMAT", "xml", &["xml", "text or json"]),
        ("ADMIN_PORT", "http", &["http", "65535"]),
        ("KUBECONFIG", "/nowhere/config", &["/nowhere/config"]),
    ];
    for (name, value, told) in cases {
        let said = refusal("balancer-reconcile", &right.clone().env(name, value)).await?;
        for part in [name].into_iter().chain(*told) {
            ensure!(said.contains(part), "with {name}={value} it does not say {part:?}:\n{said}");
        }
        ensure!(!said.contains("pa55word"), "{said}");
    }
    let said = refusal("balancer-reconcile", &ReconcilerOptions::default().without_cluster()?).await?;
    ensure!(said.contains("REDIS_URL") && said.contains("not set") && said.contains("redis://"), "{said}");
    // It serves no admissions.
    let said = refusal("balancer-reconcile", &right.arg("--tls-cert-path=/tls/tls.crt")).await?;
    ensure!(said.contains("--tls-cert-path") && said.contains("--help"), "{said}");
    Ok(())
}

#[tokio::test]
async fn a_port_in_use_is_reported_with_its_setting() -> Result<()> {
    need!(Reconciler);
    let taken = tokio::net::TcpListener::bind("[::]:0").await?;
    let port = taken.local_addr()?.port().to_string();
    let options = ReconcilerOptions::default().without_cluster()?.env("REDIS_URL", "redis://127.0.0.1:1");
    let said = refusal("balancer-reconcile", &options.env("ADMIN_PORT", &port)).await?;
    ensure!(said.contains(&format!("ADMIN_PORT: cannot listen on {port}")), "{said}");
    Ok(())
}

#[tokio::test]
async fn a_missing_right_is_reported_and_delays_readiness() -> Result<()> {
    need!(Redis, ControlPlane, Reconciler);
    let scenario = Scenario::bare(Plane::shared().await?, "rights").await?;
    let (plane, namespace) = (&scenario.plane, &scenario.namespace);
    let missing: &[(&'static str, &str, Right)] =
        &[("no-nodes", "nodes", NODES), ("no-pods", "pods", PODS), ("no-leases", "leases", LEASES)];
    for (name, resource, right) in missing {
        let account = Account::new(plane, namespace, name).await?;
        for granted in [PODS, EVENTS, LEASES, NODES] {
            if granted == *right {
                continue;
            }
            if granted == NODES {
                account.allow_everywhere(plane, granted).await?;
            } else {
                account.allow(plane, namespace, granted).await?;
            }
        }
        let options = scenario.reconciling(&account.kubeconfig).redis(&scenario.redis)?;
        let mut reconciler = Reconciler::begin(options)?;
        until_true(SOON, "it to say what it may not", async || {
            let log = reconciler.process().log()?;
            Ok(log.lines().any(|line| line.contains(resource) && line.contains("forbidden")))
        })
        .await?;
        let answer = endpoint::get(&reconciler.admin()?, "/livez").await?;
        assert_eq!((answer.status, reconciler.is_ready().await?), (200, false), "{name}");
        if *right == NODES {
            account.allow_everywhere(plane, *right).await?;
        } else {
            account.allow(plane, namespace, *right).await?;
        }
        reconciler.until_ready().await?;
        ensure!(reconciler.terminate(SOON).await?.success());
    }
    Ok(())
}

#[tokio::test]
async fn an_inaccessible_namespace_does_not_block_the_others() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler);
    let mut scenario = Scenario::start("seen", 1, strict()).await?;
    // It may look into the one, and the other is gone, with the right to look into it.
    let namespaces = format!("{},gone-{}", scenario.namespace, scenario.namespace);
    let options = scenario.reconciler_options().await?.env("WATCH_NAMESPACES", namespaces);
    scenario.reconcilers.push(Reconciler::start(options).await?);
    scenario.grow(JOB, "0.5", 6).await?;
    scenario.redis.flush().await?;
    scenario.until_ledger_matches_pods(JOB, REPAIRED).await?;
    let restarts = scenario.reconcile_metric("watch_restarts_total", &[("resource", "pods")]).await?;
    ensure!(restarts > 3.0, "{restarts} watches were tried again");
    let log = scenario.reconcilers[0].process().log()?;
    ensure!(log.lines().any(|line| line.contains("gone-") && line.contains("forbidden")), "{log}");
    Ok(())
}

#[tokio::test]
async fn reconcilers_of_different_ledgers_use_different_leases() -> Result<()> {
    need!(Redis, ControlPlane, Reconciler);
    let mut scenario = Scenario::bare(Plane::shared().await?, "leases").await?;
    let options = scenario.reconciler_options().await?;
    for lease in ["spot-balancer-reconciler", "other-reconciler"] {
        let reconciler = Reconciler::start(options.clone().env("RECONCILE_LEASE", lease)).await?;
        until_true(SOON, &format!("the one of {lease} to lead"), async || reconciler.leads().await).await?;
        scenario.reconcilers.push(reconciler);
    }
    Ok(())
}

#[tokio::test]
async fn only_the_leader_reports_live_executors() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler);
    let mut scenario = Scenario::reconciled("shown", 1, 2).await?;
    scenario.grow(JOB, "0.5", 4).await?;
    for left in [2, 1] {
        until_true(SOON, &format!("one of {left} to show four executors"), async || {
            let mut shown = Vec::new();
            for reconciler in &scenario.reconcilers {
                let page = reconciler.metrics().await?;
                let executors = page.sum("spot_balancer_reconcile_live_executors", &[]);
                shown.push((reconciler.leads().await?, executors, page.sum("spot_balancer_reconcile_live_jobs", &[])));
            }
            ensure!(
                shown.iter().all(|(leads, executors, _)| *leads || *executors == Some(0.0)),
                "{shown:?}: one shows executors though it does not lead"
            );
            Ok(shown.contains(&(true, Some(4.0), Some(1.0))))
        })
        .await?;
        let leader = scenario.leader().await?.context("nobody leads")?;
        ensure!(scenario.reconcilers.remove(leader).terminate(SOON).await?.success());
    }
    Ok(())
}

#[tokio::test]
async fn a_store_that_is_not_there_at_the_start_is_waited_for() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler);
    let mut scenario = Scenario::start("early", 1, strict()).await?;
    scenario.driver(JOB, "0.5").await?.pod()?;
    scenario.executors(JOB, 1..=10, 4).await?;
    scenario.redis.stop();
    let options = scenario.reconciler_options().await?;
    scenario.reconcilers.push(Reconciler::begin(options)?);
    until_true(SOON, "it to miss its store", async || {
        Ok(scenario.reconcile_metric("store_errors_total", &[]).await? >= 1.0)
    })
    .await?;
    ensure!(!scenario.reconcilers[0].is_ready().await?, "it leads, and has written nothing");
    scenario.redis.start_again_empty().await?;
    scenario.until_ledger_matches_pods(JOB, REPAIRED).await?;
    scenario.reconcilers[0].until_ready().await?;
    scenario.ensure_ratio_recovers(JOB, 0.5).await
}

#[tokio::test]
async fn an_unreachable_api_delays_the_start() -> Result<()> {
    need!(Redis, Reconciler);
    let redis = RedisServer::start().await?;
    let mut reconciler = Reconciler::begin(ReconcilerOptions::default().without_cluster()?.redis(&redis)?)?;
    until_true(SOON, "it to miss its API", async || {
        let restarts = reconciler.metrics().await?.sum("spot_balancer_reconcile_watch_restarts_total", &[]);
        Ok(restarts.is_some_and(|restarts| restarts >= 2.0))
    })
    .await?;
    let answer = endpoint::get(&reconciler.admin()?, "/livez").await?;
    assert_eq!((answer.status, reconciler.is_ready().await?), (200, false));
    ensure!(reconciler.terminate(SOON).await?.success(), "{}", reconciler.process().log()?);
    Ok(())
}

#[tokio::test]
async fn metrics_and_log_show_what_the_reconciler_does() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler);
    let mut scenario = Scenario::without_deletions(Plane::shared().await?, "metrics").await?;
    // A follower is ready, and does nothing.
    scenario.start_reconcilers(1).await?;
    assert_eq!(scenario.reconcile_metric("leader", &[]).await?, 1.0);
    ensure!(!scenario.reconcilers[1].leads().await?, "the second one leads");

    let counts = scenario.grow(JOB, "0.5", 20).await?;
    scenario.driver("other", "0.5").await?.pod()?;
    // One entry is lost, two pods are, and one entry is wrong.
    let (_, entries) = scenario.keys(JOB);
    let (spot, on_demand) = (scenario.some(JOB, "spot", 4).await?, scenario.some(JOB, "on-demand", 1).await?);
    let mut redis = scenario.redis.connection().await?;
    redis::cmd("HDEL").arg(&entries).arg(&spot[0]).exec_async(&mut redis).await?;
    redis::cmd("HSET").arg(&entries).arg(&on_demand[0]).arg("spot 1 -").exec_async(&mut redis).await?;
    for name in &spot[2..] {
        pods::remove(&scenario.pods(), name).await?;
    }
    let left = scenario.until_ledger_matches_pods(JOB, REPAIRED).await?;
    assert_eq!(left.spot, counts.spot - 2);
    for (kind, count) in [("missing", 1.0), ("stale", 2.0), ("wrong_capacity", 1.0)] {
        assert_eq!(scenario.reconcile_metric("drift_total", &[("kind", kind)]).await?, count, "{kind}");
    }
    for (name, labels, least) in [
        ("jobs_total", &[("outcome", "in_sync")][..], 1.0),
        ("jobs_total", &[("outcome", "corrected")], 1.0),
        ("lag_seconds_count", &[], 1.0),
        ("resync_seconds_count", &[], 1.0),
        ("resyncs_total", &[("cause", "start")], 1.0),
    ] {
        let value = scenario.reconcile_metric(name, labels).await?;
        ensure!(value >= least, "{name}{labels:?} is {value}");
    }
    for (name, labels, value) in [
        ("live_jobs", &[][..], 2.0),
        ("live_executors", &[("capacity", "spot")], 8.0),
        ("live_executors", &[("capacity", "on-demand")], 10.0),
        ("live_executors", &[("capacity", "unknown")], 0.0),
    ] {
        until_true(REPAIRED, &format!("{name}{labels:?} to be {value}"), async || {
            let page = scenario.reconcilers[0].metrics().await?;
            Ok(page.sum(&format!("spot_balancer_reconcile_{name}"), labels) == Some(value))
        })
        .await?;
    }
    let page = scenario.reconcilers[0].metrics().await?;
    let quick = page.sum("spot_balancer_reconcile_lag_seconds_sum", &[]).unwrap_or(f64::MAX)
        / page.sum("spot_balancer_reconcile_lag_seconds_count", &[]).unwrap_or(0.0);
    ensure!(quick < 2.0, "from a change to its repair it takes {quick} s on average");

    let log = scenario.reconcilers[0].process().log()?;
    let corrected: Vec<&str> =
        log.lines().filter(|line| line.contains("ledger corrected") && line.contains(JOB)).collect();
    ensure!(!corrected.is_empty() && corrected.len() <= 4, "{log}");
    for line in corrected {
        for part in ["namespace", "missing", "stale", "wrong_capacity", "spot", "on_demand"] {
            ensure!(line.contains(&format!("{part}=")), "{line}");
        }
    }
    Ok(())
}

#[tokio::test]
async fn an_executor_of_unknown_capacity_is_counted_when_bound() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Reconciler);
    let mut scenario = Scenario::bare(Plane::shared().await?, "unknown").await?;
    scenario.start_reconcilers(1).await?;
    let pool = scenario.namespace.clone();
    scenario.post(&executor(JOB, 1).on_pool(&pool)).await?.pod()?;
    until_true(REPAIRED, "it to be seen", async || {
        Ok(scenario.reconcile_metric("live_executors", &[("capacity", "unknown")]).await? == 1.0)
    })
    .await?;
    ensure!(scenario.entries(JOB).await?.is_empty(), "it was entered as something");
    nodes::of_pool(&scenario.client, &pool, "spot").await?;
    scenario.until_bound(JOB).await?;
    let bound = scenario.until_ledger_matches_pods(JOB, REPAIRED).await?;
    assert_eq!((bound.spot, bound.on_demand), (1, 0));
    Ok(())
}
