//! What the reconciler leans on breaks, or the reconciler itself: the store, the API, its process, its
//! lease. The ledger is true again soon after.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use balancer_tests::balance::Balance;
use balancer_tests::control_plane::{Options, Plane, kubeconfig_through};
use balancer_tests::need;
use balancer_tests::pods::{self, executor};
use balancer_tests::process::Signal;
use balancer_tests::reconciler::Reconciler;
use balancer_tests::scenario::{Counts, GRACE, REPAIRED, Scenario, placed};
use balancer_tests::wait::{SOON, until, until_true};
use futures::future::try_join_all;
use futures::{StreamExt, TryStreamExt};
use kube::api::EvictParams;
use tokio::time::{Instant, sleep, sleep_until};

/// How long a leader that is gone still counts as one.
const LEASE: Duration = Duration::from_secs(15);
/// To find out that a lease was given up, or has run out.
const NOTICED: Duration = Duration::from_secs(3);
const JOB: &str = "etl";

/// Deletes executors at once.
async fn remove(scenario: &Scenario, names: Vec<String>) -> Result<()> {
    for name in names {
        pods::remove(&scenario.pods(), &name).await?;
    }
    Ok(())
}

/// Waits until executor `id` is there.
async fn until_made(scenario: &Scenario, id: u32) -> Result<()> {
    let name = format!("{JOB}-exec-{id}");
    until_true(SOON, &name, async || Ok(scenario.pods().get_opt(&name).await?.is_some())).await
}

/// The number of the reconciler that leads, once one does.
async fn leading(scenario: &Scenario) -> Result<usize> {
    until(SOON, "one reconciler to lead", async || scenario.leader().await).await
}

/// Puts one in the place of the scenario's reconciler that reaches the API by a way that can be cut.
async fn lead_through(scenario: &mut Scenario) -> Result<Balance> {
    scenario.reconcilers.pop().context("no reconciler")?.terminate(SOON).await?;
    let api = Balance::start(&[scenario.plane.port()]).await?;
    let kubeconfig = kubeconfig_through(api.port, &scenario.account().await?.kubeconfig)?;
    let options = scenario.reconciler_options().await?.kubeconfig(&kubeconfig);
    scenario.reconcilers.push(Reconciler::start(options).await?);
    Ok(api)
}

/// Looks again and again, for so long, whether the ledger is still what really runs.
async fn ensure_unchanged_for(scenario: &Scenario, time: Duration, truth: Counts) -> Result<()> {
    let end = Instant::now() + time;
    while Instant::now() < end {
        let seen = scenario.ensure_ledger_matches_pods(JOB).await?;
        ensure!(seen == truth, "{seen:?}, and was {truth:?}");
        sleep(Duration::from_millis(50)).await;
    }
    Ok(())
}

async fn transitions(scenario: &Scenario) -> Result<i32> {
    Ok(scenario.lease().await?.lease_transitions.unwrap_or(0))
}

#[tokio::test]
async fn an_emptied_store_is_refilled() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler);
    let scenario = Scenario::reconciled("flushed", 1, 1).await?;
    let before = scenario.grow(JOB, "0.7", 30).await?;
    scenario.driver("waiting", "0.9").await?.pod()?;
    // By which a loss is told.
    until_true(SOON, "a mark in the store", async || {
        Ok(redis::cmd("EXISTS").arg("exec-heartbeat").query_async(&mut scenario.redis.connection().await?).await?)
    })
    .await?;
    scenario.redis.flush().await?;
    assert_eq!(scenario.until_ledger_matches_pods(JOB, REPAIRED).await?, before);
    assert_eq!(scenario.policy(JOB).await?, (Some("0.7".to_owned()), Some("0".to_owned())));
    assert_eq!(scenario.policy("waiting").await?.0.as_deref(), Some("0.9"));
    // Which may have begun before the ledgers were right, and ends after.
    until_true(REPAIRED, "a round for this cause", async || {
        Ok(scenario.reconcile_metric("resyncs_total", &[("cause", "store")]).await? >= 1.0)
    })
    .await?;
    scenario.ensure_ratio_recovers(JOB, 0.7).await?;
    assert_eq!(scenario.metric("spot_balancer_driver_lookups_total", &[]).await?, 0.0);
    Ok(())
}

