//! A port of plain HTTP for short answers. Its connections are few and bounded, and clients that keep theirs do not delay
//! new ones.

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::header::{ALLOW, CONTENT_TYPE};
use http::{HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::Instant;

use crate::connections::{AmongEquals, Connections, max_connections};

/// Probes, scrapes and viewers are few. At the maximum, one connection is closed for each new one.
pub(crate) const MAX_CONNECTIONS: usize = 128;
/// How long a new connection is kept for its first request, however many others there are.
pub(crate) const NEW_CONNECTION_GRACE: Duration = Duration::from_secs(1);
/// The longest that a connection may last.
pub(crate) const CONNECTION_LIMIT: Duration = Duration::from_secs(10);
/// How long a client may take for the head of a request, and may stay without one.
pub(crate) const HEAD_LIMIT: Duration = Duration::from_secs(2);
/// The largest head, and the largest buffer of a connection. Larger answers pass it in parts.
const BUFFER: usize = 8 << 10;

/// Answers requests. Each request gets a clone.
pub trait Answer: Clone + Send + Sync + 'static {
    /// The answer to a request, whose body is not read.
    fn answer(self, request: Request<()>) -> impl Future<Output = Response<Full<Bytes>>> + Send;
}

/// A bound port that does not serve yet.
#[derive(Debug)]
pub struct HttpPort {
    listener: TcpListener,
    address: SocketAddr,
}

impl HttpPort {
    /// Binds the port on all addresses, IPv6 and IPv4 if the host has both.
    ///
    /// # Errors
    /// The port is in use, or not permitted.
    pub async fn bind(port: u16) -> io::Result<Self> {
        Self::of(listen(port).await?)
    }

    /// Binds the port on the loopback address alone, which no other host and no other pod reaches.
    ///
    /// # Errors
    /// The port is in use, or not permitted.
    pub async fn bind_loopback(port: u16) -> io::Result<Self> {
        Self::of(TcpListener::bind((Ipv4Addr::LOCALHOST, port)).await?)
    }

    fn of(listener: TcpListener) -> io::Result<Self> {
        let address = listener.local_addr()?;
        Ok(Self { listener, address })
    }

    /// The address on which it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves until dropped.
    pub async fn serve(self: Arc<Self>, source: impl Answer) -> Infallible {
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

async fn serve(stream: TcpStream, source: impl Answer, state: State) {
    let service = service_fn(|request| {
        state.set(State::ANSWERING);
        let (source, state) = (source.clone(), state.clone());
        async move {
            let answer = source.answer(request.map(drop)).await;
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

/// Listens on a port, over IPv6 and IPv4 if the host has both.
///
/// # Errors
/// The port is in use, or not permitted.
pub async fn listen(port: u16) -> io::Result<TcpListener> {
    match TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)).await {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => Err(error),
        Err(_) => TcpListener::bind(("0.0.0.0", port)).await,
        bound => bound,
    }
}

/// Logs the error and waits: without free file descriptors, each attempt to accept fails at once.
pub async fn pause_after_failed_accept(error: &io::Error) {
    tracing::warn!(%error, "cannot accept a connection");
    tokio::time::sleep(Duration::from_millis(50)).await;
}

/// The answer to a method that changes something: 405. `None` for GET and HEAD.
pub fn refuse_method(method: &Method) -> Option<Response<Full<Bytes>>> {
    if matches!(*method, Method::GET | Method::HEAD) {
        return None;
    }
    let mut answer = text(StatusCode::METHOD_NOT_ALLOWED, "method not allowed; accepted: GET\n");
    answer.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
    Some(answer)
}

/// A short text for a person.
pub fn text(status: StatusCode, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut answer = Response::new(Full::new(body.into()));
    *answer.status_mut() = status;
    answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    answer
}

#[cfg(test)]
mod tests {
    use super::*;

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
}
