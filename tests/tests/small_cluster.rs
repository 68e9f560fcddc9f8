//! The webhook that reconciles by itself: alone, with its ledger in memory, or as several replicas beside
//! one Redis.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use balancer_core::{Policy, decide};
use balancer_tests::account::{Account, NODES, PODS};
use balancer_tests::balance::Balance;
use balancer_tests::control_plane::{Plane, kubeconfig_through};
use balancer_tests::pods::annotate;
use balancer_tests::scenario::{Counts, GRACE, REPAIRED, Scenario};
use balancer_tests::wait::{SOON, until_true};
use balancer_tests::webhook::Webhook;
use balancer_tests::{endpoint, need};
use kube::api::EvictParams;
use tokio::time::sleep;

const JOB: &str = "etl";

/// A namespace served by one webhook that keeps its ledger in memory.
async fn small(purpose: &str) -> Result<(Scenario, Account)> {
    let mut scenario = Scenario::bare(Plane::shared().await?, purpose).await?;
    let account = scenario.account_without_leases().await?;
    scenario.webhooks.push(Webhook::start(scenario.in_memory(&account.kubeconfig)).await?);
    scenario.send_to_webhooks();
    scenario.registration().apply(&scenario.plane).await?;
    Ok((scenario, account))
}

/// The live executors of all jobs, as the webhook's reconciling sees them.
async fn seen(webhook: &Webhook) -> Result<f64> {
    let page = webhook.metrics().await?;
    page.sum("spot_balancer_reconcile_live_executors", &[]).context("it does not reconcile")
}

/// Makes executors one after the other, and fails unless each goes where a ledger that says what lives
/// sends it.
async fn ensure_placed_by_live_counts(scenario: &Scenario, ratio: &str, count: usize) -> Result<Counts> {
    let policy = Policy { spot_ratio: ratio.parse()?, ..Policy::default() };
    let mut counts = scenario.counts(JOB).await?;
    for id in scenario.fresh_ids().take(count) {
        let known =
            balancer_core::Counts { spot: u64::try_from(counts.spot)?, on_demand: u64::try_from(counts.on_demand)? };
        let right = decide(known, policy).context("opted out")?.as_str();
        let placed = scenario.executor(JOB, id).await?;
        ensure!(placed == right, "with {counts:?} the next went to {placed}");
        match right {
            "spot" => counts.spot += 1,
            _ => counts.on_demand += 1,
        }
    }
    Ok(counts)
}

#[tokio::test]
async fn a_memory_ledger_is_rebuilt_before_the_webhook_is_ready() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook);
    let (mut scenario, account) = small("rebuilt").await?;
    scenario.driver(JOB, "0.7").await?.pod()?;
    scenario.executors(JOB, 1..=20, 4).await?;
    assert_eq!(scenario.counts(JOB).await?, Counts { spot: 14, on_demand: 6 });
    scenario.webhooks.pop().context("no webhook")?.kill();

    // The next one starts while the API cannot be asked.
    let api = Balance::start(&[]).await?;
    let options = scenario.in_memory(&kubeconfig_through(api.port, &account.kubeconfig)?);
    let mut webhook = Webhook::begin(options)?;
    until_true(SOON, "it to serve", async || Ok(endpoint::get(&webhook.admin()?, "/livez").await?.status == 200))
        .await?;
    for _ in 0..20 {
        ensure!(!webhook.is_ready().await?, "it is ready, and knows nothing");
        sleep(Duration::from_millis(50)).await;
    }
    api.send_to(&[scenario.plane.port()]);
    webhook.until_ready().await?;
    assert_eq!(seen(&webhook).await?, 20.0);
    scenario.webhooks.push(webhook);
    scenario.send_to_webhooks();
    ensure_placed_by_live_counts(&scenario, "0.7", 20).await?.ensure_near(0.7, 1.0)?;
    assert_eq!(scenario.metric("spot_balancer_driver_lookups_total", &[]).await?, 0.0);
    Ok(())
}

#[tokio::test]
async fn a_memory_ledger_follows_evictions_and_edits() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook);
    let (mut scenario, _account) = small("follows").await?;
    scenario.driver(JOB, "0.7").await?.pod()?;
    scenario.executors(JOB, 1..=20, 4).await?;
    scenario.until_bound(JOB).await?;
    let webhook = &scenario.webhooks[0];
    until_true(REPAIRED, "all to be seen", async || Ok(seen(webhook).await? == 20.0)).await?;
    scenario.kubelet = None;
    for name in scenario.some(JOB, "spot", 7).await? {
        scenario.pods().evict(&name, &EvictParams::default()).await?;
    }
    let stale = [("kind", "stale")];
    until_true(REPAIRED, "the evicted to leave the ledger", async || {
        let drift = webhook.metrics().await?.sum("spot_balancer_reconcile_drift_total", &stale);
        Ok(drift == Some(7.0) && seen(webhook).await? == 13.0)
    })
    .await?;
    ensure_placed_by_live_counts(&scenario, "0.7", 20).await?.ensure_near(0.7, 1.0)?;

    annotate(&scenario.pods(), &format!("{JOB}-driver"), "workload/spot-ratio", Some("0")).await?;
    until_true(Duration::from_secs(2), "the edit to be followed", async || {
        Ok(scenario.executor(JOB, scenario.fresh_ids().next().context("no id")?).await? == "on-demand"
            && scenario.executor(JOB, scenario.fresh_ids().next().context("no id")?).await? == "on-demand")
    })
    .await?;
    ensure_placed_by_live_counts(&scenario, "0", 10).await?;
    Ok(())
}

