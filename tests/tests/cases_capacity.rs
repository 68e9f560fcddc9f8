//! What spot and on-demand mean: the profile of each platform on the real scheduler, and the labels of other platforms
//! next to it.

#![allow(clippy::indexing_slicing, reason = "JSON is read by index; a panic here fails a test, as it should")]

use anyhow::{Context, Result, ensure};
use balancer_tests::control_plane::Plane;
use balancer_tests::need;
use balancer_tests::nodes::{self, CAPACITY, TRUTH};
use balancer_tests::platforms::{
    CAST_FALLBACK, EKS_CAPACITY_BLOCK, EKS_ON_DEMAND, EKS_SPOT, GKE_PREEMPTIBLE, KARPENTER_INTERRUPTIBLE,
    KARPENTER_ON_DEMAND, KARPENTER_RESERVED, KARPENTER_SPOT, NAP_ON_DEMAND, NAP_SPOT, PLATFORMS, Platform, Shape,
};
use balancer_tests::pods::{PodBuilder, driver, executor};
use balancer_tests::scenario::{Counts, REPAIRED, Scenario, placed};
use balancer_tests::scheduling::{node_of, until_bound, until_unschedulable};
use balancer_tests::webhook::WebhookOptions;
use futures::future::try_join_all;
use futures::{StreamExt, TryStreamExt};
use kube::ResourceExt;
use serde_json::{Value, json};

/// The label that names a node's shape.
const SHAPE: &str = "tests/shape";
const STRICT: (&str, &str) = ("SPOT_PREFERENCE", "STRICT");
const BEST_EFFORT: (&str, &str) = ("SPOT_PREFERENCE", "BEST_EFFORT");
/// More pods than a test makes.
const PLENTY: u32 = 500;
/// Scenarios at once: each starts processes.
const AT_ONCE: usize = 5;
const JOB: &str = "etl";

/// A namespace, served with some settings, and nodes for its executors alone.
struct Group(Scenario);

impl Group {
    async fn start(purpose: &str, settings: &[(&str, &str)], nodes: &[(Shape, u32)]) -> Result<Self> {
        let mut scenario = Scenario::without_nodes(Plane::shared().await?, purpose).await?;
        let options =
            settings.iter().fold(WebhookOptions::default(), |options, (name, value)| options.env(name, value));
        scenario.serve(1, &options).await?;
        let group = Self(scenario);
        for (shape, room) in nodes {
            group.add(shape, *room).await?;
        }
        Ok(group)
    }

    /// Adds a node with room for so many pods, and returns its name.
    async fn add(&self, shape: &Shape, room: u32) -> Result<String> {
        let name = format!("{}-{}", self.0.namespace, shape.name);
        let labels = [(SHAPE, shape.name)];
        nodes::of_platform(&self.0.client, (&self.0.namespace, &name), shape, &labels, room).await?;
        Ok(name)
    }

    /// Makes a job's driver. It takes no room on the nodes.
    async fn driver(&self, job: &str, ratio: &str) -> Result<()> {
        let posted = self.0.post(&driver(job).annotation("workload/spot-ratio", ratio)).await?;
        ensure!(posted.warnings.is_empty(), "{:?}", posted.warnings);
        posted.pod()?;
        Ok(())
    }

    fn executor(&self, job: &str, id: u32) -> PodBuilder {
        executor(job, id).on_pool(&self.0.namespace)
    }

    /// Makes a job and its executors, each of them changed, waits until all run, and returns what the ledger comes to.
    /// Fails unless the ledger, entries and counts, is what the nodes are.
    async fn run_with(
        &self,
        job: &str,
        (ratio, count): (&str, u32),
        change: impl Fn(PodBuilder) -> PodBuilder,
    ) -> Result<Counts> {
        self.driver(job, ratio).await?;
        for id in 1..=count {
            self.0.post(&change(self.executor(job, id))).await?.pod()?;
        }
        self.0.until_bound(job).await.with_context(|| format!("{job} with {ratio}"))?;
        let counts = self.0.until_ledger_matches_pods(job, REPAIRED).await?;
        ensure!(counts.spot + counts.on_demand == usize::try_from(count)?, "{counts:?} of {count} live");
        Ok(counts)
    }

    async fn run(&self, job: &str, ratio: &str, count: u32) -> Result<Counts> {
        self.run_with(job, (ratio, count), |pod| pod).await
    }

