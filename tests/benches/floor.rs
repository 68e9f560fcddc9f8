//! What an admission costs over a server that does nothing: CPU per admission and throughput of the
//! release binary as ratios to `floor`, measured side by side in one run, over HTTP/1.1 and HTTP/2,
//! with Redis and with memory. HTTP/1.1 is eight connections, one request at a time each, as older
//! apiservers do it; HTTP/2 two connections of sixteen streams. The executors are those of one job,
//! which follow their driver's ratio, or those of fifty jobs, each of which states a ratio itself. Redis
//! is one server, a cluster, and a primary that sentinels watch; the floor has the one server.
//!
//! ```sh
//! cargo build --profile dist -p balancer-webhook -p balancer-reconcile
//! cargo bench -p balancer-tests --bench floor
//! ```
//!
//! Words after `--` choose the rows that contain all of them: `-- HTTP/1.1 fifty`. With the path of another
//! version's webhook in `SPOT_BALANCER_BEFORE` there are rows for it too, on one server and on memory.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use balancer_tests::certificate::authority;
use balancer_tests::figures::median;
use balancer_tests::process::{Process, scratch_path};
use balancer_tests::raw::{Connection, Protocol, tcp, whole};
use balancer_tests::redis::{RedisServer, Servers};
use balancer_tests::redis_cluster::RedisCluster;
use balancer_tests::redis_sentinel::SentinelSet;
use balancer_tests::wait::until_true;
use balancer_tests::{parts, port};
use futures::future::try_join_all;
use http::Request;
use hyper::body::Bytes;
use redis::aio::MultiplexedConnection;

/// Each server's turn; short enough that a slower minute of the machine hits both.
const TURN: Duration = Duration::from_secs(1);
const ROUNDS: usize = 9;
/// In the load of several jobs.
const JOBS: usize = 50;

fn main() -> Result<()> {
    // `cargo test --benches` asks whether it starts; measuring is for `cargo bench`.
    if !parts::measuring() {
        return Ok(());
    }
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?.block_on(measure())
}

async fn measure() -> Result<()> {
    let redis = RedisServer::start().await?;
    let chosen: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with('-')).collect();
    // The stores of a group have turns next to each other, and next to a floor on the first.
    let (cluster, sentinels) = (RedisCluster::start().await?, SentinelSet::start().await?);
    let mut with_redis = vec![
        Store::redis("Redis", &redis, [&redis]).await?,
        Store::redis("cluster", &cluster, cluster.primaries().await.iter().filter_map(|node| cluster.nodes.get(*node)))
            .await?,
        Store::redis("sentinel", &sentinels, sentinels.servers.get(sentinels.primary().await?)).await?,
    ];
    let mut with_memory = vec![Store::memory()?];
    let before = std::env::var_os("SPOT_BALANCER_BEFORE").map(PathBuf::from);
    let redis_before = if before.is_some() { Some(RedisServer::start().await?) } else { None };
    if let Some((program, redis)) = before.zip(redis_before.as_ref()) {
        let store = Store::redis("Redis before", redis, [redis]).await?;
        with_redis.push(Store { program: program.clone(), ..store });
        with_memory.push(Store { name: "memory before", program, ..Store::memory()? });
    }
    let groups = [with_redis, with_memory];
    println!(
        "{:30} {:>9} {:>9} {:>6} {:>9} {:>9} {:>6} {:>9} {:>9} {:>8}",
        "", "floor µs", "ours µs", "ratio", "floor /s", "ours /s", "ratio", "its Redis", "our Redis", "ours MB"
    );
    for executors in [Executors::OfOneJob, Executors::OfFiftyJobs] {
        for group in &groups {
            for protocol in [Protocol::Http1, Protocol::Http2] {
                let load = Load::new(protocol, executors)?;
                let title = |store: &Store| format!("{}, {}, {}", load.protocol_name(), store.name, executors.name());
                let is_chosen = |store: &&Store| chosen.iter().all(|word| title(store).contains(word.as_str()));
                let stores: Vec<&Store> = group.iter().filter(is_chosen).collect();
                if let (Some(first), false) = (group.first(), stores.is_empty()) {
                    compare(&load, first, &stores, title).await?;
                }
            }
        }
    }
    Ok(())
}

