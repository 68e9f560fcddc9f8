//! Real Spark with dynamic allocation that wants more executors than a ResourceQuota allows, and loses some of those
//! it has. Spark tries again every second for as long as it runs.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use balancer_tests::containers::{self, Containers};
use balancer_tests::control_plane::{Options, Plane};
use balancer_tests::platforms::{KARPENTER_ON_DEMAND, KARPENTER_SPOT};
use balancer_tests::samples::Samples;
use balancer_tests::scenario::{Counts, Scenario, strict};
use balancer_tests::wait::{SOON, until_true, while_progressing};
use balancer_tests::{need, nodes, quota, spark_client};
use kube::api::DeleteParams;
use serde_json::json;
use tokio::time::{Instant, interval};

/// For how long samples are taken, in seconds.
const SECONDS: &str = "SPOT_BALANCER_SPARK_SECONDS";
const SHORT: u64 = 60;
const RATIO: f64 = 0.7;
/// As many as two cores start in half a minute.
const EXECUTORS: u32 = 6;
/// Between two executors that are lost. A Java machine starts in between.
const LOST_EVERY: Duration = Duration::from_secs(12);
/// The application's id, and the name of all that belongs to it.
const ID: &str = "spark-quota";

/// Has more tasks than there can ever be executors for; each of them waits, so that two cores suffice.
const APPLICATION: &str = r#"
import time
from pyspark import SparkContext
SparkContext().parallelize(range(100000), 100000).foreach(lambda _: time.sleep(5))
"#;

/// Starts a driver in client mode, with Spark's own labels.
async fn start_driver(scenario: &Scenario) -> Result<()> {
    let settings = [
        "spark.dynamicAllocation.enabled=true".to_owned(),
        "spark.dynamicAllocation.shuffleTracking.enabled=true".to_owned(),
        "spark.dynamicAllocation.minExecutors=1".to_owned(),
        format!("spark.dynamicAllocation.maxExecutors={}", 2 * EXECUTORS),
        // Lost executors are what this is about.
        "spark.task.maxFailures=1000".to_owned(),
        "spark.executor.maxNumFailures=1000".to_owned(),
    ];
    let labels = json!({"spark-role": "driver", "spark-app-selector": ID});
    let annotations = json!({"workload/spot-ratio": RATIO.to_string()});
    spark_client::start(scenario, (ID, APPLICATION), &settings, (&labels, &annotations)).await
}

/// Waits until as many executors live as the quota allows.
async fn until_full(scenario: &Scenario, containers: &Containers) -> Result<()> {
    while_progressing("as many executors as fit", async || {
        let live = scenario.live(ID).await?.len();
        Ok((containers.log_length()?, (live >= EXECUTORS as usize).then_some(())))
    })
    .await
    .with_context(|| containers.last_words())
}

#[tokio::test]
async fn dynamic_allocation_against_a_full_quota_keeps_the_ratio_at_every_moment() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, ControllerManager, Webhook, Reconciler, Spark);
    if !containers::allowed().await? {
        return Ok(());
    }
    let seconds = std::env::var(SECONDS).map_or(Ok(SHORT), |seconds| seconds.parse()).context(SECONDS)?;
    let time = Duration::from_secs(seconds);
    let plane = Plane::own(Options { scheduler: true, controller_manager: true, ..Options::default() }).await?;
    nodes::ensure_executor_pool(&plane.client()?, "karpenter", &[KARPENTER_SPOT, KARPENTER_ON_DEMAND]).await?;
    let mut scenario = Scenario::without_nodes(plane, "spark-quota").await?;
    scenario.kubelet = None;
    scenario.grace = None;
    scenario.job_id_label = "spark-app-selector";
    scenario.start_webhooks(2, strict()).await?;
    scenario.registration().apply(&scenario.plane).await?;
    scenario.start_reconcilers(1).await?;
    // One more for the driver.
    quota::set(&scenario.client, &scenario.namespace, EXECUTORS + 1).await?;
    let containers = Containers::start(&scenario.plane, &scenario.namespace).await?;
    start_driver(&scenario).await?;
    while_progressing("the first executor", async || {
        Ok((containers.log_length()?, (!scenario.live(ID).await?.is_empty()).then_some(())))
    })
    .await
    .with_context(|| containers.last_words())?;

    // Sampled from the first executor on: while the job grows, when it is full, and whenever it has lost one.
    let losing = async {
        until_full(&scenario, &containers).await?;
        let (end, mut ticks, mut lost) = (Instant::now() + time, interval(LOST_EVERY), 0);
        ticks.tick().await;
        for turn in 0.. {
            ticks.tick().await;
            if Instant::now() >= end {
                break;
            }
            let capacity = if turn % 2 == 0 { "spot" } else { "on-demand" };
            for name in scenario.some(ID, capacity, 1).await? {
                // It may have no process yet, or have just ended.
                lost += u32::from(containers.kill(&name).is_ok());
            }
        }
        anyhow::Ok(lost)
    };
    let (samples, lost) = Samples::during(&scenario, ID, losing).await?;
    let log = containers.log(ID)?;
    let refusals = log.matches("exceeded quota").count();
    println!(
        "{seconds} s: at most {} executors, {lost} lost, {refusals} refusals, at worst {:.2} executors from {RATIO}: {samples}",
        samples.most(),
        samples.worst(RATIO)
    );
    quota::ensure_full(samples.most(), EXECUTORS as usize)
        .with_context(|| format!("{samples}\n{}", containers.last_words()))?;
    ensure!(u64::from(lost) >= seconds / 30, "only {lost} executors were lost");
    ensure!(refusals >= 5, "only {refusals} creations were refused\n{}", containers.last_words());
    samples.ensure_near(RATIO, 1.0)?;

    // While Spark tries, the ledger always has a placement that is about to be refused.
    scenario.pods().delete(ID, &DeleteParams::default()).await?;
    until_true(SOON, "the executors to be gone", async || Ok(scenario.live(ID).await?.is_empty())).await?;
    assert_eq!(scenario.until_ledger_matches_pods(ID, SOON).await?, Counts::default());
    Ok(())
}
