//! Real Spark: the end-to-end tests with it, and a job that computes to its end.
//!
//! Its containers are processes of this machine; apiserver, scheduler, controller manager and Redis are real.

use anyhow::{Context, Result, ensure};
use balancer_tests::containers::{self, Containers};
use balancer_tests::control_plane::{ControlPlane, Options, Plane};
use balancer_tests::end_to_end::{self, Outcome};
use balancer_tests::helm::repository;
use balancer_tests::platforms::{EKS_ON_DEMAND, EKS_SPOT, KARPENTER_ON_DEMAND, KARPENTER_SPOT};
use balancer_tests::scenario::{Counts, Scenario, strict};
use balancer_tests::wait::{SOON, until_true, while_progressing};
use balancer_tests::{need, nodes, spark_client};
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{ConfigMap, Pod, Service, ServiceAccount};
use k8s_openapi::api::rbac::v1::{Role, RoleBinding};
use kube::api::{Api, DeleteParams, ListParams};
use kube::{Resource, ResourceExt};
use redis::AsyncCommands;
use serde::de::DeserializeOwned;
use serde_json::json;
use tokio::sync::OnceCell;

/// Tasks of half a second of CPU: they last until the lost executor has been replaced, on a fast machine too.
const TASKS: u32 = 300;
const APPLICATION: &str = "spark-app-selector";

/// A namespace in which real Spark runs, with one webhook and one reconciler of this profile.
async fn scenario(purpose: &str, profile: &str) -> Result<(Scenario, Containers)> {
    static PLANE: OnceCell<ControlPlane> = OnceCell::const_new();
    let options = Options { scheduler: true, controller_manager: true, ..Options::default() };
    let plane = PLANE.get_or_try_init(|| ControlPlane::start(options)).await?;
    let client = plane.client()?;
    nodes::ensure_executor_pool(&client, "karpenter", &[KARPENTER_SPOT, KARPENTER_ON_DEMAND]).await?;
    nodes::ensure_executor_pool(&client, "eks", &[EKS_SPOT, EKS_ON_DEMAND]).await?;
    let mut scenario = Scenario::without_nodes(Plane::Shared(plane), purpose).await?;
    scenario.kubelet = None;
    scenario.job_id_label = APPLICATION;
    scenario.serve(1, &strict().env("CAPACITY_PROFILE", profile)).await?;
    let containers = Containers::start(&scenario.plane, &scenario.namespace).await?;
    Ok((scenario, containers))
}

/// The names of all objects of a kind that have to do with Spark or with the end-to-end tests.
async fn of_spark<K>(scenario: &Scenario) -> Result<Vec<String>>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + DeserializeOwned + std::fmt::Debug,
{
    let all = Api::<K>::namespaced(scenario.client.clone(), &scenario.namespace).list(&ListParams::default()).await?;
    let names = all.items.iter().map(|object| format!("{} {}", K::kind(&()), object.name_any()));
    Ok(names.filter(|name| name.contains("spark") || name.contains("e2e") || name.contains("pi-")).collect())
}

async fn until_nothing_is_left(scenario: &Scenario) -> Result<()> {
    let mut left = Vec::new();
    let gone = until_true(SOON, "all that was made to be gone", async || {
        left = of_spark::<Pod>(scenario).await?;
        left.extend(of_spark::<Job>(scenario).await?);
        left.extend(of_spark::<Service>(scenario).await?);
        left.extend(of_spark::<ConfigMap>(scenario).await?);
        left.extend(of_spark::<ServiceAccount>(scenario).await?);
        left.extend(of_spark::<Role>(scenario).await?);
        left.extend(of_spark::<RoleBinding>(scenario).await?);
        let ledgers: Vec<String> = scenario.redis.connection().await?.keys("exec-*:*").await?;
        left.extend(ledgers);
        Ok(left.is_empty())
    });
    gone.await.with_context(|| format!("left behind: {left:?}"))
}

#[tokio::test]
async fn end_to_end_tests_pass_with_real_spark_and_clean_up() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, ControllerManager, Webhook, Reconciler, Kubectl, Spark);
    if !containers::allowed().await? {
        return Ok(());
    }
    let (scenario, containers) = scenario("ratios", "karpenter").await?;
    let Outcome { success, output } = end_to_end::run(&scenario, "run", &[("EXECUTORS", "4")]).await?;
    ensure!(success, "{output}\n{}", containers.last_words());
    for line in ["ratio 1.0: 4 of 4 on spot", "ratio 0.0: 0 of 4 on spot", "ratio 0.7: 3 of 4 on spot"] {
        assert!(output.contains(line), "{output}");
    }
    assert!(output.contains("all ratios as expected"), "{output}");
    until_nothing_is_left(&scenario).await?;
    // A driver that is deleted after its executors makes others in their place.
    assert_eq!(scenario.metric("spot_balancer_placements_total", &[]).await?, 12.0);
    Ok(())
}

