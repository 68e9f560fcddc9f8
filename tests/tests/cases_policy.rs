//! Which policy applies, whoever creates the executors, and what a submitter learns when a policy has no effect.

#![allow(clippy::indexing_slicing, reason = "JSON is read by index; a panic here fails a test, as it should")]

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use balancer_tests::control_plane::Plane;
use balancer_tests::events::{until_warned, warnings};
use balancer_tests::nodes::{self, CAPACITY};
use balancer_tests::other_webhook::{Behaviour, By, OtherWebhook};
use balancer_tests::platforms::Shape;
use balancer_tests::pods::{self, PodBuilder, annotate, connect_server, driver, executor, plain};
use balancer_tests::registration::Registration;
use balancer_tests::scenario::{Counts, REPAIRED, Scenario, placed, selected, strict};
use balancer_tests::scheduling::{is_unschedulable, node_of, until_bound};
use balancer_tests::setup::Setup;
use balancer_tests::wait::{SOON, until_true};
use balancer_tests::webhook::WebhookOptions;
use balancer_tests::{in_each_setup, need};
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::ResourceExt;
use kube::api::Api;
use serde_json::{Value, json};

const JOB: &str = "etl";
const RATIO: &str = "workload/spot-ratio";
const BASE: &str = "workload/on-demand-base";
const DECISION: &str = "workload/capacity-type";
/// Whatever a policy is changed by, it applies within this.
const FOLLOWED: Duration = Duration::from_secs(10);
/// How long an executor is unschedulable before the submitter is told, and the time to find that out.
const STUCK: Duration = Duration::from_secs(90);

in_each_setup! {
    a_connect_server_sets_the_policy_of_its_jobs
    a_notebook_sets_the_policy_of_its_job
    only_the_pod_that_owns_an_executor_sets_its_policy
    a_driver_goes_before_the_owner_and_the_executor_before_both
    a_job_that_opts_out_is_left_unchanged_and_not_counted
    a_job_opts_out_and_in_while_it_runs
    without_a_default_only_jobs_with_a_ratio_are_placed
    two_live_drivers_with_one_id_are_two_jobs
    drivers_with_generated_names_keep_their_ratios_apart
}

/// A namespace that is served with these settings, STRICT unless they say otherwise.
async fn start(setup: Setup, purpose: &str, settings: &[(&str, &str)]) -> Result<Scenario> {
    let mut scenario = Scenario::bare(Plane::shared().await?, purpose).await?;
    setup.serve(&mut scenario, &with(settings)).await?;
    Ok(scenario)
}

fn with(settings: &[(&str, &str)]) -> WebhookOptions {
    settings.iter().fold(strict(), |options, (name, value)| options.env(name, value))
}

fn counts(spot: usize, on_demand: usize) -> Counts {
    Counts { spot, on_demand }
}

/// An executor that this pod owns.
fn owned(job: &str, id: u32, owner: &Pod) -> PodBuilder {
    executor(job, id).owned_by(&owner.name_any(), &owner.uid().unwrap_or_default())
}

async fn post(scenario: &Scenario, pod: &PodBuilder) -> Result<Pod> {
    scenario.post(pod).await?.pod()
}

/// Makes executors that a pod owns, one after the other, and returns what they were placed on.
async fn place(scenario: &Scenario, job: &str, ids: std::ops::RangeInclusive<u32>, owner: &Pod) -> Result<Vec<String>> {
    let mut all = Vec::new();
    for id in ids {
        all.push(placed(&post(scenario, &owned(job, id, owner)).await?)?);
    }
    Ok(all)
}

/// What the next executor of a job would be placed on; `None` if it would be left alone.
async fn next(scenario: &Scenario, pod: &PodBuilder) -> Result<Option<String>> {
    let pod = pod.dry_run(&scenario.client, &scenario.namespace).await?.pod()?;
    Ok(pod.annotations().get(DECISION).cloned())
}

async fn until_next(scenario: &Scenario, pod: &PodBuilder, right: Option<&str>) -> Result<()> {
    let mut last = None;
    let followed = until_true(FOLLOWED, "the change to be followed", async || {
        last = next(scenario, pod).await?;
        Ok(last.as_deref() == right)
    });
    followed.await.with_context(|| format!("the next is placed on {last:?}, not on {right:?}"))
}

/// Fails unless the ledger comes to these counts, and matches what lives.
async fn ensure_settles(setup: Setup, scenario: &Scenario, job: &str, right: Counts) -> Result<()> {
    scenario.until_bound(job).await?;
    if let Some(settled) = setup.settled(scenario, job).await? {
        ensure!(settled == right, "the ledger of {job} comes to {settled:?}, not {right:?}");
    }
    Ok(())
}

