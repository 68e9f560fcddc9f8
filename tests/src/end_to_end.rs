//! The programs of `deploy/e2e`, run on a scenario as they are on a live cluster.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use crate::helm::repository;
use crate::parts::program;
use crate::process::scratch_path;
use crate::scenario::Scenario;

/// What one of the programs made of it.
#[derive(Debug)]
pub struct Outcome {
    /// Whether it was content.
    pub content: bool,
    /// What it said.
    pub said: String,
}

/// Runs one of the programs to its end, with these settings, in the namespace of the scenario.
pub async fn run(scenario: &Scenario, name: &str, settings: &[(&str, &str)]) -> Result<Outcome> {
    let kubectl = program("kubectl")?;
    let kubectl = kubectl.parent().map(Path::to_owned).context("kubectl is in no folder")?;
    let path = std::env::join_paths([kubectl, "/usr/bin".into(), "/bin".into()])?;
    // It ends in any case, whatever hangs.
    let mut command = Command::new("timeout");
    command
        .args(["--kill-after=10", "500"])
        .arg(repository("deploy/e2e").join(name))
        .env_clear()
        .env("PATH", path)
        .env("HOME", scratch_path("e2e")?)
        .env("KUBECONFIG", scenario.plane.kubeconfig())
        .env("NAMESPACE", &scenario.namespace)
        .env("TIMEOUT", "200")
        .envs(settings.iter().copied());
    // Beside the runtime, which the stand-in for the kubelet runs on.
    let output = tokio::task::spawn_blocking(move || command.output()).await??;
    let said = String::from_utf8(output.stdout)? + &String::from_utf8(output.stderr)?;
    Ok(Outcome { content: output.status.success(), said })
}
