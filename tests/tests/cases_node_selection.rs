//! Pods with a node affinity of their own, on the real scheduler: what we add never lets a pod run where its author did
//! not allow it, and never keeps it from the chosen capacity where it could have run.
//!
//! The nodes of each platform have all combinations of a few labels, so that a pod which names them has candidates.
//! `tests/src/node_selection.rs` says which nodes a pod may run on; the scheduler has the last word on that too.

#![allow(clippy::indexing_slicing, reason = "JSON is read by index; a panic here fails a test, as it should")]

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};
use balancer_tests::control_plane::Plane;
use balancer_tests::need;
use balancer_tests::node_selection::nodes_for;
use balancer_tests::nodes::{self, POOL, TRUTH};
use balancer_tests::platforms::{PLATFORMS, Shape};
use balancer_tests::pods::{PodBuilder, driver, executor};
use balancer_tests::random::Random;
use balancer_tests::scenario::{REPAIRED, Scenario};
use balancer_tests::scheduling::{until_bound, until_unschedulable};
use balancer_tests::webhook::WebhookOptions;
use futures::future::try_join_all;
use futures::{StreamExt, TryStreamExt};
use k8s_openapi::api::core::v1::{Node, Pod, Toleration};
use kube::ResourceExt;
use kube::api::{Api, ListParams};
use serde_json::{Value, json};

const PLENTY: u32 = 1000;
/// Random pods for each profile and preference.
const SAMPLES: usize = 40;
const AT_ONCE: usize = 8;
const JOB: &str = "etl";
const DECISION: &str = "workload/capacity-type";

const ZONE: &str = "tests/zone";
const GENERATION: &str = "tests/generation";
const GPU: &str = "tests/gpu";

/// Profiles that express requirements in different ways: by a selector, by lists, by the label's existence, and next to
/// taints and other labels.
struct Case {
    profile: &'static str,
    /// Another value of the profile's label.
    other: &'static str,
    /// The names of the platform's nodes that are left out, because the other labels multiply the nodes.
    left_out: &'static [&'static str],
    /// A node with the other value, if the platform has none.
    with_other: Option<Shape>,
}

const CASES: [Case; 5] = [
    Case {
        profile: "karpenter",
        other: "on-demand",
        left_out: &["auto-spot", "nap-spot", "nap-on-demand"],
        with_other: None,
    },
    Case { profile: "ack", other: "NoSpot", left_out: &[], with_other: None },
    Case {
        profile: "openshift",
        other: "yes",
        left_out: &[],
        with_other: Some(Shape {
            name: "yes",
            capacity: "spot",
            labels: &[("machine.openshift.io/interruptible-instance", "yes")],
            taint: None,
        }),
    },
    Case {
        profile: "gke",
        other: "false",
        left_out: &["by-hand"],
        with_other: Some(Shape {
            name: "false",
            capacity: "on-demand",
            labels: &[("cloud.google.com/gke-spot", "false")],
            taint: None,
        }),
    },
    Case { profile: "aks", other: "regular", left_out: &["old-spot", "regular"], with_other: None },
];

#[tokio::test]
async fn pods_with_their_own_affinity_run_where_they_and_we_say() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler);
    let mut random = Random::seeded()?;
    let mut groups = Vec::new();
    for Case { profile, other, left_out, with_other } in CASES {
        let platform = PLATFORMS.iter().find(|platform| platform.profile == profile).context("no platform")?;
        let own = platform.shapes.iter().filter(|shape| !left_out.contains(&shape.name)).copied();
        let shapes: Vec<_> = own.chain(with_other).collect();
        for preference in ["STRICT", "BEST_EFFORT"] {
            let samples = samples(&capacity_requirements(&shapes, other)?, &mut random)?;
            groups.push((profile, preference, shapes.clone(), samples));
        }
    }
    futures::stream::iter(groups)
        .map(async |(profile, preference, shapes, samples)| {
            ensure_semantics(profile, preference, &shapes, &samples)
                .await
                .with_context(|| format!("{profile} {preference}"))
        })
        .buffer_unordered(3)
        .try_collect()
        .await
}

