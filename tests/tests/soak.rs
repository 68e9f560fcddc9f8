//! Everything at once, for two minutes, or for as long as `tests/soak` says: creations, deletions, refusals, dry runs,
//! forged reviews and slow clients, while the store, the leader, the certificates and the token change.
//!
//! No admission takes longer than the webhook's timeout, none fails because of us, and afterwards the ledger matches
//! the pods and the memory is what it was.

#![allow(clippy::indexing_slicing, reason = "JSON is built by index; a panic here fails the test, as it should")]

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use balancer_tests::certificate::authority;
use balancer_tests::control_plane::{Options, Plane};
use balancer_tests::metrics::Metrics;
use balancer_tests::pods::{self, JOB_ID_LABEL, PodBuilder, executor, set_phase};
use balancer_tests::process::{Process, scratch_path};
use balancer_tests::random::Random;
use balancer_tests::raw::{Connection, Protocol, tcp, tls, until_closed};
use balancer_tests::registration::Registration;
use balancer_tests::reviews::{creation, fixture};
use balancer_tests::scenario::{Scenario, strict};
use balancer_tests::steady::Steady;
use balancer_tests::wait::{SOON, until_true};
use balancer_tests::webhook::Webhook;
use balancer_tests::{need, quota};
use kube::api::{Api, DeleteParams, ListParams};
use kube::{Client, ResourceExt};
use redis::AsyncCommands;
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, sleep_until};

/// How long it lasts, in seconds.
const SECONDS: &str = "SPOT_BALANCER_SOAK_SECONDS";
/// As long as a test in a run of all may take.
const SHORT: u64 = 120;
/// What the chart sets for creations and deletions.
const TIMEOUT: Duration = Duration::from_secs(3);
const DELETION_TIMEOUT: Duration = Duration::from_secs(2);
/// The apiserver's largest bucket, in seconds; the next smaller one ends at 0.5. A deletion that takes longer than its
/// timeout fails, which the load notices.
const REVIEW_BUCKET: &str = "2.5";
/// The largest of the webhook's buckets below its budget of 2 s for an admission.
const ADMISSION_BUCKET: &str = "1.6384";
/// Between two operations on the apiserver: two cores serve these, the scheduler and the kubelet included.
const EVERY: Duration = Duration::from_millis(100);
/// Operations at once.
const AT_ONCE: usize = 8;
/// Between two reviews that a client posts directly, of which there are three.
const DIRECTLY: Duration = Duration::from_millis(200);
const JOBS: usize = 6;
/// So that about every third creation is refused.
const PODS: u32 = 48;
const RATIOS: [&str; 4] = ["0.5", "0.7", "1", "0.3"];
/// Slow and silent clients of each kind, per webhook.
const SLOW: usize = 4;
/// The default of RECONCILE_GRACE_SECONDS, and slack.
const GRACE: Duration = Duration::from_secs(90);
/// From a changed certificate or token file to the first connection that gets it.
const RELOAD: Duration = Duration::from_secs(20);
/// The apiserver calls by a changed configuration.
const FOLLOWS: Duration = Duration::from_secs(10);
/// How much a process may grow from the middle of the soak to its end.
const GROWTH: f64 = 1.2;
const GROWTH_MB: f64 = 8.0;

/// Prints to the real standard error, which the test runner does not capture: a long run shows that it goes on.
fn report(line: impl fmt::Display) -> Result<()> {
    Ok(writeln!(std::io::stderr(), "soak: {line}")?)
}

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Debug, Default)]
struct Results {
    created: AtomicU64,
    deleted: AtomicU64,
    over_quota: AtomicU64,
    invalid: AtomicU64,
    dry_runs: AtomicU64,
    jobs: AtomicU64,
    forged: AtomicU64,
    slow: AtomicU64,
    /// In milliseconds.
    slowest_creation: AtomicU64,
    slowest_deletion: AtomicU64,
    /// What must not happen; the first few.
    failures: Mutex<Vec<String>>,
}

