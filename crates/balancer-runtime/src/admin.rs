//! The admin endpoint: plain HTTP for probes and metrics. It has a port of its own, so that probes and scrapes neither need
//! the certificate nor wait for admissions. Probes do not wait for other clients of the port either: the kubelet restarts a
//! pod whose probes are not answered.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context;
use bytes::Bytes;
use http::header::CONTENT_TYPE;
use http::{Request, Response, StatusCode};
use http_body_util::Full;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;
use tokio::sync::Mutex;
use tokio::task::spawn_blocking;

use crate::http_port::{Answer, HttpPort, refuse_method, text};
use crate::tasks::{Liveness, Task, Tasks};

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
pub struct Admin(Arc<HttpPort>);

impl Admin {
    /// Binds the port on all addresses, IPv6 and IPv4 if the host has both.
    ///
    /// # Errors
    /// The port is in use, or not permitted.
    pub async fn bind(port: u16) -> anyhow::Result<Self> {
        let port = HttpPort::bind(port).await.with_context(|| format!("ADMIN_PORT: cannot listen on {port}"))?;
        Ok(Self(Arc::new(port)))
    }

    /// The address on which it listens.
    pub fn address(&self) -> SocketAddr {
        self.0.address()
    }

    /// Serves until dropped, also after a panic.
    pub async fn keep_serving(self, registry: Arc<Registry>, readiness: Readiness, tasks: Tasks) {
        let source = Source { registry, readiness, liveness: tasks.liveness(), page: Arc::default() };
        match tasks.keep(Task::Admin, || Arc::clone(&self.0).serve(source.clone())).await {}
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

impl Answer for Source {
    async fn answer(self, request: Request<()>) -> Response<Full<Bytes>> {
        let Self { registry, readiness, liveness, page } = self;
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

fn answer(
    request: &Request<()>,
    registry: &Registry,
    readiness: &Readiness,
    liveness: &Liveness,
) -> Response<Full<Bytes>> {
    if let Some(refusal) = refuse_method(request.method()) {
        return refusal;
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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    use crate::http_port::{CONNECTION_LIMIT, HEAD_LIMIT, MAX_CONNECTIONS, NEW_CONNECTION_GRACE};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;
    use tokio::time::{Instant, timeout};

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
