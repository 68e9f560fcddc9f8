//! The one connection to the server, and the task that keeps it: no call ever waits for a connection
//! to be made.

use std::fmt;
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, Cmd, ErrorKind, RedisConnectionInfo, RedisError, Value};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::address::Address;
use super::scripts::Script;
use super::tls;
use crate::{StoreError, coalesce_wakeups};

/// The most that making a connection may take; no call waits for it.
const CONNECT_WITHIN: Duration = Duration::from_secs(5);
/// Between two attempts to connect: from the first to the last, doubling.
const PAUSE_FIRST: Duration = Duration::from_millis(50);
const PAUSE_LAST: Duration = Duration::from_secs(2);
/// A call that finds no connection ends the pause, though not earlier than this after its begin.
const PAUSE_WHEN_CALLED: Duration = Duration::from_millis(250);
/// An idle connection is tried this often: networks drop idle connections without a word, and a call
/// should not be the one to find out.
const PROBE_EVERY: Duration = Duration::from_secs(10);
const READ_ONLY: &str = "READONLY";

/// The handle by which calls find the connection.
pub(super) struct Link {
    state: watch::Receiver<State>,
    wanted: Arc<Notify>,
    address: Arc<Address>,
    timeout: Duration,
}

/// The connection, or why there is none.
type State = Result<Arc<Connection>, StoreError>;

struct Connection {
    redis: MultiplexedConnection,
    /// A call timed out: does the server still answer?
    suspect: Notify,
    /// How much longer than others the calls underway may take together, in µs. The server does one after
    /// the other, and answers nobody meanwhile.
    longer: AtomicU64,
    /// The server has become a read-only replica: another one is the master now.
    read_only: Notify,
}

impl Link {
    /// Starts the task and waits for its first attempt, for `timeout` at most.
    pub(super) async fn open(address: Address, timeout: Duration) -> Self {
        let address = Arc::new(address);
        let connecting = StoreError::NoConnection(format!("still connecting to {address}"));
        let (publish, mut state) = watch::channel(Err(connecting));
        let wanted = Arc::new(Notify::new());
        let keeper = Keeper { address: Arc::clone(&address), timeout, wanted: Arc::clone(&wanted), publish };
        tokio::spawn(keeper.keep());
        // Whether it came to a connection or not, the ledger can be used.
        let _ = tokio::time::timeout(timeout, state.changed()).await;
        Self { state, wanted, address, timeout }
    }

    /// Runs a script by its hash. One round trip, or three where the server does not know the script.
    pub(super) async fn run(&self, script: &Script, command: Cmd) -> Result<Value, StoreError> {
        let connection = self.connection()?;
        self.call(&connection, Some(script), command, self.timeout).await
    }

    /// The same for a script that may take so much longer than others. The connection is kept for it,
    /// though others time out meanwhile.
    pub(super) async fn run_longer(
        &self,
        script: &Script,
        command: Cmd,
        longer: Duration,
    ) -> Result<Value, StoreError> {
        let connection = self.connection()?;
        let _underway = connection.begin(longer);
        self.call(&connection, Some(script), command, connection.all_over_in(self.timeout)).await
    }

    /// Sends a command that is no script. One round trip.
    pub(super) async fn ask(&self, command: Cmd) -> Result<Value, StoreError> {
        let connection = self.connection()?;
        self.call(&connection, None, command, self.timeout).await
    }

    fn connection(&self) -> State {
        self.state.borrow().clone().inspect_err(|_| self.wanted.notify_one())
    }

    async fn call(
        &self,
        connection: &Connection,
        script: Option<&Script>,
        command: Cmd,
        time: Duration,
    ) -> Result<Value, StoreError> {
        match timeout(time, connection.run(script, &command)).await {
            Ok(answer) => {
                if answer.as_ref().is_err_and(is_read_only) {
                    connection.read_only.notify_one();
                }
                answer
            }
            Err(_) => {
                connection.suspect.notify_one();
                Err(StoreError::TimedOut(time))
            }
        }
    }
}

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Link")
            .field("server", &format_args!("{}", self.address))
            .field("tls", &self.address.tls)
            .field("state", &self.state.borrow().as_ref().map(|_| "connected"))
            .field("timeout", &self.timeout)
            .finish()
    }
}

impl Connection {
    async fn run(&self, script: Option<&Script>, command: &Cmd) -> Result<Value, StoreError> {
        match (self.send(command).await, script) {
            // A server that was restarted, or told SCRIPT FLUSH.
            (Err(StoreError::Refused { code, .. }), Some(script)) if code == "NOSCRIPT" => {
                self.send(redis::cmd("SCRIPT").arg("LOAD").arg(script.code())).await?;
                self.send(command).await
            }
            (answer, _) => answer,
        }
    }

