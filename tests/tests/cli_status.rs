//! `kubectl spot-balancer status` and `explain` on the real control plane: what is printed in each state of a job, and to a
//! user who may only read pods.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, ensure};
use balancer_tests::account::{Account, PODS};
use balancer_tests::control_plane::Plane;
use balancer_tests::events::until_warned;
use balancer_tests::plugin::{self, Output, Watch};
use balancer_tests::scenario::{Scenario, strict};
use balancer_tests::scheduling::{until_bound, until_unschedulable};
use balancer_tests::wait::{SOON, until_true};
use balancer_tests::{need, nodes, pods};

const RATIO: &str = "workload/spot-ratio";

/// Runs the plugin as the administrator, in the scenario's namespace.
async fn run(scenario: &Scenario, arguments: &[&str]) -> Result<Output> {
    let namespace = ["--namespace", &scenario.namespace];
    plugin::run(scenario.plane.kubeconfig(), &[arguments, &namespace[..]].concat()).await
}

/// The row of each job.
async fn status(scenario: &Scenario) -> Result<BTreeMap<String, BTreeMap<String, String>>> {
    let table = run(scenario, &["status", "--output", "wide"]).await?.success()?;
    let rows = plugin::rows(&table)?.into_iter();
    rows.map(|row| Ok((row.get("JOB").context("no column JOB")?.clone(), row))).collect()
}

/// Fails unless the explanation of a pod has these texts.
async fn ensure_explained(scenario: &Scenario, pod: &str, texts: &[&str]) -> Result<()> {
    let text = run(scenario, &["explain", pod]).await?.success()?;
    for expected in texts {
        ensure!(text.contains(expected), "{expected:?} is missing in\n{text}");
    }
    Ok(())
}

/// A scenario of a `STRICT` webhook whose Deployment the administrator may read.
async fn scenario(purpose: &str) -> Result<Scenario> {
    let mut scenario = Scenario::bare(Plane::shared().await?, purpose).await?;
    scenario.serve(1, &strict()).await?;
    plugin::deployment(&scenario.client, &scenario.namespace, &[("SPOT_PREFERENCE", "STRICT")]).await?;
    Ok(scenario)
}

#[tokio::test]
async fn status_and_explain_tell_every_state_of_a_job() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler, Plugin);
    let scenario = scenario("status").await?;
    for job in ["wanted", "over", "below"] {
        scenario.driver(job, "0.5").await?.pod()?;
        scenario.executors(job, 1..=4, 1).await?;
        scenario.until_bound(job).await?;
    }
    pods::annotate(&scenario.pods(), "over-driver", RATIO, Some("0.25")).await?;
    pods::annotate(&scenario.pods(), "below-driver", RATIO, Some("1")).await?;
    scenario.driver("pending", "0.5").await?.pod()?;
    for id in 1..=2 {
        scenario.post(&pods::executor("pending", id).on_pool("nowhere")).await?.pod()?;
        until_unschedulable(&scenario.pods(), &format!("pending-exec-{id}")).await?;
    }
    scenario.driver("fixed", "0.5").await?.pod()?;
    scenario.post(&pods::executor("fixed", 1).node_selector(nodes::CAPACITY, "on-demand")).await?.pod()?;
    scenario.driver("off", "off").await?.pod()?;
    scenario.post(&pods::executor("off", 1)).await?.pod()?;
    scenario.post(&pods::driver("based").annotation("workload/on-demand-base", "2")).await?.pod()?;
    scenario.executors("based", 1..=2, 1).await?;
    scenario.executors("orphan", 1..=2, 1).await?;
    for job in ["fixed", "off", "based", "orphan"] {
        scenario.until_bound(job).await?;
    }

    let jobs = status(&scenario).await?;
    let columns = ["RATIO", "SOURCE", "SPOT", "ON-DEMAND", "PENDING", "DISTANCE", "FIXED", "SPOT STATE"];
    for (job, row) in [
        ("wanted", ["50%", "driver", "2", "2", "0", "0", "0", "open"]),
        ("over", ["25%", "driver", "2", "2", "0", "+1", "0", "open"]),
        ("below", ["100%", "driver", "2", "2", "0", "-2", "0", "open"]),
        ("pending", ["50%", "driver", "0", "0", "2", "0", "0", "open"]),
        ("fixed", ["50%", "driver", "0", "1", "0", "0", "1", "open"]),
        ("based", ["50%, base 2", "default", "0", "2", "0", "0", "0", "open"]),
        ("orphan", ["unknown", "driver gone", "1", "1", "0", "unknown", "0", "unknown"]),
    ] {
        let printed = jobs.get(job).with_context(|| format!("no job {job} in {jobs:?}"))?;
        let cells: Vec<_> = columns.iter().map(|column| printed.get(*column).map(String::as_str)).collect();
        assert_eq!(cells, row.map(Some), "{job}: {columns:?}");
    }
    let off = jobs.get("off").context("no job off")?;
    assert_eq!((off.get("RATIO"), off.get("DISTANCE")), (Some(&"off".to_owned()), Some(&"-".to_owned())));

    for (pod, texts) in [
        (
            "wanted-exec-1",
            &[
                "50% of the executors on spot: the annotation workload/spot-ratio on the driver wanted-driver",
                "To spot: the webhook wrote the annotation workload/capacity-type: spot.",
                "the node must have karpenter.sh/capacity-type in (spot)",
                "on the node spot-",
            ][..],
        ),
        ("wanted-exec-2", &["To on-demand: the webhook wrote", "on the node on-demand-", "(distance 0)"]),
        (
            "pending-exec-1",
            &["Pending for", "The scheduler finds no node", "The pod itself requires pool in (nowhere)"],
        ),
        ("fixed-exec-1", &["To on-demand, by the pod itself: it requires karpenter.sh/capacity-type in (on-demand)"]),
        ("off-exec-1", &["None: the annotation workload/spot-ratio of off-driver is off."]),
        ("orphan-exec-1", &["An unknown ratio: no live pod that drives the job was found."]),
        ("based-driver", &["It drives the job based.", "The first 2 executors go to on-demand"]),
    ] {
        ensure_explained(&scenario, pod, texts).await.with_context(|| pod.to_owned())?;
    }
    Ok(())
}