/// Everything that a pod may require of the platform's own label.
fn capacity_requirements(shapes: &[Shape], other: &str) -> Result<Vec<Value>> {
    let spot = shapes.iter().find(|shape| shape.capacity == "spot").context("no spot node")?;
    let (key, value) = spot.labels.first().context("no label")?;
    let list = |operator: &str, values: &[&str]| json!({"key": key, "operator": operator, "values": values});
    let mut all = vec![
        list("In", &[value]),
        list("In", &[other]),
        list("In", &[value, other]),
        list("NotIn", &[other]),
        json!({"key": key, "operator": "Exists"}),
        json!({"key": key, "operator": "DoesNotExist"}),
    ];
    // Where the label's existence is enough, a node with any other value would be spot as well.
    if !value.is_empty() {
        all.extend([list("NotIn", &[value]), list("NotIn", &[value, other])]);
    }
    Ok(all)
}

/// A pod's own selection.
#[derive(Debug, Clone)]
struct Own {
    terms: Value,
    selector: Option<(String, String)>,
    /// Whether it names nodes, of which no webhook can know the capacity.
    names_nodes: bool,
}

/// One requirement of each other label, or none: all combinations exist, so they can be met together.
fn others(random: &mut Random) -> Result<Vec<Value>> {
    let list = |key: &str, operator: &str, values: &[&str]| json!({"key": key, "operator": operator, "values": values});
    let zones = [
        list(ZONE, "In", &["a"]),
        list(ZONE, "In", &["a", "b"]),
        list(ZONE, "NotIn", &["a"]),
        json!({"key": ZONE, "operator": "Exists"}),
        json!({"key": ZONE, "operator": "DoesNotExist"}),
    ];
    let generations = [list(GENERATION, "Gt", &["5"]), list(GENERATION, "Lt", &["5"]), list(GENERATION, "In", &["3"])];
    let gpus = [json!({"key": GPU, "operator": "Exists"}), json!({"key": GPU, "operator": "DoesNotExist"})];
    let mut all = Vec::new();
    for of_label in [&zones[..], &generations, &gpus] {
        // As often none as any.
        if let Some(requirement) = of_label.get(random.below(2 * of_label.len())?) {
            all.push(requirement.clone());
        }
    }
    Ok(all)
}

fn term(capacities: &[Value], random: &mut Random) -> Result<(Value, bool)> {
    if random.below(8)? == 0 {
        let empty = [json!({}), json!({"matchExpressions": null}), json!({"matchExpressions": [], "matchFields": []})];
        return Ok((empty[random.below(empty.len())?].clone(), false));
    }
    let mut expressions = others(random)?;
    // Most mention the capacity, some twice.
    for _ in 0..[0, 1, 1, 2][random.below(4)?] {
        expressions.push(capacities[random.below(capacities.len())?].clone());
    }
    let mut term = json!({});
    if !expressions.is_empty() {
        term["matchExpressions"] = json!(expressions);
    }
    let names_nodes = random.below(10)? == 0;
    if names_nodes {
        let operator = ["In", "NotIn"][random.below(2)?];
        term["matchFields"] = json!([{"key": "metadata.name", "operator": operator, "values": ["$NODE"]}]);
    }
    Ok((term, names_nodes))
}

/// Chosen selections, and random ones.
fn samples(capacities: &[Value], random: &mut Random) -> Result<Vec<Own>> {
    let of_terms = |terms: Value| Own { names_nodes: terms.to_string().contains("$NODE"), terms, selector: None };
    let mut all = vec![of_terms(Value::Null)];
    let zone = json!({"key": ZONE, "operator": "In", "values": ["a"]});
    let named = json!({"matchFields": [{"key": "metadata.name", "operator": "In", "values": ["$NODE"]}]});
    // No node has a number, and a webhook cannot know that, so these are only in terms that need no other.
    let key = &capacities.first().context("no requirement")?["key"];
    let numbers = ["Gt", "Lt"].map(|operator| json!({"key": key, "operator": operator, "values": ["1"]}));
    for capacity in capacities.iter().chain(&numbers) {
        all.push(of_terms(json!([{"matchExpressions": [capacity]}])));
        // Alternatives of which one mentions the capacity.
        all.push(of_terms(json!([{"matchExpressions": [zone]}, {"matchExpressions": [capacity]}])));
        all.push(of_terms(json!([{"matchExpressions": [zone, capacity]}, {}])));
    }
    all.push(of_terms(json!([{}])));
    all.push(of_terms(json!([{}, {"matchExpressions": [zone]}])));
    all.push(of_terms(json!([named])));
    all.push(of_terms(json!([named, {"matchExpressions": [zone]}])));
    for _ in 0..SAMPLES {
        let (mut terms, mut names_nodes) = (Vec::new(), false);
        for _ in 0..=random.below(3)? {
            let (term, names) = term(capacities, random)?;
            names_nodes |= names;
            terms.push(term);
        }
        let value = capacities.first().context("no requirement")?;
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let selector = (random.below(8)? == 0).then(|| (text(&value["key"]), text(&value["values"][0])));
        all.push(Own { terms: json!(terms), selector, names_nodes });
    }
    Ok(all)
}

