//! What other jobs notice of a large one, and of a pass over very many: the webhook, the reconciler and a
//! real Redis, with a list of pods in this process for the Kubernetes API, because a real apiserver would
//! have to make 200,000 pods first.
//!
//! First a small job's admissions, by turns while nothing else happens and while a job of 100,000 executors
//! changes. Then 10,000 jobs of 20 executors: how long Redis needs to get all ledgers back after it has lost
//! them, and a pass over ledgers that are right, and how soon the loss of an executor is in its ledger
//! meanwhile. Scripts block Redis for everybody, so the longest one counts too.
//!
//! ```sh
//! cargo build --profile dist -p balancer-webhook -p balancer-reconcile
//! cargo bench -p balancer-tests --bench large_jobs
//! ```

#![allow(clippy::indexing_slicing, reason = "the JSON is this benchmark's own")]

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::ops::Bound::{Excluded, Unbounded};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use balancer_tests::pods::{self, PodBuilder};
use balancer_tests::process::scratch_path;
use balancer_tests::raw::{Body, Connection, Protocol, pieces, whole};
use balancer_tests::reconciler::{Reconciler, ReconcilerOptions};
use balancer_tests::redis::RedisServer;
use balancer_tests::wait::{SOON, while_progressing};
use balancer_tests::webhook::{Webhook, WebhookOptions};
use balancer_tests::{endpoint, parts, reviews};
use futures::stream;
use http::{Method, Request, Response, StatusCode};
use http_body_util::BodyExt;
use hyper::body::{Bytes, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use redis::aio::MultiplexedConnection;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, timeout_at};

/// The namespace of the reviews in `fixtures`.
const NAMESPACE: &str = "sandbox";
/// Executors of the large job, and of the small one.
const LARGE: u32 = 100_000;
const SMALL: u32 = 50;
/// Measurements of the small job's admissions, each while nothing happens and while the large job changes.
const TURNS: usize = 5;
const TURN: Duration = Duration::from_secs(10);
/// Between two admissions of the small job.
const ADMIT_EVERY: Duration = Duration::from_millis(10);
/// So often the large job loses an executor and gets another one: 300 changes in a second.
const CHANGE_EVERY: Duration = Duration::from_micros(6667);

/// Of the passes over all jobs.
const JOBS: u32 = 10_000;
const EXECUTORS: u32 = 20;
/// Between two looks for lost executors in their ledgers, and looks from one loss to the next.
const LOOK_EVERY: Duration = Duration::from_millis(5);
const LOOKS: u32 = 10;
/// How long passes over ledgers that are right go on.
const PASSES: Duration = Duration::from_secs(40);

/// Nodes of each capacity: one has about a hundred executors, of as many jobs if there are.
const NODES: u32 = 1000;

/// Redis keeps what takes longer than this, in µs.
const SLOW: &str = "500";

fn main() -> Result<()> {
    // `cargo test --benches` asks whether it starts; measuring is for `cargo bench`.
    if !parts::measuring() {
        return Ok(());
    }
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?.block_on(async {
        measure_large_job().await?;
        measure_many_jobs().await
    })
}

fn row(what: &str, value: f64, unit: &str, aim: &str) {
    println!("{what:60} {value:>10.3} {unit:5} {aim:>8}");
}