#[tokio::test]
async fn an_executor_that_no_webhook_has_seen_is_told_apart() -> Result<()> {
    need!(Redis, ControlPlane, Plugin);
    let scenario = Scenario::bare(Plane::shared().await?, "untouched").await?;
    scenario.driver("early", "0.5").await?.pod()?;
    scenario.post(&pods::executor("early", 1)).await?.pod()?;
    ensure_explained(
        &scenario,
        "early-exec-1",
        &[
            "None: it has no annotation workload/capacity-type, so no webhook has placed it.",
            "it was created before Spot Balancer was installed",
        ],
    )
    .await?;
    scenario.post(&pods::plain("notebook")).await?.pod()?;
    ensure_explained(&scenario, "notebook", &["it has no label spark-role, so it is no driver and no executor"]).await
}

#[tokio::test]
async fn names_of_nothing_are_errors_that_say_what_is_accepted() -> Result<()> {
    need!(Redis, ControlPlane, Plugin);
    let scenario = Scenario::bare(Plane::shared().await?, "nothing").await?;
    let empty = run(&scenario, &["status"]).await?.success()?;
    assert_eq!(empty, format!("No live jobs found in namespace {}.\n", scenario.namespace));
    scenario.driver("there", "0.5").await?.pod()?;
    assert!(run(&scenario, &["status", "there"]).await?.success()?.contains("there"));
    assert!(run(&scenario, &["status", "there-driver"]).await?.success()?.contains("there"));
    for (arguments, texts) in [
        (["status", "nowhere"], ["no live job \"nowhere\" in namespace", "accepted: a job's id"]),
        (["explain", "nowhere"], ["no pod \"nowhere\" in namespace", "--namespace"]),
    ] {
        let Output { code, out, err } = run(&scenario, &arguments).await?;
        assert_eq!((code, out.as_str()), (Some(1), ""));
        assert!(texts.iter().all(|text| err.contains(text)), "{err}");
    }
    let missing = plugin::run("/nowhere".as_ref(), &["status"]).await?;
    assert_eq!(missing.code, Some(1));
    assert!(missing.err.contains("accepted: --kubeconfig"), "{}", missing.err);
    Ok(())
}