    async fn send(&self, command: &Cmd) -> Result<Value, StoreError> {
        match self.redis.clone().send_packed_command(command).await {
            Ok(Value::ServerError(refusal)) => Err(StoreError::Refused {
                code: refusal.code().to_owned(),
                detail: refusal.details().unwrap_or_default().to_owned(),
            }),
            Ok(answer) => Ok(answer),
            Err(error) => Err(store_error(&error)),
        }
    }

    /// Begins a call that may take so much longer than others.
    fn begin(&self, longer: Duration) -> Underway<'_> {
        let longer = u64::try_from(longer.as_micros()).unwrap_or(u64::MAX);
        self.longer.fetch_add(longer, Ordering::Relaxed);
        Underway { connection: self, longer }
    }

    /// In what time all calls underway are over, where most are given `usual`.
    fn all_over_in(&self, usual: Duration) -> Duration {
        usual.saturating_add(Duration::from_micros(self.longer.load(Ordering::Relaxed)))
    }

    /// Whether the server answers at all; that it refuses is an answer.
    async fn still_answers(&self, usual: Duration) -> bool {
        match timeout(self.all_over_in(usual), self.send(&redis::cmd("PING"))).await {
            Ok(Ok(_) | Err(StoreError::Refused { .. })) => true,
            Ok(Err(_)) | Err(_) => false,
        }
    }
}

/// A call that may take longer than others.
struct Underway<'a> {
    connection: &'a Connection,
    longer: u64,
}

impl Drop for Underway<'_> {
    fn drop(&mut self) {
        self.connection.longer.fetch_sub(self.longer, Ordering::Relaxed);
    }
}

/// The task that makes the connection, watches over it, and makes it anew.
struct Keeper {
    address: Arc<Address>,
    timeout: Duration,
    wanted: Arc<Notify>,
    publish: watch::Sender<State>,
}

impl Keeper {
    /// Tells the calls how it stands from now on.
    fn tell(&self, state: State) {
        drop(self.publish.send_replace(state));
    }

    /// Ends with the last handle.
    async fn keep(self) {
        let mut pause = PAUSE_FIRST;
        loop {
            let begin = Instant::now();
            let failure = match self.connect().await {
                Ok((connection, mut driver)) => {
                    let connection = Arc::new(connection);
                    self.tell(Ok(Arc::clone(&connection)));
                    let failure = self.watch_over(&connection, &mut driver).await;
                    // The calls underway on it may yet be answered.
                    let linger = connection.all_over_in(self.timeout);
                    tokio::spawn(async move {
                        sleep(linger).await;
                        drop(driver);
                    });
                    // One that the server takes and breaks, over and over, is no success.
                    if begin.elapsed() > PAUSE_LAST {
                        pause = PAUSE_FIRST;
                    }
                    failure
                }
                Err(failure) => failure,
            };
            self.tell(Err(failure));
            tokio::select! {
                () = self.pause(jittered(pause)) => {}
                () = self.publish.closed() => return,
            }
            pause = PAUSE_LAST.min(pause * 2);
        }
    }

    /// Returns when the connection is of no more use, and why.
    async fn watch_over(&self, connection: &Connection, driver: &mut Driver) -> StoreError {
        let address = &self.address;
        loop {
            tokio::select! {
                _ = &mut driver.0 => {
                    return StoreError::NoConnection(format!("{address} closed the connection"));
                }
                () = self.publish.closed() => {
                    return StoreError::NoConnection("no longer needed".to_owned());
                }
                () = connection.read_only.notified() => {
                    let detail = format!("{address} is a read-only replica; connecting anew to find the master");
                    return StoreError::Refused { code: READ_ONLY.to_owned(), detail };
                }
                () = connection.suspect.notified() => {}
                () = sleep(PROBE_EVERY) => {}
            }
            if !connection.still_answers(self.timeout).await {
                return StoreError::NoConnection(format!("{address} has stopped answering"));
            }
        }
    }

    async fn pause(&self, pause: Duration) {
        let begin = Instant::now();
        let called = async {
            self.wanted.notified().await;
            sleep_until(begin + PAUSE_WHEN_CALLED).await;
        };
        tokio::select! {
            () = sleep(pause) => {}
            () = called => {}
        }
    }

    async fn connect(&self) -> Result<(Connection, Driver), StoreError> {
        let address = &self.address;
        let hidden = |error| match error {
            StoreError::Refused { code, detail } => {
                StoreError::Refused { code, detail: address.without_password(&detail) }
            }
            StoreError::NoConnection(cause) => StoreError::NoConnection(format!("{address}: {cause}")),
            other => other,
        };
        match timeout(CONNECT_WITHIN, self.try_connect()).await {
            Ok(connected) => connected.map_err(hidden),
            Err(_) => {
                let cause = format!("{address} did not answer within {CONNECT_WITHIN:?} of connecting");
                Err(StoreError::NoConnection(cause))
            }
        }
    }