async fn a_connect_server_sets_the_policy_of_its_jobs(setup: Setup) -> Result<()> {
    let scenario = start(setup, "connect", &[]).await?;
    let server = post(&scenario, &connect_server("connect").annotation(RATIO, "0")).await?;
    // Two applications of one server.
    for job in ["first", "second"] {
        assert_eq!(place(&scenario, job, 1..=4, &server).await?, ["on-demand"; 4], "{job}");
        ensure_settles(setup, &scenario, job, counts(0, 4)).await?;
        if setup != Setup::Memory {
            assert_eq!(scenario.policy(job).await?.0.as_deref(), Some("0"));
        }
    }
    // Another server of the namespace is asked for its own jobs.
    let other = post(&scenario, &connect_server("other").annotation(RATIO, "1").annotation(BASE, "1")).await?;
    assert_eq!(place(&scenario, "third", 1..=3, &other).await?, ["on-demand", "spot", "spot"]);
    ensure_settles(setup, &scenario, "third", counts(2, 1)).await?;

    annotate(&scenario.pods(), "connect", RATIO, Some("1")).await?;
    for job in ["first", "second"] {
        until_next(&scenario, &owned(job, 5, &server), Some("spot")).await.context("an edited server")?;
        assert_eq!(place(&scenario, job, 5..=8, &server).await?, ["spot"; 4], "{job}");
        ensure_settles(setup, &scenario, job, counts(4, 4)).await?;
    }
    Ok(())
}

async fn a_notebook_sets_the_policy_of_its_job(setup: Setup) -> Result<()> {
    let scenario = start(setup, "notebook", &[]).await?;
    let safe = post(&scenario, &plain("notebook").annotation(RATIO, "0").annotation(BASE, "2")).await?;
    let based = post(&scenario, &plain("airflow-worker").annotation(RATIO, "1").annotation(BASE, "2")).await?;
    assert_eq!(place(&scenario, "safe", 1..=4, &safe).await?, ["on-demand"; 4]);
    assert_eq!(place(&scenario, "based", 1..=4, &based).await?, ["on-demand", "on-demand", "spot", "spot"]);
    ensure_settles(setup, &scenario, "safe", counts(0, 4)).await?;
    ensure_settles(setup, &scenario, "based", counts(2, 2)).await?;
    if setup != Setup::Memory {
        // It is asked again where the ledger is lost.
        scenario.redis.flush().await?;
        scenario.until_ledger_matches_pods("safe", SOON).await?;
        assert_eq!(place(&scenario, "safe", 5..=6, &safe).await?, ["on-demand"; 2]);
        scenario.until_ledger_matches_pods("based", SOON).await?;
        assert_eq!(place(&scenario, "based", 5..=6, &based).await?, ["spot"; 2]);
        assert_eq!(scenario.policy("based").await?, (Some("1".to_owned()), Some("2".to_owned())));
    }
    // A pod that says nothing leaves the default, and one that says nonsense too.
    for (job, owner) in [("silent", plain("silent")), ("nonsense", plain("nonsense").annotation(RATIO, "lots"))] {
        let owner = post(&scenario, &owner).await?;
        let mut placed = place(&scenario, job, 1..=4, &owner).await?;
        placed.sort();
        assert_eq!(placed, ["on-demand", "on-demand", "spot", "spot"], "{job}");
    }
    Ok(())
}

