//! The end-to-end tests themselves, as far as they go without machines.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use balancer_tests::helm::repository;
use balancer_tests::need;
use balancer_tests::parts::program;
use balancer_tests::process::scratch_path;
use balancer_tests::scenario::{Scenario, strict};
use balancer_tests::wait::until_true;
use balancer_tests::webhook::WebhookOptions;
use kube::api::ListParams;

/// Runs `deploy/e2e/run` with pods in the place of Spark, and answers whether it was content and what it said.
async fn end_to_end(scenario: &Scenario) -> Result<(bool, String)> {
    let kubectl = program("kubectl")?;
    let kubectl = kubectl.parent().map(Path::to_owned).context("kubectl is in no folder")?;
    let path = std::env::join_paths([kubectl, "/usr/bin".into(), "/bin".into()])?;
    let mut command = Command::new(repository("deploy/e2e/run"));
    command
        .env_clear()
        .env("PATH", path)
        .env("HOME", scratch_path("e2e")?)
        .env("KUBECONFIG", scenario.plane.kubeconfig())
        .env("NAMESPACE", &scenario.namespace)
        .env("SUBMIT", "submit-pods")
        .env("TIMEOUT", "200");
    // Beside the runtime, which the stand-in for the kubelet runs on.
    let output = tokio::task::spawn_blocking(move || command.output()).await??;
    let said = String::from_utf8(output.stdout)? + &String::from_utf8(output.stderr)?;
    Ok((output.status.success(), said))
}

async fn until_cleaned_up(scenario: &Scenario) -> Result<()> {
    until_true(Duration::from_secs(60), "its pods to be gone", async || {
        Ok(scenario.pods().list(&ListParams::default().labels("spot-balancer-e2e")).await?.items.is_empty())
    })
    .await
}

#[tokio::test]
async fn the_end_to_end_tests_pass_where_executors_are_placed_and_leave_nothing() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Kubectl);
    for (purpose, options) in [("strict", strict()), ("effort", WebhookOptions::default())] {
        let scenario = Scenario::start(purpose, 1, options).await?;
        let (content, said) = end_to_end(&scenario).await?;
        ensure!(content, "{said}");
        for line in ["ratio 1.0: 10 of 10 on spot", "ratio 0.0: 0 of 10 on spot", "ratio 0.7: 7 of 10 on spot"] {
            assert!(said.contains(line), "{said}");
        }
        assert!(said.contains("all as asked"), "{said}");
        until_cleaned_up(&scenario).await?;
    }
    Ok(())
}

#[tokio::test]
async fn the_end_to_end_tests_fail_where_no_webhook_is_called_and_leave_nothing() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Kubectl);
    let scenario = Scenario::bare(balancer_tests::control_plane::Plane::shared().await?, "bare").await?;
    let (content, said) = end_to_end(&scenario).await?;
    assert!(!content && said.contains("was not placed"), "{said}");
    until_cleaned_up(&scenario).await
}
