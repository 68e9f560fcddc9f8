//! Redis with sentinels, of a test's own: a primary, two replicas, and three sentinels that watch them.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use futures::future::{join_all, try_join_all};
use redis::aio::MultiplexedConnection;
use redis::{Cmd, cmd};

use crate::process::scratch_path;
use crate::redis::{RedisServer, ServerOptions, Servers};
use crate::wait::{SOON, until, until_true};

/// The name of the master that the sentinels watch.
pub const MASTER: &str = "ledger";
const SERVERS: usize = 3;
const SENTINELS: usize = 3;
/// So many of them have to agree that the primary is down.
const QUORUM: usize = 2;
/// How long a server does not respond until a sentinel takes it to be down, in milliseconds.
const DOWN_AFTER: u32 = 1_000;
/// How long a failover may take before another is tried, in milliseconds.
const FAILOVER_TIMEOUT: u32 = 5_000;
/// How long the sentinels may take to replace a primary before they are asked once more.
const FAIL_OVER: Duration = Duration::from_secs(10);

/// Running servers and sentinels. Dropping it kills them.
#[derive(Debug)]
pub struct SentinelSet {
    /// The servers. The first begins as the primary.
    pub servers: Vec<RedisServer>,
    /// The sentinels.
    pub sentinels: Vec<RedisServer>,
    password_file: Option<PathBuf>,
}

impl SentinelSet {
    /// Starts all and waits until the sentinels know each other, the primary and the replicas.
    pub async fn start() -> Result<Self> {
        Self::start_with(ServerOptions::default(), None).await
    }

    /// The same with these options for the servers. The sentinels have their TLS and, if there is one, this password.
    pub async fn start_with(options: ServerOptions, sentinel_password: Option<&'static str>) -> Result<Self> {
        let primary = RedisServer::start_with(options.with("--repl-diskless-sync-delay 0")).await?;
        let port = primary.port();
        let replica = options.with(&format!("--repl-diskless-sync-delay 0 --replicaof 127.0.0.1 {port}"));
        let replicas = try_join_all((1..SERVERS).map(|_| RedisServer::start_with(replica.clone()))).await?;

        let mut configuration = format!(
            "sentinel monitor {MASTER} 127.0.0.1 {port} {QUORUM}\n\
             sentinel down-after-milliseconds {MASTER} {DOWN_AFTER}\n\
             sentinel failover-timeout {MASTER} {FAILOVER_TIMEOUT}\n"
        );
        if let Some(password) = options.password {
            configuration += &format!("sentinel auth-pass {MASTER} {password}\n");
        }
        if let Some(password) = sentinel_password {
            configuration += &format!("sentinel sentinel-pass {password}\n");
        }
        let sentinel = ServerOptions { sentinel: Some(configuration), password: sentinel_password, ..options };
        let sentinels = try_join_all((0..SENTINELS).map(|_| RedisServer::start_with(sentinel.clone()))).await?;

        let password_file = sentinel_password.map(|password| {
            let path = scratch_path("sentinel-password")?;
            std::fs::write(&path, password)?;
            anyhow::Ok(path)
        });
        let password_file = password_file.transpose()?;
        let set = Self { servers: [primary].into_iter().chain(replicas).collect(), sentinels, password_file };
        set.until_whole().await?;
        Ok(set)
    }

    /// The server that most sentinels name and that says that it is the primary.
    pub async fn primary(&self) -> Result<usize> {
        let named = join_all(self.running_sentinels().map(Self::named_by)).await;
        let named: Vec<u16> = named.into_iter().flatten().collect();
        let votes = |port: u16| named.iter().filter(|named| **named == port).count();
        let (index, server) = self
            .servers
            .iter()
            .enumerate()
            .max_by_key(|(_, server)| votes(server.port()))
            .filter(|(_, server)| votes(server.port()) >= QUORUM)
            .with_context(|| format!("the sentinels name {named:?}"))?;
        let role = Self::role(server).await?;
        ensure!(role == "master", "port {} is named, and is a {role}", server.port());
        Ok(index)
    }

