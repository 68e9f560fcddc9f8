//! A flood of job ids in one namespace, against the release binary with a real Redis: what it costs the store, the
//! webhook and the jobs of everybody else.

#![allow(clippy::indexing_slicing, reason = "JSON is built by index; a panic here fails the test, as it should")]

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use balancer_tests::need;
use balancer_tests::raw::{Connection, Protocol};
use balancer_tests::redis::RedisServer;
use balancer_tests::reviews::{creation, fixture, patch};
use balancer_tests::webhook::{Webhook, WebhookOptions};
use redis::AsyncCommands;
use serde_json::{Value, json};

/// Of the creations in the flood.
const JOBS: u64 = 1_500;
const LIMIT: u64 = 60;

/// A review of the same pod in another namespace.
fn in_namespace(mut review: Value, namespace: &str) -> Value {
    review["request"]["namespace"] = namespace.into();
    review
}

/// The creation of a job's driver, which asks for 0.7.
fn driver(namespace: &str, job: &str) -> Result<Value> {
    let mut review = in_namespace(fixture("k8s-1.36-spark-3.5-create-driver")?, namespace);
    // The executors of the fixture name another driver as their owner, whose job would be another one.
    let owner =
        fixture("k8s-1.36-spark-3.5-create-executor")?["request"]["object"]["metadata"]["ownerReferences"][0]["name"]
            .take();
    review["request"]["object"]["metadata"]["name"] = owner;
    review["request"]["object"]["metadata"]["labels"][balancer_tests::pods::JOB_ID_LABEL] = job.into();
    review["request"]["object"]["metadata"]["annotations"] = json!({"workload/spot-ratio": "0.7"});
    Ok(review)
}

/// The job's executors on spot and on-demand, by the ledger.
async fn ledger(redis: &RedisServer, namespace: &str, job: &str) -> Result<(Option<u64>, Option<u64>)> {
    let key = format!("exec-count:{{{namespace}:{job}}}");
    Ok(redis.connection().await?.hmget(key, &["spot", "on-demand"]).await?)
}

#[tokio::test]
async fn a_flood_of_jobs_fills_neither_store_nor_memory_and_costs_other_jobs_nothing() -> Result<()> {
    need!(Redis, Webhook);
    let redis = RedisServer::start().await?;
    let options = WebhookOptions::default().env("SPOT_PREFERENCE", "STRICT").without_cluster()?;
    let options = options.env("MAX_NEW_JOBS_PER_MINUTE", LIMIT.to_string()).redis(&redis)?;
    let webhook = Webhook::start(options).await?;
    let mut connection = Connection::open(webhook.port, Protocol::Http2).await?;
    let mut send = async |review: &Value| patch(review, &connection.post("/mutate", review).await?);

    let begun = Instant::now();
    send(&driver("hostile", "known")?).await?;
    for id in 1..=5 {
        send(&in_namespace(creation("known", id)?, "hostile")).await?;
    }
    let before = webhook.process().resident_mb()?;
    for number in 0..JOBS {
        let mut review = in_namespace(creation(&format!("new-{number}"), 1)?, "hostile");
        // Its own ratio, so that nothing asks for its driver.
        review["request"]["object"]["metadata"]["annotations"] = json!({"workload/spot-ratio": "1"});
        let patch = send(&review).await?;
        ensure!(!patch.is_empty(), "executor {number} was not placed");
    }
    // One job each second.
    let allowed = LIMIT + begun.elapsed().as_secs() + 1;
    let keys: u64 = redis::cmd("DBSIZE").query_async(&mut redis.connection().await?).await?;
    ensure!(keys <= 2 * allowed, "{keys} keys, more than two for each of {allowed} jobs");
    let grown = webhook.process().resident_mb()? - before;
    ensure!(grown < 8.0, "the flood cost {grown} MB");
    let metrics = webhook.metrics().await?;
    let limited = metrics.sum("spot_balancer_placements_total", &[("source", "new_job_limit")]).context("no metric")?;
    #[expect(clippy::cast_precision_loss, reason = "a few thousand")]
    let least = (JOBS - allowed) as f64;
    ensure!(limited >= least, "{limited} placements without a ledger, of {least} or more");
    assert_eq!(metrics.sum("spot_balancer_store_errors_total", &[]), Some(0.0));
    let lines = webhook.process().log()?.matches("too many new jobs in this namespace").count() as u64;
    ensure!((1..=1 + begun.elapsed().as_secs() / 60).contains(&lines), "{lines} log lines about the limit");

    // A job that had a ledger before, and one in another namespace, which begins now.
    for id in 6..=10 {
        send(&in_namespace(creation("known", id)?, "hostile")).await?;
    }
    assert_eq!(ledger(&redis, "hostile", "known").await?, (Some(7), Some(3)));
    send(&driver("etl", "other")?).await?;
    for id in 1..=10 {
        send(&in_namespace(creation("other", id)?, "etl")).await?;
    }
    assert_eq!(ledger(&redis, "etl", "other").await?, (Some(7), Some(3)));
    Ok(())
}
