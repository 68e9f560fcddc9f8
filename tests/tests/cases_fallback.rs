//! Executors that find no spot node are replaced on on-demand, and spot is used again once there is some: with the real
//! scheduler, the real control plane and a stand-in for Spark's allocator.

#![allow(clippy::indexing_slicing, reason = "JSON is built by index")]

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use balancer_tests::account::{DELETE_PODS, READ_EVENTS};
use balancer_tests::allocator::Allocator;
use balancer_tests::control_plane::Plane;
use balancer_tests::events::{self, until_warned};
use balancer_tests::scenario::{Counts, Scenario, placed, strict};
use balancer_tests::scheduling::{is_unschedulable, node_of};
use balancer_tests::wait::{SOON, until, until_true};
use balancer_tests::webhook::WebhookOptions;
use balancer_tests::{need, nodes, pods};
use k8s_openapi::api::core::v1::{Event, Pod};
use k8s_openapi::api::scheduling::v1::PriorityClass;
use kube::ResourceExt;
use kube::api::{Api, DeleteParams, Patch, PatchParams, PostParams};
use serde_json::json;
use tokio::time::sleep;

const JOB: &str = "etl";
const DRIVER: &str = "etl-driver";
const RATIO: f64 = 0.7;
const EXECUTORS: u32 = 20;
/// Of 20 executors at 0.7.
const ON_SPOT: usize = 14;
/// Longer than the stand-in takes to request all executors.
const FALLBACK: Duration = Duration::from_secs(10);
const RETRY: Duration = Duration::from_secs(60);

/// A STRICT job of 20 executors on nodes of its own, with no room on spot.
struct Shortage {
    scenario: Scenario,
    allocator: Allocator,
    pool: String,
}

fn settings() -> WebhookOptions {
    strict()
        .env("SPOT_FALLBACK_SECONDS", FALLBACK.as_secs().to_string())
        .env("SPOT_RETRY_SECONDS", RETRY.as_secs().to_string())
}

impl Shortage {
    /// Starts the job with this many reconcilers, which may delete pods if `may_delete`. Its spot node is cordoned. Answers
    /// when the executors that are on on-demand run.
    async fn start(purpose: &str, reconcilers: usize, may_delete: bool) -> Result<Self> {
        let scenario = Scenario::bare(Plane::shared().await?, purpose).await?;
        let pool = format!("pool-{purpose}");
        let spot = nodes::of_pool(&scenario.client, &pool, "spot").await?;
        nodes::cordon(&scenario.client, &spot, true).await?;
        Self::start_on(scenario, pool, reconcilers, may_delete).await
    }

    /// The same with the spot node as it is.
    async fn start_on(mut scenario: Scenario, pool: String, reconcilers: usize, may_delete: bool) -> Result<Self> {
        nodes::of_pool(&scenario.client, &pool, "on-demand").await?;
        if may_delete {
            scenario.allow_reconcilers(&[DELETE_PODS, READ_EVENTS]).await?;
        }
        scenario.serve(1, &settings()).await?;
        for _ in 1..reconcilers {
            let options = scenario.reconciler_options().await?.with(settings());
            scenario.reconcilers.push(balancer_tests::reconciler::Reconciler::start(options).await?);
        }
        let driver = pods::driver(JOB).annotation("workload/spot-ratio", &RATIO.to_string());
        let uid = scenario.post(&driver).await?.pod()?.uid().context("no uid")?;
        let shape = {
            let pool = pool.clone();
            move |executor: pods::PodBuilder| executor.owned_by(DRIVER, &uid).on_pool(&pool)
        };
        let allocator = Allocator::start((&scenario.client, &scenario.namespace), JOB, EXECUTORS, shape);
        let shortage = Self { scenario, allocator, pool };
        until_true(SOON, "six executors to run", async || Ok(shortage.running().await?.len() >= 6)).await?;
        Ok(shortage)
    }

    /// The names and uids of the executors that are bound to a node.
    async fn running(&self) -> Result<BTreeMap<String, String>> {
        let live = self.scenario.live(JOB).await?;
        let bound = live.iter().filter(|pod| node_of(pod).is_some());
        Ok(bound.map(|pod| (pod.name_any(), pod.uid().unwrap_or_default())).collect())
    }

    /// The executors for which the scheduler has found no node.
    async fn stuck(&self) -> Result<Vec<Pod>> {
        Ok(self.scenario.live(JOB).await?.into_iter().filter(is_unschedulable).collect())
    }

    /// Waits until this many executors run on on-demand, and none waits. Fails if one of `running` is gone then.
    async fn until_complete(&self, running: &BTreeMap<String, String>) -> Result<()> {
        until_true(SOON, "the job to be complete on on-demand", async || {
            Ok(self.running().await?.len() == EXECUTORS as usize && self.stuck().await?.is_empty())
        })
        .await?;
        let left = self.running().await?;
        ensure!(running.iter().all(|(name, uid)| left.get(name) == Some(uid)), "of {running:?} are left: {left:?}");
        self.scenario.until_ledger_matches_pods(JOB, SOON).await?;
        self.scenario.ensure_bound_as_placed(JOB).await
    }

