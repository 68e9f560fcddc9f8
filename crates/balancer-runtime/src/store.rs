//! Opens the store that the settings choose.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{anyhow, bail};
use balancer_core::{
    Capacity, Counts, JobId, JobLedger, JobRef, JobState, LearnOutcome, PlaceOutcome, PlaceRequest, Policy,
    ReconcileOutcome, RemovalOutcome, Steer, SteerOutcome, Term, Unconfirmed,
};
use balancer_store::{
    AwsIam, AwsService, ConnectError, Cursor, EntryPage, JobPage, JobRecord, Ledger, MemoryLedger, RedisLedger,
    RedisMode, RedisOptions, RedisPassword, StoreError,
};
use clap::Args;
use clap::builder::NonEmptyStringValueParser;

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

    /// URL of the Redis or Valkey servers. Accepted: redis:// or valkey://, or for TLS rediss:// or valkeys://, then
    /// [[user]:password@]host[:port][,host[:port]...][/database]. Several hosts are nodes of a cluster, or sentinels. Required
    /// unless STORE=memory or --dev. TLS trusts the CAs of the system, or those of SSL_CERT_FILE and SSL_CERT_DIR
    #[arg(long, env, hide_env_values = true)]
    redis_url: Option<String>,

    /// How the servers work together. Accepted: auto, to ask them; single, for one server or an endpoint that leads to the
    /// primary; cluster, for Redis Cluster; sentinel, for Redis Sentinel
    #[arg(long, env, default_value = "auto", value_parser = choice(MODES, "auto, single, cluster or sentinel"))]
    redis_mode: RedisMode,

    /// Name of the primary that the sentinels watch, such as mymaster. Required if REDIS_URL names sentinels
    #[arg(long, env, value_parser = NonEmptyStringValueParser::new())]
    redis_sentinel_master: Option<String>,

    /// File of the password for the Redis servers, instead of a password in REDIS_URL. A changed file is loaded within ten
    /// seconds, without a restart
    #[arg(long, env, value_parser = path)]
    redis_password_file: Option<PathBuf>,

    /// User for the sentinels. The user and the password in REDIS_URL are for the Redis servers
    #[arg(long, env, value_parser = NonEmptyStringValueParser::new())]
    redis_sentinel_username: Option<String>,

    /// File of the password for the sentinels. A changed file is loaded like REDIS_PASSWORD_FILE
    #[arg(long, env, value_parser = path)]
    redis_sentinel_password_file: Option<PathBuf>,

    /// Service of AWS that runs the servers, to log in with tokens instead of a password. Accepted: elasticache,
    /// elasticache-serverless or memorydb. The user is the one in REDIS_URL, the region that of AWS_REGION, and the AWS
    /// credentials are those of the environment, IRSA, EKS Pod Identity or the instance. Needs a build with the cargo feature
    /// aws-iam
    #[arg(long, env, value_parser = choice(AWS_SERVICES, "elasticache, elasticache-serverless or memorydb"))]
    redis_aws_iam: Option<AwsService>,

    /// Name of the cache, the replication group or the cluster that the tokens are for. Required with REDIS_AWS_IAM
    #[arg(long, env)]
    redis_aws_cache_name: Option<String>,

    /// Most time of one call to the store in milliseconds, after which the webhook decides without it. An admission makes at
    /// most two calls. Accepted: 1 to 15000. The webhook uses at most a quarter of WEBHOOK_TIMEOUT_SECONDS
    #[arg(long, env, default_value_t = 500, value_parser = number::<u64>(1..=15_000))]
    store_timeout_milliseconds: u64,

    /// How long a ledger is kept after its last use, in seconds. Accepted: 1 to 31536000 (a year)
    #[arg(long, env, default_value_t = 86_400, value_parser = number::<u64>(1..=31_536_000))]
    redis_default_ttl_seconds: u64,
}

impl std::fmt::Debug for StoreArguments {
    /// Without the URL, which may have a password.
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

const MODES: &[(&str, RedisMode)] = &[
    ("auto", RedisMode::Auto),
    ("single", RedisMode::Single),
    ("cluster", RedisMode::Cluster),
    ("sentinel", RedisMode::Sentinel),
];

const AWS_SERVICES: &[(&str, AwsService)] = &[
    ("elasticache", AwsService::ElastiCache),
    ("elasticache-serverless", AwsService::ElastiCacheServerless),
    ("memorydb", AwsService::MemoryDb),
];

/// A file; a parser for a flag.
fn path(text: &str) -> anyhow::Result<PathBuf> {
    if text.is_empty() {
        bail!("an empty text is not accepted; accepted: the path of a file");
    }
    Ok(text.into())
}

/// The validated settings of a store.
pub struct StoreSettings {
    /// `None` for memory.
    redis_url: Option<String>,
    /// For Redis. The time limit and the lifetime are for memory too.
    options: RedisOptions,
}

impl std::fmt::Debug for StoreSettings {
    /// Without the URL, which may have a password.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StoreSettings").field("options", &self.options).finish_non_exhaustive()
    }
}