    /// The executors of a job on each shape of nodes.
    async fn on_shapes(&self, job: &str) -> Result<Vec<String>> {
        let node = |pod: &k8s_openapi::api::core::v1::Pod| node_of(pod).map(str::to_owned);
        let prefix = format!("{}-", self.0.namespace);
        let nodes = self.0.live(job).await?.iter().map(node).collect::<Option<Vec<_>>>().context("not bound")?;
        let mut shapes: Vec<String> = nodes.iter().map(|node| node.replacen(&prefix, "", 1)).collect();
        shapes.sort();
        Ok(shapes)
    }
}

fn spot(spot: usize) -> Counts {
    Counts { spot, on_demand: 0 }
}

fn on_demand(on_demand: usize) -> Counts {
    Counts { spot: 0, on_demand }
}

#[tokio::test]
async fn every_profile_reaches_every_ratio_on_the_nodes_of_its_platform() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler);
    let all = PLATFORMS.iter().flat_map(|platform| [(platform, STRICT), (platform, BEST_EFFORT)]);
    futures::stream::iter(all)
        .map(async |(platform, preference)| {
            ensure_ratios(platform, preference).await.with_context(|| format!("{} {preference:?}", platform.profile))
        })
        .buffer_unordered(AT_ONCE)
        .try_collect()
        .await
}

async fn ensure_ratios(platform: &Platform, preference: (&str, &str)) -> Result<()> {
    let (profile, purpose) = match preference {
        BEST_EFFORT => (platform.profile.to_uppercase(), format!("{}-effort", platform.profile)),
        _ => (platform.profile.to_owned(), format!("{}-strict", platform.profile)),
    };
    let nodes: Vec<(Shape, u32)> = platform.shapes.iter().map(|shape| (*shape, PLENTY)).collect();
    let group = Group::start(&purpose, &[("CAPACITY_PROFILE", &profile), preference], &nodes).await?;
    for (job, ratio, right) in
        [("safe", "0", on_demand(4)), ("half", "0.5", Counts { spot: 3, on_demand: 3 }), ("cheap", "1", spot(4))]
    {
        let count = u32::try_from(right.spot + right.on_demand)?;
        let counts = group.run(job, ratio, count).await?;
        ensure!(counts == right, "ratio {ratio}: {counts:?}, not {right:?}");
        group.0.ensure_bound_as_placed(job).await?;
    }
    // Each shape by itself.
    for shape in platform.shapes {
        let (ratio, right) = if shape.capacity == "spot" { ("1", spot(2)) } else { ("0", on_demand(2)) };
        let only = |pod: PodBuilder| pod.node_selector(SHAPE, shape.name);
        let counts = group.run_with(shape.name, (ratio, 2), only).await?;
        ensure!(counts == right, "on {} alone: {counts:?}, not {right:?}", shape.name);
        group.0.ensure_bound_as_placed(shape.name).await?;
    }
    Ok(())
}

#[tokio::test]
async fn reserved_nodes_take_on_demand_executors_where_they_are_accepted() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler);
    let accepted = ("ON_DEMAND_VALUES", "on-demand,reserved");
    let group = Group::start("reserved", &[STRICT, accepted], &[(KARPENTER_RESERVED, 4)]).await?;
    assert_eq!(group.run(JOB, "0", 4).await?, on_demand(4));
    assert_eq!(group.on_shapes(JOB).await?, ["reserved"; 4]);

    // The reservation ends: Karpenter writes another value on the live node, which is on-demand as well.
    let drift = group.0.reconcile_metric("drift_total", &[]).await?;
    nodes::label(&group.0.client, &format!("{}-reserved", group.0.namespace), &[(CAPACITY, Some("on-demand"))]).await?;
    group.add(&KARPENTER_ON_DEMAND, PLENTY).await?;
    assert_eq!(group.run("next", "0", 2).await?, on_demand(2));
    assert_eq!(group.0.until_ledger_matches_pods(JOB, REPAIRED).await?, on_demand(4));
    assert_eq!(group.0.reconcile_metric("drift_total", &[]).await?, drift);

    // A base, and what the pod wants itself, are met there too.
    group.add(&KARPENTER_SPOT, PLENTY).await?;
    assert_eq!(group.run("half", "0.5", 4).await?, Counts { spot: 2, on_demand: 2 });
    let zone = [json!({"matchExpressions": [{"key": SHAPE, "operator": "NotIn", "values": ["nowhere"]}]})];
    let own = |pod: PodBuilder| pod.node_terms(&json!(zone));
    assert_eq!(group.run_with("own", ("0.5", 4), own).await?, Counts { spot: 2, on_demand: 2 });
    group.0.ensure_bound_as_placed("own").await
}

