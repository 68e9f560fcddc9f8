//! Keeps a connection: when to connect, when to probe, and how long to wait.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::connection::{Connection, IoTask, NOT_LOGGED_IN, READ_ONLY};
use super::credentials::Credentials;
use super::dial::{Dial, within};
use crate::StoreError;

/// The most that connecting may take. No call waits for it.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// The longest pause between two attempts to connect.
pub(super) const MAX_PAUSE: Duration = Duration::from_secs(2);
/// Pauses double from 25 to 50 ms, up to between 1 and 2 s. They are random, so that a server that comes back is not
/// met by all its clients at once.
pub(super) const BACKOFF: ExponentialBuilder = ExponentialBuilder::new()
    .with_jitter()
    .with_min_delay(Duration::from_millis(25))
    .with_max_delay(Duration::from_secs(1))
    .without_max_times();
/// A call that finds no connection ends the pause, but not earlier than this after the pause began.
const PAUSE_WHEN_CALLED: Duration = Duration::from_millis(250);
/// Before the task that keeps the connection is started again after a panic.
const PAUSE_AFTER_PANIC: Duration = Duration::from_secs(1);
/// How often an idle connection is probed. Networks drop idle connections silently, and a call should not be the
/// first to find out.
const PROBE_INTERVAL: Duration = Duration::from_secs(10);

/// Pauses before logging in again, after a server has refused the new credentials: doubled up to a minute. The connection
/// stays in use.
const LOGIN_BACKOFF: ExponentialBuilder = ExponentialBuilder::new()
    .with_jitter()
    .with_min_delay(Duration::from_secs(1))
    .with_max_delay(Duration::from_secs(30))
    .without_max_times();
/// The longest of these pauses.
const MAX_LOGIN_PAUSE: Duration = Duration::from_secs(60);

/// The connection, or why there is none.
pub(super) type Status = Result<Arc<Connection>, StoreError>;

/// What to do next about a connection `C`. A pure value: the caller does the work, and reports the time and the result.
#[derive(Debug)]
struct Supervisor<C> {
    state: State<C>,
    backoff: ExponentialBackoff,
    login_backoff: ExponentialBackoff,
}

#[derive(Debug)]
enum State<C> {
    Disconnected {
        since: Instant,
        retry_at: Instant,
    },
    Connecting {
        since: Instant,
    },
    /// With `log_in_at`, other credentials are to be used.
    Connected {
        connection: C,
        since: Instant,
        probe_at: Instant,
        log_in_at: Option<Instant>,
    },
}