impl StoreArguments {
    /// Validates the settings. With `in_memory` the store is in memory, whatever STORE says.
    pub fn settings(self, in_memory: bool) -> anyhow::Result<StoreSettings> {
        let password = self.password()?;
        let Self {
            store,
            redis_url,
            redis_mode: mode,
            redis_sentinel_master: sentinel_master,
            redis_sentinel_username: sentinel_username,
            redis_sentinel_password_file: sentinel_password_file,
            redis_password_file: _,
            redis_aws_iam: _,
            redis_aws_cache_name: _,
            store_timeout_milliseconds,
            redis_default_ttl_seconds,
        } = self;
        let redis_url = match store {
            StoreKind::Redis if !in_memory => match redis_url.filter(|url| !url.is_empty()) {
                None => {
                    bail!("REDIS_URL is not set; accepted: redis://host:6379/0, rediss:// for TLS, or STORE=memory")
                }
                url => url,
            },
            StoreKind::Redis | StoreKind::Memory => None,
        };
        let timeout = Duration::from_millis(store_timeout_milliseconds);
        let ttl = Duration::from_secs(redis_default_ttl_seconds);
        let options =
            RedisOptions { timeout, ttl, mode, password, sentinel_master, sentinel_username, sentinel_password_file };
        Ok(StoreSettings { redis_url, options })
    }

    /// Where the password comes from. What contradicts the URL is found later, by connecting.
    fn password(&self) -> anyhow::Result<RedisPassword> {
        Ok(match (&self.redis_password_file, self.redis_aws_iam, &self.redis_aws_cache_name) {
            (None, None, None) => RedisPassword::Url,
            (Some(file), None, None) => RedisPassword::File(file.clone()),
            (None, Some(service), Some(cache_name)) => {
                RedisPassword::AwsIam(AwsIam { service, cache_name: cache_name.clone() })
            }
            (Some(_), Some(_), _) => {
                bail!("REDIS_PASSWORD_FILE and REDIS_AWS_IAM are both set; accepted: one of them")
            }
            (None, Some(_), None) => bail!(
                "REDIS_AWS_IAM is set, but REDIS_AWS_CACHE_NAME is not; accepted: the name of the cache that the tokens are \
                 for"
            ),
            (_, None, Some(_)) => {
                bail!("REDIS_AWS_CACHE_NAME is set, but REDIS_AWS_IAM is not; accepted: both or none")
            }
        })
    }
}

impl StoreSettings {
    /// Limits the time of a call to `limit`.
    pub fn within(mut self, limit: Duration) -> Self {
        self.options.timeout = self.options.timeout.min(limit);
        self
    }

    /// Whether the ledgers are in the memory of this process.
    pub fn in_memory(&self) -> bool {
        self.redis_url.is_none()
    }

    /// The most time of one call.
    pub fn timeout(&self) -> Duration {
        self.options.timeout
    }

    /// Opens the store. A Redis that is down is not an error: the store connects as soon as it is up.
    pub async fn open(self, tasks: &Tasks) -> anyhow::Result<Store> {
        let Self { redis_url, options } = self;
        Ok(match redis_url {
            None => Store::Memory(MemoryLedger::new(options.ttl)),
            Some(url) => {
                let tasks = tasks.clone();
                let on_panic = move || tasks.died(Task::StoreConnection);
                let ledger = RedisLedger::connect_with(&url, options, on_panic).await.map_err(named)?;
                Store::Redis(Box::new(ledger))
            }
        })
    }
}

