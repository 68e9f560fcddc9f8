//! What the release binary leans on breaks, the store or the certificate, and no admission fails of it.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use balancer_tests::certificate::{ServerCertificate, authority};
use balancer_tests::mounted::Mounted;
use balancer_tests::need;
use balancer_tests::pods::executor;
use balancer_tests::raw::{Connection, Protocol};
use balancer_tests::redis::RedisServer;
use balancer_tests::reviews::{creation, patch};
use balancer_tests::scenario::{Scenario, placed, strict};
use balancer_tests::steady::Steady;
use balancer_tests::wait::{SOON, until_true};
use balancer_tests::webhook::Webhook;
use futures::{StreamExt, TryStreamExt};
use kube::Client;

/// How long an apiserver waits for a creation by the chart's configurations, which is more than the webhook's own budget.
const BUDGET: Duration = Duration::from_secs(3);
/// The store's time-out of half a second and slack for a busy machine, as a bucket of the webhook's
/// histogram: a creation takes what the apiserver and etcd take besides.
const STORE_LIMIT: &str = "1.6384";
/// The last bucket below the time-out: an admission in a later one has waited for the store.
const JUST_BELOW_TIME_OUT: &str = "0.4096";
/// From a changed certificate file to the first connection that gets it.
const RELOAD: Duration = Duration::from_secs(10);

/// Makes an executor through the apiserver and answers how long that took; fails where it was not
/// placed.
async fn create(client: &Client, namespace: &str, job: &str, id: u32) -> Result<Duration> {
    let begun = Instant::now();
    placed(&executor(job, id).post(client, namespace).await?.pod()?)?;
    Ok(begun.elapsed())
}

/// Makes executors until the ledger places them again, and fails where it does not soon.
async fn until_placed_by_the_ledger(scenario: &Scenario, job: &str, ids: &mut impl Iterator<Item = u32>) -> Result<()> {
    let source = [("source", "ledger")];
    until_true(SOON, "the ledger to place again", async || {
        let before = scenario.metric("spot_balancer_placements_total", &source).await?;
        scenario.executor(job, ids.next().context("no more ids")?).await?;
        Ok(scenario.metric("spot_balancer_placements_total", &source).await? > before)
    })
    .await
}

/// Fails unless every admission so far was answered within the store's time-out and slack.
async fn ensure_admissions_were_quick(scenario: &Scenario) -> Result<()> {
    let count = scenario.metric("spot_balancer_admission_seconds_count", &[]).await?;
    let quick = scenario.metric("spot_balancer_admission_seconds_bucket", &[("le", STORE_LIMIT)]).await?;
    ensure!(count >= 100.0 && quick == count, "of {count} admissions {quick} took {STORE_LIMIT} s or less");
    Ok(())
}

#[tokio::test]
async fn a_lost_store_fails_and_delays_no_creation_and_keeps_the_ratio() -> Result<()> {
    need!(Redis, ControlPlane, Webhook);
    let mut scenario = Scenario::start("store-lost", 1, strict()).await?;
    for job in ["calm", "crowd"] {
        scenario.driver(job, "0.7").await?;
    }
    let (client, namespace, redis) = (&scenario.client, &scenario.namespace, &mut scenario.redis);
    let made = AtomicU32::new(0);
    let make = async |job: &'static str, id: u32| {
        let took = create(client, namespace, job, id).await?;
        made.fetch_add(1, Ordering::Relaxed);
        Ok::<_, anyhow::Error>(took)
    };
    // One after the other, so that what is decided alone is one run of numbers, and the job's
    // distance from its ratio the sum of three that are each less than one.
    let calm = futures::stream::iter(1..=200).then(async |id| make("calm", id).await).try_collect::<Vec<_>>();
    // All at once, so that the store is lost on the way.
    let crowd = futures::stream::iter(1..=200)
        .map(async |id| make("crowd", id).await)
        .buffer_unordered(8)
        .try_collect::<Vec<_>>();
    let store = async {
        let made_so_many =
            async |count| until_true(SOON, "creations", async || Ok(made.load(Ordering::Relaxed) >= count)).await;
        made_so_many(130).await?;
        redis.stop();
        made_so_many(260).await?;
        redis.start_again_empty().await
    };
    let (calm, crowd, ()) = tokio::try_join!(calm, crowd, store)?;
    let slowest = calm.into_iter().chain(crowd).max().unwrap_or_default();
    ensure!(slowest < BUDGET, "a creation took {slowest:?}");
    ensure_admissions_were_quick(&scenario).await?;
    scenario.counts("calm").await?.ensure_near(0.7, 2.0)?;

    let degraded = [("source", "fallback")];
    let alone = scenario.metric("spot_balancer_placements_total", &degraded).await?;
    let errors = scenario.metric("spot_balancer_store_errors_total", &[("kind", "no_connection")]).await?;
    ensure!(alone >= 10.0 && errors >= 10.0, "{alone} were placed without the store, after {errors} errors");
    let log = scenario.webhooks[0].process().log()?;
    assert!(log.contains("executor placed without the store"), "{log}");

    let mut ids = 201..;
    until_placed_by_the_ledger(&scenario, "calm", &mut ids).await?;
    let alone = scenario.metric("spot_balancer_placements_total", &degraded).await?;
    scenario.executors("calm", ids.by_ref().take(20), 4).await?;
    assert_eq!(scenario.metric("spot_balancer_placements_total", &degraded).await?, alone);
    scenario.counts("calm").await?.ensure_near(0.7, 2.0)
}

