//! Executors placed through a real kube-apiserver, with a real Redis behind the release binary.

use anyhow::{Context, Result, ensure};
use balancer_tests::need;
use balancer_tests::pods::{driver, executor};
use balancer_tests::scenario::{Counts, Scenario, placed, selected, strict};
use balancer_tests::wait::{SOON, until_true};
use balancer_tests::webhook::WebhookOptions;
use kube::ResourceExt;
use kube::api::{DeleteParams, ListParams};
use serde_json::json;

#[tokio::test]
async fn a_job_is_always_within_one_executor_of_its_ratio_and_runs_as_placed() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook);
    let scenario = Scenario::start("ratios", 1, strict()).await?;
    for (text, ratio) in
        [("0", 0.0_f64), ("0.3", 0.3), ("BALANCED", 0.5), ("70%", 0.7), ("0.9", 0.9), ("COST_ONLY", 1.0)]
    {
        let job = format!("ratio-{}", (ratio * 10.0).round());
        assert!(scenario.driver(&job, text).await?.warnings.is_empty());
        let mut counts = Counts::default();
        for id in 1..=30 {
            match scenario.executor(&job, id).await?.as_str() {
                "spot" => counts.spot += 1,
                _ => counts.on_demand += 1,
            }
            counts.ensure_near(ratio, 1.0)?;
        }
        assert_eq!(scenario.ensure_counts_match_pods(&job).await?, counts);
        scenario.ensure_bound_as_placed(&job).await?;
    }
    Ok(())
}

#[tokio::test]
async fn three_hundred_at_once_keep_the_ratio_with_one_or_two_webhooks() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook);
    for replicas in [1, 2] {
        let scenario = Scenario::start("at-once", replicas, strict()).await?;
        scenario.driver("crowd", "0.7").await?;
        scenario.executors("crowd", 1..=300, 32).await?;
        scenario.ensure_counts_match_pods("crowd").await?.ensure_near(0.7, 1.0)?;
        // Which of two webhooks placed how many depends on the apiserver: an old one opens many connections, a new
        // one keeps a single HTTP/2 connection, and the address before the webhooks balances connections.
        let placed = scenario.metric("spot_balancer_placements_total", &[("source", "ledger")]).await?;
        assert_eq!(placed, 300.0, "all {replicas} webhooks together");
    }
    Ok(())
}

#[tokio::test]
async fn a_dry_run_after_each_creation_writes_nothing() -> Result<()> {
    need!(Redis, ControlPlane, Webhook);
    let scenario = Scenario::start("dry-run", 1, strict()).await?;
    scenario.driver("dry", "0.7").await?;
    for id in 1..=20 {
        scenario.executor("dry", id).await?;
        let before = scenario.ledger("dry").await?;
        let answered = executor("dry", id + 1000).dry_run(&scenario.client, &scenario.namespace).await?;
        assert!(
            answered.status == 201 && selected(&answered.pod()?).is_some(),
            "a dry run is answered as the real one"
        );
        assert_eq!(scenario.ledger("dry").await?, before);
        scenario.ensure_counts_match_pods("dry").await?.ensure_near(0.7, 1.0)?;
    }
    assert_eq!(scenario.counts("dry").await?.spot, 14);
    Ok(())
}

#[tokio::test]
async fn a_creation_that_is_retried_counts_once() -> Result<()> {
    need!(Redis, ControlPlane, Webhook);
    let scenario = Scenario::start("retried", 1, strict()).await?;
    scenario.driver("again", "0.5").await?;
    for id in 1..=20 {
        let first = scenario.executor("again", id).await?;
        for _ in 0..2 {
            let retried = scenario.post(&executor("again", id)).await?;
            assert_eq!(retried.status, 409, "{}", retried.object);
        }
        assert_eq!(placed(&scenario.pods().get(&format!("again-exec-{id}")).await?)?, first);
        scenario.ensure_counts_match_pods("again").await?.ensure_near(0.5, 1.0)?;
    }
    assert_eq!(scenario.metric("spot_balancer_placements_total", &[("source", "existing")]).await?, 40.0);
    Ok(())
}

