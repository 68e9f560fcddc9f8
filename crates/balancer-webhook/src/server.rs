//! Connections: accepted up to a cap, each with TLS, HTTP/1.1 or HTTP/2, deadlines for everything a
//! client may be slow at, and an end that loses no admission.

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use balancer_runtime::admin::{listen, pause_after_refused_accept};
use balancer_runtime::coalesce_wakeups;
use balancer_runtime::shutdown::Shutdown;
use balancer_store::Ledger;
use http::header::{CONNECTION, HeaderValue};
use http::{Request, Version};
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite, BufReader, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::time::{Sleep, sleep, timeout};
use tokio_rustls::TlsAcceptor;

use crate::routes::Router;
use crate::tls::Certificate;

/// An apiserver keeps a handful; past the cap, connections wait in the kernel until one ends.
const MOST_CONNECTIONS: usize = 1024;
/// Admissions at once on one HTTP/2 connection; further ones wait for their turn.
const MOST_STREAMS: u32 = 128;
/// What is read of a connection at once: an executor's review, where TLS by itself would ask for 4 KiB.
const READ_AT_ONCE: usize = 16 << 10;
/// From the connection to the end of the TLS handshake.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(5);
/// From a request's first byte to the end of its head; and from the handshake to the first byte.
const HEAD_LIMIT: Duration = Duration::from_secs(10);
/// Between requests. Longer than the 90 s after which an apiserver drops an idle connection: were we
/// first, its next admission might be lost on the way.
const IDLE_LIMIT: Duration = Duration::from_secs(150);
/// How often a connection's deadlines are looked at.
const WATCH: Duration = Duration::from_secs(1);
/// From our last words on a connection to the client's.
const HEAR_OUT_LIMIT: Duration = Duration::from_secs(1);
/// After SIGTERM, how long new connections are still served: the cluster takes some seconds to stop
/// sending them.
const LINGER: Duration = Duration::from_secs(5);
/// How long the kernel's queue of connections is emptied before the port is closed.
const BACKLOG_LIMIT: Duration = Duration::from_millis(50);
/// After that, how long connections may take to finish; within the 30 s of a pod's default grace.
const DRAIN_LIMIT: Duration = Duration::from_secs(20);

/// A bound server, not yet serving.
#[derive(Debug)]
pub struct Server {
    listener: TcpListener,
    address: SocketAddr,
    certificate: Arc<Certificate>,
}

/// How far the leaving is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd)]
enum Phase {
    /// Not leaving.
    Serving,
    /// Each answer asks its client to connect anew, elsewhere.
    Lingering,
    /// Idle connections are closed, busy ones after their answer.
    Closing,
}

impl Server {
    /// Binds the port on all addresses.
    pub async fn bind(port: u16, certificate: Arc<Certificate>) -> io::Result<Self> {
        let listener = listen(port).await?;
        let address = listener.local_addr()?;
        Ok(Self { listener, address, certificate })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves until `leave` says so; ends when all that was begun is answered, or cannot be in time.
    pub async fn run<L: Ledger>(self, router: Router<L>, leave: impl Future<Output = Shutdown>) {
        let (phase, watching) = watch::channel(Phase::Serving);
        let connections = Connections {
            room: Arc::new(Semaphore::new(MOST_CONNECTIONS)),
            certificate: self.certificate,
            router,
            phase: watching,
        };
        let leave = tokio::select! {
            leave = leave => leave,
            never = connections.accept(&self.listener) => match never {},
        };
        if leave == Shutdown::Graceful {
            let _ = phase.send(Phase::Lingering);
            let _ = timeout(LINGER, connections.accept(&self.listener)).await;
        }
        // Who has connected, but was not yet accepted, is served too.
        let _ = timeout(BACKLOG_LIMIT, connections.accept(&self.listener)).await;
        drop(self.listener);
        let _ = phase.send(Phase::Closing);
        if timeout(DRAIN_LIMIT, connections.finished()).await.is_err() {
            tracing::warn!("some connections did not finish in time");
        }
    }
}

struct Connections<L> {
    room: Arc<Semaphore>,
    certificate: Arc<Certificate>,
    router: Router<L>,
    phase: watch::Receiver<Phase>,
}

impl<L: Ledger> Connections<L> {
    async fn accept(&self, listener: &TcpListener) -> Infallible {
        loop {
            // The semaphore is never closed.
            let Ok(permit) = Arc::clone(&self.room).acquire_owned().await else { continue };
            match listener.accept().await {
                Ok((stream, _)) => {
                    let serving = self.serve(stream);
                    tokio::spawn(async move {
                        serving.await;
                        drop(permit);
                    });
                }
                Err(error) => pause_after_refused_accept(&error).await,
            }
        }
    }