async fn only_the_pod_that_owns_an_executor_sets_its_policy(setup: Setup) -> Result<()> {
    let scenario = start(setup, "owner", &[]).await?;
    let notebook = post(&scenario, &plain("notebook").annotation(RATIO, "0")).await?;
    let uid = notebook.uid().context("no uid")?;
    let owner = |change: &dyn Fn(&mut Value)| {
        let owned = |id| {
            executor("x", id).owned_by("notebook", &uid).with(|pod| change(&mut pod["metadata"]["ownerReferences"]))
        };
        (1..=2).map(owned).collect::<Vec<_>>()
    };
    // One that had the name before, other kinds of owners, and owners that do not control it.
    let others = [
        ("another-uid", owner(&|owners| owners[0]["uid"] = "00000000-0000-4000-8000-000000000000".into())),
        ("gone", owner(&|owners| owners[0]["name"] = "gone".into())),
        (
            "stateful",
            owner(&|owners| {
                owners[0]["kind"] = "StatefulSet".into();
                owners[0]["apiVersion"] = "apps/v1".into();
            }),
        ),
        ("no-controller", owner(&|owners| owners[0]["controller"] = false.into())),
        ("nobody", owner(&|owners| *owners = json!([]))),
    ];
    for (job, pods) in others {
        let mut on = Vec::new();
        for (pod, id) in pods.into_iter().zip(1..) {
            let pod = pod.with(|pod| pod["metadata"]["labels"][pods::JOB_ID_LABEL] = job.into());
            on.push(placed(&post(&scenario, &pod.named(&format!("{job}-exec-{id}"))).await?)?);
        }
        on.sort();
        // The default.
        assert_eq!(on, ["on-demand", "spot"], "{job}");
    }
    // Of several owners the controller counts.
    let mut on = Vec::new();
    for id in 1..=2 {
        let pod = owned("several", id, &notebook).with(|pod| {
            let mut owners = vec![json!({
                "apiVersion": "v1", "kind": "ConfigMap", "name": "notebook", "uid": "00000000-0000-4000-8000-000000000001",
            })];
            owners.extend(pod["metadata"]["ownerReferences"].as_array().cloned().unwrap_or_default());
            pod["metadata"]["ownerReferences"] = json!(owners);
        });
        on.push(placed(&post(&scenario, &pod).await?)?);
    }
    assert_eq!(on, ["on-demand"; 2]);
    Ok(())
}

async fn a_driver_goes_before_the_owner_and_the_executor_before_both(setup: Setup) -> Result<()> {
    let scenario = start(setup, "before", &[]).await?;
    let notebook = post(&scenario, &plain("notebook").annotation(RATIO, "0")).await?;
    scenario.driver(JOB, "1").await?.pod()?;
    assert_eq!(place(&scenario, JOB, 1..=3, &notebook).await?, ["spot"; 3]);
    for id in 4..=5 {
        let pod = owned(JOB, id, &notebook).annotation(RATIO, "0");
        assert_eq!(placed(&post(&scenario, &pod).await?)?, "on-demand");
        let pod = owned("other", id, &notebook).annotation(RATIO, "1");
        assert_eq!(placed(&post(&scenario, &pod).await?)?, "spot");
    }
    if setup != Setup::Memory {
        // Another pod than the driver owns them, so they are a job of their own.
        until_ledger(&scenario, &format!("{JOB}/notebook"), counts(3, 2)).await?;
    }
    Ok(())
}

/// Nodes that nobody has labelled with a capacity.
const GPU: Shape = Shape { name: "gpu", capacity: "unknown", labels: &[("gpu", "yes")], taint: None };

async fn make_gpu_node(scenario: &Scenario) -> Result<()> {
    let (pool, name) = (&scenario.namespace, format!("{}-gpu", scenario.namespace));
    nodes::of_platform(&scenario.client, (pool, &name), &GPU, &[], 500).await
}

/// Fails unless a pod is as it was posted.
fn ensure_left_alone(posted: &PodBuilder, made: &Pod) -> Result<()> {
    let (own, made) = (posted.value(), serde_json::to_value(made)?);
    for field in ["nodeSelector", "affinity"] {
        ensure!(own["spec"][field] == made["spec"][field], "{field}: {}", made["spec"]);
    }
    let annotations = |pod: &Value| pod["metadata"]["annotations"].clone();
    ensure!(annotations(own) == annotations(&made), "{}", annotations(&made));
    Ok(())
}

/// Waits until the reconciler has seen every pod that there is: another job, which came after them, has its uids.
async fn until_all_is_seen(setup: Setup, scenario: &Scenario) -> Result<()> {
    if setup != Setup::Memory {
        let id = scenario.fresh_ids().next().context("no id")?;
        let job = format!("later-{id}");
        scenario.driver(&job, "1").await?.pod()?;
        scenario.executor(&job, id).await?;
        scenario.until_uids_recorded(&job).await?;
    }
    Ok(())
}