/// Nodes of each shape with all combinations of the other labels.
async fn make_nodes(scenario: &Scenario, shapes: &[Shape]) -> Result<Vec<Node>> {
    let pool = scenario.namespace.as_str();
    let mut making = Vec::new();
    for shape in shapes {
        for zone in [None, Some("a"), Some("b")] {
            for generation in ["3", "7"] {
                for gpu in [None, Some("yes")] {
                    let name =
                        format!("{pool}-{}-{}-{generation}-{}", shape.name, zone.unwrap_or("x"), gpu.unwrap_or("no"));
                    let labels: Vec<(&str, &str)> = [(ZONE, zone), (GENERATION, Some(generation)), (GPU, gpu)]
                        .into_iter()
                        .filter_map(|(key, value)| Some((key, value?)))
                        .collect();
                    making.push(async move {
                        nodes::of_platform(&scenario.client, (pool, &name), shape, &labels, PLENTY).await
                    });
                }
            }
        }
    }
    try_join_all(making).await?;
    let of_pool = ListParams::default().labels(&format!("{POOL}={pool}"));
    Ok(Api::<Node>::all(scenario.client.clone()).list(&of_pool).await?.items)
}

async fn ensure_semantics(profile: &str, preference: &str, shapes: &[Shape], samples: &[Own]) -> Result<()> {
    let mut scenario = Scenario::without_nodes(Plane::shared().await?, &format!("selection-{profile}")).await?;
    let options = WebhookOptions::default().env("CAPACITY_PROFILE", profile).env("SPOT_PREFERENCE", preference);
    scenario.serve(1, &options).await?;
    let nodes = make_nodes(&scenario, shapes).await?;
    scenario.post(&driver(JOB).annotation("workload/spot-ratio", "0.5")).await?.pod()?;
    let (scenario, nodes) = (&scenario, nodes.as_slice());
    let posting = samples.iter().zip(1..).map(async |(own, id)| {
        ensure_runs_where_it_may(scenario, nodes, preference == "STRICT", own, id)
            .await
            .with_context(|| format!("executor {id}: {own:?}"))
    });
    let placed: Vec<bool> = futures::stream::iter(posting).buffer_unordered(AT_ONCE).try_collect().await?;
    // Some decide themselves, some do not: else this would prove nothing.
    let left = placed.iter().filter(|placed| !**placed).count();
    ensure!(left >= 5 && placed.len() - left >= 5, "{left} of {} were left alone", placed.len());

    // Those that have no node are counted as what was decided.
    let entries = balancer_tests::wait::until(REPAIRED, "all in the ledger", async || {
        let entries = scenario.entries(JOB).await?;
        Ok((entries.len() == samples.len()).then_some(entries))
    });
    let entries = entries.await?;
    for pod in scenario.live(JOB).await? {
        let Some(on) = pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()) else { continue };
        let real = capacity(nodes, on)?;
        let name = pod.name_any();
        ensure!(entries.get(&name).map(String::as_str) == Some(real), "{name} is on {real}: {:?}", entries.get(&name));
    }
    Ok(())
}

fn capacity<'a>(nodes: &'a [Node], name: &str) -> Result<&'a str> {
    let node = nodes.iter().find(|node| node.name_any() == name).with_context(|| format!("no node {name}"))?;
    node.labels().get(TRUTH).map(String::as_str).context("no capacity")
}

