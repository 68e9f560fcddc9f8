//! The end-to-end tests themselves, as far as they go without machines.

use std::time::Duration;

use anyhow::{Result, ensure};
use balancer_tests::control_plane::Plane;
use balancer_tests::end_to_end::{self, Outcome};
use balancer_tests::need;
use balancer_tests::scenario::{Scenario, strict};
use balancer_tests::wait::until_true;
use balancer_tests::webhook::WebhookOptions;
use kube::api::ListParams;

/// Runs `deploy/e2e/run` with pods in the place of Spark.
async fn run(scenario: &Scenario) -> Result<Outcome> {
    end_to_end::run(scenario, "run", &[("SUBMIT", "submit-pods")]).await
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
        let Outcome { content, said } = run(&scenario).await?;
        ensure!(content, "{said}");
        for line in ["ratio 1.0: 10 of 10 on spot", "ratio 0.0: 0 of 10 on spot", "ratio 0.7: 7 of 10 on spot"] {
            assert!(said.contains(line), "{said}");
        }
        assert!(said.contains("all ratios as expected"), "{said}");
        until_cleaned_up(&scenario).await?;
    }
    Ok(())
}

#[tokio::test]
async fn the_end_to_end_tests_fail_where_no_webhook_is_called_and_leave_nothing() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Kubectl);
    let scenario = Scenario::bare(Plane::shared().await?, "bare").await?;
    let Outcome { content, said } = run(&scenario).await?;
    assert!(!content && said.contains("was not placed"), "{said}");
    until_cleaned_up(&scenario).await
}
