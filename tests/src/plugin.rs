//! The kubectl plugin, run as its users run it: with a kubeconfig, and nothing else.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use k8s_openapi::api::apps::v1::Deployment;
use kube::Client;
use kube::api::{Api, PostParams};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};
use tokio::time::timeout;

use crate::parts::program;
use crate::watchdog;

/// The longest that a command may take.
const LIMIT: Duration = Duration::from_secs(30);

/// What a command has printed, and how it has ended.
#[derive(Debug)]
pub struct Output {
    /// The exit code; `None` after a signal.
    pub code: Option<i32>,
    /// The standard output.
    pub out: String,
    /// The standard error.
    pub err: String,
}

impl Output {
    /// The standard output; an error unless the command has succeeded.
    pub fn success(self) -> Result<String> {
        ensure!(self.code == Some(0), "exit code {:?}: {}", self.code, self.err);
        Ok(self.out)
    }

    /// The standard output as JSON.
    pub fn json(self) -> Result<Value> {
        let out = self.success()?;
        serde_json::from_str(&out).with_context(|| format!("no JSON: {out}"))
    }
}

/// Runs a command with this kubeconfig.
pub async fn run(kubeconfig: &Path, arguments: &[&str]) -> Result<Output> {
    let output = timeout(LIMIT, command(kubeconfig, arguments)?.output());
    let output = output.await.with_context(|| format!("{arguments:?} has not ended within {LIMIT:?}"))??;
    let text = |bytes| String::from_utf8(bytes);
    Ok(Output { code: output.status.code(), out: text(output.stdout)?, err: text(output.stderr)? })
}

/// A command that goes on until it is dropped.
pub struct Watch {
    _child: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Watch {
    /// Starts a command with this kubeconfig.
    pub fn start(kubeconfig: &Path, arguments: &[&str]) -> Result<Self> {
        let mut child = command(kubeconfig, arguments)?.stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
        let stdout = child.stdout.take().context("no standard output")?;
        Ok(Self { _child: child, lines: BufReader::new(stdout).lines() })
    }

    /// The next line that it prints.
    pub async fn line(&mut self) -> Result<String> {
        let line = timeout(LIMIT, self.lines.next_line()).await.context("nothing more is printed")??;
        line.context("the command has ended")
    }
}

fn command(kubeconfig: &Path, arguments: &[&str]) -> Result<Command> {
    let mut command = Command::new(program("kubectl-spot_balancer")?);
    command.env_clear().env("HOME", watchdog::scratch()?).env("KUBECONFIG", kubeconfig).args(arguments);
    command.stdin(Stdio::null()).kill_on_drop(true);
    Ok(command)
}

/// The cells of the rows of a table, each by its header. Columns are three spaces apart.
pub fn rows(table: &str) -> Result<Vec<BTreeMap<String, String>>> {
    let mut lines = table.lines().take_while(|line| !line.is_empty()).map(|line| {
        line.split("   ").map(str::trim).filter(|cell| !cell.is_empty()).map(str::to_owned).collect::<Vec<_>>()
    });
    let header = lines.next().context("no header")?;
    let row = |cells: Vec<String>| {
        if cells.len() != header.len() {
            bail!("{cells:?} are not as many cells as {header:?}");
        }
        Ok(header.iter().cloned().zip(cells).collect())
    };
    lines.map(row).collect()
}

/// Makes the Deployment of a webhook with these settings in a namespace, as the chart labels it. It runs nothing.
pub async fn deployment(client: &Client, namespace: &str, settings: &[(&str, &str)]) -> Result<()> {
    let variables: Vec<Value> = settings.iter().map(|(name, value)| json!({"name": name, "value": value})).collect();
    let labels = json!({"app.kubernetes.io/name": "spot-balancer", "app.kubernetes.io/component": "webhook"});
    let deployment: Deployment = serde_json::from_value(json!({
        "metadata": {"name": "spot-balancer-webhook", "labels": labels},
        "spec": {
            "selector": {"matchLabels": labels},
            "template": {
                "metadata": {"labels": labels},
                "spec": {"containers": [{"name": "webhook", "image": "spot-balancer", "env": variables}]},
            },
        },
    }))?;
    Api::namespaced(client.clone(), namespace).create(&PostParams::default(), &deployment).await?;
    Ok(())
}
