//! The largest loss that `simulate` predicts is that of jobs which the real webhook, reconciler and scheduler place, and
//! whose nodes are then deleted at random.
//!
//! Time is the model's: the test draws when a node or a pool is lost within a month, by the rates that docs/simulation.md
//! states, and deletes it once the executors lost before have a node again. The cloud and the autoscaler are stand-ins.
//! Each job loses something, because the model knows the probability of that without a simulation: the test computes it
//! from where the executors are, and compares the losses of those jobs that have any.

#![allow(clippy::indexing_slicing, reason = "a panic here fails a test, as it should")]
#![allow(clippy::cast_precision_loss, reason = "a few hundred executors and jobs")]

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use balancer_tests::control_plane::Plane;
use balancer_tests::nodes;
use balancer_tests::platforms::{KARPENTER_ON_DEMAND, KARPENTER_SPOT, Shape};
use balancer_tests::pods::{self, JOB_ID_LABEL, driver, executor};
use balancer_tests::random::Random;
use balancer_tests::scenario::{Scenario, strict};
use balancer_tests::scheduling::{is_unschedulable, node_of};
use balancer_tests::wait::{SOON, until, until_true};
use balancer_tests::{need, plugin};
use futures::StreamExt;
use futures::future::try_join_all;
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;
use kube::runtime::reflector::{self, Store, reflector};
use kube::runtime::{WatchStreamExt, watcher};
use serde::Deserialize;
use serde_json::json;
use tokio::time::{MissedTickBehavior, interval, sleep};

const EXECUTORS: u32 = 30;
const JOBS: usize = 50;
/// So many jobs run at the same time. They do not disturb each other: each has nodes of its own, which only its executors
/// tolerate, and a ledger of its own.
const LANES: usize = 25;
/// Nearly a month, so that most jobs lose something.
const HOURS: f64 = 720.0;
const HOURS_OF_MONTH: f64 = 730.0;
/// The probability that a node is interrupted within a month.
const RATE: f64 = 0.33;
/// The share of a node's interruptions that take its pool.
const POOL_WIDE: f64 = 0.7;
/// More than this share of the executors lost at once is a risk, as `simulate` has it.
const RISKY: f64 = 1.0 / 3.0;
/// A comparison fails by chance with a probability of one in 100,000: the normal distribution is beyond so many standard
/// deviations then.
const Z: f64 = 4.42;
const CHANCE: f64 = 1e-5;

/// Between two looks at a job: each goes through the pods of all jobs.
const LOOK: Duration = Duration::from_millis(200);

/// Where a job's spot nodes are from.
#[derive(Clone, Copy)]
enum Supply {
    /// They are there, so many in each pool, with room for all.
    Ready([u32; 4]),
    /// They are added in the first pool that has capacity, with room for so many executors each. That takes longer than
    /// Spark's requests.
    Added(u32),
}

/// The instance types of the pools, in the order in which nodes are added.
const TYPES: [&str; 4] = ["m5.8xlarge", "m6i.8xlarge", "r5.8xlarge", "r6i.8xlarge"];

struct Setting {
    supply: Supply,
    max_pool_share: &'static str,
}

/// The spot executors of a job by their nodes.
type Placement = BTreeMap<String, Vec<Arc<Pod>>>;

/// What became of a job.
struct Played {
    /// Its executors by pools at its start.
    start: [usize; 4],
    /// The probability that it loses anything.
    any_loss: f64,
    losses: Vec<Lost>,
}

struct Lost {
    pool: usize,
    nodes: usize,
    executors: usize,
    /// By pools, once the lost executors are replaced.
    then: [usize; 4],
}

/// Nodes of a pool that may be lost together.
struct Loss {
    /// How often an hour.
    rate: f64,
    pool: usize,
    nodes: Vec<String>,
}

fn rate_of(losses: &[Loss]) -> f64 {
    losses.iter().map(|loss| loss.rate).sum()
}

struct Job {
    name: String,
    driver: String,
    driver_uid: String,
}

/// One job at a time, on nodes of its own.
struct Lane<'a> {
    scenario: &'a Scenario,
    setting: &'a Setting,
    /// All that the scenario has.
    executors: Store<Pod>,
    name: String,
    /// Its spot nodes.
    nodes: BTreeSet<String>,
}

