//! The programs of `deploy/e2e`, run on a scenario as they are on a live cluster.

use anyhow::Result;

use crate::guide::administrator;
use crate::helm::repository;
use crate::scenario::Scenario;

/// The result of one of the programs.
#[derive(Debug)]
pub struct Outcome {
    /// Whether its exit status was 0.
    pub success: bool,
    /// Its standard output, then its standard error.
    pub output: String,
}

/// Runs one of the programs to its end, with these settings, in the namespace of the scenario.
pub async fn run(scenario: &Scenario, name: &str, settings: &[(&str, &str)]) -> Result<Outcome> {
    let mut command = administrator(&scenario.plane, 1500)?;
    command
        .arg(repository("deploy/e2e").join(name))
        .env("NAMESPACE", &scenario.namespace)
        .env("TIMEOUT", "600")
        .envs(settings.iter().copied());
    // Not on the runtime, which the simulated kubelet needs.
    let ended = tokio::task::spawn_blocking(move || command.output()).await??;
    let output = String::from_utf8(ended.stdout)? + &String::from_utf8(ended.stderr)?;
    Ok(Outcome { success: ended.status.success(), output })
}
