//! Opens the store that the settings choose.

use std::time::Duration;

use anyhow::{Context, bail};
use balancer_core::{
    Capacity, JobId, JobLedger, JobRef, JobState, LearnOutcome, PlaceOutcome, PlaceRequest, Policy, ReconcileOutcome,
    RemovalOutcome, Steer, SteerOutcome, Term, Timing, Unconfirmed,
};
use balancer_store::{Cursor, JobPage, JobRecord, Ledger, MemoryLedger, RedisLedger, RedisOptions, StoreError};
use clap::Args;

use crate::arguments::{choice, number};
use crate::tasks::{Task, Tasks};

/// Where the ledgers are stored.
#[derive(Args, Clone)]
#[command(next_help_heading = "Store")]
pub struct StoreArguments {
    /// Where ledgers are stored. Accepted: redis, or memory for a single replica of the webhook, whose ledgers end with the
    /// process
    #[arg(long, env, default_value = "redis", value_parser = choice(STORES, "redis or memory"))]
    store: StoreKind,

    /// URL of the Redis server. Accepted: redis:// or, for TLS, rediss://, then [[user]:password@]host[:port][/database].
    /// Required unless STORE=memory or --dev. TLS trusts the CAs of the system, or those of SSL_CERT_FILE and SSL_CERT_DIR
    #[arg(long, env, hide_env_values = true)]
    redis_url: Option<String>,

    /// Most time of one call to the store in milliseconds, after which the webhook decides without it. An admission makes at
    /// most two calls. Accepted: 1 to 15000. The webhook uses at most a quarter of WEBHOOK_TIMEOUT_SECONDS
    #[arg(long, env, default_value_t = 500, value_parser = number::<u64>(1..=15_000))]
    store_timeout_milliseconds: u64,

    /// How long a ledger is kept after its last use, in seconds. Accepted: 1 to 31536000 (a year)
    #[arg(long, env, default_value_t = 86_400, value_parser = number::<u64>(1..=31_536_000))]
    redis_default_ttl_seconds: u64,
}

impl std::fmt::Debug for StoreArguments {
    /// Without the URL, because it holds a password.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StoreArguments").field("store", &self.store).finish_non_exhaustive()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum StoreKind {
    Redis,
    Memory,
}

const STORES: &[(&str, StoreKind)] = &[("redis", StoreKind::Redis), ("memory", StoreKind::Memory)];

/// The validated settings of a store.
pub struct StoreSettings {
    /// `None` for memory.
    redis_url: Option<String>,
    timeout: Duration,
    ttl: Duration,
}

impl std::fmt::Debug for StoreSettings {
    /// Without the URL, because it holds a password.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StoreSettings").field("timeout", &self.timeout).field("ttl", &self.ttl).finish_non_exhaustive()
    }
}

impl StoreArguments {
    /// Validates the settings. With `in_memory` the store is in memory, whatever STORE says.
    pub fn settings(self, in_memory: bool) -> anyhow::Result<StoreSettings> {
        let Self { store, redis_url, store_timeout_milliseconds, redis_default_ttl_seconds } = self;
        let redis_url = match store {
            StoreKind::Redis if !in_memory => match redis_url.filter(|url| !url.is_empty()) {
                None => {
                    bail!("REDIS_URL is not set; accepted: redis://host:6379/0, rediss:// for TLS, or STORE=memory")
                }
                url => url,
            },
            StoreKind::Redis | StoreKind::Memory => None,
        };
        Ok(StoreSettings {
            redis_url,
            timeout: Duration::from_millis(store_timeout_milliseconds),
            ttl: Duration::from_secs(redis_default_ttl_seconds),
        })
    }
}

impl StoreSettings {
    /// Limits the time of a call to `limit`.
    pub fn within(self, limit: Duration) -> Self {
        Self { timeout: self.timeout.min(limit), ..self }
    }

    /// Whether the ledgers are in the memory of this process.
    pub fn in_memory(&self) -> bool {
        self.redis_url.is_none()
    }

