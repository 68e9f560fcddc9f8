//! The life of one job while a cloud reclaims its spot executors: an event simulation with random losses. Pure: it receives
//! its random numbers.
//!
//! Placement is the product's own: [`decide`] chooses the capacity, [`SpotState`] closes spot and probes it, and [`Shares`]
//! says which pools to avoid. The cloud, Spark and the autoscaler are assumptions, each with its source in
//! docs/simulation.md.

use std::collections::VecDeque;
use std::sync::Arc;

use balancer_core::{
    Capacity, Counts, Millis, Policy, Pool, Ratio, Shares, SpotAnswer, SpotPreference, SpotState, Steering, decide,
};
use rand::{Rng, RngExt};

/// Losses within this time are one loss: in a study of 2,635 interruptions, that of when pools lost more machines.
pub(crate) const AT_ONCE_SECONDS: f64 = 180.0;
/// Karpenter launches nothing in a pool for this time after an interruption there.
pub(crate) const AVOIDED_AFTER_INTERRUPTION_SECONDS: f64 = 180.0;
/// Of the two minutes of notice, what docs/spark.md leaves for the migration of blocks.
pub(crate) const HAND_OVER_SECONDS: f64 = 100.0;
/// The part of the recomputation that reused volumes save, by AWS's run times: (1024 s - 627 s) / (1024 s - 565 s).
pub(crate) const KEPT_ON_VOLUMES: f64 = 397.0 / 459.0;
/// A job that takes so many times its hours is not simulated to its end.
const GIVE_UP_AFTER: f64 = 50.0;
/// The hours of a month, by which clouds state rates.
const HOURS_OF_MONTH: f64 = 730.0;
/// Spark requests so many executors in a second by its defaults (`spark.kubernetes.allocation.batch.size` and
/// `spark.kubernetes.allocation.batch.delay`).
const SPARK_BATCH: u32 = 5;
/// A job that is so large that its requests would take longer than so many seconds has a larger batch.
const BATCHES: u32 = 1000;
/// An event takes as long as looking at so many pools, in addition to those that there are.
const STEPS_OF_AN_EVENT: u64 = 4;

/// What the job does, and what happens to its data when executors are lost.
#[derive(Clone, Debug)]
pub(crate) struct Job {
    pub(crate) executors: u32,
    /// The run time with all executors and no loss.
    pub(crate) hours: f64,
    /// The shuffle data on each executor, in GB.
    pub(crate) shuffle: f64,
    /// Parts of equal size, each of which ends with its result in durable storage.
    pub(crate) stages: u32,
    pub(crate) decommission: bool,
    pub(crate) pvc_reuse: bool,
}

/// Spot nodes that the cloud reclaims together.
#[derive(Clone, Debug)]
pub(crate) struct SpotPool {
    pub(crate) name: String,
    /// The probability that one node is interrupted within a month.
    pub(crate) rate: f64,
    /// The share of the on-demand price that spot saves.
    pub(crate) discount: f64,
    /// The nodes that are there before the job starts, with room for all of it. The scheduler spreads executors over them.
    /// `None` if an autoscaler adds nodes.
    pub(crate) ready_nodes: Option<u32>,
}

/// What the cloud and the cluster do.
#[derive(Clone, Debug)]
pub(crate) struct Cloud {
    /// In the order in which an autoscaler chooses them.
    pub(crate) pools: Vec<SpotPool>,
    /// The share of a node's interruptions that reclaim its whole pool.
    pub(crate) pool_wide: f64,
    /// Of nodes that an autoscaler adds.
    pub(crate) executors_per_node: u32,
    /// For how long on average a pool has no capacity after it was reclaimed.
    pub(crate) shortage_seconds: f64,
    /// From the request of a replacement until it works.
    pub(crate) replacement_seconds: f64,
    /// From the request of an executor until it has a node, so that the reconciler knows its pool.
    pub(crate) node_start_seconds: f64,
    /// How fast an executor hands over its shuffle data, in GB per second.
    pub(crate) hand_over: f64,
}

