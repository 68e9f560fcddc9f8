//! The Redis ledger keeps the contract in servers that sentinels watch.

use std::time::Duration;

use anyhow::Result;
use balancer_store::RedisLedger;
use balancer_tests::need;
use balancer_tests::redis::Servers;
use balancer_tests::redis_sentinel::SentinelSet;
use tokio::sync::OnceCell;

const DAY: Duration = Duration::from_secs(86_400);

/// Servers for the contract's tests together: each has a job of its own.
async fn shared() -> Result<RedisLedger> {
    static SET: OnceCell<SentinelSet> = OnceCell::const_new();
    let set = SET.get_or_try_init(SentinelSet::start).await?;
    let options = set.ledger_options(Duration::from_secs(10), DAY);
    Ok(RedisLedger::connect(&set.url(), options).await?)
}

balancer_store::contract!({
    need!(Redis);
    shared().await?
});