#[tokio::test]
async fn a_store_lost_under_load_is_refilled() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler);
    let mut scenario = Scenario::reconciled("lost", 1, 1).await?;
    scenario.grow(JOB, "0.7", 30).await?;
    let (client, namespace, redis) = (&scenario.client, &scenario.namespace, &mut scenario.redis);
    let made = AtomicU32::new(0);
    let load = futures::stream::iter(31..=180)
        .map(async |id| {
            placed(&executor(JOB, id).post(client, namespace).await?.pod()?)?;
            made.fetch_add(1, Ordering::Relaxed);
            anyhow::Ok(())
        })
        .buffer_unordered(8)
        .try_collect::<()>();
    let store = async {
        let made_so_many =
            async |count| until_true(SOON, "creations", async || Ok(made.load(Ordering::Relaxed) >= count)).await;
        made_so_many(40).await?;
        redis.stop();
        made_so_many(80).await?;
        redis.start_again_empty().await
    };
    tokio::try_join!(load, store)?;
    scenario.until_ledger_matches_pods(JOB, REPAIRED).await?;
    ensure!(scenario.reconcile_metric("store_errors_total", &[]).await? >= 1.0, "the outage was not noticed");
    scenario.ensure_ratio_recovers(JOB, 0.7).await
}

#[tokio::test]
async fn a_hanging_store_costs_little_and_is_corrected_afterwards() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler);
    let scenario = Scenario::reconciled("frozen-store", 1, 1).await?;
    scenario.grow(JOB, "0.7", 40).await?;
    let process = scenario.reconcilers[0].process();
    let (end, cpu) = (Instant::now() + Duration::from_secs(20), process.cpu()?);
    let mut gone = scenario.some(JOB, "spot", 10).await?;
    scenario.redis.freeze()?;
    for name in gone.split_off(5) {
        scenario.pods().evict(&name, &EvictParams::default()).await?;
    }
    remove(&scenario, gone).await?;
    scenario.executors(JOB, scenario.fresh_ids().take(10), 4).await?;
    ensure!(scenario.reconcile_metric("store_errors_total", &[("kind", "timed_out")]).await? >= 1.0, "it did not hang");
    sleep_until(end).await;
    let (cpu, memory) = (process.cpu()?.saturating_sub(cpu), process.resident_mb()?);
    ensure!(cpu < Duration::from_secs(2) && memory < 64.0, "the wait took {cpu:?} of CPU, {memory} MB in the end");
    scenario.redis.thaw()?;
    scenario.until_ledger_matches_pods(JOB, REPAIRED).await?;
    scenario.ensure_ratio_recovers(JOB, 0.7).await
}

#[tokio::test]
async fn the_successor_of_a_reconciler_killed_during_changes_catches_up() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler);
    let mut scenario = Scenario::without_deletions(Plane::shared().await?, "killed").await?;
    scenario.grow(JOB, "0.5", 30).await?;
    let gone = scenario.some(JOB, "spot", 10).await?;
    let mut killed = std::mem::take(&mut scenario.reconcilers);
    tokio::try_join!(scenario.executors(JOB, 31..=60, 4), remove(&scenario, gone), async {
        until_made(&scenario, 35).await?;
        killed.clear();
        Ok(())
    })?;
    remove(&scenario, scenario.some(JOB, "on-demand", 5).await?).await?;
    ensure!(scenario.ensure_ledger_matches_pods(JOB).await.is_err(), "nothing was left to do");
    scenario.start_reconcilers(1).await?;
    scenario.until_ledger_matches_pods(JOB, LEASE + NOTICED + REPAIRED).await?;
    scenario.ensure_ratio_recovers(JOB, 0.5).await
}

