//! Simulates many jobs while spot runs out now and then: how long they lack executors, what they cost, and how much of
//! them is on spot at the end. The ledger is the real one. Cluster, prices and shortages are assumptions: see the constants.
//! The reconciler's part is kept short here: its rules about closing, opening and steps, but no failures.
//!
//! ```sh
//! cargo run --release -p balancer-core --example shortage -- 10000    # jobs
//! ```

use balancer_core::{
    Capacity, JobLedger, Millis, PlaceOutcome, PlaceRequest, Policy, PolicyOverrides, Ratio, SpotAnswer, Steer, Term,
};

/// The seconds of one step of the simulation.
const STEP: u64 = 5;
/// A node starts within this time if there is capacity.
const NODE_STARTS: u64 = 60;
/// Each executor is idle at some time, so that Spark removes it and requests another one later: dynamic allocation.
const MEAN_LIFE: f64 = 1800.0;
/// The work of a job: as much as all of its executors do in this time.
const WORK: u64 = 2 * 3600;
/// A job that takes longer than this is not simulated to its end.
const LONGEST: u64 = 24 * 3600;
/// There is spot for this time on average, and then none for that time.
const MEAN_SUPPLY: f64 = 2.0 * 3600.0;
const MEAN_SHORTAGE: f64 = 30.0 * 60.0;
/// The price of an executor on spot, if one on on-demand costs 1.
const SPOT_PRICE: f64 = 0.3;
const FALLBACK: u64 = 120;
const RETRY: u64 = 300;

/// What happens to an executor that finds no spot.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Mode {
    /// Nothing, because there is no shortage.
    Plenty,
    /// It runs on on-demand, because it only prefers spot.
    BestEffort,
    /// It waits.
    Strict,
    /// It waits, and is replaced.
    Fallback,
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// From 0 to 1.
    #[expect(clippy::cast_precision_loss, reason = "53 bits are exact")]
    fn share(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Some seconds, of this mean.
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "it is positive and small")]
    fn seconds(&mut self, mean: f64) -> u64 {
        (-mean * (1.0 - self.share()).ln()) as u64 + 1
    }
}

/// Where an executor is, and since when.
#[derive(Clone, Copy)]
enum State {
    Waits { since: u64, node_since: Option<u64> },
    Runs { until: u64 },
}

struct Executor {
    key: String,
    /// By what the ledger decided.
    wants: Capacity,
    is_probe: bool,
    /// On what it runs.
    on: Capacity,
    state: State,
}

#[derive(Default)]
struct Outcome {
    seconds: u64,
    incomplete_seconds: u64,
    spot_seconds: f64,
    on_demand_seconds: f64,
    last_share: f64,
    ratio: f64,
}

struct Job {
    mode: Mode,
    ledger: JobLedger,
    policy: Policy,
    wanted: usize,
    executors: Vec<Executor>,
    next: u64,
    lives: Random,
}

impl Job {
    /// Requests what is missing, as Spark does.
    fn request(&mut self, now: u64) {
        while self.executors.len() < self.wanted {
            let key = format!("exec-{}", self.next);
            self.next += 1;
            let request = self.of(&key, None);
            let PlaceOutcome::Placed(placed) = self.ledger.place(&request, millis(now)) else { return };
            self.executors.push(Executor {
                key,
                wants: placed.capacity,
                is_probe: placed.spot == SpotAnswer::Probe,
                on: placed.capacity,
                state: State::Waits { since: now, node_since: None },
            });
        }
    }

