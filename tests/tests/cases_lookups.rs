//! What the lookups of drivers cost the apiserver, on the real one, whatever is created.

use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use anyhow::{Result, ensure};
use balancer_tests::certificate::authority;
use balancer_tests::control_plane::{Plane, kubeconfig_through};
use balancer_tests::gateway::Gateway;
use balancer_tests::pods::{JOB_ID_LABEL, driver, executor};
use balancer_tests::scenario::{Scenario, placed, strict};
use balancer_tests::webhook::Webhook;
use balancer_tests::{need, port};
use futures::{StreamExt, TryStreamExt};

const LOOKUPS: &str = "spot_balancer_driver_lookups_total";

fn count(of: &AtomicUsize) -> usize {
    of.load(Ordering::Relaxed)
}

/// A scenario whose webhook reaches the apiserver through a gateway that counts its lists.
async fn counted(purpose: &str) -> Result<(Scenario, Gateway)> {
    let mut scenario = Scenario::bare(Plane::shared().await?, purpose).await?;
    let port = port::free()?;
    let address = SocketAddrV4::new(Ipv4Addr::LOCALHOST, port);
    let gateway = Gateway::start(address, scenario.plane.port(), &authority()?.issue()?).await?;
    let kubeconfig = kubeconfig_through(port, scenario.plane.kubeconfig())?;
    start_webhook(&mut scenario, &kubeconfig).await?;
    Ok((scenario, gateway))
}

async fn start_webhook(scenario: &mut Scenario, kubeconfig: &Path) -> Result<()> {
    let options = strict().redis(&scenario.redis)?.kubeconfig(kubeconfig);
    scenario.webhooks.push(Webhook::start(options).await?);
    scenario.send_to_webhooks();
    scenario.registration().apply(&scenario.plane).await
}

#[tokio::test]
async fn a_flood_of_dry_runs_costs_few_lists() -> Result<()> {
    need!(Redis, ControlPlane, Webhook);
    let (scenario, gateway) = counted("dry-flood").await?;
    let begun = Instant::now();
    futures::stream::iter(0..200)
        .map(|number| {
            let scenario = &scenario;
            async move {
                let pod = executor(&format!("new-{number}"), 1);
                placed(&pod.dry_run(&scenario.client, &scenario.namespace).await?.pod()?)
            }
        })
        .buffer_unordered(100)
        .try_for_each(async |_| Ok(()))
        .await?;
    let seconds = begun.elapsed().as_secs_f64();
    let lists = &gateway.lists;
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a few hundred")]
    let allowed = 21 + (10.0 * seconds) as usize;
    ensure!(count(&lists.consistent) <= allowed, "{lists:?} in {seconds} s");
    ensure!(count(&lists.cached) <= 200, "{lists:?}");
    ensure!(count(&lists.most_in_flight) <= 2, "{lists:?}");
    // Each of the others was answered, by the default.
    let busy = scenario.metric(LOOKUPS, &[("outcome", "busy")]).await?;
    let none = scenario.metric(LOOKUPS, &[("outcome", "no_driver")]).await?;
    assert_eq!(busy + none, 200.0);
    ensure!(busy >= 1.0, "{lists:?} in {seconds} s");
    assert_eq!(scenario.metric(LOOKUPS, &[("outcome", "failed")]).await?, 0.0);

    // The namespace's real jobs are as before: each driver's policy was stored when it was created, and no executor
    // asks for it.
    let before = (count(&lists.cached), count(&lists.consistent));
    scenario.driver("real", "1").await?.pod()?;
    scenario.executors("real", 1..=5, 1).await?;
    scenario.ensure_counts_match_pods("real").await?.ensure_near(1.0, 0.0)?;
    assert_eq!((count(&lists.cached), count(&lists.consistent)), before);
    Ok(())
}

#[tokio::test]
async fn a_driver_is_found_in_the_apiservers_cache() -> Result<()> {
    need!(Redis, ControlPlane, Webhook);
    let (scenario, gateway) = counted("cached").await?;
    let driver = scenario.post(&driver("lost").annotation("workload/spot-ratio", "1")).await?.pod()?;
    let uid = driver.metadata.uid.unwrap_or_default();
    scenario.until_cache_is_current().await?;
    scenario.redis.flush().await?;
    for id in 1..=5 {
        scenario.post(&executor("lost", id).owned_by("lost-driver", &uid)).await?.pod()?;
    }
    assert_eq!(scenario.counts("lost").await?.spot, 5);
    assert_eq!((count(&gateway.lists.cached), count(&gateway.lists.consistent)), (1, 0));
    Ok(())
}

#[tokio::test]
async fn job_ids_that_are_no_label_values_are_not_looked_up() -> Result<()> {
    need!(Redis, ControlPlane, Webhook);
    let (scenario, gateway) = counted("invalid-id").await?;
    let long = "x".repeat(64);
    let ids = ["-x", "x-", "a b", "x,y=z", "é", ".", &long];
    for id in ids {
        let pod = executor("invalid", 1).without_label(JOB_ID_LABEL).label("spark-app-selector", id);
        let refused = pod.dry_run(&scenario.client, &scenario.namespace).await?;
        assert_eq!(refused.status, 422, "{id:?}: {}", refused.object);
        // The apiserver validates the pod after the webhook's answer.
        let refused = pod.post(&scenario.client, &scenario.namespace).await?;
        assert_eq!(refused.status, 422, "{id:?}: {}", refused.object);
    }
    let dry_runs = [("role", "executor"), ("outcome", "dry_run")];
    assert_eq!(
        scenario.metric("spot_balancer_admissions_total", &dry_runs).await?,
        f64::from(u8::try_from(ids.len())?)
    );
    assert_eq!((count(&gateway.lists.cached), count(&gateway.lists.consistent)), (0, 0));
    assert_eq!(scenario.metric(LOOKUPS, &[("outcome", "failed")]).await?, 0.0);
    Ok(())
}
