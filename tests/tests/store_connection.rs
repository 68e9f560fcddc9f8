//! The Redis ledger when its server is not there, does not answer, or refuses: every call ends in time,
//! and all is well again by itself once the server is.

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use balancer_core::{Capacity, JobRef, JobState, LiveExecutor, PlaceOutcome, PlaceRequest, Policy, SpotRatio, Term};
use balancer_store::{Ledger, RedisLedger, RedisOptions, StoreError};
use balancer_tests::certificate::authority;
use balancer_tests::helm::repository;
use balancer_tests::need;
use balancer_tests::placement::request;
use balancer_tests::redis::RedisServer;
use balancer_tests::wait;
use redis::{Cmd, FromRedisValue, cmd};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

const JOB: JobRef<'_> = JobRef { namespace: "etl", app_id: "spark-1" };
const DAY: Duration = Duration::from_secs(86_400);
/// What a call may take beyond its timeout on a busy machine: less than the shortest timeout of those that are to fail at
/// once.
const TOLERANCE: Duration = Duration::from_secs(2);
/// Far above what it takes to connect again.
const RECOVERY: Duration = Duration::from_secs(20);

async fn connect(url: &str, timeout: Duration) -> Result<RedisLedger> {
    Ok(RedisLedger::connect(url, RedisOptions::new(timeout, DAY)).await?)
}

async fn place(ledger: &RedisLedger, executor: &str) -> Result<PlaceOutcome, StoreError> {
    let policy = Some(Policy { spot_ratio: SpotRatio::ONE, ..Policy::default() });
    ledger.place(JOB, &PlaceRequest { policy, ..request(executor) }).await
}

async fn ask<T: FromRedisValue>(server: &RedisServer, command: &Cmd) -> Result<T> {
    Ok(command.query_async(&mut server.connection().await?).await?)
}

async fn recovered(ledger: &RedisLedger) -> Result<()> {
    wait::until_true(RECOVERY, "the ledger to work again", async || {
        place(ledger, "probe").await?;
        Ok(true)
    })
    .await
}

/// Waits for a call to fail so.
async fn fails_as(ledger: &RedisLedger, kind: &str) -> Result<StoreError> {
    wait::until(RECOVERY, kind, async || Ok(place(ledger, "probe").await.err().filter(|error| error.kind() == kind)))
        .await
}

/// Calls that are to fail at once, with a timeout that would show.
async fn fails_fast(ledger: &RedisLedger) -> Result<()> {
    for _ in 0..20 {
        let begin = Instant::now();
        let error = place(ledger, "probe").await.err().context("it works")?;
        ensure!(error.kind() == "no_connection", "{error}");
        ensure!(begin.elapsed() < TOLERANCE, "failed after {:?} only", begin.elapsed());
    }
    Ok(())
}

#[tokio::test]
async fn it_starts_without_a_server_and_calls_fail_at_once_until_one_is_up() -> Result<()> {
    need!(Redis);
    let mut server = RedisServer::start().await?;
    server.stop();
    let begin = Instant::now();
    let ledger = connect(&server.url(), Duration::from_secs(30)).await?;
    assert!(begin.elapsed() < Duration::from_secs(30));
    fails_fast(&ledger).await?;
    let told = fails_as(&ledger, "no_connection").await?.to_string();
    assert!(told.contains(&server.port().to_string()), "{told}");
    server.start_again_empty().await?;
    recovered(&ledger).await
}

#[tokio::test]
async fn calls_fail_at_once_while_the_server_is_stopped_and_work_when_it_is_back_empty() -> Result<()> {
    need!(Redis);
    let mut server = RedisServer::start().await?;
    let ledger = connect(&server.url(), Duration::from_secs(30)).await?;
    for _ in 0..3 {
        place(&ledger, "e1").await?;
        server.stop();
        fails_as(&ledger, "no_connection").await?;
        fails_fast(&ledger).await?;
        server.start_again_empty().await?;
        recovered(&ledger).await?;
        let shown = ledger.get(JOB).await?.context("nothing was written")?;
        assert!(!shown.entries().contains_key("e1"));
    }
    Ok(())
}