/// What to do next.
#[derive(Debug, PartialEq, Eq)]
enum Step<'a, C> {
    Connect,
    Probe(&'a mut C),
    LogIn(&'a mut C),
    /// Wait for something to happen, at most until then.
    WaitUntil(Instant, Option<&'a mut C>),
}

impl<C> Supervisor<C> {
    /// Nothing is connected yet; the first step is to connect.
    fn new(now: Instant) -> Self {
        let state = State::Disconnected { since: now, retry_at: now };
        Self { state, backoff: BACKOFF.build(), login_backoff: LOGIN_BACKOFF.build() }
    }

    /// What to do now.
    fn next_step(&mut self, now: Instant) -> Step<'_, C> {
        if let State::Disconnected { retry_at, .. } = self.state
            && retry_at <= now
        {
            self.state = State::Connecting { since: now };
        }
        match &mut self.state {
            State::Disconnected { retry_at, .. } => Step::WaitUntil(*retry_at, None),
            State::Connecting { .. } => Step::Connect,
            State::Connected { connection, probe_at, log_in_at, .. } => {
                let next = log_in_at.map_or(*probe_at, |log_in_at| log_in_at.min(*probe_at));
                if log_in_at.is_some_and(|log_in_at| log_in_at <= now) {
                    Step::LogIn(connection)
                } else if next <= now {
                    Step::Probe(connection)
                } else {
                    Step::WaitUntil(next, Some(connection))
                }
            }
        }
    }

    /// The attempt to connect succeeded, or another server is used from now on. Returns the connection before.
    fn connected(&mut self, connection: C, now: Instant) -> Option<C> {
        let since = match self.state {
            State::Connecting { since } => since,
            State::Disconnected { .. } | State::Connected { .. } => now,
        };
        let state = State::Connected { connection, since, probe_at: now + PROBE_INTERVAL, log_in_at: None };
        std::mem::replace(&mut self.state, state).into_connection()
    }

    /// The attempt to connect failed, or the connection is no longer usable. Returns the connection.
    fn disconnected(&mut self, now: Instant) -> Option<C> {
        // A connection that the server accepts and breaks, over and over, is no success.
        if let State::Connected { since, .. } = self.state
            && now - since > MAX_PAUSE
        {
            self.backoff = BACKOFF.build();
        }
        let pause = self.backoff.next().unwrap_or(MAX_PAUSE);
        std::mem::replace(&mut self.state, State::Disconnected { since: now, retry_at: now + pause }).into_connection()
    }

    /// A call found no connection.
    fn reconnect_now(&mut self) {
        if let State::Disconnected { since, retry_at } = &mut self.state {
            *retry_at = (*retry_at).min(*since + PAUSE_WHEN_CALLED);
        }
    }

    /// There are other credentials.
    fn log_in_now(&mut self, now: Instant) {
        self.login_backoff = LOGIN_BACKOFF.build();
        match &mut self.state {
            State::Disconnected { retry_at, .. } => *retry_at = now,
            State::Connecting { .. } => {}
            State::Connected { log_in_at, .. } => *log_in_at = Some(now),
        }
    }

    /// The server accepted the credentials.
    fn logged_in(&mut self) {
        if let State::Connected { log_in_at, .. } = &mut self.state {
            *log_in_at = None;
        }
    }

    /// The server refused the credentials; the connection still works with those before.
    fn login_refused(&mut self, now: Instant) {
        let pause = self.login_backoff.next().unwrap_or(MAX_LOGIN_PAUSE);
        if let State::Connected { log_in_at, .. } = &mut self.state {
            *log_in_at = Some(now + pause);
        }
    }

    /// A call timed out.
    fn probe_now(&mut self, now: Instant) {
        if let State::Connected { probe_at, .. } = &mut self.state {
            *probe_at = now;
        }
    }

    /// The server answered a probe.
    fn answered(&mut self, now: Instant) {
        if let State::Connected { probe_at, .. } = &mut self.state {
            *probe_at = now + PROBE_INTERVAL;
        }
    }
}

impl<C> State<C> {
    fn into_connection(self) -> Option<C> {
        match self {
            Self::Connected { connection, .. } => Some(connection),
            Self::Disconnected { .. } | Self::Connecting { .. } => None,
        }
    }
}

/// What happened.
enum Event {
    /// Connected, or connected to the server that is used from now on.
    Connected(Live),
    Disconnected(StoreError),
    /// A call found no connection.
    ReconnectNow,
    /// A call timed out.
    ProbeNow,
    /// The server answered a probe.
    Answered,
    /// There are other credentials.
    LogInNow,
    LoggedIn,
    LoginRefused,
    /// The time to wait is over.
    Elapsed,
    /// The last receiver of the status is gone.
    Unused,
}

/// A connection, and the task that keeps it alive.
struct Live {
    connection: Arc<Connection>,
    io: IoTask,
    /// Returns a connection to another server as soon as that has to be used instead.
    replacement: Pin<Box<dyn Future<Output = (Connection, IoTask)> + Send>>,
}

impl Live {
    fn new<D: Dial>(server: &Arc<D>, (connection, io): (Connection, IoTask)) -> Self {
        let server = Arc::clone(server);
        let replacement = Box::pin(async move { server.replacement().await });
        Self { connection: Arc::new(connection), io, replacement }
    }

    /// Closes the connection once its calls in flight are over: they may still be answered.
    fn close_later(self, call_timeout: Duration) {
        let io = self.io;
        tokio::spawn(async move {
            sleep(call_timeout).await;
            drop(io);
        });
    }
}

/// Keeps a connection to `server`, also after a panic, which it reports by `on_panic`. Ends after the last receiver of
/// the status.
pub(super) async fn keep_supervising<D: Dial>(
    server: Arc<D>,
    call_timeout: Duration,
    reconnect_now: Arc<Notify>,
    status: watch::Sender<Status>,
    on_panic: impl Fn() + Send + 'static,
) {
    let starting = StoreError::NoConnection(format!("the connection to {server} is started again"));
    let failed = status.clone();
    let supervising = move || supervise(Arc::clone(&server), call_timeout, Arc::clone(&reconnect_now), status.clone());
    let on_panic = move || {
        on_panic();
        drop(failed.send_replace(Err(starting.clone())));
    };
    restart_after_panics(supervising, on_panic).await;
}

/// Runs a task until it ends, and again after each panic, which it reports by `on_panic`.
pub(super) async fn restart_after_panics<F>(task: impl Fn() -> F, on_panic: impl Fn())
where
    F: Future<Output = ()> + Send + 'static,
{
    // In a task of its own, because a panic ends the task in which it happens.
    while tokio::spawn(task()).await.is_err_and(|error| error.is_panic()) {
        on_panic();
        sleep(PAUSE_AFTER_PANIC).await;
    }
}

/// Keeps a connection to `server`, and publishes it or why there is none. Ends after the last receiver of the status.
async fn supervise<D: Dial>(
    server: Arc<D>,
    call_timeout: Duration,
    reconnect_now: Arc<Notify>,
    status: watch::Sender<Status>,
) {
    let mut supervisor = Supervisor::<Live>::new(Instant::now());
    let mut credentials = server.credentials().clone();
    loop {
        let event = match supervisor.next_step(Instant::now()) {
            Step::Connect => {
                // Those that come while it connects are used right after.
                drop(credentials.current());
                connect(&server).await
            }
            Step::Probe(live) => probe(&live.connection, call_timeout, &*server).await,
            Step::LogIn(live) => log_in_again(&live.connection, call_timeout, &mut credentials).await,
            Step::WaitUntil(time, Some(live)) => tokio::select! {
                event = live.next_event(&server) => event,
                () = credentials.changed() => Event::LogInNow,
                () = sleep_until(time) => Event::Elapsed,
                () = status.closed() => Event::Unused,
            },
            Step::WaitUntil(time, None) => tokio::select! {
                () = credentials.changed() => Event::LogInNow,
                () = reconnect_now.notified() => Event::ReconnectNow,
                () = sleep_until(time) => Event::Elapsed,
                () = status.closed() => Event::Unused,
            },
        };
        let now = Instant::now();
        match event {
            Event::Connected(live) => {
                drop(status.send_replace(Ok(Arc::clone(&live.connection))));
                if let Some(before) = supervisor.connected(live, now) {
                    before.close_later(call_timeout);
                }
            }
            Event::Disconnected(cause) => {
                if let Some(live) = supervisor.disconnected(now) {
                    live.close_later(call_timeout);
                }
                drop(status.send_replace(Err(cause)));
            }
            Event::ReconnectNow => supervisor.reconnect_now(),
            Event::ProbeNow => supervisor.probe_now(now),
            Event::Answered => supervisor.answered(now),
            Event::LogInNow => supervisor.log_in_now(now),
            Event::LoggedIn => supervisor.logged_in(),
            Event::LoginRefused => supervisor.login_refused(now),
            Event::Elapsed => {}
            Event::Unused => return,
        }
    }
}

async fn connect(server: &Arc<impl Dial>) -> Event {
    match within(CONNECT_TIMEOUT, server, server.dial()).await {
        Ok(connection) => Event::Connected(Live::new(server, connection)),
        Err(cause) => Event::Disconnected(cause),
    }
}

async fn probe(connection: &Connection, call_timeout: Duration, server: &impl Dial) -> Event {
    if connection.still_answers(call_timeout).await {
        Event::Answered
    } else {
        Event::Disconnected(StoreError::NoConnection(format!("{server} has stopped answering")))
    }
}

/// Logs in with other credentials, next to the calls in flight.
async fn log_in_again(connection: &Connection, call_timeout: Duration, credentials: &mut Credentials) -> Event {
    let Ok(Some(login)) = credentials.current() else { return Event::LoggedIn };
    match timeout(call_timeout, connection.authenticate(&login)).await {
        Ok(Ok(())) => Event::LoggedIn,
        Ok(Err(error)) => {
            drop(credentials.refused(error));
            Event::LoginRefused
        }
        Err(_) => {
            connection.probe_now.notify_one();
            Event::LoginRefused
        }
    }
}

impl Live {
    /// Waits for something that ends the connection, or makes it doubtful.
    async fn next_event<D: Dial>(&mut self, server: &Arc<D>) -> Event {
        let Self { connection, io, replacement } = self;
        tokio::select! {
            () = io.ended() => Event::Disconnected(StoreError::NoConnection(format!("{server} closed the connection"))),
            () = connection.read_only.notified() => Event::Disconnected(StoreError::Refused {
                code: READ_ONLY.to_owned(),
                detail: format!("{server} is a read-only replica; reconnecting to find the master"),
            }),
            () = connection.not_logged_in.notified() => Event::Disconnected(StoreError::Refused {
                code: NOT_LOGGED_IN.to_owned(),
                detail: format!("{server} asks for a password; reconnecting"),
            }),
            replacement = replacement => Event::Connected(Self::new(server, replacement)),
            () = connection.probe_now.notified() => Event::ProbeNow,
        }
    }
}

#[cfg(test)]
mod tests;