    /// The most time of one call.
    pub fn timeout(&self) -> Duration {
        self.timeout
    }

    /// Opens the store. A Redis that is down is not an error: the store connects as soon as it is up.
    pub async fn open(self, tasks: &Tasks) -> anyhow::Result<Store> {
        let Self { redis_url, timeout, ttl } = self;
        Ok(match redis_url {
            None => Store::Memory(MemoryLedger::new(ttl)),
            Some(url) => {
                let (options, tasks) = (RedisOptions { timeout, ttl }, tasks.clone());
                let on_panic = move || tasks.died(Task::StoreConnection);
                let ledger = RedisLedger::connect_with(&url, options, on_panic).await.context("REDIS_URL")?;
                Store::Redis(Box::new(ledger))
            }
        })
    }
}

/// The ledger that the settings chose.
pub enum Store {
    /// In the memory of this process.
    Memory(MemoryLedger),
    /// Shared by all replicas.
    Redis(Box<RedisLedger>),
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl Store {
    /// Whether the ledgers are in the memory of this process.
    pub fn in_memory(&self) -> bool {
        matches!(self, Self::Memory(_))
    }

    /// The value of `STORE` that chooses it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Memory(_) => "memory",
            Self::Redis(_) => "redis",
        }
    }
}

/// Forwards a call to the chosen ledger.
macro_rules! forward {
    ($self:ident . $call:ident ( $($argument:expr),* )) => {
        match $self {
            Store::Memory(ledger) => ledger.$call($($argument),*).await,
            Store::Redis(ledger) => ledger.$call($($argument),*).await,
        }
    };
}

impl Ledger for Store {
    async fn place(&self, job: JobRef<'_>, request: &PlaceRequest<'_>) -> Result<PlaceOutcome, StoreError> {
        forward!(self.place(job, request))
    }

    async fn peek(&self, job: JobRef<'_>, request: &PlaceRequest<'_>) -> Result<PlaceOutcome, StoreError> {
        forward!(self.peek(job, request))
    }

    async fn release(
        &self,
        job: JobRef<'_>,
        executor: &str,
        uid: Option<&str>,
        driver: Option<&str>,
    ) -> Result<Option<Capacity>, StoreError> {
        forward!(self.release(job, executor, uid, driver))
    }

    async fn learn(
        &self,
        job: JobRef<'_>,
        policy: Policy,
        driver: Option<&str>,
        may_create: bool,
    ) -> Result<LearnOutcome, StoreError> {
        forward!(self.learn(job, policy, driver, may_create))
    }

    async fn reconcile(
        &self,
        job: JobRef<'_>,
        seen: &JobState<'_>,
        timing: Timing,
        term: Term,
    ) -> Result<ReconcileOutcome, StoreError> {
        forward!(self.reconcile(job, seen, timing, term))
    }

    async fn remove_unconfirmed(
        &self,
        job: JobRef<'_>,
        absent: &[Unconfirmed],
        term: Term,
    ) -> Result<RemovalOutcome, StoreError> {
        forward!(self.remove_unconfirmed(job, absent, term))
    }

    async fn steer(&self, job: JobRef<'_>, steer: Steer<'_>, term: Term) -> Result<SteerOutcome, StoreError> {
        forward!(self.steer(job, steer, term))
    }

    async fn take_placed(&self) -> Result<Vec<JobId>, StoreError> {
        forward!(self.take_placed())
    }

    async fn record(&self, job: JobRef<'_>) -> Result<Option<JobRecord>, StoreError> {
        forward!(self.record(job))
    }

    async fn list_jobs(&self, cursor: Option<Cursor>) -> Result<JobPage, StoreError> {
        forward!(self.list_jobs(cursor))
    }

    async fn heartbeat(&self, heartbeat: u64) -> Result<Option<u64>, StoreError> {
        forward!(self.heartbeat(heartbeat))
    }

    async fn get(&self, job: JobRef<'_>) -> Result<Option<JobLedger>, StoreError> {
        forward!(self.get(job))
    }
}
