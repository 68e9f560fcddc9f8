//! The Redis ledger keeps the contract in a cluster, also while keys move from one primary to another.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use balancer_store::RedisLedger;
use balancer_tests::need;
use balancer_tests::redis::Servers;
use balancer_tests::redis_cluster::{RedisCluster, slot};
use tokio::sync::OnceCell;

const DAY: Duration = Duration::from_secs(86_400);

async fn connect(cluster: &RedisCluster) -> Result<RedisLedger> {
    let options = cluster.ledger_options(Duration::from_secs(10), DAY);
    Ok(RedisLedger::connect(&cluster.url(), options).await?)
}

/// A cluster for the contract's tests together: each has a job of its own.
async fn shared() -> Result<RedisLedger> {
    static CLUSTER: OnceCell<RedisCluster> = OnceCell::const_new();
    connect(CLUSTER.get_or_try_init(RedisCluster::start).await?).await
}

balancer_store::contract!({
    need!(Redis);
    shared().await?
});

/// Moves the slots that have keys from one primary to the next, for ever, and counts the moves.
async fn move_slots(cluster: &RedisCluster, moves: &AtomicU32) -> Result<()> {
    loop {
        let primaries = cluster.primaries().await;
        for key in cluster.keys("exec-count:*").await? {
            let slot = slot(&key);
            let from = cluster.primary_of_slot(slot).await?;
            let place = primaries.iter().position(|node| *node == from).context("its node is no primary")?;
            let to = primaries.iter().cycle().nth(place + 1).context("no primary")?;
            cluster.migrate_slot(slot, *to).await?;
            moves.fetch_add(1, Ordering::Relaxed);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn random_histories_match_the_reference_while_their_slots_move() -> Result<()> {
    need!(Redis);
    let cluster = Arc::new(RedisCluster::start().await?);
    let ledger = connect(&cluster).await?;
    // In a task of its own, because the histories block theirs.
    let moves = Arc::new(AtomicU32::new(0));
    let moving = tokio::spawn({
        let (cluster, moves) = (Arc::clone(&cluster), Arc::clone(&moves));
        async move { move_slots(&cluster, &moves).await }
    });
    balancer_store::contract::random_histories_match_the_reference(&ledger).await?;
    if moving.is_finished() {
        moving.await?.context("moving slots")?;
    } else {
        moving.abort();
    }
    let moves = moves.load(Ordering::Relaxed);
    ensure!(moves >= 10, "slots moved {moves} times");
    Ok(())
}