async fn a_job_that_opts_out_is_left_unchanged_and_not_counted(setup: Setup) -> Result<()> {
    let scenario = start(setup, "off", &[]).await?;
    make_gpu_node(&scenario).await?;
    let notebook = post(&scenario, &plain("notebook").annotation(RATIO, "off")).await?;
    let posted = scenario.driver("gpu", "off").await?;
    ensure!(posted.warnings.is_empty(), "{:?}", posted.warnings);
    let of_driver = posted.pod()?;
    for (job, owner) in [("gpu", &of_driver), ("gpu-notebook", &notebook)] {
        for id in 1..=4 {
            let pod = owned(job, id, owner).on_pool(&scenario.namespace).node_selector("gpu", "yes");
            let posted = scenario.post(&pod).await?;
            ensure!(posted.warnings.is_empty(), "{:?}", posted.warnings);
            ensure_left_alone(&pod, &posted.pod()?)?;
        }
        for id in 1..=4 {
            until_bound(&scenario.pods(), &format!("{job}-exec-{id}")).await?;
        }
        until_all_is_seen(setup, &scenario).await?;
        if let Some(entries) = setup.entries(&scenario, job).await? {
            ensure!(entries.is_empty() && scenario.ledger(job).await? == counts(0, 0), "{job}: {entries:?}");
        }
        // One that says more than its job is placed, and counted.
        let own = placed(&post(&scenario, &owned(job, 5, owner).annotation(RATIO, "1")).await?)?;
        assert_eq!(own, "spot", "{job}");
        until_all_is_seen(setup, &scenario).await?;
        if let Some(entries) = setup.entries(&scenario, job).await? {
            let own = [(format!("{job}-exec-5"), "spot".to_owned())];
            assert_eq!(entries, own.into_iter().collect(), "{job}");
        }
    }

    // The other way round, of a job that is placed one executor opts out.
    scenario.driver(JOB, "1").await?.pod()?;
    for id in 1..=6 {
        let pod = executor(JOB, id);
        if id % 3 == 0 {
            let pod = pod.annotation(RATIO, "off").on_pool(&scenario.namespace);
            ensure_left_alone(&pod, &post(&scenario, &pod).await?)?;
        } else {
            assert_eq!(placed(&post(&scenario, &pod).await?)?, "spot");
        }
    }
    scenario.until_bound(JOB).await?;
    until_all_is_seen(setup, &scenario).await?;
    if let Some(entries) = setup.entries(&scenario, JOB).await? {
        let names: Vec<&str> = entries.keys().map(String::as_str).collect();
        assert_eq!(names, ["etl-exec-1", "etl-exec-2", "etl-exec-4", "etl-exec-5"]);
        assert_eq!(scenario.ledger(JOB).await?, counts(4, 0));
    }
    Ok(())
}

async fn a_job_opts_out_and_in_while_it_runs(setup: Setup) -> Result<()> {
    let scenario = start(setup, "off-later", &[]).await?;
    let driver = scenario.driver(JOB, "1").await?.pod()?;
    assert_eq!(place(&scenario, JOB, 1..=3, &driver).await?, ["spot"; 3]);
    annotate(&scenario.pods(), &driver.name_any(), RATIO, Some("off")).await?;
    until_next(&scenario, &owned(JOB, 4, &driver), None).await?;
    let pod = owned(JOB, 4, &driver);
    ensure_left_alone(&pod, &post(&scenario, &pod).await?)?;
    // What was placed is counted until it ends.
    pods::remove(&scenario.pods(), "etl-exec-1").await?;
    until_all_is_seen(setup, &scenario).await?;
    if let Some(entries) = setup.entries(&scenario, JOB).await? {
        let names: Vec<&str> = entries.keys().map(String::as_str).collect();
        assert_eq!(names, ["etl-exec-2", "etl-exec-3"]);
    }
    annotate(&scenario.pods(), &driver.name_any(), RATIO, Some("0")).await?;
    until_next(&scenario, &owned(JOB, 5, &driver), Some("on-demand")).await?;
    assert_eq!(place(&scenario, JOB, 5..=6, &driver).await?, ["on-demand"; 2]);
    Ok(())
}

async fn without_a_default_only_jobs_with_a_ratio_are_placed(setup: Setup) -> Result<()> {
    let scenario = start(setup, "none", &[("DEFAULT_SPOT_RATIO", "none")]).await?;
    let silent = post(&scenario, &driver("silent")).await?;
    let server = post(&scenario, &connect_server("connect")).await?;
    for (job, owner) in [("silent", Some(&silent)), ("connect-job", Some(&server)), ("nobody", None)] {
        for id in 1..=3 {
            let pod = match owner {
                Some(owner) => owned(job, id, owner),
                None => executor(job, id),
            };
            ensure_left_alone(&pod, &post(&scenario, &pod).await?).with_context(|| job.to_owned())?;
        }
        until_all_is_seen(setup, &scenario).await?;
        if let Some(entries) = setup.entries(&scenario, job).await? {
            ensure!(entries.is_empty(), "{job}: {entries:?}");
        }
    }
    scenario.driver(JOB, "0.5").await?.pod()?;
    scenario.executors(JOB, 1..=4, 1).await?;
    assert_eq!(scenario.counts(JOB).await?, counts(2, 2));
    ensure_settles(setup, &scenario, JOB, counts(2, 2)).await?;
    // The reconciler says the same as the webhooks.
    let notebook = post(&scenario, &plain("notebook").annotation(RATIO, "1")).await?;
    assert_eq!(place(&scenario, "owned", 1..=3, &notebook).await?, ["spot"; 3]);
    ensure_settles(setup, &scenario, "owned", counts(3, 0)).await
}

