//! A redis-server of a test's own, which can be stopped, emptied and frozen; and what it has in common with several
//! servers that hold one ledger together.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use balancer_store::RedisOptions;
use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, Client, Cmd, FromRedisValue, TlsCertificates};
use tokio::time::timeout;

use crate::certificate::{ServerCertificate, authority};
use crate::parts::program;
use crate::port;
use crate::process::{Process, scratch_path};

const START: Duration = Duration::from_secs(30);
/// How long a server that is not frozen takes to answer, at most, and then some.
const ANSWER: Duration = Duration::from_secs(2);
/// How long a connection waits for an answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// The file with a sentinel's configuration.
const SENTINEL: &str = "sentinel.conf";

/// A word's value in the field `policy` of a job's record: `key` is `spot-ratio` or `on-demand-base`.
pub fn policy_word(policy: Option<&str>, key: &str) -> Option<String> {
    policy?.split(' ').find_map(|word| word.strip_prefix(key)?.strip_prefix('=')).map(str::to_owned)
}

/// One server or several that hold the ledgers of the programs that are given their settings.
pub trait Servers: Send + Sync {
    /// What `REDIS_URL` is to be.
    fn url(&self) -> String;

    /// What `REDIS_SENTINEL_MASTER` is to be.
    fn sentinel_master(&self) -> Option<&str> {
        None
    }

    /// What `REDIS_SENTINEL_PASSWORD_FILE` is to be.
    fn sentinel_password_file(&self) -> Option<&Path> {
        None
    }

    /// A new connection to the server that now has the key and takes changes of it.
    fn connection_for(&self, key: &str) -> impl Future<Output = Result<MultiplexedConnection>> + Send;

    /// How a ledger of the test's own reaches them; they are asked how they work together.
    fn ledger_options(&self, timeout: Duration, ttl: Duration) -> RedisOptions {
        RedisOptions {
            sentinel_master: self.sentinel_master().map(str::to_owned),
            sentinel_password_file: self.sentinel_password_file().map(Path::to_owned),
            ..RedisOptions::new(timeout, ttl)
        }
    }
}

/// The versions that are there besides Redis 7.0, the one that tests have without asking.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Version {
    /// Of Debian bookworm.
    #[default]
    Redis7_0,
    /// Without TLS.
    Redis6_2,
    /// Of Debian trixie.
    Redis8_0,
    /// The first of Valkey after the fork.
    Valkey8_0,
    /// Of Debian trixie.
    Valkey8_1,
    /// Without TLS.
    Valkey9_1,
}

impl Version {
    /// By this name [`program`] finds it.
    fn program(self) -> &'static str {
        match self {
            Self::Redis7_0 => "redis-server",
            Self::Redis6_2 => "redis-server-6.2",
            Self::Redis8_0 => "redis-server-8.0",
            Self::Valkey8_0 => "valkey-server-8.0",
            Self::Valkey8_1 => "valkey-server-8.1",
            Self::Valkey9_1 => "valkey-server-9.1",
        }
    }
}

/// How a server starts.
#[derive(Debug, Clone, Default)]
pub struct ServerOptions {
    /// Which server it is.
    pub version: Version,
    /// With it the server speaks TLS only. It is signed by the tests' authority, so a program that is to trust it needs
    /// `SSL_CERT_FILE` set to that authority's path.
    pub certificate: Option<ServerCertificate>,
    /// What clients and other servers log in with.
    pub password: Option<&'static str>,
    /// Further arguments, after its own.
    pub arguments: Vec<String>,
    /// The lines of its configuration if it is a sentinel, which writes to it.
    pub sentinel: Option<String>,
}

impl ServerOptions {
    /// TLS with a certificate of its own, and a password.
    pub fn tls() -> Result<Self> {
        let certificate = Some(authority()?.issue()?);
        Ok(Self { certificate, password: Some("correct-horse"), ..Self::default() })
    }

    /// The same with further arguments, which are split at blanks.
    pub(crate) fn with(&self, arguments: &str) -> Self {
        let mut options = self.clone();
        options.arguments.extend(arguments.split_whitespace().map(str::to_owned));
        options
    }

    /// The URL of servers that were started with these options on these ports.
    pub(crate) fn url(&self, ports: impl IntoIterator<Item = u16>) -> String {
        let scheme = if self.certificate.is_some() { "rediss" } else { "redis" };
        let password = self.password.map(|password| format!(":{password}@")).unwrap_or_default();
        let hosts: Vec<_> = ports.into_iter().map(|port| format!("127.0.0.1:{port}")).collect();
        format!("{scheme}://{password}{}", hosts.join(","))
    }
}

/// A running redis-server without persistence. Dropping it kills it.
#[derive(Debug)]
pub struct RedisServer {
    port: u16,
    options: ServerOptions,
    /// Its working folder, with the configurations that a node of a cluster or a sentinel writes.
    folder: PathBuf,
    process: Option<Process>,
}

impl RedisServer {
    /// Starts a server on a free port.
    pub async fn start() -> Result<Self> {
        Self::start_with(ServerOptions::default()).await
    }

    /// Starts a server with these arguments after its own.
    pub async fn start_as(arguments: Vec<String>) -> Result<Self> {
        Self::start_with(ServerOptions { arguments, ..ServerOptions::default() }).await
    }