#[tokio::test]
async fn a_job_to_which_spot_is_closed_is_shown_as_that() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler, Plugin);
    let mut scenario = Scenario::bare(Plane::shared().await?, "closed").await?;
    // Executors without a spot node wait, because the reconciler has no right to replace them.
    scenario.serve(1, &strict()).await?;
    nodes::of_pool(&scenario.client, "pool-closed", "on-demand").await?;
    let driver = pods::driver("etl").annotation(RATIO, "1").annotation("workload/spot-fallback-seconds", "3");
    scenario.post(&driver).await?.pod()?;
    scenario.post(&pods::executor("etl", 1).on_pool("pool-closed")).await?.pod()?;
    until_warned(&scenario, "etl-driver", ("SpotClosed", &["on-demand"]), SOON).await?;
    // A pod's creation is known to the second, so the first ones may be too early for a certain answer.
    let ids = AtomicU32::new(2);
    until_true(SOON, "an executor that was surely created after spot was closed", async || {
        let id = ids.fetch_add(1, Ordering::Relaxed);
        let name = format!("etl-exec-{id}");
        scenario.post(&pods::executor("etl", id).on_pool("pool-closed")).await?.pod()?;
        until_bound(&scenario.pods(), &name).await?;
        let text = run(&scenario, &["explain", &name]).await?.success()?;
        let texts = ["SpotClosed", "Spot opens by itself", "went to on-demand whatever the ratio is"];
        Ok(texts.iter().all(|expected| text.contains(expected)))
    })
    .await?;

    let jobs = status(&scenario).await?;
    let state = jobs.get("etl").and_then(|row| row.get("SPOT STATE")).context("no state")?;
    assert!(state.starts_with("closed for "), "{state}");
    ensure_explained(&scenario, "etl-exec-1", &["Pending for", "If it finds no spot for 3 s, it is replaced"]).await?;
    let json = run(&scenario, &["status", "-o", "json"]).await?.json()?;
    let job = json.pointer("/jobs/0").context("no job")?;
    assert_eq!(job.pointer("/spotState"), Some(&"closed".into()), "{json:#}");
    Ok(())
}

#[tokio::test]
async fn a_user_who_may_only_read_pods_of_one_namespace_gets_what_pods_tell() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler, Plugin);
    let scenario = scenario("reader").await?;
    scenario.driver("etl", "0.5").await?.pod()?;
    scenario.executors("etl", 1..=4, 1).await?;
    scenario.until_bound("etl").await?;
    let reader = Account::new(&scenario.plane, &scenario.namespace, "reader").await?;
    let denied = plugin::run(&reader.kubeconfig, &["status"]).await?;
    assert_eq!(denied.code, Some(1));
    assert!(denied.err.contains("cannot list the pods of namespace"), "{}", denied.err);
    reader.allow(&scenario.plane, &scenario.namespace, PODS).await?;

    let Output { code, out, err } = plugin::run(&reader.kubeconfig, &["status", "-o", "wide"]).await?;
    assert_eq!(code, Some(0), "{err}");
    let rows = plugin::rows(&out)?;
    let [row] = rows.as_slice() else { anyhow::bail!("not one job: {out}") };
    let cells = ["RATIO", "SPOT", "ON-DEMAND", "PENDING", "DISTANCE", "LARGEST POOL", "SPOT STATE"];
    let printed = cells.map(|cell| row.get(cell).map_or("", String::as_str));
    assert_eq!(printed, ["50%", "2", "2", "0", "0", "unknown", "unknown"]);
    assert_eq!(err.lines().count(), 1, "{err}");
    assert!(["nodes", "Events", "Deployment"].iter().all(|missing| err.contains(missing)), "{err}");

    let explained = plugin::run(&reader.kubeconfig, &["explain", "etl-exec-1"]).await?;
    assert!(explained.out.contains("To spot: the webhook wrote the annotation"), "{explained:?}");
    assert!(explained.out.contains("(whose capacity may not be read)"), "{explained:?}");
    let everywhere = plugin::run(&reader.kubeconfig, &["status", "-A"]).await?;
    assert_eq!(everywhere.code, Some(1));
    assert!(everywhere.err.contains("with --namespace one is enough"), "{}", everywhere.err);
    Ok(())
}

#[tokio::test]
async fn a_watched_status_is_printed_again_only_when_something_has_changed() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Plugin);
    let scenario = Scenario::start("watch", 1, strict()).await?;
    scenario.driver("etl", "0").await?.pod()?;
    let arguments = ["status", "--watch", "--namespace", &scenario.namespace];
    let mut watch = Watch::start(scenario.plane.kubeconfig(), &arguments)?;
    let mut table = async || Ok::<_, anyhow::Error>(format!("{}\n{}", watch.line().await?, watch.line().await?));
    let pending = |table: &str| Ok::<_, anyhow::Error>(plugin::rows(table)?[0]["ON-DEMAND"].clone());
    assert_eq!(pending(&table().await?)?, "0");
    scenario.executor("etl", 1).await?;
    scenario.until_bound("etl").await?;
    // It may have been printed while the executor was pending.
    let mut printed = 1;
    while pending(&table().await?)? != "1" {
        printed += 1;
        ensure!(printed <= 3, "more is printed than has changed");
    }
    Ok(())
}
