//! The Redis ledger with sentinels: it uses the server that they name, follows it, and does without some of them.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use balancer_core::{JobRef, PlaceOutcome, PlaceRequest, Policy, SpotRatio};
use balancer_store::{Ledger, RedisLedger, RedisMode, RedisOptions, StoreError};
use balancer_tests::certificate::authority;
use balancer_tests::need;
use balancer_tests::placement::request;
use balancer_tests::redis::{RedisServer, ServerOptions, Servers};
use balancer_tests::redis_sentinel::SentinelSet;
use balancer_tests::wait;
use redis::cmd;

const JOB: JobRef<'_> = JobRef { namespace: "etl", app_id: "spark-1" };
const DAY: Duration = Duration::from_secs(86_400);
const TIMEOUT: Duration = Duration::from_secs(2);
/// What a call may take beyond its timeout on a busy machine.
const TOLERANCE: Duration = Duration::from_millis(1500);
/// Less than the second that a frozen sentinel would cost.
const AT_ONCE: Duration = Duration::from_millis(500);
/// How often the ledger asks the sentinels.
const INTERVAL: Duration = Duration::from_secs(5);
/// Far above what the sentinels take to replace a primary.
const RECOVERY: Duration = Duration::from_secs(60);

fn options(set: &SentinelSet) -> RedisOptions {
    set.ledger_options(TIMEOUT, DAY)
}

async fn connect(set: &SentinelSet) -> Result<RedisLedger> {
    Ok(RedisLedger::connect(&set.url(), options(set)).await?)
}

async fn place(ledger: &RedisLedger, executor: &str) -> Result<PlaceOutcome, StoreError> {
    let policy = Some(Policy { spot_ratio: SpotRatio::ONE, ..Policy::default() });
    let request = PlaceRequest { policy, ..request(executor) };
    let begin = Instant::now();
    let outcome = ledger.place(JOB, &request).await;
    assert!(begin.elapsed() < TIMEOUT + TOLERANCE, "a call took {:?}", begin.elapsed());
    outcome
}

async fn recovered(ledger: &RedisLedger) -> Result<()> {
    wait::until_true(RECOVERY, "the ledger to work again", async || {
        place(ledger, "probe").await?;
        Ok(true)
    })
    .await
}

async fn has_ledger(server: &RedisServer) -> Result<bool> {
    server.ask(cmd("EXISTS").arg("exec-count:{etl:spark-1}")).await
}

async fn wait_for(ledger: &RedisLedger, text: &str) -> Result<()> {
    wait::until_true(RECOVERY, text, async || {
        let error = place(ledger, "e1").await.err().map(|error| error.to_string()).unwrap_or_default();
        ensure!(error.contains(text), "{error}");
        Ok(true)
    })
    .await
}

#[tokio::test]
async fn the_ledger_follows_the_primary_when_it_is_killed() -> Result<()> {
    need!(Redis);
    let mut set = SentinelSet::start().await?;
    let ledger = connect(&set).await?;
    place(&ledger, "e1").await?;
    let first = set.primary().await?;
    assert!(has_ledger(&set.servers[first]).await?);
    set.servers[first].stop();
    // Calls fail at once until there is another one.
    wait::until_true(RECOVERY, "a call to fail", async || Ok(place(&ledger, "e2").await.is_err())).await?;
    let begin = Instant::now();
    let error = place(&ledger, "e2").await.err().context("there is no primary")?;
    assert!(begin.elapsed() < TOLERANCE && error.kind() == "no_connection", "{error}");
    recovered(&ledger).await?;
    let second = set.until_agreed().await?;
    assert!(second != first && has_ledger(&set.servers[second]).await?);
    // It comes back empty, as a primary, until the sentinels notice it.
    set.servers[first].start_again_empty().await?;
    for number in 0..100 {
        place(&ledger, &format!("e{number}")).await?;
    }
    assert_eq!(set.until_whole().await?, second);
    place(&ledger, "e100").await?;
    Ok(())
}

