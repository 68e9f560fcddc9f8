//! What a job asks for is edited while it runs.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use balancer_tests::events::until_warned;
use balancer_tests::need;
use balancer_tests::pods::{self, annotate};
use balancer_tests::reconciler::Reconciler;
use balancer_tests::scenario::{Counts, REPAIRED, Scenario, strict};
use balancer_tests::wait::{SOON, until_true};
use kube::ResourceExt;

/// An edit is followed within this.
const FOLLOWED: Duration = Duration::from_secs(2);
const JOB: &str = "etl";
/// The driver that owns the executors which a scenario makes.
const DRIVER: &str = "etl-driver";
const RATIO: &str = "workload/spot-ratio";
const BASE: &str = "workload/on-demand-base";

/// Edits an annotation of the job's driver.
async fn edit(scenario: &Scenario, key: &str, value: Option<&str>) -> Result<()> {
    Ok(annotate(&scenario.pods(), &format!("{JOB}-driver"), key, value).await?)
}

/// The policy in the ledger.
async fn policy(scenario: &Scenario) -> Result<(String, String)> {
    let (ratio, base) = scenario.policy(JOB).await?;
    Ok((ratio.context("no ratio")?, base.context("no base")?))
}

/// Waits until the ledger has this policy.
async fn until_followed(scenario: &Scenario, ratio: &str, base: &str) -> Result<()> {
    let mut last = None;
    let followed = until_true(FOLLOWED, "the edit to be followed", async || {
        let policy = last.insert(policy(scenario).await?);
        Ok(policy.0 == ratio && policy.1 == base)
    });
    followed.await.with_context(|| format!("the ledger has {last:?}, not {ratio} and {base}"))
}

/// The note of the Event of this reason on the driver, once there is one that has this text.
async fn told(scenario: &Scenario, reason: &str, text: &str) -> Result<String> {
    until_warned(scenario, &format!("{JOB}-driver"), (reason, &[text]), REPAIRED).await
}

#[tokio::test]
async fn an_edited_ratio_applies_to_the_next_executors() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler);
    let scenario = Scenario::reconciled("ratio", 1, 1).await?;
    assert_eq!(scenario.grow(JOB, "0.5", 10).await?, Counts { spot: 5, on_demand: 5 });
    for (text, ratio) in [("0.8", 0.8), ("COST_ONLY", 1.0), ("60%", 0.6)] {
        edit(&scenario, RATIO, Some(text)).await?;
        until_followed(&scenario, &ratio.to_string(), "0").await?;
        if text == "COST_ONLY" {
            let before = scenario.counts(JOB).await?;
            scenario.executors(JOB, scenario.fresh_ids().take(5), 4).await?;
            let after = Counts { spot: before.spot + 5, ..before };
            assert_eq!(scenario.until_ledger_matches_pods(JOB, REPAIRED).await?, after);
        } else {
            scenario.ensure_ratio_recovers(JOB, ratio).await?;
        }
    }
    Ok(())
}

#[tokio::test]
async fn an_edited_base_applies_to_the_next_executors() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler);
    let scenario = Scenario::reconciled("base", 1, 1).await?;
    assert_eq!(scenario.grow(JOB, "0.5", 10).await?, Counts { spot: 5, on_demand: 5 });
    edit(&scenario, BASE, Some("12")).await?;
    until_followed(&scenario, "0.5", "12").await?;
    scenario.executors(JOB, scenario.fresh_ids().take(7), 1).await?;
    assert_eq!(scenario.until_ledger_matches_pods(JOB, REPAIRED).await?, Counts { spot: 5, on_demand: 12 });
    edit(&scenario, BASE, Some("0")).await?;
    until_followed(&scenario, "0.5", "0").await?;
    scenario.executors(JOB, scenario.fresh_ids().take(7), 1).await?;
    assert_eq!(scenario.until_ledger_matches_pods(JOB, REPAIRED).await?, Counts { spot: 12, on_demand: 12 });
    Ok(())
}

#[tokio::test]
async fn a_removed_annotation_restores_the_default() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler);
    let mut scenario = Scenario::start("removed", 1, strict().env("DEFAULT_SPOT_RATIO", "0.4")).await?;
    let options = scenario.reconciler_options().await?.env("DEFAULT_SPOT_RATIO", "0.4");
    scenario.reconcilers.push(Reconciler::start(options).await?);
    let driver = pods::driver(JOB).annotation(RATIO, "0.9").annotation(BASE, "3");
    scenario.post(&driver).await?.pod()?;
    until_followed(&scenario, "0.9", "3").await?;
    edit(&scenario, RATIO, None).await?;
    until_followed(&scenario, "0.4", "3").await?;
    edit(&scenario, BASE, None).await?;
    until_followed(&scenario, "0.4", "0").await?;
    scenario.ensure_ratio_recovers(JOB, 0.4).await
}