impl Results {
    fn failed(&self, what: String) {
        let mut failures = lock(&self.failures);
        if failures.len() < 20 {
            failures.push(what);
        }
    }

    fn took(of: &AtomicU64, begun: Instant) {
        of.fetch_max(u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }
}

impl fmt::Display for Results {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let value = |of: &AtomicU64| of.load(Ordering::Relaxed);
        write!(
            f,
            "{} created (slowest {} ms), {} deletions (slowest {} ms), {} over the quota, {} invalid, {} dry runs, \
             {} jobs, {} forged reviews refused, {} slow connections ended, {} failures",
            value(&self.created),
            value(&self.slowest_creation),
            value(&self.deleted),
            value(&self.slowest_deletion),
            value(&self.over_quota),
            value(&self.invalid),
            value(&self.dry_runs),
            value(&self.jobs),
            value(&self.forged),
            value(&self.slow),
            lock(&self.failures).len(),
        )
    }
}

#[derive(Debug, Clone)]
struct Job {
    name: String,
    driver: String,
    /// Those that were made and not yet deleted by us.
    executors: Vec<String>,
}

/// What the load needs, whatever happens to the processes.
struct Load {
    client: Client,
    namespace: String,
    /// Where the webhooks are, each by itself.
    ports: Vec<u16>,
    token: Mutex<String>,
    jobs: Mutex<Vec<Job>>,
    random: Mutex<Random>,
    next: AtomicU64,
    results: Results,
}