async fn measure_large_job() -> Result<()> {
    let (large, small) = (0, 1);
    let redis = slow_redis().await?;
    let api = Api::start(&[(large, LARGE), (small, SMALL)]).await?;
    let kubeconfig = api.kubeconfig()?;
    let webhook = WebhookOptions::default().redis(&redis)?.kubeconfig(&kubeconfig).env("RECONCILE_ENABLED", "false");
    let webhook = Webhook::start(webhook).await?;
    let started = Instant::now();
    let reconciler = Reconciler::start(ReconcilerOptions::default().redis(&redis)?.kubeconfig(&kubeconfig)).await?;
    until_named(&redis, large, LARGE).await?;
    row(&format!("from the reconciler's start to the ledger of {LARGE}"), started.elapsed().as_secs_f64(), "s", "");
    print_slowest(&redis).await?;

    let (mut number, mut change) = (SMALL, 0);
    let (mut quiet, mut changing) = (Vec::new(), Vec::new());
    for _ in 0..TURNS {
        // The webhook ends a connection at an age of one to two minutes.
        let admissions = Connection::open(webhook.port, Protocol::Http2).await?;
        quiet.extend(admit(&api, &admissions, small, &mut number).await?);
        let (latencies, changed) = futures::try_join!(
            admit(&api, &admissions, small, &mut number),
            change_job(&api, &admissions, large, change)
        )?;
        changing.extend(latencies);
        change = changed;
    }
    for share in [0.5, 0.99] {
        let percent = share * 100.0;
        let (quiet, changing) = (quantile(&mut quiet, share), quantile(&mut changing, share));
        row(&format!("p{percent:.0} of a small job's admissions"), quiet * 1e3, "ms", "");
        row(&format!("  while the large job changes, {change} executors in all"), changing * 1e3, "ms", "");
        row("  as a ratio", changing / quiet, "", "<= 2");
    }
    print_slowest(&redis).await?;
    until_named(&redis, large, LARGE).await?;
    row("memory of the reconciler (VmRSS)", reconciler.process().resident_mb()?, "MiB", "");
    Ok(())
}

/// Creates executors of a job for one turn, and removes as many. Returns how long each admission took, in
/// seconds, from the time at which it was due.
async fn admit(api: &Arc<Api>, connection: &Connection, job: u32, number: &mut u32) -> Result<Vec<f64>> {
    let (mut ticks, started) = (interval(ADMIT_EVERY), Instant::now());
    ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
    let (mut admissions, mut latencies) = (JoinSet::new(), Vec::new());
    while started.elapsed() < TURN {
        let due = ticks.tick().await.into_std();
        *number += 1;
        let (api, id) = (Arc::clone(api), Id { job, executor: *number });
        let mut connection = connection.another_stream().context("no HTTP/2")?;
        admissions.spawn(async move {
            let capacity = place(&mut connection, id).await?;
            let took = due.elapsed().as_secs_f64();
            api.add(id, &capacity);
            api.remove(Id { executor: id.executor - SMALL, ..id });
            Ok::<_, anyhow::Error>(took)
        });
        while let Some(took) = admissions.try_join_next() {
            latencies.push(took??);
        }
    }
    while let Some(took) = admissions.join_next().await {
        latencies.push(took??);
    }
    Ok(latencies)
}

/// Replaces executors of a job for one turn, from the one after number `changed` on. Returns how many it has
/// replaced in all.
async fn change_job(api: &Arc<Api>, connection: &Connection, job: u32, mut changed: u32) -> Result<u32> {
    let (mut ticks, started) = (interval(CHANGE_EVERY), Instant::now());
    let mut connection = connection.another_stream().context("no HTTP/2")?;
    while started.elapsed() < TURN {
        ticks.tick().await;
        changed += 1;
        api.remove(Id { job, executor: changed });
        let id = Id { job, executor: LARGE + changed };
        let capacity = place(&mut connection, id).await?;
        api.add(id, &capacity);
    }
    Ok(changed)
}

/// Asks the webhook where an executor goes.
async fn place(connection: &mut Connection, id: Id) -> Result<String> {
    let mut review = reviews::creation(&id.job(), id.executor.into())?;
    review["request"]["object"]["metadata"]["ownerReferences"][0]["name"] = format!("{}-driver", id.job()).into();
    let answer = connection.post("/mutate?timeout=10s", &review).await?;
    let patch = reviews::patch(&review, &answer)?;
    let pod = reviews::patched(&review, &patch)?;
    let capacity = pod["metadata"]["annotations"]["workload/capacity-type"].as_str();
    Ok(capacity.context("the executor was not placed")?.to_owned())
}

