//! Serves one connection: TLS, then HTTP/1.1 or HTTP/2, with deadlines for everything that depends on the client.

use std::convert::Infallible;
use std::fmt::Display;
use std::future::Future;
use std::io;
use std::net::IpAddr;
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use balancer_runtime::coalesce_wakeups;
use bytes::Bytes;
use http::header::{CONNECTION, HeaderValue};
use http::{Method, Request, Response, StatusCode, Version};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulConnection;
use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncWrite, BufReader, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::{Instant, Sleep, interval, sleep, timeout};
use tokio_rustls::TlsAcceptor;

use super::Phase;
use super::deadlines::{Deadlines, Verdict};
use super::turns::Turns;

/// Concurrent requests on one HTTP/2 connection; more wait.
const MAX_STREAMS: u32 = 128;
/// What a client may send ahead of the code that reads a body: the reviews of three executors. A larger body takes some
/// more round trips.
const STREAM_WINDOW: u32 = 32 << 10;
/// The same for all bodies of a connection, so that four bodies that wait for memory do not stop the others.
const CONNECTION_WINDOW: u32 = 160 << 10;
/// Answers that wait for the client to read them, for each stream. An answer has a few hundred bytes.
const SEND_BUFFER: usize = 16 << 10;
/// The largest head over HTTP/1.1, and what is read ahead of the code that reads a body.
const HTTP1_BUFFER: usize = 32 << 10;
/// Size of one read. It holds the review of an executor; TLS alone would read 4 KiB.
const READ_BUFFER: usize = 16 << 10;
/// From the connection to the end of the TLS handshake.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(5);
/// How often the deadlines of a connection are checked.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);
/// From the webhook's close of a connection to the client's.
const CLOSE_LIMIT: Duration = Duration::from_secs(1);

/// Serves a client until it closes, a deadline passes, or the server has shut down.
pub(super) async fn serve_tls<F>(
    stream: TcpStream,
    handshake: Handshake,
    phase: watch::Receiver<Phase>,
    deadlines: SharedDeadlines,
    answer: impl Fn(Request<Incoming>) -> F + Clone + Send + 'static,
) where
    F: Future<Output = Response<Full<Bytes>>> + Send + 'static,
{
    // Small answers must not wait for more data to send.
    let _ = stream.set_nodelay(true);
    let stream = BufReader::with_capacity(READ_BUFFER, stream);
    let Handshake { source, config, turns } = handshake;
    match timeout(HANDSHAKE_LIMIT, turns.run(source, TlsAcceptor::from(config).accept(stream))).await {
        Ok(Ok(stream)) => {
            drop(turns);
            let is_http2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
            deadlines.lock().handshake_done(is_http2, Instant::now());
            serve(stream, is_http2, phase, deadlines, answer).await;
        }
        Ok(Err(error)) => tracing::debug!(%error, "TLS handshake failed"),
        Err(_) => tracing::debug!("TLS handshake timed out"),
    }
}

/// What a connection needs for its handshake.
pub(super) struct Handshake {
    pub(super) source: IpAddr,
    pub(super) config: Arc<ServerConfig>,
    pub(super) turns: Turns,
}

async fn serve<F>(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    is_http2: bool,
    phase: watch::Receiver<Phase>,
    deadlines: SharedDeadlines,
    answer: impl Fn(Request<Incoming>) -> F + Clone + Send + 'static,
) where
    F: Future<Output = Response<Full<Bytes>>> + Send + 'static,
{
    let io = TokioIo::new(MonitoredStream { stream, is_http2, deadlines: deadlines.clone(), close_timeout: None });
    let service = {
        let (deadlines, phase) = (deadlines.clone(), phase.clone());
        service_fn(move |request: Request<Incoming>| {
            let in_flight = InFlight::start(&deadlines);
            let (answer, phase, version) = (answer.clone(), phase.clone(), request.version());
            // Only a review is posted and answered with 200.
            let is_post = request.method() == Method::POST;
            // The answer's future begins in here: as a captured variable it would double the size of this one, and hyper
            // moves that several times.
            async move {
                let mut answer = answer(request).await;
                let is_retired = in_flight.answered(is_post && answer.status() == StatusCode::OK);
                if version <= Version::HTTP_11 && (is_retired || *phase.borrow() > Phase::Serving) {
                    answer.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
                }
                Ok::<_, Infallible>(answer)
            }
        })
    };
    if is_http2 {
        let connection = http2::Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .max_concurrent_streams(MAX_STREAMS)
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_send_buf_size(SEND_BUFFER)
            .max_header_list_size(16 << 10)
            .serve_connection(io, service);
        // A GOAWAY frame tells the client to reconnect, so HTTP/2 need not wait for Phase::Closing. Answers that are
        // ready at the same time are sent together.
        coalesce_wakeups(drive(pin!(connection), phase, Phase::Lingering, &deadlines)).await;
    } else {
        let connection = http1::Builder::new()
            // hyper's timeout does not distinguish an idle client from a slow one; Deadlines does.
            .header_read_timeout(None)
            .max_headers(64)
            .max_buf_size(HTTP1_BUFFER)
            .serve_connection(io, service);
        drive(pin!(connection), phase, Phase::Closing, &deadlines).await;
    }
}

