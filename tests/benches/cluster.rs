//! What a large cluster costs the reconciler: 500 jobs of 40 executors each, on a real apiserver and a
//! real Redis. Its first sync is measured beside a client that reads the same list and throws it away,
//! in turns within one run; then its memory, what it does while nothing happens, and how soon one
//! change is in the ledger. A ledger that is wrong fails the run.
//!
//! ```sh
//! cargo build --profile dist -p balancer-webhook -p balancer-reconcile
//! cargo bench -p balancer-tests --bench cluster
//! ```

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use balancer_tests::control_plane::{ControlPlane, Options};
use balancer_tests::figures::median;
use balancer_tests::pods::{self, PodBuilder};
use balancer_tests::reconciler::{Reconciler, ReconcilerOptions};
use balancer_tests::redis::RedisServer;
use balancer_tests::wait::until;
use balancer_tests::{nodes, parts};
use futures::{StreamExt, TryStreamExt, stream};
use http::Request;
use http_body_util::BodyExt;
use k8s_openapi::api::core::v1::Pod;
use kube::client::Body;
use kube::{Api, Client};
use redis::AsyncCommands;
use serde_json::Value;

const JOBS: u32 = 500;
/// Of each job; half of them on spot.
const EXECUTORS: u32 = 40;
/// Of each capacity.
const NODES: u32 = 10;
/// Pods that are made at once.
const AT_ONCE: usize = 64;
/// First syncs, each beside a reading of the list.
const TURNS: usize = 5;
/// Pods in one answer, as the reconciler asks.
const PAGE: u32 = 500;
/// How long nothing happens.
const IDLE: Duration = Duration::from_secs(30);
/// Executors deleted, and as many created.
const CHANGES: u32 = 11;
/// For a change to be in the ledger, at most.
const SOON: Duration = Duration::from_secs(10);
const LEAVE: Duration = Duration::from_secs(15);

fn main() -> Result<()> {
    // `cargo test --benches` asks whether it starts; measuring is for `cargo bench`.
    if !parts::measuring() {
        return Ok(());
    }
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?.block_on(measure())
}

async fn measure() -> Result<()> {
    println!("load average at the start: {}", load()?);
    let redis = RedisServer::start().await?;
    let plane = ControlPlane::start(Options::default()).await?;
    let cluster = Cluster::make(&plane, &redis).await?;

    let mut turns = Vec::new();
    for _ in 0..TURNS {
        turns.push(cluster.turn().await?);
    }
    let middle = |figure: &dyn Fn(&Turn) -> f64| median(turns.iter().map(figure));
    println!("{:44} {:>8}         {:>8}", "", "median", "aim");
    row("reading the list with a bare client", middle(&|turn| turn.list), "s", "");
    row("from the process's start to its first sync", middle(&|turn| turn.sync), "s", "");
    row("  as a ratio to the reading", middle(&|turn| turn.sync / turn.list), "", "<= 1.5");
    row("  CPU of the process, user and system", middle(&|turn| turn.cpu), "s", "");
    row("peak memory of a first sync (VmHWM)", middle(&|turn| turn.peak_mb), "MiB", "< 80");

    let reconciler = Reconciler::start(cluster.options()?).await?;
    cluster.ensure_ledgers_are_right().await?;
    let idle = cluster.idle(&reconciler).await?;
    row("CPU while nothing happens, of one core", idle.cpu_percent, "%", "~ 0");
    row("  scripts that Redis ran", idle.scripts, "/s", "");
    row("  commands in Redis, those in scripts too", idle.commands, "/s", "");
    println!("load average after that: {}", load()?);

    let (deleted, created) = cluster.changes().await?;
    row("a deleted executor is out of the ledger after", median(deleted), "s", "< 1");
    row("a created executor is in the ledger after", median(created), "s", "< 1");
    row("memory at the end (VmRSS)", reconciler.process().resident_mb()?, "MiB", "");
    row("peak memory at the end (VmHWM)", reconciler.process().peak_mb()?, "MiB", "< 80");
    cluster.ensure_ledgers_are_right().await
}

fn row(what: &str, value: f64, unit: &str, aim: &str) {
    println!("{what:46} {value:>8.3} {unit:5} {aim:>8}");
}

/// The machine's, over the last minute and the last five.
fn load() -> Result<String> {
    let text = std::fs::read_to_string("/proc/loadavg")?;
    Ok(text.split_whitespace().take(2).collect::<Vec<_>>().join(", "))
}

/// A reading of the list, and a first sync after it. Times in seconds.
struct Turn {
    list: f64,
    sync: f64,
    cpu: f64,
    peak_mb: f64,
}