    /// Starts a server that speaks TLS only and wants a password; both are part of its [`url`].
    ///
    /// [`url`]: Self::url
    pub async fn start_tls() -> Result<Self> {
        Self::start_with(ServerOptions::tls()?).await
    }

    /// Starts a server with these options.
    pub async fn start_with(options: ServerOptions) -> Result<Self> {
        Self::start_on(port::free()?, options).await
    }

    /// Starts a server with these options on this port.
    pub async fn start_on(port: u16, options: ServerOptions) -> Result<Self> {
        let folder = scratch_path("redis")?;
        std::fs::create_dir(&folder)?;
        if let Some(configuration) = &options.sentinel {
            std::fs::write(folder.join(SENTINEL), configuration)?;
        }
        let mut server = Self { port, options, folder, process: None };
        server.start_again_empty().await?;
        Ok(server)
    }

    /// Starts the server again after [`stop`](Self::stop), on the same port and without its data. What it knows about
    /// other nodes of its cluster, or as a sentinel, it remembers. A server that still runs is killed first.
    pub async fn start_again_empty(&mut self) -> Result<()> {
        self.stop();
        let Self { port, options, folder, .. } = &*self;
        let ServerOptions { version, certificate, password, arguments, sentinel } = options;
        let certificate =
            certificate.as_ref().map(|certificate| anyhow::Ok((certificate, authority()?))).transpose()?;
        let mut process = Process::start(&program(version.program())?, |command| {
            if sentinel.is_some() {
                command.arg(folder.join(SENTINEL)).arg("--sentinel");
            }
            command.arg("--dir").arg(folder);
            command.args(["--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]);
            // A server with replicas, or a replica, leaves no file that it would load when it starts again.
            command.args(["--rdb-del-sync-files", "yes"]);
            if let Some(password) = password {
                command.args(["--requirepass", password, "--masterauth", password]);
            }
            match certificate {
                None => command.args(["--port", &port.to_string()]),
                Some((certificate, authority)) => command
                    .args(["--port", "0", "--tls-port", &port.to_string()])
                    .args(["--tls-auth-clients", "no", "--tls-replication", "yes", "--tls-cluster", "yes"])
                    .arg("--tls-ca-cert-file")
                    .arg(&authority.path)
                    .arg("--tls-cert-file")
                    .arg(&certificate.path)
                    .arg("--tls-key-file")
                    .arg(&certificate.key_path),
            };
            command.args(arguments);
        })?;
        process
            .until_ready(START, async || {
                let mut connection = self.connection().await?;
                let () = redis::cmd("PING").query_async(&mut connection).await?;
                Ok(Some(()))
            })
            .await?;
        self.process = Some(process);
        Ok(())
    }

    /// Ends the server at once: connections break, new ones are refused, the data is gone.
    pub fn stop(&mut self) {
        self.process = None;
    }

    /// Freezes the server: connections stay open and nothing answers.
    pub fn freeze(&self) -> Result<()> {
        self.running()?.freeze()
    }

    /// Lets a frozen server go on.
    pub fn thaw(&self) -> Result<()> {
        self.running()?.thaw()
    }

    /// Whether it runs, frozen or not.
    pub fn runs(&self) -> bool {
        self.process.is_some()
    }

    /// Removes all data.
    pub async fn flush(&self) -> Result<()> {
        let mut connection = self.connection().await?;
        Ok(redis::cmd("FLUSHALL").query_async(&mut connection).await?)
    }

    /// Where it listens, now or when it runs again.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// What `REDIS_URL` is to be.
    pub fn url(&self) -> String {
        self.options.url([self.port])
    }

    /// What it was started with.
    pub(crate) fn options(&self) -> &ServerOptions {
        &self.options
    }

    /// A new connection.
    pub async fn connection(&self) -> Result<MultiplexedConnection> {
        let url = self.url();
        let client = match self.options.certificate {
            None => Client::open(url)?,
            Some(_) => Client::build_with_tls(
                url,
                TlsCertificates { client_tls: None, root_cert: Some(authority()?.pem.clone().into_bytes()) },
            )?,
        };
        let limits =
            AsyncConnectionConfig::new().set_connection_timeout(Some(PATIENCE)).set_response_timeout(Some(PATIENCE));
        Ok(client.get_multiplexed_async_connection_with_config(&limits).await?)
    }

    /// The answer to a command on a new connection. An error if there is none within a moment: it may be frozen.
    pub async fn ask<T: FromRedisValue>(&self, command: &Cmd) -> Result<T> {
        let answer = async { anyhow::Ok(command.query_async(&mut self.connection().await?).await?) };
        let answer = timeout(ANSWER, answer).await.map_err(anyhow::Error::from).flatten();
        answer.with_context(|| {
            let command = String::from_utf8_lossy(&command.get_packed_command()).replace("\r\n", " ");
            format!("asking port {}: {command:.100}", self.port)
        })
    }

    fn running(&self) -> Result<&Process> {
        self.process.as_ref().context("the redis-server is stopped")
    }
}

impl Servers for RedisServer {
    fn url(&self) -> String {
        self.url()
    }

    async fn connection_for(&self, _key: &str) -> Result<MultiplexedConnection> {
        self.connection().await
    }
}
