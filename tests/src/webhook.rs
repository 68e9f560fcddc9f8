//! The webhook's release binary, run as a process of its own.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::process::ExitStatus;
use std::time::Duration;

use anyhow::Result;
use kube::Client;

use crate::certificate::{ServerCertificate, authority};
use crate::control_plane::{ControlPlane, write_kubeconfig};
use crate::endpoint;
use crate::metrics::Metrics;
use crate::parts::program;
use crate::port;
use crate::process::Process;
use crate::redis::RedisServer;

const START: Duration = Duration::from_secs(30);

/// What a webhook process starts with, besides its ports and its certificate. Without
/// [`redis`](Self::redis) the ledger is in memory.
#[derive(Debug, Clone, Default)]
pub struct WebhookOptions {
    environment: BTreeMap<String, OsString>,
    arguments: Vec<String>,
}

impl WebhookOptions {
    /// With its ledger in this Redis.
    pub fn redis(self, redis: &RedisServer) -> Result<Self> {
        Ok(self.env("STORE", "redis").env("REDIS_URL", redis.url()).env("SSL_CERT_FILE", &authority()?.path))
    }

    /// With this cluster, as its administrator.
    pub fn cluster(self, plane: &ControlPlane) -> Self {
        self.env("KUBECONFIG", plane.kubeconfig())
    }

    /// With a cluster that cannot be reached: no job's driver is found.
    pub fn without_cluster(self) -> Result<Self> {
        Ok(self.env("KUBECONFIG", write_kubeconfig(port::free()?, "")?))
    }

    /// With this environment variable.
    pub fn env(mut self, name: &str, value: impl Into<OsString>) -> Self {
        self.environment.insert(name.to_owned(), value.into());
        self
    }

    /// With this argument.
    pub fn arg(mut self, argument: &str) -> Self {
        self.arguments.push(argument.to_owned());
        self
    }
}

/// A running webhook. Dropping it kills it.
#[derive(Debug)]
pub struct Webhook {
    process: Process,
    /// Where it serves HTTPS.
    pub port: u16,
    /// Where it serves probes and metrics.
    pub admin_port: u16,
    /// Its certificate; renew it by [`Authority::renew`](crate::certificate::Authority::renew).
    pub certificate: ServerCertificate,
}

impl Webhook {
    /// Starts a webhook and waits until it says that it is ready.
    pub async fn start(options: WebhookOptions) -> Result<Self> {
        let certificate = authority()?.issue()?;
        let (port, admin_port) = (port::free()?, port::free()?);
        let mut process = Process::start(&program("balancer-webhook")?, |command| {
            command
                .env("STORE", "memory")
                .env("PORT", port.to_string())
                .env("ADMIN_PORT", admin_port.to_string())
                .env("TLS_CERT_PATH", &certificate.path)
                .env("TLS_KEY_PATH", &certificate.key_path)
                .envs(&options.environment)
                .args(&options.arguments);
        })?;
        let admin = endpoint::client(&endpoint::http(admin_port))?;
        process.until_ok(START, &admin, "/readyz").await?;
        Ok(Self { process, port, admin_port, certificate })
    }

    /// A new client of its HTTPS port, for reviews that no apiserver sends.
    pub fn client(&self) -> Result<Client> {
        endpoint::client(&endpoint::https(self.port))
    }

    /// A new client of its admin port.
    pub fn admin(&self) -> Result<Client> {
        endpoint::client(&endpoint::http(self.admin_port))
    }

    /// Its metrics as they are now.
    pub async fn metrics(&self) -> Result<Metrics> {
        Metrics::of(&self.admin()?).await
    }

    /// The process: its id, its signals, its log.
    pub fn process(&self) -> &Process {
        &self.process
    }

    /// Asks it to end (SIGTERM) and waits for its exit status.
    pub async fn terminate(&mut self, within: Duration) -> Result<ExitStatus> {
        self.process.terminate(within).await
    }

    /// Waits for its end after a signal.
    pub async fn ended(&mut self, within: Duration) -> Result<ExitStatus> {
        self.process.ended(within).await
    }

    /// Ends it at once (SIGKILL), as does dropping it.
    pub fn kill(self) {}
}