async fn measure_many_jobs() -> Result<()> {
    let redis = slow_redis().await?;
    let jobs: Vec<_> = (0..JOBS).map(|job| (job, EXECUTORS)).collect();
    let api = Api::start(&jobs).await?;
    let kubeconfig = api.kubeconfig()?;
    let options = || anyhow::Ok(ReconcilerOptions::default().redis(&redis)?.kubeconfig(&kubeconfig));

    println!("{JOBS} jobs of {EXECUTORS} executors");
    let (started, cpu) = (Instant::now(), redis_cpu(&redis).await?);
    let mut reconciler = Reconciler::start(options()?).await?;
    until_all_ledgers(&redis).await?;
    row("from the reconciler's start until all ledgers exist", started.elapsed().as_secs_f64(), "s", "");
    row("  CPU of Redis", redis_cpu(&redis).await? - cpu, "s", "");
    row("  CPU of the reconciler", reconciler.process().cpu()?.as_secs_f64(), "s", "");
    print_slowest(&redis).await?;

    let (cpu, own) = (redis_cpu(&redis).await?, reconciler.process().cpu()?);
    redis.flush().await?;
    let started = Instant::now();
    let all = async {
        until_all_ledgers(&redis).await?;
        Ok(started.elapsed().as_secs_f64())
    };
    let losing = Losses { api: &api, redis: &redis, executor: EXECUTORS };
    let (took, lags) = losing.during(all).await?;
    row("from the loss of all data until all ledgers are back", took, "s", "");
    row("  CPU of Redis", redis_cpu(&redis).await? - cpu, "s", "");
    row("  CPU of the reconciler", (reconciler.process().cpu()? - own).as_secs_f64(), "s", "");
    print_lags(lags);
    print_slowest(&redis).await?;
    ensure!(reconciler.terminate(SOON).await?.success(), "it did not leave in order");

    let mut reconciler = Reconciler::start(options()?.env("RECONCILE_INTERVAL_SECONDS", "10")).await?;
    until_all_ledgers(&redis).await?;
    let passes = async |reconciler: &Reconciler| {
        let metrics = reconciler.metrics().await?;
        let sum = |name| metrics.sum(name, &[]).unwrap_or_default();
        anyhow::Ok((
            sum("spot_balancer_reconcile_resync_seconds_count"),
            sum("spot_balancer_reconcile_resync_seconds_sum"),
        ))
    };
    let (before, cpu, own) = (passes(&reconciler).await?, redis_cpu(&redis).await?, reconciler.process().cpu()?);
    let waiting = async {
        tokio::time::sleep(PASSES).await;
        Ok(())
    };
    let losing = Losses { api: &api, redis: &redis, executor: EXECUTORS - 1 };
    let ((), lags) = losing.during(waiting).await?;
    let after = passes(&reconciler).await?;
    let count = after.0 - before.0;
    row("a pass over ledgers that are right, one every 10 s", (after.1 - before.1) / count, "s", "");
    row("  CPU of Redis, of one core", 100.0 * (redis_cpu(&redis).await? - cpu) / PASSES.as_secs_f64(), "%", "");
    let own = (reconciler.process().cpu()? - own).as_secs_f64();
    row("  CPU of the reconciler, of one core", 100.0 * own / PASSES.as_secs_f64(), "%", "");
    print_lags(lags);
    print_slowest(&redis).await?;
    row("peak memory of the reconciler (VmHWM)", reconciler.process().peak_mb()?, "MiB", "");
    ensure!(reconciler.terminate(SOON).await?.success(), "it did not leave in order");
    Ok(())
}

/// Executors that are lost one after the other, each in another job: number `executor` of it.
struct Losses<'a> {
    api: &'a Api,
    redis: &'a RedisServer,
    executor: u32,
}

