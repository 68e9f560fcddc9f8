//! Real Spark whose executors find no spot node: the reconciler deletes those that wait, Spark requests others, and
//! those run on on-demand.

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};
use balancer_tests::account::{DELETE_PODS, READ_EVENTS};
use balancer_tests::containers::{self, Containers};
use balancer_tests::control_plane::{Options, Plane};
use balancer_tests::events::until_warned;
use balancer_tests::platforms::{KARPENTER_ON_DEMAND, KARPENTER_SPOT};
use balancer_tests::scenario::{Counts, Scenario, strict};
use balancer_tests::wait::{SOON, until_true, while_progressing};
use balancer_tests::{need, nodes, spark_client};
use serde_json::json;

/// The application's id, and the name of all that belongs to it.
const ID: &str = "spark-fallback";
const EXECUTORS: u32 = 4;
/// Longer than Spark takes to request them all: those that it requests later are not sent to spot.
const FALLBACK_SECONDS: &str = "10";
/// Begins when all executors are registered: see the settings. Each task waits, so that two cores suffice.
const APPLICATION: &str = r#"
import time
from pyspark import SparkContext
spark = SparkContext()
print("The sum is", spark.parallelize(range(40), 40).map(lambda number: time.sleep(0.5) or number).sum())
spark.stop()
"#;

/// Starts a driver in client mode, with Spark's own labels.
async fn start_driver(scenario: &Scenario) -> Result<()> {
    let settings = [
        format!("spark.executor.instances={EXECUTORS}"),
        "spark.scheduler.minRegisteredResourcesRatio=1.0".to_owned(),
        "spark.scheduler.maxRegisteredResourcesWaitingTime=1h".to_owned(),
        // With a second failed executor Spark ends the application.
        "spark.executor.maxNumFailures=1".to_owned(),
    ];
    let labels = json!({"spark-role": "driver", "spark-app-selector": ID});
    let annotations = json!({"workload/spot-ratio": "0.75"});
    spark_client::start(scenario, (ID, APPLICATION), &settings, (&labels, &annotations)).await
}

#[tokio::test]
async fn a_spark_job_without_spot_nodes_finishes_on_on_demand_and_counts_no_failed_executor() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, ControllerManager, Webhook, Reconciler, Spark);
    if !containers::allowed().await? {
        return Ok(());
    }
    let plane = Plane::own(Options { scheduler: true, controller_manager: true, ..Options::default() }).await?;
    let client = plane.client()?;
    nodes::ensure_executor_pool(&client, "karpenter", &[KARPENTER_SPOT, KARPENTER_ON_DEMAND]).await?;
    nodes::cordon(&client, "executors-karpenter-spot", true).await?;
    let mut scenario = Scenario::without_nodes(plane, "spark-fallback").await?;
    scenario.kubelet = None;
    scenario.job_id_label = "spark-app-selector";
    scenario.allow_reconcilers(&[DELETE_PODS, READ_EVENTS]).await?;
    scenario.serve(1, &strict().env("SPOT_FALLBACK_SECONDS", FALLBACK_SECONDS)).await?;
    let containers = Containers::start(&scenario.plane, &scenario.namespace).await?;
    start_driver(&scenario).await?;

    while_progressing("all executors on on-demand", async || {
        let counts = scenario.counts(ID).await?;
        Ok((containers.log_length()?, (counts == Counts { spot: 0, on_demand: EXECUTORS as usize }).then_some(())))
    })
    .await
    .with_context(|| containers.last_words())?;
    scenario.ensure_bound_as_placed(ID).await?;
    until_warned(&scenario, ID, ("SpotClosed", &["on-demand"]), SOON).await?;

    let phase = while_progressing("the end of the driver", async || {
        let status = scenario.pods().get(ID).await?.status.unwrap_or_default();
        let ended = status.phase.filter(|phase| matches!(phase.as_str(), "Succeeded" | "Failed"));
        Ok((containers.log_length()?, ended))
    });
    let phase = phase.await.with_context(|| containers.last_words())?;
    let log = containers.log(ID)?;
    ensure!(phase == "Succeeded" && log.lines().any(|line| line == "The sum is 780"), "{}", containers.last_words());
    // Three of four at 0.75. They never ran, and those in their place have the next numbers.
    let reconciler = scenario.reconcilers.first().context("no reconciler")?;
    let deleted = reconciler.metrics().await?.sum("spot_balancer_executors_replaced_total", &[("outcome", "deleted")]);
    let registered = registered(&log);
    assert_eq!(deleted, Some(3.0), "executors {registered:?}");
    assert_eq!(registered.len(), EXECUTORS as usize, "{registered:?}");
    assert!(registered.is_superset(&BTreeSet::from([5, 6, 7])), "{registered:?}");
    until_true(SOON, "the executors to be gone", async || Ok(scenario.live(ID).await?.is_empty())).await?;
    assert_eq!(scenario.until_ledger_matches_pods(ID, SOON).await?, Counts::default());
    Ok(())
}

/// The numbers of the executors that have ever run, by what the driver says.
fn registered(log: &str) -> BTreeSet<u32> {
    let lines = log.lines().filter(|line| line.contains("Registered executor"));
    let number = |line: &str| line.split_once(" with ID ")?.1.split_once(',')?.0.parse().ok();
    lines.filter_map(number).collect()
}
