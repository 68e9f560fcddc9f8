//! What no admission tells of: executors that end by themselves or are made by nobody's leave, and jobs
//! that are gone. The ledger is true again within moments, and the job comes back to its ratio.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use balancer_core::{JobRef, PlaceRequest, Policy};
use balancer_store::{Ledger, RedisLedger, RedisOptions};
use balancer_tests::account::Account;
use balancer_tests::control_plane::Plane;
use balancer_tests::placement::request;
use balancer_tests::pods::{self, executor, set_phase};
use balancer_tests::reconciler::{Reconciler, ReconcilerOptions};
use balancer_tests::registration::Registration;
use balancer_tests::scenario::{Counts, Executors, GRACE, REPAIRED, Scenario, placed, strict};
use balancer_tests::wait::{SOON, until, until_true};
use balancer_tests::webhook::WebhookOptions;
use balancer_tests::{need, nodes, port};
use k8s_openapi::api::admissionregistration::v1::ValidatingWebhookConfiguration;
use kube::ResourceExt;
use kube::api::{Api, DeleteParams, EvictParams, ListParams, PostParams};
use redis::AsyncCommands;
use serde_json::json;
use tokio::time::sleep;

const JOB: &str = "etl";

#[tokio::test]
async fn three_hundred_at_once_keep_their_ratio_without_drift() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler);
    let scenario = Scenario::reconciled("crowd", 2, 2).await?;
    scenario.driver(JOB, "0.7").await?.pod()?;
    scenario.executors(JOB, 1..=300, 32).await?;
    scenario.until_ledger_matches_pods(JOB, REPAIRED).await?.ensure_near(0.7, 1.0)?;
    scenario.until_bound(JOB).await?;
    scenario.until_uids_recorded(JOB).await?;
    assert_eq!(scenario.reconcile_metric("drift_total", &[]).await?, 0.0);
    ensure!(scenario.reconcile_metric("jobs_total", &[("outcome", "in_sync")]).await? >= 1.0, "nothing was compared");
    Ok(())
}

/// An eviction asks no webhook, and where the node is lost, nobody deletes the pod for good either.
#[tokio::test]
async fn evicted_executors_leave_the_ledger_before_their_pods_are_gone() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler);
    let mut scenario = Scenario::reconciled("evicted", 1, 1).await?;
    assert_eq!(scenario.grow(JOB, "0.7", 40).await?, Counts { spot: 28, on_demand: 12 });
    scenario.kubelet = None;
    for name in scenario.some(JOB, "spot", 10).await? {
        scenario.pods().evict(&name, &EvictParams::default()).await?;
    }
    let left = scenario.until_ledger_matches_pods(JOB, REPAIRED).await?;
    assert_eq!(left, Counts { spot: 18, on_demand: 12 });
    assert_eq!(scenario.reconcile_metric("drift_total", &[("kind", "stale")]).await?, 10.0);
    ensure!(scenario.pods().get_opt(&format!("{JOB}-exec-1")).await?.is_some(), "the pods did not wait");
    scenario.ensure_ratio_recovers(JOB, 0.7).await
}

#[tokio::test]
async fn executors_removed_by_deletecollection_leave_the_ledger() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler);
    let scenario = Scenario::without_deletions(Plane::shared().await?, "collected").await?;
    scenario.grow(JOB, "0.7", 20).await?;
    let executors = ListParams::default().labels("spark-role=executor");
    scenario.pods().delete_collection(&DeleteParams::default(), &executors).await?;
    assert_eq!(scenario.until_ledger_matches_pods(JOB, REPAIRED).await?, Counts::default());
    scenario.ensure_ratio_recovers(JOB, 0.7).await
}

#[tokio::test]
async fn force_deleted_executors_leave_the_ledger_with_and_without_delete_reviews() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler);
    for scenario in [
        Scenario::reconciled("forced", 1, 1).await?,
        Scenario::without_deletions(Plane::shared().await?, "forced").await?,
    ] {
        scenario.grow(JOB, "0.7", 40).await?;
        for name in scenario.some(JOB, "spot", 10).await? {
            pods::remove(&scenario.pods(), &name).await?;
        }
        assert_eq!(scenario.until_ledger_matches_pods(JOB, REPAIRED).await?, Counts { spot: 18, on_demand: 12 });
        scenario.ensure_ratio_recovers(JOB, 0.7).await?;
    }
    Ok(())
}