impl Lane<'_> {
    async fn make_node(&self, name: &str, shape: &Shape, instance_type: &str, cpu: u32) -> Result<()> {
        let labels = [("node.kubernetes.io/instance-type", instance_type), ("topology.kubernetes.io/zone", "a")];
        let room = json!({"cpu": cpu.to_string(), "memory": "128Gi", "pods": "110"});
        nodes::of_size(&self.scenario.client, (&self.name, name), shape, &labels, &room).await
    }

    async fn make_on_demand_node(&self) -> Result<()> {
        self.make_node(&self.on_demand_node(), &KARPENTER_ON_DEMAND, TYPES[0], 64).await
    }

    async fn make_spot_node(&mut self, pool: usize, number: u32, cpu: u32) -> Result<()> {
        let name = format!("{}-{}-{number}", self.name, TYPES[pool]);
        if !self.nodes.contains(&name) {
            self.make_node(&name, &KARPENTER_SPOT, TYPES[pool], cpu).await?;
            self.nodes.insert(name);
        }
        Ok(())
    }

    /// Makes the nodes that are there, or those of them that are lost.
    async fn make_ready_nodes(&mut self) -> Result<()> {
        let Supply::Ready(counts) = self.setting.supply else { return Ok(()) };
        for (pool, count) in counts.into_iter().enumerate() {
            for number in 0..count {
                self.make_spot_node(pool, number, 32).await?;
            }
        }
        Ok(())
    }

    /// Requests executors as Spark does by its defaults.
    async fn request(&self, job: &Job, executors: usize) -> Result<()> {
        let ids: Vec<_> = self.scenario.fresh_ids().take(executors).collect();
        let mut turns = interval(Duration::from_secs(1));
        turns.set_missed_tick_behavior(MissedTickBehavior::Delay);
        for batch in ids.chunks(5) {
            turns.tick().await;
            for id in batch {
                let pod = executor(&job.name, *id).owned_by(&job.driver, &job.driver_uid).on_pool(&self.name);
                self.scenario.post(&pod).await?.pod()?;
            }
        }
        Ok(())
    }

    /// Waits until all executors are bound. Adds nodes for those that find none, but not in the pool that is out, and deletes
    /// what the scheduler has bound to nodes that it did not know to be gone, as the garbage collector of pods does.
    async fn until_placed(&mut self, job: &Job, out: Option<usize>) -> Result<Placement> {
        let on_demand = self.on_demand_node();
        until(SOON, &format!("the executors of {} to be bound", job.name), async || {
            sleep(LOOK).await;
            let (bound, waiting): (Vec<_>, Vec<_>) =
                self.watched(job).into_iter().partition(|pod| node_of(pod).is_some());
            let without_node = waiting.iter().filter(|pod| is_unschedulable(pod)).count();
            let is_decided = bound.len() + without_node == usize::try_from(EXECUTORS)?;
            ensure!(is_decided, "{} are bound, and {without_node} found no node", bound.len());
            let mut placement: Placement = self.nodes.iter().map(|node| (node.clone(), Vec::new())).collect();
            let mut late = Vec::new();
            for pod in bound.into_iter().filter(|pod| node_of(pod) != Some(&on_demand)) {
                match node_of(&pod).and_then(|node| placement.get_mut(node)) {
                    Some(pods) => pods.push(pod),
                    None => late.push(pod),
                }
            }
            if !late.is_empty() {
                self.remove(job, &late).await?;
                self.request(job, late.len()).await?;
            } else if without_node > 0 {
                self.add_nodes(&placement, without_node, out).await?;
            } else {
                placement.retain(|_, pods| !pods.is_empty());
                return Ok(Some(placement));
            }
            Ok(None)
        })
        .await
    }

    /// Adds nodes for executors that find none, if those that there are have no room for them.
    async fn add_nodes(&mut self, placement: &Placement, executors: usize, out: Option<usize>) -> Result<()> {
        let Supply::Added(room) = self.setting.supply else { return Ok(()) };
        let on_node = usize::try_from(room)?;
        let free = placement.values().map(|pods| on_node - pods.len()).sum();
        let pool = (0..TYPES.len()).find(|pool| Some(*pool) != out).context("no pool")?;
        let nodes = executors.saturating_sub(free).div_ceil(on_node);
        for number in self.scenario.fresh_ids().take(nodes) {
            self.make_spot_node(pool, number, room).await?;
        }
        Ok(())
    }

    /// The job's live executors, as a watch knows them: with many jobs, lists would take most of the machine's time.
    fn watched(&self, job: &Job) -> Vec<Arc<Pod>> {
        let is_of_job = |pod: &Pod| pod.labels().get(JOB_ID_LABEL).is_some_and(|of| *of == job.name);
        let mut pods = self.executors.state();
        pods.retain(|pod| is_of_job(pod) && pod.metadata.deletion_timestamp.is_none());
        pods
    }

    fn on_demand_node(&self) -> String {
        format!("{}-on-demand", self.name)
    }

    /// The pool of a node.
    fn pool_of(&self, node: &str) -> Result<usize> {
        let pool = |instance_type| node.starts_with(&format!("{}-{instance_type}-", self.name));
        TYPES.iter().position(pool).with_context(|| format!("{node} is in no pool"))
    }

    fn by_pool(&self, placement: &Placement) -> Result<[usize; 4]> {
        let mut pools = [0; 4];
        for (node, pods) in placement {
            pools[self.pool_of(node)?] += pods.len();
        }
        Ok(pools)
    }

    /// All that may be lost next.
    fn possible(&self, placement: &Placement) -> Result<Vec<Loss>> {
        let of_node = -(-RATE).ln_1p() / HOURS_OF_MONTH;
        let pools = placement.keys().map(|node| self.pool_of(node)).collect::<Result<BTreeSet<_>>>()?;
        let whole = pools.into_iter().map(|pool| {
            let nodes = placement.keys().filter(|node| self.pool_of(node).is_ok_and(|of| of == pool));
            anyhow::Ok(Loss { rate: of_node * POOL_WIDE, pool, nodes: nodes.cloned().collect() })
        });
        let alone = placement.keys().map(|node| {
            let rate = of_node * (1.0 - POOL_WIDE);
            anyhow::Ok(Loss { rate, pool: self.pool_of(node)?, nodes: vec![node.clone()] })
        });
        whole.chain(alone).collect()
    }

    /// Deletes nodes and their pods, as the lifecycle of nodes does. Returns how many executors are gone.
    async fn lose(&mut self, job: &Job, placement: &Placement, nodes: &[String]) -> Result<usize> {
        for node in nodes {
            nodes::remove(&self.scenario.client, node).await?;
            self.nodes.remove(node);
        }
        let lost: Vec<_> = nodes.iter().filter_map(|node| placement.get(node)).flatten().cloned().collect();
        self.remove(job, &lost).await?;
        Ok(lost.len())
    }

    /// Deletes executors, and waits until the watch knows it.
    async fn remove(&self, job: &Job, executors: &[Arc<Pod>]) -> Result<()> {
        let pods = self.scenario.pods();
        try_join_all(executors.iter().map(async |pod| pods::remove(&pods, &pod.name_any()).await)).await?;
        let gone: BTreeSet<_> = executors.iter().map(|pod| pod.uid()).collect();
        until_true(SOON, "the watch to know what is gone", async || {
            sleep(LOOK).await;
            Ok(self.watched(job).iter().all(|pod| !gone.contains(&pod.uid())))
        })
        .await
    }

    async fn play(&mut self, name: String, random: &mut Random) -> Result<Played> {
        self.make_ready_nodes().await?;
        let pod = driver(&name).annotation("workload/spot-ratio", "0.7").on_node(&self.on_demand_node());
        let posted =
            self.scenario.post(&pod.annotation("workload/max-pool-share", self.setting.max_pool_share)).await?;
        ensure!(posted.warnings.is_empty(), "{:?}", posted.warnings);
        let driver = posted.pod()?;
        let job = Job { name, driver: driver.name_any(), driver_uid: driver.uid().context("no uid")? };
        self.request(&job, usize::try_from(EXECUTORS)?).await?;

        let mut placement = self.until_placed(&job, None).await?;
        let start = self.by_pool(&placement)?;
        let any_loss = -(-rate_of(&self.possible(&placement)?) * HOURS).exp_m1();
        let (mut now, mut losses) = (0.0, Vec::new());
        let mut text = format!("{start:?} on {} nodes", placement.len());
        loop {
            let mut possible = self.possible(&placement)?;
            let rate = rate_of(&possible);
            // Each job loses something, as those that `simulate` plays do.
            let within_job = if losses.is_empty() { any_loss } else { 1.0 };
            now -= (-random.share() * within_job).ln_1p() / rate;
            if now >= HOURS {
                break;
            }
            let mut which = random.share() * rate;
            let at = possible.iter().position(|loss| {
                which -= loss.rate;
                which < 0.0
            });
            // Only rounding leads to the last one.
            let Loss { pool, nodes, .. } = possible.swap_remove(at.unwrap_or(possible.len() - 1));
            let executors = self.lose(&job, &placement, &nodes).await?;
            self.request(&job, executors).await?;
            placement = self.until_placed(&job, Some(pool)).await?;
            self.make_ready_nodes().await?;
            let (nodes, then) = (nodes.len(), self.by_pool(&placement)?);
            text += &format!(", loses {executors} on {nodes} of pool {pool}: {then:?}");
            losses.push(Lost { pool, nodes, executors, then });
        }
        println!("{}: {text}", job.name);
        self.clear(&job).await?;
        Ok(Played { start, any_loss, losses })
    }

    /// Removes the job and the nodes that were added for it.
    async fn clear(&mut self, job: &Job) -> Result<()> {
        self.remove(job, &self.watched(job)).await?;
        pods::remove(&self.scenario.pods(), &job.driver).await?;
        if let Supply::Added(_) = self.setting.supply {
            for node in std::mem::take(&mut self.nodes) {
                nodes::remove(&self.scenario.client, &node).await?;
            }
        }
        Ok(())
    }
}