/// It has no lease that runs out meanwhile.
#[tokio::test]
async fn a_memory_ledger_keeps_executors_during_an_api_outage() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook);
    let mut scenario = Scenario::bare(Plane::shared().await?, "keeps").await?;
    let api = Balance::start(&[scenario.plane.port()]).await?;
    let kubeconfig = kubeconfig_through(api.port, &scenario.account_without_leases().await?.kubeconfig)?;
    // So short that it ends in each outage: lists that cannot be had say nothing of who lives.
    let options = scenario.in_memory(&kubeconfig).env("RECONCILE_INTERVAL_SECONDS", "10");
    scenario.webhooks.push(Webhook::start(options).await?);
    scenario.send_to_webhooks();
    scenario.registration().apply(&scenario.plane).await?;
    scenario.driver(JOB, "0.7").await?.pod()?;
    for silently in [false, true] {
        if silently {
            api.swallow()
        } else {
            api.send_to(&[])
        }
        scenario.executors(JOB, scenario.fresh_ids().take(20), 4).await?;
        sleep(GRACE * 2).await;
        ensure_placed_by_live_counts(&scenario, "0.7", 5)
            .await
            .context("it removed entries while it was out of sync")?;
        api.send_to(&[scenario.plane.port()]);
        let webhook = &scenario.webhooks[0];
        let live = scenario.live(JOB).await?.len();
        #[expect(clippy::cast_precision_loss, reason = "a test's few dozen executors")]
        until_true(REPAIRED, "all to be seen", async || Ok(seen(webhook).await? == live as f64)).await?;
        let drift = webhook.metrics().await?.sum("spot_balancer_reconcile_drift_total", &[]);
        ensure!(drift.unwrap_or(0.0) == 0.0, "it repaired what was right");
    }
    Ok(())
}

#[tokio::test]
async fn a_reconciling_webhook_reports_a_missing_right_and_is_not_ready() -> Result<()> {
    need!(ControlPlane, Redis, Webhook);
    let scenario = Scenario::bare(Plane::shared().await?, "rights").await?;
    let account = Account::new(&scenario.plane, &scenario.namespace, "webhook").await?;
    account.allow(&scenario.plane, &scenario.namespace, PODS).await?;
    let mut webhook = Webhook::begin(scenario.in_memory(&account.kubeconfig))?;
    until_true(SOON, "it to say what it may not", async || {
        let log = webhook.process().log()?;
        Ok(log.lines().any(|line| line.contains("nodes") && line.contains("forbidden")))
    })
    .await?;
    assert_eq!(endpoint::get(&webhook.admin()?, "/livez").await?.status, 200);
    ensure!(!webhook.is_ready().await?, "it is ready, and knows nothing");
    account.allow_everywhere(&scenario.plane, NODES).await?;
    webhook.until_ready().await
}

#[tokio::test]
async fn webhooks_with_redis_reconcile_if_enabled_and_one_at_a_time() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook);
    let mut scenario = Scenario::bare(Plane::shared().await?, "inside").await?;
    let options = scenario.reconciler_options().await?.env("SPOT_PREFERENCE", "STRICT");
    for _ in 0..2 {
        scenario.webhooks.push(Webhook::start(options.clone().env("RECONCILE_ENABLED", "true")).await?);
    }
    // And one that is not asked to.
    scenario.webhooks.push(Webhook::start(options).await?);
    scenario.send_to_webhooks();
    scenario.registration().apply(&scenario.plane).await?;
    scenario.grow(JOB, "0.5", 20).await?;
    assert_eq!(scenario.metric("spot_balancer_reconcile_leader", &[]).await?, 1.0);
    ensure!(seen(&scenario.webhooks[2]).await.is_err(), "the third one reconciles");
    scenario.kubelet = None;
    for name in scenario.some(JOB, "spot", 5).await? {
        scenario.pods().evict(&name, &EvictParams::default()).await?;
    }
    assert_eq!(scenario.until_ledger_matches_pods(JOB, REPAIRED).await?, Counts { spot: 5, on_demand: 10 });
    scenario.ensure_ratio_recovers(JOB, 0.5).await
}

/// Its readiness is that of the store: a degraded answer beats none, and another replica may reconcile.
#[tokio::test]
async fn a_webhook_with_redis_is_ready_before_its_reconciler() -> Result<()> {
    need!(Redis, ControlPlane, Webhook);
    let mut scenario = Scenario::bare(Plane::shared().await?, "waits").await?;
    scenario.redis.stop();
    let options = scenario.reconciler_options().await?.env("RECONCILE_ENABLED", "true");
    let webhook = Webhook::start(options).await?;
    ensure!(!webhook.process().log()?.contains("a bug"));
    Ok(())
}

#[tokio::test]
async fn a_memory_ledger_does_not_reconcile_if_disabled() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook);
    let mut scenario = Scenario::bare(Plane::shared().await?, "told-not-to").await?;
    let account = scenario.account_without_leases().await?;
    let options = scenario.in_memory(&account.kubeconfig).env("RECONCILE_ENABLED", "false");
    scenario.webhooks.push(Webhook::start(options).await?);
    ensure!(seen(&scenario.webhooks[0]).await.is_err(), "it reconciles");
    Ok(())
}