    fn of<'a>(&self, key: &'a str, required: Option<Capacity>) -> PlaceRequest<'a> {
        let overrides = PolicyOverrides::default();
        PlaceRequest { key, required, overrides, policy: Some(self.policy), may_create: true, driver: None }
    }

    /// Removes executors from the job and from the ledger.
    fn remove(&mut self, now: u64, mut is_gone: impl FnMut(&Executor) -> bool) {
        let (gone, kept) = self.executors.drain(..).partition(&mut is_gone);
        self.executors = kept;
        for executor in gone {
            self.ledger.release(&executor.key, None, millis(now));
        }
    }

    /// Gives executors nodes, as far as there is capacity.
    fn schedule(&mut self, now: u64, has_spot: bool) {
        let mut moved = Vec::new();
        for executor in &mut self.executors {
            let State::Waits { since, node_since } = executor.state else { continue };
            let on = match executor.wants {
                Capacity::Spot if has_spot => Some(Capacity::Spot),
                Capacity::Spot if self.mode != Mode::BestEffort => None,
                Capacity::Spot | Capacity::OnDemand => Some(Capacity::OnDemand),
            };
            let Some(on) = on else {
                executor.state = State::Waits { since, node_since: None };
                continue;
            };
            let node_since = node_since.filter(|_| executor.on == on).unwrap_or(now);
            executor.on = on;
            executor.state = State::Waits { since, node_since: Some(node_since) };
            if now - node_since >= NODE_STARTS {
                executor.state = State::Runs { until: now + self.lives.seconds(MEAN_LIFE) };
                if on != executor.wants {
                    moved.push(executor.key.clone());
                }
            }
        }
        // The reconciler counts an executor as what it runs on.
        for key in moved {
            let request = self.of(&key, Some(Capacity::OnDemand));
            self.ledger.place(&request, millis(now));
        }
    }

    /// What the reconciler does with SPOT_FALLBACK_SECONDS, once in each step.
    fn fall_back(&mut self, now: u64) {
        let probe_runs =
            self.executors.iter().any(|executor| executor.is_probe && matches!(executor.state, State::Runs { .. }));
        if probe_runs {
            self.ledger.steer(Steer::OpenSpot, Term(1), millis(now));
            self.executors.iter_mut().for_each(|executor| executor.is_probe = false);
        }
        let is_stuck = |executor: &Executor| match executor.state {
            State::Waits { since, node_since: None } => now - since >= FALLBACK,
            State::Waits { .. } | State::Runs { .. } => false,
        };
        let is_open = self.ledger.steering().spot == balancer_core::SpotState::Open;
        if self.executors.iter().any(|executor| is_stuck(executor) && (is_open || executor.is_probe)) {
            self.ledger.steer(Steer::CloseSpot { retry_after: millis(RETRY) }, Term(1), millis(now));
        }
        let mut left = (self.executors.len() / 10).max(1);
        self.remove(now, |executor| {
            let is_replaced = left > 0 && is_stuck(executor);
            left -= usize::from(is_replaced);
            is_replaced
        });
    }

    fn running(&self, on: Capacity) -> usize {
        let runs = |executor: &&Executor| executor.on == on && matches!(executor.state, State::Runs { .. });
        self.executors.iter().filter(runs).count()
    }
}

fn millis(seconds: u64) -> Millis {
    seconds * 1000
}