impl Losses<'_> {
    /// Loses executors until `work` is done, and returns how long each was still in the ledger, in seconds, or
    /// how long the ledger was missing after that.
    async fn during<T>(&self, work: impl Future<Output = Result<T>>) -> Result<(T, Vec<f64>)> {
        let (done, mut is_done) = watch::channel(false);
        let losing = async {
            let (mut ticks, mut looks) = (interval(LOOK_EVERY), 0);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            let (mut lost, mut lags) = (Vec::<(Id, Instant)>::new(), Vec::new());
            let mut connection = self.redis.connection().await?;
            while !(*is_done.borrow_and_update() && lost.is_empty()) {
                ticks.tick().await;
                let next = looks / LOOKS;
                if looks % LOOKS == 0 && next < JOBS && !*is_done.borrow() {
                    // Not in the order in which the reconciler goes through the jobs.
                    let id = Id { job: next * 7919 % JOBS, executor: self.executor };
                    self.api.remove(id);
                    lost.push((id, Instant::now()));
                }
                looks += 1;
                if lost.is_empty() {
                    continue;
                }
                let mut asked = redis::pipe();
                for (id, _) in &lost {
                    asked.exists(id.counts_key()).hexists(id.pods_key(), id.pod());
                }
                let answers: Vec<bool> = asked.query_async(&mut connection).await?;
                let mut answers = answers.chunks_exact(2);
                lost.retain(|(_, at)| {
                    let is_waiting = answers.next() != Some(&[true, false]);
                    if !is_waiting {
                        lags.push(at.elapsed().as_secs_f64());
                    }
                    is_waiting
                });
                ensure!(lost.iter().all(|(_, at)| at.elapsed() < SOON), "a loss is not in its ledger");
            }
            Ok(lags)
        };
        let working = async {
            let result = work.await;
            let _ = done.send(true);
            result
        };
        futures::try_join!(working, losing)
    }
}

fn print_lags(mut lags: Vec<f64>) {
    row(
        &format!("  the loss of an executor is in its ledger after, p50 of {}", lags.len()),
        quantile(&mut lags, 0.5),
        "s",
        "",
    );
    row("    p99", quantile(&mut lags, 0.99), "s", "");
    row("    at most", quantile(&mut lags, 1.0), "s", "");
}

/// The value that this share of the values do not exceed.
#[expect(clippy::cast_possible_truncation, clippy::cast_precision_loss, clippy::cast_sign_loss, reason = "an index")]
fn quantile(values: &mut [f64], share: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    let index = (values.len().saturating_sub(1) as f64 * share).ceil() as usize;
    values.get(index).copied().unwrap_or(f64::NAN)
}

async fn slow_redis() -> Result<RedisServer> {
    let arguments = ["--slowlog-log-slower-than", SLOW, "--slowlog-max-len", "100000"];
    RedisServer::start_as(arguments.map(str::to_owned).to_vec()).await
}

/// Prints the longest script since the last time.
async fn print_slowest(redis: &RedisServer) -> Result<()> {
    let mut connection = redis.connection().await?;
    // Number, time, duration in µs, command; then the client.
    type Slow = (u64, u64, u64, Vec<String>, redis::Value, redis::Value);
    let slow: Vec<Slow> = redis::cmd("SLOWLOG").arg("GET").arg(-1).query_async(&mut connection).await?;
    let () = redis::cmd("SLOWLOG").arg("RESET").query_async(&mut connection).await?;
    let scripts = slow.iter().filter(|slow| slow.3.first().is_some_and(|name| name.eq_ignore_ascii_case("evalsha")));
    let longest = scripts.clone().max_by_key(|slow| slow.2);
    let micros = longest.map_or(0, |slow| slow.2);
    row("the longest script", Duration::from_micros(micros).as_secs_f64() * 1e3, "ms", "<= 5");
    println!("  longer than {SLOW} µs: {} scripts", scripts.count());
    if let Some((_, _, _, command, ..)) = longest {
        println!("  {}", command.iter().take(8).map(String::as_str).collect::<Vec<_>>().join(" "));
    }
    Ok(())
}