/// Everything that all simulated policies share.
#[derive(Clone, Debug)]
pub(crate) struct Scenario {
    pub(crate) job: Job,
    pub(crate) cloud: Cloud,
    pub(crate) preference: SpotPreference,
}

/// What became of a job.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Outcome {
    /// In relation to the job without losses on on-demand alone.
    pub(crate) cost: f64,
    pub(crate) hours: f64,
    /// The largest share of the executors that was lost at once.
    pub(crate) largest_loss: f64,
    /// Executors that were lost.
    pub(crate) lost: u32,
    /// Work that was done again, in relation to the work of the job.
    pub(crate) recomputed: f64,
    /// For how long executors had no node because there was no spot, in executor-hours.
    pub(crate) waited: f64,
    /// Whether the job was given up.
    pub(crate) is_unfinished: bool,
    /// What the simulation had to do: events, and pools and executors that it looked at.
    pub(crate) steps: u64,
}

/// One job with one policy.
#[derive(Clone, Debug)]
pub(crate) struct Model<'a> {
    scenario: &'a Scenario,
    policy: Policy,
    start: Cluster,
}

/// What is lost next.
trait Losses {
    /// How long until the next loss, if this is the rate of losses per second. `None` if there is none.
    fn next(&mut self, rate: f64) -> Option<f64>;
    /// From 0 to 1: which of all that may be lost.
    fn which(&mut self) -> f64;
    /// A time of this mean.
    fn time(&mut self, mean: f64) -> f64;
}

struct Random<'r, R>(&'r mut R);

impl<R: Rng> Losses for Random<'_, R> {
    fn next(&mut self, rate: f64) -> Option<f64> {
        (rate > 0.0).then(|| self.time(1.0 / rate))
    }

    fn which(&mut self) -> f64 {
        self.0.random()
    }

    fn time(&mut self, mean: f64) -> f64 {
        // `random` is less than 1.
        -mean * (-self.0.random::<f64>()).ln_1p()
    }
}

/// No loss except the one that is given. A shortage has its mean length.
struct Once;

impl Losses for Once {
    fn next(&mut self, _: f64) -> Option<f64> {
        None
    }

    fn which(&mut self) -> f64 {
        0.0
    }

    fn time(&mut self, mean: f64) -> f64 {
        mean
    }
}

/// Something that the cloud takes back.
#[derive(Clone, Copy, Debug)]
enum Loss {
    Pool(usize),
    Node(usize),
    /// As the rates of the running executors have it.
    Any,
}

impl<'a> Model<'a> {
    /// The job with all of its executors running.
    pub(crate) fn new(scenario: &'a Scenario, policy: Policy) -> Self {
        let mut start = Cluster::new(scenario);
        start.missing = scenario.job.executors;
        while start.missing > 0 {
            start.request(scenario, policy, start.next_batch_at);
        }
        start.start_all();
        Self { scenario, policy, start }
    }

    /// The job's executors at its start.
    pub(crate) fn counts(&self) -> Counts {
        Counts { spot: u64::from(self.start.on_spot()), on_demand: u64::from(self.start.on_demand.running) }
    }

    /// The name of the pool with the most executors, and how many they are; `None` if there is no spot executor.
    pub(crate) fn largest_pool(&self) -> Option<(&'a str, u32)> {
        let (at, executors) = self.largest()?;
        Some((&self.scenario.cloud.pools.get(at)?.name, executors))
    }

    fn largest(&self) -> Option<(usize, u32)> {
        let pools = self.start.pools.iter().map(|pool| pool.nodes.running).enumerate();
        pools.filter(|(_, running)| *running > 0).max_by_key(|(at, running)| (*running, usize::MAX - at))
    }

    /// The outcome without any loss.
    pub(crate) fn undisturbed(&self) -> Outcome {
        let Job { executors, hours, .. } = self.scenario.job;
        let pools = self.start.pools.iter().zip(&self.scenario.cloud.pools);
        let saved = pools.map(|(pool, spot)| f64::from(pool.nodes.running) / f64::from(executors) * spot.discount);
        Outcome { cost: 1.0 - saved.sum::<f64>(), hours, ..Outcome::default() }
    }