/// What the four executors of each driver come to, and then one of the two ends.
async fn two_live_drivers_with_one_id_are_two_jobs(setup: Setup) -> Result<()> {
    let cases = [
        // The older one's name and ratio, the younger one's, and which ends.
        ("first", "0", "second", "1", "first"),
        ("second", "1", "first", "0", "second"),
        ("first", "1", "second", "0", "second"),
    ];
    for (number, (older, of_older, younger, of_younger, ends)) in cases.into_iter().enumerate() {
        let what = format!("{older} at {of_older}, {younger} at {of_younger}, {ends} ends");
        ensure_two_jobs(setup, &format!("twice-{number}"), (older, of_older), (younger, of_younger), ends)
            .await
            .context(what)?;
    }
    Ok(())
}

async fn ensure_two_jobs(
    setup: Setup,
    purpose: &str,
    (older, of_older): (&str, &str),
    (younger, of_younger): (&str, &str),
    ends: &str,
) -> Result<()> {
    let scenario = start(setup, purpose, &[]).await?;
    let attempt = |name: &str, ratio: &str| driver(JOB).named(name).annotation(RATIO, ratio);
    let first = post(&scenario, &attempt(older, of_older)).await?;
    // Creation times are whole seconds, and of two drivers with one time the name decides.
    let second = attempt(younger, of_younger);
    until_true(SOON, "another second to begin", async || {
        let probe = second.dry_run(&scenario.client, &scenario.namespace).await?.pod()?;
        Ok(probe.creation_timestamp() > first.creation_timestamp())
    })
    .await?;
    let second = post(&scenario, &second).await?;
    let word = |ratio: &str| if ratio == "1" { "spot" } else { "on-demand" };
    let total = |ratio: &str, count| if ratio == "1" { counts(count, 0) } else { counts(0, count) };
    for id in 1..=4 {
        assert_eq!(place(&scenario, JOB, id..=id, &first).await?, [word(of_older)], "executor {id} of {older}");
        let id = id + 4;
        assert_eq!(place(&scenario, JOB, id..=id, &second).await?, [word(of_younger)], "executor {id} of {younger}");
    }
    scenario.until_bound(JOB).await?;
    let redis = setup != Setup::Memory;
    let other = format!("{JOB}/{younger}");
    if redis {
        until_ledger(&scenario, JOB, total(of_older, 4)).await?;
        until_ledger(&scenario, &other, total(of_younger, 4)).await?;
    }

    // One ends, with its executors.
    let (gone, stays, ratio, ids) =
        if ends == older { (&first, &second, of_younger, 1..=4) } else { (&second, &first, of_older, 5..=8) };
    pods::remove(&scenario.pods(), &gone.name_any()).await?;
    for id in ids {
        pods::remove(&scenario.pods(), &format!("{JOB}-exec-{id}")).await?;
    }
    assert_eq!(place(&scenario, JOB, 9..=12, stays).await?, [word(ratio); 4], "after the end of {ends}");
    if redis {
        until_ledger(&scenario, JOB, total(ratio, 8)).await.context("the one that stays")?;
        until_ledger(&scenario, &other, counts(0, 0)).await.context("the one that ended")?;
        until_true(SOON, "the policy of the one that stays", async || {
            Ok(scenario.policy(JOB).await?.0.as_deref() == Some(ratio))
        })
        .await?;
    }
    assert_eq!(place(&scenario, JOB, 13..=14, stays).await?, [word(ratio); 2]);
    Ok(())
}

/// The apiserver generates their names after their admissions.
async fn drivers_with_generated_names_keep_their_ratios_apart(setup: Setup) -> Result<()> {
    let scenario = start(setup, "generated", &[]).await?;
    let attempt = |ratio: &str| driver(JOB).generate_name("etl-").annotation(RATIO, ratio);
    let safe = post(&scenario, &attempt("0")).await?;
    let cheap = post(&scenario, &attempt("1")).await?;
    for id in 1..=4 {
        assert_eq!(place(&scenario, JOB, id..=id, &safe).await?, ["on-demand"], "{id}");
        assert_eq!(place(&scenario, JOB, id + 4..=id + 4, &cheap).await?, ["spot"], "{id}");
    }
    Ok(())
}