#[tokio::test]
async fn the_ledger_moves_when_the_primary_is_replaced_as_planned() -> Result<()> {
    need!(Redis);
    let set = SentinelSet::start().await?;
    let ledger = connect(&set).await?;
    for round in 0..2 {
        place(&ledger, "e1").await?;
        let now = set.fail_over().await?;
        // For a few seconds more the former one may take changes, which are lost.
        let executor = format!("new-{round}");
        let entry = cmd("HEXISTS").arg("exec-pods:{etl:spark-1}").arg(&executor).to_owned();
        wait::until_true(RECOVERY, "the ledger to use the new primary", async || {
            place(&ledger, &executor).await?;
            set.servers[now].ask::<bool>(&entry).await
        })
        .await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_frozen_primary_is_left_and_not_used_when_it_is_back() -> Result<()> {
    need!(Redis);
    let set = SentinelSet::start().await?;
    let ledger = connect(&set).await?;
    place(&ledger, "e1").await?;
    let first = set.primary().await?;
    set.servers[first].freeze()?;
    recovered(&ledger).await?;
    let second = wait::until(RECOVERY, "another primary", async || {
        Ok(Some(set.until_agreed().await?).filter(|primary| *primary != first))
    })
    .await?;
    place(&ledger, "e2").await?;
    set.servers[first].thaw()?;
    for number in 0..100 {
        place(&ledger, &format!("e{number}")).await?;
    }
    assert_eq!(set.until_whole().await?, second);
    Ok(())
}

#[tokio::test]
async fn sentinels_that_are_down_or_frozen_delay_nothing() -> Result<()> {
    need!(Redis);
    let mut set = SentinelSet::start().await?;
    let before = connect(&set).await?;
    set.sentinels[0].stop();
    set.sentinels[1].freeze()?;
    // Once of several times, because the machine may be busy.
    wait::until_true(RECOVERY, "a ledger that starts at once", async || {
        let begin = Instant::now();
        place(&connect(&set).await?, "e1").await?;
        Ok(begin.elapsed() < AT_ONCE)
    })
    .await?;
    let ledger = connect(&set).await?;
    // And without any, what is connected stays connected.
    set.sentinels[2].stop();
    let begin = Instant::now();
    while begin.elapsed() < INTERVAL + TOLERANCE {
        place(&ledger, "e2").await?;
        place(&before, "e3").await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_ledger_that_starts_without_sentinels_connects_when_they_are_up() -> Result<()> {
    need!(Redis);
    let mut set = SentinelSet::start().await?;
    for sentinel in &mut set.sentinels {
        sentinel.stop();
    }
    for mode in [RedisMode::Auto, RedisMode::Sentinel] {
        let begin = Instant::now();
        let ledger = RedisLedger::connect(&set.url(), RedisOptions { mode, ..options(&set) }).await?;
        assert!(begin.elapsed() < TIMEOUT + TOLERANCE);
        let error = place(&ledger, "e1").await.err().context("it works")?;
        assert_eq!(error.kind(), "no_connection", "{error}");
        for sentinel in &mut set.sentinels {
            sentinel.start_again_empty().await?;
        }
        recovered(&ledger).await?;
        for sentinel in &mut set.sentinels {
            sentinel.stop();
        }
    }
    Ok(())
}

#[tokio::test]
async fn mistakes_in_the_settings_are_errors_that_say_what_to_set() -> Result<()> {
    need!(Redis);
    let mut set = SentinelSet::start().await?;
    let server = RedisServer::start().await?;
    let port = set.sentinels[0].port();
    let named = options(&set);
    let plain = RedisOptions::new(TIMEOUT, DAY);
    let name = |name: &str| RedisOptions { sentinel_master: Some(name.to_owned()), ..plain.clone() };
    let with = |mode, options: &RedisOptions| RedisOptions { mode, ..options.clone() };
    let one_sentinel = format!("redis://127.0.0.1:{port}");
    for (url, options, text) in [
        (set.url(), plain.clone(), "is a sentinel; set REDIS_SENTINEL_MASTER".to_owned()),
        (one_sentinel.clone(), with(RedisMode::Single, &plain), "is a sentinel; set REDIS_MODE=sentinel".to_owned()),
        (one_sentinel.clone(), with(RedisMode::Cluster, &plain), "REDIS_MODE=cluster, but 127.0.0.1".to_owned()),
        (server.url(), named.clone(), format!("REDIS_SENTINEL_MASTER is set, but 127.0.0.1:{}", server.port())),
        (server.url(), with(RedisMode::Sentinel, &named), "REDIS_MODE=sentinel, but 127.0.0.1".to_owned()),
        (server.url(), with(RedisMode::Cluster, &plain), "set REDIS_MODE=single or auto".to_owned()),
    ] {
        let error = RedisLedger::connect(&url, options).await.err().with_context(|| text.clone())?.to_string();
        assert!(error.contains(&text), "{error}");
    }
    let unknown = RedisLedger::connect(&set.url(), name("nobody")).await?;
    wait_for(&unknown, "the sentinels watch no master named nobody; they watch ledger").await?;
    // Found only when they are up.
    for sentinel in &mut set.sentinels {
        sentinel.stop();
    }
    let late = RedisLedger::connect(&set.url(), plain).await?;
    for sentinel in &mut set.sentinels {
        sentinel.start_again_empty().await?;
    }
    wait_for(&late, "is a sentinel; set REDIS_SENTINEL_MASTER").await
}

#[tokio::test]
async fn sentinels_may_have_a_password_of_their_own_and_tls() -> Result<()> {
    need!(Redis);
    let set = SentinelSet::start_with(ServerOptions::tls()?, Some("watch-dog")).await?;
    // Whom the system trusts is a matter of the whole process.
    let trusting = tokio::process::Command::new(std::env::current_exe()?)
        .args(["--exact", "trusting_the_tests_authority", "--ignored", "--nocapture"])
        .env("SSL_CERT_FILE", &authority()?.path)
        .env("TEST_REDIS_URL", set.url())
        .env("TEST_REDIS_SENTINEL_MASTER", set.sentinel_master().context("no name")?)
        .env("TEST_REDIS_SENTINEL_PASSWORD_FILE", set.sentinel_password_file().context("no password")?)
        .kill_on_drop(true)
        .output();
    let output = tokio::time::timeout(Duration::from_secs(60), trusting).await.context("no end")??;
    let told = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && told.contains("1 passed"), "{told}{}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

#[tokio::test]
#[ignore = "run by sentinels_may_have_a_password_of_their_own_and_tls"]
async fn trusting_the_tests_authority() -> Result<()> {
    let url = std::env::var("TEST_REDIS_URL")?;
    let named = RedisOptions {
        sentinel_master: Some(std::env::var("TEST_REDIS_SENTINEL_MASTER")?),
        ..RedisOptions::new(Duration::from_secs(10), DAY)
    };
    let file = std::env::var("TEST_REDIS_SENTINEL_PASSWORD_FILE")?;
    let with_file = RedisOptions { sentinel_password_file: Some(Path::new(&file).to_owned()), ..named.clone() };
    for mode in [RedisMode::Auto, RedisMode::Sentinel] {
        let ledger = RedisLedger::connect(&url, RedisOptions { mode, ..with_file.clone() }).await?;
        recovered(&ledger).await?;
    }
    // The password of the servers is not that of the sentinels.
    let stranger = RedisLedger::connect(&url, named).await?;
    wait_for(&stranger, "WRONGPASS").await
}
