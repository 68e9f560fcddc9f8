//! One bad ledger, one bad Lease, or a store without memory: the others are reconciled all the same, and all is right
//! again soon after.

use std::time::Duration;

use anyhow::{Result, ensure};
use balancer_tests::need;
use balancer_tests::pods::{remove, set_phase};
use balancer_tests::reconciler::Reconciler;
use balancer_tests::scenario::{REPAIRED, Scenario};
use balancer_tests::wait::{SOON, until_true};
use k8s_openapi::api::coordination::v1::Lease;
use kube::Api;
use kube::api::{Patch, PatchParams};
use redis::AsyncCommands;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

const JOB: &str = "etl";
const OTHER: &str = "other";
/// How long something else than an admission can change a policy, and a moment to see it.
const CORRECTED: Duration = Duration::from_millis(10_500);
/// The longest that an unchanged Lease is respected, and the time to find out that it may be taken.
const LONGEST_LEASE: Duration = Duration::from_secs(60 + 3);

/// Sets how much memory the scenario's Redis may use, in bytes; 0 is as much as it wants.
async fn set_memory(scenario: &Scenario, bytes: u64) -> Result<()> {
    let mut set = redis::cmd("CONFIG");
    set.arg(&["SET", "maxmemory", &bytes.to_string(), "maxmemory-policy", "noeviction"]);
    Ok(set.query_async(&mut scenario.redis.connection().await?).await?)
}

/// Sets fields of the reconcilers' Lease.
async fn edit_lease(scenario: &Scenario, spec: Value) -> Result<()> {
    let leases = Api::<Lease>::namespaced(scenario.client.clone(), &scenario.namespace);
    let patch = Patch::Merge(json!({"spec": spec}));
    leases.patch("spot-balancer-reconciler", &PatchParams::default(), &patch).await?;
    Ok(())
}

async fn leads(scenario: &Scenario) -> Result<bool> {
    Ok(scenario.leader().await?.is_some())
}

#[tokio::test]
async fn a_full_store_loses_dead_entries_within_seconds_and_all_is_right_once_it_has_memory() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler);
    let scenario = Scenario::reconciled("full", 1, 1).await?;
    scenario.grow(JOB, "0.5", 20).await?;
    // Less than it uses: it stays full, whatever a removal frees.
    set_memory(&scenario, 1).await?;
    until_true(SOON, "the reconciler to notice", async || {
        Ok(scenario.reconcile_metric("store_errors_total", &[("kind", "full")]).await? >= 2.0)
    })
    .await?;
    ensure!(leads(&scenario).await?, "it has stopped");
    for capacity in ["spot", "on-demand"] {
        let failed = scenario.some(JOB, capacity, 1).await?.remove(0);
        set_phase(&scenario.pods(), &failed, "Failed").await?;
        until_true(REPAIRED, "the dead entry to go", async || {
            let (entries, counts) = (scenario.entries(JOB).await?, scenario.ledger(JOB).await?);
            Ok(!entries.contains_key(&failed) && counts.spot + counts.on_demand == entries.len())
        })
        .await?;
    }
    scenario.ensure_ledger_matches_pods(JOB).await?;

    // Without memory nothing is added: executors are placed by their numbers.
    scenario.executors(JOB, 21..=30, 4).await?;
    ensure!(scenario.metric("spot_balancer_placements_total", &[("source", "fallback")]).await? >= 10.0);
    ensure!(scenario.metric("spot_balancer_store_errors_total", &[("kind", "full")]).await? >= 10.0);
    scenario.until_bound(JOB).await?;
    let log = scenario.reconcilers[0].process().log()?;
    let warned = log.lines().filter(|line| line.contains("store is full")).count();
    ensure!((1..=4).contains(&warned), "it is logged {warned} times");

    set_memory(&scenario, 0).await?;
    scenario.until_ledger_matches_pods(JOB, REPAIRED).await?;
    scenario.ensure_ratio_recovers(JOB, 0.5).await
}

