//! Whether the settings fit the servers is found out of every version, also for a user with no rights at all.

use std::time::Duration;

use anyhow::{Context, Result};
use balancer_store::{RedisLedger, RedisMode, RedisOptions};
use balancer_tests::need;
use balancer_tests::port::free_for_node;
use balancer_tests::redis::{RedisServer, ServerOptions, Version};
use redis::cmd;

/// A server that wants a password, and the URL with a user that may send no command.
async fn server(version: Version, arguments: &[&str]) -> Result<(RedisServer, String)> {
    let arguments = arguments.iter().map(|argument| (*argument).to_owned()).collect();
    let options = ServerOptions { version, arguments, password: Some("correct-horse"), ..ServerOptions::default() };
    let server = RedisServer::start_on(free_for_node()?, options).await?;
    server.ask::<()>(cmd("ACL").arg("SETUSER").arg("nobody").arg(&["on", ">s3cret", "-@all"])).await?;
    let url = format!("redis://nobody:s3cret@127.0.0.1:{}", server.port());
    Ok((server, url))
}

async fn mistake(url: &str, mode: RedisMode) -> Result<String> {
    let options = RedisOptions {
        mode,
        sentinel_master: (mode == RedisMode::Sentinel).then(|| "ledger".to_owned()),
        ..RedisOptions::new(Duration::from_secs(10), Duration::from_secs(60))
    };
    Ok(RedisLedger::connect(url, options).await.err().with_context(|| format!("{mode:?} was accepted"))?.to_string())
}

async fn check(version: Version) -> Result<()> {
    let (single, url) = server(version, &[]).await?;
    for mode in [RedisMode::Cluster, RedisMode::Sentinel] {
        let error = mistake(&url, mode).await?;
        let expected = format!("127.0.0.1:{} is neither a node of a cluster nor a sentinel; set", single.port());
        assert!(error.contains(&expected), "{version:?}: {error}");
    }
    let (node, url) = server(version, &["--cluster-enabled", "yes"]).await?;
    for mode in [RedisMode::Single, RedisMode::Sentinel] {
        let error = mistake(&url, mode).await?;
        let expected = format!("127.0.0.1:{} is a node of a cluster; set REDIS_MODE=cluster or auto", node.port());
        assert!(error.ends_with(&expected), "{version:?}: {error}");
    }
    Ok(())
}

/// A test for each version.
macro_rules! versions {
    ($($name:ident $part:ident $version:ident)+) => {
        $(#[tokio::test]
        async fn $name() -> Result<()> {
            need!($part);
            check(Version::$version).await
        })+
    };
}

versions! {
    a_wrong_mode_is_found_with_redis_6_2 Redis6_2 Redis6_2
    a_wrong_mode_is_found_with_redis_7_0 Redis Redis7_0
    a_wrong_mode_is_found_with_redis_8_0 Redis8_0 Redis8_0
    a_wrong_mode_is_found_with_valkey_8_0 Valkey8_0 Valkey8_0
    a_wrong_mode_is_found_with_valkey_8_1 Valkey8_1 Valkey8_1
    a_wrong_mode_is_found_with_valkey_9_1 Valkey9_1 Valkey9_1
}