async fn until_ledger(scenario: &Scenario, job: &str, right: Counts) -> Result<()> {
    let (mut last, what) = (None, format!("the ledger of {job}"));
    let settled = until_true(FOLLOWED, &what, async || {
        let (counts, entries) = (scenario.ledger(job).await?, scenario.entries(job).await?.len());
        last = Some((counts, entries));
        Ok(counts == right && entries == right.spot + right.on_demand)
    });
    settled.await.with_context(|| format!("it counts and names {last:?}, not {right:?}"))
}

/// For the tests that look at what one webhook and one reconciler do.
const ONE: Setup = Setup::Redis { webhooks: 1 };

#[tokio::test]
async fn a_submitter_is_told_that_a_ratio_has_no_effect() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler);
    let scenario = start(ONE, "no-effect", &[]).await?;
    let driver = scenario.driver(JOB, "0.7").await?.pod()?;
    for id in 1..=4 {
        post(&scenario, &owned(JOB, id, &driver).node_selector(CAPACITY, "spot")).await?;
    }
    // What the executor states itself is in the reply.
    let contradicts_itself = executor("other", 1).node_selector(CAPACITY, "spot").annotation(RATIO, "0.7");
    let warned = scenario.post(&contradicts_itself).await?.warnings;
    ensure!(warned.iter().any(|warning| warning.contains(RATIO) && warning.contains(CAPACITY)), "{warned:?}");
    let told = async || {
        let all = warnings(&scenario, &driver.name_any()).await?;
        Ok(all.into_iter().any(|(_, note)| note.contains(RATIO) && note.contains("0.7")))
    };
    until_true(SOON, "the Event on the driver", told).await?;
    Ok(())
}

/// Nobody is told of a problem that is none.
#[tokio::test]
async fn nobody_is_told_while_a_ratio_takes_effect() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler);
    let scenario = start(ONE, "effect", &[]).await?;
    // What the template chooses is what the ratio asks for.
    for (job, ratio, capacity) in [("cheap", "1", "spot"), ("safe", "0", "on-demand")] {
        let driver = scenario.driver(job, ratio).await?.pod()?;
        for id in 1..=3 {
            let posted = scenario.post(&owned(job, id, &driver).node_selector(CAPACITY, capacity)).await?;
            ensure!(posted.warnings.is_empty(), "{:?}", posted.warnings);
        }
        scenario.until_bound(job).await?;
        until_all_is_seen(ONE, &scenario).await?;
        assert_eq!(warnings(&scenario, &driver.name_any()).await?, []);
    }
    // Some of a job's executors choose themselves, and the others make up for it.
    let driver = scenario.driver(JOB, "0.5").await?.pod()?;
    for id in 1..=4 {
        let pod = owned(JOB, id, &driver);
        scenario.post(&if id % 2 == 0 { pod.node_selector(CAPACITY, "spot") } else { pod }).await?.pod()?;
    }
    scenario.until_ledger_matches_pods(JOB, REPAIRED).await?.ensure_near(0.5, 1.0)?;
    assert_eq!(warnings(&scenario, &driver.name_any()).await?, []);
    Ok(())
}

#[tokio::test]
async fn a_submitter_is_told_which_selectors_exclude_each_other() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler);
    let scenario = start(ONE, "impossible", &[]).await?;
    let pool = scenario.namespace.clone();
    nodes::of_pool(&scenario.client, &pool, "spot").await?;
    let driver = scenario.driver(JOB, "0.5").await?.pod()?;
    // A job whose template selects the same, and that finds room.
    let fine = scenario.driver("fine", "1").await?.pod()?;
    for id in 1..=4 {
        post(&scenario, &owned(JOB, id, &driver).on_pool(&pool)).await?;
        post(&scenario, &owned("fine", id, &fine).on_pool(&pool)).await?;
    }
    until_true(SOON, "half of the job to wait", async || {
        let pods = scenario.live(JOB).await?;
        Ok(pods.iter().filter(|pod| is_unschedulable(pod)).count() == 2)
    })
    .await?;
    until_true(STUCK, "the gauge", async || {
        Ok(scenario.reconcilers[0].metrics().await?.sum("spot_balancer_unschedulable_executors", &[]) == Some(2.0))
    })
    .await?;
    let selectors = [format!("pool in ({pool})"), format!("{CAPACITY} in (on-demand)")];
    let selectors = [selectors[0].as_str(), selectors[1].as_str()];
    until_warned(&scenario, &driver.name_any(), ("ExecutorsUnschedulable", &selectors), STUCK).await?;
    assert_eq!(warnings(&scenario, &fine.name_any()).await?, []);

    // Once there are such nodes, nobody waits any more.
    nodes::of_pool(&scenario.client, &pool, "on-demand").await?;
    scenario.until_bound(JOB).await?;
    until_true(SOON, "the gauge to fall", async || {
        Ok(scenario.reconcilers[0].metrics().await?.sum("spot_balancer_unschedulable_executors", &[]) == Some(0.0))
    })
    .await
}