/// Each job is placed anew. Its losses are drawn with its number as the seed, so only the scheduler differs from
/// run to run.
async fn play(purpose: &str, setting: &Setting) -> Result<Vec<Played>> {
    let mut scenario = Scenario::without_nodes(Plane::shared().await?, purpose).await?;
    // No executor has to run: what is measured is where the scheduler has bound it.
    scenario.kubelet = None;
    scenario.serve(1, &strict()).await?;
    let scenario = &scenario;
    let (executors, writer) = reflector::store();
    let all = watcher(scenario.pods(), watcher::Config::default().labels("spark-role=executor"));
    let watch = tokio::spawn(reflector(writer, all.default_backoff()).for_each(async |_| ()));
    let jobs = RefCell::new(0..JOBS);
    let next_job = || jobs.borrow_mut().next();
    let lanes = (0..LANES).map(async |number| {
        let name = format!("{}-{number}", scenario.namespace);
        let mut lane = Lane { scenario, setting, executors: executors.clone(), name, nodes: BTreeSet::new() };
        lane.make_on_demand_node().await?;
        let mut played = Vec::new();
        while let Some(job) = next_job() {
            let mut random = Random::of(u64::try_from(job)?);
            played.push(lane.play(format!("job-{job}"), &mut random).await?);
        }
        anyhow::Ok(played)
    });
    let played = try_join_all(lanes).await?.into_iter().flatten().collect();
    watch.abort();
    Ok(played)
}

