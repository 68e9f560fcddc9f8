//! A job's spot executors are spread over nodes and over the pools of spot nodes, with the real scheduler, the real
//! control plane and a stand-in for Spark's allocator.

#![allow(clippy::indexing_slicing, reason = "a pod is changed by index; a panic here fails a test, as it should")]

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use balancer_tests::allocator::Allocator;
use balancer_tests::control_plane::Plane;
use balancer_tests::platforms::{KARPENTER_SPOT, Shape};
use balancer_tests::pods::{PodBuilder, driver, executor, plain};
use balancer_tests::scenario::{REPAIRED, Scenario, strict};
use balancer_tests::scheduling::{is_unschedulable, node_of};
use balancer_tests::wait::{SOON, until, until_true};
use balancer_tests::webhook::WebhookOptions;
use balancer_tests::{need, nodes};
use kube::ResourceExt;
use serde_json::json;

/// Twelve nodes in four pools, and how many of them each pool has. The scheduler spreads executors over nodes of one
/// size, so the first pool gets two thirds of a job.
const POOLS: [(&str, usize); 4] = [("m5.8xlarge", 8), ("m6i.8xlarge", 2), ("r5.8xlarge", 1), ("r6i.8xlarge", 1)];

const SHARE: &str = "workload/max-pool-share";
const CAP: &str = "workload/max-executors-per-node";

/// What a pool may have of so many executors: two fifths, one more, and what a request of five adds that a slow machine
/// decides by an outdated answer.
fn limit(executors: usize) -> usize {
    executors * 2 / 5 + 1 + 3
}

/// How many executors each node, or each pool, has.
type Spread = BTreeMap<String, usize>;

fn all(spread: &Spread) -> usize {
    spread.values().sum()
}

fn most(spread: &Spread) -> usize {
    spread.values().copied().max().unwrap_or_default()
}

fn name(scenario: &Scenario, instance_type: &str, number: usize) -> String {
    format!("{}-{instance_type}-{number}", scenario.namespace)
}

async fn make_node(scenario: &Scenario, shape: &Shape, instance_type: &str, number: usize) -> Result<()> {
    let name = name(scenario, instance_type, number);
    let labels = [("node.kubernetes.io/instance-type", instance_type), ("topology.kubernetes.io/zone", "a")];
    let pool = (scenario.namespace.as_str(), name.as_str());
    let room = json!({"cpu": "32", "memory": "128Gi", "pods": "110"});
    nodes::of_size(&scenario.client, pool, shape, &labels, &room).await
}

/// The twelve nodes, a webhook and a reconciler.
async fn start(purpose: &str, settings: &WebhookOptions) -> Result<Scenario> {
    let mut scenario = Scenario::without_nodes(Plane::shared().await?, purpose).await?;
    for (instance_type, count) in POOLS {
        for number in 0..count {
            make_node(&scenario, &KARPENTER_SPOT, instance_type, number).await?;
        }
    }
    scenario.serve(1, settings).await?;
    Ok(scenario)
}

/// Starts a job that is all on spot, and returns what keeps it at its executors.
async fn job(scenario: &Scenario, job: &str, executors: u32, annotations: &[(&str, &str)]) -> Result<Allocator> {
    let pod = driver(job).annotation("workload/spot-ratio", "1");
    let pod = annotations.iter().fold(pod, |pod, (key, value)| pod.annotation(key, value));
    let posted = scenario.post(&pod).await?;
    ensure!(posted.warnings.is_empty(), "{:?}", posted.warnings);
    let uid = posted.pod()?.uid().context("no uid")?;
    let (pool, driver) = (scenario.namespace.clone(), format!("{job}-driver"));
    let shape = move |executor: PodBuilder| executor.owned_by(&driver, &uid).on_pool(&pool);
    Ok(Allocator::start((&scenario.client, &scenario.namespace), job, executors, shape))
}