#[tokio::test]
async fn by_default_reserved_nodes_take_no_executor() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler);
    let group = Group::start("not-reserved", &[STRICT], &[(KARPENTER_RESERVED, PLENTY)]).await?;
    for (job, ratio) in [("safe", "0"), ("cheap", "1")] {
        group.driver(job, ratio).await?;
        group.0.post(&group.executor(job, 1)).await?.pod()?;
        until_unschedulable(&group.0.pods(), &format!("{job}-exec-1")).await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_reservation_that_may_be_taken_back_is_spot_until_it_ends() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler);
    let accepted = ("ON_DEMAND_VALUES", "on-demand,reserved");
    let group = Group::start("interruptible", &[BEST_EFFORT, accepted], &[(KARPENTER_INTERRUPTIBLE, PLENTY)]).await?;
    assert_eq!(group.run("cheap", "1", 3).await?, spot(3));
    // It has a notice of two minutes, which is not what on-demand executors ask for.
    group.driver("safe", "0").await?;
    group.0.post(&group.executor("safe", 1)).await?.pod()?;
    until_unschedulable(&group.0.pods(), "safe-exec-1").await?;

    let name = format!("{}-{}", group.0.namespace, KARPENTER_INTERRUPTIBLE.name);
    let ended = [
        (CAPACITY, Some("on-demand")),
        ("karpenter.k8s.aws/capacity-reservation-interruptible", None),
        (TRUTH, Some("on-demand")),
    ];
    nodes::label(&group.0.client, &name, &ended).await?;
    assert_eq!(group.0.until_ledger_matches_pods("cheap", REPAIRED).await?, on_demand(3));
    until_bound(&group.0.pods(), "safe-exec-1").await?;
    assert_eq!(group.0.until_ledger_matches_pods("safe", REPAIRED).await?, on_demand(1));
    Ok(())
}

#[tokio::test]
async fn preemptible_nodes_of_gke_count_as_spot_and_take_no_on_demand_executor() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler);
    let profile = ("CAPACITY_PROFILE", "gke");
    let group = Group::start("preemptible", &[BEST_EFFORT, profile], &[(GKE_PREEMPTIBLE, PLENTY)]).await?;
    assert_eq!(group.run("cheap", "1", 3).await?, spot(3));
    group.driver("safe", "0").await?;
    group.0.post(&group.executor("safe", 1)).await?.pod()?;
    until_unschedulable(&group.0.pods(), "safe-exec-1").await
}

/// They satisfy the selectors for spot, and nobody reclaims them.
#[tokio::test]
async fn fallback_nodes_of_cast_ai_count_as_on_demand() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler);
    for (purpose, preference) in [("fallback", STRICT), ("fallback-effort", BEST_EFFORT)] {
        let profile = ("CAPACITY_PROFILE", "cast-ai");
        let group = Group::start(purpose, &[preference, profile], &[(CAST_FALLBACK, PLENTY)]).await?;
        assert_eq!(group.run(JOB, "1", 3).await?, on_demand(3), "{purpose}");
        // Once there is spot capacity again, CAST AI replaces the node; the ratio asks for spot meanwhile.
        assert_eq!(placed(&group.0.post(&group.executor(JOB, 4)).await?.pod()?)?, "spot", "{purpose}");
        // Whoever chooses such nodes chooses on-demand.
        let label = ("scheduling.cast.ai/spot-fallback", "true");
        ensure_left_and_counted(&group, "template", &CAST_FALLBACK, label).await.with_context(|| purpose.to_owned())?;
    }
    Ok(())
}

/// AKS may have node pools of its own and those of Node Auto Provisioning; either profile understands both.
#[tokio::test]
async fn nodes_of_node_auto_provisioning_are_understood_by_either_profile() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler);
    for profile in ["karpenter", "aks"] {
        let settings = [STRICT, ("CAPACITY_PROFILE", profile)];
        let group = Group::start("nap", &settings, &[(NAP_SPOT, PLENTY), (NAP_ON_DEMAND, PLENTY)]).await?;
        for (job, ratio, right) in
            [("safe", "0", on_demand(2)), ("half", "0.5", Counts { spot: 2, on_demand: 2 }), ("cheap", "1", spot(2))]
        {
            let count = u32::try_from(right.spot + right.on_demand)?;
            assert_eq!(group.run(job, ratio, count).await?, right, "{profile}, {ratio}");
            group.0.ensure_bound_as_placed(job).await?;
        }
    }
    Ok(())
}