    /// The probability that the job loses anything.
    pub(crate) fn disturbance(&self) -> f64 {
        -(-self.start.rate(self.scenario) * self.seconds()).exp_m1()
    }

    /// The outcome if at least one loss happens. Most jobs have none, so they need no simulation.
    /// It is given up after so many steps.
    pub(crate) fn disturbed(&self, random: &mut impl Rng, most_steps: u64) -> Outcome {
        let rate = self.start.rate(self.scenario);
        let first = -(-random.random::<f64>() * self.disturbance()).ln_1p() / rate;
        self.run(&mut Random(random), first, Loss::Any, most_steps)
    }

    /// The outcome if nothing is lost except the largest pool, just before a stage ends.
    pub(crate) fn largest_pool_lost(&self) -> Option<Outcome> {
        let (pool, _) = self.largest()?;
        Some(self.run(&mut Once, self.seconds() * (1.0 - 1e-9), Loss::Pool(pool), u64::MAX))
    }

    fn seconds(&self) -> f64 {
        self.scenario.job.hours * 3600.0
    }

    fn run(&self, losses: &mut impl Losses, first_at: f64, first: Loss, most_steps: u64) -> Outcome {
        let job = &self.scenario.job;
        let work = f64::from(job.executors) * self.seconds();
        let stage = work / f64::from(job.stages);
        let give_up_at = GIVE_UP_AFTER * self.seconds();
        let (mut cluster, mut outcome) = (Cluster { steps: 0, ..self.start.clone() }, Outcome::default());
        let (mut now, mut stages_left, mut progress) = (0.0, job.stages, 0.0);
        let (mut first, mut recent) = (Some((first_at, first)), Recent::default());
        let (mut cost, mut waited, mut recomputed) = (0.0, 0.0, 0.0);
        let steps = STEPS_OF_AN_EVENT + cluster.pools.len() as u64;
        while stages_left > 0 && now < give_up_at && cluster.steps < most_steps {
            cluster.steps += steps;
            let running = f64::from(cluster.running());
            let stage_ends = if running > 0.0 { now + (stage - progress) / running } else { f64::INFINITY };
            let changes = cluster.next_change(self.policy, now);
            let (lost_at, loss) = first.unwrap_or_else(|| {
                let next = losses.next(cluster.rate(self.scenario));
                (next.map_or(f64::INFINITY, |after| now + after), Loss::Any)
            });
            let then = stage_ends.min(changes).min(lost_at).min(give_up_at);
            let passed = then - now;
            progress += running * passed;
            cost += cluster.price(self.scenario) * passed;
            waited += f64::from(cluster.waiting()) * passed;
            now = then;
            if stage_ends <= then {
                (stages_left, progress) = (stages_left - 1, 0.0);
            } else if lost_at <= then {
                first = None;
                let before = cluster.running();
                let lost = cluster.lose(self.scenario, loss, losses, now);
                let again = progress * self.shuffle_lost(lost, before);
                progress -= again;
                recomputed += again;
                outcome.lost += lost;
                let at_once = f64::from(recent.add(now, lost)) / f64::from(job.executors);
                outcome.largest_loss = outcome.largest_loss.max(at_once.min(1.0));
                cluster.request(self.scenario, self.policy, now);
            } else {
                cluster.change(self.scenario, self.policy, now);
            }
        }
        Outcome {
            cost: cost / work,
            hours: now / 3600.0,
            recomputed: recomputed / work,
            waited: waited / 3600.0,
            is_unfinished: stages_left > 0,
            steps: cluster.steps,
            ..outcome
        }
    }