#[tokio::test]
async fn a_hanging_store_delays_a_creation_by_its_timeout_at_most() -> Result<()> {
    need!(Redis, ControlPlane, Webhook);
    let scenario = Scenario::start("store-hangs", 1, strict()).await?;
    scenario.driver("hung", "0.7").await?;
    scenario.executors("hung", 1..=20, 4).await?;
    scenario.redis.freeze()?;
    let took: Vec<Duration> = futures::stream::iter(21..=120)
        .map(async |id| create(&scenario.client, &scenario.namespace, "hung", id).await)
        .buffer_unordered(8)
        .try_collect()
        .await?;
    let slowest = took.iter().max().copied().unwrap_or_default();
    ensure!(slowest >= Duration::from_millis(500), "the store did not hang: the slowest took {slowest:?}");
    ensure!(slowest < BUDGET, "a creation took {slowest:?}");
    ensure_admissions_were_quick(&scenario).await?;
    // Once it is known, nobody waits for it: what is not there costs nothing. By the webhook's histogram, because the
    // apiserver may be slow too.
    let count = scenario.metric("spot_balancer_admission_seconds_count", &[]).await?;
    let quick = scenario.metric("spot_balancer_admission_seconds_bucket", &[("le", JUST_BELOW_TIME_OUT)]).await?;
    let waited = count - quick;
    ensure!(waited < 50.0, "{waited} of {} creations waited for a store that was known to hang", took.len());
    let degraded = [("source", "fallback")];
    assert_eq!(scenario.metric("spot_balancer_placements_total", &degraded).await?, 100.0);
    ensure!(scenario.metric("spot_balancer_store_errors_total", &[("kind", "timed_out")]).await? >= 1.0);

    scenario.redis.thaw()?;
    let mut ids = 121..;
    until_placed_by_the_ledger(&scenario, "hung", &mut ids).await?;
    let alone = scenario.metric("spot_balancer_placements_total", &degraded).await?;
    scenario.executors("hung", ids.by_ref().take(20), 4).await?;
    assert_eq!(scenario.metric("spot_balancer_placements_total", &degraded).await?, alone);
    scenario.counts("hung").await?.ensure_near(0.7, 3.0)
}

#[tokio::test]
async fn a_store_time_out_past_the_budget_leaves_the_budget_whole() -> Result<()> {
    need!(Redis, Webhook);
    let redis = RedisServer::start().await?;
    let options = strict().redis(&redis)?.without_cluster()?;
    let options = options.env("STORE_TIMEOUT_MILLISECONDS", "15000").env("WEBHOOK_TIMEOUT_SECONDS", "2");
    let webhook = Webhook::start(options).await?;
    redis.freeze()?;
    let review = creation("patient", 1)?;
    let mut connection = Connection::open(webhook.port, Protocol::Http1).await?;
    let begun = Instant::now();
    let answer = connection.post("/mutate?timeout=2s", &review).await?;
    let took = begun.elapsed();
    ensure!(!patch(&review, &answer)?.is_empty(), "not placed: {answer:?}");
    ensure!(took < Duration::from_secs(2), "it took {took:?}");
    Ok(())
}

#[tokio::test]
async fn a_webhook_that_starts_before_its_store_is_ready_answers_and_finds_it_later() -> Result<()> {
    need!(Redis, Webhook);
    let mut redis = RedisServer::start().await?;
    redis.stop();
    // It starts, so it is ready.
    let webhook = Webhook::start(strict().redis(&redis)?.without_cluster()?).await?;
    let mut connection = Connection::open(webhook.port, Protocol::Http1).await?;
    let mut post = async |id| {
        let review = creation("early", id)?;
        let answer = connection.post("/mutate?timeout=10s", &review).await?;
        ensure!(!patch(&review, &answer)?.is_empty(), "not placed: {answer:?}");
        Ok(())
    };
    let placements = async |source| {
        let metrics = webhook.metrics().await?;
        Ok::<_, anyhow::Error>(metrics.sum("spot_balancer_placements_total", &[("source", source)]).unwrap_or(0.0))
    };
    for id in 1..=10 {
        post(id).await?;
    }
    assert_eq!((placements("fallback").await?, placements("ledger").await?), (10.0, 0.0));
    redis.start_again_empty().await?;
    let mut id = 10;
    until_true(SOON, "the webhook to find its store", async || {
        id += 1;
        post(id).await?;
        Ok(placements("ledger").await? > 0.0)
    })
    .await?;
    Ok(())
}