/// With default settings, by selector and by affinity, for each label of each platform.
#[tokio::test]
async fn an_executor_that_chooses_by_any_platforms_label_is_left_unchanged_and_counted() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler);
    let others = [EKS_CAPACITY_BLOCK, GKE_PREEMPTIBLE];
    let shapes = || PLATFORMS.iter().flat_map(|platform| platform.shapes).chain(&others);
    for (purpose, preference) in [("template", STRICT), ("template-effort", BEST_EFFORT)] {
        let group = &Group::start(purpose, &[preference], &[]).await?;
        let mut cases = Vec::new();
        for (number, shape) in shapes().enumerate() {
            // Several platforms have shapes of one name.
            let name = format!("{}-{number}", group.0.namespace);
            nodes::of_platform(&group.0.client, (&group.0.namespace, &name), shape, &[], PLENTY).await?;
            for (turn, (key, value)) in shape.labels.iter().enumerate() {
                // Not of the capacity.
                if *key != "eks.amazonaws.com/compute-type" {
                    cases.push((format!("job-{number}-{turn}"), shape, *key, *value));
                }
            }
        }
        futures::stream::iter(cases)
            .map(async |(job, shape, key, value)| {
                ensure_left_and_counted(group, &job, shape, (key, value))
                    .await
                    .with_context(|| format!("{preference:?}: {} {key}={value}", shape.name))
            })
            .buffer_unordered(AT_ONCE)
            .try_collect::<()>()
            .await?;
    }
    Ok(())
}

async fn ensure_left_and_counted(group: &Group, job: &str, shape: &Shape, (key, value): (&str, &str)) -> Result<()> {
    group.driver(job, "0.5").await?;
    for id in 1..=4 {
        let mut pod = group.executor(job, id);
        if let Some((key, value)) = shape.taint {
            pod = pod.tolerating(key, value);
        }
        let by_selector = id % 2 == 0;
        let pod = if by_selector { pod.node_selector(key, value) } else { pod.required_affinity(key, &[value]) };
        let made = group.0.post(&pod).await?;
        ensure!(made.status == 201, "{}", made.object);
        ensure_unchanged(&pod, &made.object)?;
        ensure!(made.object["metadata"]["annotations"].is_null(), "{}", made.object["metadata"]);
    }
    group.0.until_bound(job).await?;
    let counts = group.0.until_ledger_matches_pods(job, REPAIRED).await?;
    let right = if shape.capacity == "spot" { spot(4) } else { on_demand(4) };
    ensure!(counts == right, "{counts:?}, not {right:?}");
    Ok(())
}

/// Fails unless what says where a pod may run is as it was posted.
fn ensure_unchanged(pod: &PodBuilder, made: &Value) -> Result<()> {
    for field in ["nodeSelector", "affinity", "tolerations"] {
        let (own, made) = (&pod.value()["spec"][field], &made["spec"][field]);
        // The apiserver adds tolerations of its own after ours.
        let same = match (own.as_array(), made.as_array()) {
            (Some(own), Some(made)) => made.starts_with(own) && made.iter().skip(own.len()).all(is_of_apiserver),
            _ => own == made,
        };
        ensure!(same, "{field} was {own} and is {made}");
    }
    Ok(())
}

/// Whether a toleration is one that the apiserver gives to every pod.
fn is_of_apiserver(toleration: &Value) -> bool {
    toleration["key"].as_str().is_some_and(|key| key.starts_with("node.kubernetes.io/"))
}

/// The input of a report: four executors, half of which the ledger took for on-demand.
#[tokio::test]
async fn with_default_settings_a_template_with_the_label_of_eks_runs_and_counts_as_spot() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler);
    let nodes = [(EKS_SPOT, PLENTY), (EKS_ON_DEMAND, PLENTY)];
    let group = Group::start("eks-template", &[], &nodes).await?;
    let spot_group = |pod: PodBuilder| pod.node_selector("eks.amazonaws.com/capacityType", "SPOT");
    assert_eq!(group.run_with(JOB, ("0.5", 4), spot_group).await?, spot(4));
    assert_eq!(group.on_shapes(JOB).await?, ["spot"; 4]);
    Ok(())
}