/// Several callers may delete one pod at once, and then a review of its deletion comes after a new pod
/// has taken the name: it must not strike the new one.
#[tokio::test]
async fn reused_names_count_once() -> Result<()> {
    need!(Redis, ControlPlane, Webhook);
    let scenario = Scenario::start("reused", 1, strict()).await?;
    scenario.driver("names", "0.7").await?;
    for id in 1..=20 {
        scenario.executor("names", id).await?;
    }
    for id in 1..=20 {
        let now = DeleteParams::default().grace_period(0);
        scenario.pods().delete(&format!("names-exec-{id}"), &now).await?;
        scenario.executor("names", id).await?;
        scenario.ensure_counts_match_pods("names").await?.ensure_near(0.7, 1.0)?;
    }
    Ok(())
}

#[tokio::test]
async fn a_graceful_deletion_with_several_reviews_releases_once() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook);
    let scenario = Scenario::start("graceful", 1, strict()).await?;
    scenario.driver("grace", "0.7").await?;
    scenario.executors("grace", 1..=10, 1).await?;
    scenario.ensure_bound_as_placed("grace").await?;
    let reviews = [("operation", "delete"), ("role", "executor")];
    let before = scenario.metric("spot_balancer_admissions_total", &reviews).await?;
    for id in 1..=3 {
        let name = format!("grace-exec-{id}");
        scenario.pods().delete(&name, &DeleteParams::default()).await?;
        until_true(SOON, "the executor to be gone", async || Ok(scenario.pods().get_opt(&name).await?.is_none()))
            .await?;
    }
    let after = scenario.metric("spot_balancer_admissions_total", &reviews).await?;
    ensure!(after - before >= 6.0, "three graceful ends were only {} reviews", after - before);
    assert_eq!(scenario.ensure_counts_match_pods("grace").await?.spot + scenario.ledger("grace").await?.on_demand, 7);
    scenario.executors("grace", 11..=23, 1).await?;
    scenario.ensure_counts_match_pods("grace").await?.ensure_near(0.7, 1.0)
}

#[tokio::test]
async fn a_job_returns_to_its_ratio_after_a_spot_reclaim() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook);
    let scenario = Scenario::start("reclaimed", 1, strict()).await?;
    scenario.driver("loss", "0.7").await?;
    scenario.executors("loss", 1..=40, 4).await?;
    let mut reclaimed = 0;
    for pod in scenario.live("loss").await? {
        if placed(&pod)? == "spot" && reclaimed < 14 {
            scenario.pods().delete(&pod.name_any(), &DeleteParams::default().grace_period(0)).await?;
            reclaimed += 1;
        }
    }
    assert_eq!(scenario.ensure_counts_match_pods("loss").await?, Counts { spot: 14, on_demand: 12 });
    for id in 41..=80 {
        scenario.executor("loss", id).await?;
    }
    scenario.ensure_counts_match_pods("loss").await?.ensure_near(0.7, 1.0)
}

#[tokio::test]
async fn a_job_ended_by_deletecollection_leaves_an_empty_ledger() -> Result<()> {
    need!(Redis, ControlPlane, Webhook);
    let scenario = Scenario::start("collection", 1, strict()).await?;
    scenario.driver("ended", "0.7").await?;
    scenario.executors("ended", 1..=20, 4).await?;
    let executors = ListParams::default().labels("spark-role=executor");
    scenario.pods().delete_collection(&DeleteParams::default().grace_period(0), &executors).await?;
    until_true(SOON, "the executors to be gone", async || Ok(scenario.live("ended").await?.is_empty())).await?;
    assert_eq!(scenario.ensure_counts_match_pods("ended").await?, Counts::default());
    Ok(())
}

#[tokio::test]
async fn the_pods_own_selectors_tolerations_and_affinity_survive() -> Result<()> {
    need!(Redis, ControlPlane, Webhook);
    let scenario = Scenario::start("survive", 1, strict()).await?;
    scenario.driver("own", "1").await?;
    let preferred = json!([{"weight": 1, "preference": {"matchExpressions": [{"key": "zone", "operator": "In", "values": ["a"]}]}}]);
    let pod =
        executor("own", 1).node_selector("disk", "nvme").required_affinity("arch", &["amd64", "arm64"]).with(|pod| {
            pod["spec"]["affinity"]["nodeAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"] =
                preferred.clone();
            pod["metadata"]["annotations"] = json!({"team": "etl"});
        });
    let made = scenario.post(&pod).await?.object;
    assert_eq!(
        made["spec"]["nodeSelector"],
        json!({"disk": "nvme", "karpenter.sh/capacity-type": "spot", "spark-role": "executor"})
    );
    assert_eq!(made["spec"]["affinity"], pod.value()["spec"]["affinity"]);
    assert_eq!(made["metadata"]["annotations"], json!({"team": "etl", "workload/capacity-type": "spot"}));
    let tolerations = made["spec"]["tolerations"].as_array().context("no tolerations")?;
    assert!(tolerations.contains(&pod.value()["spec"]["tolerations"][0]));
    Ok(())
}

