//! Ledgers in Redis: two keys for each job, and one atomic script for each change.

mod address;
#[cfg(feature = "aws-iam")]
mod aws_iam;
mod cluster;
mod connection;
mod credentials;
mod dial;
mod mode;
mod options;
#[cfg(test)]
mod peer;
mod placed;
mod reply;
mod scripts;
mod sentinel;
mod servers;
mod single_server;
mod supervisor;
mod tls;
mod transport;

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use balancer_core::{
    Capacity, Counts, JobId, JobLedger, JobRef, JobState, LearnOutcome, LiveExecutor, PlaceOutcome, PlaceRequest,
    Policy, PolicyOverrides, ReconcileOutcome, RemovalOutcome, Steer, SteerOutcome, Steering, Term, Unconfirmed,
};
use redis::{Cmd, RedisWrite, Value};

pub use self::address::InvalidRedisUrl;
use self::address::RedisUrl;
#[cfg(feature = "aws-iam")]
use self::aws_iam::AwsIamTokens;
use self::credentials::{Credentials, Login, PasswordFile};
use self::dial::Tcp;
use self::mode::Detection;
pub use self::options::{AwsIam, AwsService, ConnectError, RedisMode, RedisOptions, RedisPassword};
use self::placed::PlacedJobs;
use self::scripts::{Script, Scripts};
use self::servers::{OnPanic, Servers, Target};
use self::transport::Transport;
use crate::{Cursor, EntryPage, JobPage, JobRecord, Ledger, StoreError};

/// Where servers listen, and where sentinels do, if the URL has no port.
const PORT: u16 = 6379;
const SENTINEL_PORT: u16 = 26379;
/// Jobs of which executors were placed that a server keeps at most: nobody may be there to take them.
const MAX_PLACED: usize = 10_000;
/// How long jobs are collected before they are sent together.
const COLLECT_PLACED: Duration = Duration::from_millis(10);
/// How many entries of a job the server goes through for one page, at about 1 µs each.
const ENTRIES_PER_PAGE: usize = 512;
/// Jobs that are taken from a server at once.
const TAKEN_AT_ONCE: usize = 256;

/// The ledgers in a Redis or Valkey server, 6.0 or newer, or in several that work together.
///
/// One connection to a server carries all calls at once. While there is no connection, or the server has stopped
/// answering on it, calls fail at once, and a task of this ledger reconnects.
///
/// An ACL user needs the keys `exec-count:*`, `exec-pods:*`, `exec-heartbeat` and `exec-placed` and the
/// commands `evalsha`, `script|load`, `time`, `pexpire`, `hget`, `hmget`, `hlen`, `hset`, `hdel`, `hvals`,
/// `hgetall`, `hscan`, `unlink`, `scan`, `get`, `set`, `scard`, `sadd` and `spop`.
/// With sentinels, `role` too: without it, the server that most sentinels name is taken to be the primary. In a cluster,
/// `cluster|slots` and `cluster|info`, and the keys `exec-heartbeat:*` and `exec-placed:*`.
pub struct RedisLedger {
    shared: Arc<Shared>,
}

/// What a task in the background needs too.
struct Shared {
    transport: Servers,
    scripts: Scripts,
    /// In milliseconds, as the scripts take it.
    ttl: String,
    placed: PlacedJobs,
    /// For one call.
    timeout: Duration,
}

impl RedisLedger {
    /// Connects to the servers that the URL names.
    ///
    /// Waits for the connection, a few times `options.timeout` at most, and succeeds without one too: the ledger connects
    /// as soon as the servers are up. Only mistakes in the settings are errors. A mistake that is found later, because the
    /// servers were not up, is the error of each call. Must be called on a Tokio runtime.
    pub async fn connect(url: &str, options: RedisOptions) -> Result<Self, ConnectError> {
        Self::connect_with(url, options, || {}).await
    }