#[tokio::test]
async fn an_executor_whose_deletion_is_refused_is_counted_again() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler);
    let scenario = Scenario::reconciled("denied", 1, 1).await?;
    let grown = scenario.grow(JOB, "0.5", 6).await?;
    // A webhook beside ours that cannot be called, and has to be.
    let name = format!("deny.{}.spot-balancer.test", scenario.namespace);
    let other: ValidatingWebhookConfiguration = serde_json::from_value(json!({
        "metadata": {"name": name},
        "webhooks": [{
            "name": name,
            "admissionReviewVersions": ["v1"],
            "clientConfig": {"url": format!("https://127.0.0.1:{}/", port::free()?)},
            "rules": [{"operations": ["DELETE"], "apiGroups": [""], "apiVersions": ["v1"], "resources": ["pods"]}],
            "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": scenario.namespace}},
            "sideEffects": "None",
            "failurePolicy": "Fail",
        }],
    }))?;
    let configurations = Api::<ValidatingWebhookConfiguration>::all(scenario.client.clone());
    configurations.create(&PostParams::default(), &other).await?;
    let spot = scenario.some(JOB, "spot", 1).await?.pop().context("no executor on spot")?;
    until_true(SOON, "a deletion to be refused", async || {
        let refused = scenario.pods().delete(&spot, &DeleteParams::default().dry_run()).await;
        Ok(refused.is_err_and(|error| error.to_string().contains("deny.")))
    })
    .await?;
    let released = scenario.metric("spot_balancer_admissions_total", &[("outcome", "released")]).await?;
    ensure!(scenario.pods().delete(&spot, &DeleteParams::default()).await.is_err(), "it was deleted");
    let now = scenario.metric("spot_balancer_admissions_total", &[("outcome", "released")]).await?;
    assert_eq!(now, released + 1.0, "we were asked first, and released it");
    assert_eq!(scenario.until_ledger_matches_pods(JOB, REPAIRED).await?, grown);
    configurations.delete(&name, &DeleteParams::default()).await?;
    Ok(())
}

#[tokio::test]
async fn finished_and_failed_executors_leave_the_ledger() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler);
    let scenario = Scenario::reconciled("ended", 1, 1).await?;
    for (job, phase) in [("failing", "Failed"), ("finishing", "Succeeded")] {
        scenario.grow(job, "0.7", 40).await?;
        for name in scenario.some(job, "spot", 10).await? {
            set_phase(&scenario.pods(), &name, phase).await?;
        }
        let left = scenario.until_ledger_matches_pods(job, REPAIRED).await?;
        assert_eq!(left, Counts { spot: 18, on_demand: 12 }, "{phase}");
        scenario.ensure_ratio_recovers(job, 0.7).await?;
    }
    Ok(())
}

/// `cases_refused.rs` has the cases with default settings, and other reasons to refuse.
#[tokio::test]
async fn placements_of_refused_pods_leave_the_ratio_as_it_is() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler);
    let scenario = Scenario::reconciled("refused", 1, 1).await?;
    scenario.driver(JOB, "0.5").await?.pod()?;
    for id in 1..=10 {
        let refused = executor(JOB, 100 + id).invalid();
        assert_eq!(scenario.post(&refused).await?.status, 422);
        let entries = scenario.entries(JOB).await?;
        ensure!(entries.contains_key(&format!("{JOB}-exec-{}", 100 + id)), "it was refused before us: {entries:?}");
        sleep(Duration::from_millis(1200)).await;
        scenario.executor(JOB, id).await?;
    }
    scenario.until_ledger_matches_pods(JOB, REPAIRED).await?.ensure_near(0.5, 1.0)?;
    scenario.ensure_ratio_recovers(JOB, 0.5).await
}