    /// The share of the shuffle data that is gone if so many of the running executors are lost.
    fn shuffle_lost(&self, lost: u32, running: u32) -> f64 {
        let (job, cloud) = (&self.scenario.job, &self.scenario.cloud);
        if lost == 0 || job.shuffle <= 0.0 {
            return 0.0;
        }
        let receivers = f64::from(lost.min(running - lost));
        let room = HAND_OVER_SECONDS * cloud.hand_over * receivers;
        let handed_over = if job.decommission { (room / (f64::from(lost) * job.shuffle)).min(1.0) } else { 0.0 };
        let kept = if job.pvc_reuse { KEPT_ON_VOLUMES } else { 0.0 };
        f64::from(lost) / f64::from(running) * (1.0 - handed_over) * (1.0 - kept)
    }
}

/// What was lost not long ago.
#[derive(Default)]
struct Recent {
    lost: VecDeque<(f64, u32)>,
}

impl Recent {
    /// Adds a loss, and returns how much was lost at once with it.
    fn add(&mut self, now: f64, lost: u32) -> u32 {
        self.lost.push_back((now, lost));
        self.lost.retain(|(at, _)| now - at < AT_ONCE_SECONDS);
        self.lost.iter().map(|(_, lost)| lost).sum()
    }
}

/// The executors on nodes of one kind.
#[derive(Clone, Copy, Debug, Default)]
struct Nodes {
    running: u32,
    /// Their nodes start.
    starting: u32,
}

impl Nodes {
    fn all(self) -> u32 {
        self.running + self.starting
    }
}

#[derive(Clone, Debug)]
struct PoolState {
    name: Arc<Pool>,
    nodes: Nodes,
    ready_nodes: Option<u32>,
    /// Until then it has no more capacity.
    out_until: f64,
    /// Until then one of several nodes that are there without an autoscaler is missing.
    node_out_until: f64,
}

impl PoolState {
    /// Nodes with executors. An autoscaler fills a node before it adds the next one, and the scheduler takes empty nodes.
    fn used_nodes(&self, on_added_node: u32) -> u32 {
        let running = self.nodes.running;
        self.ready_nodes.map_or(running.div_ceil(on_added_node), |nodes| nodes.min(running))
    }

    /// For how many more executors the nodes that an autoscaler has added have room.
    fn room(&self, on_added_node: u32) -> u32 {
        self.nodes.all().next_multiple_of(on_added_node) - self.nodes.all()
    }

    /// How many executors each of the nodes that are there would have with half of one more: the scheduler takes one of the
    /// emptiest nodes at random, so that each pool has its share of them on average. `None` if there is no node.
    fn executors_on_ready_node(&self, now: f64) -> Option<f64> {
        let nodes = self.ready_nodes? - u32::from(self.node_out_until > now);
        (self.out_until <= now).then(|| (f64::from(self.nodes.all()) + 0.5) / f64::from(nodes))
    }
}

/// Where an executor runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Pool(usize),
    OnDemand,
}

#[derive(Clone, Copy, Debug)]
struct Starting {
    /// When their node is there.
    bound_at: f64,
    ready_at: f64,
    place: Place,
    executors: u32,
    has_probe: bool,
}

/// Executors that may run on spot only, while there is none.
#[derive(Clone, Copy, Debug)]
struct Waiting {
    since: f64,
    executors: u32,
    has_probe: bool,
}

/// The job's executors, and what its ledger has.
#[derive(Clone, Debug)]
struct Cluster {
    counts: Counts,
    spot: SpotState,
    has_probe: bool,
    pools: Vec<PoolState>,
    on_demand: Nodes,
    /// In the order in which they are ready.
    starting: VecDeque<Starting>,
    /// In the order in which they were placed.
    waiting: VecDeque<Waiting>,
    /// Executors that were lost or replaced, and that Spark requests again.
    missing: u32,
    /// Not before that, because Spark pauses between its requests.
    next_batch_at: f64,
    replaced_at: f64,
    steps: u64,
}

impl Cluster {
    fn new(scenario: &Scenario) -> Self {
        let pool = |spot: &SpotPool| PoolState {
            name: Arc::new(Pool { instance_type: spot.name.as_str().into(), zone: "zone".into() }),
            nodes: Nodes::default(),
            ready_nodes: spot.ready_nodes,
            out_until: 0.0,
            node_out_until: 0.0,
        };
        Self {
            counts: Counts::default(),
            spot: SpotState::Open,
            has_probe: false,
            pools: scenario.cloud.pools.iter().map(pool).collect(),
            on_demand: Nodes::default(),
            starting: VecDeque::new(),
            waiting: VecDeque::new(),
            missing: 0,
            next_batch_at: 0.0,
            replaced_at: f64::NEG_INFINITY,
            steps: 0,
        }
    }