/// Posts an executor with a selection of its own; fails unless it may run, and runs, exactly where that and its
/// placement say. Returns whether it was placed.
async fn ensure_runs_where_it_may(
    scenario: &Scenario,
    nodes: &[Node],
    strict: bool,
    own: &Own,
    id: u32,
) -> Result<bool> {
    let posted = with_own(executor(JOB, id).on_pool(&scenario.namespace), nodes, own, id)?;
    let before: Pod = serde_json::from_value(posted.value().clone())?;
    let after = scenario.post(&posted).await?.pod()?;
    let (allowed, allows) = (nodes_for(&before, nodes), nodes_for(&after, nodes));
    let could = nodes_for(&tolerating_all(&before), nodes);
    let of = |names: &BTreeSet<String>, on: &str| -> Result<BTreeSet<String>> {
        let mut all = BTreeSet::new();
        for name in names {
            if capacity(nodes, name)? == on {
                all.insert(name.clone());
            }
        }
        Ok(all)
    };
    let (spot, on_demand) = (of(&could, "spot")?, of(&could, "on-demand")?);
    let decision = after.annotations().get(DECISION).map(String::as_str);
    match decision {
        Some("spot") if strict => ensure!(allows == spot, "on spot it may use {allows:?}, not {spot:?}"),
        Some("spot") => ensure!(allows == could, "it may use {allows:?}, not {could:?}"),
        Some("on-demand") => ensure!(allows == on_demand, "on on-demand it may use {allows:?}, not {on_demand:?}"),
        Some(other) => anyhow::bail!("the decision is {other}"),
        None => {
            ensure!(allows == allowed, "it was left alone, and may use {allows:?}, not {allowed:?}");
            ensure!(selection(&before) == selection(&after), "its selection was changed");
            ensure!(spot.is_empty() || on_demand.is_empty(), "it could run on both, and was left alone");
        }
    }
    if let Some(decision) = decision
        && !own.names_nodes
        && !could.is_empty()
    {
        let chosen = if decision == "spot" { &spot } else { &on_demand };
        ensure!(!chosen.is_empty() || (decision == "spot" && !strict), "it could run, and cannot on {decision}");
    }
    // And the scheduler agrees.
    let name = after.name_any();
    if allows.is_empty() {
        until_unschedulable(&scenario.pods(), &name).await?;
    } else {
        let on = until_bound(&scenario.pods(), &name).await?;
        ensure!(allows.contains(&on), "it is on {on}, and may use {allows:?}");
        // With room everywhere a preference is met.
        let preferred = decision == Some("spot") && !of(&allows, "spot")?.is_empty();
        ensure!(!preferred || capacity(nodes, &on)? == "spot", "it is on {on}, and spot has room");
    }
    Ok(decision.is_some())
}

/// The same pod, which no taint keeps from a node: that is what the tolerations of a profile are for.
fn tolerating_all(pod: &Pod) -> Pod {
    let mut pod = pod.clone();
    if let Some(spec) = pod.spec.as_mut() {
        let every = Toleration { operator: Some("Exists".to_owned()), ..Toleration::default() };
        spec.tolerations.get_or_insert_default().push(every);
    }
    pod
}

/// What a pod says about its nodes. The apiserver makes an empty list of a missing one.
fn selection(pod: &Pod) -> Value {
    let spec = pod.spec.clone().unwrap_or_default();
    let terms = spec.affinity.and_then(|affinity| affinity.node_affinity);
    let required = terms.and_then(|own| own.required_during_scheduling_ignored_during_execution);
    let terms: Vec<Value> = required
        .iter()
        .flat_map(|required| &required.node_selector_terms)
        .map(|term| {
            json!([term.match_expressions.as_deref().unwrap_or(&[]), term.match_fields.as_deref().unwrap_or(&[])])
        })
        .collect();
    json!([spec.node_selector, terms])
}

fn with_own(pod: PodBuilder, nodes: &[Node], own: &Own, id: u32) -> Result<PodBuilder> {
    let node = nodes.get(usize::try_from(id)? % nodes.len()).context("no node")?.name_any();
    let terms: Value = serde_json::from_str(&own.terms.to_string().replace("$NODE", &node))?;
    let pod = match &own.selector {
        Some((key, value)) => pod.node_selector(key, value),
        None => pod,
    };
    Ok(if terms.is_null() { pod } else { pod.node_terms(&terms) })
}