    /// Like [`connect`](Self::connect). `on_panic` is called each time a task that keeps the connections has panicked, which
    /// is a defect. The task is then started again, after a second.
    pub async fn connect_with(
        url: &str,
        options: RedisOptions,
        on_panic: impl Fn() + Send + Sync + 'static,
    ) -> Result<Self, ConnectError> {
        let ttl = options.ttl.as_millis().min(MAX_MILLIS.into()).to_string();
        let default_port = if options.mode == RedisMode::Sentinel { SENTINEL_PORT } else { PORT };
        let url = RedisUrl::parse(url, default_port)?;
        options.check(&url)?;
        let on_panic: OnPanic = Arc::new(on_panic);
        let RedisUrl { servers, tls, user, password, database } = url;
        let credentials = match options.password {
            RedisPassword::Url => Credentials::fixed(password.map(|password| Login { user, password })),
            RedisPassword::File(path) => from_file(PasswordFile { path, user }, options.timeout, &on_panic).await?,
            #[cfg(feature = "aws-iam")]
            RedisPassword::AwsIam(iam) => {
                let tokens = AwsIamTokens::new(iam, user.unwrap_or_default());
                let on_panic = Arc::clone(&on_panic);
                Credentials::from_source(tokens, options.timeout, move || on_panic()).await
            }
            #[cfg(not(feature = "aws-iam"))]
            RedisPassword::AwsIam(_) => unreachable!("refused by RedisOptions::check"),
        };
        let sentinel_credentials = match options.sentinel_password_file {
            None => Credentials::fixed(None),
            Some(path) => {
                let file = PasswordFile { path, user: options.sentinel_username };
                from_file(file, options.timeout, &on_panic).await?
            }
        };
        let detection = Detection {
            network: Tcp { tls },
            servers,
            credentials,
            sentinel_credentials,
            mode: options.mode,
            has_sentinel_master: options.sentinel_master.is_some(),
            database,
        };
        let (sentinel_master, timeout) = (options.sentinel_master, options.timeout);
        let target = Target { detection, sentinel_master, timeout, on_panic };
        let transport = Servers::connect(target).await.map_err(ConnectError::Mode)?;
        let placed = PlacedJobs::new(Instant::now());
        Ok(Self {
            shared: Arc::new(Shared { transport, scripts: Scripts::default(), ttl, placed, timeout: options.timeout }),
        })
    }

    /// `EVALSHA` of a script on a job's two keys, with room for this many arguments of this many bytes.
    fn command(script: &Script, job: JobRef<'_>, arguments: usize, bytes: usize) -> Cmd {
        let JobRef { namespace, app_id } = job;
        let keys = 2 * (namespace.len() + app_id.len()) + "exec-count:{:}exec-pods:{:}".len();
        let mut command = Cmd::with_capacity(5 + arguments, "EVALSHA2".len() + script.sha().len() + keys + bytes);
        command.write_arg(b"EVALSHA");
        command.write_arg(script.sha().as_bytes());
        command.write_arg(b"2");
        command.write_arg_fmt(format_args!("exec-count:{{{namespace}:{app_id}}}"));
        command.write_arg_fmt(format_args!("exec-pods:{{{namespace}:{app_id}}}"));
        command
    }

    /// Sends the job to the server, with those that come at about the same time. The admission does not wait for it.
    fn note_placed(&self, job: JobRef<'_>) {
        if !self.shared.placed.add(job, Instant::now()) {
            return;
        }
        let shared = Arc::clone(&self.shared);
        tokio::spawn(async move {
            tokio::time::sleep(COLLECT_PLACED).await;
            let Shared { transport, scripts, ttl, placed, .. } = &*shared;
            if transport.note_placed(&scripts.note_placed, ttl, MAX_PLACED, placed.take()).await.is_err() {
                placed.forget_sent();
            }
        });
    }