/// No ledger can know within milliseconds which of them were refused. It does soon, and the next executors make up
/// for it.
#[tokio::test]
async fn a_burst_of_which_half_is_refused_is_made_up_for() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler);
    let scenario = Scenario::reconciled("burst", 1, 1).await?;
    scenario.driver(JOB, "0.5").await?.pod()?;
    for id in 1..=10 {
        scenario.executor(JOB, id).await?;
        assert_eq!(scenario.post(&executor(JOB, 100 + id).invalid()).await?.status, 422);
    }
    scenario.until_ledger_matches_pods(JOB, REPAIRED).await?;
    scenario.ensure_ratio_recovers(JOB, 0.5).await
}

#[tokio::test]
async fn executors_on_a_lost_node_leave_the_ledger() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler);
    let scenario = Scenario::without_deletions(Plane::shared().await?, "lost").await?;
    let spot = nodes::of_pool(&scenario.client, &scenario.namespace, "spot").await?;
    nodes::of_pool(&scenario.client, &scenario.namespace, "on-demand").await?;
    scenario.driver(JOB, "0.5").await?.pod()?;
    for id in 1..=20 {
        placed(&scenario.post(&executor(JOB, id).on_pool(&scenario.namespace)).await?.pod()?)?;
    }
    scenario.until_bound(JOB).await?;
    scenario.until_uids_recorded(JOB).await?;
    let lost = scenario.some(JOB, "spot", 10).await?;
    nodes::remove(&scenario.client, &spot).await?;
    for name in lost {
        pods::remove(&scenario.pods(), &name).await?;
    }
    assert_eq!(scenario.until_ledger_matches_pods(JOB, REPAIRED).await?, Counts { spot: 0, on_demand: 10 });
    scenario.ensure_ratio_recovers(JOB, 0.5).await
}

#[tokio::test]
async fn executors_created_without_a_webhook_are_added() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler);
    let mut scenario = Scenario::bare(Plane::shared().await?, "down").await?;
    scenario.start_webhooks(1, strict()).await?;
    Registration { failure_policy: "Ignore", ..scenario.registration() }.apply(&scenario.plane).await?;
    scenario.start_reconcilers(1).await?;
    scenario.grow(JOB, "0.5", 20).await?;
    scenario.webhooks.clear();
    for id in 21..=40 {
        let made = scenario.post(&executor(JOB, id)).await?.pod()?;
        ensure!(placed(&made).is_err(), "{} was placed by nobody", made.name_any());
    }
    scenario.until_bound(JOB).await?;
    scenario.until_ledger_matches_pods(JOB, REPAIRED).await?;
    scenario.start_webhooks(1, strict()).await?;
    scenario.ensure_ratio_recovers(JOB, 0.5).await
}

#[tokio::test]
async fn an_older_job_is_added_with_its_policy() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler);
    let mut scenario = Scenario::bare(Plane::shared().await?, "before").await?;
    let driver = pods::driver(JOB).annotation("workload/spot-ratio", "0.5").annotation("workload/on-demand-base", "0");
    scenario.post(&driver).await?.pod()?;
    for id in 1..=20 {
        scenario.post(&executor(JOB, id)).await?.pod()?;
    }
    scenario.until_bound(JOB).await?;
    scenario.start_webhooks(1, strict()).await?;
    scenario.registration().apply(&scenario.plane).await?;
    // Ready is what has entered all there is.
    scenario.start_reconcilers(1).await?;
    scenario.ensure_ledger_matches_pods(JOB).await?;
    assert_eq!(scenario.policy(JOB).await?, (Some("0.5".to_owned()), Some("0".to_owned())));
    scenario.ensure_ratio_recovers(JOB, 0.5).await?;
    assert_eq!(scenario.metric("spot_balancer_driver_lookups_total", &[]).await?, 0.0);
    Ok(())
}

