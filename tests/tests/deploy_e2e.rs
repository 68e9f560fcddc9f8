//! The end-to-end tests themselves, as far as they go without machines.

use std::time::Duration;

use anyhow::{Result, ensure};
use balancer_tests::control_plane::Plane;
use balancer_tests::end_to_end::{self, Outcome};
use balancer_tests::platforms::{EKS_ON_DEMAND, EKS_SPOT, PLATFORMS};
use balancer_tests::scenario::{Scenario, strict};
use balancer_tests::wait::until_true;
use balancer_tests::webhook::WebhookOptions;
use balancer_tests::{need, nodes};
use kube::api::ListParams;

/// Runs `deploy/e2e/run` with pods in the place of Spark.
async fn run(scenario: &Scenario, profile: &str) -> Result<Outcome> {
    end_to_end::run(scenario, "run", &[("SUBMIT", "submit-pods"), ("CAPACITY_PROFILE", profile)]).await
}

async fn until_cleaned_up(scenario: &Scenario) -> Result<()> {
    until_true(Duration::from_secs(60), "its pods to be gone", async || {
        Ok(scenario.pods().list(&ListParams::default().labels("spot-balancer-e2e")).await?.items.is_empty())
    })
    .await
}

#[tokio::test]
async fn end_to_end_tests_pass_if_executors_are_placed_and_clean_up() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Kubectl);
    let plane = Plane::shared().await?;
    nodes::ensure_executor_pool(&plane.client()?, "eks", &[EKS_SPOT, EKS_ON_DEMAND]).await?;
    for (purpose, profile, options) in [
        ("strict", "karpenter", strict()),
        ("effort", "karpenter", WebhookOptions::default()),
        ("strict-eks", "eks", strict()),
        ("effort-eks", "eks", WebhookOptions::default()),
    ] {
        let scenario = Scenario::start(purpose, 1, options.env("CAPACITY_PROFILE", profile)).await?;
        let Outcome { success, output } = run(&scenario, profile).await?;
        ensure!(success, "{output}");
        for line in ["ratio 1.0: 10 of 10 on spot", "ratio 0.0: 0 of 10 on spot", "ratio 0.7: 7 of 10 on spot"] {
            assert!(output.contains(line), "{output}");
        }
        assert!(output.contains("all ratios as expected"), "{output}");
        until_cleaned_up(&scenario).await?;
    }
    Ok(())
}

#[tokio::test]
async fn end_to_end_tests_fail_without_a_webhook_and_clean_up() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Kubectl);
    let scenario = Scenario::bare(Plane::shared().await?, "bare").await?;
    let Outcome { success, output } = run(&scenario, "karpenter").await?;
    assert!(!success && output.contains("was not placed"), "{output}");
    until_cleaned_up(&scenario).await
}

#[tokio::test]
async fn end_to_end_tests_name_the_profiles_that_they_know() -> Result<()> {
    need!(Redis, ControlPlane, Kubectl);
    let scenario = Scenario::bare(Plane::shared().await?, "unknown").await?;
    let Outcome { success, output } = run(&scenario, "mainframe").await?;
    assert!(!success && output.contains("CAPACITY_PROFILE is mainframe; it must be karpenter, eks,"), "{output}");
    // Each of those that the programs have.
    for platform in PLATFORMS {
        assert!(output.contains(platform.profile), "{}: {output}", platform.profile);
    }
    Ok(())
}
