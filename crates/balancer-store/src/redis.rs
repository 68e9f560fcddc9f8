//! Ledgers in Redis: two keys for each job, and one atomic script for each change.

mod address;
mod connection;
mod dial;
#[cfg(test)]
mod peer;
mod reply;
mod scripts;
mod single_server;
mod supervisor;
mod tls;
mod transport;

use std::fmt;
use std::time::Duration;

use balancer_core::{
    Capacity, Counts, JobLedger, JobRef, JobState, LiveExecutor, PlaceOutcome, PlaceRequest, Policy, PolicyOverrides,
    ReconcileOutcome, Term,
};
use redis::{Cmd, RedisWrite};

use self::address::Address;
pub use self::address::InvalidRedisUrl;
use self::scripts::{Script, Scripts};
use self::single_server::SingleServer;
use self::transport::Transport;
use crate::{Cursor, JobPage, Ledger, StoreError};

/// How much longer than other calls a reconcile may take for each live executor. The server needs about 5 µs for each,
/// and answers nobody meanwhile: 100,000 of them take as long as the usual time limit. This leaves room for a server
/// or a network that is four times as slow.
const TIME_PER_LIVE_EXECUTOR: Duration = Duration::from_micros(20);

/// How a [`RedisLedger`] behaves.
#[derive(Clone, Copy, Debug)]
pub struct RedisOptions {
    /// The most that one call may take.
    pub timeout: Duration,
    /// How long a job's ledger is kept after the last call for the job.
    pub ttl: Duration,
}

/// The ledgers in a Redis or Valkey server, 6.0 or newer.
///
/// One connection carries all calls at once. While there is no connection, or the server has stopped answering on it,
/// calls fail at once, and a task of this ledger reconnects.
///
/// An ACL user needs the keys `exec-count:*`, `exec-pods:*` and `exec-heartbeat` and the
/// commands `evalsha`, `script|load`, `time`, `pexpire`, `hget`, `hmget`, `hlen`, `hset`, `hdel`, `hvals`,
/// `hgetall`, `del`, `scan`, `get` and `set`.
pub struct RedisLedger {
    transport: SingleServer,
    scripts: Scripts,
    /// In milliseconds, as the scripts take it.
    ttl: String,
}

impl RedisLedger {
    /// Connects to the server that the URL names.
    ///
    /// Waits for the connection, at most for `options.timeout`, and succeeds without one too: the ledger connects as
    /// soon as the server is up. Only an invalid URL is an error. Must be called on a Tokio runtime.
    pub async fn connect(url: &str, options: RedisOptions) -> Result<Self, InvalidRedisUrl> {
        let ttl = millis(options.ttl).to_string();
        let transport = SingleServer::connect(Address::parse(url)?, options.timeout).await;
        Ok(Self { transport, scripts: Scripts::default(), ttl })
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

    async fn place_with(
        &self,
        script: &Script,
        job: JobRef<'_>,
        request: &PlaceRequest<'_>,
    ) -> Result<PlaceOutcome, StoreError> {
        let PlaceRequest { key: executor, required, overrides, policy } = *request;
        // Eighty bytes hold two policies.
        let mut command = Self::command(script, job, 5, self.ttl.len() + executor.len() + 80);
        command.write_arg(self.ttl.as_bytes());
        command.write_arg(executor.as_bytes());
        // Most executors have none of the rest.
        if required.is_some() || overrides != PolicyOverrides::default() || policy.is_some() {
            command.write_arg(text(required).as_bytes());
            command.write_arg_fmt(overrides);
            command.write_arg_fmt(policy.map(PolicyOverrides::from).unwrap_or_default());
        }
        reply::placed(&self.transport.run(script, command).await?)
    }
}

impl Ledger for RedisLedger {
    async fn place(&self, job: JobRef<'_>, request: &PlaceRequest<'_>) -> Result<PlaceOutcome, StoreError> {
        self.place_with(&self.scripts.place, job, request).await
    }

    async fn peek(&self, job: JobRef<'_>, request: &PlaceRequest<'_>) -> Result<PlaceOutcome, StoreError> {
        self.place_with(&self.scripts.peek, job, request).await
    }