    /// Runs the command that `command` makes for the job's ledger. If that belongs to another driver, nothing was changed,
    /// and the command is run for the ledger of this driver, within what is left of the time for one call. Returns that
    /// ledger's job too, if it was called.
    async fn run_for_driver(
        &self,
        script: &Script,
        job: JobRef<'_>,
        driver: Option<&str>,
        command: impl Fn(JobRef<'_>) -> Cmd,
    ) -> (Option<JobId>, Result<Value, StoreError>) {
        let (began, limit) = (Instant::now(), self.shared.timeout);
        let reply = self.shared.transport.run(script, command(job)).await;
        match (driver, &reply) {
            (Some(driver), Ok(answer)) if reply::belongs_to_another_driver(answer) => {
                let job = JobId::of_driver(job, driver);
                let repeated = self.shared.transport.run(script, command(job.as_job_ref()));
                let reply = tokio::time::timeout(limit.saturating_sub(began.elapsed()), repeated).await;
                (Some(job), reply.unwrap_or(Err(StoreError::TimedOut(limit))))
            }
            _ => (None, reply),
        }
    }

    /// The call of `place.lua` or `peek.lua`.
    fn place_command(&self, script: &Script, job: JobRef<'_>, request: &PlaceRequest<'_>) -> Cmd {
        let PlaceRequest { key: executor, required, overrides, policy, may_create, driver } = *request;
        // Ninety-six bytes hold two policies.
        let bytes = self.shared.ttl.len() + executor.len() + driver.map_or(0, str::len) + 80;
        let mut command = Self::command(script, job, 7, bytes);
        command.write_arg(self.shared.ttl.as_bytes());
        command.write_arg(executor.as_bytes());
        // Most executors have none of the rest.
        let has_more = required.is_some() || overrides != PolicyOverrides::default() || policy.is_some() || !may_create;
        if driver.is_some() || has_more {
            command.write_arg(driver.unwrap_or_default().as_bytes());
        }
        if has_more {
            command.write_arg(text(required).as_bytes());
            command.write_arg_fmt(overrides);
            match policy {
                Some(policy) => command.write_arg_fmt(policy),
                None => command.write_arg(b""),
            }
            if !may_create {
                command.write_arg(EXISTING);
            }
        }
        command
    }
}

impl Ledger for RedisLedger {
    async fn place(&self, job: JobRef<'_>, request: &PlaceRequest<'_>) -> Result<PlaceOutcome, StoreError> {
        let script = &self.shared.scripts.place;
        let command = |job: JobRef<'_>| self.place_command(script, job, request);
        let (other, reply) = self.run_for_driver(script, job, request.driver, command).await;
        let outcome = reply.and_then(|reply| reply::placed(&reply));
        // A placement that was not answered in time may have taken effect.
        if matches!(outcome, Ok(PlaceOutcome::Placed(_)) | Err(StoreError::TimedOut(_))) {
            self.note_placed(other.as_ref().map_or(job, JobId::as_job_ref));
        }
        outcome
    }

    async fn peek(&self, job: JobRef<'_>, request: &PlaceRequest<'_>) -> Result<PlaceOutcome, StoreError> {
        let script = &self.shared.scripts.peek;
        let command = |job: JobRef<'_>| self.place_command(script, job, request);
        let (_, reply) = self.run_for_driver(script, job, request.driver, command).await;
        reply::placed(&reply?)
    }

    async fn release(
        &self,
        job: JobRef<'_>,
        executor: &str,
        uid: Option<&str>,
        driver: Option<&str>,
    ) -> Result<Option<Capacity>, StoreError> {
        let script = &self.shared.scripts.release;
        let bytes = executor.len() + driver.map_or(0, str::len) + uid.map_or(0, str::len);
        let command = |job: JobRef<'_>| {
            let mut command = Self::command(script, job, 5, self.shared.ttl.len() + bytes + 2);
            command.write_arg(self.shared.ttl.as_bytes());
            command.write_arg(executor.as_bytes());
            if driver.is_some() || uid.is_some() {
                command.write_arg(driver.unwrap_or_default().as_bytes());
            }
            if let Some(uid) = uid {
                command.write_arg(uid.as_bytes());
                command.write_arg_fmt(JobLedger::RELEASED_REMEMBERED);
            }
            command
        };
        let (_, reply) = self.run_for_driver(script, job, driver, command).await;
        reply::released_capacity(&reply?)
    }

