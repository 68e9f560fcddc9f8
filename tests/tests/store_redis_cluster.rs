//! The Redis ledger keeps the contract in a cluster, also while keys move from one primary to another, and while a primary
//! fails only its own jobs wait for its replica.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use balancer_core::{JobRef, PlaceOutcome, PlaceRequest, Policy, SpotRatio};
use balancer_store::{Ledger, RedisLedger, StoreError};
use balancer_tests::need;
use balancer_tests::placement::request;
use balancer_tests::redis::{ServerOptions, Servers};
use balancer_tests::redis_cluster::{RedisCluster, slot};
use balancer_tests::wait::{SOON, until_true};
use tokio::sync::OnceCell;

const DAY: Duration = Duration::from_secs(86_400);
/// Of one call, when a primary fails.
const LIMIT: Duration = Duration::from_secs(2);
/// What a call may take beyond its limit on a busy machine.
const TOLERANCE: Duration = Duration::from_millis(500);
/// So many calls for each job of a primary that runs while another one fails.
const CALLS: usize = 100;

async fn connect(cluster: &RedisCluster) -> Result<RedisLedger> {
    connect_with(cluster, Duration::from_secs(10)).await
}

async fn connect_with(cluster: &RedisCluster, limit: Duration) -> Result<RedisLedger> {
    Ok(RedisLedger::connect(&cluster.url(), cluster.ledger_options(limit, DAY)).await?)
}

/// Places an executor of a job within the limit of a call.
async fn place(ledger: &RedisLedger, app_id: &str, executor: &str) -> Result<PlaceOutcome, StoreError> {
    let policy = Some(Policy { spot_ratio: SpotRatio::ONE, ..Policy::default() });
    let request = PlaceRequest { policy, ..request(executor) };
    let begun = Instant::now();
    let outcome = ledger.place(JobRef { namespace: "etl", app_id }, &request).await;
    assert!(begun.elapsed() < LIMIT + TOLERANCE, "a call took {:?}", begun.elapsed());
    outcome
}

fn slot_of_job(app_id: &str) -> u16 {
    slot(&format!("exec-count:{{etl:{app_id}}}"))
}

/// A job of each primary, and the primary.
async fn job_of_each(cluster: &RedisCluster) -> Result<Vec<(usize, String)>> {
    let mut jobs: Vec<(usize, String)> = Vec::new();
    let primaries = cluster.primaries().await.len();
    for number in 0..1_000 {
        let app_id = format!("spark-{number}");
        let primary = cluster.primary_of_slot(slot_of_job(&app_id)).await?;
        if !jobs.iter().any(|(of, _)| *of == primary) {
            jobs.push((primary, app_id));
        }
        if jobs.len() == primaries {
            return Ok(jobs);
        }
    }
    anyhow::bail!("only {} of {primaries} primaries have jobs", jobs.len())
}

/// While a primary fails, the jobs of the others are placed as before, its own fail within their limit, and work again as
/// soon as its replica has replaced it.
async fn outlast(fail: impl AsyncFnOnce(&mut RedisCluster, usize) -> Result<()>) -> Result<()> {
    // Otherwise all nodes refuse calls from when they agree that one has failed until its replica is elected.
    let arguments = ["--cluster-require-full-coverage", "no"].map(str::to_owned).to_vec();
    let mut cluster = RedisCluster::start_with(ServerOptions { arguments, ..ServerOptions::default() }).await?;
    let jobs = job_of_each(&cluster).await?;
    let ledger = connect_with(&cluster, LIMIT).await?;
    for (_, job) in &jobs {
        place(&ledger, job, "e0").await?;
    }
    let ((failing, failing_job), others) = jobs.split_first().context("no primary")?;
    fail(&mut cluster, *failing).await?;

    let others = async {
        for number in 0..CALLS {
            for (primary, job) in others {
                let outcome = place(&ledger, job, &format!("e{number}")).await;
                outcome.with_context(|| format!("call {number} for a job on node {primary}"))?;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        anyhow::Ok(())
    };
    let of_failing = async {
        let error = place(&ledger, failing_job, "e1").await.err().context("its primary has failed")?;
        ensure!(["timed_out", "no_connection"].contains(&error.kind()), "{error}");
        until_true(SOON, "the replica to be used", async || {
            place(&ledger, failing_job, "e2").await?;
            Ok(true)
        })
        .await
    };
    tokio::try_join!(others, of_failing)?;
    ensure!(
        cluster.primary_of_slot(slot_of_job(failing_job)).await? != *failing,
        "the failed node is still the primary"
    );
    Ok(())
}

#[tokio::test]
async fn a_frozen_primary_affects_its_own_jobs_only_until_its_replica_has_replaced_it() -> Result<()> {
    need!(Redis);
    outlast(async |cluster, node| cluster.nodes[node].freeze()).await
}

#[tokio::test]
async fn a_killed_primary_affects_its_own_jobs_only_until_its_replica_has_replaced_it() -> Result<()> {
    need!(Redis);
    outlast(async |cluster, node| {
        cluster.nodes[node].stop();
        Ok(())
    })
    .await
}

#[tokio::test]
async fn a_slot_is_followed_to_a_new_node_while_its_keys_move() -> Result<()> {
    need!(Redis);
    let mut cluster = RedisCluster::start().await?;
    let ledger = connect_with(&cluster, LIMIT).await?;
    let job = "spark-1";
    place(&ledger, job, "e0").await?;
    let new = cluster.add_primary().await?;
    let migration = cluster.open_slot(slot_of_job(job), new).await?;
    while cluster.move_key(migration).await? {}
    // No map has the new node yet.
    until_true(SOON, "the job on the new node", async || {
        place(&ledger, job, "e1").await?;
        Ok(true)
    })
    .await?;
    for number in 2..20 {
        place(&ledger, job, &format!("e{number}")).await?;
    }
    cluster.close_slot(migration).await?;
    place(&ledger, job, "e20").await?;
    let entries: usize = cluster.nodes[new].ask(redis::cmd("HLEN").arg(format!("exec-pods:{{etl:{job}}}"))).await?;
    ensure!(entries == 21, "{entries} entries");
    Ok(())
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
