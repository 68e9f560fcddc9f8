//! Servers of Redis fail and are replaced, in a cluster and with sentinels, while executors are created: no creation fails
//! or is delayed for long, and soon after the fault the ledger is right again.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use balancer_tests::control_plane::Plane;
use balancer_tests::pods::{executor, remove};
use balancer_tests::redis::Servers;
use balancer_tests::redis_cluster::{RedisCluster, slot};
use balancer_tests::redis_sentinel::SentinelSet;
use balancer_tests::scenario::{REPAIRED, Scenario, placed, strict};
use balancer_tests::wait::{SOON, until, until_true};
use balancer_tests::{need, nodes};
use futures::future::try_join_all;
use futures::{StreamExt, TryStreamExt};
use tokio::time::sleep;

/// How long an apiserver waits for a creation by the chart's configurations.
const BUDGET: Duration = Duration::from_secs(3);
/// So many executors are created at least, and for as long as the fault lasts.
const CREATIONS: u32 = 200;
/// So many of them before the fault.
const BEFORE: u32 = 40;
/// Between two creations: some last until the fault is over.
const PACE: Duration = Duration::from_millis(25);
/// Of so many created executors one is deleted.
const ONE_IS_DELETED_OF: u32 = 8;
const RATIO: f64 = 0.7;
const JOBS: [&str; 4] = ["etl", "report", "train", "export"];

/// Creations go on.
struct Load {
    /// A key of one of the jobs.
    key: String,
    made: AtomicU32,
    is_over: AtomicBool,
}

impl Load {
    /// Waits until so many more executors have been created.
    async fn more(&self, count: u32) -> Result<()> {
        let until = self.made.load(Ordering::Relaxed) + count;
        until_true(SOON, "creations", async || Ok(self.made.load(Ordering::Relaxed) >= until)).await
    }
}

/// Has two webhooks and a reconciler keep their ledgers in the servers, and checks what happens to jobs during the fault.
async fn outlast<R: Servers>(
    purpose: &str,
    servers: R,
    fault: impl AsyncFnOnce(&mut R, &Load) -> Result<()>,
) -> Result<()> {
    let plane = Plane::shared().await?;
    for capacity in ["spot", "on-demand"] {
        nodes::ensure(&plane.client()?, capacity, 2).await?;
    }
    let mut scenario = Scenario::with_ledger_in(servers, plane, purpose).await?;
    scenario.serve(2, &strict()).await?;
    for job in JOBS {
        scenario.driver(job, &RATIO.to_string()).await?.pod()?;
    }

    let load = Load { key: scenario.keys(JOBS[0]).0, made: AtomicU32::new(0), is_over: AtomicBool::new(false) };
    let (pods, namespace) = (scenario.pods(), scenario.namespace.clone());
    let (client, servers) = (&scenario.client, &mut scenario.redis);
    let create = async |number: u32| {
        let job = JOBS.iter().cycle().nth(number as usize).context("no job")?;
        let begun = Instant::now();
        let pod = executor(job, number).post(client, &namespace).await?.pod()?;
        let took = begun.elapsed();
        placed(&pod)?;
        load.made.fetch_add(1, Ordering::Relaxed);
        if number.is_multiple_of(ONE_IS_DELETED_OF) {
            remove(&pods, &pod.metadata.name.context("no name")?).await?;
        }
        ensure!(took < BUDGET, "creation {number} took {took:?}");
        Ok(())
    };
    let creations = futures::stream::iter(1..)
        .then(async |number| {
            sleep(PACE).await;
            number
        })
        .take_while(|number| {
            let goes_on = *number <= CREATIONS || !load.is_over.load(Ordering::Relaxed);
            std::future::ready(goes_on)
        })
        .map(create)
        .buffer_unordered(6)
        .try_collect::<()>();
    let fault = async {
        load.more(BEFORE).await?;
        let done = fault(servers, &load).await;
        load.is_over.store(true, Ordering::Relaxed);
        done
    };
    tokio::try_join!(creations, fault)?;

    let is_right = async |job: &str| {
        scenario.until_ledger_matches_pods(job, REPAIRED).await?;
        scenario.ensure_ratio_recovers(job, RATIO).await
    };
    try_join_all(JOBS.into_iter().map(is_right)).await?;
    let without = scenario.metric("spot_balancer_placements_total", &[("source", "fallback")]).await?;
    let errors = scenario.reconcile_metric("store_errors_total", &[]).await?;
    let made = load.made.load(Ordering::Relaxed);
    eprintln!("{purpose}: {made} created, {without} placed without the store; {errors} errors of the reconciler");
    Ok(())
}

async fn outlast_in_cluster(
    purpose: &str,
    fault: impl AsyncFnOnce(&mut RedisCluster, &Load) -> Result<()>,
) -> Result<()> {
    outlast(purpose, RedisCluster::start().await?, fault).await
}