    async fn learn(
        &self,
        job: JobRef<'_>,
        policy: Policy,
        driver: Option<&str>,
        may_create: bool,
    ) -> Result<LearnOutcome, StoreError> {
        let script = &self.shared.scripts.learn;
        let command = |job: JobRef<'_>| {
            let bytes = self.shared.ttl.len() + driver.map_or(0, str::len) + 48;
            let mut command = Self::command(script, job, 4, bytes);
            command.write_arg(self.shared.ttl.as_bytes());
            command.write_arg_fmt(policy);
            if driver.is_some() || !may_create {
                command.write_arg(driver.unwrap_or_default().as_bytes());
            }
            if !may_create {
                command.write_arg(EXISTING);
            }
            command
        };
        let (_, reply) = self.run_for_driver(script, job, driver, command).await;
        reply::learned(&reply?)
    }

    async fn reconcile(
        &self,
        job: JobRef<'_>,
        state: &JobState<'_>,
        grace: Duration,
        term: Term,
    ) -> Result<ReconcileOutcome, StoreError> {
        let script = &self.shared.scripts.reconcile;
        let JobState { live, gone, overrides, ended, driver } = *state;
        let driver = driver.unwrap_or_default();
        let grace = grace.as_millis().min(MAX_MILLIS.into());
        let names: usize = live.iter().map(|live| live.key.len() + live.uid.len() + "on-demand+".len()).sum();
        let gone_names: usize = gone.iter().map(|key| key.len()).sum();
        // Ninety-six bytes hold the grace, a policy, a term and the rest.
        let bytes = self.shared.ttl.len() + 96 + driver.len() + names + gone_names;
        let mut command = Self::command(script, job, 9 + gone.len() + 3 * live.len(), bytes);
        command.write_arg(self.shared.ttl.as_bytes());
        command.write_arg_fmt(grace);
        command.write_arg_fmt(overrides);
        command.write_arg_fmt(term);
        command.write_arg(if ended { b"ended" } else { b"" });
        command.write_arg_fmt(JobLedger::RELEASE_GRACE);
        command.write_arg_fmt(JobLedger::WAITING_REPORTED);
        command.write_arg(driver.as_bytes());
        command.write_arg_fmt(gone.len());
        for key in gone {
            command.write_arg(key.as_bytes());
        }
        for &LiveExecutor { key: executor, uid, capacity, states_ratio } in live {
            command.write_arg(executor.as_bytes());
            command.write_arg(uid.as_bytes());
            match states_ratio {
                true => command.write_arg_fmt(format_args!("{}+", text(capacity))),
                false => command.write_arg(text(capacity).as_bytes()),
            }
        }
        reply::reconciled(&self.shared.transport.run(script, command).await?)
    }

    async fn entries(&self, job: JobRef<'_>, cursor: Option<Cursor>) -> Result<EntryPage, StoreError> {
        let JobRef { namespace, app_id } = job;
        let mut command = redis::cmd("HSCAN");
        command.arg(format!("exec-pods:{{{namespace}:{app_id}}}"));
        command.arg(cursor.as_ref().map_or("0", Cursor::as_str)).arg("COUNT").arg(ENTRIES_PER_PAGE);
        reply::entry_page(&self.shared.transport.read(command).await?)
    }

    async fn begin_count(&self, job: JobRef<'_>, term: Term) -> Result<(), StoreError> {
        let script = &self.shared.scripts.begin_count;
        let mut command = Self::command(script, job, 2, self.shared.ttl.len() + 20);
        command.write_arg(self.shared.ttl.as_bytes());
        command.write_arg_fmt(term);
        reply::nothing(&self.shared.transport.run(script, command).await?)
    }

    async fn correct_counts(&self, job: JobRef<'_>, found: Counts, term: Term) -> Result<bool, StoreError> {
        let script = &self.shared.scripts.correct_counts;
        let mut command = Self::command(script, job, 4, self.shared.ttl.len() + 60);
        command.write_arg(self.shared.ttl.as_bytes());
        command.write_arg_fmt(term);
        command.write_arg_fmt(found.spot);
        command.write_arg_fmt(found.on_demand);
        reply::is_done(&self.shared.transport.run(script, command).await?)
    }

    async fn remove_unconfirmed(
        &self,
        job: JobRef<'_>,
        absent: &[Unconfirmed],
        term: Term,
    ) -> Result<RemovalOutcome, StoreError> {
        let script = &self.shared.scripts.remove_unconfirmed;
        let bytes: usize = absent.iter().map(|placement| placement.key.len() + 20).sum();
        let mut command = Self::command(script, job, 2 + 2 * absent.len(), self.shared.ttl.len() + 20 + bytes);
        command.write_arg(self.shared.ttl.as_bytes());
        command.write_arg_fmt(term);
        for Unconfirmed { placed_at, key: executor } in absent {
            command.write_arg_fmt(placed_at);
            command.write_arg(executor.as_bytes());
        }
        reply::removed(&self.shared.transport.run(script, command).await?)
    }

    async fn steer(&self, job: JobRef<'_>, steer: Steer<'_>, term: Term) -> Result<SteerOutcome, StoreError> {
        let script = &self.shared.scripts.steer;
        let mut command = Self::command(script, job, 4, self.shared.ttl.len() + 40);
        command.write_arg(self.shared.ttl.as_bytes());
        command.write_arg_fmt(term);
        match steer {
            Steer::CloseSpot { retry_after } => {
                command.write_arg(b"close");
                command.write_arg_fmt(retry_after.min(MAX_RETRY_AFTER));
            }
            Steer::OpenSpot => command.write_arg(b"open"),
            Steer::Avoid(types) => {
                command.write_arg(b"avoid");
                command.write_arg(Steering::avoidable(types).collect::<Vec<_>>().join(" ").as_bytes());
            }
        }
        reply::steered(&self.shared.transport.run(script, command).await?)
    }

    async fn take_placed(&self) -> Result<Vec<JobId>, StoreError> {
        let replies = self.shared.transport.take_placed(&self.shared.scripts.take_placed, TAKEN_AT_ONCE).await?;
        let jobs = replies.iter().map(reply::jobs).collect::<Result<Vec<_>, _>>()?;
        Ok(jobs.into_iter().flatten().collect())
    }

    async fn record(&self, job: JobRef<'_>) -> Result<Option<JobRecord>, StoreError> {
        let script = &self.shared.scripts.record;
        let mut command = Self::command(script, job, 1, self.shared.ttl.len());
        command.write_arg(self.shared.ttl.as_bytes());
        reply::record(&self.shared.transport.run(script, command).await?)
    }

    async fn list_jobs(&self, cursor: Option<Cursor>) -> Result<JobPage, StoreError> {
        let page = self.shared.transport.list_keys("exec-count:{*:*}", cursor).await?;
        Ok(JobPage { jobs: page.keys.iter().filter_map(reply::job).collect(), next: page.next })
    }

    async fn heartbeat(&self, heartbeat: u64) -> Result<Option<u64>, StoreError> {
        reply::heartbeat(
            &self.shared.transport.heartbeat(&self.shared.scripts.heartbeat, &self.shared.ttl, heartbeat).await?,
        )
    }

    async fn get(&self, job: JobRef<'_>) -> Result<Option<JobLedger>, StoreError> {
        let script = &self.shared.scripts.get;
        let ledger = reply::ledger(&self.shared.transport.run(script, Self::command(script, job, 0, 0)).await?)?;
        Ok(Some(ledger).filter(|ledger| ledger.policy().is_some() || !ledger.entries().is_empty()))
    }
}

