//! The release binary is told to end in the middle of its work, and no admission is lost by it.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use balancer_tests::frames::{ACK, GOAWAY, PING, frame, opening};
use balancer_tests::need;
use balancer_tests::process::Signal;
use balancer_tests::raw::{Connection, Protocol, Unanswered, tls};
use balancer_tests::redis::RedisServer;
use balancer_tests::reviews::{creation, patch};
use balancer_tests::scenario::{Scenario, strict};
use balancer_tests::wait::{SOON, until_true};
use balancer_tests::webhook::Webhook;
use futures::future::try_join_all;
use futures::{StreamExt, TryStreamExt};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::Mutex;
use tokio::time::{sleep, timeout};

/// Each of these tests loads the machine, or counts on it to be quick.
static MACHINE: Mutex<()> = Mutex::const_new(());
/// The grace that a cluster gives a pod to end.
const GRACE: Duration = Duration::from_secs(30);

/// What one client got done.
#[derive(Debug, Default)]
struct Done {
    /// Answered before the server was told to end.
    before: u64,
    /// Answered since.
    after: u64,
    connections: u64,
}

/// Posts creations without a pause over one connection after the other, `streams` at a time, until
/// the server takes no more connections. An answer that is lost is an error.
async fn post_until_refused(
    port: u16,
    protocol: Protocol,
    streams: usize,
    next: &AtomicU64,
    leaving: &AtomicBool,
) -> Result<Done> {
    let mut done = Done::default();
    loop {
        let connection = match Connection::open(port, protocol).await {
            Ok(connection) => connection,
            Err(_) if leaving.load(Ordering::SeqCst) => return Ok(done),
            Err(error) => return Err(error.context("a connection was refused too early")),
        };
        done.connections += 1;
        let mut handles = Vec::new();
        handles.extend((1..streams).filter_map(|_| connection.another_stream()));
        handles.push(connection);
        let posting = handles.into_iter().map(async |mut connection| {
            let (mut before, mut after) = (0, 0);
            loop {
                let review = creation("leaving", next.fetch_add(1, Ordering::Relaxed))?;
                match connection.post("/mutate?timeout=10s", &review).await {
                    Ok(answer) => {
                        ensure!(!patch(&review, &answer)?.is_empty(), "not placed: {answer:?}");
                        *if leaving.load(Ordering::SeqCst) { &mut after } else { &mut before } += 1;
                    }
                    Err(Unanswered::Refused(_)) => return Ok((before, after)),
                    Err(lost) => bail!("{protocol:?}: {lost}"),
                }
            }
        });
        for (before, after) in try_join_all(posting).await? {
            done.before += before;
            done.after += after;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_webhook_terminated_under_load_loses_no_answer() -> Result<()> {
    need!(Redis, Webhook);
    let _alone = MACHINE.lock().await;
    let redis = RedisServer::start().await?;
    let mut webhook = Webhook::start(strict().redis(&redis)?.without_cluster()?).await?;
    let (port, next, leaving) = (webhook.port, AtomicU64::new(0), AtomicBool::new(false));
    let clients = (0..8).map(|_| (Protocol::Http1, 1)).chain((0..2).map(|_| (Protocol::Http2, 6)));
    let posting =
        try_join_all(clients.map(|(protocol, streams)| post_until_refused(port, protocol, streams, &next, &leaving)));
    let ending = async {
        until_true(SOON, "the load to be there", async || Ok(next.load(Ordering::Relaxed) > 1000)).await?;
        // Every client waits for an answer when the signal comes.
        redis.freeze()?;
        let mut last = 0;
        until_true(SOON, "all clients to wait", async || {
            Ok(std::mem::replace(&mut last, next.load(Ordering::Relaxed)) == last)
        })
        .await?;
        leaving.store(true, Ordering::SeqCst);
        webhook.process().signal(Signal::TERM)?;
        redis.thaw()?;
        webhook.ended(GRACE).await
    };
    let (done, status) = tokio::try_join!(posting, ending)?;
    ensure!(status.success(), "it ended with {status}");
    for (client, done) in done.iter().enumerate() {
        ensure!(done.before > 0 && done.after > 0 && done.connections > 1, "client {client}: {done:?}");
    }
    let log = webhook.process().log()?;
    ensure!(!log.contains("did not finish in time") && !log.contains("a bug"), "{log}");
    Ok(())
}

/// Its first request may have been on the way when the webhook stopped waiting for more.
#[tokio::test]
async fn a_connection_made_just_before_the_port_closes_gets_its_first_answer() -> Result<()> {
    need!(Webhook);
    let _alone = MACHINE.lock().await;
    for protocol in [Protocol::Http1, Protocol::Http2] {
        let mut webhook = Webhook::start(strict().without_cluster()?).await?;
        webhook.process().signal(Signal::TERM)?;
        let (mut last, begun) = (None, Instant::now());
        while let Ok(connection) = Connection::open(webhook.port, protocol).await {
            ensure!(begun.elapsed() < GRACE, "the port is still open");
            last = Some(connection);
        }
        let review = creation("last", 1)?;
        let answer = last.context("no connection was taken")?.post("/mutate?timeout=10s", &review).await?;
        ensure!(!patch(&review, &answer)?.is_empty(), "not placed: {answer:?}");
        let status = webhook.ended(GRACE).await?;
        ensure!(status.success(), "it ended with {status}");
    }
    Ok(())
}

/// An HTTP/2 client that is told to go may have begun a request meanwhile. It sends it again
/// elsewhere, if it comes to read that goodbye; met by a reset while it writes, it would not.
#[tokio::test]
async fn a_client_that_still_writes_after_goaway_is_answered() -> Result<()> {
    need!(Webhook);
    let _alone = MACHINE.lock().await;
    let webhook = Webhook::start(strict().without_cluster()?).await?;
    let mut going = tls(webhook.port, Protocol::Http2).await?;
    going.write_all(&opening()).await?;
    webhook.process().signal(Signal::TERM)?;
    let mut goodbyes = 0;
    while goodbyes < 2 {
        let mut header = [0; 9];
        timeout(SOON, going.read_exact(&mut header)).await.context("waiting to be told to go")??;
        let [_, high, low, kind, flags, ..] = header;
        let mut payload = vec![0; usize::from(u16::from_be_bytes([high, low]))];
        going.read_exact(&mut payload).await?;
        match kind {
            PING if flags & ACK == 0 => going.write_all(&frame(PING, ACK, 0, &payload)).await?,
            GOAWAY => goodbyes += 1,
            _ => {}
        }
    }
    // Nothing reads it any more, and it does no harm.
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_millis(400) {
        going.write_all(&frame(PING, 0, 0, &[0; 8])).await.context("writing after the last goodbye")?;
        sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

#[tokio::test]
async fn one_of_two_webhooks_terminates_under_load_and_no_creation_fails() -> Result<()> {
    need!(Redis, ControlPlane, Webhook);
    let _alone = MACHINE.lock().await;
    let mut scenario = Scenario::start("one-ends", 2, strict()).await?;
    scenario.driver("busy", "0.7").await?;
    let mut webhooks = std::mem::take(&mut scenario.webhooks);
    let (made, ended) = (AtomicU32::new(0), AtomicBool::new(false));
    let make = async |id| {
        scenario.executor("busy", id).await?;
        made.fetch_add(1, Ordering::Relaxed);
        Ok::<_, anyhow::Error>(())
    };
    let creating = async {
        futures::stream::iter(1..=150).map(async |id| make(id).await).buffer_unordered(16).try_collect::<()>().await?;
        // It serves on for some seconds: until it has gone and past that.
        let mut left = 20;
        for id in 151.. {
            make(id).await?;
            left -= u32::from(ended.load(Ordering::Relaxed));
            if left == 0 {
                break;
            }
        }
        Ok(())
    };
    let ending = async {
        until_true(SOON, "creations", async || Ok(made.load(Ordering::Relaxed) >= 50)).await?;
        // A new apiserver keeps a single HTTP/2 connection, so one of the two may have nothing to do.
        let mut busy = None;
        for webhook in &mut webhooks {
            let placed = webhook.metrics().await?.sum("spot_balancer_placements_total", &[]);
            if placed > Some(0.0) {
                busy = Some(webhook);
                break;
            }
        }
        let status = busy.context("no webhook placed anything")?.terminate(GRACE).await?;
        ended.store(true, Ordering::Relaxed);
        ensure!(status.success(), "it ended with {status}");
        Ok(())
    };
    tokio::try_join!(creating, ending)?;
    scenario.ensure_counts_match_pods("busy").await?.ensure_near(0.7, 1.0)
}