#[tokio::test]
async fn an_idle_ledger_reconnects_before_the_next_call() -> Result<()> {
    need!(Redis);
    let mut server = RedisServer::start().await?;
    let ledger = connect(&server.url(), Duration::from_secs(5)).await?;
    server.start_again_empty().await?;
    wait::until_true(RECOVERY, "the ledger's connection", async || {
        let clients: String = ask(&server, cmd("CLIENT").arg("LIST")).await?;
        // The one that asks is there too, and one that is there may still be introducing itself.
        Ok(clients.lines().count() >= 2 && format!("{ledger:?}").contains("Ok(\"connected\")"))
    })
    .await?;
    place(&ledger, "e1").await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn while_the_server_is_frozen_calls_end_in_time_and_soon_at_once() -> Result<()> {
    need!(Redis);
    let timeout = Duration::from_millis(300);
    let server = RedisServer::start().await?;
    let ledger = Arc::new(connect(&server.url(), timeout).await?);
    place(&ledger, "e0").await?;
    server.freeze()?;

    let mut calls = JoinSet::new();
    for number in 0..200 {
        let ledger = Arc::clone(&ledger);
        calls.spawn(async move {
            let begin = Instant::now();
            // In its turn, so that some come while others wait.
            tokio::time::sleep(Duration::from_millis(number)).await;
            let begin = begin + Duration::from_millis(number);
            let answer = place(&ledger, &format!("e{number}")).await;
            (answer.err().map(|error| error.kind()), begin.elapsed())
        });
    }
    for (error, took) in calls.join_all().await {
        assert!(matches!(error, Some("timed_out" | "no_connection")), "{error:?}");
        assert!(took < timeout + TOLERANCE, "a call took {took:?}");
    }
    fails_as(&ledger, "no_connection").await?;
    fails_fast(&ledger).await?;

    server.thaw()?;
    recovered(&ledger).await?;
    // Those that timed out may have happened: asking again does not count them twice.
    for number in 0..200 {
        place(&ledger, &format!("e{number}")).await?;
    }
    let shown = ledger.get(JOB).await?.context("nothing was written")?;
    assert_eq!((shown.counts().total(), shown.entries().len()), (201, 201));
    Ok(())
}

#[tokio::test]
async fn a_frozen_server_does_not_delay_the_start() -> Result<()> {
    need!(Redis);
    let server = RedisServer::start().await?;
    server.freeze()?;
    let begin = Instant::now();
    let ledger = connect(&server.url(), Duration::from_millis(200)).await?;
    assert!(begin.elapsed() < Duration::from_millis(200) + TOLERANCE, "started after {:?}", begin.elapsed());
    fails_fast(&ledger).await?;
    server.thaw()?;
    recovered(&ledger).await
}

/// A way to a server on which connections can go dead without a word, or lead to another server.
struct Path {
    port: u16,
    to: Arc<AtomicU16>,
    dead: watch::Sender<()>,
}

impl Path {
    async fn to(server: &RedisServer) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let path = Self {
            port: listener.local_addr()?.port(),
            to: Arc::new(AtomicU16::new(server.port())),
            dead: watch::Sender::new(()),
        };
        let (to, dead) = (Arc::clone(&path.to), path.dead.clone());
        tokio::spawn(async move {
            while let Ok((mut here, _)) = listener.accept().await {
                let (to, mut dead) = (to.load(Ordering::Relaxed), dead.subscribe());
                tokio::spawn(async move {
                    let mut there = TcpStream::connect(("127.0.0.1", to)).await?;
                    tokio::select! {
                        done = tokio::io::copy_bidirectional(&mut here, &mut there) => drop(done),
                        // Both stay open, and nothing goes through any more.
                        _ = dead.changed() => std::future::pending().await,
                    }
                    Ok::<_, std::io::Error>(())
                });
            }
        });
        Ok(path)
    }

    fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }
}

#[tokio::test]
async fn a_silently_dead_connection_is_replaced() -> Result<()> {
    need!(Redis);
    let server = RedisServer::start().await?;
    let path = Path::to(&server).await?;
    let timeout = Duration::from_millis(300);
    let ledger = connect(&path.url(), timeout).await?;
    place(&ledger, "e1").await?;
    path.dead.send_replace(());
    let begin = Instant::now();
    assert_eq!(place(&ledger, "e2").await.err().map(|error| error.kind()), Some("timed_out"));
    assert!(begin.elapsed() < timeout + TOLERANCE);
    recovered(&ledger).await
}