/// User and system time so far, in seconds.
async fn redis_cpu(redis: &RedisServer) -> Result<f64> {
    let text: String = redis::cmd("INFO").arg("cpu").query_async(&mut redis.connection().await?).await?;
    let mut cpu = 0.0;
    for field in ["used_cpu_sys:", "used_cpu_user:"] {
        let value = text.lines().find_map(|line| line.strip_prefix(field));
        cpu += value.with_context(|| format!("INFO without {field}"))?.trim().parse::<f64>()?;
    }
    Ok(cpu)
}

/// Waits until the job's ledger names so many executors.
async fn until_named(redis: &RedisServer, job: u32, executors: u32) -> Result<()> {
    let (mut connection, key) = (redis.connection().await?, Id { job, executor: 0 }.pods_key());
    while_progressing("the ledger of the large job", async || {
        let named: u32 = redis::cmd("HLEN").arg(&key).query_async(&mut connection).await?;
        Ok((named, (named == executors).then_some(())))
    })
    .await
}

/// Waits until all jobs have both keys of their ledgers.
async fn until_all_ledgers(redis: &RedisServer) -> Result<()> {
    let mut connection: MultiplexedConnection = redis.connection().await?;
    while_progressing("all ledgers", async || {
        let keys: u32 = redis::cmd("DBSIZE").query_async(&mut connection).await?;
        Ok((keys, (keys >= 2 * JOBS).then_some(())))
    })
    .await
}

/// A pod: number 0 of a job is its driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Id {
    job: u32,
    executor: u32,
}

impl Id {
    fn job(self) -> String {
        format!("etl-{:05}", self.job)
    }

    fn pod(self) -> String {
        match self.executor {
            0 => format!("{}-driver", self.job()),
            number => format!("{}-exec-{number}", self.job()),
        }
    }

    fn counts_key(self) -> String {
        format!("exec-count:{{{NAMESPACE}:{}}}", self.job())
    }

    fn pods_key(self) -> String {
        format!("exec-pods:{{{NAMESPACE}:{}}}", self.job())
    }

    /// The node that it is bound to, if it is of this capacity.
    fn node(self, capacity: &str) -> String {
        format!("{capacity}-{}", (self.job + self.executor) % NODES)
    }

    /// As large as the small ones of Spark; bound to a node of this capacity.
    fn object(self, capacity: &str, version: usize) -> PodBuilder {
        let pod = match self.executor {
            0 => pods::driver(&self.job()).annotation("workload/spot-ratio", "0.5").named(&self.pod()),
            number => pods::executor(&self.job(), number).annotation("workload/capacity-type", capacity),
        };
        pod.namespace(NAMESPACE).on_node(&self.node(capacity)).with(|pod| {
            pod["metadata"]["uid"] = format!("00000000-0000-4000-8000-{:05}{:07}", self.job, self.executor).into();
            pod["metadata"]["resourceVersion"] = version.to_string().into();
            pod["metadata"]["creationTimestamp"] = "2026-01-01T00:00:00Z".into();
            pod["status"] = json!({"phase": "Running"});
        })
    }
}

/// Stands for the Kubernetes API: lists and watches pods and nodes, and keeps a Lease. Over plain HTTP.
struct Api {
    port: u16,
    state: Mutex<State>,
    /// How many lines the history has.
    length: watch::Sender<usize>,
}

#[derive(Default)]
struct State {
    pods: BTreeMap<Id, Bytes>,
    /// What a watch has to see; the resourceVersion of a change is the number of lines with it.
    history: Vec<Bytes>,
    lease: Option<Value>,
    lease_version: u64,
}