/// Measures the floor, and the webhook on each of the stores, by turns. Prints a row for each store.
async fn compare(load: &Load, floor: &Store, stores: &[&Store], title: impl Fn(&Store) -> String) -> Result<()> {
    let mut servers = vec![(Server::floor(floor).await?, floor)];
    for store in stores {
        let ours = Server::ours(store).await?;
        load.post_drivers(&ours).await?;
        servers.push((ours, store));
    }
    let mut rounds = Vec::new();
    for round in 0..ROUNDS {
        // In the other order every other time, because the machine may become slower or faster all the time.
        let mut order: Vec<usize> = (0..servers.len()).collect();
        if round % 2 == 1 {
            order.reverse();
        }
        let mut turns = BTreeMap::new();
        for index in order {
            if let Some((server, store)) = servers.get(index) {
                turns.insert(index, load.run(server, store).await?);
            }
        }
        rounds.push(turns);
    }
    for (index, (server, store)) in servers.iter().enumerate().skip(1) {
        let middle = |measure: &dyn Fn(&Turn, &Turn) -> f64| {
            median(rounds.iter().filter_map(|turns| Some(measure(turns.get(&0)?, turns.get(&index)?))))
        };
        println!(
            "{:30} {:>9.1} {:>9.1} {:>6.2} {:>9.0} {:>9.0} {:>6.2} {:>9.1} {:>9.1} {:>8.1}",
            title(store),
            middle(&|floor, _| floor.cpu_us),
            middle(&|_, ours| ours.cpu_us),
            middle(&|floor, ours| ours.cpu_us / floor.cpu_us),
            middle(&|floor, _| floor.per_second),
            middle(&|_, ours| ours.per_second),
            middle(&|floor, ours| ours.per_second / floor.per_second),
            middle(&|floor, _| floor.redis_us),
            middle(&|_, ours| ours.redis_us),
            server.process.resident_mb()?,
        );
    }
    Ok(())
}

/// What a server did in its turn; CPU is for each admission, of the server and of its Redis.
struct Turn {
    cpu_us: f64,
    redis_us: f64,
    per_second: f64,
}

/// Where a webhook keeps its ledgers.
struct Store {
    name: &'static str,
    /// The webhook.
    program: PathBuf,
    environment: Vec<(&'static str, String)>,
    /// To each server that holds ledgers; replicas are left out.
    servers: Vec<MultiplexedConnection>,
}

impl Store {
    fn memory() -> Result<Self> {
        let environment = vec![("STORE", "memory".to_owned())];
        Ok(Self { name: "memory", program: parts::program("balancer-webhook")?, environment, servers: Vec::new() })
    }

    /// With these servers, of which `primaries` hold the ledgers. The webhook finds out how they work together.
    async fn redis(
        name: &'static str,
        servers: &impl Servers,
        primaries: impl IntoIterator<Item = &RedisServer>,
    ) -> Result<Self> {
        let mut environment = vec![("STORE", "redis".to_owned()), ("REDIS_URL", servers.url())];
        environment.extend(servers.sentinel_master().map(|master| ("REDIS_SENTINEL_MASTER", master.to_owned())));
        let servers = try_join_all(primaries.into_iter().map(RedisServer::connection)).await?;
        Ok(Self { name, program: parts::program("balancer-webhook")?, environment, servers })
    }

    /// User and system time of all its servers so far, in seconds.
    async fn cpu(&self) -> Result<f64> {
        let mut cpu = 0.0;
        for mut server in self.servers.iter().cloned() {
            let text: String = redis::cmd("INFO").arg("cpu").query_async(&mut server).await?;
            for field in ["used_cpu_sys:", "used_cpu_user:"] {
                let value = text.lines().find_map(|line| line.strip_prefix(field));
                cpu += value.with_context(|| format!("INFO without {field}"))?.trim().parse::<f64>()?;
            }
        }
        Ok(cpu)
    }
}

struct Server {
    process: Process,
    port: u16,
}

impl Server {
    async fn floor(store: &Store) -> Result<Self> {
        Self::start(Path::new(env!("CARGO_BIN_EXE_floor")), store).await
    }

    async fn ours(store: &Store) -> Result<Self> {
        Self::start(&store.program, store).await
    }

    async fn start(program: &Path, store: &Store) -> Result<Self> {
        let (port, certificate) = (port::free()?, authority()?.issue()?);
        // Never asked: the drivers are learnt before the first executor.
        let kubeconfig = scratch_path("kubeconfig")?;
        std::fs::write(
            &kubeconfig,
            r#"{"apiVersion":"v1","kind":"Config","current-context":"c","contexts":[{"name":"c","context":{"cluster":"c","user":"u"}}],
                "clusters":[{"name":"c","cluster":{"server":"http://127.0.0.1:1"}}],"users":[{"name":"u","user":{}}]}"#,
        )?;
        let admin_port = port::free()?;
        let process = Process::start(program, |command| {
            command
                .env("PORT", port.to_string())
                .env("ADMIN_PORT", admin_port.to_string())
                .env("TLS_CERT_PATH", &certificate.path)
                .env("TLS_KEY_PATH", &certificate.key_path)
                .env("KUBECONFIG", &kubeconfig)
                .env("RECONCILE_ENABLED", "false")
                .envs(store.environment.iter().map(|(name, value)| (*name, value)));
        })?;
        until_true(Duration::from_secs(10), "the server to listen", async || Ok(tcp(port).await.is_ok())).await?;
        Ok(Self { process, port })
    }
}

/// Whose executors are created.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Executors {
    /// Each follows the ratio of the job.
    OfOneJob,
    /// Of each job in turn; each states a ratio by an annotation of its own.
    OfFiftyJobs,
}

impl Executors {
    const fn name(self) -> &'static str {
        match self {
            Self::OfOneJob => "one job",
            Self::OfFiftyJobs => "fifty jobs",
        }
    }
}

/// Creations of executors, each with a name of its own, as a real apiserver sends them.
struct Load {
    protocol: Protocol,
    jobs: Vec<Job>,
    next: AtomicUsize,
}