#[tokio::test]
async fn an_invalid_edit_keeps_the_last_valid_policy_and_creates_an_event() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler);
    let mut scenario = Scenario::reconciled("invalid", 1, 1).await?;
    scenario.grow(JOB, "0.8", 10).await?;
    edit(&scenario, BASE, Some("2")).await?;
    until_followed(&scenario, "0.8", "2").await?;

    edit(&scenario, RATIO, Some("lots")).await?;
    let note = told(&scenario, "InvalidSpotRatio", "\"lots\"").await?;
    ensure!(note.contains(RATIO) && note.contains("70%") && note.contains("0.8"), "{note}");
    edit(&scenario, BASE, Some("-1")).await?;
    let note = told(&scenario, "InvalidOnDemandBase", "\"-1\"").await?;
    ensure!(note.contains(BASE) && note.contains("whole number"), "{note}");
    edit(&scenario, RATIO, Some("most")).await?;
    told(&scenario, "InvalidSpotRatio", "\"most\"").await?;
    assert_eq!(policy(&scenario).await?, ("0.8".to_owned(), "2".to_owned()));
    for (field, edits) in [("spot_ratio", 2.0), ("on_demand_base", 1.0)] {
        assert_eq!(
            scenario.reconcile_metric("invalid_annotations_total", &[("field", field)]).await?,
            edits,
            "{field}"
        );
    }

    // One that has not seen the good one.
    scenario.reconcilers.pop().context("no reconciler")?.terminate(SOON).await?;
    scenario.start_reconcilers(1).await?;
    until_true(SOON, "it to lead", async || scenario.reconcilers[0].leads().await).await?;
    scenario.executors(JOB, scenario.fresh_ids().take(20), 4).await?;
    scenario.until_ledger_matches_pods(JOB, REPAIRED).await?;
    scenario.until_uids_recorded(JOB).await?;
    assert_eq!(policy(&scenario).await?, ("0.8".to_owned(), "2".to_owned()));

    // The good part of an edit is followed beside the other, invalid one.
    edit(&scenario, RATIO, Some("0.3")).await?;
    until_followed(&scenario, "0.3", "2").await?;
    edit(&scenario, BASE, Some("0")).await?;
    until_followed(&scenario, "0.3", "0").await
}

#[tokio::test]
async fn an_edit_without_a_reconciler_applies_when_the_next_one_starts() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler);
    let mut scenario = Scenario::reconciled("unseen", 1, 1).await?;
    scenario.grow(JOB, "0.5", 10).await?;
    scenario.reconcilers.pop().context("no reconciler")?.terminate(SOON).await?;
    edit(&scenario, RATIO, Some("0.9")).await?;
    scenario.start_reconcilers(1).await?;
    until_followed(&scenario, "0.9", "0").await
}

/// A second attempt of the driver brings its own ratio; the first one's is history.
#[tokio::test]
async fn the_newest_live_driver_sets_the_policy() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler);
    let scenario = Scenario::reconciled("attempts", 1, 1).await?;
    let attempt = |name: &str, ratio: &str| pods::driver(JOB).named(name).annotation(RATIO, ratio);
    let first = scenario.post(&attempt("first", "0.2")).await?.pod()?;
    until_followed(&scenario, "0.2", "0").await?;
    // Creation times are whole seconds.
    let second = pods::driver(JOB).annotation(RATIO, "0.9");
    until_true(SOON, "another second to begin", async || {
        let probe = second.dry_run(&scenario.client, &scenario.namespace).await?.pod()?;
        Ok(probe.creation_timestamp() > first.creation_timestamp())
    })
    .await?;
    scenario.post(&second).await?.pod()?;
    until_followed(&scenario, "0.9", "0").await?;
    annotate(&scenario.pods(), "first", RATIO, Some("0.3")).await?;
    // Followed, were it the one that tells, before this one is.
    annotate(&scenario.pods(), DRIVER, RATIO, Some("0.7")).await?;
    until_followed(&scenario, "0.7", "0").await?;
    scenario.ensure_ratio_recovers(JOB, 0.7).await?;
    pods::set_phase(&scenario.pods(), DRIVER, "Failed").await?;
    until_followed(&scenario, "0.3", "0").await
}
