//! The admin endpoint: plain HTTP for probes and metrics. It has a port of its own, so that probes and scrapes neither need
//! the certificate nor wait for admissions. Probes do not wait for other clients of the port either: the kubelet restarts a
//! pod whose probes are not answered.

use std::convert::Infallible;
use std::net::{Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::time::Duration;

use anyhow::Context;
use bytes::Bytes;
use http::header::{ALLOW, CONTENT_TYPE};
use http::{Method, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Mutex;
use tokio::task::spawn_blocking;
use tokio::time::Instant;

use crate::connections::{AmongEquals, Connections, max_connections};
use crate::tasks::{Liveness, Task, Tasks};

/// Probes and scrapes are few. At the maximum, one connection is closed for each new one.
const MAX_CONNECTIONS: usize = 128;
/// How long a new connection is kept for its first request, however many others there are.
const NEW_CONNECTION_GRACE: Duration = Duration::from_secs(1);
/// The longest that a connection may last.
const CONNECTION_LIMIT: Duration = Duration::from_secs(10);
/// How long a client may take for the head of a request, and may stay without one.
const HEAD_LIMIT: Duration = Duration::from_secs(2);
/// The largest head, and the largest buffer of a connection. Larger answers pass it in parts.
const BUFFER: usize = 8 << 10;

/// Whether `/readyz` answers 200. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Readiness(Arc<AtomicBool>);

impl Readiness {
    /// Sets it from now on.
    pub fn set(&self, ready: bool) {
        self.0.store(ready, Ordering::Release);
    }

    fn get(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

/// A registry for the metrics of a binary of this version.
pub fn registry(version: &'static str) -> Registry {
    let mut registry = Registry::with_prefix("spot_balancer");
    registry.register("build", "The version of the program", Info::new(vec![("version", version)]));
    registry
}

/// A bound admin endpoint that does not serve yet.
#[derive(Debug)]
pub struct Admin {
    listener: TcpListener,
    address: SocketAddr,
}

impl Admin {
    /// Binds the port on all addresses, IPv6 and IPv4 if the host has both.
    ///
    /// # Errors
    /// The port is in use, or not permitted.
    pub async fn bind(port: u16) -> anyhow::Result<Self> {
        let listener = listen(port).await.with_context(|| format!("ADMIN_PORT: cannot listen on {port}"))?;
        let address = listener.local_addr()?;
        Ok(Self { listener, address })
    }

    /// The address on which it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves until dropped, also after a panic.
    pub async fn keep_serving(self, registry: Arc<Registry>, readiness: Readiness, tasks: Tasks) {
        let admin = Arc::new(self);
        let source = Source { registry, readiness, liveness: tasks.liveness(), page: Arc::default() };
        match tasks.keep(Task::Admin, || Arc::clone(&admin).run(source.clone())).await {}
    }

    async fn run(self: Arc<Self>, source: Source) -> Infallible {
        let connections = Connections::new(max_connections(MAX_CONNECTIONS));
        loop {
            let (stream, client) = match self.listener.accept().await {
                Ok(accepted) => accepted,
                Err(error) => {
                    pause_after_failed_accept(&error).await;
                    continue;
                }
            };
            let now = Instant::now();
            if connections.is_full()
                && let Some(evicted) = connections.evict(|state: &State| Some(state.rank(now)))
            {
                evicted.abort();
            }
            let state = State::new(now);
            connections.spawn(client.ip(), state.clone(), serve(stream, source.clone(), state));
        }
    }
}

/// What a connection has done.
#[derive(Clone, Debug)]
struct State {
    opened: Instant,
    activity: Arc<AtomicU8>,
}

impl State {
    const SILENT: u8 = 0;
    const ANSWERED: u8 = 1;
    const ANSWERING: u8 = 2;

    fn new(now: Instant) -> Self {
        Self { opened: now, activity: Arc::new(AtomicU8::new(Self::SILENT)) }
    }

    fn set(&self, activity: u8) {
        self.activity.store(activity, Ordering::Relaxed);
    }

    /// The order in which connections are closed to make room. A new one goes last: it may be a probe whose request is on
    /// its way.
    fn rank(&self, now: Instant) -> ((bool, u8), AmongEquals) {
        if now.saturating_duration_since(self.opened) < NEW_CONNECTION_GRACE {
            return ((true, 0), AmongEquals::LargestSource);
        }
        ((false, self.activity.load(Ordering::Relaxed)), AmongEquals::Oldest)
    }
}

/// What is answered from.
#[derive(Clone, Debug)]
struct Source {
    registry: Arc<Registry>,
    readiness: Readiness,
    liveness: Liveness,
    /// Held while a page of metrics is written, so that many scrapes at once use one thread.
    page: Arc<Mutex<()>>,
}

async fn serve(stream: TcpStream, source: Source, state: State) {
    let service = service_fn(|request| {
        state.set(State::ANSWERING);
        let (source, state) = (source.clone(), state.clone());
        async move {
            let answer = source.answer(request).await;
            state.set(State::ANSWERED);
            Ok::<_, Infallible>(answer)
        }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_LIMIT)
        .max_headers(64)
        .max_buf_size(BUFFER)
        .serve_connection(TokioIo::new(stream), service);
    let _ = tokio::time::timeout(CONNECTION_LIMIT, connection).await;
}

impl Source {
    async fn answer<B>(self, request: Request<B>) -> Response<Full<Bytes>> {
        let (request, Self { registry, readiness, liveness, page }) = (request.map(drop), self);
        if request.uri().path() != "/metrics" {
            return answer(&request, &registry, &readiness, &liveness);
        }
        // A page takes some time to write, which the threads that answer probes do not have.
        let turn = page.lock_owned().await;
        spawn_blocking(move || {
            // A scrape whose client is gone still writes its page: the next one waits for that too.
            let _turn = turn;
            answer(&request, &registry, &readiness, &liveness)
        })
        .await
        .unwrap_or_else(|_| text(StatusCode::INTERNAL_SERVER_ERROR, "the metrics cannot be written\n"))
    }
}

/// Listens on a port, over IPv6 and IPv4 if the host has both.
///
/// # Errors
/// The port is in use, or not permitted.
pub async fn listen(port: u16) -> std::io::Result<TcpListener> {
    match TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)).await {
        Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => Err(error),
        Err(_) => TcpListener::bind(("0.0.0.0", port)).await,
        bound => bound,
    }
}

/// Logs the error and waits: without free file descriptors, each attempt to accept fails at once.
pub async fn pause_after_failed_accept(error: &std::io::Error) {
    tracing::warn!(%error, "cannot accept a connection");
    tokio::time::sleep(Duration::from_millis(50)).await;
}

fn answer<B>(
    request: &Request<B>,
    registry: &Registry,
    readiness: &Readiness,
    liveness: &Liveness,
) -> Response<Full<Bytes>> {
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        let mut answer = text(StatusCode::METHOD_NOT_ALLOWED, "method not allowed; accepted: GET\n");
        answer.headers_mut().insert(ALLOW, http::HeaderValue::from_static("GET, HEAD"));
        return answer;
    }
    match request.uri().path() {
        "/livez" => match liveness.problem() {
            None => text(StatusCode::OK, "ok\n"),
            Some(problem) => {
                tracing::error!(%problem, "not alive");
                text(StatusCode::SERVICE_UNAVAILABLE, format!("{problem}\n"))
            }
        },
        "/readyz" if readiness.get() => text(StatusCode::OK, "ok\n"),
        "/readyz" => text(StatusCode::SERVICE_UNAVAILABLE, "not ready\n"),
        "/metrics" => metrics(registry),
        _ => text(StatusCode::NOT_FOUND, "no such path; accepted: /livez, /readyz and /metrics\n"),
    }
}

fn metrics(registry: &Registry) -> Response<Full<Bytes>> {
    let mut body = String::new();
    // Writing to a string cannot fail.
    let _ = prometheus_client::encoding::text::encode(&mut body, registry);
    let mut answer = Response::new(Full::from(body));
    let kind = http::HeaderValue::from_static("application/openmetrics-text; version=1.0.0; charset=utf-8");
    answer.headers_mut().insert(CONTENT_TYPE, kind);
    answer
}

fn text(status: StatusCode, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut answer = Response::new(Full::new(body.into()));
    *answer.status_mut() = status;
    answer.headers_mut().insert(CONTENT_TYPE, http::HeaderValue::from_static("text/plain; charset=utf-8"));
    answer
}

#[cfg(test)]
mod tests {
    use super::*;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::time::timeout;

    /// What no probe may take.
    const QUICK: Duration = Duration::from_secs(1);

    async fn start() -> u16 {
        let admin = Admin::bind(0).await.unwrap();
        let port = admin.address().port();
        let mut registry = registry("test");
        let tasks = Tasks::register(&mut registry);
        tokio::spawn(admin.keep_serving(Arc::new(registry), Readiness::default(), tasks));
        port
    }

    #[test]
    fn connections_are_closed_from_silent_ones_to_new_ones() {
        let now = Instant::now();
        let later = now + NEW_CONNECTION_GRACE;
        let rank = |opened, activity| {
            let state = State::new(opened);
            state.set(activity);
            state.rank(later)
        };
        let [silent, answered, answering] =
            [State::SILENT, State::ANSWERED, State::ANSWERING].map(|activity| rank(now, activity));
        let new = rank(now + Duration::from_millis(1), State::SILENT);
        assert!(silent.0 < answered.0 && answered.0 < answering.0 && answering.0 < new.0);
        assert_eq!((answered.1, new.1), (AmongEquals::Oldest, AmongEquals::LargestSource));
        // What a new client has done makes no difference yet.
        assert_eq!(rank(later, State::ANSWERED), new);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn clients_that_keep_their_connections_do_not_end_new_ones() {
        let port = start().await;
        let mut kept = Vec::new();
        for _ in 0..MAX_CONNECTIONS {
            let mut stream = connect(port).await;
            stream.write_all(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
            assert!(stream.read(&mut [0; 512]).await.unwrap() > 0);
            kept.push(stream);
        }
        tokio::time::sleep(NEW_CONNECTION_GRACE).await;
        let mut probe = connect(port).await;
        let _others = [connect(port).await, connect(port).await];
        tokio::time::sleep(NEW_CONNECTION_GRACE / 10).await;
        probe.write_all(b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        probe.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    }

    async fn connect(port: u16) -> TcpStream {
        TcpStream::connect(("127.0.0.1", port)).await.unwrap()
    }

    async fn get(port: u16, path: &str) -> String {
        let mut stream = connect(port).await;
        stream
            .write_all(format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").as_bytes())
            .await
            .unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn silent_connections_do_not_delay_probes() {
        let port = start().await;
        let mut silent = Vec::new();
        // Those that are closed first make room for more than the maximum.
        for _ in 0..MAX_CONNECTIONS + 100 {
            silent.push(connect(port).await);
        }
        let started = Instant::now();
        let answer = get(port, "/livez").await;
        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
        assert!(started.elapsed() < QUICK, "{:?}", started.elapsed());
        for mut stream in silent {
            let end =
                timeout(3 * CONNECTION_LIMIT, stream.read(&mut [0; 64])).await.expect("silent clients are dropped");
            assert!(matches!(end, Ok(0) | Err(_)), "{end:?}");
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn clients_that_do_not_read_their_metrics_do_not_delay_probes_or_metrics() {
        let port = start().await;
        let mut deaf = Vec::new();
        for _ in 0..MAX_CONNECTIONS / 2 {
            let mut stream = connect(port).await;
            stream.write_all(&b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n".repeat(64)).await.unwrap();
            deaf.push(stream);
        }
        let started = Instant::now();
        let answer = get(port, "/readyz").await;
        assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
        assert!(started.elapsed() < QUICK, "{:?}", started.elapsed());
        let answer = get(port, "/metrics").await;
        assert!(answer.contains("spot_balancer_build_info{version=\"test\"} 1"), "{answer}");
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_head_that_arrives_slowly_is_cut_off() {
        let mut stream = connect(start().await).await;
        let started = Instant::now();
        for byte in b"GET /livez HTTP/1.1\r\n".iter().chain(std::iter::repeat(&b'x')) {
            if stream.write_all(&[*byte]).await.is_err() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        assert!(started.elapsed() < 5 * HEAD_LIMIT, "{:?}", started.elapsed());
    }
}