#[tokio::test]
async fn an_executor_that_requires_a_capacity_is_unchanged_and_counted() -> Result<()> {
    need!(Redis, ControlPlane, Webhook);
    let scenario = Scenario::start("pinned", 1, strict()).await?;
    scenario.driver("pins", "0.5").await?;
    for id in 1..=4 {
        let made = scenario.post(&executor("pins", id).node_selector("karpenter.sh/capacity-type", "spot")).await?;
        assert_eq!(made.object["spec"]["nodeSelector"], json!({"karpenter.sh/capacity-type": "spot"}));
        assert_eq!(made.object["metadata"]["annotations"], json!(null));
    }
    let by_affinity = executor("pins", 5).required_affinity("karpenter.sh/capacity-type", &["on-demand"]);
    assert_eq!(scenario.post(&by_affinity).await?.object["spec"]["nodeSelector"], json!(null));
    assert_eq!(scenario.ledger("pins").await?, Counts { spot: 4, on_demand: 1 });
    // The others make up for it.
    for id in 6..=8 {
        assert_eq!(scenario.executor("pins", id).await?, "on-demand");
    }
    assert_eq!(scenario.ledger("pins").await?, Counts { spot: 4, on_demand: 4 });
    Ok(())
}

#[tokio::test]
async fn best_effort_selects_nothing_for_spot_and_pins_on_demand() -> Result<()> {
    need!(Redis, ControlPlane, Webhook);
    let scenario = Scenario::start("best-effort", 1, WebhookOptions::default()).await?;
    scenario.driver("best", "0.5").await?;
    for id in 1..=10 {
        let pod = scenario.post(&executor("best", id)).await?.pod()?;
        match placed(&pod)?.as_str() {
            "spot" => assert_eq!(pod.spec.and_then(|spec| spec.node_selector), None),
            _ => assert_eq!(selected(&pod), Some("on-demand")),
        }
    }
    assert_eq!(scenario.ensure_counts_match_pods("best").await?, Counts { spot: 5, on_demand: 5 });
    Ok(())
}

#[tokio::test]
async fn a_base_is_filled_first() -> Result<()> {
    need!(Redis, ControlPlane, Webhook);
    let scenario = Scenario::start("base", 1, strict()).await?;
    let pod = driver("based").annotation("workload/spot-ratio", "1").annotation("workload/on-demand-base", "3");
    scenario.post(&pod).await?.pod()?;
    for id in 1..=10 {
        assert_eq!(scenario.executor("based", id).await?, if id <= 3 { "on-demand" } else { "spot" });
    }
    Ok(())
}

#[tokio::test]
async fn an_older_driver_is_looked_up_once_and_the_newest_live_one_wins() -> Result<()> {
    need!(Redis, ControlPlane, Webhook);
    let scenario = Scenario::start("look-up", 1, strict()).await?;
    let ratio = |name: &str, ratio: &str| {
        driver("found").named(name).annotation("workload/spot-ratio", ratio).with(|pod| {
            pod["spec"]["schedulerName"] = json!("none");
        })
    };
    scenario.post(&ratio("first-attempt", "0")).await?.pod()?;
    scenario.post(&ratio("failed-attempt", "0")).await?.pod()?;
    // Creation times are whole seconds.
    let second = |pod: &k8s_openapi::api::core::v1::Pod| pod.creation_timestamp().map(|time| time.0.to_string());
    let first = second(&scenario.pods().get("failed-attempt").await?);
    until_true(SOON, "another second to begin", async || {
        let probe = executor("clock", 1).dry_run(&scenario.client, &scenario.namespace).await?;
        Ok(second(&probe.pod()?) > first)
    })
    .await?;
    scenario.post(&ratio("second-attempt", "1")).await?.pod()?;
    balancer_tests::pods::set_phase(&scenario.pods(), "failed-attempt", "Failed").await?;
    scenario.until_cache_is_current().await?;
    scenario.redis.flush().await?;
    let found = [("outcome", "found")];
    let before = scenario.metric("spot_balancer_driver_lookups_total", &found).await?;
    for id in 1..=5 {
        assert_eq!(scenario.executor("found", id).await?, "spot");
    }
    assert_eq!(scenario.metric("spot_balancer_driver_lookups_total", &found).await? - before, 1.0);
    assert_eq!(scenario.metric("spot_balancer_policies_total", &[("source", "driver")]).await?, 1.0);
    Ok(())
}