/// Posts admissions all the while that `change` puts another certificate in place, and waits until it
/// is served.
async fn ensure_rotated(
    webhook: &Webhook,
    served: &ServerCertificate,
    change: impl FnOnce() -> Result<()>,
) -> Result<()> {
    let before = served.der()?;
    let shown =
        async || Ok::<_, anyhow::Error>(Connection::open(webhook.port, Protocol::Http1).await?.certificate().to_vec());
    ensure!(shown().await? == before, "another certificate is served from the start");
    let beside = [Protocol::Http1, Protocol::Http2]
        .map(|protocol| Steady::start(webhook.port, protocol, Duration::from_millis(20)));
    change()?;
    let after = served.der()?;
    ensure!(after != before, "the certificate was not changed");
    until_true(RELOAD, "the new certificate to be served", async || Ok(shown().await? == after)).await?;
    for beside in beside {
        let beside = beside.stop().await?;
        ensure!(beside.count > 10, "{beside:?}");
    }
    Ok(())
}

async fn expiry(webhook: &Webhook) -> Result<f64> {
    webhook
        .metrics()
        .await?
        .sum("spot_balancer_certificate_expiry_timestamp_seconds", &[])
        .context("no expiry is shown")
}

/// The first second of 2031, in Unix time.
const YEAR_2031: f64 = 1_924_992_000.0;

#[tokio::test]
async fn a_certificate_renewed_in_its_files_is_served_without_a_failed_admission() -> Result<()> {
    need!(Webhook);
    let webhook = Webhook::start(strict().without_cluster()?).await?;
    ensure!(expiry(&webhook).await? > YEAR_2031);
    ensure_rotated(&webhook, &webhook.certificate, || authority()?.renew_until(&webhook.certificate, 2031)).await?;
    assert_eq!(expiry(&webhook).await?, YEAR_2031);
    Ok(())
}

#[tokio::test]
async fn a_certificate_swapped_by_the_kubelet_is_served_without_a_failed_admission() -> Result<()> {
    need!(Webhook);
    let issue = || -> Result<[Vec<u8>; 2]> {
        let issued = authority()?.issue()?;
        Ok([std::fs::read(issued.path)?, std::fs::read(issued.key_path)?])
    };
    let [certificate, key] = issue()?;
    let secret = Mounted::new(&[("tls.crt", &certificate), ("tls.key", &key)])?;
    let files = ServerCertificate { path: secret.path("tls.crt"), key_path: secret.path("tls.key") };
    let options = strict().without_cluster()?.env("TLS_CERT_PATH", &files.path).env("TLS_KEY_PATH", &files.key_path);
    let webhook = Webhook::start(options).await?;
    ensure_rotated(&webhook, &files, || {
        let [certificate, key] = issue()?;
        secret.swap(&[("tls.crt", &certificate), ("tls.key", &key)])
    })
    .await
}

#[tokio::test]
async fn an_invalid_certificate_is_reported_and_the_previous_one_stays_in_use() -> Result<()> {
    need!(Webhook);
    let webhook = Webhook::start(strict().without_cluster()?).await?;
    let files = &webhook.certificate;
    let (first, expires) = (files.der()?, expiry(&webhook).await?);
    let other = authority()?.issue()?;
    let garbage = b"-----BEGIN CERTIFICATE-----\nnonsense\n-----END CERTIFICATE-----\n".to_vec();
    // Not PEM of a certificate, and one that the key does not belong to.
    for (count, broken) in [(1_u32, garbage), (2, std::fs::read(&other.path)?)] {
        std::fs::write(&files.path, broken)?;
        until_true(RELOAD, "the broken certificate to be counted", async || {
            let failures = webhook.metrics().await?.sum("spot_balancer_certificate_reload_failures_total", &[]);
            Ok(failures.is_some_and(|failures| failures >= f64::from(count)))
        })
        .await?;
        until_true(SOON, "the broken certificate to be told", async || {
            let log = webhook.process().log()?;
            let told = log.lines().filter(|line| line.contains("cannot load the changed certificate"));
            Ok(told.filter(|line| line.contains("TLS_CERT_PATH")).count() >= count as usize)
        })
        .await?;
        ensure!(Connection::open(webhook.port, Protocol::Http1).await?.certificate() == first, "not the one before");
        assert_eq!(expiry(&webhook).await?, expires);
    }
    authority()?.renew_until(files, 2031)?;
    until_true(RELOAD, "the good certificate to be served", async || {
        Ok(Connection::open(webhook.port, Protocol::Http1).await?.certificate() == files.der()?)
    })
    .await?;
    assert_eq!(expiry(&webhook).await?, YEAR_2031);
    Ok(())
}