/// The job's bound executors by their nodes, and how many the scheduler has found no node for.
async fn by_node(scenario: &Scenario, job: &str) -> Result<(Spread, usize)> {
    let (mut nodes, mut waiting) = (Spread::new(), 0);
    for pod in scenario.live(job).await? {
        match node_of(&pod) {
            Some(node) => *nodes.entry(node.to_owned()).or_default() += 1,
            None => waiting += usize::from(is_unschedulable(&pod)),
        }
    }
    Ok((nodes, waiting))
}

/// Waits until so many of the job's executors are bound and so many found no node, and returns the bound ones by their
/// nodes.
async fn until_placed(scenario: &Scenario, job: &str, bound: usize, waiting: usize) -> Result<Spread> {
    until(SOON, &format!("{bound} executors of {job} to be bound and {waiting} to wait"), async || {
        let (nodes, waits) = by_node(scenario, job).await?;
        ensure!((all(&nodes), waits) == (bound, waiting), "{nodes:?}, and {waits} wait");
        Ok(Some(nodes))
    })
    .await
}

/// The same by pools.
fn by_pool(nodes: &Spread) -> Result<Spread> {
    let mut pools = Spread::new();
    for (node, executors) in nodes {
        let of_type = POOLS.iter().find(|(instance_type, _)| node.contains(instance_type));
        let (instance_type, _) = of_type.with_context(|| format!("{node} is in no pool"))?;
        *pools.entry((*instance_type).to_owned()).or_default() += executors;
    }
    Ok(pools)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_with_a_share_is_spread_over_the_pools_and_one_without_is_not() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler);
    let scenario = start("pools", &strict()).await?;
    let mut allocators = vec![job(&scenario, "without", 60, &[]).await?];
    let without = by_pool(&until_placed(&scenario, "without", 60, 0).await?)?;
    println!("60 executors without a share: {without:?}");
    ensure!(most(&without) > limit(60), "the scheduler spreads the job by itself, so this shows nothing: {without:?}");

    let limited = [("small", 10), ("medium", 30), ("large", 60)];
    for (name, executors) in limited {
        allocators.push(job(&scenario, name, executors, &[(SHARE, "0.4")]).await?);
    }
    let mut small_shares = 0;
    for (name, executors) in limited {
        let executors = usize::try_from(executors)?;
        let pools = by_pool(&until_placed(&scenario, name, executors, 0).await?)?;
        println!("{executors} executors with a share of 0.4: {pools:?}");
        ensure!(most(&pools) <= limit(executors), "{executors} executors: {pools:?}");
        small_shares += u32::from(most(&pools) * 10 <= executors * 6);
    }
    scenario.until_ledger_matches_pods("large", REPAIRED).await?;

    let reconciler = scenario.reconcilers.first().context("no reconciler")?;
    until_true(SOON, "the gauges to show the jobs", async || {
        let metrics = reconciler.metrics().await?;
        let jobs = |le| metrics.sum("spot_balancer_jobs_by_largest_pool_share", &[("le", le)]);
        Ok((jobs("+Inf"), jobs("0.6")) == (Some(4.0), Some(f64::from(small_shares))))
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_waits_for_the_share_of_a_pool_and_later_executors_make_up_for_it() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler);
    let scenario = start("nowait", &strict()).await?;
    let [(only, _), others @ ..] = POOLS;
    let cordon = async |closed| {
        for (instance_type, count) in others {
            for number in 0..count {
                nodes::cordon(&scenario.client, &name(&scenario, instance_type, number), closed).await?;
            }
        }
        anyhow::Ok(())
    };
    cordon(true).await?;
    let allocator = job(&scenario, "limited", 20, &[(SHARE, "0.4")]).await?;
    let pools = by_pool(&until_placed(&scenario, "limited", 20, 0).await?)?;
    ensure!(pools.keys().eq([only]), "{pools:?}");

    cordon(false).await?;
    allocator.want(45);
    let pools = by_pool(&until_placed(&scenario, "limited", 45, 0).await?)?;
    println!("20 executors with one pool, and 25 more with all: {pools:?}");
    ensure!(pools.get(only) == Some(&20) && pools.len() == POOLS.len(), "{pools:?}");
    Ok(())
}