/// Drives a connection to its end. From the phase `last` on, it is closed as soon as that loses no request.
async fn drive<C: GracefulConnection<Error: Display>>(
    mut connection: Pin<&mut C>,
    mut phase: watch::Receiver<Phase>,
    last: Phase,
    deadlines: &SharedDeadlines,
) {
    let mut ticks = interval(CHECK_INTERVAL);
    let mut is_shutting_down = false;
    loop {
        tokio::select! {
            result = connection.as_mut() => {
                if let Err(error) = result {
                    tracing::debug!(%error, "connection failed");
                }
                return;
            }
            _ = phase.wait_for(|phase| *phase >= last), if !is_shutting_down => {
                is_shutting_down = true;
                deadlines.lock().leave();
            }
            _ = ticks.tick() => {}
        }
        let verdict = deadlines.lock().check(Instant::now());
        match verdict {
            Verdict::Continue => {}
            Verdict::Close => connection.as_mut().graceful_shutdown(),
            Verdict::Abort(reason) => return tracing::debug!(reason, "connection dropped"),
        }
    }
}

/// The deadlines, shared by the connection, its requests and the table of connections.
#[derive(Clone, Debug)]
pub(super) struct SharedDeadlines(Arc<Mutex<Deadlines>>);

impl SharedDeadlines {
    /// A connection that was accepted now, and is to be closed at the age of `max_age`.
    pub(super) fn new(max_age: Duration) -> Self {
        Self(Arc::new(Mutex::new(Deadlines::new(max_age, Instant::now()))))
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Deadlines> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A request in flight. Dropped before it is answered, it counts as cancelled.
struct InFlight {
    deadlines: SharedDeadlines,
    is_answered: bool,
}

impl InFlight {
    fn start(deadlines: &SharedDeadlines) -> Self {
        deadlines.lock().request_started();
        Self { deadlines: deadlines.clone(), is_answered: false }
    }

    /// Returns whether the answer must ask an HTTP/1.1 client to reconnect.
    fn answered(mut self, is_accepted_review: bool) -> bool {
        self.is_answered = true;
        self.deadlines.lock().answered(is_accepted_review, Instant::now())
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        if !self.is_answered {
            self.deadlines.lock().cancelled(Instant::now());
        }
    }
}

/// A stream that reports received bytes to the deadlines, and waits for the client's close after its own.
struct MonitoredStream<T> {
    stream: T,
    is_http2: bool,
    deadlines: SharedDeadlines,
    /// Limits the wait for the client's close; set by our own close.
    close_timeout: Option<Pin<Box<Sleep>>>,
}

impl<T: AsyncRead + Unpin> AsyncRead for MonitoredStream<T> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(cx, buffer);
        if buffer.filled().len() > before {
            self.deadlines.lock().bytes_received(Instant::now);
        }
        read
    }
}

