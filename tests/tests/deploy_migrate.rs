//! From the Python original to ours while jobs run, by the commands of `docs/migrate.md`. The original is a
//! stand-in.

#![allow(clippy::indexing_slicing, reason = "JSON is read by index; a panic here fails a test, as it should")]

use anyhow::{Context, Result, ensure};
use balancer_tests::control_plane::{Options, Plane};
use balancer_tests::deployed::{RECONCILER, WEBHOOK, as_deployed, lead, prepare};
use balancer_tests::helm::Helm;
use balancer_tests::nodes::CAPACITY;
use balancer_tests::original::Original;
use balancer_tests::pods::{Posted, executor};
use balancer_tests::reconciler::Reconciler;
use balancer_tests::scenario::{REPAIRED, Scenario};
use balancer_tests::wait::{SOON, until_true};
use balancer_tests::webhook::Webhook;
use balancer_tests::{guide, need};
use k8s_openapi::api::core::v1::Namespace;
use kube::api::{Api, Patch, PatchParams};
use serde_json::{Value, json};

const JOB: &str = "etl";
const RATIO: f64 = 0.7;

/// The one block of commands in the guide that has `part` in it.
fn documented(part: &str) -> Result<String> {
    guide::block("docs/migrate.md", part)
}

/// A cluster in which the original places the executors of a job that runs.
struct Migration {
    scenario: Scenario,
    helm: Helm,
    original: Original,
    ids: std::ops::RangeFrom<u32>,
}

impl Migration {
    async fn start(purpose: &str) -> Result<Self> {
        let plane = Plane::own(Options { scheduler: true, ..Options::default() }).await?;
        let scenario = Scenario::bare(plane, purpose).await?;
        let helm = prepare(&scenario.plane, &[]).await?;
        let original = Original::start(RATIO).await?;
        original.install(&scenario.client, &scenario.namespace).await?;
        // By which the original's manifests choose namespaces.
        let labels = json!({"metadata": {"labels": {"name": scenario.namespace}}});
        let namespaces = Api::<Namespace>::all(scenario.client.clone());
        namespaces.patch(&scenario.namespace, &PatchParams::default(), &Patch::Merge(&labels)).await?;
        until_true(SOON, "the original to be called", async || {
            executor("probe", 1).dry_run(&scenario.client, &scenario.namespace).await?;
            Ok(original.placed() > 0)
        })
        .await?;
        let mut migration = Self { scenario, helm, original, ids: 1.. };
        migration.scenario.driver(JOB, &RATIO.to_string()).await?.pod()?;
        for _ in 0..10 {
            let pod = migration.create().await?;
            ensure!(by(&pod) == [false, true], "{}", pod.object);
        }
        migration.scenario.until_bound(JOB).await?;
        Ok(migration)
    }

    async fn create(&mut self) -> Result<Posted> {
        let id = self.ids.next().context("no more ids")?;
        let made = self.scenario.post(&executor(JOB, id)).await?;
        ensure!(made.status == 201, "{}", made.object);
        Ok(made)
    }

    /// Runs a block of the guide for this cluster.
    fn run(&self, block: &str) -> Result<()> {
        guide::run(&self.scenario.plane, &block.replace("spark-jobs", &self.scenario.namespace)).map(drop)
    }

    /// Installs ours as the guide says, with processes in the place of its pods.
    async fn install(&mut self, selected: &str) -> Result<(Webhook, Reconciler)> {
        let (label, value) = selected.split_once('=').context("no label")?;
        let values = json!({
            "certificates": {"source": "helm"},
            "settings": {"spotPreference": "STRICT", "logFormat": "text", "reconcileGraceSeconds": 5},
            "namespaces": {"selector": {"matchLabels": {label: value}}},
        });
        self.helm.install(&values).await?;
        let (plane, redis) = (&self.scenario.plane, &self.scenario.redis);
        let webhook = Webhook::start(as_deployed(plane, WEBHOOK, "/balancer-webhook", redis).await?).await?;
        let reconciler = as_deployed(plane, RECONCILER, "/balancer-reconcile", redis).await?;
        lead(plane, webhook.port, "ours").await?;
        // Ready, that is what `rollout status` waits for.
        Ok((webhook, Reconciler::start(reconciler).await?))
    }
}

/// Whether ours and whether the original placed an executor.
fn by(pod: &Posted) -> [bool; 2] {
    let pinned = pod.object["spec"]["nodeSelector"][CAPACITY].is_string();
    let ours = pod.object["metadata"]["annotations"]["workload/capacity-type"].is_string();
    [ours, pinned && !ours]
}

#[tokio::test]
async fn the_guide_migrates_a_running_job_and_back_without_losing_a_count() -> Result<()> {
    need!(Helm, ControlPlane, Scheduler, Redis, Webhook, Reconciler, Kubectl);
    let install = documented("helm install")?;
    let selected = install.split("matchLabels.").nth(1).and_then(|rest| rest.split('\'').next());
    let mut migration = Migration::start("switched").await?;
    let (_webhook, _reconciler) = migration.install(selected.context("no label is chosen by")?).await?;
    // As soon as it says that it is ready.
    migration.scenario.ensure_ledger_matches_pods(JOB).await?.ensure_near(RATIO, 1.0)?;

    migration.run(&documented("kubectl patch")?)?;
    let mut before = migration.create().await?;
    ensure!(by(&before) == [false, true], "nothing is switched yet: {}", before.object);
    let label = documented("label namespace spark-jobs spot-balancer-switched=yes")?;
    for (block, switched) in [(label, true), (documented("spot-balancer-switched-")?, false)] {
        migration.run(&block)?;
        // The apiserver hears of it soon. Until then one of them is called, and then the other; never both
        // or none.
        let mut since = 0;
        while since < 10 {
            before = migration.create().await?;
            let [ours, original] = by(&before);
            ensure!(ours != original, "{}", before.object);
            ensure!(ours == switched || since == 0, "switched back by itself: {}", before.object);
            since += usize::from(ours == switched);
        }
        migration.scenario.until_bound(JOB).await?;
        migration.scenario.until_ledger_matches_pods(JOB, REPAIRED).await?;
        if switched {
            migration.scenario.ensure_ratio_recovers(JOB, RATIO).await?;
        }
    }
    Ok(())
}

#[tokio::test]
async fn an_executor_pinned_by_the_original_after_us_is_counted_once_as_pinned() -> Result<()> {
    need!(Helm, ControlPlane, Scheduler, Redis, Webhook, Reconciler);
    let mut migration = Migration::start("both").await?;
    let label = json!({"metadata": {"labels": {"both": "yes"}}});
    let namespaces = Api::<Namespace>::all(migration.scenario.client.clone());
    namespaces.patch(&migration.scenario.namespace, &PatchParams::default(), &Patch::Merge(&label)).await?;
    let (_webhook, _reconciler) = migration.install("both=yes").await?;
    let placed = migration.original.placed();
    let seen_by_both = async |migration: &mut Migration| -> Result<bool> {
        let made: Value = migration.create().await?.object;
        Ok(made["metadata"]["annotations"]["workload/capacity-type"].is_string())
    };
    let mut both = 0;
    for _ in 0..200 {
        both += usize::from(seen_by_both(&mut migration).await?);
        if both == 20 {
            break;
        }
    }
    ensure!(both == 20 && migration.original.placed() > placed, "{both} executors were seen by both");
    migration.scenario.until_bound(JOB).await?;
    migration.scenario.until_ledger_matches_pods(JOB, REPAIRED).await?;
    Ok(())
}