    /// How many executors the reconcilers have deleted, by their own count.
    async fn replaced(&self, outcome: &str) -> Result<f64> {
        let mut sum = 0.0;
        for reconciler in &self.scenario.reconcilers {
            let labels = [("outcome", outcome)];
            let metrics = reconciler.metrics().await?;
            sum += metrics.sum("spot_balancer_executors_replaced_total", &labels).unwrap_or_default();
        }
        Ok(sum)
    }

    /// Fails unless each executor that was deleted found no spot, and Spark has requested one in its place. On a slow
    /// machine spot is closed before all executors are requested, or a replacement may already probe spot.
    async fn ensure_replaced(&self) -> Result<f64> {
        let replaced = self.replaced("deleted").await?;
        ensure!(f64::from(self.allocator.requested() - EXECUTORS) == replaced, "{replaced} were deleted");
        ensure!((1.0..=ON_SPOT as f64 + 2.0).contains(&replaced), "{replaced} were deleted");
        Ok(replaced)
    }

    async fn until_replaced(&self, at_least: f64) -> Result<()> {
        until_true(SOON, "executors to be replaced", async || Ok(self.replaced("deleted").await? >= at_least)).await
    }

    async fn open_spot(&self) -> Result<()> {
        nodes::cordon(&self.scenario.client, &format!("{}-spot", self.pool), false).await
    }
}

#[tokio::test]
async fn stuck_executors_are_replaced_on_on_demand_and_spot_is_used_again() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler);
    let shortage = Shortage::start("fallback", 1, true).await?;
    let running = shortage.running().await?;
    shortage.until_complete(&running).await?;
    let replaced = shortage.ensure_replaced().await?;
    assert_eq!(shortage.scenario.counts(JOB).await?, Counts { spot: 0, on_demand: EXECUTORS as usize });
    until_warned(&shortage.scenario, DRIVER, ("SpotClosed", &["on-demand"]), SOON).await?;

    // There is spot again. One executor probes it; then new ones restore the share.
    shortage.open_spot().await?;
    sleep(RETRY).await;
    let wanted = (EXECUTORS as f64 / (1.0 - RATIO)).ceil() as u32 + 10;
    shortage.allocator.want(wanted);
    until_true(SOON, "the new executors to run", async || Ok(shortage.running().await?.len() == wanted as usize))
        .await?;
    let counts = shortage.scenario.until_ledger_matches_pods(JOB, SOON).await?;
    counts.ensure_near(RATIO, 1.0)?;
    shortage.scenario.ensure_bound_as_placed(JOB).await?;
    until_true(SOON, "the Event SpotReopened", async || {
        let told = events::about(&shortage.scenario, DRIVER, "Normal").await?;
        Ok(told.iter().any(|(reason, _)| reason == "SpotReopened"))
    })
    .await?;
    assert_eq!(shortage.replaced("deleted").await?, replaced, "nothing is deleted once there is spot");
    Ok(())
}

#[tokio::test]
async fn another_leader_finishes_the_replacement() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler);
    let mut shortage = Shortage::start("fallback-leader", 2, true).await?;
    let running = shortage.running().await?;
    shortage.until_replaced(2.0).await?;
    let leader = shortage.scenario.leader().await?.context("no leader")?;
    shortage.scenario.reconcilers.remove(leader).kill();
    shortage.until_complete(&running).await
}

#[tokio::test]
async fn a_flushed_redis_does_not_stop_the_replacement() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler);
    let shortage = Shortage::start("fallback-flush", 1, true).await?;
    let running = shortage.running().await?;
    shortage.until_replaced(2.0).await?;
    let () = redis::cmd("FLUSHALL").query_async(&mut shortage.scenario.redis.connection().await?).await?;
    shortage.until_complete(&running).await
}

#[tokio::test]
async fn without_the_right_to_delete_nothing_is_replaced_and_the_driver_is_told_once() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler);
    let shortage = Shortage::start("fallback-forbidden", 1, false).await?;
    until_warned(&shortage.scenario, DRIVER, ("ExecutorReplacementForbidden", &["delete", "pods"]), SOON).await?;
    // Spot is closed all the same: new executors go to on-demand.
    let stuck = shortage.stuck().await?.len();
    shortage.allocator.want(EXECUTORS + 5);
    until_true(SOON, "the new executors to run", async || {
        Ok(shortage.running().await?.len() == EXECUTORS as usize + 5 - stuck)
    })
    .await?;
    sleep(2 * FALLBACK).await;
    assert_eq!((shortage.stuck().await?.len(), shortage.replaced("deleted").await?), (stuck, 0.0));
    let refused = shortage.replaced("forbidden").await?;
    ensure!((1.0..=2.0).contains(&refused), "{refused} deletions were tried without the right");
    Ok(())
}