#[tokio::test]
async fn a_later_term_in_one_ledger_delays_the_others_by_a_moment() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler);
    let scenario = Scenario::reconciled("later-term", 1, 1).await?;
    scenario.grow(JOB, "0.5", 10).await?;
    scenario.grow(OTHER, "0.5", 4).await?;
    for term in [500_000_u64, 1_400_000] {
        let () = scenario.redis.connection().await?.hset(scenario.keys(OTHER).0, "term", term).await?;
        let gone = scenario.some(OTHER, "spot", 1).await?.remove(0);
        set_phase(&scenario.pods(), &gone, "Failed").await?;
        let begin = Instant::now();
        let failed = scenario.some(JOB, "spot", 1).await?.remove(0);
        set_phase(&scenario.pods(), &failed, "Failed").await?;
        scenario.until_ledger_matches_pods(JOB, REPAIRED).await?;
        scenario.until_ledger_matches_pods(OTHER, REPAIRED).await?;
        println!("both ledgers were right after {:?}, with two checks of 0.3 s", begin.elapsed());
        let transitions = scenario.lease().await?.lease_transitions.unwrap_or_default();
        ensure!(u64::try_from(transitions)? == term + 1, "it continued in term {transitions}");
        until_true(REPAIRED, "it to lead again", async || leads(&scenario).await).await?;
    }
    scenario.ensure_ratio_recovers(JOB, 0.5).await
}

#[tokio::test]
async fn a_lease_of_nobody_with_absurd_numbers_is_taken_within_a_minute() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler);
    let scenario = Scenario::reconciled("absurd-lease", 1, 1).await?;
    scenario.grow(JOB, "0.5", 10).await?;
    let absurd = json!({
        "holderIdentity": "nobody", "leaseDurationSeconds": i32::MAX, "leaseTransitions": i32::MAX,
        "renewTime": "9999-01-01T00:00:00.000000Z", "acquireTime": "9999-01-01T00:00:00.000000Z",
    });
    edit_lease(&scenario, absurd).await?;
    until_true(SOON, "it to follow", async || Ok(!leads(&scenario).await?)).await?;
    let failed = scenario.some(JOB, "spot", 1).await?.remove(0);
    set_phase(&scenario.pods(), &failed, "Failed").await?;
    until_true(LONGEST_LEASE, "it to lead again", async || leads(&scenario).await).await?;
    scenario.until_ledger_matches_pods(JOB, REPAIRED).await?;
    let transitions = scenario.lease().await?.lease_transitions.unwrap_or_default();
    ensure!((1..1000).contains(&transitions), "it counts {transitions} transitions");
    scenario.ensure_ratio_recovers(JOB, 0.5).await
}

#[tokio::test]
async fn the_leader_gauge_is_0_while_the_store_is_down() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler);
    let mut scenario = Scenario::reconciled("gauge", 1, 1).await?;
    scenario.grow(JOB, "0.5", 4).await?;
    ensure!(leads(&scenario).await?);
    scenario.redis.freeze()?;
    until_true(SOON, "the gauge to fall", async || Ok(!leads(&scenario).await?)).await?;
    sleep(Duration::from_secs(2)).await;
    ensure!(!leads(&scenario).await?, "it rises without a store");
    scenario.redis.thaw()?;
    until_true(SOON, "the gauge to rise", async || leads(&scenario).await).await?;
    scenario.redis.start_again_empty().await?;
    scenario.until_ledger_matches_pods(JOB, REPAIRED).await?;
    until_true(SOON, "the gauge to rise", async || leads(&scenario).await).await?;
    let name = scenario.some(JOB, "spot", 1).await?.remove(0);
    remove(&scenario.pods(), &name).await?;
    scenario.until_ledger_matches_pods(JOB, REPAIRED).await.map(drop)
}