#[tokio::test]
async fn with_default_settings_executors_on_nodes_of_eks_count_as_what_these_are() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler);
    let group = Group::start("eks-nodes", &[BEST_EFFORT], &[(EKS_ON_DEMAND, 2), (EKS_SPOT, 2)]).await?;
    assert_eq!(group.run(JOB, "1", 4).await?, Counts { spot: 2, on_demand: 2 });
    Ok(())
}

#[tokio::test]
async fn nodes_of_eks_next_to_those_of_karpenter_are_counted_as_what_they_are() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler);
    let eks = |shape: Shape, name| Shape { name, ..shape };
    let eks = [eks(EKS_SPOT, "eks-spot"), eks(EKS_ON_DEMAND, "eks-on-demand")];
    for profile in ["karpenter", "eks"] {
        let profile_setting = ("CAPACITY_PROFILE", profile);
        let nodes: Vec<(Shape, u32)> =
            [KARPENTER_SPOT, KARPENTER_ON_DEMAND, eks[0], eks[1]].into_iter().map(|shape| (shape, 6)).collect();
        // Strict executors run on the nodes of the profile.
        let group = Group::start("beside", &[STRICT, profile_setting], &nodes).await?;
        assert_eq!(group.run(JOB, "0.5", 6).await?, Counts { spot: 3, on_demand: 3 }, "{profile}");
        let (spot_shape, on_demand_shape) =
            if profile == "eks" { ("eks-spot", "eks-on-demand") } else { ("spot", "on-demand") };
        let mut right = [on_demand_shape, on_demand_shape, on_demand_shape, spot_shape, spot_shape, spot_shape];
        right.sort_unstable();
        assert_eq!(group.on_shapes(JOB).await?, right);

        // Others go to the other platform's nodes too, once those of the profile are full.
        let nodes: Vec<(Shape, u32)> = nodes.iter().map(|(shape, _)| (*shape, 2)).collect();
        let group = Group::start("beside-effort", &[BEST_EFFORT, profile_setting], &nodes).await?;
        assert_eq!(group.run(JOB, "1", 2).await?, spot(2), "{profile}");
        assert_eq!(group.on_shapes(JOB).await?, [spot_shape; 2]);
        for id in 3..=8 {
            group.0.post(&group.executor(JOB, id)).await?.pod()?;
        }
        group.0.until_bound(JOB).await?;
        let all = group.0.until_ledger_matches_pods(JOB, REPAIRED).await?;
        assert_eq!(all, Counts { spot: 4, on_demand: 4 }, "{profile}");
    }
    Ok(())
}

#[tokio::test]
async fn best_effort_fills_spot_first_and_leaves_nobody_waiting() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler);
    let group = Group::start("effort", &[BEST_EFFORT], &[]).await?;
    // Three nodes of each capacity with room for all, as in the report.
    let shape = |shape: Shape, name| Shape { name, ..shape };
    for name in ["spot-a", "spot-b", "spot-c"] {
        group.add(&shape(KARPENTER_SPOT, name), PLENTY).await?;
    }
    for name in ["on-demand-a", "on-demand-b", "on-demand-c"] {
        group.add(&shape(KARPENTER_ON_DEMAND, name), PLENTY).await?;
    }
    assert_eq!(group.run(JOB, "1", 12).await?, spot(12));
    assert_eq!(group.run("half", "0.5", 12).await?, Counts { spot: 6, on_demand: 6 });
    // A preference of the pod's own that is as heavy does not make a difference between the capacities.
    let own = |pod: PodBuilder| {
        pod.with(|pod| {
            let zone = json!({"matchExpressions": [{"key": SHAPE, "operator": "Exists"}]});
            pod["spec"]["affinity"]["nodeAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"] =
                json!([{"weight": 100, "preference": zone}]);
        })
    };
    assert_eq!(group.run_with("own", ("1", 6), own).await?, spot(6));

    // With room for five on spot, the others run on on-demand nodes, and count there.
    let group =
        Group::start("effort-full", &[BEST_EFFORT], &[(KARPENTER_SPOT, 5), (KARPENTER_ON_DEMAND, PLENTY)]).await?;
    assert_eq!(group.run(JOB, "1", 9).await?, Counts { spot: 5, on_demand: 4 });
    Ok(())
}