    /// Waits until all running sentinels name the same primary and it says that it is one.
    pub async fn until_agreed(&self) -> Result<usize> {
        until(SOON, "the sentinels to agree", async || {
            let named = try_join_all(self.running_sentinels().map(Self::named_by)).await?;
            ensure!(named.windows(2).all(|two| two[0] == two[1]), "the sentinels name {named:?}");
            self.primary().await.map(Some)
        })
        .await
    }

    /// Waits until they agree, and each sentinel that runs knows the others and takes all servers to be up, which follow the
    /// primary.
    pub async fn until_whole(&self) -> Result<usize> {
        let primary = self.until_agreed().await?;
        until_true(SOON, "replicas and sentinels to be known", async || {
            for sentinel in self.running_sentinels() {
                let fields: Vec<(String, String)> = sentinel.ask(cmd("SENTINEL").arg("MASTER").arg(MASTER)).await?;
                let is = |name: &str, value: &str| fields.iter().any(|(key, is)| key == name && is == value);
                let knows_servers = is("num-slaves", &(SERVERS - 1).to_string()) && is("flags", "master");
                let knows_sentinels = is("num-other-sentinels", &(SENTINELS - 1).to_string());
                ensure!(knows_servers && knows_sentinels, "port {}: {fields:?}", sentinel.port());
            }
            for server in self.servers.iter().filter(|server| server.runs()) {
                let replication: String = server.ask(cmd("INFO").arg("replication")).await?;
                let follows = replication.contains("role:master") || replication.contains("master_link_status:up");
                ensure!(follows, "port {}: {replication}", server.port());
            }
            Ok(true)
        })
        .await?;
        Ok(primary)
    }

    /// Makes the sentinels replace the primary and waits until they agree about another. Returns the new one.
    pub async fn fail_over(&self) -> Result<usize> {
        let before = self.until_agreed().await?;
        until(SOON, "another primary", async || {
            let sentinel = self.running_sentinels().next().context("no sentinel runs")?;
            // It refuses while a failover runs, and for as long as it knows no replica that would do.
            sentinel.ask::<()>(cmd("SENTINEL").arg("FAILOVER").arg(MASTER)).await?;
            until(FAIL_OVER, "the failover", async || Ok(Some(self.primary().await?).filter(|now| *now != before)))
                .await
                .map(Some)
        })
        .await?;
        self.until_agreed().await
    }

    fn running_sentinels(&self) -> impl Iterator<Item = &RedisServer> {
        self.sentinels.iter().filter(|sentinel| sentinel.runs())
    }

    async fn named_by(sentinel: &RedisServer) -> Result<u16> {
        let ask: Cmd = cmd("SENTINEL").arg("GET-MASTER-ADDR-BY-NAME").arg(MASTER).to_owned();
        let (_, port): (String, u16) = sentinel.ask(&ask).await?;
        Ok(port)
    }

    /// What the server says that it is: `master` or `slave`.
    async fn role(server: &RedisServer) -> Result<String> {
        let role: Vec<redis::Value> = server.ask(&cmd("ROLE")).await?;
        Ok(redis::from_redis_value(role.into_iter().next().context("no role")?)?)
    }
}

impl Servers for SentinelSet {
    fn url(&self) -> String {
        // The password in the URL is for the servers, the addresses are those of the sentinels.
        let ports = self.sentinels.iter().map(RedisServer::port);
        self.servers.first().map(|server| server.options().url(ports)).unwrap_or_default()
    }

    fn sentinel_master(&self) -> Option<&str> {
        Some(MASTER)
    }

    fn sentinel_password_file(&self) -> Option<&Path> {
        self.password_file.as_deref()
    }

    async fn connection_for(&self, _key: &str) -> Result<MultiplexedConnection> {
        self.servers[self.primary().await?].connection().await
    }
}
