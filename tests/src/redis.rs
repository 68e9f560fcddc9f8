//! A redis-server of a test's own, which can be stopped, emptied and frozen.

use std::time::Duration;

use anyhow::{Context, Result};
use redis::aio::MultiplexedConnection;
use redis::{Client, TlsCertificates};

use crate::certificate::{ServerCertificate, authority};
use crate::parts::program;
use crate::port;
use crate::process::{Process, scratch_path};

const START: Duration = Duration::from_secs(10);

/// A word's value in the field `policy` of a job's record: `key` is `spot-ratio` or `on-demand-base`.
pub fn policy_word(policy: Option<&str>, key: &str) -> Option<String> {
    policy?.split(' ').find_map(|word| word.strip_prefix(key)?.strip_prefix('=')).map(str::to_owned)
}

/// A running redis-server without persistence. Dropping it kills it.
#[derive(Debug)]
pub struct RedisServer {
    port: u16,
    tls: Option<Tls>,
    arguments: Vec<String>,
    process: Option<Process>,
}

#[derive(Debug)]
struct Tls {
    certificate: ServerCertificate,
    password: &'static str,
}

impl RedisServer {
    /// Starts a server on a free port.
    pub async fn start() -> Result<Self> {
        Self::start_with(None, Vec::new()).await
    }

    /// Starts a server with these arguments after its own.
    pub async fn start_as(arguments: Vec<String>) -> Result<Self> {
        Self::start_with(None, arguments).await
    }

    /// Starts a server that speaks TLS only and wants a password; both are part of its [`url`].
    /// Its certificate is signed by the tests' authority, so a program that is to trust it needs
    /// `SSL_CERT_FILE` set to that authority's path.
    ///
    /// [`url`]: Self::url
    pub async fn start_tls() -> Result<Self> {
        Self::start_with(Some(Tls { certificate: authority()?.issue()?, password: "correct-horse" }), Vec::new()).await
    }

    async fn start_with(tls: Option<Tls>, arguments: Vec<String>) -> Result<Self> {
        let mut server = Self { port: port::free()?, tls, arguments, process: None };
        server.start_again_empty().await?;
        Ok(server)
    }

    /// Starts the server again after [`stop`](Self::stop), on the same port and without its data.
    /// A server that still runs is killed first.
    pub async fn start_again_empty(&mut self) -> Result<()> {
        self.stop();
        let folder = scratch_path("redis")?;
        std::fs::create_dir(&folder)?;
        let mut process = Process::start(&program("redis-server")?, |command| {
            command.arg("--dir").arg(folder);
            command.args(["--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]);
            match &self.tls {
                None => command.args(["--port", &self.port.to_string()]),
                Some(Tls { certificate, password }) => command
                    .args(["--port", "0", "--tls-port", &self.port.to_string()])
                    .args(["--tls-auth-clients", "no", "--requirepass", password])
                    .arg("--tls-cert-file")
                    .arg(&certificate.path)
                    .arg("--tls-key-file")
                    .arg(&certificate.key_path),
            };
            command.args(&self.arguments);
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
        match &self.tls {
            None => format!("redis://127.0.0.1:{}", self.port),
            Some(tls) => format!("rediss://:{}@127.0.0.1:{}", tls.password, self.port),
        }
    }

    /// A new connection.
    pub async fn connection(&self) -> Result<MultiplexedConnection> {
        let url = self.url();
        let client = match self.tls {
            None => Client::open(url)?,
            Some(_) => Client::build_with_tls(
                url,
                TlsCertificates { client_tls: None, root_cert: Some(authority()?.pem.clone().into_bytes()) },
            )?,
        };
        Ok(client.get_multiplexed_async_connection().await?)
    }

    fn running(&self) -> Result<&Process> {
        self.process.as_ref().context("the redis-server is stopped")
    }
}