    fn on_spot(&self) -> u32 {
        self.pools.iter().map(|pool| pool.nodes.running).sum()
    }

    fn running(&self) -> u32 {
        self.on_demand.running + self.on_spot()
    }

    fn waiting(&self) -> u32 {
        self.waiting.iter().map(|waiting| waiting.executors).sum()
    }

    /// What the nodes cost, in executors on on-demand.
    fn price(&self, scenario: &Scenario) -> f64 {
        let spot = self.pools.iter().zip(&scenario.cloud.pools);
        let spot = spot.map(|(pool, spot)| f64::from(pool.nodes.all()) * (1.0 - spot.discount));
        f64::from(self.on_demand.all()) + spot.sum::<f64>()
    }

    /// For each pool: how often per second it is reclaimed, and how often a node of it alone.
    fn rates(&self, scenario: &Scenario) -> impl Iterator<Item = (f64, f64)> {
        let Cloud { pool_wide, executors_per_node, .. } = scenario.cloud;
        self.pools.iter().zip(&scenario.cloud.pools).map(move |(pool, spot)| {
            // Of one node, as an exponential distribution with this probability in a month.
            let of_node = -(-spot.rate).ln_1p() / (HOURS_OF_MONTH * 3600.0);
            let nodes = pool.used_nodes(executors_per_node);
            let is_used = if nodes > 0 { 1.0 } else { 0.0 };
            (of_node * pool_wide * is_used, of_node * (1.0 - pool_wide) * f64::from(nodes))
        })
    }

    /// How often something is lost, per second.
    fn rate(&self, scenario: &Scenario) -> f64 {
        self.rates(scenario).map(|(pool, nodes)| pool + nodes).sum()
    }

    /// Places a batch of executors as the webhook does, and gives them nodes as an autoscaler does. The pools to avoid are
    /// those from before the batch.
    fn place(&mut self, scenario: &Scenario, policy: Policy, executors: u32, now: f64) {
        self.steps += u64::from(executors);
        let avoided = self.avoided(policy.max_pool_share, now);
        let (mut spot, mut has_probe) = (0, false);
        for _ in 0..executors {
            let mut capacity = decide(self.counts, policy).unwrap_or(Capacity::OnDemand);
            if capacity == Capacity::Spot {
                match self.spot.answer(millis(now), |_| self.has_probe) {
                    SpotAnswer::Unchanged => {}
                    SpotAnswer::Closed => capacity = Capacity::OnDemand,
                    SpotAnswer::Probe => {
                        if let SpotState::Starved { since, .. } | SpotState::Probing { since, .. } = self.spot {
                            self.spot = SpotState::Probing { since, executor: "probe".to_owned() };
                        }
                        (self.has_probe, has_probe) = (true, true);
                    }
                }
            }
            self.counts.add(capacity);
            spot += u32::from(capacity == Capacity::Spot);
        }
        self.launch(scenario, Place::OnDemand, executors - spot, false, now);
        if spot > 0 {
            self.launch_on_spot(scenario, &avoided, Waiting { since: now, executors: spot, has_probe }, now);
        }
    }

    fn launch_on_spot(&mut self, scenario: &Scenario, avoided: &[String], executors: Waiting, now: f64) {
        let Waiting { executors: mut left, mut has_probe, .. } = executors;
        while left > 0 {
            let Some((pool, room)) = self.choose_pool(scenario, avoided, now) else { break };
            let launched = room.min(left);
            self.steps += self.pools.len() as u64;
            self.launch(scenario, Place::Pool(pool), launched, has_probe, now);
            (left, has_probe) = (left - launched, false);
        }
        match scenario.preference {
            _ if left == 0 => {}
            SpotPreference::Strict => self.waiting.push_back(Waiting { executors: left, has_probe, ..executors }),
            SpotPreference::BestEffort => {
                // The reconciler counts an executor as what it runs on.
                for _ in 0..left {
                    self.counts.remove(Capacity::Spot);
                    self.counts.add(Capacity::OnDemand);
                }
                self.launch(scenario, Place::OnDemand, left, false, now);
            }
        }
    }