/// What happens while nothing happens; of commands so many per second.
struct Idle {
    cpu_percent: f64,
    scripts: f64,
    commands: f64,
}

/// The apiserver with all the pods, and the Redis for their ledgers.
struct Cluster<'a> {
    plane: &'a ControlPlane,
    redis: &'a RedisServer,
    client: Client,
    namespace: String,
    /// A real executor's: half of what it is.
    environment: Value,
}

impl<'a> Cluster<'a> {
    async fn make(plane: &'a ControlPlane, redis: &'a RedisServer) -> Result<Self> {
        let (client, namespace) = (plane.client()?, plane.namespace("cluster").await?);
        for capacity in ["spot", "on-demand"] {
            nodes::ensure(&client, capacity, usize::try_from(NODES)?).await?;
        }
        let cluster = Self { plane, redis, client, namespace, environment: environment()? };
        let started = Instant::now();
        let numbers = (0..JOBS).flat_map(|job| (0..=EXECUTORS).map(move |id| (job, id)));
        let making = stream::iter(numbers).map(|(job, id)| cluster.post(job, id)).buffer_unordered(AT_ONCE);
        making.try_for_each(async |()| Ok(())).await?;
        let took = started.elapsed();
        let bytes = cluster.read_list().await?;
        let pods = u64::from(JOBS * (1 + EXECUTORS));
        println!("{pods} pods of {} bytes each in {JOBS} jobs, made in {} s", bytes / pods, took.as_secs());
        Ok(cluster)
    }

    /// Makes an executor of a job, or its driver, which is number 0.
    async fn post(&self, job: u32, id: u32) -> Result<()> {
        let name = job_name(job);
        let pod = match id {
            0 => pods::driver(&name).annotation("workload/spot-ratio", "0.5").on_node("on-demand-0"),
            _ => self.executor(&name, job, id),
        };
        let posted = pod.post(&self.client, &self.namespace).await?;
        ensure!(posted.status == 201, "status {}: {}", posted.status, posted.object);
        Ok(())
    }

    /// As large as one that Spark makes, as the webhook would have placed it, and bound.
    fn executor(&self, name: &str, job: u32, id: u32) -> PodBuilder {
        let capacity = if id.is_multiple_of(2) { "spot" } else { "on-demand" };
        pods::executor(name, id)
            .annotation("workload/capacity-type", capacity)
            .environment(&self.environment)
            .on_node(&format!("{capacity}-{}", (job + id / 2) % NODES))
    }

    fn options(&self) -> Result<ReconcilerOptions> {
        ReconcilerOptions::default().cluster(self.plane).redis(self.redis)
    }

    async fn turn(&self) -> Result<Turn> {
        self.redis.flush().await?;
        let started = Instant::now();
        self.read_list().await?;
        let list = started.elapsed().as_secs_f64();

        let started = Instant::now();
        let mut reconciler = Reconciler::start(self.options()?).await?;
        let sync = started.elapsed().as_secs_f64();
        let (cpu, peak_mb) = (reconciler.process().cpu()?.as_secs_f64(), reconciler.process().peak_mb()?);
        // One that only stands by is ready too, and has synced nothing.
        ensure!(reconciler.leads().await?, "it does not lead");
        self.ensure_ledgers_are_right().await?;
        // Then it gives its Lease back, and the next need not wait for it.
        ensure!(reconciler.terminate(LEAVE).await?.success(), "it did not leave in order");
        Ok(Turn { list, sync, cpu, peak_mb })
    }

    /// Reads what the reconciler lists as it comes, on one connection, and keeps nothing. Answers how
    /// many bytes it was.
    async fn read_list(&self) -> Result<u64> {
        let client = self.plane.client()?;
        let (mut bytes, mut pages, mut from) = (0, 0, Some(String::new()));
        while let Some(token) = from {
            let selector = "spark-role%20in%20%28driver%2Cexecutor%29";
            let path = format!("/api/v1/pods?labelSelector={selector}&limit={PAGE}&continue={token}");
            let answer = client.send(Request::get(path).body(Body::empty())?).await?;
            ensure!(answer.status() == 200, "the list is answered with {}", answer.status());
            let (mut body, mut head) = (answer.into_body(), Vec::new());
            while let Some(frame) = body.frame().await {
                let Ok(data) = frame?.into_data() else { continue };
                bytes += u64::try_from(data.len())?;
                // Enough for the list's own metadata, which come first.
                if head.len() < 4096 {
                    head.extend_from_slice(&data);
                }
            }
            pages += 1;
            from = next_page(&head)?;
        }
        let right = (JOBS * (1 + EXECUTORS)).div_ceil(PAGE);
        ensure!(pages == right, "the list has {pages} pages, not {right}");
        Ok(bytes)
    }