/// The reviews of one job.
struct Job {
    driver: Bytes,
    /// What comes before an executor's number, and what comes after it.
    executor: (String, String),
}

impl Job {
    /// With the name of the fixture's job, or another one of the same length.
    fn new(name: &str, states_ratio: bool) -> Result<Self> {
        let executor = strip(include_bytes!("../fixtures/k8s-1.36-spark-3.5-create-executor.json"));
        let driver = strip(include_bytes!("../fixtures/k8s-1.36-spark-3.5-create-driver.json"));
        let mut executor = executor.replace("spark-pi-dd77a5", name);
        if states_ratio {
            let owner = r#""ownerReferences":["#;
            ensure!(executor.contains(owner), "the fixture's executor has no owner");
            executor =
                executor.replacen(owner, &format!(r#""annotations":{{"workload/spot-ratio":"0.7"}},{owner}"#), 1);
        }
        let start = format!(r#""metadata":{{"name":"{name}-exec-"#);
        let (before, after) = executor.split_once(&start).context("the fixture's object has no name")?;
        let (_, after) = after.split_once('"').context("the name does not end")?;
        // The driver becomes the owner of the executors, in their job: its policy is known, and nothing is looked up.
        let driver = driver.replace("00000003abc", name).replace("my-etl-0c4f06a206ad3458-driver", name).into();
        Ok(Self { driver, executor: (format!("{before}{start}"), format!("\"{after}")) })
    }
}

impl Load {
    fn new(protocol: Protocol, executors: Executors) -> Result<Self> {
        let jobs = match executors {
            Executors::OfOneJob => vec![Job::new("spark-pi-dd77a5", false)?],
            Executors::OfFiftyJobs => {
                (0..JOBS).map(|job| Job::new(&format!("spark-pi-{job:06}"), true)).collect::<Result<_>>()?
            }
        };
        Ok(Self { protocol, jobs, next: AtomicUsize::new(0) })
    }

    const fn protocol_name(&self) -> &'static str {
        match self.protocol {
            Protocol::Http1 => "HTTP/1.1",
            Protocol::Http2 => "HTTP/2",
        }
    }

    fn executor(&self) -> Result<Bytes> {
        let next = self.next.fetch_add(1, Ordering::Relaxed);
        let (number, job) = (next / self.jobs.len(), next % self.jobs.len());
        let (before, after) = &self.jobs.get(job).context("no job")?.executor;
        Ok([before, number.to_string().as_str(), after].concat().into())
    }

    async fn post_drivers(&self, server: &Server) -> Result<()> {
        let mut connection = Connection::open(server.port, self.protocol).await?;
        for job in &self.jobs {
            post(&mut connection, job.driver.clone()).await?;
        }
        Ok(())
    }

    /// Loads the server for its turn.
    async fn run(&self, server: &Server, store: &Store) -> Result<Turn> {
        let mut connections = Vec::new();
        let (number, streams) = match self.protocol {
            Protocol::Http1 => (8, 1),
            Protocol::Http2 => (2, 16),
        };
        for _ in 0..number {
            let connection = Connection::open(server.port, self.protocol).await?;
            connections.extend((1..streams).filter_map(|_| connection.another_stream()));
            connections.push(connection);
        }
        let (cpu, redis) = (server.process.cpu()?, store.cpu().await?);
        let started = Instant::now();
        let posting = connections.into_iter().map(|mut connection| async move {
            let mut posted = 0u64;
            while started.elapsed() < TURN {
                post(&mut connection, self.executor()?).await?;
                posted += 1;
            }
            Ok::<_, anyhow::Error>(posted)
        });
        let posted: u64 = try_join_all(posting).await?.into_iter().sum();
        let (took, cpu) = (started.elapsed(), server.process.cpu()?.saturating_sub(cpu));
        let redis = store.cpu().await? - redis;
        #[expect(clippy::cast_precision_loss, reason = "some ten thousands")]
        let posted = posted as f64;
        Ok(Turn {
            cpu_us: cpu.as_secs_f64() * 1e6 / posted,
            redis_us: redis * 1e6 / posted,
            per_second: posted / took.as_secs_f64(),
        })
    }
}

async fn post(connection: &mut Connection, body: Bytes) -> Result<()> {
    let request = Request::post("/mutate?timeout=10s")
        .header("content-type", "application/json")
        .header("user-agent", "kube-apiserver-admission")
        .body(whole(body))?;
    let answer = connection.send(request).await?;
    ensure!(answer.status == 200, "answered {}", answer.status);
    Ok(())
}

/// A JSON text without the white space between its tokens; the order of keys stays.
fn strip(bytes: &[u8]) -> String {
    let (mut in_string, mut escaped) = (false, false);
    let kept = bytes.iter().copied().filter(|&byte| {
        let keep = in_string || !byte.is_ascii_whitespace();
        if byte == b'"' && !escaped {
            in_string = !in_string;
        }
        escaped = in_string && byte == b'\\' && !escaped;
        keep
    });
    String::from_utf8_lossy(&kept.collect::<Vec<u8>>()).into_owned()
}