    /// Waits until no connection is left.
    async fn finished(&self) {
        let all = u32::try_from(MOST_CONNECTIONS).unwrap_or(u32::MAX);
        let _ = self.room.acquire_many(all).await;
    }

    fn serve(&self, stream: TcpStream) -> impl Future<Output = ()> + 'static {
        let acceptor = TlsAcceptor::from(self.certificate.config());
        let (router, phase) = (self.router.clone(), self.phase.clone());
        async move {
            let _open = router.metrics().connected();
            // Small answers must not wait for more to send.
            let _ = stream.set_nodelay(true);
            let stream = BufReader::with_capacity(READ_AT_ONCE, stream);
            let stream = match timeout(HANDSHAKE_LIMIT, acceptor.accept(stream)).await {
                Ok(Ok(stream)) => stream,
                Ok(Err(error)) => return tracing::debug!(%error, "no TLS handshake"),
                Err(_) => return tracing::debug!("no TLS handshake in time"),
            };
            let http2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
            let activity = Arc::new(Activity::new(http2));
            let io = TokioIo::new(Watched { stream, activity: Arc::clone(&activity), hearing_out: None });
            let service = {
                let (activity, phase) = (Arc::clone(&activity), phase.clone());
                service_fn(move |request: Request<Incoming>| {
                    let (router, phase) = (router.clone(), phase.clone());
                    let busy = Busy::start(&activity);
                    async move {
                        let _busy = busy;
                        let version = request.version();
                        let mut answer = router.answer(request).await;
                        if version <= Version::HTTP_11 && *phase.borrow() > Phase::Serving {
                            answer.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
                        }
                        Ok::<_, Infallible>(answer)
                    }
                })
            };
            if http2 {
                let connection = http2::Builder::new(TokioExecutor::new())
                    .timer(TokioTimer::new())
                    .max_concurrent_streams(MOST_STREAMS)
                    .max_header_list_size(16 << 10)
                    .serve_connection(io, service);
                // HTTP/2 says goodbye in words, so it need not linger. The answers that are ready go together.
                coalesce_wakeups(watch_over(pin!(connection), phase, Phase::Lingering, &activity)).await;
            } else {
                let connection = http1::Builder::new()
                    // Ours tells an idle client from a slow one; hyper's does not.
                    .header_read_timeout(None)
                    .max_headers(64)
                    .serve_connection(io, service);
                watch_over(pin!(connection), phase, Phase::Closing, &activity).await;
            }
        }
    }
}

/// What both kinds of connection can do.
trait Drive: Future<Output = Result<(), hyper::Error>> {
    fn finish_up(self: Pin<&mut Self>);
}

macro_rules! drive {
    ($name:ident, $($connection:tt)+) => {
        impl<S, $name> Drive for $($connection)+
        where
            S: hyper::service::HttpService<Incoming, ResBody = http_body_util::Full<bytes::Bytes>> + 'static,
            S::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
            S::Future: Send,
            $name: hyper::rt::Read + hyper::rt::Write + Unpin + Send + 'static,
        {
            fn finish_up(self: Pin<&mut Self>) {
                self.graceful_shutdown();
            }
        }
    };
}

drive!(I, http1::Connection<I, S>);
drive!(I, http2::Connection<I, S, TokioExecutor>);

/// Drives a connection to its end: the client's, that of `last` phase, or a deadline's.
async fn watch_over(
    mut connection: Pin<&mut impl Drive>,
    mut phase: watch::Receiver<Phase>,
    last: Phase,
    activity: &Activity,
) {
    let mut ticks = tokio::time::interval(WATCH);
    let (mut leaving, mut finishing) = (false, None);
    loop {
        let finish = tokio::select! {
            done = connection.as_mut() => {
                if let Err(error) = done {
                    tracing::debug!(%error, "a connection broke off");
                }
                return;
            }
            _ = phase.wait_for(|phase| *phase >= last), if !leaving => {
                leaving = true;
                !activity.is_beginning()
            }
            _ = ticks.tick() => match activity.overdue() {
                Some(Overdue::Slow) => return tracing::debug!("a client was too slow"),
                // It does not even read our goodbye.
                Some(Overdue::Idle) if finishing.is_some_and(|since: Instant| since.elapsed() > HEAD_LIMIT) => return,
                Some(Overdue::Idle) => true,
                None => leaving && !activity.is_beginning(),
            },
        };
        if finish && finishing.is_none() {
            finishing = Some(Instant::now());
            connection.as_mut().finish_up();
        }
    }
}