    fn has_ready_nodes(&self) -> bool {
        self.pools.iter().any(|pool| pool.ready_nodes.is_some())
    }

    /// The instance types that new executors avoid.
    fn avoided(&self, most: Ratio, now: f64) -> Vec<String> {
        if most == Ratio::ONE { Vec::new() } else { self.shares(now).avoided(most) }
    }

    /// Where the next executors go, and how many of them. The scheduler takes the emptiest of the nodes that are there. If
    /// an autoscaler adds nodes, those that it has added are filled first, and then it takes the first pool that has
    /// capacity. Pools to avoid are the last choice of both.
    fn choose_pool(&self, scenario: &Scenario, avoided: &[String], now: f64) -> Option<(usize, u32)> {
        let is_avoided = |pool: &PoolState| avoided.iter().any(|name| **name == *pool.name.instance_type);
        let pools = || self.pools.iter().enumerate();
        let is_open = |pool: &PoolState| pool.out_until <= now;
        if self.has_ready_nodes() {
            let order = |pool: &PoolState| Some((is_avoided(pool), pool.executors_on_ready_node(now)?));
            let open = pools().filter_map(|(at, pool)| Some((at, order(pool)?)));
            let emptiest = open.min_by(|(_, (one_avoided, one)), (_, (other_avoided, other))| {
                one_avoided.cmp(other_avoided).then(one.total_cmp(other))
            });
            return emptiest.map(|(at, _)| (at, 1));
        }
        let room = |pool: &PoolState| pool.room(scenario.cloud.executors_per_node);
        let with_room = pools().filter(|(_, pool)| room(pool) > 0).min_by_key(|(_, pool)| is_avoided(pool));
        let open = || pools().filter(|(_, pool)| is_open(pool)).min_by_key(|(_, pool)| is_avoided(pool));
        with_room.map(|(at, pool)| (at, room(pool))).or_else(|| open().map(|(at, _)| (at, u32::MAX)))
    }

    /// What the reconciler knows about the job's pools: an executor has one as soon as it has a node.
    fn shares(&self, now: f64) -> Shares {
        let mut bound: Vec<u32> = self.pools.iter().map(|pool| pool.nodes.running).collect();
        for starting in self.starting.iter().filter(|starting| starting.bound_at <= now) {
            if let Place::Pool(pool) = starting.place
                && let Some(bound) = bound.get_mut(pool)
            {
                *bound += starting.executors;
            }
        }
        let spot: u32 = bound.iter().sum();
        let pools = self.pools.iter().zip(bound).filter(|(_, bound)| *bound > 0);
        let pools = pools.map(|(pool, bound)| (Arc::clone(&pool.name), bound)).collect();
        let all = u32::try_from(self.counts.spot).unwrap_or(u32::MAX);
        Shares { spot, pools, waiting: all.saturating_sub(spot), ..Shares::default() }
    }

    fn launch(&mut self, scenario: &Scenario, place: Place, executors: u32, has_probe: bool, now: f64) {
        if executors == 0 {
            return;
        }
        if let Some(nodes) = self.nodes(place) {
            nodes.starting += executors;
        }
        let bound_at = now + scenario.cloud.node_start_seconds;
        let ready_at = now + scenario.cloud.replacement_seconds;
        // Of the same request.
        let mut others = self.starting.iter_mut().rev().take_while(|other| other.ready_at.total_cmp(&ready_at).is_eq());
        match others.find(|other| other.place == place && !has_probe) {
            Some(other) => other.executors += executors,
            None => self.starting.push_back(Starting { bound_at, ready_at, place, executors, has_probe }),
        }
    }