/// Credentials from a file that can be used now.
async fn from_file(file: PasswordFile, limit: Duration, on_panic: &OnPanic) -> Result<Credentials, ConnectError> {
    let on_panic = Arc::clone(on_panic);
    let mut credentials = Credentials::from_source(file, limit, move || on_panic()).await;
    match credentials.current() {
        Ok(_) => Ok(credentials),
        Err(StoreError::NoConnection(cause)) => Err(ConnectError::PasswordFile(cause)),
        Err(error) => Err(ConnectError::PasswordFile(error.to_string())),
    }
}

impl fmt::Debug for RedisLedger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisLedger")
            .field("transport", &self.shared.transport)
            .field("ttl", &self.shared.ttl)
            .finish_non_exhaustive()
    }
}

/// The argument that forbids to create a ledger.
const EXISTING: &[u8] = b"existing";

/// The longest time that scripts take, in ms. Redis adds it to the current time, in 64 bits, and a Lua number is exact up
/// to here. Three hundred thousand years are enough.
const MAX_MILLIS: u64 = 1 << 53;

/// The longest time until spot is probed again, in ms. With the current time it has 15 digits, which the scripts read.
const MAX_RETRY_AFTER: u64 = 100_000_000_000_000;

const fn text(capacity: Option<Capacity>) -> &'static str {
    match capacity {
        Some(capacity) => capacity.as_str(),
        None => "",
    }
}