#[tokio::test]
async fn a_reconciler_survives_an_api_outage_and_relists_after_compaction() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler);
    let plane = Plane::own(Options { scheduler: true, ..Options::default() }).await?;
    let mut scenario = Scenario::without_deletions(plane, "outage").await?;
    scenario.grow(JOB, "0.5", 40).await?;

    scenario.plane.own_mut()?.restart_apiserver().await?;
    remove(&scenario, scenario.some(JOB, "spot", 10).await?).await?;
    scenario.until_ledger_matches_pods(JOB, REPAIRED).await?;
    scenario.ensure_ratio_recovers(JOB, 0.5).await?;

    // What it has seen last is in no history any more.
    scenario.reconcilers[0].process().freeze()?;
    remove(&scenario, scenario.some(JOB, "spot", 10).await?).await?;
    scenario.plane.own_mut()?.compact().await?;
    scenario.reconcilers[0].process().thaw()?;
    scenario.until_ledger_matches_pods(JOB, REPAIRED).await?;
    scenario.ensure_ratio_recovers(JOB, 0.5).await?;
    let log = scenario.reconcilers[0].process().log()?;
    ensure!(log.contains("no longer has the resource version to resume from"), "its past was not forgotten");
    Ok(())
}

#[tokio::test]
async fn a_cut_watch_resumes_with_the_missed_changes() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler);
    let mut scenario = Scenario::without_deletions(Plane::shared().await?, "cut").await?;
    let api = lead_through(&mut scenario).await?;
    scenario.grow(JOB, "0.5", 40).await?;
    for resource in ["pods", "nodes"] {
        let restarts = scenario.reconcile_metric("watch_restarts_total", &[("resource", resource)]).await?;
        ensure!(restarts == 0.0, "the watch of {resource} was lost before it was cut");
    }
    api.send_to(&[]);
    remove(&scenario, scenario.some(JOB, "spot", 10).await?).await?;
    for resource in ["pods", "nodes"] {
        until_true(SOON, "the cut to be noticed", async || {
            Ok(scenario.reconcile_metric("watch_restarts_total", &[("resource", resource)]).await? >= 1.0)
        })
        .await?;
    }
    api.send_to(&[scenario.plane.port()]);
    scenario.until_ledger_matches_pods(JOB, REPAIRED).await?;
    scenario.ensure_ratio_recovers(JOB, 0.5).await
}

/// What it cannot see may be there all the same.
#[tokio::test]
async fn a_reconciler_cut_off_from_the_api_removes_nothing() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler);
    let mut scenario = Scenario::reconciled("cut-off", 1, 1).await?;
    let api = lead_through(&mut scenario).await?;
    scenario.grow(JOB, "0.5", 20).await?;
    let told = scenario.reconcilers[0].process().log()?.lines().count();
    for (ids, silently) in [(21..=40, false), (41..=60, true)] {
        if silently {
            api.swallow()
        } else {
            api.send_to(&[])
        }
        scenario.executors(JOB, ids, 4).await?;
        scenario.until_bound(JOB).await?;
        let truth = scenario.ensure_ledger_matches_pods(JOB).await?;
        ensure_unchanged_for(&scenario, GRACE * 2, truth)
            .await
            .context("it removed entries while it was out of sync")?;
        api.send_to(&[scenario.plane.port()]);
        scenario.until_uids_recorded(JOB).await?;
    }
    assert_eq!(scenario.reconcile_metric("drift_total", &[]).await?, 0.0);
    // Two outages of ten seconds and more.
    let log = scenario.reconcilers[0].process().log()?;
    let outages: Vec<&str> = log.lines().skip(told).collect();
    let broken = outages.iter().filter(|line| line.contains("watch disconnected")).count();
    ensure!((2..=4).contains(&broken) && outages.len() <= 60, "{} lines:\n{}", outages.len(), outages.join("\n"));
    scenario.ensure_ratio_recovers(JOB, 0.5).await
}

/// It runs, and has the store, and does not know that another one leads.
#[tokio::test]
async fn a_leader_cut_off_past_its_lease_writes_no_stale_state() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler);
    let mut scenario = Scenario::without_deletions(Plane::shared().await?, "cut-leader").await?;
    let api = lead_through(&mut scenario).await?;
    scenario.start_reconcilers(1).await?;
    scenario.grow(JOB, "0.5", 30).await?;
    assert_eq!(leading(&scenario).await?, 0);
    api.send_to(&[]);
    let [cut, other] = scenario.reconcilers.as_slice() else { bail!("not two reconcilers") };
    remove(&scenario, scenario.some(JOB, "spot", 10).await?).await?;
    scenario.executors(JOB, 31..=50, 4).await?;
    scenario.until_bound(JOB).await?;
    until_true(LEASE + NOTICED, "the other one to lead", async || other.leads().await).await?;
    let truth = scenario.until_ledger_matches_pods(JOB, REPAIRED).await?;
    ensure_unchanged_for(&scenario, GRACE, truth).await.context("the one that is cut off wrote of the past")?;
    ensure!(!cut.leads().await?, "the one that is cut off still leads");
    api.send_to(&[scenario.plane.port()]);
    ensure_unchanged_for(&scenario, GRACE, truth).await.context("the one that came back wrote of the past")?;
    ensure!(!cut.leads().await? && other.leads().await?, "the one that came back leads again");
    scenario.ensure_ratio_recovers(JOB, 0.5).await
}