impl Api {
    /// With jobs of these numbers, each with a driver and so many executors, half of them on spot.
    async fn start(jobs: &[(u32, u32)]) -> Result<Arc<Self>> {
        let mut state = State::default();
        for &(job, executors) in jobs {
            for executor in 0..=executors {
                let (id, capacity) = (Id { job, executor }, if executor % 2 == 1 { "spot" } else { "on-demand" });
                state.pods.insert(id, id.object(capacity, 1).value().to_string().into());
            }
        }
        // The lists' version.
        state.history.push(Bytes::new());
        let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
        let api = Arc::new(Self {
            port: listener.local_addr()?.port(),
            state: Mutex::new(state),
            length: watch::channel(1).0,
        });
        let serving = Arc::clone(&api);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                // Else it only is slower.
                let _ = stream.set_nodelay(true);
                let api = Arc::clone(&serving);
                let service = service_fn(move |request| Arc::clone(&api).answer(request));
                tokio::spawn(http1::Builder::new().serve_connection(TokioIo::new(stream), service));
            }
        });
        Ok(api)
    }

    fn kubeconfig(&self) -> Result<PathBuf> {
        let path = scratch_path("kubeconfig")?;
        let kubeconfig = json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "tests", "cluster": {"server": endpoint::http(self.port)}}],
            "users": [{"name": "user", "user": {}}],
            "contexts": [{"name": "tests", "context": {"cluster": "tests", "user": "user", "namespace": NAMESPACE}}],
            "current-context": "tests",
        });
        std::fs::write(&path, kubeconfig.to_string())?;
        Ok(path)
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, id: Id, capacity: &str) {
        let mut state = self.state();
        let version = state.history.len() + 1;
        let pod = id.object(capacity, version).value().to_string();
        state.history.push(format!("{{\"type\":\"ADDED\",\"object\":{pod}}}\n").into());
        state.pods.insert(id, pod.into());
        self.length.send_replace(version);
    }

    fn remove(&self, id: Id) {
        let mut state = self.state();
        if state.pods.remove(&id).is_none() {
            return;
        }
        let version = state.history.len() + 1;
        let pod = id.object("spot", version);
        state.history.push(format!("{{\"type\":\"DELETED\",\"object\":{}}}\n", pod.value()).into());
        self.length.send_replace(version);
    }

    async fn answer(self: Arc<Self>, request: Request<Incoming>) -> Result<Response<Body>, Infallible> {
        let (head, body) = request.into_parts();
        let query: BTreeMap<&str, &str> =
            head.uri.query().unwrap_or_default().split('&').filter_map(|pair| pair.split_once('=')).collect();
        let path = head.uri.path();
        let missing = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": "not found", "reason": "NotFound", "code": 404});
        let (status, body) = if query.contains_key("watch") {
            (StatusCode::OK, Arc::clone(&self).watch(path, &query))
        } else if path == "/api/v1/pods" {
            (StatusCode::OK, whole(self.list(&query)))
        } else if path == "/api/v1/nodes" {
            (StatusCode::OK, whole(nodes().to_string()))
        } else if path == "/version" {
            let version = json!({
                "major": "1", "minor": "33", "gitVersion": "v1.33.0", "gitCommit": "", "gitTreeState": "",
                "buildDate": "", "goVersion": "", "compiler": "", "platform": "",
            });
            (StatusCode::OK, whole(version.to_string()))
        } else if path.contains("/leases") {
            let sent = body.collect().await.map(http_body_util::Collected::to_bytes).unwrap_or_default();
            match self.lease(&head.method, &sent) {
                Some(lease) => (StatusCode::OK, whole(lease.to_string())),
                None => (StatusCode::NOT_FOUND, whole(missing.to_string())),
            }
        } else if let Some(pod) = self.pod(path) {
            (StatusCode::OK, whole(pod))
        } else {
            (StatusCode::NOT_FOUND, whole(missing.to_string()))
        };
        let mut answer = Response::new(body);
        *answer.status_mut() = status;
        answer.headers_mut().insert("content-type", http::HeaderValue::from_static("application/json"));
        Ok(answer)
    }

    /// A page of pods. Its version is that of the first page: whoever watches from there on sees some changes again.
    fn list(&self, query: &BTreeMap<&str, &str>) -> String {
        let state = self.state();
        let limit = query.get("limit").and_then(|limit| limit.parse().ok()).unwrap_or(usize::MAX);
        let token = query.get("continue").and_then(|token| {
            let mut numbers = token.split('.').map(str::parse::<u32>);
            let mut next = || numbers.next()?.ok();
            Some((next()?, Id { job: next()?, executor: next()? }))
        });
        let (version, after) = match token {
            Some((version, id)) => (version.to_string(), Excluded(id)),
            None => (state.history.len().to_string(), Unbounded),
        };
        let mut items = state.pods.range((after, Unbounded));
        let (mut page, mut last) = (String::new(), None);
        for (id, pod) in items.by_ref().take(limit) {
            page.push_str(if last.is_some() { "," } else { "" });
            page.push_str(std::str::from_utf8(pod).unwrap_or_default());
            last = Some(*id);
        }
        let token = last.filter(|_| items.next().is_some());
        let token = token.map_or(String::new(), |Id { job, executor }| format!("{version}.{job}.{executor}"));
        format!(
            r#"{{"kind":"PodList","apiVersion":"v1","metadata":{{"resourceVersion":"{version}","continue":"{token}"}},"items":[{page}]}}"#
        )
    }

    /// The changes of pods from a version on, for as long as is asked for. Nodes never change.
    fn watch(self: Arc<Self>, path: &str, query: &BTreeMap<&str, &str>) -> Body {
        let number = |name: &str| query.get(name).and_then(|value| value.parse::<u32>().ok());
        let end = tokio::time::Instant::now() + Duration::from_secs(number("timeoutSeconds").unwrap_or(60).into());
        let at = if path == "/api/v1/pods" { number("resourceVersion") } else { None };
        let at = at.map_or(usize::MAX, |version| usize::try_from(version).unwrap_or(usize::MAX));
        let length = self.length.subscribe();
        pieces(stream::unfold((self, length, at), move |(api, mut length, at)| async move {
            let has_more = timeout_at(end, length.wait_for(|length| *length > at)).await.is_ok_and(|more| more.is_ok());
            if !has_more {
                return None;
            }
            let (lines, now) = {
                let state = api.state();
                (state.history.get(at..).unwrap_or_default().concat(), state.history.len())
            };
            Some((Bytes::from(lines), (api, length, now)))
        }))
    }

    fn lease(&self, method: &Method, sent: &[u8]) -> Option<Value> {
        let mut state = self.state();
        if *method != Method::GET {
            state.lease_version += 1;
            let mut lease: Value = serde_json::from_slice(sent).ok()?;
            lease["metadata"]["resourceVersion"] = state.lease_version.to_string().into();
            state.lease = Some(lease);
        }
        state.lease.clone()
    }

    /// A pod by its path.
    fn pod(&self, path: &str) -> Option<Bytes> {
        let name = path.strip_prefix("/api/v1/namespaces/")?.strip_prefix(NAMESPACE)?.strip_prefix("/pods/")?;
        let (job, rest) = name.strip_prefix("etl-")?.split_once('-')?;
        let executor = if rest == "driver" { 0 } else { rest.strip_prefix("exec-")?.parse().ok()? };
        self.state().pods.get(&Id { job: job.parse().ok()?, executor }).cloned()
    }
}

/// Those of both capacities.
fn nodes() -> Value {
    let all = ["spot", "on-demand"].into_iter().flat_map(|capacity| (0..NODES).map(move |number| (capacity, number)));
    let items: Vec<_> = all
        .map(|(capacity, number)| {
            let name = Id { job: 0, executor: number }.node(capacity);
            let labels = json!({balancer_tests::nodes::CAPACITY: capacity, "kubernetes.io/hostname": name});
            json!({"metadata": {"name": name, "resourceVersion": "1", "labels": labels}})
        })
        .collect();
    json!({"kind": "NodeList", "apiVersion": "v1", "metadata": {"resourceVersion": "1"}, "items": items})
}