    async fn release(
        &self,
        job: JobRef<'_>,
        executor: &str,
        uid: Option<&str>,
    ) -> Result<Option<Capacity>, StoreError> {
        let script = &self.scripts.release;
        let bytes = self.ttl.len() + executor.len() + uid.map_or(0, str::len);
        let mut command = Self::command(script, job, 4, bytes + 2);
        command.write_arg(self.ttl.as_bytes());
        command.write_arg(executor.as_bytes());
        if let Some(uid) = uid {
            command.write_arg(uid.as_bytes());
            command.write_arg_fmt(JobLedger::RELEASED_REMEMBERED);
        }
        reply::released_capacity(&self.transport.run(script, command).await?)
    }

    async fn learn(&self, job: JobRef<'_>, policy: Policy) -> Result<(), StoreError> {
        let script = &self.scripts.learn;
        let mut command = Self::command(script, job, 2, self.ttl.len() + 40);
        command.write_arg(self.ttl.as_bytes());
        command.write_arg_fmt(policy);
        self.transport.run(script, command).await.map(drop)
    }

    async fn reconcile(
        &self,
        job: JobRef<'_>,
        state: &JobState<'_>,
        grace: Duration,
        term: Term,
    ) -> Result<ReconcileOutcome, StoreError> {
        let script = &self.scripts.reconcile;
        let JobState { live, overrides, ended } = *state;
        let names: usize = live.iter().map(|live| live.key.len() + live.uid.len() + "on-demand".len()).sum();
        // Eighty bytes hold the grace, a policy, a term and the rest.
        let mut command = Self::command(script, job, 6 + 3 * live.len(), self.ttl.len() + 80 + names);
        command.write_arg(self.ttl.as_bytes());
        command.write_arg_fmt(millis(grace));
        command.write_arg_fmt(overrides);
        command.write_arg_fmt(term);
        command.write_arg(if ended { b"ended" } else { b"" });
        command.write_arg_fmt(JobLedger::RELEASE_GRACE);
        for &LiveExecutor { key: executor, uid, capacity } in live {
            command.write_arg(executor.as_bytes());
            command.write_arg(uid.as_bytes());
            command.write_arg(text(capacity).as_bytes());
        }
        let extra = TIME_PER_LIVE_EXECUTOR.saturating_mul(u32::try_from(live.len()).unwrap_or(u32::MAX));
        reply::reconciled(&self.transport.run_longer(script, command, extra).await?)
    }

    async fn counts(&self, job: JobRef<'_>) -> Result<Option<Counts>, StoreError> {
        let script = &self.scripts.counts;
        let mut command = Self::command(script, job, 1, self.ttl.len());
        command.write_arg(self.ttl.as_bytes());
        reply::counts(&self.transport.run(script, command).await?)
    }

    async fn list_jobs(&self, cursor: Option<Cursor>) -> Result<JobPage, StoreError> {
        let page = self.transport.list_keys("exec-count:{*:*}", cursor).await?;
        Ok(JobPage { jobs: page.keys.iter().filter_map(reply::job).collect(), next: page.next })
    }

    async fn heartbeat(&self, heartbeat: u64) -> Result<Option<u64>, StoreError> {
        reply::heartbeat(&self.transport.heartbeat(&self.scripts.heartbeat, &self.ttl, heartbeat).await?)
    }

    async fn get(&self, job: JobRef<'_>) -> Result<Option<JobLedger>, StoreError> {
        let script = &self.scripts.get;
        let ledger = reply::ledger(&self.transport.run(script, Self::command(script, job, 0, 0)).await?)?;
        Ok(Some(ledger).filter(|ledger| ledger.policy().is_some() || !ledger.entries().is_empty()))
    }
}

impl fmt::Debug for RedisLedger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisLedger")
            .field("transport", &self.transport)
            .field("ttl", &self.ttl)
            .finish_non_exhaustive()
    }
}

/// As the scripts take it. Redis adds it to the current time, in 64 bits, and a Lua number is exact up to here; three
/// hundred thousand years are enough.
fn millis(duration: Duration) -> u128 {
    duration.as_millis().min(1 << 53)
}

const fn text(capacity: Option<Capacity>) -> &'static str {
    match capacity {
        Some(capacity) => capacity.as_str(),
        None => "",
    }
}