#[tokio::test]
async fn an_executor_counts_as_the_capacity_of_its_node() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler);
    let mut scenario = Scenario::start("landed", 1, WebhookOptions::default()).await?;
    scenario.start_reconcilers(1).await?;
    // Best effort, and there is no spot to be had.
    nodes::of_pool(&scenario.client, &scenario.namespace, "on-demand").await?;
    scenario.driver(JOB, "0.5").await?.pod()?;
    let mut meant = Executors::new();
    for id in 1..=10 {
        let pod = scenario.post(&executor(JOB, id).on_pool(&scenario.namespace)).await?.pod()?;
        meant.insert(pod.name_any(), placed(&pod)?);
        scenario.until_bound(JOB).await?;
        scenario.until_ledger_matches_pods(JOB, REPAIRED).await?;
    }
    ensure!(meant.values().all(|capacity| capacity == "spot"), "the ledger did not tell in time: {meant:?}");
    assert_eq!(scenario.ensure_ledger_matches_pods(JOB).await?, Counts { spot: 0, on_demand: 10 });
    assert_eq!(scenario.reconcile_metric("drift_total", &[("kind", "wrong_capacity")]).await?, 10.0);
    Ok(())
}

#[tokio::test]
async fn executors_with_generated_names_are_matched_by_their_placeholders() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler);
    let scenario = Scenario::without_deletions(Plane::shared().await?, "nameless").await?;
    scenario.driver(JOB, "0.5").await?.pod()?;
    for id in 1..=10 {
        scenario.post(&executor(JOB, id).generate_name(&format!("{JOB}-exec-"))).await?.pod()?;
    }
    scenario.until_uids_recorded(JOB).await?;
    for pod in scenario.live(JOB).await?.iter().take(6) {
        pods::remove(&scenario.pods(), &pod.name_any()).await?;
    }
    let left = scenario.until_ledger_matches_pods(JOB, REPAIRED).await?;
    assert_eq!(left.spot + left.on_demand, 4);
    scenario.ensure_ratio_recovers(JOB, 0.5).await?;
    // One name in the ledger for each: nothing came to be counted twice.
    assert_eq!(scenario.reconcile_metric("drift_total", &[("kind", "missing")]).await?, 0.0);
    Ok(())
}

/// One pod under a name is gone, and the next has it, while nothing of it was told.
#[tokio::test]
async fn a_reused_name_counts_once_as_the_new_pod() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler);
    let scenario = Scenario::without_deletions(Plane::shared().await?, "again").await?;
    scenario.grow(JOB, "0.5", 10).await?;
    for id in 1..=10 {
        pods::remove(&scenario.pods(), &format!("{JOB}-exec-{id}")).await?;
        scenario.executor(JOB, id).await?;
    }
    let again = scenario.until_ledger_matches_pods(JOB, GRACE + REPAIRED).await?;
    assert_eq!(again, Counts { spot: 5, on_demand: 5 });
    scenario.until_uids_recorded(JOB).await?;
    scenario.ensure_ratio_recovers(JOB, 0.5).await
}

#[tokio::test]
async fn a_job_without_pods_is_removed_from_the_store() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler);
    for scenario in
        [Scenario::reconciled("gone", 1, 1).await?, Scenario::without_deletions(Plane::shared().await?, "gone").await?]
    {
        scenario.grow("stays", "0.5", 2).await?;
        scenario.grow(JOB, "0.5", 10).await?;
        let keys = scenario.keys(JOB);
        let mut redis = scenario.redis.connection().await?;
        assert_eq!(redis.exists::<_, u8>(&keys).await?, 2);
        pods::remove(&scenario.pods(), &format!("{JOB}-driver")).await?;
        for pod in scenario.live(JOB).await? {
            pods::remove(&scenario.pods(), &pod.name_any()).await?;
        }
        until_true(REPAIRED, "the keys to be gone", async || Ok(redis.exists::<_, u8>(&keys).await? == 0)).await?;
        scenario.ensure_ledger_matches_pods("stays").await?;
        assert_eq!(scenario.policy("stays").await?.0.as_deref(), Some("0.5"));
    }
    Ok(())
}