    fn nodes(&mut self, place: Place) -> Option<&mut Nodes> {
        match place {
            Place::OnDemand => Some(&mut self.on_demand),
            Place::Pool(pool) => self.pools.get_mut(pool).map(|pool| &mut pool.nodes),
        }
    }

    fn start_all(&mut self) {
        while let Some(starting) = self.starting.pop_front() {
            self.start(starting);
        }
        self.next_batch_at = 0.0;
    }

    fn start(&mut self, ready: Starting) {
        let Starting { place, executors, has_probe, .. } = ready;
        if let Some(nodes) = self.nodes(place) {
            nodes.starting -= executors;
            nodes.running += executors;
        }
        if has_probe {
            (self.spot, self.has_probe) = (SpotState::Open, false);
        }
    }

    /// When something happens to the executors that have no running node.
    fn next_change(&self, policy: Policy, now: f64) -> f64 {
        let ready = self.starting.front().map_or(f64::INFINITY, |starting| starting.ready_at);
        let requested = if self.missing > 0 { self.next_batch_at } else { f64::INFINITY };
        let ready = ready.min(requested).max(now);
        let Some(oldest) = self.waiting.front() else { return ready };
        let opens = self.pools.iter().map(|pool| pool.out_until).fold(f64::INFINITY, f64::min);
        let replaced = self.replacement_at(policy, oldest.since);
        ready.min(opens).min(replaced).max(now)
    }

    /// When the reconciler replaces executors of which the first has waited since then.
    fn replacement_at(&self, policy: Policy, since: f64) -> f64 {
        match policy.spot_fallback_seconds {
            0 => f64::INFINITY,
            seconds => (since + f64::from(seconds)).max(self.replaced_at + seconds_of(Steering::REPLACEMENT_PAUSE)),
        }
    }

    fn change(&mut self, scenario: &Scenario, policy: Policy, now: f64) {
        while self.starting.front().is_some_and(|starting| starting.ready_at <= now) {
            if let Some(starting) = self.starting.pop_front() {
                self.start(starting);
            }
        }
        if self.pools.iter().any(|pool| pool.out_until <= now) {
            for waiting in std::mem::take(&mut self.waiting) {
                let avoided = self.avoided(policy.max_pool_share, now);
                self.launch_on_spot(scenario, &avoided, waiting, now);
            }
        }
        if self.waiting.front().is_some_and(|oldest| self.replacement_at(policy, oldest.since) <= now) {
            self.fall_back(policy, now);
        }
        self.request(scenario, policy, now);
    }

    /// What the reconciler does about executors that have waited for too long.
    fn fall_back(&mut self, policy: Policy, now: f64) {
        let is_ripe = |waiting: &Waiting| now - waiting.since >= f64::from(policy.spot_fallback_seconds);
        let is_open = self.spot == SpotState::Open;
        if self.waiting.iter().any(|waiting| is_ripe(waiting) && (is_open || waiting.has_probe)) {
            self.spot = self.spot.closed(Millis::from(policy.spot_retry_seconds) * 1000, millis(now));
            // A state without a probe has none that could open it.
            self.has_probe = false;
            self.waiting.iter_mut().for_each(|waiting| waiting.has_probe = false);
        }
        let live = usize::try_from(self.counts.total()).unwrap_or(usize::MAX);
        let mut left = u32::try_from(Steering::replaced_at_once(live)).unwrap_or(u32::MAX);
        while left > 0 && self.waiting.front().is_some_and(is_ripe) {
            let Some(mut oldest) = self.waiting.pop_front() else { break };
            let replaced = oldest.executors.min(left);
            (left, oldest.executors) = (left - replaced, oldest.executors - replaced);
            if oldest.executors > 0 {
                self.waiting.push_front(oldest);
            }
            self.remove_from_spot(replaced);
        }
        self.replaced_at = now;
    }

    fn remove_from_spot(&mut self, executors: u32) {
        (0..executors).for_each(|_| self.counts.remove(Capacity::Spot));
        self.missing += executors;
    }