#[tokio::test]
async fn an_executor_with_an_announced_node_is_not_replaced() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler);
    let shortage = Shortage::start("fallback-announced", 1, true).await?;
    let scenario = &shortage.scenario;
    until_true(SOON, "an executor to wait", async || Ok(!shortage.stuck().await?.is_empty())).await?;
    let announced = shortage.stuck().await?.pop().context("no executor waits")?;
    let events = Api::<Event>::namespaced(scenario.client.clone(), &scenario.namespace);
    // As Karpenter writes them.
    let announce = async || {
        let now = k8s_openapi::jiff::Timestamp::now();
        let event: Event = serde_json::from_value(json!({
            "metadata": {"generateName": "nominated-"},
            "involvedObject": {
                "apiVersion": "v1", "kind": "Pod", "namespace": scenario.namespace,
                "name": announced.name_any(), "uid": announced.uid(),
            },
            "type": "Normal", "reason": "Nominated", "message": "Pod should schedule on: nodeclaim/default-x7k2p",
            "source": {"component": "karpenter"}, "count": 1,
            "firstTimestamp": now.to_string(), "lastTimestamp": now.to_string(),
        }))?;
        events.create(&PostParams::default(), &event).await?;
        anyhow::Ok(())
    };
    let names =
        async || Ok::<_, anyhow::Error>(shortage.stuck().await?.iter().map(ResourceExt::name_any).collect::<Vec<_>>());
    until_true(SOON, "all others to be replaced", async || {
        announce().await?;
        sleep(Duration::from_secs(1)).await;
        let stuck = names().await?;
        ensure!(stuck.contains(&announced.name_any()), "{} is gone", announced.name_any());
        Ok(stuck.len() == 1)
    })
    .await?;
    // Karpenter says nothing more of it: its node does not come.
    until_true(SOON, "the one that was announced to be replaced", async || Ok(names().await?.is_empty())).await
}

/// A pod that gives way to executors but does not end.
async fn fill(scenario: &Scenario, node: &str) -> Result<Pod> {
    let class: PriorityClass = serde_json::from_value(json!({
        "metadata": {"name": scenario.namespace}, "value": -1, "globalDefault": false,
    }))?;
    Api::all(scenario.client.clone()).create(&PostParams::default(), &class).await?;
    let pod = pods::plain("filler").on_node(node).with(|pod| {
        pod["metadata"]["finalizers"] = json!(["tests.example.com/stays"]);
        pod["spec"]["priorityClassName"] = scenario.namespace.clone().into();
        pod["spec"]["containers"][0]["resources"] = json!({"requests": {"cpu": "3999500m"}});
    });
    // The apiserver looks the class up in a cache.
    until(SOON, "the filler to be accepted", async || Ok(Some(scenario.post(&pod).await?.pod()?))).await
}

#[tokio::test]
async fn an_executor_for_which_the_scheduler_makes_room_is_not_replaced() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler);
    let scenario = Scenario::bare(Plane::shared().await?, "fallback-nominated").await?;
    let pool = "pool-fallback-nominated".to_owned();
    let spot = nodes::of_pool(&scenario.client, &pool, "spot").await?;
    let filler = fill(&scenario, &spot).await?;
    let shortage = Shortage::start_on(scenario, pool, 1, true).await?;
    let nominated = async || {
        let of = |pod: &Pod| pod.status.as_ref().and_then(|status| status.nominated_node_name.clone());
        Ok::<_, anyhow::Error>(shortage.stuck().await?.iter().filter_map(of).filter(|node| *node == spot).count())
    };
    until_true(SOON, "all executors on spot to be nominated", async || Ok(nominated().await? == ON_SPOT)).await?;
    sleep(4 * FALLBACK).await;
    assert_eq!((nominated().await?, shortage.allocator.requested()), (ON_SPOT, EXECUTORS));
    // The pod that gives way ends.
    let done = json!({"metadata": {"finalizers": null}});
    shortage.scenario.pods().patch(&filler.name_any(), &PatchParams::default(), &Patch::Merge(&done)).await?;
    until_true(SOON, "all executors to run", async || Ok(shortage.running().await?.len() == EXECUTORS as usize))
        .await?;
    shortage.scenario.ensure_bound_as_placed(JOB).await?;
    assert_eq!(shortage.allocator.requested(), EXECUTORS);
    Ok(())
}

#[tokio::test]
async fn a_best_effort_job_and_executors_that_choose_spot_themselves_are_left_alone() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler);
    let shortage = Shortage::start("fallback-own", 1, true).await?;
    let own = pods::executor("own", 1).on_pool(&shortage.pool).node_selector(nodes::CAPACITY, "spot");
    let own = shortage.scenario.post(&own).await?.pod()?;
    assert_eq!(placed(&own)?, "spot");
    let running = shortage.running().await?;
    shortage.until_complete(&running).await?;
    let left = shortage.scenario.pods().get(&own.name_any()).await?;
    assert_eq!((left.uid(), is_unschedulable(&left)), (own.uid(), true));
    shortage.scenario.pods().delete(&own.name_any(), &DeleteParams::default()).await?;
    Ok(())
}