#[tokio::test]
async fn after_a_failover_it_connects_to_the_new_master() -> Result<()> {
    need!(Redis);
    let (old, new) = (RedisServer::start().await?, RedisServer::start().await?);
    let path = Path::to(&old).await?;
    let ledger = connect(&path.url(), Duration::from_secs(5)).await?;
    place(&ledger, "e1").await?;
    // The name leads to the new master by now, but the connection still leads to the old one.
    path.to.store(new.port(), Ordering::Relaxed);
    ask::<()>(&old, cmd("REPLICAOF").arg("127.0.0.1").arg(new.port())).await?;
    let refused = place(&ledger, "e2").await.err().context("a replica was written to")?;
    assert!(refused.kind() == "refused" && refused.to_string().contains("READONLY"), "{refused}");
    recovered(&ledger).await?;
    assert_eq!(ask::<u64>(&new, cmd("EXISTS").arg("exec-count:{etl:spark-1}")).await?, 1);
    Ok(())
}

/// What the documentation of `RedisLedger` says that an ACL user needs: key patterns and commands.
fn documented_rights() -> Result<(Vec<&'static str>, Vec<&'static str>)> {
    let source = include_str!("../../crates/balancer-store/src/redis.rs");
    let (_, sentence) = source.split_once("/// An ACL user needs").context("no such sentence")?;
    let (sentence, _) = sentence.split_once(".\n").context("it does not end")?;
    let (keys, commands) = sentence.split_once("commands").context("it tells no commands")?;
    let quoted = |text: &'static str| text.split('`').skip(1).step_by(2).collect();
    Ok((quoted(keys), quoted(commands)))
}

#[tokio::test]
async fn the_documented_rights_are_enough_and_each_is_used() -> Result<()> {
    need!(Redis);
    let server = RedisServer::start().await?;
    let (keys, commands) = documented_rights()?;
    let mut rights = cmd("ACL");
    rights.arg("SETUSER").arg("balancer").arg(&["on", ">s3cret&p@ss", "resetkeys", "-@all"]);
    rights.arg(keys.iter().map(|key| format!("~{key}")).collect::<Vec<_>>());
    rights.arg(commands.iter().map(|command| format!("+{command}")).collect::<Vec<_>>());
    ask::<()>(&server, &rights).await?;
    let url = format!("redis://balancer:s3cret%26p%40ss@127.0.0.1:{}", server.port());
    let ledger = connect(&url, Duration::from_secs(10)).await?;
    for _ in 0..2 {
        place(&ledger, "e1").await?;
        let live =
            |executor| LiveExecutor { key: executor, uid: "u", capacity: Some(Capacity::Spot), states_ratio: false };
        let live = [live("e1"), live("e2")];
        let seen = JobState { live: &live, ..JobState::default() };
        ledger.reconcile(JOB, &seen, Duration::ZERO, Term(1)).await?;
        ledger
            .learn(
                JOB,
                Policy { on_demand_base: 1, ..Policy { spot_ratio: SpotRatio::ZERO, ..Policy::default() } },
                None,
                true,
            )
            .await?;
        ledger.release(JOB, "e2", Some("u"), None).await?;
        assert_eq!(ledger.get(JOB).await?.context("nothing was written")?.counts().total(), 1);
        assert_eq!(ledger.record(JOB).await?.context("nothing was written")?.counts.total(), 1);
        assert_eq!(ledger.list_jobs(None).await?.jobs, [JOB.to_job_id()]);
        ledger.heartbeat(1).await?;
        wait::until_true(Duration::from_secs(10), "a note of the placement", async || {
            Ok(!ledger.take_placed().await?.is_empty())
        })
        .await?;

        // Both ways in which a ledger ends.
        let other = JobRef { app_id: "spark-2", ..JOB };
        let required = PlaceRequest { required: Some(Capacity::Spot), ..request("e1") };
        ledger.place(other, &required).await?;
        ledger.release(other, "e1", None, None).await?;
        ledger.place(other, &required).await?;
        let ended = JobState { gone: &["e1"], ..JobState::default() };
        ledger.reconcile(other, &ended, Duration::ZERO, Term(1)).await?;
        assert_eq!(ledger.get(other).await?, None);

        // Then the entries are counted anew.
        ask::<()>(&server, cmd("HINCRBY").arg("exec-count:{etl:spark-1}").arg("spot").arg(1)).await?;
    }
    let statistics: String = ask(&server, cmd("INFO").arg("commandstats")).await?;
    for command in commands {
        assert!(statistics.contains(&format!("cmdstat_{command}:calls=")), "{command} is not needed: {statistics}");
    }
    Ok(())
}

#[tokio::test]
async fn the_rights_in_the_guide_are_the_documented_ones() -> Result<()> {
    need!(Redis);
    let server = RedisServer::start().await?;
    let guide = std::fs::read_to_string(repository("docs/redis.md"))?;
    let granted = guide.lines().find(|line| line.starts_with("~exec-* ")).context("no rights in the guide")?;
    let granted: Vec<_> = granted.split(' ').filter_map(|right| right.strip_prefix('+')).collect();
    let hashes: Vec<String> = ask(&server, cmd("ACL").arg("CAT").arg("hash")).await?;
    let (keys, commands) = documented_rights()?;
    assert!(keys.iter().all(|key| key.starts_with("exec-")), "{keys:?}");
    for command in &commands {
        let is_granted = granted.contains(command) || hashes.iter().any(|hash| hash == command);
        assert!(is_granted, "the guide does not grant {command}");
    }
    // In a cluster, with sentinels, to find out which of them it is, and for the version before.
    let elsewhere = ["cluster|slots", "cluster|info", "asking", "role", "info", "del"];
    let is_needed = |right: &&str| right.starts_with('@') || commands.contains(right) || elsewhere.contains(right);
    assert!(granted.iter().all(is_needed), "the guide grants more than {commands:?}");
    Ok(())
}

#[tokio::test]
async fn a_refused_user_is_reported_without_the_password() -> Result<()> {
    need!(Redis);
    let server = RedisServer::start().await?;
    ask::<()>(&server, cmd("CONFIG").arg("SET").arg("requirepass").arg("right-one")).await?;
    let port = server.port();
    for (url, code) in [
        (format!("redis://:s3cret@127.0.0.1:{port}"), "WRONGPASS"),
        (format!("redis://nobody:s3cret@127.0.0.1:{port}"), "WRONGPASS"),
        (format!("redis://127.0.0.1:{port}"), "NOAUTH"),
        (format!("redis://:right-one@127.0.0.1:{port}/99"), "ERR"),
    ] {
        let ledger = connect(&url, Duration::from_secs(5)).await?;
        let error = place(&ledger, "e1").await.err().context("it was let in")?;
        assert!(matches!(&error, StoreError::Refused { code: told, .. } if told == code), "{error}");
        let told = format!("{error} {error:?} {ledger:?}");
        assert!(!told.contains("s3cret") && !told.contains("right-one"), "{told}");
    }
    let ledger = connect(&format!("redis://:right-one@127.0.0.1:{port}/3"), Duration::from_secs(5)).await?;
    place(&ledger, "e1").await?;
    let told = format!("{ledger:?}");
    assert!(!told.contains("right-one") && told.contains(&port.to_string()), "{told}");
    Ok(())
}

#[tokio::test]
async fn the_database_of_the_url_is_used() -> Result<()> {
    need!(Redis);
    let server = RedisServer::start().await?;
    let ledger = connect(&format!("{}/3", server.url()), Duration::from_secs(5)).await?;
    place(&ledger, "e1").await?;
    let keyspace: String = ask(&server, cmd("INFO").arg("keyspace")).await?;
    let databases: Vec<&str> = keyspace.lines().filter_map(|line| line.split_once(':').map(|(name, _)| name)).collect();
    assert_eq!(databases, ["db3"]);
    Ok(())
}

#[tokio::test]
async fn over_tls_it_trusts_only_the_cas_of_the_system() -> Result<()> {
    need!(Redis);
    let server = RedisServer::start_tls().await?;
    let stranger = connect(&server.url(), Duration::from_secs(5)).await?;
    let error = fails_as(&stranger, "no_connection").await?.to_string();
    assert!(error.contains("certificate") && !error.contains("correct-horse"), "{error}");

    // Whom the system trusts is a matter of the whole process.
    let trusting = tokio::process::Command::new(std::env::current_exe()?)
        .args(["--exact", "trusting_the_tests_authority", "--ignored", "--nocapture"])
        .env("SSL_CERT_FILE", &authority()?.path)
        .env("TEST_REDIS_URL", server.url())
        .kill_on_drop(true)
        .output();
    let output = tokio::time::timeout(Duration::from_secs(60), trusting).await.context("no end")??;
    let told = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && told.contains("1 passed"), "{told}");
    Ok(())
}

#[tokio::test]
#[ignore = "run by over_tls_it_trusts_only_the_cas_of_the_system"]
async fn trusting_the_tests_authority() -> Result<()> {
    let ledger = connect(&std::env::var("TEST_REDIS_URL")?, Duration::from_secs(10)).await?;
    place(&ledger, "e1").await?;
    assert_eq!(ledger.get(JOB).await?.context("nothing was written")?.counts().total(), 1);
    Ok(())
}