/// One ratio is enough: the rest is the same with every profile.
#[tokio::test]
async fn end_to_end_tests_pass_with_real_spark_on_managed_node_groups_of_eks() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, ControllerManager, Webhook, Reconciler, Kubectl, Spark);
    if !containers::allowed().await? {
        return Ok(());
    }
    let (scenario, containers) = scenario("ratios-eks", "eks").await?;
    let settings = [("EXECUTORS", "4"), ("RATIOS", "0.7"), ("CAPACITY_PROFILE", "eks")];
    let Outcome { success, output } = end_to_end::run(&scenario, "run", &settings).await?;
    ensure!(success && output.contains("ratio 0.7: 3 of 4 on spot"), "{output}\n{}", containers.last_words());
    until_nothing_is_left(&scenario).await
}

/// The id of an application in client mode.
const NOTEBOOK: &str = "notebook";
/// Waits for its executors, and then for long in each of more tasks than they finish.
const IN_NOTEBOOK: &str = r#"
import time
from pyspark import SparkContext
SparkContext().parallelize(range(100000), 100000).foreach(lambda _: time.sleep(5))
"#;

/// A notebook has no labels of Spark's; the executors name it as their owner.
#[tokio::test]
async fn a_job_of_a_pod_without_labels_of_spark_follows_the_annotations_of_that_pod() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, ControllerManager, Webhook, Reconciler, Spark);
    if !containers::allowed().await? {
        return Ok(());
    }
    let (scenario, containers) = scenario("notebook", "karpenter").await?;
    let settings = ["spark.executor.instances=4".to_owned()];
    let (labels, annotations) = (json!({"app": NOTEBOOK}), json!({"workload/spot-ratio": "0.75"}));
    spark_client::start(&scenario, (NOTEBOOK, IN_NOTEBOOK), &settings, (&labels, &annotations)).await?;
    while_progressing("four executors", async || {
        Ok((containers.log_length()?, (scenario.live(NOTEBOOK).await?.len() == 4).then_some(())))
    })
    .await
    .with_context(|| containers.last_words())?;
    assert_eq!(scenario.until_ledger_matches_pods(NOTEBOOK, SOON).await?, Counts { spot: 3, on_demand: 1 });
    scenario.ensure_bound_as_placed(NOTEBOOK).await?;
    assert_eq!(scenario.policy(NOTEBOOK).await?.0.as_deref(), Some("0.75"));

    // Spark replaces a lost one, which the owner's ratio applies to as well.
    let lost = scenario.some(NOTEBOOK, "on-demand", 1).await?.pop().context("no executor")?;
    while_progressing("a container to lose", async || Ok((containers.log_length()?, containers.kill(&lost).ok())))
        .await?;
    while_progressing("another executor in its place", async || {
        let live = scenario.real(NOTEBOOK).await?;
        Ok((containers.log_length()?, (!live.contains_key(&lost) && live.len() == 4).then_some(())))
    })
    .await
    .with_context(|| containers.last_words())?;
    scenario.until_ledger_matches_pods(NOTEBOOK, SOON).await?.ensure_near(0.75, 1.0)?;

    scenario.pods().delete(NOTEBOOK, &DeleteParams::default()).await?;
    until_true(SOON, "the executors to be gone", async || Ok(scenario.live(NOTEBOOK).await?.is_empty())).await?;
    assert_eq!(scenario.until_ledger_matches_pods(NOTEBOOK, SOON).await?, Counts::default());
    Ok(())
}

/// A job that is to compute so many partitions of pi on four executors.
struct Pi<'a> {
    scenario: &'a Scenario,
    containers: &'a Containers,
    driver: String,
    /// Its id in the ledger.
    id: String,
}