/// A scenario whose webhook is called again after a later one, which requires a capacity.
async fn followed_by(
    purpose: &str,
    settings: &[(&str, &str)],
    behaviour: Behaviour,
) -> Result<(Scenario, OtherWebhook)> {
    let scenario = start(ONE, purpose, settings).await?;
    let registration = Registration { again: true, ..scenario.registration() };
    registration.apply(&scenario.plane).await?;
    let other = OtherWebhook::start(&scenario, behaviour).await?;
    Ok((scenario, other))
}

#[tokio::test]
async fn a_later_webhook_that_requires_the_other_capacity_wins() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler);
    let effort = [("SPOT_PREFERENCE", "BEST_EFFORT")];
    let reserved = [("ON_DEMAND_VALUES", "on-demand,reserved")];
    let none: &[(&str, &str)] = &[];
    let cases = [
        ("on-demand-by-affinity", none, By::Affinity, "on-demand"),
        ("spot-by-affinity", none, By::Affinity, "spot"),
        ("on-demand-by-selector", none, By::Selector, "on-demand"),
        ("spot-by-selector", none, By::Selector, "spot"),
        ("effort-on-demand", &effort[..], By::Affinity, "on-demand"),
        ("effort-spot", &effort[..], By::Affinity, "spot"),
        ("lists-spot", &reserved[..], By::Affinity, "spot"),
    ];
    let running = cases.into_iter().map(async |(purpose, settings, by, capacity)| {
        ensure_gives_way(purpose, settings, by, capacity).await.with_context(|| purpose.to_owned())
    });
    futures::future::try_join_all(running).await?;
    Ok(())
}

async fn ensure_gives_way(purpose: &str, settings: &[(&str, &str)], by: By, capacity: &'static str) -> Result<()> {
    let (scenario, _other) = followed_by(purpose, settings, Behaviour::Requires(by, CAPACITY, capacity)).await?;
    let right = if capacity == "spot" { counts(4, 0) } else { counts(0, 4) };
    // What we decide contradicts it, agrees with it, or does half of the time.
    for (job, ratio) in [("against", if capacity == "spot" { "0" } else { "1" }), ("half", "0.5"), ("with", "0.5")] {
        let ratio = match job {
            "with" if capacity == "spot" => "1",
            "with" => "0",
            _ => ratio,
        };
        scenario.driver(job, ratio).await?.pod()?;
        for id in 1..=4 {
            let pod = executor(job, id);
            // With a term of its own, which stays.
            let own = json!([{"matchExpressions": [{"key": "spark-role", "operator": "Exists"}]}]);
            let pod = if id % 2 == 0 { pod.node_terms(&own) } else { pod };
            let made = post(&scenario, &pod).await?;
            let text = serde_json::to_value(&made.spec)?.to_string();
            ensure!(id % 2 == 1 || text.contains("Exists"), "the pod's own term is gone: {text}");
            let other = if capacity == "spot" { "on-demand" } else { "spot" };
            ensure!(selected(&made) != Some(other), "{job} {id}: ours stays: {text}");
            ensure!(!text.contains("NotIn") && !text.contains("reserved"), "{job} {id}: ours stays: {text}");
        }
        scenario.until_bound(job).await.with_context(|| format!("{job} at {ratio}"))?;
        let settled = scenario.until_ledger_matches_pods(job, REPAIRED).await?;
        ensure!(settled == right, "{job} at {ratio} comes to {settled:?}");
        for pod in scenario.live(job).await? {
            let node = Api::<Node>::all(scenario.client.clone()).get(node_of(&pod).context("not bound")?).await?;
            ensure!(
                node.labels().get(CAPACITY).map(String::as_str) == Some(capacity),
                "{} is elsewhere",
                pod.name_any()
            );
        }
    }
    Ok(())
}

/// A driver that is posted as it is, and as the webhook leaves it.
async fn driven(scenario: &Scenario, pod: PodBuilder) -> Result<Pod> {
    let posted = scenario.post(&pod).await?;
    ensure!(posted.warnings.is_empty(), "{:?}", posted.warnings);
    posted.pod()
}