#[tokio::test]
async fn executors_without_a_driver_get_the_default_ratio() -> Result<()> {
    need!(Redis, ControlPlane, Webhook);
    let scenario = Scenario::start("default", 1, strict().env("DEFAULT_SPOT_RATIO", "30%")).await?;
    scenario.executors("orphans", 1..=20, 4).await?;
    scenario.ensure_counts_match_pods("orphans").await?.ensure_near(0.3, 1.0)
}

#[tokio::test]
async fn an_executors_own_ratio_wins() -> Result<()> {
    need!(Redis, ControlPlane, Webhook);
    let scenario = Scenario::start("own-ratio", 1, strict()).await?;
    scenario.driver("mine", "1").await?;
    for id in 1..=6 {
        let pod = scenario.post(&executor("mine", id).annotation("workload/spot-ratio", "0")).await?.pod()?;
        assert_eq!(selected(&pod), Some("on-demand"));
    }
    Ok(())
}

#[tokio::test]
async fn every_ratio_text_is_accepted_or_answered_with_a_warning() -> Result<()> {
    need!(Redis, ControlPlane, Webhook);
    let scenario = Scenario::start("texts", 1, strict()).await?;
    let taken = [
        "0",
        "1",
        "0.7",
        ".7",
        "1.0",
        "70%",
        "33.3%",
        " 0.5 ",
        "balanced",
        "Reliability_Only",
        "COST_OVER_RELIABILITY",
    ];
    for (i, text) in taken.iter().enumerate() {
        let posted = scenario.driver(&format!("taken-{i}"), text).await?;
        assert_eq!((posted.status, posted.warnings.len()), (201, 0), "{text:?}: {:?}", posted.warnings);
    }
    let refused = ["", "1.5", "-0.1", "101%", "NaN", "inf", "0,7", "seventy", "1e-1", "\u{1F355}"];
    for (i, text) in refused.iter().enumerate() {
        let job = format!("refused-{i}");
        let posted = scenario.driver(&job, text).await?;
        assert_eq!(posted.status, 201, "{text:?}");
        let [warning] = posted.warnings.as_slice() else { anyhow::bail!("{text:?}: {:?}", posted.warnings) };
        assert!(
            warning.starts_with("workload/spot-ratio: ") && warning.contains("70%") && warning.contains("default 0.5"),
            "{text:?}: {warning}"
        );
        // The job gets the default.
        for id in 1..=4 {
            scenario.executor(&job, id).await?;
        }
        assert_eq!(scenario.counts(&job).await?, Counts { spot: 2, on_demand: 2 });
    }
    Ok(())
}

#[tokio::test]
async fn executors_with_generated_names_are_counted_and_released() -> Result<()> {
    need!(Redis, ControlPlane, Webhook);
    let scenario = Scenario::start("nameless", 1, strict()).await?;
    scenario.driver("anon", "0.5").await?;
    for id in 1..=10 {
        scenario.post(&executor("anon", id).generate_name("anon-exec-")).await?.pod()?;
    }
    assert_eq!(scenario.ensure_counts_match_pods("anon").await?, Counts { spot: 5, on_demand: 5 });
    for pod in scenario.live("anon").await?.iter().take(4) {
        scenario.pods().delete(&pod.name_any(), &DeleteParams::default().grace_period(0)).await?;
    }
    let counts = scenario.ensure_counts_match_pods("anon").await?;
    assert_eq!(counts.spot + counts.on_demand, 6);
    Ok(())
}