/// The life of one job. The same seed brings the same shortages and losses in each mode.
#[expect(clippy::cast_precision_loss, reason = "a few thousand executors")]
fn simulate(seed: u64, mode: Mode) -> Outcome {
    let mut random = Random(seed);
    let wanted = 10 + usize::try_from(random.next() % 91).unwrap_or_default();
    let tenths = usize::try_from(random.next() % 4).ok().and_then(|at| [5, 7, 8, 9].get(at).copied()).unwrap_or(5);
    let ratio = Ratio::from_billionths(tenths * 100_000_000).unwrap_or(Ratio::HALF);
    let policy = Policy { spot_ratio: ratio.into(), ..Policy::DEFAULT };
    let lives = Random(random.next());
    let mut job = Job { mode, ledger: JobLedger::default(), policy, wanted, executors: Vec::new(), next: 1, lives };
    let mut outcome = Outcome { ratio: f64::from(tenths) / 10.0, ..Outcome::default() };
    let (mut has_spot, mut changes_at) = (true, random.seconds(MEAN_SUPPLY));
    let (mut work, mut started) = (WORK * wanted as u64, false);
    let mut now = 0;
    while work > 0 && now < LONGEST {
        if mode != Mode::Plenty && now >= changes_at {
            has_spot = !has_spot;
            changes_at = now + random.seconds(if has_spot { MEAN_SUPPLY } else { MEAN_SHORTAGE });
            if !has_spot {
                // What the cloud reclaims when it has no more to give.
                let (share, mut reclaimed) = (random.share(), Random(random.next()));
                job.remove(now, |executor| {
                    let runs = matches!(executor.state, State::Runs { .. });
                    executor.on == Capacity::Spot && runs && reclaimed.share() < share
                });
            }
        }
        job.remove(now, |executor| matches!(executor.state, State::Runs { until } if now >= until));
        job.request(now);
        job.schedule(now, has_spot);
        if mode == Mode::Fallback {
            job.fall_back(now);
        }
        let (spot, on_demand) = (job.running(Capacity::Spot), job.running(Capacity::OnDemand));
        started |= spot + on_demand == wanted;
        // A part of the executors always waits for a node of a minute. Less than nine in ten is a shortage.
        if started && (spot + on_demand) * 10 < wanted * 9 {
            outcome.incomplete_seconds += STEP;
        }
        outcome.spot_seconds += spot as f64 * STEP as f64;
        outcome.on_demand_seconds += on_demand as f64 * STEP as f64;
        outcome.last_share = spot as f64 / ((spot + on_demand).max(1)) as f64;
        work = work.saturating_sub((spot + on_demand) as u64 * STEP);
        now += STEP;
    }
    outcome.seconds = now;
    outcome
}

#[expect(clippy::cast_precision_loss, reason = "for people to read")]
fn report(name: &str, jobs: u64, mode: Mode) {
    let mut outcomes: Vec<Outcome> = (0..jobs).map(|job| simulate(0x5eed_0000 + job, mode)).collect();
    let count = outcomes.len() as f64;
    let mean = |of: &dyn Fn(&Outcome) -> f64| outcomes.iter().map(of).sum::<f64>() / count;
    let incomplete = mean(&|outcome| outcome.incomplete_seconds as f64) / 60.0;
    let all = |outcome: &Outcome| outcome.spot_seconds + outcome.on_demand_seconds;
    let cost = mean(&|outcome| (outcome.on_demand_seconds + SPOT_PRICE * outcome.spot_seconds) / all(outcome));
    let missing = mean(&|outcome| outcome.ratio - outcome.spot_seconds / all(outcome));
    let missing_last = mean(&|outcome| (outcome.ratio - outcome.last_share).max(0.0));
    let minutes = mean(&|outcome| outcome.seconds as f64) / 60.0;
    outcomes.sort_by_key(|outcome| outcome.seconds);
    let slow = outcomes.get(outcomes.len() * 99 / 100).map_or(0.0, |outcome| outcome.seconds as f64 / 60.0);
    println!(
        "| {name} | {minutes:.0} min | {slow:.0} min | {incomplete:.1} min | {:.1} % | {:.1} | {:.1} |",
        cost * 100.0,
        missing * 100.0,
        missing_last * 100.0
    );
}

fn main() {
    let jobs = std::env::args().nth(1).and_then(|jobs| jobs.parse().ok()).unwrap_or(10_000);
    println!(
        "| | mean time | slowest of a hundred | with less than 9 of 10 executors | cost of all on on-demand | spot missing, mean | at the end |"
    );
    println!("|---|---|---|---|---|---|---|");
    report("spot never runs out", jobs, Mode::Plenty);
    report("`BEST_EFFORT`", jobs, Mode::BestEffort);
    report("`STRICT`", jobs, Mode::Strict);
    report("`STRICT` with the fallback", jobs, Mode::Fallback);
}