    async fn try_connect(&self) -> Result<(Connection, Driver), StoreError> {
        let address = &*self.address;
        let failed = |error: std::io::Error| StoreError::NoConnection(error.to_string());
        let stream = TcpStream::connect((address.host.as_str(), address.port)).await.map_err(failed)?;
        stream.set_nodelay(true).map_err(failed)?;
        let (redis, driver) = if address.tls {
            drive(tls::secure(stream, &address.host).await.map_err(failed)?).await?
        } else {
            drive(stream).await?
        };
        let (suspect, read_only) = (Notify::new(), Notify::new());
        let connection = Connection { redis, suspect, longer: AtomicU64::new(0), read_only };
        // Not left to redis, which tells any refusal as a wrong password.
        if let Some(password) = address.introduction.password() {
            let mut auth = redis::cmd("AUTH");
            auth.arg(address.introduction.username()).arg(password);
            connection.send(&auth).await?;
        }
        if address.introduction.db() != 0 {
            connection.send(redis::cmd("SELECT").arg(address.introduction.db())).await?;
        }
        // A frozen server takes connections too; one that is loading its data is not there yet.
        match connection.send(&redis::cmd("PING")).await {
            // Forbidden to this user perhaps, but understood.
            Err(StoreError::Refused { code, .. }) if code == "NOPERM" => {}
            answer => drop(answer?),
        }
        Ok((connection, driver))
    }
}

/// What reads and writes the connection; it ends when this is dropped, or the connection breaks.
struct Driver(JoinHandle<()>);

impl Drop for Driver {
    fn drop(&mut self) {
        self.0.abort();
    }
}

async fn drive<S>(stream: S) -> Result<(MultiplexedConnection, Driver), StoreError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    // Each call has its own, shorter, time.
    let config = AsyncConnectionConfig::new().set_response_timeout(None);
    let silent = RedisConnectionInfo::default().set_skip_set_lib_name();
    let (redis, driver) =
        MultiplexedConnection::new_with_config(&silent, stream, config).await.map_err(|error| store_error(&error))?;
    // The calls that are ready go out together.
    Ok((redis, Driver(tokio::spawn(coalesce_wakeups(driver)))))
}

fn store_error(error: &RedisError) -> StoreError {
    match error.kind() {
        ErrorKind::Parse => StoreError::InvalidReply(error.to_string()),
        _ => StoreError::NoConnection(error.to_string()),
    }
}

fn is_read_only(error: &StoreError) -> bool {
    // Up to Redis 6, a script's refusal is an ERR that quotes it.
    matches!(error, StoreError::Refused { code, detail } if code == READ_ONLY || detail.contains("-READONLY "))
}

/// Somewhere in the pause's second half, so that a server that comes back is not met by all at once.
fn jittered(pause: Duration) -> Duration {
    let random = RandomState::new().hash_one(()) as u32;
    pause.mul_f64(0.5 + 0.5 * f64::from(random) / f64::from(u32::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::InvalidRedisUrl;

    fn keeper() -> Result<Keeper, InvalidRedisUrl> {
        Ok(Keeper {
            address: Arc::new(Address::parse("redis://localhost")?),
            timeout: Duration::from_secs(1),
            wanted: Arc::new(Notify::new()),
            publish: watch::Sender::new(Err(StoreError::NoConnection(String::new()))),
        })
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_ends_a_long_pause_but_many_calls_do_not_end_a_short_one() -> Result<(), InvalidRedisUrl> {
        let keeper = keeper()?;
        let begin = Instant::now();
        keeper.pause(PAUSE_LAST).await;
        assert_eq!(begin.elapsed(), PAUSE_LAST);
        for pause in [PAUSE_FIRST, PAUSE_LAST] {
            keeper.wanted.notify_one();
            let begin = Instant::now();
            keeper.pause(pause).await;
            assert_eq!(begin.elapsed(), pause.min(PAUSE_WHEN_CALLED));
        }
        Ok(())
    }

    #[test]
    fn pauses_differ_and_are_never_longer_than_told_nor_shorter_than_half() {
        let pauses: Vec<Duration> = (0..1_000).map(|_| jittered(PAUSE_LAST)).collect();
        assert!(pauses.iter().all(|pause| (PAUSE_LAST / 2..=PAUSE_LAST).contains(pause)), "{pauses:?}");
        let (low, high) = (PAUSE_LAST.mul_f64(0.6), PAUSE_LAST.mul_f64(0.9));
        assert!(pauses.iter().any(|pause| *pause < low) && pauses.iter().any(|pause| *pause > high), "{pauses:?}");
    }
}