#[derive(Debug, Deserialize)]
struct Simulation {
    forecasts: [Forecast; 1],
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Forecast {
    any_loss: f64,
    risk: Estimate,
    largest_loss: Spread,
    largest_pool: LargestPool,
}

#[derive(Debug, Deserialize)]
struct Spread {
    mean: Estimate,
}

#[derive(Debug, Deserialize)]
struct LargestPool {
    share: f64,
}

#[derive(Debug, Deserialize)]
struct Estimate {
    value: f64,
    low: f64,
    high: f64,
}

impl Setting {
    /// What `simulate` predicts for the job.
    async fn simulated(&self, nodes: &str) -> Result<Forecast> {
        let max_pool_share = self.max_pool_share;
        let options = format!(
            "simulate --executors {EXECUTORS} --hours {HOURS} --ratios 0.7 --shuffle 0 --spot-preference strict \
             --rates {RATE} --pool-wide {POOL_WIDE} --max-pool-share {max_pool_share} {nodes} -o json"
        );
        let kubeconfig = Plane::shared().await?.kubeconfig().to_owned();
        let output = plugin::run(&kubeconfig, &options.split_whitespace().collect::<Vec<_>>()).await?;
        let Simulation { forecasts: [forecast] } = serde_json::from_value(output.json()?)?;
        Ok(forecast)
    }
}

/// What the jobs have in common.
#[derive(Debug)]
struct Measured {
    jobs: usize,
    /// The mean of the largest share that a job loses at once.
    mean: f64,
    standard_error: f64,
    /// Jobs that lose more than a third at once.
    risky: usize,
    /// The mean probability that a job loses anything, by where it is.
    any_loss: f64,
    /// The mean share of the largest pool at the start.
    largest_pool: f64,
}

impl Measured {
    fn of(played: &[Played]) -> Self {
        let count = played.len() as f64;
        let share = |executors: usize| executors as f64 / f64::from(EXECUTORS);
        let largest = |job: &Played| share(job.losses.iter().map(|lost| lost.executors).max().unwrap_or_default());
        let mean = played.iter().map(largest).sum::<f64>() / count;
        let squares = played.iter().map(|job| (largest(job) - mean).powi(2)).sum::<f64>();
        let largest_pools = played.iter().map(|job| share(job.start.into_iter().max().unwrap_or_default()));
        Self {
            jobs: played.len(),
            mean,
            standard_error: (squares / (count - 1.0) / count).sqrt(),
            risky: played.iter().filter(|job| largest(job) > RISKY).count(),
            any_loss: played.iter().map(|job| job.any_loss).sum::<f64>() / count,
            largest_pool: largest_pools.sum::<f64>() / count,
        }
    }

