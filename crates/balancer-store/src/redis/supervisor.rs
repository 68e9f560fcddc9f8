//! Keeps a connection: when to connect, when to probe, and how long to wait.

use std::sync::Arc;
use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::connection::{Connection, IoTask, READ_ONLY};
use super::dial::Dial;
use crate::StoreError;

/// The most that connecting may take. No call waits for it.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// The longest pause between two attempts to connect.
const MAX_PAUSE: Duration = Duration::from_secs(2);
/// Pauses double from 25 to 50 ms, up to between 1 and 2 s. They are random, so that a server that comes back is not
/// met by all its clients at once.
const BACKOFF: ExponentialBuilder = ExponentialBuilder::new()
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

/// The connection, or why there is none.
pub(super) type Status = Result<Arc<Connection>, StoreError>;

/// What to do next about a connection `C`. A pure value: the caller does the work, and reports the time and the result.
#[derive(Debug)]
struct Supervisor<C> {
    state: State<C>,
    backoff: ExponentialBackoff,
}

#[derive(Debug)]
enum State<C> {
    Disconnected { since: Instant, retry_at: Instant },
    Connecting { since: Instant },
    Connected { connection: C, since: Instant, probe_at: Instant },
}

/// What to do next.
#[derive(Debug, PartialEq, Eq)]
enum Step<'a, C> {
    Connect,
    Probe(&'a mut C),
    /// Wait for something to happen, at most until then.
    WaitUntil(Instant, Option<&'a mut C>),
}

impl<C> Supervisor<C> {
    /// Nothing is connected yet; the first step is to connect.
    fn new(now: Instant) -> Self {
        Self { state: State::Disconnected { since: now, retry_at: now }, backoff: BACKOFF.build() }
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
            State::Connected { connection, probe_at, .. } => match *probe_at {
                probe_at if probe_at <= now => Step::Probe(connection),
                probe_at => Step::WaitUntil(probe_at, Some(connection)),
            },
        }
    }

    /// The attempt to connect succeeded.
    fn connected(&mut self, connection: C, now: Instant) {
        let since = match self.state {
            State::Connecting { since } => since,
            State::Disconnected { .. } | State::Connected { .. } => now,
        };
        self.state = State::Connected { connection, since, probe_at: now + PROBE_INTERVAL };
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
        match std::mem::replace(&mut self.state, State::Disconnected { since: now, retry_at: now + pause }) {
            State::Connected { connection, .. } => Some(connection),
            State::Disconnected { .. } | State::Connecting { .. } => None,
        }
    }

    /// A call found no connection.
    fn reconnect_now(&mut self) {
        if let State::Disconnected { since, retry_at } = &mut self.state {
            *retry_at = (*retry_at).min(*since + PAUSE_WHEN_CALLED);
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

/// What happened.
enum Event {
    Connected(Live),
    Disconnected(StoreError),
    /// A call found no connection.
    ReconnectNow,
    /// A call timed out.
    ProbeNow,
    /// The server answered a probe.
    Answered,
    /// The time to wait is over.
    Elapsed,
    /// The last receiver of the status is gone.
    Unused,
}

/// A connection, and the task that keeps it alive.
struct Live {
    connection: Arc<Connection>,
    io: IoTask,
}

impl Live {
    /// Closes the connection once its calls in flight are over: they may still be answered.
    fn close_later(self, call_timeout: Duration) {
        let Self { connection, io } = self;
        let linger = connection.time_in_flight(call_timeout);
        tokio::spawn(async move {
            sleep(linger).await;
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
    loop {
        // In a task of its own, because a panic ends the task in which it happens.
        let supervising = supervise(Arc::clone(&server), call_timeout, Arc::clone(&reconnect_now), status.clone());
        if !tokio::spawn(supervising).await.is_err_and(|error| error.is_panic()) {
            return;
        }
        on_panic();
        drop(
            status.send_replace(Err(StoreError::NoConnection(format!("the connection to {server} is started again")))),
        );
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
    let mut supervisor = Supervisor::new(Instant::now());
    loop {
        let event = match supervisor.next_step(Instant::now()) {
            Step::Connect => connect(&*server).await,
            Step::Probe(live) => probe(live, call_timeout, &*server).await,
            Step::WaitUntil(time, Some(live)) => tokio::select! {
                event = live.next_event(&*server) => event,
                () = sleep_until(time) => Event::Elapsed,
                () = status.closed() => Event::Unused,
            },
            Step::WaitUntil(time, None) => tokio::select! {
                () = reconnect_now.notified() => Event::ReconnectNow,
                () = sleep_until(time) => Event::Elapsed,
                () = status.closed() => Event::Unused,
            },
        };
        let now = Instant::now();
        match event {
            Event::Connected(live) => {
                drop(status.send_replace(Ok(Arc::clone(&live.connection))));
                supervisor.connected(live, now);
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
            Event::Elapsed => {}
            Event::Unused => return,
        }
    }
}

async fn connect(server: &impl Dial) -> Event {
    match timeout(CONNECT_TIMEOUT, server.dial()).await {
        Ok(Ok((connection, io))) => Event::Connected(Live { connection: Arc::new(connection), io }),
        Ok(Err(cause)) => Event::Disconnected(cause),
        Err(_) => Event::Disconnected(StoreError::NoConnection(format!(
            "{server} did not answer within {CONNECT_TIMEOUT:?} of connecting"
        ))),
    }
}

async fn probe(live: &Live, call_timeout: Duration, server: &impl Dial) -> Event {
    if live.connection.still_answers(call_timeout).await {
        Event::Answered
    } else {
        Event::Disconnected(StoreError::NoConnection(format!("{server} has stopped answering")))
    }
}

impl Live {
    /// Waits for something that ends the connection, or makes it doubtful.
    async fn next_event(&mut self, server: &impl Dial) -> Event {
        let Self { connection, io } = self;
        tokio::select! {
            () = io.ended() => Event::Disconnected(StoreError::NoConnection(format!("{server} closed the connection"))),
            () = connection.read_only.notified() => Event::Disconnected(StoreError::Refused {
                code: READ_ONLY.to_owned(),
                detail: format!("{server} is a read-only replica; reconnecting to find the master"),
            }),
            () = connection.probe_now.notified() => Event::ProbeNow,
        }
    }
}

#[cfg(test)]
mod tests;