#[tokio::test]
async fn a_leader_frozen_past_its_lease_writes_no_stale_state() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler);
    let mut scenario = Scenario::without_deletions(Plane::shared().await?, "frozen-leader").await?;
    scenario.start_reconcilers(1).await?;
    scenario.grow(JOB, "0.5", 30).await?;
    let leader = leading(&scenario).await?;
    let (frozen, other) = (&scenario.reconcilers[leader], &scenario.reconcilers[1 - leader]);
    let before = transitions(&scenario).await?;

    // Amid changes, so that it has something to write that is not true any more when it wakes.
    let gone = scenario.some(JOB, "spot", 10).await?;
    tokio::try_join!(scenario.executors(JOB, 31..=50, 4), remove(&scenario, gone), async {
        until_made(&scenario, 35).await?;
        frozen.process().freeze()
    })?;
    until_true(LEASE + NOTICED, "the other one to lead", async || other.leads().await).await?;
    remove(&scenario, scenario.some(JOB, "on-demand", 10).await?).await?;
    scenario.executors(JOB, 51..=65, 4).await?;
    scenario.until_bound(JOB).await?;
    let truth = scenario.until_ledger_matches_pods(JOB, REPAIRED).await?;
    let lease = scenario.lease().await?;

    frozen.process().thaw()?;
    ensure_unchanged_for(&scenario, GRACE * 2, truth).await.context("the one that woke wrote of the past")?;
    ensure!(!frozen.leads().await? && other.leads().await?, "the one that woke leads again");
    let after = scenario.lease().await?;
    assert_eq!((after.lease_transitions, after.holder_identity), (lease.lease_transitions, lease.holder_identity));
    ensure!(transitions(&scenario).await? > before, "the lease does not tell that it changed hands");
    scenario.ensure_ratio_recovers(JOB, 0.5).await
}

#[tokio::test]
async fn a_terminated_leader_hands_over_at_once() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler);
    let mut scenario = Scenario::without_deletions(Plane::shared().await?, "ends").await?;
    scenario.start_reconcilers(1).await?;
    scenario.grow(JOB, "0.5", 20).await?;
    let before = transitions(&scenario).await?;
    let leader = leading(&scenario).await?;
    let mut leaver = scenario.reconcilers.remove(leader);
    leaver.process().signal(Signal::TERM)?;
    let other = &scenario.reconcilers[0];
    until_true(NOTICED, "the other one to lead", async || other.leads().await).await?;
    ensure!(leaver.ended(SOON).await?.success());
    ensure!(transitions(&scenario).await? > before, "the lease does not tell that it changed hands");
    remove(&scenario, scenario.some(JOB, "spot", 5).await?).await?;
    scenario.until_ledger_matches_pods(JOB, REPAIRED).await?;
    scenario.ensure_ratio_recovers(JOB, 0.5).await?;

    // The last one leaves the lease to whoever comes, who need not wait for its end.
    let mut last = scenario.reconcilers.remove(0);
    ensure!(last.terminate(SOON).await?.success());
    let lease = scenario.lease().await?;
    ensure!(lease.holder_identity.as_deref().unwrap_or_default().is_empty(), "still held: {lease:?}");
    scenario.start_reconcilers(1).await?;
    until_true(NOTICED, "the next one to lead", async || scenario.reconcilers[0].leads().await).await
}