async fn outlast_with_sentinels(
    purpose: &str,
    fault: impl AsyncFnOnce(&mut SentinelSet, &Load) -> Result<()>,
) -> Result<()> {
    outlast(purpose, SentinelSet::start().await?, fault).await
}

/// Waits until another node than this has the key.
async fn until_replaced(cluster: &RedisCluster, key: &str, node: usize) -> Result<()> {
    until_true(SOON, "a replica to take over", async || Ok(cluster.primary_of(key).await? != node)).await
}

#[tokio::test]
async fn a_primary_of_a_cluster_is_killed_and_its_replica_takes_over() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler);
    outlast_in_cluster("node-killed", async |cluster, load| {
        let node = cluster.primary_of(&load.key).await?;
        cluster.nodes[node].stop();
        until_replaced(cluster, &load.key, node).await?;
        cluster.until_healthy().await
    })
    .await
}

#[tokio::test]
async fn a_replica_of_a_cluster_is_made_the_primary_and_back() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler);
    outlast_in_cluster("node-failover", async |cluster, load| {
        for _ in 0..2 {
            let primary = cluster.primary_of(&load.key).await?;
            let replica = cluster.replicas_of(primary).await?.first().copied().context("no replica")?;
            cluster.fail_over(replica).await?;
            cluster.until_healthy().await?;
            load.more(20).await?;
        }
        Ok(())
    })
    .await
}

#[tokio::test]
async fn slots_move_to_another_primary_and_back() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler);
    outlast_in_cluster("slots-move", async |cluster, load| {
        let slot = slot(&load.key);
        let home = cluster.primary_of_slot(slot).await?;
        let away = cluster.primaries().await.into_iter().find(|node| *node != home).context("one primary")?;
        for to in [away, home, away, home] {
            // Creations meet each of the states that the slot is in.
            let migration = cluster.open_slot(slot, to).await?;
            load.more(8).await?;
            while cluster.move_key(migration).await? {
                load.more(8).await?;
            }
            cluster.close_slot(migration).await?;
            load.more(8).await?;
        }
        cluster.until_healthy().await
    })
    .await
}

#[tokio::test]
async fn a_cluster_loses_all_replicas() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler);
    outlast_in_cluster("replicas-lost", async |cluster, load| {
        let primaries = cluster.primaries().await;
        for (node, server) in cluster.nodes.iter_mut().enumerate() {
            if !primaries.contains(&node) {
                server.stop();
            }
        }
        load.more(80).await?;
        for server in cluster.nodes.iter_mut().filter(|server| !server.runs()) {
            server.start_again_empty().await?;
        }
        cluster.until_healthy().await
    })
    .await
}

#[tokio::test]
async fn a_primary_of_a_cluster_hangs_and_comes_back_as_a_replica() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler);
    outlast_in_cluster("node-hangs", async |cluster, load| {
        let node = cluster.primary_of(&load.key).await?;
        cluster.nodes[node].freeze()?;
        until_replaced(cluster, &load.key, node).await?;
        load.more(20).await?;
        cluster.nodes[node].thaw()?;
        cluster.until_healthy().await
    })
    .await
}

/// Waits until the sentinels agree that another server than this is the primary.
async fn until_another(set: &SentinelSet, server: usize) -> Result<()> {
    until(SOON, "another primary", async || Ok(Some(set.primary().await?).filter(|primary| *primary != server)))
        .await?;
    set.until_agreed().await?;
    Ok(())
}

#[tokio::test]
async fn the_sentinels_replace_a_primary_that_is_killed() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler);
    outlast_with_sentinels("primary-killed", async |set, _| {
        let server = set.primary().await?;
        set.servers[server].stop();
        until_another(set, server).await
    })
    .await
}

#[tokio::test]
async fn the_sentinels_are_told_to_make_another_server_the_primary() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler);
    outlast_with_sentinels("told-failover", async |set, load| {
        set.fail_over().await?;
        load.more(20).await?;
        set.until_whole().await?;
        Ok(())
    })
    .await
}

#[tokio::test]
async fn a_sentinel_is_lost_and_comes_back() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler);
    outlast_with_sentinels("sentinel-lost", async |set, load| {
        set.sentinels[0].stop();
        load.more(80).await?;
        // The two that are left replace a primary all the same.
        set.fail_over().await?;
        load.more(20).await?;
        set.sentinels[0].start_again_empty().await?;
        set.until_whole().await?;
        Ok(())
    })
    .await
}

#[tokio::test]
async fn the_sentinels_replace_a_primary_that_hangs_and_comes_back() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler);
    outlast_with_sentinels("primary-hangs", async |set, load| {
        let server = set.primary().await?;
        set.servers[server].freeze()?;
        until_another(set, server).await?;
        load.more(20).await?;
        set.servers[server].thaw()?;
        set.until_whole().await?;
        Ok(())
    })
    .await
}