    /// Requests a batch of what is missing, as Spark does every second.
    fn request(&mut self, scenario: &Scenario, policy: Policy, now: f64) {
        if self.missing == 0 || now < self.next_batch_at {
            return;
        }
        let batch = (scenario.job.executors / BATCHES).max(SPARK_BATCH).min(self.missing);
        self.missing -= batch;
        self.next_batch_at = now + 1.0;
        self.place(scenario, policy, batch, now);
    }

    /// Removes what is lost. Returns how many running executors are.
    fn lose(&mut self, scenario: &Scenario, loss: Loss, losses: &mut impl Losses, now: f64) -> u32 {
        let loss = match loss {
            Loss::Any => self.choose_loss(scenario, losses.which()),
            given => Some(given),
        };
        match loss {
            Some(Loss::Pool(at)) => self.lose_pool(at, now + losses.time(scenario.cloud.shortage_seconds)),
            Some(Loss::Node(at)) => {
                let is_one_of = |nodes: f64| losses.which() * nodes < 1.0;
                self.lose_node(at, scenario.cloud.executors_per_node, is_one_of, now)
            }
            Some(Loss::Any) | None => 0,
        }
    }

    /// What is lost at this point of all rates, from 0 to 1.
    fn choose_loss(&self, scenario: &Scenario, which: f64) -> Option<Loss> {
        let mut left = which * self.rate(scenario);
        let mut possible = None;
        for (at, (pool, nodes)) in self.rates(scenario).enumerate() {
            for (loss, rate) in [(Loss::Pool(at), pool), (Loss::Node(at), nodes)] {
                if rate > 0.0 {
                    possible = Some(loss);
                    if left < rate {
                        return possible;
                    }
                    left -= rate;
                }
            }
        }
        // Only rounding leads here.
        possible
    }

    fn lose_pool(&mut self, at: usize, out_until: f64) -> u32 {
        let Some(pool) = self.pools.get_mut(at) else { return 0 };
        let lost = std::mem::take(&mut pool.nodes);
        pool.out_until = pool.out_until.max(out_until);
        let (gone, others) = self.starting.drain(..).partition(|starting| starting.place == Place::Pool(at));
        self.starting = others;
        let gone: VecDeque<Starting> = gone;
        if gone.iter().any(|starting| starting.has_probe) {
            self.has_probe = false;
        }
        self.remove_from_spot(lost.all());
        lost.running
    }

    /// `is_one_of` is whether the lost node is one of those that differ, which are one of so many nodes.
    fn lose_node(&mut self, at: usize, on_node: u32, is_one_of: impl FnOnce(f64) -> bool, now: f64) -> u32 {
        let Some(pool) = self.pools.get_mut(at) else { return 0 };
        let running = pool.nodes.running;
        let used = pool.used_nodes(on_node);
        let lost = match pool.ready_nodes {
            // The scheduler gives some nodes one more than others.
            Some(_) => match (running.checked_div(used), running.checked_rem(used)) {
                (Some(each), Some(more)) if more > 0 && is_one_of(f64::from(used) / f64::from(more)) => each + 1,
                (each, _) => each.unwrap_or_default(),
            },
            // One node is not full if the executors do not fill all of them.
            None => match running % on_node {
                rest if rest > 0 && is_one_of(f64::from(used)) => rest,
                _ => on_node.min(running),
            },
        };
        pool.nodes.running -= lost;
        let out_until = now + AVOIDED_AFTER_INTERRUPTION_SECONDS;
        let out = if pool.ready_nodes.is_some_and(|nodes| nodes > 1) {
            &mut pool.node_out_until
        } else {
            &mut pool.out_until
        };
        *out = out.max(out_until);
        self.remove_from_spot(lost);
        lost
    }
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "times are positive and far below 2^53 ms")]
fn millis(seconds: f64) -> Millis {
    (seconds * 1000.0).round() as Millis
}

#[expect(clippy::cast_precision_loss, reason = "a few seconds")]
fn seconds_of(millis: Millis) -> f64 {
    millis as f64 / 1000.0
}

#[cfg(test)]
mod tests;
