//! The Redis ledger keeps the contract in every version of Redis and Valkey that is in use, and finds out of each how its
//! servers work together. Redis 7.0 is what all other tests run on.

use std::time::Duration;

use anyhow::{Context, Result};
use balancer_store::{RedisLedger, contract};
use balancer_tests::redis::{RedisServer, ServerOptions, Servers, Version};
use balancer_tests::redis_cluster::RedisCluster;
use balancer_tests::redis_sentinel::SentinelSet;

const DAY: Duration = Duration::from_secs(86_400);

async fn connect(servers: &impl Servers) -> Result<RedisLedger> {
    let options = servers.ledger_options(Duration::from_secs(10), DAY);
    Ok(RedisLedger::connect(&servers.url(), options).await?)
}

fn options(version: Version) -> ServerOptions {
    ServerOptions { version, ..ServerOptions::default() }
}

/// A part of the contract, so that the ledger has been read and written.
async fn ensure_usable(servers: &impl Servers) -> Result<()> {
    let ledger = connect(servers).await?;
    contract::placing_twice_counts_once(&ledger).await?;
    contract::every_job_with_a_ledger_is_listed(&ledger).await?;
    contract::jobs_with_placements_are_taken_once(&ledger).await?;
    contract::a_heartbeat_returns_the_one_before(&ledger).await?;
    Ok(())
}

/// In a module for each version.
macro_rules! versions {
    ($($module:ident $version:ident)+) => {
        $(mod $module {
            use anyhow::Result;
            use balancer_store::RedisLedger;
            use balancer_tests::need;
            use tokio::sync::OnceCell;

            use super::*;

            async fn shared() -> Result<RedisLedger> {
                static SERVER: OnceCell<RedisServer> = OnceCell::const_new();
                let start = || RedisServer::start_with(options(Version::$version));
                connect(SERVER.get_or_try_init(start).await?).await
            }

            balancer_store::contract!({
                need!($version);
                shared().await?
            });

            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn a_cluster_is_recognised() -> Result<()> {
                need!($version);
                let cluster = RedisCluster::start_with(options(Version::$version)).await?;
                ensure_usable(&cluster).await.context("a cluster")
            }

            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn sentinels_are_recognised() -> Result<()> {
                need!($version);
                let set = SentinelSet::start_with(options(Version::$version), None).await?;
                ensure_usable(&set).await.context("sentinels")
            }
        })+
    };
}

versions! {
    redis_6_2 Redis6_2
    redis_8_0 Redis8_0
    valkey_8_0 Valkey8_0
    valkey_8_1 Valkey8_1
    valkey_9_1 Valkey9_1
}