impl<T: AsyncRead + AsyncWrite + Unpin> AsyncWrite for MonitoredStream<T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    /// Closes our side, and then discards what the client still sends until it closes too. A client that receives a
    /// reset while it writes may never read the answer.
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Self { stream, close_timeout, .. } = &mut *self;
        ready!(Pin::new(&mut *stream).poll_shutdown(cx))?;
        if close_timeout.get_or_insert_with(|| Box::pin(sleep(CLOSE_LIMIT))).as_mut().poll(cx).is_ready() {
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

    /// Over HTTP/2, h2 joins small answers in one buffer only if vectored writes are not available. One TLS record and
    /// one system call then carry several answers.
    fn is_write_vectored(&self) -> bool {
        !self.is_http2 && self.stream.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
    use tokio::task::JoinHandle;

    use super::super::deadlines::{HEAD_LIMIT, IDLE_LIMIT, LEAVE_LIMIT, NEW_CONNECTION_GRACE, SILENCE_LIMIT};

    const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nHost: webhook\r\n\r\n";
    /// The preface of HTTP/2 and an empty SETTINGS frame.
    const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
    /// `GET /` on stream 1.
    const GET: &[u8] = b"\0\0\x03\x01\x05\0\0\0\x01\x82\x84\x87";
    const GOAWAY: u8 = 7;
    /// The answer to each request takes this long.
    const ANSWER_TIME: Duration = Duration::from_secs(3);
    const MAX_AGE: Duration = Duration::from_secs(100);

    /// A connection over a pipe, seen from its client. Each test runs on paused time.
    struct Peer {
        client: DuplexStream,
        phase: watch::Sender<Phase>,
        server: JoinHandle<()>,
        opened: Instant,
    }

    impl Peer {
        fn connect(is_http2: bool) -> Self {
            let (client, stream) = tokio::io::duplex(64 << 10);
            let (phase, phases) = watch::channel(Phase::Serving);
            let answer = |_request| async {
                sleep(ANSWER_TIME).await;
                Response::new(Full::from("answer"))
            };
            let server = {
                let deadlines = SharedDeadlines::new(MAX_AGE);
                deadlines.lock().handshake_done(is_http2, Instant::now());
                tokio::spawn(serve(stream, is_http2, phases, deadlines, answer))
            };
            Self { client, phase, server, opened: Instant::now() }
        }

        async fn send(&mut self, bytes: &[u8]) {
            self.client.write_all(bytes).await.expect("the connection is open");
        }

        /// Reads one answer over HTTP/1.1.
        async fn answer(&mut self) -> String {
            let mut answer = Vec::new();
            while !answer.ends_with(b"answer") {
                assert!(self.client.read_buf(&mut answer).await.expect("the connection is open") > 0, "{answer:?}");
            }
            String::from_utf8_lossy(&answer).to_lowercase()
        }

        /// Reads what has come over HTTP/2; returns the types of its frames.
        async fn frames(&mut self) -> Vec<u8> {
            let mut frames = vec![0; 4 << 10];
            let length = self.client.read(&mut frames).await.expect("the connection is open");
            let mut frames = frames.get(..length).unwrap_or_default();
            let mut kinds = Vec::new();
            while let [high, middle, low, kind, rest @ ..] = frames {
                kinds.push(*kind);
                let length = usize::from(*high) << 16 | usize::from(*middle) << 8 | usize::from(*low);
                frames = rest.get(5 + length..).unwrap_or_default();
            }
            kinds
        }

        /// Waits for the end of the connection; returns its age and whatever else it has received.
        async fn ended(mut self) -> (Duration, Vec<u8>) {
            let mut rest = Vec::new();
            let _ = self.client.read_to_end(&mut rest).await;
            drop(self.client);
            self.server.await.expect("the server does not panic");
            (self.opened.elapsed(), rest)
        }
    }

    #[track_caller]
    fn assert_about(age: Duration, expected: Duration) {
        assert!(age >= expected && age <= expected + 2 * CHECK_INTERVAL, "{age:?}, not about {expected:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_client_is_dropped() {
        for is_http2 in [false, true] {
            assert_about(Peer::connect(is_http2).ended().await.0, SILENCE_LIMIT);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_sends_only_the_http2_preface_is_dropped() {
        let mut peer = Peer::connect(true);
        peer.send(PREFACE).await;
        assert_about(peer.ended().await.0, SILENCE_LIMIT);
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_sends_a_byte_a_second_is_dropped() {
        let mut peer = Peer::connect(false);
        for byte in REQUEST.chunks(1) {
            if peer.client.write_all(byte).await.is_err() {
                break;
            }
            sleep(Duration::from_secs(1)).await;
        }
        assert_about(peer.opened.elapsed(), HEAD_LIMIT);
    }

    #[tokio::test(start_paused = true)]
    async fn an_idle_client_is_closed_later_than_a_silent_one() {
        let mut peer = Peer::connect(false);
        peer.send(REQUEST).await;
        peer.answer().await;
        let (age, rest) = peer.ended().await;
        assert_about(age, ANSWER_TIME + IDLE_LIMIT);
        assert_eq!(rest, b"");
    }

    #[tokio::test(start_paused = true)]
    async fn an_idle_client_that_never_closes_is_dropped() {
        let mut peer = Peer::connect(false);
        peer.send(REQUEST).await;
        peer.answer().await;
        let Peer { client, phase: _phase, server, opened } = peer;
        server.await.expect("the server does not panic");
        assert_about(opened.elapsed(), ANSWER_TIME + IDLE_LIMIT + CLOSE_LIMIT);
        drop(client);
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_in_flight_is_answered_during_a_shutdown() {
        let mut peer = Peer::connect(false);
        peer.send(REQUEST).await;
        sleep(ANSWER_TIME / 3).await;
        peer.phase.send_replace(Phase::Closing);
        assert!(peer.answer().await.contains("connection: close"));
        assert_about(peer.ended().await.0, ANSWER_TIME);
    }

    #[tokio::test(start_paused = true)]
    async fn an_incomplete_request_is_answered_during_a_shutdown() {
        let mut peer = Peer::connect(false);
        let (start, rest) = REQUEST.split_at(10);
        peer.send(start).await;
        sleep(2 * NEW_CONNECTION_GRACE).await;
        peer.phase.send_replace(Phase::Closing);
        sleep(2 * CHECK_INTERVAL).await;
        peer.send(rest).await;
        peer.answer().await;
        peer.ended().await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_new_connection_gets_its_first_answer_during_a_shutdown() {
        let mut peer = Peer::connect(false);
        peer.phase.send_replace(Phase::Closing);
        sleep(NEW_CONNECTION_GRACE / 2).await;
        peer.send(REQUEST).await;
        assert!(peer.answer().await.contains("connection: close"));
        peer.ended().await;
    }

    #[tokio::test(start_paused = true)]
    async fn an_idle_connection_is_closed_by_a_shutdown() {
        let mut peer = Peer::connect(false);
        peer.send(REQUEST).await;
        peer.answer().await;
        peer.phase.send_replace(Phase::Lingering);
        sleep(2 * CHECK_INTERVAL).await;
        assert!(!peer.server.is_finished());
        peer.phase.send_replace(Phase::Closing);
        assert_about(peer.ended().await.0, ANSWER_TIME + 2 * CHECK_INTERVAL);
    }

    #[tokio::test(start_paused = true)]
    async fn http2_is_closed_by_a_goaway_while_the_server_lingers() {
        let mut peer = Peer::connect(true);
        peer.send(PREFACE).await;
        sleep(2 * NEW_CONNECTION_GRACE).await;
        peer.phase.send_replace(Phase::Lingering);
        sleep(CHECK_INTERVAL).await;
        let kinds = peer.frames().await;
        assert!(kinds.contains(&GOAWAY), "{kinds:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn http2_is_closed_by_a_goaway_at_its_age_and_answers_what_is_in_flight() {
        let mut peer = Peer::connect(true);
        peer.send(PREFACE).await;
        peer.send(GET).await;
        sleep(MAX_AGE - CHECK_INTERVAL).await;
        assert!(!peer.frames().await.contains(&GOAWAY));
        sleep(3 * CHECK_INTERVAL).await;
        assert!(peer.frames().await.contains(&GOAWAY));
        // Its client never acknowledges that, and is dropped.
        assert_about(peer.ended().await.0, MAX_AGE + LEAVE_LIMIT);
    }

    #[tokio::test(start_paused = true)]
    async fn http1_is_closed_by_the_first_answer_after_its_age() {
        let mut peer = Peer::connect(false);
        peer.send(REQUEST).await;
        assert!(!peer.answer().await.contains("connection: close"));
        sleep(MAX_AGE + 2 * CHECK_INTERVAL).await;
        assert!(!peer.server.is_finished());
        peer.send(REQUEST).await;
        assert!(peer.answer().await.contains("connection: close"));
        peer.ended().await;
    }
}
