//! Executors are spread over nodes as their job states it: with the real scheduler and the real control plane.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use balancer_tests::control_plane::Plane;
use balancer_tests::need;
use balancer_tests::nodes::{self, CAPACITY};
use balancer_tests::platforms::Shape;
use balancer_tests::pods::executor;
use balancer_tests::scenario::{Scenario, strict};
use balancer_tests::scheduling::{node_of, until_bound, until_unschedulable};
use balancer_tests::wait::{SOON, until_true};
use kube::ResourceExt;

const JOB: &str = "etl";
const LIMIT: &str = "workload/max-executors-per-node";
const SPOT: Shape = Shape { name: "spot", capacity: "spot", labels: &[(CAPACITY, "spot")], taint: None };
const ROOM: u32 = 100;

/// How many executors of the job each node has.
async fn by_node(scenario: &Scenario) -> Result<BTreeMap<String, usize>> {
    let mut nodes = BTreeMap::new();
    for pod in scenario.live(JOB).await? {
        if let Some(node) = node_of(&pod) {
            *nodes.entry(node.to_owned()).or_default() += 1;
        }
    }
    Ok(nodes)
}

#[tokio::test(flavor = "multi_thread")]
async fn no_node_gets_more_executors_than_the_job_states_while_one_has_none() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook);
    let mut scenario = Scenario::bare(Plane::shared().await?, "spread").await?;
    let pool = "pool-spread";
    let names = ["spread-a", "spread-b", "spread-c"];
    for name in names {
        nodes::of_platform(&scenario.client, (pool, name), &SPOT, &[("kubernetes.io/hostname", name)], ROOM).await?;
    }
    let [.., last] = names;
    // It counts as a node that has none.
    nodes::cordon(&scenario.client, last, true).await?;
    scenario.start_webhooks(1, strict().env("MAX_EXECUTORS_PER_NODE", "2")).await?;
    scenario.registration().apply(&scenario.plane).await?;
    scenario.driver(JOB, "1").await?.pod()?;

    // The control plane is too old for minDomains.
    let first = executor(JOB, 1).on_pool(pool);
    let mut warnings = Vec::new();
    until_true(SOON, "the webhook to know the cluster's version", async || {
        warnings = first.dry_run(&scenario.client, &scenario.namespace).await?.warnings;
        Ok(!warnings.is_empty())
    })
    .await?;
    let [warning] = warnings.as_slice() else { anyhow::bail!("{warnings:?}") };
    ensure!(warning.starts_with(LIMIT) && warning.contains("ignores minDomains"), "{warning}");

    let mut made = Vec::new();
    for id in 1..=4 {
        let pod = scenario.post(&executor(JOB, id).on_pool(pool)).await?.pod()?;
        let constraints = pod.spec.as_ref().and_then(|spec| spec.topology_spread_constraints.as_deref());
        let [limit] = constraints.unwrap_or_default() else { anyhow::bail!("{constraints:?}") };
        ensure!(limit.max_skew == 2, "{limit:?}");
        until_bound(&scenario.pods(), &pod.name_any()).await?;
        made.push(pod.name_any());
    }
    let two_each = |nodes: &[&str]| nodes.iter().map(|name| ((*name).to_owned(), 2)).collect::<BTreeMap<_, _>>();
    let [a, b, _] = names;
    let on = by_node(&scenario).await?;
    ensure!(on == two_each(&[a, b]), "{on:?}");
    for id in 5..=6 {
        scenario.post(&executor(JOB, id).on_pool(pool)).await?.pod()?;
        let name = executor(JOB, id);
        let name = name.value().pointer("/metadata/name").and_then(|name| name.as_str()).context("no name")?;
        until_unschedulable(&scenario.pods(), name).await?;
        made.push(name.to_owned());
    }
    nodes::cordon(&scenario.client, last, false).await?;
    for name in &made {
        until_bound(&scenario.pods(), name).await?;
    }
    // Without minDomains a node may have two more than the one with the fewest, so that a third fits as soon as each node
    // has one.
    let on = by_node(&scenario).await?;
    ensure!(on.len() == 3 && on.values().all(|executors| *executors <= 3), "{on:?}");
    for name in names {
        nodes::remove(&scenario.client, name).await?;
    }
    Ok(())
}