#[tokio::test]
async fn a_killed_leader_is_replaced_when_its_lease_expires() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler);
    let mut scenario = Scenario::without_deletions(Plane::shared().await?, "dies").await?;
    scenario.start_reconcilers(2).await?;
    scenario.grow(JOB, "0.5", 20).await?;
    let leader = leading(&scenario).await?;
    scenario.reconcilers.remove(leader).kill();
    let gone = Instant::now();
    remove(&scenario, scenario.some(JOB, "spot", 5).await?).await?;
    until_true(LEASE + NOTICED, "another one to lead", async || Ok(scenario.leader().await?.is_some())).await?;
    ensure!(gone.elapsed() > LEASE / 2, "a lease that was held did not count");
    scenario.until_ledger_matches_pods(JOB, REPAIRED).await?;
    scenario.ensure_ratio_recovers(JOB, 0.5).await?;
    // And no two at once.
    let leads = try_join_all(scenario.reconcilers.iter().map(async |reconciler| reconciler.leads().await)).await?;
    assert_eq!(leads.iter().filter(|leads| **leads).count(), 1);
    Ok(())
}

#[tokio::test]
async fn a_lease_deleted_under_its_leader_is_recreated() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler);
    let mut scenario = Scenario::without_deletions(Plane::shared().await?, "lease").await?;
    scenario.start_reconcilers(1).await?;
    scenario.grow(JOB, "0.5", 20).await?;
    // So that the ledger knows of a term that a new Lease does not.
    let leader = leading(&scenario).await?;
    ensure!(scenario.reconcilers.remove(leader).terminate(SOON).await?.success());
    scenario.start_reconcilers(1).await?;
    remove(&scenario, scenario.some(JOB, "spot", 5).await?).await?;
    scenario.until_ledger_matches_pods(JOB, NOTICED + REPAIRED).await?;
    let before = transitions(&scenario).await?;
    ensure!(before >= 1, "it has not changed hands");

    scenario.delete_lease().await?;
    remove(&scenario, scenario.some(JOB, "on-demand", 5).await?).await?;
    until_true(LEASE, "the lease to be there again", async || Ok(scenario.lease().await.is_ok())).await?;
    leading(&scenario).await?;
    remove(&scenario, scenario.some(JOB, "on-demand", 2).await?).await?;
    scenario.until_ledger_matches_pods(JOB, NOTICED + REPAIRED).await?;
    scenario.ensure_ratio_recovers(JOB, 0.5).await
}

/// What was placed while no one followed it waits its grace from its placement, not from a new start.
#[tokio::test]
async fn a_restart_does_not_extend_the_grace_of_a_refused_placement() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler);
    let mut scenario = Scenario::reconciled("restarted", 1, 1).await?;
    scenario.grow(JOB, "0.5", 10).await?;
    scenario.reconcilers.pop().context("no reconciler")?.terminate(SOON).await?;
    let refused = executor(JOB, 100).invalid();
    assert_eq!(scenario.post(&refused).await?.status, 422);
    ensure!(scenario.ensure_ledger_matches_pods(JOB).await.is_err(), "it was refused before us");
    scenario.start_reconcilers(1).await?;
    scenario.until_ledger_matches_pods(JOB, GRACE + REPAIRED).await?;
    scenario.ensure_ratio_recovers(JOB, 0.5).await
}

/// A new Lease counts from the start, and the ledgers know later terms.
#[tokio::test]
async fn a_deleted_lease_costs_the_next_leader_one_later_term() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler);
    let mut scenario = Scenario::reconciled("deleted-lease", 1, 1).await?;
    scenario.grow(JOB, "0.5", 10).await?;
    for _ in 0..2 {
        scenario.reconcilers.pop().context("no reconciler")?.terminate(SOON).await?;
        scenario.start_reconcilers(1).await?;
    }
    let before = transitions(&scenario).await?;
    ensure!(before >= 3, "the lease has changed hands {before} times only");
    scenario.reconcilers.pop().context("no reconciler")?.terminate(SOON).await?;
    scenario.delete_lease().await?;
    scenario.start_reconcilers(1).await?;
    ensure!(transitions(&scenario).await? > before, "it leads in a term that the ledgers refuse");
    remove(&scenario, scenario.some(JOB, "spot", 3).await?).await?;
    scenario.until_ledger_matches_pods(JOB, REPAIRED).await?;
    scenario.ensure_ratio_recovers(JOB, 0.5).await
}