/// Nodes of self-managed groups have the labels of their owner.
#[tokio::test]
async fn labels_and_taints_of_ones_own_are_settings() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler);
    const SPOT: Shape = Shape {
        name: "spot",
        capacity: "spot",
        labels: &[("lifecycle", "Ec2Spot")],
        taint: Some(("spotInstance", "true")),
    };
    const CHEAP: Shape = Shape { name: "cheap", labels: &[("lifecycle", "preempt")], taint: None, ..SPOT };
    const UNLABELLED: Shape = Shape { name: "plain", capacity: "on-demand", labels: &[], taint: None };
    const NORMAL: Shape = Shape { name: "normal", labels: &[("lifecycle", "OnDemand")], ..UNLABELLED };
    const RESERVED: Shape = Shape { name: "reserved", labels: &[("lifecycle", "Reserved")], ..UNLABELLED };

    let label = ("CAPACITY_TYPE_LABEL", "lifecycle");
    let tolerations = ("SPOT_TOLERATIONS", "spotInstance=true:NoSchedule,other:NoExecute");
    for (what, settings, shapes) in [
        (
            "everything else",
            vec![("SPOT_VALUES", "Ec2Spot"), ("ON_DEMAND_VALUES", ""), tolerations],
            vec![SPOT, UNLABELLED, NORMAL],
        ),
        (
            "several of each",
            vec![("SPOT_VALUES", "Ec2Spot,preempt"), ("ON_DEMAND_VALUES", "OnDemand,Reserved"), tolerations],
            vec![SPOT, CHEAP, NORMAL, RESERVED],
        ),
        (
            "the label is enough",
            vec![("SPOT_VALUES", "*"), ("ON_DEMAND_VALUES", ""), tolerations],
            vec![SPOT, CHEAP, UNLABELLED],
        ),
    ] {
        for preference in [STRICT, BEST_EFFORT] {
            let settings: Vec<_> = settings.iter().copied().chain([label, preference]).collect();
            let nodes: Vec<_> = shapes.iter().map(|shape| (*shape, PLENTY)).collect();
            let group = Group::start("own", &settings, &nodes).await?;
            assert_eq!(group.run("half", "0.5", 6).await?, Counts { spot: 3, on_demand: 3 }, "{what} {preference:?}");
            group.0.ensure_bound_as_placed("half").await?;
            for shape in &shapes {
                let (ratio, right) = if shape.capacity == "spot" { ("1", spot(1)) } else { ("0", on_demand(1)) };
                let only = |pod: PodBuilder| pod.node_selector(SHAPE, shape.name);
                let counts = group.run_with(shape.name, (ratio, 1), only).await?;
                assert_eq!(counts, right, "{what} {preference:?}: {}", shape.name);
            }
        }
    }
    Ok(())
}

#[tokio::test]
async fn an_empty_setting_of_tolerations_adds_none() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler);
    let platform = PLATFORMS.iter().find(|platform| platform.profile == "aks").context("no AKS")?;
    let tainted = platform.shapes.iter().find(|shape| shape.taint.is_some()).context("no taint")?;
    let settings = [STRICT, ("CAPACITY_PROFILE", "aks"), ("SPOT_TOLERATIONS", "")];
    let group = Group::start("no-tolerations", &settings, &[(*tainted, PLENTY)]).await?;
    group.driver(JOB, "1").await?;
    let pod = group.executor(JOB, 1);
    let made = group.0.post(&pod).await?;
    assert_eq!(placed(&made.pod()?)?, "spot");
    let tolerations = made.object["spec"]["tolerations"].as_array().context("no tolerations")?;
    assert!(!tolerations.iter().any(|toleration| toleration["key"] == "kubernetes.azure.com/scalesetpriority"));
    until_unschedulable(&group.0.pods(), &made.pod()?.name_any()).await?;
    // The pod's own does.
    let (key, value) = tainted.taint.context("no taint")?;
    let own = (2..=3).map(|id| group.executor(JOB, id).tolerating(key, value));
    try_join_all(own.map(async |pod| group.0.post(&pod).await?.pod())).await?;
    for id in 2..=3 {
        until_bound(&group.0.pods(), &format!("{JOB}-exec-{id}")).await?;
    }
    Ok(())
}