impl<'a> Pi<'a> {
    async fn submit(scenario: &'a Scenario, containers: &'a Containers, partitions: u32) -> Result<Self> {
        let (partitions, template) = (partitions.to_string(), repository("deploy/executor-template.yaml"));
        let template = template.to_string_lossy();
        let settings = [
            ("JOB", "pi"),
            ("RATIO", "0.7"),
            ("EXECUTORS", "4"),
            ("PARTITIONS", partitions.as_str()),
            ("TEMPLATE", &*template),
            ("SPARK_IMAGE", "docker.io/apache/spark:3.5.6"),
            ("SPOT_RATIO_ANNOTATION", "workload/spot-ratio"),
        ];
        let Outcome { success, output } = end_to_end::run(scenario, "submit-spark", &settings).await?;
        ensure!(success, "{output}");
        let drivers = ListParams::default().labels("spark-role=driver");
        let driver = while_progressing("the driver", async || {
            Ok((containers.log_length()?, scenario.pods().list(&drivers).await?.items.pop()))
        });
        let driver = driver.await.with_context(|| containers.last_words())?;
        let id = driver.labels().get(APPLICATION).context("a driver without an id")?.clone();
        Ok(Self { scenario, containers, driver: driver.name_any(), id })
    }

    /// The executors that finished tasks, by what the driver says.
    fn finished(&self) -> Result<Vec<String>> {
        let log = self.containers.log(&self.driver)?;
        let lines = log.lines().filter(|line| line.contains("Finished task"));
        let executor = |line: &str| Some(line.split_once("(executor ")?.1.split_once(')')?.0.to_owned());
        Ok(lines.filter_map(executor).collect())
    }

    /// Waits until the executors compute. Two Java machines start before them, one after the other.
    async fn until_computing(&self) -> Result<()> {
        while_progressing("the first finished task", async || {
            Ok((self.containers.log_length()?, (!self.finished()?.is_empty()).then_some(())))
        })
        .await
    }

    async fn until_succeeded(&self) -> Result<()> {
        while_progressing("the end of the driver", async || {
            let status = self.scenario.pods().get(&self.driver).await?.status.unwrap_or_default();
            Ok((self.finished()?.len(), (status.phase.as_deref() == Some("Succeeded")).then_some(())))
        })
        .await
    }
}

#[tokio::test]
async fn a_spark_job_replaces_a_lost_executor_and_leaves_an_empty_ledger() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, ControllerManager, Webhook, Reconciler, Kubectl, Spark);
    if !containers::allowed().await? {
        return Ok(());
    }
    let (scenario, containers) = scenario("reclaim", "karpenter").await?;
    let pi = Pi::submit(&scenario, &containers, TASKS).await?;
    pi.until_computing().await.with_context(|| containers.last_words())?;
    let asked = Counts { spot: 3, on_demand: 1 };
    assert_eq!(scenario.until_ledger_matches_pods(&pi.id, SOON).await?, asked);
    scenario.ensure_bound_as_placed(&pi.id).await?;

    let lost = scenario.some(&pi.id, "spot", 1).await?.pop().context("no executor")?;
    containers.kill(&lost)?;
    let replaced = while_progressing("another executor in its place", async || {
        let live = scenario.real(&pi.id).await?;
        Ok((containers.log_length()?, (!live.contains_key(&lost) && live.len() == 4).then_some(live)))
    });
    let replaced = replaced.await.with_context(|| containers.last_words())?;
    assert!(replaced.keys().any(|name| name.ends_with("-exec-5")), "{replaced:?}");
    // Spark may ask for it before the loss is in the ledger: no review tells of a process that ended.
    let counts = scenario.until_ledger_matches_pods(&pi.id, SOON).await?;
    assert_eq!(counts.spot + counts.on_demand, 4);
    counts.ensure_near(0.7, 1.0)?;

    pi.until_succeeded().await.with_context(|| containers.last_words())?;
    let log = containers.log(&pi.driver)?;
    let result =
        log.lines().find(|line| line.starts_with("Pi is roughly ")).with_context(|| containers.last_words())?;
    assert!(result.starts_with("Pi is roughly 3.1"), "{result}");
    until_true(SOON, "the executors to be gone", async || Ok(scenario.live(&pi.id).await?.is_empty())).await?;
    assert_eq!(scenario.until_ledger_matches_pods(&pi.id, SOON).await?, Counts::default());
    let computed = pi.finished()?;
    for id in ["1", "2", "3", "4"].into_iter().filter(|id| !lost.ends_with(&format!("-exec-{id}"))) {
        assert!(computed.iter().any(|by| by == id), "executor {id} computed nothing: {computed:?}");
    }
    // The driver told its ratio when it was made: no executor had to wait for a look-up.
    assert_eq!(scenario.metric("spot_balancer_policies_total", &[("source", "ledger")]).await?, 5.0);
    Ok(())
}