impl Load {
    fn pods(&self) -> Api<k8s_openapi::api::core::v1::Pod> {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    fn below(&self, bound: usize) -> Result<usize> {
        lock(&self.random).below(bound)
    }

    fn next(&self) -> u32 {
        u32::try_from(self.next.fetch_add(1, Ordering::Relaxed)).unwrap_or(u32::MAX)
    }

    fn some_job(&self) -> Result<Job> {
        let number = self.below(JOBS)?;
        lock(&self.jobs).get(number).cloned().context("no job")
    }

    fn executor(&self, job: &Job) -> PodBuilder {
        executor(&job.name, self.next()).owned_by(&format!("{}-driver", job.name), &job.driver)
    }

    /// Makes a job's driver. Where the quota is full, it waits for room.
    async fn start_job(&self) -> Result<Job> {
        let ratio = RATIOS[self.below(RATIOS.len())?];
        let name = format!("job-{}", self.next());
        let driver = pods::driver(&name).annotation("workload/spot-ratio", ratio);
        let late = Instant::now() + SOON;
        let driver = loop {
            let posted = driver.post(&self.client, &self.namespace).await?;
            if posted.status == 201 {
                break posted.pod()?.uid().context("a driver without a uid")?;
            }
            ensure!(is_over_quota(&posted.object) && Instant::now() < late, "a driver: {posted:?}");
            sleep(EVERY).await;
        };
        self.results.jobs.fetch_add(1, Ordering::Relaxed);
        Ok(Job { name, driver, executors: Vec::new() })
    }

    /// One operation of many kinds.
    async fn operate(&self) -> Result<()> {
        match self.below(100)? {
            0..52 => self.create().await,
            52..74 => self.delete().await,
            74..84 => {
                let pod = self.executor(&self.some_job()?);
                self.refuse(pod).await
            }
            84..92 => self.dry_run().await,
            // Of a job that never has a pod.
            92..98 => {
                let id = self.next();
                self.refuse(executor(&format!("nobody-{id}"), id)).await
            }
            _ => self.replace_job().await,
        }
    }

    async fn create(&self) -> Result<()> {
        let job = self.some_job()?;
        let pod = self.executor(&job);
        let begun = Instant::now();
        let posted = pod.post(&self.client, &self.namespace).await?;
        Results::took(&self.results.slowest_creation, begun);
        if posted.status == 201 {
            self.results.created.fetch_add(1, Ordering::Relaxed);
            let name = posted.pod()?.name_any();
            if let Some(job) = lock(&self.jobs).iter_mut().find(|known| known.name == job.name) {
                job.executors.push(name);
            }
            ensure!(posted.warnings.is_empty(), "warnings: {:?}", posted.warnings);
            return Ok(());
        }
        ensure!(is_over_quota(&posted.object), "a creation: {} {}", posted.status, posted.object);
        self.results.over_quota.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    async fn refuse(&self, pod: PodBuilder) -> Result<()> {
        let posted = pod.invalid().post(&self.client, &self.namespace).await?;
        ensure!(posted.status == 422, "an invalid creation: {} {}", posted.status, posted.object);
        self.results.invalid.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    async fn dry_run(&self) -> Result<()> {
        let pod = self.executor(&self.some_job()?);
        let posted = pod.dry_run(&self.client, &self.namespace).await?;
        let answered = posted.status == 201 || is_over_quota(&posted.object);
        ensure!(answered, "a dry run: {} {}", posted.status, posted.object);
        self.results.dry_runs.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    async fn delete(&self) -> Result<()> {
        let number = self.below(JOBS)?;
        let among = self.below(1 << 16)?;
        let name = {
            let mut jobs = lock(&self.jobs);
            let job = jobs.get_mut(number).context("no job")?;
            match job.executors.len() {
                0 => return Ok(()),
                count => job.executors.swap_remove(among % count),
            }
        };
        let pods = self.pods();
        let begun = Instant::now();
        let deleted = match among % 4 {
            0 => pods::remove(&pods, &name).await,
            1 => match set_phase(&pods, &name, "Failed").await {
                Ok(()) => pods.delete(&name, &DeleteParams::default()).await.map(drop),
                error => error,
            },
            _ => pods.delete(&name, &DeleteParams::default()).await.map(drop),
        };
        Results::took(&self.results.slowest_deletion, begun);
        match deleted {
            Err(kube::Error::Api(status)) if !matches!(status.code, 404 | 409) => bail!("a deletion: {status:?}"),
            Err(kube::Error::Api(_)) | Ok(()) => {}
            Err(error) => bail!("a deletion: {error}"),
        }
        self.results.deleted.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// Ends a job as Spark does, by one deletion of its executors, and starts another.
    async fn replace_job(&self) -> Result<()> {
        let number = self.below(JOBS)?;
        let Some(job) = lock(&self.jobs).get(number).cloned() else { return Ok(()) };
        let of_job = |role| ListParams::default().labels(&format!("spark-role={role},{JOB_ID_LABEL}={}", job.name));
        for role in ["executor", "driver"] {
            self.pods().delete_collection(&DeleteParams::default(), &of_job(role)).await.context("deletecollection")?;
        }
        let started = self.start_job().await?;
        if let Some(place) = lock(&self.jobs).iter_mut().find(|known| known.name == job.name) {
            *place = started;
        }
        Ok(())
    }

    fn path(&self, of: &str) -> String {
        format!("/{of}/{}?timeout=3s", lock(&self.token))
    }

    /// Reviews that no apiserver sends: without the token, with another, and with it but malformed.
    async fn forge(&self, kind: usize) -> Result<()> {
        let job = self.some_job()?;
        let mut driver = fixture("k8s-1.36-spark-3.5-create-driver")?;
        driver["request"]["namespace"] = self.namespace.as_str().into();
        driver["request"]["object"]["metadata"]["labels"][JOB_ID_LABEL] = job.name.as_str().into();
        driver["request"]["object"]["metadata"]["annotations"]["workload/spot-ratio"] = "0.9".into();
        let mut deletion = fixture("k8s-1.36-spark-3.5-delete-executor-collection")?;
        deletion["request"]["namespace"] = self.namespace.as_str().into();
        deletion["request"]["oldObject"]["metadata"]["labels"][JOB_ID_LABEL] = job.name.as_str().into();
        if let Some(name) = job.executors.first() {
            deletion["request"]["oldObject"]["metadata"]["name"] = name.as_str().into();
        }
        let (path, body) = match kind % 6 {
            0 => ("/mutate?timeout=3s".to_owned(), driver),
            1 => ("/mutate/0123456789abcdef0123456789abcdef".to_owned(), driver),
            2 => ("/validate".to_owned(), deletion),
            3 => ("/validate/".to_owned(), deletion),
            4 => (self.path("mutate"), json!({"kind": "AdmissionReview", "apiVersion": "admission.k8s.io/v2"})),
            _ => (self.path("mutate"), Value::Null),
        };
        let port = self.ports[kind % self.ports.len()];
        let protocol = if kind.is_multiple_of(2) { Protocol::Http1 } else { Protocol::Http2 };
        let answer = Connection::open(port, protocol).await?.post(&path, &body).await?;
        ensure!((400..500).contains(&answer.status), "a forged review at kind {}: {answer:?}", kind % 6);
        self.results.forged.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

/// Whether the apiserver refused because of the quota, or of a conflict about its count.
fn is_over_quota(answer: &Value) -> bool {
    let message = answer["message"].as_str().unwrap_or_default();
    message.contains("exceeded quota") || message.contains("resourcequotas")
}

/// Operates for as long as the task lives.
async fn operate_steadily(load: Arc<Load>) {
    let (mut ticks, mut running, room) = (interval(EVERY), JoinSet::new(), Arc::new(Semaphore::new(AT_ONCE)));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let Ok(permit) = room.clone().acquire_owned().await else { return };
        let load = load.clone();
        running.spawn(async move {
            if let Err(error) = load.operate().await {
                load.results.failed(format!("{error:#}"));
            }
            drop(permit);
        });
        while running.try_join_next().is_some() {}
    }
}

async fn forge_steadily(load: Arc<Load>) {
    let mut ticks = interval(DIRECTLY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    for kind in 0.. {
        ticks.tick().await;
        if let Err(error) = load.forge(kind).await {
            load.results.failed(format!("{error:#}"));
        }
    }
}

/// A client that sends its body byte by byte, or that sends nothing, and connects again when it is cut off.
async fn dawdle(load: Arc<Load>, port: u16, kind: usize) {
    loop {
        // Whatever becomes of such a connection is right, except that it delays others.
        let _ = match kind % 3 {
            0 => send_slowly(port, &load.path("mutate")).await,
            1 => stay_silent(tcp(port).await).await,
            _ => stay_silent(tls(port, Protocol::Http1).await).await,
        };
        load.results.slow.fetch_add(1, Ordering::Relaxed);
        sleep(Duration::from_secs(1)).await;
    }
}

async fn send_slowly(port: u16, path: &str) -> Result<()> {
    let mut stream = tls(port, Protocol::Http1).await?;
    let head = format!(
        "POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 4194000\r\n\r\n{{"
    );
    stream.write_all(head.as_bytes()).await?;
    loop {
        sleep(Duration::from_millis(500)).await;
        stream.write_all(b" ").await?;
        stream.flush().await?;
    }
}

async fn stay_silent(stream: Result<impl tokio::io::AsyncRead + Unpin>) -> Result<()> {
    until_closed(&mut stream?, Duration::from_secs(60)).await.map(drop)
}

/// The file with the tokens that the webhooks accept.
struct Tokens(PathBuf);

impl Tokens {
    fn new(first: &str) -> Result<Self> {
        let tokens = Self(scratch_path("tokens")?);
        tokens.write(&[first])?;
        Ok(tokens)
    }

    fn write(&self, tokens: &[&str]) -> Result<()> {
        let next = self.0.with_extension("next");
        std::fs::write(&next, tokens.join("\n") + "\n")?;
        Ok(std::fs::rename(next, &self.0)?)
    }

    fn path(&self) -> &Path {
        &self.0
    }
}

/// The number's token, as long as a secret has to be.
fn token(number: u32) -> String {
    format!("{number:x}").repeat(8).chars().cycle().take(64).collect()
}

/// A creation in this namespace that nothing comes of.
fn dry_review(namespace: &str, number: u64) -> Result<Value> {
    let mut review = creation("direct", number)?;
    review["request"]["namespace"] = namespace.into();
    review["request"]["dryRun"] = true.into();
    Ok(review)
}

async fn accepts(webhook: &Webhook, namespace: &str, token: &str) -> Result<bool> {
    let path = format!("/mutate/{token}?timeout=3s");
    let review = dry_review(namespace, 0)?;
    Ok(Connection::open(webhook.port, Protocol::Http1).await?.post(&path, &review).await?.status == 200)
}

/// Both tokens, then the new one in the configurations, then the new one alone.
async fn rotate_token(
    scenario: &Scenario,
    registration: &mut Registration,
    load: &Load,
    tokens: &Tokens,
) -> Result<()> {
    let (old, new) = (lock(&load.token).clone(), token(0xb));
    tokens.write(&[&new, &old])?;
    for webhook in &scenario.webhooks {
        until_true(RELOAD, "the new token to be accepted", async || accepts(webhook, &scenario.namespace, &new).await)
            .await?;
    }
    registration.switch(&scenario.plane, &new).await?;
    lock(&load.token).clone_from(&new);
    // The apiserver follows soon, and a review with the old token may be on its way.
    sleep(FOLLOWS).await;
    tokens.write(&[&new])?;
    for webhook in &scenario.webhooks {
        until_true(RELOAD, "the old token to be refused", async || {
            Ok(!accepts(webhook, &scenario.namespace, &old).await?)
        })
        .await?;
    }
    Ok(())
}

async fn rotate_certificates(scenario: &Scenario) -> Result<()> {
    for webhook in &scenario.webhooks {
        authority()?.renew(&webhook.certificate)?;
        let new = webhook.certificate.der()?;
        until_true(RELOAD, "the new certificate to be served", async || {
            Ok(Connection::open(webhook.port, Protocol::Http1).await?.certificate() == new)
        })
        .await?;
    }
    Ok(())
}

/// Kills the reconciler that leads, and starts another one next to the one that is left.
async fn kill_leader(scenario: &mut Scenario) -> Result<()> {
    let mut leader = None;
    until_true(SOON, "one reconciler to lead", async || {
        leader = scenario.leader().await?;
        Ok(leader.is_some())
    })
    .await?;
    scenario.reconcilers.remove(leader.context("none leads")?).kill();
    scenario.start_reconcilers(1).await
}

/// The resident memory of the largest process of each kind, in MiB.
fn memory(scenario: &Scenario) -> Result<[f64; 2]> {
    let most = |processes: Vec<&Process>| {
        processes.into_iter().try_fold(0.0_f64, |most, process| anyhow::Ok(most.max(process.resident_mb()?)))
    };
    Ok([
        most(scenario.webhooks.iter().map(|webhook| webhook.process()).collect())?,
        most(scenario.reconcilers.iter().map(|reconciler| reconciler.process()).collect())?,
    ])
}

/// The jobs that have keys in the store.
async fn stored_jobs(scenario: &Scenario) -> Result<BTreeSet<String>> {
    let keys: Vec<String> = scenario.redis.connection().await?.keys("exec-*:*").await?;
    let job = |key: &String| Some(key.rsplit_once('}')?.0.rsplit_once(':')?.1.to_owned());
    Ok(keys.iter().filter_map(job).collect())
}

/// Fails unless the store has the ledgers of the jobs that have pods, with their policies, and no other.
async fn ensure_converged(scenario: &Scenario) -> Result<(usize, usize)> {
    let (mut ratios, mut jobs, mut executors) = (BTreeMap::new(), BTreeSet::new(), 0);
    for pod in scenario.pods().list(&ListParams::default()).await? {
        let Some(job) = pod.labels().get(JOB_ID_LABEL).cloned() else { continue };
        if let Some(ratio) = pod.annotations().get("workload/spot-ratio") {
            ratios.insert(job.clone(), ratio.clone());
        }
        jobs.insert(job);
    }
    let stored = stored_jobs(scenario).await?;
    ensure!(stored == jobs, "jobs with pods: {jobs:?}, with keys: {stored:?}");
    for job in &jobs {
        let counts = scenario.ensure_ledger_matches_pods(job).await.with_context(|| job.clone())?;
        executors += counts.spot + counts.on_demand;
        let policy = scenario.policy(job).await?.0;
        ensure!(policy.as_ref() == ratios.get(job), "{job} asked for {:?} and has {policy:?}", ratios.get(job));
    }
    Ok((jobs.len(), executors))
}

/// Fails if the apiserver waited longer for any review than its largest bucket, or a webhook needed longer for any
/// admission than the largest bucket below its budget.
async fn ensure_reviews_were_quick(scenario: &Scenario) -> Result<()> {
    let page = scenario.plane.metrics().await?;
    let histogram = "apiserver_admission_webhook_admission_duration_seconds";
    ensure_quick(&page, histogram, &[("type", "admit")], REVIEW_BUCKET)?;
    ensure_quick(&page, histogram, &[("type", "validating")], REVIEW_BUCKET)?;
    for webhook in &scenario.webhooks {
        ensure_quick(&webhook.metrics().await?, "spot_balancer_admission_seconds", &[], ADMISSION_BUCKET)?;
    }
    Ok(())
}

/// Fails unless the histogram has values, and all of them in the bucket up to `limit`.
fn ensure_quick(page: &Metrics, histogram: &str, labels: &[(&str, &str)], limit: &str) -> Result<()> {
    let sum = |suffix: &str, labels: &[(&str, &str)]| {
        let name = format!("{histogram}_{suffix}");
        page.sum(&name, labels).with_context(|| format!("no metric {name} with {labels:?}"))
    };
    let (all, quick) = (sum("count", labels)?, sum("bucket", &[labels, &[("le", limit)]].concat())?);
    report(format_args!("{histogram} {labels:?}: {quick} of {all} within {limit} s"))?;
    ensure!(all > 0.0, "{histogram} {labels:?} is empty");
    ensure!(quick >= all, "{histogram} {labels:?}: {} took longer than {limit} s", all - quick);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_late_lost_or_left_after_a_soak() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, ControllerManager, Webhook, Reconciler);
    let seconds: u64 = std::env::var(SECONDS).map_or(Ok(SHORT), |seconds| seconds.parse()).context(SECONDS)?;
    let plane = Plane::own(Options { scheduler: true, controller_manager: true, ..Options::default() }).await?;
    let mut scenario = Scenario::bare(plane, "soak").await?;
    scenario.grace = None;
    let tokens = Tokens::new(&token(0xa))?;
    scenario.start_webhooks(2, strict().env("ADMISSION_TOKEN_PATH", tokens.path())).await?;
    // A creation fails if a webhook does: that is how a lost answer is noticed.
    let mut registration = Registration {
        timeout_seconds: u8::try_from(TIMEOUT.as_secs())?,
        deletion_timeout_seconds: u8::try_from(DELETION_TIMEOUT.as_secs())?,
        token: Some(token(0xa)),
        ..scenario.registration()
    };
    registration.apply(&scenario.plane).await?;
    scenario.start_reconcilers(2).await?;
    quota::set(&scenario.client, &scenario.namespace, PODS).await?;

    let load = Arc::new(Load {
        client: scenario.client.clone(),
        namespace: scenario.namespace.clone(),
        ports: scenario.webhooks.iter().map(|webhook| webhook.port).collect(),
        token: Mutex::new(token(0xa)),
        jobs: Mutex::default(),
        random: Mutex::new(Random::seeded()?),
        next: AtomicU64::new(1),
        results: Results::default(),
    });
    for _ in 0..JOBS {
        let job = load.start_job().await?;
        lock(&load.jobs).push(job);
    }

    let begun = Instant::now();
    let at = |share: f64| begun + Duration::from_secs(seconds).mul_f64(share);
    let mut tasks = JoinSet::new();
    tasks.spawn(operate_steadily(load.clone()));
    tasks.spawn(forge_steadily(load.clone()));
    for port in &load.ports {
        for kind in 0..3 * SLOW {
            tasks.spawn(dawdle(load.clone(), *port, kind));
        }
    }
    let reporting = load.clone();
    tasks.spawn(async move {
        let mut ticks = interval(Duration::from_secs(30));
        loop {
            ticks.tick().await;
            let _ = report(format_args!("{} s: {}", begun.elapsed().as_secs(), reporting.results));
        }
    });
    let direct: Vec<Steady> = [(0, Protocol::Http1), (1, Protocol::Http2), (2, Protocol::Http1)]
        .into_iter()
        .map(|(client, protocol)| {
            let load = load.clone();
            Steady::with(scenario.balance.port, protocol, DIRECTLY, move |number| {
                Ok((load.path("mutate"), dry_review(&load.namespace, 3 * number + client)?))
            })
        })
        .collect();

    sleep_until(at(0.1)).await;
    scenario.redis.start_again_empty().await?;
    sleep_until(at(0.2)).await;
    kill_leader(&mut scenario).await?;
    sleep_until(at(0.3)).await;
    rotate_certificates(&scenario).await?;
    sleep_until(at(0.4)).await;
    let warm = memory(&scenario)?;
    sleep_until(at(0.5)).await;
    scenario.redis.start_again_empty().await?;
    sleep_until(at(0.6)).await;
    kill_leader(&mut scenario).await?;
    sleep_until(at(0.75)).await;
    rotate_token(&scenario, &mut registration, &load, &tokens).await?;
    sleep_until(at(1.0)).await;

    tasks.shutdown().await;
    let took = begun.elapsed();
    let (mut posted, mut slowest) = (0, Duration::ZERO);
    for direct in direct {
        let answered = direct.stop().await?;
        posted += answered.count;
        slowest = slowest.max(answered.slowest);
    }
    let end = memory(&scenario)?;
    let mut converged = (0, 0);
    let ending = Instant::now();
    let convergence = until_true(GRACE, "every ledger to match its pods", async || {
        sleep(Duration::from_millis(500)).await;
        converged = ensure_converged(&scenario).await?;
        Ok(true)
    })
    .await;
    let summary = format!(
        "{} s: {}; {posted} direct reviews (slowest {slowest:?}); memory of webhook and reconciler {warm:.1?} MiB after \
         a while, {end:.1?} MiB at the end; {} jobs with {} executors match after {:.1?}",
        took.as_secs(),
        load.results,
        converged.0,
        converged.1,
        ending.elapsed(),
    );
    report(&summary)?;
    convergence?;
    let failures = lock(&load.results.failures).join("\n");
    ensure!(failures.is_empty(), "{failures}\n{}", scenario.webhooks[0].process().log_tail());
    ensure!(slowest < TIMEOUT, "a review that was posted directly took {slowest:?}");
    ensure_reviews_were_quick(&scenario).await?;
    for (warm, end) in warm.into_iter().zip(end) {
        ensure!(end <= (warm * GROWTH).max(warm + GROWTH_MB), "a process grew from {warm:.1} to {end:.1} MiB");
    }
    let value = |of: &AtomicU64| of.load(Ordering::Relaxed);
    let results = &load.results;
    for count in
        [&results.created, &results.deleted, &results.over_quota, &results.invalid, &results.dry_runs, &results.forged]
    {
        ensure!(value(count) >= seconds / 10, "there was little load: {summary}");
    }
    Ok(())
}
