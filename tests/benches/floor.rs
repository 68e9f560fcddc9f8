//! What an admission costs over a server that does nothing: CPU per admission and throughput of the
//! release binary as ratios to `floor`, measured side by side in one run, over HTTP/1.1 and HTTP/2,
//! with Redis and with memory. HTTP/1.1 is eight connections, one request at a time each, as older
//! apiservers do it; HTTP/2 two connections of sixteen streams.
//!
//! ```sh
//! cargo build --profile dist -p balancer-webhook -p balancer-reconcile
//! cargo bench -p balancer-tests --bench floor
//! ```

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use balancer_tests::certificate::authority;
use balancer_tests::figures::median;
use balancer_tests::process::{Process, scratch_path};
use balancer_tests::raw::{Connection, Protocol, tcp, whole};
use balancer_tests::redis::RedisServer;
use balancer_tests::wait::until_true;
use balancer_tests::{parts, port};
use http::Request;
use hyper::body::Bytes;

/// Each server's turn; short enough that a slower minute of the machine hits both.
const TURN: Duration = Duration::from_secs(2);
const TURNS: usize = 5;

fn main() -> Result<()> {
    // `cargo test --benches` asks whether it starts; measuring is for `cargo bench`.
    if !parts::measuring() {
        return Ok(());
    }
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?.block_on(measure())
}

async fn measure() -> Result<()> {
    let redis = RedisServer::start().await?;
    println!(
        "{:28} {:>10} {:>10} {:>7} {:>10} {:>10} {:>7} {:>8}",
        "", "floor µs", "ours µs", "ratio", "floor /s", "ours /s", "ratio", "ours MB"
    );
    for store in [Some(&redis), None] {
        for protocol in [Protocol::Http1, Protocol::Http2] {
            let (floor, ours) = (Server::floor(store).await?, Server::ours(store).await?);
            let load = Load::new(protocol)?;
            load.post_driver(&ours).await?;
            let mut pairs = Vec::new();
            for _ in 0..TURNS {
                pairs.push((load.run(&floor).await?, load.run(&ours).await?));
            }
            let middle = |measure: &dyn Fn(&(Turn, Turn)) -> f64| median(pairs.iter().map(measure));
            println!(
                "{:28} {:>10.1} {:>10.1} {:>7.2} {:>10.0} {:>10.0} {:>7.2} {:>8.1}",
                format!(
                    "{}, {}",
                    if protocol == Protocol::Http1 { "HTTP/1.1" } else { "HTTP/2" },
                    if store.is_some() { "Redis" } else { "memory" }
                ),
                middle(&|(floor, _)| floor.cpu_us),
                middle(&|(_, ours)| ours.cpu_us),
                middle(&|(floor, ours)| ours.cpu_us / floor.cpu_us),
                middle(&|(floor, _)| floor.per_second),
                middle(&|(_, ours)| ours.per_second),
                middle(&|(floor, ours)| ours.per_second / floor.per_second),
                ours.process.resident_mb()?,
            );
        }
    }
    Ok(())
}

/// What a server did in its turn.
struct Turn {
    cpu_us: f64,
    per_second: f64,
}

struct Server {
    process: Process,
    port: u16,
}

impl Server {
    async fn floor(store: Option<&RedisServer>) -> Result<Self> {
        Self::start(Path::new(env!("CARGO_BIN_EXE_floor")), store).await
    }

    async fn ours(store: Option<&RedisServer>) -> Result<Self> {
        Self::start(&parts::program("balancer-webhook")?, store).await
    }

    async fn start(program: &Path, store: Option<&RedisServer>) -> Result<Self> {
        let (port, certificate) = (port::free()?, authority()?.issue()?);
        // Never asked: the driver is learnt before the first executor.
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
                .env("STORE", if store.is_some() { "redis" } else { "memory" })
                .envs(store.map(|store| ("REDIS_URL", store.url())));
        })?;
        until_true(Duration::from_secs(10), "the server to listen", async || Ok(tcp(port).await.is_ok())).await?;
        Ok(Self { process, port })
    }
}

/// Creations of executors, each with a name of its own, as a real apiserver sends them.
struct Load {
    protocol: Protocol,
    before: Bytes,
    after: Bytes,
    driver: Bytes,
    next: Arc<AtomicU64>,
}

impl Load {
    fn new(protocol: Protocol) -> Result<Self> {
        let executor = strip(include_bytes!("../fixtures/k8s-1.36-spark-3.5-create-executor.json"));
        let driver = strip(include_bytes!("../fixtures/k8s-1.36-spark-3.5-create-driver.json"));
        let name = r#""metadata":{"name":""#;
        let (before, after) = executor.split_once(name).context("the fixture's object has no name")?;
        let (_, after) = after.split_once('"').context("the name does not end")?;
        Ok(Self {
            protocol,
            before: format!("{before}{name}").into(),
            after: format!("\"{after}").into(),
            // Of the executors' job, so that its policy is known.
            driver: driver.replace("00000003abc", "spark-pi-dd77a5").into(),
            next: Arc::default(),
        })
    }

    fn executor(&self) -> Bytes {
        let name = format!("spark-pi-dd77a5-exec-{}", self.next.fetch_add(1, Ordering::Relaxed));
        [&self.before[..], name.as_bytes(), &self.after[..]].concat().into()
    }

    async fn post_driver(&self, server: &Server) -> Result<()> {
        post(&mut Connection::open(server.port, self.protocol).await?, self.driver.clone()).await
    }

    /// Loads the server for its turn.
    async fn run(&self, server: &Server) -> Result<Turn> {
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
        let (started, cpu) = (Instant::now(), server.process.cpu()?);
        let posting = connections.into_iter().map(|mut connection| async move {
            let mut posted = 0u64;
            while started.elapsed() < TURN {
                post(&mut connection, self.executor()).await?;
                posted += 1;
            }
            Ok::<_, anyhow::Error>(posted)
        });
        let posted: u64 = futures::future::try_join_all(posting).await?.into_iter().sum();
        let (took, cpu) = (started.elapsed(), server.process.cpu()?.saturating_sub(cpu));
        #[expect(clippy::cast_precision_loss, reason = "some ten thousands")]
        let posted = posted as f64;
        Ok(Turn { cpu_us: cpu.as_secs_f64() * 1e6 / posted, per_second: posted / took.as_secs_f64() })
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