#[tokio::test]
async fn a_term_that_no_lease_reaches_is_repaired_and_delays_nobody() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler);
    let scenario = Scenario::reconciled("absurd-term", 1, 1).await?;
    scenario.grow(JOB, "0.5", 10).await?;
    scenario.grow(OTHER, "0.5", 4).await?;
    let transitions = scenario.lease().await?.lease_transitions;
    for (repaired, term) in [(1.0, "3000000000"), (2.0, "99999999999999999999999999")] {
        let () = scenario.redis.connection().await?.hset(scenario.keys(OTHER).0, "term", term).await?;
        for job in [OTHER, JOB] {
            let failed = scenario.some(job, "spot", 1).await?.remove(0);
            set_phase(&scenario.pods(), &failed, "Failed").await?;
        }
        for job in [JOB, OTHER] {
            scenario.until_ledger_matches_pods(job, REPAIRED).await?;
        }
        assert_eq!(scenario.reconcile_metric("repaired_ledgers_total", &[("fault", "term")]).await?, repaired);
        ensure!(leads(&scenario).await?, "it has stopped");
    }
    assert_eq!(scenario.reconcile_metric("jobs_total", &[("outcome", "superseded")]).await?, 0.0);
    assert_eq!(scenario.lease().await?.lease_transitions, transitions);
    scenario.ensure_ratio_recovers(JOB, 0.5).await
}

#[tokio::test]
async fn a_policy_that_something_else_stores_is_corrected_within_ten_seconds() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler);
    let mut scenario = Scenario::reconciled("forged", 1, 1).await?;
    // The longest audit: as with the default grace.
    let options = scenario.reconciler_options().await?.env("RECONCILE_GRACE_SECONDS", "60");
    ensure!(scenario.reconcilers.remove(0).terminate(SOON).await?.success());
    scenario.reconcilers.push(Reconciler::start(options).await?);
    scenario.grow(JOB, "0.3", 10).await?;
    scenario.executors(OTHER, 1..=4, 4).await?;
    scenario.until_bound(OTHER).await?;
    scenario.until_uids_recorded(OTHER).await?;
    // Of a job without a driver, what the last reconcile left.
    until_true(SOON, "the policy of the job without a driver to be known", async || {
        Ok(scenario.policy(OTHER).await?.0.as_deref() == Some("0.5"))
    })
    .await?;
    scenario.until_ledger_matches_pods(OTHER, REPAIRED).await?;
    let forged = "spot-ratio=1 on-demand-base=7";
    for job in [JOB, OTHER] {
        let () = scenario.redis.connection().await?.hset(scenario.keys(job).0, "policy", forged).await?;
    }
    let begin = Instant::now();
    for (job, ratio) in [(JOB, "0.3"), (OTHER, "0.5")] {
        until_true(CORRECTED, "the policy to be corrected", async || {
            Ok(scenario.policy(job).await? == (Some(ratio.to_owned()), Some("0".to_owned())))
        })
        .await?;
        println!("the policy of {job} was right after {:?}", begin.elapsed());
    }
    assert_eq!(scenario.reconcile_metric("repaired_ledgers_total", &[("fault", "policy")]).await?, 2.0);
    scenario.ensure_ratio_recovers(JOB, 0.3).await
}

#[tokio::test]
async fn a_key_of_another_type_stops_nobody_and_is_repaired() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler);
    let scenario = Scenario::reconciled("wrong-type", 1, 1).await?;
    scenario.grow(JOB, "0.5", 10).await?;
    scenario.grow(OTHER, "0.5", 4).await?;
    let (count, pods) = scenario.keys(OTHER);
    for key in [count, pods] {
        let () = redis::cmd("SET").arg(key).arg("12").query_async(&mut scenario.redis.connection().await?).await?;
        for job in [OTHER, JOB] {
            let failed = scenario.some(job, "on-demand", 1).await?.remove(0);
            set_phase(&scenario.pods(), &failed, "Failed").await?;
        }
        scenario.until_ledger_matches_pods(JOB, REPAIRED).await?;
        scenario.until_ledger_matches_pods(OTHER, CORRECTED).await?;
    }
    assert_eq!(scenario.reconcile_metric("repaired_ledgers_total", &[("fault", "type")]).await?, 2.0);
    scenario.ensure_ratio_recovers(JOB, 0.5).await
}
