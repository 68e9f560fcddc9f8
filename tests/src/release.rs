//! A release binary of ours, run as a process of its own: what the webhook and the reconciler share.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::Path;
use std::process::ExitStatus;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use kube::Client;

use crate::certificate::authority;
use crate::control_plane::{ControlPlane, write_kubeconfig};
use crate::endpoint;
use crate::metrics::Metrics;
use crate::parts::program;
use crate::port;
use crate::process::Process;
use crate::redis::Servers;

const START: Duration = Duration::from_secs(30);

/// What a process starts with, on top of what every process of its kind needs.
#[derive(Debug, Clone, Default)]
pub struct Options {
    environment: BTreeMap<String, OsString>,
    arguments: Vec<String>,
}

impl Options {
    /// With its ledger in this Redis, which it asks how its servers work together.
    pub fn redis(self, redis: &impl Servers) -> Result<Self> {
        let mut options =
            self.env("STORE", "redis").env("REDIS_URL", redis.url()).env("SSL_CERT_FILE", &authority()?.path);
        if let Some(master) = redis.sentinel_master() {
            options = options.env("REDIS_SENTINEL_MASTER", master);
        }
        if let Some(file) = redis.sentinel_password_file() {
            options = options.env("REDIS_SENTINEL_PASSWORD_FILE", file);
        }
        Ok(options)
    }

    /// With this cluster, as its administrator.
    pub fn cluster(self, plane: &ControlPlane) -> Self {
        self.kubeconfig(plane.kubeconfig())
    }

    /// With an unreachable cluster: no driver lookup succeeds, and a webhook does not wait for its index of
    /// executors.
    pub fn without_cluster(self) -> Result<Self> {
        Ok(self.kubeconfig(&write_kubeconfig(port::free()?, "", None)?).env("RECONCILE_ENABLED", "false"))
    }

    /// With the cluster that this kubeconfig leads to, as whom it says.
    pub fn kubeconfig(self, path: &Path) -> Self {
        self.env("KUBECONFIG", path)
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

    /// Starts the program with these alone.
    fn start(&self, name: &str) -> Result<Process> {
        Process::start(&program(name)?, |command| {
            command.envs(&self.environment).args(&self.arguments);
        })
    }

    /// The same, with what `over` says instead where both say something.
    pub fn with(mut self, over: Self) -> Self {
        self.environment.extend(over.environment);
        self.arguments.extend(over.arguments);
        self
    }
}

/// A running release binary. Dropping it kills it.
#[derive(Debug)]
pub struct Release {
    process: Process,
    /// Where it serves probes and metrics.
    pub admin_port: u16,
}

impl Release {
    /// Starts a program with `options` over `needed`, and waits for nothing.
    pub(crate) fn begin(name: &str, needed: Options, options: Options) -> Result<Self> {
        let admin_port = port::free()?;
        let process = needed.env("ADMIN_PORT", admin_port.to_string()).with(options).start(name)?;
        Ok(Self { process, admin_port })
    }

    /// Waits until it is ready.
    pub async fn until_ready(&mut self) -> Result<()> {
        let admin = self.admin()?;
        self.process.until_ok(START, &admin, "/readyz").await
    }

    /// Whether it is ready; an error while it does not respond.
    pub async fn is_ready(&self) -> Result<bool> {
        Ok(endpoint::get(&self.admin()?, "/readyz").await?.status == 200)
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
}

/// Starts a program with some invalid settings, and returns its output. Fails
/// if it does not end, or ends without an error.
pub async fn refusal(name: &str, options: &Options) -> Result<String> {
    let mut process = options.start(name)?;
    let status = process.ended(START).await.with_context(|| format!("{name} with {options:?}"))?;
    let output = process.log()?;
    ensure!(!status.success() && status.code().is_some(), "{name} with {options:?} ended with {status}: {output}");
    ensure!(!output.contains("panicked") && !output.contains("a bug"), "{output}");
    Ok(output)
}