/// The error with the setting that it is about. That of a contradiction names its settings itself.
fn named(error: ConnectError) -> anyhow::Error {
    match error {
        ConnectError::Url(error) => anyhow!("REDIS_URL: {error}"),
        ConnectError::Mode(sentence) | ConnectError::PasswordFile(sentence) => anyhow!(sentence),
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
        state: &JobState<'_>,
        grace: Duration,
        term: Term,
    ) -> Result<ReconcileOutcome, StoreError> {
        forward!(self.reconcile(job, state, grace, term))
    }

    async fn entries(&self, job: JobRef<'_>, cursor: Option<Cursor>) -> Result<EntryPage, StoreError> {
        forward!(self.entries(job, cursor))
    }

    async fn begin_count(&self, job: JobRef<'_>, term: Term) -> Result<(), StoreError> {
        forward!(self.begin_count(job, term))
    }

    async fn correct_counts(&self, job: JobRef<'_>, found: Counts, term: Term) -> Result<bool, StoreError> {
        forward!(self.correct_counts(job, found, term))
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

#[cfg(test)]
mod tests {
    use super::*;

    use clap::Parser;
    use prometheus_client::registry::Registry;

    #[derive(Parser)]
    struct Shared {
        #[command(flatten)]
        store: StoreArguments,
    }

    fn settings(arguments: &[&str]) -> anyhow::Result<StoreSettings> {
        Shared::try_parse_from([&["test"], arguments].concat())?.store.settings(false)
    }

    fn refusal(arguments: &[&str]) -> String {
        let error = settings(arguments).expect_err("refused").to_string();
        assert!(!error.contains("s3cret"), "{error}");
        error
    }

    const URL: &str = "--redis-url=rediss://user:s3cret@host";

    #[test]
    fn without_other_settings_the_url_has_the_password_and_the_servers_are_asked_for_their_mode() {
        let StoreSettings { redis_url, options } = settings(&[URL]).expect("accepted");
        assert_eq!(redis_url.as_deref(), Some("rediss://user:s3cret@host"));
        assert_eq!(
            (options.mode, options.password, options.sentinel_master),
            (RedisMode::Auto, RedisPassword::Url, None)
        );
        assert_eq!((options.timeout, options.ttl), (Duration::from_millis(500), Duration::from_secs(86_400)));
    }

    #[test]
    fn settings_of_sentinels_and_password_files_reach_the_store() {
        let arguments = [
            URL,
            "--redis-mode=Sentinel",
            "--redis-sentinel-master=mymaster",
            "--redis-sentinel-username=watcher",
            "--redis-sentinel-password-file=/sentinel",
            "--redis-password-file=/password",
        ];
        let options = settings(&arguments).expect("accepted").options;
        assert_eq!((options.mode, options.password), (RedisMode::Sentinel, RedisPassword::File("/password".into())));
        assert_eq!(options.sentinel_master.as_deref(), Some("mymaster"));
        assert_eq!(options.sentinel_username.as_deref(), Some("watcher"));
        assert_eq!(options.sentinel_password_file, Some("/sentinel".into()));
    }

    #[test]
    fn tokens_are_for_a_service_and_a_cache() {
        for (name, service) in AWS_SERVICES {
            let service_argument = format!("--redis-aws-iam={name}");
            let options =
                settings(&[URL, &service_argument, "--redis-aws-cache-name=orders"]).expect("accepted").options;
            let iam = AwsIam { service: *service, cache_name: "orders".to_owned() };
            assert_eq!(options.password, RedisPassword::AwsIam(iam));
        }
    }

    #[test]
    fn invalid_settings_are_refused_with_their_names_and_what_is_accepted() {
        for (arguments, parts) in [
            (vec!["--redis-mode=replica"], ["--redis-mode", "\"replica\"", "auto, single, cluster or sentinel"]),
            (vec!["--redis-aws-iam=rds"], ["--redis-aws-iam", "\"rds\"", "elasticache, elasticache-serverless"]),
            (vec!["--redis-password-file="], ["--redis-password-file", "empty", "the path of a file"]),
            (vec!["--redis-sentinel-password-file="], ["--redis-sentinel-password-file", "", "the path of a file"]),
            (vec!["--redis-sentinel-master="], ["--redis-sentinel-master", "value is required", ""]),
            (
                vec!["--redis-aws-iam=memorydb", "--redis-aws-cache-name=c", "--redis-password-file=/f"],
                ["REDIS_PASSWORD_FILE", "REDIS_AWS_IAM", "one of them"],
            ),
            (vec!["--redis-aws-iam=memorydb"], ["REDIS_AWS_IAM is set", "REDIS_AWS_CACHE_NAME is not", "the name of"]),
            (vec!["--redis-aws-cache-name=c"], ["REDIS_AWS_CACHE_NAME is set", "REDIS_AWS_IAM is not", "both or none"]),
        ] {
            let error = refusal(&[vec![URL], arguments].concat());
            assert!(parts.iter().all(|part| error.contains(part)), "{error}");
        }
    }

    #[test]
    fn nothing_shown_contains_the_password_of_the_url() {
        let arguments = Shared::try_parse_from(["test", URL]).expect("accepted").store;
        let shown = format!("{arguments:?} {:?}", arguments.clone().settings(false).expect("accepted"));
        assert!(!shown.contains("s3cret") && shown.contains("Auto"), "{shown}");
    }

    #[tokio::test]
    async fn an_error_of_connecting_names_the_settings_once() {
        let tasks = Tasks::register(&mut Registry::default());
        for (arguments, beginning) in [
            (vec!["--redis-url=http://:s3cret@host"], "REDIS_URL: not the URL of a Redis server"),
            (vec!["--redis-url=redis://host/1", "--redis-mode=cluster"], "REDIS_MODE=cluster, but"),
            (vec!["--redis-url=redis://:s3cret@host", "--redis-password-file=/f"], "REDIS_PASSWORD_FILE is set, but"),
        ] {
            let error = settings(&arguments).expect("they do not contradict each other").open(&tasks).await;
            let error = format!("{:#}", error.expect_err("refused"));
            assert!(error.starts_with(beginning) && !error.contains("s3cret"), "{error}");
        }
    }
}