#[tokio::test]
async fn drivers_run_on_demand_if_that_is_set_and_they_do_not_choose() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler);
    for preference in ["STRICT", "BEST_EFFORT"] {
        let settings = [("DRIVER_CAPACITY", "on-demand"), ("SPOT_PREFERENCE", preference)];
        let scenario = start(ONE, "drivers", &settings).await?;
        // A driver's nodes are not those of executors.
        for (name, pod) in [("one-driver", driver("one").annotation(RATIO, "1")), ("server", connect_server("server"))]
        {
            let made = driven(&scenario, pod).await?;
            let selector = made.spec.clone().and_then(|spec| spec.node_selector).unwrap_or_default();
            assert_eq!(serde_json::to_value(selector)?, json!({CAPACITY: "on-demand"}), "{name}");
            let node = until_bound(&scenario.pods(), name).await?;
            ensure!(node.starts_with("on-demand"), "{name} is on {node}");
        }
        // Those that choose, by any platform's label.
        let terms = json!([{"matchExpressions": [{"key": CAPACITY, "operator": "NotIn", "values": ["on-demand"]}]}]);
        for (name, pod) in [
            ("by-selector", driver("a").node_selector(CAPACITY, "spot")),
            ("by-affinity", driver("b").node_terms(&terms)),
            ("by-eks", driver("c").node_selector("eks.amazonaws.com/capacityType", "SPOT")),
        ] {
            let pod = pod.named(name);
            ensure_left_alone(&pod, &driven(&scenario, pod.clone()).await?)?;
        }
        // One that opted out is not touched.
        let pod = driver("off").annotation(RATIO, "off");
        ensure_left_alone(&pod, &driven(&scenario, pod.clone()).await?)?;
        // What it chooses otherwise stays.
        let pod = driver("zone").node_selector("kubernetes.io/hostname", "on-demand-1");
        driven(&scenario, pod).await?;
        assert_eq!(until_bound(&scenario.pods(), "zone-driver").await?, "on-demand-1");
        // Executors follow their ratio.
        assert_eq!(scenario.executor("one", 1).await?, "spot");
    }
    Ok(())
}

#[tokio::test]
async fn drivers_of_unlabelled_on_demand_nodes_are_kept_from_spot() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler);
    let settings = [("DRIVER_CAPACITY", "on-demand"), ("CAPACITY_PROFILE", "aks")];
    let scenario = start(ONE, "drivers-aks", &settings).await?;
    let made = driven(&scenario, driver(JOB)).await?;
    let required = &serde_json::to_value(&made.spec)?["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
        ["nodeSelectorTerms"];
    let text = required.to_string();
    ensure!(text.contains("kubernetes.azure.com/scalesetpriority") && text.contains("NotIn"), "{text}");
    let tolerations = serde_json::to_value(&made.spec)?["tolerations"].to_string();
    ensure!(!tolerations.contains("kubernetes.azure.com"), "{tolerations}");
    Ok(())
}

#[tokio::test]
async fn protected_drivers_have_annotations_that_executors_never_get() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler);
    let protection =
        [("karpenter.sh/do-not-disrupt", "true"), ("cluster-autoscaler.kubernetes.io/safe-to-evict", "false")];
    for (set, capacity) in [("true", "any"), ("true", "on-demand"), ("false", "on-demand")] {
        let settings = [("PROTECT_DRIVERS", set), ("DRIVER_CAPACITY", capacity)];
        let scenario = start(ONE, "protected", &settings).await?;
        let protected = set == "true";
        for (job, pod) in [
            ("plain", driver("plain").annotation(RATIO, "0.5")),
            ("chooses", driver("chooses").node_selector(CAPACITY, "spot")),
            ("server", connect_server("server").annotation("team", "etl")),
        ] {
            let made = driven(&scenario, pod.clone()).await?;
            for (key, value) in protection {
                let right = protected.then_some(value);
                assert_eq!(made.annotations().get(key).map(String::as_str), right, "{job}, {set}, {capacity}");
            }
            if let Some(own) = pod.value()["metadata"]["annotations"].as_object() {
                for (key, value) in own {
                    assert_eq!(made.annotations().get(key).map(String::as_str), value.as_str(), "{job}");
                }
            }
            assert_eq!(selected(&made).is_some(), job == "chooses" || capacity == "on-demand", "{job}");
        }
        // What a driver says itself stays.
        let own = driver("own").annotation("karpenter.sh/do-not-disrupt", "false");
        let made = driven(&scenario, own).await?;
        assert_eq!(made.annotations().get("karpenter.sh/do-not-disrupt").map(String::as_str), Some("false"));
        for id in 1..=4 {
            let made = post(&scenario, &executor("plain", id)).await?;
            ensure!(
                protection.iter().all(|(key, _)| !made.annotations().contains_key(*key)),
                "{:?}",
                made.annotations()
            );
        }
    }
    Ok(())
}