/// What a connection is doing, for its deadlines.
#[derive(Debug)]
struct Activity {
    http2: bool,
    start: Instant,
    /// Requests whose head has come and whose answer has not been given.
    busy: AtomicU32,
    /// Milliseconds from `start` to the end of the last answer; 0 before the first.
    answered: AtomicU64,
    /// Milliseconds from `start` to the first byte since; 0 before it.
    begun: AtomicU64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Overdue {
    /// It wants nothing more, it seems: it may go in peace.
    Idle,
    /// It holds us up.
    Slow,
}

impl Activity {
    fn new(http2: bool) -> Self {
        Self {
            http2,
            start: Instant::now(),
            busy: AtomicU32::new(0),
            answered: AtomicU64::new(0),
            begun: AtomicU64::new(0),
        }
    }

    /// Milliseconds since the start; never 0, which stands for never.
    fn now(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX).max(1)
    }

    fn bytes_came(&self) {
        if self.busy.load(Ordering::Relaxed) == 0 && self.begun.load(Ordering::Relaxed) == 0 {
            self.begun.store(self.now(), Ordering::Relaxed);
        }
    }

    /// Whether a request may be on its way of which there is nothing to see yet, or not its whole
    /// head: told to finish up now, hyper would drop it.
    fn is_beginning(&self) -> bool {
        if self.busy.load(Ordering::Relaxed) > 0 {
            return false;
        }
        let (answered, begun) = (self.answered.load(Ordering::Relaxed), self.begun.load(Ordering::Relaxed));
        (begun > 0 && !self.http2) || (answered == 0 && self.start.elapsed() < WATCH)
    }

    fn overdue(&self) -> Option<Overdue> {
        if self.busy.load(Ordering::Relaxed) > 0 {
            return None;
        }
        let (answered, begun) = (self.answered.load(Ordering::Relaxed), self.begun.load(Ordering::Relaxed));
        let past = |since: u64, limit: Duration| u128::from(self.now().saturating_sub(since)) > limit.as_millis();
        // HTTP/2 sends frames between requests too: there they begin no request but the first.
        let head = answered == 0 || (begun > 0 && !self.http2);
        match head {
            true => past(begun, HEAD_LIMIT).then_some(Overdue::Slow),
            false => past(answered, IDLE_LIMIT).then_some(Overdue::Idle),
        }
    }
}

/// A request under way.
struct Busy(Arc<Activity>);

impl Busy {
    fn start(activity: &Arc<Activity>) -> Self {
        activity.busy.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(activity))
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.answered.store(self.0.now(), Ordering::Relaxed);
        self.0.begun.store(0, Ordering::Relaxed);
        self.0.busy.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A stream that notes when bytes come, and hears its client out before it closes.
struct Watched<T> {
    stream: T,
    activity: Arc<Activity>,
    /// Until when; from our last words on.
    hearing_out: Option<Pin<Box<Sleep>>>,
}

impl<T: AsyncRead + Unpin> AsyncRead for Watched<T> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(cx, buffer);
        if buffer.filled().len() > before {
            self.activity.bytes_came();
        }
        read
    }
}

impl<T: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Watched<T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    /// Says goodbye, and then throws away what the client still sends until it has closed too: one
    /// that is met by a reset while it writes may not come to read what we answered.
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Self { stream, hearing_out, .. } = &mut *self;
        ready!(Pin::new(&mut *stream).poll_shutdown(cx))?;
        if hearing_out.get_or_insert_with(|| Box::pin(sleep(HEAR_OUT_LIMIT))).as_mut().poll(cx).is_ready() {
            return Poll::Ready(Ok(()));
        }
        let mut unread = [0; 4 << 10];
        loop {
            let mut buffer = ReadBuf::new(&mut unread);
            let read = ready!(Pin::new(&mut *stream).poll_read(cx, &mut buffer));
            if read.is_err() || buffer.filled().is_empty() {
                return Poll::Ready(Ok(()));
            }
        }
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, slices)
    }

    /// Over HTTP/2 answers are put together in a buffer, which h2 does for small ones if it cannot send
    /// several buffers in one write: one record and one system call then carry several answers.
    fn is_write_vectored(&self) -> bool {
        !self.activity.http2 && self.stream.is_write_vectored()
    }
}