/// The scheduler adds up its scores: for what a pod prefers, and for emptier nodes. If an executor prefers spot too,
/// because it is `BEST_EFFORT`, other instance types get half of what its preferences weigh.
#[tokio::test(flavor = "multi_thread")]
async fn other_types_are_preferred_to_emptier_nodes_unless_the_executor_prefers_spot_too() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler);
    let settings = [("strict", strict(), false), ("besteffort", WebhookOptions::default(), true)];
    for (purpose, settings, prefers_spot) in settings {
        let scenario = start(purpose, &settings).await?;
        let [(largest, _), others @ ..] = POOLS;
        for (instance_type, count) in others {
            for number in 0..count {
                let node = name(&scenario, instance_type, number);
                let filler = plain(&format!("filler-{instance_type}-{number}")).on_node(&node).with(|pod| {
                    pod["spec"]["containers"][0]["resources"] = json!({"requests": {"cpu": "22", "memory": "88Gi"}});
                });
                scenario.post(&filler).await?.pod()?;
            }
        }
        let _allocator = job(&scenario, "limited", 20, &[(SHARE, "0.4")]).await?;
        let pools = by_pool(&until_placed(&scenario, "limited", 20, 0).await?)?;
        println!("{purpose}, 20 executors with a share of 0.4, the other types two thirds full: {pools:?}");
        // Since 1.23 the scheduler gives what a pod prefers twice the weight.
        let is_outweighed = prefers_spot && scenario.plane.minor_version().await? < 23;
        let on_largest = pools.get(largest).copied().unwrap_or_default();
        ensure!(if is_outweighed { on_largest == 20 } else { on_largest <= limit(20) }, "{purpose}: {pools:?}");
    }
    Ok(())
}

/// Before Kubernetes 1.27 the cap counts from the node that has the fewest executors of the job, of all nodes that fit
/// the executor's selector and affinity. A node with a taint that executors do not tolerate is one of them, and keeps
/// that at 0.
#[tokio::test(flavor = "multi_thread")]
async fn no_node_gets_more_executors_of_a_job_than_its_cap_and_those_beyond_it_wait() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler);
    let scenario = start("cap", &strict()).await?;
    let (instance_type, count) = POOLS[0];
    let closed = count - 1;
    let shape = Shape { taint: Some(("tests/closed", "true")), ..KARPENTER_SPOT };
    make_node(&scenario, &shape, instance_type, closed).await?;
    let without = job(&scenario, "without", 30, &[]).await?;
    let nodes = until_placed(&scenario, "without", 30, 0).await?;
    println!("30 executors without a cap: {nodes:?}");
    ensure!(most(&nodes) > 2, "{nodes:?}");

    let capped = job(&scenario, "capped", 30, &[(CAP, "2")]).await?;
    let nodes = until_placed(&scenario, "capped", 22, 8).await?;
    ensure!(nodes.len() == 11 && most(&nodes) == 2, "{nodes:?}");
    let is_old = scenario.plane.minor_version().await? < 27;
    let another = executor("capped", 99).on_pool(&scenario.namespace);
    let reply = another.dry_run(&scenario.client, &scenario.namespace).await?;
    ensure!(is_old == reply.warnings.iter().any(|text| text.contains("ignores minDomains")), "{:?}", reply.warnings);

    // An old scheduler now takes 2 for the fewest, and allows 4; a new one goes on to take 0.
    make_node(&scenario, &KARPENTER_SPOT, instance_type, closed).await?;
    let waiting = if is_old { 0 } else { 6 };
    let nodes = until_placed(&scenario, "capped", 30 - waiting, waiting).await?;
    println!("30 executors with a cap of 2, and every node in use: {nodes:?}");
    ensure!(most(&nodes) <= if is_old { 4 } else { 2 }, "{nodes:?}");
    drop((without, capped));
    Ok(())
}