    /// What differs from the simulation by more than chance.
    fn differences(&self, forecast: &Forecast) -> Vec<&'static str> {
        let Forecast { any_loss, risk, largest_loss: Spread { mean }, largest_pool } = forecast;
        // Of jobs that lose something.
        let among_losing = |value: f64| value / any_loss;
        let of_simulation = among_losing(mean.high - mean.low) / 2.0 / 1.96;
        let error = self.standard_error.hypot(of_simulation);
        let is_same = [
            ("mean", (self.mean - among_losing(mean.value)).abs() <= Z * error),
            ("risk", is_likely((self.risky, self.jobs), among_losing(risk.low), among_losing(risk.high))),
            // Which of the emptiest nodes the scheduler takes is random.
            ("any loss", (self.any_loss - any_loss).abs() <= 0.02),
            ("largest pool", (self.largest_pool - largest_pool.share).abs() * f64::from(EXECUTORS) <= 1.5),
        ];
        is_same.into_iter().filter(|(_, is_same)| !is_same).map(|(name, _)| name).collect()
    }

    /// Fails if it differs from what is simulated for these nodes, or not from what is simulated for others.
    async fn compare(&self, setting: &Setting, nodes: &str, others: &[(&str, &[&str])]) -> Result<()> {
        let forecast = setting.simulated(nodes).await?;
        println!("{self:?}\nsimulated: {forecast:?}");
        let differences = self.differences(&forecast);
        ensure!(differences.is_empty(), "{differences:?}: {self:?}, {forecast:?}");
        for (nodes, expected) in others {
            let forecast = setting.simulated(nodes).await?;
            let differences = self.differences(&forecast);
            println!("simulated {nodes}: {differences:?}, {forecast:?}");
            ensure!(expected.iter().all(|name| differences.contains(name)), "{nodes}: {differences:?}: {forecast:?}");
        }
        Ok(())
    }
}

/// Whether so many of all jobs are no surprise if each is one with a probability between these.
fn is_likely((count, jobs): (usize, usize), low: f64, high: f64) -> bool {
    let probability = |count: usize, p: f64| {
        let choices = (0..count).map(|i| (jobs - i) as f64 / (i + 1) as f64).product::<f64>();
        choices * p.powf(count as f64) * (1.0 - p).powf((jobs - count) as f64)
    };
    let at_most = (0..=count).map(|count| probability(count, low)).sum::<f64>();
    let at_least = (count..=jobs).map(|count| probability(count, high)).sum::<f64>();
    at_most.min(at_least) > CHANCE / 2.0
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_on_nodes_that_an_autoscaler_adds_loses_what_is_simulated() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler, Plugin);
    let setting = Setting { supply: Supply::Added(4), max_pool_share: "1" };
    let played = play("added", &setting).await?;
    // What is lost with a node first fills the room that others have, as a test of the model has it too.
    let first = played.iter().filter(|job| job.start == [21, 0, 0, 0]).filter_map(|job| job.losses.first());
    let after_node: Vec<_> = first.filter(|lost| (lost.pool, lost.nodes) == (0, 1)).map(|lost| lost.then).collect();
    ensure!(after_node.len() > 5 && after_node.iter().all(|then| *then == [20, 1, 0, 0]), "{after_node:?}");
    let others: [(&str, &[&str]); 2] = [("--executors-per-node 1", &["any loss"]), ("--ready-nodes 3", &["risk"])];
    Measured::of(&played).compare(&setting, "--executors-per-node 4", &others).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_with_a_share_on_nodes_that_are_there_loses_what_is_simulated() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler, Plugin);
    let setting = Setting { supply: Supply::Ready([8, 2, 1, 1]), max_pool_share: "0.3" };
    let played = play("share", &setting).await?;
    let others: [(&str, &[&str]); 2] = [("", &["mean"]), ("--ready-nodes 12 --pools 1", &["mean"])];
    Measured::of(&played).compare(&setting, "--ready-nodes 8,2,1,1", &others).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_on_nodes_that_are_there_is_spread_over_them_and_loses_what_is_simulated() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler, Plugin);
    let setting = Setting { supply: Supply::Ready([8, 2, 1, 1]), max_pool_share: "1" };
    let played = play("ready", &setting).await?;
    let others: [(&str, &[&str]); 2] = [("", &["any loss"]), ("--ready-nodes 3", &["largest pool"])];
    Measured::of(&played).compare(&setting, "--ready-nodes 8,2,1,1", &others).await
}