#[tokio::test]
async fn the_ledger_of_an_idle_running_job_does_not_expire() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler);
    let ttl = |options: ReconcilerOptions| options.env("REDIS_DEFAULT_TTL_SECONDS", "10");
    let mut scenario = Scenario::start("lives", 1, ttl(strict())).await?;
    let options = ttl(scenario.reconciler_options().await?);
    scenario.reconcilers.push(Reconciler::start(options).await?);
    scenario.grow(JOB, "0.5", 4).await?;
    // It waits for its first executor.
    scenario.driver("idle", "0.9").await?.pod()?;
    let (counts, entries) = scenario.keys(JOB);
    for key in [counts, entries, scenario.keys("idle").0] {
        let mut redis = scenario.redis.connection().await?;
        let (mut last, mut renewals) = (i64::MAX, 0);
        until(SOON, &format!("{key} to be given a longer life, thrice"), async || {
            let life: i64 = redis.pttl(&key).await?;
            renewals += u32::from(life > last);
            last = life;
            // Gone is the end of the wait too.
            Ok((life < 0 || renewals == 3).then_some(()))
        })
        .await?;
        ensure!(last > 0, "{key} was dropped after {renewals} renewals");
    }
    scenario.ensure_ledger_matches_pods(JOB).await?;
    assert_eq!(scenario.policy("idle").await?.0.as_deref(), Some("0.9"));
    Ok(())
}

/// Enters a placement of an executor that has no pod.
async fn enter(ledger: &RedisLedger, job: JobRef<'_>) -> Result<()> {
    let policy = Policy { spot_ratio: "0.5".parse()?, ..Policy::default() };
    let request = PlaceRequest { policy: Some(policy), ..request("nobody") };
    ledger.place(job, &request).await?;
    Ok(())
}

#[tokio::test]
async fn a_reconciler_ignores_namespaces_that_it_does_not_watch() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Reconciler);
    let mut scenario = Scenario::bare(Plane::shared().await?, "ours").await?;
    let (ours, theirs) = (scenario.namespace.clone(), scenario.plane.namespace("theirs").await?);
    let options = RedisOptions::new(Duration::from_secs(10), Duration::from_secs(86_400));
    let ledger = RedisLedger::connect(&scenario.redis.url(), options).await?;
    let required = |id| executor(JOB, id).node_selector("karpenter.sh/capacity-type", "spot");
    for namespace in [&ours, &theirs] {
        enter(&ledger, JobRef { namespace, app_id: "gone" }).await?;
        required(1).post(&scenario.client, namespace).await?.pod()?;
    }
    let told = async |namespace: &str, id| {
        let ledger = ledger.get(JobRef { namespace, app_id: id }).await?;
        anyhow::Ok(ledger.map(|ledger| (ledger.counts().spot, ledger.counts().on_demand)))
    };
    let options = scenario.reconciler_options().await?.env("RECONCILE_INTERVAL_SECONDS", "10");
    scenario.reconcilers.push(Reconciler::start(options).await?);
    until_true(GRACE + REPAIRED, "what is gone to be dropped", async || Ok(told(&ours, "gone").await?.is_none()))
        .await?;
    until_true(SOON, "a round of all jobs", async || {
        Ok(scenario.reconcile_metric("resyncs_total", &[("cause", "interval")]).await? >= 1.0)
    })
    .await?;
    assert_eq!(told(&ours, JOB).await?, Some((1, 0)));
    assert_eq!((told(&theirs, JOB).await?, told(&theirs, "gone").await?), (None, Some((1, 0))));

    // Now one that follows all, and so theirs too.
    scenario.reconcilers.pop().context("no reconciler")?.terminate(SOON).await?;
    let account = Account::for_reconciler(&scenario.plane, &theirs, &[]).await?;
    let options = scenario.reconciling(&account.kubeconfig).redis(&scenario.redis)?.env("WATCH_NAMESPACES", "");
    scenario.reconcilers.push(Reconciler::start(options).await?);
    for namespace in [&ours, &theirs] {
        required(2).post(&scenario.client, namespace).await?.pod()?;
        until_true(REPAIRED, "it to be entered", async || Ok(told(namespace, JOB).await? == Some((2, 0)))).await?;
    }
    until_true(GRACE + REPAIRED, "what is gone to be dropped", async || Ok(told(&theirs, "gone").await?.is_none()))
        .await
}