    async fn idle(&self, reconciler: &Reconciler) -> Result<Idle> {
        let mut connection = self.redis.connection().await?;
        let () = redis::cmd("CONFIG").arg("RESETSTAT").query_async(&mut connection).await?;
        let (started, cpu) = (Instant::now(), reconciler.process().cpu()?);
        tokio::time::sleep(IDLE).await;
        let (took, cpu) = (started.elapsed().as_secs_f64(), reconciler.process().cpu()? - cpu);
        let statistics: String = redis::cmd("INFO").arg("commandstats").query_async(&mut connection).await?;
        let calls = calls(&statistics);
        let scripts = calls.get("evalsha").copied().unwrap_or_default();
        let ours = ["config|resetstat", "info"];
        let all = calls.iter().filter(|(name, _)| !ours.contains(name)).map(|(_, calls)| calls).sum::<f64>();
        Ok(Idle { cpu_percent: 100.0 * cpu.as_secs_f64() / took, scripts: scripts / took, commands: all / took })
    }

    /// Deletes an executor and creates another, one after the other in several jobs. Answers how many
    /// seconds after the API's answer each was seen in the ledger.
    async fn changes(&self) -> Result<(Vec<f64>, Vec<f64>)> {
        let api = Api::<Pod>::namespaced(self.client.clone(), &self.namespace);
        let (mut deleted, mut created) = (Vec::new(), Vec::new());
        for job in 0..CHANGES {
            pods::remove(&api, &format!("{}-exec-{EXECUTORS}", job_name(job))).await?;
            deleted.push(self.until_counted(job, EXECUTORS - 1).await?);
            // Of the same capacity.
            self.post(job, EXECUTORS + 2).await?;
            created.push(self.until_counted(job, EXECUTORS).await?);
        }
        Ok((deleted, created))
    }

    async fn until_counted(&self, job: u32, executors: u32) -> Result<f64> {
        let (started, mut connection) = (Instant::now(), self.redis.connection().await?);
        let counts = self.counts_key(&job_name(job));
        let seen = until(SOON, "the change in the ledger", async || {
            let (spot, on_demand): (u32, u32) = connection.hmget(&counts, &["spot", "on-demand"]).await?;
            Ok((spot + on_demand == executors).then(|| started.elapsed()))
        });
        Ok(seen.await?.as_secs_f64())
    }

    /// Fails unless every job's ledger counts all its executors and names as many, and there is no
    /// other ledger.
    async fn ensure_ledgers_are_right(&self) -> Result<()> {
        let mut connection = self.redis.connection().await?;
        for job in (0..JOBS).map(job_name) {
            let (counts, pods) = (self.counts_key(&job), format!("exec-pods:{{{}:{job}}}", self.namespace));
            let counted: (Option<u32>, Option<u32>) = connection.hmget(counts, &["spot", "on-demand"]).await?;
            let named: u32 = connection.hlen(pods).await?;
            let half = Some(EXECUTORS / 2);
            ensure!(
                counted == (half, half) && named == EXECUTORS,
                "{job} counts {counted:?} on spot and on-demand, and names {named}"
            );
        }
        let ledgers: Vec<String> = connection.keys("exec-count:*").await?;
        ensure!(ledgers.len() == usize::try_from(JOBS)?, "there are {} ledgers, not {JOBS}", ledgers.len());
        Ok(())
    }

    fn counts_key(&self, job: &str) -> String {
        format!("exec-count:{{{}:{job}}}", self.namespace)
    }
}

fn job_name(job: u32) -> String {
    format!("etl-{job:03}")
}

fn environment() -> Result<Value> {
    let review: Value = serde_json::from_slice(include_bytes!("../fixtures/k8s-1.20-spark-3.5-create-executor.json"))?;
    let environment = review.pointer("/request/object/spec/containers/0/env");
    environment.cloned().context("the fixture's executor has no environment")
}

/// The token of the next page, from the beginning of a list; none where it was the last.
fn next_page(head: &[u8]) -> Result<Option<String>> {
    let head = String::from_utf8_lossy(head);
    let (metadata, _) = head.split_once(r#""items":"#).context("the list does not begin with its metadata")?;
    let token = metadata.split_once(r#""continue":""#).and_then(|(_, rest)| rest.split_once('"'));
    Ok(token.map(|(token, _)| token.to_owned()))
}

/// How often each command was called, from `INFO commandstats`.
fn calls(statistics: &str) -> BTreeMap<&str, f64> {
    let of_line = |line| {
        let (name, rest) = str::strip_prefix(line, "cmdstat_")?.split_once(":calls=")?;
        Some((name, rest.split(',').next()?.parse().ok()?))
    };
    statistics.lines().filter_map(of_line).collect()
}
